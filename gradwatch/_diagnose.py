"""One traced step: what is recorded of it, and what it says of each parameter.

What this room knows that no other does: when to record, what to look at around a backward pass, and which
parameters are left out of what is said.

Limits: it speaks of the steps that were traced. Notes are facts about those.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gradwatch import _words
from gradwatch._backward import watched_backward
from gradwatch._explanation import Explanation
from gradwatch._flow import follow
from gradwatch._graph import Passed, walk
from gradwatch._grouping import Finding, grouped
from gradwatch._sensor import Sensor
from gradwatch._trace import BackwardListener, Trace
from gradwatch.report import Diagnosis, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from gradwatch._record import Op


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a term of the loss reaches."""

    parameters: tuple[str, ...]
    """Those that its gradient leads to."""
    in_loss: bool
    """Whether a loss was computed from it."""
    cut: Finding | None = None
    """Where it was cut off, when it reaches none."""


class Inspection(BackwardListener):
    """One traced step: record it, then say why parameters got no gradient.

    Args:
        parameters: The parameters by name.
        modules: The model's modules by path.
        sizes: Whether to measure what each autograd node hands on, to find the origin of zeros and
            NaN.
        on_step: Called with the names of the parameters that an optimizer is about to write.

    Cost:
        About the time of three small operations for each one, and as much again with ``sizes``.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
        *,
        sizes: bool,
        on_step: Callable[[frozenset[str]], None] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.trace = Trace(parameters, modules, self)
        self.passes: list[Passed] = []
        self._modules = dict(modules)
        self.sizes = sizes
        self.sensor = Sensor(self.parameters, each=True)
        self._on_step = on_step
        self.on_error: Callable[[Exception], None] | None = None
        """Called at once with an error of a backward pass, where nobody would tell of it later."""
        self._explanation = Explanation(
            self.trace, self.parameters, self._modules, self.passes, self.sensor
        )
        self.unseen: frozenset[str] = frozenset()
        """Names of those whose gradients an optimizer takes away before backward ends."""

    def adopt(self, parameters: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        """Ask about these parameters and modules too, from the next operation on."""
        self.parameters.update(parameters)
        self._modules.update(modules)
        self.trace.adopt(parameters, modules)
        self.sensor.extend(parameters)

    def start(self) -> None:
        """Begin to record."""
        self.trace.start()

    def leave(self) -> None:
        """Take everything away that sees the user's program, until ``start()`` is called again."""
        self.trace.leave()

    def stop(self) -> None:
        """Stop recording for good."""
        self.trace.stop()

    @property
    def cleared(self) -> frozenset[str]:
        """Names of those whose gradient arrived and was emptied again."""
        return self.sensor.arrived.intersection(self.trace.clearings)

    @property
    def by_hand(self) -> frozenset[str]:
        """Names of those that the user's program wrote itself after a backward pass, where no optimizer stepped."""
        if self.trace.spans or not self.trace.backwards:
            return frozenset()
        values, later = self.trace.values, self.trace.ops[self.trace.backwards[0].after :]
        written = (values[old].parameter for op in later for old in op.kept.values())
        return frozenset(name for name in written if name is not None)

    @property
    def received(self) -> frozenset[str]:
        """Names of those that hold a gradient of this step, from a backward pass or by hand."""
        return (self.sensor.arrived | self.trace.assigned) - self.trace.clearings.keys()

    def module_at(self, path: str | None) -> nn.Module | None:
        """Return the module at a path, if there is one."""
        return None if path is None else self._modules.get(path)

    @property
    def reached(self) -> set[int]:
        """The ``id`` of each leaf that the losses' graphs lead to."""
        return self._explanation.reached

    @contextmanager
    def around_backward(self, roots: list[Tensor]) -> Iterator[None]:
        """Watch one backward pass."""
        self.sensor.before()
        try:
            hooked = bool(self.trace.hooks)
            with watched_backward(roots, self.trace.tag, sizes=self.sizes, hooked=hooked) as passed:
                self.passes.append(passed)
                yield
        finally:
            try:
                self.sensor.after()
            except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
                self.trace.give_up(error)
            for name in self.sensor.latest:
                self.trace.clearings.pop(name, None)

    def before_step(self, written: frozenset[str]) -> None:
        """Hand on that an optimizer is about to write."""
        if self.trace.in_backward:
            self.unseen |= written  # the optimizer steps and empties `.grad` inside of backward
        elif self._on_step is not None:
            self._on_step(written)

    def after_failure(self, error: Exception) -> None:
        """Hand on that a backward pass has raised."""
        if self.on_error is not None:
            self.on_error(error)

    def diagnose(self, statuses: Mapping[str, Status], step: int) -> tuple[Diagnosis, ...]:
        """Return one diagnosis per cause and site, the one that costs most parameters first.

        Args:
            statuses: The status of each parameter asked about.
            step: Number of the step.
        """
        missing = [name for name, status in statuses.items() if status is Status.MISSING]
        findings = self._explanation.missing(missing)
        for status in (Status.ZERO, Status.NONFINITE):
            for name, found in statuses.items():
                if found is status:
                    findings[name] = self._explanation.origin(name, status)
        sizes = {name: self.parameters[name].numel() for name in findings}
        diagnoses = grouped(findings, statuses, step, sizes, tuple(self.parameters))
        return tuple(
            replace(d, help=_words.CALL_BACKWARD) if _words.NO_BACKWARD in d.notes else d
            for d in diagnoses
        )

    def reach(self, term: Tensor) -> Reach:
        """Return which parameters a term of the loss leads to, and where it was cut off if to none."""
        nodes, _ = walk([term], self.trace.tag)
        leaves = {node.leaf for node in nodes}
        reached = tuple(name for name, leaf in self.parameters.items() if id(leaf) in leaves)
        number = self.trace.number_of(term)
        roots = [root for backward in self.trace.backwards for root in backward.roots]
        in_loss = number in follow(self.trace, (), roots).reaching
        if reached:
            return Reach(reached, in_loss)
        flow = follow(self.trace, tuple(self.parameters), [number])
        cut = next((self._explanation.judge(cuts[0]) for cuts in flow.cuts.values() if cuts), None)
        return Reach((), in_loss, cut)

    def cuts_between(
        self, values: Iterable[int], roots: Sequence[int]
    ) -> Iterator[tuple[Finding, Op]]:
        """Yield where values were cut off from others, and the operation; the trace is of no other use afterwards.

        Args:
            values: Numbers of the values that should have led on.
            roots: Numbers of the values that they should have led to.
        """
        for number in values:
            name = f"value {number}"
            self.trace.values[number].parameter, self.trace.values[number].producer = name, None
            for cut in follow(self.trace, [name], roots).cuts.get(name, ())[:1]:
                yield self._explanation.judge(cut), cut.op
