"""The bundle of a federation: the ledger of every site, each held against its row of the claim, and all against the recipe."""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.release.test_verify import change, failed, names, resign, rewrite_card

from sfumato import recipe, reports
from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation import mechanism_settings as of
from sfumato.federation import mechanisms, rounds
from sfumato.federation.settings import BySize, Everyone, FederationSettings, Uniform
from sfumato.federation.site_plans import site_plans
from sfumato.federation.update_plans import ldp_fl, remade
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.joint import Spent, of_sites
from sfumato.privacy.ledger import Ledger, export_jsonl
from sfumato.privacy.plan import Composition, DpSgd
from sfumato.privacy.settings import PrivacySettings, WarmStartSettings
from sfumato.privacy.site_updates import SiteUpdates
from sfumato.recipes import named
from sfumato.release import bundle, card, gate, keys, page, verify
from sfumato.release.recomputed import problems_of_sites
from sfumato.release.settings import ReleaseSettings

UNITS = {"north": 12_000, "river": 9_000, "hill": 800, "idle": 400}
WIDTH = 50
SETTINGS = PrivacySettings(
    unit="person",
    records_per_unit=4,
    epsilon=8.0,
    warm_start=WarmStartSettings(share=0.6),
)
ROUNDS = FederationSettings(sites=4, rounds=4, local_steps=20)


@pytest.fixture(scope="session")
def _federated(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    return make(make_run(tmp_path_factory.mktemp("federated") / "case" / "v1", federation=True))


@pytest.fixture
def federated(_federated: Path, tmp_path: Path) -> Path:
    """A finished federated run, to be changed at will."""
    return Path(shutil.copytree(_federated, tmp_path / "case" / "v1"))


@pytest.fixture(scope="session")
def _bundle(_federated: Path, tmp_path_factory: pytest.TempPathFactory, signer: Path) -> Path:
    return bundle.write(_federated, tmp_path_factory.mktemp("bundle") / "bundle", keys.own(signer))


@pytest.fixture
def released(_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_bundle, tmp_path / "bundle"))


def make(folder: Path) -> Path:
    """Makes of a run one of four sites."""
    (folder / "ledger.db").unlink()
    whole = recipe.to_mapping(named("hospitals"))
    whole["training"]["expected_batch_size"] = 400
    whole["privacy"] = recipe_section(PrivacySettings, SETTINGS)
    whole["federation"] = recipe_section(FederationSettings, ROUNDS)
    (folder / "resolved.yaml").write_text(yaml.safe_dump(whole))
    make_sites(folder, UNITS)
    cost = json.loads((folder / "reports/cost.json").read_text())
    (folder / "reports/cost.json").write_text(json.dumps({**cost, "steps": 240}))
    return folder


def make_sites(
    folder: Path, units: dict[str, int], *, run: str = "v1", late: str = "hill", idle: str = "idle", only: str = ""
) -> None:
    """Ledgers and claim. Args: late: silent before the first round; idle: never took part; only: of it alone."""
    shutil.rmtree(folder / "sites", ignore_errors=True)
    plans = site_plans(SETTINGS, ROUNDS, units, expected_batch_size=400, released=dict.fromkeys(units, WIDTH))
    spent = {}
    for number, (name, plan) in enumerate(plans.items(), start=1):
        assert isinstance(plan, Composition) and isinstance(plan.stages[1], DpSgd)
        events = () if name == idle else plan.events()[1:] if name == late else plan.events()
        place = folder / "sites" / f"site-{number}" / "ledger.db"
        if events and only in ("", name):
            place.parent.mkdir(parents=True)
            with Ledger.open(place, run=run, plan=plan) as ledger:
                for event in events:
                    ledger.commit(ledger.reserve(event, step=0))
        spent[name] = Spent(plan=plan, events=events, ledger=f"ledgers/site-{number}.jsonl")
    claim = of_sites(
        spent, boundary=["Inside: every step at every site."], trust_model="local: each site adds its noise"
    )
    (folder / "reports/privacy.json").write_text(json.dumps(reports.to_dict(claim)))


def recipe_section(kind: Any, value: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind).dump_python(value, mode="json")


def test_every_sites_ledger_is_in_the_bundle_and_a_stranger_recomputes_each(released: Path, public_key: Path) -> None:
    result = verify.verify(released, key_file=public_key)
    assert failed(result) == {}
    assert [name for name in names(released) if "ledger" in name] == [f"ledgers/site-{n}.jsonl" for n in (1, 2, 3)]
    claim = json.loads((released / "privacy.json").read_text())
    assert result["epsilon"] == claim["epsilon"] == max(row["epsilon"] or 0 for row in claim["sites"])
    assert claim["population"] == sum(UNITS.values()) and claim["delta"] < 1 / claim["population"]
    details = {check["name"]: check["detail"] for check in result["checks"]}
    assert details["ledger"] == "242 events of 243 planned, in 3 ledgers of 4 sites; every chain is whole"
    assert "the largest of the sites'" in details["epsilon"]
    text = (released / "README.md").read_text()
    assert (
        "It was trained at 4 sites" in text and "| hill | 800 |" in text and "| idle | 400 | nothing | none |" in text
    )
    assert json.loads((released / "cost.json").read_text())["expected_units_processed"] is None


def _epsilon_of_hill(value: Any) -> None:
    value["sites"][2]["epsilon"] -= 0.5


@pytest.mark.parametrize(
    ("name", "edit", "check", "says"),
    [
        ("privacy.json", _epsilon_of_hill, "epsilon", "ledgers/site-3.jsonl: the claim is"),
        ("privacy.json", lambda v: v["sites"][0].update(epsilon=v["epsilon"] + 1), "reports", "at most the claim"),
        ("privacy.json", lambda v: v["sites"][0].update(epsilon=None, ledger=None), "reports", "its own ledger among"),
        ("privacy.json", lambda v: v["sites"][3].update(epsilon=0.1), "reports", "an epsilon of at most the claim and a ledger"),
        ("privacy.json", lambda v: v["sites"].pop(3), "ledger", "population"),
        ("privacy.json", lambda v: v["sites"].pop(0), "reports", "among the files"),
        ("privacy.json", lambda v: v["sites"].clear(), "reports", "among the files"),
        ("privacy.json", lambda v: v.pop("sites"), "reports", "among the files"),
        ("privacy.json", lambda v: v["sites"][1].update(name="north"), "reports", "its own name"),
        ("privacy.json", lambda v: v["sites"][1].update(name=""), "reports", "a name"),
        ("privacy.json", lambda v: v["sites"][1].update(ledger="ledgers/site-1.jsonl"), "reports", "its own ledger"),
        ("privacy.json", lambda v: v["sites"][1].update(ledger=7), "reports", "a ledger"),
        ("privacy.json", lambda v: v["sites"][1].update(population=9_001), "ledger", "site-2.jsonl: population"),
        ("privacy.json", lambda v: v["sites"][1].update(population="9000"), "reports", "population of site"),
        ("privacy.json", lambda v: v["sites"][1].update(steps=3), "reports", "each of the sites must have"),
        ("privacy.json", lambda v: v["sites"][1]["mechanism"].update(events_spent=1), "ledger", "site-2.jsonl: events_spent"),
        ("privacy.json", lambda v: v["sites"][1].update(mechanism=None), "reports", "a mechanism"),
        ("privacy.json", lambda v: v["sites"][3]["mechanism"].update(events_spent=7), "recipe", "'idle', which has spent nothing"),
        ("privacy.json", lambda v: v["sites"][3]["mechanism"]["stages"][1].update(noise_multiplier=9.0), "recipe", "noise_multiplier"),
        ("privacy.json", lambda v: v["sites"][3].update(mechanism={"stages": 7}), "recipe", "'idle', which has spent nothing"),
        ("privacy.json", lambda v: v.update(sites=[7]), "reports", "each of the sites"),
        ("privacy.json", lambda v: v.update(sites={}), "reports", "each of the sites"),
        ("privacy.json", lambda v: v.update(population=sum(UNITS.values()) + 1), "ledger", "population"),
        ("privacy.json", lambda v: v.update(delta=v["delta"] * 1.01), "ledger", "delta"),
        ("privacy.json", lambda v: v["curve"][3].__setitem__(1, v["curve"][3][1] - 0.1), "epsilon", "curve"),
        ("privacy.json", lambda v: v["mechanism"]["stages"][1].update(noise_multiplier=9.0), "ledger", "mechanism"),
        ("cost.json", lambda v: v.update(steps=241), "ledger", "241 steps were trained"),
        ("provenance.json", lambda v: v["recipe"]["federation"].update(rounds=5), "recipe", "site 'north'"),
        ("provenance.json", lambda v: v["recipe"]["federation"].update(sites=3), "recipe", "other sites"),
        ("provenance.json", lambda v: v["recipe"]["federation"].update(populations=[9, 8, 7, 6]), "recipe", "other numbers of units"),
        ("provenance.json", lambda v: v["recipe"]["federation"].update(populations=list(UNITS.values())), "recipe", "population_from_data"),
        ("provenance.json", lambda v: v["recipe"]["federation"].update(mechanism={"kind": "central"}), "recipe", "no plans"),
        ("provenance.json", lambda v: v["recipe"]["federation"].update(surprise=1), "recipe", "federation.surprise"),
        ("provenance.json", lambda v: v["recipe"].pop("federation"), "recipe", "no section of a recipe"),
        ("provenance.json", lambda v: v["recipe"]["training"].update(expected_batch_size=800), "recipe", "expected_batch_size"),
        ("provenance.json", lambda v: v["recipe"]["privacy"]["warm_start"].update(share=0.5), "recipe", "noise_multiplier"),
    ],
)  # fmt: skip
def test_a_false_claim_of_a_site_is_refused_even_when_it_is_signed(
    name: str, edit: Callable[[Any], None], check: str, says: str, released: Path, signer: Path, public_key: Path
) -> None:
    change(released, name, edit)
    with contextlib.suppress(KeyError, AttributeError, TypeError, ValueError):  # some claims cannot even be printed
        rewrite_card(released)  # so that what is found is not merely that the card differs
    resign(released, signer)
    wrong = failed(verify.verify(released, key_file=public_key))
    assert says in wrong.get(check, ""), wrong


def test_the_card_must_have_the_sites_of_the_claim_and_no_others(
    released: Path, signer: Path, public_key: Path
) -> None:
    text = (released / "README.md").read_text()
    (released / "README.md").write_text(text.replace("| river | 9,000 |", "| river | 90,000 |"))
    resign(released, signer)
    assert "its table of sites" in failed(verify.verify(released, key_file=public_key))["card"]
    start, end = text.index(card.SITES_START), text.index(card.SITES_END)
    (released / "README.md").write_text(text[:start] + text[end + len(card.SITES_END) :])
    resign(released, signer)
    assert "its table of sites" in failed(verify.verify(released, key_file=public_key))["card"]


def test_a_ledger_that_lacks_events_that_nobody_signed_or_that_is_anothers_is_refused(
    released: Path, federated: Path, signer: Path, public_key: Path
) -> None:
    file = released / "ledgers" / "site-2.jsonl"
    kept = file.read_text()
    lines = kept.split("\n")
    file.write_text("\n".join([*lines[:-2], ""]))
    resign(released, signer)
    assert "site-2.jsonl" in failed(verify.verify(released, key_file=public_key))["ledger"]
    file.write_text(export_jsonl(federated / "sites" / "site-2" / "ledger.db"))  # whole, but without a signature
    resign(released, signer)
    assert "nobody signed the ledger of site 'river'" in failed(verify.verify(released, key_file=public_key))["ledger"]
    file.write_text((released / "ledgers" / "site-1.jsonl").read_text())
    resign(released, signer)
    assert "site-2.jsonl: " in failed(verify.verify(released, key_file=public_key))["ledger"]


def test_two_sites_cannot_show_one_ledger_nor_one_that_is_of_another_run(
    federated: Path, signer: Path, public_key: Path, tmp_path: Path
) -> None:
    units = {"north": 9_000, "river": 9_000, "hill": 800, "idle": 400}  # so that the plans of two are the same
    make_sites(federated, units)
    out = bundle.write(federated, tmp_path / "out", keys.own(signer))
    kept = (out / "ledgers/site-2.jsonl").read_bytes()
    (out / "ledgers/site-2.jsonl").write_bytes((out / "ledgers/site-1.jsonl").read_bytes())
    resign(out, signer)
    wrong = failed(verify.verify(out, key_file=public_key))
    assert "site-2.jsonl: is the same ledger as ledgers/site-1.jsonl" in wrong["ledger"]
    (out / "ledgers/site-2.jsonl").write_bytes(kept)
    resign(out, signer)
    assert failed(verify.verify(out, key_file=public_key)) == {}
    shutil.rmtree(federated / "sites")
    make_sites(federated, units, run="v2", only="river")
    text = export_jsonl(federated / "sites/site-2/ledger.db", sign=keys.signer(keys.own(signer)))
    (out / "ledgers/site-2.jsonl").write_text(text)
    resign(out, signer)
    wrong = failed(verify.verify(out, key_file=public_key))
    assert "site-2.jsonl: is of run 'v2', ledgers/site-1.jsonl of 'v1'" in wrong["ledger"]


def test_a_bundle_has_one_ledger_or_those_of_sites_and_no_third_kind(
    released: Path, signer: Path, public_key: Path
) -> None:
    shutil.copy(released / "ledgers" / "site-1.jsonl", released / "ledger.jsonl")
    resign(released, signer)
    assert "must hold ledger.jsonl, or in its place" in failed(verify.verify(released, key_file=public_key))["layout"]
    (released / "ledger.jsonl").unlink()
    shutil.copy(released / "ledgers" / "site-1.jsonl", released / "ledgers" / "site-0.jsonl")
    resign(released, signer)
    assert "site-0.jsonl" in failed(verify.verify(released, key_file=public_key))["layout"]


def test_the_gate_looks_at_every_ledger(federated: Path) -> None:
    def codes() -> list[str]:
        return [reason["code"] for reason in gate.check(federated, ReleaseSettings())[1]]

    assert codes() == []
    claim = json.loads((federated / "reports/privacy.json").read_text())
    lower = {**claim, "sites": [{**row, "epsilon": row["epsilon"] and row["epsilon"] / 2} for row in claim["sites"]]}
    (federated / "reports/privacy.json").write_text(json.dumps(lower))
    assert codes() == ["ledger_above_claim"] * 3
    (federated / "reports/privacy.json").write_text(json.dumps(claim))
    (federated / "sites/site-2/ledger.db").unlink()
    assert codes() == ["no_ledger"]
    values = yaml.safe_load((federated / "resolved.yaml").read_text())
    values["model"]["objective"] = {"kind": "prompts"}
    (federated / "resolved.yaml").write_text(yaml.safe_dump(values))
    assert codes() == ["prompts", "no_ledger"]


def test_nothing_is_written_where_a_site_gave_its_claim_away(federated: Path, tmp_path: Path, signer: Path) -> None:
    claim = json.loads((federated / "reports/privacy.json").read_text())
    claim["sites"][0]["population"] += 1
    (federated / "reports/privacy.json").write_text(json.dumps(claim))
    with pytest.raises(PrivacyRefused, match=r"own verification: ledger: ledgers/site-1\.jsonl: population"):
        bundle.write(federated, tmp_path / "out", keys.own(signer))
    assert not (tmp_path / "out").exists()


def test_the_page_shows_the_steps_of_the_site_that_spent_most(federated: Path) -> None:
    values = page.as_json(federated, public=True)
    assert values["trajectory"][-1][1] == pytest.approx(values["guarantee"]["epsilon"], abs=1e-6)
    assert values["guarantee"]["sites"][0]["name"] == "north"


# ---- whole sites as the unit ----

FORMS = {
    "update_level": of.UpdateLevel(epsilon=8.0, max_update_norm=0.5),
    "fed_lora": of.FedLora(noise_multiplier=12.0),
    "central": of.Central(epsilon=8.0, max_update_norm=0.5),
    "local_and_global": of.LocalAndGlobal(epsilon=8.0, server_epsilon=6.0),
    "ldp_fl": of.LdpFl(epsilon=8.0),
    "distributed": of.Distributed(epsilon=8.0, dropouts=1),
}
SITES = {"north": 12_000, "river": 9_000, "hill": 800}


def settings_of(form: str) -> FederationSettings:
    drawn = Uniform(rate=0.5) if form == "central" else Everyone()
    return FederationSettings(sites=3, rounds=4, local_steps=5, mechanism=FORMS[form], selection=drawn, weights="equal")


def plan_of(form: str) -> SiteUpdates:
    """As the mechanism itself makes it, of a model of 1,000 numbers in eight matrices."""
    names = [f"layer{number}.lora_{side}" for number in range(4) for side in "AB"]
    held = {site: dict.fromkeys(names, (25, 5)) for site in SITES}
    settings = settings_of(form)
    promise = mechanisms.build(settings).promise(rounds.make_public(settings, SITES, held))
    plan = promise.at_site or promise.at_server
    assert plan is not None
    return plan


@pytest.fixture
def whole_sites(make_run: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """make(form): a finished run of three sites."""

    def write(form: str) -> Path:
        folder = make_run(tmp_path / form / "v1", federation=True)
        (folder / "ledger.db").unlink()
        values = recipe.to_mapping(named("hospitals"))
        values["privacy"] = recipe_section(PrivacySettings, PrivacySettings(mechanism="none"))
        values["federation"] = recipe_section(FederationSettings, settings_of(form))
        (folder / "resolved.yaml").write_text(yaml.safe_dump(values))
        plan, spent = plan_of(form), {}
        places = (
            {"": "server"} if form == "central" else {name: f"sites/site-{n}" for n, name in enumerate(SITES, start=1)}
        )
        for name, place in places.items():
            (folder / place).mkdir(parents=True)
            with Ledger.open(folder / place / "ledger.db", run="v1", plan=plan) as ledger:
                ledger.commit(ledger.reserve(plan.event(), step=0))
            spent[name] = Spent(plan=plan, events=plan.events(), ledger=f"ledgers/{Path(place).name}.jsonl")
        claim = (
            guarantee(plan, plan.events(), boundary=["Inside: the sum of every round."], trust_model="central")
            if form == "central"
            else of_sites(spent, boundary=["Inside: every update."], trust_model="local")
        )
        (folder / "reports/privacy.json").write_text(json.dumps(reports.to_dict(claim)))
        cost = json.loads((folder / "reports/cost.json").read_text())
        (folder / "reports/cost.json").write_text(json.dumps({**cost, "parameters": 1_000}))
        return folder

    return write


@pytest.mark.parametrize("form", FORMS)
def test_a_federation_whose_unit_is_the_site_is_verified_from_its_recipe_too(
    form: str, whole_sites: Callable[[str], Path], signer: Path, public_key: Path, tmp_path: Path
) -> None:
    out = bundle.write(whole_sites(form), tmp_path / "out", keys.own(signer))
    result = verify.verify(out, key_file=public_key)
    assert failed(result) == {}
    assert result["epsilon"] == pytest.approx(plan_of(form).epsilon(), abs=1e-6)
    assert (out / "ledger.jsonl").is_file() == (form == "central")
    kept = (out / "provenance.json").read_bytes()
    noise = "noise_multiplier" if form == "fed_lora" else "epsilon"
    for where, edit in {
        "rounds": lambda v: v["recipe"]["federation"].update(rounds=5),
        "noise": lambda v: v["recipe"]["federation"]["mechanism"].update({noise: 9.0}),
        "adjacency": lambda v: v["recipe"]["federation"]["mechanism"].update(
            adjacency="replace_one" if form == "central" else "zero_out"
        ),
        "delta": lambda v: v["recipe"]["federation"]["mechanism"].update(delta=2e-5),
        "steps": lambda v: v["recipe"]["privacy"].update(mechanism="dp_sgd", epsilon=0.1),
        "sites": lambda v: v["recipe"]["federation"].update(sites=4),
        "kind": lambda v: v["recipe"]["federation"].update(mechanism={"kind": "record_level"}),
        "bound": lambda v: v["recipe"]["federation"]["mechanism"].update(BOUNDS.get(form, {"max_update_norm": 0.7})),
        "rate": lambda v: v["recipe"]["federation"].update(selection={"kind": "uniform", "rate": 0.4}),
    }.items():
        if (form, where) in SAYS_NOTHING:
            continue
        (out / "provenance.json").write_bytes(kept)
        change(out, "provenance.json", edit)
        resign(out, signer)
        wrong = failed(verify.verify(out, key_file=public_key))
        assert "plan" in wrong or "recipe" in wrong, where


def test_of_whole_sites_none_can_be_left_out(
    whole_sites: Callable[[str], Path], signer: Path, public_key: Path, tmp_path: Path
) -> None:
    """The others say that there were three; the one that spent most is gone, and with it the claim that it was less private."""
    out = bundle.write(whole_sites("update_level"), tmp_path / "out", keys.own(signer))
    (out / "ledgers/site-3.jsonl").unlink()
    change(out, "privacy.json", lambda v: v["sites"].pop(2))
    rewrite_card(out)
    resign(out, signer)
    assert "number of sites: the claim says 2" in failed(verify.verify(out, key_file=public_key))["ledger"]
    change(
        out,
        "privacy.json",
        lambda v: v["sites"].append(
            {**v["sites"][1], "name": "hill", "ledger": None, "epsilon": None, "population": 7}
        ),
    )
    rewrite_card(out)
    resign(out, signer)
    assert "population of 'hill': the claim says 7" in failed(verify.verify(out, key_file=public_key))["ledger"]


BOUNDS = {"ldp_fl": {"epsilon": 7.0}}
# A plan of fed_lora has a bound of its own for each matrix and says their number only; rates are of the central mechanism.
SAYS_NOTHING = {("fed_lora", "bound"), *((form, "rate") for form in FORMS if form != "central")}


def test_all_sites_have_one_plan_of_whole_updates_also_where_the_recipe_does_not_say_it() -> None:
    """How many numbers an update has is taken from the ledgers: a site that says fewer would have spent less."""
    settings = settings_of("ldp_fl")
    values = {"federation": recipe_section(FederationSettings, settings)}
    plan = plan_of("ldp_fl")
    assert isinstance(settings.mechanism, of.LdpFl)
    fewer = ldp_fl(settings.mechanism, 3, 4, 1)
    assert problems_of_sites(values, dict.fromkeys(SITES, plan), SITES, {}) == []
    assert (
        problems_of_sites(values, dict.fromkeys(SITES, fewer), SITES, {}) == []
    )  # which nobody can know without the model
    (wrong,) = problems_of_sites(values, {**dict.fromkeys(SITES, plan), "hill": fewer}, SITES, {})
    assert wrong == "site 'hill': its plan is another than that of 'north', and all have one"


def test_a_whole_site_that_was_never_drawn_is_idle(
    whole_sites: Callable[[str], Path], signer: Path, public_key: Path, tmp_path: Path
) -> None:
    folder = whole_sites("update_level")
    shutil.rmtree(folder / "sites/site-3")
    plan = plan_of("update_level")
    spent = {
        name: Spent(plan=plan, events=plan.events(), ledger=f"ledgers/site-{n}.jsonl")
        for n, name in enumerate(SITES, start=1)
    }
    claim = of_sites(
        {**spent, "hill": replace(spent["hill"], events=())}, boundary=["Inside: every update."], trust_model="local"
    )
    (folder / "reports/privacy.json").write_text(json.dumps(reports.to_dict(claim)))
    out = bundle.write(folder, tmp_path / "out", keys.own(signer))
    assert failed(verify.verify(out, key_file=public_key)) == {}
    change(out, "privacy.json", lambda v: v["sites"][2]["mechanism"].update(rounds_spent=3))
    rewrite_card(out)
    resign(out, signer)
    wrong = failed(verify.verify(out, key_file=public_key))
    assert "site 'hill', which has spent nothing: rounds_spent: the recipe makes 0" in wrong["recipe"]


def test_keys_of_sites_that_are_one_are_counted_once(
    released: Path, federated: Path, signer: Path, public_key: Path
) -> None:
    one = keys.SigningKey.generate()
    for number in (1, 2):
        text = export_jsonl(federated / f"sites/site-{number}/ledger.db", sign=keys.signer(one))
        (released / f"ledgers/site-{number}.jsonl").write_text(text)
    change(released, "privacy.json", lambda v: v["sites"][0].update(key=one.public.raw.hex()))
    change(released, "privacy.json", lambda v: v["sites"][1].update(key=one.public.raw.hex()))
    resign(released, signer)
    result = verify.verify(released, key_file=public_key)
    assert failed(result) == {}
    details = {check["name"]: check["detail"] for check in result["checks"]}
    assert details["ledger"].endswith("; 2 signed by their sites with 1 key, 0 of them with keys that you trust")


def test_where_every_number_is_charged_all_that_were_trained_must_be(
    whole_sites: Callable[[str], Path], signer: Path, public_key: Path, tmp_path: Path
) -> None:
    """A plan of one number would claim a thousandth of what a thousand cost."""
    out = bundle.write(whole_sites("ldp_fl"), tmp_path / "out", keys.own(signer))
    change(out, "cost.json", lambda v: v.update(parameters=1_001))
    rewrite_card(out)
    resign(out, signer)
    wrong = failed(verify.verify(out, key_file=public_key))
    assert (
        wrong == {"recipe": wrong["recipe"]} and "1001 numbers were trained, the plan charges 1000" in wrong["recipe"]
    )
    change(out, "provenance.json", lambda v: v["recipe"]["federation"].update(home=["layer0"]))
    resign(out, signer)
    assert failed(verify.verify(out, key_file=public_key)) == {}


def test_what_a_run_does_not_tell_its_card_does_not_either(
    whole_sites: Callable[[str], Path], signer: Path, tmp_path: Path
) -> None:
    """Of a draw by secret coins: steps, seconds and memory are what more sites would make more."""
    folder = whole_sites("central")
    cost = json.loads((folder / "reports/cost.json").read_text())
    hidden = dict.fromkeys(("steps", "seconds", "processor_seconds", "peak_bytes", "units_per_second", "bytes_sent"))
    (folder / "reports/cost.json").write_text(json.dumps({**cost, **hidden}))
    text = (bundle.write(folder, tmp_path / "out", keys.own(signer)) / "README.md").read_text()
    assert "a number of steps that is not told, " in text and "None" not in text


def test_of_a_selection_by_size_the_recipe_must_say_the_sizes() -> None:
    by_size = replace(settings_of("central"), selection=BySize(expected_sites=2))
    with pytest.raises(UsageError, match="by_size · asks by numbers of units that the recipe does not say"):
        remade(by_size, plan_of("central"), None)
    assert remade(by_size, plan_of("central"), {"a": 1, "b": 1, "c": 2}).sampling_rate == 1.0
