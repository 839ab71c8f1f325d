"""The required results for any floating-point numbers, with a bound per entry.

The whole operator is one F.conv2d in float64. The error of a product A x of n terms is at most n roundings of |A| |x|.
A solution x is checked by its residual A x - y, which back-substitution keeps within n roundings of |A| |x| + |y|
however ill-conditioned A is. Non-finite entries of an argument mark the entries that they may spoil and those that they
must spoil.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import oracles
import torch
import torch.nn.functional as F
from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import native

STENCILS = ("TL", "TR", "BL", "BR", *oracles.SIDES)
SAFETY = 4  # allowed roundings per counted one


class Wrong(AssertionError):
    """A call gave a wrong result or was not refused as required."""


@dataclass(frozen=True)
class Problem:
    """Valid tensors."""

    corners: tuple[str, ...]
    input: Tensor  # [B, C, H, W]
    weight: Tensor  # [C, C/G, kh, kw]
    bias: Tensor | None = None  # [C]

    def __str__(self) -> str:
        backend = native.instruction_set() if native.available else "reference"
        shapes = f"{tuple(self.input.shape)} {tuple(self.weight.shape)}"
        return f"{shapes} {self.corners} {self.weight.dtype}, {backend}"

    @property
    def numbers(self) -> list[int]:
        """The stencils as integers, for the operators."""
        return stencil.parse(self.corners)

    @cached_property
    def invertible(self) -> bool:
        """Whether every entry of the diagonal and its reciprocal is finite and nonzero."""
        diagonal = oracles.diagonal(self.weight, self.corners).double()
        reciprocal = (1 / diagonal).to(self._computed)
        return all(bool((tensor.isfinite() & (tensor != 0)).all()) for tensor in (diagonal, reciprocal))

    def check_product(self, got: Tensor, input: Tensor, transpose: bool = False, bias: Tensor | None = None) -> None:
        """Checks y = A x + bias, or A^T x + bias."""
        bad, may_spread, input = ~input.isfinite(), self._bad_groups, _finite(input.double())
        must = self._touched(bad, self._used, transpose) | self._by_bad_weights(transpose)
        may = self._touched(bad, torch.ones_like(self._used), transpose) | may_spread
        expected = self._apply(input, self._matrix, transpose)
        bound = self._apply(input.abs(), self._matrix.abs(), transpose)
        if bias is not None:
            spoiled, added = ~bias.isfinite().view(-1, 1, 1), _finite(bias.double()).view(-1, 1, 1)
            must, may, expected, bound = must | spoiled, may | spoiled, expected + added, bound + added.abs()
        may = may | (2 * bound > self._limit)
        error = (got.double() - expected).abs()
        tolerance = self._tolerance(bound, self._terms, 1.0)
        if self._half:  # rounded once
            tolerance = tolerance + torch.finfo(got.dtype).eps / 2 * expected.abs()
        self._report(got, (~(error <= tolerance) & ~may) | (must & got.isfinite()), error)

    def check_solution(self, got: Tensor, rhs: Tensor, transpose: bool = False, bias: Tensor | None = None) -> None:
        """Checks A x = y - bias, or A^T x = y - bias."""
        bias = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()
        bias = bias.view(-1, 1, 1)
        must = ~(rhs.isfinite() & bias.isfinite())
        may = self._followers(must, transpose) | self._bad_groups
        rhs, bias = _finite(rhs.double()), _finite(bias)
        magnitude, rhs = rhs.abs() + bias.abs(), rhs - bias
        if bool((~got.isfinite() & ~may).any()):
            # Allowed only where the solution, or a partial sum, leaves the range of the dtype.
            exact = oracles.solve(rhs, _finite(self.weight), self.corners, transpose=transpose).abs()
            sums = self._apply(exact, self._matrix.abs(), transpose) + magnitude
            may = may | self._followers(~(torch.maximum(64 * exact, 2 * sums) < self._limit), transpose)
            may = may | self._overflowing_groups(transpose)
        x = _finite(got.double()).masked_fill(may, 0)
        error = (self._apply(x, self._matrix, transpose) - rhs).abs()
        product = self._apply(x.abs(), self._matrix.abs(), transpose)
        # The rounding of x itself counts once per entry of the row, also for denormal x.
        denormals = 1 + self._apply(torch.ones_like(x), self._matrix.abs(), transpose)
        tolerance = self._tolerance(product + magnitude, self._terms, denormals)
        if self._half:
            tolerance = tolerance + torch.finfo(got.dtype).eps * product
        may = may | (2 * (product + magnitude) > self._limit)
        self._report(got, (~(error <= tolerance) & ~may) | (must & got.isfinite()), error)

    def check_weight_gradient(self, got: Tensor, input: Tensor, grad: Tensor) -> None:
        """Checks d<grad, A input> / dW if all numbers are finite."""
        x, g = input.double(), grad.double()
        if not bool((x.isfinite().all() & g.isfinite().all()).item()):
            return
        expected, bound = self._weight_gradient(x, g), self._weight_gradient(x.abs(), g.abs())
        tolerance = self._tolerance(bound, x[:, :1].numel() + 8, 1.0)
        if self._half:
            tolerance = tolerance + torch.finfo(got.dtype).eps * expected.abs()
        error = (got.double() - expected).abs()
        self._report(got, ~(error <= tolerance) & ~(2 * bound > self._limit), error)

    # ---- The operator as one convolution ----

    def _apply(self, input: Tensor, kernel: Tensor, transpose: bool) -> Tensor:
        if input.numel() == 0:
            return input.clone()
        function = F.conv_transpose2d if transpose else F.conv2d
        padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
        return function(input.contiguous(), kernel, padding=padding, groups=len(self.corners))

    def _embed(self, weight: Tensor) -> Tensor:
        """Embeds the kernels of all groups in one of [C, C/G, 2 kh - 1, 2 kw - 1], with the pivots in its centre."""
        rows, columns = weight.shape[2:]
        padded = []
        for corner, group in zip(
            self.corners, weight.masked_fill(self._masked, 0).chunk(len(self.corners)), strict=True
        ):
            row, column = oracles.pivot(corner, (rows, columns))
            padded.append(F.pad(group, (columns - 1 - column, column, rows - 1 - row, row)))
        return torch.cat(padded)

    def _weight_gradient(self, input: Tensor, grad: Tensor) -> Tensor:
        weight = torch.zeros(self.weight.shape, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            product = (self._apply(input, self._embed(weight), False) * grad).sum() + 0 * weight.sum()
            return torch.autograd.grad(product, weight)[0]

    @cached_property
    def _masked(self) -> Tensor:
        return oracles.masked(self.weight.shape, self.corners)

    @cached_property
    def _matrix(self) -> Tensor:
        return self._embed(_finite(self.weight.double()))

    # ---- Roundings ----

    @property
    def _half(self) -> bool:
        return self.weight.dtype in oracles.HALF_PRECISION

    @property
    def _computed(self) -> torch.dtype:
        return torch.float32 if self._half else self.weight.dtype

    @property
    def _terms(self) -> int:
        return self.weight[0].numel() + 8

    @property
    def _limit(self) -> float:
        return min(torch.finfo(self._computed).max, torch.finfo(self.weight.dtype).max)

    def _tolerance(self, bound: Tensor, terms: int, denormals: Tensor | float) -> Tensor:
        info = torch.finfo(self.weight.dtype)
        roundings = torch.finfo(self._computed).eps * bound + info.smallest_normal * info.eps * denormals
        return SAFETY * terms * roundings

    def _report(self, got: Tensor, wrong: Tensor, error: Tensor) -> None:
        if bool(wrong.any()):
            index = tuple(wrong.nonzero()[0].tolist())
            raise Wrong(
                f"{int(wrong.sum())} wrong entries, the first at {index}: got {got[index].item()!r}, "
                f"error {error[index].item():g}; {self}"
            )

    # ---- What is not finite ----
    # Zero times infinity is NaN if computed, and terms that count as zero may be computed or skipped.

    @cached_property
    def _bad_weight(self) -> Tensor:
        return ~self.weight.isfinite() & ~self._masked

    @cached_property
    def _bad_groups(self) -> Tensor:
        groups = self._bad_weight.unflatten(0, (len(self.corners), -1)).flatten(1).any(1)
        return groups.repeat_interleave(self.weight.shape[1]).view(-1, 1, 1)

    def _overflowing_groups(self, transpose: bool) -> Tensor:
        """Groups whose weights leave the range of the dtype if multiplied by the pivot's inverse, which all may do."""
        matrices = self._matrix.flatten(2).unflatten(0, (len(self.corners), -1))
        matrices = matrices.transpose(1, 2) if transpose else matrices
        pivot = matrices[..., matrices.shape[-1] // 2]
        products = torch.linalg.solve_triangular(pivot, matrices.flatten(2), upper=transpose).abs().amax((1, 2))
        return ~(64 * products < self._limit).repeat_interleave(self.weight.shape[1]).view(-1, 1, 1)

    @cached_property
    def _used(self) -> Tensor:
        return self._embed((self.weight != 0).double())

    def _by_bad_weights(self, transpose: bool) -> Tensor:
        return self._touched(
            torch.ones(self.input.shape, dtype=torch.bool), self._embed(self._bad_weight.double()), transpose
        )

    def _touched(self, bad: Tensor, kernel: Tensor, transpose: bool) -> Tensor:
        if not bool(bad.any()):
            return bad
        return self._apply(bad.double(), kernel, transpose) > 0

    def _followers(self, bad: Tensor, transpose: bool) -> Tensor:
        """Returns entries of a solution that may depend on bad ones: all that follow them from the group's corner."""
        if not bool(bad.any()):
            return bad
        groups = []
        for name, group in zip(self.corners, bad.chunk(len(self.corners), 1), strict=True):
            if transpose:
                name = name.translate(str.maketrans("TBLR", "BTRL"))
            groups.append(oracles.followers(group.any(1, keepdim=True), name).expand_as(group))
        return torch.cat(groups, 1)


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isfinite(), tensor, 0)
