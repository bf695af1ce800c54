"""test_hashed.py -- the hashed head's passes against float64, its estimators of the normaliser, and what it refuses"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from widehead import _core

D, WIDTH, BATCH = 40, 7, 13
ESTIMATORS = ("restricted", "corrected", "importance")
TOLERANCE = {np.float64: 1e-13, np.float32: 3e-6}


def reference(
    hidden: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    targets: list[dict[int, float]],
    candidates: np.ndarray,
    counts: np.ndarray,
    draws: list[int],
    estimator: str,
    tables: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Losses, and gradients to hidden, weight and bias of their sum, class by class."""
    n, drawn = len(weight), 1 - (1 - 1 / len(weight)) ** len(draws)
    losses, by_hidden, by_weight = np.zeros(len(hidden)), np.zeros_like(hidden), np.zeros_like(weight)
    by_bias = np.zeros(n)
    for i, own in enumerate(targets):
        if not own:
            continue
        kept = set(own) | {int(c) for c in candidates[i] if c >= 0}
        outside = [c for c in draws if c not in kept]
        factor = dict.fromkeys(kept, 1.0)
        for c in kept - set(own):
            if estimator == "importance":
                met = counts[i][candidates[i].tolist().index(c)] / tables
                factor[c] = 1 / (1 - (1 - drawn) * (1 - met) ** tables)
        for c in outside:
            corrected = outside.count(c) * (n - len(kept)) / len(outside)
            factor[c] = {"restricted": 1.0, "corrected": corrected, "importance": 1 / max(drawn, 1e-300)}[estimator]
        seen = sorted(factor)
        z = weight[seen] @ hidden[i] + bias[seen]
        p = np.array([factor[c] for c in seen]) * np.exp(z)
        mass, logits = sum(own.values()), dict(zip(seen, z, strict=True))
        losses[i] = mass * np.log(p.sum()) - sum(y * logits[c] for c, y in own.items())
        g = mass * p / p.sum() - np.array([own.get(c, 0.0) for c in seen])
        by_hidden[i] = g @ weight[seen]
        by_weight[seen] += g[:, None] * hidden[i]
        by_bias[seen] += g
    return losses, by_hidden, by_weight, by_bias


class Case:
    def __init__(self, dtype: Any, estimator: str, seed: int = 0, negatives: int = 15) -> None:
        rng = np.random.default_rng(seed)
        self.hidden = rng.standard_normal((BATCH, WIDTH)).astype(dtype)
        self.weight = rng.standard_normal((D, WIDTH)).astype(dtype)
        self.bias = rng.standard_normal(D).astype(dtype)
        self.candidates = np.stack([rng.choice(D, 6, replace=False) for _ in range(BATCH)])
        self.candidates[2, 3:] = -1
        self.counts = rng.integers(1, 9, (BATCH, 6)).astype(np.int32)
        self.negatives = rng.integers(0, D, negatives)
        sizes = [0, 1, 3, *rng.integers(0, 4, BATCH - 3).tolist()]
        self.targets = [
            {int(c): float(np.float32(rng.random() + 0.5)) for c in rng.choice(D, n, replace=False)} for n in sizes
        ]
        self.estimator, self.tables = estimator, 8

    def forward(self, **changes: Any) -> tuple[Any, np.ndarray]:
        losses = np.full(BATCH, 7.0)
        indptr = np.cumsum([0, *map(len, self.targets)])
        arguments = {
            "hidden": self.hidden,
            "weight": self.weight,
            "bias": self.bias,
            "indptr": indptr,
            "indices": np.array([c for own in self.targets for c in own], np.int64),
            "values": np.array([y for own in self.targets for y in own.values()], np.float32),
            "estimator": self.estimator,
            "candidates": self.candidates,
            "counts": self.counts,
            "tables": self.tables,
            "negatives": self.negatives,
            "losses": losses,
        }
        return _core.hashed_forward(**{**arguments, **changes}), losses

    def reference(self) -> tuple[np.ndarray, ...]:
        wide = (x.astype(np.float64) for x in (self.hidden, self.weight, self.bias))
        return reference(
            *wide, self.targets, self.candidates, self.counts, self.negatives.tolist(), self.estimator, self.tables
        )


def rows_of(batch: Any) -> np.ndarray:
    rows = np.empty(batch.rows, np.int64)
    batch.copy_rows(rows)
    return rows


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("negatives", [15, 0])
def test_losses_and_gradients(estimator: str, dtype: Any, negatives: int, isa: str) -> None:
    case = Case(dtype, estimator, negatives=negatives)
    batch, losses = case.forward()
    want = case.reference()
    near = {"rtol": 0, "atol": TOLERANCE[dtype] * 10}
    np.testing.assert_allclose(losses, want[0], **near)
    rows = rows_of(batch)
    grad_hidden = np.full_like(case.hidden, np.nan)
    grad_rows, grad_bias = np.full((len(rows), WIDTH), np.nan, dtype), np.full(len(rows), np.nan, dtype)
    _core.hashed_backward(
        batch,
        grad_losses=np.ones(BATCH),
        weight=case.weight,
        bias=case.bias,
        grad_hidden=grad_hidden,
        grad_rows=grad_rows,
        grad_bias=grad_bias,
    )
    np.testing.assert_allclose(grad_hidden, want[1], **near)
    np.testing.assert_allclose(grad_rows, want[2][rows], **near)
    np.testing.assert_allclose(grad_bias, want[3][rows], **near)
    away = np.setdiff1d(np.arange(D), rows)
    assert not want[2][away].any() and (np.diff(rows) > 0).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adagrad"])
def test_a_step_moves_the_rows_of_the_batch_and_no_others(optimizer: str, threads: int) -> None:
    case = Case(np.float32, "corrected")
    batch, _ = case.forward()
    rows, before = rows_of(batch), (case.weight.copy(), case.bias.copy())
    scale = np.linspace(0.5, 1.5, BATCH)
    update: dict[str, Any] = {"optimizer": optimizer, "lr": 0.1, "step": 1, "seed": 0, "rounding": "nearest"}
    state: dict[str, Any] = {}
    if optimizer == "adam":
        state = {name: np.zeros((D, WIDTH), np.float32) for name in ("first", "second")}
        state |= {name: np.zeros(D, np.float32) for name in ("bias_first", "bias_second")}
    if optimizer == "adagrad":
        state = {"second": np.zeros((D, 1), np.float32), "bias_second": np.zeros(D, np.float32)}
    drift, moved = np.zeros(D, np.float32), np.empty(len(rows), np.int64)
    far = _core.hashed_backward(
        batch,
        grad_losses=scale,
        weight=case.weight,
        bias=case.bias,
        update={**update, **state},
        drift=drift,
        drift_limit=0.05,
        moved=moved,
    )
    grad_rows, grad_bias = np.empty((len(rows), WIDTH), np.float32), np.empty(len(rows), np.float32)
    _core.hashed_backward(
        batch, grad_losses=scale, weight=before[0], bias=before[1], grad_rows=grad_rows, grad_bias=grad_bias
    )
    like = {key: np.zeros_like(value) for key, value in state.items()}
    want = before[0].copy(), before[1].copy()
    _core.update_rows(
        weight=want[0], rows=rows, grad=grad_rows, bias=want[1], grad_bias=grad_bias, update={**update, **like}
    )
    assert np.array_equal(case.weight, want[0]) and np.array_equal(case.bias, want[1])
    for key, value in state.items():
        assert np.array_equal(value, like[key]), key
    away = np.setdiff1d(np.arange(D), rows)
    assert np.array_equal(case.weight[away], before[0][away])
    length = np.linalg.norm(case.weight - before[0], axis=1) / np.linalg.norm(case.weight, axis=1)
    np.testing.assert_allclose(drift, length, rtol=1e-5, atol=1e-7)
    assert moved[:far].tolist() == np.flatnonzero(drift > np.float32(0.05)).tolist()
    assert 0 < far < len(rows) or optimizer != "sgd"


def test_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    def run() -> tuple[np.ndarray, ...]:
        case = Case(np.float32, "corrected", seed=3)
        batch, losses = case.forward()
        grad_hidden = np.empty_like(case.hidden)
        update = {"optimizer": "sgd", "lr": 0.1, "step": 1, "seed": 0, "rounding": "nearest"}
        _core.hashed_backward(
            batch,
            grad_losses=np.ones(BATCH),
            weight=case.weight,
            bias=case.bias,
            grad_hidden=grad_hidden,
            update=update,
        )
        return losses, grad_hidden, case.weight

    many = run()
    _core.set_num_threads(1)
    assert all(np.array_equal(a, b) for a, b in zip(many, run(), strict=True))


def test_with_all_classes_as_candidates_it_is_the_full_softmax() -> None:
    case = Case(np.float64, "corrected", negatives=0)
    everyone = np.tile(np.arange(D), (BATCH, 1))
    batch, losses = case.forward(candidates=everyone, counts=None)
    grad_hidden = np.empty_like(case.hidden)
    _core.hashed_backward(
        batch, grad_losses=np.ones(BATCH), weight=case.weight, bias=case.bias, grad_hidden=grad_hidden
    )
    z = case.hidden @ case.weight.T + case.bias
    y = np.zeros((BATCH, D))
    for i, own in enumerate(case.targets):
        y[i, list(own)] = list(own.values())
    lse = np.log(np.exp(z).sum(1))
    mass = y.sum(1)
    np.testing.assert_allclose(losses, mass * lse - (y * z).sum(1), rtol=0, atol=1e-12)
    p = np.exp(z - lse[:, None])
    np.testing.assert_allclose(grad_hidden, (mass[:, None] * p - y) @ case.weight, rtol=0, atol=1e-12)


def test_the_corrected_normaliser_is_right_on_average() -> None:
    """E[Z^] = Z within four standard errors; that of the paper, over what is seen, is far too small."""
    case = Case(np.float64, "corrected")
    target = np.arange(BATCH) % D
    z = case.hidden @ case.weight.T + case.bias
    truth = np.exp(z).sum(1)
    estimates: dict[str, list[np.ndarray]] = {"corrected": [], "restricted": []}
    rng = np.random.default_rng(1)
    for _ in range(800):
        negatives = rng.integers(0, D, 12)
        for estimator, found in estimates.items():
            lse = np.empty(BATCH)
            case.forward(indptr=None, indices=target, values=None, estimator=estimator, negatives=negatives, lse=lse)
            found.append(np.exp(lse))
    corrected = np.array(estimates["corrected"])
    error = corrected.std(0, ddof=1) / np.sqrt(len(corrected))
    assert (np.abs(corrected.mean(0) - truth) < 4 * error).all()
    assert (np.array(estimates["restricted"]).mean(0) < 0.9 * truth).all()


def test_examples_without_a_target_do_nothing() -> None:
    case = Case(np.float32, "corrected")
    batch, losses = case.forward(indptr=None, indices=np.full(BATCH, -5), values=None, ignore_index=-5)
    assert not losses.any() and batch.rows == 0 and batch.pairs == 0
    before, grad_hidden = case.weight.copy(), np.full_like(case.hidden, np.nan)
    update = {"optimizer": "sgd", "lr": 0.1, "step": 1, "seed": 0, "rounding": "nearest"}
    _core.hashed_backward(
        batch, grad_losses=np.ones(BATCH), weight=case.weight, bias=case.bias, grad_hidden=grad_hidden, update=update
    )
    assert not grad_hidden.any() and np.array_equal(case.weight, before)


def test_rows_far_apart() -> None:
    """Rows past 2^31 elements of the weights, of memory that is only reserved."""
    rows, width = 40_000_000, 64
    weight = np.zeros((rows, width), np.float32)
    ids = np.array([[rows - 1, rows - 2, 3]])
    weight[ids[0]] = np.arange(3 * width).reshape(3, width) / 1000
    hidden = np.ones((1, width), np.float32)
    losses = np.empty(1)
    batch = _core.hashed_forward(
        hidden=hidden, weight=weight, indptr=None, indices=np.array([rows - 1]), candidates=ids, losses=losses
    )
    z = weight[ids[0]].astype(np.float64).sum(1)
    assert losses[0] == pytest.approx(np.log(np.exp(z).sum()) - z[0], rel=1e-5)
    update = {"optimizer": "sgd", "lr": 1.0, "step": 1, "seed": 0, "rounding": "nearest"}
    _core.hashed_backward(batch, grad_losses=np.ones(1), weight=weight, update=update)
    p = np.exp(z) / np.exp(z).sum()
    np.testing.assert_allclose(weight[rows - 2], np.arange(width, 2 * width) / 1000 - p[1], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"candidates": np.full((BATCH, 6), D)},
            _core.LabelError,
            r"candidates: expected a class in \[0, 40\), got 40",
        ),
        ({"negatives": np.array([0, -1])}, _core.LabelError, "negatives: expected a class"),
        ({"indices": np.full(BATCH, D), "indptr": None, "values": None}, _core.LabelError, "target"),
        ({"hidden": np.full((BATCH, WIDTH), np.nan, np.float32)}, _core.NonFiniteError, "hidden"),
        ({"hidden": np.ones((BATCH, WIDTH + 1), np.float32)}, _core.ShapeError, "hidden"),
        ({"counts": None}, _core.ShapeError, "counts: expected the collisions"),
        ({"estimator": "exact"}, _core.ShapeError, "estimator: expected"),
        ({"candidates": np.zeros((BATCH - 1, 6), np.int64)}, _core.ShapeError, "candidates: expected a contiguous"),
        ({"weight": np.zeros((D, WIDTH), np.float16)}, _core.DtypeError, "weight"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: Any, message: str) -> None:
    case = Case(np.float32, "importance")
    with pytest.raises(error, match=message):
        case.forward(**changes)


def test_a_bad_gradient_changes_nothing() -> None:
    case = Case(np.float32, "corrected")
    batch, _ = case.forward()
    before = case.weight.copy()
    update = {"optimizer": "sgd", "lr": 0.1, "step": 1, "seed": 0, "rounding": "nearest"}
    grad = np.ones(BATCH)
    grad[3] = np.inf
    with pytest.raises(_core.NonFiniteError, match="grad_losses: not finite at position 3"):
        _core.hashed_backward(batch, grad_losses=grad, weight=case.weight, bias=case.bias, update=update)
    assert np.array_equal(case.weight, before)
    case.weight[rows_of(batch)[0]] = 1e38
    spoilt = case.weight.copy()
    batch, _ = case.forward(hidden=np.full((BATCH, WIDTH), 1e3, np.float32))
    with pytest.raises(_core.NonFiniteError, match="logits: the normaliser"):
        _core.hashed_backward(batch, grad_losses=np.ones(BATCH), weight=case.weight, bias=case.bias, update=update)
    assert np.array_equal(case.weight, spoilt)
