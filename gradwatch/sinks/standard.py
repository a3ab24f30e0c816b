"""Which sinks a run has without being told: the console, its loggers, and what the configuration names.

What this room knows that no other does: how to tell a TensorBoard logger from another without importing
any trainer. Limits: a logger of one's own that only looks like TensorBoard's is taken for it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gradwatch.errors import ConfigError
from gradwatch.sinks import Sink
from gradwatch.sinks.console import ConsoleSink
from gradwatch.sinks.jsonl import JsonLinesSink
from gradwatch.sinks.logger import LoggerSink
from gradwatch.sinks.tensorboard import TensorBoardSink, links

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

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
        ConfigError: ``jsonl`` or ``log_dir`` cannot be written.
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


def as_sinks(given: Any) -> tuple[Sink, ...]:
    """Return the sinks that were given.

    Raises:
        TypeError: One of them cannot take a report.
    """
    sinks = tuple(given) if isinstance(given, Iterable) else (given,)
    for sink in sinks:
        if isinstance(sink, type) or not isinstance(sink, Sink):
            found = f"the class `{sink.__name__}`" if isinstance(sink, type) else f"`{sink!r}`"
            raise TypeError(
                f"`sinks`: expected objects with `write(report)` and `close()`, found {found}"
            )
    return sinks


def as_folder(given: Any) -> str:
    """Return the path that was given.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"`log_dir`: expected the path of a folder, found `{given!r}`")
    return os.fspath(given)


class _OwnTensorBoardSink(TensorBoardSink):
    """A TensorBoard sink whose writer is ours, and so is closed with it."""

    def __init__(
        self, log_dir: str | os.PathLike[str], prefix: str, scalars: str | Sequence[str]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 -- half a second

        try:
            self._own = SummaryWriter(os.fspath(log_dir))
        except OSError as error:
            raise ConfigError(
                f"`log_dir`: `{os.fspath(log_dir)}` cannot be written, {error.strerror or error}: "
                "name a folder elsewhere"
            ) from error
        super().__init__(self._own, prefix, scalars)

    def close(self) -> None:
        """Write what is pending, and close the writer."""
        super().close()
        self._own.close()


def _is_tensorboard(logger: Any) -> bool:
    return any("TensorBoard" in base.__name__ for base in type(logger).__mro__)
