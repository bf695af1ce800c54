"""tests/python/test_torch_compile.py -- the operators under opcheck, and whole training steps under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402
from torch.library import opcheck  # noqa: E402

from test_torch_dense import B, D, assert_near, d, make_batch, make_head, make_labels  # noqa: E402
from test_torch_optim import Net, snapshot, unchanged  # noqa: E402
from widehead import Error  # noqa: E402
from widehead.torch import DenseHead, FusedAdam, FusedSGD, _sampled, ops  # noqa: E402

OPTIONS = ("softmax", 0.1, 0.01, 2.0, -100, 0.0)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, target = make_batch(device, dtype)
    head = make_head(device, dtype)
    return hidden.requires_grad_(), head.weight, head.bias, target


@pytest.mark.parametrize("multi", [False, True])
def test_opcheck_loss_and_gradient(multi: bool, device: str) -> None:
    hidden, weight, bias, target = leaves(device)
    labels, _ = make_labels(device)
    where = (labels.indptr, labels.indices, labels.values) if multi else (None, target, None)
    options = ("softmax", 0.0, *OPTIONS[2:]) if multi else OPTIONS
    class_weight = torch.linspace(0.5, 1.5, D, device=device)
    opcheck(ops.dense_loss, (hidden, weight, bias, None, *where, class_weight, None, None, *options))
    opcheck(ops.dense_loss, (hidden, weight, None, None, *where, None, None, None, "bce", 0.0, 0.0, 0.0, -100, 0.0))
    values = [t.detach() for t in (hidden, weight, bias)]
    grads = [torch.rand(B, dtype=torch.float64, device=device) for _ in range(3)]
    lse = torch.logsumexp(2 * torch.tanh((values[0] @ values[1].t() + values[2]) / 2), 1)
    for needs in ((True, True, True), (True, False, False)):
        opcheck(ops.dense_grad, (*values, None, *where, class_weight, lse, *grads, *options, *needs))


def test_opcheck_fused(device: str) -> None:
    head = make_head(device)
    FusedSGD(head, lr=0.1)
    hidden, target = make_batch(device)
    args = (head.weight, head.bias, None, None, target, None, None)
    hidden.requires_grad_()
    opcheck(ops.dense_loss, (hidden, *args, head._anchor, head._control, *OPTIONS))
    with torch.no_grad():
        losses, output, lse = ops.dense_loss(hidden, *args, None, None, *OPTIONS)
    grads = (torch.ones_like(losses), torch.zeros_like(output), torch.zeros_like(lse))
    opcheck(ops.dense_grad_update, (hidden.detach(), *args, head._control, lse, *grads, *OPTIONS, True))


def test_opcheck_queries(device: str) -> None:
    hidden, weight, bias, target = (t.detach() for t in leaves(device))
    indptr = torch.arange(B + 1, device=device)
    opcheck(ops.dense_topk, (hidden, weight, bias, 0.0, 4, None, None))
    opcheck(ops.dense_topk, (hidden, weight, bias, 3.0, 4, indptr, target.clamp(min=0)))
    opcheck(ops.dense_scores, (hidden, weight, bias, 0.0, None))
    opcheck(ops.dense_scores, (hidden, weight, None, 0.0, torch.zeros(B, 3, dtype=torch.int64, device=device)))


def test_opcheck_sampled(device: str) -> None:
    head = make_head(device, loss="sampled_softmax", negatives=6)
    _, target = make_batch(device)
    seed = torch.tensor(5)
    for padded in (False, True):
        opcheck(_sampled.sample_rows, (target, seed, head._proposal_key, 6, -100, padded))
    rows, _, _, count = _sampled.sample_rows(target, seed, head._proposal_key, 6, -100, True)
    assert int(count) <= len(rows) == B + 6
    opcheck(_sampled.gather_rows, (head.weight, head.bias, rows, count, None, None, False))
    FusedSGD(head, lr=0.1)
    opcheck(_sampled.gather_rows, (head.weight, head.bias, rows, count, head._anchor, head._control, True))
    grad, grad_bias = torch.rand(len(rows), d, dtype=torch.float64), torch.rand(len(rows), dtype=torch.float64)
    opcheck(
        _sampled.update_rows,
        (head.weight, head.bias, head._control, rows, count, grad.to(device), grad_bias.to(device)),
    )


def run(net: Net, step: Any, optimizers: list[torch.optim.Optimizer], batches: list[tuple[Tensor, Any]]) -> list[float]:
    losses = []
    for x, target in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = step(x, target)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_training_equals_eager(fused: bool, multi: bool, device: str) -> None:
    """Forward and backward in whole graphs; the learning rate changes without a new one."""
    options = {"loss": "bce"} if multi else {"label_smoothing": 0.1}
    nets = [Net(make_head(device, **options)) for _ in range(2)]
    batches = [(make_batch(device, rows=B)[0] * k, make_labels(device)[0] if multi else make_batch(device)[1])
               for k in (1.0, 0.5, 2.0)]  # fmt: skip
    losses = []
    for net, compiled in zip(nets, (False, True), strict=True):
        head_optimizer = (
            FusedAdam(net.head, lr=0.1) if fused else torch.optim.AdamW(net.head.parameters(), lr=0.1, weight_decay=0)
        )
        optimizers = [torch.optim.SGD(net.body.parameters(), lr=0.1), head_optimizer]
        step = torch.compile(net, fullgraph=True) if compiled else net
        losses.append(run(net, step, optimizers, batches[:2]))
        frames = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        head_optimizer.param_groups[0]["lr"] = 0.02
        losses[-1] += run(net, step, optimizers, batches[2:])
        assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == frames
    assert losses[0] == pytest.approx(losses[1])
    for mine, theirs in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        assert_near(mine.detach(), theirs.detach(), 1e-9)


@pytest.mark.slow
def test_compiled_fused_step_updates_in_place_and_refuses_a_second(device: str) -> None:
    head = make_head(device)
    optimizer = FusedSGD(head, lr=0.1)
    hidden, target = make_batch(device)
    step = torch.compile(lambda h, t: head(h, t).loss, fullgraph=True)
    where, before = head.weight.data_ptr(), snapshot(head)
    step(hidden, target).backward()
    after_first = snapshot(head)
    assert head.weight.data_ptr() == where and not unchanged(head, before)
    with pytest.raises(Error, match="second backward"):
        step(hidden, target).backward()
    assert unchanged(head, after_first)
    optimizer.step()
    step(hidden, target).backward()
    assert not unchanged(head, after_first)


@pytest.mark.slow
def test_compiled_fused_step_copies_no_weights() -> None:
    """The weights are mutated in backward: a graph that kept its inputs safe would copy them."""
    head = DenseHead(32, 300_000)  # 38 MB of weights
    optimizer = FusedSGD(head, lr=0.1)
    hidden, target = torch.randn(4, 32, requires_grad=True), torch.arange(4)
    step = torch.compile(lambda h, t: head(h, t).loss, fullgraph=True)
    for _ in range(2):
        step(hidden, target).backward()
        optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(hidden, target).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_sampled_softmax(fused: bool, device: str) -> None:
    """Randomness differs from eager, so: graphs are whole, rows move, and the rows not drawn stay."""
    head = make_head(device, loss="sampled_softmax", negatives=6)
    optimizer: Any = FusedSGD(head, lr=0.1) if fused else torch.optim.SGD(head.parameters(), lr=0.1)
    hidden, target = make_batch(device)
    hidden.requires_grad_()
    step = torch.compile(lambda h, t: head(h, t).loss, fullgraph=True)
    before = snapshot(head)
    for _ in range(2):
        optimizer.zero_grad()
        step(hidden, target).backward()
        optimizer.step()
    moved = (head.weight != before[0]).any(-1)
    assert bool(moved[target[target >= 0]].all()) and int(moved.sum()) <= 2 * (B + 6) < D
    assert hidden.grad is not None and bool(torch.isfinite(hidden.grad).all())


@pytest.mark.slow
def test_compiled_queries(device: str) -> None:
    head = make_head(device)
    hidden, _ = make_batch(device)

    def queries(hidden: Tensor) -> tuple[Tensor, ...]:
        return (*head.topk(hidden, 3), head.predict(hidden), head.log_prob(hidden), head.lse(hidden))

    for got, want in zip(torch.compile(queries, fullgraph=True)(hidden), queries(hidden), strict=True):
        assert_near(got, want)
