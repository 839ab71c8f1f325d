"""The report of backends, and the native library behind it."""

import dataclasses
import json
import platform
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from nflows_kconv import InvertibleConv2d, use_backend
from nflows_kconv.backends import Backend, available_backends, native, registry, selected_backends
from nflows_kconv.backends.cuda import cache, compiler, driver, runtime

needs_native = pytest.mark.skipif(not native.available, reason=f"no native library: {native.reason}")


@pytest.fixture
def library_missing(monkeypatch):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "reason", "it was not built: because")
    monkeypatch.setattr(registry, "attempt", None)


@pytest.fixture
def instruction_set_restored():
    in_use = native.instruction_set()
    yield
    native.select_instruction_set(in_use)


def test_one_entry_per_backend():
    found = available_backends()
    assert list(found) == ["cpu", "cuda", "reference"]
    assert all(isinstance(backend, Backend) and backend.name == name for name, backend in found.items())
    assert all(backend.reason for backend in found.values())
    assert all(backend.available for backend in found.values() if backend.selected)


def test_backends_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        available_backends()["reference"].available = False


def test_selected_are_those_that_present_devices_run_on():
    assert {name for name, backend in available_backends().items() if backend.selected} == set(
        selected_backends().values()
    )


@pytest.fixture
def gpu(monkeypatch):
    """Fakes a machine with a GPU for the report."""
    monkeypatch.setattr(runtime, "why_not", lambda device=None: None)
    monkeypatch.setattr(driver, "device_names", lambda: ["NVIDIA H100 80GB HBM3"] * 2)
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))


@needs_native
def test_cuda_tells_what_it_runs_with(gpu):
    assert str(available_backends()["cuda"]) == (
        "cuda (cuda): selected, NVIDIA H100 80GB HBM3, compiled at run time by NVRTC 13.0, launched from C++"
    )
    assert selected_backends() == {"cpu": "cpu", "cuda": "cuda"}
    assert not available_backends()["reference"].selected


def test_without_the_library_cuda_is_launched_from_python(gpu, library_missing):
    assert available_backends()["cuda"].reason.endswith(
        "launched from Python, slower, since the native library is missing: it was not built: because"
    )
    assert selected_backends() == {"cpu": "reference", "cuda": "cuda"}


def test_cuda_tells_why_it_cannot_run(gpu, monkeypatch):
    monkeypatch.setattr(runtime, "why_not", lambda: "this torch is built for ROCm")
    assert available_backends()["cuda"] == Backend("cuda", "cuda", False, False, "this torch is built for ROCm")
    assert selected_backends()["cuda"] == "reference"
    assert "cuda" in available_backends()["reference"].reason


@needs_native
@pytest.mark.parametrize(("threads", "shown"), [(1, "1 thread"), (2, "2 threads")])
def test_native_tells_what_it_runs_with(threads, shown, instruction_set_restored):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    native.select_instruction_set("baseline")
    try:
        assert str(available_backends()["cpu"]) == f"cpu (cpu): selected, baseline instructions, {shown}"
    finally:
        torch.set_num_threads(before)


def test_without_the_library_the_reference_is_selected(library_missing):
    assert available_backends()["cpu"] == Backend("cpu", "cpu", False, False, "it was not built: because")
    assert available_backends()["reference"].selected
    assert selected_backends()["cpu"] == "reference"


@pytest.fixture
def runs(monkeypatch):
    """Returns the names of the backends that run, in order, with none chosen by the `backend` fixture."""
    names = []
    monkeypatch.setattr(registry, "_chosen", None)
    monkeypatch.setattr(registry, "attempt", None)
    for name, each in registry._registered.items():
        run = lambda problem, name=name, run=each.run: names.append(name) or run(problem)  # noqa: E731
        monkeypatch.setitem(registry._registered, name, each._replace(run=run, attempt=None))
    return names


@needs_native
def test_a_backend_can_be_chosen(runs):
    layer, images = InvertibleConv2d(4, corners="TL"), torch.randn(2, 4, 5, 6, requires_grad=True)

    def ran(call) -> set[str]:
        runs.clear()
        call()
        return set(runs)

    output, _ = layer(images)
    assert ran(lambda: layer(images)) == {"cpu"}
    with use_backend("reference"):
        expected, _ = layer(images)
        assert ran(lambda: output.sum().backward()) == {"reference"}  # also in autograd's threads
        with use_backend("cpu"):
            assert ran(lambda: layer(images)) == {"cpu"}
        assert ran(lambda: layer.inverse(images)) == {"reference"}
    torch.testing.assert_close(output, expected)
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert ran(lambda: layer.inverse(images)) == {"cpu"}


def test_backends_that_cannot_be_chosen(gpu, library_missing):
    layer, images = InvertibleConv2d(4, corners="TL"), torch.randn(2, 4, 5, 6)
    with pytest.raises(ValueError, match=r"backend must be one of \('cpu', 'cuda', 'reference'\), got 'CUDA'"):
        use_backend("CUDA").__enter__()
    with pytest.raises(ValueError, match='backend "cpu" must be available here, but it was not built: because'):
        use_backend("cpu").__enter__()
    with (
        use_backend("cuda"),
        pytest.raises(
            RuntimeError, match='backend "cuda" must be able to run this call on cpu tensors: it runs cuda tensors'
        ),
    ):
        layer(images)
    layer(images)


@needs_native
def test_what_a_backend_cannot_run_the_next_one_does(runs, monkeypatch):
    each = registry._registered["cpu"]._replace(why_not=lambda problem: "its kernels do not know this")
    monkeypatch.setitem(registry._registered, "cpu", each)
    layer, images = InvertibleConv2d(4, corners="TL"), torch.randn(2, 4, 5, 6)
    layer(images)
    assert runs == ["reference"]
    with (
        use_backend("cpu"),
        pytest.raises(RuntimeError, match="must be able to run this call on cpu tensors: its kernels do"),
    ):
        layer(images)


def test_a_solution_tells_what_it_needs_and_why_it_is_missing(library_missing, monkeypatch):
    monkeypatch.setattr(registry, "_chosen", None)
    monkeypatch.delitem(registry._registered, "reference")
    expected = "solve on cpu tensors needs a backend that can run it, got ['cpu: it was not built: because']"
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        InvertibleConv2d(4).inverse(torch.randn(2, 4, 5, 6))


def test_without_the_library_there_are_no_instruction_sets(library_missing):
    assert native.instruction_sets() == ()
    with pytest.raises(RuntimeError, match="not available: it was not built: because"):
        native.instruction_set()
    with pytest.raises(RuntimeError, match="not available: it was not built: because"):
        native.select_instruction_set("baseline")


@needs_native
def test_every_instruction_set_of_the_machine_can_be_selected(instruction_set_restored):
    assert native.instruction_sets()[0] == "baseline"
    for name in native.instruction_sets():
        native.select_instruction_set(name)
        assert native.instruction_set() == name


@needs_native
@pytest.mark.skipif(platform.system() != "Linux", reason="reads the processor's flags from Linux")
def test_instruction_sets_are_those_of_the_processor():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert ("avx2" in native.instruction_sets()) == ({"avx2", "fma", "f16c"} <= flags)
    avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert ("avx512" in native.instruction_sets()) == (avx512 <= flags)


@needs_native
def test_asking_for_the_instruction_sets_changes_nothing(instruction_set_restored):
    for name in native.instruction_sets():
        native.select_instruction_set(name)
        native.instruction_sets()
        assert native.instruction_set() == name


@needs_native
@pytest.mark.parametrize("name", ["", "sse9", "AVX2"])
def test_unknown_instruction_set(name):
    with pytest.raises(
        ValueError, match=rf"instruction set must be one of \('baseline'.*\) on this machine, got '{name}'"
    ):
        native.select_instruction_set(name)


def test_library_that_was_never_built(tmp_path):
    assert native._load(tmp_path) == (
        None,
        f"it was never built: Python runs the sources in {tmp_path}, not an installed package",
    )


def test_library_that_was_not_built(tmp_path):
    (tmp_path / "_native_build.json").write_text(json.dumps({"built": False, "reason": "no C++ compiler"}))
    # Files of another build are not touched.
    (tmp_path / "_native.abi3.so").write_text("")
    assert native._load(tmp_path) == (None, "it was not built: no C++ compiler")


def test_library_that_does_not_load(tmp_path):
    record = {"built": True, "reason": "", "compiler": "c++ 12", "torch": "2.10.0"}
    (tmp_path / "_native_build.json").write_text(json.dumps(record))
    (tmp_path / "_native.abi3.so").write_text("no library")
    library, reason = native._load(tmp_path)
    assert library is None
    assert reason.startswith("built with c++ 12 and torch 2.10.0, it failed to load: ")
    assert "_native.abi3.so" in reason


def test_report_on_the_command_line(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "nflows_kconv.__main__", raising=False)  # other tests import every module
    runpy.run_module("nflows_kconv", run_name="__main__")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"torch:         {torch.__version__}" in lines
    assert f"Python:        {platform.python_version()}" in lines
    assert f"kernel cache:  {cache.directory()}" in lines
    for name, backend in available_backends().items():
        assert any(line.startswith(f"{name} ({backend.device}): ") for line in lines)
    for device, name in selected_backends().items():
        assert f"{device} tensors run on {name}" in lines
