"""test_text.py -- hashed n-grams against a plain reference, packed strings, romanising, typing errors"""

import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

import widehead
from widehead.text import NGramHasher, PackedStrings, typos

MASK = 2**64 - 1
AWKWARD = [
    "",
    " ",
    "a",
    "ab",
    "paris",
    "new york",
    "  two   blanks\t\n",
    "münchen",
    "mu\u0308nchen",
    "北京市",
    "🏔️ 👩‍👩‍👧 🇩🇪",
    "ǆ ﬁ ſ İ ß",
    "e\u0301\u0323 \u0301",
    "ก็ बॉम्बे",
    "a\u00a0b\u2003c\u200bd",
    "\x00\x1f|\ud800|\udfff\ud83d",
    "x" * 300,
    "\U0010ffff",
    "line\nbreak",
]


def feature(gram: str, n_features: int, space: int) -> int:
    """The hash of ngrams.h, word for word."""
    h = (0x243F6A8885A308D3 + space * 0x9E3779B97F4A7C15) & MASK
    for c in gram:
        h = ((h ^ ord(c)) * 0x9FB21C651E98DF25) & MASK
        h ^= h >> 29
    x = ((h ^ (h >> 32)) * 0xD6E8FEB86659FD93) & MASK
    return ((x >> 32) * n_features) >> 32


def grams(text: str, shortest: int, longest: int, words: bool) -> list[str]:
    units = [f" {w} " for w in text.split()] if words else ([f" {' '.join(text.split())} "] if text.split() else [])
    out = []
    for unit in units:
        if len(unit) < shortest:
            out.append(unit)
        for n in range(shortest, longest + 1):
            out += [unit[i : i + n] for i in range(len(unit) - n + 1)]
    return out


def reference(
    strings, n_features, shortest, longest, words=True, whole=False, roman=None, separate=False, binary=False
):
    rows = np.zeros((len(strings), n_features))
    for i, s in enumerate(strings):
        count = Counter(feature(g, n_features, 0) for g in grams(s, shortest, longest, words))
        if whole:
            count.update(feature(w, n_features, 2) for w in s.split())
        if roman is not None and (separate or roman(s) != s):
            count.update(feature(g, n_features, int(separate)) for g in grams(roman(s), shortest, longest, words))
        for column, times in count.items():
            rows[i, column] = 1 if binary else times
    return rows


def crude(s: str) -> str:
    """A romaniser that changes lengths, drops characters, and leaves some strings as they are."""
    return s.replace("ü", "ue").replace("京", "").replace("b", "bb")


@pytest.mark.parametrize("n_features", [1, 7, 4096])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 4), (3, 3), (5, 64)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"words": False},
        {"whole_words": True, "binary": True},
        {"romanise": crude},
        {"romanise": crude, "separate": True},
        {"romanise": crude, "words": False, "binary": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_features_match_the_reference(n_features, sizes, options):
    hasher = NGramHasher(n_features, sizes, fold=False, norm=None, **{"romanise": None, **options})
    expected = reference(
        AWKWARD,
        n_features,
        *sizes,
        words=options.get("words", True),
        whole=options.get("whole_words", False),
        # The hasher folds what a callable returns.
        roman=(lambda s: fold(crude(s))) if "romanise" in options else None,
        separate=options.get("separate", False),
        binary=options.get("binary", False),
    )
    rows = hasher.transform(AWKWARD)
    assert rows.shape == expected.shape and rows.dtype == np.float32
    np.testing.assert_array_equal(rows.toarray(), expected)
    assert (rows.data > 0).all()
    for i in range(rows.shape[0]):
        columns = rows.indices[rows.indptr[i] : rows.indptr[i + 1]]
        assert (np.diff(columns) > 0).all()


def fold(s: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", s).casefold())


@given(st.lists(st.text(max_size=30), max_size=6), st.integers(1, 3), st.integers(0, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_text_matches_the_reference(strings, shortest, more, words):
    longest = shortest + more
    hasher = NGramHasher(509, (shortest, longest), words=words, romanise=None, norm=None)
    expected = reference([fold(s) for s in strings], 509, shortest, longest, words)
    np.testing.assert_array_equal(hasher.transform(strings).toarray(), expected)


def test_the_hash_never_changes():
    # A trained table depends on these numbers: a change here is a change of the file format.
    row = NGramHasher(2**18, (2, 3), romanise=None, norm=None).transform(["Köln"])
    assert row.indices.tolist() == sorted(feature(g, 2**18, 0) for g in grams("köln", 2, 3, True))
    assert feature(" k", 2**18, 0) == 91696
    assert feature("日本", 2**18, 1) == 135048


@pytest.mark.parametrize("norm, order", [("l1", 1), ("l2", 2)])
def test_norms(norm, order):
    plain = NGramHasher(512, romanise=None, norm=None).transform(AWKWARD).toarray()
    rows = NGramHasher(512, romanise=None, norm=norm).transform(AWKWARD).toarray()
    length = np.linalg.norm(plain, order, axis=1, keepdims=True)
    empty = length[:, 0] == 0
    assert 2 <= empty.sum() < len(AWKWARD) / 2
    np.testing.assert_array_equal(rows[empty], 0)
    np.testing.assert_allclose(rows[~empty], (plain / np.where(length == 0, 1, length))[~empty], rtol=1e-7)


def test_forms_of_a_name_share_features():
    pytest.importorskip("anyascii")
    hasher = NGramHasher(2**20)
    rows = hasher.transform(["MÜNCHEN", "mu\u0308nchen", "munchen", "Ｍünchen", "Москва", "moskva", "Bern"])
    like = (rows @ rows.T).toarray()
    np.testing.assert_allclose(like[0, [0, 1, 3]], 1.0, rtol=1e-6)
    assert 0.5 < like[0, 2] < 0.95
    assert 0.5 < like[4, 5] < 0.95
    assert like[0, 6] < 0.3
    separate = NGramHasher(2**20, separate=True).transform(["münchen", "munchen"])
    assert 0.4 < (separate @ separate.T).toarray()[0, 1] < 0.95


def test_folding_in_one_go_is_folding_one_by_one():
    assert list(PackedStrings(AWKWARD).folded()) == [fold(s) for s in AWKWARD]
    plain = [s for s in AWKWARD if "\n" not in s]
    assert list(PackedStrings(plain).folded()) == [fold(s) for s in plain]
    assert list(PackedStrings([]).folded()) == []
    assert list(PackedStrings([""]).folded()) == [""]


def test_same_bits_for_any_number_of_threads():
    pytest.importorskip("anyascii")
    strings = [f"{a}{i} ночь {i * i}" for i in range(400) for a in AWKWARD[3:8]]
    results = []
    for n in (1, 2, 4):
        widehead.set_num_threads(n)
        rows = NGramHasher().transform(strings)
        results.append((rows.indptr, rows.indices, rows.data, np.array(typos(strings, 0.7, seed=3))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_packed_strings_are_a_sequence():
    packed = PackedStrings(AWKWARD)
    assert len(packed) == len(AWKWARD) and list(packed) == AWKWARD
    assert [packed[i] for i in range(-len(AWKWARD), len(AWKWARD))] == AWKWARD * 2
    assert list(packed[2:-3:2]) == AWKWARD[2:-3:2]
    rows = np.array([3, 0, 3, -1])
    assert list(packed[rows]) == [AWKWARD[i] for i in rows]
    mask = np.arange(len(AWKWARD)) % 3 == 1
    assert list(packed[mask]) == AWKWARD[1::3]
    assert packed == PackedStrings(tuple(AWKWARD)) and packed != PackedStrings(AWKWARD[1:])
    assert "paris" in packed and "Paris" not in packed
    with pytest.raises(IndexError):
        packed[len(AWKWARD)]
    assert list(PackedStrings([])) == []


@pytest.mark.parametrize("bad", ["paris", b"paris", ["a", None], ["a", b"b"], [1], np.array([1.5])], ids=str)
def test_what_is_not_a_list_of_strings_is_refused(bad):
    with pytest.raises(widehead.DtypeError, match="strings: expected"):
        NGramHasher().transform(bad)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_features": 0}, "n_features"),
        ({"n_features": 2**31}, "n_features"),
        ({"ngram_range": (0, 2)}, "ngram_range"),
        ({"ngram_range": (3, 2)}, "ngram_range"),
        ({"ngram_range": (2, 65)}, "ngram_range"),
        ({"norm": "max"}, "norm"),
        ({"romanise": "latin"}, "romanise"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(widehead.ShapeError, match=message):
        NGramHasher(**options).transform(["paris"])


def test_without_anyascii_only_ascii_can_be_romanised(monkeypatch):
    from widehead import text

    monkeypatch.setattr(text, "_anyascii", text._Anyascii())
    monkeypatch.setitem(sys.modules, "anyascii", None)
    assert NGramHasher().transform(["Paris"]).nnz == NGramHasher(romanise=None).transform(["Paris"]).nnz
    with pytest.raises(ImportError, match="pip install anyascii"):
        NGramHasher().transform(["München"])
    assert NGramHasher(romanise=None).transform(["München"]).nnz > 0


def test_it_is_a_transformer():
    base = pytest.importorskip("sklearn.base")
    pipeline = pytest.importorskip("sklearn.pipeline")
    hasher = NGramHasher(64, (1, 2), words=False, romanise=None, norm="l1")
    copy = base.clone(hasher)
    assert copy is not hasher and copy.get_params() == hasher.get_params()
    assert repr(copy) == "NGramHasher(n_features=64, ngram_range=(1, 2), words=False, romanise=None, norm='l1')"
    pipe = pipeline.make_pipeline(hasher, pipeline.FunctionTransformer(lambda x: x * 2))
    pipe.set_params(ngramhasher__n_features=32)
    doubled = pipe.fit_transform(["one", "two"])
    assert sp.issparse(doubled) and doubled.shape == (2, 32)
    np.testing.assert_allclose(doubled.sum(axis=1), [2, 2])
    with pytest.raises(ValueError, match="colour: NGramHasher has no such parameter"):
        hasher.set_params(colour=1)


def test_typos_are_small_and_reproducible():
    strings = ["springfield", "санкт петербург", "北京市", "a", "", "münchen"] * 500
    noisy = typos(strings, 0.5, seed=7, step=2)
    assert noisy == typos(strings, 0.5, seed=7, step=2)
    assert noisy != typos(strings, 0.5, seed=8, step=2) and noisy != typos(strings, 0.5, seed=7, step=3)
    assert isinstance(typos(PackedStrings(strings), 0.5, seed=7, step=2), PackedStrings)
    assert list(typos(PackedStrings(strings), 0.5, seed=7, step=2)) == noisy
    # A string's errors depend on its place, not on its neighbours.
    assert typos(["springfield"] + ["x"] * 40, 0.5, seed=7, step=2)[0] == noisy[0]
    changed = np.mean([a != b for a, b in zip(strings, noisy, strict=True) if len(a) > 5])
    assert 0.40 < changed < 0.5  # an edit now and then changes nothing: a letter replaced by itself
    for a, b in zip(strings, noisy, strict=True):
        assert distance(a, b) <= 4  # two edits, and a swap counts for two
        assert bool(a) == bool(b)
    assert max(distance(a, b) for a, b in zip(strings, noisy, strict=True)) >= 2


def test_typos_of_every_kind_occur():
    strings = ["abcdefghij"] * 4000
    noisy = typos(strings, 1.0, seed=1, second=0.0)
    lengths = Counter(len(s) for s in noisy)
    assert set(lengths) == {9, 10, 11}
    for length, share in ((9, 0.25), (10, 0.5), (11, 0.25)):
        assert abs(lengths[length] / 4000 - share) < 0.05
    swapped = sum(sorted(s) == sorted("abcdefghij") and s != "abcdefghij" for s in noisy)
    assert 0.15 < swapped / 4000 < 0.3
    assert any(set(s) - set("abcdefghij") for s in noisy)
    cyrillic = "".join(typos(["привет"] * 500, 1.0, seed=1))
    assert set(cyrillic) <= set("абвгдежзийклмнопрстуфхцчшщъыьэюя") and set(cyrillic) - set("привет")
    assert typos(strings[:50], 0.0, seed=1) == strings[:50]
    assert sum(distance("abcdefghij", s) > 2 for s in typos(strings, 1.0, seed=1, second=1.0)) > 200


@pytest.mark.parametrize("options", [{"rate": -0.1}, {"rate": 1.5}, {"rate": float("nan")}, {"rate": 0.5, "second": 2}])
def test_bad_rates_are_refused(options):
    with pytest.raises(widehead.ShapeError, match="probability"):
        typos(["a"], seed=0, **options)


def distance(a: str, b: str) -> int:
    """Levenshtein."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
