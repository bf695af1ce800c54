"""tests/python/test_torch_rewire.py -- rewiring of the sparse head in training: fused, plain and in NumPy alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from test_torch_dense import D, assert_near, make_batch, make_labels  # noqa: E402
from test_torch_dense import d as H  # noqa: E402
from test_torch_optim import FUSED, PLAIN, same, snapshot, unchanged  # noqa: E402
from test_torch_sparse import K, inputs_of, make_head, train, valid_index  # noqa: E402
from widehead import Labels  # noqa: E402
from widehead import numpy as whnp  # noqa: E402
from widehead.torch import FusedSGD  # noqa: E402


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("group", [1, 16])
def test_rewiring_is_the_same_everywhere(name: str, group: int, device: str) -> None:
    """Fused, plain with torch's optimiser, and NumPy: the same connections move at the same steps."""
    options = {"rewire_every": 3, "rewire_fraction": 0.2, "rewire_end": 12, "group_size": group}
    fused, plain = make_head(device=device, **options), make_head(device=device, **options)
    array = whnp.SparseHead(H, D, K, dtype="float64", seed=3, **options)
    array.load_state_dict({key: value.detach().cpu().numpy() for key, value in fused.state_dict().items()})
    start = fused.index.long()
    train(fused, FUSED[name](fused), range(13))
    optimizer, moved = PLAIN[name](plain.parameters()), []

    def rewire(step: int) -> None:
        fraction = plain.options.fraction_after(step)
        if fraction is not None:
            moved.append(plain.rewire(fraction, optimizer=optimizer, step=step))

    train(plain, optimizer, range(13), rewire)
    lr, decay = {"sgd": (0.3, 0.0), "momentum": (0.2, 0.01), "adam": (0.05, 0.0)}[name]
    for step in range(13):
        hidden, _ = make_batch("cpu", rows=5 + step % 3)
        labels, _ = make_labels("cpu", rows=5 + step % 3)
        goal = Labels(*(part.numpy() for part in (labels.indptr, labels.indices, labels.values)), D)
        array.step(hidden.numpy(), goal, lr, name, weight_decay=decay)
    connections = fused.index.numel()
    assert moved == [int(0.1 * (1 + np.cos(np.pi * s / 12)) * connections + 0.5) for s in (3, 6, 9)]
    for head in (fused, plain):
        assert valid_index(head)
        assert_near(head.weight.detach().cpu(), torch.from_numpy(array.weight), 1e-9)
        assert torch.equal(head.index.cpu().int(), torch.from_numpy(array.index.astype(np.int32)))
    assert not torch.equal(fused.index.long(), start)


@pytest.mark.parametrize("state", ["none", "momentum", "adam", "amsgrad", "bfloat16"])
def test_rewiring_by_hand_carries_all_state(state: str, device: str) -> None:
    head = make_head(torch.bfloat16 if state == "bfloat16" else torch.float64, device=device, group_size=3)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9 if state == "momentum" else 0.0)
        if state in ("none", "momentum")
        else torch.optim.Adam(head.parameters(), lr=0.01, amsgrad=state == "amsgrad")
    )
    train(head, optimizer, range(2))
    kept = {n: v for n, v in optimizer.state[head.weight].items() if isinstance(v, Tensor) and v.shape == (D, K)}
    assert len(kept) == {"none": 0, "momentum": 1, "adam": 2, "amsgrad": 3, "bfloat16": 2}[state]
    for i, value in enumerate(kept.values()):
        value.copy_(torch.arange(1 + i, D * K + 1 + i).reshape(D, K) % 200)
    before, old = {n: v.clone() for n, v in kept.items()}, inputs_of(head)
    weight = head.weight.detach().clone()
    head(*make_batch(device, head.weight.dtype)).loss.backward()
    assert head.rewire(0.25, optimizer=optimizer) == round(0.25 * head.index.numel()) and valid_index(head)
    assert head.weight.grad is None
    new = inputs_of(head)
    for name, value in {**kept, "weight": head.weight.detach()}.items():
        origin = {**before, "weight": weight}[name]
        want = torch.zeros_like(value)
        for c in range(D):
            where = {int(source): k for k, source in enumerate(old[c])}
            for k, source in enumerate(new[c].tolist()):
                if head.weight[c, k] != 0 and source in where:
                    want[c, k] = origin[c, where[source]]
        assert torch.equal(value, want)
    fresh = head.weight.detach() == 0
    assert 0.2 * D * K <= int(fresh.sum()) <= 0.3 * D * K


def test_rewiring_modes_and_draws() -> None:
    strengths = make_head().weight.detach().abs()
    for mode, more, want in (
        ("magnitude_global", {}, round(0.1 * D * K)),
        ("magnitude_row", {"fraction": 0.5}, D * 2),
        ("threshold", {"threshold": 0.1}, int((strengths.float() < 0.1).sum())),
    ):
        head = make_head()
        assert head.rewire(mode=mode, step=1, **more) == want > 0 and valid_index(head)
        assert int((head.weight == 0).sum()) == want
    indices = []
    for step in (1, 1, 2):
        head = make_head()
        head.rewire(step=step)
        indices.append(head.index.long())
    assert torch.equal(indices[0], indices[1]) and not torch.equal(indices[0], indices[2])
    torch.manual_seed(1)
    first = make_head()
    first.rewire()
    torch.manual_seed(1)
    second = make_head()
    second.rewire()
    assert torch.equal(first.index, second.index)
    kept = make_head(rewire_keep_value=True)
    values = kept.weight.detach().flatten().sort().values
    assert kept.rewire() > 0 and torch.equal(kept.weight.detach().flatten().sort().values, values)


def test_rewiring_is_off_where_told(device: str) -> None:
    for options in ({"rewire_every": None}, {"rewire_every": 0}, {"rewire_every": 5}):
        head = make_head(device=device, **options)
        before = head.index.clone()
        train(head, FusedSGD(head, lr=0.1), range(4))
        assert torch.equal(head.index, before)


def test_graph_from_before_a_rewiring_is_refused(device: str) -> None:
    head = make_head(device=device)
    loss = head(*make_batch(device)).loss
    head.rewire()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("rounding", [None, "kahan"])
def test_checkpoint_resumes_bit_for_bit(name: str, rounding: str | None, tmp_path: Path, device: str) -> None:
    options: dict[str, Any] = {"rewire_every": 2, "rewire_fraction": 0.3, "rewire_end": 20, "group_size": 2}
    dtype = torch.float32 if rounding is None else torch.bfloat16
    head = make_head(dtype, device=device, **options)
    optimizer = FUSED[name](head, rounding=rounding)
    train(head, optimizer, range(3))
    torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(head, optimizer, range(3, 9))
    resumed = make_head(dtype, device=device, **options)
    resumed_optimizer = FUSED[name](resumed)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["head"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, resumed_optimizer, range(3, 9))
    assert torch.equal(head.weight, resumed.weight) and torch.equal(head.bias, resumed.bias)
    assert torch.equal(head.index, resumed.index)
    assert not torch.equal(head.index.cpu(), make_head(dtype, **options).index)
    assert same(optimizer.state_dict(), resumed_optimizer.state_dict())


def test_grad_scaler(device: str) -> None:
    """An overflow skips the step and its rewiring."""
    head = make_head(torch.float32, device=device, rewire_every=1)
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    optimizer = FusedSGD(head, lr=0.1, grad_scaler=scaler)
    hidden, target = make_batch(device, torch.float32)
    for bad, scale in ((False, 64.0), (True, 32.0)):
        before, index = snapshot(head), head.index.clone()
        scaler.scale(head(torch.full_like(hidden, torch.inf) if bad else hidden, target).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert unchanged(head, before) == torch.equal(head.index, index) == bad and scaler.get_scale() == scale
