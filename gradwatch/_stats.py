"""How large gradients are: the norm of each, which of them are zero or not finite, and by what they are scaled.

What this room knows that no other does: how to take many norms in few kernels and one copy to the host, when a sum
of squares has to be taken again, and which parameters have a ``.grad`` that says nothing.

Limits: a gradient that is spread over processes is measured in parts, which somebody else adds up.
"""

from __future__ import annotations

import math
from contextlib import suppress
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from gradwatch.report import GradStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_HALVES = {torch.float16, torch.bfloat16}
_DOUBLES = {torch.float64, torch.complex128}
_dtype = attrgetter("dtype")


class Alike(NamedTuple):
    """What all gradients of a model have in common."""

    dtype: torch.dtype
    crowd: int | None
    """Their number, where they are so many and so small that they are measured as one tensor."""


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
    alike: Alike | None = None,
) -> GradStats:
    """Return the L2 norm of each gradient, and which are zero or not finite.

    Half-precision gradients are summed in float32. Where a sum of squares would leave the range of its
    type, the norm is taken again, in float64 or of elements scaled down, so that "zero" and "not
    finite" speak of the elements.

    Args:
        gradients: The gradients by name, of any shape, dtype, device, and layout.
        scales: What some of them are multiplied with (a GradScaler's scale), by name.
        total: Sums values over all processes, where each holds a part of the gradients.
        alike: What the gradients of the whole model have in common, where that is known.

    Cost:
        One fused pass per device and one copy to the host per device; a second one only while some
        norm is zero or not finite. Many small ones on the CPU are copied into one tensor, for half the time.

    Example:
        >>> measure({"weight": torch.tensor([3.0, 4.0])}).norms
        {'weight': 5.0}
    """
    weights: dict[str, float] = {}
    if total is not None:
        weights = {name: _share(gradient) for name, gradient in gradients.items()}
        gradients = {name: _local(gradient) for name, gradient in gradients.items()}
    if total is not None or alike is None:
        one_type = len(set(map(_dtype, gradients.values()))) == 1
        alike = Alike(next(iter(gradients.values())).dtype, None) if one_type else None
    norms = _norms(gradients, wide=False, alike=alike)
    whole = math.hypot(*norms.values())
    # A sum that is finite has no part that is not: one look at each is enough.
    usual = math.isfinite(whole) and 0.0 not in norms.values()
    doubtful = {} if usual else _doubtful(norms, gradients)
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
    if doubtful or scales or total is not None:
        whole = math.hypot(*norms.values())
    return GradStats(norms, zero, nonfinite, whole)


def _local(gradient: Tensor) -> Tensor:
    """Return the part of a gradient that this process holds."""
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local


def _share(gradient: Tensor) -> float:
    """Return the share of a part in the sum over all processes: several may hold the same one."""
    mesh, placements = getattr(gradient, "device_mesh", None), getattr(gradient, "placements", ())
    parts = math.prod(mesh.size(i) for i, p in enumerate(placements) if p.is_shard()) if mesh else 1
    return float(parts) / torch.distributed.get_world_size()


def _doubtful(norms: Mapping[str, float], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients whose norm is zero or not finite: perhaps it only left the range of its type."""
    return {
        name: gradients[name]
        for name, norm in norms.items()
        if (norm == 0.0 or not math.isfinite(norm)) and gradients[name].numel()
    }


def _norms(
    gradients: Mapping[str, Tensor], *, wide: bool, alike: Alike | None = None
) -> dict[str, float]:
    if alike is not None and gradients:
        # The usual case, without another look at each: dense gradients on one device, or torch refuses.
        some, (dtype, crowd) = list(gradients.values()), alike
        with suppress(RuntimeError), torch.no_grad():
            if crowd == len(some):
                together = _joined(some)
            else:
                together = torch.stack(_fused(some, torch.float32 if dtype in _HALVES else None))
            return dict(zip(gradients, together.tolist(), strict=True))
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, gradient in gradients.items():
        if gradient.is_meta:
            continue  # without data it has no norm
        key = (gradient.device, gradient.dtype, _sum_dtype(gradient, wide=wide))
        groups.setdefault(key, []).append(name)
    by_device: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    with torch.no_grad():
        for (device, _, sum_dtype), names in groups.items():
            known, stacked = by_device.setdefault(device, ([], []))
            known += names
            dense = [_dense(gradients[n]) for n in names]
            far = wide and gradients[names[0]].dtype in _DOUBLES
            norms = [_scaled(gradient) for gradient in dense] if far else _fused(dense, sum_dtype)
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
    return list(fused(gradients, 2, dtype=dtype))


def _joined(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norms of many small gradients, which takes less in one tensor than one after the other."""
    rows = list(map(Tensor.ravel, gradients))
    sizes = torch.tensor(list(map(Tensor.numel, rows)), device="cpu")
    # A copy in any case: what is squared in place must not be a gradient.
    elements = torch.cat(rows).to(torch.float64, copy=True)
    return torch.segment_reduce(elements.square_(), "sum", lengths=sizes).sqrt_()


def _scaled(gradient: Tensor) -> Tensor:
    """Return the norm of a float64 gradient whose squares may leave the range of float64."""
    if not gradient.numel():
        return torch.zeros((), dtype=torch.float64, device=gradient.device)
    largest = torch.linalg.vector_norm(gradient, math.inf)
    norm = torch.linalg.vector_norm(gradient / largest) * largest
    return torch.where(torch.isfinite(largest) & (largest > 0), norm, largest)
