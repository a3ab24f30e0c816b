"""What the text of a class tells of a parameter that nothing read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradwatch import diagnose
from gradwatch._unread import passed_over
from gradwatch.report import Cause


class Net(nn.Module):
    """Two layers, of which some forwards use one."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)
        self.on = False


def notes_of(model):
    """Return the notes on what is unused, without places, but for the module that did not run."""
    with diagnose(model) as diagnosis:
        model(torch.ones(1, 2)).sum().backward()
    found = [d for d in diagnosis.report.diagnoses if d.cause is Cause.UNUSED]
    assert [d.site for d in found] == [None] * len(found)
    return [without_place(note) for d in found for note in d.notes if "did not run" not in note]


def without_place(note):
    """Return a note with the file and the line of a place taken out."""
    before, _, after = note.partition("test_unread.py:")
    return before.rpartition(" ")[0] + after.lstrip("0123456789)") if after else note


def test_an_attribute_that_nothing_reads():
    """A module of which only the making stands in the class is said to be read by nothing, and where it is made."""

    class Forgotten(Net):
        def forward(self, x):
            return self.head(x)

    assert notes_of(Forgotten()) == [
        "nothing in `Forgotten` reads `self.enc`, made at: `self.enc = nn.Linear(2, 2)`"
    ]


def test_conditions_under_which_it_is_read():
    """The tests around a read, and those that return before it, are named, each as it must turn out."""

    class IfOn(Net):
        def forward(self, x):
            if self.on:
                x = self.enc(x)
            return self.head(x)

    class ElseBranch(Net):
        def forward(self, x):
            return self.head(x if not self.on else self.enc(x))

    class ReturnsBefore(Net):
        def forward(self, x):
            if x.shape[0] < 8 or not self.training:
                return self.head(x)
            return self.head(self.enc(x))

    class Behind(Net):
        def forward(self, x):
            h = self.on and self.training and self.enc(x)
            return self.head(x) + (h or 0)

    assert [notes_of(cls()) for cls in (IfOn, ElseBranch, ReturnsBefore, Behind)] == [
        ["`IfOn` reads `self.enc` only in `forward` if `self.on`"],
        ["`ElseBranch` reads `self.enc` only in `forward` if `self.on`"],
        ["`ReturnsBefore` reads `self.enc` only in `forward` if `not (x.shape[0] < 8 or not self.training)`"],
        ["`Behind` reads `self.enc` only in `forward` if `self.on` and `self.training`"],
    ]  # fmt: skip


def test_another_method_that_reads_it():
    """A parameter of a module that ran is said to be read by the method that did not."""

    class OtherMethod(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return x * self.scale

        def shifted(self, x):
            return self(x) + self.shift

    assert notes_of(OtherMethod()) == [
        "the model itself ran, and no operation read it",
        "`OtherMethod` reads `self.shift` only in `shifted`",
    ]


def test_a_file_with_the_name_of_a_standard_module():
    """The text of a class counts also where its module is called like one of Python's own."""

    class InCode(Net):
        __module__ = "code"

        def forward(self, x):
            return self.head(self.enc(x) if self.on else x)

    assert notes_of(InCode()) == ["`InCode` reads `self.enc` only in `forward` if `self.on`"]


def test_silence_where_the_text_does_not_explain():
    """Nothing is said of the text where `forward` does read it, or may reach it by a name, or another class does."""

    class HeldInAVariable(Net):
        def forward(self, x):
            first = self.enc
            return self.head(first(x) if self.on else x)

    class ByName(Net):
        def forward(self, x):
            chosen = "enc" if self.on else "head"
            return getattr(self, chosen)(x)

    class Child(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return super().forward(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.on = ReadFromOutside(), False

        def forward(self, x):
            return self.net(self.net.outside(x) if self.on else x)

    class ReadFromOutside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outside = nn.Linear(2, 2)
            self.head = nn.Linear(2, 2)

        def forward(self, x):
            return self.head(x)

    models = (HeldInAVariable(), ByName(), Child(), Outer())
    assert [notes_of(model) for model in models] == [[], [], [], []]


def with_a_default(x, scale, *, bias=None, unused=1):  # noqa: ARG001
    if bias is not None:
        x = x + bias
    return x * scale


def in_one_branch(x, ids=None):
    h = ids if ids is not None else x
    return h * 2


def in_both_branches(x, scale):
    return x * scale if x.dim() else scale


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (with_a_default.__code__, ("unused", 0, ())),
        (in_one_branch.__code__, ("x", 1, ("not (ids is not None)",))),
        (in_both_branches.__code__, None),
        ((lambda x, y: x).__code__, None),
    ],
)
def test_an_argument_that_is_passed_over(code, expected):
    """What a function reads in every case is passed over by none; what it never reads, or in one branch, is named."""
    found = passed_over(code)

    assert (
        None
        if found is None
        else (found[0], found[1].line - code.co_firstlineno, found[1].conditions)
    ) == expected
