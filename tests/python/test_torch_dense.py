"""tests/python/test_torch_dense.py -- the dense head as a PyTorch module: losses, gradients, queries, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from torch_devices import is_gpu  # noqa: E402
from widehead import BackendError, DtypeError, LabelError, Labels, NonFiniteError, ShapeError, _core  # noqa: E402
from widehead.sampling import Proposal, sample_classes  # noqa: E402
from widehead.torch import DenseHead  # noqa: E402

D, d, B = 37, 11, 7

SINGLE = [
    {},
    {"label_smoothing": 0.1},
    {"lse_penalty": 0.02},
    {"softcap": 3.0},
    {"class_weight": True},
    {"label_smoothing": 0.3, "lse_penalty": 0.01, "softcap": 2.0, "class_weight": True},
    {"reduction": "sum", "bias": False},
    {"reduction": "none"},
    {"loss": "bce"},
    {"loss": "squared_hinge", "class_weight": True},
]
MULTI = [
    {},
    {"lse_penalty": 0.02, "softcap": 3.0, "class_weight": True},
    {"loss": "bce", "class_weight": True},
    {"loss": "squared_hinge", "reduction": "sum"},
]


def is_slow(device: str) -> bool:
    """The emulated GPU: one random direction has to do there."""
    return is_gpu(device) and _core.cuda_emulated


def make_head(device: str, dtype: torch.dtype = torch.float64, **options: Any) -> DenseHead:
    if options.get("class_weight") is True:
        options["class_weight"] = torch.linspace(0.2, 2.0, options.get("n_classes", D))
    return DenseHead(d, D, device=device, dtype=dtype, seed=3, **options)


def make_batch(device: str, dtype: torch.dtype = torch.float64, rows: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, d, dtype=torch.float64, generator=generator).to(dtype)
    target = torch.randint(0, D, (rows,), generator=generator)
    target[0] = -100
    target[-1] = D - 1
    return hidden.to(device), target.to(device)


def make_labels(device: str, rows: int = B, weights: bool = True) -> tuple[Labels, Tensor]:
    """Sparse targets with an empty row, and the same as a dense matrix of weights."""
    rng = np.random.default_rng(rows)
    sizes = [0, *rng.integers(1, 5, rows - 1)]
    indices = np.concatenate([rng.permutation(D)[:n] for n in sizes])
    values = rng.uniform(0.5, 1.5, len(indices)) if weights else np.ones(len(indices))
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    dense = torch.zeros(rows, D, dtype=torch.float64)
    dense[np.repeat(np.arange(rows), sizes), indices] = torch.from_numpy(values).float().double()
    tensors = [torch.from_numpy(a).to(device) for a in (indptr, indices, values.astype(np.float32))]
    return Labels(tensors[0], tensors[1], tensors[2] if weights else None, D), dense.to(device)


def logits(head: DenseHead, hidden: Tensor) -> Tensor:
    z = F.linear(hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double())
    cap = head.options.softcap
    return z if cap is None else cap * torch.tanh(z / cap)


def gradients(loss: Tensor, head: DenseHead, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *head.owned_parameters()]))


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", SINGLE, ids=str)
def test_gradcheck_single_label(options: dict[str, Any], device: str) -> None:
    head = make_head(device, **options)
    hidden, target = make_batch(device)
    softmax = head.loss == "softmax"

    def run(hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(("weight", "bias"), parameters, strict=False))
        return tuple(torch.func.functional_call(head, named, (hidden, target), {"return_lse": softmax}))

    inputs = [t.detach().clone().requires_grad_() for t in (hidden, *head.owned_parameters())]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=is_slow(device))


@pytest.mark.parametrize("options", MULTI, ids=str)
@pytest.mark.parametrize("weights", [True, False])
def test_gradcheck_multi_label(options: dict[str, Any], weights: bool, device: str) -> None:
    head = make_head(device, **options)
    hidden, _ = make_batch(device)
    labels, _ = make_labels(device, weights=weights)
    sample_weight = torch.linspace(0.1, 1.0, B, device=device, dtype=torch.float64)

    def run(hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(("weight", "bias"), parameters, strict=False))
        return tuple(torch.func.functional_call(head, named, (hidden, labels, sample_weight)))

    inputs = [t.detach().clone().requires_grad_() for t in (hidden, *head.owned_parameters())]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=is_slow(device))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_cross_entropy(reduction: str, smoothing: float, weighted: bool, device: str) -> None:
    weight = torch.linspace(0.2, 2.0, D) if weighted else None
    head = make_head(device, label_smoothing=smoothing, reduction=reduction, class_weight=weight)
    hidden, target = make_batch(device, rows=23)
    hidden.requires_grad_()
    want = F.cross_entropy(
        logits(head, hidden),
        target,
        weight=None if weight is None else weight.to(device).double(),
        label_smoothing=smoothing,
        reduction=reduction,
    )
    got = head(hidden, target)
    assert_near(got.loss, want)
    upstream = torch.linspace(1, 2, want.numel(), device=device, dtype=torch.float64).reshape(want.shape)
    for mine, theirs in zip(
        gradients((got.loss * upstream).sum(), head, hidden),
        gradients((want * upstream).sum(), head, hidden),
        strict=True,
    ):
        assert_near(mine, theirs)
    picked = logits(head, hidden).log_softmax(-1)[torch.arange(23), target.clamp(min=0)]
    assert_near(got.output, torch.where(target < 0, 0.0, picked))


def multi_loss(head: DenseHead, hidden: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """losses and output of multi-label targets, from all the logits."""
    z = logits(head, hidden)
    c = torch.ones(D, dtype=z.dtype, device=z.device) if head.class_weight is None else head.class_weight.double()
    if head.loss == "softmax":
        lse = z.logsumexp(-1)
        losses = (y * c * (lse[:, None] - z)).sum(-1) + head.options.lse_penalty * lse**2
        return losses, (y * (z - lse[:, None])).sum(-1)
    if head.loss == "bce":
        return (c * (F.softplus(z) - y * z)).sum(-1), (y * z).sum(-1)
    positive, negative = y * c * (1 - z).clamp(min=0) ** 2, c * (1 + z).clamp(min=0) ** 2
    return torch.where(y != 0, positive, negative).sum(-1), (y * z).sum(-1)


@pytest.mark.parametrize("options", MULTI, ids=str)
@pytest.mark.parametrize("form", ["labels", "csr", "numpy"])
def test_multi_label_equals_reference(options: dict[str, Any], form: str, device: str) -> None:
    head = make_head(device, **options)
    hidden, _ = make_batch(device)
    hidden.requires_grad_()
    labels, y = make_labels(device)
    target: Any = labels
    if form == "csr":
        target = torch.sparse_csr_tensor(labels.indptr, labels.indices, labels.values, (B, D))
    elif form == "numpy" and device == "cpu":
        target = Labels(*(part.numpy() for part in (labels.indptr, labels.indices, labels.values)), D)
    losses, output = multi_loss(head, hidden, y)
    want = losses.sum() if head.reduction == "sum" else losses.mean()
    got = head(hidden, target)
    assert_near(got.output, output)
    assert_near(got.loss, want)
    for mine, theirs in zip(gradients(got.loss, head, hidden), gradients(want, head, hidden), strict=True):
        assert_near(mine, theirs)


def test_bce_equals_torch(device: str) -> None:
    head = make_head(device, loss="bce", reduction="sum")
    hidden, _ = make_batch(device)
    labels, y = make_labels(device, weights=False)
    want = F.binary_cross_entropy_with_logits(logits(head, hidden), y, reduction="sum")
    assert_near(head(hidden, labels).loss, want)


def test_sample_weight(device: str) -> None:
    hidden, target = make_batch(device)
    weight = torch.linspace(0, 3, B, device=device)
    losses = F.cross_entropy(logits(make_head(device), hidden), target, reduction="none")
    valid = (target != -100) * weight
    assert_near(make_head(device)(hidden, target, weight).loss, (losses * weight).sum() / valid.sum())
    assert_near(make_head(device, reduction="sum")(hidden, target, weight).loss, (losses * weight).sum())
    assert_near(make_head(device, reduction="none")(hidden, target, weight).loss, losses * weight)
    labels, y = make_labels(device)
    head = make_head(device, loss="bce")
    assert_near(head(hidden, labels, weight).loss, (multi_loss(head, hidden, y)[0] * weight).sum() / weight.sum())


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_batch_shapes(shape: tuple[int, ...], reduction: str, device: str) -> None:
    head = make_head(device, reduction=reduction)
    hidden = torch.randn(*shape, d, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.randint(0, D, shape, device=device)
    output, loss, lse = head(hidden, target, return_lse=True)
    assert output.shape == lse.shape == shape
    assert loss.shape == (shape if reduction == "none" else ())
    loss.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert head.weight.grad is not None and bool(torch.isfinite(head.weight.grad).all())
    assert head.topk(hidden, 2).classes.shape == (*shape, 2)
    assert head.predict(hidden).shape == shape
    assert head.log_prob(hidden).shape == (*shape, D)
    assert head.scores(hidden, torch.zeros(*shape, 3, dtype=torch.int64, device=device)).shape == (*shape, 3)
    if target.numel():
        want = F.cross_entropy(logits(head, hidden).reshape(-1, D), target.reshape(-1), reduction=reduction)
        assert_near(loss, want.reshape(loss.shape))
    else:
        assert loss.sum() == 0 and bool((head.weight.grad == 0).all())


def test_strided_hidden_gives_the_same(device: str) -> None:
    head = make_head(device)
    hidden, target = make_batch(device)
    wide = torch.randn(B, 2 * d, dtype=torch.float64, device=device)
    wide[:, ::2] = hidden
    tall = hidden.t().contiguous().t()
    padded = torch.cat([hidden, hidden], 1)[:, :d]
    for view in (wide[:, ::2], tall, padded):
        assert not view.is_contiguous()
        assert torch.equal(head(view, target).loss, head(hidden, target).loss)
    same = hidden[:1].expand(B, d)
    assert_near(head(same, target).loss, head(same.contiguous(), target).loss)


def test_all_ignored_is_zero(device: str) -> None:
    for options in ({}, {"class_weight": True}, {"loss": "bce"}, {"lse_penalty": 0.1}):
        head = make_head(device, **options)
        hidden, target = make_batch(device)
        hidden.requires_grad_()
        loss = head(hidden, torch.full_like(target, -100)).loss
        loss.backward()
        assert loss == 0 and hidden.grad is not None and bool((hidden.grad == 0).all())
        assert bool((head.weight.grad == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_hidden(dtype: torch.dtype, device: str) -> None:
    """float32 weights: hidden enters as it is, so only float32 arithmetic separates us from float64."""
    head = make_head(device, torch.float32)
    hidden, target = make_batch(device, dtype)
    hidden.requires_grad_()
    got = head(hidden, target, return_lse=True)
    assert got.loss.dtype == got.output.dtype == got.lse.dtype == torch.float32
    exact = hidden.detach().double().requires_grad_()
    want = F.cross_entropy(logits(head, exact), target)
    # |z| <= sum |h w|; each of d + D terms rounds once or twice in float32.
    bound = float((exact.detach().abs() @ head.weight.detach().double().abs().t()).max()) * (d + D) * 2.0**-23
    assert abs(got.loss.item() - want.item()) <= bound
    got.loss.backward()
    (reference,) = torch.autograd.grad(want, exact)
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert bool(((hidden.grad.double() - reference).abs() <= reference.abs() * unit + bound).all())


def test_bfloat16_weights(device: str) -> None:
    head = make_head(device, torch.bfloat16)
    assert head.weight.dtype == torch.bfloat16 and head.bias is not None and head.bias.dtype == torch.float32
    hidden, target = make_batch(device, torch.bfloat16)
    hidden.requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    want = F.cross_entropy(logits(head, exact), target)
    got = head(hidden, target).loss
    assert got.dtype == torch.float32 and abs(got.item() - want.item()) < 1e-4 * want.item()
    got.backward()
    (reference,) = torch.autograd.grad(want, exact)
    # The gradient is a sum over classes of p_c w_c with p rounded to bfloat16.
    size = (logits(head, exact).softmax(-1) @ head.weight.double().abs()).max()
    assert hidden.grad is not None
    assert bool(((hidden.grad.double() - reference).abs() <= 2.0**-7 * size).all())
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.bfloat16


def test_filter_eps_bounds_the_error(device: str) -> None:
    hidden, target = make_batch(device)
    exact, filtered = make_head(device), make_head(device, filter_eps=0.02)
    for head in (exact, filtered):
        head(hidden, target).loss.backward()
    error = (exact.weight.grad - filtered.weight.grad).abs()
    valid = int((target != -100).sum())
    assert float(error.max()) <= 0.02 / valid * float(hidden.abs().sum(0).max())
    assert torch.equal(make_head(device, filter_eps=0.02)(hidden, target).loss, exact(hidden, target).loss)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"bias": False}])
def test_queries(options: dict[str, Any], device: str) -> None:
    head = make_head(device, **options)
    hidden, _ = make_batch(device)
    z = logits(head, hidden).detach()
    scores, classes = head.topk(hidden, 5)
    best = z.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(classes, best.indices[:, :5])
    assert_near(scores, best.values[:, :5])
    assert torch.equal(head.predict(hidden), classes[:, 0])
    assert_near(head.scores(hidden), z)
    wanted = torch.tensor([[3, D - 1, 3]], device=device).repeat(B, 1) - torch.arange(B, device=device)[:, None] % 3
    assert_near(head.scores(hidden, wanted), z.gather(1, wanted))
    assert_near(head.scores(hidden, wanted[0]), z[:, wanted[0]])
    assert_near(head.log_prob(hidden), z.log_softmax(-1))
    assert_near(head.log_prob(hidden, wanted), z.log_softmax(-1).gather(1, wanted))
    assert_near(head.lse(hidden), z.logsumexp(-1))
    bce = make_head(device, loss="bce")
    assert_near(bce.log_prob(hidden), F.logsigmoid(logits(bce, hidden)))


def test_topk_excludes(device: str) -> None:
    head = make_head(device)
    hidden, _ = make_batch(device)
    best = head.topk(hidden, 3).classes
    indptr = torch.arange(0, 2 * B + 1, 2, device=device)
    seen = Labels(indptr, best[:, :2].reshape(-1).contiguous(), None, D)
    assert torch.equal(head.topk(hidden, 1, exclude=seen).classes, best[:, 2:])
    csr = torch.sparse_csr_tensor(
        indptr, best[:, :2].sort().values.reshape(-1), torch.ones(2 * B, device=device), (B, D)
    )
    assert torch.equal(head.topk(hidden, 1, exclude=csr).classes, best[:, 2:])
    rest = head.topk(hidden, D, exclude=seen)
    assert bool((rest.classes[:, -2:] == -1).all()) and bool(torch.isneginf(rest.scores[:, -2:]).all())


def test_queries_refuse_backward(device: str) -> None:
    head = make_head(device)
    hidden, target = make_batch(device)
    hidden.requires_grad_()
    assert not head.scores(hidden).requires_grad and not head.topk(hidden, 2).scores.requires_grad
    loss = head(hidden, target).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("multi", [False, True])
def test_sampled_softmax_is_the_softmax_over_the_sample(multi: bool, device: str) -> None:
    proposal = torch.linspace(0.1, 2.0, D, dtype=torch.float64)
    head = make_head(device, loss="sampled_softmax", negatives=12, proposal=proposal, class_weight=True)
    hidden, target = make_batch(device)
    hidden.requires_grad_()
    labels, dense = make_labels(device)
    torch.manual_seed(5)
    got = head(hidden, labels if multi else target, return_lse=True)
    torch.manual_seed(5)
    seed = int(torch.randint(2**63 - 1, (), device=device))
    indices = (labels.indices if multi else target).cpu().numpy()
    picked = sample_classes(
        Proposal(proposal.numpy(), D), 12, indices, seed=seed, step=0, ignore_index=None if multi else -100
    )
    rows = torch.from_numpy(picked.rows).to(device)
    y = dense[:, rows] if multi else (target[:, None] == rows[None]).double()
    z = logits(head, hidden)[:, rows] + torch.where(y != 0, 0.0, torch.from_numpy(picked.offset).to(device).double())
    lse = z.logsumexp(-1)
    weights = y * head.class_weight.double()[rows]
    losses = (weights * (lse[:, None] - torch.where(y != 0, z, 0.0))).sum(-1)
    want = losses.mean() if multi else losses.sum() / weights.sum()
    assert_near(got.loss, want)
    assert_near(got.lse, lse)
    mine, theirs = gradients(got.loss, head, hidden), gradients(want, head, hidden)
    assert mine[1].is_sparse and torch.equal(mine[1].coalesce().indices()[0], rows)
    for a, b in zip(mine, theirs, strict=True):
        assert_near(a.to_dense(), b)
    head.eval()
    assert_near(head(hidden, target).loss, make_full(head, device)(hidden, target).loss)


def make_full(head: DenseHead, device: str) -> DenseHead:
    full = make_head(device, class_weight=head.class_weight)
    full.load_state_dict(head.state_dict())
    return full


def test_sampled_softmax_draws_from_torch_generator(device: str) -> None:
    head = make_head(device, loss="sampled_softmax", negatives=4)
    hidden, target = make_batch(device)
    torch.manual_seed(1)
    first, second = head(hidden, target).loss, head(hidden, target).loss
    torch.manual_seed(1)
    assert torch.equal(head(hidden, target).loss, first) and not torch.equal(first, second)


def test_sampled_softmax_trains_with_sparse_adam(device: str) -> None:
    head = make_head(device, torch.float32, loss="sampled_softmax", negatives=8)
    hidden, target = make_batch(device, torch.float32)
    before = head.weight.detach().clone()
    optimizers = [torch.optim.SparseAdam([head.weight], lr=0.1), torch.optim.SGD([head.bias], lr=0.1)]
    head(hidden, target).loss.backward()
    touched = head.weight.grad.coalesce().indices()[0]
    for optimizer in optimizers:
        optimizer.step()
    moved = (head.weight != before).any(-1).nonzero().squeeze(-1)
    assert 0 < len(moved) < D and torch.equal(moved, touched)


def test_weight_tying(device: str) -> None:
    embedding = torch.nn.Embedding(D, d, device=device, dtype=torch.float64)
    head = make_head(device, bias=False)
    head.weight = embedding.weight
    _, target = make_batch(device)
    tokens = torch.arange(B, device=device)
    loss = head(embedding(tokens), target).loss
    loss.backward()
    z = embedding(tokens) @ embedding.weight.t()
    (want,) = torch.autograd.grad(F.cross_entropy(z, target), embedding.weight)
    assert_near(embedding.weight.grad, want)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": lambda h, t: h[:, :-1]}, ShapeError, r"hidden.*\[\.\.\., 11\].*\[7, 10\]"),
        ({"hidden": lambda h, t: h.double()}, DtypeError, "float64 weights"),
        ({"hidden": lambda h, t: h.long()}, DtypeError, "hidden.*int64"),
        ({"hidden": lambda h, t: h.to("meta")}, BackendError, "meta"),
        ({"hidden": lambda h, t: h.numpy()}, DtypeError, "ndarray"),
        ({"target": lambda h, t: t.int()}, DtypeError, "target.*int64.*int32"),
        ({"target": lambda h, t: t[:-1]}, ShapeError, r"target.*\[7\].*\[6\]"),
        ({"target": lambda h, t: t.to("meta")}, BackendError, "target.*meta"),
        ({"target": lambda h, t: [1, 2]}, DtypeError, "target.*list"),
        ({"target": lambda h, t: torch.eye(B, D).to_sparse()}, DtypeError, "to_sparse_csr"),
        ({"target": lambda h, t: torch.eye(B, D + 1).to_sparse_csr()}, ShapeError, r"\[7, 37\].*\[7, 38\]"),
        ({"target": lambda h, t: Labels(torch.zeros(3).long(), t[:0], None, D)}, ShapeError, "7 rows"),
        ({"target": lambda h, t: torch.where(t == t.max(), D, t)}, LabelError, "37.*6"),
        ({"target": lambda h, t: torch.where(t == -100, -1, t)}, LabelError, "-1.*0"),
        ({"sample_weight": lambda h, t: torch.ones(B - 1)}, ShapeError, "sample_weight"),
        ({"sample_weight": lambda h, t: torch.ones(B).long()}, ShapeError, "sample_weight.*floating"),
    ],
)
def test_refuses_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    head = make_head("cpu", torch.float32)
    hidden, target = make_batch("cpu", torch.float32)
    arguments = {"hidden": hidden, "target": target} | {name: f(hidden, target) for name, f in change.items()}
    with pytest.raises(error, match=words):
        head(**arguments)


def test_refuses_bad_sampled_labels() -> None:
    head = make_head("cpu", torch.float32, loss="sampled_softmax", negatives=4)
    hidden, target = make_batch("cpu", torch.float32)
    target[3] = D
    with pytest.raises(LabelError, match=r"37.*3"):
        head(hidden, target)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "hinge"}, "loss.*squared_hinge.*'hinge'"),
        ({"reduction": "avg"}, "reduction.*'avg'"),
        ({"label_smoothing": 1.1}, "label_smoothing.*1.1"),
        ({"label_smoothing": 0.1, "loss": "bce"}, "label_smoothing.*bce"),
        ({"lse_penalty": -1.0}, "lse_penalty"),
        ({"softcap": 0.0}, "softcap"),
        ({"negatives": 4}, "negatives"),
        ({"loss": "sampled_softmax"}, "negatives"),
        ({"class_weight": torch.ones(D + 1)}, r"class_weight.*\[37\].*\[38\]"),
        ({"loss": "sampled_softmax", "negatives": 4, "proposal": "zipf"}, "proposal.*'zipf'"),
        ({"loss": "sampled_softmax", "negatives": 4, "proposal": torch.ones(3)}, "proposal"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        DenseHead(d, D, **options)


def test_refuses_bad_values_and_sizes() -> None:
    with pytest.raises(NonFiniteError, match="class_weight"):
        DenseHead(d, D, class_weight=torch.full((D,), -1.0))
    with pytest.raises(DtypeError, match="float16"):
        DenseHead(d, D, dtype=torch.float16)
    with pytest.raises(ShapeError, match="n_classes"):
        DenseHead(d, 0)
    head = make_head("cpu")
    hidden, target = make_batch("cpu")
    for k in (0, D + 1):
        with pytest.raises(ShapeError, match=f"k: .*got {k}"):
            head.topk(hidden, k)
    with pytest.raises(DtypeError, match="classes"):
        head.scores(hidden, torch.zeros(B, 2))
    with pytest.raises(ShapeError, match="classes"):
        head.scores(hidden, torch.zeros(B + 1, 2, dtype=torch.int64))
    for bad in (-1, D):
        with pytest.raises(LabelError, match=str(bad)):
            head.scores(hidden, torch.full((B, 1), bad))
    hinge = make_head("cpu", loss="squared_hinge")
    with pytest.raises(ShapeError, match=r"log_prob.*squared_hinge"):
        hinge.log_prob(hidden)
    with pytest.raises(ShapeError, match=r"return_lse.*squared_hinge"):
        hinge(hidden, target, return_lse=True)


def test_non_finite_hidden_gives_non_finite_gradients() -> None:
    """As every torch layer in plain mode: whoever scales losses looks for it there."""
    head = make_head("cpu", torch.float32)
    hidden, target = make_batch("cpu", torch.float32)
    hidden[2, 3] = torch.inf
    hidden.requires_grad_()
    head(hidden, target).loss.backward()
    assert hidden.grad is not None and not bool(torch.isfinite(hidden.grad).all())
    assert not bool(torch.isfinite(head.weight.grad).all())
