"""Every operator of torch's own database: nothing changes under a trace, and what has no derivative is named."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from gradwatch import Cause, Status, diagnose

database = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations", exc_type=ImportError
)
UNDEFINED = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided"} | {
    "empty_permuted"
}
"""Operators whose results are whatever the memory held."""
NOT_A_DERIVATIVE = {"item", "allclose", "equal"}
"""Operators that return no tensor."""


class Operands(nn.Module):
    """The float tensors of a sample, as parameters."""

    def __init__(self, sample):
        super().__init__()
        self.kept = nn.ParameterList()
        self.input = self._leaf(sample.input)
        self.args = tuple(self._leaf(arg) for arg in sample.args)
        self.kwargs = {key: self._leaf(value) for key, value in sample.kwargs.items()}

    def _leaf(self, value):
        if isinstance(value, torch.Tensor) and value.dtype is torch.float32:
            self.kept.append(nn.Parameter(value.detach().clone()))
            return self.kept[-1]
        if type(value) in {list, tuple}:
            return type(value)(self._leaf(inner) for inner in value)
        return value


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors(inner)


def step(operator, operands):
    given = operands.input
    given = [t * 1 for t in given] if isinstance(given, (list, tuple)) else given * 1
    result = operator(given, *operands.args, **operands.kwargs)  # <- here
    loss = torch.zeros((), requires_grad=True) * 1
    for tensor in tensors(result):
        loss = loss + (tensor.abs() if tensor.is_complex() else tensor).float().sum()
    loss.backward()
    return list(tensors(result))


def guilty_line():
    lines, first = inspect.getsourcelines(step)
    return first + next(i for i, line in enumerate(lines) if "# <- here" in line)


def run(operator, sample, *, watched):
    torch.manual_seed(0)
    operands = Operands(sample)
    report = None
    if watched:
        with diagnose(operands) as diagnosis:
            result = step(operator, operands)
        report = diagnosis.report
    else:
        result = step(operator, operands)
    return [*result, *(p.grad for p in operands.kept), torch.get_rng_state()], report


def same(one, other):
    if one is None or other is None:
        return one is other
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if one.dtype is torch.complex32:  # has no comparison on the CPU
        one, other = one.to(torch.complex64), other.to(torch.complex64)
    both = [t.detach().resolve_conj().resolve_neg().contiguous() for t in (one, other)]
    bits = [t.flatten().view(torch.uint8) for t in both]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def name(operator):
    return f"{operator.name}.{operator.variant_test_name}".rstrip(".")


@pytest.mark.filterwarnings("ignore")  # whatever an operator has to say of itself
@pytest.mark.parametrize(
    "operator",
    # jiterator compiles for an accelerator alone
    [o for o in database.op_db if torch.float32 in o.dtypes and "jiterator" not in o.name],
    ids=name,
)
def test_an_operator_is_not_changed_and_not_mistaken(operator):
    """Results, gradients and random numbers are the same bits; without a derivative it is named so."""
    for sample in list(operator.sample_inputs("cpu", torch.float32))[:2]:
        try:
            plain, _ = run(operator, sample, watched=False)
        except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
            with pytest.raises(type(error)):
                run(operator, sample, watched=True)
            continue

        watched, report = run(operator, sample, watched=True)

        if operator.name not in UNDEFINED:
            assert [
                i for i, pair in enumerate(zip(plain, watched, strict=True)) if not same(*pair)
            ] == []
        missing = [n for n, status in report.statuses.items() if status is Status.MISSING]
        named = [d for d in report.diagnoses if d.status is Status.MISSING]
        assert sorted(missing) == sorted(n for d in named for n in d.parameters)
        causes = {Cause.NON_DIFFERENTIABLE, Cause.NOT_IN_LOSS, Cause.UNUSED}
        # What `item` gives is a number, out of which the loss is made.
        causes |= {Cause.LEFT_TORCH} if operator.name == "item" else set()
        assert {d.cause for d in named} <= causes
        if operator.name not in UNDEFINED | NOT_A_DERIVATIVE:
            lines = {d.site.line for d in named if d.cause is Cause.NON_DIFFERENTIABLE}
            assert lines <= {guilty_line()}
