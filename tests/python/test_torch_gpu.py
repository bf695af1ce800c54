"""tests/python/test_torch_gpu.py -- what is so on a GPU alone: recorded faults, steps counted there, padding, halves.

These run on a real GPU and on the emulated one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from devices import only_gpu  # noqa: E402
from test_torch_dense import B, D, assert_near, d, make_batch, make_head, make_labels  # noqa: E402
from test_torch_optim import same, snapshot, unchanged  # noqa: E402
from widehead import DtypeError, FileError, LabelError, NonFiniteError  # noqa: E402
from widehead import numpy as whnp  # noqa: E402
from widehead.sampling import IGNORED, Proposal, sample_classes  # noqa: E402
from widehead.torch import DenseHead, FusedAdam, FusedSGD, _device, _sampled  # noqa: E402

SAMPLED = {"loss": "sampled_softmax", "negatives": 6}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{}, {"loss": "bce"}, SAMPLED], ids=["softmax", "bce", "sampled"])
@only_gpu
def test_bad_labels_are_recorded(options: dict[str, Any], fused: bool, device: str) -> None:
    """The row's loss is NaN, nothing moves, and the error names the label, wherever it is asked for; once."""
    head = make_head(device, reduction="none", class_weight=True, **options)
    optimizer = FusedAdam(head, lr=0.1) if fused else None
    hidden, target = make_batch(device)
    hidden.requires_grad_()
    bad, before = target.clone(), snapshot(head)
    bad[3], bad[5] = D, -7
    losses = head(hidden, bad).loss
    assert losses.isnan().tolist() == [False, False, False, True, False, True, False]
    losses.sum().backward()
    assert unchanged(head, before)
    # One of them: which is first, no GPU promises.
    either = f"label ({D} at position 3|-7 at position 5) is out of range: expected 0 to {D - 1}"
    with pytest.raises(LabelError, match=either):
        head.check()
    head.check()
    if optimizer is None:
        return
    optimizer.step()
    assert unchanged(head, before) and int(optimizer.state[head.weight]["step"]) == 0
    assert not optimizer.state[head.weight]["exp_avg_sq"].any()
    head(hidden, target).loss.sum().backward()
    optimizer.step()
    assert not unchanged(head, before) and int(optimizer.state[head.weight]["step"]) == 1


@only_gpu
def test_a_repeated_label_is_recorded(device: str) -> None:
    labels, _ = make_labels(device)
    labels.indices[1] = labels.indices[0]
    labels.indptr[1:] = labels.indptr[1:].clamp(min=2)
    head = make_head(device, loss="bce")
    head(make_batch(device)[0], labels)
    with pytest.raises(LabelError, match="twice"):
        head.check()


@only_gpu
def test_step_raises_what_an_earlier_step_has_met(device: str) -> None:
    """Without waiting: as soon as the copy of the record has arrived. The step that raises is closed."""
    head = make_head(device)
    optimizer = FusedSGD(head, lr=0.1)
    hidden, target = make_batch(device)
    steps = [torch.where(target == target[2], D + 4, target), target, target]
    for i, labels in enumerate(steps):
        before = snapshot(head)
        head(hidden, labels).loss.backward()
        wait(device)
        if i == 1:
            with pytest.raises(LabelError, match=f"label {D + 4} at position 2"):
                optimizer.step()
        else:
            optimizer.step()
        wait(device)
        assert unchanged(head, before) == (i == 0)
    assert int(optimizer.state[head.weight]["step"]) == 2
    head.check()


@only_gpu
def test_save_and_grow_ask_for_bad_values(device: str, tmp_path: Path) -> None:
    head = make_head(device)
    hidden, target = make_batch(device)
    for ask in (lambda: head.save(tmp_path / "head"), lambda: head.grow(D + 1)):
        head(hidden, target + D)
        with pytest.raises(LabelError, match="target"):
            ask()
    assert not (tmp_path / "head").exists() and head.n_classes == D
    head.save(tmp_path / "head")


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["softmax", "sampled"])
@only_gpu
def test_under_a_scaler_labels_are_faults_and_overflows_are_not(options: dict[str, Any], device: str) -> None:
    head = make_head(device, torch.float32, **options)
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    optimizer = FusedAdam(head, lr=0.1, grad_scaler=scaler)
    hidden, target = make_batch(device, torch.float32)
    state: Any = None
    for i, (x, y) in enumerate([(hidden, target), (hidden / 0, target), (hidden, target + D), (hidden, target)]):
        before, scale = snapshot(head), scaler.get_scale()
        x = x.clone().requires_grad_()
        optimizer.zero_grad()
        scaler.scale(head(x, y).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        refused = i in (1, 2)
        assert unchanged(head, before) == refused and scaler.get_scale() == (scale / 2 if refused else scale)
        # Sampled softmax does not know of the scaler where the batch's gradient is taken: there it is 0.
        zero = i == 2 and "negatives" in options
        assert x.grad is not None and bool(torch.isfinite(x.grad).all()) == (zero or not refused)
        assert not zero or not x.grad.any()
        if refused:
            assert same(state, optimizer.state_dict())
        state = copy.deepcopy(optimizer.state_dict())
        if i == 2:
            with pytest.raises(LabelError, match="out of range"):
                head.check()
        head.check()
    assert int(optimizer.state[head.weight]["step"]) == 2


@only_gpu
def test_without_a_scaler_an_overflow_is_a_fault(device: str) -> None:
    """The gradient that comes in is not finite; the one that goes out is 0."""
    head = make_head(device, torch.float32)
    FusedSGD(head, lr=0.1)
    hidden, target = make_batch(device, torch.float32)
    hidden.requires_grad_()
    (head(hidden, target).loss * torch.inf).backward()
    assert hidden.grad is not None and not hidden.grad.any()
    with pytest.raises(NonFiniteError, match="grad_losses"):
        head.check()


@pytest.mark.parametrize("proposal", ["uniform", "log_uniform", "weights"])
@pytest.mark.parametrize("ignore_index", [None, -100, 3])
@only_gpu
def test_the_classes_are_those_of_the_cpu(proposal: str, ignore_index: int | None, device: str) -> None:
    """Classes, offsets and positions of widehead.sampling for the same seed, then padding."""
    given: Any = np.linspace(0.1, 2, D) if proposal == "weights" else proposal
    ours, key = Proposal(given, D), 0
    key = _sampled.register_proposal(ours)
    for seed, n in ((5, 1), (6, 12), (2**62 + 1, 400)):
        labels = torch.tensor([3, 36, 3, 0, 17, -100 if ignore_index == -100 else 5])
        want = sample_classes(ours, n, labels.numpy(), seed=seed, step=0, ignore_index=ignore_index)
        rows, offset, positions, count = _sampled.sample_rows(
            labels.to(device), torch.tensor(seed, device=device), key, n, ignore_index, True
        )
        a = len(want.rows)
        assert int(count) == len(rows) == n + len(labels) and count.device.type == "cpu"
        assert rows[:a].tolist() == want.rows.tolist() and bool((rows[a:] == -1).all())
        np.testing.assert_allclose(offset[:a].cpu().numpy(), want.offset, rtol=1e-6)
        assert bool(torch.isneginf(offset[a:]).all())
        assert positions.tolist() == want.indices.tolist()
        assert (ignore_index is not None) == (IGNORED in positions)


@only_gpu
def test_padding_touches_no_row(device: str) -> None:
    """A sparse gradient has the drawn rows alone, though its length is fixed; SparseAdam moves no other."""
    head = make_head(device, torch.float32, loss="sampled_softmax", negatives=30)
    hidden, target = make_batch(device, torch.float32)
    optimizer = torch.optim.SparseAdam([head.weight], lr=0.1)
    seen = torch.zeros(D, dtype=torch.bool, device=device)
    for _ in range(3):
        before = head.weight.detach().clone()
        optimizer.zero_grad()
        head(hidden, target).loss.backward()
        grad = head.weight.grad
        assert grad.is_sparse and not grad.is_coalesced() and grad._nnz() == 30 + B
        touched = torch.zeros(D, dtype=torch.bool, device=device)
        touched[grad.coalesce().indices()[0]] = True
        optimizer.step()
        assert torch.equal((head.weight != before).any(-1), touched)
        seen |= touched
    assert bool(seen.any()) and not bool(seen.all())


@only_gpu
def test_steps_are_counted_on_the_device(device: str) -> None:
    """Adam's bias correction follows the count, also after a checkpoint of the CPU's."""
    hidden, target = make_batch(device)
    plain, fused = make_head(device), make_head(device)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.0)
    optimizer = FusedAdam(fused, lr=0.05)

    def step(head: DenseHead, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        head(hidden, target).loss.backward()
        optimizer.step()

    for _ in range(3):
        step(plain, reference)
        step(fused, optimizer)
    count = optimizer.state[fused.weight]["step"]
    assert count.device == fused.weight.device and int(count) == 3

    def to_cpu(value: Any) -> Any:
        return value.cpu() if isinstance(value, Tensor) else value

    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {i: {k: to_cpu(v) for k, v in state.items()} for i, state in saved["state"].items()}
    resumed = make_head(device)
    resumed.load_state_dict(fused.state_dict())
    again = FusedAdam(resumed, lr=0.05)
    again.load_state_dict(saved)
    state = again.state[resumed.weight]
    assert all(value.device == resumed.weight.device for value in state.values())
    step(plain, reference)
    step(resumed, again)
    assert int(state["step"]) == 4
    assert_near(resumed.weight.detach(), plain.weight.detach(), 1e-9)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["softmax", "sampled"])
@only_gpu
def test_a_learning_rate_on_the_device_is_read_there(options: dict[str, Any], device: str) -> None:
    hidden, target = make_batch(device)
    head, other = make_head(device, **options), make_head(device, **options)
    lr = torch.tensor(0.25, device=device)
    optimizers = FusedSGD(head, lr=lr, momentum=0.5), FusedSGD(other, lr=0.25, momentum=0.5)
    update = optimizers[0].core_update(head._owner)
    assert "lr" not in update and update["device_lr"].device == head.weight.device
    for i, rate in enumerate((0.25, 0.5, 0.0)):
        lr.fill_(rate)
        optimizers[1].param_groups[0]["lr"] = rate
        before = snapshot(head)
        for module, optimizer in ((head, optimizers[0]), (other, optimizers[1])):
            torch.manual_seed(i)
            module(hidden, target).loss.backward()
            optimizer.step()
        assert torch.equal(head.weight, other.weight) and unchanged(head, before) == (rate == 0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@only_gpu
def test_float16_weights(rounding: str, device: str) -> None:
    """Steps of an eighth of an ulp: nearest stalls, the others drift as float32 weights do."""
    hidden, target = make_batch(device, torch.float16)
    drift = []
    for dtype in (torch.float16, torch.float32):
        head = make_head(device, dtype)
        with torch.no_grad():
            head.weight.fill_(1.0)
        assert head.bias is not None and head.bias.dtype == torch.float32
        optimizer = FusedSGD(head, lr=2.5e-4, rounding=rounding, seed=1)
        for _ in range(100):
            head(hidden, target).loss.backward()
            optimizer.step()
        drift.append((head.weight.double() - 1).detach())
        if dtype == torch.float16:
            assert ("compensation" in optimizer.state[head.weight]) == (rounding == "kahan")
    got, exact = drift
    if rounding == "nearest":
        assert not got.any()
    elif rounding == "kahan":
        assert float((got - exact).norm()) < 0.15 * float(exact.norm())
    else:
        assert float((got * exact).sum()) / float(exact.norm()) ** 2 == pytest.approx(1.0, abs=0.35)


@only_gpu
def test_float16_gradients_and_files(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(device, torch.float16)
    hidden, target = make_batch(device, torch.float16)
    output = head(hidden.requires_grad_(), target)
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and head.weight.grad.dtype == torch.float16
    want = make_head(device, torch.float64)
    want.load_state_dict(head.state_dict())
    want(hidden.detach().double(), target).loss.backward()
    assert_near(head.weight.grad, want.weight.grad, 2e-3)
    head.save(tmp_path / "head")
    back = DenseHead.load(tmp_path / "head", device=device)
    assert back.weight.dtype == torch.float16 and torch.equal(back.weight, head.weight)
    assert torch.equal(back(hidden, target).loss, output.loss)
    with pytest.raises(FileError, match=r"float16 is for GPUs.*head\.to\(torch\.float32\)"):
        whnp.DenseHead.load(tmp_path / "head")
    # What no CPU computes with can still be kept there.
    monkeypatch.setattr(_device, "_gpu_type", "cuda")
    kept = DenseHead.load(tmp_path / "head", device="cpu")
    assert torch.equal(kept.weight, head.weight.cpu())
    with pytest.raises(DtypeError, match="weight: float16 is for a GPU"):
        kept(hidden.detach().cpu(), target.cpu())
    with pytest.raises(DtypeError, match="float16 weights are for a GPU"):
        DenseHead(d, D, dtype=torch.float16, device="cpu")


@only_gpu
def test_float16_hidden_that_overflows_makes_weight_gradients_nan(device: str) -> None:
    """In plain mode whoever scales the loss sees it, without the host having looked."""
    head = make_head(device, torch.float32)
    hidden, target = make_batch(device, torch.float16)
    hidden.requires_grad_()
    (head(hidden, target).loss * 2.0**40).backward()
    assert hidden.grad is not None and not bool(torch.isfinite(hidden.grad).all())
    assert bool(head.weight.grad.isnan().all()) and bool(head.bias.grad.isnan().all())


class Reads:
    """Fails a test in which Python reads a tensor of the device; `allowed` are those that lie on the host anyway."""

    NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed: list[Tensor] = []
        for name in self.NAMES:
            monkeypatch.setattr(torch.Tensor, name, self._guard(name, getattr(torch.Tensor, name)))

    def _guard(self, name: str, method: Any) -> Any:
        def guarded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            known = [t.untyped_storage().data_ptr() for t in self.allowed]
            if _device.on_gpu(tensor) and tensor.untyped_storage().data_ptr() not in known:
                raise AssertionError(f"Tensor.{name} of {tensor.dtype} {list(tensor.shape)} waits for the device")
            return method(tensor, *args, **kwargs)

        return guarded


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"loss": "bce"}, SAMPLED], ids=str)
@only_gpu
def test_no_step_reads_the_device(
    options: dict[str, Any], scaled: bool, half: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python asks for; test_torch_cuda.py has torch itself look where there is a GPU."""
    head = make_head(device, torch.float32, class_weight=True, **options)
    scaler = torch.amp.GradScaler(device, init_scale=64.0) if scaled else None
    optimizer = FusedAdam(head, lr=torch.tensor(0.1, device=device), grad_scaler=scaler)
    hidden, target = make_batch(device, torch.float16 if half else torch.float32)
    hidden.requires_grad_()
    before = snapshot(head)
    with monkeypatch.context() as patch:
        reads = Reads(patch)
        assert head._control is not None
        faults = _device.faults_of(head.weight.device)
        reads.allowed += [head._control, faults._seen]
        choose = _sampled.sample_on_gpu

        def remember(*args: Any) -> Any:
            chosen = choose(*args)
            reads.allowed.append(chosen[3])
            return chosen

        patch.setattr(_sampled, "sample_on_gpu", remember)
        with pytest.raises(AssertionError, match="waits"):
            float(hidden[1, 1])
        for _ in range(2):
            optimizer.zero_grad()
            loss = head(hidden, target).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    assert not unchanged(head, before)
    assert int(optimizer.state[head.weight]["step"]) == 2
