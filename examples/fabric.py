"""Watch a loop of Lightning Fabric's: the model and the optimizer as they are, before Fabric wraps them or after.

    python examples/fabric.py             one branch trains nothing
    python examples/fabric.py --fixed

    gradwatch check examples.fabric:spoilt    one step, without training
    gradwatch check examples.fabric:fixed

The data are scikit-learn's digits: 1,797 images of 8 x 8 pixels, which come with the package.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable


class Branches(nn.Module):
    """Names a digit by its pixels, and by how much ink each row holds."""

    def __init__(self, *, fixed: bool) -> None:
        super().__init__()
        self.pixels = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        self.rows = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.digit = nn.Linear(64, 10)
        self.fixed = fixed

    def forward(self, images: Tensor) -> Tensor:
        rows = self.rows(images.view(-1, 8, 8).sum(dim=2))
        rows = rows if self.fixed else torch.tensor(rows.tolist())  # once, to print them
        out: Tensor = self.digit(torch.cat([self.pixels(images), rows], dim=1))
        return out


def spoilt() -> tuple[Branches, Callable[[], Tensor]]:
    """Return the model with the mistake and what gives its loss, for ``gradwatch check``."""
    return one_step(Branches(fixed=False))


def fixed() -> tuple[Branches, Callable[[], Tensor]]:
    """Return the model without the mistake."""
    return one_step(Branches(fixed=True))


def one_step(model: Branches) -> tuple[Branches, Callable[[], Tensor]]:
    return model, lambda: F.cross_entropy(model(torch.rand(8, 64)), torch.arange(8))


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch a loop of Lightning Fabric's.")
    parser.add_argument("--fixed", action="store_true", help="without the mistake")
    arguments = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    loader = fabric.setup_dataloaders(
        DataLoader(TensorDataset(images, torch.tensor(data.target)), batch_size=64, shuffle=True)
    )
    model = Branches(fixed=arguments.fixed)
    wrapped, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=3e-3))
    loss = torch.tensor(0.0)
    with Watcher(model, optimizers=[optimizer]) as watcher:
        for batch, digits in loader:
            with watcher.step():
                loss = F.cross_entropy(wrapped(batch), digits)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    print(f"loss {loss.item():.2f}; findings: {len(watcher.diagnoses)}")


if __name__ == "__main__":
    main()
