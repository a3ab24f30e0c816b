"""What is known of one step's gradients, and what was said of all steps so far.

What this room knows that no other does: how the sensor's answer and the norms become one status per
parameter, which diagnoses still hold for which parameters, and when one has healed.

Limits: zeros and non-finite values are known on measured steps only, and so is their healing.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import cached_property
from itertools import repeat
from operator import attrgetter, is_
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gradwatch import _words
from gradwatch._stats import measure
from gradwatch.report import Cause, Diagnosis, GradStats, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torch import Tensor

    from gradwatch._stats import Alike

_log = logging.getLogger("gradwatch")
_BAD = frozenset({Status.MISSING, Status.ZERO, Status.NONFINITE})
_grad = attrgetter("grad")


class Facts:
    """What is known of one step's gradients."""

    def __init__(
        self, missing: list[str], frozen: Callable[[], list[str]], unseen: list[str]
    ) -> None:
        self.missing, self.unseen = missing, unseen
        self._frozen = frozen
        self.stats = GradStats({})
        self.measured = False
        self.statuses: dict[str, Status] = dict.fromkeys(missing, Status.MISSING)
        self.bad: list[str] = list(missing)

    @cached_property
    def frozen(self) -> list[str]:
        """Names of those that want no gradient: asked for only where it matters."""
        return self._frozen()

    def measure(
        self,
        parameters: Mapping[str, Tensor],
        scales: Mapping[str, float] = MappingProxyType({}),
        *,
        total: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None,
        orphans: Iterable[str] = (),
        alike: Alike | None = None,
        found: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Take the norms of the gradients that arrived.

        Those in no optimizer have none: no step uses their gradients, and none empties them.

        Args:
            parameters: The parameters by name.
            scales: What some of the gradients are multiplied with, by name.
            total: Sums values over all processes, where each holds a part of the gradients.
            orphans: Names of those in no optimizer.
            alike: What all parameters of the model have in common.
            found: The gradients of these parameters, where they are at hand.
        """
        absent = {*self.missing, *self.frozen, *self.unseen, *orphans}
        if found is None:
            found = list(map(_grad, parameters.values()))
        gradients: Mapping[str, Any] = dict(zip(parameters, found, strict=True))
        if absent or any(map(is_, found, repeat(None))):
            gradients = {
                name: gradient
                for name, gradient in gradients.items()
                if gradient is not None and name not in absent
            }
        self._take(measure(gradients, scales, total, alike), parameters)

    def hold_emptied(self, names: Collection[str]) -> None:
        """Take zeros for emptied gradients still, and what was not measured for what cannot be told.

        Args:
            names: Those whose gradients were emptied in an earlier step, and that hold the same tensors.
        """
        missing = set(self.missing)
        held = [name for name in names if name not in missing]
        if self.measured:
            zeros = [name for name in held if self.statuses.get(name) is Status.ZERO]
            self.missing += zeros
            self.statuses |= dict.fromkeys(zeros, Status.MISSING)
        else:
            self.unseen += held

    def before_clipping(
        self,
        early: GradStats | None,
        parameters: Mapping[str, Tensor],
        owned: Iterable[str],
    ) -> float | None:
        """Go back to norms that were taken before the gradients were clipped, if they were.

        Args:
            early: What was measured of all gradients right after the backward pass, if anything was.
            parameters: The parameters of this step.
            owned: Those that the optimizer holds, which alone are clipped.

        Returns:
            Their total norm after clipping; None where nothing was clipped.
        """
        norms = {n: early.norms[n] for n in self.stats.norms if n in early.norms} if early else {}
        total = math.hypot(*norms.values())
        incomplete = len(norms) < len(self.stats.norms)
        if early is None or incomplete or not _is_less(self.stats.total, total):
            return None
        clipped = math.hypot(*(self.stats.norms.get(name, 0.0) for name in owned))
        zero, nonfinite = early.zero & norms.keys(), early.nonfinite & norms.keys()
        self._take(GradStats(norms, zero, nonfinite, total), parameters)
        return clipped

    def _take(self, stats: GradStats, parameters: Iterable[str]) -> None:
        self.stats = stats
        self.measured = True
        self.statuses = self.complete(parameters)
        found = self.not_ok
        self.bad = [n for n in self.statuses if n in found and found[n] in _BAD] if found else []

    def ended(self, name: str, status: Status) -> bool:
        """Tell whether a parameter does not show a status any more, as far as this step can tell."""
        if self.measured:
            return self.statuses.get(name, status) not in {status, Status.UNSEEN}
        return status is Status.MISSING and name not in self.statuses and name not in self.unseen

    @property
    def not_ok(self) -> dict[str, Status]:
        """What is known of all that did not get a gradient of a usual size, or any at all."""
        return (
            dict.fromkeys(self.stats.zero, Status.ZERO)
            | dict.fromkeys(self.stats.nonfinite, Status.NONFINITE)
            | dict.fromkeys(self.frozen, Status.FROZEN)
            | dict.fromkeys(self.missing, Status.MISSING)
            | dict.fromkeys(self.unseen, Status.UNSEEN)
        )

    def complete(self, covered: Iterable[str]) -> dict[str, Status]:
        """Return the status of every covered parameter, in the model's order."""
        statuses = dict.fromkeys(covered, Status.OK)
        statuses.update((n, status) for n, status in self.not_ok.items() if n in statuses)
        return statuses


class Learned:
    """What traced steps have shown of gradients of which ``.grad`` alone does not tell."""

    def __init__(self) -> None:
        self.taken: frozenset[str] = frozenset()
        """Names of those whose gradients an optimizer takes away within backward."""
        self.used_up: frozenset[str] = frozenset()
        """Names of those whose gradients are gone, by the user's own hand, when a step is judged."""
        self.well: frozenset[tuple[str, int]] = frozenset()
        """Names of those whose gradients are written less often than others, and arrive, and how often they were."""
        self.doubted: frozenset[tuple[str, int]] = frozenset()
        """The same of those of which the next traced step is to tell whether a gradient arrives."""
        self._left: frozenset[tuple[str, int]] = frozenset()
        """The same of those whose gradients are zeros that were left."""

    def note_taken(self, names: Collection[str]) -> None:
        """Learn whose gradients an optimizer takes away within backward."""
        if names and not self.taken:
            _log.warning(_words.TAKEN_AWAY)
        self.taken = self.taken.union(names)

    def note_by_hand(self, names: Collection[str]) -> None:
        """Learn whose gradients the user's program uses up itself, before the step ends."""
        if names and not self.used_up:
            _log.warning(_words.BY_HAND)
        self.used_up = self.used_up.union(names)

    def left_at_zero(
        self, lagging: frozenset[tuple[str, int]], received: Collection[str] | None
    ) -> frozenset[str]:
        """Return those whose gradients are zeros of ``zero_grad`` that nothing was added to.

        Args:
            lagging: Those whose gradients were written less often than others, and how often: an expert that one
                of two passes reaches is written more often than when none does.
            received: Those that were given one in this step, where it is traced and every pass was seen.
        """
        if received is not None:
            arrived = frozenset(each for each in lagging if each[0] in received)
            self.well = (self.well - lagging) | arrived
            self._left = (self._left - lagging) | (lagging - arrived)
        return frozenset(name for name, _ in lagging & self._left)

    def doubt(self, lagging: frozenset[tuple[str, int]]) -> None:
        """Learn who may have got nothing in a step that is not traced."""
        self.doubted = lagging - self.well - self._left


def _is_less(clipped: float, total: float) -> bool:
    """Tell whether clipping made a norm less; one that is not finite makes all others NaN."""
    return clipped < total * (1 - 1e-6) or (math.isnan(clipped) and not math.isnan(total))


class Ledger:
    """Every diagnosis made, and which parameters they hold for."""

    def __init__(self) -> None:
        self._made: list[Diagnosis] = []
        self._open: dict[str, tuple[Status, int]] = {}
        self.recovered: set[str] = set()
        """Names of those that were diagnosed once and got a gradient again."""

    @property
    def everything(self) -> tuple[Diagnosis, ...]:
        return tuple(self._made)

    @property
    def orphans(self) -> frozenset[str]:
        """Names of those that are known to be in no optimizer."""
        return frozenset(filter(self._is_orphan, self._open))

    @property
    def is_open(self) -> bool:
        """Whether a diagnosis holds for any parameter."""
        return bool(self._open)

    @property
    def holding(self) -> tuple[Diagnosis, ...]:
        return tuple(d for d in self._made if d.healed_at is None)

    def unknown(self, names: Iterable[str], statuses: Mapping[str, Status]) -> list[str]:
        """Return those of the names whose status no diagnosis explains."""
        return [
            name
            for name in names
            if name not in self._open
            or not (self._open[name][0] is statuses[name] or self._is_orphan(name))
        ]

    def _is_orphan(self, name: str) -> bool:
        return self._made[self._open[name][1]].cause is Cause.NOT_IN_OPTIMIZER

    def add(self, found: Iterable[Diagnosis]) -> None:
        for diagnosis in found:
            for name in diagnosis.parameters:
                self._open[name] = (diagnosis.status, len(self._made))
            self._made.append(diagnosis)

    def heal(
        self, covered: Collection[str], facts: Facts, step: int, orphans: Collection[str]
    ) -> tuple[Diagnosis, ...]:
        """Close and return the diagnoses none of whose parameters shows its status any more."""
        over = [
            name
            for name, (status, number) in self._open.items()
            if name in covered
            and (
                name not in orphans
                if self._made[number].cause is Cause.NOT_IN_OPTIMIZER
                else facts.ended(name, status)
            )
        ]
        healed = []
        for name in over:
            _, number = self._open.pop(name)
            self.recovered.add(name)
            if all(number != other for _, other in self._open.values()):
                made = self._made[number]
                ended = made.cause is not Cause.FROZEN and set(facts.frozen).issuperset(
                    made.parameters
                )
                notes = (*made.notes, _words.FROZEN_SINCE) if ended else made.notes
                self._made[number] = replace(made, healed_at=step, notes=notes)
                healed.append(self._made[number])
        return tuple(healed)
