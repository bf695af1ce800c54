"""text.py -- hashed character n-grams and typing errors: what stands in front of a head for people with text."""

from __future__ import annotations

import itertools
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import scipy.sparse as sp

from . import _core
from ._params import Params

__all__ = ["NGramHasher", "PackedStrings", "typos"]

Romanise = Callable[[str], str]
Arrays = tuple[np.ndarray, np.ndarray]
_SEPARATOR = "\n"  # survives NFKC and case folding, and nothing composes across it
_CODES = 0x110000


class PackedStrings(Sequence[str]):
    """Strings as one array of Unicode code points: what the core reads, and a tenth of the memory of a list.

    Args:
        strings: any iterable of ``str``. Lone surrogates pass through as code points.

    Attributes:
        text: ``[length]`` int32, the code points of all strings, one after the other.
        offsets: ``[len(self) + 1]`` int64; string ``i`` is ``text[offsets[i]:offsets[i + 1]]``.

    Raises:
        DtypeError: if an item is not a ``str``, or a single ``str`` came in place of a list.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        items = _checked(strings)
        self.text = _code_points("".join(items))
        self.offsets = np.zeros(len(items) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, items), np.int64, len(items)), out=self.offsets[1:])

    @property
    def arrays(self) -> Arrays:
        """``(text, offsets)``."""
        return self.text, self.offsets

    @classmethod
    def from_arrays(cls, text: np.ndarray, offsets: np.ndarray) -> PackedStrings:
        """The strings over the two arrays of the class (int32, int64), without a copy."""
        self = cls.__new__(cls)
        self.text, self.offsets = text, offsets
        return self

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> PackedStrings: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> str | PackedStrings:
        if isinstance(index, (int, np.integer)):
            i = range(len(self))[index]
            return _string(self.text[self.offsets[i] : self.offsets[i + 1]])
        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)))
        else:
            rows = np.asarray(index)
            if rows.dtype == np.bool_:
                rows = np.flatnonzero(rows)
            rows = np.where(rows < 0, rows + len(self), rows)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        source = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return PackedStrings.from_arrays(self.text[source], offsets)

    def __iter__(self) -> Iterator[str]:
        text, offsets = _string(self.text), self.offsets.tolist()
        return (text[a:b] for a, b in itertools.pairwise(offsets))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedStrings):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.text, other.text)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PackedStrings({len(self)} strings, {len(self.text)} code points)"

    def folded(self) -> PackedStrings:
        """The strings in NFKC, case folded, in NFKC again: what compares equal if it reads the same."""
        whole = _SEPARATOR.join(self)
        if whole.count(_SEPARATOR) == len(self) - 1:  # one call for all strings instead of three for each
            return PackedStrings(_fold(whole).split(_SEPARATOR))
        return PackedStrings(map(_fold, self))


class NGramHasher(Params):
    """Strings to sparse rows of hashed character n-grams, as a scikit-learn transformer without anything to fit.

    A string is folded (NFKC, case), split into words at white space, and each word padded by a blank on both sides; its
    n-grams, and those of its romanised form, are hashed to ``n_features`` columns. The hash is fixed and documented in
    ``ngrams.h``: the same string has the same features on every machine, in every version.

    Args:
        n_features: number of columns, 1 to 2**31 - 1.
        ngram_range: shortest and longest n-gram in characters, ``1 <= shortest <= longest <= 64``. A padded word
            shorter than the shortest counts once as a whole.
        words: keep n-grams inside words; else they run across words, and any white space counts as one blank.
        whole_words: one more feature for every word.
        romanise: ``"anyascii"`` (needs that package), a callable ``str -> str``, or None. Romanised n-grams are added
            where the romanised string differs.
        separate: give the n-grams of the romanised form columns of their own (then also where it is the same).
        binary: 1 for every feature that occurs instead of its count.
        norm: scale each row to ``"l2"`` or ``"l1"`` length 1, or None.
        fold: NFKC and case fold first; switch off for strings that are folded already.

    Shape:
        ``transform(strings)``: ``[n, n_features]`` ``scipy.sparse.csr_array``, float32, indices sorted and distinct.
        An empty string is an empty row.
    """

    def __init__(
        self,
        n_features: int = 2**18,
        ngram_range: tuple[int, int] = (2, 4),
        *,
        words: bool = True,
        whole_words: bool = False,
        romanise: Romanise | str | None = "anyascii",
        separate: bool = False,
        binary: bool = False,
        norm: str | None = "l2",
        fold: bool = True,
    ) -> None:
        self.n_features = n_features
        self.ngram_range = ngram_range
        self.words = words
        self.whole_words = whole_words
        self.romanise = romanise
        self.separate = separate
        self.binary = binary
        self.norm = norm
        self.fold = fold

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=[]),
            input_tags=InputTags(two_d_array=False, string=True),
            requires_fit=False,
        )

    def fit(self, strings: Any = None, y: Any = None) -> NGramHasher:
        """Nothing to learn: returns self."""
        return self

    def partial_fit(self, strings: Any = None, y: Any = None) -> NGramHasher:
        """Nothing to learn: returns self."""
        return self

    def fit_transform(self, strings: Iterable[str], y: Any = None) -> sp.csr_array:
        """The same as :meth:`transform`."""
        return self.transform(strings)

    def prepare(self, strings: Iterable[str]) -> PackedStrings:
        """Folds and packs: the part of :meth:`transform` that need not be done again for strings that come again."""
        packed = strings if isinstance(strings, PackedStrings) else PackedStrings(strings)
        packed = packed.folded() if self.fold else packed
        if self.romanise == "anyascii":
            _anyascii.covering(packed.text)  # now, not bit by bit as batches bring new characters
        return packed

    def transform(self, strings: Iterable[str]) -> sp.csr_array:
        """``[n, n_features]`` float32 rows of hashed n-grams.

        Raises:
            DtypeError: for items that are not ``str``.
            ShapeError: for parameters out of range.
        """
        return self.hash(self.prepare(strings))

    def hash(self, packed: PackedStrings) -> sp.csr_array:
        """The fast part of :meth:`transform`: rows of strings that :meth:`prepare` has made."""
        shortest, longest = self.ngram_range
        indptr, indices, values = _core.ngrams(
            text=packed.arrays,
            romanised=self._romanised(packed),
            n_features=self.n_features,
            min_n=shortest,
            max_n=longest,
            words=self.words,
            whole_words=self.whole_words,
            separate=self.separate,
            binary=self.binary,
            norm=self.norm or "none",
        )
        rows = sp.csr_array((values, indices, indptr), shape=(len(packed), self.n_features))
        rows.has_canonical_format = True
        return rows

    def _romanised(self, packed: PackedStrings) -> Arrays | None:
        if self.romanise is None:
            return None
        if callable(self.romanise):
            return PackedStrings(_fold(self.romanise(s)) for s in packed).arrays
        if self.romanise != "anyascii":
            raise _core.ShapeError(f'romanise: expected "anyascii", a callable or None, got {self.romanise!r}')
        return _core.transliterate(text=packed.arrays, table=_anyascii.covering(packed.text))


@overload
def typos(
    strings: PackedStrings, rate: float = ..., *, seed: int, step: int = ..., second: float = ...
) -> PackedStrings: ...
@overload
def typos(
    strings: list[str] | tuple[str, ...], rate: float = ..., *, seed: int, step: int = ..., second: float = ...
) -> list[str]: ...
def typos(
    strings: Iterable[str], rate: float = 0.1, *, seed: int, step: int = 0, second: float = 0.2
) -> list[str] | PackedStrings:
    """Strings with typing errors, to train on: a list, or packed strings for packed strings.

    A character is dropped, doubled or inserted, replaced, or swapped with the next. New letters come from the
    neighbourhood in the string or, for a-z and the Cyrillic alphabet, from that alphabet. No string becomes empty.

    Args:
        strings: list of ``str``, or packed strings.
        rate: probability that a string is edited, 0 to 1.
        seed, step: a string's errors are a pure function of its text, its position, ``seed`` and ``step`` (say, the
            epoch).
        second: probability that an edited string is edited once more.

    Raises:
        ShapeError: if ``rate`` or ``second`` is not in [0, 1].
    """
    packed = strings if isinstance(strings, PackedStrings) else PackedStrings(strings)
    noisy = PackedStrings.from_arrays(
        *_core.typos(text=packed.arrays, rate=rate, second=second, seed=seed, step=step, first_row=0)
    )
    return noisy if isinstance(strings, PackedStrings) else list(noisy)


class _Anyascii:
    """What anyascii makes of single code points, looked up once: it never looks at their neighbours."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = np.zeros(_CODES, bool)
        self._pieces: dict[int, str] = {}
        self._table: Arrays = (np.zeros(0, np.int32), np.zeros(1, np.int64))

    def covering(self, text: np.ndarray) -> Arrays:
        """The table for the code points of ``text``: (text, offsets) of one string a code point."""
        with self._lock:
            if not self._known[text].all():
                self._add(np.unique(text[~self._known[text]]).tolist())
            return self._table

    def _add(self, codes: list[int]) -> None:
        beyond = [code for code in codes if code > 0x7F]
        self._pieces |= {code: chr(code).casefold() for code in codes if code <= 0x7F}
        if beyond:
            try:
                from anyascii import anyascii
            except ImportError:
                raise ImportError('romanise="anyascii" needs the package anyascii: pip install anyascii') from None
            for code in beyond:
                surrogate = 0xD800 <= code < 0xE000
                self._pieces[code] = "" if surrogate else anyascii(chr(code)).casefold()
        ordered = sorted(self._pieces)
        lengths = np.zeros(ordered[-1] + 1, np.int64)
        lengths[ordered] = [len(self._pieces[c]) for c in ordered]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._table = (_code_points("".join(self._pieces[c] for c in ordered)), offsets)
        self._known[codes] = True


_anyascii = _Anyascii()


def _fold(s: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", s).casefold())


def _code_points(s: str) -> np.ndarray:
    return np.frombuffer(s.encode("utf-32-le", "surrogatepass"), np.int32)


def _string(text: np.ndarray) -> str:
    return text.tobytes().decode("utf-32-le", "surrogatepass")


def _checked(strings: Iterable[str]) -> list[str]:
    if isinstance(strings, (str, bytes)):
        raise _core.DtypeError(f"strings: expected a list of str, got a single {type(strings).__name__}")
    items = strings.tolist() if isinstance(strings, np.ndarray) else list(strings)
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise _core.DtypeError(f"strings: expected str, got {type(item).__name__} at position {i}")
    return items
