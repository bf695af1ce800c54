"""tests/python/test_update.py -- the optimiser's step inside backward, and on chosen rows, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import reference
from dense_cases import exact, make, some_shapes, weights_of_examples
from reference import bf16_stochastic, rounding_bits, within
from widehead import _core
from widehead.numpy import from_bfloat16, to_bfloat16

OPTIMIZERS = ("sgd", "momentum", "adam", "adagrad")
NUMBERS = {"lr": 0.05, "momentum": 0.8, "beta1": 0.85, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.02}


def zero_state(name: str, weight: np.ndarray, bias: np.ndarray | None, real: str) -> dict[str, np.ndarray]:
    rows, state = (len(weight),), {}
    if name in ("momentum", "adam"):
        state = {"first": np.zeros(weight.shape, real), "bias_first": np.zeros(rows, real)}
    if name == "adam":
        state |= {"second": np.zeros(weight.shape, real), "bias_second": np.zeros(rows, real)}
    if name == "adagrad":
        state = {"second": np.zeros((len(weight), 1), real), "bias_second": np.zeros(rows, real)}
    return state if bias is not None else {k: v for k, v in state.items() if not k.startswith("bias")}


def step_arguments(name: str, state: dict[str, np.ndarray], step: int, **more: Any) -> dict[str, Any]:
    numbers = dict(NUMBERS)
    if name != "momentum":
        numbers["momentum"] = 0.0
    core_name = "sgd" if name == "momentum" else name
    return {"optimizer": core_name, "rounding": "nearest", "step": step, **numbers, **state, **more}


def expected(name: str, w: np.ndarray, g: np.ndarray, before: dict[str, np.ndarray], step: int, u: float) -> tuple:
    """The weight after the step, and the bound on the error of computing it with unit roundoff u."""
    state = {key: value.astype(float) for key, value in before.items()}
    n = NUMBERS
    betas = (n["beta1"], n["beta2"])
    want = reference.update(
        name, w, g, state, lr=n["lr"], step=step, momentum=n["momentum"], betas=betas, eps=n["eps"],
        weight_decay=n["weight_decay"],
    )  # fmt: skip
    m = np.abs(before.get("first", np.zeros(1)))
    if name == "adam":
        terms = (betas[0] * m + (1 - betas[0]) * np.abs(g)) / (1 - betas[0] ** step)
        terms = terms / (np.sqrt(state["second"] / (1 - betas[1] ** step)) + n["eps"])
    elif name == "adagrad":
        terms = np.abs(g) / (np.sqrt(state["second"]).reshape(-1, *[1] * (g.ndim - 1)) + n["eps"])
    else:
        terms = np.abs(g) + n["weight_decay"] * np.abs(w) + n["momentum"] * m * (name == "momentum")
    return want, 16 * u * (np.abs(w) + n["lr"] * terms), state


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_steps(unit: str, name: str, dtype: str) -> None:
    """Each step from where the one before has left weights and state, with the core's own plain gradient."""
    u = reference.UNIT[dtype]
    for i, shape in enumerate(some_shapes(6, seed=21)):
        case = make(shape, seed=i, dtype=dtype, bias=i % 3 > 0, pad=i % 2, device=unit)
        scale, state = weights_of_examples(case), zero_state(name, case.weight, case.bias, dtype)
        for step in (1, 2, 3):
            grads, before = case.backward(scale), {key: value.copy() for key, value in state.items()}
            after = case.fused(scale, step_arguments(name, state, step))
            assert np.array_equal(after["grad_hidden"], grads["grad_hidden"])  # of the weights before the step
            for which in ("weight", "bias"):
                if getattr(case, which) is None:
                    continue
                own = {"first": before.get("first"), "second": before.get("second")}
                if which == "bias":
                    own = {"first": before.get("bias_first"), "second": before.get("bias_second")}
                own = {key: value for key, value in own.items() if value is not None}
                if name == "adagrad" and which == "bias":
                    own["second"] = own["second"][:, None]
                w = getattr(case, which).astype(float)
                want, bound, moved = expected(name, w, grads[f"grad_{which}"].astype(float), own, step, u)
                within(after[which], want, bound, which)
                for key, value in moved.items():
                    got = state[key if which == "weight" else f"bias_{key}"]
                    size = np.abs(value) + np.abs(own[key])
                    if key == "first":  # m and g may cancel
                        size = size + np.abs(grads[f"grad_{which}"]) + np.abs(w)
                    within(got, value.reshape(got.shape), 32 * u * size.reshape(got.shape), key)
            case.weight[...] = after["weight"]
            case.bias = after["bias"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_rounding_to_nearest(unit: str, name: str) -> None:
    for i, shape in enumerate(some_shapes(6, seed=23)):
        case = make(shape, seed=i, dtype="bfloat16", device=unit)
        scale, state = weights_of_examples(case), zero_state(name, case.weight, case.bias, "float32")
        g = case.backward(scale)["grad_weight"].astype(float)
        after = case.fused(scale, step_arguments(name, state, 1))
        zero = {key: np.zeros_like(value) for key, value in state.items() if not key.startswith("bias")}
        want, bound, _ = expected(name, exact(case.weight), g, zero, 1, reference.UNIT["float32"])
        low, high = (from_bfloat16(to_bfloat16((want + sign * bound).astype(np.float32))) for sign in (-1, 1))
        got = from_bfloat16(after["weight"])
        assert ((low <= got) & (got <= high)).all()


def test_stochastic_rounding_uses_the_bits_of_philox(unit: str) -> None:
    """Weight (r, c) is rounded by bits that depend on (seed, step, first_row + r, c) alone."""
    seed, step, first_row = (3 << 40) + 11, (1 << 33) + 5, (1 << 35) + 7
    for i, shape in enumerate(some_shapes(8, seed=25)):
        case = make(shape, seed=i, dtype="bfloat16", pad=i % 3, device=unit)
        scale = weights_of_examples(case)
        g = case.backward(scale)["grad_weight"].astype(float)
        update = {"optimizer": "sgd", "rounding": "stochastic", "lr": 0.01, "seed": seed, "step": step}
        after = case.fused(scale, {**update, "first_row": first_row})
        w = exact(case.weight)
        x, slack = w - 0.01 * g, 4 * reference.UNIT["float32"] * (np.abs(w) + 0.01 * np.abs(g))
        bits = rounding_bits(seed, step, first_row + np.arange(shape[1]), shape[2])
        ends = [from_bfloat16(bf16_stochastic((x + sign * slack).astype(np.float32), bits)) for sign in (-1, 1)]
        got = from_bfloat16(after["weight"])
        assert ((np.minimum(*ends) <= got) & (got <= np.maximum(*ends))).all()
        assert (ends[0] == ends[1]).mean() > 0.95 or g.size < 100  # nearly always the bits decide exactly


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean over steps of w after an update far below half an ulp is within 4 standard errors of w - lr g."""
    case = make((16, 97, 64), dtype="bfloat16")
    scale = weights_of_examples(case)
    g, w = case.backward(scale)["grad_weight"].astype(float), exact(case.weight)
    lr, n = 1e-4, 400
    total = np.zeros_like(w)
    for step in range(1, n + 1):
        update = {"optimizer": "sgd", "rounding": "stochastic", "lr": lr, "seed": 5, "step": step}
        total += exact(case.fused(scale, update)["weight"])
    moved = total / n - w
    ulp = 2.0 ** (np.floor(np.log2(np.abs(w))) - 7)
    # Sum of (gap) x (deviation), so that one number has the evidence of all weights.
    error, deviation = (moved + lr * g).sum(), np.sqrt((np.abs(lr * g) * ulp / n).sum())
    assert abs(error) < 4 * deviation
    assert abs((moved * np.sign(-g)).sum() - lr * np.abs(g).sum()) < 4 * deviation
    assert lr * np.abs(g).sum() > 20 * deviation  # the movement itself is far outside of the noise
    nearest = case.fused(scale, {"optimizer": "sgd", "rounding": "nearest", "lr": lr, "step": 1})["weight"]
    assert (nearest == case.weight).mean() > 0.9  # rounding to nearest stalls


def test_kahan_keeps_the_lost_bits() -> None:
    """After many tiny steps weight + compensation is where float64 is, though each step is below half an ulp."""
    case = make((16, 97, 64), dtype="bfloat16")
    scale, lost = weights_of_examples(case), np.zeros((97, 64), np.uint16)
    g, want = case.backward(scale)["grad_weight"].astype(float), exact(case.weight)
    start, lr = want.copy(), 2e-5
    for step in range(1, 101):
        update = {"optimizer": "sgd", "rounding": "kahan", "lr": lr, "step": step, "compensation": lost}
        # Only the weight moves: the gradient stays that of the start, so the path is a straight line.
        weight = case.weight.copy()
        rows = np.arange(97)
        _core.update_rows(weight=weight, rows=rows, grad=g.astype(np.float32), update=update)
        case.weight[...] = weight
        want -= lr * g
    got = exact(case.weight) + exact(lost)
    assert np.abs(got - want).max() < 0.05 * np.abs(want - start).max()
    assert np.corrcoef((got - start).ravel(), (want - start).ravel())[0, 1] > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_rows_takes_the_fused_step(isa: str, name: str, dtype: str) -> None:
    """The same bits as the fused step on the rows named, nothing elsewhere, for rows in any order."""
    rng = np.random.default_rng(3)
    for shape in [(17, 97, 31), (33, 13, 100)]:
        case = make(shape, dtype=dtype)
        real = case.real
        scale, grads = weights_of_examples(case), case.backward(weights_of_examples(case))
        state = zero_state(name, case.weight, case.bias, real)
        more = {"rounding": "stochastic", "seed": 9}
        fused_state = {key: value.copy() for key, value in state.items()}
        fused = case.fused(scale, step_arguments(name, fused_state, 4, **more))
        weight, bias = case.weight.copy(), case.bias.copy()
        rows = rng.permutation(shape[1])[: shape[1] // 2 + 1]
        _core.update_rows(
            weight=weight,
            rows=rows,
            grad=np.ascontiguousarray(grads["grad_weight"][rows]),
            bias=bias,
            grad_bias=np.ascontiguousarray(grads["grad_bias"][rows]),
            update=step_arguments(name, state, 4, **more),
        )
        others = np.setdiff1d(np.arange(shape[1]), rows)
        assert np.array_equal(weight[rows], fused["weight"][rows]) and np.array_equal(bias[rows], fused["bias"][rows])
        assert np.array_equal(weight[others], case.weight[others]) and np.array_equal(bias[others], case.bias[others])
        for key, value in state.items():
            assert np.array_equal(value[rows], fused_state[key][rows]) and not value[others].any()


def test_filtered_tiles_stay_under_plain_sgd() -> None:
    case = make((64, 1000, 64))
    case.bias[:] = np.linspace(0, -40, 1000)
    case.target["indices"] %= 100
    scale = np.abs(weights_of_examples(case))
    update = {"optimizer": "sgd", "rounding": "nearest", "lr": 0.1, "step": 1}
    after = case.fused(scale, update, filter_eps=1e-5)
    assert np.array_equal(after["weight"][-100:], case.weight[-100:])
    assert not np.array_equal(after["weight"][:100], case.weight[:100])
