"""tests/python/test_torch_exact.py -- the exact head in PyTorch: its steps are torch.optim.SGD's on nn.Linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from widehead import Labels  # noqa: E402
from widehead.torch import ExactHead, FusedRMSprop, FusedSGD, clip_grad_norm_  # noqa: E402

only_cpu = pytest.mark.parametrize("device", ["cpu"], indirect=True)

D, d, B = 53, 6, 5
LOSSES: dict[str, dict[str, float]] = {
    "squared_error": {},
    "spherical_softmax": {"eps": 0.1},
    "taylor_softmax": {},
    "z_loss": {"a": 0.7, "b": 1.5},
}


@pytest.fixture(autouse=True)
def place(device: str) -> Iterator[None]:
    """Tensors and modules of every test are made on its device."""
    with torch.device(device):
        yield


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def here(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array)).to(torch.get_default_device())


def make_head(loss: str = "squared_error", dtype: torch.dtype = torch.float64, **options: Any) -> ExactHead:
    return ExactHead(d, D, loss=loss, dtype=dtype, seed=3, **LOSSES[loss], **options)


def dense_losses(head: ExactHead, o: Tensor, y: Tensor) -> Tensor:
    """Losses `[B]` by all outputs `[B, D]`, from their definitions; y `[B, D]`, 0 is no target."""
    option = head.options.loss_arguments()
    if head.loss == "squared_error":
        return ((o - y) ** 2).sum(1)
    if head.loss == "z_loss":
        z = (o - o.mean(1, keepdim=True)) / o.std(1, correction=0, keepdim=True)
        return (y * F.softplus(option["a"] * (option["b"] - z)) / option["a"]).sum(1)
    own = o**2 + option["eps"] if head.loss == "spherical_softmax" else 1 + o + o**2 / 2
    return -(y * (own / own.sum(1, keepdim=True)).log()).sum(1)


def one_hot(target: Tensor) -> Tensor:
    y = torch.zeros(*target.shape, D, dtype=torch.float64)
    return y.scatter_(-1, target.clamp(min=0).unsqueeze(-1), (target >= 0).double().unsqueeze(-1))


def make_batch(generator: torch.Generator, rows: int = B) -> tuple[Tensor, Tensor]:
    """Classes repeat within a batch and across them; the first example has none."""
    hidden = torch.randn(rows, d, dtype=torch.float64, generator=generator)
    target = torch.randint(0, 9, (rows,), generator=generator) ** 2 % D
    target[0] = -100
    return hidden, target


def make_labels(seed: int, rows: int = B, weights: bool = True) -> tuple[Labels, Tensor]:
    rng = np.random.default_rng(seed)
    sizes = [0, *rng.integers(1, 5, rows - 1)]
    indices = np.concatenate([rng.permutation(D)[:n] for n in sizes])
    values = rng.uniform(0.5, 1.5, len(indices)).astype(np.float32) if weights else np.ones(len(indices), np.float32)
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    dense = torch.zeros(rows, D, dtype=torch.float64)
    dense[here(np.repeat(np.arange(rows), sizes)), here(indices)] = here(values).double()
    parts = [indptr, indices, values if weights else None]
    if torch.get_default_device().type == "cuda":
        parts = [None if part is None else here(part) for part in parts]
    return Labels(*parts, D), dense


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def assert_same_layer(head: ExactHead, linear: nn.Linear, tolerance: float = 1e-10) -> None:
    assert_near(head.weight, linear.weight.detach(), tolerance)
    if linear.bias is not None:
        assert head.bias is not None
        assert_near(head.bias, linear.bias.detach(), tolerance)


class Pair:
    """A network with an exact head, and the same with an nn.Linear, each with its optimisers."""

    def __init__(self, head: ExactHead, lr: float = 0.02, **options: Any) -> None:
        torch.manual_seed(5)
        self.body, self.plain_body = (nn.Linear(d, d, dtype=torch.float64) for _ in range(2))
        self.plain_body.load_state_dict(self.body.state_dict())
        self.head, self.linear = head, head.to_linear()
        self.mine = FusedSGD(head, lr=lr, **options)
        self.theirs = torch.optim.SGD(self.linear.parameters(), lr=lr, **options)
        self.bodies = [torch.optim.SGD(body.parameters(), lr=0.05) for body in (self.body, self.plain_body)]

    def zero_grad(self) -> None:
        for optimizer in (self.mine, self.theirs, *self.bodies):
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in (self.mine, self.theirs, *self.bodies):
            optimizer.step()

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.body(x)), torch.tanh(self.plain_body(x))

    def backward(self, x: Tensor, target: Any, y: Tensor) -> None:
        """One backward each, of the mean loss over the examples that have a target."""
        a, b = self.hidden(x)
        loss = self.head(a, target).loss
        counts = torch.ones(len(y)) if isinstance(target, Labels) else target >= 0
        want = (dense_losses(self.head, self.linear(b), y) * counts).sum() / counts.sum()
        assert_near(loss.detach(), want.detach())
        loss.backward()
        want.backward()
        for p, q in zip(self.body.parameters(), self.plain_body.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert_near(p.grad, q.grad)

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(torch.cat([p.grad.reshape(-1) for p in self.linear.parameters()]))  # type: ignore[union-attr]


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.03}], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_equal_torch_sgd_on_linear(loss: str, options: dict[str, float], bias: bool, multi: bool) -> None:
    pair, generator = Pair(make_head(loss, bias=bias), **options), seeded(1)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 7, 0.6) for o in (pair.mine, pair.theirs)]
    for i in range(25):
        x, target = make_batch(generator)
        goal, y = make_labels(i) if multi else (target, one_hot(target))
        pair.zero_grad()
        pair.backward(x, goal, y)
        assert_near(pair.head.grad_norm(), pair.norm())
        pair.step()
        for schedule in schedules:
            schedule.step()
    assert_same_layer(pair.head, pair.linear)
    state = pair.mine.state_dict()["state"]
    if "momentum" in options:
        theirs = pair.theirs.state[pair.linear.weight]["momentum_buffer"]
        assert_near(state[1]["momentum_buffer"], theirs)
    assert int(state[1]["step"]) == 25


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.03}], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_several_backwards_are_one_step(loss: str, options: dict[str, float]) -> None:
    pair, generator = Pair(make_head(loss, bias=True), **options), seeded(1)
    for i in range(8):
        pair.zero_grad()
        for part in range(3):
            x, target = make_batch(generator, 2 + part)
            pair.backward(x, target, one_hot(target))
            if i == 4 and part == 1:  # both forget what they have
                pair.zero_grad()
        pair.step()
    assert_same_layer(pair.head, pair.linear)


def test_step_clears_and_nothing_is_no_step() -> None:
    head = make_head()
    optimizer = FusedSGD(head, lr=0.1)
    hidden, target = make_batch(seeded(1))
    head(hidden, target).loss.backward()
    assert head.diagnostics()["steps"] == 0
    optimizer.step()
    after = head.weight.clone()
    optimizer.step()
    assert torch.equal(head.weight, after) and head.diagnostics()["steps"] == 1
    assert int(optimizer.state_dict()["state"][1]["step"]) == 1
    head(hidden, target).loss.backward()
    head.zero_grad()
    optimizer.step()
    assert torch.equal(head.weight, after) and float(head.grad_norm()) == 0


def test_retain_graph_adds_up() -> None:
    pair, (x, target) = Pair(make_head("taylor_softmax", bias=True)), make_batch(seeded(1))
    a, b = pair.hidden(x)
    counts = target >= 0
    mine = pair.head(a, target).loss
    theirs = (dense_losses(pair.head, pair.linear(b), one_hot(target)) * counts).sum() / counts.sum()
    for loss in (mine, theirs):
        loss.backward(retain_graph=True)
        (3 * loss).backward()
    for p, q in zip(pair.body.parameters(), pair.plain_body.parameters(), strict=True):
        assert_near(p.grad, q.grad)  # type: ignore[arg-type]
    pair.step()
    assert_same_layer(pair.head, pair.linear)
    with pytest.raises(RuntimeError, match="second time"):
        mine.backward()


@pytest.mark.parametrize("form", ["labels", "csr", "tensors"])
def test_forms_of_labels(form: str) -> None:
    labels, y = make_labels(3)
    parts = [torch.as_tensor(part) for part in (labels.indptr, labels.indices, labels.values)]
    target: Any = labels
    if form == "csr":
        target = torch.sparse_csr_tensor(*parts, (B, D))
    elif form == "tensors":
        target = Labels(*parts, D)
    head = make_head("taylor_softmax")
    hidden = torch.randn(B, d, dtype=torch.float64)
    got = head(hidden, target)
    assert_near(got.loss, dense_losses(head, hidden @ head.weight.T, y).mean())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_and_outputs(loss: str, multi: bool, weighted: bool, reduction: str) -> None:
    """Without an owner: losses and the gradient to hidden are those of nn.Linear, and nothing is trained."""
    head = make_head(loss, bias=True, reduction=reduction)
    linear = head.to_linear()
    hidden, target = (t.reshape(2, 3, *t.shape[1:]) for t in make_batch(seeded(4), 6))
    goal, y = (target, one_hot(target)) if not multi else make_labels(2, 6)
    y, counts = y.reshape(6, D), torch.ones(6).double() if multi else (target.reshape(-1) >= 0).double()
    weight = torch.linspace(0, 2, 6, dtype=torch.float32).reshape(2, 3) if weighted else None
    scale = counts if weight is None else counts * weight.reshape(-1).double()
    a, b = (hidden.clone().requires_grad_() for _ in range(2))
    got = head(a, goal, weight)
    o = linear(b).reshape(6, D)
    losses = dense_losses(head, o, y) * scale
    want = losses.reshape(2, 3) if reduction == "none" else losses.sum() / (scale.sum() if reduction == "mean" else 1)
    assert_near(got.loss, want)
    softmax = "softmax" in loss
    output = -dense_losses(head, o, y) * counts if softmax else (y * o).sum(1)
    assert_near(got.output, output.reshape(2, 3))
    upstream = torch.linspace(1, 2, want.numel(), dtype=torch.float64).reshape(want.shape)
    ((got.loss * upstream).sum() + 0.3 * got.output.sum()).backward()
    ((want * upstream).sum() + 0.3 * output.sum()).backward()
    assert_near(a.grad, b.grad)  # type: ignore[arg-type]
    assert_same_layer(head, linear, 0.0)
    assert head.diagnostics()["steps"] == 0 and not any(p.requires_grad for p in head.parameters())


def test_means_over_nobody_are_zero() -> None:
    head = make_head(bias=True)
    hidden = torch.randn(3, d, dtype=torch.float64, requires_grad=True)
    out = head(hidden, torch.full((3,), -100))
    out.loss.backward()
    assert float(out.loss) == 0 and bool((hidden.grad == 0).all())
    optimizer = FusedSGD(head, lr=0.1)
    empty = head(hidden[:0], torch.zeros(0, dtype=torch.int64))
    empty.loss.backward()
    optimizer.step()
    assert float(empty.loss) == 0 and head.diagnostics()["steps"] == 0
    with pytest.raises(RuntimeError, match="int64"):
        head(hidden, torch.zeros(3))


NAMED: dict[str, Callable[..., Tensor]] = {
    "squared_error": lambda A, q, s, D: q - 2 * A + 1,
    "spherical_softmax": lambda A, q, s, D: (q + D * 0.1).log() - (A**2 + 0.1).log(),
    "taylor_softmax": lambda A, q, s, D: (D + s + q / 2).log() - (1 + A + A**2 / 2).log(),
    "z_loss": lambda A, q, s, D: F.softplus(0.7 * (1.5 - (A - s / D) / (q / D - (s / D) ** 2).sqrt())) / 0.7,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_user_loss_equals_named(loss: str) -> None:
    mine, named = make_head(loss, bias=True), make_head(loss, bias=True)
    optimizers = [FusedSGD(head, lr=0.02, momentum=0.5) for head in (mine, named)]
    generator = seeded(2)
    for _ in range(10):
        hidden, target = make_batch(generator)
        a, b = (hidden.clone().requires_grad_() for _ in range(2))
        losses = NAMED[loss](*mine.statistics(a, target), D)[target >= 0]
        want = named(b, target).loss
        assert_near(losses.mean(), want, 1e-12)
        losses.mean().backward()
        want.backward()
        assert_near(a.grad, b.grad, 1e-12)  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.step()
    assert_near(mine.weight, named.weight, 1e-12)


def test_loss_of_implicit_feedback() -> None:
    """alpha sum o^2 over all classes + sum w (o - 1)^2 over the observed ones."""
    head, alpha = make_head(bias=True), 0.05
    linear = head.to_linear()
    mine, theirs = FusedSGD(head, lr=0.02), torch.optim.SGD(linear.parameters(), lr=0.02)
    for i in range(12):
        labels, w = make_labels(i)
        hidden = torch.randn(B, d, dtype=torch.float64, generator=seeded(i))
        A, q, _ = head.statistics(hidden, labels)
        loss = (alpha * q.sum() + (torch.as_tensor(labels.values) * (A - 1) ** 2).sum()) / B
        o = linear(hidden)
        want = (alpha * (o**2).sum() + (w * (o - 1) ** 2).sum()) / B
        assert_near(loss, want)
        theirs.zero_grad()
        loss.backward()
        want.backward()
        mine.step()
        theirs.step()
    assert_same_layer(head, linear)


def test_a_loss_of_the_gradients_of_some_only() -> None:
    """A gradient to A alone, to q alone, to s alone; several targets an example."""
    for pick in range(3):
        head = make_head(bias=True)
        linear = head.to_linear()
        mine, theirs = FusedSGD(head, lr=0.02), torch.optim.SGD(linear.parameters(), lr=0.02)
        labels, y = make_labels(1, weights=False)
        hidden = torch.randn(B, d, dtype=torch.float64, generator=seeded(1))
        head.statistics(hidden, labels)[pick].sin().sum().backward()
        o = linear(hidden)
        theirs.zero_grad()
        ((o.sin() * y).sum(), (o**2).sum(1).sin().sum(), o.sum(1).sin().sum())[pick].backward()
        mine.step()
        theirs.step()
        assert_same_layer(head, linear)


@pytest.mark.parametrize("max_norm", [0.01, 1e9])
def test_clipping_over_backbone_and_head(max_norm: float) -> None:
    pair, generator = Pair(make_head(bias=True), lr=0.05, momentum=0.5), seeded(1)
    for _ in range(6):
        x, target = make_batch(generator)
        pair.zero_grad()
        pair.backward(x, target, one_hot(target))
        got = clip_grad_norm_(pair.body.parameters(), pair.head, max_norm)
        plain = [*pair.plain_body.parameters(), *pair.linear.parameters()]
        assert_near(got, nn.utils.clip_grad_norm_(plain, max_norm))
        assert_near(pair.head.grad_norm(), pair.norm())
        pair.step()
    assert_same_layer(pair.head, pair.linear)
    for p, q in zip(pair.body.parameters(), pair.plain_body.parameters(), strict=True):
        assert_near(p, q)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_rmsprop_by_column(momentum: float) -> None:
    head = make_head("taylor_softmax", bias=True)
    linear = head.to_linear()
    optimizer = FusedRMSprop(head, lr=0.003, alpha=0.9, eps=1e-6, weight_decay=0.1, momentum=momentum)
    second, velocity = torch.zeros(d + 1, dtype=torch.float64), torch.zeros(D, d + 1, dtype=torch.float64)
    generator = seeded(3)
    for _ in range(12):
        hidden, target = make_batch(generator)
        head(hidden, target).loss.backward()
        counts = target >= 0
        loss = (dense_losses(head, linear(hidden), one_hot(target)) * counts).sum() / counts.sum()
        g = torch.cat([x.reshape(D, -1) for x in torch.autograd.grad(loss, list(linear.parameters()))], 1)
        assert_near(head.grad_columns(), (g**2).mean(0))
        second = 0.9 * second + 0.1 * (g**2).mean(0)
        whole = torch.cat([linear.weight, linear.bias[:, None]], 1).detach()
        velocity = momentum * velocity + g / (second.sqrt() + 1e-6) + 0.1 * whole
        optimizer.step()
        with torch.no_grad():
            linear.weight -= 0.003 * velocity[:, :d]
            linear.bias -= 0.003 * velocity[:, d]
    assert_same_layer(head, linear)
    assert_near(optimizer.state_dict()["state"][1]["square_avg"], second)


def test_momentum_goes_off_and_on() -> None:
    pair, generator = Pair(make_head(bias=True)), seeded(1)
    for i in range(12):
        for optimizer in (pair.mine, pair.theirs):
            optimizer.param_groups[0]["momentum"] = 0.0 if i < 3 or 6 <= i < 9 else 0.8
        x, target = make_batch(generator)
        pair.zero_grad()
        pair.backward(x, target, one_hot(target))
        pair.step()
    assert_same_layer(pair.head, pair.linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_of_other_types(dtype: torch.dtype) -> None:
    head = make_head(dtype=torch.float32, bias=True)
    optimizer = FusedSGD(head, lr=0.1)
    hidden, target = make_batch(seeded(1))
    hidden = hidden.to(dtype).requires_grad_()
    wide = hidden.detach().double().requires_grad_()
    linear = head.to_linear().double()
    out = head(hidden, target)
    counts = target >= 0
    want = (dense_losses(head, linear(wide), one_hot(target)) * counts).sum() / counts.sum()
    assert out.loss.dtype == torch.float32 and out.output.dtype == torch.float32
    assert_near(out.loss, want.detach(), 1e-5)
    out.loss.backward()
    want.backward()
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    assert_near(hidden.grad, wide.grad, 1e-5 if dtype == torch.float32 else 1e-2)  # type: ignore[arg-type]
    optimizer.step()
    with torch.no_grad():
        linear.weight -= 0.1 * linear.weight.grad
    assert_near(head.weight, linear.weight, 1e-5)


@only_cpu
@pytest.mark.parametrize("loss", LOSSES)
def test_the_method_of_the_papers_gives_the_same(loss: str) -> None:
    heads = [make_head(loss, method=method, bias=True) for method in ("blocked", "woodbury")]
    for head in heads:
        generator, optimizer = seeded(5), FusedSGD([head], lr=0.02, weight_decay=0.01)
        for _ in range(30):
            hidden, target = make_batch(generator)
            head(hidden, target).loss.backward()
            optimizer.step()
    assert_near(heads[1].weight, heads[0].weight)
    assert "method='woodbury'" in repr(heads[1])
