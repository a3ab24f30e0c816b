"""Every page about a cause is true: its example prints what it says, and its way out leaves nothing to say.

``GRADWATCH_ACCEPT=1 pytest tests/test_causes.py`` writes what the examples print into the pages.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from gradwatch.config import load_config
from gradwatch.report import Cause, Status
from tests import blocks

FOLDER = Path(str(resources.files("gradwatch") / "causes"))
PAGES = sorted(FOLDER.glob("*.md"))
SECTIONS = [
    "What it means",
    "Why it matters",
    "Example",
    "Output",
    "Instead",
    "When it is intended",
    "Known limits",
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


class Run(NamedTuple):
    output: str
    names: dict[str, Any]

    @property
    def watched(self) -> Any:
        """What was watched with: the ``diagnosis`` or the ``watcher`` of the code."""
        return self.names.get("diagnosis") or self.names["watcher"]


def sections(page: Path) -> dict[str, str]:
    """Return the text below each heading of a page, in the page's order."""
    parts = re.split(r"^## (.+)\n", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def block(page: Path, section: str, language: str) -> str:
    """Return the one block of a language in a section."""
    (found,) = blocks.blocks(sections(page)[section], language)
    return found.code


def run(code: str) -> Run:
    """Run ``code`` as ``example.py`` in the current folder."""
    names: dict[str, Any] = {}
    return Run(blocks.run(code, names), names)


def accept(page: Path, output: str) -> None:
    """Write ``output`` into the section of that name."""
    pattern = r"(^## Output\n\n```text\n).*?(^```$)"
    text, found = re.subn(
        pattern,
        lambda match: f"{match[1]}{output}{match[2]}",
        page.read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )

    assert found == 1
    page.write_text(text)


def test_each_cause_has_a_page() -> None:
    """Every cause has a page, and every page a cause."""
    assert [page.stem for page in PAGES] == sorted(Cause)


@each_page
def test_sections(page: Path) -> None:
    """A page is titled with its cause, and has all the sections in their order."""
    title, *_ = page.read_text().splitlines()

    assert title == f"# {page.stem}"
    assert list(sections(page)) == SECTIONS
    assert all(text.strip() for text in sections(page).values())


@each_page
def test_length(page: Path) -> None:
    """A page is short enough to be read at once, on a screen of usual width."""
    lines = page.read_text().splitlines()
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)

    assert 60 <= len(lines) <= 105
    assert max(map(len, prose.splitlines())) <= 115


@each_page
def test_example(page: Path) -> None:
    """The example prints exactly what the page says."""
    output = run(block(page, "Example", "python")).output
    if blocks.ACCEPT:
        accept(page, output)

    assert output
    assert output == block(page, "Output", "text")


@each_page
def test_example_shows_the_cause(page: Path) -> None:
    """The example shows the page's cause and no other, and names its own page."""
    output = block(page, "Output", "text")
    named = set(re.findall(r"^\w+\[(\w+)\]|gradwatch explain (\w+)$", output, re.MULTILINE))

    assert {name for pair in named for name in pair} <= {page.stem, ""}
    assert page.stem in output


@each_page
def test_instead(page: Path) -> None:
    """The way out leaves nothing to diagnose, and prints what its last line says."""
    code = block(page, "Instead", "python")
    done = run(code)
    promised = code.rstrip().rpartition("  # ")[2]

    assert done.output == f"{promised}\n"
    assert done.watched.report.diagnoses == ()
    assert set(done.watched.report.statuses.values()) == {Status.OK}


@each_page
def test_intended_loads(page: Path) -> None:
    """What the page says to write into the configuration can be loaded."""
    text = block(page, "When it is intended", "yaml")
    Path("intended.yaml").write_text(text)

    assert load_config("intended.yaml") == load_config(yaml.safe_load(text))
    assert yaml.safe_load(text).keys() & {"contract", "rules", "watch"}


@pytest.mark.parametrize(
    "page",
    # A gradient with NaN in it is never meant: that page tells how to wait for the second.
    [page for page in PAGES if page.stem != Cause.NONFINITE_GRADIENT],
    ids=lambda page: page.stem,
)
def test_intended_silences(page: Path) -> None:
    """With what the page says to write, GradWatch has nothing to say about the example."""
    text = block(page, "When it is intended", "yaml")
    Path("intended.yaml").write_text(text)
    watched = "with Watcher(model, 'intended.yaml') as diagnosis, diagnosis.step():"
    code = (
        block(page, "Example", "python")
        .replace("import diagnose\n", "import Watcher\n")
        .replace("with diagnose(model) as diagnosis:", watched)
        .replace('{"trace": "never"}', "'intended.yaml'")
        .replace("optimizers=", "'intended.yaml', optimizers=")
    )
    done = run(code)

    assert "intended.yaml" in code
    assert done.watched.diagnoses == ()
    assert not re.search(r"^\w+\[", done.output, re.MULTILINE)
