"""The life of a run under Lightning: what people put beside GradWatch, and every way a run can end."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from gradwatch import Cause, GradWatch, Status, read_history
from gradwatch.sinks import MemorySink
from tests.conftest import QUIET, SCRIPTED_NET

BODY = ("body.weight", "body.bias")
HEAD = ("head.weight", "head.bias")


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.head(self.body(batch).relu()).pow(2).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.head(self.body(batch)).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)


class Unfreezing(BaseFinetuning):
    """Freeze the body for one epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer)


class Swapping(Callback):
    """Validate with other weights than are trained, as averages of weights do."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.kept = {key: value.clone() for key, value in pl_module.state_dict().items()}
        pl_module.load_state_dict({key: value * 0.9 for key, value in self.kept.items()})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.kept)


def train(
    model: Lit, *callbacks: Any, batches: int = 4, fits: int = 1, **options: Any
) -> tuple[list[Any], list[Any]]:
    """Train and validate; return the reports, and the weights in the end."""
    sink = MemorySink()
    watch = [GradWatch(every_n_steps=1, sinks=[sink])] if options.pop("watch", True) else []
    torch.manual_seed(1)
    data: Any = DataLoader(torch.randn(2 * batches, 4), batch_size=2)  # type: ignore[arg-type]
    defaults = QUIET | {"max_epochs": 2, "callbacks": [*callbacks, *watch]}
    for _ in range(fits):
        Trainer(**defaults | options).fit(model, data, data)
    return sink.reports, [p.detach().tolist() for p in model.parameters()]


def statuses(report: Any) -> list[Status]:
    return [report.statuses[name] for name in BODY + HEAD]


BESIDE = {
    "nothing": ([], {}, 8),
    "validation within the epoch": ([], {"val_check_interval": 2}, 8),
    "fast_dev_run": ([], {"fast_dev_run": 2}, 2),
    "swapped weights": ([Swapping], {}, 8),
    "averaged weights": ([lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)], {}, 8),
    "checkpoints": (
        [lambda: ModelCheckpoint(dirpath="kept", every_n_train_steps=2)],
        {"enable_checkpointing": True},
        8,
    ),
    "early stopping": ([lambda: EarlyStopping("loss", patience=0)], {"max_epochs": 9}, None),
    "growing windows": ([lambda: GradientAccumulationScheduler({0: 2, 1: 1})], {}, 6),
    "a timer that is up": ([lambda: Timer("00:00:00:00")], {}, 0),
    "no batches": ([], {"limit_train_batches": 0}, 0),
    "two runs": ([], {"fits": 2}, 16),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("others", "options", "steps"), BESIDE.values(), ids=BESIDE)
def test_a_healthy_run_is_the_same_and_stays_silent(
    others: list[Any], options: dict[str, Any], steps: int | None, capsys: Any
):
    """Beside each of these the weights are those without GradWatch, every step is reported, and nothing is said."""
    _, bare = train(Lit(), *(make() for make in others), watch=False, **options)
    capsys.readouterr()
    reports, watched = train(Lit(), *(make() for make in others), **options)

    assert watched == bare
    assert steps is None or len(reports) == steps
    assert all(statuses(report) == [Status.OK] * 4 for report in reports)
    assert "gradient" not in capsys.readouterr().err


def test_a_layer_unfrozen_by_schedule_is_followed():
    """Frozen at first and trained from the second epoch on, a layer is never called missing."""
    reports, _ = train(Lit(), Unfreezing())

    frozen = [Status.FROZEN] * 2 + [Status.OK] * 2
    assert [statuses(report) for report in reports] == [frozen] * 4 + [[Status.OK] * 4] * 4
    assert [diagnosis for report in reports for diagnosis in report.diagnoses] == []


def test_a_run_shorter_than_any_rule_still_says_what_never_trained(capsys: Any):
    """In a smoke test of one batch the dead layer is named, though no rule can have fired."""

    class Half(Lit):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.head(batch).pow(2).mean()

    reports, _ = train(Half(), fast_dev_run=1)

    assert [d.parameters for report in reports for d in report.diagnoses] == [BODY]
    assert "warning[unused]: `body.*` get no gradient" in capsys.readouterr().err


class Boom(Lit):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (ValueError("mine"), ValueError),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), torch.cuda.OutOfMemoryError),
        (KeyboardInterrupt(), SystemExit),  # what Lightning makes of it
    ],
    ids=["an error", "out of memory", "Ctrl-C"],
)
def test_a_run_that_is_interrupted_ends_as_it_would(error: BaseException, seen: type):
    """The user's exception comes through unchanged, and the reports until then are kept."""
    sink = MemorySink()
    data: Any = DataLoader(torch.ones(3, 4), batch_size=1)  # type: ignore[arg-type]
    watch = GradWatch(every_n_steps=1, sinks=[sink])
    with pytest.raises(seen) as caught:
        Trainer(**QUIET, callbacks=[watch]).fit(Boom(error), data)

    assert seen is SystemExit or caught.value is error
    assert getattr(caught.value, "__notes__", []) == []
    assert [report.step for report in sink.reports] == [0]


def test_a_callback_is_pickled_for_spawned_processes():
    """Before a run the callback can be sent to another process, with its configuration."""
    callback = GradWatch(for_steps=3, name="a")

    copy = pickle.loads(pickle.dumps(callback))  # noqa: S301 -- what ddp_spawn does

    assert (copy.config, copy.state_key) == (callback.config, "GradWatch:a")


def test_a_callback_is_copied_in_a_run_without_the_run(tmp_path: Path):
    """A copy made in the middle of a run has the configuration and the counters, and no hook or file."""
    copies: list[GradWatch] = []

    class Copies(Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(watch)))  # noqa: S301 -- our own

    watch = GradWatch(every_n_steps=1, name="a")
    logger = TensorBoardLogger(tmp_path)
    data: Any = DataLoader(torch.ones(6, 4), batch_size=2)  # type: ignore[arg-type]
    Trainer(**QUIET | {"logger": logger}, callbacks=[watch, Copies()]).fit(Lit(), data)

    assert [c.state_dict()["steps"] for c in copies] == [1, 2, 3]
    assert {(c.config, c.state_key) for c in copies} == {(watch.config, "GradWatch:a")}
    assert [c.report.statuses for c in copies] == [{}, {}, {}]


class StepsInBackward(Lit):
    """Each parameter has an optimizer that steps as soon as its gradient is there."""

    def configure_optimizers(self) -> Any:
        own = {p: torch.optim.SGD([p], 0.01) for p in self.parameters()}

        def step(parameter: Any) -> None:
            own[parameter].step()
            parameter.grad = None

        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(step)


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
def test_an_optimizer_inside_of_backward_is_said_once(caplog: pytest.LogCaptureFixture):
    """Gradients that are used up within backward are unseen in every step, and no rule counts them."""
    reports, _ = train(StepsInBackward(), batches=12)

    assert {status for report in reports for status in report.statuses.values()} == {Status.UNSEEN}
    assert [x for report in reports for x in (*report.diagnoses, *report.alerts)] == []
    said = [record.getMessage() for record in caplog.records if record.name == "gradwatch"]
    assert [text.partition(" and ")[0] for text in said] == [
        "an optimizer steps inside of backward"
    ]


class Replaced(Lit):
    """The head is made anew after the optimizer was built with the old one."""

    def on_train_start(self) -> None:
        self.head = nn.Linear(4, 1)


def test_what_was_replaced_after_the_optimizer_was_built_is_named():
    """The new parameters are in no optimizer; that it holds others like them, and where it was made, is noted."""
    reports, _ = train(Replaced(), max_epochs=1)

    (found,) = reports[0].diagnoses
    assert (found.cause, found.parameters) == (Cause.NOT_IN_OPTIMIZER, HEAD)
    assert found.notes[0].startswith("the optimizers hold 2 tensors of such shapes")
    line = Lit.configure_optimizers.__code__.co_firstlineno
    assert f"test_life.py:{line}" in found.notes[1]


class Adapted(Lit):
    """A frozen body with a low-rank adapter inside of a checkpoint, and a head that trains."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.body.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.reentrant = reentrant

    def block(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.lora_b(self.lora_a(x)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        h = checkpoint(self.block, batch, use_reentrant=self.reentrant)
        return self.head(h).pow(2).mean()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_adapters_inside_of_a_checkpoint_that_cuts_them_off():
    """With `use_reentrant=True` and a frozen base no adapter trains, which is said at the user's call."""
    reports, _ = train(Adapted(reentrant=True), max_epochs=1)

    (found,) = reports[-1].diagnoses
    assert (found.cause, found.parameters) == (
        Cause.REENTRANT_CHECKPOINT,
        ("lora_a.weight", "lora_b.weight"),
    )
    assert found.site is not None
    assert found.site.source is not None
    assert "checkpoint(self.block, batch" in found.site.source


def test_adapters_that_begin_at_zero_are_no_fault():
    """The first factor of an adapter has a gradient of zero in the first step only, and nothing is said of it."""
    reports, _ = train(Adapted(reentrant=False), max_epochs=1)

    first = [report.statuses["lora_a.weight"] for report in reports]
    assert first == [Status.ZERO, Status.OK, Status.OK, Status.OK]
    assert [diagnosis for report in reports for diagnosis in report.diagnoses] == []


class Raw(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.head(self.body(batch)).pow(2).mean().backward()
        optimizer.step()


class Manual(Raw):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.head(self.body(batch)).pow(2).mean())
        optimizer.step()


class ByHand(Raw):
    """What `autograd.grad` gives is assigned, so that no backward pass fills any gradient."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.head(self.body(batch)).pow(2).mean()
        parameters = list(self.parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()


class Late(Manual):
    """Each step uses the gradients of the batch before."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self.manual_backward(self.head(self.body(batch)).pow(2).mean())


@pytest.mark.parametrize("model", [ByHand, Late])
def test_gradients_without_a_raw_backward_are_no_reason_to_name_one(
    model: Any, caplog: pytest.LogCaptureFixture
):
    """Where nobody calls `loss.backward()` nobody is told to call something else."""
    train(model())

    said = [record.getMessage() for record in caplog.records if record.name == "gradwatch"]
    assert [text for text in said if "self.manual_backward(loss)" in text] == []


@pytest.mark.parametrize(("model", "count"), [(Raw, 1), (Manual, 0)])
def test_a_raw_backward_is_pointed_out_once(
    model: Any, count: int, caplog: pytest.LogCaptureFixture
):
    """`loss.backward()` under manual optimization is judged all the same, and the better call is named once."""
    reports, _ = train(model())

    assert [statuses(report) for report in reports] == [[Status.OK] * 4] * 8
    said = [record.getMessage() for record in caplog.records if record.name == "gradwatch"]
    assert ["self.manual_backward(loss)" in text for text in said] == [True] * count


def test_an_optimizer_that_never_steps_is_named(caplog: pytest.LogCaptureFixture):
    """Of two optimizers the one whose `step()` was forgotten is named at the end, with its parameters."""

    class Forgotten(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizers: Any = self.optimizers()
            first, _ = optimizers
            first.zero_grad()
            self.manual_backward(self.head(self.body(batch)).pow(2).mean())
            first.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.body, self.head)]

    train(Forgotten())

    said = [record.getMessage() for record in caplog.records if record.name == "gradwatch"]
    assert said == [
        "optimizer 1 never stepped in this run, so that nothing is known of its parameters (`head.*`)"
    ]


def test_a_run_without_any_step_says_so(caplog: pytest.LogCaptureFixture):
    """Backward passes without an optimizer step leave nothing to judge, and one line says it."""

    class NoStep(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.manual_backward(self.head(self.body(batch)).pow(2).mean())

    reports, _ = train(NoStep())

    assert reports == []
    said = [record.getMessage() for record in caplog.records if record.name == "gradwatch"]
    assert said == ["no optimizer step was seen in this run, so that nothing was judged"]


KILLED = (
    SCRIPTED_NET
    + """
import os
import signal
import sys

from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger


class Kill(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for logger in trainer.loggers:
            logger.experiment.flush()
        if trainer.global_step == 110 and len(sys.argv) < 2:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, logger=TensorBoardLogger("logs", "", "run"),
        callbacks=[GradWatch(), ModelCheckpoint("kept", every_n_train_steps=90), Kill()],
    )
    data = DataLoader(torch.ones(300, 2), batch_size=2)
    trainer.fit(Net(), data, ckpt_path=sys.argv[1] if len(sys.argv) > 1 else None)
"""
)


@pytest.mark.slow
def test_a_killed_run_loses_a_chunk_at_most_and_resumes(tmp_path: Path):
    """After SIGKILL the history holds all but the last chunk; a resumed run goes on where its checkpoint was."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def run(*arguments: str) -> int:
        return subprocess.run(  # noqa: S603
            [sys.executable, script, *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            timeout=100,
            check=False,
        ).returncode

    killed = run()
    before = read_history(tmp_path / "logs" / "run")
    (saved,) = (tmp_path / "kept").glob("*.ckpt")
    resumed = run(str(saved))
    after = read_history(tmp_path / "logs" / "run")

    assert (killed, resumed) == (-signal.SIGKILL, 0)
    assert before.batches.tolist() == list(range(len(before.batches)))
    assert 110 - 32 <= len(before.batches) <= 110
    # From the checkpoint at 90 on, each batch stands there again, and none twice.
    assert after.batches.tolist() == list(range(150))
    assert [d.cause for d in after.report.diagnoses] == [Cause.DETACHED]
