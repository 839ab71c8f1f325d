"""Shows "Example:" of a docstring as mkdocstrings shows "Examples:", the only heading that it takes for code."""

from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """A griffe extension."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Renames the heading."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
