"""Compiles CUDA kernels before they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nflows_kconv import checks, ops, stencil
from nflows_kconv.bijection import as_bijection, is_bijection
from nflows_kconv.layer import KernelLayer, log_abs_det
from nflows_kconv.torch_internals import TorchDispatchMode, deep_copy, tree_map_only


def warmup(module: nn.Module, input_shape: Sequence[int], context: Any = None) -> None:
    """Compiles and loads the CUDA kernels that a module will need for inputs of this shape.

    Otherwise kernels are compiled when first needed, which takes up to a second each and fails inside the capture of a
    CUDA graph. After the warm-up, the convolution, its inverse and their first derivatives compile nothing more for the
    input shape of each layer. Another shape may need more kernels; another batch size rarely does. Periodic layers need
    none.

    Calls a copy of the module once, in evaluation mode, on images of zeros; a flow runs from data to latent, as in
    `nflows_kconv.bijection`. The module, its gradients and random number generators do not change. Does nothing for
    layers that are not on a CUDA device.

    Args:
        module: A layer of this package, or a module that contains one.
        input_shape: [B, C, ...] of the module's input.
        context: The second argument of the call, or None for no such argument.

    Raises:
        TypeError: If `module` is not a module, or the shape is not a sequence of integers.
        ValueError: If it contains no such layer, or a size is below 1.
        RuntimeError: If the call fails or a kernel does not compile.

    Examples:
        >>> import torch
        >>> from nflows_kconv import warmup
        >>> from nflows_kconv.nflows import finc_flow
        >>> flow = finc_flow((3, 32, 32), levels=3, steps=2, hidden_channels=64)
        >>> warmup(flow.to("cuda" if torch.cuda.is_available() else "cpu"), (100, 3, 32, 32))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    checks.shape("input_shape", input_shape)
    layers = _layers(module)
    if not layers:
        raise ValueError(f"module must contain a layer of nflows-kconv, got a {type(module).__name__} without one")
    if any(layer.raw_weight.is_cuda for layer in layers):
        for problem in problems(module, input_shape, context):
            differentiate(problem)


def problems(module: nn.Module, input_shape: Sequence[int], context: Any = None) -> list[tuple[Any, ...]]:
    """Collects the arguments of `ops.conv` and `ops.solve` in a call of a module, once per shape, dtype and device.

    Args:
        module: See `warmup`.
        input_shape: See `warmup`.
        context: See `warmup`.

    Raises:
        RuntimeError: If the call fails.
    """
    twin = deep_copy(module).eval()
    weights = [layer.raw_weight for layer in _layers(twin)]
    devices = {weight.device for weight in weights if weight.is_cuda}
    arguments = () if context is None else (context,)
    call = as_bijection(twin).forward if is_bijection(twin) else twin
    try:
        with (
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            _Problems() as seen,
        ):
            # Zeros suit flows of whole numbers, of [0, 1] and of real numbers.
            call(torch.zeros(tuple(input_shape), dtype=weights[0].dtype, device=weights[0].device), *arguments)
    except Exception as error:
        name = type(module).__name__
        raise RuntimeError(f"calling {name} with an input of shape {tuple(input_shape)} failed: {error}") from error
    return list(seen.found.values())


class _Problems(TorchDispatchMode):
    """Records the arguments of convolutions and solutions, however layers are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function in (ops.conv, ops.solve) and stencil.PERIODIC not in args[4]:  # torch's convolution runs these
            kind = tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype, tensor.device), args)
            self.found.setdefault(repr(kind), args)
        return function(*args, **(kwargs or {}))


def differentiate(problem: tuple[Any, ...]) -> None:
    """Runs the convolution and the solution of a problem, their first derivatives and the log-determinant."""
    with torch.enable_grad():
        for operator in (ops.conv, ops.solve):
            arguments = tree_map_only(Tensor, lambda tensor: tensor.detach().requires_grad_(), problem)
            output = operator(*arguments)
            leaves = [argument for argument in arguments if isinstance(argument, Tensor)]
            torch.autograd.grad(output, leaves, torch.ones_like(output))
    with torch.no_grad():
        log_abs_det(problem[0], problem[3])


def _layers(module: nn.Module) -> list[KernelLayer]:
    return [layer for layer in module.modules() if isinstance(layer, KernelLayer)]
