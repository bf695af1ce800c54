"""tests/python/test_torch_sparse_block.py -- SparseHead with dense rows for its first classes, and with an order."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.library import opcheck  # noqa: E402

from test_torch_dense import B, D, assert_near, make_batch, make_labels  # noqa: E402
from test_torch_dense import d as H  # noqa: E402
from test_torch_optim import FUSED, PLAIN, Net, same, snapshot, unchanged  # noqa: E402
from test_torch_sparse import K, losses_of, reduced, train  # noqa: E402
from torch_devices import raises  # noqa: E402
from widehead import DtypeError, Error, LabelError, Labels, NonFiniteError, ShapeError  # noqa: E402
from widehead import numpy as whnp  # noqa: E402
from widehead.torch import FusedAdam, FusedSGD, SparseHead, block_ops  # noqa: E402

N = 6
ORDER = torch.from_numpy(np.random.default_rng(7).permutation(D))
BLOCKS: list[dict[str, Any]] = [
    {"dense_head": N},
    {"class_order": ORDER},
    {"dense_head": N, "class_order": ORDER},
]
CASES: list[dict[str, Any]] = [
    {"loss": "squared_hinge"},
    {"loss": "bce", "group_size": 5, "class_weight": True, "reduction": "none"},
    {"loss": "softmax", "lse_penalty": 0.02, "class_weight": True},
    {"loss": "softmax", "bias": False, "group_size": 64},
]
ids = lambda o: " ".join(o)  # noqa: E731


def make_head(dtype: torch.dtype = torch.float64, device: str = "cpu", **options: Any) -> SparseHead:
    if options.get("class_weight") is True:
        options["class_weight"] = torch.linspace(0.2, 2.0, D)
    head = SparseHead(H, D, K, dtype=dtype, device=device, **{"seed": 3, **options})
    with torch.no_grad():  # biases that differ
        for layer in head.layers():
            if layer.bias is not None:
                layer.bias += torch.linspace(-0.5, 0.5, len(layer.bias), device=device)
    return head


def both(**more: Any) -> SparseHead:
    return make_head(**{"dense_head": N, "class_order": ORDER, **more})


def logits(head: SparseHead, hidden: Tensor) -> Tensor:
    """By class, put together without the head's own help; with derivatives."""
    rows = head.weight.shape[0]
    inputs = head.index.long().repeat_interleave(head.options.group_size, 0)[:rows]
    weight = head.weight.new_zeros(rows, H).scatter(1, inputs, head.weight)
    z = hidden @ weight.T if head.bias is None else hidden @ weight.T + head.bias
    if head.frequent is not None:
        first = hidden @ head.frequent.weight.T
        z = torch.cat([first if head.frequent.bias is None else first + head.frequent.bias, z], 1)
    return z if head.order is None else z[:, torch.argsort(ORDER).to(z.device)]


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_losses_and_gradients_equal_torch(options: dict[str, Any], block: dict[str, Any], device: str) -> None:
    head = make_head(device=device, **options, **block)
    hidden, _ = make_batch(device)
    hidden.requires_grad_()
    labels, y = make_labels(device)  # the first row has no label
    z = logits(head, hidden)
    want = reduced(head, losses_of(head, z, y))
    got = head(hidden, labels)
    assert_near(got.loss, want)
    near = z - z.logsumexp(-1, keepdim=True) if head.loss == "softmax" else z
    assert_near(got.output, (y * near).sum(-1))
    upstream = torch.linspace(1, 2, want.numel(), dtype=torch.float64, device=device).reshape(want.shape)
    wrt = [hidden, *head.parameters()]
    assert {id(p) for p in wrt[1:]} == {id(p) for p in head.owned_parameters()}
    terms = (got.loss * upstream).sum() + got.output.sum(), (want * upstream).sum() + (y * near).sum()
    for a, b in zip(*(torch.autograd.grad(t, wrt) for t in terms), strict=True):
        assert_near(a, b)
    assert_near(head.to_dense()(hidden, labels).loss, want)


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_one_class_an_example(block: dict[str, Any], device: str) -> None:
    """With smoothing, class weights, an ignored class that is also a row's number, and lse as an output."""
    for ignore in (-100, 0, int(ORDER[2])):
        head = make_head(
            device=device,
            loss="softmax",
            label_smoothing=0.2,
            class_weight=True,
            lse_penalty=0.03,
            ignore_index=ignore,
            **block,
        )
        hidden, target = make_batch(device, rows=23)
        target[target == -100] = ignore
        hidden.requires_grad_()
        z = logits(head, hidden)
        lse = z.logsumexp(-1)
        count = head.class_weight.double()[target.clamp(min=0)] * (target != ignore)
        smooth = nn.functional.cross_entropy(
            z, target, head.class_weight.double(), ignore_index=ignore, label_smoothing=0.2
        )
        want = smooth + (0.03 * lse**2 * (target != ignore)).sum() / count.sum()
        got = head(hidden, target, return_lse=True)
        assert_near(got.loss, want)
        assert_near(got.lse, lse)
        wrt = [hidden, *head.parameters()]
        mine, theirs = (torch.autograd.grad(t, wrt) for t in (got.loss + got.lse.sin().sum(), want + lse.sin().sum()))
        for a, b in zip(mine, theirs, strict=True):
            assert_near(a, b)


@pytest.mark.parametrize("options", [CASES[1], CASES[2]], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    head = both(**options)
    hidden, labels = make_batch("cpu")[0], make_labels("cpu")[0]
    names = [name for name, _ in head.named_parameters()]

    def run(hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (hidden, labels)))

    inputs = [t.detach().clone().requires_grad_() for t in (hidden, *head.parameters())]
    assert torch.autograd.gradcheck(run, inputs)


def test_operators() -> None:
    head = both(loss="softmax")
    hidden, target = make_batch("cpu")
    rest = (None, target, None, None)
    tensors = (hidden.requires_grad_(), head.weight, head.bias, head.index)
    options = ("softmax", 0.1, 0.0, -100, 1)
    extra = (head.frequent.weight, head.frequent.bias)
    opcheck(block_ops.block_loss, (*tensors, *rest, None, None, *extra, *options))
    plain = [t.detach() if isinstance(t, Tensor) else t for t in (*tensors, *rest, *extra)]
    lse = logits(head, hidden).logsumexp(-1).detach()
    ones = torch.ones(B, dtype=torch.float64)
    opcheck(block_ops.block_grad, (*plain, lse, ones, ones, ones, *options, True, True, False, True, True))


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_queries(block: dict[str, Any], device: str) -> None:
    for loss in ("softmax", "bce"):
        head = make_head(device=device, loss=loss, **block)
        hidden, _ = make_batch(device)
        z = logits(head, hidden).detach()
        assert_near(head.scores(hidden), z)
        some = torch.randint(0, D, (B, 9), generator=torch.Generator().manual_seed(1)).to(device)
        assert_near(head.scores(hidden, some), z.gather(1, some))
        assert_near(head.lse(hidden), z.logsumexp(-1))
        known = z.log_softmax(-1) if loss == "softmax" else nn.functional.logsigmoid(z)
        assert_near(head.log_prob(hidden), known)
        best = z.argsort(dim=1, descending=True)
        for k in (1, 5, D):
            top = head.topk(hidden, k)
            assert torch.equal(top.classes, best[:, :k])
            assert_near(top.scores, z.gather(1, best[:, :k]))
        assert torch.equal(head.predict(hidden), best[:, 0])
        seen = Labels(torch.arange(0, 3 * B + 1, 3, device=device), best[:, :3].sort(dim=1).values.reshape(-1), None, D)
        assert torch.equal(head.topk(hidden, 4, seen).classes, best[:, 3:7])
        rows = torch.arange(0, D * B + 1, D, device=device)
        everything = Labels(rows, torch.arange(D, device=device).repeat(B), None, D)
        assert bool((head.topk(hidden, 4, everything).classes == -1).all())


def test_a_class_that_is_none_is_named() -> None:
    for block in BLOCKS[1:]:
        head, hidden = make_head(**block), make_batch("cpu")[0]
        with pytest.raises(LabelError, match=rf"classes: expected a class in \[0, {D}\), got {D}"):
            head.scores(hidden, torch.full((B, 1), D))


def test_equal_scores_go_to_the_lower_row(device: str) -> None:
    head = make_head(dense_head=N, device=device)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    hidden, _ = make_batch(device)
    assert torch.equal(head.topk(hidden, N + 4).classes, torch.arange(N + 4, device=device).expand(B, -1))


@pytest.mark.parametrize("name", list(FUSED))
@pytest.mark.parametrize("options", [{}, {"loss": "softmax", "group_size": 16, "bias": False}], ids=str)
def test_twenty_steps_equal_torch(name: str, options: dict[str, Any], device: str) -> None:
    fused, plain = (both(rewire_every=None, device=device, **options) for _ in range(2))
    optimizer = FUSED[name](fused)
    assert train(fused, optimizer, range(20)) == pytest.approx(
        train(plain, PLAIN[name](plain.parameters()), range(20)), rel=1e-9
    )
    for mine, theirs in zip(fused.owned_parameters(), plain.owned_parameters(), strict=True):
        assert_near(mine.detach(), theirs.detach(), 1e-9)
        assert mine.grad is None and not mine.requires_grad
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert [int(count) for count in counts] == [20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_steps_are_those_of_numpy(dtype: torch.dtype) -> None:
    """The same bits, rewiring and stochastic rounding included."""
    name = str(dtype).removeprefix("torch.")
    options = {"loss": "bce", "rewire_every": 2, "rewire_fraction": 0.3, "dense_head": N, "seed": 3}
    ours = SparseHead(H, D, K, dtype=dtype, class_order=ORDER, reduction="sum", **options)
    theirs = whnp.SparseHead(H, D, K, dtype=name, class_order=ORDER.numpy(), reduction="sum", **options)
    optimizer = FusedAdam(ours, lr=0.01, seed=3, rounding="stochastic" if dtype == torch.bfloat16 else "nearest")
    for step in range(4):
        hidden, _ = make_batch("cpu", torch.float32, rows=9 + step)
        labels, _ = make_labels("cpu", rows=9 + step)
        hidden.requires_grad_()
        loss = ours(hidden, labels).loss
        loss.backward()
        optimizer.step()
        arrays = Labels(labels.indptr.numpy(), labels.indices.numpy(), labels.values.numpy(), D)
        told = theirs.step(hidden.detach().numpy(), arrays, 0.01, "adam")
        assert told.loss == pytest.approx(loss.item(), rel=1e-6)
        assert np.array_equal(told.grad_hidden, hidden.grad.numpy())
    for key, tensor in ours.state_dict().items():
        array = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        assert np.array_equal(array, theirs.state_dict()[key]), key


def test_bad_values_in_fused_mode_change_nothing(device: str) -> None:
    for loss in ("softmax", "squared_hinge"):
        head = both(dtype=torch.float32, loss=loss, rewire_every=1, device=device)
        optimizer = FusedAdam(head, lr=0.1)
        hidden, target = make_batch(device, torch.float32)
        before, index = snapshot(head), head.index.clone()
        bad = hidden.clone()
        bad[3, 2] = torch.nan
        with raises(head, NonFiniteError, "hidden"):
            head(bad, target).loss.backward()
        optimizer.step()
        assert unchanged(head, before) and torch.equal(head.index, index)
        with raises(head, LabelError, rf"label {D} at .* is out of range: expected 0 to {D - 1}"):
            head(hidden, torch.tensor([0, D, 1, 1, 1, 1, 1], device=device))
        rows = torch.tensor([4, 4] + [1, 2] * (B - 1), device=device)
        rows = Labels(torch.arange(0, 2 * B + 1, 2, device=device), rows, None, D)
        with raises(head, LabelError, "more than once|already|repeat|twice"):
            head(hidden, rows)
        loss_of = head(hidden, target).loss
        loss_of.backward(retain_graph=True)
        with pytest.raises(Error, match="second backward"):
            loss_of.backward()
        optimizer.step()
        assert not any(torch.equal(p, q) for p, q in zip(head.owned_parameters(), before, strict=True))


def test_grad_scaler_overflow_leaves_both_layers(device: str) -> None:
    """Gradients to a float16 hidden that overflow: the report goes to the scaler, and nothing has moved."""
    head = both(dtype=torch.float32, device=device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=1)
    optimizer = FusedSGD(head, lr=0.1, grad_scaler=scaler)
    hidden, target = make_batch(device, torch.float32)
    before, moved = snapshot(head), []
    for _ in range(30):
        x = hidden.half().requires_grad_()
        scaler.scale(head(x, target).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append([not torch.equal(p, q) for p, q in zip(head.owned_parameters(), before, strict=True)])
        if any(moved[-1]):
            break
    assert not any(moved[0]) and all(moved[-1])


def test_optimizer_state_resumes(device: str) -> None:
    straight, first, second = (both(loss="softmax", rewire_every=3, device=device) for _ in range(3))
    train(straight, FusedAdam(straight, lr=0.05, seed=1), range(8))
    optimizer = FusedAdam(first, lr=0.05, seed=1)
    train(first, optimizer, range(4))
    second.load_state_dict(first.state_dict())
    other = FusedAdam(second, lr=0.05, seed=5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, other, range(4, 8))
    assert same(dict(straight.state_dict()), dict(second.state_dict()))


def test_growth_in_fused_mode(device: str) -> None:
    head = both(class_weight=True, device=device)
    optimizer = FusedAdam(head, lr=0.05)
    train(head, optimizer, range(2))
    hidden, _ = make_batch(device)
    before, frequent = head.scores(hidden), head.frequent.weight.clone()
    moments = optimizer.state[head.frequent.weight]["exp_avg"].clone()
    head.grow(D + 5, class_weight=torch.ones(D + 5, device=device))
    assert torch.equal(head.scores(hidden)[:, :D], before) and torch.equal(head.frequent.weight, frequent)
    assert torch.equal(optimizer.state[head.frequent.weight]["exp_avg"], moments)
    assert optimizer.state[head.weight]["exp_avg"].shape == (D + 5 - N, K) == head.weight.shape
    assert head.order.tolist() == [*ORDER.tolist(), *range(D, D + 5)]
    loss = head(hidden, torch.arange(D - 2, D + 5, device=device)).loss
    loss.backward()
    optimizer.step()
    assert not torch.equal(head.scores(hidden)[:, :D], before)


def test_rewiring_is_of_the_sparse_part(device: str) -> None:
    head = both(device=device)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    train(head, optimizer, range(2))
    frequent, index = head.frequent.weight.clone(), head.index.clone()
    assert head.rewire(0.5, optimizer=optimizer) == round(0.5 * (D - N) * K)
    assert torch.equal(head.frequent.weight, frequent) and not torch.equal(head.index, index)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_belong_to_nobody(how: str, tmp_path: Path) -> None:
    head = both(class_weight=True, loss="softmax")
    FusedSGD(head, lr=0.1)
    hidden, target = make_batch("cpu")
    want = head(hidden, target).loss
    if how == "torch.save":
        torch.save(head, tmp_path / "head.pt")
        twin = torch.load(tmp_path / "head.pt", weights_only=False)
    else:
        twin = copy.deepcopy(head) if how == "deepcopy" else pickle.loads(pickle.dumps(head))
    assert all(p.requires_grad for p in twin.parameters()) and twin._owner is None
    assert torch.equal(twin(hidden, target).loss, want)
    train(twin, FusedAdam(twin, lr=0.1), range(2))
    assert torch.equal(head(hidden, target).loss, want)


def test_state_dict() -> None:
    head, other = both(), make_head(dense_head=N, class_order=torch.arange(D), seed=9)
    names = ["weight", "bias", "order", "index", "frequent.weight", "frequent.bias"]
    assert list(head.state_dict()) == names
    hidden, target = make_batch("cpu")
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(hidden, target).loss, head(hidden, target).loss)
    assert torch.equal(other.topk(hidden, 3).classes, head.topk(hidden, 3).classes)
    with pytest.raises(ShapeError, match=rf"order: expected a permutation of 0 .. {D - 1}, got 0 {D} times"):
        other.load_state_dict({**head.state_dict(), "order": torch.zeros(D, dtype=torch.int64)})
    assert torch.equal(other.order, head.order)
    meta = SparseHead(H, D, K, dense_head=N, class_order=torch.arange(D), device="meta", dtype=torch.float64)
    meta.load_state_dict(head.state_dict(), assign=True)
    assert torch.equal(meta(hidden, target).loss, head(hidden, target).loss)
    empty = SparseHead(H, D, K, dense_head=N, class_order=ORDER, device="meta", dtype=torch.float64, seed=3)
    empty.to_empty(device="cpu").reset_parameters()
    fresh = SparseHead(H, D, K, dense_head=N, class_order=ORDER, dtype=torch.float64, seed=3)
    assert torch.equal(empty(hidden, target).loss, fresh(hidden, target).loss)
    assert list(make_head().state_dict()) == ["weight", "bias", "index"]
    half = both(dtype=torch.float32).to(torch.bfloat16)
    assert half.frequent.weight.dtype == torch.bfloat16 and half.order.dtype == torch.int64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_files_are_shared_with_numpy(dtype: str, tmp_path: Path) -> None:
    weights = torch.linspace(1, 2, D)
    for block in BLOCKS:
        ours = make_head(getattr(torch, dtype), loss="softmax", class_weight=weights, **block)
        ours.save(tmp_path / "ours")
        theirs = whnp.SparseHead.load(tmp_path / "ours")
        theirs.save(tmp_path / "theirs", optimizer=True)
        back = SparseHead.load(tmp_path / "theirs")
        assert repr(ours) == repr(back) and back.options == ours.options == theirs.options
        assert same(dict(ours.state_dict()), dict(back.state_dict()))
        hidden = torch.randn(B, H, generator=torch.Generator().manual_seed(1)).to(ours.weight.dtype)
        array = hidden.view(torch.uint16).numpy() if dtype == "bfloat16" else hidden.numpy()
        assert np.array_equal(theirs.scores(array), back.scores(hidden).numpy())
        _, target = make_batch("cpu")
        told = theirs.forward(array, target.numpy())
        assert told.loss == pytest.approx(back(hidden, target).loss.item(), rel=1e-6)
        assert all(p.requires_grad for p in back.parameters())


def test_a_backbone_trains_through_both_layers(device: str) -> None:
    net = Net(both(loss="softmax", device=device))
    optimizers = [FusedAdam(net.head, lr=0.05), torch.optim.Adam(net.body.parameters(), lr=0.01)]
    x, target = make_batch(device, rows=40)
    losses = []
    for _ in range(60):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = net(x, target)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_training_equals_eager(fused: bool) -> None:
    torch._dynamo.reset()
    heads = [both(loss="softmax", class_weight=True, rewire_every=None) for _ in range(2)]
    losses = []
    for head, compiled in zip(heads, (False, True), strict=True):
        optimizer: Any = FusedAdam(head, lr=0.1) if fused else torch.optim.Adam(head.parameters(), lr=0.1)
        run = torch.compile(head, fullgraph=True) if compiled else head
        found = []
        for _ in range(3):
            hidden, target = make_batch("cpu")
            optimizer.zero_grad()
            loss = run(hidden, target).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1])
    for mine, theirs in zip(*(head.owned_parameters() for head in heads), strict=True):
        assert_near(mine.detach(), theirs.detach(), 1e-9)
    torch._dynamo.reset()


def test_empty_batches(device: str) -> None:
    head = both(loss="softmax", device=device)
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True, device=device)
    loss = head(hidden, torch.zeros(0, dtype=torch.int64, device=device)).loss
    loss.backward()
    assert loss.item() == 0 and bool((head.frequent.weight.grad == 0).all())
    assert head.topk(hidden, 2).classes.shape == (0, 2)


def test_bad_arguments_are_named() -> None:
    for options, error, message in (
        ({"dense_head": D}, ShapeError, f"dense_head: expected 0 to n_classes - 1 = {D - 1}, got {D}"),
        ({"dense_head": -1}, ShapeError, "dense_head: expected an integer of at least 0, got -1"),
        ({"class_order": torch.zeros(D, dtype=torch.int64)}, ShapeError, "class_order: expected a permutation"),
        ({"class_order": torch.arange(D - 1)}, ShapeError, r"class_order: expected shape"),
        ({"class_order": torch.rand(D)}, DtypeError, "class_order: expected integers, got float"),
    ):
        with pytest.raises(error, match=message):
            make_head(**options)
    head = both()
    with pytest.raises(ShapeError, match="not the layer of its frequent classes"):
        FusedSGD(head.frequent, lr=0.1)
    assert head._owner is None and head.frequent._owner is None
