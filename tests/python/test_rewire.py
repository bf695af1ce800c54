"""tests/python/test_rewire.py -- the weakest connections move: exactly as many as asked, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dense_cases import exact, stored
from widehead import _core

MODES = ("magnitude_global", "magnitude_row", "threshold")


class Layer:
    """A sparse layer with state; every number of the state says where it was: 1 + its old column."""

    def __init__(
        self, classes: int, features: int, fan_in: int, group: int = 1, dtype: str = "float32", index: str = "uint16"
    ):
        rng = np.random.default_rng([classes, features, fan_in, group])
        self.features, self.group, self.fan_in = features, group, fan_in
        self.index = np.zeros((-(-classes // group), fan_in), index)
        _core.draw_index(index=self.index, in_features=features, seed=3)
        self.weight = stored(rng.normal(size=(classes, fan_in)), dtype)
        real = "float64" if dtype == "float64" else "float32"
        columns = np.tile(np.arange(1.0, fan_in + 1), (classes, 1))
        self.first, self.second = columns.astype(real), (2 * columns).astype(real)

    def strengths(self) -> np.ndarray:
        """[groups, K], as the core computes them."""
        size, group = np.abs(exact(self.weight)), self.group
        means = [size[g * group : (g + 1) * group].mean(0) for g in range(len(self.index))]
        return np.array(means).astype(np.float32)

    def rewire(self, **more: Any) -> int:
        arrays = {"weight": self.weight, "index": self.index, "first": self.first, "second": self.second}
        return _core.rewire(
            **arrays, group_size=self.group, in_features=self.features, **{"seed": 7, "step": 1, **more}
        )


def expected(layer: Layer, mode: str, fraction: float, threshold: float) -> np.ndarray:
    """Which connections should move, [groups, K]; ties to the lower row, then the lower column."""
    s = layer.strengths()
    if mode == "threshold":
        return s < np.float32(threshold)
    rows = s.reshape(1, -1) if mode == "magnitude_global" else s
    mask = np.zeros_like(rows, bool)
    wanted = int(np.floor(fraction * rows.shape[1] + 0.5))
    np.put_along_axis(mask, np.argsort(rows, axis=1, kind="stable")[:, :wanted], True, 1)
    return mask.reshape(s.shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(1500, 40, 8, 1), (333, 300, 20, 16), (70, 9, 8, 1), (130, 11, 1, 64)])
def test_exactly_those_move(shape: tuple[int, int, int, int], dtype: str, mode: str) -> None:
    layer = Layer(*shape, dtype=dtype)
    if dtype == "bfloat16":
        layer.weight &= 0xFFF0  # many ties
    before, index = exact(layer.weight), layer.index.copy()
    threshold = float(np.quantile(layer.strengths(), 0.2))
    goes = expected(layer, mode, 0.2, threshold)
    assert layer.rewire(mode=mode, fraction=0.2, threshold=threshold) == goes.sum()
    assert goes.any() or shape[2] == 1
    assert (np.diff(layer.index.astype(int), axis=1) > 0).all() and layer.index.max() < layer.features
    of_class = np.arange(len(before)) // layer.group
    for c, g in enumerate(of_class):
        kept = {int(index[g, k]): k for k in range(layer.fan_in) if not goes[g, k]}
        fresh = 0
        for k, source in enumerate(layer.index[g].astype(int)):
            if source in kept:  # carried along with its weight and state
                old = kept[source]
                assert exact(layer.weight)[c, k] == before[c, old]
                assert layer.first[c, k] == old + 1 and layer.second[c, k] == 2 * (old + 1)
            else:
                fresh += 1
                assert layer.weight[c, k] == 0 and layer.first[c, k] == 0 and layer.second[c, k] == 0
                roomy = layer.features - layer.fan_in >= goes[g].sum()
                assert not roomy or source not in index[g]
        assert fresh == goes[g].sum() or layer.features - layer.fan_in < goes[g].sum()


def test_all_equal_weights_still_move_as_many() -> None:
    layer = Layer(1300, 50, 10)
    layer.weight[...] = 0.5
    assert layer.rewire(fraction=0.1) == 1300
    assert (layer.weight[:130] == 0).all() and (layer.weight[130:] == 0.5).all()


def test_same_result_for_threads_and_shards() -> None:
    results = []
    for threads in (1, 2, 4):
        _core.set_num_threads(threads)
        layer = Layer(3000, 60, 9)
        layer.rewire(fraction=0.3)
        results.append((layer.weight, layer.index, layer.first))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
    whole, part = Layer(3000, 60, 9), Layer(3000, 60, 9)
    whole.rewire(mode="magnitude_row", fraction=0.3)
    for name in ("weight", "index", "first", "second"):
        setattr(part, name, np.ascontiguousarray(getattr(part, name)[1000:1500]))
    part.rewire(mode="magnitude_row", fraction=0.3, first_row=1000)
    assert np.array_equal(part.index, whole.index[1000:1500]) and np.array_equal(part.weight, whole.weight[1000:1500])


def test_draws_depend_on_the_step_and_are_uniform() -> None:
    counts, indices = np.zeros(30), []
    for step in range(40):
        layer = Layer(400, 30, 3, index="int32")
        layer.weight[...] = 1.0
        layer.weight[:, 0] = 0.0
        layer.index[...] = (0, 10, 20)
        assert layer.rewire(mode="magnitude_row", fraction=1 / 3, step=step) == 400
        fresh = layer.index[layer.weight == 0.0]
        assert not np.isin(fresh, (0, 10, 20)).any()
        counts += np.bincount(fresh, minlength=30)
        indices.append(layer.index)
    assert not np.array_equal(indices[0], indices[1])
    free = np.delete(counts, (0, 10, 20))
    assert np.abs(free - 16000 / 27).max() < 5 * np.sqrt(16000 / 27)


def test_kept_values_full_rows_and_nan() -> None:
    layer = Layer(20, 40, 5)
    want = np.sort(layer.weight.ravel())
    assert layer.rewire(fraction=0.5, keep_value=True) == 50
    assert np.array_equal(np.sort(layer.weight.ravel()), want) and (layer.first == 0).sum() == 50
    full = Layer(20, 5, 5)
    assert full.rewire(fraction=0.5) == 0
    layer = Layer(20, 40, 5)
    layer.weight[3, 2] = np.nan
    assert layer.rewire(fraction=0.99) == 99 and np.isnan(layer.weight).sum() == 1


def test_bad_arguments_change_nothing() -> None:
    layer = Layer(20, 40, 5)
    weight, index = layer.weight.copy(), layer.index.copy()
    for more, error, match in (
        ({"fraction": 1.5}, _core.ShapeError, "fraction: expected a number in"),
        ({"mode": "random"}, _core.ShapeError, "mode: expected"),
        ({"in_features": 4}, _core.ShapeError, "in_features: expected at least the fan-in 5"),
        ({"first": np.zeros((20, 4), np.float32)}, _core.ShapeError, "first"),
        ({"second": np.zeros((20, 5))}, _core.DtypeError, "second: expected float32"),
        ({"group_size": 3}, _core.ShapeError, "index: expected shape"),
    ):
        arguments = {"weight": layer.weight, "index": layer.index, "in_features": 40, "seed": 1, "step": 1, **more}
        with pytest.raises(error, match=match):
            _core.rewire(**arguments)
    assert np.array_equal(layer.weight, weight) and np.array_equal(layer.index, index)
