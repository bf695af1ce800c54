"""test_bench_gpu.py -- the GPU benchmark's own path, on the CPU and on a pretended torch.cuda."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import common  # noqa: E402
import dense_gpu  # noqa: E402
import gpu_cells as cells  # noqa: E402
import gpu_device  # noqa: E402
import gpu_headline  # noqa: E402
import gpu_methods  # noqa: E402
import gpu_report  # noqa: E402
from gpu_cells import FUSED, LIGER, PLAIN, TORCH, Budget, Cell  # noqa: E402

linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read as Linux reports it"
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    yield tmp_path
    gc.unfreeze()


def options(*methods, **more):
    given = {"name": "rehearsal", "rehearse": True, "methods": list(methods), "every_method": False}
    return argparse.Namespace(**{**given, "classes": None, "repeats": 2, **more})


def fresh():
    common.write("rehearsal", {"cells": [], "at": None})


@linux
def test_rehearsal_measures_and_checks_every_cell(results, monkeypatch):
    def full():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    monkeypatch.setitem(gpu_methods.PEERS, cells.CHUNKED, full)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    fresh()
    dense_gpu.work(options(FUSED, PLAIN, TORCH, cells.CHUNKED, LIGER), Budget(1000.0))
    found = common.read("rehearsal")
    assert found["check"]["agrees"]
    assert [(c["classes"], c["features"], c["batch"]) for c in found["cells"]] == [(1000, 16, 32), (2000, 8, 16)]
    for cell in found["cells"]:
        methods = cell["methods"]
        assert methods[cells.CHUNKED] == {"failed": "out of memory"}
        assert methods[LIGER]["failed"].startswith("not installed")
        for name in (FUSED, PLAIN, TORCH):
            assert methods[name]["exact"], methods[name]
            assert methods[name]["runs"] > 1
            assert ("gradient_ms" in methods[name]) == (name != FUSED)
        assert cell["floors"]["floor_s"] == max(cell["floors"].values())
        assert "running" not in cell
    assert "| 1,000 x 16, batch 32 |" in gpu_report.gpu_tables(found)


@linux
def test_worker_goes_on_where_another_ended(results, monkeypatch):
    monkeypatch.setattr(gpu_methods, "agreement", lambda device: {"agrees": True})
    done = {**cells.record_of(cells.rehearsal()[0], {}), "methods": {"kept": {}}}
    at = cells.record_of(cells.rehearsal()[1], {}) | {"methods": {TORCH: {"failed": "the process ended with -6"}}}
    common.write("rehearsal", {"cells": [done], "at": at})
    dense_gpu.work(options(PLAIN, TORCH), Budget(1000.0))
    first, second = common.read("rehearsal")["cells"]
    assert first["methods"] == {"kept": {}}
    assert second["methods"][TORCH] == {"failed": "the process ended with -6"}
    assert second["methods"][PLAIN]["step_ms"] > 0


def test_device_lost_ends_the_worker_with_the_method_written_down(results, monkeypatch):
    def fault():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setitem(gpu_methods.PEERS, TORCH, fault)
    monkeypatch.setattr(gpu_methods, "agreement", lambda device: {"agrees": True})
    monkeypatch.setattr(gpu_device.HostDevice, "usable", lambda self: False)
    fresh()
    with pytest.raises(SystemExit) as caught:
        dense_gpu.work(options(TORCH, PLAIN), Budget(1000.0))
    assert caught.value.code == dense_gpu.LOST
    at = common.read("rehearsal")["at"]
    assert at["methods"] == {TORCH: {"failed": "RuntimeError: CUDA error: an illegal memory access was encountered"}}


def test_no_time_is_written_down(results, monkeypatch):
    monkeypatch.setattr(gpu_methods, "agreement", lambda device: {"agrees": True})
    fresh()
    dense_gpu.work(options(TORCH), Budget(-1.0))
    assert common.read("rehearsal")["cells"] == []


def test_worker_that_hangs_is_ended(results, monkeypatch):
    fresh()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert dense_gpu.attend(sleep, "rehearsal", 0.3) is None
    monkeypatch.setattr(dense_gpu, "STALL", 0.0)
    assert dense_gpu.attend(sleep, "rehearsal", 600.0) is None


def test_worker_exit_code_is_seen(results):
    fresh()
    assert dense_gpu.attend([sys.executable, "-c", "raise SystemExit(77)"], "rehearsal", 60.0) == 77


def test_disagreement_is_seen(monkeypatch):
    assert gpu_methods.agreement("cpu")["agrees"]
    right = gpu_methods.F.cross_entropy
    monkeypatch.setattr(gpu_methods.F, "cross_entropy", lambda *given: 1.05 * right(*given))
    assert not gpu_methods.agreement("cpu")["agrees"]


def test_reference_in_chunks_is_cross_entropy():
    case = gpu_methods.make_case(Cell(777, 24, 70), "cpu")
    hidden = case.hidden.float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden @ case.weight.float().T, case.target)
    loss.backward()
    found = gpu_methods.reference(case, chunk_bytes=4 * 70 * 100)
    assert float(found.loss) == pytest.approx(loss.item(), rel=1e-3)
    assert found.grad_hidden.shape == (64, 24)
    assert gpu_methods.relative(found.grad_hidden, hidden.grad[:64]) < 2e-3
    errors = gpu_methods.errors(gpu_methods.Result(loss.detach(), hidden.grad), found)
    assert gpu_methods.exact(errors)
    assert not gpu_methods.exact({**errors, "grad_error": float("nan")})
    assert not gpu_methods.exact({**errors, "loss_error": 0.02})


@linux
def test_headline_rehearsal(results):
    assert gpu_headline.headline(options(classes=3000)) == 0
    found = common.read("rehearsal_headline")
    assert (found["classes"], found["runs"], found["last_row_moved"]) == (3000, 2, True)
    assert found["peak_over_weights"] >= 1 and found["floors"]["floor_s"] > 0
    assert "3,000 classes, d = 16" in gpu_report.headline_line(found)


class PretendedCuda:
    """torch.cuda as far as CudaDevice uses it: each event is one second later, memory follows a script."""

    def __init__(self):
        self.clock, self.allocated, self.peak, self.reserved, self.free = 0.0, 100 << 20, 0, 200 << 20, 900 << 20

    class Event:
        def __init__(self, cuda):
            self.cuda = cuda

        def record(self):
            self.cuda.clock += 1.0
            self.at = self.cuda.clock

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    def install(self, monkeypatch):
        for name, value in {
            "Event": lambda enable_timing: self.Event(self),
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "memory_allocated": lambda: self.allocated,
            "memory_reserved": lambda: self.reserved,
            "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", self.allocated),
            "mem_get_info": lambda: (self.free, 1 << 30),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return gpu_device.CudaDevice.__new__(gpu_device.CudaDevice)


def test_events_and_peaks_of_the_gpu(monkeypatch):
    cuda = PretendedCuda()
    device = cuda.install(monkeypatch)

    def run(mark):
        cuda.peak = max(cuda.peak, cuda.allocated + (30 << 20))
        mark("gradient")
        mark("step")

    assert device.time(run) == {"gradient": 1.0, "step": 2.0}
    assert device.peak_mib == 30.0
    assert device.memory(run) == {"extra_mib": 30.0, "outside_mib": 0.0}
    assert device.outside() == (1 << 30) - (900 << 20) - (200 << 20)
    assert device.usable()


def test_memory_beside_the_allocator_is_counted(monkeypatch):
    cuda = PretendedCuda()
    device = cuda.install(monkeypatch)
    seen = threading.Event()

    def mem_get_info():
        if cuda.free == 850 << 20:
            seen.set()
        return cuda.free, 1 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)

    def run(mark):
        cuda.free = 850 << 20  # 50 MiB of the library's own, given back before the end
        if threading.active_count() > before:
            assert seen.wait(30)
        cuda.free = 900 << 20

    before = threading.active_count()
    assert device.memory(run) == {"extra_mib": 0.0, "outside_mib": 50.0}


def test_failures_are_one_line():
    assert gpu_device.failure(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")) == "out of memory"
    assert gpu_device.failure(RuntimeError("cudaMalloc: Out of memory")) == "out of memory"
    assert gpu_device.failure(ValueError("one\ntwo")) == "ValueError: one"
    assert gpu_device.failure(ValueError()) == "ValueError: "


def test_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_device.nvidia_smi() == {}
    line = "A card, 580.1, 81559, 1980, 2619, 1980, 2619, 120.5, 700, 41"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{line}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = gpu_device.nvidia_smi()
    assert (found["name"], found["driver_version"], found["clocks.sm"]) == ("A card", "580.1", "1980")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert gpu_device.nvidia_smi() == {}
