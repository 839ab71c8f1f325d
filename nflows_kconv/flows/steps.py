"""The steps of the FInC flow as library-independent modules.

Each is an `InvertibleModule` of sequences, images or volumes, [B, C, L], [B, C, H, W] or [B, C, D, H, W], with
`forward` from data to latent, like `InvertibleConv2d`. Adapters give them the directions of their library.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from nflows_kconv import bijection, checks
from nflows_kconv.backends.reference import without_autocast
from nflows_kconv.conditional import ConditionalInvertibleConv
from nflows_kconv.flows.images.arguments import check_numbers
from nflows_kconv.invertible import InvertibleModule, no_log_abs_det
from nflows_kconv.torch_internals import (
    is_functorch_wrapped_tensor,
    is_sharded,
    is_under_torch_func,
    process_group,
    uncompiled,
)

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOLS: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}

# On other devices reading a value synchronizes.
_LOOKS_ARE_FREE = ("cpu",)


class _Step(InvertibleModule):
    """A step that checks its input, [B, C, ...], before either direction.

    Its buffers are floating-point: moving averages of a model cannot subtract booleans, and round integers down.
    """

    num_channels: int | None = None  # any
    _least_dimensions = 2
    _check_type = staticmethod(checks.floating_point)

    def forward(self, input: Tensor, context: Any = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Checks and transforms the input, or undoes that if `inverse`."""
        self._check_type("input", input)
        shape, channels = input.shape, self.num_channels
        if len(shape) < self._least_dimensions or (channels is not None and shape[1] != channels):
            raise ValueError(f"input must have shape [B, {channels or 'C'}, ...], got {tuple(shape)}")
        for parameter in self._parameters.values():
            if parameter is not None and parameter.device != input.device:
                raise ValueError(f"input must be on the parameters' device {parameter.device}, got {input.device}")
        return super().forward(input, context, inverse=inverse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._buffers:
            if prefix + name in state_dict:
                state_dict[prefix + name] = of_earlier_files(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *args)


def of_earlier_files(buffer: Any) -> Any:
    """Converts `initialized`, once a boolean, and `permutation`, once the place of each row's 1; keeps all else."""
    if isinstance(buffer, Tensor) and buffer.dtype == torch.int64 and buffer.dim() == 1:
        return (buffer[:, None] == torch.arange(len(buffer), device=buffer.device)).float()
    return buffer.float() if isinstance(buffer, Tensor) and buffer.dtype == torch.bool else buffer


class Sequence(InvertibleModule):
    """Several steps in sequence, the first one next to the data.

    Args:
        steps: Modules with `forward` and `inverse`, both of which take a context.
    """

    def __init__(self, steps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return _chain(input, context, self.steps)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return _chain(input, context, [step.inverse for step in reversed(self.steps)])


class Inverse(InvertibleModule):
    """A step with its directions exchanged, as the convolutions of Inverse-Flow (Nagar, Varma 2025, arXiv 2410.14634).

    Args:
        step: The module to invert.
    """

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return self.step.inverse(input, context)  # type: ignore[operator]

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return self.step(input, context)


class Squeeze(_Step):
    """Moves each block of two pixels along every axis into channels: C channels become 2^n C for n axes.

    Raises:
        TypeError: In a call, if the input is not a dense real tensor.
        ValueError: In a call, if a size is odd, or the inverse gets a number of channels that 2^n does not divide.
    """

    _check_type = staticmethod(checks.real)

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        batch, channels, *sizes = input.shape
        if any(size % 2 for size in sizes):
            raise ValueError(f"sizes must be even, got shape {tuple(input.shape)}")
        axes = range(2, 2 + 2 * len(sizes), 2)
        blocks = input.reshape(batch, channels, *chain.from_iterable((size // 2, 2) for size in sizes))
        output = blocks.permute(0, 1, *(axis + 1 for axis in axes), *axes).flatten(1, 1 + len(sizes))
        return output, no_log_abs_det(input)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        batch, channels, *sizes = input.shape
        if channels % 2 ** len(sizes):
            raise ValueError(f"channels must be a multiple of {2 ** len(sizes)}, got shape {tuple(input.shape)}")
        blocks = input.unflatten(1, (-1, *[2] * len(sizes)))
        axes = chain.from_iterable((axis + len(sizes), axis) for axis in range(2, 2 + len(sizes)))
        output = blocks.permute(0, 1, *axes).reshape(batch, blocks.shape[1], *(2 * size for size in sizes))
        return output, no_log_abs_det(input)


class ActNorm(_Step):
    """y = exp(log_scale) (x + shift) per channel (Glow, Kingma, Dhariwal 2018, arXiv 1807.03039, section 3.1).

    In training mode, while `initialized` is 0, the first forward batch sets both parameters so that its outputs
    have mean 0 and variance 1 in every channel. Inside a forward of DistributedDataParallel it is the joint batch of
    all processes; otherwise it is the local batch, without communication.

    Under torch.compile the first batch breaks the graph, and the next one compiles again. Compiled code uses the value
    of `initialized` last read at an eager call, when loading a state_dict, or in `train`.

    Args:
        num_channels: C.

    Attributes:
        log_scale: Parameter, [C].
        shift: Parameter, [C].
        initialized: Buffer, a number: 0 until the first batch has passed.

    Raises:
        TypeError: If the number of channels is not an integer; in a call, if the input is not floating-point.
        ValueError: If it is below 1; in a call, if the input has another shape than [B, C] or [B, C, ...] or another
            device, or the mean or the variance of the first batch is not finite.
    """

    initialized: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = checks.positive("num_channels", num_channels)
        self.log_scale = nn.Parameter(torch.empty(num_channels))
        self.shift = nn.Parameter(torch.empty(num_channels))
        self.register_buffer("initialized", torch.empty(()))
        # The buffer and its version when it was last read as True.
        self._seen: tuple[Tensor, int | None] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets to the identity, to be initialised by the next batch."""
        nn.init.zeros_(self.log_scale)
        nn.init.zeros_(self.shift)
        self.initialized.fill_(False)
        self._seen = None

    def train(self, mode: bool = True) -> ActNorm:
        """Sets the mode, and reads `initialized` for compiled code."""
        super().train(mode)
        if mode:
            self._seen = None
            self._is_initialized()
        return self

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        if self.training and not self._is_initialized():
            initialize = self._initialize_uncompiled if torch.compiler.is_compiling() else self._initialize
            initialize(input)
        scale, shift = (_on_channels(each, input) for each in (self.log_scale.exp(), self.shift))
        return (input + shift) * scale, _per_image(self.log_scale, input)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        scale, shift = (_on_channels(each, input) for each in (self.log_scale.neg().exp(), self.shift))
        return input * scale - shift, -_per_image(self.log_scale, input)

    def _is_initialized(self) -> bool:
        """Returns the value of the buffer, or True if it has no values."""
        if torch.compiler.is_compiling():
            return self._seen is not None
        buffer = self.initialized
        if buffer.is_meta or type(buffer) is not Tensor or is_functorch_wrapped_tensor(buffer):
            return True
        # Inference tensors have no version.
        version = None if buffer.is_inference() else buffer._version
        known = version is not None and self._seen is not None and self._seen[0] is buffer and self._seen[1] == version
        if known and buffer.device.type not in _LOOKS_ARE_FREE:
            return True
        if not buffer:
            self._seen = None
        elif not known:
            self._seen = (buffer, version)
        return self._seen is not None

    @torch.no_grad()
    def _initialize(self, input: Tensor) -> None:
        if is_under_torch_func() or torch.compiler.is_exporting():
            raise RuntimeError(
                "ActNorm must see its first batch, or be in evaluation mode, before torch.func or torch.export uses it"
            )
        if is_sharded(self):
            raise RuntimeError(
                "ActNorm must see its first batch, or load a state_dict, before fully_shard, which loses what it sets"
            )
        if self._parameters and not {"log_scale", "shift"} <= self._parameters.keys():  # replicas have none
            raise RuntimeError(
                "ActNorm must see its first batch, or load a state_dict, before pruning or a parametrization computes "
                "its parameters, which loses what it sets"
            )
        group, others = process_group(self), [0, *range(2, input.dim())]
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        count = values.new_full(values.shape[1:2], values.numel() // values.shape[1])
        count, total = _total(torch.stack([count, values.sum(others)]), group)
        if not count[0]:
            return
        # About the mean, because float32 would lose the variance of data far from 0.
        about = total / count
        values = values - _on_channels(about, values)
        rest, square = _total(torch.stack([values.sum(others), values.square().sum(others)]), group)
        rest, square = rest / count, square / count
        shift, log_scale = -(about + rest), -0.5 * ((square - rest.square()).clamp_min(0) + 1e-12).log()
        finite = shift.isfinite() & log_scale.isfinite()
        if not finite.all():
            raise ValueError(
                "ActNorm's first batch must have a finite mean and variance in each channel, "
                f"got others in {int((~finite).sum())} of {len(finite)}"
            )
        self.shift.copy_(shift)
        self.log_scale.copy_(log_scale)
        self.initialized.fill_(True)
        self._is_initialized()

    _initialize_uncompiled = uncompiled(_initialize)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_initialized()


class InvertibleConv1x1(_Step):
    """y = W x at every pixel, W = P L (U + diag(s)) (Glow, arXiv 1807.03039, section 3.2).

    P is a fixed permutation, L unit lower and U strictly upper triangular, so log |det W| = sum log |s|. W starts as a
    random rotation. Under autocast the layer stays in the dtype of its parameters.

    Args:
        num_channels: C.

    Attributes:
        lower: Parameter, [C, C], with the strict lower triangle of L.
        upper: Parameter, [C, C], with U as its strict upper triangle.
        log_scale: Parameter, [C], log |s|.
        permutation: Buffer, [C, C], P.
        sign: Buffer, [C], the signs of s.

    Raises:
        TypeError: If the number of channels is not an integer; in a call, if the input is not floating-point.
        ValueError: If it is below 1; in a call, if the input has another shape than [B, C, ...] or another device.
    """

    _least_dimensions = 3
    permutation: Tensor
    sign: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = checks.positive("num_channels", num_channels)
        self.register_buffer("permutation", torch.empty(num_channels, num_channels))
        self.register_buffer("sign", torch.empty(num_channels))
        self.lower = nn.Parameter(torch.empty(num_channels, num_channels))
        self.upper = nn.Parameter(torch.empty(num_channels, num_channels))
        self.log_scale = nn.Parameter(torch.empty(num_channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws a random rotation."""
        if self.lower.is_meta:
            return
        # On the CPU, because not every device has these factorisations.
        shape, dtype = self.lower.shape, torch.promote_types(self.lower.dtype, torch.float32)
        rotation = torch.linalg.qr(torch.randn(shape, dtype=dtype, device="cpu"))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.permutation.copy_(permutation)
        self.sign.copy_(upper.diagonal().sign())
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.log_scale.copy_(upper.diagonal().abs().log())

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        with without_autocast(input.device):
            lower, upper = _factors(self.lower, self.upper, self.log_scale, self.sign)
            output = _mixed((lower @ upper)[self.permutation.argmax(1)], input)
        return output, _per_image(self.log_scale, input)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        with without_autocast(input.device):
            output = _mixed(self.inverse_weight(), input)
        return output, -_per_image(self.log_scale, input)

    def inverse_weight(self) -> Tensor:
        """Returns the inverse of W, [C, C]."""
        return inverse_weight(*self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the arguments of the function `inverse_weight`."""
        return self.lower, self.upper, self.log_scale, self.sign, self.permutation


def inverse_weight(lower: Tensor, upper: Tensor, log_scale: Tensor, sign: Tensor, permutation: Tensor) -> Tensor:
    """Returns the inverse of W, [C, C], from the tensors of an `InvertibleConv1x1`."""
    # Half precision has no triangular solver.
    dtype = torch.promote_types(lower.dtype, torch.float32)
    left, right = (factor.to(dtype) for factor in _factors(lower, upper, log_scale, sign))
    permuted = torch.eye(len(left), dtype=dtype, device=left.device)[:, permutation.argmax(1)]
    half_solved = torch.linalg.solve_triangular(left, permuted, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(right, half_solved, upper=True).to(lower.dtype)


def _factors(lower: Tensor, upper: Tensor, log_scale: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return lower.tril(-1) + identity, upper.triu(1) + torch.diag(sign * log_scale.exp())


def _mixed(weight: Tensor, input: Tensor) -> Tensor:
    # Not F.conv2d, which uses TF32 on a GPU by default: the inverse must undo this to rounding.
    return (weight @ input.to(weight.dtype).flatten(2)).view(input.shape)


class AffineCoupling(_Step):
    """y1 = s(x2) x1 + t(x2), y2 = x2, with log s = 2 tanh(h / 2) and (h, t) = network(x2).

    The coupling of FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266), with a scale between e^-2 and e^2. The
    inverse divides by the same scale, so only rounding in the network, such as TF32 on a GPU, adds error in a round
    trip.

    With context channels the network also takes the context: unchanged if it is [B, E, ...] of the input's size,
    otherwise broadcast from [B, E] or average-pooled from another size.

    Args:
        network: Maps the second half of the channels and the context, [B, C/2 + E, ...], to h and t, [B, C, ...].
        context_channels: E; 0 ignores the context.

    Raises:
        TypeError: In a call, if the input is not floating-point, or the context no dense real tensor.
        ValueError: In a call, if the number of channels is odd, or the context or the network's output has another
            shape.
    """

    def __init__(self, network: nn.Module, context_channels: int = 0) -> None:
        super().__init__()
        self.network = network
        self.context_channels = context_channels

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        changed, kept, log_scale, shift = self._parts(input, context)
        return torch.cat([changed * log_scale.exp() + shift, kept], 1), _sum(log_scale)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        changed, kept, log_scale, shift = self._parts(input, context)
        return torch.cat([(changed - shift) * log_scale.neg().exp(), kept], 1), -_sum(log_scale)

    def _parts(self, input: Tensor, context: Any) -> tuple[Tensor, ...]:
        """Returns both halves of the input, the log-scale and the shift."""
        if input.shape[1] % 2:
            raise ValueError(f"input must have an even number of channels, got shape {tuple(input.shape)}")
        changed, kept = input.chunk(2, 1)
        seen = kept
        if self.context_channels:
            seen = torch.cat([kept, _at_size_of(kept, context, self.context_channels)], 1)
        numbers = self.network(seen)
        checks.real("the output of network", numbers)
        if numbers.shape != input.shape:  # would broadcast, with a wrong log-determinant
            raise ValueError(f"network must return shape {tuple(input.shape)}, got {tuple(numbers.shape)}")
        raw, shift = numbers.to(kept.dtype).chunk(2, 1)
        return changed, kept, 2 * torch.tanh(raw / 2), shift


def _at_size_of(kept: Tensor, context: Tensor, channels: int) -> Tensor:
    """Returns the context at every pixel of the input."""
    checks.real("context", context)
    size = kept.shape[2:]
    if context.dim() not in (2, kept.dim()) or context.shape[:2] != (kept.shape[0], channels):
        raise ValueError(
            f"context must have shape [{kept.shape[0]}, {channels}] or [{kept.shape[0]}, {channels}, ...] with "
            f"{len(size)} sizes, got {tuple(context.shape)}"
        )
    if context.dim() == 2:
        return context.view(*context.shape, *[1] * len(size)).expand(-1, -1, *size)
    return context if context.shape[2:] == size else _POOLS[len(size)](context, size)


def coupling_network(
    channels: int, hidden_channels: int, context_channels: int = 0, dimensions: int = 2, padding_mode: str = "zeros"
) -> nn.Sequential:
    """Builds the paper's coupling network, 3x3 -> ReLU -> 1x1 -> ReLU -> 3x3, which starts at zero."""
    convolution, borders = CONVOLUTIONS[dimensions], dict(padding=1, padding_mode=padding_mode)
    return nn.Sequential(
        convolution(channels // 2 + context_channels, hidden_channels, 3, **borders),
        nn.ReLU(),
        convolution(hidden_channels, hidden_channels, 1),
        nn.ReLU(),
        _zero(convolution(hidden_channels, channels, 3, **borders)),
    )


def learned_prior(
    channels: int, context_channels: int = 0, dimensions: int = 2, padding_mode: str = "zeros"
) -> AffineCoupling:
    """Builds the learned prior of a split, the last step before half of the C channels become latents."""
    seen = channels // 2 + context_channels
    network = _zero(CONVOLUTIONS[dimensions](seen, channels, 3, padding=1, padding_mode=padding_mode))
    return AffineCoupling(network, context_channels)


def _zero(convolution: nn.Module) -> nn.Module:
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


def _chain(input: Tensor, context: Any, functions: Iterable[Any]) -> tuple[Tensor, Tensor]:
    total = None
    for function in functions:
        input, log_abs_det = function(input, context)
        total = log_abs_det if total is None else total + log_abs_det
    if total is None:
        check_numbers(input)
        total = no_log_abs_det(input)
    return input, total


def _on_channels(values: Tensor, input: Tensor) -> Tensor:
    """Reshapes one value per channel, [C], to broadcast over the input."""
    return values.view(-1, *[1] * (input.dim() - 2))


def _per_image(log_scale: Tensor, input: Tensor) -> Tensor:
    """Returns log |det| of scaling the channels of every pixel, [B]."""
    dtype = torch.promote_types(log_scale.dtype, torch.float32)
    return (input.shape[2:].numel() * log_scale.to(dtype).sum()).repeat(input.shape[0])


def _sum(log_scale: Tensor) -> Tensor:
    dtype = torch.promote_types(log_scale.dtype, torch.float32)
    return log_scale.to(dtype).sum([*range(1, log_scale.dim())])


def _total(values: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """Sums the values in place over the processes of the group, if there is one."""
    if group is not None:
        distributed.all_reduce(values, group=group)
    return values


bijection.register(AffineCoupling, networks=("network",))
bijection.register(ConditionalInvertibleConv, networks=("weight_network",))
