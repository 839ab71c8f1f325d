"""Finds the compiler and the torch to build the native library with, without importing torch."""

import os
import shlex
import shutil
import site
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

MINIMUM_TORCH = (2, 10)


@dataclass(frozen=True)
class Torch:
    """An installed torch."""

    version: str
    directory: Path

    @property
    def recent_enough(self) -> bool:
        """Returns whether it has the stable ABI that the native library uses."""
        return tuple(int(part) for part in self.version.split(".")[:2]) >= MINIMUM_TORCH


def search_path() -> list[str]:
    """Returns the directories to search for torch: those of this process first, then the target's own.

    pip's build isolation removes the target's own directories from `sys.path`.
    """
    directories = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    # A virtual environment sees the user's packages only together with the system's packages.
    if sys.base_prefix in site.PREFIXES:
        directories.append(site.getusersitepackages())
    return [*sys.path, *directories]


def find_torch(path: Sequence[str]) -> Torch | None:
    """Returns the first torch on `path`."""
    for distribution in Distribution.discover(name="torch", path=list(path)):
        return Torch(distribution.version, Path(str(distribution.locate_file("torch"))))
    return None


def find_compiler() -> list[str]:
    """Returns the command of the C++ compiler; empty if there is none."""
    return next((command for command in map(shlex.split, _compilers()) if shutil.which(command[0])), [])


def _compilers() -> Sequence[str]:
    return [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]


def why_not() -> str | None:
    """Returns why the native library cannot be built here with any torch; None if it can."""
    if os.environ.get("NFLOWS_KCONV_BUILD") == "0":
        return "NFLOWS_KCONV_BUILD=0 was set"
    if os.name == "nt":
        return "Windows is not supported"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python cannot install wheels of the limited API"
    if not find_compiler():
        return f"no C++ compiler was found, looked for {', '.join(_compilers())}"
    return None


def build_requirements() -> list[str]:
    """Returns a requirement of torch if the native library can be built and no usable torch is installed."""
    if why_not() is not None:
        return []
    torch = find_torch(search_path())
    return [] if torch and torch.recent_enough else [f"torch>={'.'.join(map(str, MINIMUM_TORCH))}"]
