"""The callback for the Trainer of transformers, on real Trainers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradwatch import Cause, DisconnectedParameterError
from gradwatch.sinks import MemorySink
from gradwatch.transformers import GradWatchCallback
from tests.conftest import process_state


@dataclass
class OwnError(ValueError):
    """One that can be compared, and so not be in a set."""

    words: str


class Net(nn.Module):
    """Two branches, of which one is cut off, or not."""

    def __init__(self, *, cut: bool, fails: bool = False) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(2, 1)
        self.cut, self.fails = cut, fails

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        right = self.right(x)
        if self.fails:
            raise OwnError("the user's own")
        right = right.detach() if self.cut else right
        return {"loss": (self.left(x) + right).square().mean()}


DATA = [{"x": torch.tensor([float(i), 1.0])} for i in range(16)]


def trained(
    model: nn.Module,
    folder: Any,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Trainer,
    **options: Any,
) -> dict[str, Tensor]:
    """Train, and return the weights."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    chosen: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 2,
        "remove_unused_columns": False,
    } | options
    arguments = TrainingArguments(str(folder), **chosen)
    kind(model, arguments, train_dataset=DATA, callbacks=list(callbacks)).train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_cut_is_named_and_training_is_the_same(accumulate: int, tmp_path):
    """The cut is diagnosed in the first step, every step is seen, and weights are equal to the bit."""
    sink = MemorySink()
    callback = GradWatchCallback(sinks=[sink], every_n_steps=1)
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulate}
    seen = trained(Net(cut=True), tmp_path, callback, **options)
    alone = trained(Net(cut=True), tmp_path, **options)

    assert [(d.cause, d.parameters) for d in callback.diagnoses] == [
        (Cause.DETACHED, ("right.weight", "right.bias"))
    ]
    assert [report.step for report in sink.reports] == list(range(8 // accumulate))
    assert all(torch.equal(seen[name], alone[name]) for name in alone)


def test_a_healthy_model_is_silent(tmp_path, capsys):
    """Of a model in which everything trains nothing is said, and no hook is left on it."""
    callback = GradWatchCallback()
    model = Net(cut=False)
    trained(model, tmp_path, callback)

    assert callback.diagnoses == ()
    assert "warning" not in capsys.readouterr().err
    assert len(model._forward_hooks) == 0


def test_stop_and_abort_end_the_training(tmp_path):
    """`stop` ends training after the step, and `abort` raises with the diagnosis."""
    sink = MemorySink()
    trained(Net(cut=True), tmp_path, GradWatchCallback(for_steps=3, action="stop", sinks=[sink]))
    assert sink.reports[-1].step == 2

    with pytest.raises(DisconnectedParameterError, match=r"right\.\*"):
        trained(Net(cut=True), tmp_path, GradWatchCallback(for_steps=3, action="abort"))


def test_an_error_of_the_models_leaves_nothing_behind(tmp_path):
    """An exception in the model's forward passes through, and neither trace nor hook is left."""
    model = Net(cut=False, fails=True)
    with pytest.raises(OwnError, match="the user's own"):
        trained(model, tmp_path, GradWatchCallback())

    assert len(model._forward_hooks) == 0
    assert torch.overrides._get_current_function_mode_stack() == []


class Raising(Trainer):
    """Its loss raises, outside of the model."""

    error: BaseException = ValueError("in the loss")

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        super().compute_loss(*args, **kwargs)
        raise self.error


class Interrupted(Raising):
    error = KeyboardInterrupt()


@pytest.mark.parametrize("kind", [Raising, Interrupted])
def test_after_an_error_outside_of_the_model_the_next_module_ends_the_trace(
    kind: type[Raising], tmp_path
):
    """Of such an error no event tells: what GradWatch has in torch goes when any module runs again."""
    model, before = Net(cut=True), process_state()
    with pytest.raises(type(kind.error)):
        trained(model, tmp_path, GradWatchCallback(), kind=kind)

    nn.Linear(2, 1)(torch.ones(1, 2))
    assert process_state() == before
    assert len(model._forward_hooks) == 0


class Detaching(Trainer):
    """Its loss has no history."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs).detach()


def test_an_error_of_the_backward_pass_gets_its_note(tmp_path):
    """A loss without a history is explained, though the Trainer tells of no exception."""
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        trained(Net(cut=True), tmp_path, GradWatchCallback(), kind=Detaching)

    nn.Linear(2, 1)(torch.ones(1, 2))
    (note,) = caught.value.__notes__
    assert "return super().compute_loss(*args, **kwargs).detach()" in note


def test_training_inside_of_an_except_block_is_watched(tmp_path):
    """What the program was about to handle before is no error of the training."""
    callback = GradWatchCallback(every_n_steps=1)
    try:
        (tmp_path / "checkpoint").read_bytes()
    except OSError:
        trained(Net(cut=True), tmp_path, callback)

    assert [d.cause for d in callback.diagnoses] == [Cause.DETACHED]
    assert callback.report.step == 7
