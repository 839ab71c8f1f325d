"""The layer for FrEIA, whose forward direction is data -> latent: the convolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from nflows_kconv import bijection, conditional, layer, periodic, stencil

try:
    from FrEIA.modules import InvertibleModule
except ImportError as error:
    raise ImportError('nflows_kconv.freia needs FrEIA: pip install "nflows-kconv[freia]"') from error

__all__ = [
    "ConditionalInvertibleConv1d",
    "ConditionalInvertibleConv2d",
    "ConditionalInvertibleConv3d",
    "InvertibleConv1d",
    "InvertibleConv2d",
    "InvertibleConv3d",
    "PeriodicConv1d",
    "PeriodicConv2d",
    "PeriodicConv3d",
]


class _Module(InvertibleModule, layer.KernelLayer):
    """A layer with the interface of FrEIA."""

    def __init__(
        self, dims_in: Sequence[tuple[int, ...]], dims_c: Sequence[tuple[int, ...]] | None = None, **options: Any
    ) -> None:
        if [len(shape) for shape in dims_in] != [self.dimensions + 1]:
            axes = ", ".join(("C", *stencil.AXES[self.dimensions]))
            raise ValueError(f"dims_in must be one shape, [({axes})], got {dims_in}")
        # Skips the constructor of InvertibleModule, which would call the layer's without arguments.
        super(InvertibleModule, self).__init__(dims_in[0][0], **options)
        self.dims_in, self.dims_c = list(dims_in), list(dims_c or ())

    def forward(  # type: ignore[override]
        self, x_or_z: Sequence[Tensor], c: Any = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Convolves, or solves if `rev`.

        Args:
            x_or_z: One tensor, [B, C, ...], in the dtype of the parameters.
            c: A list of the context of a conditional layer, [B, E]; ignored by other layers.
            rev: Whether to solve.
            jac: Ignored, because the log-determinant costs nothing.

        Returns:
            One tensor, [B, C, ...], and the log-determinant of the direction, [B].

        Raises:
            TypeError: See `nflows_kconv.functional.conv2d`.
            ValueError: See `nflows_kconv.functional.conv2d`.
        """
        if not isinstance(x_or_z, Sequence) or len(x_or_z) != 1:
            got = f"{len(x_or_z)} of them" if isinstance(x_or_z, Sequence) else type(x_or_z).__name__
            raise TypeError(f"input must be a sequence of one tensor, as FrEIA's modules take, got {got}")
        if c is not None and not isinstance(c, Sequence):
            raise TypeError(f"c must be a sequence of conditions, as FrEIA's modules take, got {type(c).__name__}")
        (input,) = x_or_z
        output, log_abs_det = super(InvertibleModule, self).forward(input, c[0] if c else None, inverse=rev)
        return (output,), log_abs_det

    def inverse(self, x_or_z: Sequence[Tensor], c: Any = None) -> tuple[tuple[Tensor], Tensor]:  # type: ignore[override]
        """Undoes `forward`."""
        return self(x_or_z, c, rev=True)

    def output_dims(self, input_dims: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """Returns the shapes of the inputs."""
        return input_dims


class InvertibleConv2d(_Module, layer.InvertibleConv2d):
    """`nflows_kconv.InvertibleConv2d` as a `FrEIA.modules.InvertibleModule`.

    Forward (data -> latent) is the convolution y = A x, with `rev=True` (latent -> data) the solution x = A^-1 y. FInC
    Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266). Parameters and state_dict are those of
    `nflows_kconv.InvertibleConv2d`.

    Args:
        dims_in: [(C, H, W)]; FrEIA provides it.
        dims_c: Shapes of conditions, ignored.
        options: Arguments of `nflows_kconv.InvertibleConv2d`: `kernel_size`, `corners` and so on.

    Raises:
        TypeError: See `nflows_kconv.InvertibleConv2d`.
        ValueError: See `nflows_kconv.InvertibleConv2d`; and if the input is not exactly one image.

    Examples:
        >>> from FrEIA.framework import SequenceINN
        >>> from nflows_kconv.freia import InvertibleConv2d
        >>> flow = SequenceINN(12, 16, 16)
        >>> flow.append(InvertibleConv2d, corners="TL")
        >>> flow.append(InvertibleConv2d, corners="BR")
    """


class InvertibleConv1d(_Module, layer.InvertibleConv1d):
    """`nflows_kconv.InvertibleConv1d` as a `FrEIA.modules.InvertibleModule`; see `InvertibleConv2d`."""


class InvertibleConv3d(_Module, layer.InvertibleConv3d):
    """`nflows_kconv.InvertibleConv3d` as a `FrEIA.modules.InvertibleModule`; see `InvertibleConv2d`."""


class PeriodicConv2d(_Module, periodic.PeriodicConv2d):
    """`nflows_kconv.PeriodicConv2d` as a `FrEIA.modules.InvertibleModule`, in `InvertibleConv2d`'s directions."""


class PeriodicConv1d(_Module, periodic.PeriodicConv1d):
    """`nflows_kconv.PeriodicConv1d` as a `FrEIA.modules.InvertibleModule`; see `PeriodicConv2d`."""


class PeriodicConv3d(_Module, periodic.PeriodicConv3d):
    """`nflows_kconv.PeriodicConv3d` as a `FrEIA.modules.InvertibleModule`; see `PeriodicConv2d`."""


class _ConditionalModule(_Module):
    """A layer that takes FrEIA's single condition as its context."""

    def __init__(
        self, dims_in: Sequence[tuple[int, ...]], dims_c: Sequence[tuple[int, ...]] | None = None, **options: Any
    ) -> None:
        if [len(shape) for shape in dims_c or ()] != [1]:
            raise ValueError(f"dims_c must be one shape, [(E,)], got {dims_c}")
        super().__init__(dims_in, dims_c, context_features=dims_c[0][0], **options)  # type: ignore[index]


class ConditionalInvertibleConv2d(_ConditionalModule, conditional.ConditionalInvertibleConv2d):
    """`nflows_kconv.ConditionalInvertibleConv2d` as a `FrEIA.modules.InvertibleModule`.

    Args:
        dims_in: [(C, H, W)]; FrEIA provides it.
        dims_c: [(E,)], the shape of a context; FrEIA provides it.
        options: Arguments of `nflows_kconv.ConditionalInvertibleConv2d`, without `context_features`.

    Raises:
        TypeError: See `nflows_kconv.ConditionalInvertibleConv2d`.
        ValueError: See there; and if the input is not exactly one image or the context exactly one vector.

    Examples:
        >>> import torch
        >>> from FrEIA.framework import SequenceINN
        >>> from nflows_kconv.freia import ConditionalInvertibleConv2d
        >>> flow = SequenceINN(12, 16, 16)
        >>> flow.append(ConditionalInvertibleConv2d, cond=0, cond_shape=(5,), diagonal="learned")
        >>> latent, log_abs_det = flow(torch.randn(10, 12, 16, 16), c=[torch.randn(10, 5)])
    """


class ConditionalInvertibleConv1d(_ConditionalModule, conditional.ConditionalInvertibleConv1d):
    """`nflows_kconv.ConditionalInvertibleConv1d` in FrEIA; see `ConditionalInvertibleConv2d`."""


class ConditionalInvertibleConv3d(_ConditionalModule, conditional.ConditionalInvertibleConv3d):
    """`nflows_kconv.ConditionalInvertibleConv3d` in FrEIA; see `ConditionalInvertibleConv2d`."""


def _run(module: InvertibleModule, value: bijection.Value, context: Any, rev: bool) -> tuple[bijection.Value, Tensor]:
    inputs = (value,) if isinstance(value, Tensor) else tuple(value)
    # Modules without conditions lack the argument.
    conditions = {} if context is None else {"c": [context] if isinstance(context, Tensor) else list(context)}
    outputs, log_abs_det = module(inputs, rev=rev, **conditions)
    if not isinstance(outputs, Tensor) and len(outputs) == 1:
        (outputs,) = outputs
    return outputs, bijection.per_sample(log_abs_det, inputs)


bijection.register(InvertibleModule, forward=partial(_run, rev=False), inverse=partial(_run, rev=True))
