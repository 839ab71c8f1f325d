"""Times sampling and training of the FInC flow and of Glow of the same size, `finc_flow` without its layer.

    python -m benchmarks.sampling                 prints the tables of the CPU, of a small model
    python -m benchmarks.sampling --device cuda   prints those of the GPU, of the CIFAR-10 model, of 44 to 46
                                                  million parameters, and writes
                                                  benchmarks/results/sampling-cuda-<GPU>.json
    --output FILE.json                            writes there

Times are medians of one call, from its start until the device is done; the contestants of a row take turns. "flow" is
the library's own `sample` in evaluation mode, without gradients; "sampler" is `GraphSampler`, which replays a CUDA
graph on a GPU. A training step is the negative log-likelihood of a batch and its gradients.

TF32 is at PyTorch's default (on in convolutions), and cuDNN chooses its fastest algorithm. Each variant changes one
thing. Its loss of exactness is the share of pixel values that differ after a round trip to latent variables and back;
for it, the last convolutions of the couplings, which start at zero, are drawn from N(0, 0.001).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import nflows_kconv.nflows
import nflows_kconv.normflows
from benchmarks import command_line, layer, timing
from benchmarks.targets import Target, counts_microseconds, describe
from nflows_kconv.flows.sampling import GraphSampler
from nflows_kconv.flows.steps import AffineCoupling, Sequence

SAMPLING = Target(1.05, aim=1.02)
SAMPLER_AGAINST_LIBRARY = Target(0.45)
ONE_IMAGE = Target(9000, "us")
TRAINING = Target(1.08, aim=1.03)


class Size(NamedTuple):
    """Size of the model and its batch."""

    image_shape: tuple[int, int, int]
    levels: int
    steps: int
    hidden_channels: int
    batch: int


SIZES = {"cpu": Size((1, 16, 16), 2, 4, 32, 16), "cuda": Size((3, 32, 32), 3, 32, 512, 100)}
TINY = Size((1, 8, 8), 2, 1, 4, 2)

LIBRARIES = {"nflows": nflows_kconv.nflows, "normflows": nflows_kconv.normflows}
UNIT = {"corners": ("TL", "TR", "BL", "BR")}
MODELS: dict[str, dict[str, Any]] = {
    "FInC": UNIT,
    "Glow": {"kernel_size": None},
    "pair of full layers": {"corners": (("TL",), ("BR",))},
    "inverse direction": UNIT | {"direction": "inverse"},
}

COMPARED = ("FInC", "Glow")


class Variant(NamedTuple):
    """Another way to run the same model.

    Attributes:
        prepare: A function that changes the flow, on its device.
        context: A context manager for its calls, on its device.
    """

    prepare: tuple[Callable[[nn.Module, str], None], ...] = ()
    context: Callable[[str], AbstractContextManager] = lambda device: nullcontext()


def channels_last(flow: nn.Module, device: str) -> None:
    """Stores weights, and so images inside couplings, with channels last."""
    flow.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def bfloat16_couplings(flow: nn.Module, device: str) -> None:
    """Runs only the coupling networks under autocast."""
    for module in flow.modules():
        if isinstance(module, AffineCoupling):
            module.network.forward = torch.autocast(device, torch.bfloat16)(module.network.forward)


def compiled(flow: nn.Module, device: str) -> None:
    """Compiles each step of the flow, in both directions."""
    for module in flow.modules():
        if type(module) is Sequence:
            module.forward, module.inverse = torch.compile(module.forward), torch.compile(module.inverse)


def bfloat16(device: str) -> AbstractContextManager:
    """Returns autocast around the whole flow."""
    return torch.autocast(device, torch.bfloat16)


def without_tf32(device: str) -> AbstractContextManager:
    """Runs convolutions in float32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)


VARIANTS = {
    "as it is": Variant(),
    "without TF32": Variant(context=without_tf32),
    "channels_last": Variant((channels_last,)),
    "bfloat16 couplings": Variant((bfloat16_couplings,)),
    "bfloat16": Variant(context=bfloat16),
    "compiled": Variant((compiled,)),
    "channels_last, bfloat16 couplings": Variant((channels_last, bfloat16_couplings)),
    "the same, compiled": Variant((channels_last, bfloat16_couplings, compiled)),
}


def prepared(model: str, variant: Variant, size: Size, device: str) -> nn.Module:
    """Returns the model of a variant in normflows."""
    flow = build("normflows", model, size, device)
    for change in variant.prepare:
        change(flow, device)
    return flow


def build(library: str, model: str, size: Size, device: str) -> nn.Module:
    """Returns the flow of a model."""
    return build_flow(library, MODELS[model], size, device)


def build_flow(library: str, options: Mapping[str, Any], size: Size, device: str) -> nn.Module:
    """Returns a flow with these options, initialised ActNorms, and couplings that are not the identity."""
    torch.manual_seed(0)
    flow = (
        LIBRARIES[library]
        .finc_flow(size.image_shape, size.levels, size.steps, hidden_channels=size.hidden_channels, **options)
        .to(device)
    )
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, AffineCoupling) and isinstance(module.network, nn.Sequential):
                module.network[-1].weight.normal_(0, 1e-3)
        flow.log_prob(images(size, device))
    return flow


def images(size: Size, device: str) -> Tensor:
    """Returns a batch of noise, [B, C, H, W], with values 0..255."""
    return torch.randint(256, (size.batch, *size.image_shape), device=device).float()


def finishing(call: Callable[[], object], device: str) -> Callable[[], None]:
    """Returns the call extended to wait until the device is done."""

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def clock(calls: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """Measures the median microseconds of each call."""
    return timing.wall({name: finishing(call, device) for name, call in calls.items()}, seconds)


def draw(flow: nn.Module, number: int) -> None:
    """Returns the library's own `sample`."""
    with torch.no_grad():
        flow.sample(number)  # type: ignore[operator]


def sampling_table(size: Size, device: str, seconds: float, device_name: str) -> Iterator[list[dict]]:
    """Measures both libraries, a batch and an image, `sample` and the sampler; yields the rows so far after each."""
    print("\nsampling\n")
    print("library    images  model                           flow       sampler")
    rows: list[dict] = []
    for library in LIBRARIES:
        flows = {model: build(library, model, size, device).eval() for model in MODELS}
        for number in (size.batch, 1):
            calls: dict[str, Callable[[], object]] = {}
            for model, flow in flows.items():
                calls[f"{model}, flow"] = partial(draw, flow, number)
                calls[f"{model}, sampler"] = GraphSampler(flow, number)
            times = clock(calls, seconds, device)
            for model in MODELS:
                own, ours = (1e-3 * times[f"{model}, {mode}"] for mode in ("flow", "sampler"))
                print(f"{library:9s} {number:7d}  {model:22s} {own:10.2f} ms {ours:10.2f} ms", flush=True)
            records = judge_sampling(times, number, size, device_name)
            print_records(records)
            rows.append({"library": library, "images": number, "microseconds": times, "targets": records})
            yield rows


def judge_sampling(times: dict[str, float], number: int, size: Size, device_name: str) -> list[dict]:
    """Returns the records of a row of `sampling_table`; only the large model has targets."""
    if size != SIZES["cuda"]:
        return []
    if number == 1:
        judged = ONE_IMAGE.judge("FInC, one image", "sampler", times["FInC, sampler"])
        return [judged] if counts_microseconds(device_name) else []
    records = [
        SAMPLING.judge("FInC / Glow", mode, times[f"FInC, {mode}"] / times[f"Glow, {mode}"])
        for mode in ("flow", "sampler")
    ]
    ratio = times["FInC, sampler"] / times["Glow, flow"]
    return [*records, SAMPLER_AGAINST_LIBRARY.judge("FInC, sampler / Glow, flow", "sampler", ratio)]


def variants_table(size: Size, device: str, seconds: float) -> list[dict]:
    """Measures the gain and the loss of other ways to run the models."""
    print("\nvariants, in normflows\n")
    print(
        "variant                              images    FInC sampler  Glow sampler     ratio  pixel values lost: FInC"
    )
    rows = []
    for name, variant in VARIANTS.items():
        with variant.context(device):
            flows = {model: prepared(model, variant, size, device).eval() for model in COMPARED}
            lost = {model: values_lost(flow, images(size, device)) for model, flow in flows.items()}
            for number in (size.batch, 1):
                times = clock({model: GraphSampler(flow, number) for model, flow in flows.items()}, seconds, device)
                ours, glow = 1e-3 * times["FInC"], 1e-3 * times["Glow"]
                print(
                    f"{name:36s} {number:6d} {ours:12.2f} ms {glow:10.2f} ms {ours / glow:8.3f}x  {lost['FInC']:.1e}",
                    flush=True,
                )
                rows.append({"variant": name, "images": number, "microseconds": times, "values_lost": lost})
    return rows


@torch.no_grad()
def values_lost(flow: Any, batch: Tensor) -> float:
    """Returns the share of pixel values that a round trip changes."""
    latents, _ = flow.inverse_and_log_det(batch)
    return (flow.forward_and_log_det(latents)[0] != batch).double().mean().item()


def training_table(size: Size, device: str, seconds: float) -> Iterator[list[dict]]:
    """Measures a batch's negative log-likelihood and gradients; yields the rows so far after each."""
    print("\ntraining step, in normflows\n")
    print("variant                                  FInC           Glow     ratio  target")
    rows: list[dict] = []
    batch = images(size, device)
    for name, variant in VARIANTS.items():
        flows = {model: prepared(model, variant, size, device) for model in COMPARED}
        steps = {model: partial(train, flow, batch, variant, device) for model, flow in flows.items()}
        times = clock(steps, seconds, device)
        ratio = times["FInC"] / times["Glow"]
        records = [TRAINING.judge("FInC / Glow", name, ratio)] if size == SIZES["cuda"] else []
        verdict = describe(records[0]) if records else ""
        print(
            f"{name:36s} {1e-3 * times['FInC']:8.2f} ms {1e-3 * times['Glow']:11.2f} ms"
            f" {ratio:8.3f}x  {verdict}".rstrip(),
            flush=True,
        )
        rows.append({"variant": name, "images": size.batch, "microseconds": times, "targets": records})
        yield rows


def train(flow: Any, batch: Tensor, variant: Variant, device: str) -> None:
    """Returns one training step, without the optimiser."""
    flow.zero_grad()
    with variant.context(device):
        loss = -flow.log_prob(batch).mean()
    loss.backward()


def print_records(records: list[dict]) -> None:
    """Prints the targets and whether they were met."""
    for record in records:
        print(
            f"    {record['quantity']}, {record['mode']}: {record['value']:.3g} {record['unit']}, {describe(record)}",
            flush=True,
        )


def sections(size: Size, device: str, seconds: float, device_name: str) -> Iterator[tuple[str, Any]]:
    """Measures and prints; yields the name and the results of each section."""
    parameters = {
        model: sum(parameter.numel() for parameter in build("normflows", model, size, device).parameters())
        for model in MODELS
    }
    print("parameters: " + ", ".join(f"{model} {number}" for model, number in parameters.items()))
    yield "model", {**size._asdict(), "parameters": parameters}
    for rows in sampling_table(size, device, seconds, device_name):
        yield "sampling", rows
    for rows in training_table(size, device, seconds):
        yield "training", rows
    yield "variants", variants_table(size, device, seconds)


def main() -> None:
    """Parses the arguments and prints the tables."""
    arguments = command_line.parse(__doc__, seconds=5.0)
    torch.backends.cudnn.benchmark = True
    size = TINY if arguments.tiny else SIZES[arguments.device]
    with torch.compiler.set_stance("force_eager" if arguments.tiny else "default"):  # otherwise tiny sizes take minutes
        layer.run(arguments, lambda name: sections(size, arguments.device, arguments.seconds, name), prefix="sampling-")


if __name__ == "__main__":
    main()
