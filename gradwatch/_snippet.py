"""A site as text: its place in words, and its line with carets under the very expression.

What this room knows that no other does: how many columns of a terminal a character takes, and where the
code of a line ends. Limits: joined emoji may still be off, since terminals disagree about them.
"""

from __future__ import annotations

import tokenize
import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING

from gradwatch._words import WIDEST, printable, shortened, shown_path

if TYPE_CHECKING:
    from gradwatch.report import Site

_BEFORE = 40
"""Characters of a very long line that are shown before the expression."""


def location(site: Site, module: str | None) -> str:
    text = f"{printable(shown_path(site.file))}:{site.line}"
    # What stands before `<locals>` is the place where the class was made, not where the line is.
    function = (site.function or "").rpartition("<locals>.")[2]
    if function and function != "<module>":
        text += f" in {printable(function)}"
    return f"{text} (module `{printable(module)}`)" if module else text


def inside(site: Site) -> str:
    text = f"it happens inside this call, at {location(site, None)}"
    source = (site.source or "").strip()
    return f"{text}: `{printable(shortened(source))}`" if source else text


def snippet(site: Site, label: str, width: int) -> list[str]:
    """Return the source line between gutter lines, with carets under the expression and the label."""
    source = (site.source or "").rstrip()
    if not source:
        return []
    source, begin, end = _cropped(source, *_span(site, source))
    cells = [_cell(char) for char in source]
    shown = "".join(text for text, _ in cells)
    margin = " " * sum(size for _, size in cells[:begin])
    carets = "^" * max(1, sum(size for _, size in cells[begin:end]))
    if site.end_line is not None and site.end_line > site.line:
        label = f"... to line {site.end_line}{': ' if label else ''}{label}"
    bar = f"{' ' * width} |"
    return [bar, f"{site.line:>{width}} | {shown}", f"{bar} {margin}{carets} {label}".rstrip(), bar]


def _span(site: Site, source: str) -> tuple[int, int]:
    """Return the columns to underline; the whole line where they are not known."""
    indent = len(source) - len(source.lstrip())
    begin = indent if site.column is None else min(site.column, len(source) - 1)
    goes_on = site.end_line is not None and site.end_line > site.line
    if goes_on or site.column is None or site.end_column is None:
        return begin, max(begin + 1, _code_end(source))
    return begin, max(begin + 1, site.end_column)


def _cropped(source: str, begin: int, end: int) -> tuple[str, int, int]:
    """Return the part of a very long line around the columns to underline, and these columns in it."""
    if len(source) <= WIDEST:
        return source, begin, end
    left = max(0, min(begin - _BEFORE, len(source) - WIDEST))
    right = left + WIDEST
    head, tail = "..." * (left > 0), "..." * (right < len(source))
    moved = len(head) - left
    return f"{head}{source[left:right]}{tail}", begin + moved, min(end, right) + moved


def _code_end(source: str) -> int:
    """Return the column behind the last character of code, leaving a comment out."""
    # The line may be part of an expression: what was read up to an error still counts.
    with suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(iter([source]).__next__):
            if token.type == tokenize.COMMENT and token.start[1] > 0:
                return len(source[: token.start[1]].rstrip())
    return len(source)


def _cell(char: str) -> tuple[str, int]:
    """Return what is shown for one character of source, and how many columns it takes."""
    if char == "\t":
        return "    ", 4
    category = unicodedata.category(char)
    if category == "Cf":  # direction marks and joiners could show other code than what runs
        return "", 0
    if category in {"Mn", "Me"}:
        return char, 0
    if not char.isprintable():
        return "\N{REPLACEMENT CHARACTER}", 1
    return char, 2 if unicodedata.east_asian_width(char) in "WF" else 1
