"""tests/python/test_regressions.py -- defects of the dense head that were found, so that they stay fixed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from widehead import Labels, _core
from widehead.numpy import DenseHead
from widehead.sampling import IGNORED, Proposal, sample_classes

N = 300


def batch(n: int, features: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, features)).astype(np.float32)


def plain_backward(weight: np.ndarray, hidden: np.ndarray, target: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """lse and gradients of the summed softmax loss, by the core."""
    rows, classes = len(hidden), len(weight)
    common = {"hidden": hidden, "weight": weight, "loss": "softmax", "indptr": None, "indices": target, "values": None}
    got = {"lse": np.empty(rows, np.float32), "grad_hidden": np.empty_like(hidden)}
    got |= {"grad_weight": np.empty_like(weight), "grad_bias": np.empty(classes, np.float32)}
    bias = np.zeros(classes, np.float32)
    _core.dense_forward(**common, bias=bias, losses=None, output=None, lse=got["lse"])
    _core.dense_backward(**common, bias=bias, grad_losses=np.ones(rows, np.float32), **got, **options)
    return got


@pytest.mark.parametrize("ignore_index", [0, 3, 7])
def test_sampled_softmax_with_a_class_as_ignore_index(ignore_index: int) -> None:
    """The class at position `ignore_index` of the sampled rows was taken for one to ignore."""
    proposal = Proposal("uniform", N)
    target = np.arange(20, 40)
    target[2] = ignore_index
    sampled = sample_classes(proposal, 5, target, seed=1, step=0, ignore_index=ignore_index)
    assert sampled.indices[2] == IGNORED
    kept = np.arange(20) != 2
    assert np.array_equal(sampled.rows[sampled.indices[kept]], target[kept])
    options: dict[str, Any] = {"loss": "sampled_softmax", "negatives": 5, "reduction": "none", "seed": 1}
    hidden, want = batch(20), target.copy()
    want[2] = -100
    one, other = DenseHead(8, N, ignore_index=ignore_index, **options), DenseHead(8, N, ignore_index=-100, **options)
    got, expected = one.step(hidden, target, 0.1), other.step(hidden, want, 0.1)
    assert np.array_equal(got.loss, expected.loss) and (np.asarray(got.loss)[kept] > 0).all()
    assert np.array_equal(got.grad_hidden, expected.grad_hidden) and np.array_equal(one.weight, other.weight)


@pytest.mark.parametrize("refused", ["adam", "adagrad", "momentum"])
def test_a_refused_step_leaves_no_optimizer_behind(refused: str) -> None:
    """The moments that a refused step had made were handed to the next step, which was refused too."""
    head = DenseHead(8, N)
    bad = batch(4)
    bad[1, 1] = np.nan
    with pytest.raises(_core.NonFiniteError):
        head.step(bad, np.arange(4), 0.1, refused)
    with pytest.raises(_core.ShapeError, match="lr"):
        head.step(batch(4), np.arange(4), np.inf, refused)
    twin = DenseHead(8, N)
    assert head.step(batch(4), np.arange(4), 0.1, "sgd").loss == twin.step(batch(4), np.arange(4), 0.1, "sgd").loss
    assert np.array_equal(head.weight, twin.weight)


def test_momentum_of_zero_is_plain_sgd() -> None:
    head, twin = DenseHead(8, N), DenseHead(8, N)
    head.step(batch(4), np.arange(4), 0.1, "momentum", momentum=0.0)
    twin.step(batch(4), np.arange(4), 0.1, "sgd")
    assert np.array_equal(head.weight, twin.weight)
    # A schedule may come down to zero as well.
    head.step(batch(4), np.arange(4), 0.1, "momentum", momentum=0.9)
    head.step(batch(4), np.arange(4), 0.1, "momentum", momentum=0.0)


def test_filter_does_not_swallow_nan(isa: str) -> None:
    """A NaN in one class is in every gradient; the filter took it for a small number and returned zeros."""
    weight = batch(N, seed=1)
    weight[3, 2] = np.nan
    got = plain_backward(weight, batch(4), np.arange(4), filter_eps=1e-3)
    assert all(np.isnan(g).all() for g in got.values())


def test_filter_still_skips_what_is_small(isa: str) -> None:
    weight = batch(N, seed=1)
    weight[:4] += 40 * batch(4)  # every example is sure of its class
    exact, got = (plain_backward(weight, batch(4), np.arange(4), filter_eps=eps) for eps in (0.0, 1e-3))
    assert (got["grad_weight"] == 0).all() and 0 < np.abs(exact["grad_bias"]).max() < 4e-3


def test_filtered_tiles_have_a_bias_gradient() -> None:
    """With a fused step of plain SGD a skipped tile left its part of grad_bias as it was."""
    weight, rows, grad_bias = batch(N, seed=1), np.zeros(4, np.float32), np.full(N, np.nan, np.float32)
    weight[:4] += 40 * batch(4)
    layer = {"hidden": batch(4), "weight": weight, "bias": np.zeros(N, np.float32), "loss": "softmax"}
    target = {"indptr": None, "indices": np.arange(4), "values": None}
    update = {"optimizer": "sgd", "lr": 0.1, "step": 1}
    _core.dense_forward(**layer, **target, losses=None, output=None, lse=rows)
    incoming = {"lse": rows, "grad_losses": np.ones(4, np.float32)}
    assert _core.dense_backward(**layer, **target, **incoming, grad_bias=grad_bias, update=update, filter_eps=1e-3) > 0
    assert (grad_bias == 0).all()


def test_label_smoothing_over_a_masked_class_is_infinite(isa: str) -> None:
    """As torch.nn.functional.cross_entropy; it was infinity minus infinity."""
    head = DenseHead(8, N, label_smoothing=0.1, reduction="none")
    assert head.bias is not None
    head.bias[5:120] = -np.inf
    assert (head.forward(batch(4), np.array([0, 1, 200, 201])).loss == np.inf).all()
    head.bias[7] = np.nan
    assert np.isnan(head.forward(batch(4), np.array([0, 1, 200, 201])).loss).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lse_of_logits_far_below_zero(isa: str, dtype: str) -> None:
    head = DenseHead(8, N, dtype=dtype)
    assert head.bias is not None
    hidden = np.zeros((3, 8), head.weight.dtype)
    for level in (-1e29, -1e31, -1e38):
        head.bias[:] = level
        assert np.allclose(head.lse(hidden), head.bias[0], rtol=1e-6, atol=0)
    head.bias[:] = -np.inf
    assert (head.lse(hidden) == -np.inf).all()


def test_topk_excludes_by_row_pointers_that_begin_later() -> None:
    """Classes left out were looked up beyond the end of their copy."""
    head = DenseHead(8, 12)
    scores, classes = np.empty((2, 12), np.float32), np.empty((2, 12), np.int64)
    indices = np.array([1, 1, 1, 7, 5, 9])
    layer = {"hidden": batch(2), "weight": head.weight, "bias": head.bias, "k": 12}

    def call(indptr: list[int]) -> list[set[int]]:
        pointers = {"exclude_indptr": np.array(indptr), "exclude_indices": indices}
        _core.dense_topk(**layer, **pointers, scores=scores, classes=classes)
        return [set(range(12)) - set(row.tolist()) for row in classes]

    assert call([3, 5, 6]) == [{5, 7}, {9}]
    with pytest.raises(_core.ShapeError, match="begin at -1"):
        call([-1, 5, 6])


def test_masked_classes_are_never_among_the_best() -> None:
    head = DenseHead(8, N)
    assert head.bias is not None
    head.bias[:] = -np.inf
    head.bias[[40, 200]] = 0
    got = head.topk(batch(3), 4)
    assert (np.sort(got.classes[:, :2]) == [40, 200]).all() and (got.classes[:, 2:] == -1).all()
    assert (got.scores[:, 2:] == -np.inf).all()


def test_unsorted_csr_rows_and_small_integer_types() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    indptr, indices = np.array([0, 2, 2, 4], np.int32), np.array([5, 2, 9, 1], np.int32)
    matrix = sparse.csr_array((np.ones(4, np.float32), indices, indptr), shape=(3, 10))
    one, other = (DenseHead(8, 10, loss="bce") for _ in range(2))
    got = one.step(batch(3), matrix, 0.1)
    want = other.step(batch(3), Labels.from_lists([[2, 5], [], [1, 9]], 10), 0.1)
    assert got.loss == want.loss and np.array_equal(one.weight, other.weight)
    assert indices.tolist() == [5, 2, 9, 1]
    losses = {DenseHead(8, 10).forward(batch(3), np.array([1, 2, 9], kind)).loss for kind in ("u1", "i4", "i8")}
    assert len(losses) == 1


NANS = (("float32", 0x7FC00000), ("float32", 0x7FC00001), ("float32", 0xFFFFFFFF), ("float64", 2**64 - 1))


@pytest.mark.parametrize(("dtype", "bits"), NANS)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"loss": "bce"}, {"loss": "squared_hinge"}])
def test_any_nan_stays_nan(isa: str, dtype: str, bits: int, options: dict[str, Any]) -> None:
    """The payload of a NaN, as in memory of all ones, became the exponent of exp and the loss a number."""
    head = DenseHead(8, 60, dtype=dtype, **options)
    assert head.bias is not None
    head.bias.view(f"u{head.bias.itemsize}")[5] = bits
    assert np.isnan(head.forward(np.ones((3, 8), dtype), np.arange(3)).loss)
