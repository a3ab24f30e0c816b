"""One record per batch: what several optimizers reported in it, merged and counted.

TensorBoard and the loggers need steps that strictly increase, so the reports of one batch are held back
until the next batch begins or ``flush`` is called. Counters are cumulative from the first report that a
sink saw: a resumed run counts anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.report import Diagnosis, Report, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FLOOR = -12.0
"""The log10 that stands for a norm of zero and for all that is smaller."""


@dataclass(slots=True)
class Totals:
    """Counters that only go up: a burst between two logged points stays visible."""

    nonfinite_steps: int = 0
    """Optimizer steps with NaN or infinity in any gradient."""
    alerts: int = 0
    """Rules that fired."""

    def add(self, report: Report) -> None:
        """Count one report."""
        self.alerts += len(report.alerts)
        self.nonfinite_steps += Status.NONFINITE in report.statuses.values()


@dataclass(frozen=True, slots=True)
class Record:
    """What is worth writing of one batch."""

    report: Report
    """The reports of the batch, merged."""
    values: dict[str, float]
    """The summary, with the counters as of this batch."""


class Batches:
    """Hold the reports of the current batch, and hand out what is worth writing."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._pending: list[Report] = []
        self._written: int | None = None
        self._known: frozenset[Diagnosis] = frozenset()

    def add(self, report: Report) -> Record | None:
        """Take one report; return the record of the batch before, when this one begins a new batch."""
        done = None
        if self._pending and self._pending[0].batch != report.batch:
            done = self.take()
        self._totals.add(report)
        self._pending.append(report)
        return done

    def take(self) -> Record | None:
        """Return the record of the current batch, or None when nothing in it is worth writing.

        It is worth writing when norms were measured, a rule fired, or the diagnoses are others than before.
        A batch that was handed out before is not handed out again: a step is written once.
        """
        pending, self._pending = self._pending, []
        if not pending or pending[0].batch == self._written:
            return None
        report = merged(pending)
        known = frozenset(report.diagnoses)
        if not (report.logged or report.alerts or known != self._known):
            return None
        self._written, self._known = report.batch, known
        return Record(report, summary(report, self._totals))


def merged(reports: Sequence[Report]) -> Report:
    """Return one report that says what several of the same batch say.

    Of two statuses or norms of one parameter the worse counts, of two diagnoses of the same thing the later.
    """
    if len(reports) == 1:
        return reports[0]
    statuses: dict[str, Status] = {}
    norms: dict[str, float] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for report in reports:
        for name, status in report.statuses.items():
            statuses[name] = max(status, statuses.get(name, status), key=lambda entry: entry.code)
        for name, norm in report.norms.items():
            norms[name] = _worse(norm, norms.get(name, norm))
        aliases |= report.aliases
    diagnoses = {
        (entry.cause, entry.site, entry.parameters): entry
        for report in reports
        for entry in report.diagnoses
    }
    return replace(
        reports[-1],
        logged=any(report.logged for report in reports),
        statuses=statuses,
        norms=norms,
        aliases=aliases,
        total_norm=_joint((report.optimizer, report.total_norm) for report in reports),
        clipped_norm=_joint((report.optimizer, report.clipped_norm) for report in reports),
        diagnoses=tuple(diagnoses.values()),
        alerts=tuple(alert for report in reports for alert in report.alerts),
    )


def summary(report: Report, totals: Totals) -> dict[str, float]:
    """Return the few numbers that say how a batch went: counts, cumulative counters, and log10 norms.

    Norms and zeros are left out where they were not measured, and nothing is ever NaN or infinite.

    Args:
        report: The record of one batch.
        totals: The counters so far.
    """
    statuses = list(report.statuses.values())
    if statuses.count(Status.OK) == len(statuses):
        statuses = []  # to count those that are the same is quick, others are compared as text
    values: dict[str, float] = {
        "alerts_total": totals.alerts,
        "findings": sum(entry.healed_at is None for entry in report.diagnoses),
        "nonfinite_steps_total": totals.nonfinite_steps,
        "params_frozen": statuses.count(Status.FROZEN),
        "params_missing": statuses.count(Status.MISSING),
    }
    if report.cost is not None:
        values["cost_percent"] = 100 * report.cost
    if report.logged:
        values["params_zero"] = statuses.count(Status.ZERO)
        values |= _norm_band(report)
    return dict(sorted(values.items()))


def log10(norm: float | None) -> float | None:
    """Return the log10 of a norm, at least ``FLOOR``; None for NaN, infinity, and no norm at all."""
    if norm is None or not math.isfinite(norm):
        return None
    return _log(norm)


def _log(norm: float) -> float:
    return max(FLOOR, math.log10(norm)) if norm > 0 else FLOOR


def _norm_band(report: Report) -> dict[str, float]:
    norms = np.fromiter(report.norms.values(), np.float64, len(report.norms))
    norms = norms[np.isfinite(norms)]
    band = {
        "norm_log10_clipped": log10(report.clipped_norm),
        "norm_log10_total": log10(report.total_norm),
    }
    if len(norms):
        low, high = (len(norms) - 1) // 2, len(norms) // 2
        parted = np.partition(norms, [low, high])  # three logarithms are enough, and no sorting
        band["norm_log10_max"] = _log(float(parted[high:].max()))
        band["norm_log10_median"] = sum(map(_log, parted[[low, high]].tolist())) / 2
        band["norm_log10_min"] = _log(float(parted[: low + 1].min()))
    return {name: value for name, value in band.items() if value is not None}


def _worse(one: float, other: float) -> float:
    return one if math.isnan(one) or one > other else other


def _joint(norms: Iterable[tuple[int, float | None]]) -> float | None:
    """Return the norm over several optimizers; of one that stepped twice the larger counts."""
    largest: dict[int, float] = {}
    for optimizer, norm in norms:
        if norm is not None:
            largest[optimizer] = _worse(norm, largest.get(optimizer, norm))
    return math.hypot(*largest.values()) if largest else None
