"""test_hash_index.py -- hash tables against their definition, the theory of the codes, and tables that change"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import hash_reference as ref
from widehead import _core
from widehead.numpy import HashIndex, to_bfloat16

FAMILIES = ("wta", "dwta", "simhash")


def keys_of(index: Any, rows: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    out = np.empty((len(rows), index.tables), np.int32)
    index._core.keys(rows, bias, out=out)
    return out


def matrix(rng: np.random.Generator, n: int, d: int, family: str = "wta") -> np.ndarray:
    weight = rng.standard_normal((n, d)).astype(np.float32)
    if family == "dwta":
        weight[rng.random(weight.shape) < 0.8] = 0
    return weight


def lists(found: Any) -> list[list[tuple[int, int]]]:
    """Of each query, what is there."""
    return [
        [(i, c) for i, c in zip(ids.tolist(), counts.tolist(), strict=True) if i >= 0]
        for ids, counts in zip(found.ids, found.counts, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("n", "d", "tables", "hashes", "window"),
    [(37, 24, 5, 3, 4), (100, 7, 3, 4, 8), (50, 3, 2, 2, 8), (33, 130, 4, 2, 5)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_keys_and_queries_are_those_of_the_definition(
    family: str, n: int, d: int, tables: int, hashes: int, window: int, bias: bool, isa: str
) -> None:
    rng = np.random.default_rng(n)
    weight = matrix(rng, n, d, family)
    weight[5, 0] = np.nan
    weight[6] = 0
    b = rng.standard_normal(n).astype(np.float32) if bias else None
    index = HashIndex(d, bias=bias, family=family, tables=tables, hashes=hashes, window=window, seed=9)
    index.build(weight, b)
    rows = weight if b is None else np.concatenate([weight, b[:, None]], 1)
    want = ref.keys(rows, family, tables, hashes, window, 9)
    assert np.array_equal(keys_of(index, weight, b), want)
    hidden = matrix(rng, 9, d, family)
    asked = np.concatenate([hidden, np.ones((9, 1), np.float32)], 1) if bias else hidden
    queries = ref.keys(asked, family, tables, hashes, window, 9)
    assert lists(index.query(hidden, 12)) == ref.query(want, queries, 12)
    statistics = index.statistics()
    absent = int((want[:, 0] < 0).sum())
    assert absent >= 1
    assert (statistics["rows"], statistics["absent"]) == (n - absent, absent)


def test_types_of_rows_and_strides() -> None:
    rng = np.random.default_rng(1)
    weight = matrix(rng, 70, 20)
    rounded = (to_bfloat16(weight).astype(np.uint32) << 16).view(np.float32)
    index = HashIndex(20, tables=7, seed=3)
    for given, like in (
        (to_bfloat16(weight), rounded),
        (weight.astype(np.float16), weight.astype(np.float16).astype(np.float32)),
        (weight.astype(np.float64), weight),
        (np.repeat(weight, 2, axis=0)[::2], weight),
    ):
        assert np.array_equal(keys_of(index, given), keys_of(index, like))


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tables_for_any_number_of_threads(family: str, threads: int) -> None:
    rng = np.random.default_rng(2)
    weight, hidden = matrix(rng, 5000, 16, family), matrix(rng, 40, 16, family)
    index = HashIndex(16, family=family, tables=9, hashes=3, seed=1)
    index.build(weight)
    found = index.query(hidden, 50)
    _core.set_num_threads(1)
    alone = HashIndex(16, family=family, tables=9, hashes=3, seed=1)
    alone.build(weight)
    assert lists(alone.query(hidden, 50)) == lists(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_change_are_where_a_new_build_would_put_them(family: str) -> None:
    rng = np.random.default_rng(3)
    weight, hidden = matrix(rng, 800, 12, family), matrix(rng, 30, 12, family)
    index = HashIndex(12, family=family, tables=6, hashes=2, window=4, seed=5)
    index.build(weight)
    spilled = 0
    crowd = rng.standard_normal(12).astype(np.float32)
    for step in range(25):  # into few buckets: entries wait beside the tables, tables are laid out anew
        ids = rng.choice(800, 90, replace=False)
        weight[ids] = matrix(rng, 90, 12, family) + (0.2 * step if step < 20 else 0) * crowd
        if step == 7:
            weight[ids[0], 0] = np.nan
        moved = index.update(ids, weight)
        assert 0 < moved <= 90 * 6
        fresh = HashIndex(12, family=family, tables=6, hashes=2, window=4, seed=5)
        fresh.build(weight)
        assert lists(index.query(hidden, 800)) == lists(fresh.query(hidden, 800))
        spilled = max(spilled, index.statistics()["spilled"])
        assert {k: index.statistics()[k] for k in ("rows", "used", "largest")} == {
            k: fresh.statistics()[k] for k in ("rows", "used", "largest")
        }
    assert spilled > 0 and index.statistics()["rebuilds"] > 6
    assert index.update([1, 1], weight) == 0


def test_each_row_is_once_in_a_table_and_keys_fill_the_buckets() -> None:
    """log2 of the window's size in bits: all codes can be reached, and no key is beyond the buckets."""
    rng = np.random.default_rng(4)
    weight = matrix(rng, 20_000, 40)
    index = HashIndex(40, tables=3, hashes=2, window=8, seed=2)
    index.build(weight)
    keys = keys_of(index, weight)
    assert keys.min() == 0 and keys.max() == 63
    assert index.statistics()["used"] == index.statistics()["buckets"] == 3 * 64
    found = index.query(weight[:20], 20_000)
    for own, counts in zip(keys[:20], found.counts, strict=True):
        assert counts.sum() == (keys == own).sum()


def test_codes_do_not_change_under_monotone_maps() -> None:
    rng = np.random.default_rng(5)
    weight = matrix(rng, 200, 30).astype(np.float64)
    index = HashIndex(30, tables=8, hashes=3, window=5, seed=1)
    mapped = np.arctan(weight) * 7 - 3
    assert np.array_equal(keys_of(index, weight), keys_of(index, mapped))


def test_dense_rows_have_the_same_codes_in_both_wta_families() -> None:
    rng = np.random.default_rng(6)
    weight = matrix(rng, 300, 25)
    wta, dwta = (HashIndex(25, family=family, tables=6, hashes=4, window=6, seed=8) for family in ("wta", "dwta"))
    assert np.array_equal(keys_of(wta, weight), keys_of(dwta, weight))


def collisions(family: str, x: np.ndarray, y: np.ndarray, window: int, seeds: int) -> np.ndarray:
    """Whether single codes of x and y agree, of many independent tables."""
    out = []
    for seed in range(seeds):
        index = HashIndex(len(x), family=family, tables=255, hashes=1, window=window, seed=seed)
        both = keys_of(index, np.stack([x, y]).astype(np.float32))
        out.append(both[0] == both[1])
    return np.concatenate(out)


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.0])
def test_signs_agree_as_often_as_the_angle_says(angle: float) -> None:
    """Charikar's 1 - theta / pi, of projections on many random signs nearly normal."""
    rng = np.random.default_rng(7)
    basis = np.linalg.qr(rng.standard_normal((400, 2)))[0]
    x, y = basis[:, 0], math.cos(angle) * basis[:, 0] + math.sin(angle) * basis[:, 1]
    met = collisions("simhash", x, y, 2, 40)
    p = 1 - angle / math.pi
    assert abs(met.mean() - p) < 4 * math.sqrt(p * (1 - p) / len(met)) + 0.005


@pytest.mark.parametrize("window", [2, 4, 8])
def test_wta_codes_agree_as_often_as_the_ranks_say(window: int) -> None:
    """sum_i C(R_i, K - 1) / C(d, K), R_i the coordinates below the i-th in both vectors."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal(24)
    y = x + 0.7 * rng.standard_normal(24)
    below = [int(((x < x[i]) & (y < y[i])).sum()) for i in range(24)]
    p = sum(math.comb(r, window - 1) for r in below) / math.comb(24, window)
    if window == 2:  # Kendall's tau
        pairs = [(i, j) for i in range(24) for j in range(i)]
        tau = np.mean([np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs])
        assert p == pytest.approx((1 + tau) / 2)
    met = collisions("wta", x, y, window, 40)
    assert abs(met.mean() - p) < 4 * math.sqrt(p * (1 - p) / len(met))


def test_ties_and_small_shapes() -> None:
    index = HashIndex(3, tables=4, hashes=2, window=8, seed=0)  # fewer coordinates than a window
    index.build(np.ones((5, 3), np.float32))
    assert (keys_of(index, np.ones((5, 3), np.float32)) == 0).all()  # the lowest place of equals
    found = index.query(np.ones((1, 3), np.float32), 9)
    assert found.ids.tolist() == [[0, 1, 2, 3, 4, -1, -1, -1, -1]] and found.counts[0, :5].tolist() == [4] * 5
    assert index.query(np.full((1, 3), np.nan, np.float32), 2).ids.tolist() == [[-1, -1]]
    assert index.query(np.zeros((0, 3), np.float32), 2).ids.shape == (0, 2)
    empty = HashIndex(3)
    assert len(empty) == 0 and empty.query(np.ones((2, 3), np.float32), 2).ids.tolist() == [[-1, -1]] * 2


def test_buckets_above_the_limit_are_passed_over() -> None:
    rng = np.random.default_rng(9)
    weight, hidden = matrix(rng, 400, 8), matrix(rng, 10, 8)
    weight[:300] = weight[0]
    index = HashIndex(8, tables=5, hashes=2, window=4, max_bucket=60, seed=4)
    index.build(weight)
    keys = ref.keys(weight, "wta", 5, 2, 4, 4)
    asked = ref.keys(hidden, "wta", 5, 2, 4, 4)
    assert lists(index.query(hidden, 50)) == ref.query(keys, asked, 50, max_bucket=60)
    assert index.statistics()["largest"] >= 300


def test_more_probes_find_what_fewer_do_and_more() -> None:
    rng = np.random.default_rng(10)
    weight = matrix(rng, 3000, 32)
    hidden = weight[:100] + 0.8 * matrix(rng, 100, 32)
    for family in ("wta", "simhash"):
        index = HashIndex(32, family=family, tables=10, hashes=4, seed=6)
        index.build(weight)
        few, many = (index.query(hidden, 3000, probes=p) for p in (0, 3))
        for a, b in zip(lists(few), lists(many), strict=True):
            more = dict(b)
            assert all(more[i] >= count for i, count in a) and len(more) > len(a)
            assert all(count <= 10 for count in more.values())  # a row meets a query once in a table


def test_neighbours_are_found_far_above_chance() -> None:
    rng = np.random.default_rng(11)
    weight = matrix(rng, 20_000, 64)
    hidden = weight[:200] + 0.5 * matrix(rng, 200, 64)
    index = HashIndex(64, tables=50, hashes=3, seed=1)
    index.build(weight)
    best = np.argsort(-(hidden @ weight.T), axis=1)[:, :10]
    found = index.search(hidden, 10, weight, candidates=200)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(best, found.classes, strict=True)])
    assert recall > 10 * 200 / 20_000
    assert (found.classes[:, 0] == best[:, 0]).mean() > 0.9
    want = np.take_along_axis(hidden @ weight.T, found.classes, 1)
    np.testing.assert_allclose(found.scores, want, rtol=0, atol=1e-4)
    assert (np.diff(found.scores, axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "minhash"}, "family: expected"),
        ({"tables": 256}, "tables: expected 1 to 255"),
        ({"tables": 0}, "tables: expected an integer of at least 1"),
        ({"window": 1}, "window: expected 2 to 256"),
        ({"hashes": 9, "window": 8}, "hashes: expected keys of at most 24 bits"),
        ({"max_bucket": -1}, "max_bucket: expected"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(_core.ShapeError, match=message):
        HashIndex(8, **options)


def test_bad_input_changes_nothing() -> None:
    rng = np.random.default_rng(12)
    weight, hidden = matrix(rng, 50, 8), matrix(rng, 4, 8)
    index = HashIndex(8, tables=5, hashes=2, seed=1)
    index.build(weight)
    before = lists(index.query(hidden, 50))
    other = matrix(rng, 50, 8)
    with pytest.raises(_core.LabelError, match=r"ids: expected a row in \[0, 50\), got 50 at position 1"):
        index.update([3, 50], other)
    with pytest.raises(_core.DtypeError, match="ids: expected integers, got float64"):
        index.update([1.5], other)  # type: ignore[list-item]
    with pytest.raises(_core.ShapeError, match="weight"):
        index.update([3], other[:49])
    with pytest.raises(_core.ShapeError, match="weight"):
        index.build(other[:, :7])
    with pytest.raises(_core.ShapeError, match="bias: expected none"):
        index.build(other, np.zeros(50, np.float32))
    with pytest.raises(_core.DtypeError, match="weight"):
        index.build(other.astype(np.int32))
    with pytest.raises(_core.ShapeError, match="probes"):
        index.query(hidden, 5, probes=3)
    with pytest.raises(_core.ShapeError, match="hidden"):
        index.query(hidden[:, :7], 5)
    assert lists(index.query(hidden, 50)) == before
