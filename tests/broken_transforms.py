"""A catalogue of broken transforms, each of which `nflows_kconv.testing` must catch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import FrEIA.modules
import nflows.transforms
import normflows
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints, transforms

from nflows_kconv import functional, testing

INVERTIBLE = "assert_invertible"
CANCEL = "assert_log_dets_cancel"
JACOBIAN = "assert_log_abs_det_matches_jacobian"
GRADIENTS = "assert_gradients_match_finite_differences"
BATCH = "assert_batch_independent"
SHAPE = "assert_shape_and_dtype_preserved"
STATE = "assert_state_dict_round_trip"
DETERMINISTIC = "assert_deterministic"
HOOKS = "assert_hooks_run"
# No single assertion: only a change of the parameters reveals the fault.
CHECK = "check_transform"


@dataclass(frozen=True)
class Broken:
    """A transform with one fault, inputs that reveal it, and the assertion that must fail."""

    fault: str
    caught_by: str
    build: Callable[[], Any]
    inputs: Tensor
    context: Tensor | None

    def is_caught(self, by: str = CHECK) -> bool:
        """Returns whether an assertion fails as it should."""
        torch.manual_seed(0)
        try:
            getattr(testing, by)(self.build(), self.inputs, context=self.context)
        except AssertionError:
            return True
        return False


CATALOGUE: list[Broken] = []


def broken(fault: str, caught_by: str, *shape: int, dtype: torch.dtype = torch.float32, context: bool = False) -> Any:
    """Adds the builder of a broken transform to the catalogue, with inputs of this shape."""

    def register(build: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(shape or getattr(build, "shape", (3, 3)), generator=generator).to(dtype)
        CATALOGUE.append(
            Broken(fault, caught_by, build, inputs, torch.randn(len(inputs), generator=generator) if context else None)
        )
        return build

    return register


def alter(base: type, part: str, fault: str, caught_by: str, function: Callable[..., Any]) -> None:
    """Adds to the catalogue a class whose method `part` is a function of self, the base's method, and arguments."""

    def method(self: Any, *arguments: Any) -> Any:
        return function(self, partial(getattr(base, part), self), *arguments)

    broken(fault, caught_by)(type(base.__name__, (base,), {part: method}))


class Parts(nn.Module):
    """A transform in three parts, which can be broken one by one; it preserves volume unless a subclass says more."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.map(x), self.log_abs_det(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.solve(y), -self.log_abs_det(y)

    def map(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def solve(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def log_abs_det(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x))


class Layer(Parts):
    """A sound layer to break: one k x k convolution over four channels."""

    shape, corner = (2, 4, 4, 3), "BR"

    def __init__(self) -> None:
        super().__init__()
        weight = 0.2 * torch.randn(4, 4, 2, 3, generator=torch.Generator().manual_seed(1))
        pivot = torch.eye(4) * torch.tensor([1.2, -0.7, 1.5, 0.8]) + weight[:, :, 0, 0].tril(-1)
        weight[:, :, 0, 0] = pivot
        self.raw_weight = nn.Parameter(weight)

    def weight(self) -> Tensor:
        return self.raw_weight

    def map(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight(), corners=self.corner)

    def solve(self, y: Tensor) -> Tensor:
        return functional.conv2d_inverse(y, self.weight(), corners=self.corner)

    def log_abs_det(self, x: Tensor) -> Tensor:
        return functional.log_abs_det(self.weight(), corners=self.corner, size=x.shape[2:]).repeat(len(x))


class Elementwise(Parts):
    """A sound transform to break: y = exp(log_scale) x + shift for each of three features."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.shift = nn.Parameter(torch.tensor([1.0, 2.0, -3.0]))

    def map(self, x: Tensor) -> Tensor:
        return self.log_scale.exp() * x + self.shift

    def solve(self, y: Tensor) -> Tensor:
        return (y - self.shift) * (-self.log_scale).exp()

    def log_abs_det(self, x: Tensor) -> Tensor:
        return self.log_scale.sum().repeat(len(x))


# Log-determinants


@broken("log-det of absolute values forgotten", JACOBIAN)
class WithoutAbs(Layer):
    def log_abs_det(self, x):
        diagonal = self.weight()[:, :, 0, 0].diagonal()
        return (x[0, 0].numel() * diagonal.log().sum()).repeat(len(x))


@broken("log-det frozen at construction", CHECK)
class Frozen(Elementwise):
    def __init__(self):
        super().__init__()
        self.register_buffer("at_first", self.log_scale.detach().sum())

    def log_abs_det(self, x):
        return self.at_first.repeat(len(x))


@broken("log-det overflows in float16", CANCEL, 2, 3, 150, 160, dtype=torch.float16)
class Overflow(Parts):
    def map(self, x):
        return x * 4

    def solve(self, y):
        return y / 4

    def log_abs_det(self, x):
        return x.new_full(x.shape, 4).log().sum((1, 2, 3))


# Inverses


@broken("inverse ignores the other channels", INVERTIBLE)
class OwnChannel(Layer):
    def solve(self, y):
        return functional.conv2d_inverse(y, self.weight() * torch.eye(4).to(y)[:, :, None, None], corners=self.corner)


@broken("inverse by too few iterations", INVERTIBLE)
class Iterated(Layer):
    def solve(self, y):
        scale = self.weight()[:, :, 0, 0].diagonal()[:, None, None]
        x = y / scale
        for _ in range(6):
            x = x + (y - functional.conv2d(x, self.weight(), corners=self.corner)) / scale
        return x


@broken("inverse wrong at H > W only", INVERTIBLE)
class WrongIfTall(Layer):
    def solve(self, y):
        x, (height, width) = super().solve(y), y.shape[2:]
        return torch.cat([x[:, :, :width], 0 * x[:, :, width:]], 2) if height > width else x


@broken("inverse wrong at odd sizes only", INVERTIBLE, 2, 4, 3, 5)
class WrongIfOdd(Layer):
    def solve(self, y):
        x = super().solve(y)
        return x if y.shape[3] % 2 == 0 else torch.cat([x[..., :-1], y[..., -1:]], 3)


@broken("inverse in float32 scattered by low-precision kernels", INVERTIBLE)
class LowPrecision(Elementwise):
    def solve(self, y):
        x = super().solve(y)
        return x.bfloat16().to(y.dtype) if y.dtype == torch.float32 else x


@broken("inverse permutation is the permutation", INVERTIBLE)
class Permuted(Parts):
    def map(self, x):
        return x[:, [1, 2, 0]]

    solve = map


@broken("squeeze and its inverse order channels differently", INVERTIBLE, 2, 1, 4, 4)
class Squeeze(Parts):
    def map(self, x):
        return F.pixel_unshuffle(x, 2)

    def solve(self, y):
        return F.pixel_shuffle(y[:, [0, 2, 1, 3]], 2)


@broken("not injective, though det J keeps its sign: no inverse", JACOBIAN, 3, 2)
class ComplexSquare(Parts):
    def map(self, x):
        real, imaginary = x.unbind(1)
        return torch.stack([real**2 - imaginary**2, 2 * real * imaginary], 1)

    def log_abs_det(self, x):
        return (4 * x.square().sum(1)).log()


# So many entries that only det J reveals it: no search looks for other points with the same outputs.
@broken("not injective, and without inverse", JACOBIAN, 3, 300)
class Folded(Parts):
    def map(self, x):
        return x + 2 * x.sin()

    def log_abs_det(self, x):
        return (1 + 2 * x.cos()).abs().log().sum(1)


@broken("inverse right only by the library's cache", INVERTIBLE)
class ByCache(transforms.Transform):
    domain = codomain = constraints.real
    bijective = True

    def __init__(self):
        super().__init__(cache_size=1)

    def _call(self, x):
        return x.exp()

    def _inverse(self, y):
        return y.log1p()

    def log_abs_det_jacobian(self, x, y):
        return x


@broken("inverse without the context", INVERTIBLE, context=True)
class WithoutContext(nflows.transforms.Transform):
    def forward(self, inputs, context=None):
        return inputs + context[:, None], inputs.new_zeros(len(inputs))

    def inverse(self, inputs, context=None):
        return inputs, inputs.new_zeros(len(inputs))


@broken("coupling conditioned on what it has changed", INVERTIBLE, 3, 4)
class OnChanged(nflows.transforms.AffineCouplingTransform):
    def __init__(self):
        super().__init__([0, 1, 0, 1], lambda inputs, outputs: Net(inputs, outputs))

    def forward(self, inputs, context=None):
        outputs, log_abs_det = super().forward(inputs, context)
        return outputs + 0.1 * outputs.flip(1), log_abs_det


class Net(nn.Module):
    """A network for couplings of nflows."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, inputs, context=None):
        return self.linear(inputs).tanh()


# Gradients


class Solve(torch.autograd.Function):
    """The layer's inverse, with one of the faults of published code in its gradients."""

    @staticmethod
    def forward(ctx, y, weight, fault):
        ctx.save_for_backward(y, weight)
        ctx.fault = fault
        return functional.conv2d_inverse(y, weight, corners="BR")

    @staticmethod
    def backward(ctx, grad):
        y, weight = (tensor.detach() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            y.requires_grad_()
            x = functional.conv2d_inverse(y, weight, corners="BR")
            grad_y = torch.autograd.grad(x, y, grad)[0]
            weight.requires_grad_()
            convolved = functional.conv2d((y if ctx.fault == "y for x" else x).detach(), weight, corners="BR")
            grad_weight = -torch.autograd.grad(convolved, weight, grad_y)[0]
        if ctx.fault == "not transposed":
            grad_y = functional.conv2d_inverse(grad, weight.detach(), corners="BR")
        return grad_y, grad_weight, None


@broken("gradients clipped inside the transform", GRADIENTS)
class Clipped(Layer):
    def weight(self):
        weight = self.raw_weight * 1
        if weight.requires_grad:
            weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        return weight


# Batches, shapes, dtypes


@broken("normalised by the statistics of the batch", BATCH, 4, 3)
class BatchStatistics(Elementwise):
    def map(self, x):
        self.mean = x.mean(0)
        return super().map(x - self.mean)

    def solve(self, y):
        return super().solve(y) + self.mean


@broken("results at batch > 2 left at zero", BATCH, 4, 4, 3, 3)
class LaunchLimit(Layer):
    def map(self, x):
        return torch.cat([super().map(x[:2]), 0 * x[2:]])


@broken("drops an entry", SHAPE, 3, 4)
class Drops(Parts):
    def map(self, x):
        return x[:, 1:]

    def solve(self, y):
        return F.pad(y, (1, 0))


# State


@broken("weight cached for ever", STATE)
class Cached(Layer):
    cache = None

    def weight(self):
        if self.cache is None:
            self.cache = super().weight() * 1
        return self.cache


@broken("inverse cached for ever", STATE)
class CachedInverse(Elementwise):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def solve(self, y):
        if "scale" not in self.cache:
            self.cache["scale"] = self.log_scale.neg().exp()
        return (y - self.shift) * self.cache["scale"]


@broken("cache that loading a state_dict leaves stale", STATE)
class CachedByVersion(Elementwise):
    cache = None

    def load_state_dict(self, state_dict, *args):
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.data = state_dict[name].clone()  # does not change the version

    def solve(self, y):
        if self.cache is None or self.cache[0] != self.log_scale._version:
            self.cache = self.log_scale._version, self.log_scale.neg().exp()
        return (y - self.shift) * self.cache[1]


@broken("buffer forgotten: a plain tensor", STATE)
class PlainTensor(Elementwise):
    def __init__(self):
        super().__init__()
        self.offset = torch.randn(3)

    def map(self, x):
        return super().map(x + self.offset)

    def solve(self, y):
        return super().solve(y) - self.offset


class Ordered(Parts):
    """A permutation by `order`, which its subclasses lose."""

    def map(self, x):
        return x[:, self.order]

    def solve(self, y):
        return y[:, self.order.argsort()]


@broken("buffer forgotten: not persistent", STATE, 3, 4)
class NotPersistent(Ordered):
    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.randperm(4), persistent=False)


@broken("buffers forgotten: a list of tensors", STATE, 3, 4)
class ListOfTensors(Ordered):
    order = property(lambda self: self.orders[0])

    def __init__(self):
        super().__init__()
        self.orders = [torch.randperm(4)]


@broken("parts in a list of Python, which the state_dict leaves out", STATE)
class ListOfParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = [Elementwise(), Elementwise()]

    def forward(self, x):
        x, first = self.parts[0](x)
        x, second = self.parts[1](x)
        return x, first + second

    def inverse(self, y):
        y, first = self.parts[1].inverse(y)
        y, second = self.parts[0].inverse(y)
        return y, first + second


@broken("zero parameters in a list of Python, which the state_dict leaves out", STATE)
class ListOfParameters(Parts):
    def __init__(self):
        super().__init__()
        self.shifts = [nn.Parameter(torch.zeros(3))]

    def map(self, x):
        return x + self.shifts[0]

    def solve(self, y):
        return y - self.shifts[0]


@broken("a number of Python, learned from the first batch", STATE, 4, 3)
class NumberOfPython(Parts):
    scale = None

    def map(self, x):
        if self.scale is None:
            self.scale = x.abs().max().item()
        return x * self.scale

    def solve(self, y):
        return y / self.scale

    def log_abs_det(self, x):
        return x.new_full([len(x)], x.shape[1] * math.log(self.scale))


@broken("initialisation from data forgotten on loading", STATE, 4, 3)
class ForgetsInitialisation(Elementwise):
    initialized = False

    def map(self, x):
        if not self.initialized:
            self.shift.data = -x.mean(0)
            self.initialized = True
        return super().map(x)


@broken("a Python flag next to a buffer: copies in place are not followed", STATE, 4, 3)
class FlagBesideBuffer(Elementwise):
    done = False

    def __init__(self):
        super().__init__()
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x):
        if not self.done:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
                self.initialized.fill_(True)
            self.done = True
        return super().forward(x)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.done = bool(self.initialized)


@broken("mask in a buffer that is not persistent, and that no load rebuilds", STATE)
class MaskNotPersistent(Parts):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([1.0, 2.0, -3.0]))
        self.register_buffer("mask", torch.tensor([1, 0, 1]), persistent=False)

    def map(self, x):
        return x + self.mask * self.shift

    def solve(self, y):
        return y - self.mask * self.shift


@broken("FrEIA's ActNorm, whose copies forget on loading that they are initialised", STATE, 4, 3)
def act_norm_of_freia():
    return FrEIA.modules.ActNorm([(3,)])


@broken("state_dict that only an unsafe load takes", STATE)
class UnsafeToLoad(Elementwise):
    def get_extra_state(self):
        return {"class": Net}

    def set_extra_state(self, state):
        pass


# Hooks


class Shifted(Parts):
    """A sound transform to break: adds a network of the first half to the second."""

    shape = (3, 4)

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 2)

    def network_of(self, x):
        return self.network(x)

    def map(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([a, b + self.network(a)], 1)

    def solve(self, y):
        a, b = y.chunk(2, 1)
        return torch.cat([a, b - self.network_of(a)], 1)


@broken("container goes around the hooks of its parts", HOOKS, 3, 4)
class AroundParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([Shifted(), Shifted()])

    def forward(self, x):
        for part in self.parts:
            x, log_abs_det = part.forward(x)
        return x, log_abs_det

    def inverse(self, y):
        for part in reversed(self.parts):
            y, log_abs_det = part.inverse(y)
        return y, log_abs_det


# Hidden dependences and side effects


@broken("damages its input in place", DETERMINISTIC)
class InPlace(Elementwise):
    def map(self, x):
        y = super().map(x)
        x.zero_()
        return y


@broken("normflows' Shift, which shifts its input in place", DETERMINISTIC)
def shift():
    return normflows.transforms.Shift()


@broken("seeds the global random numbers", DETERMINISTIC)
class Seeds(Elementwise):
    def map(self, x):
        torch.manual_seed(1234)
        return super().map(x)


@broken("differs from call to call", DETERMINISTIC)
class Counts(Elementwise):
    calls = 0

    def map(self, x):
        self.calls += 1
        return super().map(x) * (1 + 1e-3 * self.calls)


@broken("differs without gradients", DETERMINISTIC)
class InferenceOnly(Elementwise):
    def solve(self, y):
        x = super().solve(y)
        return x if torch.is_grad_enabled() else x.round(decimals=2)


@broken("reads channels_last memory as if it were contiguous", DETERMINISTIC)
class MemoryFormat(Layer):
    def solve(self, y):
        return super().solve(y if y.stride(1) != 1 else y.as_strided(y.shape, y[0].contiguous()[None].stride()))


# Conventions of the libraries


@broken("normflows: both log-dets of the same direction", CANCEL)
class SameDirection(normflows.flows.Flow):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, z):
        return z * self.log_scale.exp(), self.log_scale.sum().expand(len(z))

    def inverse(self, x):
        return x / self.log_scale.exp(), self.log_scale.sum().expand(len(x))


@broken("normflows: one log-det for all samples, summed over them", SHAPE)
class SummedOverSamples(normflows.flows.Flow):
    def forward(self, z):
        return z.sinh(), z.cosh().log().sum()

    def inverse(self, x):
        z = x.asinh()
        return z, -z.cosh().log().sum()


@broken("nflows: log-det forgets the scales of a coupling", JACOBIAN, 3, 4)
class ForgetsScales(nflows.transforms.AffineCouplingTransform):
    def __init__(self):
        super().__init__([0, 1, 0, 1], Net)

    def _coupling_transform_forward(self, inputs, transform_params):
        outputs, log_abs_det = super()._coupling_transform_forward(inputs, transform_params)
        return outputs, 0 * log_abs_det

    def _coupling_transform_inverse(self, inputs, transform_params):
        outputs, log_abs_det = super()._coupling_transform_inverse(inputs, transform_params)
        return outputs, 0 * log_abs_det


# Faults of one part of a transform

OWN = random.Random(0)
# The base, the part, and the assertion that must fail; then functions of self, the base's own method, and x or y.
PARTS: dict[tuple[type, str, str], dict[str, Callable[..., Any]]] = {
    (Layer, "log_abs_det", JACOBIAN): {
        "log-det off by a constant": lambda self, right, x: right(x) + 0.01,
        "log-det of the wrong sign": lambda self, right, x: -right(x),
        "log-det without the factor H W": lambda self, right, x: right(x) / x[0, 0].numel(),
        "log-det with H in place of H W": lambda self, right, x: right(x) / x.shape[3],
        "log-det summed over the batch too": lambda self, right, x: right(x) * len(x),
    },
    (Layer, "inverse", CANCEL): {
        "log-det of the inverse not negated": lambda self, right, y: (self.solve(y), self.log_abs_det(y)),
        "log-det of the inverse left at zero": lambda self, right, y: (self.solve(y), y.new_zeros(len(y))),
    },
    (Elementwise, "log_abs_det", JACOBIAN): {
        "log-det averaged in place of summed": lambda self, right, x: self.log_scale.mean().repeat(len(x)),
    },
    (Elementwise, "log_abs_det", SHAPE): {
        "a scalar log-det": lambda self, right, x: self.log_scale.sum(),
        "log-det of shape [B, 1]": lambda self, right, x: right(x)[:, None],
        "log-det of shape [1]": lambda self, right, x: self.log_scale.sum()[None],
    },
    (Layer, "solve", INVERTIBLE): {
        "inverse wrong at batch > 1 only": lambda self, right, y: torch.cat([right(y)[:1], y[1:]]),
        "inverse ignores the corner": lambda self, right, y: functional.conv2d_inverse(y, self.weight(), corners="TL"),
        "inverse transposed the wrong way": lambda self, right, y: functional.conv2d_inverse(
            y, self.weight().transpose(0, 1), corners="BR"
        ),
    },
    (Elementwise, "solve", INVERTIBLE): {
        "inverse divides by the scale plus a small number": lambda self, right, y: (
            (y - self.shift) / (self.log_scale.exp() + 1e-4)
        ),
        "inverse computed in float16": lambda self, right, y: right(y).half().to(y.dtype),
    },
    (Elementwise, "map", INVERTIBLE): {
        "not injective: clamped": lambda self, right, x: right(x).clamp(-5, 2),
    },
    (Elementwise, "map", JACOBIAN): {
        "not injective: a constant channel": lambda self, right, x: right(x) * torch.tensor([1, 1, 0]),
    },
    (Layer, "solve", GRADIENTS): {
        "weight gradient of the inverse at its argument, not at its result": lambda self, right, y: Solve.apply(
            y, self.weight(), "y for x"
        ),
        "gradient of the inverse by A^-1, not A^-T": lambda self, right, y: Solve.apply(
            y, self.weight(), "not transposed"
        ),
        "inverse detached from its argument": lambda self, right, y: right(y.detach()),
    },
    (Layer, "inverse", GRADIENTS): {
        "inverse without gradients": lambda self, right, y: torch.no_grad()(right)(y),
    },
    (Layer, "log_abs_det", GRADIENTS): {
        "log-det detached from the parameters": lambda self, right, x: right(x).detach(),
    },
    (Parts, "map", BATCH): {
        "samples see their neighbours in the batch": lambda self, right, x: x + 0.1 * x.roll(1, 0).sin(),
    },
    (Layer, "solve", SHAPE): {
        "inverse returns flattened images": lambda self, right, y: right(y).flatten(1),
    },
    (Elementwise, "map", SHAPE): {
        "results promoted to float64": lambda self, right, x: right(x.double()),
    },
    (Elementwise, "forward", SHAPE): {
        "returns no log-det": lambda self, right, x: right(x)[0],
    },
    (Layer, "map", CHECK): {
        "mask kept by zeros in the parameters, which weight decay and steps change": lambda self, right, x: F.conv2d(
            F.pad(x, (0, 2, 0, 1)), self.weight()
        ),
    },
    (Elementwise, "load_state_dict", STATE): {
        "parameter left out when the state_dict is loaded": lambda self, right, state: right(
            state | {"shift": self.shift}
        ),
    },
    (Shifted, "network_of", HOOKS): {
        "inverse goes around the hooks of a network": lambda self, right, x: self.network.forward(x),
    },
    (Elementwise, "map", DETERMINISTIC): {
        "adds noise": lambda self, right, x: right(x) + 1e-3 * torch.randn_like(x),
        "adds noise from a generator of its own": lambda self, right, x: right(x) * (1 + 1e-3 * OWN.random()),
        "draws random numbers to no purpose": lambda self, right, x: right(x + 0 * torch.rand(1)),
        "reads memory with gaps as if it were contiguous": lambda self, right, x: right(
            x.as_strided(x.shape, (x.shape[1], 1))
        ),
    },
    (transforms.ExpTransform, "log_abs_det_jacobian", JACOBIAN): {
        "torch: log-det of the inverse": lambda self, right, x, y: -x,
    },
    (transforms.ExpTransform, "log_abs_det_jacobian", SHAPE): {
        "torch: log-det summed although there is no event": lambda self, right, x, y: x.sum(-1),
    },
}
for (base, part, caught_by), faults in PARTS.items():
    for fault, function in faults.items():
        alter(base, part, fault, caught_by, function)
