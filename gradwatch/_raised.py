"""Where the root of an error of torch's lies, when the user's forward or backward raised.

What this room knows that no other does: what torch's messages about autograd mean, and which recorded
operation, write or backward pass they speak of. The error itself is never changed: it gets a note.

Limits: messages are recognised by their words, in English, as torch 2.6 to 2.14 writes them; an
unknown one gets no note.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from gradwatch import _frames, _source, _words, explain
from gradwatch._calls import Kind, Wrapper
from gradwatch._record import MADE, held_by, hooks_of, node_of, result_of, tensors_in
from gradwatch.report import Cause, Diagnosis, Site, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from torch import nn

    from gradwatch._diagnose import Inspection
    from gradwatch._record import Backward, Failed, Op, Value, Write
    from gradwatch._trace import Trace

    _Find = Callable[["_Raised"], str | None]

_log = logging.getLogger("gradwatch")
_MOST_NODES = 100_000
_BY_PLACE: dict[_Find, str] = {}
"""Explanations that need nothing but the line that raised, with their words."""


@dataclass(frozen=True, slots=True)
class _Raised:
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
        passed = ((entry.tb_frame.f_code, entry.tb_lasti) for entry in _entries(self.error))
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
        stack = _users_own(self.error)
        while stack and place is not None and stack[-1][:2] != place[:2]:
            stack.pop()
        found: list[_frames.Place] = []
        while len(stack) > 1 and _source.is_of_arguments(stack.pop()[:2]):
            found.insert(0, stack[-1])
        return found

    def kept(self) -> tuple[str | None, str] | None:
        """Return where a tensor of an earlier pass, which this one has read, was kept, and its name there."""
        trace = self.trace
        for op in trace.ops:
            if op.kind is Kind.LINK and op.place is None:
                readers = (o for o in trace.ops[op.index :] if set(op.outputs) & set(o.inputs))
                kept = _kept_in(self.model, trace, op, next(readers, None))
                if kept is not None:
                    return kept
        return None

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
            frozen = [trace.freezings[name] for name in names if name in trace.freezings]
            if frozen:
                return _at(frozen[0])
            if any(trace.values[n].tracked for n in op.inputs):
                return _listed(_at(op.place), self.switched_off(op))
            todo.extend(op.inputs)
        return None

    def switched_off(self, op: Op) -> str | None:
        """Return where gradients, or inference mode, were switched for an operation that ran without them."""
        if op.grad_mode:
            return None
        switch = self.trace.switch_before(op)
        for step in () if switch is not None else op.stack:
            found = _source.surrounding(step, "inference_mode")
            if found is not None:
                return _as("gradients are off in there", _statement(found))
        return _as("gradients are off from here on", _at(switch))

    def maker_of(self, number: int) -> Op | None:
        """Return the operation that made a value, where it ran in this step."""
        producer = self.trace.values[number].producer
        return None if producer is None else self.trace.ops[producer]


def add_note(
    error: Exception,
    inspection: Inspection | None,
    model: nn.Module,
    known: tuple[Diagnosis, ...],
) -> None:
    """Add a note with the root cause's line and the way out to an error of the user's code.

    Args:
        error: The exception; it is not changed otherwise.
        inspection: The stopped trace of the step that raised, None where it was not traced.
        model: The model whose classes are read for what was done before the step.
        known: The diagnoses that hold.
    """
    if any("GradWatch" in note for note in getattr(error, "__notes__", ())):
        return
    try:
        note = _note(error, inspection, model, known)
    except Exception as failure:  # noqa: BLE001 -- ours, never the user's problem
        _log.warning("an error could not be explained", exc_info=failure)
        return
    if note:
        error.add_note(f"GradWatch: {note}")


def _note(
    error: Exception,
    inspection: Inspection | None,
    model: nn.Module,
    known: tuple[Diagnosis, ...],
) -> str | None:
    message = str(error)
    if "Expected to have finished reduction in the prior iteration" in message:
        missing = [d for d in known if d.status is Status.MISSING]
        said = [explain.render(diagnosis) for diagnosis in missing]
        return "\n\n".join([_words.error_note("ddp", None), *said]) if missing else None
    for words, find in _KINDS:
        if words in message:
            if inspection is not None:
                return find(_Raised(error, inspection, model))
            return None if find in _ONLY_TRACED else _untraced(error, model, find)
    return None


def _untraced(error: Exception, model: nn.Module, find: _Find) -> str:
    """Explain an error of a step that was not traced by its traceback, the model, and an earlier trace."""
    kind = _BY_PLACE.get(find)
    place = None if kind is None else _at(_last_of_user(error))
    if kind is not None and place is not None:
        return _words.error_note(kind, place)
    if find in {_twice, _overwritten}:
        made = _frames.site_of(_outlived(error))
        kept = _kept_anywhere(model, made)
        if kept is None and made is not None:
            kept = f"{_words.place(made)} (made here)", ""
        if kept is not None and (find is _twice or made is not None):
            return _words.error_note("kept" if find is _twice else "outlived", *kept)
    return _words.error_note("untraced", None)


def _outlived(error: Exception) -> _frames.Place | None:
    """Return where a tensor was made, in an earlier step that was traced, of the graph that a backward went over."""
    todo = _begun_at(error)
    seen: set[Any] = set()
    while todo and len(seen) < _MOST_NODES:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        place: _frames.Place | None = node.metadata.get(MADE)
        if place is not None:
            return place
        todo.extend(above for above, _ in node.next_functions if above is not None)
    return None


def _begun_at(error: Exception) -> list[Any]:
    """Return the nodes of the tensors that the call which raised was given: what a backward began at."""
    nodes: list[Any] = []
    for entry in _entries(error):
        held = entry.tb_frame.f_locals
        given = [held.get(name) for name in ("self", "tensors", "outputs")]
        nodes = [node for tensor in tensors_in(given) if (node := node_of(tensor))] or nodes
    return nodes


def _kept_anywhere(model: nn.Module, made: Site | None = None) -> tuple[str | None, str] | None:
    """Return the statement that keeps a tensor with a history on a module, and the name it has there."""
    for path, module in model.named_modules():
        for name, value in held_by(module):
            items = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(item, Tensor) and node_of(item) is not None for item in items):
                statements = _source.keepings(type(module), name)
                if statements:
                    full = f"{path}.{name}" if path else name
                    return _story(statements, made, None), f" (`{full}`)"
    return None


# Losses without a history, and what was kept ------------------------------------------------------


def _no_history(raised: _Raised) -> str | None:
    """Explain a loss that was computed from nothing that wants a gradient."""
    inner = _in_a_backward(raised.error)
    if inner is not None:
        return _words.error_note("grad_in_backward", inner)
    asked = raised.asked
    if asked is not None and not asked.accumulates:
        cut = raised.cut_of(asked.roots)
        if cut is not None:
            return _words.error_note("output_without_history", _both(cut, _at(asked.place)))
    inspection = raised.inspection
    parameters = inspection.parameters
    wanting = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not wanting:
        return all_frozen(raised.model, raised.trace)
    found = inspection.diagnose(dict.fromkeys(wanting, Status.MISSING), 0)
    if not found:
        return None
    # What was frozen on purpose is seldom what is wrong, and another parameter may have been frozen by mistake.
    told = sorted(found, key=lambda d: (d.site is None, d.cause is Cause.FROZEN))[:1]
    said = [
        _words.error_note("no_history", None),
        *(explain.render(d, tuple(parameters)) for d in told),
    ]
    frozen = _frozen_on_the_way(raised)
    return "\n\n".join([*said, frozen] if frozen else said)


def _frozen_on_the_way(raised: _Raised) -> str | None:
    """Return what is to be said of parameters that the loss was computed from, and that are frozen."""
    trace, parameters = raised.trace, raised.inspection.parameters
    asked = raised.asked
    seen: set[int] = set()
    todo = [] if asked is None else list(asked.roots)
    names: dict[str, None] = {}
    while todo:
        number = todo.pop()
        if number in seen:
            continue
        seen.add(number)
        name, made = trace.values[number].parameter, raised.maker_of(number)
        if name is not None and not parameters[name].requires_grad:
            names[name] = None
        todo.extend(() if made is None else made.inputs)
    if not names:
        return None
    folded = explain.fold(tuple(n for n in parameters if n in names), tuple(parameters))
    seen_at = next((_at(trace.freezings[n]) for n in names if n in trace.freezings), None)
    return _words.frozen_too(_words.listed(folded), seen_at or _first_freezing(raised.model))


def _in_a_backward(error: Exception) -> str | None:
    """Return where the ``backward`` of a Function asked for gradients, and where it computed what from."""
    places = []
    for entry in _entries(error):
        code = entry.tb_frame.f_code
        first = entry.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, BackwardCFunction) and code.co_name == "backward":
            places.append(_frames.Place(code, entry.tb_lasti))
    if not places:
        return None
    last = _last_of_user(error) or places[-1]
    made = _source.first_argument(last[:2], places[-1].code)
    return _listed(None if made is None else _statement(made), _at(places[-1]), _at(last))


def all_frozen(model: nn.Module, trace: Trace | None = None) -> str:
    """Return what is to be said of a loss without a history when no parameter requires grad."""
    seen = None if trace is None else next(iter(trace.freezings.values()), None)
    return _words.error_note("all_frozen", _at(seen) or _first_freezing(model))


def _first_freezing(model: nn.Module) -> str | None:
    for module in model.modules():
        if not type(module).__module__.startswith("torch."):
            statements = _source.freezings(type(module))
            if statements:
                return _statement(statements[0])
    return None


def _twice(raised: _Raised) -> str | None:
    """Explain a graph that an earlier backward pass has freed."""
    kept = raised.kept()
    if kept is not None:
        return _words.error_note("kept", *kept)
    places = [_at(backward.place) for backward in raised.trace.backwards]
    if len(places) > 1:
        earlier = f"{places[-2]} (the earlier one)"
        return _words.error_note("twice", _listed(*_shared(raised.trace), earlier, places[-1]))
    return _words.error_note("twice", places[-1]) if places else None


def _shared(trace: Trace) -> tuple[str | None, str | None]:
    """Return the last operation that both of the last two backward passes went through, if it is no root.

    And the one through which the earlier pass came to it, when it can be cut off there.
    """
    first, second = (_behind(trace, backward.roots) for backward in trace.backwards[-2:])
    common = first & second
    roots = {number for backward in trace.backwards for number in backward.roots}
    last = max(
        (op for op in trace.ops if not common.isdisjoint(op.outputs)),
        key=lambda op: op.index,
        default=None,
    )
    if last is None or not roots.isdisjoint(last.outputs):
        return None, None
    taken = next(
        (
            op
            for op in trace.ops[last.index :]
            if not first.difference(second).isdisjoint(op.outputs)
            and not set(last.outputs).isdisjoint(op.inputs)
        ),
        None,
    )
    if taken is None or taken.place is None:
        return _as("computed once, used by both", _given_to(last.place)), None
    named = _source.outer_assignment(taken.place[:2])
    once = _listed(None if named is None else _statement(named), _given_to(last.place))
    return _as("computed once, used by both", once), _as(
        "goes into the earlier one here", _at(taken.place)
    )


def _given_to(place: _frames.Place | None) -> str | None:
    """Return a place, and before it the only call of a function that computes from its arguments alone there."""
    chosen = place is not None and _source.is_of_arguments(place[:2])
    call = _source.only_call(place.code) if place is not None and chosen else None
    return _listed(None if call is None else _statement(call), _at(place))


def _behind(trace: Trace, roots: Iterable[int]) -> set[int]:
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


def _kept_in(
    model: nn.Module, trace: Trace, op: Op, reader: Op | None
) -> tuple[str | None, str] | None:
    """Return the statement that keeps a tensor of an earlier pass, and the name it has there."""
    known = trace.foreign.get(op.index)
    tensor = None if known is None else known()
    made = _frames.site_of(trace.outlived.get(op.index))
    read = None if reader is None else reader.place
    keeper = trace.keepers.get(op.index)
    for path, module in model.named_modules():
        for name, value in held_by(module):
            if (path, name) == keeper or (tensor is not None and _holds(value, tensor)):
                statements = _source.keepings(type(module), name)
                if statements:
                    full = f"{path}.{name}" if path else name
                    filled = [] if read is None else _source.fillings(read[:2])
                    kept_as = "" if filled else f" (`{full}`)"
                    return _story([*filled, *statements], made, read), kept_as
    statements = [] if read is None else _source.stores(read[:2])
    return (_story(statements, made, read), "") if statements or made or read else None


def _story(
    statements: list[_source.Statement], made: Site | None, read: _frames.Place | None
) -> str | None:
    """Return where a tensor was kept, where it was made, and where it is used again: what is known of it."""
    same = [s for s in statements if made is not None and s.line == made.line]
    kept = next((_statement(s) for s in same or statements), None)
    came = None if made is None or same else f"{_words.place(made)} (made here)"
    used = _at(read)
    if used in {None, kept, None if made is None else _words.place(made)}:
        return _both(kept, came)
    return _both(_both(kept, came), f"{used} (used again)")


def _holds(value: Any, tensor: Any) -> bool:
    """Tell whether a value is a tensor, or a container or a `partial` that holds it."""
    if isinstance(value, dict):
        value = list(value.values())
    elif isinstance(value, functools.partial):
        value = [*value.args, *value.keywords.values()]
    return value is tensor or (
        isinstance(value, (list, tuple)) and any(_holds(item, tensor) for item in value)
    )


def _copied(raised: _Raised) -> str | None:
    """Explain the copy of a computed tensor by the attribute that keeps it, else by what made it."""
    kept = _kept_anywhere(raised.model)
    failed = raised.failed
    if kept is None:
        return _failing("copy_of_a_result")(raised)
    copied = None if failed is None else _at(failed.place)
    return _words.error_note("copy_of_a_result", _both(f"{kept[0]} (kept here)", copied))


# Writes in place ------------------------------------------------------------------------------------


def _overwritten(raised: _Raised) -> str | None:
    """Explain a tensor that was saved for backward and changed before."""
    trace = raised.trace
    found = re.search(
        r"\[(?:torch\.)?\S+ \[(.*?)\]\](?:, which is output \d+ of ([\w:]+),)? is at version (\d+); "
        r"expected version (\d+)",
        raised.message,
    )
    if found is None:
        return None
    shape = tuple(int(size) for size in found[1].split(",") if size.strip())
    first = int(found[4]) + 1
    later = [w for w in trace.writes if w.version >= first]
    write, is_result = _culprit(later, shape, found[2], (first, int(found[3])), raised)
    if write is not None:
        # A view that was made anew says nothing of what the user wrote.
        named = is_result and _stem(found[2] or "") != "AsStrided"
        maker = found[2] if named else None
        kind = "overwritten" if maker is None else "overwritten_result"
        where = _both(_at(write.place), _at(write.around))
        return _words.overwritten(kind, where, write.operation, maker)
    return _written_unseen(raised, shape, found[2]) or (
        _words.overwritten("overwritten", _at(later[0].place), later[0].operation, None)
        if later and "AccumulateGrad" not in (found[2] or "")
        else None
    )


def _written_unseen(raised: _Raised, shape: tuple[int, ...], node: str | None) -> str | None:
    """Explain a tensor that something else than a call of the user's has changed."""
    trace = raised.trace
    lookup = _renormed(raised, shape)
    if lookup is not None:
        return _words.error_note("renormed", _at(lookup.place))
    if trace.steps:
        return _words.error_note("optimizer_stepped", _at(trace.steps[-1][0]), node)
    kept = raised.kept()
    return None if kept is None else _words.error_note("outlived", *kept)


def _renormed(raised: _Raised, shape: tuple[int, ...]) -> Op | None:
    """Return the lookup that changed a table of some shape in place, perhaps transposed, after something else read it."""
    trace, first, was_read = raised.trace, None, False
    for op in trace.ops:
        read = {trace.values[number].parameter for number in op.inputs} - {None}
        weights = [raised.inspection.parameters.get(name or "") for name in read]
        if not any(w is not None and sorted(w.shape) == sorted(shape) for w in weights):
            continue
        if not op.name.endswith(("embedding", "embedding_bag")):
            was_read = True
        elif was_read:
            return op
        else:
            first = first or op
    return first


def _culprit(
    writes: list[Write],
    shape: tuple[int, ...],
    node: str | None,
    versions: tuple[int, int],
    raised: _Raised,
) -> tuple[Write | None, bool]:
    """Return the write that an error speaks of, and whether the node it names is what was overwritten.

    None where neither the node nor the shape of any fits.

    Views share a version, not a shape; the weight of a linear layer is saved transposed. A result is named
    after what made it, an argument after the last write into it.

    Args:
        writes: Those that came after the tensor was saved, as far as their versions tell.
        shape: Its shape.
        node: The name of its node, as torch shortens it; None for a leaf.
        versions: The version after the first write that can be meant, and after the last one.
        raised: The error.
    """
    values = raised.trace.values
    passed = (each for one in raised.inspection.passes for each in one.nodes)
    tags = {each.tag for each in passed if _is_named(node, each.name)}
    overwritten = [
        w
        for w in writes
        if any(_is_named(node, other) for _, other in w.targets)
        or any(values[number].producer in tags for number in w.before)
    ]
    last = [w for w in writes if any(values[number].producer in tags for number in w.made)]
    named = set(overwritten) or _with_earlier(last, writes)
    shaped: set[Write] | frozenset[Write] = next(
        (
            found
            for same in (tuple, sorted, math.prod)
            if (found := {w for w in writes if any(same(shape) == same(s) for s, _ in w.targets)})
        ),
        frozenset(),
    )
    if not named and not shaped:
        return None, False
    last_versions = _last_versions(writes)
    tests: list[Callable[[Write], bool]] = [
        # A leaf has no node of its own, and a view of it has one.
        lambda w: node is None or any(values[n].tracked for n in w.made),
        lambda w: node is not None or not any(_has_history(values[n]) for n in w.made),
        lambda w: last_versions[w.made] == versions[1],
        lambda w: not named or w in named,
        lambda w: not shaped or w in shaped,
        lambda w: _was_read(w, raised.trace),
        lambda w: w.version == versions[0],
    ]
    likely = writes
    for holds in tests:
        likely = [w for w in likely if holds(w)] or likely
    write = next(iter(likely), None)
    return write, write in overwritten


def _has_history(value: Value) -> bool:
    return value.tracked and value.parameter is None and value.label is None


def _was_read(write: Write, trace: Trace) -> bool:
    """Tell whether something with a gradient was computed from a tensor before it was overwritten."""
    own = min((trace.values[number].producer or 0 for number in write.made), default=0)
    before = set(write.before)
    return any(
        not before.isdisjoint(op.inputs) and any(trace.values[n].tracked for n in op.outputs)
        for op in trace.ops[:own]
    )


def _last_versions(writes: list[Write]) -> dict[tuple[int, ...], int]:
    """Return for each write, by what it made, the version after the last write into the same tensor."""
    later: dict[int, int] = {}
    found: dict[tuple[int, ...], int] = {}
    for write in reversed(writes):
        version = max([write.version, *(later[n] for n in write.made if n in later)])
        later.update(dict.fromkeys(write.before, version))
        found[write.made] = version
    return found


def _with_earlier(some: list[Write], writes: list[Write]) -> set[Write]:
    """Return some writes with those into the same tensors before them."""
    by_value = {number: write for write in writes for number in write.made}
    found: set[Write] = set()
    todo = list(some)
    while todo:
        write = todo.pop()
        if write not in found:
            found.add(write)
            todo += [by_value[number] for number in write.before if number in by_value]
    return found


def _is_named(node: str | None, other: str | None) -> bool:
    """Tell whether two names are of one node: torch's messages leave `Backward0` out of some."""
    return node is not None and other is not None and _stem(node) == _stem(other)


def _stem(node: str) -> str:
    """Return a node's name as torch's messages have it: `Add` for `AddBackward0`, `Clamp1` for `ClampBackward1`."""
    name, found, number = node.rpartition("Backward")
    return f"{name}{number.removeprefix('0')}" if found else node


def _view_without_history(raised: _Raised) -> str | None:
    """Explain a write into a view that was made while gradient mode was off, by the making of the view."""
    failed = raised.failed
    made = raised.maker_of(failed.read[0]) if failed is not None and failed.read else None
    while (
        made is not None and made.kind is Kind.REWRAP
    ):  # since a write into its base it wants a gradient
        made = raised.maker_of(made.inputs[0])
    if failed is None or made is None:
        return _failing("view_without_history")(raised)
    view = _as("the view", _at(made.place))
    places = _listed(view, raised.switched_off(made), _at(failed.place))
    return _words.error_note("view_without_history", places)


def _behind_a_hook(raised: _Raised) -> str | None:
    """Explain a write into what a module with a full backward hook returned, by the registration of the hook."""
    codes = [
        code
        for module in raised.model.modules()
        for hook in hooks_of(module)
        if (code := getattr(hook, "__code__", None)) is not None
    ]
    found = [s for code in codes[:1] for s in _source.registrations(code)]
    failed = raised.failed
    wrote = None if failed is None else _at(failed.place)
    return _words.error_note("behind_a_hook", _listed(*map(_statement, found[:1]), wrote))


# Derivatives that do not exist ----------------------------------------------------------------------


def _in_function(kind: str) -> _Find:
    """Explain what the ``backward`` of a Function did wrong by the call of the Function."""

    def find(raised: _Raised) -> str | None:
        named = re.search(r"[Ff]unction (\w+) returned", raised.message)
        ops = raised.trace.ops
        if named is None:
            called = [op for op in ops if op.wrapper is Wrapper.CUSTOM_FUNCTION]
            return _words.error_note(kind, _at(called[-1].place)) if called else None
        index = re.search(r"at index (\d+)", raised.message)
        own = _return_of(
            named[1].removesuffix("Backward"), None if index is None else int(index[1])
        )
        for node in (node for passed in raised.inspection.passes for node in passed.nodes):
            if node.custom and node.name == named[1] and node.tag >= 0:
                return _words.error_note(kind, _both(_at(ops[node.tag].place), own))
        return None if own is None else _words.error_note(kind, own)

    return find


def _return_of(name: str, index: int | None) -> str | None:
    """Return what the ``backward`` of the only Function of a name returns, and where the one at an index is computed."""
    todo, found = [torch.autograd.Function], list[Any]()
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        method = getattr(cls.__dict__.get("backward"), "__func__", None)
        code = getattr(method, "__code__", None)
        if cls.__name__ == name and code is not None:
            found.append(code)
    returned = _source.returned(found[0], index) if len(found) == 1 else []
    roles = ["returned here", "computed here"]
    return _listed(*(_as(role, _statement(s)) for role, s in zip(roles, returned, strict=False)))


def _without_derivative(raised: _Raised) -> str | None:
    """Explain an operation without a derivative, which torch may say only in the backward pass."""
    named = re.search(r"derivative for '?(?:aten::)?(\w+)", raised.message)
    wanted = "" if named is None else named[1].strip("_")
    ops = raised.trace.ops
    for op in reversed(ops):
        if wanted and op.name.rpartition(".")[2].strip("_") == wanted:
            return _words.error_note("no_derivative", _at(op.place))
    # An inner operation of another name: the node of the graph is named after it.
    camel = wanted.replace("_", "").removesuffix("backward")
    for node in (node for passed in raised.inspection.passes for node in passed.nodes):
        name = node.name.rpartition("Backward")[0]
        if camel and node.tag >= 0 and name.lower() == camel:
            return _words.error_note("no_derivative", _at(ops[node.tag].place))
    return _failing("no_derivative")(raised)


def _not_a_number(raised: _Raised) -> str | None:
    """Explain what anomaly mode found by the operation that the node was made by."""
    found = re.search(r"Function '(\w+)' returned nan", raised.message)
    name = "" if found is None else found[1]
    for passed in raised.inspection.passes:
        fine = {number for (number, _), size in passed.sizes.items() if math.isfinite(size)}
        tags = [n.tag for i, n in enumerate(passed.nodes) if n.name == name and i not in fine]
        if tags and max(tags) >= 0:
            # Backward comes to the operations in reverse.
            return _words.error_note("anomaly", _at(raised.trace.ops[max(tags)].place))
    return None


def _without_formula(raised: _Raised) -> str | None:
    """Explain a custom operator that was registered without a derivative."""
    found = re.search(r"through (\w+\.\w+)", raised.message)
    wanted = "" if found is None else found[1]
    for op in reversed(raised.trace.ops):
        if wanted and wanted in op.name:
            return _words.error_note("no_formula", _at(op.place))
    return None


# What backward starts from, and is asked for --------------------------------------------------------


def _loss_made_by(
    kind: str,
    is_odd: Callable[[tuple[int, ...], torch.dtype], bool],
    through: frozenset[str] = frozenset(),
) -> _Find:
    """Explain a loss of the wrong kind by the operation that made it so.

    Args:
        kind: Which words to use.
        is_odd: Tells by shape and dtype whether a tensor has what is wrong with the loss.
        through: Operations besides those on single elements that hand it on.
    """
    handing_on = _ELEMENTWISE | through

    def find(raised: _Raised) -> str | None:
        asked = raised.asked
        roots = _begun_at(raised.error)
        made = [op for node in roots for op in _made_odd(node, is_odd, handing_on, raised)]
        if asked is None or not made:
            return _failing(kind)(raised)
        shaped = [_at(op.place) for op in reversed(made)]
        return _words.error_note(kind, _listed(shaped[0], shaped[-1], _at(asked.place)))

    return find


_ELEMENTWISE = frozenset(
    "add sub rsub mul div true_divide truediv neg clone contiguous to float double half".split()  # noqa: SIM905
)


def _made_odd(
    node: Any,
    is_odd: Callable[[tuple[int, ...], torch.dtype], bool],
    handing_on: frozenset[str],
    raised: _Raised,
) -> Iterator[Op]:
    """Yield the operation that made a loss, and those from which it has what is odd about it, the last one at first.

    What scales a loss or adds to it has not made it a vector, nor a complex number.
    """
    while node is not None:
        tag = node.metadata.get(raised.trace.tag)
        if tag is None:
            return
        op = raised.trace.ops[tag]
        yield op
        above = [up for up, _ in node.next_functions if up is not None]
        known = {up: made for up in above if (made := result_of(up)) is not None}
        odd = [up for up in above if up in known and is_odd(*known[up])]
        is_through = op.name.rpartition(".")[2].strip("_") in handing_on
        node = odd[0] if is_through and len(odd) == 1 else None


def _not_in_graph(raised: _Raised) -> str | None:
    """Explain a tensor that an output was not computed from by the cut between the two."""
    note = _failing("not_in_graph")(raised)
    trace = raised.trace
    if note is None or not trace.backwards:
        return note
    asked = trace.backwards[-1]
    makers = [raised.maker_of(n) for n in asked.wanted if trace.values[n].tracked]
    for cut in raised.inspection.cuts_between(asked.wanted, asked.roots):
        if cut.site is not None:
            both = _both(_words.place(cut.site), _at(asked.place))
            return _words.error_note("cut_before", both, cut.operation or str(cut.cause))
    for made in makers:
        if made is not None and made.kind is Kind.PLAIN and made.place is not None:
            # A copy that was made after the output: what the user asks for is not what went into it.
            both = _both(f"{_at(made.place)} (made here)", _at(asked.place))
            return _words.error_note("not_in_graph", both)
    return note


def _number_for_a_loss(raised: _Raised) -> str | None:
    """Explain a loss that is a number by the call that took it out of torch."""
    leaving = [op for op in raised.trace.ops if op.kind is Kind.EXIT and not _is_truth(op)]
    return _words.error_note("number", _at(leaving[-1].place)) if leaving else None


def _is_truth(op: Op) -> bool:
    return op.name.endswith("__bool__")


def _inference(raised: _Raised) -> str | None:
    """Explain a tensor of inference mode by the operation that made it."""
    failed = raised.failed
    made = raised.maker_of(failed.read[0]) if failed is not None and failed.read else None
    while made is not None and made.grad_mode and made.inputs:
        made = raised.maker_of(made.inputs[0])  # a view of it that was made outside
    if failed is None or made is None or made.grad_mode:
        return _failing("inference")(raised)
    came = _as("made here", _at(made.place))
    places = _listed(came, raised.switched_off(made), _at(failed.place))
    return _words.error_note("inference", places)


def _no_leaf(raised: _Raised) -> str | None:
    """Explain a tensor given to an optimizer, or asked for ``.grad``, that is the result of an operation."""
    given = _local(raised.error, "param")
    node = None if given is None else node_of(given)
    tag = None if node is None else node.metadata.get(raised.trace.tag)
    return None if tag is None else _words.error_note("no_leaf", _at(raised.trace.ops[tag].place))


def _serialised(raised: _Raised) -> str | None:
    """Explain a tensor that cannot go to another process with its history by what made it."""
    given = _local(raised.error, "tensor")
    node = None if given is None else node_of(given)
    tag = None if node is None else node.metadata.get(raised.trace.tag)
    made = None if tag is None else raised.trace.ops[tag]
    before = [] if made is None else [raised.maker_of(number) for number in made.inputs]
    places = dict.fromkeys(_at(op.place) for op in before if op is not None)
    last = _at(_last_of_user(raised.error))
    own = None if made is None else _at(made.place)
    return _words.error_note("serialised", _listed(*list(places)[:1], _as("made here", own), last))


def _none_for_a_gradient(raised: _Raised) -> str | None:
    """Explain a None that came from ``.grad`` of a tensor that is no leaf."""
    for read, number in reversed(raised.trace.grad_reads):
        made = raised.maker_of(number)
        where = _at(read)
        if made is not None and where is not None and _line_of(raised.error) == _line(read):
            both = _both(f"{_at(made.place)} (made here, so that it is no leaf)", where)
            return _words.error_note("grad_of_a_result", both)
    return None


def _hooked(raised: _Raised) -> str | None:
    """Explain a gradient that a hook changed wrongly by the line that registered the hook."""
    places = set(raised.trace.hooks.values())
    if places:
        return _words.error_note("hook", _at(places.pop())) if len(places) == 1 else None
    hooks = {id(h): h for p in raised.inspection.parameters.values() for h in hooks_of(p)}
    codes = [_frames.code_of(hook) for hook in hooks.values()]
    if len(codes) != 1 or codes[0] is None:
        return None
    returned = _source.returned(codes[0], None)
    return _words.error_note("hook_returns", _listed(*map(_statement, returned)))


def _reentrant(raised: _Raised) -> str | None:
    """Explain a reentrant checkpoint by its call."""
    ops = raised.trace.ops
    own = (
        op.around or op.place
        for op in ops
        if op.around or op.wrapper is Wrapper.REENTRANT_CHECKPOINT
    )
    asked = None if raised.asked is None else _at(raised.asked.place)
    return _words.error_note("reentrant_inputs", _listed(_at(next(own, None)), asked))


def _recomputed(raised: _Raised) -> str | None:
    """Explain a checkpoint whose second run differed: by what it changes inside, and by the only call of one."""
    modules = dict(raised.model.named_modules())
    calls = {
        _statement(statement)
        for cls in {type(module) for module in modules.values()}
        if not cls.__module__.startswith("torch.")
        for name in ("checkpoint", "checkpoint_sequential")
        for statement in _source.calls_of(cls, name)
    }
    call = calls.pop() if len(calls) == 1 else None
    again = [type(modules[path]) for path in reversed(raised.trace.rerun) if path in modules]
    changes = _source.changes_of_state(dict.fromkeys(again))
    change = _as("by this the next run differs", _statement(changes[0])) if changes else None
    return _words.error_note("recomputed", _listed(change, call)) if change or call else None


def _vector(raised: _Raised) -> str | None:
    """Explain a function given to ``torch.func`` that returns several elements by the last thing that it did."""
    place = _last_of_user(raised.error)
    last = next((op for op in reversed(raised.trace.ops) if op.place is not None), None)
    made = None if last is None else _as("the last operation in it", _at(last.place))
    return (
        None if place is None else _words.error_note("func_of_a_vector", _listed(made, _at(place)))
    )


_BY_PLACE[_vector] = "func_of_a_vector"


# Optimizers, and what they are given ------------------------------------------------------------------


def _stepped_over_nothing(raised: _Raised) -> str | None:
    """Explain a scaler that has seen no gradient of an optimizer's by what the optimizer holds."""
    held = _found_in(raised.error, "optimizer")
    groups = getattr(held, "param_groups", ())
    parameters = raised.inspection.parameters
    owned = {id(p) for group in groups for p in group["params"]}
    mine = [name for name, p in parameters.items() if id(p) in owned]
    last = _at(_last_of_user(raised.error))
    if mine:
        found = raised.inspection.diagnose(dict.fromkeys(mine, Status.MISSING), 0)
        said = [explain.render(d, tuple(parameters)) for d in found[:1]]
        return "\n\n".join([_words.error_note("nothing_to_unscale", last), *said])
    loose = [name for name, p in parameters.items() if p.requires_grad and id(p) not in owned]
    modules = [part for name in loose for part in reversed(name.split(".")[:-1])]
    for part in dict.fromkeys([*modules, *(name.rpartition(".")[2] for name in loose)]):
        put = [s for file in _files_of(raised) for s in _source.reassignments(file, part)]
        if put:
            return _words.error_note("held_before", _listed(_statement(put[0]), last))
    return _words.error_note("nothing_to_unscale", last)


def _files_of(raised: _Raised) -> list[str]:
    """Return the user's files that the model's classes, and the lines that the error passed, are in."""
    files = [place.code.co_filename for place in reversed(_users_own(raised.error))]
    for module in raised.model.modules():
        file = _source.file_of(type(module))
        if file is not None and _frames.owner_of_file(file) is _frames.Owner.USER:
            files.append(file)
    return list(dict.fromkeys(files))


def _sparse(raised: _Raised) -> str | None:
    """Explain an optimizer that is given sparse gradients by the only place that asks for these."""
    asked = [s for file in _files_of(raised) for s in _source.keywords(file, "sparse")]
    last = _at(_last_of_user(raised.error))
    return _words.error_note("sparse", _listed(*map(_statement, asked[:1]), last))


def _norm_in_vmap(raised: _Raised) -> str | None:
    """Explain a layer that counts its inputs under ``vmap`` by the line that made it."""
    layer = _found_in(raised.error, "self")
    last = _at(_last_of_user(raised.error))
    for module in raised.model.modules():
        for name, child in module.named_children():
            made = _source.keepings(type(module), name) if child is layer else []
            if made:
                return _words.error_note("norm_in_vmap", _listed(_statement(made[0]), last))
    return _words.error_note("norm_in_vmap", last)


# Where it failed ------------------------------------------------------------------------------------


def _failing(kind: str) -> _Find:
    """Explain an error by the call that raised it."""

    def find(raised: _Raised) -> str | None:
        failed = raised.failed
        place = _before_torch(raised.error) if failed is None else failed.place
        if place is None:
            return None
        places = [*raised.callers_of(place), place]
        return _words.error_note(kind, _listed(*map(_at, places)))

    _BY_PLACE[find] = kind
    return find


def _raising(kind: str) -> _Find:
    """Explain an error by the user's own line that it passed last, where no call of torch's is known."""

    def find(raised: _Raised) -> str | None:
        place = _last_of_user(raised.error)
        return None if place is None else _words.error_note(kind, _at(place))

    _BY_PLACE[find] = kind
    return find


def _entries(error: Exception) -> Iterator[TracebackType]:
    """Yield the entries of a traceback, the outermost first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _users_own(error: Exception) -> list[_frames.Place]:
    """Return the user's own lines that an error passed, the outermost first."""
    return [
        _frames.Place(entry.tb_frame.f_code, entry.tb_lasti)
        for entry in _entries(error)
        if _frames.owner(entry.tb_frame.f_code) is _frames.Owner.USER
    ]


def _last_of_user(error: Exception) -> _frames.Place | None:
    """Return the user's own line that an error passed last."""
    return next(reversed(_users_own(error)), None)


def _before_torch(error: Exception) -> _frames.Place | None:
    """Return the user's own line that an error passed last, where the user's code did not raise it itself."""
    raised = _innermost(error)
    own = raised is None or _frames.owner(raised.tb_frame.f_code) is _frames.Owner.USER
    return None if own else _last_of_user(error)


def _innermost(error: Exception) -> TracebackType | None:
    """Return the last entry of a traceback: where the error was raised."""
    return next(reversed(list(_entries(error))), None)


def _local(error: Exception, name: str) -> Tensor | None:
    """Return a tensor that a local variable held in the frame that raised."""
    raised = _innermost(error)
    held = None if raised is None else raised.tb_frame.f_locals.get(name)
    return held if isinstance(held, Tensor) else None


def _found_in(error: Exception, name: str) -> Any:
    """Return what a local variable held in the innermost frame that has it as an optimizer or a module."""
    kinds = (torch.optim.Optimizer, torch.nn.Module)
    held = [entry.tb_frame.f_locals.get(name) for entry in _entries(error)]
    return next((value for value in reversed(held) if isinstance(value, kinds)), None)


def _line_of(error: Exception) -> tuple[str, int] | None:
    """Return file and line at which an error was raised."""
    raised = _innermost(error)
    return None if raised is None else (raised.tb_frame.f_code.co_filename, raised.tb_lineno)


def _line(place: _frames.Place | None) -> tuple[str, int] | None:
    site = _frames.site_of(place)
    return None if place is None or site is None else (place.code.co_filename, site.line)


def _without_history(kind: str) -> _Find:
    """Explain a call on a tensor without a history by where that was lost."""

    def find(raised: _Raised) -> str | None:
        failed = raised.failed
        if failed is None:
            return _raising(kind)(raised)
        read = failed.read if raised.asked is None else raised.asked.wanted
        places = [*raised.callers_of(failed.place), failed.place]
        makers = (raised.maker_of(n) for n in read if not raised.trace.values[n].tracked)
        made = next((_at(op.place) for op in makers if op is not None), None)
        cut = raised.cut_of((*read, *failed.read))
        return _words.error_note(kind, _listed(cut, _as("made here", made), *map(_at, places)))

    return find


def _both(first: str | None, second: str | None) -> str | None:
    """Return two places of a note, the root first; one where they are the same, or one is not known."""
    if first is None or second is None or first == second:
        return first or second
    return f"{first}\n  --> {second}"


def _as(role: str, place: str | None) -> str | None:
    """Return a place with what it has to do with the error."""
    return None if place is None else f"{place} ({role})"


def _listed(*places: str | None) -> str | None:
    """Return the places of a note, the root first; one that stands there already, whatever its part, is left out."""
    lines: list[str] = []
    for place in places:
        for line in () if place is None else place.split("\n  --> "):
            if not any(known.startswith(line.rpartition("`")[0]) for known in lines):
                lines.append(line)
    return "\n  --> ".join(lines) or None


def _statement(statement: _source.Statement) -> str:
    return _words.place(Site(statement.file, statement.line, source=statement.text))


def _at(place: _frames.Place | None) -> str | None:
    site = _frames.site_of(place)
    if site is None:
        return None
    return _both(_words.place(site.caller) if site.caller else None, _words.place(site))


_KINDS: tuple[tuple[str, _Find], ...] = (
    ("does not require grad and does not have a grad_fn", _no_history),
    ("modified by an inplace operation", _overwritten),
    ("Trying to backward through the graph a second time", _twice),
    ("a leaf Variable that requires grad is being used in an in-place", _failing("leaf_in_place")),
    ("a view of a leaf Variable that requires grad", _failing("leaf_in_place")),
    ("invalid index of a 0-dim tensor", _failing("index_of_scalar")),
    (
        "can be implicitly created only for scalar outputs",
        _loss_made_by("not_scalar", lambda shape, _: math.prod(shape) > 1),
    ),
    (
        "can be implicitly created only for real scalar outputs",
        _loss_made_by(
            "complex_loss", lambda _, dtype: dtype.is_complex, frozenset(["mean", "sum"])
        ),
    ),
    ("an `inputs` parameter", _reentrant),
    ("Inference tensors cannot be saved for backward", _inference),
    ("Inplace update to inference tensor", _inference),
    ("on inference tensor outside InferenceMode", _inference),
    ("is not differentiable with respect to argument", _failing("no_derivative")),
    ("is not implemented", _without_derivative),
    ("no autograd formula was registered", _without_formula),
    ("view was created in no_grad mode and is being modified inplace", _view_without_history),
    ("BackwardHookFunction is a view", _behind_a_hook),
    ("is being modified inplace", _failing("view_in_place")),
    ("arguments don't support automatic differentiation", _failing("out_argument")),
    ("can't retain_grad on Tensor", _without_history("nothing_to_retain")),
    (
        "cannot register a hook on a tensor that doesn't require",
        _without_history("nothing_to_hook"),
    ),
    ("Can't call numpy() on Tensor that requires grad", _failing("numpy")),
    ("nly Tensors of floating point", _failing("integer")),
    ("Only Tensors created explicitly by the user", _copied),
    ("appears to not have been used in the graph", _not_in_graph),
    ("One of the differentiated Tensors does not require grad", _without_history("not_wanting")),
    ("you can only change requires_grad flags of leaf variables", _failing("flag_of_a_result")),
    ("Legacy autograd function with non-static forward", _raising("legacy_function")),
    ("returned an incorrect number of gradients", _in_function("wrong_count")),
    ("returned an invalid gradient", _in_function("wrong_shape")),
    ("returned a gradient different than None", _in_function("not_none")),
    ("marked with @once_differentiable", _in_function("once_differentiable")),
    ("has changed the size of value", _hooked),
    ("has changed the type of value", _hooked),
    ("number of tensors was saved during the original forward and recomputation", _recomputed),
    ("Recomputed values for the following tensors have different metadata", _recomputed),
    ("can't optimize a non-leaf Tensor", _no_leaf),
    ("' as parameter '", _raising("no_parameter")),
    ("unscale_() has already been called", _raising("unscaled_twice")),
    ("Attempting to unscale FP16 gradients", _raising("half_parameters")),
    ("No inf checks were recorded for this optimizer", _stepped_over_nothing),
    ("does not support sparse gradients", _sparse),
    ("refusing to serialize non-leaf tensor", _serialised),
    ("attempting to assign a gradient of size", _failing("grad_of_another_size")),
    ("refers to a single memory location", _failing("expanded_in_place")),
    ("Batch norm got a batched tensor as input", _norm_in_vmap),
    ("' returned nan values in its", _not_a_number),
    ("object has no attribute 'backward'", _number_for_a_loss),
    ("'NoneType'", _none_for_a_gradient),
    ("vmap: It looks like you're", _raising("item_in_vmap")),
    ("Mismatch in shape: grad_output", _failing("grad_outputs")),
    ("to return a scalar Tensor", _vector),
    ("to return a scalar tensor", _vector),
)
_ONLY_TRACED = frozenset([_none_for_a_gradient, _number_for_a_loss])
"""Words that other errors have too: nothing is said of them where the step was not traced."""
