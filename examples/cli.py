"""Train by LightningCLI: the model, the data, and what GradWatch may say all stand in one YAML file.

    python examples/cli.py fit --config configs/cli.yaml
    python examples/cli.py fit --config configs/cli.yaml --trainer.max_epochs 5
    python examples/cli.py fit --help

    gradwatch check examples.cli:student    one step, without training

Needs the extra ``cli`` (jsonargparse), which LightningCLI asks for.
"""

from __future__ import annotations

import warnings

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, ...]


class Digits(pl.LightningDataModule):
    """scikit-learn's 1,797 images of digits, which come with the package.

    Args:
        batch_size: Images in a batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        images, digits = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images).float() / 16, torch.tensor(digits))
        return DataLoader(data, self.batch_size, shuffle=True)


class Student(pl.LightningModule):
    """Learns the digits, and to agree with a slow average of itself, which no gradient is meant to reach.

    Args:
        width: Units in the hidden layer.
        lr: Learning rate.
    """

    def __init__(self, width: int = 64, lr: float = 3e-3) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.teacher = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.teacher.load_state_dict(self.student.state_dict())
        self.lr = lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, digits = batch
        answers = self.student(images)
        with torch.no_grad():
            advice = self.teacher(images)
        loss = F.cross_entropy(answers, digits) + 0.1 * F.mse_loss(answers, advice)
        self.log("loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.lerp_(student, 0.05)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.student.parameters(), lr=self.lr)


def student() -> tuple[Student, Batch]:
    """Return the model, and a batch for one step of it."""
    return Student(), next(iter(Digits().train_dataloader()))


def main() -> None:
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    LightningCLI(Student, Digits, save_config_callback=None)


if __name__ == "__main__":
    main()
