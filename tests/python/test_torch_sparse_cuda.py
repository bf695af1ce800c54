"""tests/python/test_torch_sparse_cuda.py -- the sparse head in CUDA graphs, and steps that do not wait; a real GPU."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from test_torch_cuda import captured, train  # noqa: E402
from test_torch_dense import make_batch  # noqa: E402
from test_torch_optim import snapshot, unchanged  # noqa: E402
from test_torch_sparse import make_head  # noqa: E402
from torch_devices import real_gpu  # noqa: E402
from widehead.torch import FusedAdam, FusedOptimizer, SparseHead  # noqa: E402

pytestmark = real_gpu

OPTIONS: list[dict[str, Any]] = [
    {"loss": "softmax", "label_smoothing": 0.1},
    {"loss": "bce", "group_size": 16},
    {"loss": "squared_hinge"},
]


def build(dtype: torch.dtype, options: dict[str, Any]) -> tuple[SparseHead, FusedOptimizer]:
    head = make_head(dtype, device="cuda", rewire_every=None, **options)
    return head, FusedAdam(head, lr=0.05, seed=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_step_is_an_eager_one(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The same bits, random rounding included."""
    (hidden, target), (same, _) = make_batch("cuda", dtype), make_batch("cuda", dtype)
    hidden.requires_grad_()
    same.requires_grad_()
    heads, optimizers = zip(*(build(dtype, options) for _ in range(2)), strict=True)
    graph, _ = captured(lambda: train(heads[0], optimizers[0], hidden, target))
    for _ in range(3):
        train(heads[1], optimizers[1], same, target)
    for _ in range(3):
        graph.replay()
        train(heads[1], optimizers[1], same, target)
        assert all(torch.equal(p, q) for p, q in zip(*(h.owned_parameters() for h in heads), strict=True))
    assert bool(hidden.grad.any())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_step_waits(options: dict[str, Any]) -> None:
    head, optimizer = build(torch.bfloat16, options)
    hidden, target = make_batch("cuda", torch.bfloat16)
    hidden.requires_grad_()
    before = snapshot(head)
    train(head, optimizer, hidden, target)  # loads kernels, and makes the moments
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(head, optimizer, hidden, target)
        head.topk(hidden, 3)
        head.scores(hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    head.check()
    assert not unchanged(head, before)
