"""GradWatch for the Trainer of Hugging Face's transformers: events that call a ``Watcher``, and nothing else.

What this room knows that no other does: which event of that Trainer comes when, and what it hands over. Every
judgement is the watcher's.

Limits: the Trainer clips gradients before its event for the optimizer's step, so norms are those after clipping
(``max_grad_norm=0`` turns clipping off). It tells of no exception: one that comes out of the model's own forward
is seen at once. After one from elsewhere, in a step that is traced, the trace ends with the next call of any module.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import register_module_forward_pre_hook

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
    from types import FrameType

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
        self._handles: list[Any] = []
        self._guard: Any = None
        self._loop: int | None = None
        """The ``id`` of the frame of the loop that trains, while a step is traced."""
        self._handled: BaseException | None = None
        """What the program was about to handle when the training began."""

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
            tells=False,
        )
        self._handled = sys.exc_info()[1]
        self._handles.append(model.register_forward_hook(self._after_forward, always_call=True))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a step, of which accumulation makes one, too."""
        del args, state, control, kwargs
        if self._watcher is not None:
            self._watcher.begin_batch()
            self._watcher.before_backward()
            if self._watcher.is_tracing and self._guard is None:
                self._loop = id(_calling_loop(sys._getframe(1)))
                self._guard = register_module_forward_pre_hook(self._end_with_the_loop)

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
            if not self._watcher.is_tracing:
                self._remove_guard()

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
        if error is None or error is self._handled or self._watcher is None:
            return
        self._watcher.interrupted(error)
        self._close()

    def _end_with_the_loop(self, module: nn.Module, args: Any) -> None:
        """End the watch where a module runs outside of the loop: an exception has ended it, of which no event tells."""
        del module, args
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and id(frame) != self._loop:
            frame = frame.f_back
        if frame is None:
            self._close()

    def _remove_guard(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def _close(self) -> None:
        self._remove_guard()
        self._handled = None
        while self._handles:
            self._handles.pop().remove()
        if self._watcher is not None:
            self._watcher.close()


def _calling_loop(frame: FrameType | None) -> FrameType | None:
    """Return the frame that has told of an event, below those that hand it on."""
    while frame is not None and frame.f_globals.get("__name__") == TrainerCallback.__module__:
        frame = frame.f_back
    return frame
