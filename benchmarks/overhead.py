"""What watching costs, side by side: ``python benchmarks/overhead.py [--quick]``.

All ways of watching run in one process and one thread, in blocks of steps that take turns with bare ones; what
counts is the median over the blocks of the difference to the bare block beside it. It writes the table as
Markdown and JSON into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from gradwatch import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RESULTS = Path(__file__).parent / "results"
BLOCK = 10
BLOCKS = 15


# Models ---------------------------------------------------------------------------------------------------


class Many(nn.Module):
    """Many small parameters, each used once."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(count)])

    def forward(self) -> Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).sum()


class Encoder(nn.Module):
    """A transformer on a fixed batch."""

    def __init__(self, width: int, depth: int, batch: int, length: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.register_buffer("x", torch.randn(batch, length, width))

    def forward(self) -> Tensor:
        out: Tensor = self.layers(self.x)
        return out.square().mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "1,000 small parameters": lambda: Many(1_000),
    "10,000 small parameters": lambda: Many(10_000),
    "6-layer transformer": lambda: Encoder(96, 6, 8, 32),
    "12-layer GPT": lambda: Encoder(96, 12, 4, 64),
}


# Ways of watching -----------------------------------------------------------------------------------------


class Way:
    """How a loop is watched; this one does not watch at all."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.parameters = list(model.parameters())

    def step(self) -> None:
        """Run one step."""
        torch.autograd.backward(self.model())
        self.watch()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def watch(self) -> None:
        """Look at the gradients."""


class Floor(Way):
    """All norms in one fused pass, and one copy to the host: nothing can be cheaper that knows them."""

    def watch(self) -> None:
        torch.stack(
            torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])
        ).tolist()


class Naive(Way):
    """A loop over the parameters, as many write it, with a scalar for each in TensorBoard."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(model, optimizer)
        self.writer = SummaryWriter(tempfile.mkdtemp())
        self.at = 0

    def watch(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.writer.add_scalar(name, parameter.grad.norm().item(), self.at)
        self.at += 1


class Lightning(Way):
    """Lightning's own `grad_norm`, without the logging that costs most of it."""

    def watch(self) -> None:
        from lightning.pytorch.utilities import grad_norm

        grad_norm(self.model, 2)


class Watched(Way):
    """GradWatch, as it is by default; the first step is traced before the clock starts."""

    every = 50

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        self.stack = ExitStack()
        self.watcher = self.stack.enter_context(
            Watcher(
                model,
                optimizers=[optimizer],
                every_n_steps=self.every,
                log_dir=tempfile.mkdtemp(),
            )
        )

    def step(self) -> None:
        with self.watcher.step():
            super().step()


class Everything(Watched):
    """GradWatch with every step logged."""

    every = 1


class Unlogged(Watched):
    """GradWatch in steps that are never logged."""

    every = 10**9


WAYS: dict[str, type[Way]] = {
    "GradWatch, unlogged step": Unlogged,
    "GradWatch, default (every 50)": Watched,
    "GradWatch, every step": Everything,
    "floor: one fused norm, one copy": Floor,
    "naive: norm().item(), add_scalar": Naive,
    "Lightning's grad_norm": Lightning,
}


# Measuring ------------------------------------------------------------------------------------------------


def block(way: Way, steps: int) -> float:
    """Return the mean time of some steps, in milliseconds."""
    begin = time.perf_counter()
    for _ in range(steps):
        way.step()
    return (time.perf_counter() - begin) / steps * 1e3


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every way on every model."""
    for name, make in MODELS.items():
        for label, kind in WAYS.items():
            torch.manual_seed(0)
            model = make()
            optimizer = torch.optim.SGD(model.parameters(), 1e-6)
            bare, way = Way(model, optimizer), kind(model, optimizer)
            block(way, 2)
            slow = kind in {Naive, Lightning}
            # A whole number of logged steps, so that each block has its share of them.
            steps = 50 if kind is Watched and "10,000" not in name else (2 if slow else BLOCK)
            if kind is Watched and "10,000" in name:
                steps = 50
            pairs = [(block(bare, steps), block(way, steps)) for _ in range(3 if quick else BLOCKS)]
            plain = statistics.median(b for b, _ in pairs)
            added = statistics.median(w - b for b, w in pairs)
            if isinstance(way, Watched):
                way.stack.close()
            parameters = len(way.parameters)
            yield {
                "model": name,
                "way": label,
                "bare_ms": round(plain, 3),
                "added_ms": round(added, 4),
                "share": round(added / plain, 5),
                "us_per_parameter": round(added * 1e3 / parameters, 4),
            }


def markdown(found: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        "| model (bare step) | watched by | added, ms | share of the step | µs a parameter |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} ({row['bare_ms']:.1f} ms) | {row['way']} | {row['added_ms']:.2f} "
        f"| {row['share']:+.1%} | {row['us_per_parameter']:.2f} |"
        for row in found
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few blocks, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    found = []
    for row in rows(quick=arguments.quick):
        console.print(row)
        found.append(row)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "overhead.md").write_text(markdown(found))
    console.print(markdown(found), markup=False)


if __name__ == "__main__":
    main()
