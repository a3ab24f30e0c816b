"""Diagnoses: causes, parameters and lines over the table in cases.py, and how they are grouped."""

from __future__ import annotations

import inspect

import pytest
import torch

from gradwatch import Status, diagnose
from tests import cases


def guilty_line(case):
    """Return the number of the line that is marked, None where there is none."""
    lines, first = inspect.getsourcelines(case)
    return next((first + i for i, line in enumerate(lines) if "# <- here" in line), None)


def run(case):
    torch.manual_seed(0)
    model = case()
    with diagnose(model) as diagnosis:
        model.backward(model(torch.randn(4, 3)))
    return diagnosis.report


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # torch says it in its way
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize("case", cases.all_cases(), ids=lambda case: case.__name__)
def test_every_case_gets_its_cause_parameters_and_line(case):
    """A diagnosis names the expected cause for the expected parameters, at the marked line."""
    report = run(case)

    found = {str(d.cause): d.parameters for d in report.diagnoses}
    missing = tuple(n for n, status in report.statuses.items() if status is Status.MISSING)
    assert case.expect == found
    assert tuple(name for names in case.expect.values() for name in names) == missing
    line = guilty_line(case)
    if line is not None:
        assert [line] == [d.site.line for d in report.diagnoses]
    if case.label is not None:
        assert any(case.label in note for d in report.diagnoses for note in d.notes)
