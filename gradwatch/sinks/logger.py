"""The summary of each batch through any logger of Lightning's kind: CSV, W&B, MLflow, and others.

Known by its method ``log_metrics`` alone, so that nothing here needs Lightning. Only a dozen numbers go
there: loggers take a millisecond and more for each hundred values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gradwatch.sinks._batches import Batches, Record

if TYPE_CHECKING:
    from gradwatch.report import Report


class MetricsLogger(Protocol):
    """What a logger has to offer."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take the values of one step."""


class LoggerSink:
    """Write the summary of each batch through ``logger.log_metrics``.

    Args:
        logger: Any logger of Lightning's, or an object with that method.
        prefix: What the keys begin with.

    Cost:
        One call per logged batch, with at most eleven values.

    Example:
        >>> from gradwatch.report import Report
        >>> class Printer:
        ...     def log_metrics(self, metrics, step=None):
        ...         print(step, metrics["gradwatch/findings"])
        >>> sink = LoggerSink(Printer())
        >>> sink.write(Report(step=3, batch=3, logged=True))
        >>> sink.flush()
        3 0
    """

    def __init__(self, logger: MetricsLogger, prefix: str = "gradwatch") -> None:
        self._logger = logger
        self._prefix = prefix.strip("/")
        self._batches = Batches()

    def write(self, report: Report) -> None:
        """Take one report; what the batch before it had to say is written now."""
        self._log(self._batches.add(report))

    def flush(self) -> None:
        """Write what is pending: the batch is over."""
        self._log(self._batches.take())

    def close(self) -> None:
        """Write what is pending; the logger itself stays open, it is the user's."""
        self.flush()

    def _log(self, record: Record | None) -> None:
        if record is not None:
            metrics = {f"{self._prefix}/{name}": value for name, value in record.values.items()}
            self._logger.log_metrics(metrics, step=record.report.batch)
