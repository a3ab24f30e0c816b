"""What the parameters and modules of a model are called.

What this room knows that no other does: names as the user wrote them, with wrappers (``torch.compile``,
DDP, FSDP, activation checkpointing) taken off by unwrapping the object; which names are one tied
parameter; and which optimizer owns a parameter.

Limits: a module that the model does not register (in a plain list, say) has no name here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradwatch._record import shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where torch's own wrappers keep what they wrap."""

_HOMES = ("torch._dynamo.", "torch.distributed.")
"""Where these wrappers are defined: a container of torch's may hold children of any name."""


_TRAINERS = ("accelerate.", "lightning.fabric.", "lightning_fabric.")
"""Whose wrappers of optimizers keep the one that steps as `optimizer`."""


@dataclass(frozen=True, slots=True)
class Names:
    """The parameters and modules of a model at one moment."""

    parameters: dict[str, Tensor]
    """By their first name, in the model's order."""
    modules: dict[str, nn.Module]
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each tied parameter all of its names, the key first."""

    def where(self, holds: Callable[[str, Sequence[str]], bool]) -> Names:
        """Return the same names with those parameters alone for which a predicate holds.

        Args:
            holds: Called with a parameter's name and, where it is tied, all of its names.
        """
        chosen = {
            name: parameter
            for name, parameter in self.parameters.items()
            if holds(name, self.aliases.get(name, ()))
        }
        return Names(chosen, self.modules, self.aliases)

    def known(self) -> dict[str, tuple[str, ...]]:
        """Return every parameter's name with its aliases."""
        return {name: self.aliases.get(name, ()) for name in self.parameters}


def checked(model: Any, call: str) -> nn.Module:
    """Return a model, or say what was expected in a call."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{call}`: expected a `torch.nn.Module`, found `{type(model).__name__}`")
    return model


def unwrap(module: nn.Module) -> nn.Module:
    """Return what a wrapper of torch's wraps, or the module itself."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            inner = module.module
        elif type(module).__module__.startswith(_HOMES):
            inner = next(
                (module.get_submodule(key) for key in _INNER if hasattr(module, key)),
                None,
            )
        else:
            return module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def innermost(optimizer: Any) -> Any:
    """Return the optimizer of torch's inside of a trainer's wrapper: it is the one whose hooks run."""
    while hasattr(optimizer, "optimizer") and any(
        kind.__module__.startswith(_TRAINERS) for kind in type(optimizer).__mro__
    ):
        optimizer = optimizer.optimizer
    return optimizer


def as_optimizers(given: Any) -> tuple[Any, ...]:
    """Return the optimizers that were given, also where that is a single one."""
    several = given if isinstance(given, Iterable) else (given,)
    return tuple(map(innermost, several))


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module, or one inside of it, was compiled: by ``torch.compile`` or in place."""
    return any(
        type(inner).__module__.startswith("torch._dynamo")
        # Private: `module.compile()` leaves no other mark.
        or getattr(inner, "_compiled_call_impl", None) is not None
        for inner in module.modules()
    )


def names_of(model: nn.Module) -> Names:
    """Return the names of all parameters and modules, without those of wrappers.

    Args:
        model: Any module, wrapped or not.

    Cost:
        One visit per module and parameter, about a microsecond each.

    Example:
        >>> list(names_of(nn.DataParallel(nn.Linear(2, 1))).parameters)
        ['weight', 'bias']
    """
    parameters: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {}
    first: dict[int, str] = {}
    all_names: dict[str, list[str]] = {}
    for path, module in _walk(unwrap(model), "", set()):
        modules.setdefault(path, module)
        for short, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{short}" if path else short
            key = first.setdefault(id(parameter), name)
            parameters.setdefault(key, parameter)
            all_names.setdefault(key, []).append(name)
    aliases = {key: tuple(names) for key, names in all_names.items() if len(names) > 1}
    return Names(parameters, modules, aliases)


def parameter_at(model: nn.Module, name: str) -> Tensor | None:
    """Return the parameter that a model has now under a name that ``names_of`` gave, None where there is none."""
    *path, short = name.split(".")
    module = unwrap(model)
    for part in path:
        child = dict(module.named_children()).get(part)
        if child is None:
            return None
        module = unwrap(child)
    return dict(module.named_parameters(recurse=False)).get(short)


def _walk(module: nn.Module, path: str, above: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module under each of its paths; one that holds itself is not entered again."""
    if id(module) in above:
        return
    yield path, module
    above = above | {id(module)}
    for short, child in module._modules.items():  # noqa: SLF001 -- named_children() skips duplicates
        if child is not None:
            yield from _walk(unwrap(child), f"{path}.{short}" if path else short, above)


class Owners:
    """Which optimizer steps each parameter.

    Args:
        names: The parameters of the model.
        optimizers: The optimizers, in the Trainer's order.
        complete: Whether these are all there are, so that a parameter in none of them is an orphan.
    """

    def __init__(self, names: Names, optimizers: Sequence[Any], *, complete: bool = True) -> None:
        self._optimizers = tuple(optimizers)
        self._lists = self._held_lists()
        by_id = {id(parameter): name for name, parameter in names.parameters.items()}
        owned: list[set[str]] = [
            {
                by_id[id(p)]
                for group in optimizer.param_groups
                for p in group["params"]
                if id(p) in by_id
            }
            for optimizer in self._optimizers
        ]
        everyone = set[str]().union(*owned)
        self.known = bool(everyone) or self._holds_others(names)
        """Whether it can be told which parameters are in none: not where optimizers hold copies of another kind."""
        loose = {name for name in names.parameters if complete and name not in everyone}
        self.orphans = tuple(name for name in names.parameters if name in loose)
        self._covered = [
            tuple(name for name in names.parameters if name in mine or name in loose)
            for mine in owned
        ]
        self._everyone = tuple(names.parameters)
        self._chosen = [*map(frozenset, self._covered), frozenset(self._everyone)]
        shapes = {shape_of(names.parameters[name]) for name in self.orphans}
        self.strangers = sum(
            id(p) not in by_id and p.requires_grad and shape_of(p) in shapes
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        )
        """Tensors of the optimizers that the model does not have, with the shape of one that none owns."""

    def _holds_others(self, names: Names) -> bool:
        """Tell whether the optimizers hold tensors of another model, or of another copy of this one.

        Copies of another type, one tensor with all values, or what one of several processes has are kept on purpose.
        """
        held = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        mine = names.parameters.values()
        if not held or {*map(_kind, held)}.issuperset(map(_kind, mine)):
            return bool(held)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return False
        is_flat = sum(p.numel() for p in held) == sum(math.prod(shape_of(p)) for p in mine)
        return not is_flat and not {*map(shape_of, held)}.issuperset(map(shape_of, mine))

    def _held_lists(self) -> list[tuple[int, int]]:
        """Return which lists the optimizers hold, and their lengths: they change when groups are added, or swapped."""
        groups = [group["params"] for o in self._optimizers for group in o.param_groups]
        return [(id(held), len(held)) for held in groups]

    def changed(self) -> bool:
        """Tell whether the optimizers hold other tensors than when this was made."""
        return self._held_lists() != self._lists

    def holds(self, optimizer: Any) -> bool:
        """Tell whether an optimizer is one of these."""
        return self._place(optimizer) is not None

    def position(self, optimizer: Any) -> int:
        """Return the optimizer's place among the others, 0 for one that is not known."""
        return self._place(optimizer) or 0

    def owned(self, optimizer: Any) -> tuple[str, ...]:
        """Return the parameters that an optimizer holds."""
        loose = set(self.orphans)
        return tuple(name for name in self.covered(optimizer) if name not in loose)

    def covered(self, optimizer: Any) -> tuple[str, ...]:
        """Return the parameters that a step speaks of: the optimizer's own, and those in none."""
        place = self._place(optimizer)
        return self._everyone if place is None else self._covered[place]

    def chosen(self, optimizer: Any) -> frozenset[str]:
        """Return the same as a set, which is joined and compared without a look at each name."""
        place = self._place(optimizer)
        return self._chosen[-1 if place is None else place]

    def _place(self, optimizer: Any) -> int | None:
        return next((i for i, known in enumerate(self._optimizers) if known is optimizer), None)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return shape_of(tensor), tensor.dtype, tensor.device
