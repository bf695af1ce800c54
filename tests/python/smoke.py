"""tests/python/smoke.py -- does the package work in an environment that has the wheel and nothing else? Run by CI."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import widehead
from widehead.numpy import DenseHead


def train(steps: int = 40) -> DenseHead:
    """A head that learns 50 examples by heart; ends the program where it does not."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((50, 24), dtype=np.float32)
    target = rng.integers(0, 1000, 50)
    head = DenseHead(24, 1000, seed=1)
    losses = [head.step(hidden, target, lr=4.0).loss for _ in range(steps)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] / 4, losses
    assert (head.topk(hidden, k=3).classes[:, 0] == target).mean() > 0.9
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.safetensors"
        head.save(path)
        again = DenseHead.load(path)
    np.testing.assert_array_equal(again.predict(hidden), head.predict(hidden))
    try:
        head.step(hidden, np.full(50, 1000), lr=1.0)
    except widehead.LabelError as error:
        print("refused:", error)
    else:
        raise AssertionError("a label out of range was taken")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    return head


def main() -> None:
    where = Path(widehead.__file__)
    assert Path(sys.prefix) in where.parents, f"{where} is not the installed package"
    for optional in ("torch", "sklearn", "matplotlib"):
        assert importlib.util.find_spec(optional) is None, f"{optional} is here: this environment proves nothing"
    print(f"widehead {widehead.__version__}, {widehead.current_isa()}, {widehead.get_num_threads()} threads")
    train()
    # The command is there, and its help needs no package that is missing.
    command = Path(sys.prefix) / "bin" / "widehead"
    text = subprocess.run([command, "--help"], check=True, capture_output=True, text=True).stdout
    assert "demo" in text and "train" in text, text
    files = sorted(p.name for p in where.parent.parent.iterdir())
    assert "include" not in files and "lib" not in files, "the wheel holds the C++ library"
    print("the wheel works")


if __name__ == "__main__":
    main()
