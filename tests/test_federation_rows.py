"""The rows of benchmarks/federation.py and what they are made of. What they measure takes minutes a row, and is not measured here."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sfumato.federation.settings import FederationSettings
from sfumato.records import Record

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
KEPT = BENCHMARKS / "results" / "federation"


@pytest.fixture
def federation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("federation")


def test_every_row_is_a_federation_that_can_be_and_protects_at_one_place_only(federation: ModuleType) -> None:
    """Under a mechanism whose unit is the site the local steps are ordinary ones."""
    for name, (bench, row) in federation.ROWS.items():
        if row == bench.NOISE:
            continue
        said = bench.ROWS[row]
        FederationSettings(
            sites=said.sites, rounds=said.rounds, local_steps=said.local_steps, mechanism=said.mechanism,
            aggregation=said.aggregation, proximal=said.proximal,
        )  # fmt: skip
        assert not (said.private and said.mechanism.kind != "record_level"), name
        assert said.mechanism.kind == "record_level" or said.mechanism.epsilon == 8.0, name


def test_each_bench_has_a_recipe_that_can_be(federation: ModuleType) -> None:
    """They change named recipes, which change too."""
    for bench in federation.BENCHES:
        assert bench.base().federation.sites > 0


def test_both_benches_have_every_mechanism_with_few_sites_and_with_many(federation: ModuleType) -> None:
    kinds = {"update_level", "central", "local_and_global", "ldp_fl", "distributed"}
    for bench in federation.BENCHES:
        for few in (True, False):
            rows = [row for row in bench.ROWS.values() if (row.sites <= 10) == few]
            assert {row.mechanism.kind for row in rows} == {"record_level", *kinds}
        assert any(getattr(row.mechanism, "clipping", "") == "adaptive" for row in bench.ROWS.values())


def test_what_was_measured_has_the_epsilon_that_its_row_asks_for(federation: ModuleType) -> None:
    seen = 0
    for name, (bench, row) in federation.ROWS.items():
        path = KEPT / f"{name}.json"
        if row == bench.NOISE or not path.is_file():
            continue
        found, said = json.loads(path.read_text("utf-8")), bench.ROWS[row]
        private = said.private or said.mechanism.kind != "record_level"
        assert (found["row"], found["says"]) == (row, said.says)
        assert 7.98 < found["epsilon"] <= 8.0 if private else not math.isfinite(found["epsilon"] or math.inf), name
        seen += 1
    assert seen > 50


def test_the_table_is_made_of_the_rows_that_lie_beside_it(federation: ModuleType) -> None:
    assert federation.table(KEPT) == (KEPT / "table.md").read_text(encoding="utf-8")


def test_records_go_to_the_sites_that_a_row_says(federation: ModuleType) -> None:
    class Model:
        def encode(self, records: list[Record]) -> list[Record]:
            return records

    clinic, rows = federation.federation_clinic, importlib.import_module("federation_rows")
    records = [
        Record(id=str(i), unit=str(i), image=np.zeros((1, 1, 1), np.uint8), metadata={"site": "abcd"[i % 4]})
        for i in range(80)
    ]
    unlike = rows.split(Model(), records, clinic.ROWS["unlike-8"])
    assert {name: {r.metadata["site"] for r in own} for name, own in unlike.items()} == {s: {s} for s in "abcd"}
    alike = rows.split(Model(), records, clinic.ROWS["alike-8"])
    assert sorted(alike) == ["site-1", "site-2", "site-3", "site-4"]
    assert sorted(r.id for own in alike.values() for r in own) == sorted(r.id for r in records)
    assert list(rows.split(Model(), records, clinic.ROWS["one-place"])) == ["all"]
