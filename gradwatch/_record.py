"""What is noted of one pass: values, operations, writes and backward passes, as numbers and places.

What this room knows that no other does: how a tensor is looked at without keeping it, and what of an
argument list is read. The trace fills these records; the rooms above read them when the tensors are gone.

Limits: the tensors of a call are found in nested lists, tuples and dicts, not inside objects of other classes.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradwatch import _frames
from gradwatch._calls import Kind, Wrapper, public_name

if TYPE_CHECKING:
    import weakref
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from gradwatch._frames import Place


# NOTE [Cheap records] Most calls of a traced step make one tensor, and of most steps nothing is asked
# afterwards. For these calls a few items are put into one flat list, which makes no object that the garbage
# collector has to visit; `Record` turns them into objects when it is first asked. What all objects have lies
# in slots; what is rare is a default of the class below, until an instance is given a dictionary for it.


MADE = "gradwatch made"
"""Key of the place, in the metadata of an autograd node that outlived the pass in which it was made."""
IN_BRIEF = 5
"""Items of an operation that is noted in brief."""


class _RareOfValue:
    __slots__ = ()

    parameter: str | None = None
    """Name of the parameter whose content it is."""
    frozen: bool | None = None
    """Whether that parameter required no grad when it was read; None where it was not read."""
    attribute: tuple[str, str] | None = None
    """Path of the module and name of the attribute that held it before the pass began."""
    label: str | None = None
    """Shape and dtype of a leaf that wants a gradient and is not registered in the model."""
    alien: weakref.ref[Tensor] | None = None
    """That leaf."""
    wrapped: bool = False
    """Whether ``torch.func`` or the like had wrapped it, so that it cannot be followed."""


class Value(_RareOfValue):
    """A tensor's content between two writes."""

    __slots__ = ("__dict__", "producer", "tracked")

    def __init__(self, producer: int | None = None, tracked: bool = False) -> None:  # noqa: FBT001, FBT002
        self.producer = producer
        """Number of the operation that made it; None for what was there before."""
        self.tracked = tracked
        """Whether it had a ``grad_fn``, or wanted a gradient as a leaf, when it was last looked at."""


class _RareOfOp:
    __slots__ = ()

    wrapper: Wrapper | None = None
    call: weakref.ref[Any] | None = None
    """What tells that call of the wrapper from others."""
    inner: Place | None = None
    """Where it ran, when ``place`` is where the user called its wrapper."""
    around: Place | None = None
    """The call of the checkpoint that it ran in, where that is one that works."""
    stack: tuple[tuple[Any, int], ...] = ()
    """The user's frames, the innermost first: for an exit, and for what a Python value may have come to."""
    kept: Mapping[int, int] = MappingProxyType({})
    """For a write: per value it made, the one that the same tensor had before."""
    plain: frozenset[int | str] | None = frozenset()
    """Positions and keywords of arguments that a Python value may have come through; None where
    arguments and text do not correspond."""
    arity: int = 0
    """How many positional arguments it had."""
    into_integers: bool = False
    """Whether it wrote into a tensor whose type has no gradient."""


class Op(_RareOfOp):
    """One call, with the numbers of the values it read and made."""

    __slots__ = (
        "__dict__",
        "func",
        "grad_mode",
        "index",
        "inputs",
        "kind",
        "module",
        "outputs",
        "place",
    )

    def __init__(  # noqa: PLR0917 -- keywords cost, see above
        self,
        index: int,
        func: Any,
        kind: Kind,
        inputs: tuple[int, ...],
        place: Place | None,
        module: str | None = "",
        grad_mode: bool = True,  # noqa: FBT001, FBT002
    ) -> None:
        self.index = index
        self.func = func
        self.kind = kind
        self.inputs = inputs
        self.outputs: tuple[int, ...] = ()
        self.place = place
        self.module = module
        """Path of the innermost module of the user's own that was running; None for a foreign one."""
        self.grad_mode = grad_mode

    @property
    def name(self) -> str:
        """The public name of what the user called."""
        return public_name(self.func) if self.wrapper is None else self.wrapper.public_name


@dataclass(slots=True)
class Backward:
    """One backward pass that was seen."""

    roots: tuple[int, ...]
    """Values it started from."""
    place: Place | None
    accumulates: bool
    """False for ``torch.autograd.grad``, which fills no ``.grad``."""
    inputs: frozenset[int] | None = None
    """``id`` of the tensors named by ``inputs=``; None when it was not given."""
    wanted: tuple[int, ...] = ()
    """The values named by it."""
    after: int = 0
    """Operations that ran before it."""


@dataclass(slots=True, eq=False)
class Write:
    """A tensor changed in place: what an error about saved tensors is explained with."""

    place: Place | None
    targets: frozenset[tuple[tuple[int, ...], str | None]]
    """Shapes of the tensor and of those that share its memory, with the nodes that had made them before
    where the call's name tells that it writes."""
    version: int
    operation: str
    before: tuple[int, ...] = ()
    """The values that were overwritten."""
    made: tuple[int, ...] = ()
    """The values that took their place."""
    around: Place | None = None
    """The call of a Function or the like in which it ran."""
    stack: tuple[tuple[Any, int], ...] = ()
    module: str | None = None
    """Path of the module in which it ran, be it one of torch's own."""


@dataclass(slots=True)
class Failed:
    """A call of the user's that raised."""

    place: Place | None
    read: tuple[int, ...] = ()
    """The values that it was given, those made under ``torch.inference_mode()`` first."""


@dataclass
class Record:
    """All that was noted of a pass; it holds no tensor alive."""

    _ops: list[Op] = field(default_factory=list, init=False)
    _values: list[Value] = field(default_factory=list, init=False)
    _brief: list[Any] = field(default_factory=list, init=False)
    """What is not yet an object, for each operation with one result: function, values read (one as a bare
    number), place, module, and whether the result is tracked."""
    backwards: list[Backward] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    """Operations that ran before each micro-batch."""
    steps: list[tuple[Place | None, frozenset[str]]] = field(default_factory=list)
    """Optimizer steps: where, and the parameters they wrote."""
    spans: list[tuple[frozenset[str], int]] = field(default_factory=list)
    """What each optimizer step wrote, those with a closure too, and the number of backward passes before its end."""
    clearings: dict[str, Place | None] = field(default_factory=dict)
    """Where gradients were emptied since the last backward pass that filled them."""
    assigned: set[str] = field(default_factory=set)
    """Names of those whose ``.grad`` the user's program has filled by hand."""
    gradient_writes: dict[str, Op] = field(default_factory=dict)
    """The operation that last changed a gradient after backward."""
    freezings: dict[str, Place | None] = field(default_factory=dict)
    """Where ``requires_grad`` of a parameter was last switched off."""
    freezing_calls: dict[str, Place] = field(default_factory=dict)
    """The call of the function that did so, where that is no method."""
    read_flags: dict[str, bool] = field(default_factory=dict)
    """Per parameter that was read, whether it required grad at any of the reads."""
    modules_run: set[str] = field(default_factory=set)
    calls: list[tuple[int, int, Place | None]] = field(default_factory=list)
    """Calls of modules from outside of all others: the number of operations before each, before its end, and where."""
    rerun: dict[str, None] = field(default_factory=dict)
    """Paths of modules that a checkpoint ran again in backward, the last one at the end."""
    foreign: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    """Tensors with a ``grad_fn`` that were made out of sight, by the operation that stands for it."""
    outlived: dict[int, Place] = field(default_factory=dict)
    """Where such a tensor was made, in an earlier pass that was traced."""
    keepers: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Path of the module and name of the attribute that held such a tensor when the pass began."""
    failed: Failed | None = None
    in_backward: bool = False
    elsewhere: set[str] = field(default_factory=set)
    """Paths of modules that ran on another thread, which the mode does not see."""
    scripted: dict[int, Place | None] = field(default_factory=dict)
    """Values of unknown making, first read where the user's code calls a function of TorchScript."""
    registrations: dict[int, Place | None] = field(default_factory=dict)
    """Where a parameter became one of a module, by its ``id``."""
    put_in: dict[str, Place | None] = field(default_factory=dict)
    """Where a parameter or a module was assigned to a module that was known before, by its full name."""
    hooks: dict[int, Place | None] = field(default_factory=dict)
    """Where a hook was registered on a value, by number."""
    switches: list[tuple[int, Place | None]] = field(default_factory=list)
    """Where gradient mode was switched off while it was on, None where on again, and the next operation."""
    grad_reads: list[tuple[Place | None, int]] = field(default_factory=list)
    """Where ``.grad`` of a value that is no leaf was read and was None, with the value's number."""
    opaque: bool = False
    """Whether tensors were met that torch.func or the like wraps, and that cannot be followed."""

    @property
    def ops(self) -> list[Op]:
        """The operations, in the order in which they ran."""
        if self._brief:
            self._write_out()
        return self._ops

    @property
    def count(self) -> int:
        """The number of operations so far; those noted in brief stay so."""
        return len(self._ops) + len(self._brief) // IN_BRIEF

    @property
    def values(self) -> list[Value]:
        """The values, by number."""
        if self._brief:
            self._write_out()
        return self._values

    def _write_out(self) -> None:
        """Make the objects for what was noted in brief."""
        brief = iter(self._brief)
        self._brief = []
        ops, values = self._ops, self._values
        for func, inputs, place, module, tracked in zip(*[brief] * IN_BRIEF, strict=True):
            read = (inputs,) if type(inputs) is int else inputs
            op = Op(len(ops), func, Kind.PLAIN, read, place, module)
            op.outputs = (len(values),)
            values.append(Value(op.index, tracked))
            ops.append(op)

    def switch_before(self, op: Op) -> Place | None:
        """Return where gradient mode was switched off for an operation that ran without it."""
        return next((place for first, place in reversed(self.switches) if first <= op.index), None)

    def call_around(self, op: Op) -> Place | None:
        """Return where the module was called, from outside of all others, that an operation ran in."""
        found = (place for begin, end, place in self.calls if begin <= op.index < end)
        return next(found, None)

    def append_choice(self, inputs: tuple[int, ...], place: Place | None) -> int:
        """Note afterwards that the first of some values was chosen by the others; return what was chosen."""
        op = Op(len(self.ops), torch.where, Kind.PLAIN, inputs, place)
        op.outputs = (len(self.values),)
        self.ops.append(op)
        self.values.append(Value(op.index, tracked=True))
        return op.outputs[0]

    def append_copy(self, inputs: tuple[int, ...], number: int, place: Place | None) -> int:
        """Note afterwards that a value was made from Python numbers; return its number."""
        op = Op(len(self.ops), torch.tensor, Kind.COPY_VALUES, inputs, place)
        op.outputs = (number,)
        self.ops.append(op)
        self.values[number].producer = op.index
        return number


def tensors_in(items: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results, also in nested lists and dicts."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from tensors_in(item)
        elif isinstance(item, dict):
            yield from tensors_in(item.values())


_OF_TORCH = frozenset(vars(torch.nn.Module()))


def held_by(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a module holds by the names the user gave it: buffers, and what is no part of the module."""
    yield from module.named_buffers(recurse=False)
    for name, value in vars(module).items():
        if name not in _OF_TORCH:
            yield name, value


_DEEP = 3
"""Objects in objects that are looked into."""
_MOST_ITEMS, _MOST_HOLDERS = 1000, 10_000


def keepers_in(model: torch.nn.Module) -> Iterator[tuple[type, str, str]]:
    """Yield what keeps tensors with a history: the class, its attribute, and how the model reaches it.

    Found are attributes of modules and of the user's own objects that these hold, in containers, partial functions
    and distributions too. Each is looked into once, and some ten thousand at most.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in held_by(module):
            for cls, attribute, inner in _keeping(type(module), name, value, _DEEP, seen):
                yield cls, attribute, f"{path}.{inner}" if path else inner


def _keeping(
    cls: type, name: str, value: Any, depth: int, seen: set[int]
) -> Iterator[tuple[type, str, str]]:
    items = list(_items_in(value, seen))
    if any(isinstance(item, Tensor) and node_of(item) is not None for item in items):
        yield cls, name, name
    for item in items if depth else ():
        if not _is_looked_into(type(item)) or not _is_new(item, seen):  # type: ignore[arg-type]
            continue
        for inner, held in list(getattr(item, "__dict__", {}).items()):
            for owner, attribute, path in _keeping(type(item), inner, held, depth - 1, seen):
                if item is value and not owner.__module__.startswith("torch."):
                    yield owner, attribute, f"{name}.{path}"
                else:  # a record in a container, or a distribution: what holds it is what the user wrote
                    yield cls, name, name


@dataclass(frozen=True, slots=True)
class Unregistered:
    """A parameter that a model holds where ``parameters()`` does not look."""

    path: str
    """The way to it from the model, such as ``layers[0].weight``."""
    holder: type
    """The class of the module that holds it."""
    attribute: str
    kind: type
    """What the attribute is: a list, say."""
    parameter: Tensor


def unregistered(model: torch.nn.Module) -> Iterator[Unregistered]:
    """Yield the parameters in a model's plain lists, dicts, and objects of the user's.

    A module or a tensor that an attribute holds by itself was put past the registration on purpose.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in held_by(module):
            if not isinstance(value, (Tensor, torch.nn.Module)):
                for inner, parameter in _parameters_in(name, value, _DEEP, seen):
                    whole = f"{path}.{inner}" if path else inner
                    yield Unregistered(whole, type(module), name, type(value), parameter)


def _parameters_in(
    path: str, value: Any, depth: int, seen: set[int]
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, torch.nn.Parameter):
        yield path, value
    elif isinstance(value, torch.nn.Module):
        yield from ((f"{path}.{name}", p) for name, p in value.named_parameters())
    elif depth and _is_new(value, seen):
        for inner, item in islice(_parts_of(path, value), _MOST_ITEMS):
            yield from _parameters_in(inner, item, depth - 1, seen)


def _parts_of(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a container or an object of the user's holds, and the way to it."""
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"{path}[{place}]", item) for place, item in enumerate(value))
    elif _is_looked_into(type(value)):  # type: ignore[arg-type]
        held = getattr(value, "__dict__", {})
        yield from ((f"{path}.{name}", item) for name, item in held.items())


def _items_in(value: Any, seen: set[int]) -> Iterator[Any]:
    if isinstance(value, dict):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, partial):
        inner = [*value.args, *value.keywords.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inner = value
    else:
        yield value
        return
    if _is_new(value, seen):
        for item in islice(list(inner), _MOST_ITEMS):
            yield from _items_in(item, seen)


def _is_new(holder: Any, seen: set[int]) -> bool:
    """Tell whether something is to be looked into, and note that it was."""
    is_new = id(holder) not in seen and len(seen) < _MOST_HOLDERS
    seen.add(id(holder))
    return is_new


@lru_cache(maxsize=1024)
def _is_looked_into(cls: type) -> bool:
    """Tell whether objects of a class are the user's own, or distributions: no module, and no library's."""
    if issubclass(cls, (Tensor, torch.nn.Module, type)) or cls.__module__ == "builtins":
        return False
    if issubclass(cls, torch.distributions.Distribution):
        return True
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return file is None or _frames.owner_of_file(file) is _frames.Owner.USER


def read_by(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a call is given; most calls have no nested ones."""
    read: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            read.append(arg)
        elif isinstance(arg, (list, tuple, dict)):
            read.extend(tensors_in((arg,)))
    if kwargs:
        read.extend(tensors_in(kwargs.values()))
    return read


_FEW_DIGITS = 8
"""Characters of a number that a person may have typed: 0.5, 0.999, 1e-3."""
_SHARED = range(-5, 257)
"""Integers of which Python has one object each."""


def plain_numbers_in(item: Any) -> Iterator[float]:
    """Return the first thousand Python numbers in arguments or results whose identity tells where they come from."""
    return islice(_numbers_in(item), 1000)


def _numbers_in(item: Any) -> Iterator[float]:
    kind = type(item)
    if kind is float or (kind is int and item not in _SHARED):
        yield item
    elif kind is list or kind is tuple:
        for inner in item:
            yield from _numbers_in(inner)


def is_telling(number: float) -> bool:
    """Tell whether another number is hardly equal to this one by chance: it has many digits after the point."""
    return bool(number % 1.0) and len(repr(number)) > _FEW_DIGITS


# Private: no public counter tells of a write.
_version = attrgetter("_version")


def version_of(tensor: Tensor) -> int:
    try:
        return int(_version(tensor))
    except (RuntimeError, ValueError):  # inference tensors and lazy parameters keep none
        return 0


def hooks_of(hooked: Tensor | torch.nn.Module) -> list[Any]:
    """Return the functions that were registered to see, and may change, the gradient of a tensor or a module."""
    # Private: nothing public tells them. Without the attribute a hook is not named.
    return list((getattr(hooked, "_backward_hooks", None) or {}).values())


def node_of(tensor: Tensor) -> Any:
    """Return the ``grad_fn`` of a tensor; None too where torch refuses, for a view it has given up."""
    try:
        return tensor.grad_fn
    except RuntimeError:  # its base was written in a way that leaves this view without a history
        return None


def result_of(node: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Return shape and dtype of what an autograd node made first; None where it does not tell."""
    # Private: nothing public tells them without the tensor itself. Without it a loss is explained by its last operation.
    first = next(iter(getattr(node, "_input_metadata", ())), None)
    return None if first is None else (tuple(first.shape), first.dtype)


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return the versions of many tensors, in C where all of them have one."""
    try:
        return list(map(_version, tensors))
    except (RuntimeError, ValueError):
        return list(map(version_of, tensors))


def memory_of(tensor: Tensor) -> int | None:
    """Return the address of the tensor's memory, 0 where it has none yet, None where it cannot be told."""
    try:
        return tensor.untyped_storage().data_ptr()
    except ValueError:  # a lazy parameter
        return 0
    except (RuntimeError, NotImplementedError):  # inside of torch.func, or a layout without memory
        return None


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    try:
        return tuple(tensor.shape)
    except RuntimeError:  # a lazy parameter
        return ()


def label_of(tensor: Tensor) -> str:
    """Return what a tensor must share with another that is used in its place."""
    return f"{shape_of(tensor)} {tensor.dtype}"
