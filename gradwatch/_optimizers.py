"""What an optimizer, a GradScaler or the clipping of gradients refuses.

What this room knows that no other does: which of the parameters that they were given are the reason, and where the
text made these so: in float16, with sparse gradients, replaced since, twice, or with a gradient that is not finite.

Limits: as in ``_raised``, where the words of torch's are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gradwatch import _nearby, _source, _statements, _words, explain
from gradwatch._failure import (
    Raised,
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
from gradwatch.report import Status

if TYPE_CHECKING:
    from collections.abc import Iterable


def not_finite(raised: Raised) -> str | None:
    """Explain gradients that cannot be clipped by where they became NaN or infinite."""
    parameters = raised.inspection.parameters
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    odd = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    found = raised.inspection.diagnose(dict.fromkeys(odd, Status.NONFINITE), 0)
    said = [explain.render(diagnosis, tuple(parameters)) for diagnosis in found[:1]]
    last = at(last_of_user(raised.error))
    return "\n\n".join([_words.error_note("not_finite", last), *said]) if said else None


def unscaled_twice(raised: Raised) -> str | None:
    """Explain a second ``unscale_()`` by where the function is left without the update of the scaler."""
    last = last_of_user(raised.error)
    left = [] if last is None else _nearby.leaving_before(last[:2], "update")
    leaving = [role_of("leaves without `scaler.update()`", statement(s)) for s in left[:2]]
    return None if last is None else _words.error_note("unscaled_twice", listed(*leaving, at(last)))


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
        return "\n\n".join([_words.error_note("nothing_to_unscale", last), *said])
    loose = [name for name, p in parameters.items() if p.requires_grad and id(p) not in owned]
    modules = [part for name in loose for part in reversed(name.split(".")[:-1])]
    parts = dict.fromkeys([*modules, *(name.rpartition(".")[2] for name in loose)])
    put = in_nearest_file(raised, lambda file: _replacing(file, parts)) if loose else []
    if put:
        return _words.error_note("held_before", listed(statement(put[0]), last))
    return _words.error_note("nothing_to_unscale", last)


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
    last = at(last_of_user(raised.error))
    folded = _words.listed(explain.fold(names, tuple(parameters)))
    return _words.error_note("in_two_groups", last, folded) if names else None


def sparse_gradients(raised: Raised) -> str | None:
    """Explain sparse gradients by the layers that make them, else by the first place that asks for some."""
    layers = [layer for layer in raised.model.modules() if getattr(layer, "sparse", None) is True]
    made = [layer_made_at(raised.model, layer) for layer in layers[:1]]
    asked = [s for file in files_of(raised) for s in _statements.constants(file, "sparse", True)]
    places = [*map(statement, asked[:1]), *made] if len(asked) == 1 or not any(made) else made
    return _words.error_note("sparse", listed(*places, at(last_of_user(raised.error))))


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
        return _words.error_note("some_in_half", listed(made, last), halves[0])
    casts = in_nearest_file(raised, _statements.casts_to_half)
    cast = [statement(casts[0])] if len(casts) == 1 else []
    return _words.error_note("half_parameters", listed(*cast, at(last_of_user(raised.error))))
