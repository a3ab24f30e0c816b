"""Every block of the README is run, and what it says of commands, causes, and output is so.

``GRADWATCH_ACCEPT=1 pytest tests/test_readme.py`` writes what its example prints into it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gradwatch import Watcher, cli
from gradwatch._words import SUMMARIES
from gradwatch.config import load_config
from gradwatch.report import Cause
from tests.blocks import ACCEPT, ROOT, blocks, run

README = ROOT / "README.md"
TEXT = README.read_text()


def codes(language: str) -> list[str]:
    """Return what stands in the blocks in a language."""
    return [block.code for block in blocks(TEXT, language)]


def commands() -> list[str]:
    """Return every command that the README names: in its console blocks, and in its text."""
    typed = [line for block in codes("console") for line in block.splitlines()]
    named = re.findall(r"(?:`| = more: )(gradwatch [^`\n]+)", TEXT)
    return [line.removeprefix("$ ").partition(" #")[0].strip() for line in typed] + named


def test_length() -> None:
    """The README is read in a few minutes."""
    assert len(TEXT.splitlines()) <= 120


def test_languages() -> None:
    """Every block says its language, and it is one that these tests run."""
    assert {block.language for block in blocks(TEXT)} == {"console", "python", "text", "yaml"}
    assert TEXT.count("```") == 2 * len(blocks(TEXT))


def test_commands_come_first() -> None:
    """The two commands for a clean clone are the first block."""
    assert blocks(TEXT)[0].language == "console"
    assert [line.split()[:3] for line in blocks(TEXT)[0].code.splitlines()] == [
        ["$", "make", "demo"],
        ["$", "make", "test"],
    ]


def test_example() -> None:
    """The example prints exactly the diagnosis that stands below it."""
    output = run(codes("python")[0])
    if ACCEPT:
        pattern = re.compile(r"(^```text\n).*?(^```$)", re.DOTALL | re.MULTILINE)
        README.write_text(pattern.sub(lambda match: f"{match[1]}{output}{match[2]}", TEXT))
    (shown,) = re.findall(r"^```text\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)

    assert output == shown
    assert output.startswith("warning[")


def test_python_blocks() -> None:
    """The blocks of Python run one after the other, as one program."""
    shutil.copytree(ROOT / "configs", "configs")
    names: dict[str, Any] = {}
    for number, code in enumerate(codes("python")):
        run(code, names, f"example{number}.py")

    assert [found.cause for found in names["watcher"].diagnoses] == [Cause.DETACHED]
    assert list(Path("runs").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("text", codes("yaml"))
def test_yaml_blocks(text: str) -> None:
    """What stands there in YAML can be loaded."""
    Path("readme.yaml").write_text(text)

    assert load_config("readme.yaml").contract
    assert load_config("readme.yaml").rules


def watched_run(folder: str) -> None:
    """Train for a step, with TensorBoard's files in a folder."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watcher = Watcher(model, optimizers=[optimizer], log_dir=folder, every_n_steps=1)
    with watcher, watcher.step():
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("command", commands())
def test_commands(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Every command that is named exists: a target of the Makefile, or one of ``gradwatch``."""
    program, *arguments = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)

        assert arguments[0] in targets
    else:
        config = ROOT / "configs" / "strict.yaml"
        real = {"FILE": str(config), "NAME": "detached", "LOG_DIR": "run"}
        if "LOG_DIR" in arguments:
            watched_run("run")
        words = [real.get(word, word) for word in arguments]

        assert program == "gradwatch"
        assert cli.main(words) == 0
        assert capsys.readouterr().err == ""


def test_causes() -> None:
    """The table names every cause, in the order of the code and with its words."""
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(gradwatch/causes/(\w+)\.md\) \| (.*) \|$", TEXT, re.MULTILINE
    )

    assert rows == [(cause, cause, SUMMARIES[cause]) for cause in Cause]


def test_links() -> None:
    """Every link leads to a file of this repository."""
    links = re.findall(r"\]\(([^)]+)\)", TEXT)

    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_costs_are_those_measured() -> None:
    """Each share in the table of costs, and its error, is the one that the benchmark has written down."""
    measured = json.loads((ROOT / "docs" / "cost_table.json").read_text())
    shares = {
        (e["way"], e["model"]): f"{e['share']:.1%} ± {100 * e['error_ms'] / e['bare_ms']:.1f}"
        for e in measured
    }
    section = TEXT.partition("## What it costs\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    (_, *models), *told = rows
    assert len(told) >= 3
    for way, *cells in told:
        assert cells == [shares[way, model.removeprefix("a ")] for model in models]
