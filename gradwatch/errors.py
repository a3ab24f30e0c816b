"""What GradWatch itself raises and warns.

This room imports nothing of GradWatch, so that every other room may use it. Errors of the user's own
code are never wrapped in these: they pass through unchanged.

    Exception
    +-- GradWatchError            everything raised on purpose
        +-- ConfigError           a configuration that cannot be used (also a ValueError)
        +-- CheckError            what `gradwatch check` was given cannot be run (also a ValueError)
        +-- HistoryError          a log folder whose history cannot be read (also a ValueError)
        +-- GradientAlertError    a rule with `action: abort` fired (also a RuntimeError)
            +-- DisconnectedParameterError   ... for parameters that get no gradient
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.report import Report


class GradWatchError(Exception):
    """Raised for anything that GradWatch refuses on purpose."""


class ConfigError(GradWatchError, ValueError):
    """Raised when a configuration cannot be used; the message shows every mistake with its place."""


class CheckError(GradWatchError, ValueError):
    """Raised when what ``gradwatch check`` was given cannot be run or read; the message says how to go on."""


class HistoryError(GradWatchError, ValueError):
    """Raised when the history of a run is not there, or cannot be read."""


class GradientAlertError(GradWatchError, RuntimeError):
    """Raised before the optimizer writes, when a rule with ``action: abort`` fires.

    Args:
        message: The rendered alert and diagnoses.
        report: The report of the step that ended the run.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[type[GradientAlertError], tuple[str, Report | None]]:
        return type(self), (str(self), self.report)


class DisconnectedParameterError(GradientAlertError):
    """Raised when parameters that should train got no gradient for as many steps as a rule allows."""
