"""The GradWatch tab: its routes through the WSGI client, and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest
from tensorboard.backend import application
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from gradwatch import Alert, Cause, Diagnosis, Report, Site, Status
from gradwatch._page import html_of
from gradwatch.cli import main
from gradwatch.history import read_history
from gradwatch.report import Action, Severity
from gradwatch.sinks import TensorBoardSink
from gradwatch.tensorboard_plugin import Loader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVIL = "<img src=x onerror=alert(1)>"
NAMES = ("enc.weight", "enc.bias", "cut.weight", "cut.bias", EVIL)
BAD = 37
"""The one batch with a NaN."""
OK, MISSING, NAN = Status.OK, Status.MISSING, Status.NONFINITE
ORANGE, PURPLE = (213, 94, 0), (150, 40, 160)
"""Of missing and of not finite."""
CUT = Diagnosis(
    Severity.WARNING,
    Cause.DETACHED,
    MISSING,
    ("cut.weight", "cut.bias"),
    Site("net.py", 12, 12, 8, 20, "Net.forward", "cut", "        h = self.cut(x).detach()"),
    "torch.Tensor.detach",
    (f"a note with {EVIL}",),
    "remove it",
)
ALERT = Alert("dead", Action.WARN, ("cut.weight",), None, None, 10, 9, MISSING)


def write(
    folder: Path, *, batches: int = 60, names: tuple[str, ...] = NAMES, sick: bool = True
) -> Path:
    """Write a run with a dead layer from the start, and NaN in one batch."""
    with SummaryWriter(str(folder)) as writer:
        sink = TensorBoardSink(writer, scalars="never")
        for batch in range(batches):
            statuses = {
                name: MISSING
                if sick and name.startswith("cut")
                else NAN
                if sick and batch == BAD and name == "enc.weight"
                else OK
                for name in names
            }
            sink.write(
                Report(
                    batch,
                    logged=True,
                    statuses=statuses,
                    norms={n: 0.5 + batch / 100 for n, s in statuses.items() if s is OK},
                    diagnoses=(CUT,) if sick else (),
                    alerts=(ALERT,) if sick and batch == ALERT.step else (),
                    batch=batch,
                )
            )
        sink.close()
    return folder


# ---- the server


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """Return a client of TensorBoard with the plugin, over a folder with two runs."""
    write(tmp_path / "sick")
    write(tmp_path / "well", sick=False)
    return client_of(tmp_path)


def client_of(folder: Path) -> Client:
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provided = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    context = base_plugin.TBContext(data_provider=provided, logdir=str(folder))
    plugin = Loader().load(context)
    return Client(application.TensorBoardWSGI([plugin], data_provider=provided))


def get(client: Client, path: str) -> Any:
    return client.get(f"/data/plugin/gradwatch/{path}")


def test_both_runs_are_listed(client: Client):
    """The runs with our data are listed, the newest first."""
    assert get(client, "runs").json == {"runs": ["well", "sick"]}


def test_findings_are_told_with_place_and_fix(client: Client):
    """Each finding has its words, its place, and its steps; counts are those of the last step."""
    told = get(client, "findings?run=sick").json

    (found,) = told["findings"]
    assert (found["cause"], found["status"], found["place"]) == ("detached", "missing", "net.py:12")
    assert found["text"].startswith("warning[detached]: `cut.*` get no gradient\n")
    assert told["counts"] | {"ok": 3, "missing": 2} == told["counts"]
    assert [alert["rule"] for alert in told["alerts"]] == ["dead"]
    assert get(client, "findings?run=well").json["findings"] == []


def matrix(answer: Any) -> tuple[dict[str, Any], np.ndarray]:
    raw = answer.data
    (length,) = struct.unpack_from("<I", raw)
    head = json.loads(raw[4 : 4 + length])
    cells = np.frombuffer(raw, np.uint8, -1, 4 + length)
    return head, cells.reshape(2, len(head["names"]), len(head["ranges"]))


def test_the_map_is_pooled_and_keeps_the_worst(client: Client):
    """With fewer columns than batches the one NaN stays visible, and a zoom gives single batches."""
    head, cells = matrix(get(client, "matrix?run=sick&columns=10"))
    assert head["ranges"][6] == [36, 41]
    assert cells[0, 0].tolist() == [NAN.code if column == 6 else 0 for column in range(10)]
    assert set(cells[0, 2].tolist()) == {MISSING.code}

    head, cells = matrix(get(client, "matrix?run=sick&columns=10&low=35&high=39"))
    assert head["ranges"] == [[batch, batch] for batch in range(35, 40)]
    assert cells[0, 0].tolist() == [0, 0, NAN.code, 0, 0]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("findings?run=nothing", 404),
        ("matrix?run=sick&columns=many", 400),
        ("matrix?run=sick&columns=0", 400),
        ("static/../_plugin.py", 404),
        ("static/%2e%2e/_plugin.py", 404),
        ("static/page.js", 200),
        ("static/index.js", 200),
    ],
)
def test_wrong_requests_are_answered(client: Client, path: str, status: int):
    """Mistakes get 400 or 404, and only the page's own files are served."""
    assert get(client, path).status_code == status


def test_a_run_that_grows_is_read_again(tmp_path: Path):
    """What is written after the first look is in the second."""
    write(tmp_path / "run", batches=3)
    client = client_of(tmp_path)
    first = get(client, "findings?run=run").json["batches"]
    time.sleep(1.1)  # event files are named by the second
    write(tmp_path / "run", batches=40)
    later = get(client_of(tmp_path), "findings?run=run").json["batches"]

    assert [first, later] == [[0, 2], [0, 39]]


def test_the_plugin_loads_neither_torch_nor_lightning():
    """Starting TensorBoard costs no user of the environment the import of torch."""
    code = (
        "import sys, gradwatch.tensorboard_plugin as p; first = 'numpy' in sys.modules\n"
        "import gradwatch.tensorboard_plugin._plugin\n"
        "print([m for m in ('torch', 'lightning', 'pytorch_lightning') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603

    assert done.stdout == "[]\n"


# ---- the command


def test_report_prints_and_writes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`gradwatch report` prints the findings, and writes a page that loads nothing."""
    page = tmp_path / "page.html"

    assert main(["report", str(write(tmp_path / "run")), "--output", str(page)]) == 0

    out = capsys.readouterr().out
    assert out.startswith("warning[detached]: `cut.*` get no gradient\n  --> net.py:12")
    assert f"60 logged steps of 5 parameters: {page}\ntensorboard --logdir " in out
    text = page.read_text()
    assert EVIL not in text
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)|@import|url\(", text) == []


def test_report_of_a_healthy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Without findings it says so, and with `-` it writes nothing."""
    assert main(["report", str(write(tmp_path / "run", sick=False)), "--output", "-"]) == 0

    assert capsys.readouterr().out.startswith("no problem found in 5 parameters\ntensorboard ")


def test_report_of_a_run_without_a_logged_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of a run that was cut off before its first logged step nothing is known, and that is what is said."""
    (file,) = write(tmp_path, sick=False).iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(b"alerts_total", whole.index(b"gradwatch/params/"))])

    assert main(["report", str(tmp_path), "--output", "-"]) == 0

    out = capsys.readouterr().out
    assert out.startswith("nothing is known of this run yet: no logged step of it was written\n")


def test_report_that_cannot_be_written_names_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A page in a folder that is not there is one line with its name."""
    page = tmp_path / "nowhere" / "page.html"

    assert main(["report", str(write(tmp_path / "run")), "--output", str(page)]) == 1

    assert capsys.readouterr().err == f"error[output]: `{page}`: No such file or directory\n"


def test_report_of_nothing_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A folder without a run gets one line on stderr, and status 2."""
    assert main(["report", str(tmp_path)]) == 2

    assert capsys.readouterr().err.startswith("error[history]: no history of GradWatch below")


# ---- the browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("GRADWATCH_BROWSER") != "required",
    reason="no Chromium on this machine",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "GRADWATCH_BROWSER=required, and there is no Chromium"
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield launched
        launched.close()


class Tab:
    """A page, and all that went wrong on it."""

    def __init__(self, browser: Any, *, width: int = 1300, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", self._refuse)
        self.frame = self.page

    def _refuse(self, dialog: Any) -> None:
        self.wrong.append("a dialog")
        dialog.dismiss()

    def open(self, url: str) -> Self:
        self.page.goto(url)
        if url.startswith("http"):
            self.page.wait_for_selector("iframe", state="attached")
            self.frame = next(f for f in self.page.frames if f is not self.page.main_frame)
        self.ready()
        return self

    def ready(self, times: int = 1) -> None:
        self.frame.wait_for_function(f"window.gradwatchReady >= {times}", timeout=20_000)

    def text(self, selector: str) -> str:
        found: str = self.frame.locator(selector).inner_text()
        return found

    def pixels(self, colour: tuple[int, int, int]) -> int:
        """Return how many pixels of the map have a colour."""
        found: int = self.frame.evaluate(
            """async ([r, g, b]) => {
                await new Promise(requestAnimationFrame);
                const canvas = document.querySelector("canvas");
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                let count = 0;
                for (let i = 0; i < data.length; i += 4)
                    if (data[i] === r && data[i + 1] === g && data[i + 2] === b) count += 1;
                return count;
            }""",
            list(colour),
        )
        return found

    def labels(self) -> int:
        """Return the number of rows of the map, as it says to those who cannot see it."""
        name = self.frame.locator("canvas").get_attribute("aria-label")
        return int(re.search(r"map of (\d+) rows", name)[1])  # type: ignore[index]


@contextmanager
def tensorboard(folder: Path, *options: str) -> Iterator[str]:
    """Run a TensorBoard server, and yield its address once it knows a run."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
    server = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)  # noqa: S603
    assert server.stderr is not None
    try:
        found = None
        while found is None:
            line = server.stderr.readline()
            assert line, "TensorBoard ended"
            found = re.search(r"http://[\w.:]+\S*", line)
        url = found[0].rstrip("/") + "/"
        for _ in range(200):
            try:
                with urlopen(f"{url}data/plugin/gradwatch/runs") as answer:  # noqa: S310
                    if json.load(answer)["runs"]:
                        break
            except OSError:
                pass
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.communicate()


@needs_browser
@pytest.mark.parametrize(
    "options", [("--load_fast", "true"), ("--load_fast", "false", "--path_prefix", "/tb")]
)
def test_the_tab_shows_findings_and_map(browser: Any, options: tuple[str, ...], tmp_path: Path):
    """With either of TensorBoard's loaders, planted faults are there as text and as coloured cells."""
    write(tmp_path / "run")
    with tensorboard(tmp_path, *options) as url:
        tab = Tab(browser).open(f"{url}#gradwatch")

        assert tab.text("#verdict") == "1 finding: 1 missing"
        assert "remove it" in tab.text("#findings")
        assert "net.py:12" in tab.text("#findings")
        assert tab.labels() == len(NAMES)
        assert tab.pixels(ORANGE) > 10_000
        assert 50 < tab.pixels(PURPLE) < 1_000  # one cell of 300
        assert tab.wrong == []
        assert "gradwatch&run=run" in tab.page.evaluate("location.hash")


@pytest.fixture
def standing(browser: Any, tmp_path: Path) -> Tab:
    """Return the page of a run, as the file that `gradwatch report` writes."""
    file = tmp_path / "page.html"
    file.write_text(html_of(read_history(write(tmp_path / "run")), "run"))
    return Tab(browser).open(file.as_uri())


@needs_browser
def test_names_are_text(standing: Tab):
    """A parameter that is called like a tag is shown, and nothing of it runs."""
    assert EVIL in standing.text("#findings")
    assert standing.frame.locator("img").count() == 0
    assert standing.wrong == []


@needs_browser
def test_the_filter_takes_regular_expressions(standing: Tab):
    """Rows are those that match; a broken expression is marked, and hides nothing."""
    field = standing.frame.locator("input[type=search]")
    counts = {}
    for text in ("^enc", "weight$", "(", ""):
        field.fill(text)
        counts[text] = (standing.labels(), field.get_attribute("aria-invalid"))

    assert counts == {
        "^enc": (2, "false"),
        "weight$": (2, "false"),
        "(": (5, "true"),
        "": (5, "false"),
    }


@needs_browser
def test_statuses_filter_rows(standing: Tab):
    """Of a status only the parameters that ever had it are shown."""
    standing.frame.locator("button[data-status=nonfinite]").click()

    assert standing.labels() == 1
    assert standing.pixels(ORANGE) == 0


@needs_browser
def test_a_drag_zooms_and_the_view_can_be_shared(standing: Tab):
    """Dragging shows fewer steps, the address keeps them, and Escape goes back."""
    before = standing.pixels(PURPLE)
    box = standing.frame.locator("canvas").bounding_box()
    mouse = standing.page.mouse
    left = box["x"] + 260 + (box["width"] - 260) * 0.555
    mouse.move(left, box["y"] + 30)
    mouse.down()
    mouse.move(left + 150, box["y"] + 30, steps=3)
    mouse.up()
    standing.page.wait_for_function("location.hash.includes('low=33')")
    zoomed = standing.pixels(PURPLE)
    standing.page.reload()
    standing.ready()

    assert zoomed > 4 * before
    assert standing.pixels(PURPLE) == zoomed
    standing.frame.locator("canvas").press("Escape")
    standing.page.wait_for_function("!location.hash.includes('low')")
    assert standing.pixels(PURPLE) == before


@needs_browser
def test_the_map_is_reached_by_keyboard(standing: Tab):
    """Arrows name the cell under the cursor, and Enter shows a parameter's norm over time."""
    canvas = standing.frame.locator("canvas")
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        canvas.press(key)
    assert standing.text(".tip").startswith("cut.weight\nbatch 1: missing")
    canvas.press("ArrowUp")
    canvas.press("Enter")

    assert standing.text("#chart").startswith("enc.bias")
    assert standing.frame.locator("#chart polyline").count() == 1


@needs_browser
def test_the_pointer_tells_exact_values(standing: Tab):
    """Over a cell stand its parameter, its batch, its status, and its norm."""
    box = standing.frame.locator("canvas").bounding_box()
    width = box["width"] - 260
    standing.page.mouse.move(box["x"] + 260 + width * (BAD + 0.5) / 60, box["y"] + 18 + 5)

    assert standing.text(".tip") == f"enc.weight\nbatch {BAD}: nonfinite\nnorm not measured"


@needs_browser
@pytest.mark.parametrize("width", [1300, 800])
def test_dark_mode_has_colours_of_its_own(browser: Any, width: int, tmp_path: Path):
    """On dark the page is dark, statuses keep their hue, and nothing is wider than the window."""
    file = tmp_path / "page.html"
    file.write_text(html_of(read_history(write(tmp_path / "run")), "run"))
    tab = Tab(browser, width=width, dark=True).open(file.as_uri())

    paper = tab.frame.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(32, 33, 36)"
    assert tab.pixels(ORANGE) > 5_000
    assert tab.pixels((214, 120, 220)) > 30
    assert tab.frame.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
def test_modules_are_folded_in_large_models(browser: Any, tmp_path: Path):
    """Above 300 parameters rows are modules with their worst status; one opens to its parameters."""
    names = tuple(f"layers.{i}.{part}" for i in range(200) for part in ("weight", "bias"))
    file = tmp_path / "page.html"
    run = write(tmp_path / "run", names=(*names, "cut.weight", "cut.bias"), batches=5)
    file.write_text(html_of(read_history(run), "run"))
    tab = Tab(browser).open(file.as_uri())
    folded = tab.labels()
    tab.frame.get_by_text("problems first").click()
    tab.frame.locator("canvas").press("Enter")

    assert (folded, tab.labels()) == (201, 203)
    assert tab.pixels(ORANGE) > 10_000


@needs_browser
def test_a_run_without_findings_says_so(browser: Any, tmp_path: Path):
    """A healthy run has a verdict too."""
    file = tmp_path / "page.html"
    file.write_text(html_of(read_history(write(tmp_path / "run", sick=False)), "run"))

    assert Tab(browser).open(file.as_uri()).text("#verdict") == "No problem found in 5 parameters"


@needs_browser
def test_a_thousand_parameters_and_ten_thousand_steps_open_at_once(browser: Any, tmp_path: Path):
    """Such a run is on the screen within three seconds of opening the tab."""
    names = [f"layers.{i}.weight" for i in range(1_000)]
    rng = np.random.default_rng(0)
    norms = [dict(zip(names, rng.lognormal(size=1_000).tolist(), strict=True)) for _ in range(16)]
    statuses = dict.fromkeys(names, OK)
    with SummaryWriter(str(tmp_path / "run")) as writer:
        sink = TensorBoardSink(writer, scalars="never", clock=lambda: 0.0)
        for batch in range(10_000):
            state = statuses if batch != 7_001 else statuses | {"layers.5.weight": NAN}
            sink._batch = batch
            sink._add_history(sink._history.add(batch, batch, state, norms[batch % 16]))
        sink._add_history(sink._history.flush())
    with tensorboard(tmp_path) as url:
        tab = Tab(browser)
        tab.page.goto(url)  # TensorBoard's own start is its own affair
        tab.page.wait_for_timeout(1_000)
        begin = time.monotonic()
        tab.open(f"{url}?x={quote('1')}#gradwatch")
        seconds = time.monotonic() - begin

        assert tab.labels() == 1_000
        tab.frame.locator("button[data-status=nonfinite]").click()
        assert tab.labels() == 1
        assert tab.pixels(PURPLE) > 0
        assert seconds < 3
