"""tests/python/test_torch_exact_cuda.py -- the exact head in CUDA graphs, and steps that do not wait; a real GPU."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from devices import only_gpu  # noqa: E402
from test_torch_cuda import captured  # noqa: E402
from test_torch_exact import D, make_batch, make_head, make_labels, place, seeded  # noqa: E402, F401
from torch_devices import real_gpu  # noqa: E402
from widehead import LabelError  # noqa: E402
from widehead.torch import ExactHead, FusedOptimizer, FusedRMSprop, FusedSGD, clip_grad_norm_  # noqa: E402

pytestmark = [*real_gpu, only_gpu]


class Side:
    """A head, its optimiser, and the tensors that a captured step reads."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        self.kind = kind
        self.head = make_head("taylor_softmax", dtype, bias=True)
        self.lr = torch.tensor(0.05)
        make: Any = FusedRMSprop if kind == "rmsprop" else FusedSGD
        self.optimizer: FusedOptimizer = make(self.head, lr=self.lr, momentum=0.5, weight_decay=0.01)
        hidden, self.target = make_batch(seeded(1))
        self.hidden = hidden.to(dtype).requires_grad_()

    def put(self, hidden: Tensor, target: Tensor) -> None:
        with torch.no_grad():
            self.hidden.copy_(hidden)
        self.target.copy_(target)

    def train(self) -> Tensor:
        self.optimizer.zero_grad()
        self.hidden.grad = None
        for _ in range(2 if self.kind == "two batches" else 1):
            loss = self.head(self.hidden, self.target).loss
            loss.backward()
        clip_grad_norm_(self.hidden, self.head, 0.7)
        self.optimizer.step()
        return loss.detach()

    def steps(self) -> int:
        return int(self.optimizer.state[self.head._stored()]["step"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "two batches"])
def test_a_captured_step_is_an_eager_one(kind: str, dtype: torch.dtype) -> None:
    """The same bits through merges of the log, with weights read and written between replays."""
    mine, twin, generator = Side(kind, dtype), Side(kind, dtype), seeded(4)
    graph, _ = captured(mine.train)
    for _ in range(3):
        twin.train()
    everyone = range(D)
    for i in range(80):
        batch = make_batch(generator)
        for side in (mine, twin):
            side.put(*batch)
            side.lr.fill_(0.02 * (i % 3))
        graph.replay()
        twin.train()
        if i % 20 == 5:
            assert torch.equal(mine.head.weight, twin.head.weight)
        if i % 20 == 13:
            for side in (mine, twin):
                with torch.no_grad():
                    side.head.weight[:, 1].mul_(0.5)
                side.head.consolidate()
        if i == 50:
            for side in (mine, twin):
                side.head.load_state_dict({k: v * 0.5 for k, v in twin.head.state_dict().items()})
        assert torch.equal(mine.head.rows(everyone), twin.head.rows(everyone)), i
        assert torch.equal(mine.hidden.grad, twin.hidden.grad)
    assert mine.steps() == twin.steps() == 83
    mine.head.check()


def test_a_captured_step_refuses_bad_labels() -> None:
    side = Side("sgd")
    good, bad = side.target.clone(), side.target.clone()
    bad[2] = D
    graph, _ = captured(side.train)
    for labels, moves in ((good, True), (bad, False), (good, True)):
        before, count = side.head.rows(range(D)), side.steps()
        side.target.copy_(labels)
        graph.replay()
        assert torch.equal(side.head.rows(range(D)), before) != moves and side.steps() == count + moves
        if not moves:
            with pytest.raises(LabelError, match=f"label {D} at position 2"):
                side.head.check()
    side.head.check()


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "two batches"])
def test_no_step_waits(kind: str, scaled: bool, multi: bool) -> None:
    side = Side(kind)
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0) if scaled else None
    side.optimizer.grad_scaler = scaler
    hidden = side.hidden.detach().to(torch.float16 if scaled else torch.float32).requires_grad_()
    target = make_labels(2)[0] if multi else side.target

    def step() -> None:
        side.optimizer.zero_grad()
        for _ in range(2 if kind == "two batches" else 1):
            loss = side.head(hidden, target).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
        clip_grad_norm_(hidden, side.head, 1.0)
        if scaler is None:
            side.optimizer.step()
        else:
            scaler.step(side.optimizer)
            scaler.update()

    step()  # loads kernels, and makes the state
    before, everyone = side.head.rows(range(D)), torch.arange(D)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
        side.head.rows(everyone)
        side.head.topk(hidden, 3)
        side.head.log_prob(hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.head.check()
    assert not torch.equal(side.head.rows(everyone), before) and side.steps() == 4


def test_work_goes_to_the_current_stream() -> None:
    """On a side stream that is busy: what the default stream sees before it has waited is not the result."""
    sides = [Side("sgd") for _ in range(2)]
    for side in sides:
        side.train()
    before = sides[1].head._stored().detach().clone()
    sides[0].train()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        sides[1].train()
    assert torch.equal(sides[1].head._stored(), before)
    stream.synchronize()
    assert torch.equal(sides[1].head.weight, sides[0].head.weight)


def test_moving_to_the_cpu_and_back() -> None:
    """In the midst of training, with what the optimiser keeps."""
    heads = []
    for places in (["cuda"], ["cuda", "cpu", "cuda"]):
        head = make_head("taylor_softmax", bias=True).to("cuda")
        optimizer, generator = FusedSGD(head, lr=0.02, momentum=0.8, weight_decay=0.01), seeded(2)
        for i in range(12):
            if i in (4, 8):
                head.to(places[i // 4 % len(places)])
            hidden, target = (part.to(head._stored().device) for part in make_batch(generator))
            head(hidden, target).loss.backward()
            optimizer.step()
        heads.append(head)
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-10, atol=1e-10)


def test_memory_of_a_step() -> None:
    """The gradient of a million classes never exists; queries bring the rows together where they lie."""
    head = ExactHead(256, 1_000_000, seed=1)
    optimizer = FusedSGD(head, lr=1e-4)
    hidden = torch.randn(64, 256, requires_grad=True)
    target = torch.arange(64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(9):
        head(hidden, target).loss.backward()
        optimizer.step()
    head.topk(hidden.detach(), 5)
    # The weights are 1 GB; labels and lists of the classes, matrices of the log, and a tile of logits are left.
    assert torch.cuda.max_memory_allocated() - before < 400 << 20
    assert head.diagnostics()["steps"] == 9 and bool(torch.isfinite(hidden.grad).all())
