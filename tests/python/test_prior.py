"""test_prior.py -- where a bce classifier starts: at the frequencies of the classes."""

import numpy as np
import pytest
import scipy.sparse

from widehead import Classifier, Labels
from widehead._training import Targets, log_odds


def test_log_odds_by_hand():
    want = [(c + 0.1) / 4.2 for c in (3, 0, 1)]
    want = [np.log(p / (1 - p)) for p in want]
    got = log_odds(Targets(np.array([0, 0, 2, 0]), 3))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    rows = Labels.from_lists([[0], [0, 2], [], [0]], 3)
    np.testing.assert_allclose(log_odds(Targets(rows, 3)), want, rtol=1e-6)
    always = log_odds(Targets(np.zeros(10**6, np.int64), 1))
    np.testing.assert_allclose(always, np.log(99), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_probabilities_are_the_frequencies(dtype):
    rng = np.random.default_rng(0)
    n, n_classes = 400, 30
    shares = np.linspace(0.02, 0.6, n_classes)
    y = scipy.sparse.csr_array((rng.random((n, n_classes)) < shares).astype(np.float32))
    x = scipy.sparse.csr_array(rng.random((n, 9)).astype(np.float32))
    still = {"loss": "bce", "dim": 8, "epochs": 1, "lr": 1e-12, "scale": 0.01, "optimizer": "sgd", "dtype": dtype}
    model = Classifier(**still).fit(x, y)
    np.testing.assert_allclose(model.predict_proba(x).mean(axis=0), y.mean(axis=0), atol=0.01)
    entropy = -(shares * np.log(shares) + (1 - shares) * np.log(1 - shares)).sum()
    assert abs(model.history_[0]["loss"] - entropy) < 0.05 * entropy  # with biases of 0 it would be n_classes log 2

    hinge = Classifier(**{**still, "loss": "squared_hinge"}).fit(x, y)
    np.testing.assert_allclose(hinge.head_.bias, 0, atol=1e-9)
    bare = Classifier(**still, head_options={"bias": False}).fit(x, y)
    assert bare.head_.bias is None
