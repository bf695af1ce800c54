"""test_torch_hashed.py -- the hashed head in PyTorch: gradients, fused and plain training, tables that follow"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from widehead import _core, numpy
from widehead.torch import DenseHead, FusedAdam, FusedSGD, HashedHead

D, WIDTH, BATCH = 500, 24, 32
OPTIONS: dict[str, Any] = {"tables": 20, "hashes": 2, "candidates": 40, "negatives": 60, "seed": 0}
POINTS = torch.randn(D, WIDTH, generator=torch.Generator().manual_seed(99))


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    target = torch.randint(0, D, (BATCH,), generator=generator)
    return POINTS[target] + 0.3 * torch.randn(BATCH, WIDTH, generator=generator), target


def make(**options: Any) -> HashedHead:
    return HashedHead(WIDTH, D, **{**OPTIONS, **options})


def train(head: Any, optimizer: Any, steps: int = 400) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        hidden, target = batch(generator)
        optimizer.zero_grad()
        head(hidden, target).loss.backward()
        optimizer.step()


def quality(head: Any) -> tuple[float, float]:
    """Accuracy over all classes, and the loss."""
    head.eval()
    generator = torch.Generator().manual_seed(2)
    hidden, target = (torch.cat(parts) for parts in zip(*(batch(generator) for _ in range(20)), strict=True))
    best = DenseHead.topk(head, hidden, 1).classes[:, 0] if isinstance(head, DenseHead) else None
    assert best is not None
    return float((best == target).float().mean()), float(head(hidden, target).loss)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, lambda head: FusedSGD(head, lr=4.0)),
        ({}, lambda head: FusedSGD(head, lr=1.0, momentum=0.7)),
        ({}, lambda head: FusedAdam(head, lr=0.02)),
        ({"shared": True, "candidates": 150}, lambda head: FusedSGD(head, lr=4.0)),
        ({"rebuild_every": 20, "rebuild_growth": 1.5, "drift": 1e9}, lambda head: FusedSGD(head, lr=4.0)),
        ({"shared": True, "candidates": 150}, lambda head: torch.optim.SGD(head.parameters(), lr=4.0)),
        ({"dtype": torch.bfloat16}, lambda head: FusedSGD(head, lr=4.0)),
        ({"estimator": "importance", "bias": False}, lambda head: FusedSGD(head, lr=4.0)),
        ({}, lambda head: torch.optim.SGD(head.parameters(), lr=4.0)),
        ({"family": "simhash", "hashes": 6}, lambda head: torch.optim.Adagrad(head.parameters(), lr=0.2)),
    ],
)
def test_it_learns_as_the_dense_head_does(options: dict[str, Any], how: Any) -> None:
    head, dense = make(**options), DenseHead(WIDTH, D, seed=0)
    train(head, how(head))
    train(dense, FusedSGD(dense, lr=4.0))
    (accuracy, loss), (best, least) = quality(head), quality(dense)
    assert accuracy > best - 0.03 > 0.8 and loss < least + 0.25
    hidden, target = batch(torch.Generator().manual_seed(3))
    assert float((head.predict(hidden) == target).float().mean()) > 0.7
    assert head.statistics()["rehashed"] > 0 or "rebuild_every" in options


def test_with_all_classes_found_the_gradients_are_those_of_the_full_softmax() -> None:
    """Rows and queries along one direction share all buckets."""
    head = HashedHead(WIDTH, 60, **{**OPTIONS, "candidates": 60}, bias=False, dtype=torch.float64)
    direction = torch.randn(WIDTH, dtype=torch.float64) / 5
    with torch.no_grad():
        head.weight.copy_(torch.rand(60, 1, dtype=torch.float64).add(0.1) * direction)
    linear = head.to_linear()
    linear = copy.deepcopy(linear)
    hidden = (torch.rand(4, 5, 1, dtype=torch.float64).add(0.1) * direction).requires_grad_(True)
    assert (head.candidates(hidden) >= 0).all()
    target = torch.randint(0, 60, (4, 5))
    target[1, 2] = -100
    weight = torch.rand(4, 5, dtype=torch.float64)
    out = head(hidden, target, weight)
    dense = torch.nn.functional.cross_entropy(linear(hidden).flatten(0, 1), target.flatten(), reduction="none")
    want = (dense * weight.flatten()).sum() / weight.flatten()[target.flatten() != -100].sum()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-12)
    (out.loss + out.output.sum() * 0.1).backward()
    assert head.weight.grad is not None and head.weight.grad.is_sparse
    got = head.weight.grad.to_dense(), hidden.grad
    hidden.grad = None
    (want - 0.1 * dense.sum()).backward()
    for a, b in zip(got, (linear.weight.grad, hidden.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_fused_and_plain_training_move_the_same_rows() -> None:
    heads = [make(dtype=torch.float64, drift=0.0) for _ in range(2)]
    optimizers: list[Any] = [FusedSGD(heads[0], lr=0.5), torch.optim.SGD(heads[1].parameters(), lr=0.5)]
    grads = []
    for head, optimizer in zip(heads, optimizers, strict=True):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(6)
        for _ in range(3):
            hidden, target = batch(generator)
            hidden = hidden.double().requires_grad_(True)
            optimizer.zero_grad()
            head(hidden, target).loss.backward()
            optimizer.step()
            head.rebuild()
        grads.append(hidden.grad)
    torch.testing.assert_close(heads[0].weight.detach(), heads[1].weight.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


def test_a_second_backward_in_fused_mode_is_refused() -> None:
    head = make()
    optimizer = FusedSGD(head, lr=0.1)
    hidden, target = batch(torch.Generator())
    first, second = head(hidden, target).loss, head(hidden, target).loss
    first.backward()
    before = head.weight.clone()
    with pytest.raises(_core.Error, match="second backward"):
        second.backward()
    assert torch.equal(head.weight, before)
    optimizer.step()
    head(hidden, target).loss.backward()


def test_a_grad_scaler_skips_an_overflow() -> None:
    head = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = FusedSGD(head, lr=1.0, grad_scaler=scaler)
    hidden, target = batch(torch.Generator().manual_seed(1))
    hidden.requires_grad_(True)
    before = head.weight.clone()
    bad = hidden.detach().clone().requires_grad_(True)
    bad.data[0, 0] = torch.inf
    scaler.scale(head(bad, target).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.weight, before) and scaler.get_scale() == 2.0**9
    torch.manual_seed(0)
    scaler.scale(head(hidden, target).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    other = make()
    plain = FusedSGD(other, lr=1.0)
    torch.manual_seed(0)
    other(hidden, target).loss.backward()
    plain.step()
    torch.testing.assert_close(head.weight, other.weight, rtol=0, atol=1e-6)


def test_tables_follow_the_weights() -> None:
    head, hidden = make(), batch(torch.Generator().manual_seed(4))[0]
    index = numpy.HashIndex(WIDTH, bias=True, tables=20, hashes=2, seed=0)

    def same() -> bool:
        index.build(head.weight.detach().numpy(), head.bias.detach().numpy())
        wanted = index.query(hidden.numpy(), 40).ids
        return bool(np.array_equal(head.candidates(hidden).numpy(), wanted))

    assert same()
    with torch.no_grad():
        head.weight.copy_(torch.randn(D, WIDTH))
    assert same()
    head.load_state_dict({"weight": torch.randn(D, WIDTH), "bias": torch.randn(D)})
    assert same()
    head.weight = torch.nn.Parameter(torch.randn(D, WIDTH))
    assert same()
    head.double().float()
    assert same()
    other = copy.deepcopy(head)
    assert torch.equal(other.candidates(hidden), head.candidates(hidden))
    assert torch.equal(pickle.loads(pickle.dumps(head)).candidates(hidden), head.candidates(hidden))
    exact = HashedHead(WIDTH, D, **OPTIONS, drift=0.0)
    train(exact, FusedSGD(exact, lr=2.0), 10)
    head = exact
    assert same()


def test_files_between_the_faces_and_growth(tmp_path: Any) -> None:
    head = make(probes=1, max_bucket=300)
    train(head, FusedSGD(head, lr=2.0), 20)
    hidden, target = batch(torch.Generator().manual_seed(7))
    head.save(tmp_path / "head")
    face, again = numpy.HashedHead.load(tmp_path / "head"), HashedHead.load(tmp_path / "head")
    head.rebuild()
    wanted = head.topk(hidden, 5).classes
    assert torch.equal(again.topk(hidden, 5).classes, wanted)
    assert np.array_equal(face.topk(hidden.numpy(), 5).classes, wanted.numpy())
    face.save(tmp_path / "other")
    assert torch.equal(HashedHead.load(tmp_path / "other").topk(hidden, 5).classes, wanted)
    again.grow(D + 30)
    assert again.statistics()["rows"] == D + 30
    again(hidden, target + 30).loss.backward()


def test_queries() -> None:
    head = make()
    train(head, FusedSGD(head, lr=4.0), 200)
    hidden, target = batch(torch.Generator().manual_seed(8))
    exact = head.topk(hidden, 5, exact=True)
    assert torch.equal(exact.classes, head.scores(hidden).topk(5).indices)
    assert head.recall(hidden, 5, candidates=D) >= head.recall(hidden, 5, candidates=20) > 0.3
    without = head.topk(hidden, 3, exclude=torch.eye(D)[target].to_sparse_csr())
    assert not (without.classes == target[:, None]).any()
    assert head.topk(hidden[None], 3).classes.shape == (1, BATCH, 3)
    torch.testing.assert_close(head.log_prob(hidden).exp().sum(-1), torch.ones(BATCH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"family": "x"}, _core.ShapeError, "family: expected"),
        ({"tables": 300}, _core.ShapeError, "tables: expected"),
        ({"probes": 3}, _core.ShapeError, "probes: expected at most"),
        ({"loss": "softmax"}, _core.ShapeError, "loss: expected"),
        ({"dtype": torch.float16}, _core.DtypeError, "dtype: expected"),
    ],
)
def test_bad_options(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_bad_input_changes_nothing() -> None:
    head = make()
    FusedSGD(head, lr=1.0)
    hidden, target = batch(torch.Generator().manual_seed(9))
    before = head.weight.clone()
    with pytest.raises(_core.LabelError, match="target"):
        head(hidden, target + D)
    with pytest.raises(_core.NonFiniteError, match="hidden"):
        head(hidden * torch.inf, target)
    with pytest.raises(_core.ShapeError, match="hidden"):
        head(hidden[:, 1:], target)
    assert torch.equal(head.weight, before)


def test_loaded_weights_are_hashed_though_an_optimiser_was_about_to_move_some() -> None:
    head, hidden = make(), batch(torch.Generator().manual_seed(10))[0]
    head(*batch(torch.Generator().manual_seed(11))).loss.backward()
    other = make(seed=0)
    state = {"weight": torch.randn(D, WIDTH), "bias": torch.randn(D)}
    for one in (head, other):
        one.load_state_dict(state)
    assert torch.equal(head.candidates(hidden), other.candidates(hidden))


def test_a_compiled_model_breaks_its_graph_at_the_head() -> None:
    head, (hidden, target) = make(), batch(torch.Generator().manual_seed(12))
    body = torch.nn.Linear(WIDTH, WIDTH)
    compiled = torch.compile(lambda x: head(body(x), target).loss, backend="eager")
    losses = []
    for model in (compiled, lambda x: head(body(x), target).loss):
        torch.manual_seed(0)
        losses.append(model(hidden))
    assert losses[0].item() == losses[1].item()
    losses[0].backward()
    assert body.weight.grad is not None and head.weight.grad is not None
