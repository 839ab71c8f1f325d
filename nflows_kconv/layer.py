"""The layer as a library-independent module; adapters give it the directions of their library."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nflows_kconv import bound, checks, functional, ops, stencil
from nflows_kconv.invertible import InvertibleModule, no_log_abs_det
from nflows_kconv.torch_internals import EXTRA_STATE, tree_leaves, without_subclasses


class KernelLayer(InvertibleModule):
    """Base of all layers that compute their weight from `raw_weight` and `log_diagonal`: parameters and state_dicts.

    Subclasses define the methods that raise NotImplementedError here, and call `reset_parameters` at the end of their
    constructor.
    """

    # Version of the state_dict; older versions load too.
    _version = 1

    dimensions: ClassVar[int]
    raw_weight: nn.Parameter
    log_diagonal: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        kernel_size: int | Sequence[int],
        groups: int,
        *,
        diagonal: Literal["unit", "learned"],
        bias: bool,
        max_inverse_gain: float | None,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._parameters = _Parameters()
        self.num_channels = num_channels
        self.kernel_size = checks.per_axis("kernel_size", kernel_size, self.dimensions)
        if diagonal not in ("unit", "learned"):
            raise ValueError(f'diagonal must be "unit" or "learned", got {diagonal!r}')
        if dtype is not None and dtype not in ops.DTYPES:
            raise TypeError(f"dtype must be one of {ops.DTYPES}, got {dtype}")
        self.diagonal = diagonal
        self.max_inverse_gain = None if max_inverse_gain is None else _check_gain(max_inverse_gain)

        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.raw_weight = nn.Parameter(torch.empty(num_channels, num_channels // groups, *self.kernel_size, **like))
        for name, is_used in (("log_diagonal", diagonal == "learned"), ("bias", bias)):
            self.register_parameter(name, nn.Parameter(torch.empty(num_channels, **like)) if is_used else None)
        self.register_state_dict_post_hook(_record_options)

    def reset_parameters(self) -> None:
        """Draws a layer close to the identity: its taps add about 5 % of the signal's standard deviation."""
        fan_in = self.raw_weight[0].numel()
        nn.init.normal_(self.raw_weight, std=0.05 / fan_in**0.5)
        for parameter in (self.log_diagonal, self.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def convolve(self, input: Tensor, context: Any = None) -> Tensor:
        """Computes y = A x + b without the log-determinant, in every library. Runs no hooks of the layer.

        Args:
            input: x, [B, C, ...], in the dtype of the parameters.
            context: As in `forward`.

        Raises:
            TypeError: See `forward`.
            ValueError: See `forward`.
        """
        return self._run("conv", input, context)[0]

    def solve(self, input: Tensor, context: Any = None) -> Tensor:
        """Computes x = A^-1 (y - b) without the log-determinant, in every library. Runs no hooks of the layer.

        Args:
            input: y, [B, C, ...], in the dtype of the parameters.
            context: As in `forward`.

        Raises:
            TypeError: See `forward`.
            ValueError: See `forward`.
        """
        return self._run("solve", input, context)[0]

    @property
    def weight(self) -> Tensor:
        """The weight, [C, C/G, kh, kw], as `torch.nn.functional.conv2d` takes it for each group.

        Every use computes it from the parameters, so it cannot be modified in place. Assigning it sets the parameters.

        Raises:
            TypeError: On assignment, if it is not a dense floating-point tensor.
            ValueError: On assignment, if the shape or the diagonal does not fit, masked entries are not zero,
                `max_inverse_gain` does not hold, or it has no values.
            RuntimeError: On modification in place; on assignment, if the parameters are themselves computed, as by
                pruning.
        """
        # Tensors made in inference mode have no version counter.
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                weight = self._weight()
        else:
            weight = self._weight()
        return weight.as_subclass(_ComputedWeight) if checks.is_plain(weight) else weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        _check_values(value)
        value = value.detach()
        parameters = self._to_parameters(value)
        self._check_masked(value)
        for name in parameters:
            if not isinstance(self._parameters.get(name), nn.Parameter):
                raise RuntimeError(f"{name} must be a parameter for weight to be assigned, got a computed tensor")
        with torch.no_grad():
            for name, tensor in parameters.items():
                getattr(self, name).copy_(tensor)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter; assigns `weight`, which is not a parameter, and refuses its pruned variants."""
        if name == "weight" and param is not None:
            self.weight = param.detach()  # assigning a parameter would call this method again
        elif name.startswith("weight"):
            raise TypeError(_NO_PARAMETER.format(name))
        else:
            super().register_parameter(name, param)

    def forward(self, input: Tensor, context: Any = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Convolves, or solves if `inverse`.

        Args:
            input: x, or y if `inverse`, [B, C, ...], in the dtype of the parameters.
            context: Of conditional layers: [B, E], in the same dtype. Other layers ignore it.
            inverse: Whether to solve for x.

        Returns:
            y and log |det dy/dx|, or x and log |det dx/dy|: [B, C, ...] and [B], in float32 at least.

        Raises:
            TypeError: See `functional.conv2d` and `functional.conv2d_inverse`; and if the context of a conditional
                layer is not a tensor of the input's dtype.
            ValueError: See there; on the CPU, if exp(log_diagonal) is zero or not finite; and if the context of a
                conditional layer or the output of its network has another shape or device.
        """
        output, jacobian = self._run("solve" if inverse else "conv", input, context)
        return output, self._log_abs_det(input, jacobian, -1 if inverse else 1)

    def _run(self, operation: ops.Operation, input: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the output, and what determines the Jacobian, as `_jacobian` does."""
        raise NotImplementedError

    def _jacobian(self) -> Tensor | None:
        raise NotImplementedError

    def _log_abs_det(self, input: Tensor, jacobian: Any, sign: int, /) -> Tensor:
        """Returns `sign` times log |det dy/dx|, [B], in new memory, because users add to it in place."""
        raise NotImplementedError

    def _weight(self) -> Tensor:
        raise NotImplementedError

    def _structure(self) -> dict[str, tuple[Any, ...]]:
        """Returns the metadata that a state_dict must share for its parameters to mean the same."""
        raise NotImplementedError

    def _to_parameters(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the parameters that give this weight, including its masked entries.

        Raises:
            ValueError: If no parameters do.
        """
        raise NotImplementedError

    def _check_masked(self, weight: Tensor) -> None:
        """Raises a ValueError unless the weight is zero where the layer masks it."""

    def _check_shape(self, weight: Tensor) -> None:
        if weight.shape != self.raw_weight.shape:
            raise ValueError(f"weight must have shape {tuple(self.raw_weight.shape)}, got {tuple(weight.shape)}")

    def _check_pivot(self, diagonal: Tensor, required: str, right: Tensor) -> None:
        if not right.all():
            raise ValueError(
                f"the pivot's diagonal must be {required} for diagonal={self.diagonal!r}, "
                f"got {diagonal[~right][0].item():g}"
            )

    def _check_bound(self, relative: Tensor) -> None:
        """Raises a ValueError unless this weight of N respects `max_inverse_gain`; see `bound`."""
        if self.max_inverse_gain is None:
            return
        scale = bound.scale(relative, self.max_inverse_gain).min().item()
        if scale < 1 - 1e-5:
            raise ValueError(
                f"weight must respect max_inverse_gain={self.max_inverse_gain:g}, got off-diagonal entries "
                f"{1 / scale:.3g} times too large"
            )

    def get_extra_state(self) -> Tensor:
        """Returns the metadata as JSON bytes in a tensor, for file formats that keep only tensors."""
        return torch.tensor(list(json.dumps(self._options()).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Does nothing, because loading checks the state before it changes anything."""

    def _options(self) -> dict[str, Any]:
        """Returns what a state_dict records besides the parameters."""
        return {**self._structure(), "max_inverse_gain": self.max_inverse_gain}

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
        # Older files have no extra state.
        extra = state_dict.setdefault(prefix + EXTRA_STATE, None)
        try:
            if "corners" not in local_metadata:
                local_metadata = local_metadata | _recorded(extra)
            self._check_metadata(local_metadata)
            self._check_saved(state_dict, prefix, local_metadata)
            self._convert_weight(state_dict, prefix)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'state_dict'}: {error}")
            return  # leaves the layer unchanged
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "raw_weight" in state_dict:
            self._warn_of_differences(prefix, local_metadata)

    def _check_metadata(self, metadata: dict[str, Any]) -> None:
        version = metadata.get("version") or self._version
        if version > self._version:
            raise ValueError(
                f"version must be at most {self._version}, got {version}, from a later release of nflows-kconv"
            )
        for name, own in self._structure().items():
            saved = metadata.get(name, own)
            saved = tuple(saved) if isinstance(saved, (list, tuple)) else saved
            if saved != own:
                raise ValueError(f"{name} must match the layer's {own}, got {saved}")

    def _convert_weight(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Converts a plain weight to parameters."""
        if prefix + "weight" in state_dict and prefix + "raw_weight" not in state_dict:
            _check_values(state_dict[prefix + "weight"])
            for name, tensor in self._to_parameters(state_dict.pop(prefix + "weight")).items():
                state_dict[prefix + name] = tensor

    def _check_saved(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        own = {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
        saved = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        for name, tensor in saved.items():
            checks.dense(name, tensor)
        found, expected = _shapes(saved), _shapes({name: own[name] for name in saved})
        if found != expected:
            layer = f"{self._get_name()}({self.extra_repr()})"
            raise ValueError(f"shapes must be {expected} for {layer}, got {found}")

    def _warn_of_differences(self, prefix: str, metadata: dict[str, Any]) -> None:
        gain = metadata.get("max_inverse_gain", self.max_inverse_gain)
        if gain != self.max_inverse_gain:
            warnings.warn(
                f"{prefix}raw_weight was saved with max_inverse_gain={gain} but is loaded with "
                f"{self.max_inverse_gain}: where the bound is active, the weight differs",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """Returns the constructor's arguments."""
        gain = "" if self.max_inverse_gain is None else f", max_inverse_gain={self.max_inverse_gain}"
        return (
            f"{self.num_channels}, kernel_size={self.kernel_size}, {self._structure_repr()}, "
            f"diagonal={self.diagonal!r}, bias={self.bias is not None}{gain}"
        )

    def _structure_repr(self) -> str:
        raise NotImplementedError


def log_abs_det(input: Tensor, log_diagonal: Tensor | None, sign: int = 1) -> Tensor:
    """Returns the log-determinants for a log-diagonal, [C] or per image [B, C]; None stands for a unit diagonal."""
    # As few operators as possible, in new memory, because users add to it in place.
    if log_diagonal is None:
        return no_log_abs_det(input)
    if log_diagonal.is_cuda and (sums := ops.log_abs_det(input, log_diagonal, sign)) is not None:
        return sums
    shape, dtype = input.shape, torch.float32 if log_diagonal.dtype in _HALF_PRECISION else None
    return log_diagonal.sum(-1, dtype=dtype).expand(shape[0]) * (sign * math.prod(shape[2:]))


class InvertibleConv(KernelLayer):
    """Base of `InvertibleConv1d`, `InvertibleConv2d` and `InvertibleConv3d`."""

    def __init__(
        self,
        num_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        corners: str | Sequence[str] | None = None,
        dilation: int | Sequence[int] = 1,
        diagonal: Literal["unit", "learned"] = "unit",
        bias: bool = False,
        max_inverse_gain: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        corners = stencil.CORNERS[self.dimensions] if corners is None else corners
        stencils = stencil.parse(corners, self.dimensions)
        dilation = functional.parse_dilation(dilation, self.dimensions)
        num_channels = checks.positive("num_channels", num_channels)
        # `torch.load` accepts only plain strings.
        names = (str(corners),) if isinstance(corners, str) else tuple(map(str, corners))
        if num_channels % len(names):
            raise ValueError(
                f"num_channels must be a multiple of the number of corners, got {num_channels} channels "
                f"and the {len(names)} corners {names}; one corner takes any number"
            )
        super().__init__(
            num_channels,
            kernel_size,
            len(names),
            diagonal=diagonal,
            bias=bias,
            max_inverse_gain=max_inverse_gain,
            device=device,
            dtype=dtype,
        )
        self.corners, self._stencils, self.dilation = names, stencils, dilation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a layer close to the identity: its taps add about 5 % of the signal's standard deviation."""
        super().reset_parameters()
        with torch.no_grad():
            self.raw_weight.masked_fill_(_ignored(self.raw_weight, self._stencils), 0)

    def _weight(self) -> Tensor:
        log_diagonal = self.log_diagonal
        raw_weight = self._bounded(self.raw_weight, log_diagonal)
        return stencil.effective(raw_weight, self._stencils, log_diagonal, log_diagonal is None)

    def _bounded(self, raw_weight: Tensor, log_diagonal: Tensor | None) -> Tensor:
        """Returns the raw weight, scaled down where `max_inverse_gain` requires it."""
        if self.max_inverse_gain is None:
            return raw_weight
        dtype = torch.promote_types(raw_weight.dtype, torch.float32)  # rounds half precision once
        relative = raw_weight.to(dtype).masked_fill(_ignored(raw_weight, self._stencils), 0)
        if log_diagonal is not None:
            relative = relative * stencil.on_weight(log_diagonal.to(dtype).neg().exp(), relative)
        scale = bound.scale(relative, self.max_inverse_gain)
        return (raw_weight * scale).to(raw_weight.dtype)

    def _run(self, operation: ops.Operation, input: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        own = self.__dict__  # a module's attributes take several times as long
        parameters = own["_parameters"]
        try:
            weight, log_diagonal, bias = parameters["raw_weight"], parameters["log_diagonal"], parameters["bias"]
        except KeyError:  # one of them is computed, as by pruning
            weight, log_diagonal, bias = self.raw_weight, self.log_diagonal, self.bias
        if own["max_inverse_gain"] is not None:
            weight = self._bounded(weight, log_diagonal)
        output = functional.run(
            operation, input, weight, bias, log_diagonal, own["_stencils"], log_diagonal is None, own["dilation"]
        )
        return output, log_diagonal

    def _jacobian(self) -> Tensor | None:
        return self.log_diagonal

    _log_abs_det = staticmethod(log_abs_det)

    def _structure(self) -> dict[str, tuple[Any, ...]]:
        return {"corners": self.corners, "dilation": self.dilation}

    def _structure_repr(self) -> str:
        dilation = "" if set(self.dilation) == {1} else f", dilation={self.dilation}"
        return f"corners={self.corners}{dilation}"

    def _to_parameters(self, weight: Tensor) -> dict[str, Tensor]:
        self._check_shape(weight)
        diagonal = stencil.pivot_diagonal(weight, self._stencils)
        if self.diagonal == "learned":
            self._check_pivot(diagonal, "positive", diagonal > 0)
        else:
            self._check_pivot(diagonal, "1", diagonal == 1)
        free = weight.masked_fill(stencil.diagonal_entries(weight.shape, self._stencils, weight.device), 0)
        masked = stencil.masked_entries(weight.shape, self._stencils, weight.device)
        self._check_bound(free.masked_fill(masked, 0) / stencil.on_weight(diagonal, weight))
        return {"raw_weight": free} | ({"log_diagonal": diagonal.log()} if self.diagonal == "learned" else {})

    def _check_masked(self, weight: Tensor) -> None:
        masked = weight[stencil.masked_entries(weight.shape, self._stencils, weight.device)]
        if masked.any():
            raise ValueError(
                "weight must be zero where it is masked (above the pivot's diagonal and, for a side, at the taps after "
                f"the pivot), got {int(masked.count_nonzero())} nonzero entries"
            )

    def _check_metadata(self, metadata: dict[str, Any]) -> None:
        # Versions without dilation recorded only the corners.
        undilated = {"dilation": (1,) * self.dimensions} if "corners" in metadata else {}
        super()._check_metadata(undilated | metadata)

    def _check_saved(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        super()._check_saved(state_dict, prefix, metadata)
        if "corners" not in metadata:
            self._check_zeros(state_dict, prefix)

    def _warn_of_differences(self, prefix: str, metadata: dict[str, Any]) -> None:
        super()._warn_of_differences(prefix, metadata)
        if self.raw_weight.is_meta or not checks.is_plain(self.raw_weight):
            return  # no values to inspect, or those of a shard
        ignored = int(self.raw_weight[_ignored(self.raw_weight, self._stencils)].count_nonzero())
        if ignored:
            warnings.warn(
                f"{prefix}raw_weight has {ignored} nonzero entries that the layer ignores: on and above the pivot's "
                "diagonal, and at masked taps",
                stacklevel=2,
            )

    def _check_zeros(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Recognizes other corners by their zeros: entries on and above the pivot's diagonal are never trained."""
        raw = state_dict.get(prefix + "raw_weight")
        if raw is None or raw.is_meta or not checks.is_plain(raw):
            return  # no values to inspect
        found = []
        for group, own in zip(raw.unflatten(0, (len(self.corners), -1)), self.corners, strict=True):
            masks = {name: _ignored(group, [code]) for name, code in stencil.STENCILS[self.dimensions].items()}
            fitting = {name: int(mask.sum()) for name, mask in masks.items() if not group[mask].any()}
            if not fitting:
                return
            # A side has all zeros of a corner. Several stencils have the most zeros if all weights are zero.
            most = [name for name, zeros in fitting.items() if zeros == max(fitting.values())]
            found.append(own if own in fitting and len(most) > 1 else most[0])
        if tuple(found) != self.corners:
            raise ValueError(
                f"corners must match the layer's {self.corners}, got a raw_weight with the zeros of {tuple(found)}"
            )


class InvertibleConv2d(InvertibleConv):
    """An invertible k x k convolution with an exact inverse and an exact log-determinant.

    In each of the G channel groups a pixel reads one *corner* of the image (a quarter plane) or one *side* (a half
    plane). A corner masks only the upper triangle of the *pivot*, the tap that reads the pixel itself; a side also
    masks the taps after the pivot in its row. The Jacobian is triangular, so

        log |det dy/dx| = H W sum_o log |W[o, o, pivot]|

    and the inverse is a back-substitution. FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266), section 3;
    gradients through the inverse as in Inverse-Flow (Nagar, Varma 2025, arXiv 2410.14634).

    Every use computes the weight from the parameters: `raw_weight` where the weight is free, zero where it is masked,
    and the diagonal. The mask holds whatever happens to the parameters (weight decay, loading, in-place steps). The
    layer starts close to the identity.

    A state_dict has the parameters and, as bytes in `_extra_state`, corners, dilation and `max_inverse_gain`, which any
    file format keeps. State_dicts of earlier versions, without it, load too, and so does a plain `weight` instead of
    `raw_weight` and `log_diagonal`. A state_dict with other corners, other shapes or a later version raises an error
    and leaves the layer unchanged. For missing or unexpected keys torch raises its own error after loading the others.

    Args:
        num_channels: C, a multiple of the number of corners.
        kernel_size: k, or (kh, kw); any size from 1.
        corners: What each group of channels reads, or a single name for one convolution over all channels. Names may
            repeat; the default is all four corners. A corner is "TL", "TR", "BL" or "BR": TL reads the pixels above and
            to the left, with the pivot as the kernel's last tap. A side is "T", "B", "L" or "R": T reads the rows above
            and, in its own row, the pixels to the left, with the pivot at (kh - 1, (kw - 1) // 2), as in PixelCNN,
            Emerging and MaCow. B is T turned by 180 degrees, L is T mirrored at the main diagonal, and R is L turned by
            180 degrees.
        dilation: Pixels from one tap to the next, one number or one per axis.
        diagonal: "unit" fixes the pivot's diagonal to 1, as in the paper (log-determinant 0); "learned" makes it
            exp(log_diagonal), always positive.
        bias: Whether to add a learned constant to each channel.
        max_inverse_gain: g > 1, or None for no bound. Scales down the weights off the diagonal, by one factor per
            group, until ||A^-1||_2 <= g / min_o |W[o, o, pivot]| at every image size. Then also ||A||_2 <= (2 - 1/g)
            max_o |W[o, o, pivot]|. See docs/numerics.md.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        raw_weight: Parameter, [C, C/G, kh, kw].
        log_diagonal: Parameter, [C], or None.
        bias: Parameter, [C], or None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, or the channels do not divide into the groups.
    """

    dimensions = 2


class InvertibleConv1d(InvertibleConv):
    """`InvertibleConv2d` in one dimension, of sequences [B, C, L].

    Takes the arguments of `InvertibleConv2d`, with corner "L", which reads to the left (the past), or "R" for each
    group; the default is one of each. `raw_weight` is [C, C/G, k].
    """

    dimensions = 1


class InvertibleConv3d(InvertibleConv):
    """`InvertibleConv2d` in three dimensions, of volumes [B, C, D, H, W].

    Takes the arguments of `InvertibleConv2d`, with corners of three letters, "NTL" to "FBR": N (near) reads planes of
    smaller index along the first axis, F (far) planes of larger index. The default is one of each of the eight.
    `raw_weight` is [C, C/G, kd, kh, kw].
    """

    dimensions = 3


class _ComputedWeight(Tensor):
    """A weight that refuses modification in place, which would be lost; results computed from it are plain tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with without_subclasses():
            if torch.compiler.is_compiling():  # the compiler cannot read versions
                return func(*args, **kwargs or {})
            own = [value for value in tree_leaves((args, kwargs)) if isinstance(value, cls)]
            versions = [weight._version for weight in own]
            result = func(*args, **kwargs or {})
            if func.__name__ == "__set__" or [weight._version for weight in own] != versions:
                # Not a TypeError, after which Python would evaluate `weight *= 2` as `weight * 2`.
                raise RuntimeError(
                    f"weight must not be modified in place, got {func.__name__}: it is computed from raw_weight; "
                    "modify that parameter, or assign a tensor to layer.weight"
                )
            # Views refuse it too, except `detach()`, the way to get the values, and `_base`, because the compiler
            # follows it until a tensor has none.
            plain = func in (Tensor.detach, Tensor._base.__get__)  # type: ignore[union-attr]
            if not plain and type(result) is Tensor and own and _share_memory(result, own[0]):
                return result.as_subclass(cls)
            return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Stores the plain tensor in copies and files."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


_HALF_PRECISION = (torch.float16, torch.bfloat16)
_NO_PARAMETER = "{} cannot be a parameter: weight is computed from the parameter raw_weight"


class _Parameters(dict[str, Any]):
    """A module's parameters, in which torch's old weight_norm and spectral_norm look for `weight`."""

    def __missing__(self, name: str) -> Any:
        raise TypeError(_NO_PARAMETER.format(name)) if name == "weight" else KeyError(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name) if name in self else self.__missing__(name)


def _ignored(weight: Tensor, stencils: Sequence[int]) -> Tensor:
    """Returns True where the layer ignores a raw weight: where it is masked, and on the diagonal."""
    return stencil.masked_entries(weight.shape, stencils, weight.device, diagonal=True)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _record_options(
    layer: KernelLayer, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    local_metadata.update(layer._options())


def _recorded(extra: Any) -> dict[str, Any]:
    """Returns the options in an extra state; none if it is missing or has no values.

    Raises:
        ValueError: If it is damaged.
    """
    if extra is None or (isinstance(extra, Tensor) and (extra.is_meta or not checks.is_plain(extra))):
        return {}
    try:
        return dict(json.loads(bytes(extra.tolist())))
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"extra state must be JSON bytes, got damaged data: {error}") from error


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_values(weight: Tensor) -> None:
    """Raises a TypeError or a ValueError unless it is a dense floating-point tensor with values to check."""
    functional.check_tensor("weight", weight)
    if weight.is_meta:
        raise ValueError("weight must have values, got a meta tensor")


def _check_gain(max_inverse_gain: float) -> float:
    if not isinstance(max_inverse_gain, Real) or isinstance(max_inverse_gain, bool):
        raise TypeError(f"max_inverse_gain must be a number or None, got {max_inverse_gain!r}")
    if not 1 < max_inverse_gain < math.inf:
        raise ValueError(f"max_inverse_gain must be finite and greater than 1, got {max_inverse_gain}")
    return float(max_inverse_gain)
