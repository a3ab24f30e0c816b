"""What stock TensorBoard shows: a dozen cards, one report, and curves per parameter where they are few.

It knows the traps of event files: all values of a step go into one record, through the writer that the
user's logger holds open, with messages of that writer's own package; steps strictly increase; norms are
log10 and counters cumulative, because the dashboard cuts outliers off and does not draw infinity. A second
event file, and layouts or runs of its own, it never makes: they would hide what the user logs.
"""

from __future__ import annotations

import json
import shlex
import time
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gradwatch._words import printable
from gradwatch.explain import markdown
from gradwatch.history import Recorder, value_of
from gradwatch.sinks._batches import Batches, log10
from gradwatch.sinks._map import StatusMap

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from gradwatch.report import Alert, Report, Status
    from gradwatch.sinks._batches import Record
    from gradwatch.sinks._map import Picture

_FEW = 100
_REDRAW_SECONDS = 60.0
_KEPT_ALERTS = 50
_PINNED = ("findings", "nonfinite_steps_total", "norm_log10_median")


class TensorBoardSink:
    """Write each logged batch to TensorBoard as one record, with a report and a map beside it.

    A writer that has no event file, such as the stand-in that Lightning gives to all ranks but the first,
    gets nothing.

    Args:
        writer: A ``SummaryWriter`` of torch's or tensorboardX's.
        prefix: The group of the cards; curves per parameter go to ``{prefix}_params``.
        scalars: Which parameters get curves of their own: ``auto`` (all, while they are at most 100),
            ``always``, ``never``, or globs over their names.
        history: Whether the history of all parameters is written too: once in an event file.
        clock: Seconds that only go up, by which the map and the counts of the report are held to one
            drawing a minute.

    Cost:
        One record per logged batch: about 1.5 ms at 1,000 parameters, and 17 ms more where all of them have
        curves. Once a minute 60 ms for the map. No device synchronization.

    Example:
        >>> import tempfile
        >>> from gradwatch.report import Report, Status
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
        ...     sink = TensorBoardSink(writer)
        ...     sink.write(Report(step=0, logged=True, statuses={"w": Status.OK}, norms={"w": 0.1}))
        ...     sink.close()
    """

    def __init__(
        self,
        writer: Any,
        prefix: str = "gradwatch",
        scalars: str | Iterable[str] = "auto",
        *,
        history: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writer = writer
        self._prefix = printable(prefix).strip("/")
        self._scalars = scalars if isinstance(scalars, str) else tuple(scalars)
        self._batches = Batches()
        self._map = _Drawing(clock)
        self._page = _Page(clock)
        self._history = Recorder(clock) if history else None
        self._batch = 0
        self._statuses: dict[str, Status] = {}
        self._may_open = hasattr(writer, "add_text")

    def write(self, report: Report) -> None:
        """Take one report; what the batch before it had to say is written now."""
        self._record(self._batches.add(report))

    def flush(self) -> None:
        """Write what is pending: the batch is over."""
        self._record(self._batches.take())

    def close(self) -> None:
        """Write what is pending, the newest map, and the newest report; the writer stays open."""
        self.flush()
        if not _event_file(self._writer):
            return
        self._add_values(self._map.batch, [], self._map.last())
        self._add_text(self._page.last())
        if self._history is not None:
            self._add_history(self._history.flush())
        self._writer.flush()

    def _record(self, record: Record | None) -> None:
        if record is None or not (self._may_open or _event_file(self._writer)):
            return
        report = record.report
        self._statuses |= report.statuses
        page = self._page.add(report, self._statuses)
        if not _event_file(self._writer):
            # A text opens a file where there is none: Lightning closes its own after each fit.
            self._add_text(page)
            page = None
        self._may_open = False
        if not _event_file(self._writer):
            return
        values = [(f"{self._prefix}/{name}", value) for name, value in record.values.items()]
        if report.logged:
            values += self._parameter_values(report)
        self._add_values(report.batch, values, self._map.add(report))
        self._add_text(page)
        self._batch = report.batch
        if self._history is None:
            return
        if report.logged:
            due = self._history.add(report.batch, report.step, report.statuses, report.norms)
            self._add_history(due)
        self._add_history(self._history.findings(report))

    def _add_history(self, due: Iterable[tuple[str, bytes]]) -> None:
        file = _event_file(self._writer)
        proto = _messages(file)
        entries = [value_of(proto, tag, content) for tag, content in due]
        if entries:
            file.add_summary(proto.Summary(value=entries), self._batch)

    def _add_values(
        self, batch: int, values: Iterable[tuple[str, float]], picture: Picture | None
    ) -> None:
        file = _event_file(self._writer)
        proto = _messages(file)
        entries = [proto.Summary.Value(tag=tag, simple_value=value) for tag, value in values]
        if picture is not None:
            content = proto.Summary.Image(
                height=picture.height,
                width=picture.width,
                colorspace=3,
                encoded_image_string=picture.png,
            )
            entries.append(proto.Summary.Value(tag=f"{self._prefix}/map", image=content))
        if entries:
            file.add_summary(proto.Summary(value=entries), batch)

    def _add_text(self, page: tuple[int, str] | None) -> None:
        if page is not None:
            self._writer.add_text(f"{self._prefix}/report", page[1], page[0])

    def _parameter_values(self, report: Report) -> list[tuple[str, float]]:
        values: list[tuple[str, float]] = []
        if self._scalars == "never" or (self._scalars == "auto" and len(self._statuses) > _FEW):
            return values
        for name, status in report.statuses.items():
            if not self._is_chosen(name, report.aliases):
                continue
            tag, norm = printable(name), log10(report.norms.get(name))
            values.append((f"{self._prefix}_params/status/{tag}", float(status.code)))
            if norm is not None:
                values.append((f"{self._prefix}_params/norm_log10/{tag}", norm))
        return values

    def _is_chosen(self, name: str, aliases: dict[str, tuple[str, ...]]) -> bool:
        if self._scalars in {"auto", "always"}:
            return True
        globs = (self._scalars,) if isinstance(self._scalars, str) else self._scalars
        names = (name, *aliases.get(name, ()))
        return any(fnmatchcase(known, glob) for known in names for glob in globs)


class _Drawing:
    """When to draw the map: at once, then once a minute, and at the end if it has grown since."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.batch = 0
        self._clock = clock
        self._map = StatusMap()
        self._drawn_at: float | None = None
        self._is_drawn = True

    def add(self, report: Report) -> Picture | None:
        """Take the record of one batch; return a picture when one is due."""
        self.batch = report.batch
        self._map.add(report.batch, report.statuses)
        self._is_drawn = False
        if self._drawn_at is not None and self._clock() < self._drawn_at + _REDRAW_SECONDS:
            return None
        return self.last()

    def last(self) -> Picture | None:
        """Return a picture of all there is, or None when that was drawn already."""
        if self._is_drawn:
            return None
        self._drawn_at, self._is_drawn = self._clock(), True
        return self._map.draw()


class _Page:
    """When to rewrite the report: on every new finding or alert; for mere counts once a minute."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._alerts: list[Alert] = []
        self._pending: tuple[Report, dict[str, Status]] | None = None
        self._findings: tuple[Any, ...] | None = None
        self._counts: dict[str, Status] | None = None
        self._written_at = 0.0

    def add(self, report: Report, statuses: dict[str, Status]) -> tuple[int, str] | None:
        """Take the record of one batch; return its batch and the page when it is due."""
        self._alerts = [*report.alerts, *self._alerts][:_KEPT_ALERTS]
        self._pending = (report, dict(statuses))
        is_early = self._clock() < self._written_at + _REDRAW_SECONDS
        if self._findings == (report.diagnoses, self._alerts) and is_early:
            return None
        return self.last()

    def last(self) -> tuple[int, str] | None:
        """Return the batch and the newest page, or None when it would say what the last one said."""
        if self._pending is None:
            return None
        report, statuses = self._pending
        self._pending = None
        findings = (report.diagnoses, self._alerts)
        if findings == self._findings and statuses == self._counts:
            return None
        self._findings, self._counts, self._written_at = findings, statuses, self._clock()
        return report.batch, markdown(report.diagnoses, statuses, report.step, self._alerts)


def links(log_dir: str | os.PathLike[str], prefix: str = "gradwatch") -> str:
    """Return the command that starts TensorBoard on ``log_dir``, and the addresses of the tab and the cards.

    Args:
        log_dir: The folder that holds the event file.
        prefix: The group of the cards.

    Example:
        >>> print(links("runs").splitlines()[0])
        tensorboard --logdir runs
    """
    cards: list[dict[str, Any]] = [
        {"plugin": "images", "tag": f"{prefix}/map", "runId": "defaultExperimentId/.", "sample": 0}
    ]
    cards += [{"plugin": "scalars", "tag": f"{prefix}/{name}"} for name in _PINNED]
    pinned = quote(json.dumps(cards, separators=(",", ":")), safe="")
    home = "http://localhost:6006/"
    return "\n".join(
        [
            f"tensorboard --logdir {shlex.quote(str(log_dir))}",
            f"{home}#gradwatch",
            f"{home}?pinnedCards={pinned}&smoothing=0#timeseries",
        ]
    )


def _event_file(writer: Any) -> Any:
    """Return what writes the events; None for a stand-in, and for a writer that was closed."""
    file = getattr(writer, "file_writer", None)
    return file if hasattr(file, "add_summary") else None


def _messages(file: Any) -> Any:
    """Return the module of the message classes that this event file takes: it refuses any others."""
    packages = {kind.__module__.partition(".")[0] for kind in type(file).__mro__}
    home = "tensorboardX.proto" if "tensorboardX" in packages else "tensorboard.compat.proto"
    return import_module(f"{home}.summary_pb2")
