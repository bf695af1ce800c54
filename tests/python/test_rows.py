"""tests/python/test_rows.py -- first weights, gathered rows, steps on rows and draws, on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import reference
from dense_cases import exact, stored, strided
from devices import call, only_gpu
from reference import bf16_stochastic, f16_stochastic, random_blocks, rounding_bits, within
from test_update import NUMBERS, OPTIMIZERS, expected, step_arguments, zero_state
from widehead import LabelError, NonFiniteError, _core
from widehead.numpy import from_bfloat16

DTYPES = ("float32", "float64", "bfloat16", "float16")
SHAPES = [(97, 31), (13, 104), (40, 8), (5, 2057), (33, 1)]
PADDING = np.full(3, -1)


def refuse_float16(device: str, dtype: str) -> None:
    if dtype == "float16" and device == "cpu":
        pytest.skip("float16 weights are for GPUs")


def real_of(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_weights(dtype: str, device: str) -> None:
    """The bits that the NumPy Philox gives; a slice drawn alone equals the slice of the whole."""
    refuse_float16(device, dtype)
    seed, low, high = (7 << 33) + 1, -0.23, 0.5
    for rows, cols, pad in [(37, 13, 0), (9, 64, 8), (3, 2100, 1), (1, 1, 0)]:
        whole = strided(stored(np.full((rows, cols), 7.0), dtype), pad)
        call(_core.init_uniform, device, out=whole, low=low, high=high, seed=seed)
        blocks = (cols + 3) // 4
        words = random_blocks(seed, "init_weight", 0, np.arange(rows), np.arange(blocks)).reshape(rows, -1)[:, :cols]
        want = low + (high - low) * ((words >> np.uint64(8)).astype(float) * 2.0**-24)
        single = want if dtype == "float64" else want.astype(np.float32)
        assert np.array_equal(whole, stored(single, dtype))
        part = stored(np.full((1, cols), 7.0), dtype)
        call(_core.init_uniform, device, out=part, low=low, high=high, seed=seed, first_row=rows - 1)
        assert np.array_equal(part, whole[-1:])


@pytest.mark.parametrize("cols", [1, 7, 16, 3000])
def test_gather_rows(cols: int, device: str) -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64, np.uint16, np.float16):
        for pad in (0, 1, 8):
            weight = rng.integers(0, 1000, (50, cols + pad)).astype(dtype)[:, :cols]
            rows, out = rng.integers(0, 50, 80), np.zeros((80, cols), dtype)
            call(_core.gather_rows, device, weight=weight, rows=rows, out=out)
            assert np.array_equal(out, weight[rows])


@only_gpu
def test_gathered_padding_is_zero(device: str) -> None:
    weight, rows = np.ones((5, 6), np.float32), np.array([4, -1, 0, -1])
    out = np.full((4, 6), 7, np.float32)
    call(_core.gather_rows, device, weight=weight, rows=rows, out=out)
    assert np.array_equal(out, (rows >= 0)[:, None] * np.ones(6))
    for bad in (5, -2):
        rows[2], out[:] = bad, 7
        with pytest.raises(LabelError, match=rf"rows: expected a class in \[0, 5\), got {bad} at position 2"):
            call(_core.gather_rows, device, weight=weight, rows=rows, out=out)
        assert np.array_equal(out, (rows == 4)[:, None] * np.ones(6))


def round_to(x: np.ndarray, dtype: str, bits: np.ndarray | None) -> np.ndarray:
    """What is kept of float64 numbers in a type of 16 bits, to nearest or with random bits."""
    if bits is None:
        return exact(stored(x.astype(np.float32), dtype))
    if dtype == "bfloat16":
        return from_bfloat16(bf16_stochastic(x.astype(np.float32), bits)).astype(float)
    return f16_stochastic(x.astype(np.float32), bits).astype(float)


def check_rounded(got: np.ndarray, want: np.ndarray, bound: np.ndarray, dtype: str, bits: np.ndarray | None) -> None:
    """`got` is what `want`, known up to `bound`, rounds to."""
    if dtype in ("float32", "float64"):
        within(got, want, bound, "weight")
        return
    ends = [round_to(want + sign * bound, dtype, bits) for sign in (-1, 1)]
    assert ((np.minimum(*ends) <= exact(got)) & (exact(got) <= np.maximum(*ends))).all()
    assert (ends[0] == ends[1]).mean() > 0.9 or got.size < 100  # nearly always there is no choice


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_on_rows(name: str, dtype: str, rounding: str, device: str) -> None:
    """Three steps against float64, with gradients of all types; nothing moves elsewhere."""
    refuse_float16(device, dtype)
    real, seed, first_row = real_of(dtype), (5 << 40) + 9, (1 << 34) + 3
    u = reference.UNIT[real]
    for i, (n, cols) in enumerate(SHAPES):
        rng = np.random.default_rng(i)
        weight, bias = stored(rng.normal(size=(n, cols)), dtype), rng.normal(size=n).astype(real)
        if i % 2:
            weight = strided(weight, i)
        state = zero_state(name, weight, bias, real)
        rows = np.sort(rng.permutation(n)[: n // 2 + 1])
        others = np.setdiff1d(np.arange(n), rows)
        kind = (real, real, "bfloat16", "float16" if device == "cuda" else "float32", "float32")[i]
        for step in (1, 2, 3):
            grad, grad_bias = stored(rng.normal(size=(len(rows), cols)), kind), rng.normal(size=len(rows)).astype(real)
            before = {key: value.copy() for key, value in state.items()}
            old, old_bias = weight.copy(), bias.copy()
            padded = np.concatenate([rows, PADDING]) if device == "cuda" else rows
            extra = len(padded) - len(rows)
            nothing = stored(np.full((extra, cols), np.nan), kind)
            update = step_arguments(name, state, step, rounding=rounding, seed=seed, first_row=first_row)
            call(
                _core.update_rows, device, weight=weight, rows=padded, grad=np.concatenate([grad, nothing]), bias=bias,
                grad_bias=np.concatenate([grad_bias, np.full(extra, np.nan, real)]), update=update,
            )  # fmt: skip
            own = {key: before[key][rows] for key in ("first", "second") if key in before}
            want, bound, moved = expected(name, exact(old)[rows], exact(grad), own, step, u)
            bits = rounding_bits(seed, step, first_row + rows, cols) if rounding == "stochastic" else None
            check_rounded(weight[rows], want, bound, dtype, bits)
            for key, value in moved.items():
                size = 32 * u * (np.abs(value) + np.abs(own[key]))
                if key == "first":
                    size = size + 32 * u * (np.abs(exact(grad)) + np.abs(exact(old)[rows]))
                within(state[key][rows], value.reshape(own[key].shape), size.reshape(own[key].shape), key)
            own = {key: before[f"bias_{key}"][rows] for key in ("first", "second") if f"bias_{key}" in before}
            if name == "adagrad":
                own["second"] = own["second"][:, None]
            want, bound, _ = expected(name, old_bias[rows].astype(float), grad_bias.astype(float), own, step, u)
            within(bias[rows], want, bound, "bias")
            assert np.array_equal(weight[others], old[others]) and np.array_equal(bias[others], old_bias[others])
            assert all(np.array_equal(value[others], before[key][others]) for key, value in state.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kahan_keeps_the_lost_bits(dtype: str, device: str) -> None:
    refuse_float16(device, dtype)
    rng = np.random.default_rng(0)
    weight, grad = stored(rng.normal(size=(20, 37)), dtype), rng.normal(size=(20, 37)).astype(np.float32)
    stalled, lost = weight.copy(), stored(np.zeros((20, 37)), dtype)
    start, n, lr = exact(weight), 100, 2e-4 if dtype == "bfloat16" else 2e-5
    for step in range(1, n + 1):
        update = {"optimizer": "sgd", "rounding": "kahan", "lr": lr, "step": step, "compensation": lost}
        call(_core.update_rows, device, weight=weight, rows=np.arange(20), grad=grad, update=update)
        update = {"optimizer": "sgd", "rounding": "nearest", "lr": lr, "step": step}
        call(_core.update_rows, device, weight=stalled, rows=np.arange(20), grad=grad, update=update)
    want = -n * lr * grad
    # What is lost is below u |w|, and is itself rounded in each step; halves end at 2^-24.
    bound = n * (reference.UNIT[dtype] ** 2 * (np.abs(start) + np.abs(want)) + 2.0**-25 * (dtype == "float16"))
    within(exact(weight) + exact(lost) - start, want, bound, "weight + compensation")
    assert np.median(np.abs(want) / bound) > 8
    assert (stalled == stored(start, dtype)).mean() > 0.8


def problem(dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(4)
    return {
        "weight": stored(rng.normal(size=(9, 5)), dtype),
        "bias": rng.normal(size=9).astype(np.float32),
        "rows": np.array([1, 4, 7, -1]),
        "grad": rng.normal(size=(4, 5)).astype(np.float32),
        "grad_bias": rng.normal(size=4).astype(np.float32),
        "update": {"optimizer": "sgd", "lr": 0.1, "step": 1},
    }


@pytest.mark.parametrize(
    ("error", "message", "name", "at", "value"),
    [
        (LabelError, r"rows: expected a class in \[0, 9\), got 9 at position 2", "rows", 2, 9),
        (LabelError, r"rows: expected a class in \[0, 9\), got -2 at position 0", "rows", 0, -2),
        (LabelError, "rows: expected distinct rows, got 1 twice", "rows", 1, 1),
        (LabelError, "rows: expected ascending rows, padding last, got 0 after 1 at position 1", "rows", 1, 0),
        (LabelError, "rows: expected ascending rows, padding last, got 7 after -1 at position 2", "rows", 1, -1),
        (NonFiniteError, "grad: expected finite numbers, got NaN or infinity in row 2", "grad", (2, 3), np.inf),
        (NonFiniteError, "grad_bias: expected finite numbers, got NaN or infinity in row 1", "grad_bias", 1, np.nan),
    ],
)
@only_gpu
def test_a_bad_value_leaves_everything(
    error: type[Exception], message: str, name: str, at: Any, value: float, device: str
) -> None:
    arguments = problem()
    before = [arguments[key].copy() for key in ("weight", "bias")]
    arguments[name][at] = value
    refused = np.zeros(1, np.int32)
    with pytest.raises(error, match=message):
        call(_core.update_rows, device, refused=refused, **arguments)
    assert refused[0] != 0
    assert all(np.array_equal(arguments[key], old) for key, old in zip(("weight", "bias"), before, strict=True))


@only_gpu
def test_a_refused_step_changes_nothing(device: str) -> None:
    for name in OPTIMIZERS:
        arguments = problem()
        state = zero_state(name, arguments["weight"], arguments["bias"], "float32")
        arguments["update"] = step_arguments(name, state, 1)
        before = [arguments[key].copy() for key in ("weight", "bias")]
        call(_core.update_rows, device, refused=np.ones(1, np.int32), **arguments)
        assert all(np.array_equal(arguments[key], old) for key, old in zip(("weight", "bias"), before, strict=True))
        assert not any(value.any() for value in state.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@only_gpu
def test_numbers_on_the_device_are_those_of_the_host(dtype: str, device: str) -> None:
    """device_lr and device_step, the steps done so far, in the place of lr and step."""
    lr = float(np.float32(NUMBERS["lr"]))
    for name in OPTIMIZERS:
        results = []
        for there in (False, True):
            arguments = problem(dtype)
            state = zero_state(name, arguments["weight"], arguments["bias"], "float32")
            update = step_arguments(name, state, 6, rounding="stochastic", lr=lr)
            if there:
                update |= {
                    "lr": 77.0,
                    "step": 99,
                    "device_lr": np.array([lr], np.float32),
                    "device_step": np.array([5]),
                }
            call(_core.update_rows, device, **{**arguments, "update": update})
            results.append([arguments["weight"], arguments["bias"], *state.values()])
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
        assert not np.array_equal(results[0][0], problem(dtype)["weight"])


@pytest.mark.parametrize("proposal", ["uniform", "log_uniform", "alias"])
@pytest.mark.parametrize("n_classes", [1, 50, 1_000_003])
@only_gpu
def test_draws_are_those_of_the_cpu(proposal: str, n_classes: int, device: str) -> None:
    table: dict[str, Any] = {}
    if proposal == "alias":
        table = {"threshold": np.empty(n_classes, np.float32), "alias": np.empty(n_classes, np.int64)}
        _core.alias_table(weight=1.0 / np.arange(1.0, n_classes + 1), **table)
    seed, draws = (3 << 40) + 5, np.full((3, 5000), -7)
    common = {"n_classes": n_classes, "proposal": proposal, "step": 2, **table}
    call(_core.sample_classes, "cpu", draws=draws[0], seed=seed, **common)
    call(_core.sample_classes, device, draws=draws[1], seed=seed, **common)
    call(_core.sample_classes, device, draws=draws[2], seed=1, device_seed=np.array([seed]), **common)
    assert draws.min() >= 0 and draws.max() < n_classes
    assert np.array_equal(draws[1], draws[2])
    # The last bit of expm1 may decide a draw of Zipf's law.
    same = (draws[0] == draws[1]).mean()
    assert same > 0.999 if proposal == "log_uniform" else same == 1
