"""A site's side of a federation over several machines, without machines: what it answers to whom, and when it reads its data."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfumato import machines, stages
from sfumato import recipe as recipes_file
from sfumato.errors import UsageError
from sfumato.federation.messages import Ask, Reply
from sfumato.federation.processes import Status, status
from sfumato.privacy.ledger import show

VALUES: dict[str, Any] = {
    "name": "tiny-federated",
    "data": {"source": "clinic", "units": 300, "public_units": 8, "image_size": 16, "path": "/etc"},
    "model": {
        "image": {"kind": "cosine", "kept": 4},
        "text": {"kind": "hashed_words", "buckets": 16, "width": 4},
        "backbone": {"kind": "mlp", "width": 8, "depth": 1},
    },
    "privacy": {"unit": "person", "records_per_unit": 2, "epsilon": None, "noise_multiplier": 20.0},
    "training": {"expected_batch_size": 20},
    "federation": {"sites": 2, "rounds": 2, "local_steps": 1},
    "performance": {"threads": 1},
}
RUN = "tiny-federated/v1"


def text_of(**changes: Any) -> str:
    return recipes_file.to_yaml(recipes_file.from_mapping({**VALUES, **changes}))


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    for name in ("DATA", "CONFIG", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))


@pytest.fixture
def make_member(tmp_path, own_home):
    """make_member(policy, share=(1, 2)): of one folder; again, it is the same site after a restart."""
    statuses: list[Status] = []
    folder = tmp_path / "site"
    folder.mkdir()

    def make(policy: dict[str, Any] | None = None, **options: Any) -> machines.Member:
        for told in statuses:
            told.close()
        statuses.append(Status(folder))
        if policy is not None:
            (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
        given = {"data": None, "population": None, "share": (1, 2), **options}
        return machines.Member(folder, policy=tmp_path / "policy.yaml", told=statuses[-1], **given)

    yield make
    for told in statuses:
        told.close()


def ask(kind: str, run: str = RUN, round: int = 1, tensors: Any = None, **values: Any) -> Ask:
    return Ask(run=run, round=round, exchange=0, kind=kind, tensors=tensors or {}, values=values)


def join(member: machines.Member, text: str | None = None) -> Reply:
    return member.answer(ask("join", recipe=text_of() if text is None else text, site="north"))


def begin(member: machines.Member, north: Any, run: str = RUN, **values: Any) -> Reply:
    return member.answer(ask("begin", run=run, **{"populations": {"north": north, "south": 150}, **values}))


def code(reply: Reply) -> str | None:
    return None if reply.refused is None else reply.refused.code


@pytest.fixture
def no_data(monkeypatch):
    """Reading records is a failure of the test."""

    def load(recipe):
        raise AssertionError("the records were read")

    monkeypatch.setattr(stages, "load", load)


@pytest.mark.parametrize(
    ("policy", "text", "wanted"),
    [
        ({"allowed_recipes": ["0" * 64]}, text_of(), "recipe_not_allowed"),
        ({"allowed_mechanisms": ["update_level"]}, text_of(), "mechanism_not_allowed"),
        (
            {"allowed_mechanisms": ["record_level"]},
            text_of(
                federation={"mechanism": {"kind": "central", "noise_multiplier": 2.0}}, privacy={"mechanism": "none"}
            ),
            "mechanism_not_allowed",
        ),
        ({}, "name: [", "recipe"),
        ({}, "name: x\nunknown: 1", "recipe"),
        ({}, text_of(data={"source": "folder", "path": "/home"}), "no_data"),
        (
            {},
            text_of(model={**VALUES["model"], "text": {"kind": "tokenizer", "path": "/home/somebody", "public": True}}),
            "recipe_names_files",
        ),
    ],
)
def test_what_the_policy_forbids_is_refused_before_a_record_is_read(make_member, no_data, policy, text, wanted):
    assert code(join(make_member(policy), text)) == wanted


def test_a_recipe_that_is_allowed_by_its_sum_is_joined_and_the_path_in_it_is_not_followed(make_member):
    text = text_of()
    member = make_member({"allowed_recipes": [hashlib.sha256(text.encode()).hexdigest()]})
    reply = join(member, text)
    assert (code(reply), reply.site) == (None, "north")
    assert 100 < reply.values["population"] < 200  # half of 300, and /etc holds none
    assert join(make_member({"allowed_recipes": [hashlib.sha256(b"").hexdigest()]}), text).refused is not None


def test_a_site_with_too_few_people_says_so_and_not_how_many(make_member):
    reply = join(make_member({"min_units": 100_000}))
    assert reply.refused is not None and reply.refused.code == "too_few_units"
    assert "population" not in reply.values and not any(f"{n} " in reply.refused.message for n in range(90, 210))


def test_rounds_are_answered_after_join_and_begin_also_by_a_new_process(make_member, tmp_path):
    from sfumato.federation import local_training
    from sfumato.federation.rounds import part_of

    member = make_member({})
    assert code(member.answer(ask("train"))) == "other_run"
    assert code(begin(member, 100)) == "message"  # before it has joined
    population = join(member).values["population"]
    for run in ("../../etc/v1", "x/v1/../..", "/v1", ".x/v1", "x"):
        assert code(begin(member, population, run=run)) == "message"
    assert code(begin(member, population + 1)) == "other_population"
    assert code(begin(member, True)) == code(begin(member, "9")) == "message"
    assert code(begin(member, population)) is None

    site, work = member._work(RUN)
    state = part_of(local_training.trained_state(work.build()), work.public, "north")
    told = {"recipe": hashlib.sha256(text_of().encode()).hexdigest(), "told": {}, "collecting": {}}
    first = member.answer(ask("train", tensors=state, **told))
    assert code(first) is None and set(first.tensors) == set(state) and first.values["steps"] == 1
    ledger = tmp_path / "site" / "runs" / RUN / "ledger.db"
    assert site.ledger == ledger and show(ledger)["steps"] == 1

    after_restart = make_member(share=(1, 2))
    again = after_restart.answer(ask("train", tensors=state, **told))
    assert all(again.tensors[name].equal(first.tensors[name]) for name in state)  # the same reply, computed once
    assert show(ledger)["steps"] == 1
    other = {name: tensor + 1 for name, tensor in state.items()}
    assert code(after_restart.answer(ask("train", tensors=other, **told))) == "replayed"
    assert code(after_restart.answer(ask("train", run="tiny-federated/v2", tensors=state, **told))) == "other_run"

    # the policy is read again for every message
    (tmp_path / "policy.yaml").write_text("max_rounds: 1\n")
    assert code(after_restart.answer(ask("train", round=2, tensors=state, **told))) == "rounds_limit"
    (tmp_path / "policy.yaml").write_text("{}\n")
    assert (
        code(after_restart.answer(ask("train", round=2, tensors=state, **{**told, "recipe": "0" * 64})))
        == "other_recipe"
    )
    assert code(after_restart.answer(ask("train", round=2, tensors=state, **told))) is None
    assert show(ledger)["steps"] == 2


def test_under_secure_aggregation_a_recipe_has_to_name_the_sites_own_identity(make_member, tmp_path):
    own, other = machines.make_key(tmp_path / "site")["identity"], "11" * 32
    text = text_naming
    member = make_member({"allow_not_private": True})
    assert code(join(member, text(north=other, south=own))) == "other_identity"
    assert code(join(member, text())) == "other_identity"
    population = join(member, text(north=own, south=other)).values["population"]
    assert code(begin(member, population)) is None
    assert dict(member._work(RUN)[1].public.identities) == {"north": own, "south": other}


def text_naming(**identities: str) -> str:
    mechanism = {"kind": "distributed", "noise_multiplier": 1.0}
    federation = {**VALUES["federation"], "weights": "equal", "mechanism": mechanism, "identities": identities}
    return text_of(federation=federation, privacy={"mechanism": "none", "unit": "person", "records_per_unit": 2})


def test_the_keys_of_other_sites_are_those_that_were_seen_first_until_the_administrator_changes_them(
    make_member, tmp_path
):
    own, south, other = machines.make_key(tmp_path / "site")["identity"], "11" * 32, "22" * 32
    site = tmp_path / "site"
    member = make_member({"allow_not_private": True})
    assert code(join(member, text_naming(north=own, south=south))) is None
    assert json.loads((site / machines.KNOWN).read_text()) == {"south": south}

    after_restart = make_member()
    refused = join(after_restart, text_naming(north=own, south=other))
    assert refused.refused is not None and refused.refused.code == "changed_identity"
    assert "federation.identities.south" in refused.refused.message and str(tmp_path) not in refused.refused.message
    said = status(site)
    assert said is not None and "Ask south itself" in said["refused"] and machines.KNOWN in said["refused"]
    assert json.loads((site / machines.KNOWN).read_text()) == {"south": south}
    assert code(join(after_restart, text_naming(north=own, south=south))) is None

    (site / machines.KNOWN).write_text(json.dumps({"south": other}))
    assert code(join(after_restart, text_naming(north=own, south=other))) is None


def test_a_list_in_the_policy_is_believed_in_place_of_what_was_seen_first(make_member, tmp_path):
    own, south, other = machines.make_key(tmp_path / "site")["identity"], "11" * 32, "22" * 32
    member = make_member({"allow_not_private": True, "identities": {"north": own, "south": south}})
    assert code(join(member, text_naming(north=own, south=other))) == "changed_identity"
    assert code(join(member, text_naming(north=own, south=south))) is None
    assert not (tmp_path / "site" / machines.KNOWN).exists()
    member = make_member({"allow_not_private": True, "identities": {"north": own}})
    assert code(join(member, text_naming(north=own, south=south))) == "changed_identity"  # nobody vouches for it


def test_a_key_is_made_once_and_status_of_nobody_is_refused(tmp_path):
    made = machines.make_key(tmp_path / "site")
    assert machines.make_key(tmp_path / "site") == made and made["line"].startswith("ecdsa-sha2-nistp384 ")
    with pytest.raises(UsageError, match="no folder of a server or a site"):
        machines.shown(tmp_path)
    told = Status(tmp_path / "server", what="server")
    told.close()
    assert machines.shown(tmp_path)["what"] == "server"
    assert json.loads((tmp_path / "server" / "status.json").read_text())["what"] == "server"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"server": "nowhere"}, "server = "),
        ({"server": "a b:1"}, "server = "),
        ({"authority": Path("missing.pem")}, "authority = "),
        ({"policy": Path("missing.yaml")}, "policy = "),
    ],
)
def test_a_site_that_cannot_start_says_why(tmp_path, wrong, words):
    pytest.importorskip("flwr")
    (tmp_path / "policy.yaml").write_text("{}")
    (tmp_path / "ca.pem").write_text("")
    given: dict[str, Any] = {
        "policy": tmp_path / "policy.yaml", "data": None, "server": "localhost:1", "authority": tmp_path / "ca.pem",
        "folder": tmp_path / "site", "progress": print, **wrong,
    }  # fmt: skip
    with pytest.raises(UsageError, match=words):
        machines.take_part(**given)


def test_a_site_releases_before_the_first_round_once_and_its_plan_has_both(make_member, tmp_path):
    release = {
        "kind": "class_moments",
        "image": {"kind": "cosine", "kept": 4},
        "classes": [{"name": "left", "more": ["left"]}, {"name": "right", "more": ["right"]}],
    }
    text = text_of(
        model={**VALUES["model"], "warm_start": {"release": release, "records": 20, "steps": 2, "records_at_once": 10}},
        privacy={"unit": "person", "records_per_unit": 2, "epsilon": 8.0, "warm_start": {"share": 0.3}},
    )
    member = make_member({})
    reply = join(member, text)
    begin(member, reply.values["population"])
    book = tmp_path / "site" / "runs" / RUN / "ledger.db"
    told = {"recipe": hashlib.sha256(text.encode()).hexdigest()}
    released = member.answer(ask("release", round=0, **told))
    assert code(released) is None and [tuple(t.shape) for t in released.tensors.values()] == [(2, 17, 17)]
    assert all(bool(t.isfinite().all()) for t in released.tensors.values())
    (event,) = show(book)["events"]
    assert (event["mechanism"], event["count"]) == ("gaussian", 1)
    for again in (member, make_member()):  # the same reply is sent again, or none: nothing is released a second time
        reply = again.answer(ask("release", round=0, **told))
        if code(reply) != "replayed":
            assert all(tensor.equal(released.tensors[name]) for name, tensor in reply.tensors.items()) and reply.tensors
    assert show(book)["steps"] == 1
