"""Compiles CUDA kernels before they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nflows_kconv import functional
from nflows_kconv.layer import InvertibleConv2d


def warmup(module: nn.Module, input_shape: Sequence[int], **arguments: Any) -> None:
    """Compiles and loads the CUDA kernels that a module will need for inputs of this shape.

    Kernels are compiled when they are first needed, which takes up to a second each, and cannot be inside the capture
    of a CUDA graph. Afterwards the convolution, its inverse and their first derivatives need nothing any more, at the
    shape that each `InvertibleConv2d` in the module is given. Another shape may need more, another batch size rarely
    does.

    A copy of the module is called once, in evaluation mode, on an image whose values are all 0.5: through its
    `log_prob`, as flows of nflows and normflows are trained, or itself if it has none. The module, its gradients and
    the state of random number generators stay as they are. For layers that are not on a CUDA device there is nothing to
    compile, and nothing happens.

    Args:
        module: Anything that contains an `InvertibleConv2d`, or is one.
        input_shape: [B, C, H, W] of what the module is called with.
        arguments: Further arguments of the call, such as a context.

    Raises:
        TypeError: If `module` is no module.
        ValueError: If it contains no `InvertibleConv2d`.
        RuntimeError: If it cannot be called with such an input, or a kernel does not compile.

    Examples:
        >>> import torch
        >>> from nflows_kconv import warmup
        >>> from nflows_kconv.nflows import finc_flow
        >>> flow = finc_flow((3, 32, 32), levels=3, steps=2, hidden_channels=64)
        >>> warmup(flow.to("cuda" if torch.cuda.is_available() else "cpu"), (100, 3, 32, 32))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not _layers(module):
        raise ValueError(f"module must contain an InvertibleConv2d, got a {type(module).__name__} without one")
    if any(layer.raw_weight.is_cuda for layer in _layers(module)):
        visit_layers(module, input_shape, _differentiate, **arguments)


def visit_layers(
    module: nn.Module,
    input_shape: Sequence[int],
    visit: Callable[[InvertibleConv2d, Tensor], None],
    **arguments: Any,
) -> None:
    """Calls visit(layer, input) for every kind of layer, and every shape of its input, that a call of the module runs.

    Args:
        module: See `warmup`.
        input_shape: See `warmup`.
        visit: What to do; layer and input belong to a copy of the module.
        arguments: See `warmup`.

    Raises:
        RuntimeError: If the call fails.
    """
    module = copy.deepcopy(module).eval()
    layers = _layers(module)
    visited = set()

    def visiting(layer: InvertibleConv2d, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(input: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen = (layer.corners, layer.raw_weight.shape, input.dtype, input.device, input.shape)
            if seen not in visited:
                visited.add(seen)
                visit(layer, input)
            return function(input, *args, **kwargs)

        return wrapped

    for layer in layers:
        layer.forward, layer.inverse = visiting(layer, layer.forward), visiting(layer, layer.inverse)  # type: ignore
    weight = layers[0].raw_weight
    devices = {layer.raw_weight.device for layer in layers if layer.raw_weight.is_cuda}
    call = getattr(module, "log_prob", module)
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.no_grad():
            call(torch.full(tuple(input_shape), 0.5, dtype=weight.dtype, device=weight.device), **arguments)
    except Exception as error:
        name = type(module).__name__
        raise RuntimeError(f"calling {name} with an input of shape {tuple(input_shape)} failed: {error}") from error


def _differentiate(layer: InvertibleConv2d, input: Tensor) -> None:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (input, layer.weight)]
        for function in (functional.conv2d, functional.conv2d_inverse):
            output = function(leaves[0], leaves[1], layer.corners)
            torch.autograd.grad(output, leaves, torch.ones_like(output))


def _layers(module: nn.Module) -> list[InvertibleConv2d]:
    return [layer for layer in module.modules() if isinstance(layer, InvertibleConv2d)]
