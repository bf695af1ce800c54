"""tests/python/test_sparse_block.py -- dense rows for the first classes of a SparseHead, and an order, NumPy."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dense_cases import multi_labels
from widehead import DtypeError, FileError, LabelError, Labels, NonFiniteError, ShapeError
from widehead.numpy import DenseHead, SparseHead, from_bfloat16

H, D, K, N = 20, 90, 5, 7
ORDER = np.random.default_rng(11).permutation(D)
WEIGHTS = np.linspace(0.5, 2, D)
BLOCKS: list[dict[str, Any]] = [
    {"dense_head": N},
    {"class_order": ORDER},
    {"dense_head": N, "class_order": ORDER},
    {"dense_head": D - 1, "class_order": ORDER},
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss": "bce", "group_size": 16, "prior": 0.05, "reduction": "sum"},
    {"loss": "softmax", "bias": False, "class_weight": WEIGHTS, "lse_penalty": 1e-3},
    {"loss": "squared_hinge", "group_size": 64, "class_weight": WEIGHTS, "reduction": "none"},
]
SINGLE: list[dict[str, Any]] = [
    {"loss": "softmax", "label_smoothing": 0.2, "class_weight": WEIGHTS, "lse_penalty": 1e-2},
    {"loss": "softmax", "ignore_index": 3, "label_smoothing": 0.1},
    {"loss": "bce", "ignore_index": 0, "class_weight": WEIGHTS},
]
ids = lambda o: " ".join(o) or "plain"  # noqa: E731


def batch(step: int = 0, dtype: Any = np.float32, single: int | None = None) -> tuple[np.ndarray, Any]:
    """Multi-label rows, or with `single` one class an example, here and there that number."""
    rng = np.random.default_rng(step)
    hidden = rng.normal(size=(12, H)).astype(dtype)
    if single is not None:
        return hidden, np.where(rng.random(12) < 0.3, single, rng.integers(0, D, 12))
    rows = multi_labels(rng, 12, D, weighted=True)
    return hidden, Labels(rows["indptr"], rows["indices"], rows["values"], D)


def make(**options: Any) -> SparseHead:
    return SparseHead(H, D, K, **{"seed": 4, **options})


def train(head: SparseHead, steps: range, optimizer: str = "adam", **more: Any) -> list[Any]:
    dtype = np.float64 if head.dtype == "float64" else np.float32
    return [np.sum(head.step(*batch(step, dtype), 0.01, optimizer, **more).loss) for step in steps]


def same(a: SparseHead, b: SparseHead) -> bool:
    return a.options == b.options and a.steps == b.steps and a.state_dict().keys() == b.state_dict().keys() and all(
        np.array_equal(x, y) and x.dtype == y.dtype
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )  # fmt: skip


def whole(head: SparseHead) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight [D, H] and bias [D] by class, put together without the head's own help."""
    n = head.options.dense_head
    rows = np.zeros((D, H))
    if n:
        rows[:n] = head.frequent.weight
    for i in range(D - n):
        rows[n + i, head.index[i // head.options.group_size].astype(int)] = head.weight[i]
    bias = head.bias
    if n and bias is not None:
        bias = np.concatenate([head.frequent.bias, bias])
    order = ORDER if head.order is not None else np.arange(D)
    by_class, by_class_bias = np.zeros_like(rows), None if bias is None else np.zeros(D)
    by_class[order] = rows
    if by_class_bias is not None:
        by_class_bias[order] = bias
    return by_class, by_class_bias


def dense_twin(head: SparseHead) -> DenseHead:
    dense = head.to_dense()
    weight, bias = whole(head)
    assert np.array_equal(dense.weight, weight)
    assert (dense.bias is None and bias is None) or np.array_equal(dense.bias, bias)
    return dense


def check_equal(head: SparseHead, target: Any, hidden: np.ndarray) -> None:
    """Losses, gradient to hidden, a step of SGD, and every query."""
    dense, close = dense_twin(head), {"rtol": 1e-11, "atol": 1e-12}
    if head.options.loss != "squared_hinge":
        assert np.allclose(head.log_prob(hidden), dense.log_prob(hidden), **close)
    assert np.allclose(head.scores(hidden), dense.scores(hidden), **close)
    some = np.random.default_rng(3).integers(0, D, (len(hidden), 9))
    assert np.allclose(head.scores(hidden, some), dense.scores(hidden, some), **close)
    assert np.allclose(head.lse(hidden), dense.lse(hidden), **close)
    for k in (1, 7, D + 3):
        mine, theirs = head.topk(hidden, k), dense.topk(hidden, k)
        assert np.array_equal(mine.classes, theirs.classes) and np.allclose(mine.scores, theirs.scores, **close)
    seen = [list(row[: 1 + i % 4]) for i, row in enumerate(head.topk(hidden, 4).classes)]
    assert np.array_equal(head.topk(hidden, 6, seen).classes, dense.topk(hidden, 6, seen).classes)
    assert np.array_equal(head.predict(hidden), dense.predict(hidden))
    sample = np.linspace(0, 2, len(hidden))
    for more in ({}, {"sample_weight": sample}):
        mine, theirs = head.forward(hidden, target, **more), dense.forward(hidden, target, **more)
        assert np.allclose(mine.loss, theirs.loss, **close) and np.allclose(mine.output, theirs.output, **close)
    mine, theirs = head.step(hidden, target, 0.1), dense.step(hidden, target, 0.1)
    assert np.allclose(mine.loss, theirs.loss, **close) and np.allclose(mine.grad_hidden, theirs.grad_hidden, **close)
    weight, bias = whole(head)
    held = weight != 0
    assert held.sum() == head.weight.size + (0 if head.frequent is None else head.frequent.weight.size)
    assert np.allclose(weight[held], dense.weight[held], **close)
    assert bias is None or np.allclose(bias, dense.bias, **close)


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_equals_the_dense_head(options: dict[str, Any], block: dict[str, Any]) -> None:
    head = make(dtype="float64", **options, **block)
    hidden, target = batch(dtype=np.float64)
    check_equal(head, target, hidden)


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
@pytest.mark.parametrize("options", SINGLE, ids=ids)
def test_one_class_an_example(options: dict[str, Any], block: dict[str, Any]) -> None:
    head = make(dtype="float64", **options, **block)
    hidden, target = batch(dtype=np.float64, single=options.get("ignore_index", -100))
    assert (target == options.get("ignore_index", -100)).any()
    check_equal(head, target, hidden)


@pytest.mark.parametrize("loss", ["squared_hinge", "softmax"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adagrad"])
def test_frequent_classes_are_trained_as_a_dense_heads(optimizer: str, loss: str) -> None:
    """Three steps, with state: the rows of the frequent classes move as those of a head of all classes."""
    head = make(dtype="float64", loss=loss, dense_head=N, rewire_every=None)
    dense = dense_twin(head)
    for step in range(1, 4):
        # What the other classes add to the gradient of hidden is not compared: their zeros move in the dense head.
        dense.weight[N:], dense.bias[N:] = whole(head)[0][N:], head.bias
        hidden, target = batch(step, np.float64)
        head.step(hidden, target, 0.05, optimizer, weight_decay=0.01)
        dense.step(hidden, target, 0.05, optimizer, weight_decay=0.01)
        assert np.allclose(head.frequent.weight, dense.weight[:N], rtol=1e-10, atol=1e-12)
        assert np.allclose(head.frequent.bias, dense.bias[:N], rtol=1e-10, atol=1e-12)
    assert head.steps == head.frequent.steps == head._optimizer.step == head.frequent._optimizer.step == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_of_training(dtype: str) -> None:
    """As a float64 head of the same weights, as near as the type is; hidden of 16 bits gets its own type back."""
    head = make(dtype=dtype, loss="softmax", dense_head=N, class_order=ORDER)
    exact = make(dtype="float64", loss="softmax", dense_head=N, class_order=ORDER)
    plain = (lambda x: from_bfloat16(x).astype(float)) if dtype == "bfloat16" else (lambda x: x.astype(float))
    state = {name: x if x.dtype.kind in "iu" and name in ("index", "order") else plain(x) if name.endswith("weight")
             else x.astype(float) for name, x in head.state_dict().items()}  # fmt: skip
    exact.load_state_dict(state)
    hidden, target = batch(1)
    hidden = hidden.astype(np.float16)
    got, want = head.step(hidden, target, 0.1), exact.step(hidden.astype(np.float64), target, 0.1)
    assert got.grad_hidden.dtype == np.float16
    bound = 2e-5 if dtype == "float32" else 2e-2
    assert got.loss == pytest.approx(want.loss, rel=bound)
    assert np.allclose(got.grad_hidden, want.grad_hidden, rtol=bound + 1e-3, atol=bound)
    unit = bound if dtype == "float32" else 2.0**-7
    assert np.allclose(plain(head.frequent.weight), exact.frequent.weight, atol=unit)
    assert np.allclose(plain(head.weight), exact.weight, atol=unit)
    assert not np.array_equal(plain(head.frequent.weight), state["frequent.weight"])


def test_rewiring_is_of_the_sparse_part() -> None:
    head = make(dense_head=N, rewire_every=2, rewire_fraction=0.3)
    before = head.index.copy(), head.frequent.weight.copy()
    train(head, range(2))
    assert not np.array_equal(head.index, before[0]) and not np.array_equal(head.frequent.weight, before[1])
    index, kept = head.index.copy(), head.frequent.weight.copy()
    assert head.rewire(0.25) == round(0.25 * (D - N) * K)
    assert not np.array_equal(head.index, index) and np.array_equal(head.frequent.weight, kept)


@pytest.mark.parametrize("block", [{"dense_head": N}, {"dense_head": N, "class_order": ORDER}], ids=ids)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_file_resumes_bit_for_bit(tmp_path: Path, dtype: str, block: dict[str, Any]) -> None:
    rounding = "kahan" if dtype == "bfloat16" else None
    make_one = {"dtype": dtype, "loss": "bce", "class_weight": WEIGHTS, "rewire_every": 3, **block}
    straight = make(**make_one)
    train(straight, range(6), rounding=rounding)
    head = make(**make_one)
    train(head, range(3), rounding=rounding)
    head.save(tmp_path / "head.safetensors", optimizer=True)
    again = SparseHead.load(tmp_path / "head.safetensors")
    assert same(head, again) and np.array_equal(again.class_weight, head.class_weight)
    train(again, range(3, 6), rounding=rounding)
    assert same(again, straight)
    straight.save(tmp_path / "bare.safetensors")
    bare = SparseHead.load(tmp_path / "bare.safetensors")
    assert same(bare, straight) and bare.frequent._optimizer.arrays == {}


def test_copies_and_state() -> None:
    head = make(dense_head=N, class_order=ORDER, loss="softmax")
    train(head, range(2))
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert same(head, other)
        train(other, range(2, 4))
        assert not same(head, other)
    names = {"weight", "bias", "index", "order", "frequent.weight", "frequent.bias"}
    assert set(head.state_dict()) == names and np.array_equal(head.state_dict()["order"], ORDER)
    fresh = make(dense_head=N, class_order=np.arange(D), loss="softmax", seed=9)
    fresh.load_state_dict(head.state_dict())
    hidden = batch(7)[0]
    assert np.array_equal(fresh.topk(hidden, 5).classes, head.topk(hidden, 5).classes)
    with pytest.raises(ShapeError, match=r"order: expected a permutation of 0 .. 89, got 0 90 times"):
        fresh.load_state_dict({**head.state_dict(), "order": np.zeros(D, np.int64)})
    with pytest.raises(ShapeError, match="state: expected the names"):
        make(dense_head=N).load_state_dict(head.state_dict())


def test_growth() -> None:
    """New classes are sparse ones with the numbers that follow; what was there stays."""
    head = make(dense_head=N, class_order=ORDER, group_size=4, loss="bce", class_weight=WEIGHTS)
    train(head, range(2))
    hidden = batch(5)[0]
    before, frequent = head.scores(hidden), head.frequent.weight.copy()
    head.grow(D + 9, class_weight=np.ones(D + 9))
    assert np.array_equal(head.scores(hidden)[:, :D], before) and np.array_equal(head.frequent.weight, frequent)
    assert head.weight.shape == (D + 9 - N, K) and head.index.shape == (-(-(D + 9 - N) // 4), K)
    assert np.array_equal(head.order, [*ORDER, *range(D, D + 9)])
    new = SparseHead(H, D + 9, K, dense_head=N, group_size=4, loss="bce", seed=4)
    assert np.array_equal(head.weight[D - N :], new.weight[D - N :]) and np.array_equal(
        head.bias[D - N :], new.bias[D - N :]
    )
    rng = np.random.default_rng(0)
    assert np.isfinite(head.step(hidden, rng.integers(0, D + 9, 12), 0.01, "adam").loss)


def test_first_values() -> None:
    """Biases as the loss wants them; the bias of every class by its own number."""
    head = make(dense_head=N, class_order=ORDER, loss="bce", prior=0.25)
    assert np.allclose(head.bias, -np.log(3)) and np.allclose(head.frequent.bias, -np.log(3))
    values = np.linspace(-1, 1, D).astype(np.float32)
    head.set_bias(values)
    assert np.array_equal(dense_twin(head).bias, values)
    twin = DenseHead(H, N, seed=4)
    assert np.array_equal(head.frequent.weight, twin.weight)
    # Rows draw by their place in the whole head: no sparse row repeats a dense one.
    plain = SparseHead(H, D, K, seed=4)
    assert np.array_equal(head.weight, plain.weight[N:]) and make().frequent is None and make().order is None
    with pytest.raises(ShapeError, match=r"bias: expected shape \[n_classes\] = \[90\], got shape \[83\]"):
        head.set_bias(np.zeros(D - N))


def test_plain_heads_call_the_core_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither block nor order: nothing of theirs runs; the order 0, 1, 2, ... gives the same bits."""
    from widehead import _block

    plain, ordered = make(loss="softmax", class_weight=WEIGHTS), make(
        loss="softmax", class_weight=WEIGHTS, class_order=np.arange(D)
    )  # fmt: skip
    train(plain, range(2)), train(ordered, range(2))
    assert np.array_equal(plain.weight, ordered.weight) and np.array_equal(plain.bias, ordered.bias)
    monkeypatch.setattr(_block, "run", None)
    train(plain, range(2))
    with pytest.raises(TypeError):
        train(ordered, range(2))


def test_a_refused_step_changes_nothing() -> None:
    for loss in ("softmax", "bce"):
        head = make(dense_head=N, class_order=ORDER, loss=loss)
        before = copy.deepcopy(head)
        hidden, target = batch()
        hidden[3, 2] = np.nan
        with pytest.raises(NonFiniteError, match="hidden"):
            head.step(hidden, target, 0.1, "adam")
        assert same(head, before) and head.frequent._optimizer.name is None and head._optimizer.name is None
        with pytest.raises(LabelError, match=r"got 90"):
            head.step(batch()[0], np.full(12, D), 0.1)
        rows = Labels.from_lists([[4, 5, 4], *[[1]] * 11], D)
        with pytest.raises(LabelError, match="label 4 is in row 0 more than once"):
            head.step(batch()[0], rows, 0.1)
        assert same(head, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dense_head": D}, ShapeError, "dense_head: expected 0 to n_classes - 1 = 89, got 90"),
        ({"dense_head": -1}, ShapeError, "dense_head: expected an integer of at least 0, got -1"),
        ({"dense_head": 2.5}, ShapeError, "dense_head: expected an integer of at least 0, got 2.5"),
        ({"class_order": np.arange(D - 1)}, ShapeError, r"class_order: expected shape .* = \[90\], got \[89\]"),
        ({"class_order": np.arange(D) + 1}, ShapeError, "class_order: .*permutation of 0 .. 89, got 90 at position 89"),
        ({"class_order": np.r_[0, 0:89]}, ShapeError, "class_order: expected a permutation of 0 .. 89, got 0 2 times"),
        ({"class_order": np.arange(D) * 1.0}, DtypeError, "class_order: expected integers, got float64"),
        ({"class_order": "cooccurrence"}, DtypeError, "class_order: expected integers"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_files_of_another_shape_are_refused(tmp_path: Path) -> None:
    from widehead.files import load_head, save_head

    make(dense_head=N, class_order=ORDER).save(tmp_path / "head")
    file = load_head(tmp_path / "head")
    for name, array in (("frequent.weight", np.zeros((N, H + 1), np.float32)), ("class_order", np.zeros(D, np.int64))):
        kept = file.tensors[name]
        file.tensors[name] = array
        save_head(tmp_path / "bad", file)
        with pytest.raises(FileError, match="cannot build"):
            SparseHead.load(tmp_path / "bad")
        file.tensors[name] = kept
    del file.tensors["frequent.bias"]
    save_head(tmp_path / "bad", file)
    with pytest.raises(FileError, match="cannot build"):
        SparseHead.load(tmp_path / "bad")
