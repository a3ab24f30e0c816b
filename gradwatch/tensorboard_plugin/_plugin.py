"""The server's side of the GradWatch tab: it reads histories through TensorBoard, and pools them for a page.

What this room knows that no other does: TensorBoard's data provider, which serves local folders, remote ones
and its own data server alike; and what a page may be sent: a few fixed files, JSON, and one binary of two
bytes a cell with no more columns than the page has pixels.

Limits: a run is decoded as a whole, and kept until something new was written; of many runs the last four.
"""

from __future__ import annotations

import gzip
import json
from collections import OrderedDict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from gradwatch import history
from gradwatch._page import findings_of, matrix_of, packed
from gradwatch.errors import HistoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_TYPES = {
    "index.js": "text/javascript",
    "map.js": "text/javascript",
    "page.js": "text/javascript",
    "page.css": "text/css",
}
_AT_ONCE = 64
_KEPT = 4
_COLUMNS = 4000


class Plugin(base_plugin.TBPlugin):  # type: ignore[misc] # tensorboard has no types
    """Serve the tab."""

    plugin_name = history.PLUGIN

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        self._values: dict[str, dict[str, tuple[Any, bytes]]] = {}
        self._runs: OrderedDict[str, tuple[Any, history.History]] = OrderedDict()

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """Return the routes."""
        answers = {
            "/static/*": self._serve_file,
            "/runs": self._serve_runs,
            "/findings": self._serve_findings,
            "/matrix": self._serve_matrix,
        }
        return {route: wrappers.Request.application(serve) for route, serve in answers.items()}

    def is_active(self) -> bool:
        """Leave it to TensorBoard, which shows the tab where our data is, without asking us."""
        return False

    def frontend_metadata(self) -> Any:
        """Return where the page is."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="GradWatch")

    def _serve_file(self, request: Any) -> Any:
        name = request.path.rpartition("/static/")[2]
        if name not in _TYPES:
            raise errors.NotFoundError(f"no such file: {name}")
        content = files("gradwatch.tensorboard_plugin").joinpath("static", name).read_bytes()
        return http_util.Respond(request, content, _TYPES[name])

    def _serve_runs(self, request: Any) -> Any:
        listed = self._listing(request)
        newest = {
            run: max((series.max_wall_time for series in tags.values()), default=0.0)
            for run, tags in listed.items()
        }
        runs = sorted(newest, key=lambda run: (-newest[run], run))
        return http_util.Respond(request, {"runs": runs}, "application/json")

    def _serve_findings(self, request: Any) -> Any:
        found = findings_of(self._history(request))
        return http_util.Respond(request, json.dumps(found), "application/json")

    def _serve_matrix(self, request: Any) -> Any:
        columns = _number(request, "columns")
        if columns is None or not 1 <= columns <= _COLUMNS:
            raise errors.InvalidArgumentError(f"columns must be from 1 to {_COLUMNS}")
        known = self._history(request)
        head, body = matrix_of(known, columns, _number(request, "low"), _number(request, "high"))
        content = gzip.compress(packed(head, body), 1)
        return http_util.Respond(
            request, content, "application/octet-stream", content_encoding="gzip"
        )

    # Data -----------------------------------------------------------------------------------------

    def _listing(self, request: Any) -> Mapping[str, Mapping[str, Any]]:
        listed: Mapping[str, Mapping[str, Any]] = self._provider.list_tensors(
            plugin_util.context(request.environ),
            experiment_id=plugin_util.experiment_id(request.environ),
            plugin_name=history.PLUGIN,
        )
        return listed

    def _history(self, request: Any) -> history.History:
        run = request.args.get("run", "")
        tags = self._listing(request).get(run)
        if tags is None:
            raise errors.NotFoundError(f"no such run: {run}")
        versions = {tag: (series.max_step, series.max_wall_time) for tag, series in tags.items()}
        if run in self._runs and self._runs[run][0] == versions:
            self._runs.move_to_end(run)
            return self._runs[run][1]
        values = self._read(request, run, versions)
        try:
            known = history.assembled(values)
        except HistoryError as error:
            raise errors.InvalidArgumentError(str(error)) from error
        self._runs[run] = (versions, known)
        while len(self._runs) > _KEPT:
            forgotten, _ = self._runs.popitem(last=False)
            self._values.pop(forgotten, None)
        return known

    def _read(self, request: Any, run: str, versions: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the newest value of each tag, the oldest first; those that have not changed are kept."""
        kept = self._values.setdefault(run, {})
        stale = [tag for tag, version in versions.items() if kept.get(tag, (None,))[0] != version]
        for first in range(0, len(stale), _AT_ONCE):
            some = stale[first : first + _AT_ONCE]
            read = self._provider.read_tensors(
                plugin_util.context(request.environ),
                experiment_id=plugin_util.experiment_id(request.environ),
                plugin_name=history.PLUGIN,
                downsample=100,
                run_tag_filter=provider.RunTagFilter([run], some),
            )
            for tag, data in read.get(run, {}).items():
                if data:
                    kept[tag] = (versions[tag], _bytes(data[-1].numpy))
        written = sorted(versions, key=lambda tag: (versions[tag][1], tag))
        return {tag: kept[tag][1] for tag in written if tag in kept}


def _bytes(value: Any) -> bytes:
    content = value.item() if hasattr(value, "item") else value
    return content if isinstance(content, bytes) else str(content).encode()


def _number(request: Any, name: str) -> int | None:
    given = request.args.get(name)
    if given in {None, ""}:
        return None
    try:
        return int(given)
    except ValueError:
        raise errors.InvalidArgumentError(f"{name} must be a whole number") from None
