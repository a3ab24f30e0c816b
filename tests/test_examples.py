"""Every example runs as a user runs it, and prints what it is there to show."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from gradwatch.cli import main

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits.py"
CLI = ROOT / "examples" / "cli.py"
CLI_YAML = ROOT / "configs" / "cli.yaml"


class Run(NamedTuple):
    status: int
    stdout: str
    stderr: str
    folder: Path


def run(script: Path, *arguments: str, cwd: Path) -> Run:
    """Run ``script`` in a process of its own, on a wide terminal, without colours."""
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr, cwd)


def line_of(text: str) -> int:
    """Return the number of the last line of examples/digits.py with ``text`` in it."""
    lines = DIGITS.read_text().splitlines()
    return max(number for number, line in enumerate(lines, start=1) if text in line)


def said(output: str) -> list[tuple[str, list[str], int | None]]:
    """Return of each diagnosis or alert its name, what it is about, and the line it points at."""
    pattern = r"^(?:note|warning|error)\[(\w+)\]: (.*)\n(?: *--> .*digits\.py:(\d+) )?"
    return [
        (name, re.findall(r"`([\w.*]+)`", fact), int(line) if line else None)
        for name, fact, line in re.findall(pattern, output, re.MULTILINE)
    ]


def accuracy(output: str) -> float:
    """Return the share of held-out images that a run of examples/digits.py got right."""
    (percent,) = re.findall(r"^([\d.]+)% of 450 held-out images right", output, re.MULTILINE)
    return float(percent)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Return a function that trains the digits, once for each set of arguments."""
    folder = tmp_path_factory.mktemp("digits")

    @cache
    def train(*arguments: str) -> Run:
        return run(DIGITS, "--epochs", "6", *arguments, cwd=folder)

    return train


def test_digits_diagnoses(digits) -> None:
    """The demo says each of its mistakes once, with its parameters and the line it is made in."""
    detached = line_of("self.shapes(self.stem(images)).detach()")
    dropped = line_of("parity_loss = F.")

    assert said(digits().stderr) == [
        ("detached", ["shapes.*"], detached),
        ("unused", ["rotation.*"], None),
        ("not_in_loss", ["parity.*"], dropped),
        ("disconnected", ["shapes.*", "parity.*", "rotation.*"], None),
    ]


def test_digits_carets(digits) -> None:
    """The demo's carets stand under the whole expression that cuts the branch off."""
    cut = "self.shapes(self.stem(images)).detach()"
    lines = digits().stderr.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.endswith(cut)]
    carets = lines[at + 1].index("^"), lines[at + 1].rindex("^") + 1

    assert lines[at][slice(*carets)] == cut


def test_digits_table(digits) -> None:
    """The demo says of each parameter what its gradient was, and whether it trained."""
    rows = re.findall(r"│ (\S+) +│ [\d,]+ +│ (\w+) +│ (yes|no) +│", digits().stdout)
    modules = {(name.split(".")[0], status, trained) for name, status, trained in rows}

    assert len(rows) == 14
    assert modules == {
        ("stem", "frozen", "no"),
        ("shapes", "missing", "no"),
        ("ink", "ok", "yes"),
        ("digit", "ok", "yes"),
        ("parity", "missing", "no"),
        ("rotation", "missing", "no"),
    }


def test_digits_tensorboard(digits) -> None:
    """The last command that the demo prints names a folder with something for TensorBoard in it."""
    done = digits()
    (command,) = re.findall(r"^    (.*tensorboard'? --logdir .*)$", done.stdout, re.MULTILINE)
    folder = shlex.split(command)[-1]

    assert list((done.folder / folder).glob("events.out.tfevents.*"))


def test_digits_fixed(digits) -> None:
    """Without the mistakes there is nothing to say, every parameter trains, and accuracy is far better."""
    fixed = digits("--fixed")

    assert fixed.status == 0
    assert said(fixed.stdout + fixed.stderr) == []
    assert "│ no " not in fixed.stdout
    assert accuracy(fixed.stdout) > accuracy(digits().stdout) + 10


def test_digits_strict(digits) -> None:
    """With the strict rules the first step ends the run, and the process says so by its status."""
    strict = digits("--strict")

    assert strict.status == 1
    assert (
        "DisconnectedParameterError: a rule of configs/strict.yaml ended the run" in strict.stdout
    )
    assert "Traceback" not in strict.stderr


def test_digits_is_quiet(digits) -> None:
    """Nothing but diagnoses goes to stderr: no hint of Lightning's, no warning of anyone's."""
    assert digits("--fixed").stderr == ""


def test_cli(tmp_path: Path) -> None:
    """LightningCLI trains with the callback from YAML, whose contract keeps the teacher unmentioned."""
    done = run(CLI, "fit", "--config", str(CLI_YAML), cwd=tmp_path)

    assert done.status == 0, done.stderr
    assert said(done.stdout + done.stderr) == []
    assert list(tmp_path.glob("runs/cli/version_0/events.out.tfevents.*"))


def test_cli_path(tmp_path: Path) -> None:
    """The configuration may be a path, here of rules that end the run for the teacher's sake."""
    text = CLI_YAML.read_text()
    inline = text[text.index("        config:  ") : text.index("        # config:")]
    path = f"        config: {ROOT / 'configs' / 'strict.yaml'}\n"
    (tmp_path / "cli.yaml").write_text(text.replace(inline, path))
    done = run(CLI, "fit", "--config", "cli.yaml", cwd=tmp_path)

    assert done.status == 1
    assert "DisconnectedParameterError" in done.stderr
    assert "teacher" in done.stderr


def test_cli_typo(tmp_path: Path) -> None:
    """A misspelt key inside ``config`` is refused before anything trains."""
    text = CLI_YAML.read_text().replace("for_steps", "for_step")
    (tmp_path / "cli.yaml").write_text(text)
    done = run(CLI, "fit", "--config", "cli.yaml", cwd=tmp_path)

    assert done.status == 2
    assert "for_step" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "sick", "wrong", "right"),
    [
        (
            "plain_pytorch",
            ["loss_terms"],
            "drawing reaches 8 of 8 parameters\nspread reaches 0 of 8 parameters\n",
            "drawing reaches 8 of 8 parameters\nspread reaches 4 of 8 parameters\n",
        ),
        ("fabric", ["left_torch", "disconnected"], "findings: 1\n", "findings: 0\n"),
        ("transformers_trainer", ["left_torch", "disconnected"], "findings: 1\n", "findings: 0\n"),
    ],
)
def test_other_loops(example: str, sick: list[str], wrong: str, right: str, tmp_path: Path):
    """Loops that are not Lightning's are told what is wrong, and nothing once it is mended."""
    script = ROOT / "examples" / f"{example}.py"
    spoilt, fixed = run(script, cwd=tmp_path), run(script, "--fixed", cwd=tmp_path)

    assert (spoilt.status, fixed.status) == (0, 0)
    assert re.findall(r"^(?:note|warning|error)\[(\w+)\]", spoilt.stderr, re.MULTILINE) == sick
    assert re.findall(r"^(?:note|warning|error)\[(\w+)\]", fixed.stderr, re.MULTILINE) == []
    assert spoilt.stdout.endswith(wrong)
    assert fixed.stdout.endswith(right)


@pytest.mark.parametrize(
    ("factory", "status", "finding"),
    [
        ("plain_pytorch:fixed", 0, []),
        ("fabric:spoilt", 1, ["left_torch"]),
        ("fabric:fixed", 0, []),
        ("transformers_trainer:spoilt", 1, ["left_torch"]),
        ("transformers_trainer:fixed", 0, []),
    ],
)
def test_check(
    factory: str,
    status: int,
    finding: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """`gradwatch check` finds in one step of each example what is wrong with it, and nothing once mended."""
    monkeypatch.chdir(ROOT)

    assert main(["check", f"examples.{factory}"]) == status
    said = re.findall(r"^(?:warning|error)\[(\w+)\]", capsys.readouterr().out, re.MULTILINE)
    assert said == finding
