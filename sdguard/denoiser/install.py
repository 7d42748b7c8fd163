"""Putting hooks around a pipeline's denoiser and scheduler for a while; afterwards both are the objects they were."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference
from torch import nn

from sdguard.denoiser.bare import compiled_call, forget, restored
from sdguard.denoiser.families import denoiser_of
from sdguard.denoiser.hook import DenoiserHook, Watcher
from sdguard.denoiser.text_encoding import Encoder

#: under which the hook stands in the library's registry.
HOOK_NAME = "sdguard"

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
if hasattr(os, "register_at_fork"):  # not on Windows; a lock that a thread of the parent holds is never let go in the child
    os.register_at_fork(after_in_child=_locks.clear)


def lock_of(denoiser: nn.Module) -> threading.RLock:
    """The lock under which a denoiser is watched."""
    return _locks.setdefault(denoiser, threading.RLock())


@contextmanager
def attached(denoiser: nn.Module, hook: ModelHook) -> Iterator[None]:
    """Within the block ``hook`` stands around ``denoiser``; around its compiled call, where it is compiled in place."""
    if (compiled := compiled_call(denoiser)) is not None:  # what compiled its forward would compile the hook too
        hook.fn_ref = HookFunctionReference()
        hook.fn_ref.original_forward = compiled
        with restored(denoiser, ("_compiled_call_impl",)):
            vars(denoiser)["_compiled_call_impl"] = functools.partial(hook.new_forward, denoiser)
            yield
        return
    # the registry leaves itself and a bound forward behind on a module that had neither
    with restored(denoiser, ("forward", "_diffusers_hook")):
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        if HOOK_NAME in registry.hooks:  # of a run of the parent's that was under way when this process was forked
            registry.remove_hook(HOOK_NAME, recurse=False)
        registry.register_hook(hook, HOOK_NAME)
        try:
            yield
        finally:
            registry.remove_hook(HOOK_NAME, recurse=False)


@contextmanager
def wrapped(scheduler: Any, wrappers: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Within the block the methods of ``scheduler`` that ``wrappers`` names, as far as it has them, are what the wrappers make of them."""
    methods = {name: wrap(getattr(scheduler, name)) for name, wrap in wrappers.items() if hasattr(scheduler, name)}
    with restored(scheduler, methods):
        vars(scheduler).update(methods)
        yield


@contextmanager
def released(lock: threading.RLock) -> Iterator[None]:
    """Within the block a lock is not held, if this thread holds it; a callback may be called in another."""
    try:
        lock.release()
    except RuntimeError:
        yield
        return
    try:
        yield
    finally:
        try:
            lock.acquire()
        except BaseException:  # an interruption, after which who holds the lock lets it go
            lock.acquire()
            raise


#: opens a block in which a watched pipeline's denoiser and scheduler are as if they were not.
Aside = Callable[[], AbstractContextManager[None]]


@contextmanager
def watched(encoder: Encoder, watcher: Watcher) -> Iterator[Aside]:
    """Within the block ``watcher`` sees every call of the denoiser of the encoder's pipeline, but for those in a block of what it gives.

    Of several threads that share a denoiser one is watched at a time, the others wait until it is over, or in such a block.
    """
    pipe = encoder.pipe
    denoiser = denoiser_of(pipe)
    with (lock := lock_of(denoiser)), ExitStack() as standing:
        hook = DenoiserHook(watcher, encoder)

        def stand() -> None:
            standing.enter_context(attached(denoiser_of(pipe), hook))
            standing.enter_context(wrapped(pipe.scheduler, hook.wrappers))

        @contextmanager
        def aside() -> Iterator[None]:
            standing.close()
            try:
                with released(lock):  # it may wait for a run of another thread
                    yield
            finally:
                stand()

        stand()
        try:
            yield aside
            hook.show_glances()
            hook.show_hidden_texts()
        except BaseException:
            forget(denoiser)
            with suppress(Exception):  # which would hide the one that ended the run
                hook.show_glances()
            raise
