"""What a backward pass was asked for, or an operation was given, that autograd refuses.

What this room knows that no other does: what torch means by the many ways to say that, and which line of the user's
made the tensor in question: a derivative that does not exist, a hook with a gradient of another shape, a loss that
is no number, a checkpoint that runs otherwise again, a tensor that is no leaf.

Limits: as in ``_raised``, where the words of torch's are.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch

from gradwatch import _error_words, _frames, _nearby, _source, _statements, _stores, _words, explain
from gradwatch._calls import Kind, Wrapper
from gradwatch._failure import (
    BY_PLACE,
    Raised,
    at,
    before_torch,
    begun_at,
    failing,
    failing_places,
    files_of,
    in_nearest_file,
    last_of_user,
    layer_made_at,
    line_at,
    line_of,
    listed,
    local_modules,
    local_owner,
    local_tensor,
    local_tensors,
    made_in_place,
    role_of,
    statement,
)
from gradwatch._histories import frozen_ones
from gradwatch._record import hooks_of, memory_of, node_of, result_of
from gradwatch._unread import ignoring_functions, passed_over
from gradwatch.report import Site, Status

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


def from_inference_mode(raised: Raised) -> str | None:
    """Explain a tensor of inference mode by the operation that made it."""
    failed = raised.failed
    made = raised.maker_of(failed.read[0]) if failed is not None and failed.read else None
    while made is not None and made.inputs and (made.grad_mode or made.kept):
        # A view of it that was made outside, or a write into it.
        made = raised.maker_of(made.inputs[0])
    if failed is None or made is None or made.grad_mode:
        modes = [s for f in files_of(raised) for s in _statements.method_calls(f, "inference_mode")]
        within = [role_of("perhaps made in there", statement(mode)) for mode in modes[:2]]
        last = before_torch(raised.error) if failed is None else failed.place
        places = listed(*within, *map(at, [*raised.callers_of(last), last]))
        return _error_words.note("inference", places)
    came = role_of("made here", at(made.place))
    places = listed(came, raised.switched_off(made), at(failed.place))
    return _error_words.note("inference", places)


def no_leaf(raised: Raised) -> str | None:
    """Explain a tensor given to an optimizer, or asked for ``.grad``, that is the result of an operation."""
    given = local_tensor(raised.error, "param")
    node = None if given is None else node_of(given)
    tag = None if node is None else node.metadata.get(raised.trace.tag)
    last = last_of_user(raised.error)
    if tag is not None:
        given_by = [] if last is None else _nearby.made_for(last[:2])
        places = listed(*map(statement, given_by), at(raised.trace.ops[tag].place))
        return _error_words.note("no_leaf", places)
    kept = [] if last is None else _stores.argument_stores(last[:2])[:1]
    made = [s for found in kept for s in _nearby.returned_by(found)]
    places = listed(
        _spoiled_leaf(raised), *map(statement, [*made, *kept]), None if last is None else at(last)
    )
    return None if places is None else _error_words.note("no_leaf", places)


def serialised_result(raised: Raised) -> str | None:
    """Explain a tensor that cannot go to another process with its history by what made it."""
    given = local_tensor(raised.error, "tensor")
    node = None if given is None else node_of(given)
    tag = None if node is None else node.metadata.get(raised.trace.tag)
    made = None if tag is None else raised.trace.ops[tag]
    values = raised.trace.values
    tracked = [] if made is None else [n for n in made.inputs if values[n].tracked]
    before = map(raised.maker_of, tracked)
    places = list(dict.fromkeys(at(op.place) for op in before if op is not None and op.place))[:1]
    if not places and made is not None and made.place is not None:  # made before this step
        kept = _stores.stores(made.place[:2])[:1]
        told = [*kept, *(s for store in kept for s in _nearby.assigned_before(store))]
        places = [role_of("kept here", statement(store)) for store in told]
    last = at(last_of_user(raised.error))
    own = None if made is None else at(made.place)
    return _error_words.note("serialised", listed(*places, role_of("made here", own), last))


def none_for_a_gradient(raised: Raised) -> str | None:
    """Explain a None that came from ``.grad``: of a result, of a copy, or of a parameter that got none."""
    for read, number in reversed(raised.trace.grad_reads):
        where = at(read)
        if read is not None and where is not None and line_of(raised.error) == line_at(read):
            maker = raised.maker_of(number)
            made = (None if maker is None else at(maker.place)) or _spoiled_leaf(raised)
            came = role_of("made here, so that it is no leaf", made)
            kept = [statement(s) for s in _stores.owner_stores(read[:2], "grad")[:1]]
            return _error_words.note("grad_of_a_result", listed(came, *kept, where))
    last = last_of_user(raised.error)
    if last is None or ".grad" not in _source.text_of(last[:2]):
        return None
    held = list(local_tensors(raised.error))
    parameters = raised.inspection.parameters
    mine = {id(p) for p in parameters.values()}
    memory = {memory_of(p): name for name, p in parameters.items()}
    copies = [memory[m] for t in held if id(t) not in mine and (m := memory_of(t)) in memory and m]
    if copies:
        return _error_words.note(
            "grad_of_a_copy", listed(_detached_last(raised, copies[0]), at(last))
        )
    without = [n for n, p in parameters.items() if p.requires_grad and p.grad is None]
    chosen = [n for n in without if any(parameters[n] is t for t in held)] or without
    found = raised.inspection.diagnose(dict.fromkeys(without, Status.MISSING), 0)
    told = [d for d in found if not set(chosen).isdisjoint(d.parameters)][:1]
    said = [explain.render(d, tuple(parameters)) for d in told]
    return "\n\n".join([_error_words.note("grad_is_none", at(last)), *said]) if said else None


def _spoiled_leaf(raised: Raised) -> str | None:
    """Return where the text computes from a tensor that was just asked to require grad, which makes it no leaf."""
    classes = dict.fromkeys(map(type, raised.model.modules()))
    found = [s for cls in classes for s in _statements.spoiled_leaves(cls)]
    return statement(found[0]) if found else None


def _detached_last(raised: Raised, name: str) -> str | None:
    """Return where a parameter was detached last."""
    trace = raised.trace
    for op in reversed(trace.ops):
        if op.kind is Kind.SEVER and any(trace.values[n].parameter == name for n in op.inputs):
            return at(op.place)
    return None


def changed_by_a_hook(raised: Raised) -> str | None:
    """Explain a gradient that a hook changed wrongly by the line that registered the hook."""
    places = set(raised.trace.hooks.values())
    if places:
        return _error_words.note("hook", at(places.pop())) if len(places) == 1 else None
    hooks = {id(h): h for p in raised.inspection.parameters.values() for h in hooks_of(p)}
    codes = [_frames.code_of(hook) for hook in hooks.values()]
    if len(codes) != 1 or codes[0] is None:
        return None
    returned = _nearby.returned(codes[0], None)
    return _error_words.note("hook_returns", listed(*map(statement, returned)))


def hook_of_a_module(raised: Raised) -> str | None:
    """Explain what a full backward hook returned by its ``return``, where the model has one alone."""
    hooks = {id(h): h for module in raised.model.modules() for h in hooks_of(module)}
    codes = dict.fromkeys(_frames.code_of(hook) for hook in hooks.values())
    code = next(iter(codes), None)
    returned = [] if code is None or len(codes) > 1 else _nearby.returned(code, None)
    return _error_words.note("hook_returns", listed(*map(statement, returned)))


def nothing_in_a_checkpoint(raised: Raised) -> str | None:
    """Explain a reentrant checkpoint without a gradient inside by what cut its input off, and its call."""
    inside = [op for op in raised.trace.ops if op.around is not None]
    cut = next((op for op in inside if op.kind is Kind.SEVER), None)
    call = next((op.around for op in [cut, *inside] if op is not None), None)
    cut_at = None if cut is None else at(cut.place)
    return _error_words.note("nothing_in_checkpoint", listed(cut_at, at(call)))


def made_and_failing(kind: str) -> Find:
    """Explain an error by what made the last of the tensors that the call which raised was given."""

    def find(raised: Raised) -> str | None:
        failed = raised.failed
        makers = [raised.maker_of(number) for number in (failed.read if failed else ())]
        made = next((at(op.place) for op in reversed(makers) if op is not None), None)
        last = before_torch(raised.error) if failed is None else failed.place
        places = [at(place) for place in (*raised.callers_of(last), last)]
        made = None if made in places else role_of("made here", made)
        return _error_words.note(kind, listed(made, *places))

    BY_PLACE[find] = kind
    return find


def inputs_in_a_reentrant_checkpoint(raised: Raised) -> str | None:
    """Explain a reentrant checkpoint by its call."""
    ops = raised.trace.ops
    own = (
        op.around or op.place
        for op in ops
        if op.around or op.wrapper is Wrapper.REENTRANT_CHECKPOINT
    )
    asked = None if raised.asked is None else at(raised.asked.place)
    return _error_words.note("reentrant_inputs", listed(at(next(own, None)), asked))


def recomputed_otherwise(raised: Raised) -> str | None:
    """Explain a checkpoint whose second run differed: by what it changes inside, and by the only call of one."""
    modules = dict(raised.model.named_modules())
    calls = {
        statement(call)
        for cls in {type(module) for module in modules.values()}
        if not cls.__module__.startswith("torch.")
        for name in ("checkpoint", "checkpoint_sequential")
        for call in _statements.calls_of(cls, name)
    }
    call = calls.pop() if len(calls) == 1 else None
    again = [type(modules[path]) for path in reversed(raised.trace.rerun) if path in modules]
    if all(cls.__module__.startswith("torch.") for cls in again):  # a function was checkpointed
        again = [type(module) for module in modules.values()]
    changes = _statements.changes_of_state(dict.fromkeys(again))
    if not changes and not raised.model.training:
        modes = [s for file in files_of(raised) for s in _statements.method_calls(file, "eval")]
        changes = modes if len(modes) == 1 else []
    change = role_of("by this the next run differs", statement(changes[0])) if changes else None
    return _error_words.note("recomputed", listed(change, call)) if change or call else None


def func_of_a_vector(raised: Raised) -> str | None:
    """Explain a function given to ``torch.func`` that returns several elements by the last thing that it did."""
    place = last_of_user(raised.error)
    last = next((op for op in reversed(raised.trace.ops) if op.place is not None), None)
    made = None if last is None else role_of("the last operation in it", at(last.place))
    return None if place is None else _error_words.note("func_of_a_vector", listed(made, at(place)))


BY_PLACE[func_of_a_vector] = "func_of_a_vector"


# Under `vmap`, in place, and on the way to NumPy ---------------------------------------------------


def random_in_vmap(raised: Raised) -> str | None:
    """Explain random numbers under ``vmap`` by its only call, or the decorator that is one."""
    maps = in_nearest_file(raised, lambda file: _statements.mentions(file, "vmap"))
    one = [role_of("the `vmap`", statement(maps[0]))] if len(maps) == 1 else []
    return _error_words.note("random_in_vmap", listed(at(last_of_user(raised.error)), *one))


def array_of_a_leaf(raised: Raised) -> str | None:
    """Explain a tensor that NumPy cannot take by the only place that lets a tensor require grad."""
    failed = raised.failed
    calls = in_nearest_file(raised, lambda f: _statements.method_calls(f, "requires_grad_"))
    of_input = failed is not None and not _has_parameters(raised, failed.read)
    asked = [statement(calls[0])] if of_input and len(calls) == 1 else []
    places = [at(place) for place in failing_places(raised)]
    kept = [] if failed is None else _collected(raised, failed.read)
    if places and not any(kept):
        filled = _stores.argument_fillings(failing_places(raised)[-1][:2])
        kept = [role_of("kept with its history", statement(s)) for s in filled[:1]]
    return _error_words.note("numpy", listed(*asked, *kept, *places)) if places else None


def _collected(raised: Raised, numbers: Iterable[int]) -> list[str | None]:
    """Return where values were put into a container, after the line that made them."""
    makers = [op for number in numbers if (op := raised.maker_of(number)) is not None]
    made = [raised.trace.outlived.get(op.index) or op.place for op in makers]
    kept = [s for place in made if place is not None for s in _stores.kept_after(place[:2])]
    return [role_of("kept with its history", statement(s)) for s in kept[:1]]


def _has_parameters(raised: Raised, numbers: Iterable[int]) -> bool:
    """Tell whether values were computed from any parameter."""
    seen, todo = set[int](), list(numbers)
    while todo:
        number = todo.pop()
        if raised.trace.values[number].parameter is not None:
            return True
        made = raised.maker_of(number)
        if number not in seen and made is not None:
            todo.extend(made.inputs)
        seen.add(number)
    return False


def leaf_in_place(raised: Raised) -> str | None:
    """Explain a leaf that is changed in place by the call, and by the layer that does so where it is one."""
    places = [at(place) for place in failing_places(raised)]
    failed = raised.failed
    target = raised.maker_of(failed.read[0]) if failed is not None and failed.read else None
    filled = (
        None if failed is None or failed.place is None else _nearby.written_into(failed.place[:2])
    )
    if target is not None and not target.inputs and filled is not None:
        return _error_words.note(
            "leaf_filled", listed(at(target.place), statement(filled), *places)
        )
    layer = local_owner(raised.error, "self")
    made = made_in_place(raised, layer)
    return _error_words.note("leaf_in_place", listed(made, *places)) if places else None


def in_place_in_vmap(raised: Raised) -> str | None:
    """Explain a write under ``vmap`` into what all samples share by what made that."""
    last = last_of_user(raised.error)
    made = None if last is None else _nearby.written_into(last[:2])
    own = None if made is None else role_of("shared by all samples", statement(made))
    return None if last is None else _error_words.note("in_place_in_vmap", listed(own, at(last)))


def no_parameter(raised: Raised) -> str | None:
    """Explain a result that is assigned to a parameter's name by the line, and by what made the module of it."""
    module = local_owner(raised.error, "self")
    known = [raised.model, *local_modules(raised.error)]
    made = next(filter(None, (layer_made_at(root, module) for root in known)), None)
    places = listed(at(last_of_user(raised.error)), role_of("its module is made here", made))
    return _error_words.note("no_parameter", places)


BY_PLACE[no_parameter] = "no_parameter"


def norm_in_vmap(raised: Raised) -> str | None:
    """Explain a layer that counts its inputs under ``vmap`` by the line that made it."""
    made = layer_made_at(raised.model, local_owner(raised.error, "self"))
    return _error_words.note("norm_in_vmap", listed(made, at(last_of_user(raised.error))))
