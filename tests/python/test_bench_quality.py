"""test_bench_quality.py -- the quality benchmark: its data, its choice by validation, its log and its tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from widehead import data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import common  # noqa: E402
import quality_data  # noqa: E402
import quality_run  # noqa: E402
import sparse_quality as bench  # noqa: E402

METRICS = {"P@1": 0.5, "P@3": 0.4, "P@5": 0.3}


def toy(n, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 6, n)
    x = sp.csr_array((np.full(2 * n, 2.0), np.stack([y, 6 + y], 1).ravel(), np.arange(0, 2 * n + 1, 2)), shape=(n, 12))
    return x, sp.csr_array((np.ones(n), y, np.arange(n + 1)), shape=(n, 6))


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "debdeps"
    out.mkdir()
    for part, n, seed in (("train", 200, 0), ("test", 40, 1)):
        x, y = toy(n, seed)
        data.save_matrix(out / f"X.{part}.npz", x)
        data.save_matrix(out / f"Y.{part}.npz", y)
    return out


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return bench.Log()


def test_rows_have_unit_length_and_tuning_sees_no_test_data(folder):
    train, test = quality_data.split(folder, validation=False)
    assert len(train) == 200 and len(test) == 40
    np.testing.assert_allclose(sp.linalg.norm(train.features, axis=1), 1, rtol=1e-6)
    part, held = quality_data.split(folder, validation=True)
    assert len(part) == 180 and len(held) == 20
    again, _ = quality_data.split(folder, validation=True)
    assert (again.labels != part.labels).nnz == 0
    whole = np.bincount(train.labels.indices, minlength=6)
    assert np.array_equal(whole, np.bincount(part.labels.indices, minlength=6) + np.bincount(held.labels.indices))


def test_texts_become_words(tmp_path):
    (tmp_path / "train.tsv").write_text("Red apple\t0\nred brick, red\t1\nred pear pear\t2\npear alone\t2\n")
    (tmp_path / "test.tsv").write_text("a red pear\t1\n")
    train, test = quality_data.load(tmp_path)
    # "red" and "pear" stand in at least two texts; in three of four, and in two of four
    idf = np.log([4 / 3, 4 / 2])
    row = idf * [1, 1 + np.log(2)]
    np.testing.assert_allclose(train.features[[2]].toarray(), [row / np.linalg.norm(row)], rtol=1e-6)
    np.testing.assert_allclose(test.features.toarray(), [idf / np.linalg.norm(idf)], rtol=1e-6)
    assert train.n_labels == test.n_labels == 3


def test_a_run_measures_the_model_and_its_memory(folder):
    part, test = quality_data.split(folder, validation=False)
    settings = bench.settings_of("debdeps", "x", {**bench.sparse(16, 8), "lr": 0.03}, 6)
    settings["batch_size"] = 16
    found = quality_run.train(settings, part, test)
    assert found["metrics"]["P@1"] > 0.9 and found["metrics"]["P@5"] <= 0.2
    assert found["head_bytes"] == {"weight": 6 * 8 * 4 + 6 * 4, "index": 6 * 8 * 2, "state": 2 * (6 * 8 * 4 + 6 * 4)}
    assert found["first_layer_bytes"] == {"weight": 12 * 16 * 4, "state": 2 * 12 * 16 * 4}
    assert len(found["epoch_loss"]) == 6 and found["epoch_loss"][-1] < found["epoch_loss"][0]
    dense = quality_run.Model("dense", loss="squared_hinge", intermediate=8, lr=1e-9, epochs=1)
    dense.fit(part.features, part.labels)
    np.testing.assert_allclose(dense.head_.bias, -1.0, atol=1e-6)


def test_the_best_by_validation_is_tested_and_nothing_runs_twice(folder, log, monkeypatch):
    calls = []

    def child(words):
        settings = json.loads(words[3])
        calls.append((settings["lr"], settings["epochs"], "--validation" in words))
        figure = {0.1: 0.2, 0.2: 0.6, 0.3: 0.4}[settings["lr"]]
        return {"metrics": {"P@1": 1 - figure, "P@3": figure, "P@5": 0.0}}

    monkeypatch.setattr(bench, "child", child)
    grid = [{**bench.sparse(8, 4), "lr": lr} for lr in (0.1, 0.2, 0.3)]
    monkeypatch.setattr(bench, "GRIDS", {"a": grid})
    monkeypatch.setattr(bench, "LIKE", {"b": ("a", bench.sparse(8, 4, 2))})
    words = ["x", "--data", str(folder.parent), "--set", "debdeps"]
    monkeypatch.setattr(sys, "argv", words)
    tuning, epochs = (bench.SETS["debdeps"][name] for name in ("tuning", "epochs"))
    want = [(lr, tuning, True) for lr in (0.1, 0.2, 0.3)] + [(0.2, epochs, False)] * 2
    for _ in range(2):
        monkeypatch.setattr(bench, "report", lambda result: "")
        bench.main()
        assert calls == want
    tested = [run for run in common.read("sparse_quality")["runs"] if run["stage"] == "test"]
    assert [run["settings"]["head_options"]["group_size"] for run in tested] == [1, 2]
    assert all(run["settings"]["lr"] == 0.2 for run in tested)


def test_a_failed_run_is_named_and_tried_again(folder, log, monkeypatch):
    settings = bench.settings_of("debdeps", "x", {**bench.sparse(8, 9), "lr": 0.1}, 1)
    run = bench.run_ours(log, folder, "test", "x", settings)
    assert "fan_in" in run["failed"]
    monkeypatch.setattr(bench, "child", lambda words: {"metrics": METRICS})
    assert bench.run_ours(log, folder, "test", "x", settings)["metrics"] == METRICS
    assert bench.run_ours(bench.Log(), folder, "test", "x", settings)["metrics"] == METRICS
    (kept,) = common.read("sparse_quality")["runs"]
    assert kept["metrics"] == METRICS and "failed" not in kept


def test_the_table(monkeypatch):
    shared = {"set": "debdeps", "stage": "test", "metrics": METRICS, "peak_mib": 100.0, "cpu_s": 12.0}
    sizes = {"head_bytes": {"weight": 2**20, "state": 2**20}, "first_layer_bytes": {"weight": 2**19, "state": 0}}
    big = {"head_bytes": {"weight": 8 * 2**20, "state": 0}, "first_layer_bytes": {"weight": 2**19, "state": 0}}
    runs = [
        {**shared, "method": "Omikuji"},
        {**shared, **sizes, "method": "small", "cpu_s_per_epoch": 2.0},
        {**shared, **big, "method": "dense", "cpu_s_per_epoch": 2.0},
        {**shared, "method": "dense", "failed": "no memory"},
        {**shared, **sizes, "method": "small", "stage": "tune"},
    ]
    monkeypatch.setattr(bench, "GRIDS", {"dense": [], "small": []})
    lines = bench.report({"runs": runs}).splitlines()
    assert lines[0] == "### debdeps" and len(lines) == 7
    assert lines[4] == "| dense | 50.00 | 40.00 | 30.00 | 8.0 | 1.000 | 0.5 | 100 | 2.0 | 12 |"
    assert lines[5] == "| small | 50.00 | 40.00 | 30.00 | 2.0 | 0.250 | 0.5 | 100 | 2.0 | 12 |"
    assert lines[6] == "| Omikuji | 50.00 | 40.00 | 30.00 | - | - | - | 100 | - | 12 |"
