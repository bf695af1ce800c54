"""Every code block of README.md does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line]


def test_blocks_are_found():
    assert len(PYTHON) >= 4
    assert len(SHELL) >= 6
    assert {language for language, _ in BLOCKS} == {"python", "bash", "cpp"}


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block_runs(code, tmp_path):
    if "torch" in code:
        pytest.importorskip("torch")
    if "Classifier" in code:
        pytest.importorskip("sklearn")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_cpp_block_is_the_consumers():
    (code,) = [code for language, code in BLOCKS if language == "cpp"]
    built = (ROOT / "tests/consumer/readme.cc").read_text(encoding="utf-8")  # the consumer builds and runs it
    assert code == built


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_make_targets_exist(line):
    target = line.split()[1]
    run = subprocess.run(["make", "-n", "-q", target], cwd=ROOT, capture_output=True, text=True)
    assert "No rule to make target" not in run.stderr, run.stderr


def test_commands_of_the_file_section_run(tmp_path):
    """train (twice), evaluate, predict and plan, word for word, on a small data set of the names that README uses."""
    sp = pytest.importorskip("scipy.sparse")
    np = pytest.importorskip("numpy")
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    for part, n in (("train", 400), ("test", 60)):
        labels = rng.integers(0, 30, n)
        one_hot = sp.csr_array((np.ones(n, np.float32), (np.arange(n), labels)), shape=(n, 30))
        sp.save_npz(tmp_path / f"X.{part}.npz", one_hot.tocsr())
        sp.save_npz(tmp_path / f"Y.{part}.npz", one_hot.tocsr())
    lines = [line for line in SHELL if line.startswith("widehead ")]
    assert [line.split()[1] for line in lines] == ["train", "train", "evaluate", "predict", "plan"]
    for line in lines:
        command = [sys.executable, "-m", "widehead.cli", *line.split()[1:]]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, (line, run.stderr)
    assert len((tmp_path / "top.tsv").read_text().splitlines()) >= 60
