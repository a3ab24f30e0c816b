"""On an accelerator: no step that is not logged waits for the device, and a logged one waits once."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from gradwatch import Watcher

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Loop:
    """A watched loop on the device."""

    def __init__(self, every: int) -> None:
        self.model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)]).cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, foreach=True)
        self.x = torch.ones(4, 8, device="cuda")
        self.watcher = Watcher(self.model, optimizers=[self.optimizer], every_n_steps=every)

    def step(self) -> None:
        with self.watcher.step():
            torch.autograd.backward(self.model(self.x).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()


@contextmanager
def waiting(mode: str) -> Iterator[None]:
    """Say, or raise, when the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_unlogged_step_never_waits():
    """Ten steps that are not logged run with waiting made an error."""
    loop = Loop(every=1000)
    with loop.watcher:
        for _ in range(3):
            loop.step()
        with waiting("error"):
            for _ in range(10):
                loop.step()
        assert loop.watcher.diagnoses == ()


def test_a_logged_step_waits_once():
    """Each of five logged steps waits for the device once: for the norms of all gradients together."""
    loop = Loop(every=1)
    with loop.watcher:
        for _ in range(3):
            loop.step()
        with waiting("warn"), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(5):
                loop.step()
    waits = [str(w.message) for w in said if "synchron" in str(w.message)]
    assert len(waits) == 5


def test_norms_are_those_of_the_host():
    """Norms measured on the device are those of the same gradients on the host."""
    loop = Loop(every=1)
    with loop.watcher:
        loop.step()
        torch.autograd.backward(loop.model(loop.x).square().mean())
        expected = {
            name: float(parameter.grad.cpu().norm())
            for name, parameter in loop.model.named_parameters()
            if parameter.grad is not None
        }
        loop.optimizer.zero_grad()
        loop.step()
        assert loop.watcher.report.norms == pytest.approx(expected, rel=1e-4)
