"""What the page is told of a run, and the page as one file that needs no server.

What this room knows that no other does: how the tab's own scripts, which ask a server for data, work from a
file: its modules are joined, and a source of data that lies in the file takes the server's place.

Limits: a file holds at most 2,000 columns; zooming in on one shows no more than these.
"""

from __future__ import annotations

import base64
import html
import json
import re
import struct
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch import _words, explain, history
from gradwatch.report import Status

if TYPE_CHECKING:
    from gradwatch.history import History
    from gradwatch.report import Site

_COLUMNS = 2000
STATUSES = [status.value for status in Status]


def findings_of(known: History) -> dict[str, Any]:
    """Return the verdict, the counts of the last step, and each finding, as text to show."""
    report, last = known.report, known.status[-1] if len(known.status) else np.zeros(0, np.uint8)
    counts = {name: int((last == code).sum()) for code, name in enumerate(STATUSES)}
    return {
        "parameters": len(known.names),
        "batches": [int(known.batches[0]), int(known.batches[-1])] if len(known.batches) else None,
        "counts": counts,
        "findings": [
            {
                "cause": str(found.cause),
                "status": str(found.status),
                "severity": str(found.severity),
                "fact": explain.fact(found, known.names),
                "parameters": list(found.parameters),
                "place": _place(found.site),
                "text": explain.render(found, known.names),
                "step": found.step,
                "healed_at": found.healed_at,
            }
            for found in report.diagnoses
        ],
        "alerts": [
            {
                "rule": alert.rule,
                "action": str(alert.action),
                "parameters": list(alert.parameters),
                "step": alert.step,
                "steps": alert.steps,
            }
            for alert in report.alerts
        ],
    }


def _place(site: Site | None) -> str | None:
    if site is None:
        return None
    shown = site.caller or site
    return f"{_words.shown_path(shown.file)}:{shown.line}"


def matrix_of(
    known: History, columns: int, low: int | None = None, high: int | None = None
) -> tuple[dict[str, Any], bytes]:
    """Return names, the batches of each column, and the cells: all statuses, then all norms, row by row."""
    ranges, status, norms = history.pooled(known, columns, low, high)
    head = {
        "names": list(known.names),
        "ranges": ranges.tolist(),
        "statuses": STATUSES,
        "scale": [history.LOWEST, history.HIGHEST],
    }
    cells = [np.ascontiguousarray(values.T).tobytes() for values in (status, norms)]
    return head, b"".join(cells)


def packed(head: dict[str, Any], body: bytes) -> bytes:
    """Return header and cells as the page reads them."""
    text = json.dumps(head).encode()
    return struct.pack("<I", len(text)) + text + body


def html_of(known: History, title: str) -> str:
    """Return the page of a run as one file: nothing is loaded from anywhere.

    Args:
        known: The run.
        title: What to call it.
    """
    data = {
        "title": title,
        "findings": findings_of(known),
        "matrix": base64.b64encode(packed(*matrix_of(known, _COLUMNS))).decode(),
    }
    # Inside of a script, `</script>` and `<!--` would end it, whatever a parameter is called.
    text = json.dumps(data).replace("<", "\\u003c")
    modules = [_without_imports(_static(name)) for name in ("map.js", "page.js", "file.js")]
    return _HTML.format(
        title=html.escape(title), style=_static("page.css"), script="\n".join(modules), data=text
    )


def _static(name: str) -> str:
    return files("gradwatch.tensorboard_plugin").joinpath("static", name).read_text("utf-8")


def _without_imports(module: str) -> str:
    return re.sub(
        r"^export ", "", re.sub(r"^import .*\n", "", module, flags=re.MULTILINE), flags=re.MULTILINE
    )


_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - GradWatch</title>
<style>
{style}</style>
</head>
<body>
<script type="application/json" id="data">{data}</script>
<script type="module">
{script}</script>
</body>
</html>
"""
