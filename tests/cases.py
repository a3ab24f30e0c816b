"""Small models with one gradient bug each, and healthy ones beside them: the table behind the engine's tests.

A case is a module whose ``forward`` takes a batch of shape (4, 3) and returns the loss. ``expect`` maps
each cause to the parameters it must be named for, ``# <- here`` marks the guilty line, and everything
that ``expect`` does not name must get a gradient.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ENC = ("enc.weight", "enc.bias")
HEAD = ("head.weight", "head.bias")


class Case(nn.Module):
    """An encoder and a head, of which subclasses use what they like."""

    expect: dict[str, tuple[str, ...]] = {}
    label: str | None = None
    """What has to stand in one of the notes."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass of the step."""
        loss.backward()


# Nothing wrong -------------------------------------------------------------------------------------


class Healthy(Case):
    def forward(self, x):
        return self.head(torch.relu(self.enc(x)) + 0.1).mean()


class DetachedForAMetric(Case):
    def forward(self, x):
        h = self.enc(x)
        self.seen = h.detach().mean().item()
        return self.head(h).mean()


class StraightThrough(Case):
    def forward(self, x):
        h = self.enc(x)
        return self.head(h + (h.round() - h).detach()).mean()


class CheckpointWithoutReentry(Case):
    def forward(self, x):
        return self.head(checkpoint(self.enc, x, use_reentrant=False)).mean()


class CheckpointWithGradInput(Case):
    def forward(self, x):
        return checkpoint(self.head, self.enc(x), use_reentrant=True).mean()


class ScaledByFunction(Case):
    def forward(self, x):
        return self.head(Scale.apply(self.enc(x), 2.0)).mean()


class GradientPenalty(Case):
    def forward(self, x):
        x = x.clone().requires_grad_()
        out = self.head(torch.tanh(self.enc(x))).sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return slope.pow(2).mean() + out


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


# unused --------------------------------------------------------------------------------------------


class NeverCalled(Case):
    expect = {"unused": ENC}
    label = "module `enc` did not run"

    def forward(self, x):
        return self.head(x).mean()


class ReadForItsShape(Case):
    expect = {"unused": ENC}

    def forward(self, x):
        noise = torch.zeros_like(self.enc.weight)
        return self.head(x + noise.sum() + self.enc.bias.shape[0]).mean()


class ParameterOfAModuleThatRan(Case):
    expect = {"unused": ("scale.unused",)}
    label = "module `scale` ran"

    def __init__(self) -> None:
        super().__init__()
        self.scale = HalfUsed()

    def forward(self, x):
        return self.head(self.scale(self.enc(x))).mean()


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.used


# not_in_loss ---------------------------------------------------------------------------------------


class OutputForgotten(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        aux = self.enc(x).pow(2)
        aux.mean()  # <- here
        return self.head(x).mean()


class OnlyLogged(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        gate = torch.sigmoid(self.enc(x)).mean()  # <- here
        self.history = [gate.item()]
        return self.head(x).mean()


class Overwritten(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        h = self.enc(x)  # <- here
        h = x * 2
        return self.head(h).mean()


class GaveATypeAlone(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        h = self.enc(x)  # <- here
        return self.head(x + h.new_tensor(0.5)).mean()


# detached ------------------------------------------------------------------------------------------


class Detach(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        h = self.enc(x).detach()  # <- here
        return self.head(h).mean()


class Data(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        return self.head(self.enc(x).data).mean()  # <- here


class DetachInPlace(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        h = self.enc(x)
        h.detach_()  # <- here
        return self.head(h).mean()


class DetachInAHelper(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        return self.head(stop(self.enc(x))).mean()


def stop(values):
    return next(value.detach() for value in (values,))


class TwoCutsOnOnePath(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        h = self.enc(x).detach()  # <- here
        with torch.no_grad():
            h = h * 2
        return self.head(h).mean()


class Rewrapped(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        h = nn.Parameter(self.enc(x))  # <- here
        return self.head(h).mean()


class DeepcopyOfATensor(Case):
    expect = {"detached": ("enc.weight",)}

    def forward(self, x):
        weight = copy.deepcopy(self.enc.weight)  # <- here
        return self.head(F.linear(x, weight, self.enc.bias)).mean()


# no_grad -------------------------------------------------------------------------------------------


class NoGradBlock(Case):
    expect = {"no_grad": ENC}

    def forward(self, x):
        with torch.no_grad():
            h = self.enc(x)  # <- here
        return self.head(h).mean()


class NoGradDecorator(Case):
    expect = {"no_grad": ENC}

    @torch.no_grad()
    def encode(self, x):
        return torch.relu(self.enc(x))  # <- here

    def forward(self, x):
        return self.head(self.encode(x)).mean()


class SwitchedOff(Case):
    expect = {"no_grad": ENC}

    def forward(self, x):
        with torch.set_grad_enabled(False):
            h = self.enc(x)  # <- here
        return self.head(h).mean()


class InferenceMode(Case):
    expect = {"no_grad": ENC}

    def forward(self, x):
        with torch.inference_mode():
            h = self.enc(x)  # <- here
        return self.head(h.clone()).mean()


class GradOfGradForgotten(Case):
    expect = {"no_grad": ENC}

    def forward(self, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.enc(x).pow(2).sum(), x)  # <- here
        return self.head(slope).mean()


class LossTermWithoutGradBesideADetach(Case):
    """The term that is a constant of the loss is named, not the detach that feeds a trained head."""

    expect = {"no_grad": ENC}

    def forward(self, x):
        h = self.enc(x)
        with torch.no_grad():
            term = h.pow(2).mean()  # <- here
        return term + self.head(h.detach()).mean()


# left_torch ----------------------------------------------------------------------------------------


class Item(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        scale = self.enc(x).mean().item()  # <- here
        return (self.head(x) * scale).mean()


class ItemThroughArithmetic(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        scale = self.enc(x).mean().item()  # <- here
        scale = 0.5 * math.tanh(scale)
        return (self.head(x) * scale).mean()


class NumpyRoundTrip(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        h = self.enc(x).detach().numpy()  # <- here
        h = torch.from_numpy(np.clip(h, -1, 1))
        return self.head(h).mean()


class TensorOfValues(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        rows = [row.mean() for row in self.enc(x)]
        weights = torch.tensor([row.detach() for row in rows])  # <- here
        return (self.head(x).squeeze(1) * weights).mean()


class BranchByValue(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        if self.enc(x).mean() > -100:  # <- here
            x = x * 2
        return self.head(x).mean()


class ReturnedFloat(Case):
    expect = {"left_torch": ENC}

    def temperature(self, x):
        return float(self.enc(x).exp().mean())  # <- here

    def forward(self, x):
        return (self.head(x) / self.temperature(x)).mean()


# non_differentiable --------------------------------------------------------------------------------


class Argmax(Case):
    expect = {"non_differentiable": ENC}

    def forward(self, x):
        choice = self.enc(x).argmax(dim=1)  # <- here
        return self.head(x[choice]).mean()


class Comparison(Case):
    expect = {"non_differentiable": ENC}

    def forward(self, x):
        mask = (self.enc(x) > 0).float()  # <- here
        return self.head(x * mask).mean()


class IndicesOfTopk(Case):
    expect = {"non_differentiable": ENC}

    def forward(self, x):
        _, indices = self.enc(x).topk(2, dim=1)  # <- here
        return self.head(x).mean() + x.gather(1, indices).mean()


class IntegerCast(Case):
    expect = {"non_differentiable": ENC}

    def forward(self, x):
        buckets = self.enc(x).abs().long()  # <- here
        return self.head(F.one_hot(buckets.clamp(max=2), 3).float().mean(1)).mean()


class Sampled(Case):
    expect = {"non_differentiable": ENC}

    def forward(self, x):
        action = torch.distributions.Normal(self.enc(x), 1.0).sample()  # <- here
        return self.head(action).mean()


# custom_function -----------------------------------------------------------------------------------


class ReturnsNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return x + y

    @staticmethod
    def backward(ctx, grad):
        return None, grad


class FunctionWithoutGradient(Case):
    expect = {"custom_function": ENC}

    def forward(self, x):
        return ReturnsNone.apply(self.enc(x), self.head(x)).mean()  # <- here


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x * 2
        ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad


class FunctionMarkedItsOutput(Case):
    expect = {"custom_function": ENC}

    def forward(self, x):
        return self.head(Marked.apply(self.enc(x))).mean()  # <- here


# reentrant_checkpoint ------------------------------------------------------------------------------


class CheckpointOfData(Case):
    expect = {"reentrant_checkpoint": ENC}

    def forward(self, x):
        h = checkpoint(self.enc, x, use_reentrant=True)  # <- here
        return self.head(h).mean()


class OneCheckpointOfTwo(Case):
    """Two calls from one line: that one of them works says nothing of the other."""

    expect = {"reentrant_checkpoint": ENC}

    def again(self, module, x):
        return checkpoint(module, x, use_reentrant=True)  # <- here

    def forward(self, x):
        h = self.again(self.enc, x)
        return self.again(self.head, h.requires_grad_()).mean()


class CheckpointInALoop(Case):
    """The second call follows the first at once, and works for what comes to it besides the first's result."""

    expect = {"reentrant_checkpoint": ENC}

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        steps = [(lambda h, _: self.enc(h), x), (lambda h, s: self.head(h * s), self.scale)]
        for step, other in steps:
            x = checkpoint(step, x, other, use_reentrant=True)  # <- here
        return x.mean()


# cleared and not_requested -------------------------------------------------------------------------


class ZeroedAfterBackward(Case):
    expect = {"cleared": ENC}

    def forward(self, x):
        return self.head(self.enc(x)).mean()

    def backward(self, loss):
        loss.backward()
        self.enc.zero_grad()  # <- here


class FilledWithZeros(Case):
    expect = {"cleared": ENC}

    def forward(self, x):
        return self.head(self.enc(x)).mean()

    def backward(self, loss):
        loss.backward()
        self.enc.zero_grad(set_to_none=False)  # <- here


class BackwardForSome(Case):
    expect = {"not_requested": ENC}

    def forward(self, x):
        return self.head(self.enc(x)).mean()

    def backward(self, loss):
        loss.backward(inputs=list(self.head.parameters()))  # <- here


class GradForOthers(Case):
    expect = {"not_requested": (*ENC, *HEAD)}

    def forward(self, x):
        self.x = x.clone().requires_grad_()
        return self.head(self.enc(self.x)).mean()

    def backward(self, loss):
        torch.autograd.grad(loss, self.x)  # <- here


class GradForTheAdaptedPart(Case):
    expect = {"not_requested": ENC}

    def forward(self, x):
        fast: list[torch.Tensor] = list(self.head.parameters())
        loss = F.linear(torch.tanh(self.enc(x)), *fast).square().mean()
        inner = torch.autograd.grad(loss, fast, create_graph=True)
        fast = [weight - 0.1 * slope for weight, slope in zip(fast, inner, strict=True)]
        return F.linear(torch.tanh(self.enc(x)), *fast).square().mean()

    def backward(self, loss):
        weights = list(self.head.parameters())
        slopes = torch.autograd.grad(loss, weights)  # <- here
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope


# replaced ------------------------------------------------------------------------------------------


class CopiedByItsWrapper(Case):
    expect = {"replaced": ENC}

    class Wrapper(nn.Module):
        """What many a library does with the model that it is given."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = copy.deepcopy(inner)  # <- here

        def forward(self, x):
            return torch.tanh(self.inner(x))

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = self.Wrapper(self.enc)

    def forward(self, x):
        return self.head(self.wrapped(x)).mean()


class CopyThatNothingReads(Case):
    expect = {"unused": ("twin.weight", "twin.bias")}

    def __init__(self) -> None:
        super().__init__()
        self.twin = copy.deepcopy(self.enc)

    def forward(self, x):
        return self.head(self.enc(x)).mean()


class UpdatedByItsOwnGradient(Case):
    expect = {"no_grad": HEAD}

    def forward(self, x):
        loss = self.head(self.enc(x)).square().mean()
        slopes = torch.autograd.grad(loss, list(self.head.parameters()), retain_graph=True)
        with torch.no_grad():
            for (name, weight), slope in zip(
                list(self.head.named_parameters()), slopes, strict=True
            ):
                setattr(self.head, name, nn.Parameter(weight - 0.1 * slope))  # <- here
        return self.head(self.enc(x)).square().mean()


class DeepcopyOfAModule(Case):
    expect = {"replaced": ENC}

    def forward(self, x):
        fast = copy.deepcopy(self.enc)  # <- here
        return self.head(fast(x)).mean()


class AliasOfAnOldWeight(Case):
    expect = {"replaced": ("enc.weight",)}

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.enc.weight]
        self.enc.weight = nn.Parameter(self.enc.weight.detach().clone())

    def forward(self, x):
        h = F.linear(x, self.kept[0], self.enc.bias)  # <- here
        return self.head(h).mean()


# What Python does with values ------------------------------------------------------------------------


class LoopOfPredictedLength(Case):
    expect = {"left_torch": ("steps",)}

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        h = x
        for _ in range(int(self.steps)):  # <- here
            h = self.enc(h)
        return self.head(h).mean()


class LoopThatIsLeft(Case):
    expect = {"left_torch": HEAD}

    def forward(self, x):
        h = x
        for _ in range(3):
            h = self.enc(h)
            if self.head(h).mean() > 0:  # <- here
                break
        return h.mean()


class ChosenByIndex(Case):
    expect = {"left_torch": HEAD}

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def forward(self, x):
        h = self.enc(x)
        expert = int(self.head(h).abs().mean()) % 2  # <- here
        return sum(e(h).mean() for e in self.experts) + self.experts[expert](h).mean()


class PassedToASubmodule(Case):
    expect = {"left_torch": ENC}

    def __init__(self) -> None:
        super().__init__()
        self.power = Power()

    def forward(self, x):
        exponent = self.enc(x).abs().mean().item()  # <- here
        return self.power(self.head(x), exponent).mean()


class Power(nn.Module):
    def forward(self, x, exponent):
        return x.abs() ** exponent


class KeptInAClosure(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        factor = self.enc(x).mean().item()  # <- here

        def scale(t):
            return t * factor

        return scale(self.head(x)).mean()


MEMORY = {"scale": 1.0}


class KeptInAGlobal(Case):
    expect = {"left_torch": ENC}

    def fill(self, x):
        MEMORY["scale"] = self.enc(x).mean().item()  # <- here

    def forward(self, x):
        self.fill(x)
        return (self.head(x) * MEMORY["scale"]).mean()


class LossOfANumber(Case):
    expect = {"left_torch": (*ENC, *HEAD)}

    def forward(self, x):
        number = self.head(self.enc(x)).mean().item()  # <- here
        return torch.tensor(number, requires_grad=True)


class KeptByAnObject(Case):
    expect = {"left_torch": ENC}

    def __init__(self) -> None:
        super().__init__()
        self.beta = Controller()

    def forward(self, x):
        self.beta.step(self.enc(x).mean().item())  # <- here
        return (self.head(x) * self.beta.value).mean()


class Controller:
    def __init__(self) -> None:
        self.value = 1.0
        self.level = 0
        self.count = 0

    def step(self, gap: float) -> None:
        """Adapt the weight."""
        self.value = 1.0 / (1.0 + math.exp(-gap))
        if gap > -100:
            self.level += 1

    def update(self, gap: float) -> None:
        """Count, and keep nothing."""
        del gap
        self.count += 1

    @property
    def doubled(self) -> float:
        """Twice the weight."""
        return 2 * self.value


class ReadThroughAProperty(KeptByAnObject):
    def forward(self, x):
        self.beta.step(self.enc(x).mean().item())  # <- here
        return (self.head(x) * self.beta.doubled).mean()


class LevelOfACurriculum(KeptByAnObject):
    def forward(self, x):
        self.beta.step(self.enc(x).mean().item())  # <- here
        out = self.head(x)
        if self.beta.level > 0:
            out = out * 2
        return out.mean()


class CountedOnly(KeptByAnObject):
    """A method called `update` that does not keep its argument is no way to the loss."""

    expect = {"not_in_loss": ENC}

    def forward(self, x):
        aux = self.enc(x).mean()  # <- here
        self.beta.update(aux.item())
        return (self.head(x) / (1 + self.beta.count)).mean()


class CheckedByTorch(Case):
    """What a distribution asks of its own arguments hands nothing to the user."""

    expect = {"left_torch": ENC}

    def forward(self, x):
        policy = torch.distributions.Categorical(logits=self.enc(x))
        entropy = policy.entropy().mean().item()  # <- here
        return self.head(x).mean() * (0.5 * entropy)


class AddedToData(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        self.head.weight.data += self.enc(x)[:1]  # <- here
        return self.head(x).mean()


class ReturnedWithALog(Case):
    """A number in the tuple beside the loss is a log entry, and no way to the loss."""

    expect = {"not_in_loss": ENC}

    def losses(self, x):
        aux = self.enc(x).pow(2).mean()  # <- here
        return self.head(x).mean(), {"aux": aux.item()}

    def forward(self, x):
        loss, self.logs = self.losses(x)
        return loss / 2


class NameUsedTwice(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        loss = self.enc(x).mean()  # <- here
        loss = loss.item()
        self.log = [loss]
        loss = self.head(x).mean()
        return loss * 2


class ItemsOfOneDict(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        out = {"main": self.head(x)}
        out["aux"] = self.enc(x).max().item()  # <- here
        return F.softplus(out["main"]).mean()


# Writes --------------------------------------------------------------------------------------------


class WrittenUnderNoGrad(Case):
    expect = {"no_grad": ENC}

    def forward(self, x):
        h = self.head(x) * 1
        with torch.no_grad():
            h.copy_(self.enc(x)[:, :1])  # <- here
        return h.mean()


class AssignedToData(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        self.head.weight.data = self.enc(x)[:1]  # <- here
        return self.head(x).mean()


class RegisteredAgain(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        other = nn.Linear(3, 1)
        other.weight = nn.Parameter(self.enc(x)[:1])  # <- here
        return (other(x) + self.head(x)).mean()


class MadeAnew(Case):
    expect = {"replaced": ENC}

    def forward(self, x):
        enc = nn.Linear(3, 3)  # <- here
        return self.head(enc(x)).mean()


# Flags, copies, and what was made before -----------------------------------------------------------


class SwitchedOffWhileUsed(Case):
    expect = {"frozen": ENC}

    def forward(self, x):
        self.enc.requires_grad_(False)  # <- here
        loss = self.head(self.enc(x)).mean()
        self.enc.requires_grad_(True)
        return loss


class CopiedOnly(Case):
    """A parameter that was only copied, clamped or saved was not used."""

    expect = {"unused": ENC}

    def forward(self, x):
        self.saved = self.state_dict()
        self.ema = copy.deepcopy(self.enc)
        self.enc.weight.data.clamp_(-1, 1)
        return self.head(x).mean()


class ComputedInInit(Case):
    expect = {"detached": ("enc.weight",)}

    def __init__(self) -> None:
        super().__init__()
        self.add_module("enc", Frozen())

    def forward(self, x):
        return self.head(self.enc(x)).mean()


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.kept = self.weight.exp().detach()

    def forward(self, x):
        return x @ self.kept


class InsideAWorkingCheckpoint(Case):
    expect = {"detached": ("inner.weight", "inner.bias")}

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def block(self, h):
        return h + self.inner(h).detach()  # <- here

    def forward(self, x):
        return self.head(checkpoint(self.block, self.enc(x), use_reentrant=True)).mean()


class DeletedGradient(Case):
    expect = {"cleared": ("enc.bias",)}

    def forward(self, x):
        return self.head(self.enc(x)).mean()

    def backward(self, loss):
        loss.backward()
        del self.enc.bias.grad  # <- here


# Out of torch and back, by less usual ways --------------------------------------------------------


class StackedByAsTensor(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        rows = torch.as_tensor([[*row] for row in self.enc(x)])  # <- here
        return self.head(rows).mean()


class HandedOnByAsTensor(Case):
    def forward(self, x):
        return self.head(torch.as_tensor(self.enc(x))).mean()


class DetachedByAsArray(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        return self.head(torch.asarray(self.enc(x), requires_grad=False)).mean()  # <- here


class ReadBackFromText(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        text = f"{self.enc(x).mean():.4f}"  # <- here
        return self.head(x * float(text)).mean()


class PrintedOnly(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        self.text = f"{self.enc(x).mean():.4f}"  # <- here
        return self.head(x).mean()


class EqualByChance(Case):
    """A constant of the loss that is the very number that was printed has nothing to do with it."""

    expect = {"unused": ("scale",)}

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        self.log = [self.scale.item()]
        return 0.5 * self.head(self.enc(x)).mean()


class ChosenByMatch(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        match round(self.enc(x).mean().item()) % 2:  # <- here
            case 0:
                scaled = x * 2
            case other:
                scaled = x * other
        return self.head(scaled).mean()


class CopiedIntoAnArray(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        rows = np.zeros((4, 3), np.float32)
        np.copyto(rows, self.enc(x).detach().numpy())  # <- here
        return self.head(torch.from_numpy(rows)).mean()


def loss_with_a_log(out, log):
    loss = out.square().mean() * 2
    log["loss"] = loss.item()
    return loss


class LogHandedToTheLoss(Case):
    """A function that gets a number for its log, and computes nothing with it, is no use of it."""

    expect = {"not_in_loss": ENC}

    def forward(self, x):
        log = {"aux": self.enc(x).mean().item()}  # <- here
        return loss_with_a_log(self.head(x), log)


def scaled_loss(out, **options):
    return out.square().mean() * options["factor"]


class HandedOnByKeyword(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        return scaled_loss(self.head(x), factor=self.enc(x).mean().item())  # <- here


class ArrayNameUsedTwice(Case):
    """Arrays of two tensors bear one name, and nothing is written into either."""

    expect = {"not_in_loss": ENC}

    def forward(self, x):
        array = self.enc(x).detach().numpy()  # <- here
        self.log = [array.mean()]
        array = x.numpy()
        self.log.append(array.mean())
        return self.head(x).mean()


class AddedIntoATensorsArray(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        rows = torch.zeros(4, 3)
        np.add.at(rows.numpy(), [0, 1, 2, 3], self.enc(x).detach().numpy())  # <- here
        return self.head(rows).mean()


class WrittenIntoATensorsArray(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        rows = torch.zeros(4, 3)
        rows.numpy()[:] = self.enc(x).detach().numpy()  # <- here
        return self.head(rows).mean()


class AddedToATensorsArray(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        rows = torch.zeros(4, 3)
        array = rows.numpy()
        array += self.enc(x).detach().numpy()  # <- here
        return self.head(rows).mean()


class SavedAndLoaded(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        file = io.BytesIO()
        np.save(file, self.enc(x).detach().numpy())  # <- here
        file.seek(0)
        return self.head(torch.from_numpy(np.load(file))).mean()


class SortedByAKey(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        scores = self.enc(x).sum(1)
        order = [0, 1, 2, 3]
        order.sort(key=lambda row: scores[row].item())  # <- here
        return self.head(x[order[:2]]).mean()


class InAPartial(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        loss = functools.partial(F.huber_loss, delta=self.enc(x).exp().mean().item())  # <- here
        return loss(self.head(x), torch.zeros(4, 1))


class SetByName(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        setattr(self, "factor", self.enc(x).mean().item())  # <- here  # noqa: B010
        return self.head(x * self.factor).mean()


class YieldedFromASampler(Case):
    expect = {"non_differentiable": ENC}

    def rows(self, x):
        yield from self.enc(x).sum(1).argsort().tolist()  # <- here

    def forward(self, x):
        return self.head(x[list(self.rows(x))[:2]]).mean()


class WrappedInAHelper(Case):
    expect = {"detached": ENC}

    def wrapped(self, h):
        return nn.Parameter(h)  # <- here

    def forward(self, x):
        rows = self.wrapped(self.enc(x))
        return self.head(rows).mean()


class SwappedIntoTheDictionary(Case):
    expect = {"detached": ("enc.weight",)}

    def forward(self, x):
        kept = self.enc.weight
        self.enc._parameters["weight"] = nn.Parameter(kept * 2)  # <- here
        loss = self.head(self.enc(x)).mean()
        self.enc._parameters["weight"] = kept  # type: ignore[assignment]
        return loss


class Settings:
    """What a caller hands down, beside other things."""

    def __init__(self, **given):
        self.given = given


class RoundNumberInAnObject(Case):
    """A number as round as many others is known again by its identity, wherever it was put."""

    expect = {"left_torch": ("power",)}

    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(2.0))

    def settings(self):
        return Settings(power=float(self.power), name="focal")  # <- here

    def loss(self, h, settings):
        options = {key: value for key, value in settings.given.items() if key != "name"}
        return focal(self.head(h), **options)

    def forward(self, x):
        return self.loss(self.enc(x), self.settings())


def focal(h, power):
    return (h.abs() ** power).mean()


class RateOfALayer(Case):
    """A library's own layer hands the number on by position."""

    expect = {"left_torch": ("rate",)}

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))
        self.drop = nn.LeakyReLU()

    def forward(self, x):
        self.drop.negative_slope = self.rate.item()  # <- here
        return self.head(self.drop(self.enc(x))).mean()


class ShapeOfAnother(Case):
    expect = {"unused": ("template",)}

    def __init__(self):
        super().__init__()
        self.template = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x):
        return self.head(self.enc(x)).view_as(self.template).mean()


class KeptFrozen(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        self.bank = nn.Parameter(self.enc(x), requires_grad=False)  # <- here
        return (self.head(x) * self.bank).mean()


class FrozenTable(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        rows = nn.Embedding.from_pretrained(self.enc(x))  # <- here
        return self.head(rows(torch.arange(4))).mean()


class GrownInForward(Case):
    """What stands in a parameter's place is another one, of another shape."""

    expect = {"replaced": ("table",)}

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x):
        if len(self.table) < len(x):
            self.table = nn.Parameter(torch.zeros(len(x), 3))  # <- here
        return self.head(self.enc(x) + self.table).mean()


class WrittenOverByAHypernetwork(Case):
    expect = {"replaced": ("target.weight",)}

    def __init__(self):
        super().__init__()
        self.target = nn.Linear(3, 1)

    def install(self, layer, weight):
        del layer.weight
        layer.weight = weight  # <- here

    def forward(self, x):
        self.install(self.target, self.enc(x)[:1])
        return (self.target(x) + self.head(x)).mean()


class SortedByANumber(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        rows = sorted(x, key=lambda row: float(self.enc(row).sum()))  # <- here
        return self.head(rows[0] + rows[1]).mean()


class Output:
    """What a model returns: a loss, and what is logged."""

    def __init__(self, loss, aux):
        self.loss, self.aux = loss, aux


class ReturnedInADictionary(Case):
    """A metric beside the loss is no way to it, whatever it is returned in."""

    expect = {"not_in_loss": ENC}

    def losses(self, x):
        aux = self.enc(x).pow(2).mean()  # <- here
        return {"loss": self.head(x).mean(), "aux": aux.item()}

    def forward(self, x):
        out = self.losses(x)
        return out["loss"] / 2


class ReturnedInAFilledDictionary(Case):
    expect = {"not_in_loss": ENC}

    def losses(self, x):
        out = {}
        out["loss"] = self.head(x).mean()
        out["aux"] = self.enc(x).pow(2).mean().item()  # <- here
        return out

    def forward(self, x):
        out = self.losses(x)
        return self.losses(x)["loss"] / 2 if isinstance(out, dict) else out


class ReturnedInAnObject(Case):
    expect = {"not_in_loss": ENC}

    def losses(self, x):
        aux = self.enc(x).pow(2).mean()  # <- here
        return Output(loss=self.head(x).mean(), aux=aux.item())

    def forward(self, x):
        out = self.losses(x)
        return out.loss / 2


class OutputsInAList(Case):
    expect = {"not_in_loss": ENC}

    def step(self, row):
        aux = self.enc(row).pow(2).mean()  # <- here
        return {"loss": self.head(row).mean(), "aux": aux.item()}

    def forward(self, x):
        outputs = [self.step(row) for row in x]
        return torch.stack([output["loss"] for output in outputs]).mean()


class ZippedWithTheLosses(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        certain = self.enc(x).sigmoid().mean(1)  # <- here
        values, total = certain.tolist(), 0.0
        for value, row in zip(values, x, strict=True):
            self.last = value
            total = total + self.head(row).mean()
        return total


class CountedInALog(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        aux = self.enc(x).pow(2).mean()  # <- here
        history = [1.0, 2.0]
        history.append(aux.item())
        return self.head(x).sum() / len(history)


class Meter:
    """A running mean, as training scripts keep it."""

    def __init__(self):
        self.sum = self.average = 0.0
        self.count = 0

    def observe(self, value, n):
        """Take a value for ``n`` samples."""
        self.sum += value * n
        self.count += n
        self.average = self.sum / self.count


class CountOfAMeter(Case):
    """One attribute of an object holds the value, the one that is used does not."""

    expect = {"not_in_loss": ENC}

    def forward(self, x):
        aux = self.enc(x).pow(2).mean()  # <- here
        meter = Meter()
        meter.observe(aux.item(), len(x))
        return self.head(x).square().sum() / meter.count


class AssignedAnew(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        aux = self.enc(x).pow(2).mean()  # <- here
        weight = aux.item()
        self.seen = weight
        weight = 0.5
        return self.head(x * weight).mean()


class GuardedAgainstNaN(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        total = 0.0
        for row in x:
            aux = self.enc(row).pow(2).mean()  # <- here
            if not math.isfinite(aux.item()):
                continue
            total = total + self.head(row).mean()
        return total


class KeysOfALog(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        aux = self.enc(x).pow(2).mean(0)
        parts = {"a": self.head(x).mean(), "b": self.head(x).square().mean()}
        log = {name: value.item() for name, value in zip("abc", aux, strict=True)}  # <- here
        return sum(parts[name] for name in log if name in parts)


class ArgumentThatIsNotReturned(Case):
    """A function that is handed the value and returns something else passes nothing on."""

    expect = {"not_in_loss": ENC}

    def scale(self, step, metric, **others):
        self.log = (metric, others)
        return 1.0 / step

    def forward(self, x):
        aux = self.enc(x).pow(2).mean()  # <- here
        return self.head(x).mean() * self.scale(3, aux.item(), extra=aux.item())


class SetUpByAMethod(Case):
    """An object of a library's holds what a method of it was given, in a statement of its own."""

    expect = {"left_torch": ENC}

    def forward(self, x):
        chance = random.Random()  # noqa: S311 -- it keeps no secret
        chance.seed(self.enc(x).mean().item())  # <- here
        return self.head(x * (1 + chance.random())).mean()


class ClosureHandedOn(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        rate = self.enc(x).mean().item()  # <- here

        def slope(y):
            return -rate * y

        return self.head(x * sum(map(slope, [1.0, 2.0]))).mean()


class AddedUpFromInside(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        total = 1.0

        def visit(row):
            nonlocal total
            total += float(self.enc(row).square().mean())  # <- here

        for row in x:
            visit(row)
        return self.head(x).mean() * total


class WrappedInVariable(Case):
    expect = {"detached": ENC}

    def kept(self, h):
        return torch.autograd.Variable(h.data)  # <- here

    def forward(self, x):
        return self.head(self.kept(self.enc(x))).mean()


class First:
    """One of two classes whose methods bear one name, and return different things."""

    def weight_of(self, value):
        """Return the value."""
        return value, 1.0


class Second:
    """The other one."""

    def weight_of(self, value):
        """Return something else first."""
        return 1.0, {"value": value}


class OneOfTwoMethods(Case):
    expect = {"left_torch": ENC}

    def forward(self, x):
        weight, _ = First().weight_of(self.enc(x).mean().item())  # <- here
        return self.head(x * weight).mean()


class PrintedInABranch(Case):
    expect = {"not_in_loss": ENC}

    def forward(self, x):
        aux = self.enc(x).pow(2).mean()  # <- here
        if aux.item() > 1e9:
            self.warned = True
        return self.head(x).mean()


class AttentionWeightsAlone(Case):
    """Of two results of one call the one that a parameter leads to is dropped."""

    expect = {"not_in_loss": ("mix.out_proj.weight", "mix.out_proj.bias")}

    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(3, 1)

    def forward(self, x):
        h = self.enc(x)
        _, weights = self.mix(h, h, h)  # <- here
        return (self.head(h) * weights).pow(2).mean()


class SampledFromCategories(Case):
    expect = {"non_differentiable": ENC}

    def forward(self, x):
        kinds = torch.distributions.Categorical(logits=self.enc(x)).sample()  # <- here
        return self.head(F.one_hot(kinds, 3).float()).mean()


class WrittenIntoIntegers(Case):
    expect = {"non_differentiable": ENC}

    def forward(self, x):
        pixels = torch.zeros(4, 3, dtype=torch.uint8)
        pixels[:2] = 255 * self.enc(x)[:2]  # <- here
        return self.head(pixels.float()).mean()


class ShallowCopy(Case):
    expect = {"detached": ENC}

    def forward(self, x):
        state = torch.tanh(self.enc(x))
        start = copy.copy(state)  # <- here
        return self.head(start).mean()


class SecondBackwardForOthers(Case):
    """Of two calls the one that leads to the parameter is shown."""

    expect = {"not_requested": HEAD}

    def forward(self, x):
        h = self.enc(x)
        return h.detach().requires_grad_(), self.head(h).mean()

    def backward(self, loss):
        other, last = loss
        other.sum().backward(inputs=[other])
        last.backward(inputs=list(self.enc.parameters()))  # <- here


class FrozenForOnePass(Case):
    """A GAN's step: what runs while parameters are frozen for the other optimizer cuts nothing off."""

    expect = {"detached": ENC}

    def forward(self, x):
        self.enc.requires_grad_(requires_grad=False)
        other = self.head(self.enc(x)).mean()
        self.enc.requires_grad_()
        h = self.enc(x).detach()  # <- here
        return other, self.head(h).relu().mean()

    def backward(self, loss):
        sum(loss).backward()


class ThawedAfterOnePass(FrozenForOnePass):
    """The other way round: the pass with gradients comes first."""

    def forward(self, x):
        h = self.head(self.enc(x).detach()).mean()  # <- here
        self.enc.requires_grad_(requires_grad=False)
        other = self.head(self.enc(x)).mean()
        self.enc.requires_grad_()
        return h, other


class GanWithTheCriticFirst(Case):
    """Of two cuts the one on the way to the loss that the own optimizer lowers is named."""

    expect = {"detached": ENC}
    critic_first = True

    def forward(self, x):
        return x

    def backward(self, loss):
        steps = [self.critic_step, self.generator_step]
        for step in steps if self.critic_first else steps[::-1]:
            step(loss)

    def critic_step(self, x):
        self.head(self.enc(x).detach()).mean().backward()
        torch.optim.SGD(self.head.parameters(), 0.1).step()

    def generator_step(self, x):
        h = self.enc(x).detach()  # <- here
        self.head(h).relu().mean().mul(2).backward()
        torch.optim.SGD(self.enc.parameters(), 0.1).step()


class GanWithTheGeneratorFirst(GanWithTheCriticFirst):
    """The same in the other order."""

    critic_first = False

    def generator_step(self, x):
        h = self.enc(x).detach()  # <- here
        self.head(h).relu().mean().mul(2).backward()
        torch.optim.SGD(self.enc.parameters(), 0.1).step()


class SampledWithANumberForItsWidth(Case):
    """The width is made as large as the mean, and comes from it no more than that."""

    expect = {"non_differentiable": ENC}

    def forward(self, x):
        action = torch.distributions.Normal(self.enc(x), 1.0)
        return self.head(
            action.sample()  # <- here
        ).mean()


class WrappedByNameInAHelper(Case):
    """The value had a name before it was wrapped, and its reader is elsewhere."""

    expect = {"detached": ENC}

    def made(self):
        mixed = (self.enc.weight @ self.enc.weight + self.enc.bias).tanh()
        return nn.Parameter(mixed)  # <- here

    def used(self, h, weight):
        return h @ weight

    def forward(self, x):
        weight = self.made()
        return self.head(self.used(x, weight)).mean()


class TiedByAHelper(Case):
    """Another module's parameter is put in the place of one, by code that does not know the model."""

    expect = {"replaced": ("inner.weight",)}

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def put(self, module, name, value):
        setattr(module, name, value)  # <- here

    def forward(self, x):
        self.put(self.inner, "weight", self.enc.weight)
        return self.head(self.inner(self.enc(x))).mean()


class RestoredInTheStep(TiedByAHelper):
    """A whole module is put in the place of another."""

    expect = {"replaced": ("inner.weight", "inner.bias")}

    def forward(self, x):
        stored = io.BytesIO()
        torch.save(self.inner, stored)
        stored.seek(0)
        self.put(self, "inner", torch.load(stored, weights_only=False))
        return self.head(self.inner(self.enc(x))).mean()


class DetachedBeforeATransform(Case):
    """What goes into `torch.func` cannot be followed, but that it was detached before has been seen."""

    expect = {"detached": ENC}

    def forward(self, x):
        state = self.enc.state_dict()  # <- here
        rows = torch.vmap(lambda row: torch.func.functional_call(self.enc, state, (row,)))(x)
        return self.head(rows).mean()


class OffsetOfADerivative(Case):
    """The gradient of an energy does not depend on what is only added to it."""

    expect = {"not_in_loss": ("head.bias",)}
    label = "drops out of a derivative"

    def forward(self, x):
        x = x.clone().requires_grad_()
        energy = self.head(torch.tanh(self.enc(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0].square().mean()  # <- here


class DetachedInsideOfATransform(Case):
    """What the transform wraps is seen by nobody; what was detached for a log is no cut."""

    expect = {"detached": ENC}

    def forward(self, x):
        held = {name: p.detach() for name, p in self.enc.named_parameters()}  # <- here

        def energy(parameters, row):
            return torch.func.functional_call(self.enc, parameters, (row,)).exp().sum()

        slopes = torch.vmap(torch.func.grad(energy, argnums=1), in_dims=(None, 0))(held, x)
        return self.head(slopes).mean()


class LoggedBeforeATransform(DetachedInsideOfATransform):
    """Whether what the transform was given was cut off cannot be told from what was logged."""

    expect = {"undetermined": ENC}

    def forward(self, x):
        self.seen = self.enc.weight.detach().norm() + self.enc.bias.detach().norm()
        state = dict(self.enc.named_parameters())

        def energy(parameters, row):
            out = torch.func.functional_call(self.enc, parameters, (row,))
            return out.detach().exp().sum() * row.sum()

        slopes = torch.vmap(torch.func.grad(energy, argnums=1), in_dims=(None, 0))(state, x)
        return self.head(slopes).mean()


class LoadedIntoAnother(Case):
    """A module that is made anew in every pass, and given the values of the registered one."""

    expect = {"replaced": ENC}

    def forward(self, x):
        enc = nn.Linear(3, 3)
        enc.load_state_dict(self.enc.state_dict())  # <- here
        return self.head(enc(x)).mean()


class LoadedOfAFilteredMapping(LoadedIntoAnother):
    """The parameters themselves are loaded: nothing but the call drops their history."""

    def forward(self, x):
        enc = nn.Linear(3, 3)
        enc.load_state_dict(dict(self.enc.named_parameters()))  # <- here
        return self.head(enc(x)).mean()


class LoadedInPart(LoadedIntoAnother):
    """Of a pruned layer some rows are loaded into a smaller one: what detached them is not to blame."""

    def forward(self, x):
        rows = torch.tensor([0, 2, 1])
        weight, bias = self.enc.weight.detach(), self.enc.bias.detach()
        enc = nn.Linear(3, 3)
        enc.load_state_dict({"weight": weight[rows], "bias": bias[rows]})  # <- here
        return self.head(enc(x)).mean()


class StackedInInit(Case):
    """The values of a submodule are taken by the module around it, before the pass."""

    expect = {"detached": ("enc.weight",)}
    rows: torch.Tensor

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(3, 3, bias=False)
        self.register_buffer("rows", torch.cat([self.enc.weight.data, torch.ones(1, 3)]))  # <- here

    def forward(self, x):
        return self.head(x @ self.rows.T[:, :3]).mean()


# More that is healthy ------------------------------------------------------------------------------


class EmptiedByAHook(Case):
    expect = {"cleared": ENC}

    def __init__(self):
        super().__init__()
        for parameter in self.enc.parameters():
            parameter.register_post_accumulate_grad_hook(self.fuse)

    def fuse(self, parameter):
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)
        del parameter.grad  # <- here

    def forward(self, x):
        return self.head(self.enc(x)).mean()


class ZeroedBetweenTwoPasses(Case):
    def forward(self, x):
        return self.head(self.enc(x)).mean()

    def backward(self, loss):
        loss.backward(retain_graph=True)
        self.zero_grad()
        loss.backward()


class AssignedByHand(Case):
    def forward(self, x):
        return self.head(self.enc(x)).mean()

    def backward(self, loss):
        parameters = list(self.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad


class AccumulatedByHand(Case):
    def forward(self, x):
        return self.head(self.enc(x)).mean()

    def backward(self, loss):
        loss.backward()
        total = [parameter.grad.clone() for parameter in self.parameters()]
        self.zero_grad()
        for parameter, grad in zip(self.parameters(), total, strict=True):
            parameter.grad = grad * 2


class HalfStepped(Case):
    """An optimizer that steps before another's backward does not take its gradients away."""

    def forward(self, x):
        return self.enc(x).mean(), self.head(x).mean()

    def backward(self, loss):
        for module, part in zip((self.enc, self.head), loss, strict=True):
            optimizer = torch.optim.SGD(module.parameters(), 0.1)
            part.backward()
            optimizer.step()
            optimizer.zero_grad()


def all_cases() -> list[type[Case]]:
    """Return every case in this file, in its order."""
    return [
        value
        for value in globals().values()
        if isinstance(value, type) and issubclass(value, Case) and value is not Case
    ]
