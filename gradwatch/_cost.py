"""What watching itself costs: own time against the time of the run.

What this room knows that no other does: that a traced step costs most inside of the user's own code, where
no clock of ours runs. What such a batch took beyond the usual one is counted; the first of a run warms
up as well, so that the share is rather too high than too low.

Limits: on an accelerator the time to wait for the gradients of a logged step is counted as ours.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW = 4
"""Logged steps after which the share is compared with the budget."""


class Cost:
    """Add up own time, and tell when it is above a budget.

    Args:
        clock: Seconds that only go up.

    Cost:
        Two readings of the clock for each call of the watcher.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._began = clock()
        self._own = 0.0
        self._traced = (0.0, 0)
        self._batch = (0.0, 0.0)
        self._usual = (0.0, 0)
        self._window = (self._began, 0.0)
        self._logged = 0

    @property
    def seconds(self) -> float:
        """How long the run has taken so far."""
        return self.clock() - self._began

    @property
    def own(self) -> float:
        """How much of it was taken by watching."""
        (usual, count), (traced, traces) = self._usual, self._traced
        # Without a usual batch to compare with, a traced one counts in full.
        excess = traced - traces * usual / count if count else traced
        return self._own + max(excess, 0.0)

    @property
    def share(self) -> float:
        """Which part of the run was taken by watching, from 0 to 1."""
        seconds = self.seconds
        return min(self.own / seconds, 1.0) if seconds > 0 else 0.0

    def add(self, began: float) -> None:
        """Add the time since ``began`` to our own."""
        self._own += self.clock() - began

    def begin_batch(self) -> None:
        """Note that a batch begins."""
        self._batch = (self.clock(), self._own)

    def end_batch(self, *, traced: bool) -> None:
        """Note that a batch ends: what it took without us is the usual, or the excess of a trace."""
        began, own = self._batch
        if not began:
            return
        theirs = self.clock() - began - (self._own - own)
        self._batch = (0.0, 0.0)
        if traced:
            self._traced = (self._traced[0] + theirs, self._traced[1] + 1)
            self._forget_window()
        else:
            self._usual = (self._usual[0] + theirs, self._usual[1] + 1)

    def over(self, budget: float | None) -> float | None:
        """Return the share since it was last looked at, after some logged steps and if above a budget."""
        self._logged += 1
        if budget is None or self._logged < WINDOW:
            return None
        began, own = self._window
        took, whole = self._own - own, self.clock() - began
        self._forget_window()
        return took / whole if whole > 0 and took > budget * whole else None

    def _forget_window(self) -> None:
        self._window, self._logged = (self.clock(), self._own), 0
