"""tests/python/test_sparse_index.py -- inputs of a sparse layer on a GPU: drawn as on the CPU, and looked at there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from devices import call, only_gpu
from widehead import _core


def draw(device: str, groups: int, fan_in: int, features: int, dtype: str, **more: Any) -> np.ndarray:
    wide = np.full((groups, fan_in + 2), 9, dtype)  # rows lie apart
    call(_core.draw_index, device, index=wide[:, :fan_in], in_features=features, **{"seed": 5, **more})
    assert (wide[:, fan_in:] == 9).all()
    return wide[:, :fan_in].copy()


@only_gpu
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize(
    ("groups", "fan_in", "features"),
    [(700, 32, 16384), (300, 1, 7), (50, 9, 9), (64, 33, 40), (9, 1000, 1500), (5, 700, 65536), (0, 4, 9)],
)
def test_draws_are_those_of_the_cpu(groups: int, fan_in: int, features: int, dtype: str, device: str) -> None:
    for more in ({}, {"seed": 2**63 + 1, "first_row": 2**33}):
        cpu, gpu = (draw(where, groups, fan_in, features, dtype, **more) for where in ("cpu", device))
        assert np.array_equal(cpu, gpu)
        assert (np.diff(gpu.astype(np.int64), axis=1) > 0).all() and (gpu < features).all()


@only_gpu
def test_wide_inputs_are_drawn(device: str) -> None:
    features = 2**31
    cpu, gpu = (draw(where, 200, 17, features, "int32") for where in ("cpu", device))
    assert np.array_equal(cpu, gpu) and gpu.min() >= 0 and gpu.max() > features * 0.99


def test_bad_draws_are_refused(device: str) -> None:
    for shape, features, error, match in (
        ((3, 5), 4, _core.ShapeError, "fan_in: expected 1 to 4"),
        ((3, 5), 65537, _core.DtypeError, "index: uint16 reaches 65536"),
    ):
        with pytest.raises(error, match=match):
            call(_core.draw_index, device, index=np.zeros(shape, np.uint16), in_features=features, seed=1)


def test_bad_rows_are_found(device: str) -> None:
    """One bad place anywhere: named with its row, on a GPU by the record of faults."""
    good = np.sort(np.random.default_rng(1).permuted(np.tile(np.arange(20), (600, 1)), axis=1)[:, :7]).astype(np.int32)
    call(_core.check_index, device, index=good, in_features=20)
    for row, column, value, match in (
        (0, 0, -1, r"index: expected inputs in \[0, 20\), got -1 .*row 0"),
        (599, 6, 20, r"index: expected inputs in \[0, 20\), got 20 .*row 599"),
        (311, 3, good[311, 2], f"ascending order, got {good[311, 2]} before {good[311, 2]} in row 311"),
        (40, 1, 0, "distinct inputs in ascending order, got .* before 0 in row 40"),
    ):
        index = good.copy()
        index[row, column] = value
        if row == 40:
            index[row, 0] = 3
        refused = np.zeros(1, np.int32)
        with pytest.raises(_core.ShapeError, match=match):
            call(_core.check_index, device, refused=refused, index=index, in_features=20)
        assert refused[0] == (device == "cuda")
