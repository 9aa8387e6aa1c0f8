"""How the stages use prepared data: the same table from memory and from disk, and what a private recipe may not ask for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato import building, stages, workflow
from sfumato.data import mapped
from sfumato.data.settings import Balance, DataSettings, Deduplicate
from sfumato.errors import PrivacyRefused
from sfumato.privacy.settings import PrivacySettings
from sfumato.recipe import Recipe, to_yaml


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))


def small(**data) -> Recipe:
    return Recipe(
        name="small",
        data=DataSettings(units=40, public_units=10, **data),
        privacy=PrivacySettings(unit="person", records_per_unit=4, population=40),
    )


def test_the_models_table_is_the_same_from_disk(monkeypatch):
    monkeypatch.setattr(mapped, "ROWS", 16)
    tables = []
    for store in ("memory", "mapped"):
        recipe = small(store=store)
        prepared, model = stages.load(recipe), building.build(recipe)
        tables.append(building.encode(model, recipe, prepared.private))
        again = building.encode(model, recipe, prepared.private)
        torch.testing.assert_close(again.tensors["image"], tables[-1].tensors["image"])
    slow, fast = tables
    assert isinstance(fast, mapped.MappedTable)
    assert fast.unit_names == slow.unit_names
    for units in ([0, 7, 39], [], list(range(40))):
        a, b = (table.batch(units, records_per_unit=4) for table in tables)
        assert torch.equal(a.unit, b.unit)
        for name in slow.tensors:
            assert torch.equal(a.tensors[name], b.tensors[name])
            assert torch.equal(a.present[name], b.present[name])


@pytest.mark.parametrize(
    "asked", [{"deduplicate": Deduplicate(across_units=True)}, {"balance": Balance(column="kind", equal=True)}]
)
def test_a_private_recipe_may_not_couple_units(asked, tmp_path):
    recipe = small(**asked)
    with pytest.raises(PrivacyRefused, match="data"):
        stages.load(recipe)
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(recipe))
    with pytest.raises(PrivacyRefused) as refused:  # a plan says so before any data are read
        workflow.plan(str(file))
    assert refused.value.refusals[0]["code"] == "coupled_units"
    open_ = replace(recipe, privacy=replace(recipe.privacy, mechanism="none"))
    prepared = stages.load(open_)
    assert prepared.card["preparation"]
    assert 0 < len(prepared.private)


def test_a_recipe_with_prepared_data_is_read_from_yaml(tmp_path):
    from sfumato.recipe import load

    recipe = small(
        deduplicate=Deduplicate(near=True),
        balance=Balance(column="kind", keep={"nodule": 0.5}),
        modalities=("text", "image", "audio"),
    )
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(recipe))
    assert load(file) == recipe
    bare = replace(recipe, privacy=replace(recipe.privacy, population=None))
    prepared = stages.load(load(file))
    assert workflow._public_population(bare) == len({record.unit for record in prepared.private})
    assert prepared.card["left_out"]["thinned"] > 0
    assert all(record.audio is not None for record in prepared.private)
