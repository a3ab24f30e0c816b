"""What is known of a function of torch by its name alone, and of the calls that own what runs inside.

What this room knows that no other does: which functions drop a value's history, hand it to Python, copy
it, write it in place, or only look at its shape; and how to recognise, from the frames above an
operation, that the user really called a custom Function, a checkpoint, ``sample()`` or ``deepcopy()``.

Limits: a name says nothing of dtypes or gradient mode; whether a gradient flows is autograd's answer.
"""

from __future__ import annotations

import copy
import linecache
import sys
import weakref
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils.checkpoint import CheckpointFunction

from gradwatch import _frames

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from gradwatch._frames import Place


class Kind(Enum):
    """What a call does to the path of a gradient, judged by what was called alone."""

    PLAIN = auto()
    """Carries a gradient wherever autograd says so."""
    IGNORED = auto()
    """Reads no value: a shape, a flag, a hook, text for a person."""
    SEVER = auto()
    """Hands on the value and drops its history: ``detach``, ``.data``."""
    EXIT = auto()
    """Turns the value into a Python number, a list, or a NumPy array."""
    COPY_VALUES = auto()
    """Copies values into a new leaf: ``torch.tensor``."""
    CONVERT = auto()
    """Hands a tensor on, or copies the values of a list: ``torch.as_tensor``."""
    SHAPE_ONLY = auto()
    """Makes a tensor from another's shape, dtype and device: ``zeros_like``."""
    REWRAP = auto()
    """A new leaf that appeared over a computed value's memory: ``nn.Parameter(h)``."""
    LINK = auto()
    """Made out of sight, and linked through its ``grad_fn``: the result of a custom Function."""
    OPAQUE = auto()
    """Ran where nothing is seen: a module of TorchScript."""
    BACKWARD = auto()
    """Runs a backward pass that fills ``.grad``."""
    GRAD = auto()
    """``torch.autograd.grad``: values computed by a backward pass."""
    HOOK = auto()
    """Registers a hook, which may change a gradient between two nodes."""
    READ_GRAD = auto()
    """Reads ``.grad``."""
    SET_DATA = auto()
    """Assigns ``.data``."""
    SET_GRAD = auto()
    """Assigns ``.grad``."""
    SET_MODE = auto()
    """Switches gradient mode."""
    SET_FLAG = auto()
    """Assigns ``requires_grad``, or asks for ``.grad`` to be kept."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a function's name says."""

    kind: Kind = Kind.PLAIN
    writes: bool = False
    """Whether it changes its first argument."""
    reads: slice | None = None
    """Which of its tensors it reads the values of, where of the others shape or type matter alone."""
    # An enum's member costs ten times as much to look up as these, which are asked of every call.
    ignored: bool = field(init=False)
    simple: bool = field(init=False)
    """Whether it reads its arguments, makes something new, and does nothing else."""
    backward: bool = field(init=False)

    def __post_init__(self) -> None:
        """Answer once what every call is asked."""
        object.__setattr__(self, "ignored", self.kind is Kind.IGNORED)
        object.__setattr__(
            self, "simple", self.kind is Kind.PLAIN and not self.writes and self.reads is None
        )
        object.__setattr__(self, "backward", self.kind in {Kind.BACKWARD, Kind.GRAD})


def _words(text: str, kind: Kind) -> dict[str, Kind]:
    return dict.fromkeys(text.split(), kind)


_BY_NAME = (
    _words("detach detach_ __deepcopy__", Kind.SEVER)
    | _words("tensor new_tensor", Kind.COPY_VALUES)
    | _words("as_tensor asarray", Kind.CONVERT)
    | _words("_set_grad_enabled", Kind.SET_MODE)
    | _words("requires_grad_ retain_grad", Kind.SET_FLAG)
    | _words("register_hook", Kind.HOOK)
    | _words(
        "item tolist numpy __float__ __int__ __index__ __bool__ __complex__ __array__ __contains__ "
        "__format__ is_nonzero equal allclose",
        Kind.EXIT,
    )
    | _words(
        "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros "
        "new_ones new_empty new_full new_empty_strided",
        Kind.SHAPE_ONLY,
    )
    | _words(
        "__repr__ __str__ __len__ __hash__ __reduce_ex__ "
        "register_post_accumulate_grad_hook dim size numel stride is_contiguous is_floating_point "
        "is_complex",
        Kind.IGNORED,
    )
)
_LIKE_ANOTHER = ("view_as", "reshape_as", "expand_as", "type_as", "sum_to_size")
_READS = dict.fromkeys(_LIKE_ANOTHER, slice(1)) | {"new_tensor": slice(1, None)}
_BY_FUNCTION: dict[Any, Kind] = {
    Tensor.backward: Kind.BACKWARD,
    torch.autograd.backward: Kind.BACKWARD,
    torch.autograd.grad: Kind.GRAD,
}
_GETTERS = dict.fromkeys(("T", "mT", "H", "mH", "real", "imag"), Kind.PLAIN) | {
    "data": Kind.SEVER,
    "grad": Kind.READ_GRAD,
}
_SETTERS = {"data": Kind.SET_DATA, "grad": Kind.SET_GRAD, "requires_grad": Kind.SET_FLAG}
_INPLACE_OPERATORS = frozenset(
    [
        "__iadd__",
        "__isub__",
        "__imul__",
        "__itruediv__",
        "__ifloordiv__",
        "__imod__",
        "__ipow__",
        "__iand__",
        "__ior__",
        "__ixor__",
        "__ilshift__",
        "__irshift__",
        "__imatmul__",
        "__idiv__",
    ]
)
_KNOWN: dict[Any, Traits] = {}


def traits_of(func: Any) -> Traits:
    """Return what is known of a function that the mode was handed."""
    return _KNOWN.get(func) or _learn(func)


def _learn(func: Any) -> Traits:
    short = getattr(func, "__name__", "")
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    if short == "__get__":
        traits = Traits(_GETTERS.get(attribute, Kind.IGNORED))
    elif short in {"__set__", "__delete__"}:
        traits = Traits(_SETTERS.get(attribute, Kind.IGNORED))
    else:
        kind = _BY_FUNCTION.get(func) or _BY_NAME.get(short, Kind.PLAIN)
        traits = Traits(kind, _writes(short), _READS.get(short))
    _KNOWN[func] = traits
    return traits


def _writes(short: str) -> bool:
    if short.startswith("__"):
        return short == "__setitem__" or short in _INPLACE_OPERATORS
    return short.endswith("_") and short != "requires_grad_"


def public_name(func: Any) -> str:
    """Return the name of a function as users write it.

    Example:
        >>> public_name(torch.Tensor.data.__get__)
        'torch.Tensor.data'
    """
    name: str | None = resolve_name(func)
    if name is None:
        module = getattr(func, "__module__", None) or "torch"
        name = f"{module}.{getattr(func, '__qualname__', getattr(func, '__name__', '?'))}"
    return name.removesuffix(".__get__").removesuffix(".__set__")


ONE_BY_ONE = frozenset(
    [torch.broadcast_tensors, torch.meshgrid, torch.atleast_1d, torch.atleast_2d]
)
"""Functions of which each result comes from the argument at its place, and from no other."""


class Wrapper(Enum):
    """A call that owns the operations inside it: the user called this, not them."""

    CUSTOM_FUNCTION = auto()
    REENTRANT_CHECKPOINT = auto()
    SAMPLE = auto()
    DEEPCOPY = auto()
    """Of an object with tensors in it."""
    DEEPCOPY_TENSOR = auto()
    """Of one tensor."""
    LOAD = auto()
    """Of the values of one module into another: ``load_state_dict``."""

    @property
    def public_name(self) -> str:
        """What the user called."""
        return {
            Wrapper.CUSTOM_FUNCTION: "torch.autograd.Function.apply",
            Wrapper.REENTRANT_CHECKPOINT: "torch.utils.checkpoint.checkpoint",
            Wrapper.SAMPLE: "torch.distributions.Distribution.sample",
            Wrapper.LOAD: "torch.nn.Module.load_state_dict",
        }.get(self, "copy.deepcopy")


# Code objects rather than names: a user's own function called `forward` is none of these.
_CHECKPOINT: CodeType = CheckpointFunction.forward.__code__
_DEEPCOPY: CodeType = copy.deepcopy.__code__
_LOAD: CodeType = torch.nn.Module.load_state_dict.__code__
_FORWARDS: dict[int, tuple[bool, CodeType]] = {}  # see NOTE [Codes by id]


def _is_function_forward(code: CodeType) -> bool:
    """Tell whether the code is the ``forward`` of a ``torch.autograd.Function``."""
    known = _FORWARDS.get(id(code))
    if known is None:
        todo: list[type] = [torch.autograd.Function]
        while todo:
            cls = todo.pop()
            found = getattr(cls.__dict__.get("forward"), "__func__", None)
            if found is not None and hasattr(found, "__code__"):
                _FORWARDS[id(found.__code__)] = (True, found.__code__)
            todo.extend(cls.__subclasses__())
        known = _FORWARDS.setdefault(id(code), (False, code))
    return known[0]


def find_wrapper(
    frame: FrameType | None, off_depth: int | None
) -> tuple[Wrapper, Place | None, weakref.ref[Any] | None] | None:
    """Return the outermost call that owns what runs in a frame, where the user called it, and its identity.

    Only a checkpoint's call has one: the reference to its ``ctx`` is the same object for all that it owns.

    Args:
        frame: The frame of the operation.
        off_depth: Depth of the frame that switched gradient mode off by hand: a call further in is
            not to blame, since gradients were off before it began.
    """
    found: tuple[Wrapper, FrameType] | None = None
    copies = 0
    while frame is not None:
        code = frame.f_code
        if code is _CHECKPOINT:
            found = (Wrapper.REENTRANT_CHECKPOINT, frame)
        elif code is _DEEPCOPY:
            copies += 1
            found = (Wrapper.DEEPCOPY if copies > 1 else Wrapper.DEEPCOPY_TENSOR, frame)
        elif code is _LOAD:
            found = (Wrapper.LOAD, frame)
        elif code.co_name == "forward" and _is_function_forward(code):
            found = (Wrapper.CUSTOM_FUNCTION, frame)
        elif code.co_name in {"sample", "sample_n"} and _frames.is_distribution(code):
            found = (Wrapper.SAMPLE, frame)
        frame = frame.f_back
    if found is None:
        return None
    kind, outer = found
    if not copies and off_depth is not None and off_depth < _frames.depth(outer):
        return None
    # Reading a frame's variables keeps what they held alive until the frame ends: only torch's own are read.
    ctx = outer.f_locals.get("ctx") if kind is Wrapper.REENTRANT_CHECKPOINT else None
    return kind, _frames.here(outer.f_back), None if ctx is None else weakref.ref(ctx)


_NO_SCRIPT: dict[int, CodeType] = {}  # see NOTE [Codes by id]


def calls_script(frame: FrameType) -> bool:
    """Tell whether a frame's code names a function of TorchScript, whose inside nothing sees.

    Found are globals, local variables, and attributes of objects in local variables.
    """
    code = frame.f_code
    if id(code) in _NO_SCRIPT:
        return False
    known = frame.f_locals
    held = [getattr(value, "__dict__", {}) for value in known.values()]
    for name in (*code.co_names, *known):
        for home in (frame.f_globals, known, *held):
            if isinstance(home.get(name), torch.jit.ScriptFunction):
                return True
    _NO_SCRIPT[id(code)] = code
    return False


def wraps_in_variables(frame: FrameType | None) -> bool:
    """Tell whether code on the stack is of a file that wraps tensors in ``Variable``, which no mode sees."""
    while frame is not None:
        if _frames.owner(frame.f_code) is _frames.Owner.USER:
            lines = linecache.getlines(frame.f_code.co_filename)
            if any("Variable(" in line for line in lines):
                return True
        frame = frame.f_back
    return False


def dynamo_is_loaded() -> bool:
    """Tell whether anything can have been compiled in this process."""
    return "torch._dynamo" in sys.modules
