"""The processes that train one model together: what each of them must know of the others.

What this room knows that no other does: when a collective is safe. It is one where every process comes to
it in the same step, so only the step's number may decide; and it is none at all once DDP without
``find_unused_parameters`` has met a parameter without a gradient, since then some processes wait in their
backward for a reduction that never comes.

Limits: pipeline parallelism, where processes hold different parameters, is not known here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch import _words

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from gradwatch.report import Alert, Diagnosis


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether each process holds a part of a parameter: a DTensor, as FSDP2 makes them."""
    return hasattr(parameter, "to_local")


def is_flattened(*models: nn.Module | None) -> bool:
    """Tell whether FSDP1 keeps parameters in flat pieces, of which ``.grad`` says nothing by name."""
    return any(
        type(module).__name__ == "FullyShardedDataParallel"
        for model in models
        if model is not None
        for module in model.modules()
    )


class Group:
    """The processes of a run.

    Args:
        wrapper: The DDP module around the model, where there is one.
        sharded: Whether the processes hold parts of the parameters.
    """

    def __init__(self, wrapper: DistributedDataParallel | None, *, sharded: bool) -> None:
        self._wrapper = wrapper
        self.sharded = sharded
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.broken = False
        """Whether a collective of ours would wait for processes that do not come."""

    @classmethod
    def of(cls, model: nn.Module, around: nn.Module | None = None) -> Group | None:
        """Return the processes that train a model; None where this one trains it alone.

        Args:
            model: The model.
            around: What the trainer has wrapped it in.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        wrapped = [m for m in (around, model) if isinstance(m, DistributedDataParallel)]
        sharded = any(is_sharded(parameter) for parameter in model.parameters())
        if not wrapped and not sharded:
            return None
        return cls(wrapped[0] if wrapped else None, sharded=sharded)

    def needs_every_gradient(self) -> bool:
        """Tell whether this very backward pass must reach each parameter, or DDP fails."""
        ddp = self._wrapper
        return (
            ddp is not None
            and not ddp.find_unused_parameters
            and not ddp.static_graph
            and bool(ddp.require_backward_grad_sync)
        )

    def exchange(
        self, squares: Sequence[float], *, news: bool, failed: bool = False
    ) -> tuple[list[float], bool]:
        """Return the sums of values over all processes, and whether any of them has news.

        Args:
            squares: As many values in every process.
            news: Whether this process has something to tell.
            failed: Whether this process comes here for the last time: then no one calls a collective again.

        Cost:
            One all-reduce, and a synchronization: every process has to come here in the same step.
        """
        values = [*squares, float(news), float(failed)]
        sums = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(sums)
        *totals, told, lost = sums.tolist()
        self.broken = self.broken or lost > 0
        return totals, told > 0 and not self.broken

    def share(
        self, found: Sequence[Diagnosis], alerts: Sequence[Alert]
    ) -> tuple[tuple[Diagnosis, ...], tuple[Alert, ...]]:
        """Return what is new on any process, and the alerts of all, the same on each.

        Args:
            found: What is new here.
            alerts: What fired here.

        Cost:
            One gather of the texts: every process has to come here in the same step.
        """
        brought: list[Any] = [None] * self.size
        dist.all_gather_object(brought, (tuple(found), tuple(alerts)))
        return self._joined([f for f, _ in brought]), _union([a for _, a in brought])

    def _joined(self, brought: Sequence[Sequence[Diagnosis]]) -> tuple[Diagnosis, ...]:
        """Return each diagnosis once, with the ranks where it holds; the lowest rank's words count."""
        ranks: dict[Any, list[int]] = {}
        first: dict[Any, Diagnosis] = {}
        for rank, diagnoses in enumerate(brought):
            for diagnosis in diagnoses:
                key = _key(diagnosis)
                first.setdefault(key, diagnosis)
                ranks.setdefault(key, []).append(rank)
        joined: dict[Any, Diagnosis] = {}
        told: dict[str, Any] = {}
        for key, diagnosis in first.items():
            where = ranks[key]
            owner = next((told[name] for name in diagnosis.parameters if name in told), None)
            if owner is not None:
                note = _words.other_cause(where, diagnosis.cause, diagnosis.site)
                joined[owner] = replace(joined[owner], notes=(*joined[owner].notes, note))
                continue
            told.update(dict.fromkeys(diagnosis.parameters, key))
            some = () if len(where) == self.size else (_words.on_ranks(where, self.size),)
            joined[key] = replace(diagnosis, notes=(*diagnosis.notes, *some))
        return tuple(joined.values())


def _key(diagnosis: Diagnosis) -> Any:
    site = diagnosis.site
    place = None if site is None else (site.file, site.line, site.column)
    return diagnosis.cause, place, diagnosis.parameters


def _union(brought: Sequence[Iterable[Alert]]) -> tuple[Alert, ...]:
    return tuple(
        {(alert.rule, alert.parameters): alert for alerts in brought for alert in alerts}.values()
    )


def _device() -> torch.device:
    """Return where a tensor must lie for a collective of the backend in use."""
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Exchange:
    """The one collective of a step that all processes share.

    Args:
        group: The processes.
        names: The names of all parameters, the same in every process.
    """

    def __init__(self, group: Group, names: Sequence[str]) -> None:
        self.group = group
        self.news = False
        """Whether this process has something to tell; after the exchange, whether any has."""
        self._names = names
        self._done = False

    def total(self, squares: Mapping[str, float]) -> dict[str, float]:
        """Return the sum over all processes of each parameter's value."""
        values = [squares.get(name, 0.0) for name in self._names]
        totals, self.news = self.group.exchange(values, news=self.news)
        self._done = True
        return dict(zip(self._names, totals, strict=True))

    def finish(self) -> bool:
        """Return whether any process has news."""
        if not self._done:
            _, self.news = self.group.exchange((), news=self.news)
        return self.news

    def apologize(self) -> None:
        """Tell the other processes not to wait for this one any more."""
        values = [0.0] * len(self._names) if self.group.sharded else ()
        self.group.exchange(values, news=False, failed=True)
