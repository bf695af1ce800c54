"""tests/python/test_cuda_sparse.py -- random problems for the CUDA sparse head against float64, queries and steps too.

As in test_cuda_differential.py every problem is drawn from its seed alone, and an emulated L2 cache has several sizes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from dense_cases import exact, strided
from devices import call, no_cuda
from reference import within
from test_cuda_differential import size
from test_sparse import DTYPES, SPARSE_LOSSES, SparseCase, check, make, weights_of_examples
from widehead import _core

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if reason := no_cuda():
        pytest.skip(reason)


def draw(seed: int) -> tuple[SparseCase, np.random.Generator]:
    rng = np.random.default_rng([seed, 5])
    features = size(rng, 300, (8, 32, 64))
    shape = (
        size(rng, 150, (8, 32, 64)),
        size(rng, 900 if seed % 4 == 0 else 300, (16, 32, 64, 128)),
        features,
        min(features, size(rng, 140, (8, 16, 32, 64))),
        int(rng.choice([1, 1, 1, 2, 8, 16, 17, 64, 130, 1000])),
    )
    dtype = ("bfloat16", *DTYPES)[seed % 4]
    hidden = str(rng.choice([dtype, dtype, "float32", "float16", "bfloat16"]))
    options: dict[str, Any] = {"loss": "softmax", **SPARSE_LOSSES[str(rng.choice(list(SPARSE_LOSSES)))]}
    options |= {"scale": float(rng.choice([0.0, 0.3, 3.0])), "pad": int(rng.choice([0, 0, 8, 1, 3]))}
    options |= {"index_dtype": str(rng.choice(["uint16", "int32"])), "bias": rng.random() < 0.8}
    return make(shape, seed=seed, dtype=dtype, hidden_dtype=hidden, device="cuda", **options), rng


def check_queries(case: SparseCase, rng: np.random.Generator) -> None:
    ref, (batch, classes) = case.reference(), (len(case.hidden), len(case.weight))
    logits = strided(np.full((batch, classes), 7, case.real), int(rng.integers(0, 4)))
    call(_core.sparse_logits, "cuda", **case.layer(), logits=logits)
    within(logits, ref.z, ref.z_error, "logits")
    wanted = rng.integers(0, classes, (batch, 3))
    scores = np.full((batch, 3), 7, case.real)
    call(_core.sparse_scores, "cuda", **case.layer(), classes=wanted, scores=scores)
    rows = np.arange(batch)[:, None]
    within(scores, ref.z[rows, wanted], ref.z_error[rows, wanted], "scores")
    k = int(rng.integers(1, 40))
    best, names = np.full((batch, k), 7, case.real), np.full((batch, k), 7, np.int64)
    indptr, excluded = np.arange(batch + 1), wanted[:, 0].copy()
    call(
        _core.sparse_topk, "cuda", **case.layer(), k=k, scores=best, classes=names,
        exclude_indptr=indptr, exclude_indices=excluded,
    )  # fmt: skip
    left = np.array(logits)
    left[np.arange(batch), excluded] = -np.inf
    order = np.argsort(-left, axis=1, kind="stable")[:, : min(k, classes - 1)]
    n = order.shape[1]
    assert np.array_equal(names[:, :n], order) and np.array_equal(best[:, :n], np.take_along_axis(left, order, 1))
    assert (names[:, n:] == -1).all() and np.isneginf(best[:, n:]).all()


def check_step(case: SparseCase, rng: np.random.Generator) -> None:
    """The fused step is update_rows of the plain gradient, random bits included."""
    rows, state = np.arange(len(case.weight)), {}
    optimizer = str(rng.choice(["sgd", "momentum", "adam", "adagrad"]))
    for name in {"momentum": ("first",), "adam": ("first", "second"), "adagrad": ("second",)}.get(optimizer, ()):
        state[name] = np.full((len(rows), 1 if optimizer == "adagrad" else case.weight.shape[1]), 0.02, case.real)
        if case.bias is not None:
            state[f"bias_{name}"] = np.full(len(rows), 0.02, case.real)
    numbers = {"lr": 0.05, "eps": 1e-6, "weight_decay": 0.01, "step": 2, "seed": int(rng.integers(1 << 62))}
    numbers |= {"momentum": 0.9 * (optimizer == "momentum"), "rounding": str(rng.choice(["nearest", "stochastic"]))}
    numbers["optimizer"] = "sgd" if optimizer == "momentum" else optimizer
    other, scale = {name: value.copy() for name, value in state.items()}, weights_of_examples(case)
    plain, fused = case.backward(scale), case.fused(scale, {**numbers, **state})
    weight, bias = np.array(case.weight), None if case.bias is None else case.bias.copy()
    grads = {"grad": plain["grad_weight"], "grad_bias": plain.get("grad_bias")}
    call(_core.update_rows, "cuda", weight=weight, rows=rows, bias=bias, **grads, update={**numbers, **other})
    assert np.array_equal(exact(fused["weight"]), exact(weight)), optimizer
    assert bias is None or np.array_equal(fused["bias"], bias)
    assert np.array_equal(fused["grad_hidden"], plain["grad_hidden"])
    assert all(np.array_equal(state[name], other[name]) for name in state)


def run(seeds: range) -> None:
    for seed in seeds:
        case, rng = draw(seed)
        try:
            more = {}
            if rng.random() < 0.4:
                more["grad_output"] = rng.normal(size=len(case.hidden)).astype(case.real)
            if rng.random() < 0.4 and case.options["loss"] == "softmax":
                more["grad_lse"] = rng.normal(size=len(case.hidden)).astype(case.real)
            check(case, **more)
            check_queries(case, rng)
            check_step(case, rng)
        except Exception as error:
            shape = (*case.hidden.shape, *case.weight.shape, case.group_size)
            raise AssertionError(f"seed {seed}, {shape}, {case.dtype}, {case.options}") from error


@pytest.mark.parametrize("first", range(0, 16, 4))
def test_random_problems(first: int) -> None:
    run(range(first, first + 4))


@pytest.mark.parametrize("bytes_of_l2", [20_000, 2_000_000])
def test_random_problems_with_another_cache(bytes_of_l2: int) -> None:
    if not _core.cuda_emulated:
        pytest.skip("the size of the cache is the card's")
    environment = {**os.environ, "WIDEHEAD_EMULATED_L2": str(bytes_of_l2), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = f"import test_cuda_sparse as t; t.run(range({bytes_of_l2 % 97}, {bytes_of_l2 % 97 + 5}))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
