"""Caches compiled kernels on disk, for all processes of a user.

The directory is `$NFLOWS_KCONV_CACHE` if set, else `nflows_kconv` in the user's cache directory (`$XDG_CACHE_HOME` or
`~/.cache`). It holds one file of about ten kilobytes per kernel. A model needs a few dozen, so nothing is ever removed;
deleting any of them at any time is safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

VARIABLE = "NFLOWS_KCONV_CACHE"


def directory() -> Path | None:
    """Returns the cache directory; None for a user without a home directory."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification says to ignore a relative path
        base = Path(os.path.expanduser("~"), ".cache")
    return base / "nflows_kconv" if base.is_absolute() else None


def load(digest: str) -> bytes | None:
    """Returns the code stored under this name; None if it is missing, unreadable or damaged."""
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
    """Stores the code under this name for later processes, if the directory is writable."""
    place = directory()
    if place is None:
        return
    temporary = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        # Replacing is atomic: processes that read or write the same entry see the old file or the new one.
        descriptor, temporary = tempfile.mkstemp(dir=place, prefix=".")
        with open(descriptor, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, place / digest)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
