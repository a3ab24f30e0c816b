"""Compiled models: seen without compiling anything anew, and run eagerly only where something is wrong."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch._dynamo
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradwatch import Cause, GradWatch, Watcher
from tests.conftest import QUIET

if TYPE_CHECKING:
    from collections.abc import Iterator

FOUND = [(Cause.DETACHED, ("net.a.weight", "net.a.bias"))]


class Net(nn.Module):
    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(2, 8), nn.Dropout(), nn.Linear(8, 1)
        self.cut = cut
        self.eager = 0

    def forward(self, x: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            self.eager += 1
        h = self.drop(self.a(x))
        return self.b(h.detach() if self.cut else h)


class Lit(LightningModule):
    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: Any = Net(cut=cut)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(model: Lit, how: str, backend: str = "aot_eager") -> Any:
    """Compile a model in one of the ways people do, and return what `fit` is given."""
    if how == "submodule":
        model.net = torch.compile(model.net, backend=backend)
    elif how == "in place":
        model.net.compile(backend=backend)
    else:
        return torch.compile(model, backend=backend)
    return model


def train(
    how: str, callback: GradWatch | None, *, cut: bool, backend: str = "aot_eager"
) -> tuple[Any, ...]:
    """Train for six steps; return eager calls, graphs, and weights."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Lit(cut=cut)
    given = compiled(model, how, backend)
    torch.manual_seed(1)
    data: Any = DataLoader(torch.ones(6, 2), batch_size=1)  # type: ignore[arg-type]
    Trainer(**QUIET, callbacks=[] if callback is None else [callback]).fit(given, data)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    net = getattr(model.net, "_orig_mod", model.net)
    return net.eager, graphs, [p.detach().tolist() for p in model.parameters()]


WAYS = pytest.mark.parametrize("how", ["submodule", "in place", "fit"])


@WAYS
def test_a_healthy_compiled_model_is_never_run_eagerly(how: str, caplog: pytest.LogCaptureFixture):
    """Graphs, dropout masks and weights are those of a run without GradWatch, from the first step on."""
    bare = train(how, None, cut=False)
    callback = GradWatch(every_n_steps=1)
    watched = train(how, callback, cut=False)

    assert watched == bare
    assert (bare[0], bare[1], callback.diagnoses) == (0, 1, ())
    assert [record for record in caplog.records if record.name == "gradwatch"] == []


@WAYS
def test_a_cut_in_a_compiled_model_is_found_in_one_eager_step(
    how: str, caplog: pytest.LogCaptureFixture
):
    """Cause and line are found in a single eager step, which is said once, and nothing is compiled anew."""
    _, graphs, _ = train(how, None, cut=True)
    callback = GradWatch()
    eager, graphs_watched, _ = train(how, callback, cut=True)

    assert [(d.cause, d.parameters) for d in callback.diagnoses] == FOUND
    assert callback.diagnoses[0].site is not None
    assert "h.detach()" in (callback.diagnoses[0].site.source or "")
    assert (eager, graphs_watched) == (1, graphs)
    said = [record.getMessage() for record in caplog.records if record.name == "gradwatch"]
    assert [message.partition(",")[0] for message in said] == ["the model is compiled"]


def test_trace_never_keeps_a_compiled_model_compiled():
    """With tracing off no step is eager, and the cause is not made up."""
    callback = GradWatch({"trace": "never"})  # type: ignore[arg-type]
    eager, graphs, _ = train("submodule", callback, cut=True)

    assert (eager, graphs) == (0, 1)
    assert [d.cause for d in callback.diagnoses] == [Cause.UNDETERMINED]


def test_an_error_in_the_eager_step_restores_compilation():
    """After an exception in a traced step the next call is compiled again."""
    torch.manual_seed(0)
    net = Net(cut=True)
    run: Any = torch.compile(net, backend="aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    watcher = Watcher(run, optimizers=[optimizer])
    with pytest.raises(ZeroDivisionError), watcher:
        for step in range(2):
            with watcher.step():
                run(torch.ones(1, 2)).sum().backward()
                if step:
                    raise ZeroDivisionError
                optimizer.step()
    before = net.eager
    run(torch.ones(1, 2))

    assert (before, net.eager) == (1, 1)


@pytest.mark.needs_compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_its_kernels():
    """Under the default backend weights and graphs are those of a run without GradWatch."""
    bare = train("submodule", None, cut=False, backend="inductor")
    watched = train("submodule", GradWatch(every_n_steps=1), cut=False, backend="inductor")

    assert watched == bare
