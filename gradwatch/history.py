"""The full history of a run: every parameter's status and norm at every logged step, in few bytes.

What this room knows that no other does: the format. Records of consecutive steps go into chunks, each under
a tag of its own that carries its first step, so that no loader of TensorBoard thins them out; a chunk that
is not full yet is written again under its tag. Norms are kept as one byte on a logarithmic scale (±10 %);
the worse of two statuses is the larger code, the larger of two norms the larger byte, so that pooling steps
is one maximum.

Limits: reading and writing need NumPy and tensorboard, not torch. What was measured on no logged step is
not here; the JSON lines file has exact norms.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.errors import HistoryError
from gradwatch.report import Report, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from gradwatch.report import Alert, Diagnosis

PLUGIN = "gradwatch"
PREFIX = "_gradwatch"
"""First part of our tags: another one than that of the cards, since a tag belongs to one plugin."""
VERSION = 1
ABSENT = 255
"""Status code of a parameter that the model did not have then."""
NO_NORM, TINY, HUGE = 0, 1, 255
LOWEST, HIGHEST = -12.0, 8.0
"""The log10 of norms that have a byte of their own; smaller ones are `TINY`, larger or NaN `HUGE`."""
_SCALE = (HUGE - 2 - TINY) / (HIGHEST - LOWEST)
_SLOPE = np.float32(_SCALE / math.log(10))
_OFFSET = np.float32(TINY + 1.5 - LOWEST * _SCALE)
_HEAD = struct.Struct("<2sBxiII")
_RECORDS = 32
_SECONDS = 10.0
_CELLS = 50_000_000
_MOST = 4096
_ALERTS = 100
_FINDINGS = 500


@dataclass(frozen=True, slots=True)
class History:
    """What is known of a run.

    ``status[i, j]`` is the status code of ``names[j]`` in ``batches[i]`` (``Status.code``; 255 where the
    parameter did not exist), and ``norm_log10[i, j]`` the log10 of its gradient's norm: NaN where there is
    none, infinite where the gradient was not finite, ``-inf`` where it was zero.
    """

    names: tuple[str, ...]
    batches: NDArray[np.int64]
    """Number of each recorded batch, as TensorBoard's horizontal axis counts them."""
    steps: NDArray[np.int64]
    """Number of the optimizer step in it."""
    status: NDArray[np.uint8]
    quantized: NDArray[np.uint8]
    """The norms as they are stored, one byte each."""
    report: Report = Report(step=0)  # noqa: RUF009 -- it is frozen
    """All diagnoses that were made, with what healed, and the alerts, the newest first."""

    @property
    def norm_log10(self) -> NDArray[np.float32]:
        """Return the log10 of the norms, within 10 %."""
        return dequantized(self.quantized)


def quantized(norms: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return norms as one byte each; NaN in, for "no norm", is not a byte of its own: mask it before.

    Example:
        >>> quantized(np.array([0.0, 1.0, np.inf])).tolist()
        [1, 153, 255]
    """
    with np.errstate(all="ignore"):
        scaled = np.log(norms.astype(np.float32))  # half the time of log10 in float64
        scaled *= _SLOPE
        scaled += _OFFSET
    np.maximum(scaled, TINY, out=scaled)
    # NaN, which stays NaN in a maximum, counts as huge.
    found: NDArray[np.uint8] = np.where(scaled < HUGE, scaled, HUGE).astype(np.uint8)
    return found


def dequantized(values: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the log10 of norms that were kept as bytes."""
    table = (np.arange(256) - TINY - 1) / _SCALE + LOWEST
    table[[NO_NORM, TINY, HUGE]] = np.nan, -np.inf, np.inf
    found: NDArray[np.float32] = table.astype(np.float32)[values]
    return found


# Writing ------------------------------------------------------------------------------------------


_Row = tuple[int, int, "NDArray[np.uint8]", "NDArray[np.float64]"]
"""Batch and step of a record, a status code and a norm for each parameter."""
_UNMEASURED = -1.0


class Recorder:
    """Turn the records of a run into tagged bytes, few of them, however long the run.

    Args:
        clock: Seconds that only go up.

    Cost:
        A few microseconds a record, and a compression of 32 records at a time; no device is touched.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._names: tuple[str, ...] = ()
        self._index: dict[str, int] = {}
        self._set = -1
        # Names come in the same order nearly always: where they belong is looked up only when not.
        self._order: list[str] = []
        self._places: NDArray[np.intp] = np.zeros(0, np.intp)
        self._healthy: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._measured: list[str] = []
        self._columns: NDArray[np.intp] = np.zeros(0, np.intp)
        self._numbers = struct.Struct("")
        self._all_measured = False
        self._rows: list[_Row] = []
        self._pool: _Row | None = None
        self._pooled = 0
        self._stride = 1
        self._count = 0
        self._written_at = clock()
        self._is_written = True
        self._alerts: tuple[Alert, ...] = ()
        self._findings: tuple[tuple[Diagnosis, ...], tuple[Alert, ...]] | None = ((), ())
        self._known: dict[Any, Diagnosis] = {}
        self._since: int | None = None

    def add(
        self, batch: int, step: int, statuses: Mapping[str, Status], norms: Mapping[str, float]
    ) -> Iterator[tuple[str, bytes]]:
        """Take one record; yield the tags and bytes that are due."""
        order = list(statuses)
        if order != self._order:
            if not self._index.keys() >= statuses.keys():
                yield from self.flush()
                self._begin(batch, statuses)
                yield f"{PREFIX}/params/{batch:010d}", _packed_names(self._names)
            self._order, self._places = order, self._places_of(order)
            self._healthy = np.full(len(self._names), Status.UNSEEN.code, np.uint8)
            self._healthy[self._places] = Status.OK.code
        self._merge((batch, step, self._codes(statuses), self._sizes(norms)))
        if self._pooled == self._stride:
            self._keep()
        if len(self._rows) >= _RECORDS or self._clock() - self._written_at > _SECONDS:
            yield from self.flush(partial=True)

    def findings(self, report: Report) -> Iterator[tuple[str, bytes]]:
        """Yield the diagnoses that hold, and the alerts so far, where they have changed."""
        if self._since is None:
            self._since = report.step
            if report.step > 0:
                self._findings = None  # that there are none is news, where a run goes on
        self._alerts = (*report.alerts, *self._alerts)[:_ALERTS]
        self._known |= {(d.cause, d.site, d.parameters, d.step): d for d in report.diagnoses}
        made = tuple(self._known.values())[-_FINDINGS:]
        if (made, self._alerts) != self._findings:
            self._findings = made, self._alerts
            said = Report(report.step, diagnoses=made, alerts=self._alerts, batch=report.batch)
            yield f"{PREFIX}/findings/{self._since:010d}", json.dumps(said.to_dict()).encode()

    def flush(self, *, partial: bool = False) -> Iterator[tuple[str, bytes]]:
        """Yield what was not written yet.

        Args:
            partial: Whether the run goes on, so that a stride that is not full can wait.
        """
        if self._pool is not None and not partial:
            self._keep()
        if self._rows and not self._is_written:
            yield f"{PREFIX}/chunk/{self._rows[0][0]:010d}", self._packed()
            self._is_written, self._written_at = True, self._clock()
        if len(self._rows) >= _RECORDS or not partial:
            self._rows = []

    def _begin(self, batch: int, statuses: Mapping[str, Status]) -> None:
        self._names = tuple(dict.fromkeys((*self._names, *statuses)))
        self._index = {name: position for position, name in enumerate(self._names)}
        self._set = batch
        # Norms are placed anew, and statuses of an order that was known as well.
        self._measured, self._order = [], []
        self._numbers, self._columns = struct.Struct(""), np.zeros(0, np.intp)
        self._all_measured = False

    def _codes(self, statuses: Mapping[str, Status]) -> NDArray[np.uint8]:
        codes, ok, found = self._healthy.copy(), Status.OK, list(statuses.values())
        if found.count(ok) < len(found):
            for position, status in enumerate(found):
                if status is not ok:
                    codes[self._places[position]] = status.code
        return codes

    def _sizes(self, norms: Mapping[str, float]) -> NDArray[np.float64]:
        measured = list(norms)
        if measured != self._measured:
            self._measured, self._columns = measured, self._places_of(measured)
            self._numbers = struct.Struct(f"{len(measured)}d")
            self._all_measured = tuple(measured) == self._names
        # A third of what NumPy takes to read the floats one by one.
        found = np.frombuffer(self._numbers.pack(*norms.values()))
        if self._all_measured:
            return found
        sizes = np.full(len(self._names), _UNMEASURED)
        sizes[self._columns] = found
        return sizes

    def _places_of(self, names: list[str]) -> NDArray[np.intp]:
        return np.array([self._index[name] for name in names], np.intp)

    def _merge(self, row: _Row) -> None:
        if self._pool is None:
            self._pool, self._pooled = row, 1
        else:
            first, first_step, codes, sizes = self._pool
            # NaN, which stays in a maximum, is the largest of all.
            worst, largest = np.maximum(codes, row[2]), np.maximum(sizes, row[3])
            self._pool = (first, first_step, worst, largest)
            self._pooled += 1

    def _keep(self) -> None:
        if self._pool is not None:
            self._rows.append(self._pool)
            self._pool, self._pooled, self._is_written = None, 0, False
            self._count += 1
            if self._count >= min(_MOST, max(_CELLS // max(len(self._names), 1), 64)):
                self._count, self._stride = 0, self._stride * 2

    def _packed(self) -> bytes:
        sizes = np.stack([row[3] for row in self._rows])
        # All at once: a call of NumPy's costs more than the thousand values of one step.
        norms = np.where(sizes == _UNMEASURED, NO_NORM, quantized(sizes)).astype(np.uint8)
        cells = np.stack([np.stack([row[2] for row in self._rows]), norms])
        body = [
            _HEAD.pack(b"GW", VERSION, self._set, len(self._rows), len(self._names)),
            np.array([row[:2] for row in self._rows], "<i4").T.tobytes(),
            # One parameter's steps lie side by side: they are alike, and compress well.
            np.ascontiguousarray(cells.transpose(0, 2, 1)).tobytes(),
        ]
        return zlib.compress(b"".join(body), 1)


def _packed_names(names: Sequence[str]) -> bytes:
    return zlib.compress(json.dumps({"version": VERSION, "names": names}).encode(), 6)


# Reading ------------------------------------------------------------------------------------------


def assembled(values: Mapping[str, bytes]) -> History:
    """Return the history that the newest value of each of our tags holds.

    Args:
        values: Bytes by tag, in the order in which they were written. What a run that was resumed wrote
            takes the place of what came after its checkpoint before.

    Raises:
        HistoryError: They are of a newer format, or damaged.
    """
    try:
        sets = {
            int(tag.rpartition("/")[2]): json.loads(zlib.decompress(value))["names"]
            for tag, value in values.items()
            if tag.startswith(f"{PREFIX}/params/")
        }
        chunks = [
            _unpacked(zlib.decompress(value))
            for tag, value in values.items()
            if tag.startswith(f"{PREFIX}/chunk/")
        ]
        reports = [
            (int(tag.rpartition("/")[2]), Report.from_dict(json.loads(value)))
            for tag, value in values.items()
            if tag.startswith(f"{PREFIX}/findings/")
        ]
    except (zlib.error, struct.error, ValueError, KeyError, TypeError) as error:
        raise HistoryError(f"the history of this run cannot be read: {error}") from error
    history = _joined(sets, chunks)
    return replace(history, report=_together(reports, history))


_Chunk = tuple[int, "NDArray[np.int64]", "NDArray[np.uint8]"]


def _unpacked(raw: bytes) -> _Chunk:
    magic, version, number, count, width = _HEAD.unpack_from(raw)
    if magic != b"GW" or version > VERSION:
        raise ValueError(f"its format is version {version}, newer than this GradWatch")
    at = _HEAD.size
    axes = np.frombuffer(raw, "<i4", 2 * count, at).reshape(2, count).astype(np.int64)
    cells = np.frombuffer(raw, np.uint8, 2 * count * width, at + 8 * count)
    return number, axes, cells.reshape(2, width, count)


def _valid(chunks: Sequence[_Chunk]) -> list[_Chunk]:
    """Return the chunks without the rows that a later one begins before."""
    kept: list[_Chunk] = []
    end = np.iinfo(np.int64).max
    for number, axes, cells in reversed(chunks):
        rows = axes[0] < end
        kept.append((number, axes[:, rows], cells[:, :, rows]))
        end = min(end, int(axes[0].min(initial=end)))
    return kept[::-1]


def _joined(sets: Mapping[int, Sequence[str]], chunks: Sequence[_Chunk]) -> History:
    names = tuple(dict.fromkeys(name for _, known in sorted(sets.items()) for name in known))
    index = {name: position for position, name in enumerate(names)}
    chunks = _valid([chunk for chunk in chunks if chunk[0] in sets])
    total = sum(axes.shape[1] for _, axes, _ in chunks)
    cells = np.zeros((2, total, len(names)), np.uint8)
    cells[0] = ABSENT
    axes = np.zeros((2, total), np.int64)
    at = 0
    for number, where, values in chunks:
        rows = slice(at, at + where.shape[1])
        axes[:, rows] = where
        places = [index[name] for name in sets[number]]
        cells[:, rows, places] = values.transpose(0, 2, 1)
        at = rows.stop
    order = np.argsort(axes[0], kind="stable")
    return History(names, axes[0, order], axes[1, order], cells[0, order], cells[1, order])


def _together(reports: Sequence[tuple[int, Report]], history: History) -> Report:
    """Return one report of what several parts of a run found, each with the step that it began at."""
    whole, end = Report(step=0), None
    for since, report in reversed(reports):
        if end is None:
            whole, end = report, since
            continue
        known = {(d.cause, d.site, d.parameters) for d in whole.diagnoses}
        older = tuple(
            _healed_since(d, end, history)
            for d in report.diagnoses
            if d.step < end and (d.cause, d.site, d.parameters) not in known
        )
        alerts = tuple(alert for alert in report.alerts if alert.step < end)
        whole = replace(
            whole,
            diagnoses=(*older, *whole.diagnoses)[-_FINDINGS:],
            alerts=(*whole.alerts, *alerts)[:_ALERTS],
        )
        end = min(end, since)
    return whole


def _healed_since(diagnosis: Diagnosis, step: int, history: History) -> Diagnosis:
    """Say from which step on a later part of the run had gradients again, by its rows."""
    places = [history.names.index(name) for name in diagnosis.parameters if name in history.names]
    if diagnosis.healed_at is not None or diagnosis.status is Status.OK or not places:
        return diagnosis
    good = (history.status[:, places] == Status.OK.code).all(axis=1) & (history.steps >= step)
    if not good.any():
        return diagnosis
    return replace(diagnosis, healed_at=int(history.steps[good][0]))


def pooled(
    history: History, columns: int, low: int | None = None, high: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]:
    """Return first and last batch of each column, statuses, and norms, for at most so many columns.

    The worst status and the largest norm of a column's batches count.

    Args:
        history: A run.
        columns: How many columns there may be.
        low: The first batch; None for the very first.
        high: The last batch.
    """
    chosen = np.ones(len(history.batches), bool)
    if low is not None:
        chosen &= history.batches >= low
    if high is not None:
        chosen &= history.batches <= high
    rows = np.flatnonzero(chosen)
    if not len(rows):
        empty = np.zeros((0, len(history.names)), np.uint8)
        return np.zeros((0, 2), np.int64), empty, empty
    edges = np.unique(np.linspace(0, len(rows), min(columns, len(rows)) + 1).astype(np.int64))[:-1]
    starts = rows[edges]
    ends = np.append(rows[edges[1:] - 1], rows[-1])
    # Where a parameter did not exist in some batch, what it was in the others counts.
    status = np.where(history.status[rows] == ABSENT, 0, history.status[rows] + 1)
    worst = np.maximum.reduceat(status, edges, axis=0)
    ranges = np.stack([history.batches[starts], history.batches[ends]], axis=1)
    statuses = np.where(worst == 0, ABSENT, worst - 1).astype(np.uint8)
    return ranges, statuses, np.maximum.reduceat(history.quantized[rows], edges, axis=0)


def read_history(log_dir: str | os.PathLike[str]) -> History:
    """Return what GradWatch wrote of a run into its TensorBoard event files.

    Args:
        log_dir: The folder of one run, or one with a single run below it.

    Raises:
        HistoryError: There is no such run, there are several, or what is there cannot be read.
    """
    folder = Path(log_dir)
    if not folder.is_dir():
        kind = "is a file: name its folder" if folder.exists() else "does not exist"
        raise HistoryError(f"expected the folder of a run, and `{folder}` {kind}")
    runs = histories(log_dir)
    if not runs:
        files = any(folder.rglob("*tfevents*"))
        what = "its event files hold none" if files else "it holds no event file"
        raise HistoryError(
            f"no history of GradWatch below `{folder}`, {what}: it is written by runs with a "
            "TensorBoard logger, or with `log_dir=`"
        )
    if len(runs) > 1:
        listed = ", ".join(sorted(runs))
        raise HistoryError(f"several runs below {os.fspath(log_dir)}, name one: {listed}")
    return assembled(next(iter(runs.values())))


def histories(log_dir: str | os.PathLike[str]) -> dict[str, dict[str, bytes]]:
    """Return the newest value of each of our tags, the oldest first, for each run below a folder."""
    from tensorboard.backend.event_processing.event_file_loader import (  # noqa: PLC0415 -- slow
        RawEventFileLoader,
    )
    from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415

    found: dict[str, dict[str, bytes]] = {}
    for file in sorted(Path(log_dir).rglob("*tfevents*"), key=lambda path: path.name):
        values: dict[str, bytes] = {}
        for raw in RawEventFileLoader(str(file)).Load():
            if PREFIX.encode() not in raw:
                continue
            for value in Event.FromString(raw).summary.value:
                if value.tag.startswith(f"{PREFIX}/") and value.tensor.string_val:
                    values.pop(value.tag, None)  # what is written again is the newest
                    values[value.tag] = value.tensor.string_val[0]
        if values:
            run = str(file.parent.relative_to(log_dir))
            older = {t: v for t, v in found.get(run, {}).items() if t not in values}
            found[run] = older | values
    return found


def value_of(proto: Any, tag: str, content: bytes) -> Any:
    """Return a summary value that TensorBoard's loaders keep whole for our plugin.

    Args:
        proto: The module of the message classes that the writer takes.
        tag: The tag.
        content: The bytes.
    """
    value = proto.Summary.Value(tag=tag)
    value.metadata.plugin_data.plugin_name = PLUGIN
    value.metadata.plugin_data.content = str(VERSION).encode()
    # DATA_CLASS_TENSOR, without which the loaders keep nothing; tensorboardX's classes do not know it.
    value.metadata.MergeFromString(b"\x20\x02")
    value.tensor.dtype = 7  # a string
    value.tensor.string_val.append(content)
    return value
