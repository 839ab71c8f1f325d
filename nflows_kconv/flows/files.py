"""The file format of image flows: safetensors, with the options of `finc_flow` as JSON in the metadata.

The metadata entry "nflows_kconv" is an object with the format's "version", the "options", and a "checksum": the CRC-32
of the options and of each tensor's name, dtype, shape and bytes, sorted by name.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ENTRY = "nflows_kconv"
_VERSION = 1


def write(path: str | os.PathLike[str], options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a file; on failure an existing file stays unchanged.

    Raises:
        ImportError: If safetensors is not installed.
        OSError: If the folder does not exist, or cannot be written to.
    """
    safetensors = _safetensors()
    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    plain = json.loads(_to_json(options))
    entry = {"version": _VERSION, "options": plain, "checksum": _checksum(plain, copies)}
    target = Path(os.path.realpath(path))  # follows links, as `open` does
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = os.path.join(folder, target.name)
        safetensors.torch.save_file(copies, written, {_ENTRY: json.dumps(entry)})
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(written, target)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the options and the tensors of a file, in new memory.

    Raises:
        ImportError: If safetensors is not installed.
        OSError: If there is no such file.
        ValueError: If the file is damaged, has a later format version, or was not written by `write`.
    """
    safetensors = _safetensors()
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        raise refusal(path, "one written by torch.save; load it with flow.load_state_dict(torch.load(path))")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except Exception as error:  # the type depends on the version of safetensors
        raise refusal(path, f"one that is damaged or has another format: {error}") from error
    if _ENTRY not in metadata:
        raise refusal(
            path, "tensors without options; load them with flow.load_state_dict(safetensors.torch.load_file(path))"
        )
    try:
        entry = json.loads(metadata[_ENTRY])
        version, options, checksum = entry["version"], entry.get("options"), entry.get("checksum")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise refusal(path, f"one with damaged metadata: {error!r}") from error
    if not isinstance(version, int) or version > _VERSION:
        raise ValueError(
            f"{os.fspath(path)}: the format version must be at most {_VERSION}, got {version!r}, from a later release "
            "of nflows-kconv"
        )
    if not isinstance(options, dict) or checksum != _checksum(options, tensors):
        raise refusal(path, "a damaged one: its checksum is wrong")
    return as_read(options), tensors


def as_read(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options as `read` returns them."""
    return {name: _tuples(value) for name, value in json.loads(_to_json(options)).items()}


def refusal(path: str | os.PathLike[str], got: str) -> ValueError:
    """Returns the error for a file that is not one of ours."""
    return ValueError(f"{os.fspath(path)} must be a file written by save() of a finc_flow flow, got {got}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading flows needs safetensors: pip install "
            '"nflows-kconv[nflows]" or "nflows-kconv[normflows]"'
        ) from error
    return safetensors


def _checksum(options: dict[str, Any], tensors: Mapping[str, Tensor]) -> int:
    checksum = zlib.crc32(json.dumps(options, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _to_json(options: Mapping[str, Any]) -> str:
    return json.dumps(options, default=_plain)


def _plain(value: Any) -> Any:
    """Converts a number or a sequence of another library, such as NumPy, to Python's own type."""
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else list(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
