"""A whole watched run, as those drive it that know when things happen: adapters of trainers, and ``Watcher``.

What this room knows that no other does: the order of things in a run. When a step begins and ends, when
it is worth tracing, what was already said, and what must be gone when the run is over. It judges
nothing itself: facts come from the rooms below, thresholds from ``rules``, words from ``explain``.

A failure in here, or in anything it calls, never ends the user's run: it becomes one log record with
the traceback, and the run is watched no more. Only a rule may stop a run.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradwatch import _words, explain
from gradwatch._cost import Cost
from gradwatch._diagnose import Inspection
from gradwatch._distributed import Group, is_flattened
from gradwatch._frames import is_of_a_signal
from gradwatch._judgement import Judgement, Moment
from gradwatch._ledger import Ledger
from gradwatch._names import as_optimizers, is_compiled, names_of
from gradwatch._raised import add_note
from gradwatch._schedule import Schedule
from gradwatch._stats import is_deepspeed
from gradwatch._terms import Terms
from gradwatch._trace import has_closure
from gradwatch._watched import Watched
from gradwatch.config import Config, WatchConfig
from gradwatch.errors import DisconnectedParameterError, GradientAlertError, GradWatchError
from gradwatch.report import Action, Report, Status
from gradwatch.rules import worst
from gradwatch.sinks._outlet import Outlet
from gradwatch.sinks.console import ConsoleSink
from gradwatch.sinks.standard import standard_sinks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from gradwatch.report import Alert, Diagnosis, GradStats
    from gradwatch.rules import Judge
    from gradwatch.sinks import Sink

MIN_SECONDS = 60.0
"""A shorter run is not told what it cost: its first step, which is traced, counts too much."""
MAX_RARER = 16
"""How many times rarer norms may be measured at once, to keep a budget."""

_log = logging.getLogger("gradwatch")
_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound="Run")


def harmless(
    method: Callable[Concatenate[_S, _P], _R],
) -> Callable[Concatenate[_S, _P], _R | None]:
    """Turn a failure of ours into one log record; after one, do nothing."""
    return _guarded(method)


def _harmless_always(
    method: Callable[Concatenate[_S, _P], _R],
) -> Callable[Concatenate[_S, _P], _R | None]:
    """Turn a failure of ours into one log record; what has to be done after one is done."""
    return _guarded(method, when_off=True)


def harmless_hook(
    method: Callable[Concatenate[_S, _P], _R],
) -> Callable[Concatenate[_S, _P], _R | None]:
    """Do the same for what torch calls while it walks over its hooks, of which none may be removed."""
    return _guarded(method, when_off=True, hook=True)


def _guarded(
    method: Callable[Concatenate[_S, _P], _R], *, when_off: bool = False, hook: bool = False
) -> Callable[Concatenate[_S, _P], _R | None]:
    """Let through what is raised on purpose alone; the outermost guard counts the time, and decides."""

    @functools.wraps(method)
    def guarded(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        if self._off and not when_off:
            return None
        if self._is_guarded:
            return method(self, *args, **kwargs)
        self._is_guarded, self._in_hook = True, hook
        began = self._cost.clock()
        try:
            return method(self, *args, **kwargs)
        except GradWatchError:
            raise
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.switch_off(error)
            return None
        finally:
            self._is_guarded = self._in_hook = False
            self._cost.add(began)

    return cast("Callable[Concatenate[_S, _P], _R | None]", guarded)


class Run:
    """Watch the gradients of a model through a whole run, as an adapter tells what happens.

    Args:
        model: The module whose parameters are watched.
        config: The configuration.
        optimizers: The optimizers, where they are known already.
        log_dir: Folder for TensorBoard; None writes none.
        sinks: What gets every report too.
        scaler: The GradScaler, where there is one.
    """

    # What ``begin()`` sets.
    _clips = False
    _tells = True
    _by_hand = False
    _touched = False
    _late = False
    """Whether steps are judged after the user's hooks: the first one, and all once one has lost a gradient there."""
    _on_trial = False
    """Whether this is the first of them, which tells."""
    _due: tuple[Any, int | None] | None = None
    """The optimizer whose step is to be judged then, and its number."""
    _judged_for: Any = None
    """The optimizer whose step was judged before those hooks, until they have run."""
    _early: GradStats | None = None
    """What was measured before the user could clip."""
    _compiled = False
    _writes = True
    _group: Group | None = None
    _judgement: Judgement | None = None
    _said_raw = False
    _moved: frozenset[int] = frozenset()
    """Positions of the optimizers that have stepped."""
    _had_block = False
    """Whether any block was left without an exception."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        optimizers: tuple[Any, ...],
        log_dir: str | None,
        sinks: tuple[Sink, ...],
        scaler: Any,
    ) -> None:
        self.config = config
        self.report = Report(step=0)
        self.should_stop = False
        self._model = model
        self._cost = Cost()
        self._optimizers = optimizers
        self._log_dir = log_dir
        self._given_sinks = sinks
        self._outlet = Outlet()
        self._every = self.config.log.every_n_steps or 50
        self._ledger = Ledger()
        self._saved: Mapping[str, Any] = {}
        self._steps = 0
        self._batches = 0
        self._off = False
        self._plain = ExitStack()
        self._is_guarded = self._in_hook = False
        self._inspection: Inspection | None = None
        self._schedule = Schedule(automatic=self.config.trace == "auto")
        self._backwards = 0
        self._scaler = scaler
        self._held: tuple[Report, Any] | None = None
        self._stepped = False
        self._written: frozenset[str] = frozenset()
        self._last: tuple[int, int] | None = None
        self._terms = Terms()

    @harmless_hook
    def _before_own_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # What its closure is called for is one step, and this is another than the one before.
        self._last = None
        if not has_closure(args, kwargs):
            self._judge_own_step(optimizer)

    @harmless_hook
    def _after_own_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if has_closure(args, kwargs):
            self._judge_own_step(optimizer)

    @harmless_hook
    def _note_outside_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if not self._off:
            self._watched.note_step(optimizer)

    def _judge_own_step(self, optimizer: Any) -> None:
        """Judge a step that the trainer was not asked for, as of a raw optimizer: no adapter has told of it."""
        if self._judged_for is optimizer:
            self._judged_for = None
        elif self._is_ours(optimizer) or (self._off and optimizer in self._known_optimizers):
            self.judge_unseen(optimizer)

    @property
    def _known_optimizers(self) -> tuple[Any, ...]:
        """Those that were named, and those that were seen to step."""
        return self._optimizers if self._judgement is None else self._watched.optimizers

    def _is_ours(self, optimizer: Any) -> bool:
        return (
            not self._off
            and self._judgement is not None
            and self._watched.takes(optimizer, self._written)
        )

    # Where nothing tells when a backward pass begins and ends ------------------------------------

    def judge_unseen(self, optimizer: Any, *, step: int | None = None) -> None:
        """Judge a step by how ``.grad`` changed since the batch, or the last step in it, began.

        Args:
            optimizer: The optimizer that steps.
            step: Optimizer steps before this one; None counts them here.

        Raises:
            GradientAlertError: A rule with ``action: abort`` fired.
        """
        self.after_backward(seen=False)
        self.before_step(optimizer, step=step, seen=False)

    @harmless
    def note_raw_backward(self) -> None:
        """Say once that a backward pass came by another way than the trainer's, where the trace has seen one."""
        passes = () if self._inspection is None else self._inspection.trace.backwards
        if not self._said_raw and any(backward.accumulates for backward in passes):
            self._said_raw = True
            _log.warning(_words.RAW_BACKWARD)

    @harmless
    def known_terms(self, found: Any) -> None:
        """Do the same with what was not said to be terms: only what went into the loss is one.

        Args:
            found: What a training step returned.
        """
        if isinstance(found, Mapping) and self._inspection is not None:
            scalars = {
                str(name): value
                for name, value in found.items()
                if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
            }
            scalars.pop("loss", None)
            self._terms.learn(scalars, self._inspection, meant=False)

    def _keep_company(self) -> None:
        """After a failure of ours, tell the other ranks at their next collective that this one is off."""
        self._stepped = True
        if self._group is None:
            return
        try:
            assert self._judgement is not None  # noqa: S101 -- one that never began cannot tell
            self._judgement.apologize(self._now)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self._group = None
            _log.warning("the other ranks could not be told", exc_info=error)

    def _say_terms(self) -> None:
        """Report the terms that were learned of when the step had been judged."""
        before, self.report = self.report, self._terms.added_to(self.report)
        if self.report.alerts != before.alerts:
            self._write(self.report)
            self.report = replace(self.report, alerts=before.alerts)

    @harmless
    def settle(self) -> None:
        """Keep what accumulates for a step to come, and forget what ``zero_grad`` did after one."""
        self._watched.sensor.settle(self._written)

    # What an adapter calls, in this order -------------------------------------------------------

    @harmless
    def begin(
        self,
        optimizers: Sequence[Any],
        *,
        loggers: Iterable[Any] = (),
        writes: bool | None = None,
        every_n_steps: int = 50,
        scaler: Any = None,
        clips: bool = False,
        compiled: bool = False,
        maker: Callable[..., Any] | None = None,
        around: nn.Module | None = None,
        name: str | None = None,
        first: bool = True,
        by_hand: bool = False,
        touched: bool = False,
        tells: bool = True,
    ) -> None:
        """Begin the run, once optimizers and loggers exist.

        Args:
            optimizers: All optimizers of the run.
            loggers: Loggers of the trainer that get what their kind can show.
            writes: Whether this process is the one that prints and writes; None takes the first of a group.
            every_n_steps: Steps between measurements where the configuration does not say.
            scaler: The GradScaler of the run, where there is one.
            clips: Whether gradients are clipped between ``before_step()`` and the optimizer's own step.
            around: What the trainer has wrapped the model in: DDP, say.
            maker: The function of the user's that makes the optimizers, to say where they are made.
            compiled: Whether the whole step is compiled, which the model itself does not show.
            name: What tells the cards of this watcher from those of another one in the same run.
            first: Whether this is the one of them that writes the history.
            by_hand: Whether the user's code steps the optimizers: it may clip gradients between
                ``after_backward()`` and ``before_step()``, and step where the trainer does not see it.
            touched: Whether hooks of the user's may take gradients away between ``before_step()`` and the
                optimizer's own step. Where they do, steps are judged after it from then on.
            tells: Whether ``interrupted()`` will be called for every error of a step.
        """
        self._cost = Cost()
        self._tells = tells
        self._optimizers = as_optimizers(optimizers)
        self._scaler = scaler if scaler is not None else self._scaler
        if clips or touched:
            # Right before the step, or inside of it, where Lightning runs forward and backward as a closure.
            for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
                self._plain.callback(register(self._after_hooks).remove)
        if by_hand:
            before = register_optimizer_step_pre_hook(self._before_own_step)
            after = register_optimizer_step_post_hook(self._after_own_step)
            self._plain.callback(before.remove)
            self._plain.callback(after.remove)
        self._every = self.config.log.every_n_steps or max(every_n_steps, 1)
        self._clips, self._by_hand = clips, by_hand
        self._group = Group.of(self._model, around)
        # All ranks must judge at the same place.
        self._touched = self._late = self._on_trial = touched and self._group is None
        self._writes = writes if writes is not None else not (self._group and self._group.rank)
        if is_flattened(self._model, around):
            _log.warning(_words.FLATTENED)
            self._off = True
            return
        self._watched = Watched(
            self._model, self._optimizers, holds=self.config.watch.holds, group=self._group
        )
        if self._watched.outside and not by_hand and tells:
            hook = register_optimizer_step_pre_hook(self._note_outside_step)
            self._plain.callback(hook.remove)
        parameters = self._watched.names.parameters
        self._compiled = compiled or is_compiled(self._model)
        if self._compiled:
            # Eager kernels round otherwise and draw other dropout masks: not without need.
            self._schedule.forget()
        if self._writes:
            self._outlet.add(
                standard_sinks(
                    tuple(parameters),
                    loggers=loggers,
                    log_dir=self._log_dir,
                    jsonl=self.config.log.jsonl,
                    prefix="_".join(filter(None, [self.config.tensorboard.prefix, name])),
                    history=first,
                    scalars=self.config.tensorboard.scalars,
                )
            )
        self._outlet.add(self._given_sinks)
        if any(map(is_deepspeed, parameters.values())):
            _log.warning(_words.DEEPSPEED)
        self._judgement = Judgement(
            self._watched,
            self.config,
            ledger=self._ledger,
            schedule=self._schedule,
            terms=self._terms,
            group=self._group,
            scaler=self._scaler,
            cost=self._cost,
            maker=maker,
        )
        self._judgement.rules.load_state_dict(self._saved.get("judge", {}))
        if self._writes:
            self._say_unmatched(self._judgement.rules)

    def _say_unmatched(self, judge: Judge) -> None:
        """Say which globs of the configuration match nothing, so that they do nothing."""
        known = names_of(self._model).known()
        unmatched = self.config.watch.unmatched(known)
        scalars = self.config.tensorboard.scalars
        if not isinstance(scalars, str):
            unmatched += WatchConfig(include=scalars).unmatched(known)
        left = self._watched.names.parameters
        if known and not (unmatched or left):
            _log.warning(_words.NOTHING_LEFT)
        unmatched += judge.unmatched() if left else []
        if unmatched:
            _log.warning("no parameter matches %s of the configuration", _words.listed(unmatched))

    @harmless
    def begin_batch(self) -> None:
        """Begin a batch: trace it when there is something to find out."""
        if self._stepped:  # outside of a batch, whose end is now
            self._finish_batch()
        self._cost.begin_batch()
        self._written = frozenset()
        if self._inspection is None and self._schedule.is_due:
            self._watched.look()
            if self._compiled and not self._schedule.traces:
                _log.warning(
                    "the model is compiled, and is run without compilation for this step, to find the cause of "
                    "what is wrong: it rounds otherwise, and draws other random numbers; `trace: never` in the configuration prevents it"
                )
            names = self._watched.names
            self._inspection = Inspection(
                names.parameters, names.modules, sizes=self._schedule.begin()
            )
            self._inspection.on_error = None if self._tells else self._explain
        if self._inspection is not None and self._schedule.takes_batch():
            self._inspection.start()

    @harmless
    def before_backward(self) -> None:
        """Note that a backward pass is about to begin."""
        self._watched.sensor.before(whole=self._is_logged or self._inspection is not None)

    @harmless
    def after_backward(self, *, seen: bool = True) -> None:
        """Note that a backward pass has ended.

        Args:
            seen: Whether that is just now, and not at some time before.
        """
        self._watched.sensor.after()
        self._backwards += 1
        judgement, group = self._judgement, self._group
        if judgement is None:
            return
        if seen and self._by_hand and self._is_logged and not (group and group.sharded):
            self._early = judgement.early(self._now)
        report = None if group is None else judgement.ahead_of_ddp(self._now)
        if report is not None:
            if not self._writes:
                self._outlet.add([ConsoleSink(names=tuple(self._watched.names.parameters))])
            self._write(report)

    @property
    def _is_logged(self) -> bool:
        return (self._batches + 1) % self._every == 0

    @property
    def _now(self) -> Moment:
        return Moment(self._steps, self._batches, self._is_logged, self._inspection, self._early)

    @_harmless_always
    def before_step(self, optimizer: Any, *, step: int | None = None, seen: bool = True) -> None:
        """Judge a step, right before its optimizer writes.

        Args:
            optimizer: The optimizer that is about to step; None judges all parameters.
            step: Optimizer steps before this one; None counts them here.
            seen: Whether ``before_backward()`` will be called when the next backward pass begins.

        Raises:
            GradientAlertError: A rule with ``action: abort`` fired.
        """
        if self._off:
            self._judged_for = optimizer
            self._keep_company()
        elif self._late:
            self._due = optimizer, step
            if self._on_trial:
                self._watched.sensor.missing()
            if self._is_logged and self._judgement is not None:
                self._early = self._judgement.early(self._now)
        else:
            self._before_step(optimizer, step, seen=seen)
            self._judged_for = optimizer

    def _before_step(self, optimizer: Any, step: int | None, *, seen: bool) -> None:
        if self._judgement is None or not self._anything_ran():
            return
        watched = self._watched
        if watched.owners.changed():
            watched.look(midway=True)
        if optimizer is not None:
            watched.takes(optimizer, self._written)
            watched.note_step(optimizer)
        covered = watched.owners.covered(optimizer)
        if step is not None:
            again, self._last = self._last == (step, id(optimizer)), (step, id(optimizer))
            if again:  # LBFGS evaluates its closure many times within one step
                watched.sensor.restart(covered)
                return
            # Steps outside of `training_step` are not counted by Lightning.
            self._steps = max(step, self._steps)
        judged = self._judgement.of(covered, optimizer, self._now)
        chosen = watched.owners.chosen(optimizer)
        if seen:
            watched.sensor.restart(covered)
        else:
            watched.sensor.judged(covered, again=not self._written.isdisjoint(chosen))
        self._written = self._written | chosen if self._written else chosen
        place = watched.owners.position(optimizer)
        if place not in self._moved:
            self._moved |= {place}
        self._steps += 1
        self._stepped = True
        if judged is not None:
            self.report, is_news = judged
            if is_news:
                self._deliver(optimizer)

    def _anything_ran(self) -> bool:
        seen = self._inspection is not None and self._inspection.passes
        return bool(self._backwards or seen)

    @harmless_hook
    def _after_hooks(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if self._off:
            return
        if self._due is not None and self._due[0] is optimizer:
            self._judge_due(*self._due)
        elif self._judged_for is optimizer:
            self._judged_for = None
            if self._touched and not self._watched.sensor.is_as_told():
                self._late = True
                self._schedule.want()
        self._hand_on(optimizer)

    def _judge_due(self, optimizer: Any, step: int | None) -> None:
        """Judge a step that has waited for the user's hooks to run."""
        self._due = None
        if self._on_trial:
            self._on_trial, self._late = False, not self._watched.sensor.is_as_told()
        self._before_step(optimizer, step, seen=True)

    def _hand_on(self, optimizer: Any = None) -> None:
        """Hand on a report that has waited for its clipped norm."""
        if self._held is None or (optimizer is not None and self._held[1] is not optimizer):
            return
        (report, held), self._held = self._held, None
        if optimizer is not None and self._judgement is not None:
            report = replace(report, clipped_norm=self._judgement.clipped(held))
        self._write(report)

    @_harmless_always
    def end_batch(self) -> None:
        """End a batch: leave the trace, and write what belongs to the batch."""
        if not self._off:
            self._finish_batch()
        elif self._stepped:
            self._stepped = False
            self._batches += 1

    def _finish_batch(self) -> None:
        if self._due is not None:  # its optimizer did not step, or is another one than was said
            self._judge_due(*self._due)
        self._cost.end_batch(traced=self._inspection is not None)
        if self._terms.reached:
            self._say_terms()
        if self._inspection is not None:
            self._inspection.leave()
            if self._stepped:
                self._inspection.stop()
                self._say_unregistered(self._inspection)
                self._inspection = None
                self._schedule.end(self._written)
        self._hand_on()
        if self._stepped:
            logged = self._is_logged
            self._stepped = False  # an adapter may end a batch again
            self._early = None
            self._backwards = 0
            self._batches += 1
            self._outlet.flush()
            self._watched.end_batch()
            if logged:
                self._keep_budget()

    def _say_unregistered(self, inspection: Inspection) -> None:
        """Report parameters that the loss leads to, and that neither the model nor an optimizer knows of."""
        found = self._watched.unregistered(inspection, self._steps - 1)
        found = tuple(d for d in found if not self._ledger.orphans.issuperset(d.parameters))
        if found:
            self._ledger.add(found)
            self.report = replace(self.report, diagnoses=self._ledger.holding)
            self._outlet.write(replace(self.report, logged=False, norms={}, alerts=()))

    def _keep_budget(self) -> None:
        """Measure less often where watching takes more than its share of the time."""
        budget = self.config.budget
        share = self._cost.over(budget)
        # Ranks have to agree on when they measure, and each has another share.
        if share is not None and budget is not None and self._group is None:
            self._every *= min(max(math.ceil(share / budget), 2), MAX_RARER)
            _log.warning(_words.over_budget(share, budget, self._every))

    @_harmless_always
    def interrupted(self, error: BaseException) -> None:
        """Clean up after an exception of the user's, and add a note on its cause where one is known."""
        inspection = self._stop_inspection()
        if inspection is not None and not self._stepped:
            self._schedule.want()  # a loop that goes on is traced again: nothing was judged
        if isinstance(error, Exception) and not isinstance(error, GradWatchError):
            add_note(error, inspection, self._model, self._ledger.holding)

    def _explain(self, error: Exception) -> None:
        """Add a note to an error of a backward pass of which nobody will tell later."""
        add_note(error, self._inspection, self._model, self._ledger.holding)

    @_harmless_always
    def close(self) -> None:
        """End the run: nothing of GradWatch's is left on the model or in torch."""
        self._plain.close()
        if not self._off:
            self._hand_on()
        if not self._off:
            self._say_idle()
        if self._batches and self._writes and not self._off:
            self._say_cost()
        self._group = None
        self._end()

    def _say_idle(self) -> None:
        """Say which optimizers never stepped, so that nothing is known of their parameters."""
        if (self._backwards or self._had_block) and not self._steps:
            _log.warning(_words.NO_STEP)
        if self._judgement is None:
            return
        watched = self._watched
        stepped = (o for place, o in enumerate(watched.optimizers) if place in self._moved)
        moved = {name for optimizer in stepped for name in watched.owners.owned(optimizer)}
        told = watched.optimizers if self._steps and self._writes else ()
        for place, optimizer in enumerate(told):
            names = [name for name in watched.owners.owned(optimizer) if name not in moved]
            if place not in self._moved and names and optimizer not in watched.outside:
                folded = explain.fold(names, tuple(watched.names.parameters))
                _log.warning(_words.never_stepped(place, folded))

    def _say_cost(self) -> None:
        """Say what watching took: aloud where the run was long enough for that to mean something."""
        line = _words.cost(self._cost.own, self._cost.seconds)
        _log.info(line)
        if self._cost.seconds >= MIN_SECONDS:
            self._outlet.say(f"note: {line}")

    def _end(self) -> None:
        self._stop_inspection()
        self._off = True
        self._outlet.close()

    def _stop_inspection(self) -> Inspection | None:
        """Stop the trace for good, and return it if there was one."""
        inspection, self._inspection = self._inspection, None
        if inspection is not None:
            try:
                inspection.stop()
            except Exception as error:
                if is_of_a_signal(error):
                    inspection.stop()  # once more, as it was cut short
                    raise
                _log.warning("a trace could not be stopped", exc_info=error)
        return inspection

    # What is said of a step --------------------------------------------------------------------

    def _deliver(self, optimizer: Any) -> None:
        """Hand on the report of a step, and do what its alerts ask for."""
        report = self.report
        action = worst(report.alerts)
        if self._clips and not self._late and report.logged and action is not Action.ABORT:
            self._held = (report, optimizer)
        else:
            self._write(report)
        if action is Action.STOP:
            self.should_stop = True
        elif action is Action.ABORT:
            raise _alert_error(report, self._watched.names.parameters)

    def _write(self, report: Report) -> None:
        self.report = report
        self._outlet.write(report)

    def switch_off(self, error: Exception) -> None:
        """Watch no more after a failure of ours, of which one log record tells."""
        self._off = True
        if self._inspection is not None:
            self._inspection.trace.recording = False
        if not self._in_hook:  # torch walks over its hooks now, and none may be taken away
            self._end()
        if is_of_a_signal(error):
            raise error
        _log.warning(_words.SWITCHED_OFF, exc_info=error)


def _alert_error(report: Report, names: Iterable[str]) -> GradientAlertError:
    fatal = [alert for alert in report.alerts if alert.action is Action.ABORT]
    concerned = {name for alert in fatal for name in alert.parameters}
    diagnoses = [d for d in report.diagnoses if concerned.intersection(d.parameters)]
    said: list[Alert | Diagnosis] = [*fatal, *diagnoses]
    texts = [explain.render(part, tuple(names)) for part in said]
    # The first line is all that many a summary shows.
    headline = texts[0].partition("\n")[0].partition(": ")[2]
    disconnected = any(alert.status is Status.MISSING for alert in fatal)
    kind = DisconnectedParameterError if disconnected else GradientAlertError
    text = "\n\n".join([f"rule `{fatal[0].rule}` ended the run: {headline}", *texts])
    return kind(text, report)
