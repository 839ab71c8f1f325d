"""The one way in which this package gives objects of others other attributes: for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def replaced(replacements: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replaces attributes, given as (object, name, value), while it is entered.

    It hides what the class, or a module's table of submodules, has of that name. Afterwards all is as it was, also
    after an error.
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
