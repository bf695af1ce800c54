"""tests/python/test_torch_regressions.py -- defects of the PyTorch heads that were found, so that they stay fixed."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from widehead import Labels, _core  # noqa: E402
from widehead.torch import DenseHead, FusedSGD  # noqa: E402


@pytest.mark.parametrize("fused", [False, True])
def test_sampled_softmax_with_a_class_as_ignore_index(fused: bool) -> None:
    """The class at position 0 of the sampled rows was taken for one to ignore."""
    target = torch.arange(1, 17)
    target[3] = 0
    results = []
    for ignore_index in (0, -100):
        torch.manual_seed(0)
        head = DenseHead(8, 50, loss="sampled_softmax", negatives=20, ignore_index=ignore_index, seed=1)
        hidden = torch.randn(16, 8, requires_grad=True)
        optimizer = FusedSGD(head, lr=0.1) if fused else torch.optim.SGD(head.parameters(), lr=0.1)
        wanted = torch.where(target == 0, ignore_index, target)
        output, loss = head(hidden, wanted)
        loss.backward()
        optimizer.step()
        assert (output == 0).nonzero().flatten().tolist() == [3]
        results.append((output.detach(), hidden.grad, head.weight.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mean_over_targets_without_weight_is_zero(smoothing: float) -> None:
    """Smoothing gives such examples a loss, which came out undivided. (torch's cross_entropy has 0 / 0 here.)"""
    weight = torch.ones(30)
    weight[:4] = 0
    head = DenseHead(8, 30, class_weight=weight, label_smoothing=smoothing)
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = head(hidden, torch.arange(4)).loss
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (head.weight.grad == 0).all()


def test_scores_of_no_classes() -> None:
    head = DenseHead(8, 30)
    for shape in ((3, 0), (0,)):
        assert head.scores(torch.randn(3, 8), torch.empty(shape, dtype=torch.int64)).shape == (3, 0)
    assert head.scores(torch.empty(0, 8), torch.tensor([1, 2])).shape == (0, 2)
    with pytest.raises(_core.ShapeError, match="classes"):
        head.scores(torch.randn(8), torch.tensor(3))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_that_the_core_cannot_hold_are_refused_at_once(seed: int) -> None:
    with pytest.raises(_core.ShapeError, match="seed"):
        DenseHead(8, 30, seed=seed)
    head = DenseHead(8, 30, seed=2**64 - 1)
    with pytest.raises(_core.ShapeError, match="seed"):
        head.reset_parameters(seed)
    with pytest.raises(_core.ShapeError, match="seed"):
        FusedSGD(head, lr=0.1, seed=seed)
    FusedSGD(head, lr=0.1, seed=2**64 - 1)


def test_topk_with_row_pointers_that_begin_later() -> None:
    head = DenseHead(8, 12)
    exclude = Labels(torch.tensor([3, 5, 6]), torch.tensor([1, 1, 1, 7, 5, 9]), None, 12)
    classes = head.topk(torch.randn(2, 8), 12, exclude=exclude).classes
    assert [set(range(12)) - set(row.tolist()) for row in classes] == [{5, 7}, {9}]


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "one feature"])
def test_hidden_in_any_layout(layout: str) -> None:
    base = torch.randn(40, 40)
    layouts = {
        "transposed": base.t()[:5, :8],
        "expanded": base[:1, :8].expand(5, 8),
        "sliced": base[3:8, 7:15],
        "one feature": base[:1, :5].t(),
    }
    hidden = layouts[layout]
    head, target = DenseHead(hidden.shape[1], 33), torch.arange(5)
    assert head(hidden, target).loss == head(hidden.clone(memory_format=torch.contiguous_format), target).loss
