from __future__ import annotations

import copy
import inspect
import json
import random
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch import (
    Cause,
    Config,
    ConfigError,
    Diagnosis,
    DisconnectedParameterError,
    GradientAlertError,
    Report,
    Status,
    Watcher,
    diagnose,
)
from gradwatch._words import shown_path
from gradwatch.sinks import MemorySink
from tests.conftest import process_state

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

OK, MISSING, ZERO, FROZEN, NONFINITE, UNSEEN = (
    Status.OK,
    Status.MISSING,
    Status.ZERO,
    Status.FROZEN,
    Status.NONFINITE,
    Status.UNSEEN,
)
PATIENT: dict[str, Any] = {"rules": []}


class Healthy(nn.Module):
    """Two layers, both of which train."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x)).pow(2).mean()


class Detached(Healthy):
    """The first layer is cut off."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).detach()  # <- here
        return self.b(hidden).pow(2).mean()


class Fork(nn.Module):
    """Branches of which the names in ``on`` are added up."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in names})
        self.on = set(names)

    def forward(self, x: Tensor) -> Any:
        return sum(branch(x).sum() for name, branch in self.branches.items() if name in self.on)


def a(name: str) -> str:
    """Return the name of the weight of a branch."""
    return f"branches.{name}.weight"


def batch(size: int = 4) -> Tensor:
    return torch.ones(size, 2)


def guilty_line(owner: Any) -> int:
    """Return the line that is marked in the source."""
    lines, first = inspect.getsourcelines(owner)
    return first + next(i for i, line in enumerate(lines) if "# <- here" in line)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, **options)


class Run:
    """A watched run of a model under one optimizer, step by step."""

    def __init__(self, model: nn.Module, config: Any = None, **options: Any) -> None:
        self.model = model
        self.sink = MemorySink()
        self.written: list[bool] = []
        self.optimizer = options.pop("optimizer", None) or sgd(model)
        self.watcher = Watcher(
            model, config, optimizers=[self.optimizer], sinks=[self.sink], **options
        )

    def __enter__(self) -> Self:
        self.watcher.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.watcher.__exit__(kind, error, traceback)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            with self.watcher.step():
                self.model(batch()).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    @property
    def statuses(self) -> list[dict[str, Status]]:
        return [report.statuses for report in self.sink.reports]

    @property
    def alerts(self) -> list[tuple[int, str, tuple[str, ...]]]:
        return [
            (alert.step, alert.rule, alert.parameters)
            for report in self.sink.reports
            for alert in report.alerts
        ]

    @property
    def traced(self) -> int:
        return self.watcher._schedule.traces


def found(diagnoses: tuple[Diagnosis, ...]) -> list[tuple[Cause, tuple[str, ...]]]:
    return [(diagnosis.cause, diagnosis.parameters) for diagnosis in diagnoses]


# ---- Watcher: loops that change


def told_missing(run: Run) -> dict[int, list[str]]:
    """Return who was missing, by step, where anybody was."""
    missing = {
        report.step: [n for n, status in report.statuses.items() if status is Status.MISSING]
        for report in run.sink.reports
    }
    return {step: names for step, names in missing.items() if names}


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("first", [0, 6])
def test_several_steps_in_one_block_are_steps_with_gradients(*, to_none: bool, first: int):
    """Minibatches of one update, each with its own step in the same block, are never missing."""
    with Run(Healthy(), every_n_steps=1) as run:
        for at in range(12):
            with run.watcher.step():
                for _ in range(2 if at >= first else 1):
                    run.optimizer.zero_grad(set_to_none=to_none)
                    run.model(batch()).backward()
                    run.optimizer.step()

    assert told_missing(run) == {}
    assert found(run.watcher.diagnoses) == []


def test_a_step_behind_its_block_is_judged_in_loops_that_write_over_gradients():
    """A loop that takes to `set_to_none=False` after a while, and steps behind the block, has all its gradients."""
    with Run(Healthy(), every_n_steps=1, for_steps=3) as run:
        for at in range(20):
            late = at >= 6
            with run.watcher.step():
                run.optimizer.zero_grad(set_to_none=late)
                run.model(batch()).backward()
                if not late:
                    run.optimizer.step()
            if late:
                run.optimizer.step()

    assert told_missing(run) == {}
    assert run.alerts == []


def test_a_layer_frozen_midway_is_frozen_where_gradients_are_written_over():
    """The zeros of a layer that was frozen since are no missing gradient, in no step and for no rule."""
    model = Healthy()
    names = [name for name, _ in model.named_parameters()]
    with Run(model, every_n_steps=1, for_steps=2) as run:
        for at in range(12):
            if at == 5:
                model.get_parameter(names[0]).requires_grad_(False)
            with run.watcher.step():
                run.optimizer.zero_grad(set_to_none=False)
                run.model(batch()).backward()
                run.optimizer.step()

    assert told_missing(run) == {}
    assert run.alerts == []
    assert run.statuses[-1][names[0]] is Status.FROZEN


class Routed(nn.Module):
    """An expert that is used on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.expert, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, *, use: bool) -> Tensor:
        h = self.body(x)
        out: Tensor = self.out(self.expert(h) if use else h)
        return out.sum()


def test_an_expert_that_one_of_two_passes_reaches_again_is_not_missing_any_more():
    """Zeros that were left are told from a gradient of one pass where the others get one of two."""
    model = Routed()
    with Run(model, every_n_steps=1, for_steps=5) as run:
        for at in range(24):
            with run.watcher.step():
                run.optimizer.zero_grad(set_to_none=False)
                for micro in range(2):
                    model(torch.ones(2, 3), use=micro == 0 and not 4 <= at <= 6).backward()
                run.optimizer.step()

    # The first step with zeros is taken for one with a gradient, until a traced one tells.
    assert told_missing(run) == {step: ["expert.weight", "expert.bias"] for step in (5, 6)}
    assert run.alerts == []


def test_weights_tied_midway_beside_a_frozen_one_switch_nothing_off(
    caplog: pytest.LogCaptureFixture,
):
    """A model that has lost a name in the middle of a run is watched on under those that are left."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias.requires_grad_(False)
    optimizer = sgd(model)
    sink = MemorySink()
    config = {"trace": "never"}
    with Watcher(model, config, optimizers=[optimizer], every_n_steps=1, sinks=[sink]) as watcher:
        for at in range(6):
            if at == 3:
                model[2].weight = model[0].weight
            with watcher.step():
                optimizer.zero_grad()
                model(torch.ones(2, 4)).sum().backward()
                optimizer.step()

    assert [r for r in caplog.records if r.name == "gradwatch"] == []
    assert sorted(sink.reports[-1].statuses) == [
        "0.bias",
        "0.weight",
        "1.bias",
        "1.weight",
        "2.bias",
    ]


# ---- Watcher: statuses, norms, diagnoses


def test_healthy_model_stays_silent(capsys: pytest.CaptureFixture[str]):
    """A model whose parameters all train makes no report but the logged ones, and no output."""
    with Run(Healthy(), every_n_steps=5) as run:
        run.step(12)

    assert [report.step for report in run.sink.reports] == [4, 9]
    assert run.statuses == [{"a.weight": OK, "b.weight": OK}] * 2
    assert run.watcher.diagnoses == ()
    assert run.traced == 1
    assert capsys.readouterr() == ("", "")


def test_missing_gradient_is_diagnosed_in_the_first_step(capsys: pytest.CaptureFixture[str]):
    """The first report names parameter, cause and line; nothing is said again after it."""
    with Run(Detached(), PATIENT) as run:
        run.step(5)

    (report,) = run.sink.reports
    (diagnosis,) = report.diagnoses
    assert report.statuses == {"a.weight": MISSING, "b.weight": OK}
    assert (diagnosis.cause, diagnosis.parameters) == (Cause.DETACHED, ("a.weight",))
    assert diagnosis.site is not None
    assert (diagnosis.site.file, diagnosis.site.line) == (__file__, guilty_line(Detached))
    assert run.watcher.report == report
    assert run.watcher.diagnoses == report.diagnoses
    assert capsys.readouterr().err.count("warning[detached]") == 1


def test_norms_are_measured_on_logged_steps_only():
    """Norms are those of the gradients before the step, every N steps, and empty otherwise."""
    with Run(Detached(), PATIENT, every_n_steps=3) as run:
        run.step(2)
        run.model(batch()).backward()
        gradient = run.model.get_parameter("b.weight").grad
        assert gradient is not None
        expected = gradient.norm().item()
        run.optimizer.zero_grad()
        run.step(4)

    assert [(r.step, r.logged) for r in run.sink.reports] == [(0, False), (2, True), (5, True)]
    assert run.sink.reports[0].norms == {}
    assert run.sink.reports[0].total_norm is None
    assert run.sink.reports[1].norms == {"b.weight": pytest.approx(expected)}
    assert run.sink.reports[1].total_norm == pytest.approx(expected)


def test_unlogged_steps_cost_no_kernel_and_no_copy():
    """A step that is neither logged nor traced runs no operation of torch's and reads no value."""
    model = Healthy()
    optimizer = sgd(model)
    watcher = Watcher(model, optimizers=[optimizer], every_n_steps=3)
    watcher.begin([optimizer])
    ran = [watched_step(watcher, model, optimizer) for _ in range(3)]
    watcher.close()

    assert ran[1] == Counter()
    assert ran[2]["_foreach_norm"] == 1
    assert ran[2]["copies"] == 1


def watched_step(watcher: Watcher, model: nn.Module, optimizer: Any) -> Counter[str]:
    """Count what the watcher runs in one step, the step itself left out."""
    counts: Counter[str] = Counter()

    class Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            counts[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    class Copies(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            counts["copies"] += func in {Tensor.tolist, Tensor.item, Tensor.numpy}
            return func(*args, **(kwargs or {}))

    watcher.begin_batch()
    loss = model(batch())
    with Copies(), Kernels():
        watcher.before_backward()
    loss.backward()
    with Copies(), Kernels():
        watcher.after_backward()
        watcher.before_step(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    with Copies(), Kernels():
        watcher.end_batch()
    return +counts


def test_without_optimizers_a_step_is_judged_at_its_end():
    """A watcher without optimizers speaks of every parameter when the block ends."""
    model = Detached()
    sink = MemorySink()
    with Watcher(model, PATIENT, sinks=[sink], every_n_steps=2) as watcher:
        for _ in range(4):
            model.zero_grad()
            with watcher.step():
                model(batch()).backward()

    assert [report.step for report in sink.reports] == [0, 1, 3]
    assert [r.statuses for r in sink.reports] == [{"a.weight": MISSING, "b.weight": OK}] * 3
    assert found(watcher.diagnoses) == [(Cause.DETACHED, ("a.weight",))]


def test_several_backwards_are_one_step():
    """Gradients of every backward in a step count, and the norm is that of their sum."""
    run = Run(Fork("left", "right", "never"), PATIENT, every_n_steps=1)
    with run:
        for _ in range(2):
            with run.watcher.step():
                for names in ({"left"}, {"right"}, {"right"}):
                    run.model.on = names  # type: ignore[assignment]
                    run.model(batch(1)).backward()
                run.optimizer.step()
                run.optimizer.zero_grad()

    statuses = {a("left"): OK, a("right"): OK, a("never"): MISSING}
    assert run.statuses == [statuses] * 2
    assert run.sink.reports[1].norms == pytest.approx({a("left"): 2**0.5, a("right"): 2 * 2**0.5})
    assert found(run.watcher.diagnoses) == [(Cause.UNUSED, (a("never"),))]


def test_gradients_accumulate_over_blocks():
    """A gradient that arrived in an earlier block counts for the step that comes after."""
    run = Run(Fork("first", "last", "never"), PATIENT, every_n_steps=1)
    with run:
        for _ in range(3):
            for name in ("first", "last"):
                run.model.on = {name}  # type: ignore[assignment]
                with run.watcher.step():
                    run.model(batch()).backward()
                    if name == "last":
                        run.optimizer.step()
                        run.optimizer.zero_grad()

    statuses = {a("first"): OK, a("last"): OK, a("never"): MISSING}
    assert run.statuses == [statuses] * 3
    assert found(run.watcher.diagnoses) == [(Cause.UNUSED, (a("never"),))]


def test_a_step_between_blocks_is_judged_too():
    """An optimizer that steps after the block is judged with what arrived in it."""
    run = Run(Fork("used", "never"), PATIENT, every_n_steps=2)
    with run:
        for _ in range(4):
            run.model.on = {"used"}  # type: ignore[assignment]
            with run.watcher.step():
                run.model(batch()).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

    assert [(r.step, r.batch, r.logged) for r in run.sink.reports] == [
        (0, 0, False),
        (1, 1, True),
        (3, 3, True),
    ]
    assert run.statuses == [{a("used"): OK, a("never"): MISSING}] * 3


def test_zeros_left_after_a_step_are_missing():
    """A parameter that no longer trains is missing though its gradient is zero and not None."""
    with Run(Fork("left", "right"), PATIENT, every_n_steps=1) as run:
        for names in ({"left", "right"}, {"left"}, {"left"}):
            run.model.on = names  # type: ignore[assignment]
            with run.watcher.step():
                run.model(batch()).backward()
                run.optimizer.step()
                run.optimizer.zero_grad(set_to_none=False)

    assert run.statuses == [
        {a("left"): OK, a("right"): OK},
        {a("left"): OK, a("right"): MISSING},
        {a("left"): OK, a("right"): MISSING},
    ]


def test_closures_are_judged_after_they_ran():
    """An optimizer that is given a closure is judged by the gradients of that closure."""
    model = Fork("used", "never")
    model.on = {"used"}
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(batch()).pow(2)
        loss.backward()
        return loss

    with Run(model, PATIENT, every_n_steps=1, optimizer=optimizer) as run:
        for _ in range(2):
            with run.watcher.step():
                optimizer.step(closure)

    assert [report.step for report in run.sink.reports] == [0, 1]
    assert run.statuses == [{a("used"): OK, a("never"): MISSING}] * 2


def test_each_optimizer_reports_its_own_parameters():
    """A report speaks of the parameters of the optimizer that stepped, and counts all steps."""
    model = Fork("left", "right")
    optimizers = [torch.optim.SGD(branch.parameters(), 0.01) for branch in model.branches.values()]
    sink = MemorySink()
    options: Any = {"optimizers": optimizers, "sinks": [sink], "every_n_steps": 1}
    with Watcher(model, PATIENT, **options) as watcher:
        for _ in range(2):
            with watcher.step():
                for name, optimizer in zip(("left", "right"), optimizers, strict=True):
                    model.on = {name}
                    model(batch()).backward()
                    optimizer.step()
                    optimizer.zero_grad()

    assert [(r.step, r.batch, r.optimizer, r.statuses) for r in sink.reports] == [
        (0, 0, 0, {a("left"): OK}),
        (1, 0, 1, {a("right"): OK}),
        (2, 1, 0, {a("left"): OK}),
        (3, 1, 1, {a("right"): OK}),
    ]
    assert watcher.diagnoses == ()


def test_streaks_count_the_steps_of_the_owner():
    """An optimizer that steps half as often has streaks that grow half as fast."""
    model = Fork("often", "rare")
    model.on = set()
    extra = nn.Parameter(torch.ones(2))
    often, rare = (torch.optim.SGD(b.parameters(), 0.01) for b in model.branches.values())
    sink = MemorySink()
    with Watcher(model, optimizers=[often, rare], sinks=[sink], for_steps=3) as watcher:
        for step in range(6):
            with watcher.step():
                extra.sum().backward()
                often.step()
                if step % 2:
                    rare.step()

    alerts = [(x.step, x.parameters, x.steps) for r in sink.reports for x in r.alerts]
    assert alerts == [(3, (a("often"),), 3), (8, (a("rare"),), 3)]


def test_every_status_is_told():
    """Each parameter of a model has the status of its gradient."""
    model = Fork("fine", "zero", "nonfinite", "frozen", "missing")
    model.branches["frozen"].requires_grad_(requires_grad=False)
    weights = [torch.tensor(x) for x in (1.0, 0.0, float("inf"), 1.0)]

    def loss() -> Any:
        outs = [branch(batch()).sum() for branch in list(model.branches.values())[:4]]
        return sum(out * weight for out, weight in zip(outs, weights, strict=True))

    sink = MemorySink()
    with Watcher(model, PATIENT, sinks=[sink], every_n_steps=1) as watcher, watcher.step():
        loss().backward()

    assert sink.reports[0].statuses == {
        a("fine"): OK,
        a("zero"): ZERO,
        a("nonfinite"): NONFINITE,
        a("frozen"): FROZEN,
        a("missing"): MISSING,
    }


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters_are_unseen_until_they_have_a_shape():
    """A parameter that no input has given a shape is not called missing."""
    model = Fork("used")
    model.branches["lazy"] = nn.LazyLinear(1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with Run(model, every_n_steps=1, optimizer=optimizer) as run:
        with run.watcher.step():
            run.model(batch()).backward()
            run.watcher._before_plain_step(optimizer, (optimizer,), {})
            run.model.zero_grad()
        run.model.on = {"used", "lazy"}  # type: ignore[assignment]
        run.step()

    assert run.statuses == [{a("used"): OK, a("lazy"): UNSEEN}, {a("used"): OK, a("lazy"): OK}]
    assert run.watcher.diagnoses == ()


def test_zero_gradients_are_a_note():
    """A gradient that is always zero is diagnosed as a note, in the second traced step."""
    model = Healthy()
    nn.init.zeros_(model.b.weight)

    with Run(model, PATIENT, optimizer=torch.optim.SGD(model.parameters(), 0.0)) as run:
        run.step(4)

    (diagnosis,) = (d for d in run.watcher.diagnoses if "a.weight" in d.parameters)
    assert (diagnosis.cause, diagnosis.status) == (Cause.ZERO_GRADIENT, ZERO)
    assert (diagnosis.severity, diagnosis.step) == ("note", 1)


def test_tied_parameters_are_one_in_reports():
    """A tied parameter stands in a report once, with its names as aliases."""
    model = Healthy()
    model.b = nn.Linear(2, 2, bias=False)
    model.b.weight = model.a.weight
    with Run(model, every_n_steps=1) as run:
        run.step()

    assert run.statuses == [{"a.weight": OK}]
    assert run.watcher.report.aliases == {"a.weight": ("a.weight", "b.weight")}


# ---- Watcher: traces


def test_a_grown_set_is_traced_again():
    """A parameter that stops training later is diagnosed in the step after that."""
    with Run(Fork("left", "right"), PATIENT) as run:
        run.step(3)
        run.model.on = {"left"}  # type: ignore[assignment]
        run.step(3)

    assert found(run.watcher.diagnoses) == [(Cause.UNUSED, (a("right"),))]
    assert [diagnosis.step for diagnosis in run.watcher.diagnoses] == [4]
    assert run.traced == 2


def test_no_more_than_ten_steps_are_traced():
    """A run in which something new goes wrong over and over is traced ten times."""
    names = [f"branch{i}" for i in range(15)]
    with Run(Fork(*names), PATIENT) as run:
        for count in range(15, 0, -1):
            run.model.on = set(names[:count])  # type: ignore[assignment]
            run.step(2)

    assert run.traced == 10
    assert [parameters for _, parameters in found(run.watcher.diagnoses)] == [
        (a(f"branch{i}"),) for i in range(14, 5, -1)
    ]


def test_without_traces_the_cause_is_undetermined():
    """``trace: never`` still tells which parameters are missing, and of zeros that they are."""
    with Run(Detached(), PATIENT | {"trace": "never"}, every_n_steps=1) as run:
        run.step(3)

    assert found(run.watcher.diagnoses) == [(Cause.UNDETERMINED, ("a.weight",))]
    assert run.watcher.diagnoses[0].site is None
    assert run.traced == 0


def test_healthy_model_without_traces_stays_silent():
    """``trace: never`` says nothing of a model that trains."""
    with Run(Healthy(), {"trace": "never"}) as run:
        run.step(3)

    assert run.sink.reports == []


def test_healing_is_told_once(capsys: pytest.CaptureFixture[str]):
    """A diagnosis ends in the step in which a gradient arrives again, and that is said once."""
    with Run(Fork("left", "right"), PATIENT, every_n_steps=5) as run:
        run.model.on = {"left"}  # type: ignore[assignment]
        run.step(2)
        run.model.on = {"left", "right"}  # type: ignore[assignment]
        run.step(3)

    told = [[(d.step, d.healed_at) for d in report.diagnoses] for report in run.sink.reports]
    assert [report.step for report in run.sink.reports] == [0, 2, 4]
    assert told == [[(0, None)], [(0, 2)], []]
    assert [(d.step, d.healed_at) for d in run.watcher.diagnoses] == [(0, 2)]
    assert capsys.readouterr().err.count("gets a gradient since step 2") == 1


def test_a_lasting_relapse_is_diagnosed_anew():
    """What heals and then stays away for ten steps makes a second diagnosis."""
    with Run(Fork("left", "right"), PATIENT) as run:
        for names, times in (({"left"}, 1), ({"left", "right"}, 1), ({"left"}, 12)):
            run.model.on = names  # type: ignore[assignment]
            run.step(times)

    assert [(d.step, d.healed_at) for d in run.watcher.diagnoses] == [(0, 1), (12, None)]


def test_a_parameter_of_an_optimizer_that_steps_in_turn_is_diagnosed():
    """A trace that met another optimizer's step is repeated until the sought one steps."""

    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.never = (nn.Linear(2, 1) for _ in range(3))

    model = Turns()
    first = torch.optim.SGD(model.a.parameters(), 0.1)
    second = torch.optim.SGD([*model.b.parameters(), *model.never.parameters()], 0.1)

    with Watcher(model, PATIENT, optimizers=[first, second]) as watcher:
        for i in range(8):
            layer, optimizer = ((model.a, first), (model.b, second))[i % 2]
            with watcher.step():
                optimizer.zero_grad()
                layer(batch()).sum().backward()
                optimizer.step()

    assert found(watcher.diagnoses) == [(Cause.UNUSED, ("never.weight", "never.bias"))]


def test_what_comes_and_goes_is_said_once():
    """A branch that is dropped in some steps is diagnosed once, and healed once."""
    with Run(Fork("left", "right"), PATIENT) as run:
        for _ in range(5):
            run.model.on = {"left"}  # type: ignore[assignment]
            run.step(2)
            run.model.on = {"left", "right"}  # type: ignore[assignment]
            run.step()

    assert [(d.step, d.healed_at) for d in run.watcher.diagnoses] == [(0, 2)]


def test_globs_that_match_nothing_are_named_once(caplog: pytest.LogCaptureFixture):
    """A glob that no parameter matches, of the contract, a rule or what is watched, is in one log record."""
    contract = [{"parameters": ["teecher.*", "*"], "gradient": "required"}]
    watch = {"include": ["*", "haed.*"], "exclude": "frozn.*"}

    with Run(Healthy(), {"contract": contract, "rules": [], "watch": watch}) as run:
        run.step()

    assert [record.getMessage() for record in caplog.records] == [
        "no parameter matches `haed.*`, `frozn.*`, and `teecher.*` of the configuration"
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"tensorboard": {"scalars": "sometimes"}},
            "no parameter matches `sometimes` of the configuration",
        ),
        (
            {"watch": {"exclude": "*"}},
            "`watch` in the configuration leaves out every parameter: nothing is watched",
        ),
    ],
    ids=["another word", "everything left out"],
)
def test_a_configuration_that_does_nothing_is_told(config, words, caplog):
    """A word that was taken for a glob, and a `watch` that leaves nothing, are in one log record."""
    with Run(Healthy(), config) as run:
        run.step()

    assert [record.getMessage() for record in caplog.records] == [words]


def test_something_else_than_a_scaler_is_refused():
    """What cannot tell a scale is an error at once, with what was found."""
    with pytest.raises(TypeError, match=r"expected a GradScaler, found `str`"):
        Watcher(Healthy(), scaler="x")


def test_many_optimizers_inside_of_backward_are_said_once(caplog):
    """Of optimizers that step inside of backward, one for each parameter, one line tells."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def step(parameter: Any) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with Watcher(model) as watcher:
        for _ in range(3):
            with watcher.step():
                model(torch.ones(1, 2)).mean().backward()

    said = [record.getMessage() for record in caplog.records]
    assert sum("steps inside of backward" in text for text in said) == 1


def test_the_first_use_draws_no_random_number():
    """What GradWatch imports where it is used first leaves Python's random numbers as they are."""
    script = (
        "import random, torch, gradwatch; random.seed(0); state = random.getstate(); "
        "gradwatch.Watcher(torch.nn.Linear(2, 1)); gradwatch.GradWatch; assert random.getstate() == state"
    )
    subprocess.run([sys.executable, "-c", script], check=True)  # noqa: S603 -- our own


def test_a_diagnosis_heals_when_all_of_its_parameters_do():
    """A diagnosis of two parameters holds as long as one of them gets no gradient."""
    with Run(Fork("left", "right", "rest"), PATIENT) as run:
        model, (weight, bias) = run.model, (nn.Parameter(torch.ones(2)) for _ in range(2))
        cut = nn.ParameterList([weight, bias])
        model.add_module("cut", cut)
        run.optimizer.add_param_group({"params": [weight, bias]})
        for parts in ((), (weight,), (weight, bias)):
            with run.watcher.step():
                loss = model(batch()) + (weight * bias).detach().sum()
                (loss + sum(part.sum() for part in parts)).backward()
                run.optimizer.step()
                run.optimizer.zero_grad()

    (diagnosis,) = run.watcher.diagnoses
    assert (diagnosis.cause, diagnosis.parameters) == (Cause.DETACHED, ("cut.0", "cut.1"))
    assert (diagnosis.step, diagnosis.healed_at) == (0, 2)


def test_gradient_emptied_before_the_step_is_cleared():
    """A ``zero_grad`` between backward and step is named as the cause, with its line."""
    with Run(Healthy(), PATIENT) as run, run.watcher.step():
        run.model(batch()).backward()
        run.model.zero_grad()  # <- here
        run.optimizer.step()

    (diagnosis,) = run.watcher.diagnoses
    assert (diagnosis.cause, diagnosis.parameters) == (Cause.CLEARED, ("a.weight", "b.weight"))
    assert diagnosis.site is not None
    assert diagnosis.site.line == guilty_line(test_gradient_emptied_before_the_step_is_cleared)


def test_gradient_zeroed_before_the_step_is_cleared():
    """Emptying gradients in place is the same mistake, in whatever way."""
    with Run(Healthy(), PATIENT) as run, run.watcher.step():
        run.model(batch()).backward()
        run.model.zero_grad(set_to_none=False)  # <- here
        run.optimizer.step()

    (diagnosis,) = run.watcher.diagnoses
    assert (diagnosis.cause, diagnosis.parameters) == (Cause.CLEARED, ("a.weight", "b.weight"))


# ---- Watcher: optimizers


def test_parameters_in_no_optimizer_are_named():
    """A parameter that no optimizer holds is diagnosed whatever its gradient is."""
    model = Healthy()
    optimizer = torch.optim.SGD(model.a.parameters(), 0.01)
    with Run(model, PATIENT, optimizer=optimizer, every_n_steps=1) as run:
        run.step(3)

    assert found(run.watcher.diagnoses) == [(Cause.NOT_IN_OPTIMIZER, ("b.weight",))]
    assert run.statuses[0] == {"a.weight": OK, "b.weight": OK}


def test_parameters_in_no_optimizer_are_said_once_with_several():
    """A parameter in no optimizer that trains in the steps of one stays that one diagnosis."""
    model = Fork("left", "right", "orphan")
    optimizers = [torch.optim.SGD(model.branches[n].parameters(), 0.01) for n in ("left", "right")]
    with Watcher(model, PATIENT, optimizers=optimizers) as watcher:
        for _ in range(4):
            with watcher.step():
                for names, optimizer in zip(
                    ({"left", "orphan"}, {"right"}), optimizers, strict=True
                ):
                    model.on = names
                    model(batch()).backward()
                    optimizer.step()
                    model.zero_grad()

    assert found(watcher.diagnoses) == [(Cause.NOT_IN_OPTIMIZER, (a("orphan"),))]
    assert watcher._schedule.traces == 1


def test_frozen_and_meant_parameters_outside_are_not_named():
    """A frozen parameter, or one that the contract expects no gradient for, needs no optimizer."""
    model = Fork("used", "frozen", "teacher")
    model.on = {"used", "frozen"}
    model.branches["frozen"].requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model.branches["used"].parameters(), 0.01)
    contract = [{"parameters": "*.teacher.*", "gradient": "none"}]
    with Run(model, {"contract": contract}, optimizer=optimizer) as run:
        run.step(3)

    assert run.watcher.diagnoses == ()


def test_a_group_added_later_ends_the_diagnosis():
    """A parameter that an optimizer is given later is no orphan any more."""
    model = Healthy()
    optimizer = torch.optim.SGD(model.a.parameters(), 0.01)
    with Run(model, PATIENT, optimizer=optimizer) as run:
        run.step(2)
        optimizer.add_param_group({"params": model.b.parameters()})
        run.step(2)

    assert [(d.cause, d.healed_at) for d in run.watcher.diagnoses] == [(Cause.NOT_IN_OPTIMIZER, 2)]


def test_hooks_on_optimizers_are_gone_afterwards():
    """After the block an optimizer has the hooks it had before, also after an error."""
    model = Healthy()
    optimizer = sgd(model)
    home = sys.modules["torch.optim.optimizer"]  # `torch.optim` hides it
    hooks = (home._global_optimizer_pre_hooks, home._global_optimizer_post_hooks)
    with Watcher(model, optimizers=[optimizer]):
        during = [len(hook) for hook in hooks]
    with pytest.raises(KeyError, match="mine"), Watcher(model, optimizers=[optimizer]):
        raise KeyError("mine")

    assert during == [1, 1]
    assert [len(hook) for hook in hooks] == [0, 0]


# ---- Watcher: rules and the contract


def test_a_rule_warns_once_and_again_after_healing(capsys: pytest.CaptureFixture[str]):
    """``disconnected`` speaks once per streak, and a new streak makes it speak again."""
    with Run(Fork("left", "right"), for_steps=2) as run:
        for names in ({"left"}, {"left", "right"}, {"left"}):
            run.model.on = names  # type: ignore[assignment]
            run.step(4)

    assert run.alerts == [
        (1, "disconnected", (a("right"),)),
        (9, "disconnected", (a("right"),)),
    ]
    assert capsys.readouterr().err.count("disconnected") == 2


def test_an_action_can_be_silent(capsys: pytest.CaptureFixture[str]):
    """``action: log`` reaches the sinks, and not the console."""
    with Run(Fork("left", "right"), {"trace": "never"}, for_steps=2, action="log") as run:
        run.model.on = {"left"}  # type: ignore[assignment]
        run.step(4)

    assert run.alerts == [(1, "disconnected", (a("right"),))]
    assert "disconnected" not in capsys.readouterr().err


def test_stop_asks_the_loop_to_stop():
    """``action: stop`` raises nothing and sets ``should_stop``."""
    with Run(Detached(), for_steps=2, action="stop") as run:
        run.step()
        before = run.watcher.should_stop
        run.step()

    assert (before, run.watcher.should_stop) == (False, True)


def test_abort_comes_before_the_optimizer_writes():
    """``action: abort`` raises with the diagnosis in its text, and no weight has moved."""
    run = Run(Detached(), for_steps=3, action="abort")
    before: dict[str, Tensor] = {}
    with (
        run,
        pytest.raises(
            DisconnectedParameterError,
            match=r"rule `disconnected` ended the run: `a.weight` got no gradient[\s\S]*detached",
        ),
    ):
        for _ in range(5):
            before.update(copy.deepcopy(run.model.state_dict()))
            run.step()

    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert run.alerts == [(2, "disconnected", ("a.weight",))]


def test_abort_carries_its_report():
    """The error of an abort holds the report of the step that ended the run."""
    run = Run(Detached(), for_steps=1, action="abort")
    with run, pytest.raises(DisconnectedParameterError, match="detached") as caught:
        run.step()

    assert caught.value.report == run.watcher.report
    assert caught.value.report.statuses == {"a.weight": MISSING, "b.weight": OK}


def test_abort_over_a_norm_is_a_plain_alert_error():
    """A rule over norms ends the run with the general error, not with the one for missing."""
    rules = [{"name": "loud", "when": {"norm_above": 0}, "action": "abort"}]
    run = Run(Healthy(), {"rules": rules}, every_n_steps=2)
    with run, pytest.raises(GradientAlertError, match="loud") as caught:
        run.step(3)

    assert type(caught.value) is GradientAlertError
    assert run.alerts == [(1, "loud", ("a.weight", "b.weight"))]


def test_abort_without_optimizers_comes_at_the_end_of_the_step():
    """Without optimizers the error is raised when the block ends."""
    model = Detached()
    passed = []
    with (
        Watcher(model, for_steps=1, action="abort") as watcher,
        pytest.raises(DisconnectedParameterError, match=r"a\.weight"),
        watcher.step(),
    ):
        model(batch()).backward()
        passed.append("backward")

    assert passed == ["backward"]


def test_contract_of_none_silences():
    """What is meant to get no gradient is neither diagnosed nor counted by a rule."""
    contract = [{"parameters": "a.*", "gradient": "none", "reason": "pretrained"}]
    with Run(Detached(), {"contract": contract}, for_steps=1) as run:
        run.step(4)

    assert run.sink.reports == []
    assert run.traced == 1


def test_contract_of_none_is_broken_by_a_gradient(capsys: pytest.CaptureFixture[str]):
    """What is meant to get no gradient and gets one is reported once, with its reason."""
    contract = [{"parameters": "a.*", "gradient": "none", "reason": "an EMA teacher"}]
    with Run(Healthy(), {"contract": contract}) as run:
        run.step(4)

    assert run.alerts == [(0, "contract", ("a.weight",))]
    assert "an EMA teacher" in capsys.readouterr().err


def test_contract_of_intermittent_is_patient():
    """A parameter that trains now and then is silent until it was missing for ``within`` steps."""
    contract = [{"parameters": "*right*", "gradient": "intermittent", "within": 4}]
    with Run(Fork("left", "right"), {"contract": contract}, for_steps=1) as run:
        for count, names in ((3, {"left"}), (1, {"left", "right"}), (4, {"left"})):
            run.model.on = names  # type: ignore[assignment]
            run.step(count)

    assert run.alerts == [(7, "disconnected", (a("right"),)), (7, "contract", (a("right"),))]
    assert run.watcher.diagnoses == ()


def test_excluded_parameters_are_not_watched():
    """Only what ``include`` matches and ``exclude`` does not stands in reports."""
    watch = {"include": ["branches.a*", "branches.b*"], "exclude": "*b2*"}
    model = Fork("a1", "b1", "b2", "c1")
    model.on = {"a1"}
    with Run(model, PATIENT | {"watch": watch}) as run:
        run.step(2)

    assert run.statuses == [{a("a1"): OK, a("b1"): MISSING}]
    assert found(run.watcher.diagnoses) == [(Cause.UNUSED, (a("b1"),))]


def test_exclude_matches_any_name_of_a_tied_parameter():
    """A tied parameter is left out by any of its names."""
    model = Healthy()
    model.b = nn.Linear(2, 2, bias=False)
    model.b.weight = model.a.weight
    model.c = nn.Linear(2, 2, bias=False)
    with Run(model, PATIENT | {"watch": {"exclude": "b.*"}}) as run:
        run.step()

    assert run.statuses == [{"c.weight": MISSING}]


# ---- Watcher: files, state, errors


def test_reports_are_written_as_json_lines(tmp_path: Path):
    """Each report of a run is a line of JSON that reads back as the same report."""
    path = tmp_path / "reports.jsonl"
    config = PATIENT | {"log": {"jsonl": str(path), "every_n_steps": 2}}
    with Run(Detached(), config) as run:
        run.step(4)

    lines = path.read_text().splitlines()
    assert [Report.from_dict(json.loads(line)) for line in lines] == run.sink.reports
    assert [report.step for report in run.sink.reports] == [0, 1, 3]


def test_log_dir_gets_tensorboard_files(tmp_path: Path):
    """``log_dir`` holds what TensorBoard shows: the status of every parameter at each logged step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Run(Detached(), PATIENT, log_dir=tmp_path / "runs", every_n_steps=1) as run:
        run.step(3)

    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    (tag,) = (tag for tag in events.Tags()["scalars"] if tag.endswith("status/a.weight"))
    scalars = events.Scalars(tag)
    assert [(s.step, s.value) for s in scalars] == [(step, MISSING.code) for step in range(3)]


def test_a_process_that_does_not_write_has_its_own_sinks_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With ``writes=False``, as on other ranks, nothing is printed and no file is made."""
    model, sink = Detached(), MemorySink()
    optimizer = sgd(model)
    config = PATIENT | {"log": {"jsonl": str(tmp_path / "reports.jsonl")}}
    watcher = Watcher(model, config, log_dir=tmp_path / "runs", sinks=[sink])
    watcher.begin([optimizer], writes=False)
    watcher.begin_batch()
    watcher.before_backward()
    model(batch()).backward()
    watcher.after_backward()
    watcher.before_step(optimizer)
    watcher.end_batch()
    watcher.close()

    assert [report.statuses for report in sink.reports] == [{"a.weight": MISSING, "b.weight": OK}]
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_without_being_asked(empty_folder: Path):
    """A run without ``log_dir`` and ``jsonl`` leaves no file."""
    with Run(Detached()) as run:
        run.step(2)

    assert list(empty_folder.iterdir()) == []


def test_state_survives_a_checkpoint(tmp_path: Path):
    """Streaks, steps and batches go on where a checkpoint that holds plain values left them."""
    with Run(Detached(), for_steps=5, every_n_steps=3) as first:
        first.step(4)
        torch.save(first.watcher.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Run(Detached(), for_steps=5, every_n_steps=3)
    second.watcher.load_state_dict(state)
    before = second.watcher.state_dict()
    with second:
        second.step(2)

    assert before == state
    assert second.alerts == [(4, "disconnected", ("a.weight",))]
    assert [(r.step, r.batch, r.logged) for r in second.sink.reports] == [
        (4, 4, False),
        (5, 5, True),
    ]


def test_state_can_be_loaded_into_a_running_watcher():
    """A state that comes after the beginning replaces what was counted so far."""
    with Run(Detached(), for_steps=5) as run:
        run.step(1)
        state = run.watcher.state_dict()
        run.step(2)
        run.watcher.load_state_dict(state)
        run.step(4)

    assert run.alerts == [(4, "disconnected", ("a.weight",))]


def test_what_was_said_is_not_said_again_after_a_resume():
    """An alert of before the checkpoint does not come again while its streak lasts."""
    with Run(Detached(), for_steps=2) as first:
        first.step(3)
        state = first.watcher.state_dict()
    second = Run(Detached(), for_steps=2)
    second.watcher.load_state_dict(state)
    with second:
        second.step(3)

    assert (first.alerts, second.alerts) == ([(1, "disconnected", ("a.weight",))], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "explode"}, "explode"),
        ({"for_steps": 0}, "for_steps"),
        ({"every_n_steps": -1}, "every_n_steps"),
        ({"config": {"ruels": []}}, "ruels"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], message: str):
    """A mistake in the configuration is an error before anything runs."""
    with pytest.raises(ConfigError, match=message):
        Watcher(Healthy(), **options)


def test_a_single_optimizer_needs_no_list():
    """``optimizers`` takes one optimizer as well as several."""
    model = Detached()
    optimizer = sgd(model)

    with Watcher(model, optimizers=optimizer) as watcher, watcher.step():
        model(batch()).backward()
        optimizer.step()

    assert found(watcher.diagnoses) == [(Cause.DETACHED, ("a.weight",))]


def test_without_optimizers_those_that_step_are_found():
    """A loop whose optimizer was not named is judged before it steps, and what zeroes later is no fault."""
    model = Detached()
    optimizer = sgd(model)

    with Watcher(model) as watcher:
        for _ in range(3):
            with watcher.step():
                model(batch()).backward()
                optimizer.step()
                optimizer.zero_grad()

    assert found(watcher.diagnoses) == [(Cause.DETACHED, ("a.weight",))]


def test_without_a_backward_pass_no_cause_is_made_up():
    """A block in which nobody called ``backward`` says that, and blames no line."""
    model = Healthy()

    with diagnose(model) as diagnosis:
        model(batch())

    (told,) = diagnosis.report.diagnoses
    assert (told.cause, told.notes) == (
        Cause.UNDETERMINED,
        ("no backward pass ran in this step",),
    )
    assert "get no gradient, as no backward pass ran" in str(diagnosis)
    assert "= help: call `loss.backward()`" in str(diagnosis)


@pytest.mark.parametrize("make", [Watcher, diagnose])
def test_what_is_no_module_is_refused(make: Any):
    """Anything but a module is an error at once, with what was expected."""
    with pytest.raises(TypeError, match=r"expected a `torch.nn.Module`, found `list`"):
        make([nn.Linear(2, 1)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizers": ["adam"]}, "`Watcher(optimizers=...)`: expected optimizers, found `str`"),
        ({"optimizers": 3}, "`Watcher(optimizers=...)`: expected optimizers, found `int`"),
        (
            {"config": torch.optim.SGD(nn.Linear(1, 1).parameters())},
            "`Watcher(config=...)`: found an optimizer, which `optimizers=` takes",
        ),
        ({"log_dir": 3}, "`log_dir`: expected the path of a folder, found `3`"),
        (
            {"sinks": [print]},
            "`sinks`: expected objects with `write(report)` and `close()`, found `<built-in function print>`",
        ),
        (
            {"sinks": [MemorySink]},
            "`sinks`: expected objects with `write(report)` and `close()`, found the class `MemorySink`",
        ),
    ],
)
def test_an_argument_of_another_kind_is_refused(arguments: dict[str, Any], message: str):
    """What can be no optimizer, folder or sink is an error at once, and not in the first step."""
    with pytest.raises(TypeError) as caught:
        Watcher(Healthy(), **arguments)

    assert str(caught.value) == message


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    """A ``log_dir`` below a file is an error when the run begins, and names the way out."""
    (tmp_path / "file").touch()

    with (
        pytest.raises(ConfigError, match=r"cannot be written, .*: name a folder elsewhere"),
        Watcher(Healthy(), log_dir=tmp_path / "file" / "runs"),
    ):
        pass


def test_a_step_outside_of_the_block_is_refused():
    """``step()`` before ``with watcher:`` would watch nothing, and says so."""
    watcher = Watcher(Healthy())

    with pytest.raises(RuntimeError, match="inside of `with watcher:`"), watcher.step():
        pass


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path):
    """A ``jsonl`` that is a folder is an error when the run begins."""
    config = Config.model_validate({"log": {"jsonl": str(tmp_path)}})

    with pytest.raises(ConfigError, match="is a folder"), Watcher(Healthy(), config):
        pass


def test_after_its_block_a_watcher_watches_nothing():
    """A step outside of the block is an error that says so, and the last report stays readable."""
    with Run(Detached(), PATIENT) as run:
        run.step()
    with pytest.raises(RuntimeError, match="belongs inside of `with watcher:`"):
        run.step()
    run.watcher.close()

    assert [report.step for report in run.sink.reports] == [0]
    assert run.watcher.report == run.sink.reports[0]


def test_a_watcher_that_was_closed_within_its_block_is_silent():
    """A loop may go on after `close()`: what it does then is not watched."""
    with Run(Detached(), PATIENT) as run:
        run.step()
        run.watcher.close()
        run.step(2)

    assert [report.step for report in run.sink.reports] == [0]


def test_a_block_that_is_entered_again_goes_on():
    """A notebook's cell that is run again is watched from its first step: what was mended heals, what broke is found."""
    with Run(Detached(), PATIENT) as run:
        run.step(2)
    before = process_state()
    for kind in (Healthy, Detached):
        run.model.__class__ = kind
        with run:
            run.step(2)

    assert [(d.cause, d.step, d.healed_at) for d in run.watcher.diagnoses] == [
        (Cause.DETACHED, 0, 2),
        (Cause.DETACHED, 4, None),
    ]
    assert run.watcher.report.step == 4
    assert process_state() == before


def test_an_exception_in_a_step_passes_through_with_a_note():
    """An error of the user's is the same error, with a note on its cause, and the run goes on."""
    with Run(Healthy(), PATIENT, every_n_steps=1) as run:
        with (
            pytest.raises(RuntimeError, match="does not require grad") as caught,
            run.watcher.step(),
        ):
            run.model(batch()).detach().backward()  # <- here
        run.step(2)

    (note,) = caught.value.__notes__
    line = guilty_line(test_an_exception_in_a_step_passes_through_with_a_note)
    assert note.startswith("GradWatch: ")
    assert f"{Path(__file__).name}:{line}" in note
    assert run.statuses == [{"a.weight": OK, "b.weight": OK}] * 2


def test_an_exception_between_steps_passes_through():
    """An error between two steps, or after a step's end, leaves the block unchanged."""
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, Run(Healthy()) as run:
        run.step()
        raise error

    assert caught.value is error
    assert not hasattr(error, "__notes__")


# ---- diagnose


def test_diagnose_of_a_healthy_model_finds_nothing():
    """A pass in which everything trains has statuses and norms, and no diagnosis."""
    model = Healthy()
    with diagnose(model) as diagnosis:
        model(batch()).backward()

    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert diagnosis.report.statuses == {"a.weight": OK, "b.weight": OK}
    assert diagnosis.report.norms == pytest.approx(norms)
    assert diagnosis.report.diagnoses == ()


def test_diagnose_names_cause_and_line():
    """A pass that loses a parameter is diagnosed with its cause and line."""
    model = Detached()
    with diagnose(model) as diagnosis:
        model(batch()).backward()

    (only,) = diagnosis.report.diagnoses
    assert (only.cause, only.parameters) == (Cause.DETACHED, ("a.weight",))
    assert only.site is not None
    assert only.site.line == guilty_line(Detached)


def test_diagnose_before_its_end_has_an_empty_report():
    """Within the block the report is empty."""
    model = Healthy()
    with diagnose(model) as diagnosis:
        report = diagnosis.report

    assert report == Report(step=0)
    assert diagnosis.report.statuses == {"a.weight": MISSING, "b.weight": MISSING}


def test_diagnose_joins_several_losses_and_backwards():
    """What any of several backward passes gave a gradient to is fine."""
    model = Fork("left", "right", "never")
    with diagnose(model) as diagnosis:
        for name in ("left", "right"):
            model.on = {name}
            model(batch()).backward()

    assert diagnosis.report.statuses == {a("left"): OK, a("right"): OK, a("never"): MISSING}
    assert found(diagnosis.report.diagnoses) == [(Cause.UNUSED, (a("never"),))]


def test_diagnose_of_stale_gradients_is_missing():
    """A gradient that was there before the pass is not one of the pass."""
    model = Fork("left", "right")
    model(batch()).backward()
    model.on = {"left"}
    with diagnose(model) as diagnosis:
        model(batch()).backward()

    assert diagnosis.report.statuses == {a("left"): OK, a("right"): MISSING}


def test_diagnose_of_autograd_grad_alone_was_not_requested():
    """``torch.autograd.grad`` for another tensor fills no ``.grad``: the call is named."""
    model, x = Healthy(), batch().requires_grad_()
    with diagnose(model) as diagnosis:
        torch.autograd.grad(model(x), x)  # <- here

    (only,) = diagnosis.report.diagnoses
    assert diagnosis.report.statuses == {"a.weight": MISSING, "b.weight": MISSING}
    assert (only.cause, only.parameters) == (Cause.NOT_REQUESTED, ("a.weight", "b.weight"))
    assert only.site is not None
    assert only.site.line == guilty_line(test_diagnose_of_autograd_grad_alone_was_not_requested)


def test_diagnose_of_backward_for_some_inputs():
    """What ``backward(inputs=...)`` leaves out was not requested, at the line of the call."""
    model = Healthy()
    with diagnose(model) as diagnosis:
        model(batch()).backward(inputs=[model.b.weight])  # <- here

    (only,) = diagnosis.report.diagnoses
    assert (only.cause, only.parameters) == (Cause.NOT_REQUESTED, ("a.weight",))
    assert only.site is not None
    assert only.site.line == guilty_line(test_diagnose_of_backward_for_some_inputs)


def test_diagnose_judges_at_the_optimizer_step_inside():
    """What an optimizer step inside used is judged there; ``zero_grad`` after it changes nothing."""
    model = Detached()
    optimizer = sgd(model)
    with diagnose(model) as diagnosis:
        model(batch()).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert diagnosis.report.statuses == {"a.weight": MISSING, "b.weight": OK}
    assert found(diagnosis.report.diagnoses) == [(Cause.DETACHED, ("a.weight",))]


def test_diagnose_of_zero_grad_after_backward_is_cleared():
    """Without an optimizer step, gradients emptied after backward are missing, at that line."""
    model = Healthy()
    with diagnose(model) as diagnosis:
        model(batch()).backward()
        model.zero_grad()  # <- here

    (only,) = diagnosis.report.diagnoses
    assert (only.cause, only.parameters) == (Cause.CLEARED, ("a.weight", "b.weight"))
    assert only.site is not None
    assert only.site.line == guilty_line(test_diagnose_of_zero_grad_after_backward_is_cleared)


def test_diagnose_of_gradients_emptied_between_backwards_is_healthy():
    """Gradients that are emptied and come again, as a discriminator's do, are no finding."""
    model = Fork("left", "right")
    with diagnose(model) as diagnosis:
        model(batch()).backward()
        model.branches["right"].zero_grad()
        model(batch()).backward()

    assert diagnosis.report.statuses == {a("left"): OK, a("right"): OK}
    assert diagnosis.report.diagnoses == ()


def test_diagnose_changes_nothing():
    """Gradients, buffers, random numbers, and hooks are the same with and without it."""

    def one_pass(*, diagnosed: bool) -> tuple[dict[str, Tensor], list[Any], Tensor, float]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        context: Any = diagnose(model) if diagnosed else torch.enable_grad()
        with context:
            loss = model(torch.randn(8, 2)).pow(2).mean()
            loss.backward()
        grads = [p.grad for p in model.parameters()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(p._backward_hooks for p in model.parameters())
        return dict(model.named_buffers()), grads, torch.rand(3), loss.item()

    with_it, without = one_pass(diagnosed=True), one_pass(diagnosed=False)

    for name, buffer in without[0].items():
        assert torch.equal(with_it[0][name], buffer)
    assert all(torch.equal(x, y) for x, y in zip(with_it[1], without[1], strict=True))
    assert torch.equal(with_it[2], without[2])
    assert with_it[3] == without[3]


def test_diagnose_lets_exceptions_through():
    """An exception of the user's is the same object, without a note where nothing is known."""
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, diagnose(Healthy()):
        raise error

    assert caught.value is error
    assert not hasattr(error, "__notes__")


def test_diagnose_lets_keyboard_interrupts_through():
    """Ctrl-C inside of the block is Ctrl-C."""
    with pytest.raises(KeyboardInterrupt), diagnose(Healthy()) as diagnosis:
        raise KeyboardInterrupt

    assert diagnosis.report == Report(step=0)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_diagnose_of_lazy_parameters_is_unseen():
    """A lazy parameter that the pass did not reach is unseen, not missing."""
    model = Fork("used")
    model.branches["lazy"] = nn.LazyLinear(1, bias=False)
    with diagnose(model) as diagnosis:
        model(batch()).backward()

    assert diagnosis.report.statuses == {a("used"): OK, a("lazy"): UNSEEN}
    assert diagnosis.report.diagnoses == ()


def test_diagnose_can_be_used_twice():
    """The same object diagnoses a second pass anew."""
    model = Fork("left", "right")
    diagnosis = diagnose(model)
    for names in ({"left"}, {"left", "right"}):
        model.on = names
        model.zero_grad()
        with diagnosis:
            model(batch()).backward()

    assert diagnosis.report.statuses == {a("left"): OK, a("right"): OK}
    assert diagnosis.report.diagnoses == ()


def test_diagnose_of_an_optimizer_step_takes_what_it_owned():
    """Parameters that no optimizer inside wrote are judged at the end."""
    model = Fork("left", "right")
    optimizer = torch.optim.SGD(model.branches["left"].parameters(), 0.01)
    with diagnose(model) as diagnosis:
        model.on = {"left"}
        model(batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.on = {"right"}
        model(batch()).backward()

    assert diagnosis.report.statuses == {a("left"): OK, a("right"): OK}
    assert diagnosis.report.norms == pytest.approx({a("left"): 4 * 2**0.5, a("right"): 4 * 2**0.5})


class Drawn:
    """A loop drawn at random, and what is missing in each of its steps by its own account."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)  # noqa: S311 -- no secret
        count = self.draw.randint(2, 6)
        self.model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(count)])
        several = self.draw.randint(1, 2)
        self.owned = [[i for i in range(count) if i % several == k] for k in range(several)]
        self.optimizers = [torch.optim.SGD([self.model[i] for i in own], 0.1) for own in self.owned]
        self.style = self.draw.choice(["before", "after each", "at the end", "between"])
        self.arrived: set[int] = set()
        self.truth: list[tuple[int, set[str]]] = []

    def forget(self, optimizers: Iterable[int]) -> None:
        for number in optimizers:
            self.optimizers[number].zero_grad()
            self.arrived -= set(self.owned[number])

    def backward(self) -> None:
        used = [i for i in range(len(self.model)) if self.draw.random() < 0.7]
        loss = sum((self.model[i].sum() for i in used), torch.zeros(1, requires_grad=True).sum())
        torch.autograd.backward(loss)
        self.arrived |= set(used)

    def batch(self) -> bool:
        """Run what is inside of one block; tell whether the gradients are kept for the next one."""
        keeps = self.draw.random() < 0.2
        for number, own in enumerate(self.owned):
            if self.style == "before" and not keeps:
                self.forget([number])
            for _ in range(self.draw.randint(1, 2)):
                self.backward()
            if not keeps:
                self.truth.append((number, {str(i) for i in own if i not in self.arrived}))
                self.optimizers[number].step()
                self.arrived -= set(own)
            if self.style == "after each" and not keeps:
                self.forget([number])
        if self.style == "at the end" and not keeps:
            self.forget(range(len(self.owned)))
        return keeps

    def run(self) -> list[tuple[int, set[str]]]:
        """Run the loop watched, and return what is missing as the reports say it."""
        sink = MemorySink()
        config = {"rules": [], "trace": "never"}
        with Watcher(
            self.model, config, optimizers=self.optimizers, sinks=[sink], every_n_steps=1
        ) as watcher:
            for _ in range(8):
                with watcher.step():
                    keeps = self.batch()
                if self.style == "between" and not keeps:
                    self.forget(range(len(self.owned)))
        return [
            (r.optimizer, {n for n, status in r.statuses.items() if status is MISSING})
            for r in sink.reports
        ]


@pytest.mark.parametrize("seed", range(40))
def test_loops_of_every_shape_are_seen_as_they_are(seed: int):
    """Whatever the order of backwards, steps and emptied gradients, exactly what is missing is missing."""
    drawn = Drawn(seed)

    assert drawn.run() == drawn.truth


class Growing(nn.Module):
    """Two layers, and perhaps a third one, which the loss reads as soon as it is there."""

    def __init__(self, *, cut: bool = False) -> None:
        super().__init__()
        self.u, self.v, self.cut = nn.Linear(2, 2), nn.Linear(2, 1), cut
        self.more: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.u(x)
        y: Tensor = self.v(h.detach() if self.cut else h)
        return y.mean() + (self.more(x).mean() if self.more is not None else 0)


def watched_five(model: nn.Module, optimizer: Any, change: Any = None) -> Watcher:
    """Return the watcher of five steps, before the third of which something is changed."""
    with Watcher(model, optimizers=[optimizer], every_n_steps=1, for_steps=1) as watcher:
        for number in range(5):
            if number == 2 and change is not None:
                change()
            with watcher.step():
                optimizer.zero_grad()
                model(torch.ones(2, 2)).backward()
                optimizer.step()
    return watcher


def told(watcher: Watcher) -> list[tuple[str, tuple[str, ...]]]:
    return [(str(d.cause), d.parameters) for d in watcher.diagnoses]


def test_a_group_of_new_parameters_makes_nothing_missing(capsys):
    """Where an optimizer is given a layer that was made in the middle of a run, every gradient of that step counts."""
    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def grow() -> None:
        model.more = nn.Linear(2, 1)
        optimizer.add_param_group({"params": list(model.more.parameters())})

    watcher = watched_five(model, optimizer, grow)

    assert told(watcher) == []
    assert capsys.readouterr().err == ""
    assert dict(watcher.report.statuses) == dict.fromkeys(
        [f"{layer}.{part}" for layer in ("u", "v", "more") for part in ("weight", "bias")],
        Status.OK,
    )


def test_an_optimizer_of_another_copy_of_the_model_is_named():
    """All parameters are in no optimizer where it holds those of an older model, also by assigned values."""
    everyone = ("u.weight", "u.bias", "v.weight", "v.bias")
    model, assigned = Growing(), Growing()
    older = torch.optim.SGD(Growing().parameters(), 0.1)
    before = torch.optim.SGD(assigned.parameters(), 0.1)
    assigned.load_state_dict(Growing().state_dict(), assign=True)
    wider = torch.optim.SGD(nn.Linear(3, 7).parameters(), 0.1)
    everything = torch.cat([p.detach().flatten() for p in model.parameters()])
    flat = torch.optim.SGD([nn.Parameter(everything)], 0.1)

    pairs = ((model, older), (assigned, before), (model, wider), (model, flat))
    found = [told(watched_five(*pair)) for pair in pairs]

    assert found == [[("not_in_optimizer", everyone)]] * 3 + [[]]


def test_a_layer_that_is_replaced_in_a_run_is_in_no_optimizer():
    """A layer put in another's place in the middle of a run is named once it is looked into."""
    model = Growing()

    def change() -> None:
        model.u = nn.Linear(2, 2)

    watcher = watched_five(model, torch.optim.SGD(model.parameters(), 0.1), change)

    assert told(watcher) == [("not_in_optimizer", ("u.weight", "u.bias"))]


@pytest.mark.parametrize("every", [1, 50])
def test_a_parameter_that_is_replaced_twice_is_in_no_optimizer_and_not_missing(every: int):
    """What the model holds now is watched: it gets a gradient in every step, and no optimizer has it."""
    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sink = MemorySink()
    with Watcher(model, optimizers=[optimizer], every_n_steps=every, sinks=[sink]) as watcher:
        for step in range(25):
            with watcher.step():
                optimizer.zero_grad()
                if step in {3, 11}:
                    model.u.weight = nn.Parameter(model.u.weight.detach() * 2)
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()

    assert told(watcher) == [("not_in_optimizer", ("u.weight",))]
    assert [alert.rule for report in sink.reports for alert in report.alerts] == []
    assert watcher.report.statuses["u.weight"] is Status.OK


def test_what_is_frozen_after_its_diagnosis_is_said_to_be_frozen(capsys):
    """A diagnosis ends with the freezing of its parameters, and nobody is told that they got a gradient again."""
    model = Growing(cut=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched_five(model, optimizer, lambda: model.u.requires_grad_(False))

    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "note[detached]: `u.*` are frozen since step 2"


def test_a_loop_whose_optimizer_never_steps_is_told_so(caplog):
    """Where the given optimizer never steps, one line at the end says that nothing was judged; not after an error."""
    model = Growing(cut=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watcher(model, optimizers=[optimizer]) as watcher:
        for _ in range(3):
            with watcher.step():
                model(torch.ones(2, 2)).backward()
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    with (
        pytest.raises(ZeroDivisionError),
        Watcher(model, optimizers=[optimizer]) as watcher,
        watcher.step(),
    ):
        model(torch.ones(2, 2)).backward()
        raise ZeroDivisionError

    assert said == ["no optimizer step was seen in this run, so that nothing was judged"]
    assert caplog.records == []


def test_a_step_that_raises_does_not_use_up_the_trace():
    """After an error that the loop survives the next step is traced, and its cut has a cause at once."""
    model = Growing(cut=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watcher(model, optimizers=[optimizer]) as watcher:
        with pytest.raises(ZeroDivisionError), watcher.step():
            model(torch.ones(2, 2))
            raise ZeroDivisionError
        with watcher.step():
            model(torch.ones(2, 2)).backward()
            optimizer.step()

    assert [(str(d.cause), d.parameters, d.step) for d in watcher.diagnoses] == [
        ("detached", ("u.weight", "u.bias"), 0)
    ]


class NormalisedOnce(nn.Module):
    """A weight that is divided by its norm before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.v = nn.Linear(2, 1)
        self.unit = (self.w / self.w.norm()).detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.v(x * self.unit)
        return y.mean()


def test_what_was_computed_before_the_step_is_to_be_computed_in_it():
    """The way out of a value computed in `__init__` is not to keep its history, which the second step would miss."""
    model = NormalisedOnce()
    with diagnose(model) as diagnosis:
        model(torch.ones(2, 2)).backward()

    (found,) = diagnosis.report.diagnoses
    assert found.parameters == ("w",)
    assert found.help == (
        "compute it anew from the parameter in each `forward`, where the loss can reach it"
    )


def test_a_model_on_the_meta_device_is_diagnosed():
    """Of a model without data it is known who gets a gradient and why not; norms it has none."""
    model = Growing(cut=True).to("meta")
    x = torch.ones(2, 2, device="meta")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diagnose(model) as diagnosis:
        model(x).backward()
    model.zero_grad()
    with Watcher(model, optimizers=[optimizer], every_n_steps=1) as watcher, watcher.step():
        model(x).backward()
        optimizer.step()

    for report in (diagnosis.report, watcher.report):
        (found,) = report.diagnoses
        assert (found.cause, found.parameters) == (Cause.DETACHED, ("u.weight", "u.bias"))
        assert report.norms == {}


class Bag:
    """An object that is no module, with a layer in it."""

    def __init__(self) -> None:
        self.layer = nn.Linear(2, 2)


class Hidden(nn.Module):
    """Parameters where ``parameters()`` does not look, beside some that are there on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = [nn.Linear(2, 2), nn.Linear(2, 2)]
        self.named = {"a": (nn.Parameter(torch.ones(2)),)}
        self.bag = Bag()
        self.teacher = [nn.Linear(2, 2).requires_grad_(requires_grad=False)]
        self.reader = [nn.Linear(2, 2)]
        self.out = nn.Linear(2, 1)
        self.known = [self.out]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.listed, self.bag.layer, *self.teacher):
            x = layer(x)
        with torch.no_grad():
            self.reader[0](x)
        out: Tensor = self.out(x * self.named["a"][0])
        return out.mean()


def test_parameters_in_plain_containers_are_found():
    """What a loss leads to, and ``parameters()`` does not list, is named with its attribute; once, and nothing else."""
    with Run(Hidden(), PATIENT, every_n_steps=2) as run:
        run.step(5)

    assert [(d.cause, d.parameters) for d in run.watcher.diagnoses] == [
        (
            Cause.NOT_IN_OPTIMIZER,
            tuple(f"listed[{i}].{kind}" for i in (0, 1) for kind in ("weight", "bias")),
        ),
        (Cause.NOT_IN_OPTIMIZER, ("named['a'][0]",)),
        (Cause.NOT_IN_OPTIMIZER, ("bag.layer.weight", "bag.layer.bias")),
    ]
    line, place = inspect.getsourcelines(Hidden)[1] + 5, shown_path(__file__)
    assert next((*d.notes, d.help) for d in run.watcher.diagnoses) == (
        (
            "`Hidden.listed` is not registered, `parameters()` does not look into it: "
            f"{place}:{line}: `self.listed = [nn.Linear(2, 2), nn.Linear(2, 2)]`"
        ),
        "use `nn.ModuleList` or `nn.ParameterList` in place of the list",
    )
    assert [d.help for d in run.watcher.diagnoses][1:] == [
        "use `nn.ModuleDict` or `nn.ParameterDict` in place of the dict",
        "make `Bag` an `nn.Module`",
    ]
    assert [r.step for r in run.sink.reports if not r.logged] == [0]
    assert run.watcher.report.diagnoses == run.watcher.diagnoses


def test_what_another_optimizer_has_is_not_hidden():
    """A critic in a list, which its own optimizer steps, trains."""
    model = Hidden()
    hidden = [*model.listed[0].parameters(), *model.listed[1].parameters()]
    hidden += [*model.bag.layer.parameters(), model.named["a"][0]]
    optimizer, other = sgd(model), torch.optim.SGD(hidden, 0.1)
    with Watcher(model, optimizers=[optimizer]) as watcher, watcher.step():
        model(batch()).backward()
        optimizer.step()
        other.step()

    assert watcher.diagnoses == ()


def test_an_abort_that_is_caught_comes_again():
    """A loop that passes over any error is stopped in every step, for as long as the rule's reason holds."""
    with Run(Detached(), for_steps=2, action="abort") as run:
        weight = run.model.get_parameter("b.weight").clone()
        for _ in range(5):
            with suppress(RuntimeError):
                run.step()
            written = not torch.equal(weight, run.model.get_parameter("b.weight"))
            weight = run.model.get_parameter("b.weight").clone()
            run.written.append(written)

    assert run.written == [True, False, False, False, False]


def test_what_is_unfrozen_in_a_run_may_be_in_no_optimizer():
    """Layers that were frozen when the optimizer was made, and are not in it, are found once they want a gradient."""
    model = Healthy()
    first = next(model.children()).requires_grad_(requires_grad=False)
    with Run(model, PATIENT, every_n_steps=2) as run:
        run.step(2)
        first.requires_grad_()
        run.step(4)

    assert [(d.cause, d.step, d.parameters) for d in run.watcher.diagnoses] == [
        (Cause.NOT_IN_OPTIMIZER, 3, ("a.weight",))
    ]


def test_what_the_contract_covers_is_not_counted(capsys: pytest.CaptureFixture[str]):
    """Where every missing gradient is meant, nothing is printed."""
    contract = [{"parameters": "a.*", "gradient": "none"}]
    with Run(Detached(), {"contract": contract, "rules": []}, every_n_steps=1) as run:
        run.step(3)

    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("named", [True, False])
def test_an_optimizer_that_takes_the_place_of_another_is_watched(named: bool):  # noqa: FBT001
    """An optimizer made in the run is watched, whether others were named or not."""
    model = Detached()
    first, second = sgd(model), sgd(model)
    config = {"rules": [], "trace": "never"}
    with Watcher(model, config, optimizers=[first] if named else ()) as watcher:
        for optimizer in (first, first, second, second):
            with watcher.step():
                optimizer.zero_grad()
                model(batch()).backward()
                optimizer.step()

    assert watcher.state_dict()["judge"]["streaks"] == {"a.weight": 4}


class Bare:
    """A wrapper that is no optimizer of torch's, and has no hooks: its inner one steps."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self) -> None:
        self.inner.step()


class Whole(torch.optim.Optimizer):
    """One that is, so that the hooks of both run."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("kind", [Bare, Whole])
def test_a_wrapped_optimizer_steps_once(kind: Any, caplog: pytest.LogCaptureFixture):
    """Of a wrapper and what is inside of it one step is judged, and neither is said never to have stepped."""
    model = Healthy()
    optimizer = kind(sgd(model))
    with Watcher(model, PATIENT, optimizers=[optimizer]) as watcher:
        for _ in range(3):
            with watcher.step():
                model(batch()).backward()
                optimizer.step()

    assert watcher.state_dict()["steps"] == 3
    assert caplog.messages == []


def test_steps_that_only_act_are_no_steps_of_training():
    """Where no optimizer was named yet, a block without a backward pass judges nothing."""
    model = Healthy()
    optimizer = sgd(model)
    with Watcher(model, for_steps=2) as watcher:
        for number in range(8):
            with watcher.step():
                loss = model(batch())
                if number > 4:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

    assert (watcher.diagnoses, watcher.state_dict()["steps"]) == ((), 3)


def none(parameter: nn.Parameter) -> None:
    parameter.grad = None


def zeros(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad.zero_()


@pytest.mark.parametrize("clear", [none, zeros, None])
def test_a_loop_that_writes_its_parameters_itself_is_no_fault(
    clear: Any, caplog: pytest.LogCaptureFixture
):
    """Where gradients are used up by hand before the step ends nothing is said of them, but for one line."""
    model = Healthy()
    with Watcher(model, for_steps=2, every_n_steps=1) as watcher:
        for _ in range(5):
            with watcher.step():
                loss = model(batch())
                if clear is None:
                    gradients = torch.autograd.grad(loss, list(model.parameters()))
                else:
                    loss.backward()
                    gradients = tuple(
                        p.grad.clone() for p in model.parameters() if p.grad is not None
                    )
                with torch.no_grad():
                    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                        parameter.sub_(0.01 * gradient)
                        if clear is not None:
                            clear(parameter)

    assert (watcher.diagnoses, watcher.report.alerts) == ((), ())
    assert set(watcher.report.statuses.values()) == {Status.UNSEEN}
    assert [m.partition(":")[0] for m in caplog.messages] == [
        "gradients are used up by hand within the step"
    ]


def test_zeros_that_are_left_in_the_block_are_no_gradient():
    """With ``zero_grad(set_to_none=False)`` first in the block a layer that is cut off later is found, and counted."""
    model = Fork("left", "right")
    optimizer = sgd(model)
    with Watcher(model, optimizers=[optimizer], for_steps=4) as watcher:
        for number in range(12):
            with watcher.step():
                optimizer.zero_grad(set_to_none=False)
                x = batch()
                left, right = (branch(x).sum() for branch in model.branches.values())
                (left + (right if number < 5 else right.detach())).backward()
                optimizer.step()

    assert [(d.cause, d.step, d.parameters) for d in watcher.diagnoses] == [
        (Cause.DETACHED, 6, (a("right"),))
    ]
    assert watcher.state_dict()["judge"]["streaks"] == {a("right"): 6}


def test_fewer_gradients_than_others_are_gradients():
    """What one of two backward passes reaches is well, also where its gradient is written once less."""
    model = Fork("left", "right")
    optimizer = sgd(model)
    with Watcher(model, for_steps=2, optimizers=[optimizer], every_n_steps=1) as watcher:
        for _ in range(6):
            with watcher.step():
                optimizer.zero_grad(set_to_none=False)
                model(batch()).backward()
                model.branches["left"](batch()).sum().backward()
                optimizer.step()

    assert watcher.diagnoses == ()
    assert set(watcher.report.statuses.values()) == {Status.OK}


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_that_are_zeroed_before_each_step_stay_cleared(every: int):
    """Zeros in place of gradients do not end a diagnosis, nor the streak of its rule."""
    model = Healthy()
    optimizer = sgd(model)
    with Watcher(model, optimizers=[optimizer], for_steps=3, every_n_steps=every) as watcher:
        for _ in range(12):
            with watcher.step():
                model(batch()).backward()
                optimizer.zero_grad(set_to_none=False)
                optimizer.step()

    assert [(d.cause, d.healed_at) for d in watcher.diagnoses] == [(Cause.CLEARED, None)]
    assert set(watcher.report.statuses.values()) == {Status.MISSING}
    streak = 12 if every == 1 else 1 + 12 // every
    assert set(watcher.state_dict()["judge"]["streaks"].values()) == {streak}
