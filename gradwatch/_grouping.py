"""Findings, one for a parameter each, joined into diagnoses: one per cause and place.

What this room knows that no other does: which parameters share a diagnosis, which of their notes it keeps, and
which diagnosis comes first. Those that need no trace are made here too: parameters that no optimizer steps or
no module registers, and steps that were not traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradwatch import _frames, _words, explain
from gradwatch._record import Unregistered, unregistered
from gradwatch._statements import (
    keepings,
)
from gradwatch.report import Cause, Diagnosis, Severity, Site, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

NO_OTHER_USE = "no other use"
"""Stands for a note whose words depend on how many parameters are grouped."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found for one parameter, before parameters are grouped."""

    cause: Cause
    site: Site | None = None
    operation: str | None = None
    notes: tuple[str, ...] = ()


def not_in_optimizer(
    names: Iterable[str],
    statuses: Mapping[str, Status],
    step: int,
    *,
    strangers: int = 0,
    maker: Any = None,
) -> tuple[Diagnosis, ...]:
    """Return the diagnosis of parameters that no optimizer steps, if there are any.

    Args:
        names: Those parameters.
        statuses: The status of each.
        step: Number of the step.
        strangers: Tensors like these that the optimizers hold, and that the model does not have.
        maker: The function of the user's that makes the optimizers, where it is known.
    """
    notes = []
    if strangers:
        notes.append(_words.strangers(strangers))
    code = getattr(maker, "__code__", None)
    if code is not None and _frames.owner(code) is _frames.Owner.USER:
        site = Site(code.co_filename, code.co_firstlineno)
        notes.append(_words.made_in(code.co_name, site))
    findings = {name: Finding(Cause.NOT_IN_OPTIMIZER, notes=tuple(notes)) for name in names}
    return grouped(findings, statuses, step, {}, tuple(statuses))


def not_registered(
    model: nn.Module, chosen: Callable[[Tensor], bool], step: int
) -> tuple[Diagnosis, ...]:
    """Return a diagnosis for each attribute that keeps parameters out of the sight of ``parameters()``.

    Args:
        model: The model.
        chosen: Whether a parameter is meant, of those that the model does not register.
        step: Number of the step.
    """
    held: dict[tuple[type, str], list[Unregistered]] = {}
    for found in unregistered(model):
        if chosen(found.parameter):
            held.setdefault((found.holder, found.attribute), []).append(found)
    return tuple(
        Diagnosis(
            severity=Severity.WARNING,
            cause=Cause.NOT_IN_OPTIMIZER,
            status=Status.OK,
            parameters=tuple(found.path for found in several),
            notes=(not_looked_into(several[0]),),
            help=_words.register(several[0].kind.__name__),
            step=step,
        )
        for several in held.values()
    )


def not_looked_into(found: Unregistered) -> str:
    """Say which attribute hides a parameter from ``parameters()``, and where it is set."""
    kept = keepings(found.holder, found.attribute)
    site = Site(kept[0].file, kept[0].line, source=kept[0].text) if kept else None
    return _words.not_registered(f"{found.holder.__name__}.{found.attribute}", site)


def undetermined(statuses: Mapping[str, Status], step: int) -> tuple[Diagnosis, ...]:
    """Return the diagnosis of parameters in a step that was not traced.

    Args:
        statuses: The parameters and their statuses.
        step: Number of the step.
    """
    named = {Status.ZERO: Cause.ZERO_GRADIENT, Status.NONFINITE: Cause.NONFINITE_GRADIENT}
    findings = {
        name: Finding(named.get(status, Cause.UNDETERMINED), notes=(_words.NOT_TRACED,))
        for name, status in statuses.items()
    }
    return grouped(findings, statuses, step, {}, tuple(statuses))


def _grouped_at(found: Finding) -> tuple[object, ...] | None:
    """Return the place that parameters have to share: of a library that runs without gradients, the user's call."""
    site = found.site
    if site is not None and site.caller is not None and found.cause is Cause.NO_GRAD:
        site = site.caller
    return None if site is None else (site.file, site.line, site.column, site.end_column)


def grouped(
    findings: Mapping[str, Finding],
    statuses: Mapping[str, Status],
    step: int,
    sizes: Mapping[str, int],
    all_names: tuple[str, ...] = (),
) -> tuple[Diagnosis, ...]:
    """Join what was found into one diagnosis per cause and site.

    Args:
        findings: What was found, by parameter.
        statuses: The status of each parameter.
        step: Number of the step.
        sizes: Elements of each parameter: the diagnosis that costs most comes first.
        all_names: All parameter names of the model.
    """
    groups: dict[object, list[str]] = {}
    for name, found in findings.items():
        groups.setdefault((found.cause, _grouped_at(found)), []).append(name)
    made = []
    for names in groups.values():
        found = findings[names[0]]
        notes = tuple(
            _words.no_other_use(len(names)) if note == NO_OTHER_USE else note
            for note in dict.fromkeys(note for name in names for note in findings[name].notes)
        )
        made.append(
            Diagnosis(
                severity=Severity.NOTE if found.cause is Cause.ZERO_GRADIENT else Severity.WARNING,
                cause=found.cause,
                status=statuses[names[0]],
                parameters=tuple(names),
                site=found.site,
                operation=found.operation,
                notes=notes[:4],
                help=_words.COMPUTE_ANEW
                if _words.COMPUTED_EARLIER in found.notes
                else explain.help_for(found.cause, found.operation, names, found.site, all_names),
                step=step,
            )
        )
    cost = {id(d): sum(sizes.get(name, 0) for name in d.parameters) for d in made}
    made.sort(key=lambda d: (d.severity is Severity.NOTE, -cost[id(d)], d.parameters))
    return tuple(made)
