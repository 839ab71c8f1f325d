"""Convolutions with circular borders, on rings and tori, with inverse and log-determinant by FFT.

A circular convolution A is block diagonal in Fourier space: with W(f) the C/G x C/G matrix of a group at frequency f,

    A = F^-1 diag_f(W(f)) F        log |det A| = sum_f log |det W(f)|

A is invertible if no W(f) is singular. Here W = D (I + c N), see `bound`. Shifts on a torus are unitary, so ||c N|| <=
1 - 1/g and no W(f) is singular at any image size; docs/numerics.md has the proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nflows_kconv import bound, checks, functional, ops, stencil
from nflows_kconv.backends.reference import in_own_precision
from nflows_kconv.layer import KernelLayer
from nflows_kconv.torch_internals import is_exporting_to_onnx


class PeriodicConv(KernelLayer):
    """Base of `PeriodicConv1d`, `PeriodicConv2d` and `PeriodicConv3d`."""

    max_inverse_gain: float

    def __init__(
        self,
        num_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        groups: int = 1,
        diagonal: Literal["unit", "learned"] = "unit",
        bias: bool = False,
        max_inverse_gain: float = 10,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_channels, groups = checks.positive("num_channels", num_channels), checks.positive("groups", groups)
        if num_channels % groups:
            raise ValueError(
                f"num_channels must be a multiple of groups, got {num_channels} channels and {groups} groups"
            )
        if max_inverse_gain is None:
            raise TypeError("max_inverse_gain must be a number, got None: without the bound an inverse may not exist")
        super().__init__(
            num_channels,
            kernel_size,
            groups,
            diagonal=diagonal,
            bias=bias,
            max_inverse_gain=max_inverse_gain,
            device=device,
            dtype=dtype,
        )
        self.groups = groups
        self.reset_parameters()

    @property
    def _pivot(self) -> tuple[Any, ...]:
        """The index of the tap that reads the pixel itself, as in torch's padding="same"."""
        return ..., *stencil.pivot(stencil.PERIODIC, self.kernel_size)

    def _run(self, operation: ops.Operation, input: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias, dtype = self._prepare(input)
        if operation == "solve" and input.shape[0]:  # MKL's FFT refuses an empty batch
            return self._solve(input, weight, bias).to(dtype), weight
        options = (stencil.PERIODIC,), False, (1,) * self.dimensions, self.groups
        return functional.run("conv", input.to(weight.dtype), weight, bias, None, *options).to(dtype), weight

    def _jacobian(self) -> Tensor:
        return self._effective()

    def _solve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = input.to(weight.dtype)
        if bias is not None:
            values = values - stencil.on_weight(bias, weight)[:, 0]
        sizes, axes = input.shape[2:], tuple(range(2, input.dim()))
        with in_own_precision(input.device):
            y = torch.fft.rfftn(values, dim=axes).unflatten(1, (self.groups, -1)).movedim((0, 1, 2), (-1, -3, -2))
            # Not `solve`, which synchronizes a GPU to check for singular matrices.
            # Not one `lu_factor` for this and the determinant: its gradient takes longer than theirs.
            x, _ = torch.linalg.solve_ex(self._at_frequencies(weight, sizes), y)
            return torch.fft.irfftn(x.movedim((-1, -3, -2), (0, 1, 2)).flatten(1, 2), s=sizes, dim=axes)

    def _log_abs_det(self, input: Tensor, jacobian: Tensor, sign: int) -> Tensor:
        sizes = input.shape[2:]
        self._check_size(sizes)
        with in_own_precision(input.device):
            values = torch.linalg.slogdet(self._at_frequencies(jacobian, sizes)).logabsdet
        # A frequency and its negative are conjugate. The last axis holds one of each pair, which counts twice, except
        # for 0 and, for even sizes, the middle, which are their own negatives.
        once = values[..., 0, :].sum() + (values[..., -1, :].sum() if sizes[-1] % 2 == 0 else 0)
        return (sign * (2 * values.sum() - once)).repeat(input.shape[0])

    def _at_frequencies(self, weight: Tensor, sizes: Sequence[int]) -> Tensor:
        """Computes W(f) at these sizes, [*F, G, C/G, C/G]; the last axis holds the frequencies from 0 to the middle."""
        if is_exporting_to_onnx():
            raise NotImplementedError(
                "a model must have no periodic layers for export to ONNX, which can neither solve with complex "
                f"matrices nor compute their determinants, got {type(self).__name__}"
            )
        axes = tuple(range(2, weight.dim()))
        padding = [count for k, size in zip(self.kernel_size, sizes, strict=True) for count in (size - k, 0)]
        kernel = F.pad(weight, padding[::-1]).roll([-place for place in self._pivot[1:]], axes)
        # A pixel p reads p + t, so W(f) = sum_t W_t exp(2 pi i f t), the conjugate of the transform of real taps.
        matrices = torch.fft.rfftn(kernel, dim=axes).conj()
        return matrices.unflatten(0, (self.groups, -1)).movedim((0, 1, 2), (-3, -2, -1))

    def _prepare(self, input: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """Returns the weight and the bias for an input, in float32 at least, and the dtype of the result.

        Raises:
            TypeError: If a tensor has the wrong type.
            ValueError: If a tensor has the wrong shape, or exp(log_diagonal) is zero or not finite.
        """
        log_diagonal = self.log_diagonal
        functional.check_arguments(input, self.raw_weight, self.bias, log_diagonal, self.groups, self.dimensions)
        self._check_size(input.shape[2:])
        dtype = torch.promote_types(input.dtype, torch.float32)
        if log_diagonal is not None and checks.can_inspect_values(log_diagonal):
            diagonal = log_diagonal.to(dtype).exp()
            if checks.can_inspect_values(diagonal):  # values computed under a fake tensor mode cannot be
                stencil.check_diagonal(diagonal)
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._effective().to(dtype), bias, dtype if ops.autocast_is_on(input) else input.dtype

    def _check_size(self, sizes: Sequence[int]) -> None:
        if any(size < kernel for size, kernel in zip(sizes, self.kernel_size, strict=True)):
            raise ValueError(
                f"images must be at least as large as the kernel {self.kernel_size} along every axis, got "
                f"{tuple(sizes)}"
            )

    def _effective(self) -> Tensor:
        """Returns the weight in float32 at least."""
        dtype = torch.promote_types(self.raw_weight.dtype, torch.float32)
        raw_weight = self.raw_weight.to(dtype)
        weight = raw_weight * bound.scale(raw_weight, self.max_inverse_gain) + self._identity(raw_weight)
        if self.log_diagonal is None:
            return weight
        return weight * stencil.on_weight(self.log_diagonal.to(dtype).exp(), weight)

    def _identity(self, weight: Tensor) -> Tensor:
        """Returns the weight of the identity."""
        eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device).repeat(self.groups, 1)
        # Not by writing into zeros, which torch.func.linearize loses.
        around = [n for at, k in zip(self._pivot[1:], self.kernel_size, strict=True) for n in (k - 1 - at, at)]
        return F.pad(eye.view(*eye.shape, *[1] * self.dimensions), around[::-1])

    def _relative(self, weight: Tensor, diagonal: Tensor | None) -> Tensor:
        """Returns the weight of c N, given that of A and D."""
        return (weight if diagonal is None else weight / stencil.on_weight(diagonal, weight)) - self._identity(weight)

    def _weight(self) -> Tensor:
        return self._effective().to(self.raw_weight.dtype)

    def _structure(self) -> dict[str, tuple[Any, ...]]:
        return {"corners": ("periodic",) * self.groups}  # distinguishes the weight from that of any corner

    def _structure_repr(self) -> str:
        return f"groups={self.groups}"

    def _to_parameters(self, weight: Tensor) -> dict[str, Tensor]:
        self._check_shape(weight)
        if self.diagonal == "unit":
            relative = self._relative(weight, None)
            self._check_bound(relative)
            return {"raw_weight": relative}
        diagonal = weight[self._pivot].unflatten(0, (self.groups, -1)).diagonal(dim1=1, dim2=2).flatten()
        self._check_pivot(diagonal, "positive", diagonal > 0)
        relative = self._relative(weight, diagonal)
        self._check_bound(relative)
        return {"raw_weight": relative, "log_diagonal": diagonal.log()}


class PeriodicConv2d(PeriodicConv):
    """An invertible k x k convolution with circular borders, of images on a torus.

    Computes `torch.nn.Conv2d(..., padding="same", padding_mode="circular")`, for kernels close enough to a diagonal D
    to be invertible:

        y = A x + b,   A = D (I + c N),   c = min(1, (1 - 1/g) / r),   r >= ||N||

    N is the circular convolution with `raw_weight`, without a mask, D is 1 or exp(log_diagonal), and r is the sum of
    the spectral norms of its taps. At every image size ||A^-1|| <= g / min D and ||A|| <= (2 - 1/g) max D; see
    docs/numerics.md. Unlike `InvertibleConv2d` it treats all pixels alike: a circular shift of the input shifts the
    output. The inverse and log |det A| come by FFT from one C/G x C/G matrix per frequency, as in the periodic
    convolutions of Hoogeboom, van den Berg, Welling 2019 (arXiv 1901.11137), which may have no inverse.

    Half precision is computed in float32 and rounded once; under autocast the layer stays in float32. A state_dict is
    like that of `InvertibleConv2d`; a plain `weight` of torch's circular `Conv2d` loads too if it respects the bound.

    Args:
        num_channels: C, a multiple of `groups`.
        kernel_size: k, or (kh, kw); no larger than the images.
        groups: G, the number of channel groups, as in torch's `Conv2d`.
        diagonal: "unit" fixes D to 1; "learned" makes it exp(log_diagonal), one factor per channel.
        bias: Whether to add a learned constant to each channel.
        max_inverse_gain: g > 1.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        raw_weight: Parameter, [C, C/G, kh, kw].
        log_diagonal: Parameter, [C], or None.
        bias: Parameter, [C], or None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, or the channels do not divide into the groups.

    Examples:
        >>> import torch
        >>> from nflows_kconv import PeriodicConv2d
        >>> layer = PeriodicConv2d(4)
        >>> fields = torch.randn(10, 4, 8, 8)
        >>> output, log_abs_det = layer(fields)
        >>> torch.allclose(layer.solve(output), fields, atol=1e-5)
        True
        >>> shifted = layer.convolve(fields.roll((3, 5), (2, 3)))
        >>> torch.allclose(shifted, output.roll((3, 5), (2, 3)), atol=1e-5)
        True
    """

    dimensions = 2


class PeriodicConv1d(PeriodicConv):
    """`PeriodicConv2d` in one dimension, of sequences [B, C, L] on a ring; `raw_weight` is [C, C/G, k]."""

    dimensions = 1


class PeriodicConv3d(PeriodicConv):
    """`PeriodicConv2d` in three dimensions, of volumes [B, C, D, H, W]; `raw_weight` is [C, C/G, kd, kh, kw]."""

    dimensions = 3
