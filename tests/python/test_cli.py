"""test_cli.py -- the command line: every command on tiny data, its output, its exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse

from widehead import cli, data
from widehead.commands import plan as plan_command
from widehead.commands import train as train_command
from widehead.data import recipes

N_CLASSES = 12
QUICK = ["--quiet", "--epochs", "8", "--dim", "16", "--batch-size", "8", "--threads", "1"]


def command(*words, stdin=None):
    """Runs `widehead` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "widehead.cli", *map(str, words)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def run(capsys):
    """Runs `widehead` in this process: (exit code, stdout, stderr)."""

    def call(*words):
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def toy(n=96, second=True):
    """Points whose features tell their labels: class c has features c and 12 + c; `second` adds a class after it."""
    first = np.arange(n) % N_CLASSES
    rows = np.repeat(np.arange(n), 2)
    x = scipy.sparse.csr_array((np.ones(2 * n), (rows, np.stack([first, 12 + first], 1).ravel())), shape=(n, 24))
    y = scipy.sparse.lil_array((n, N_CLASSES))
    for i, c in enumerate(first):
        y[i, c] = 1
        if second and i % 3 == 0:
            y[i, (c + 1) % N_CLASSES] = 1
    return x.astype(np.float32), y.tocsr().astype(np.float32)


@pytest.fixture
def files(tmp_path):
    x, y = toy()
    data.save_matrix(tmp_path / "X.npz", x)
    data.save_matrix(tmp_path / "Y.npz", y)
    data.save_xmc(tmp_path / "data.txt", x, y)
    names = [f"{'abcdefghijkl'[i % 12] * 4} {i}" for i in range(96)]
    data.save_text(tmp_path / "list.tsv", names, toy(second=False)[1])
    return tmp_path


@pytest.fixture
def model(files, run):
    code, _, err = run(
        "train", files / "X.npz", files / "Y.npz", "-o", files / "model.safetensors", *QUICK, "--loss", "bce"
    )
    assert code == 0, err
    return files / "model.safetensors"


# The frame


def test_help_is_quick_and_lists_every_command():
    script = "import sys, widehead.cli as c\ntry: c.main(['-h'])\nfinally: print(*sys.modules, file=sys.stderr)"
    got = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert got.returncode == 0
    for name, summary in cli.COMMANDS.items():
        assert name in got.stdout and summary in got.stdout
    for heavy in ("torch", "sklearn", "matplotlib", "pandas"):
        assert heavy not in got.stderr.split()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: widehead {name}" in capsys.readouterr().out


def test_version(capsys):
    from widehead import __version__

    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"widehead {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["train"],
        ["train", "x.npz"],
        ["train", "x.npz", "-o", "m", "--epochs", "0"],
        ["train", "x.npz", "-o", "m", "--validation", "1.5"],
        ["train", "x.npz", "-o", "m", "--loss", "mse"],
        ["train", "x.npz", "-o", "m", "--validation", "0.1", "--test", "t"],
        ["plan"],
        ["plan", "--classes", "many"],
        ["plan", "--classes", "10", "--memory", "lots"],
        ["predict", "m", "x", "-k", "0"],
        ["data"],
        ["data", "convert", "x"],
        ["data", "fetch", "nothing"],
    ],
)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: widehead" in capsys.readouterr().err


def test_errors_are_one_line_and_exit_with_1(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("2 3 2\n1 0:1\n5 0:1\n")
    got = command("train", bad, "-o", tmp_path / "m", "--quiet")
    assert got.returncode == 1
    assert got.stderr == f"widehead train: {bad}:3: label 5 is outside 0..1\n"
    assert got.stdout == ""
    got = command("train", bad, "-o", tmp_path / "m", "--quiet", "--debug")
    assert got.returncode == 1
    assert "Traceback" in got.stderr and got.stderr.endswith(f"{bad}:3: label 5 is outside 0..1\n")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["evaluate", "none.safetensors", "data.txt"], "none.safetensors"),
        (["evaluate", "data.txt", "data.txt"], "data.txt"),
        (["train", "noneX.npz", "-o", "m"], "noneX.npz: No such file or directory"),
        (["train", "data.txt", "X.npz", "Y.npz", "-o", "m"], "expected a data file, or a pair of .npz files, got 3"),
        (["train", "data.txt", "-o", "m", "--validation", "96"], "--validation: 96 of 96 points leave none"),
        (
            ["train", "data.txt", "-o", "m", "--test", "list.tsv"],
            "expected data with features, as the model was trained on, got texts",
        ),
        (["data", "convert", "data.txt", "--to", "X.npz"], "expected a text file to write, or X.npz and Y.npz"),
        (["data", "convert", "list.tsv", "--to", "A.npz", "B.npz"], "texts have no feature matrix"),
        (["data", "stats", "."], "Is a directory"),
        (["plan", "--classes", "1M", "--device", "cpu", "--dim", "1G", "--batch-size", "1G"], None),
    ],
)
def test_more_errors(files, monkeypatch, run, words, match):
    monkeypatch.chdir(files)
    if match is None:
        monkeypatch.setattr(plan_command, "machine", lambda device: (_ for _ in ()).throw(MemoryError("for this")))
        match = "not enough memory for this"
    code, out, err = run(*words, "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith(f"widehead {words[0]}: ") and err.count("\n") == 1
    assert match in err
    assert not (files / "m").exists()


# train, evaluate, predict


def test_train_evaluate_predict_in_processes(files):
    path = files / "model.safetensors"
    got = command("train", files / "data.txt", "-o", path, *QUICK, "--loss", "squared_hinge", "--validation", "24")
    assert got.returncode == 0, got.stderr
    assert "Quality on 24 points" in got.stdout and "peak memory" in got.stdout
    for metric in ("P", "nDCG", "PSP", "hit", "recall", "coverage"):
        assert metric in got.stdout
    assert sorted(p.name for p in files.iterdir() if "checkpoint" in p.name) == []

    got = command("evaluate", path, files / "data.txt", "--quiet", "--train-labels", files / "Y.npz")
    assert got.returncode == 0, got.stderr
    assert "Quality on 96 points" in got.stdout and "PSnDCG" in got.stdout

    got = command("predict", path, files / "X.npz", "-k", "2", "--quiet")
    assert got.returncode == 0, got.stderr
    lines = got.stdout.splitlines()
    assert len(lines) == 96
    best = [int(line.split("\t")[0].split(":")[0]) for line in lines]
    assert np.mean(np.array(best) == np.arange(96) % N_CLASSES) > 0.6


def test_train_reports_json(files, run):
    code, out, _ = run("train", files / "X.npz", files / "Y.npz", "-o", files / "m", *QUICK, "--json", "--ks", "1", "2")
    got = json.loads(out)
    assert code == 0
    assert got["train"]["points"] == 86 and got["test_points"] == 10
    assert set(got["metrics"]) == {
        f"{n}@{k}" for n in ("P", "nDCG", "PSP", "PSnDCG", "hit", "recall", "coverage") for k in (1, 2)
    }
    assert len(got["epochs"]) == got["parameters"]["epochs"] == 8
    assert got["epochs"][-1]["loss"] < got["epochs"][0]["loss"]
    assert 0 <= got["epochs"][0]["P@1"] <= 1
    assert got["parameters"]["loss"] == "bce"
    assert got["peak_bytes"] > 2**24 and got["model_bytes"] == (files / "m").stat().st_size
    assert got["train_seconds"] > 0 and got["train_cpu_seconds"] > 0


def test_evaluate_measures_the_model(files, model, run):
    code, out, _ = run("evaluate", model, files / "X.npz", files / "Y.npz", "--json", "--quiet")
    got = json.loads(out)
    assert (code, got["points"]) == (0, 96)
    assert got["metrics"]["P@1"] > 0.9
    assert not any(name.startswith("PS") for name in got["metrics"])
    assert got["metrics"]["recall@5"] > got["metrics"]["recall@1"]
    code, again, _ = run(
        *("evaluate", model, files / "data.txt", "--json", "--quiet", "--train-labels", files / "data.txt")
    )
    metrics = json.loads(again)["metrics"]
    assert metrics["P@3"] == got["metrics"]["P@3"] and metrics["PSP@1"] > 0.9
    code, _, err = run("evaluate", model, files / "list.tsv", "--quiet")
    assert code == 1 and "widehead evaluate: expected data with features" in err


def test_evaluate_wants_the_sizes_of_the_model(files, model, run):
    data.save_matrix(files / "Y.npz", scipy.sparse.eye_array(96, 13))
    code, _, err = run("evaluate", model, files / "X.npz", files / "Y.npz", "--quiet")
    assert code == 1 and "13 labels, expected 12" in err
    code, _, err = run("evaluate", model, files / "data.txt", "--quiet", "--train-labels", files / "Y.npz")
    assert code == 1 and "Y.npz: 13 labels, but the model has 12" in err


def test_predict_writes_what_is_asked_for(files, model, run):
    _, plain, _ = run("predict", model, files / "X.npz", "--quiet", "-k", "3")
    _, xmc, _ = run("predict", model, files / "data.txt", "--quiet", "-k", "3")
    assert plain == xmc
    _, as_json, _ = run("predict", model, files / "X.npz", "--quiet", "-k", "3", "--json")
    first = json.loads(as_json.splitlines()[5])
    assert [f"{c}:{s:.4f}" for c, s in zip(first["classes"], first["scores"], strict=True)] == plain.splitlines()[
        5
    ].split("\t")
    assert first["scores"] == sorted(first["scores"], reverse=True)

    (files / "names").write_text("".join(f"name {c}\tmore\n" for c in range(N_CLASSES)))
    code, _, _ = run("predict", model, files / "X.npz", "--quiet", "--names", files / "names", "-o", files / "out.tsv")
    assert code == 0
    assert (files / "out.tsv").read_text().splitlines()[5].startswith(f"name {first['classes'][0]}:")

    run("predict", model, files / "X.npz", "--quiet", "-k", "3", "-o", files / "out.npz")
    matrix = data.load_matrix(files / "out.npz")
    assert matrix.shape == (96, N_CLASSES) and matrix.nnz == 3 * 96
    assert int(matrix[[5]].toarray().argmax()) == first["classes"][0]


def test_predict_refuses(files, model, run):
    (files / "names").write_text("one\n")
    code, _, err = run("predict", model, files / "X.npz", "--names", files / "names")
    assert code == 1 and "names: 1 names, but the model has 12 classes" in err
    data.save_matrix(files / "X.npz", scipy.sparse.eye_array(3, 5))
    code, _, err = run("predict", model, files / "X.npz")
    assert code == 1 and "X.npz: 5 features, but the model has 24" in err


def test_texts(files):
    path = files / "text.safetensors"
    got = command("train", files / "list.tsv", "-o", path, *QUICK, "--hash-bits", "12", "--validation", "0", "--json")
    assert got.returncode == 0, got.stderr
    assert json.loads(got.stdout)["metrics"] == {}
    got = command("predict", path, "-k", "1", stdin="cccc 99\nllll x\n")
    assert got.returncode == 0, got.stderr
    assert [line.split(":")[0] for line in got.stdout.splitlines()] == ["2", "11"]
    (files / "queries").write_text("cccc\n")
    assert command("predict", path, files / "queries", "-k", "1").stdout.startswith("2:")
    labelled = command("predict", path, files / "list.tsv", "--format", "text", "--quiet")
    assert len(labelled.stdout.splitlines()) == 96
    got = command("evaluate", path, files / "list.tsv", "--json", "--quiet")
    assert json.loads(got.stdout)["metrics"]["P@1"] > 0.9


def test_a_run_that_was_cut_short_goes_on(files, run, monkeypatch):
    words = ["train", files / "data.txt", *QUICK, "--checkpoint-every", "0.000001", "--seed", "5"]
    assert run(*words, "-o", files / "whole")[0] == 0

    def interrupt(watcher, model, epoch, loss):
        if epoch == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_command._Watcher, "__call__", interrupt)
        code, _, err = run(*words, "-o", files / "parts")
    assert (code, err) == (cli.EXIT_INTERRUPTED, "widehead: interrupted\n")
    assert (files / "parts.checkpoint").exists() and not (files / "parts").exists()
    code, out, _ = run(*words, "-o", files / "parts", "--resume", "--json")
    assert code == 0
    assert len(json.loads(out)["epochs"]) < 8
    assert (files / "parts").read_bytes() == (files / "whole").read_bytes()
    assert not (files / "parts.checkpoint").exists()


def test_plot(files, run):
    pytest.importorskip("matplotlib")
    code, _, _ = run("train", files / "data.txt", "-o", files / "m", *QUICK, "--plot", files / "loss.png")
    assert code == 0
    assert (files / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_fails_before_the_work(files, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("train", files / "data.txt", "-o", files / "m", *QUICK, "--plot", files / "loss.png")
    assert code == 1 and "--plot needs matplotlib" in err
    assert not (files / "m").exists()


@pytest.mark.parametrize(("points", "want"), [(1, 32), (4880, 32), (44816, 128), (10**6, 512), (10**9, 512)])
def test_batch_size_by_number_of_points(points, want):
    assert train_command._batch_size(points) in (want, want // 2)
    assert 32 <= train_command._batch_size(points) <= 512


# plan


def test_plan_in_a_process():
    got = command("plan", "--classes", "1M", "--dim", "64", "--examples", "1M")
    assert got.returncode == 0, got.stderr
    for text in (
        "D = 1,000,000",
        "nn.Linear",
        "DenseHead",
        "sampled_softmax",
        "2 x 2 B D d",
        "measured now",
        "an epoch",
    ):
        assert text in got.stdout
    assert "Take DenseHead" in got.stdout


def test_plan_json(run):
    code, out, _ = run(
        "plan", "-D", "250k", "-d", "32", "--device", "h100", "--loss", "bce", "--optimizer", "adam", "--json"
    )
    got = json.loads(out)
    assert code == 0
    assert got["job"]["n_classes"] == 250_000 and got["job"]["optimizer"] == "adam"
    assert [p["head"] for p in got["plans"]] == ["nn.Linear", "DenseHead", "SparseHead", "ExactHead"]
    assert got["machine"]["measured"] is False
    assert got["recommendation"]["head"] == "DenseHead" and got["recommendation"]["loss"] == "bce"


def test_plan_where_nothing_fits(run):
    huge = ("plan", "-D", "100M", "-d", "1024", "--device", "a100", "--brief", "--memory")
    code, out, _ = run(*huge, "24G")
    assert code == 0 and "Take SparseHead with squared_hinge" in out and "another" in out
    code, out, _ = run(*huge, "8G")
    assert code == 0
    assert "Nothing to take" in out and "not measured" in out and "2 x 2 B D d" not in out


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (plan_command._bytes, "24G", 24 * 2**30),
        (plan_command._bytes, "512MiB", 2**29),
        (plan_command._bytes, "1000", 1000),
        (plan_command._whole, "1.5k", 1500),
        (plan_command._whole, "3M", 3_000_000),
        (plan_command._whole, "17", 17),
    ],
)
def test_numbers_with_units(parse, text, value):
    assert parse(text) == value


# data


def test_data_in_a_process(files):
    got = command("data", "stats", files / "data.txt", "--quiet")
    assert got.returncode == 0, got.stderr
    assert "points" in got.stdout and "96" in got.stdout and "labels per point" in got.stdout


def test_data_convert_there_and_back(files, run):
    assert run("data", "convert", files / "data.txt", "--to", files / "A.npz", files / "B.npz", "--quiet") == (
        0,
        "",
        "",
    )
    code, out, _ = run("data", "convert", files / "A.npz", files / "B.npz", "--to", files / "back.txt.xz", "--json")
    assert code == 0 and json.loads(out)["points"] == 96
    first, last = data.load(files / "data.txt"), data.load(files / "back.txt.xz")
    assert (first.features != last.features).nnz == 0 and (first.labels != last.labels).nnz == 0
    run("data", "convert", files / "list.tsv", "--to", files / "list.tsv.gz", "--quiet")
    assert data.load(files / "list.tsv.gz").texts == data.load(files / "list.tsv").texts


def test_data_split(files, run):
    code, _, err = run(
        *("data", "split", files / "data.txt", "--share", "0.25", "--seed", "3"),
        *("--train", files / "a.txt", "--test", files / "TX.npz", files / "TY.npz"),
    )
    assert code == 0 and "wrote" in err
    assert len(data.load(files / "a.txt")) == 72
    assert len(data.load(files / "TX.npz", files / "TY.npz")) == 24


def test_data_stats_json(files, run):
    got = json.loads(run("data", "stats", files / "list.tsv", "--json", "--quiet")[1])
    assert got["points"] == 96 and got["labels"] == 12 and got["labels per point"] == 1
    assert "features" not in got


def test_data_fetch_lists_the_recipes(run):
    code, out, _ = run("data", "fetch")
    assert code == 0
    assert all(name in out for name in recipes.RECIPES)
    assert json.loads(run("data", "fetch", "--json")[1]).keys() == recipes.RECIPES.keys()


DUMP = """Package: {name}
Section: {section}
Depends: {depends}
Description: a thing for {section}
 that goes on with {word} words

"""


def fake_packages(n):
    sections = ("graphics", "sound", "text")
    return "".join(
        DUMP.format(
            name=f"package{i}",
            section=sections[i % 3],
            depends=f"lib{sections[i % 3]} (>= 1.2), libc6 | libc7, package{(i * 7) % n}:any",
            word=("alpha", "beta")[i % 2],
        )
        for i in range(n)
    )


def test_fetch_debian(tmp_path, run, monkeypatch):
    monkeypatch.setattr(recipes, "_apt_cache", lambda: fake_packages(50) + "Package: loner\nDescription: no one\n")
    code, _, err = run("data", "fetch", "debian", "-o", tmp_path / "out")
    assert code == 0, err
    train, test = data.load(tmp_path / "out" / "X.train.npz"), data.load(tmp_path / "out" / "X.test.npz")
    names = (tmp_path / "out" / "labels.txt").read_text().split()
    assert len(train) == 40 and 0 < len(test) <= 10
    assert train.n_labels == test.n_labels == len(names) and train.n_features == test.n_features
    assert {"libgraphics", "libsound", "libtext", "libc6"} <= set(names) and "libc7" not in names
    np.testing.assert_allclose(np.sqrt(train.features.multiply(train.features).sum(axis=1)), 1, rtol=1e-5)
    counts = dict(zip(names, train.labels.sum(axis=0).tolist(), strict=True))
    assert counts["libc6"] == 40


def test_fetch_debian_elsewhere(tmp_path, run, monkeypatch):
    monkeypatch.setattr(recipes, "_apt_cache", lambda: fake_packages(3))
    code, _, err = run("data", "fetch", "debian", "-o", tmp_path / "out")
    assert code == 1 and "fewer than 10 packages" in err
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("data", "fetch", "debian", "-o", tmp_path / "out")
    assert code == 1 and "this data set needs Debian or Ubuntu" in err


def test_fetch_places(tmp_path, run, monkeypatch):
    places = pytest.importorskip("widehead.demo.places")
    cities = {
        str(i): {
            "name": f"Town {i}",
            "alternatenames": [f"Old Town {i}", f"Stadt {i}"],
            "countrycode": "XX",
            "admin1code": "01",
            "population": 1000 - i,
            "latitude": 0.0,
            "longitude": 0.0,
        }
        for i in range(40)
    }
    countries = {"XX": {"iso": "XX", "iso3": "XXX", "name": "Nowhere"}}
    monkeypatch.setattr(places, "from_package", lambda: places.build(cities, countries, share=0.2))
    code, _, err = run("data", "fetch", "places", "-o", tmp_path / "out")
    assert code == 0, err
    train, test = data.load(tmp_path / "out" / "train.tsv.gz"), data.load(tmp_path / "out" / "test.tsv.gz", n_labels=40)
    assert len(train) + len(test) == 120 and len(test) == 16
    assert train.n_labels == 40
    assert (tmp_path / "out" / "places.tsv").read_text().startswith("Town 0\tXX\nTown 1\tXX\n")
