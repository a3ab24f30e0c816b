"""Train for many steps with everything on, and print the resident memory as it goes.

    python benchmarks/soak.py [STEPS]

A layer that is cut off, one that comes and goes, rules, TensorBoard with the full history, and every step
logged: whatever GradWatch keeps would grow here. The memory of a run without it is printed beside, each in a
process of its own. Memory is read from ``/proc``, so this runs on Linux.
"""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

STEPS = 20_000
EVERY = 1_000
ALLOWED = 1.02
"""How much more memory the end may take than the first thousand steps did."""


def resident() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def train(steps: int, *, watch: bool) -> None:
    """Train, and print the resident memory after every thousand steps."""
    import torch
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import TensorBoardLogger
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from gradwatch import GradWatch

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList(nn.Linear(8, 8) for _ in range(20))
            self.cut, self.sometimes = nn.Linear(8, 8), nn.Linear(8, 8)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            h = batch
            for layer in self.body:
                h = h + layer(h).relu()
            h = h + self.cut(h).detach()
            if batch_idx % 3 == 0:
                h = h + self.sometimes(h)
            return h.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-4)

    class Memory(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            del trainer, pl_module, outputs, batch
            if (batch_idx + 1) % EVERY == 0:
                print(batch_idx + 1, f"{resident():.1f}", flush=True)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=TensorBoardLogger(folder),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*([GradWatch(every_n_steps=1)] if watch else []), Memory()],
        )
        data: Any = torch.randn(64, 4, 8)
        trainer.fit(Net(), DataLoader(data.repeat(steps // 64 + 1, 1, 1), batch_size=None))


def measured(steps: int, *, watch: bool) -> dict[int, float]:
    """Train in a process of its own, and return the memory by step."""
    command = [sys.executable, __file__, str(steps), "watched" if watch else "bare"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = (line.split() for line in done.stdout.splitlines())
    return {int(step): float(size) for step, size in rows}


def main() -> None:
    """Print a table, and fail where memory has grown."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    if len(sys.argv) > 2:  # noqa: PLR2004
        warnings.simplefilter("ignore")
        for name in ("pytorch_lightning", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        train(steps, watch=sys.argv[2] == "watched")
        return
    bare, watched = measured(steps, watch=False), measured(steps, watch=True)
    print(f"{'step':>7} {'bare':>9} {'watched':>9}  MB resident")
    for step, size in watched.items():
        print(f"{step:7,} {bare[step]:9.1f} {size:9.1f}")
    grown = max(watched.values()) / watched[min(watched)]
    print(f"the most is {grown:.3f} times what the first {min(watched):,} steps took")
    if grown > ALLOWED:
        sys.exit(f"error: memory has grown by more than {ALLOWED - 1:.0%}")


if __name__ == "__main__":
    main()
