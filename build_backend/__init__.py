"""The PEP 517 backend: setuptools, with torch as a build requirement only if the target has none.

A static requirement would make pip install a second torch into every isolated build, which takes minutes and gigabytes.
"""

from collections.abc import Mapping
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_backend.environment import build_requirements

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Returns requirements to build a wheel in addition to the static ones in pyproject.toml."""
    return build_requirements()


get_requires_for_build_editable = get_requires_for_build_wheel
