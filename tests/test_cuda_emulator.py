"""The emulator finds the mistakes it is designed to find."""

import inspect
import re
import zlib
from dataclasses import replace
from pathlib import Path

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator import DECREASING, INCREASING, ORDERS, EmulatorError
from cuda_emulator.library import CACHE

from nflows_kconv.backends.cuda import compiler
from nflows_kconv.backends.cuda.plan import Launch, LaunchPlan, ProblemSpec, arguments, kernel

pytestmark = emulator.needs_compiler

HEAD = """
#include "arguments.cuh"

extern "C" __global__ void __launch_bounds__(64) snippet(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  float* shared = reinterpret_cast<float*>(shared_memory);
  const float* x = static_cast<const float*>(arguments.first);
  float* y = static_cast<float*>(arguments.output);
  int* counters = reinterpret_cast<int*>(arguments.scratch);
  const int t = threadIdx.x, i = blockIdx.x * 64 + t;
"""


def written(code: str) -> Path:
    """Returns a file with this code, the same file in every run, so compiled code is reused."""
    path = CACHE / f"{zlib.crc32(code.encode()):08x}.cu"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return path


@pytest.fixture
def run():
    """Runs the body of a kernel in an order of threads; x counts from 0, shared memory holds one float per thread."""

    def run(body: str, seed: int, blocks: int = 1, x: torch.Tensor | None = None, threads: int = 64) -> torch.Tensor:
        source = written(HEAD + inspect.cleandoc(body) + "\n}\n")
        x = torch.arange(64.0 * blocks) if x is None else x
        x = x.view(1, 1, 1, -1)
        problem = ProblemSpec(
            "conv", x.dtype, x.shape, (1, 1), (0,), False, False, x.stride(), (1, 1, 1, 1), x.stride()
        )
        snippet = kernel(problem, str(source), "snippet")
        launch = Launch(snippet, (x.numel() // 64, 1, 1), threads, 256, arguments(problem))
        y = torch.empty_like(x)
        emulator.run(LaunchPlan((launch,), scratch=256, zeroed=256), x, torch.ones(1, 1, 1, 1), y, seed=seed)
        return y.flatten()

    return run


@pytest.mark.parametrize("seed", ORDERS)
def test_barriers_order_shared_memory(run, seed):
    y = run("shared[t] = x[t]; __syncthreads(); y[t] = shared[63 - t];", seed)
    assert torch.equal(y, torch.arange(63.0, -1, -1))


NO_ORDER = "which another thread .* in no certain order"


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize(
    ("body", "barrier"),
    [
        ("shared[t] = x[t]; BARRIER; y[t] = shared[63 - t];", "__syncthreads()"),
        ("shared[t] = x[t]; BARRIER; y[t] = shared[t ^ 31];", "__syncwarp()"),
        ("const float v = x[63 - t]; y[t] = v; shared[t] = y[t]; BARRIER; shared[63 - t] = v;", "__syncthreads()"),
        ("shared[t] = 0; __syncthreads(); y[t] = shared[t ^ 1]; BARRIER; shared[t] = 1;", "__syncwarp()"),
        # Sums without atomics, which would be right sequentially.
        (
            "for (int i = 0; i < 64; i++) { BARRIER; if (i == t) shared[0] = i > 0 ? shared[0] + 1 : 0; }",
            "__syncthreads()",
        ),
        ("copy_async(shared + t, x + t); wait_for_copies(); BARRIER; y[t] = shared[63 - t];", "__syncthreads()"),
        ("y[t] = 0; BARRIER; y[63 - t] = 1;", "__syncthreads()"),
        ("counters[t] = 0; BARRIER; y[t] = counters[t ^ 32];", "__syncthreads()"),
    ],
)
def test_a_missing_barrier_is_an_error(run, body, barrier, seed):
    with pytest.raises(EmulatorError, match=NO_ORDER):
        run(body.replace("BARRIER", ""), seed)
    run(body.replace("BARRIER", barrier), seed)


def test_a_missing_wait_for_copies_shows(run):
    body = "copy_async(shared + t, x + t); {} __syncthreads(); y[t] = shared[63 - t];"
    right = torch.arange(63.0, -1, -1)
    assert all(torch.equal(run(body.format("wait_for_copies();"), seed), right) for seed in ORDERS)
    assert run(body.format(""), DECREASING).isnan().all()


# Every block doubles the previous block's result.
IN_TURNS = """
    if (t == 0 && blockIdx.x > 0) while (load_acquire(counters + blockIdx.x - 1) == 0);
    __syncthreads();
    y[i] = blockIdx.x > 0 ? 2 * y[i - 64] : 1;
    __syncthreads();
    if (t == 0) store_release(counters + blockIdx.x, 1);
"""


@pytest.mark.parametrize("seed", ORDERS)
def test_blocks_wait_for_each_other(run, seed):
    assert torch.equal(run(IN_TURNS, seed, blocks=9), 2.0 ** torch.arange(9).repeat_interleave(64))


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if (t == 0 && blockIdx.x > 0) while (load_acquire(counters + blockIdx.x - 1) == 0);\n", ""),
        ("== 0);\n    __syncthreads();", "== 0);"),
        ("    __syncthreads();\n    if (t == 0) store", "    if (t == 0) store"),
        ("while (load_acquire", "if (load_acquire"),
        ("load_acquire(counters + blockIdx.x - 1)", "counters[blockIdx.x] + 1"),
        ("- 1) == 0", ") != 0"),
        ("store_release(counters + blockIdx.x, 1)", "atomicAdd(counters + blockIdx.x, 1)"),
    ],
)
def test_a_missing_wait_for_another_block_is_an_error(run, old, new, seed):
    assert old in IN_TURNS
    with pytest.raises(EmulatorError, match=NO_ORDER):
        run(IN_TURNS.replace(old, new), seed, blocks=9)


@pytest.mark.parametrize("seed", ORDERS)
def test_waiting_for_too_little_is_an_error(run, seed):
    body = """
        if (blockIdx.x == 0) {
          for (int step = 1; step <= 3; step++) {
            if (t / 16 == step) y[t] = step;
            __syncthreads();
            if (t == 0) store_release(counters, step);
          }
        } else {
          if (t == 0) while (load_acquire(counters) < NEEDED);
          __syncthreads();
          y[i] = t < 16 ? 0 : y[t < 48 ? t : 16];
        }
    """
    assert run(body.replace("NEEDED", "2"), seed, blocks=2)[64:].tolist() == [0] * 16 + [1] * 16 + [2] * 16 + [1] * 16
    with pytest.raises(EmulatorError, match=NO_ORDER):
        run(body.replace("NEEDED", "1"), seed, blocks=2)


@pytest.mark.parametrize("seed", ORDERS)
def test_two_blocks_that_write_the_same_are_an_error(run, seed):
    with pytest.raises(EmulatorError, match=NO_ORDER):
        run("y[i] = 0; y[t] = 0;", seed, blocks=2)


@pytest.mark.parametrize("seed", ORDERS)
def test_atomic_additions_need_no_order(run, seed):
    body = "if (t == 0) shared[0] = atomicAdd(counters, 2); __syncthreads(); y[i] = shared[0];"
    assert torch.equal(run(body, seed, blocks=9)[::64].sort().values, torch.arange(0.0, 18, 2))


@pytest.mark.parametrize("seed", ORDERS)
def test_exchanges_between_lanes(run, seed):
    body = """
        const unsigned all = 0xffffffffu;
        const int lane = t % 32, first = lane / 8 * 8;
        bool right = __shfl_sync(all, t, 5) == t / 32 * 32 + 5;
        right = right && __shfl_sync(all, t, lane + 1, 8) % 32 == first + (lane + 1) % 8;
        right = right && __shfl_up_sync(all, t, 3u, 8) == (lane - 3 < first ? t : t - 3);
        right = right && __shfl_down_sync(all, t, 3u, 8) == (lane + 3 > first + 7 ? t : t + 3);
        right = right && __shfl_xor_sync(all, 0.5 + t, 6) == 0.5 + (t ^ 6);
        if (lane < 20) {
          right = right && __shfl_xor_sync(0xfffffu, t, 1) == (t ^ 1);
        } else {
          right = right && __ballot_sync(0xfff00000u, lane != 25) == 0xfdf00000u;
        }
        right = right && __any_sync(all, t == 40) == (t >= 32) && !__all_sync(all, t != 40) == (t >= 32);
        right = right && __syncthreads_or(t == 50) && !__syncthreads_or(0);
        y[t] = right && __syncthreads_and(t < 64) && !__syncthreads_and(t < 63) && __syncthreads_count(t < 9) == 9;
    """
    assert run(body, seed).all()


@pytest.mark.parametrize("seed", ORDERS)
def test_nobody_waits_for_lanes_that_do_not_exist(run, seed):
    y = run("y[t] = __shfl_xor_sync(~0u, x[t], 1);", seed, threads=40)
    assert torch.equal(y[:40], (torch.arange(40) ^ 1).float())


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("shared[t + 1] = 0; y[t] = 0;", "writes byte 256 of 256 bytes of shared memory at .*[.]cu:11"),
        ("y[t] = shared[t + 1];", "reads byte 256 of 256 bytes of shared memory"),
        ("memset(shared + 1, t, 256);", "wrote byte 256 of 256 bytes of shared memory|writes byte"),
        ("shared[t - 1] = 0; y[t] = 0;", "writes byte -4 of 256 bytes of shared memory"),
        ("y[t] = x[t + 100000];", "thread .*: access to memory that is not its own, at .*[.]cu:11"),
        ("y[t] = x[t - 100000];", "thread .*: access to memory that is not its own, at .*[.]cu:11"),
        ("const_cast<float*>(x)[t] = 0;", "access to memory that is not its own"),
        ("y[t] = reinterpret_cast<double*>(shared + 1)[t % 2];", "misaligned access or other undefined behaviour"),
        ("y[t] = arguments.width * 65536 * (t + 512);", "misaligned access or other undefined behaviour"),
        ("if (t < 40) __syncthreads();", "deadlock: of 64 threads 24 have returned, 40 at a __syncthreads"),
        ("if (t != 40) __syncwarp(); else __syncthreads();", "deadlock: .* 1 at a __syncthreads .* 31 in warps"),
        (
            "if (t % 2) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
            "threads 0 and 1 of a warp meet at different __syncthreads, in lines 14 and 12",
        ),
        ("if (t < 32) __syncthreads(); else __syncthreads_or(1);", "different kinds of __syncthreads"),
        ("y[t] = __shfl_sync(t % 32 < 16 ? 0xffffu : 0xffff0000u, x[t], 16);", "reads lane 16, which does not take"),
        ("y[t] = __shfl_sync(0xffffu, x[t], 1);", "leaves out the thread itself"),
        ("y[t] = t % 32 ? __shfl_sync(~0u, x[t], 1) : __shfl_xor_sync(~0u, x[t], 1);", "is at __shfl"),
        (
            "y[t] = t % 32 ? __shfl_sync(~0u, x[t], 1) : __shfl_sync(1u, x[t], 0);",
            "deadlock: of 64 threads 2 have returned, 62 in warps",
        ),
        ("y[t] = __shfl_sync(~0u, x[t], 1, 12);", "a shuffle of width 12"),
        ("while (load_acquire(counters) == 0);", "waits for a value in memory that neither it nor"),
        ("for (;;) __syncthreads();", "passes over 10000 __syncthreads, an endless loop"),
        ("copy_async(reinterpret_cast<double*>(shared + 1), reinterpret_cast<const double*>(x));", "misaligned copy"),
    ],
)
@pytest.mark.parametrize("seed", ORDERS)
def test_what_cuda_forbids_is_an_error(run, body, error, seed):
    with pytest.raises(EmulatorError, match=f"snippet in .*[.]cu: block \\(0, 0, 0\\).*{error}"):
        run(body, seed)


@pytest.mark.parametrize(("body", "memory"), [("y[t + 1] = y[t] = 0;", "output"), ("counters[t + 1] = 0;", "scratch")])
@pytest.mark.parametrize("seed", ORDERS)
def test_writing_beyond_the_end_is_an_error(run, body, memory, seed):
    with pytest.raises(EmulatorError, match=f"{memory}|access to memory that is not its own"):
        run(body, seed)


@pytest.mark.parametrize("body", ["y[t] = x[t + 1];", "y[t] = t > 0 ? x[t - 1] : x[t - 1];"])
def test_reading_beyond_the_inputs_shows_under_some_order(run, body):
    def shows(seed: int) -> bool:
        try:
            return bool(run(body, seed).isnan().any())
        except EmulatorError:
            return True

    assert all(map(shows, ORDERS))


def test_what_was_not_written_is_nan(run):
    assert run("if (t != 7) y[t] = 0;", INCREASING).isnan().nonzero().tolist() == [[7]]
    assert run("y[t] = shared[t];", INCREASING).isnan().all()
    assert run("y[t] = counters[t];", INCREASING).eq(0).all()  # zeroed


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_precision_is_that_of_torch(run, name, dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    between = (values[:-1] + values[1:]) / 2
    x = torch.cat([values, between, between[:1], torch.randn(2**12) * 10, torch.randn(2**12) * 2.0**-20, values * 3])
    y = run(f"y[i] = {name}_to_float(float_to_{name}(x[i]));", INCREASING, x=x)
    assert torch.equal(y.nan_to_num(7), x.to(dtype).float().nan_to_num(7))


def test_the_instructions_are_those_of_the_kernels():
    def functions(header: Path) -> dict[str, str]:
        return dict(re.findall(r"inline \S+ (\w+)(\(.*?\)) {", header.read_text()))

    assert functions(Path(emulator.__file__).with_name("ptx.cuh")) == functions(compiler.source_directory() / "ptx.cuh")


def test_kernels_are_compiled_with_their_constants():
    x = torch.zeros(1, 6, 1, 64)
    problem = ProblemSpec("conv", x.dtype, x.shape, (3, 99), (0, 3), False, True, x.stride(), (1, 1, 1, 1), x.stride())
    body = "y[t] = CHANNELS == 3 && KERNEL_H == 1 && KERNEL_W == 64 && TRANSPOSE && corner_of(arguments, 1) == MORE; }"
    constants = kernel(problem, str(written(HEAD + body)), "snippet", MORE=3)
    y = torch.zeros(64)
    emulator.run(LaunchPlan((Launch(constants, (1, 1, 1), 64, 0, arguments(problem)),)), x, torch.ones(1, 1, 1, 1), y)
    assert y.all()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(block=1025), "1025 threads"),
        (dict(block=65), "65 threads"),
        (dict(shared=232449), "232449 bytes of shared memory"),
        (dict(grid=(1, 65536, 1)), "65536"),
        (dict(arguments=b"\0" * 300), "300 bytes"),
    ],
)
def test_launches_that_no_gpu_takes(change, what):
    x = torch.zeros(1, 1, 1, 64)
    problem = ProblemSpec("conv", x.dtype, x.shape, (1, 1), (0,), False, False, x.stride(), (1, 1, 1, 1), x.stride())
    snippet = kernel(problem, str(written(HEAD + "}")), "snippet")
    launch = replace(Launch(snippet, (1, 1, 1), 64, 0, arguments(problem)), **change)
    with pytest.raises(AssertionError, match=what):
        emulator.run(LaunchPlan((launch,)), x, torch.ones(1, 1, 1, 1), torch.empty_like(x))
