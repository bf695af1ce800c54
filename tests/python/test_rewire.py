"""tests/python/test_rewire.py -- the weakest connections move: exactly as many as asked, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dense_cases import exact, stored
from devices import call, only_gpu
from widehead import _core

MODES = ("magnitude_global", "magnitude_row", "threshold")


class Layer:
    """A sparse layer with state; every number of the state says where it was: 1 + its old column."""

    def __init__(
        self,
        classes: int,
        features: int,
        fan_in: int,
        group: int = 1,
        dtype: str = "float32",
        index: str = "uint16",
        device: str = "cpu",
    ):
        rng = np.random.default_rng([classes, features, fan_in, group])
        self.features, self.group, self.fan_in, self.device = features, group, fan_in, device
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

    def arrays(self) -> dict[str, np.ndarray]:
        names = ("weight", "index", "first", "second", "compensation")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def rewire(self, refused: np.ndarray | None = None, **more: Any) -> int:
        options = {"group_size": self.group, "in_features": self.features, "seed": 7, "step": 1, **more}
        moved = np.full(1, -7)
        found = call(_core.rewire, self.device, refused=refused, moved=moved, **self.arrays(), **options)
        assert found == (moved[0] if self.device == "cpu" else None)
        return int(moved[0])


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
def test_exactly_those_move(shape: tuple[int, int, int, int], dtype: str, mode: str, device: str) -> None:
    layer = Layer(*shape, dtype=dtype, device=device)
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


def test_all_equal_weights_still_move_as_many(device: str) -> None:
    layer = Layer(1300, 50, 10, device=device)
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


def test_draws_depend_on_the_step_and_are_uniform(device: str) -> None:
    counts, indices = np.zeros(30), []
    for step in range(40):
        layer = Layer(400, 30, 3, index="int32", device=device)
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


def test_kept_values_full_rows_and_nan(device: str) -> None:
    layer = Layer(20, 40, 5, device=device)
    want = np.sort(layer.weight.ravel())
    assert layer.rewire(fraction=0.5, keep_value=True) == 50
    assert np.array_equal(np.sort(layer.weight.ravel()), want) and (layer.first == 0).sum() == 50
    full = Layer(20, 5, 5, device=device)
    assert full.rewire(fraction=0.5) == 0
    layer = Layer(20, 40, 5, device=device)
    layer.weight[3, 2] = np.nan
    assert layer.rewire(fraction=0.99) == 99 and np.isnan(layer.weight).sum() == 1


def test_bad_arguments_change_nothing(device: str) -> None:
    layer = Layer(20, 40, 5, device=device)
    weight, index = layer.weight.copy(), layer.index.copy()
    for more, error, match in (
        ({"fraction": 1.5}, _core.ShapeError, "fraction: expected a number in"),
        ({"mode": "random"}, _core.ShapeError, "mode: expected"),
        ({"in_features": 4}, _core.ShapeError, "in_features: expected at least the fan-in 5"),
        ({"first": np.zeros((20, 4), np.float32)}, _core.ShapeError, "first"),
        ({"second": np.zeros((20, 5))}, _core.DtypeError, "second: expected float32"),
        ({"group_size": 3}, _core.ShapeError, "index: expected shape"),
        ({"in_features": 65537}, _core.DtypeError, "index: uint16 reaches 65536 inputs"),
        ({"moved": np.zeros(2, np.int64)}, _core.ShapeError, "moved"),
    ):
        arguments = {"weight": layer.weight, "index": layer.index, "in_features": 40, "seed": 1, "step": 1, **more}
        with pytest.raises(error, match=match):
            call(_core.rewire, device, **arguments)
    assert np.array_equal(layer.weight, weight) and np.array_equal(layer.index, index)


def twins(*shape: int, wide: bool, **more: Any) -> tuple[Layer, Layer]:
    """The same layer on the CPU and on a GPU. `wide`: rows lie apart, with marks between them."""
    pair = Layer(*shape, **more), Layer(*shape, **more, device="cuda")
    for layer in pair:
        if layer.weight.dtype == np.uint16:
            layer.weight &= 0xFFF0  # many ties
            layer.compensation = np.arange(layer.weight.size, dtype=np.uint16).reshape(layer.weight.shape)
        layer.weight.flat[::7] = 0
        if layer.weight.dtype != np.uint16:
            layer.weight.flat[5::97] = np.nan
            layer.weight.flat[6::97] = -np.inf
        if wide:
            for name, array in layer.arrays().items():
                apart = np.full((len(array), array.shape[1] + 3), 77, array.dtype)
                apart[:, : array.shape[1]] = array
                setattr(layer, name, apart[:, : array.shape[1]])
    return pair


@only_gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "shape",
    [
        (1500, 40, 8, 1), (333, 300, 32, 16), (70, 9, 8, 1), (130, 11, 1, 64), (97, 70, 33, 3), (300, 40, 40, 7),
        (1, 50, 5, 1), (2000, 900, 31, 1), (40, 2000, 600, 5), (25, 3000, 1300, 2), (10, 1305, 1300, 1),
    ],
    ids=str,
)  # fmt: skip
def test_bits_of_the_cpu(shape: tuple[int, int, int, int], dtype: str, mode: str, device: str) -> None:
    for wide, index, fraction in ((False, "uint16", 0.1), (True, "int32", 0.6)):
        cpu, gpu = twins(*shape, dtype=dtype, index=index, wide=wide)
        options = {"mode": mode, "fraction": fraction, "threshold": 0.3, "keep_value": wide, "first_row": 12345}
        moved = cpu.rewire(**options)
        assert gpu.rewire(**options) == moved
        assert moved > 0 or shape[2] in (1, shape[1]) or (shape[0] == 1 and fraction == 0.1)
        for name, array in cpu.arrays().items():
            other = gpu.arrays()[name]
            assert np.array_equal(array, other, equal_nan=array.dtype.kind == "f"), name
            assert not wide or (other.base[:, array.shape[1] :] == 77).all()


@only_gpu
@pytest.mark.parametrize("mode", MODES)
def test_all_and_none_move(mode: str, device: str) -> None:
    for fraction, threshold in ((0.0, 0.0), (1.0, 1e30)):
        cpu, gpu = Layer(150, 60, 12, 4), Layer(150, 60, 12, 4, device=device)
        options = {"mode": mode, "fraction": fraction, "threshold": threshold}
        assert gpu.rewire(**options) == cpu.rewire(**options) == cpu.index.size * fraction
        assert all(np.array_equal(a, gpu.arrays()[name]) for name, a in cpu.arrays().items())
    empty = Layer(0, 60, 12, device=device)
    assert empty.rewire(mode=mode, fraction=1.0) == 0


@only_gpu
def test_step_from_the_device(device: str) -> None:
    cpu, gpu = Layer(90, 60, 12), Layer(90, 60, 12, device=device)
    step = 2**40 + 3
    assert cpu.rewire(step=step) == gpu.rewire(step=1, device_step=np.array([step])) > 0
    assert np.array_equal(cpu.index, gpu.index)


@only_gpu
@pytest.mark.parametrize("mode", MODES)
def test_nothing_moves_in_a_refused_step(mode: str, device: str) -> None:
    layer = Layer(90, 60, 12, device=device)
    before = {name: array.copy() for name, array in layer.arrays().items()}
    options = {"mode": mode, "fraction": 0.5, "threshold": 1.0}
    assert layer.rewire(refused=np.ones(1, np.int32), **options) == 0
    assert all(np.array_equal(array, layer.arrays()[name]) for name, array in before.items())
    assert layer.rewire(**options) > 0
