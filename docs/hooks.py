"""What MkDocs is told beyond ``mkdocs.yml``: the pages, and the parts of pages, that are made from the code.

A line ``<!-- made: NAME -->`` in a page stands for the part of that name, a function in ``PARTS``. The pages
of the causes and the changelog are the very files of the repository. Nothing here is written by hand twice.

Limits: docstrings are read from the text, not from objects, so that neither torch nor Lightning is needed;
what is inherited from them is not shown.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradwatch
from gradwatch._words import SUMMARIES
from gradwatch.config import Config
from gradwatch.report import Cause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
CAUSES = ROOT / "gradwatch" / "causes"
FILES = {f"causes/{cause}.md": CAUSES / f"{cause}.md" for cause in Cause} | {
    "changelog.md": ROOT / "CHANGELOG.md"
}
"""Pages that lie elsewhere in the repository, by their place in the site."""
LINKS = {"../configs/default.yaml": "configuration.md#defaultyaml"}
"""Links to files of the repository, and where the site has them."""
_HOOKS = re.compile(r"on_\w+|setup|teardown")
"""Methods that Lightning calls, and no user."""


# What MkDocs calls ------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere in the repository."""
    from mkdocs.structure.files import File

    for name, path in FILES.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in the parts that are made, and turn links into the repository into links within the site."""
    for there, here in LINKS.items():
        markdown = markdown.replace(f"]({there})", f"]({here})")
    return re.sub(r"^<!-- made: (.+) -->$", lambda m: PARTS[m[1]](), markdown, flags=re.MULTILINE)


# Causes and costs -------------------------------------------------------------------------------------


def summaries() -> str:
    """Return the table of the causes, a line each, in the order of the code."""
    rows = (f"| [`{cause}`]({cause}.md) | {SUMMARIES[cause]} |" for cause in Cause)
    return "\n".join(["| cause | what it means |", "|---|---|", *rows])


def cost_table() -> str:
    """Return the measured costs; nothing while they are not there."""
    file = ROOT / "docs" / "cost_table.md"
    return file.read_text() if file.is_file() else ""


def config_file(name: str) -> str:
    """Return one of the configurations of this repository as a block."""
    return f"```yaml\n{(ROOT / 'configs' / name).read_text()}```"


# The configuration ------------------------------------------------------------------------------------


def keys() -> str:
    """Return a section for each top-level key, with a table of the keys below it."""
    schema = Config.model_json_schema()
    parts = []
    for name, field in schema["properties"].items():
        meaning = field.get("description") or _target(field, schema)["description"]
        parts.append(f"### `{name}`\n\n{meaning}\n")
        rows = [f"| {' | '.join(cells)} |" for cells in _rows(name, field, schema)]
        parts.append("\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]))
        parts.append("")
    return "\n".join(parts)


def _target(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return what a field refers to, or the field itself."""
    reference = field.get("items", field).get("$ref", "")
    target: dict[str, Any] = schema["$defs"].get(reference.rpartition("/")[2], field)
    return target


def _rows(path: str, field: dict[str, Any], schema: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row for a key without keys of its own, or for each one below it."""
    target = _target(field, schema)
    if target is field:
        yield [f"`{path}`", _type(field), _default(field), field["description"]]
        return
    path += "[]" if field.get("type") == "array" else ""
    for name, inner in target["properties"].items():
        yield from _rows(f"{path}.{name}", inner, schema)


def _type(field: dict[str, Any]) -> str:
    """Return what a value may be, in words."""
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "array": "list of texts",
        "null": "null",
    }
    least = f" from {field['ge']}" if "ge" in field else ""
    return f"{words[field['type']]}{least}"


def _default(field: dict[str, Any]) -> str:
    return f"`{json.dumps(field['default'])}`" if "default" in field else "needed"


_OTHERS = {"GradWatchCallback": "transformers", "assert_gradients": "testing"}
"""Public names that are imported from a room of their own."""

# The API ----------------------------------------------------------------------------------------------


def api() -> str:
    """Return a section for each public name: its signature, its docstring, and what it has."""
    named = [_section(name, gradwatch._HOMES[name]) for name in gradwatch.__all__]
    return "\n\n".join([*named, *(_section(name, home) for name, home in _OTHERS.items())])


def _section(name: str, room: str) -> str:
    """Return the section of one public name."""
    home = ROOT / "gradwatch" / f"{room}.py"
    body = ast.parse(home.read_text()).body
    node = next(n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name)
    parts = [f"## `{name}`"]
    if name in _OTHERS:
        parts.append(f"From `gradwatch.{room}`.")
    if isinstance(node, ast.FunctionDef):
        return "\n\n".join([*parts, _signature(name, node), _prose(node)])
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
    parts += [_signature(name, child) for child in methods if child.name == "__init__"]
    parts += [_prose(node), *_attributes(node)]
    for method in methods:
        if not method.name.startswith("_") and not _HOOKS.fullmatch(method.name):
            parts += [
                f"### `{name}.{method.name}`",
                _signature(method.name, method),
                _prose(method),
            ]
    return "\n\n".join(part for part in parts if part)


def _signature(name: str, node: ast.FunctionDef) -> str:
    """Return how a function is called, on one line where it fits; nothing for a property."""
    if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
        return ""
    arguments = re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))
    arguments = re.sub(r"(: [^=]*?)=", r"\1 = ", arguments)
    result = f" -> {ast.unparse(node.returns)}" if node.returns and name != "__init__" else ""
    line = f"{name}({arguments}){result if name[0].islower() else ''}"
    if len(line) > 80:  # noqa: PLR2004 -- what fits beside the navigation
        split = re.sub(r", (?=\*|\w+[:=])", ",\n    ", arguments)
        line = f"{name}(\n    {split},\n){result if name[0].islower() else ''}"
    return f"```python\n{line}\n```"


def _attributes(node: ast.ClassDef) -> Iterator[str]:
    """Yield a list of a class's own values and those of its objects, with the text below each of them."""
    rows = [*_rows_of(node)]
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            rows += _rows_of(inner)
    if rows:
        yield "\n".join(rows)


def _rows_of(home: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    for entry, after in zip(home.body, [*home.body[1:], None], strict=True):
        if isinstance(entry, ast.AnnAssign):
            label = f"{ast.unparse(entry.target)}: {ast.unparse(entry.annotation)}"
        elif isinstance(entry, ast.Assign):
            label = ast.unparse(entry if isinstance(home, ast.ClassDef) else entry.targets[0])
        else:
            continue
        label = label.removeprefix("self.")
        if not label.startswith(("_", "model_config")):
            said = _text_of(after)
            yield f"- `{label}`" + (f": {_plain(said)}" if said else "")


def _text_of(node: ast.stmt | None) -> str:
    """Return the text that a statement is, which documents what stands above it; else nothing."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def _prose(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return a docstring in Google's form as Markdown."""
    text = ast.get_docstring(node) or ""
    head, *sections = re.split(r"^(Args|Returns|Raises|Cost|Example):\n", text, flags=re.MULTILINE)
    parts = [_plain(head)]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        inner = textwrap.dedent(body).strip()
        if title == "Example":
            parts.append(f"```pycon\n{inner}\n```")
        elif title in {"Args", "Raises"}:
            entries = re.findall(r"^(\*{0,2}\w+): (.*(?:\n .*)*)", inner, re.MULTILINE)
            rows = [f"- `{name}`: {_plain(said)}" for name, said in entries]
            parts.append("\n".join([f"**{title}**\n", *rows]))
        else:
            parts.append(f"**{title}**\n\n{_plain(inner)}")
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    """Return paragraphs on a line each, with Markdown's marks for code."""
    paragraphs = text.replace("``", "`").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


PARTS: dict[str, Callable[[], str]] = {
    "summaries": summaries,
    "cost table": cost_table,
    "keys": keys,
    "api": api,
    "default.yaml": lambda: config_file("default.yaml"),
    "quiet.yaml": lambda: config_file("quiet.yaml"),
    "strict.yaml": lambda: config_file("strict.yaml"),
}
