"""Compiled kernels on disk, shared by all processes of a user.

They lie in `$NFLOWS_KCONV_CACHE` if that is set, else in `nflows_kconv` under the user's cache directory
(`$XDG_CACHE_HOME` or `~/.cache`): one file of some ten kilobytes for each kernel that was ever compiled. A model needs
a few dozen, so nothing is ever removed; deleting any of them at any time is safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

VARIABLE = "NFLOWS_KCONV_CACHE"


def directory() -> Path | None:
    """Returns where compiled kernels are kept; None for a user without a home."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification says to ignore it then
        base = Path(os.path.expanduser("~"), ".cache")
    return base / "nflows_kconv" if base.is_absolute() else None


def load(digest: str) -> bytes | None:
    """Returns the code stored under this name; None if there is none, or not whole and readable."""
    place = directory()
    if place is None:
        return None
    try:
        entry = (place / digest).read_bytes()
    except OSError:
        return None
    checksum, code = entry[: hashlib.sha256().digest_size], entry[hashlib.sha256().digest_size :]
    return code if hashlib.sha256(code).digest() == checksum else None


def store(digest: str, code: bytes) -> None:
    """Keeps the code under this name for later processes, where the directory can be written."""
    place = directory()
    if place is None:
        return
    temporary = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        # Others may be reading or writing the same entry: they see the old one or the new one.
        descriptor, temporary = tempfile.mkstemp(dir=place, prefix=".")
        with open(descriptor, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, place / digest)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
