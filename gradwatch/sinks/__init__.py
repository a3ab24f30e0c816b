"""Where reports go. A sink decides what of a report it shows, and never what is in it.

The watcher hands a report to each sink at every logged step, and at every step with a new diagnosis or
alert. Sinks that need one record per batch have ``flush()`` too, which says that the batch is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gradwatch.sinks.console import ConsoleSink
from gradwatch.sinks.jsonl import JsonLinesSink
from gradwatch.sinks.logger import LoggerSink
from gradwatch.sinks.memory import MemorySink
from gradwatch.sinks.tensorboard import TensorBoardSink, links

if TYPE_CHECKING:
    from gradwatch.report import Report

__all__ = [
    "ConsoleSink",
    "JsonLinesSink",
    "LoggerSink",
    "MemorySink",
    "Sink",
    "TensorBoardSink",
    "links",
]


@runtime_checkable
class Sink(Protocol):
    """What an object needs so that reports can go to it."""

    def write(self, report: Report) -> None:
        """Take one report."""

    def close(self) -> None:
        """Finish: no report comes after this."""
