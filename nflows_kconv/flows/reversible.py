"""Training in less memory: the backward pass computes activations again, by the inverse.

Ordinary training keeps what each of K steps computed. Here the forward pass keeps the inputs of 8 of the steps, evenly
spaced. The backward pass goes from the last step to the first: the inverse gives the input of a step from its output,
and the step is repeated from there, recorded this time, to be differentiated. Only one step's activations exist at a
time, so the memory is the same for any K from 8 on (RevNet, Gomez, Ren, Urtasun, Grosse 2017, arXiv 1707.04585,
section 3.2).

Inverses may explode: from step to step the error of the restored inputs can grow until gradients are wrong (Behrmann,
Vicol, Wang, Grosse, Jacobsen 2021, arXiv 2006.09347). A kept input ends this growth, and shows how large the error was.
Where it was too large, the inputs up to the next kept one, K / 8 of them, are computed again in the forward direction.

The networks of couplings, which are most of the work, are evaluated once to undo and repeat a step (see
`shared_networks`). Where they are all that counts, a training step takes 4/3 of the ordinary time: two evaluations and
the derivative, which costs two more, in place of one and the derivative.
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

from nflows_kconv.bijection import Bijection, as_bijection
from nflows_kconv.flows import steps
from nflows_kconv.flows.shared_networks import evaluated_once
from nflows_kconv.torch_internals import tree_leaves

Gradients = dict[Tensor, Tensor]

_KEPT_INPUTS = 8

# Modules with buffers that a call has left alone or initialised, and whether in training mode.
_settled: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Chain(steps.Sequence):
    """`steps.Sequence` that trains in memory independent of the number of steps, see `cascade`.

    Its parameters, state_dict and results are the same.

    Args:
        steps: Modules with `forward` and `inverse`, or any others that `nflows_kconv.bijection` knows.
    """

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return cascade(input, self.steps, context)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return cascade(input, self.steps, context, inverse=True)


def cascade(
    input: Tensor, modules: Iterable[Any], context: Any = None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Applies modules one after the other, with gradients in memory independent of their number.

    Input, context and the modules' parameters get the ordinary gradients except for rounding, which cannot be
    differentiated again. What a module computes must depend on these alone; ActNorm may look at its first batch.
    Neither input nor output may be changed in place before the backward pass. torch.compile breaks its graph here, and
    CUDA graphs cannot capture it. An error in the first call leaves buffers as they were, and ActNorm as it was before
    its first batch.

    Where a class of couplings has told `nflows_kconv.bijection.register` of its `networks`, what both directions of a
    coupling evaluate is evaluated once.

    Args:
        input: [B, ...], in float32 or float64. The modules must keep this dtype, as half precision does not hold what
            their inverses need; under autocast, networks alone may compute in half precision.
        modules: What `nflows_kconv.bijection.as_bijection` takes. The first one takes the input, or gives the output if
            `inverse`.
        context: What each of them is conditioned on: None, a tensor, or a tuple of such.
        inverse: Whether to apply the inverses, from the last to the first.

    Returns:
        The output of the last step, and the sum of the log-determinants, [B].

    Raises:
        TypeError: If something is not a bijection; if gradients are recorded, and the input or an output has another
            dtype, or a module's parameters are sharded by themselves.
        RuntimeError: If gradients are recorded, and the modules draw random numbers, as dropout does, or change buffers
            whenever they are called, as BatchNorm and spectral_norm do in training mode.
    """
    steps = [_Step(as_bijection(module), context, inverse) for module in modules]
    if inverse:
        steps.reverse()
    if not torch.is_grad_enabled():
        return _run(input, steps)
    if input.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"input must be float32 or float64 for the steps to be undone, got {input.dtype}")
    _check_that_parameters_are_whole(steps)
    sources = dict.fromkeys(source for one in steps for source in one.sources())
    return _Cascade.apply(steps, input, *sources)


def _check_that_parameters_are_whole(steps: Sequence[_Step]) -> None:
    """Refuses steps that compute with other parameters than they have, which would get no gradient."""
    for one in steps:
        for name, parameter in one.module.named_parameters():
            if hasattr(parameter, "device_mesh"):  # a DTensor
                raise TypeError(
                    "parameters must be unsharded when steps run: apply fully_shard to the module that holds them, "
                    f"got a {type(parameter).__name__} for {name} of {type(one.module).__name__}"
                )


class _Step(NamedTuple):
    """A bijection in the direction in which the cascade runs."""

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
        """Returns what gets gradients besides the input."""
        tensors = (*tree_leaves(self.context), *self.module.parameters())
        return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]


class _Cascade(torch.autograd.Function):
    """All steps as one function."""

    @staticmethod
    def forward(ctx: Any, steps: Sequence[_Step], input: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        device_type = input.device.type
        ctx.autocast = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
            # On older torch it keeps casts of weights that are not recorded, and uses them where gradients are needed.
            "cache_enabled": False,
        }
        random_state, buffers = _random_state(input), _buffers(steps)
        ctx.sources = sources
        length = max(1, math.ceil(len(steps) / _KEPT_INPUTS))
        ctx.segments = [steps[start : start + length] for start in range(0, len(steps), length)]
        kept, total = [input], input.new_zeros(input.shape[0])
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
        ctx.save_for_backward(*kept, *sources)  # the sources, so autograd notices if they have changed since
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
    """Returns the input of each step, computed from that of the first."""
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

    `inputs` are those of the first of the steps, the inverses give the others; `output` is that of the last step.
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
        # A log-determinant may depend on nothing.
        roots, weights = zip(*(pair for pair in weighted if pair[0].requires_grad), strict=True)
        sources = one.sources()
        gradient, *found = torch.autograd.grad(roots, [leaf, *sources], weights, allow_unused=True)
        _add(total, {source: value for source, value in zip(sources, found, strict=True) if value is not None})
        output = input
    return {**total, inputs[0]: gradient}, True


def _is_close(restored: Tensor, expected: Tensor, autocast: dict[str, Any]) -> bool:
    """Returns whether at least two thirds of the arithmetic's digits are right in each sample."""
    resolution = torch.finfo(autocast["dtype"] if autocast["enabled"] else expected.dtype).eps
    if expected.is_cuda and expected.dtype == torch.float32:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        if "tf32" in (convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision):
            resolution = max(resolution, 2**-10)
    error, scale = (tensor.abs().flatten(1).amax(1) for tensor in (restored - expected, expected))
    return bool((error <= resolution ** (2 / 3) * scale).all())


def _run(input: Tensor, steps: Sequence[_Step], keep_dtype: bool = False) -> tuple[Tensor, Tensor]:
    output, total = input, input.new_zeros(input.shape[0])
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
    """Returns what changes when random numbers are drawn."""
    return [torch.get_rng_state(), *get_device_states(input)[1]]


def _buffers(steps: Sequence[_Step]) -> dict[str, tuple[Tensor, int]]:
    """Returns all buffers of the steps with their versions, which change at every write: no wait for a device."""
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
    """Puts buffers back on an error, and the parameters that ActNorm sets together with its buffer.

    Only the first call copies: what changes at every call shows then.
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
            table[name] = tensor  # some replace the buffer, some the data of the parameter
            if not torch.equal(tensor.to(copy.device), copy):
                tensor.copy_(copy)
        raise
    _settled.update((part, part.training) for part in unknown)


def _check_that_buffers_stay(input: Tensor, steps: Sequence[_Step]) -> None:
    """Runs steps again, as the backward pass will do, after a run that has changed buffers.

    Initialising by the first batch, as ActNorm does, changes nothing the second time.
    """
    before = _buffers(steps)
    _run(input, steps)
    changed = _changed(before, _buffers(steps))
    if changed:
        raise RuntimeError(
            "steps must not change buffers at every call, as BatchNorm and spectral_norm do in training mode: the "
            f"backward pass recomputes them; got changes of {'; '.join(changed)}"
        )
