"""tests/python/devices.py -- calls of the core on a GPU with NumPy arrays: on a real one, or on the host's emulation.

The emulation (CMake option WIDEHEAD_CUDA_EMULATED) runs the CUDA kernels on host memory. DLPack capsules of host arrays
are relabelled as CUDA memory, so the core takes its CUDA path.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from widehead import _core

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

# For tests of what is so on a GPU alone.
only_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)

DLPACK_CUDA = 2
FAULT_NUMBERS = 5


def no_cuda() -> str | None:
    """Why there is no CUDA to test on; None: there is."""
    if not _core.cuda_built:
        return "widehead was built without CUDA"
    if _core.cuda_emulated:
        return None
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def claim_cuda(capsule: Any) -> Any:
    """The same capsule, its memory declared CUDA's: a DLTensor begins with the pointer, then comes the device."""
    device = ctypes.c_int32.from_address(_get_pointer(capsule, b"dltensor") + 8)
    device.value = DLPACK_CUDA
    return capsule


_memory = np.empty(0, np.int64)


def aligned(n: int, alignment: int = 256) -> np.ndarray:
    """int64 [n], aligned as a GPU's allocations are, full of NaN's bits; the same memory at every call."""
    global _memory
    if len(_memory) < n + alignment // 8:
        _memory = np.empty(n + alignment // 8, np.int64)
    first = -_memory.ctypes.data % alignment // 8
    memory = _memory[first : first + n]
    memory.fill(-1)
    return memory


class _Host:
    """Emulation: the arrays themselves."""

    stream = 0

    def give(self, array: np.ndarray, name: str = "") -> Any:
        return claim_cuda(array.__dlpack__())

    def scratch(self, n: int) -> Any:
        self.kept = aligned(n)
        return claim_cuda(self.kept.__dlpack__())

    def take_back(self) -> None:
        pass


class _Gpu:
    """A real device: copies there, and afterwards back into every writable array."""

    def __init__(self) -> None:
        import torch

        self.torch, self.pairs = torch, []
        self.stream = torch.cuda.current_stream().cuda_stream

    def give(self, array: np.ndarray, name: str = "") -> Any:
        host = self.torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
        there = self.torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="cuda")
        there.copy_(host)
        self.pairs.append((host, there))
        halves = self.torch.uint16 if name == "index" else self.torch.bfloat16
        typed = there.view(halves) if array.dtype == np.uint16 else there
        return self.torch.utils.dlpack.to_dlpack(typed)

    def scratch(self, n: int) -> Any:
        self.kept = self.torch.full((n,), -1, dtype=self.torch.int64, device="cuda")
        return self.torch.utils.dlpack.to_dlpack(self.kept)

    def take_back(self) -> None:
        for host, there in self.pairs:
            host.copy_(there)


def call(
    function: Callable[..., Any],
    device: str,
    *,
    check: bool = True,
    refused: np.ndarray | None = None,
    **arguments: Any,
) -> Any:
    """function(**arguments) on "cpu" or "cuda", arrays in and out; a fault found on the device is raised.

    refused: int32 [1], in the place of a flag of zero.
    """
    if device == "cpu":
        return function(**arguments)
    place = _Host() if _core.cuda_emulated else _Gpu()

    def give(value: Any, name: str = "") -> Any:
        if isinstance(value, np.ndarray):
            return place.give(value, name)
        return {name: give(v) for name, v in value.items()} if isinstance(value, dict) else value

    faults = np.zeros(FAULT_NUMBERS, np.int64)
    refused = np.zeros(1, np.int32) if refused is None else refused
    flags = {"faults": place.give(faults), "refused": place.give(refused)}
    gpu = {"stream": place.stream, "scratch": place.scratch, **flags}
    counted = np.zeros(1, np.int64)
    counts = "filter_eps" in arguments
    if counts:
        arguments["filtered"] = counted
    result = function(**{name: give(value, name) for name, value in arguments.items()}, gpu=gpu)
    place.take_back()
    if check:
        _core.raise_fault(faults.tolist())
    return int(counted[0]) if counts else result
