"""GradWatch for Lightning: hooks that call a ``Watcher``, and nothing else.

What this room knows that no other does: Lightning. Which hook comes when, that it must work with the
``Trainer`` of ``pytorch_lightning`` and of ``lightning.pytorch`` alike, and what of ours goes into a
checkpoint. Every judgement is the watcher's.

Limits: with ``loss.backward()`` in place of ``self.manual_backward()`` Lightning runs no hook; the step is
then judged by how ``.grad`` changed since the batch began, and zeros that ``zero_grad(set_to_none=False)``
left in it count as a gradient.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import weakref
from collections.abc import Iterable, Mapping  # noqa: TC003 -- jsonargparse reads the annotations
from pathlib import Path  # noqa: TC003 -- jsonargparse reads the annotations
from typing import TYPE_CHECKING, Any, TypeVar, cast

from gradwatch import _words
from gradwatch.config import Config, load_config
from gradwatch.errors import GradWatchError
from gradwatch.report import Diagnosis, Report
from gradwatch.sinks import Sink  # noqa: TC001 -- jsonargparse reads the annotations
from gradwatch.sinks.standard import as_sinks
from gradwatch.watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytorch_lightning import Callback, LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

    _Bases = Callback
    _Hook = TypeVar("_Hook", bound=Callable[..., None])
else:
    # NOTE [Two namespaces] `pytorch_lightning` and `lightning.pytorch` are two copies of the same
    # classes. With both as bases, one class is a callback to either Trainer and either LightningCLI.
    def _callbacks() -> tuple[type, ...]:
        found = []
        names = ("pytorch_lightning", "lightning.pytorch")
        for name in sorted(names, key=lambda name: name not in sys.modules):
            try:
                found.append(importlib.import_module(name).Callback)
            except ImportError:
                continue
            if len(found) == 1:
                # Whichever copy is imported last takes Lightning's log over: the user's keeps it.
                rank_zero = importlib.import_module("lightning_utilities.core.rank_zero")
                log = rank_zero.log
        if found:
            rank_zero.log = log
        if not found:
            message = (
                "GradWatch needs pytorch-lightning or lightning: pip install pytorch-lightning"
            )
            raise ImportError(message)
        return tuple(dict.fromkeys(found))

    _Bases = type("_Bases", _callbacks(), {})


_log = logging.getLogger("gradwatch")


def _harmless(hook: _Hook) -> _Hook:
    """Let a failure of ours end no run: what is raised on purpose comes through alone."""

    @functools.wraps(hook)
    def guarded(self: GradWatch, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        try:
            hook(self, trainer, pl_module, *args, **kwargs)
        except GradWatchError:
            raise
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self._fail(error)

    return cast("_Hook", guarded)


def _has_late_hooks(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Tell whether hooks of the user's run between ours and the optimizer's own step."""
    others = [c for c in getattr(trainer, "callbacks", ()) if not isinstance(c, GradWatch)]
    hooks = [
        pl_module.configure_gradient_clipping,
        *(owner.on_before_optimizer_step for owner in (pl_module, *others)),
    ]
    homes = {hook.__module__.partition(".")[0] for hook in hooks}
    return not homes <= {"pytorch_lightning", "lightning"}


class GradWatch(_Bases):
    """Tell which parameters get no gradient, why, and at which expression of your source.

    A diagnosis is printed the first time it is found, every parameter's status and norm go to the
    Trainer's loggers, and the rules of the configuration warn, stop, or abort.

    Args:
        config: Configuration: a ``Config``, or the path of a YAML file. Without one, a diagnosis is
            printed the first time it is found, ``disconnected`` warns at 10 steps, and nothing stops
            the run. (In code, a mapping with the same keys works too.)
        name: Name that tells several of these callbacks in one Trainer apart.
        every_n_steps: Steps between measurements of norms, in place of the configuration's; by default
            the Trainer's ``log_every_n_steps``.
        for_steps: Steps without a gradient after which the rules over ``missing`` fire, in place of the
            configuration's.
        action: What these rules then do: ``log``, ``warn``, ``stop``, or ``abort``.
        sinks: Objects with ``write(report)`` and ``close()`` that get every report too.

    Raises:
        ConfigError: The configuration cannot be used; the message shows every mistake with its place.
        TypeError: A sink has no ``write`` or no ``close``, or the name is no string.

    Cost:
        On a step that is not logged, two passes over ``.grad``: no kernel, no synchronization. On a
        logged step a fused norm and one copy to the host.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[GradWatch(for_steps=5)], logger=False, max_epochs=1)
    """

    def __init__(
        self,
        config: Config | str | Path | None = None,
        *,
        name: str | None = None,
        every_n_steps: int | None = None,
        for_steps: int | None = None,
        action: str | None = None,
        sinks: Iterable[Sink] = (),
    ) -> None:
        super().__init__()
        self.config = load_config(config).with_overrides(
            every_n_steps=every_n_steps, for_steps=for_steps, action=action
        )
        given: Any = name
        if not isinstance(given, (str, type(None))):
            found = type(given).__name__
            raise TypeError(f"`GradWatch(name=...)`: expected a string, found `{found}`")
        self._name = name
        self._given_sinks = as_sinks(sinks)
        self._state: Mapping[str, Any] = {}
        self._watcher: Watcher | None = None
        self._run: tuple[weakref.ref[Any], ...] = ()
        """The trainer and the model that were watched last."""
        self._saw_backward = False

    @property
    def report(self) -> Report:
        """The newest report."""
        return Report(step=0) if self._watcher is None else self._watcher.report

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Everything diagnosed so far, also what healed since."""
        return () if self._watcher is None else self._watcher.diagnoses

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return "GradWatch" if self._name is None else f"GradWatch:{self._name}"

    def state_dict(self) -> dict[str, Any]:
        """Return counters and streaks as plain values, for a checkpoint."""
        return dict(self._state) if self._watcher is None else self._watcher.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run that is watched out of copies, as it holds hooks and files."""
        return self.__dict__ | {"_state": self.state_dict(), "_watcher": None, "_run": ()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the counters and streaks of a checkpoint."""
        self._state = dict(state_dict)
        if self._watcher is not None:
            self._watcher.load_state_dict(self._state)

    # The hooks, in the order in which Lightning calls them ----------------------------------------

    @_harmless
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew for each ``fit``, but where one goes on; a checkpoint's state is loaded right after this."""
        if stage == "fit":
            run, before = (weakref.ref(trainer), weakref.ref(pl_module)), self._run
            # A trainer that goes on counts on, else what is written now took the place of what is there.
            goes_on = before[:1] == run[:1] and trainer.global_step > 0
            self._state, self._run = self.state_dict() if goes_on else {}, run
            if before != run:
                self._state.pop("judge", None)
            self._watcher = None
            self._watcher = Watcher(pl_module, self.config, sinks=self._given_sinks)
            if self._state:
                self._watcher.load_state_dict(self._state)

    @_harmless
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the run: now the optimizers exist."""
        if self._watcher is not None:
            ours = [c for c in getattr(trainer, "callbacks", ()) if isinstance(c, GradWatch)]
            automatic = pl_module.automatic_optimization
            self._watcher.begin(
                # Where the user's code keeps optimizers of its own, a stand-in without parameters is there.
                [o for o in trainer.optimizers if automatic or o.param_groups],
                loggers=trainer.loggers,
                name=self._name,
                first=not ours or ours[0] is self,
                by_hand=not automatic,
                touched=automatic and _has_late_hooks(trainer, pl_module),
                writes=trainer.is_global_zero,
                scaler=getattr(trainer, "scaler", None),
                # Private: set where `fit` was given a compiled module, which it unwraps.
                compiled=getattr(pl_module, "_compiler_ctx", None) is not None,
                around=trainer.model,
                maker=pl_module.configure_optimizers,
                clips=bool(getattr(trainer, "gradient_clip_val", None)),
                every_n_steps=getattr(trainer, "log_every_n_steps", 50),  # set as an attribute only
            )

    @_harmless
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a batch."""
        del trainer, batch, batch_idx
        if self._watcher is not None:
            self._saw_backward = False
            self._watcher.begin_batch()
            if not pl_module.automatic_optimization:
                self._watcher.before_backward()

    @_harmless
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Note that a backward pass is about to begin."""
        del trainer, pl_module, loss
        if self._watcher is not None:
            self._watcher.before_backward()

    @_harmless
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that a backward pass has ended."""
        del trainer, pl_module
        if self._watcher is not None:
            self._saw_backward = True
            self._watcher.after_backward()

    @_harmless
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the step before the optimizer writes."""
        if self._watcher is not None:
            watcher = self._watcher
            seen = pl_module.automatic_optimization
            judge = watcher.before_step if seen else watcher.judge_unseen
            judge(optimizer, step=trainer.global_step)
            if not (seen or self._saw_backward):
                watcher.note_raw_backward()
            self._obey(trainer)

    @_harmless
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End a batch."""
        del batch, batch_idx
        self._obey(trainer)
        if self._watcher is not None:
            self._watcher.known_terms(outputs)
            if not pl_module.automatic_optimization:
                self._watcher.settle()
        self._end_batch()

    @_harmless
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the trace, where no batch end came."""
        del trainer, pl_module
        self._end_batch()

    @_harmless
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the trace: what validation runs is no part of a step."""
        del trainer, pl_module
        self._end_batch()

    @_harmless
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run."""
        del trainer, pl_module
        self._close()

    @_harmless
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Clean up: after an exception Lightning calls no other hook."""
        del trainer, pl_module
        if self._watcher is not None:
            self._watcher.interrupted(exception)
        self._close()

    @_harmless
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        del trainer, pl_module
        if stage == "fit":
            self._close()

    def _obey(self, trainer: Trainer) -> None:
        if self._watcher is not None and self._watcher.should_stop:
            trainer.should_stop = True

    def _end_batch(self) -> None:
        if self._watcher is not None:
            self._watcher.end_batch()

    def _close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()

    def _fail(self, error: Exception) -> None:
        """Watch no more, and say so once."""
        if self._watcher is None:
            _log.warning(_words.SWITCHED_OFF, exc_info=error)
        else:
            self._watcher.switch_off(error)
