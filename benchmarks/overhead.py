"""What watching costs, side by side: ``make bench``, or ``python benchmarks/overhead.py [--quick]``.

All ways of watching run in one process and one thread, in steps that take turns with bare ones of the same model:
two models differ by their place in memory alone more than GradWatch takes. What counts is the median of the
differences, with its standard error; where one step in fifty is another, each kind has its own. Counts stand beside the times, because those are noisy: kernels,
copies to the host, calls of Python functions, bytes and records. Ways whose package is not installed are left
out. It writes the table for the documentation, the same as JSON, and a picture.

Limits: ways that hook a model or an optimizer for good cannot be told to look away, and are compared with another
model's bare steps. GradWatch's two hooks on optimizers, of 0.01 ms a step, are there in the bare steps as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[1]
SECONDS, MORE_SECONDS = 12, 40
"""For the steps of one way on one model; more for those whose cost is near to what bare steps differ by."""
FEWEST, MOST = 10, 1200
"""Pairs of a watched and a bare step."""
WARM = 3
TO_HOST = frozenset(["tolist", "numpy", "cpu"])
"""Methods of tensors that copy to the host and are no kernel; ``item()`` is one."""
VIEWS = frozenset(["alias", "detach", "lift_fresh", "view"])
"""Operations that run no kernel."""
EVERY = 50


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
    "6-layer transformer": lambda: Encoder(128, 6, 8, 64),
    "12-layer GPT": lambda: Encoder(128, 12, 4, 128),
}


# Ways of watching -----------------------------------------------------------------------------------------


class Way:
    """How a loop is watched; this one does not watch at all."""

    needs: ClassVar[str | None] = None
    """A package, beyond what GradWatch needs itself."""
    looks_away = True
    """Whether a bare step of the same model is one that this way does not touch."""
    whole = 1
    """Steps after which everything has happened once, at the last of them."""
    seconds = SECONDS
    """Time for its steps on one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-6)
        self.parameters = list(model.parameters())
        self.folder = tempfile.mkdtemp()
        self.stack = ExitStack()

    def step(self) -> None:
        """Run one step, in the order that most loops have."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.model())
        self.watch()
        self.optimizer.step()

    def bare(self) -> None:
        """Run one step that nothing watches."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.model())
        self.optimizer.step()

    def watch(self) -> None:
        """Look at the gradients."""


class Floor(Way):
    """All norms in one fused pass, and one copy to the host."""

    seconds = MORE_SECONDS

    def watch(self) -> None:
        torch.stack(
            torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])
        ).tolist()


class Naive(Way):
    """A loop over the parameters, as many write it, with a scalar for each in TensorBoard."""

    def __init__(self, model: nn.Module) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(model)
        self.writer = self.stack.enter_context(SummaryWriter(self.folder))
        self.at = 0

    def watch(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.writer.add_scalar(name, parameter.grad.norm().item(), self.at)
        self.at += 1


class Lightning(Way):
    """Lightning's own `grad_norm`, with its TensorBoard logger in place of `log_dict`."""

    needs = "lightning"

    def __init__(self, model: nn.Module) -> None:
        from lightning.pytorch.loggers import TensorBoardLogger

        super().__init__(model)
        self.logger = TensorBoardLogger(self.folder)
        self.at = 0

    def watch(self) -> None:
        from lightning.pytorch.utilities import grad_norm

        norms = {name: float(norm) for name, norm in grad_norm(self.model, 2).items()}
        self.logger.log_metrics(norms, self.at)
        self.at += 1


class Ignite(Way):
    """Ignite's `GradsScalarHandler`, called as its engine calls it."""

    needs = "ignite"

    def __init__(self, model: nn.Module) -> None:
        from ignite.engine import Engine, Events
        from ignite.handlers.tensorboard_logger import GradsScalarHandler, TensorboardLogger

        super().__init__(model)
        self.logger: Any = self.stack.enter_context(TensorboardLogger(log_dir=self.folder))
        self.handler = GradsScalarHandler(model, reduction=torch.norm)
        self.engine, self.event = Engine(lambda _engine, _batch: None), Events.ITERATION_COMPLETED

    def watch(self) -> None:
        self.engine.state.iteration += 1
        self.handler(self.engine, self.logger, self.event)


class Wandb(Way):
    """`wandb.watch`, offline, with a histogram of each gradient at every step."""

    needs = "wandb"
    looks_away = False

    def __init__(self, model: nn.Module) -> None:
        import wandb

        super().__init__(model)
        os.environ["WANDB_SILENT"] = "true"
        self.run = wandb.init(mode="offline", dir=self.folder)
        self.stack.callback(self.run.finish)
        self.run.watch(model, log="gradients", log_freq=1)
        self.stack.callback(self.run.unwatch, model)

    def watch(self) -> None:
        self.run.log({})


class Torchlens(Way):
    """The checks of torchlens on changes and on gradients that are not finite."""

    needs = "torchlens"
    looks_away = False

    def __init__(self, model: nn.Module) -> None:
        from torchlens.checks import ChecksSession

        super().__init__(model)
        self.session = ChecksSession(model, self.optimizer)
        self.session.register_change_check()
        self.session.register_nonfinite_gradient_check()
        self.session.attach()
        self.stack.callback(self.session.detach)

    def step(self) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(self.model())
        self.optimizer.step()
        self.session.step()


class Watched(Way):
    """GradWatch, as it is by default; the first step is traced before the clock starts."""

    every = EVERY
    whole = EVERY
    seconds = MORE_SECONDS
    writes = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.watcher = self.stack.enter_context(
            Watcher(
                model,
                optimizers=[self.optimizer],
                every_n_steps=self.every,
                log_dir=self.folder if self.writes else None,
            )
        )

    def step(self) -> None:
        with self.watcher.step():
            super().step()


class Everything(Watched):
    """GradWatch with every step logged."""

    every = whole = 1


class Plain(Everything):
    """GradWatch with every step measured, and nothing written."""

    writes = False


class Unlogged(Watched):
    """GradWatch in steps that are never logged."""

    every, whole = 10**9, 1


WAYS: dict[str, type[Way]] = {
    "GradWatch, a step that is not logged": Unlogged,
    f"GradWatch as it is by default (every {EVERY} steps)": Watched,
    "GradWatch, every step, nothing written": Plain,
    "GradWatch, every step": Everything,
    "floor: one fused norm, one copy": Floor,
    "`norm().item()` and `add_scalar` for each": Naive,
    "Lightning's `grad_norm`, logged": Lightning,
    "Ignite's `GradsScalarHandler`": Ignite,
    "`wandb.watch`, offline": Wandb,
    "torchlens.checks": Torchlens,
}


# Measuring ------------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count what is dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def took(step: Callable[[], None]) -> float:
    """Return the time of one step, in milliseconds."""
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


def median(values: list[float]) -> tuple[float, float]:
    """Return the median, and its standard error by the middle half, as of a normal distribution."""
    quarter = len(values) // 4
    ordered = sorted(values)
    middle = ordered[-1 - quarter] - ordered[quarter]
    return statistics.median(values), 0.93 * middle / len(values) ** 0.5


def counts(bare: Callable[[], None], watched: Callable[[], None]) -> dict[str, int]:
    """Return what one watched step does more than a bare one: kernels, copies to the host, Python calls."""
    found: list[dict[str, int]] = []
    for step in (bare, watched):
        calls: Counter[str] = Counter()

        def note(frame: Any, event: str, argument: Any, calls: Counter[str] = calls) -> None:
            del frame
            if event == "call":
                calls["python"] += 1
            elif event == "c_call" and argument.__name__ in TO_HOST:
                calls["copies"] += isinstance(argument.__self__, Tensor)

        sys.setprofile(note)
        step()
        sys.setprofile(None)
        with Kernels() as seen:
            step()
        copies = calls["copies"] + seen.counts["_local_scalar_dense"]
        kernels = sum(count for name, count in seen.counts.items() if name not in VIEWS)
        found.append({"kernels": kernels, "copies": copies, "calls": calls["python"]})
    less, more = found
    return {name: more[name] - less[name] for name in less}


def written(way: Way) -> int:
    """Return the bytes in a way's folder."""
    return sum(path.stat().st_size for path in Path(way.folder).rglob("*") if path.is_file())


def records(way: Way) -> int:
    """Return the records in the event files of a way's folder."""
    files = Path(way.folder).rglob("events.out.tfevents*")
    return sum(sum(1 for _ in RawEventFileLoader(str(path)).Load()) for path in files)


def row(
    label: str, kind: type[Way], make: Callable[[], nn.Module], *, quick: bool
) -> dict[str, Any]:
    """Measure one way on one model."""
    torch.manual_seed(0)
    way = kind(make())
    bare = way.bare if way.looks_away else Way(make()).bare
    # The first steps warm up, and GradWatch traces one of them.
    both = [took(bare) + took(way.step) for _ in range(WARM)]
    fitting = int(way.seconds * 1e3 / min(both))
    count = way.whole if quick else max(min(fitting, MOST), FEWEST, 2 * way.whole)
    pairs: list[tuple[float, float]] = []
    for turn in range(count):
        first = took(way.step) if turn % 2 else 0.0
        plain = took(bare)
        pairs.append((plain, first or took(way.step)))
    more = counts(bare, way.step)
    way.stack.close()
    bare_ms = statistics.median(plain for plain, _ in pairs)
    # Of so many steps one is another: each kind has a median of its own.
    rare = [w - b for at, (b, w) in enumerate(pairs, WARM + 1) if at % way.whole == 0]
    usual = [w - b for at, (b, w) in enumerate(pairs, WARM + 1) if at % way.whole] or rare
    (often, error), (seldom, other) = median(usual), median(rare)
    added = often + (seldom - often) / way.whole
    steps = WARM + 2 + count
    return {
        "way": label,
        "bare_ms": round(bare_ms, 3),
        "added_ms": round(added, 4),
        "error_ms": round(math.hypot(error, other / way.whole), 4),
        "share": round(added / bare_ms, 5),
        "us_per_parameter": round(added * 1e3 / len(way.parameters), 4),
        "kernels": more["kernels"],
        "copies": more["copies"],
        "calls_per_parameter": round(more["calls"] / len(way.parameters), 2),
        "bytes": round(written(way) / steps),
        "records": round(records(way) / steps, 2),
        "steps": count,
    }


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every way that can be had on every model."""
    for name, make in MODELS.items():
        for label, kind in WAYS.items():
            if kind.needs is None or importlib.util.find_spec(kind.needs) is not None:
                yield {"model": name} | row(label, kind, make, quick=quick)


# Showing --------------------------------------------------------------------------------------------------


def markdown(found: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines: list[str] = []
    for model in dict.fromkeys(entry["model"] for entry in found):
        mine = [entry for entry in found if entry["model"] == model]
        bare = statistics.median(entry["bare_ms"] for entry in mine)
        lines += [
            "",
            f"**{model}**, bare step {bare:.0f} ms",
            "",
            (
                "| watched by | added, ms | of the step | µs a parameter | kernels | copies to the host "
                "| Python calls a parameter | bytes written | records |"
            ),
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {entry['way']} | {entry['added_ms']:.2f} ± {entry['error_ms']:.2f} | {entry['share']:.1%} "
            f"| {entry['us_per_parameter']:.2f} | {entry['kernels']:,} | {entry['copies']:,} "
            f"| {entry['calls_per_parameter']:.2f} | {entry['bytes']:,} | {entry['records']:.4g} |"
            for entry in mine
        ]
    return "\n".join(lines[1:]) + "\n"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw what each way adds to a step, if there is something to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(entry["model"] for entry in found))
    figure, axes = plt.subplots(1, len(models), figsize=(4 * len(models), 4), sharey=True)
    for axis, model in zip(axes, models, strict=True):
        mine = [entry for entry in found if entry["model"] == model][::-1]
        colours = ["#0072B2" if "GradWatch" in entry["way"] else "#8C8C8C" for entry in mine]
        shares = [max(100 * entry["share"], 0.01) for entry in mine]
        axis.barh([entry["way"].replace("`", "") for entry in mine], shares, color=colours)
        axis.set_xscale("log")
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("added to the step, %")
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one block each, to see that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of what is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("gradwatch").setLevel(logging.ERROR)  # bare steps are no steps of a watcher's
    console = Console()
    found = []
    for entry in rows(quick=arguments.quick):
        console.print(f"{entry['model']}: {entry['way']}: {entry['added_ms']} ms", markup=False)
        found.append(entry)
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}, one thread"
    text = f"{versions}; the median difference to bare steps beside them, and its standard error.\n\n{markdown(found)}"
    (arguments.out / "img").mkdir(parents=True, exist_ok=True)
    (arguments.out / "cost_table.md").write_text(text)
    (arguments.out / "cost_table.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, arguments.out / "img" / "cost.png")
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
