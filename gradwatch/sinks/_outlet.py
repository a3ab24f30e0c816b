"""All sinks of a run, as one.

What this room knows that no other does: that a sink which fails costs that sink alone. It gets no more reports, one
log record tells of it, and neither the other sinks nor the rules lose anything.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from gradwatch import _words
from gradwatch._frames import is_of_a_signal
from gradwatch.sinks.console import ConsoleSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gradwatch.report import Report
    from gradwatch.sinks import Sink

_log = logging.getLogger("gradwatch")


class Outlet:
    """Hand reports to every sink of a run."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []

    def add(self, sinks: Iterable[Sink]) -> None:
        """Hand what comes from now on to these sinks too."""
        self._sinks += sinks

    def write(self, report: Report) -> None:
        """Hand a report to all."""
        self._tell(lambda sink: sink.write(report))

    def flush(self) -> None:
        """Let those that gather reports know that a batch has ended."""
        self._tell(lambda sink: getattr(sink, "flush", _nothing)())

    def say(self, line: str) -> None:
        """Print a line where reports are printed."""
        for sink in self._sinks:
            if isinstance(sink, ConsoleSink):
                sink.say(line)

    def close(self) -> None:
        """Close all, and hand them nothing any more."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            try:
                sink.close()
            except Exception as error:
                if is_of_a_signal(error):  # all others are ours, never the user's problem
                    raise
                _log.warning("a sink could not be closed", exc_info=error)

    def _tell(self, tell: Callable[[Sink], object]) -> None:
        for sink in tuple(self._sinks):
            try:
                tell(sink)
            except Exception as error:
                if is_of_a_signal(error):  # all others are not worth the run, nor the watch
                    raise
                self._sinks.remove(sink)
                _log.warning(_words.SINK_FAILED, type(sink).__name__, exc_info=error)
                with suppress(Exception):
                    sink.close()


def _nothing() -> None:
    """Stand in for the ``flush()`` that a sink need not have."""
