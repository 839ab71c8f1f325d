"""The table of docs/deploy.md, observed: what runs and gives the same numbers for another batch size."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from documents import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import cpp_extension

from nflows_kconv import InvertibleConv2d
from nflows_kconv.nflows import finc_flow
from nflows_kconv.onnx import translation_table

pytestmark = [
    pytest.mark.usefixtures("torchlib_once"),
    # Models with all parameters changed from their initial values.
    pytest.mark.filterwarnings("ignore:.* nonzero entries that the layer ignores"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # from torch
]

# Without optimisation, headers to compile for other packages, and a search for what vectors the compiler knows.
QUICKLY = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": False,
}
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class Method(nn.Module):
    """A method of a module as a `forward`."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, input: Tensor) -> Tensor:
        return getattr(self.module, self.name)(input)


@dataclass
class Model:
    """A column of the table."""

    module: nn.Module
    input: Tensor
    larger: Tensor  # another batch size, for a layer also another image size

    @cached_property
    def expected(self) -> Tensor:
        with torch.no_grad():
            return self.module(self.larger)

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        axes = (axis for axis, size in enumerate(self.larger.shape) if size != self.input.shape[axis])
        sizes = {axis: torch.export.Dim(f"size_{axis}") for axis in axes}
        return torch.export.export(self.module, (self.input,), dynamic_shapes=(sizes,))


@cache
def models() -> list[Model]:
    """Returns the models in the order of the columns."""
    torch.manual_seed(0)
    layer = InvertibleConv2d(4, corners=("TL", "B"), diagonal="learned", bias=True)
    flow = finc_flow((1, 4, 4), 1, 1, corners="BR", hidden_channels=4, preprocessing=None).eval()
    with torch.no_grad():
        for parameter in (*layer.parameters(), *flow.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    shapes = {"convolve": (4, 5, 6), "solve": (4, 5, 6), "log_prob": (1, 4, 4), "decode": (16,)}
    larger = {"convolve": (4, 8, 7), "solve": (4, 8, 7)}
    return [
        Model(
            Method(layer if name in larger else flow, name),
            torch.randn(3, *shape),
            torch.randn(5, *larger.get(name, shape)),
        )
        for name, shape in shapes.items()
    ]


def outcome(call: Callable[[Tensor], Any], model: Model) -> str:
    with torch.no_grad():
        torch.testing.assert_close(call(model.larger), model.expected)
    return "yes"


WITH_TORCH_ALONE = """
import pathlib, sys, torch

for file in map(pathlib.Path, sys.argv[1:]):
    try:
        program = torch.export.load(file).module()
    except RuntimeError:
        print("no")
    else:
        input, expected = torch.load(file.with_suffix(".pt"))
        torch.testing.assert_close(program(input), expected)
        print("yes")
assert "nflows_kconv" not in sys.modules
"""


def programs(models: Sequence[Model], folder: Path) -> list[list[str]]:
    files, here = [], []
    for index, model in enumerate(models):
        files.append(folder / f"{index}.pt2")
        torch.export.save(model.exported, files[-1])
        here.append(outcome(torch.export.load(files[-1]).module(), model))
        torch.export.save(model.exported.run_decompositions(), files[-1])
        torch.save((model.larger, model.expected), files[-1].with_suffix(".pt"))
    command = [sys.executable, "-c", WITH_TORCH_ALONE, *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nflows_kconv" in done.stderr  # of what does not run
    return [here, done.stdout.split()]


def packages(models: Sequence[Model], folder: Path) -> list[list[str]]:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    program = folder / "run_packages"
    paths = [f"-I{path}" for path in cpp_extension.include_paths()]
    paths += [option for path in cpp_extension.library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    sources = ["-std=c++20", ROOT / "tests" / "run_packages.cpp", "-o", program]
    subprocess.run([COMPILER, *sources, *paths, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    here, elsewhere = [], []
    for model in models[2:]:  # which convolve as layers do, and solve; a package takes ten seconds to compile
        file = str(folder / "package.pt2")
        torch._inductor.aoti_compile_and_package(model.exported, package_path=file, inductor_configs=QUICKLY)
        here.append(outcome(torch._inductor.aoti_load_package(file), model))
        command = [program, file, *map(str, model.larger.shape)]
        done = subprocess.run(command, input=model.larger.numpy().tobytes(), capture_output=True)
        if done.returncode:
            assert b"nflows_kconv" in done.stderr
            elsewhere.append("no")
        else:
            output = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view_as(model.expected)
            elsewhere.append(outcome(lambda _, output=output: output, model))
    return [2 * here, 2 * elsewhere]


def onnx(models: Sequence[Model], folder: Path) -> list[list[str]]:
    row = []
    for model in models:
        options = dict(dynamo=True, custom_translation_table=translation_table(), verbose=False)
        file = torch.onnx.export(model.exported, **options).model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(file)
        row.append(
            outcome(lambda input, run=session.run: torch.from_numpy(*run(None, {"input": input.numpy()})), model)
        )
    return [row]


def compiled(models: Sequence[Model], folder: Path) -> list[list[str]]:
    return [[outcome(torch.compile(model.module, backend="aot_eager"), model) for model in models]]


def weights(models: Sequence[Model], folder: Path) -> list[list[str]]:
    row = []
    for model in models:
        save_file(model.module.state_dict(), folder / "weights.safetensors")
        other = copy.deepcopy(model.module)
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        other.load_state_dict(load_file(folder / "weights.safetensors"))
        row.append(outcome(other, model))
    return [row]


def scripted(models: Sequence[Model], folder: Path) -> list[list[str]]:
    for model in models:
        with pytest.raises((RuntimeError, ValueError)):
            torch.jit.script(model.module)
    return [["no"] * len(models)]


# The tests behind the rows of the table.
WAYS: dict[tuple[str, ...], Callable[[Sequence[Model], Path], list[list[str]]]] = {
    ("`torch.export`", "`torch.export`, decomposed, where only torch is"): programs,
    ("AOTInductor", "AOTInductor, from C++, where only libtorch is"): packages,
    ("ONNX Runtime",): onnx,
    ("`torch.compile`, by `aot_eager`",): compiled,
    ("safetensors, the weights",): weights,
    ("`torch.jit.script`",): scripted,
}


def table() -> dict[str, list[str]]:
    lines = (ROOT / "docs" / "deploy.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {name: cells for name, *cells in rows[2:]}


def test_the_table_has_a_row_for_each_way():
    assert list(table()) == [name for names in WAYS for name in names]


@pytest.mark.parametrize("names", WAYS, ids=lambda names: names[0])
def test_the_table_says_what_works(names: tuple[str, ...], tmp_path: Path):
    assert [table()[name] for name in names] == WAYS[names](models(), tmp_path)
