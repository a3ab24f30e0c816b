"""What a traced step costs on top of the step: time for each operation, and peak memory.

Run it with ``python benchmarks/traced_step.py``. Time is the best of many steps, traced and bare ones in
turn, in one process and one thread. Memory is the peak resident size of a fresh process that runs the
steps of one kind, less its size before the first step.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gradwatch import diagnose

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = 1000
REPEATS = {"chain": 100, "transformer": 15}


def chain() -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a model of many small multiplications, and its loss."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self) -> Tensor:
            h: Tensor = self.w
            for _ in range(LENGTH):
                h = h * 1.0
            return h.sum()

    model = Chain()
    return model, model


def transformer(width: int = 256, depth: int = 6) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a transformer, and its loss."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    batch = torch.randn(16, 128, width)
    return model, lambda: model(batch).square().mean()


def bare(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Run one step."""
    model.zero_grad()
    torch.autograd.backward(loss())


def traced(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Run one step under the trace, with the sizes of all gradients on the way."""
    model.zero_grad()
    with diagnose(model):
        torch.autograd.backward(loss())


def seconds(step: Callable[..., None], model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Return how long one step took."""
    begin = time.perf_counter()
    step(model, loss)
    return time.perf_counter() - begin


def operations(loss: Tensor) -> int:
    """Return the number of nodes of the graph above a loss, leaves left out."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return sum(not hasattr(node, "variable") for node in seen)


def peak(kind: str, environment: dict[str, str]) -> float:
    """Return the peak memory, in MiB, of a process that runs steps of one kind of the transformer."""
    command = [sys.executable, __file__, kind]
    done = subprocess.run(
        command, capture_output=True, check=True, text=True, env=os.environ | environment
    )
    return float(done.stdout)


def measure_peak(kind: str) -> None:
    """Print the memory that five steps need beyond what the process had before them."""
    model, loss = transformer(width=512)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        {"bare": bare, "traced": traced}[kind](model, loss)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def times() -> Table:
    """Measure the time of steps."""
    table = Table("step", "operations", "bare, ms", "traced, ms", "more", "µs an operation")
    for name, (model, loss) in {"chain": chain(), "transformer": transformer()}.items():
        pairs = [
            (seconds(bare, model, loss), seconds(traced, model, loss)) for _ in range(REPEATS[name])
        ]
        plain, slow = min(a for a, _ in pairs), min(b for _, b in pairs)
        number = operations(loss())
        table.add_row(
            name,
            str(number),
            f"{plain * 1e3:.2f}",
            f"{slow * 1e3:.2f}",
            f"{slow / plain - 1:+.1%}",
            f"{(slow - plain) / number * 1e6:.1f}",
        )
    return table


def memory() -> Table:
    """Measure the peak memory of steps."""
    table = Table("malloc", "bare, MiB", "traced, MiB", "more")
    settings = {
        "own mappings": ({"MALLOC_MMAP_THRESHOLD_": "65536"}, 1),
        "default": ({}, 5),
    }
    for name, (environment, processes) in settings.items():
        plain, slow = (
            statistics.median(peak(kind, environment) for _ in range(processes))
            for kind in ("bare", "traced")
        )
        table.add_row(name, f"{plain:.1f}", f"{slow:.1f}", f"{slow / plain - 1:+.1%}")
    return table


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    console = Console()
    console.print(times())
    console.print(memory())


if __name__ == "__main__":
    measure_peak(sys.argv[1]) if len(sys.argv) > 1 else main()
