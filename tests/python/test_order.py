"""tests/python/test_order.py -- order_classes: frequent classes first, planted groups found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import widehead
from test_estimator import toy
from widehead import Classifier, DtypeError, LabelError, Labels, NonFiniteError, ShapeError, cli, order_classes

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def csr(rows: list[list[int]], classes: int) -> sp.csr_array:
    indptr, indices = np.cumsum([0] + [len(r) for r in rows]), np.concatenate([np.zeros(0, int), *rows]).astype(int)
    return sp.csr_array((np.ones(len(indices)), indices, indptr), shape=(len(rows), classes))


def planted(groups: int, size: int, noise: float, seed: int = 0) -> tuple[sp.csr_array, np.ndarray]:
    """Examples with two to five labels of one group, some with one more from anywhere; and the group of every label."""
    rng = np.random.default_rng(seed)
    names, rows = rng.permutation(groups * size), []
    for _ in range(groups * size * 8):
        picks = rng.integers(groups) * size + rng.permutation(size)[: rng.integers(2, 6)]
        stray = [rng.integers(groups * size)] if rng.random() < noise else []
        rows.append(sorted({*names[picks].tolist(), *map(int, stray)}))
    return csr(rows, groups * size), np.argsort(names) // size


def purity(order: np.ndarray, group: np.ndarray, size: int) -> float:
    """Share of the runs of `size` that are one group."""
    runs = group[order][: len(order) // size * size].reshape(-1, size)
    return float(np.mean((runs == runs[:, :1]).all(1)))


@pytest.mark.parametrize(("groups", "size", "noise"), [(8, 16, 0.0), (50, 16, 0.1), (64, 8, 0.2), (37, 5, 0.05)])
def test_planted_groups_are_found_again(groups: int, size: int, noise: float) -> None:
    Y, group = planted(groups, size, noise)
    order = order_classes(Y, group_size=size)
    assert sorted(order) == list(range(groups * size)) and order.dtype == np.int64
    assert purity(order, group, size) >= 0.9
    shuffled = np.random.default_rng(1).permutation(groups * size)
    assert purity(shuffled, group, size) < 0.1
    # Without groups of its own the order has like classes as neighbours all the same.
    fine = group[order_classes(Y)]
    assert np.mean(fine[1:] == fine[:-1]) >= 0.5


def test_groups_begin_after_the_frequent_classes() -> None:
    """The first are the most frequent, of equals the lower; the leaves of the others lie as the head's groups do."""
    Y, group = planted(20, 8, 0.0)
    rng = np.random.default_rng(4)
    often = sp.csr_array(
        (np.ones(4000), (rng.integers(0, Y.shape[0], 4000), rng.integers(0, 5, 4000))), (Y.shape[0], 5)
    )
    both = sp.hstack([Y, often]).tocsr()
    counts = np.diff(sp.csc_array(both > 0).indptr)
    order = order_classes(both, group_size=8, dense_head=5)
    assert sorted(order[:5]) == list(range(160, 165)) and (np.diff(counts[order[:5]]) <= 0).all()
    assert purity(order[5:], group, 8) >= 0.9
    equal = order_classes(csr([[0, 1, 2, 3]] * 3, 4), dense_head=2)
    assert equal[:2].tolist() == [0, 1]


def test_features_group_classes_that_never_meet() -> None:
    """One class an example: nothing stands together, but examples of a group have features in common."""
    rng = np.random.default_rng(0)
    groups, size = 30, 4
    names = rng.permutation(groups * size)
    y = rng.integers(0, groups * size, 3000)
    group = np.argsort(names) // size
    X = np.zeros((3000, 90), np.float32)
    for row, g in enumerate(group[y]):
        X[row, 3 * g + rng.integers(0, 3, 2)] = 1
        X[row, rng.integers(0, 90)] += 0.5
    order = order_classes(y, features=X, group_size=size)
    assert purity(order, group, size) >= 0.9
    assert purity(order_classes(y, group_size=size), group, size) < 0.2
    assert np.array_equal(order, order_classes(y, features=sp.csr_array(X), group_size=size))


def test_the_same_for_the_same_seed_and_every_form_of_targets() -> None:
    Y, _ = planted(10, 6, 0.3)
    labels = Labels.from_csr(Y)
    order = order_classes(Y, group_size=6, dense_head=3)
    for other in (labels, Y.astype(bool), Y * 0.25, sp.coo_array(Y)):
        assert np.array_equal(order, order_classes(other, group_size=6, dense_head=3))
    assert not np.array_equal(order, order_classes(Y, group_size=6, dense_head=3, seed=1))
    assert widehead.order_classes is order_classes and "order_classes" in dir(widehead)


def test_classes_without_examples_come_last() -> None:
    assert order_classes(csr([[], []], 6)).tolist() == [0, 1, 2, 3, 4, 5]
    assert order_classes(csr([], 4), group_size=3, dense_head=2).tolist() == [0, 1, 2, 3]
    assert order_classes(csr([[4], [1, 4], [7]], 9))[-6:].tolist() == [0, 2, 3, 5, 6, 8]
    assert order_classes(np.array([-100, 2, -100, 2]), n_classes=4).tolist() == [2, 0, 1, 3]
    assert order_classes(np.array([5, 5])).tolist() == [5, 0, 1, 2, 3, 4]
    features = sp.csr_array((3, 5), dtype=np.float32)  # no class has any
    assert sorted(order_classes(np.array([0, 1, 2]), features=features, group_size=2)) == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 24), max_size=6, unique=True), max_size=40),
    group_size=st.integers(1, 30),
    dense_head=st.integers(0, 24),
    seed=st.integers(0, 3),
    width=st.integers(1, 4),
)
def test_always_a_permutation(rows: list[list[int]], group_size: int, dense_head: int, seed: int, width: int) -> None:
    counts = np.bincount(np.concatenate([np.zeros(0, int), *rows]).astype(int), minlength=25)
    X = np.random.default_rng(seed).integers(0, 2, (len(rows), width)).astype(np.float32)
    for features in (None, X):
        order = order_classes(csr(rows, 25), features=features, group_size=group_size, dense_head=dense_head, seed=seed)
        assert sorted(order) == list(range(25))
        first, rest = order[:dense_head], order[dense_head:]
        assert (np.diff(counts[first]) <= 0).all()
        assert not len(first) or counts[first].min() >= counts[rest].max()
        empty = np.flatnonzero(counts[rest] == 0)
        assert (np.diff(empty) == 1).all() and (not len(empty) or empty[-1] == len(rest) - 1)


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        (csr([[0]], 3), {"dense_head": 3}, ShapeError, "dense_head: expected 0 to n_classes - 1 = 2, got 3"),
        (csr([[0]], 3), {"dense_head": -1}, ShapeError, "dense_head: expected an integer of at least 0, got -1"),
        (csr([[0]], 3), {"group_size": 0}, ShapeError, "group_size: expected an integer of at least 1, got 0"),
        (csr([[0]], 3), {"n_classes": 5}, ShapeError, "n_classes: expected 3 as in targets, or None, got 5"),
        (csr([[0]], 3), {"features": np.ones((2, 2))}, ShapeError, "features: expected 1 rows as targets, got 2"),
        (csr([[0]], 3), {"features": np.full((1, 2), np.nan)}, NonFiniteError, "features: expected finite"),
        (np.array([0.5]), {}, DtypeError, "targets: expected Labels, .* got float64"),
        (np.array([0, 7]), {"n_classes": 5}, LabelError, "targets: expected classes below n_classes = 5, got 7"),
        (np.array([-1]), {}, ShapeError, "n_classes: expected an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(targets: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        order_classes(targets, **{"group_size": 1, **options})


def model(**options: Any) -> Classifier:
    head = {"fan_in": 16, "rewire_every": 20, **options.pop("head_options", {})}
    defaults = {"intermediate": 64, "epochs": 8, "batch_size": 32, "lr": 0.02, "optimizer": "adam"}
    return Classifier("sparse", **{**defaults, "head_options": head, **options})


@pytest.mark.parametrize("loss", [None, "bce", "softmax"])
@pytest.mark.parametrize("order", ["cooccurrence", "frequency"])
def test_the_classifier_orders_by_its_training_data(tmp_path: Path, order: str, loss: str | None) -> None:
    X, y = toy()
    options = {"dense_head": 3, "class_order": order, "group_size": 2}
    fitted = model(loss=loss, head_options=options).fit(X[:500], y[:500])
    assert fitted.score(X[500:], y[500:]) > 0.9
    counts = np.bincount(y[:500], minlength=12)
    assert np.array_equal(fitted.head_.order[:3], np.lexsort((np.arange(12), -counts))[:3])
    want = order_classes(y[:500], features=X[:500], n_classes=12, group_size=2, dense_head=3)
    if order == "frequency":
        want = np.lexsort((np.arange(12), -counts))
    assert np.array_equal(fitted.head_.order, want)
    assert fitted.head_.frequent.weight.shape == (3, 64) and fitted.head_.weight.shape == (9, 16)
    fitted.save(tmp_path / "model")
    again = Classifier.load(tmp_path / "model")
    for got, kept in zip(again.predict_topk(X, 3), fitted.predict_topk(X, 3), strict=True):
        assert np.array_equal(got, kept)
    given = model(loss=loss, head_options={**options, "class_order": want}).fit(X[:500], y[:500])
    assert np.array_equal(given.head_.weight, fitted.head_.weight)
    rows = model(loss=loss, head_options=options).fit(X[:500], csr([[int(c)] for c in y[:500]], 12))
    assert np.array_equal(rows.head_.order, want)
    given.save(tmp_path / "model")
    assert np.array_equal(Classifier.load(tmp_path / "model").head_options["class_order"], want)


def test_the_classifier_resumes_with_its_order(tmp_path: Path) -> None:
    X, y = toy(n=200)
    Y = csr([[int(c), (int(c) + 1) % 12] for c in y], 12)
    options = {"epochs": 3, "head_options": {"dense_head": 4, "class_order": "cooccurrence", "group_size": 2}}

    def stop(model: Classifier, epoch: int, loss: float) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    straight = model(**options).fit(X, Y)
    kept = {"checkpoint": tmp_path / "fit", "checkpoint_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        model(**options, **kept, callback=stop).fit(X, Y)
    resumed = model(**options, **kept, resume=True).fit(X, Y)
    for name, array in straight.head_.state_dict().items():
        assert np.array_equal(array, resumed.head_.state_dict()[name]), name
    with pytest.raises(ShapeError, match="class_order: expected one of 'cooccurrence', 'frequency', got 'size'"):
        model(head_options={"class_order": "size"}).fit(X, Y)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    X, y = toy()
    Y = sp.csr_array((np.ones(len(y)), (np.arange(len(y)), y)), shape=(len(y), 12))
    for name, matrix in (("X", X), ("Y", Y)):
        sp.save_npz(tmp_path / f"{name}.npz", matrix)
    data, out = [str(tmp_path / "X.npz"), str(tmp_path / "Y.npz")], str(tmp_path / "model")
    common = ["--intermediate", "64", "--fan-in", "16", "--lr", "0.02", "--epochs", "8", "--quiet"]
    for more, order in ((["--group-labels"], "cooccurrence"), ([], "frequency")):
        asked = ["--dense-head", "3", *more]
        assert cli.main(["train", *data, "-o", out, "--head", "sparse", *common, *asked, "--group-size", "2"]) == 0
        fitted = Classifier.load(out)
        assert fitted.score(X, y) > 0.9 and fitted.head_options["class_order"] == order
        assert fitted.head_.options.dense_head == 3 and sorted(fitted.head_.order) == list(range(12))
    assert cli.main(["train", *data, "-o", out, "--group-labels", "--quiet"]) != 0
    assert "--group-labels: belongs to --head sparse" in capsys.readouterr().err
    assert cli.main(["train", *data, "-o", out, "--head", "sparse", *common, "--dense-head", "12"]) != 0
    assert "dense_head: expected 0 to n_classes - 1 = 11, got 12" in capsys.readouterr().err
