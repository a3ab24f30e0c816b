"""What is new, on stderr: each diagnosis once, each alert once, and once that something healed.

It keeps clear of progress bars, which redraw their line over and over: the bar's line is cleared (tqdm is
asked to step aside), and the block goes out in one piece. Rich's live displays print it above themselves,
and wrap it as they do with all text; elsewhere nothing is wrapped. Colour is for terminals only, and
nothing in a name is taken for markup. A stream that is gone is no reason to end a run: then it is silent.
"""

from __future__ import annotations

import os
import random
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from io import StringIO
from typing import TYPE_CHECKING, Any, TextIO

from gradwatch.explain import healed, render, summary_line
from gradwatch.report import Action, Status

_drawn = random.getstate()
# Rich draws random numbers where it is imported first, and these are the user's.
from rich.console import Console, detect_legacy_windows  # noqa: E402
from rich.text import Text  # noqa: E402

random.setstate(_drawn)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradwatch.report import Alert, Diagnosis, Report

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
_CLEAR_LINE = "\r\x1b[2K"
_PARTS = re.compile(
    r"(?P<frame>^ *-->|^ *\d* \||^ +=(?= \w+: ))(?P<carets> +\^+(?: .*)?$)?(?P<key> \w+:)?"
)


class ConsoleSink:
    """Print what is new, in the form of compiler messages.

    Alerts whose action is ``log`` are not printed: they are for the files. The first time that not all
    parameters train, a line counts them by their status.

    Args:
        stream: Where to print; None is whatever ``sys.stderr`` is at that time.
        color: Whether to colour; None is on terminals that want it (``NO_COLOR``, ``TERM=dumb``).
        names: All parameters of the model, so that whole modules can be named as one. Without them those
            that the reports know are taken, which with several optimizers are not all at first.

    Cost:
        A look-up per diagnosis and report; about 1 ms for each that is printed.

    Example:
        >>> from gradwatch.report import Cause, Diagnosis, Report, Severity, Status
        >>> found = Diagnosis(Severity.WARNING, Cause.UNUSED, Status.MISSING, ("head.weight",))
        >>> ConsoleSink(sys.stdout, color=False).write(Report(step=0, diagnoses=(found,)))
        <BLANKLINE>
        warning[unused]: `head.weight` gets no gradient
           = more: gradwatch explain unused
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        color: bool | None = None,
        names: Iterable[str] = (),
    ) -> None:
        self._stream = stream
        self._color = color
        self._names = dict.fromkeys(names)
        self._said: dict[tuple[Any, ...], bool] = {}
        self._alerts: set[Alert] = set()
        self._counted = False

    def write(self, report: Report) -> None:
        """Print what this report says and none before it said."""
        self._names |= dict.fromkeys(report.statuses)
        if any(alert.action is Action.ABORT for alert in report.alerts):
            return  # the error that is raised says it all
        blocks = [text for entry in report.diagnoses if (text := self._diagnosis(entry))]
        for alert in report.alerts:
            if alert.action is not Action.LOG and alert not in self._alerts:
                self._alerts.add(alert)
                blocks.append(render(alert, self._names))
        if not self._counted and _is_worth_counting(report):
            self._counted = True
            blocks.append(f"note: {summary_line(report)}")
        if blocks:
            self._print("\n\n".join(blocks))

    def say(self, line: str) -> None:
        """Print a line."""
        self._print(line)

    def close(self) -> None:
        """Do nothing: the stream is not ours."""

    def _diagnosis(self, diagnosis: Diagnosis) -> str | None:
        site = diagnosis.site
        place = (site.file, site.line, site.column) if site else None
        key = (diagnosis.cause, place, diagnosis.parameters)
        is_healed = diagnosis.healed_at is not None
        # Nobody needs to hear that something healed of which nothing was said.
        if self._said.get(key, True) == is_healed:
            return None
        self._said[key] = is_healed
        return healed(diagnosis, self._names) if is_healed else render(diagnosis, self._names)

    def _print(self, block: str) -> None:
        stream = self._stream or sys.stderr
        if stream is None or getattr(stream, "closed", False):
            return
        try:
            is_terminal = stream.isatty()
            text = painted(block, stream, color=self._color)
            # Off a terminal the bar's line cannot be cleared, only left.
            text = f"{_CLEAR_LINE}{text}\n\n" if is_terminal else f"\n{text}\n"
            with _bars_aside(stream):
                stream.write(_encodable(text, stream))
                stream.flush()
        except (OSError, ValueError):  # closed in between, or the reader of the pipe is gone
            return


def _is_worth_counting(report: Report) -> bool:
    """Tell whether parameters are frozen, or missing and not meant to be: what is explained by no more than a count."""
    explained = (name for diagnosis in report.diagnoses for name in diagnosis.parameters)
    return Status.FROZEN in report.statuses.values() or any(
        report.statuses.get(name) is Status.MISSING for name in explained
    )


def painted(block: str, stream: TextIO, *, color: bool | None = None) -> str:
    """Return a block as a stream shows it: in colours on terminals that want them.

    Args:
        block: What ``explain.render`` returned, or several such, or a line.
        stream: Where it will be printed.
        color: Whether to colour; None decides by the stream, ``NO_COLOR`` and ``TERM``.

    Example:
        >>> painted("note: 1 parameter trains", StringIO())
        'note: 1 parameter trains'
    """
    wanted = stream.isatty() and _terminal_takes_color() if color is None else color
    return _coloured(block) if wanted else block


def _terminal_takes_color() -> bool:
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not is_plain and not detect_legacy_windows()


def _bars_aside(stream: TextIO) -> AbstractContextManager[None]:
    """Clear tqdm's bars while something is printed; without tqdm there are none."""
    bar = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bar is None:
        return nullcontext()
    aside: AbstractContextManager[None] = bar.external_write_mode(file=stream)
    return aside


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _coloured(block: str) -> str:
    """Return the block with codes for colours, painted by what each line is."""
    target = StringIO()
    console = Console(
        file=target,
        force_terminal=True,
        color_system="standard",
        legacy_windows=False,
        no_color=False,
    )
    text, colour = Text(), "default"
    for line in block.splitlines(keepends=True):
        severity = line.partition("[")[0]
        if severity in _COLOURS:
            colour = _COLOURS[severity]
        text.append_text(_painted(line, colour))
    console.print(text, soft_wrap=True, highlight=False, markup=False, emoji=False, end="")
    return target.getvalue()


def _painted(line: str, colour: str) -> Text:
    text = Text(line)
    frame = _PARTS.match(line)
    if frame is None:
        heading = re.match(r"\w+\[[^\]]*\]", line)
        text.stylize(f"bold {colour}", 0, heading.end() if heading else 0)
        return text
    text.stylize("bold blue", *frame.span("frame"))
    if frame["carets"]:
        text.stylize(f"bold {colour}", *frame.span("carets"))
    if frame["key"]:
        text.stylize("bold", *frame.span("key"))
    return text
