"""The layer as a module that belongs to no library; the adapters give it their library's directions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nflows_kconv import bound, checks, functional, geometry
from nflows_kconv.invertible import InvertibleModule


class InvertibleConv2d(InvertibleModule):
    """An invertible k x k convolution with an exact inverse and an exact log-determinant.

    Each of the G channel groups is padded towards one corner of the image and convolved; only the upper triangle of the
    *pivot*, the tap that reads the pixel itself, is masked. In raster order the Jacobian is triangular, so that

        log |det dy/dx| = H W sum_o log |W[o, o, pivot]|

    and the inverse is a back-substitution. FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266), section 3;
    gradients through the inverse as in Inverse-Flow (Nagar, Varma 2025, arXiv 2410.14634).

    The weight is computed from the parameters at each use: `raw_weight` where the weight is free, zero where it is
    masked, and the diagonal. Whatever happens to the parameters (weight decay, loading, in-place steps), the mask
    holds. The layer starts close to the identity.

    A state_dict has the parameters alone; its metadata, which `torch.save` keeps, records the corners. Loading takes
    also a plain `weight` in place of `raw_weight` and `log_diagonal`. What cannot be loaded, such as other corners,
    other shapes or the version of a later release, leaves the layer as it was.

    Args:
        num_channels: C, a multiple of the number of corners.
        kernel_size: k, or (kh, kw); any size from 1 on.
        corners: One of "TL", "TR", "BL", "BR" for each group of channels, or a single one for one convolution over all
            channels. Repeats are allowed; all four by default.
        diagonal: "unit" fixes the pivot's diagonal to 1, as in the paper (log-determinant 0); "learned" makes it
            exp(log_diagonal), always positive.
        bias: Whether to add a learned constant to each channel.
        max_inverse_gain: If given, g > 1, the weights off the diagonal are scaled down, all those of a group by one
            factor, as far as it takes for ||A^-1||_2 <= g / min_o |W[o, o, pivot]| at every image size. Then also
            ||A||_2 <= (2 - 1/g) max_o |W[o, o, pivot]|. See docs/numerics.md.

    Attributes:
        raw_weight: Parameter, [C, C/G, kh, kw].
        log_diagonal: Parameter, [C], or None.
        bias: Parameter, [C], or None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, or the channels do not divide into the groups.
    """

    # Of the state_dict; this class loads its own version and older ones.
    _version = 1

    raw_weight: nn.Parameter
    log_diagonal: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        corners: str | Sequence[str] = geometry.CORNERS,
        diagonal: Literal["unit", "learned"] = "unit",
        bias: bool = False,
        max_inverse_gain: float | None = None,
    ) -> None:
        super().__init__()
        self._parameters = _Parameters()
        groups = geometry.parse_corners(corners)
        self.num_channels = num_channels = checks.positive("num_channels", num_channels)
        self.kernel_size = _pair(kernel_size)
        self.corners = (corners,) if isinstance(corners, str) else tuple(corners)
        if num_channels % len(groups):
            raise ValueError(
                f"num_channels must be a multiple of the number of corners, got {num_channels} channels "
                f"and the {len(groups)} corners {self.corners}"
            )
        if diagonal not in ("unit", "learned"):
            raise ValueError(f'diagonal must be "unit" or "learned", got {diagonal!r}')
        self.diagonal = diagonal
        self.max_inverse_gain = None if max_inverse_gain is None else _check_gain(max_inverse_gain)

        self.raw_weight = nn.Parameter(torch.empty(num_channels, num_channels // len(groups), *self.kernel_size))
        self.log_diagonal = nn.Parameter(torch.empty(num_channels)) if diagonal == "learned" else None
        self.bias = nn.Parameter(torch.empty(num_channels)) if bias else None
        self._masks: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.register_state_dict_post_hook(_record_options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a layer close to the identity: its taps add about 5 % of the signal's standard deviation."""
        fan_in = self.raw_weight[0].numel()
        nn.init.normal_(self.raw_weight, std=0.05 / fan_in**0.5)
        with torch.no_grad():
            self.raw_weight.masked_fill_(~self._masks_for(self.raw_weight)[0], 0)
        for parameter in (self.log_diagonal, self.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def _masks_for(self, raw_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Where the weight is free, and a weight that is 1 on the pivot's diagonal, 0 elsewhere.

        They follow from the shape, so they are no buffers, which `to_empty` would leave without values.
        """
        key = raw_weight.device, raw_weight.dtype
        masks = self._masks.get(key)
        # A compiler would take the sizes of kept masks for dynamic ones; with fake tensors they cannot be mixed.
        if masks is not None and checks.is_plain(raw_weight):
            return masks
        shape, groups = raw_weight.shape, geometry.parse_corners(self.corners)
        with torch.inference_mode(False):  # autograd could not save the tensors of that mode later
            on_diagonal = geometry.diagonal_entries(shape, groups, raw_weight.device)
            free = ~(geometry.masked_entries(shape, groups, raw_weight.device) | on_diagonal)
            masks = free, on_diagonal.to(raw_weight.dtype)
        if checks.is_plain(free):
            self._masks[key] = masks
        return masks

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a file take: not the masks, which `torch.load` might put on another device."""
        return {**self.__dict__, "_masks": {}}

    @property
    def weight(self) -> Tensor:
        """The weight, [C, C/G, kh, kw], as `torch.nn.functional.conv2d` takes it for each group.

        It is computed from the parameters at each use, so it refuses to be changed in place. It can be assigned: that
        sets the parameters.

        Raises:
            TypeError: On assignment, if it is no floating-point tensor.
            ValueError: On assignment, if the shape or the diagonal does not fit, masked entries are not zero, or
                `max_inverse_gain` does not hold.
            RuntimeError: On a change in place; on assignment, if the parameters are themselves computed, as by pruning.
        """
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # whose tensors count no changes
            with torch.inference_mode(False), torch.no_grad():
                weight = self._weight()
        else:
            weight = self._weight()
        return weight.as_subclass(_ComputedWeight) if checks.is_plain(weight) else weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"weight must be a tensor of floating-point numbers, got {kind}")
        value = value.detach()
        parameters = self._to_parameters(value)
        masked = geometry.masked_entries(value.shape, geometry.parse_corners(self.corners), value.device)
        if value[masked].any():
            raise ValueError(
                "weight must be zero above the pivot's diagonal, "
                f"got {int(value[masked].count_nonzero())} entries other than zero there"
            )
        for name in parameters:
            if not isinstance(self._parameters.get(name), nn.Parameter):
                raise RuntimeError(f"{name} must be a parameter for weight to be assigned, but something computes it")
        with torch.no_grad():
            for name, tensor in parameters.items():
                getattr(self, name).copy_(tensor)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter; assigns `weight`, which is none, and refuses what pruning would make of it."""
        if name == "weight" and param is not None:
            self.weight = param.detach()  # a parameter would come here again
        elif name.startswith("weight"):
            raise TypeError(_NO_PARAMETER.format(name))
        else:
            super().register_parameter(name, param)

    def _weight(self) -> Tensor:
        free: Tensor = self.raw_weight
        is_free, fixed = self._masks_for(free)
        if self.log_diagonal is not None:
            fixed = fixed * self.log_diagonal.exp()[:, None, None, None]
        if self.max_inverse_gain is not None:
            dtype = torch.promote_types(free.dtype, torch.float32)  # so that half precision rounds once
            relative = torch.where(is_free, free, 0).to(dtype)
            if self.log_diagonal is not None:
                relative = relative * self.log_diagonal.to(dtype).neg().exp()[:, None, None, None]
            scale = bound.scale(relative, len(self.corners), self.max_inverse_gain)
            free = (free * scale).to(free.dtype)
        return torch.where(is_free, free, fixed)

    def forward(self, input: Tensor, context: Any = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Convolves, or solves.

        Args:
            input: x, or y if `inverse`, [B, C, H, W], in the dtype of the parameters.
            context: Ignored.
            inverse: Whether to solve for x.

        Returns:
            y and log |det dy/dx|, or x and log |det dx/dy|: [B, C, H, W] and [B], in float32 at least.

        Raises:
            TypeError: See `functional.conv2d` and `functional.conv2d_inverse`.
            ValueError: See there; and, on the CPU, if exp(log_diagonal) is zero or not finite.
        """
        return super().forward(input, context, inverse=inverse)

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        self._check_diagonal()
        output = functional.conv2d(input, self._weight(), self.corners, self.bias)
        return output, self._log_abs_det(input)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        self._check_diagonal()
        output = functional.conv2d_inverse(input, self._weight(), self.corners, self.bias)
        return output, -self._log_abs_det(input)

    def _check_diagonal(self) -> None:
        if self.log_diagonal is not None:
            functional.check_diagonal(self.log_diagonal.exp())

    def _log_abs_det(self, input: Tensor) -> Tensor:
        batch, _, height, width = input.shape
        if self.log_diagonal is None:
            dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
            return torch.zeros(batch, dtype=dtype, device=input.device)
        dtype = torch.promote_types(self.log_diagonal.dtype, torch.float32)
        return (height * width * self.log_diagonal.to(dtype).sum()).repeat(batch)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            self._check_metadata(local_metadata)
            self._check_shapes(state_dict, prefix)
            if "corners" not in local_metadata:
                self._check_zeros(state_dict, prefix)
            self._convert_weight(state_dict, prefix)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'state_dict'}: {error}")
            return  # with the layer as it was
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "raw_weight" in state_dict:
            self._warn_of_differences(prefix, local_metadata)

    def _check_metadata(self, metadata: dict[str, Any]) -> None:
        version = metadata.get("version") or self._version
        if version > self._version:
            raise ValueError(
                f"the version must be at most {self._version}, got {version} from a later release of nflows-kconv"
            )
        corners = tuple(metadata.get("corners", self.corners))
        if corners != self.corners:
            raise ValueError(f"the corners must be the layer's {self.corners}, got {corners}")

    def _convert_weight(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Makes parameters of a plain weight."""
        if prefix + "weight" in state_dict and prefix + "raw_weight" not in state_dict:
            for name, tensor in self._to_parameters(state_dict.pop(prefix + "weight")).items():
                state_dict[prefix + name] = tensor

    def _to_parameters(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters that make this weight, masked entries included.

        Raises:
            ValueError: If there are none.
        """
        if weight.shape != self.raw_weight.shape:
            raise ValueError(f"weight must have shape {tuple(self.raw_weight.shape)}, got {tuple(weight.shape)}")
        groups = geometry.parse_corners(self.corners)
        diagonal = geometry.pivot_diagonal(weight, groups)
        right = diagonal > 0 if self.diagonal == "learned" else diagonal == 1
        if not right.all():
            required = "positive" if self.diagonal == "learned" else "1"
            raise ValueError(
                f"the pivot's diagonal must be {required} for diagonal={self.diagonal!r}, "
                f"got {diagonal[~right][0].item():g}"
            )
        on_diagonal = geometry.diagonal_entries(weight.shape, groups, weight.device)
        free = weight.masked_fill(on_diagonal, 0)
        if self.max_inverse_gain is not None:
            masked = geometry.masked_entries(weight.shape, groups, weight.device)
            relative = free.masked_fill(masked, 0) / diagonal[:, None, None, None]
            scale = bound.scale(relative, len(groups), self.max_inverse_gain).min().item()
            if scale < 1 - 1e-5:
                raise ValueError(
                    f"the weight must keep max_inverse_gain={self.max_inverse_gain:g}, got one whose entries off the "
                    f"diagonal are larger than that allows by a factor of {1 / scale:.3g}"
                )
        parameters = {"raw_weight": free}
        if self.diagonal == "learned":
            parameters["log_diagonal"] = diagonal.log()
        return parameters

    def _check_shapes(self, state_dict: dict[str, Any], prefix: str) -> None:
        own = {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
        saved = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        found, expected = _shapes(saved), _shapes({name: own[name] for name in saved})
        if found != expected:
            layer = f"{self._get_name()}({self.extra_repr()})"
            raise ValueError(f"shapes must be {expected} for {layer}, got {found}")

    def _check_zeros(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Knows a layer of other corners by its zeros: what lies on and above its pivot's diagonal is never trained."""
        raw = state_dict.get(prefix + "raw_weight")
        if raw is None or raw.is_meta or not checks.is_plain(raw):
            return  # there are no zeros to look at
        own, found = geometry.parse_corners(self.corners), []
        for group, corner in zip(raw.unflatten(0, (len(own), -1)), own, strict=True):
            fitting = [each for each in range(len(geometry.CORNERS)) if not _ignored(group, [each]).any()]
            if not fitting:
                return
            found.append(corner if corner in fitting else fitting[0])
        if found != own:
            names = tuple(geometry.CORNERS[corner] for corner in found)
            raise ValueError(
                f"the corners must be the layer's {self.corners}, got a raw_weight whose zeros are those of {names}"
            )

    def _warn_of_differences(self, prefix: str, metadata: dict[str, Any]) -> None:
        gain = metadata.get("max_inverse_gain", self.max_inverse_gain)
        if gain != self.max_inverse_gain:
            warnings.warn(
                f"{prefix}raw_weight was saved with max_inverse_gain={gain} and is loaded with "
                f"{self.max_inverse_gain}: where the bound is active, it makes another weight",
                stacklevel=2,
            )
        if self.raw_weight.is_meta:
            return
        ignored = int(_ignored(self.raw_weight, geometry.parse_corners(self.corners)).count_nonzero())
        if ignored:
            warnings.warn(
                f"{prefix}raw_weight has {ignored} entries other than zero on or above the pivot's diagonal, which the "
                "layer ignores",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        gain = "" if self.max_inverse_gain is None else f", max_inverse_gain={self.max_inverse_gain}"
        return (
            f"{self.num_channels}, kernel_size={self.kernel_size}, corners={self.corners}, "
            f"diagonal={self.diagonal!r}, bias={self.bias is not None}{gain}"
        )


class _ComputedWeight(Tensor):
    """A weight that refuses changes in place, which would be lost; what is computed from it are plain tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():  # cannot ask for versions
                return func(*args, **kwargs or {})
            own = [value for value in tree_leaves((args, kwargs)) if isinstance(value, cls)]
            versions = [weight._version for weight in own]
            result = func(*args, **kwargs or {})
            if func.__name__ == "__set__" or [weight._version for weight in own] != versions:
                # No TypeError, after which Python would go on from `weight *= 2` to `weight * 2`.
                raise RuntimeError(
                    f"weight must not be changed in place, got {func.__name__}: it is computed from the parameter "
                    "raw_weight; change that, or assign a tensor, layer.weight = ..."
                )
            # What shares its memory refuses, too, but `detach()`, which is how one takes the values, and `_base`, at
            # whose end the compiler looks for a tensor without one.
            plain = func in (Tensor.detach, Tensor._base.__get__)  # type: ignore[union-attr]
            if not plain and type(result) is Tensor and own and _share_memory(result, own[0]):
                return result.as_subclass(cls)
            return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and files hold the plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


_NO_PARAMETER = "{} cannot be a parameter: weight is computed, and the parameter is raw_weight"


class _Parameters(dict[str, Any]):
    """A module's parameters; the old weight_norm and spectral_norm of torch look here for `weight`."""

    def __missing__(self, name: str) -> Any:
        raise TypeError(_NO_PARAMETER.format(name)) if name == "weight" else KeyError(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name) if name in self else self.__missing__(name)


def _ignored(raw_weight: Tensor, groups: Sequence[int]) -> Tensor:
    """What a raw weight has on and above the pivot's diagonal."""
    shape, device = raw_weight.shape, raw_weight.device
    return raw_weight[geometry.masked_entries(shape, groups, device) | geometry.diagonal_entries(shape, groups, device)]


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _record_options(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    local_metadata.update(corners=layer.corners, max_inverse_gain=layer.max_inverse_gain)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}


def _check_gain(max_inverse_gain: float) -> float:
    if not isinstance(max_inverse_gain, Real) or isinstance(max_inverse_gain, bool):
        raise TypeError(f"max_inverse_gain must be a number or None, got {max_inverse_gain!r}")
    if not 1 < max_inverse_gain < math.inf:
        raise ValueError(f"max_inverse_gain must be finite and greater than 1, got {max_inverse_gain}")
    return float(max_inverse_gain)


def _pair(kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size, kernel_size)
    if isinstance(kernel_size, str) or len(sizes) != 2:
        raise ValueError(f"kernel_size must be an integer or a pair (kh, kw), got {kernel_size!r}")
    return checks.positive("kernel_size", sizes[0]), checks.positive("kernel_size", sizes[1])
