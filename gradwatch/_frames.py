"""Whose code a frame belongs to, and the exact expression an instruction stands for.

What this room knows that no other does: which files are the user's, which are an installed library's,
and which are torch's, Lightning's or GradWatch's own; and how to turn an instruction of a code object
into a ``Site`` with columns in characters.

Limits: columns exist where Python kept them (not under ``-X no_debug_ranges``); text exists where
``linecache`` finds it, which covers notebooks but not every ``exec``.
"""

from __future__ import annotations

import itertools
import linecache
import os
import signal
import sysconfig
from dataclasses import replace
from enum import Enum, auto
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from gradwatch.report import Site

if TYPE_CHECKING:
    from types import CodeType, FrameType


def is_of_a_signal(error: BaseException) -> bool:
    """Tell whether a handler of the user's for a signal has raised an error, which it may do anywhere in our code."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {_code_of(handler) for handler in handlers if callable(handler)} - {None}
    entry = error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code in codes:
            return True
        entry = entry.tb_next
    return False


def _code_of(handler: Any) -> CodeType | None:
    handler = getattr(handler, "func", handler)  # a `partial`
    handler = getattr(handler, "__func__", handler)
    found: CodeType | None = getattr(handler, "__code__", None)
    return found or getattr(type(handler).__call__, "__code__", None)


class Owner(Enum):
    """Who wrote a piece of code."""

    USER = auto()
    LIBRARY = auto()
    """An installed package."""
    MACHINERY = auto()
    """torch, GradWatch, and the standard library: never the place to point at."""
    TRAINER = auto()
    """Lightning: as MACHINERY, and what it does on its own is no use of a value."""


class Place(NamedTuple):
    """An instruction of the innermost frame outside the machinery, and of the user's own, if another."""

    code: CodeType
    instruction: int
    caller: tuple[CodeType, int] | None = None
    by_trainer: bool = False
    """Whether Lightning ran the operation on its own account: a log entry, a scaled loss."""


# NOTE [Codes by id] Python hashes the whole content of a code object at every look-up, which costs
# microseconds: they are looked up by `id`, and kept in the value so that no other takes its place.
_OWNERS: dict[int, tuple[Owner, CodeType]] = {}
_PASSED: set[int] = set()
"""Those of the machinery, which most frames of a step belong to."""
_BY_FILE: dict[str, Owner] = {}
_DISPATCHERS = tuple(f"{os.sep}torch{os.sep}{name}" for name in ("overrides.py", "_tensor.py"))
PLACES: dict[tuple[int, int, bool], Place] = {}
"""The places of the user's own instructions: by ``id`` of the code, instruction, and whether Lightning ran them."""
_OPTIMIZERS: dict[int, tuple[bool, CodeType]] = {}
_IN_DISTRIBUTIONS: dict[int, tuple[bool, CodeType]] = {}


def _folder(package: str) -> str | None:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    places = None if spec is None else spec.submodule_search_locations
    return os.path.realpath(next(iter(places))) + os.sep if places else None


def _folders(*packages: str) -> tuple[str, ...]:
    return tuple(folder for folder in map(_folder, packages) if folder is not None)


_MACHINERY = _folders("torch", "gradwatch")
_TRAINER = _folders(
    "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics"
)
_DISTRIBUTIONS = next(
    (f + "distributions" + os.sep for f in _MACHINERY if f.endswith(os.sep + "torch" + os.sep)), ""
)
_STDLIB = os.path.realpath(sysconfig.get_paths()["stdlib"]) + os.sep
_SCRIPTS = os.path.realpath(sysconfig.get_paths()["scripts"]) + os.sep
"""Where the commands of installed packages lie, `gradwatch` and `torchrun` among them."""
_INSTALLED = tuple(
    {os.path.realpath(sysconfig.get_paths()[key]) + os.sep for key in ("purelib", "platlib")}
)

_BY_FOLDER = (
    (_MACHINERY, Owner.MACHINERY),
    (_TRAINER, Owner.TRAINER),
    (_INSTALLED, Owner.LIBRARY),  # before the standard library, whose folder often holds them
    ((_STDLIB, _SCRIPTS), Owner.MACHINERY),
)


def owner_of_file(name: str) -> Owner:
    if name.startswith("<"):
        return Owner.MACHINERY if name.startswith("<frozen") else Owner.USER
    path = os.path.realpath(name)
    if f"{os.sep}site-packages{os.sep}" in path and not path.startswith(_MACHINERY + _TRAINER):
        return Owner.LIBRARY
    for folders, whose in _BY_FOLDER:
        if path.startswith(folders):
            return whose
    return Owner.USER


def owner(code: CodeType) -> Owner:
    """Return who wrote a code object."""
    known = _OWNERS.get(id(code))
    if known is not None:
        return known[0]
    name = code.co_filename
    whose = _BY_FILE.get(name)
    if whose is None:
        whose = _BY_FILE[name] = owner_of_file(name)
    _OWNERS[id(code)] = (whose, code)
    return whose


def here(frame: FrameType | None) -> Place | None:
    """Return the place at which a frame and those that called it leave the machinery.

    Cost:
        One step per frame of the machinery, a fraction of a microsecond each.
    """
    passed, by_trainer = _PASSED, False
    while frame is not None:
        code = frame.f_code
        if id(code) in passed:
            frame = frame.f_back
            continue
        key = (id(code), frame.f_lasti, by_trainer)
        place = PLACES.get(key)
        if place is not None:
            return place
        whose = owner(code)
        if whose is Owner.USER:
            place = PLACES[key] = Place(code, frame.f_lasti, None, by_trainer)
            return place
        if whose is Owner.LIBRARY:
            caller = _user_above(frame.f_back)
            return Place(frame.f_code, frame.f_lasti, caller, by_trainer)
        if whose is Owner.TRAINER:
            by_trainer = True
        else:
            passed.add(id(code))
        frame = frame.f_back
    return None


def innermost(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame of the user's own."""
    while frame is not None and owner(frame.f_code) is not Owner.USER:
        frame = frame.f_back
    return frame


def call_of_function(frame: FrameType | None) -> Place | None:
    """Return the user's call of the plain function that a frame runs in; None in a method and outside of functions."""
    while frame is not None and owner(frame.f_code) is not Owner.USER:
        frame = frame.f_back
    if frame is None or frame.f_code.co_name.startswith("<"):
        return None
    above = None if frame.f_code.co_varnames[:1] == ("self",) else _user_above(frame.f_back)
    return None if above is None else Place(*above)


def _user_above(frame: FrameType | None) -> tuple[CodeType, int] | None:
    while frame is not None:
        if owner(frame.f_code) is Owner.USER:
            return frame.f_code, frame.f_lasti
        frame = frame.f_back
    return None


def stack(frame: FrameType | None) -> tuple[tuple[CodeType, int], ...]:
    """Return all frames outside the machinery, the innermost first."""
    found = []
    while frame is not None:
        if owner(frame.f_code) in {Owner.USER, Owner.LIBRARY}:
            found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def is_call_from(frame: FrameType, func: object, place: Place | None) -> bool:
    """Tell whether the code at a place called a function of torch itself, not through a module.

    Args:
        frame: The frame from which the mode was called.
        func: The function; its own Python wrapper may stand between.
        place: The place.
    """
    own = getattr(func, "__code__", None)
    above: FrameType | None = frame
    while above is not None and (
        above.f_code is own or above.f_code.co_filename.endswith(_DISPATCHERS)
    ):
        above = above.f_back
    return above is not None and place is not None and above.f_code is place.code


def depth(frame: FrameType | None) -> int:
    """Return the number of frames up to and with this one."""
    count = 0
    while frame is not None:
        count += 1
        frame = frame.f_back
    return count


def switcher(frame: FrameType | None) -> FrameType | None:
    """Return the frame that holds the ``with`` of a gradient mode, below the mode's own methods."""
    while frame is not None and frame.f_code.co_filename.endswith("grad_mode.py"):
        frame = frame.f_back
    return frame


def switched_by(frame: FrameType | None) -> Place | None:
    """Return where a gradient mode was switched: a ``with``, a call, or the decorator of a function."""
    frame = switcher(frame)
    if frame is not None and frame.f_code.co_filename.endswith("_contextlib.py"):
        # Private: how torch calls the function that one of its modes decorates.
        code = getattr(frame.f_locals.get("func"), "__code__", None)
        if code is not None and owner(code) is Owner.USER:
            return Place(code, 0)
    return here(frame)


def is_distribution(code: CodeType) -> bool:
    """Tell whether the code belongs to ``torch.distributions``."""
    known = _IN_DISTRIBUTIONS.get(id(code))
    if known is None:
        inside = bool(_DISTRIBUTIONS) and os.path.realpath(code.co_filename).startswith(
            _DISTRIBUTIONS
        )
        known = _IN_DISTRIBUTIONS[id(code)] = (inside, code)
    return known[0]


def is_optimizer(code: CodeType) -> bool:
    """Tell whether the code belongs to one of torch's optimizers."""
    known = _OPTIMIZERS.get(id(code))
    if known is None:
        inside = f"{os.sep}torch{os.sep}optim{os.sep}" in code.co_filename
        known = _OPTIMIZERS[id(code)] = (inside, code)
    return known[0]


def site_of(place: Place | None, module: str | None = None) -> Site | None:
    """Return the expression at a place, with columns in characters."""
    if place is None:
        return None
    caller = None if place.caller is None else _site(*place.caller, None, None)
    return _site(place.code, place.instruction, module, caller)


def _site(code: CodeType, instruction: int, module: str | None, caller: Site | None) -> Site:
    positions = next(itertools.islice(code.co_positions(), instruction // 2, None), (None,) * 4)
    line, end_line, column, end_column = positions
    span = (line or code.co_firstlineno, column, end_line, end_column)
    return replace(site_in(code.co_filename, span, code.co_qualname, module), caller=caller)


def code_of(function: Any) -> CodeType | None:
    """Return the code of a function, or of an object's ``__call__``."""
    method = function if hasattr(function, "__code__") else type(function).__call__
    code: CodeType | None = getattr(method, "__code__", None)
    return code


def site_of_function(function: Any) -> Site | None:
    """Return the first line of a function, or of an object's ``__call__``; None where it is not Python's."""
    code = code_of(function)
    if code is None or owner(code) is not Owner.USER:
        return None
    return site_in(code.co_filename, (code.co_firstlineno, None, None, None), code.co_qualname)


def site_in(
    file: str,
    span: tuple[int, int | None, int | None, int | None],
    function: str,
    module: str | None = None,
) -> Site:
    """Return the expression in a span of a file: first line, first byte column, last line, last column."""
    line, column, end_line, end_column = span
    text = linecache.getline(file, line).rstrip("\n")
    last = text if end_line in {None, line} else linecache.getline(file, end_line or line)
    if not file.startswith("<"):
        file = os.path.abspath(file)  # noqa: PTH100 -- `resolve` follows links
    return Site(
        file=file,
        line=line,
        end_line=end_line,
        column=_characters(text, column),
        end_column=_characters(last, end_column),
        function=_without_locals(function),
        module=module,
        source=text or None,
    )


def _characters(text: str, column: int | None) -> int | None:
    """Turn an offset in UTF-8 bytes, as Python counts, into one in characters."""
    if column is None or not text:
        return None
    return len(text.encode()[:column].decode(errors="ignore"))


def _without_locals(qualname: str) -> str:
    return qualname.rpartition("<locals>.")[2]
