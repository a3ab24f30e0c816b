"""The GradWatch tab of TensorBoard: only what its entry point needs.

TensorBoard imports this for every user of the environment, whatever they look at, and a failure here would
end every ``tensorboard`` command: nothing but the loader may be imported, and the rest when a page is made.
"""

from __future__ import annotations

from typing import Any

from tensorboard.plugins import base_plugin


class Loader(base_plugin.TBLoader):  # type: ignore[misc] # tensorboard has no types
    """Make the plugin when TensorBoard starts; an exception in here is logged by it, and the tab absent."""

    def load(self, context: Any) -> Any:
        """Return the plugin for a server."""
        from gradwatch.tensorboard_plugin._plugin import Plugin  # noqa: PLC0415 -- see above

        return Plugin(context)
