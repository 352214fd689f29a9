"""Checks of arguments that do not fit each other."""

from typing import Any


def bounds_elements(norm: Any, holds: bool) -> None:
    """Refuses the response `clamp` with a norm that does not bound elements.

    Raises:
        ValueError: `holds` is False.
    """
    if not holds:
        raise ValueError(
            "response=responses.clamp cuts elements, so the norm must be norms.linf(), got "
            f"{norm!r}; pass norm=norms.linf(), scope=scopes.element(), or another response"
        )
