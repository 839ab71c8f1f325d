"""A test double of the CUDA driver, with which launchers run without a GPU, on CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import cuda_emulator

from nflows_kconv.backends.cuda.plan import Arguments, Device, Kernel, Launch

CONTEXT = 0xC0
STREAM = 0x57
_Function = ctypes.CFUNCTYPE
_pointer, _unsigned, _int = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int


def emulate(launch: Launch) -> None:
    """Runs a launch in the emulator; its arguments start with the pointers of a call."""
    cuda_emulator.run_launch(launch)


class DriverDouble:
    """A double of `nflows_kconv.backends.cuda.driver`, in Python and by addresses of functions.

    Args:
        run: Called for each launch.

    Attributes:
        loaded: The code and the device of every module.
        launches: Launches with their stream and context.
        zeroed: Bytes that each call filled with zeros.
        contexts: Contexts of this thread, the current one last.
        capturing: Whether the stream is being captured into a graph.
        error: What launches return.
    """

    def __init__(self, run: Callable[[Launch], None] = emulate) -> None:
        self.run = run
        self.loaded: list[tuple[Kernel, int]] = []
        self.launches: list[tuple[Launch, int, int]] = []
        self.zeroed: list[int] = []
        self.contexts: list[int | None] = [CONTEXT]
        self.capturing = False
        self.error = 0
        self._kernels: list[Kernel] = []
        self._functions = (
            _Function(_int, _pointer, *[_unsigned] * 7, _pointer, ctypes.POINTER(_pointer), _pointer)(self._launch),
            _Function(_int, ctypes.c_ulonglong, ctypes.c_ubyte, ctypes.c_size_t, _pointer)(self._set_bytes),
            _Function(_int, ctypes.POINTER(_pointer))(self._get_context),
            _Function(_int, _pointer)(self._push_context),
            _Function(_int, ctypes.POINTER(_pointer))(self._pop_context),
            _Function(_int, _int, ctypes.POINTER(ctypes.c_char_p))(self._get_error_name),
            _Function(_int, _int, ctypes.POINTER(_pointer))(self._get_stream),
        )

    def describe(self, index: int) -> Device:
        return cuda_emulator.H100

    def context(self, index: int) -> int:
        return CONTEXT

    def current_stream(self, index: int) -> int:
        return STREAM

    def is_capturing(self, index: int) -> bool:
        return self.capturing

    def load(self, code: Kernel, index: int) -> int:
        """Loads the source of a kernel, which serves as its code here."""
        self.loaded.append((code, index))
        return len(self.loaded) - 1

    def function(self, module: int, name: str, index: int) -> int:
        code, loaded_on = self.loaded[module]
        assert loaded_on == index
        self._kernels.append(replace(code, name=name))
        return len(self._kernels)

    def zero(self, index: int, address: int, size: int, stream: int) -> None:
        ctypes.memset(address, 0, size)
        self.zeroed.append(size)

    def launch(
        self,
        index: int,
        function: int,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        arguments: bytes,
        stream: int,
    ) -> None:
        if self.error:
            raise RuntimeError(f"cuLaunchKernel failed: CUDA_ERROR_{self.error}")
        launch = Launch(self._kernels[function - 1], grid, block, shared, arguments)
        self.launches.append((replace(launch, arguments=arguments), stream, self.contexts[-1]))
        self.run(launch)

    def function_addresses(self) -> tuple[int, ...]:
        return tuple(ctypes.cast(function, ctypes.c_void_p).value for function in self._functions)

    def _launch(self, function, x, y, z, block, block_y, block_z, shared, stream, parameters, extra):
        if self.error:
            return self.error
        assert (block_y, block_z, extra) == (1, 1, None)
        words = -(-dict(self._kernels[function - 1].constants)["CORNERS"] // 16)
        arguments = ctypes.string_at(parameters[0], ctypes.sizeof(Arguments) + -(-words // 2) * 8)
        self.launch(0, function, (x, y, z), block, shared, arguments, stream)
        return 0

    def _set_bytes(self, address, value, count, stream):
        assert (value, stream) == (0, STREAM)
        self.zero(0, address, count, stream)
        return 0

    def _get_context(self, context):
        context[0] = self.contexts[-1]
        return 0

    def _push_context(self, context):
        self.contexts.append(context)
        return 0

    def _pop_context(self, context):
        context[0] = self.contexts.pop()
        return 0

    def _get_error_name(self, error, name):
        name[0] = f"CUDA_ERROR_{error}".encode()
        return 0

    def _get_stream(self, device, stream):
        stream[0] = STREAM
        return 0
