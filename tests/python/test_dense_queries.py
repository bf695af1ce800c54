"""tests/python/test_dense_queries.py -- the core's logits, scores and best classes against the float64 reference."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import devices
from dense_cases import Case, exact, make, some_shapes, stored, strided
from devices import call, no_cuda
from reference import Dense, within
from widehead import _core

DTYPES = ("float32", "bfloat16", "float64")
PAIRS = [
    (weight, hidden)
    for weight in ("float32", "bfloat16", "float16", "float64")
    for hidden in ("float32", "bfloat16", "float16", "float64")
    if hidden != "float64" or weight == "float64"
]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> str:
    if reason := no_cuda():
        pytest.skip(reason)
    return request.param


def out(shape: tuple[int, int], dtype: str, pad: int = 0) -> np.ndarray:
    """An output full of sevens; so is what lies between its rows."""
    wide = np.full((shape[0], shape[1] + pad), 7, dtype)
    return wide[:, : shape[1]]


def untouched(array: np.ndarray) -> bool:
    return array.base is None or bool((array.base[:, array.shape[1] :] == 7).all())


def layer_of(case: Case) -> dict[str, Any]:
    softcap = case.options.get("softcap", 0.0)
    return {"hidden": case.hidden, "weight": case.weight, "bias": case.bias, "softcap": softcap}


def logits_of(case: Case, pad: int = 0) -> np.ndarray:
    logits = out((len(case.hidden), len(case.weight)), case.real, pad)
    call(_core.dense_logits, case.device, **layer_of(case), offset=case.offset, logits=logits)
    assert untouched(logits)
    return logits


def scores_of(case: Case, classes: np.ndarray, pad: int = 0) -> np.ndarray:
    scores = out(classes.shape, case.real, pad)
    call(_core.dense_scores, case.device, **layer_of(case), classes=classes, scores=scores)
    assert untouched(scores)
    return scores


def as_csr(rows: list[list[int]]) -> dict[str, np.ndarray]:
    return {
        "exclude_indptr": np.cumsum([0] + [len(row) for row in rows]).astype(np.int64),
        "exclude_indices": np.array([c for row in rows for c in row], np.int64),
    }


def topk(
    case: Case, k: int, exclude: list[list[int]] | None = None, lse: np.ndarray | None = None, pad: int = 0, **more: Any
) -> tuple[np.ndarray, np.ndarray]:
    scores, classes = out((len(case.hidden), k), case.real, pad), out((len(case.hidden), k), "int64", 2 * pad)
    more = {**more, **({} if exclude is None else as_csr(exclude))}
    call(
        _core.dense_topk,
        case.device,
        **layer_of(case),
        offset=case.offset,
        k=k,
        scores=scores,
        classes=classes,
        lse=lse,
        **more,
    )
    assert untouched(scores) and untouched(classes)
    return scores, classes


def reference(case: Case) -> Dense:
    """Of logits in general: no class is anybody's target."""
    case.target["indices"][:] = case.options.get("ignore_index", -100)
    return case.reference()


def sorted_exactly(z: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and classes of the k best; what is NaN or -infinity does not count."""
    z = np.where(np.isnan(z), -np.inf, z)
    classes = np.argsort(-z, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(z, classes, 1)
    missing = ((0, 0), (0, k - classes.shape[1]))
    classes = np.pad(np.where(np.isneginf(scores), -1, classes), missing, constant_values=-1)
    return np.pad(scores, missing, constant_values=-np.inf), classes


def check_topk(case: Case, ref: Dense, k: int, pad: int = 0) -> None:
    """Scores within the bounds of the reference, each that of its class, best first."""
    lse = np.full(len(case.hidden), 7, case.real)
    scores, classes = topk(case, k, lse=lse, pad=pad)
    filled = min(k, ref.z.shape[1])
    want, _ = sorted_exactly(ref.z, filled)
    got, at = scores[:, :filled], classes[:, :filled]
    within(got, want, np.broadcast_to(ref.z_error.max(axis=1, keepdims=True), want.shape), "scores")
    within(got, np.take_along_axis(ref.z, at, 1), np.take_along_axis(ref.z_error, at, 1), "scores of classes")
    assert all(len(set(row)) == filled for row in at.tolist())
    assert (got[:, 1:] <= got[:, :-1]).all()
    assert (classes[:, filled:] == -1).all() and np.isneginf(scores[:, filled:]).all()
    within(lse, ref.lse, ref.lse_error, "lse")


def integers(shape: tuple[int, int, int], dtype: str, seed: int, unit: str) -> tuple[Case, np.ndarray]:
    """Small integers, whose logits are exact, so that ties are real. Returns the logits too."""
    batch, n, d = shape
    rng = np.random.default_rng([seed, *shape])
    case = make(shape, dtype=dtype, bias=False, device=unit)
    hidden, weight = rng.integers(-2, 3, (batch, d)), rng.integers(-2, 3, (n, d))
    case.hidden, case.weight = (stored(x.astype(np.float32), dtype) for x in (hidden, weight))
    return case, (hidden @ weight.T).astype(float)


def check_exactly(case: Case, z: np.ndarray, k: int, exclude: list[list[int]] | None = None, **more: Any) -> None:
    scores, classes = topk(case, k, exclude, **more)
    want_scores, want_classes = sorted_exactly(z, k)
    assert np.array_equal(classes, want_classes)
    assert np.array_equal(scores, want_scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_and_scores(unit: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    for i, shape in enumerate(some_shapes(20 if unit == "cpu" else 7, seed=11)):
        case = make(shape, seed=i, dtype=dtype, bias=i % 2 > 0, pad=i % 3, softcap=(0.0, 2.0)[i % 2], device=unit)
        ref = reference(case)
        within(logits_of(case, pad=i % 4), ref.z, ref.z_error, "logits")
        classes = rng.integers(0, shape[1], (shape[0], 5))
        at = np.arange(shape[0])[:, None], classes
        within(scores_of(case, classes, pad=i % 2), ref.z[at], ref.z_error[at], "scores")


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_offset(unit: str, softcap: float) -> None:
    """It is added after the cap, and -infinity takes a class out."""
    for dtype in DTYPES:
        case = make((17, 97, 31), dtype=dtype, offset=True, softcap=softcap, device=unit)
        ref = reference(case)
        gone = np.isneginf(case.offset)
        logits = logits_of(case)
        assert np.isneginf(logits[:, gone]).all() and gone.any()
        within(logits[:, ~gone], ref.z[:, ~gone], ref.z_error[:, ~gone], "logits")
        scores, classes = topk(case, 80)
        assert np.array_equal(np.sort(classes, 1)[:, -(~gone).sum() :], np.tile(np.flatnonzero(~gone), (17, 1)))
        want = sorted_exactly(ref.z, (~gone).sum())[0]
        bound = np.broadcast_to(ref.z_error.max(axis=1, keepdims=True), want.shape)
        within(scores[:, : want.shape[1]], want, bound, "scores")


@pytest.mark.parametrize(("weight", "hidden"), PAIRS)
def test_every_pair_of_dtypes(cuda: str, weight: str, hidden: str) -> None:
    for i, shape in enumerate([(3, 97, 5), (17, 200, 64)]):
        case = make(shape, seed=i, dtype=weight, hidden_dtype=hidden, pad=(0, 3)[i], softcap=(0.0, 3.0)[i], device=cuda)
        if i and weight != "float64":
            case.bias = stored(case.bias, "bfloat16")
        ref = reference(case)
        within(logits_of(case), ref.z, ref.z_error, "logits")
        every = np.tile(np.arange(shape[1])[::-1], (shape[0], 1))
        within(scores_of(case, every), ref.z[:, ::-1], ref.z_error[:, ::-1], "scores")
        check_topk(case, ref, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_best_of_every_shape(cuda: str, dtype: str) -> None:
    """The last two shapes: more than one chunk of the batch; several pieces of several tiles."""
    shapes = [(1, 1, 1), (1, 1000, 257), (130, 1, 5), (130, 1000, 5), (3, 1000, 64), (700, 90, 2), (16, 4999, 4)]
    for i, shape in enumerate(shapes):
        case = make(shape, seed=i, dtype=dtype, bias=i % 3 > 0, pad=i % 4, device=cuda)
        check_topk(case, reference(case), (1, 5, 130)[i % 3], pad=i % 2)


def test_same_classes_as_on_the_cpu(cuda: str) -> None:
    for dtype in DTYPES:
        case = make((16, 2000, 16), dtype=dtype, softcap=20.0, device="cpu")
        best = -np.sort(-case.reference().z, axis=1)[:, :11]
        assert (best[:, :-1] - best[:, 1:]).min() > 20 * case.reference().z_error.max()
        classes = topk(case, 10)[1]
        case.device = cuda
        assert np.array_equal(topk(case, 10)[1], classes)


@pytest.mark.parametrize("bias", ["float32", "bfloat16", "float64"])
def test_bias_anywhere_in_memory(cuda: str, bias: str) -> None:
    for offset in (0, 1, 2, 4):
        case = make((5, 999, 3), dtype="float64" if bias == "float64" else "float32", device=cuda)
        room = stored(np.zeros(999 + offset), bias)
        room[offset:] = stored(case.bias, bias)
        case.bias = room[offset:]
        check_topk(case, reference(case), 3)


def test_topk_equals_sorting_the_logits(unit: str) -> None:
    """Ties go to the lower class."""
    rng = np.random.default_rng(4)
    for i, shape in enumerate(some_shapes(30 if unit == "cpu" else 6, seed=13)):
        for dtype in DTYPES:
            case, z = integers(shape, dtype, 0, unit)
            exclude = None
            if i % 2:
                exclude = [list(rng.integers(0, shape[1], rng.integers(0, 6))) for _ in range(shape[0])]
                for b, row in enumerate(exclude):
                    z[b, row] = -np.inf
            for k in (1, 2, 5, 17) if unit == "cpu" else (1, 17):
                check_exactly(case, z, k, exclude)


@pytest.mark.parametrize("k", [1023, 1024, 1025, 2500, 3100])
def test_more_than_one_pass(device: str, k: int) -> None:
    for dtype in ("float32", "float64"):
        case, z = integers((2, 3000, 3), dtype, 1, device)
        check_exactly(case, z, k)


def test_more_than_one_pass_with_excludes(device: str) -> None:
    """Rows that run out in the first, the second and the third pass."""
    case, z = integers((3, 3000, 3), "float32", 2, device)
    lse = np.empty(3, np.float32)
    total = np.log(np.exp(z).sum(1))
    exclude = [np.random.default_rng(b).permutation(3000)[:n].tolist() for b, n in enumerate((2500, 1500, 10))]
    for b, row in enumerate(exclude):
        z[b, row] = -np.inf
    check_exactly(case, z, 2999, exclude, lse=lse)
    within(lse, total, np.full(3, 1e-5), "lse")


def test_equal_scores(device: str) -> None:
    case, _ = integers((5, 3000, 3), "float32", 0, device)
    case.weight[:] = case.weight[0]
    for k in (4, 300, 1500):
        scores, classes = topk(case, k)
        assert np.array_equal(classes, np.tile(np.arange(k), (5, 1)))
        assert np.array_equal(scores, np.repeat(case.hidden @ case.weight[:1].T, k, axis=1))


def test_classes_from_worst_to_best(device: str) -> None:
    """Every logit beats all before it: what comes late must still get in."""
    case, _ = integers((3, 3000, 1), "float32", 0, device)
    case.hidden[:], case.weight[:, 0] = 1, np.arange(3000)
    lse = np.empty(3, np.float32)
    for k in (1, 200):
        check_exactly(case, np.tile(np.arange(3000.0), (3, 1)), k, lse=lse)
        within(lse, np.full(3, 2999 - np.log1p(-np.exp(-1.0))), np.full(3, 1e-3), "lse")


def test_logits_that_are_not_finite(device: str) -> None:
    """NaN and -infinity are never among the best, +infinity is."""
    case, z = integers((4, 700, 3), "float32", 3, device)
    case.hidden[2] = np.nan
    case.bias = np.zeros(700, np.float32)
    case.bias[::2], case.bias[1::4], case.bias[699] = -np.inf, np.nan, np.inf
    z = z + case.bias
    z[2] = np.nan
    lse = np.zeros(4, np.float32)
    check_exactly(case, z, 200, lse=lse)
    assert np.isnan(lse).all()
    case.bias[1::2] = -np.inf
    check_exactly(case, np.full_like(z, -np.inf), 3, lse=lse)
    assert np.isneginf(lse[[0, 1, 3]]).all() and np.isnan(lse[2])


def test_excluded_classes(device: str) -> None:
    """Unsorted, repeated, out of range, all of them, none."""
    case, z = integers((6, 500, 3), "float32", 5, device)
    rng = np.random.default_rng(0)
    rows: list[list[int]] = [
        [],
        [-1, 500, 2**40, -(2**40), 2**32],
        rng.permutation(500).tolist(),
        [*rng.permutation(500)[:499].tolist(), 7, 7, 7],
        [int(np.argmax(z[4]))] * 40,
        np.argsort(-z[5])[:100].tolist(),
    ]
    for b, row in enumerate(rows):
        z[b, [c for c in row if 0 <= c < 500]] = -np.inf
    for k in (3, 150):
        check_exactly(case, z, k, rows)
    check_exactly(case, integers((6, 500, 3), "float32", 5, device)[1], 5, [[]] * 6)


def test_many_rows_and_many_classes(cuda: str) -> None:
    """More than go through at a time: of the batch with its excluded classes, and of the classes."""
    case, z = integers((600, 40, 257), "bfloat16", 9, cuda)
    case.hidden = exact(case.hidden).astype(np.float16)
    assert np.array_equal(logits_of(case), z)
    assert np.array_equal(scores_of(case, np.arange(600)[:, None] % 40)[:, 0], z[np.arange(600), np.arange(600) % 40])
    rows = [[b % 40, (b * 7) % 40] for b in range(600)]
    for b, row in enumerate(rows):
        z[b, row] = -np.inf
    check_exactly(case, z, 2, rows)
    case, z = integers((2, 2**20 + 5, 1), "float32", 0, cuda)
    assert np.array_equal(logits_of(case), z)


@pytest.mark.parametrize(
    ("indptr", "message"),
    [([0, 3, 2, 4], "row pointer 2 of row 1"), ([-1, 2, 3, 4], "row pointer -1 of row 0"),
     ([0, 2, 3, 9], "row pointer 9 of row 2")],
)  # fmt: skip
def test_bad_row_pointers(cuda: str, indptr: list[int], message: str) -> None:
    case, z = integers((3, 50, 3), "float32", 6, cuda)
    csr = {"exclude_indptr": np.array(indptr, np.int64), "exclude_indices": np.arange(4)}
    scores, classes = np.empty((3, 5), np.float32), np.empty((3, 5), np.int64)
    with pytest.raises(_core.LabelError, match=f"exclude: {message} decreases or lies outside of 0 to 4"):
        call(_core.dense_topk, cuda, **layer_of(case), k=5, scores=scores, classes=classes, **csr)
    bad = int(message[-1])
    assert np.array_equal(classes[bad], sorted_exactly(z, 5)[1][bad])  # a bad row excludes nothing


def test_scores_of_classes_that_do_not_exist(cuda: str) -> None:
    case, z = integers((3, 50, 3), "float32", 7, cuda)
    for wrong in (-1, 50, 2**40):
        classes = np.array([[1, 2], [3, wrong], [5, 49]])
        scores = np.full((3, 2), 7, np.float32)
        with pytest.raises(
            _core.LabelError, match=rf"classes: expected a class in \[0, 50\), got {wrong} at position 3"
        ):
            call(_core.dense_scores, cuda, **layer_of(case), classes=classes, scores=scores)
        assert np.isnan(scores[1, 1])
        scores[1, 1], classes[1, 1] = z[1, 0], 0
        assert np.array_equal(scores, np.take_along_axis(z, classes, 1))


def test_nothing_asked(device: str) -> None:
    """No examples, no classes, no k."""
    case = make((0, 12, 5), device=device)
    assert logits_of(case).shape == (0, 12)
    assert scores_of(case, np.zeros((0, 4), np.int64)).shape == (0, 4)
    assert topk(case, 3)[1].shape == (0, 3)
    case = make((2, 12, 5), device=device)
    assert scores_of(case, np.zeros((2, 0), np.int64)).shape == (2, 0)
    with pytest.raises(_core.ShapeError, match="k: expected at least 1"):
        topk(case, 0)


def test_topk_normaliser(unit: str) -> None:
    for softcap in (0.0, 3.0):
        case = make((33, 1000, 64), softcap=softcap, device=unit)
        ref, lse = case.reference(), np.empty(33, np.float32)
        topk(case, 3, exclude=[[1, 2]] * 33, lse=lse)
        within(lse, ref.lse, ref.lse_error, "lse")


def test_threads_that_end_leave_their_cublas_handle_to_others(cuda: str) -> None:
    if not _core.cuda_emulated:
        pytest.skip("counted by the emulation's cuBLAS")
    case = make((2, 12, 5), device=cuda)
    want = logits_of(case)
    created = ctypes.c_int.in_dll(ctypes.CDLL("libcublas.so.13"), "fake_cublas_handles")
    before, got = created.value, []
    for _ in range(3):
        thread = threading.Thread(target=lambda: got.append(logits_of(case)))
        thread.start()
        task = Path(f"/proc/self/task/{thread.native_id}")
        thread.join()
        while task.exists():  # join() ends before the thread itself, which leaves its handle at its very end
            time.sleep(0.001)
    assert before >= 1 and created.value <= before + 1
    assert len(got) == 3 and all(np.array_equal(logits, want) for logits in got)


def test_float16_weights_are_for_a_gpu() -> None:
    case = make((2, 12, 5), dtype="float16")
    for ask in (logits_of, lambda c: scores_of(c, np.zeros((2, 1), np.int64)), lambda c: topk(c, 1)):
        with pytest.raises(_core.DtypeError, match="weight: float16 is for a GPU"):
            ask(case)


def test_scratch_that_is_too_small(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make((4, 50, 5), hidden_dtype="float16", device=cuda)
    for kind in (devices._Host, devices._Gpu):
        whole = kind.scratch
        monkeypatch.setattr(kind, "scratch", lambda self, n, whole=whole: whole(self, n - 16))
    for ask in (logits_of, lambda c: scores_of(c, np.zeros((4, 1), np.int64)), lambda c: topk(c, 2)):
        with pytest.raises(_core.CapacityError, match=r"device\.scratch: expected at least \d+ bytes, got \d+"):
            ask(case)


def test_results_do_not_depend_on_tiles(cuda: str) -> None:
    """Emulation only: tiles follow from the size of the L2 cache, which can be chosen there."""
    if not _core.cuda_emulated:
        pytest.skip("a GPU has one size of L2 cache")
    script = (
        "import hashlib, sys\n"
        "from test_dense_queries import *\n"
        "case, _ = integers((9, 3000, 3), 'float32', 8, 'cuda')\n"
        "lists = [list(range(0, 3000, 7))] * 9\n"
        "print(hashlib.sha256(b''.join(x.tobytes() for k in (3, 1100) for x in topk(case, k, lists))).hexdigest())\n"
    )
    results = set()
    for bytes_of_l2 in ("4096", "65536", "8388608"):
        env = {**os.environ, "WIDEHEAD_EMULATED_L2": bytes_of_l2, "PYTHONPATH": ":".join(sys.path)}
        run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        results.add(run.stdout)
    assert len(results) == 1 and len(results.pop().strip()) == 64


def test_bounds_are_tight_enough_to_mean_something(device: str) -> None:
    """A feature that is 2 % off is outside of the bounds, and so is a class that is left out of the normaliser."""
    case = make((17, 200, 31), device=device)
    ref = reference(case)
    kept = exact(case.hidden).astype(np.float32)
    case.hidden[:, -1] *= 1.02
    with pytest.raises(AssertionError, match="logits"):
        within(logits_of(case), ref.z, ref.z_error, "logits")
    with pytest.raises(AssertionError, match="scores"):
        check_topk(case, ref, 5)
    case.hidden = strided(kept, 2)
    check_topk(case, ref, 5)
    worst = int(np.argmin(ref.z.max(0)))
    case.bias[worst] = -np.inf
    with pytest.raises(AssertionError, match="lse"):
        check_topk(case, ref, 5)
