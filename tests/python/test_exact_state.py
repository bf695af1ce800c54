"""test_exact_state.py -- the exact head's state to the bit: threads, refusals, memory; and the losses by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dense_cases import far_apart, strided
from exact_reference import LOSSES, METHODS, OPTIONS, Batch, Core, draw, first_weight, fused, near, spherical
from widehead import DtypeError, LabelError, NonFiniteError, ShapeError, _core


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
