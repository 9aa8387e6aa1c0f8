"""``init`` writes a recipe that explains itself and can be used as it is."""

import dataclasses
import json

import pytest
import yaml

from sfumato import recipe as recipes
from sfumato.cli.commented import EXPLAINED, to_commented_yaml
from sfumato.cli.init import batch_size_for


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "My scans (2024)"
    folder.mkdir()
    rows = [{"file_name": f"{i}.png", "text": "a scan", "patient_id": f"p{i // 2}"} for i in range(2_000)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_the_written_recipe_loads_and_names_the_person(folder, sfu):
    ran = sfu("init", str(folder), "--json")
    assert ran.code == 0
    assert ran.json["unit_column"] == "patient_id"
    assert ran.json["units"] == 1_000
    recipe = recipes.load(ran.json["recipe"])
    assert recipe.data.source == "folder"
    assert recipe.data.path == str(folder)
    assert recipe.data.unit_column == "patient_id"
    assert recipe.privacy.unit == "person"
    assert recipe.training.expected_batch_size == 64


def test_init_without_a_person_column_says_so(folder, sfu):
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}\nnot json\n')
    ran = sfu("init", str(folder), "--out", "r.yaml", "--json")
    assert recipes.load("r.yaml").privacy.unit == "record"
    assert any("person" in note for note in ran.json["notes"])
    assert any("1 lines are not JSON" in note for note in ran.json["notes"])


def test_init_of_a_parquet_file(folder, sfu):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [b"", b""], "text": ["a", "b"], "Subject": ["s", "s"]})
    pyarrow.parquet.write_table(table, "x.parquet")
    ran = sfu("init", "x.parquet", "--json")
    assert (ran.json["records"], ran.json["units"], ran.json["unit_column"]) == (2, 1, "Subject")
    assert recipes.load("x.yaml").data.source == "parquet"


def test_init_overwrites_nothing(folder, sfu):
    (folder.parent / "r.yaml").write_text("mine")
    ran = sfu("init", str(folder), "--out", "r.yaml", "--json")
    assert ran.code == 2
    assert (folder.parent / "r.yaml").read_text() == "mine"


def test_init_of_what_is_not_there_or_holds_nothing_is_exit_2(folder, sfu):
    assert sfu("init", "missing", "--json").code == 2
    (folder / "metadata.jsonl").write_text("")
    assert sfu("init", str(folder), "--json").code == 2
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe")
    assert sfu("init", str(folder), "--json").code == 2
    (folder / "metadata.jsonl").unlink()
    ran = sfu("init", str(folder), "--json")
    assert ran.code == 2
    assert "metadata.jsonl" in ran.json["error"]["message"]
    (folder.parent / "x.parquet").write_bytes(b"nothing")
    assert sfu("init", "x.parquet", "--json").code == 2


def test_a_commented_recipe_is_the_same_recipe_for_awkward_values():
    awkward = 'it\'s: "a" # b\\c [x] 日本 null'
    recipe = recipes.from_mapping({"name": "no", "data": {"source": "folder", "path": awkward, "unit_column": "yes"}})
    assert recipes.from_mapping(yaml.safe_load(to_commented_yaml(recipe, "one\ntwo"))) == recipe


def test_every_key_of_a_recipe_is_explained_and_nothing_else():
    keys = {"name"}
    for section in dataclasses.fields(recipes.Recipe):
        if section.name != "name":
            keys |= {
                section.name,
                *(
                    f"{section.name}.{field}"
                    for field in recipes.to_mapping(recipes.Recipe(name="x"))[section.name] or ()
                ),
            }
    assert set(EXPLAINED) == keys


@pytest.mark.parametrize(("units", "size"), [(0, 16), (100, 16), (1_000, 64), (10_000, 512), (10**7, 2_048)])
def test_batch_size_is_a_power_of_two_near_a_tenth_of_the_units(units, size):
    assert batch_size_for(units) == size
