"""The embedded model's tokenizer: a byte-pair vocabulary of the world's captions."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A byte-pair vocabulary of the world's captions, in the two files every release of `CLIPTokenizer` reads; trained once."""
    if not (folder / "vocab.json").exists():
        save_vocabulary(captions, folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, bos_token=START, eos_token=END, pad_token=END, unk_token=END)


def save_vocabulary(captions: list[str], folder: Path) -> None:
    """Train a CLIP-style byte-pair vocabulary and write vocab.json and merges.txt."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=2500,
        min_frequency=3,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=[START, END, *(letter + "</w>" for letter in alphabet)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
