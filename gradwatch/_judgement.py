"""What one step of a run comes to: a status for each parameter, alerts, diagnoses, and whether that is news.

What this room knows that no other does: the order in which a step is judged. Facts come first, of this process or,
where several train one model, of all of them together; then what the rules say, what has healed, and what is new
and can be explained; and last whether the next step has to be traced. It decides on no threshold and makes no words.

Limits: norms, zeros and values that are not finite are known in steps that are logged or traced; in all others only
who got a gradient.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gradwatch import _words
from gradwatch._distributed import Exchange
from gradwatch._grouping import not_in_optimizer, undetermined
from gradwatch._ledger import Facts, Learned
from gradwatch._stats import is_hidden, is_searching, scale_left
from gradwatch.report import Cause, Report, Status
from gradwatch.rules import Judge, Observation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from gradwatch._cost import Cost
    from gradwatch._diagnose import Inspection
    from gradwatch._distributed import Group
    from gradwatch._ledger import Ledger
    from gradwatch._schedule import Schedule
    from gradwatch._terms import Terms
    from gradwatch._watched import Watched
    from gradwatch.config import Config
    from gradwatch.report import Alert, Diagnosis, GradStats

PATIENCE = 10
"""Steps without a gradient after which one that had come back is looked into again."""


@dataclass(slots=True)
class Moment:
    """When a step is judged, and what is known of it besides the gradients."""

    step: int
    """Optimizer steps before it."""
    batch: int
    """Batches before it."""
    logged: bool
    """Whether it is one in which norms are measured."""
    inspection: Inspection | None
    """The trace of it, where it is traced."""
    early: GradStats | None
    """What was measured of its gradients before the user could clip them."""

    def aside(self) -> AbstractContextManager[object]:
        """Surround what is computed for the judgement alone, which is no part of the user's program."""
        return nullcontext() if self.inspection is None else self.inspection.trace.paused()


class Judgement:
    """Judge the steps of one run.

    Args:
        watched: The parameters.
        config: The rules, the contract, and whether steps are traced.
        ledger: What was said so far.
        schedule: Which steps are traced.
        terms: What is known of the loss's terms.
        group: The processes that train the model together, where there are several.
        scaler: The GradScaler, where there is one.
        cost: The time that watching takes.
        maker: The function of the user's that makes the optimizers, to say where they are made.
    """

    def __init__(
        self,
        watched: Watched,
        config: Config,
        *,
        ledger: Ledger,
        schedule: Schedule,
        terms: Terms,
        group: Group | None,
        scaler: Any,
        cost: Cost,
        maker: Callable[..., Any] | None,
    ) -> None:
        names = watched.names
        self.rules = Judge(config.rules, config.contract, names.aliases, names.parameters)
        self._watched = watched
        self._config = config
        self._ledger = ledger
        self._schedule = schedule
        self._terms = terms
        self._group = group
        self._scaler = scaler
        self._cost = cost
        self._maker = maker
        self._learned = Learned()
        self._unshared: list[Diagnosis] = []
        """Diagnoses that the other processes were not told of yet."""

    # The whole of it ------------------------------------------------------------------------------

    def of(
        self, covered: tuple[str, ...], optimizer: Any, now: Moment
    ) -> tuple[Report, bool] | None:
        """Judge a step.

        Args:
            covered: The parameters that it speaks of.
            optimizer: The optimizer that is about to step; None for all parameters.
            now: When that is.

        Returns:
            The report, and whether anything in it is news; None where there is nothing to say.
        """
        sensor = self._watched.sensor
        if self._is_quiet(now) and not sensor.missing() and sensor.lagging <= self._learned.well:
            return None
        with now.aside():
            return self._of(covered, optimizer, now)

    def _is_quiet(self, now: Moment) -> bool:
        """Tell whether nothing is left to be said, counted or ended, should every gradient be there."""
        return not (
            now.logged
            or now.inspection is not None
            or self._group is not None
            or self._schedule.hunting
            or self.rules.counts
            or self._ledger.is_open
            or (self._watched.owners.known and not self._watched.knows_orphans)
        )

    def _of(
        self, covered: tuple[str, ...], optimizer: Any, now: Moment
    ) -> tuple[Report, bool] | None:
        watched, exchange = self._watched, self._exchange(now)
        measures = self._can_measure(now, exchange)
        # To read a gradient again costs as much as a tenth of its norm: where norms are taken, all are read once.
        sensor, found_now = watched.sensor, watched.sensor.gradients() if measures else None
        absent = watched.absent(found_now)
        if sensor is not watched.sensor:  # the model was looked at anew
            covered, found_now = watched.owners.covered(optimizer), None
        facts = self._facts(covered, absent, now)
        if exchange is not None:
            exchange.news = bool(self._unshared or self._unexplained(facts))
        clipped = None
        if measures:
            held = found_now if len(covered) == len(watched.names.parameters) else None
            clipped = self._measure(facts, covered, optimizer, now, exchange=exchange, found=held)
        facts.hold_emptied(self._emptied_before(covered, now))
        alerts = self.rules.observe(self._observed(facts, covered, now))
        owners = watched.owners
        healed = self._ledger.heal(covered, facts, now.step, owners.orphans)
        found = self._diagnosed(covered, facts, now)
        if exchange is not None:
            found, alerts = self._shared(exchange, found, alerts)
        elif self._group is not None:
            self._unshared += found
        self._ledger.add(found)
        self._plan(facts, now)
        alerts += self._terms.alerts(now.step)
        tells = bool(now.logged or alerts or healed or found)
        if not (tells or now.inspection is not None):
            return None
        report = Report(
            step=now.step,
            optimizer=owners.position(optimizer),
            logged=now.logged,
            statuses=facts.statuses if facts.measured else facts.complete(covered),
            norms=facts.stats.norms if now.logged else {},
            total_norm=facts.stats.total if now.logged else None,
            clipped_norm=clipped,
            aliases=watched.names.aliases,
            diagnoses=(*self._ledger.holding, *healed),
            alerts=alerts,
            batch=now.batch,
            cost=self._cost.share,
            terms=dict(self._terms.reached),
        )
        return report, tells

    def _observed(self, facts: Facts, covered: tuple[str, ...], now: Moment) -> Observation:
        """Return what the rules are to know of a step."""
        searching = bool(facts.stats.nonfinite) and is_searching(self._scaler)
        if searching:
            facts.bad = [n for n in facts.bad if facts.statuses[n] is not Status.NONFINITE]
        return Observation(
            now.step,
            covered,
            facts.missing,
            facts.frozen if now.logged or self._config.contract else (),
            facts.unseen,
            now.logged,
            facts.not_ok if now.logged else {},
            facts.stats.norms if now.logged else {},
            searching=searching,
        )

    # Facts ----------------------------------------------------------------------------------------

    def _facts(self, covered: tuple[str, ...], absent: list[str], now: Moment) -> Facts:
        """Return who got a gradient, and of whom that cannot be told.

        Args:
            covered: The parameters that the step speaks of.
            absent: Those of all parameters that have none.
            now: When it is judged.
        """
        parameters = self._watched.names.parameters
        if absent:
            chosen = frozenset(covered)
            absent = [name for name in absent if name in chosen]
        if now.inspection is not None:
            self._learned.note_taken(now.inspection.unseen)
            emptied = {n for n in now.inspection.cleared if self._wants(n)}
            absent = absent + [name for name in covered if name in emptied and name not in absent]
            if absent and not self._watched.optimizers:
                self._learned.note_by_hand(now.inspection.by_hand.intersection(absent))
        absent = absent + self._left_at_zero(covered, absent, now)
        taken = self._learned.taken
        hidden = {name for name in absent if name in taken or is_hidden(parameters[name])}
        hidden |= self._learned.used_up.intersection(covered)
        return Facts(
            missing=[name for name in absent if name not in hidden],
            frozen=lambda: self._watched.frozen(covered),
            unseen=[name for name in covered if name in hidden] if hidden else [],
        )

    def _wants(self, name: str) -> bool:
        """Tell whether a parameter that the model has wants a gradient: one that was frozen since wants none."""
        parameter = self._watched.names.parameters.get(name)
        return parameter is not None and parameter.requires_grad

    def _left_at_zero(
        self, covered: tuple[str, ...], absent: Sequence[str], now: Moment
    ) -> list[str]:
        """Return those whose gradients are zeros of ``zero_grad`` that nothing was added to."""
        lagging = self._watched.sensor.lagging
        if lagging:
            chosen = {*covered}.difference(absent)
            lagging = frozenset(e for e in lagging if e[0] in chosen and self._wants(e[0]))
        inspection = now.inspection
        if inspection is None:
            self._learned.doubt(lagging)
        whole = inspection is not None and self._schedule.saw_all
        received = inspection.received if inspection is not None and whole else None
        left = self._learned.left_at_zero(lagging, received)
        return [name for name in covered if name in left] if left else []

    def _emptied_before(self, covered: tuple[str, ...], now: Moment) -> list[str]:
        """Return those that hold the very gradients which an earlier step has emptied: zeros, as far as is known."""
        made = [d for d in self._ledger.holding if d.cause is Cause.CLEARED]
        if not made or now.inspection is not None:
            return []
        names = {name for diagnosis in made for name in diagnosis.parameters}
        names -= self._watched.sensor.renewed
        return [name for name in covered if name in names]

    def _measure(
        self,
        facts: Facts,
        covered: tuple[str, ...],
        optimizer: Any,
        now: Moment,
        *,
        exchange: Exchange | None,
        found: Sequence[Tensor | None] | None,
    ) -> float | None:
        """Take the norms; return the total after clipping, where that is known."""
        watched = self._watched
        total = exchange.total if exchange is not None and exchange.group.sharded else None
        parameters = watched.names.parameters
        if len(covered) < len(parameters):
            parameters = {name: parameters[name] for name in covered}
        orphans = watched.owners.orphans if watched.owners.known else ()
        scales = self._scales(covered, optimizer)
        facts.measure(
            parameters,
            scales,
            total=total,
            orphans=orphans,
            alike=watched.sensor.alike,
            found=found,
        )
        if not now.logged or now.early is None:
            return None
        return facts.before_clipping(now.early, parameters, watched.owners.owned(optimizer))

    def _can_measure(self, now: Moment, exchange: Exchange | None) -> bool:
        """Tell whether the norms are taken in this step: parts of gradients only together."""
        if self._group is not None and self._group.sharded:
            return exchange is not None
        return now.logged or now.inspection is not None

    def early(self, now: Moment) -> GradStats:
        """Take the norms of all gradients right after a backward pass, before the user can clip them."""
        parameters = self._watched.names.parameters
        with now.aside():
            facts = Facts([], list, [])
            facts.measure(parameters, self._scales(tuple(parameters), None))
        return facts.stats

    def clipped(self, optimizer: Any) -> float:
        """Return the total norm of an optimizer's gradients as they are now, clipped."""
        owned = self._watched.owners.owned(optimizer)
        parameters = self._watched.names.parameters
        facts = Facts([], list, [])
        facts.measure({name: parameters[name] for name in owned}, self._scales(owned, optimizer))
        return facts.stats.total

    def _scales(self, covered: tuple[str, ...], optimizer: Any) -> dict[str, float]:
        """Return what the gradients of an optimizer are still multiplied with."""
        scale = 1.0 if self._scaler is None else scale_left(self._scaler, optimizer)
        return {} if scale == 1.0 else dict.fromkeys(covered, scale)

    # What is said of them -------------------------------------------------------------------------

    def _diagnosed(
        self, covered: tuple[str, ...], facts: Facts, now: Moment
    ) -> tuple[Diagnosis, ...]:
        """Return what this step shows that is not known yet."""
        found = self._orphaned(covered, facts, now)
        open_ = {name: facts.statuses[name] for name in self._unexplained(facts)}
        if any(d.cause is Cause.NONFINITE_GRADIENT for d in self._ledger.holding):
            # The first NaN is the one to mend: it spreads through the weights to all others.
            open_ = {n: s for n, s in open_.items() if s is not Status.NONFINITE}
        if now.inspection is not None:
            late = Status.ZERO if self._schedule.is_first else None
            if not now.inspection.sizes:
                open_ = {n: status for n, status in open_.items() if status is Status.MISSING}
            # Zeros of the first step are often the start of things (LoRA's A, say): they wait.
            open_ = {n: status for n, status in open_.items() if status is not late}
            found += now.inspection.diagnose(open_, now.step)
        elif self._config.trace == "never" and open_:
            found += undetermined(open_, now.step)
        return found

    def _orphaned(
        self, covered: tuple[str, ...], facts: Facts, now: Moment
    ) -> tuple[Diagnosis, ...]:
        """Return what is to be said of parameters in no optimizer: those frozen when it was made may not be now."""
        watched = self._watched
        owners = watched.owners
        if not owners.known or not (now.logged or not watched.knows_orphans):
            return ()
        watched.knows_orphans = True
        told, chosen = self._ledger.orphans, frozenset(covered)
        wanting = [
            name
            for name in owners.orphans
            if name in chosen
            and watched.names.parameters[name].requires_grad
            and name not in told
            and self._needs_a_gradient(name)
        ]
        if not wanting:
            return ()
        statuses, strangers = facts.complete(covered), owners.strangers
        return not_in_optimizer(wanting, statuses, now.step, strangers=strangers, maker=self._maker)

    def _unexplained(self, facts: Facts) -> list[str]:
        """Return those that are bad without a diagnosis, and not just for now."""
        streaks = self.rules.streaks
        return [
            name
            for name in self._ledger.unknown(facts.bad, facts.statuses)
            if self._needs_a_gradient(name)
            # What comes and goes (a dropped layer, an expert) is said once, until it stays away.
            and not (name in self._ledger.recovered and streaks.get(name, PATIENCE) < PATIENCE)
        ]

    def _needs_a_gradient(self, name: str) -> bool:
        entry = self.rules.contract_for(name)
        return entry is None or entry.gradient == "required"

    def _plan(self, facts: Facts, now: Moment) -> None:
        """Trace the next step when something is wrong that has no diagnosis yet."""
        if self._learned.doubted:
            self._schedule.want()
            self._learned.doubted = frozenset()
        unexplained = {name: facts.statuses[name] for name in self._unexplained(facts)}
        caught = any(d.cause is Cause.NONFINITE_GRADIENT for d in self._ledger.holding)
        vain = now.inspection is not None and not self._schedule.is_first and not facts.missing
        self._schedule.plan(unexplained, caught=caught, vain=vain)

    # Several processes ----------------------------------------------------------------------------

    def _exchange(self, now: Moment) -> Exchange | None:
        """Return the collective of this step: only its number may decide whether there is one."""
        group = self._group
        if group is None or group.broken or not (now.logged or now.batch == 0):
            return None
        return Exchange(group, tuple(self._watched.names.parameters))

    def apologize(self, now: Moment) -> None:
        """After a failure of ours, tell the other processes at their next collective that this one is off."""
        exchange = self._exchange(now)
        if exchange is not None:
            exchange.apologize()

    def _shared(
        self, exchange: Exchange, found: tuple[Diagnosis, ...], alerts: tuple[Alert, ...]
    ) -> tuple[tuple[Diagnosis, ...], tuple[Alert, ...]]:
        """Return what is new in any process, and the alerts of all."""
        exchange.news = exchange.news or bool(found or alerts)
        if not exchange.finish():
            return found, alerts
        mine = {name for diagnosis in self._unshared for name in diagnosis.parameters}
        found, alerts = exchange.group.share((*self._unshared, *found), alerts)
        self._unshared = []
        return tuple(d for d in found if not mine.issuperset(d.parameters)), alerts

    def ahead_of_ddp(self, now: Moment) -> Report | None:
        """Return at once what DDP will fail over, before it does, and without asking other processes."""
        group, watched = self._group, self._watched
        if group is None or not group.needs_every_gradient() or watched.sensor.is_complete:
            return None
        latest, parameters = watched.sensor.latest, watched.names.parameters
        missing = {
            name: Status.MISSING
            for name, parameter in parameters.items()
            if parameter.requires_grad and name not in latest and not is_hidden(parameter)
        }
        new = {name: missing[name] for name in self._ledger.unknown(missing, missing)}
        group.broken = group.broken or bool(missing)
        if not new:
            return None
        with now.aside():
            found = (
                undetermined(new, now.step)
                if now.inspection is None
                else now.inspection.diagnose(new, now.step)
            )
        waits = _words.ddp_waits(group.rank, group.size)
        found = tuple(
            replace(diagnosis, notes=(*diagnosis.notes, waits), help=_words.DDP_HELP)
            for diagnosis in found
        )
        self._ledger.add(found)
        statuses = {name: missing.get(name, Status.OK) for name in parameters}
        aliases = watched.names.aliases
        return Report(step=now.step, statuses=statuses, diagnoses=found, aliases=aliases)
