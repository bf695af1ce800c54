"""_device.py -- what the core needs of a GPU: stream, memory to work in, and the record of what no call can throw.

A call on a GPU only enqueues work, so a bad value (a label out of range, a gradient that is not finite) is recorded in
device memory by the kernel that meets it. Every device has one record, kept for ever: CUDA graphs have its address. It
is read without waiting by the fused optimisers' step(), and with waiting by `Head.check()`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from widehead import _core
from widehead._core import BackendError

if TYPE_CHECKING:
    from widehead._core import Gpu

NUMBERS = 5  # of a record; the first says what happened

# The device type of a GPU. Tests of the emulated backend make it "cpu".
_gpu_type = "cuda"


def on_gpu(tensor: Tensor) -> bool:
    """Whether the core's GPU backend works on this tensor."""
    return tensor.device.type == _gpu_type


def capsule(tensor: Tensor | None) -> Any:
    return None if tensor is None else _export(tensor.detach())


_export: Callable[[Tensor], Any] = to_dlpack


def scratch(n: int, device: torch.device) -> Tensor:
    """int64 `[n]` to work in, on the current stream of the device; aligned to 256 bytes."""
    return torch.empty(n, dtype=torch.int64, device=device)


def aligned(n: int, device: torch.device) -> Tensor:
    """int64 `[n]` to keep, aligned to 256 bytes wherever it lies."""
    room = torch.empty(n + 32, dtype=torch.int64, device=device)
    first = -room.data_ptr() % 256 // 8
    return room[first : first + n]


def gpu_of(tensor: Tensor, refused: Tensor | None = None, faults: Tensor | None = None) -> Gpu | None:
    """What the core takes as `gpu` for a call on the tensor's device; None on the CPU.

    Args:
        refused: int32 `[1]`: not 0, the call changes no weights; 1 afterwards, it met a bad value.
        faults: where bad values are recorded; None: in the device's own record.
    """
    if not on_gpu(tensor):
        return None
    device = tensor.device
    record = faults_of(device).record if faults is None else faults
    return {
        "stream": torch.cuda.current_stream(device).cuda_stream if tensor.is_cuda else 0,
        "scratch": lambda n: capsule(scratch(n, device)),
        "faults": capsule(record),
        "refused": capsule(refused),
    }


def tf32() -> bool:
    """Whether products of float32 may round their factors to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Faults:
    """The record of one device."""

    def __init__(self, device: torch.device) -> None:
        self.record = torch.zeros(NUMBERS, dtype=torch.int64, device=device)
        self._seen = torch.zeros(NUMBERS, dtype=torch.int64, device="cpu", pin_memory=self.record.is_cuda)
        self._copied = torch.cuda.Event() if self.record.is_cuda else None
        self._under_way = False

    def look(self) -> None:
        """Raises what an earlier look has asked for, if it has arrived, and asks again. Never waits."""
        device = self.record.device
        if capturing(device):
            return
        if self._under_way and (self._copied is None or self._copied.query()):
            self._under_way = False
            found = self._seen.tolist()
            if found[0]:
                self.record.zero_()
                _core.raise_fault(found)
        if not self._under_way:
            self._seen.copy_(self.record, non_blocking=True)
            if self._copied is not None:
                self._copied.record(torch.cuda.current_stream(device))
            self._under_way = True

    def take(self) -> None:
        """Waits for the device, clears the record, and raises what it said."""
        found = self.record.tolist()
        self._under_way = False
        if found[0]:
            self.record.zero_()
            _core.raise_fault(found)

    def add(self, record: Tensor, unless: int) -> None:
        """Takes over another record, without waiting, where this one is empty and that one says no `unless`."""
        wanted = (self.record[0] == 0) & (record[0] != unless)
        self.record.copy_(torch.where(wanted, record, self.record))


_faults: dict[torch.device, Faults] = {}


def faults_of(device: torch.device) -> Faults:
    faults = _faults.get(device)
    if faults is None:
        if capturing(device):
            raise BackendError(
                f"the first call on {device} lies inside the capture of a CUDA graph; run one step before it"
            )
        _find_cublas()
        faults = Faults(device)
        if type(faults.record) is not Tensor:  # a fake one, while shapes are traced
            return faults
        _faults[device] = faults
    return faults


def prepare(tensor: Tensor) -> None:
    """Makes what the tensor's device needs, so that the first step neither allocates nor waits for it."""
    if on_gpu(tensor):
        faults_of(tensor.device)


def check(tensor: Tensor) -> None:
    if on_gpu(tensor):
        faults_of(tensor.device).take()


_CUBLAS = ("libcublas.so.13", "libcublas.so.12")


def _loaded(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _find_cublas() -> None:
    """Tells the core where cuBLAS is, unless the process has a copy (PyTorch's): the core takes that one."""
    if any(_loaded(name) for name in _CUBLAS):
        return
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublas").abs_path
    except (ImportError, RuntimeError):
        return  # the core asks the loader, and says what to install
    if path:
        _core.set_cublas_path(path)
