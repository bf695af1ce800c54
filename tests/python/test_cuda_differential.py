"""tests/python/test_cuda_differential.py -- random problems for the CUDA dense head against float64; what it refuses.

Every problem is drawn from its seed alone. Where the backend is emulated the size of the L2 cache is chosen too, so
that tiles and chunks end elsewhere; a GPU runs the same problems with the cache that it has.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import devices
from dense_cases import LOSSES, Case, exact, make, stored, weights_of_examples
from devices import call, no_cuda
from reference import UNIT, within
from test_dense import check_forward
from test_update import step_arguments, zero_state
from widehead import _core

pytestmark = pytest.mark.gpu

DTYPES = ("float32", "bfloat16", "float16", "float64")
NARROW = ("softmax", "smoothing", "bce, one label", "hinge, one label")  # the narrow head's own kernels have these
OPTIMIZERS = ("sgd", "momentum", "adam", "adagrad")


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if reason := no_cuda():
        pytest.skip(reason)


def size(rng: np.random.Generator, most: int, steps: tuple[int, ...]) -> int:
    """Often a multiple of one of the steps or its neighbour, else any number up to `most`."""
    if rng.random() < 0.6:
        step = int(rng.choice(steps))
        return int(np.clip(step * rng.integers(1, max(2, most // step + 1)) + rng.integers(-1, 2), 1, most))
    return int(rng.integers(1, most + 1))


def draw(seed: int) -> tuple[Case, np.random.Generator]:
    rng = np.random.default_rng([seed, 2])
    shape = (
        size(rng, 200, (8, 32, 64, 128)),
        size(rng, 1200 if seed % 4 == 0 else 400, (8, 16, 64, 128, 512)),
        size(rng, 260 if seed % 3 == 0 else 136, (8, 16, 64, 128)),
    )
    dtype = DTYPES[seed % 4]
    hidden = str(rng.choice([dtype, dtype, *(h for h in DTYPES if h != "float64" or dtype == "float64")]))
    options = dict(LOSSES[str(rng.choice([*LOSSES, *NARROW, *NARROW]))])
    if "softcap" in options:
        options["softcap"] = float(rng.choice([1e-3, 0.5, 5.0, 1e4]))
    if "label_smoothing" in options and rng.random() < 0.3:
        options["label_smoothing"] = 1.0
    scale = float(rng.choice([0.0, 0.3, 3.0, 30.0] + [1e4] * (dtype != "float16")))
    pad, bias = int(rng.choice([0, 0, 8, 1, 3])), rng.random() < 0.8
    case = make(shape, seed=seed, dtype=dtype, hidden_dtype=hidden, bias=bias, scale=scale, pad=pad, **options)
    case.device = "cuda"
    if case.bias is not None and rng.random() < 0.5:
        case.bias += np.asarray(rng.choice([-200, -90, -20, 50]), case.bias.dtype)
    if case.bias is not None and dtype != "float64" and rng.random() < 0.3:
        case.bias = stored(case.bias, "bfloat16")
    if case.target["indptr"] is None and rng.random() < 0.1:
        case.target["indices"][:] = options.get("ignore_index", -100)
    return case, rng


def incoming(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    scale = weights_of_examples(case, int(rng.integers(1 << 30))) * (rng.random() < 0.95)
    names = ["grad_output"] + ["grad_lse"] * (case.options["loss"] == "softmax")
    return scale, {n: rng.normal(size=len(scale)).astype(case.real) for n in names if rng.random() < 0.4}


def steps_of(dtype: str) -> float:
    """Half the distance of subnormal numbers: below it everything is lost."""
    return 2.0**-25 if dtype == "float16" else 0.0


def check_gradients(case: Case, got: dict[str, np.ndarray], want: Any, skipped: np.ndarray | None = None) -> None:
    """`skipped`: bound on what the filter leaves out of dL/dz."""
    more = np.zeros_like(want.dz) if skipped is None else skipped
    if case.dtype == "float16":  # dL/dz is rounded to it before the products
        more = more + UNIT["float16"] * (np.abs(want.dz) + want.dz_error) + steps_of("float16")
    weight, hidden = np.abs(exact(case.weight)), np.abs(exact(case.hidden))
    kind = "bfloat16" if case.hidden.dtype == np.uint16 else case.hidden.dtype.name
    bound = want.hidden_error + more @ weight
    bound = bound * (1 + UNIT[kind]) + UNIT[kind] * np.abs(want.hidden) + steps_of(kind)
    small = np.abs(want.hidden) < 6e4 if kind == "float16" else np.full(want.hidden.shape, True)
    within(np.where(small, exact(got["grad_hidden"]), 0), np.where(small, want.hidden, 0), bound, "grad_hidden")
    within(got["grad_weight"], want.weight, want.weight_error + 1.01 * more.T @ hidden, "grad_weight")
    if "grad_bias" in got:
        lost = np.zeros_like(want.bias) if skipped is None else skipped.sum(0)
        within(got["grad_bias"], want.bias, want.bias_error + lost, "grad_bias")


def check_filter(case: Case, ref: Any, scale: np.ndarray, more: dict[str, Any], eps: float) -> None:
    want = ref.gradients(scale, more.get("grad_output"), more.get("grad_lse"))
    limit = eps * np.abs(scale * ref.targets.active).max()
    size_of_entry = np.abs(want.dz) + want.dz_error
    got = case.backward(scale, filter_eps=eps, **more)
    check_gradients(case, got, want, np.where(np.abs(want.dz) - want.dz_error <= limit * 1.001, size_of_entry, 0))
    assert case.filtered > 0 or (size_of_entry >= limit).any()


def check_step(case: Case, rng: np.random.Generator, scale: np.ndarray, more: dict[str, Any], plain: Any) -> None:
    """The fused step is update_rows (on the CPU, where it has the type) of the plain gradient, random bits included."""
    name, rounding = OPTIMIZERS[int(rng.integers(4))], str(rng.choice(["nearest", "stochastic", "kahan"]))
    halves = case.dtype in ("bfloat16", "float16")
    if name == "adagrad" and halves and case.weight.shape[1] <= 128:
        name = "adam"  # with adagrad other kernels take the gradient than without an update
    first = zero_state(name, case.weight, case.bias, case.real)
    for array in first.values():
        array += np.abs(rng.normal(size=array.shape)) * 0.1
    if rounding == "kahan" and halves:
        first["compensation"] = np.zeros(case.weight.shape, case.weight.dtype)
    common = {"rounding": rounding, "seed": int(rng.integers(1 << 62)), "first_row": int(rng.choice([0, 7, 1 << 35]))}
    step = int(rng.choice([1, 3, (1 << 33) + 5]))
    ours, theirs = ({key: value.copy() for key, value in first.items()} for _ in range(2))
    got = case.fused(scale, step_arguments(name, ours, step, **common), **more)
    assert np.array_equal(got["grad_hidden"], plain["grad_hidden"])
    weight, bias = np.array(case.weight), None if case.bias is None else case.bias.copy()
    call(
        _core.update_rows,
        "cuda" if case.dtype == "float16" else "cpu",
        weight=weight,
        rows=np.arange(len(weight)),
        grad=plain["grad_weight"],
        bias=bias,
        grad_bias=plain.get("grad_bias"),
        update=step_arguments(name, theirs, step, **common),
    )
    real = 64 * UNIT[case.real]
    g, start = np.abs(plain["grad_weight"]).astype(float), np.abs(exact(case.weight))
    moves = 20.0 * 0.05 if name in ("adam", "adagrad") else g + first.get("first", np.zeros(1))
    rough = real * (start + moves)
    coarse = 2.01 * UNIT[case.dtype] * np.abs(exact(weight)) + 2 * steps_of(case.dtype) if halves else 0.0
    within(exact(got["weight"]), exact(weight), rough + coarse, f"{name} {rounding} weight")
    # Only where the last bit of a gradient decides may the rounding differ: the random bits are the same.
    assert not halves or (got["weight"] != weight).mean() < 0.02 or weight.size < 500
    for key in ("first", "second"):
        if key in ours:
            terms = g + g * g + start if ours[key].shape == g.shape else (g * g).mean(1, keepdims=True)
            within(ours[key], theirs[key].astype(float), real * (terms + theirs[key]), f"{name} {key}")
    if bias is not None:
        change = real * (np.abs(exact(case.bias)) + 1 + np.abs(plain["grad_bias"]) + 0.1)
        rounded = 2.01 * UNIT["bfloat16"] * np.abs(exact(bias)) if bias.dtype == np.uint16 else 0.0
        within(exact(got["bias"]), exact(bias), change + rounded, f"{name} bias")


def check_problem(seed: int) -> None:
    case, rng = draw(seed)
    ref = case.reference()
    check_forward(case, ref)
    scale, more = incoming(case, rng)
    want = ref.gradients(scale, more.get("grad_output"), more.get("grad_lse"))
    got = case.backward(scale, **more)
    check_gradients(case, got, want)
    if case.options["loss"] == "softmax" and seed % 2 and scale.any():
        check_filter(case, ref, scale, more, float(rng.choice([1e-6, 1e-3, 0.3])))
    check_step(case, rng, scale, more, got)


def check_problems(first: int, last: int) -> None:
    for seed in range(first, last):
        print(f"problem {seed}", flush=True)  # where it fails, the last line says which
        check_problem(seed)


@pytest.mark.parametrize("bytes_of_l2", ["4096", "65536", "8388608"])
def test_random_problems(bytes_of_l2: str) -> None:
    if not _core.cuda_emulated:
        check_problems(0, 39 if bytes_of_l2 == "4096" else 1)  # a GPU has one size of L2 cache
        return
    # The size is read when the device is first asked.
    first = {"4096": 0, "65536": 13, "8388608": 26}[bytes_of_l2]
    script = f"from test_cuda_differential import check_problems; check_problems({first}, {first + 13})"
    env = {"WIDEHEAD_EMULATED_L2": bytes_of_l2, "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def flagged(function: Any, case: Case, refused: int = 0, **arguments: Any) -> None:
    """A call whose fault, if any, is raised; beforehand `refused` is set, afterwards it must be."""
    flag = np.array([refused], np.int32)
    try:
        call(function, case.device, refused=flag, **arguments)
    finally:
        assert flag[0] == 1


def spoil(case: Case, what: str, rng: np.random.Generator, gradients: dict[str, Any]) -> tuple[str, list[int]]:
    """Makes one value wrong: the message that names it, and the rows whose labels are bad."""
    t, row = case.target, int(rng.integers(len(case.hidden)))
    bad = float(rng.choice([np.nan, np.inf, -np.inf]))
    n_classes = len(case.weight)
    if what in gradients:
        gradients[what][row] = bad
        return f"{what}: expected finite numbers, got NaN or infinity in row {row}$", []
    if what == "hidden":
        case.hidden[row, -1] = (
            stored(np.array([bad], np.float32), "bfloat16")[0] if case.hidden.dtype == np.uint16 else bad
        )
        return f"hidden: expected finite numbers, got NaN or infinity in row {row}$", []
    at = row if t["indptr"] is None else int(rng.integers(len(t["indices"])))
    row = row if t["indptr"] is None else int(np.searchsorted(t["indptr"], at, "right")) - 1
    if what == "range":
        label = int(rng.choice([n_classes, -7, 1 << 40]))
        t["indices"][at] = label
        return f"label {label} at position {at} is out of range: expected 0 to {n_classes - 1}", [row]
    if what == "repeated":
        row = next(b for b in range(len(case.hidden)) if t["indptr"][b + 1] >= t["indptr"][b] + 2)
        at = int(t["indptr"][row])
        t["indices"][at + 1] = t["indices"][at]
        return f"label {t['indices'][at]} at position {at + 1} is there twice", [row]
    if what == "label weight":
        t["values"] = np.ones(len(t["indices"]), np.float32)
        t["values"][at] = bad
        return f"the weight of the label at position {at} must be finite", [row]
    t["indptr"][2] = len(t["indices"]) + 3
    value = int(t["indptr"][3])  # of both rows' faults any may come first
    return f"row pointer ({t['indptr'][2]} of row 1|{value} of row 2) decreases or lies outside of 0 to", [1, 2]


FAULTS = (
    "range",
    "hidden",
    "grad_losses",
    "grad_output",
    "lse",
    "grad_lse",
    "repeated",
    "label weight",
    "pointer",
    "given",
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", FAULTS)
def test_refused_calls_change_nothing(what: str, dtype: str) -> None:
    """The narrow head's kernels and the tiles: weights, bias and state bit for bit, gradients 0, other rows' losses."""
    rng = np.random.default_rng([FAULTS.index(what), DTYPES.index(dtype)])
    labels = what in ("repeated", "label weight", "pointer")
    for i, (loss, d) in enumerate([("softmax", 64), ("bce", 16), ("softmax", 133), ("squared_hinge", 7)]):
        if loss != "softmax" and what in ("lse", "grad_lse"):
            continue
        case = make((37, 143, d), seed=i, dtype=dtype, loss=loss, multi=labels or i == 3, device="cuda")
        case.target["values"] = None
        gradients = {"grad_losses": weights_of_examples(case).astype(case.real), "grad_output": np.ones(37, case.real)}
        good = case.forward()
        if loss == "softmax":
            gradients |= {"lse": good["lse"].copy(), "grad_lse": np.ones(37, case.real)}
        message, bad_rows = ("", []) if what == "given" else spoil(case, what, rng, gradients)
        given = int(what == "given")
        if bad_rows:
            out = {key: np.full(37, 7, case.real) for key in good}
            with pytest.raises(_core.LabelError, match=message):
                flagged(_core.dense_forward, case, **case.arguments(), **{"lse": None, **out})
            others = np.setdiff1d(np.arange(37), bad_rows)
            for key in ("losses", "output"):
                assert np.isnan(out[key][bad_rows]).all() and np.array_equal(out[key][others], good[key][others])
        name, rounding = OPTIMIZERS[i], ("stochastic", "kahan", "nearest", "stochastic")[i]
        state = zero_state(name, case.weight, case.bias, case.real)
        if rounding == "kahan" and dtype in ("bfloat16", "float16"):
            state["compensation"] = np.zeros(case.weight.shape, case.weight.dtype)
        kept = {"weight": case.weight, "bias": case.bias, **state}
        before = {key: value.copy() for key, value in kept.items()}
        calls = [{"update": step_arguments(name, state, 3, rounding=rounding)}]
        if bad_rows or given:  # without an update NaN and infinity are no fault
            calls.append(
                {"grad_weight": np.full(case.weight.shape, 7, case.real), "grad_bias": np.full(143, 7, case.real)}
            )
        for more in calls:
            out = {"grad_hidden": np.full_like(case.hidden, 7), **{k: v for k, v in more.items() if k != "update"}}
            arguments = {**case.arguments(), "lse": None, **gradients, **more, "grad_hidden": out["grad_hidden"]}
            if given:
                flagged(_core.dense_backward, case, 1, **arguments)
            else:
                with pytest.raises((_core.LabelError, _core.NonFiniteError), match=message):
                    flagged(_core.dense_backward, case, **arguments)
            for key, array in out.items():
                assert not exact(array).any(), key
        for key, array in kept.items():
            assert np.array_equal(array, before[key]), key


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("d", [16, 128])
def test_gradients_with_a_low_lse(d: int, dtype: str) -> None:
    """Classes past the end, whose logit of 0 is then far above the lse, add nothing to the gradient of hidden."""
    for n, shift in [(97, -20), (100, -200), (64, -1000)]:
        case = make((40, n, d), dtype=dtype, device="cuda")
        case.bias += np.float32(shift)
        scale = weights_of_examples(case)
        check_gradients(case, case.backward(scale), case.reference().gradients(scale))


@pytest.mark.parametrize("d", [16, 33])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_masked_classes(dtype: str, d: int) -> None:
    """A bias of -infinity: the same on both devices, and infinite where label smoothing wants some of that class."""
    for name in ("softmax", "smoothing", "bce, one label", "hinge, one label"):
        results = []
        for device in ("cpu", "cuda"):
            case = make((9, 50, d), dtype=dtype, device=device, **LOSSES[name])
            case.bias[40:] = -np.inf
            case.target["indices"] %= 39
            results.append({**case.forward(), **case.backward(np.ones(9, np.float32))})
        for key, want in results[0].items():
            want, got = exact(want), exact(results[1][key])
            assert np.array_equal(np.isfinite(want), np.isfinite(got)), (name, key)
            assert np.isinf(want).all() if (name, key) == ("smoothing", "losses") else np.isfinite(want).all()
            tolerance = {"float32": 1e-4, "bfloat16": 0.05, "float64": 1e-10}[dtype]
            np.testing.assert_allclose(got[np.isfinite(want)], want[np.isfinite(want)], tolerance, tolerance)


def test_bce_of_an_infinite_logit() -> None:
    """As torch has it: the loss is infinite, the gradient is not."""
    case = make((5, 50, 33), loss="bce", multi=False, device="cuda")
    case.bias[7] = np.inf
    case.target["indices"][:] = 3
    assert np.isposinf(case.forward()["losses"]).all()
    got = case.backward(np.ones(5, np.float32))
    assert all(np.isfinite(array).all() for array in got.values())
    assert got["grad_bias"][7] == 5.0


@pytest.mark.parametrize("d", [64, 264])
def test_the_filter_takes_a_gradient_of_minus_zero_for_zero(d: int) -> None:
    case = make((64, 400, d), dtype="bfloat16", device="cuda")
    case.bias[:] = np.linspace(0, -30, 400)
    case.target["indices"] %= 50
    counts = []
    for zero in (0.0, -0.0):
        scale = np.ones(64, np.float32)
        scale[::2] = zero
        case.backward(scale, filter_eps=1e-3)
        counts.append(case.filtered)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("dtype", "hidden", "large"),
    [("float16", "float32", 1e5), ("float16", "bfloat16", 1e5), ("bfloat16", "float32", 3.4e38)],
)
@pytest.mark.parametrize("d", [16, 33])
def test_hidden_that_is_infinite_in_the_weights_type(d: int, dtype: str, hidden: str, large: float) -> None:
    case = make((9, 50, d), dtype=dtype, hidden_dtype=hidden, loss="bce", multi=False, device="cuda")
    case.hidden[4, 2] = stored(np.array([large], np.float32), hidden)[0]
    weight = case.weight.copy()
    arguments = {**case.arguments(), "lse": None, "grad_losses": np.ones(9, np.float32)}
    with pytest.raises(_core.NonFiniteError, match=r"hidden: .* in row 4"):
        flagged(_core.dense_backward, case, **arguments, update={"optimizer": "sgd", "lr": 0.1})
    assert np.array_equal(case.weight, weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unfit_scratch_is_refused(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too small, or not aligned: an error, and nothing has begun."""
    kind = devices._Host if _core.cuda_emulated else devices._Gpu
    case = make((9, 50, 16), dtype=dtype, device="cuda")
    lse, grad_losses = case.forward(("lse",))["lse"], np.ones(9, np.float32)
    before, whole = [case.weight.copy(), case.bias.copy()], kind.scratch

    def shifted(self: Any, n: int) -> Any:
        whole(self, n + 1)
        self.kept = self.kept[1:]
        if _core.cuda_emulated:
            return devices.claim_cuda(self.kept.__dlpack__())
        return self.torch.utils.dlpack.to_dlpack(self.kept)

    smaller = {"at least": lambda self, n: whole(self, n - 32), "aligned to 256 bytes": shifted}
    for message, scratch in smaller.items():
        monkeypatch.setattr(kind, "scratch", scratch)
        grad_hidden, losses = np.full_like(case.hidden, 7), np.full(9, 7, np.float32)
        with pytest.raises(_core.CapacityError, match=rf"device\.scratch: expected .*{message}"):
            call(_core.dense_forward, "cuda", **case.arguments(), losses=losses, output=None, lse=None)
        update = {"optimizer": "sgd", "lr": 0.1}
        arguments = {**case.arguments(), "lse": lse, "grad_losses": grad_losses, "grad_hidden": grad_hidden}
        with pytest.raises(_core.CapacityError, match=rf"device\.scratch: expected .*{message}"):
            call(_core.dense_backward, "cuda", **arguments, update=update)
        assert np.array_equal(case.weight, before[0]) and np.array_equal(case.bias, before[1])
        assert (losses == 7).all() and np.array_equal(grad_hidden, np.full_like(case.hidden, 7))


def test_float16_step_refuses_gradients_that_float16_cannot_hold() -> None:
    case = make((5, 97, 64), dtype="float16", device="cuda", multi=False)
    update = {"optimizer": "sgd", "lr": 1e-6, "step": 1}
    with pytest.raises(_core.NonFiniteError, match="grad_losses"):
        case.fused(np.full(5, 7e4, np.float32), update)
    assert np.isfinite(case.fused(np.full(5, 6e4, np.float32), update)["weight"]).all()
