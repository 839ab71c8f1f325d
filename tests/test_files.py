"""Files of whole flows: loading restores what was saved, or raises one error."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import nflows_kconv.nflows
import nflows_kconv.normflows

LIBRARIES = {"nflows": nflows_kconv.nflows, "normflows": nflows_kconv.normflows}
# Random parameters are nonzero where a layer ignores them.
pytestmark = pytest.mark.filterwarnings("ignore:.*nonzero entries that the layer ignores")
in_both = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES.keys())

FLOWS: dict[str, dict[str, Any]] = {
    "images": {},
    "float64, classes": dict(num_classes=3, diagonal="learned", corners=(("TL",), ("BR",))),
    "sides, dilation, bound": dict(corners=("T", "B"), dilation=(1, 2), max_inverse_gain=4, kernel_size=(2, 3)),
    "Glow of 5 bits": dict(kernel_size=None, num_levels=32),
    "circular, continuous": dict(padding_mode="circular", preprocessing=None, kernel_size=1),
    "kernels of the context": dict(context_shape=(5,), conditional_kernels=True, reversible=True, direction="inverse"),
    "volumes, classes and context": dict(data_shape=(2, 4, 4, 4), num_classes=2, context_shape=(1, 4, 4, 4)),
    "NumPy's numbers": dict(data_shape=[np.int64(3), 8], levels=np.int64(1), steps=np.int32(2)),
}

# What a process computes from only the path of a flow.
RESULTS = """
import sys
import torch
import nflows_kconv.nflows, nflows_kconv.normflows


def results(flow):
    architecture, dtype = flow.architecture, flow._parameter().dtype
    torch.manual_seed(1)
    data = torch.randint(architecture.num_levels, (3, *architecture.data_shape)).to(dtype)
    parts = []
    if architecture.num_classes is not None:
        parts.append(torch.tensor([0, 1, 0]))
    if architecture.context_shape is not None:
        parts.append(torch.randn(3, *architecture.context_shape, dtype=dtype))
    context = parts[0] if len(parts) == 1 else tuple(parts) or None
    latent, log_abs_det = flow.encode(data, context)
    log_prob = flow.log_prob(data, context=context).detach()
    return [log_prob, latent.detach(), log_abs_det.detach(), flow.decode(latent, context).detach()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for library, path in zip(sys.argv[1::2], sys.argv[2::2]):
        torch.save(results(getattr(nflows_kconv, library).load_flow(path)), path + ".pt")
"""
names: dict[str, Any] = {"__name__": "results"}
exec(RESULTS, names)
results: Callable[[nn.Module], list[Tensor]] = names["results"]


def build(library: Any, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> nn.Module:
    """Returns a flow with changed parameters whose ActNorms have seen a batch."""
    torch.manual_seed(seed)
    shape = options.pop("data_shape", (1, 8, 8))
    levels, steps = options.pop("levels", 2), options.pop("steps", 1)
    flow = library.finc_flow(shape, levels, steps, hidden_channels=4, **options).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    results(flow)
    return flow


def test_a_process_that_gets_the_path_alone_computes_the_same(tmp_path: Path):
    expected, arguments = {}, []
    for name, options in FLOWS.items():
        for library, module in LIBRARIES.items():
            path = str(tmp_path / f"{name}, {library}.safetensors")
            flow = build(module, torch.float64 if "float64" in name else torch.float32, **options)
            flow.save(path)
            expected[path] = results(flow)
            arguments += [library, path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", RESULTS, *arguments], check=True, cwd=tmp_path, env=environment)
    for path, values in expected.items():
        for actual, value in zip(torch.load(path + ".pt"), values, strict=True):
            assert actual.dtype == value.dtype
            assert torch.equal(actual, value), path


@pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_files_move_between_the_libraries(options: dict, dtype: torch.dtype, tmp_path: Path):
    """A round trip changes nothing, including random numbers and other files in the folder."""
    flow = build(nflows_kconv.nflows, **options).to(dtype)
    flow.save(tmp_path / "flow")
    drawn = torch.get_rng_state()
    other = nflows_kconv.normflows.load_flow(tmp_path / "flow")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert vars(other.architecture) == {name: _tuple(value) for name, value in vars(flow.architecture).items()}
    other.save(tmp_path / "flow")
    assert [path.name for path in tmp_path.iterdir()] == ["flow"]
    back = nflows_kconv.nflows.load_flow(tmp_path / "flow", device="cpu").state_dict()
    for name, value in flow.state_dict().items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@in_both
def test_flows_load_into_flows(library, tmp_path: Path):
    options = dict(diagonal="learned", num_classes=3)
    flow, path = build(library, **options), tmp_path / "flow"
    flow.save(path)
    other = build(library, torch.float64, seed=1, reversible=True, **options)
    other.load(path)
    for name, value in other.state_dict().items():
        assert torch.equal(value, flow.state_dict()[name].to(value.dtype)), name
    wrong = build(library, steps=2, **options)
    unchanged(wrong, lambda: wrong.load(path), r"with the same options, steps=2, got steps=1$")
    torch.save(flow.state_dict(), path)
    unchanged(
        wrong,
        lambda: wrong.load(path),
        r"got one written by torch\.save; load it with flow\.load_state_dict\(torch\.load",
    )


def unchanged(flow: nn.Module, act: Callable[[], Any], match: str, error: type[Exception] = ValueError) -> None:
    """Asserts that this raises one error and leaves the flow unchanged."""
    before = copy.deepcopy(flow.state_dict())
    with pytest.raises(error, match=match):
        act()
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def _entry(**changes: Any) -> Callable[[dict, dict], None]:
    def change(tensors: dict, entry: dict) -> None:
        entry.update(changes)

    return change


def _option(**changes: Any) -> Callable[[dict, dict], None]:
    return lambda tensors, entry: entry["options"].update(changes)


def _first(change: Callable[[Tensor], Tensor]) -> Callable[[dict, dict], None]:
    def change_first(tensors: dict, entry: dict) -> None:
        name = next(name for name in tensors if name.endswith("raw_weight"))
        tensors[name] = change(tensors[name])

    return change_first


def _missing(tensors: dict, entry: dict) -> None:
    del tensors[next(name for name in tensors if name.endswith("shift"))]


def rewrite(path: Path, change: Callable[[dict, dict], Any]) -> None:
    """Changes a file and keeps its checksum valid, as a faulty program would."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()["nflows_kconv"])
    change(tensors, entry)
    entry["checksum"] = nflows_kconv.flows.files._checksum(entry["options"], tensors)
    save_file(tensors, path, {"nflows_kconv": json.dumps(entry)})


CHANGES: dict[str, tuple[Callable[[dict, dict], Any], str]] = {
    "a later version": (_entry(version=2), "must be at most 1, got 2, from a later release"),
    "no version": (lambda tensors, entry: entry.pop("version"), "damaged metadata"),
    "an option more": (_option(colour="red"), "options that finc_flow does not take: .*'colour'"),
    "an option less": (lambda tensors, entry: entry["options"].pop("levels"), "does not take: .*'levels'"),
    "a wrong option": (_option(direction="up"), "does not take: direction must be"),
    "other sizes": (_option(hidden_channels=8), r"got floating-point \(4,.*, which is floating-point \(8,"),
    "endless": (_option(steps=10**12), "does not take: 2 levels of 1000000000000 steps in"),
    "a missing tensor": (_missing, "got nothing for .*, which is float"),
    "a tensor more": (lambda tensors, entry: tensors.update(more=torch.zeros(1)), r"for more, which is unknown in"),
    "another shape": (_first(lambda tensor: tensor[:1]), "which is floating-point"),
    "another dtype": (_first(lambda tensor: tensor.int()), r"got torch\.int32 .* which is floating-point"),
}


@in_both
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_refused(library, change: Callable[[dict, dict], Any], message: str, tmp_path: Path):
    path = tmp_path / "flow"
    flow = build(library)
    flow.save(path)
    rewrite(path, change)
    for act in (lambda: library.load_flow(path), lambda: flow.load(path)):
        unchanged(flow, act, f"^{re.escape(str(path))}.*{message}")


@in_both
def test_files_of_earlier_versions(library, tmp_path: Path):
    """ActNorm had a boolean, and the 1 x 1 convolution indices."""
    path, flow = tmp_path / "flow", build(library)
    flow.save(path)

    def change(tensors: dict, entry: dict) -> None:
        tensors.update({name: value.bool() for name, value in tensors.items() if "initialized" in name})
        tensors.update({name: value.argmax(1) for name, value in tensors.items() if "permutation" in name})

    rewrite(path, change)
    loaded = library.load_flow(path)
    assert all(map(torch.equal, results(loaded), results(flow)))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, flow.state_dict()[name]) and value.dtype == flow.state_dict()[name].dtype, name


def test_damage_is_found_wherever_it_is(tmp_path: Path):
    path = tmp_path / "flow"
    build(nflows_kconv.nflows).save(path)
    whole = path.read_bytes()
    places = np.random.default_rng(0).integers(len(whole), size=60)
    damaged = [whole[:place] for place in [0, 1, 8, 100, len(whole) - 1]]
    damaged += [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in [*range(8), *places]]
    for contents in damaged:
        path.write_bytes(contents)
        with pytest.raises(ValueError, match="^" + re.escape(str(path))):
            nflows_kconv.nflows.load_flow(path)


def test_files_of_others(tmp_path: Path):
    path = tmp_path / "flow"
    flow = build(nflows_kconv.nflows)
    save_file(flow.state_dict(), path)
    with pytest.raises(ValueError, match=r"got tensors without options; load them with flow\.load_state_dict\("):
        nflows_kconv.nflows.load_flow(path)
    flow.load_state_dict(load_file(path))
    nflows_kconv.normflows.finc_flow((1, 8, 8), 2, 1, hidden_channels=4).load_state_dict(load_file(path))
    with pytest.raises(FileNotFoundError):
        nflows_kconv.nflows.load_flow(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        flow.save(tmp_path / "none" / "flow")


@in_both
def test_a_failure_to_save_leaves_the_file_that_is_there(library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flow, path = build(library), tmp_path / "flow"
    flow.save(path)
    before = path.read_bytes()

    def full(tensors: dict, name: str, metadata: dict) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        flow.save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["flow"]


def _coupling(flow: nn.Module) -> Any:
    return next(module for module in flow.modules() if type(module).__name__ == "AffineCoupling")


def _other_activation(flow: nn.Module) -> None:
    _coupling(flow).network[1] = nn.Tanh()


def _other_width(flow: nn.Module) -> None:
    _coupling(flow).network[2] = nn.Conv2d(4, 4, 1, bias=False)


def _weight_norm(flow: nn.Module) -> None:
    parametrizations.weight_norm(_coupling(flow).network[2])


@in_both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_activation, "got Tanh instead of ReLU"),
        (_other_width, "got nothing instead of floating-point .*"),
        (_weight_norm, "got ParametrizedConv2d instead of Conv2d"),
    ],
)
def test_flows_that_the_options_do_not_describe_are_not_saved(library, change, message: str, tmp_path: Path):
    flow = build(library)
    change(flow)
    with pytest.raises(TypeError, match=rf"{message} for .*: save its state_dict\(\)"):
        flow.save(tmp_path / "flow")
    assert not list(tmp_path.iterdir())


def test_tied_parameters_are_saved(tmp_path: Path):
    flow = build(nflows_kconv.nflows, levels=1, steps=2)
    first, second = (module for module in flow.modules() if type(module).__name__ == "AffineCoupling")
    second.network = first.network
    flow.save(tmp_path / "flow")
    loaded = nflows_kconv.nflows.load_flow(tmp_path / "flow")
    assert all(map(torch.equal, results(loaded), results(flow)))


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install \"nflows-kconv\[nflows\]\""):
        build(nflows_kconv.nflows).save(tmp_path / "flow")
