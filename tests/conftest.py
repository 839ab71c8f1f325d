"""Fixtures for the device and the backends, and hypothesis profiles."""

import functools
import gc
import os
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from hypothesis import settings

from nflows_kconv import available_backends, use_backend
from nflows_kconv.backends import native
from nflows_kconv.testing import register_profiles

register_profiles()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the properties run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA device, and torch finds none")
    # The tensors are small and tests run in parallel; separate tests cover threads.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for child processes
    gc.disable()  # until everything is imported


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: nobody looks through it again
    gc.set_threshold(10_000)  # compilers import as much again, and leave little garbage
    gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        if metafunc.config.getoption("device") == "cpu":
            # Instruction sets matter only to the operators, which test_primitive runs on all of them.
            sets = native.instruction_sets()
            kernels = [f"cpu-{name}" for name in (sets if metafunc.module.__name__ == "test_primitive" else sets[-1:])]
        else:
            kernels = ["cuda"] if available_backends()["cuda"].available else []
        backends = kernels if "kernel" in metafunc.fixturenames else ["reference", *kernels]
        metafunc.parametrize("backend", backends, indirect=True, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip("needs a CUDA device"))


@pytest.fixture
def impatient() -> Iterator[None]:
    """Returns a hypothesis profile whose deadline every test misses: code that users copy runs without our profiles."""
    before = settings.get_current_profile_name()
    settings.register_profile("impatient", max_examples=5, deadline=timedelta(microseconds=1))
    settings.load_profile("impatient")
    yield
    settings.load_profile(before)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Returns the device of `--device`."""
    return request.config.getoption("device")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each backend that works here; the reference runs what a backend cannot."""
    if request.param == "reference":
        with use_backend("reference"):
            yield request.param
    elif request.param == "cuda":
        yield request.param
    else:
        best = native.instruction_set()
        native.select_instruction_set(request.param.removeprefix("cpu-"))
        yield request.param
        native.select_instruction_set(best)


@pytest.fixture(scope="session")
def kernel(backend: str) -> str:
    """Runs a test on each backend but the reference, which has no branches for what the test is about."""
    return backend


@pytest.fixture(scope="session")
def torchlib_once() -> None:
    """Lists the functions of torchlib once a process: each export to ONNX would parse the sources of all of them."""
    from torch.onnx._internal._lazy_import import onnxscript_apis

    onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)


@pytest.fixture
def own_precision() -> Iterator[None]:
    """Restores the precision settings of float32 convolutions and matrix products on GPUs."""
    operations = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [operation.fp32_precision for operation in operations]
    yield
    for operation, precision in zip(operations, before, strict=True):
        operation.fp32_precision = precision
