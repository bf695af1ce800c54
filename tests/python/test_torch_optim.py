"""tests/python/test_torch_optim.py -- the fused optimisers against torch's own, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from test_torch_dense import D, assert_near, d, make_batch, make_head, make_labels  # noqa: E402
from torch_devices import raises  # noqa: E402
from widehead import Error, NonFiniteError, ShapeError  # noqa: E402
from widehead.torch import DenseHead, FusedAdam, FusedOptimizer, FusedSGD  # noqa: E402

FUSED: dict[str, Callable[..., FusedOptimizer]] = {
    "sgd": lambda heads, **k: FusedSGD(heads, lr=0.3, **k),
    "sgd_decay": lambda heads, **k: FusedSGD(heads, lr=0.3, weight_decay=0.05, **k),
    "momentum": lambda heads, **k: FusedSGD(heads, lr=0.2, momentum=0.9, weight_decay=0.01, **k),
    "adam": lambda heads, **k: FusedAdam(heads, lr=0.05, **k),
    "adamw": lambda heads, **k: FusedAdam(heads, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, **k),
}
PLAIN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "sgd_decay": lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
}


class Net(nn.Module):
    """A small backbone under a head."""

    def __init__(self, head: DenseHead, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.body = nn.Sequential(nn.Linear(d, d, dtype=dtype), nn.Tanh()).to(head.weight.device)
        self.head = head

    def forward(self, x: Tensor, target: Any) -> Tensor:
        return self.head(self.body(x), target).loss


def snapshot(head: DenseHead) -> list[Tensor]:
    return [p.detach().clone() for p in head.owned_parameters()]


def unchanged(head: DenseHead, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(head.owned_parameters(), before, strict=True))


@pytest.mark.parametrize("name", list(FUSED))
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "bias": False}, {"loss": "bce"}], ids=str)
def test_twenty_steps_equal_torch(name: str, options: dict[str, Any], device: str) -> None:
    fused, plain = (Net(make_head(device, **options)) for _ in range(2))
    fused_optimizers = [FUSED[name]([fused.head]), torch.optim.SGD(fused.body.parameters(), lr=0.1)]
    plain_optimizers = [PLAIN[name](plain.head.parameters()), torch.optim.SGD(plain.body.parameters(), lr=0.1)]
    for step in range(20):
        x, target = make_batch(device, rows=5 + step % 3)
        if options.get("loss") == "bce":
            target = make_labels(device, rows=5 + step % 3)[0]
        losses = []
        for net, optimizers in ((fused, fused_optimizers), (plain, plain_optimizers)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = net(x, target)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.detach())
        assert_near(losses[0], losses[1], 1e-9)
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_near(mine.detach(), theirs.detach(), 1e-9)
    assert fused.head.weight.grad is None


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_float32_stays_near_torch(name: str, device: str) -> None:
    fused, plain = (make_head(device, torch.float32) for _ in range(2))
    optimizers = FUSED[name](fused), PLAIN[name](plain.parameters())
    for _ in range(20):
        hidden, target = make_batch(device, torch.float32)
        for head, optimizer in zip((fused, plain), optimizers, strict=True):
            optimizer.zero_grad()
            head(hidden, target).loss.backward()
            optimizer.step()
    assert_near(fused.weight.detach(), plain.weight.detach(), 2e-4)


def test_hidden_without_gradient_still_updates(device: str) -> None:
    head = make_head(device)
    optimizer = FusedSGD(head, lr=0.1)
    before = snapshot(head)
    hidden, target = make_batch(device)
    head(hidden, target).loss.backward()
    assert not unchanged(head, before)
    optimizer.step()
    assert not head.weight.requires_grad and head.bias is not None and not head.bias.requires_grad


def test_eval_mode_updates_nothing(device: str) -> None:
    head = make_head(device)
    FusedSGD(head, lr=0.1)
    before = snapshot(head)
    hidden, target = make_batch(device)
    head.eval()
    head(hidden.requires_grad_(), target).loss.backward()
    assert unchanged(head, before) and hidden.grad is not None and bool(hidden.grad.any())
    assert not head(hidden.detach(), target).loss.requires_grad


def test_hyper_parameters_are_read_at_every_step(device: str) -> None:
    head, plain = (make_head(device) for _ in range(2))
    fused, reference = FusedSGD(head, lr=0.5), torch.optim.SGD(plain.parameters(), lr=0.5)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (fused, reference)]
    hidden, target = make_batch(device)
    for _ in range(4):
        for module, optimizer, scheduler in zip((head, plain), (fused, reference), schedulers, strict=True):
            optimizer.zero_grad()
            module(hidden, target).loss.backward()
            optimizer.step()
            scheduler.step()
    assert fused.param_groups[0]["lr"] == 0.5**5
    assert_near(head.weight.detach(), plain.weight.detach())


def test_closure(device: str) -> None:
    head, plain = (make_head(device) for _ in range(2))
    hidden, target = make_batch(device)
    losses = []
    for module, optimizer in ((head, FusedSGD(head, lr=0.5)), (plain, torch.optim.SGD(plain.parameters(), lr=0.5))):

        def closure(module: DenseHead = module, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = module(hidden, target).loss
            loss.backward()
            return loss.item()

        losses.append([optimizer.step(closure) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1]) and losses[0][1] < losses[0][0]
    assert_near(head.weight.detach(), plain.weight.detach())


def test_step_and_zero_grad_alone_do_nothing(device: str) -> None:
    head = make_head(device)
    optimizer = FusedAdam(head, lr=0.1)
    before = snapshot(head)
    hidden, target = make_batch(device)
    optimizer.step()
    optimizer.zero_grad()
    head(hidden, target)
    optimizer.step()
    assert unchanged(head, before)
    assert int(optimizer._state_of(head.weight)["step"]) == 0


def test_second_backward_is_refused(device: str) -> None:
    head = make_head(device)
    optimizer = FusedSGD(head, lr=0.1)
    hidden, target = make_batch(device)
    head(hidden, target).loss.backward()
    after_first = snapshot(head)
    with pytest.raises(Error, match=r"second backward.*accumulation"):
        head(hidden, target).loss.backward()
    assert unchanged(head, after_first)
    optimizer.step()
    head(hidden, target).loss.backward()
    assert not unchanged(head, after_first)


@pytest.mark.parametrize("options", [{}, {"loss": "sampled_softmax", "negatives": 5}], ids=str)
def test_two_forwards_then_two_backwards_is_refused(options: dict[str, Any], device: str) -> None:
    head = make_head(device, **options)
    FusedSGD(head, lr=0.1)
    hidden, target = make_batch(device)
    losses = [head(hidden, target).loss for _ in range(2)]
    losses[0].backward()
    after_first = snapshot(head)
    with pytest.raises(Error, match="second backward"):
        losses[1].backward()
    assert unchanged(head, after_first)


@pytest.mark.parametrize("options", [{}, {"loss": "sampled_softmax", "negatives": 5}], ids=str)
def test_retained_and_differentiated_graphs_are_refused(options: dict[str, Any], device: str) -> None:
    head = make_head(device, **options)
    optimizer = FusedSGD(head, lr=0.1)
    hidden, target = make_batch(device)
    before = snapshot(head)
    with pytest.raises(Error, match="create_graph"):
        head(hidden, target).loss.backward(create_graph=True)
    assert unchanged(head, before)
    loss = head(hidden, target).loss
    loss.backward(retain_graph=True)
    optimizer.step()
    after_first = snapshot(head)
    with pytest.raises(Error, match="second backward"):
        loss.backward()
    assert unchanged(head, after_first)


@pytest.mark.parametrize("options", [{}, {"loss": "bce"}, {"loss": "sampled_softmax", "negatives": 5}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_hidden_changes_nothing(options: dict[str, Any], value: float, device: str) -> None:
    head = make_head(device, torch.float32, **options)
    optimizer = FusedAdam(head, lr=0.1)
    hidden, target = make_batch(device, torch.float32)
    head(hidden, target).loss.backward()
    optimizer.step()
    before, state = snapshot(head), copy.deepcopy(optimizer.state_dict())
    bad = hidden.clone()
    bad[3, 2] = value
    with raises(head, NonFiniteError):
        head(bad, target).loss.backward()
    optimizer.step()  # on a GPU there is one to close, though it changes nothing
    assert unchanged(head, before) and same(state, optimizer.state_dict())
    head(hidden, target).loss.backward()
    assert not unchanged(head, before)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "nearest"), (torch.bfloat16, "kahan")],
)
def test_checkpoint_resumes_bit_for_bit(
    name: str, dtype: torch.dtype, rounding: str | None, device: str, tmp_path: Any
) -> None:
    hidden, target = make_batch(device, dtype)
    head = make_head(device, dtype)
    optimizer = FUSED[name](head, rounding=rounding)

    def train(head: DenseHead, optimizer: FusedOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            head(hidden, target).loss.backward()
            optimizer.step()

    train(head, optimizer, 3)
    torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(head, optimizer, 3)
    resumed = make_head(device, dtype)
    resumed_optimizer = FUSED[name](resumed)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["head"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert same(resumed_optimizer.state_dict(), saved["optimizer"])
    train(resumed, resumed_optimizer, 3)
    assert torch.equal(head.weight, resumed.weight) and torch.equal(head.bias, resumed.bias)
    assert same(optimizer.state_dict(), resumed_optimizer.state_dict())
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k not in ("step", "compensation")]
    assert moments and all(v.dtype == torch.float32 for v in moments)


def test_bfloat16_rounding(device: str) -> None:
    """Steps far below half an ulp: nearest stalls, stochastic and kahan go on as float32 does."""
    hidden, target = make_batch(device, torch.bfloat16)
    drift = {}
    for rounding in ("nearest", "stochastic", "kahan", "float32"):
        head = make_head(device, torch.bfloat16 if rounding != "float32" else torch.float32)
        with torch.no_grad():
            head.weight.fill_(1.0)
        optimizer = FusedSGD(head, lr=2e-3, rounding=None if rounding == "float32" else rounding, seed=1)
        for _ in range(100):
            head(hidden, target).loss.backward()
            optimizer.step()
        drift[rounding] = (head.weight.double() - 1).detach()
    assert bool((drift["nearest"] == 0).all())
    exact = drift["float32"]
    scale = float(exact.norm())
    assert float((drift["kahan"] - exact).norm()) < 0.15 * scale
    # Unbiased: the projection on the true drift is right, though each weight is noisy.
    assert float((drift["stochastic"] * exact).sum()) / scale**2 == pytest.approx(1.0, abs=0.35)


def test_state_carries_torch_names(device: str) -> None:
    hidden, target = make_batch(device)
    for name, keys in (("sgd", set()), ("momentum", {"momentum_buffer"}), ("adam", {"exp_avg", "exp_avg_sq"})):
        head = make_head(device)
        optimizer = FUSED[name](head)
        head(hidden, target).loss.backward()
        optimizer.step()
        assert set(optimizer.state[head.weight]) == keys | {"step"}
        assert set(optimizer.state[head.bias]) == keys
        assert int(optimizer.state[head.weight]["step"]) == 1


def test_groups(device: str) -> None:
    heads = [make_head(device) for _ in range(3)]
    optimizer = FusedSGD([{"heads": heads[0]}, {"heads": [heads[1]], "lr": 0.0}], lr=0.1, momentum=0.5)
    optimizer.add_param_group({"heads": heads[2], "lr": 0.2, "momentum": 0.0})
    hidden, target = make_batch(device)
    before = [snapshot(head) for head in heads]
    sum(head(hidden, target).loss for head in heads).backward()
    optimizer.step()
    moved = [float((head.weight - start[0]).norm()) for head, start in zip(heads, before, strict=True)]
    assert moved[1] == 0 and moved[2] == pytest.approx(2 * moved[0])
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3, 3]


def test_ownership(device: str) -> None:
    head = make_head(device)
    optimizer = FusedSGD(head, lr=0.1)
    with pytest.raises(ShapeError, match=r"owned by a FusedSGD.*release"):
        FusedAdam(head, lr=0.1)
    assert "owner=FusedSGD" in repr(head)
    head.release()
    assert head.weight.requires_grad and "owner" not in repr(head)
    hidden, target = make_batch(device)
    before = snapshot(head)
    head(hidden, target).loss.backward()
    assert unchanged(head, before) and head.weight.grad is not None
    FusedAdam(head, lr=0.1)
    assert head.weight.grad is None
    with pytest.raises(ShapeError, match="owns"):
        optimizer.release(head)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda h: FusedSGD(h, lr=-1.0), "lr"),
        (lambda h: FusedSGD(h, lr=0.1, momentum=1.0), "momentum"),
        (lambda h: FusedSGD(h, lr=0.1, weight_decay=-0.1), "weight_decay"),
        (lambda h: FusedSGD(h, lr=0.1, rounding="up"), "rounding.*'up'"),
        (lambda h: FusedAdam(h, lr=0.1, betas=(0.9, 1.0)), "betas"),
        (lambda h: FusedAdam(h, lr=0.1, eps=-1.0), "eps"),
        (lambda h: FusedSGD([h, h], lr=0.1), "once"),
        (lambda h: FusedSGD(list(h.parameters()), lr=0.1), "heads"),
        (lambda h: FusedSGD([{"params": list(h.parameters())}], lr=0.1), "heads"),
        (lambda h: FusedSGD([{"heads": h}, {"heads": nn.Linear(2, 2)}], lr=0.1), "heads"),
    ],
)
def test_refuses_bad_options(build: Callable[[DenseHead], Any], words: str) -> None:
    head = make_head("cpu")
    with pytest.raises(ShapeError, match=words):
        build(head)
    assert head._owner is None and head.weight.requires_grad
    FusedSGD(head, lr=0.1)


def test_optimizer_is_not_copied() -> None:
    with pytest.raises(Error, match="state_dict"):
        copy.deepcopy(FusedSGD(make_head("cpu"), lr=0.1))


def test_replaced_weight_is_noticed() -> None:
    head = make_head("cpu")
    FusedSGD(head, lr=0.1)
    head.weight = nn.Parameter(torch.zeros_like(head.weight))
    with pytest.raises(Error, match="replaced"):
        head(*make_batch("cpu")).loss.backward()


@pytest.mark.parametrize("name", list(FUSED))
def test_sampled_softmax_moves_the_touched_rows(name: str, device: str) -> None:
    """One step from zero state: touched rows go as torch's optimiser takes them, the others stay."""
    fused, plain = (make_head(device, loss="sampled_softmax", negatives=6) for _ in range(2))
    optimizer, reference = FUSED[name](fused), PLAIN[name](plain.parameters())
    before = snapshot(fused)
    hidden, target = make_batch(device)
    hidden = hidden.requires_grad_()
    torch.manual_seed(2)
    fused(hidden, target).loss.backward()
    optimizer.step()
    mine, hidden.grad = hidden.grad, None
    torch.manual_seed(2)
    plain(hidden, target).loss.backward()
    assert_near(mine, hidden.grad)
    touched = plain.weight.grad.coalesce().indices()[0]
    plain.weight.grad, still = plain.weight.grad.to_dense(), torch.ones(D, dtype=torch.bool, device=device)
    still[touched] = False
    reference.step()
    assert 0 < len(touched) < D
    assert torch.equal(fused.weight[still], before[0][still]) and torch.equal(fused.bias[still], before[1][still])
    assert_near(fused.weight.detach()[touched], plain.weight.detach()[touched])
    assert_near(fused.bias.detach()[touched], plain.bias.detach()[touched])


def scaled_step(net: Net, scaler: Any, optimizers: list[Any], x: Tensor, target: Tensor) -> Tensor:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = net(x, target)
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return loss.detach()


@pytest.mark.parametrize("options", [{}, {"loss": "sampled_softmax", "negatives": 6}], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_grad_scaler(options: dict[str, Any], half: bool, device: str) -> None:
    """Scaled and unscaled training agree; an overflow skips head and backbone together, and the scale backs off."""

    def build() -> Net:
        return Net(make_head(device, torch.float32, **options), torch.float32)

    class Half(Net):
        def forward(self, x: Tensor, target: Any) -> Tensor:
            return self.head(self.body(x).half(), target).loss

    net, reference = build(), build()
    if half:
        net.__class__ = reference.__class__ = Half
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    body, plain_body = (torch.optim.SGD(n.body.parameters(), lr=0.1) for n in (net, reference))
    head = FusedSGD(net.head, lr=0.2, momentum=0.9, weight_decay=0.01, grad_scaler=scaler)
    plain_head = FusedSGD(reference.head, lr=0.2, momentum=0.9, weight_decay=0.01)
    x, target = make_batch(device, torch.float32)
    for step in range(3):
        torch.manual_seed(step)
        mine = scaled_step(net, scaler, [body, head], x, target)
        torch.manual_seed(step)
        plain_body.zero_grad()
        theirs = reference(x, target)
        theirs.backward()
        plain_body.step()
        plain_head.step()
        assert_near(mine, theirs.detach(), 1e-3 if half else 1e-5)
    assert_near(net.head.weight.detach(), reference.head.weight.detach(), 1e-3 if half else 1e-5)

    before = [p.detach().clone() for p in net.parameters()]
    state = copy.deepcopy(head.state_dict())
    scale = scaler.get_scale()
    bad = x.clone()
    bad[2, 1] = float("nan")
    scaled_step(net, scaler, [body, head], bad, target)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert same(state, head.state_dict()) and scaler.get_scale() == scale / 2
    if half:
        # Everything that comes in is finite; only the scaled gradient to hidden does not fit into float16.
        scaler.update(new_scale=2.0**40)
        scaled_step(net, scaler, [body, head], x, target)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        assert same(state, head.state_dict()) and scaler.get_scale() == 2.0**39
        scaler.update(new_scale=2.0**8)
    scaled_step(net, scaler, [body, head], x, target)
    assert not torch.equal(net.head.weight, before[-2]) and not torch.equal(net.body[0].weight, before[0])


def test_grad_scaler_with_a_head_only(device: str) -> None:
    """A frozen backbone: the head's own report reaches the scaler."""
    head = make_head(device, torch.float32)
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    optimizer = FusedSGD(head, lr=0.1, grad_scaler=scaler)
    hidden, target = make_batch(device, torch.float32)
    for bad, scale in ((False, 64.0), (True, 32.0), (False, 32.0)):
        before = snapshot(head)
        optimizer.zero_grad()
        x = torch.full_like(hidden, torch.inf) if bad else hidden
        scaler.scale(head(x, target).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert unchanged(head, before) == bad and scaler.get_scale() == scale


def test_forgotten_and_disabled_grad_scaler(device: str) -> None:
    hidden, target = make_batch(device, torch.float32)
    head = make_head(device, torch.float32)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    optimizer = FusedSGD(head, lr=0.1)
    scaler.scale(head(hidden, target).loss).backward()
    with pytest.raises(Error, match="grad_scaler=scaler"):
        scaler.step(optimizer)
    head, off = make_head(device, torch.float32), torch.amp.GradScaler(device, enabled=False)
    optimizer = FusedSGD(head, lr=0.1, grad_scaler=off)
    off.scale(head(hidden, target).loss).backward()
    off.step(optimizer)
    off.update()
    with raises(head, NonFiniteError):
        head(hidden / 0, target).loss.backward()


def test_grown_head_goes_on(device: str) -> None:
    head = make_head(device)
    optimizer = FusedAdam(head, lr=0.1)
    hidden, target = make_batch(device)
    for _ in range(2):
        head(hidden, target).loss.backward()
        optimizer.step()
    old = optimizer.state[head.weight]["exp_avg"].clone()
    head.grow(D + 4)
    moments = optimizer.state[head.weight]["exp_avg"]
    assert torch.equal(moments[:D], old) and moments.shape == (D + 4, d) and bool((moments[D:] == 0).all())
    target[1] = D + 3
    before = snapshot(head)
    head(hidden, target).loss.backward()
    optimizer.step()
    assert not torch.equal(head.weight[D:], before[0][D:])
