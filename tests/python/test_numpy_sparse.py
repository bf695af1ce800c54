"""tests/python/test_numpy_sparse.py -- SparseHead over NumPy: against the dense head on scattered weights, rewiring,
files, growth, refusals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dense_cases import multi_labels
from widehead import DtypeError, LabelError, Labels, NonFiniteError, ShapeError, _core
from widehead.numpy import DenseHead, SparseHead, from_bfloat16

H, D, K = 20, 90, 5
OPTIMIZERS = ("sgd", "momentum", "adam", "adagrad")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss": "bce", "group_size": 16, "prior": 0.05, "reduction": "sum"},
    {"loss": "softmax", "bias": False, "class_weight": np.linspace(0.5, 2, D), "lse_penalty": 1e-3},
    {"loss": "squared_hinge", "group_size": 64, "class_weight": np.linspace(0.5, 2, D), "reduction": "none"},
]


def batch(step: int = 0, dtype: Any = np.float32) -> tuple[np.ndarray, Labels]:
    rng = np.random.default_rng(step)
    rows = multi_labels(rng, 12, D, weighted=True)
    return rng.normal(size=(12, H)).astype(dtype), Labels(rows["indptr"], rows["indices"], rows["values"], D)


def make(**options: Any) -> SparseHead:
    return SparseHead(H, D, K, **{"seed": 4, **options})


def train(head: SparseHead, steps: range, optimizer: str = "adam", **more: Any) -> list[Any]:
    dtype = np.float64 if head.dtype == "float64" else np.float32
    return [np.sum(head.step(*batch(step, dtype), 0.01, optimizer, **more).loss) for step in steps]


def same(a: SparseHead, b: SparseHead) -> bool:
    return a.options == b.options and a.steps == b.steps and all(
        np.array_equal(x, y) and x.dtype == y.dtype
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )  # fmt: skip


def valid(head: SparseHead) -> bool:
    index = head.index.astype(int)
    rows = -(-head.n_classes // head.options.group_size)
    return index.shape == (rows, K) and (np.diff(index) > 0).all() and index.min() >= 0 and index.max() < H


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "plain")
def test_equals_the_dense_head(options: dict[str, Any]) -> None:
    """Losses, gradient to hidden, a step of SGD, and every query, in float64."""
    head = make(dtype="float64", **options)
    dense = head.to_dense()
    assert isinstance(dense, DenseHead) and (dense.weight != 0).sum() == D * K
    hidden, labels = batch(dtype=np.float64)
    if head.options.loss == "softmax":
        assert np.allclose(head.log_prob(hidden), dense.log_prob(hidden), rtol=1e-12, atol=1e-12)
    assert np.allclose(head.scores(hidden), dense.scores(hidden), rtol=1e-12, atol=1e-12)
    assert np.allclose(head.lse(hidden), dense.lse(hidden), rtol=1e-12)
    assert np.array_equal(head.topk(hidden, 7).classes, dense.topk(hidden, 7).classes)
    assert np.array_equal(head.predict(hidden), dense.predict(hidden))
    mine, theirs = head.forward(hidden, labels), dense.forward(hidden, labels)
    assert np.allclose(mine.loss, theirs.loss, rtol=1e-12) and np.allclose(mine.output, theirs.output, rtol=1e-11)
    mine, theirs = head.step(hidden, labels, 0.1), dense.step(hidden, labels, 0.1)
    assert np.allclose(mine.loss, theirs.loss, rtol=1e-12)
    assert np.allclose(mine.grad_hidden, theirs.grad_hidden, rtol=1e-11, atol=1e-12)
    at = np.repeat(head.index.astype(int), head.options.group_size, axis=0)[:D]
    assert np.allclose(head.weight, np.take_along_axis(dense.weight, at, 1), rtol=1e-12, atol=1e-13)
    if head.bias is not None:
        assert np.allclose(head.bias, dense.bias, rtol=1e-12)
    assert head.steps == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_rewires_and_repeats_for_any_number_of_threads(dtype: str, optimizer: str) -> None:
    ends = []
    rounding = "kahan" if dtype == "bfloat16" else None
    for threads in (1, 4):
        _core.set_num_threads(threads)
        head = make(dtype=dtype, rewire_every=2, rewire_fraction=0.2, rewire_end=8, group_size=3)
        train(head, range(9), optimizer, rounding=rounding)
        ends.append(head)
    assert same(*ends) and valid(head) and not np.array_equal(head.index, make(group_size=3).index)
    state = ends[0]._optimizer.arrays
    assert all(np.array_equal(state[name], ends[1]._optimizer.arrays[name]) for name in state)


def test_schedule() -> None:
    """Every second step, by a half cosine down to nothing at the eighth."""
    head, counts = make(rewire_every=2, rewire_fraction=0.2, rewire_end=8), []
    for step in range(10):
        before = head.index.copy()
        train(head, range(step, step + 1), "sgd")
        # At lr 0.01 no weight becomes 0 but by moving.
        counts.append(int((head.weight == 0).sum()))
        assert np.array_equal(before, head.index) == (step not in (1, 3, 5))
    assert counts[1] == int(0.1 * (1 + np.cos(np.pi / 4)) * D * K + 0.5) and counts[0] == 0
    still = make(rewire_every=0)
    train(still, range(3))
    assert np.array_equal(still.index, make().index)
    constant = make(rewire_every=1).options
    assert [constant.fraction_after(step) for step in (1, 10**6)] == [0.1, 0.1]


def test_moments_of_moved_connections_are_zero() -> None:
    head = make(rewire_every=None)
    train(head, range(3))
    state = head._optimizer.arrays
    assert (state["second"] != 0).any(1).all()
    before, index = head.weight.copy(), head.index.copy()
    second = state["second"].copy()
    assert head.rewire(0.3) == round(0.3 * D * K) and valid(head)
    moved = head.weight == 0
    assert moved.sum() == round(0.3 * D * K) and not state["first"][moved].any() and not state["second"][moved].any()
    for c in range(D):
        old = {int(source): k for k, source in enumerate(index[c])}
        for k in np.flatnonzero(~moved[c]):
            assert head.weight[c, k] == before[c, old[head.index[c, k]]]
            assert state["second"][c, k] == second[c, old[head.index[c, k]]]


def test_a_checkpoint_goes_on_as_without_it(tmp_path: Path) -> None:
    for options in OPTIONS:
        for dtype in ("float32", "bfloat16"):
            head = make(dtype=dtype, rewire_every=2, rewire_end=30, **options)
            train(head, range(3))
            head.save(tmp_path / "head", optimizer=True)
            again = SparseHead.load(tmp_path / "head")
            assert same(head, again) and repr(head) == repr(again)
            assert train(again, range(3, 7)) == train(head, range(3, 7))
            assert same(head, again) and valid(head)


def test_growth() -> None:
    for group in (1, 7):
        head, large = make(group_size=group), SparseHead(H, D + 30, K, seed=4, group_size=group)
        rows = len(head.index)
        assert np.array_equal(large.weight[:D], head.weight) and np.array_equal(large.index[:rows], head.index)
        train(head, range(2))
        learnt = head.weight.copy()
        head.grow(D + 30)
        assert np.array_equal(head.weight[:D], learnt) and np.array_equal(head.weight[D:], large.weight[D:])
        assert np.array_equal(head.index, large.index) and (head.bias[D:] == -1).all()
        head.step(batch()[0], np.arange(12) + D, 0.01, "adam")
        assert valid(head)
        with pytest.raises(ShapeError, match="n_classes"):
            head.grow(D)
    with pytest.raises(ShapeError, match="class_weight"):
        make(class_weight=np.ones(D)).grow(D + 1)


def test_first_values() -> None:
    head = make()
    assert (head.bias == -1).all() and np.abs(head.weight).max() <= K**-0.5 and head.index.dtype == np.uint16
    assert not make(loss="softmax").bias.any() and make(bias=False).bias is None
    assert np.allclose(1 / (1 + np.exp(-make(loss="bce", dtype="float64").bias)), 1 / D)
    assert np.allclose(1 / (1 + np.exp(-make(loss="bce", prior=0.3, dtype="float64").bias)), 0.3)
    assert np.isfinite(SparseHead(H, 1, K, loss="bce").bias).all()
    assert SparseHead(65_537, 3).index.dtype == np.int32
    bits = make(dtype="bfloat16").weight
    assert bits.dtype == np.uint16
    assert (np.abs(from_bfloat16(bits) - head.weight) <= 2.0**-8 * np.abs(head.weight)).all()
    rewired = make()
    rewired.rewire(0.5)
    rewired.reset_parameters()
    assert same(rewired, make())


def test_parameters_in_and_out() -> None:
    head, other = make(group_size=4), make(group_size=4, seed=8)
    other.load_state_dict(head.state_dict())
    assert np.array_equal(other.index, head.index) and other.index is not head.index
    wide = {**make(group_size=4, seed=9).state_dict()}
    wide["index"] = wide["index"].astype(np.int64)
    other.load_state_dict(wide)
    assert other.index.dtype == np.uint16 and np.array_equal(other.index, wide["index"])
    before = {name: array.copy() for name, array in head.state_dict().items()}
    index = wide["index"]
    for bad, error, words in (
        (index[:, ::-1], ShapeError, "ascending"),
        (np.where(index == index.max(), H, index), ShapeError, r"inputs in \[0, 20\)"),
        (index + 65536, ShapeError, "inputs in"),
        (index[1:], ShapeError, "index: expected shape"),
        (index.astype(np.float32), DtypeError, "index: expected integers"),
    ):
        with pytest.raises(error, match=words):
            head.load_state_dict({**wide, "index": bad})
        with pytest.raises(error, match=words):
            head.index = bad
        assert all(np.array_equal(array, before[name]) for name, array in head.state_dict().items())


def test_refused_steps_change_nothing() -> None:
    head = make(rewire_every=1)
    hidden, labels = batch()
    before = {name: array.copy() for name, array in head.state_dict().items()}
    bad = hidden.copy()
    bad[3, 2] = np.nan
    twice = Labels.from_lists([[1, 1], *[[2]] * 11], D)
    for arguments, error in (
        ((bad, labels), NonFiniteError),
        ((hidden, np.full(12, D)), LabelError),
        ((hidden, twice), LabelError),
        ((hidden[:, 1:], labels), ShapeError),
        ((hidden.astype(np.float64), labels), DtypeError),
    ):
        with pytest.raises(error):
            head.step(*arguments, 0.1, "adam")
        assert head.steps == 0 and head._optimizer.name is None
        assert all(np.array_equal(array, before[name]) for name, array in head.state_dict().items())
    empty = Labels.from_lists([[]] * 11 + [list(range(D))], D)
    assert np.isfinite(head.step(hidden, empty, 0.1, "adam").loss) and head.steps == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fan_in": H + 1}, f"fan_in: expected 1 to in_features = {H}"),
        ({"fan_in": 2.5}, "fan_in: expected an integer"),
        ({"group_size": 0}, "group_size"),
        ({"loss": "hinge"}, "loss"),
        ({"rewire_fraction": -0.1}, "rewire_fraction"),
        ({"rewire_mode": "threshold"}, "rewire_threshold"),
        ({"prior": 0.5}, "prior"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        SparseHead(H, D, **{"fan_in": K, **options})
