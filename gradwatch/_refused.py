"""Tensors and layers that autograd refuses: where they came to be what they are.

What this room knows that no other does: which line made a tensor an inference tensor, the result of an operation,
or a leaf that is written into; which hook returned something else than it was given; which checkpoint runs otherwise
again; and what `vmap` cannot run.

Limits: as in ``_raised``, where the words of torch's are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch import _error_words, _frames, _nearby, _source, _statements, _stores, explain
from gradwatch._calls import Kind, Wrapper
from gradwatch._failure import (
    BY_PLACE,
    Raised,
    at,
    before_torch,
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
from gradwatch._kept import holders_of
from gradwatch._record import hooks_of, memory_of, node_of
from gradwatch.report import Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradwatch._failure import Find


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
    held = (
        []
        if given is None
        else [k for pair in holders_of(given) for k in _statements.keepings(*pair)]
    )
    kept = held[:1] or ([] if last is None else _stores.argument_stores(last[:2])[:1])
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
