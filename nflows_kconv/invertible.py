"""The base of every invertible module in this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class InvertibleModule(nn.Module):
    """A module `forward(input, context=None) -> (output, log_abs_det)` with an inverse of the same form.

    Both directions run through `nn.Module.__call__`, so hooks run once in either, and FSDP, pruning and weight
    normalisation, which rely on hooks, work in both. Subclasses define `forward`, or `_run_forward` and
    `_run_inverse`, which take the input and the context; log-determinants are [B], in float32 at least.
    """

    def forward(self, input: Tensor, context: Any = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Transforms the input, or undoes that if `inverse`."""
        return self._run_inverse(input, context) if inverse else self._run_forward(input, context)

    def inverse(self, input: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Undoes `forward`."""
        # Not self(...), because transforms of torch.distributions override __call__.
        return nn.Module.__call__(self, input, context, inverse=True)

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def no_log_abs_det(input: Tensor) -> Tensor:
    """Returns zeros, [B], in float32 at least, and in new memory, because users add to it in place."""
    if input.dtype in _WIDE:  # passing a dtype takes time
        return input.new_zeros(input.shape[0])
    return input.new_zeros(input.shape[0], dtype=torch.float32)


_WIDE = (torch.float32, torch.float64)
