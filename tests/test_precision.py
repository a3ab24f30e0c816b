"""Mixed precision and clipping: norms are those of the gradients themselves, before they are clipped."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradwatch import Cause, GradWatch, Report, Status, Watcher
from gradwatch._stats import scale_left
from gradwatch.sinks import MemorySink
from tests.conftest import QUIET


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def pl(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


class Net:
    """A layer that an optimizer owns, and one that none does."""

    def __init__(self, optimizer: Any = torch.optim.SGD, spoiled: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.loose = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
        self.optimizer, self.spoiled = optimizer, spoiled

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        factor = float("nan") if batch_idx in self.spoiled else 1.0
        batch = batch.to(self.own.weight.dtype)
        return (self.own(batch) + self.loose(batch)).pow(2).mean() * factor

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.own.parameters(), lr=0.01)


def run(
    pl: Any, model: tuple[Any, ...] = (), *, scale: float = 0.0, batches: int = 2, **options: Any
) -> tuple[GradWatch, list[Report]]:
    """Train with every step logged; return the callback and its reports."""
    sink = MemorySink()
    callback = GradWatch(every_n_steps=1, sinks=[sink])
    net = type("Lit", (Net, pl.LightningModule), {})(*model)
    if scale:
        plugin = importlib.import_module(f"{pl.__name__}.plugins").MixedPrecision
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        options["plugins"] = [plugin("16-mixed", "cpu", scaler)]
    torch.manual_seed(1)
    data: Any = DataLoader(torch.randn(batches, 4), batch_size=1)  # type: ignore[arg-type]
    pl.Trainer(**QUIET | {"callbacks": [callback]} | options).fit(net, data)
    return callback, sink.reports


def norms(reports: list[Report]) -> list[dict[str, float]]:
    return [report.norms for report in reports]


def fused(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, fused])
def test_norms_are_unscaled_whatever_the_optimizer(pl: Any, optimizer: Any):
    """Under a GradScaler the norms are those without one, also where the optimizer itself unscales."""
    _, plain = run(pl, (optimizer,), precision="bf16-mixed")
    _, scaled = run(pl, (optimizer,), scale=1024.0)

    assert [list(n) for n in norms(scaled)] == [["own.weight"]] * 2
    assert norms(scaled)[0] == pytest.approx(norms(plain)[0], rel=0.02)
    assert norms(scaled)[1] == pytest.approx(norms(plain)[1], rel=0.02)


def test_where_a_scaler_keeps_its_state_has_not_moved():
    """Before `unscale_` the scale is left in the gradients, afterwards it is not."""
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(layer(torch.ones(1, 2)).sum()).backward()

    before = scale_left(scaler, optimizer)
    scaler.unscale_(optimizer)

    assert (before, scale_left(scaler, optimizer)) == (8.0, 1.0)
    assert scale_left(torch.amp.GradScaler("cpu", enabled=False), optimizer) == 1.0


def test_a_plain_loop_with_a_scaler_has_true_norms():
    """`scaler.step()` is judged with unscaled gradients, with and without a fused optimizer."""
    seen = []
    for make in (torch.optim.SGD, fused):
        torch.manual_seed(0)
        layer, sink = nn.Linear(4, 1), MemorySink()
        optimizer = make(layer.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        watcher = Watcher(
            layer, optimizers=[optimizer], sinks=[sink], every_n_steps=1, scaler=scaler
        )
        with watcher, watcher.step():
            scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        seen.append(sink.reports[0].norms)

    assert seen == [{"weight": 2.0, "bias": 1.0}] * 2


def test_overflows_while_the_scale_is_sought_are_no_fault(
    pl: Any, capsys: pytest.CaptureFixture[str]
):
    """A scale that is too high at first overflows for a while, and nothing is said."""
    callback, reports = run(pl, (torch.optim.SGD,), scale=2.0**127, batches=8)

    assert any("nonfinite" in report.statuses.values() for report in reports)
    assert [d.cause for d in callback.diagnoses] == [Cause.NOT_IN_OPTIMIZER]
    assert [alert for report in reports for alert in report.alerts] == []
    assert "nonfinite" not in capsys.readouterr().err


def test_a_nan_that_lasts_is_told_under_a_scaler_too(pl: Any):
    """A loss that is NaN at every step is diagnosed, whatever the scaler does about it."""
    callback, _ = run(pl, (torch.optim.SGD, tuple(range(6))), scale=8.0, batches=6)

    assert Cause.NONFINITE_GRADIENT in [d.cause for d in callback.diagnoses]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true", "bf16-true", "64-true"])
def test_every_precision_is_watched(pl: Any, precision: str):
    """In each precision the statuses are true, and the norms those of single precision."""
    _, plain = run(pl)
    _, reports = run(pl, precision=precision)

    assert [list(report.statuses.values()) for report in reports] == [[Status.OK, Status.OK]] * 2
    assert norms(reports)[0] == pytest.approx(norms(plain)[0], rel=0.02)


@pytest.mark.parametrize(("algorithm", "expected"), [("norm", 1e-4), ("value", 2e-4)])
def test_the_clipped_norm_stands_beside_the_true_one(pl: Any, algorithm: str, expected: float):
    """With clipping on, norms are those before it, and the total after it is told as well."""
    _, plain = run(pl)
    _, reports = run(pl, gradient_clip_val=1e-4, gradient_clip_algorithm=algorithm)

    assert norms(reports)[0] == norms(plain)[0]
    assert reports[0].total_norm == plain[0].total_norm
    assert reports[0].clipped_norm == pytest.approx(expected, rel=1e-2)
    assert [report.clipped_norm for report in plain] == [None, None]


def test_the_clipped_norm_is_unscaled_too(pl: Any):
    """Clipping under a scaler is told in the gradients' own size."""
    _, reports = run(pl, (torch.optim.SGD,), scale=1024.0, gradient_clip_val=0.01)

    assert [report.clipped_norm for report in reports] == pytest.approx([0.01] * 2, rel=1e-3)


class ByHand(Net):
    """Optimizes by hand, and clips before it steps, or does not."""

    def __init__(self, limit: float | None, between: bool = False) -> None:  # noqa: FBT001, FBT002
        super().__init__()
        self.limit, self.between = limit, between
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        lit: Any = self
        optimizer = lit.optimizers()
        optimizer.zero_grad()
        lit.manual_backward(super().training_step(batch, batch_idx))
        if self.limit is not None:
            lit.clip_gradients(optimizer, self.limit, "norm")
        optimizer.step()


@pytest.mark.parametrize("scale", [0.0, 1024.0])
def test_clipping_by_hand_is_told_from_the_gradients_themselves(pl: Any, scale: float):
    """In manual optimization norms are those before the user's clipping, and the total after it is told."""

    def trained(limit: float | None) -> list[Report]:
        sink = MemorySink()
        net = type("Lit", (ByHand, pl.LightningModule), {})(limit)
        options: dict[str, Any] = {}
        if scale:
            plugin = importlib.import_module(f"{pl.__name__}.plugins").MixedPrecision
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            options["plugins"] = [plugin("16-mixed", "cpu", scaler)]
        torch.manual_seed(1)
        data: Any = DataLoader(torch.randn(1, 4), batch_size=1)  # type: ignore[arg-type]
        callback = GradWatch(every_n_steps=1, sinks=[sink])
        pl.Trainer(**QUIET | {"callbacks": [callback]} | options).fit(net, data)
        return sink.reports

    (free,), (clipped,) = trained(None), trained(1e-4)

    assert clipped.norms == pytest.approx(free.norms, rel=1e-3)
    assert clipped.total_norm == pytest.approx(free.total_norm, rel=1e-3)
    assert free.clipped_norm is None
    assert clipped.clipped_norm == pytest.approx(1e-4 / (scale or 1.0), rel=1e-2)
