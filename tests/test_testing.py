"""Assertions over gradients: what fails a test, what does not, and that nothing stays behind."""

from __future__ import annotations

import doctest
import random

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import Cause, Config, ConfigError, diagnose, testing
from gradwatch.errors import GradWatchError
from gradwatch.rules import ContractEntry
from gradwatch.testing import assert_gradients, checked_pass

X = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.0, -1.0]])


class Healthy(nn.Module):
    """Every parameter gets a gradient."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def loss(self, x):
        return self.head(self.encoder(x)).square().mean()


class Detached(Healthy):
    """The encoder gets none."""

    def loss(self, x):
        return self.head(self.encoder(x).detach()).square().mean()


class LayerDrop(Healthy):
    """The encoder is left out at random."""

    def loss(self, x):
        return self.head(self.encoder(x) if torch.rand(()) < 0.5 else x).square().mean()


class Zero(Healthy):
    """The encoder gets zeros."""

    def loss(self, x):
        return (self.head(x) + 0.0 * self.encoder(x).sum()).mean()


class NotFinite(Healthy):
    """The encoder gets NaN."""

    def loss(self, x):
        return self.head(x).mean() + (self.encoder(x) * 0).sqrt().sum()


def failure(model, **options):
    """Return the message with which ``assert_gradients`` fails."""
    with pytest.raises(AssertionError) as raised:
        assert_gradients(model, model.loss, X, **options)
    return str(raised.value)


def counted(model):
    """Return the model's loss as a function, and a list that has an item for each call of it."""
    calls = []

    def loss(x):
        calls.append(x)
        return model.loss(x)

    return loss, calls


def entry(parameters, gradient, **more):
    return {"parameters": parameters, "gradient": gradient, **more}


# --- what fails ----------------------------------------------------------------------------------------


def test_healthy():
    """A model all of whose parameters get a gradient passes, in one pass."""
    model = Healthy()
    loss, calls = counted(model)

    assert_gradients(model, loss, X)

    assert len(calls) == 1


def test_missing():
    """The failure is the diagnosis: cause, line, and the way out, and that random numbers are not to blame."""
    lines = failure(Detached()).splitlines()

    assert lines[0] == "warning[detached]: `encoder.*` get no gradient"
    assert lines[3].endswith("return self.head(self.encoder(x).detach()).square().mean()")
    assert [line.strip() for line in lines[6:]] == [
        "= note: no other use of these parameters reaches the loss",
        "= note: no gradient arrived under any of 5 seeds",
        "= help: remove `.detach()` to train them, or freeze `encoder` with `requires_grad_(False)`",
        "= more: gradwatch explain detached",
    ]


def test_one_seed():
    """With one seed there is one pass, and the diagnosis says nothing of seeds."""
    model = Detached()
    loss, calls = counted(model)
    with pytest.raises(AssertionError) as raised:
        assert_gradients(model, loss, X, seeds=1)

    assert len(calls) == 1
    assert "seed" not in str(raised.value)


def test_zero():
    """A gradient of zero is no failure."""
    model = Zero()

    assert_gradients(model, model.loss, X)


def test_not_finite():
    """A gradient with NaN in it fails, with the expression it comes from."""
    text = failure(NotFinite())

    assert text.startswith(
        "warning[nonfinite_gradient]: `encoder.*` get a gradient with NaN or infinity\n"
    )
    assert "(self.encoder(x) * 0).sqrt().sum()" in text


def test_frozen():
    """A frozen parameter needs no gradient."""
    model = Detached()
    model.encoder.requires_grad_(False)

    assert_gradients(model, model.loss, X)


# --- the contract --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "contract",
    [
        [entry("encoder.*", "none")],
        (ContractEntry(parameters=("encoder.*",), gradient="none"),),
        Config(contract=(ContractEntry(parameters=("encoder.*",), gradient="none"),)),
        [entry("encoder.weight", "none"), entry(["encoder.*"], "intermittent")],
    ],
    ids=["mapping", "entry", "config", "first match"],
)
def test_contract(contract):
    """What the contract leaves without a gradient is no failure, however the contract is given."""
    model = Detached()

    assert_gradients(model, model.loss, X, contract=contract)


def test_contract_file(tmp_path):
    """The contract of a training run's configuration holds in tests too."""
    path = tmp_path / "gradwatch.yaml"
    path.write_text('contract:\n  - {parameters: "encoder.*", gradient: none}\n')
    model = Detached()

    assert_gradients(model, model.loss, X, contract=path)


def test_contract_none_broken():
    """A gradient that is not meant fails, with the reason that the contract gives."""
    text = failure(Healthy(), contract=[entry("encoder.*", "none", reason="a teacher")])

    assert text == (
        "warning[contract]: `encoder.weight` and `encoder.bias` are meant to get no gradient "
        "(a teacher), and each got one"
    )


def test_contract_required_broken():
    """A parameter whose gradient is required by name may not be frozen."""
    model = Healthy()
    model.encoder.bias.requires_grad_(False)

    assert failure(model, contract=[entry("encoder.*", "required")]) == (
        "warning[contract]: `encoder.bias` is meant to get a gradient, and is frozen"
    )


def test_contract_mistake():
    """A mistake in the contract is one error with its place and a suggestion, before anything runs."""
    with pytest.raises(
        ConfigError, match=r"contract entry 1(.|\n)*contract\[0\].gradient"
    ) as raised:
        assert_gradients(Healthy(), pytest.fail, X, contract=[entry("*", "intermitted")])

    assert "= help: did you mean `intermittent`?" in str(raised.value)


def test_contract_misspelt():
    """A glob that matches nothing is pointed out where the test fails, with the name it may mean."""
    text = failure(Detached(), contract=[entry("encodr.*", "none")])

    assert text.endswith(
        "note[contract]: no parameter matches `encodr.*`\n   = help: did you mean `encoder.*`?"
    )


# --- seeds ---------------------------------------------------------------------------------------------


def arrivals(seeds):
    """Return under how many of the seeds from 1 on ``LayerDrop`` lets its encoder in."""
    count = 0
    for seed in range(1, seeds):
        torch.manual_seed(seed)
        count += bool(torch.rand(()) < 0.5)
    return count


def without_encoder():
    """Return a seed under which ``LayerDrop`` leaves its encoder out."""
    for seed in range(100):
        torch.manual_seed(seed)
        if torch.rand(()) >= 0.5:
            return seed
    raise AssertionError


def test_intermittent():
    """A layer that is left out at random fails, and the failure says under how many seeds it had a gradient."""
    model, expected = LayerDrop(), arrivals(5)
    torch.manual_seed(without_encoder())
    text = failure(model)

    assert 0 < expected < 4
    assert text.startswith(
        "warning[unused]: `encoder.*` get no gradient\n"
        f"   = note: it is intermittent: a gradient arrived under {expected} of 5 seeds, and none "
        "under the others\n"
    )
    assert '`{"parameters": "encoder.*", "gradient": "intermittent"}`' in text


def test_intermittent_by_contract():
    """What the contract calls intermittent passes, without a second pass."""
    model = LayerDrop()
    loss, calls = counted(model)
    torch.manual_seed(without_encoder())
    meant = entry("encoder.*", "intermittent", reason="LayerDrop")

    assert_gradients(model, loss, X, contract=[meant])

    assert len(calls) == 1


def test_intermittent_within():
    """What is meant to get a gradient within as many passes as run, and gets none, fails."""
    model = Detached()
    contract = [entry("encoder.*", "intermittent", within=3)]

    assert failure(model, contract=contract) == (
        "warning[contract]: `encoder.weight` and `encoder.bias` are meant to get a gradient within 3 "
        "steps, and none arrived"
    )
    assert_gradients(model, model.loss, X, contract=contract, seeds=2)


def test_intermittent_beside_missing():
    """A layer left out at random and one that never trains are told apart, though both did not run."""
    model = LayerDrop()
    model.spare = nn.Linear(3, 3)
    torch.manual_seed(without_encoder())
    first, second = failure(model).split("\n\n")

    assert "`encoder.*` get no gradient\n   = note: it is intermittent" in first
    assert "`spare.*` get no gradient\n   = note: module `spare` did not run" in second
    assert "no gradient arrived under any of 5 seeds" in second


class ManyDropped(LayerDrop):
    """Four layers are left out at random, all at once."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))

    def loss(self, x):
        kept = torch.rand(()) < 0.5
        h = self.a(self.b(self.c(self.d(x)))) if kept else x
        return self.head(self.encoder(h)).square().mean()


def test_intermittent_of_many():
    """Where many modules are intermittent, the help names the key of the contract alone."""
    model = ManyDropped()
    torch.manual_seed(without_encoder())

    assert "= help: if it is meant so, say `gradient: intermittent` in the contract\n" in failure(
        model
    )


# --- losses --------------------------------------------------------------------------------------------


def test_loss_without_history():
    """A loss that nothing leads to fails with the place at which its history ends."""
    model = Healthy()
    with pytest.raises(AssertionError) as raised:
        assert_gradients(model, lambda x: model.loss(x).detach(), X)

    assert str(raised.value).startswith(
        "no parameter that requires grad reaches the loss\n\n"
        "warning[detached]: `encoder.*` and `head.*` get no gradient\n"
    )
    assert "lambda x: model.loss(x).detach()" in str(raised.value)


def test_all_frozen():
    """A loss without a history because everything is frozen is said to be so."""
    text = failure(Healthy().requires_grad_(False))

    assert text.startswith("every parameter has `requires_grad=False`, so the loss has no history")


class AllDropped(Healthy):
    """Its only layer is left out at random, and with it the history of the loss."""

    def __init__(self):
        super().__init__()
        del self.head

    def loss(self, x):
        return (self.encoder(x) if torch.rand(()) < 0.5 else x).mean()


def test_loss_without_history_now_and_then():
    """A loss that has a history under some seeds is told as intermittent, and passes where that is meant."""
    model, expected = AllDropped(), arrivals(5)
    torch.manual_seed(without_encoder())
    text = failure(model)

    assert text.startswith("warning[unused]: `encoder.*` get no gradient\n")
    assert f"it is intermittent: a gradient arrived under {expected} of 5 seeds" in text
    assert_gradients(model, model.loss, X, contract=[entry("*", "intermittent")])


def test_loss_of_another_type():
    """A loss that is no tensor is named."""
    with pytest.raises(TypeError, match=r"one element from `loss_fn`, found `dict`"):
        assert_gradients(Healthy(), dict, {"loss": X})  # type: ignore[arg-type]


def test_loss_with_several_elements():
    """A loss with several elements is told with its shape, and what to do."""
    model = Healthy()
    with pytest.raises(
        ValueError, match=r"found shape \(2, 3\): take its `.mean\(\)` or `.sum\(\)`"
    ):
        assert_gradients(model, model.encoder, X)


def test_error_of_the_loss():
    """An error in ``loss_fn`` passes through with a note on its cause, and all is as before."""
    model = Healthy()

    def twice(x):
        loss = model.loss(x)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="backward through the graph a second time") as raised:
        assert_gradients(model, twice, X)

    assert "GradWatch: an earlier backward went through the same graph" in raised.value.__notes__[0]
    assert [p.grad for p in model.parameters()] == [None] * 4


@pytest.mark.parametrize("seeds", [0, -1, True, 2.0])
def test_seeds_mistake(seeds):
    """A number of seeds that is none is echoed, with what was expected."""
    with pytest.raises(ValueError, match=rf"`assert_gradients\(seeds={seeds}\)`: expected a whole"):
        assert_gradients(Healthy(), Healthy().loss, X, seeds=seeds)


def test_argument_mistake():
    """What is no module, and a loss in place of its function, is named."""
    with pytest.raises(TypeError, match=r"`assert_gradients\(model, ...\)`: expected a `torch.nn"):
        assert_gradients("model", torch.sum, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a function that returns the loss, found `Tensor`"):
        assert_gradients(Healthy(), Healthy().loss(X))


def test_failure_of_ours(monkeypatch, caplog):
    """A pass that could not be diagnosed is an error: it does not count as a pass that is well."""
    monkeypatch.setattr("gradwatch._single.names_of", lambda model: 1 / 0)

    with pytest.raises(GradWatchError, match="could not be diagnosed: see the log of `gradwatch`"):
        assert_gradients(Healthy(), Healthy().loss, X)
    assert [record.message for record in caplog.records] == [
        "GradWatch failed: this pass is not diagnosed"
    ]


# --- nothing stays behind ------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Changes buffers, its mode, and flags, and draws random numbers of all kinds, in every pass."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(3, 1)
        self.spare = nn.Linear(3, 1)
        self.register_buffer("last", torch.zeros(1))

    def loss(self, x):
        random.random()  # noqa: S311 -- the generator whose state is asked about
        np.random.rand()  # noqa: NPY002 -- the generator whose state is asked about
        self.last = x.detach().mean()
        self.drop.eval()
        self.spare.bias.requires_grad_(False)
        return self.head(self.drop(self.norm(x))).mean()


def random_states():
    """Return the state of every generator on the CPU, as values that can be compared."""
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    inner = {key: value for key, value in legacy["state"].items() if key != "key"}
    key = legacy["state"]["key"].tolist()
    return random.getstate(), torch.get_rng_state().tolist(), key, inner


def test_nothing_changes():
    """Gradients, buffers, modes, flags, and random numbers are after a failure as they were before."""
    model = Stateful()
    model.head.weight.grad = torch.full((1, 3), 7.0)
    held, last = model.head.weight.grad, model.last
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    states = random_states()
    failure(model)

    assert [p.grad is not None for p in model.parameters()] == [False, False, True, *[False] * 3]
    assert model.head.weight.grad is held
    assert held.tolist() == [[7.0] * 3]
    assert model.last is last
    assert [n for n, b in model.named_buffers() if not torch.equal(b, buffers[n])] == []
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert states == random_states()


def test_other_leaves():
    """Gradients of inputs and of other modules are as before too."""
    model, other = Healthy(), nn.Linear(3, 3)
    x = X.clone().requires_grad_()
    other.bias.grad = held = torch.ones(3)
    assert_gradients(model, lambda x: model.loss(other(x)), x)

    assert x.grad is None
    assert other.weight.grad is None
    assert other.bias.grad is held
    assert held.tolist() == [1.0] * 3


def test_first_pass_draws_what_the_test_would():
    """The first pass runs with the random numbers as they are, so that a test's own seed counts."""
    model, drawn = Healthy(), []

    def loss(x):
        drawn.append(float(torch.rand(())))
        return model.loss(x)

    torch.manual_seed(11)
    assert_gradients(model, loss, X)
    torch.manual_seed(11)

    assert drawn == [float(torch.rand(()))]


def test_lazy():
    """A lazy model is materialised by the pass, and its gradients are asked about."""
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(1))

    assert_gradients(model, lambda x: model(x).sum(), X)


# --- a pass of one's own ---------------------------------------------------------------------------------


def test_checked_pass():
    """A pass of the test's own that is well leaves its gradients, and the diagnosis can be read."""
    model = Healthy()
    with checked_pass(model) as diagnosis:
        model.loss(X).backward()

    assert diagnosis.report.diagnoses == ()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_checked_pass_fails():
    """A pass of the test's own that leaves parameters out fails as it ends, unless the contract allows it."""
    model = Detached()
    with checked_pass(model, contract=[entry("encoder.*", "none")]):
        model.loss(X).backward()
    with (
        pytest.raises(AssertionError, match=r"warning\[detached\]: `encoder.\*` get no gradient"),
        checked_pass(model),
    ):
        model.loss(X).backward()


def test_checked_pass_of_a_frozen_model():
    """Of a frozen model nothing is expected in a pass of the test's own."""
    model = Healthy().requires_grad_(False)
    with checked_pass(model) as diagnosis:
        model.loss(X)

    assert diagnosis.report.diagnoses == ()


def test_checked_pass_that_raises():
    """An error inside of the pass is the one that is raised."""
    with pytest.raises(ZeroDivisionError), checked_pass(Detached()):
        _ = 1 / 0


def test_about():
    """A diagnosis can be asked about some parameters alone, and says nothing of the others."""
    model = Detached()
    model.spare = nn.Linear(3, 3)
    with diagnose(model) as diagnosis:
        model.loss(X).backward()
    found = diagnosis.about(["encoder.bias", "head.weight"])

    assert [(d.cause, d.parameters) for d in found] == [(Cause.DETACHED, ("encoder.bias",))]
    assert diagnose(model).about(["encoder.bias"]) == ()


def test_examples():
    """The examples in the docstrings are true."""
    failed, attempted = doctest.testmod(testing)

    assert (failed, attempted > 0) == (0, True)
