"""A bundle whose ledger was kept under another plan than its recipe makes is refused, whichever field differs, and whoever signed."""

# ruff: noqa: E501
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.release.conftest import asked, make
from tests.release.test_verify import failed

from sfumato.errors import SfumatoError, VerificationFailed
from sfumato.privacy.plan import Composition, DpSgd, Estimate, LatentRelease, MeanEmbedding, PrivatePlan
from sfumato.privacy.plan_json import plan_from_dict, plan_to_dict
from sfumato.privacy.planning import make_plan
from sfumato.privacy.settings import (
    CodebookSettings,
    LatentModalitySettings,
    LatentSettings,
    MeanEmbeddingSettings,
    PartSettings,
    PrivacySettings,
)
from sfumato.release import bundle, keys, recomputed, verify

WHOM = {"unit": "person", "records_per_unit": 4, "population": 30_000, "delta": 3.2e-6}
PAIR = tuple(
    LatentModalitySettings(name=name, max_norm=c, weight=w) for name, c, w in (("image", 1.0, 0.1), ("text", 0.5, 0.3))
)
OWN = tuple(LatentModalitySettings(name=name, max_norm=1.0, noise_std=3.0) for name in ("image", "text"))
PARTS = tuple(PartSettings(name=n, modules=(n,), max_grad_norm=c) for n, c in (("text", 0.3), ("unet", 0.4)))
ASKED = {
    "steps": PrivacySettings(**WHOM, epsilon=None, noise_multiplier=1.4),
    "steps for an epsilon": PrivacySettings(**WHOM, epsilon=8.0),
    "parts": PrivacySettings(**WHOM, epsilon=None, noise_multiplier=1.4, parts=PARTS),
    "bands": PrivacySettings(**WHOM, epsilon=None, noise_multiplier=2.0, bands=4, noise="discrete"),
    "truncated": PrivacySettings(**WHOM, epsilon=None, noise_multiplier=2.0, largest_batch=2300, adjacency="zero_out"),
    "estimate": PrivacySettings(**WHOM, max_grad_norm="auto"),
    "independent latents": PrivacySettings(**WHOM, mechanism="latents", latents=LatentSettings(modalities=PAIR, centre=0.03)),
    "latents with their own noise": PrivacySettings(**WHOM, mechanism="latents", epsilon=None, latents=LatentSettings(modalities=OWN)),
    "shared latents": PrivacySettings(**WHOM, mechanism="latents", latents=LatentSettings(form="shared", centre=0.1)),
    "mean": PrivacySettings(**WHOM, mechanism="mean_embedding", mean_embedding=MeanEmbeddingSettings(max_norm=0.5)),
    "codebook": PrivacySettings(**WHOM, mechanism="codebook", codebook=CodebookSettings(centre=0.1)),
}  # fmt: skip
SLOW = ("steps for an epsilon", "estimate", "truncated", "codebook", "parts", "bands")


def marked(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


def of_recipe(settings: PrivacySettings) -> dict[str, Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(PrivacySettings).dump_python(settings, mode="json")


def recipe_of(settings: PrivacySettings) -> dict[str, Any]:
    return {"privacy": of_recipe(settings), "training": {"steps": 800, "expected_batch_size": 2048}}


def plan_of(settings: PrivacySettings) -> PrivatePlan:
    sizes = {"image": 30, "text": 20, "mean": 900, "categories": 64}
    plan = make_plan(settings, steps=800, expected_batch_size=2048, population=77_777, dimensions=sizes)
    assert isinstance(plan, PrivatePlan)
    return plan


def altered(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field changed by itself: (where, the whole with it)."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            for where, inner in altered(value[key], f"{path}.{key}"):
                whole = copy.deepcopy(value)
                whole[key] = inner
                yield where, whole
        if isinstance(value, list) and len(value) > 1:
            yield f"{path} shorter", value[:-1]
            yield f"{path} in another order", value[::-1]
        return
    others = {
        bool: lambda: [not value], int: lambda: [value + 1, value * 2], float: lambda: [value * 0.9, value * 1.01],
        str: lambda: ["zero_out", "replace_one", "shared", "per_layer", "discrete", "record", "another"],
        type(None): lambda: [3, 7.5],
    }[type(value)]()  # fmt: skip
    yield from ((path, other) for other in others if other != value)


def forgeries(plan: PrivatePlan) -> Iterator[tuple[str, PrivatePlan]]:
    """Every plan that differs in one field, as far as it is a plan; whom it protects is changed in all stages alike."""
    for where, values in altered(plan_to_dict(plan)):
        try:
            yield where, plan_from_dict(values)  # pyright: ignore[reportReturnType]
        except SfumatoError:
            continue
    if isinstance(plan, Composition):
        for name, other in (
            ("population", 30_001),
            ("delta", 3.1e-6),
            ("records_per_unit", 5),
            ("population_from_data", True),
        ):
            stages = tuple(replace(stage, **{name: other}) for stage in plan.stages)
            yield name, replace(plan, stages=stages, **{name: other})
        yield "a stage twice", replace(plan, stages=(*plan.stages, plan.stages[-1]))


@pytest.mark.parametrize("name", marked(*ASKED))
def test_the_plan_that_a_recipe_makes_is_found_again(name):
    assert recomputed.problems(recipe_of(ASKED[name]), plan_of(ASKED[name])) == []


@pytest.mark.parametrize("name", marked(*(name for name in ASKED if name not in SLOW[:3])))
def test_a_plan_that_differs_in_any_field_of_any_stage_is_named(name):
    plan, recipe = plan_of(ASKED[name]), recipe_of(ASKED[name])
    seen = set()
    for where, forged in forgeries(plan):
        if forged == plan:
            continue
        found = recomputed.problems(recipe, forged)
        if where.endswith((".dimension", ".categories")) and not found:
            continue  # the model's, which no recipe says; the claim says it, and the ledger
        assert found, where
        seen.add(where.rpartition(".")[2])
    assert seen >= {"population", "delta", "records_per_unit", "target_epsilon", "population_from_data"}, seen
    assert len(seen) >= 8


def test_a_number_of_units_that_was_counted_is_the_plans_word():
    settings = replace(ASKED["mean"], population=None)
    assert recomputed.problems(recipe_of(settings), plan_of(settings)) == []
    assert recomputed.problems(recipe_of(ASKED["mean"]), plan_of(settings))


@pytest.mark.parametrize(
    "recipe",
    [{}, {"privacy": {}}, {"privacy": 3, "training": 4}, {"privacy": {"unknown": 1}, "training": {"steps": 1, "expected_batch_size": 1}},
     {"privacy": {"epsilon": "x"}, "training": {"steps": 800, "expected_batch_size": 2048}},
     {"privacy": {"latents": {"form": "independent", "extra": 1}, "mechanism": "latents"}, "training": {"steps": 800, "expected_batch_size": 2048}},
     {"privacy": {}, "training": {"steps": True, "expected_batch_size": 2048}}],
)  # fmt: skip
def test_a_recipe_that_makes_no_plan_is_no_proof_of_one(recipe):
    assert recomputed.problems(recipe, plan_of(ASKED["mean"]))


def _noisier(plan: Any, factor: float = 1.2) -> Any:
    return replace(plan, noise_multiplier=plan.noise_multiplier * factor)


def _of(plan: Any, first: Callable[[Any], Any] = lambda s: s, last: Callable[[Any], Any] = lambda s: s) -> Composition:
    return replace(plan, stages=(first(plan.stages[0]), last(plan.stages[1])))


def _released(plan: LatentRelease, **changes: Any) -> LatentRelease:
    """Its noise is split anew."""
    modalities = tuple(replace(m, noise_std=None) for m in plan.modalities)
    return replace(plan, **{"modalities": modalities, **changes})


def _noisier_latents(plan: LatentRelease) -> LatentRelease:
    return _released(plan, noise_multiplier=plan.noise_multiplier * 1.2)


FORGED: dict[str, tuple[str, Callable[[Any], PrivatePlan]]] = {
    "more noise on the steps": ("steps", _noisier),
    "more steps": ("steps", lambda p: replace(p, steps=900)),
    "another batch": ("steps", lambda p: replace(p, expected_batch_size=1000.0)),
    "another bound": ("steps", lambda p: replace(p, max_grad_norm=0.5)),
    "a larger population": ("steps", lambda p: replace(p, population=40_000)),
    "noise moved from the estimate": ("estimate", lambda p: _of(p, lambda s: _noisier(s, 2.0))),
    "another question": ("estimate", lambda p: _of(p, lambda s: replace(s, question=replace(s.question, quantile=0.9)))),
    "noise moved from the centre": ("independent latents", lambda p: _of(p, lambda s: _noisier(s, 2.0))),
    "another bound of the centre": ("independent latents", lambda p: _of(p, lambda s: replace(s, max_norm=2.0))),
    "another width of the centre": ("independent latents", lambda p: _of(p, lambda s: replace(s, dimension=7))),
    "noise split otherwise": ("independent latents", lambda p: _of(p, last=lambda s: _released(
        s, modalities=tuple(replace(m, noise_std=None, weight=1.0) for m in s.modalities)))),
    "no centre": ("independent latents", lambda p: p.stages[1]),
    "a second centre": (
        "independent latents", lambda p: replace(p, stages=(_noisier(p.stages[0], 9.0), p.stages[0], _noisier_latents(p.stages[1])))),
    "more noise on shared latents": ("shared latents", lambda p: _of(p, last=_noisier_latents)),
    "more noise on the mean": ("mean", _noisier),
    "another bound of the mean": ("mean", lambda p: replace(p, max_norm=1.0)),
    "a weaker response": ("codebook", lambda p: _of(p, last=lambda s: replace(s, noise=min(0.99, s.noise * 1.01)))),
    "more codes": ("codebook", lambda p: _of(p, lambda s: _noisier(s, 3.0), lambda s: replace(s, categories=32))),
}  # fmt: skip


@pytest.fixture
def sign(
    signer: Path, public_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """sign(plan, settings): a run of that plan under that recipe, released and verified; the attacker's key is trusted."""

    monkeypatch.setattr(bundle, "_check", lambda folder, key: None)  # an honest signer's own look at it

    def signed(plan: PrivatePlan, settings: PrivacySettings) -> dict[str, Any]:
        run = make(tmp_path / "clinic" / "v1", plan=plan, privacy=of_recipe(settings))
        claim = json.loads((run / "reports/privacy.json").read_text())
        stages = plan.stages if isinstance(plan, Composition) else (plan,)
        claim["estimates"] = [
            {"of": s.name, "name": "value", "value": 1.0, "std": s.noise_std, "low": 0.5, "high": 2.0, "confidence": 0.95, "covered_by": "charged"}
            for s in stages if isinstance(s, Estimate)
        ]  # fmt: skip
        (run / "reports/privacy.json").write_text(json.dumps(claim))
        bundle.write(run, run / "bundle", keys.own(signer))
        return verify.verify(run / "bundle", key_file=public_key)

    return signed


@pytest.mark.parametrize(
    "name", marked("steps", "estimate", "independent latents", "shared latents", "mean", "codebook")
)
def test_an_honest_bundle_of_every_mechanism_is_valid(name, sign):
    assert failed(sign(plan_of(ASKED[name]), ASKED[name])) == {}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow if FORGED[what][0] in SLOW else ()) for what in FORGED]
)
def test_a_plan_that_the_recipe_does_not_make_is_exit_code_4_though_claim_and_ledger_agree_and_are_signed(what, sign):
    name, forge = FORGED[what]
    result = sign(forge(plan_of(ASKED[name])), ASKED[name])
    assert set(failed(result)) & {"recipe", "plan"}, result["checks"]
    assert "ledger" not in failed(result) and "epsilon" not in failed(result)
    with pytest.raises(VerificationFailed) as error:
        verify.require_valid(result)
    assert error.value.exit_code == 4


def test_what_a_recipe_says_of_a_plan_of_steps_is_what_the_tests_think():
    plan = plan_of(ASKED["steps"])
    assert (
        isinstance(plan, DpSgd)
        and recomputed.problems(
            {"privacy": {**WHOM, **asked(plan)}, "training": {"steps": 800, "expected_batch_size": 2048}}, plan
        )
        == []
    )
    assert isinstance(plan_of(ASKED["mean"]), MeanEmbedding)
