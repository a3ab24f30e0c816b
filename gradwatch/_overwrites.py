"""Which of several writes in place an error of autograd's speaks of, and what is to be said of it.

What this room knows that no other does: how shapes, versions, and the names of nodes in torch's message single
out one write, among views that share a version and results that are named after what made them.

Limits: two writes that agree in all of these are told apart by their order alone.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from gradwatch import _error_words, _nearby
from gradwatch._calls import Kind
from gradwatch._failure import (
    BY_PLACE,
    Raised,
    at,
    callers_in,
    failing,
    failing_places,
    listed,
    local_owner,
    made_in_place,
    role_of,
    statement,
)
from gradwatch._kept import carried_over, kept_in_step
from gradwatch._record import hooks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gradwatch._graph import Passed
    from gradwatch._record import Op, Record, Value, Write

_EXPANDS = (".expand", ".expand_as", ".broadcast_to")


def overwritten(raised: Raised) -> str | None:
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
        where = listed(*map(at, callers_in(write.stack)), at(write.place), at(write.around))
        layer = raised.inspection.module_at(write.module)
        where = listed(where, role_of("made here", made_in_place(raised, layer)))
        return _error_words.overwritten(kind, where, write.operation, maker)
    return _written_unseen(raised, shape, found[2]) or (
        _error_words.overwritten("overwritten", at(later[0].place), later[0].operation, None)
        if later and "AccumulateGrad" not in (found[2] or "")
        else None
    )


def _written_unseen(raised: Raised, shape: tuple[int, ...], node: str | None) -> str | None:
    """Explain a tensor that something else than a call of the user's has changed."""
    trace = raised.trace
    lookup = _renormed(raised, shape)
    if lookup is not None:
        return _error_words.note("renormed", at(lookup.place))
    carried = carried_over(raised) if trace.steps else None
    if carried is not None:
        return _error_words.note("outlived", *carried)
    if trace.steps:
        return _error_words.note("optimizer_stepped", at(trace.steps[-1][0]), node)
    kept = kept_in_step(raised)
    return None if kept is None else _error_words.note("outlived", *kept)


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


def view_without_history(raised: Raised) -> str | None:
    """Explain a write into a view that was made while gradient mode was off, by the making of the view."""
    failed = raised.failed
    made = raised.maker_of(failed.read[0]) if failed is not None and failed.read else None
    while (
        made is not None and made.kind is Kind.REWRAP
    ):  # since a write into its base it wants a gradient
        made = raised.maker_of(made.inputs[0])
    if failed is None or made is None:
        return failing("view_without_history")(raised)
    view = role_of("the view", at(made.place))
    places = listed(view, raised.switched_off(made), at(failed.place))
    return _error_words.note("view_without_history", places)


def behind_a_hook(raised: Raised) -> str | None:
    """Explain a write into what a module with a full backward hook returned, by the registration of the hook."""
    codes = [
        code
        for module in raised.model.modules()
        for hook in hooks_of(module)
        if (code := getattr(hook, "__code__", None)) is not None
    ]
    found = [s for code in codes[:1] for s in _nearby.registrations(code)]
    failed = raised.failed
    wrote = None if failed is None else at(failed.place)
    layer = local_owner(raised.error, "self")
    in_place = made_in_place(raised, layer)
    wrote = role_of("changes its input in place", wrote)
    return _error_words.note("behind_a_hook", listed(*map(statement, found[:1]), in_place, wrote))


def expanded_in_place(raised: Raised) -> str | None:
    """Explain a write into expanded memory by the call; in a backward pass by what expanded it, and the writes."""
    places = [at(place) for place in failing_places(raised)]
    expanded = {n: op for op in raised.trace.ops if op.name.endswith(_EXPANDS) for n in op.outputs}
    if raised.asked is not None:
        writes = [w for w in raised.trace.writes if not expanded.keys().isdisjoint(w.before)]
        made = dict.fromkeys(
            at(expanded[n].place) for w in writes for n in w.before if n in expanded
        )
        written = (role_of("written into here", at(w.place)) for w in writes)
        places = [*made, *written, *places]
    return _error_words.note("expanded_in_place", listed(*places)) if places else None


BY_PLACE[expanded_in_place] = "expanded_in_place"


def culprit(
    writes: list[Write],
    shape: tuple[int, ...],
    node: str | None,
    versions: tuple[int, int],
    *,
    trace: Record,
    passes: Iterable[Passed],
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
        trace: The trace of the step.
        passes: What was seen of its backward passes.
    """
    values = trace.values
    passed = (each for one in passes for each in one.nodes)
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
        lambda w: _was_read(w, trace),
        lambda w: w.version == versions[0],
    ]
    likely = writes
    for holds in tests:
        likely = [w for w in likely if holds(w)] or likely
    write = next(iter(likely), None)
    return write, write in overwritten


def _has_history(value: Value) -> bool:
    return value.tracked and value.parameter is None and value.label is None


def _was_read(write: Write, trace: Record) -> bool:
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
    return node is not None and other is not None and stem(node) == stem(other)


def stem(node: str) -> str:
    """Return a node's name as torch's messages have it: `Add` for `AddBackward0`, `Clamp1` for `ClampBackward1`."""
    name, found, number = node.rpartition("Backward")
    return f"{name}{number.removeprefix('0')}" if found else node
