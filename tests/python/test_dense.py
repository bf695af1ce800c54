"""tests/python/test_dense.py -- the core's dense head against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dense_cases import LOSSES, SHAPES, Case, exact, far_apart, make, some_shapes, stored, strided, weights_of_examples
from devices import call
from reference import UNIT, Dense, within
from widehead import _core

DTYPES = ("float32", "bfloat16", "float64")


def check_forward(case: Case, ref: Dense) -> None:
    got = case.forward()
    within(got["losses"], ref.losses, ref.losses_error, "losses")
    within(got["output"], ref.output, ref.output_error, "output")
    if case.options["loss"] == "softmax":
        within(got["lse"], ref.lse, ref.lse_error, "lse")


def check_gradients(case: Case, ref: Dense, scale: np.ndarray, **more: Any) -> None:
    incoming = {
        name.removeprefix("grad_"): value for name, value in more.items() if name in ("grad_output", "grad_lse")
    }
    want = ref.gradients(scale, incoming.get("output"), incoming.get("lse"))
    got = case.backward(scale, **more)
    rounding = UNIT["bfloat16" if case.hidden.dtype == np.uint16 else case.hidden.dtype.name]
    subnormal = 2.0**-25 if case.hidden.dtype == np.float16 else 0.0
    bound = want.hidden_error * (1 + rounding) + rounding * np.abs(want.hidden) + subnormal
    within(exact(got["grad_hidden"]), want.hidden, bound, "grad_hidden")
    within(got["grad_weight"], want.weight, want.weight_error, "grad_weight")
    if case.bias is not None:
        within(got["grad_bias"], want.bias, want.bias_error, "grad_bias")


def check(case: Case, **more: Any) -> None:
    ref = case.reference()
    check_forward(case, ref)
    check_gradients(case, ref, weights_of_examples(case), **more)


def skip_halves(unit: str, dtype: str) -> None:
    if unit == "cpu" and dtype == "float16":
        pytest.skip("float16 weights are for a GPU")


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
def test_every_shape(unit: str, dtype: str) -> None:
    skip_halves(unit, dtype)
    shapes = SHAPES if unit == "cpu" else some_shapes(60, seed=1)
    for i, shape in enumerate(shapes):
        options = {"bias": i % 3 > 0, "pad": (0, 3, 0, 16)[i % 4], "lse_penalty": (0.0, 0.01)[i % 2]}
        check(make(shape, seed=i, dtype=dtype, device=unit, **options))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_option(unit: str, name: str) -> None:
    for i, shape in enumerate(some_shapes(12, seed=3)):
        dtype = DTYPES[(i + list(LOSSES).index(name)) % 3]
        check(make(shape, seed=i, dtype=dtype, bias=i % 4 > 0, scale=3.0, device=unit, **LOSSES[name]))


@pytest.mark.parametrize("hidden_dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_dtypes(unit: str, dtype: str, hidden_dtype: str) -> None:
    if hidden_dtype == "float64" and dtype != "float64":
        with pytest.raises(_core.DtypeError, match="float64"):
            make((4, 5, 6), dtype=dtype, hidden_dtype=hidden_dtype, device=unit).forward()
        return
    for i, shape in enumerate(some_shapes(8, seed=5)):
        check(make(shape, seed=i, dtype=dtype, hidden_dtype=hidden_dtype, pad=i % 3, device=unit))


@pytest.mark.parametrize("loss", ["softmax", "bce", "squared_hinge"])
def test_gradients_that_come_in(unit: str, loss: str) -> None:
    rng = np.random.default_rng(0)
    for shape in some_shapes(8, seed=7):
        case = make(shape, loss=loss, device=unit)
        more = {"grad_output": rng.normal(size=shape[0]).astype(np.float32)}
        if loss == "softmax":
            more["grad_lse"] = rng.normal(size=shape[0]).astype(np.float32)
        check(case, **more)


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_losses_on_the_way(unit: str, loss: str) -> None:
    for i, shape in enumerate(some_shapes(8, seed=9)):
        case = make(shape, seed=i, loss=loss, device=unit)
        losses, output = np.empty(shape[0], np.float32), np.empty(shape[0], np.float32)
        case.backward(weights_of_examples(case), losses=losses, output=output)
        apart = case.forward(("losses", "output"))
        assert np.array_equal(losses, apart["losses"]) and np.array_equal(output, apart["output"])


def test_each_output_can_be_left_out(unit: str) -> None:
    case = make((33, 97, 31), device=unit)
    scale = weights_of_examples(case)
    whole, lse = case.backward(scale), case.forward(("lse",))["lse"]
    assert np.array_equal(case.forward(("losses",))["losses"], case.forward()["losses"])
    for name, want in whole.items():
        out = np.full_like(want, 7)
        call(_core.dense_backward, unit, **case.arguments(), lse=lse, grad_losses=scale, **{name: out})
        assert np.array_equal(out, want), name


def test_bounds_are_tight_enough_to_mean_something() -> None:
    """A feature that is 2 % off, or a class left out of the normaliser, is outside of the bounds."""
    for shape in [(33, 97, 31), (130, 1000, 257), (3, 12, 5)]:
        case = make(shape)
        ref = case.reference()
        case.hidden[:, -1] *= 1.02
        with pytest.raises(AssertionError):
            check_forward(case, ref)
        case = make(shape)
        ref = case.reference()
        case.bias[-1] = -np.inf
        with pytest.raises(AssertionError):
            check_forward(case, ref)
        with pytest.raises(AssertionError):
            check_gradients(case, ref, weights_of_examples(case))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weight_gradients_of_other_types(unit: str, dtype: str) -> None:
    skip_halves(unit, dtype)
    for features in (64, 96, 257):
        case = make((40, 300, features), dtype=dtype, device=unit)
        scale = weights_of_examples(case)
        lse, whole = case.forward(("lse",))["lse"], case.backward(scale)["grad_weight"]
        for other, pad in (("float64", 0), ("bfloat16", 1), ("bfloat16", 8), ("float16", 0)):
            if unit == "cpu" and other == "float16":
                continue
            out = strided(stored(np.full(whole.shape, 7, np.float32), other), pad)
            call(_core.dense_backward, unit, **case.arguments(), lse=lse, grad_losses=scale, grad_weight=out)
            bound = UNIT[other] * np.abs(whole) + (2.0**-25 if other == "float16" else 0.0)
            within(exact(out), whole.astype(np.float64), bound, f"grad_weight in {other}, {features} features")


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
def test_extreme_logits(unit: str, scale: float) -> None:
    for loss in ("softmax", "bce", "squared_hinge"):
        for dtype in DTYPES:
            check(make((17, 97, 16), dtype=dtype, loss=loss, scale=scale, device=unit))


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
def test_logits_far_below_zero(unit: str, dtype: str) -> None:
    """The softmax does not see a shift, but exp(0 - lse) overflows: the logit of what pads a tile is 0."""
    skip_halves(unit, dtype)
    for features in (64, 128, 257):
        case = make((130, 97, features), dtype=dtype, device=unit)
        case.bias -= 150
        check(case)


@pytest.mark.parametrize("shape", [(19, 21, 64), (19, 21, 257)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offsets_past_two_to_the_31(unit: str, dtype: str, shape: tuple[int, int, int]) -> None:
    """Rows far apart: offsets of elements pass 2^31, and results are those of the compact matrices, bit for bit."""
    if unit == "cuda" and not _core.cuda_emulated:
        pytest.skip("a GPU has no memory by the page")
    near, far = (make(shape, dtype=dtype, multi=False, device=unit) for _ in range(2))
    far.hidden, far.weight = far_apart(near.hidden, 1 << 27), far_apart(near.weight, 1 << 27)
    scale = weights_of_examples(near)
    lse = near.forward(("lse",))["lse"]
    assert np.array_equal(far.forward(("lse",))["lse"], lse)
    update = {"optimizer": "adam", "rounding": "stochastic", "lr": 0.1, "step": 1}
    results = []
    for case, spread in ((near, lambda x: x), (far, lambda x: far_apart(x, 1 << 27))):
        state = {name: spread(np.zeros(shape[1:], np.float32)) for name in ("first", "second")}
        state |= {name: np.zeros(shape[1], np.float32) for name in ("bias_first", "bias_second")}
        weight, bias = spread(np.array(near.weight)), near.bias.copy()
        out = {"grad_hidden": spread(np.zeros_like(near.hidden)), "weight": weight, "bias": bias}
        arguments = {**case.arguments(), "lse": lse, "grad_losses": scale, **out, "update": {**update, **state}}
        call(_core.dense_backward, unit, **arguments)
        results.append({**out, **state})
    for name, want in results[0].items():
        assert np.array_equal(results[1][name], want), name


def test_same_bits_for_any_number_of_threads(isa: str) -> None:
    for shape, dtype, name in [
        ((130, 1000, 257), "float32", "smoothing and class weights"),
        ((33, 1000, 64), "bfloat16", "softmax"),
        ((17, 1000, 31), "float64", "hinge"),
        ((300, 700, 100), "float32", "bce"),
        ((1030, 1000, 257), "float32", "softmax"),
    ]:
        case = make(shape, dtype=dtype, **LOSSES[name])
        scale, results = weights_of_examples(case), []
        for threads in (1, 2, 4):
            _core.set_num_threads(threads)
            fused = case.fused(scale, {"optimizer": "sgd", "rounding": "stochastic", "lr": 0.1, "step": 3})
            results.append({**case.forward(), **case.backward(scale), **{f"fused {k}": v for k, v in fused.items()}})
        for other in results[1:]:
            for key, value in results[0].items():
                assert value is other[key] is None or np.array_equal(value, other[key]), (shape, dtype, key)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((64, 1000, 64), "float32"), ((200, 1000, 64), "bfloat16"), ((200, 1000, 264), "bfloat16")]
)
def test_filter_error_is_below_its_bound(unit: str, shape: tuple[int, int, int], dtype: str) -> None:
    case = make(shape, dtype=dtype, device=unit)
    # Classes of falling frequency: the tail is where tiles are skipped.
    case.bias[:] = np.linspace(0, -20, 1000)
    case.target["indices"] %= 300
    scale = np.abs(weights_of_examples(case))
    ref = case.reference().gradients(scale)
    exact_grad = case.backward(scale)
    eps = 1e-4
    filtered_grad = case.backward(scale, filter_eps=eps)
    tiles = case.filtered
    assert tiles > 0
    limit = eps * scale.max()
    skipped = np.where(np.abs(ref.dz) < limit * 1.001, np.abs(ref.dz), 0.0)
    # What comes out in bfloat16 was rounded to it, both times.
    coarse = UNIT["bfloat16"] if dtype == "bfloat16" else 0.0

    def check_error(name: str, bound: np.ndarray) -> None:
        error = np.abs(exact(filtered_grad[name]) - exact(exact_grad[name]))
        assert (error <= bound + 2 * coarse * (np.abs(exact(exact_grad[name])) + bound)).all() and error.max() > 0

    check_error("grad_hidden", skipped @ np.abs(exact(case.weight)) + 2 * ref.hidden_error)
    check_error("grad_weight", skipped.T @ np.abs(exact(case.hidden)) + 2 * ref.weight_error)
    case.backward(scale, filter_eps=0.0)
    assert case.filtered == 0
    # A filter below everything skips nothing; a GPU takes other products with it, but the same factors.
    same = case.backward(scale, filter_eps=1e-35)
    assert case.filtered == 0
    if unit == "cuda" and dtype == "bfloat16":
        within(same["grad_weight"], exact_grad["grad_weight"].astype(float), 2 * ref.weight_error, "grad_weight")
    else:
        assert all(np.array_equal(same[key], exact_grad[key]) for key in same)
