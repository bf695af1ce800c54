"""tests/python/test_torch_sparse.py -- the sparse head as a PyTorch module, against torch on its scattered weights."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.library import opcheck  # noqa: E402

from test_torch_dense import B, D, assert_near, make_batch, make_labels  # noqa: E402
from test_torch_dense import d as H  # noqa: E402
from test_torch_optim import FUSED, PLAIN, Net, same, snapshot, unchanged  # noqa: E402
from torch_devices import raises  # noqa: E402
from widehead import BackendError, DtypeError, FileError, LabelError, Labels, NonFiniteError, ShapeError  # noqa: E402
from widehead import numpy as whnp  # noqa: E402
from widehead.torch import FusedAdam, FusedSGD, SparseHead, sparse_ops  # noqa: E402

K = 4
CASES: list[dict[str, Any]] = [
    {"loss": "squared_hinge"},
    {"loss": "squared_hinge", "group_size": 16, "class_weight": True, "reduction": "sum"},
    {"loss": "bce", "bias": False},
    {"loss": "bce", "group_size": 5, "class_weight": True, "reduction": "none"},
    {"loss": "softmax", "lse_penalty": 0.02, "class_weight": True},
    {"loss": "softmax", "group_size": 64},
]


def make_head(dtype: torch.dtype = torch.float64, *, device: str = "cpu", **options: Any) -> SparseHead:
    if options.get("class_weight") is True:
        options["class_weight"] = torch.linspace(0.2, 2.0, D)
    head = SparseHead(H, D, K, dtype=dtype, **{"seed": 3, "device": device, **options})
    with torch.no_grad():  # biases that differ
        if head.bias is not None:
            head.bias += torch.linspace(-0.5, 0.5, D, device=device)
    return head


def inputs_of(head: SparseHead) -> Tensor:
    return head.index.long().repeat_interleave(head.options.group_size, 0)[: head.n_classes]


def logits(head: SparseHead, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dense = weight.new_zeros(head.n_classes, head.in_features).scatter(1, inputs_of(head), weight)
    return F.linear(hidden, dense, bias)


def losses_of(head: SparseHead, z: Tensor, y: Tensor) -> Tensor:
    """From all the logits and the labels' weights `[B, D]`, before reduction; `y` of 0 is no label."""
    c = z.new_ones(D) if head.class_weight is None else head.class_weight.to(z.dtype)
    if head.loss == "softmax":
        lse = z.logsumexp(-1)
        return (y * c * (lse[:, None] - z)).sum(-1) + head.options.lse_penalty * lse**2
    if head.loss == "bce":
        return (c * (F.softplus(z) - y * z)).sum(-1)
    return torch.where(y != 0, y * c * (1 - z).clamp(min=0) ** 2, c * (1 + z).clamp(min=0) ** 2).sum(-1)


def reduced(head: SparseHead, losses: Tensor) -> Tensor:
    return {"sum": losses.sum, "mean": losses.mean, "none": lambda: losses}[head.reduction]()


def train(head: SparseHead, optimizer: Any, steps: range, rewire: Any = None) -> list[float]:
    losses, device = [], head.weight.device.type
    for step in steps:
        hidden, _ = make_batch(device, head.weight.dtype, rows=5 + step % 3)
        labels, _ = make_labels(device, rows=5 + step % 3)
        optimizer.zero_grad()
        loss = head(hidden, labels).loss
        loss.backward()
        optimizer.step()
        if rewire is not None:
            rewire(step + 1)
        losses.append(loss.item())
    return losses


def valid_index(head: SparseHead) -> bool:
    index = head.index.long()
    groups = -(-head.n_classes // head.options.group_size)
    inside = bool((index >= 0).all()) and bool((index < head.in_features).all())
    return inside and list(index.shape) == [groups, K] and bool((index.diff(dim=1) > 0).all())


@pytest.mark.parametrize("options", CASES, ids=str)
def test_losses_and_gradients_equal_torch(options: dict[str, Any], device: str) -> None:
    head = make_head(device=device, **options)
    hidden, _ = make_batch(device)
    hidden.requires_grad_()
    labels, y = make_labels(device)  # the first row has no label
    z = logits(head, hidden, head.weight, head.bias)
    want = reduced(head, losses_of(head, z, y))
    got = head(hidden, labels)
    assert_near(got.loss, want)
    upstream = torch.linspace(1, 2, want.numel(), dtype=torch.float64, device=device).reshape(want.shape)
    wrt = [hidden, *head.owned_parameters()]
    mine = torch.autograd.grad((got.loss * upstream).sum(), wrt)
    theirs = torch.autograd.grad((want * upstream).sum(), wrt)
    assert mine[1].shape == (D, K)
    for a, b in zip(mine, theirs, strict=True):
        assert_near(a, b)
    assert_near(head.to_dense()(hidden, labels).loss, want)


@pytest.mark.parametrize("options", CASES[:2] + CASES[3:5], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    head = make_head(**options)
    hidden, _ = make_batch("cpu")
    labels, _ = make_labels("cpu")
    sample_weight = torch.linspace(0.1, 1.0, B, dtype=torch.float64)

    def run(hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(("weight", "bias"), parameters, strict=False))
        return tuple(torch.func.functional_call(head, named, (hidden, labels, sample_weight)))

    inputs = [t.detach().clone().requires_grad_() for t in (hidden, *head.owned_parameters())]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_cross_entropy(smoothing: float, device: str) -> None:
    head = make_head(device=device, loss="softmax", label_smoothing=smoothing)
    hidden, target = make_batch(device, rows=23)
    z = logits(head, hidden, head.weight, head.bias)
    output, loss, lse = head(hidden, target, return_lse=True)
    assert_near(loss, F.cross_entropy(z, target, label_smoothing=smoothing))
    assert_near(lse, z.logsumexp(-1))
    picked = z.log_softmax(-1)[torch.arange(23, device=device), target.clamp(min=0)]
    assert_near(output, torch.where(target < 0, 0.0, picked))


def test_rows_of_all_labels_and_of_none(device: str) -> None:
    indptr = torch.tensor([0, D, D], device=device)
    for loss in ("squared_hinge", "bce"):
        head = make_head(device=device, loss=loss, reduction="none")
        hidden = make_batch(device)[0][:2]
        labels = Labels(indptr, torch.arange(D, device=device), None, D)
        y = torch.zeros(2, D, dtype=torch.float64, device=device)
        y[0] = 1
        assert_near(head(hidden, labels).loss, losses_of(head, logits(head, hidden, head.weight, head.bias), y))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_batch_shapes(shape: tuple[int, ...], device: str) -> None:
    head = make_head(device=device, reduction="none")
    hidden = torch.randn(*shape, H, dtype=torch.float64, device=device, requires_grad=True)
    output, loss = head(hidden, torch.zeros(shape, dtype=torch.int64, device=device))
    assert output.shape == loss.shape == shape
    loss.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape and head.weight.grad is not None
    assert head.topk(hidden, 2).classes.shape == (*shape, 2) and head.scores(hidden).shape == (*shape, D)


@pytest.mark.parametrize("options", [{}, {"group_size": 16, "bias": False}], ids=str)
def test_queries(options: dict[str, Any], device: str) -> None:
    head = make_head(device=device, loss="softmax", **options)
    hidden, _ = make_batch(device)
    z = logits(head, hidden, head.weight, head.bias).detach()
    assert_near(head.scores(hidden), z)
    best = z.sort(dim=-1, descending=True, stable=True)
    got = head.topk(hidden, 5)
    assert torch.equal(got.classes, best.indices[:, :5])
    assert_near(got.scores, best.values[:, :5])
    assert torch.equal(head.predict(hidden), best.indices[:, 0])
    wanted = torch.tensor([3, D - 1, 3], device=device)
    assert_near(head.scores(hidden, wanted), z[:, wanted])
    assert_near(head.log_prob(hidden), z.log_softmax(-1))
    assert_near(head.lse(hidden), z.logsumexp(-1))
    seen = Labels(torch.arange(B + 1, device=device), best.indices[:, 0].contiguous(), None, D)
    assert torch.equal(head.topk(hidden, 1, exclude=seen).classes[:, 0], best.indices[:, 1])


def test_low_precision(device: str) -> None:
    """bfloat16 weights keep a float32 bias; only float32 arithmetic separates us from float64."""
    head = make_head(torch.bfloat16, device=device, rewire_every=None)
    assert head.weight.dtype == torch.bfloat16 and head.bias is not None and head.bias.dtype == torch.float32
    hidden, _ = make_batch(device, torch.bfloat16)
    labels, y = make_labels(device)
    exact = hidden.double().requires_grad_()
    want = losses_of(head, logits(head, exact, head.weight.double(), head.bias.double()), y).mean()
    hidden.requires_grad_()
    got = head(hidden, labels).loss
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=1e-5)
    got.backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.bfloat16
    (reference,) = torch.autograd.grad(want, exact)
    assert_near(hidden.grad, reference, 2.0**-6)


@pytest.mark.parametrize("group", [1, 16])
def test_opcheck(group: int) -> None:
    head = make_head(group_size=group)
    hidden, target = make_batch("cpu")
    labels, _ = make_labels("cpu")
    hidden.requires_grad_()
    class_weight = torch.linspace(0.5, 1.5, D)
    layer = (hidden, head.weight, head.bias, head.index)
    multi, single = (labels.indptr, labels.indices, labels.values), (None, target, None)
    hinge, softmax = ("squared_hinge", 0.0, 0.0, -100, group), ("softmax", 0.1, 0.01, -100, group)
    opcheck(sparse_ops.sparse_loss, (*layer, *multi, class_weight, None, None, *hinge))
    opcheck(sparse_ops.sparse_loss, (*layer, *single, None, None, None, *softmax))
    values = [t.detach() for t in layer]
    grads = [torch.rand(B, dtype=torch.float64) for _ in range(3)]
    lse = head.scores(hidden).logsumexp(1)
    for needs in ((True, True, True), (True, False, False)):
        opcheck(sparse_ops.sparse_grad, (*values, *single, None, lse, *grads, *softmax, *needs))
    opcheck(sparse_ops.sparse_topk, (*values, group, 4, None, None))
    for classes in (None, torch.zeros(B, 3, dtype=torch.int64)):
        opcheck(sparse_ops.sparse_scores, (*values, group, classes))
    FusedSGD(head, lr=0.1)
    opcheck(sparse_ops.sparse_loss, (*layer, *multi, None, head._anchor, head._control, *hinge))
    opcheck(sparse_ops.sparse_grad_update, (*values, *multi, None, head._control, lse[:0], *grads, *hinge, True))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_training_equals_eager(fused: bool) -> None:
    """In whole graphs; rewiring between the steps changes the index in place, and needs no new graph."""
    torch._dynamo.reset()
    heads = [make_head(rewire_every=2, rewire_fraction=0.3) for _ in range(2)]
    losses = []
    for head, compiled in zip(heads, (False, True), strict=True):
        optimizer: Any = FusedAdam(head, lr=0.1) if fused else torch.optim.Adam(head.parameters(), lr=0.1)
        step = torch.compile(lambda x, y, head=head: head(x, y).loss, fullgraph=True) if compiled else (
            lambda x, y, head=head: head(x, y).loss
        )  # fmt: skip
        before, found, graphs = head.index.long(), [], []
        for i in range(4):
            hidden, _ = make_batch("cpu")
            optimizer.zero_grad()
            loss = step(hidden, make_labels("cpu")[0])
            loss.backward()
            optimizer.step()
            if not fused and i % 2:
                head.rewire(optimizer=optimizer)
            found.append(loss.item())
            graphs.append(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
        losses.append(found)
        assert not compiled or (graphs[0] > 0 and len(set(graphs)) == 1)
        assert not torch.equal(before, head.index.long())
    assert losses[0] == pytest.approx(losses[1])
    assert_near(heads[0].weight.detach(), heads[1].weight.detach(), 1e-9)
    assert torch.equal(heads[0].index, heads[1].index)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", list(FUSED))
@pytest.mark.parametrize("options", [{"rewire_every": None}, {"loss": "bce", "group_size": 16, "bias": False}], ids=str)
def test_twenty_steps_equal_torch(name: str, options: dict[str, Any], device: str) -> None:
    fused, plain = make_head(device=device, **options), make_head(device=device, **options)
    assert train(fused, FUSED[name](fused), range(20)) == pytest.approx(
        train(plain, PLAIN[name](plain.parameters()), range(20)), rel=1e-9
    )
    for mine, theirs in zip(fused.owned_parameters(), plain.owned_parameters(), strict=True):
        assert_near(mine.detach(), theirs.detach(), 1e-9)
    assert torch.equal(fused.index, plain.index) and fused.weight.grad is None


@pytest.mark.parametrize("scaled", [False, True])
def test_bad_values_in_fused_mode_change_nothing(scaled: bool, device: str) -> None:
    """Under a GradScaler they are no error: it skips the step and lowers its scale."""
    head = make_head(torch.float32, device=device, rewire_every=None)
    scaler = torch.amp.GradScaler(device, init_scale=64.0, enabled=scaled)
    optimizer = FusedAdam(head, lr=0.1, grad_scaler=scaler)
    hidden, target = make_batch(device, torch.float32)
    for bad, scale in ((False, 64.0), (True, 32.0), (False, 32.0)):
        before, x = snapshot(head), hidden.clone()
        optimizer.zero_grad()
        if bad:
            x[3, 2] = torch.nan
        with raises(head, NonFiniteError, match="hidden") if bad and not scaled else nullcontext():
            scaler.scale(head(x, target).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert unchanged(head, before) == bad and (not scaled or scaler.get_scale() == scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_hidden_in_fused_mode_changes_nothing(value: float) -> None:
    head = make_head(torch.float32, rewire_every=1)
    optimizer = FusedAdam(head, lr=0.1)
    hidden, target = make_batch("cpu", torch.float32)
    before, state, index = snapshot(head), copy.deepcopy(optimizer.state_dict()), head.index.clone()
    bad = hidden.clone()
    bad[3, 2] = value
    with pytest.raises(NonFiniteError, match="hidden"):
        head(bad, target).loss.backward()
    optimizer.step()
    assert unchanged(head, before) and torch.equal(head.index, index)
    assert same(state["param_groups"], optimizer.state_dict()["param_groups"])
    head(hidden, target).loss.backward()
    optimizer.step()
    assert not unchanged(head, before) and not torch.equal(head.index, index)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_belong_to_nobody(how: str, tmp_path: Path) -> None:
    head = make_head()
    FusedSGD(head, lr=0.1)
    if how == "torch.save":
        torch.save(head, tmp_path / "head.pt")
        twin = torch.load(tmp_path / "head.pt", weights_only=False)
    else:
        twin = copy.deepcopy(head) if how == "deepcopy" else pickle.loads(pickle.dumps(head))
    assert twin.index.dtype == head.index.dtype == torch.uint16 and torch.equal(twin.index, head.index)
    assert torch.equal(twin.weight, head.weight) and twin.weight.requires_grad and twin._owner is None
    assert twin.index.data_ptr() != head.index.data_ptr()
    before = head.index.clone()
    twin.rewire()
    assert torch.equal(head.index, before)


def test_meta_device() -> None:
    head = SparseHead(H, D, K, device="meta", seed=3)
    hidden, target = make_batch("cpu", torch.float32)
    for use in (lambda: head(hidden, target), head.rewire):
        with pytest.raises(BackendError, match="to_empty"):
            use()
    head.to_empty(device="cpu")
    with torch.no_grad():
        head.index.zero_()  # as fresh memory may be
    with pytest.raises(ShapeError, match="index"):
        head(hidden, target)
    head.reset_parameters()
    real = SparseHead(H, D, K, seed=3)
    assert torch.equal(head(hidden, target).loss, real(hidden, target).loss)
    assert torch.equal(SparseHead(H, D, K, seed=3).to(torch.float64).index, real.index)


def test_index_written_by_hand_is_looked_at() -> None:
    head = make_head()
    hidden, target = make_batch("cpu")
    head(hidden, target)
    with torch.no_grad():
        head.index[5] = torch.tensor([0, 1, 2, H], dtype=torch.uint16)
    for use in (lambda: head(hidden, target), lambda: head.topk(hidden, 1), lambda: head.scores(hidden), head.rewire):
        with pytest.raises(ShapeError, match=rf"inputs in \[0, {H}\), got {H} at row 5"):
            use()


def test_index_of_another_type_takes_the_head_s(tmp_path: Path) -> None:
    head = make_head(torch.float32)
    want = head.index
    head.index = head.index.int()
    head.save(tmp_path / "head")
    assert torch.equal(SparseHead.load(tmp_path / "head").index, want)
    head(*make_batch("cpu", torch.float32))
    assert head.index.dtype == torch.uint16 and torch.equal(head.index, want)


def test_seeds() -> None:
    a, b, c = SparseHead(H, D, K), SparseHead(H, D, K, seed=0), SparseHead(H, D, K, seed=1)
    theirs = whnp.SparseHead(H, D, K)
    assert torch.equal(a.weight, b.weight) and torch.equal(a.index, b.index)
    assert not torch.equal(a.weight, c.weight) and not torch.equal(a.index, c.index)
    for name, tensor in a.state_dict().items():
        assert np.array_equal(tensor.numpy(), theirs.state_dict()[name])
    assert float(a.weight.detach().abs().max()) <= K**-0.5 and float(a.weight.detach().std()) > 0.5 * K**-0.5
    assert bool((a.bias == -1).all()) and bool((SparseHead(H, D, K, loss="softmax").bias == 0).all())
    sigmoid = torch.sigmoid(SparseHead(H, D, K, loss="bce", dtype=torch.float64).bias)
    assert_near(sigmoid, torch.full((D,), 1 / D, dtype=torch.float64))
    sigmoid = torch.sigmoid(SparseHead(H, D, K, loss="bce", prior=0.2, dtype=torch.float64).bias)
    assert_near(sigmoid, torch.full((D,), 0.2, dtype=torch.float64))
    assert SparseHead(70_000, 5, K).index.dtype == torch.int32 and SparseHead(65536, 5, K).index.dtype == torch.uint16


def test_state_dict_refuses_a_bad_index() -> None:
    head, other = make_head(), make_head(seed=9)
    assert list(head.state_dict()) == ["weight", "bias", "index"]
    good = other.state_dict()
    for bad, error, words in (
        (good["index"].int().flip(1), ShapeError, "ascending"),
        (torch.where(good["index"].int() == 0, 65536, good["index"].int()), ShapeError, "inputs in"),
        (good["index"].long() + 65536, ShapeError, "inputs in"),
        (good["index"][1:], ShapeError, "index: expected shape"),
        (good["index"].double(), DtypeError, "index: expected integers"),
    ):
        before, index = snapshot(head), head.index.clone()
        with pytest.raises(error, match=words):
            head.load_state_dict({**good, "index": bad})
        assert unchanged(head, before) and torch.equal(head.index, index)
    net = nn.Sequential(head)
    net.load_state_dict({f"0.{name}": value.long() if name == "index" else value for name, value in good.items()})
    hidden, target = make_batch("cpu")
    assert torch.equal(head(hidden, target).loss, other(hidden, target).loss) and head.index.dtype == torch.uint16
    meta = SparseHead(H, D, K, device="meta", dtype=torch.float64)
    meta.load_state_dict(good, assign=True)
    assert torch.equal(meta(hidden, target).loss, other(hidden, target).loss)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        {"class_weight": np.linspace(1, 2, D, dtype=np.float32), "group_size": 16},
        {"loss": "bce", "prior": 0.1, "reduction": "sum", "rewire_end": 50, "bias": False},
        {"loss": "softmax", "rewire_mode": "threshold", "rewire_threshold": 0.01, "rewire_every": None},
    ],
    ids=["hinge", "bce", "softmax"],
)
def test_files_are_shared_with_numpy(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch_options = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    ours = SparseHead(H, D, K, dtype=getattr(torch, dtype), seed=4, **torch_options)
    ours.rewire(0.5, mode="magnitude_global")
    ours.save(tmp_path / "ours.safetensors")
    theirs = whnp.SparseHead.load(tmp_path / "ours.safetensors")
    theirs.save(tmp_path / "theirs.safetensors")
    back = SparseHead.load(tmp_path / "theirs.safetensors")
    assert repr(ours) == repr(back) and back.options == ours.options == theirs.options and back.seed == 4
    assert same(dict(ours.state_dict()), dict(back.state_dict())) and back.weight.requires_grad
    hidden = torch.randn(B, H).to(ours.weight.dtype)
    array = hidden.view(torch.uint16).numpy() if dtype == "bfloat16" else hidden.numpy()
    assert np.array_equal(theirs.scores(array), back.scores(hidden).numpy())
    safetensors = pytest.importorskip("safetensors")
    tensors = dict(safetensors.deserialize((tmp_path / "ours.safetensors").read_bytes()))
    assert tensors["index"]["dtype"] == "U16" and bytes(tensors["index"]["data"]) == theirs.index.tobytes()


def test_files_with_a_bad_index_are_refused(tmp_path: Path) -> None:
    from widehead.files import load_head, save_head

    path = tmp_path / "head"
    make_head(torch.float32).save(path)
    for change in ({"index": lambda i: i[:, ::-1].copy()}, {"index": lambda i: i.astype(np.float32)}):
        file = load_head(path)
        file.tensors["index"] = change["index"](file.tensors["index"])
        save_head(tmp_path / "bad", file)
        for kind in (SparseHead, whnp.SparseHead):
            with pytest.raises(FileError, match="index"):
                kind.load(tmp_path / "bad")
    for kind in (SparseHead, whnp.SparseHead):
        file = load_head(path)
        file.integers.clear()  # the same bits as bfloat16
        save_head(tmp_path / "bad", file)
        with pytest.raises(FileError, match="index"):
            kind.load(tmp_path / "bad")


@pytest.mark.parametrize("group", [1, 5])
def test_grow(group: int) -> None:
    head = make_head(group_size=group, rewire_every=1)
    optimizer = FusedAdam(head, lr=0.1)
    train(head, optimizer, range(2))
    weight, learnt, index = head.weight, snapshot(head), head.index.clone()
    moments = optimizer.state[head.weight]["exp_avg"].clone()
    head.grow(D + 9)
    large = SparseHead(H, D + 9, K, group_size=group, dtype=torch.float64, seed=3)
    assert head.weight is weight and torch.equal(head.weight[:D], learnt[0]) and head.index.dtype == torch.uint16
    assert torch.equal(head.weight[D:], large.weight[D:]) and bool((head.bias[D:] == -1).all())
    assert torch.equal(head.index[: len(index)], index) and torch.equal(
        head.index[len(index) :], large.index[len(index) :]
    )
    grown = optimizer.state[head.weight]["exp_avg"]
    assert torch.equal(grown[:D], moments) and bool((grown[D:] == 0).all()) and valid_index(head)
    head(make_batch("cpu")[0], torch.full((B,), D + 8)).loss.backward()
    optimizer.step()
    assert valid_index(head) and not torch.equal(head.weight[D:], large.weight[D:])
    with pytest.raises(ShapeError, match="n_classes"):
        head.grow(D)
    with pytest.raises(ShapeError, match="class_weight"):
        make_head(class_weight=True).grow(D + 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fan_in": H + 1}, f"fan_in: expected 1 to in_features = {H}, got {H + 1}"),
        ({"fan_in": 0}, "fan_in: expected an integer of at least 1, got 0"),
        ({"group_size": 0}, "group_size: expected an integer of at least 1, got 0"),
        ({"loss": "sampled_softmax"}, "loss.*squared_hinge.*'sampled_softmax'"),
        ({"rewire_mode": "random"}, "rewire_mode.*'random'"),
        ({"rewire_fraction": 1.5}, "rewire_fraction.*1.5"),
        ({"rewire_every": -1}, "rewire_every.*-1"),
        ({"rewire_end": 0}, "rewire_end.*0"),
        ({"rewire_mode": "threshold"}, "rewire_threshold: expected a number"),
        ({"rewire_threshold": 0.1}, "rewire_threshold: expected None"),
        ({"prior": 0.1}, "prior: expected None with loss='squared_hinge'"),
        ({"prior": 1.0, "loss": "bce"}, r"prior: expected a number in \(0, 1\)"),
        ({"lse_penalty": 0.1}, "lse_penalty"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"class_weight": torch.ones(3)}, "class_weight"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        SparseHead(H, D, **{"fan_in": K, **options})


def test_refuses_bad_arguments() -> None:
    with pytest.raises(DtypeError, match="float16"):
        SparseHead(H, D, K, dtype=torch.float16)
    head = make_head(torch.float32)
    hidden, target = make_batch("cpu", torch.float32)
    with pytest.raises(DtypeError, match="float64 weights"):
        head(hidden.double(), target)
    with pytest.raises(ShapeError, match=rf"hidden.*\[\.\.\., {H}\]"):
        head(hidden[:, 1:], target)
    with pytest.raises(LabelError, match=str(D)):
        head(hidden, torch.full_like(target, D))
    with pytest.raises(LabelError, match="5"):
        head(hidden[:1], Labels(torch.tensor([0, 3]), torch.tensor([5, 1, 5]), None, D))
    with pytest.raises(ShapeError, match=r"log_prob.*squared_hinge"):
        head.log_prob(hidden)
    before, index = snapshot(head), head.index.clone()
    other = torch.optim.SGD(make_head().parameters(), lr=0.1)
    for arguments, words in (
        ({"optimizer": other}, "optimizer: expected one that trains"),
        ({"fraction": -0.1}, "rewire_fraction"),
        ({"mode": "threshold"}, "rewire_threshold"),
        ({"mode": "magnitude"}, "rewire_mode"),
    ):
        with pytest.raises(ShapeError, match=words):
            head.rewire(**arguments)
    FusedSGD(head, lr=0.1)
    with pytest.raises(ShapeError, match="owns this head"):
        head.rewire(optimizer=other)
    assert unchanged(head, before) and torch.equal(head.index, index)


def test_non_finite_hidden_in_plain_mode_gives_non_finite_gradients(device: str) -> None:
    head = make_head(torch.float32, device=device)
    hidden, target = make_batch(device, torch.float32)
    hidden[2, 3] = torch.inf
    head(hidden.requires_grad_(), target).loss.backward()
    assert not bool(torch.isfinite(head.weight.grad).all())


def test_module_surface() -> None:
    assert repr(SparseHead(H, D, K, rewire_every=None, bias=False)) == (
        f"SparseHead(in_features={H}, n_classes={D}, loss='squared_hinge', fan_in={K}, group_size=1, "
        "rewire_mode='magnitude_global', rewire_fraction=0.1, bias=False)"
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("fused", [False, True])
def test_no_logits_in_memory(fused: bool) -> None:
    """B x D float32 would be 400 MB; the weights are 6.4 MB, as are each moment and, in plain mode, the gradient."""
    script = f"""
        import torch
        from widehead.torch import FusedAdam, SparseHead
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
        def step(n_classes, rows):
            head = SparseHead(512, n_classes, 8, rewire_every=1)
            optimizer = FusedAdam(head, lr=0.1) if {fused} else torch.optim.Adam(head.parameters(), lr=0.1)
            hidden = torch.randn(rows, 512, requires_grad=True)
            head(hidden, torch.arange(rows)).loss.backward()
            optimizer.step()
            if not {fused}:
                head.rewire(optimizer=optimizer)
            head.topk(hidden, 5)
        step(1000, 8)
        before = peak()
        step(200_000, 512)
        print(peak() - before)  # ru_maxrss would begin at the peak of the process that started this one
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 6.4 * (4 if fused else 8) + 64


def test_data_parallel(tmp_path: Path) -> None:
    """One rank is enough to see that the index, which cannot be sent, is left out."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    parallel = nn.parallel.DistributedDataParallel
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        net = Net(make_head())
        parallel._set_params_and_buffers_to_ignore_for_model(net, ["head.index"])
        hidden, target = make_batch("cpu")
        parallel(net)(hidden, target).backward()
        want = make_head()
        want(net.body(hidden), target).loss.backward()
        assert torch.equal(net.head.weight.grad, want.weight.grad)
    finally:
        torch.distributed.destroy_process_group()
