"""The layer with a weight per image, which a network computes from the image's context."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nflows_kconv import checks, functional, layer, ops, stencil


class ConditionalInvertibleConv(layer.InvertibleConv):
    """Base of `ConditionalInvertibleConv1d`, `2d` and `3d`."""

    def __init__(
        self,
        num_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        context_features: int,
        weight_network: nn.Module | None = None,
        corners: str | Sequence[str] | None = None,
        dilation: int | Sequence[int] = 1,
        diagonal: Literal["unit", "learned"] = "unit",
        max_inverse_gain: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            num_channels,
            kernel_size,
            corners=corners,
            dilation=dilation,
            diagonal=diagonal,
            max_inverse_gain=max_inverse_gain,
            **like,
        )
        self.context_features = checks.positive("context_features", context_features)
        count = self.raw_weight.numel() + (0 if self.log_diagonal is None else num_channels)
        if weight_network is None:
            self.weight_network: nn.Module = _Linear(self.context_features, count, bias=False, **like)
        elif isinstance(weight_network, nn.Module):
            self.weight_network = _FromZero(weight_network, count, **like)
        else:
            raise TypeError(f"weight_network must be a torch.nn.Module or None, got {type(weight_network).__name__}")

    def weights(self, context: Tensor) -> Tensor:
        """Returns the weight of each image, [B, C, C/G, ...], as `torch.nn.functional.conv2d` takes it for each group.

        Args:
            context: [B, E], in the dtype of the parameters.

        Raises:
            TypeError: If the context is not a tensor of that dtype.
            ValueError: If it has another shape.
        """
        functional.check_context(context, self.raw_weight, None, self.context_features)
        raw_weights, log_diagonals = self._parameters_of_each(context)
        if len(context) == 0:
            return raw_weights
        log_diagonal = None if log_diagonals is None else log_diagonals.flatten()
        weight = stencil.effective(raw_weights.flatten(0, 1), self._stencils, log_diagonal, log_diagonal is None)
        return weight.view(raw_weights.shape)

    def _run(self, operation: ops.Operation, input: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        self._check_images(input)
        functional.check_context(context, input, input.shape[0], self.context_features)
        weights, log_diagonals = self._parameters_of_each(context)
        output = functional.run_each(operation, input, weights, log_diagonals, self._stencils, self.dilation)
        return output, log_diagonals

    def _check_images(self, input: Tensor) -> None:
        """Raises a TypeError or a ValueError unless the input is a batch of images for this layer."""
        functional.check_arguments(
            input, self.raw_weight, None, self.log_diagonal, len(self._stencils), self.dimensions
        )

    def _parameters_of_each(self, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns each image's raw weight and log-diagonal: [B, C, C/G, ...] and [B, C]."""
        batch, shape = context.shape[0], self.raw_weight.shape
        more = self.weight_network(context)
        weights = self.raw_weight + more[:, : shape.numel()].view(batch, *shape)
        log_diagonals = None
        if self.log_diagonal is not None:
            log_diagonals = self.log_diagonal + 2 * torch.tanh(more[:, shape.numel() :] / 2)
        if self.max_inverse_gain is not None and batch:
            log_diagonal = None if log_diagonals is None else log_diagonals.flatten()
            weights = self._bounded(weights.flatten(0, 1), log_diagonal).view(weights.shape)
        return weights, log_diagonals

    def extra_repr(self) -> str:
        """Returns the constructor's arguments."""
        return f"{super().extra_repr()}, context_features={self.context_features}"


class ConditionalInvertibleConv2d(ConditionalInvertibleConv):
    """`InvertibleConv2d` with a weight per image, computed from its context.

    A network maps the contexts, [B, E], to what each image adds to `raw_weight` and, with a learned diagonal, to h, [B,
    C]. The image's diagonal is then exp(log_diagonal + 2 tanh(h / 2)), between e^-2 and e^2 times the layer's own, so
    no context can make the layer singular. A 1 x 1 convolution with weights from a network cannot promise that. One
    operator call computes the whole batch; each image has its own log-determinant.

    The network starts at zero for every context: the layer starts as an `InvertibleConv2d` with the same `raw_weight`.
    Contexts add to `weight`, which you can read and assign; `weights(context)` returns the weights of the images.

    With large weights the inverse amplifies rounding errors, and a context not seen in training may produce them.
    `max_inverse_gain` bounds the weight of each image.

    Args:
        num_channels: See `InvertibleConv2d`.
        kernel_size: See `InvertibleConv2d`.
        context_features: E.
        weight_network: Maps [B, E] to [B, n], with n = `raw_weight.numel()`, and C more with a learned diagonal.
            A parameter [n] that starts at zero multiplies its output, so the output itself must not: neither would
            have a gradient. None stands for a linear map that starts at zero.
        corners: See `InvertibleConv2d`.
        dilation: See `InvertibleConv2d`.
        diagonal: See `InvertibleConv2d`.
        max_inverse_gain: See `InvertibleConv2d`; holds for each image.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        raw_weight: Parameter, [C, C/G, kh, kw].
        log_diagonal: Parameter, [C], or None.
        weight_network: The module that maps contexts.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, or the channels do not divide into the groups.

    Warns:
        UserWarning: In a call on a CPU, if the output of a new `weight_network` is zero.

    Examples:
        >>> import torch
        >>> from nflows_kconv import ConditionalInvertibleConv2d
        >>> layer = ConditionalInvertibleConv2d(12, context_features=5, diagonal="learned")
        >>> x, context = torch.randn(10, 12, 8, 8), torch.randn(10, 5)
        >>> y, log_abs_det = layer(x, context)
        >>> torch.allclose(layer.inverse(y, context)[0], x, atol=1e-5)
        True
    """

    dimensions = 2


class ConditionalInvertibleConv1d(ConditionalInvertibleConv):
    """`ConditionalInvertibleConv2d` in one dimension, of sequences [B, C, L]; see `InvertibleConv1d`."""

    dimensions = 1


class ConditionalInvertibleConv3d(ConditionalInvertibleConv):
    """`ConditionalInvertibleConv2d` in three dimensions, of volumes [B, C, D, H, W]; see `InvertibleConv3d`."""

    dimensions = 3


class _Linear(nn.Linear):
    """A linear map that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class _FromZero(nn.Module):
    """A user's network with its outputs scaled by a parameter that starts at zero."""

    def __init__(self, network: nn.Module, count: int, **like: Any) -> None:
        super().__init__()
        self.network = network
        self.scale = nn.Parameter(torch.empty(count, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.scale)

    def forward(self, context: Tensor) -> Tensor:
        numbers = self.network(context)
        functional.check_rows("the output of weight_network", numbers, context.shape[0], len(self.scale), like=context)
        if checks.can_inspect_values(numbers) and len(numbers) and not self.scale.any() and not numbers.any():
            warnings.warn("weight_network returns zeros: its last layer must not start at zero", stacklevel=2)
        return numbers * self.scale
