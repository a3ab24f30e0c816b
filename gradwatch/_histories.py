"""Why a loss has no history, or one that is gone: frozen, switched off, cut, freed, or kept across steps.

What this room knows that no other does: how to tell from a trace, or where the step was not traced from the text
of the model's classes and from what the model holds, which statement that was.

Limits: where the step was not traced, only what the model holds is known to be kept.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import BackwardCFunction

from gradwatch import _error_words, _frames, _nearby, _source, _statements, _stores, _words, explain
from gradwatch._calls import Kind, Wrapper
from gradwatch._failure import (
    Raised,
    at,
    entries,
    history_of,
    innermost,
    last_of_user,
    listed,
    raising,
    role_of,
    statement,
    users_own,
)
from gradwatch._kept import carried_over, kept_in_step
from gradwatch._unread import settings
from gradwatch.report import Cause, Diagnosis, Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from gradwatch._failure import Find
    from gradwatch._record import Backward, Op
    from gradwatch._trace import Trace

_MOST_SETTINGS = 4
_EARLIER_AND_LATER = 2
_ENGINE = "_engine_run_backward"
"""The function of torch's that runs a backward pass, and with it hooks."""
_MODES = ("no_grad", "inference_mode")
_CUTS = frozenset([Cause.DETACHED, Cause.LEFT_TORCH, Cause.NO_GRAD, Cause.NON_DIFFERENTIABLE])


def switched_off(model: nn.Module) -> str | None:
    """Explain a loss without a history where gradient mode was left off, or everything is frozen."""
    if not torch.is_grad_enabled():
        classes = dict.fromkeys(map(type, model.modules()))
        calls = dict.fromkeys(s for cls in classes for s in _statements.switches(cls))
        return _error_words.note(
            "left_off", statement(next(iter(calls))) if len(calls) == 1 else None
        )
    return None if any(p.requires_grad for p in model.parameters()) else all_frozen(model)


def frozen_ones(model: nn.Module) -> str | None:
    """Return which parameters are frozen, and where that was done."""
    names = dict(model.named_parameters())
    frozen = tuple(name for name, p in names.items() if not p.requires_grad)
    folded = _words.listed(explain.fold(frozen, names))
    return _error_words.frozen_too(folded, _first_freezing(model)) if frozen else None


def no_history(raised: Raised) -> str | None:
    """Explain a loss that was computed from nothing that wants a gradient."""
    inner, hooked = _in_a_backward(raised.error), _in_a_hook(raised.error)
    if inner is not None or hooked is not None:
        return _error_words.note("grad_in_backward" if inner else "off_in_hook", inner or hooked)
    if not torch.is_grad_enabled():
        return switched_off(raised.model)
    asked = raised.asked
    some = None if asked is None else _one_of_several(raised, asked)
    if some is not None:
        return some
    parameters = raised.inspection.parameters
    wanting = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not wanting:
        return all_frozen(raised.model, raised.trace)
    found = raised.inspection.diagnose(dict.fromkeys(wanting, Status.MISSING), 0)
    told = _to_blame(raised.trace, found)
    return _computed_off(raised, told) or _told(raised, told, found) if told else None


def _one_of_several(raised: Raised, asked: Backward) -> str | None:
    """Explain the one without a history of several tensors that backward begins at, or that are differentiated."""
    named = re.match(r"element (\d+) of tensors", raised.message)
    if named is not None and len(asked.roots) > int(named[1]) > 0:
        made = raised.maker_of(asked.roots[int(named[1])])
        places = listed(None if made is None else at(made.place), at(asked.place))
        return _error_words.note("one_without_history", places)
    cut = None if asked.accumulates else raised.cut_of(asked.roots)
    if cut is None:
        return None
    return _error_words.note("output_without_history", listed(cut, at(asked.place)))


def _to_blame(trace: Trace, found: Iterable[Diagnosis]) -> list[Diagnosis]:
    """Return the diagnosis that says most about a loss without a history.

    What was frozen on purpose is seldom what is wrong, and another parameter may have been frozen by mistake. Of
    several cuts the one behind the last parameter on the way ends all: those before it may be meant.
    """
    read, aside = _last_reads(trace), {Cause.UNUSED, Cause.NOT_IN_LOSS}
    ranked = sorted(
        found,
        key=lambda d: (
            d.site is None,
            d.cause is Cause.FROZEN,
            d.cause in aside,
            -max(read.get(name, -1) for name in d.parameters),
        ),
    )
    if ranked and ranked[0].cause is Cause.NO_GRAD:  # of one block the line that costs most
        return [d for d in found if d.cause is Cause.NO_GRAD][:1]
    return ranked[:1]


def _last_reads(trace: Trace) -> dict[str, int]:
    """Return the last operation that read each parameter."""
    values, last = trace.values, dict[str, int]()
    for op in trace.ops:
        for name in (values[number].parameter for number in op.inputs):
            if name is not None:
                last[name] = op.index
    return last


def _cut_as_well(raised: Raised, told: list[Diagnosis], found: Iterable[Diagnosis]) -> str | None:
    """Return the places at which other parameters are cut off from the loss: one of these may be the one not meant."""
    known = Cause.NO_GRAD if told[0].cause is Cause.NO_GRAD else None  # one switch cuts off many
    others = [d for d in found if d not in told and d.site and d.cause in _CUTS - {known}]
    switches = {place for _, each in raised.trace.switches if (place := at(each)) is not None}
    off = switches if any(d.cause is Cause.NO_GRAD for d in others) else set[str]()
    lines = [f"{_words.place(d.site)} ({d.cause})" for d in others if d.site is not None]
    where = listed(*lines[:_MOST_SETTINGS], *(off if len(off) == 1 else ()))
    return None if where is None else _error_words.cut_as_well(where)


def _told(raised: Raised, told: list[Diagnosis], found: Iterable[Diagnosis]) -> str:
    """Explain a loss without a history by the diagnosis of a parameter that should have reached it."""
    roots = _roots(raised)
    loss = next((at(op.place) for n in roots if (op := raised.maker_of(n)) is not None), None)
    places = listed(*map(at, _sources(raised, roots)))
    fresh = role_of("all that the loss is computed from", places) or _constants(raised)
    said = [
        _error_words.note("no_history", listed(role_of("the loss", loss), fresh)),
        *(explain.render(d, tuple(raised.inspection.parameters)) for d in told),
    ]
    more = (
        _cut_as_well(raised, told, found),
        _run_inside(raised.error) if told[0].cause is Cause.NO_GRAD else None,
        _switched_over(raised.model, told),
        _frozen_on_the_way(raised),
    )
    return "\n\n".join([*said, *(part for part in more if part)])


def _run_inside(error: Exception) -> str | None:
    """Return the call through which the failing lines ran where gradients are off: a closure in a decorated `step`."""
    for place in users_own(error)[:-1]:
        helper = _nearby.switch_in_helper(place[:2], _MODES)
        made = None if helper is None else statement(helper)
        if made or any(_nearby.surrounding(place[:2], mode) for mode in _MODES):
            where = listed(made, at(place))
            for_good = _nearby.surrounding(place[:2], _MODES[1]) or (made and _MODES[1] in made)
            return where and _error_words.called_inside(where, for_good=bool(for_good))
    return None


def _computed_off(raised: Raised, told: list[Diagnosis]) -> str | None:
    """Explain a loss that was computed while gradients were off, where no diagnosis says so."""
    asked = raised.asked
    if asked is None or told[0].cause is Cause.NO_GRAD:
        return None
    made = [op for root in asked.roots if (op := raised.maker_of(root)) is not None]
    op = next((op for op in made if not op.grad_mode), None)
    switch = None if op is None else raised.switched_off(op)
    if op is None or switch is None:
        return None
    return _error_words.note("computed_off", listed(switch, at(op.place), at(asked.place)))


def _switched_over(model: nn.Module, told: Iterable[Diagnosis]) -> str | None:
    """Return where that is set on which the reading of an unused parameter depends, as far as the text tells."""
    modules = dict(model.named_modules())
    unused = [d.parameters[0].rpartition(".") for d in told if d.cause is Cause.UNUSED]
    owners = [(modules[path], name) for path, _, name in unused if path in modules]
    for module, name in owners:
        for attribute, statements in settings(type(module), name).items():
            where = listed(*map(statement, statements[:_MOST_SETTINGS]))
            if where is not None:
                return _error_words.set_here(attribute, where)
    return None


def made_anew(raised: Raised) -> str | None:
    """Return where the tensor was made anew that the last loss has its history from, and no parameter."""
    trace = raised.trace
    behind = history_of(trace, trace.backwards[-1].roots) if trace.backwards else set[int]()
    ops = [op for number in behind if (op := raised.maker_of(number)) is not None]
    read = {number for op in ops if behind.isdisjoint(op.inputs) for number in op.inputs}
    if any(trace.values[number].parameter is not None for number in read):
        return None
    makers = [op for number in read if (op := raised.maker_of(number)) is not None]
    places = {at(op.place) for op in makers if not op.inputs}
    return role_of("all that the loss is computed from", places.pop()) if len(places) == 1 else None


def _roots(raised: Raised) -> list[int]:
    """Return what the failing backward pass began at, as it was before a choice was joined to it."""
    asked = raised.asked
    if asked is None:
        return []
    makers = [(number, raised.maker_of(number)) for number in asked.roots]
    return [
        op.inputs[0] if op is not None and op.inputs and op.place == asked.place else number
        for number, op in makers
    ]


def _constants(raised: Raised) -> str | None:
    """Return where attributes that are no parameters are read, if the loss comes from them, and from no parameter."""
    trace, places = raised.trace, list[str | None]()
    seen, todo = set[int](), _roots(raised)
    while todo:
        number = todo.pop()
        made = raised.maker_of(number)
        if number in seen or made is None:
            continue
        seen.add(number)
        makers = {n: raised.maker_of(n) for n in made.inputs}
        # What came through Python has only chosen.
        inputs = [n for n, op in makers.items() if op is None or op.kind is not Kind.EXIT]
        todo += inputs
        read = [trace.values[n] for n in inputs]
        if any(value.parameter is not None for value in read):
            return None
        if any(value.attribute is not None for value in read):
            places.append(at(made.place))
    return role_of("the loss comes from here", listed(*places)) if len(set(places)) == 1 else None


def _sources(raised: Raised, roots: Iterable[int]) -> list[_frames.Place | None]:
    """Return where the tensors were made anew from which alone something was computed: one place, or none."""
    seen: set[int] = set()
    todo = list(roots)
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
    parameters = raised.inspection.parameters
    names = _frozen_among(raised, () if raised.asked is None else raised.asked.roots)
    if not names:
        return None
    folded = explain.fold(tuple(n for n in parameters if n in names), tuple(parameters))
    seen_at = raised.frozen_at(names) or _first_freezing(raised.model)
    return _error_words.frozen_too(_words.listed(folded), seen_at)


def _frozen_among(raised: Raised, numbers: Iterable[int]) -> dict[str, None]:
    """Return the names of the parameters that values were computed from, and that are frozen."""
    trace, parameters = raised.trace, raised.inspection.parameters
    seen: set[int] = set()
    todo = list(numbers)
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
    return names


def frozen_behind(raised: Raised, numbers: Iterable[int]) -> str | None:
    """Return where the parameters were frozen that values without a history were computed from."""
    names = _frozen_among(raised, numbers)
    where = (raised.frozen_at(names) or _first_freezing(raised.model)) if names else None
    return role_of("frozen here", where)


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
    made = _nearby.first_argument(last[:2], places[-1].code)
    return listed(None if made is None else statement(made), at(places[-1]), at(last))


def _in_a_hook(error: Exception) -> str | None:
    """Return where a hook, which runs while backward does, computed what it goes backward from, and does so."""
    codes = [entry.tb_frame.f_code for entry in entries(error)]
    runs = [position for position, code in enumerate(codes) if code.co_name == _ENGINE]
    inner = codes[runs[0] + 1 :] if runs else []
    own = [place for place in users_own(error) if place.code in inner]
    if not own:
        return None
    made = _nearby.receiver(own[-1][:2])
    return listed(None if made is None else statement(made), at(own[-1]))


def _in_a_checkpoint(raised: Raised) -> str | None:
    """Return the call of the reentrant checkpoint whose ``backward`` raised, or all such calls of the step."""
    entry = innermost(raised.error)
    files = {e.tb_frame.f_code.co_filename for e in entries(raised.error)}
    if entry is None or not any(file.endswith("checkpoint.py") for file in files):
        return None
    ops = raised.trace.ops
    calls = [op.around or op.place for op in ops if op.around is not None or _is_checkpoint(op)]
    return listed(*dict.fromkeys(map(at, calls)))


def _is_checkpoint(op: Op) -> bool:
    return op.wrapper is Wrapper.REENTRANT_CHECKPOINT


def all_frozen(model: nn.Module, trace: Trace | None = None) -> str:
    """Return what is to be said of a loss without a history when no parameter requires grad."""
    if next(model.parameters(), None) is None:
        return _error_words.note("no_parameters", None)
    name = None if trace is None else next(iter(trace.freezings), None)
    seen = None
    if trace is not None and name is not None:
        call = role_of("called here", at(trace.freezing_calls.get(name)))
        seen = listed(at(trace.freezings[name]), call)
    return _error_words.note("all_frozen", seen or _first_freezing(model, most=4))


def _first_freezing(model: nn.Module, most: int = 1) -> str | None:
    """Return where the text freezes something, in the class that comes first in the model; a few of such places."""
    for module in model.modules():
        if not type(module).__module__.startswith("torch."):
            statements = _statements.freezings(type(module))
            if statements:
                file = [
                    s for s in _statements.freezings_in(statements[0].file) if s not in statements
                ]
                return listed(*map(statement, [*statements, *file][:most]))
    return None


def gone_over_twice(raised: Raised) -> str | None:
    """Explain a graph that an earlier backward pass has freed."""
    inner = _in_a_backward(raised.error)
    if inner is not None:
        again = _in_a_checkpoint(raised)
        kind = "twice_in_backward" if again is None else "twice_in_checkpoint"
        return _error_words.note(kind, again or inner)
    kept = kept_in_step(raised) or carried_over(raised)
    if kept is not None:
        return _error_words.note("kept", *kept)
    passes = raised.trace.backwards
    failed = at(passes[-1].place) if passes else None
    earlier = _earlier(raised.trace)
    if earlier is not None:
        place = earlier.place
        held = None if place is None else _nearby.surrounding(place[:2], "cached")
        cache = None if held is None else role_of("kept as long as this lasts", statement(held))
        chosen = place is not None and _source.is_of_arguments(place[:2])
        call = _nearby.only_call(place.code, place[:2]) if place is not None and chosen else None
        first = role_of(
            "the earlier one", listed(None if call is None else statement(call), at(place))
        )
        shared = _shared(raised.trace, earlier, passes[-1])
        return _error_words.note("twice", listed(cache, *shared, first, failed))
    return _error_words.note("twice", failed) if passes else None


def _earlier(trace: Trace) -> Backward | None:
    """Return the last pass that went through some of what the failing one, which is the last of all, goes through."""
    if len(trace.backwards) < _EARLIER_AND_LATER:
        return None
    *before, failed = trace.backwards
    behind = history_of(trace, failed.roots)
    through = (b for b in reversed(before) if not behind.isdisjoint(history_of(trace, b.roots)))
    return next(through, before[-1])


def _shared(trace: Trace, earlier: Backward, later: Backward) -> tuple[str | None, ...]:
    """Return the last operation that two backward passes went through, if it is no root.

    And those through which each pass came to it, the earlier one first, when it can be cut off there.
    """
    first, second = history_of(trace, earlier.roots), history_of(trace, later.roots)
    common = first & second
    roots = {*earlier.roots, *later.roots}
    last = max(
        (op for op in trace.ops if not common.isdisjoint(op.outputs)),
        key=lambda op: op.index,
        default=None,
    )
    if last is None:
        return ()
    if set(earlier.roots) == set(later.roots):
        place = later.place
        named = None if place is None else _nearby.receiver(place[:2])
        once = listed(None if named is None else statement(named), at(last.place))
        return (role_of("computed once, used by both", once),)
    if not roots.isdisjoint(last.outputs):
        return (_used_again(trace, last, second),)
    foreign = _from_another_leaf(trace, common)
    if foreign is not None:
        return foreign, role_of("computed once, used by both", at(last.place))
    call = role_of("in this call", at(trace.call_around(last)))
    taken = _reader(trace, last, first - second)
    if taken is None or taken.place is None:
        return (listed(role_of("computed once, used by both", _given_to(last.place)), call),)
    named = _stores.outer_assignment(taken.place[:2])
    own = _given_to(last.place, besides=taken.place)
    once = listed(None if named is None else statement(named), own)
    # Where a helper's line is, the call of the helper before the earlier pass tells more, and the one behind it.
    helper = taken.place.code.co_name
    place = earlier.place
    calls = [] if place is None else _nearby.calls_before(place[:2], helper)
    into = trace.call_around(taken)
    ways = [
        *map(statement, calls[-1:]),
        None if into == trace.call_around(last) else _given_to(into),
        at(taken.place),
    ]
    again = _reader(trace, last, second - first)
    here = None if again is None else at(again.place)
    if again is not None and again.place is not None and again.place.code is taken.place.code:
        others = _nearby.other_calls(helper, [*calls[-1:]], None if place is None else place[:2])
        here = listed(*map(statement, others)) or here
    out = None if place is None or last.place is None else _handed_out(last.place, place, again)
    return (
        listed(role_of("computed once, used by both", once), call),
        role_of("goes into the earlier one here", listed(*ways)),
        role_of("goes on from here, used up", out),
        role_of("goes into the later one here", here),
    )


def _from_another_leaf(trace: Trace, common: set[int]) -> str | None:
    """Return where a tensor that requires grad, and is no parameter, goes into what several losses share.

    Where no parameter is behind that, nothing is to be trained through it.
    """
    ops = [op for op in trace.ops if not common.isdisjoint(op.outputs)]
    values = trace.values
    if any(values[number].parameter is not None for op in ops for number in op.inputs):
        return None
    first = next((op for op in ops if op.inputs and common.isdisjoint(op.inputs)), None)
    into = None if first is None else at(first.place)
    return role_of("a tensor that requires grad goes in here, and no parameter", into)


def _handed_out(made: _frames.Place, earlier: _frames.Place, again: Op | None) -> str | None:
    """Return the ``return`` by which a function hands out what its own backward pass has used up."""
    elsewhere = again is None or again.place is None or again.place.code is not made.code
    if made.code is not earlier.code or not elsewhere:
        return None
    found = _nearby.returned_after(made[:2], earlier[:2])
    return None if found is None else statement(found)


def _reader(trace: Trace, last: Op, behind: set[int]) -> Op | None:
    """Return the first operation that reads what another one made, and on the way to some values."""
    made = set(last.outputs)
    later = trace.ops[last.index :]
    reading = (op for op in later if not made.isdisjoint(op.inputs))
    return next((op for op in reading if not behind.isdisjoint(op.outputs)), None)


def _used_again(trace: Trace, root: Op, later: set[int]) -> str | None:
    """Return where what an earlier pass began at goes into the loss of the later one."""
    again = _reader(trace, root, later - set(root.outputs))
    return None if again is None else role_of("the earlier loss goes in here", at(again.place))


def _given_to(place: _frames.Place | None, besides: _frames.Place | None = None) -> str | None:
    """Return a place, and before it the only call of a function that computes from its arguments alone.

    Args:
        place: The place.
        besides: A place in another function, whose calls do not count.
    """
    code = None if place is None else place.code
    plain = code is not None and not code.co_freevars and code.co_varnames[:1] != ("self",)
    chosen = place is not None and (plain or _source.is_of_arguments(place[:2], given=True))
    other = None if besides is None else besides[:2]
    calls = [] if code is None or not chosen else [(code, None), (code, other)]
    call = next(filter(None, (_nearby.only_call(*asked) for asked in calls)), None)
    return listed(None if call is None else statement(call), at(place))


def without_history(kind: str) -> Find:
    """Explain a call on a tensor without a history by where that was lost."""

    def find(raised: Raised) -> str | None:
        failed = raised.failed
        if failed is None:
            return raising(kind)(raised)
        read = failed.read if raised.asked is None else raised.asked.wanted
        places = [*raised.callers_of(failed.place), failed.place]
        makers = (raised.maker_of(n) for n in read if not raised.trace.values[n].tracked)
        made = next((at(op.place) for op in makers if op is not None), None)
        numbers = (*read, *failed.read)
        cut = raised.cut_of(numbers) or frozen_behind(raised, numbers)
        return _error_words.note(kind, listed(cut, role_of("made here", made), *map(at, places)))

    return find
