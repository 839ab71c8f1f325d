"""Memory for the tensors of an emulated kernel, between guard pages and NaN until written."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_GUARD = 1 << 20
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Memory:
    """Bytes between two regions that must not be touched.

    Attributes:
        all: All bytes.
        data: The requested bytes, at the start or at the end.
        start: Offset of the requested bytes.
        alignment: Alignment of the requested bytes.
        address: Address of the requested bytes.
    """

    def __init__(self, size: int, alignment: int, at_end: bool) -> None:
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        whole = torch.frombuffer(mmap.mmap(-1, self._size + 2 * _GUARD, private), dtype=torch.uint8)
        self._begin = whole.data_ptr() + _GUARD
        for guard in (self._begin - _GUARD, self._begin + self._size):
            _protect(guard, _GUARD, 0)
        self.all = whole[_GUARD : _GUARD + self._size]
        self.all.fill_(255)
        self.alignment = alignment
        self.start = (self._size - size) // alignment * alignment if at_end else 0
        self.data = self.all[self.start : self.start + size]
        self.address = self._begin + self.start

    def beyond(self, tensor: Tensor | None = None) -> int | None:
        """Returns the first byte written outside the requested ones, or outside the elements of such a tensor."""
        if tensor is None:
            self.data.fill_(255)
        else:
            self.like(tensor, _INTEGERS[tensor.element_size()]).fill_(-1)
        wrong = (self.all != 255).nonzero()
        return wrong[0].item() - self.start if len(wrong) else None

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the data as elements with the shape and strides of a tensor."""
        return self.data.view(dtype or tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def read_only(self) -> None:
        """Makes later writes fail."""
        _protect(self._begin, self._size, mmap.PROT_READ)


def _protect(address: int, size: int, protection: int) -> None:
    if size and _libc.mprotect(address, size, protection):
        raise OSError(ctypes.get_errno(), "mprotect failed")


def span(tensor: Tensor) -> int:
    """Returns the bytes from the first to the last element of a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def once(tensor: Tensor) -> Tensor:
    """Returns the tensor without repeated elements of expanded axes."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
