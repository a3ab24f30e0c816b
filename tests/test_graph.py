"""The autograd graph: what it reaches, who withheld a gradient, and where one became zero or NaN."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from gradwatch._backward import _observe, _observe_both, _size, watched_backward
from gradwatch._graph import Origin, walk
from tests.cases import ReturnsNone

KEY = "test"


def tag(tensor, number):
    """Number a tensor's node as the trace does."""
    tensor.grad_fn.metadata[KEY] = number
    return tensor


def watched(loss, *, sizes=True):
    with watched_backward([loss], KEY, sizes=sizes) as passed:
        loss.backward()
    return passed


def test_the_walk_reaches_the_leaves_and_not_what_is_detached():
    """Leaves behind a detach are not reached; those on the path are, each once."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    nodes, _ = walk([(a * a + b.detach()).sum()], KEY)

    assert [node.leaf for node in nodes if node.leaf is not None] == [id(a)]


def test_inner_nodes_belong_to_the_operation_that_was_called():
    """A node without a number takes that of the node through which it was reached."""
    a = nn.Parameter(torch.ones(2))
    h = tag(a * 2, 1)
    loss = tag(torch.nn.functional.mse_loss(h.exp(), torch.zeros(2)), 2)

    nodes, _ = walk([loss], KEY)

    assert [(node.name, node.tag) for node in nodes if node.leaf is None] == [
        ("MseLossBackward0", 2),
        ("ExpBackward0", 2),
        ("MulBackward0", 1),
    ]


def test_a_function_that_returns_none_withholds():
    """The node that gave no gradient is named for the leaf behind it, and for no other."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    passed = watched(tag(ReturnsNone.apply(a * 1, b * 1), 5).sum(), sizes=False)

    assert [node.tag for node in passed.withholders(id(a))] == [5]
    assert passed.withholders(id(b)) == []


def test_nothing_is_delivered_behind_a_piece_that_got_no_gradient():
    """A slice whose gradient was withheld has handed on nothing, and one of no elements has handed on zeros."""
    a, b, c = (nn.Parameter(torch.ones(3, 2)) for _ in range(3))
    loss = ReturnsNone.apply(a[0] * 1, b[0] * 1).sum() + c[:0].sum()
    passed = watched(loss)

    assert [passed.delivered(id(leaf)) for leaf in (a, b, c)] == [False, True, True]


def test_a_gradient_that_several_nodes_hand_on_is_read_once(monkeypatch):
    """Of a sum, which hands the same gradient to both of its terms, one reading serves both."""
    read: list[torch.Size] = []

    def noted(gradient):
        read.append(gradient.shape)
        return _size(gradient)

    monkeypatch.setattr("gradwatch._backward._size", noted)
    a, b = nn.Parameter(torch.ones(100, 100)), nn.Parameter(torch.ones(100, 100))
    passed = watched((torch.tanh(a).t() + torch.tanh(b).t()).square().sum())

    (total,) = [n for n, node in enumerate(passed.nodes) if node.name == "AddBackward0"]
    assert passed.sizes[total, 0] == passed.sizes[total, 1] > 0.0
    assert len(read) == len(passed.sizes) - 1


def test_the_origin_of_a_zero_is_where_a_gradient_first_was_one():
    """Of several zeros on the path the one nearest the loss is the origin."""
    a = nn.Parameter(torch.ones(2))
    loss = tag(tag(tag(a * 1, 1) * 0, 2).exp(), 3).sum()

    assert watched(loss).origin(id(a), zero=True) == Origin(2)


def test_the_origin_of_a_nan_is_where_a_finite_gradient_became_one():
    """The square root at zero is the origin, not what its NaN passes through."""
    a = nn.Parameter(torch.zeros(2))
    loss = tag(tag(tag(a * 1, 1).sqrt(), 2) * 0, 3).sum()

    assert watched(loss).origin(id(a), zero=False) == Origin(2)


def test_a_good_gradient_has_no_origin():
    """Nothing is found where nothing is wrong."""
    a = nn.Parameter(torch.ones(2))
    passed = watched(tag((a * 2).sum(), 1))

    assert [passed.origin(id(a), zero=zero) for zero in (True, False)] == [None, None]


def test_an_empty_selection_is_the_origin_of_its_zeros():
    """Selecting nothing gives an empty gradient, which is not a zero one."""
    a = nn.Parameter(torch.ones(3))
    loss = tag(tag(a * 1, 1)[torch.zeros(3, dtype=torch.bool)], 2).sum()

    assert watched(loss).origin(id(a), zero=True) == Origin(2)


def test_a_sparse_gradient_without_entries_is_zero():
    """Rows that padding alone selects give a sparse gradient with nothing in it, which is a zero."""
    table = nn.Embedding(4, 2, sparse=True, padding_idx=0)
    passed = watched(tag(table(torch.tensor([0, 0])), 1).sum())

    assert passed.origin(id(table.weight), zero=True) == Origin(1)


def test_gradients_that_cancel_have_their_origin_where_the_last_was_computed():
    """Two gradients that add up to zero, on the way or at the parameter, are led back to what made them."""
    a = nn.Parameter(torch.ones(2))
    at_the_end = watched(tag(tag(a * 3, 1) - tag(a * 3, 2), 3).sum())
    h = tag(a * 2, 1)
    on_the_way = watched(tag(tag(5 - h, 2) + h, 3).sum())

    assert at_the_end.origin(id(a), zero=True) == Origin(2, cancelled=True)
    assert on_the_way.origin(id(a), zero=True) == Origin(3, cancelled=True)


def test_a_piece_of_zeros_is_led_back_to_what_left_it_out():
    """A concatenation hands out what it gets; the slice, the mask or the ReLU behind it made the zeros."""
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    joined = tag(torch.cat([a * 1, b * 1]), 1)
    sliced = watched(tag(tag(joined.tanh(), 2)[:2], 3).sum())
    stacked = tag(torch.stack([a * 1, b * -1, c * -2]), 1)
    rectified = watched(tag(stacked.relu(), 2).sum())
    halves = tag(tag(torch.stack([a * 1, b * 1]), 1).relu(), 2)
    chosen = watched(tag(halves[0], 3).sum())
    kept = watched(tag(torch.cat([a * 1, b * 1]), 1).sum())

    assert [sliced.origin(id(leaf), zero=True) for leaf in (a, b)] == [None, Origin(3)]
    assert [rectified.origin(id(leaf), zero=True) for leaf in (a, b, c)] == [
        None,
        Origin(2),
        Origin(2),
    ]
    assert chosen.origin(id(b), zero=True) == Origin(3)
    assert kept.emptied == set()


def test_a_product_that_makes_a_piece_zero_is_told_from_the_relu_above_it():
    """A matrix with a column of zeros empties a piece, whatever zeros a ReLU or a slice behind it adds."""
    a, b = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    weight = torch.tensor([[1.0, -1, 0, 0], [2, 3, 0, 0], [-1, 1, 0, 0]])
    joined = tag(torch.cat([a * 1, b * 1], 1), 1)
    mixed = tag(nn.functional.linear(joined, weight), 2)
    passed = watched(tag(tag(mixed.relu(), 3)[:2], 4).sum())

    assert passed.origin(id(b), zero=True) == Origin(2)


def test_rows_that_a_loss_leaves_out_are_zeros_of_the_loss():
    """Where `ignore_index` leaves out all rows of one piece, the loss is named and not the concatenation."""
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    rows = tag(torch.cat([a * 1, b * 1]), 1)
    target = torch.tensor([0, 1, -100, -100])
    passed = watched(tag(nn.functional.cross_entropy(rows, target, ignore_index=-100), 2))

    assert passed.origin(id(b), zero=True) == Origin(2)


def test_sparse_and_complex_gradients_are_measured():
    """Gradients of embeddings and of complex parameters have a size too."""
    table = nn.Embedding(4, 2, sparse=True)
    z = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
    loss = tag(table(torch.tensor([1])).sum() + z.abs().sum(), 1)

    passed = watched(loss)

    assert passed.broken is None
    assert all(size > 0 for size in passed.sizes.values())


def test_no_hook_stays_on_the_graph():
    """A second pass over a retained graph is not observed any more."""
    a = nn.Parameter(torch.ones(2))
    loss = (a * 2).sum()
    with watched_backward([loss], KEY, sizes=True) as passed:
        loss.backward(retain_graph=True)
    before = dict(passed.sizes)
    loss.backward()

    assert passed.sizes == before


def test_a_size_tells_zeros_and_what_is_not_finite_in_every_order_of_memory():
    """Zeros alone are 0, NaN and infinity stay, nothing is negative, and everything else is positive."""
    matrix = torch.tensor([[1.0, -7.0, 2.0], [3.0, 0.0, 5.0]])
    big = torch.zeros(100, 100)
    big[-1, -1] = -1e-30
    positive = {
        "expanded": torch.tensor([-2.0, 1.0]).expand(3, 2),
        "transposed": matrix.t(),
        "sliced": matrix[:, ::2],
        "of numbers that cancel": torch.tensor([3.0, -3.0]),
        "of one number": torch.tensor(-3.0).expand(100, 100),
        "tiny": torch.tensor([0.0, -1e-30]),
        "huge": torch.tensor([3e38, 3e38]),
        "half": torch.tensor([6e4, 6e4], dtype=torch.float16),
        "large, transposed, and nearly zero": big.t(),
        "large and huge": torch.full((100, 100), 3e38),
        "large, sliced, and cancelling": torch.ones(200, 100)[::2]
        * torch.tensor([1.0, -1.0]).repeat(50),
    }
    others = {
        "infinite": torch.tensor([1.0, -torch.inf]),
        "large and infinite": torch.ones(100, 100).index_fill(0, torch.tensor(7), torch.inf).t(),
        "large and zero": torch.zeros(100, 100).t(),
        "empty": torch.zeros(0),
        "zero": torch.zeros(3, 2).t(),
        "negative zero": torch.tensor([-0.0, 0.0]),
    }

    assert [name for name, g in positive.items() if not 0 < _size(g) < math.inf] == []
    assert {name: _size(g) for name, g in others.items()} == {
        "infinite": math.inf,
        "large and infinite": math.inf,
        "large and zero": 0.0,
        "empty": -1.0,
        "zero": 0.0,
        "negative zero": 0.0,
    }
    assert math.isnan(_size(torch.tensor([math.nan, 1.0])))


def test_a_zero_that_views_hand_on_is_followed_through_them():
    """Views are not observed, and the origin of what they hand on is found all the same."""
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    h = tag((tag(a * 1, 1) * 0), 2).t().unsqueeze(0).transpose(1, 2).view(6)
    kept = tag(b * 2, 3).t().reshape(6)
    passed = watched((h + kept).view(2, 3).sum())

    assert [passed.origin(id(leaf), zero=True) for leaf in (a, b)] == [Origin(2), None]


GRAPHS = {
    "chain": lambda w: (w * 2).tanh().exp().sin().mean(),
    "residual": lambda w: (w + (w * 2).relu() * (w * 3).sigmoid()).sum(),
    "pieces": lambda w: torch.cat([piece.tanh() for piece in w.split(1)]).square().sum(),
    "views": lambda w: (w.t().reshape(-1)[None].squeeze(0) * 2).exp().log().sum(),
    "two results": lambda w: sum(part.exp().sum() for part in (*w.topk(2)[:1], w.max(0).values)),
    "custom": lambda w: ReturnsNone.apply((w * 2).exp().sin(), (w * 3).exp()).cos().sum(),
    "saturated": lambda w: (w * 0.0).exp().clamp(2, 3).tanh().sum(),
    "attention": lambda w: nn.functional.scaled_dot_product_attention(
        w[None], w[None] * 2, w[None]
    ).sum(),
    "convolution": lambda w: (
        nn.functional.conv1d(w[None] * 1, w[:, :, None] * 1).relu().exp().sum()
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_a_node_without_a_hook_hands_on_is_seen_by_the_one_below(name):
    """Fewer hooks tell the same sizes, on every edge of graphs of all shapes, as one on every node."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(3, 3))
    seen = []
    for hooked in (False, True):
        loss = GRAPHS[name](w)
        with watched_backward([loss], KEY, sizes=True, hooked=hooked) as passed:
            loss.backward()
        seen.append((passed.sizes, passed.withheld, passed.emptied))

    assert len(seen[0][0]) > 2
    assert seen[0] == seen[1]


def test_a_chain_needs_a_hook_on_every_other_node():
    """Of ten operations in a row five are hooked, which is what makes a traced step cheap."""
    w = nn.Parameter(torch.ones(2))
    h = w * 2
    for _ in range(9):
        h = h * 2
    calls = []

    def count(frame, event, _):
        if event == "call" and frame.f_code in {_observe.__code__, _observe_both.__code__}:
            calls.append(frame)

    with watched_backward([h], KEY, sizes=True):
        sys.setprofile(count)
        h.backward(torch.ones(2))
        sys.setprofile(None)

    assert (len(calls), w.grad.tolist()) == (5, [1024.0, 1024.0])
