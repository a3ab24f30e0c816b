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
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import BackwardCFunction

from gradwatch import _frames, _source, _words, explain
from gradwatch._calls import Kind, Wrapper
from gradwatch._diagnose import not_looked_into
from gradwatch._failure import (
    Raised,
    at,
    before_torch,
    begun_at,
    entries,
    hide_own,
    last_of_user,
    line_at,
    line_of,
    listed,
    local_owner,
    local_tensor,
    local_tensors,
    role_of,
    statement,
    users_own,
)
from gradwatch._overwrites import culprit, stem
from gradwatch._record import (
    MADE,
    held_by,
    hooks_of,
    keepers_in,
    memory_of,
    node_of,
    result_of,
    unregistered,
)
from gradwatch._unread import settings
from gradwatch.report import Cause, Diagnosis, Site, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from gradwatch._diagnose import Inspection
    from gradwatch._record import Backward, Op
    from gradwatch._trace import Trace

    _Find = Callable[["Raised"], str | None]

_log = logging.getLogger("gradwatch")
_MOST_NODES = 100_000
_MOST_SETTINGS = 4
_BY_PLACE: dict[_Find, str] = {}
"""Explanations that need nothing but the line that raised, with their words."""


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
        hide_own(error)
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
    if "optimizer got an empty parameter list" in message:
        return _nothing_registered(model)
    for words, find in _KINDS:
        if words in message:
            if inspection is not None:
                return find(Raised(error, inspection, model))
            if find is _none_for_a_gradient:
                return _none_untraced(error, known)
            return None if find is _number_for_a_loss else _untraced(error, model, find)
    return None


def _nothing_registered(model: nn.Module) -> str | None:
    """Explain a model without parameters by those that it hides."""
    found = next(unregistered(model), None)
    if found is None or next(model.parameters(), None) is not None:
        return None
    advice = _words.register(found.kind.__name__)
    return _words.error_note("empty_list", None, not_looked_into(found), advice)


def _none_untraced(error: Exception, known: tuple[Diagnosis, ...]) -> str | None:
    """Explain a ``.grad`` that is None by what is known of the parameters without one."""
    last = last_of_user(error)
    missing = [explain.render(d) for d in known if d.status is Status.MISSING]
    if last is None or not missing or ".grad" not in _source.text_of(last[:2]):
        return None
    return "\n\n".join([_words.error_note("grad_is_none", at(last)), *missing])


def _untraced(error: Exception, model: nn.Module, find: _Find) -> str:
    """Explain an error of a step that was not traced by its traceback, the model, and an earlier trace."""
    kind = _BY_PLACE.get(find)
    place = None if kind is None else at(last_of_user(error))
    if kind is not None and place is not None:
        return _words.error_note(kind, place)
    if find in {_twice, _overwritten}:
        made = _frames.site_of(_outlived(error))
        kept = _kept_anywhere(model, made)
        if kept is None and made is not None:
            kept = f"{_words.place(made)} (made here)", ""
        if kept is not None and (find is _twice or made is not None):
            return _words.error_note("kept" if find is _twice else "outlived", *kept)
    if find is _copied and (kept := _kept_anywhere(model)) is not None:
        last = at(last_of_user(error))
        return _words.error_note("copy_of_a_result", listed(role_of("kept here", kept[0]), last))
    untraced = _words.error_note("untraced", role_of("it fails here", at(last_of_user(error))))
    if find is _no_history:
        said = [part for part in (untraced, _frozen(model)) if part]
        return _switched_off(model) or "\n\n".join(said)
    return untraced


def _switched_off(model: nn.Module) -> str | None:
    """Explain a loss without a history where gradient mode was left off, or everything is frozen."""
    if not torch.is_grad_enabled():
        classes = dict.fromkeys(map(type, model.modules()))
        calls = dict.fromkeys(s for cls in classes for s in _source.switches(cls))
        return _words.error_note(
            "left_off", statement(next(iter(calls))) if len(calls) == 1 else None
        )
    return None if any(p.requires_grad for p in model.parameters()) else all_frozen(model)


def _frozen(model: nn.Module) -> str | None:
    """Return which parameters are frozen, and where that was done."""
    names = dict(model.named_parameters())
    frozen = tuple(name for name, p in names.items() if not p.requires_grad)
    folded = _words.listed(explain.fold(frozen, names))
    return _words.frozen_too(folded, _first_freezing(model)) if frozen else None


def _outlived(error: Exception) -> _frames.Place | None:
    """Return where a tensor was made, in an earlier step that was traced, of the graph that a backward went over."""
    todo = begun_at(error)
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


def _kept_anywhere(
    model: nn.Module, made: Site | None = None, read: _frames.Place | None = None
) -> tuple[str | None, str] | None:
    """Return the statement that keeps a tensor with a history on a module, and the name it has there.

    Of several that whose name stands in the function that reads it.
    """
    near = frozenset() if read is None else _source.attributes_in(read.code)
    found = [
        (name, statements)
        for cls, attribute, name in keepers_in(model)
        if (statements := _source.keepings(cls, attribute))
    ]
    found.sort(key=lambda each: each[0].rpartition(".")[2] not in near)
    for full, statements in found:
        return _story(statements, made, read), f" (`{full}`)"
    return None


# Losses without a history, and what was kept ------------------------------------------------------


def _no_history(raised: Raised) -> str | None:
    """Explain a loss that was computed from nothing that wants a gradient."""
    inner = _in_a_backward(raised.error)
    if inner is not None:
        return _words.error_note("grad_in_backward", inner)
    if not torch.is_grad_enabled():
        return _switched_off(raised.model)
    asked = raised.asked
    if asked is not None and not asked.accumulates:
        cut = raised.cut_of(asked.roots)
        if cut is not None:
            return _words.error_note("output_without_history", listed(cut, at(asked.place)))
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
    asked = raised.asked
    makers = [raised.maker_of(root) for root in ([] if asked is None else asked.roots)]
    loss = next((at(op.place) for op in makers if op is not None), None)
    fresh = role_of("all that the loss is computed from", listed(*map(at, _sources(raised))))
    said = [
        _words.error_note("no_history", listed(role_of("the loss", loss), fresh)),
        *(explain.render(d, tuple(parameters)) for d in told),
    ]
    more = (_switched_over(raised.model, told), _frozen_on_the_way(raised))
    return "\n\n".join([*said, *(part for part in more if part)])


def _switched_over(model: nn.Module, told: Iterable[Diagnosis]) -> str | None:
    """Return where that is set on which the reading of an unused parameter depends, as far as the text tells."""
    modules = dict(model.named_modules())
    unused = [d.parameters[0].rpartition(".") for d in told if d.cause is Cause.UNUSED]
    owners = [(modules[path], name) for path, _, name in unused if path in modules]
    for module, name in owners:
        for attribute, statements in settings(type(module), name).items():
            where = listed(*map(statement, statements[:_MOST_SETTINGS]))
            if where is not None:
                return _words.set_here(attribute, where)
    return None


def _sources(raised: Raised) -> list[_frames.Place | None]:
    """Return where the tensors were made anew from which alone the loss was computed: one place, or none."""
    asked = raised.asked
    seen: set[int] = set()
    todo = [] if asked is None else list(asked.roots)
    places: list[_frames.Place | None] = []
    while todo:
        number = todo.pop()
        made = raised.maker_of(number)
        if made is None:
            return []
        if number not in seen:
            seen.add(number)
            todo.extend(made.inputs)
            places += [] if made.inputs else [made.place]
    return places if len(set(places)) == 1 else []


def _frozen_on_the_way(raised: Raised) -> str | None:
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
    seen_at = next((at(trace.freezings[n]) for n in names if n in trace.freezings), None)
    return _words.frozen_too(_words.listed(folded), seen_at or _first_freezing(raised.model))


def _in_a_backward(error: Exception) -> str | None:
    """Return where the ``backward`` of a Function asked for gradients, and where it computed what from."""
    places = []
    for entry in entries(error):
        code = entry.tb_frame.f_code
        first = entry.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, BackwardCFunction) and code.co_name == "backward":
            places.append(_frames.Place(code, entry.tb_lasti))
    if not places:
        return None
    last = last_of_user(error) or places[-1]
    made = _source.first_argument(last[:2], places[-1].code)
    return listed(None if made is None else statement(made), at(places[-1]), at(last))


def all_frozen(model: nn.Module, trace: Trace | None = None) -> str:
    """Return what is to be said of a loss without a history when no parameter requires grad."""
    if next(model.parameters(), None) is None:
        return _words.error_note("no_parameters", None)
    seen = None if trace is None else next(iter(trace.freezings.values()), None)
    return _words.error_note("all_frozen", at(seen) or _first_freezing(model, most=4))


def _first_freezing(model: nn.Module, most: int = 1) -> str | None:
    """Return where the text freezes something, in the class that comes first in the model; a few of such places."""
    for module in model.modules():
        if not type(module).__module__.startswith("torch."):
            statements = _source.freezings(type(module))
            if statements:
                file = [s for s in _source.freezings_in(statements[0].file) if s not in statements]
                return listed(*map(statement, [*statements, *file][:most]))
    return None


def _twice(raised: Raised) -> str | None:
    """Explain a graph that an earlier backward pass has freed."""
    kept = _kept(raised) or _carried_over(raised)
    if kept is not None:
        return _words.error_note("kept", *kept)
    places = [at(backward.place) for backward in raised.trace.backwards]
    if len(places) > 1:
        first = raised.trace.backwards[-2].place
        held = None if first is None else _source.surrounding(first[:2], "cached")
        cache = None if held is None else role_of("kept as long as this lasts", statement(held))
        earlier = f"{places[-2]} (the earlier one)"
        shared = _shared(raised.trace)
        return _words.error_note("twice", listed(cache, *shared, earlier, places[-1]))
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
        return role_of("computed once, used by both", _given_to(last.place)), None
    named = _source.outer_assignment(taken.place[:2])
    once = listed(None if named is None else statement(named), _given_to(last.place))
    return role_of("computed once, used by both", once), role_of(
        "goes into the earlier one here", at(taken.place)
    )


def _given_to(place: _frames.Place | None) -> str | None:
    """Return a place, and before it the only call of a function that computes from its arguments alone there."""
    chosen = place is not None and _source.is_of_arguments(place[:2])
    call = _source.only_call(place.code) if place is not None and chosen else None
    return listed(None if call is None else statement(call), at(place))


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


def _kept(raised: Raised) -> tuple[str | None, str] | None:
    """Return where a tensor of an earlier pass, which this one has read, was kept, and its name there."""
    trace = raised.trace
    for op in trace.ops:
        if op.kind is Kind.LINK and op.place is None:
            readers = (o for o in trace.ops[op.index :] if set(op.outputs) & set(o.inputs))
            kept = _kept_in(raised.model, trace, op, next(readers, None))
            if kept is not None:
                return kept
    return None


def _carried_over(raised: Raised) -> tuple[str | None, str] | None:
    """Return the same of a tensor made in an earlier micro-batch of the step that was traced."""
    trace = raised.trace
    latest = trace.backwards[-1] if trace.backwards and len(trace.batches) > 1 else None
    if latest is None:
        return None
    behind = _behind(trace, latest.roots)
    begin = trace.batches[-1]
    old = behind.intersection(n for op in trace.ops[:begin] for n in op.outputs)
    for op in trace.ops[begin:]:
        carried = [] if behind.isdisjoint(op.outputs) else sorted(old.intersection(op.inputs))
        maker = raised.maker_of(carried[-1]) if carried else None
        if maker is not None and op.place is not None:
            made = _frames.site_of(maker.place)
            filled = _source.fillings(op.place[:2])
            if filled:
                return _story(filled, made, op.place), ""
            kept = _kept_anywhere(raised.model, made, op.place)
            return kept or (_story(_source.stores(op.place[:2]), made, op.place), "")
    return None


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
    kept = next((statement(s) for s in same or statements), None)
    came = None if made is None or same else f"{_words.place(made)} (made here)"
    used = at(read)
    if used in {None, kept, None if made is None else _words.place(made)}:
        return listed(kept, came)
    return listed(listed(kept, came), f"{used} (used again)")


def _holds(value: Any, tensor: Any) -> bool:
    """Tell whether a value is a tensor, or a container or a `partial` that holds it."""
    if isinstance(value, dict):
        value = list(value.values())
    elif isinstance(value, functools.partial):
        value = [*value.args, *value.keywords.values()]
    return value is tensor or (
        isinstance(value, (list, tuple)) and any(_holds(item, tensor) for item in value)
    )


def _copied(raised: Raised) -> str | None:
    """Explain the copy of a computed tensor by the attribute that keeps it, else by what made it."""
    kept = _kept_anywhere(raised.model)
    failed = raised.failed
    if kept is None:
        return _failing("copy_of_a_result")(raised)
    copied = None if failed is None else at(failed.place)
    return _words.error_note("copy_of_a_result", listed(f"{kept[0]} (kept here)", copied))


# Writes in place ------------------------------------------------------------------------------------


def _overwritten(raised: Raised) -> str | None:
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
    write, is_result = culprit(
        later,
        shape,
        found[2],
        (first, int(found[3])),
        trace=raised.trace,
        passes=raised.inspection.passes,
    )
    if write is not None:
        # A view that was made anew says nothing of what the user wrote.
        named = is_result and stem(found[2] or "") != "AsStrided"
        maker = found[2] if named else None
        kind = "overwritten" if maker is None else "overwritten_result"
        where = listed(at(write.place), at(write.around))
        return _words.overwritten(kind, where, write.operation, maker)
    return _written_unseen(raised, shape, found[2]) or (
        _words.overwritten("overwritten", at(later[0].place), later[0].operation, None)
        if later and "AccumulateGrad" not in (found[2] or "")
        else None
    )


def _written_unseen(raised: Raised, shape: tuple[int, ...], node: str | None) -> str | None:
    """Explain a tensor that something else than a call of the user's has changed."""
    trace = raised.trace
    lookup = _renormed(raised, shape)
    if lookup is not None:
        return _words.error_note("renormed", at(lookup.place))
    carried = _carried_over(raised) if trace.steps else None
    if carried is not None:
        return _words.error_note("outlived", *carried)
    if trace.steps:
        return _words.error_note("optimizer_stepped", at(trace.steps[-1][0]), node)
    kept = _kept(raised)
    return None if kept is None else _words.error_note("outlived", *kept)


def _renormed(raised: Raised, shape: tuple[int, ...]) -> Op | None:
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


def _view_without_history(raised: Raised) -> str | None:
    """Explain a write into a view that was made while gradient mode was off, by the making of the view."""
    failed = raised.failed
    made = raised.maker_of(failed.read[0]) if failed is not None and failed.read else None
    while (
        made is not None and made.kind is Kind.REWRAP
    ):  # since a write into its base it wants a gradient
        made = raised.maker_of(made.inputs[0])
    if failed is None or made is None:
        return _failing("view_without_history")(raised)
    view = role_of("the view", at(made.place))
    places = listed(view, raised.switched_off(made), at(failed.place))
    return _words.error_note("view_without_history", places)


def _behind_a_hook(raised: Raised) -> str | None:
    """Explain a write into what a module with a full backward hook returned, by the registration of the hook."""
    codes = [
        code
        for module in raised.model.modules()
        for hook in hooks_of(module)
        if (code := getattr(hook, "__code__", None)) is not None
    ]
    found = [s for code in codes[:1] for s in _source.registrations(code)]
    failed = raised.failed
    wrote = None if failed is None else at(failed.place)
    return _words.error_note("behind_a_hook", listed(*map(statement, found[:1]), wrote))


# Derivatives that do not exist ----------------------------------------------------------------------


def _in_function(kind: str) -> _Find:
    """Explain what the ``backward`` of a Function did wrong by the call of the Function."""

    def find(raised: Raised) -> str | None:
        named = re.search(r"[Ff]unction (\w+) returned", raised.message)
        ops = raised.trace.ops
        if named is None:
            called = [op for op in ops if op.wrapper is Wrapper.CUSTOM_FUNCTION]
            return _words.error_note(kind, at(called[-1].place)) if called else None
        index = re.search(r"at index (\d+)", raised.message)
        own = _return_of(
            named[1].removesuffix("Backward"), None if index is None else int(index[1])
        )
        for node in (node for passed in raised.inspection.passes for node in passed.nodes):
            if node.custom and node.name == named[1] and node.tag >= 0:
                return _words.error_note(kind, listed(at(ops[node.tag].place), own))
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
    return listed(*(role_of(role, statement(s)) for role, s in zip(roles, returned, strict=False)))


def _without_derivative(raised: Raised) -> str | None:
    """Explain an operation without a derivative, which torch may say only in the backward pass."""
    named = re.search(r"derivative for '?(?:aten::)?(\w+)", raised.message)
    wanted = "" if named is None else named[1].strip("_")
    ops = raised.trace.ops
    for op in reversed(ops):
        if wanted and op.name.rpartition(".")[2].strip("_") == wanted:
            return _words.error_note("no_derivative", at(op.place))
    # An inner operation of another name: the node of the graph is named after it.
    camel = wanted.replace("_", "").removesuffix("backward")
    for node in (node for passed in raised.inspection.passes for node in passed.nodes):
        name = node.name.rpartition("Backward")[0]
        if camel and node.tag >= 0 and name.lower() == camel:
            return _words.error_note("no_derivative", at(ops[node.tag].place))
    # Libraries use the same words for what has nothing to do with a derivative.
    return None if raised.failed is None else _failing("no_derivative")(raised)


def _not_a_number(raised: Raised) -> str | None:
    """Explain what anomaly mode found by the operation that the node was made by."""
    found = re.search(r"Function '(\w+)' returned nan", raised.message)
    name = "" if found is None else found[1]
    for passed in raised.inspection.passes:
        fine = {number for (number, _), size in passed.sizes.items() if math.isfinite(size)}
        tags = [n.tag for i, n in enumerate(passed.nodes) if n.name == name and i not in fine]
        if tags and max(tags) >= 0:
            # Backward comes to the operations in reverse.
            return _words.error_note("anomaly", at(raised.trace.ops[max(tags)].place))
    return None


def _without_formula(raised: Raised) -> str | None:
    """Explain a custom operator that was registered without a derivative."""
    found = re.search(r"through (\w+\.\w+)", raised.message)
    wanted = "" if found is None else found[1]
    for op in reversed(raised.trace.ops):
        if wanted and wanted in op.name:
            return _words.error_note("no_formula", at(op.place))
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

    def find(raised: Raised) -> str | None:
        asked = raised.asked
        roots = begun_at(raised.error)
        made = [op for node in roots for op in _made_odd(node, is_odd, handing_on, raised)]
        if asked is None or not made:
            return _failing(kind)(raised)
        shaped = [at(op.place) for op in reversed(made)]
        return _words.error_note(kind, listed(shaped[0], shaped[-1], at(asked.place)))

    return find


_ELEMENTWISE = frozenset(
    "add sub rsub mul div true_divide truediv neg clone contiguous to float double half".split()  # noqa: SIM905
)


def _made_odd(
    node: Any,
    is_odd: Callable[[tuple[int, ...], torch.dtype], bool],
    handing_on: frozenset[str],
    raised: Raised,
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
        if len(odd) > 1:  # a sum in a loop: what is added tells more than what was there before
            tags = {up: up.metadata.get(raised.trace.tag) for up in odd}
            odd = [
                up for up in odd if tags[up] is None or raised.trace.ops[tags[up]].place != op.place
            ]
        is_through = op.name.rpartition(".")[2].strip("_") in handing_on
        node = odd[0] if is_through and len(odd) == 1 else None


def _not_in_graph(raised: Raised) -> str | None:
    """Explain a tensor that an output was not computed from by the cut between the two, or by both ends."""
    trace = raised.trace
    if not trace.backwards:
        return _failing("not_in_graph")(raised)
    asked = trace.backwards[-1]
    unused = _unused(raised, asked)
    names = [name for number in unused if (name := trace.values[number].parameter)]
    named = f"`{names[0]}`, which" if names else "a tensor that"
    read = {number for op in trace.ops for number in op.inputs}
    makers = [(number, op) for number in unused if (op := raised.maker_of(number)) is not None]
    made = [op for n, op in makers if trace.values[n].tracked and op.kind is Kind.PLAIN]
    # A copy that was made after the output: what the user asks for is not what went into it.
    made += [op for number, op in makers if number not in read]
    last = _last_from(trace, unused)
    outputs = [op for root in asked.roots if (op := raised.maker_of(root)) is not None]
    for cut in raised.inspection.cuts_between(unused, asked.roots):
        if cut.site is not None:
            places = listed(_words.place(cut.site), at(asked.place))
            cutter = cut.operation or str(cut.cause)
            return _words.error_note("cut_before", places, cutter, named)
    places = listed(
        *(role_of("made here", at(op.place)) for op in made[:1]),
        role_of("the last that was computed from it", None if last is None else at(last.place)),
        *(role_of("the output", at(op.place)) for op in outputs[:1]),
        *map(at, raised.callers_of(asked.place)),
        at(asked.place),
    )
    return _words.error_note("not_in_graph", places, named)


def _unused(raised: Raised, asked: Backward) -> tuple[int, ...]:
    """Return the value that a message means by its index among those that were asked for, or all of them."""
    index = re.search(r"Tensor at index (\d+)", raised.message)
    chosen = None if index is None else int(index[1])
    whole = asked.inputs is not None and len(asked.inputs) == len(asked.wanted)
    if chosen is None or not whole or chosen >= len(asked.wanted):
        return asked.wanted
    return (asked.wanted[chosen],)


def _last_from(trace: Trace, numbers: Iterable[int]) -> Op | None:
    """Return the last operation that computed anything from values."""
    behind, last = set(numbers), None
    for op in trace.ops:
        if op.kind is Kind.PLAIN and not behind.isdisjoint(op.inputs):
            behind.update(op.outputs)
            last = op
    return last


def _number_for_a_loss(raised: Raised) -> str | None:
    """Explain a loss that is a number by the call that took it out of torch."""
    leaving = [op for op in raised.trace.ops if op.kind is Kind.EXIT and not _is_truth(op)]
    return _words.error_note("number", at(leaving[-1].place)) if leaving else None


def _is_truth(op: Op) -> bool:
    return op.name.endswith("__bool__")


def _inference(raised: Raised) -> str | None:
    """Explain a tensor of inference mode by the operation that made it."""
    failed = raised.failed
    made = raised.maker_of(failed.read[0]) if failed is not None and failed.read else None
    while made is not None and made.grad_mode and made.inputs:
        made = raised.maker_of(made.inputs[0])  # a view of it that was made outside
    if failed is None or made is None or made.grad_mode:
        modes = [s for f in _files_of(raised) for s in _source.method_calls(f, "inference_mode")]
        within = [role_of("perhaps made in there", statement(mode)) for mode in modes[:2]]
        last = before_torch(raised.error) if failed is None else failed.place
        places = listed(*within, *map(at, [*raised.callers_of(last), last]))
        return _words.error_note("inference", places)
    came = role_of("made here", at(made.place))
    places = listed(came, raised.switched_off(made), at(failed.place))
    return _words.error_note("inference", places)


def _no_leaf(raised: Raised) -> str | None:
    """Explain a tensor given to an optimizer, or asked for ``.grad``, that is the result of an operation."""
    given = local_tensor(raised.error, "param")
    node = None if given is None else node_of(given)
    tag = None if node is None else node.metadata.get(raised.trace.tag)
    place = _spoiled_leaf(raised) if tag is None else at(raised.trace.ops[tag].place)
    return None if place is None else _words.error_note("no_leaf", place)


def _serialised(raised: Raised) -> str | None:
    """Explain a tensor that cannot go to another process with its history by what made it."""
    given = local_tensor(raised.error, "tensor")
    node = None if given is None else node_of(given)
    tag = None if node is None else node.metadata.get(raised.trace.tag)
    made = None if tag is None else raised.trace.ops[tag]
    before = [] if made is None else [raised.maker_of(number) for number in made.inputs]
    places = dict.fromkeys(at(op.place) for op in before if op is not None)
    last = at(last_of_user(raised.error))
    own = None if made is None else at(made.place)
    return _words.error_note(
        "serialised", listed(*list(places)[:1], role_of("made here", own), last)
    )


def _none_for_a_gradient(raised: Raised) -> str | None:
    """Explain a None that came from ``.grad``: of a result, of a copy, or of a parameter that got none."""
    for read, number in reversed(raised.trace.grad_reads):
        where = at(read)
        if where is not None and line_of(raised.error) == line_at(read):
            maker = raised.maker_of(number)
            made = (None if maker is None else at(maker.place)) or _spoiled_leaf(raised)
            came = role_of("made here, so that it is no leaf", made)
            return _words.error_note("grad_of_a_result", listed(came, where))
    last = last_of_user(raised.error)
    if last is None or ".grad" not in _source.text_of(last[:2]):
        return None
    held = list(local_tensors(raised.error))
    parameters = raised.inspection.parameters
    mine = {id(p) for p in parameters.values()}
    memory = {memory_of(p): name for name, p in parameters.items()}
    copies = [memory[m] for t in held if id(t) not in mine and (m := memory_of(t)) in memory and m]
    if copies:
        return _words.error_note(
            "grad_of_a_copy", listed(_detached_last(raised, copies[0]), at(last))
        )
    without = [n for n, p in parameters.items() if p.requires_grad and p.grad is None]
    chosen = [n for n in without if any(parameters[n] is t for t in held)] or without
    found = raised.inspection.diagnose(dict.fromkeys(without, Status.MISSING), 0)
    told = [d for d in found if not set(chosen).isdisjoint(d.parameters)][:1]
    said = [explain.render(d, tuple(parameters)) for d in told]
    return "\n\n".join([_words.error_note("grad_is_none", at(last)), *said]) if said else None


def _spoiled_leaf(raised: Raised) -> str | None:
    """Return where the text computes from a tensor that was just asked to require grad, which makes it no leaf."""
    classes = dict.fromkeys(map(type, raised.model.modules()))
    found = [s for cls in classes for s in _source.spoiled_leaves(cls)]
    return statement(found[0]) if found else None


def _detached_last(raised: Raised, name: str) -> str | None:
    """Return where a parameter was detached last."""
    trace = raised.trace
    for op in reversed(trace.ops):
        if op.kind is Kind.SEVER and any(trace.values[n].parameter == name for n in op.inputs):
            return at(op.place)
    return None


def _hooked(raised: Raised) -> str | None:
    """Explain a gradient that a hook changed wrongly by the line that registered the hook."""
    places = set(raised.trace.hooks.values())
    if places:
        return _words.error_note("hook", at(places.pop())) if len(places) == 1 else None
    hooks = {id(h): h for p in raised.inspection.parameters.values() for h in hooks_of(p)}
    codes = [_frames.code_of(hook) for hook in hooks.values()]
    if len(codes) != 1 or codes[0] is None:
        return None
    returned = _source.returned(codes[0], None)
    return _words.error_note("hook_returns", listed(*map(statement, returned)))


def _hook_of_a_module(raised: Raised) -> str | None:
    """Explain what a full backward hook returned by its ``return``, where the model has one alone."""
    hooks = {id(h): h for module in raised.model.modules() for h in hooks_of(module)}
    codes = dict.fromkeys(_frames.code_of(hook) for hook in hooks.values())
    code = next(iter(codes), None)
    returned = [] if code is None or len(codes) > 1 else _source.returned(code, None)
    return _words.error_note("hook_returns", listed(*map(statement, returned)))


def _nothing_in_a_checkpoint(raised: Raised) -> str | None:
    """Explain a reentrant checkpoint without a gradient inside by what cut its input off, and its call."""
    inside = [op for op in raised.trace.ops if op.around is not None]
    cut = next((op for op in inside if op.kind is Kind.SEVER), None)
    call = next((op.around for op in [cut, *inside] if op is not None), None)
    cut_at = None if cut is None else at(cut.place)
    return _words.error_note("nothing_in_checkpoint", listed(cut_at, at(call)))


def _made_and_failing(kind: str) -> _Find:
    """Explain an error by what made the last of the tensors that the call which raised was given."""

    def find(raised: Raised) -> str | None:
        failed = raised.failed
        makers = [raised.maker_of(number) for number in (failed.read if failed else ())]
        made = next((at(op.place) for op in reversed(makers) if op is not None), None)
        last = before_torch(raised.error) if failed is None else failed.place
        places = [*raised.callers_of(last), last]
        return _words.error_note(kind, listed(role_of("made here", made), *map(at, places)))

    _BY_PLACE[find] = kind
    return find


def _reentrant(raised: Raised) -> str | None:
    """Explain a reentrant checkpoint by its call."""
    ops = raised.trace.ops
    own = (
        op.around or op.place
        for op in ops
        if op.around or op.wrapper is Wrapper.REENTRANT_CHECKPOINT
    )
    asked = None if raised.asked is None else at(raised.asked.place)
    return _words.error_note("reentrant_inputs", listed(at(next(own, None)), asked))


def _recomputed(raised: Raised) -> str | None:
    """Explain a checkpoint whose second run differed: by what it changes inside, and by the only call of one."""
    modules = dict(raised.model.named_modules())
    calls = {
        statement(call)
        for cls in {type(module) for module in modules.values()}
        if not cls.__module__.startswith("torch.")
        for name in ("checkpoint", "checkpoint_sequential")
        for call in _source.calls_of(cls, name)
    }
    call = calls.pop() if len(calls) == 1 else None
    again = [type(modules[path]) for path in reversed(raised.trace.rerun) if path in modules]
    changes = _source.changes_of_state(dict.fromkeys(again))
    if not changes and not raised.model.training:
        modes = [s for file in _files_of(raised) for s in _source.method_calls(file, "eval")]
        changes = modes if len(modes) == 1 else []
    change = role_of("by this the next run differs", statement(changes[0])) if changes else None
    return _words.error_note("recomputed", listed(change, call)) if change or call else None


def _vector(raised: Raised) -> str | None:
    """Explain a function given to ``torch.func`` that returns several elements by the last thing that it did."""
    place = last_of_user(raised.error)
    last = next((op for op in reversed(raised.trace.ops) if op.place is not None), None)
    made = None if last is None else role_of("the last operation in it", at(last.place))
    return None if place is None else _words.error_note("func_of_a_vector", listed(made, at(place)))


_BY_PLACE[_vector] = "func_of_a_vector"


# Optimizers, and what they are given ------------------------------------------------------------------


def _stepped_over_nothing(raised: Raised) -> str | None:
    """Explain a scaler that has seen no gradient of an optimizer's by what the optimizer holds."""
    held = local_owner(raised.error, "optimizer")
    groups = getattr(held, "param_groups", ())
    parameters = raised.inspection.parameters
    owned = {id(p) for group in groups for p in group["params"]}
    mine = [name for name, p in parameters.items() if id(p) in owned]
    last = at(last_of_user(raised.error))
    if mine:
        found = raised.inspection.diagnose(dict.fromkeys(mine, Status.MISSING), 0)
        said = [explain.render(d, tuple(parameters)) for d in found[:1]]
        return "\n\n".join([_words.error_note("nothing_to_unscale", last), *said])
    loose = [name for name, p in parameters.items() if p.requires_grad and id(p) not in owned]
    modules = [part for name in loose for part in reversed(name.split(".")[:-1])]
    for part in dict.fromkeys([*modules, *(name.rpartition(".")[2] for name in loose)]):
        put = [s for file in _files_of(raised) for s in _source.reassignments(file, part)]
        if put:
            return _words.error_note("held_before", listed(statement(put[0]), last))
    return _words.error_note("nothing_to_unscale", last)


def _files_of(raised: Raised) -> list[str]:
    """Return the user's files that the model's classes, and the lines that the error passed, are in."""
    files = [place.code.co_filename for place in reversed(users_own(raised.error))]
    for module in raised.model.modules():
        file = _source.file_of(type(module))
        if file is not None and _frames.owner_of_file(file) is _frames.Owner.USER:
            files.append(file)
    return list(dict.fromkeys(files))


def _sparse(raised: Raised) -> str | None:
    """Explain an optimizer that is given sparse gradients by the only place that asks for these."""
    asked = [s for file in _files_of(raised) for s in _source.keywords(file, "sparse")]
    last = at(last_of_user(raised.error))
    return _words.error_note("sparse", listed(*map(statement, asked[:1]), last))


def _norm_in_vmap(raised: Raised) -> str | None:
    """Explain a layer that counts its inputs under ``vmap`` by the line that made it."""
    layer = local_owner(raised.error, "self")
    last = at(last_of_user(raised.error))
    for module in raised.model.modules():
        for name, child in module.named_children():
            made = _source.keepings(type(module), name) if child is layer else []
            if made:
                return _words.error_note("norm_in_vmap", listed(statement(made[0]), last))
    return _words.error_note("norm_in_vmap", last)


# Where it failed ------------------------------------------------------------------------------------


def _failing(kind: str) -> _Find:
    """Explain an error by the call that raised it."""

    def find(raised: Raised) -> str | None:
        failed = raised.failed
        place = before_torch(raised.error) if failed is None else failed.place
        if (
            raised.asked is not None
        ):  # what a checkpoint runs again in backward has lines of its own
            place = last_of_user(raised.error) or place
        if place is None:
            return None
        places = [*raised.callers_of(place), place]
        return _words.error_note(kind, listed(*map(at, places)))

    _BY_PLACE[find] = kind
    return find


def _raising(kind: str) -> _Find:
    """Explain an error by the user's own line that it passed last, where no call of torch's is known."""

    def find(raised: Raised) -> str | None:
        place = last_of_user(raised.error)
        return None if place is None else _words.error_note(kind, at(place))

    _BY_PLACE[find] = kind
    return find


def _without_history(kind: str) -> _Find:
    """Explain a call on a tensor without a history by where that was lost."""

    def find(raised: Raised) -> str | None:
        failed = raised.failed
        if failed is None:
            return _raising(kind)(raised)
        read = failed.read if raised.asked is None else raised.asked.wanted
        places = [*raised.callers_of(failed.place), failed.place]
        makers = (raised.maker_of(n) for n in read if not raised.trace.values[n].tracked)
        made = next((at(op.place) for op in makers if op is not None), None)
        cut = raised.cut_of((*read, *failed.read))
        return _words.error_note(kind, listed(cut, role_of("made here", made), *map(at, places)))

    return find


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
    ("use var_no_grad = var.detach()", _made_and_failing("flag_of_a_result")),
    ("only change requires_grad flags of leaf", _made_and_failing("flag_set_on_a_result")),
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
    ("attempting to assign a gradient of size", _made_and_failing("grad_of_another_size")),
    ("refers to a single memory location", _failing("expanded_in_place")),
    ("Batch norm got a batched tensor as input", _norm_in_vmap),
    ("' returned nan values in its", _not_a_number),
    ("Backward hook returned an invalid number", _hook_of_a_module),
    ("override the setup_context staticmethod", _raising("no_setup_context")),
    ("none of output has requires_grad=True", _nothing_in_a_checkpoint),
    ("vmap: called random operation", _raising("random_in_vmap")),
    ("vmap: inplace arithmetic", _raising("in_place_in_vmap")),
    ("object has no attribute 'backward'", _number_for_a_loss),
    ("'NoneType'", _none_for_a_gradient),
    ("vmap: It looks like you're", _raising("item_in_vmap")),
    ("Mismatch in shape: grad_output", _failing("grad_outputs")),
    ("to return a scalar Tensor", _vector),
    ("to return a scalar tensor", _vector),
)
