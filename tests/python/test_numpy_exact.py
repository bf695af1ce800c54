"""test_numpy_exact.py -- the NumPy face of the exact head, against dense SGD on all the weights in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from widehead import Labels, _core
from widehead.files import FileError
from widehead.numpy import DenseHead, ExactHead, from_bfloat16, to_bfloat16

D, WIDTH, BATCH = 50, 6, 5
LOSSES: dict[str, dict[str, float]] = {
    "squared_error": {},
    "spherical_softmax": {"eps": 0.1},
    "taylor_softmax": {},
    "z_loss": {"a": 0.7, "b": 1.5},
}


class Dense:
    """torch.optim.SGD on the full matrix, the bias a column of it."""

    def __init__(self, head: ExactHead, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.weight = self.rows(head)
        self.velocity = np.zeros_like(self.weight)
        self.loss, self.momentum, self.weight_decay = head.options.loss_arguments(), momentum, weight_decay

    @staticmethod
    def rows(head: ExactHead) -> np.ndarray:
        weight = head.weight.astype(float)
        return weight.copy() if head.bias is None else np.concatenate([weight, head.bias.astype(float)[:, None]], 1)

    def losses_and_outputs(self, hidden: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses [B] and their derivatives by all outputs [B, D], from the definitions; y [B, D], 0 is no target."""
        o = hidden @ self.weight.T
        kind, n = self.loss["loss"], o.shape[1]
        if kind == "squared_error":
            return ((o - y) ** 2).sum(1), 2 * (o - y)
        mass = y.sum(1, keepdims=True)
        if kind == "spherical_softmax":
            own, norm = o**2 + self.loss["eps"], (o**2 + self.loss["eps"]).sum(1, keepdims=True)
            return (y * (np.log(norm) - np.log(own))).sum(1), mass * 2 * o / norm - y * 2 * o / own
        if kind == "taylor_softmax":
            own = 1 + o + o**2 / 2
            norm = own.sum(1, keepdims=True)
            return (y * (np.log(norm) - np.log(own))).sum(1), mass * (1 + o) / norm - y * (1 + o) / own
        a, b = self.loss["a"], self.loss["b"]
        mean, deviation = o.mean(1, keepdims=True), o.std(1, keepdims=True)
        z = (o - mean) / deviation
        by_z = -y / (1 + np.exp(-a * (b - z)))
        by_o = by_z - by_z.sum(1, keepdims=True) / n - z * (by_z * z).sum(1, keepdims=True) / n
        return (y * np.logaddexp(0, a * (b - z)) / a).sum(1), by_o / deviation

    def step(self, hidden: np.ndarray, y: np.ndarray, scale: np.ndarray, lr: float) -> tuple[np.ndarray, np.ndarray]:
        if self.weight.shape[1] > hidden.shape[1]:
            hidden = np.concatenate([hidden, np.ones((len(hidden), 1))], 1)
        losses, by_o = self.losses_and_outputs(hidden, y)
        by_o = by_o * scale[:, None]
        grad_hidden = by_o @ self.weight
        gradient = by_o.T @ hidden + self.weight_decay * self.weight
        self.velocity = self.momentum * self.velocity + gradient
        self.weight = self.weight - lr * self.velocity
        return losses, grad_hidden


def batch(rng: np.random.Generator, labels: int = 2) -> tuple[np.ndarray, Labels, np.ndarray]:
    hidden = rng.standard_normal((BATCH, WIDTH))
    rows = [rng.choice(D, rng.integers(0, labels + 1), replace=False).tolist() for _ in range(BATCH)]
    values = [rng.uniform(0.5, 1.5, len(row)).astype(np.float32).tolist() for row in rows]
    y = np.zeros((BATCH, D))
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        y[i, row] = value
    return hidden, Labels.from_lists(rows, D, values), y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_are_those_of_dense_sgd(loss: str, optimizer: str, bias: bool) -> None:
    rng = np.random.default_rng(1)
    head = ExactHead(WIDTH, D, loss=loss, bias=bias, dtype="float64", **LOSSES[loss])  # type: ignore[arg-type]
    dense = Dense(head, 0.8 if optimizer == "momentum" else 0.0, 0.01)
    for _ in range(60):
        hidden, labels, y = batch(rng)
        weight = rng.uniform(0.5, 2, BATCH)
        want, grad = dense.step(hidden, y, weight / weight.sum(), 0.02)
        got = head.step(hidden, labels, 0.02, optimizer, momentum=0.8, weight_decay=0.01, sample_weight=weight)
        np.testing.assert_allclose(got.loss, (want * weight).sum() / weight.sum(), rtol=1e-10)
        np.testing.assert_allclose(got.grad_hidden, grad[:, :WIDTH], rtol=1e-9, atol=1e-11)
    some = np.array([3, 49, 3, 0])
    np.testing.assert_allclose(head.rows(some), dense.weight[some, :WIDTH], rtol=0, atol=1e-11)
    np.testing.assert_allclose(head.materialise(5, 9), dense.weight[5:9, :WIDTH], rtol=0, atol=1e-11)
    np.testing.assert_allclose(Dense.rows(head), dense.weight, rtol=0, atol=1e-11)
    assert head.diagnostics()["gram_error"] < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_the_method_of_the_papers_gives_the_same(loss: str) -> None:
    heads = [
        ExactHead(WIDTH, D, loss=loss, method=method, bias=True, dtype="float64", **LOSSES[loss])  # type: ignore[arg-type]
        for method in ("blocked", "woodbury")
    ]
    for head in heads:
        rng = np.random.default_rng(1)
        for _ in range(40):
            hidden, labels, _ = batch(rng)
            head.step(hidden, labels, 0.02, weight_decay=0.01)
    np.testing.assert_allclose(heads[1].weight, heads[0].weight, rtol=0, atol=1e-11)
    with pytest.raises(_core.ShapeError, match="optimizer: expected"):
        heads[1].step(hidden, labels, 0.02, "momentum")
    with pytest.raises(_core.ShapeError, match="optimizer: expected"):
        heads[1].statistics(hidden, labels, momentum=True)
    heads[1].step(hidden, labels, 0.02)


def test_a_bound_on_the_condition_ends_the_epochs_of_the_papers_method_sooner() -> None:
    ends = []
    for max_kappa in (1.01, 1e6):
        head = ExactHead(WIDTH, D, method="woodbury", max_kappa=max_kappa, dtype="float64")
        rng = np.random.default_rng(1)
        for _ in range(20):
            hidden, labels, _ = batch(rng)
            head.step(hidden, labels, 0.02)
        ends.append(head.diagnostics())
    assert ends[0]["kappa"] <= 1.01 < ends[1]["kappa"] <= 1e6
    assert ends[0]["blocks"] > ends[1]["blocks"]


def test_single_labels_and_those_that_do_not_count() -> None:
    rng = np.random.default_rng(2)
    head = ExactHead(WIDTH, D, dtype="float64", reduction="sum", ignore_index=-7)
    dense = Dense(head)
    hidden, target = rng.standard_normal((2, 3, WIDTH)), np.array([[1, -7, 5], [5, 49, 0]])
    y = np.zeros((6, D))
    for i, c in enumerate(target.ravel()):
        if c >= 0:
            y[i, c] = 1
    want, grad = dense.step(hidden.reshape(6, WIDTH), y, (target.ravel() >= 0).astype(float), 0.05)
    before = head.forward(hidden, target)
    got = head.step(hidden, target, 0.05)
    assert got.loss == pytest.approx(want[target.ravel() >= 0].sum()) == pytest.approx(float(before.loss))
    np.testing.assert_allclose(got.grad_hidden, grad.reshape(hidden.shape), atol=1e-12)
    np.testing.assert_allclose(head.weight, dense.weight, atol=1e-13)


def test_a_loss_of_ones_own_in_two_batches() -> None:
    """Implicit feedback: alpha o^2 everywhere, but (1 + c) (o - 1)^2 on what was seen; two batches, one step."""
    rng, alpha = np.random.default_rng(3), 0.1
    head = ExactHead(WIDTH, D, dtype="float64")
    weight = head.weight.copy()
    gradient = np.zeros_like(weight)
    for _ in range(2):
        hidden, labels, y = batch(rng, 4)
        o = hidden @ weight.T
        seen = y > 0
        by_o = 2 * alpha * o * ~seen + 2 * (1 + y) * (o - 1) * seen
        gradient += by_o.T @ hidden
        b = head.statistics(hidden, labels)
        grad = b.backward(2 * (1 + b.values) * (b.A - 1) - 2 * alpha * b.A, alpha)
        np.testing.assert_allclose(grad, by_o @ weight, atol=1e-12)
    assert head.grad_norm() == pytest.approx(np.linalg.norm(gradient))
    np.testing.assert_allclose(head.grad_columns(), (gradient**2).mean(0), rtol=1e-9)
    with pytest.raises(_core.ShapeError, match="step: 10 examples wait"):
        head.step(hidden, labels, 0.1)
    head.apply(0.01, clip=1.0)
    np.testing.assert_allclose(head.weight, weight - 0.01 * gradient / max(1, np.linalg.norm(gradient)), atol=1e-12)
    b = head.statistics(hidden, labels)
    b.backward(b.A, 1.0)
    head.zero_grad()
    kept = head.weight.copy()
    head.apply(0.1)
    assert np.array_equal(head.weight, kept)


def test_columns_scaled_as_by_rmsprop() -> None:
    rng = np.random.default_rng(4)
    head = ExactHead(WIDTH, D, dtype="float64", bias=True)
    weight, mean_square = Dense.rows(head), np.zeros(WIDTH + 1)
    for _ in range(20):
        hidden, labels, y = batch(rng)
        wide = np.concatenate([hidden, np.ones((BATCH, 1))], 1)
        gradient = (2 * (wide @ weight.T - y)).T @ wide
        b = head.statistics(hidden, labels)
        b.backward(-2 * b.values, 1.0)
        mean_square = 0.9 * mean_square + 0.1 * head.grad_columns()
        scale = 1 / (np.sqrt(mean_square) + 1e-3)
        head.apply(0.001, column_scale=scale)
        weight = weight - 0.001 * gradient * scale
    np.testing.assert_allclose(Dense.rows(head), weight, atol=1e-11)


@pytest.mark.parametrize("loss", LOSSES)
def test_queries_are_those_of_a_dense_head(loss: str) -> None:
    rng = np.random.default_rng(5)
    head = ExactHead(WIDTH, D, loss=loss, bias=True, **LOSSES[loss])  # type: ignore[arg-type]
    for _ in range(6):
        hidden, labels, _ = batch(rng)
        head.step(hidden.astype(np.float32), labels, 0.01)
    dense = DenseHead(WIDTH, D)
    dense.weight, dense.bias = head.weight, head.bias
    hidden = rng.standard_normal((BATCH, WIDTH)).astype(np.float32)
    z = head.scores(hidden)
    assert np.array_equal(z, dense.scores(hidden))
    likely = np.abs(z - {"spherical_softmax": 0, "taylor_softmax": -1}[loss]) if "softmax" in loss else z.copy()
    assert np.array_equal(head.predict(hidden), likely.argmax(1))
    likely[:, :2] = -np.inf
    for k in (1, 4, D):
        scores, classes = head.topk(hidden, k, exclude=[[0, 1]] * BATCH)
        order = np.argsort(-likely, axis=1, kind="stable")[:, : min(k, D - 2)]
        assert np.array_equal(classes[:, : D - 2], order)
        assert np.array_equal(scores[:, : D - 2], np.take_along_axis(z, order, 1))
        assert (classes[:, D - 2 :] == -1).all() and (scores[:, D - 2 :] == -np.inf).all()
    half = to_bfloat16(hidden)
    assert np.array_equal(head.predict(half), head.predict(from_bfloat16(half)))
    if loss not in ("spherical_softmax", "taylor_softmax"):
        with pytest.raises(_core.ShapeError, match="log_prob: expected spherical_softmax or taylor_softmax"):
            head.log_prob(hidden)
        return
    probability = np.exp(head.log_prob(hidden).astype(float))
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-4)
    some = np.array([4, 9])
    np.testing.assert_allclose(head.log_prob(hidden, some), head.log_prob(hidden)[:, some], rtol=1e-6)
    target = np.arange(BATCH)
    forward = head.forward(hidden, target)
    np.testing.assert_allclose(forward.output, head.log_prob(hidden)[target, target], rtol=1e-4)


def test_life_of_a_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    head = ExactHead(WIDTH, D, loss="taylor_softmax", bias=True, seed=3)
    for _ in range(9):
        hidden, labels, _ = batch(rng)
        head.step(hidden.astype(np.float32), labels, 0.05, "momentum")
    head.save(tmp_path / "head.safetensors")
    other = ExactHead.load(tmp_path / "head.safetensors")
    assert other.options == head.options and other.steps == 9
    assert np.array_equal(other.weight, head.weight) and np.array_equal(other.bias, head.bias)
    with pytest.raises(FileError):
        DenseHead.load(tmp_path / "head.safetensors")
    third = ExactHead(WIDTH, D, loss="taylor_softmax", bias=True)
    third.load_state_dict({name: array.copy() for name, array in head.state_dict().items()})
    steps = [one.step(hidden, labels, 0.05) for one in (other, third)]
    assert steps[0].loss == steps[1].loss == head.forward(hidden, labels).loss
    assert np.array_equal(other.weight, third.weight) and not np.array_equal(other.weight, head.weight)
    old = head.weight.copy()
    head.grow(D + 10)
    assert np.array_equal(head.weight[:D], old)
    assert np.array_equal(head.weight[D:], ExactHead(WIDTH, D + 10, seed=3).weight[D:])
    assert np.isfinite(head.step(hidden.astype(np.float32), np.full(BATCH, D + 9), 0.05, "momentum").loss)


def test_a_refused_apply_keeps_the_gradient_as_it_was() -> None:
    rng = np.random.default_rng(8)
    head = ExactHead(WIDTH, D)
    hidden, labels, _ = batch(rng)
    b = head.statistics(hidden, labels)
    b.backward(-2 * b.values, 1.0)
    norm = head.grad_norm()
    for scale, error in ((np.full(WIDTH, np.nan), _core.NonFiniteError), (np.ones(WIDTH + 1), _core.ShapeError)):
        with pytest.raises(error, match="column_scale: expected"):
            head.apply(0.1, clip=norm / 2, column_scale=scale)
        assert head.grad_norm() == norm


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": np.full((BATCH, WIDTH), np.nan)}, _core.NonFiniteError, "hidden"),
    ({"hidden": np.zeros((BATCH, WIDTH + 1))}, _core.ShapeError, "hidden: expected shape"),
    ({"target": np.full(BATCH, D)}, _core.LabelError, f"target: expected classes in \\[0, {D}\\), got {D}"),
    ({"target": np.zeros(BATCH)}, _core.DtypeError, "target: expected integer classes"),
    ({"lr": np.nan}, _core.ShapeError, "lr: expected a finite number of at least 0, got nan"),
    ({"lr": -1.0}, _core.ShapeError, "lr: expected a finite number of at least 0, got -1.0"),
    ({"weight_decay": np.inf}, _core.ShapeError, "weight_decay"),
    ({"clip": -1.0}, _core.ShapeError, "clip"),
    ({"optimizer": "adam"}, _core.ShapeError, "optimizer"),
    ({"sample_weight": np.full(BATCH, np.inf)}, _core.NonFiniteError, "sample_weight"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_refused_step_changes_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Two heads, of which one is refused a step in the middle, end with the same bits."""
    ends = []
    for refused in (False, True):
        rng = np.random.default_rng(7)
        head = ExactHead(WIDTH, D, seed=1)
        for i in range(10):
            hidden, labels, _ = batch(rng)
            if refused and i == 6:
                arguments: dict[str, Any] = {"hidden": hidden, "target": np.zeros(BATCH, np.int64), "lr": 0.1, **change}
                with pytest.raises(error, match=message):
                    head.step(**arguments)
            head.step(hidden, labels, 0.02)
        ends.append(head)
    assert np.array_equal(ends[0].weight, ends[1].weight)
    assert ends[0].diagnostics() == ends[1].diagnostics()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "softmax"}, "loss: expected"),
        ({"eps": 0.1}, "eps: expected None with loss='squared_error'"),
        ({"loss": "z_loss", "a": -1.0}, "a: expected a positive number"),
        ({"loss": "z_loss", "b": np.inf}, "b: expected a finite number"),
        ({"factors": "bfloat16"}, "factors: expected"),
        ({"block_steps": 0}, "block_steps: expected"),
        ({"method": "lu"}, "method: expected"),
        ({"max_kappa": 8.0}, "max_kappa: expected None with method='blocked'"),
        ({"method": "woodbury", "max_kappa": 1.0}, "max_kappa: expected a number above 1"),
        ({"dtype": "bfloat16"}, "dtype: expected"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(_core.ShapeError, match=message):
        ExactHead(WIDTH, D, **options)
