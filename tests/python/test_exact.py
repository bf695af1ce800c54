"""test_exact.py -- the exact head's core against dense SGD in float64: every method, loss, shape and option."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exact_reference import (
    LOSSES,
    METHODS,
    Batch,
    Core,
    DenseSGD,
    Loss,
    draw,
    first_weight,
    fused,
    near,
    spherical,
    stable_lr,
)
from widehead import ShapeError
from widehead.numpy import to_bfloat16

# classes, features, batch, targets an example
SHAPES = [
    (40, 6, 1, 1),
    (40, 6, 5, 3),
    (40, 3, 11, 2),
    (30, 1, 4, 2),
    (30, 1, 1, 1),
    (12, 16, 4, 5),
    (50, 7, 33, 0),
    (5, 3, 2, 1),
]


class Pair:
    """Dense SGD and the core on the same batches; `train` compares everything on the way."""

    def __init__(self, weight: np.ndarray, **options: Any) -> None:
        self.dense, self.core = DenseSGD(weight), Core(weight.copy(), **options)
        self.classes = len(weight)

    def add(self, batch: Batch, loss: str | Callable[..., Loss], scale: float = 1.0) -> None:
        kept, statistics = self.core.forward(batch)
        want = self.dense.statistics(batch)
        for got, true in zip(statistics, want, strict=True):
            near(got, true)
        if callable(loss):
            by_core = by = loss(batch, *want)
        else:
            by = spherical(loss, batch, *want, self.classes).scaled(scale)
            by_core = fused(loss, batch, *statistics, self.classes).scaled(scale)
            near(by_core.losses, by.losses)
        near(self.core.backward(kept, by_core, batch.hidden.shape), self.dense.add(batch, by))

    def step(self, lr: float, **options: Any) -> None:
        gradient = self.dense.gradient
        near(self.core.state.grad_norm2(), (gradient**2).sum())
        near(self.core.columns(), (gradient**2).mean(0))
        self.core.state.step(lr=lr, **options)
        self.dense.step(lr, **options)

    def train(self, batch: Batch, loss: str | Callable[..., Loss], lr: float, **options: Any) -> None:
        self.add(batch, loss)
        self.step(lr, **options)

    def check(self, tolerance: float = 1e-10) -> None:
        near(self.core.rows(), self.dense.weight, tolerance)
        found = self.core.state.diagnostics()
        assert found["gram_error"] < tolerance
        assert found["weight_norm2"] == pytest.approx((self.dense.weight**2).sum(), rel=tolerance)
        self.core.state.consolidate()
        near(self.core.weight, self.dense.weight, tolerance)
        near(self.core.rows(), self.dense.weight, tolerance)
        if self.core.velocity is not None:
            near(self.core.velocity, self.dense.velocity, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_dense_sgd(method: str, loss: str, shape: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    for values in (True, False):
        pair = Pair(first_weight(rng, shape), method=method)
        for _ in range(30):
            batch = draw(rng, shape, values)
            pair.train(batch, loss, stable_lr(batch, 0.3))
        pair.check()


@pytest.mark.parametrize("method", METHODS)
def test_every_unit(method: str, isa: str) -> None:
    rng = np.random.default_rng(1)
    shape = (200, 37, 19, 3)
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 2e-5)):
        weight = first_weight(rng, shape, dtype)
        dense, core = DenseSGD(weight), Core(weight.copy(), method=method)
        for _ in range(15):
            batch = draw(rng, shape, dtype=dtype)
            kept, statistics = core.forward(batch)
            core.backward(kept, fused("squared_error", batch, *statistics, 200), batch.hidden.shape)
            dense.add(batch, spherical("squared_error", batch, *dense.statistics(batch), 200))
            core.state.step(lr=stable_lr(batch, 0.5))
            dense.step(stable_lr(batch, 0.5))
        near(core.rows(), dense.weight, tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_single_labels_all_of_one_class(method: str) -> None:
    rng = np.random.default_rng(2)
    for loss in LOSSES:
        pair = Pair(first_weight(rng, (20, 4)), method=method)
        for _ in range(12):
            batch = Batch(rng.standard_normal((9, 4)), None, np.full(9, 7))
            pair.train(batch, loss, stable_lr(batch, 0.3))
        pair.check()


@pytest.mark.parametrize("method", METHODS)
def test_steps_that_overshoot(method: str) -> None:
    """Between 1 and 2 a step turns the sign of an error's main direction; beyond 2 it grows, for a few steps here."""
    rng = np.random.default_rng(3)
    for rate, steps in ((1.0, 40), (1.5, 40), (1.95, 40), (3.0, 6)):
        for shape in ((40, 5, 3, 2), (40, 3, 8, 1), (40, 1, 1, 1)):
            pair = Pair(first_weight(rng, shape), method=method)
            for _ in range(steps):
                batch = draw(rng, shape)
                pair.train(batch, "squared_error", stable_lr(batch, rate))
            pair.check()


@pytest.mark.parametrize("method", METHODS)
def test_any_derivatives(method: str) -> None:
    """A loss of the user's own: gq of both signs, and zero; gs; gA that depends on all of them."""
    rng = np.random.default_rng(4)
    shape = (40, 5, 6, 2)

    def own(batch: Batch, A: np.ndarray, q: np.ndarray, s: np.ndarray) -> Loss:
        gq = np.tile([-0.4, 0.0, 0.7], 2) / (1 + q)
        return Loss(np.zeros(6), np.tanh(A) - (q + s)[batch.rows] / (10 + q[batch.rows]), gq, np.cos(s) / 40)

    pair = Pair(first_weight(rng, shape), method=method)
    for _ in range(60):
        pair.train(draw(rng, shape), own, 0.1)
    pair.check()


@pytest.mark.parametrize("method", METHODS)
def test_only_growing(method: str) -> None:
    """gq < 0 throughout: U has singular values above 1 alone, where the inverse shows nothing."""
    rng = np.random.default_rng(5)
    pair = Pair(first_weight(rng, (30, 4)), method=method)
    zero = np.zeros(3)
    for _ in range(40):
        batch = draw(rng, (30, 4, 3, 1))
        by = Loss(zero, np.full(len(batch.indices), -0.5), np.full(3, -1.0), zero)
        pair.train(batch, lambda *_, by=by: by, stable_lr(batch, 0.5))
        assert pair.core.state.diagnostics()["kappa"] <= 4
    pair.check()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_decay_and_column_scale(method: str, loss: str) -> None:
    rng = np.random.default_rng(6)
    shape = (40, 5, 4, 2)
    for options in ({"weight_decay": 0.05}, {"column_scale": rng.uniform(0.2, 1.5, 5)}, {"weight_decay": 2.0}):
        pair = Pair(first_weight(rng, shape), method=method)
        for _ in range(40):
            batch = draw(rng, shape)
            pair.train(batch, loss, stable_lr(batch, 0.3), **options)
        pair.check()


@pytest.mark.parametrize("loss", LOSSES)
def test_momentum(loss: str) -> None:
    rng = np.random.default_rng(7)
    for shape in ((40, 5, 4, 2), (30, 1, 2, 1), (40, 3, 8, 2)):
        for momentum, decay, scale in ((0.9, 0.0, None), (0.9, 0.1, None), (0.5, 0.0, rng.uniform(0.5, 1.5, shape[1]))):
            pair = Pair(first_weight(rng, shape), momentum=True)
            for _ in range(30):
                batch = draw(rng, shape)
                options = {"momentum": momentum, "weight_decay": decay, "column_scale": scale}
                pair.train(batch, loss, stable_lr(batch, 0.05), **options)
            pair.core.state.step(lr=0.1, momentum=momentum, weight_decay=decay)  # no gradient waits, as torch's None
            pair.check()


def test_momentum_without_a_learning_rate_gathers_velocity() -> None:
    rng = np.random.default_rng(8)
    pair = Pair(first_weight(rng, (40, 5)), momentum=True)
    for step in range(12):
        batch = draw(rng, (40, 5, 4, 2))
        pair.train(batch, "squared_error", 0.0 if step % 3 else 0.002, momentum=0.9)
    pair.check()


@pytest.mark.parametrize(("block_steps", "radix"), [(1, 2), (3, 2), (1, 16), (7, 3), (1000, 8)])
def test_blocks_and_radix(block_steps: int, radix: int) -> None:
    rng = np.random.default_rng(9)
    for momentum in (0.0, 0.9):
        pair = Pair(first_weight(rng, (60, 4)), momentum=momentum > 0, block_steps=block_steps, radix=radix)
        for _ in range(200):
            batch = draw(rng, (60, 4, 2, 2))
            pair.train(batch, "squared_error", stable_lr(batch, 0.1), momentum=momentum)
        pair.check()


@pytest.mark.parametrize(("max_kappa", "radix"), [(1.0001, 2), (1.5, 3), (100.0, 8)])
def test_epochs(max_kappa: float, radix: int) -> None:
    """From a plain step each time to one epoch for many steps."""
    rng = np.random.default_rng(10)
    pair = Pair(first_weight(rng, (60, 4)), method="woodbury", max_kappa=max_kappa, radix=radix)
    for _ in range(200):
        batch = draw(rng, (60, 4, 2, 2))
        pair.train(batch, "squared_error", stable_lr(batch, 0.1))
        assert 1 <= pair.core.state.diagnostics()["kappa"] <= max_kappa
    found = pair.core.state.diagnostics()
    assert (found["plain_steps"] == 200) == (max_kappa == 1.0001)
    assert found["blocks"] == 200 if max_kappa == 1.0001 else 0 < found["blocks"] < 100
    pair.check()


def test_kappa_bounds_the_singular_values() -> None:
    """U from the rows: of a class that is no target, W_j = V_j U."""
    rng = np.random.default_rng(11)
    weight = np.concatenate([np.eye(4), first_weight(rng, (20, 4))])
    core = Core(weight.copy(), method="woodbury", max_kappa=1e6)
    for sign in (1, 1, -1, 1, -1):
        batch = Batch(rng.standard_normal((2, 4)), None, np.array([5, 9]))
        kept, _ = core.forward(batch)
        gq = sign * np.array([1.0, 0.5])
        core.backward(kept, Loss(gq, np.ones(2), gq, np.zeros(2)), (2, 4))
        core.state.step(lr=0.2)
        sigma = np.linalg.svd(core.rows()[:4], compute_uv=False)
        reach = max(sigma[0], 1 / sigma[-1])
        bound = core.state.diagnostics()["kappa"]
        assert reach <= bound * (1 + 1e-12)
        assert abs(bound - 1 / bound) <= 2 * abs(reach - 1 / reach) + 1e-12  # sqrt(d) apart at most


@pytest.mark.parametrize("method", METHODS)
def test_singular_steps(method: str) -> None:
    """2 lr gq |h|^2 = 1 - lr decay exactly: no row but the targets' keeps anything along h."""
    rng = np.random.default_rng(12)
    one, two = np.array([[0.5, -0.5, 0.5, 0.5]]), np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    for hidden, lr, decay in ((one, 0.5, 0.0), (two, 0.25, 0.0), (one, 0.25, 2.0), (one, 0.5, 2.0)):
        pair = Pair(first_weight(rng, (25, 4)), method=method)
        for _ in range(3):
            pair.train(draw(rng, (25, 4, 3, 2)), "squared_error", 0.02)
        before = pair.core.state.diagnostics()["plain_steps"]
        batch = Batch(hidden, None, np.arange(3, 3 + len(hidden)))
        pair.train(batch, "squared_error", lr, weight_decay=decay)
        assert pair.core.state.diagnostics()["plain_steps"] - before == (method == "woodbury")
        cold = np.setdiff1d(np.arange(25), batch.indices)
        if lr * decay == 1:  # nothing is kept of W but what the batch turns round
            assert np.linalg.matrix_rank(pair.core.rows()[cold], tol=1e-14) == 1
        else:
            near(pair.core.rows()[cold] @ hidden.T, np.zeros((len(cold), len(hidden))), 1e-14)
        for _ in range(3):
            pair.train(draw(rng, (25, 4, 3, 2)), "squared_error", 0.02)
        pair.check()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_add_up(method: str) -> None:
    """Batches of different sizes and overlapping classes as one step; one batch twice; scaled; thrown away."""
    rng = np.random.default_rng(13)
    pair = Pair(first_weight(rng, (40, 5)), method=method)
    for _ in range(10):
        for size in (1, 7, 3):
            pair.add(draw(rng, (40, 5, size, 2)), "taylor_softmax", 0.5)
        assert pair.core.state.pending() == 11
        pair.step(0.05)
        assert pair.core.state.pending() == 0
    batch = draw(rng, (40, 5, 4, 2))
    kept, statistics = pair.core.forward(batch)
    by = fused("z_loss", batch, *statistics, 40)
    for _ in range(2):
        pair.core.backward(kept, by, batch.hidden.shape)
        pair.dense.add(batch, by)
    pair.core.state.scale_grad(0.25)
    pair.dense.gradient *= 0.25
    pair.step(0.05)
    pair.check()
    pair.add(batch, "squared_error")
    pair.core.state.zero_grad()
    pair.dense.gradient[:] = 0
    assert pair.core.state.pending() == 0 and pair.core.state.grad_norm2() == 0
    pair.step(0.05)
    pair.check()


@pytest.mark.parametrize(("method", "momentum"), [("blocked", False), ("blocked", True), ("woodbury", False)])
def test_reading_in_between(method: str, momentum: bool) -> None:
    """Rows, diagnostics, a forward pass without training and consolidate() at any point change nothing."""
    rng = np.random.default_rng(14)
    shape = (40, 5, 4, 2)
    options = {"momentum": 0.5} if momentum else {}
    pair = Pair(first_weight(rng, shape), method=method, momentum=momentum)
    core, dense = pair.core, pair.dense
    for step in range(40):
        batch, other = draw(rng, shape), draw(rng, shape)
        near(core.rows(), dense.weight)
        kept, statistics = core.forward(batch)
        looked, seen = core.forward(other, train=False)
        for got, want in zip(seen, dense.statistics(other), strict=True):
            near(got, want)
        if step % 4 == 1:
            core.state.consolidate()
            near(core.weight, dense.weight)
        by = spherical("taylor_softmax", batch, *statistics, 40)
        near(core.backward(kept, by, batch.hidden.shape), dense.add(batch, by))
        near(core.rows(), dense.weight)
        if step % 4 == 2:
            core.state.consolidate()
        by_other = spherical("taylor_softmax", other, *seen, 40)
        grad_hidden = core.backward(looked, by_other, other.hidden.shape)
        assert core.state.pending() == 4
        before = dense.gradient.copy()
        near(grad_hidden, dense.add(other, by_other))
        dense.gradient[:] = before
        pair.step(0.02, **options)
    pair.check()


@pytest.mark.parametrize("method", METHODS)
def test_weights_written_by_the_caller(method: str) -> None:
    rng = np.random.default_rng(15)
    pair = Pair(first_weight(rng, (40, 5)), method=method)
    for _ in range(3):
        for _ in range(6):
            pair.train(draw(rng, (40, 5, 4, 2)), "taylor_softmax", 0.05)
        kept, statistics = pair.core.forward(batch := draw(rng, (40, 5, 4, 2)))
        pair.core.state.consolidate()
        pair.core.weight[:] = pair.dense.weight = first_weight(rng, (40, 5))
        pair.core.state.refresh()
        with pytest.raises(Exception, match="since this batch's forward pass"):
            pair.core.backward(kept, spherical("squared_error", batch, *statistics, 40), batch.hidden.shape)
        pair.check()
    pair.add(batch, "squared_error")
    with pytest.raises(
        ShapeError, match="refresh: expected no gradient that waits for its step, got one of 4 examples"
    ):
        pair.core.state.refresh()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_types_of_hidden(method: str, dtype: str) -> None:
    rng = np.random.default_rng(19)
    single = rng.standard_normal((4, 5)).astype(np.float32)
    stored = to_bfloat16(single) if dtype == "bfloat16" else single.astype(dtype)
    # cut to what the type holds, the float64 batch means the same numbers
    same = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored
    ids = np.array([3, 8, 3, 1])
    results = []
    for hidden in (stored, same.astype(np.float64)):
        core = Core(first_weight(np.random.default_rng(0), (20, 5)), method=method)
        batch = Batch(hidden, None, ids)
        kept, statistics = core.forward(batch)
        core.backward(kept, fused("squared_error", batch, *statistics, 20), (4, 5))
        core.state.step(lr=0.05)
        results.append([core.rows().tobytes(), *(x.tobytes() for x in statistics)])
    assert results[0] == results[1]


def test_methods_agree_to_rounding_in_float32() -> None:
    """Both on the same float32 rows, a hundred steps: within what the rows themselves are rounded by."""
    ends = []
    for method, wide in itertools.product(METHODS, (False, True)):
        rng = np.random.default_rng(23)
        core = Core(first_weight(rng, (300, 16), np.float32), method=method, wide=wide)
        for _ in range(100):
            batch = draw(rng, (300, 16, 8, 2), dtype=np.float32)
            kept, statistics = core.forward(batch)
            core.backward(kept, fused("taylor_softmax", batch, *statistics, 300), batch.hidden.shape)
            core.state.step(lr=0.02)
        ends.append(core.rows())
    for end in ends[1:]:
        assert 0 < np.linalg.norm(end - ends[0]) < 1e-6 * np.linalg.norm(end)
