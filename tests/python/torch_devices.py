"""tests/python/torch_devices.py -- the device of the PyTorch tests: the CPU, a GPU, or a GPU's code paths on the host.

Where the CUDA backend is emulated, torch has no GPU: "cuda" gives tensors on the CPU, and widehead.torch is told that
they are on one. So the branches for GPUs and all kernels run; streams, graphs and memory of a real device do not (they
have tests of their own, marked gpu).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.dlpack import to_dlpack

from devices import aligned, claim_cuda, no_cuda
from widehead import _core
from widehead.torch import Head, _device


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes tensors on the CPU for tensors on a GPU, until the test ends."""
    monkeypatch.setattr(_device, "_gpu_type", "cpu")
    monkeypatch.setattr(_device, "_export", lambda tensor: claim_cuda(to_dlpack(tensor)))
    monkeypatch.setattr(_device, "scratch", lambda n, device: torch.from_numpy(aligned(n)))
    monkeypatch.setattr(_device, "_faults", {})
    monkeypatch.setattr(_device, "_find_cublas", lambda: None)


def read_faults() -> None:
    """Raises what a test has left on the device."""
    for faults in _device._faults.values():
        faults.take()


def is_gpu(device: str) -> bool:
    return device == _device._gpu_type


@contextmanager
def raises(head: Head, error: type[Exception], match: str | None = None) -> Iterator[None]:
    """The block's error: on the CPU at once, on a GPU when the head is asked."""
    with pytest.raises(error, match=match):
        yield
        head.check()


def _no_real_gpu() -> str:
    if reason := no_cuda():
        return reason
    if _core.cuda_emulated:
        return "the CUDA backend is emulated, which has no streams, graphs or memory of its own"
    return "" if torch.cuda.is_available() else "no CUDA device"


# For modules that need the device itself.
real_gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(_no_real_gpu()), reason=_no_real_gpu())]
