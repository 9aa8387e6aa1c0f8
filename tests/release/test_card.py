"""The card says what the reports say, in YAML and Markdown that nothing in a report can break."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.release import card, manifest, wording


def reports(bundle: Path) -> dict:
    return {name: json.loads((bundle / name).read_text()) for name in manifest.REPORTS}


def test_the_yaml_block_is_the_claim(released: Path) -> None:
    head = yaml.safe_load((released / "README.md").read_text().split("---\n")[1])
    claim = json.loads((released / "privacy.json").read_text())
    for key in ("definition", "epsilon", "delta", "unit", "records_per_unit", "adjacency", "population", "trust_model"):
        assert head["privacy"][key] == claim[key]
    assert head["privacy"]["noise_multiplier"] == claim["mechanism"]["noise_multiplier"]
    assert head["library_name"] == "sfumato"


@settings(deadline=None, derandomize=True)
@given(
    st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**60), 2**60), st.booleans(), st.none())
)
def test_a_number_is_the_same_number_in_yaml(value: float) -> None:
    read = yaml.safe_load(card.front_matter({"epsilon": value}).split("---\n")[1])["privacy"]["epsilon"]
    assert read == value
    assert type(read) is type(value)


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_text_cannot_break_out_of_the_yaml_block_or_the_table(value: str) -> None:
    block = card.front_matter({"unit": value})
    assert block.count("\n---\n") == 1
    assert isinstance(yaml.safe_load(block.split("---\n")[1])["privacy"]["unit"], str)
    table = card.figures_table({"figures": [{"name": value, "value": 1.0, "extractor": value, "covered_by": value}]})
    assert len(table.split("\n")) == 5
    assert table.split("\n")[3].count("|") == 7
    assert table.count("-->") == 2


def test_an_unchanged_card_has_no_problems_and_a_binary_one_is_refused(released: Path) -> None:
    values = reports(released)
    assert card.problems((released / "README.md").read_bytes(), values) == []
    assert card.render(values) == (released / "README.md").read_text()


def test_sentences_of_the_boundary_may_speak_of_epsilon(released: Path) -> None:
    values = reports(released)
    values["privacy.json"]["boundary"].append("Pretrained elsewhere with ε = 3 at δ = 1e-6.")
    assert card.problems(card.render(values).encode(), values) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.99915, "8"), (7.9911, "7.992"), (3.2e-6, "3.2e-06"), (3.23331e-6, "3.234e-06"), (8.0, "8"), (1, "1")],
)
def test_bounds_are_rounded_up(value: float, text: str) -> None:
    assert wording.bound(value) == text
    assert float(text) >= value


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-12, 1e6))
def test_a_printed_bound_is_never_below_the_bound(value: float) -> None:
    assert value <= float(wording.bound(value)) <= value * 1.0011
