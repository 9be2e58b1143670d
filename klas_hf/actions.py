"""What a value or a model does through rooms above its own, such as publishing itself: by name, from a table.

The package root alone knows every room, and fills the table. So imports run downward only.
"""

from collections.abc import Callable
from typing import Any

ACTIONS: dict[str, Callable[..., Any]] = {}


class Publishable:
    """What can go to the Hub."""

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish this at `repo_id` in one commit, with a card; `kwargs` as for `klas_hf.hub.publish`."""
        return ACTIONS["publish"](self, repo_id, **kwargs)
