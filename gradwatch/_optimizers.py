"""What an optimizer, a GradScaler or the clipping of gradients refuses.

What this room knows that no other does: which of the parameters that they were given are the reason, and where the
text made these so: in float16, with sparse gradients, replaced since, twice, or with a gradient that is not finite.

Limits: as in ``_raised``, where the words of torch's are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradwatch import _error_words, _nearby, _source, _statements, _words, explain
from gradwatch._failure import (
    Raised,
    asked_for_parameters,
    at,
    files_of,
    in_nearest_file,
    innermost,
    last_of_user,
    layer_made_at,
    listed,
    local_owner,
    role_of,
    statement,
)
from gradwatch._grouping import not_looked_into
from gradwatch._histories import frozen_ones, made_anew
from gradwatch._record import held_by, unregistered
from gradwatch.report import Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

_MADE_AND_READ = 2


def nothing_to_step(error: Exception, model: nn.Module) -> str | None:
    """Explain an optimizer without parameters: an iterator used up, all frozen, or a module that registers none."""
    used_up = _used_up(error)
    if used_up is not None:
        return _error_words.note("used_up", used_up)
    module = asked_for_parameters(error) or model
    last = at(last_of_user(error))
    if any(p.requires_grad for p in module.parameters()):
        return None
    if next(module.parameters(), None) is not None:
        said = _error_words.note("nothing_wanting", last)
        return "\n\n".join(part for part in (said, frozen_ones(module)) if part)
    found = next(unregistered(module), None)
    if found is not None:
        advice = _words.register(found.kind.__name__)
        return _error_words.note("nothing_registered", last, not_looked_into(found), advice)
    for inner in module.modules():
        for name, value in held_by(inner):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                kept = _statements.keepings(type(inner), name)[:1]
                made = [s for store in kept for s in _nearby.assigned_before(store)]
                places = listed(*map(statement, [*made, *kept]), last)
                return _error_words.note(
                    "no_parameter_made", places, f"{type(inner).__name__}.{name}"
                )
    return None


def _used_up(error: Exception) -> str | None:
    """Return where an iterator was made that an optimizer is given, where it was read before, and the call."""
    inner = innermost(error)
    given = None if inner is None else inner.tb_frame.f_locals.get("params")
    last = last_of_user(error)
    told = [] if last is None else _nearby.read_before(last[:2])
    if not isinstance(given, Iterator) or len(told) < _MADE_AND_READ:
        return None
    made, read = map(statement, told)
    return listed(made, role_of("read to its end here", read), at(last))


def not_finite(raised: Raised) -> str | None:
    """Explain gradients that cannot be clipped by where they became NaN or infinite."""
    parameters = raised.inspection.parameters
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    odd = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    found = raised.inspection.diagnose(dict.fromkeys(odd, Status.NONFINITE), 0)
    said = [explain.render(diagnosis, tuple(parameters)) for diagnosis in found[:1]]
    last = at(last_of_user(raised.error))
    return "\n\n".join([_error_words.note("not_finite", last), *said]) if said else None


def unscaled_twice(raised: Raised) -> str | None:
    """Explain a second ``unscale_()`` by where the function is left without the update of the scaler."""
    last = last_of_user(raised.error)
    left = [] if last is None else _nearby.leaving_before(last[:2], "update")
    leaving = [role_of("leaves without `scaler.update()`", statement(s)) for s in left[:2]]
    return None if last is None else _error_words.note("unscaled_twice", listed(*leaving, at(last)))


def stepped_over_nothing(raised: Raised) -> str | None:
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
        where = listed(made_anew(raised), last)
        return "\n\n".join([_error_words.note("nothing_to_unscale", where), *said])
    loose = [name for name, p in parameters.items() if p.requires_grad and id(p) not in owned]
    modules = [part for name in loose for part in reversed(name.split(".")[:-1])]
    parts = dict.fromkeys([*modules, *(name.rpartition(".")[2] for name in loose)])
    put = in_nearest_file(raised, lambda file: _replacing(file, parts)) if loose else []
    if put:
        return _error_words.note("held_before", listed(statement(put[0]), last))
    return _error_words.note("nothing_to_unscale", last)


def _replacing(file: str, parts: Iterable[str]) -> list[_source.Statement]:
    """Return where a file assigns one of some parts of a model, else where it registers parameters by name."""
    put = (_statements.reassignments(file, part) for part in parts)
    return next(filter(None, put), _statements.method_calls(file, "register_parameter"))


def in_two_groups(raised: Raised) -> str | None:
    """Explain parameters that two groups of an optimizer hold by their names."""
    held = local_owner(raised.error, "self")
    before = {id(p) for group in getattr(held, "param_groups", ()) for p in group["params"]}
    given = innermost(raised.error)
    group = {} if given is None else given.tb_frame.f_locals.get("param_group", {})
    twice = before.intersection(map(id, group.get("params", ())))
    parameters = raised.inspection.parameters
    names = tuple(name for name, p in parameters.items() if id(p) in twice)
    last = last_of_user(raised.error)
    groups = [] if last is None else _nearby.groups_of(last[:2])
    where = listed(*(role_of("one of the groups", statement(s)) for s in groups), at(last))
    folded = _words.listed(explain.fold(names, tuple(parameters)))
    return _error_words.note("in_two_groups", where, folded) if names else None


def sparse_gradients(raised: Raised) -> str | None:
    """Explain sparse gradients by the layers that make them, else by the first place that asks for some."""
    layers = [layer for layer in raised.model.modules() if getattr(layer, "sparse", None) is True]
    made = [layer_made_at(raised.model, layer) for layer in layers[:1]]
    asked = [s for file in files_of(raised) for s in _statements.constants(file, "sparse", True)]
    places = [*map(statement, asked[:1]), *made] if len(asked) == 1 or not any(made) else made
    return _error_words.note("sparse", listed(*places, at(last_of_user(raised.error))))


def dense_gradients(raised: Raised) -> str | None:
    """Explain a dense gradient that an optimizer for sparse ones is given by what else uses the parameter."""
    optimizer = local_owner(raised.error, "self")
    groups = getattr(optimizer, "param_groups", ())
    held = {
        id(p) for g in groups for p in g["params"] if p.grad is not None and not p.grad.is_sparse
    }
    dense = {name for name, p in raised.inspection.parameters.items() if id(p) in held}
    values = raised.trace.values
    uses = [
        (values[number].parameter, op.place)
        for op in raised.trace.ops
        for number in op.inputs
        if values[number].parameter in dense and op.name.rpartition(".")[2] != "embedding"
    ]
    places = listed(*dict.fromkeys(at(place) for _, place in uses), at(last_of_user(raised.error)))
    named = f"`{uses[0][0]}`" if uses else "its parameter"
    return _error_words.note("dense_gradient", places, named) if uses else None


def half_parameters(raised: Raised) -> str | None:
    """Explain a scaler over parameters in float16 by the only place that casts to it."""
    parameters = raised.inspection.parameters
    halves = [name for name, p in parameters.items() if p.dtype is torch.float16]
    if 0 < len(halves) < len(parameters):
        path, _, name = halves[0].rpartition(".")
        module = raised.model.get_submodule(path)
        own = [statement(kept) for kept in _statements.keepings(type(module), name)[:1]]
        made = listed(*own, layer_made_at(raised.model, module))
        last = at(last_of_user(raised.error))
        return _error_words.note("some_in_half", listed(made, last), halves[0])
    casts = in_nearest_file(raised, _statements.casts_to_half)
    cast = [statement(casts[0])] if len(casts) == 1 else []
    return _error_words.note("half_parameters", listed(*cast, at(last_of_user(raised.error))))
