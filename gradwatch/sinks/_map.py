"""The module x step map: the worst status of each module over the whole run, as one small picture.

It is made for dashboards that show an image in a card of 415 pixels: few rows, large type, words beside
the colours, which are told apart with any colour vision. Memory is bounded: 200 columns are kept, and when
they are full each two become one that shows the worse. Needs Pillow to draw, and nothing to collect.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradwatch._words import printable
from gradwatch.report import Status

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

_COLUMNS = 200
_ROWS = 25
_WIDTH = 1000
_ROW_HEIGHT = 32
_TYPE = 22
_MARGIN = 14
_BAR = 44
_LABELS = 330
_INK = "#1A1A1A"
_MODEL = "(model)"
_NOTHING = 0
"""Code of a cell in which a module did not occur; statuses follow with their code + 1."""
_COLOURS = {
    Status.OK: "#B9DCF2",
    Status.FROZEN: "#8C8C8C",
    Status.UNSEEN: "#E3D9C6",
    Status.ZERO: "#F0C800",
    Status.MISSING: "#D55E00",
    Status.NONFINITE: "#000000",
}
_PALETTE = ["#FFFFFF", *_COLOURS.values()]


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image."""

    png: bytes
    width: int
    height: int


class StatusMap:
    """Collect the worst status of each module, column by column.

    Cost:
        A dictionary look-up per module and logged step, and one per parameter where not all are ok.
    """

    def __init__(self) -> None:
        self._rows: dict[str, bytearray] = {}
        self._batches: list[int] = []
        self._stride = 1
        self._filled = 0
        self._last = 0
        self._names: list[str] = []
        self._modules: tuple[str, ...] = ()

    def add(self, batch: int, statuses: Mapping[str, Status]) -> None:
        """Add what is known of one batch."""
        if not self._batches or self._filled == self._stride:
            self._begin_column(batch)
        self._filled += 1
        self._last = batch
        column = len(self._batches) - 1
        for module in self._modules_of(statuses):
            row = self._rows[module]
            row[column] = max(row[column], Status.OK.code + 1)
        values = list(statuses.values())
        if values.count(Status.OK) == len(values):
            return
        for name, status in statuses.items():
            row = self._rows[name.rpartition(".")[0]]
            row[column] = max(row[column], status.code + 1)

    def _modules_of(self, statuses: Mapping[str, Status]) -> Collection[str]:
        """Return the modules of the parameters, the same ones in nearly every step."""
        names = list(statuses)
        if names != self._names:
            self._names = names
            self._modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
            for module in self._modules:
                self._rows.setdefault(module, bytearray(len(self._batches)))
        return self._modules

    def rows(self) -> dict[str, bytes]:
        """Return the codes of each row to show: modules, joined where there are too many of them."""
        deepest = max((module.count(".") + 1 for module in self._rows), default=1)
        depth = deepest
        while depth and len(self._joined(depth)) > _ROWS:
            depth -= 1
        rows = self._joined(depth)
        # One level up may be one row for all layers: then runs of layers say more.
        is_coarse = depth < deepest and len(rows) <= _ROWS // 2
        return _neighbours_joined(self._joined(depth + 1)) if is_coarse else rows

    def draw(self) -> Picture | None:
        """Return the map as a PNG, or None without Pillow or before anything was added."""
        if not self._batches:
            return None
        try:
            image, draw, font = (import_module(f"PIL.Image{part}") for part in ("", "Draw", "Font"))
        except ImportError:
            return None
        rows = self.rows()
        bottom = _BAR + len(rows) * _ROW_HEIGHT
        canvas = image.new("RGB", (_WIDTH, bottom + _BAR), "#FFFFFF")
        pen = draw.Draw(canvas)
        pen.font = font.load_default(size=_TYPE)
        canvas.paste(self._cells(rows, image), (_LABELS, _BAR))
        _draw_frame(pen, rows, bottom)
        self._draw_axis(pen, bottom)
        target = io.BytesIO()
        canvas.quantize(64, dither=image.Dither.NONE).save(target, "PNG")
        return Picture(target.getvalue(), *canvas.size)

    def _begin_column(self, batch: int) -> None:
        if len(self._batches) == _COLUMNS:
            self._batches = self._batches[::2]
            self._stride *= 2
            for module, row in self._rows.items():
                self._rows[module] = bytearray(map(max, row[::2], row[1::2]))
        self._batches.append(batch)
        self._filled = 0
        for row in self._rows.values():
            row.append(_NOTHING)

    def _joined(self, depth: int) -> dict[str, bytes]:
        groups: dict[str, list[bytearray]] = {}
        for module, row in self._rows.items():
            groups.setdefault(".".join(module.split(".")[:depth]), []).append(row)
        return {module: _worst_of(rows) for module, rows in groups.items()}

    def _cells(self, rows: Mapping[str, bytes], image: Any) -> Any:
        """Draw one pixel per cell, and enlarge it: that is quick, and no column is lost to rounding."""
        small = image.frombytes("P", (len(self._batches), len(rows)), b"".join(rows.values()))
        small.putpalette(bytes.fromhex("".join(colour[1:] for colour in _PALETTE)))
        size = (_WIDTH - _LABELS - _MARGIN, len(rows) * _ROW_HEIGHT)
        return small.convert("RGB").resize(size, image.Resampling.NEAREST)

    def _draw_axis(self, pen: Any, bottom: int) -> None:
        end, ticks, gap = _WIDTH - _MARGIN, 5, 16
        count, free_from = len(self._batches), 0.0
        free_to = end - pen.textlength(str(self._last))
        for column in sorted({count * tick // ticks for tick in range(ticks)}):
            x = _LABELS + (end - _LABELS) * column // count
            pen.line((x, bottom, x, bottom + 6), fill=_INK, width=2)
            # The last batch stands at the right end: numbers that would touch it or each other are left out.
            label = str(self._batches[column])
            label_end = x + pen.textlength(label) + gap
            if x >= free_from and label_end < free_to:
                pen.text((x, bottom + 10), label, fill=_INK)
                free_from = label_end
        if count > 1:
            pen.text((end, bottom + 10), str(self._last), fill=_INK, anchor="ra")
        pen.text((_MARGIN, bottom + 10), "batch", fill=_INK)


def _neighbours_joined(rows: Mapping[str, bytes]) -> dict[str, bytes]:
    """Join runs of modules in the largest families, as few as it takes: layers 0 and 1, 2 and 3, ..."""
    families: dict[str, list[str]] = {}
    for module in rows:
        families.setdefault(module.rpartition(".")[0], []).append(module)
    sizes = dict.fromkeys(families, 1)

    def runs_in(parent: str) -> int:
        return -(-len(families[parent]) // sizes[parent])

    while sum(map(runs_in, families)) > _ROWS:
        most = max(map(runs_in, families))
        sizes |= {parent: sizes[parent] + 1 for parent in families if runs_in(parent) == most}
    joined = {}
    for parent, family in families.items():
        for start in range(0, len(family), sizes[parent]):
            run = family[start : start + sizes[parent]]
            joined[_run_name(run)] = _worst_of(rows[module] for module in run)
    return joined


def _run_name(run: Sequence[str]) -> str:
    return run[0] if len(run) == 1 else f"{run[0]} to {run[-1].rpartition('.')[2] or _MODEL}"


def _worst_of(rows: Iterable[bytes | bytearray]) -> bytes:
    return bytes(map(max, zip(*rows, strict=True)))


def _draw_frame(pen: Any, rows: Iterable[str], bottom: int) -> None:
    """Draw the legend, the names of the modules, and the lines between the rows."""
    x = float(_MARGIN)
    for status, colour in _COLOURS.items():
        pen.rectangle((x, 11, x + 22, 33), fill=colour, outline=_INK)
        pen.text((x + 30, 22), status.value, fill=_INK, anchor="lm")
        x += 30 + pen.textlength(status.value) + 34
    for number, module in enumerate(rows):
        y = _BAR + number * _ROW_HEIGHT
        label = _shortened(printable(module) or _MODEL, pen)
        pen.text((_LABELS - 10, y + _ROW_HEIGHT // 2), label, fill=_INK, anchor="rm")
        pen.line((_LABELS, y, _WIDTH - _MARGIN, y), fill="#FFFFFF", width=2)
    pen.rectangle((_LABELS - 1, _BAR, _WIDTH - _MARGIN, bottom), outline=_INK)


def _shortened(label: str, pen: Any) -> str:
    """Return the end of a label that is too wide: it tells modules apart better than the beginning."""
    if pen.textlength(label) <= _LABELS - _MARGIN - 10:
        return label
    while pen.textlength(f"...{label}") > _LABELS - _MARGIN - 10:
        label = label[1:]
    return f"...{label}"
