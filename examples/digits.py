"""Train a digit classifier that looks healthy and is not, and read what GradWatch says about it.

    python examples/digits.py             four parts of the model do not train, yet the loss falls
    python examples/digits.py --fixed     the same model without the mistakes
    python examples/digits.py --strict    as in CI: a rule ends the run

    gradwatch check examples.digits:after_a_month    one step, without training
    gradwatch check examples.digits:fixed

The data are scikit-learn's digits: 1,797 images of 8 x 8 pixels, which come with the package.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import GradientAlertError, GradWatch

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
Batch = tuple[Tensor, ...]


class DigitNet(pl.LightningModule):
    """Reads an image twice, for its shapes and for its ink per row and column, and names the digit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.shapes = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
        )
        self.ink = nn.Sequential(nn.Linear(8 + 8, 32), nn.ReLU())
        self.digit = nn.Linear(32 + 32, 10)
        self.parity = nn.Linear(32 + 32, 1)  # odd or even: a second task that helps the first

    def forward(self, images: Tensor) -> Tensor:
        shapes = self.shapes(self.stem(images))
        ink = self.ink(torch.cat([images.mean(dim=(1, 2)), images.mean(dim=(1, 3))], dim=1))
        return torch.cat([shapes, ink], dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, digits = batch
        features = self(images)
        digit_loss = F.cross_entropy(self.digit(features), digits)
        odd = self.parity(features).squeeze(1)
        parity_loss = F.binary_cross_entropy_with_logits(odd, (digits % 2).float())
        self.log("digit_loss", digit_loss, prog_bar=True)
        self.log("parity_loss", parity_loss)
        return digit_loss + 0.5 * parity_loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, digits = batch
        right = self.digit(self(images)).argmax(dim=1) == digits
        self.log("accuracy", right.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class DigitNetAfterAMonth(DigitNet):
    """The same model after a month of experiments; each of them left something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.rotation = nn.Linear(32 + 32, 4)  # which way is up: to be predicted as well, soon
        self.stem.requires_grad_(False)  # hold the filters still while the rest warms up

    def forward(self, images: Tensor) -> Tensor:
        # The features were once cached on disk, and a cache needs no graph.
        shapes = self.shapes(self.stem(images)).detach()
        ink = self.ink(torch.cat([images.mean(dim=(1, 2)), images.mean(dim=(1, 3))], dim=1))
        return torch.cat([shapes, ink], dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, digits = batch
        features = self(images)
        digit_loss = F.cross_entropy(self.digit(features), digits)
        odd = self.parity(features).squeeze(1)
        parity_loss = F.binary_cross_entropy_with_logits(odd, (digits % 2).float())
        self.log("digit_loss", digit_loss, prog_bar=True)
        self.log("parity_loss", parity_loss)
        return digit_loss


def digit_images() -> tuple[TensorDataset, TensorDataset]:
    """Return the images to train on and those held out, a quarter of all."""
    images, digits = load_digits(return_X_y=True)
    train_images, test_images, train_digits, test_digits = train_test_split(
        images.reshape(-1, 1, 8, 8) / 16, digits, test_size=0.25, stratify=digits, random_state=0
    )
    train = TensorDataset(torch.tensor(train_images).float(), torch.tensor(train_digits))
    test = TensorDataset(torch.tensor(test_images).float(), torch.tensor(test_digits))
    return train, test


def after_a_month() -> tuple[DigitNet, Batch]:
    """Return the model with the mistakes, and a batch for one step of it."""
    return DigitNetAfterAMonth(), digit_images()[0][:64]


def fixed() -> tuple[DigitNet, Batch]:
    """Return the model without the mistakes, and a batch for one step of it."""
    return DigitNet(), digit_images()[0][:64]


def what_trained(model: nn.Module, before: dict[str, Tensor], watch: GradWatch) -> Table:
    """Return a table of every parameter: what GradWatch saw last, and whether it moved at all."""
    table = Table("parameter", "elements", "gradient", "trained", title="Which parameters trained")
    statuses = watch.report.statuses
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        row = [name, f"{parameter.numel():,}", statuses[name], "yes" if moved else "no"]
        table.add_row(*row, style=None if moved else "red")
    return table


def tensorboard_command(log_dir: str) -> str:
    """Return what to type to look at ``log_dir``, with the TensorBoard of the running Python."""
    program = Path(sys.executable).with_name("tensorboard")
    words = [
        short(program) if program.exists() else "tensorboard",
        "--logdir",
        short(Path(log_dir)),
    ]
    return shlex.join(words)


def short(path: Path) -> str:
    """Return ``path`` as seen from here, where it lies below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def quiet_lightning() -> None:
    """Leave out hints that mean nothing for 1,797 small images, and a warning about Lightning's own code."""
    for namespace in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(namespace).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on 1,797 images of digits under GradWatch.")
    parser.add_argument("--fixed", action="store_true", help="train the model without the mistakes")
    parser.add_argument("--strict", action="store_true", help="end the run by configs/strict.yaml")
    parser.add_argument(
        "--epochs", type=int, default=20, help="passes over the images (default: 20)"
    )
    parser.add_argument("--log-dir", default="runs", help="folder for TensorBoard (default: runs)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    quiet_lightning()
    pl.seed_everything(0, verbose=False)
    torch.set_num_threads(1)  # too small a model to share among cores
    console = Console(highlight=False)
    train, test = digit_images()
    model = DigitNet() if options.fixed else DigitNetAfterAMonth()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    watch = GradWatch(ROOT / "configs" / "strict.yaml") if options.strict else GradWatch()
    logger = TensorBoardLogger(options.log_dir, name="digits")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        callbacks=[watch],
        logger=logger,
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )

    start = time.perf_counter()
    try:
        trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(test, len(test)))
    except GradientAlertError as error:
        console.print(f"\n{type(error).__name__}: a rule of configs/strict.yaml ended the run")
        console.print(
            f"in step {trainer.global_step}, before the optimizer wrote. So it would fail in CI."
        )
        return 1

    seconds = time.perf_counter() - start
    accuracy = trainer.callback_metrics["accuracy"].item()
    console.print("\n", what_trained(model, before, watch), sep="")
    console.print(
        f"{accuracy:.1%} of {len(test)} held-out images right, {seconds:.0f} s of training"
    )
    console.print("\nEvery parameter at every logged step, in TensorBoard's GradWatch tab:\n")
    console.print(f"    {tensorboard_command(logger.log_dir)}", markup=False, soft_wrap=True)
    if not options.fixed:
        console.print(
            "\nThe same model without the mistakes: add [bold]--fixed[/] (make demo ARGS=--fixed)."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
