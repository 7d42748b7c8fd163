"""The identity of a model: what moves it, what does not, and that weights are hashed once."""

from __future__ import annotations

import copy
import functools
import gc
import json
import threading
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor
from families import ATTENTION, build, call, drawn, load_ip_adapter, lora, modular
from torch import Tensor, nn

from sdguard.decision import digests as digests_module
from sdguard.decision import module_state
from sdguard.decision.digests import digests_of
from sdguard.decision.identity import differences, identity, same_model
from sdguard.denoiser.install import attached

SD, SDXL, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
Change = Callable[[Any], object]


@pytest.fixture
def pipe(embedded: Any) -> Any:
    return build(SD, copy.deepcopy(embedded.tokenizer))


def load_lora(pipe: Any, name: str = "style", seed: int = 5, layers: tuple[str, ...] = ATTENTION) -> None:
    pipe.load_lora_weights(lora(pipe, seed, layers), adapter_name=name)


def in_place(tensor: Tensor, place: int = 0) -> None:
    with torch.no_grad():
        tensor.view(-1)[place].add_(1)


def by_data(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data += 0.1


def replace_parameter(pipe: Any) -> None:
    pipe.unet.conv_in.weight = nn.Parameter(pipe.unet.conv_in.weight.detach() * 2)


def replace_data(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data * 2


def replace_module(pipe: Any) -> None:
    pipe.unet.conv_in = nn.Conv2d(4, 8, 3, padding=1)


def tag(pipe: Any) -> None:
    pipe.unet.register_buffer("tag", torch.ones(3))


CHANGES: dict[str, Change] = {
    "an optimizer's step": lambda pipe: in_place(pipe.unet.conv_in.weight, 7),
    "the text encoder's step": lambda pipe: in_place(next(pipe.text_encoder.parameters()), 7),
    "an edit through data": by_data,
    "other data": replace_data,
    "another parameter": replace_parameter,
    "another module": replace_module,
    "a buffer more": tag,
    "a module more": lambda pipe: pipe.unet.add_module("extra", nn.Linear(2, 2)),
    "a module less": lambda pipe: setattr(pipe.unet.conv_in, "bias", None),
    "a textual inversion": lambda pipe: pipe.load_textual_inversion({"<thing>": drawn(2, 16)}),
    "a LoRA": load_lora,
    "an IP-Adapter": load_ip_adapter,
    "FreeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_is_another_after(change: Change, pipe: Any) -> None:
    before = identity(pipe)
    assert identity(pipe) == before
    change(pipe)
    assert not same_model(identity(pipe), before)


def test_a_square_matrix_transposed_through_data_is_another(pipe: Any) -> None:
    before = identity(pipe)
    weight = next(p for p in pipe.unet.parameters() if p.dim() == 2 and p.shape[0] == p.shape[1])
    weight.data = weight.data.t()
    assert not same_model(identity(pipe), before)


def test_a_buffer_edited_in_place_is_another(pipe: Any) -> None:
    tag(pipe)
    before = identity(pipe)
    in_place(pipe.unet.tag)
    assert not same_model(identity(pipe), before)


def test_a_tensor_given_another_dtype_through_data_is_another(pipe: Any) -> None:
    """Its values, version and shape being the same."""
    tag(pipe)
    before = identity(pipe)
    pipe.unet.tag.data = pipe.unet.tag.data.half()
    assert identity(pipe) != before


def test_the_last_row_of_an_embedding_is_looked_at(pipe: Any) -> None:
    """Where a textual inversion writes, through ``data``."""
    before = identity(pipe)
    pipe.text_encoder.get_input_embeddings().weight.data[-1] += 1
    assert not same_model(identity(pipe), before)


def test_weights_made_in_inference_mode_are_looked_at(pipe: Any) -> None:
    with torch.inference_mode():
        replace_module(pipe)
        before = identity(pipe)
        pipe.unet.conv_in.weight.mul_(2)
    assert not same_model(identity(pipe), before)


def test_a_run_leaves_a_model_the_same(pipe: Any) -> None:
    before = identity(pipe)
    call(pipe)
    assert identity(pipe) == before


def test_an_identity_is_the_same_of_equal_models_and_another_of_others(pipe: Any, embedded: Any) -> None:
    assert identity(build(SD, embedded.tokenizer)) == identity(pipe)
    assert not same_model(identity(embedded), identity(pipe))


@pytest.mark.parametrize("name", [SDXL, SD3, FLUX])
def test_every_family_has_one(name: str, embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer)
    before = identity(pipe)
    assert {"text_encoder", "text_encoder_2"} < before["weights"].keys()
    in_place(next(pipe.text_encoder_2.parameters()))
    assert not same_model(identity(pipe), before)


@pytest.mark.parametrize("name", [SDXL, SD3])
def test_a_modular_pipeline_of_the_same_weights_is_the_same_model(name: str, embedded: Any) -> None:
    blocks = modular(name.replace("Pipeline", "ModularPipeline"), embedded.tokenizer)
    assert same_model(identity(blocks), identity(build(name, embedded.tokenizer)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_profile_serves_the_model_in_half_precision_and_no_other(dtype: torch.dtype, pipe: Any, embedded: Any) -> None:
    load_lora(pipe)
    whole = identity(pipe)
    half = identity(pipe.to(dtype))
    assert list(half["weights"]["unet"]) == [str(dtype).removeprefix("torch.")]
    assert same_model(whole, half)
    assert same_model(half, whole)
    in_place(pipe.unet.conv_in.weight)
    assert not same_model(whole, identity(pipe))


def test_the_two_half_precisions_are_not_told_to_be_the_same(pipe: Any) -> None:
    half = identity(pipe.to(torch.float16))
    assert not same_model(half, identity(pipe.to(torch.bfloat16)))


def test_parts_kept_in_float32_do_not_make_another_model(pipe: Any) -> None:
    whole = identity(pipe)
    pipe.to(torch.float16)
    pipe.unet.conv_in.float()
    assert same_model(whole, identity(pipe))


def test_two_half_precisions_in_one_model_are_hashed_as_they_are(pipe: Any) -> None:
    pipe.to(torch.float16)
    pipe.unet.conv_in.bfloat16()
    before = identity(pipe)
    assert list(before["weights"]["unet"]) == ["mixed"]
    in_place(pipe.unet.conv_in.weight)
    assert not same_model(identity(pipe), before)


def test_the_sampler_does_not_matter(pipe: Any) -> None:
    before = identity(pipe)
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        assert identity(pipe) == before
        pipe.scheduler.set_timesteps(7)
        assert identity(pipe) == before


@pytest.mark.parametrize(
    ("setting", "clause"), [({"beta_end": 0.02}, "noise_levels is"), ({"prediction_type": "v_prediction"}, "prediction is v_prediction")]
)
def test_noise_levels_and_what_is_predicted_matter(setting: dict[str, Any], clause: str, pipe: Any) -> None:
    before = identity(pipe)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **setting)
    (difference,) = differences(identity(pipe), before)
    assert difference.startswith(clause)


def test_a_lora_counts_by_its_weights_and_scale_and_not_by_its_name(pipe: Any, embedded: Any) -> None:
    load_lora(pipe)
    on = identity(pipe)
    other = build(SD, embedded.tokenizer)
    load_lora(other, "renamed")
    assert same_model(identity(other), on)
    load_lora(other, "another", seed=9)
    other.set_adapters("another")
    assert not same_model(identity(other), on)
    pipe.set_adapters("style", 0.3)
    (scaled,) = identity(pipe)["adapters"]["unet"]
    assert scaled["scale"] == 0.3
    assert not same_model(identity(pipe), on)


def test_a_lora_that_is_off_leaves_the_base_model(pipe: Any) -> None:
    base = identity(pipe)
    load_lora(pipe)
    pipe.disable_lora()
    assert identity(pipe) == base
    pipe.enable_lora()
    assert not same_model(identity(pipe), base)
    pipe.set_adapters("style", 0.0)
    assert identity(pipe) == base
    pipe.unload_lora_weights()
    assert identity(pipe) == base


def test_the_scale_of_a_call_multiplies_a_lora(pipe: Any) -> None:
    load_lora(pipe)
    once = identity(pipe)
    pipe.set_adapters("style", np.float32(0.5))
    assert identity(pipe, 2.0) == once
    assert not same_model(identity(pipe, np.float64(0.4)), once)
    json.dumps(identity(pipe, np.float64(0.4)))
    assert identity(pipe, 0)["adapters"] == {}


def test_the_scale_of_a_call_is_nothing_without_a_lora(pipe: Any) -> None:
    load_ip_adapter(pipe)
    assert identity(pipe, 0.5) == identity(pipe)


def test_a_lora_scaled_otherwise_in_one_layer_is_another(pipe: Any) -> None:
    load_lora(pipe)
    before = identity(pipe)
    [*filter(lambda module: hasattr(module, "scaling"), pipe.unet.modules())][-1].scaling["style"] *= 0.5
    assert not same_model(identity(pipe), before)


def test_two_loras_are_not_one(pipe: Any) -> None:
    load_lora(pipe)
    one = identity(pipe)
    load_lora(pipe, "thing", seed=9)
    pipe.set_adapters(["style", "thing"], [1.0, 0.5])
    both = identity(pipe)
    assert not same_model(both, one)
    assert not same_model(one, both)
    pipe.set_adapters(["thing", "style"], [0.5, 1.0])
    assert same_model(identity(pipe), both)


def test_a_lora_has_no_scale_in_layers_that_only_another_is_on(pipe: Any, embedded: Any) -> None:
    load_lora(pipe)
    load_lora(pipe, "thing", seed=9, layers=("to_k", "k_proj"))
    pipe.set_adapters(["style", "thing"], [1.0, 0.5])
    assert sorted(adapter["scale"] for adapter in identity(pipe)["adapters"]["unet"]) == [0.5, 1.0]
    (before,) = (adapter for adapter in identity(pipe)["adapters"]["unet"] if adapter["scale"] == 0.5)
    load_lora(other := build(SD, embedded.tokenizer), "thing", seed=9, layers=("to_k", "k_proj"))
    other.set_adapters("thing", 0.5)
    assert identity(other)["adapters"]["unet"] == [before]


def test_a_fused_lora_moves_the_base_weights(pipe: Any) -> None:
    base = identity(pipe)
    load_lora(pipe)
    pipe.fuse_lora(lora_scale=0.6)
    fused = identity(pipe)
    assert fused["adapters"] == {}
    assert not same_model(fused, base)
    pipe.unload_lora_weights()
    assert same_model(identity(pipe), fused)


def test_an_ip_adapter_counts_by_its_weights_and_not_by_its_scale(pipe: Any) -> None:
    base = identity(pipe)
    load_ip_adapter(pipe)
    on = identity(pipe)
    assert on["weights"] == base["weights"]
    pipe.set_ip_adapter_scale(0.3)
    assert identity(pipe) == on
    in_place(next(pipe.unet.encoder_hid_proj.parameters()))
    assert not same_model(identity(pipe), on)


def test_freeu_is_named_and_off_again_is_the_same_model(pipe: Any) -> None:
    base = identity(pipe)
    pipe.enable_freeu(np.float32(0.5), 0.2, 1.2, 1.4)
    assert "unet: FreeU s1=0.5 s2=0.2 b1=1.2 b2=1.4 in 2 modules" in identity(pipe)["patches"][0]
    pipe.enable_freeu(0.5, 0.2, 1.2, 1.5)
    assert "b2=1.5" in identity(pipe)["patches"][0]
    pipe.disable_freeu()
    assert identity(pipe) == base


class Foreign(nn.Conv2d):
    pass


class OwnProcessor(AttnProcessor):
    pass


def patched(forward: Any) -> Any:
    """A forward that bears the name of the one it stands for."""

    @functools.wraps(forward)
    def skipping(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return skipping


def replace_forward(module: nn.Module) -> None:
    module.forward = patched(module.forward)  # type: ignore[method-assign]


def hook(module: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "cache")


def double(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return 2 * output


def replace_class(module: nn.Module) -> None:
    module.__class__ = Foreign


PATCHES: dict[str, tuple[Change, str]] = {
    "a forward": (lambda pipe: replace_forward(pipe.unet), "unet: test_identity.patched.<locals>.skipping in the whole"),
    "a part's forward": (lambda pipe: replace_forward(pipe.unet.conv_in), "unet: test_identity.patched.<locals>.skipping in conv_in"),
    "a forward in a partial": (
        lambda pipe: setattr(pipe.unet, "forward", functools.partial(patched(pipe.unet.forward))),
        "unet: test_identity.patched.<locals>.skipping in the whole",
    ),
    "a hook of diffusers": (lambda pipe: hook(pipe.unet.mid_block), "unet: cache in mid_block"),
    "a hook of torch": (
        lambda pipe: pipe.unet.conv_in.register_forward_hook(double),
        "unet: test_identity.double in conv_in",
    ),
    "a class": (lambda pipe: replace_class(pipe.unet.conv_in), "unet: test_identity.Foreign in conv_in"),
    "a processor": (
        lambda pipe: pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(OwnProcessor()),
        "unet: test_identity.OwnProcessor in mid_block.attentions.0.transformer_blocks.0.attn1",
    ),
}


@pytest.mark.parametrize(("change", "name"), PATCHES.values(), ids=PATCHES)
def test_what_patches_a_model_is_named(change: Change, name: str, pipe: Any) -> None:
    before = identity(pipe)
    change(pipe)
    assert identity(pipe)["patches"] == [name]
    assert not same_model(identity(pipe), before)


def test_a_forward_replaced_in_the_class_is_named(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pipe.unet), "forward", patched(type(pipe.unet).forward))
    assert identity(pipe)["patches"] == ["unet: test_identity.patched.<locals>.skipping in the whole"]


def test_a_forward_replaced_before_a_hook_was_put_around_it_is_named(pipe: Any) -> None:
    replace_forward(pipe.unet)
    with attached(pipe.unet, ModelHook()):
        assert identity(pipe)["patches"] == ["unet: test_identity.patched.<locals>.skipping in the whole"]


def test_a_forward_replaced_after_a_hook_was_put_around_it_is_named(pipe: Any) -> None:
    with attached(pipe.unet, ModelHook()):
        replace_forward(pipe.unet)
        assert identity(pipe)["patches"] == ["unet: test_identity.patched.<locals>.skipping in the whole"]


def test_the_guards_own_hook_and_attention_backends_do_not_matter(pipe: Any) -> None:
    before = identity(pipe)
    pipe.unet.set_attn_processor(AttnProcessor())
    assert identity(pipe) == before
    with attached(pipe.unet, ModelHook()):
        assert identity(pipe) == before
    assert identity(pipe) == before


def offload_sequentially(pipe: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does, to "cpu" instead of "cpu:0", which accelerate takes for another device and fails on."""
    for module in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(module, torch.device("cpu"), offload_buffers=bool(module._parameters))


def offload_groups(pipe: Any) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.unet, cpu, cpu, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offload_sequentially, offload_groups])
def test_where_weights_are_kept_does_not_matter(offload: Change, pipe: Any) -> None:
    before = identity(pipe)
    offload(pipe)
    assert identity(pipe) == before
    call(pipe)
    assert identity(pipe) == before


def test_offloaded_weights_are_looked_at(pipe: Any) -> None:
    offload_sequentially(pipe)
    before = identity(pipe)
    pipe.unet.conv_in._hf_hook.weights_map["weight"].mul_(2)
    assert not same_model(identity(pipe), before)


def test_a_compiled_denoiser_is_the_same_model(pipe: Any) -> None:
    before = identity(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert identity(pipe) == before


def test_channels_last_is_the_same_model(pipe: Any) -> None:
    before = identity(pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    assert identity(pipe) == before


def test_encoders_that_were_dropped_do_not_matter(pipe: Any) -> None:
    load_lora(pipe)
    replace_forward(pipe.text_encoder)
    before = identity(pipe)
    encoder, pipe.text_encoder = pipe.text_encoder, None
    assert same_model(identity(pipe), before)
    assert same_model(before, identity(pipe))
    pipe.text_encoder = encoder
    pipe.text_encoder.set_adapter([])
    assert not same_model(identity(pipe), before)


def test_a_denoiser_is_never_missing(pipe: Any) -> None:
    before = identity(pipe)
    bare = copy.deepcopy(before)
    del bare["weights"]["unet"]
    assert not same_model(before, bare)
    assert not same_model(bare, before)
    assert not same_model(bare, bare)


class Wrapped(Tensor):
    """Values as a quantisation library keeps them: integers and a scale, in a tensor that has neither memory nor a version."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[no-any-return,attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise AssertionError(f"{func} on a quantised tensor")


class Packed(Wrapped):
    """One that says which its parts are."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None


class Blocks(nn.Parameter):
    """Values as GGUF keeps them: bytes under a class of their own."""


@pytest.mark.parametrize("kind", [Packed, Wrapped])
@pytest.mark.parametrize("part", ["codes", "scale"])
def test_a_quantised_tensor_is_named_and_looked_at_in_its_parts(part: str, kind: type[Wrapped], pipe: Any) -> None:
    pipe.unet.conv_in.weight = nn.Parameter(kind(torch.arange(288, dtype=torch.int8).view(8, 4, 3, 3), torch.ones(8)), False)
    before = identity(pipe)
    assert before["patches"] == [f"unet: {kind.__name__} in conv_in"]
    getattr(pipe.unet.conv_in.weight, part).data += 1
    assert not same_model(identity(pipe), before)


def test_a_tensor_under_a_class_of_its_own_is_named_and_looked_at(pipe: Any) -> None:
    pipe.unet.conv_in.weight = Blocks(torch.arange(288, dtype=torch.uint8), False)
    before = identity(pipe)
    assert before["patches"] == ["unet: Blocks in conv_in"]
    pipe.unet.conv_in.weight.data += 1
    assert not same_model(identity(pipe), before)


def test_layerwise_casting_is_named(pipe: Any) -> None:
    before = identity(pipe)
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    cast = identity(pipe)
    assert any(patch.startswith("unet: layerwise_casting in") for patch in cast["patches"])
    assert not same_model(cast, before)


def test_a_digest_is_of_all_values_in_order_however_they_are_laid_out_and_however_many_are_read_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = drawn(6, 5, 4, 3)
    known = digests_of(values)
    monkeypatch.setattr(digests_module, "CHUNK", 70)
    laid_out = values.contiguous(memory_format=torch.channels_last)
    # the shape is hashed first, then the bytes: the same in whatever slices they come
    assert digests_of(values) == digests_of(laid_out) == known
    for place in range(0, values.numel(), 37):
        changed = values.clone()
        in_place(changed, place)
        assert set(digests_of(changed).values()).isdisjoint(known.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_every_dtype_have_a_digest_of_their_own(dtype: torch.dtype) -> None:
    values = torch.zeros(3).to(dtype)
    assert digests_of(values) != digests_of(torch.ones(3).to(dtype))
    assert digests_of(values[:0]) != digests_of(values) != digests_of(values[0])


def test_json_keeps_an_identity(pipe: Any) -> None:
    load_lora(pipe)
    found = identity(pipe, 0.3)
    assert json.loads(json.dumps(found)) == found


def test_a_difference_is_named_with_short_values(pipe: Any) -> None:
    before = identity(pipe)
    in_place(pipe.unet.conv_in.weight)
    load_lora(pipe)
    pipe.disable_lora()
    (what,) = differences(identity(pipe), before)
    assert what.startswith("weights of unet is float32 ")
    assert "the profile's is float32 " in what
    assert len(what) < 160


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are hashed from now on."""
    seen: list[Tensor] = []

    def digest(tensor: Tensor) -> dict[str, str]:
        seen.append(tensor)
        return digests_of(tensor)

    monkeypatch.setattr(module_state, "digests_of", digest)
    return seen


def test_each_tensor_is_hashed_once_also_by_threads_that_ask_at_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, found = counted(monkeypatch), []
    threads = [threading.Thread(target=lambda: found.append(identity(pipe))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4
    assert len(seen) == len({id(t) for part in (pipe.unet, pipe.text_encoder) for t in (*part.parameters(), *part.buffers())})


def test_only_what_changed_is_hashed_again(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    identity(pipe)
    seen = counted(monkeypatch)
    in_place(pipe.unet.conv_in.weight)
    identity(pipe)
    assert [*map(id, seen)] == [id(pipe.unet.conv_in.weight)]
    load_lora(pipe)
    identity(pipe)
    before = len(seen)
    assert all("lora" in name for name, p in pipe.unet.named_parameters() if any(p is t for t in seen[1:]))
    pipe.disable_lora()
    identity(pipe)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    identity(pipe)
    assert len(seen) == before


def test_offloaded_weights_are_not_hashed_again(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    offload_sequentially(pipe)
    before = identity(pipe)
    seen = counted(monkeypatch)
    call(pipe)
    assert identity(pipe) == before
    assert not seen


def test_weights_that_are_moved_are_not_hashed_again(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As model offload moves them, at every call."""
    before = identity(pipe)
    seen = counted(monkeypatch)
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()
    assert identity(pipe) == before
    assert not seen


def test_neither_a_model_nor_memory_that_it_gave_up_is_kept(embedded: Any) -> None:
    pipe = build(SD, embedded.tokenizer)
    load_lora(pipe)
    hook(pipe.unet.mid_block)
    identity(pipe)
    before = weakref.ref(pipe.unet.conv_in.weight.untyped_storage())
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data.clone()
    gc.collect()
    assert before() is None
    unet = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert unet() is None
