"""The full history of a run: what is written comes back, in few bytes, after every way a run can end."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from gradwatch import Alert, Cause, Diagnosis, HistoryError, Report, Status, Watcher, read_history
from gradwatch.history import (
    ABSENT,
    Recorder,
    assembled,
    dequantized,
    pooled,
    quantized,
)
from gradwatch.report import Action, Severity
from gradwatch.sinks import TensorBoardSink

if TYPE_CHECKING:
    from pathlib import Path

OK, MISSING, NAN = Status.OK, Status.MISSING, Status.NONFINITE


def recorded(recorder: Recorder, *records: Any, end: bool = True) -> dict[str, bytes]:
    """Return the newest bytes of each tag after some records of batch, statuses, and norms."""
    values: dict[str, bytes] = {}
    for batch, statuses, norms in records:
        values |= dict(recorder.add(batch, batch, statuses, norms))
    return values | (dict(recorder.flush()) if end else {})


def test_norms_come_back_within_ten_percent():
    """One byte tells a norm from 1e-12 to 1e8 within 10 %; zero and infinity come back as what they are."""
    norms = np.logspace(-12, 8, 1001)
    back = 10.0 ** dequantized(quantized(norms)).astype(np.float64)

    assert np.abs(back / norms - 1).max() < 0.1
    special = dequantized(quantized(np.array([0.0, 1e-30, 1e30, np.inf, np.nan])))
    assert special.tolist() == [-math.inf, -math.inf, math.inf, math.inf, math.inf]


def test_what_is_recorded_is_read():
    """Statuses are exact, norms are near, and a norm that was not measured is NaN."""
    values = recorded(
        Recorder(),
        (3, {"a": OK, "b": MISSING}, {"a": 0.5}),
        (7, {"a": NAN, "b": OK}, {"a": math.nan, "b": 0.0}),
    )

    history = assembled(values)

    assert history.names == ("a", "b")
    assert (history.batches.tolist(), history.steps.tolist()) == ([3, 7], [3, 7])
    assert history.status.tolist() == [[OK.code, MISSING.code], [NAN.code, OK.code]]
    logs = history.norm_log10
    assert logs[0, 0] == pytest.approx(math.log10(0.5), abs=0.05)
    assert math.isnan(logs[0, 1])
    assert logs[1].tolist() == [math.inf, -math.inf]


def test_parameters_that_come_later_are_absent_before():
    """A set of parameters that grows keeps the old records, in which the new ones are absent."""
    values = recorded(Recorder(), (0, {"a": OK}, {}), (1, {"a": OK, "b": MISSING}, {}))

    assert assembled(values).status.tolist() == [[OK.code, ABSENT], [OK.code, MISSING.code]]


def test_a_chunk_that_is_not_full_is_rewritten_under_its_tag():
    """After ten seconds what there is can be read, and what follows replaces it."""
    now = [0.0]
    recorder = Recorder(lambda: now[0])
    early = recorded(recorder, (0, {"a": OK}, {}), end=False)
    now[0] = 11.0
    later = recorded(recorder, (1, {"a": OK}, {}), end=False)
    last = recorded(recorder, (2, {"a": MISSING}, {}))

    assert [sorted(values) for values in (early, later, last)] == [
        ["_gradwatch/params/0000000000"],
        ["_gradwatch/chunk/0000000000"],
        ["_gradwatch/chunk/0000000000"],
    ]
    assert assembled(early | later | last).batches.tolist() == [0, 1, 2]


def test_a_long_run_stays_bounded_and_keeps_its_worst():
    """Strides double when there are many records, and a single bad step is in the record of its stride."""
    values: dict[str, bytes] = {}
    recorder, bad = Recorder(), 9_001
    for batch in range(12_000):
        status = NAN if batch == bad else OK
        values |= dict(recorder.add(batch, batch, {"a": status}, {"a": 1.0}))
    history = assembled(values | dict(recorder.flush()))

    # 4,096 records of one step each, then of two.
    assert len(history.batches) == 4_096 + math.ceil((12_000 - 4_096) / 2)
    (found,) = np.flatnonzero(history.status[:, 0] == NAN.code)
    assert 0 <= bad - history.batches[found] < 2


def test_the_size_of_a_run():
    """A thousand parameters take at most 0.6 kB a record."""
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.weight" for i in range(1_000)]
    statuses = dict.fromkeys(names, OK)
    base = rng.lognormal(size=1_000)
    values: dict[str, bytes] = {}
    recorder = Recorder()
    for batch in range(320):
        norms = dict(zip(names, base * rng.lognormal(sigma=0.05, size=1_000), strict=True))
        values |= dict(recorder.add(batch, batch, statuses, norms))

    chunks = [content for tag, content in values.items() if "/chunk/" in tag]
    assert sum(map(len, chunks)) / 320 <= 600


def test_pooled_columns_show_the_worst():
    """Of the steps in a column the worst status and the largest norm count, and ranges are told."""
    values = recorded(
        Recorder(), *((i, {"a": NAN if i == 5 else OK}, {"a": 10.0**i}) for i in range(10))
    )
    history = assembled(values)

    ranges, status, norms = pooled(history, 3)

    assert ranges.tolist() == [[0, 2], [3, 5], [6, 9]]
    assert status[:, 0].tolist() == [OK.code, NAN.code, OK.code]
    assert norms[:, 0].tolist() == quantized(10.0 ** np.array([2.0, 5.0, 9.0])).tolist()
    assert pooled(history, 100, 4, 6)[0].tolist() == [[4, 4], [5, 5], [6, 6]]
    assert pooled(history, 100, 90)[0].tolist() == []


def test_findings_are_written_when_they_change():
    """Diagnoses and alerts are kept, the newest alerts first, and written again only when there is news."""
    found = Diagnosis(Severity.WARNING, Cause.UNUSED, MISSING, ("a",))
    alert = Alert("dead", Action.WARN, ("a",), None, None, 10, 10, MISSING)
    recorder = Recorder()

    said = [
        list(recorder.findings(report))
        for report in (
            Report(0),
            Report(1, diagnoses=(found,)),
            Report(2, diagnoses=(found,)),
            Report(3, diagnoses=(found,), alerts=(alert,)),
        )
    ]

    assert [len(entries) for entries in said] == [0, 1, 0, 1]
    report = assembled(dict(said[3])).report
    assert (report.diagnoses, report.alerts) == ((found,), (alert,))


def test_findings_of_a_run_that_went_on_are_joined():
    """Of two parts both are kept but what the later one did again; what is good since then has healed."""

    def part(since: int, steps: range, status: Status, *causes: Cause) -> dict[str, bytes]:
        recorder = Recorder()
        values = recorded(recorder, *((step, {"a": status}, {}) for step in steps))
        found = (
            Diagnosis(Severity.WARNING, cause, MISSING, ("a",), step=since) for cause in causes
        )
        rule = Alert("dead", Action.WARN, ("a",), None, None, 10, since, MISSING)
        said = Report(since, diagnoses=tuple(found), alerts=(rule,))
        return values | dict(recorder.findings(said))

    first = part(2, range(8), MISSING, Cause.UNUSED, Cause.DETACHED)
    undone = part(8, range(8, 12), MISSING, Cause.NO_GRAD)
    second = part(8, range(8, 14), OK, Cause.DETACHED)

    report = assembled(first | undone | second).report
    assert [(d.cause, d.step, d.healed_at) for d in report.diagnoses] == [
        (Cause.UNUSED, 2, 8),
        (Cause.DETACHED, 8, None),
    ]
    assert [alert.step for alert in report.alerts] == [8, 2]
    assert assembled(first).report.diagnoses[0].healed_at is None


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.a(x).sum() + self.b(x).detach().sum()


def run(folder: Path, steps: int, error: type[BaseException] | None = None) -> None:
    model = Half()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watcher(model, optimizers=[optimizer], log_dir=folder, every_n_steps=1) as watcher:
        for step in range(steps):
            with watcher.step():
                model(torch.ones(1, 2)).backward()
                optimizer.step()
                optimizer.zero_grad()
                if error is not None and step == steps - 1:
                    raise error


def test_a_run_is_read_from_its_event_file(tmp_path: Path):
    """Beside the user's own scalars, in one event file, lies every step of every parameter."""
    run(tmp_path, 50)

    history = read_history(tmp_path)

    assert history.names == ("a.weight", "b.weight")
    assert history.batches.tolist() == list(range(50))
    assert history.status.tolist() == [[OK.code, MISSING.code]] * 50
    assert history.norm_log10[:, 0] == pytest.approx(math.log10(math.sqrt(2)), abs=0.05)
    assert [(d.cause, d.parameters) for d in history.report.diagnoses] == [
        (Cause.DETACHED, ("b.weight",))
    ]
    assert len(list(tmp_path.glob("*tfevents*"))) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_is_interrupted_keeps_what_it_has_seen(
    error: type[BaseException], tmp_path: Path
):
    """Steps before an exception or Ctrl-C are in the file."""
    with pytest.raises(error):
        run(tmp_path, 40, error)

    assert read_history(tmp_path).batches.tolist() == list(range(40))


def test_a_resumed_run_keeps_the_old_steps(tmp_path: Path):
    """A second event file in the folder adds its steps; where both have one, the newer counts."""
    for first in (0, 30):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{first}") as writer:
            sink = TensorBoardSink(writer)
            for batch in range(first, first + 40):
                status = OK if first else MISSING
                sink.write(Report(batch, logged=True, statuses={"a": status}, batch=batch))
            sink.close()

    history = read_history(tmp_path)

    assert history.batches.tolist() == list(range(70))
    assert history.status[:, 0].tolist() == [MISSING.code] * 30 + [OK.code] * 40


def test_what_came_after_the_checkpoint_that_was_resumed_is_forgotten():
    """Rows of a run that was killed stand no longer behind those of the run that took its place."""
    killed = recorded(Recorder(), *((b, {"a": MISSING}, {}) for b in range(110)))
    resumed = recorded(Recorder(), *((b, {"a": OK}, {"a": 1.0}) for b in range(50, 100)))

    history = assembled({t: v for t, v in killed.items() if t not in resumed} | resumed)

    assert history.batches.tolist() == list(range(100))
    assert history.status[:, 0].tolist() == [MISSING.code] * 50 + [OK.code] * 50


def test_folders_without_a_run_or_with_several_are_told_apart(tmp_path: Path):
    """One clear error says what is there and what to name."""
    with pytest.raises(HistoryError, match=r"no history of GradWatch below .* no event file"):
        read_history(tmp_path)
    with pytest.raises(HistoryError, match=r"folder of a run, and `.*nowhere` does not exist"):
        read_history(tmp_path / "nowhere")
    (tmp_path / "others").mkdir()
    events = tmp_path / "others" / "events.out.tfevents.1"
    events.touch()
    with pytest.raises(HistoryError, match=r"folder of a run, and `.*` is a file: name its folder"):
        read_history(events)
    with pytest.raises(HistoryError, match="its event files hold none"):
        read_history(tmp_path / "others")
    for name in ("one", "two"):
        run(tmp_path / name, 1)
    with pytest.raises(HistoryError, match=r"several runs below .*, name one: one, two"):
        read_history(tmp_path)
    assert len(read_history(tmp_path / "one").batches) == 1


def test_a_history_of_another_version_is_refused():
    """Bytes that are damaged, or of a newer format, give one clear error."""
    with pytest.raises(HistoryError, match="cannot be read"):
        assembled({"_gradwatch/chunk/0000000000": b"nonsense"})


def test_reading_loads_no_torch(tmp_path: Path):
    """A history is read in a process that has neither torch nor Lightning."""
    run(tmp_path, 1)
    code = (
        "import sys; from gradwatch import read_history\n"
        f"print(len(read_history({str(tmp_path)!r}).batches), 'torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603

    assert done.stdout == "1 False\n"
