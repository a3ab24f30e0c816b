"""The vocabulary of GradWatch as values: what is said about one step.

Every other room speaks in these words, and nothing here computes anything: a fact is a value first, a
rule looks at it later, and only ``explain`` turns it into sentences. Standard library alone, so that a
dashboard or a CI job can read reports without torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

SCHEMA = 1


class Status(StrEnum):
    """A fact about one parameter in one step."""

    OK = "ok"
    """A gradient arrived, finite and with at least one element that is not zero."""
    FROZEN = "frozen"
    """``requires_grad`` is False."""
    UNSEEN = "unseen"
    """Gradients cannot be seen here, or the parameter is lazy and not materialised."""
    ZERO = "zero"
    """A gradient arrived, and every element of it is 0."""
    MISSING = "missing"
    """It requires grad, and no gradient of this step's backward passes is there."""
    NONFINITE = "nonfinite"
    """A gradient arrived, with NaN or infinity in it."""

    @property
    def code(self) -> int:
        """The number that stands for the status where numbers are needed; the worst is the largest."""
        return _CODES[self]


_CODES = {status: code for code, status in enumerate(Status)}


class Cause(StrEnum):
    """Why a parameter has the status it has; the value is also the name of the cause's page."""

    FROZEN = "frozen"
    """``requires_grad`` is False."""
    UNUSED = "unused"
    """No operation read it."""
    NOT_IN_LOSS = "not_in_loss"
    """It was read, but nothing computed from it gets to the loss."""
    DETACHED = "detached"
    """Cut by ``detach``, ``.data``, or by re-wrapping a computed tensor as a new leaf."""
    NO_GRAD = "no_grad"
    """An operation on its path ran with gradient mode off."""
    LEFT_TORCH = "left_torch"
    """The value left tensors for Python or NumPy, and came back as a constant."""
    NON_DIFFERENTIABLE = "non_differentiable"
    """An operation without a derivative stands on the way to the loss."""
    CUSTOM_FUNCTION = "custom_function"
    """A ``torch.autograd.Function`` returned None for it, or marked its output."""
    REENTRANT_CHECKPOINT = "reentrant_checkpoint"
    """A reentrant checkpoint had no input that requires grad."""
    CLEARED = "cleared"
    """A gradient arrived, and ``.grad`` was emptied before it could be used."""
    NOT_REQUESTED = "not_requested"
    """``backward(inputs=...)`` left it out, or only ``torch.autograd.grad`` for others ran."""
    REPLACED = "replaced"
    """The forward pass used another tensor than the registered parameter."""
    NOT_IN_OPTIMIZER = "not_in_optimizer"
    """It requires grad, and stands in no parameter group of any optimizer."""
    ZERO_GRADIENT = "zero_gradient"
    """A gradient arrived, and every element of it is 0."""
    NONFINITE_GRADIENT = "nonfinite_gradient"
    """NaN or infinity arrived."""
    UNDETERMINED = "undetermined"
    """None of these could be shown; the notes list what was ruled out."""


class Severity(StrEnum):
    """How much a diagnosis matters."""

    NOTE = "note"
    """Worth knowing, and often intended."""
    WARNING = "warning"
    """Probably a mistake."""
    ERROR = "error"
    """A rule said so."""


class Action(StrEnum):
    """What happens when a rule fires, from the mildest to the hardest."""

    LOG = "log"
    """Only written to the sinks."""
    WARN = "warn"
    """Printed once per set of parameters, and again only after it healed."""
    STOP = "stop"
    """Training ends cleanly after this step."""
    ABORT = "abort"
    """An error is raised before the optimizer writes."""


@dataclass(frozen=True, slots=True)
class Site:
    """One expression in source code."""

    file: str
    """Path of the file, or the name Python gives to code without one (``<stdin>``)."""
    line: int
    """First line, from 1."""
    end_line: int | None = None
    """Last line, inclusive."""
    column: int | None = None
    """First column in characters, from 0."""
    end_column: int | None = None
    """Column behind the last character of the expression on ``end_line``."""
    function: str | None = None
    """Qualified name of the function that holds the expression."""
    module: str | None = None
    """Path of the ``nn.Module`` that was running; empty for the model itself."""
    source: str | None = None
    """Text of the first line, where it can be read."""
    caller: Site | None = None
    """The user's own line that led here, when ``file`` belongs to an installed library."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One cause at one site, with all the parameters it explains."""

    severity: Severity
    cause: Cause
    status: Status
    parameters: tuple[str, ...]
    site: Site | None = None
    operation: str | None = None
    """Public name of the operation at the site, such as ``torch.Tensor.detach``."""
    notes: tuple[str, ...] = ()
    """Evidence, a sentence each."""
    help: str | None = None
    """One concrete change that the user can make."""
    step: int = 0
    """The step in which it was found."""
    healed_at: int | None = None
    """The step from which a gradient arrived again."""


@dataclass(frozen=True, slots=True)
class GradStats:
    """What one fused pass over the gradients measured."""

    norms: dict[str, float]
    """L2 norm of each gradient that arrived."""
    zero: frozenset[str] = frozenset()
    """Names whose gradient is zero in every element."""
    nonfinite: frozenset[str] = frozenset()
    """Names whose gradient holds NaN or infinity."""
    total: float = 0.0
    """L2 norm over all of them together."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule that fired, with the parameters for which it did."""

    rule: str
    action: Action
    parameters: tuple[str, ...]
    value: float | None
    """The worst norm for a rule over norms, None for a rule over a status."""
    limit: float | None
    steps: int
    """For how many steps in a row it has held (the longest among the parameters)."""
    step: int
    status: Status | None = None
    """The status that the rule looks for, None for a rule over norms."""
    message: str | None = None
    """What the contract says of these parameters, for an alert about a contract."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything said about one optimizer step."""

    step: int
    """Optimizer steps before this one (the Trainer's ``global_step``)."""
    optimizer: int = 0
    """Position of the optimizer that stepped."""
    logged: bool = False
    """Whether norms were measured in this step."""
    statuses: dict[str, Status] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    total_norm: float | None = None
    clipped_norm: float | None = None
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each tied parameter all of its names, the first of which is the key everywhere."""
    diagnoses: tuple[Diagnosis, ...] = ()
    """All that hold now."""
    alerts: tuple[Alert, ...] = ()
    batch: int = 0
    """Batches before this one in which an optimizer stepped: the x-axis of Lightning's curves."""
    cost: float | None = None
    """Which part of the run so far was taken by watching it, from 0 to 1."""
    terms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each term of the loss that was named, the parameters that it reaches."""
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values.

        Example:
            >>> report = Report(step=3, statuses={"weight": Status.MISSING})
            >>> Report.from_dict(report.to_dict()) == report
            True
        """
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Return the report that ``to_dict`` wrote.

        Args:
            data: What ``to_dict`` returned, also after a round trip through JSON.

        Raises:
            ValueError: The schema is newer than this version of GradWatch knows.
        """
        if data.get("schema", SCHEMA) > SCHEMA:
            message = f"report has schema {data['schema']}, this version of GradWatch reads up to {SCHEMA}"
            raise ValueError(message)
        return cls(
            **data
            | {
                "statuses": {name: Status(value) for name, value in data["statuses"].items()},
                "norms": {name: float(value) for name, value in data["norms"].items()},
                "total_norm": _number(data["total_norm"]),
                "clipped_norm": _number(data["clipped_norm"]),
                "terms": {name: tuple(reached) for name, reached in data.get("terms", {}).items()},
                "aliases": {name: tuple(names) for name, names in data["aliases"].items()},
                "diagnoses": tuple(_diagnosis(entry) for entry in data["diagnoses"]),
                "alerts": tuple(_alert(entry) for entry in data["alerts"]),
            }
        )


def _plain(value: Any) -> Any:
    """Turn tuples into lists, enum members into text, and numbers JSON lacks into text."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):  # noqa: PLR0124 -- NaN
        return str(value)
    return value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _site(data: dict[str, Any] | None) -> Site | None:
    return None if data is None else Site(**data | {"caller": _site(data["caller"])})


def _diagnosis(data: dict[str, Any]) -> Diagnosis:
    return Diagnosis(
        **data
        | {
            "severity": Severity(data["severity"]),
            "cause": Cause(data["cause"]),
            "status": Status(data["status"]),
            "parameters": tuple(data["parameters"]),
            "site": _site(data["site"]),
            "notes": tuple(data["notes"]),
        }
    )


def _alert(data: dict[str, Any]) -> Alert:
    return Alert(
        **data
        | {
            "action": Action(data["action"]),
            "parameters": tuple(data["parameters"]),
            "value": _number(data["value"]),
            "limit": _number(data["limit"]),
            "status": None if data["status"] is None else Status(data["status"]),
        }
    )
