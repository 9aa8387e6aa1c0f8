"""Secure aggregation through the federation's own loop: messages as bytes, memories on disk, a checkpoint at every exchange."""

import base64
import json
import stat
from dataclasses import dataclass, replace

import pytest
import torch
from tests.federation.conftest import work_for
from tests.federation.secure_rounds import Sites, names

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation import collecting, rounds, simulate
from sfumato.federation.keeping import Keeper, write_part
from sfumato.federation.mechanism_settings import Distributed
from sfumato.federation.messages import Ask, Part, Reply
from sfumato.federation.policy import SitePolicy
from sfumato.federation.secure.collecting import SecureSum
from sfumato.federation.secure.keys import Identity
from sfumato.federation.secure.protocol import Trust
from sfumato.federation.serving import serve
from sfumato.privacy.ledger import show
from sfumato.randomness import SecretRandom

COUNT, BITS = 4, 20


class Watched:
    """The way of collecting of one side; keeps the vectors that sites made and the sums that were opened."""

    kinds = SecureSum.kinds
    shows_updates = False

    def __init__(self, way, made, sums) -> None:
        self.way, self.made, self.sums = way, made, sums
        self.ask, self.receive = way.ask, way.receive

    def total(self, memory, asked):
        received = self.way.total(memory, asked)
        assert received.updates == {} and received.sum is not None
        self.sums.append((received.sites, received.sum["sum"]))
        return received

    def answer(self, site, ask, kept, sent, chance):
        def noted():
            part = sent()
            while len(self.made) < ask.round:
                self.made.append({})
            self.made[ask.round - 1][site] = part.tensors["sum"].clone()
            return part

        return self.way.answer(site, ask, kept, noted, chance)


@pytest.fixture
def federation(make_site, build, monkeypatch, tmp_path):
    """federation(silent, policy): two rounds of distributed noise; silent: (round, kind) -> sites that do not answer."""

    def make(silent=None, policy=None, change=None):
        people = Sites(names(COUNT))
        sites = [
            replace(
                make_site(name, float(i), private=False, policy=policy(name, people) if policy else None),
                identity=Identity(public=people.identities[name], sign=people.keys[name].sign),
            )
            for i, name in enumerate(names(COUNT))
        ]
        mechanism = Distributed(noise_multiplier=1.0, max_update_norm=5.0, bits=BITS, dropouts=1)
        work = work_for(sites, build, ordinary, mechanism=mechanism, rounds=2, weights="equal")
        made, sums, messages = [], [], []
        ours = collecting.build
        monkeypatch.setattr(collecting, "build", lambda *given, **own: Watched(ours(*given, **own), made, sums))
        here = simulate.exchange_here(sites, work)

        def exchange(asked: dict[str, Ask]):
            gone = (silent or {}).get(next((ask.round, ask.kind) for ask in asked.values()), ())
            replies = here({name: ask for name, ask in asked.items() if name not in gone})
            if change is not None and "s02" in replies:
                replies = change(replies)
            messages.extend([*asked.values(), *replies.values()])
            return replies

        state = simulate.start_of(sites, work)
        server = rounds.begin(work.settings, work.public, state, run="r")
        server = serve(server, exchange, chance=SecretRandom(), keeper=Keeper(tmp_path / "server"))
        return server, Seen(made, sums), sites, messages

    return make


@dataclass
class Seen:
    made: list[dict[str, torch.Tensor]]
    sums: list[tuple[tuple[str, ...], torch.Tensor]]


def ordinary(model, table, plan, ledger, *, steps, first_step):
    with torch.no_grad():
        model.line.weight.add_(table.tensors["x"].mean(0))


def test_the_servers_sum_is_the_plain_sum_of_what_the_sites_made(federation):
    server, seen, _, _ = federation()
    assert [result.discarded for result in server.results] == ["", ""]
    for (sites, found), made in zip(seen.sums, seen.made, strict=True):
        assert sites == names(COUNT)
        assert torch.equal(found, sum(made.values()).remainder(2**BITS))
    assert not torch.equal(server.state["line.weight"], torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize("kind", SecureSum.kinds)
def test_one_silent_site_of_four_leaves_the_sum_of_the_others(federation, kind):
    server, seen, _, _ = federation({(1, kind): ["s02"]})
    assert [result.discarded for result in server.results] == ["", ""]
    sites, found = seen.sums[0]
    assert ("s02" in sites) == (kind in ("check", "unmask"))  # its vector came in time
    assert torch.equal(found, sum(seen.made[0][name] for name in sites).remainder(2**BITS))
    assert seen.sums[1][0] == names(COUNT)


@pytest.mark.parametrize("kind", SecureSum.kinds)
def test_two_silent_sites_of_four_discard_the_round_and_the_next_one_goes_on(federation, kind):
    server, seen, sites, _ = federation({(1, kind): ["s01", "s02"]})
    first, second = server.results
    assert first.discarded and not second.discarded
    assert len(seen.sums) == 1 and seen.sums[0][0] == names(COUNT)
    if SecureSum.kinds.index(kind) > SecureSum.kinds.index("train"):
        assert show(sites[0].ledger)["steps"] == 2  # charged before the data were read; the discarded round too


def test_no_message_holds_a_vector_that_a_site_made(federation):
    """Of all tensors that are sent, either way, only the model and the masked vectors, which are packed bytes."""
    _, seen, _, messages = federation()
    made = [vector for each in seen.made for vector in each.values()]
    sent = [(name, tensor) for message in messages for name, tensor in message.tensors.items()]
    assert {name for name, _ in sent} == {"line.weight", "line.bias", "masked"}
    assert not any(torch.equal(tensor, vector) for _, tensor in sent for vector in made)
    assert {tensor.numel() for name, tensor in sent if name == "masked"} == {-(-len(made[0]) * BITS // 8)}


def test_private_keys_in_a_sites_folder_are_readable_by_its_owner_only(federation):
    _, _, sites, _ = federation()
    mode = sites[0].ledger.with_suffix(".kept").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_what_is_kept_is_readable_by_its_owner_only_whatever_writes_it(tmp_path, monkeypatch):
    """safetensors 0.8 makes its files so; older ones write into what is there, by the umask."""

    def older(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"whole")

    monkeypatch.setattr("safetensors.torch.save_file", older)
    write_part(tmp_path / "a", Part())
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_site_whose_own_list_knows_other_keys_refuses_and_the_others_go_on(federation):
    """The federation's public constants name all keys; s01's administrator has another one for s02."""

    def policy(name, people):
        own = {n: key.hex() for n, key in people.identities.items()}
        if name == "s01":
            own["s02"] = Sites(["x"]).identities["x"].hex()
        return SitePolicy(identities=own)

    server, seen, _, _ = federation(policy=policy)
    assert [sites for sites, _ in seen.sums] == [("s00", "s02", "s03")] * 2
    out = server.results[0].left_out
    assert [(no.site, no.code) for no in out] == [("s01", "secure_signature")]
    assert "s01" not in seen.made[0]  # its data were not touched


def test_a_policy_that_would_not_vouch_for_two_others_takes_no_part(federation):
    """t = 3 of 4 stands up to one."""
    server, seen, sites, _ = federation(policy=lambda name, people: SitePolicy(colluders=2 if name == "s03" else 1))
    assert [sites for sites, _ in seen.sums] == [("s00", "s01", "s02")] * 2
    assert [(no.site, no.code) for no in server.results[0].left_out] == [("s03", "secure_terms")]
    assert not sites[3].ledger.exists()  # neither read nor charged


def test_a_site_that_sends_a_wrong_share_is_named_and_the_round_goes_on_without_its_shares(federation):
    """t = 3 of 4: one is to spare. Its vector came before, and is in the sum."""

    def lie(replies):
        reply = replies["s02"]
        if reply.kind != "unmask" or reply.round != 1:
            return replies
        wrong = base64.b64encode(bytes(33)).decode()
        values = {"said": {"seeds": dict.fromkeys(names(COUNT), wrong), "keys": {}}}
        return {**replies, "s02": replace(reply, values=values)}

    server, seen, _, _ = federation(change=lie)
    assert [result.discarded for result in server.results] == ["", ""]
    assert torch.equal(seen.sums[0][1], sum(seen.made[0].values()).remainder(2**BITS))
    (no,) = server.results[0].left_out
    assert (no.site, no.code, no.message) == (
        "s02",
        "wrong_share",
        "unmask: gave wrong shares of s00, s01, s02, s03",
    )
    assert server.results[1].left_out == ()


def test_two_that_lie_of_four_discard_the_round_by_that_name(federation):
    def lie(replies):
        wrong = {"said": {"seeds": dict.fromkeys(names(COUNT), base64.b64encode(bytes(33)).decode()), "keys": {}}}
        return {
            name: replace(reply, values=wrong) if reply.kind == "unmask" and name in ("s01", "s02") else reply
            for name, reply in replies.items()
        }

    server, seen, _, _ = federation(change=lie)
    assert seen.sums == []
    assert all(result.discarded.startswith("shares of s00, s01, s02, s03 · do not give") for result in server.results)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"masked": torch.zeros(10, dtype=torch.bfloat16)},
        {"masked": torch.zeros(10, dtype=torch.int8)},
        {"masked": torch.zeros(9, dtype=torch.uint8)},
        {"masked": torch.zeros(2, 5, dtype=torch.uint8)},
        {"masked": torch.zeros(10, dtype=torch.uint8), "more": torch.zeros(1)},
        {"sum": torch.zeros(4, dtype=torch.int64)},
    ],
    ids=lambda tensors: str({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}),
)
def test_a_hostile_reply_leaves_its_site_out_and_does_not_stop_the_server(federation, tensors):
    """4 numbers of 20 bits are 10 bytes."""

    def hostile(replies):
        if replies["s02"].kind == "train":
            replies["s02"] = replace(replies["s02"], tensors=tensors)
        return replies

    server, seen, _, _ = federation(change=hostile)
    assert [result.discarded for result in server.results] == ["", ""]
    assert [sites for sites, _ in seen.sums] == [("s00", "s01", "s03")] * 2


def test_without_identities_no_round_is_begun(make_site, build):
    sites = [make_site(name, 1.0, private=False) for name in names(COUNT)]
    work = work_for(sites, build, ordinary, mechanism=Distributed(noise_multiplier=1.0), weights="equal")
    with pytest.raises(UsageError, match="identities = none"):
        rounds.begin(work.settings, work.public, simulate.start_of(sites, work), run="r")


def test_a_threshold_that_does_not_stand_up_to_the_mechanisms_colluders_is_refused():
    with pytest.raises(UsageError, match="colluders = 1"):
        replace(alone()[0], colluders=1)


def alone(colluders=0, **changed) -> tuple[SecureSum, Sites]:
    people = Sites(names(3))
    trust = Trust(identities=people.identities, colluders=colluders)
    given = {
        "sites": names(3),
        "trust": trust,
        "threshold": 2,
        "bits": BITS,
        "length": 2,
        "sign": people.keys["s00"].sign,
    }
    return SecureSum(**{**given, **changed}), people


def ask(kind: str, **values) -> Ask:
    return Ask(run="r", round=1, exchange=SecureSum.kinds.index(kind), kind=kind, values=values)


def nothing() -> Part:
    raise AssertionError("the data were asked for")


def test_a_site_makes_its_own_terms_whatever_the_server_says():
    """A server of other settings has another digest: the site refuses before its data are touched."""
    here, people = alone()
    _, kept = here.answer("s00", ask("advertise"), Part(), nothing, SecretRandom())
    there = replace(here, length=3)
    memory = Part()
    replies = {}
    for name in people.keys:
        way = replace(there, sign=people.keys[name].sign)
        part, _ = way.answer(name, ask("advertise"), Part(), nothing, SecretRandom())
        replies[name] = Reply.to(ask("advertise"), name, part)
    memory = there.receive("advertise", memory, replies)
    told = there.ask("share", memory, names(3))["s00"]
    with pytest.raises(PrivacyRefused) as refused:
        here.answer("s00", ask("share", **told.values), kept, nothing, SecretRandom())
    assert refused.value.code == "secure_replay"


def test_a_kind_with_what_belongs_to_another_exchange_is_refused():
    here, _ = alone()
    _, kept = here.answer("s00", ask("advertise"), Part(), nothing, SecretRandom())
    for kind, values in (("share", {"exchange": "mask"}), ("train", {"exchange": "share"}), ("check", {})):
        with pytest.raises(PrivacyRefused, match="does not follow"):
            here.answer("s00", ask(kind, **values), kept, nothing, SecretRandom())
    with pytest.raises(PrivacyRefused, match="does not follow"):
        here.answer("s00", ask("share", exchange="share"), Part(), nothing, SecretRandom())


def test_a_site_without_an_identity_and_a_policy_that_trusts_fewer():
    here, _ = alone(sign=None)
    with pytest.raises(UsageError, match="identity"):
        here.answer("s00", ask("advertise"), Part(), nothing, SecretRandom())
    here, _ = alone(colluders=1)
    with pytest.raises(PrivacyRefused, match="1 colluding"):
        here.answer("s00", ask("advertise"), Part(), nothing, SecretRandom())


def test_nobody_answers():
    here, _ = alone()
    with pytest.raises(UsageError) as error:
        here.receive("advertise", Part(), {})
    assert error.value.code == "too_few_sites"


@pytest.mark.parametrize(
    "part",
    [
        Part(),
        Part(tensors={"sum": torch.zeros(2)}),
        Part(tensors={"sum": torch.tensor([-1, 0])}),
        Part(tensors={"sum": torch.zeros(3, dtype=torch.int64)}),
        Part(tensors={"sum": torch.tensor([2**BITS, 0])}),
        Part(tensors={"sum": torch.zeros(2, dtype=torch.int64)}, values={"loss": 1.0}),
        Part(tensors={"sum": torch.zeros(2, dtype=torch.int64), "more": torch.zeros(1)}),
    ],
    ids=["nothing", "float", "negative", "long", "large", "a value", "a tensor"],
)
def test_an_update_that_is_not_one_vector_does_not_leave_its_site(part):
    here, people = alone()
    ways = {name: replace(here, sign=people.keys[name].sign) for name in people.keys}
    memory, kept = Part(), {name: Part() for name in ways}
    for kind in ("advertise", "share"):
        told = here.ask(kind, memory, names(3))
        replies = {}
        for name, way in ways.items():
            asked = ask(kind, **json.loads(json.dumps(dict(told[name].values))))
            reply, kept[name] = way.answer(name, asked, kept[name], nothing, SecretRandom())
            replies[name] = Reply.to(asked, name, reply)
        memory = here.receive(kind, memory, replies)
    told = here.ask("train", memory, names(3))["s00"]
    with pytest.raises(UsageError) as error:
        here.answer("s00", ask("train", **told.values), kept["s00"], lambda: part, SecretRandom())
    assert error.value.code == "secure_vector"
