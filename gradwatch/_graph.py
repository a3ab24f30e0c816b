"""The autograd graph of one backward pass: what it reaches, and where a gradient went wrong.

What this room knows that no other does: which leaves a backward pass from some roots would reach, which
node handed on no gradient at all (a custom Function that returned None), and at which node a good
gradient first became zero, NaN or infinite.

Limits: a graph inside a compiled region is one node; inside a reentrant checkpoint it does not exist
before backward runs. Hooks on nodes see what autograd hands on, not what is added up in a leaf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.autograd.function import BackwardCFunction

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

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
        return self.name in HAND_OUT


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
            if came_empty and waiting[number].name in PLACE:
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
                if self.nodes[upper].name not in SATURATE:
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


HAND_OUT = frozenset(["CatBackward0", "StackBackward0", "BlockDiagBackward0"])
"""Operations whose backward cuts what it gets into pieces."""
SATURATE = frozenset(
    f"{name}Backward{number}"
    for name in ("Relu", "Clamp", "ClampMin", "ClampMax", "Hardtanh", "NativeDropout", "Threshold")
    for number in range(2)
)
"""Operations whose derivative is zero for some inputs."""
ACCUMULATES = "torch::autograd::AccumulateGrad"
"""The name of the node that adds to a leaf's gradient."""
PLACE = frozenset(
    f"{name}Backward{number}"
    for name in ("Select", "Slice", "Split", "SplitWithSizes", "Unbind")
    for number in range(2)
)
"""Operations whose backward puts what it gets into the midst of zeros: to read it all tells nothing more."""


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
        leaf = id(node.variable) if name == ACCUMULATES else None
        plain.append(Node(name, tag, tuple(children), leaf, isinstance(node, BackwardCFunction)))
    return plain, found
