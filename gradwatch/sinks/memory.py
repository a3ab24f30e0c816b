"""Reports kept in a list: for tests, notebooks, and loops that look at them on their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.report import Report


class MemorySink:
    """Keep every report, the newest last.

    Cost: one reference per report; nothing is ever dropped.

    Example:
        >>> from gradwatch.report import Report
        >>> sink = MemorySink()
        >>> sink.write(Report(step=3))
        >>> [report.step for report in sink.reports]
        [3]
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def write(self, report: Report) -> None:
        """Keep one report."""
        self.reports.append(report)

    def close(self) -> None:
        """Do nothing: what was kept stays readable."""
