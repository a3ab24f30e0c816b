"""Who got a gradient: the watching gear's passes over ``.grad``.

What this room knows that no other does: that ``.grad is None`` says nothing by itself. A gradient left
over from an earlier step, or zeros from ``zero_grad(set_to_none=False)``, is not one of this step. What
tells is whether a backward pass changed ``.grad``: another object, or the same one with a higher
version.

Limits: gradients that an optimizer-in-backward or ZeRO takes away before backward ends are never seen
here; with ``gradient_as_bucket_view`` all gradients of a bucket share one version.
"""

from __future__ import annotations

import weakref
from enum import Enum, auto
from functools import cached_property
from itertools import compress, repeat
from operator import and_, attrgetter, call, gt, is_, is_not, ne, not_, sub
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor

from gradwatch._record import version_of, versions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from gradwatch._stats import Alike, is_lazy


class Sensor:
    """Tell which parameters backward passes gave a gradient to.

    Args:
        parameters: The parameters by name.
        each: Whether ``latest`` is asked for after each backward pass; otherwise passes that can tell
            nothing new are not looked at.

    Cost:
        Two passes over ``.grad`` for each step, in C, 0.1 microseconds a parameter each; weak references
        and versions are taken only where a gradient was held before: of a few where all are replaced in each step,
        and versions alone where all are written over.
        No kernel, no synchronization, and no gradient is kept alive.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, each: bool = False) -> None:
        self.names = tuple(parameters)
        self._parameters = tuple(parameters.values())
        self._each = each
        self._everyone = frozenset(range(len(self.names)))
        self._pattern = _Pattern((), self._everyone, (), ())
        """Who held a gradient when that was last told, which is the same in nearly every step."""
        self._arrived: frozenset[int] = frozenset()
        self._latest: frozenset[int] = frozenset()
        self._sure: frozenset[int] = frozenset()
        """Those of them that arrived as another object, and not as a higher version of the same one."""
        self._held: _Held | None = None
        """What was there when the backward pass began that is not over, or not looked at yet."""
        self._first: _Held | None = None
        """What was there when the first one of this step began."""
        self._is_over = False
        """Whether that pass is over: where nothing was held, looking can wait until somebody asks."""
        self._clears = False
        """Whether the user's loop leaves no gradient behind at the end of a step."""
        self._lagging: Mapping[int, int] = {}
        self._is_blind = False
        """Whether nothing was noted after the step before, since no other was expected before the next batch."""
        self._since_whole = 0
        self._habit = _Habit.NONE
        """What the loop does to gradients that it still holds when a step begins."""
        self._repeats = 0
        """Steps in a row in which it did so, after the first one."""
        self._done: _Habit | None = None
        """What it did when that was looked at last; None where nothing was held."""
        self._samples: list[tuple[int, Callable[[], Tensor | None]]] = []
        """Where these are so many that a few tell: positions of some, and what was held there before."""

    @cached_property
    def alike(self) -> Alike | None:
        """What all parameters have in common, None where that is nothing."""
        found = set(map(_dtype, self._parameters))
        if len(found) != 1 or any(map(is_lazy, self._parameters)):
            return None
        sizes = [parameter.numel() for parameter in self._parameters]
        is_crowd = len(sizes) >= _MANY and sum(sizes) <= _SMALL * len(sizes)
        is_here = {parameter.device.type for parameter in self._parameters} == {"cpu"}
        dtype = found.pop()
        return Alike(
            dtype, len(sizes) if is_crowd and is_here and dtype.is_floating_point else None
        )

    @property
    def arrived(self) -> frozenset[str]:
        """Names of those that were given a gradient since ``restart()``."""
        self._look()
        return frozenset(self.names[position] for position in self._arrived)

    @property
    def latest(self) -> frozenset[str]:
        """Names of those that the last backward pass gave a gradient to."""
        self._look()
        return frozenset(self.names[position] for position in self._latest)

    @property
    def renewed(self) -> frozenset[str]:
        """Names of those whose gradient is another object than before, and so not what ``zero_grad`` left."""
        return frozenset(self.names[position] for position in self._sure)

    @property
    def lagging(self) -> frozenset[tuple[str, int]]:
        """Names of those that were written less often than others since the pass began, and how often they were.

        Where ``zero_grad(set_to_none=False)`` came after that moment these may be zeros that nothing was added to.
        """
        return frozenset((self.names[position], move) for position, move in self._lagging.items())

    @property
    def is_complete(self) -> bool:
        """Whether the last backward pass gave a gradient to every parameter."""
        self._look()
        return len(self._latest) == len(self.names)

    def watches(self, parameters: Mapping[str, Tensor]) -> bool:
        """Tell whether these are the very parameters that are watched, under the same names."""
        return self.names == tuple(parameters) and all(
            map(is_, self._parameters, parameters.values())
        )

    def extend(self, parameters: Mapping[str, Tensor]) -> None:
        """Tell of further parameters too, from the next backward pass on."""
        self.names = (*self.names, *parameters)
        self._parameters = (*self._parameters, *parameters.values())
        self._everyone = frozenset(range(len(self.names)))
        self._pattern = _Pattern((), self._everyone, (), ())
        self._repeats = 0
        vars(self).pop("alike", None)

    def before(self, *, whole: bool = True) -> None:
        """Note what is there when a backward pass begins.

        Args:
            whole: Whether to note it of every parameter once in a while, also where a few would tell.
        """
        self._samples, self._is_blind = [], False
        self._since_whole += 1
        if self._clears and self._held is self._first is None:
            # The step before left nothing; what came in between is applied with this step's.
            self._held = self._first = _NOTHING
            return
        self._look()
        if len(self._arrived) == len(self.names) and not self._each:
            self._held = None  # nothing is left to be found out
            return
        is_due = whole and self._since_whole >= _RARELY
        if self._repeats >= _ENOUGH and self._first is None and not is_due:
            self._samples = self._sampled()
            if self._habit is _Habit.WRITES and self._samples:
                self._held = self._first = _Held([], _versions(self.gradients()))
                return
            if self._samples:
                self._held = self._first = _NOTHING
                return
        self._since_whole = 0
        self._held = _NOTHING if all(self._nones()) else _Held.of(self.gradients())
        self._first = self._first or self._held

    def assume(self) -> None:
        """Take what is there for what backward passes of this step gave: none of them was seen."""
        self._held, self._first, self._is_over = _NOTHING, _NOTHING, True

    def after(self) -> None:
        """Add the parameters to which the pass gave a gradient to those of this step."""
        self._is_over = self._held is not None
        if self._held is not None and self._held.versions:
            self._look()

    def judged(self, names: Collection[str], *, again: bool) -> None:
        """Begin a new step for the parameters of one optimizer, with gradients as they are now.

        Args:
            names: The parameters.
            again: Whether that is the second time since ``settle()``.
        """
        self.restart(names)
        is_same = self._done is self._habit is not _Habit.NONE and not again
        self._habit = self._done or _Habit.NONE
        self._repeats = self._repeats + 1 if is_same else 0
        self._clears = self._clears and not again
        if self._clears:
            # What is there will be gone at the end; what is not counts as new, should it not be.
            self._held = self._first = _NOTHING
        elif self._repeats >= _ENOUGH and not again and len(names) == len(self.names):
            # What is there will be replaced, or written over, after the next step begins.
            self._held, self._first, self._is_blind = None, None, True
        else:
            self.before()

    def settle(self, names: Collection[str]) -> None:
        """End a batch in which these parameters were written.

        Another object in ``.grad`` has come since; a higher version may be what ``zero_grad`` did.
        """
        self._clears = all(self._nones())
        if self._clears:
            self._latest = frozenset()
        else:
            self._is_over = self._held is not None
            self._look()
        chosen = self._positions(names)
        if chosen is self._everyone:
            self._arrived = self._sure
        else:
            self._arrived = (self._arrived - chosen) | (self._sure & chosen)
        self._held, self._is_over, self._first, self._done = None, False, None, None
        self._is_blind = False

    def missing(self, gradients: Sequence[Tensor | None] | None = None) -> list[str]:
        """Return the names of those that want a gradient and have none of this step.

        Args:
            gradients: What ``gradients()`` has just returned, where that is at hand.
        """
        there = self._present(gradients)
        self._look(there)
        absent: list[str] = []
        if any(map(_wants, there.absent)):
            absent = list(compress(there.names, map(_wants, there.absent)))
        positions = there.positions
        stale = () if self._has_arrived(positions) else sorted(positions - self._arrived)
        old = {
            self.names[i] for i in stale if self._is_old(i) and self._parameters[i].requires_grad
        }
        if not old:
            return absent
        old.update(absent)
        return [name for name in self.names if name in old]

    def restart(self, names: Collection[str]) -> None:
        """Begin a new step for the parameters of one optimizer."""
        self._first = None
        chosen = self._positions(names)
        if chosen is self._everyone:
            self._arrived = self._sure = frozenset()
        else:
            self._arrived -= chosen
            self._sure -= chosen

    def _positions(self, names: Collection[str]) -> frozenset[int]:
        if len(names) == len(self.names):
            return self._everyone
        chosen = frozenset(names)
        return frozenset(i for i, name in enumerate(self.names) if name in chosen)

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients as they are now."""
        return list(map(_grad, self._parameters))

    def _nones(self, gradients: Sequence[Tensor | None] | None = None) -> Iterator[bool]:
        """Tell which gradients are None.

        NOTE [No list] A list as long as the model costs more than what it would hold: right after
        ``zero_grad`` has freed as many small blocks, malloc puts all of them together before it makes one.
        """
        read = map(_grad, self._parameters) if gradients is None else gradients
        return map(is_, read, repeat(None))

    def _look(self, present: _Pattern | None = None) -> None:
        """Take in what the last backward pass did, unless that was done."""
        held = self._held
        if held is None or not self._is_over:
            return
        there = (present or self._present()).positions
        replaced = there
        self._latest, self._lagging = there, {}
        kept = [ref() is self._parameters[at].grad for at, ref in self._samples]
        self._samples = []
        if held.versions:
            gradients = self.gradients()
            moves = held.moves(gradients)
            is_alike = len(set(moves)) == 1 and moves[0] > 0 and all(kept)
            if is_alike and not held.refs:
                replaced = frozenset()
            elif all(kept):  # else versions tell nothing, of other objects: what is there has come
                replaced = there & held.replaced(gradients)
                self._latest = replaced | (there & held.moved(gradients))
                behind = held.lagging(gradients) & there - replaced
                self._lagging = {position: moves[position] for position in behind}
            self._done = _habit(replaces=replaced == there, writes=is_alike and not replaced)
        elif kept:
            self._done = _Habit.NONE if any(kept) else _Habit.REPLACES
        self._arrived = self._joined(self._arrived, self._latest)
        self._sure = self._joined(self._sure, replaced)
        self._held, self._is_over = None, False

    def _sampled(self) -> list[tuple[int, Callable[[], Tensor | None]]]:
        """Return a few of the gradients that are held, spread over all parameters.

        NOTE [Samples] A loop that empties its gradients when a step begins holds them all until then, and to
        look at each of them twice costs eight times as much as to see that none is None. In such a loop what gets
        no gradient has None: that an old one is still there means that the loop has ceased to empty them. A few
        show that, so that all are looked at from the next step on; the whole look of logged steps shows single ones.
        In a loop that writes over them, versions tell all but what the few are asked: that they are the same objects.
        """
        places = range(0, len(self.names), max(len(self.names) // _SAMPLES, 1))
        held = ((place, self._parameters[place].grad) for place in (*places, len(self.names) - 1))
        return [(at, weakref.ref(g)) for at, g in held if g is not None]

    # A set of a thousand costs more to join or to compare than all gradients to look at, and nearly always
    # it is the set of everyone, or empty.

    def _joined(self, some: frozenset[int], others: frozenset[int]) -> frozenset[int]:
        if not some or others is self._everyone:
            return others
        return some if not others or some is self._everyone else some | others

    def _has_arrived(self, positions: frozenset[int]) -> bool:
        return positions is self._arrived or positions <= self._arrived

    def is_as_told(self, gradients: Sequence[Tensor | None] | None = None) -> bool:
        """Tell whether the same parameters hold a gradient as when that was last told."""
        known, nones = self._pattern.nones, self._nones(gradients)
        return all(map(is_, nones, known)) if known else not any(nones)

    def _present(self, gradients: Sequence[Tensor | None] | None = None) -> _Pattern:
        """Tell who holds a gradient: the same ones in nearly every step."""
        if self.is_as_told(gradients):
            return self._pattern
        nones = tuple(self._nones(gradients))
        everyone = True not in nones
        self._pattern = _Pattern(
            () if everyone else nones,
            self._everyone
            if everyone
            else frozenset(compress(range(len(nones)), map(not_, nones))),
            tuple(compress(self.names, nones)),
            tuple(compress(self._parameters, nones)),
        )
        return self._pattern

    def _is_old(self, position: int) -> bool:
        """Tell whether a gradient is one that was there before, and not one assigned by hand."""
        first = self._first
        if first is None or not first.refs:
            # In brief, where what has not moved is what was there; or nothing was.
            return not self._is_blind if first is None else bool(first.versions)
        known = position < len(first.refs)
        return known and first.refs[position]() is self._parameters[position].grad


class _Pattern(NamedTuple):
    """Which parameters hold a gradient, and which do not."""

    nones: tuple[bool, ...]
    """Whether there is none, for each parameter; empty where all hold one."""
    positions: frozenset[int]
    names: tuple[str, ...]
    absent: tuple[Tensor, ...]


class _Habit(Enum):
    """What a loop does, in each step, to all the gradients that it holds from the step before."""

    NONE = auto()
    """Not the same to all."""
    REPLACES = auto()
    """It lets go of them, and others come."""
    WRITES = auto()
    """It writes over them, equally often: zeros, and what backward adds."""


def _habit(*, replaces: bool, writes: bool) -> _Habit:
    if replaces:
        return _Habit.REPLACES
    return _Habit.WRITES if writes else _Habit.NONE


class _Held(NamedTuple):
    """Which gradients there were at one moment; none is kept alive by it."""

    refs: list[Callable[[], Tensor | None]]
    """One for each parameter; empty where there was no gradient at all, or where versions tell enough."""
    versions: list[int]

    @classmethod
    def of(cls, gradients: Sequence[Tensor | None]) -> _Held:
        nones = _nones(gradients)
        if False not in nones:
            return _NOTHING
        refs: list[Callable[[], Tensor | None]]
        if True in nones:
            refs = [_no_gradient if g is None else weakref.ref(g) for g in gradients]
        else:
            refs = list(map(weakref.ref, cast("Sequence[Tensor]", gradients)))
        return cls(refs, _versions(gradients))

    def replaced(self, gradients: Sequence[Tensor | None]) -> frozenset[int]:
        """Return the positions at which there is another gradient now."""
        places = range(len(gradients))
        present = map(not_, _nones(gradients))
        if not self.refs:  # a new one begins to count anew
            return frozenset(compress(places, map(gt, self.versions, _versions(gradients))))
        others = map(is_not, map(call, self.refs), gradients)
        return frozenset(compress(places, map(and_, others, present)))

    def moves(self, gradients: Sequence[Tensor | None]) -> list[int]:
        """Return by how much each version has moved."""
        return list(map(sub, _versions(gradients), self.versions))

    def moved(self, gradients: Sequence[Tensor | None]) -> frozenset[int]:
        """Return the positions at which a gradient has another version now."""
        moved = map(ne, self.versions, _versions(gradients))
        return frozenset(compress(range(len(gradients)), moved))

    def lagging(self, gradients: Sequence[Tensor | None]) -> frozenset[int]:
        """Return the positions at which the version has moved by less than elsewhere."""
        moves = self.moves(gradients)
        most = max(moves, default=0)
        if most < _AGAIN:
            return frozenset()
        return frozenset(place for place, move in enumerate(moves) if 0 < move < most)


_MANY, _SMALL = 64, 128
"""Gradients from which on they are measured as one tensor, and the elements that each has at most in the mean."""
_AGAIN = 2
"""Writes of which the first may have been ``zero_grad``'s."""
_ENOUGH = 3
"""Steps after which a loop is taken for one that replaces its gradients."""
_SAMPLES = 16
_RARELY = 10
"""Steps after which all gradients are looked at again, where that is asked for."""
_NOTHING = _Held([], [])
_grad, _wants = attrgetter("grad"), attrgetter("requires_grad")
_dtype = attrgetter("dtype")


def _no_gradient() -> None:
    return None


def _nones(gradients: Iterable[Tensor | None]) -> list[bool]:
    """Tell which are None; written so that the loop runs in C, and no tensor is compared."""
    return list(map(is_, gradients, repeat(None)))


def _versions(gradients: Sequence[Tensor | None]) -> list[int]:
    if set(map(type, gradients)) == {Tensor}:
        return versions_of(cast("Sequence[Tensor]", gradients))
    # FSDP2 moves the version of the local shard, not that of the DTensor around it.
    return [-1 if g is None else version_of(getattr(g, "_local_tensor", g)) for g in gradients]
