"""test_torch_sparse_gpu.py -- inputs and rewiring of the sparse head on a GPU: the CPU's bits, and nothing waits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from devices import only_gpu  # noqa: E402
from test_torch_dense import D  # noqa: E402
from test_torch_dense import d as H  # noqa: E402
from test_torch_optim import same  # noqa: E402
from test_torch_sparse import K  # noqa: E402
from widehead import ShapeError, _core  # noqa: E402
from widehead import numpy as whnp  # noqa: E402
from widehead.torch import FusedAdam, FusedSGD, SparseHead, _device  # noqa: E402
from widehead.torch._owner import PENDING  # noqa: E402

MODES: list[dict[str, Any]] = [
    {},
    {"rewire_mode": "magnitude_row", "rewire_fraction": 0.5},
    {"rewire_mode": "threshold", "rewire_threshold": 0.2, "rewire_keep_value": True},
]


def make(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> SparseHead:
    return SparseHead(H, D, K, dtype=dtype, device=device, **{"seed": 3, **options})


def twin(head: SparseHead) -> whnp.SparseHead:
    """A NumPy head with the same options and weights."""
    o = head.options
    names = ("group_size", "rewire_mode", "rewire_every", "rewire_fraction", "rewire_end", "rewire_threshold")
    options = {name: getattr(o, name) for name in names} | {"rewire_keep_value": o.rewire_keep_value}
    return whnp.SparseHead(H, D, K, seed=3, **options)


def array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def equal(head: SparseHead, other: whnp.SparseHead) -> bool:
    return np.array_equal(array(head.weight), other.weight) and np.array_equal(array(head.index), other.index)


def close_step(optimizer: FusedSGD | FusedAdam, applied: int = 1) -> None:
    """What a fused backward on a GPU leaves, and the step() after it."""
    for owner in optimizer._owners:
        owner.control[PENDING] = 1
        owner.applied = torch.tensor(applied, device=owner.head.weight.device)
    optimizer.step()


@only_gpu
@pytest.mark.parametrize("group", [1, 16])
def test_a_new_head_is_the_cpu_s(group: int, device: str) -> None:
    head = make(device, group_size=group)
    assert equal(head, twin(head)) and _device.on_gpu(head.index) and head.index.dtype == torch.uint16
    head.reset_parameters(9)
    assert np.array_equal(array(head.index), whnp.SparseHead(H, D, K, seed=9, group_size=group).index)
    head.reset_parameters(3)
    head.grow(D + 50)
    assert np.array_equal(array(head.index), whnp.SparseHead(H, D + 50, K, seed=3, group_size=group).index)


@only_gpu
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("group", [1, 5])
def test_rewiring_by_hand_is_the_cpu_s(group: int, options: dict[str, Any], device: str) -> None:
    """The number that moved is a tensor there, and no other number differs."""
    head = make(device, group_size=group, **options)
    other = twin(head)
    for step in (4, 2**40):
        moved = head.rewire(step=step)
        assert isinstance(moved, Tensor) and moved.shape == () and moved.dtype == torch.int64
        assert _device.on_gpu(moved) and int(moved) == other.rewire(step=step) > 0
        assert equal(head, other)


@only_gpu
@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_state_of_a_plain_optimizer_is_carried_along(state: str, device: str) -> None:
    """However many tensors it has; the step of the draw is the optimiser's, on the device too."""
    names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 1 + ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"].index(state)]
    for dtype in (torch.float32, torch.bfloat16):
        head, by_number = make(device, dtype), make(device, dtype)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
        kept = torch.arange(1, D * K + 1, device=device).reshape(D, K).remainder(200).to(dtype)
        optimizer.state[head.weight] = {name: kept.clone() for name in names}
        optimizer.state[head.weight]["step"] = torch.tensor(7.0, device=device)
        index, weight = head.index.long(), head.weight.detach().clone()
        by_number.rewire(0.3, step=7)
        moved = head.rewire(0.3, optimizer=optimizer)
        assert int(moved) == round(0.3 * D * K) and torch.equal(by_number.index, head.index)
        there = (head.index.long()[:, :, None] == index[:, None, :]) & (head.weight != 0)[:, :, None]
        stays = there.any(-1)
        old = there.float().argmax(-1)
        assert int((~stays).sum()) == int(moved)
        assert torch.equal(head.weight, torch.where(stays, weight.gather(1, old), 0))
        for name in names:
            value = optimizer.state[head.weight][name]
            assert value.dtype == dtype and torch.equal(value, torch.where(stays, kept.gather(1, old), 0)), name


@only_gpu
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdam])
def test_steps_rewire_by_the_schedule(kind: Any, device: str) -> None:
    """As many at the same steps as the NumPy head moves, to the same inputs; moments are carried along."""
    options = {"rewire_every": 3, "rewire_fraction": 0.2, "rewire_end": 12, "group_size": 2}
    head = make(device, **options)
    other = twin(head)
    optimizer = kind(head, lr=0.1, **({"momentum": 0.9} if kind is FusedSGD else {}))
    slots = optimizer.slots(optimizer._owners[0])
    for value in slots.values():
        value.copy_(torch.arange(1, D * K + 1, device=device).reshape(D, K))
    state = {name: array(value).copy() for name, value in slots.items()}
    for step in range(1, 15):
        before = head.index.clone()
        close_step(optimizer)
        fraction = head.options.fraction_after(step)
        assert torch.equal(before, head.index) == (fraction is None)
        assert (fraction is not None) == (step in (3, 6, 9))
        if fraction is not None:
            _core.rewire(
                weight=other.weight, index=other.index, group_size=2, in_features=H, fraction=fraction, seed=3,
                step=step, **state,
            )  # fmt: skip
        assert equal(head, other)
    assert all(np.array_equal(array(value), state[name]) for name, value in slots.items())


@only_gpu
def test_nothing_moves_after_a_refused_step(device: str) -> None:
    """The schedule counts it, the draw does not: what moves next is what moves at the device's step."""
    head, other = make(device, rewire_every=2), make(device)
    optimizer = FusedSGD(head, lr=0.1)
    before = head.index.clone()
    for applied in (1, 0, 1):
        close_step(optimizer, applied)
    assert torch.equal(head.index, before) and int(optimizer.state[head.weight]["step"]) == 2
    close_step(optimizer)
    other.rewire(step=3)
    assert torch.equal(head.index, other.index) and not torch.equal(head.index, before)


@only_gpu
def test_a_checkpoint_resumes_the_schedule(device: str) -> None:
    heads = [make(device, rewire_every=2) for _ in range(2)]
    optimizers = [FusedAdam(head, lr=0.1) for head in heads]
    for _ in range(3):
        close_step(optimizers[0])
    heads[1].load_state_dict(heads[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    before = heads[1].index.clone()
    for optimizer in optimizers:
        close_step(optimizer)
    assert torch.equal(heads[0].index, heads[1].index) and not torch.equal(heads[1].index, before)
    assert same(optimizers[0].state_dict(), optimizers[1].state_dict())


@only_gpu
def test_no_rewiring_inside_a_capture(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make(device, rewire_every=1)
    optimizer = FusedSGD(head, lr=0.1)
    before = head.index.clone()
    with monkeypatch.context() as during:
        during.setattr(_device, "capturing", lambda device: True)
        close_step(optimizer)
    assert torch.equal(head.index, before)
    assert int(head.rewire()) > 0  # between replays, at the device's step
    other = make(device)
    other.rewire(step=1)
    assert torch.equal(head.index, other.index)


@only_gpu
def test_bad_index_is_refused_every_time(device: str) -> None:
    head = make(device)
    head._check_index()
    seen: list[str] = []
    with torch.no_grad():
        head.index[5] = torch.tensor([0, 1, 2, H], device=device, dtype=torch.int32).to(torch.uint16)
    weight = head.weight.detach().clone()
    for use in (head._check_index, head._check_index, head.rewire):
        with pytest.raises(ShapeError, match=rf"index: expected inputs in \[0, {H}\), got {H} at row 5") as caught:
            use()
        seen.append(str(caught.value))
    assert len(seen) == 3 and torch.equal(head.weight, weight)
    head.check()  # nothing is left over
    with torch.no_grad():
        head.index[5] = torch.arange(K, device=device, dtype=torch.int32).to(torch.uint16)
    assert int(head.rewire()) > 0


@only_gpu
def test_own_changes_are_not_looked_at_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    core = _core.check_index
    monkeypatch.setattr(_core, "check_index", lambda **given: (calls.append(1), core(**given)))
    head = make(device, rewire_every=1)
    optimizer = FusedSGD(head, lr=0.1)
    for _ in range(3):
        close_step(optimizer)
        head._check_index()
    assert not calls
    with torch.no_grad():
        head.index.copy_(make(device).index)
    head._check_index()
    head._check_index()
    assert len(calls) == 1
    head.index = head.index.int()  # another type: taken in its own
    head._check_index()
    assert head.index.dtype == torch.uint16 and len(calls) == 2


@only_gpu
@pytest.mark.parametrize("options", MODES, ids=str)
def test_no_number_is_read_back(options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make(device, rewire_every=1, **options)
    optimizer = FusedAdam(head, lr=0.1)
    close_step(optimizer)
    seen = [head.index.clone()]

    def waits(tensor: Tensor, *_: Any) -> Any:
        raise AssertionError("a number is read back from the device")

    with monkeypatch.context() as during:
        for name in ("item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__"):
            during.setattr(Tensor, name, waits)
        head.after_step(torch.ones((), dtype=torch.int64, device=device))
        seen.append(head.index.clone())
        moved = head.rewire()
        seen.append(head.index.clone())
        with pytest.raises(AssertionError, match="read back"):
            int(moved)
    assert int(moved) > 0
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
