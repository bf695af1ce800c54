"""widehead/demo/query.py -- what a user types: the name of a place, and a country after the last comma."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from .places import Country, fold

# What people write for countries that the package calls otherwise.
_ALSO = {
    "uk": "GB",
    "great britain": "GB",
    "england": "GB",
    "scotland": "GB",
    "wales": "GB",
    "northern ireland": "GB",
    "united states of america": "US",
    "america": "US",
    "czechia": "CZ",
    "holland": "NL",
    "burma": "MM",
    "turkiye": "TR",
    "türkiye": "TR",
    "uae": "AE",
    "ivory coast": "CI",
    "korea": "KR",
}


@dataclass(frozen=True)
class Query:
    """A parsed query: `country` is an index into the countries, or None; `unknown` what stood after the comma and is
    no country."""

    name: str
    country: int | None = None
    unknown: str | None = None


class QueryParser:
    """Splits "paris, us" into a name and a country: ISO 3166 codes of two or three letters, or the English name.

    Names have commas, too: text after the last comma that is no country stays a part of the name.
    """

    def __init__(self, countries: Sequence[Country]) -> None:
        self._index: dict[str, int] = {}
        for i, country in enumerate(countries):
            for key in country:
                self._index.setdefault(fold(key), i)
        codes = {country.code: i for i, country in enumerate(countries)}
        for name, code in _ALSO.items():
            if code in codes:
                self._index.setdefault(name, codes[code])

    def country(self, text: str) -> int | None:
        """The country of a code or a name, or None."""
        return self._index.get(fold(text).rstrip("."))

    def __call__(self, text: str) -> Query:
        """The parsed query; DataError where no name is left of it."""
        text = " ".join(text.split())
        name, comma, last = (part.strip() for part in text.rpartition(","))
        if not comma:
            return Query(_checked(text, text))
        country = self.country(last)
        if country is not None:
            return Query(_checked(name, text), country)
        return Query(_checked(text, text), unknown=last or None)


def _checked(name: str, text: str) -> str:
    if not any(c.isalnum() for c in name):
        raise DataError(f"query: expected the name of a place, perhaps with a country as in 'paris, us', got {text!r}")
    return name
