"""What holds for every test: it starts from the same seed in an empty folder, and leaves no trace."""

from __future__ import annotations

import logging
import random
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.modules.module as torch_module
import torch.optim.optimizer as torch_optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = "pytester"

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of a Trainer that trains for one epoch on the CPU, and prints and writes nothing."""

SCRIPTED_NET = """
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from gradwatch import GradWatch


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return (self.left(batch) + self.right(batch).detach()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


"""
"""The beginning of a script with a cut in line 16, for what needs a process of its own."""

LIGHTNING_LOGGERS = (
    "pytorch_lightning",
    "lightning_fabric",
    "lightning.pytorch",
    "lightning.fabric",
)


def process_state() -> dict[str, Any]:
    """Return what a test or GradWatch could leave behind in torch and logging, by name."""
    state: dict[str, Any] = {
        "function modes": [type(mode).__name__ for mode in _get_current_function_mode_stack()],
        "dispatch modes": [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()],
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "level of the gradwatch logger": logging.getLogger("gradwatch").level,
        "handlers of the gradwatch logger": list(logging.getLogger("gradwatch").handlers),
    }
    for home in (torch_module, torch_optimizer):
        hooks = {name: value for name, value in vars(home).items() if name.startswith("_global_")}
        state |= {
            name: list(value.values()) for name, value in hooks.items() if hasattr(value, "values")
        }
    if (eval_frame := sys.modules.get("torch._dynamo.eval_frame")) is not None:
        state["compiler stance"] = eval_frame._stance.stance
    return state


class Kernels(TorchDispatchMode):
    """Count the operations that reach a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_trace_left() -> Iterator[None]:
    """Fail a test after which a mode, a hook, a process group, or a setting is not as before."""
    before = process_state()
    yield
    after = process_state()
    left = {name: value for name, value in after.items() if value != before.get(name, value)}

    assert left == {}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random numbers."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the legacy generator is the one that other libraries draw from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every test in a folder of its own, so that nothing is written into the working tree."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's greetings out of what tests capture."""
    loggers = [logging.getLogger(name) for name in LIGHTNING_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
