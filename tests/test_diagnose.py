"""Diagnoses: causes, parameters and lines over the table in cases.py, and how they are grouped."""

from __future__ import annotations

import importlib
import inspect
import threading

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from gradwatch import Cause, Status, diagnose
from gradwatch.report import Severity
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


class Origin(nn.Module):
    """An encoder whose gradient goes wrong at the marked line, and a head that is well."""

    status = Status.ZERO

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(x).mean() + self.part(self.enc(x))

    def part(self, h):
        """Return the term of the loss whose gradient goes wrong."""
        raise NotImplementedError


class MaskedByAHook(Origin):
    """Between two nodes that are well, a hook makes zeros of the gradient."""

    def part(self, h):
        h = h * 2
        h.register_hook(lambda gradient: gradient * 0)  # <- here
        return h.mean()


class MaskedByAHookOnAParameter(Origin):
    def __init__(self):
        super().__init__()
        for parameter in self.enc.parameters():
            parameter.register_hook(lambda gradient: gradient * 0)  # <- here

    def part(self, h):
        return h.mean()


class BlownUpByAHook(Origin):
    status = Status.NONFINITE

    def part(self, h):
        h = h * 2
        h.register_hook(lambda gradient: gradient / 0)  # <- here
        return h.mean()


class NormInAScript(Origin):
    status = Status.NONFINITE

    def __init__(self):
        super().__init__()
        self.size = torch.jit.script(Size())

    def part(self, h):
        return self.size(h * 0).sum()  # <- here


class Size(nn.Module):
    def forward(self, x):
        return x.square().sum(1).sqrt()


class DeadRelu(Origin):
    def part(self, h):
        return torch.relu(h - 100).mean()  # <- here


class Saturated(Origin):
    def part(self, h):
        return h.clamp(90, 100).mean()  # <- here


class Rounded(Origin):
    def part(self, h):
        return (h * 2).round().mean()  # <- here


class Sign(Origin):
    def part(self, h):
        return torch.sign(h).mean()  # <- here


class Floored(Origin):
    def part(self, h):
        return h.floor().mean()  # <- here


class TimesZero(Origin):
    def part(self, h):
        return 0.0 * h.mean()  # <- here


class Masked(Origin):
    def part(self, h):
        return (h.exp() * torch.zeros(4, 3)).sum()  # <- here


class Overwritten(Origin):
    def part(self, h):
        h = h * 2
        h[:] = 1.0  # <- here
        return h.mean()


class EmptySelection(Origin):
    def part(self, h):
        return h[h > 1e6].sum()  # <- here


class NotFinite(Origin):
    status = Status.NONFINITE


class RootOfZero(NotFinite):
    def part(self, h):
        return (h * 0).sqrt().sum()  # <- here


class NormOfZero(NotFinite):
    def part(self, h):
        return (h - h.detach()).pow(2).sum(1).sqrt().sum()  # <- here


class LogOfZero(NotFinite):
    def part(self, h):
        return (h * 0).log().sum()  # <- here


class ZeroByZeroBehindWhere(NotFinite):
    def part(self, h):
        zero = h - h.detach()
        ratio = zero / zero.abs()  # <- here
        return torch.where(zero > 0, ratio, zero).sum()


class RowMaskedCompletely(NotFinite):
    def part(self, h):
        scores = h.masked_fill(torch.ones(4, 3, dtype=torch.bool), float("-inf"))
        weights = scores.softmax(1) * h  # <- here
        return weights.nan_to_num(0).sum()


class DividedByACountOfZero(NotFinite):
    def part(self, h):
        return (h * 0).sum() / torch.zeros(())  # <- here


ORIGINS = [
    value
    for value in globals().values()
    if isinstance(value, type) and issubclass(value, Origin) and value not in {Origin, NotFinite}
]


@pytest.mark.parametrize("case", ORIGINS, ids=lambda case: case.__name__)
def test_a_zero_or_a_nan_is_traced_to_the_expression_that_made_it(case):
    """The status is right, and the site is the forward expression whose backward made it so."""
    torch.manual_seed(0)
    model = case()

    with diagnose(model) as diagnosis:
        model(torch.randn(4, 3)).backward()

    zero = case.status is Status.ZERO
    (found,) = diagnosis.report.diagnoses
    assert list(diagnosis.report.statuses.values()) == [case.status] * 2 + [Status.OK] * 2
    assert found.cause is (Cause.ZERO_GRADIENT if zero else Cause.NONFINITE_GRADIENT)
    assert found.severity is (Severity.NOTE if zero else Severity.WARNING)
    assert found.parameters == ("enc.weight", "enc.bias")
    assert found.site is not None
    assert found.site.line == guilty_line(case)


class InsideACheckpoint(Origin):
    status = Status.NONFINITE

    def forward(self, x):
        part = torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=True)  # <- here
        return self.head(x.detach()).mean() + part

    def part(self, x):
        return (self.enc(x) * 0).sqrt().sum()


def test_what_goes_wrong_inside_of_a_reentrant_checkpoint_is_the_checkpoints():
    """The graph that a checkpoint runs in backward is never seen: its call is the site."""
    model = InsideACheckpoint()

    with diagnose(model) as diagnosis:
        model(torch.randn(4, 3).requires_grad_()).backward()

    (found,) = diagnosis.report.diagnoses
    assert (found.cause, found.site.line) == (
        Cause.NONFINITE_GRADIENT,
        guilty_line(InsideACheckpoint),
    )


def test_a_gradient_zeroed_by_hand_is_traced_to_that_statement():
    """A hook-free `p.grad.mul_(0)` after backward is the origin of the zeros."""
    model = nn.Linear(3, 1)

    with diagnose(model) as diagnosis:
        model(torch.ones(2, 3)).mean().backward()
        model.weight.grad.mul_(0)
        line = inspect.currentframe().f_lineno - 1

    (found,) = diagnosis.report.diagnoses
    assert (found.cause, found.parameters, found.site.line) == (
        Cause.ZERO_GRADIENT,
        ("weight",),
        line,
    )


def test_diagnoses_are_grouped_and_the_costliest_comes_first():
    """One diagnosis per cause and site holds all its parameters; the one with most elements leads."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = (
                nn.Linear(3, 3),
                nn.Sequential(nn.Linear(3, 50), nn.Linear(50, 3)),
            )
            self.head = nn.Linear(3, 1)

        def forward(self, x):
            a = self.small(x).detach()
            b = self.large(x).detach()
            return self.head(a + b).mean()

    model = Model()
    with diagnose(model) as diagnosis:
        model(torch.ones(2, 3)).backward()

    assert [d.parameters for d in diagnosis.report.diagnoses] == [
        ("large.0.weight", "large.0.bias", "large.1.weight", "large.1.bias"),
        ("small.weight", "small.bias"),
    ]


def test_several_cuts_are_one_diagnosis_with_the_others_as_notes():
    """The cut whose value joins the loss last is named, and the other is a note."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            h = self.enc(x)
            constant = h.argmax(1).float().mean()
            return self.head(h.detach()).mean() + constant

    model = Model()
    with diagnose(model) as diagnosis:
        model(torch.ones(2, 3)).backward()

    (found,) = diagnosis.report.diagnoses
    assert found.cause is Cause.NON_DIFFERENTIABLE
    assert any("detached" in note for note in found.notes)


def test_a_module_that_ran_on_another_thread_is_undetermined():
    """Operations of another thread are not seen, and no cause is made up for them."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 1)})
    x, seen = torch.ones(2, 3), []

    def work():
        with torch.no_grad():
            seen.append(model["a"](x))

    with diagnose(model) as diagnosis:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        model["b"](seen[0]).mean().backward()

    (found,) = diagnosis.report.diagnoses
    assert (found.cause, found.parameters) == (Cause.UNDETERMINED, ("a.weight", "a.bias"))
    assert found.notes[0] == "module `a` ran on another thread, where operations are not seen"


def test_values_inside_of_functorch_are_undetermined():
    """What `torch.func` wraps cannot be followed, and no cause is made up for it."""
    model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    copies = {name: p.detach() for name, p in model["a"].named_parameters()}
    x = torch.ones(2, 3)

    def loss(parameters):
        return torch.func.functional_call(model["a"], parameters, (x,)).sum()

    with diagnose(model) as diagnosis:
        slopes = torch.func.grad(loss)(copies)
        (model["b"](x).mean() + slopes["bias"].sum()).backward()

    (found,) = diagnosis.report.diagnoses
    assert (found.cause, found.parameters) == (Cause.UNDETERMINED, ("a.weight", "a.bias"))


@torch.jit.script
def scripted_cut(x):
    """Cut a value off where nothing is seen of it."""
    return x.detach() * 2


@torch.jit.script
def scripted(x):
    return x * 2


def mapped_cut(x):
    return torch.vmap(lambda row: row.detach() * 2)(x)


def mapped(x):
    return torch.vmap(lambda row: row * 2)(x)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach() * 2


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


class Between(nn.Module):
    """Two layers with something between them that cannot be seen into."""

    def __init__(self, between):
        super().__init__()
        self.a, self.between, self.b = nn.Linear(3, 3), between, nn.Linear(3, 1)

    def forward(self, x):
        h = self.between(self.a(x))
        return self.b(h)


@pytest.mark.parametrize(
    ("sick", "healthy"),
    [
        (scripted_cut, scripted),
        (torch.jit.script(Detached()), torch.jit.script(Doubled())),
        (
            torch.jit.trace(Detached(), torch.ones(2, 3)),
            torch.jit.trace(Doubled(), torch.ones(2, 3)),
        ),
        (mapped_cut, mapped),
    ],
    ids=["scripted function", "scripted module", "traced module", "vmap"],
)
def test_a_cut_out_of_sight_is_undetermined(sick, healthy):
    """No cause is made up for what was cut inside of TorchScript or `torch.func`; what is whole there is silent."""
    found = {}
    for between in (sick, healthy):
        model = Between(between)
        with diagnose(model) as diagnosis:
            model(torch.ones(2, 3)).mean().backward()
        found[between] = [(d.cause, d.parameters) for d in diagnosis.report.diagnoses]

    assert found == {sick: [(Cause.UNDETERMINED, ("a.weight", "a.bias"))], healthy: []}


def test_a_parameter_given_to_a_scripted_function_is_not_called_unused():
    """What only TorchScript reads may have been used there."""
    model = nn.ParameterDict({"seen": torch.ones(2), "hidden": torch.ones(2)})

    with diagnose(model) as diagnosis:
        (model["seen"] * scripted_cut(model["hidden"])).sum().backward()

    (found,) = diagnosis.report.diagnoses
    assert (found.cause, found.parameters) == (Cause.UNDETERMINED, ("hidden",))
    assert found.notes[0].startswith("what runs inside of TorchScript is not seen (")


def test_a_dropped_result_beside_torchscript_is_not_in_loss():
    """A function of TorchScript elsewhere in the program takes nothing from a cause that was seen."""
    model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})

    with diagnose(model) as diagnosis:
        model["a"](torch.ones(2, 3))
        scripted(model["b"](torch.ones(2, 3))).mean().backward()

    assert [(d.cause, d.parameters) for d in diagnosis.report.diagnoses] == [
        (Cause.NOT_IN_LOSS, ("a.weight", "a.bias"))
    ]


def test_gradients_taken_by_an_optimizer_in_backward_are_unseen():
    """An optimizer that steps inside of backward leaves nothing to judge, which is no fault."""
    model = nn.Linear(3, 1)
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    with diagnose(model) as diagnosis:
        model(torch.ones(2, 3)).mean().backward()
    for handle in handles:
        handle.remove()

    assert list(diagnosis.report.statuses.values()) == [Status.UNSEEN] * 2
    assert diagnosis.report.diagnoses == ()


def test_a_library_between_is_shown_with_the_users_own_line(tmp_path, monkeypatch):
    """A cut inside of an installed package has the user's line as its caller."""
    package = tmp_path / "site-packages" / "somelib.py"
    package.parent.mkdir()
    package.write_text("def encode(layer, x):\n    return layer(x).detach()\n")
    monkeypatch.syspath_prepend(str(package.parent))
    somelib = importlib.import_module("somelib")

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    with diagnose(model) as diagnosis:
        h = somelib.encode(model[0], torch.ones(2, 3))
        line = inspect.currentframe().f_lineno - 1
        model[1](h).mean().backward()

    (found,) = diagnosis.report.diagnoses
    assert (found.site.file, found.site.line) == (str(package), 2)
    assert (found.site.caller.file, found.site.caller.line) == (__file__, line)


def test_code_typed_into_exec_has_a_line_and_no_snippet():
    """Code without a file is named as Python names it, and nothing crashes."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    text = "h = model[0](x).detach()\nloss = model[1](h).mean()\nloss.backward()"

    with diagnose(model) as diagnosis:
        exec(text, {"model": model, "x": torch.ones(2, 3)})  # noqa: S102 -- what is tested

    (found,) = diagnosis.report.diagnoses
    assert (found.cause, found.site.file, found.site.line) == (Cause.DETACHED, "<string>", 1)
    assert found.site.source is None


def chosen_by_an_index(model, x):
    losses = [model.head(x).mean(), model.head(x).square().mean(), model.head(x).abs().mean()]
    return losses[model.enc(x).mean(0).argmax()]


def chosen_in_a_branch(model, x):
    main, other = model.head(x).mean(), model.head(x).square().mean()
    if model.enc(x).mean() > -100:
        return main
    return other


def chosen_as_the_smaller(model, x):
    return min(model.head(x).mean(), model.enc(x).mean() + 100)


def stopped_at_a_guard(model, x):
    aux = model.enc(x).mean()
    if not torch.isfinite(aux):
        raise ValueError(aux)
    return model.head(x).mean()


def handed_on_with_a_metric(model, x):
    aux = model.enc(x).mean()
    return model.head(x).mean(), aux.item()


@pytest.mark.parametrize(
    ("loss_of", "cause"),
    [
        (chosen_by_an_index, Cause.NON_DIFFERENTIABLE),
        (chosen_in_a_branch, Cause.LEFT_TORCH),
        (chosen_as_the_smaller, Cause.LEFT_TORCH),
        (stopped_at_a_guard, Cause.NOT_IN_LOSS),
        (handed_on_with_a_metric, Cause.NOT_IN_LOSS),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_a_value_that_only_chose_the_loss_is_told_from_one_that_did_not(loss_of, cause):
    """Where no operation follows the choice, the loss itself is what was chosen."""
    torch.manual_seed(0)
    model = cases.Case()
    with diagnose(model) as diagnosis:
        loss = loss_of(model, torch.randn(4, 3))
        loss = loss[0] if isinstance(loss, tuple) else loss
        loss.backward()

    assert [(d.cause, d.parameters) for d in diagnosis.report.diagnoses] == [(cause, cases.ENC)]


class Switched(nn.Module):
    """An encoder that runs without gradients; the line that switches them off is marked."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def encoded(self, x):
        raise NotImplementedError

    def forward(self, x):
        with torch.no_grad():
            x = x - x.mean()
        out = self.head(self.encoded(x)).mean()
        torch.set_grad_enabled(True)
        return out


class ByWith(Switched):
    def encoded(self, x):
        with torch.no_grad():  # <- here
            x = x * 2
            return self.enc(x)


class ByDecorator(Switched):
    @torch.no_grad()  # <- here
    def encoded(self, x):
        return self.enc(x)


class ByAHelper(Switched):
    def prepared(self, x):
        torch.set_grad_enabled(False)  # <- here
        return x * 2

    def encoded(self, x):
        h = self.enc(self.prepared(x))
        torch.set_grad_enabled(True)
        return h


class ByInferenceMode(Switched):
    def encoded(self, x):
        with torch.inference_mode():  # <- here
            h = self.enc(x)
        return h.clone()


class ByAnInferenceModeAround(Switched):
    """The layers that run inside of a decorated function do not show the decorator."""

    @torch.inference_mode()  # <- here
    def inner(self, x):
        return self.body(x)

    def body(self, x):
        return self.enc(x)

    def encoded(self, x):
        return self.inner(x).clone()


@pytest.mark.parametrize(
    "kind", [ByWith, ByDecorator, ByAHelper, ByInferenceMode, ByAnInferenceModeAround]
)
def test_the_line_that_switched_gradients_off_is_named(kind):
    """Beside the operation a note names the switch; that of inference mode is found in the text."""
    (found,) = run_model(kind()).diagnoses

    line = guilty_line(kind)
    said = [note for note in found.notes if "switched off" in note]
    assert found.cause is Cause.NO_GRAD
    assert [f"test_diagnose.py:{line}: `" in note for note in said] == [True]


def run_model(model):
    with diagnose(model) as diagnosis:
        model(torch.randn(4, 3)).backward()
    return diagnosis.report
