"""The autograd graph of one backward pass: what it reaches, and where a gradient went wrong.

What this room knows that no other does: which leaves a backward pass from some roots would reach, which
node handed on no gradient at all (a custom Function that returned None), and at which node a good
gradient first became zero, NaN or infinite.

Limits: a graph inside a compiled region is one node; inside a reentrant checkpoint it does not exist
before backward runs. Hooks on nodes see what autograd hands on, not what is added up in a leaf.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from gradwatch._frames import is_of_a_signal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

TAG_UNKNOWN = -1


@dataclass(slots=True)
class Node:
    """One autograd node, without the node."""

    name: str
    tag: int
    """Number of the forward operation it belongs to; -1 where none is known."""
    children: tuple[int, ...]
    """Positions of the nodes that its gradients go to; -1 for inputs that take none."""
    leaf: int | None = None
    """``id`` of the tensor that it accumulates into."""
    custom: bool = False
    """Whether it belongs to a ``torch.autograd.Function`` of the user's."""

    @property
    def hands_out(self) -> bool:
        """Whether it cuts what it gets into pieces, one for each of its inputs."""
        return self.name in _HAND_OUT


class Origin(NamedTuple):
    """Where a gradient first became zero, or not finite."""

    tag: int
    """Number of the forward operation."""
    cancelled: bool = False
    """Whether several gradients add up to zero, of which the operation's was computed last."""
    hooked: bool = False
    """Whether a hook on the operation's result changed the gradient that came to it."""


@dataclass(slots=True)
class Passed:
    """What one backward pass did: the graph it ran over, and what its nodes handed on."""

    nodes: list[Node] = field(default_factory=list)
    withheld: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Per node the positions in its ``children`` that it gave no gradient; only hooked nodes are seen."""
    sizes: dict[tuple[int, int], float] = field(default_factory=dict)
    """The gradient handed on, by node and position: 0.0 for zeros alone, -1.0 for none, else of that order.

    Nodes that hand on what they get are left out.
    """
    emptied: set[tuple[int, int]] = field(default_factory=set)
    """Where nodes handed on more zeros than came; known where a node only hands out pieces."""
    totals: dict[int, float] = field(default_factory=dict)
    """The same of what came to a node in all, where what it handed on went wrong; on the CPU alone."""

    dropped: list[tuple[int, int]] = field(default_factory=list)
    """Where nodes that were not hooked themselves handed on nothing."""
    has_pieces: bool = False
    """Whether some node cuts its gradient into pieces, so that zeros have to be counted."""
    unobserved: frozenset[str] = frozenset()
    """Names of the nodes that get no hook: what they hand on is known by what they get."""
    broken: Exception | None = None
    """A failure of ours, after which ``sizes`` are incomplete."""
    _edges: dict[int, list[tuple[int, int]]] | None = None
    _delivered: set[int | None] | None = None
    _searches: dict[bool, _Search] = field(default_factory=dict)
    """What is asked of a pass that is over, kept for the next question."""

    @property
    def reached(self) -> set[int]:
        """The ``id`` of each leaf that the graph leads to."""
        return {node.leaf for node in self.nodes if node.leaf is not None}

    @property
    def tags(self) -> set[int]:
        """Numbers of the forward operations that the graph leads to."""
        return {node.tag for node in self.nodes if node.tag >= 0}

    def received(self, number: int) -> bool:
        """Tell whether a gradient came to a node, as far as those above it were observed."""
        nodes = self.nodes
        return any(nodes[upper].children[p] == number for upper, p in self.sizes) or not any(
            number in node.children for node in nodes
        )

    def delivered(self, leaf: int) -> bool:
        """Tell whether a gradient was handed to a leaf; only known where sizes were measured."""
        if self._delivered is None:
            self._delivered = {
                self.nodes[self.nodes[number].children[position]].leaf
                for (number, position), size in {**self.sizes, **self.handed_on()}.items()
                if size != -1.0
            }
        return leaf in self._delivered

    def withholders(self, leaf: int) -> list[Node]:
        """Return the nodes that withheld the gradient on the way to a leaf."""
        above = self._above(leaf)
        return [
            self.nodes[number]
            for number, positions in self.withheld.items()
            if any(self.nodes[number].children[position] in above for position in positions)
        ]

    def _above(self, leaf: int) -> set[int]:
        """Return the nodes whose gradient would go on to a leaf, the leaf's own included."""
        above: set[int] = set()
        # Children have larger or smaller numbers, in no order: repeat until nothing is added.
        todo = [number for number, node in enumerate(self.nodes) if node.leaf == leaf]
        while todo:
            number = todo.pop()
            if number not in above:
                above.add(number)
                todo.extend(upper for upper, _ in self._edges_above().get(number, ()))
        return above

    def _edges_above(self) -> dict[int, list[tuple[int, int]]]:
        """Return for each node those whose gradient goes on to it, and the position at which it does."""
        if self._edges is None:
            self._edges = {}
            for upper, node in enumerate(self.nodes):
                for position, child in enumerate(node.children):
                    self._edges.setdefault(child, []).append((upper, position))
        return self._edges

    def handed_on(self) -> dict[tuple[int, int], float]:
        """Return what went through the nodes that hand on what they get, which were not observed."""
        waiting = {
            n: node
            for n, node in enumerate(self.nodes)
            if node.name in self.unobserved and node.leaf is None
        }
        if not waiting:
            return {}
        came: dict[int, list[tuple[int, int]]] = {}
        for number, node in enumerate(self.nodes):
            for position, child in enumerate(node.children):
                if child in waiting:
                    came.setdefault(child, []).append((number, position))
        found: dict[tuple[int, int], float] = {}
        todo = list(waiting)
        while todo:
            number = todo.pop()
            edges = came.get(number, [])
            before = [n for n, _ in edges if n in waiting and (n, 0) not in found]
            if before:
                todo += [number, *before]
                continue
            sizes = [self.sizes.get(edge, found.get(edge, -1.0)) for edge in edges]
            odd = next((size for size in sizes if not math.isfinite(size)), None)
            # Where a backward pass begins, it begins with ones.
            found[number, 0] = odd if odd is not None else max(sizes, default=1.0)
            came_empty = found[number, 0] < 0.0 and any(edge in self.sizes for edge in edges)
            if came_empty and waiting[number].name in _PLACE:
                found[number, 0] = 0.0  # no elements, in the midst of zeros
        return found

    def origin(self, leaf: int, *, zero: bool) -> Origin | None:
        """Return where a leaf's gradient first became zero, or not finite.

        Args:
            leaf: ``id`` of the leaf.
            zero: Look for zeros; otherwise for NaN and infinity.
        """
        if zero not in self._searches:
            self._searches[zero] = _Search(self, zero=zero)
        return self._searches[zero].origin(leaf)

    def emptier(self, number: int) -> int | None:
        """Return the node that made the zeros of which a concatenation handed out one piece alone."""
        if not self.nodes[number].hands_out:
            return None
        seen, todo, weak = {number}, [number], None
        while todo:
            for upper, position in self._edges_above().get(todo.pop(0), ()):
                if upper in seen:
                    continue
                seen.add(upper)
                todo.append(upper)
                if (upper, position) not in self.emptied or self.nodes[upper].tag < 0:
                    continue
                if self.nodes[upper].name not in _SATURATE:
                    return upper
                weak = upper if weak is None else weak
        return weak


class _Search:
    """The search for the origins of bad gradients in one pass."""

    def __init__(self, passed: Passed, *, zero: bool) -> None:
        self._passed, self._zero = passed, zero
        self._bad = _is_zero if zero else _is_nonfinite
        self._incoming: dict[int, list[float]] = {}
        self._edges: dict[int, list[tuple[int, float]]] = {}
        for (number, position), size in {**passed.sizes, **passed.handed_on()}.items():
            child = passed.nodes[number].children[position]
            self._incoming.setdefault(child, []).append(size)
            self._edges.setdefault(child, []).append((number, size))
        self._leaves: dict[int | None, list[int]] = {}
        for number, node in enumerate(passed.nodes):
            self._leaves.setdefault(node.leaf, []).append(number)
        self._known: dict[int, tuple[float, Origin | None]] = {}
        """For each node that was looked at the nearest origin above it, and how many nodes away that is."""

    def origin(self, leaf: int) -> Origin | None:
        """Return where a leaf's gradient first became bad: each node is passed once, however many leaves ask."""
        found = map(self._nearest, self._leaves.get(leaf, ()))
        return min(found, key=lambda pair: pair[0], default=(math.inf, None))[1]

    def _nearest(self, start: int) -> tuple[float, Origin | None]:
        todo = [start]
        while todo:
            number = todo[-1]
            here = self._at(number)
            direct, above = (here, []) if here is not None else self._above(number)
            unknown = [parent for parent in above if parent not in self._known]
            if direct is None and unknown:
                todo += unknown
                continue
            todo.pop()
            found: list[tuple[float, Origin | None]] = [(0.0, direct)] if direct else []
            found += [(self._known[p][0] + 1, self._known[p][1]) for p in above if direct is None]
            self._known[number] = min(found, key=lambda pair: pair[0], default=(math.inf, None))
        return self._known[start]

    def _at(self, number: int) -> Origin | None:
        """Tell whether what came to a node was well in its parts, and bad where it arrived."""
        above = self._edges.get(number, [])
        nodes = self._passed.nodes
        # Zero in all though not one by one: they cancel where the last of them was computed.
        whole = [p for p, size in above if self._zero and size > 0.0 and math.isfinite(size)]
        if len(whole) > 1:
            return Origin(max(nodes[parent].tag for parent in whole), cancelled=True)
        is_bad = self._bad(self._passed.totals.get(number, 1.0))
        if above and is_bad and not any(self._bad(size) for _, size in above):
            return Origin(nodes[number].tag, hooked=True)
        return None

    def _above(self, number: int) -> tuple[Origin | None, list[int]]:
        """Return the origin right above a node, or else the nodes that had got the bad gradient from further above."""
        further = []
        for parent, size in self._edges.get(number, ()):
            if not self._bad(size):
                continue
            arrived = self._incoming.get(parent, [])
            worst = (all if self._zero else any)(map(self._bad, arrived))
            if arrived and (worst or self._bad(self._passed.totals.get(parent, 1.0))):
                further.append(parent)
            elif self._passed.nodes[parent].tag >= 0:
                source = self._passed.emptier(parent) if self._zero else None
                return Origin(self._passed.nodes[parent if source is None else source].tag), []
        return None, further


_HAND_OUT = frozenset(["CatBackward0", "StackBackward0", "BlockDiagBackward0"])
_SATURATE = frozenset(
    f"{name}Backward{number}"
    for name in ("Relu", "Clamp", "ClampMin", "ClampMax", "Hardtanh", "NativeDropout", "Threshold")
    for number in range(2)
)
_MIX = {"ConvolutionBackward0": 1} | {
    f"{name}Backward0": -1 for name in ("Mm", "Addmm", "Bmm", "Baddbmm", "Mv", "Addmv", "Dot")
}
"""Operations that mix the elements along a dimension, with that dimension."""
_EMPTY = (_SATURATE | _MIX.keys()) | frozenset(
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
_ACCUMULATES = "torch::autograd::AccumulateGrad"
_HAND_ON = frozenset(
    f"{name}Backward{number}"
    for name in "T View UnsafeView ReshapeAlias Transpose Permute Unsqueeze Squeeze Alias Clone".split()  # noqa: SIM905
    for number in range(3)
)
_PLACE = frozenset(
    f"{name}Backward{number}"
    for name in ("Select", "Slice", "Split", "SplitWithSizes", "Unbind")
    for number in range(2)
)
"""Operations whose backward puts what it gets into the midst of zeros: to read it all tells nothing more."""
_UNOBSERVED = _HAND_ON | {_ACCUMULATES}
"""Nodes that get no hook in any pass."""


def _is_zero(size: float) -> bool:
    return size == 0.0


def _is_nonfinite(size: float) -> bool:
    return not math.isfinite(size)


def walk(roots: Iterable[Tensor], tag_key: str) -> tuple[list[Node], list[Any]]:
    """Return the graph above ``roots`` as plain nodes, and the autograd nodes beside them.

    A node without a number of its own belongs to the operation through which it was reached: the
    inner nodes of a composite function.

    Args:
        roots: The tensors that a backward pass starts from.
        tag_key: Key of the forward operation's number in a node's metadata.

    Cost:
        One visit per node, about a microsecond each; no kernel.
    """
    found: list[Any] = []
    numbers: dict[Any, int] = {}
    inherited: list[int] = []
    plain: list[Node] = []
    for root in roots:
        if root.grad_fn is not None and root.grad_fn not in numbers:
            numbers[root.grad_fn] = len(found)
            found.append(root.grad_fn)
            inherited.append(TAG_UNKNOWN)
    number_of, add, inherit = numbers.get, found.append, inherited.append
    for node, handed_down in zip(found, inherited, strict=False):  # which grow
        tag = node.metadata.get(tag_key, handed_down)
        children = []
        for child, _ in node.next_functions:
            number = -1 if child is None else number_of(child)
            if number is None:
                number = numbers[child] = len(numbers)
                add(child)
                inherit(tag)
            children.append(number)
        name = node.name()
        leaf = id(node.variable) if name == _ACCUMULATES else None
        plain.append(Node(name, tag, tuple(children), leaf, isinstance(node, BackwardCFunction)))
    return plain, found


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
    passed.has_pieces = sizes and not _HAND_OUT.isdisjoint([node.name for node in passed.nodes])
    passed.unobserved = _UNOBSERVED if passed.has_pieces else _UNOBSERVED | _PLACE
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
