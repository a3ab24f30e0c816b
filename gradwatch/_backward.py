"""One backward pass, watched node by node: who hands a gradient on, and how large it is there.

What this room knows that no other does: which nodes have to be hooked, and how little of what passes through them has
to be measured to find where a gradient first became zero, or not finite, without a copy to the host at each.

Limits: what runs inside a compiled region, or a custom operator, is one node.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradwatch._frames import is_of_a_signal
from gradwatch._graph import ACCUMULATES, HAND_OUT, PLACE, SATURATE, Node, Passed, walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MIX = {"ConvolutionBackward0": 1} | {
    f"{name}Backward0": -1 for name in ("Mm", "Addmm", "Bmm", "Baddbmm", "Mv", "Addmv", "Dot")
}
"""Operations that mix the elements along a dimension, with that dimension."""
_EMPTY = (SATURATE | _MIX.keys()) | frozenset(
    f"{name}Backward{number}"
    for name in [
        "Slice",
        "Select",
        "Index",
        "IndexSelect",
        "Gather",
        "MaskedFill",
        "MaskedSelect",
        "Where",
        "Mul",
        "Min",
        "Max",
        "Amin",
        "Amax",
        "Sort",
        "Topk",
        "Split",
        "SplitWithSizes",
        "Unbind",
        "CopySlices",
        "NllLoss",
        "NllLoss2D",
        "ScaledDotProductFlashAttentionForCpu",
    ]
    for number in range(3)
)
"""Operations whose backward leaves zeros where the forward left something out."""
_sum = torch.sum  # as a method it takes longer
_is_grad_enabled, _INFINITE = torch.is_grad_enabled, math.inf
_ALONE = {(), (-1,)}
"""Children after the first of a node that has one alone."""
_STRIDED = torch.strided
_BLAS = frozenset([torch.float32, torch.float64])
_FEW = 16
"""Elements up to which a list of them is quicker than a call of torch's."""
_SMALL = 4096
"""Elements up to which no order of memory is worth looking for."""
_HAND_ON = frozenset(
    f"{name}Backward{number}"
    for name in "T View UnsafeView ReshapeAlias Transpose Permute Unsqueeze Squeeze Alias Clone".split()  # noqa: SIM905
    for number in range(3)
)
_UNOBSERVED = _HAND_ON | {ACCUMULATES}
"""Nodes that get no hook in any pass."""


@contextmanager
def watched_backward(
    roots: list[Tensor], tag_key: str, *, sizes: bool, hooked: bool = False
) -> Iterator[Passed]:
    """Observe the backward pass that runs inside, through hooks that are gone afterwards.

    Args:
        roots: The tensors that the pass starts from.
        tag_key: Key of the forward operation's number in a node's metadata.
        sizes: Whether to measure what every node hands on, to find where it became zero or NaN.
        hooked: Whether tensors may have hooks that change a gradient between two nodes.

    Cost:
        A hook on each custom Function's node; with ``sizes`` one on every other node at least and one reduction
        per gradient, copied to the host once at the end.
    """
    passed = Passed()
    passed.nodes, found = walk(roots, tag_key)
    measured: list[tuple[tuple[int, int], Tensor]] | None = [] if sizes else None
    passed.has_pieces = sizes and not HAND_OUT.isdisjoint([node.name for node in passed.nodes])
    passed.unobserved = _UNOBSERVED if passed.has_pieces else _UNOBSERVED | PLACE
    first = len({root.grad_fn for root in roots if root.grad_fn is not None})
    seen_below = _seen_below(passed, first) if sizes and not hooked else {}
    spared = {edge[0] for edge in seen_below.values()}
    handles = []
    for number, entry in enumerate(passed.nodes):
        is_seen = sizes and entry.name not in passed.unobserved
        if number not in spared and (entry.custom or is_seen):
            above = seen_below.get(number)
            observer = partial(_observe, passed, number, entry.children, above, measured)
            if measured is not None and above is not None and _is_simple(entry, passed):
                observer = partial(_observe_both, passed, number, above, measured)
            handles.append(found[number].register_hook(observer))
    del found
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()
        passed.sizes.update(_to_host(measured or []))
        for number, position in passed.dropped:
            if passed.received(number):
                passed.withheld[number] = (*passed.withheld.get(number, ()), position)


def _seen_below(passed: Passed, roots: int) -> dict[int, tuple[int, int]]:
    """Return which nodes need no hook, since what they hand on is all that some others get.

    A hook costs as much as the operation that it observes; in a chain every other node is enough.

    Args:
        passed: A pass that has not begun.
        roots: How many nodes it begins at; they are the first.

    Returns:
        Per node that sees it in its place, the node without a hook and the position in its ``children``.
    """
    nodes = passed.nodes
    came = [1] * roots + [0] * (len(nodes) - roots)
    for node in nodes:
        for child in node.children:
            if child >= 0:
                came[child] += 1
    needed = _UNOBSERVED | _EMPTY if passed.has_pieces else passed.unobserved
    seen_below: dict[int, tuple[int, int]] = {}
    spared: set[int] = set()
    for number, node in enumerate(nodes):
        if number in seen_below or came[number] > 1 or node.custom or node.name in needed:
            continue
        for child in node.children:
            if child >= 0 and (
                came[child] > 1 or child in spared or nodes[child].name in passed.unobserved
            ):
                break
        else:
            spared.add(number)
            for position, child in enumerate(node.children):
                if child >= 0:
                    seen_below[child] = number, position
    return seen_below


def _observe(  # noqa: PLR0917 -- called for every node, and keywords cost
    passed: Passed,
    number: int,
    children: tuple[int, ...],
    above: tuple[int, int] | None,
    measured: list[tuple[tuple[int, int], Tensor]] | None,
    grad_inputs: tuple[Any, ...],
    grad_outputs: tuple[Any, ...],
) -> None:
    try:
        missing: tuple[int, ...] = ()
        twin: tuple[Tensor | None, Any] = None, above
        if above is not None and measured is not None:
            twin = _note_came(passed, above, measured, grad_outputs), above
        for position, child in enumerate(children):
            gradient, edge = grad_inputs[position], (number, position)
            if child < 0:
                continue
            if gradient is None:
                missing = (*missing, position)
            elif measured is not None:
                if _measure_anew(passed, edge, gradient, twin, measured):
                    passed.totals[number] = _largest(grad_outputs)
                twin = gradient, edge
        if passed.has_pieces and passed.nodes[number].name in _EMPTY:
            _note_zeros(passed, number, grad_inputs, grad_outputs)
        if missing and any(gradient is not None for gradient in grad_outputs):
            passed.withheld[number] = missing
    except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
        _note_broken(passed, error)


def _note_broken(passed: Passed, error: Exception) -> None:
    passed.broken = error
    if is_of_a_signal(error):
        raise error


def _is_simple(node: Node, passed: Passed) -> bool:
    """Tell whether a node computes from one value, and perhaps a number, and nothing else is to be seen."""
    children = node.children
    alone = len(children) > 0 and children[0] >= 0 and children[1:] in _ALONE
    return alone and not (node.custom or passed.has_pieces)


def _observe_both(  # noqa: PLR0917 -- as above
    passed: Passed,
    number: int,
    above: tuple[int, int],
    measured: list[tuple[tuple[int, int], Tensor]],
    grad_inputs: tuple[Any, ...],
    grad_outputs: tuple[Any, ...],
) -> None:
    """Do what ``_observe`` does for most nodes: those that compute from one value, and see what came."""
    try:
        gradient, came = grad_inputs[0], grad_outputs[0]
        if gradient is None or came is None:
            children = passed.nodes[number].children
            _observe(passed, number, children, above, measured, grad_inputs, grad_outputs)
            return
        is_bad = _measure(passed, above, came, measured)
        if gradient is not came or above not in passed.sizes:
            is_bad = _measure(passed, (number, 0), gradient, measured)
        else:
            passed.sizes[number, 0] = passed.sizes[above]
        if is_bad:
            passed.totals[number] = _largest(grad_outputs)
    except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
        _note_broken(passed, error)


def _note_came(
    passed: Passed,
    edge: tuple[int, int],
    measured: list[tuple[tuple[int, int], Tensor]],
    grad_outputs: Sequence[Tensor | None],
) -> Tensor | None:
    """Note and return what the node above, which has no hook, handed on: it is all that came."""
    gradient = grad_outputs[0]
    if len(grad_outputs) > 1:
        gradient = next((each for each in grad_outputs if each is not None), None)
    if gradient is None:
        passed.dropped.append(edge)
    else:
        _measure(passed, edge, gradient, measured)
    return gradient


def _measure_anew(
    passed: Passed,
    edge: tuple[int, int],
    gradient: Tensor,
    twin: tuple[Tensor | None, Any],
    measured: list[tuple[tuple[int, int], Tensor]],
) -> bool:
    """Do what ``_measure`` does, unless the gradient is the one that was measured last: sums hand on what they get."""
    other, known = twin
    if gradient is other and known in passed.sizes:
        passed.sizes[edge] = size = passed.sizes[known]
        return size == 0.0 or not math.isfinite(size)
    return _measure(passed, edge, gradient, measured)


def _measure(
    passed: Passed,
    edge: tuple[int, int],
    gradient: Tensor,
    measured: list[tuple[tuple[int, int], Tensor]],
) -> bool:
    """Note the size of what was handed on, in ``measured`` where it is not on the CPU; tell if it is known as bad."""
    count = gradient.numel()
    if (
        count <= _SMALL
        and gradient.is_cpu
        and type(gradient) is Tensor
        and gradient.layout is _STRIDED
        and not _is_grad_enabled()
    ):
        # NOTE [No small tensors] Thousands of them, alive until the pass ends, would lie between the
        # large blocks of the heap: malloc could not give those back, and the peak would be higher.
        # Reading a few numbers takes a fourth of a call of torch's.
        few = count <= _FEW and gradient.dim() == 1
        total: float = abs(sum(gradient.tolist()) if few else _sum(gradient).item())
        if 0.0 < total < _INFINITE:
            # A third of the time of what follows, which is right where numbers cancel too.
            passed.sizes[edge] = total
            return False
    size = _size(gradient)
    if isinstance(size, Tensor):
        measured.append((edge, size))
        return False
    passed.sizes[edge] = size
    return size == 0.0 or not math.isfinite(size)


def _note_zeros(
    passed: Passed,
    number: int,
    given: Sequence[Any],
    got: Sequence[Any],
) -> None:
    """Note to which inputs a node handed on more zeros than it got."""
    mixed = _MIX.get(passed.nodes[number].name)
    before = max((_share_of_zeros(g, mixed) for g in got if g is not None), default=0.0)
    for position, child in enumerate(passed.nodes[number].children):
        if child >= 0 and given[position] is not None and _share_of_zeros(given[position]) > before:
            passed.emptied.add((number, position))


def _share_of_zeros(gradient: Tensor, mixed: int | None = None) -> float:
    """Return which part of the elements is zero; 0 for what is not on the CPU.

    Args:
        gradient: A gradient.
        mixed: A dimension along which only nothing but zeros counts: mixing keeps these, and no others.
    """
    if not gradient.is_cpu or gradient.layout is not torch.strided or not gradient.numel():
        return 0.0
    if mixed is not None and gradient.dim() > 1:
        gradient = gradient.count_nonzero(mixed)
    return 1 - gradient.count_nonzero().item() / gradient.numel()


def _largest(gradients: Sequence[Tensor | None]) -> float:
    """Return the largest absolute value of several gradients on the CPU, NaN where one is not finite."""
    sizes = [float(_size(g)) for g in gradients if g is not None]
    return max(sizes, default=-1.0) if all(map(math.isfinite, sizes)) else math.nan


def _size(gradient: Tensor) -> float | Tensor:
    """Return 0.0 for zeros alone, NaN or infinity where one is, -1.0 for nothing, else a positive number.

    On another device than the CPU that is a tensor of no dimension.
    """
    if gradient.layout is not torch.strided or torch.is_grad_enabled():
        with torch.no_grad():
            gradient = gradient.detach()
            if gradient.is_sparse:
                whole = gradient.numel()
                gradient = gradient.coalesce().values()
                if whole and not gradient.numel():
                    return 0.0
            elif gradient.layout is not torch.strided:
                gradient = gradient.to_dense()
    count = gradient.numel()
    if count == 0:
        return -1.0
    if type(gradient) is not Tensor or gradient.is_complex():
        largest: Tensor = torch.linalg.vector_norm(gradient, math.inf)
        return largest
    if not gradient.is_cpu:
        least, most = torch.aminmax(_contiguous(gradient))
        return torch.maximum(most, -least)
    if count > _SMALL:
        gradient = _contiguous(gradient)
        total: float = abs(_total(gradient).item())  # see NOTE [No small tensors]
        if 0.0 < total < math.inf:
            return total
    least, most = torch.aminmax(gradient)
    return max(abs(least.item()), abs(most.item()))


def _total(gradient: Tensor) -> Tensor:
    """Return a number that is positive and finite for hardly anything but a good gradient, read as fast as can be.

    The sum of the squares is read twice as fast as the sum where BLAS computes it, and nothing cancels.
    """
    if gradient.dtype in _BLAS and gradient.is_contiguous():
        flat = gradient.view(-1)
        return torch.dot(flat, flat)
    return _sum(gradient)


def _contiguous(gradient: Tensor) -> Tensor:
    """Return a view with the same values in the order of memory, which is read ten times as fast."""
    if gradient.is_contiguous():
        return gradient
    for dimension, stride in enumerate(gradient.stride()):
        if stride == 0:
            gradient = gradient.narrow(dimension, 0, 1)
    strides = gradient.stride()
    return gradient.permute(sorted(range(gradient.dim()), key=lambda i: -strides[i]))


def _to_host(measured: list[tuple[tuple[int, int], Tensor]]) -> dict[tuple[int, int], float]:
    """Copy all measurements in one transfer per device and type."""
    groups: dict[Any, list[tuple[tuple[int, int], Tensor]]] = {}
    for key, size in measured:
        if not size.is_meta:  # a tensor without data has no size to read
            groups.setdefault((size.device, size.dtype), []).append((key, size))
    done: dict[tuple[int, int], float] = {}
    for group in groups.values():
        values = torch.stack([size for _, size in group]).tolist()
        done.update(zip((key for key, _ in group), values, strict=True))
    return done
