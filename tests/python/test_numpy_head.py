"""tests/python/test_numpy_head.py -- DenseHead over NumPy: reductions, batch shapes, optimisers, inference, growth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from dense_cases import multi_labels
from reference import Dense, Targets, reduction_scale, within
from widehead import Labels, _core
from widehead.numpy import DenseHead, from_bfloat16, to_bfloat16

RNG = np.random.default_rng(0)


def batch(n: int, d: int, classes: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([n, d, classes])
    return rng.normal(size=(n, d)).astype(dtype), rng.integers(0, classes, n)


def reference_of(head: DenseHead, hidden: np.ndarray, target: Any) -> Dense:
    o = head.options
    targets = target if isinstance(target, Targets) else Targets.single(target, head.n_classes, o.ignore_index)
    return Dense(
        hidden, head.weight, head.bias, targets, o.core_loss, o.label_smoothing, o.lse_penalty, o.softcap or 0.0,
        head.class_weight, dtype=head.dtype,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"class_weight": RNG.uniform(0.2, 2, 50)}, {"ignore_index": 3}], ids=str
)
def test_losses_and_gradients_of_a_step(reduction: str, options: dict[str, Any]) -> None:
    head = DenseHead(12, 50, reduction=reduction, seed=4, **options)
    hidden, target = batch(40, 12, 50)
    target[[2, 9]] = head.options.ignore_index
    sample_weight = np.random.default_rng(1).uniform(0, 2, 40)
    for weights in (None, sample_weight):
        ref = reference_of(head, hidden, target)
        scale = ref.targets.active * (1.0 if weights is None else weights)
        if reduction == "mean":
            cw = None if head.class_weight is None else head.class_weight.astype(float)
            scale = reduction_scale(ref.targets, cw, weights)
        want = ref.gradients(scale)
        apart = head.forward(hidden, target, sample_weight=weights)
        before = head.weight.copy(), head.bias.copy()
        loss, grad_hidden = head.step(hidden, target, lr=0.5, sample_weight=weights)
        if reduction == "none":
            within(loss, scale * ref.losses, scale * ref.losses_error + 1e-6 * np.abs(ref.losses), "loss")
            assert np.array_equal(loss, apart.loss)
        else:
            error = (scale * ref.losses_error).sum()
            assert abs(loss - (scale * ref.losses).sum()) <= error and loss == apart.loss
            assert isinstance(loss, float)
        within(grad_hidden, want.hidden, 2 * want.hidden_error, "grad_hidden")
        within(head.weight, before[0] - 0.5 * want.weight, want.weight_error + 1e-6 * np.abs(before[0]), "weight")
        within(head.bias, before[1] - 0.5 * want.bias, want.bias_error + 1e-6 * np.abs(before[1]), "bias")


@pytest.mark.parametrize("loss", ["softmax", "bce", "squared_hinge"])
def test_multi_label_targets_in_every_form(loss: str) -> None:
    """Sum over the classes, mean over the batch; Labels, CSR arrays and matrices of any index type are the same."""
    hidden, _ = batch(33, 8, 60)
    rows = multi_labels(np.random.default_rng(0), 33, 60, weighted=True)
    labels = Labels(rows["indptr"], rows["indices"], rows["values"], 60)
    csr = sp.csr_array((rows["values"], rows["indices"].astype(np.int32), rows["indptr"].astype(np.int32)), (33, 60))
    targets = Targets.multi(rows["indptr"], rows["indices"], rows["values"], 60)
    results = []
    for target in (labels, csr, sp.csr_matrix(csr)):
        head = DenseHead(8, 60, loss=loss, seed=2)
        ref = reference_of(head, hidden, targets)
        want = ref.gradients(np.full(33, 1 / 33))
        value, grad_hidden = head.step(hidden, target, 0.1)
        assert abs(value - ref.losses.mean()) <= ref.losses_error.mean()
        within(grad_hidden, want.hidden, 2 * want.hidden_error, "grad_hidden")
        output = head.forward(hidden, target).output
        results.append((value, grad_hidden, head.weight, output))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
    lists = Labels.from_lists([row.indices for row in csr], 60, [row.data for row in csr])
    assert np.array_equal(lists.indices, labels.indices) and np.array_equal(lists.values, labels.values)


def test_bool_csr_has_weight_one() -> None:
    dense = np.random.default_rng(0).random((6, 9)) < 0.3
    labels = Labels.from_csr(sp.csr_array(dense))
    assert labels.values is None and len(labels) == 6
    assert np.array_equal(Targets.multi(labels.indptr, labels.indices, None, 9).is_target, dense)


def test_batch_shapes() -> None:
    """Any shape before the last axis, 0-D and 1-D included, gives what the flat batch gives."""
    hidden, target = batch(24, 8, 30)
    flat_head = DenseHead(8, 30, seed=1)
    flat = flat_head.step(hidden, target, 0.1)
    for shape in [(24,), (4, 6), (2, 3, 4), (24, 1)]:
        head = DenseHead(8, 30, seed=1)
        loss, grad = head.step(hidden.reshape(*shape, 8), target.reshape(shape), 0.1)
        assert loss == flat.loss and np.array_equal(grad, flat.grad_hidden.reshape(*shape, 8))
        assert np.array_equal(head.weight, flat_head.weight)
        nd = hidden.reshape(*shape, 8)
        assert head.predict(nd).shape == shape and head.topk(nd, 3).classes.shape == (*shape, 3)
        assert head.log_prob(nd).shape == (*shape, 30) and head.lse(nd).shape == shape
        assert head.scores(nd, np.zeros((*shape, 2), int)).shape == (*shape, 2) == head.scores(nd, [1, 2]).shape
        assert head.forward(nd, target.reshape(shape)).output.shape == shape
    one = DenseHead(8, 30, seed=1)
    loss, grad = one.step(hidden[0], int(target[0]), 0.1)
    assert grad.shape == (8,) and np.ndim(one.predict(hidden[0])) == 0
    assert np.isclose(loss, -DenseHead(8, 30, seed=1).log_prob(hidden[0])[target[0]])
    none = DenseHead(8, 30, seed=1, reduction="none").step(hidden.reshape(4, 6, 8), target.reshape(4, 6), 0.1)
    assert none.loss.shape == (4, 6)


def test_strided_and_half_precision_hidden() -> None:
    hidden, target = batch(24, 8, 30)
    want = DenseHead(8, 30).step(hidden, target, 0.1)
    wide = np.full((48, 20), np.nan, np.float32)
    wide[::2, :8] = hidden
    got = DenseHead(8, 30).step(wide[::2, :8], target, 0.1)
    assert got.loss == want.loss and np.array_equal(got.grad_hidden, want.grad_hidden)
    half = hidden.astype(np.float16)
    got = DenseHead(8, 30).step(half, target, 0.1)
    want = DenseHead(8, 30).step(half.astype(np.float32), target, 0.1)
    assert got.grad_hidden.dtype == np.float16 and got.loss == want.loss
    assert np.array_equal(got.grad_hidden, want.grad_hidden.astype(np.float16))
    got = DenseHead(8, 30).step(to_bfloat16(hidden), target, 0.1)
    want = DenseHead(8, 30).step(from_bfloat16(to_bfloat16(hidden)), target, 0.1)
    assert got.grad_hidden.dtype == np.uint16 and got.loss == want.loss
    assert np.array_equal(got.grad_hidden, to_bfloat16(want.grad_hidden))


def test_ml_dtypes_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    hidden, target = batch(5, 8, 30)
    got = DenseHead(8, 30).step(hidden.astype(ml_dtypes.bfloat16), target, 0.1).grad_hidden
    want = DenseHead(8, 30).step(to_bfloat16(hidden), target, 0.1).grad_hidden
    assert got.dtype == ml_dtypes.bfloat16 and np.array_equal(got.view(np.uint16), want)


@pytest.mark.parametrize("loss", ["softmax", "bce", "squared_hinge"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_targets_ignored(loss: str, reduction: str) -> None:
    head = DenseHead(8, 30, loss=loss, reduction=reduction)
    hidden, target = batch(6, 8, 30)
    before = head.weight.copy(), head.bias.copy()
    value, grad = head.step(hidden, np.full(6, -100), 0.1)
    assert value == 0.0 and not grad.any()
    assert np.array_equal(head.weight, before[0]) and np.array_equal(head.bias, before[1])
    value, grad = head.step(hidden, target, 0.1, sample_weight=np.zeros(6))
    assert value == 0.0 and not grad.any() and np.array_equal(head.weight, before[0])


def test_empty_batch() -> None:
    head = DenseHead(8, 30)
    nothing, before = np.zeros((0, 8), np.float32), head.weight.copy()
    loss, grad = head.step(nothing, np.zeros(0, np.int64), 0.1)
    assert loss == 0.0 and grad.shape == (0, 8) and np.array_equal(head.weight, before) and head.steps == 0
    assert head.step(nothing, [], 0.1).loss == 0.0
    assert head.topk(nothing, 3).classes.shape == (0, 3) and head.predict(nothing).shape == (0,)
    assert head.scores(nothing).shape == (0, 30) and head.lse(nothing).shape == (0,)
    assert head.scores(np.zeros((2, 8), np.float32), np.zeros((2, 0), int)).shape == (2, 0)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_training_follows_torch(name: str) -> None:
    """Float64 heads end within rounding of torch.nn.functional.cross_entropy and torch.optim after ten steps."""
    torch = pytest.importorskip("torch")
    head = DenseHead(9, 40, dtype="float64", label_smoothing=0.1, seed=3)
    weight, bias = (torch.tensor(x.copy(), requires_grad=True) for x in (head.weight, head.bias))
    if name == "adam":
        optimizer = torch.optim.AdamW([weight, bias], lr=0.1, weight_decay=0.05)
    else:
        momentum = 0.9 if name == "momentum" else 0.0
        optimizer = torch.optim.SGD([weight, bias], lr=0.1, momentum=momentum, weight_decay=0.05)
    for step in range(10):
        rng = np.random.default_rng(step)
        hidden, target = rng.normal(size=(16, 9)), rng.integers(0, 40, 16)
        h = torch.tensor(hidden, requires_grad=True)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(h, weight, bias), torch.tensor(target), label_smoothing=0.1
        )
        loss.backward()
        optimizer.step()
        got = head.step(hidden, target, 0.1, name, weight_decay=0.05)
        assert abs(got.loss - loss.item()) < 1e-10
        assert np.abs(got.grad_hidden - h.grad.numpy()).max() < 1e-10
    assert np.abs(head.weight - weight.detach().numpy()).max() < 1e-9
    assert np.abs(head.bias - bias.detach().numpy()).max() < 1e-9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adagrad"])
@pytest.mark.parametrize("options", [{}, {"loss": "sampled_softmax", "negatives": 20}, {"loss": "bce"}], ids=str)
def test_training_learns_the_same_bits_twice(dtype: str, optimizer: str, options: dict[str, Any]) -> None:
    """Two hundred classes, one direction each: learnt in a few steps, and bit for bit again with four threads."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 32)).astype(np.float32)
    lr = {"sgd": 1.0, "momentum": 0.2, "adam": 0.02, "adagrad": 0.3}[optimizer] * (10 if "loss" in options else 3)
    lr = lr / 10 if optimizer == "adam" else lr
    ends = []
    for threads in (1, 4):
        _core.set_num_threads(threads)
        head, draw = DenseHead(32, 200, dtype=dtype, seed=1, **options), np.random.default_rng(1)
        for _ in range(120):
            target = draw.integers(0, 200, 64)
            head.step(centres[target] + draw.normal(size=(64, 32)).astype(np.float32) * 0.1, target, lr, optimizer)
        ends.append(head)
    assert (ends[0].predict(centres) == np.arange(200)).mean() > 0.9
    assert np.array_equal(ends[0].weight, ends[1].weight) and np.array_equal(ends[0].bias, ends[1].bias)


def test_inference_is_consistent() -> None:
    head = DenseHead(16, 300, softcap=4.0, seed=5)
    head.bias = np.random.default_rng(0).normal(size=300)
    hidden, target = batch(20, 16, 300)
    z = head.scores(hidden)
    ref = reference_of(head, hidden, target)
    within(z, ref.z, ref.z_error, "scores")
    classes = np.random.default_rng(1).integers(0, 300, (20, 7))
    assert np.allclose(head.scores(hidden, classes), np.take_along_axis(z, classes, 1), rtol=1e-5, atol=1e-6)
    assert np.allclose(head.log_prob(hidden), ref.z - ref.lse[:, None], atol=1e-5)
    assert np.allclose(np.exp(head.log_prob(hidden)).sum(1), 1, atol=1e-5)
    best = head.topk(hidden, 300)
    assert np.array_equal(best.classes[:, 0], head.predict(hidden))
    assert np.array_equal(np.sort(best.classes, 1), np.broadcast_to(np.arange(300), (20, 300)))
    assert np.array_equal(best.scores, np.sort(z, 1)[:, ::-1])
    result = head.forward(hidden, target, return_lse=True)
    within(result.lse, ref.lse, ref.lse_error, "lse")
    assert np.array_equal(result.lse, head.lse(hidden)) and head.forward(hidden, target).lse is None
    assert np.allclose(result.output, head.log_prob(hidden)[np.arange(20), target], atol=1e-5)
    bce = DenseHead(16, 300, loss="bce", seed=5)
    assert np.allclose(bce.log_prob(hidden), -np.log1p(np.exp(-bce.scores(hidden).astype(float))), atol=1e-5)


def test_topk_without_items_already_seen() -> None:
    head = DenseHead(8, 30, seed=1)
    hidden, _ = batch(5, 8, 30)
    seen = [[], [3], [0, 1, 2], list(range(29)), list(range(30))]
    best = head.topk(hidden, 4, exclude=seen)
    for b, row in enumerate(seen):
        kept = best.classes[b][best.classes[b] >= 0]
        assert not set(row) & set(kept.tolist()) and len(kept) == min(4, 30 - len(row))
        assert (best.scores[b, len(kept) :] == -np.inf).all()
    matrix = sp.csr_array(Targets.multi(*_csr(seen), None, 30).is_target)
    for form in (Labels.from_lists(seen, 30), matrix):
        again = head.topk(hidden, 4, exclude=form)
        assert np.array_equal(again.classes, best.classes) and np.array_equal(again.scores, best.scores)


def _csr(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.cumsum([0] + [len(r) for r in rows]), np.array([c for r in rows for c in r], np.int64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_growth(dtype: str) -> None:
    """A grown head has the weights of one made with so many classes, keeps what it learnt, and goes on learning."""
    head, large = DenseHead(8, 30, dtype=dtype, seed=6), DenseHead(8, 45, dtype=dtype, seed=6)
    assert np.array_equal(large.weight[:30], head.weight)
    hidden, target = batch(12, 8, 30)
    head.step(hidden, target, 0.1, "adam", rounding="kahan" if dtype == "bfloat16" else None)
    learnt, scores = head.weight.copy(), head.scores(hidden)
    head.grow(45)
    assert np.array_equal(head.weight[:30], learnt) and np.array_equal(head.weight[30:], large.weight[30:])
    assert np.array_equal(head.scores(hidden)[:, :30], scores) and not head.bias[30:].any()
    head.step(hidden, target + 15, 0.1, "adam", rounding="kahan" if dtype == "bfloat16" else None)
    with pytest.raises(_core.ShapeError, match="n_classes"):
        head.grow(44)
    weighted = DenseHead(8, 3, class_weight=[1, 2, 3])
    with pytest.raises(_core.ShapeError, match="class_weight"):
        weighted.grow(4)
    weighted.grow(4, class_weight=[1, 2, 3, 4])
    assert weighted.class_weight.tolist() == [1, 2, 3, 4]


def test_parameters_in_and_out() -> None:
    head = DenseHead(5, 7, dtype="bfloat16")
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    head.weight = x
    assert np.array_equal(head.weight, to_bfloat16(x)) and head.weight.dtype == np.uint16
    other = DenseHead(5, 7, dtype="bfloat16", seed=9)
    other.load_state_dict(head.state_dict())
    assert np.array_equal(other.weight, head.weight) and other.weight is not head.weight
    assert DenseHead(5, 7, bias=False).bias is None and "bias" not in DenseHead(5, 7, bias=False).state_dict()
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = ~np.isnan(from_bfloat16(bits))
    assert np.array_equal(to_bfloat16(from_bfloat16(bits))[numbers], bits[numbers])
    assert np.isnan(from_bfloat16(to_bfloat16(np.float32([np.nan, -np.nan])))).all()


def test_optimizer_state_belongs_to_one_optimizer() -> None:
    head = DenseHead(8, 30)
    hidden, target = batch(6, 8, 30)
    head.step(hidden, target, 0.1, "sgd")
    head.step(hidden, target, 0.1, "adam")
    with pytest.raises(_core.Error, match="reset_optimizer"):
        head.step(hidden, target, 0.1, "momentum")
    head.reset_optimizer()
    head.step(hidden, target, 0.1, "momentum")
