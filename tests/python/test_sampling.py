"""tests/python/test_sampling.py -- the draws of sampled softmax, its estimate of the normaliser, and its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reference import Dense, Targets, random_blocks, within
from widehead import Labels, _core
from widehead.numpy import DenseHead
from widehead.sampling import Proposal, sample_classes

N = 50
ZIPF = 1.0 / np.arange(1, N + 1)
PROPOSALS: dict[str, Any] = {"uniform": "uniform", "log_uniform": "log_uniform", "weights": ZIPF**0.75}


def probabilities(name: str, n: int = N) -> np.ndarray:
    if name == "uniform":
        return np.full(n, 1 / n)
    if name == "log_uniform":
        c = np.arange(n)
        return np.log((c + 2) / (c + 1)) / np.log(n + 1)
    return PROPOSALS[name] / PROPOSALS[name].sum()


@pytest.mark.parametrize("name", PROPOSALS)
def test_draws_follow_the_proposal(name: str) -> None:
    proposal, q = Proposal(PROPOSALS[name], N), probabilities(name)
    assert np.abs(np.exp(proposal.log_probability(np.arange(N))) - q).max() < 1e-12 and abs(q.sum() - 1) < 1e-12
    n = 400_000
    draws = proposal.draw(n, seed=3, step=8)
    assert draws.min() >= 0 and draws.max() < N
    count = np.bincount(draws, minlength=N)
    chi2 = ((count - n * q) ** 2 / (n * q)).sum()
    # Chi-squared with 49 degrees of freedom: mean 49, standard deviation 9.9; too good would be as wrong as too bad.
    assert 49 - 4 * 9.9 < chi2 < 49 + 5 * 9.9
    again = proposal.draw(1000, seed=3, step=8)
    assert np.array_equal(again, draws[:1000])  # draw i depends on (seed, step, i) alone
    for other in (proposal.draw(1000, seed=4, step=8), proposal.draw(1000, seed=3, step=9)):
        assert 0 < (other == again).mean() < 0.5


def test_draws_are_those_of_philox(threads: int) -> None:
    n, seed, step = 10_000, (5 << 40) + 3, (1 << 32) + 2
    words = random_blocks(seed, "negatives", step, np.arange(n), np.arange(1))[:, 0, :]
    x = (words[:, 1] << np.uint64(32)) | words[:, 0]
    want = [(int(v) * 1_000_003) >> 64 for v in x]
    assert np.array_equal(Proposal("uniform", 1_000_003).draw(n, seed=seed, step=step), want)
    u = (x >> np.uint64(11)).astype(float) * 2.0**-53
    want = np.minimum(np.floor(np.expm1(u * np.log1p(1_000_003))), 1_000_002)
    got = Proposal("log_uniform", 1_000_003).draw(n, seed=seed, step=step)
    assert (got == want).mean() > 0.999 and np.abs(got - want).max() <= 1


def test_alias_table_adds_up_to_its_weights() -> None:
    rng = np.random.default_rng(0)
    for weight in (rng.random(1000) + 1e-6, np.array([3.0]), np.array([1e-9, 1.0]), 10.0 ** rng.uniform(-8, 8, 500)):
        n = len(weight)
        threshold, alias = np.empty(n, np.float32), np.empty(n, np.int64)
        _core.alias_table(weight=weight, threshold=threshold, alias=alias)
        mass = threshold.astype(float).copy()
        np.add.at(mass, alias, 1.0 - threshold.astype(float))
        assert np.abs(mass / n - weight / weight.sum()).max() < 1e-6 / n + 1e-12


@pytest.mark.parametrize("name", PROPOSALS)
def test_estimate_of_the_normaliser_is_unbiased(name: str) -> None:
    """The mean of Z over many draws is within 4 standard errors of the full softmax's, own targets of both kinds."""
    rng = np.random.default_rng(1)
    hidden, weight = rng.normal(size=(4, 6)), rng.normal(size=(N, 6))
    target, proposal = np.array([0, 7, 7, 49]), Proposal(PROPOSALS[name], N)
    z = hidden @ weight.T
    full, draws = np.exp(z).sum(1), []
    for step in range(3000):
        sampled = sample_classes(proposal, 12, target, seed=2, step=step)
        lse = np.empty(4)
        _core.dense_forward(
            hidden=hidden, weight=weight[sampled.rows], bias=None, offset=sampled.offset, indptr=None,
            indices=sampled.indices, values=None, loss="softmax", losses=None, output=None, lse=lse,
        )  # fmt: skip
        draws.append(np.exp(lse))
    mean, error = np.mean(draws, 0), np.std(draws, 0) / np.sqrt(len(draws))
    assert (np.abs(mean - full) < 4 * error).all()
    assert (error < 0.05 * full).all()  # and that says something


def test_bookkeeping() -> None:
    proposal = Proposal("uniform", 10)
    draws = proposal.draw(6, seed=1, step=1)
    target = np.array([9, -100, 0, 9])
    got = sample_classes(proposal, 6, target, seed=1, step=1, ignore_index=-100)
    want = np.unique(np.concatenate([draws, [9, 0]]))
    assert np.array_equal(got.rows, want)
    for row, offset in zip(got.rows, got.offset, strict=True):
        count = (draws == row).sum()
        assert offset == (np.float32(np.log(count / 6 * 10)) if count else -np.inf)
    assert got.indices[1] == -100 and np.array_equal(got.rows[got.indices[[0, 2, 3]]], [9, 0, 9])


def test_every_class_with_its_weight_is_the_full_softmax() -> None:
    """Each class drawn once, at probability 1 / n a draw: all offsets are 0, and nothing is left of the sampling."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(N, 6)).astype(np.float32)
    target = {"indptr": None, "indices": rng.integers(0, N, 9), "values": None}
    common = {"hidden": hidden, "weight": weight, "bias": None, "loss": "softmax", **target}
    losses = np.empty((2, 9), np.float32)
    for out, offset in zip(losses, (None, np.zeros(N, np.float32)), strict=True):
        _core.dense_forward(**common, offset=offset, losses=out, output=None, lse=None)
    assert np.allclose(losses[0], losses[1], rtol=1e-6)


@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("multi", [False, True])
def test_a_step_moves_the_sampled_rows_as_the_reference_says(name: str, multi: bool) -> None:
    rng = np.random.default_rng(2)
    head = DenseHead(
        6,
        N,
        loss="sampled_softmax",
        negatives=8,
        proposal=PROPOSALS[name],
        seed=11,
        class_weight=rng.uniform(0.5, 2, N),
    )
    hidden = rng.normal(size=(5, 6)).astype(np.float32)
    if multi:
        labels = Labels.from_lists([[1, 2], [], [49], [2, 7, 9], [0]], N)
        indices, target = labels.indices, labels
    else:
        target = indices = np.array([1, 49, -100, 1, 0])
    ignore = None if multi else -100
    sampled = sample_classes(Proposal(PROPOSALS[name], N), 8, indices, seed=11, step=0, ignore_index=ignore)
    rows, n = sampled.rows, len(sampled.rows)
    targets = Targets.multi(labels.indptr, sampled.indices, None, n) if multi else Targets.single(sampled.indices, n)
    ref = Dense(
        hidden, head.weight[rows], head.bias[rows], targets, class_weight=head.class_weight[rows], offset=sampled.offset
    )
    mass = 5.0 if multi else head.class_weight[[1, 49, 1, 0]].sum(dtype=float)
    scale = np.where(targets.active, 1 / mass, 0.0)
    want, before = ref.gradients(scale), (head.weight.copy(), head.bias.copy())
    loss, grad_hidden = head.step(hidden, target, 0.3)
    assert abs(loss - (scale * ref.losses).sum()) <= (scale * ref.losses_error).sum()
    within(grad_hidden, want.hidden, 2 * want.hidden_error, "grad_hidden")
    slack = 1e-6 * np.abs(before[0][rows])
    within(head.weight[rows], before[0][rows] - 0.3 * want.weight, want.weight_error + slack, "weight")
    others = np.setdiff1d(np.arange(N), rows)
    assert np.array_equal(head.weight[others], before[0][others]) and np.array_equal(
        head.bias[others], before[1][others]
    )
    assert head.steps == 1
    exact = head.forward(hidden, target).loss
    full = Dense(hidden, head.weight, head.bias, targets_of(target, multi), class_weight=head.class_weight)
    assert abs(exact - (scale * full.losses).sum()) <= (scale * full.losses_error).sum()


def targets_of(target: Any, multi: bool) -> Targets:
    return Targets.multi(target.indptr, target.indices, None, N) if multi else Targets.single(target, N)


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        ("zipf", "expected 'uniform', 'log_uniform'"),
        (np.ones(N - 1), r"expected shape \[n_classes\] = \[50\], got \[49\]"),
        (np.where(np.arange(N) == 17, 0.0, 1.0), "got 0.0+ for class 17"),
        (np.where(np.arange(N) == 17, np.nan, 1.0), "class 17"),
    ],
)
def test_proposals_that_cannot_be(proposal: Any, message: str) -> None:
    with pytest.raises(_core.ShapeError, match=message):
        Proposal(proposal, N)


def test_labels_out_of_range_are_named() -> None:
    with pytest.raises(_core.LabelError, match=r"expected classes in \[0, 50\), got 50 at position 1"):
        sample_classes(Proposal("uniform", N), 4, np.array([3, 50]), seed=0, step=0)
