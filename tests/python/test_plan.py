"""test_plan.py -- the arithmetic of plans, their laws, and what is recommended."""

import dataclasses
import json

import numpy as np
import pytest

from widehead import machine, plan
from widehead._core import Error, ShapeError

MACHINE = machine.Machine(
    name="test",
    flops={"float32": 1e11, "bfloat16": 2e11},
    exponentials=1e9,
    bandwidth=1e10,
    memory=8 * 2**30,
    measured=False,
)


def total(terms):
    return sum(term.value for term in terms)


def by_head(job):
    return {(p.head, p.loss): p for p in plan.plans(job)}


def test_arithmetic_by_hand():
    job = plan.Job(1000, 16, 8, optimizer="adam")
    got = by_head(job)
    linear, dense = got["nn.Linear", "softmax"], got["DenseHead", "softmax"]
    sampled = got["DenseHead", "sampled_softmax"]
    parameters, moments = 1000 * 16 * 4 + 1000 * 4, 8 * 1000 * 17
    assert linear.peak == parameters + moments + 1000 * 16 * 4 + 3 * 8 * 1000 * 4
    assert total(linear.flops) == 3 * 2 * 8 * 1000 * 16
    assert total(dense.flops) == 4 * 2 * 8 * 1000 * 16
    assert dense.exponentials == linear.exponentials == 2 * 8 * 1000
    assert dense.peak == parameters + moments + 4 * 8 * 16 * 4 + 2**25
    assert total(dense.traffic) == 3 * 1000 * 16 * 4 + 2 * 1000 * 8 * 16
    rows = 512 + 8
    assert total(sampled.flops) == 4 * 2 * 8 * rows * 16
    assert total(sampled.traffic) == 3 * rows * 16 * 4 + 16 * rows * 16 + 2 * rows * 8 * 16
    assert (linear.exact, dense.exact, sampled.exact) == (True, True, False)


def test_losses_with_one_pass_cost_less():
    softmax = by_head(plan.Job(1000, 16, 8))["DenseHead", "softmax"]
    for loss in ("bce", "squared_hinge"):
        got = by_head(plan.Job(1000, 16, 8, loss=loss))
        others = {(p.head, p.loss) for p in got.values() if p.head in ("SparseHead", "ExactHead")}
        assert others == {("SparseHead", loss), ("ExactHead", "squared_error")}
        assert set(got) - others == {("nn.Linear", loss), ("DenseHead", loss)}
        assert total(got["DenseHead", loss].flops) == total(softmax.flops) * 3 / 4
        assert total(got["DenseHead", loss].traffic) < total(softmax.traffic)


def test_sampled_rows_never_exceed_the_classes():
    got = by_head(plan.Job(100, 16, 64, negatives=512, labels=3))["DenseHead", "sampled_softmax"]
    assert total(got.flops) == 4 * 2 * 64 * 100 * 16


def test_seconds_are_a_roofline_where_fused_and_a_sum_where_not():
    job = plan.Job(10**6, 64, 32)
    got = by_head(job)
    for planned, combine in ((got["DenseHead", "softmax"], max), (got["nn.Linear", "softmax"], lambda a, b: a + b)):
        arithmetic = total(planned.flops) / 1e11 + planned.exponentials / 1e9
        assert planned.seconds(MACHINE) == pytest.approx(combine(arithmetic, total(planned.traffic) / 1e10))
    starved = dataclasses.replace(MACHINE, bandwidth=1e6)
    dense = got["DenseHead", "softmax"]
    assert dense.seconds(starved) == pytest.approx(total(dense.traffic) / 1e6)


@pytest.mark.parametrize("optimizer", plan.OPTIMIZERS)
@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_memory_of_weights_and_state_is_what_the_head_allocates(optimizer, dtype):
    numpy_heads = pytest.importorskip("widehead.numpy")
    job = plan.Job(300, 12, 4, dtype=dtype, optimizer=optimizer)
    head = numpy_heads.DenseHead(12, 300, dtype=dtype, seed=0)
    head.step(np.ones((4, 12), np.float32), np.zeros(4, np.int64), 0.1, optimizer)
    held = sum(array.nbytes for array in (head.weight, head.bias, *head._optimizer.arrays.values()))
    planned = [
        t.value for t in by_head(job)["DenseHead", "softmax"].memory if "hidden" not in t.what and "tiles" not in t.what
    ]
    assert sum(planned) == held


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("optimizer", plan.OPTIMIZERS)
@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_memory_of_a_sparse_head_is_what_it_allocates(optimizer, dtype, group):
    numpy_heads = pytest.importorskip("widehead.numpy")
    job = plan.Job(300, 12, 4, dtype=dtype, optimizer=optimizer, intermediate=50, fan_in=7, group_size=group)
    head = numpy_heads.SparseHead(50, 300, 7, dtype=dtype, group_size=group)
    head.step(np.ones((4, 50), np.float32), np.zeros(4, np.int64), 0.1, optimizer)
    held = sum(a.nbytes for a in (head.weight, head.index, head.bias, *head._optimizer.arrays.values()))
    terms = by_head(job)["SparseHead", "squared_hinge"].memory
    assert sum(t.value for t in terms if "hidden" not in t.what and "tiles" not in t.what) == held


def test_arithmetic_of_a_sparse_head_by_hand():
    job = plan.Job(1000, 16, 8, optimizer="sgd", loss="bce", intermediate=70000, fan_in=5, group_size=8)
    got = by_head(job)["SparseHead", "bce"]
    assert got.peak == 1000 * 5 * 4 + 125 * 5 * 4 + 4000 + 4 * 8 * 70000 * 4 + 2**25
    assert total(got.flops) == 3 * 2 * 8 * 1000 * 5
    assert got.gathers == 4 * 8 * 4 * 125 * 5
    slow = dataclasses.replace(MACHINE, gather_rate=1e6)
    assert got.seconds(slow) - got.seconds(MACHINE) == pytest.approx(got.gathers / 1e6, rel=1e-3)


def test_arithmetic_of_an_exact_head_by_hand():
    d, b = 20, 8
    plain = by_head(plan.Job(1000, d, b, optimizer="sgd"))["ExactHead", "squared_error"]
    rows, hot = 8, 20
    assert total(plain.flops) == pytest.approx(
        4 * b * d * d + 4 * b * b * d + 4 * b * d * d + 4 * b * hot * d + 8.4 * rows * d * d + 2 * d**3
    )
    assert plain.peak == 1000 * d * 4 + 4000 + 140 * d * d + d * (20 * hot + 40 * b) + 2**25
    moving = by_head(plan.Job(1000, d, b, optimizer="momentum"))["ExactHead", "squared_error"]
    assert moving.peak > plain.peak + 1000 * d * 4 and 2 * total(plain.flops) < total(moving.flops)
    # The steps of many classes are no dearer.
    more = by_head(plan.Job(10**6, d, b, optimizer="sgd"))["ExactHead", "squared_error"]
    assert total(more.flops) == total(plain.flops) and more.seconds(MACHINE) == plain.seconds(MACHINE)


def test_half_the_bytes_half_the_weights():
    wide, narrow = (by_head(plan.Job(10**6, 64, 32, dtype=d))["DenseHead", "softmax"] for d in ("float32", "bfloat16"))
    assert wide.memory[0].value == 2 * narrow.memory[0].value
    assert narrow.seconds(MACHINE) < wide.seconds(MACHINE)


def test_recommendations():
    few = plan.plans(plan.Job(1000, 64, 32))
    advice = plan.recommend(few, MACHINE)
    assert (advice.plan.head, advice.plan.loss) == ("DenseHead", "softmax")
    assert advice.reason.startswith("exact")

    many = plan.plans(plan.Job(5 * 10**6, 128, 128))
    advice = plan.recommend(many, MACHINE)
    assert advice.plan.loss == "sampled_softmax"
    assert "times faster than the exact softmax" in advice.reason

    advice = plan.recommend(many, MACHINE.with_memory(1e9))
    assert advice.plan is None
    assert "nothing fits: DenseHead with softmax needs 2.5 GiB, 953.7 MiB are free" in advice.reason

    hinge = plan.plans(plan.Job(5 * 10**6, 128, 128, loss="squared_hinge"))
    assert plan.recommend(hinge, MACHINE).plan.loss == "squared_hinge"
    huge = plan.plans(plan.Job(10**8, 768, 32, dtype="bfloat16", optimizer="sgd", loss="squared_hinge"))
    advice = plan.recommend(huge, MACHINE.with_memory(24 * 2**30))
    assert advice.plan.head == "SparseHead" and "another model" in advice.reason
    assert "DenseHead with squared_hinge needs 143.5 GiB, 24.0 GiB are free" in advice.reason
    assert plan.recommend(huge, MACHINE.with_memory(2.0**40)).plan.head == "DenseHead"

    assert all(p.ours for p in (plan.recommend(c, MACHINE).plan for c in (few, many, hinge)))


def test_a_new_head_enters_by_registration(monkeypatch):
    monkeypatch.setattr(plan, "_PLANNERS", dict(plan._PLANNERS))

    @plan.register("free")
    def free(job):
        term = plan.Term("nothing", "0", 0.0)
        return [plan.Plan("FreeHead", job.loss, True, [term], [term], [term], 1.0, job.dtype)]

    advice = plan.recommend(plan.plans(plan.Job(10**7, 512, 128)), MACHINE.with_memory(1.0))
    assert advice.plan.head == "FreeHead"


def test_json_holds_the_arithmetic():
    dense = by_head(plan.Job(1000, 16, 8))["DenseHead", "softmax"]
    got = json.loads(json.dumps(dense.as_dict(MACHINE, 8)))
    assert got["flops"] == total(dense.flops)
    assert got["fits"] is True
    assert got["examples_per_second"] == pytest.approx(8 / dense.seconds(MACHINE))
    assert [term["what"] for term in got["terms"]["flops"]] == ["logits, twice", "dH and dW"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_classes": 0}, "n_classes: expected at least 1, got 0"),
        ({"batch": -1}, "batch: expected at least 1"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, got 'int8'"),
        ({"loss": "mse"}, "loss: expected one of"),
        ({"optimizer": "lion"}, "optimizer: expected one of"),
        ({"fan_in": 33, "intermediate": 32}, "fan_in: expected at most 32, as intermediate is, got 33"),
        ({"group_size": 0}, "group_size: expected at least 1"),
    ],
)
def test_bad_jobs(change, match):
    with pytest.raises(ShapeError, match=match):
        plan.Job(**{"n_classes": 10, "in_features": 4, "batch": 2, **change})


def test_machines():
    gpu = machine.machine("h100")
    assert not gpu.measured and gpu.flops["bfloat16"] > 5 * gpu.flops["float32"]
    with pytest.raises(Error, match="device: expected one of cpu, a100, h100, h200, got 'tpu'"):
        machine.machine("tpu")
    here = machine.machine("cpu")
    assert here.measured
    assert 1e7 < here.flops["bfloat16"] < 1e15 and 1e8 < here.flops["float32"] < 1e14
    assert 1e7 < here.exponentials < 1e13
    assert 1e7 < here.bandwidth < 1e13 and 1e7 < here.gather_rate < 1e14
    assert 2**20 < here.memory < 2**50


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (plan.human_bytes, 12, "12 B"),
        (plan.human_bytes, 1536, "1.5 KiB"),
        (plan.human_bytes, 3 * 2**40, "3.0 TiB"),
        (plan.human_seconds, 2.5, "2.5 s"),
        (plan.human_seconds, 0.0123, "12.3 ms"),
        (plan.human_seconds, 4e-6, "4 us"),
        (plan.human_count, 1234567, "1.23 M"),
        (plan.human_count, 12, "12"),
    ],
)
def test_numbers_for_people(function, value, text):
    assert function(value) == text
