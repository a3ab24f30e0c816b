"""GradWatch tells why parameters do not train, and at which expression of your source.

The public names are imported on first use: ``import gradwatch`` alone loads neither torch nor Lightning,
so that TensorBoard, pytest and the command line stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradwatch._single import diagnose
    from gradwatch.config import Config, load_config
    from gradwatch.errors import (
        ConfigError,
        DisconnectedParameterError,
        GradientAlertError,
        HistoryError,
    )
    from gradwatch.history import History, read_history
    from gradwatch.lightning import GradWatch
    from gradwatch.report import Alert, Cause, Diagnosis, Report, Site, Status
    from gradwatch.watcher import Watcher

_HOMES = {
    "Alert": "report",
    "Cause": "report",
    "Config": "config",
    "ConfigError": "errors",
    "Diagnosis": "report",
    "DisconnectedParameterError": "errors",
    "GradWatch": "lightning",
    "GradientAlertError": "errors",
    "History": "history",
    "HistoryError": "errors",
    "Report": "report",
    "Site": "report",
    "Status": "report",
    "Watcher": "watcher",
    "diagnose": "_single",
    "load_config": "config",
    "read_history": "history",
}

__all__ = [
    "Alert",
    "Cause",
    "Config",
    "ConfigError",
    "Diagnosis",
    "DisconnectedParameterError",
    "GradWatch",
    "GradientAlertError",
    "History",
    "HistoryError",
    "Report",
    "Site",
    "Status",
    "Watcher",
    "diagnose",
    "load_config",
    "read_history",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("gradwatch")
    if name not in _HOMES:
        message = f"module 'gradwatch' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(f"gradwatch.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
