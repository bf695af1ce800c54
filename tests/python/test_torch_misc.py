"""tests/python/test_torch_misc.py -- a head as a citizen of PyTorch: copies, files, devices, autocast, checkpointing,
workers.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from test_torch_dense import B, D, assert_near, d, make_batch, make_head, make_labels  # noqa: E402
from test_torch_optim import Net, snapshot, unchanged  # noqa: E402
from torch_devices import is_gpu  # noqa: E402
from widehead import BackendError, DtypeError, FileError, ShapeError, _core  # noqa: E402
from widehead import numpy as whnp  # noqa: E402
from widehead.torch import DenseHead, FusedAdam, FusedSGD, _glue  # noqa: E402

SAMPLED = {"loss": "sampled_softmax", "negatives": 5, "proposal": torch.linspace(1, 2, D)}


def same_parameters(a: DenseHead, b: DenseHead) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.owned_parameters(), b.owned_parameters(), strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["softmax", "sampled"])
def test_copies_belong_to_nobody(how: str, options: dict[str, Any], device: str) -> None:
    head = make_head(device, class_weight=True, **options)
    optimizer = FusedSGD(head, lr=0.1)
    twin = copy.deepcopy(head) if how == "deepcopy" else pickle.loads(pickle.dumps(head))
    assert same_parameters(head, twin) and twin.weight.requires_grad and twin._owner is None
    assert head._owner is not None and not head.weight.requires_grad
    before = snapshot(twin)
    hidden, target = make_batch(device)
    for module in (head, twin):
        torch.manual_seed(1)
        module(hidden, target).loss.backward()
    assert unchanged(twin, before) and not unchanged(head, before) and twin.weight.grad is not None
    optimizer.step()
    FusedAdam(twin, lr=0.1)


def test_meta_device(device: str) -> None:
    head = DenseHead(d, D, class_weight=torch.linspace(1, 2, D), device="meta", seed=3)
    assert head.weight.is_meta
    hidden, target = make_batch(device, torch.float32)
    with pytest.raises(BackendError, match="to_empty"):
        head(hidden, target)
    with pytest.raises(BackendError, match="to_empty"):
        FusedSGD(head, lr=0.1)
    head.to_empty(device=device)
    head.reset_parameters()
    real = make_head(device, torch.float32, class_weight=torch.linspace(1, 2, D))
    assert same_parameters(head, real)
    assert torch.equal(head(hidden, target).loss, real(hidden, target).loss)
    head.to("meta").to_empty(device=device)
    assert head.class_weight is not None and torch.equal(head.class_weight, real.class_weight)


def test_options_follow_the_device_but_not_the_dtype(device: str) -> None:
    head = make_head(device, torch.float32, class_weight=True)
    head.to(torch.float64)
    assert head.class_weight is not None and head.class_weight.dtype == torch.float32
    assert head.weight.dtype == torch.float64 and head.class_weight.device == head.weight.device
    hidden, target = make_batch(device)
    assert head(hidden, target).loss.dtype == torch.float64


def test_state_dict(device: str) -> None:
    head = make_head(device, **SAMPLED)
    assert list(head.state_dict()) == ["weight", "bias"]
    assert list(make_head(device, bias=False).state_dict()) == ["weight"]
    other = DenseHead(d, D, device=device, dtype=torch.float64, seed=9)
    assert not torch.equal(other.weight, head.weight)
    other.load_state_dict(head.state_dict())
    assert same_parameters(head, other)
    linear = nn.Linear(d, D, device=device, dtype=torch.float64)
    head.load_state_dict(linear.state_dict())
    assert torch.equal(head.weight, linear.weight)


def test_from_and_to_linear_share(device: str) -> None:
    linear = nn.Linear(d, D, device=device, dtype=torch.float64)
    head = DenseHead.from_linear(linear, label_smoothing=0.1, class_weight=torch.ones(D))
    assert head.weight is linear.weight and head.bias is linear.bias
    hidden, target = make_batch(device)
    assert_near(head.scores(hidden), linear(hidden).detach())
    want = nn.functional.cross_entropy(linear(hidden), target, label_smoothing=0.1)
    assert_near(head(hidden, target).loss, want)
    back = head.to_linear()
    assert back.weight is linear.weight and back.bias is linear.bias
    assert DenseHead.from_linear(nn.Linear(d, D, bias=False)).to_linear().bias is None
    with pytest.raises(ShapeError, match="linear"):
        DenseHead.from_linear(nn.Bilinear(2, 2, 2))
    if not is_gpu("cpu"):
        with pytest.raises(DtypeError, match="float16"):
            DenseHead.from_linear(nn.Linear(d, D, dtype=torch.float16))


def test_seeds(device: str) -> None:
    """The same seed, the same weights: here, in NumPy, and in a head that has grown to its size."""
    a, b = (DenseHead(d, D, device=device, seed=4) for _ in range(2))
    assert same_parameters(a, b)
    assert torch.equal(a.weight.cpu(), torch.from_numpy(whnp.DenseHead(d, D, seed=4).weight))
    b.reset_parameters(seed=5)
    assert not torch.equal(a.weight, b.weight)
    bound = d**-0.5
    weight = a.weight.detach()
    assert float(weight.min()) >= -bound and float(weight.max()) < bound and float(weight.std()) > 0.5 * bound
    torch.manual_seed(7)
    first, second = DenseHead(d, D), DenseHead(d, D)
    torch.manual_seed(7)
    assert same_parameters(DenseHead(d, D), first) and not same_parameters(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grow(dtype: torch.dtype, device: str) -> None:
    head = DenseHead(d, D, device=device, dtype=dtype, seed=4, class_weight=torch.ones(D))
    weight = head.weight
    with torch.no_grad():
        weight[0] = 7
    with pytest.raises(ShapeError, match="class_weight"):
        head.grow(D + 6)
    assert head.n_classes == D == len(head.weight)
    head.grow(D + 6, class_weight=torch.ones(D + 6))
    assert head.weight is weight and head.weight.shape == (D + 6, d) and head.n_classes == D + 6
    assert bool((head.weight[0] == 7).all())
    large = DenseHead(d, D + 6, device=device, dtype=dtype, seed=4)
    assert torch.equal(head.weight[1:], large.weight[1:])
    hidden, target = make_batch(device, dtype)
    target[1] = D + 5
    head(hidden, target).loss.backward()
    assert head.weight.grad is not None and head.weight.grad.shape == (D + 6, d)
    with pytest.raises(ShapeError, match="n_classes"):
        head.grow(D)
    sampled = make_head(device, loss="sampled_softmax", negatives=5)
    sampled.grow(D + 1)
    sampled(hidden.double(), torch.where(target > D, D, target)).loss.backward()
    weighted = make_head(device, **SAMPLED)
    with pytest.raises(ShapeError, match="proposal"):
        weighted.grow(D + 1)
    weighted.grow(D + 1, proposal=torch.ones(D + 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "softcap": 5.0, "class_weight": np.linspace(1, 2, D, dtype=np.float32)},
        {"loss": "sampled_softmax", "negatives": 3, "proposal": np.linspace(1, 2, D), "bias": False},
        {"loss": "bce", "reduction": "sum", "ignore_index": 5},
    ],
    ids=["softmax", "sampled", "bce"],
)
def test_files_are_shared_with_numpy(dtype: str, options: dict[str, Any], tmp_path: Path, device: str) -> None:
    hidden = torch.randn(B, d, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    array = hidden.view(torch.uint16).numpy() if dtype == "bfloat16" else hidden.numpy()
    torch_options = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    ours = DenseHead(d, D, dtype=getattr(torch, dtype), device=device, seed=4, **torch_options)
    ours.save(tmp_path / "ours.safetensors")
    theirs = whnp.DenseHead.load(tmp_path / "ours.safetensors")
    theirs.save(tmp_path / "theirs.safetensors")
    back = DenseHead.load(tmp_path / "theirs.safetensors", device=device)
    assert same_parameters(ours, back) and repr(ours) == repr(back) and back.seed == 4
    assert back.weight.requires_grad and back.weight.dtype == ours.weight.dtype
    # The CPU gives NumPy the same bits; a GPU adds up in another order.
    slack = {"rtol": 1e-11 if dtype == "float64" else 1e-4, "atol": 1e-6} if is_gpu(device) else {"rtol": 0, "atol": 0}
    np.testing.assert_allclose(theirs.scores(array), ours.scores(hidden.to(device)).cpu().numpy(), **slack)
    target = np.arange(B)
    want = theirs.forward(array, target).loss
    got = back.eval()(hidden.to(device), torch.from_numpy(target).to(device)).loss
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    make_head("cpu").save(path)
    content = path.read_bytes()
    for name, damaged in {
        "cut": content[:-9],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(FileError, match=name):
            DenseHead.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        DenseHead.load(tmp_path / "absent")


@pytest.mark.parametrize("cast_hidden", [False, True])
def test_autocast(cast_hidden: bool, device: str) -> None:
    net = Net(make_head(device, torch.float32), torch.float32)
    x, target = make_batch(device, torch.float32)
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["hidden"] = inputs[0]
        inputs[0].retain_grad()

    net.head.register_forward_pre_hook(keep)
    with torch.autocast(device, torch.bfloat16):
        hidden = net.body(x)
        output = net.head(hidden if cast_hidden else hidden.float(), target)
    assert output.loss.dtype == output.output.dtype == torch.float32
    output.loss.backward()
    assert seen["hidden"].dtype == (torch.bfloat16 if cast_hidden else torch.float32)
    assert seen["hidden"].grad is not None and seen["hidden"].grad.dtype == seen["hidden"].dtype
    assert net.head.weight.grad is not None and net.head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"loss": "sampled_softmax", "negatives": 9}], ids=["softmax", "sampled"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_gradient_checkpointing(options: dict[str, Any], fused: bool, inside: bool, device: str) -> None:
    nets = [Net(make_head(device, **options)) for _ in range(2)]
    x, target = make_batch(device)
    for net, checkpointed in zip(nets, (False, True), strict=True):
        optimizer = FusedSGD(net.head, lr=0.1) if fused else None
        for step in range(2):
            torch.manual_seed(step)
            if not checkpointed:
                loss = net(x, target)
            elif inside:
                loss = checkpoint(net, x, target, use_reentrant=False)
            else:
                loss = net.head(checkpoint(net.body, x, use_reentrant=False), target).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
    assert same_parameters(nets[0].head, nets[1].head)
    for mine, theirs in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert_near(mine.grad.to_dense(), theirs.grad.to_dense())


class _Rows(torch.utils.data.Dataset):
    """Computes scores in the worker: the core's thread pool must live there too."""

    def __init__(self, head: DenseHead) -> None:
        self.head = head

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return self.head.scores(torch.full((d,), float(i + 1), dtype=torch.float64))


def test_dataloader_workers_that_are_forked() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        head = make_head("cpu")
        hidden = torch.arange(1.0, 9.0, dtype=torch.float64)[:, None].expand(8, d)
        want = head.scores(hidden)  # the pool is running when the workers are forked
        loader = torch.utils.data.DataLoader(
            _Rows(head), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for _ in range(2):
            assert_near(torch.cat(list(loader)), want)
            assert_near(head.scores(hidden), want)
    finally:
        torch.set_num_threads(threads)


def test_threads_follow_torch_and_change_no_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_glue, "_threads_seen", 0)  # the fixtures set the core's threads behind its back
    before = torch.get_num_threads()
    hidden, target = make_batch(device, torch.float32)
    hidden.requires_grad_()
    results = []
    try:
        for threads in (1, 2, 4, 1):
            torch.set_num_threads(threads)
            head = make_head(device, torch.float32)
            loss = head(hidden, target).loss
            assert _core.get_num_threads() == threads
            results.append((loss, *torch.autograd.grad(loss, [hidden, head.weight, head.bias])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_module_surface(device: str) -> None:
    head = make_head(device, label_smoothing=0.1, softcap=3.0, bias=False, reduction="sum")
    assert repr(head) == (
        "DenseHead(in_features=11, n_classes=37, loss='softmax', label_smoothing=0.1, softcap=3.0, bias=False, "
        "reduction='sum')"
    )
    output, loss = make_head(device)(*make_batch(device))
    assert output.shape == (B,) and loss.shape == ()
    labels, _ = make_labels(device)
    assert make_head(device)(make_batch(device)[0], labels)._fields == ("output", "loss")
    frozen = make_head(device).requires_grad_(False)
    assert not frozen(*make_batch(device)).loss.requires_grad
    hidden, target = make_batch(device)
    frozen(hidden.requires_grad_(), target).loss.backward()
    assert hidden.grad is not None and frozen.weight.grad is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("fused", [False, True])
def test_no_logits_in_memory(fused: bool) -> None:
    """B x D float32 would be 400 MB; the weights are 13 MB, and so is their gradient in plain mode."""
    script = f"""
        import torch
        from widehead.torch import DenseHead, FusedAdam
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
        def step(n_classes, rows):
            head = DenseHead(16, n_classes)
            optimizer = FusedAdam(head, lr=0.1) if {fused} else torch.optim.SGD(head.parameters(), lr=0.1)
            hidden = torch.randn(rows, 16, requires_grad=True)
            head(hidden, torch.arange(rows)).loss.backward()
            optimizer.step()
            head.topk(hidden, 5)
        step(1000, 8)
        before = peak()
        step(200_000, 512)
        print(peak() - before)  # ru_maxrss would begin at the peak of the process that started this one
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 13 * (3 if fused else 2) + 64
