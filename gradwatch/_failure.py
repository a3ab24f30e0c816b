"""What is known of an error that ended a step, and how the places in a note on it are written.

What this room knows that no other does: which lines of a traceback are the user's own, what the frames of
torch's held as it raised, and which call, backward pass or operation of the trace was the last one.

Limits: what frames held is read by the names of torch's own local variables; where one has moved, a note has
one line less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradwatch import _error_words, _frames, _nearby, _source, _statements, _words
from gradwatch._evidence import MODES, inference_around
from gradwatch._record import node_of, tensors_in
from gradwatch.report import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from torch import nn

    from gradwatch._diagnose import Inspection
    from gradwatch._record import Backward, Failed, Op
    from gradwatch._trace import Trace

    Find = Callable[["Raised"], str | None]


BY_PLACE: dict[Find, str] = {}
"""Explanations that need nothing but the line that raised, with their words."""


@dataclass(frozen=True, slots=True)
class Raised:
    """An error, and what is known of the step that it ended."""

    error: Exception
    inspection: Inspection
    model: nn.Module

    @property
    def message(self) -> str:
        return str(self.error)

    @property
    def trace(self) -> Trace:
        return self.inspection.trace

    @property
    def failed(self) -> Failed | None:
        """The call of torch's that raised this very error, and none that the user has caught before."""
        failed = self.trace.failed
        if failed is None or failed.place is None:
            return None
        passed = ((entry.tb_frame.f_code, entry.tb_lasti) for entry in entries(self.error))
        return failed if failed.place[:2] in passed else None

    @property
    def asked(self) -> Backward | None:
        """The backward pass that raised this very error, before it began or on its way."""
        last = self.trace.backwards[-1] if self.trace.backwards else None
        failed = self.failed
        return (
            last if last is not None and failed is not None and last.place == failed.place else None
        )

    def callers_of(self, place: _frames.Place | None) -> list[_frames.Place]:
        """Return the calls that chose what an expression was given, the outermost first."""
        stack = users_own(self.error)
        while stack and place is not None and stack[-1][:2] != place[:2]:
            stack.pop()
        return _choosers(stack)

    def cut_of(self, numbers: Iterable[int]) -> str | None:
        """Return where values lost their history: an operation, or the freezing of what they came from."""
        trace, seen = self.trace, set[int]()
        todo = [number for number in numbers if not trace.values[number].tracked]
        while todo:
            number = todo.pop(0)
            op = self.maker_of(number)
            if number in seen or op is None:
                continue
            seen.add(number)
            names = {trace.values[n].parameter for n in op.inputs} - {None}
            frozen = self.frozen_at(name for name in names if name is not None)
            if frozen is not None:
                return frozen
            if any(trace.values[n].tracked for n in op.inputs):
                return listed(at(op.place), at(op.inner), self.switched_off(op))
            todo.extend(op.inputs)
        return None

    def switched_off(self, op: Op) -> str | None:
        """Return where gradients, or inference mode, were switched for an operation that ran without them."""
        if op.grad_mode:
            return None
        switch = self.trace.switch_before(op)
        around = inference_around(op) if switch is None else None
        if around is not None:
            return role_of("gradients are off in there", statement(around))
        helper = None if switch is None else _nearby.switch_in_helper(switch[:2], MODES)
        made = None if helper is None else statement(helper)
        return role_of("gradients are off from here on", listed(made, at(switch)))

    def frozen_at(self, names: Iterable[str]) -> str | None:
        """Return where one of some parameters was frozen in this step, and the call that did so."""
        trace = self.trace
        name = next((name for name in names if name in trace.freezings), None)
        if name is None:
            return None
        call = role_of("called here", at(trace.freezing_calls.get(name)))
        return listed(at(trace.freezings[name]), call)

    def maker_of(self, number: int) -> Op | None:
        """Return the operation that made a value, where it ran in this step."""
        producer = self.trace.values[number].producer
        return None if producer is None else self.trace.ops[producer]


def history_of(trace: Trace, roots: Iterable[int]) -> set[int]:
    """Return the values with a history that some were computed from, these included."""
    found: set[int] = set()
    todo = list(roots)
    while todo:
        number = todo.pop()
        value = trace.values[number]
        if number not in found and value.tracked and value.producer is not None:
            found.add(number)
            todo.extend(trace.ops[value.producer].inputs)
    return found


def callers_in(stack: Iterable[tuple[Any, int]]) -> list[_frames.Place]:
    """Return the same of an operation whose frames were kept, the innermost first."""
    steps = [step for step in stack if _frames.owner(step[0]) is _frames.Owner.USER]
    return _choosers([_frames.Place(*step) for step in reversed(steps)])


def _choosers(stack: list[_frames.Place]) -> list[_frames.Place]:
    found: list[_frames.Place] = []
    while len(stack) > 1 and _source.is_of_arguments(stack.pop()[:2]):
        found.insert(0, stack[-1])
    return found


def begun_at(error: Exception) -> list[Any]:
    """Return the nodes of the tensors that the call which raised was given: what a backward began at."""
    nodes: list[Any] = []
    for entry in entries(error):
        held = entry.tb_frame.f_locals
        given = [held.get(name) for name in ("self", "tensors", "outputs")]
        nodes = [node for tensor in tensors_in(given) if (node := node_of(tensor))] or nodes
    return nodes


def entries(error: Exception) -> Iterator[TracebackType]:
    """Yield the entries of a traceback, the outermost first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def hide_own(error: Exception) -> None:
    """Take the lines of the trace itself out of a traceback, which would stand between the user's."""
    kept: TracebackType | None = None
    for entry in tuple(entries(error)):
        if kept is None or not _is_own(entry):
            kept = entry
        else:
            kept.tb_next = entry.tb_next


def _is_own(entry: TracebackType) -> bool:
    """Tell whether a line is one of the trace's, or the one of torch's that calls it."""
    room = entry.tb_frame.f_globals.get("__name__")
    if room == "torch.overrides":
        return entry.tb_next is not None and _is_own(entry.tb_next)
    return room == "gradwatch._trace"


def users_own(error: Exception) -> list[_frames.Place]:
    """Return the user's own lines that an error passed, the outermost first."""
    return [
        _frames.Place(entry.tb_frame.f_code, entry.tb_lasti)
        for entry in entries(error)
        if _frames.owner(entry.tb_frame.f_code) is _frames.Owner.USER
    ]


def last_of_user(error: Exception) -> _frames.Place | None:
    """Return the user's own line that an error passed last."""
    return next(reversed(users_own(error)), None)


def before_torch(error: Exception) -> _frames.Place | None:
    """Return the user's own line that an error passed last, where the user's code did not raise it itself."""
    raised = innermost(error)
    own = raised is None or _frames.owner(raised.tb_frame.f_code) is _frames.Owner.USER
    return None if own else last_of_user(error)


def innermost(error: Exception) -> TracebackType | None:
    """Return the last entry of a traceback: where the error was raised."""
    return next(reversed(list(entries(error))), None)


def local_tensor(error: Exception, name: str) -> Tensor | None:
    """Return a tensor that a local variable held in the frame that raised."""
    raised = innermost(error)
    held = None if raised is None else raised.tb_frame.f_locals.get(name)
    return held if isinstance(held, Tensor) else None


def local_tensors(error: Exception) -> Iterator[Tensor]:
    """Yield the tensors that local variables held in the innermost frame of the user's own."""
    frames = [
        e.tb_frame for e in entries(error) if _frames.owner(e.tb_frame.f_code) is _frames.Owner.USER
    ]
    yield from tensors_in(frames[-1].f_locals.values() if frames else ())


def local_modules(error: Exception) -> Iterator[torch.nn.Module]:
    """Yield the modules that local variables held in the user's own frames, the innermost first."""
    frames = [entry.tb_frame for entry in entries(error) if _is_users(entry)]
    for frame in reversed(frames):
        yield from (v for v in frame.f_locals.values() if isinstance(v, torch.nn.Module))


def local_owner(error: Exception, name: str) -> Any:
    """Return what a local variable held in the innermost frame that has it as an optimizer or a module."""
    kinds = (torch.optim.Optimizer, torch.nn.Module)
    held = [entry.tb_frame.f_locals.get(name) for entry in entries(error)]
    return next((value for value in reversed(held) if isinstance(value, kinds)), None)


def files_of(raised: Raised) -> list[str]:
    """Return the user's files that the model's classes, and the lines that the error passed, are in."""
    files = [place.code.co_filename for place in reversed(users_own(raised.error))]
    for module in raised.model.modules():
        file = _source.file_of(type(module))
        if file is not None and _frames.owner_of_file(file) is _frames.Owner.USER:
            files.append(file)
    return list(dict.fromkeys(files))


def in_nearest_file(
    raised: Raised, find: Callable[[str], list[_source.Statement]]
) -> list[_source.Statement]:
    """Return what is found in the innermost of the user's files that has any."""
    return next((found for file in files_of(raised) if (found := find(file))), [])


def made_in_place(raised: Raised, layer: Any) -> str | None:
    """Return where a layer that works in place was told so, and made; None for all others."""
    if not getattr(layer, "inplace", False):
        return None
    told = in_nearest_file(raised, lambda file: _statements.set_from_outside(file, "inplace"))
    set_at = [role_of("set to work in place", statement(found)) for found in told[:1]]
    return listed(*set_at, layer_made_at(raised.model, layer))


def layer_made_at(model: torch.nn.Module, layer: Any) -> str | None:
    """Return the statement that put a layer into a model, or what the layer is in."""
    path = next((path for path, module in model.named_modules() if module is layer), "")
    inside: list[str] = []
    while path:
        path, _, name = path.rpartition(".")
        made = _statements.keepings(type(model.get_submodule(path)), name)
        if made:
            found = _nearby.element_of(made[0], inside)
            within = _nearby.made_within(found, type(layer).__name__)
            return listed(None if within is None else statement(within), statement(found))
        inside.insert(0, name)
    return None


def asked_for_parameters(error: Exception) -> torch.nn.Module | None:
    """Return the module whose ``parameters()`` the failing line asked for, as far as its variables tell."""
    last = next((e for e in reversed(list(entries(error))) if _is_users(e)), None)
    chain = (
        None
        if last is None
        else _nearby.owner_of_call((last.tb_frame.f_code, last.tb_lasti), "parameters")
    )
    if last is None or not chain:
        return None
    first, *rest = chain
    found = last.tb_frame.f_locals.get(first, last.tb_frame.f_globals.get(first))
    for name in rest:
        held = (
            {**vars(found), **vars(found).get("_modules", {})} if hasattr(found, "__dict__") else {}
        )
        found = held.get(name)
    return found if isinstance(found, torch.nn.Module) else None


def _is_users(entry: TracebackType) -> bool:
    return _frames.owner(entry.tb_frame.f_code) is _frames.Owner.USER


def line_of(error: Exception) -> tuple[str, int] | None:
    """Return file and line at which an error was raised."""
    raised = innermost(error)
    return None if raised is None else (raised.tb_frame.f_code.co_filename, raised.tb_lineno)


def line_at(place: _frames.Place | None) -> tuple[str, int] | None:
    """Return file and line of a place."""
    site = _frames.site_of(place)
    return None if place is None or site is None else (place.code.co_filename, site.line)


def role_of(role: str, place: str | None) -> str | None:
    """Return a place with what it has to do with the error."""
    return None if place is None else f"{place} ({role})"


def listed(*places: str | None) -> str | None:
    """Return the places of a note, the root first; one that stands there already, whatever its part, is left out."""
    lines: list[str] = []
    for place in places:
        for line in () if place is None else place.split("\n  --> "):
            bare = line.rpartition("`")[0] or f"{line} "
            if not any(known.startswith(bare) for known in lines):
                lines.append(line)
    return "\n  --> ".join(lines) or None


def statement(found: _source.Statement) -> str:
    """Return a statement that was found in the text, as a note has it."""
    return _words.place(Site(found.file, found.line, source=found.text))


def at(place: _frames.Place | None) -> str | None:
    """Return a place as a note has it, behind the user's own line where it is a library's."""
    site = _frames.site_of(place)
    if site is None:
        return None
    return listed(_words.place(site.caller) if site.caller else None, _words.place(site))


def failing_places(raised: Raised) -> list[_frames.Place]:
    """Return the call that raised, behind those that chose what it was given."""
    failed = raised.failed
    place = before_torch(raised.error) if failed is None else failed.place
    if raised.asked is not None:  # what a checkpoint runs again in backward has lines of its own
        place = last_of_user(raised.error) or place
    return [] if place is None else [*raised.callers_of(place), place]


def failing(kind: str) -> Find:
    """Explain an error by the call that raised it."""

    def find(raised: Raised) -> str | None:
        places = failing_places(raised)
        return _error_words.note(kind, listed(*map(at, places))) if places else None

    BY_PLACE[find] = kind
    return find


def raising(kind: str) -> Find:
    """Explain an error by the user's own line that it passed last, where no call of torch's is known."""

    def find(raised: Raised) -> str | None:
        place = last_of_user(raised.error)
        return None if place is None else _error_words.note(kind, at(place))

    BY_PLACE[find] = kind
    return find
