"""Trains in less memory: the backward pass recomputes activations by the inverse.

Ordinary training keeps the activations of all K steps. Here the forward pass keeps only the inputs of 8 evenly spaced
steps. The backward pass goes from the last step to the first: it inverts a step to get its input, then repeats the step
with autograd to differentiate it. Only one step's activations exist at a time, so the memory is the same for any K from
8 (RevNet, Gomez, Ren, Urtasun, Grosse 2017, arXiv 1707.04585, section 3.2).

Inverses may explode: from step to step the error of the restored inputs can grow until gradients are wrong (Behrmann,
Vicol, Wang, Grosse, Jacobsen 2021, arXiv 2006.09347). A kept input ends this growth and shows how large the error was.
If it was too large, the K / 8 inputs up to the next kept one are recomputed in the forward direction.

Undoing and repeating a step evaluates the networks of couplings, which are most of the work, only once (see
`shared_networks`). If they are all of the work, a training step takes 4/3 of the ordinary time: two evaluations instead
of one, plus the derivative, which costs as much as two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states

from nflows_kconv import checks
from nflows_kconv.bijection import Bijection, as_bijection
from nflows_kconv.flows import steps
from nflows_kconv.flows.images.arguments import check_numbers
from nflows_kconv.flows.shared_networks import evaluated_once
from nflows_kconv.invertible import no_log_abs_det
from nflows_kconv.torch_internals import tree_leaves

Gradients = dict[Tensor, Tensor]

_KEPT_INPUTS = 8

# Modules whose buffers a call did not change or only initialised, and whether in training mode.
_settled: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Chain(steps.Sequence):
    """`steps.Sequence` that trains in memory independent of the number of steps; see `cascade`.

    Parameters, state_dict and results are the same.

    Args:
        steps: Modules with `forward` and `inverse`, or any others that `nflows_kconv.bijection` supports.
    """

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return cascade(input, self.steps, context)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return cascade(input, self.steps, context, inverse=True)


def cascade(
    input: Tensor, modules: Iterable[Any], context: Any = None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Applies modules in sequence, with gradients in memory independent of their number.

    Input, context and the modules' parameters get the ordinary gradients up to rounding, but no second derivatives. The
    results of a module must depend only on these; ActNorm may initialise from its first batch. Neither input nor output
    may be modified in place before the backward pass. torch.compile breaks its graph here, CUDA graphs cannot capture
    it, and torch.func takes the ordinary memory. An error in the first call restores buffers and ActNorm's state before
    its first batch.

    Networks registered with `nflows_kconv.bijection.register(networks=...)` are evaluated once for both directions of a
    coupling.

    Args:
        input: [B, ...], in float32 or float64. The modules must keep this dtype, because half precision is too coarse
            for their inverses; under autocast, only networks may compute in half precision.
        modules: Modules that `nflows_kconv.bijection.as_bijection` accepts. The first one takes the input, or returns
            the output if `inverse`.
        context: What each of them is conditioned on: None, a tensor, or a tuple of tensors.
        inverse: Whether to apply the inverses, from last to first.

    Returns:
        The output of the last step, and the sum of the log-determinants, [B].

    Raises:
        TypeError: If a module is not a bijection; if gradients are recorded and the input or an output has another
            dtype, or a module's parameters are sharded on their own.
        RuntimeError: If gradients are recorded and the modules draw random numbers, as dropout does, or change buffers
            at every call, as BatchNorm and spectral_norm do in training mode.
    """
    check_numbers(input)
    steps = [_Step(as_bijection(module), context, inverse) for module in modules]
    if inverse:
        steps.reverse()
    # Meta and fake tensors have no memory to save, and torch.func needs every operator.
    is_ordinary = input.is_meta or not (torch.compiler.is_compiling() or checks.is_plain(input))
    if is_ordinary or not torch.is_grad_enabled():
        return _run(input, steps)
    if input.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"input must be float32 or float64 for the steps to be undone, got {input.dtype}")
    _check_that_parameters_are_whole(steps)
    sources = dict.fromkeys(source for one in steps for source in one.sources())
    return _Cascade.apply(steps, input, *sources)


def _check_that_parameters_are_whole(steps: Sequence[_Step]) -> None:
    """Raises a TypeError if steps compute with copies of sharded parameters, which would get no gradient."""
    for one in steps:
        for name, parameter in one.module.named_parameters():
            if hasattr(parameter, "device_mesh"):  # a DTensor
                raise TypeError(
                    "parameters must be unsharded when steps run: apply fully_shard to the module that holds the "
                    f"steps, not to the steps; got a {type(parameter).__name__} for {name} of "
                    f"{type(one.module).__name__}"
                )


class _Step(NamedTuple):
    """A bijection in the direction of the cascade."""

    bijection: Bijection
    context: Any
    is_inverted: bool

    @property
    def module(self) -> nn.Module:
        return self.bijection.module

    def run(self, input: Tensor) -> tuple[Tensor, Tensor]:
        direction = self.bijection.inverse if self.is_inverted else self.bijection.forward
        return direction(input, self.context)  # type: ignore[return-value]

    def undo(self, output: Tensor) -> Tensor:
        if self.is_inverted:
            return self.bijection.forward(output, self.context)[0]  # type: ignore[return-value]
        return self.bijection.undo(output, self.context)  # type: ignore[return-value]

    def sources(self) -> list[Tensor]:
        """Returns the tensors that get gradients besides the input."""
        tensors = (*tree_leaves(self.context), *self.module.parameters())
        return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]


class _Cascade(torch.autograd.Function):
    """All steps as one autograd function."""

    @staticmethod
    def forward(ctx: Any, steps: Sequence[_Step], input: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        device_type = input.device.type
        ctx.autocast = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
            # Older torch caches weight casts that are not recorded and reuses them where gradients are needed.
            "cache_enabled": False,
        }
        random_state, buffers = _random_state(input), _buffers(steps)
        ctx.sources = sources
        length = max(1, math.ceil(len(steps) / _KEPT_INPUTS))
        ctx.segments = [steps[start : start + length] for start in range(0, len(steps), length)]
        kept, total = [input], no_log_abs_det(input)
        with _restored_on_error(steps), torch.autocast(**ctx.autocast):
            for segment in ctx.segments:
                output, log_abs_det = _run(kept[-1], segment, keep_dtype=True)
                kept.append(output)
                total = total + log_abs_det
            if _changed(buffers, _buffers(steps)):
                _check_that_buffers_stay(input, steps)
            if not all(map(torch.equal, random_state, _random_state(input))):
                raise RuntimeError(
                    "steps must not draw random numbers, as dropout does: the backward pass recomputes them"
                )
        ctx.save_for_backward(*kept, *sources)  # with the sources, so autograd notices later changes to them
        return kept[-1], total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("reversible steps have no second derivatives: create_graph must be False, got True")
        gradient, log_abs_det_gradient = gradients
        kept = ctx.saved_tensors[: len(ctx.segments) + 1]
        total: Gradients = {}
        for segment, (input, output) in reversed(list(zip(ctx.segments, pairwise(kept), strict=True))):
            found, is_accurate = _differentiate(ctx, segment, [input], output, gradient, log_abs_det_gradient)
            if not is_accurate:
                inputs = _inputs(ctx, segment, input)
                found, _ = _differentiate(ctx, segment, inputs, output, gradient, log_abs_det_gradient)
            gradient = found.pop(input)
            _add(total, found)
        return None, gradient, *map(total.get, ctx.sources)


def _inputs(ctx: Any, steps: Sequence[_Step], input: Tensor) -> list[Tensor]:
    """Returns the input of each step, computed from the first input."""
    inputs = [input]
    with torch.autocast(**ctx.autocast):
        for one in steps[:-1]:
            inputs.append(one.run(inputs[-1])[0])
    return inputs


def _differentiate(
    ctx: Any,
    steps: Sequence[_Step],
    inputs: list[Tensor],
    output: Tensor,
    gradient: Tensor,
    log_abs_det_gradient: Tensor,
) -> tuple[Gradients, bool]:
    """Returns the gradients of the first input and of the sources, and whether the inverses were accurate.

    `inputs` are the inputs of the first steps; the inverses give the others. `output` is the output of the last step.
    """
    total: Gradients = {}
    for index, one in reversed(list(enumerate(steps))):
        with torch.autocast(**ctx.autocast), evaluated_once(one.module):
            input = inputs[index] if index < len(inputs) else one.undo(output)
            leaf = input.detach().requires_grad_()
            with torch.enable_grad():
                results = one.run(leaf)
        if index == 0 and len(inputs) < len(steps) and not _is_close(output, results[0], ctx.autocast):
            return {}, False
        weighted = zip(results, (gradient, log_abs_det_gradient), strict=True)
        # A log-determinant may be constant.
        roots, weights = zip(*(pair for pair in weighted if pair[0].requires_grad), strict=True)
        sources = one.sources()
        gradient, *found = torch.autograd.grad(roots, [leaf, *sources], weights, allow_unused=True)
        _add(total, {source: value for source, value in zip(sources, found, strict=True) if value is not None})
        output = input
    return {**total, inputs[0]: gradient}, True


def _is_close(restored: Tensor, expected: Tensor, autocast: dict[str, Any]) -> bool:
    """Returns whether at least two thirds of the dtype's digits are right in each sample."""
    resolution = torch.finfo(autocast["dtype"] if autocast["enabled"] else expected.dtype).eps
    if expected.is_cuda and expected.dtype == torch.float32:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        if "tf32" in (convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision):
            resolution = max(resolution, 2**-10)
    error, scale = (tensor.abs().flatten(1).amax(1) for tensor in (restored - expected, expected))
    return bool((error <= resolution ** (2 / 3) * scale).all())


def _run(input: Tensor, steps: Sequence[_Step], keep_dtype: bool = False) -> tuple[Tensor, Tensor]:
    output, total = input, no_log_abs_det(input)
    for one in steps:
        output, log_abs_det = one.run(output)
        if keep_dtype and output.dtype != input.dtype:
            raise TypeError(
                f"steps must keep the input's dtype, {input.dtype}, to be undone, "
                f"got {output.dtype} from {type(one.module).__name__}"
            )
        total = total + log_abs_det
    return output, total


def _add(total: Gradients, gradients: Gradients) -> None:
    for source, value in gradients.items():
        total[source] = total[source] + value if source in total else value


def _random_state(input: Tensor) -> list[Tensor]:
    """Returns state that changes when random numbers are drawn."""
    return [torch.get_rng_state(), *get_device_states(input)[1]]


def _buffers(steps: Sequence[_Step]) -> dict[str, tuple[Tensor, int]]:
    """Returns all buffers of the steps with their versions, which show every write without a synchronization."""
    return {
        f"{type(one.module).__name__} {index}, {name}": (buffer, 0 if buffer.is_inference() else buffer._version)
        for index, one in enumerate(steps)
        for name, buffer in one.module.named_buffers()
    }


def _changed(before: dict[str, tuple[Tensor, int]], after: dict[str, tuple[Tensor, int]]) -> list[str]:
    return [
        name
        for name, (buffer, version) in after.items()
        if name not in before or before[name][0] is not buffer or before[name][1] != version
    ]


@contextmanager
def _restored_on_error(steps: Sequence[_Step]) -> Iterator[None]:
    """Restores buffers on an error, and the parameters that ActNorm sets with its buffer.

    Copies only at the first call, which reveals modules that change buffers at every call.
    """
    modules = {part for one in steps for part in one.module.modules() if part._buffers}
    unknown = [part for part in modules if _settled.get(part) is not part.training]
    held: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (table, name, tensor, tensor.clone())
        for part in unknown
        for table in (part._buffers, part._parameters)
        for name, tensor in table.items()
        if tensor is not None
    ]
    try:
        yield
    except BaseException:
        for table, name, tensor, copy in held:
            table[name] = tensor  # a step may replace the buffer or the data of the parameter
            if not torch.equal(tensor.to(copy.device), copy):
                tensor.copy_(copy)
        raise
    _settled.update((part, part.training) for part in unknown)


def _check_that_buffers_stay(input: Tensor, steps: Sequence[_Step]) -> None:
    """Runs steps that changed buffers a second time, as the backward pass will, and raises if they change again.

    Initialisation from the first batch, as by ActNorm, changes nothing the second time.
    """
    before = _buffers(steps)
    _run(input, steps)
    changed = _changed(before, _buffers(steps))
    if changed:
        raise RuntimeError(
            "steps must not change buffers at every call, as BatchNorm and spectral_norm do in training mode: the "
            f"backward pass recomputes them; got changes of {'; '.join(changed)}"
        )
