from __future__ import annotations

import functools
import gc
import importlib
import logging
import random
import signal
import sys
import warnings
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch._dynamo  # so that there is a compiler stance that could be left
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradwatch
from gradwatch import GradWatch, Report, Watcher, diagnose
from gradwatch.sinks import MemorySink
from tests.conftest import QUIET, process_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode at the start"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Add up in one order, and do not wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Student(nn.Module):
    """Dropout, BatchNorm, a cut branch, a branch that comes and goes, and a padded teacher."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.teacher = nn.TransformerEncoder(layer, 2).eval().requires_grad_(requires_grad=False)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.cut = nn.Linear(8, 8)
        self.sometimes = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.passes = 0

    def train(self, mode: bool = True) -> Student:  # noqa: FBT001, FBT002 -- torch's signature
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -2:] = True
        with torch.no_grad():
            wanted = self.teacher(x, src_key_padding_mask=padding)[:, 0]
        h: Tensor = self.body(x.mean(1)) + self.cut(x.mean(1)).detach()
        if self.training:
            self.passes += 1
        if self.passes % 3:
            h = h + self.sometimes(x[:, 0]) * torch.rand(8)
        loss: Tensor = (h - wanted).pow(2).mean()
        return loss


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(count, 4, 6, 8, generator=generator))


Outcome = tuple[dict[str, Tensor], list[float], Tensor]


def assert_same(with_it: Outcome, without: Outcome) -> None:
    """Compare weights, buffers, losses and the random numbers that come next, bit by bit."""
    assert with_it[1] == without[1]
    assert with_it[0].keys() == without[0].keys()
    assert [n for n, tensor in without[0].items() if not torch.equal(with_it[0][n], tensor)] == []
    assert torch.equal(with_it[2], without[2])


# ---- the same numbers with and without


def plain(*, watched: bool, steps: int = 9, **options: Any) -> Outcome:
    """Train in a plain loop."""
    torch.manual_seed(1)
    model = Student()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    watcher = Watcher(model, optimizers=[optimizer], every_n_steps=2, **options)
    losses = []
    with watcher if watched else nullcontext():
        for x in batches(steps):
            with watcher.step() if watched else nullcontext():
                loss = model(x)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return model.state_dict(), losses, torch.rand(4)


def test_a_plain_run_is_the_same_bit_by_bit():
    """Losses, weights, buffers and random numbers of a plain loop do not change under a watcher."""
    with_it, without = plain(watched=True), plain_alone()

    assert_same(with_it, without)


def test_a_diagnosed_pass_is_the_same_bit_by_bit():
    """``diagnose`` around every pass changes no loss, weight, buffer or random number."""

    def outcome(*, diagnosed: bool) -> Outcome:
        torch.manual_seed(1)
        model = Student()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        losses = []
        for x in batches(4):
            context: Any = diagnose(model) if diagnosed else torch.enable_grad()
            optimizer.zero_grad()
            with context:
                loss = model(x)
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return model.state_dict(), losses, torch.rand(4)

    assert_same(outcome(diagnosed=True), outcome(diagnosed=False))


class Lit(LightningModule):
    """The student in Lightning, which notes its losses and fails where it is told to."""

    def __init__(self, failure: tuple[str, BaseException] | None = None) -> None:
        super().__init__()
        self.student = Student()
        self.losses: list[float] = []
        self.failure = failure
        self.made: list[weakref.ref[Tensor]] = []

    def step(self, name: str, x: Tensor) -> Tensor:
        loss: Tensor = self.student(x)
        self.losses.append(loss.item())
        self.made += [weakref.ref(x), weakref.ref(loss)]
        if self.failure is not None and self.failure[0] == name and len(self.losses) > 2:
            raise self.failure[1]
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.step("training", batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.step("validation", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)


def fit(model: LightningModule, *callbacks: Any, **options: Any) -> Trainer:
    quiet = QUIET | {"max_epochs": 2, "num_sanity_val_steps": 1}
    trainer = Trainer(callbacks=list(callbacks), **quiet | options)
    trainer.fit(model, loader(4), loader(2))
    return trainer


def loader(count: int) -> DataLoader[Tensor]:
    return DataLoader(batches(count), batch_size=None, shuffle=False)  # type: ignore[arg-type]


@functools.cache
def plain_alone() -> Outcome:
    """Return what a plain loop without a watcher ends with."""
    return plain(watched=False)


@functools.cache
def lightning_alone() -> Outcome:
    """Return what a fit without a callback ends with."""
    return in_lightning()


def in_lightning(*callbacks: Any, **options: Any) -> Outcome:
    torch.manual_seed(1)
    model = Lit()
    fit(model, *callbacks, **options)
    return model.state_dict(), model.losses, torch.rand(4)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}],
    ids=str,
)
def test_a_lightning_run_is_the_same_bit_by_bit(options: dict[str, Any]):
    """Losses, weights, buffers and random numbers of a Trainer do not change under GradWatch."""
    with_it = in_lightning(GradWatch(every_n_steps=1), **options)
    without = in_lightning(**options)

    assert_same(with_it, without)


def test_a_run_under_warnings_as_errors_ends_as_usual():
    """With every warning an error, a run with findings and alerts still ends, with the same numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", message=".*(nested tensors|LeafSpec|many workers|eval mode)"
        )
        with_it = in_lightning(GradWatch(every_n_steps=1, for_steps=2), log_every_n_steps=1)

    assert_same(with_it, lightning_alone())


# ---- nothing is left behind


ENDINGS: dict[str, tuple[tuple[str, BaseException] | None, type[BaseException] | None]] = {
    "fit ends": (None, None),
    "training_step raises": (("training", ValueError("mine")), ValueError),
    "Ctrl-C in training_step": (("training", KeyboardInterrupt()), SystemExit),
    "validation_step raises": (("validation", ValueError("mine")), ValueError),
}


def ended(ending: str, *callbacks: Any) -> Lit:
    """Fit until the ending, and return the model."""
    failure, raised = ENDINGS[ending]
    if failure is not None:
        failure = (failure[0], type(failure[1])("mine"))
    model = Lit(failure)
    if raised is None:
        fit(model, *callbacks)
    else:
        with pytest.raises(raised):
            fit(model, *callbacks)
        model.failure = None
    return model


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_in_torch(ending: str):
    """However a run ends, no mode, no hook and no compiler stance is left."""
    before = process_state()
    model = ended(ending, GradWatch())

    assert process_state() == before
    assert [m for m in model.modules() if hooks_of(m)] == []
    assert [n for n, p in model.named_parameters() if hooks_of_tensor(p)] == []
    assert [n for n, m in model.named_modules() if "forward" in vars(m)] == []


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks on a module that GradWatch might have set."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for kind in kinds for hook in vars(module)[kind].values()]


def hooks_of_tensor(tensor: Tensor) -> list[Any]:
    hooks: Any = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
    return [hook for known in hooks for hook in (known or {}).values()]


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_batch_is_kept_alive(ending: str):
    """However a run ends, no batch and no loss lives longer than it would without GradWatch."""
    callback = GradWatch(every_n_steps=1)
    alive = []
    for callbacks in ((callback,), ()):
        model = ended(ending, *callbacks)
        gc.collect()
        alive.append([number for number, ref in enumerate(model.made) if ref() is not None])

    assert alive[0] == alive[1]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_plain_loop_that_raises_leaves_nothing(kind: type[BaseException]):
    """After an exception in a step, whatever it is, no mode, hook or batch is left."""
    before = process_state()
    model = Student()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    made: list[weakref.ref[Tensor]] = []

    def train() -> None:
        with Watcher(model, optimizers=[optimizer]) as watcher, watcher.step():
            x = batches(1)[0]
            loss = model(x)
            made.extend([weakref.ref(x), weakref.ref(loss)])
            raise kind("mine")

    with pytest.raises(kind, match="mine"):
        train()
    gc.collect()

    assert process_state() == before
    assert [ref() for ref in made] == [None, None]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_activations_die_within_the_step():
    """A traced step keeps no activation alive that the user's program has dropped."""
    model = nn.Linear(2, 2)
    with Watcher(model) as watcher, watcher.step():
        hidden = model(torch.ones(1, 2))
        loss = hidden.relu().detach().sum() + hidden.sum()
        known = weakref.ref(hidden)
        loss.backward()
        del hidden, loss

        assert known() is None


# ---- failures of our own


class BoomError(Exception):
    """A failure inside of GradWatch."""


def _boom() -> None:
    raise BoomError("injected")


class Once:
    """Raise in the first call, and do what the original does in later ones."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.raised = False
        self.fail: Callable[[], None] = _boom

    def __get__(self, instance: Any, owner: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.raised:
            self.raised = True
            self.fail()
        return self.original(*args, **kwargs)


class BadSink(MemorySink):
    """A sink whose first write, or whose end, fails."""

    def __init__(self, where: str) -> None:
        super().__init__()
        setattr(self, where, Once(getattr(self, where, super().close)))


FAULTS = [
    "gradwatch._diagnose.Inspection.around_backward",
    "gradwatch._diagnose.Inspection.diagnose",
    "gradwatch._diagnose.Inspection.leave",
    "gradwatch._diagnose.Inspection.start",
    "gradwatch._diagnose.Inspection.stop",
    "gradwatch._explanation.follow",
    "gradwatch._diagnose.grouped",
    "gradwatch._names.Owners.covered",
    "gradwatch._sensor.Sensor.after",
    "gradwatch._sensor.Sensor.before",
    "gradwatch._sensor.Sensor.missing",
    "gradwatch._sensor.Sensor.restart",
    "gradwatch._trace.Trace._append",
    "gradwatch._trace.Trace._finish_simple",
    "gradwatch._trace.Trace._numbers",
    "gradwatch._trace.Trace._begin",
    "gradwatch._trace.Trace._finish",
    "gradwatch._trace.Trace._noted",
    "gradwatch._trace.Trace._written",
    "gradwatch.rules.Judge.load_state_dict",
    "gradwatch.rules.Judge.observe",
    "gradwatch.sinks.console.ConsoleSink.write",
    "gradwatch._run.Inspection",
    "gradwatch._ledger.measure",
    "gradwatch._watched.names_of",
    "gradwatch._run.standard_sinks",
]


def inject(
    monkeypatch: pytest.MonkeyPatch, target: str, fail: Callable[[], None] | None = None
) -> Once:
    """Make the named function fail in its first call."""
    path, _, name = target.rpartition(".")
    home: Any
    try:
        home = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, owner = path.rpartition(".")
        home = getattr(importlib.import_module(module), owner)
    fault = Once(getattr(home, name))
    fault.fail = fail or fault.fail
    monkeypatch.setattr(home, name, fault)
    return fault


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[int, type[BaseException] | None]]:
    """Return level and exception of each record of GradWatch's logger."""
    return [
        (record.levelno, record.exc_info[0] if record.exc_info else None)
        for record in caplog.records
        if record.name == "gradwatch"
    ]


class TimeoutOfTheUsersError(Exception):
    """What the user's own handler for a signal raises."""


@pytest.mark.parametrize(
    "target",
    [
        "gradwatch._explanation.follow",
        "gradwatch._sensor.Sensor.before",
        "gradwatch._trace.Trace._finish_simple",
        "gradwatch._backward._observe",
        "gradwatch.sinks.console.ConsoleSink.write",
    ],
)
@pytest.mark.parametrize("kind", ["function", "method", "object", "partial"])
def test_what_a_handler_for_a_signal_raises_comes_through(
    target: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """An error of the user's that happens to be raised inside of GradWatch is the user's still."""

    class Handler:
        def __call__(self, *arguments: Any) -> None:
            raise TimeoutOfTheUsersError

        method = __call__

    def handler(*_: Any) -> None:
        raise TimeoutOfTheUsersError

    handlers: dict[str, Any] = {
        "function": handler,
        "method": Handler().method,
        "object": Handler(),
        "partial": functools.partial(handler, 1),
    }
    inject(monkeypatch, target, lambda: signal.raise_signal(signal.SIGUSR1))
    known = signal.signal(signal.SIGUSR1, handlers[kind])
    try:
        with pytest.raises(TimeoutOfTheUsersError):
            in_lightning(GradWatch(every_n_steps=1))
    finally:
        signal.signal(signal.SIGUSR1, known)
    assert logged(caplog) == []


def test_a_signal_while_a_trace_is_stopped_leaves_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A time limit that is over as a failed step is cleaned up reaches the user, and the trace is stopped."""

    def handler(*_: Any) -> None:
        raise TimeoutOfTheUsersError

    before = process_state()
    target = "gradwatch._trace.Trace._leave_places"
    inject(monkeypatch, target, lambda: signal.raise_signal(signal.SIGUSR1))
    known = signal.signal(signal.SIGUSR1, handler)
    model = nn.Linear(2, 1)
    try:
        with pytest.raises(TimeoutOfTheUsersError), Watcher(model) as watcher, watcher.step():
            model(torch.ones(1, 2)).sum().backward()
            raise ValueError
    finally:
        signal.signal(signal.SIGUSR1, known)
    assert (logged(caplog), process_state()) == ([], before)


@pytest.mark.parametrize("target", FAULTS)
def test_a_failure_of_ours_is_one_log_record(
    target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A failure anywhere in GradWatch leaves a run with the same numbers, and one warning."""
    without = lightning_alone()
    before = process_state()
    fault = inject(monkeypatch, target)

    with_it = in_lightning(GradWatch(every_n_steps=1))

    assert fault.raised
    assert_same(with_it, without)
    assert logged(caplog) == [(logging.WARNING, BoomError)]
    assert process_state() == before


@pytest.mark.parametrize(
    "target",
    # Lightning hands its optimizers a closure, so that the trace leaves their steps alone.
    [*FAULTS, "gradwatch._diagnose.Inspection.before_step"],
)
def test_a_failure_of_ours_in_a_plain_loop(
    target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A failure anywhere leaves a plain loop with the same numbers, and one warning."""
    without = plain_alone()
    fault = inject(monkeypatch, target)

    with_it = plain(watched=True)

    assert fault.raised
    assert_same(with_it, without)
    assert logged(caplog) == [(logging.WARNING, BoomError)]


GUARDS = {
    "_guarded.<locals>.guarded",
    "_harmless.<locals>.guarded",
    "Cost.add",
    "Trace.called",
    "Trace._backward",
    "Trace._surrounded",
}
"""What turns a failure into a log record; it does next to nothing that could fail itself."""


def calls(function: Callable[[], Any], fault: tuple[tuple[str, str], int] | None = None) -> Any:
    """Call a function, and fail in one call of ours inside of it.

    Args:
        function: What to call.
        fault: The names of a function of ours and of its caller, and which of these calls fails.

    Returns:
        The number of calls of each function of ours by each other one, and what was returned.
    """
    home = str(Path(gradwatch.__file__).parent)
    counts: Counter[tuple[str, str]] = Counter()

    def trace(frame: Any, event: str, arg: Any) -> None:
        del arg
        caller = frame.f_back.f_code
        if not (frame.f_code.co_filename.startswith(home) and caller.co_filename.startswith(home)):
            return
        name = (frame.f_code.co_qualname, caller.co_qualname)
        # A generator is "called" once more when it is thrown away, where no error can be raised.
        if event != "call" or name[0] in GUARDS or name[0].endswith("<genexpr>"):
            return
        counts[name] += 1
        if fault == (name, counts[name]):
            raise BoomError("injected")

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return counts, function()
    finally:
        sys.settrace(before)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["plain", "lightning"])
def test_a_failure_in_any_call_leaves_the_run_as_it_is(where: str):
    """A hundred random calls inside of GradWatch fail, each in a run of its own, and all end the same."""

    def run() -> Outcome:
        return in_lightning(callbacks.pop()) if where == "lightning" else plain(watched=True)

    callbacks = [GradWatch(every_n_steps=1) for _ in range(102)]
    without = lightning_alone() if where == "lightning" else plain_alone()
    before = process_state()
    run()
    counts, with_it = calls(run)
    assert_same(with_it, without)
    # A watcher of a plain loop is made, and may refuse to be, before there is a run to hurt.
    made, _ = calls(lambda: Watcher(Student(), optimizers=torch.optim.SGD([torch.ones(1)], 0.1)))
    known = sorted(counts.keys() - (made if where == "plain" else {}))
    draw = random.Random(where)  # noqa: S311 -- to choose, not to hide
    failed = []
    for name in draw.choices(known, k=100):
        try:
            _, ended = calls(run, (name, draw.randint(1, counts[name])))
            assert_same(ended, without)
            assert process_state() == before
        except (AssertionError, BoomError) as error:
            failed.append((name, repr(error)))

    assert len(known) > 300
    assert failed == []


@pytest.mark.parametrize("where", ["write", "flush", "close"])
def test_a_sink_that_fails_is_one_log_record(where: str, caplog: pytest.LogCaptureFixture):
    """A sink of the user's that fails ends neither the run nor the watch: another one gets every report."""
    without = lightning_alone()
    whole, beside = MemorySink(), MemorySink()
    in_lightning(GradWatch(every_n_steps=1, sinks=[whole]))

    with_it = in_lightning(GradWatch(every_n_steps=1, sinks=[BadSink(where), beside]))

    assert_same(with_it, without)
    assert logged(caplog) == [(logging.WARNING, BoomError)]
    assert [r.step for r in beside.reports] == [r.step for r in whole.reports] != []


def test_after_a_failure_nothing_is_watched(monkeypatch: pytest.MonkeyPatch):
    """GradWatch switches itself off: no report comes after the failure."""
    inject(monkeypatch, "gradwatch._ledger.measure")
    sink = MemorySink()
    in_lightning(GradWatch(every_n_steps=1, for_steps=1, action="abort", sinks=[sink]))

    assert sink.reports == []


@pytest.mark.parametrize(
    "target",
    [
        "gradwatch._diagnose.Inspection.around_backward",
        "gradwatch._diagnose.Inspection.diagnose",
        "gradwatch._sensor.Sensor.after",
        "gradwatch._diagnose.Inspection.start",
        "gradwatch._trace.Trace._begin",
        "gradwatch._trace.Trace._finish",
        "gradwatch._ledger.measure",
        "gradwatch._single.names_of",
    ],
)
def test_a_failure_inside_of_diagnose_does_not_reach_the_pass(
    target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A failure in ``diagnose`` leaves the gradients as they are, and is one warning."""
    before = process_state()
    inject(monkeypatch, target)
    model = nn.Linear(2, 1)
    with diagnose(model):
        model(torch.ones(1, 2)).mul_(1.0).sum().backward()

    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[1.0, 1.0]]
    assert logged(caplog) == [(logging.WARNING, BoomError)]
    assert process_state() == before


def test_a_failure_at_a_step_inside_of_diagnose_does_not_reach_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A failure while an optimizer steps inside of ``diagnose`` lets it step, and the next one too."""
    inject(monkeypatch, "gradwatch._ledger.measure")
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 1.0)
    with diagnose(nn.ParameterList([weight])) as diagnosis:
        for _ in range(2):
            weight.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert weight.tolist() == [-2.0]
    assert diagnosis.report == Report(step=0)
    assert logged(caplog) == [(logging.WARNING, BoomError)]


def test_a_failure_after_the_users_own_keeps_the_users_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """An error of the user's stays what is raised, also where cleaning up fails."""
    model = nn.Linear(2, 1)
    inject(monkeypatch, "gradwatch._diagnose.Inspection.stop")
    with pytest.raises(ValueError, match="mine"), Watcher(model) as watcher, watcher.step():
        watcher._inspection.leave()
        raise ValueError("mine")

    assert logged(caplog) == [(logging.WARNING, BoomError)]


def warning_step(model: nn.Module) -> None:
    """Run what torch warns of: in C++, in Python with a level of the caller's, and in Python of the line itself."""
    out = model(torch.ones(4, 2))
    _ = (out * 2).grad  # in C++
    loss = nn.functional.mse_loss(out, torch.ones(4))  # in Python, of the line that calls
    _ = nn.functional.softmax(out)  # the same, from one function further inside
    _ = torch.tensor(loss)
    warnings.warn("mine", UserWarning, stacklevel=1)
    loss.backward()


def shown(run: Any, action: Any) -> list[tuple[str, str, int]]:
    """Return what a run warns of, and where that is said to be, as Python would print it."""
    lines = []

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        del category, args, kwargs
        lines.append((str(message), filename, lineno))

    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter(action, UserWarning)
        globals().pop("__warningregistry__", None)
        warnings.showwarning = show
        run()
        assert warnings.showwarning is show
    return lines


@pytest.mark.parametrize(("action", "times"), [("default", 1), ("always", 2), ("once", 1)])
def test_warnings_of_torchs_are_shown_at_the_users_line_as_often_as_without(
    action: str, times: int
):
    """A traced step warns of the same, in the same order and of the same lines, as one that nobody watches."""

    def bare() -> None:
        model = nn.Linear(2, 1)
        for _ in range(2):
            warning_step(model)

    def watched() -> None:
        model = nn.Linear(2, 1)
        with Watcher(model) as watcher:
            for _ in range(2):
                with watcher.step():
                    warning_step(model)

    alone = shown(bare, action)
    assert len(alone) == 5 * times
    assert {file for _, file, _ in alone} == {__file__}
    assert shown(watched, action) == alone


def test_a_filter_for_errors_makes_an_error_of_a_warning_in_a_traced_step_too():
    """Where warnings are errors, what torch warns of raises as it does without a trace."""
    model = nn.Linear(2, 1)
    with (
        warnings.catch_warnings(),
        pytest.raises(UserWarning, match="target size"),
        diagnose(model),
    ):
        warnings.simplefilter("error")
        nn.functional.mse_loss(model(torch.ones(4, 2)), torch.ones(4))


def test_a_block_of_warnings_that_outlives_a_traced_step_ends_no_later_one():
    """What such a block puts back shows warnings once more, in this traced step and in the next."""
    lines: list[tuple[str, str, int]] = []

    def run() -> None:
        model = nn.Linear(2, 1)
        block = warnings.catch_warnings()
        with diagnose(model):
            block.__enter__()
            model(torch.ones(1, 2)).sum().backward()
        block.__exit__(None, None, None)
        with diagnose(model):
            warning_step(model)

    show = warnings.showwarning
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, category, filename, lineno, *rest: lines.append(
            (str(message), filename, lineno)
        )
        run()
    assert warnings.showwarning is show
    assert [file for _, file, _ in lines] == [__file__] * 5
