"""tests/python/test_class_range.py -- layers that hold a range of the classes: merged they are the whole head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import test_sparse
from dense_cases import LOSSES, Case, exact, make, weights_of_examples
from devices import call
from reference import UNIT, within
from test_sparse import SPARSE_LOSSES
from widehead import _core

SHAPES = [(3, 7, 5), (17, 97, 31), (33, 1000, 64)]
DTYPES = ("float32", "bfloat16", "float64")


def ranges(classes: int, parts: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Ends of `parts` uneven ranges, multiples of `step`."""
    inner = sorted({classes * (3 * i + 1) // (3 * parts) // step * step for i in range(1, parts)})
    cuts = [0, *(c for c in inner if 0 < c < classes), classes]
    return pairwise(cuts)


def parts_of(case: Any, parts: int) -> list[tuple[int, int, Any]]:
    """The case cut by classes: each part has its rows, and the targets and class weights of all."""
    cut = []
    group = getattr(case, "group_size", 1)
    for first, end in ranges(len(case.weight), parts, group):
        bias = None if case.bias is None else case.bias[first:end].copy()
        target = {**case.target, "n_classes": len(case.weight), "first_class": first}
        layer = {"weight": case.weight[first:end], "bias": bias, "target": target}
        if isinstance(case, Case):
            layer["offset"] = None if case.offset is None else case.offset[first:end].copy()
        else:
            layer["index"] = case.index[first // group : -(-end // group)]
        cut.append((first, end, replace(case, **layer)))
    return cut


def core(case: Any, operation: str, device: str, **more: Any) -> None:
    prefix = "dense" if isinstance(case, Case) else "sparse"
    call(getattr(_core, f"{prefix}_{operation}"), device, **{**case.arguments(), **more})


def forward(case: Any, device: str) -> dict[str, np.ndarray]:
    out = {name: np.full(len(case.hidden), 7.0, case.real) for name in ("losses", "output", "lse")}
    core(case, "forward", device, **out)
    return out


def merged(case: Any, cut: list[Any], device: str) -> dict[str, np.ndarray]:
    """Losses, output and lse of the whole from the ranges'."""
    shares = [forward(part, device) for *_, part in cut]
    total = {name: sum(share[name] for share in shares) for name in ("losses", "output")}
    total["lse"] = np.logaddexp.reduce([share["lse"] for share in shares])
    if case.options["loss"] == "softmax":
        names = ("label_smoothing", "lse_penalty", "class_weight", "ignore_index")
        options = {name: case.options[name] for name in names if name in case.options}
        call(_core.join_softmax, device, **case.target, n_classes=len(case.weight), **options, **total)
    return total


def check(case: Any, parts: int, device: str) -> None:
    ref, cut, scale = case.reference(), parts_of(case, parts), weights_of_examples(case)
    softmax = case.options["loss"] == "softmax"
    for first, end, part in cut:
        got = forward(part, device)
        for name, (want, bound) in ref.share(first, end).items():
            if name != "lse" or (softmax and np.isfinite(want).all()):
                within(got[name], want, bound, f"{name} of [{first}, {end})")
    got = merged(case, cut, device)
    within(got["losses"], ref.losses, 3 * ref.losses_error, "losses")
    within(got["output"], ref.output, 3 * ref.output_error, "output")
    rng = np.random.default_rng(5)
    more = {"grad_output": rng.normal(size=len(scale)).astype(case.real)}
    if softmax:
        within(got["lse"], ref.lse, 2 * ref.lse_error, "lse")
        more["grad_lse"] = rng.normal(size=len(scale)).astype(case.real)
    want = ref.gradients(scale, more["grad_output"], more.get("grad_lse"))
    hidden = 0.0
    for first, end, part in cut:
        out = {
            "grad_hidden": np.full(case.hidden.shape, 7, case.real),
            "grad_weight": np.full(part.weight.shape, 7, case.real),
            "grad_bias": None if part.bias is None else np.full(end - first, 7, case.real),
        }
        lse = got["lse"] if softmax else None
        core(part, "backward", device, lse=lse, grad_losses=scale.astype(case.real), **more, **out)
        hidden = hidden + out["grad_hidden"]
        rows, bound = want.weight[first:end], want.weight_error[first:end]
        if not isinstance(case, Case):
            rows, bound = (np.take_along_axis(x, part.inputs(), 1) for x in (rows, bound))
        within(out["grad_weight"], rows, 2 * bound, "grad_weight")
        if part.bias is not None:
            within(out["grad_bias"], want.bias[first:end], 2 * want.bias_error[first:end], "grad_bias")
    within(hidden, want.hidden, 2 * want.hidden_error, "grad_hidden")


@pytest.mark.parametrize("name", LOSSES)
def test_merged_ranges_are_the_whole_dense_head(device: str, name: str) -> None:
    for i, shape in enumerate(SHAPES):
        for parts in (1, 2, 3):
            case = make(shape, seed=i, dtype=DTYPES[(i + parts) % 3], bias=i % 2 == 0, scale=2.0, **LOSSES[name])
            check(case, parts, device)


@pytest.mark.parametrize("name", SPARSE_LOSSES)
def test_merged_ranges_are_the_whole_sparse_head(device: str, name: str) -> None:
    for i, shape in enumerate([(3, 7, 9, 4, 1), (17, 130, 40, 7, 1), (31, 200, 300, 31, 16)]):
        for parts in (1, 2, 3):
            options = {"loss": "softmax", **SPARSE_LOSSES[name]}
            case = test_sparse.make(shape, seed=i, dtype=DTYPES[(i + parts) % 3], scale=2.0, device=device, **options)
            check(case, parts, device)


@pytest.mark.parametrize("loss", ["softmax", "bce", "squared_hinge"])
def test_one_range_of_all_classes_has_the_bits_of_the_whole(device: str, loss: str) -> None:
    """Gradients; the losses of a range of softmax are put together in another order."""
    case = make((17, 97, 32), loss=loss, device=device)
    [(_, _, part)] = parts_of(case, 1)
    whole, scale = case.forward(), weights_of_examples(case)
    kept = whole["lse"] if loss == "softmax" else None
    for name, want in case.backward(scale).items():
        out = {n: np.full_like(x, 7) for n, x in case.backward(scale).items()}
        core(part, "backward", device, lse=kept, grad_losses=scale.astype(case.real), **out)
        assert np.array_equal(out[name], want), name
    if loss != "softmax":
        got = forward(part, device)
        assert all(np.array_equal(got[n], whole[n]) for n in ("losses", "output"))


def test_fused_steps_of_ranges_are_the_whole_heads(device: str) -> None:
    """Rows move as in the whole head, with its random numbers, when first_row says where the range begins."""
    for loss in ("softmax", "squared_hinge"):
        case = make((16, 60, 24), dtype="bfloat16", loss=loss, device=device)
        scale = weights_of_examples(case)
        update = {"optimizer": "sgd", "rounding": "stochastic", "lr": 0.05, "step": 2, "seed": 3}
        whole = case.fused(scale, dict(update))
        lse = case.forward(("lse",))["lse"] if loss == "softmax" else None
        for first, end, part in parts_of(case, 3):
            weight, bias = np.array(part.weight), part.bias.copy()
            core(
                part, "backward", device, weight=weight, bias=bias, lse=lse, grad_losses=scale.astype(case.real),
                update={**update, "first_row": first},
            )  # fmt: skip
            # The sum over examples is the same, tile by tile; only a tie of the rounding could tell them apart.
            assert np.mean(weight != whole["weight"][first:end]) < 0.01
            step = np.abs(exact(whole["weight"]) - exact(case.weight)).max() + UNIT["bfloat16"]
            assert np.abs(exact(weight) - exact(whole["weight"][first:end])).max() <= step
            within(bias, whole["bias"][first:end].astype(float), np.full(end - first, 1e-5), "bias")


def test_an_example_without_a_target_in_the_range_still_counts(device: str) -> None:
    """All its classes are negatives there; one that is ignored has none."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    losses = np.full(3, 7, np.float32)
    call(
        _core.dense_forward, device, hidden=hidden, weight=weight, bias=None, indptr=None,
        indices=np.array([2, 11, -100]), values=None, n_classes=12, first_class=0, loss="squared_hinge",
        losses=losses, output=None, lse=None,
    )  # fmt: skip
    z = hidden.astype(float) @ weight.T.astype(float)
    negatives = np.maximum(0, 1 + z) ** 2
    assert losses[1] == pytest.approx(negatives[1].sum(), rel=1e-5) and losses[2] == 0
    assert losses[0] == pytest.approx(np.delete(negatives[0], 2).sum() + max(0, 1 - z[0, 2]) ** 2, rel=1e-5)


def test_bad_ranges_are_refused(device: str) -> None:
    case = make((4, 10, 6), loss="bce", device=device)
    for first in (-1, 3, 11):
        with pytest.raises(_core.ShapeError, match=f"first_class: expected 0 to 2 for 10 of 12 classes, got {first}"):
            core(case, "forward", device, n_classes=12, first_class=first, losses=None, output=None, lse=None)
    with pytest.raises(_core.ShapeError, match="target: is over 12 classes, the weights over 10"):
        core(case, "forward", device, n_classes=12, losses=None, output=None, lse=None)
    with pytest.raises(_core.ShapeError, match=r"class_weight: expected .*\[n_classes\]"):
        some = np.ones(10, np.float32)
        core(
            case, "forward", device, n_classes=12, first_class=0, class_weight=some, losses=None, output=None, lse=None
        )
    target = {"indptr": None, "indices": np.array([0, 11, 3, 12]), "values": None}
    with pytest.raises(_core.LabelError, match="12"):
        core(
            case, "forward", device, **target, n_classes=12, first_class=2,
            losses=np.zeros(4, np.float32), output=None, lse=None,
        )  # fmt: skip
    with pytest.raises(_core.DtypeError, match="losses: expected the data type of lse"):
        lse, losses = np.zeros(4, np.float32), np.zeros(4)
        call(_core.join_softmax, device, **case.target, n_classes=10, lse=lse, losses=losses)
