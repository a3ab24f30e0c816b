from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Cause, Status, diagnose


def guilty_line(owner: Any) -> int:
    """Return the line that is marked in the source."""
    lines, first = inspect.getsourcelines(owner)
    return first + next(i for i, line in enumerate(lines) if "# <- here" in line)


class Product(nn.Module):
    """The article's first example: the loss needs ``a`` and ``b``, and ``c`` stands beside."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))
        self.b = nn.Parameter(torch.tensor(3.0))
        self.c = nn.Parameter(torch.tensor(4.0))

    def forward(self) -> Tensor:
        intermediate = self.a * self.b
        return intermediate * intermediate


class Shifted(nn.Module):
    """The second: a parameter is changed in place before the loss is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self) -> Tensor:
        self.x.add_(torch.tensor([4.0, 5.0, 6.0]))  # <- here
        return torch.sum(self.x * self.x)


class ShiftedCopy(Shifted):
    """The way out of the second: the sum is a new tensor."""

    def forward(self) -> Tensor:
        x = self.x + torch.tensor([4.0, 5.0, 6.0])
        return torch.sum(x * x)


class Indexed(nn.Module):
    """The third: a product of two scalars is indexed when it has one element."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, y: Tensor) -> Tensor:
        product = y * self.w
        first = product[0] if product.numel() == 1 else product  # <- here
        return (torch.tensor(5.0) + first) ** 2


def test_a_parameter_that_the_loss_does_not_need_gets_none():
    """The first example: ``c`` gets None, the others their products, and the cause is that it is unused."""
    model = Product()
    with diagnose(model) as diagnosis:
        model().backward()

    (only,) = diagnosis.report.diagnoses
    assert [model.a.grad, model.b.grad, model.c.grad] == [36.0, 24.0, None]
    assert diagnosis.report.statuses == {"a": Status.OK, "b": Status.OK, "c": Status.MISSING}
    assert (only.cause, only.parameters) == (Cause.UNUSED, ("c",))


def test_an_in_place_change_of_a_leaf_raises():
    """The second example raises, where the article says it gives None without an error."""
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)

    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in"):
        x.add_(torch.tensor([4.0, 5.0, 6.0]))


def test_the_note_on_an_in_place_change_names_line_and_way_out():
    """Inside ``diagnose`` the second example's error says where it lies and what to write."""
    model = Shifted()
    with pytest.raises(RuntimeError, match="a leaf Variable") as caught, diagnose(model):
        model().backward()

    (note,) = caught.value.__notes__
    assert note.startswith("GradWatch: ")
    assert f"{Path(__file__).name}:{guilty_line(Shifted)}: `self.x.add_(" in note
    assert "write `x = x + y` in place of `x += y`" in note


def test_the_way_out_of_the_in_place_change_trains():
    """A sum that is a new tensor has the gradient that the second example wanted."""
    model = ShiftedCopy()
    with diagnose(model) as diagnosis:
        model().backward()

    assert model.x.grad is not None
    assert model.x.grad.tolist() == [10.0, 14.0, 18.0]
    assert diagnosis.report.diagnoses == ()


def test_an_index_into_a_scalar_raises():
    """The third example raises, where the article says that it gives a gradient."""
    product = torch.tensor(10.0, requires_grad=True) * torch.tensor(1.0, requires_grad=True)

    with pytest.raises(IndexError, match="invalid index of a 0-dim tensor"):
        product[0]


def test_the_note_on_an_index_into_a_scalar_names_line_and_way_out():
    """Inside ``diagnose`` the third example's error says where it lies and what to write."""
    model = Indexed()
    with pytest.raises(IndexError, match="0-dim tensor") as caught, diagnose(model):
        model(torch.tensor(10.0)).backward()

    (note,) = caught.value.__notes__
    assert note.startswith("GradWatch: ")
    assert f"{Path(__file__).name}:{guilty_line(Indexed)}: `first = product[0]" in note
    assert "read its number with `.item()`" in note


def test_an_index_into_more_than_a_scalar_keeps_the_gradient():
    """Indexing is differentiable in what is indexed: the article's claim to the contrary is wrong."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([1.0, 2.0]))})
    index = torch.tensor(1)
    with diagnose(model) as diagnosis:
        (model["w"] * 10.0)[index].backward()

    assert model["w"].grad is not None
    assert model["w"].grad.tolist() == [0.0, 10.0]
    assert diagnosis.report.diagnoses == ()
