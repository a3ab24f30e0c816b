"""Watch a loop written by hand: two losses, of which one trains nothing, and a rule that would stop the run.

    python examples/plain_pytorch.py             what is wrong, and where
    python examples/plain_pytorch.py --fixed

    gradwatch check examples.plain_pytorch:fixed    one step, without training

The data are scikit-learn's digits: 1,797 images of 8 x 8 pixels, which come with the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradwatch import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "default.yaml"


class Autoencoder(nn.Module):
    """Draws a digit from a few numbers, whose spread is to be that of a normal distribution."""

    def __init__(self, *, fixed: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2 * 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
        self.fixed = fixed

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = self.encoder(images).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_var / 2).exp()
        return F.mse_loss(self.decoder(code), images), self.spread(mean, log_var)

    def spread(self, mean: Tensor, log_var: Tensor) -> Tensor:
        if not self.fixed:
            mean, log_var = mean.detach(), log_var.detach()  # once, to plot them
        return 0.5 * (mean**2 + log_var.exp() - log_var - 1).mean()


def train(model: Autoencoder, images: Tensor, log_dir: str | None, epochs: int = 3) -> Watcher:
    """Train as always; two lines are GradWatch's."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Watcher(model, CONFIG, optimizers=[optimizer], log_dir=log_dir) as watcher:
        for _ in range(epochs):
            for batch in images.split(64):
                with watcher.step():
                    drawing, spread = model(batch)
                    watcher.loss_terms(drawing=drawing, spread=spread)
                    (drawing + 0.1 * spread).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if watcher.should_stop:
                    return watcher
    return watcher


def fixed() -> tuple[Autoencoder, Callable[[], Tensor]]:
    """Return the model without the mistake and what gives its loss, for ``gradwatch check``."""
    model = Autoencoder(fixed=True)
    return model, lambda: torch.stack(model(torch.rand(8, 64))).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch a loop in plain PyTorch.")
    parser.add_argument("--fixed", action="store_true", help="without the mistake")
    parser.add_argument("--log-dir", help="folder for TensorBoard")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    watcher = train(Autoencoder(fixed=arguments.fixed), images, arguments.log_dir)
    for term, reached in watcher.report.terms.items():
        print(f"{term} reaches {len(reached)} of 8 parameters")


if __name__ == "__main__":
    main()
