"""tests/python/test_sparse.py -- the sparse head of the core against float64: the dense head on scattered weights."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from dense_cases import LOSSES, exact, far_apart, multi_labels, single_labels, stored, strided
from devices import call, only_gpu
from reference import UNIT, Dense, Targets, within
from widehead import _core

DTYPES = ("float32", "bfloat16", "float64")
# batch, classes, features, fan-in, group size: fan-ins and batches around the vector's width, one feature, few classes.
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 2, 5, 5, 1),
    (16, 63, 40, 7, 1),
    (17, 65, 40, 16, 1),
    (33, 130, 100, 17, 1),
    (32, 97, 64, 32, 1),
    (31, 200, 300, 31, 16),
    (130, 301, 257, 33, 1),
    (65, 150, 70, 12, 64),
    (5, 100, 1000, 3, 48),
    (40, 129, 90, 20, 100),
]
SPARSE_LOSSES = {name: options for name, options in LOSSES.items() if "offset" not in name and "softcap" not in name}


@dataclass
class SparseCase:
    """One batch and one sparse layer, as the core takes them."""

    hidden: np.ndarray
    weight: np.ndarray
    index: np.ndarray
    bias: np.ndarray | None
    target: dict[str, Any]
    group_size: int
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def real(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def layer(self) -> dict[str, Any]:
        names = ("hidden", "weight", "index", "bias", "group_size")
        return {name: getattr(self, name) for name in names}

    def arguments(self) -> dict[str, Any]:
        return {**self.layer(), **self.target, **self.options}

    def inputs(self) -> np.ndarray:
        """The inputs of every class, [D, K]."""
        return np.repeat(self.index.astype(int), self.group_size, axis=0)[: len(self.weight)]

    def scattered(self, rows: np.ndarray) -> np.ndarray:
        """[D, K] numbers at their inputs, [D, H]."""
        out = np.zeros((len(rows), self.hidden.shape[1]))
        np.put_along_axis(out, self.inputs(), rows, 1)
        return out

    def reference(self) -> Dense:
        hidden = exact(self.hidden)
        if self.dtype == "bfloat16":
            hidden = exact(stored(hidden.astype(np.float32), "bfloat16"))
        t = self.target
        targets = (
            Targets.single(t["indices"], len(self.weight), self.options.get("ignore_index", -100))
            if t["indptr"] is None
            else Targets.multi(t["indptr"], t["indices"], t["values"], len(self.weight))
        )
        options = {key: value for key, value in self.options.items() if key != "ignore_index"}
        bias = None if self.bias is None else exact(self.bias)
        # On a CPU bfloat16 weights are widened, and no factor but hidden is rounded; a GPU rounds dL/dz too.
        dtype = "float32" if (self.dtype, self.device) == ("bfloat16", "cpu") else self.dtype
        return Dense(hidden, self.scattered(exact(self.weight)), bias, targets, dtype=dtype, **options)

    def forward(self) -> dict[str, np.ndarray]:
        out = {name: np.full(len(self.hidden), 7.0, self.real) for name in ("losses", "output", "lse")}
        call(_core.sparse_forward, self.device, **self.arguments(), **out)
        return out

    def backward(self, scale: np.ndarray, **more: Any) -> dict[str, np.ndarray]:
        out = {
            "grad_hidden": np.full_like(self.hidden, 7),
            "grad_weight": np.full(self.weight.shape, 7, self.real),
            "grad_bias": None if self.bias is None else np.full(len(self.weight), 7, self.real),
        }
        lse = self.forward()["lse"] if self.options["loss"] == "softmax" else None
        incoming = {"lse": lse, "grad_losses": scale.astype(self.real)}
        call(_core.sparse_backward, self.device, **self.arguments(), **incoming, **out, **more)
        return {name: array for name, array in out.items() if array is not None}

    def fused(self, scale: np.ndarray, update: dict[str, Any]) -> dict[str, np.ndarray]:
        lse = self.forward()["lse"] if self.options["loss"] == "softmax" else None
        weight, bias = np.array(self.weight), None if self.bias is None else self.bias.copy()
        out = {"grad_hidden": np.full_like(self.hidden, 7)}
        arguments = {**self.arguments(), "weight": weight, "bias": bias}
        incoming = {"lse": lse, "grad_losses": scale.astype(self.real)}
        call(_core.sparse_backward, self.device, **arguments, **incoming, update=update, **out)
        return {"weight": weight, "bias": bias, **out}


def make(
    shape: tuple[int, int, int, int, int],
    *,
    seed: int = 0,
    dtype: str = "float32",
    hidden_dtype: str | None = None,
    index_dtype: str = "uint16",
    multi: bool | None = None,
    bias: bool = True,
    scale: float = 1.0,
    pad: int = 0,
    class_weight: bool = False,
    device: str = "cpu",
    **options: Any,
) -> SparseCase:
    batch, classes, features, fan_in, group = shape
    rng = np.random.default_rng([seed, *shape])
    options = {"loss": "squared_hinge", **options}
    multi = options["loss"] != "softmax" if multi is None else multi
    hidden = stored(rng.normal(size=(batch, features)), hidden_dtype or dtype)
    weight = stored(rng.normal(size=(classes, fan_in)) * scale / np.sqrt(fan_in), dtype)
    groups = -(-classes // group)
    index = np.sort(rng.permuted(np.tile(np.arange(features), (groups, 1)), axis=1)[:, :fan_in], axis=1)
    kept = stored(rng.normal(size=classes), "float64" if dtype == "float64" else "float32") if bias else None
    target = (
        multi_labels(rng, batch, classes, bool(seed % 2))
        if multi
        else single_labels(rng, batch, classes, options.get("ignore_index", -100))
    )
    if class_weight:
        options["class_weight"] = rng.uniform(0.1, 2.0, classes).astype(np.float32)
    index = index.astype(index_dtype)
    if pad:
        hidden, weight = strided(hidden, pad), strided(weight, pad + 1)
        wide = np.zeros((groups, fan_in + pad), index_dtype)
        wide[:, :fan_in] = index
        index = wide[:, :fan_in]
    return SparseCase(hidden, weight, index, kept, target, group, options, dtype, device)


def weights_of_examples(case: SparseCase) -> np.ndarray:
    rng = np.random.default_rng(1)
    scale = rng.normal(size=len(case.hidden)).astype(np.float32)
    scale[rng.random(len(scale)) < 0.1] = 0
    return scale


def check(case: SparseCase, **more: Any) -> None:
    ref, got, scale = case.reference(), case.forward(), weights_of_examples(case)
    within(got["losses"], ref.losses, ref.losses_error, "losses")
    within(got["output"], ref.output, ref.output_error, "output")
    if case.options["loss"] == "softmax":
        within(got["lse"], ref.lse, ref.lse_error, "lse")
    incoming = {name.removeprefix("grad_"): value for name, value in more.items()}
    want = ref.gradients(scale, incoming.get("output"), incoming.get("lse"))
    got = case.backward(scale, **more)
    rounding = UNIT["bfloat16" if case.hidden.dtype == np.uint16 else case.hidden.dtype.name]
    subnormal = 2.0**-25 if case.hidden.dtype == np.float16 else 0.0
    bound = want.hidden_error * (1 + rounding) + rounding * np.abs(want.hidden) + subnormal
    within(exact(got["grad_hidden"]), want.hidden, bound, "grad_hidden")
    at = case.inputs()
    gathered = [np.take_along_axis(x, at, 1) for x in (want.weight, want.weight_error)]
    within(got["grad_weight"], *gathered, "grad_weight")
    if case.bias is not None:
        within(got["grad_bias"], want.bias, want.bias_error, "grad_bias")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape(unit: str, dtype: str) -> None:
    for i, shape in enumerate(SHAPES):
        for loss in ("squared_hinge", "softmax"):
            check(make(shape, seed=i, dtype=dtype, bias=i % 3 > 0, pad=(0, 3, 16)[i % 3], loss=loss, device=unit))


@pytest.mark.parametrize("name", SPARSE_LOSSES)
def test_every_loss_and_option(unit: str, name: str) -> None:
    for i, shape in enumerate(SHAPES[1:]):
        options = {"loss": "softmax", **SPARSE_LOSSES[name]}
        check(make(shape, seed=i, dtype=DTYPES[i % 3], bias=i % 4 > 0, scale=3.0, device=unit, **options))


@pytest.mark.parametrize("hidden_dtype", ["float32", "float16", "bfloat16"])
def test_hidden_and_index_types(unit: str, hidden_dtype: str) -> None:
    for dtype in DTYPES:
        for index_dtype in ("uint16", "int32"):
            check(make(SHAPES[4], dtype=dtype, hidden_dtype=hidden_dtype, index_dtype=index_dtype, device=unit))


def test_inputs_past_65536(unit: str) -> None:
    check(make((9, 70, 70_000, 30, 1), index_dtype="int32", device=unit))
    with pytest.raises(_core.DtypeError, match="uint16 reaches 65536"):
        make((9, 70, 70_000, 30, 1), index_dtype="uint16", device=unit).forward()


@pytest.mark.parametrize("loss", ["softmax", "bce", "squared_hinge"])
def test_gradients_that_come_in(unit: str, loss: str) -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES[3:8]:
        more = {"grad_output": rng.normal(size=shape[0]).astype(np.float32)}
        if loss == "softmax":
            more["grad_lse"] = rng.normal(size=shape[0]).astype(np.float32)
        check(make(shape, loss=loss, device=unit), **more)


def test_losses_on_the_way(unit: str) -> None:
    for loss in ("bce", "squared_hinge"):
        case = make(SHAPES[7], loss=loss, device=unit)
        losses, output = np.empty(len(case.hidden), np.float32), np.empty(len(case.hidden), np.float32)
        case.backward(weights_of_examples(case), losses=losses, output=output)
        apart = case.forward()
        assert np.array_equal(losses, apart["losses"]) and np.array_equal(output, apart["output"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adagrad"])
def test_fused_steps_are_those_of_update_rows(unit: str, optimizer: str, dtype: str) -> None:
    """The step in backward moves weights, bias and state as update_rows does with the plain gradient, bit for bit."""
    # Short rows go together, up to 64 columns; 8 random numbers at a time are drawn for bfloat16.
    short = [(3, 75, 200, fan_in, group) for fan_in, group in ((1, 1), (7, 1), (8, 1), (24, 16), (33, 1), (64, 1))]
    for shape in (SHAPES[5], SHAPES[6], *short, (3, 40, 200, 65, 1)):
        case = make(shape, dtype=dtype, device=unit)
        scale, rows = weights_of_examples(case), np.arange(shape[1])
        numbers = {"lr": 0.05, "momentum": 0.0, "eps": 1e-6, "weight_decay": 0.02, "step": 3, "seed": 9}
        names = {"sgd": (), "adam": ("first", "second"), "adagrad": ("second",)}[optimizer]
        state = {}
        for name in names:
            width = 1 if optimizer == "adagrad" else case.weight.shape[1]
            state[name] = np.full((len(rows), width), 0.01, case.real)
            state[f"bias_{name}"] = np.full(len(rows), 0.01, case.real)
        other = {name: value.copy() for name, value in state.items()}
        update = {"optimizer": optimizer, "rounding": "stochastic", **numbers}
        plain, fused = case.backward(scale), case.fused(scale, {**update, **state})
        weight, bias = np.array(case.weight), case.bias.copy()
        grads = {"grad": plain["grad_weight"], "grad_bias": plain["grad_bias"]}
        call(_core.update_rows, unit, weight=weight, rows=rows, bias=bias, **grads, update={**update, **other})
        assert np.array_equal(fused["weight"], weight) and np.array_equal(fused["bias"], bias)
        assert np.array_equal(fused["grad_hidden"], plain["grad_hidden"])
        assert all(np.array_equal(state[name], other[name]) for name in state)


def test_same_bits_for_any_number_of_threads(isa: str) -> None:
    for shape, loss in (((33, 3000, 500, 32, 1), "squared_hinge"), ((100, 2500, 400, 20, 16), "softmax")):
        case, results = make(shape, loss=loss), []
        for threads in (1, 2, 4):
            _core.set_num_threads(threads)
            fused = case.fused(weights_of_examples(case), {"optimizer": "sgd", "lr": 0.1, "step": 2})
            results.append({**case.forward(), **fused, **case.backward(weights_of_examples(case))})
        for other in results[1:]:
            assert all(np.array_equal(value, other[key]) for key, value in results[0].items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries(unit: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    for i, shape in enumerate(SHAPES):
        case = make(shape, seed=i, dtype=dtype, bias=i % 2 > 0, device=unit)
        ref = case.reference()
        logits = np.full(ref.z.shape, 7, case.real)
        call(_core.sparse_logits, unit, **case.layer(), logits=logits)
        within(logits, ref.z, ref.z_error, "logits")
        classes = rng.integers(0, shape[1], (shape[0], 5))
        scores = np.full((shape[0], 5), 7, case.real)
        call(_core.sparse_scores, unit, **case.layer(), classes=classes, scores=scores)
        at = np.arange(shape[0])[:, None], classes
        within(scores, ref.z[at], ref.z_error[at], "scores")
        k = min(4, shape[1])
        best, names, lse = (
            np.empty((shape[0], k), case.real),
            np.empty((shape[0], k), np.int64),
            np.empty(shape[0], case.real),
        )
        call(_core.sparse_topk, unit, **case.layer(), k=k, scores=best, classes=names, lse=lse)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        assert np.array_equal(names, order) and np.array_equal(best, np.take_along_axis(logits, order, 1))
        top = ref.z.max(1)
        within(lse, top + np.log(np.exp(ref.z - top[:, None]).sum(1)), ref.z_error.max(1) * 4 + 1e-5, "lse")


@only_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_groups_that_share_factors(device: str, dtype: str) -> None:
    """Groups around a product's 16 rows and 64 classes, larger than a tile, fan-ins past 64; aligned and not."""
    shapes = [
        (33, 70, 90, 64, 8),
        (70, 300, 200, 130, 20),
        (7, 700, 300, 32, 600),
        (1, 90, 100, 65, 64),
        (130, 140, 150, 16, 130),
        (64, 64, 64, 64, 16),
        (20, 33, 40, 1, 9),
    ]
    for i, shape in enumerate(shapes):
        check(
            make(shape, seed=i, dtype=dtype, pad=(0, 3)[i % 2], loss=("squared_hinge", "softmax")[i % 2], device=device)
        )
        case = make(shape, seed=i, dtype=dtype, device=device)
        case.hidden[:, 0] = 0x7FC0 if dtype == "bfloat16" else np.nan  # only those who read it see it
        logits = np.zeros((shape[0], shape[1]), np.float32)
        call(_core.sparse_logits, device, **case.layer(), logits=logits)
        assert np.array_equal(np.isnan(logits), np.broadcast_to((case.inputs() == 0).any(1), logits.shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offsets_past_two_to_the_31(unit: str, dtype: str) -> None:
    """Rows far apart: offsets of elements pass 2^31, and results are those of the compact matrices, bit for bit."""
    if unit == "cuda" and not _core.cuda_emulated:
        pytest.skip("a GPU has no memory by the page")
    shape = (19, 21, 64, 7, 1)
    near, far = (make(shape, dtype=dtype, loss="softmax", device=unit) for _ in range(2))
    for name in ("hidden", "weight", "index"):
        setattr(far, name, far_apart(getattr(near, name), 1 << 27))
    lse = near.forward()["lse"]
    assert np.array_equal(far.forward()["lse"], lse)
    results = []
    for case, spread in ((near, lambda x: x), (far, lambda x: far_apart(x, 1 << 27))):
        state = {name: spread(np.zeros(near.weight.shape, np.float32)) for name in ("first", "second")}
        state |= {name: np.zeros(21, np.float32) for name in ("bias_first", "bias_second")}
        out = {"weight": spread(np.array(near.weight)), "bias": near.bias.copy()}
        out["grad_hidden"] = spread(np.zeros_like(near.hidden))
        incoming = {"lse": lse, "grad_losses": weights_of_examples(near)}
        update = {"optimizer": "adam", "rounding": "stochastic", "lr": 0.1, "step": 1, **state}
        call(_core.sparse_backward, unit, **{**case.arguments(), **incoming, **out, "update": update})
        gradient, logits = (spread(np.zeros(s, np.float32)) for s in (near.weight.shape, (19, 21)))
        call(_core.sparse_backward, unit, **case.arguments(), **incoming, grad_weight=gradient)
        call(_core.sparse_logits, unit, **case.layer(), logits=logits)
        results.append({**out, **state, "grad_weight": gradient, "logits": logits})
    for name, want in results[0].items():
        assert np.array_equal(results[1][name], want), name


def test_every_row_of_many_classes(unit: str) -> None:
    """More classes than blocks of a grid hold 32 of: no row of the gradient, and no logit, is left as it was."""
    classes = 70_000 if unit == "cuda" and _core.cuda_emulated else 2_200_000  # emulated, a million take a minute
    rng = np.random.default_rng(0)
    hidden = rng.uniform(1.0, 2.0, (1, 4)).astype(np.float32)
    weight = np.ones((classes, 2), np.float32)
    index = np.where(np.arange(classes) % 2 == 0, 0, 2)[:, None] + np.arange(2)
    layer = {"hidden": hidden, "weight": weight, "index": index.astype(np.uint16), "bias": None}
    target = {"indptr": np.zeros(2, np.int64), "indices": np.zeros(0, np.int64), "values": None}
    gradient, scale = np.full(weight.shape, np.nan, np.float32), np.ones(1, np.float32)
    incoming = {"loss": "squared_hinge", "lse": None, "grad_losses": scale}
    call(_core.sparse_backward, unit, **layer, **target, **incoming, grad_weight=gradient)
    logits = np.full((1, classes), np.nan, np.float32)
    call(_core.sparse_logits, unit, **layer, logits=logits)
    z = hidden.astype(np.float64)[:, index].sum(-1)
    within(logits, z, 1e-6 * z, "logits")
    want = 2 * (1 + z[0, :, None]) * hidden.astype(np.float64)[0, index]
    within(gradient, want, 1e-6 * want, "grad_weight")


def test_every_class_has_an_input(unit: str) -> None:
    """Lists of an input's classes that a block sorts and sums, where the others are a warp's."""
    for dtype in DTYPES:
        case = make((3, 1200, 300, 9, 1), dtype=dtype, device=unit)
        case.index[:, 0] = 0  # ascending as before
        check(case)


def test_long_lists_of_a_large_cache() -> None:
    """Tiles of a card's size, where lists outgrow shared memory."""
    if not _core.cuda_emulated:
        pytest.skip("the size of the cache is the card's")
    script = "from test_sparse import *; check(make((2, 20_000, 3, 2, 1), device='cuda'))"
    environment = {**os.environ, "WIDEHEAD_EMULATED_L2": str(32 << 20), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@only_gpu
def test_bad_values_on_the_device(device: str) -> None:
    """What no call can throw: it is recorded, its row is NaN, and a step changes nothing."""
    update = {"optimizer": "sgd", "lr": 0.1, "rounding": "nearest"}
    for dtype in DTYPES:
        case = make(SHAPES[6], dtype=dtype, device=device, multi=False, loss="softmax")
        scale, lse = np.ones(31, case.real), np.ones(31, case.real)
        before = case.weight.copy()

        def step(case: SparseCase = case, scale: Any = scale, lse: Any = lse, **more: Any) -> None:
            incoming = {"lse": lse, "grad_losses": scale, "update": dict(update)}
            call(_core.sparse_backward, device, **{**case.arguments(), **incoming, **more})

        labels = case.target["indices"].copy()
        labels[3] = 200
        losses, output = (np.zeros(31, case.real) for _ in range(2))
        arguments = {**case.arguments(), "indices": labels, "losses": losses, "output": output, "lse": lse.copy()}
        call(_core.sparse_forward, device, check=False, **arguments)
        assert np.flatnonzero(np.isnan(losses)).tolist() == [3]
        with pytest.raises(_core.LabelError, match=r"label 200 at position 3"):
            step(indices=labels)
        hidden = case.hidden.copy()
        hidden[5, 7] = 0x7F80 if dtype == "bfloat16" else np.inf
        with pytest.raises(_core.NonFiniteError, match=r"hidden.*row 5"):
            step(hidden=hidden)
        with pytest.raises(_core.NonFiniteError, match=r"lse.*row 4"):
            step(lse=np.where(np.arange(31) == 4, np.nan, 1).astype(case.real))
        step(refused=np.ones(1, np.int32))  # by an earlier call
        assert np.array_equal(case.weight, before)
        step()
        assert not np.array_equal(case.weight, before)
        scores, classes = np.zeros((31, 2), case.real), np.tile([3, -1], (31, 1))
        call(_core.sparse_scores, device, check=False, **case.layer(), classes=classes, scores=scores)
        assert not np.isnan(scores[:, 0]).any() and np.isnan(scores[:, 1]).all()
        with pytest.raises(_core.LabelError, match=r"classes.*-1"):
            call(_core.sparse_scores, device, **case.layer(), classes=classes, scores=scores)


@only_gpu
def test_same_bits_every_time(device: str) -> None:
    for shape, dtype in (((70, 1000, 200, 32, 1), "bfloat16"), ((40, 900, 100, 20, 16), "float32")):
        case = make(shape, dtype=dtype, device=device)
        runs = [{**case.forward(), **case.backward(weights_of_examples(case))} for _ in range(2)]
        assert all(np.array_equal(value, runs[1][name]) for name, value in runs[0].items())


def test_drawn_inputs() -> None:
    """Distinct, ascending, uniform; a row depends on the seed and its number alone."""
    whole = np.full((4000, 7), 65535, np.uint16)
    _core.draw_index(index=whole, in_features=20, seed=5)
    assert (np.diff(whole.astype(int), axis=1) > 0).all() and whole.max() == 19
    counts = np.bincount(whole.ravel(), minlength=20)
    expected = 4000 * 7 / 20
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * (1 - 7 / 20))
    part = np.zeros((5, 7), np.uint16)
    _core.draw_index(index=part, in_features=20, seed=5, first_row=100)
    assert np.array_equal(part, whole[100:105])
    full = np.zeros((3, 20), np.int32)
    _core.draw_index(index=full, in_features=20, seed=1)
    assert np.array_equal(full, np.tile(np.arange(20), (3, 1)))
    with pytest.raises(_core.ShapeError, match="fan_in: expected 1 to 6"):
        _core.draw_index(index=part, in_features=6, seed=5)


def test_bad_index_is_refused() -> None:
    index = np.array([[0, 3, 5], [1, 2, 9]], np.uint16)
    _core.check_index(index=index, in_features=10)
    with pytest.raises(_core.ShapeError, match=r"inputs in \[0, 9\), got 9 at row 1, column 2"):
        _core.check_index(index=index, in_features=9)
    with pytest.raises(_core.ShapeError, match="ascending order, got 4 before 4 in row 0"):
        _core.check_index(index=np.array([[1, 4, 4]], np.int32), in_features=9)
