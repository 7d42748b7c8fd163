"""What code from elsewhere keeps from one call of a denoiser to the next, and putting it back.

A patch may count calls, keep what it computed, follow a controller or draw numbers of its own (TeaCache by hand, prompt-to-prompt). What it
keeps lies in attributes, closures, containers, tensors and generators that can be reached from it; each is copied here, and is put back
into the very object that held it. What it keeps out of Python's sight is not seen.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import operator
import pickle
import random
import sys
import threading
import weakref
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from sdguard.denoiser.foreign import TRUSTED, code_of


class Kept(NamedTuple):
    """One object that may change.

    Attributes:
        is_same: whether it is what it was, but for what is set up once.
        restore: puts it back to that; told whether anything was made, it leaves switches on that went on with it.
        again: gives the same of what it is now.
        has_made: whether something was made in it where there was nothing.
        is_memory: whether it is memory alone, which a captured graph writes what it gives into.
    """

    is_same: Callable[[], bool]
    restore: Callable[[bool], None]
    again: Callable[[], Kept]
    has_made: Callable[[], bool] = lambda: False
    is_memory: bool = False


#: attributes of torch's own, and those under which what a run lasts for is put on a module.
NOT_KEPT = frozenset(
    {*vars(nn.Module()), "forward", "_old_forward", "_diffusers_hook", "_hf_hook", "_compiled_call_impl", "_internal_dict"}
)
#: attributes under which torch has a module's hooks, and what is known of each.
HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith(("_forward_hooks", "_forward_pre_hooks")))
#: classes of what cannot change, or is no patch's to change.
FIXED = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, nn.Parameter, ModuleType)
#: containers that may be looked into wherever they are held.
CONTAINERS = (dict, list, set, deque, UserDict, UserList)
#: elements of a module's buffers up to which they are copied: a count or a mean is, weights in a form of somebody's own are not.
SMALL = 1 << 16
#: elements of a container, and bytes of all tensors, beyond which they are left alone: it is data, and no patch's memory of a call.
MANY, LARGE = 100_000, 1 << 28
#: elements of a container beyond which they are not looked into, and objects that are looked at in all.
LOOKED_INTO, MOST = 1 << 9, 1 << 11
#: packages whose objects threads and processes wait for each other by.
CONCURRENT = frozenset({"_thread", "threading", "queue", "_queue", "concurrent", "asyncio", "multiprocessing", "subprocess", "socket"})
MISSING = object()

#: the package's own, by whose name it is found.
logger = logging.getLogger("sdguard")


def kept_by(roots: Iterable[Any], within: Iterable[nn.Module] = ()) -> list[Kept]:
    """Copies of all that is kept by ``roots`` and by what can be reached from them.

    Of modules, all inside them is looked at as well, but for those of ``within``, which are looked at where they are roots or reached.
    What is data by its size, or cannot be read, is left as it is; so is, with a warning, what is still to come once `MOST` objects, `MANY`
    entries of containers or `LARGE` bytes have been copied.
    """
    seen: dict[int, Any] = {}
    known = set(map(id, within))
    found, things, room, entries = [], list(roots), LARGE, MANY
    own = frozenset(code_of(root)[0] for root in things) - TRUSTED
    for thing in things:
        with contextlib.suppress(Exception):
            if id(thing) in seen or isinstance(thing, FIXED) or is_concurrent(thing) or is_data(thing):
                continue
            seen[id(thing)] = thing  # held, so that no other object comes to have its id
            room -= int(thing.nbytes) if isinstance(thing, (Tensor, np.ndarray)) else 0
            entries -= len(thing) if isinstance(thing, CONTAINERS) else 0
            if len(seen) > MOST or room < 0 or entries < 0:
                warn_of_much()
                break
            kept, below = copied(thing, own)
            found.extend(kept)
            if not (isinstance(thing, CONTAINERS) and len(thing) > LOOKED_INTO):
                things.extend(below)
            if isinstance(thing, nn.Module) and id(thing) not in known:
                things.extend(vars(thing)["_modules"].values())
            elif isinstance(thing, (Tensor, *CONTAINERS)) and getattr(thing, "__dict__", None):  # of a class of somebody's own
                found.append(of_namespace(vars(thing)))
                things.extend(vars(thing).values())
    return found


@functools.cache
def warn_of_much() -> None:
    """Say, once, that not all is put back."""
    logger.warning(
        "sdguard: code from elsewhere on the denoiser keeps so much that not all of it is put back after the guard's own evaluations; what "
        "it counts or computes from that may be other than without the guard"
    )


def is_concurrent(thing: Any) -> bool:
    """Whether an object is what threads or processes wait for each other by, which is nobody's to wind back."""
    of_thread = isinstance(thing, threading.local)  # this one's alone
    return not of_thread and any(base.__module__.partition(".")[0] in CONCURRENT for base in type(thing).__mro__)


def is_data(thing: Any) -> bool:
    """Whether an object is too large to be what a patch keeps of a call."""
    if isinstance(thing, (Tensor, np.ndarray)):
        return int(thing.nbytes) > LARGE
    return isinstance(thing, (*CONTAINERS, tuple, frozenset)) and len(thing) > MANY


def has_changed(kept: Iterable[Kept]) -> bool:
    """Whether anything is another than when it was copied, values in memory aside."""
    for of in kept:
        with contextlib.suppress(Exception):
            if not of.is_memory and not of.is_same():
                return True
    return False


def changed_since(kept: Iterable[Kept]) -> list[Kept]:
    """What is another than when it was copied, copied as it is now."""
    found = []
    for of in kept:
        with contextlib.suppress(Exception):
            if not of.is_same():
                found.append(of.again())
    return found


def put_back(kept: Iterable[Kept]) -> None:
    """Put everything back to what it was when it was copied, but for what is set up once.

    That is what was made where there was nothing, with the switches that went on beside it: it would be made twice. A switch that went on
    by itself goes back with the numbers that it stands for.
    """
    kept, made = list(kept), False
    for of in kept:
        with contextlib.suppress(Exception):
            made = made or of.has_made()
    for of in kept:
        with contextlib.suppress(Exception):  # what cannot be compared or written to; the others are
            of.restore(made)


@contextlib.contextmanager
def left_alone(foreign: Sequence[Any], within: Sequence[nn.Module]) -> Iterator[None]:
    """After the block what some ``foreign`` code keeps is what it was."""
    kept = [*kept_by(foreign, within), *hooks_of(within)] if foreign else []
    try:
        yield
    finally:
        put_back(kept)


def copied(thing: Any, own: frozenset[str]) -> tuple[list[Kept], Iterable[Any]]:
    """What of one object can change, and what can be reached from it; ``own`` are the packages that patches come from."""
    match thing:
        case Tensor():
            return [of_tensor(thing)], ()
        case np.ndarray():
            return [of_state(thing.copy, partial(np.copyto, thing), same_bytes)], thing.flat if thing.dtype == object else ()
        case torch.Generator():
            return [of_state(thing.get_state, thing.set_state, torch.equal)], ()
        case np.random.Generator():
            bits = thing.bit_generator
            return [of_state(lambda: bits.state, partial(setattr, bits, "state"), same_pickles)], ()
        case np.random.RandomState():
            return [of_state(thing.get_state, thing.set_state, same_pickles)], ()
        case random.Random():
            return [of_state(thing.getstate, thing.setstate, same_pickles)], ()
        case dict():
            return [of_mapping(thing)], dict.values(thing)
        case bytearray() | array():
            return [of_state(partial(copy.copy, thing), partial(thing.__setitem__, slice(None)))], ()
        # by the containers' own methods, as a class may have others of these names, which count or refuse
        case list():
            return [of_state(partial(list.copy, thing), partial(list.__setitem__, thing, slice(None)), same_objects)], list.__iter__(thing)
        case deque():
            return [of_state(partial(deque.copy, thing), partial(refill, deque, thing, deque.extend), same_objects)], deque.__iter__(thing)
        case set():
            return [of_state(partial(set.copy, thing), partial(refill, set, thing, set.update), set.__eq__)], set.__iter__(thing)
        case tuple() | frozenset():
            return [], thing
        case SimpleNamespace() | UserDict() | UserList():
            return [of_namespace(vars(thing))], vars(thing).values()
        case CellType():
            return of_cell(thing)
        case MethodType():
            return [], (thing.__self__, thing.__func__)
        case BuiltinMethodType():
            return [], (thing.__self__,)
        case staticmethod() | classmethod():
            return [], (thing.__func__,)
        case property():
            return [], (thing.fget, thing.fset)
        case weakref.ref():
            return [], (thing(),)
        case partial():
            return [], (thing.func, *thing.args, *thing.keywords.values())
        case FunctionType():
            return of_function(thing, own)
        case type():
            return of_class(thing, own)
        case nn.Module():
            return of_module(thing)
    return of_instance(thing, own)


def same_objects(some: Any, others: Any) -> bool:
    """Whether two lists hold the very same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def same_bytes(some: Any, others: Any) -> bool:
    """Whether two arrays hold the same bytes."""
    return bool(some.tobytes() == others.tobytes())


def same_pickles(some: Any, others: Any) -> bool:
    """Whether two states of a generator, with arrays in them or not, are the same."""
    return pickle.dumps(some) == pickle.dumps(others)


def refill(kind: Any, collection: Any, add: Callable[[Any, Any], None], elements: Any) -> None:
    """Give a collection other elements."""
    kind.clear(collection)
    add(collection, elements)


def of_state(read: Callable[[], Any], write: Callable[[Any], Any], same: Callable[[Any, Any], bool] = operator.eq) -> Kept:
    """What is read and written as a whole."""
    before = read()

    def restore(made: bool) -> None:
        if not same(read(), before):
            write(before)

    return Kept(lambda: same(read(), before), restore, partial(of_state, read, write, same))


def of_tensor(tensor: Tensor) -> Kept:
    """A tensor's values, of which torch's own count of writes does not tell all."""
    values = tensor.detach().clone()

    def is_same() -> bool:
        return torch.equal(tensor, values) or bool(((tensor == values) | (tensor.isnan() & values.isnan())).all())

    def restore(made: bool) -> None:
        if not is_same():
            with torch.inference_mode():
                tensor.copy_(values)

    return Kept(is_same, restore, partial(of_tensor, tensor), is_memory=True)


def of_mapping(live: dict[Any, Any]) -> Kept:
    """The entries of a dictionary, in their order; those that are as they were are not written to, as others may write beside."""
    kind: Any = OrderedDict if isinstance(live, OrderedDict) else dict  # whose order is its own
    before = dict(kind.items(live))

    def now() -> dict[Any, Any]:
        return dict(kind.items(live))

    def restore(made: bool) -> None:
        for key in now().keys() - before.keys():
            kind.__delitem__(live, key)
        if list(now()) != [key for key in before if key in now()]:
            kind.clear(live)
        held = now()
        for key, value in before.items():
            if held.get(key, MISSING) is not value:
                kind.__setitem__(live, key, value)

    def is_same() -> bool:
        return list(now()) == list(before) and same_objects(list(now().values()), list(before.values()))

    return Kept(is_same, restore, partial(of_mapping, live))


def is_made(was: Any, now: Any) -> bool:
    """Whether something was made where there was nothing, and is no value that is kept of a call."""
    plain = (bool, int, float, complex, str, tuple, Tensor, np.ndarray, *CONTAINERS)
    return (was is MISSING or was is None) and not (now is MISSING or now is None or isinstance(now, plain))


def is_switch(was: Any, now: Any) -> bool:
    """Whether a switch went on."""
    return (was is MISSING or was is None or was is False) and now is True


def of_names(read: Callable[[], dict[str, Any]], write: Callable[[str, Any], None], remove: Callable[[str], None]) -> Kept:
    """What stands under names."""
    before = read()

    def pairs() -> dict[str, tuple[Any, Any]]:
        now = read()
        found = {name: (before.get(name, MISSING), now.get(name, MISSING)) for name in {*before, *now}}
        return {name: (was, of) for name, (was, of) in found.items() if of is not was}

    def is_same() -> bool:
        return all(is_made(*pair) or is_switch(*pair) for pair in pairs().values())

    def has_made() -> bool:
        return any(is_made(*pair) for pair in pairs().values())

    def restore(made: bool) -> None:
        for name, (was, now) in pairs().items():
            if is_made(was, now) or (made and is_switch(was, now)):
                continue
            if was is MISSING:
                remove(name)
            else:
                write(name, was)

    return Kept(is_same, restore, partial(of_names, read, write, remove), has_made)


def of_namespace(live: dict[str, Any], names: Callable[[str], bool] = lambda name: True) -> Kept:
    """Attributes or variables under some names."""
    return of_names(lambda: {name: of for name, of in live.items() if names(name)}, live.__setitem__, live.__delitem__)


def of_cell(cell: Any) -> tuple[list[Kept], Iterable[Any]]:
    """What a closure's variable holds."""
    if cell == CellType():  # not assigned yet
        return [], ()
    names = partial(of_names, lambda: {"contents": cell.cell_contents}, lambda _, value: setattr(cell, "cell_contents", value))
    return [names(lambda _: None)], (cell.cell_contents,)


def package_of(thing: Any) -> str:
    """The package that a function, a class or a module comes from."""
    match thing:
        case FunctionType():  # also within what decorates it
            return code_of(inspect.unwrap(thing))[0]
        case ModuleType():
            name = thing.__name__
        case _:
            name = thing.__module__
    return str(name).partition(".")[0]


@functools.cache
def is_users(package: str) -> bool:
    """Whether a package is the user's own: neither Python's, nor installed beside the libraries."""
    if package == "__main__":
        return True
    file = str(getattr(sys.modules.get(package), "__file__", None))
    return package not in TRUSTED and package not in sys.stdlib_module_names and "-packages" not in file


def is_looked_into(package: str, own: frozenset[str]) -> bool:
    """Whether what comes from a package may be a patch's: it is that of one, or the user's."""
    return package in own or is_users(package)


def of_function(function: Any, own: frozenset[str]) -> tuple[list[Kept], Iterable[Any]]:
    """A function's closure, attributes and defaults; of one from elsewhere the global variables that it may write to as well."""
    held, package = vars(function), code_of(function)[0]
    below = [*(function.__closure__ or ()), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *held.values()]
    if not is_looked_into(package, own):
        return [of_namespace(held)], below
    names, module = {*names_in(function.__code__)}, function.__globals__

    def is_near(thing: Any) -> bool:
        return is_looked_into(package_of(thing), own)

    # its module, and the modules that it names
    spaces = [module, *(vars(of) for of in named(module, names) if isinstance(of, ModuleType) and is_near(of))]
    reached = [of for space in spaces for of in named(space, names) if not isinstance(of, (FunctionType, type)) or is_near(of)]
    return [of_namespace(held), *(of_namespace(space, names.__contains__) for space in spaces)], [*below, *reached]


def named(space: dict[str, Any], names: set[str]) -> list[Any]:
    """What some names stand for among a module's global variables."""
    return [space[name] for name in names if name in space]


def names_in(code: Any) -> Iterator[str]:
    """The names that a piece of code and those in it use, of global variables among others."""
    yield from code.co_names
    for inner in code.co_consts:
        if hasattr(inner, "co_names"):
            yield from names_in(inner)


def of_class(kind: type, own: frozenset[str]) -> tuple[list[Kept], Iterable[Any]]:
    """What a class holds that is no code of its own, and where it comes from elsewhere its methods and bases."""

    def data() -> dict[str, Any]:
        return {name: value for name, value in vars(kind).items() if is_attribute(name, value)}

    held = data()
    kept = [of_names(data, partial(setattr, kind), partial(delattr, kind))]
    if not is_looked_into(package_of(kind), own):
        return kept, held.values()
    bases = [base for base in kind.__bases__ if is_looked_into(package_of(base), own)]
    code = [of for of in vars(kind).values() if isinstance(of, (FunctionType, staticmethod, classmethod, property))]
    inner = [of for of in vars(kind).values() if isinstance(of, type) and is_looked_into(package_of(of), own)]
    return kept, [*held.values(), *bases, *code, *inner]


def is_attribute(name: str, value: Any) -> bool:
    """Whether a class's attribute is data: no method, no property and nothing of Python's own."""
    return not (name.startswith(("__", "_abc_")) or isinstance(value, type) or hasattr(value, "__get__"))


def of_module(module: nn.Module) -> tuple[list[Kept], Iterable[Any]]:
    """What was put on a module beside what torch and diffusers have there, and buffers of few numbers."""
    held, buffers = vars(module), vars(module)["_buffers"]
    own = [value for name, value in held.items() if name not in NOT_KEPT]
    small = [buffer for buffer in buffers.values() if buffer is not None and buffer.numel() <= SMALL]
    kept = [of_namespace(held, lambda name: name not in NOT_KEPT), of_mapping(buffers), of_mapping(held["_modules"])]
    return kept, [*own, *small, type(module)]


def hooks_of(modules: Iterable[nn.Module]) -> list[Kept]:
    """The hooks of torch's on modules."""
    return [of_hooks(module) for module in modules if any(vars(module)[name] for name in HOOKS)]


def of_hooks(module: nn.Module) -> Kept:
    """The hooks of torch's on a module: one that takes itself away at a call is there for the next. Where none did, those added stay."""
    before = {name: dict(vars(module)[name]) for name in HOOKS}

    def lost() -> list[str]:
        return [name for name, hooks in before.items() if hooks.keys() - vars(module)[name].keys()]

    def restore(made: bool) -> None:
        for name in before if lost() else ():  # what was added beside is what a lost one will add again
            live = vars(module)[name]  # the very one that a hook's handle takes it from
            live.clear()
            live.update(before[name])

    return Kept(lambda: not lost(), restore, partial(of_hooks, module))


def numbers_of(module: nn.Module) -> Kept:
    """The numbers among a module's attributes."""
    held = vars(module)
    return of_namespace(held, lambda name: type(held.get(name)) in (int, float))


def of_instance(thing: Any, own: frozenset[str]) -> tuple[list[Kept], Iterable[Any]]:
    """The attributes of an object; of a library's, or a pipeline, those alone that are plain, containers or a patch's."""
    held = getattr(thing, "__dict__", None)
    if isinstance(thing, DiffusionPipeline) or not is_looked_into(package_of(type(thing)), own):
        if not isinstance(held, dict):
            return [], ()
        shallow = (*FIXED, *CONTAINERS, SchedulerMixin)
        seen = {name: of for name, of in held.items() if isinstance(of, shallow) or is_looked_into(package_of(type(of)), own)}
        # a function whose results are remembered holds that which gives them
        return [of_namespace(held, seen.keys().__contains__)], [held.get("__wrapped__"), *seen.values()]
    slots = list(slots_of(type(thing)))

    def filled() -> dict[str, Any]:
        return {name: getattr(thing, name) for name in slots if hasattr(thing, name)}

    # past what a class does where it is written to, as a frozen one refuses
    kept = [of_names(filled, partial(object.__setattr__, thing), partial(object.__delattr__, thing))] if slots else []
    below = list(filled().values())
    if isinstance(held, dict):
        kept.append(of_namespace(held))
        below += held.values()
    return kept, [*below, type(thing)]


def slots_of(kind: type) -> Iterator[str]:
    """The names of the slots of a class, as they are found on its objects."""
    for base in kind.__mro__:
        declared = vars(base).get("__slots__", ())
        for name in (declared,) if isinstance(declared, str) else declared:
            is_private = name.startswith("__") and not name.endswith("__")
            yield f"_{base.__name__.lstrip('_')}{name}" if is_private else name
