"""Blocks of a page of Markdown: run as the user's own files, with what they print written below them.

A block of Python is a program; the block of text behind it is what it prints. In a block ``console`` each
line behind ``$`` is a command, and the lines below it are its output. ``GRADWATCH_ACCEPT=1`` lets the tests
write what is printed now.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import re
import shlex
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradwatch import cli

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
ACCEPT = os.environ.get("GRADWATCH_ACCEPT") == "1"
PROGRAMS = {"pip", "python", "tensorboard"}
"""Commands that are not run, and of which no output may be shown."""
_BLOCK = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A block of a page."""

    language: str
    code: str
    title: str | None = None


def blocks(text: str, language: str | None = None) -> list[Block]:
    """Return the blocks of a page, all or those in one language."""
    found = [Block(m["language"], m["code"], m["title"]) for m in _BLOCK.finditer(text)]
    return [block for block in found if language in {None, block.language}]


def rewritten(text: str, write: Callable[[Block], str]) -> str:
    """Return a page in which ``write`` says, block after block, what stands in it."""

    def new(match: re.Match[str]) -> str:
        start, end = (match.span("code")[side] - match.start() for side in (0, 1))
        block = Block(match["language"], match["code"], match["title"])
        return match[0][:start] + write(block) + match[0][end:]

    return _BLOCK.sub(new, text)


def run(
    code: str,
    names: dict[str, Any] | None = None,
    file: str = "example.py",
    *,
    may_raise: bool = False,
) -> str:
    """Run ``code`` as a file of the current folder, and return all that it prints.

    Where it may raise, an exception ends it as it ends a program: what stands at the end of the traceback
    is printed, its text and its notes.
    """
    path = Path(file).resolve()
    path.write_text(code)
    linecache.checkcache(str(path))
    names = {} if names is None else names
    names.setdefault("__name__", "__main__")
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter(
            "ignore"
        )  # hints of torch's and Lightning's are not what a page shows
        if may_raise:
            warnings.filterwarnings("always", "None of the inputs|The .grad attribute", UserWarning)
            warnings.showwarning = _show_warning
        try:
            exec(compile(code, str(path), "exec"), names)  # noqa: S102
        except Exception as error:
            if not may_raise:
                raise
            printed.write("".join(traceback.format_exception_only(error)))
    return tidy(printed.getvalue())


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning without its place, which is another in every folder."""
    sys.stderr.write(f"{category.__name__}: {str(message).partition(' (Triggered')[0]}\n")


def tidy(printed: str) -> str:
    """Return an output as it stands in a page: no empty lines around it, no spaces behind lines."""
    return "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())


def run_commands(text: str) -> str:
    """Return a block ``console`` with what its commands print today."""
    typed = re.findall(r"^\$ .+\n", text, re.MULTILINE)
    return "".join(line + run_command(line) for line in typed)


def run_command(line: str) -> str:
    """Run a command of ``gradwatch``, or ``torchrun``, and return what it prints; others have to exist."""
    _, program, *arguments = shlex.split(line, comments=True)
    if program == "gradwatch":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            cli.main(arguments)
        return tidy(printed.getvalue())
    if program == "torchrun":
        return _two_processes(arguments)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    else:
        assert program in PROGRAMS
    return ""


def _two_processes(arguments: list[str]) -> str:
    """Run a program under ``torchrun``, and return what its processes print on stderr."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    # On a busy machine torch logs how long it waited: no part of what a page shows.
    return tidy(re.sub(r"^\[?[WIE]\d{4} .*\n", "", done.stderr, flags=re.MULTILINE))
