"""Where a tensor outlives the step in which it was made: the statement that keeps it, and what is kept there.

What this room knows that no other does: who holds a tensor. The model's attributes are asked first, then the objects
of the user's that refer to it, then the text around the lines that made and that read it.

Limits: what only a frame, a closure or a global name holds is found by the text alone.
"""

from __future__ import annotations

import functools
import gc
from collections import deque
from typing import TYPE_CHECKING, Any

from gradwatch import _error_words, _frames, _nearby, _source, _statements, _stores, _words
from gradwatch._calls import Kind
from gradwatch._failure import (
    Raised,
    at,
    begun_at,
    failing,
    history_of,
    layer_made_at,
    listed,
    role_of,
    statement,
)
from gradwatch._record import MADE, held_by, keepers_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from gradwatch._record import Op
    from gradwatch._trace import Trace
    from gradwatch.report import Site

_MOST_CONTAINERS = 5
"""Containers in containers through which an object is looked for."""
_MOST_NODES = 100_000


def outlived(error: Exception) -> _frames.Place | None:
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


def kept_anywhere(
    model: nn.Module, made: Site | None = None, read: _frames.Place | None = None
) -> tuple[str | None, str] | None:
    """Return the statement that keeps a tensor with a history on a module, and the name it has there.

    Of several that whose name stands in the function that reads it.
    """
    near = frozenset() if read is None else _source.attributes_in(read.code)
    found = [
        (name, statements)
        for cls, attribute, name in keepers_in(model)
        if not cls.__module__.startswith("torch.")
        if (statements := _statements.keepings(cls, attribute))
    ]
    found.sort(key=lambda each: each[0].rpartition(".")[2] not in near)
    for full, statements in found:
        return _story(statements, made, read), f" (`{full}`)"
    return None


def kept_in_step(raised: Raised) -> tuple[str | None, str] | None:
    """Return where a tensor of an earlier pass, which this one has read, was kept, and its name there."""
    trace = raised.trace
    for op in trace.ops:
        if op.kind is Kind.LINK and op.place is None:
            readers = (o for o in trace.ops[op.index :] if set(op.outputs) & set(o.inputs))
            kept = _kept_in(raised.model, trace, op, next(readers, None))
            if kept is not None:
                return kept
    return None


def carried_over(raised: Raised) -> tuple[str | None, str] | None:
    """Return the same of a tensor made in an earlier micro-batch of the step that was traced."""
    trace = raised.trace
    latest = trace.backwards[-1] if trace.backwards and len(trace.batches) > 1 else None
    if latest is None:
        return None
    behind = history_of(trace, latest.roots)
    begin = trace.batches[-1]
    old = behind.intersection(n for op in trace.ops[:begin] for n in op.outputs)
    for op in trace.ops[begin:]:
        carried = [] if behind.isdisjoint(op.outputs) else sorted(old.intersection(op.inputs))
        maker = raised.maker_of(carried[-1]) if carried else None
        if maker is not None and op.place is not None:
            made = _frames.site_of(maker.place)
            filled = _stores.fillings(op.place[:2])
            if filled:
                return _story(filled, made, op.place), ""
            kept = kept_anywhere(raised.model, made, op.place)
            return kept or (_story(_stores.stores(op.place[:2]), made, op.place), "")
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
                statements = _statements.keepings(type(module), name)
                if statements:
                    full = f"{path}.{name}" if path else name
                    filled = [] if read is None else _stores.fillings(read[:2])
                    kept_as = "" if filled else f" (`{full}`)"
                    dropped = [statement(s) for s in _statements.dropped(type(module), name)[:1]]
                    lost = role_of("its result is dropped", next(iter(dropped), None))
                    story = _story([*filled, *statements], made, read)
                    library = _frames.owner_of_file(statements[0].file) is not _frames.Owner.USER
                    layer = layer_made_at(model, module) if library else None
                    return listed(role_of("the layer is made here", layer), lost, story), kept_as
    for cls, attribute in () if tensor is None else holders_of(tensor):
        statements = _statements.keepings(cls, attribute)
        method = _stores.keeps_argument(statements[0]) if statements else None
        is_record = method is not None and method.name == "__init__"
        if statements and not is_record:
            giver = _stores.handed_in(statements[0])
            story = _story(statements, made, read)
            given = None if giver is None else statement(giver)
            return listed(given, story), f" (`{cls.__name__}.{attribute}`)"
    # What a decorator keeps is in no attribute.
    around = [] if made is None else _stores.keeping_decorators(made.file, made.line)
    around = around or ([] if made is None else _stores.stored_after(made.file, made.line))
    statements = around or ([] if read is None else _stores.stores(read[:2]))
    return (_story(statements, made, read), "") if statements or made or read else None


def _story(
    statements: list[_source.Statement], made: Site | None, read: _frames.Place | None
) -> str | None:
    """Return where a tensor was kept, where it was made, and where it is used again: what is known of it."""
    same = [s for s in statements if made is not None and s.line == made.line]
    kept = next((statement(s) for s in same or statements), None)
    if made is None and statements:
        before = _nearby.assigned_before(statements[0])
        kept = listed(*map(statement, before[:1]), kept)
    came = None if made is None or same else f"{_words.place(made)} (made here)"
    # What was made before anything was traced was perhaps handed in.
    giver = _stores.handed_in(statements[0]) if made is None and statements else None
    kept = listed(None if giver is None else statement(giver), kept)
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


def holders_of(tensor: Tensor) -> Iterator[tuple[type, str]]:
    """Yield the user's classes of which an object holds a tensor, and the attribute: itself, or in containers."""
    known: set[int] = {id(tensor)}
    layer: list[Any] = [tensor]
    for _ in range(_MOST_CONTAINERS):
        found = [h for h in gc.get_referrers(*layer) if id(h) not in known and h is not layer]
        layer = [h for h in found if isinstance(h, (dict, list, tuple, set, deque))]
        for holder in found:
            file = _source.file_of(type(holder))
            if file is not None and _frames.owner_of_file(file) is _frames.Owner.USER:
                layer.append(holder)
                for name, value in list(getattr(holder, "__dict__", {}).items()):
                    if id(value) in known:
                        yield type(holder), name
        known.update(map(id, layer))


def copied_whole(raised: Raised) -> str | None:
    """Explain the copy of a computed tensor by the attribute that keeps it, else by what made it."""
    kept = kept_anywhere(raised.model)
    failed = raised.failed
    pruned = _pruned(raised.model)
    if pruned is not None:
        last = None if failed is None else at(failed.place)
        return _error_words.note("copy_of_a_result", listed(pruned, last))
    if kept is None:
        return failing("copy_of_a_result")(raised)
    copied = None if failed is None else at(failed.place)
    return _error_words.note("copy_of_a_result", listed(f"{kept[0]} (kept here)", copied))


def _pruned(model: nn.Module) -> str | None:
    """Return where the text replaces parameters of torch's own layers by results, if a model has such layers."""
    if not any(cls.__module__.startswith("torch.") for cls, _, _ in keepers_in(model)):
        return None
    files = dict.fromkeys(_source.file_of(type(module)) for module in model.modules())
    found = [s for file in files if file for s in _statements.prunings(file)]
    return statement(found[0]) if found else None
