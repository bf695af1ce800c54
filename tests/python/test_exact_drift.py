"""test_exact_drift.py -- long runs in float32: rounding stays within a few times that of dense float32 SGD."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import exact_drift


@pytest.mark.slow
@pytest.mark.parametrize("case", exact_drift.CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_two_thousand_steps(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_drift, "CLASSES", 1000)
    found = exact_drift.run(case, 2000, exact_drift.METHODS)
    methods = exact_drift.offered(case, exact_drift.METHODS)
    own = found["errors"].pop("dense float32")
    assert found["steps"] == [100, 200, 500, 1000, 2000] and set(found["errors"]) == set(methods)
    for method, errors in found["errors"].items():
        for at, error, dense in zip(found["steps"], errors, own, strict=True):
            assert 0 < error <= 5 * dense, (method, at)
    for mark in found["trace"]:
        for method in methods:
            assert mark[method]["gram_error"] < 1e-5, (method, mark["step"])


def test_checkpoints() -> None:
    assert exact_drift.checkpoints(400) == [100, 200, 400]
    assert exact_drift.checkpoints(1000) == [100, 200, 500, 1000]
