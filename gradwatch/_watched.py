"""What a run watches: a model's parameters, which optimizer steps each of them, and who got a gradient.

What this room knows that no other does: when the model has to be looked at anew. Namely where an optimizer steps
that nobody named, where one was given more parameters, and where the model has another parameter under a known
name. What arrived until then is kept.

Limits: that a parameter was replaced is seen where the one that is watched gets no gradient any more.
"""

from __future__ import annotations

import gc
from itertools import compress, islice
from operator import attrgetter, not_
from typing import TYPE_CHECKING, Any

import torch

from gradwatch._grouping import not_registered
from gradwatch._names import Owners, innermost, names_of, parameter_at
from gradwatch._sensor import Sensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor, nn

    from gradwatch._diagnose import Inspection
    from gradwatch._distributed import Group
    from gradwatch.report import Diagnosis

_LOOKS = 20
"""Parameters without a gradient of which it is looked at a time whether they are still the model's."""
_PATIENCE = 10
"""Batches in which an optimizer that nobody named has to step."""
_wants = attrgetter("requires_grad")


class Watched:
    """Know the parameters of one run, as they are now.

    Args:
        model: The model.
        optimizers: The optimizers that were named; without any, none of the parameters is said to be in no optimizer.
        holds: Whether a parameter of this name, and of these other ones, is watched.
        group: The processes that train the model together, where there are several.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: tuple[Any, ...],
        *,
        holds: Callable[[str, Sequence[str]], bool],
        group: Group | None,
    ) -> None:
        self.optimizers = optimizers
        """Those that were named, and those that were seen to step since."""
        self.knows_orphans = False
        """Whether it was asked which parameters no optimizer has, as they are now."""
        self._model = model
        self._holds = holds
        self._group = group
        self._complete = bool(optimizers)
        self._knows_unregistered = False
        self._elsewhere: frozenset[int] = frozenset()
        """The ``id`` of what optimizers write that are not watched, until it was looked for."""
        self._absent: list[str] = []
        """Names of those that had no gradient when it was looked whether they are still the model's."""
        self._look()
        self.outside = self._made_elsewhere()
        """Optimizers that nobody named, and that hold parameters which no other one has."""
        self._idle = self.outside
        self._left = _PATIENCE
        if self.outside:
            self.optimizers = (*optimizers, *self.outside)
            self._look()
        self.sensor = self._new_sensor()

    def look(self, *, midway: bool = False) -> None:
        """Take the parameters and their owners as they are now; what arrived so far is kept.

        Args:
            midway: Whether a backward pass of this step has been: what is there then counts as its own.
        """
        self._look()
        if not self.sensor.watches(self.names.parameters):
            self.sensor = self._new_sensor()
            self.knows_orphans = False  # what is new may be in no optimizer
            if midway:
                self.sensor.assume()

    def _look(self) -> None:
        self.names = names_of(self._model).where(self._holds)
        self.owners = Owners(self.names, self.optimizers, complete=self._complete)

    def _made_elsewhere(self) -> tuple[Any, ...]:
        """Return the optimizers of the user's, wherever they are, that hold what no named one does.

        A callback trains a probe with an optimizer of its own, say. Other processes might find them in another order.
        """
        orphans = {id(self.names.parameters[name]) for name in self.owners.orphans}
        if len(orphans) in {0, len(self.names.parameters)} or self._group is not None:
            return ()  # where the named ones hold nothing of the model, they are the wrong ones
        kinds = (o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer))
        found = {id(o): o for o in map(innermost, kinds) if hasattr(o, "param_groups")}
        return tuple(o for o in found.values() if not orphans.isdisjoint(_tensors_of(o)))

    def note_step(self, optimizer: Any) -> None:
        """Note that an optimizer steps: one that nobody named is in use."""
        if self._idle:
            self._idle = tuple(o for o in self._idle if o is not optimizer)

    def end_batch(self) -> None:
        """Forget an optimizer that nobody named, and that does not step: it was left over."""
        self._left -= 1
        if self._idle and self._left <= 0:
            self.optimizers = tuple(o for o in self.optimizers if o not in self._idle)
            self.outside = tuple(o for o in self.outside if o not in self._idle)
            self._idle = ()
            self.knows_orphans = False
            self.look()

    def _new_sensor(self) -> Sensor:
        return Sensor(self.names.parameters, each=self._group is not None)

    def takes(self, optimizer: Any, written: frozenset[str]) -> bool:
        """Tell whether an optimizer is watched; any with parameters of the model is, also one that was not named.

        Args:
            optimizer: The optimizer that steps.
            written: The parameters that this step has written already. Of a wrapper and the optimizer inside of it,
                both of which step, the first one counts.
        """
        if self.owners.holds(optimizer):
            return True
        ours = {id(parameter) for parameter in self.names.parameters.values()}
        held = _tensors_of(optimizer)
        if ours.isdisjoint(held):
            if not self._knows_unregistered:
                self._elsewhere |= held
            return False
        names = self.names.parameters.items()
        if any(name in written for name, p in names if id(p) in held):
            return False
        self.optimizers = self._with(optimizer, held)
        self.look(midway=True)
        return True

    def _with(self, optimizer: Any, held: set[int]) -> tuple[Any, ...]:
        """Return the optimizers with a new one, in the place of the one that it was made instead of."""
        ours = {id(parameter) for parameter in self.names.parameters.values()}
        former = [o for o in self.optimizers if (mine := _tensors_of(o) & ours) and mine <= held]
        if len(former) != 1:
            return (*self.optimizers, optimizer)
        return tuple(optimizer if o is former[0] else o for o in self.optimizers)

    def absent(self, gradients: Sequence[Tensor | None] | None = None) -> list[str]:
        """Return the names of those that have no gradient, after a look whether they are still the model's.

        Args:
            gradients: What the sensor has just read, where that is at hand.
        """
        absent = self.sensor.missing(gradients)
        if absent and absent != self._absent:
            if any(map(self._is_replaced, islice(absent, _LOOKS))):
                self.look(midway=True)
                absent = self.sensor.missing()
            self._absent = absent
        return absent

    def _is_replaced(self, name: str) -> bool:
        """Tell whether the model has another parameter of a name than the one that is watched.

        A sharded model has other ones for a while, which it puts together itself.
        """
        if self._group is not None and self._group.sharded:
            return False
        found = parameter_at(self._model, name)
        return found is not None and found is not self.names.parameters.get(name)

    def frozen(self, covered: tuple[str, ...]) -> list[str]:
        """Return those that want no gradient; nearly always that is nobody, or always the same."""
        parameters = self.names.parameters
        if all(map(_wants, parameters.values())):
            return []
        return list(compress(covered, map(not_, map(_wants, map(parameters.__getitem__, covered)))))

    def nothing_arrived(self) -> bool:
        """Tell whether none of the parameters that want a gradient has one."""
        wanting: int = sum(map(_wants, self.names.parameters.values()))
        return wanting == len(self.sensor.missing())

    def unregistered(self, inspection: Inspection, step: int) -> tuple[Diagnosis, ...]:
        """Return, once, what is to be said of parameters that neither the model nor an optimizer knows of.

        Args:
            inspection: A traced step, whose losses lead to them.
            step: Its number.
        """
        if self._knows_unregistered or not self.owners.known or self._group is not None:
            return ()
        self._knows_unregistered = True
        known = {id(parameter) for parameter in names_of(self._model).parameters.values()}
        known |= self._elsewhere.union(*map(_tensors_of, self.optimizers))
        reached = inspection.reached - known
        return not_registered(self._model, lambda p: _wants_and_is_in(p, reached), step)


def _wants_and_is_in(parameter: Tensor, reached: Collection[int]) -> bool:
    return bool(parameter.requires_grad) and id(parameter) in reached


def _tensors_of(optimizer: Any) -> set[int]:
    """Return the ``id`` of each tensor that an optimizer writes."""
    return {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
