"""test_estimator_sparse.py -- the classifier with a ReLU layer and a sparse head: it learns, resumes, and is saved"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from test_estimator import toy
from widehead import Classifier, ShapeError, cli
from widehead._core import set_num_threads
from widehead._training import drop_features


def sparse(**options):
    defaults = {"intermediate": 64, "epochs": 8, "batch_size": 32, "lr": 0.02, "optimizer": "adam"}
    head = {"fan_in": 16, "rewire_every": 20, **options.pop("head_options", {})}
    return Classifier("sparse", **{**defaults, "head_options": head, **options})


@pytest.mark.parametrize("loss", [None, "bce", "softmax"])
@pytest.mark.parametrize("group", [1, 4])
def test_it_learns_and_rewires(loss, group):
    X, y = toy()
    model = sparse(loss=loss, dropout=0.1, head_options={"group_size": group}).fit(X[:500], y[:500])
    assert model.score(X[500:], y[500:]) > 0.9
    assert model.head_.weight.shape == (12, 16) and model.bag_.weight.shape == (60, 64)
    still = sparse(loss=loss, epochs=1, head_options={"group_size": group, "rewire_every": None}).fit(X, y)
    assert not np.array_equal(model.head_.index, still.head_.index)


def test_a_dense_head_over_a_relu_layer():
    X, y = toy()
    model = Classifier(intermediate=64, epochs=8, batch_size=32, negatives=6, lr=0.1).fit(X[:500], y[:500])
    assert model.score(X[500:], y[500:]) > 0.9
    assert (np.concatenate(list(model._hidden(X))) >= 0).all()


def test_gradient_through_the_relu_layer():
    """One step of plain SGD moves the first layer by the derivative of the loss, here by central differences."""
    X, y = toy(n=40)
    model = sparse(epochs=1, batch_size=40, optimizer="sgd", lr=1e-3, head_options={"rewire_every": None})
    before = sparse(epochs=1, batch_size=40, optimizer="sgd", lr=1e-12, head_options={"rewire_every": None}).fit(X, y)
    weight, head = before.bag_.weight.copy(), before.head_

    def loss(w):
        z = np.maximum(X.toarray().astype(float) @ w, 0) @ head_matrix.T + head.bias
        sign = np.full(z.shape, -1.0)
        sign[np.arange(40), y] = 1.0
        return (np.maximum(0, 1 - sign * z) ** 2).sum() / 40

    head_matrix = np.zeros((12, 64))
    np.put_along_axis(head_matrix, head.index.astype(int), head.weight.astype(float), 1)
    moved = model.fit(X, y).bag_.weight
    rng = np.random.default_rng(0)
    for _ in range(20):
        at = rng.integers(60), rng.integers(64)
        high, low = weight.astype(float), weight.astype(float)
        high[at] += 1e-4
        low[at] -= 1e-4
        slope = (loss(high) - loss(low)) / 2e-4
        assert abs((weight[at] - moved[at]) / 1e-3 - slope) < 2e-3 * (1 + abs(slope))


def test_dropout_keeps_the_mean_and_depends_on_the_step():
    X = sp.csr_array(np.ones((50, 400), np.float32))
    dropped = [drop_features(X, 0.25, 1, step) for step in range(2)]
    assert abs(dropped[0].nnz / 20_000 - 0.75) < 0.02 and np.allclose(dropped[0].data, 1 / 0.75)
    assert (dropped[0] != dropped[1]).nnz > 0 and (dropped[0] != drop_features(X, 0.25, 1, 0)).nnz == 0
    assert drop_features(X, 0.0, 1, 0) is X


def test_same_bits_files_and_resuming(tmp_path):
    X, y = toy(n=200)
    models = []
    for threads in (1, 2):
        set_num_threads(threads)
        models.append(sparse(epochs=3, dropout=0.2).fit(X, y))
    a, b = (m.head_ for m in models)
    assert np.array_equal(a.weight, b.weight) and np.array_equal(a.index, b.index)
    path = tmp_path / "model.safetensors"
    models[0].save(path)
    loaded = Classifier.load(path)
    assert loaded.get_params()["intermediate"] == 64
    for got, want in zip(loaded.predict_topk(X, 3), models[0].predict_topk(X, 3), strict=True):
        assert np.array_equal(got, want)
    options = {"epochs": 3, "dropout": 0.2, "checkpoint": tmp_path / "fit", "checkpoint_every": 0.0}

    def stop(model, epoch, loss):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparse(**options, callback=stop).fit(X, y)
    resumed = sparse(**options, resume=True).fit(X, y)
    assert np.array_equal(resumed.head_.weight, a.weight) and np.array_equal(resumed.head_.index, a.index)
    assert np.array_equal(resumed.bag_.weight, models[0].bag_.weight)


def test_bad_parameters_are_refused():
    X, y = toy(n=50)
    for options, match in (
        ({"intermediate": 0}, "intermediate: expected a width"),
        ({"dictionary": 0}, "dictionary: expected a width"),
        ({"dropout": 1.0}, "dropout: expected a share"),
        ({"intermediate": 8}, "fan_in"),
        ({"loss": "sampled_softmax"}, "loss"),
    ):
        with pytest.raises((ShapeError, TypeError), match=match):
            sparse(**options).fit(X, y)


def test_command_line(tmp_path, capsys):
    X, y = toy()
    Y = sp.csr_array((np.ones(len(y)), (np.arange(len(y)), y)), shape=(len(y), 12))
    for name, matrix in (("X", X), ("Y", Y)):
        sp.save_npz(tmp_path / f"{name}.npz", matrix)
    data, out = [str(tmp_path / "X.npz"), str(tmp_path / "Y.npz")], str(tmp_path / "model.safetensors")
    options = ["--head", "sparse", "--intermediate", "64", "--fan-in", "16", "--group-size", "2", "--lr", "0.02"]
    assert cli.main(["train", *data, "-o", out, *options, "--epochs", "8", "--dropout", "0.1", "--quiet"]) == 0
    model = Classifier.load(out)
    assert model.score(X, y) > 0.9 and model.head_.options.group_size == 2
    assert cli.main(["evaluate", out, *data]) == 0
    shown = capsys.readouterr().out
    assert "squared_hinge, d = 64" in shown and "nDCG       100.00" in shown
    assert cli.main(["train", *data, "-o", out, "--group-size", "2", "--quiet"]) != 0
    assert "--group-size: belongs to --head sparse" in capsys.readouterr().err
    options = [
        "--head",
        "sparse",
        "--dim",
        "24",
        "--dictionary",
        "64",
        "--fan-in",
        "16",
        "--lr",
        "0.02",
        "--epochs",
        "8",
    ]
    assert cli.main(["train", *data, "-o", out, *options, "--quiet"]) == 0
    model = Classifier.load(out)
    assert model.intermediate is None and model.dictionary_.weight.shape == (64, 24) and model.score(X, y) > 0.9


def with_dictionary(**options):
    defaults = {"intermediate": None, "dim": 24, "dictionary": 64, "normalise": False}
    return sparse(**{**defaults, **options})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dictionary_before_the_head(dtype, tmp_path):
    X, y = toy()
    model = with_dictionary(dtype=dtype).fit(X[:500], y[:500])
    assert model.score(X[500:], y[500:]) > 0.9
    assert model.bag_.weight.shape == (60, 24) and model.dictionary_.weight.shape == (64, 24)
    model.save(tmp_path / "model.safetensors")
    loaded = Classifier.load(tmp_path / "model.safetensors")
    assert np.array_equal(loaded.predict_topk(X, 3)[0], model.predict_topk(X, 3)[0])
    assert loaded.get_params()["dictionary"] == 64


def test_gradient_through_the_dictionary():
    """One step of plain SGD moves the bag and the dictionary by the derivatives of the loss, by central differences."""
    X, y = toy(n=40)
    common = {"epochs": 1, "batch_size": 40, "optimizer": "sgd", "head_options": {"rewire_every": None}}
    before, after = (with_dictionary(lr=lr, **common).fit(X, y) for lr in (1e-12, 1e-3))
    head, dense = before.head_, X.toarray().astype(float)
    head_matrix = np.zeros((12, 64))
    np.put_along_axis(head_matrix, head.index.astype(int), head.weight.astype(float), 1)
    start = {"bag_": before.bag_.weight.astype(float), "dictionary_": before.dictionary_.weight.astype(float)}
    end = {"bag_": after.bag_.weight.astype(float), "dictionary_": after.dictionary_.weight.astype(float)}

    def loss(bag_, dictionary_):
        z = dense @ bag_ @ dictionary_.T @ head_matrix.T + head.bias
        sign = np.full(z.shape, -1.0)
        sign[np.arange(40), y] = 1.0
        return (np.maximum(0, 1 - sign * z) ** 2).sum() / 40

    rng = np.random.default_rng(0)
    for name, weight in start.items():
        for _ in range(20):
            at = tuple(rng.integers(n) for n in weight.shape)
            moved = {}
            for sign in (-1, 1):
                changed = weight.copy()
                changed[at] += sign * 1e-4
                moved[sign] = loss(**{**start, name: changed})
            slope = (moved[1] - moved[-1]) / 2e-4
            assert end[name][at] - weight[at] == pytest.approx(-1e-3 * slope, rel=2e-2, abs=2e-6)


def test_a_fit_with_a_dictionary_resumes_with_the_same_bits(tmp_path):
    X, y = toy()
    whole = with_dictionary(epochs=4).fit(X, y)

    class Enough(Exception):
        pass

    def stop(model, epoch, loss):
        if epoch == 2:
            raise Enough

    kept = {"epochs": 4, "checkpoint": tmp_path / "fit", "checkpoint_every": 1e-9}
    with pytest.raises(Enough):
        with_dictionary(callback=stop, **kept).fit(X, y)
    resumed = with_dictionary(resume=True, **kept).fit(X, y)
    for layer in ("bag_", "dictionary_", "head_"):
        assert np.array_equal(getattr(resumed, layer).weight, getattr(whole, layer).weight), layer
