"""Which terms of a loss reach which parameters, in a plain loop and under Lightning."""

from __future__ import annotations

import linecache
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradwatch import GradWatch, Watcher
from gradwatch.sinks import MemorySink
from tests.conftest import QUIET


class Two(nn.Module):
    """An encoder and a decoder; the prior's term is cut off, or not."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.encoder, self.decoder, self.cut = nn.Linear(2, 2), nn.Linear(2, 2), cut

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x)
        prior = code.square().mean()
        return (self.decoder(code) - x).square().mean(), prior.detach() if self.cut else prior


ENCODER = ("encoder.weight", "encoder.bias")
ALL = (*ENCODER, "decoder.weight", "decoder.bias")


def watched(*, cut: bool, steps: int = 3) -> tuple[Watcher, MemorySink]:
    """Run a plain loop that names its terms."""
    model, sink = Two(cut=cut), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with Watcher(model, optimizers=[optimizer], every_n_steps=1, sinks=[sink]) as watcher:
        for _ in range(steps):
            with watcher.step():
                fit, prior = model(torch.ones(1, 2))
                watcher.loss_terms(fit=fit, prior=prior)
                (fit + prior).backward()
                optimizer.step()
                optimizer.zero_grad()
    return watcher, sink


def messages(sink: MemorySink) -> list[tuple[int, str]]:
    """Return the alerts about terms, by step."""
    alerts = [alert for report in sink.reports for alert in report.alerts]
    return [(a.step, str(a.message)) for a in alerts if a.rule == "loss_terms"]


def test_a_term_that_reaches_nothing_is_said_once_with_its_line():
    """The prior that was detached reaches nothing, which is said once, with cause and line."""
    watcher, sink = watched(cut=True)

    line = Two.forward.__code__.co_firstlineno + 3
    text = linecache.getline(__file__, line).strip()
    place = f"{__file__}:{line}: `{text}`"
    assert watcher.report.terms == {"fit": ALL, "prior": ()}
    assert messages(sink) == [
        (0, f"the loss term `prior` reaches no parameter: `detached` at {place}")
    ]
    assert [report.step for report in sink.reports] == [0, 1, 2]


def test_a_penalty_on_a_derivative_without_a_graph_is_told_the_way_out():
    """A term made of `autograd.grad` without `create_graph=True` says that this is what it lacks."""
    model, sink = nn.Linear(2, 1), MemorySink()
    with Watcher(model, sinks=[sink]) as watcher, watcher.step():
        x = torch.ones(1, 2, requires_grad=True)
        out = model(x).sigmoid().sum()
        (slope,) = torch.autograd.grad(out, x, retain_graph=True)
        watcher.loss_terms(fit=out, penalty=slope.square().sum())
        out.backward()

    ((_, message),) = messages(sink)
    assert message.startswith("the loss term `penalty` reaches no parameter: `no_grad` at ")
    assert message.endswith("(pass `create_graph=True`, so that the result has a history)")


def test_terms_that_reach_something_are_only_reported():
    """Terms that reach parameters are listed with them, and nothing is said."""
    watcher, sink = watched(cut=False)

    assert watcher.report.terms == {"fit": ALL, "prior": ENCODER}
    assert messages(sink) == []


def test_a_number_reaches_nothing():
    """A term that is a number and not a tensor reaches nothing."""
    model, sink = nn.Linear(2, 1), MemorySink()
    with Watcher(model, every_n_steps=1, sinks=[sink]) as watcher, watcher.step():
        out = model(torch.ones(1, 2)).sum()
        watcher.loss_terms(fit=out, weight=0.5)
        out.backward()

    assert messages(sink) == [(0, "the loss term `weight` reaches no parameter")]


def test_terms_cost_nothing_in_a_step_that_is_not_traced():
    """In a step that is not traced, terms are not even looked at."""
    model = nn.Linear(2, 1)

    class Untouchable:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(name)

    with Watcher(model, {"trace": "never"}) as watcher, watcher.step():
        watcher.loss_terms(prior=Untouchable())
        model(torch.ones(1, 2)).sum().backward()

    assert watcher.report.terms == {}


class Returning(pl.LightningModule):
    """Returns its terms beside the loss, and a metric, and a detached copy for the progress bar."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.two = Two(cut=cut)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        fit, prior = self.two(batch)
        shown = fit.detach().sqrt()
        return {"loss": fit + prior, "fit": fit, "prior": prior, "shown": shown, "count": 3}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("cut", [True, False])
def test_lightning_reads_the_dictionary_of_a_training_step(*, cut: bool):
    """What went into the loss is a term, and a detached metric beside it is none."""
    sink = MemorySink()
    callback = GradWatch(every_n_steps=1, sinks=[sink])
    trainer = pl.Trainer(callbacks=[callback], **QUIET)
    trainer.fit(Returning(cut=cut), DataLoader(torch.ones(3, 2)))  # type: ignore[arg-type]

    every = tuple(f"two.{name}" for name in ALL)
    encoder = tuple(f"two.{name}" for name in ENCODER)
    assert callback.report.terms == {"fit": every, "prior": () if cut else encoder}
    assert len(messages(sink)) == int(cut)


class Broken(dict[str, Any]):
    """A dictionary of the user's own that cannot be read."""

    def items(self) -> Any:
        raise KeyError("no items")


def test_a_dictionary_that_cannot_be_read_ends_no_run(caplog: pytest.LogCaptureFixture):
    """What cannot be read of a training step's dictionary is one log record, and training goes on."""
    watcher = Watcher(Two(cut=False))
    with watcher, watcher.step():
        fit, _ = watcher._model(torch.ones(1, 2))
        fit.backward()
        watcher.known_terms(Broken(fit=fit))

    assert [record.getMessage() for record in caplog.records] == [
        "GradWatch failed and has switched itself off; training goes on"
    ]
