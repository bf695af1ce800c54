"""test_early_stopping.py -- the held-out part of a fit: the split, the end of training, the best model, resuming."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp

import widehead
from test_estimator import NAMES, toy
from widehead import Classifier, cli
from widehead._training import Examples, encode
from widehead._validation import Validation
from widehead.metrics import MetricAccumulator
from widehead.text import NGramHasher


def watched(head="dense", **options):
    """A classifier that holds a fifth of the examples out, and learns the toy problem in some three epochs."""
    own = {"dim": 16, "negatives": 6, "lr": 0.01} if head == "dense" else {"intermediate": 64, "lr": 0.005}
    if head == "sparse":
        own |= {"optimizer": "adam", "head_options": {"fan_in": 16, "rewire_every": 10}}
    defaults = {"epochs": 12, "batch_size": 32, "early_stopping": True, "validation_fraction": 0.2}
    return Classifier(head, **{**defaults, **own, "validation_metric": "P@1", "n_iter_no_change": 3, **options})


def split(model, X, y):
    return Validation(model, Examples(X, model.features), encode(y, None, None)[0])


def precision(model, X, y):
    found = MetricAccumulator((1,))
    found.update(model.predict_topk(X, 1)[1], y)
    return found.result()["P@1"]


def spoil(at):
    """A callback that gives the layers noise after every epoch from `at` on, so that the later ones are worse."""

    def callback(model, epoch, loss):
        if epoch >= at:
            model.bag_.weight = np.random.default_rng(epoch).standard_normal(model.bag_.weight.shape, np.float32)

    return callback


def layers(model):
    arrays = [model.bag_.weight, *model.head_.state_dict().values()]
    return [array.copy() for array in arrays]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_split_is_disjoint_whole_and_of_the_seed():
    X, y = toy(n=200)
    first, again, other = (split(watched(seed=seed), X, y) for seed in (3, 3, 4))
    assert len(first.held) == 40 and len(first.training) == 160
    assert np.array_equal(np.sort(np.concatenate([first.held, first.training])), np.arange(200))
    assert np.array_equal(first.held, again.held) and not np.array_equal(first.held, other.held)
    assert len(first.training_targets) == 160
    off = split(watched(early_stopping=False), X, y)
    assert len(off.held) == 0 and np.array_equal(off.training, np.arange(200))
    assert len(split(watched(early_stopping=False, schedule="plateau"), X, y).held) == 40


@pytest.mark.parametrize("head", ["dense", "sparse"])
def test_held_out_examples_are_not_trained_on(head):
    """Other features and classes for the held-out examples change the figures, but not the model."""
    X, y = toy(n=200)
    model = watched(head, epochs=3, lr=0.05, loss="bce")
    held = split(model, X, y).held
    shuffled = y.copy()
    shuffled[held] = (y[held] + 1) % 12
    noise = X.toarray()
    noise[held] = np.random.default_rng(0).random((len(held), 60), np.float32)
    seen = []

    def note(model, epoch, loss):
        seen.append(layers(model))

    a = watched(head, epochs=3, lr=0.05, loss="bce", callback=note).fit(X, y)
    b = watched(head, epochs=3, lr=0.05, loss="bce", callback=note).fit(sp.csr_array(noise), shuffled)
    assert all(same(seen[i], seen[i + 3]) for i in range(3))
    assert [h["loss"] for h in a.history_] == [h["loss"] for h in b.history_]
    assert [h["validation"] for h in a.history_] != [h["validation"] for h in b.history_]


@pytest.mark.parametrize("head", ["dense", "sparse"])
@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_training_stops_and_the_best_model_is_kept(head, schedule):
    X, y = toy(n=200)
    kept = {}

    def callback(model, epoch, loss):
        kept[epoch] = layers(model)
        spoil(2)(model, epoch, loss)

    model = watched(head, schedule=schedule, callback=callback).fit(X, y)
    figures = [h["validation"] for h in model.history_]
    best = int(np.argmax(figures))
    assert best == 2 and len(figures) == 6, figures
    assert model.best_epoch_ == best and model.best_validation_score_ == figures[best] > max(figures[best + 1 :])
    assert same(layers(model), kept[best]) and not same(layers(model), kept[best + 3])
    held = split(model, X, y).held
    assert precision(model, X[held], y[held]) == pytest.approx(figures[best])


def test_without_early_stopping_nothing_is_held_out():
    X, y = toy(n=100)
    model = watched(epochs=2, early_stopping=False).fit(X, y)
    assert model.best_epoch_ is None and model.best_validation_score_ is None
    assert all("validation" not in entry for entry in model.history_)
    assert model.head_.steps == 2 * 4  # 100 examples in batches of 32, all of them


def test_plateau_halves_the_rate():
    """The factor by the figures: each `patience` epochs without a better one halve it, and the count starts anew."""
    X, y = toy(n=100)
    validation = split(watched(schedule="plateau", patience=2, early_stopping=False), X, y)
    figures = [0.1, 0.3, 0.2, 0.3, 0.25, 0.2, 0.2, 0.4, 0.1]
    factors = []
    for i in range(len(figures)):
        validation.replay([{"epoch": e, "validation": f} for e, f in enumerate(figures[: i + 1])])
        factors.append(validation.factor)
    assert factors == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert not validation.stop and validation.best_epoch == 7


def test_plateau_reaches_the_steps(monkeypatch):
    X, y = toy(n=200)
    rates = []
    step = Classifier._step

    def spy(self, X, target, rate, weight):
        rates.append(rate)
        return step(self, X, target, rate, weight)

    monkeypatch.setattr(Classifier, "_step", spy)
    options = {"schedule": "plateau", "patience": 1, "early_stopping": False, "epochs": 5, "lr": 0.5}
    watched(callback=spoil(0), **options).fit(X, y)
    by_epoch = np.array(rates).reshape(5, 5)  # 160 examples in batches of 32
    assert (by_epoch == by_epoch[:, :1]).all()
    assert by_epoch[0, 0] == 0.5 and by_epoch[-1, 0] < 0.5
    ratios = by_epoch[1:, 0] / by_epoch[:-1, 0]
    assert set(ratios) <= {0.5, 1.0} and 0.5 in ratios


@pytest.mark.parametrize("head", ["dense", "sparse"])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path, head, cut):
    """Cut short before and after the best epoch; then once more from the checkpoint of the finished fit."""
    X, y = toy(n=200)
    options = {"schedule": "plateau", "patience": 1, "checkpoint_every": 0.0}
    whole = watched(head, callback=spoil(2), **options, checkpoint=tmp_path / "whole").fit(X, y)
    assert whole.best_epoch_ == 2 and len(whole.history_) == 6

    calls = []

    def transform(examples, epoch):
        if epoch == cut + 1 and not calls:
            calls.append(epoch)
            raise KeyboardInterrupt
        return examples

    options["checkpoint"] = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        watched(head, callback=spoil(2), transform=transform, **options).fit(X, y)
    for _ in range(2):
        resumed = watched(head, callback=spoil(2), resume=True, **options).fit(X, y)
        assert same(layers(resumed), layers(whole))
        assert resumed.best_epoch_ == whole.best_epoch_
        assert resumed.best_validation_score_ == whole.best_validation_score_
        for name in ("loss", "validation"):
            assert [h[name] for h in resumed.history_] == [h[name] for h in whole.history_]


def test_strings():
    names = NAMES * 8
    options = {"batch_size": 16, "lr": 0.2, "validation_metric": "hit@2", "epochs": 6}
    model = watched(features=NGramHasher(2**10), **options).fit(names, names)
    figures = [h["validation"] for h in model.history_]
    assert max(figures) == figures[model.best_epoch_] > 0.8
    assert model.predict(["berlin"])[0] in set(NAMES)
    again = watched(features=NGramHasher(2**10), **options).fit(names, names)
    assert same(layers(model), layers(again))


def test_several_labels_and_a_metric_beyond_the_classes():
    X, y = toy(n=200)
    rows = [[c, (c + 1) % 12] for c in y.tolist()]
    model = watched("sparse", epochs=4, validation_metric="P@20").fit(X, rows)
    assert all(entry["validation"] <= 2 / 20 for entry in model.history_)
    assert watched("sparse", epochs=4, validation_metric="nDCG@3").fit(X, rows).best_validation_score_ > 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_fraction": 0.0}, r"validation_fraction: expected a share in \(0, 1\)"),
        ({"validation_fraction": None}, "validation_fraction: expected a share"),
        ({"validation_fraction": 1.0}, "validation_fraction: expected a share"),
        ({"validation_fraction": 40}, "validation_fraction: expected a share"),
        ({"validation_fraction": 1e-4}, "validation_fraction: 0.0001 of 600 examples leaves none to validate with"),
        ({"validation_fraction": 0.9999}, "validation_fraction: 0.9999 of 600 examples leaves none to train on"),
        ({"validation_metric": "P@0"}, "validation_metric: expected P@k"),
        ({"validation_metric": "accuracy"}, "validation_metric: expected P@k.*'accuracy'"),
        ({"validation_metric": None}, "validation_metric: expected P@k"),
        ({"n_iter_no_change": 0}, "n_iter_no_change: expected an integer of at least 1, got 0"),
        ({"patience": 1.5}, "patience: expected an integer of at least 1, got 1.5"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused_by_name(options, message):
    with pytest.raises(widehead.ShapeError, match=message):
        watched(**options).fit(*toy())


def test_partial_fit_knows_no_early_stopping():
    X, y = toy(n=50)
    with pytest.raises(widehead.ShapeError, match="early_stopping: expected False for partial_fit"):
        watched().partial_fit(X, y)


def test_command_line(tmp_path, capsys):
    X, y = toy()
    Y = sp.csr_array((np.ones(len(y)), (np.arange(len(y)), y)), shape=(len(y), 12))
    for name, matrix in (("X", X), ("Y", Y)):
        sp.save_npz(tmp_path / f"{name}.npz", matrix)
    data, out = [str(tmp_path / "X.npz"), str(tmp_path / "Y.npz")], str(tmp_path / "model.safetensors")
    options = ["--early-stopping", "--validation-metric", "P@1", "--n-iter-no-change", "2", "--epochs", "30"]
    options += ["--schedule", "plateau", "--patience", "1", "--validation-fraction", "0.2"]
    options += ["--loss", "softmax", "--lr", "0.05"]
    assert cli.main(["train", *data, "-o", out, *options, "--quiet", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    figures = [entry["validation"] for entry in got["epochs"]]
    assert len(figures) < 30 and got["best_epoch"] == 1 + int(np.argmax(figures)) == len(figures) - 2
    assert got["parameters"]["validation_fraction"] == 0.2
    assert cli.main(["train", *data, "-o", out, *options, "--quiet"]) == 0
    assert f"best P@1, of epoch {got['best_epoch']}" in capsys.readouterr().out
    assert cli.main(["train", *data, "-o", out, *options, "--validation-fraction", "2", "--quiet"]) == 1
    assert "validation_fraction: expected a share" in capsys.readouterr().err
