"""What a training loop in plain PyTorch talks to: a whole watched run, and the steps in it.

What this room knows that no other does: where a step of a hand-written loop begins and ends, which of the
optimizers that step in it are meant, and what stands outside of its block. The run itself is the room below.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradwatch import _words
from gradwatch._names import as_optimizers, checked
from gradwatch._run import Run, harmless, harmless_hook
from gradwatch._schedule import Schedule
from gradwatch._trace import has_closure
from gradwatch.config import Config, load_config
from gradwatch.sinks.standard import as_folder, as_sinks

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from torch import nn

    from gradwatch.report import Diagnosis, Report
    from gradwatch.sinks import Sink

_log = logging.getLogger("gradwatch")


class Watcher(Run):
    """Watch the gradients of a model through a whole run.

    Nothing is written onto the model; hooks on optimizers are gone after the ``with`` block.

    Args:
        model: The module whose parameters are watched.
        config: A ``Config``, a mapping, or the path of a YAML file; None for the defaults.
        optimizers: Judge each step right before one of these writes; without any, at the end of
            ``step()``.
        log_dir: Folder for TensorBoard; None writes none.
        sinks: Objects with ``write(report)`` and ``close()`` that get every report too.
        every_n_steps: Steps between measurements of norms; None takes the configuration's.
        for_steps: Steps without a gradient after which the rules over ``missing`` fire.
        action: What those rules then do: ``"log"``, ``"warn"``, ``"stop"``, or ``"abort"``.
        scaler: The GradScaler, where there is one: single overflows are then no fault.

    Raises:
        ConfigError: The configuration cannot be used; on entry, that nothing can be written to ``log_dir``.
        TypeError: An argument is of another kind.

    Cost:
        On an unlogged step, passes over ``.grad`` alone: no kernel, no synchronization. On a logged one
        a fused norm and one copy to the host. A traced step (at most 10 a run) costs the
        time of three small operations for each operation, and of reading each gradient once.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> with Watcher(model, optimizers=[optimizer], every_n_steps=1) as watcher:
        ...     with watcher.step():
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        >>> watcher.report.statuses["bias"]
        <Status.OK: 'ok'>
    """

    config: Config
    report: Report
    """The newest report."""
    should_stop: bool
    """Whether a rule with ``action: stop`` has fired: a hand-written loop has to look, and end."""

    _said_outside = False
    _is_entered = False
    _in_step = False
    _waits = False
    """Whether a block was left in which no optimizer has stepped."""

    def __init__(
        self,
        model: nn.Module,
        config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        optimizers: Sequence[Any] | Any = (),
        log_dir: str | os.PathLike[str] | None = None,
        sinks: Iterable[Sink] = (),
        every_n_steps: int | None = None,
        for_steps: int | None = None,
        action: str | None = None,
        scaler: Any = None,
    ) -> None:
        if any(hasattr(given, "param_groups") for given in as_optimizers(config)):
            raise TypeError("`Watcher(config=...)`: found an optimizer, which `optimizers=` takes")
        if scaler is not None and not hasattr(scaler, "get_scale"):
            found = type(scaler).__name__
            raise TypeError(f"`Watcher(scaler=...)`: expected a GradScaler, found `{found}`")
        super().__init__(
            checked(model, "Watcher(model)"),
            load_config(config).with_overrides(
                every_n_steps=every_n_steps, for_steps=for_steps, action=action
            ),
            optimizers=_checked_optimizers(optimizers),
            log_dir=log_dir if log_dir is None else as_folder(log_dir),
            sinks=as_sinks(sinks),
            scaler=scaler,
        )

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Everything diagnosed so far, also what healed since."""
        return self._ledger.everything

    @property
    def is_tracing(self) -> bool:
        """Whether the step that runs is traced."""
        return self._inspection is not None

    def __enter__(self) -> Self:
        if self._judgement is not None:
            self._go_on()
        self._is_entered = True
        self.begin(self._optimizers)
        self._plain.callback(register_optimizer_step_pre_hook(self._before_plain_step).remove)
        self._plain.callback(register_optimizer_step_post_hook(self._after_plain_step).remove)
        return self

    def _go_on(self) -> None:
        """Take up a run that was closed, as when a notebook's cell is run again: its first step is traced."""
        self._saved = self.state_dict()
        self._off, self._stepped, self._held = False, False, None
        self._schedule = Schedule(automatic=self.config.trace == "auto")
        self._ledger.recovered.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, traceback
        try:
            if error is not None:
                self.interrupted(error)
            self.close()
        finally:
            self._is_entered = False
            self._plain.close()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surround one step of a hand-written loop: forward, any number of backwards, optimizer step.

        Raises:
            GradientAlertError: A rule with ``action: abort`` fired.
            RuntimeError: The ``with`` block of the watcher itself was not entered.
        """
        if not self._is_entered:
            raise RuntimeError("`watcher.step()` belongs inside of `with watcher:`")
        self.begin_batch()
        self.before_backward()
        self._in_step = True
        try:
            yield
        except BaseException as error:
            self.interrupted(error)
            raise
        finally:
            self._in_step = False
            self._waits = not self._stepped
        self._had_block = True
        if self._known_optimizers:
            self.settle()
        else:
            self.after_backward()
            if not self._is_idle():
                self.before_step(None)
        self.end_batch()
        if self._off:
            self._end()

    @harmless
    def _is_idle(self) -> bool:
        """Tell whether no gradient has arrived at all, nor any backward pass been seen: it was no step of training."""
        seen = self._inspection is not None and self._inspection.trace.backwards
        return not seen and self._watched.nothing_arrived()

    @harmless_hook
    def _before_plain_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not has_closure(args, kwargs):
            self._judge_in_hook(optimizer)

    @harmless_hook
    def _after_plain_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # With a closure, forward and backward ran inside of the step.
        if has_closure(args, kwargs):
            self._judge_in_hook(optimizer)

    def _judge_in_hook(self, optimizer: Any) -> None:
        if self._off and self._group is not None:
            if optimizer in self._known_optimizers:
                self._keep_company()
        elif self._is_ours(optimizer):
            if self._in_step or self._waits_for(optimizer):
                self.judge_unseen(optimizer)
            else:
                self._note_outside()

    def _waits_for(self, optimizer: Any) -> bool:
        """Tell whether an optimizer steps late: after the block whose gradients it takes."""
        return self._waits and self._written.isdisjoint(self._watched.owners.owned(optimizer))

    def _note_outside(self) -> None:
        """Say once that an optimizer has stepped where no step is watched."""
        if not self._said_outside:
            self._said_outside = True
            _log.warning(_words.OUTSIDE)

    @harmless
    def loss_terms(self, /, **terms: Any) -> None:
        """Find out which parameters each term of the loss reaches; one that reaches none is a finding.

        Args:
            terms: The terms by name, as tensors; called before ``backward()``.

        Cost:
            Nothing but in a traced step, and there one visit for each node of the terms' graphs.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(2, 1)
            >>> with Watcher(model) as watcher, watcher.step():
            ...     out = model(torch.ones(1, 2)).sum()
            ...     watcher.loss_terms(fit=out, penalty=out.detach() ** 2)
            ...     out.backward()
            >>> watcher.report.terms
            {'fit': ('weight', 'bias'), 'penalty': ()}
        """
        if self._inspection is not None:
            self._terms.learn(terms, self._inspection, meant=True)

    def state_dict(self) -> dict[str, Any]:
        """Return counters and streaks as plain values."""
        judgement, saved = self._judgement, self._saved.get("judge", {})
        judge = saved if judgement is None else judgement.rules.state_dict()
        return {"version": 1, "steps": self._steps, "batches": self._batches, "judge": judge}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up counters and streaks; called before or after ``begin()``."""
        self._saved = dict(state)
        self._steps = int(state.get("steps", 0))
        self._batches = int(state.get("batches", 0))
        if self._judgement is not None:
            self._judgement.rules.load_state_dict(self._saved.get("judge", {}))


def _checked_optimizers(given: Any) -> tuple[Any, ...]:
    """Return the optimizers that were given, or say what else was."""
    several = as_optimizers(given)
    for optimizer in several:
        if not hasattr(optimizer, "param_groups"):
            found = type(optimizer).__name__
            raise TypeError(f"`Watcher(optimizers=...)`: expected optimizers, found `{found}`")
    return several
