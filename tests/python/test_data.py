"""test_data.py -- readers and writers: round trips, errors with file and line, noise, fast against slow."""

import bz2
import gzip
import io
import lzma

import numpy as np
import pytest
import scipy.sparse

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from widehead import data
from widehead._core import Error
from widehead.data import files, xmc

SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

XMC = b"""3 5 4
1,3 0:1 4:0.25
 2:-1.5e-3
0\x20
"""


def write(tmp_path, content, name="data.txt"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def dense(matrix):
    return matrix.toarray().tolist()


def random_matrix(draw, n, width, values):
    entries = draw(st.dictionaries(st.tuples(st.integers(0, n - 1), st.integers(0, width - 1)), values, max_size=25))
    rows, columns = [r for r, _ in entries], [c for _, c in entries]
    return scipy.sparse.csr_array((np.array(list(entries.values()), np.float32), (rows, columns)), shape=(n, width))


@st.composite
def pairs(draw):
    n = draw(st.integers(1, 6))
    finite = st.floats(allow_nan=False, allow_infinity=False, width=32).filter(bool)
    x = random_matrix(draw, n, draw(st.integers(1, 9)), finite)
    return x, random_matrix(draw, n, draw(st.integers(1, 300)), st.just(1.0))


# What is read


def test_xmc_by_hand(tmp_path):
    got = data.load_xmc(write(tmp_path, XMC))
    assert dense(got.features) == [[1, 0, 0, 0, 0.25], [0, 0, np.float32(-1.5e-3), 0, 0], [0] * 5]
    assert dense(got.labels) == [[0, 1, 0, 1], [0] * 4, [1, 0, 0, 0]]
    assert got.features.dtype == got.labels.dtype == np.float32
    assert (len(got), got.n_features, got.n_labels) == (3, 5, 4)


@pytest.mark.parametrize(
    ("text", "features", "labels"),
    [
        (b"2 3 2\n1 0:1\n0 2:3", [[1, 0, 0], [0, 0, 3]], [[0, 1], [1, 0]]),  # no newline at the end
        (b"2 3 2\r\n1 0:1\r\n\r\n", [[1, 0, 0], [0, 0, 0]], [[0, 1], [0, 0]]),  # an empty line is an empty point
        (b"1 3 2\n1,0,1   2:+3.\t0:.5 \n\n \n", [[0.5, 0, 3]], [[1, 1]]),  # order, repetition, blanks, trailing lines
        (b"\xef\xbb\xbf1 2 2\n1:1\n", [[0, 1]], [[0, 0]]),  # byte order mark; a point that starts with a feature
        (b"# a comment\n0 1:2\n2,1 0:1\n\n", [[0, 2], [1, 0]], [[1, 0, 0], [0, 1, 1]]),  # no header
        (b"2 1 1\n\n\n", [[0], [0]], [[0], [0]]),
    ],
)
def test_xmc_variants(tmp_path, text, features, labels):
    got = data.load_xmc(write(tmp_path, text))
    assert dense(got.features) == features
    assert dense(got.labels) == labels


def test_sizes_of_a_file_without_header(tmp_path):
    path = write(tmp_path, b"0 1:2\n")
    got = data.load(path, n_features=7, n_labels=3)
    assert (got.n_features, got.n_labels) == (7, 3)
    with pytest.raises(data.DataError, match=r":1: feature 1 is outside 0\.\.0"):
        data.load(path, n_features=1)
    with pytest.raises(data.DataError, match="the header announces 5 features, expected 6"):
        data.load(write(tmp_path, XMC), n_features=6)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress], ids=["gz", "xz", "bz2"])
def test_compressed_by_content_not_by_name(tmp_path, pack):
    got = data.load(write(tmp_path, pack(XMC), "plainly.named"), progress=True)
    assert dense(got.labels)[0] == [0, 1, 0, 1]
    with pytest.raises(data.DataError, match=r"data\.txt: damaged or cut short"):
        data.load_xmc(write(tmp_path, pack(XMC * 50)[:-9]))


@SETTINGS
@given(pair=pairs(), suffix=st.sampled_from(["", ".gz", ".xz", ".bz2"]), block=st.sampled_from([1, 7, 1 << 20]))
def test_xmc_round_trip(tmp_path, pair, suffix, block):
    path = tmp_path / ("data.txt" + suffix)
    data.save_xmc(path, *pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block)
        got = data.load(path)
    for back, there in zip((got.features, got.labels), pair, strict=True):
        assert back.shape == there.shape
        np.testing.assert_array_equal(back.toarray(), there.toarray())
        assert back.has_canonical_format


@SETTINGS
@given(pair=pairs())
def test_npz_round_trip(tmp_path, pair):
    data.save_matrix(tmp_path / "X.a.npz", pair[0])
    data.save_matrix(tmp_path / "Y.a.npz", pair[1])
    for got in (data.load(tmp_path / "X.a.npz"), data.load(tmp_path / "X.a.npz", tmp_path / "Y.a.npz")):
        np.testing.assert_array_equal(got.features.toarray(), pair[0].toarray())
        np.testing.assert_array_equal(got.labels.toarray(), pair[1].toarray())


@SETTINGS
@given(
    points=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1).filter(str.strip),
            st.sets(st.integers(0, 99), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=6,
    ).filter(lambda points: not points[0][0].startswith(("\ufeff", "#"))),
    block=st.sampled_from([1, 11, 1 << 20]),
)
def test_text_round_trip(tmp_path, points, block):
    labels = scipy.sparse.lil_array((len(points), 100))
    for i, (_, own) in enumerate(points):
        labels[i, sorted(own)] = 1
    data.save_text(tmp_path / "list.tsv", [text for text, _ in points], labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block)
        got = data.load_text(tmp_path / "list.tsv", n_labels=100)
    assert got.texts == [text for text, _ in points]
    np.testing.assert_array_equal(got.labels.toarray(), labels.toarray())


def test_text_by_hand(tmp_path):
    got = data.load(write(tmp_path, "Köln\t3\r\na\tb\t1,0,1\n\n\n".encode()))
    assert got.texts == ["Köln", "a\tb"]
    assert got.features is None and got.n_features is None
    assert dense(got.labels) == [[0, 0, 0, 1], [1, 1, 0, 0]]


def test_lists_by_hand(tmp_path):
    path = write(tmp_path, b"2 5 3 5\n\n0 1\n1\n2 0\n")
    want = [[0, 1, 0, 0, 0, 0], [0] * 6, [1, 0, 0, 1, 0, 1]]
    assert dense(data.load_lists(path)) == want
    got = data.load(path)
    assert dense(got.labels) == want
    assert dense(got.features) == np.eye(3).tolist()
    assert data.load_lists(path, n_rows=9, n_items=8).shape == (9, 8)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (XMC, "xmc"),
        (b"3 1:2 5:1\n", "xmc"),
        (b" 1:2\n", "xmc"),
        (b"# note\n0,1 1:2\n", "xmc"),
        (b"5 3 2\n1,2 0:1\n", "xmc"),
        (b"paris\t3,4\n", "text"),
        (b"12 monkeys 4:20\t3\n", "text"),
        (b"0 1 2\n1 5 6 7\n", "lists"),
        (b"0 1 2 3\n", "lists"),
    ],
)
def test_detect_format(tmp_path, text, want):
    assert data.detect_format(write(tmp_path, text)) == want


# What is refused

BAD_XMC = [
    (b"", "the file is empty"),
    (b"# only a comment\n", "no points"),
    (b"0 3 2\n", "no points"),
    (b"2 3 2\n1 0:1\n", ":2: too few lines: the header announces 2 points, the file ends after 1"),
    (b"1 3 2\n1 0:1\n\n0 1:1\n", ":4: more points than the 1 of the header"),
    (b"1 3 2\n2 0:1\n", r":2: label 2 is outside 0\.\.1"),
    (b"1 3 2\n1 3:1\n", r":2: feature 3 is outside 0\.\.2"),
    (b"1 3 2\n1 99999999999999999999:1\n", r":2: feature 99999999999999999999 is outside 0\.\.2"),
    (b"1 3 2\n1,,0 0:1\n", ":2: empty label"),
    (b"1 3 2\n1, 0:1\n", ":2: empty label"),
    (b"1 3 2\n1 :1\n", ":2: empty feature"),
    (b"1 3 2\n-1 0:1\n", ":2: label '-1' is not a whole number"),
    (b"1 3 2\n1.0 0:1\n", ":2: label '1.0' is not a whole number"),
    (b"1 3 2\nx 0:1\n", ":2: label 'x' is not a whole number"),
    (b"1 3 2\n1 0.0:1\n", ":2: feature '0.0' is not a whole number"),
    (b"2 3 2\n0 0:1\n1 0:1 2:nan\n", ":3: value of feature 2 is nan; values have to be finite"),
    (b"1 3 2\n1 2:-inf\n", ":2: value of feature 2 is -inf"),
    (b"1 3 2\n1 2:1e39\n", ":2: value '1e39' of feature 2 is too large for float32"),
    (b"1 3 2\n1 2:1x\n", ":2: value '1x' of feature 2 is not a number"),
    (b"1 3 2\n1 2:1-2\n", ":2: value '1-2' of feature 2 is not a number"),
    (b"1 3 2\n1 2:0x10\n", ":2: value '0x10' of feature 2 is not a number"),
    (b"1 3 2\n1 2:\n", ":2: value '' of feature 2 is not a number"),
    (b"1 3 2\n1 2:1:1\n", ":2: expected feature:value, got '2:1:1'"),
    (b"1 3 2\n1 2\n", ":2: expected feature:value, got '2'"),
    (b"1 3 2\n 1,0 2:1\n", ":2: expected feature:value, got '1,0'"),
    (b"1 3 2\n1 2 :1\n", ":2: expected feature:value, got '2'"),
    (b"1 3 2\n1 2:1 0:1 2:1\n", ":2: feature 2 stands twice in the line"),
    (b"1 3 3000000000\n1 2:1\n", ":1: the header's 3000000000 is above the limit of 2147483647"),
    (b"0 1:1\n\n1 1:1\n", ":2: an empty line between points"),
    (b"0 2147483647:1\n", r":1: feature 2147483647 is outside 0\.\.2147483646"),
]


@pytest.mark.parametrize(("text", "match"), BAD_XMC)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_bad_xmc(tmp_path, monkeypatch, text, match, block):
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    with pytest.raises(data.DataError, match=match) as caught:
        data.load_xmc(write(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "data.txt") + ":")
    assert isinstance(caught.value, Error) and isinstance(caught.value, ValueError)


def test_line_numbers_far_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 4096)
    lines = [b"%d %d:%d" % (i % 7, i % 5, i) for i in range(5000)]
    lines[4321] = b"8 1:1"
    with pytest.raises(data.DataError, match=r":4323: label 8 is outside 0\.\.6"):
        data.load_xmc(write(tmp_path, b"5000 5 7\n" + b"\n".join(lines)))
    lines[4321] = b"6 1:1"
    assert len(data.load_xmc(write(tmp_path, b"5000 5 7\n" + b"\n".join(lines)))) == 5000


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "no points"),
        (b"\n\n", "no points"),
        (b"a\t1\nb 2\n", ":2: expected text<TAB>label,label, got no tab in 'b 2'"),
        (b"a\t1\nb\t\n", ":2: empty label"),
        (b"a\t1,\n", ":1: empty label"),
        (b"a\t,1\n", ":1: empty label"),
        (b"a\t1\n \t2\n", ":2: empty text"),
        (b"a\t1\nb\tx1\n", ":2: label 'x1' is not a whole number"),
        (b"a\t1\nb\t1.5\n", ":2: label '1.5' is not a whole number"),
        ("a\t1\nb\t²\n".encode(), ":2: label '²' is not a whole number"),
        (b"a\t1\nb\t9999999999999999999\n", ":2: label 9999999999999999999 is outside"),
        (b"a\t1\n\nb\t1\n", ":2: an empty line between points"),
        (b"a\t1\nb\xff\t1\n", ":2: not UTF-8: byte 0xff"),
        (b"a\t1\nb\t1\r2\n", r":2: label '1\\r2' is not a whole number"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_bad_text(tmp_path, monkeypatch, text, match, block):
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    with pytest.raises(data.DataError, match=match):
        data.load_text(write(tmp_path, text))
    with pytest.raises(data.DataError, match=r"label 1 is outside 0\.\.0"):
        data.load_text(write(tmp_path, b"a\t1\n"), n_labels=1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "no points"),
        (b"3\n", "no points"),
        (b"0 1\n1 x\n", ":2: item 'x' is not a whole number"),
        (b"0 1\n-1 2\n", ":2: row '-1' is not a whole number"),
        (b"0 1\n1 2147483647\n", r":2: item 2147483647 is outside 0\.\.2147483646"),
        (b"0\x0b1\n", ":1: a control character"),
        (b"0 1\n2000000000 1\n", "row number 2000000000 in a file of 2 lines"),
    ],
)
def test_bad_lists(tmp_path, text, match):
    with pytest.raises(data.DataError, match=match):
        data.load_lists(write(tmp_path, text))


def npz_bytes(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def csr_parts(data_=(1.0, 2.0), indices=(0, 1), indptr=(0, 1, 2), shape=(2, 3), format=b"csr"):
    return {"data": data_, "indices": indices, "indptr": indptr, "shape": shape, "format": format}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not a sparse matrix saved by scipy"),
        (b"no zip file", "not a sparse matrix saved by scipy"),
        (npz_bytes(a=[1]), "not a sparse matrix saved by scipy"),
        (npz_bytes(**csr_parts(indices=(0, 3))), "not a sparse matrix saved by scipy"),
        (npz_bytes(**csr_parts(indices=(-1, 0))), "not a sparse matrix saved by scipy"),
        (npz_bytes(**csr_parts(indptr=(0, 2, 1))), "not a sparse matrix saved by scipy"),
        (npz_bytes(**csr_parts(data_=(1, 2j))), "entries of type complex128 are not supported"),
        (npz_bytes(**csr_parts(data_=(1, np.nan))), "row 1, column 1: value is NaN"),
        (npz_bytes(**csr_parts(data_=(1e300, 1))), "row 0, column 0: value is NaN, infinite or too large for float32"),
        (npz_bytes(**csr_parts(shape=(2, 3), format=b"bsr")), "not a sparse matrix saved by scipy"),
    ],
)
def test_bad_npz(tmp_path, content, match):
    with pytest.raises(data.DataError, match=match):
        data.load_matrix(write(tmp_path, content, "X.npz"))


def test_bad_pairs(tmp_path):
    x, y = tmp_path / "X.npz", tmp_path / "Y.npz"
    data.save_matrix(x, scipy.sparse.eye_array(3))
    with pytest.raises(FileNotFoundError):
        data.load(x)
    data.save_matrix(y, scipy.sparse.eye_array(2))
    with pytest.raises(data.DataError, match=r"Y\.npz: 2 rows of labels, but 3 rows of features"):
        data.load(x)
    data.save_matrix(y, -scipy.sparse.eye_array(3))
    with pytest.raises(data.DataError, match=r"Y\.npz: a label weight is negative: -1"):
        data.load(x)
    data.save_matrix(y, scipy.sparse.eye_array(3))
    with pytest.raises(data.DataError, match="3 features, expected 4"):
        data.load(x, n_features=4)
    with pytest.raises(data.DataError, match="a feature matrix without its labels"):
        data.load(y.rename(tmp_path / "features.npz"))


def test_bad_calls(tmp_path):
    path = write(tmp_path, XMC)
    with pytest.raises(ValueError, match="format: expected one of xmc, npz, text, lists, got 'csv'"):
        data.load(path, format="csv")
    with pytest.raises(ValueError, match="labels: a second file goes with the format npz only, not with xmc"):
        data.load(path, path, format="xmc")
    with pytest.raises(data.DataError, match="cannot tell the format"):
        data.load(write(tmp_path, b"just words\n", "words"))
    with pytest.raises(data.DataError, match="the file is empty"):
        data.load(write(tmp_path, b" \n\n", "blank"))
    one = scipy.sparse.csr_array(np.ones((1, 1)))
    with pytest.raises(ValueError, match="labels: expected 1 rows, as features has, got 2"):
        data.save_xmc(tmp_path / "out", one, np.ones((2, 1)))
    with pytest.raises(ValueError, match="features: values have to be finite"):
        data.save_xmc(tmp_path / "out", one * np.inf, one)
    for texts, labels, match in (
        (["a"], np.ones((2, 1)), "labels: expected 1 rows"),
        (["a\nb"], one, "texts: text 0 is empty or holds a line break"),
        (["a"], 0 * one, "labels: row 0 has none"),
    ):
        with pytest.raises(ValueError, match=match):
            data.save_text(tmp_path / "out", texts, labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blank", "data.txt", "words"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write(tmp_path, b"old")
    with pytest.raises(RuntimeError), files.writing(path) as out:
        out.write(b"new")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["data.txt"]


# The fast reader against the slow one, and noise


def outcome(path):
    try:
        got = data.load_xmc(path)
    except data.DataError as error:
        return str(error)
    return [[m.shape, m.indptr.tolist(), m.indices.tolist(), m.data.tolist()] for m in (got.features, got.labels)]


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.sampled_from(list(b"0123456789,,::  \n\n..-+eE\t\r#")), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


def mutate(content, steps):
    content = bytearray(content)
    for step, where, byte in steps:
        at = int(where * (len(content) + 1))
        if step == "insert":
            content[at:at] = bytes([byte])
        elif step == "replace":
            content[at : at + 1] = bytes([byte])
        elif step == "delete":
            del content[at : at + 1 + byte % 5]
        elif step == "repeat":
            content[at:at] = content[at : at + 1 + byte % 9]
        else:
            del content[at:]
    return bytes(content)


@settings(SETTINGS, max_examples=400)
@given(steps=MUTATIONS, header=st.booleans())
def test_fast_and_slow_reader_agree_on_noise(tmp_path, steps, header):
    body = XMC.replace(b"0\x20\n", b"0,2 1:3.5 3:1e2 4:7\n")
    path = write(tmp_path, mutate(body if header else body[6:], steps))
    fast = outcome(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xmc, "_at_once", lambda *arguments: None)
        assert outcome(path) == fast


def packed_npz():
    x, y = io.BytesIO(), io.BytesIO()
    scipy.sparse.save_npz(x, scipy.sparse.csr_matrix(np.eye(3, 5, dtype=np.float32)))
    scipy.sparse.save_npz(y, scipy.sparse.csr_matrix(np.eye(3, 4, dtype=np.float32)), compressed=False)
    return x.getvalue(), y.getvalue()


NPZ = packed_npz()
TEXT = "Köln\t1,2\nSão Paulo\t0\nx y\t3\n".encode()
LISTS = b"0 3 4\n1 2\n5 0 1\n"


@settings(SETTINGS, max_examples=400)
@given(steps=MUTATIONS, which=st.integers(0, 6))
def test_noise_raises_nothing_but_data_errors(tmp_path, steps, which):
    kinds = ["xmc", "text", "lists", "xmc", "xmc", "npz", "npz"]
    contents = [XMC, TEXT, LISTS, gzip.compress(XMC, mtime=0), lzma.compress(XMC), NPZ[0], NPZ[1]]
    path = write(tmp_path, mutate(contents[which], steps), "X.npz" if kinds[which] == "npz" else "data.txt")
    for kind in (None, kinds[which]):
        check_reading(path, kind)


def check_reading(path, kind):
    try:
        got = data.load(path, path if path.suffix == ".npz" else None, format=kind)
    except data.DataError as error:
        assert str(path) in str(error)
        return
    assert len(got) >= 1
    for matrix in (got.features, got.labels):
        if matrix is not None:
            assert matrix.has_canonical_format and np.all(np.isfinite(matrix.data))
            assert matrix.indices.max(initial=-1) < matrix.shape[1]


# Data sets


def test_split_and_take(tmp_path):
    path = write(tmp_path, b"10 10 10\n" + b"".join(b"%d %d:1\n" % (i, i) for i in range(10)))
    whole = data.load(path)
    rest, held = whole.split(0.3, seed=1)
    assert (len(rest), len(held)) == (7, 3)
    assert sorted([*rest.labels.indices, *held.labels.indices]) == list(range(10))
    np.testing.assert_array_equal(held.labels.indices, held.features.indices)
    np.testing.assert_array_equal(whole.split(0.3, seed=1)[1].labels.indices, held.labels.indices)
    assert not np.array_equal(whole.split(0.3, seed=2)[1].labels.indices, held.labels.indices)
    for share in (0.0, 1.0, 0.01):
        with pytest.raises(ValueError, match="share: cannot split 10 points"):
            whole.split(share)
    texts = data.Dataset(labels=whole.labels, texts=list("abcdefghij"))
    assert texts.take([3, 1]).texts == ["d", "b"]
    assert texts.points == list("abcdefghij")


def test_statistics():
    labels = scipy.sparse.csr_array(np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]))
    got = data.statistics(data.Dataset(labels=labels, features=scipy.sparse.eye_array(4, 6, format="csr")))
    assert got["points"] == 4 and got["labels"] == 4 and got["features"] == 6
    assert got["labels per point"] == 5 / 4
    assert got["points without labels"] == 1
    assert got["labels without points"] == 1
    assert got["labels with 1 point"] == 2
    assert got["labels with 2-4 points"] == 1
    assert got["points of the commonest label"] == 3
    assert got["share of the commonest 1 % of labels"] == 3 / 5
