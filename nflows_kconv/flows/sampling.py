"""Draws images from a flow of either library, on a GPU by replaying a CUDA graph."""

from __future__ import annotations

import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from nflows_kconv import checks
from nflows_kconv.attributes import replaced
from nflows_kconv.bijection import Bijection
from nflows_kconv.flows.steps import InvertibleConv1x1, inverse_weight
from nflows_kconv.torch_internals import tree_leaves, tree_map_only

_GRAPH_DEVICE = "cuda"
# What the flow is conditioned on, one row per image.
Labels = Tensor | tuple[Tensor, ...]

_WARM_UP = 2  # draws before the capture, to compile kernels and let cuDNN choose algorithms


class GraphSampler:
    """Draws images from a flow as its own `sample` does, on a GPU with one CUDA graph.

    Sampling launches thousands of small kernels; launching them takes longer than running them. The first call on a GPU
    captures them in a graph, and every call replays it. On other devices each call runs the flow. Either way the
    matrices of the flow's `steps.InvertibleConv1x1` are inverted in one batch per size, except in layers with forward
    pre-hooks, such as those of pruning.

    Works for any flow that `nflows_kconv.bijection` can sample. On a GPU no layer may synchronize, to read a value or
    to copy from the CPU, because a graph cannot. Layers of nflows_kconv do not synchronize, but normflows' ActNorm and
    the 1x1 convolutions of both libraries do. An error then shows where the flow synchronizes.

    - Each call draws fresh noise from torch's default generator for the device: after `torch.manual_seed` the same
      calls return the same images, and a call for `num_samples` images returns those of the flow's `sample`.
    - Each call reads the weights and inverts the matrices, so a training step or `load_state_dict` takes effect at
      once. If parameters or buffers have moved (`.to`, `load_state_dict(assign=True)`), the kind of labels differs, or
      autocast differs, the next call captures again. Everything else, such as the flow's modules and the settings in
      `torch.backends`, stays as captured: make a new sampler after changing it.
    - The flow samples in evaluation mode, without gradients; its modes are restored afterwards.
    - Only one thread at a time may use a sampler and its flow.

    Args:
        flow: A flow with all parameters and buffers on one device.
        num_samples: Images per replay of the graph. Fewer take as long; more take several replays.

    Raises:
        TypeError: If `flow` is not a module with a `sample` method, or `num_samples` is not an integer.
        ValueError: If `num_samples` is not positive.

    Examples:
        >>> import torch
        >>> from nflows_kconv.nflows import finc_flow
        >>> from nflows_kconv.flows.sampling import GraphSampler
        >>> flow = finc_flow((3, 32, 32), levels=3, steps=2, hidden_channels=64)
        >>> sampler = GraphSampler(flow.to("cuda" if torch.cuda.is_available() else "cpu"), num_samples=10)
        >>> sampler(temperature=0.7).shape
        torch.Size([10, 3, 32, 32])
    """

    def __init__(self, flow: nn.Module, num_samples: int) -> None:
        self._flow = Bijection(flow)  # not as_bijection: it need not have a direction to the latent variable
        if not isinstance(self._flow.module, nn.Module) or not self._flow.can_sample:
            raise TypeError(
                "flow must be a torch.nn.Module with a sample method, or one that nflows_kconv.bijection can sample, "
                f"got {type(flow).__name__}"
            )
        self._num_samples = checks.positive("num_samples", num_samples)
        self._graph: _Graph | None = None

    # A later call outside inference mode could not write buffers made inside it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, n: int | None = None, *, labels: Labels | None = None, temperature: float = 1.0) -> Tensor:
        """Draws images.

        Args:
            n: How many; by default one per label, or `num_samples` without labels.
            labels: What the flow is conditioned on, [n, ...], on any device, one row per image: the `context` of its
                library, or the `y` of normflows; or a tuple of such tensors.
            temperature: A factor for each standard normal number that the flow draws with `torch.randn` or
                `torch.randn_like`. 0 returns the image of the base distribution's mean.

        Returns:
            Images, [n, C, H, W], or samples of the flow's shape.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument has a wrong value, labels are given to a flow that takes none, or the temperature
                is not 1 for a flow that draws no normal numbers.
            RuntimeError: If the flow is on several devices, or cannot be captured.
        """
        n = self._check_number(n, labels)
        checks.temperature(temperature)
        draw = self._drawer(labels)
        parts = []
        for start in range(0, n, self._num_samples):
            number = min(self._num_samples, n - start)
            rows = slice(start, start + number)
            parts.append(draw(number, tree_map_only(Tensor, lambda label: label[rows], labels), temperature))  # noqa: B023
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check_number(self, n: int | None, labels: Labels | None) -> int:
        if labels is None:
            return self._num_samples if n is None else checks.positive("n", n)
        several = labels if isinstance(labels, tuple) and labels else (labels,)
        for label in several:
            if not isinstance(label, Tensor):
                raise TypeError(f"labels must be a tensor, or a tuple of tensors, got {type(label).__name__}")
            checks.dense("labels", label)
            if label.is_meta and self._flow.device.type != "meta":
                raise ValueError("labels must have values, got a meta tensor")
            if label.dim() == 0 or len(label) == 0:
                raise ValueError(f"labels must have one row per image, got shape {tuple(label.shape)}")
            rows = len(several[0]) if n is None else checks.positive("n", n)
            if rows != len(label):
                raise ValueError(f"labels must have one row for each of {rows} images, got {len(label)} rows")
        return rows

    def _drawer(self, labels: Labels | None) -> Callable[[int, Labels | None, float], Tensor]:
        if self._graph is None or not self._graph.is_current(labels):
            self._graph = None  # frees its memory for the next graph
            device = self._flow.device
            if device.type != _GRAPH_DEVICE:
                return partial(self._draw_plainly, device)
            self._graph = _Graph(self._flow, self._num_samples, labels, device)
        return self._graph.draw

    def _draw_plainly(self, device: torch.device, number: int, labels: Labels | None, temperature: float) -> Tensor:
        labels = tree_map_only(Tensor, lambda label: label.to(device), labels)
        if temperature == 1:  # avoids intercepting each torch call, which costs about as much as a small call
            with _evaluating(self._flow.module), _inverted_together(self._flow.module):
                return self._flow.sample(number, labels)
        drawn = _sample(self._flow, number, labels, temperature)
        drawn.check_temperature(temperature)
        return drawn.images


class _Drawn(NamedTuple):
    """Images, and whether drawing them used normal numbers."""

    images: Tensor
    normal: bool

    def check_temperature(self, temperature: float) -> None:
        if temperature != 1 and not self.normal:
            raise ValueError(f"temperature must be 1 for a flow that draws no normal numbers, got {temperature}")


class _Graph:
    """A captured graph with its input tensors."""

    def __init__(self, flow: Bijection, num_samples: int, labels: Labels | None, device: torch.device) -> None:
        self._key = _key(labels)
        self._slots = [
            (table, name)
            for module in flow.module.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        # Kept alive, so an equal address means the same memory.
        self._weights = [table[name].detach() for table, name in self._slots]
        self._addresses = self._current_addresses()
        # float64 only if the flow is, because some devices lack it.
        dtypes = [weight.dtype for weight in self._weights if weight.is_floating_point()]
        dtype = reduce(torch.promote_types, dtypes, torch.float32)
        self._temperature = torch.ones((), dtype=dtype, device=device)
        # Unused rows must hold valid labels.
        self._labels = tree_map_only(
            Tensor, lambda label: label[:1].to(device).expand(num_samples, *label.shape[1:]).clone(), labels
        )
        # Outside the capture: layers may read values on returning to training mode.
        with _evaluating(flow.module):
            self._drawn, self._replay = _capture(
                flow, lambda: _sample(flow, num_samples, self._labels, self._temperature), device
            )

    def is_current(self, labels: Labels | None) -> bool:
        """Returns whether a replay would still do what the flow does."""
        return self._current_addresses() == self._addresses and _key(labels) == self._key

    def _current_addresses(self) -> list[int | None]:
        tensors = [table.get(name) for table, name in self._slots]
        return [None if tensor is None else tensor.data_ptr() for tensor in tensors]

    def draw(self, number: int, labels: Labels | None, temperature: float) -> Tensor:
        """Replays the graph and returns images."""
        self._drawn.check_temperature(temperature)
        self._temperature.fill_(temperature)
        for slot, label in zip(tree_leaves(self._labels), tree_leaves(labels), strict=True):
            if slot is not None:
                slot[:number] = label
        self._replay()
        return self._drawn.images[:number].clone()


def _key(labels: Labels | None) -> tuple[Any, ...]:
    kinds = tree_map_only(Tensor, lambda label: (label.dtype, tuple(label.shape[1:])), labels)
    return kinds, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _capture(flow: Bijection, draw: Callable[[], _Drawn], device: torch.device) -> tuple[_Drawn, Callable[[], None]]:
    """Captures a draw; returns its result and the function that replays it.

    Raises:
        RuntimeError: If the flow cannot be captured.
    """
    for name, module in flow.module.named_modules():
        reason = Bijection(module).why_not_captured
        if reason is not None:
            raise RuntimeError(
                f"{type(flow.module).__name__} cannot be captured in a CUDA graph, because {name} {reason}"
            )
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(stream):
        with torch.random.fork_rng([device]):
            for _ in range(_WARM_UP):
                draw()
        # Finds failures here, because torch's generator may be unusable after a failed capture.
        with torch.random.fork_rng([device]), _synchronization_forbidden():
            try:
                draw()
            except Exception as error:
                raise _refusal(flow, error) from error
        failure = None
        # Half-precision weights that autocast caches must neither enter nor leave the graph.
        torch.clear_autocast_cache()
        try:
            # Other threads, such as data loaders, may continue operations that a capture forbids.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                try:
                    drawn = draw()
                except Exception as error:
                    failure = error  # ending the capture may raise a less specific error
                    raise
        except Exception as error:
            raise _refusal(flow, failure or error) from failure or error
        finally:
            torch.clear_autocast_cache()
    torch.cuda.current_stream(device).wait_stream(stream)
    return drawn, graph.replay


def _refusal(flow: Bijection, error: Exception) -> RuntimeError:
    """Returns an error with the reason and the line of the flow: the innermost line outside torch."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(torch_folder)
    ]
    place = f"; {frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}"
    return RuntimeError(f"{type(flow.module).__name__} cannot be captured in a CUDA graph: {error}{place}")


@contextmanager
def _synchronization_forbidden() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode does not detect every synchronization
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _sample(flow: Bijection, number: int, labels: Labels | None, temperature: float | Tensor) -> _Drawn:
    with _evaluating(flow.module), _inverted_together(flow.module), _NormalNumbers(temperature) as noise:
        images = flow.sample(number, labels)
    return _Drawn(images, noise.drawn)


class _NormalNumbers(TorchFunctionMode):
    """Multiplies standard normal numbers by the temperature as they are drawn.

    normflows does this with a Gaussian base; nflows cannot. The temperature is a tensor, which can change between
    replays.
    """

    def __init__(self, temperature: float | Tensor) -> None:
        super().__init__()
        self.temperature = temperature
        self.drawn = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function not in (torch.randn, torch.randn_like):
            return output
        self.drawn = True
        return output * self.temperature


@contextmanager
def _evaluating(flow: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in flow.modules()}
    if not any(modes.values()):
        yield
        return
    flow.eval()
    try:
        yield
    finally:
        flow.train()  # through the method, in which layers of nflows drop their caches
        for module, training in modes.items():
            if not training:
                module.training = False


@contextmanager
def _inverted_together(flow: nn.Module) -> Iterator[None]:
    """Gives every `InvertibleConv1x1` its inverse weight, computed in one batch per size."""
    sizes = defaultdict(list)
    for module in flow.modules():
        # A hook may change a layer's weights at a call, as pruning and FSDP do.
        if isinstance(module, InvertibleConv1x1) and not module._forward_pre_hooks:
            sizes[module.lower.shape, module.lower.dtype].append(module)
    with replaced(
        (layer, "inverse_weight", lambda weight=weight: weight)
        for layers in sizes.values()
        for layer, weight in zip(layers, inverse_weights(layers), strict=True)
    ):
        yield


def inverse_weights(layers: list[InvertibleConv1x1]) -> Tensor:
    """Returns `inverse_weight` of each layer, [N, C, C], computed in one batch.

    Args:
        layers: N layers of equal size.
    """
    # Attributes, because parametrizations compute them.
    return vmap(inverse_weight)(*map(torch.stack, zip(*(layer.tensors() for layer in layers), strict=True)))
