"""Warnings of torch's in a traced step, shown at the line at which they would be without a trace.

What this room knows that no other does: Python shows a warning at a frame, counted from the call that warns, and
in a traced step frames of the trace stand between that call and the user's line. What shows warnings is replaced
while a step is traced, and remembers them where Python itself would: a warning that was shown is not shown again
from the same line in the next step. (New filters would make Python forget them all.)

Limits: filters by the name of a module see the trace's; a warning of a function of torch's in Python is taken to
be about the line that called it.
"""

from __future__ import annotations

import re
import sys
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_ABOUT_HOOKS = "Using `torch.compile(module)` when there are global hooks"
"""What torch warns of where a compiled module is called: the trace's hooks mean no harm."""
_REGISTRY = "__warningregistry__"
_BETWEEN = frozenset(["gradwatch._trace", "torch.overrides"])
_shown_by: Callable[..., Any] = warnings.showwarning
_traces = 0
_filters = ExitStack()


@contextmanager
def shown_without_the_trace() -> Iterator[None]:
    """Show each warning at the user's line, and not at the trace's that has made the call."""
    global _traces, _shown_by  # noqa: PLW0603 -- what shows warnings is global, and traces may overlap
    if not _traces:
        if warnings.showwarning is not _show:  # which a block of the user's may have put back
            _shown_by, warnings.showwarning = warnings.showwarning, _show
        if any(action == "error" for action, *_ in warnings.filters):
            _filters.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", re.escape(_ABOUT_HOOKS))
    _traces += 1
    try:
        yield
    finally:
        _traces -= 1
        if not _traces:
            _filters.close()
            if warnings.showwarning is _show:
                warnings.showwarning = _shown_by


def _show(  # noqa: PLR0917 -- as Python calls it
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as ``warnings.showwarning`` does, unless it was shown from its line before."""
    if str(message).startswith(_ABOUT_HOOKS) and _traces:
        return
    ours = _frame_at(sys._getframe(1), filename, lineno)
    users = None if ours is None else _above(ours)
    if ours is not None and users is not None:
        if _was_shown(ours, users, (str(message), category)):
            return
        filename, lineno = users.f_code.co_filename, users.f_lineno
    _shown_by(message, category, filename, lineno, file, line)


def _frame_at(frame: FrameType | None, filename: str, lineno: int) -> FrameType | None:
    """Return the frame at which Python shows a warning, if it is one of the trace's."""
    while frame is not None and (frame.f_code.co_filename, frame.f_lineno) != (filename, lineno):
        frame = frame.f_back
    return frame if frame is not None and _is_between(frame) else None


def _is_between(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in _BETWEEN


def _above(frame: FrameType) -> FrameType | None:
    """Return the frame that would stand there without a trace.

    A function of torch's in Python runs twice: once until it asks the trace, and once for the trace.
    """
    again = _callee(frame)
    above: FrameType | None = frame
    while above is not None and _is_between(above):
        above = above.f_back
    return above.f_back if above is not None and above.f_code is again else above


def _callee(frame: FrameType) -> Any:
    """Return the code of what a frame has called."""
    inner: FrameType | None = sys._getframe(1)
    while inner is not None and inner.f_back is not frame:
        inner = inner.f_back
    return None if inner is None else inner.f_code


def _was_shown(ours: FrameType, users: FrameType, about: tuple[str, type[Warning]]) -> bool:
    """Move what Python has remembered of a warning from the trace to the user's module; tell whether it was there."""
    noted: dict[Any, Any] = ours.f_globals.get(_REGISTRY, {})
    if not noted.pop((*about, ours.f_lineno), False):
        return False  # it is to be shown each time
    known: dict[Any, Any] = users.f_globals.setdefault(_REGISTRY, {})
    if known.get("version") != noted.get("version"):  # other filters are in force since
        known.clear()
        known["version"] = noted.get("version")
    key = (*about, users.f_lineno)
    before, known[key] = bool(known.get(key)), 1
    return before
