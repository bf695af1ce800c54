"""tests/python/test_reference.py -- the reference itself: against finite differences, and against torch where torch has
it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dense_cases import LOSSES, make, weights_of_examples
from reference import philox, reduction_scale, update
from widehead import _core


def objective(case: Any, scale: np.ndarray, t: np.ndarray, r: np.ndarray) -> float:
    ref = case.reference()
    value = (scale * ref.losses).sum() + (t * ref.output).sum()
    return float(value + (r * ref.lse).sum()) if case.options["loss"] == "softmax" else float(value)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name: str) -> None:
    rng = np.random.default_rng(0)
    case = make((5, 7, 4), seed=1, dtype="float64", **LOSSES[name])
    scale = weights_of_examples(case).astype(float)
    t, r = rng.normal(size=5), rng.normal(size=5)
    grads = case.reference().gradients(scale, t, r if case.options["loss"] == "softmax" else None)
    h = 1e-6
    for array, want in [(case.hidden, grads.hidden), (case.weight, grads.weight), (case.bias, grads.bias)]:
        for at in np.ndindex(array.shape):
            keep = array[at]
            array[at] = keep + h
            above = objective(case, scale, t, r)
            array[at] = keep - h
            below = objective(case, scale, t, r)
            array[at] = keep
            assert abs((above - below) / (2 * h) - want[at]) < 1e-6 * (1 + abs(want[at])), (name, at)


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2}, {"class_weight": True}, {"label_smoothing": 0.2, "class_weight": True}],
    ids=str,
)
def test_softmax_against_torch(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    case = make((17, 13, 5), dtype="float64", **options)
    hidden, weight, bias = (torch.tensor(x, requires_grad=True) for x in (case.hidden, case.weight, case.bias))
    weights = case.options.get("class_weight")
    loss = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias),
        torch.tensor(case.target["indices"]),
        weight=None if weights is None else torch.tensor(weights.astype(float)),
        label_smoothing=case.options.get("label_smoothing", 0.0),
    )
    loss.backward()
    ref = case.reference()
    scale = reduction_scale(ref.targets, None if weights is None else weights.astype(float))
    grads = ref.gradients(scale)
    assert abs((scale * ref.losses).sum() - loss.item()) < 1e-12
    for got, want in [(grads.hidden, hidden), (grads.weight, weight), (grads.bias, bias)]:
        assert np.abs(got - want.grad.numpy()).max() < 1e-12


def test_bce_against_torch() -> None:
    torch = pytest.importorskip("torch")
    case = make((17, 13, 5), seed=1, dtype="float64", loss="bce", class_weight=True)
    hidden = torch.tensor(case.hidden, requires_grad=True)
    z = torch.nn.functional.linear(hidden, torch.tensor(case.weight), torch.tensor(case.bias))
    weight, y = torch.tensor(case.options["class_weight"].astype(float)), torch.tensor(case.targets().y)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(z, y, weight=weight, reduction="none").sum(1)
    losses.mean().backward()
    ref = case.reference()
    assert np.abs(ref.losses - losses.detach().numpy()).max() < 1e-12
    assert np.abs(ref.gradients(np.full(17, 1 / 17)).hidden - hidden.grad.numpy()).max() < 1e-12


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_updates_against_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 4))
    p = torch.tensor(w.copy(), requires_grad=True)
    if name == "adam":
        optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.7 if name == "momentum" else 0.0, weight_decay=0.1)
    state: dict[str, np.ndarray] = {}
    for step in range(1, 6):
        g = rng.normal(size=(3, 4))
        p.grad = torch.tensor(g)
        optimizer.step()
        w = update(name, w, g, state, lr=0.1, step=step, momentum=0.7, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
        assert np.abs(w - p.detach().numpy()).max() < 1e-12


def test_philox_against_published_vectors_and_the_core() -> None:
    """Known answers of Random123's kat_vectors, and equality with the core on random counters."""
    assert [hex(int(x)) for x in philox(np.zeros(4, np.uint64), (0, 0))] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    ones = 0xFFFFFFFF
    assert [hex(int(x)) for x in philox(np.full(4, ones, np.uint64), (ones, ones))] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]
    rng = np.random.default_rng(0)
    for _ in range(50):
        counter, key = rng.integers(0, 1 << 32, 4), rng.integers(0, 1 << 32, 2)
        want = philox(counter.astype(np.uint64), (int(key[0]), int(key[1])))
        assert _core.philox(counter=tuple(map(int, counter)), key=tuple(map(int, key))) == [int(x) for x in want]
