"""Every block of the documentation is run, and what is made from the code is whole.

``GRADWATCH_ACCEPT=1 pytest tests/test_docs.py`` writes what the examples print into the pages.
``make docs`` itself ends at any page that is left out and any link that leads nowhere.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import gradwatch
from docs import hooks
from gradwatch._words import SUMMARIES
from gradwatch.config import Config, LogConfig, TensorBoardConfig, WatchConfig, load_config
from gradwatch.report import Cause
from gradwatch.rules import Condition, ContractEntry, Rule
from tests.blocks import ACCEPT, ROOT, Block, blocks, rewritten, run, run_commands

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
if TYPE_CHECKING:
    from collections.abc import Iterator

MODELS = [Condition, ContractEntry, LogConfig, Rule, TensorBoardConfig, WatchConfig]
OWN_WORDS = ["param.grad is None", "loss is nan", "A layer gets a gradient of zero"]
"""Headings that no error of torch's says."""
ELSEWHERE = {"check", "testing"}
"""Pages that the tests of what they are about play."""
each_page = pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.distributed] if page.stem == "distributed" else [])
        for page in PAGES
        if page.stem not in ELSEWHERE
    ],
    ids=lambda page: page.stem if page.parent == DOCS else f"{page.parent.name}/{page.stem}",
)


class Reader:
    """One who tries a page: runs its blocks in order, in one folder, and writes down what they print."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.names: dict[str, Any] = {}
        self.unseen = ""

    def is_command(self, title: str | None) -> bool:
        """Tell whether a file is a program that a command of the page runs."""
        return bool(title and re.search(rf"^\$ .*\b{re.escape(title)}", self.text, re.MULTILINE))

    def read(self, block: Block) -> str:
        """Return what belongs into a block."""
        assert block.language in {"python", "text", "console", "yaml"}
        if block.language == "text":
            shown, self.unseen = self.unseen, ""
            return shown
        assert self.unseen == ""
        if block.language == "console":
            return run_commands(block.code)
        if block.language == "python" and not self.is_command(block.title):
            file = block.title or "example.py"
            # A file that is written anew within one process keeps its old meaning in Python's caches.
            assert not Path(file).exists()
            self.unseen = run(block.code, self.names, file, may_raise=True)
        elif block.title is None:
            assert block.language == "yaml"
            load_config(yaml.safe_load(block.code))
        else:
            Path(block.title).write_text(block.code)
            assert self.text.count(block.title) > 1  # something on the page reads it
        return block.code


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let programs import each other from the current folder, and forget them afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@each_page
@pytest.mark.usefixtures("own_modules")
def test_page(page: Path) -> None:
    """The programs and commands of a page print what stands below them, and nothing that does not."""
    text = page.read_text()
    shutil.copytree(ROOT / "configs", "configs")
    reader = Reader(text)
    today = rewritten(text, reader.read)
    if ACCEPT:
        page.write_text(today)

    assert reader.unseen == ""
    assert today == text
    assert text.count("```") == 2 * len(blocks(text))


def test_every_error_message_is_shown() -> None:
    """What torch says in the headings of the error messages is what it prints below them."""
    text = (DOCS / "faq.md").read_text()
    sections = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    told = dict(zip(sections[::2], sections[1::2], strict=True))
    shown = {heading: blocks(body, "text")[0].code for heading, body in told.items()}

    assert [heading for heading, text in shown.items() if heading not in text] == OWN_WORDS
    silent = [
        h
        for h, text in shown.items()
        if not re.search(r"^GradWatch: |^\w+\[\w+\]:", text, re.MULTILINE)
    ]
    assert silent == [
        "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed."
    ]


def nav_pages(entry: Any) -> list[str]:
    """Return the pages of a part of the navigation, in order."""
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [page for part in inner for page in nav_pages(part)]


def test_every_page_is_in_the_navigation() -> None:
    """The navigation has the pages of all causes in the order of the code, and every page once."""
    pages = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    own = {str(page.relative_to(DOCS)) for page in PAGES} - {"cost_table.md"}

    assert [page for page in pages if page in hooks.FILES and page != "changelog.md"] == [
        f"causes/{cause}.md" for cause in Cause
    ]
    assert sorted(pages) == sorted(own | hooks.FILES.keys())
    assert all(path.is_file() for path in hooks.FILES.values())


def test_every_made_part_is_used() -> None:
    """Each part that the hooks make stands in one page, and no page asks for another."""
    wanted = [
        name for page in PAGES for name in re.findall(r"<!-- made: (.+) -->", page.read_text())
    ]

    assert sorted(wanted) == sorted(hooks.PARTS)


def test_causes_are_listed_by_their_summaries() -> None:
    """The index of the causes has a row for each, in the order and words of the code."""
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.md\) \| (.*) \|$", hooks.summaries(), re.MULTILINE)

    assert rows == [(cause, cause, SUMMARIES[cause]) for cause in Cause]


def keys_of(model: Any, path: str = "") -> list[str]:
    """Return the path of every key that a model of pydantic takes, to those without keys of their own."""
    found = []
    for name, field in model.model_fields.items():
        inner = next((m for m in MODELS if m.__name__ in str(field.annotation)), None)
        many = "[]" if inner and "tuple" in str(field.annotation) else ""
        found += keys_of(inner, f"{path}{name}{many}.") if inner else [f"{path}{name}"]
    return found


def test_every_key_is_in_the_reference() -> None:
    """The reference of the configuration has every key once, with its value, default, and meaning."""
    rows = re.findall(r"^\| `([\w.\[\]]+)` \| (.+) \| (.+) \| (.+) \|$", hooks.keys(), re.MULTILINE)
    written = {key: (value, default, meaning) for key, value, default, meaning in rows}

    assert [key for key, *_ in rows] == keys_of(Config)
    assert written["log.every_n_steps"][:2] == ("whole number from 1 or null", "`null`")
    assert written["rules[].action"][:2] == ("`log`, `warn`, `stop`, `abort`", '`"warn"`')
    assert written["rules[].when.norm_above"][:2] == ("number from 0 or null", "`null`")
    assert written["contract[].gradient"][:2] == ("`required`, `none`, `intermittent`", "needed")
    assert written["watch.include"][:2] == ("text or list of texts", '`["*"]`')


def test_every_public_name_is_in_the_api() -> None:
    """The API has a section for each public name, in order, and what is written of it there."""
    text = hooks.api()

    assert re.findall(r"^## `(\w+)`$", text, re.MULTILINE) == [
        *gradwatch.__all__,
        *hooks._OTHERS,
    ]
    assert "- `every_n_steps`: Steps between measurements of norms; None takes" in text
    assert "`UNSEEN = 'unseen'`: Gradients cannot be seen here" in text
    assert "- `should_stop: bool`: Whether a rule with `action: stop` has fired" in text
    assert "    for_steps: int | None = None,\n" in text
    assert "### `Report.to_dict`" in text
    assert "on_train_batch_end" not in text


def test_measured_costs_are_put_in_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of measured costs is that of its file, and nothing stands there without the file."""
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    without = hooks.cost_table()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "cost_table.md").write_text("| 1 |\n")

    assert (without, hooks.cost_table()) == ("", "| 1 |\n")


def test_a_page_gets_its_parts_and_its_links() -> None:
    """A marker becomes its part, and a link to a file of the repository one to its page."""
    page = "see [it](../configs/default.yaml)\n\n<!-- made: summaries -->\n"

    assert hooks.on_page_markdown(page) == (
        f"see [it](configuration.md#defaultyaml)\n\n{hooks.summaries()}\n"
    )
