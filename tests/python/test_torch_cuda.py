"""tests/python/test_torch_cuda.py -- streams, CUDA graphs, waiting and memory: what only a real GPU shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from test_torch_dense import B, D, assert_near, make_batch, make_head  # noqa: E402
from test_torch_optim import Net, snapshot, unchanged  # noqa: E402
from torch_devices import real_gpu  # noqa: E402
from widehead import BackendError, LabelError  # noqa: E402
from widehead.torch import DenseHead, FusedAdam, FusedOptimizer, FusedSGD, SparseHead, _device  # noqa: E402

pytestmark = real_gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"label_smoothing": 0.1},
    "bce": {"loss": "bce"},
    "sampled": {"loss": "sampled_softmax", "negatives": 6, "proposal": torch.linspace(1, 2, D)},
}
LOSSES = pytest.mark.parametrize("loss", list(OPTIONS))


def train(head: DenseHead, optimizer: FusedOptimizer, hidden: Tensor, target: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = head(hidden, target).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def captured(body: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of body(), after three runs on a side stream as torch asks for; and its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body()
    return graph, result


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_a_captured_step_is_an_eager_one(loss: str, dtype: torch.dtype, name: str) -> None:
    """The same bits, with the learning rate and the count of steps (bias correction, random rounding) read anew."""
    (hidden, target), (same, _) = make_batch("cuda", dtype), make_batch("cuda", dtype)
    hidden.requires_grad_()
    same.requires_grad_()
    heads = [make_head("cuda", dtype, **OPTIONS[loss]) for _ in range(2)]
    rates = [torch.tensor(0.05, device="cuda") for _ in heads]
    kind = {
        "sgd": lambda h, lr: FusedSGD(h, lr=lr, momentum=0.9, seed=4),
        "adam": lambda h, lr: FusedAdam(h, lr, seed=4),
    }
    optimizers = [kind[name](head, lr) for head, lr in zip(heads, rates, strict=True)]
    graph, _ = captured(lambda: train(heads[0], optimizers[0], hidden, target))
    for _ in range(3):
        train(heads[1], optimizers[1], same, target)
    assert all(torch.equal(p, q) for p, q in zip(*(h.owned_parameters() for h in heads), strict=True))
    for rate in (0.05, 0.2, 0.0, 0.01):
        for lr in rates:
            lr.fill_(rate)
        graph.replay()
        train(heads[1], optimizers[1], same, target)
        assert all(torch.equal(p, q) for p, q in zip(*(h.owned_parameters() for h in heads), strict=True))
    counts = [int(optimizer.state[head.weight]["step"]) for head, optimizer in zip(heads, optimizers, strict=True)]
    assert counts == [7, 7]


def test_a_captured_backbone_and_head() -> None:
    nets = [Net(make_head("cuda", torch.float32), torch.float32) for _ in range(2)]
    x, target = make_batch("cuda", torch.float32)

    def stepper(net: Net) -> Callable[[], Tensor]:
        optimizers = [FusedSGD(net.head, lr=0.1), torch.optim.SGD(net.body.parameters(), lr=0.1)]

        def step() -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = net(x, target)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            return loss.detach()

        return step

    steps = [stepper(net) for net in nets]
    graph, loss = captured(steps[0])
    for _ in range(3):
        steps[1]()
    for _ in range(4):
        graph.replay()
        assert_near(loss, steps[1](), 1e-5)
    for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_near(mine.detach(), theirs.detach(), 1e-5)


def test_captured_sampled_softmax_draws_anew() -> None:
    head = make_head("cuda", torch.float32, **OPTIONS["sampled"])
    hidden, target = make_batch("cuda", torch.float32)
    lr = torch.tensor(0.0, device="cuda")
    optimizer = FusedSGD(head, lr=lr)
    before = snapshot(head)
    graph, loss = captured(lambda: train(head, optimizer, hidden, target))
    losses = set()
    for _ in range(5):
        graph.replay()
        losses.add(float(loss))
    assert len(losses) == 5 and unchanged(head, before)
    lr.fill_(0.1)
    graph.replay()
    moved = (head.weight != before[0]).any(-1)
    assert bool(moved[target[target >= 0]].all()) and int(moved.sum()) <= B + 6 < D


def test_captured_sampled_softmax_in_plain_mode_has_a_dense_gradient() -> None:
    head = make_head("cuda", torch.float32, **OPTIONS["sampled"])
    hidden, target = make_batch("cuda", torch.float32)

    def body() -> Tensor:
        head.zero_grad()
        loss = head(hidden, target).loss
        loss.backward()
        return loss.detach()

    graph, _ = captured(body)
    touched = []
    for _ in range(5):
        graph.replay()
        assert head.weight.grad is not None and not head.weight.grad.is_sparse
        touched.append(head.weight.grad.ne(0).any(-1))
        assert bool(touched[-1][target[target >= 0]].all()) and int(touched[-1].sum()) <= B + 6 < D
    assert not all(torch.equal(rows, touched[0]) for rows in touched)


@LOSSES
def test_a_captured_step_refuses_bad_labels(loss: str) -> None:
    head = make_head("cuda", torch.float32, **OPTIONS[loss])
    optimizer = FusedAdam(head, lr=0.1)
    hidden, target = make_batch("cuda", torch.float32)
    good, bad = target.clone(), torch.where(target == target[2], D, target)
    graph, _ = captured(lambda: train(head, optimizer, hidden, target))
    for labels, moves in ((good, True), (bad, False), (good, True)):
        before, count = snapshot(head), int(optimizer.state[head.weight]["step"])
        target.copy_(labels)
        graph.replay()
        assert unchanged(head, before) != moves and int(optimizer.state[head.weight]["step"]) == count + moves
        if not moves:
            with pytest.raises(LabelError, match=f"label {D} at position 2"):
                head.check()
    head.check()


def test_the_first_call_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "_faults", {})
    one = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        one.add_(1)
        with pytest.raises(BackendError, match="run one step before it"):
            _device.gpu_of(one)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@LOSSES
def test_no_step_waits(loss: str, scaled: bool, half: bool, request: pytest.FixtureRequest) -> None:
    head = make_head("cuda", torch.float32, class_weight=True, **OPTIONS[loss])
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0) if scaled else None
    optimizer = FusedAdam(head, lr=torch.tensor(0.1, device="cuda"), grad_scaler=scaler)
    hidden, target = make_batch("cuda", torch.float16 if half else torch.float32)
    hidden.requires_grad_()
    before = snapshot(head)

    def step() -> None:
        optimizer.zero_grad()
        result = head(hidden, target).loss
        (result if scaler is None else scaler.scale(result)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    step()  # loads kernels, and makes the moments
    request.getfixturevalue("no_waiting")
    for _ in range(3):
        step()
    head.topk(hidden, 3)
    head.scores(hidden)
    torch.cuda.set_sync_debug_mode("default")
    head.check()
    assert not unchanged(head, before) and int(optimizer.state[head.weight]["step"]) == 4


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_no_plain_step_waits(loss: str, half: bool, request: pytest.FixtureRequest) -> None:
    head = make_head("cuda", torch.float32, **OPTIONS[loss])
    hidden, target = make_batch("cuda", torch.float16 if half else torch.float32)
    hidden.requires_grad_()
    head(hidden, target).loss.backward()
    request.getfixturevalue("no_waiting")
    head(hidden, target).loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert bool(head.weight.grad.any())


@pytest.mark.parametrize("mode", [{}, {"mode": "magnitude_row"}, {"mode": "threshold", "threshold": 0.1}], ids=str)
def test_no_rewiring_waits(mode: dict[str, Any], request: pytest.FixtureRequest) -> None:
    head = SparseHead(32, 5000, 8, device="cuda", group_size=2, seed=3, rewire_every=1)
    twin = SparseHead(32, 5000, 8, group_size=2, seed=3)
    optimizer = FusedAdam(head, lr=0.1)
    head.rewire(step=1, optimizer=optimizer, **mode)  # loads kernels, and makes the moments
    request.getfixturevalue("no_waiting")
    moved = [head.rewire(step=2, **mode), head.rewire(**mode)]  # the second at the step that the device knows
    torch.cuda.set_sync_debug_mode("default")
    assert [int(n) for n in moved] == [twin.rewire(step=step, **mode) for step in (1, 2, 0)][1:]
    assert torch.equal(head.index.cpu(), twin.index) and torch.equal(head.weight.detach().cpu(), twin.weight)


def test_a_captured_rewiring_draws_anew() -> None:
    """By the step on the device; and step() in a capture leaves the rewiring to the caller."""
    head, twin = (SparseHead(32, 700, 8, device="cuda", seed=3, rewire_every=1) for _ in range(2))
    optimizer = FusedSGD(head, lr=0.1)
    count = optimizer._state_of(head.weight)["step"]
    graph, moved = captured(lambda: head.rewire())
    count.fill_(41)
    with torch.no_grad():
        for name in ("weight", "index"):
            getattr(head, name).copy_(getattr(twin, name))
    graph.replay()
    assert int(moved) == int(twin.rewire(step=41)) > 0
    assert torch.equal(head.index, twin.index) and torch.equal(head.weight, twin.weight)


@LOSSES
def test_work_goes_to_the_current_stream(loss: str) -> None:
    """On a side stream that is busy: what the default stream sees before it has waited is not the result."""
    hidden, target = make_batch("cuda", torch.float32)
    heads = [make_head("cuda", torch.float32, **OPTIONS[loss]) for _ in range(2)]
    optimizers = [FusedSGD(head, lr=0.1) for head in heads]
    torch.cuda.synchronize()
    torch.manual_seed(1)
    train(heads[0], optimizers[0], hidden, target)
    torch.cuda.synchronize()
    before = snapshot(heads[1])
    side = torch.cuda.Stream()
    torch.manual_seed(1)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        train(heads[1], optimizers[1], hidden, target)
    early = heads[1].weight.detach().clone()
    assert torch.equal(early, before[0])
    side.synchronize()
    assert torch.equal(heads[1].weight, heads[0].weight) and not unchanged(heads[1], before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@LOSSES
def test_a_device_that_is_not_the_current_one(loss: str) -> None:
    results = []
    for where in ("cuda:0", "cuda:1"):
        head = make_head(where, torch.float32, **OPTIONS[loss])
        hidden, target = make_batch(where, torch.float32)
        optimizer = FusedAdam(head, lr=0.1)
        for step in range(2):
            torch.manual_seed(step)
            train(head, optimizer, hidden.requires_grad_(), target)
        with pytest.raises(LabelError):
            head(hidden, torch.full_like(target, D))
            head.check()
        assert torch.cuda.current_device() == 0
        results.append([head.weight.cpu(), hidden.grad.cpu(), head.topk(hidden, 3).classes.cpu()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_first_weights_need_no_second_copy() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head = DenseHead(64, 1_000_000, dtype=torch.bfloat16, bias=False, device="cuda", seed=1)
    size = head.weight.numel() * 2
    assert size <= torch.cuda.max_memory_allocated() - before < size + (4 << 20)


def test_a_fused_step_holds_no_gradient_of_the_weights() -> None:
    head = DenseHead(256, 1_000_000, dtype=torch.bfloat16, device="cuda", seed=1)
    optimizer = FusedSGD(head, lr=0.1)
    hidden = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.arange(64, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(head, optimizer, hidden, target)
    # The weights are 512 MB; a tile of logits is half of the L2 cache, and cuBLAS has a workspace.
    assert torch.cuda.max_memory_allocated() - before < 300 << 20
    assert hidden.grad is not None and bool(torch.isfinite(hidden.grad).all())
