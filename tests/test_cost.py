"""What watching costs, in counts: kernels, copies, calls, memory and records; and what is said of it."""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import Watcher, diagnose
from gradwatch._cost import WINDOW, Cost
from tests.conftest import Kernels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

HOME = str(Path(gradwatch.__file__).parent)


class Many(nn.Module):
    """Many small parameters, each used once."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(count)])

    def forward(self) -> Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).sum()


class Loop:
    """A watched loop whose first, traced step is over."""

    def __init__(self, count: int, every: int, log_dir: Path | None = None) -> None:
        self.model = Many(count)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.watcher = Watcher(
            self.model, optimizers=[self.optimizer], every_n_steps=every, log_dir=log_dir
        )

    def __enter__(self) -> Self:
        self.watcher.__enter__()
        self.steps(3)
        return self

    def __exit__(self, *error: object) -> None:
        self.watcher.__exit__(None, None, None)

    def steps(self, count: int) -> None:
        for _ in range(count):
            with self.watcher.step():
                self.bare()

    def bare(self) -> None:
        torch.autograd.backward(self.model())
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def our_calls() -> Iterator[Counter[str]]:
    """Count the calls that are made in and from GradWatch's own code."""
    counts: Counter[str] = Counter()

    def note(frame: Any, event: str, arg: Any) -> None:
        del arg
        if event in {"call", "c_call"} and frame.f_code.co_filename.startswith(HOME):
            counts[f"{event} {frame.f_code.co_qualname}"] += 1

    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.setprofile(None)


def calls(loop: Loop) -> Counter[str]:
    """Return the calls of one step."""
    with our_calls() as counts:
        loop.steps(1)
    return counts


def kernels(loop: Loop, *, watched: bool) -> Counter[str]:
    """Return the kernels of one step."""
    with Kernels() as seen:
        loop.steps(1) if watched else loop.bare()
        counts: Counter[str] = seen.counts
    return counts


def test_an_unlogged_step_starts_no_kernel():
    """A step that is not logged dispatches what the bare step does, and no more."""
    with Loop(20, every=1000) as loop:
        assert kernels(loop, watched=True) == kernels(loop, watched=False)


def test_a_logged_step_adds_one_fused_norm_and_one_copy():
    """A logged step adds one fused norm, one stack, and one copy to the host."""
    with Loop(20, every=1) as loop:
        added = kernels(loop, watched=True) - kernels(loop, watched=False)
        assert dict(added) == {"_foreach_norm": 1, "stack": 1}


def test_many_small_gradients_add_one_sum_and_one_copy():
    """A logged step of many small parameters copies them into one tensor, and sums its segments."""
    with Loop(100, every=1) as loop:
        added = kernels(loop, watched=True) - kernels(loop, watched=False)
        del added["view"]  # which is no kernel
        assert dict(added) == {
            "lift_fresh": 1,  # of the sizes, which is no kernel either
            "cat": 1,
            "_to_copy": 1,
            "pow_": 1,
            "segment_reduce": 1,
            "sqrt_": 1,
        }


@pytest.mark.parametrize("every", [1, 1000], ids=["logged", "unlogged"])
def test_calls_do_not_grow_with_parameters(every: int, tmp_path: Path):
    """A step of 1,000 parameters makes as many calls in Python as one of 200: the rest runs in C."""
    found = []
    for count in (200, 1000):
        with Loop(count, every, tmp_path / str(count) if every == 1 else None) as loop:
            found.append(calls(loop))

    assert found[0] == found[1]


@pytest.mark.parametrize("every", [1, 1000], ids=["logged", "unlogged"])
def test_calls_do_not_grow_with_steps(every: int):
    """The hundredth step makes as many calls as the fourth."""
    with Loop(20, every) as loop:
        early = calls(loop)
        loop.steps(100)
        assert calls(loop) == early


@pytest.mark.parametrize("residual", [0, 1])
def test_origins_of_deep_models_take_a_step_for_each_layer(residual: int):
    """Four times the layers whose gradients are all zero make about four times the calls, not sixteen."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            h = self.inner(x).tanh()
            return h + x if residual else h

    found = []
    for count in (30, 120):
        model = nn.Sequential(*[Block() for _ in range(count)])
        with our_calls() as counts, diagnose(model) as diagnosis:
            (model(torch.ones(1, 2)).sum() * 0.0).backward()
        assert {str(d.cause) for d in diagnosis.report.diagnoses} == {"zero_gradient"}
        found.append(counts.total())

    assert found[1] < 5 * found[0]


def test_memory_does_not_grow_with_steps():
    """Two hundred steps that are not logged leave no object behind."""
    with Loop(20, every=10_000) as loop:
        loop.steps(20)
        gc.collect()
        before = len(gc.get_objects())
        loop.steps(200)
        gc.collect()
        assert len(gc.get_objects()) - before < 20


class EmptiesFirst(Loop):
    """The order that most loops have: gradients are held until the next step begins."""

    def bare(self) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(self.model())
        self.optimizer.step()


@pytest.mark.parametrize(("kind", "times"), [(Loop, 2), (EmptiesFirst, 1)], ids=["last", "first"])
def test_a_gradient_is_looked_at_twice_at_most(kind: type[Loop], times: int):
    """In a loop that empties its gradients, each is read twice or once in a step that is not logged."""
    reads = Counter[str]()

    class Read(nn.Parameter):
        @property
        def grad(self) -> Tensor | None:
            if sys._getframe(1).f_code.co_filename.startswith(HOME):
                reads["grad"] += 1
            found: Tensor | None = torch.Tensor.grad.__get__(self)
            return found

        @grad.setter
        def grad(self, value: Tensor | None) -> None:
            torch.Tensor.grad.__set__(self, value)

    with kind(100, every=1000) as loop:
        loop.steps(2)
        weight = loop.model.weights[1]
        weight.__class__ = Read
        loop.steps(10)
        weight.__class__ = nn.Parameter

    assert reads["grad"] == 10 * times


# What is said of it ---------------------------------------------------------------------------------------


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def spend(cost: Cost, clock: Clock, *, own: float, theirs: float, traced: bool = False) -> None:
    """Let one batch pass."""
    cost.begin_batch()
    clock.now += theirs
    began = clock.now
    clock.now += own
    cost.add(began)
    cost.end_batch(traced=traced)


def test_share_is_own_time_over_the_time_of_the_run():
    """One second of ours in ten is a tenth, and what the user does between batches counts as theirs."""
    clock = Clock()
    cost = Cost(clock)
    spend(cost, clock, own=1.0, theirs=4.0)
    clock.now += 5.0

    assert (cost.own, cost.seconds, cost.share) == (1.0, 10.0, 0.1)


def test_a_traced_batch_counts_with_what_it_took_beyond_the_usual():
    """A traced batch of five seconds beside usual ones of two has cost three."""
    clock = Clock()
    cost = Cost(clock)
    spend(cost, clock, own=0.0, theirs=5.0, traced=True)
    spend(cost, clock, own=0.0, theirs=2.0)
    spend(cost, clock, own=0.0, theirs=2.0)

    assert cost.own == 3.0


def test_over_speaks_above_the_budget_alone():
    """A share of two in a hundred is over a budget of one, and under one of five."""
    for budget, said in [(0.01, pytest.approx(0.02)), (0.05, None), (None, None)]:
        clock = Clock()
        cost = Cost(clock)
        answers = []
        for _ in range(WINDOW):
            spend(cost, clock, own=0.02, theirs=0.98)
            answers.append(cost.over(budget))
        assert answers == [None] * (WINDOW - 1) + [said]


def test_budget_measures_less_often_and_says_so(caplog: pytest.LogCaptureFixture):
    """Where watching takes more than its budget, logged steps become rarer; without one they do not."""
    logged = {}
    for budget in (1e-9, None):
        model = Many(3)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        seen: list[bool] = []
        config = {"budget": budget, "log": {"every_n_steps": 1}}
        caplog.clear()
        with Watcher(model, config, optimizers=[optimizer]) as watcher:
            for step in range(3 * WINDOW):
                with watcher.step():
                    torch.autograd.backward(model())
                    optimizer.step()
                    optimizer.zero_grad()
                seen.append(watcher.report.step == step)
        logged[budget] = sum(seen)
        said = [r.getMessage() for r in caplog.records if "budget" in r.getMessage()]
        assert len(said) == (0 if budget is None else 1)

    assert logged[None] == 3 * WINDOW
    assert logged[1e-9] < 3 * WINDOW
    assert caplog.records == []


def test_the_end_says_what_it_cost(caplog: pytest.LogCaptureFixture):
    """The end of a run is logged with the share that watching took."""
    with caplog.at_level(logging.INFO, logger="gradwatch"), Loop(3, every=1):
        pass

    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("GradWatch took")]
    assert len(said) == 1
    assert said[0].endswith(" s")


def test_a_long_run_is_told_on_the_console(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A run that was long enough prints that line, a short one prints nothing."""
    with Loop(3, every=1):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("gradwatch._run.MIN_SECONDS", 0.0)
    with Loop(3, every=1):
        pass

    assert capsys.readouterr().err.strip().startswith("note: GradWatch took ")


def test_a_step_outside_of_every_block_is_said_once(caplog: pytest.LogCaptureFixture):
    """A whole step outside of ``step()`` is not judged, which is said once."""
    with Loop(3, every=1) as loop:
        before = loop.watcher.report
        loop.bare()
        loop.bare()
        assert loop.watcher.report is before
        assert loop.watcher.diagnoses == ()

    assert [r.getMessage()[:42] for r in caplog.records] == [
        "an optimizer stepped outside of `with watc"
    ]
