"""Sampling: images equal the flow's own, with fresh noise and current weights, with or without a graph."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import bijection
from nflows_kconv.flows import sampling
from nflows_kconv.flows.sampling import GraphSampler, inverse_weights
from nflows_kconv.flows.steps import InvertibleConv1x1

SHAPE = (1, 8, 8)


class Recording(TorchDispatchMode):
    """A CUDA graph on the CPU: replays torch's calls on the same memory without their Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        for function, args, kwargs, output in self.calls:
            for old, new in zip(tree_leaves(output), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Captures:
    """Replaces `sampling._capture` and counts its calls."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, flow: bijection.Bijection, draw: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
        self.number += 1
        # Returning to training mode might read values.
        assert not any(module.training for module in flow.module.modules())
        recording = Recording()
        with torch.random.fork_rng(), recording:
            drawn = draw()
        return drawn, recording.replay


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Records on the CPU what a GPU would capture."""
    stand_in = Captures()
    monkeypatch.setattr(sampling, "_capture", stand_in)
    monkeypatch.setattr(sampling, "_GRAPH_DEVICE", "cpu")
    return stand_in


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables TF32, which would change pixels."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["run", "recorded", pytest.param("captured", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Chooses where to sample: on the CPU, on the CPU by a recording, or on a GPU by a graph."""
    if request.param == "recorded":
        request.getfixturevalue("captures")
    yield torch.device("cuda" if request.param == "captured" else "cpu")


def scrambled(flow: nn.Module) -> nn.Module:
    """Changes every parameter, because couplings start as the identity."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


def image_flow(library: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return scrambled(library.finc_flow(SHAPE, levels=2, steps=2, hidden_channels=8, **options))


def nflows_of_vectors() -> nn.Module:
    torch.manual_seed(0)
    transforms = [nflows.transforms.ReversePermutation(4), nflows.transforms.LULinear(4)]
    return scrambled(
        nflows.flows.Flow(nflows.transforms.CompositeTransform(transforms), nflows.distributions.StandardNormal([4]))
    )


def normflows_of_vectors() -> nn.Module:
    torch.manual_seed(0)
    coupling = normflows.flows.AffineCouplingBlock(normflows.nets.MLP([2, 8, 4]))
    flows = [coupling, normflows.flows.Permute(4)]
    return scrambled(normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), flows))


FLOWS = {
    "nflows images": lambda: image_flow(nflows_kconv.nflows),
    "nflows images, inverse direction": lambda: image_flow(nflows_kconv.nflows, direction="inverse"),
    "normflows images": lambda: image_flow(nflows_kconv.normflows),
    "normflows images of classes": lambda: image_flow(nflows_kconv.normflows, num_classes=3),
    "normflows vectors": normflows_of_vectors,
}
CONDITIONAL = {
    "nflows": lambda: image_flow(nflows_kconv.nflows, num_classes=3),
    "normflows": lambda: image_flow(nflows_kconv.normflows, num_classes=3),
}


def own_samples(flow: nn.Module, number: int) -> Tensor:
    with torch.no_grad():
        samples = flow.sample(number)
    return samples[0] if isinstance(samples, tuple) else samples


def assert_same_images(actual: Tensor, expected: Tensor) -> None:
    """Asserts that images are equal, except for a few pixels that rounding moves to the next of 256 values."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs()
    assert difference.max() <= 1
    assert (difference > 1e-3).double().mean() < 0.01


@pytest.mark.parametrize("name", FLOWS)
def test_the_same_seed_gives_the_images_of_the_flow(name: str, place: torch.device):
    flow = FLOWS[name]().to(place).eval()
    sampler = GraphSampler(flow, 5)
    torch.manual_seed(1)
    expected = own_samples(flow, 5)
    for _ in range(2):  # the first call captures
        torch.manual_seed(1)
        assert_same_images(sampler(), expected)


def test_flows_that_no_graph_can_capture_run_elsewhere():
    flow = nflows_of_vectors()
    torch.manual_seed(1)
    expected = own_samples(flow, 5)
    torch.manual_seed(1)
    torch.testing.assert_close(GraphSampler(flow, 5)(), expected)


def test_every_call_draws_fresh_noise(place: torch.device):
    sampler = GraphSampler(FLOWS["nflows images"]().to(place), 3)
    torch.manual_seed(1)
    first, second = sampler(), sampler()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(sampler(), first), "the first call, which captures, draws no other noise than the next"
    assert torch.equal(sampler(), second)


def test_the_temperature_is_that_of_normflows(place: torch.device):
    flow = FLOWS["normflows images of classes"]().to(place).eval()
    sampler = GraphSampler(flow, 4)
    for temperature in (1.0, 0.7, 1.0, 0.3):
        torch.manual_seed(1)
        with torch.no_grad():
            expected, _ = flow.sample(4, temperature=temperature)
        torch.manual_seed(1)
        assert_same_images(sampler(temperature=temperature), expected)


@pytest.mark.parametrize("name", [name for name in FLOWS if "classes" not in name])
def test_temperature_zero_gives_one_image(name: str, place: torch.device):
    sampler = GraphSampler(FLOWS[name]().to(place), 3)
    images = sampler(temperature=0)
    assert_same_images(images, images[:1].expand_as(images))
    assert torch.equal(sampler(temperature=0), images)


@pytest.mark.parametrize("n", [1, 3, 4, 10])
def test_any_number_of_images(n: int, place: torch.device):
    images = GraphSampler(FLOWS["nflows images"]().to(place), 4)(n)
    assert images.shape == (n, *SHAPE)
    assert len(images.flatten(1).unique(dim=0)) == n


@pytest.mark.parametrize("library", CONDITIONAL)
def test_images_of_classes(library: str, place: torch.device):
    """At temperature 0 an image is the flow's own sample of its class at scale 0."""
    flow = CONDITIONAL[library]().to(place)
    sampler = GraphSampler(flow, 4)
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    images = sampler(labels=labels, temperature=0)
    assert images.shape == (6, *SHAPE)
    classes = torch.stack([images[1], images[2], images[0]])
    assert len(classes.flatten(1).unique(dim=0)) == 3
    assert_same_images(images, classes[labels])
    assert_same_images(sampler(labels=labels.flip(0), temperature=0), classes[labels.flip(0)])
    assert_same_images(GraphSampler(flow, 4)(1, labels=labels[:1], temperature=0), classes[labels[:1]])


@pytest.mark.parametrize("library", CONDITIONAL)
def test_classes_are_given_to_the_library_as_it_expects(library: str, place: torch.device):
    flow = CONDITIONAL[library]().to(place).eval()
    labels = torch.tensor([2, 0, 1], device=place)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = flow.sample(3, y=labels)[0] if library == "normflows" else flow.sample(1, labels)[:, 0]
    torch.manual_seed(1)
    assert_same_images(GraphSampler(flow, 3)(labels=labels), expected)


@pytest.mark.parametrize("library", [nflows_kconv.nflows, nflows_kconv.normflows], ids=["nflows", "normflows"])
@pytest.mark.parametrize("conditional_kernels", [False, True])
def test_classes_with_a_context(library: Any, conditional_kernels: bool, place: torch.device):
    flow = image_flow(library, num_classes=3, context_shape=(2,), conditional_kernels=conditional_kernels).to(place)
    sampler = GraphSampler(flow, 2)
    labels = torch.tensor([2, 0, 2]), torch.tensor([[0.0, 1], [2, 3], [4, 5]])
    images = sampler(labels=labels, temperature=0)
    assert len(images.flatten(1).unique(dim=0)) == 3
    assert_same_images(sampler(labels=tuple(part.flip(0) for part in labels), temperature=0), images.flip(0))


def test_one_hot_and_no_labels_follow_each_other(place: torch.device):
    sampler = GraphSampler(CONDITIONAL["normflows"]().to(place), 3)
    labels = torch.tensor([2, 0, 1])
    images = sampler(labels=labels, temperature=0)
    assert len(sampler()) == 3
    one_hot = nn.functional.one_hot(labels, 3).float()
    assert_same_images(sampler(labels=one_hot, temperature=0), images)


@pytest.mark.parametrize("name", FLOWS)
def test_weights_may_change_between_calls(name: str, place: torch.device):
    flow = FLOWS[name]().to(place).eval()
    sampler = GraphSampler(flow, 3)
    sampler()
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.05)
    for parameter in flow.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert_current(sampler, flow)
    for parameter in flow.parameters():
        parameter.data.mul_(1.05)  # not counted as a new version
    assert_current(sampler, flow)
    flow.load_state_dict(scrambled(copy.deepcopy(flow)).state_dict())
    assert_current(sampler, flow)


def assert_current(sampler: GraphSampler, flow: nn.Module) -> None:
    torch.manual_seed(1)
    images = sampler()  # before the flow itself runs, which recomputes pruned weights
    torch.manual_seed(1)
    assert_same_images(images, own_samples(flow, 3))


def test_weights_that_change_in_place_are_not_captured_again(captures: Captures):
    flow = FLOWS["nflows images"]().eval()
    sampler = GraphSampler(flow, 3)
    for number in (1, 3, 7):
        scrambled(flow)
        sampler(number, temperature=number / 7)
    assert captures.number == 1


def replaced(flow: nn.Module) -> None:
    flow.load_state_dict(scrambled(copy.deepcopy(flow)).state_dict(), assign=True)


def assigned(flow: nn.Module) -> None:
    parameter = next(flow.parameters())
    parameter.data = parameter.data + 0.1


def reparametrized(flow: nn.Module) -> None:
    convolution = next(module for module in flow.modules() if isinstance(module, nn.Conv2d))
    nn.utils.parametrizations.weight_norm(convolution)


@pytest.mark.parametrize("move", [replaced, assigned, reparametrized, lambda flow: flow.double().float()])
def test_weights_that_have_moved_are_captured_again(move: Callable[[nn.Module], Any], captures: Captures):
    flow = FLOWS["nflows images"]().eval()
    sampler = GraphSampler(flow, 3)
    sampler()
    move(flow)
    assert_current(sampler, flow)
    assert captures.number == 2


def test_another_autocast_is_captured_again(captures: Captures, monkeypatch: pytest.MonkeyPatch):
    sampler = GraphSampler(FLOWS["nflows images"](), 3)
    sampler()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    sampler()
    assert captures.number == 2


def test_the_flow_is_as_it_was(place: torch.device):
    flow = FLOWS["nflows images"]().to(place)
    flow.train()
    next(flow.children()).eval()
    modes = {name: module.training for name, module in flow.named_modules()}
    attributes = {name: set(vars(module)) for name, module in flow.named_modules()}
    state = copy.deepcopy(flow.state_dict())
    images = GraphSampler(flow, 3)()
    assert not images.requires_grad
    assert {name: module.training for name, module in flow.named_modules()} == modes
    assert {name: set(vars(module)) for name, module in flow.named_modules()} == attributes
    assert all(torch.equal(state[name], value) for name, value in flow.state_dict().items())


def test_the_flow_samples_in_evaluation_mode_and_keeps_its_modes_when_it_fails():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = InvertibleConv1x1(2)

        def sample(self, number: int) -> Tensor:
            assert not self.part.training
            raise ArithmeticError("no samples today")

    flow = Failing()
    with pytest.raises(ArithmeticError, match="no samples today"):
        GraphSampler(flow, 2)()
    assert flow.training
    assert flow.part.training
    assert "inverse_weight" not in vars(flow.part)


def test_what_layers_cached_in_evaluation_mode_is_dropped():
    """nflows' linear layers keep their inverse until `train()` is called."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.cache: Tensor | None = None

        def train(self, mode: bool = True) -> Caching:
            if mode:
                self.cache = None
            return super().train(mode)

        def sample(self, number: int) -> Tensor:
            if self.cache is None:
                self.cache = self.weight.clone()
            return self.cache.expand(number, 1)

    flow = Caching()
    assert torch.equal(GraphSampler(flow, 2)(), torch.ones(2, 1))
    flow.weight.data.fill_(2)
    flow.eval()
    assert torch.equal(GraphSampler(flow, 2)(), torch.full((2, 1), 2.0))


class Handwritten(nn.Module):
    """A hand-written flow, conditioned on classes and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.arange(6.0).view(3, 2))

    def draw(self, count: int, classes: Tensor, vectors: Tensor) -> Tensor:
        return self.means[classes] + vectors + torch.randn(count, 2, device=self.means.device)


def test_handwritten_flows_and_labels_of_several_tensors(place: torch.device):
    bijection.register(Handwritten, sample=lambda flow, count, context: flow.draw(count, *context))
    sampler = GraphSampler(Handwritten().to(place), 2)
    classes, vectors = torch.tensor([2, 0, 1]), torch.tensor([[10.0, 20], [30, 40], [50, 60]])
    for order in ([0, 1, 2], [2, 0, 1]):
        images = sampler(labels=(classes[order], vectors[order]), temperature=0).cpu()
        assert torch.equal(images, torch.tensor([[14.0, 25], [30, 41], [52, 63]])[order])
    with pytest.raises(ValueError, match="labels must have one row for each of 3 images, got 2 rows"):
        sampler(labels=(classes, vectors[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_flow(dtype: torch.dtype, captures: Captures):
    """Some devices have no float64."""
    flow = FLOWS["nflows images"]().to(dtype)
    recording = Recording()
    with recording:
        images = GraphSampler(flow, 2)(temperature=0.7)
    assert images.dtype == dtype
    found = {leaf.dtype for call in recording.calls for leaf in tree_leaves(call) if isinstance(leaf, Tensor)}
    assert (torch.float64 in found) == (dtype == torch.float64)


def test_inference_mode_does_not_stick(place: torch.device):
    sampler = GraphSampler(CONDITIONAL["normflows"]().to(place), 2)
    with torch.inference_mode():
        images = sampler(labels=torch.tensor([0, 1]))
    assert not images.is_inference()
    assert len(sampler(labels=torch.tensor([1, 0]))) == 2


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverses_in_one_batch_are_those_of_each_layer(channels: int, dtype: torch.dtype):
    torch.manual_seed(0)
    layers = [scrambled(InvertibleConv1x1(channels)).to(dtype) for _ in range(3)]
    layers[0].lower.requires_grad_(False)
    with torch.no_grad():
        images = torch.eye(channels, dtype=dtype)[:, :, None, None]
        weights = [layer(images)[0][:, :, 0, 0].T for layer in layers]
        torch.testing.assert_close(
            inverse_weights(layers), torch.linalg.inv(torch.stack(weights)), rtol=1e-4, atol=1e-4
        )


class Doubled(nn.Module):
    """A parametrization that stores half of each entry."""

    def forward(self, half: Tensor) -> Tensor:
        return 2 * half


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.random_unstructured(layer, "lower", 0.5),
        lambda layer: parametrize.register_parametrization(layer, "upper", Doubled()),
    ],
    ids=["pruned", "parametrized"],
)
def test_inverses_in_one_batch_heed_what_users_make_of_layers(change: Callable[[nn.Module], Any], place: torch.device):
    flow = FLOWS["nflows images"]().to(place).eval()
    layers = [module for module in flow.modules() if isinstance(module, InvertibleConv1x1)]
    change(layers[1])
    scrambled(flow)
    attributes = {name: set(vars(module)) for name, module in flow.named_modules()}
    assert_current(GraphSampler(flow, 3), flow)
    assert {name: set(vars(module)) for name, module in flow.named_modules()} == attributes


def test_a_draw_solves_once_for_every_size_of_matrix():
    flow = FLOWS["nflows images"]().eval()
    recording = Recording()
    with recording:
        GraphSampler(flow, 2)()
    solved = [call for call in recording.calls if call[0] is torch.ops.aten.linalg_solve_triangular.default]
    assert len(solved) == 2 * 2  # two factors in each of two levels


def test_a_compiled_flow(place: torch.device):
    flow = FLOWS["nflows images"]().to(place).eval()
    sampler = GraphSampler(flow, 3)
    flow._transform.compile(backend="aot_eager")
    assert_current(sampler, flow)


def test_temperature_needs_normal_numbers(place: torch.device):
    class Uniform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = nn.Parameter(torch.ones(2))

        def sample(self, number: int) -> Tensor:
            return self.width * torch.rand(number, 2, device=self.width.device)

    sampler = GraphSampler(Uniform().to(place), 3)
    assert len(sampler()) == 3
    with pytest.raises(ValueError, match=r"temperature must be 1 for a flow that draws no normal numbers, got 0\.5"):
        sampler(temperature=0.5)


def test_wrong_flows():
    with pytest.raises(TypeError, match=r"flow must be a torch\.nn\.Module with a sample method, .* got Linear"):
        GraphSampler(nn.Linear(2, 2), 3)
    with pytest.raises(TypeError, match="got function"):
        GraphSampler(lambda: None, 3)


@pytest.mark.parametrize(
    ("num_samples", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_wrong_numbers(num_samples: Any, error: type[Exception]):
    flow = FLOWS["nflows images"]()
    with pytest.raises(error, match="num_samples must be"):
        GraphSampler(flow, num_samples)
    with pytest.raises(error, match="n must be"):
        GraphSampler(flow, 2)(num_samples)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"temperature": -0.1}, ValueError, r"temperature must be finite and not negative, got -0\.1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite and not negative, got nan"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"labels": [1, 2]}, TypeError, "labels must be a tensor, or a tuple of tensors, got list"),
        ({"labels": torch.tensor(1)}, ValueError, r"labels must have one row per image, got shape \(\)"),
        ({"n": 3, "labels": torch.tensor([1, 2])}, ValueError, "one row for each of 3 images, got 2 rows"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        GraphSampler(CONDITIONAL["normflows"](), 2)(**arguments)


@pytest.mark.parametrize("name", ["normflows images", "normflows vectors"])
def test_labels_for_a_flow_without_classes(name: str):
    with pytest.raises(ValueError, match=r"context must be None for a .*Flow, which is not conditional"):
        GraphSampler(FLOWS[name](), 2)(labels=torch.tensor([0, 1]))


def test_several_devices():
    flow = FLOWS["nflows images"]()
    flow._transform._transforms[1]._transforms[1].to("meta")
    with pytest.raises(
        RuntimeError, match=r"Flow must be on one device, got .*_transform.* on cpu, .*_transform.* on meta"
    ):
        GraphSampler(flow, 2)()


class CudaDouble:
    """Replaces the functions of torch that `_capture` calls and records their order; a capture fails as CUDA's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        replacements = {
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: self.log.append("replay")),
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: self.entered("stream"),
            "graph": lambda graph, stream, capture_error_mode: self.entered("capture"),
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: self.log.append(f"synchronization: {mode}"),
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: self.entered("fork"))
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: self.log.append("cache cleared"))
        monkeypatch.setattr(sampling, "_GRAPH_DEVICE", "cpu")

    @contextlib.contextmanager
    def entered(self, name: str) -> Iterator[None]:
        self.log.append(f"{name} begins")
        try:
            yield
        except Exception:
            if name == "capture":
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
            raise
        finally:
            self.log.append(f"{name} ends")


class Drawing(nn.Module):
    def __init__(self, log: list[str], failing_draw: int | None = None) -> None:
        super().__init__()
        self.log, self.failing_draw, self.draws = log, failing_draw, 0

    def sample(self, number: int) -> Tensor:
        self.draws += 1
        self.log.append("draw")
        if self.draws == self.failing_draw:
            raise ValueError("it waits")
        return torch.randn(number)


WARM_UP = ["stream begins", "fork begins", "draw", "draw", "fork ends"]
WATCHED = ["fork begins", "synchronization: error", "draw", "synchronization: 0", "fork ends"]
CAPTURED = ["cache cleared", "capture begins", "draw", "capture ends", "cache cleared"]


def test_a_capture_is_tried_before(monkeypatch: pytest.MonkeyPatch):
    cuda = CudaDouble(monkeypatch)
    GraphSampler(Drawing(cuda.log), 2)(4)
    assert cuda.log == [*WARM_UP, *WATCHED, *CAPTURED, "stream ends", "replay", "replay"]


@pytest.mark.parametrize(
    ("failing_draw", "log"),
    [(3, [*WARM_UP, *WATCHED, "stream ends"]), (4, [*WARM_UP, *WATCHED, *CAPTURED, "stream ends"])],
)
def test_what_cannot_be_captured_is_refused(failing_draw: int, log: list[str], monkeypatch: pytest.MonkeyPatch):
    cuda = CudaDouble(monkeypatch)
    flow = Drawing(cuda.log, failing_draw)
    match = r"Drawing cannot be captured in a CUDA graph: it waits; .*test_sampling\.py, line \d+: raise ValueError"
    with pytest.raises(RuntimeError, match=match):
        GraphSampler(flow, 2)()
    assert cuda.log == log
    assert flow.training


def test_what_fails_anyway_fails_as_it_does(monkeypatch: pytest.MonkeyPatch):
    cuda = CudaDouble(monkeypatch)
    with pytest.raises(ValueError, match="it waits"):
        GraphSampler(Drawing(cuda.log, 1), 2)()


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_refused_and_nothing_breaks():
    flow = normflows.NormalizingFlow(
        normflows.distributions.DiagGaussian((4, 2, 2)), [normflows.flows.GlowBlock(4, 8), normflows.flows.Squeeze()]
    )
    flow = flow.cuda()
    flow.sample(2)
    flow.to("cuda")  # because ActNorm leaves a buffer on the CPU
    with pytest.raises(
        RuntimeError, match=r"NormalizingFlow cannot be captured in a CUDA graph: .*synchronizing.*line"
    ):
        GraphSampler(flow, 2)()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(2, device="cuda").isfinite().all()
    assert len(GraphSampler(FLOWS["nflows images"]().cuda(), 2)()) == 2


def test_what_caches_its_matrices_is_refused(monkeypatch: pytest.MonkeyPatch):
    cuda = CudaDouble(monkeypatch)
    layer = nflows.transforms.NaiveLinear(4, orthogonal_initialization=False, using_cache=True)
    flow = nflows.flows.Flow(layer, nflows.distributions.StandardNormal([4]))
    with pytest.raises(
        RuntimeError, match=r"because _transform keeps using its cached matrices: call use_cache\(False\)"
    ):
        GraphSampler(flow, 2)()
    assert not cuda.log


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["around the sampler", "inside the flow"])
def test_autocast_is_captured_without_the_weights_it_caches(where: str):
    flow = FLOWS["nflows images"]().cuda().eval()
    autocast = torch.autocast("cuda", torch.bfloat16)
    if where == "inside the flow":
        flow._transform.inverse = autocast(flow._transform.inverse)
        autocast = contextlib.nullcontext()
    sampler = GraphSampler(flow, 3)

    def images() -> tuple[Tensor, Tensor]:
        with autocast:
            torch.manual_seed(1)
            first = sampler()
            torch.manual_seed(1)
            return first, own_samples(flow, 3)

    before, _ = images()
    scrambled(flow)
    after, expected = images()
    # Rounding to bfloat16 changes some pixels a lot.
    assert (after - expected).abs().mean() < 0.1 * (before - expected).abs().mean()
