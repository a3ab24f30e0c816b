"""Errors of torch's: they pass through unchanged, with a note on the root cause's line and the way out."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradwatch import diagnose


class Net(nn.Module):
    """An encoder and a head; subclasses break something, at the line marked `# <- here`."""

    words: str
    """Part of torch's own message."""
    advice: str
    """Part of the way out."""
    steps = 1

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def run(self, x):
        self(x).backward()


class AllFrozen(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "leave `requires_grad` on"

    def __init__(self):
        super().__init__()
        for parameter in self.parameters():
            parameter.requires_grad = False  # <- here

    def forward(self, x):
        return self.head(self.enc(x)).mean()


class LossOfANumber(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "remove `.detach()`"

    def forward(self, x):
        out = self.head(self.enc(x)).detach()  # <- here
        return out.mean()


class ForwardWithoutGradient(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "gradient mode on"

    def forward(self, x):
        with torch.no_grad():
            h = self.enc(x)  # <- here
            return self.head(h).mean()


class SavedOutputChanged(Net):
    words = "modified by an inplace operation"
    advice = "in place of `x += y`"

    def forward(self, x):
        h = torch.sigmoid(self.enc(x))
        h += 1  # <- here
        return self.head(h).mean()


class SteppedTooEarly(Net):
    words = "modified by an inplace operation"
    advice = "compute the loss again"

    def forward(self, x):
        return self.head(torch.relu(self.enc(x))).mean()

    def run(self, x):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        early, late = self(x), self(x)
        early.backward()
        optimizer.step()  # <- here
        late.backward()


class KeptAcrossSteps(Net):
    words = "Trying to backward through the graph a second time"
    advice = "compute it anew"
    steps = 2

    def __init__(self):
        super().__init__()
        self.scaled = self.enc.weight.exp() * 2  # <- here

    def forward(self, x):
        return self.head(F.linear(x, self.scaled)).mean()


class BackwardTwice(Net):
    words = "Trying to backward through the graph a second time"
    advice = "retain_graph=True"

    def forward(self, x):
        return self.head(torch.sigmoid(self.enc(x))).mean()

    def run(self, x):
        loss = self(x)
        loss.backward()  # <- here
        loss.backward()


class LeafInPlace(Net):
    words = "a leaf Variable that requires grad"
    advice = "torch.no_grad()"

    def forward(self, x):
        self.enc.weight.add_(1)  # <- here
        return self.head(self.enc(x)).mean()


class IndexedScalar(Net):
    words = "invalid index of a 0-dim tensor"
    advice = ".item()"

    def forward(self, x):
        loss = self.head(self.enc(x)).mean()
        self.last = loss.data[0]  # <- here
        return loss


class NotAScalar(Net):
    words = "can be implicitly created only for scalar outputs"
    advice = ".mean()"

    def forward(self, x):
        return self.head(self.enc(x))

    def run(self, x):
        self(x).backward()  # <- here


class MadeInInferenceMode(Net):
    words = "Inference tensors cannot be saved for backward"
    advice = "torch.no_grad()"

    def forward(self, x):
        with torch.inference_mode():
            mask = torch.ones(3)
        return self.head(self.enc(x) * mask).mean()  # <- here


CASES = [value for value in globals().values() if isinstance(value, type) and value.__base__ is Net]


def guilty_line(case):
    lines, first = inspect.getsourcelines(case)
    return first + next(i for i, line in enumerate(lines) if "# <- here" in line)


def steps(case):
    torch.manual_seed(0)
    model = case()
    for _ in range(case.steps):
        with diagnose(model):
            model.run(torch.randn(4, 3))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_error_keeps_its_words_and_names_the_line_and_the_way_out(case):
    """The user's error passes through unchanged, with one note on the root cause."""
    with pytest.raises(RuntimeError if case is not IndexedScalar else IndexError) as caught:
        steps(case)

    (note,) = caught.value.__notes__
    assert case.words in str(caught.value)
    assert f"test_raised.py:{guilty_line(case)}" in note
    assert case.advice in note


def test_an_error_that_has_nothing_to_do_with_gradients_gets_no_note():
    """An exception of the user's own passes through without a word."""
    model = nn.Linear(3, 1)

    with pytest.raises(ValueError, match="mine") as caught, diagnose(model):
        model(torch.ones(1, 3))
        raise ValueError("mine")

    assert getattr(caught.value, "__notes__", []) == []


def test_nested_diagnoses_add_one_note():
    """An error that passes through two `diagnose` blocks is explained once."""
    model = nn.Linear(3, 1)

    with pytest.raises(RuntimeError) as caught, diagnose(model), diagnose(model):
        model(torch.ones(2, 3)).backward()

    assert len(caught.value.__notes__) == 1
