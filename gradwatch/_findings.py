"""What one pass found, one by one, each with an identity that outlives moved lines; and the baseline of known ones.

What this room knows that no other does: what makes a finding the same as one of an earlier commit, and what
the file looks like in which known ones are kept. Standard library alone.

Limits: a finding is another one when a parameter joins or leaves it, when its file is renamed, or when the
text of its line changes by more than spaces.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch import _snippet, explain
from gradwatch.errors import CheckError
from gradwatch.report import Alert, Severity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.report import Diagnosis, Report, Site

CONTRACT = "contract"
"""The name of a finding that is not a cause: what the configuration says does not hold."""
_SCHEMA = 1
_WAY_OUT = "remove it, and write it anew with `--update-baseline`"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a finding is known by, without the number of its line."""

    cause: str
    file: str
    """Relative to the working directory, with slashes; empty where no line is to blame."""
    text: str
    """The line without its spaces; for a contract, what was said."""
    parameters: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """The same as 32 hexadecimal digits."""
        plain = json.dumps([self.cause, self.file, self.text, self.parameters])
        return hashlib.sha256(plain.encode()).hexdigest()[:32]

    def order(self) -> tuple[str, str, str, tuple[str, ...]]:
        """Return what sorts findings in a file."""
        return self.cause, self.file, self.text, self.parameters


@dataclass(frozen=True, slots=True)
class Finding:
    """One diagnosis, or one part of the contract that does not hold."""

    identity: Identity
    severity: Severity
    message: str
    """The fact, the notes and the way out, a line each."""
    rendered: str
    """The same in the form of compiler messages, with place and source."""
    place: Site | None = None
    """The user's own line."""
    inside: Site | None = None
    """The line in an installed library, where that is the one to blame."""

    @property
    def fails(self) -> bool:
        """Whether a check fails over it."""
        return self.severity is not Severity.NOTE


def findings_of(report: Report) -> tuple[Finding, ...]:
    """Return what a report says, one by one and in its order.

    Args:
        report: The report of one pass.
    """
    names = tuple(report.statuses)
    found: tuple[Diagnosis | Alert, ...] = (*report.diagnoses, *report.alerts)
    return tuple(
        _broken_contract(entry, names) if isinstance(entry, Alert) else _diagnosed(entry, names)
        for entry in found
    )


def _diagnosed(diagnosis: Diagnosis, names: tuple[str, ...]) -> Finding:
    site = diagnosis.site
    place = site.caller if site and site.caller else site
    inside = site if site is not place else None
    label = explain.label(diagnosis)
    lines = [f"{explain.fact(diagnosis, names)}{': ' if place and label else ''}"]
    lines[0] += label if place else ""
    lines += [f"note: {_snippet.inside(inside)}"] if inside else []
    lines += [f"note: {note}" for note in diagnosis.notes]
    lines += [f"help: {diagnosis.help}"] if diagnosis.help else []
    text = " ".join((place.source or "").split()) if place else ""
    file = relative(place.file) if place else ""
    return Finding(
        Identity(str(diagnosis.cause), file, text, tuple(sorted(diagnosis.parameters))),
        diagnosis.severity,
        "\n".join(lines),
        explain.render(diagnosis, names),
        place,
        inside,
    )


def _broken_contract(alert: Alert, names: tuple[str, ...]) -> Finding:
    fact = explain.fact(alert, names)
    return Finding(
        Identity(CONTRACT, "", fact, tuple(sorted(alert.parameters))),
        explain.SEVERITIES[alert.action],
        fact,
        explain.render(alert, names),
    )


def relative(file: str) -> str:
    """Return a path as seen from the working directory, with slashes; what is no path stays as it is.

    Args:
        file: A path, or the name Python gives to code without a file.

    Example:
        >>> relative(str(Path("src", "net.py").absolute()))
        'src/net.py'
    """
    if file.startswith("<"):
        return file
    with suppress(ValueError):  # another drive of Windows
        file = os.path.relpath(file)
    return Path(file).as_posix()


# --- the baseline --------------------------------------------------------------------------------------


def read_baseline(path: str) -> frozenset[Identity]:
    """Return the findings that a baseline knows.

    Args:
        path: A file that ``write_baseline`` wrote.

    Raises:
        CheckError: The file cannot be read, or is no baseline.
    """
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise CheckError(f"no file `{path}`\n  = help: write it with `--update-baseline`") from None
    except OSError as error:
        raise CheckError(f"the baseline `{path}` cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise CheckError(f"`{path}` is no baseline ({where})\n  = help: {_WAY_OUT}") from None
    except (UnicodeDecodeError, RecursionError):
        raise CheckError(f"`{path}` is no baseline\n  = help: {_WAY_OUT}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > _SCHEMA:
        raise CheckError(
            f"the baseline `{path}` has schema {schema}, and this version of GradWatch reads up to {_SCHEMA}"
        )
    try:
        return frozenset(_identity(entry) for entry in data["findings"])
    except (KeyError, TypeError, ValueError):
        raise CheckError(f"`{path}` is no baseline\n  = help: {_WAY_OUT}") from None


def _identity(entry: dict[str, Any]) -> Identity:
    cause, file, text, names = (entry[key] for key in ("cause", "file", "text", "parameters"))
    if not all(isinstance(word, str) for word in (cause, file, text, *names)):
        raise ValueError("a baseline holds text alone")
    return Identity(cause, file, text, tuple(sorted(names)))


def write_baseline(path: str, findings: Iterable[Finding]) -> None:
    """Write findings as known, all at once or not at all; the file reads well in a diff.

    Args:
        path: The file, which is replaced where it is a baseline already.
        findings: What is to be known.

    Raises:
        CheckError: The file cannot be written.
    """
    known = sorted({finding.identity for finding in findings}, key=Identity.order)
    entries = [
        {"cause": i.cause, "file": i.file, "text": i.text, "parameters": i.parameters}
        for i in known
    ]
    text = json.dumps({"schema": _SCHEMA, "findings": entries}, indent=2, ensure_ascii=False)
    file = Path(os.path.realpath(path))
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(f"{text}\n", "utf-8")
        part.replace(file)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        message = f"the baseline `{path}` cannot be written: {error.strerror}"
        raise CheckError(message) from None


def compared(
    findings: Sequence[Finding], known: frozenset[Identity]
) -> tuple[tuple[Finding, ...], int]:
    """Return the findings that a baseline does not know, and how many of those it knows are gone.

    Args:
        findings: What was found now.
        known: What ``read_baseline`` returned.
    """
    new = tuple(finding for finding in findings if finding.identity not in known)
    return new, len(known - {finding.identity for finding in findings})
