"""tests/python/test_torch_exact_gpu.py -- the exact head on a GPU: what differs there, and nothing waits."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.utils.dlpack import to_dlpack  # noqa: E402

import torch_tape  # noqa: E402
from devices import only_gpu  # noqa: E402
from test_torch_exact import (  # noqa: E402
    LOSSES,
    B,
    D,
    Pair,
    assert_near,
    assert_same_layer,
    d,
    dense_losses,
    make_batch,
    make_head,
    make_labels,
    one_hot,
    place,  # noqa: F401 -- of every test here too
    seeded,
)
from torch_devices import emulate, raises  # noqa: E402
from widehead import BackendError, Error, LabelError, Labels, NonFiniteError, _core  # noqa: E402
from widehead.torch import ExactHead, FusedOptimizer, FusedRMSprop, FusedSGD, _device, clip_grad_norm_  # noqa: E402
from widehead.torch._exact_device import DeviceCore  # noqa: E402

pytestmark = only_gpu


def train_on(head: ExactHead, optimizer: Any, hidden: Tensor, target: Any) -> None:
    optimizer.zero_grad()
    head(hidden.to(head._stored().dtype), target).loss.backward()
    optimizer.step()


def core_of(head: ExactHead) -> DeviceCore:
    core = head._exact().core
    assert isinstance(core, DeviceCore)
    return core


def bits(head: ExactHead, optimizer: FusedOptimizer) -> list[Tensor]:
    """All that a step may change, but the number of steps."""
    parts = head._parts()
    state = [v for p in parts for name, v in optimizer.state[p].items() if name != "step"]
    return [tensor.detach().clone() for tensor in (*parts, core_of(head)._head["state"], *state)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.equal(y) for x, y in zip(a, b, strict=True))


def steps_of(head: ExactHead, optimizer: FusedOptimizer) -> int:
    return int(optimizer.state[head._stored()]["step"])


def forbid_reads(patch: pytest.MonkeyPatch, optimizer: FusedOptimizer) -> None:
    """Reading a number of any tensor is an error, but of what is kept on the host."""
    on_host = {slot.data_ptr() for owner in optimizer._owners for slot in owner.control}
    on_host |= {faults._seen.data_ptr() for faults in _device._faults.values()}

    def guarded(read: Any) -> Any:
        def call(tensor: Tensor, *given: Any, **named: Any) -> Any:
            if tensor.data_ptr() not in on_host:
                raise AssertionError("a number is read back from the device")
            return read(tensor, *given, **named)

        return call

    for name in READS:
        patch.setattr(Tensor, name, guarded(getattr(Tensor, name)))


READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__int__", "__float__", "__bool__", "__index__")


@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "two batches", "multi", "statistics", "scaler"])
def test_no_number_is_read_back(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the ignore_index in the batch, clipping, and a learning rate on the device."""
    head = make_head("taylor_softmax", bias=True, dtype=torch.float32)
    scaler = torch.amp.GradScaler(device, init_scale=8.0) if kind == "scaler" else None
    lr = torch.tensor(0.05)
    make = FusedRMSprop if kind == "rmsprop" else FusedSGD
    optimizer = make(head, lr=lr, momentum=0.5, grad_scaler=scaler)
    hidden, target = make_batch(seeded(1))
    goal = make_labels(3)[0] if kind == "multi" else target
    hidden = hidden.float().requires_grad_()

    def train() -> None:
        optimizer.zero_grad()
        for _ in range(2 if kind == "two batches" else 1):
            if kind == "statistics":
                A, q, s = head.statistics(hidden, goal)
                loss = (q - 2 * A + s).sum()
            else:
                loss = head(hidden, goal, torch.ones(B)).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
        clip_grad_norm_(hidden, head, 1.0)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)

    train()
    before = head.rows(range(D))
    with monkeypatch.context() as during:
        forbid_reads(during, optimizer)
        if scaler is None:
            train()
        else:  # a GradScaler reads whatever optimiser it drives, but hands this one its own tensors
            optimizer.zero_grad()
            scaler.scale(head(hidden, goal).loss).backward()
            clip_grad_norm_(hidden, head, 1.0)
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
        head.rows(torch.arange(3))
        head.consolidate()
        head.topk(hidden, 2)
        head.log_prob(hidden)
    assert not torch.equal(head.rows(range(D)), before)
    core_of(head)
    with pytest.raises(AssertionError, match="read back"), monkeypatch.context() as during:
        forbid_reads(during, optimizer)
        float(head.grad_norm())


@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "scaler", "two batches"])
def test_a_recorded_step_trains_when_it_is_repeated(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a captured graph does: with other batches and rates in the same tensors, nothing of the step on the host. The
    same bits as steps of its own, through merges of the log, and whatever is read and written in between.
    """
    if not _core.cuda_emulated:
        pytest.skip("test_torch_exact_cuda.py has the real graphs")
    generator = seeded(4)
    batches = [make_batch(generator) for _ in range(24)]
    sides: list[Any] = []
    for _ in range(2):
        head = make_head("taylor_softmax", bias=True, dtype=torch.float32)
        scaler = torch.amp.GradScaler(device, init_scale=8.0) if kind == "scaler" else None
        lr = torch.tensor(0.05)
        make = FusedRMSprop if kind == "rmsprop" else FusedSGD
        optimizer = make(head, lr=lr, momentum=0.5, weight_decay=0.01, grad_scaler=scaler)
        hidden, target = batches[0][0].float().requires_grad_(), batches[0][1].clone()
        sides.append((head, scaler, lr, optimizer, hidden, target))

    def train(side: Any) -> None:
        head, scaler, _, optimizer, hidden, target = side
        optimizer.zero_grad()
        hidden.grad = None
        for _ in range(2 if kind == "two batches" else 1):
            loss = head(hidden, target).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
        clip_grad_norm_(hidden, head, 0.7)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    for side in sides:
        train(side)
    with torch_tape.recording(monkeypatch) as tape:
        train(sides[0])
    train(sides[1])
    head, twin = (side[0] for side in sides)
    for i, (hidden, target) in enumerate(batches[1:]):
        for side in sides:
            side[2].fill_(0.02 * (i % 3))
            with torch.no_grad():
                side[4].copy_(hidden)
            side[5].copy_(target)
        tape.replay()
        train(sides[1])
        if i == 5:
            assert torch.equal(head.weight, twin.weight)
        if i == 13:
            for h in (head, twin):
                with torch.no_grad():
                    h.weight[:, 1].mul_(0.5)
                h.consolidate()
        if i == 17:
            for h in (head, twin):
                h.load_state_dict({"weight": twin.weight * 0.5, "bias": twin.bias + 1})
        assert torch.equal(head.rows(range(D)), twin.rows(range(D))), i
        assert torch.equal(sides[0][4].grad, sides[1][4].grad)
    assert torch.equal(head.weight, twin.weight) and head.diagnostics()["gram_error"] < 1e-5
    assert steps_of(head, sides[0][3]) == steps_of(twin, sides[1][3]) == 25


def test_batches_of_different_forms_add_up() -> None:
    """Single labels with the ignore_index, and labels with values, whose memory the caller uses for something else."""
    pair, generator = Pair(make_head(bias=True), momentum=0.5), seeded(1)
    for i in range(6):
        pair.zero_grad()
        for part in range(3):
            x, target = make_batch(generator, 3 + part)
            goal, y = make_labels(i, 3 + part) if part == 1 else (target, one_hot(target))
            if isinstance(goal, Labels):
                goal = Labels(*(torch.as_tensor(p).clone() for p in (goal.indptr, goal.indices, goal.values)), D)
            pair.backward(x, goal, y)
            x.fill_(torch.nan)
            for tensor in (goal.indptr, goal.indices) if isinstance(goal, Labels) else (goal,):
                tensor.fill_(D + 5)
        if i % 2:
            assert_near(pair.head.grad_norm(), pair.norm())
        pair.step()
    assert_same_layer(pair.head, pair.linear)


BAD: dict[str, type[Exception]] = {
    "gradient": NonFiniteError,
    "hidden": NonFiniteError,
    "class": LabelError,
    "value": LabelError,
    "pointer": LabelError,
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("kind", [FusedSGD, FusedRMSprop])
def test_a_bad_batch_refuses_the_step(kind: Any, what: str, several: bool) -> None:
    """No bit changes, the step is not counted, and the backbone gets zeros; the next one is taken."""
    head = make_head("taylor_softmax", bias=True)
    optimizer = kind(head, lr=0.05, momentum=0.5, weight_decay=0.1)
    hidden, target = make_batch(seeded(1))
    for _ in range(3):
        train_on(head, optimizer, hidden, target)
    before = bits(head, optimizer)
    bad = hidden.clone()
    wrong: Any = target.clone()
    if what == "hidden":
        bad[2, 1] = torch.inf
    if what == "class":
        wrong[2] = D
    if what in ("value", "pointer"):
        indptr = torch.tensor([0, 1, 3, 2, 4, 5] if what == "pointer" else [0, 1, 2, 3, 4, 5])
        values = torch.tensor([1.0, 1.0, torch.inf if what == "value" else 1.0, 1.0, 1.0])
        wrong = Labels(indptr, torch.arange(5), values, D)
    if several:
        head(hidden, target).loss.backward()
    bad.requires_grad_()
    loss = head(bad, wrong).loss
    with raises(head, BAD[what]):
        (loss * (torch.nan if what == "gradient" else 1.0)).backward()
    assert bad.grad is not None and bool((bad.grad == 0).all())
    assert float(head.grad_norm()) == torch.inf
    optimizer.step()
    assert equal(bits(head, optimizer), before) and steps_of(head, optimizer) == 3
    _device._faults.clear() if several else head.check()  # the joined batch tells of it once more
    train_on(head, optimizer, hidden, target)
    head.check()
    assert not equal(bits(head, optimizer), before) and steps_of(head, optimizer) == 4


def test_errors_come_from_a_later_step() -> None:
    head = make_head()
    optimizer = FusedSGD(head, lr=0.05)
    hidden, target = make_batch(seeded(1))
    target[3] = -7
    losses = make_head(reduction="none")(hidden, target).loss
    assert bool(losses[3].isnan()) and not bool(losses[[0, 1, 2, 4]].isnan().any())
    train_on(head, optimizer, hidden, target)
    with pytest.raises(LabelError, match="label -7 at position 3"):
        for _ in range(2):
            optimizer.step()
    assert steps_of(head, optimizer) == 0 and head.diagnostics()["steps"] == 0


def test_rates_are_read_there() -> None:
    head = make_head(bias=True)
    rate = torch.tensor(0.0)
    optimizer = FusedSGD(head, lr=rate, momentum=0.0)
    pair, generator = Pair(make_head(bias=True)), seeded(1)
    for lr in (0.02, 0.0, 0.05):
        rate.fill_(lr)
        pair.theirs.param_groups[0]["lr"] = pair.mine.param_groups[0]["lr"] = lr
        x, target = make_batch(generator)
        hidden = pair.hidden(x)[0].detach()
        pair.zero_grad()
        pair.backward(x, target, one_hot(target))
        pair.step()
        train_on(head, optimizer, hidden, target)
    assert_near(head.weight, pair.head.weight, 1e-6)
    before = head.weight.clone()
    rate.fill_(torch.nan)
    with raises(head, NonFiniteError, match="lr"):
        train_on(head, optimizer, hidden, target)
    assert torch.equal(head.weight, before) and steps_of(head, optimizer) == 3


@pytest.mark.parametrize("guarded", [False, True])
def test_clipping_by_a_norm_that_is_not_finite(guarded: bool, device: str) -> None:
    """Nothing is waited for: without a scaler the error comes later, and no head moves."""
    scaler = torch.amp.GradScaler(device, init_scale=8.0) if guarded else None
    heads = [make_head(dtype=torch.float32), make_head(dtype=torch.float32)]
    optimizer = FusedSGD(heads, lr=0.05, momentum=0.5, grad_scaler=scaler)
    hidden, target = make_batch(seeded(1))
    before = [head.weight.clone() for head in heads]
    body = nn.Parameter(torch.ones(3))
    for value in (torch.nan, 1.0):
        body.grad = torch.full((3,), value)
        for head in heads:
            loss = head(hidden.float(), target).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
        norm = clip_grad_norm_([body], heads, 0.5)
        assert bool(norm.isfinite()) == (value == 1.0)
        if value != 1.0:
            assert bool(body.grad.isnan().all()) and float(heads[0].grad_norm()) == torch.inf
        optimizer.step()
        moved = [not torch.equal(head.weight, old) for head, old in zip(heads, before, strict=True)]
        assert moved == [value == 1.0] * 2
        if value != 1.0 and not guarded:
            with pytest.raises(NonFiniteError):
                heads[0].check()
    heads[0].check()
    assert steps_of(heads[0], optimizer) == steps_of(heads[1], optimizer) == 1


def test_an_overflow_under_a_scaler_skips_all_heads(device: str) -> None:
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    heads = [make_head(dtype=torch.float32), make_head(dtype=torch.float32, bias=True)]
    optimizer = FusedRMSprop(heads, lr=0.05, momentum=0.5, grad_scaler=scaler)
    hidden, target = make_batch(seeded(1))

    def step(bad: float) -> None:
        optimizer.zero_grad()
        for head, factor in zip(heads, (1.0, bad), strict=True):
            scaler.scale(head(hidden.float() * factor, target).loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    before = [tensor for head in heads for tensor in bits(head, optimizer)]
    step(torch.inf)
    assert equal([tensor for head in heads for tensor in bits(head, optimizer)], before)
    assert scaler.get_scale() == 4.0 and [steps_of(head, optimizer) for head in heads] == [1, 1]
    heads[1].check()  # nothing to complain of
    step(1.0)
    assert not equal([tensor for head in heads for tensor in bits(head, optimizer)], before)


def test_what_a_capture_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head()
    optimizer = FusedSGD(head, lr=0.05)
    hidden, target = make_batch(seeded(1))
    before = head.weight.clone()
    with monkeypatch.context() as during:
        during.setattr(_device, "capturing", lambda device: True)
        with pytest.raises(BackendError, match="run one step before"):
            head(hidden, target)
    train_on(head, optimizer, hidden, target)
    with monkeypatch.context() as during:
        during.setattr(_device, "capturing", lambda device: True)
        head(hidden, target).loss.backward()
    with pytest.raises(Error, match=r"capture its step\(\) too"):
        optimizer.step()
    optimizer.zero_grad()
    train_on(head, optimizer, hidden, target)
    assert steps_of(head, optimizer) == 2 and not torch.equal(head.weight, before)


@pytest.mark.parametrize("kind", ["sgd", "rmsprop"])
def test_moving_there_and_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of training, with what the optimiser keeps; against a head that stays on the CPU."""

    def go(there: bool) -> str:
        if not _core.cuda_emulated:
            return "cuda" if there else "cpu"
        if there:
            emulate(monkeypatch)
        else:
            monkeypatch.setattr(_device, "_gpu_type", "none")
            monkeypatch.setattr(_device, "_export", to_dlpack)
        return "cpu"

    heads = []
    for moves in (True, False):
        with torch.device(go(False)):
            head = make_head("taylor_softmax", bias=True)
            optimizer = FusedSGD(head, 0.02, 0.8, 0.01) if kind == "sgd" else FusedRMSprop(head, 1e-3, momentum=0.8)
            generator = torch.Generator().manual_seed(2)
            batches = [make_batch(generator) for _ in range(12)]
        for i, (hidden, target) in enumerate(batches):
            there = moves and 4 <= i < 8
            if moves and i in (4, 8):
                weight = head.weight.detach().cpu().clone()
                head.to(go(there))
                assert torch.equal(head.weight.cpu(), weight)
            spot = head._stored().device
            train_on(head, optimizer, hidden.to(spot), target.to(spot))
            assert isinstance(head._exact().core, DeviceCore) == there
        assert steps_of(head, optimizer) == 12
        heads.append(head)
    assert_near(heads[0].weight, heads[1].weight)


def test_peculiar_batches() -> None:
    """No class at all, no example, one example, many, and rows that nobody targets: as dense layers have it."""
    head = make_head(bias=True)
    linear = head.to_linear()
    optimizer, theirs = FusedSGD(head, lr=0.001), torch.optim.SGD(linear.parameters(), lr=0.001)
    for i, rows in enumerate((1, 0, 70, 3)):
        hidden = torch.randn(rows, d, dtype=torch.float64, generator=seeded(i))
        target = torch.full((rows,), -100) if i == 3 else torch.arange(rows) % D
        A, q, _ = head.statistics(hidden, target)
        loss, o = (q - 2 * A).sum(), linear(hidden)
        y = one_hot(target) if rows else torch.zeros(0, D)
        optimizer.zero_grad()
        theirs.zero_grad()
        loss.backward()
        ((o**2) - 2 * o * y).sum().backward()
        optimizer.step()
        theirs.step()
        assert_same_layer(head, linear)


@pytest.mark.parametrize("loss", LOSSES)
def test_wide_factors_beside_float32(loss: str) -> None:
    """As near to float64 as float32 rows can be."""
    head, exact = make_head(loss, torch.float32, factors="float64"), make_head(loss)
    for h in (head, exact):
        optimizer, generator = FusedSGD(h, lr=0.01), seeded(3)
        for _ in range(20):
            train_on(h, optimizer, *make_batch(generator))
    assert core_of(head)._head["wide"]
    assert_near(head.weight, exact.weight, 2e-6)
    hidden, target = make_batch(seeded(5))
    want = dense_losses(exact, hidden @ exact.weight.T, one_hot(target))[target >= 0].mean()
    assert_near(head(hidden.float(), target).loss, want, 1e-5)
