"""test_bench_cells.py -- the GPU benchmark's pure parts: what it measures in which order, its floors, its tables."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import common  # noqa: E402
import gpu_cells as cells  # noqa: E402
import gpu_report  # noqa: E402
import report  # noqa: E402
from gpu_cells import CCE, COMPILED, FUSED, LIGER, PLAIN, TORCH, Budget, Cell  # noqa: E402

CEILINGS = {"gemm_flops": 8e14, "copy_bytes": 3e12, "exps": 4e12, "clock_mhz": 1980}

# The grid


def test_grid_begins_with_what_matters():
    grid = cells.grid()
    assert grid[:4] == [Cell(2**17, 4096, 8192), Cell(2**20, 256, 8192), Cell(2**20, 64, 8192), Cell(2**22, 64, 8192)]
    assert len(grid) == len(set(grid)) == 20
    assert {c.classes for c in grid} == {2**17, 2**20, 2**22}
    assert {(c.classes, c.batch) for c in grid if c.features == 4096} == {(2**17, 8192), (2**17, 1024)}
    later = [c.classes for c in grid[5:]]
    assert later == sorted(later)


def test_labels():
    assert Cell(2**17, 4096, 8192).label == "128k x 4096, batch 8192"
    assert Cell(2**22, 64, 1024).label == "4M x 64, batch 1024"
    assert Cell(1000, 16, 32).label == "1,000 x 16, batch 32"


def test_slow_compilers_run_in_the_leading_cells_only():
    first, last = cells.grid()[0], cells.grid()[-1]
    assert cells.methods_of(first, cells.METHODS, False) == list(cells.METHODS)
    assert COMPILED not in cells.methods_of(last, cells.METHODS, False)
    assert {FUSED, PLAIN, TORCH, LIGER} <= set(cells.methods_of(last, cells.METHODS, False))
    assert cells.methods_of(last, cells.METHODS, True) == list(cells.METHODS)
    assert cells.methods_of(first, [TORCH], False) == [TORCH]


# The budget


def test_budget_counts_down():
    now = [50.0]
    budget = Budget(10.0, lambda: now[0])
    assert budget.allows(10.0) and not budget.allows(10.5)
    now[0] = 58.0
    assert budget.left() == 2.0 and not budget.allows(3.0)


def test_least_seconds_grows_with_the_work():
    small, large = Cell(2**17, 64, 1024), Cell(2**22, 1024, 8192)
    least = [cells.least_seconds(c, [FUSED, TORCH], 8e14) for c in (small, large)]
    assert least[0] < 0.6
    assert least[1] == pytest.approx(0.5 + 4 * 3 * 6 * 8192 * 2**22 * 1024 / 8e14)
    assert cells.least_seconds(small, [FUSED, COMPILED], 8e14) == pytest.approx(least[0] + 2, abs=0.1)


@pytest.mark.parametrize("seconds", [1e-5, 1e-3, 0.02, 0.05, 0.15, 0.3, 2.0])
def test_runs_keep_to_their_share(seconds):
    turns, count = cells.runs_for(seconds, 0.6)
    assert turns >= 1 and 1 <= count <= 7
    # One more run opens each turn.
    assert turns * (count + 1) * seconds <= 0.6 or (turns, count) == (1, 1) or count == 1


def test_floors():
    cell = Cell(2**20, 256, 8192)
    found = cells.floors(cell, CEILINGS)
    assert found["bytes_s"] == pytest.approx(3 * 2**20 * 256 * 2 / 3e12)
    assert found["flops_s"] == pytest.approx(4 * 2 * 8192 * 2**20 * 256 / 8e14)
    assert found["exps_s"] == pytest.approx(2 * 8192 * 2**20 / 4e12)
    assert found["floor_s"] == found["flops_s"]
    assert cells.floors(Cell(2**20, 16, 8192), CEILINGS)["floor_s"] == pytest.approx(2 * 8192 * 2**20 / 4e12)
    assert cells.floors(Cell(2**20, 16, 1), CEILINGS)["floor_s"] == pytest.approx(3 * 2**20 * 16 * 2 / 3e12)
    assert cells.floors(cell, {**CEILINGS, "exps": 0.0})["exps_s"] == 0.0
    assert cells.exps_per_second(132, 1980) == 16 * 132 * 1.98e9


@pytest.mark.parametrize(
    ("free", "want"),
    [(149e9, 100_000_000), (84e9, 59_000_000), (2e9, 1_000_000), (8 * 2**20, 5898), (10, 1)],
)
def test_headline_size_follows_the_memory(free, want):
    classes = cells.headline_classes(int(free), 512)
    assert classes == want
    assert classes == 1 or classes * 1024 <= 0.72 * free


# A process that dies


def unfinished():
    record = {**cells.record_of(Cell(10, 2, 3), {}), "floors": {}}
    record["methods"] = {FUSED: {"step_ms": 1.0}, CCE: {"failed": "out of memory"}}
    return {"cells": [], "at": record}


def test_the_method_at_work_is_blamed_and_the_rest_measured_again():
    result = unfinished()
    result["at"]["running"] = TORCH
    cells.blame(result, "the process ended with -11")
    assert result["cells"] == []
    record = cells.record_of(Cell(10, 2, 3), result)
    assert record["methods"] == {CCE: {"failed": "out of memory"}, TORCH: {"failed": "the process ended with -11"}}
    assert cells.record_of(Cell(10, 2, 4), result)["methods"] == {}


def test_a_cell_that_kills_by_itself_is_not_tried_again():
    result = unfinished()
    cells.blame(result, "the process ended with 1")
    assert result["cells"][0]["failed"] == "the process ended with 1" and result["at"] is None
    assert cells.remaining([Cell(10, 2, 3), Cell(10, 2, 4)], result) == [Cell(10, 2, 4)]
    before = copy.deepcopy(result)
    cells.blame(result, "again")
    assert result == before


def test_what_was_measured_of_the_last_cell_counts():
    result = unfinished()
    cells.keep_unfinished(result)
    assert [cell["methods"][FUSED] for cell in result["cells"]] == [{"step_ms": 1.0}]
    nothing = {"cells": [], "at": cells.record_of(Cell(10, 2, 3), {})}
    cells.keep_unfinished(nothing)
    assert nothing == {"cells": []}


def test_summary_takes_medians():
    found = cells.summary({"gradient": [0.002, 0.001, 0.009], "step": [0.004, 0.003, 0.012]})
    assert found == {"gradient_ms": 2.0, "step_ms": 4.0, "spread": 4.0, "runs": 3}


# The tables


def method(step, gradient=None, exact=True, extra=100.0):
    found = {"step_ms": step, "exact": exact, "extra_mib": extra, "outside_mib": 20.0}
    return found if gradient is None else found | {"gradient_ms": gradient}


def result():
    cell = Cell(2**20, 256, 8192)
    record = cells.record_of(cell, {}) | {"floors": cells.floors(cell, CEILINGS)}
    record["methods"] = {
        FUSED: method(25.0),
        PLAIN: method(30.0, 28.5, extra=600.0),
        TORCH: {"failed": "out of memory"},
        CCE: method(50.0, 48.0),
        cells.CCE_FILTERED: method(20.0, 18.0, exact=False),
        LIGER: {"failed": "not installed: no such module"},
        COMPILED: method(1234.5, 1200.0),
    }
    machine = {"versions": {"torch": "2.11.0", "triton": "not installed"}, "commit": "abc", "date": "2026-01-01"}
    return {
        "cells": [record, cells.record_of(Cell(2**22, 64, 1024), {}) | {"failed": "the process ended with 1"}],
        "left_out": ["4M x 256, batch 8192"],
        "ceilings": CEILINGS,
        "machine": machine,
        "gpu": {"name": "A card", "cuda": "13.0", "nvidia_smi": {"driver_version": "580.1"}},
    }


def test_tables():
    text = gpu_report.gpu_tables(result())
    lines = text.splitlines()
    times = next(line for line in lines if line.startswith("| 1M x 256"))
    shown = [part.strip() for part in times.strip("|").split("|")]
    # PyTorch failed everywhere: it has no column, but a reason.
    assert shown == [
        "1M x 256, batch 8192", "25.00", "28.50 / 30.00", "48.00 / 50.00", "~18.00 / 20.00", "1,200 / 1,234",
        "**2.0x**", "528, 66%", "21.99",
    ]  # fmt: skip
    memory = [line for line in lines if line.startswith("| 1M x 256")][1]
    assert [part.strip() for part in memory.strip("|").split("|")][1:4] == ["512", "120", "620"]
    assert "Left out for time: 4M x 256, batch 8192." in text
    assert "torch: out of memory; liger_kernel: not installed: no such module" in text
    assert "A card, driver 580.1, CUDA 13.0: 800 TFLOP/s" in text and "torch 2.11.0; commit abc" in text
    assert "triton" not in text


def test_table_cells_of_methods_without_figures():
    assert gpu_report.shown_time({}) == ""
    assert gpu_report.shown_time({"failed": "out of memory"}) == "out of memory"
    assert gpu_report.shown_time({"failed": "no time left"}) == "no time"
    assert gpu_report.shown_time({"failed": "RuntimeError: CUDA error"}) == "failed"
    assert gpu_report.shown_memory({**method(1.0), "extra_mib": None}) == ""


def test_report_writes_the_tables_where_they_belong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "--gpu", "--readme"])
    (tmp_path / "GPU.md").write_text("before\n<!-- gpu-table -->\nold\n<!-- /gpu-table -->\nafter\n")
    report.main()
    assert "old" in (tmp_path / "GPU.md").read_text()  # nothing was measured yet
    common.write("dense_gpu", {"cells": [], "at": None})
    report.main()
    assert capsys.readouterr().out == ""
    common.write("dense_gpu", result())
    report.main()
    written = (tmp_path / "GPU.md").read_text()
    assert "| 1M x 256, batch 8192 |" in written and "old" not in written
    assert written.startswith("before\n") and written.endswith("after\n")


def test_gpu_page_has_the_marks():
    text = (ROOT / "GPU.md").read_text(encoding="utf-8")
    assert text.count("<!-- gpu-table -->") == text.count("<!-- /gpu-table -->") == 1
