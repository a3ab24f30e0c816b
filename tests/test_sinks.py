"""What each sink writes, read back from where it was written."""

import importlib
import io
import json
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from gradwatch import history, sinks
from gradwatch.errors import ConfigError
from gradwatch.explain import render
from gradwatch.report import Action, Alert, Cause, Diagnosis, Report, Severity, Site, Status
from gradwatch.sinks import ConsoleSink, JsonLinesSink, LoggerSink, MemorySink, TensorBoardSink
from gradwatch.sinks._batches import Totals, merged, summary
from gradwatch.sinks._map import StatusMap

SITE = Site("net.py", 12, 12, 12, 33, "Net.forward", "", "        h = self.proj(x).detach()")


def diagnosis(*parameters, healed_at=None, site=SITE, step=0):
    """Return a diagnosis of these parameters."""
    return Diagnosis(
        severity=Severity.WARNING,
        cause=Cause.DETACHED,
        status=Status.MISSING,
        parameters=parameters,
        site=site,
        step=step,
        healed_at=healed_at,
    )


def alert(action=Action.WARN, step=3):
    """Return an alert of an exploding norm."""
    return Alert("exploding", action, ("a",), 1e4, 1e2, 3, step)


def report(batch=0, /, *, logged=True, norms=None, statuses=None, **rest):
    """Return a report of one batch; what has a norm is fine unless said otherwise."""
    norms = {"a.weight": 0.1, "a.bias": 10.0} if norms is None else norms
    return Report(
        step=batch,
        batch=batch,
        logged=logged,
        statuses=dict.fromkeys(norms, Status.OK) | (statuses or {}),
        norms=norms if logged else {},
        **rest,
    )


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and counts how often it is written to."""

    writes = 0

    def isatty(self):
        """Say yes."""
        return True

    def write(self, text):
        """Count, and keep the text."""
        self.writes += 1
        return super().write(text)


class Clock:
    """Seconds that go up when told."""

    now = 100.0

    def __call__(self):
        """Return the time."""
        return self.now


# Memory and JSON lines ----------------------------------------------------------------------------------


def test_memory():
    """The memory sink keeps every report, also after it is closed."""
    sink = MemorySink()
    sink.write(report(0))
    sink.write(report(1))
    sink.close()

    assert sink.reports == [report(0), report(1)]


def test_every_sink_is_one():
    """Every sink has what the protocol asks for."""
    made = [
        MemorySink(),
        ConsoleSink(),
        JsonLinesSink("x"),
        LoggerSink(Recorder()),
        TensorBoardSink(None),
    ]

    assert [isinstance(sink, sinks.Sink) for sink in made] == [True] * 5


def test_json_lines(tmp_path):
    """Every report is one line from which it can be read again, appended to what is there."""
    path = tmp_path / "new" / "reports.jsonl"
    odd = report(0, norms={"\udc80é": math.inf}, diagnoses=(diagnosis("a"),), alerts=(alert(),))
    for entry in (odd, report(1)):
        sink = JsonLinesSink(path)
        sink.write(entry)
        sink.close()
        sink.close()

    lines = path.read_text(encoding="ascii").splitlines()
    assert [Report.from_dict(json.loads(line)) for line in lines] == [odd, report(1)]


def test_json_lines_are_flushed(tmp_path):
    """A line is in the file as soon as it is written, and no file is made before."""
    path = tmp_path / "reports.jsonl"
    sink = JsonLinesSink(str(path))
    assert not path.exists()

    sink.write(report(0))
    sink.write(report(1))

    assert path.read_text(encoding="ascii").count("\n") == 2
    sink.close()


def test_json_lines_into_a_folder(tmp_path):
    """A folder is refused at once, with a file in it as the way out."""
    with pytest.raises(
        ConfigError, match=r"is a folder: name a file in it, such as .*gradwatch\.j"
    ):
        JsonLinesSink(tmp_path)


def test_json_lines_below_a_file(tmp_path):
    """A path that runs through a file is refused at once."""
    (tmp_path / "file").write_text("", encoding="ascii")

    with pytest.raises(ConfigError, match=r"cannot be written, `.*file` is not a folder: name a"):
        JsonLinesSink(tmp_path / "file" / "x" / "reports.jsonl")


def test_json_lines_where_nothing_can_be_written(tmp_path, monkeypatch):
    """A write-protected folder is refused at once."""
    monkeypatch.setattr("os.access", lambda *_: False)

    with pytest.raises(ConfigError, match="is write-protected: name a file elsewhere"):
        JsonLinesSink(tmp_path / "reports.jsonl")


def test_json_lines_whose_folder_became_a_file(tmp_path):
    """A path that became unusable after the start is refused in the same words."""
    sink = JsonLinesSink(tmp_path / "x" / "reports.jsonl")
    (tmp_path / "x").write_text("", encoding="ascii")

    with pytest.raises(ConfigError, match=r"cannot be written, File exists: name a file elsewhere"):
        sink.write(report(0))


# Console ------------------------------------------------------------------------------------------------


def printed(*reports, stream=None, **options):
    """Return what the console sink prints for these reports."""
    stream = stream or io.StringIO()
    sink = ConsoleSink(stream, **options)
    for entry in reports:
        sink.write(entry)
    sink.close()
    return stream.getvalue()


def test_console():
    """A diagnosis and an alert are printed as they are rendered, on lines of their own."""
    text = printed(report(0, diagnoses=(diagnosis("x"),), alerts=(alert(),)))

    assert text == f"\n{render(diagnosis('x'))}\n\n{render(alert())}\n"


def test_console_says_it_once():
    """A diagnosis and an alert that were said are not said again."""
    first = report(0, diagnoses=(diagnosis("x"),), alerts=(alert(),))
    again = report(1, diagnoses=(diagnosis("x", step=1),), alerts=(alert(),))

    assert printed(first, again, report(2)) == printed(first)


def test_console_says_what_is_new():
    """Other parameters, another place, and an alert of another step are new."""
    new = [
        report(1, diagnoses=(diagnosis("x", "y"),)),
        report(2, diagnoses=(diagnosis("x", site=None),)),
        report(3, alerts=(alert(step=9),)),
    ]
    old = report(0, diagnoses=(diagnosis("x"),), alerts=(alert(),))

    assert printed(old, *new) == printed(old) + "".join(printed(entry) for entry in new)


def test_console_says_that_something_healed():
    """That a diagnosis healed is said once, and its return is said in full."""
    sick = report(0, diagnoses=(diagnosis("x"),))
    well = report(12, diagnoses=(diagnosis("x", healed_at=12),))
    line = "\nnote[detached]: `x` gets a gradient since step 12\n"

    assert printed(sick, well, well, sick) == printed(sick) + line + printed(sick)
    assert printed(well) == ""


def test_console_leaves_log_alone():
    """An alert to be logged is not printed, nor one whose error says it all; the others are."""
    texts = [printed(report(0, alerts=(alert(action),))) for action in Action]

    assert [bool(text) for text in texts] == [False, True, True, False]


def test_console_folds():
    """Whole modules are folded by the names given, or by those that the reports know."""
    found = diagnosis("a.weight", "a.bias")

    known = printed(report(0, diagnoses=(found,)))
    given = printed(report(0, diagnoses=(found,)), names=["a.weight", "a.bias", "a.scale"])

    assert known.splitlines()[1] == "warning[detached]: `a.*` get no gradient"
    assert given.splitlines()[1] == "warning[detached]: `a.weight` and `a.bias` get no gradient"


def test_console_takes_nothing_for_markup():
    """Markup, emoji codes, and long lines come out as they are, also in colour."""
    name = "[red]x[/red]:smile:" + "y" * 200
    found = diagnosis(name)

    coloured = printed(report(0, diagnoses=(found,)), color=True)

    assert f"`{name}` gets no gradient\n" in coloured
    assert coloured.count("\n") == printed(report(0, diagnoses=(found,))).count("\n")


def test_console_colours():
    """The severity, the frame, the carets, and the keys of the notes are coloured."""
    text = printed(report(0, diagnoses=(diagnosis("x"),), alerts=(alert(Action.STOP),)), color=True)

    assert text.splitlines() == [
        "",
        "\x1b[1;33mwarning[detached]\x1b[0m: `x` gets no gradient",
        "\x1b[1;34m  -->\x1b[0m net.py:12 in Net.forward",
        "\x1b[1;34m   |\x1b[0m",
        "\x1b[1;34m12 |\x1b[0m         h = self.proj(x).detach()",
        f"\x1b[1;34m   |\x1b[0m\x1b[1;33m             {'^' * 21} the result has no history\x1b[0m",
        "\x1b[1;34m   |\x1b[0m",
        "\x1b[1;34m   =\x1b[0m\x1b[1m more:\x1b[0m gradwatch explain detached",
        "",
        "\x1b[1;33mwarning[exploding]\x1b[0m: grad norm of `a` is 1.0e+04, above 1.0e+02",
        "\x1b[1;34m   =\x1b[0m\x1b[1m note:\x1b[0m fired in step 3, the last of 3 in a row",
        "\x1b[1;34m   =\x1b[0m\x1b[1m note:\x1b[0m training ends after this step",
    ]


def test_console_leaves_other_lines_unpainted():
    """A line that only looks like a heading, such as the rest of a note, is not painted."""
    found = Diagnosis(Severity.NOTE, Cause.UNUSED, Status.MISSING, ("x",), notes=("a\nb[c]",))

    assert "\n     b[c]\n" in printed(report(0, diagnoses=(found,)), color=True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_console_on_a_terminal(environment, expected, monkeypatch):
    """A terminal gets colour unless it does not want it; the line of a progress bar is cleared."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()

    text = printed(report(0, diagnoses=(diagnosis("x"),)), stream=stream)

    assert ("\x1b[1;33m" in text) is expected
    assert text.startswith("\r\x1b[2K")
    assert text.endswith("gradwatch explain detached\n\n")
    assert stream.writes == 1


def test_console_writes_to_the_stderr_of_the_moment(capsys):
    """Without a stream the sink prints to what is stderr at that time."""
    sink = ConsoleSink()
    sink.write(report(0, alerts=(alert(),)))

    assert capsys.readouterr() == ("", f"\n{render(alert())}\n")


def test_console_beside_tqdm(monkeypatch):
    """A bar of tqdm's is cleared before a block is printed, and drawn again after it."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    tqdm = importlib.import_module("tqdm").tqdm
    with tqdm(total=3, file=stream, ncols=40, leave=False) as bar:
        bar.update(1)
        before = len(stream.getvalue())
        printed(report(0, alerts=(alert(),)), stream=stream, color=False)
        text = stream.getvalue()[before:]

    cleared, block, drawn = text.partition(f"\r\x1b[2K{render(alert())}\n\n")
    assert cleared.strip("\r ") == ""
    assert block
    assert "1/3" in drawn


def test_console_without_tqdm(monkeypatch):
    """Where tqdm is not loaded the block is printed all the same."""
    monkeypatch.delitem(sys.modules, "tqdm")

    assert printed(report(0, alerts=(alert(),))) == f"\n{render(alert())}\n"


def test_console_beside_rich(monkeypatch):
    """A live display of rich's shows the block above itself, each line once and whole."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", Terminal())
    console = Console(file=shown, force_terminal=True, width=200, color_system=None)
    with Progress(console=console) as progress:
        progress.add_task("train", total=3)
        ConsoleSink(color=False).write(report(0, diagnoses=(diagnosis("x"),)))

    assert render(diagnosis("x")) in shown.getvalue()


def test_console_with_a_narrow_encoding():
    """What the stream's encoding lacks is replaced."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    ConsoleSink(stream).write(report(0, diagnoses=(diagnosis("größe\udc80"),)))

    assert raw.getvalue().splitlines()[1] == b"warning[detached]: `gr??e\\udc80` gets no gradient"


def test_console_without_a_stream(monkeypatch):
    """A stream that is missing, closed, or broken is no error."""

    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    closed, entry = io.StringIO(), report(0, alerts=(alert(),))
    closed.close()
    monkeypatch.setattr(sys, "stderr", None)
    for stream in (None, closed, Broken()):
        ConsoleSink(stream).write(entry)


# One record per batch -----------------------------------------------------------------------------------


def test_merged():
    """Of several reports of a batch the worse status and norm count, and the later diagnosis."""
    one = report(
        4,
        logged=False,
        norms={"a": 1.0},
        statuses={"a": Status.MISSING, "shared": Status.OK},
        aliases={"a": ("a", "b")},
        diagnoses=(diagnosis("a"),),
        alerts=(alert(),),
    )
    two = report(
        4,
        norms={"c": 2.0, "shared": math.nan},
        statuses={"shared": Status.NONFINITE},
        optimizer=1,
        total_norm=3.0,
        diagnoses=(diagnosis("a", healed_at=4), diagnosis("c")),
    )
    three = report(4, norms={"c": 1.0, "shared": 5.0}, optimizer=2, total_norm=4.0)
    again = report(4, norms={"c": 1.5}, optimizer=2, total_norm=2.0, clipped_norm=1.0)

    got = merged([one, two, three, again])

    assert math.isnan(got.norms.pop("shared"))
    assert got == Report(
        step=4,
        optimizer=2,
        logged=True,
        statuses={"a": Status.MISSING, "shared": Status.NONFINITE, "c": Status.OK},
        norms={"c": 2.0},
        total_norm=5.0,
        clipped_norm=1.0,
        aliases={"a": ("a", "b")},
        diagnoses=(diagnosis("a", healed_at=4), diagnosis("c")),
        alerts=(alert(),),
        batch=4,
    )


def test_summary():
    """The summary counts statuses, findings that hold, and takes the log10 of what is finite."""
    entry = report(
        0,
        norms={"a": 100.0, "b": 0.0, "c": math.inf, "d": 1e-30, "e": 0.1},
        statuses={"b": Status.ZERO, "c": Status.NONFINITE, "m": Status.MISSING, "f": Status.FROZEN},
        diagnoses=(diagnosis("m"), diagnosis("x", healed_at=0)),
        total_norm=math.nan,
        clipped_norm=1.0,
    )

    assert summary(entry, Totals(nonfinite_steps=7, alerts=2)) == {
        "alerts_total": 2,
        "findings": 1,
        "nonfinite_steps_total": 7,
        "norm_log10_clipped": 0.0,
        "norm_log10_max": 2.0,
        "norm_log10_median": -6.5,
        "norm_log10_min": -12.0,
        "params_frozen": 1,
        "params_missing": 1,
        "params_zero": 1,
    }


def test_summary_of_a_step_that_was_not_logged():
    """Zeros and norms are left out where they were not measured."""
    values = summary(report(0, logged=False, statuses={"m": Status.MISSING}), Totals())

    assert values == {
        "alerts_total": 0,
        "findings": 0,
        "nonfinite_steps_total": 0,
        "params_frozen": 0,
        "params_missing": 1,
    }


class Recorder:
    """A logger of Lightning's kind that keeps what it gets."""

    def __init__(self):
        self.records = []

    def log_metrics(self, metrics, step=None):
        """Keep the values."""
        self.records.append((step, metrics))


def logged(*reports, flush=False):
    """Return the batches, findings, and alerts that a logger gets for these reports."""
    recorder = Recorder()
    sink = LoggerSink(recorder, "g/")
    for entry in reports:
        sink.write(entry)
        if flush:
            sink.flush()
    sink.close()
    return [(step, got["g/findings"], got["g/alerts_total"]) for step, got in recorder.records]


def test_logger():
    """A logger gets the summary under the prefix, at the batch."""
    recorder = Recorder()
    LoggerSink(recorder).write(report(0))
    sink = LoggerSink(recorder)
    sink.write(report(7, total_norm=1.0))
    sink.flush()

    assert recorder.records == [
        (
            7,
            {
                "gradwatch/alerts_total": 0,
                "gradwatch/findings": 0,
                "gradwatch/nonfinite_steps_total": 0,
                "gradwatch/norm_log10_max": 1.0,
                "gradwatch/norm_log10_median": 0.0,
                "gradwatch/norm_log10_min": -1.0,
                "gradwatch/norm_log10_total": 0.0,
                "gradwatch/params_frozen": 0,
                "gradwatch/params_missing": 0,
                "gradwatch/params_zero": 0,
            },
        )
    ]


def test_one_record_per_batch():
    """The reports of one batch become one record, with the counters as of that batch."""
    entries = [
        report(0, alerts=(alert(),)),
        report(0, alerts=(alert(),)),
        report(1, alerts=(alert(),)),
    ]

    assert logged(*entries) == [(0, 0, 2), (1, 0, 3)]


def test_steps_increase():
    """A batch that was written is not written again; what it said late is counted in the next."""
    entries = [report(0), report(0, alerts=(alert(),)), report(1)]

    assert logged(*entries, flush=True) == [(0, 0, 0), (1, 0, 1)]


def test_only_what_is_worth_it():
    """A batch that was not logged is written only for new diagnoses and alerts."""
    sick, well = (diagnosis("x"),), ()
    entries = [
        report(0, logged=False),
        report(1, logged=False, diagnoses=sick),
        report(2, logged=False, diagnoses=sick),
        report(3, logged=False, diagnoses=sick, alerts=(alert(),)),
        report(4, logged=False, diagnoses=well),
        report(5, logged=False),
        report(6),
    ]

    assert logged(*entries) == [(1, 1, 0), (3, 1, 1), (4, 0, 1), (6, 0, 1)]


# TensorBoard --------------------------------------------------------------------------------------------

torch_tensorboard = pytest.importorskip("torch.utils.tensorboard")
accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
loader = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")


def events(folder):
    """Return the events of the one event file, without its head and the plugin's records."""
    (file,) = Path(folder).iterdir()
    return [
        entry
        for entry in loader.EventFileLoader(str(file)).Load()
        if entry.HasField("summary")
        and not entry.summary.value[0].tag.startswith(f"{history.PREFIX}/")
    ]


def tags(folder, prefix=""):
    """Return the tags that were written, in order of first appearance."""
    seen = dict.fromkeys(value.tag for entry in events(folder) for value in entry.summary.value)
    return [tag for tag in seen if tag.startswith(prefix)]


def scalars(folder, tag):
    """Return the steps and values of one tag."""
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    if tag in reader.Tags()["scalars"]:
        return [(entry.step, entry.value) for entry in reader.Scalars(tag)]
    return [
        (entry.step, pytest.approx(entry.tensor_proto.float_val[0]))
        for entry in reader.Tensors(tag)
    ]


def pages(folder):
    """Return the steps and texts of the report."""
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    found = reader.Tensors("gradwatch/report/text_summary")
    return [(entry.step, entry.tensor_proto.string_val[0].decode()) for entry in found]


def write(folder, *reports, flush=False, clock=None, **options):
    """Write reports through a real writer."""
    with torch_tensorboard.SummaryWriter(str(folder)) as writer:
        sink = TensorBoardSink(writer, clock=clock or Clock(), **options)
        for entry in reports:
            sink.write(entry)
            if flush:
                sink.flush()
        sink.close()


def test_a_dozen_cards(tmp_path):
    """A report of 1,000 parameters writes at most twelve cards, all in one record."""
    norms = {f"layers.{i}.weight": 1.0 for i in range(1000)}
    write(tmp_path, report(5, norms=norms, total_norm=2.0, clipped_norm=1.0))

    assert [(entry.step, len(entry.summary.value)) for entry in events(tmp_path)] == [
        (5, 12),
        (5, 1),
    ]
    assert tags(tmp_path) == [
        "gradwatch/alerts_total",
        "gradwatch/findings",
        "gradwatch/nonfinite_steps_total",
        "gradwatch/norm_log10_clipped",
        "gradwatch/norm_log10_max",
        "gradwatch/norm_log10_median",
        "gradwatch/norm_log10_min",
        "gradwatch/norm_log10_total",
        "gradwatch/params_frozen",
        "gradwatch/params_missing",
        "gradwatch/params_zero",
        "gradwatch/map",
        "gradwatch/report/text_summary",
    ]


def test_curves(tmp_path):
    """Each parameter of a small model has its status and norm, and norms are never infinite."""
    bad = {"a": Status.NONFINITE}
    write(
        tmp_path,
        report(0, norms={"a": 100.0, "b": 0.0}, statuses={"b": Status.ZERO}),
        report(1, norms={"a": math.inf}, statuses=bad | {"b": Status.MISSING}),
        report(2, norms={"a": math.nan}, statuses=bad),
    )

    assert scalars(tmp_path, "gradwatch_params/status/a") == [(0, 0.0), (1, 5.0), (2, 5.0)]
    assert scalars(tmp_path, "gradwatch_params/norm_log10/a") == [(0, 2.0)]
    assert scalars(tmp_path, "gradwatch_params/status/b") == [(0, 3.0), (1, 4.0)]
    assert scalars(tmp_path, "gradwatch_params/norm_log10/b") == [(0, -12.0)]
    assert scalars(tmp_path, "gradwatch/nonfinite_steps_total") == [(0, 0.0), (1, 1.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("choice", "count", "expected"),
    [
        ("auto", 100, 200),
        ("auto", 101, 0),
        ("always", 101, 202),
        ("never", 2, 0),
        ("p1", 20, 2),
        (["p1*", "tied"], 20, 24),
        ([], 20, 0),
    ],
)
def test_choice_of_curves(choice, count, expected, tmp_path):
    """Curves are for the parameters chosen, by any of their names, and for all while they are few."""
    norms = {f"p{i}": 1.0 for i in range(count)}
    entry = report(0, norms=norms, aliases={"p0": ("p0", "tied")})
    write(tmp_path, entry, scalars=choice)

    assert len(tags(tmp_path, "gradwatch_params/")) == expected


def test_auto_counts_all_parameters(tmp_path):
    """Parameters of optimizers that step by turns are counted together."""
    halves = [{f"{half}{i}": 1.0 for i in range(60)} for half in "ab"]
    write(
        tmp_path, report(0, norms=halves[0]), report(1, norms=halves[1]), report(2, norms=halves[0])
    )

    assert len(tags(tmp_path, "gradwatch_params/")) == 120
    assert scalars(tmp_path, "gradwatch_params/status/a0") == [(0, 0.0)]


def test_no_curves_of_unlogged_batches(tmp_path):
    """A batch that was not logged writes its counts alone."""
    write(tmp_path, report(0, logged=False, diagnoses=(diagnosis("a"),)))

    assert tags(tmp_path) == [
        "gradwatch/alerts_total",
        "gradwatch/findings",
        "gradwatch/nonfinite_steps_total",
        "gradwatch/params_frozen",
        "gradwatch/params_missing",
        "gradwatch/map",
        "gradwatch/report/text_summary",
    ]


def test_one_tensorboard_record_per_batch(tmp_path):
    """Reports of one batch are merged, and steps strictly increase."""
    entries = [
        report(0, norms={"a": 1.0}),
        report(0, norms={"b": 1.0}),
        report(0),
        report(3),
        report(3),
    ]
    write(tmp_path, *entries, flush=True)

    assert scalars(tmp_path, "gradwatch/findings") == [(0, 0.0), (3, 0.0)]


def test_no_second_event_file(tmp_path):
    """Everything goes into the event file that the writer holds open."""
    write(tmp_path, *[report(batch) for batch in range(20)])

    assert len(list(tmp_path.iterdir())) == 1


def test_report_is_rewritten_when_it_changes(tmp_path):
    """The report is written for new findings and alerts, and left alone while nothing changes."""
    sick = (diagnosis("a.weight"),)
    write(
        tmp_path,
        report(0),
        report(1),
        report(2, diagnoses=sick),
        report(3, diagnoses=sick),
        report(4, diagnoses=sick, alerts=(alert(),)),
        report(5, diagnoses=sick),
        report(6),
    )

    assert [step for step, _ in pages(tmp_path)] == [0, 2, 4, 6]
    assert pages(tmp_path)[0][1].splitlines()[-1] == "No problem found."
    assert render(sick[0]) in pages(tmp_path)[1][1]
    assert "### Alerts (1)" in pages(tmp_path)[3][1]


def test_counts_of_the_report(tmp_path):
    """Mere counts rewrite the report once a minute, and at the end."""
    clock = Clock()
    bad = {"a.weight": Status.ZERO}
    with torch_tensorboard.SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer, clock=clock)
        for batch, statuses in enumerate([None, bad, None, bad, None]):
            clock.now += 40
            sink.write(report(batch, statuses=statuses))
        sink.close()
        sink.close()

    assert [step for step, _ in pages(tmp_path)] == [0, 3, 4]


def test_map_is_drawn_once_a_minute(tmp_path):
    """The map is drawn at once, then once a minute, and at the end if it has grown."""
    clock = Clock()
    with torch_tensorboard.SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer, clock=clock)
        for batch in range(6):
            sink.write(report(batch))
            sink.flush()
            clock.now += 25
        sink.close()
        sink.close()
    reader = accumulator.EventAccumulator(str(tmp_path))
    reader.Reload()

    assert [entry.step for entry in reader.Images("gradwatch/map")] == [0, 3, 5]
    assert {entry.width for entry in reader.Images("gradwatch/map")} == {1000}


def test_odd_names(tmp_path):
    """Names with control characters, lone surrogates, and slashes are written in full."""
    write(tmp_path, report(0, norms={"a\n/b": 1.0, "\udc80": 1.0, "ä b:[c]": 1.0}), prefix="/my/")

    assert tags(tmp_path, "my_params/status") == [
        "my_params/status/a\\n/b",
        "my_params/status/\\udc80",
        "my_params/status/ä b:[c]",
    ]


def test_writers_without_a_file(tmp_path):
    """A stand-in without an event file, and a writer that is closed meanwhile, get nothing."""

    class StandIn:
        def __getattr__(self, _):
            return lambda *_, **__: None

    writer = torch_tensorboard.SummaryWriter(str(tmp_path))
    written = 0
    for target in (StandIn(), None, writer):
        sink = TensorBoardSink(target)
        sink.write(report(0))
        sink.write(report(1))
        if target is writer:
            writer.close()
            written = len(events(tmp_path))
        sink.write(report(2))
        sink.close()

    assert [len(events(tmp_path)), len(list(tmp_path.iterdir()))] == [written, 1]
    assert written > 0


def test_a_writer_closed_before_is_opened_again(tmp_path):
    """A writer that was closed before the first report, as after a fit of Lightning's, writes a file of its own."""
    with torch_tensorboard.SummaryWriter(str(tmp_path), filename_suffix=".a") as writer:
        writer.add_scalar("loss", 1.0, 0)
    writer.filename_suffix = ".b"
    sink = TensorBoardSink(writer)
    for step in range(2):
        sink.write(report(step))
    sink.close()

    assert history.read_history(tmp_path).batches.tolist() == [0, 1]
    assert len(list(tmp_path.iterdir())) == 2


def test_messages_of_the_writers_package(monkeypatch):
    """A writer of tensorboardX's gets messages of its own package."""
    proto = importlib.import_module("tensorboard.compat.proto.summary_pb2")
    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    monkeypatch.setitem(sys.modules, "tensorboardX.proto", type(sys)("tensorboardX.proto"))
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.summary_pb2", proto)
    own: list[str] = []
    written = []

    class FileWriter:
        def add_summary(self, message, step):
            if not message.value[0].tag.startswith(f"{history.PREFIX}/"):
                written.append((step, [value.tag for value in message.value][:1]))

    FileWriter.__module__ = "tensorboardX.writer"

    def importing(name):
        own.append(name)
        return importlib.import_module(name)

    monkeypatch.setattr("gradwatch.sinks.tensorboard.import_module", importing)

    class Writer:
        file_writer = FileWriter()

        def add_text(self, *_):
            pass

        def flush(self):
            pass

    sink = TensorBoardSink(Writer(), scalars="never")
    sink.write(report(4))
    sink.close()

    assert written == [(4, ["gradwatch/alerts_total"])]
    assert set(own) == {"tensorboardX.proto.summary_pb2"}


def test_links():
    """The links name the folder and the tab, and pin the map and the three most telling curves."""
    command, tab, address = sinks.links("my runs/v0", "gw").splitlines()

    pinned = address.partition("pinnedCards=")[2].partition("&")[0]
    parse = importlib.import_module("urllib.parse")
    assert command == "tensorboard --logdir 'my runs/v0'"
    assert tab == "http://localhost:6006/#gradwatch"
    assert address.startswith("http://localhost:6006/?pinnedCards=%5B%7B%22plugin%22")
    assert address.endswith("&smoothing=0#timeseries")
    assert json.loads(parse.unquote(pinned)) == [
        {"plugin": "images", "tag": "gw/map", "runId": "defaultExperimentId/.", "sample": 0},
        {"plugin": "scalars", "tag": "gw/findings"},
        {"plugin": "scalars", "tag": "gw/nonfinite_steps_total"},
        {"plugin": "scalars", "tag": "gw/norm_log10_median"},
    ]


# The map ------------------------------------------------------------------------------------------------

image = pytest.importorskip("PIL.Image")
PALETTE = {
    Status.OK: (0xB9, 0xDC, 0xF2),
    Status.MISSING: (0xD5, 0x5E, 0x00),
    Status.NONFINITE: (0x00, 0x00, 0x00),
    None: (0xFF, 0xFF, 0xFF),
}


def drawn(status_map):
    """Return the picture of a map, decoded."""
    picture = status_map.draw()
    pixels = image.open(io.BytesIO(picture.png)).convert("RGB")
    assert (picture.width, picture.height) == pixels.size
    return pixels


def near(pixel, status):
    """Return whether a pixel has the colour of a status."""
    return all(abs(a - b) < 12 for a, b in zip(pixel, PALETTE[status], strict=True))


def test_map_shows_the_worst():
    """A cell has the colour of the worst status of its module, and is white where it did not occur."""
    status_map = StatusMap()
    status_map.add(0, {"a.w": Status.OK, "a.b": Status.MISSING})
    status_map.add(50, {"a.w": Status.OK, "a.b": Status.OK, "w": Status.NONFINITE})

    pixels = drawn(status_map)
    cells = [pixels.getpixel((x, y)) for y in (60, 92) for x in (400, 900)]

    assert pixels.size == (1000, 152)
    expected = [Status.MISSING, Status.OK, None, Status.NONFINITE]
    assert [near(*pair) for pair in zip(cells, expected, strict=True)] == [True] * 4


def test_map_is_bounded():
    """After 200 columns each two become one that keeps the worse, however long the run."""
    status_map = StatusMap()
    for batch in range(1000):
        bad = batch == 333
        status_map.add(batch, {"a.w": Status.NONFINITE if bad else Status.OK})
    row = status_map.rows()["a"]

    assert len(row) == 125
    assert [index for index, code in enumerate(row) if code != 1] == [333 // 8]
    assert row[333 // 8] == Status.NONFINITE.code + 1


def test_numbers_do_not_overlap():
    """Numbers on the axis that would touch each other or the last one are left out."""
    status_map = StatusMap()
    for batch in range(0, 10**10, 10**8):
        status_map.add(batch, {"a.w": Status.OK})
    pixels = drawn(status_map)

    inked = [
        any(sum(pixels.getpixel((x, y))) < 300 for y in range(86, 112)) for x in range(330, 990)
    ]
    text = "".join("x" if ink else " " for ink in inked)
    assert [bool(part.strip()) for part in text.split(" " * 12)].count(True) == 3


def rows_of(*modules):
    """Return the rows of a map of these modules."""
    status_map = StatusMap()
    status_map.add(0, {f"{module}.w": Status.OK for module in modules})
    return list(status_map.rows())


def test_rows():
    """Modules have a row each while there are at most 25."""
    names = [f"layers.{i}.attn" for i in range(25)]

    assert rows_of(*names) == names


def test_rows_of_deep_models():
    """Many modules are joined under their parents."""
    names = [f"layers.{i}.{part}" for i in range(20) for part in ("attn", "mlp")]

    assert rows_of("head", *names) == ["head", *[f"layers.{i}" for i in range(20)]]


def test_rows_of_long_models():
    """Where a family is too large its neighbours are joined, and small families stay whole."""
    names = [f"layers.{i}.{part}" for i in range(41) for part in ("attn", "mlp")]

    pairs = [f"layers.{i} to {i + 1}" for i in range(0, 40, 2)]
    assert rows_of("embed", "head", *names) == ["embed", "head", *pairs, "layers.40"]


def test_rows_of_flat_models():
    """Modules without a parent are joined too."""
    rows = rows_of(*[f"m{i}" for i in range(49)])

    assert rows == [*[f"m{i} to m{i + 1}" for i in range(0, 48, 2)], "m48"]


def test_rows_of_equal_families():
    """Families of one size are joined alike."""
    names = [f"h.{i}.{part}" for i in range(12) for part in ("attn", "mlp", "norm")]

    expected = [row for i in range(12) for row in (f"h.{i}.attn to mlp", f"h.{i}.norm")]
    assert rows_of(*names) == expected


def test_long_labels():
    """A label that is too long is drawn, and nothing of it reaches into the map."""
    status_map = StatusMap()
    status_map.add(0, {f"{'very_long_module_name.' * 6}w": Status.OK})

    pixels = drawn(status_map)
    assert near(pixels.getpixel((335, 60)), Status.OK)
    assert [near(pixels.getpixel((x, 60)), None) for x in range(10)] == [True] * 10


def test_no_map(monkeypatch, tmp_path):
    """Without Pillow, and before anything was added, there is no map; all else is written."""
    assert StatusMap().draw() is None
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    write(tmp_path, report(0), report(1))

    assert tags(tmp_path, "gradwatch/map") == []
    assert scalars(tmp_path, "gradwatch/findings") == [(0, 0.0), (1, 0.0)]


def test_parameters_that_do_not_train_are_counted_in_one_line_once():
    """The first report in which something is frozen or missing is followed by a count; later ones are not."""
    stream = io.StringIO()
    sink = ConsoleSink(stream, color=False)
    some = {"a": Status.OK, "b": Status.FROZEN, "c": Status.FROZEN}
    for statuses in ({"a": Status.OK}, some, some):
        sink.write(Report(step=0, statuses=statuses))

    assert stream.getvalue() == "\nnote: 2 parameters are frozen, 1 trains\n"
