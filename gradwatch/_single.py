"""One pass, diagnosed: ``with diagnose(model):`` around a forward and a backward of the user's own.

What this room knows that no other does: when a parameter is judged within a pass that may hold several losses,
backward passes and optimizer steps. A failure in here is one log record, and the pass is not diagnosed.

Limits: of a configuration `watch` and `contract` hold here; `rules` count steps, and there is one.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from gradwatch import _words, explain
from gradwatch._diagnose import Inspection
from gradwatch._ledger import Facts
from gradwatch._names import checked, names_of
from gradwatch._raised import add_note
from gradwatch._stats import is_hidden
from gradwatch.config import Config, load_config
from gradwatch.report import Diagnosis, Report, Status
from gradwatch.rules import Judge, Observation

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType

    from torch import nn

_log = logging.getLogger("gradwatch")


class diagnose:  # noqa: N801 -- reads as a verb: `with diagnose(model) as diagnosis:`
    """Diagnose one pass: say afterwards which parameters got no gradient, why, and where.

    Nothing is logged, and nothing stays behind: ``.grad``, buffers, random numbers and hooks are as they
    would be without it. An exception of yours passes through unchanged, with a note on its cause.

    Args:
        model: The module whose parameters are asked about.
        config: A ``Config``, a mapping, or the path of a YAML file, whose ``watch`` and ``contract`` say
            what is asked about and what is meant; None for the defaults.

    Raises:
        ConfigError: The configuration cannot be used.

    Cost:
        About the time of five small operations for each one: a pass of large ones hardly notices.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> with diagnose(model) as diagnosis:
        ...     model[1](model[0](torch.ones(1, 2)).detach()).sum().backward()
        >>> [str(found.cause) for found in diagnosis.report.diagnoses]
        ['detached']
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    ) -> None:
        self.report = Report(step=0)
        self._config = load_config(config)
        self._model = checked(model, "diagnose(model)")
        self._inspection: Inspection | None = None
        self._ended: Inspection | None = None
        self._judged: dict[str, Status] = {}
        self._norms: dict[str, float] = {}

    def __str__(self) -> str:
        found = explain.render(self.report, tuple(self.report.statuses))
        healthy = self.report.statuses and not found
        return f"no problem found: {explain.summary_line(self.report)}" if healthy else found

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001 -- IPython's protocol
        del cycle
        printer.text(str(self))

    def __enter__(self) -> Self:
        self.report, self._ended = Report(step=0), None
        self._judged, self._norms = {}, {}
        with self._harmless():
            self._names = names_of(self._model).where(self._config.watch.holds)
            self._inspection = Inspection(
                self._names.parameters, self._names.modules, sizes=True, on_step=self._judge_written
            )
            self._inspection.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, traceback
        inspection, self._inspection = self._inspection, None
        if inspection is None:
            return
        with self._harmless():
            try:
                if error is None:
                    self._judge(inspection, frozenset(self._names.parameters))
            finally:
                inspection.stop()
            if error is None:
                self.report, self._ended = self._reported(inspection), inspection
            elif isinstance(error, Exception):
                add_note(error, inspection, self._model, ())

    def about(self, names: Iterable[str]) -> tuple[Diagnosis, ...]:
        """Return what a pass that has ended says of some parameters, as if all others were well.

        Args:
            names: The parameters asked about; those that are well are passed over.

        Example:
            >>> from torch import nn
            >>> with diagnose(nn.Linear(2, 1)) as diagnosis:
            ...     pass
            >>> [found.parameters for found in diagnosis.about(["weight"])]
            [('weight',)]
        """
        if self._ended is None:
            return ()
        return self._ended.diagnose({name: self.report.statuses[name] for name in names}, 0)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turn a failure of ours inside into one log record, and say nothing of the pass."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            inspection, self._inspection = self._inspection, None
            if inspection is not None:
                inspection.stop()
            _log.warning("GradWatch failed: this pass is not diagnosed", exc_info=error)

    def _reported(self, inspection: Inspection) -> Report:
        statuses = {name: self._judged[name] for name in self._names.parameters}
        judge = Judge((), self._config.contract, self._names.aliases, statuses)
        unmatched = self._config.watch.unmatched(names_of(self._model).known())
        unmatched += judge.unmatched() if statuses else []
        if unmatched:
            _log.warning("no parameter matches %s of the configuration", _words.listed(unmatched))
        open_ = {name: status for name, status in statuses.items() if _asks(judge, name, status)}
        return Report(
            step=0,
            logged=True,
            statuses=statuses,
            norms=self._norms,
            aliases=self._names.aliases,
            diagnoses=inspection.diagnose(open_, 0),
            alerts=judge.observe(_observed(statuses)),
        )

    def _judge_written(self, written: frozenset[str]) -> None:
        with self._harmless():
            if self._inspection is not None:
                self._judge(self._inspection, written)

    def _judge(self, inspection: Inspection, written: frozenset[str]) -> None:
        """Take the status of parameters that are about to be written, or that are left at the end."""
        names = [n for n in self._names.parameters if n in written and n not in self._judged]
        have = inspection.received
        absent = {n for n in names if n not in have or self._names.parameters[n].grad is None}
        wants = {n for n in names if self._names.parameters[n].requires_grad}
        taken = inspection.unseen
        unseen = {n for n in absent if n in taken or is_hidden(self._names.parameters[n])}
        facts = Facts(
            [n for n in names if n in absent & wants - unseen],
            lambda: [n for n in names if n not in wants],
            [n for n in names if n in unseen & wants],
        )
        with inspection.trace.paused():  # the norms are ours, and no part of the pass
            facts.measure({n: self._names.parameters[n] for n in names})
        self._judged.update(facts.statuses)
        self._norms.update(facts.stats.norms)


def _asks(judge: Judge, name: str, status: Status) -> bool:
    """Tell whether a status is to be explained, by what is meant for the parameter."""
    entry = judge.contract_for(name)
    if entry is None or entry.gradient == "required":
        return True
    return entry.gradient == "intermittent" and status is Status.NONFINITE


def _observed(statuses: dict[str, Status]) -> Observation:
    def having(status: Status) -> list[str]:
        return [name for name, known in statuses.items() if known is status]

    return Observation(
        step=0,
        covered=tuple(statuses),
        missing=having(Status.MISSING),
        frozen=having(Status.FROZEN),
        unseen=having(Status.UNSEEN),
    )
