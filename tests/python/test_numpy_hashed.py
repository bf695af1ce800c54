"""test_numpy_hashed.py -- the hashed head: it learns what the dense one does, finds it again, and is saved"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from widehead import FileError, _core
from widehead.numpy import DenseHead, HashedHead

D, WIDTH, BATCH = 600, 24, 48
OPTIONS: dict[str, Any] = {"tables": 20, "hashes": 2, "window": 8, "candidates": 40, "negatives": 60}


class Data:
    """Hidden states near a point of their class."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.points = np.random.default_rng(99).standard_normal((D, WIDTH))

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        target = self.rng.integers(0, D, BATCH)
        noise = 0.3 * self.rng.standard_normal((BATCH, WIDTH))
        return (self.points[target] + noise).astype(np.float32), target


def trained(steps: int = 250, optimizer: str = "adagrad", lr: float = 0.3, **options: Any) -> HashedHead:
    head, data = HashedHead(WIDTH, D, **{**OPTIONS, **options}), Data()
    for _ in range(steps):
        head.step(*data.batch(), lr, optimizer)
    return head


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "restricted"},
        {"estimator": "importance"},
        {"shared": True, "candidates": 200},
        {"family": "simhash", "hashes": 6},
        {"dtype": "bfloat16"},
        {"bias": False, "probes": 1},
        {"rebuild_every": 20, "rebuild_growth": 1.5, "drift": 1e9},
    ],
)
def test_it_learns_as_the_dense_head_does(options: dict[str, Any]) -> None:
    head, data = trained(**options), Data(1)
    dense, source = DenseHead(WIDTH, D), Data()
    for _ in range(250):
        dense.step(*source.batch(), 0.3, "adagrad")
    hidden, target = (np.concatenate(parts) for parts in zip(*(data.batch() for _ in range(10)), strict=True))
    best = (dense.predict(hidden) == target).mean()
    assert (head.predict(hidden, exact=True) == target).mean() > best - 0.02 > 0.9
    assert (head.predict(hidden) == target).mean() > 0.8
    if options.get("estimator") != "restricted":
        assert head.forward(hidden, target).loss < dense.forward(hidden, target).loss + 0.3
    assert head.rehashed > 0 or "rebuild_every" in options


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 2.0), ("momentum", 0.3), ("adam", 0.02), ("adagrad", 0.3)])
def test_optimisers_and_several_labels(optimizer: str, lr: float) -> None:
    found = []
    for head in (HashedHead(WIDTH, D, **OPTIONS), DenseHead(WIDTH, D)):
        rng, data = np.random.default_rng(2), Data()
        for _ in range(150):
            hidden, target = data.batch()
            values = np.concatenate([np.ones(BATCH), np.full(BATCH, 0.5)])
            other = (target + 1) % D
            labels = sp.csr_array((values, (np.tile(np.arange(BATCH), 2), np.concatenate([target, other]))), (BATCH, D))
            loss, grad = head.step(hidden, labels, lr, optimizer, sample_weight=rng.random(BATCH))
        tests = [data.batch() for _ in range(10)]
        best = [(np.argsort(-head.scores(hidden), axis=1)[:, :2], target) for hidden, target in tests]
        found.append([np.mean([(c[:, i] == (t + i) % D).mean() for c, t in best]) for i in range(2)])
        assert grad.shape == hidden.shape and np.isfinite(loss)
    (hashed, also), (dense, both) = found
    assert hashed > dense - 0.15 > 0.6 and also > both - 0.15 > 0.15


def test_the_tables_are_those_of_the_rows_up_to_the_drift() -> None:
    """With no drift allowed the tables after many steps are those that a new build makes."""
    head = trained(steps=60, drift=0.0)
    hidden = Data(3).batch()[0]
    before = head.candidates(hidden, 100)
    head.rebuild()
    assert np.array_equal(head.candidates(hidden, 100), before)
    loose = trained(steps=60, drift=0.5)
    assert loose.rehashed < head.rehashed


@pytest.mark.parametrize("shared", [False, True])
def test_the_same_bits_for_any_number_of_threads(shared: bool, threads: int) -> None:
    head = trained(steps=20, shared=shared)
    _core.set_num_threads(1)
    alone = trained(steps=20, shared=shared)
    assert np.array_equal(head.weight, alone.weight) and np.array_equal(head.bias, alone.bias)
    assert head.statistics() == alone.statistics()


def test_queries() -> None:
    head, (hidden, target) = trained(), Data(4).batch()
    found, exact = head.topk(hidden, 5), head.topk(hidden, 5, exact=True)
    assert exact.classes.tolist() == np.argsort(-head.scores(hidden), axis=1)[:, :5].tolist()
    everything = head.topk(hidden, 5, candidates=D)
    there = everything.classes >= 0
    wanted = np.take_along_axis(head.scores(hidden), np.maximum(everything.classes, 0), 1)
    np.testing.assert_allclose(everything.scores[there], wanted[there], rtol=1e-5, atol=1e-5)
    shares = [head.recall(hidden, 5, candidates=n) for n in (5, 40, D)]
    assert shares == sorted(shares) and shares[1] > 0.5
    hits = [np.isin(a, b).mean() for a, b in zip(exact.classes, found.classes, strict=True)]
    assert head.recall(hidden, 5) == pytest.approx(np.mean(hits))
    without = head.topk(hidden, 5, exclude=[[int(t)] for t in target])
    assert not (without.classes == target[:, None]).any()
    assert head.topk(hidden[0], 3).classes.shape == (3,) and head.candidates(hidden[None], 7).shape == (1, BATCH, 7)
    np.testing.assert_allclose(np.exp(head.log_prob(hidden)).sum(1), np.ones(BATCH), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_and_growth(dtype: str, tmp_path: Any) -> None:
    head, data = trained(steps=30, dtype=dtype, probes=1), Data(5)
    hidden, target = data.batch()
    head.save(tmp_path / "head", optimizer=True)
    again = HashedHead.load(tmp_path / "head")
    assert again.options == head.options and repr(again) == repr(head)
    head.rebuild()  # the tables are not in the file
    assert np.array_equal(again.topk(hidden, 9).classes, head.topk(hidden, 9).classes)
    for one in (head, again):
        one.step(hidden, target, 0.1, "adagrad")
    assert np.array_equal(head.weight, again.weight)
    with pytest.raises(FileError):
        DenseHead.load(tmp_path / "head")
    again.grow(D + 50)
    assert again.statistics()["rows"] == D + 50 and np.array_equal(again.weight[:D], head.weight)
    again.step(hidden, target + 50, 0.1, "adagrad")


def test_weights_that_are_set_are_hashed() -> None:
    head, hidden = HashedHead(WIDTH, D, **OPTIONS), Data(6).batch()[0]
    head.topk(hidden, 3)
    other = HashedHead(WIDTH, D, **{**OPTIONS, "seed": 0})
    weight = np.random.default_rng(7).standard_normal((D, WIDTH)).astype(np.float32)
    head.weight = weight
    other.load_state_dict({"weight": weight, "bias": np.zeros(D, np.float32)})
    assert np.array_equal(head.topk(hidden, 3).classes, other.topk(hidden, 3).classes)
    head.weight[:] = -weight
    head.rebuild()
    other.weight = -weight
    assert np.array_equal(head.topk(hidden, 3).classes, other.topk(hidden, 3).classes)


def test_refused_steps_change_nothing() -> None:
    head, data = trained(steps=10), Data(8)
    hidden, target = data.batch()
    before, statistics = head.weight.copy(), head.statistics()
    wrong = hidden.copy()
    wrong[3, 2] = np.inf
    for bad, goal, error in (
        (wrong, target, _core.NonFiniteError),
        (hidden, target + D, _core.LabelError),
        (hidden[:, 1:], target, _core.ShapeError),
    ):
        with pytest.raises(error):
            head.step(bad, goal, 0.1, "adagrad")
    assert np.array_equal(head.weight, before) and head.statistics() == statistics and head.steps == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "ivf9"}, "family: expected"),
        ({"estimator": "biased"}, "estimator: expected"),
        ({"candidates": 0}, "candidates: expected"),
        ({"negatives": -1}, "negatives: expected"),
        ({"probes": 5}, "probes: expected at most"),
        ({"drift": -1.0}, "drift: expected"),
        ({"rebuild_growth": 0.5}, "rebuild_growth: expected"),
        ({"estimator": "importance", "shared": True}, "shared: expected False"),
        ({"hashes": 20}, "hashes: expected"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(_core.ShapeError, match=message):
        HashedHead(WIDTH, D, **options)
