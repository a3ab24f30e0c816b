"""What a backward pass was asked for, or an operation was given, that autograd refuses.

What this room knows that no other does: what torch means by the many ways to say that, and which line of the user's
made the tensor in question: a derivative that does not exist or is not defined, a loss that is no number, a gradient
for a tensor that is not in the graph.

Limits: as in ``_raised``, where the words of torch's are.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch

from gradwatch import _error_words, _frames, _nearby, _source, _statements, _words
from gradwatch._calls import Kind
from gradwatch._failure import (
    Raised,
    at,
    begun_at,
    failing,
    failing_places,
    in_nearest_file,
    last_of_user,
    listed,
    role_of,
    statement,
)
from gradwatch._histories import frozen_ones
from gradwatch._record import result_of
from gradwatch._unread import ignoring_functions, passed_over
from gradwatch.report import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gradwatch._failure import Find
    from gradwatch._record import Backward, Op
    from gradwatch._trace import Trace


# Derivatives that do not exist ----------------------------------------------------------------------


def without_derivative(raised: Raised) -> str | None:
    """Explain an operation without a derivative, which torch may say only in the backward pass."""
    named = re.search(r"derivative for '?(?:aten::)?(\w+)", raised.message)
    wanted = "" if named is None else named[1].strip("_")
    ops = raised.trace.ops
    for op in reversed(ops):
        if wanted and op.name.rpartition(".")[2].strip("_") == wanted:
            return _error_words.note("no_derivative", at(op.place))
    # An inner operation of another name: the node of the graph is named after it.
    camel = wanted.replace("_", "").removesuffix("backward")
    for node in (node for passed in raised.inspection.passes for node in passed.nodes):
        name = node.name.rpartition("Backward")[0]
        if camel and node.tag >= 0 and name.lower() == camel:
            return _error_words.note("no_derivative", at(ops[node.tag].place))
    # Libraries use the same words for what has nothing to do with a derivative.
    return None if raised.failed is None else failing("no_derivative")(raised)


def not_a_number(raised: Raised) -> str | None:
    """Explain what anomaly mode found by the operation that the node was made by."""
    found = re.search(r"Function '(\w+)' returned nan", raised.message)
    name = "" if found is None else found[1]
    for passed in raised.inspection.passes:
        fine = {number for (number, _), size in passed.sizes.items() if math.isfinite(size)}
        tags = [n.tag for i, n in enumerate(passed.nodes) if n.name == name and i not in fine]
        if tags and max(tags) >= 0:
            # Backward comes to the operations in reverse.
            return _error_words.note("anomaly", at(raised.trace.ops[max(tags)].place))
    return None


def ill_defined(raised: Raised) -> str | None:
    """Explain a loss that depends on a phase by what takes the vectors apart, and by what made them."""
    found = re.match(r"(\w+)_backward", raised.message)
    wanted = "" if found is None else found[1].rpartition("_")[2]
    ops = [op for op in raised.trace.ops if op.name.rpartition(".")[2] == wanted]
    vectors = [(op, _reader_of(raised, op)) for op in ops]
    # Real and imaginary part depend on the phase; of others the last one is the first in the backward pass.
    apart = [pair for pair in vectors if pair[1] is not None and _is_part(pair[1])]
    if not vectors:
        return None
    op, reader = (apart or vectors)[-1]
    parts = None if reader is None else at(reader.place)
    return _error_words.note("ill_defined", listed(parts, role_of("made here", at(op.place))))


def _reader_of(raised: Raised, op: Op) -> Op | None:
    """Return what first reads one of the results of an operation, the real or imaginary part where there is one."""
    made = set(op.outputs)
    readers = [o for o in raised.trace.ops[op.index + 1 :] if not made.isdisjoint(o.inputs)]
    return next(filter(_is_part, readers), next(iter(readers), None))


def _is_part(op: Op) -> bool:
    return any(part in {"real", "imag"} for part in op.name.split("."))


def without_formula(raised: Raised) -> str | None:
    """Explain a custom operator that was registered without a derivative."""
    found = re.search(r"through (\w+\.\w+)", raised.message)
    wanted = "" if found is None else found[1]
    for op in reversed(raised.trace.ops):
        if wanted and wanted in op.name:
            return _error_words.note("no_formula", at(op.place))
    return None


# What backward starts from, and is asked for --------------------------------------------------------


def loss_made_by(
    kind: str,
    is_odd: Callable[[tuple[int, ...], torch.dtype], bool],
    through: frozenset[str] = frozenset(),
) -> Find:
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
            return failing(kind)(raised)
        shaped = [at(op.place) for op in reversed(made)]
        none = in_nearest_file(raised, lambda f: _statements.constants(f, "reduction", "none"))
        kept = [role_of("keeps one value for each", statement(s)) for s in none[:2]]
        places = listed(shaped[0], shaped[-1], *kept, at(asked.place))
        return _error_words.note(kind, places)

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
            made_at = {
                up: None if tags[up] is None else raised.trace.ops[tags[up]].place for up in odd
            }
            others = {place: up for up, place in made_at.items() if place != op.place}
            odd = list(others.values())
        is_through = op.name.rpartition(".")[2].strip("_") in handing_on
        node = odd[0] if is_through and len(odd) == 1 else None


def gradients_of_another_shape(raised: Raised) -> str | None:
    """Explain gradients that do not fit what is differentiated by the statement that made them, and the call."""
    places = failing_places(raised)
    made = _nearby.last_argument(places[-1][:2], "grad") if places else None
    own = None if made is None else role_of("made here", statement(made))
    return _error_words.note("grad_outputs", listed(own, *map(at, places))) if places else None


def asked_for_nothing(raised: Raised) -> str | None:
    """Explain an empty list of what to differentiate for by what made the list, and by what is frozen."""
    places = failing_places(raised)
    if not places:
        return None
    made = _nearby.last_argument(places[-1][:2], "inputs")
    own = None if made is None else role_of("made here", statement(made))
    said = [_error_words.note("asked_for_nothing", listed(own, *map(at, places)))]
    return "\n\n".join([*said, *filter(None, [frozen_ones(raised.model)])])


def in_double(raised: Raised) -> str | None:
    """Explain a backward that meets float64 by what was made of numbers, which NumPy keeps in float64.

    Of several places one is chosen only where a result on the way is in float64, and not what it was computed from.
    """
    last = last_of_user(raised.error)
    nodes = _nodes_behind(begun_at(raised.error))
    ops = {node: raised.trace.ops[tag] for node, tag in _tags(nodes, raised.trace.tag)}
    met = next((op for node, op in ops.items() if _turns_double(node)), None)
    for behind in ([] if met is None else [met], list(ops.values())):
        origins = {op.place: op for each in behind for op in _origins(raised, each)}
        made = [place for place, op in origins.items() if op.name in _FROM_NUMBERS]
        if len(made) == 1:
            came = role_of("in float64 from here on", at(made[0]))
            where = at(last) if met is None else at(met.place)
            return _error_words.note("in_double", listed(came, where))
    return None if last is None else _error_words.note("in_double", at(last))


_FROM_NUMBERS = frozenset(["torch.tensor", "torch.as_tensor", "torch.from_numpy", "torch.asarray"])


def _nodes_behind(roots: Iterable[Any]) -> list[Any]:
    """Return the nodes of a graph, those nearest the roots first."""
    found = dict.fromkeys(node for node in roots if node is not None)
    todo = list(found)
    while todo:
        above = [up for up, _ in todo.pop(0).next_functions if up is not None and up not in found]
        found.update(dict.fromkeys(above))
        todo += above
    return list(found)


def _tags(nodes: Iterable[Any], key: str) -> Iterator[tuple[Any, int]]:
    """Yield the nodes that an operation of the trace has made, with its number."""
    for node in nodes:
        tag = node.metadata.get(key)
        if tag is not None:
            yield node, tag


def _turns_double(node: Any) -> bool:
    """Tell whether a node made float64 of what is in float32."""
    results = [result_of(up) for up, _ in node.next_functions if up is not None]
    types = {made[1] for made in results if made is not None}
    own = result_of(node)
    return own is not None and own[1] is torch.float64 and types == {torch.float32}


def _origins(raised: Raised, op: Op) -> list[Op]:
    """Return the operations without an input from which the values without a history come that one reads."""
    values = raised.trace.values
    seen, todo = set[int](), [number for number in op.inputs if not values[number].tracked]
    found: list[Op] = []
    while todo:
        number = todo.pop()
        made = raised.maker_of(number)
        if number not in seen and made is not None:
            seen.add(number)
            todo += [n for n in made.inputs if not values[n].tracked]
            found += [] if made.inputs else [made]
    return found


def not_in_graph(raised: Raised) -> str | None:
    """Explain a tensor that an output was not computed from by the cut between the two, or by both ends."""
    trace = raised.trace
    if not trace.backwards:
        return failing("not_in_graph")(raised)
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
    for cut, op in raised.inspection.cuts_between(unused, asked.roots):
        if cut.site is not None:
            switch = raised.switched_off(op)
            places = listed(_words.place(cut.site), switch, at(asked.place))
            cutter = cut.operation or str(cut.cause)
            return _error_words.note("cut_before", places, cutter, named)
    leaving = _leaving(trace, unused if last is None else last.outputs)
    unread = in_nearest_file(raised, ignoring_functions)
    ignoring = role_of("reads none of its arguments", listed(*map(statement, unread)))
    places = listed(
        *(role_of("made here", at(op.place)) for op in made[:1]),
        role_of("its values leave the graph here", None if leaving is None else at(leaving.place)),
        role_of("the last that was computed from it", None if last is None else at(last.place)),
        ignoring or (None if last is None else _passed_over(trace, last)),
        *(role_of("the output", at(op.place)) for op in outputs[:1]),
        role_of("computed by this call", at(_call_behind(trace, outputs))),
        *map(at, raised.callers_of(asked.place)),
        at(asked.place),
    )
    return _error_words.note("not_in_graph", places, named)


def _call_behind(trace: Trace, outputs: Iterable[Op]) -> _frames.Place | None:
    """Return the call of a module that ran last on the way to an output, and was not made within another one."""
    todo, seen = [op.index for op in outputs], set[int]()
    while todo:
        number = max(todo)
        todo.remove(number)
        op = trace.ops[number]
        call = trace.call_around(op)
        if call is not None:
            return call
        makers = (trace.values[n].producer for n in op.inputs)
        todo += [maker for maker in makers if maker is not None and maker not in seen]
        seen.update(todo)
    return None


def _passed_over(trace: Trace, last: Op) -> str | None:
    """Return an argument that the function which ran next reads under conditions alone, or not at all."""
    own = None if last.place is None else last.place.code
    places = (op.place for op in trace.ops[last.index + 1 :] if op.place is not None)
    code = next((place.code for place in places if place.code is not own), None)
    found = None if code is None else passed_over(code)
    if found is None:
        return None
    name, reading = found
    site = Site(reading.file, reading.line, source=_source.line_at(reading.file, reading.line))
    return role_of(_words.read_if(name, reading.method, reading.conditions), _words.place(site))


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


def _leaving(trace: Trace, numbers: Iterable[int]) -> Op | None:
    """Return what takes one of some values out of the graph, or out of torch."""
    out, made = {Kind.SEVER, Kind.EXIT}, set(numbers)
    readers = (op for op in trace.ops if not made.isdisjoint(op.inputs))
    return next((op for op in readers if op.kind in out), None)


def number_for_a_loss(raised: Raised) -> str | None:
    """Explain a loss that is a number by the call that took it out of torch."""
    leaving = [op for op in raised.trace.ops if op.kind is Kind.EXIT and not _is_truth(op)]
    return _error_words.note("number", at(leaving[-1].place)) if leaving else None


def _is_truth(op: Op) -> bool:
    return op.name.endswith("__bool__")
