"""test_cuda_exact.py -- the exact head on a GPU against dense SGD in float64: losses, options, log, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from devices import call, claim_cuda, only_gpu
from exact_gpu import GpuCore, fused_on_gpu, memory
from exact_reference import (
    LOSSES,
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
from widehead import _core
from widehead.numpy import to_bfloat16

pytestmark = only_gpu

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
    (90, 70, 40, 3),
]


class Pair:
    """Dense SGD and the GPU on the same batches; `train` compares everything on the way."""

    def __init__(self, weight: np.ndarray, **options: Any) -> None:
        self.dense, self.core = DenseSGD(weight), GpuCore(weight.copy(), **options)
        self.classes = len(weight)

    def train(self, batch: Batch, loss: str | Callable[..., Loss], lr: float, **options: Any) -> None:
        kept, statistics = self.core.forward(batch)
        want = self.dense.statistics(batch)
        for got, true in zip(statistics, want, strict=True):
            near(got, true)
        if callable(loss):
            by_core = by = loss(batch, *want)
        else:
            by = spherical(loss, batch, *want, self.classes)
            by_core = fused_on_gpu(loss, batch, *statistics, self.classes)
            for got, true in zip(by_core, by, strict=True):
                near(got, true)
        near(self.core.backward(kept, by_core, batch.hidden.shape), self.dense.add(batch, by))
        norm2, columns = self.core.gradient(kept)
        near(np.array(norm2), (self.dense.gradient**2).sum())
        near(columns, (self.dense.gradient**2).mean(0))
        self.core.step(kept, lr, **options)
        if "grad_scale" in options:
            self.dense.gradient *= options.pop("grad_scale")
        self.dense.step(lr, **options)

    def check(self, tolerance: float = 1e-10) -> None:
        near(self.core.rows(), self.dense.weight, tolerance)
        all_rows = [self.dense.weight, self.dense.velocity] if self.core.velocity is not None else [self.dense.weight]
        rows = np.concatenate(all_rows, axis=1)
        squares, sums = self.core.gram()
        near(squares, rows.T @ rows, tolerance)
        near(sums, rows.sum(0), tolerance)
        assert np.array_equal(squares, squares.T)
        assert self.core.diagnostics()["weight_norm2"] == pytest.approx((self.dense.weight**2).sum(), rel=tolerance)
        self.core.consolidate()
        near(self.core.weight, self.dense.weight, tolerance)
        near(self.core.rows(), self.dense.weight, tolerance)
        if self.core.velocity is not None:
            near(self.core.velocity, self.dense.velocity, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_dense_sgd(loss: str, shape: tuple[int, int, int, int], device: str) -> None:
    rng = np.random.default_rng(sum(shape))
    pair = Pair(first_weight(rng, shape))
    for step in range(11):
        batch = draw(rng, shape, values=step % 2 == 0)
        pair.train(batch, loss, stable_lr(batch, 0.3))
    pair.check()


@pytest.mark.parametrize("loss", LOSSES)
def test_options(loss: str, device: str) -> None:
    rng = np.random.default_rng(1)
    for shape in ((40, 5, 4, 2), (30, 1, 2, 1), (40, 3, 8, 2)):
        scale = rng.uniform(0.2, 1.5, shape[1])
        for momentum, decay, columns, whole in (
            (0.0, 0.05, None, None),
            (0.0, 2.0, scale, 0.5),
            (0.9, 0.0, None, None),
            (0.9, 0.1, None, 0.3),
            (0.5, 0.0, scale, None),
        ):
            pair = Pair(first_weight(rng, shape), momentum=momentum > 0)
            options: dict[str, Any] = {"momentum": momentum, "weight_decay": decay, "column_scale": columns}
            if whole is not None:
                options["grad_scale"] = np.array([whole])
            for _ in range(12):
                batch = draw(rng, shape)
                pair.train(batch, loss, stable_lr(batch, 0.05), **options)
            pair.check()


def train_wide(shape: tuple[int, int, int, int], steps: int) -> None:
    rng = np.random.default_rng(18)
    pair = Pair(first_weight(rng, shape), momentum=True)
    for _ in range(steps):
        batch = draw(rng, shape)
        pair.train(batch, "taylor_softmax", stable_lr(batch, 0.1), momentum=0.5)
    pair.check()


def test_many_features(device: str) -> None:
    """More columns than the threads of a tile of rows take at once."""
    train_wide((30, 140, 3, 2), 9)


def test_little_shared_memory(device: str) -> None:
    """Rows that pass through the log one by one, and rows that do not fit at all."""
    if not _core.cuda_emulated:
        pytest.skip("the size of shared memory is the card's")
    environment = {**os.environ, "WIDEHEAD_EMULATED_SHARED": "1024", "PYTHONPATH": os.pathsep.join(sys.path)}
    for features, message in ((5, ""), (20, ""), (33, "in_features: expected at most 64 columns of weight and vel")):
        script = f"from test_cuda_exact import train_wide; train_wide((40, {features}, 4, 2), 18)"
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == (message == "") and message in done.stderr, done.stderr


def test_single_labels_all_of_one_class(device: str) -> None:
    rng = np.random.default_rng(2)
    for loss in LOSSES:
        pair = Pair(first_weight(rng, (20, 4)))
        for _ in range(9):
            batch = Batch(rng.standard_normal((9, 4)), None, np.full(9, 7))
            pair.train(batch, loss, stable_lr(batch, 0.3))
        pair.check()


def test_steps_that_overshoot(device: str) -> None:
    """Rates of 1 and more: products of steps far from I, and beyond 2 growing ones."""
    rng = np.random.default_rng(3)
    for rate, steps in ((1.0, 40), (1.95, 40), (3.0, 6)):
        for shape in ((40, 5, 3, 2), (40, 3, 8, 1), (40, 1, 1, 1)):
            pair = Pair(first_weight(rng, shape))
            for _ in range(steps):
                batch = draw(rng, shape)
                pair.train(batch, "squared_error", stable_lr(batch, rate))
            pair.check()


def test_any_derivatives(device: str) -> None:
    """A loss of the user's own: gq of both signs, and zero; gs; gA that depends on all of them."""
    rng = np.random.default_rng(4)
    shape = (40, 5, 6, 2)

    def own(batch: Batch, A: np.ndarray, q: np.ndarray, s: np.ndarray) -> Loss:
        gq = np.tile([-0.4, 0.0, 0.7], 2) / (1 + q)
        return Loss(np.zeros(6), np.tanh(A) - (q + s)[batch.rows] / (10 + q[batch.rows]), gq, np.cos(s) / 40)

    def growing(batch: Batch, A: np.ndarray, q: np.ndarray, s: np.ndarray) -> Loss:
        return Loss(np.zeros(6), np.full(len(A), -0.5), np.full(6, -1.0), np.zeros(6))

    for loss, lr in ((own, 0.1), (growing, 0.004)):
        pair = Pair(first_weight(rng, shape))
        for _ in range(30):
            pair.train(draw(rng, shape), loss, lr)
        pair.check()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_long_log(momentum: float, device: str) -> None:
    """More steps than 8^3: intervals of three levels. Half of the classes are never targets, some long ago."""
    rng = np.random.default_rng(5)
    shape = (24, 3, 2, 2)
    pair = Pair(first_weight(rng, shape), momentum=momentum > 0)
    moved = []
    for step in range(600):
        batch = draw(rng, (12 if step % 20 == 0 else 6, *shape[1:]))
        kept, statistics = pair.core.forward(batch)
        by = fused("squared_error", batch, *statistics, 24)
        pair.core.backward(kept, by, batch.hidden.shape)
        pair.dense.add(batch, by)
        lr = stable_lr(batch, 0.1)
        pair.core.step(kept, lr, momentum=momentum)
        pair.dense.step(lr, momentum=momentum)
        if step % 64 in (6, 7, 8) or step in (510, 511, 512, 599):
            near(pair.core.rows(), pair.dense.weight)
            found = pair.core.diagnostics()
            assert found["steps"] == found["taken"] == step + 1
            assert found["matrices"] == sum(int(digit) for digit in f"{step + 1:o}")
            moved.append(found["moved"])
    assert moved == sorted(moved) and moved[-1] > 100
    pair.check()


@pytest.mark.parametrize("classes", [1, 255, 256, 257, 1000, 20_000])
def test_any_number_of_classes(classes: int, device: str) -> None:
    """A chunk of classes is searched for old labels as a whole."""
    rng = np.random.default_rng(classes)
    pair = Pair(first_weight(rng, (classes, 3)))
    for step in range(66):
        edge = np.array([0, classes - 1, min(255, classes - 1), rng.integers(classes)])[: 1 + step % 4]
        batch = Batch(rng.standard_normal((len(edge), 3)), None, edge)
        kept, statistics = pair.core.forward(batch)
        by = fused("taylor_softmax", batch, *statistics, classes)
        pair.core.backward(kept, by, batch.hidden.shape)
        pair.dense.add(batch, by)
        pair.core.step(kept, 0.03)
        pair.dense.step(0.03)
    assert (pair.core.diagnostics()["moved"] > 0) == (classes > 1)
    pair.check()


def test_same_bits_every_time(device: str) -> None:
    ends = []
    for _ in range(2):
        rng = np.random.default_rng(6)
        shape = (300, 37, 19, 3)
        core = GpuCore(first_weight(rng, shape, np.float32), momentum=True)
        for _ in range(10):
            batch = draw(rng, shape, dtype=np.float32)
            kept, statistics = core.forward(batch)
            core.backward(kept, fused_on_gpu("z_loss", batch, *statistics, 300), batch.hidden.shape)
            core.step(kept, 0.01, momentum=0.9)
        assert core.velocity is not None
        ends.append([x.tobytes() for x in (core.rows(), core.weight, core.velocity, *core.gram(), *statistics)])
    assert ends[0] == ends[1]


def test_reading_in_between(device: str) -> None:
    """Rows of any ids, a forward pass that no step follows, and consolidate() at any point change nothing."""
    rng = np.random.default_rng(7)
    shape = (40, 5, 4, 2)
    pair = Pair(first_weight(rng, shape), momentum=True)
    for step in range(20):
        ids = rng.integers(0, 40, 50)
        near(pair.core.rows(ids), pair.dense.weight[ids])
        batch, other = draw(rng, shape), draw(rng, shape)
        kept, statistics = pair.core.forward(batch)
        for got, want in zip(pair.core.forward(other)[1], pair.dense.statistics(other), strict=True):
            near(got, want)
        if step % 3 == 1:
            pair.core.consolidate()
            near(pair.core.weight, pair.dense.weight)
            assert pair.core.diagnostics()["steps"] == 0
        by = fused("taylor_softmax", batch, *statistics, 40)
        near(pair.core.backward(kept, by, batch.hidden.shape), pair.dense.add(batch, by))
        pair.core.step(kept, 0.02, momentum=0.5)
        pair.dense.step(0.02, momentum=0.5)
    before = pair.core.bytes()
    pair.core.rows()
    pair.core.forward(batch)
    assert pair.core.bytes() == before
    pair.check()
    before = pair.core.weight.tobytes()
    pair.core.consolidate()
    assert pair.core.weight.tobytes() == before


def test_weights_written_by_the_caller(device: str) -> None:
    rng = np.random.default_rng(8)
    pair = Pair(first_weight(rng, (40, 5)))
    for _ in range(2):
        for _ in range(9):
            pair.train(draw(rng, (40, 5, 4, 2)), "taylor_softmax", 0.05)
        pair.core.consolidate()
        pair.core.weight[:] = pair.dense.weight = first_weight(rng, (40, 5))
        pair.core.refresh()
        pair.check()
    pair.core.weight[3, 1] = np.inf
    with pytest.raises(_core.NonFiniteError, match=r"weight: .* row 3"):
        pair.core.refresh()


def trained(rng: np.random.Generator, **options: Any) -> GpuCore:
    core = GpuCore(first_weight(rng, (40, 5)), **options)
    for _ in range(10):
        batch = draw(rng, (40, 5, 4, 2))
        kept, statistics = core.forward(batch)
        core.backward(kept, fused("squared_error", batch, *statistics, 40), batch.hidden.shape)
        core.step(kept, 0.01)
    return core


def bad_hidden(batch: Batch) -> None:
    batch.hidden[2, 3] = np.nan


def bad_range(batch: Batch) -> None:
    batch.indices[1] = 40


def bad_negative(batch: Batch) -> None:
    batch.indices[0] = -1


def bad_repeat(batch: Batch) -> None:
    assert batch.indptr is not None
    batch.indptr[:] = np.linspace(0, len(batch.indices), 5).astype(np.int64)
    batch.indices[-1] = batch.indices[batch.indptr[3]]
    assert batch.indptr[4] - batch.indptr[3] > 1


def bad_pointer(batch: Batch) -> None:
    assert batch.indptr is not None
    batch.indptr[2] = 99


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (bad_hidden, _core.NonFiniteError, "hidden: .* row 2"),
        (bad_range, _core.LabelError, "target: label 40 at position 1"),
        (bad_negative, _core.LabelError, "target: label -1 at position 0"),
        (bad_repeat, _core.LabelError, "target: .* there twice"),
        (bad_pointer, _core.LabelError, r"target: row pointer .* of row [12] decreases or lies outside of 0 to"),
    ],
)
def test_bad_batches_are_refused(
    spoil: Callable[[Batch], None], error: type[Exception], match: str, device: str
) -> None:
    rng = np.random.default_rng(9)
    core = trained(rng)
    batch = draw(rng, (40, 5, 4, 3))
    spoil(batch)
    before = core.bytes()
    with pytest.raises(error, match=match):
        core.forward(batch)
    assert core.refused[0] == 1
    core.refused[:] = 0
    core.check = False
    kept, (A, q, s) = core.forward(batch)
    assert not all(np.isfinite(x).all() for x in (A, q, s))
    core.refused[:] = 0  # the batch remembers
    by = Loss(np.zeros(4), np.zeros(len(A)), np.ones(4), np.ones(4))
    core.backward(kept, by, batch.hidden.shape)
    core.step(kept, 0.01)
    assert core.refused[0] == 1 and core.bytes() == before


def test_bad_gradients_are_refused(device: str) -> None:
    rng = np.random.default_rng(10)
    core = trained(rng)
    batch = draw(rng, (40, 5, 4, 2))
    before = core.bytes()
    kept, statistics = core.forward(batch)
    good = fused("squared_error", batch, *statistics, 40)
    for name in ("grad_A", "grad_q", "grad_s"):
        wrong = getattr(good, name).copy()
        wrong[3] = np.inf
        with pytest.raises(_core.NonFiniteError, match=f"{name}: .* row 3"):
            core.backward(kept, good._replace(**{name: wrong}), batch.hidden.shape)
        core.step(kept, 0.01)
        assert core.refused[0] == 1 and core.bytes() == before
        core.refused[:] = 0
        kept, _ = core.forward(batch)
    core.backward(kept, good, batch.hidden.shape)
    for match, options in (
        ("lr", {"device_lr": np.array([np.nan], np.float32)}),
        ("grad_scale", {"grad_scale": np.array([np.inf])}),
        ("column_scale", {"column_scale": np.array([1, 1, np.nan, 1, 1.0])}),
    ):
        with pytest.raises(_core.NonFiniteError, match=f"{match}: "):
            core.step(kept, 0.01, **options)
        assert core.refused[0] == 1 and core.bytes() == before
        core.step(kept, 0.01)  # the caller's flag
        assert core.bytes() == before
        core.refused[:] = 0
    core.step(kept, 0.01)
    assert core.bytes() != before


def test_steps_out_of_turn_are_refused(device: str) -> None:
    rng = np.random.default_rng(11)
    core = trained(rng)
    batch = draw(rng, (40, 5, 4, 2))
    kept, statistics = core.forward(batch)
    good = fused("squared_error", batch, *statistics, 40)
    before = core.bytes()
    with pytest.raises(_core.Error, match=r"batch: .* or it had no backward pass"):
        core.step(kept, 0.01)
    assert core.bytes() == before
    core.refused[:] = 0
    core.backward(kept, good, batch.hidden.shape)
    core.step(kept, 0.01)
    before = core.bytes()
    with pytest.raises(_core.Error, match="batch: the weights have taken a step since"):
        core.step(kept, 0.01)
    assert core.bytes() == before
    core.refused[:] = 0
    # one step before the log cannot tell steps apart
    core.consolidate()
    kept, statistics = core.forward(batch)
    core.backward(kept, good, batch.hidden.shape)
    core.memory[0] = 8**9 - 1
    before = core.bytes()
    with pytest.raises(_core.CapacityError, match=r"134217727 steps of at most 134217727 .* call consolidate\(\)"):
        core.step(kept, 0.01)
    assert core.bytes() == before


def test_without_a_learning_rate(device: str) -> None:
    """Nothing changes, not a bit; with velocities those gather."""
    rng = np.random.default_rng(12)
    core = trained(rng)
    before = core.bytes()
    batch = draw(rng, (40, 5, 4, 2))
    kept, statistics = core.forward(batch)
    core.backward(kept, fused("squared_error", batch, *statistics, 40), batch.hidden.shape)
    core.step(kept, 0.0, weight_decay=0.5)
    core.step(kept, 0.5, device_lr=np.zeros(1, np.float32))
    assert core.bytes() == before
    pair = Pair(first_weight(rng, (40, 5)), momentum=True)
    for step in range(12):
        pair.train(draw(rng, (40, 5, 4, 2)), "squared_error", 0.0 if step % 3 else 0.002, momentum=0.9)
    pair.check()


def test_learning_rate_on_the_device(device: str) -> None:
    rng = np.random.default_rng(13)
    batch, weight = draw(rng, (40, 5, 4, 2)), first_weight(rng, (40, 5))
    ends = []
    for options in ({"lr": 0.125}, {"lr": 7.0, "device_lr": np.array([0.125], np.float32)}):
        core = GpuCore(weight.copy())
        kept, statistics = core.forward(batch)
        core.backward(kept, fused("squared_error", batch, *statistics, 40), batch.hidden.shape)
        core.step(kept, **options)
        ends.append(core.bytes())
    assert ends[0] == ends[1]


def test_float32_drift(device: str) -> None:
    """As near to float64 as the CPU's, where that keeps four steps together; nearer in float64 beside float32 rows."""
    shape = (400, 12, 8, 1)
    errors = {}
    for name, make in (
        ("cpu", lambda w: Core(w)),
        ("gpu", lambda w: GpuCore(w)),
        ("wide", lambda w: GpuCore(w, wide=True)),
    ):
        rng = np.random.default_rng(14)
        weight = first_weight(rng, shape, np.float32)
        dense, core = DenseSGD(weight), make(weight.copy())
        for _ in range(260):
            batch = draw(rng, shape, dtype=np.float32)
            kept, _ = core.forward(batch)
            by = spherical("squared_error", batch, *dense.statistics(batch), 400)
            core.backward(kept, by, batch.hidden.shape)
            dense.add(batch, by)
            lr = stable_lr(batch, 0.2)
            if isinstance(core, GpuCore):
                core.step(kept, lr)
            else:
                core.state.step(lr=lr)
            dense.step(lr)
        rows = core.rows()
        errors[name] = np.linalg.norm(rows - dense.weight) / np.linalg.norm(dense.weight)
        if isinstance(core, GpuCore):
            squares = dense.weight.T @ dense.weight
            assert np.linalg.norm(core.gram()[0] - squares) < 3e-6 * np.linalg.norm(squares)
    assert 0 < errors["gpu"] < 3 * errors["cpu"] < 1e-5
    assert errors["wide"] < 2 * errors["cpu"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_of_hidden(dtype: str, device: str) -> None:
    rng = np.random.default_rng(15)
    single = rng.standard_normal((4, 5)).astype(np.float32)
    stored = to_bfloat16(single) if dtype == "bfloat16" else single.astype(dtype)
    same = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored
    ids = np.array([3, 8, 3, 1])
    results = []
    for hidden in (stored, same.astype(np.float64)):
        core = GpuCore(first_weight(np.random.default_rng(0), (20, 5)))
        batch = Batch(hidden, None, ids)
        kept, statistics = core.forward(batch)
        core.backward(kept, fused("squared_error", batch, *statistics, 20), (4, 5))
        core.step(kept, 0.05)
        results.append([core.bytes(), *(x.tobytes() for x in statistics)])
    assert results[0] == results[1]


def test_hidden_beyond_float32(device: str) -> None:
    """Finite as the caller has it, infinite where products are of float32."""
    core = GpuCore(first_weight(np.random.default_rng(19), (20, 5), np.float32))
    batch = Batch(np.full((2, 5), 1e39), None, np.array([1, 2]))
    with pytest.raises(_core.NonFiniteError, match=r"hidden: .* row [01]"):
        core.forward(batch)
    GpuCore(first_weight(np.random.default_rng(19), (20, 5), np.float32), wide=True).forward(batch)


def test_empty_batches(device: str) -> None:
    rng = np.random.default_rng(16)
    core = trained(rng)
    before = core.bytes()
    for indptr in (None, np.zeros(1, np.int64)):
        batch = Batch(np.zeros((0, 5)), indptr, np.zeros(0, np.int64))
        kept, (A, q, s) = core.forward(batch)
        assert len(A) == len(q) == len(s) == 0
        core.backward(kept, Loss(q, A, q, s), (0, 5))
        assert core.gradient(kept)[0] == 0 and not core.gradient(kept)[1].any()
        core.step(kept, 0.1)
    assert core.rows(np.zeros(0, np.int64)).shape == (0, 5)
    assert core.bytes() == before


def test_ids_out_of_range(device: str) -> None:
    core = trained(np.random.default_rng(17))
    for bad in (-1, 40, 2**40):
        with pytest.raises(_core.LabelError, match=rf"rows: expected a class in \[0, 40\), got {bad} at position 1"):
            core.rows(np.array([3, bad]))
    core.check = False
    rows = core.rows(np.array([3, -1, 5]))
    assert np.isfinite(rows[[0, 2]]).all() and np.isnan(rows[1]).all()


def test_bad_labels_in_a_loss(device: str) -> None:
    one, nan = np.ones(3), np.full(3, np.nan)
    out = {name: nan.copy() for name in ("losses", "grad_A", "grad_q", "grad_s")}
    options = {"loss": "taylor_softmax", "eps": 0.1, "a": 1.0, "b": 1.0, "n_classes": 9, "indptr": None}
    arrays = {"indices": np.array([1, 9, 2]), "A": one, "q": one, "s": one}
    with pytest.raises(_core.LabelError, match="target: label 9 at position 1"):
        call(_core.spherical_loss, device, **options, **arrays, **out)
    assert all(np.array_equal(np.isnan(x), [False, True, False]) for x in out.values())
    out = {name: nan.copy() for name in out}
    options["indptr"] = np.array([0, 2, 2, 3])
    arrays["indices"], values = np.array([1, 8, 2]), np.array([1, 2, np.nan], np.float32)
    with pytest.raises(_core.LabelError, match="target: the weight of the label at position 2 must be finite"):
        call(_core.spherical_loss, device, **options, **arrays, values=values, **out)
    assert all(np.array_equal(np.isnan(x), [False, False, True]) for x in out.values())


def test_shapes_are_refused_at_once(device: str) -> None:
    weight = np.zeros((40, 5))
    size = call(_core.exact_state_bytes, device, weight=weight, check=False)
    state = memory(size)
    call(_core.exact_init, device, weight=weight, state=state)
    head = {"weight": weight, "state": state}
    step = {"batch": memory(8192), "examples": 1, "targets": 1, "lr": 0.1}
    forward = {"batch": memory(8192), "indptr": None, "indices": np.zeros(1, np.int64)}
    forward |= {"hidden": np.zeros((1, 5)), "A": np.zeros(1), "q": np.zeros(1), "s": np.zeros(1)}
    for function, error, match, arguments in (
        (_core.exact_init, _core.ShapeError, "state: expected at least", {"weight": weight, "state": memory(256)}),
        (_core.exact_init, _core.ShapeError, "velocity: expected shape", {**head, "velocity": np.zeros((40, 4))}),
        (_core.exact_init, _core.DtypeError, "velocity: ", {**head, "velocity": np.zeros((40, 5), np.float32)}),
        (_core.exact_init, _core.DtypeError, "weight: ", {**head, "weight": np.zeros((40, 5), np.float16)}),
        (_core.exact_step, _core.ShapeError, "batch: expected at least", {**head, **step, "targets": 4000}),
        (_core.exact_step, _core.ShapeError, "momentum: expected 0 of a head", {**head, **step, "momentum": 0.5}),
        (_core.exact_step, _core.ShapeError, "lr: expected a number >= 0, got -1", {**head, **step, "lr": -1.0}),
        (_core.exact_step, _core.ShapeError, "column_scale: ", {**head, **step, "column_scale": np.zeros(4)}),
        (_core.exact_forward, _core.ShapeError, "hidden: ", {**head, **forward, "hidden": np.zeros((1, 4))}),
        (_core.exact_forward, _core.ShapeError, "A: expected shape", {**head, **forward, "A": np.zeros(2)}),
        (_core.exact_rows, _core.ShapeError, "out: ", {**head, "ids": np.zeros(2, np.int64), "out": np.zeros((1, 5))}),
    ):
        with pytest.raises(error, match=match):
            call(function, device, **arguments)
    if _core.cuda_emulated:  # a GPU gets a copy, which begins elsewhere
        with pytest.raises(_core.ShapeError, match=r"state: .* aligned to 256 bytes"):
            call(_core.exact_init, device, weight=weight, state=memory(size + 256)[1:])
        with pytest.raises(_core.BackendError, match=r"ExactState: .* on cpu, .* 'woodbury' is for the CPU"):
            _core.ExactState(claim_cuda(weight.__dlpack__()), method="woodbury")
    with pytest.raises(_core.BackendError, match="device: expected a GPU"):
        _core.exact_init(**head)
