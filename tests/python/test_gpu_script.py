"""test_gpu_script.py -- `make gpu` without a GPU: its deadline, its verdicts, the whole script on pretended tools."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu  # noqa: E402
import steps  # noqa: E402
from steps import FAILED, PASSED, SKIPPED, TIMEOUT, Finished, Outcome, Runner, Step  # noqa: E402


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def takes(clock, seconds, result=PASSED, seen=None):
    """A step that needs `seconds` of the clock, or its whole limit where that is less."""

    def run(_, limit):
        if seen is not None:
            seen.append(limit)
        clock.now += min(seconds, limit)
        return Outcome(result if seconds <= limit else TIMEOUT, "as pretended")

    return run


def results(runner):
    return {name: outcome.result for name, outcome, _ in runner.rows}


# The deadline


def test_what_is_kept_for_later_steps_stays_theirs(tmp_path):
    clock, seen = Clock(), []
    runner = Runner(tmp_path, 100.0, clock=clock)
    plan = [
        Step("build", takes(clock, 1000, seen=seen), limit=40, keep=40),
        Step("tests", takes(clock, 1000, seen=seen), limit=500, keep=5),
        Step("bench", takes(clock, 10, seen=seen), limit=80, keep=30),
    ]
    assert runner.run(plan) == 1
    assert seen == [40, 30, 30]
    assert results(runner) == {"build": TIMEOUT, "tests": TIMEOUT, "bench": PASSED}
    assert clock.now == 100 + 40 + 30 + 10


def test_seconds_saved_go_to_later_steps(tmp_path):
    clock, seen = Clock(), []
    plan = [Step("a", takes(clock, 5, seen=seen), limit=50), Step("b", takes(clock, 5, seen=seen), limit=90)]
    assert Runner(tmp_path, 100.0, clock=clock).run(plan) == 0
    assert seen == [50, 90]


def test_a_step_without_time_is_skipped_and_says_so(tmp_path, capsys):
    clock = Clock()
    runner = Runner(tmp_path, 30.0, clock=clock)
    runner.run([Step("a", takes(clock, 28), limit=30), Step("b", takes(clock, 1), limit=30, least=5)])
    assert results(runner) == {"a": PASSED, "b": SKIPPED}
    assert "no time left" in capsys.readouterr().out


def test_a_failure_stops_only_what_needs_it(tmp_path, capsys):
    clock = Clock()
    runner = Runner(tmp_path, 100.0, out=tmp_path / "out", clock=clock)

    def broken(*_):
        raise ValueError("a fault of the script")

    plan = [
        Step("build", takes(clock, 1, FAILED), limit=10),
        Step("bench", takes(clock, 1), limit=10, needs="build"),
        Step("broken", broken, limit=10),
        Step("last", takes(clock, 1), limit=10, needs="not chosen"),
    ]
    assert runner.run(plan) == 1
    assert results(runner) == {"build": FAILED, "bench": SKIPPED, "broken": FAILED, "last": PASSED}
    table = (tmp_path / "out" / "summary.txt").read_text()
    assert table.strip() == capsys.readouterr().out.split("\n\n")[-1].strip()
    assert "ValueError: a fault of the script" in table and "build did not pass" in table


def test_a_command_at_its_limit_is_ended_with_its_children(tmp_path):
    runner = Runner(tmp_path, 60.0, out=tmp_path / "out")
    done = runner.command(["sh", "-c", "sleep 600 & echo child $!; wait"], limit=0.5)
    assert (done.code, done.result) == (None, TIMEOUT)
    child = int(done.text.split()[-1])
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)
    assert f"child {child}" in (tmp_path / "out" / "gpu.log").read_text()
    assert f"child {child}" in (tmp_path / "log.log").read_text()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_may_say_how_far_it_came(tmp_path):
    code = "import time\ntry: print('up', flush=True); time.sleep(600)\nexcept KeyboardInterrupt: print('so far')"
    done = Runner(tmp_path, 60.0).command([sys.executable, "-c", code], limit=22, grace=20)
    assert done.code is None
    assert done.text.split() == ["up", "so", "far"]


def test_a_command_that_is_not_there_fails(tmp_path):
    done = Runner(tmp_path, 60.0).command(["/nonexistent/tool"], limit=5)
    assert done.result == FAILED and "/nonexistent/tool" in done.text


def test_clip_keeps_the_end():
    assert steps.clip("abc", 3) == "abc"
    assert steps.clip("abcdef", 3) == "[...]\ndef"


# The verdicts

ENDED = """\
[gw0] [  1%] PASSED tests/python/test_a.py::test_one[cuda]
[gw1] [  2%] FAILED tests/python/test_a.py::test_two[cuda-0.5]
tests/python/test_a.py::test_three PASSED                               [ 40%]
[gw1] [  3%] SKIPPED tests/python/test_a.py::test_four[cuda]
tests/python/test_a.py::test_five
"""
COMPLETE = """\
tests/python/test_a.py::test_one PASSED   [ 50%]
=================================== FAILURES ===================================
___________________________________ test_two ___________________________________
E   assert 1 == 2
=========================== short test summary info ============================
SKIPPED [3] tests/python/conftest.py:58: no CUDA device
SKIPPED [1] tests/python/test_demo.py:18: could not import 'anyascii': No module named 'anyascii'
SKIPPED [4] tests/python/test_b.py:5: no CUDA device
FAILED tests/python/test_a.py::test_two - assert 1 == 2
============ 1 failed, 312 passed, 8 skipped, 2 errors in 64.80s (0:01:04) =============
"""


def test_counts_of_a_complete_and_of_an_ended_run():
    assert gpu.tally(COMPLETE) == {"failed": 1, "passed": 312, "skipped": 8, "error": 2}
    assert gpu.tally(ENDED) == {"passed": 2, "failed": 1, "skipped": 1}
    assert gpu.tally("Segmentation fault") == {}


def test_verdict_of_a_failed_run_names_tests_and_skips():
    outcome = gpu.judge_pytest(Finished(1, 65.0, COMPLETE))
    assert outcome.result == FAILED
    assert outcome.detail == "312 passed, 1 failed, 2 error, 8 skipped"
    assert "E   assert 1 == 2" in outcome.shown
    assert "FAILED tests/python/test_a.py::test_two - assert 1 == 2" in outcome.shown
    assert "skipped 7: no CUDA device" in outcome.shown
    assert "skipped 1: could not import 'anyascii'" in outcome.shown


def test_verdict_where_nothing_was_tested():
    skipped = "SKIPPED [9] a.py:1: built without CUDA\n====== 9 skipped in 1.00s ======\n"
    outcome = gpu.judge_pytest(Finished(0, 1.0, skipped))
    assert (outcome.result, outcome.detail) == (FAILED, "9 skipped: nothing was tested")
    assert "built without CUDA" in outcome.shown
    assert gpu.judge_pytest(Finished(5, 1.0, "")).result == FAILED
    assert gpu.judge_pytest(Finished(0, 1.0, "==== 9 passed in 1.00s ====")).result == PASSED


def test_verdict_of_a_run_that_hung():
    outcome = gpu.judge_pytest(Finished(None, 100.0, ENDED))
    assert (outcome.result, outcome.detail) == (TIMEOUT, "2 passed, 1 failed, 1 skipped, then the time was up")


def test_long_failures_are_cut():
    names = "".join(f"FAILED tests/test_a.py::test_{i} - {'x' * 500}\n" for i in range(40))
    text = gpu.digest(f"====== FAILURES ======\n{'y' * 9000}\n====== short test summary info ======\n{names}")
    assert "... and 28 more" in text
    assert len(text) < 5000


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("100% tests passed, 0 tests failed out of 12", "12 of 12 passed"),
        ("75% tests passed, 3 tests failed out of 12", "9 of 12 passed"),
        ("92% tests passed, 1 test failed out of 12", "11 of 12 passed"),
        ("100% tests passed out of 15", "15 of 15 passed"),
        ("No tests were found!!!", "none"),
    ],
)
def test_ctest_total(line, want):
    assert gpu.ctest_total(line) == want


def test_compiler_errors_are_found():
    text = "ok\n[3/9] Building\na.cu(3): error: no such thing\nFAILED: a.o\nmore\n"
    assert gpu.errors_of(text) == "a.cu(3): error: no such thing\nFAILED: a.o"
    assert gpu.errors_of("nothing to see") == "nothing to see"


def test_benches_that_know_a_device_are_found():
    assert gpu.bench_scripts() == ["dense.py", "sparse.py"]  # which start dense_gpu.py and sparse_gpu.py


# The plan

MACHINE = gpu.Machine("python3", "/usr/local/cuda/bin/nvcc", "90-real", int(75e9))


def test_plan_fits_the_deadline_and_protects_the_bench():
    plan = gpu.plan(MACHINE)
    left = gpu.SECONDS
    for at, step in enumerate(plan):
        limit = steps.limit_of(plan, at, left)
        assert limit >= step.least, f"{step.name} gets nothing when all before it hang"
        if step.name == "bench":
            assert limit >= 150
        left -= limit
    assert left >= 0


def test_chosen_steps_share_the_time():
    plan = gpu.plan(MACHINE)
    assert [s.limit for s in gpu.chosen(plan, [], True, gpu.SECONDS)] == [s.limit for s in plan]
    (bench,) = gpu.chosen(plan, ["bench"], True, gpu.SECONDS)
    assert (bench.name, bench.limit) == ("bench", pytest.approx(gpu.SECONDS))
    assert [s.name for s in gpu.chosen(plan, ["bench"], False, gpu.SECONDS)] == ["build", "bench"]
    assert gpu.chosen(plan, [], True, 54.0)[0].limit == pytest.approx(15)
    with pytest.raises(SystemExit, match="no such step: nonsense; there are build, gpu-tests"):
        gpu.chosen(plan, ["nonsense"], True, gpu.SECONDS)


# The whole script

PYTHON = """#!/bin/sh
case "$*" in
  *get_device_capability*) echo '{probe}' ;;
  *"-m pytest"*"-m gpu"*) echo "[gw0] [ 10%] PASSED tests/python/test_a.py::test_a[cuda]"; exec sleep 600 ;;
  *"-m pytest"*) echo "==== 7 passed, 2 skipped in 0.10s ====" ;;
  *"bench/dense.py --device cuda"*) mkdir -p "$BENCH_OUT"; echo '{{}}' >"$BENCH_OUT/dense_gpu.json" ;;
  *bench/report.py*) echo "| a table |" ;;
  *) echo "/somewhere/widehead/__init__.py" ;;
esac
"""
PROBE = {
    "missing": ["anyascii", "pytest_timeout"],
    "torch": "2.11.0",
    "cuda": "13.0",
    "gpu": "Pretended GPU",
    "capability": [9, 0],
    "free": 75 * 10**9,
    "total": 80 * 10**9,
}


def pretend(folder: Path, probe: dict) -> dict[str, str]:
    """Tools that do nothing, in a folder that comes first on the path."""
    tools = {
        "python": PYTHON.format(probe=json.dumps(probe)),
        "nvcc": "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n",
        "nvidia-smi": "#!/bin/sh\necho 580.1\n",
        "cmake": "#!/bin/sh\n",
        "ctest": "#!/bin/sh\necho '100% tests passed, 0 tests failed out of 3'\n",
        "compute-sanitizer": "#!/bin/sh\necho '========= Error: Device not supported'; exit 1\n",
    }
    folder.mkdir()
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    ours = {"OUT", "BENCH_OUT", "GPU_SECONDS", "CUDA_ARCHITECTURES", "JOBS", "SANITIZE"}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return {**inherited, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def script(tmp_path, *words):
    return [sys.executable, ROOT / "scripts/gpu.py", "--python", tmp_path / "bin" / "python", *words]


def test_whole_script_when_the_gpu_tests_hang(tmp_path):
    env = pretend(tmp_path / "bin", PROBE) | {"OUT": str(tmp_path / "out"), "BENCH_OUT": str(tmp_path / "results")}
    words = script(tmp_path, "--seconds", "16", "--folder", tmp_path / "gpu")
    run = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Pretended GPU" in run.stdout and "nvcc 13.0 for 90-real" in run.stdout and "driver 580.1" in run.stdout
    assert "done without: pytest_timeout, anyascii" in run.stdout
    assert "| a table |" in run.stdout
    rows = {row.split()[0]: row for row in (tmp_path / "out" / "summary.txt").read_text().splitlines()}
    assert TIMEOUT in rows["gpu-tests"] and "1 passed, then the time was up" in rows["gpu-tests"]
    assert PASSED in rows["bench"] and "dense.py: done" in rows["bench"] and "sparse.py: done" in rows["bench"]
    assert SKIPPED in rows["sanitizer"] and "Device not supported" in rows["sanitizer"]
    assert SKIPPED in rows["headline"] and "75 GB free, 120 needed" in rows["headline"]
    assert "7 passed, 2 skipped" in rows["cpu-tests"]
    assert run.stdout.rstrip().endswith(rows["cpu-tests"])
    assert "PASSED tests/python/test_a.py::test_a[cuda]" in (tmp_path / "out" / "gpu.log").read_text()
    assert (tmp_path / "out" / "dense_gpu.json").exists()


def test_script_that_is_ended_leaves_the_table(tmp_path):
    env = pretend(tmp_path / "bin", PROBE)
    words = script(tmp_path, "--folder", tmp_path / "gpu", "build", "gpu-tests")
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("==> gpu-tests"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 1
    header, row = rest.strip().splitlines()
    assert header.split()[:2] == ["step", "result"] and row.split()[:2] == ["build", PASSED]


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({**PROBE, "gpu": None}, "gpu: no NVIDIA GPU that PyTorch 2.11.0 (CUDA 13.0) can use\n"),
        ({"missing": ["torch", "liger_kernel", "pytest"]}, "python lacks torch, pytest\n"),
    ],
)
def test_one_line_where_it_cannot_start(tmp_path, probe, message):
    env = pretend(tmp_path / "bin", probe)
    words = script(tmp_path, "--folder", tmp_path / "gpu")
    run = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.endswith(message) and run.stderr.count("\n") == 1
    assert run.stdout == ""
