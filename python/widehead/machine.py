"""widehead/machine.py -- what the machine can do: arithmetic rate, cost of an exponential, bandwidth, memory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import _core
from ._core import BackendError

# Datasheet figures: tensor-core rate for bfloat16 and plain rate for float32, dense, in FLOP/s; bytes/s; bytes. Kernels
# are taken to reach this share of them, until a probe on the device itself says otherwise.
_SHARE = 0.6
_GPUS: dict[str, tuple[float, float, float, float]] = {
    "a100": (312e12, 19.5e12, 2039e9, 80e9),
    "h100": (989e12, 67e12, 3350e9, 80e9),
    "h200": (989e12, 67e12, 4800e9, 141e9),
}
DEVICES = ("cpu", *_GPUS)


@dataclass(frozen=True)
class Machine:
    """What a plan reckons with.

    Attributes:
        name: for people.
        flops: rate of the products in a fused kernel by dtype of the weights, FLOP/s.
        exponentials: exponentials (or activations of the other losses) in a fused kernel, 1/s.
        bandwidth: of memory, bytes/s, reads and writes together.
        gather_rate: rows of a wide hidden layer at random places, bytes/s; a cache mostly has them.
        memory: bytes that can be had now.
        measured: False where the figures come from a datasheet.
    """

    name: str
    flops: dict[str, float]
    exponentials: float
    bandwidth: float
    memory: float
    measured: bool
    gather_rate: float = math.inf

    def with_memory(self, memory: float | None) -> Machine:
        return self if memory is None else replace(self, memory=memory)


def machine(device: str = "cpu") -> Machine:
    """The figures of a device: "cpu" is measured for about a second, GPUs come from their datasheets.

    Raises BackendError for a device that is not known.
    """
    if device == "cpu":
        return _probe_cpu()
    if device not in _GPUS:
        raise BackendError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    bf16, f32, bandwidth, memory = _GPUS[device]
    flops = {"float32": _SHARE * f32, "bfloat16": _SHARE * bf16}
    # Special function units deliver one exponential for about 16 plain operations. A second-level cache gives at least
    # twice what memory does; no datasheet says how much.
    return Machine(
        device.upper(),
        flops,
        exponentials=_SHARE * f32 / 16,
        bandwidth=_SHARE * bandwidth,
        memory=memory,
        measured=False,
        gather_rate=2 * _SHARE * bandwidth,
    )


def _probe_cpu() -> Machine:
    threads = _core.get_num_threads()
    rates = {dtype: _kernel_rate(dtype) for dtype in ("float32", "bfloat16")}
    return Machine(
        name=f"this machine's CPU, {threads} thread{'s'[: threads != 1]}, {_core.current_isa()}",
        flops={dtype: rate for dtype, (rate, _) in rates.items()},
        exponentials=rates["float32"][1],
        bandwidth=_bandwidth(threads),
        memory=_free_memory(),
        measured=True,
        gather_rate=_gather_rate(),
    )


def _kernel_rate(dtype: str, batch: int = 128, classes: int = 8192) -> tuple[float, float]:
    """FLOP/s and exponentials/s of the loss kernel: its time at two widths tells products from exponentials."""
    narrow, wide = (_loss_seconds(dtype, batch, classes, width) for width in (64, 256))
    per_product = max((wide - narrow) / (256 - 64), wide / 512)
    flops = 2.0 * batch * classes / per_product
    # What the narrow layer takes beyond its products; never free, even where the clock says so.
    return flops, batch * classes / max(narrow - 64 * per_product, 0.02 * narrow)


def _loss_seconds(dtype: str, batch: int, classes: int, width: int) -> float:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((batch, width), np.float32)
    if dtype == "bfloat16":
        weight = rng.integers(0x3C00, 0x3D00, (classes, width), np.uint16)
    else:
        weight = rng.standard_normal((classes, width), np.float32)
    target = rng.integers(0, classes, batch)
    losses = np.empty(batch, np.float32)

    def run() -> None:
        _core.dense_forward(
            hidden=hidden,
            weight=weight,
            bias=None,
            indptr=None,
            indices=target,
            values=None,
            loss="softmax",
            losses=losses,
            output=None,
            lse=None,
        )

    return _best_of(run)


def _gather_rate(batch: int = 32, classes: int = 32768, features: int = 16384, fan_in: int = 32) -> float:
    """Bytes/s of the sparse head's forward kernel, which hardly does anything but read rows of hidden."""
    rng = np.random.default_rng(0)
    index = np.empty((classes, fan_in), np.uint16)
    _core.draw_index(index=index, in_features=features, seed=0)
    hidden, weight = rng.standard_normal((batch, features), np.float32), np.ones((classes, fan_in), np.float32)
    losses = np.empty(batch, np.float32)

    def run() -> None:
        _core.sparse_forward(
            hidden=hidden,
            weight=weight,
            index=index,
            group_size=1,
            bias=None,
            indptr=np.zeros(batch + 1, np.int64),
            indices=np.zeros(0, np.int64),
            values=None,
            loss="squared_hinge",
            losses=losses,
            output=None,
            lse=None,
        )

    return 4.0 * batch * classes * fan_in / _best_of(run)


def _best_of(run: Callable[[], object], repeats: int = 4) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _bandwidth(threads: int, size: int = 1 << 26) -> float:
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # NumPy copies without the GIL
        return 2.0 * size / _best_of(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))


def _free_memory() -> float:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass  # no such file outside Linux
    return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
