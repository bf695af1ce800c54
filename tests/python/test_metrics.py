"""test_metrics.py -- the ranking metrics against napkinXC and against a plain reading of their definitions."""

import importlib.util
import json
from math import log2
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from widehead import metrics

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "metrics_napkinxc.json").read_text())
NAMES = ("P", "nDCG", "PSP", "PSnDCG", "hit", "recall", "coverage")


def csr(rows, n_classes):
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.array([c for row in rows for c in sorted(row)], np.int64)
    return scipy.sparse.csr_array((np.ones(len(indices), np.float32), indices, indptr), shape=(len(rows), n_classes))


def plain(topk, truth, weights, k):
    """The metrics at 1..k by loops over rows, from their definitions."""
    sums = {name: [0.0] * k for name in NAMES}
    best = {name: [0.0] * k for name in NAMES}
    found = [set() for _ in range(k)]
    for row, true in zip(topk, truth, strict=True):
        row, true = [int(c) for c in row], set(true)
        perfect = sorted((weights[c] for c in true), reverse=True)
        for p in range(1, k + 1):
            hits = [j for j, c in enumerate(row[:p]) if c in true]
            ideal = sum(1 / log2(j + 2) for j in range(min(p, len(true)))) or 1.0
            sums["P"][p - 1] += len(hits) / p
            sums["hit"][p - 1] += bool(hits)
            sums["recall"][p - 1] += len(hits) / max(1, len(true))
            sums["nDCG"][p - 1] += sum(1 / log2(j + 2) for j in hits) / ideal
            sums["PSP"][p - 1] += sum(weights[row[j]] for j in hits)
            best["PSP"][p - 1] += sum(perfect[:p])
            sums["PSnDCG"][p - 1] += sum(weights[row[j]] / log2(j + 2) for j in hits) / ideal
            best["PSnDCG"][p - 1] += sum(w / log2(j + 2) for j, w in enumerate(perfect[:p])) / ideal
            found[p - 1] |= {row[j] for j in hits}
    n_seen = len(set().union(*map(set, truth)))
    out = {name: [value / len(topk) for value in sums[name]] for name in ("P", "nDCG", "hit", "recall")}
    for name in ("PSP", "PSnDCG"):
        out[name] = [s / b if b else 0.0 for s, b in zip(sums[name], best[name], strict=True)]
    out["coverage"] = [len(f) / max(1, n_seen) for f in found]
    return out


def run(topk, truth, weights, k, pieces=1):
    accumulator = metrics.MetricAccumulator((1, k), weights)
    for part in np.array_split(np.arange(len(topk)), pieces):
        accumulator.update(topk[part], truth[part] if not isinstance(truth, list) else [truth[i] for i in part])
    return accumulator.at_each_place()


def test_figures_of_napkinxc():
    topk = np.array(FIXTURE["topk"])
    matrix = csr(FIXTURE["truth"], FIXTURE["n_classes"])
    weights = metrics.inverse_propensity(matrix, FIXTURE["a"], FIXTURE["b"])
    np.testing.assert_allclose(weights, FIXTURE["inverse_propensity"], rtol=0, atol=1e-12)
    for truth in (matrix, FIXTURE["truth"]):
        for pieces in (1, 7):
            got = run(topk, truth, weights, topk.shape[1], pieces)
            for name in NAMES:
                np.testing.assert_allclose(got[name], FIXTURE["values"][name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.skipif(importlib.util.find_spec("napkinxc") is None, reason="napkinxc is not installed")
@pytest.mark.parametrize("seed", range(3))
def test_equals_napkinxc(seed):
    import napkinxc.metrics as peer

    rng = np.random.default_rng(seed)
    n, n_classes, k = 500, 211, 7
    truth = scipy.sparse.csr_matrix((rng.random((n, n_classes)) < 0.02).astype(float))
    topk = np.argsort(rng.random((n, n_classes)) - 0.5 * truth.toarray() * rng.random((n, n_classes)), axis=1)[:, :k]
    lists = topk.tolist()
    weights = peer.Jain_et_al_inverse_propensity(truth)
    got = run(topk, truth, metrics.inverse_propensity(truth), k, pieces=3)
    peers = {
        "P": peer.precision_at_k,
        "nDCG": peer.ndcg_at_k,
        "hit": peer.abandonment_at_k,
        "recall": peer.recall_at_k,
        "coverage": peer.coverage_at_k,
    }
    for name, function in peers.items():
        np.testing.assert_allclose(got[name], function(truth, lists, k=k), rtol=0, atol=1e-12, err_msg=name)
    for name, function in {"PSP": peer.psprecision_at_k, "PSnDCG": peer.psndcg_at_k}.items():
        np.testing.assert_allclose(got[name], function(truth, lists, weights, k=k), rtol=0, atol=1e-12, err_msg=name)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_plain_definitions(data):
    n_classes = data.draw(st.integers(1, 12))
    classes = st.integers(0, n_classes - 1)
    truth = data.draw(st.lists(st.lists(classes, unique=True, max_size=6), min_size=1, max_size=9))
    k = data.draw(st.integers(1, 6))
    lists = [data.draw(st.lists(classes, unique=True, max_size=k)) for _ in truth]
    topk = np.array([row + [-1] * (k - len(row)) for row in lists])
    weights = np.array(data.draw(st.lists(st.floats(1, 50), min_size=n_classes, max_size=n_classes)))
    want = plain(topk, truth, weights, k)
    for form in (csr(truth, n_classes), truth):
        got = run(topk, form, weights, k, pieces=min(2, len(truth)))
        for name in NAMES:
            np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-12, err_msg=name)


def test_one_class_an_example():
    topk = np.array([[3, 1], [2, 0], [4, 3], [0, 1]])
    truth = np.array([1, 2, -1, 4])
    np.testing.assert_allclose(metrics.precision_at_k(topk, truth), [1 / 4, 2 / 8])
    np.testing.assert_allclose(metrics.hit_at_k(topk, truth), [1 / 4, 2 / 4])
    np.testing.assert_allclose(metrics.recall_at_k(topk, truth, 1), [1 / 4])
    np.testing.assert_allclose(metrics.ndcg_at_k(topk, truth), [1 / 4, (1 + 1 / log2(3)) / 4])
    np.testing.assert_allclose(metrics.coverage_at_k(topk, truth), [1 / 3, 2 / 3])
    np.testing.assert_allclose(metrics.psp_at_k(topk, truth, [1, 2, 3, 4, 5]), [3 / 10, 5 / 10])
    np.testing.assert_allclose(metrics.psndcg_at_k(topk, truth, [1, 2, 3, 4, 5], 1), [3 / 10])
    np.testing.assert_array_equal(metrics.hit_at_k(topk, truth.tolist()), metrics.hit_at_k(topk, truth))


def test_forms_of_truth_agree():
    topk = np.array([[0, 2], [1, 0]])
    want = metrics.precision_at_k(topk, [[2], [0, 1]])
    shuffled = scipy.sparse.csr_array((np.ones(4), [2, 1, 0, 1], [0, 1, 4]), shape=(2, 3))  # one twice, unsorted
    zero = scipy.sparse.csr_array((np.array([1.0, 0.0, 1.0, 1.0]), [2, 0, 0, 1], [0, 2, 4]), shape=(2, 3))
    object_form = SimpleNamespace(indptr=np.array([0, 1, 3]), indices=np.array([2, 0, 1]))
    for truth in (shuffled, zero, zero.tocoo(), object_form, [{2}, {0, 1}], [np.array([2]), np.array([1, 0])]):
        np.testing.assert_array_equal(metrics.precision_at_k(topk, truth), want)
    np.testing.assert_allclose(want, [1 / 2, 3 / 4])
    assert zero.nnz == 4  # the caller's matrix keeps its stored zero


def test_blocks_of_rows_agree(monkeypatch):
    rng = np.random.default_rng(0)
    topk = np.argsort(rng.random((50, 9)), axis=1)[:, :3]
    truth = scipy.sparse.csr_array((rng.random((50, 9)) < 0.3).astype(float))
    weights = rng.random(9)
    want = run(topk, truth, weights, 3)
    monkeypatch.setattr(metrics, "_BLOCK_ROWS", 7)
    for name, value in run(topk, truth, weights, 3).items():
        np.testing.assert_allclose(value, want[name], rtol=0, atol=1e-12)


def test_missing_columns_are_misses():
    got = metrics.precision_at_k(np.array([[1], [2]]), np.array([1, 2]), 3)
    np.testing.assert_allclose(got, [1, 1 / 2, 1 / 3])


def test_result_names_places():
    accumulator = metrics.MetricAccumulator((5, 1), np.ones(3))
    accumulator.update(np.array([[0, 1, 2]]), [[1, 2]])
    assert set(accumulator.result()) == {f"{name}@{k}" for name in NAMES for k in (1, 5)}
    assert accumulator.result()["P@1"] == 0.0
    assert accumulator.result()["P@5"] == pytest.approx(0.4)
    assert accumulator.count == 1


def test_propensity_of_counts_and_labels():
    labels = scipy.sparse.csr_array(np.array([[1.0, 0, 3], [1, 0, 0], [0, 0, 1], [1, 0, 1], [1, 0, 1]]))
    want = [1 + (np.log(5) - 1) * 2.5**0.55 * (count + 1.5) ** -0.55 for count in (4, 0, 4)]
    np.testing.assert_allclose(metrics.inverse_propensity(labels), want, rtol=1e-14)
    np.testing.assert_allclose(metrics.inverse_propensity(np.array([4, 0, 4]), n_points=5), want, rtol=1e-14)


@pytest.mark.parametrize(
    ("topk", "truth", "match"),
    [
        ([0, 1], [[0], [1]], r"topk: expected an array \[n, k\], got shape \(2,\)"),
        ([[0.0, 1.0]], [[0]], "topk: expected integer classes, got float64"),
        ([[0, -2]], [[0]], "topk: row 0 holds -2"),
        ([[0, 1], [1, 1]], [[0], [1]], "topk: row 1 names a class twice"),
        ([[0, 1]], [[0], [1]], "truth: expected 1 rows, as topk has, got 2"),
        ([[0, 1], [0, 1]], [[0], [-3]], "truth: class -3 of row 1 is outside"),
        ([[0, 1]], [[0.5]], "truth: expected integer classes, got float64"),
        ([[0, 1]], np.zeros((1, 2), int), r"truth: expected .* got an array of shape \(1, 2\)"),
        ([[0, 1]], np.array([0.5]), "truth: expected integer classes, got float64"),
        ([[0, 1]], [[9]], "truth: class 9 is outside inverse_propensity of 4 classes"),
    ],
)
def test_refusals(topk, truth, match):
    accumulator = metrics.MetricAccumulator((1,), np.ones(4))
    with pytest.raises((ValueError, TypeError), match=match):
        accumulator.update(np.array(topk), truth)
    assert accumulator.count == 0
    with pytest.raises(ValueError, match="no examples"):
        accumulator.result()


def test_refusals_of_the_rest():
    with pytest.raises(ValueError, match="ks: expected places of at least 1"):
        metrics.MetricAccumulator((0, 1))
    with pytest.raises(ValueError, match="inverse_propensity: expected"):
        metrics.MetricAccumulator((1,), np.ones((2, 2)))
    with pytest.raises(ValueError, match="n_points: needed"):
        metrics.inverse_propensity(np.ones(3))
    with pytest.raises(ValueError, match="labels: expected"):
        metrics.inverse_propensity(np.ones((3, 1)), n_points=3)
    with pytest.raises(ValueError, match="n_points: expected at least 1"):
        metrics.inverse_propensity(scipy.sparse.csr_array((0, 4)))
