"""Models that nobody named: which parameters are expected to get a gradient, and which silently are not."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from gradwatch import _roots
from gradwatch._roots import Roots
from gradwatch.rules import ContractEntry
from gradwatch.testing import assert_gradients, checked_pass
from tests.conftest import QUIET

X = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.0, -1.0]])


class Net(nn.Module):
    def __init__(self, out=1):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.head = nn.Linear(3, out)

    def forward(self, x):
        return self.head(self.encoder(x).sigmoid())


class Cut(Net):
    """Its encoder is cut off."""

    def forward(self, x):
        return self.head(self.encoder(x).detach())


class Aside(Net):
    """What it returns lies on the way to the loss, and none of its parameters does."""

    def forward(self, x):
        with torch.no_grad():
            scale = self.head(self.encoder(x).sigmoid()).mean()
        return x * scale


def found(scenario, *contract):
    """Return the first line of each thing that is said of a scenario."""
    roots = Roots()
    roots.start()
    try:
        scenario()
    finally:
        roots.stop()
    text = roots.findings([ContractEntry(**entry) for entry in contract])
    return [part.partition("\n")[0] for part in text.split("\n\n")] if text else []


# --- silence ---------------------------------------------------------------------------------------------


def healthy():
    Net()(X).sum().backward()


def no_backward():
    Cut()(X)


def evaluated():
    Cut().eval()(X).sum().backward()


def part_in_eval_mode():
    model = Cut()
    model.encoder.eval()
    model(X).sum().backward()


def frozen():
    model = Cut()
    model.encoder.requires_grad_(False)
    model(X).sum().backward()


def frozen_before_backward():
    model = Cut()
    loss = model(X).sum()
    model.encoder.requires_grad_(False)
    loss.backward()


def a_part_is_called():
    Net().encoder(X).sum().backward()


def parts_and_the_whole():
    model = Net()
    model.head(model.encoder(X)).sum().backward()
    model(X).sum().backward()


def two_models_in_a_row():
    Net()(Net(out=3)(X)).sum().backward()


def detached_teacher():
    F.mse_loss(Net()(X), Net()(X).detach()).backward()


def teacher_without_gradients():
    teacher = Net()
    with torch.no_grad():
        target = teacher(X)
    F.mse_loss(Net()(X), target).backward()


def result_that_no_loss_uses():
    Net()(X)
    Net()(X).sum().backward()


def adversaries():
    maker, judge = Net(out=3), Net()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (maker, judge)]
    for _ in range(2):
        (judge(X).mean() - judge(maker(X).detach()).mean()).backward()
        optimizers[1].step()
        judge.requires_grad_(False)
        judge(maker(X)).mean().backward()
        optimizers[0].step()
        judge.requires_grad_(True)
        for optimizer in optimizers:
            optimizer.zero_grad()


def accumulated():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(4):
        model(X).sum().backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step > 2)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))

    def forward(self, x, choice):
        return self.experts[choice](x)


def each_expert_in_its_turn():
    model = Expert()
    for choice in range(2):
        model(X, choice).sum().backward()
        model.zero_grad()


def closures():
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()


def gradients_of_some():
    model = Net()
    torch.autograd.grad(model(X).sum(), model.encoder.weight)
    model(X).sum().backward(inputs=[model.encoder.weight])


def gradients_by_hand():
    model = Cut()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(X).sum()
    for parameter in model.encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def failing_backward():
    with pytest.raises(RuntimeError, match="scalar outputs"):
        Cut()(X).backward()


def failing_forward():
    model = Net()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.ones(2, 7))
    model(X).sum().backward()


def functional():
    model = Net()
    tensors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    functional_call(model, tensors, (X,)).sum().backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is None] == []


def functional_after_a_call():
    model = Net()
    model(X)
    tensors: dict[str, torch.Tensor] = {
        name: nn.Parameter(parameter.detach().clone())
        for name, parameter in model.named_parameters()
    }
    functional_call(model, tensors, (X,)).sum().backward()


def transforms():
    model = Net()
    held = {name: parameter.detach() for name, parameter in model.named_parameters()}
    vmap(grad(lambda p, x: functional_call(model, p, (x,)).sum()), (None, 0))(held, X)
    model(X).sum().backward()


def reentrant_checkpoint():
    x = X.clone().requires_grad_()
    checkpoint(Net(), x, use_reentrant=True).sum().backward()


def other_checkpoint():
    checkpoint(Net(), X, use_reentrant=False).sum().backward()


def within_modes_of_the_users():
    with torch.device("cpu"):
        model = Net()
        model(X).sum().backward()
    with torch.device("meta"):
        Net()(torch.ones(2, 3)).sum().backward()


def copies():
    model = Net()
    model(X).sum().backward()
    copied = copy.deepcopy(model)
    copied.zero_grad()
    copied(X).sum().backward()


def on_another_thread():
    thread = threading.Thread(target=lambda: Cut()(X).sum().backward())
    thread.start()
    thread.join()
    healthy()


def compiled():
    model = Net()
    torch.compile(model, backend="eager", fullgraph=True)(X).sum().backward()
    torch.compile(lambda x: model(x).sum(), backend="eager", fullgraph=True)(X).backward()


def lazy():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    for _ in range(2):
        model(X).sum().backward()


def empty():
    model = Net()
    model.head.register_parameter("nothing", nn.Parameter(torch.empty(0)))
    model(X).sum().backward()


def tied():
    model = Net(out=3)
    model.head.weight = model.encoder.weight
    model(X).sum().backward()


def normalised():
    torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 1))(X).sum().backward()


def replaced_between_calls():
    model = Net()
    model(X)
    model.encoder.weight = nn.Parameter(torch.ones(3, 3))
    model(X).sum().backward()


def nothing_of_its_own():
    nn.Sequential(nn.ReLU(), nn.MSELoss())
    nn.MSELoss()(nn.ReLU()(Net()(X)), torch.ones(2, 1)).backward()


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()
        self.spare = nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer():
    Trainer(**QUIET).fit(
        Lit(),
        DataLoader([*X], batch_size=1),  # type: ignore[arg-type]
    )


def asserted_elsewhere():
    model = Cut()
    with pytest.raises(AssertionError, match="detached"):
        assert_gradients(model, lambda x: model(x).sum(), X)
    with checked_pass(model, contract=[{"parameters": "encoder.*", "gradient": "none"}]):
        model(X).sum().backward()


HEALTHY = [
    healthy,
    no_backward,
    evaluated,
    part_in_eval_mode,
    frozen,
    frozen_before_backward,
    a_part_is_called,
    parts_and_the_whole,
    two_models_in_a_row,
    detached_teacher,
    teacher_without_gradients,
    result_that_no_loss_uses,
    adversaries,
    accumulated,
    each_expert_in_its_turn,
    closures,
    gradients_of_some,
    gradients_by_hand,
    failing_backward,
    failing_forward,
    functional,
    functional_after_a_call,
    transforms,
    reentrant_checkpoint,
    other_checkpoint,
    within_modes_of_the_users,
    copies,
    on_another_thread,
    compiled,
    lazy,
    empty,
    tied,
    normalised,
    replaced_between_calls,
    nothing_of_its_own,
    trainer,
    asserted_elsewhere,
]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("scenario", HEALTHY, ids=lambda scenario: scenario.__name__)
def test_silence(scenario, caplog):
    """Nothing is said where no parameter was meant to get a gradient and got none."""
    assert found(scenario) == []
    assert [record.message for record in caplog.records if record.name == "gradwatch"] == []


# --- findings --------------------------------------------------------------------------------------------


def cut():
    Cut()(X).sum().backward()


def cut_and_trained():
    model = Cut()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(X).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def cut_behind_another():
    Cut()(Net(out=3)(X)).sum().backward()


def cut_within_a_mode_of_the_users():
    with torch.device("cpu"):
        Cut()(X).sum().backward()


def none_of_it_trains():
    Net()(Aside()(Net(out=3)(X))).sum().backward()


def two_of_a_class():
    Cut()(X).sum().backward()
    Cut()(X).sum().backward()


def experts_left_out():
    Expert()(X, 0).sum().backward()


def cut_beside_failing_backward():
    failing_backward()
    cut()


class InADict(Cut):
    def forward(self, x):
        return {"loss": [super().forward(x).sum()]}


def result_in_containers():
    InADict()(X)["loss"][0].backward()


SICK = {
    cut: ["warning[detached]: `Cut.encoder.*` get no gradient"],
    cut_and_trained: ["warning[detached]: `Cut.encoder.*` get no gradient"],
    cut_behind_another: ["warning[detached]: `Cut.encoder.*` get no gradient"],
    cut_within_a_mode_of_the_users: ["warning[detached]: `Cut.encoder.*` get no gradient"],
    none_of_it_trains: [
        "warning[no_grad]: `Aside.encoder.*` get no gradient",
        "warning[no_grad]: `Aside.head.*` get no gradient",
    ],
    two_of_a_class: ["warning[detached]: `Cut.encoder.*` and `Cut_2.encoder.*` get no gradient"],
    experts_left_out: ["warning[unused]: `Expert.experts.1.*` get no gradient"],
    cut_beside_failing_backward: ["warning[detached]: `Cut_2.encoder.*` get no gradient"],
    result_in_containers: ["warning[detached]: `InADict.encoder.*` get no gradient"],
}


@pytest.mark.parametrize("scenario", SICK, ids=lambda scenario: scenario.__name__)
def test_findings(scenario):
    """What was meant to get a gradient and got none is named after its model, with the cause."""
    assert found(scenario) == SICK[scenario]


def test_contract():
    """A contract is held against names with and without the model's class."""
    none = {"gradient": "none"}

    assert found(cut, none | {"parameters": "encoder.*"}) == []
    assert found(cut, none | {"parameters": "Cut.encoder.*"}) == []
    assert found(experts_left_out, {"parameters": "*experts*", "gradient": "intermittent"}) == []
    assert found(healthy, none | {"parameters": "head.bias"}) == [
        "warning[contract]: `Net.head.bias` is meant to get no gradient, and one arrived"
    ]
    assert found(frozen, {"parameters": "encoder.bias", "gradient": "required"}) == [
        "warning[contract]: `Cut.encoder.bias` is meant to get a gradient, and is frozen"
    ]


def test_long(monkeypatch, caplog):
    """After very many operations no more models are looked at, and gradients that arrive still count."""
    monkeypatch.setattr(_roots, "MAX_OPS", 10)

    def scenario():
        model = Expert()
        for _ in range(3):
            model(X, 0).sum().backward()
        for _ in range(10):
            X.sum()
        model(X, 1).sum().backward()
        cut()

    assert found(scenario) == []
    (record,) = [record for record in caplog.records if record.name == "gradwatch"]
    assert "more than 10 operations ran" in str(record.exc_info[1])


def test_same_numbers():
    """Losses and gradients are the same, bit for bit, with and without."""

    def run():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters())
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(model(X).square().mean())
            losses[-1].backward()
            optimizer.step()
        return [*torch.stack(losses).detach(), *(p.grad.clone() for p in model.parameters())]

    watched: list[torch.Tensor] = []

    assert found(lambda: watched.extend(run())) == []
    assert all(map(torch.equal, watched, run()))
