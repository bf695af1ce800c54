"""test_exact.py -- the exact head's core against dense SGD in float64: every method, loss, shape and option."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dense_cases import far_apart, strided
from exact_reference import OPTIONS, Batch, Core, DenseSGD, Loss, fused, spherical
from widehead import DtypeError, LabelError, NonFiniteError, ShapeError, _core
from widehead.numpy import to_bfloat16

METHODS = ("blocked", "woodbury")
LOSSES = ("squared_error", "spherical_softmax", "taylor_softmax", "z_loss")
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


def draw(
    rng: np.random.Generator, shape: tuple[int, int, int, int], values: bool = True, dtype: Any = np.float64
) -> Batch:
    """Up to K different targets an example, drawn so that many examples share classes."""
    classes, features, batch, most = shape
    ids = [np.unique((classes * rng.random(most) ** 3).astype(np.int64)) for _ in range(batch)]
    indptr = np.cumsum([0, *map(len, ids)])
    indices = np.concatenate(ids) if len(ids) else np.zeros(0, np.int64)
    weights = rng.uniform(0.5, 1.5, len(indices)).astype(np.float32) if values else None
    return Batch(rng.standard_normal((batch, features)).astype(dtype), indptr, indices, weights)


def first_weight(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    return (0.3 * rng.standard_normal(shape[:2])).astype(dtype)


def stable_lr(batch: Batch, rate: float) -> float:
    """2 lr lambda_1 = rate for squared error."""
    return rate / (2 * np.linalg.norm(batch.hidden.astype(np.float64), 2) ** 2)


def near(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-10) -> None:
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max(initial=0.0)))


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


def fingerprint(core: Core) -> list[Any]:
    """All of the state that can be seen, to the bit."""
    batch = draw(np.random.default_rng(99), (*core.weight.shape, 3, 2))
    _, statistics = core.forward(batch, train=False)
    found = {key: value for key, value in core.state.diagnostics().items() if key != "fetched"}
    velocity = b"" if core.velocity is None else core.velocity.tobytes()
    gradient = [core.state.pending(), core.state.grad_norm2(), core.columns().tobytes()]
    return [
        core.weight.tobytes(),
        velocity,
        core.rows().tobytes(),
        found,
        *(x.tobytes() for x in statistics),
        *gradient,
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", METHODS)
def test_no_learning_rate_leaves_every_bit(method: str, dtype: Any) -> None:
    rng = np.random.default_rng(16)
    core = Core(first_weight(rng, (40, 5), dtype), method=method)
    for step in range(9):
        batch = draw(rng, (40, 5, 4, 2))
        kept, statistics = core.forward(batch)
        before = fingerprint(core)
        for decay in (0.0, 0.5):
            core.backward(kept, spherical("taylor_softmax", batch, *statistics, 40), batch.hidden.shape)
            core.state.step(lr=0.0, weight_decay=decay)
            assert fingerprint(core) == before
        kept, statistics = core.forward(batch)
        core.backward(kept, spherical("taylor_softmax", batch, *statistics, 40), batch.hidden.shape)
        core.state.step(lr=0.05)
        assert fingerprint(core) != before, step


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_same_bits_for_any_threads(method: str, wide: bool) -> None:
    found = []
    for threads in (1, 2, 4):
        _core.set_num_threads(threads)
        rng = np.random.default_rng(17)
        core = Core(first_weight(rng, (3000, 64), np.float32), method=method, wide=wide, momentum=method == "blocked")
        for _ in range(14):
            batch = draw(rng, (3000, 64, 48, 5), dtype=np.float32)
            kept, statistics = core.forward(batch)
            core.backward(kept, fused("squared_error", batch, *statistics, 3000), batch.hidden.shape)
            core.state.step(lr=0.002, **({"momentum": 0.5} if method == "blocked" else {}))
        found.append(fingerprint(core))
        core.state.consolidate()
        found[-1].append(core.weight.tobytes())
    assert found[0] == found[1] == found[2]


def good(rng: np.random.Generator) -> dict[str, Any]:
    batch = draw(rng, (40, 5, 4, 2))
    A, q, s = np.zeros(len(batch.indices)), np.zeros(4), np.zeros(4)
    return {"hidden": batch.hidden, **batch.labels(), "train": True, "A": A, "q": q, "s": s}


def with_nan(x: np.ndarray, at: Any, value: float = np.nan) -> np.ndarray:
    x = x.copy()
    x[at] = value
    return x


BAD_FORWARD: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = [
    (lambda g: {"hidden": with_nan(g["hidden"], (2, 3))}, NonFiniteError, "hidden"),
    (lambda g: {"hidden": with_nan(g["hidden"], (0, 0), np.inf)}, NonFiniteError, "hidden"),
    (lambda g: {"hidden": g["hidden"][:, :4]}, ShapeError, "hidden"),
    (lambda g: {"hidden": g["hidden"].astype(np.int64)}, DtypeError, "hidden"),
    (lambda g: {"hidden": g["hidden"][:3]}, ShapeError, "indptr"),
    (lambda g: {"values": with_nan(g["values"], 1)}, LabelError, "nan"),
    (lambda g: {"values": with_nan(g["values"], 1, -np.inf)}, LabelError, "inf"),
    (lambda g: {"values": g["values"][1:]}, ShapeError, "values"),
    (lambda g: {"indices": with_nan(g["indices"], 1, 40)}, LabelError, "40"),
    (lambda g: {"indices": with_nan(g["indices"], -1, -1)}, LabelError, "-1"),
    (lambda g: {"indices": np.full_like(g["indices"], 3)}, LabelError, "distinct"),
    (lambda g: {"indptr": np.array([0, 2, 1, 3, len(g["indices"])])}, LabelError, "decrease"),
    (lambda g: {"A": g["A"][1:]}, ShapeError, "A"),
    (lambda g: {"q": np.zeros(4, np.float32)}, DtypeError, "q"),
    (lambda g: {"s": np.zeros(5)}, ShapeError, "s"),
    (
        lambda g: {"indptr": None, "indices": np.array([1, 2, -100, 3]), "values": None, "A": np.zeros(4)},
        LabelError,
        "-100",
    ),
]
BAD_BACKWARD: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = [
    (lambda g: {"grad_A": with_nan(g["grad_A"], 2)}, NonFiniteError, "grad_A"),
    (lambda g: {"grad_q": with_nan(g["grad_q"], 3, np.inf)}, NonFiniteError, "grad_q"),
    (lambda g: {"grad_s": with_nan(g["grad_s"], 0)}, NonFiniteError, "grad_s"),
    (lambda g: {"grad_A": g["grad_A"][1:]}, ShapeError, "grad_A"),
    (lambda g: {"grad_q": g["grad_q"].astype(np.float32)}, DtypeError, "grad_q"),
    (lambda g: {"grad_hidden": np.zeros((4, 6))}, ShapeError, "grad_hidden"),
]
BAD_STEP: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": np.nan}, ShapeError, "lr"),
    ({"lr": np.inf}, ShapeError, "lr"),
    ({"lr": -0.1}, ShapeError, "lr"),
    ({"lr": 0.1, "weight_decay": np.nan}, ShapeError, "weight_decay"),
    ({"lr": 0.1, "weight_decay": -1.0}, ShapeError, "weight_decay"),
    ({"lr": 0.1, "momentum": 0.9}, ShapeError, "momentum"),
    ({"lr": 0.1, "column_scale": np.array([1.0, 1, np.nan, 1, 1])}, NonFiniteError, "column_scale"),
    ({"lr": 0.1, "column_scale": np.ones(4)}, ShapeError, "column_scale"),
]


@pytest.mark.parametrize("method", METHODS)
def test_refusals_leave_every_bit(method: str) -> None:
    rng = np.random.default_rng(18)
    core = Core(first_weight(rng, (40, 5), np.float32), method=method)
    for _ in range(7):
        batch = draw(rng, (40, 5, 4, 2))
        kept, statistics = core.forward(batch)
        by = spherical("taylor_softmax", batch, *statistics, 40)
        core.backward(kept, by, batch.hidden.shape)
        core.state.step(lr=0.05)
    kept, statistics = core.forward(batch)
    core.backward(kept, by, batch.hidden.shape)
    before = fingerprint(core)
    for change, error, name in BAD_FORWARD:
        arguments = good(rng)
        with pytest.raises(error, match=name):
            core.state.forward(**{**arguments, **change(arguments)})
        assert fingerprint(core) == before
    for change, error, name in BAD_BACKWARD:
        grads = {"grad_A": by.grad_A, "grad_q": by.grad_q, "grad_s": by.grad_s}
        with pytest.raises(error, match=name):
            core.state.backward(kept, **{**grads, **change(grads)})
        assert fingerprint(core) == before
    for options, error, name in BAD_STEP:
        with pytest.raises(error, match=name):
            core.state.step(**options)
        assert fingerprint(core) == before
    for ids, out, error in (([40], (1, 5), LabelError), ([-1], (1, 5), LabelError), ([1, 2], (1, 5), ShapeError)):
        with pytest.raises(error):
            core.state.rows(np.array(ids), np.zeros(out))
    with pytest.raises(ShapeError, match="factor"):
        core.state.scale_grad(np.nan)
    assert fingerprint(core) == before
    core.state.step(lr=0.05)
    assert fingerprint(core) != before
    with pytest.raises(Exception, match="since this batch's forward pass"):
        core.backward(kept, by, batch.hidden.shape)


def test_constructor_refuses() -> None:
    weight = np.ones((4, 3), np.float32)
    for bad, error, name in (
        ({"weight": with_nan(weight, (1, 1))}, NonFiniteError, "weight"),
        ({"weight": weight.astype(np.float16)}, DtypeError, "weight"),
        ({"weight": weight[:0]}, ShapeError, "weight"),
        ({"velocity": np.zeros((4, 2), np.float32)}, ShapeError, "velocity"),
        ({"velocity": np.zeros((4, 3))}, DtypeError, "velocity"),
        ({"velocity": with_nan(weight, (3, 2), np.inf)}, NonFiniteError, "velocity"),
        ({"velocity": weight.copy(), "method": "woodbury"}, ShapeError, "woodbury.* no momentum"),
        ({"method": "exact"}, ShapeError, "method: expected 'blocked' or 'woodbury', got 'exact'"),
        ({"block_steps": 0}, ShapeError, "block_steps"),
        ({"radix": 1}, ShapeError, "radix"),
        ({"max_kappa": 1.0}, ShapeError, "max_kappa"),
        ({"max_kappa": np.nan}, ShapeError, "max_kappa"),
    ):
        with pytest.raises(error, match=name):
            _core.ExactState(**{"weight": weight, **bad})


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


@pytest.mark.parametrize("method", METHODS)
def test_rows_far_apart(method: str) -> None:
    """Offsets as of a hundred million classes, and rows with other memory between them."""
    rng = np.random.default_rng(20)
    weight = first_weight(rng, (6, 5), np.float32)
    cores = [Core(weight.copy(), method=method), Core(strided(weight, 3), method=method)]
    cores.append(Core(far_apart(weight, 10**8), method=method))
    for _ in range(12):
        batch = draw(rng, (6, 5, 3, 1), dtype=np.float32)
        for core in cores:
            kept, statistics = core.forward(batch)
            core.backward(kept, fused("squared_error", batch, *statistics, 6), batch.hidden.shape)
            core.state.step(lr=0.02)
    for core in cores:
        core.state.consolidate()
        assert np.array_equal(core.weight, cores[0].weight)
    assert not np.array_equal(cores[0].weight, weight)
    assert np.isnan(cores[1].weight.base[:, 5:]).all()


@pytest.mark.parametrize("method", METHODS)
def test_memory_of_a_long_run_is_bounded(method: str) -> None:
    """A few classes come all the time, the others seldom: the lists of rows do not fill with those that left."""
    rng = np.random.default_rng(21)
    core = Core(first_weight(rng, (100, 2), np.float32), method=method, max_kappa=1.5)
    most = 0
    for step in range(3000):
        ids = np.append(rng.integers(0, 5, 3), rng.integers(0, 100) if step % 50 == 0 else 0)
        batch = Batch(rng.standard_normal((4, 2)).astype(np.float32), None, ids)
        kept, statistics = core.forward(batch)
        core.backward(kept, fused("squared_error", batch, *statistics, 100), (4, 2))
        core.state.step(lr=0.02)
        if step % 10 == 9:
            found = core.state.diagnostics()
            most = max(most, found["listed"])
            assert found["hot_rows"] <= 16
            assert found["matrices"] <= 8 * (1 + np.log(max(found["blocks"], 1)) / np.log(8))
    assert 5 <= most <= 200
    assert core.state.diagnostics()["gram_error"] < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str) -> None:
    """By the core and by NumPy; derivatives by differences of the core's own values."""
    rng = np.random.default_rng(22)
    for shape in ((40, 6, 5, 3), (7, 6, 4, 1), (40, 6, 3, 0)):
        for values in (True, False):
            batch = draw(rng, shape, values)
            output = batch.hidden @ first_weight(rng, shape).T
            A, q, s = output[batch.rows, batch.indices], (output**2).sum(1), output.sum(1)
            got, want = fused(loss, batch, A, q, s, shape[0]), spherical(loss, batch, A, q, s, shape[0])
            for x, y in zip(got, want, strict=True):
                near(x, y, 1e-13)
            step = 1e-5
            for k, grad in ((0, got.grad_A), (1, got.grad_q), (2, got.grad_s)):
                for i in range(len(grad)):
                    ends = []
                    for side in (-step, step):
                        at = [A.copy(), q.copy(), s.copy()]
                        at[k][i] += side
                        ends.append(fused(loss, batch, *at, shape[0]).losses.sum())
                    assert grad[i] == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-5, abs=1e-7)


def test_losses_refuse_their_options() -> None:
    batch = Batch(np.zeros((1, 1)), None, np.array([0]))
    arguments = {
        "loss": "z_loss",
        **OPTIONS,
        "n_classes": 3,
        **batch.labels(),
        "A": np.ones(1),
        "q": np.ones(1),
        "s": np.ones(1),
    }
    for bad, name in ({"loss": "softmax"}, "loss"), ({"eps": 0.0}, "eps"), ({"a": -1.0}, "a"), ({"b": np.nan}, "b"):
        with pytest.raises(ShapeError, match=f"{name}: expected"):
            _core.spherical_loss(**{**arguments, **bad})
    with pytest.raises(LabelError):
        _core.spherical_loss(**{**arguments, "indices": np.array([3])})


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
