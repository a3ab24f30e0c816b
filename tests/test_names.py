from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gradwatch._names import Owners, names_of, unwrap


class Pair(nn.Module):
    """Two layers, ``a`` and ``b``."""

    def __init__(self) -> None:
        super().__init__()
        self.a: Any = nn.Linear(2, 2)
        self.b: Any = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.a(x))


class Own(nn.Module):
    """A module of the user's own whose children have the names that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = nn.Linear(2, 2)
        self.module = nn.Linear(2, 2)


PAIR = ["a.weight", "a.bias", "b.weight", "b.bias"]


# ---- unwrap, names_of


def test_names_are_those_of_named_parameters():
    """A model without wrappers has the names, the order, and the objects torch gives it."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))

    names = names_of(model)

    assert list(names.parameters.items()) == list(model.named_parameters())
    assert list(names.modules.items()) == list(model.named_modules())
    assert names.aliases == {}


def test_tied_parameters_are_one():
    """A tied parameter stands once, under its first name, with all of its names as aliases."""
    model = Pair()
    model.b.weight = model.a.weight

    names = names_of(model)

    assert list(names.parameters) == ["a.weight", "a.bias", "b.bias"]
    assert names.aliases == {"a.weight": ("a.weight", "b.weight")}


def test_shared_modules_have_all_their_paths():
    """A module under two names has two paths, and its parameters the aliases of both."""
    model = Pair()
    model.b = model.a

    names = names_of(model)

    assert list(names.parameters) == ["a.weight", "a.bias"]
    assert names.aliases == {"a.weight": ("a.weight", "b.weight"), "a.bias": ("a.bias", "b.bias")}
    assert list(names.modules) == ["", "a", "b"]
    assert names.modules["b"] is model.a


def test_parameter_of_the_model_itself_has_a_plain_name():
    """A parameter of the root has no dot before its name."""
    model = nn.ParameterDict({"scale": nn.Parameter(torch.ones(1))})

    assert list(names_of(model).parameters) == ["scale"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: torch.compile(module, backend="eager"),
        nn.DataParallel,
        checkpoint_wrapper,
        lambda module: nn.DataParallel(checkpoint_wrapper(module)),
    ],
    ids=["torch.compile", "DataParallel", "checkpoint_wrapper", "two wrappers"],
)
def test_wrappers_leave_no_trace_in_names(wrap: Any):
    """What torch wraps around the model or a submodule does not show in any name."""
    inner, outer = Pair(), Pair()
    inner.a = wrap(inner.a)
    bare = inner.a

    names = names_of(inner)

    assert list(names.parameters) == PAIR
    assert list(names.modules) == ["", "a", "b"]
    assert names.modules["a"] is unwrap(bare)
    assert list(names_of(wrap(outer)).parameters) == PAIR


def test_own_modules_with_the_names_of_wrappers_keep_them():
    """Children that the user calls ``_orig_mod`` and ``module`` keep their names."""
    expected = ["_orig_mod.weight", "_orig_mod.bias", "module.weight", "module.bias"]
    as_dict = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2), "module": nn.Linear(2, 2)})

    assert list(names_of(Own()).parameters) == expected
    assert list(names_of(as_dict).parameters) == expected


def test_own_wrapper_inside_a_wrapper_keeps_its_names():
    """Only the wrapper of torch's is taken off, not a module of the user's with such a child."""
    names = names_of(nn.DataParallel(Own()))

    assert list(names.modules) == ["", "_orig_mod", "module"]


def test_a_module_that_holds_itself_is_entered_once():
    """A model with a cycle is walked to its end."""
    model = Pair()
    model.a.parent = model

    names = names_of(model)

    assert list(names.parameters) == PAIR
    assert list(names.modules) == ["", "a", "b"]


def test_a_wrapper_that_holds_nothing_is_a_module():
    """A module of torch's wrapper packages without anything inside is taken as it is."""
    module = type("Empty", (nn.Module,), {"__module__": "torch.distributed.mine"})()

    assert unwrap(module) is module


def test_child_that_is_none_is_passed_over():
    """A child registered as None has no name."""
    model = Pair()
    model.register_module("c", None)

    assert list(names_of(model).modules) == ["", "a", "b"]


# ---- Owners


def test_owners_tell_who_steps_what():
    """Each optimizer covers its own parameters, and those that none owns."""
    names = names_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)))
    first, second = (
        torch.optim.SGD([names.parameters[f"{i}.weight"], names.parameters[f"{i}.bias"]], 0.1)
        for i in (0, 1)
    )

    owners = Owners(names, [first, second])

    assert owners.known
    assert owners.orphans == ("2.weight",)
    assert owners.covered(first) == ("0.weight", "0.bias", "2.weight")
    assert owners.covered(second) == ("1.weight", "1.bias", "2.weight")
    assert [owners.position(o) for o in (first, second, None)] == [0, 1, 0]


def test_a_parameter_of_two_optimizers_is_covered_by_both():
    """A parameter that two optimizers step is spoken of in the steps of both."""
    names = names_of(nn.Linear(2, 2))
    both = [torch.optim.SGD(names.parameters.values(), 0.1) for _ in range(2)]

    owners = Owners(names, both)

    assert [owners.covered(o) for o in both] == [("weight", "bias")] * 2
    assert owners.orphans == ()


def test_all_parameters_are_covered_without_an_optimizer():
    """Without optimizers, and for one that is not known, a step speaks of every parameter."""
    names = names_of(nn.Linear(2, 2))

    owners = Owners(names, [])

    assert not owners.known
    assert owners.covered(None) == ("weight", "bias")
    assert not owners.changed()


@pytest.mark.parametrize(
    ("shapes", "dtype", "known"),
    [
        ([(6,)], torch.float32, False),
        ([(2, 2), (2,)], torch.float64, False),
        ([(2, 2), (2,)], torch.float32, True),
        ([(1,)], torch.float32, True),
        ([(3, 2), (3,)], torch.float32, True),
    ],
    ids=["flat", "master copies", "another copy", "another tensor", "a wider model"],
)
def test_what_optimizers_hold_in_place_of_the_parameters_tells_whose_they_are(shapes, dtype, known):
    """Copies of another type, or one flat copy, are kept on purpose; all else is of another model."""
    names = names_of(nn.Linear(2, 2))
    held = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = torch.optim.SGD(held, 0.1)

    owners = Owners(names, [optimizer])

    assert owners.known == known
    assert owners.covered(optimizer) == ("weight", "bias")


def test_groups_added_later_are_noticed():
    """Owners have changed once a group is added, and new owners know of it."""
    names = names_of(nn.Linear(2, 2))
    optimizer = torch.optim.SGD([names.parameters["weight"]], 0.1)
    owners = Owners(names, [optimizer])
    before = owners.changed()

    optimizer.add_param_group({"params": [names.parameters["bias"]]})

    assert (before, owners.changed()) == (False, True)
    assert Owners(names, [optimizer]).orphans == ()
