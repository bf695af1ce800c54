"""tests/python/test_bad_input.py -- each wrong argument: one error that names it, what was expected and what came, no
change."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import widehead
from dense_cases import make, weights_of_examples
from widehead import (
    BackendError,
    CapacityError,
    DtypeError,
    Error,
    LabelError,
    Labels,
    NonFiniteError,
    ShapeError,
    _core,
)
from widehead.numpy import DenseHead

F32, F64, I64 = np.float32, np.float64, np.int64


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (ShapeError, ValueError),
        (DtypeError, TypeError),
        (LabelError, ValueError),
        (NonFiniteError, ValueError),
        (CapacityError, MemoryError),
        (BackendError, RuntimeError),
    ],
)
def test_errors_have_two_parents(error: type[Exception], base: type[Exception]) -> None:
    assert issubclass(error, Error) and issubclass(error, base) and issubclass(error, RuntimeError)
    assert error.__module__ == "widehead" and getattr(widehead, error.__name__) is error
    again = pickle.loads(pickle.dumps(error("why")))
    assert type(again) is error and str(again) == "why"


def call() -> dict[str, Any]:
    """Arguments of a call that works; each test spoils one."""
    case = make((4, 6, 5))
    return {**case.arguments(), "losses": np.zeros(4, F32), "output": None, "lse": np.zeros(4, F32)}


def overlapping(x: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(x, (4, 5), (4, 4))


def frozen(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


FORWARD: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    (
        "hidden",
        lambda x: x[None],
        ShapeError,
        r"hidden: expected 2 dimensions \[batch, in_features\], got 3 \[1, 4, 5\]",
    ),
    ("hidden", lambda x: x[0], ShapeError, r"hidden: expected 2 dimensions .*, got 1 \[5\]"),
    (
        "hidden",
        lambda x: x.astype(I64),
        DtypeError,
        "hidden: expected float32, float64, bfloat16 or float16, got int64",
    ),
    ("hidden", lambda x: x.astype(np.complex64), DtypeError, "hidden: expected .*, got complex64"),
    ("hidden", lambda x: x > 0, DtypeError, "hidden: expected .*, got bool"),
    ("hidden", lambda x: x.astype(F64), DtypeError, "hidden: .*float64.*float32"),
    ("hidden", lambda x: x.tolist(), DtypeError, r"hidden: expected an array .*, got list"),
    ("hidden", lambda x: None, DtypeError, r"hidden: expected an array \[batch, in_features\], got None"),
    ("hidden", lambda x: "abc", DtypeError, "hidden: expected an array .*, got str"),
    ("hidden", lambda x: x[:, ::-1], ShapeError, "hidden: expected the last axis to be contiguous, got a stride of -1"),
    ("hidden", lambda x: np.repeat(x, 2, 1)[:, ::2], ShapeError, "hidden: .*contiguous, got a stride of 2 elements"),
    ("hidden", lambda x: np.asfortranarray(x), ShapeError, "hidden: .*contiguous, got a stride of 4 elements"),
    ("hidden", lambda x: x[::-1], ShapeError, "hidden: expected rows that do not overlap, .* stride of -5"),
    (
        "hidden",
        overlapping,
        ShapeError,
        "hidden: expected rows that do not overlap, got rows of 5 elements at a stride of 1",
    ),
    ("hidden", lambda x: x[:, :4], ShapeError, r"hidden: .*5.*\[4, 4\]"),
    ("hidden", lambda x: x.astype(">f4"), DtypeError, "hidden: expected"),
    (
        "weight",
        lambda x: x.astype(np.float16),
        DtypeError,
        "weight: float16 is for a GPU; on the CPU use bfloat16 or float32",
    ),
    ("weight", lambda x: x[:0], ShapeError, "weight: expected at least one class"),
    ("bias", lambda x: x[:-1], ShapeError, "bias: expected 6 elements, got 5"),
    ("bias", lambda x: np.repeat(x, 2)[::2], ShapeError, "bias: expected the last axis to be contiguous"),
    ("bias", lambda x: x.astype(F64), DtypeError, "bias: float64 .* float32"),
    ("offset", lambda x: np.zeros(5, F32), ShapeError, r"offset: expected shape \[n_classes\] = \[6\], got \[5\]"),
    ("offset", lambda x: np.zeros(6), DtypeError, "offset: expected float32, got float64"),
    ("indices", lambda x: x.astype(np.int32), DtypeError, "indices: expected int64, got int32"),
    ("indices", lambda x: x[:3], ShapeError, r"indices: expected shape \[batch\] = \[4\], got \[3\]"),
    ("indices", lambda x: np.array([0, 6, 1, 9]), LabelError, "label 6 at row 1 is out of range: expected 0 to 5"),
    ("indices", lambda x: np.array([0, 1, 1, -1]), LabelError, "label -1 at row 3 is out of range"),
    ("values", lambda x: np.ones(4, F32), ShapeError, "values: expected None without indptr"),
    (
        "class_weight",
        lambda x: np.ones(7, F32),
        ShapeError,
        r"class_weight: expected shape \[n_classes\] = \[6\], got \[7\]",
    ),
    ("loss", lambda x: "mse", ShapeError, "loss: expected 'softmax', 'bce' or 'squared_hinge', got 'mse'"),
    ("label_smoothing", lambda x: 1.5, ShapeError, "label_smoothing: expected a number in .*, got 1.5"),
    ("label_smoothing", lambda x: np.nan, ShapeError, "label_smoothing: .*got (-)?nan"),
    ("softcap", lambda x: -1.0, ShapeError, "softcap: expected a number > 0.*, got -1"),
    ("n_classes", lambda x: 7, ShapeError, "7 classes"),
    ("losses", lambda x: x[:2], ShapeError, "losses: expected 4 elements, got 2"),
    ("losses", lambda x: x.astype(F64), DtypeError, "losses: expected float32, got float64"),
    ("losses", frozen, ShapeError, "losses: expected a writable array, got a read-only one"),
    ("lse", lambda x: np.zeros((4, 1), F32), ShapeError, r"lse: expected 1 dimension \[batch\], got 2 \[4, 1\]"),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), FORWARD)
def test_forward_refuses(name: str, spoil: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    arguments = call()
    _core.dense_forward(**arguments)
    arguments["losses"][:] = arguments["lse"][:] = 7
    spoilt = {**arguments, name: spoil(arguments.get(name))}
    with pytest.raises(error, match=message) as caught:
        _core.dense_forward(**spoilt)
    assert type(caught.value) is error
    for array in (arguments["losses"], arguments["lse"]):
        assert (array == 7).all()


CSR = {"indptr": np.array([0, 2, 3, 3, 4]), "indices": np.array([1, 2, 0, 5]), "values": np.ones(4, F32)}
SPARSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"indptr": np.array([0, 2, 3, 4])}, ShapeError, r"indptr: expected shape \[batch \+ 1\] = \[5\], got \[4\]"),
    ({"indptr": np.array([0, 2, 3, 3, 9])}, LabelError, "indptr: expected its last entry to be .* 4, got 9"),
    ({"indptr": np.array([0, 3, 2, 3, 4])}, LabelError, "decrease"),
    ({"indptr": np.array([-1, 2, 3, 3, 4])}, LabelError, "target"),
    ({"indices": np.array([1, 2, 6, 5])}, LabelError, "label 6"),
    ({"indices": np.array([1, 1, 0, 5])}, LabelError, "1"),
    ({"values": np.ones(3, F32)}, ShapeError, r"values: expected shape \[nnz\] = \[4\], got \[3\]"),
    ({"values": np.array([1, np.inf, 1, 1], F32)}, LabelError, "inf"),
    ({"label_smoothing": 0.1}, ShapeError, "label_smoothing"),
]


@pytest.mark.parametrize(("change", "error", "message"), SPARSE)
def test_sparse_targets_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    _core.dense_forward(**{**call(), **CSR})
    with pytest.raises(error, match=message):
        _core.dense_forward(**{**call(), **CSR, **change})


def test_a_capsule_serves_once() -> None:
    arguments = call()
    capsule = arguments["hidden"].__dlpack__()
    _core.dense_forward(**{**arguments, "hidden": capsule})
    with pytest.raises(
        DtypeError, match=r"hidden: expected an array .*DLPack capsule, which serves once.*got PyCapsule"
    ):
        _core.dense_forward(**{**arguments, "hidden": capsule})


UPDATE = {"optimizer": "sgd", "rounding": "nearest", "lr": 0.1, "step": 1}
UPDATES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"optimizer": "lion"}, ShapeError, "update: expected optimizer to be 'sgd', 'adam' or 'adagrad', got 'lion'"),
    ({"rounding": 3}, ShapeError, "update: expected rounding to be 'nearest', 'stochastic' or 'kahan', got '3'"),
    ({"learning_rate": 1.0}, ShapeError, "update: unknown key 'learning_rate'"),
    ({"lr": "fast"}, ShapeError, "update: expected lr to be a number, got 'fast'"),
    ({"lr": np.inf}, ShapeError, "lr"),
    ({"step": 0}, ShapeError, "step"),
    ({"seed": -1}, ShapeError, "update: expected seed to be an integer of at least 0, got -1"),
    ({"momentum": 0.9}, ShapeError, "first"),
    ({"optimizer": "adam", "first": np.zeros((6, 5), F32)}, ShapeError, "second"),
    ({"optimizer": "adagrad", "second": np.zeros((6, 5), F32)}, ShapeError, "second"),
    ({"momentum": 0.9, "first": np.zeros((6, 5)), "bias_first": np.zeros(6)}, DtypeError, "first"),
    ({"momentum": 0.9, "first": np.zeros((6, 4), F32)}, ShapeError, "first"),
    ({"momentum": 0.9, "first": frozen(np.zeros((6, 5), F32))}, ShapeError, "update.first: expected a writable array"),
]


@pytest.mark.parametrize(("change", "error", "message"), UPDATES)
def test_updates_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = make((4, 6, 5))
    scale, before = weights_of_examples(case), case.weight.copy()
    lse = case.forward(("lse",))["lse"]
    common = {**case.arguments(), "lse": lse, "grad_losses": scale}
    with pytest.raises(error, match=message):
        _core.dense_backward(**common, update={**UPDATE, **change})
    assert np.array_equal(case.weight, before)
    with pytest.raises(error, match=message):
        rows = np.arange(6)
        grad = np.zeros((6, 5), F32)
        more = {"bias": case.bias, "grad_bias": np.zeros(6, F32)}
        _core.update_rows(weight=case.weight, rows=rows, grad=grad, update={**UPDATE, **change}, **more)
    assert np.array_equal(case.weight, before)


def test_fused_step_needs_writable_weights() -> None:
    case = make((4, 6, 5))
    case.weight.flags.writeable = False
    common = {**case.arguments(), "lse": case.forward(("lse",))["lse"], "grad_losses": weights_of_examples(case)}
    _core.dense_backward(**common, grad_hidden=np.zeros((4, 5), F32))
    with pytest.raises(ShapeError, match="weight: expected a writable array"):
        _core.dense_backward(**common, update=UPDATE)


@pytest.mark.parametrize(
    ("rows", "grad", "error", "message"),
    [
        ([0, 6], np.zeros((2, 5), F32), LabelError, r"rows: expected rows in \[0, 6\), got 6"),
        ([0, -1], np.zeros((2, 5), F32), LabelError, "got -1"),
        ([3, 3], np.zeros((2, 5), F32), LabelError, "distinct rows, got 3"),
        ([1, 2], np.zeros((3, 5), F32), ShapeError, "grad: expected"),
        ([1, 2], np.full((2, 5), np.nan, F32), NonFiniteError, "grad"),
    ],
)
def test_update_rows_refuses(rows: list[int], grad: np.ndarray, error: type[Exception], message: str) -> None:
    weight = np.ones((6, 5), F32)
    with pytest.raises(error, match=message):
        _core.update_rows(weight=weight, rows=np.array(rows), grad=grad, update=UPDATE)
    assert (weight == 1).all()
    if error is LabelError and "distinct" not in message:
        with pytest.raises(error, match=message):
            _core.gather_rows(weight=weight, rows=np.array(rows), out=grad)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"loss": "bce"}, {"loss": "sampled_softmax", "negatives": 5}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_non_finite_hidden_changes_nothing(bad: float, options: dict[str, Any], dtype: str) -> None:
    """Every bit of weight, bias, moments and counters stays, and the next good step is as if nothing had been."""
    rng = np.random.default_rng(0)
    hidden, target = rng.normal(size=(9, 8)).astype(F64 if dtype == "float64" else F32), rng.integers(0, 40, 9)
    head, twin = (DenseHead(8, 40, dtype=dtype, **options) for _ in range(2))
    for each in (head, twin):
        each.step(hidden, target, 0.1, "adam")
    spoilt = hidden.copy()
    spoilt[5, 3] = bad
    state = {key: value.copy() for key, value in head._optimizer.arrays.items()}
    with pytest.raises(NonFiniteError, match="hidden"):
        head.step(spoilt, target, 0.1, "adam")
    assert head.steps == 1 and head._optimizer.step == 1
    assert np.array_equal(head.weight, twin.weight) and np.array_equal(head.bias, twin.bias)
    assert all(np.array_equal(value, head._optimizer.arrays[key]) for key, value in state.items())
    results = [each.step(hidden, target, 0.1, "adam") for each in (head, twin)]
    assert results[0].loss == results[1].loss and np.array_equal(head.weight, twin.weight)


def test_non_finite_hidden_shows_in_the_loss() -> None:
    head = DenseHead(8, 40)
    hidden = np.zeros((3, 8), F32)
    hidden[1, 2] = np.nan
    result = head.forward(hidden, [0, 1, 2], return_lse=True)
    assert np.isnan(result.loss) and np.isnan(result.lse[1]) and np.isfinite(result.lse[[0, 2]]).all()
    assert (head.topk(hidden, 2).classes[1] == -1).all()  # a NaN is no score


HIDDEN = np.zeros((4, 8), F32)
HEAD_CALLS: list[tuple[Callable[[DenseHead], Any], type[Exception], str]] = [
    (lambda h: h.step(np.zeros((4, 7), F32), [0] * 4, 0.1), ShapeError, r"hidden: .*\[..., 8\], got \[4, 7\]"),
    (lambda h: h.step(np.zeros((4, 8), np.int32), [0] * 4, 0.1), DtypeError, "hidden: expected .*, got int32"),
    (lambda h: h.step(np.float32(3), 0, 0.1), ShapeError, "hidden: expected shape"),
    (lambda h: h.step(np.zeros((4, 8)), [0] * 4, 0.1), DtypeError, "hidden.*float64"),
    (lambda h: h.step(HIDDEN, [0] * 3, 0.1), ShapeError, r"target: expected shape \[4\].*got \[3\]"),
    (lambda h: h.step(HIDDEN, [0.0] * 4, 0.1), DtypeError, "target: expected integer classes.*got float64"),
    (
        lambda h: h.step(HIDDEN, [0, 40, 1, 2], 0.1),
        LabelError,
        r"target: expected classes in \[0, 40\), got 40 at position 1",
    ),
    (lambda h: h.step(HIDDEN, sp.csr_array((3, 40)), 0.1), ShapeError, r"target: .*\[4, 40\], got \[3, 40\]"),
    (lambda h: h.step(HIDDEN, sp.csr_array((4, 39)), 0.1), ShapeError, r"target: .*\[4, 40\], got \[4, 39\]"),
    (lambda h: h.step(HIDDEN, sp.csc_array((4, 40)), 0.1), DtypeError, r"CSR format, got csc; call .tocsr\(\)"),
    (lambda h: h.step(HIDDEN, [0] * 4, 0.1, "lion"), ShapeError, "optimizer: expected one of 'sgd', .* got 'lion'"),
    (lambda h: h.step(HIDDEN, [0] * 4, 0.1, rounding="up"), ShapeError, "rounding: expected one of .*, got 'up'"),
    (lambda h: h.step(HIDDEN, [0] * 4, np.nan), ShapeError, "lr"),
    (lambda h: h.step(HIDDEN, [0] * 4, 0.1, sample_weight=[1, 2]), ShapeError, r"sample_weight: .*\[4\], got \[2\]"),
    (lambda h: h.step(HIDDEN, [0] * 4, 0.1, sample_weight=[1, 1, 1, -1]), NonFiniteError, "sample_weight"),
    (lambda h: h.topk(HIDDEN, 0), ShapeError, "k: expected an integer of at least 1, got 0"),
    (lambda h: h.topk(HIDDEN, 2, exclude=[[0], [1]]), ShapeError, r"\[4, 40\], got \[2, 40\]"),
    (lambda h: h.topk(HIDDEN, 2, exclude=[[0], [1], [40], []]), LabelError, "got 40"),
    (lambda h: h.scores(HIDDEN, [0, 40]), LabelError, "classes: .*got 40"),
    (lambda h: h.scores(HIDDEN, np.zeros((3, 2), int)), ShapeError, r"classes: expected shape \[4, 'n'\]"),
    (lambda h: h.scores(HIDDEN, [0.5]), DtypeError, "classes: expected integers, got float64"),
    (
        lambda h: setattr(h, "weight", np.zeros((8, 40), F32)),
        ShapeError,
        r"weight: expected shape \[40, 8\], got \[8, 40\]",
    ),
    (lambda h: setattr(h, "bias", None), ShapeError, "bias: expected an array"),
    (lambda h: h.load_state_dict({"weight": h.weight}), ShapeError, "state: expected the names"),
    (lambda h: Labels.from_lists([[0], [7]], 5), LabelError, "got 7 at position 1"),
    (lambda h: Labels.from_lists([[0.5]], 5), DtypeError, "integers, got float64"),
    (lambda h: Labels.from_lists([[0], [1]], 5, [[1.0], []]), ShapeError, "values: expected as many weights"),
    (lambda h: Labels([0, 2, 1], [1], None, 5).check(), LabelError, "indptr"),
    (lambda h: Labels([0, 2, 1, 3], [1, 2, 3], None, 5).check(), LabelError, "got a fall at row 1"),
    (lambda h: Labels([[0]], [], None, 5).check(), ShapeError, "indptr: expected 1 dimension, got 2"),
    (lambda h: Labels([0, 1], [1], [np.nan], 5).check(), LabelError, "values: expected finite weights, got nan"),
]


@pytest.mark.parametrize(("call", "error", "message"), HEAD_CALLS)
def test_the_head_refuses(call: Callable[[DenseHead], Any], error: type[Exception], message: str) -> None:
    head, twin = DenseHead(8, 40), DenseHead(8, 40)
    with pytest.raises(error, match=message):
        call(head)
    assert np.array_equal(head.weight, twin.weight) and np.array_equal(head.bias, twin.bias) and head.steps == 0
    head.step(HIDDEN + 1, [0, 1, 2, 3], 0.1, "adagrad")  # whatever was refused left no trace


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "loss: expected one of 'softmax', .*, got 'mse'"),
        ({"reduction": "max"}, "reduction"),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected a number in \[0, 1\], got -0.1"),
        ({"label_smoothing": 0.1, "loss": "bce"}, "label_smoothing: expected 0 with loss='bce'"),
        ({"softcap": 0.0}, "softcap: expected None or a positive number, got 0.0"),
        ({"softcap": 3.0, "loss": "bce"}, "softcap: .*belongs to softmax"),
        ({"lse_penalty": float("nan")}, "lse_penalty"),
        ({"filter_eps": 1.0}, "filter_eps"),
        ({"negatives": 5}, "negatives: expected None with loss='softmax', got 5"),
        ({"loss": "sampled_softmax"}, "negatives: expected an integer of at least 1 .*got None"),
        ({"loss": "sampled_softmax", "negatives": 0}, "negatives: expected an integer of at least 1, got 0"),
        ({"dtype": "int8"}, "dtype: expected one of 'float32', .*, got 'int8'"),
        ({"seed": -1}, r"seed: expected an integer in \[0, 2\^64\), got -1"),
        ({"class_weight": np.ones(39)}, r"class_weight: expected shape \[n_classes\] = \[40\], got \[39\]"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        DenseHead(8, 40, **options)


def test_sizes_refused() -> None:
    for sizes in [(0, 5), (5, 0), (-1, 5), (2.5, 3)]:
        with pytest.raises(ShapeError, match="expected an integer of at least 1"):
            DenseHead(*sizes)
    with pytest.raises(NonFiniteError, match="class_weight"):
        DenseHead(8, 2, class_weight=[1, np.nan])
    with pytest.raises(ShapeError, match="scores are no probabilities"):
        DenseHead(8, 2, loss="squared_hinge").log_prob(HIDDEN)
    with pytest.raises(ShapeError, match="return_lse"):
        DenseHead(8, 2, loss="bce").forward(HIDDEN, [0] * 4, return_lse=True)


def test_threads_and_instruction_sets_refused() -> None:
    with pytest.raises(ShapeError, match="0"):
        _core.set_num_threads(0)
    with pytest.raises(BackendError, match="sse9"):
        _core.set_isa("sse9")
