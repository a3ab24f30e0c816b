"""GradWatch for the Trainer of Hugging Face's transformers: events that call a ``Watcher``, and nothing else.

What this room knows that no other does: which event of that Trainer comes when, and what it hands over. Every
judgement is the watcher's.

Limits: the Trainer clips gradients before its event for the optimizer's step, so norms are those after clipping
(``max_grad_norm=0`` turns clipping off). It tells of no exception: one that comes out of the model's own forward
is seen, one from elsewhere leaves the step's trace to the next ``train()``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from gradwatch._names import innermost
from gradwatch.config import Config, load_config
from gradwatch.report import Diagnosis, Report
from gradwatch.sinks.standard import as_folder, as_sinks
from gradwatch.watcher import Watcher

try:
    from transformers import TrainerCallback
except ImportError as error:
    message = "this callback needs the package transformers: pip install transformers accelerate"
    raise ImportError(message) from error

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from gradwatch.sinks import Sink


class GradWatchCallback(TrainerCallback):
    """Tell which parameters get no gradient, why, and at which expression of your source.

    Args:
        config: A ``Config``, a mapping, or the path of a YAML file; None for the defaults.
        log_dir: Folder for TensorBoard; None writes none.
        every_n_steps: Steps between measurements of norms; by default the Trainer's ``logging_steps``.
        for_steps: Steps without a gradient after which the rules over ``missing`` fire.
        action: What those rules then do: ``log``, ``warn``, ``stop``, or ``abort``.
        sinks: Objects with ``write(report)`` and ``close()`` that get every report too.

    Raises:
        ConfigError: The configuration cannot be used.
        TypeError: An argument is of another kind.

    Cost:
        That of ``Watcher``.

    Example:
        >>> from gradwatch.transformers import GradWatchCallback
        >>> callback = GradWatchCallback(for_steps=5)  # Trainer(..., callbacks=[callback])
        >>> callback.diagnoses
        ()
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        every_n_steps: int | None = None,
        for_steps: int | None = None,
        action: str | None = None,
        sinks: Iterable[Sink] = (),
    ) -> None:
        self.config = load_config(config).with_overrides(
            every_n_steps=every_n_steps, for_steps=for_steps, action=action
        )
        self._log_dir = log_dir if log_dir is None else as_folder(log_dir)
        self._given_sinks = as_sinks(sinks)
        self._watcher: Watcher | None = None
        self._handle: Any = None

    @property
    def report(self) -> Report:
        """The newest report."""
        return Report(step=0) if self._watcher is None else self._watcher.report

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Everything diagnosed so far, also what healed since."""
        return () if self._watcher is None else self._watcher.diagnoses

    # The events, in the order in which the Trainer tells of them -----------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Begin the run: now the optimizer exists."""
        del control
        model: nn.Module = kwargs["model"]
        self._close()
        self._watcher = Watcher(model, self.config, log_dir=self._log_dir, sinks=self._given_sinks)
        self._watcher.begin(
            [kwargs["optimizer"]],
            writes=state.is_world_process_zero,
            every_n_steps=max(int(args.logging_steps), 1),
        )
        self._handle = model.register_forward_hook(self._after_forward, always_call=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a step, of which accumulation makes one, too."""
        del args, state, control, kwargs
        if self._watcher is not None:
            self._watcher.begin_batch()
            self._watcher.before_backward()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Judge the step before the optimizer writes."""
        del args
        if self._watcher is not None:
            self._watcher.judge_unseen(innermost(kwargs["optimizer"]), step=state.global_step)
            if self._watcher.should_stop:
                control.should_training_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End a step."""
        del args, state, control, kwargs
        if self._watcher is not None:
            self._watcher.settle()
            self._watcher.end_batch()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run."""
        del args, state, control, kwargs
        self._close()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Clean up where the model raised: no event tells of that."""
        del module, args, output
        error = sys.exc_info()[1]
        if error is not None and self._watcher is not None:
            self._watcher.interrupted(error)
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._watcher is not None:
            self._watcher.close()
