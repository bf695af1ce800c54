"""test_estimator.py -- the classifier: learns, follows scikit-learn, resumes after a kill, refuses bad input"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import scipy.sparse as sp

import widehead
from widehead import Labels
from widehead.estimator import Classifier
from widehead.text import NGramHasher, PackedStrings, typos

LOSSES = ["sampled_softmax", "softmax", "bce", "squared_hinge"]


def toy(n=600, n_features=60, n_classes=12, seed=0):
    """Each class has its own five features; three of them show in an example, and two that mean nothing."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n)
    X = np.zeros((n, n_features), np.float32)
    for i, c in enumerate(y):
        X[i, 5 * c + rng.choice(5, 3, replace=False)] = 1
        X[i, rng.integers(0, n_features, 2)] += 0.3
    return sp.csr_array(X), y


def small(**options):
    return Classifier(**{"dim": 16, "epochs": 8, "batch_size": 32, "negatives": 6, "lr": 0.2, **options})


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "sgd"])
def test_it_learns(loss, optimizer):
    X, y = toy()
    lr = {"adagrad": 0.2, "adam": 0.03, "sgd": 0.5 if "softmax" in loss else 0.1}[optimizer]
    model = small(loss=loss, optimizer=optimizer, lr=lr).fit(X[:500], y[:500])
    assert model.score(X[500:], y[500:]) > 0.9
    assert len(model.history_) == 8
    assert model.history_[-1]["loss"] < 0.5 * model.history_[0]["loss"]
    assert small(loss=loss, epochs=1, lr=1e-6).fit(X[:500], y[:500]).score(X[500:], y[500:]) < 0.5


@pytest.mark.parametrize("loss", LOSSES)
def test_several_labels_an_example(loss):
    X, y = toy()
    rows = [[c] if i % 3 else [c, (c + 1) % 12] for i, c in enumerate(y.tolist())]
    Y = Labels.from_lists(rows, 12)
    matrix = sp.csr_array((np.ones(len(Y.indices)), Y.indices, Y.indptr), shape=(len(rows), 12))
    models = [small(loss=loss).fit(X, target) for target in (rows, Y, matrix, matrix.toarray())]
    assert models[0].score(X, rows) > 0.9 and models[0].score(X, matrix) == models[0].score(X, rows)
    for other in models[1:]:
        np.testing.assert_array_equal(other.head_.weight, models[0].head_.weight)
        np.testing.assert_array_equal(other.bag_.weight, models[0].bag_.weight)
    best = models[0].predict(X)
    assert models[0].score(X, rows) == np.mean([b in row for b, row in zip(best, rows, strict=True)])
    heavier = small(loss=loss).fit(X, matrix * 2)
    assert (heavier.head_.weight != models[0].head_.weight).any()


@pytest.mark.parametrize(
    "names", [lambda y: y * 7 - 20, lambda y: np.array([f"class {c}" for c in y]), lambda y: y * 0.5]
)
def test_classes_keep_their_names(names, tmp_path):
    X, y = toy()
    named = names(y)
    model = small().fit(X, named)
    np.testing.assert_array_equal(model.classes_, np.unique(named))
    assert model.score(X, named) > 0.9 and np.mean(model.predict(X) == named) == model.score(X, named)
    plain = small(n_classes=12).fit(X, y)
    np.testing.assert_array_equal(plain.predict(X), y[[list(named).index(c) for c in model.predict(X)]])
    model.save(tmp_path / "model")
    again = Classifier.load(tmp_path / "model")
    np.testing.assert_array_equal(again.classes_, model.classes_)
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    stranger = np.array([names(np.array([99]))[0]] * 3)
    assert model.score(X[:3], stranger) == 0


def test_predictions_agree_with_each_other():
    X, y = toy()
    model = small(loss="softmax").fit(X, y)
    scores, classes = model.predict_topk(X, 4)
    logits = model.decision_function(X)
    assert scores.shape == classes.shape == (600, 4) and logits.shape == (600, 12)
    np.testing.assert_array_equal(classes, np.argsort(-logits, axis=1, kind="stable")[:, :4])
    np.testing.assert_allclose(scores, -np.sort(-logits, axis=1)[:, :4], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model.predict(X), classes[:, 0])
    np.testing.assert_allclose(model.predict_proba(X).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(model.predict_proba(X).argmax(axis=1), classes[:, 0])
    assert model.predict_topk(X, 100)[1].shape == (600, 12)
    dense, one = model.predict_topk(X.toarray(), 4), model.predict_topk(X[:1], 4)
    np.testing.assert_array_equal(dense[1], classes)
    np.testing.assert_array_equal(one[1], classes[:1])
    empty = model.predict_topk(X[:0], 4)
    assert empty[0].shape == empty[1].shape == (0, 4) and model.predict(X[:0]).shape == (0,)


@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_again_and_for_any_number_of_threads(loss):
    X, y = toy()
    models = []
    for threads in (1, 2, 4, 1):
        widehead.set_num_threads(threads)
        models.append(small(loss=loss, epochs=2).fit(X, y))
    for other in models[1:]:
        np.testing.assert_array_equal(other.head_.weight, models[0].head_.weight)
        np.testing.assert_array_equal(other.bag_.weight, models[0].bag_.weight)
    other = small(loss=loss, epochs=2, seed=1).fit(X, y)
    assert (other.bag_.weight != models[0].bag_.weight).mean() > 0.9


def test_schedules_fall_and_warm_up():
    from widehead._training import rate_at

    for schedule, last in (("linear", 0.01), ("cosine", 0.001), ("constant", 1.0)):
        rates = [rate_at(schedule, 0.1, step, 100) for step in range(100)]
        assert 0 < rates[0] < 0.2 and max(rates) == rates[10] == 1.0
        assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] <= last * 1.2
    assert rate_at("linear", 0.0, 0, 10) == 1.0 and rate_at("linear", 0.0, 5, 10) == 0.5
    assert abs(rate_at("cosine", 0.0, 5, 10) - 0.5) < 1e-12


def test_the_order_is_a_permutation_of_seed_and_epoch():
    from widehead._training import order_of

    order = order_of(1000, 3, 1)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, order_of(1000, 3, 1))
    for other in (order_of(1000, 3, 2), order_of(1000, 4, 1), np.arange(1000)):
        assert (order != other).mean() > 0.9


NAMES = [
    f"{a}{b}{c}" for a in ("ber", "lon", "par", "mos") for b in ("ling", "dora", "tin") for c in ("en", "ska", "o")
]


def test_strings_with_typing_errors(tmp_path):
    seen = []

    def noise(strings, epoch):
        assert isinstance(strings, PackedStrings)
        seen.append(epoch)
        return typos(strings, 0.5, seed=1, step=epoch)

    options = {
        "features": NGramHasher(2**12, romanise=None),
        "epochs": 30,
        "batch_size": 8,
        "negatives": 36,
        "scale": 6.0,
    }
    model = small(transform=noise, **options).fit(NAMES, NAMES)
    assert seen == list(range(30))
    assert model.score(NAMES, NAMES) == 1.0
    wrong = typos(NAMES * 5, 1.0, seed=5)
    assert model.score(wrong, NAMES * 5) > 0.8
    assert (model.bag_.weight != small(**options).fit(NAMES, NAMES).bag_.weight).any()
    model.save(tmp_path / "model")
    again = Classifier.load(tmp_path / "model")
    assert again.features.get_params() == model.features.get_params()
    assert (
        again.predict_topk(["Berlinska", "parisdora"], 2)[1].tolist()
        == model.predict_topk(["berlinska", "PARISDORA"], 2)[1].tolist()
    )


def test_hashing_batch_by_batch_is_hashing_at_once():
    hasher = NGramHasher(2**10)
    at_once = small(epochs=2).fit(hasher.transform(NAMES), NAMES)
    by_batch = small(epochs=2, features=hasher).fit(NAMES, NAMES)
    np.testing.assert_array_equal(at_once.bag_.weight, by_batch.bag_.weight)
    np.testing.assert_array_equal(
        at_once.predict_topk(hasher.transform(NAMES), 3)[0], by_batch.predict_topk(NAMES, 3)[0]
    )


def test_partial_fit_goes_on():
    X, y = toy()
    model = small()
    with pytest.raises(widehead.ShapeError, match="classes"):
        small().partial_fit(X[:100], y[:100], classes=np.arange(12)).partial_fit(X[:2], sp.csr_array((2, 13)))
    for i in range(6):
        for first in range(0, 500, 100):
            model.partial_fit(
                X[first : first + 100], y[first : first + 100], classes=np.arange(12) if i == first == 0 else None
            )
    assert model.score(X[500:], y[500:]) > 0.9 and len(model.history_) == 30
    with pytest.raises(widehead.LabelError, match="99"):
        model.partial_fit(X[:1], [99])


def test_weights_of_examples():
    X, y = toy()
    rng = np.random.default_rng(3)
    wrong = rng.integers(0, 12, 600)
    both, labels = sp.vstack([X, X], format="csr"), np.concatenate([y, wrong])
    weight = np.concatenate([np.ones(600), np.zeros(600)])
    assert small().fit(both, labels, sample_weight=weight).score(X, y) > 0.95
    model = small().fit(X, y)
    hit = model.predict(X) == y
    assert model.score(X, y, sample_weight=np.where(hit, 1.0, 0.0)) == 1.0


def test_callback_sees_every_epoch():
    X, y = toy()
    calls = []
    model = small(epochs=3, callback=lambda m, epoch, loss: calls.append((m, epoch, loss, m.score(X, y)))).fit(X, y)
    assert [c[1] for c in calls] == [0, 1, 2] and all(c[0] is model for c in calls)
    assert [c[2] for c in calls] == [h["loss"] for h in model.history_]


def test_progress_bar(capsys):
    X, y = toy()
    small(epochs=1, verbose=True).fit(X, y)
    assert "19/19" in capsys.readouterr().err


# scikit-learn


def test_clone_pipeline_and_grid_search():
    base = pytest.importorskip("sklearn.base")
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    X, y = toy()
    model = small(scale=3.0)
    assert base.clone(model).get_params() == model.get_params() and base.is_classifier(model)
    model.set_params(dim=8, features=None)
    assert model.dim == 8
    pipe = make_pipeline(MaxAbsScaler(), small()).fit(X, y)
    assert pipe.score(X, y) > 0.9
    texts = make_pipeline(NGramHasher(2**10, romanise=None), small(epochs=30, batch_size=8)).fit(NAMES, NAMES)
    assert texts.score(NAMES, NAMES) > 0.9
    assert cross_val_score(small(), X, y, cv=3).min() > 0.8
    search = GridSearchCV(small(), {"lr": [1e-6, 0.2], "features": [None]}, cv=2).fit(X, y)
    assert search.best_params_["lr"] == 0.2 and search.best_score_ > 0.8
    assert "dim=16" in repr(small())


def test_an_unfitted_classifier_says_so():
    error = pytest.importorskip("sklearn.exceptions").NotFittedError
    for call in (lambda m: m.predict([[1.0]]), lambda m: m.score([[1.0]], [0]), lambda m: m.save("nowhere")):
        with pytest.raises(error, match="fit"):
            call(Classifier())


def test_without_scikit_learn(tmp_path):
    # What the module does where scikit-learn cannot be imported, in a process of its own.
    code = """
    import sys
    sys.modules["sklearn"] = sys.modules["sklearn.base"] = None
    import numpy as np
    import widehead
    assert "widehead.estimator" not in sys.modules
    X = np.eye(6, dtype=np.float32).repeat(20, axis=0)
    y = np.arange(6).repeat(20)
    model = widehead.Classifier(dim=8, epochs=30, batch_size=16, negatives=3)
    assert model.get_params()["dim"] == 8 and model.set_params(lr=0.3).lr == 0.3
    assert model.fit(X, y).score(X, y) == 1.0
    try:
        widehead.Classifier().predict(X)
    except widehead.Error as error:
        assert "fit" in str(error)
    else:
        raise AssertionError
    print(model)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Classifier(dim=8, negatives=3, epochs=30, batch_size=16, lr=0.3)"


# Files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_predicts_the_same(tmp_path, dtype):
    X, y = toy()
    model = small(dtype=dtype, loss="bce", head_options={"bias": False}).fit(X, y)
    model.save(tmp_path / "model")
    again = Classifier.load(tmp_path / "model")
    for a, b in zip(again.predict_topk(X, 5), model.predict_topk(X, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.score(X, y) == model.score(X, y)
    assert {k: v for k, v in again.get_params().items()} == model.get_params()


def test_options_may_be_arrays_and_numpy_numbers(tmp_path):
    X, y = toy()
    weight = np.linspace(0.5, 2, 12)
    options = {"lr": np.float32(0.25), "epochs": np.int64(2), "head_options": {"proposal": weight, "softcap": 30.0}}
    model = small(**options, checkpoint=tmp_path / "checkpoint").fit(X, y)
    model.save(tmp_path / "model")
    again = Classifier.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert again.lr == 0.25 and again.head_options["softcap"] == 30.0
    np.testing.assert_allclose(again.head_options["proposal"] / again.head_options["proposal"][0], weight / weight[0])
    done = small(**options, checkpoint=tmp_path / "checkpoint", resume=True).fit(X, y)
    np.testing.assert_array_equal(done.head_.weight, model.head_.weight)
    other = {**options, "head_options": {"proposal": weight[::-1], "softcap": 30.0}}
    with pytest.raises(widehead.FileError, match="params"):
        small(**other, checkpoint=tmp_path / "checkpoint", resume=True).fit(X, y)


def test_a_fit_that_runs_away_stops():
    X, y = toy()
    with pytest.raises(widehead.NonFiniteError, match=r"runs away at step \d+: .*; lower lr"):
        small(loss="squared_hinge", optimizer="sgd", lr=1e30, normalise=False).fit(X, y)


def test_files_that_are_no_models(tmp_path):
    X, y = toy()
    path = tmp_path / "model"
    model = small(epochs=1).fit(X, y)
    model.save(path)
    whole = path.read_bytes()
    for damage in (whole[:-1], whole[: len(whole) // 2], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damage)
        with pytest.raises(widehead.FileError, match="model"):
            Classifier.load(path)
    model.bag_.save(path)
    with pytest.raises(widehead.FileError, match="expected a saved Classifier, got a EmbeddingBag"):
        Classifier.load(path)
    with pytest.raises(widehead.Error, match="romanise"):
        small(epochs=1, features=NGramHasher(64, romanise=str.upper)).fit(NAMES, NAMES).save(path)


# Checkpoints


def fit_options(path, **more):
    options = {"loss": "sampled_softmax", "optimizer": "adagrad", "dtype": "float32", **more}
    return {"epochs": 6, "batch_size": 16, "checkpoint": str(path), "checkpoint_every": 0.0, **options}


CHILD = """
import json, sys
import numpy as np
sys.path.insert(0, {tests!r})
import widehead
from test_estimator import small, toy, NAMES, fit_options
from widehead.text import NGramHasher, typos

options = json.loads(sys.argv[1])
widehead.set_num_threads(2)
def report(model, epoch, loss):
    print(epoch, flush=True)
features = {{}}
X, y = toy()
if options.pop("text"):
    X, y = NAMES * 10, NAMES * 10
    features = dict(features=NGramHasher(2**12), transform=lambda s, e: typos(s, 0.5, seed=2, step=e))
small(callback=report, **features, **options).fit(X, y)
"""


@pytest.mark.parametrize(
    "options",
    [
        {"text": True},
        {"text": False, "optimizer": "adam", "schedule": "cosine", "warmup": 0.1},
        {"text": False, "dtype": "bfloat16", "loss": "bce", "optimizer": "sgd", "lr": 0.02, "weight_decay": 0.01},
    ],
    ids=["text", "adam", "bfloat16"],
)
def test_a_killed_fit_goes_on_bit_for_bit(tmp_path, options):
    path = tmp_path / "checkpoint"
    text = options["text"]
    widehead.set_num_threads(2)
    common = {k: v for k, v in options.items() if k != "text"}
    X, y = (NAMES * 10, NAMES * 10) if text else toy()
    features = {}
    if text:
        features = {"features": NGramHasher(2**12), "transform": lambda s, e: typos(s, 0.5, seed=2, step=e)}
    whole = small(**features, **fit_options(path, **common)).fit(X, y)
    steps = whole.head_.steps
    path.unlink()

    code = CHILD.format(tests=os.path.dirname(__file__))
    arguments = json.dumps({**fit_options(path, **common), "text": text})
    child = subprocess.Popen([sys.executable, "-c", code, arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().strip() == "0"
        assert child.stdout.readline().strip() == "1"
        time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL
    finally:
        child.kill()
        child.stdout.close()
    assert path.exists()
    from widehead.files import load_head

    taken = load_head(path).state["step"]
    assert 0 < taken < steps, "the child was to be killed in mid-course"

    resumed = small(resume=True, **features, **fit_options(path, **common)).fit(X, y)
    np.testing.assert_array_equal(resumed.head_.weight, whole.head_.weight)
    np.testing.assert_array_equal(resumed.head_.bias, whole.head_.bias)
    np.testing.assert_array_equal(resumed.bag_.weight, whole.bag_.weight)
    assert [h["loss"] for h in resumed.history_] == [h["loss"] for h in whole.history_]
    # The seed and the steps before the kill did count: the rest alone gives another model.
    rest = small(**features, **fit_options(tmp_path / "other", **{**common, "epochs": 4})).fit(X, y)
    assert (rest.bag_.weight != whole.bag_.weight).any()

    # Once more from the finished checkpoint: nothing left to do.
    done = small(resume=True, **features, **fit_options(path, **common)).fit(X, y)
    np.testing.assert_array_equal(done.bag_.weight, whole.bag_.weight)


class Stop(Exception):
    pass


def interrupted(path, X, y, step, **options):
    """A fit that stops in the middle of its second epoch, for the checkpoint that it leaves."""
    calls = []

    def transform(examples, epoch):
        calls.append(epoch)
        if len(calls) == step:
            raise Stop
        return examples

    with pytest.raises(Stop):
        small(transform=transform, **fit_options(path, **options)).fit(X, y)


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    path = tmp_path / "checkpoint"
    X, y = toy()
    interrupted(path, X, y, 3)
    good = fit_options(path)
    for change, data, message in (
        ({"lr": 0.1}, (X, y), "params"),
        ({}, (X * 2, y), "X was"),
        ({}, (X, (y + 1) % 12), "Y was"),
        ({}, (X[:-1], y[:-1]), "examples"),
    ):
        with pytest.raises(widehead.FileError, match=message):
            small(resume=True, **{**good, **change}).fit(*data)
    with pytest.raises(widehead.FileError, match="weight"):
        small(resume=True, **good).fit(X, y, sample_weight=np.full(600, 2.0))
    whole = small(**fit_options(tmp_path / "other")).fit(X, y)
    resumed = small(resume=True, **good).fit(X, y)
    np.testing.assert_array_equal(resumed.bag_.weight, whole.bag_.weight)
    damaged = path.read_bytes()
    path.write_bytes(damaged[:-5])
    with pytest.raises(widehead.FileError, match="checkpoint"):
        small(resume=True, **good).fit(X, y)


def test_checkpoints_come_every_so_many_seconds(tmp_path):
    X, y = toy()
    path = tmp_path / "checkpoint"
    interrupted(path, X, y, 3, checkpoint_every=1e9)
    assert not path.exists()
    small(**{**fit_options(path), "checkpoint_every": 1e9}).fit(X, y)
    assert path.exists()  # at the end, always
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "dim"),
        ({"epochs": 1.5}, "epochs"),
        ({"batch_size": -1}, "batch_size"),
        ({"negatives": 0}, "negatives"),
        ({"lr": 0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"warmup": 2}, "warmup"),
        ({"schedule": "step"}, "schedule"),
        ({"head": "wide"}, "head"),
        ({"loss": "hinge"}, "loss"),
        ({"optimizer": "momentum"}, "optimizer"),
        ({"dtype": "int8"}, "dtype"),
        ({"scale": -1.0}, "scale"),
        ({"resume": True}, "checkpoint"),
        ({"n_classes": 3}, r"class \d+ at position \d+ is not in \[0, 3\)"),
        ({"transform": lambda X, epoch: X[:5]}, "transform: expected 600 examples back, got 5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_parameters_are_refused_by_name(options, message):
    with pytest.raises(widehead.Error, match=message):
        small(**options).fit(*toy())


@pytest.mark.parametrize(
    "X, Y, message",
    [
        (np.ones((3, 4)), [0, 1], "Y: expected as many rows as X, 3, got 2"),
        (np.ones((0, 4)), [], "X: expected at least one example"),
        (np.ones(4), [0], "X: expected two dimensions"),
        (["a", "b"], [0, 1], "features=NGramHasher"),
        (np.array([[1.0, np.nan]]), [0], "X: .*NaN"),
        (np.ones((2, 4)), [0.0, np.nan], "Y: .*NaN"),
        (np.ones((2, 4)), np.zeros((2, 2, 2)), "Y: expected"),
        (np.ones((2, 4)), [[0], [-1]], "-1"),
        (np.ones((2, 4)), [[0], [1, 1]], "class 1 is there twice in row 1"),
    ],
)
def test_bad_data_is_refused(X, Y, message):
    with pytest.raises(widehead.Error, match=message):
        small().fit(X, Y)


def test_a_transform_that_loses_strings_is_refused():
    with pytest.raises(widehead.ShapeError, match="transform: expected 36 examples back, got 35"):
        small(features=NGramHasher(64), transform=lambda strings, epoch: list(strings)[1:]).fit(NAMES, NAMES)


def test_weights_that_are_none():
    X, y = toy()
    for bad in (np.ones(5), -np.ones(600), np.full(600, np.inf)):
        with pytest.raises(widehead.Error, match="sample_weight"):
            small().fit(X, y, sample_weight=bad)
