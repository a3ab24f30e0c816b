"""Findings for machines: JSON, SARIF 2.1.0, and the commands of GitHub's workflows; and what they come to.

What this room knows that no other does: what these formats call things, from where they count, and what
has to be escaped. Standard library alone.

Limits: SARIF of the subset that GitHub's code scanning reads. A finding without a line stands at the
function that made the model, since neither place shows one that stands nowhere.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gradwatch._findings import CONTRACT, relative
from gradwatch._words import SUMMARIES
from gradwatch.explain import explain, summary_line
from gradwatch.report import Cause, Severity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch._findings import Finding
    from gradwatch.report import Report, Site

_SCHEMA = 1
_SARIF_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_ROOT = "%SRCROOT%"
_CONTRACT_SUMMARY = "What the contract of the configuration says of a parameter does not hold."


def json_of(
    target: str, report: Report, findings: Sequence[Finding], new: Sequence[Finding]
) -> str:
    """Return findings as JSON, with the report that they come from.

    Args:
        target: What was checked, as it was typed.
        report: The report; ``Report.from_dict`` reads it back.
        findings: Everything found.
        new: Those of them that no baseline knows.
    """
    plain = {
        "schema": _SCHEMA,
        "target": target,
        "failed": any(finding.fails for finding in new),
        "findings": [
            {
                "cause": finding.identity.cause,
                "severity": finding.severity,
                "message": finding.message,
                "parameters": finding.identity.parameters,
                "place": _place(finding.place),
                "fingerprint": finding.identity.fingerprint,
                "known": finding not in new,
            }
            for finding in findings
        ],
        "report": report.to_dict(),
    }
    return json.dumps(plain, indent=2)


def _place(site: Site | None) -> dict[str, Any] | None:
    """Return where an expression stands, counted as everywhere in GradWatch: columns from 0."""
    if site is None:
        return None
    keys = ("line", "end_line", "column", "end_column")
    return {"file": relative(site.file)} | {key: getattr(site, key) for key in keys}


def closing(report: Report, findings: Sequence[Finding], new: Sequence[Finding], gone: int) -> str:
    """Return in one line what a check comes to, and in a second one what a baseline no longer needs.

    Args:
        report: The report of the pass.
        findings: Everything found.
        new: Those of them that no baseline knows.
        gone: How many the baseline knows that were not found.
    """
    counts = Counter(finding.severity for finding in new)
    parts = [counted(counts[s], s.value) for s in reversed(Severity) if counts[s]]
    known = len(findings) - len(new)
    head = " and ".join(parts) or ("nothing new found" if known else "no problem found")
    head += f" ({known} known from the baseline)" if known else ""
    line = f"{head}: {summary_line(report)}"
    if not gone:
        return line
    verb = "is gone: update it" if gone == 1 else "are gone: update it"
    return f"{line}\n{counted(gone, 'finding')} of the baseline {verb} with `--update-baseline`"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(2, "finding")
        '2 findings'
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


# --- SARIF ---------------------------------------------------------------------------------------------


def sarif_of(target: str, version: str, new: Sequence[Finding], made_at: Site) -> str:
    """Return findings as a log of SARIF 2.1.0.

    Args:
        target: What was checked, as it was typed: two of them can be uploaded for one commit.
        version: The version of GradWatch.
        new: What to report.
        made_at: Where the model is made, for findings without a line.
    """
    rules = [*Cause, CONTRACT]
    run = {
        "tool": {
            "driver": {
                "name": "GradWatch",
                "semanticVersion": version,
                "rules": [_rule(name) for name in rules],
            }
        },
        "automationDetails": {"id": f"gradwatch/{target}/"},
        "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {_ROOT: {"uri": f"{Path.cwd().as_uri().rstrip('/')}/"}},
        "results": [_result(finding, rules, made_at) for finding in new],
    }
    return json.dumps({"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(name: str) -> dict[str, Any]:
    if name == CONTRACT:
        return _described(name, _CONTRACT_SUMMARY, _CONTRACT_SUMMARY, "warning")
    level = "note" if name is Cause.ZERO_GRADIENT else "warning"
    return _described(str(name), SUMMARIES[Cause(name)], explain(name), level)


def _described(name: str, summary: str, page: str, level: str) -> dict[str, Any]:
    return {
        "id": name,
        "shortDescription": {"text": summary},
        "fullDescription": {"text": summary},
        "help": {"text": page, "markdown": page},
        "defaultConfiguration": {"level": level},
    }


def _result(finding: Finding, rules: Sequence[str], made_at: Site) -> dict[str, Any]:
    place = finding.place if _has_file(finding.place) else made_at
    result: dict[str, Any] = {
        "ruleId": finding.identity.cause,
        "ruleIndex": rules.index(finding.identity.cause),
        "level": finding.severity.value,
        "message": {"text": finding.message},
        "locations": [_location(place)],
        "partialFingerprints": {"gradwatch/v1": finding.identity.fingerprint},
    }
    if finding.inside is not None and _has_file(finding.inside):
        message = {"text": "it happens inside this call"}
        result["relatedLocations"] = [{"id": 0, **_location(finding.inside), "message": message}]
    return result


def _has_file(site: Site | None) -> bool:
    return site is not None and not site.file.startswith("<")


def _location(site: Site | None) -> dict[str, Any]:
    if site is None or not _has_file(site):
        return {}
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": _artifact(site.file), "region": _region(site)}
    }
    if site.function and site.function != "<module>":
        location["logicalLocations"] = [{"fullyQualifiedName": site.function, "kind": "function"}]
    return location


def _artifact(file: str) -> dict[str, str]:
    path = relative(file)
    if path.startswith("../") or Path(path).is_absolute():
        return {"uri": Path(file).absolute().as_uri()}
    return {"uri": quote(path), "uriBaseId": _ROOT}


def _region(site: Site) -> dict[str, int]:
    """Return lines and columns from 1; the last column is the one behind the expression."""
    region = {"startLine": site.line}
    if site.end_line is not None:
        region["endLine"] = site.end_line
    if site.column is not None:
        region["startColumn"] = site.column + 1
        if site.end_column is not None:
            region["endColumn"] = site.end_column + 1
    return region


# --- GitHub's workflow commands ------------------------------------------------------------------------

_COMMANDS = {Severity.NOTE: "notice", Severity.WARNING: "error", Severity.ERROR: "error"}
"""What fails the check is an error in the list of annotations, since the job fails over it."""


def github_of(new: Sequence[Finding], made_at: Site) -> str:
    """Return findings as commands that become annotations of a pull request, a line each.

    Args:
        new: What to report.
        made_at: Where the model is made, for findings without a line.
    """
    return "\n".join(_command(finding, made_at) for finding in new)


def _command(finding: Finding, made_at: Site) -> str:
    place = finding.place if finding.place and _has_file(finding.place) else made_at
    properties = {"file": relative(place.file), "line": place.line}
    if place.end_line is not None:
        properties["endLine"] = place.end_line
    # GitHub takes columns for one line alone.
    if place.column is not None and place.end_line in {None, place.line}:
        properties["col"] = place.column + 1
        if place.end_column is not None:
            properties["endColumn"] = place.end_column + 1
    properties["title"] = f"GradWatch: {finding.identity.cause}"
    given = ",".join(f"{key}={_property(str(value))}" for key, value in properties.items())
    return f"::{_COMMANDS[finding.severity]} {given}::{_data(finding.message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
