"""Runs of two gloo processes, for ``test_distributed.py``: ``python ranks.py FOLDER`` runs them all.

Each scenario is a function; what it returns is written to ``FOLDER/scenario.rank.json``, and
what it prints on stderr to ``FOLDER/scenario.rank.err``. The processes are forked, so that torch and
Lightning are imported once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gradwatch import GradWatch, Watcher
from gradwatch.sinks import MemorySink

TIMEOUT = 6
SCENARIOS: dict[str, Any] = {}


def scenario(function: Any) -> Any:
    SCENARIOS[function.__name__] = function
    return function


class Lit(LightningModule):
    """Three layers; what each rank uses is given by name."""

    def __init__(self, uses: list[list[str]], cuts: list[list[str]] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(4, 1, bias=False) for _ in range(3))
        self.uses, self.cuts = uses, cuts or [[], []]

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        rank = distributed.get_rank()
        x = torch.ones(1, 4) * (rank + 1)
        loss = sum(getattr(self, name)(x).sum() for name in self.uses[rank])
        return loss + sum(getattr(self, name)(x).detach().sum() for name in self.cuts[rank])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Counted:
    """Counts the collectives that Python calls inside; DDP calls its own from C++."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __enter__(self) -> Self:
        self._real = {n: getattr(distributed, n) for n in ("all_reduce", "all_gather_object")}
        for name, real in self._real.items():
            setattr(distributed, name, self._counting(name, real))
        return self

    def _counting(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return real(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(distributed, name, real)


def fit(
    model: LightningModule,
    config: Any = None,
    *,
    watch: bool = True,
    batches: int = 4,
    strategy: Any = None,
    sinks: tuple[Any, ...] = (),
    every: int = 2,
    trainer: dict[str, Any] | None = None,
    **ddp: Any,
) -> dict[str, Any]:
    """Train, and return what came of it."""
    sink = MemorySink()
    callback = GradWatch(config, every_n_steps=every, sinks=[sink, *sinks])
    error = None
    data: Any = DataLoader(torch.ones(2 * batches, 4), batch_size=1)  # type: ignore[arg-type]
    run = Trainer(
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=strategy or DDPStrategy(process_group_backend="gloo", **ddp),
        callbacks=[callback] if watch else [],
        **trainer or {},
    )
    with Counted() as counted:
        try:
            run.fit(model, data)
        except Exception as raised:  # noqa: BLE001 -- what it is goes into the answer
            error = raised
    return {
        "diagnoses": [
            [str(d.cause), list(d.parameters), list(d.notes)] for d in callback.diagnoses
        ],
        "steps": [report.step for report in sink.reports],
        "norms": [report.norms for report in sink.reports if report.norms],
        "totals": [report.total_norm for report in sink.reports if report.norms],
        "statuses": [{n: str(s) for n, s in r.statuses.items()} for r in sink.reports],
        "alerts": [[a.rule, a.step] for report in sink.reports for a in report.alerts],
        "error": None if error is None else type(error).__name__,
        "text": None if error is None else str(error),
        "error_notes": getattr(error, "__notes__", []),
        "global_step": run.global_step,
        "collectives": counted.calls,
        "weights": [local(p).tolist() for p in model.parameters()],
    }


def local(tensor: Any) -> Tensor:
    held: Tensor = tensor.detach()
    return held.to_local() if hasattr(held, "to_local") else held


ALL = ["a", "b", "c"]
ABORT = {
    "rules": [{"name": "dead", "when": {"status": "missing", "for_steps": 2}, "action": "abort"}]
}


@scenario
def healthy() -> Any:
    return [fit(Lit([ALL, ALL]), watch=watch) for watch in (False, True)]


@scenario
def accumulated() -> Any:
    windows = {"accumulate_grad_batches": 2}
    return [fit(Lit([ALL, ALL]), watch=w, trainer=windows) for w in (False, True)]


@scenario
def unused_everywhere() -> Any:
    return fit(Lit([["a"], ["a"]]))


@scenario
def unused_on_one_rank() -> Any:
    return fit(Lit([["a", "b", "c"], ["a", "b"]]))


@scenario
def unused_in_a_window() -> Any:
    return fit(Lit([["a"], ["a"]]), trainer={"accumulate_grad_batches": 2})


@scenario
def searched() -> Any:
    """One layer is used by nobody, one by rank 0 alone, and DDP looks for such ones."""
    return fit(Lit([["a", "b"], ["a"]]), find_unused_parameters=True)


@scenario
def searched_with_views() -> Any:
    return fit(Lit([["a", "b"], ["a"]]), find_unused_parameters=True, gradient_as_bucket_view=True)


class KeepsZeros(Lit):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


@scenario
def zeros_in_views() -> Any:
    """A layer trains in the first batch only; its zeros lie in the bucket of those that go on training."""

    class Once(KeepsZeros):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.uses = [ALL, ALL] if batch_idx == 0 else [["a", "b"], ["a", "b"]]
            return super().training_step(batch, batch_idx)

    model = Once([ALL, ALL])
    return fit(model, find_unused_parameters=True, gradient_as_bucket_view=True, every=1)


@scenario
def static() -> Any:
    return fit(Lit([["a", "b"], ["a", "b"]]), static_graph=True)


@scenario
def two_causes() -> Any:
    return fit(Lit([["a", "b"], ["a", "b"]], [["c"], []]), find_unused_parameters=True)


@scenario
def aborted() -> Any:
    return fit(Lit([["a", "b"], ["a"]]), ABORT, find_unused_parameters=True)


@scenario
def stopped() -> Any:
    rules = [{"name": "dead", "when": {"status": "missing", "for_steps": 2}, "action": "stop"}]
    return fit(Lit([["a", "b"], ["a"]]), {"rules": rules}, find_unused_parameters=True)


@scenario
def aborted_by_size() -> Any:
    rules = [{"name": "large", "when": {"norm_above": 0.5}, "action": "abort"}]
    return fit(Lit([ALL, ALL]), {"rules": rules})


@scenario
def failing() -> Any:
    """GradWatch itself fails on one rank, and the other must not wait for it."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("injected")

    if distributed.get_rank() == 0:
        Watcher._deliver = fail  # type: ignore[assignment,method-assign]
    return fit(Lit([ALL, ALL]), batches=8)


@scenario
def plain() -> Any:
    """A loop in plain PyTorch, with and without a layer that is cut off."""
    found = []
    for cut in (False, True):
        torch.manual_seed(0)
        body, head = nn.Linear(4, 4), nn.Linear(4, 1)
        model = nn.Sequential(body, Detach() if cut else nn.Identity(), head)
        ddp = DistributedDataParallel(model, find_unused_parameters=cut)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sink = MemorySink()
        with Watcher(ddp, optimizers=[optimizer], sinks=[sink], every_n_steps=1) as watcher:
            for _ in range(3):
                with watcher.step():
                    ddp(torch.ones(1, 4) * (distributed.get_rank() + 1)).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
        found.append([[str(d.cause), list(d.parameters)] for d in watcher.diagnoses])
    return found


class Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Sharded(LightningModule):
    """Layers that FSDP2 splits, one of them too small for two ranks; one may be cut off."""

    def __init__(self, *, cut: bool, shard: bool = True) -> None:
        super().__init__()
        self.cut, self.shard = cut, shard
        if not shard:
            self.configure_model()

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))
        self.un = nn.Linear(4, 6, bias=False)
        if self.shard:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            for layer in (*self.net, self.un):
                fully_shard(layer, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        hidden = self.net[0](batch[:1])
        side = self.un(batch[:1])
        return self.net[1](hidden + (side.detach() if self.cut else side)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def fsdp() -> Any:
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )


@scenario
def sharded() -> Any:
    return [
        fit(Sharded(cut=False), watch=False, strategy=fsdp()),
        fit(Sharded(cut=False), strategy=fsdp()),
        fit(Sharded(cut=True), strategy=fsdp()),
    ]


@scenario
def flattened() -> Any:
    """FSDP1, which can be watched in neither of its two forms."""
    found: list[Any] = []
    for names_kept in (False, True):
        torch.manual_seed(0)
        model = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(4, 6), Detach(), nn.Linear(6, 1)),
            device_id=torch.device("cpu"),
            use_orig_params=names_kept,
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with Watcher(model, optimizers=[optimizer], every_n_steps=1) as watcher:
            for _ in range(3):
                with watcher.step():
                    model(torch.ones(1, 4)).sum().backward()
                    optimizer.step()
        found += [d.parameters for d in watcher.diagnoses]
    return found


def run(name: str, rank: int, folder: Path, store: str) -> None:
    """Be one of the two processes of a scenario."""
    err = os.open(folder / f"{name}.{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(err, 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in names.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "tests"}
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    answer = SCENARIOS[name]()
    (folder / f"{name}.{rank}.json").write_text(json.dumps(answer))


def main() -> None:
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or SCENARIOS:
        store = tempfile.mktemp()  # noqa: S306 -- the name of a file that torch makes
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    run(name, rank, folder, store)
                    code = 0
                sys.stderr.flush()
                os._exit(code)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
