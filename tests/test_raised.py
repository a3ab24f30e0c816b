"""Errors of torch's: they pass through unchanged, with a note on the root cause's line and the way out."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import linecache
import logging
import random
import re
import textwrap
import warnings
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from gradwatch import Watcher, diagnose
from gradwatch._words import shown_path


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


@torch.library.custom_op("gradwatch_tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    """Square a tensor, without a derivative."""
    return x * x


class OperatorWithoutFormula(Net):
    words = "no autograd formula was registered"
    advice = "register_autograd"

    def forward(self, x):
        h = torch.ops.gradwatch_tests.square(self.enc(x))  # <- here
        return self.head(h).mean()


class OperatorCalledDirectly(Net):
    words = "no autograd formula was registered"
    advice = "register_autograd"

    def forward(self, x):
        h = square(self.enc(x))  # <- here
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


class ViewOfSavedChanged(Net):
    words = "modified by an inplace operation"
    advice = "write into a `.clone()` of it"

    def forward(self, x):
        h = torch.sigmoid(self.enc(x))
        first = h[:, 0]
        out = self.head(h)
        first.zero_()  # <- here
        return out.mean()


class WeightsDecayedTooEarly(Net):
    words = "modified by an inplace operation"
    advice = "use what `mul` returns, or change it after the backward pass"

    def run(self, x):
        loss = self.head(torch.relu(self.enc(x))).mean()
        with torch.no_grad():
            self.head.weight.mul_(0.9)  # <- here
        loss.backward()


class HiddenStateKept(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 3)
        self.hidden = torch.zeros(4, 3)

    def forward(self, x):
        self.hidden = self.cell(x, self.hidden)  # <- here
        return self.head(self.hidden).mean()


class MemoryBank(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.memory = []

    def forward(self, x):
        self.memory.append(torch.sigmoid(self.enc(x)))  # <- here
        return self.head(torch.stack(self.memory)).mean()


CACHE: dict[str, torch.Tensor] = {}


def positions(module, key):
    """Return what was computed once."""
    if key not in CACHE:
        CACHE[key] = module.enc.weight.exp()  # <- here too
    return CACHE[key]


class GradOfAFreedGraph(Net):
    words = "Trying to backward through the graph a second time"
    advice = "retain_graph=True"

    def run(self, x):
        x = x.clone().requires_grad_()
        energy = self.head(torch.sigmoid(self.enc(x))).sum()
        (force,) = torch.autograd.grad(energy, x)  # <- here
        (energy.pow(2) + force.pow(2).sum()).backward()


class ViewsOfOneTensor(Net):
    words = "is being modified inplace"
    advice = "in place of `x += y`"

    def forward(self, x):
        first, second = self.enc(x).unbind(0)[:2]
        first += 1  # <- here
        return self.head(first + second).mean()


class NumpyOfATracked(Net):
    words = "Can't call numpy() on Tensor that requires grad"
    advice = ".detach().numpy()"

    def forward(self, x):
        return self.enc(x).numpy()  # <- here


class GradientOfIntegers(Net):
    words = "nly Tensors of floating point"
    advice = "keep the value in floating point"

    def forward(self, x):
        return self.enc(x).argmax(1).requires_grad_()  # <- here


class CopyOfAResult(Net):
    words = "Only Tensors created explicitly by the user"
    advice = ".detach().clone()"

    def forward(self, x):
        return __import__("copy").deepcopy(self.enc(x))  # <- here


class NotInTheGraph(Net):
    words = "appears to not have been used in the graph"
    advice = "allow_unused=True"

    def run(self, x):
        loss = self.head(x).mean()
        torch.autograd.grad(loss, self.enc.weight)  # <- here


class TooFew(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        return grad


class WrongNumberOfGradients(Net):
    words = "returned an incorrect number of gradients"
    advice = "return one value for each argument"

    def forward(self, x):
        return self.head(TooFew.apply(self.enc(x), 2.0)).mean()  # <- here


class WrongShape(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.mean(0)

    @staticmethod
    def backward(ctx, grad):
        return grad[:1]


class WrongShapeOfAGradient(Net):
    words = "returned an invalid gradient"
    advice = "return each gradient in the shape of the argument"

    def forward(self, x):
        return WrongShape.apply(self.enc(x)).mean()  # <- here


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * 2


class TwiceDifferentiated(Net):
    words = "marked with @once_differentiable"
    advice = "do without `create_graph=True`"

    def forward(self, x):
        return Once.apply(self.enc(x)).pow(2).mean()  # <- here

    def run(self, x):
        (grad,) = torch.autograd.grad(self(x), self.enc.weight, create_graph=True)
        grad.sum().backward()


class CountedWithWeights(Net):
    words = "is not implemented"
    advice = "use a differentiable operation"

    def forward(self, x):
        cells = torch.tensor([0, 1, 1, 0])
        return torch.bincount(cells, self.enc(x)[:, 0]).sum()  # <- here


class CachedProperty(Net):
    words = "backward through the graph a second time"
    advice = "compute it anew in every step"
    steps = 2

    def run(self, x):
        (x @ self.basis).mean().backward()

    @cached_property
    def basis(self):
        return torch.tanh(self.enc.weight)  # <- here


class ComplexLoss(Net):
    words = "only for real scalar outputs"
    advice = "take its real part"

    def forward(self, x):
        spectrum = torch.fft.fft(self.enc(x))
        return (spectrum * spectrum.conj()).mean()  # <- here


class ReentrantWithInputs(Net):
    words = "an `inputs` parameter"
    advice = "pass `use_reentrant=False`"

    def run(self, x):
        x.requires_grad_()
        checkpoint(self.enc, x, use_reentrant=True).mean().backward(inputs=[x])  # <- here


class WrittenAfterHarmlessWrites(Net):
    words = "modified by an inplace operation"
    advice = "use what `masked_fill` returns"

    def forward(self, x):
        other = torch.zeros(4, 3)
        other += 1
        h = self.enc(x)
        h += other
        h = h.softmax(-1)
        h.masked_fill_(x > 0, 0.0)  # <- here
        return self.head(h).mean()


class DroppedInPlace(Net):
    words = "modified by an inplace operation"
    advice = "pass `inplace=False`"

    def forward(self, x):
        h = F.relu(self.enc(x), inplace=True)
        h = torch.tanh(self.enc(h))
        h = F.dropout(h, 0.3, inplace=True)  # <- here
        return self.head(h).mean()


class WrittenThroughAnotherView(Net):
    words = "modified by an inplace operation"
    advice = "write `x = x * y` in place of `x *= y`"

    def forward(self, x):
        h = torch.zeros(4, 3)
        h *= 0.5
        h = torch.softmax(self.enc(x), -1)
        first = h[:, :1]
        first *= 0.5  # <- here
        return self.head(h).mean()


class Renormed(Net):
    words = "modified by an inplace operation"
    advice = "weight.clone()"

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, max_norm=0.1)

    def forward(self, x):
        all_rows = self.table.weight @ self.enc(x).T
        rows = self.table(torch.arange(4))  # <- here
        return self.head(rows).mean() + all_rows.mean()


class VectorFromALoss(Net):
    words = "can be implicitly created only for scalar outputs"
    advice = "reduce it to one number"

    def forward(self, x):
        return F.mse_loss(self.head(self.enc(x)), x[:, :1], reduction="none")  # <- here


class PenaltyOfADetachedPoint(Net):
    words = "appears to not have been used in the graph"
    advice = "with respect to the tensor that goes into the output"

    def forward(self, x):
        point = (x * 0.5).requires_grad_()
        score = self.head(self.enc(point.data))  # <- here
        (slope,) = torch.autograd.grad(score.sum(), point, create_graph=True)
        return slope.square().mean()


class PointWithoutGradient(Net):
    words = "One of the differentiated Tensors does not require grad"
    advice = "`.requires_grad_()` on the input"

    def forward(self, x):
        (slope,) = torch.autograd.grad(self.head(x).sum(), x, create_graph=True)  # <- here
        return slope.mean()


class FeatureFromInferenceMode(Net):
    words = "Inference tensors cannot be saved for backward"
    advice = "make it under `torch.no_grad()`"

    def features(self, x):
        with torch.inference_mode():
            return self.enc(x)  # <- here

    def forward(self, x):
        return self.head(self.features(x)).mean()


class CopiedWithAFeatureOnIt(Net):
    words = "Only Tensors created explicitly by the user"
    advice = "do not keep the result"

    def forward(self, x):
        self.last = self.enc(x)  # <- here
        copy.deepcopy(self)


class SecondDerivativeOfAttention(Net):
    words = "is not implemented"
    advice = "use a differentiable operation"

    def forward(self, x):
        x = x[None, None].requires_grad_()
        h = F.scaled_dot_product_attention(self.enc(x), x, x)  # <- here
        (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        return slope.square().mean()


class OptimizedResult(Net):
    words = "can't optimize a non-leaf Tensor"
    advice = "call `requires_grad_()` last"

    def run(self, x):
        latent = torch.randn(3, requires_grad=True) * 0.1  # <- here
        torch.optim.SGD([latent], 0.1)


class LossOfAFloat(Net):
    words = "'float' object has no attribute 'backward'"
    advice = "take `.item()` for the log only"

    def forward(self, x):
        total = 0.0
        for row in x:
            if row.sum() > -100:
                total += self.head(self.enc(row)).mean().item()  # <- here
        return total


class GradOfAResult(Net):
    words = "'NoneType' object has no attribute 'sign'"
    advice = "call `.retain_grad()`"

    def run(self, x):
        x = x.requires_grad_() * 1.0  # <- here
        self.head(self.enc(x)).mean().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x.grad.sign()


class FlagOfAResult(Net):
    words = "you can only change requires_grad flags of leaf variables"
    advice = "write `x = x.detach()`"

    def forward(self, x):
        h = self.enc(x)
        h.requires_grad = False  # <- here
        return self.head(h).mean()


class ViewMadeWithoutGradient(Net):
    words = "view was created in no_grad mode"
    advice = "make the view where gradients are on"

    def forward(self, x):
        h = self.enc(x)
        with torch.no_grad():
            first = h[:, 0]  # <- here
        first += 1
        return self.head(h).mean()


class HookOfAnotherShape(Net):
    words = "has changed the size of value"
    advice = "return a gradient like the one that came"

    def forward(self, x):
        h = self.enc(x)
        h.register_hook(lambda gradient: gradient.sum(0))  # <- here
        return self.head(h).mean()


class NumberInVmap(Net):
    words = "calling .item() on a Tensor"
    advice = "do without `.item()`"

    def forward(self, x):
        h = self.head(self.enc(x))
        return torch.vmap(lambda row: row * min(1.0, row.abs().sum().item()))(h).mean()  # <- here


class GradOfAVectorFunction(Net):
    words = "to return a scalar"
    advice = "reduce it to one number inside of the function"

    def forward(self, x):
        return torch.func.grad(lambda row: self.head(row) * torch.ones(2))(x[0]).mean()  # <- here


class WrittenBesideAnUntrackedCopy(Net):
    words = "modified by an inplace operation"
    advice = "in place of `x += y`"

    def forward(self, x):
        point = self.enc(x).view(2, 2, 3)
        start = torch.empty_like(point)
        start.copy_(point.detach())  # of the same shape, and no part of the graph
        start -= start.amin()
        offset = self.head(point)
        point += 0.1 * offset  # <- here
        return point.mean()


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class ArgumentOfAFunctionChanged(Net):
    words = "modified by an inplace operation"
    advice = "use what `clamp` returns, or change it after the backward pass"

    def forward(self, x):
        h = self.enc(x)
        swished = Swish.apply(h)
        swished *= 1.1
        return self.head(swished + h.clamp_(-6, 6)).mean()  # <- here


class StateKeptWithItsGraph(Net):
    words = "modified by an inplace operation"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 3)
        self.state = torch.zeros(4, 3)
        self.optimizer = torch.optim.SGD(self.parameters(), 0.1)

    def run(self, x):
        h = self.cell(x, self.cell(x, self.state))
        self.state = h  # <- here
        self.head(h).mean().backward(retain_graph=True)
        self.optimizer.step()


class RunningBuffer(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 3

    def __init__(self):
        super().__init__()
        self.memory: torch.Tensor
        self.register_buffer("memory", torch.zeros(3))

    def forward(self, x):
        h = self.head(self.enc(x) * self.memory.exp()).mean()
        self.memory = self.memory + torch.tanh(self.enc(x)).sum(0)  # <- here
        return h


class CachedByLength(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.scales = functools.lru_cache(self.scale)

    def scale(self, length):
        return torch.tanh(self.enc.weight[:length])  # <- here

    def forward(self, x):
        return self.head(F.linear(x, self.scales(3))).mean()


class GatheredLosses(Net):
    words = "can be implicitly created only for scalar outputs"
    advice = ".mean()"

    def forward(self, x):
        losses = torch.stack([self.head(self.enc(part)).mean() for part in x.split(2)])  # <- here
        return losses / 2.0


class MaskMadeDuringEvaluation(Net):
    words = "Inference tensors cannot be saved for backward"
    advice = "torch.no_grad()"

    def run(self, x):
        with torch.inference_mode():
            mask = torch.ones(5).cumsum(0)  # <- here
        self.head(self.enc(x) * mask[:3]).mean().backward()


class NumpyInsideOfALibrary(Net):
    words = "Can't call numpy() on Tensor that requires grad"
    advice = ".detach().numpy()"

    def forward(self, x):
        return np.linalg.norm(self.enc(x))  # <- here


def slope(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


class SlopeOfTheWrongPoint(Net):
    words = "appears to not have been used in the graph"
    advice = "allow_unused=True"

    def forward(self, x):
        x, t = x.clone().requires_grad_(), torch.ones(4, 3, requires_grad=True)
        by_t = slope(torch.tanh(self.enc(t)) + x, t)
        return slope(by_t, x).mean()  # <- here


class NormOfAClone(Net):
    words = "appears to not have been used in the graph"
    advice = "allow_unused=True"

    def run(self, x):
        loss = self.head(torch.tanh(self.enc(x))).mean()
        weight = self.enc.weight.clone()  # <- here
        torch.autograd.grad(loss, weight)


class SwitchedOffForGood(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "gradient mode on"

    def look(self, x):
        torch.set_grad_enabled(False)  # <- here
        return self.enc(x).mean()

    def forward(self, x):
        try:
            return self.head(self.enc(x) * self.look(x)).mean()
        finally:
            torch.set_grad_enabled(True)


class CachedByAnEvaluation(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "gradient mode on"
    cached = None

    def encode(self, x):
        return self.head(torch.tanh(self.enc(x)))

    def states(self, x):
        if self.cached is None:
            self.cached = self.encode(x)  # <- here
        return self.cached

    @torch.no_grad()
    def evaluate(self, x):
        return self.states(x).std().item()

    def forward(self, x):
        self.evaluate(x)
        return self.states(x).mean()


class Features:
    """What hooks collect, in an object that is no module."""

    def __init__(self, layer):
        self.maps: dict[str, list[Any]] = {"enc": []}
        layer.register_forward_hook(self.hook("enc"))

    def hook(self, name):
        def collect(_, __, output):
            self.maps[name].append(output)  # <- here

        return collect

    def all(self):
        return [one for maps in self.maps.values() for one in maps]


def spread(one, many):
    return (one - many).pow(2).mean()


class CollectedByAnObject(Net):
    words = "Trying to backward through the graph a second time"
    advice = "(`Features.maps`)"
    steps = 2
    guilty = Features

    def __init__(self):
        super().__init__()
        self.helpers = {"features": Features(self.enc)}
        self.register_buffer("norm", torch.ones(3))

    def forward(self, x):
        out = self.head(torch.sigmoid(self.enc(x))).mean()
        return out + sum(spread(one, self.norm) for one in self.helpers["features"].all())


class Pool:
    """Takes what it is handed, and nothing else."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)


class HandedToAPool(Net):
    words = "Trying to backward through the graph a second time"
    advice = "(`Pool.items`)"
    steps = 2

    def __init__(self):
        super().__init__()
        self.wrapped = [[Pool()]]

    def run(self, x):
        pool = self.wrapped[0][0]
        chances = self.head(self.enc(x)).sigmoid()
        pool.push(chances.mean())  # <- here
        sum(one * 2 for one in pool.items).backward()


class ProposalThatRequiresGrad(Net):
    words = "Trying to backward through the graph a second time"
    advice = "a tensor that requires grad goes in here, and no parameter"

    def run(self, x):
        found = torch.full((1, 3), 0.4, requires_grad=True)
        points = torch.cat([x, found])  # <- here
        values = torch.sin(points).sum(1)
        for _ in range(2):
            (self.head(torch.tanh(self.enc(points.detach())))[:, 0] * values).sum().backward()


class JacobianInsideVmap(Net):
    words = "inside of a function being transformed"
    advice = "use `torch.func`"

    def slopes(self, x):
        return torch.autograd.functional.jacobian(self.enc, x).sum()  # <- here

    def forward(self, x):
        return torch.vmap(self.slopes)(x).mean()


class InferenceInAHelper(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "`enable_grad` does not lift inference mode"

    @contextlib.contextmanager
    def evaluation(self):
        with torch.inference_mode():  # <- here
            yield

    @torch.enable_grad()
    def probe(self, h):
        self.head(h).mean().backward()

    def run(self, x):
        with self.evaluation():
            self.probe(self.enc(x))


class ContextOfAHelper(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "the context is made at"

    def context(self):
        return torch.no_grad() if self.training else contextlib.nullcontext()  # <- here

    def forward(self, x):
        h = self.enc(x)
        with self.context():
            return self.head(h).mean()


class ResultDeclaredTrainable(Net):
    words = "a view of a leaf Variable that requires grad"
    advice = "make it without `requires_grad=True`"

    def empty(self, x):
        return torch.zeros(*x.shape, requires_grad=True)  # <- here

    def forward(self, x):
        out = self.empty(x)
        for row, h in enumerate(self.enc(x)):
            out[row] = h
        return self.head(out).mean()


class PlusItsOwnTranspose(Net):
    words = "refer to a single memory location"
    advice = "`.clone()` what is read"

    def forward(self, x):
        h = self.enc(x)[:3].clone()
        h += h.t()  # <- here
        return self.head(h).mean()


class AttackThroughNumpy(Net):
    words = "appears to not have been used in the graph"
    advice = "its values leave the graph here"

    def simulated(self, x):
        return torch.from_numpy(np.cos(x.detach().numpy()))  # <- here

    def run(self, x):
        x = x.clone().requires_grad_()
        loss = self.head(self.enc(self.simulated(x * 2.0))).mean()
        torch.autograd.grad(loss, x)


class PhaseOfAnEigenvector(Net):
    words = "so it is ill-defined"
    advice = "what does not change with the phase"

    def vectors(self):
        return torch.linalg.eig(self.enc.weight)[1]

    def forward(self, x):
        harmless = self.vectors().abs().sum()
        return harmless + self.vectors().real.pow(3).sum()  # <- here


class ShortenedThroughData(Net):
    words = "but expected shape compatible with"
    advice = "put a new parameter in its place"

    def run(self, x):
        held = self.head.weight.expand_as(self.head.weight).grad_fn.next_functions[0][0]
        self.head.weight.data = self.head.weight.data[:, :2]  # <- here
        F.linear(self.enc(x)[:, :2], self.head.weight).mean().backward()
        del held


class Shifted(torch.distributions.Transform, nn.Module):
    """A learned transform that remembers its last inverse where it is asked to."""

    domain = codomain = torch.distributions.constraints.real
    bijective = True

    def __init__(self, cache_size):
        nn.Module.__init__(self)
        torch.distributions.Transform.__init__(self, cache_size=cache_size)
        self.shift = nn.Parameter(torch.zeros(3))

    __hash__ = nn.Module.__hash__

    def _call(self, x):
        return x + self.shift

    def _inverse(self, y):
        return torch.sinh(y - self.shift)


class RememberedByALibrary(Net):
    words = "Trying to backward through the graph a second time"
    advice = "the layer is made here"
    steps = 2

    def __init__(self):
        super().__init__()
        self.shifted = nn.ModuleList(Shifted(size) for size in (0, 1))  # <- here
        self.points = torch.ones(4, 3)

    def forward(self, x):
        shifted: Any = self.shifted[1]
        return self.head(torch.tanh(shifted.inv(self.points) + x)).mean()


class ReentrantWithAClosure(Net):
    words = "Trying to backward through the graph a second time"
    advice = "pass `use_reentrant=False`"

    def around(self, reference):
        return lambda h: self.head(torch.tanh(h * reference.exp()))

    def forward(self, x):
        h = reference = torch.tanh(self.enc(x))
        out = [
            checkpoint(self.around(reference), h, use_reentrant=True)  # <- here
            for _ in range(2)
        ]
        return torch.cat(out).mean()


class AskedForWithoutGradients(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "it was asked for by the call at"

    def embed(self, x, *, track):
        with torch.set_grad_enabled(track):
            return self.head(self.enc(x))

    def forward(self, x):
        self.embed(x, track=True)
        return self.embed(x, track=False).mean()  # <- here


class AttackOnAnArray(Net):
    words = "appears to not have been used in the graph"
    advice = "its values leave the graph here"

    def run(self, x):
        x = x.clone().requires_grad_()
        array = x.detach().numpy()  # <- here
        torch.autograd.grad(self.head(self.enc(torch.as_tensor(array[::2]))).mean(), x)


class VectorsOnTheModule(Net):
    words = "Only Tensors created explicitly by the user"
    advice = "do not keep the result of a computation"

    def __init__(self):
        super().__init__()
        left, _, right = torch.linalg.svd(self.enc.weight)  # <- here
        self.left, self.right = left, right

    def run(self, x):
        copy.deepcopy(self)(x)


class ClosureForAScaler(Net):
    words = "Closure use is not currently supported"
    advice = "call `optimizer.step(closure)` itself"

    def run(self, x):
        scaler = torch.amp.GradScaler("cpu")
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scaler.scale(self.head(self.enc(x)).mean()).backward()
        scaler.step(optimizer, closure=lambda: None)  # <- here


class PenaltyOverATable(Net):
    words = "does not support dense gradients"
    advice = "use only the rows that are looked up"

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 3, sparse=True)

    def penalty(self):
        return self.table.weight.pow(2).sum()  # <- here

    def run(self, x):
        rows = self.table(torch.arange(4))
        optimizer = torch.optim.SparseAdam([self.table.weight])
        (self.head(self.enc(x) * rows).mean() + self.penalty()).backward()
        optimizer.step()


class ResultsForAnOptimizer(Net):
    words = "can't optimize a non-leaf Tensor"
    advice = "make it a leaf"

    def value(self, name):
        return self.get_parameter(name).exp()

    def run(self, x):
        given = [self.value(name) for name, _ in self.named_parameters()]  # <- here
        torch.optim.Adam(given, lr=0.1)


class RoundedInPlaceOfData(Net):
    words = "must be floating point or complex dtype"
    advice = "keep rounded values in floating point"

    def run(self, x):
        rounded = self.enc.weight.detach().round()
        self.enc.weight.data = rounded.to(torch.int8)  # <- here


class CountsInsideOfGrad(Net):
    words = "would mutate a captured Tensor"
    advice = "hand the tensor in and return it"
    calls: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def energy(self, x):
        self.calls += 1  # <- here
        return self.head(self.enc(x)).mean()

    def run(self, x):
        torch.func.grad(self.energy)(x)


class BackwardInsideOfAHook(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "compute it under `with torch.enable_grad():`"

    def again(self, module, *_):
        del module
        loss = self.head(torch.ones(4, 3)).sum()  # <- here
        loss.backward()

    def forward(self, x):
        handle = self.enc.register_full_backward_hook(self.again)
        try:
            h = self.enc(x.requires_grad_())
            loss = self.head(h).mean()
            loss.backward()
        finally:
            handle.remove()
        return loss


class OneOfSeveralOutputs(Net):
    words = "element 1 of tensors does not require grad"
    advice = "leave out those for which `tensor.requires_grad` is False"

    def stage(self, x):
        count = (x > 0).sum().float()  # <- here
        return self.head(self.enc(x)).mean(), count

    def run(self, x):
        torch.autograd.backward(self.stage(x))


class ResultInAGroup(Net):
    words = "can't optimize a non-leaf Tensor"
    advice = "make it a leaf"

    def __init__(self):
        super().__init__()
        scale = torch.ones(3, requires_grad=True)
        self.scale = scale * 2  # <- here

    def run(self, x):
        groups = [{"params": [self.enc.weight]}]
        groups.append({"params": [self.scale]})
        torch.optim.SGD(groups, lr=0.1)


@torch.library.custom_op("gradwatch_tests::shrink", mutates_args=())
def shrink(x: torch.Tensor, by: float, sign: bool) -> torch.Tensor:  # noqa: FBT001
    """Shrink a tensor, with a derivative that forgets an option."""
    return x * by if sign else x.abs() * by


def shrunk(ctx, grad):
    if ctx.by:
        return grad * ctx.by, None  # <- here
    return grad, None, None


def remember(ctx, inputs, output):
    del output
    ctx.by = inputs[1]


shrink.register_autograd(shrunk, setup_context=remember)


class OptionWithoutAGradient(Net):
    words = "returned an incorrect number of gradients"
    advice = "return one value for each argument"
    guilty = shrunk

    def forward(self, x):
        return shrink(self.head(self.enc(x)), 0.5, sign=True).mean()


class IntoAPreallocatedTensor(Net):
    words = "arguments don't support automatic differentiation"
    advice = "call it without `out=`"

    def forward(self, x):
        return torch.add(self.enc(x), 1, out=torch.empty(4, 3)).mean()  # <- here


class NothingToRetain(Net):
    words = "can't retain_grad on Tensor"
    advice = "look for a `detach` or `no_grad`"

    def forward(self, x):
        h = self.enc(x).detach()  # <- here
        h.retain_grad()
        return self.head(h).mean()


class OverwrittenAfterItWasRead(Net):
    words = "modified by an inplace operation"
    advice = "write into a `.clone()` of it"

    def forward(self, x):
        scores = self.enc(x) @ self.enc(x).T
        scores[:, 0] = -1e4  # before anything needs it
        weights = scores.softmax(-1)
        out = weights @ x
        weights[:, 0] = 0  # <- here
        return self.head(out).mean()


class ParameterClamped(Net):
    words = "modified by an inplace operation"
    advice = "use what `clamp` returns"

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.seen = torch.tensor(0.0)

    def forward(self, x):
        out = (self.head(self.enc(x)) / self.temperature).mean()
        self.seen.mul_(0.9)  # of the same shape, and no part of the graph
        with torch.no_grad():
            self.temperature.clamp_(0.1, 1.0)  # <- here
        return out


class SharedByTwoLosses(Net):
    words = "Trying to backward through the graph a second time"
    advice = "add the losses"

    def run(self, x):
        shared = torch.tanh(self.enc(x))  # <- here
        for _ in range(2):
            self.head(shared).mean().backward()


class PriorMadeOnce(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    class Prior(nn.Module):
        """Holds a distribution in place of its parameters."""

        def __init__(self):
            super().__init__()
            self.spread = nn.Parameter(torch.zeros(3))
            self.dist = self.make()  # <- here

        def make(self):
            return torch.distributions.Normal(torch.zeros(3), self.spread.exp())

    def __init__(self):
        super().__init__()
        self.prior = self.Prior()

    def forward(self, x):
        h = torch.distributions.Normal(self.enc(x), 1.0)
        return torch.distributions.kl_divergence(h, self.prior.dist).mean()


class TermsOutsideOfAClosure(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        terms = [parameter.square().sum() for parameter in self.enc.parameters()]  # <- here

        def penalty():
            return torch.stack(terms).sum()

        self.penalty = penalty

    def forward(self, x):
        return self.head(self.enc(x)).mean() + self.penalty()


class FrozenByALogger(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "leave `requires_grad` on"

    def log(self):
        self.requires_grad_(False)  # <- here

    def forward(self, x):
        self.log()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.requires_grad)  # as it was
        return self.head(self.enc(x)).mean()


class WithoutGradientInBackward(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "torch.enable_grad()"

    class Rerun(torch.autograd.Function):
        """Saves memory, as it believes."""

        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            ctx.save_for_backward(x.detach())
            return layer(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            x = x.detach().requires_grad_()
            out = ctx.layer(x)  # <- here
            return torch.autograd.grad(out, x, grad)[0], None

    def forward(self, x):
        return self.head(self.Rerun.apply(self.enc(x), self.enc)).mean()


class LegacyFunction(Net):
    words = "Legacy autograd function with non-static forward"
    advice = "static methods"

    class Double(torch.autograd.Function):
        """Written as torch 0.3 wanted it."""

        def forward(self, x):  # type: ignore[override]
            return 2 * x

    def forward(self, x):
        return self.head(self.Double()(self.enc(x))).mean()  # <- here


class HookOnAFrozenFeature(Net):
    words = "cannot register a hook on a tensor that doesn't require"
    advice = "if x.requires_grad"

    def forward(self, x):
        for parameter in self.enc.parameters():
            parameter.requires_grad = False  # <- here
        h = torch.relu(self.enc(x))
        h.register_hook(print)
        return self.head(h).mean()


class SecondStepOfAGuidance(Net):
    words = "One of the differentiated Tensors does not require grad"
    advice = "look for a `detach`"

    def corrected(self, x, slope):
        return (x - slope).detach()  # <- here

    def forward(self, x):
        x = x.clone().requires_grad_()
        for _ in range(2):
            (slope,) = torch.autograd.grad(self.head(torch.tanh(self.enc(x))).sum(), x)
            x = self.corrected(x, slope)
        return self.head(x).mean()


class WeightNormalisedAtEveryCall(Net):
    words = "modified by an inplace operation"
    advice = "in place of `x /= y`"

    def forward(self, x):
        with torch.no_grad():
            self.enc.weight /= self.enc.weight.norm()  # <- here
        return self.enc(x.clone().requires_grad_())

    def run(self, x):
        first, second = self(x), self(x + 1)
        with torch.no_grad():
            target = second.softmax(-1)
            target /= target.sum(0)
            target /= target.sum(1, keepdim=True)
        first.exp().sum().add((second * target).sum()).backward()


class AddedIntoTheOutputOfTanh(Net):
    words = "modified by an inplace operation"
    advice = "use what `index_add` returns"

    def forward(self, x):
        nodes, places = torch.tanh(self.enc(x)), torch.arange(4)
        received = torch.zeros(4, 3)
        received.index_add_(0, places, self.enc(nodes))
        received /= 2
        nodes.index_add_(0, places, received)  # <- here
        return self.head(nodes).mean()


class SteppedBesideASum(Net):
    words = "modified by an inplace operation"
    advice = "step the optimizer after this backward"

    def run(self, x):
        optimizer = torch.optim.Adam(self.parameters())
        early, late = self.head(self.enc(x)).mean(), torch.zeros(())
        for _ in range(3):
            late += self.head(torch.tanh(self.enc(x))).mean()
        early.backward()
        optimizer.step()  # <- here
        late.backward()


class WrittenInsideAFunction(Net):
    words = "modified by an inplace operation"
    advice = "use what `mul` returns"

    class Rounded(torch.autograd.Function):
        """Scales its argument, and does not say so."""

        @staticmethod
        def forward(ctx, x):
            x.mul_(7)  # <- here
            return x.round() / 7

        @staticmethod
        def backward(ctx, grad):
            return grad

    def forward(self, x):
        return self.head(self.Rounded.apply(torch.tanh(self.enc(x)))).mean()


class GradientForANumber(Net):
    words = "returned a gradient different than None"
    advice = "return None in the place"

    class Scaled(torch.autograd.Function):
        """Hands back one gradient too many."""

        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, grad.sum()  # <- here

    def forward(self, x):
        return self.head(self.Scaled.apply(self.enc(x), 2.0)).mean()


class SecondDerivativeOfANumber(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "create_graph=True"

    def forward(self, x):
        x = x.clone().requires_grad_()
        out = self.head(torch.tanh(self.enc(x))).sum()
        (slope,) = torch.autograd.grad(out, x)  # <- here
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return bend.mean()


class CellStateInADictionary(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.states = {}

    def forward(self, x):
        if "fine" not in self.states:
            self.states["fine"] = (torch.zeros_like(x).detach(), torch.zeros_like(x).detach())
        h, c = self.states["fine"]
        c = torch.sigmoid(self.enc(x)) * c + torch.tanh(self.enc(h))
        self.states["fine"] = (torch.tanh(c).detach(), c)  # <- here
        return self.head(c).mean()


class RowsInABuffer(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.rows = []

    def add(self, values):
        for row in values:
            self.rows.append(row)

    def forward(self, x):
        self.add(torch.tanh(self.enc(x)))  # <- here
        return self.head(torch.stack(self.rows)).mean()


class RecomputedDifferently(Net):
    words = "number of tensors was saved during the original forward and recomputation"
    advice = "let it depend on its arguments alone"

    def __init__(self):
        super().__init__()
        self.calls = 0

    def block(self, x):
        self.calls += 1
        return self.enc(x).exp().sigmoid().sin() if self.calls % 2 else torch.tanh(self.enc(x))

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False)).mean()  # <- here


class FakesThatWereNotDetached(Net):
    """Both passes go through the encoder; where the first one takes its result is where to detach."""

    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` what one should not train"

    def critic(self, h):
        real = self.head(torch.ones(4, 3))
        return real.mean() - self.head(h).mean()  # <- here

    def run(self, x):
        fake = torch.tanh(self.enc(x))
        self.critic(fake).backward()
        (-self.head(fake).mean()).backward()


def normalised(h):
    return h / h.norm()


class ComputedInAHelper(Net):
    """What a small function computes from its arguments alone was chosen by its only call."""

    words = "Trying to backward through the graph a second time"
    advice = "add the losses"

    def run(self, x):
        h = normalised(self.enc(x))  # <- here
        for power in (1, 2):
            h.pow(power).sum().backward()


class Kept:
    """A record whose fields are annotated, as those of a dataclass are."""

    chance: torch.Tensor

    def __init__(self, chance):
        self.chance = chance


class KeptInARecord(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.played: list[list[Kept]] = [[]]

    def run(self, x):
        chance = self.head(self.enc(x)).sigmoid().mean()
        self.played[0].append(Kept(chance))  # <- here
        torch.stack([one.chance * 2 for one in self.played[0]]).sum().backward()


@torch.no_grad()
def rows_of(buffer):
    return [buffer[:2], buffer[2:]]


class ViewsOfADecoratedFunction(Net):
    """Of a view that an earlier write has given a history, its making is shown, and the switch."""

    words = "view was created in no_grad mode and is being modified inplace"
    advice = "make the view where gradients are on"
    switch = "`@torch.no_grad()` (gradients are off from here on)"

    def forward(self, x):
        out = self.enc(x) * 1.0
        for part in rows_of(out):
            part.add_(self.head(x[:2]))  # <- here
        return out.mean()


class EncodedInInferenceMode(Net):
    words = "Inference tensors cannot be saved for backward"
    advice = "torch.no_grad()"

    def encoded(self, x):
        return self.enc(x)

    def forward(self, x):
        with torch.inference_mode():  # <- here
            h = self.encoded(x)
        return self.head(h).mean()


class HookBehindADecorator(Net):
    words = "cannot register a hook on a tensor that doesn't require"
    advice = "where gradients are on"
    switch = "`@torch.no_grad()` (gradients are off from here on)"

    @torch.no_grad()
    def features(self, x):
        return self.enc(x)  # <- here

    def forward(self, x):
        h = self.features(x)
        h.register_hook(print)
        return self.head(h).mean()


class SlopesOfColumns(Net):
    """The network was given the whole; the columns were cut out beside it."""

    words = "appears to not have been used in the graph"
    advice = "allow_unused=True"

    def slope(self, y, x):
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    def forward(self, x):
        points = x.clone().requires_grad_()
        u = torch.tanh(self.enc(points))
        t = points[:, :1]  # <- here
        return self.slope(u, t).mean()


class PenaltyAtPlainPoints(Net):
    words = "One of the differentiated Tensors does not require grad"
    advice = "requires_grad_()"

    def mixed(self, real, fake):
        return 0.5 * real + 0.5 * fake  # <- here

    def forward(self, x):
        with torch.no_grad():
            fake = self.enc(x)
        mixed = self.mixed(x, fake)
        return torch.autograd.grad(self.head(mixed).sum(), mixed)[0].norm()


class AssignedToAParameter(Net):
    words = "as parameter 'weight'"
    advice = "weight.copy_(...)"

    def forward(self, x):
        self.enc.weight = self.enc.weight + 1.0  # <- here
        return self.head(self.enc(x)).mean()


class OneOfTwoTermsIsAVector(Net):
    words = "can be implicitly created only for scalar outputs"
    advice = ".mean()"

    def each(self, h):
        return h.square().sum(-1)  # <- here

    def forward(self, x):
        h = self.enc(x)
        return 0.5 * self.each(h) + 0.1 * self.head(h).abs().mean()


class OneOfTwoTermsIsComplex(Net):
    words = "can be implicitly created only for real scalar outputs"
    advice = ".abs().square()"

    def spectrum(self, h):
        return (torch.fft.fft(h) ** 2).mean()  # <- here

    def forward(self, x):
        h = self.enc(x)
        return self.spectrum(h) + 0.1 * self.head(h).abs().mean()


class CachedInACheckpoint(Net):
    words = "number of tensors was saved during the original forward and recomputation"
    advice = "no state that it changes"

    class Bias(nn.Module):
        """What is computed once, and kept."""

        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(3))
            self.ready = None
            self.seen = 0

        def forward(self):
            self.seen += 1
            if self.ready is None:
                self.ready = self.table.exp() * 2  # <- here
            return self.ready

    class Block(nn.Module):
        """What is run again."""

        def __init__(self, bias):
            super().__init__()
            self.bias = bias

        def forward(self, x):
            return torch.tanh(x + self.bias())

    def __init__(self):
        super().__init__()
        self.block = self.Block(self.Bias())

    def forward(self, x):
        return self.head(checkpoint(self.block, self.enc(x), use_reentrant=False)).mean()


class LeftFrozen(Net):
    """The other pass detaches on purpose; what was frozen for one pass is still frozen in the next."""

    words = "does not require grad and does not have a grad_fn"
    advice = "`requires_grad` is False for `head.*`"
    steps = 2

    def run(self, x):
        self.head(self.enc(x).detach()).mean().backward()
        for parameter in self.head.parameters():
            parameter.requires_grad = False  # <- here
        self.head(self.enc(x)).mean().backward()


class SampledWhileTheCriticIsFrozen(Net):
    """What was frozen for the pass is not what cuts it off."""

    words = "does not require grad and does not have a grad_fn"
    advice = "rsample()"

    def forward(self, x):
        self.head.requires_grad_(requires_grad=False)
        action = torch.distributions.Normal(self.enc(x), 1.0).sample()  # <- here
        loss = self.head(action).mean()
        self.head.requires_grad_()
        return loss


class BoundIntoAPartial(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.render = functools.partial(torch.mul, other=self.enc(torch.ones(3)).exp())  # <- here

    def forward(self, x):
        return self.render(self.head(x)).mean()


class RenormalisedAfterItWasRead(Net):
    """Of several lookups with `max_norm` the first one behind another reader of the table is to blame."""

    words = "modified by an inplace operation"
    advice = "look everything up in one call"

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3, max_norm=0.1)

    def forward(self, x):
        user = self.enc(self.table(torch.tensor([0, 1]))) + x[:2]
        scores = user @ self.table.weight.t()
        best = (user * self.table(torch.tensor([2, 3]))).sum()  # <- here
        return scores.mean() + best


class OnesOfAnotherShape(Net):
    words = "Mismatch in shape: grad_output"
    advice = "torch.ones_like(output)"

    def forward(self, x):
        x = x.clone().requires_grad_()
        ones = torch.ones(len(x))
        return torch.autograd.grad(self.head(x), x, grad_outputs=ones)[0].norm()  # <- here


class WrittenBehindABackwardHook(Net):
    words = "BackwardHookFunction is a view and is being modified inplace"
    advice = "inplace=False"

    def __init__(self):
        super().__init__()
        self.enc.register_full_backward_hook(self.keep)  # <- here

    def keep(self, module, given, got):
        self.seen = got

    def forward(self, x):
        return self.head(F.relu_(self.enc(x))).mean()


class StepOfTheWrongShape(Net):
    """The value at the index in torch's message is shown where it is computed."""

    words = "returned an invalid gradient at index 1"
    advice = "sum over what was broadcast"

    class Quantise(torch.autograd.Function):
        """Scale, with a gradient of one element for a step of three."""

        @staticmethod
        def forward(ctx, w, step):
            ctx.save_for_backward(w)
            return w * step

        @staticmethod
        def backward(ctx, grad):
            (w,) = ctx.saved_tensors
            slope = (grad * w).sum(0)[:2]  # <- here
            return grad, slope

    def forward(self, x):
        return self.Quantise.apply(self.enc.weight, self.enc.bias).sum()


class AdjointByALambda(Net):
    """What has no history was computed in the `backward` around the function that differentiates it."""

    words = "does not require grad and does not have a grad_fn"
    advice = "torch.enable_grad()"

    class Rerun(torch.autograd.Function):
        """Differentiate once more what is computed in backward."""

        @staticmethod
        def forward(ctx, x, module):
            ctx.module = module
            ctx.save_for_backward(x)
            return module(x)

        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.module(x)  # <- here
            slope = lambda v: torch.autograd.grad(out, x, v)[0]  # noqa: E731
            return next(map(slope, [grad])), None

    def forward(self, x):
        return self.Rerun.apply(self.enc(x), self.head).mean()


class DecidedInVmap(Net):
    words = "data-dependent control flow"
    advice = "torch.where"

    def each(self, row):
        if row.sum() > 0:  # <- here
            return row * 2
        return row

    def forward(self, x):
        return torch.vmap(self.each)(self.enc(x)).mean()


class DroppedAtRandomInACheckpoint(Net):
    words = "number of tensors was saved during the original forward and recomputation"
    advice = "no random number of Python's"

    class Block(nn.Module):
        """Leaves out its second part now and then."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.chance = random.Random(2)  # noqa: S311 -- 0.956, then 0.948

        def forward(self, x):
            x = torch.tanh(self.inner(x))
            if self.training and self.chance.random() < 0.95:  # <- here
                return x
            return x.exp().sin()

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def forward(self, x):
        return self.head(checkpoint(self.block, self.enc(x), use_reentrant=False)).mean()


class UnscaledInEachMicroBatch(Net):
    words = "unscale_() has already been called"
    advice = "once for each step of the optimizer"

    def run(self, x):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(2):
            scaler.scale(self.head(self.enc(x)).mean()).backward()
            scaler.unscale_(optimizer)  # <- here


class HalfWithAScaler(Net):
    words = "Attempting to unscale FP16 gradients"
    advice = "torch.autocast"

    def run(self, x):
        self.half()
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(self.enc(x.half()).float().mean()).backward()
        scaler.step(optimizer)  # <- here


class HeadReplacedBehindTheOptimizer(Net):
    words = "No inf checks were recorded for this optimizer"
    advice = "after the model is complete"

    def __init__(self):
        super().__init__()
        self.requires_grad_(requires_grad=False)
        self.probe = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.probe.parameters(), 0.1)
        self.resize()

    def resize(self):
        self.probe = nn.Linear(3, 2)  # <- here

    def run(self, x):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(self.probe(x).mean()).backward()
        scaler.step(self.optimizer)


class OptimizerOfWhatIsCutOff(Net):
    """The optimizer's parameters are the model's: the cause is why they got no gradient."""

    words = "No inf checks were recorded for this optimizer"
    advice = "remove `.detach()`"

    def run(self, x):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.SGD(self.enc.parameters(), 0.1)
        h = self.enc(x).detach()  # <- here
        scaler.scale(self.head(h).mean()).backward()
        scaler.step(optimizer)


class SparseTableWithAdam(Net):
    words = "does not support sparse gradients"
    advice = "SparseAdam"

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 3, sparse=True)  # <- here

    def run(self, x):
        optimizer = torch.optim.Adam(self.parameters(), 0.1)
        self.head(self.table(torch.arange(4))).mean().backward()
        optimizer.step()


class FeaturesOutsideOfTheClosure(Net):
    """What the closure reads was computed around it, by a layer: the layer's call is shown."""

    words = "Trying to backward through the graph a second time"
    advice = "`.detach()`"

    def run(self, x):
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=3)
        features = self.enc(x)  # <- here

        def closure():
            optimizer.zero_grad()
            loss = self.head(features.exp()).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


class IntegerParameter(Net):
    words = "Only Tensors of floating point and complex dtype can require gradients"
    advice = "keep the value in floating point"

    def forward(self, x):
        self.bits = nn.Parameter(self.enc.weight.detach().argmax(1))  # <- here
        return self.head(self.enc(x) * self.bits).mean()


class SentWithItsHistory(Net):
    words = "refusing to serialize non-leaf tensor"
    advice = "`.detach()` it before it is sent"

    def forward(self, x):
        chosen = self.enc(x).log_softmax(-1)[:, 0]  # <- here
        torch.multiprocessing.get_context("spawn").SimpleQueue().put(chosen)
        return chosen.mean()


class FlatPieceForAGradient(Net):
    words = "attempting to assign a gradient of size"
    advice = "p.grad = piece.view_as(p)"

    def run(self, x):
        loss = self.head(self.enc(x)).mean()
        (grad,) = torch.autograd.grad(loss, [self.enc.weight])
        self.enc.weight.grad = grad.flatten()  # <- here


class AddedToAnExpandedTensor(Net):
    words = "refers to a single memory location"
    advice = "`.clone()` it first"

    def forward(self, x):
        slots = self.enc.bias.tanh().expand(4, 3)
        slots += self.enc(x)  # <- here
        return self.head(slots).mean()


class GradientForAnInferenceTensor(Net):
    words = "on inference tensor outside InferenceMode"
    advice = "torch.no_grad()"

    def forward(self, x):
        with torch.inference_mode():
            z = self.enc(x)  # <- here
        return self.head(z.requires_grad_()).mean()


class BatchNormInVmap(Net):
    words = "Batch norm got a batched tensor as input"
    advice = "GroupNorm"

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)  # <- here

    def forward(self, x):
        return self.head(torch.vmap(lambda row: self.norm(row.expand(2, 3)))(x)).mean()


class GradThroughAReentrantCheckpoint(Net):
    words = "torch.utils.checkpoint is incompatible with .grad()"
    advice = "use_reentrant=False"

    def forward(self, x):
        x = x.clone().requires_grad_()
        energy = checkpoint(self.enc, x, use_reentrant=True).sum()  # <- here
        return torch.autograd.grad(energy, x)[0].norm()


class FramesInAQueue(Net):
    """The container from which a loop takes what is used again tells more than where it was held for a while."""

    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.newest, self.frames = None, []

    def forward(self, x):
        self.newest = self.enc(x).tanh()
        loss = self.head(self.newest).mean()
        loss = loss + sum((self.newest - old).abs().mean() for old in self.frames)
        self.frames.append(self.newest)  # <- here
        return loss


class RowsByAHook(Net):
    """A hook that was registered before the step is shown by what it returns."""

    words = "has changed the size of value"
    advice = "like the one that came"

    def __init__(self):
        super().__init__()
        self.enc.weight.register_hook(self.first_rows)

    def first_rows(self, grad):
        return grad[:2]  # <- here

    def forward(self, x):
        return self.head(self.enc(x)).mean()


class RootOfZeroInAnomalyMode(Net):
    words = "Function 'SqrtBackward0' returned nan values"
    advice = "add an epsilon"

    def forward(self, x):
        h = self.enc(x)
        far = (h.square().sum(1) + 1.0).sqrt()
        near = (h - h).square().sum(1).sqrt()  # <- here
        return (far + near * 0.0).mean()

    def run(self, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.detect_anomaly():
                self(x).backward()


def switch_off(value):
    if isinstance(value, dict):
        for part in value.values():
            switch_off(part)
    else:
        value.requires_grad = False


class FlagOfResultsInAMapping(Net):
    """Calls that hand on what they were given lead back to the one that chose it."""

    words = "you can only change requires_grad flags of leaf variables"
    advice = "x.detach()"

    def forward(self, x):
        parts = {"low": self.enc(x)}
        switch_off(parts)  # <- here
        return self.head(parts["low"]).mean()


class GradientsOfALogger(Net):
    """A loop over all parameters meets one without a gradient: the cause of that is what is wrong."""

    words = "'NoneType' object has no attribute 'norm'"
    advice = "if p.grad is not None"

    def __init__(self):
        super().__init__()
        self.side = nn.Linear(3, 3)

    def run(self, x):
        h = self.enc(x)
        self.side(h)  # <- here
        self.head(h).mean().backward()
        self.sizes = [p.grad.norm() for p in self.parameters()]


class GradientsOfACopy(Net):
    words = "'NoneType' object has no attribute 'clone'"
    advice = "model.named_parameters()"

    def run(self, x):
        self.head(self.enc(x)).mean().backward()
        state = self.state_dict()  # <- here
        self.sent = {key: tensor.grad.clone() for key, tensor in state.items()}


class ScaledAfterItAskedForAGradient(Net):
    """What was made before the step is found in the text."""

    words = "'NoneType' object has no attribute 'mul'"
    advice = "x.detach().requires_grad_()"

    def __init__(self):
        super().__init__()
        self.w = torch.ones(1, 1, requires_grad=True) * 0.5  # <- here

    def run(self, x):
        (self.head(self.enc(x)) @ self.w).mean().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.step = self.w.grad.mul(0.1)


class LeafMadeAfterwards(Net):
    words = "appears to not have been used in the graph"
    advice = "allow_unused=True"

    def score(self, latents):
        return self.head(torch.tanh(self.enc(latents))).sum()

    def forward(self, x):
        score = self.score(x)
        x = x.detach().requires_grad_()  # <- here
        return torch.autograd.grad(score, x)[0].norm()


class VectorInALoop(Net):
    """Of a sum in a loop what is added is shown, not what was there before."""

    words = "can be implicitly created only for scalar outputs"
    advice = ".mean()"

    def weighed(self, i, value):
        return value * torch.exp(-self.enc.bias[i]) + self.enc.bias  # <- here

    def forward(self, x):
        total = 0
        for i, value in enumerate(self.head(x).unbind(0)[:3]):
            total = total + self.weighed(i, value.mean())
        return total


class HistoryByTask(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` it where it is kept"
    steps = 2

    def __init__(self):
        super().__init__()
        self.past: dict[str, list[torch.Tensor]] = {"depth": []}

    def forward(self, x):
        loss = self.head(self.enc(x)).square().mean()
        scale = torch.ones(())
        if self.past["depth"]:
            scale = self.past["depth"][-1].clamp(min=0.1)
        self.past["depth"].append(loss)  # <- here
        return loss / scale


class DataInsideOfACheckpoint(Net):
    words = "none of output has requires_grad=True"
    advice = "use_reentrant=False"

    def block(self, h):
        h = h.data  # <- here
        return torch.relu(h)

    def forward(self, x):
        return self.head(checkpoint(self.block, self.enc(x), use_reentrant=True)).mean()


class OneOfTwoByAModuleHook(Net):
    words = "Backward hook returned an invalid number"
    advice = "like the one that came"

    class Sum(nn.Module):
        """Two inputs."""

        def forward(self, a, b):
            return a + b

    def __init__(self):
        super().__init__()
        self.both = self.Sum()
        self.both.register_full_backward_hook(self.first)

    def first(self, module, given, got):
        return (given[0],)  # <- here

    def forward(self, x):
        return self.head(self.both(self.enc(x), self.enc(x * 2))).mean()


class DropoutInVmap(Net):
    words = "vmap: called random operation while in randomness error mode"
    advice = 'randomness="different"'

    def each(self, row):
        return F.dropout(row, 0.5)  # <- here

    def forward(self, x):
        return self.head(torch.vmap(self.each)(self.enc(x))).mean()


class WrittenIntoZerosInVmap(Net):
    words = "vmap: inplace arithmetic"
    advice = "`torch.stack` them"

    def each(self, row):
        out = torch.zeros(2, 3)
        out[0] = row  # <- here
        return out.sum(0)

    def forward(self, x):
        return self.head(torch.vmap(self.each)(self.enc(x))).mean()


class TransposedGradient(Net):
    """What is assigned was made elsewhere."""

    words = "attempting to assign a gradient of size"
    advice = "view_as(p)"

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(3, 2)

    def solved(self, grad):
        return torch.linalg.solve(torch.eye(2), grad).t()  # <- here

    def run(self, x):
        self.wide(x).mean().backward()
        self.wide.weight.grad = self.solved(self.wide.weight.grad)


class AddedToTheInputOfACheckpoint(Net):
    """What a reentrant checkpoint runs again in backward fails at a line of its own."""

    words = "a leaf Variable that requires grad is being used in an in-place"
    advice = "write `x = x + y`"

    def block(self, h):
        h += 1.0  # <- here
        return torch.relu(h)

    def forward(self, x):
        return self.head(checkpoint(self.block, self.enc(x), use_reentrant=True)).mean()


class EvaluatedBeforeBackward(Net):
    words = "number of tensors was saved during the original forward and recomputation"
    advice = "no state that it changes"

    class Block(nn.Module):
        """Its dropout saves a mask in training alone."""

        def forward(self, x):
            return F.dropout(torch.tanh(x), 0.5, self.training)

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def run(self, x):
        loss = self.head(checkpoint(self.block, self.enc(x), use_reentrant=False)).mean()
        self.eval()  # <- here
        loss.backward()


class OldFunctionInGrad(Net):
    words = "override the setup_context staticmethod"
    advice = "`setup_context(ctx, inputs, output)`"

    class Double(torch.autograd.Function):
        """Written as before torch 2.0."""

        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    def energy(self, row):
        return self.Double.apply(row).sum()  # <- here

    def forward(self, x):
        return self.head(torch.func.grad(self.energy)(x)).mean()


class LossOfAConstant(Net):
    """Where nothing cuts the path, the loss itself is shown."""

    words = "does not require grad and does not have a grad_fn"
    advice = "(the loss)"

    def forward(self, x):
        self.seen = self.head(self.enc(x))
        return x.new_zeros(())  # <- here


class LossOfANewZero(Net):
    """Of a loss that is computed from one new tensor alone, that tensor's line is shown too."""

    words = "does not require grad and does not have a grad_fn"
    advice = "(all that the loss is computed from)"

    def forward(self, x):
        self.seen = self.head(self.enc(x))
        losses = [x.new_zeros(())]  # <- here
        return sum(loss.mean() for loss in losses)


class AdapterLeftOff(Net):
    """What decides that a parameter is not read is shown where it is set, the calls of its setter first."""

    words = "does not require grad and does not have a grad_fn"
    advice = "`self.adapts` is set here"

    class Adapted(nn.Module):
        """A frozen layer with an adapter that can be switched off."""

        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(3, 3).requires_grad_(False)
            self.delta = nn.Parameter(torch.zeros(3))
            self.adapts = True

        def forward(self, x):
            return self.frozen(x) + self.delta if self.adapts else self.frozen(x)

        def set_adapter(self, adapts):
            self.adapts = adapts

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.adapted = self.Adapted()

    def forward(self, x):
        self.adapted.set_adapter(False)  # <- here
        with torch.no_grad():
            reference = self.adapted(x)
        return (self.adapted(x) - reference).mean()


class LayersInAList(nn.Module):
    """A model whose layers are in a plain list, so that it has no parameters."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 1).requires_grad_(False)]

    def forward(self, x):
        return self.layers[0](x).mean()


class WeightsCachedForTwoBackwards(Net):
    words = "Trying to backward through the graph a second time"
    advice = "(kept as long as this lasts)"

    class Scaled(nn.Module):
        """A parametrization that computes something."""

        def forward(self, weight):
            return weight.tanh()

    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self.enc, "weight", self.Scaled())

    def run(self, x):
        with parametrize.cached():  # <- here
            for part in x.split(2):
                self.head(self.enc(part)).mean().backward()


class SampledInAnEarlierStep(Net):
    words = "Inference tensors cannot be saved for backward"
    advice = "(perhaps made in there)"
    steps = 2

    def __init__(self):
        super().__init__()
        self.waiting = []

    @torch.inference_mode()  # <- here
    def sample(self, x):
        return x + self.head(self.enc(x))

    def forward(self, x):
        x = self.waiting.pop() if self.waiting else x
        loss = self.head(self.enc(x)).mean()
        self.waiting.append(self.sample(x))
        return loss


class AttackedAgain(Net):
    words = "you can only change requires_grad flags of leaf variables."
    advice = "start from a leaf"

    def attacked(self, x):
        x.requires_grad = True
        (slope,) = torch.autograd.grad(self.head(self.enc(x)).sum(), x)
        return x + slope.sign()  # <- here

    def forward(self, x):
        return self.head(self.attacked(self.attacked(x.clone()))).mean()


class InnerLossOfTheOldWeights(Net):
    words = "appears to not have been used in the graph"
    advice = "(the output)"

    def forward(self, x):
        weight = self.head.weight
        for _ in range(2):
            inner = F.linear(self.enc(x), self.head.weight).square().mean()  # <- here
            (slope,) = torch.autograd.grad(inner, weight, create_graph=True)
            weight = weight - slope
        return F.linear(x, weight).mean()


class GradientOfAHeadThatIsNotUsed(Net):
    words = "appears to not have been used in the graph"
    advice = "a gradient is asked for `head.weight`, which the output was not computed from"

    def forward(self, x):
        inner = self.enc(x).square().mean()  # <- here
        torch.autograd.grad(inner, list(self.parameters()))
        return self.head(x).mean()


class StrainThatNothingReads(Net):
    words = "appears to not have been used in the graph"
    advice = "(the last that was computed from it)"

    def forward(self, x):
        strain = torch.zeros(3, requires_grad=True)
        self.strained = x + x * strain  # <- here
        energy = self.head(self.enc(x)).sum()
        (stress,) = torch.autograd.grad(energy, strain, create_graph=True)
        return stress.sum()


PREPARED: list[torch.Tensor] = []


class PenaltyMadeBefore(Net):
    """What a function is given under a name was computed under the same name elsewhere."""

    words = "Trying to backward through the graph a second time"
    advice = "`.detach()`"
    steps = 2

    def __init__(self):
        super().__init__()
        PREPARED[:] = [self.prepare()]

    def prepare(self):
        l2_of_all = sum(p.square().sum() for p in self.enc.parameters())  # <- here
        return l2_of_all * 0.1

    def total(self, so_far, l2_of_all):
        return so_far + l2_of_all

    def forward(self, x):
        return self.total(self.head(self.enc(x)).mean(), PREPARED[0])


class Store:
    def __init__(self):
        self.keys = {}

    def grown(self, layer, key):
        if layer in self.keys:
            key = torch.cat([self.keys[layer], key])
        self.keys[layer] = key.detach()  # <- here too
        return key


class OwnGeneratorInACheckpoint(Net):
    words = "different metadata"
    advice = "generator of its own"

    def __init__(self):
        super().__init__()
        self.random = torch.Generator().manual_seed(0)

    def chosen(self, x):
        noise = torch.rand(len(x), generator=self.random)  # <- here
        return self.enc(x[noise > noise[0]] if noise[0] < 0.4 else x)

    def forward(self, x):
        h = x
        for _ in range(8):
            h = checkpoint(self.chosen, torch.cat([h, x])[:4], use_reentrant=False)
        return self.head(h).mean()


class GradOfAnAttribute(Net):
    words = "'NoneType' object has no attribute 'norm'"
    advice = ".retain_grad()"

    def doubled(self, x):
        return self.enc(x) * 2

    def run(self, x):
        self.middle = self.doubled(x)  # <- here
        self.head(self.middle).mean().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.middle.grad.norm()


class TokensOfAnEncoder(Net):
    words = "can't optimize a non-leaf Tensor"
    advice = "make it a leaf"

    def __init__(self):
        super().__init__()
        self.rate = 0.1
        self.tokens = self.made(torch.ones(4, 3))

    def made(self, x):
        h = self.enc(x)
        return [h[i] for i in range(2)]  # <- here

    def forward(self, x):
        optimizer = torch.optim.SGD(self.tokens, lr=self.rate)
        optimizer.zero_grad()
        return self.head(x * self.tokens[0]).mean()


class CentersCastTooLate(Net):
    words = "optimizer got an empty parameter list"
    advice = "make the parameter last"

    class Centers(nn.Module):
        """It keeps what was computed from a parameter."""

        def __init__(self):
            super().__init__()
            centers = nn.Parameter(torch.ones(3)).double()  # <- here
            self.centers = centers

    def __init__(self):
        super().__init__()
        self.part = self.Centers()

    def forward(self, x):
        torch.optim.SGD(self.part.parameters(), 0.1)
        return self.head(self.enc(x)).mean()


def toggle(module, flag):
    for parameter in module.parameters():
        parameter.requires_grad_(flag)


class FrozenByAFlag(Net):
    words = "does not require grad and does not have a grad_fn"
    advice = "called "
    switch = "requires_grad_(flag)"

    def forward(self, x):
        toggle(self, False)  # <- here
        return self.head(self.enc(x)).mean()


class JudgedByAHelper(Net):
    words = "Trying to backward through the graph a second time"
    advice = "`.detach()` what one should not train"

    def judged(self, h):
        return self.head(h).mean()

    def step(self, fake):
        error = self.judged(fake)  # <- here
        error.backward()

    def run(self, x):
        fake = self.enc(x).tanh()
        self.step(fake)
        self.judged(fake).backward()


class InPlaceLayerBehindABackwardHook(Net):
    words = "BackwardHookFunction is a view"
    advice = "inplace=False"

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)  # <- here
        self.enc.register_full_backward_hook(lambda *_: None)

    def forward(self, x):
        return self.head(self.act(self.enc(x))).mean()


class HookBehindFrozenLayers(Net):
    words = "cannot register a hook on a tensor that doesn't require"
    advice = "if x.requires_grad"

    def __init__(self):
        super().__init__()
        for parameter in self.enc.parameters():
            parameter.requires_grad = False  # <- here

    def forward(self, x):
        h = self.enc(x)
        h.register_hook(print)
        return self.head(h).mean()


class ViewDetachedInPlace(Net):
    words = "Can't detach views in-place"
    advice = "x = x.detach()"

    def forward(self, x):
        h = self.enc(x).reshape(3, 4)
        h.detach_()  # <- here
        return self.head(h.reshape(4, 3)).mean()


def centred(h):
    h -= h.mean()
    return h


class ChangedByAHelper(Net):
    words = "modified by an inplace operation"
    advice = "x = x - y"
    switch = "`h -= h.mean()`"

    def forward(self, x):
        h = self.enc(x).sigmoid()
        centred(h)  # <- here
        return self.head(h).mean()


class InPlaceLayerOverASum(Net):
    words = "modified by an inplace operation"
    advice = "inplace=False"
    switch = "self.act(h) + h"

    def __init__(self):
        super().__init__()
        self.act = nn.Sequential(nn.ReLU(inplace=True))  # <- here

    def forward(self, x):
        h = self.enc(x).sigmoid()
        return self.head(self.act(h) + h).mean()


class EmbeddedAgain(Net):
    words = "appears to not have been used in the graph"
    advice = "`embedded`, which runs next, reads `h` only if `not (x is not None)`"

    def embedded(self, x=None, h=None):
        return self.head(self.enc(x) if x is not None else h)  # <- here

    def forward(self, x):
        noise = torch.zeros(4, 3, requires_grad=True)
        loss = self.embedded(x, h=self.enc(x) + noise).mean()
        torch.autograd.grad(loss, noise)
        return loss


class ClippedNaN(Net):
    words = "is non-finite, so it cannot be clipped"
    advice = "`enc.*` and `head.*` get a gradient with NaN or infinity"

    def forward(self, x):
        return (self.head(self.enc(x)) * 0).sqrt().mean()  # <- here

    def run(self, x):
        self(x).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0, error_if_nonfinite=True)


class NothingAskedFor(Net):
    words = "cannot be empty"
    advice = "`requires_grad` is False for `enc.*` and `head.*`"

    def run(self, x):
        self.requires_grad_(False)
        wanted = [p for p in self.parameters() if p.requires_grad]  # <- here
        loss = self.head(self.enc(x.requires_grad_())).mean()
        torch.autograd.grad(loss, wanted)


class GradientOfAnotherType(Net):
    words = "attempting to assign a gradient with dtype"
    advice = "cast it first"

    def run(self, x):
        self(x).mean().backward()
        for p in self.parameters():
            kept = p.grad.double()  # <- here
            p.grad = kept

    def forward(self, x):
        return self.head(self.enc(x))


class ListOfAnIterator(Net):
    words = "optimizer can only optimize Tensors"
    advice = "pass `model.parameters()` itself"

    def run(self, x):
        given: Any = [self.parameters()]
        torch.optim.SGD(given, 0.1)  # <- here


class InTwoGroups(Net):
    words = "appear in more than one parameter group"
    advice = "`head.*` would be in two groups"

    def run(self, x):
        groups: Any = [{"params": self.parameters()}, {"params": self.head.parameters(), "lr": 1.0}]
        torch.optim.SGD(groups, 0.1)  # <- here


class Resized(Net):
    words = "cannot resize variables that require grad"
    advice = "`torch.nn.functional.pad`"

    def forward(self, x):
        h = self.enc(x)
        h.resize_(4, 4)  # <- here
        return h.mean()


class SteppedTwice(Net):
    words = "step() has already been called"
    advice = "each once for a step"

    def run(self, x):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(self.head(self.enc(x)).mean()).backward()
        for _ in range(2):
            scaler.step(optimizer)  # <- here


class SparseGradientsClipped(Net):
    words = "from the 'SparseCPU' backend"
    advice = "leave out `sparse=True`"

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3, sparse=True)  # <- here

    def run(self, x):
        self.table(torch.tensor([0, 1])).mean().backward()
        nn.utils.clip_grad_norm_(self.table.parameters(), 1.0)


class ProbeWithACutLoss(Net):
    """Of two cuts the last one ends all: the one before it is meant."""

    words = "does not require grad and does not have a grad_fn"
    advice = "warning[detached]: `head.*` get no gradient"

    def forward(self, x):
        return self.head(self.enc(x).detach()).mean()

    def run(self, x):
        loss = self(x).detach()  # <- here
        loss.backward()


CASES = [
    value
    for value in globals().values()
    if isinstance(value, type) and issubclass(value, Net) and vars(value).get("words")
]


def guilty_line(case):
    lines, first = inspect.getsourcelines(case)
    return first + next(i for i, line in enumerate(lines) if "# <- here" in line)


def steps(case):
    torch.manual_seed(0)
    model = case()
    for _ in range(case.steps):
        with diagnose(model):
            model.run(torch.randn(4, 3))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_error_keeps_its_words_and_names_the_line_and_the_way_out(case):
    """The user's error passes through unchanged, with one note on the root cause."""
    with pytest.raises(Exception, match=re.escape(case.words)) as caught:
        steps(case)

    (note,) = caught.value.__notes__
    assert f"test_raised.py:{guilty_line(getattr(case, 'guilty', case))}" in note
    assert case.advice in note
    assert getattr(case, "switch", "") in note


def test_a_model_without_parameters_is_said_to_have_none():
    """Where a model has no parameters, nobody is told that they are frozen."""
    model = LayersInAList()
    with pytest.raises(RuntimeError) as caught, diagnose(model):
        model(torch.ones(1, 3)).backward()

    (note,) = caught.value.__notes__
    assert note.startswith("GradWatch: the model has no parameters, so the loss has no history\n")


def test_the_traceback_through_the_backward_of_a_function_is_kept():
    """What the user's own `backward` was doing when it raised stays in the traceback, and is named."""
    model = WithoutGradientInBackward()
    with pytest.raises(RuntimeError) as caught, diagnose(model):
        model.run(torch.ones(4, 3))

    names = [entry.frame.raw.f_code.co_qualname for entry in caught.traceback]
    assert names[-3:] == [
        "WithoutGradientInBackward.Rerun.backward",
        "grad",
        "_engine_run_backward",
    ]


def test_an_error_that_was_caught_before_explains_no_other():
    """A call of torch's that raised, and was caught, has no part in what the user's code raises later."""

    class Fallback(Net):
        def forward(self, x):
            with contextlib.suppress(RuntimeError):
                self.enc(x).numpy()
            raise NotImplementedError("the derivative for my own loss is not implemented")

    with pytest.raises(NotImplementedError) as caught, diagnose(model := Fallback()):
        model(torch.ones(4, 3))

    assert not hasattr(caught.value, "__notes__")


def test_what_a_global_keeps_is_found_through_the_function_that_returns_it():
    """A graph that is kept in a global's item is traced to the statement that put it there."""
    CACHE.clear()
    model = Net()
    line = inspect.getsourcelines(positions)[1] + 3

    def step():
        with diagnose(model):
            (model.head(torch.ones(3, 3) + positions(model, "x"))).mean().backward()

    step()
    with pytest.raises(RuntimeError, match="second time") as caught:
        step()

    CACHE.clear()
    assert f"test_raised.py:{line}" in caught.value.__notes__[0]


def test_what_a_checkpoint_is_given_and_changes_is_found():
    """A cache that a checkpointed block is given, and fills, is named by the line that fills it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.key = nn.Linear(3, 3)

        def forward(self, x, store):
            return x + (x @ store.grown("first", self.key(x)).t()).mean(1, keepdim=True)

    class Decoder(Net):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            store = Store()
            h = checkpoint(self.block, self.enc(x), store, use_reentrant=False)
            return self.head(h).mean()

    model = Decoder()
    with pytest.raises(Exception, match="Recomputed values") as caught, diagnose(model):
        model.run(torch.ones(4, 3))

    lines, first = inspect.getsourcelines(Store)
    filled = first + next(i for i, line in enumerate(lines) if line.endswith("# <- here too\n"))
    (note,) = caught.value.__notes__
    assert f"test_raised.py:{filled}: " in note


def test_an_error_of_a_step_that_was_not_traced_is_explained_from_the_model():
    """Later in a run, what a module keeps across steps is still found, without a trace."""
    model = HiddenStateKept()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    with (
        Watcher(model, optimizers=[optimizer]) as watcher,
        pytest.raises(RuntimeError, match="second time") as caught,
    ):
        watcher._schedule.forget()
        for _ in range(2):
            with watcher.step():
                model.run(torch.ones(4, 3))

    (note,) = caught.value.__notes__
    assert f"test_raised.py:{guilty_line(HiddenStateKept)}" in note
    assert "`hidden`" in note


class Memory:
    """What a module holds without being one itself."""

    def __init__(self):
        self.rows = []

    def push(self, row):
        self.rows.append(Kept(row))  # <- here


class KeptInAnObject(Net):
    def __init__(self):
        super().__init__()
        self.memory = Memory()

    def forward(self, x):
        self.memory.push(self.enc(x).tanh())
        return self.head(sum(kept.chance for kept in self.memory.rows)).mean()


class KeptBesideACircle(Net):
    """A container that holds itself, and a long one, are looked through once."""

    def __init__(self):
        super().__init__()
        self.ring: list[Any] = [list(range(5000))]
        self.ring.append(self.ring)
        self.memory = Memory()
        self.memory.owner = self.ring  # type: ignore[attr-defined]

    def forward(self, x):
        self.memory.push(self.enc(x).tanh())
        return self.head(sum(kept.chance for kept in self.memory.rows)).mean()


class KeptInADistribution(Net):
    def __init__(self):
        super().__init__()
        self.prior = torch.distributions.Normal(self.enc(torch.ones(3)), 1.0)  # <- here

    def forward(self, x):
        return -self.prior.log_prob(x).mean() + self.head(x).mean()


def later(model, *, traced):
    """Return the note on what the model raises in its second step, or in the second micro-batch of its first."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watcher(model, optimizers=[optimizer]) as watcher, pytest.raises(RuntimeError) as caught:
        for _ in range(2):
            with watcher.step():
                model.run(torch.ones(4, 3))
                if not traced:
                    optimizer.step()
    (note,) = caught.value.__notes__
    return note


@pytest.mark.parametrize("traced", [True, False], ids=["micro-batch", "later step"])
@pytest.mark.parametrize(
    ("case", "holder"),
    [
        (KeptInAnObject, Memory),
        (KeptBesideACircle, Memory),
        (KeptInADistribution, KeptInADistribution),
        (CellStateInADictionary, CellStateInADictionary),
        (HiddenStateKept, HiddenStateKept),
    ],
    ids=lambda case: case.__name__,
)
def test_what_is_kept_is_named_in_a_micro_batch_and_in_a_later_step(case, holder, traced):
    """What an object, a distribution or a module keeps is named where it was put there, traced or not."""
    note = later(case(), traced=traced)

    assert "is kept and used again" in note
    assert f"test_raised.py:{guilty_line(holder)}: `" in note


CELL = """
import torch
from torch import nn

class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 3)
        self.hidden = torch.zeros(2, 3)

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        self.hidden = self.cell(x, self.hidden)
        return self.hidden.mean()
"""


def test_what_a_class_of_a_notebook_keeps_is_found(monkeypatch):
    """The text of a class that was typed into a cell is read as that of a file is."""
    name = "<ipython-input-7-cell>"
    monkeypatch.setitem(
        linecache.cache, name, (len(CELL), None, CELL.splitlines(keepends=True), name)
    )
    cell: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(CELL, name, "exec"), cell)  # noqa: S102 -- as a notebook does
    model = cell["Counter"]()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watcher(model, optimizers=[optimizer]) as watcher, pytest.raises(RuntimeError) as caught:
        for _ in range(2):
            with watcher.step():
                model(torch.ones(2, 3)).backward()
                optimizer.step()

    (note,) = caught.value.__notes__
    line = 1 + CELL.splitlines().index("        self.hidden = self.cell(x, self.hidden)")
    assert f"{name}:{line}: `self.hidden = self.cell(x, self.hidden)`" in note
    assert "(`hidden`)" in note


class LeftOff(Net):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        loss = self.head(self.enc(x)).mean()
        torch.set_grad_enabled(False)  # <- here
        return loss


def test_gradient_mode_that_was_left_off_is_named_in_the_next_step():
    """A call that switched gradients off for good is shown when the next loss has no history."""
    try:
        note = later(LeftOff(), traced=False)
    finally:
        torch.set_grad_enabled(True)

    assert "gradient mode was switched off, and is off still" in note
    assert f"test_raised.py:{guilty_line(LeftOff)}: `" in note


def test_a_gradient_that_is_none_in_a_later_step_is_told_with_its_known_cause():
    """What was diagnosed in the first step is said again when a later one trips over it."""

    class Late(GradientsOfALogger):
        calls = 0

        def run(self, x):
            self.calls += 1
            h = self.enc(x)
            self.side(h)
            self.head(h).mean().backward()
            if self.calls > 1:
                self.sizes = [p.grad.norm() for p in self.parameters()]

    model = Late()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watcher(model, optimizers=[optimizer]) as watcher, pytest.raises(AttributeError) as caught:
        for _ in range(2):
            with watcher.step():
                model.run(torch.ones(4, 3))
                optimizer.step()

    (note,) = caught.value.__notes__
    assert "`.grad` of a parameter is None here" in note
    assert "warning[not_in_loss]: `side.weight` and `side.bias` get no gradient" in note


def test_what_is_frozen_is_named_in_a_step_that_is_not_traced():
    """A loss without a history in a later step is told with the parameters that are frozen, and where."""
    note = later(LeftFrozen(), traced=False)

    assert "`requires_grad` is False for `head.*`" in note
    assert f"test_raised.py:{guilty_line(LeftFrozen)}: `" in note


def test_a_tensor_of_the_traced_step_is_found_again_in_one_that_is_not():
    """What outlived the first step is named in the second, though no module keeps it and nothing is traced."""
    model, memory = Net(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    with (
        Watcher(model, optimizers=[optimizer]) as watcher,
        pytest.raises(RuntimeError, match="second time") as caught,
    ):
        for _ in range(2):
            with watcher.step():
                memory.append(torch.tanh(model.enc(torch.ones(4, 3))))  # made here
                model.head(torch.stack(memory)).mean().backward()
                optimizer.step()

    lines, first = inspect.getsourcelines(
        test_a_tensor_of_the_traced_step_is_found_again_in_one_that_is_not
    )
    made = next(first + at for at, line in enumerate(lines) if line.endswith("# made here\n"))
    (note,) = caught.value.__notes__
    assert note.startswith("GradWatch: a tensor that an earlier backward has freed is kept")
    assert f"test_raised.py:{made}: `" in note


def test_an_untraced_error_that_its_line_explains_gets_its_note():
    """Where the line that raised is the root, its note needs no trace."""
    model = IndexedScalar()

    with (
        Watcher(model, {"trace": "never"}) as watcher,
        pytest.raises(IndexError) as caught,
        watcher.step(),
    ):
        model.run(torch.ones(4, 3))

    (note,) = caught.value.__notes__
    assert f"test_raised.py:{guilty_line(IndexedScalar)}: `" in note
    assert ".item()" in note


def test_an_untraced_error_without_a_clue_says_how_to_find_it():
    """Where nothing is known, the note names the way to find out."""
    model = SavedOutputChanged()

    with (
        Watcher(model, {"trace": "never"}) as watcher,
        pytest.raises(RuntimeError, match="inplace") as caught,
        watcher.step(),
    ):
        model.run(torch.ones(4, 3))

    assert "with gradwatch.diagnose(model):" in caught.value.__notes__[0]


def test_the_error_of_ddp_gets_names_and_causes(tmp_path):
    """The error about an unfinished reduction is followed by the parameters that DDP waits for, and why."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(LeavesHeadOut())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with (
            Watcher(model, optimizers=[optimizer]) as watcher,
            pytest.raises(RuntimeError, match="Expected to have finished reduction") as caught,
        ):
            for _ in range(3):
                with watcher.step():
                    model(torch.ones(2, 3)).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
    finally:
        torch.distributed.destroy_process_group()

    (note,) = caught.value.__notes__
    assert "warning[unused]: `head.weight` and `head.bias` get no gradient" in note
    assert "find_unused_parameters=True" in note


class LeavesHeadOut(Net):
    words = advice = ""

    def forward(self, x):
        return self.enc(x)


def test_a_failure_while_explaining_is_one_log_record(monkeypatch, caplog):
    """When the explanation itself fails, the user's error still passes through unchanged."""
    monkeypatch.setattr("gradwatch._raised._note", lambda *_: 1 / 0)
    model = nn.Linear(3, 1)

    with pytest.raises(RuntimeError, match="scalar outputs") as caught, diagnose(model):
        model(torch.ones(2, 3)).backward()

    assert getattr(caught.value, "__notes__", []) == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_an_error_that_has_nothing_to_do_with_gradients_gets_no_note():
    """An exception of the user's own passes through without a word."""
    model = nn.Linear(3, 1)

    with pytest.raises(ValueError, match="mine") as caught, diagnose(model):
        model(torch.ones(1, 3))
        raise ValueError("mine")

    assert getattr(caught.value, "__notes__", []) == []


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.distributions.Distribution(validate_args=False).support,
        lambda: nn.Module()(torch.ones(1)),
        lambda: attrgetter("shape")(None),
        lambda: torch.optim.SGD([], 0.1),
        lambda: nn.ReLU()(*[torch.ones(1)] * 2),
        lambda: attrgetter("backward")(torch.ones(3))(*range(5)),
        lambda: dict(torch.ones(2, 3)),
        lambda: [a for a, b in [torch.ones(3)]],
    ],
    ids=[
        "a property",
        "a module without forward",
        "None",
        "an optimizer",
        "arguments of a module",
        "arguments of a backward",
        "a pair",
        "a tensor taken apart",
    ],
)
def test_an_error_of_torchs_that_has_nothing_to_do_with_gradients_gets_no_note(fail):
    """What only looks like a message about gradients passes through without a word."""
    model = nn.Linear(3, 1)

    with pytest.raises(Exception) as caught, diagnose(model):  # noqa: PT011 -- of several kinds
        model(torch.ones(1, 3)).mean().backward()
        fail()

    assert getattr(caught.value, "__notes__", []) == []


class InAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 1)]


def test_an_optimizer_without_parameters_is_led_back_to_a_plain_list():
    """Where the model registers nothing the note names the attribute that hides its parameters."""
    model = InAList()
    with pytest.raises(ValueError, match="empty parameter list") as caught, diagnose(model):
        torch.optim.SGD(model.parameters(), 0.1)

    line = inspect.getsourcelines(InAList)[1] + 3
    assert caught.value.__notes__ == [
        (
            "GradWatch: the module registers no parameter: `InAList.layers` is not registered, `parameters()` "
            f"does not look into it: {shown_path(__file__)}:{line}: `self.layers = [nn.Linear(3, 1)]`\n"
            f"  --> {shown_path(__file__)}:{line + 7}: `torch.optim.SGD(model.parameters(), 0.1)`\n"
            "  = help: use `nn.ModuleList` or `nn.ParameterList` in place of the list"
        )
    ]


def test_nested_diagnoses_add_one_note():
    """An error that passes through two `diagnose` blocks is explained once."""
    model = nn.Linear(3, 1)

    with pytest.raises(RuntimeError) as caught, diagnose(model), diagnose(model):
        model(torch.ones(2, 3)).backward()

    assert len(caught.value.__notes__) == 1


class Mismatched(Net):
    """The error of an operation that has nothing to do with gradients."""

    def forward(self, x):
        h = self.enc(x)
        return torch.cat([h, h.reshape(-1)]).sum()


class Overwriting(Net):
    """The error of a backward pass."""

    def forward(self, x):
        h = self.enc(x).sigmoid()
        h += 1
        return self.head(h).sum()


@pytest.mark.parametrize("kind", [Mismatched, Overwriting])
def test_no_line_of_ours_stands_in_a_traceback(kind):
    """The lines that an error has passed are those that it passes without GradWatch."""

    def passed(around):
        model = kind()
        with pytest.raises(RuntimeError) as caught, around(model):
            model.run(torch.ones(2, 3))
        lines = [(entry.path, entry.frame.code.name) for entry in caught.traceback]
        # In a traced step `Tensor.backward` calls itself by way of the trace, and a module its hooks.
        once = [line for at, line in enumerate(lines) if line not in lines[:at]]
        return [line for line in once if line[1] != "inner"]

    assert passed(diagnose) == passed(lambda model: contextlib.nullcontext())


FILES = {
    "the only cast to float16": (
        "Attempting to unscale FP16 gradients",
        """
        model = nn.Linear(2, 1).half()  # <- here

        def step():
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(model(torch.ones(1, 2).to(model.weight.dtype)).sum()).backward()
            scaler.unscale_(optimizer)
        """,
    ),
    "a default that asks for sparse gradients": (
        "does not support sparse gradients",
        """
        class Options:
            sparse: bool = True  # <- here

        model = nn.Embedding(4, 2, sparse=Options.sparse)

        def step():
            optimizer = torch.optim.Adam(model.parameters())
            model(torch.ones(1, dtype=torch.long)).sum().backward()
            optimizer.step()
        """,
    ),
    "a default that keeps one loss for each sample": (
        "can be implicitly created only for scalar outputs",
        """
        OPTIONS = {"reduction": "none"}  # <- here
        model = nn.Linear(2, 1)

        def step():
            nn.functional.mse_loss(model(torch.ones(3, 2)), torch.ones(3, 1), **OPTIONS).backward()
        """,
    ),
    "the decorator that maps": (
        "vmap: called random operation",
        """
        model = nn.Linear(2, 1)
        drop = nn.Dropout(0.5)

        @torch.vmap  # <- here
        def one(x):
            return drop(x)

        def step():
            model(one(torch.ones(3, 2))).sum().backward()
        """,
    ),
    "the call that lets an input require grad": (
        "Can't call numpy() on Tensor that requires grad",
        """
        model = nn.Linear(2, 1)

        def saliency(x):
            x.requires_grad_(True)  # <- here
            return model(x).sum()

        def step():
            x = torch.ones(1, 2)
            saliency(x)
            x.reshape(2).numpy()
        """,
    ),
    "the line that makes layers work in place": (
        "a leaf Variable that requires grad is being used in an in-place",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(2))
                self.act = nn.ReLU()

            def forward(self, x):
                return self.act(self.weight) * x

        model = Net()

        def save_memory():
            for module in model.modules():
                module.inplace = True  # <- here

        def step():
            save_memory()
            model(torch.ones(2)).sum().backward()
        """,
    ),
    "the pruning of a layer that is copied": (
        "Only Tensors created explicitly by the user",
        """
        from torch.nn.utils import prune

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.enc = nn.Linear(2, 1)
                prune.l1_unstructured(self.enc, "weight", 0.5)  # <- here

            def forward(self, x):
                return self.enc(x)

        model = Net()

        def step():
            import copy
            model(torch.ones(1, 2))
            copy.deepcopy(model)
        """,
    ),
    "what made an argument without a derivative": (
        "is not differentiable with respect to argument",
        """
        model = nn.Linear(2, 1)

        def step():
            p = model(torch.ones(3, 2)).sigmoid()
            weight = (1 - p) ** 2  # <- here
            nn.functional.binary_cross_entropy(p, torch.ones(3, 1), weight=weight).backward()
        """,
    ),
    "the decorator that keeps results": (
        "Trying to backward through the graph a second time",
        """
        def remembered(function):
            kept = {}

            def call(self, length):
                if length not in kept:
                    kept[length] = function(self, length)
                return kept[length]
            return call

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.enc = nn.Linear(2, 1)

            @remembered  # <- here
            def scales(self, length):
                return self.enc.weight.exp()[:length]

            def forward(self, x):
                scale = self.scales(1)
                return (self.enc(x) * scale).sum()

        model = Net()

        def step():
            for _ in range(2):
                with diagnose(model):
                    model(torch.ones(1, 2)).backward()
        """,
    ),
    "a prediction from before the closure": (
        "Trying to backward through the graph a second time",
        """
        model = nn.Sequential(nn.Linear(2, 1), nn.Tanh())

        def step():
            optimizer = torch.optim.LBFGS(model.parameters())
            predicted = model(torch.ones(3, 2))  # <- here

            def closure():
                optimizer.zero_grad()
                loss = predicted.square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        """,
    ),
    "a tensor with a history that a data set keeps": (
        "refusing to serialize non-leaf tensor",
        """
        import torch.multiprocessing as mp

        model = nn.Linear(2, 1)

        class Bank:
            def __init__(self):
                self.rays = torch.ones(3, 2) @ model.weight.T  # <- here

            def sample(self):
                return self.rays[torch.tensor([0, 2])]

        bank = Bank()

        def step():
            mp.get_context("fork").SimpleQueue().put(bank.sample())
        """,
    ),
    "parameters that are put in place under names of their own": (
        "No inf checks were recorded",
        """
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def prepare():
            for name, p in list(model.named_parameters()):
                model.register_parameter(name, nn.Parameter(p.detach() * 1))  # <- here

        prepare()

        def step():
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(model(torch.ones(1, 2)).sum()).backward()
            scaler.step(optimizer)
        """,
    ),
    "the mode under which a solver runs": (
        "appears to not have been used in the graph",
        """
        model = nn.Linear(2, 2)

        def solve(f, z):
            with torch.no_grad():  # <- here
                return f(z)

        def step():
            x = torch.ones(1, 2, requires_grad=True)
            loss = (model.weight * solve(lambda z: model(z + x), torch.zeros(1, 2))).sum()
            torch.autograd.grad(loss, x)
        """,
    ),
    "gradients in another shape than the losses": (
        "Mismatch in shape",
        """
        model = nn.Linear(2, 1)

        def step():
            losses = [model(torch.ones(1, 2)).sum() for _ in range(2)]
            ones = [torch.ones(1) for _ in losses]  # <- here
            torch.autograd.backward(losses, ones)
        """,
    ),
    "a constructor that makes layers work in place": (
        "modified by an inplace operation",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.enc, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)
                for module in self.modules():
                    if isinstance(module, nn.Dropout):
                        module.inplace = True  # <- here

            def forward(self, x):
                return self.drop(self.enc(x).sigmoid()).sum()

        model = Net()

        def step():
            model(torch.ones(3, 2)).backward()
        """,
    ),
    "the sum of a loss that is used up and a new one": (
        "Trying to backward through the graph a second time",
        """
        model = nn.Linear(2, 1)

        def step():
            loss = model(torch.ones(3, 2)).square().mean()
            loss.backward()
            loss = loss + model(torch.zeros(3, 2)).square().mean()  # <- here
            loss.backward()
        """,
    ),
    "the call through which a critic takes what a generator made": (
        "Trying to backward through the graph a second time",
        """
        class Part(nn.Module):
            def __init__(self):
                super().__init__()
                self.enc = nn.Linear(2, 2)

            def forward(self, x):
                return self.enc(x).sigmoid()

        model = nn.ModuleList([Part(), Part()])

        def step():
            generator, critic = model
            fake = generator(torch.ones(3, 2))
            score = critic(fake)  # <- here
            score.mean().backward()
            critic(fake).mean().backward()
        """,
    ),
    "a function that ignores what it is given": (
        "appears to not have been used in the graph",
        """
        model = nn.Linear(2, 1)

        def sensitivity(f, x):
            noise = torch.zeros_like(x, requires_grad=True)
            return torch.autograd.grad(f(x + noise).sum(), noise)

        def step():
            x = torch.ones(3, 2)

            def evaluate(perturbed):
                return model(x)  # <- here

            sensitivity(evaluate, x)
        """,
    ),
    "the one parameter in float16": (
        "Attempting to unscale FP16 gradients",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.enc = nn.Linear(2, 1)
                self.slope = nn.Parameter(torch.ones(1, dtype=torch.float16))  # <- here

            def forward(self, x):
                return (self.enc(x) * self.slope).sum()

        model = Net()

        def step():
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(model(torch.ones(1, 2))).backward()
            scaler.unscale_(optimizer)
        """,
    ),
    "the layer of a sequence that works in place": (
        "modified by an inplace operation",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.enc = nn.Linear(2, 2)
                self.branch = nn.Sequential(
                    nn.Identity(),
                    nn.ReLU(inplace=True),  # <- here
                )

            def forward(self, x):
                h = self.enc(x).sigmoid()
                return (h * self.branch(h)).sum()

        model = Net()

        def step():
            model(torch.ones(3, 2)).backward()
        """,
    ),
    "the global that keeps a result": (
        "Trying to backward through the graph a second time",
        """
        model = nn.Linear(2, 1)
        CACHED = None

        def forward(x):
            global CACHED
            if CACHED is None:
                CACHED = model(x).exp()  # <- here

        def loss():
            return CACHED.mean()

        def step():
            for _ in range(2):
                with diagnose(model):
                    forward(torch.ones(1, 2))
                    loss().backward()
        """,
    ),
    "the call of a helper for what both passes use": (
        "Trying to backward through the graph a second time",
        """
        model = nn.Linear(2, 2)

        def gram(x):
            x = x.flatten(1)
            return x.T @ x

        def targets(x):
            return [gram(model(x))]  # <- here

        def difference(x, wanted):
            return sum((gram(model(x)) - each).square().sum() for each in wanted)

        def step():
            wanted = targets(torch.ones(3, 2))
            for _ in range(2):
                difference(torch.zeros(3, 2), wanted).backward()
        """,
    ),
    "what lost its history inside of a Function": (
        "does not require grad and does not have a grad_fn",
        """
        model = nn.Linear(2, 1)

        class Solver(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight):
                return slope(x)

            @staticmethod
            def backward(ctx, grad):
                return grad, None

        def slope(x):
            x = x.requires_grad_(True)
            potential = model(x)  # <- here
            return torch.autograd.grad(potential.sum(), x, create_graph=True)[0]

        def step():
            Solver.apply(torch.ones(1, 2), model.weight).sum().backward()
        """,
    ),
    "an inference mode around a copy that is trained": (
        "does not require grad and does not have a grad_fn",
        """
        import copy

        model = nn.Linear(2, 1)

        def adapt(x):
            tuned = copy.deepcopy(model)
            tuned(x).mean().backward()

        @torch.inference_mode()  # <- here
        def predict(x):
            return adapt(x)

        def step():
            predict(torch.ones(1, 2))
        """,
    ),
    "the values that came in float64": (
        "Found dtype Double but expected Float",
        """
        import numpy as np

        model = nn.Linear(2, 1)

        def returns():
            values = torch.tensor(np.ones(3))  # <- here
            return (values - values.mean()) / 2

        def step():
            values = model(torch.ones(3, 2)).squeeze(-1)
            nn.functional.huber_loss(values, returns()).backward()
        """,
    ),
    "the list that keeps losses with their history": (
        "Can't call numpy() on Tensor that requires grad",
        """
        import numpy as np

        model = nn.Linear(2, 1)
        curve = {"loss": []}

        def train():
            loss = model(torch.ones(3, 2)).mean()
            curve["loss"].append(loss)  # <- here
            return loss

        def step():
            train().backward()
            np.array(curve["loss"])
        """,
    ),
    "the mark of a Function": (
        "marked with @once_differentiable",
        """
        from torch.autograd.function import once_differentiable

        model = nn.Linear(2, 1)

        class Marked(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            @once_differentiable  # <- here
            def backward(ctx, grad):
                return grad * 2

        def step():
            out = Marked.apply(model(torch.ones(1, 2))).square().sum()
            (grad,) = torch.autograd.grad(out, model.weight, create_graph=True)
            grad.sum().backward()
        """,
    ),
    "the way on which a scaler is not updated": (
        "unscale_() has already been called",
        """
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu")

        def update(most):
            scaler.scale(model(torch.ones(1, 2)).sum()).backward()
            scaler.unscale_(optimizer)
            if nn.utils.clip_grad_norm_(model.parameters(), 1.0) > most:
                return  # <- here
            scaler.step(optimizer)
            scaler.update()

        def step():
            update(0.0)
            update(0.0)
        """,
    ),
    "a backward that returns nothing": (
        "returned an incorrect number of gradients",
        """
        model = nn.Linear(2, 1)

        class Silent(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, y):
                return x * y

            @staticmethod
            def backward(ctx, grad):  # <- here
                grad * 2

        def step():
            Silent.apply(model(torch.ones(1, 2)), model.weight.sum()).sum().backward()
        """,
    ),
    "what all samples share under vmap": (
        "vmap: inplace arithmetic",
        """
        model = nn.Linear(2, 1)

        def matrix(x):
            out = torch.zeros(2)  # <- here
            out[0] = x.sum()
            return out

        def step():
            torch.vmap(matrix)(model.weight.expand(3, 2)).sum().backward()
        """,
    ),
    "where a result goes into the loss of a second pass": (
        "Trying to backward through the graph a second time",
        """
        model = nn.Linear(2, 1)

        def step():
            out = model(torch.ones(3, 2)).sigmoid()
            loss = nn.functional.mse_loss(out, torch.ones(3, 1))
            loss.backward()
            loss = nn.functional.mse_loss(out, torch.ones(3, 1))  # <- here
            loss.backward()
        """,
    ),
    "the caller that hands a fake to a critic": (
        "Trying to backward through the graph a second time",
        """
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.generator, self.critic = nn.Linear(2, 2), nn.Linear(2, 1)

            def critic_loss(self, fake):
                return self.critic(fake).mean()

            def generator_loss(self, fake):
                return -self.critic(fake).mean()

        model = Pair()

        def step():
            fake = model.generator(torch.ones(3, 2)).sigmoid()
            wrong = model.critic_loss(fake)  # <- here
            wrong.backward()
            model.generator_loss(fake).backward()
        """,
    ),
    "the result that is dropped": (
        "Trying to backward through the graph a second time",
        """
        def repackaged(h):
            return h.detach()

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.enc, self.hidden = nn.Linear(2, 2), torch.zeros(1, 2)

            def forward(self, x):
                repackaged(self.hidden)  # <- here
                self.hidden = torch.tanh(self.enc(x) + self.hidden)
                return self.hidden.sum()

        model = Net()

        def step():
            for _ in range(2):
                with diagnose(model):
                    model(torch.ones(1, 2)).backward()
        """,
    ),
    "the call that was given other tensors": (
        "appears to not have been used in the graph",
        """
        model = nn.Sequential(nn.Linear(2, 1), nn.Tanh())

        def penalty(score, inputs):
            return torch.autograd.grad(score.sum(), inputs, create_graph=True)[0].square().sum()

        def step():
            real = torch.ones(3, 2)
            copy = real.clone().requires_grad_(True)
            score = model(real)  # <- here
            penalty(score, [copy])
        """,
    ),
    "the function that makes layers work in place": (
        "is a view and is being modified inplace",
        """
        def block(name):
            if name == "skip":
                return nn.Identity()
            return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))  # <- here

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.ops = nn.ModuleList([block(name) for name in ("skip", "linear")])

            def forward(self, x):
                return sum(op(x * 1.0) for op in self.ops)

        model = Net()

        def watch(module, grad_input, grad_output):
            return None

        model.ops[1].register_full_backward_hook(watch)

        def step():
            model(torch.ones(1, 2).requires_grad_()).sum().backward()
        """,
    ),
    "the call of a closure with gradients off": (
        "does not require grad and does not have a grad_fn",
        """
        model = nn.Linear(2, 1)

        class Careful(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure):
                loss = closure()  # <- here
                return super().step() or loss

        def step():
            def closure():
                loss = model(torch.ones(1, 2)).sum()
                loss.backward()
                return loss

            Careful(model.parameters(), 0.1).step(closure)
        """,
    ),
    "the iterator that was read before": (
        "optimizer got an empty parameter list",
        """
        model = nn.Linear(2, 1)

        def step():
            trained = filter(lambda p: p.requires_grad, model.parameters())  # <- here
            print(sum(p.numel() for p in trained))
            torch.optim.SGD(trained, 0.1)
        """,
    ),
    "all that is frozen": (
        "optimizer got an empty parameter list",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(2, 1)
                for p in self.parameters():
                    p.requires_grad = False  # <- here

        model = Net()

        def step():
            torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), 0.1)
        """,
    ),
    "the layer whose parameters take no results": (
        "as parameter 'weight' (torch.nn.Parameter or None expected)",
        """
        model = nn.Linear(2, 1)

        class Meta(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = nn.Linear(2, 1)  # <- here

            def update(self, rate):
                for module in self.children():
                    setattr(module, "weight", module.weight - rate)

        def step():
            Meta().update(0.1)
        """,
    ),
    "a Function of a name that torch has too": (
        "returned an incorrect number of gradients",
        """
        class CheckpointFunction(torch.autograd.Function):
            @staticmethod
            def forward(ctx, run, *args):
                return args[0] * 2

            @staticmethod
            def backward(ctx, *grads):
                return (None, None) + grads  # <- here

        model = nn.Linear(2, 1)

        def step():
            import torch.utils.checkpoint

            CheckpointFunction.apply(None, model(torch.ones(1, 2))).sum().backward()
        """,
    ),
    "the losses that a callback keeps": (
        "Can't call numpy() on Tensor that requires grad",
        """
        import numpy

        model = nn.Linear(2, 1)

        class Recorder:
            def __init__(self):
                self.losses = []

            def after(self, loss):
                self.losses.append(loss)  # <- here

            def curve(self):
                return numpy.log10(self.losses)

        def step():
            recorder = Recorder()
            for _ in range(2):
                loss = model(torch.ones(1, 2)).square().sum()
                loss.backward()
                recorder.after(loss)
            recorder.curve()
        """,
    ),
    "the loss that is computed before a loop": (
        "Trying to backward through the graph a second time",
        """
        model = nn.Linear(2, 1)

        def loss_of(x):
            out = model(x)
            return out.square().mean(), out

        def step():
            loss, out = loss_of(torch.ones(3, 2))  # <- here
            for _ in range(2):
                loss.backward()
        """,
    ),
    "what an object was handed before the step": (
        "Trying to backward through the graph a second time",
        """
        class Kernel:
            def __init__(self, scale, shift):
                self.scale, self.shift = scale, shift

            def __call__(self, x):
                return (x / self.scale).exp() + self.shift

        class Process(nn.Module):
            def __init__(self):
                super().__init__()
                self.log_scale = nn.Parameter(torch.zeros(2))
                self.kernel = Kernel(self.log_scale.exp(), 1.0)  # <- here

        model = Process()

        def step():
            for _ in range(2):
                with diagnose(model):
                    model.kernel(torch.ones(3, 2)).sum().backward()
        """,
    ),
    "the constant that is returned in a special case": (
        "does not require grad and does not have a grad_fn",
        """
        class Scene(nn.Module):
            def __init__(self):
                super().__init__()
                self.depth = nn.Parameter(-torch.ones(3))
                self.background = torch.ones(3)

            def forward(self):
                if not (self.depth > 0).any():
                    return self.background * 0.5  # <- here
                return self.depth.exp()

        model = Scene()

        def step():
            (model() - torch.zeros(3)).abs().mean().backward()
        """,
    ),
    "the fresh zero that a scaler is given": (
        "No inf checks were recorded for this optimizer",
        """
        model = nn.Linear(2, 1)

        def masked(loss, mask):
            if not mask.any():
                return torch.zeros((), requires_grad=True)  # <- here
            return loss[mask].mean()

        def step():
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            scaler = torch.amp.GradScaler("cpu")
            out = model(torch.ones(3, 2)).square()
            loss = 0.5 * masked(out, torch.zeros(3, 1, dtype=torch.bool))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        """,
    ),
    "what was allocated in inference mode, and is written again": (
        "Inplace update to inference tensor",
        """
        model = nn.Linear(2, 1)
        slots = {}

        def store(x):
            if "x" not in slots:
                slots["x"] = torch.empty(x.shape)  # <- here
            slots["x"].copy_(x.detach())

        def step():
            with torch.inference_mode():
                store(torch.ones(3, 2))
            store(torch.ones(3, 2))
            model(torch.ones(3, 2)).sum().backward()
        """,
    ),
    "the term of a sum that keeps one value for each": (
        "can be implicitly created only for scalar outputs",
        """
        model = nn.Linear(2, 2)

        def distance(one, two):
            return 2 - 2 * (one * two).sum(dim=1)  # <- here

        def half(one, two):
            return distance(model(one), two)

        def step():
            one, two = torch.ones(3, 2), torch.ones(3, 2)
            loss = 0.5 * (half(one, two) + half(two, one))
            loss.backward()
        """,
    ),
    "a tensor that is registered as a parameter": (
        "object to parameter 'weight' (torch.nn.Parameter or None required)",
        """
        model = nn.Linear(2, 1)

        def step():
            filters = torch.ones(1, 2)
            model.register_parameter("weight", filters)  # <- here
        """,
    ),
    "the pass that used the graph up, and not the last one": (
        "Trying to backward through the graph a second time",
        """
        model = nn.Linear(2, 2)
        head = nn.Linear(2, 1)

        def step():
            out = model(torch.ones(3, 2)).tanh()
            out.square().mean().backward()  # <- here
            leaf = out.detach().requires_grad_()
            head(leaf).mean().backward()
            (out * leaf.grad).sum().backward()
        """,
    ),
    "the call of a helper that goes backward": (
        "Trying to backward through the graph a second time",
        """
        model = nn.Linear(2, 1)

        class Engine:
            def backward(self, loss):
                loss.backward()

        def handled():
            total = model(torch.ones(3, 2)).square().mean()
            Engine().backward(total)  # <- here
            return total

        def step():
            handled().backward()
        """,
    ),
    "the second call of a helper": (
        "Trying to backward through the graph a second time",
        """
        model = nn.Linear(2, 1)

        def criterion(out):
            return (out - 1).square().mean()

        def again(out, loss):
            loss.backward()
            model(torch.ones(3, 2))
            late = criterion(out)  # <- here
            return late

        def step():
            out = model(torch.ones(3, 2)).exp()
            again(out, criterion(out)).backward()
        """,
    ),
    "what is taken from where the earlier pass left it": (
        "Trying to backward through the graph a second time",
        """
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.critic = nn.Linear(2, 1)

            def compared(self, one, two):
                return (one - two.mean()).square().mean()

            def first(self, x):
                self.score = self.critic(x).exp()
                loss = self.compared(self.score, self.critic(x))
                loss.backward()

            def second(self, x):
                score = self.score  # <- here
                return self.compared(score, self.critic(x))

        model = Pair()

        def step():
            model.first(torch.ones(3, 2))
            model.second(torch.ones(3, 2)).backward()
        """,
    ),
    "the outputs that an adapting forward hands out": (
        "Trying to backward through the graph a second time",
        """
        class Adapting(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(2, 2)

            def forward(self, x):
                outputs = self.net(x).softmax(1)
                loss = outputs.square().mean()
                loss.backward()
                return outputs  # <- here

        model = Adapting()

        def step():
            model(torch.ones(3, 2)).log().mean().backward()
        """,
    ),
    "an object that keeps what was made": (
        "Trying to backward through the graph a second time",
        """
        from torch.distributions import Normal

        class Kept(nn.Module):
            def __init__(self):
                super().__init__()
                self.log_scale = nn.Parameter(torch.zeros(2))
                self.memo = {}

            def made(self):
                if "q" not in self.memo:
                    scale = self.log_scale.exp()
                    self.memo["q"] = Normal(0.0, scale)  # <- here
                return self.memo["q"]

        model = Kept()

        def step():
            for _ in range(2):
                with diagnose(model):
                    model.made().rsample().square().sum().backward()
        """,
    ),
    "the expanded tensor that is written into": (
        "refers to a single memory location",
        """
        import warnings

        model = nn.Linear(2, 3)

        def step():
            out = model(torch.ones(1, 2)).softmax(1)
            wide = out.expand(3, 3)  # <- here
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wide[(wide < 0.5).detach()] = 0.1
            wide.log().sum().backward()
        """,
    ),
    "another cut than the one that is told first": (
        "does not require grad and does not have a grad_fn",
        """
        class Filter(nn.Module):
            def __init__(self):
                super().__init__()
                self.own = nn.Parameter(torch.ones(2))
                self.fixed = nn.Parameter(torch.ones(2))

        model = Filter()
        other = nn.Linear(2, 2)

        def tested(x):
            with torch.no_grad():  # <- here
                return other(x)

        def step():
            out = tested(torch.ones(3, 2) * model.own)
            kernel = model.fixed.detach()
            (out * kernel).sum().backward()
        """,
    ),
    "the group that holds what another one holds too": (
        "appear in more than one parameter group",
        """
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
                self.head.weight = self.embed.weight

        model = Tied()

        def step():
            low = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]  # <- here
            others = list(model.embed.parameters())
            groups = [{"params": others}, {"params": low, "lr": 0.2}]
            torch.optim.SGD(groups, lr=0.1)
        """,
    ),
    "losses that are concatenated": (
        "zero-dimensional tensor (at position 0) cannot be concatenated",
        """
        model = nn.Linear(2, 1)

        def step():
            losses = [model(torch.ones(1, 2)).sum() for _ in range(2)]
            torch.cat(losses).sum().backward()  # <- here
        """,
    ),
    "what took the dimension away": (
        "invalid index of a 0-dim tensor",
        """
        model = nn.Linear(2, 1)

        def score(x):
            return model(x).squeeze()  # <- here

        def step():
            score(torch.ones(1, 2))[0].backward()
        """,
    ),
}


@pytest.mark.parametrize(("words", "text"), FILES.values(), ids=FILES)
def test_the_text_of_a_file_tells_what_decided(words, text, tmp_path):
    """A note names the setting, the decorator or the helper elsewhere in the file that led to the error."""
    note, line = fails_with(words, inspect.cleandoc(text), tmp_path)

    assert f"decided.py:{line}: `" in note


FUNCTIONS = {
    "saves a shape": (
        "save_for_backward can only save variables",
        "keep shapes, numbers and flags as attributes",
        """
        ctx.save_for_backward(x, x.shape)  # <- here
        return x * 2
        """,
        "return grad * 2",
    ),
    "marks what it does not return": (
        "marked as dirty during the forward method were not returned",
        "leave the mark out where nothing is changed",
        """
        ctx.mark_dirty(x)  # <- here
        return x * 2
        """,
        "return grad * 2",
    ),
    "returns a number": (
        "expected Variable or None",
        "None for each other one",
        "return x * 2",
        "return 2.0  # <- here",
    ),
    "reads what it did not keep": (
        "object has no attribute 'scale'",
        "set `ctx.scale` wherever the Function is called",
        """
        if x.numel() > 100:
            ctx.scale = 2  # <- here
        return x * 2
        """,
        "return grad * ctx.scale",
    ),
    "takes more than it saved": (
        "not enough values to unpack",
        "take as many as `save_for_backward` is given",
        """
        ctx.save_for_backward(x)  # <- here
        return x.exp()
        """,
        """
        x, y = ctx.saved_tensors
        return grad * y
        """,
    ),
    "runs a backward of its own over what all calls share": (
        "Trying to backward through the graph a second time",
        "compute all of it anew in there",
        "return x + shared.detach()",
        """
        for _ in range(2):
            with torch.enable_grad():
                y = (grad * shared).sum()
            y.backward()  # <- here
        return grad
        """,
    ),
}


def fails_with(words, text, tmp_path):
    """Return the note on the error of a file's `step()`, and the number of its line marked `# <- here`."""
    path = tmp_path / "decided.py"
    path.write_text(f"import torch\nfrom torch import nn\nfrom gradwatch import diagnose\n{text}\n")
    spec = importlib.util.spec_from_file_location("decided", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    line = next(i for i, t in enumerate(path.read_text().splitlines(), 1) if "# <- here" in t)

    with pytest.raises(Exception, match=re.escape(words)) as caught, diagnose(module.model):
        module.step()

    (note,) = caught.value.__notes__
    return note, line


@pytest.mark.parametrize(
    ("words", "advice", "forward", "backward"), FUNCTIONS.values(), ids=FUNCTIONS
)
def test_what_the_author_of_a_function_got_wrong_is_named(
    words, advice, forward, backward, tmp_path
):
    """A Function whose `forward` and `backward` do not fit is explained by its own line, and told the way out."""
    methods = [
        f"    @staticmethod\n    def {head}:\n{textwrap.indent(inspect.cleandoc(body), ' ' * 8)}"
        for head, body in (("forward(ctx, x)", forward), ("backward(ctx, grad)", backward))
    ]
    text = "\n".join(
        [
            "model = nn.Linear(2, 2)",
            "shared = model.weight.exp().sum()",
            "class Own(torch.autograd.Function):",
            *methods,
            "def step():",
            "    Own.apply(model(torch.ones(1, 2))).sum().backward()",
        ]
    )
    note, line = fails_with(words, text, tmp_path)

    assert f"decided.py:{line}: `" in note
    assert advice in note


HEADS = {
    "no backward": (
        "must implement either the backward",
        "give it a static method `backward",
        """
        class Own(torch.autograd.Function):  # <- here
            @staticmethod
            def forward(ctx, x):
                return x * 2
        """,
    ),
    "a backward under another name": (
        "must implement either the backward",
        "its name is not `backward`",
        """
        class Own(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backwards(ctx, grad):  # <- here
                return grad * 2
        """,
    ),
    "two outputs": (
        "takes 2 positional arguments but 3 were given",
        "give it an argument for each of them",
        """
        class Own(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2, x + 1

            @staticmethod
            @once_differentiable
            def backward(ctx, grad):  # <- here
                return grad * 2
        """,
    ),
    "no ctx": (
        "takes 1 positional argument but 2 were given",
        "let it take `ctx`",
        """
        class Own(torch.autograd.Function):
            @staticmethod
            def forward(x):  # <- here
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return grad * 2
        """,
    ),
}


@pytest.mark.parametrize(("words", "advice", "text"), HEADS.values(), ids=HEADS)
def test_a_function_that_does_not_take_what_torch_gives_it_is_named(words, advice, text, tmp_path):
    """A method that is missing, or has other arguments than torch gives it, is shown by its own first line."""
    step = """
    model = nn.Linear(2, 2)

    def step():
        y = Own.apply(model(torch.ones(1, 2)))
        (y[0] if isinstance(y, tuple) else y).sum().backward()
    """
    imports = "from torch.autograd.function import once_differentiable"
    note, line = fails_with(
        words, "\n".join([imports, inspect.cleandoc(text), inspect.cleandoc(step)]), tmp_path
    )

    assert f"decided.py:{line}: `" in note
    assert advice in note
