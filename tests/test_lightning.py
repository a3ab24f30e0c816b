from __future__ import annotations

import copy
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradwatch import (
    Cause,
    Config,
    Diagnosis,
    DisconnectedParameterError,
    GradWatch,
    Report,
    Status,
    read_history,
)
from gradwatch.sinks import MemorySink
from tests.conftest import QUIET

OK, MISSING, FROZEN = Status.OK, Status.MISSING, Status.FROZEN
PATIENT = Config(rules=())


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def pl(request: pytest.FixtureRequest) -> Any:
    """Return one of the two namespaces of Lightning, each with classes of its own."""
    return importlib.import_module(request.param)


class Net:
    """What every model here shares; ``made`` puts it before the LightningModule of a namespace."""

    branches: nn.ModuleDict

    def __init__(self, *names: str, **options: Any) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in names})
        self.options = options

    def out(self, *names: str) -> Any:
        return sum(self.branches[name](torch.ones(1, 2)).sum() for name in names)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.out(*self.branches)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.branches.parameters() if p.requires_grad], 0.01)


class Detached(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        hidden = self.branches["left"](batch).detach()  # <- here
        return (hidden + self.branches["right"](batch)).pow(2).mean()


class Logging(Detached):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)  # type: ignore[attr-defined]
        return loss


class Every(Net):
    """Branches that are used in every ``n``-th batch, 0 for never."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        used = [name for name, n in self.options.items() if n and batch_idx % n == 0]
        return self.out(*used) if used else None


class ValidationOnly(Net):
    """One branch is used in validation only."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.out("left")

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.out("left", "right")


def made(pl: Any, kind: type, *names: str, **options: Any) -> Any:
    """Return a model as a LightningModule of the namespace."""
    return type(kind.__name__, (kind, pl.LightningModule), {})(*names, **options)


def data(batches: int) -> DataLoader[Tensor]:
    return DataLoader(torch.ones(batches, 2), batch_size=1)  # type: ignore[arg-type]


def trainer_of(pl: Any, callback: Any, **options: Any) -> Any:
    """Return a quiet Trainer on the CPU."""
    return pl.Trainer(**QUIET | {"callbacks": [callback]} | options)


def fit(pl: Any, model: Any, callback: GradWatch, *, batches: int = 4, **options: Any) -> Any:
    """Train the model, and return the Trainer."""
    trainer = trainer_of(pl, callback, **options)
    trainer.fit(model, data(batches), data(2) if isinstance(model, ValidationOnly) else None)
    return trainer


def a(name: str) -> str:
    """Return the name of the weight of a branch."""
    return f"branches.{name}.weight"


def found(callback: GradWatch) -> list[tuple[Cause, tuple[str, ...]]]:
    return [(diagnosis.cause, diagnosis.parameters) for diagnosis in callback.diagnoses]


def alerts(sink: MemorySink) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(x.step, x.rule, x.parameters) for report in sink.reports for x in report.alerts]


def guilty_line(owner: Any) -> int:
    """Return the line that is marked in the source."""
    lines, first = inspect.getsourcelines(owner)
    return first + next(i for i, line in enumerate(lines) if "# <- here" in line)


# ---- what a run says


def test_healthy_model_stays_silent(pl: Any, capsys: pytest.CaptureFixture[str]):
    """A run in which every parameter trains has no diagnosis, prints nothing, and can be asked how it went."""
    callback = GradWatch()
    model = made(pl, Net, "left", "right")
    fit(pl, model, callback)

    assert (callback.diagnoses, callback.report.diagnoses, callback.report.alerts) == ((), (), ())
    assert callback.report.statuses == {name: Status.OK for name, _ in model.named_parameters()}
    assert capsys.readouterr().err == ""


def test_cause_and_line_are_told_in_the_first_step(pl: Any, capsys: pytest.CaptureFixture[str]):
    """The report of the first step names the cause, the parameter and the line in the source."""
    callback = GradWatch(PATIENT)
    fit(pl, made(pl, Detached, "left", "right"), callback)

    (diagnosis,) = callback.diagnoses
    assert isinstance(diagnosis, Diagnosis)
    assert (diagnosis.cause, diagnosis.parameters) == (Cause.DETACHED, (a("left"),))
    assert diagnosis.site is not None
    assert (diagnosis.site.file, diagnosis.site.line) == (__file__, guilty_line(Detached))
    assert (diagnosis.step, diagnosis.operation) == (0, "torch.Tensor.detach")
    assert callback.report.statuses == {a("left"): MISSING, a("right"): OK}
    assert callback.report.diagnoses == callback.diagnoses
    assert capsys.readouterr().err.count("warning[detached]") == 1


def test_before_a_run_there_is_nothing_to_read():
    """A callback that ran in no fit has an empty report and no diagnoses."""
    callback = GradWatch()

    assert (callback.report, callback.diagnoses) == (Report(step=0), ())
    assert (callback.state_dict(), callback.state_key) == ({}, "GradWatch")


def test_the_configuration_may_be_a_mapping(pl: Any):
    """In code a mapping with the keys of the YAML file configures the callback too."""
    contract = [{"parameters": "*left*", "gradient": "none"}]
    callback = GradWatch({"contract": contract})  # type: ignore[arg-type]
    fit(pl, made(pl, Detached, "left", "right"), callback)

    assert callback.diagnoses == ()


def test_frozen_layers_are_frozen(pl: Any):
    """A layer that wants no gradient has that status, and is no finding."""
    model = made(pl, Net, "left", "right")
    model.branches["left"].requires_grad_(requires_grad=False)
    callback = GradWatch(every_n_steps=1)
    fit(pl, model, callback, batches=2)

    assert callback.report.statuses == {a("left"): FROZEN, a("right"): OK}
    assert callback.diagnoses == ()


def test_parameters_in_no_optimizer_are_named(pl: Any):
    """A parameter that ``configure_optimizers`` leaves out is named once."""
    model = made(pl, Net, "left", "right")
    model.configure_optimizers = lambda: torch.optim.SGD(model.branches["left"].parameters(), 0.01)
    callback = GradWatch(PATIENT, every_n_steps=1)
    fit(pl, model, callback)

    assert found(callback) == [(Cause.NOT_IN_OPTIMIZER, (a("right"),))]
    assert callback.report.statuses == {a("left"): OK, a("right"): OK}


def test_what_validation_alone_uses_is_unused(pl: Any):
    """A layer that runs in the sanity check and in validation, and not in training, is unused."""
    sink = MemorySink()
    callback = GradWatch(PATIENT, every_n_steps=1, sinks=[sink])
    fit(pl, made(pl, ValidationOnly, "left", "right"), callback, val_check_interval=1)

    assert found(callback) == [(Cause.UNUSED, (a("right"),))]
    assert [(report.step, report.batch) for report in sink.reports] == [(i, i) for i in range(4)]


def test_a_model_without_optimizer_is_no_orphanage(pl: Any):
    """Where ``configure_optimizers`` returns None, no parameter is said to be in no optimizer."""
    model = made(pl, Net, "left", "right")
    model.configure_optimizers = lambda: None
    callback = GradWatch()
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(pl, model, callback)

    assert callback.diagnoses == ()


# ---- steps, micro-batches and batches


def test_steps_are_judged_once_under_accumulation(pl: Any):
    """Gradients of any micro-batch count, and each optimizer step is judged once, the short last too."""
    sink = MemorySink()
    callback = GradWatch(PATIENT, every_n_steps=1, sinks=[sink])
    model = made(pl, Every, "each", "third", "never", each=1, third=3, never=0)
    fit(pl, model, callback, batches=8, accumulate_grad_batches=3)

    statuses = {a("each"): OK, a("third"): OK, a("never"): MISSING}
    assert [(report.step, report.batch) for report in sink.reports] == [(0, 0), (1, 1), (2, 2)]
    assert [report.statuses for report in sink.reports] == [statuses] * 3
    assert found(callback) == [(Cause.UNUSED, (a("never"),))]


def test_norms_are_those_of_the_whole_window(pl: Any):
    """Under accumulation the norm is that of the mean over the window."""
    callback = GradWatch(every_n_steps=1)
    fit(pl, made(pl, Net, "left"), callback, accumulate_grad_batches=2)

    assert callback.report.norms == {a("left"): pytest.approx(2**0.5)}


def test_norms_are_those_before_clipping(pl: Any):
    """Gradient clipping does not show in the norms."""
    callback = GradWatch(every_n_steps=1)
    model = made(pl, Net, "left", "right")
    fit(pl, model, callback, gradient_clip_val=0.001)

    assert callback.report.norms == pytest.approx({a("left"): 2**0.5, a("right"): 2**0.5})
    assert callback.report.total_norm == pytest.approx(2.0)


class Dropping(Net):
    """A hook between ours and the optimizer's step takes gradients away from a batch on; None never does."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **options) -> None:
        first = self.options["first"]
        if first is not None and self.trainer.global_step >= first:  # type: ignore[attr-defined]
            self.branches["left"].weight.grad = None  # <- here
        self.clip_gradients(optimizer, gradient_clip_val=0.001)  # type: ignore[attr-defined]


def test_what_a_later_hook_takes_away_is_missing(pl: Any):
    """Gradients that `configure_gradient_clipping` empties are missing from the first step on, or from the next one."""
    shown = {}
    for first in (0, 2, None):
        sink = MemorySink()
        callback = GradWatch(PATIENT, every_n_steps=1, sinks=[sink])
        model = made(pl, Dropping, "left", "right", first=first)
        fit(pl, model, callback, batches=5)
        statuses = [report.statuses[a("left")] for report in sink.reports]
        sites = [(d.cause, d.parameters, d.site and d.site.line) for d in callback.diagnoses]
        shown[first] = statuses, sites
        totals = [report.norms[a("right")] for report in sink.reports]
        assert totals == [pytest.approx(2**0.5)] * 5

    cleared = [(Cause.CLEARED, (a("left"),), guilty_line(Dropping))]
    assert shown == {
        0: ([MISSING] * 5, cleared),
        2: ([OK, OK, OK, MISSING, MISSING], cleared),
        None: ([OK] * 5, []),
    }


def test_zeros_that_zero_grad_left_are_missing(pl: Any):
    """With ``set_to_none=False`` a parameter that no longer trains is missing, not zero."""
    model = made(pl, Every, "each", "third", each=1, third=3)
    model.optimizer_zero_grad = lambda epoch, batch_idx, optimizer: optimizer.zero_grad(
        set_to_none=False
    )
    sink = MemorySink()
    fit(pl, model, GradWatch(PATIENT, every_n_steps=1, sinks=[sink]), batches=4)

    assert [report.statuses[a("third")] for report in sink.reports] == [OK, MISSING, MISSING, OK]
    assert [report.statuses[a("each")] for report in sink.reports] == [OK] * 4


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_loss_are_no_steps(pl: Any):
    """A batch for which ``training_step`` returns None neither makes nor breaks a streak."""
    model = made(pl, Every, "second", "never", second=2, never=0)
    sink = MemorySink()
    fit(pl, model, GradWatch(for_steps=3, sinks=[sink]), batches=8)

    (alert,) = (alert for report in sink.reports for alert in report.alerts)
    assert (alert.parameters, alert.steps) == ((a("never"),), 3)


def test_batches_are_counted_once_over_epochs_and_validations(pl: Any):
    """The number of a batch goes up by one from report to report, whatever runs in between."""
    sink = MemorySink()
    callback = GradWatch(every_n_steps=1, sinks=[sink])
    model = made(pl, ValidationOnly, "left", "right")
    fit(pl, model, callback, batches=3, max_epochs=3, val_check_interval=2)

    assert [(report.step, report.batch) for report in sink.reports] == [(i, i) for i in range(9)]


def test_logged_steps_follow_the_trainer(pl: Any):
    """Without a number of its own the callback measures as often as the Trainer logs."""
    sink = MemorySink()
    fit(pl, made(pl, Net, "left"), GradWatch(sinks=[sink]), batches=7, log_every_n_steps=3)

    assert [(report.step, report.logged) for report in sink.reports] == [(2, True), (5, True)]


def test_lbfgs_steps_are_counted_once(pl: Any):
    """An optimizer that evaluates its closure many times has one report per step."""
    model = made(pl, Every, "each", "never", each=1, never=0)
    model.configure_optimizers = lambda: torch.optim.LBFGS(
        model.parameters(), lr=1e-3, max_iter=4, tolerance_change=0, tolerance_grad=0
    )
    sink = MemorySink()
    fit(pl, model, GradWatch(for_steps=3, every_n_steps=1, sinks=[sink]))

    assert [report.step for report in sink.reports] == [0, 1, 2, 3]
    assert [r.statuses for r in sink.reports] == [{a("each"): OK, a("never"): MISSING}] * 4
    assert alerts(sink) == [(2, "disconnected", (a("never"),))]


# ---- manual optimization


class Gan(Net):
    """Two players with an optimizer each; ``idle`` belongs to the second and is never used."""

    def __init__(self, *names: str, **options: Any) -> None:
        super().__init__("generator", "discriminator", "idle", **options)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        groups = (["generator"], ["discriminator", "idle"])
        self.own = [
            torch.optim.SGD([self.branches.get_parameter(f"{name}.weight") for name in names], 0.01)
            for names in groups
        ]
        return None if "own" in self.options else self.own

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        this: Any = self
        players = ("generator", "discriminator")
        if "own" in self.options:
            optimizers = self.own
        else:
            optimizers = this.optimizers(use_pl_optimizer="bare" not in self.options)
        for player, optimizer in zip(players, optimizers, strict=True):
            if self.options.get("rarely") == player and batch_idx % 2:
                continue
            if self.options.get("toggle"):
                this.toggle_optimizer(optimizer)
            loss = self.out(*(players if player == "generator" else (player,)))
            optimizer.zero_grad()
            if self.options.get("raw"):
                loss.backward()
            else:
                this.manual_backward(loss)
            optimizer.step()
            if self.options.get("toggle"):
                this.untoggle_optimizer(optimizer)


STEPPED = [{"toggle": True}, {}, {"raw": True}, {"bare": True}, {"own": True, "raw": True}]


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("options", STEPPED, ids=str)
def test_each_player_is_judged_in_its_own_steps(pl: Any, options: dict[str, Any]):
    """In a GAN a report speaks of the player that steps, with streaks of its own steps."""
    sink = MemorySink()
    callback = GradWatch(for_steps=3, every_n_steps=1, sinks=[sink])
    fit(pl, made(pl, Gan, **options), callback)

    second = {a("discriminator"): OK, a("idle"): MISSING}
    assert [r.statuses for r in sink.reports] == [{a("generator"): OK}, second] * 4
    assert [r.optimizer for r in sink.reports] == [0, 1] * 4
    assert [r.step for r in sink.reports] == list(range(8))
    assert [r.batch for r in sink.reports] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert alerts(sink) == [(5, "disconnected", (a("idle"),))]
    assert found(callback) == [(Cause.UNUSED, (a("idle"),))]


def test_a_player_that_steps_rarely_has_a_slow_streak(pl: Any):
    """Steps in which its optimizer did not step do not count for a parameter."""
    sink = MemorySink()
    callback = GradWatch(for_steps=3, sinks=[sink])
    fit(pl, made(pl, Gan, toggle=True, rarely="discriminator"), callback, batches=6)

    assert alerts(sink) == [(7, "disconnected", (a("idle"),))]


class RawAccumulation(Net):
    """Plain ``backward()`` in every batch, and a step in every second; one branch is used in the first."""

    def __init__(self, *names: str, **options: Any) -> None:
        super().__init__(*names, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        this: Any = self
        self.out("first" if batch_idx % 2 == 0 else "last").backward()
        if batch_idx % 2:
            this.optimizers().step()
            this.optimizers().zero_grad()


def test_raw_backwards_accumulate_over_batches(pl: Any):
    """What ``loss.backward()`` gave in an earlier batch counts for the step that comes after."""
    sink = MemorySink()
    callback = GradWatch(PATIENT, every_n_steps=1, sinks=[sink])
    fit(pl, made(pl, RawAccumulation, "first", "last", "never"), callback, batches=6)

    statuses = {a("first"): OK, a("last"): OK, a("never"): MISSING}
    assert [report.statuses for report in sink.reports] == [statuses] * 3
    assert found(callback) == [(Cause.UNUSED, (a("never"),))]


class StepsInAHook(Net):
    """Manual optimization whose optimizer steps after `training_step`, where Lightning does not count it."""

    def __init__(self, *names: str, **options: Any) -> None:
        super().__init__(*names, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        this: Any = self
        names = [name for name in self.branches if name != "late" or batch_idx < 2]
        this.manual_backward(self.out(*names))

    def on_train_batch_end(self, *arguments: Any) -> None:
        this: Any = self
        this.optimizers().step()
        this.optimizers().zero_grad()


def test_steps_in_a_hook_are_judged_each(pl: Any):
    """Each step of an optimizer after `training_step` is one of its own, with a number of its own."""
    sink = MemorySink()
    callback = GradWatch(for_steps=3, every_n_steps=1, sinks=[sink])
    fit(pl, made(pl, StepsInAHook, "always", "late"), callback, batches=6)

    late = [report.statuses[a("late")] for report in sink.reports]
    assert [report.step for report in sink.reports] == list(range(6))
    assert late == [OK, OK, MISSING, MISSING, MISSING, MISSING]
    assert alerts(sink) == [(4, "disconnected", (a("late"),))]
    assert found(callback) == [(Cause.UNUSED, (a("late"),))]


# ---- optimizers that the Trainer was not given, or not at first


def probing(pl: Any, *, trains: bool) -> Any:
    """Return a callback that keeps a probe on the model, with an optimizer of its own."""

    class Probe(pl.Callback):  # type: ignore[misc]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.probe = nn.Linear(2, 1, bias=False)
            self.optimizer = torch.optim.SGD(pl_module.probe.parameters(), 0.1)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
            if trains:
                pl_module.probe(torch.ones(1, 2)).sum().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    return Probe()


def test_a_callback_that_trains_a_layer_itself_is_no_fault(pl: Any):
    """Parameters that an optimizer outside of the Trainer steps are not said to be left out, or missing."""
    sink = MemorySink()
    callback = GradWatch(for_steps=1, every_n_steps=1, action="abort", sinks=[sink])
    model = made(pl, Net, "only")
    trainer_of(pl, callback, callbacks=[callback, probing(pl, trains=True)]).fit(model, data(12))

    assert [report.statuses for report in sink.reports] == [{a("only"): OK}] * 12
    assert callback.diagnoses == ()


def test_an_optimizer_left_over_from_elsewhere_does_not_count(pl: Any):
    """Parameters that are only in an optimizer which does not step are in none, ten batches later."""
    callback = GradWatch(PATIENT, every_n_steps=1)
    model = made(pl, Net, "only")
    trainer_of(pl, callback, callbacks=[callback, probing(pl, trains=False)]).fit(model, data(16))

    assert [(d.cause, d.parameters, d.step) for d in callback.diagnoses] == [
        (Cause.NOT_IN_OPTIMIZER, ("probe.weight",), 10)
    ]


class Rebuilt(Net):
    """From the third batch on other optimizers step, also for a branch that is new."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        this: Any = self
        if batch_idx == 1:
            self.branches["new"] = nn.Linear(2, 1, bias=False)
            this.trainer.strategy.setup_optimizers(this.trainer)
        new = self.branches["new"](batch).sum() if "new" in self.branches else 0
        return self.out("only") + (new.detach() if self.options.get("sick") and batch_idx else new)


@pytest.mark.parametrize("sick", [False, True])
def test_optimizers_made_anew_midway_are_taken_up(pl: Any, *, sick: bool):
    """A new optimizer takes the place of the old one, and what it holds besides is watched."""
    sink = MemorySink()
    callback = GradWatch(for_steps=3, every_n_steps=1, sinks=[sink])
    fit(pl, made(pl, Rebuilt, "only", sick=sick), callback, batches=8)

    new = MISSING if sick else OK
    assert sink.reports[-1].statuses == {a("only"): OK, a("new"): new}
    assert {report.optimizer for report in sink.reports} == {0}
    assert found(callback) == ([(Cause.DETACHED, (a("new"),))] if sick else [])


class Swapped(Net):
    """In the third batch one branch takes the place of the other in the optimizer's only group."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        this: Any = self
        if batch_idx == 2:
            this.branches["left"].requires_grad_(False)
            this.branches["right"].requires_grad_(True)
            group = this.trainer.optimizers[0].param_groups[0]
            group["params"] = [*this.branches["right"].parameters()]
        return self.out("left" if batch_idx < 2 else "right")


def test_groups_written_anew_are_noticed(pl: Any):
    """Another list of as many parameters in a group is no parameter without an optimizer."""
    callback = GradWatch(every_n_steps=1)
    model = made(pl, Swapped, "left", "right")
    model.branches["right"].requires_grad_(False)
    fit(pl, model, callback, batches=6)

    assert callback.report.statuses == {a("left"): FROZEN, a("right"): OK}
    assert callback.diagnoses == ()


class Sometimes(Net):
    """One branch is cut off in every second batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        left = self.branches["left"](batch).sum()
        return self.out("right") + (left.detach() if batch_idx % 2 else left)


def test_what_is_missing_in_every_second_step_is_diagnosed(pl: Any):
    """A gradient that is there in each step after one without it gets a cause all the same."""
    callback = GradWatch(PATIENT, every_n_steps=50)
    fit(pl, made(pl, Sometimes, "left", "right"), callback, batches=12)

    assert found(callback) == [(Cause.DETACHED, (a("left"),))]


# ---- Trainers


def test_works_bare_outside_of_a_list(pl: Any):
    """The callback can be given without a list, to the Trainer of either namespace."""
    callback = GradWatch(PATIENT)
    fit(pl, made(pl, Detached, "left", "right"), callback, callbacks=callback)

    assert found(callback) == [(Cause.DETACHED, (a("left"),))]


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": 2}], ids=str)
def test_works_without_a_logger(pl: Any, options: dict[str, Any]):
    """Without a logger, and with the dummy of ``fast_dev_run``, the diagnosis is the same."""
    callback = GradWatch(PATIENT, every_n_steps=1)
    trainer = fit(pl, made(pl, Detached, "left", "right"), callback, **options)

    assert trainer.state.finished
    assert found(callback) == [(Cause.DETACHED, (a("left"),))]


def test_several_loggers_get_what_they_can_show(pl: Any, tmp_path: Path):
    """TensorBoard gets statuses of each parameter, and a CSV logger beside it the summary."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [
        pl.loggers.TensorBoardLogger(tmp_path, "tb", version=""),
        pl.loggers.CSVLogger(tmp_path, "csv", version=""),
    ]
    callback = GradWatch(PATIENT)
    model = made(pl, Detached, "left", "right")
    fit(pl, model, callback, logger=loggers, log_every_n_steps=2)

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (tag,) = (t for t in events.Tags()["scalars"] if t.endswith(f"status/{a('left')}"))
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("gradwatch/params_missing")
    assert [(s.step, s.value) for s in events.Scalars(tag)] == [
        (1, MISSING.code),
        (3, MISSING.code),
    ]
    assert [float(row.split(",")[column]) for row in rows[1:]] == [1.0, 1.0, 1.0]


def test_loggers_of_other_makers_get_the_summary(
    pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """MLflow's files and a run of W&B's offline hold the counts, at the steps of Lightning's own values."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    mlflow = pl.loggers.MLFlowLogger("x", tracking_uri=f"file:{tmp_path}/mlruns")
    wandb = pl.loggers.WandbLogger(project="x", save_dir=tmp_path, offline=True)
    model = made(pl, Logging, "left", "right")
    fit(pl, model, GradWatch(PATIENT), logger=[mlflow, wandb], log_every_n_steps=2)
    summary = dict(wandb.experiment.summary)
    wandb.experiment.finish()

    def history(name: str) -> list[tuple[int, float]]:
        values = mlflow.experiment.get_metric_history(mlflow.run_id, name)
        return [(value.step, value.value) for value in values]

    # The first batch is written for its news, whatever the interval.
    assert history("gradwatch/params_missing") == [(0, 1.0), (1, 1.0), (3, 1.0)]
    assert [step for step, _ in history("loss")] == [1, 3]
    assert (summary["gradwatch/params_missing"], summary["trainer/global_step"]) == (1.0, 3)


def test_two_callbacks_with_names_share_a_trainer(pl: Any):
    """Two callbacks with names each keep a configuration and a state of their own."""
    first, second = GradWatch(PATIENT, name="first"), GradWatch(name="second", for_steps=2)
    trainer = fit(pl, made(pl, Detached, "left", "right"), first, callbacks=[first, second])

    saved = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)["callbacks"]
    assert sorted(saved) == ["GradWatch:first", "GradWatch:second"]
    assert found(first) == found(second) == [(Cause.DETACHED, (a("left"),))]
    assert (first.report.alerts, len(second.report.alerts)) == ((), 1)


def test_two_callbacks_share_a_logger(pl: Any, tmp_path: Path):
    """Two callbacks on one TensorBoard logger each write cards of their own, and the first the history."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = importlib.import_module(f"{pl.__name__}.loggers")
    callbacks = [GradWatch(PATIENT, name="first"), GradWatch(PATIENT, name="second")]
    logger = loggers.TensorBoardLogger(tmp_path, name="", version="")
    model = made(pl, Detached, "left", "right")
    fit(pl, model, callbacks[0], callbacks=callbacks, logger=logger, log_every_n_steps=1)

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("first", "second"):
        card = [s.step for s in events.Scalars(f"gradwatch_{name}/params_missing")]
        assert card == list(range(len(card)))
        assert card
    history = read_history(tmp_path)
    assert history.batches.tolist() == list(range(len(history.batches)))


def test_a_name_that_is_no_string_is_refused():
    """What cannot be the name of anything is said when it is given, and not in the run."""
    name: Any = 3
    with pytest.raises(TypeError, match=r"`GradWatch\(name=...\)`: expected a string, found `int`"):
        GradWatch(name=name)


def test_two_callbacks_without_names_are_refused(pl: Any):
    """Lightning refuses two callbacks that would write the same state."""
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer_of(pl, None, callbacks=[GradWatch(), GradWatch()])


def test_a_second_fit_begins_anew(pl: Any):
    """Each ``fit`` starts with no streak and no diagnosis of the one before."""
    callback = GradWatch(for_steps=3)
    model = made(pl, Every, "each", "never", each=1, never=0)
    fit(pl, model, callback, batches=2)
    first = callback.diagnoses
    fit(pl, model, callback, batches=2)

    assert callback.diagnoses == first
    assert callback.state_dict()["judge"]["streaks"] == {a("never"): 2}
    assert callback.state_dict()["batches"] == 2


class Mended(Net):
    """One branch is cut off until ``mended`` is set."""

    mended = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        left = self.branches["left"](batch)
        return (left if self.mended else left.detach()).sum() + self.out("right")


def test_a_fit_that_goes_on_keeps_what_was_written(pl: Any, tmp_path: Path):
    """A second ``fit`` of one trainer counts on, with its logger's file closed in between: nothing is lost."""
    callback = GradWatch(for_steps=3)
    model = made(pl, Mended, "left", "right")
    logger = importlib.import_module(f"{pl.__name__}.loggers").TensorBoardLogger(str(tmp_path))
    trainer = fit(pl, model, callback, batches=2, logger=logger, log_every_n_steps=1)
    model.mended = True
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, data(2))

    history = read_history(logger.log_dir)
    left = history.status[:, history.names.index(a("left"))]
    assert history.batches.tolist() == history.steps.tolist() == list(range(6))
    assert left.tolist() == [MISSING.code] * 2 + [OK.code] * 4
    assert [(d.cause, d.step, d.healed_at) for d in history.report.diagnoses] == [
        (Cause.DETACHED, 0, 2)
    ]
    assert callback.state_dict()["batches"] == 6


def test_another_model_of_one_trainer_counts_on_without_the_streaks(pl: Any):
    """A trainer that goes on with another model keeps its batches' numbers, and no streak of the first."""
    callback = GradWatch(for_steps=30)
    trainer = fit(pl, made(pl, Every, "each", "never", each=1, never=0), callback, batches=2)
    assert callback.state_dict()["judge"]["streaks"] == {a("never"): 2}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(made(pl, Every, "each", "never", each=1, never=0), data(2))

    assert callback.state_dict()["judge"]["streaks"] == {a("never"): 2}
    assert callback.state_dict()["batches"] == 4


def test_other_stages_leave_the_run_as_it_is(pl: Any):
    """Validation, test and prediction after a fit change nothing that the callback tells."""
    callback = GradWatch(PATIENT, every_n_steps=1)
    model = made(pl, ValidationOnly, "left", "right")
    trainer = fit(pl, model, callback)
    before = (callback.report, callback.diagnoses, callback.state_dict())
    trainer.validate(model, data(2), verbose=False)

    assert (callback.report, callback.diagnoses, callback.state_dict()) == before


# ---- checkpoints


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_streaks_survive_a_resume(pl: Any, tmp_path: Path):
    """A checkpoint loads with ``weights_only=True``, and the streak goes on where it was."""
    model = made(pl, Detached, "left", "right")
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="it", every_n_train_steps=3)
    first = GradWatch(for_steps=5)
    fit(pl, model, first, batches=3, callbacks=[first, keep], enable_checkpointing=True)
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)["callbacks"]["GradWatch"]
    sink = MemorySink()
    second = GradWatch(for_steps=5, sinks=[sink])
    trainer = trainer_of(
        pl, second, callbacks=[second, keep], enable_checkpointing=True, max_epochs=-1, max_steps=6
    )
    # Lightning 2.4 cannot be told how to load; later ones can.
    told = inspect.signature(trainer.fit).parameters
    safe = {"weights_only": True} if "weights_only" in told else {}
    trainer.fit(model, data(3), ckpt_path=tmp_path / "it.ckpt", **safe)

    assert saved["judge"]["streaks"] == {a("left"): 3}
    assert alerts(sink) == [(4, "disconnected", (a("left"),))]
    assert trainer.global_step == 6
    assert [report.step for report in sink.reports] == [3, 4]


def test_state_round_trips_without_a_run():
    """A state that was loaded and not used yet is the state that is saved."""
    callback = GradWatch()
    state = {"version": 1, "steps": 3, "batches": 3, "judge": {"streaks": {"w": 3}}}
    callback.load_state_dict(state)

    assert callback.state_dict() == state


# ---- the end of a run


def test_abort_leaves_the_weights_of_the_step_before(pl: Any):
    """``action: abort`` raises out of ``fit`` before the optimizer writes."""
    model = made(pl, Detached, "left", "right")
    seen = []
    model.on_train_batch_start = lambda batch, batch_idx: seen.append(
        copy.deepcopy(model.state_dict())
    )
    callback = GradWatch(for_steps=3, action="abort")
    with pytest.raises(DisconnectedParameterError, match=r"branches\.left\.weight[\s\S]*detach"):
        fit(pl, model, callback, batches=6)

    after = model.state_dict()
    assert len(seen) == 3
    assert all(torch.equal(seen[-1][name], after[name]) for name in after)
    assert not torch.equal(seen[0][a("right")], after[a("right")])
    assert [alert.action for alert in callback.report.alerts] == ["abort"]


def test_stop_ends_the_run_cleanly(pl: Any):
    """``action: stop`` lets the step happen, and ends ``fit`` without an error."""
    callback = GradWatch(for_steps=2, action="stop")
    trainer = fit(pl, made(pl, Detached, "left", "right"), callback, batches=6)

    assert (trainer.global_step, trainer.state.status) == (2, "finished")


def test_errors_of_the_users_get_a_note(pl: Any):
    """An error that training raises says in a note where its cause is, and is the same error."""

    class NoHistory(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.out("left").detach()  # <- here

    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        fit(pl, made(pl, NoHistory, "left"), GradWatch())

    (note,) = (note for note in caught.value.__notes__ if note.startswith("GradWatch"))
    assert f"{Path(__file__).name}:{guilty_line(NoHistory)}" in note


def test_batches_that_a_hook_skips_leave_no_trace(pl: Any):
    """When the module's ``on_train_batch_start`` ends the epoch, the trace ends with it."""
    model = made(pl, Net, "left")
    model.on_train_batch_start = lambda batch, batch_idx: -1
    callback = GradWatch()
    trainer = fit(pl, model, callback)

    assert trainer.global_step == 0
    assert callback.diagnoses == ()


@pytest.mark.parametrize(
    ("missing", "left"),
    [([], 2), (["pytorch_lightning"], 1), (["lightning.pytorch"], 1)],
    ids=str,
)
def test_one_namespace_is_enough(missing: list[str], left: int, monkeypatch: pytest.MonkeyPatch):
    """The bases of the callback are the namespaces that are installed."""
    room: Any = importlib.import_module("gradwatch.lightning")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)

    assert len(room._callbacks()) == left


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    """Without either namespace the import fails with the command that helps."""
    room: Any = importlib.import_module("gradwatch.lightning")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(ImportError, match="pip install pytorch-lightning"):
        room._callbacks()


def test_a_callback_that_was_not_set_up_does_nothing(pl: Any):
    """Hooks without a ``setup`` before them, as in a Trainer that only validates, are harmless."""
    callback, model = GradWatch(), made(pl, Net, "left")
    trainer = trainer_of(pl, callback)
    callback.setup(trainer, model, stage="validate")
    callback.on_train_start(trainer, model)
    callback.on_train_batch_start(trainer, model, None, 0)
    callback.on_before_backward(trainer, model, torch.ones(()))
    callback.on_after_backward(trainer, model)
    callback.on_before_optimizer_step(trainer, model, torch.optim.SGD(model.parameters(), 0.1))
    callback.on_train_batch_end(trainer, model, None, None, 0)
    callback.on_exception(trainer, model, ValueError())
    callback.teardown(trainer, model, stage="validate")

    assert (callback.report, callback.diagnoses) == (Report(step=0), ())


# ---- LightningCLI

CLI_CONFIG = """\
seed_everything: false
model: {{class_path: {module}.{model}}}
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: gradwatch.GradWatch
      init_args:
        every_n_steps: 2
        config:
          trace: never
          {key}: [{{name: silent, when: {{status: missing, for_steps: 2}}, action: stop}}]
"""


@pytest.fixture
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the arguments of pytest from the command line of Lightning, and its deprecations quiet."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def cli(pl: Any, tmp_path: Path, key: str) -> Any:
    """Fit a model from a YAML file, as a command line does."""
    home = importlib.import_module(f"{pl.__name__}.cli")
    demo = importlib.import_module(f"{pl.__name__}.demos.boring_classes")
    path = tmp_path / "cli.yaml"
    path.write_text(CLI_CONFIG.format(module=demo.__name__, model="BoringModel", key=key))
    return home.LightningCLI(
        args=["fit", "--config", str(path)],
        save_config_callback=None,
        seed_everything_default=False,
    )


@pytest.mark.usefixtures("no_arguments")
def test_the_cli_takes_the_callback_from_yaml(pl: Any, tmp_path: Path):
    """A YAML file with ``class_path: gradwatch.GradWatch`` configures the run."""
    ran = cli(pl, tmp_path, "rules")

    (callback,) = (x for x in ran.trainer.callbacks if isinstance(x, GradWatch))
    assert callback.config.log.every_n_steps == 2
    assert callback.config.trace == "never"
    assert [rule.name for rule in callback.config.rules] == ["silent"]
    assert callback.report.statuses == {"layer.weight": OK, "layer.bias": OK}


@pytest.mark.usefixtures("no_arguments")
def test_the_cli_refuses_a_typo(pl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A key inside of ``config`` that does not exist is refused by the parser."""
    with pytest.raises(SystemExit, match="2"):
        cli(pl, tmp_path, "ruels")

    assert "ruels" in capsys.readouterr().err


def test_lightning_modules_may_be_typed(pl: Any):
    """The classes of both namespaces are bases of the callback."""
    assert issubclass(GradWatch, pl.Callback)
