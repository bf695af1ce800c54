"""gpu_device.py -- times and memory behind one small interface: CUDA events on a GPU, the wall clock for a rehearsal on
the CPU.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import common
import gpu_cells
import torch

# A measured run is called with `mark`, and calls it with a name where a lap ends.
Mark = Callable[[str], None]
Run = Callable[[Mark], Any]

NVIDIA_SMI = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu"
)


class Device(Protocol):
    name: str
    peak_mib: float | None  # of the last timed run, as far as PyTorch's allocator knows

    def time(self, run: Run) -> dict[str, float]:
        """Seconds from the start to each mark."""

    def memory(self, run: Run) -> dict[str, float]:
        """MiB that a run holds at its peak beyond what is there already: `extra_mib` of PyTorch's allocator,
        `outside_mib` beside it.
        """

    def outside(self) -> int:
        """Bytes in use on the device that PyTorch's allocator does not know of."""

    def settle(self) -> None:
        """Before a timed run: nothing of the last one is in the cache."""

    def trim(self) -> None:
        """Give unused memory back, so that one method's buffers do not stand in another's way."""

    def release(self) -> None:
        """The same after collecting garbage."""

    def free_bytes(self) -> int: ...

    def ceilings(self) -> dict[str, float]:
        """What this device can do, measured now: gemm_flops, copy_bytes and exps a second."""

    def describe(self) -> dict[str, Any]: ...

    def usable(self) -> bool:
        """False after an error that leaves the process without its device."""


def ignore(_: str) -> None:
    """A mark that nobody reads."""


class HostDevice:
    """The CPU in the GPU's place: every line of the benchmark but the CUDA calls can be tried with it."""

    name = "cpu"
    peak_mib = None

    def time(self, run: Run) -> dict[str, float]:
        laps: dict[str, float] = {}
        start = time.perf_counter()
        run(lambda name: laps.__setitem__(name, time.perf_counter() - start))
        return laps

    def memory(self, run: Run) -> dict[str, float]:
        gc.collect()
        before = common.resident_mib()
        common.reset_peak()
        run(ignore)
        return {"extra_mib": max(0.0, common.peak_mib() - before), "outside_mib": 0.0}

    def outside(self) -> int:
        return 0

    def settle(self) -> None:
        pass

    def trim(self) -> None:
        pass

    def release(self) -> None:
        gc.collect()

    def free_bytes(self) -> int:
        return 8 * 2**20  # a rehearsal stays small

    def ceilings(self) -> dict[str, float]:
        a, b = (torch.randn(256, 256).bfloat16() for _ in range(2))
        source = torch.randn(2**18)
        target = torch.empty_like(source)
        gemm = self.time(lambda mark: (a @ b, mark("end")))["end"]
        copy = self.time(lambda mark: (target.copy_(source), mark("end")))["end"]
        return {"gemm_flops": 2 * 256**3 / gemm, "copy_bytes": 2 * source.nbytes / copy, "exps": 1e9}

    def describe(self) -> dict[str, Any]:
        return {"name": "rehearsal on the CPU"}

    def usable(self) -> bool:
        return True


class CudaDevice:
    name = "cuda"
    peak_mib: float | None = None

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self._properties = properties
        cache = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def time(self, run: Run) -> dict[str, float]:
        events: dict[str, torch.cuda.Event] = {}
        start = torch.cuda.Event(enable_timing=True)

        def mark(name: str) -> None:
            events[name] = torch.cuda.Event(enable_timing=True)
            events[name].record()

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start.record()
        run(mark)
        torch.cuda.synchronize()
        self.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        return {name: start.elapsed_time(event) * 1e-3 for name, event in events.items()}

    def memory(self, run: Run) -> dict[str, float]:
        self.release()
        run(ignore)  # the allocator grows here and not below
        torch.cuda.synchronize()
        before, reserved, free = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), self.free_bytes()
        torch.cuda.reset_peak_memory_stats()
        lowest, finished = [free], threading.Event()

        def watch() -> None:
            while not finished.wait(5e-4):
                lowest[0] = min(lowest[0], self.free_bytes())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            run(ignore)
            torch.cuda.synchronize()
        finally:
            finished.set()
            watcher.join()
        grown = torch.cuda.memory_reserved() - reserved
        return {
            "extra_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
            "outside_mib": max(0, free - lowest[0] - grown) / 2**20,
        }

    def outside(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def settle(self) -> None:
        self._flush.zero_()

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def release(self) -> None:
        gc.collect()
        self.trim()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def ceilings(self) -> dict[str, float]:
        gemm_flops, clock = self._gemm_flops()
        copy_bytes = self._copy_bytes()
        self.release()
        exps = gpu_cells.exps_per_second(self._properties.multi_processor_count, clock)
        return {"gemm_flops": gemm_flops, "copy_bytes": copy_bytes, "exps": exps, "clock_mhz": clock}

    def _gemm_flops(self) -> tuple[float, float]:
        """Rate of a large product, and the clock in MHz while it works (not the one it idles at)."""
        a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))  # zeros would run faster
        c = torch.empty_like(a)
        seconds = self._median(lambda mark: (torch.mm(a, b, out=c), mark("end")))
        for _ in range(max(1, int(0.5 / seconds))):  # half a second of products hides the query
            torch.mm(a, b, out=c)
        smi = nvidia_smi()
        torch.cuda.synchronize()
        return 2 * 8192**3 / seconds, _number(smi.get("clocks.sm")) or _number(smi.get("clocks.max.sm"))

    def _copy_bytes(self) -> float:
        """Bytes read and written a second."""
        source = torch.randint(256, (min(2**31, self.free_bytes() // 8),), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._median(lambda mark: (target.copy_(source), mark("end")))

    def _median(self, run: Run) -> float:
        for _ in range(3):
            run(ignore)
        return statistics.median(self.time(run)["end"] for _ in range(10))

    def describe(self) -> dict[str, Any]:
        properties = self._properties
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            "cuda": torch.version.cuda,
            "nvidia_smi": nvidia_smi(),
        }

    def usable(self) -> bool:
        try:
            torch.cuda.synchronize()
        except Exception:  # whatever it is called in this version: the context is gone
            return False
        return True


def need_gpu() -> None:
    """Ends the program with one line where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: no NVIDIA GPU that PyTorch {torch.__version__} can use")


def make_device(rehearse: bool) -> Device:
    if rehearse:
        return HostDevice()
    need_gpu()
    return CudaDevice()


def nvidia_smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing where it does not answer."""
    query = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in run.stdout.strip().split(",")]
    names = NVIDIA_SMI.split(",")
    return dict(zip(names, values, strict=True)) if run.returncode == 0 and len(values) == len(names) else {}


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # "[N/A]"
        return 0.0


def failure(error: Exception) -> str:
    """One line of what went wrong; "out of memory" for every way to say so."""
    text = str(error).strip().splitlines()
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
