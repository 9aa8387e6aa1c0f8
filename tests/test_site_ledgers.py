"""Ledgers of sites on other machines: asked for after the last round, believed no further than they can be checked, released."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.release.test_verify import change, resign
from tests.test_machines import VALUES

from sfumato import federated_reports, federating, machines, site_ledgers, stages
from sfumato import recipe as recipes_file
from sfumato.errors import LedgerError, PrivacyRefused
from sfumato.federation.messages import Ask, Reply
from sfumato.federation.processes import Status
from sfumato.privacy.ledger import Ledger, export_jsonl, read_jsonl
from sfumato.privacy.plan import DpSgd
from sfumato.release import bundle, gate, keys, verify
from sfumato.release.settings import ReleaseSettings
from sfumato.training.folder import RunFolder

PLAN = DpSgd(population=500, expected_batch_size=20.0, steps=6, noise_multiplier=2.0, delta=1e-4, unit="person")
NAMES = ("north", "south")
RELEASE = ReleaseSettings(require_audit=False, max_epsilon=100)


@pytest.fixture
def exported(tmp_path):
    """make(events, plan=, sign=): the text of a ledger of so many steps, and the key."""

    def make(events: int, *, plan: DpSgd = PLAN, sign: bool = True) -> tuple[str, keys.PublicKey]:
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}.db"
        key = keys.SigningKey.generate()
        with Ledger.open(place, run="r/v1", plan=plan) as ledger:
            ledger.commit(ledger.reserve(plan.event(events), step=0))
        return export_jsonl(place, sign=keys.signer(key) if sign else None), key.public

    return make


def reply(values: dict[str, Any]) -> Reply:
    return Reply(site="north", run="r/v1", round=4, exchange=0, kind=site_ledgers.KIND, values=values)


def test_a_ledger_of_the_right_plan_that_its_site_signed_is_taken(exported):
    text, key = exported(4)
    found = site_ledgers.read(reply(dict(site_ledgers.values_of(text, key))), PLAN, run="r/v1", least=[PLAN.event(4)])
    assert isinstance(found, site_ledgers.Given)
    assert found.events == [PLAN.event(4)] and found.key == key.raw.hex() and found.text == text


def test_one_that_charges_less_than_was_used_is_unsigned_changed_or_of_another_plan_is_not(exported):
    text, key = exported(4)
    unsigned, _ = exported(4, sign=False)
    other, its = exported(4, plan=replace(PLAN, noise_multiplier=1.0))
    named = dict(site_ledgers.values_of(text, key))
    earlier = [
        PLAN.event(1),
        replace(PLAN.event(1), noise_multiplier=9.0),
    ]  # a release that was used and is not in the ledger
    for values, least, why in (
        (named, 5, "charges 4 events (poisson_gaussian), and 5 were used"),
        (named, earlier, "charges 0 events (poisson_gaussian), and 1 were used"),
        ({**named, "ledger": unsigned}, 4, "not signed"),
        ({**named, "ledger": text.replace('"count":4', '"count":3')}, 1, "ledger.jsonl"),
        ({**named, "key": its.raw.hex()}, 4, "key"),
        ({**named, "key": "zz"}, 4, "64 hexadecimal"),
        (dict(site_ledgers.values_of(other, its)), 4, "another plan"),
        ({**named, "ledger": "x" * (site_ledgers.MAX_TEXT + 1)}, 4, "no text of at most"),
        ({}, 4, "no text of at most"),
    ):
        used = [PLAN.event(least)] if isinstance(least, int) else least
        found = site_ledgers.read(reply(values), PLAN, run="r/v1", least=used)
        assert isinstance(found, str) and why in found, (why, found)
    found = site_ledgers.read(reply(named), PLAN, run="r/v2", least=[])
    assert isinstance(found, str) and "of another run, 'r/v1'" in found
    assert site_ledgers.read(None, PLAN, run="r/v1", least=[]) == "it was silent"
    ask = Ask(run="r/v1", round=4, exchange=0, kind=site_ledgers.KIND)
    assert site_ledgers.read(Reply.no(ask, "north", "may_not_say", "no"), PLAN, run="r/v1", least=[]) == "no"


def test_a_kept_ledger_that_was_changed_is_said_to_be_so(exported, tmp_path):
    text, key = exported(4)
    file = tmp_path / "ledger.json"
    file.write_text(json.dumps(site_ledgers.values_of(text, key)))
    assert site_ledgers.load(file, PLAN, run="r/v1").events == [PLAN.event(4)]
    file.write_text(file.read_text().replace("repeat", "repaat"))
    with pytest.raises(LedgerError, match="is not the ledger that the site gave"):
        site_ledgers.load(file, PLAN, run="r/v1")


class Network:
    """Sites with a folder, an account and a key of their own each, and a server that reaches them by messages alone."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.said: list[str] = []
        self.recipe = recipes_file.from_mapping(
            {
                **VALUES,
                "evaluation": {"samples": 20, "judge_seconds": 1},
                "release": {"require_audit": False, "max_epsilon": 100},
            }
        )
        self.statuses: list[Status] = []
        self.members = {name: self._member(name, number) for number, name in enumerate(NAMES, start=1)}

    def at(self, name: str) -> None:
        """From now on this machine is that of ``name``."""
        for kind in ("DATA", "CONFIG", "CACHE"):
            self._patch.setenv(f"XDG_{kind}_HOME", str(self.folder / name / kind.lower()))

    def policy(self, name: str, **values: Any) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(values))

    def _member(self, name: str, number: int) -> machines.Member:
        place = self.folder / name
        place.mkdir(parents=True)
        self.policy(name)
        self.statuses.append(Status(place))
        return machines.Member(
            place,
            policy=self.folder / f"{name}.yaml",
            data=None,
            population=None,
            share=(number, 2),
            told=self.statuses[-1],
        )

    def exchange(self, asked: dict[str, Ask]) -> dict[str, Reply]:
        replies = {}
        for name, ask in asked.items():
            self.at(name)
            replies[name] = Reply.from_arrays(*self.members[name].answer(Ask.from_arrays(*ask.to_arrays())).to_arrays())
        self.at("server")
        return replies

    def federate(self, *, resume: Path | None = None) -> Path:
        def ask(kind: str, run: str, **values: Any) -> dict[str, Ask]:
            return {
                name: Ask(run=run, round=1, exchange=0, kind=kind, values={**values, "site": name}) for name in NAMES
            }

        self.at("server")
        text = recipes_file.to_yaml(self.recipe)
        joined = self.exchange(ask("join", self.recipe.name, recipe=text))
        populations: Any = {name: joined[name].values["population"] for name in NAMES}

        @contextmanager
        def engine(members, work, folder):
            self.exchange(ask("begin", folder.name, populations=populations))
            yield self.exchange

        answer = federating.run(
            self.recipe,
            out=self.folder / "runs",
            progress=self.said.append,
            resume=None if resume is None else RunFolder(resume),
            engine=engine,
            members=machines._members_elsewhere(self.recipe, populations),
            prepared=stages.load(self.recipe),
        )
        return Path(answer["run"])


@pytest.fixture
def network(tmp_path, monkeypatch):
    made = Network(tmp_path, monkeypatch)
    yield made
    for told in made.statuses:
        told.close()


def reasons(run: Path) -> list[str]:
    return [one["code"] for one in gate.check(run, RELEASE)[1]]


def test_a_federation_of_machines_is_released_with_the_ledgers_that_its_sites_signed(network, tmp_path):
    run = network.federate()
    claim = json.loads((run / "reports/privacy.json").read_text())
    for number, (name, row) in enumerate(zip(NAMES, claim["sites"], strict=True), start=1):
        at_site = network.folder / name / "runs" / claim_run(run) / "ledger.db"
        assert (row["name"], row["ledger"]) == (name, f"ledgers/site-{number}.jsonl")
        assert row["key"] == keys.read_public(network.folder / name / "config/sfumato/signing-key.pub.pem").raw.hex()
        kept = json.loads((run / "sites" / f"site-{number}" / "ledger.json").read_text())
        assert read_jsonl(kept["ledger"]).head == read_jsonl(export_jsonl(at_site)).head
    assert not any("counted as charged" in sentence for sentence in claim["boundary"])
    assert any(
        sentence.startswith("Outside: other runs on the same people at north, south;") for sentence in claim["boundary"]
    )
    sites = json.loads((run / "reports/federation.json").read_text())["sites"]
    assert [site["epsilon"] for site in sites] == [row["epsilon"] for row in claim["sites"]]
    assert reasons(run) == []
    key = keys.own(tmp_path / "key")
    out = bundle.write(run, tmp_path / "bundle", key, settings=RELEASE)
    result = verify.verify_with(out, {key.public.id: key.public})
    assert result["valid"], result["checks"]
    details = {check["name"]: check["detail"] for check in result["checks"]}
    assert details["ledger"].endswith("; 2 signed by their sites, 0 of them with keys that you trust")
    north = keys.read_public(network.folder / "north/config/sfumato/signing-key.pub.pem")
    known = verify.verify_with(out, {key.public.id: key.public, north.id: north})
    assert any("2 signed by their sites, 1 of them" in check["detail"] for check in known["checks"])
    _exchanged(out, key)


def claim_run(run: Path) -> str:
    return f"{run.parent.name}/{run.name}"


def _exchanged(out: Path, key: keys.SigningKey) -> None:
    """The signer of the bundle cannot put its own signature in the place of a site's."""
    claim = json.loads((out / "privacy.json").read_text())
    ids = {keys.PublicKey(bytes.fromhex(row["key"])).id for row in claim["sites"]}
    assert len(ids) == 2 and key.public.id not in ids
    details = {
        check["name"]: check["detail"] for check in verify.verify_with(out, {key.public.id: key.public})["checks"]
    }
    assert "with 1 key" not in details["ledger"]
    change(out, "privacy.json", lambda v: v["sites"][0].update(key=v["sites"][1]["key"]))
    folder = out.parent / "key"
    resign(out, folder)
    wrong = verify.verify_with(out, {key.public.id: key.public})
    assert not wrong["valid"]
    assert any(c["name"] == "ledger" and not c["ok"] and "site-1.jsonl" in c["detail"] for c in wrong["checks"])


def test_a_site_that_keeps_its_ledger_costs_the_bundle_not_the_run_and_may_give_it_later(network):
    network.policy("south", may_say=["steps", "charged"])
    run = network.federate()
    claim = json.loads((run / "reports/privacy.json").read_text())
    assert [(row["ledger"], row["key"] is None) for row in claim["sites"]] == [
        ("ledgers/site-1.jsonl", False),
        (None, True),
    ]
    assert any("Without a ledger from south" in sentence for sentence in claim["boundary"])
    assert any("site south gave no ledger: may_say" in line for line in network.said)
    assert reasons(run) == ["no_ledger"]
    cost = (run / "reports/cost.json").read_bytes()
    assert federated_reports.lacks_ledgers(RunFolder(run))
    network.policy("south", may_say=["steps", "charged", "ledger"])
    assert network.federate(resume=run) == run
    again = json.loads((run / "reports/privacy.json").read_text())
    assert (
        again["epsilon"] == claim["epsilon"] and [row["ledger"] for row in again["sites"]][1] == "ledgers/site-2.jsonl"
    )
    assert (run / "reports/cost.json").read_bytes() == cost and reasons(run) == []
    shutil.copy(
        run / "sites/site-1/ledger.json", run / "sites/site-2/ledger.json"
    )  # another site's, found by the bundle itself
    with pytest.raises(PrivacyRefused, match=r"own verification: ledger: ledgers/site-2\.jsonl"):
        bundle.write(run, run / "bundle", keys.own(run / "key"), settings=RELEASE)
    assert not (run / "bundle").exists()


def of_updates(network: Network, kind: str, *, rate: float = 1.0) -> None:
    """The federation of the network has a mechanism whose unit is the site."""
    noise = "epsilon_per_weight" if kind == "ldp_fl" else "noise_multiplier"
    mechanism = {"kind": kind, noise: 0.01 if kind == "ldp_fl" else 3.0, "delta": 0.01}
    network.recipe = recipes_file.from_mapping(
        {
            **recipes_file.to_mapping(network.recipe),
            "privacy": {"mechanism": "none"},
            "federation": {
                **VALUES["federation"],
                "mechanism": mechanism,
                "selection": {"kind": "uniform", "rate": rate},
                "weights": "equal",
            },
        }
    )
    for name in NAMES:
        network.policy(name, allowed_mechanisms=[kind])


def test_where_the_server_of_machines_adds_the_noise_its_ledger_is_the_one_and_no_site_is_asked_for_another(
    network, tmp_path
):
    of_updates(network, "central")
    run = network.federate()
    assert reasons(run) == [] and not any("gave no ledger" in line for line in network.said)
    key = keys.own(tmp_path / "key")
    out = bundle.write(run, tmp_path / "bundle", key, settings=RELEASE)
    assert verify.verify_with(out, {key.public.id: key.public})["valid"]
    assert (
        "Declared public: the number of units of every site."
        in json.loads((out / "privacy.json").read_text())["boundary"]
    )
    # of all sites together, so steps x the batch of all would be too many
    assert json.loads((out / "cost.json").read_text())["expected_units_processed"] is None


def test_a_site_elsewhere_that_no_coin_drew_has_spent_nothing(network):
    of_updates(network, "update_level", rate=1e-9)
    run = network.federate()
    claim = json.loads((run / "reports/privacy.json").read_text())
    assert [(row["epsilon"], row["ledger"]) for row in claim["sites"]] == [(None, None), (None, None)]
    assert claim["definition"] == "none" and not federated_reports.lacks_ledgers(RunFolder(run))


def test_a_site_that_answered_no_round_says_in_its_ledger_that_it_spent_nothing(network):
    network.policy("south", max_epsilon=1e-4)  # its ledger is opened, and the round refused
    run = network.federate()
    claim = json.loads((run / "reports/privacy.json").read_text())
    assert [(row["epsilon"] is None, row["ledger"]) for row in claim["sites"]] == [
        (False, "ledgers/site-1.jsonl"),
        (True, None),
    ]
    assert not any("counted as charged" in sentence for sentence in claim["boundary"]) and reasons(run) == []
    told = json.loads((run / "reports/federation.json").read_text())
    assert [site["epsilon"] for site in told["sites"]] == [claim["epsilon"], 0.0]
    assert [site["steps"] for site in told["sites"]] == [2, 0]
    assert told["epsilon"] == claim["epsilon"]
    assert told["rounds"][-1]["epsilons"]["south"] == 0.0


def test_a_site_cannot_give_the_ledger_of_another(network):
    answer = network.members["south"].answer
    network.members["south"].answer = lambda ask: (
        network.members["north"].answer(ask) if ask.kind == site_ledgers.KIND else answer(ask)
    )
    recipe = {**VALUES["federation"], "populations": [150, 150]}  # or their plans would differ
    network.recipe = recipes_file.from_mapping({**recipes_file.to_mapping(network.recipe), "federation": recipe})
    for name, member in network.members.items():
        member._population = 150
        assert member.name in (name, "site")
    run = network.federate()
    assert any("site south gave no ledger: it sent that of site north" in line for line in network.said)
    assert reasons(run) == ["no_ledger"]


def test_a_site_that_says_no_loss_is_charged_for_none_and_its_ledger_is_taken(network):
    """The plan of a choice by charged losses has a step more in a round; what the policy keeps is not asked of the data."""
    chosen = {**VALUES["federation"], "selection": {"kind": "by_charged_loss", "asked": 2}}
    network.recipe = recipes_file.from_mapping({**recipes_file.to_mapping(network.recipe), "federation": chosen})
    network.policy("south", may_say=["steps", "charged", "ledger", "loss"])
    run = network.federate()
    claim = json.loads((run / "reports/privacy.json").read_text())
    assert [row["mechanism"]["steps_spent"] for row in claim["sites"]] == [2, 4] and reasons(run) == []
    assert claim["epsilon"] == claim["sites"][1]["epsilon"] > claim["sites"][0]["epsilon"]


def test_a_ledger_of_this_machine_that_is_gone_is_no_site_that_spent_nothing(network, monkeypatch):
    gather = federated_reports.gather

    def lost(run, exchange, progress):
        run.members[0].ledger.unlink()
        gather(run, exchange, progress)

    monkeypatch.setattr(federated_reports, "gather", lost)
    network.at("server")
    with pytest.raises(LedgerError, match=r"of site .* · charges 0 events \(poisson_gaussian\), and 2 were used"):
        federating.run(network.recipe, out=network.folder / "runs", progress=network.said.append)


def test_a_run_that_charges_every_number_is_released(network, tmp_path):
    """What its plan charges is what its cost says was trained."""
    of_updates(network, "ldp_fl")
    run = network.federate()
    key = keys.own(tmp_path / "key")
    out = bundle.write(run, tmp_path / "bundle", key, settings=RELEASE)
    assert verify.verify_with(out, {key.public.id: key.public})["valid"]


def test_a_site_that_refused_every_round_before_a_ledger_was_there_does_not_cost_the_bundle(network):
    """Its policy is changed after it joined: nothing was charged, no data read, and nothing of it used."""
    answered = network.exchange

    def exchange(asked):
        if "train" in {ask.kind for ask in asked.values()}:
            network.policy("south", allowed_mechanisms=["update_level"])
        return answered(asked)

    network.exchange = exchange
    run = network.federate()
    assert not list((network.folder / "south" / "runs").rglob("ledger.db"))
    claim = json.loads((run / "reports/privacy.json").read_text())
    south = claim["sites"][1]
    assert (south["epsilon"], south["ledger"], south["key"]) == (None, None, None)
    assert claim["sites"][0]["epsilon"] == claim["epsilon"] and reasons(run) == []
    assert not any("Without a ledger" in sentence for sentence in claim["boundary"])
    key = keys.own(network.folder / "key")
    out = bundle.write(run, network.folder / "bundle", key, settings=RELEASE)
    assert verify.verify_with(out, {key.public.id: key.public})["valid"]


def test_a_site_cannot_say_that_it_charged_nothing_where_something_of_it_was_used(exported):
    ask = Ask(run="r/v1", round=4, exchange=0, kind=site_ledgers.KIND)
    no = Reply.no(ask, "north", site_ledgers.NO_LEDGER, "nothing was charged here")
    assert site_ledgers.read(no, PLAN, run="r/v1", least=[]) == site_ledgers.NOTHING
    assert site_ledgers.read(no, PLAN, run="r/v1", least=[PLAN.event(1)]) == "nothing was charged here"
