"""Which sinks a run has without being told: the console, its loggers, and what the configuration names.

What this room knows that no other does: how to tell a TensorBoard logger from another without importing
any trainer. Limits: a logger of one's own that only looks like TensorBoard's is taken for it.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from gradwatch.sinks.console import ConsoleSink
from gradwatch.sinks.jsonl import JsonLinesSink
from gradwatch.sinks.logger import LoggerSink
from gradwatch.sinks.tensorboard import TensorBoardSink, links

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from gradwatch.sinks import Sink

_log = logging.getLogger("gradwatch")


def standard_sinks(
    names: Collection[str],
    *,
    loggers: Iterable[Any] = (),
    log_dir: str | os.PathLike[str] | None = None,
    jsonl: str | None = None,
    prefix: str = "gradwatch",
    scalars: str | Sequence[str] = "auto",
    history: bool = True,
) -> list[Sink]:
    """Return the sinks of a run.

    Args:
        names: All parameter names, by which whole modules are recognised.
        loggers: The trainer's loggers.
        log_dir: Folder for a TensorBoard writer of our own, for loops without loggers.
        jsonl: File that gets every report as one JSON line.
        prefix: First part of every tag.
        scalars: Parameters with scalars of their own in TensorBoard.
        history: Whether the history is written too, which can only be once in an event file.

    Raises:
        ConfigError: ``jsonl`` cannot be written.
    """
    sinks: list[Sink] = [ConsoleSink(names=names)]
    if jsonl is not None:
        sinks.append(JsonLinesSink(jsonl))
    if log_dir is not None:
        sinks.append(_OwnTensorBoardSink(log_dir, prefix, scalars))
        _log.info("%s", links(log_dir, prefix))
    for logger in loggers:
        if _is_tensorboard(logger):
            sinks.append(TensorBoardSink(logger.experiment, prefix, scalars, history=history))
            _log.info("%s", links(getattr(logger, "log_dir", "."), prefix))
        else:
            sinks.append(LoggerSink(logger, prefix))
    return sinks


class _OwnTensorBoardSink(TensorBoardSink):
    """A TensorBoard sink whose writer is ours, and so is closed with it."""

    def __init__(
        self, log_dir: str | os.PathLike[str], prefix: str, scalars: str | Sequence[str]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 -- half a second

        self._own = SummaryWriter(os.fspath(log_dir))
        super().__init__(self._own, prefix, scalars)

    def close(self) -> None:
        """Write what is pending, and close the writer."""
        super().close()
        self._own.close()


def _is_tensorboard(logger: Any) -> bool:
    return any("TensorBoard" in base.__name__ for base in type(logger).__mro__)
