"""scatter.py -- scatter_baseline.cu compiled, for a GPU or by the tests' emulation for the host, and called."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "bench" / "scatter_baseline.cu"
EMULATION = ROOT / "tests" / "cuda_host"
FOLDER = ROOT / "build" / "bench"


class Missing(Exception):
    """It cannot be compiled here; the message says why."""


def compiler_words(gpu: bool, out: Path) -> list[str]:
    """The command that makes the library.

    Raises:
        Missing: there is no such compiler.
    """
    if gpu:
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        found = os.environ.get("CUDACXX") or shutil.which("nvcc")
        nvcc = found or next((p for home in homes if home and (p := shutil.which("nvcc", path=f"{home}/bin"))), None)
        if nvcc is None:
            raise Missing("no nvcc")
        major, minor = torch.cuda.get_device_capability()
        flags = ["-O3", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
        return [nvcc, "-std=c++20", *flags, "-o", str(out), str(SOURCE)]
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    if cxx is None:
        raise Missing("no C++ compiler")
    flags = ["-O1", "-shared", "-fPIC", f"-I{EMULATION}", '-DWIDEHEAD_FAKE_CUBLAS=""', "-x", "c++"]
    return [cxx, "-std=c++20", *flags, str(SOURCE), str(EMULATION / "emulator.cc"), "-o", str(out), "-ldl"]


@functools.cache
def library(gpu: bool) -> ctypes.CDLL:
    """Compiled anew in every process: a few seconds, and never stale."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    out = FOLDER / f"scatter_{'gpu' if gpu else 'host'}_{os.getpid()}.so"
    try:
        done = subprocess.run(compiler_words(gpu, out), capture_output=True, text=True, timeout=120)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise Missing(f"it did not compile: {lines[0] if lines else done.returncode}")
        loaded = ctypes.CDLL(str(out))
    finally:
        out.unlink(missing_ok=True)
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    sizes = [number] * 4
    loaded.scatter_forward.argtypes = [flag, flag, *[pointer] * 4, *sizes, *[pointer] * 2]
    loaded.scatter_backward.argtypes = [flag, flag, *[pointer] * 4, *sizes, *[pointer] * 3]
    return loaded


def _call(name: str, hidden: Tensor, weight: Tensor, index: Tensor, *tensors: Tensor) -> None:
    """tensors: the last pointer before the sizes, then the outputs."""
    given = (hidden, weight, index, *tensors)
    if not all(tensor.is_contiguous() for tensor in given) or hidden.dtype != weight.dtype:
        raise ValueError(f"{name}: expected contiguous tensors, hidden of weight's type")
    stream = torch.cuda.current_stream().cuda_stream if hidden.is_cuda else 0
    flags = (int(weight.dtype == torch.bfloat16), int(index.dtype == torch.int32))
    sizes = (len(hidden), len(weight), hidden.shape[1], weight.shape[1])
    before, after = ([t.data_ptr() for t in part] for part in (given[:4], given[4:]))
    status = getattr(library(hidden.is_cuda), name)(*flags, *before, *sizes, *after, stream)
    if status:
        raise RuntimeError(f"CUDA error {status} in {name}")


def logits(hidden: Tensor, weight: Tensor, index: Tensor, bias: Tensor) -> Tensor:
    """float32 `[B, D]`; hidden `[B, H]` and weight `[D, K]` float32 or bfloat16, index uint16 or int32."""
    out = torch.empty(len(hidden), len(weight), device=hidden.device)
    _call("scatter_forward", hidden, weight, index, bias, out)
    return out


def gradients(hidden: Tensor, weight: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """To hidden and to weight, float32, from that to the logits."""
    grad_hidden = torch.zeros(hidden.shape, device=hidden.device)
    grad_weight = torch.zeros(weight.shape, device=hidden.device)
    _call("scatter_backward", hidden, weight, index, grad, grad_weight, grad_hidden)
    return grad_hidden, grad_weight
