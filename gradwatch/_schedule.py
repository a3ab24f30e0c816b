"""Which steps of a run are traced, and when that is given up.

What this room knows that no other does: that the first step is traced, that one is again when something is wrong
whose cause is not known, for how long a NaN that comes and goes is hunted, and which traced steps do not count.

Limits: at most ``MAX_TRACES`` steps of a run, and as many micro-batches of each as ``MAX_MICRO_BATCHES``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.report import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_TRACES = 10
MAX_MICRO_BATCHES = 8
MAX_MISSED = 20
"""Traced steps that do not count because another optimizer stepped in them."""
MAX_HUNT = 5
"""Steps traced in a row to catch a gradient that is not finite now and then."""


class Schedule:
    """Decide which steps are worth a trace.

    Args:
        automatic: Whether any is; the configuration can say ``trace: never``.
    """

    def __init__(self, *, automatic: bool) -> None:
        self._automatic = automatic
        self.traces = 0
        """Steps traced so far, but for those that do not count."""
        self.hunting = 0
        """Steps for which a gradient that is not finite is still hunted."""
        self._wants_missing = automatic
        self._wants_sizes = False
        self._sought: set[str] = set()
        """Parameters for whose sake the next step is traced."""
        self._missed = 0
        self._vain = 0
        """Traced steps, since something was found, in which what was sought was not to be seen."""
        self._in_row = 0
        """Steps that are still traced in a row, as what is sought comes and goes."""
        self._micro_batches = 0

    @property
    def is_due(self) -> bool:
        """Whether the step that begins is to be traced."""
        return (self._wants_missing or self._wants_sizes) and self.traces < MAX_TRACES

    @property
    def is_first(self) -> bool:
        """Whether the step that is traced is the first one."""
        return self.traces == 1

    def begin(self) -> bool:
        """Begin a traced step; return whether the sizes of its gradients are wanted."""
        self.traces += 1
        self._micro_batches = 0
        sizes = self._wants_sizes or self.is_first
        self.forget()
        return sizes

    def takes_batch(self) -> bool:
        """Tell whether a micro-batch of the traced step is recorded too."""
        is_taken = self._micro_batches < MAX_MICRO_BATCHES
        self._micro_batches += is_taken
        return is_taken

    @property
    def saw_all(self) -> bool:
        """Whether every micro-batch of the traced step was recorded."""
        return self._micro_batches < MAX_MICRO_BATCHES

    def forget(self) -> None:
        """Want nothing any more."""
        self._wants_missing = self._wants_sizes = False

    def want(self) -> None:
        """Trace the next step, to see who gets no gradient and why."""
        self._wants_missing = self._automatic

    def plan(self, unexplained: Mapping[str, Status], *, caught: bool, vain: bool = False) -> None:
        """Trace the next step when something is wrong that has no diagnosis yet.

        Args:
            unexplained: The parameters that it is about.
            caught: Whether the origin of a gradient that is not finite is known.
            vain: Whether this step was traced for a gradient that was missing before, and all were there.
        """
        if not self._automatic:
            return
        for name, status in unexplained.items():
            self._sought.add(name)
            if status is Status.NONFINITE:
                self.hunting = MAX_HUNT
            if status is Status.MISSING:
                self._wants_missing, self._in_row = True, min(self._vain, MAX_HUNT)
            else:
                self._wants_sizes = True
        if vain:
            self._vain += 1
            # What is missing in every second step is not in the one after: more are traced when it comes again.
            self._wants_missing = self._wants_missing or self._in_row > 0
            self._in_row -= self._in_row > 0
        if caught:
            self.hunting = 0
        elif self.hunting:
            # NaN often comes and goes: the next steps are traced until it comes again.
            self.hunting -= 1
            self._wants_sizes = True

    def end(self, written: frozenset[str]) -> None:
        """End a traced step; trace one more where another optimizer than the sought parameters' has stepped."""
        if self._sought and self._sought.isdisjoint(written) and self._missed < MAX_MISSED:
            self._missed += 1
            self.traces -= 1
            self._wants_missing = True
        else:
            self._sought.clear()
