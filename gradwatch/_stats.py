"""Who got a gradient, and how large it is: the watching gear's two passes over ``.grad``.

What this room knows that no other does: that ``.grad is None`` says nothing by itself. A gradient left
over from an earlier step, or zeros from ``zero_grad(set_to_none=False)``, is not one of this step. What
tells is whether a backward pass changed ``.grad``: another object, or the same one with a higher
version.

Limits: gradients that an optimizer-in-backward or ZeRO takes away before backward ends are never seen
here; with ``gradient_as_bucket_view`` all gradients of a bucket share one version.
"""

from __future__ import annotations

import math
import weakref
from itertools import repeat
from operator import attrgetter, is_
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from gradwatch._record import version_of
from gradwatch.report import GradStats

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

_HALVES = {torch.float16, torch.bfloat16}
_DOUBLES = {torch.float64, torch.complex128}


class Sensor:
    """Tell which parameters backward passes gave a gradient to.

    Args:
        parameters: The parameters by name.

    Cost:
        Two passes over ``.grad`` for each backward pass, about 0.1 microseconds a parameter each;
        versions are read only where a gradient was held before. No kernel, no synchronization, and no
        gradient is kept alive.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.names = tuple(parameters)
        self._parameters = tuple(parameters.values())
        self._held: dict[int, tuple[weakref.ref[Tensor], int]] | None = None
        self._everyone = frozenset(range(len(self.names)))
        self._arrived: set[int] = set()
        self._latest: frozenset[int] = frozenset()
        self._first: dict[int, weakref.ref[Tensor]] | None = None

    @property
    def arrived(self) -> frozenset[str]:
        """Names of those that were given a gradient since ``restart()``."""
        return frozenset(self.names[position] for position in self._arrived)

    @property
    def latest(self) -> frozenset[str]:
        """Names of those that the last backward pass gave a gradient to."""
        return frozenset(self.names[position] for position in self._latest)

    @property
    def is_complete(self) -> bool:
        """Whether the last backward pass gave a gradient to every parameter."""
        return self._latest is self._everyone or len(self._latest) == len(self.names)

    def watches(self, parameters: Mapping[str, Tensor]) -> bool:
        """Tell whether these are the very parameters that are watched, under the same names."""
        return self.names == tuple(parameters) and all(
            known is given
            for known, given in zip(self._parameters, parameters.values(), strict=True)
        )

    def extend(self, parameters: Mapping[str, Tensor]) -> None:
        """Tell of further parameters too, from the next backward pass on."""
        self.names = (*self.names, *parameters)
        self._parameters = (*self._parameters, *parameters.values())
        self._everyone = frozenset(range(len(self.names)))

    def before(self) -> None:
        """Note what is there when a backward pass begins."""
        self._held = {
            position: (weakref.ref(gradient), _version(gradient))
            for position, gradient in enumerate([p.grad for p in self._parameters])
            if gradient is not None
        }
        if self._first is None:
            self._first = {position: ref for position, (ref, _) in self._held.items()}

    def after(self) -> None:
        """Add the parameters to which the pass gave a gradient to those of this step."""
        if self._held is None:
            return
        held, self._held = self._held, None
        gradients = [p.grad for p in self._parameters]
        if not held and not _any_none(gradients):
            self._latest = self._everyone
        else:
            self._latest = frozenset(
                position
                for position, gradient in enumerate(gradients)
                if gradient is not None and _is_new(gradient, held.get(position))
            )
        self._arrived |= self._latest

    def missing(self) -> list[str]:
        """Return the names of those that want a gradient and have none of this step."""
        arrived = self._arrived
        if len(arrived) == len(self.names) and not _any_none(map(_grad, self._parameters)):
            return []
        return [
            name
            for position, (name, parameter) in enumerate(
                zip(self.names, self._parameters, strict=True)
            )
            if (parameter.grad is None or (position not in arrived and self._is_old(position)))
            and parameter.requires_grad
        ]

    def _is_old(self, position: int) -> bool:
        """Tell whether a gradient is one that was there before, and not one assigned by hand."""
        old = None if self._first is None else self._first.get(position)
        return self._first is None or (old is not None and old() is self._parameters[position].grad)

    def restart(self, names: Collection[str]) -> None:
        """Begin a new step for the parameters of one optimizer."""
        self._first = None
        if len(names) == len(self.names):
            self._arrived = set()
        else:
            chosen = frozenset(names)
            self._arrived = {i for i in self._arrived if self.names[i] not in chosen}


_grad = attrgetter("grad")


def _any_none(gradients: Iterable[Tensor | None]) -> bool:
    """Tell whether one is None; written so that the loop runs in C, and no tensor is compared."""
    return True in map(is_, gradients, repeat(None))


def _is_new(gradient: Tensor, known: tuple[weakref.ref[Tensor], int] | None) -> bool:
    return known is None or known[0]() is not gradient or known[1] != _version(gradient)


def _version(tensor: Tensor) -> int:
    # FSDP2 moves the version of the local shard, not that of the DTensor around it.
    return version_of(getattr(tensor, "_local_tensor", tensor))


def is_lazy(parameter: Tensor) -> bool:
    """Tell whether a parameter has no shape yet."""
    return isinstance(parameter, UninitializedParameter)


def is_hidden(parameter: Tensor) -> bool:
    """Tell whether ``.grad`` says nothing: without a shape, an empty shard, or in DeepSpeed's hands."""
    return is_lazy(parameter) or is_deepspeed(parameter) or parameter.numel() == 0


def is_deepspeed(parameter: Tensor) -> bool:
    """Tell whether DeepSpeed's ZeRO takes a parameter's gradient away within backward."""
    # Marks of DeepSpeed's own: it has no public way to ask.
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def scale_left(scaler: Any, optimizer: Any) -> float:
    """Return what an optimizer's gradients are multiplied with, right before it steps.

    Optimizers that divide by the scale themselves (``fused=True``) are handed scaled gradients; for all
    others the scaler has divided them.

    Args:
        scaler: A GradScaler, or None.
        optimizer: The optimizer that is about to step; None for parameters that none owns.

    Cost:
        Reading the scale is a copy to the host, where the gradients are scaled.
    """
    if scaler is None or not scaler.is_enabled():
        return 1.0
    # Private: no public name tells whether `unscale_` was called for an optimizer.
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer), {})
    if getattr(state.get("stage"), "name", "READY") != "READY":
        return 1.0
    return float(scaler.get_scale())


def is_searching(scaler: Any) -> bool:
    """Tell whether a GradScaler can still lower its scale after an overflow.

    It starts far too high, and halves the scale at each overflow until there is none. A gradient that
    is not finite at a scale of 1 is so without it too.

    Cost:
        A copy to the host: to be asked only where something is not finite.
    """
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1.0


def measure(
    gradients: Mapping[str, Tensor],
    scales: Mapping[str, float] = MappingProxyType({}),
    total: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None,
) -> GradStats:
    """Return the L2 norm of each gradient, and which are zero or not finite.

    Half-precision gradients are summed in float32. Where a sum of squares would leave the range of its
    type, the norm is taken again, in float64 or of elements scaled down, so that "zero" and "not
    finite" speak of the elements.

    Args:
        gradients: The gradients by name, of any shape, dtype, device, and layout.
        scales: What some of them are multiplied with (a GradScaler's scale), by name.
        total: Sums values over all processes, where each holds a part of the gradients.

    Cost:
        One fused pass per device and one copy to the host per device; a second one only while some
        norm is zero or not finite.

    Example:
        >>> measure({"weight": torch.tensor([3.0, 4.0])}).norms
        {'weight': 5.0}
    """
    weights: dict[str, float] = {}
    if total is not None:
        weights = {name: _share(gradient) for name, gradient in gradients.items()}
        gradients = {name: _local(gradient) for name, gradient in gradients.items()}
    norms = _norms(gradients, wide=False)
    doubtful = {
        name: gradients[name]
        for name, norm in norms.items()
        if (norm == 0.0 or not math.isfinite(norm)) and gradients[name].numel()
    }
    if doubtful:
        norms.update(_norms(doubtful, wide=True))
    suspects: Iterable[str] = doubtful
    if total is not None:
        squares = total({name: norm**2 * weights[name] for name, norm in norms.items()})
        norms = {name: math.sqrt(squares[name]) for name in norms}
        suspects = norms
    zero = frozenset(name for name in suspects if norms[name] == 0.0)
    nonfinite = frozenset(name for name in suspects if not math.isfinite(norms[name]))
    norms.update({name: norms[name] / scale for name, scale in scales.items() if name in norms})
    return GradStats(norms, zero, nonfinite, math.hypot(*norms.values()))


def _local(gradient: Tensor) -> Tensor:
    """Return the part of a gradient that this process holds."""
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local


def _share(gradient: Tensor) -> float:
    """Return the share of a part in the sum over all processes: several may hold the same one."""
    mesh, placements = getattr(gradient, "device_mesh", None), getattr(gradient, "placements", ())
    parts = math.prod(mesh.size(i) for i, p in enumerate(placements) if p.is_shard()) if mesh else 1
    return float(parts) / torch.distributed.get_world_size()


def _norms(gradients: Mapping[str, Tensor], *, wide: bool) -> dict[str, float]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, gradient in gradients.items():
        key = (gradient.device, gradient.dtype, _sum_dtype(gradient, wide=wide))
        groups.setdefault(key, []).append(name)
    by_device: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    with torch.no_grad():
        for (device, _, dtype), names in groups.items():
            known, stacked = by_device.setdefault(device, ([], []))
            known += names
            dense = [_dense(gradients[n]) for n in names]
            far = wide and gradients[names[0]].dtype in _DOUBLES
            norms = [_scaled(gradient) for gradient in dense] if far else _fused(dense, dtype)
            stacked.append(torch.stack(norms))
        return {
            name: norm
            for names, stacked in by_device.values()
            for name, norm in zip(names, torch.cat(stacked).tolist(), strict=True)
        }


def _sum_dtype(gradient: Tensor, *, wide: bool) -> torch.dtype | None:
    if wide:
        return torch.complex128 if gradient.is_complex() else torch.float64
    return torch.float32 if gradient.dtype in _HALVES else None


def _dense(gradient: Tensor) -> Tensor:
    """Return a strided tensor with the same norm."""
    if gradient.layout is torch.strided:
        return gradient.detach()
    if gradient.is_sparse:
        return gradient.detach().coalesce().values()
    return gradient.detach().to_dense()


def _fused(gradients: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    # Private, and the only way to many norms in one kernel; without it each norm is one call.
    fused = getattr(torch, "_foreach_norm", None)
    if fused is None:
        return [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients]
    return list(fused(list(gradients), 2, dtype=dtype))


def _scaled(gradient: Tensor) -> Tensor:
    """Return the norm of a float64 gradient whose squares may leave the range of float64."""
    if not gradient.numel():
        return torch.zeros((), dtype=torch.float64, device=gradient.device)
    largest = torch.linalg.vector_norm(gradient, math.inf)
    norm = torch.linalg.vector_norm(gradient / largest) * largest
    return torch.where(torch.isfinite(largest) & (largest > 0), norm, largest)
