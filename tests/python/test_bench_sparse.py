"""test_bench_sparse.py -- the sparse head's GPU benchmark without a GPU: its sizes, its peers, its whole path."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import common  # noqa: E402
import gpu_report  # noqa: E402
import report  # noqa: E402
import scatter  # noqa: E402
import sparse_cells as cells  # noqa: E402
import sparse_gpu  # noqa: E402
from sparse_cells import BAGS, DENSE, FUSED, PLAIN, SCATTER, TORCH_DENSE, SparseCell  # noqa: E402

compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read as Linux reports it"
)
CEILINGS = {"gemm_flops": 8e14, "copy_bytes": 3e12, "exps": 4e12, "clock_mhz": 1980}


# The sizes


def test_grid_begins_with_the_paper_s_size_and_its_dense_counterpart():
    grid = cells.grid()
    assert grid[:2] == [SparseCell(670_091, 16384, 32), SparseCell(670_091, 768, 32, fan_in=0)]
    assert len(set(grid)) == len(grid)
    assert all(cell.fan_in or cell.features == 768 for cell in grid)


def test_methods_of_a_cell():
    assert cells.methods_of(SparseCell(9, 9, 9), cells.METHODS) == [FUSED, PLAIN, SCATTER, BAGS]
    assert cells.methods_of(SparseCell(9, 9, 9, group=4), cells.METHODS) == [FUSED, PLAIN]
    assert cells.methods_of(SparseCell(9, 9, 9, fan_in=0), cells.METHODS) == [DENSE, TORCH_DENSE]
    assert cells.methods_of(SparseCell(9, 9, 9), [SCATTER, DENSE]) == [SCATTER]


def test_floors_of_bytes_and_flops():
    connections = 670_091 * 32
    found = cells.floors(SparseCell(670_091, 16384, 32), CEILINGS)
    assert found["bytes_s"] == pytest.approx(connections * (2 + 2 + 2) / 3e12)
    assert found["flops_s"] == pytest.approx(6 * connections * 32 / 8e14)
    assert found["floor_s"] == found["bytes_s"] > found["flops_s"]
    assert found["gathered_bytes"] == 4 * connections * 32 * 2
    shared = cells.floors(SparseCell(670_096, 70_000, 32, group=16, dtype="float32"), CEILINGS)
    assert shared["bytes_s"] == pytest.approx(670_096 * 32 * (8 + 4 / 16) / 3e12)
    assert shared["gathered_bytes"] == 4 * 670_096 * 2 * 32 * 4
    dense = cells.floors(SparseCell(670_091, 768, 256, fan_in=0), CEILINGS)
    assert dense["bytes_s"] == pytest.approx(2 * 670_091 * 768 * 2 / 3e12) and dense["gathered_bytes"] == 0
    assert dense["flops_s"] == pytest.approx(6 * 670_091 * 768 * 256 / 8e14)


# The peers


@compiler
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scatter_kernels_are_the_scattered_product(dtype, wide):
    """Compiled for the host by the emulation; classes that fill no block, and inputs that several classes share."""
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(300, 40, generator=generator).argsort(1)[:, :7].sort(1).values
    weight, hidden = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((300, 7), (5, 40)))
    bias, grad = torch.randn(300, generator=generator), torch.randn(5, 300, generator=generator)
    grad[:, ::3] = 0
    stored = index.to(torch.int32 if wide else torch.uint16)
    dense = torch.zeros(300, 40, dtype=torch.float64).scatter(1, index, weight.double()).requires_grad_()
    x = hidden.double().requires_grad_()
    want = x @ dense.T + bias.double()
    want.backward(grad.double())
    got = scatter.logits(hidden, weight, stored, bias)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)
    grad_hidden, grad_weight = scatter.gradients(hidden, weight, stored, grad)
    assert torch.allclose(grad_hidden.double(), x.grad, rtol=1e-5, atol=1e-4)
    assert torch.allclose(grad_weight.double(), dense.grad.gather(1, index), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="contiguous"):
        scatter.logits(hidden.T.contiguous().T, weight, stored, bias)


def test_scatter_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    """With the command that a machine with one runs."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    out = tmp_path / "library.so"
    done = subprocess.run(scatter.compiler_words(True, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and out.exists()


def test_no_compiler_is_said(monkeypatch, tmp_path):
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    with pytest.raises(scatter.Missing, match=r"no C\+\+ compiler"):
        scatter.compiler_words(False, tmp_path / "out")
    if not os.path.exists("/usr/local/cuda/bin/nvcc"):
        with pytest.raises(scatter.Missing, match="no nvcc"):
            scatter.compiler_words(True, tmp_path / "out")


@pytest.mark.parametrize(
    "cell",
    [
        SparseCell(301, 40, 6, fan_in=5, dtype="float32"),
        SparseCell(300, 40, 6, fan_in=5, group=4, dtype="float32"),
        SparseCell(301, 12, 6, fan_in=0, dtype="float32"),
    ],
)
def test_reference_in_chunks_is_the_dense_loss(cell):
    case = sparse_gpu.make_case(cell, "cpu")
    weight = case.weight
    if case.index is not None:
        index = case.index.long().repeat_interleave(cell.group, 0)[: cell.classes]
        weight = torch.zeros(cell.classes, cell.features).scatter(1, index, weight)
    hidden = case.hidden.clone().requires_grad_()
    sign = torch.full((cell.batch, cell.classes), -1.0).scatter(1, case.labels, 1.0)
    loss = (1 - sign * (hidden @ weight.T + case.bias)).relu().square().sum() / cell.batch
    loss.backward()
    assert sparse_gpu.hinge(hidden @ weight.T + case.bias, case.labels).item() == pytest.approx(loss.item(), rel=1e-5)
    for chunk in (2**30, 4 * cell.batch * 40 * 30):
        found = sparse_gpu.reference(case, chunk)
        assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert torch.allclose(found.grad_hidden, hidden.grad, rtol=1e-4, atol=1e-5)


# The whole path


def options(**more):
    return argparse.Namespace(**{"budget": 1000.0, "methods": cells.METHODS, "rehearse": True, **more})


@linux
@compiler
def test_rehearsal_measures_and_checks_every_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert sparse_gpu.run_grid(options()) == 0
    found = common.read("sparse_gpu_rehearsal")
    assert [c["classes"] for c in found["cells"]] == [700, 700, 500] and found["left_out"] == []
    for record, cell in zip(found["cells"], cells.rehearsal(), strict=True):
        assert list(record["methods"]) == cells.methods_of(cell, cells.METHODS)
        for name, method in record["methods"].items():
            assert method["exact"] and method["runs"] > 1, (name, method)
            assert ("gradient_ms" in method) == (name not in (FUSED, DENSE))
        assert ("rewire_ms" in record) == ("draw_ms" in record) == (cell.fan_in > 0)
    text = gpu_report.sparse_gpu_tables(found | {"gpu": {"name": "A card"}, "ceilings": CEILINGS})
    assert "| 700 classes, 6 of 64, batch 8, float32 |" in text and "A card" in text


@linux
def test_a_method_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def refused(gpu):
        raise scatter.Missing("no nvcc")

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(cells, "rehearsal", lambda: [SparseCell(200, 30, 4, fan_in=5, dtype="float32")])
    monkeypatch.setattr(scatter, "library", refused)
    bags = sparse_gpu._plain
    monkeypatch.setattr(sparse_gpu, "_plain", lambda case, logits: doubled(bags(case, logits)))
    assert sparse_gpu.run_grid(options()) == 0
    methods = common.read("sparse_gpu_rehearsal")["cells"][0]["methods"]
    assert methods[SCATTER] == {"failed": "not compiled: no nvcc"}
    assert not methods[BAGS]["exact"] and methods[FUSED]["exact"]


def doubled(step):
    def run(mark):
        result = step(mark)
        return result._replace(grad_hidden=2 * result.grad_hidden)

    return run


def test_no_time_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert sparse_gpu.run_grid(options(budget=-1.0)) == 1
    found = common.read("sparse_gpu_rehearsal")
    assert found["cells"] == [] and len(found["left_out"]) == 3


def test_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        sparse_gpu.main([])


def result():
    cell = SparseCell(670_091, 16384, 32)
    record = {
        **{key: getattr(cell, key) for key in SparseCell.__dataclass_fields__},
        "floors": cells.floors(cell, CEILINGS),
        "methods": {
            FUSED: {"step_ms": 1.5, "exact": True, "extra_mib": 40.0, "outside_mib": 2.0},
            SCATTER: {"gradient_ms": 20.0, "step_ms": 21.0, "exact": False, "extra_mib": 300.0, "outside_mib": 0.0},
            BAGS: {"failed": "out of memory"},
        },
        "rewire_ms": 0.75,
        "draw_ms": 0.5,
    }
    machine = {"versions": {"torch": "2.11.0"}, "commit": "abc", "date": "2026-01-01"}
    return {"cells": [record], "left_out": [], "ceilings": CEILINGS, "machine": machine, "gpu": {"name": "A card"}}


def test_tables(tmp_path, monkeypatch, capsys):
    text = gpu_report.sparse_gpu_tables(result())
    rows = [line for line in text.splitlines() if line.startswith("| 670,091 classes")]
    times = [part.strip() for part in rows[0].strip("|").split("|")]
    assert times[1:] == ["1.50", "~20.00 / 21.00", "0.04", "5.5", "0.75", "0.50"]
    memory = [part.strip() for part in rows[1].strip("|").split("|")]
    assert memory[1:] == ["82", "42", "300"]
    assert "torch embedding_bag: out of memory" in text
    assert "No cell" in gpu_report.sparse_gpu_tables({**result(), "cells": []})
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "--gpu", "--readme"])
    (tmp_path / "GPU.md").write_text("<!-- gpu-sparse-table -->\nold\n<!-- /gpu-sparse-table -->\n")
    common.write("sparse_gpu", result())
    report.main()
    assert "670,091" in capsys.readouterr().out and "670,091" in (tmp_path / "GPU.md").read_text()


def test_gpu_page_has_the_marks():
    text = (ROOT / "GPU.md").read_text(encoding="utf-8")
    assert text.count("<!-- gpu-sparse-table -->") == text.count("<!-- /gpu-sparse-table -->") == 1
