"""Temporarily replaces attributes of other packages' objects; nothing else in this package sets them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def replaced(replacements: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replaces attributes, given as (object, name, value), inside this context.

    The new value hides an attribute of the class or a submodule of that name. On exit, also after an error, everything
    is restored.
    """
    before = []
    try:
        for owner, name, value in replacements:
            attributes = vars(owner)
            before.append((attributes, name, attributes.get(name, _MISSING)))
            attributes[name] = value
        yield
    finally:
        for attributes, name, value in reversed(before):
            if value is _MISSING:
                del attributes[name]
            else:
                attributes[name] = value
