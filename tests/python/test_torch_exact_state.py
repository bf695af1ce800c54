"""tests/python/test_torch_exact_state.py -- the exact head in PyTorch: readers, writers, files, refusals, queries."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import widehead.numpy as wn  # noqa: E402
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
    only_cpu,
    place,  # noqa: F401 -- of every test here too
    seeded,
)
from torch_devices import is_gpu, raises  # noqa: E402
from widehead import BackendError, DtypeError, Error, LabelError, Labels, NonFiniteError, ShapeError  # noqa: E402
from widehead.torch import (  # noqa: E402
    DenseHead,
    ExactHead,
    FusedAdam,
    FusedRMSprop,
    FusedSGD,
    clip_grad_norm_,
)


def train(head: ExactHead, optimizer: Any, steps: int, seed: int = 7) -> None:
    generator = seeded(seed)
    for _ in range(steps):
        hidden, target = make_batch(generator)
        head(hidden.to(head._stored().dtype), target).loss.backward()
        optimizer.step()


def saved(head: ExactHead, tmp_path: Any) -> Tensor:
    head.save(tmp_path / "head.safetensors")
    return ExactHead.load(tmp_path / "head.safetensors", torch.get_default_device()).weight


def through_pickle(head: ExactHead, tmp_path: Any) -> Tensor:
    return pickle.loads(pickle.dumps(head)).weight


def through_torch_save(head: ExactHead, tmp_path: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(nn.Sequential(head).state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)["0.weight"]


READERS: dict[str, Callable[[ExactHead, Any], Tensor]] = {
    "attribute": lambda head, _: head.weight,
    "state_dict": lambda head, _: nn.Sequential(head).state_dict()["0.weight"],
    "deepcopy": lambda head, _: copy.deepcopy(head).weight,
    "to_linear": lambda head, _: head.to_linear().weight,
    "to_dense": lambda head, _: head.to_dense().weight,
    "rows": lambda head, _: head.rows(range(D)),
    "materialise": lambda head, _: torch.cat([head.materialise(0, 20), head.materialise(20, D)]),
    "consolidate": lambda head, _: (head.consolidate(), next(head.parameters()))[1],
    "scores": lambda head, _: head.scores(torch.eye(d, dtype=torch.float64)).T - head.bias[:, None],
    "save": saved,
    "pickle": through_pickle,
    "torch_save": through_torch_save,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_readers_see_the_weights_and_disturb_nothing(reader: str, when: str, tmp_path: Any) -> None:
    """Before backward, between it and step(), and after it, in the midst of a block of steps."""
    pair = Pair(make_head("taylor_softmax", bias=True), momentum=0.7)
    generator = seeded(1)

    def read(at: str) -> None:
        if at == when:
            assert_near(READERS[reader](pair.head, tmp_path).detach(), pair.linear.weight.detach())

    for _ in range(7):
        x, target = make_batch(generator)
        pair.zero_grad()
        a, b = pair.hidden(x)
        loss = pair.head(a, target).loss
        read("before")
        loss.backward()
        counts = target >= 0
        ((dense_losses(pair.head, pair.linear(b), one_hot(target)) * counts).sum() / counts.sum()).backward()
        read("between")
        pair.step()
        read("after")
    assert_same_layer(pair.head, pair.linear)


def test_training_leaves_the_rows_apart() -> None:
    """What costs a pass over all rows is done once, before the first step."""
    head = make_head(dtype=torch.float32)
    optimizer = FusedSGD(head, lr=0.05, momentum=0.5)
    train(head, optimizer, 6)
    for name in ("parameters", "extra_repr", "owned_parameters"):
        getattr(head, name)()
    assert head.diagnostics()["steps"] == 6
    raw = next(head.parameters()).clone()
    rows = head.rows(torch.arange(D))
    assert not torch.allclose(raw, rows) and torch.equal(next(head.parameters()), raw)
    with torch.no_grad():
        head(torch.randn(2, d), torch.tensor([1, 2]))
    assert torch.equal(next(head.parameters()), raw)
    assert_near(head.weight, rows, 1e-6)


def test_loading_and_copies_train_on() -> None:
    head = make_head("taylor_softmax", bias=True)
    optimizer = FusedSGD(head, lr=0.02, momentum=0.8, weight_decay=0.01)
    train(head, optimizer, 5)
    state, moments = copy.deepcopy(head.state_dict()), copy.deepcopy(optimizer.state_dict())
    copied = copy.deepcopy(head)
    assert copied._owner is None and not copied.weight.requires_grad
    train(head, optimizer, 6, seed=8)
    for resumed in (make_head("taylor_softmax", bias=True), copied):
        again = FusedSGD(resumed, lr=0.5, momentum=0.8)
        train(resumed, again, 3)  # something to be forgotten
        resumed.load_state_dict(state)
        again.load_state_dict(moments)
        assert_near(resumed.weight, state["weight"], 0)
        assert_near(again.state_dict()["state"][1]["momentum_buffer"], moments["state"][1]["momentum_buffer"], 0)
        train(resumed, again, 6, seed=8)
        assert_near(resumed.weight, head.weight)
        assert resumed.bias is not None and head.bias is not None
        assert_near(resumed.bias, head.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_in_place_edits_are_seen(bias: bool) -> None:
    pair, generator = Pair(make_head("taylor_softmax", bias=bias), momentum=0.6), seeded(1)
    for i in range(9):
        x, target = make_batch(generator)
        pair.zero_grad()
        pair.backward(x, target, one_hot(target))
        pair.step()
        if i % 3 == 2:
            with torch.no_grad():
                for layer in (pair.head, pair.linear):
                    layer.weight[:, 1].mul_(0.5)
                    if bias:
                        assert layer.bias is not None
                        layer.bias.add_(0.1)
    assert_same_layer(pair.head, pair.linear)
    head = pair.head
    new = torch.randn(D, d, dtype=torch.float64)
    head.weight.data = new.clone()
    assert_near(head.rows([3, 4]), new[3:5], 0)


def test_writing_through_an_old_reference_is_refused() -> None:
    head = make_head(bias=True)
    optimizer = FusedSGD(head, lr=0.05)
    kept, start = head.weight, copy.deepcopy(head.state_dict())
    train(head, optimizer, 3)
    with torch.no_grad():
        kept.mul_(2.0)
    for use in (lambda: head.weight, lambda: head.state_dict(), lambda: train(head, optimizer, 1)):
        with pytest.raises(Error, match="reference from before"):
            use()
    head.load_state_dict(start)
    assert_near(head.weight, start["weight"], 0)
    train(head, optimizer, 1)
    assert head.diagnostics()["gram_error"] < 1e-12


def test_edits_with_a_gradient_waiting_are_refused() -> None:
    head, (hidden, target) = make_head(), make_batch(seeded(1))
    optimizer = FusedSGD(head, lr=0.05)
    loss = head(hidden, target).loss
    loss.backward(retain_graph=True)
    with torch.no_grad():
        head.weight.mul_(2.0)
    before = head.weight.clone()
    for use in (optimizer.step, loss.backward):
        with pytest.raises(Error, match="zero_grad"):
            use()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(head.weight, before)
    stale = head(hidden, target).loss
    head.load_state_dict({"weight": before + 1})
    with pytest.raises(Error, match="written to since"):
        stale.backward()
    train(head, optimizer, 2)
    assert head.diagnostics()["gram_error"] < 1e-12


def test_replaced_parameters_are_refused_before_a_step() -> None:
    head, (hidden, target) = make_head(), make_batch(seeded(1))
    optimizer = FusedSGD(head, lr=0.05)
    head.load_state_dict({"weight": torch.zeros(D, d, dtype=torch.float64)}, assign=True)
    head(hidden, target).loss.backward()
    with pytest.raises(Error, match="replaced"):
        optimizer.step()
    assert float(head.rows(range(D)).norm()) == 0


def test_stale_graphs_are_refused() -> None:
    head, (hidden, target) = make_head(), make_batch(seeded(1))
    optimizer = FusedSGD(head, lr=0.05)
    hidden.requires_grad_()
    old = head(hidden, target).loss
    head(hidden, target).loss.backward()
    optimizer.step()
    before = head.rows(range(D))
    with pytest.raises(Error, match="taken a step since"):
        old.backward()
    moved = head(hidden, target).loss
    head.double().float().double()
    with pytest.raises(Error, match="since this batch's forward pass"):
        moved.backward()
    looked = nn.functional.linear(hidden, head.weight).sum()
    train(head, optimizer, 1)
    with pytest.raises(RuntimeError, match="inplace"):
        looked.backward()
    with pytest.raises(Error, match="double backward"):
        torch.autograd.grad(head(hidden, target).loss, hidden, create_graph=True)
    A, _, _ = head.statistics(hidden, target)
    with pytest.raises(Error, match="double backward"):
        torch.autograd.grad(A.sum(), hidden, create_graph=True)
    optimizer.step()
    assert head.rows(range(D)).shape == before.shape and head.diagnostics()["steps"] == 1


def whole_state(head: ExactHead, optimizer: Any) -> list[Any]:
    """The state as a next step shows it, and what waits: on a copy of nothing, as all of it is read bit by bit."""
    velocities = [v.clone() for v in optimizer.velocities(head._owner)]
    numbers = head.diagnostics()
    return [head.rows(range(D)), next(head.parameters()).clone(), *velocities, head.grad_norm(), head.grad_columns(),
            numbers["weight_norm2"], numbers["gram_error"], numbers["steps"], numbers["blocks"]]  # fmt: skip


def equal(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


BAD = ["nan hidden", "inf hidden", "value", "class", "negative class", "repeated", "gradient", "lr", "lr inf", "decay",
       "momentum", "scale", "rows"]  # fmt: skip


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("loss", ["squared_error", "z_loss"])
def test_refused_before_anything_changes(loss: str, what: str, device: str) -> None:
    """With a gradient waiting, in the midst of a block; a twin that is never asked for the wrong thing goes along."""
    if what == "gradient" and is_gpu(device):
        pytest.skip("it is with what waits there, and the step is refused: test_torch_exact_gpu.py")
    head, twin = (make_head(loss, bias=True, dtype=torch.float32) for _ in range(2))
    pairs = [(h, FusedSGD(h, lr=0.01, momentum=0.5, weight_decay=0.01)) for h in (head, twin)]
    hidden, target = make_batch(seeded(3))
    hidden = hidden.float()
    labels, _ = make_labels(1)
    for h, o in pairs:
        train(h, o, 6)
        h(hidden, labels).loss.backward()
    good, _ = (h(hidden, target).loss for h in (head, twin))
    optimizer, group = pairs[0][1], pairs[0][1].param_groups[0]
    before = whole_state(head, optimizer)
    bad, wrong = hidden.clone(), target.clone()
    bad[3, 2] = torch.nan if what == "nan hidden" else torch.inf
    wrong[3] = -1 if what == "negative class" else D
    values = torch.as_tensor(labels.values).clone()
    values[1] = torch.nan
    twice = Labels(torch.tensor([0, 2, 2, 2, 2, 2]), torch.tensor([4, 4]), None, D)
    tried: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
        "nan hidden": (NonFiniteError, lambda: head(bad, target)),
        "inf hidden": (NonFiniteError, lambda: head(bad, target)),
        "value": (Error, lambda: head(hidden, Labels(labels.indptr, labels.indices, values, D))),
        "class": (LabelError, lambda: head(hidden, wrong)),
        "negative class": (LabelError, lambda: head(hidden, wrong)),
        "repeated": (LabelError, lambda: head(hidden, twice)),
        "gradient": (NonFiniteError, lambda: (good * torch.nan).backward()),
        "lr": (ShapeError, lambda: (group.update(lr=torch.nan), optimizer.step())),
        "lr inf": (ShapeError, lambda: (group.update(lr=torch.inf), optimizer.step())),
        "decay": (ShapeError, lambda: (group.update(weight_decay=-0.1), optimizer.step())),
        "momentum": (Error, lambda: (group.update(momentum=0.0), optimizer.step())),
        "scale": (ShapeError, lambda: head.scale_grad(torch.nan)),
        "rows": (LabelError, lambda: head.rows([0, D])),
    }
    error, use = tried[what]
    with raises(head, error):
        use()
    group.update(lr=0.01, weight_decay=0.01, momentum=0.5)
    assert equal(whole_state(head, optimizer), before)
    for h, o in pairs:
        o.step()
        train(h, o, 3, seed=9)
    assert equal(whole_state(head, optimizer), whole_state(twin, pairs[1][1]))


def test_all_heads_are_checked_before_one_moves() -> None:
    heads = [make_head(), make_head()]
    optimizer = FusedSGD([{"heads": heads[0]}, {"heads": heads[1], "lr": 0.1}], lr=0.1)
    hidden, target = make_batch(seeded(3))
    sum(head(hidden, target).loss for head in heads).backward()
    before = heads[0].weight.clone()
    optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ShapeError, match="lr"):
        optimizer.step()
    assert torch.equal(heads[0].weight, before)
    optimizer.param_groups[1]["lr"] = 0.0
    optimizer.step()
    assert not torch.equal(heads[0].weight, before) and torch.equal(heads[1].weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler(dtype: torch.dtype, device: str) -> None:
    """Gradients are unscaled, and an overflow skips head and backbone together."""
    heads = [make_head(bias=True, dtype=torch.float32) for _ in range(2)]
    bodies = [nn.Linear(d, d) for _ in range(2)]
    bodies[1].load_state_dict(bodies[0].state_dict())
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    mine, theirs = FusedSGD(heads[0], lr=0.05, momentum=0.5, grad_scaler=scaler), FusedSGD(heads[1], 0.05, 0.5)
    bodies_sgd = [torch.optim.SGD(body.parameters(), lr=0.05) for body in bodies]

    def scaled_step(x: Tensor, target: Tensor) -> None:
        for optimizer in (bodies_sgd[0], mine):
            optimizer.zero_grad()
        hidden = bodies[0](x).to(dtype)
        scaler.scale(heads[0](hidden, target).loss).backward()
        scaler.unscale_(bodies_sgd[0])
        clip_grad_norm_(bodies[0].parameters(), heads[0], 1.0)
        for optimizer in (bodies_sgd[0], mine):
            scaler.step(optimizer)
        scaler.update()

    generator = seeded(2)
    for _ in range(4):
        x, target = make_batch(generator)
        x = x.float()
        scaled_step(x, target)
        bodies_sgd[1].zero_grad()
        heads[1](bodies[1](x).to(dtype), target).loss.backward()
        clip_grad_norm_(bodies[1].parameters(), heads[1], 1.0)
        bodies_sgd[1].step()
        theirs.step()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    assert_near(heads[0].weight, heads[1].weight, tolerance)
    assert_near(bodies[0].weight, bodies[1].weight, tolerance)

    before = [p.detach().clone() for p in (heads[0].weight, heads[0].bias, *bodies[0].parameters())]
    scale, steps = scaler.get_scale(), int(mine.state_dict()["state"][1]["step"])
    heads[0](torch.randn(2, d), torch.tensor([1, 2])).loss.backward()  # waits, and is skipped with the rest
    scaled_step(torch.full_like(x, 1e30) * 1e30, target)
    assert scaler.get_scale() == scale / 2 and int(mine.state_dict()["state"][1]["step"]) == steps
    after = (heads[0].weight, heads[0].bias, *bodies[0].parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    scaled_step(x, target)
    assert not torch.equal(heads[0].weight, before[0])


def test_forgotten_grad_scaler_and_plain_overflow(device: str) -> None:
    head, scaler = make_head(dtype=torch.float32), torch.amp.GradScaler(device, init_scale=8.0)
    optimizer = FusedSGD(head, lr=0.1)
    before = head.weight.clone()
    scaler.scale(head(torch.randn(2, d), torch.tensor([1, 2])).loss).backward()
    with pytest.raises(Error, match="grad_scaler=scaler"):
        scaler.step(optimizer)
    assert torch.equal(head.weight, before)
    body = nn.Parameter(torch.ones(3))
    body.grad = torch.full((3,), torch.nan)
    if not is_gpu(device):  # where the norm is not waited for: test_torch_exact_gpu.py
        with pytest.raises(NonFiniteError, match="norm"):
            clip_grad_norm_([body], [head], 1.0)
    optimizer.zero_grad()
    assert clip_grad_norm_([body], [head], 1.0).isnan()
    with pytest.raises(NonFiniteError, match="norm"):
        clip_grad_norm_([body], [head], 1.0, error_if_nonfinite=True)


def test_overflow_without_an_owner_is_nan() -> None:
    head = make_head(dtype=torch.float32)
    hidden = torch.randn(2, d, requires_grad=True)
    (head(hidden, torch.tensor([1, 2])).loss * torch.inf).backward()
    assert hidden.grad is not None and bool(hidden.grad.isnan().all())


@pytest.mark.parametrize("mode", ["eval", "no_grad", "released", "frozen"])
def test_nothing_is_trained(mode: str) -> None:
    head = make_head("taylor_softmax")
    hidden, target = make_batch(seeded(3))
    optimizer = FusedSGD(head, lr=0.1, momentum=0.9)
    train(head, optimizer, 2)
    if mode == "released":
        head.release()
    head.train(mode != "eval")
    linear, before = head.to_linear(), head.rows(range(D))
    a, b = (hidden.clone().requires_grad_(mode != "frozen") for _ in range(2))
    if mode == "no_grad":
        with torch.no_grad():
            assert not head(a, target).loss.requires_grad
    elif mode == "frozen":  # the anchor alone asks for a gradient
        head(a, target).loss.backward()
        head.zero_grad()
    else:
        head(a, target).loss.backward()
        counts = target >= 0
        ((dense_losses(head, linear(b), one_hot(target)) * counts).sum() / counts.sum()).backward()
        assert_near(a.grad, b.grad)  # type: ignore[arg-type]
    optimizer.step()
    assert torch.equal(head.rows(range(D)), before) and float(head.grad_norm()) == 0


def test_plain_optimisers_do_not_train_it() -> None:
    head = make_head(bias=True)
    before = head.weight.clone()
    optimizer = torch.optim.SGD(head.requires_grad_().parameters(), lr=0.1, weight_decay=0.1)
    hidden, target = make_batch(seeded(3))
    head(hidden.requires_grad_(), target).loss.backward()
    optimizer.step()
    assert torch.equal(head.weight, before) and not any(p.requires_grad for p in head.parameters())


def test_refusals_by_name(device: str) -> None:
    head, (hidden, target) = make_head("z_loss"), make_batch(seeded(3))
    with pytest.raises(ShapeError, match="FusedAdam cannot train an ExactHead"):
        FusedAdam(head, lr=0.1)
    with pytest.raises(ShapeError, match=r"rounding.*ExactHead.*kahan"):
        FusedSGD(head, lr=0.1, rounding="kahan")
    with pytest.raises(ShapeError, match="ExactHead, got a DenseHead"):
        FusedRMSprop(DenseHead(d, D), lr=0.1)
    with pytest.raises(ShapeError, match="exact heads, got"):
        clip_grad_norm_([], [DenseHead(d, D)], 1.0)  # type: ignore[list-item]
    assert head._owner is None
    with pytest.raises(DtypeError, match="float32 or float64"):
        ExactHead(d, D, dtype=torch.bfloat16)
    with pytest.raises(DtypeError, match="float32 or float64"):
        head.half()
    assert head.weight.dtype == torch.float64
    with pytest.raises(ShapeError, match="return_lse"):
        head(hidden, target, return_lse=True)
    with pytest.raises(ShapeError, match=r"log_prob.*z_loss"):
        head.log_prob(hidden)
    with pytest.raises(ShapeError, match="loss"):
        ExactHead(d, D, loss="softmax")
    with pytest.raises(ShapeError, match="sample_weight"):
        head(hidden, target, torch.ones(B + 1))
    with pytest.raises(Error, match="functional_call"):
        torch.func.functional_call(head, {"weight": torch.zeros(D, d, dtype=torch.float64)}, (hidden, target))
    optimizer = FusedSGD(head, lr=0.1)
    head(hidden, target).loss.backward()
    with pytest.raises(Error, match="gradient waits"):
        head.grow(D + 1)
    with pytest.raises(Error, match="cannot be copied"):
        copy.deepcopy(optimizer)
    if is_gpu(device):
        with pytest.raises(BackendError, match=r"method.*'woodbury', for the CPU only"):
            make_head(method="woodbury")(hidden, target)


def test_meta_device_and_first_weights() -> None:
    head = ExactHead(d, D, bias=True, device="meta", dtype=torch.float32, seed=3)
    for use in (
        lambda: head.rows([0]),
        lambda: head(torch.zeros(2, d), torch.tensor([1, 2])),
        lambda: FusedSGD(head, 1),
    ):
        with pytest.raises(BackendError, match="meta device"):
            use()
    head.to_empty(device=torch.get_default_device()).reset_parameters()
    dense = DenseHead(d, D, dtype=torch.float32, seed=3)
    assert torch.equal(head.weight, dense.weight) and torch.equal(head.bias, dense.bias)
    assert torch.equal(head.rows(range(D)), dense.weight)
    train(head, FusedSGD(head, lr=0.1), 2)
    head.reset_parameters()
    assert torch.equal(head.weight, dense.weight) and float(head.bias.norm()) == 0


@pytest.mark.parametrize("bias", [False, True])
def test_growth(bias: bool) -> None:
    head = make_head(bias=bias)
    optimizer = FusedSGD(head, lr=0.05, momentum=0.9)
    train(head, optimizer, 3)
    old, moments = head.weight.clone(), optimizer.state_dict()["state"][1]["momentum_buffer"].clone()
    parameter = head.weight
    head.grow(D + 7)
    assert head.weight is parameter and torch.equal(head.weight[:D], old)
    assert torch.equal(head.weight[D:], ExactHead(d, D + 7, dtype=torch.float64, seed=3).weight[D:])
    grown = optimizer.state_dict()["state"][1]["momentum_buffer"].clone()
    assert torch.equal(grown[:D], moments) and grown.shape == (D + 7, d) and float(grown[D:].norm()) == 0
    linear, hidden = head.to_linear(), torch.randn(2, d, dtype=torch.float64)
    head(hidden, torch.tensor([D + 6, 1])).loss.backward()
    o = linear(hidden)
    y = torch.zeros(2, D + 7, dtype=torch.float64)
    y[0, D + 6] = y[1, 1] = 1
    (g,) = torch.autograd.grad(((o - y) ** 2).sum() / 2, linear.weight)
    optimizer.step()
    assert_near(head.weight, linear.weight.detach() - 0.05 * (0.9 * grown + g))


def test_linear_layers_are_copied() -> None:
    linear = nn.Linear(d, D, dtype=torch.float64)
    head = ExactHead.from_linear(linear, loss="taylor_softmax")
    before = linear.weight.detach().clone()
    train(head, FusedSGD(head, lr=0.1), 3)
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad
    hidden = torch.randn(4, d, dtype=torch.float64)
    assert_near(head.to_linear()(hidden).detach(), head.scores(hidden), 1e-12)
    dense = head.to_dense()
    assert_near(dense.scores(hidden), head.scores(hidden), 0)
    assert dense.weight.requires_grad and dense.weight.data_ptr() != head.weight.data_ptr()


@pytest.mark.parametrize("loss", LOSSES)
def test_queries(loss: str) -> None:
    """The best classes are the most probable ones: with spherical softmax those of the largest |o|."""
    head = make_head(loss, bias=True)
    train(head, FusedSGD(head, lr=0.05), 5)
    hidden = torch.randn(2, 3, d, dtype=torch.float64, generator=seeded(1)) * 3
    o = hidden @ head.weight.T + head.bias
    assert_near(head.scores(hidden), o)
    classes = torch.tensor([3, 0, D - 1])
    assert_near(head.scores(hidden, classes), o[..., classes])
    assert_near(head.lse(hidden), o.logsumexp(-1))
    value = {"spherical_softmax": o.abs(), "taylor_softmax": (o + 1).abs()}.get(loss, o)
    for k in (1, 4, D):
        want = value.argsort(-1, descending=True)[..., :k]
        got = head.topk(hidden, k)
        assert torch.equal(got.classes, want)
        assert_near(got.scores, o.gather(-1, want))
    assert torch.equal(head.predict(hidden), value.argmax(-1))
    exclude = Labels.from_lists([[0, 1, 2], [], [5], [7], [], list(range(D - 2))], D)
    if torch.get_default_device().type == "cuda":
        exclude = Labels(torch.as_tensor(exclude.indptr), torch.as_tensor(exclude.indices), None, D)
    hit = head.topk(hidden, 3, exclude).classes.reshape(6, 3)
    left = value.reshape(6, D).clone()
    for i in range(6):
        left[i, exclude.indices[exclude.indptr[i] : exclude.indptr[i + 1]]] = -torch.inf
    want = left.argsort(-1, descending=True)[:, :3]
    want[5, 2] = -1
    assert torch.equal(hit, want)
    if "softmax" in loss:
        y = torch.eye(D, dtype=torch.float64)
        flat = o.reshape(6, D)
        log_prob = torch.stack([-dense_losses(head, flat, y[c].expand(6, D)) for c in range(D)], 1)
        assert_near(head.log_prob(hidden).reshape(6, D), log_prob)
        assert_near(head.log_prob(hidden, classes).reshape(6, 3), log_prob[:, classes])
        assert_near(head.log_prob(hidden).exp().sum(-1), torch.ones(2, 3))


@only_cpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_and_files_as_numpy(loss: str, dtype: str, tmp_path: Any) -> None:
    options = {"loss": loss, **LOSSES[loss], "bias": True, "seed": 5}
    head = ExactHead(d, D, dtype=getattr(torch, dtype), **options)  # type: ignore[arg-type]
    other = wn.ExactHead(d, D, dtype=dtype, **options)  # type: ignore[arg-type]
    optimizer = FusedSGD(head, lr=0.01, momentum=0.7, weight_decay=0.01)
    for i in range(6):
        hidden = np.random.default_rng(i).standard_normal((B, d)).astype(dtype)
        labels, _ = make_labels(i)
        target = labels if i % 2 else np.array([3, -100, 7, 3, D - 1])
        x = torch.from_numpy(hidden).requires_grad_()
        loss_value = head(x, labels if i % 2 else torch.from_numpy(target)).loss
        loss_value.backward()
        optimizer.step()
        theirs = other.step(hidden, target, 0.01, "momentum", momentum=0.7, weight_decay=0.01)
        assert x.grad is not None and np.array_equal(x.grad.numpy(), theirs.grad_hidden)
        assert float(loss_value.detach()) == pytest.approx(theirs.loss, rel=1e-6)
    assert np.array_equal(head.rows(range(D)).numpy(), other.rows(np.arange(D)))
    head.save(tmp_path / "torch")
    other.save(tmp_path / "numpy")
    back = wn.ExactHead.load(tmp_path / "torch")
    again = ExactHead.load(tmp_path / "numpy")
    assert back.options == head.options == again.options
    assert np.array_equal(back.weight, head.weight.numpy()) and np.array_equal(back.bias, head.bias.numpy())
    assert torch.equal(again.weight, head.weight) and torch.equal(again.bias, head.bias)
    assert not again.weight.requires_grad and again.seed == 5 and again.loss == loss
    train(again, FusedSGD(again, lr=0.01), 1)
