"""Which operation cut a parameter off from the loss: the judgement over a recorded trace.

What this room knows that no other does: how to tell, for all missing parameters at once, the last
value that a gradient could still have come back from, and the first operation behind it through which
it could not; and which of several cuts to name.

How: one pass forwards over the operations carries, per value, the set of parameters it is *live* from
(a gradient would flow back) and *dead* from (it was computed from them, but no gradient would). One
pass backwards says from where the loss is reached. Sets are the bits of one integer, so the cost does
not grow with the number of parameters.

Limits: an operation is taken to carry a gradient from each tracked input to each tracked output; where
that is wrong the autograd graph has the last word (``_diagnose``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradwatch._calls import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradwatch._record import Op, Record

_FAR = 1 << 30
_BREAKS = {Kind.SEVER, Kind.EXIT, Kind.COPY_VALUES, Kind.REWRAP, Kind.SHAPE_ONLY}


@dataclass(slots=True)
class Cut:
    """An operation behind which no gradient comes back, on a path to the loss."""

    op: Op
    distance: int
    """Operations between the loss and the point where the dead value joins it."""
    left_through: Op | None = None
    """Where the value left torch, when every way from here to the loss leads through Python."""


@dataclass(slots=True)
class Flow:
    """What became of each missing parameter."""

    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    """Per parameter its cuts, the one nearest the loss first."""
    connected: set[str] = field(default_factory=set)
    """Those from which a path that should carry a gradient gets to the loss."""
    reads: dict[str, list[Op]] = field(default_factory=dict)
    """Operations that read the parameter itself."""
    dropped: dict[str, Op] = field(default_factory=dict)
    """The last operation computed from a parameter whose result is not used again."""
    reaching: set[int] = field(default_factory=set)
    """Values from which the loss was computed."""
    carried: dict[int, int] = field(default_factory=dict)
    """Per exit the parameters whose value left torch there, as bits."""
    bits: dict[str, int] = field(default_factory=dict)

    def carries(self, op: Op, names: Sequence[str]) -> bool:
        """Tell whether an exit handed a value of one of these parameters to Python."""
        wanted = 0
        for name in names:
            wanted |= self.bits[name]
        return bool(self.carried.get(op.index, 0) & wanted)


def follow(trace: Record, names: Sequence[str], roots: Sequence[int]) -> Flow:
    """Follow the values of parameters through a trace, to where each was cut off from the loss.

    Args:
        trace: A stopped trace.
        names: The parameters to follow.
        roots: Numbers of the values that backward passes started from.

    Cost:
        Two visits per recorded operation, however many parameters; nothing on a device.
    """
    return _Follower(trace, names, roots).flow()


class _Follower:
    def __init__(self, trace: Record, names: Sequence[str], roots: Sequence[int]) -> None:
        self.ops, self.values = trace.ops, trace.values
        self.names = tuple(names)
        self.bits = {name: 1 << position for position, name in enumerate(self.names)}
        self.roots = set(roots)
        toggled = {name for name in names if trace.read_flags.get(name)}
        self.own: dict[int, str] = {
            number: value.parameter
            for number, value in enumerate(self.values)
            if value.parameter in self.bits and not (value.frozen and value.parameter in toggled)
        }
        """The parameters' own values, but for those of a pass in which one was frozen for a while."""
        self.live = [0] * len(self.values)
        self.dead = [0] * len(self.values)
        self.distance = [_FAR] * len(self.values)
        self.joins = [_FAR] * len(self.values)

    def flow(self) -> Flow:
        for number, name in self.own.items():
            if self.values[number].producer is None:
                self.live[number] = self.bits[name]
        for op in self.ops:
            self._forwards(op)
        self._distances()
        reach = self._reach(through_python=True)
        inside = self._reach(through_python=False)
        flow = Flow(bits=self.bits)
        flow.carried = {
            op.index: self.dead[op.outputs[0]] for op in self.ops if op.kind is Kind.EXIT
        }
        flow.reaching = {number for number, far in enumerate(self.distance) if far < _FAR}
        for number in self.roots:
            flow.connected.update(self._members(self.live[number]))
        self._find_cuts(flow, reach, inside)
        self._find_reads(flow)
        self._find_dropped(flow)
        return flow

    def _forwards(self, op: Op) -> None:
        live = dead = 0
        for number in op.inputs:
            live |= self.live[number]
            dead |= self.dead[number]
        # Under no_grad, or through `.data`, what is written is a constant: only the tensor's own
        # history goes on.
        only_kept = op.kind is Kind.SET_DATA or (bool(op.kept) and not op.grad_mode)
        for number in op.outputs:
            value = self.values[number]
            through = live if value.tracked and op.kind not in _BREAKS else 0
            if only_kept:
                through &= self.live[op.kept[number]] if number in op.kept else 0
            if value.parameter is not None:
                through = 0  # a leaf has no history
            own = self.bits.get(value.parameter or "", 0)
            self.live[number] = through | own
            self.dead[number] = (live | dead) & ~(through | own)

    def _distances(self) -> None:
        """Count the operations to the loss, and to where an untracked value joins a tracked one."""
        for number in self.roots:
            self.distance[number] = self.joins[number] = 0
        for op in reversed(self.ops):
            far = min((self.distance[o] for o in op.outputs), default=_FAR)
            if far >= _FAR:
                continue
            joins = min(
                self.distance[o] if self.values[o].tracked else self.joins[o] for o in op.outputs
            )
            for number in op.inputs:
                self.distance[number] = min(self.distance[number], far + 1)
                self.joins[number] = min(self.joins[number], joins)

    def _reach(self, *, through_python: bool) -> list[int]:
        """Return per value the parameters from which it is dead all the way to the loss."""
        everyone = (1 << len(self.names)) - 1
        reach = [0] * len(self.values)
        for number in self.roots:
            reach[number] = everyone
        for op in reversed(self.ops):
            if not through_python and op.kind in {Kind.EXIT, Kind.COPY_VALUES}:
                continue
            mask = 0
            for number in op.outputs:
                mask |= reach[number] & self.dead[number]
            if mask:
                for number in op.inputs:
                    reach[number] |= mask
        return reach

    def _find_cuts(self, flow: Flow, reach: list[int], inside: list[int]) -> None:
        for op in self.ops:
            live = 0
            for number in op.inputs:
                live |= self.live[number]
            if not live:
                continue
            for number in op.outputs:
                cut = live & self.dead[number] & reach[number]
                if not cut:
                    continue
                tracked = self.values[number].tracked
                distance = self.distance[number] if tracked else self.joins[number]
                for name in self._members(cut):
                    outside = not self.bits[name] & inside[number]
                    leaves = self._exit_behind(op, name, reach) if outside else None
                    flow.cuts.setdefault(name, []).append(Cut(op, distance, leaves))
        for cuts in flow.cuts.values():
            # What a gradient hands on is of the second order: the value's own path is to be mended first.
            cuts.sort(key=lambda cut: (cut.op.kind is Kind.GRAD, cut.distance, cut.op.index))

    def _exit_behind(self, cut: Op, name: str, reach: list[int]) -> Op | None:
        """Return the first operation from ``cut`` on that hands the parameter's value to Python."""
        bit = self.bits[name]
        behind = set(cut.outputs)
        for op in self.ops[cut.index :]:
            if op is not cut and behind.isdisjoint(op.inputs):
                continue
            behind.update(op.outputs)
            if op.kind in {Kind.EXIT, Kind.COPY_VALUES} and any(
                reach[o] & self.dead[o] & bit for o in op.outputs
            ):
                return op
        return None

    def _find_reads(self, flow: Flow) -> None:
        for op in self.ops:
            for number in op.inputs:
                name = self.own.get(number)
                if name is not None:
                    flow.reads.setdefault(name, []).append(op)

    def _find_dropped(self, flow: Flow) -> None:
        """Find per parameter the latest result that nothing but Python read again, tracked ones first."""
        consumed = {
            number
            for op in self.ops
            if op.kind is not Kind.EXIT and not (op.place and op.place.by_trainer)
            for number in op.inputs
        }
        # Backwards, with the parameters that are settled at each rank: each is met once a rank.
        settled: dict[tuple[bool, bool, bool], int] = {}
        best: dict[str, tuple[tuple[bool, bool, bool], Op]] = {}
        for op in reversed(self.ops):
            if op.place is None or op.place.by_trainer:
                continue
            for number in op.outputs:
                for mask, is_live in ((self.live[number], True), (self.dead[number], False)):
                    rank = (op.kind is not Kind.EXIT, is_live, number not in consumed)
                    new = mask & ~settled.get(rank, 0)
                    if not new:
                        continue
                    settled[rank] = settled.get(rank, 0) | new
                    for name in self._members(new):
                        if name not in best or rank > best[name][0]:
                            best[name] = (rank, op)
        flow.dropped = {name: op for name, (_, op) in best.items()}

    def _members(self, mask: int) -> Iterator[str]:
        while mask:
            low = mask & -mask
            yield self.names[low.bit_length() - 1]
            mask ^= low
