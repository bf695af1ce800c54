"""widehead/demo/resolver.py -- the trained resolver: names in, places with probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..estimator import Classifier
from ..text import PackedStrings
from .places import Country, Places
from .query import Query, QueryParser

_SERVE = 1024  # names at a time where all logits of a country are in memory


@dataclass(frozen=True)
class Candidate:
    """A place that a query may mean; `probability` is the model's, of all places or of those in the query's country."""

    place: int
    name: str
    region: str
    country: Country
    population: int
    latitude: float
    longitude: float
    probability: float

    @property
    def where(self) -> str:
        """Name, region where its code is of letters (as US states' are), and country."""
        parts = [self.name, self.region if self.region.isalpha() else "", f"{self.country.name} ({self.country.code})"]
        return ", ".join(filter(None, parts))


class Resolver:
    """A classifier over places, and what is known of the places.

    Args:
        model: trained on `places.train`.
        places: the data set.

    Raises:
        DataError: the model has another number of classes.
    """

    def __init__(self, model: Classifier, places: Places) -> None:
        if model.n_classes_ != len(places):
            raise DataError(f"model: expected a model of {len(places)} places, got one of {model.n_classes_} classes")
        self.model, self.places = model, places
        self.parse = QueryParser(places.countries)
        self._in_country: dict[int, NDArray[np.int64]] = {}

    def ask(self, text: str, k: int = 5) -> tuple[Query, list[Candidate]]:
        """The `k` likeliest places for a query like "Muenchn" or "paris, us", best first.

        A country is a filter: probabilities are then among its places. Fewer than `k` come back where it has fewer.

        Raises:
            DataError: no name in the query.
        """
        query = self.parse(text)
        if query.country is None:
            hidden = self._hidden([query.name])
            scores, places = self.model.head_.topk(hidden, min(k, len(self.places)))[:2]
            total = self.model.head_.lse(hidden)
        else:
            scores, places, total = self._within([query.name], query.country, k)
        chances = np.exp(scores[0].astype(np.float64) - total[0])
        return query, [self._candidate(int(p), float(c)) for p, c in zip(places[0], chances, strict=True)]

    def topk(self, names: Sequence[str], k: int) -> NDArray[np.int64]:
        """`[n, k]` likeliest places of many names."""
        return self.model.predict_topk(names, k)[1]

    def topk_within(self, names: PackedStrings, country: int, k: int) -> NDArray[np.int64]:
        """The same among the places of one country: `[n, min(k, places of the country)]`."""
        parts = [self._within(names[at : at + _SERVE], country, k)[1] for at in range(0, len(names), _SERVE)]
        return np.concatenate(parts)

    def _hidden(self, names: Any) -> NDArray[Any]:
        features: Any = self.model.features
        return self.model.bag_.forward(features.transform(names))

    def _within(self, names: Any, country: int, k: int) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[Any]]:
        """Scores, places and log-sum-exp among the places of one country."""
        if country not in self._in_country:
            self._in_country[country] = np.flatnonzero(self.places.country == country)
        places = self._in_country[country]
        if not len(places):
            empty = np.zeros((len(names), 0))
            return empty, empty.astype(np.int64), np.zeros(len(names))
        logits = self.model.head_.scores(self._hidden(names), places)
        best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(logits, best, 1), places[best], np.logaddexp.reduce(logits, axis=1)

    def _candidate(self, place: int, probability: float) -> Candidate:
        at = self.places
        return Candidate(
            place=place,
            name=at.names[place],
            region=at.regions[place],
            country=at.countries[at.country[place]],
            population=int(at.population[place]),
            latitude=float(at.position[place, 0]),
            longitude=float(at.position[place, 1]),
            probability=probability,
        )
