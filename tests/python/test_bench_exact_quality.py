"""test_bench_exact_quality.py -- quality of the exact head: metrics, model, choice by validation, the example."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from widehead import data

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "examples")]

import common  # noqa: E402
import exact_quality as bench  # noqa: E402
import implicit_feedback  # noqa: E402
import losses_run  # noqa: E402
import recommend_run  # noqa: E402

SETTINGS = {**bench.TOWER, "dim": 6, "batch_size": 32, "epochs": 40, "lr": 10.0}


@pytest.fixture
def folder(tmp_path):
    """Users of six kinds, each with ten items of its own; a user has five of them and one of anyone's."""
    out = tmp_path / "gowalla"
    out.mkdir()
    rng = np.random.default_rng(0)
    lines: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for user in range(240):
        own = rng.permutation(10) + 10 * (user % 6)
        parts = {"train": [*own[:5], (user * 7) % 60], "valid": own[5:7], "test": own[7:]}
        for part, items in parts.items():
            lines[part].append(
                " ".join(map(str, [user, *sorted(set(items) - (set(own[5:]) if part == "train" else set()))]))
            )
    for part, text in lines.items():
        (out / f"{part}.txt").write_text("\n".join(text) + "\n")
    return out


def by_hand(scores, train, held, k=20):
    """Recall and NDCG of one user after another, as the equations say."""
    recalls, ndcgs = [], []
    for user in range(train.shape[0]):
        wanted = set(held[[user]].indices.tolist())
        if not wanted:
            continue
        known = set(train[[user]].indices.tolist())
        order = [i for i in np.argsort(-scores[user], kind="stable").tolist() if i not in known][:k]
        hits = [i in wanted for i in order]
        recalls.append(sum(hits) / len(wanted))
        ideal = sum(1 / np.log2(2 + j) for j in range(min(k, len(wanted))))
        ndcgs.append(sum(h / np.log2(2 + j) for j, h in enumerate(hits)) / ideal)
    return {"Recall@20": np.mean(recalls), "NDCG@20": np.mean(ndcgs)}


def test_the_metrics_are_those_of_their_definition():
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((50, 80)).astype(np.float32)
    train = sp.csr_array((rng.random((50, 80)) < 0.2).astype(np.float32))
    held = sp.csr_array((rng.random((50, 80)) < 0.4) * (train.toarray() == 0) * (np.arange(50) % 5 > 0)[:, None])
    assert np.diff(held.indptr).max() > 20 and (np.diff(held.indptr) == 0).sum() == 10
    factor = rng.random(80).astype(np.float32)
    found = recommend_run.measure(lambda users: scores[users], train, held, [np.ones(80), factor])
    for one, own in zip(found, (scores, scores * factor), strict=True):
        want = by_hand(own, train, held)
        assert one == pytest.approx(want, rel=1e-12) and 0 < one["NDCG@20"] < 1


def test_tuning_sees_no_test_data_and_the_final_run_sees_all(folder):
    train, valid = recommend_run.split(folder, validation=True)
    both, test = recommend_run.split(folder, validation=False)
    assert train.shape == both.shape == test.shape == (240, 60)
    assert (both != train + valid).nnz == 0 and test.multiply(both).nnz == 0
    assert test.nnz == 3 * 240


def test_a_random_start_reaches_the_optimum_that_the_singular_vectors_give(folder):
    parts = recommend_run.split(folder, validation=True)
    best = recommend_run.run({**SETTINGS, "start": "svd", "epochs": 1, "lr": 0.0}, *parts, validation=True)
    found = recommend_run.run(SETTINGS, *parts, validation=True)
    (least,) = best["epoch_loss"]
    assert least * 0.999 < found["epoch_loss"][-1] < least * 1.02 < found["epoch_loss"][0]
    assert found["by_power"]["0.3"]["Recall@20"] > 0.95
    # A user has some 5.8 of 60 items, so a list of 20 has a third of the rest by chance.
    chance = recommend_run.run({**SETTINGS, "epochs": 0}, *parts, validation=True)
    assert chance["by_power"]["0.3"]["Recall@20"] < 0.7


def test_the_loss_weighs_observed_pairs(folder):
    train, _ = recommend_run.split(folder, validation=True)
    model = recommend_run.Model({**SETTINGS, "w": 0.7}, train)
    rows = model.x[np.arange(9)]
    o, x = (rows @ model.tower.detach().numpy()) @ model.head.weight.detach().numpy().T, rows.toarray()
    want = np.where(x > 0, 1.7 * (o - x) ** 2, o**2).sum() / 9
    assert model.step(rows, 0.0) == pytest.approx(want, rel=1e-4)


def test_clipping_bounds_the_step_of_tower_and_head_together(folder):
    train, _ = recommend_run.split(folder, validation=True)
    model = recommend_run.Model({**SETTINGS, "clip": 1e-3}, train)
    before = [model.tower.detach().clone(), model.head.weight.detach().clone()]
    model.step(model.x[np.arange(9)], 2.0)
    moved = [
        (new.detach() - old).norm().item() for new, old in zip([model.tower, model.head.weight], before, strict=True)
    ]
    assert min(moved) > 1e-5 and np.hypot(*moved) == pytest.approx(2e-3, rel=1e-2)


def test_dropout_leaves_inputs_out_and_keeps_their_mean(folder):
    train, _ = recommend_run.split(folder, validation=True)
    model = recommend_run.Model({**SETTINGS, "dropout": 0.25}, train)
    plain = model.x @ model.tower.detach().numpy()
    draws = np.stack([model.hidden(model.x).detach().numpy() for _ in range(200)])
    error = draws.std(0) / 200**0.5
    assert error.max() > 0 and (np.abs(draws.mean(0) - plain) < 6 * error + 1e-6).all()


@pytest.mark.parametrize("method", bench.LOSSES)
def test_a_run_of_every_loss_learns(method):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 6, 300)
    labels = sp.csr_array((np.ones(300), y, np.arange(301)), shape=(300, 6))
    features = sp.csr_array((np.ones(300, np.float32), y, np.arange(301)), shape=(300, 6))
    part = data.Dataset(labels=labels, features=features)
    shared = {**bench.SHARED, "tower_lr": 0.03, "dim": 8, "dropout": 0.0, "batch_size": 20, "epochs": 20, "ks": [1]}
    found = losses_run.train({**shared, **bench.LOSSES[method][1]}, part, part)
    assert found["metrics"]["P@1"] > 0.9
    assert len(found["epoch_loss"]) == 20 and found["epoch_loss"][-1] < found["epoch_loss"][0]


def test_rare_words_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.LEAST, "words", 2)
    folder = tmp_path / "words"
    folder.mkdir()
    lines = ["red apple\tfruit", "red brick\tstone|clay", "red pear\tstone|fruit", "red clod\tclay|soil|clay"]
    (folder / "train.tsv").write_text("".join(f"x\t{line}\n" for line in [*lines, "red tree\twood"]))
    (folder / "test.tsv").write_text("x\tred pear\tfruit|soil\nx\tred tree\twood\n")
    train, test = losses_run.parts(folder, validation=False)
    assert train.labels.toarray().tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]]  # clay, fruit, stone
    assert test.labels.toarray().tolist() == [[0, 1, 0]]


def test_the_best_by_validation_is_tested_and_nothing_runs_twice(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    calls = []

    def child(words):
        settings = json.loads(words[3])
        calls.append((settings["w"], settings["dim"], "--validation" in words, settings["powers"]))
        good = 0.5 + settings["w"]
        by_power = {str(p): {"Recall@20": good - abs(p - 0.3), "NDCG@20": 0.1} for p in settings["powers"]}
        return {"by_power": by_power, "cpu_s": 3.0}

    monkeypatch.setattr(bench, "child", child)
    monkeypatch.setattr(bench, "RECOMMENDERS", {"a": [{**SETTINGS, "w": w} for w in (0.1, 0.2)]})
    monkeypatch.setattr(bench, "LIKE", {"b": ("a", {"dim": 9})})
    monkeypatch.setattr(bench, "EVERY", ["a", "b"])
    for _ in range(2):
        bench.recommend(bench.Log(), folder, None, ["a", "b"])
        tuning = [(w, 6, True, bench.TOWER["powers"]) for w in (0.1, 0.2)]
        assert calls == [*tuning, (0.2, 6, False, [0.3]), (0.2, 9, False, [0.3])]
    lines = bench.report(common.read("exact_quality")).splitlines()
    assert lines[-2] == "| a | 70.00 | 10.00 | 3 |" and lines[-1] == "| b | 70.00 | 10.00 | 3 |"
    assert "| SimpleX | 18.72 | 15.57 | - |" in lines


def test_every_method_has_a_grid_and_a_place_in_the_tables():
    grids = {**bench.RECOMMENDERS, **bench.PEERS, **bench.LOSSES}
    assert sorted(bench.EVERY) == sorted({*grids, *bench.LIKE}) and all(grids.values())
    assert all(of in grids for of, _ in bench.LIKE.values())


def test_a_failed_run_is_named_and_tried_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    call = ("recommend_run.py", folder, "tune", "a")
    run = bench.run_script(bench.Log(), *call, {**SETTINGS, "dim": 0})
    assert run["failed"] and "metrics" not in run
    monkeypatch.setattr(bench, "child", lambda words: {"by_power": {"0.3": {"Recall@20": 0.5, "NDCG@20": 0.4}}})
    assert bench.run_script(bench.Log(), *call, {**SETTINGS, "dim": 0})["power"] == 0.3
    kept = [r for r in common.read("exact_quality")["runs"] if r["settings"].get("dim") == 0]
    assert len(kept) == 1 and "failed" not in kept[0]


def test_the_example_beats_the_most_popular_items(folder, capsys):
    words = [str(folder), "--dim", "8", "--epochs", "30", "--batch-size", "20", "--alpha", "0.2", "--lr", "0.02"]
    ours, popular = implicit_feedback.main(words)
    assert ours > 0.95 and 0.1 < popular < 0.7
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 31 and printed[-1].startswith("240 users, 60 items: recall@20 ")
    assert implicit_feedback.read(folder, "train", 3) == implicit_feedback.read(folder, "train", None)[:3]
