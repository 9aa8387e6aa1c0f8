"""The sum is the plain sum, whoever falls silent when; below the threshold there is none."""

import base64
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federation.secure_rounds import Sites, names, run, terms, total, vectors

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation.policy import SitePolicy, from_mapping
from sfumato.federation.public import Public
from sfumato.federation.secure import keys, protocol, server, shares, site
from sfumato.federation.secure.protocol import EXCHANGES, Terms, Trust


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(2, 12), bits=st.integers(2, 64), length=st.integers(1, 40))
def test_the_sum_is_exact_whoever_falls_silent_when(data, count, bits, length):
    threshold = data.draw(st.integers(count // 2 + 1, count))
    of = terms(count, threshold=threshold, bits=bits, length=length)
    leaving = data.draw(st.permutations(of.sites))[: data.draw(st.integers(0, of.may_be_silent))]
    silent = {exchange: [] for exchange in EXCHANGES}
    for name in leaving:
        silent[data.draw(st.sampled_from(EXCHANGES))].append(name)
    given_ = vectors(of, seed=count)
    state, _ = run(of, Sites(of.sites), given_, silent=silent)
    counted = [n for n in of.sites if not any(n in silent[e] for e in ("advertise", "share", "mask"))]
    assert list(state.survivors) == counted
    assert state.total is not None
    assert state.total.dtype == np.uint64
    assert np.array_equal(state.total, total(of, given_, counted))
    assert state.left_out == {name: f"{e}: no reply" for e in EXCHANGES for name in silent[e]}


@pytest.mark.parametrize("count", range(2, 13))
def test_a_third_of_the_sites_may_be_silent_and_not_one_more(count):
    of = terms(count, length=2)
    assert of.may_be_silent == count // 3
    state, _ = run(of, Sites(of.sites), vectors(of), silent={"mask": of.sites[: count // 3]})
    assert state.total is not None
    with pytest.raises(PrivacyRefused) as refused:
        run(of, Sites(of.sites), vectors(of), silent={"mask": of.sites[: count // 3 + 1]})
    assert refused.value.code == "too_few_sites"


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_below_the_threshold_the_round_ends_with_a_refusal_at_any_exchange(exchange):
    of = terms(5)  # t = 4
    sites = Sites(of.sites)
    with pytest.raises(PrivacyRefused, match="at least t = 4") as refused:
        run(of, sites, vectors(of), silent={exchange: of.sites[:2]})
    assert refused.value.code == "too_few_sites"
    assert f"s00: {exchange}: no reply" in str(refused.value)
    if exchange != "unmask":  # nobody was asked for a share
        assert all(memory.stage != "done" for memory in map(sites.memory, of.sites) if memory is not None)


def test_a_round_after_another_and_another_attempt_after_one_that_failed():
    sites, of = Sites(names(4)), terms(4)
    assert run(of, sites, vectors(of))[0].total is not None
    second = terms(4, round=2)
    with pytest.raises(PrivacyRefused):
        run(second, sites, vectors(of), silent={"check": of.sites[:2]})
    again = terms(4, round=2, attempt=1)
    state, _ = run(again, sites, vectors(of, seed=7))
    assert np.array_equal(state.total, total(of, vectors(of, seed=7), of.sites))


def test_a_broken_reply_leaves_its_site_out_and_the_sum_is_of_the_others():
    of = terms(6, bits=20)  # t = 4
    given_, sites = vectors(of), Sites(of.sites)
    state = server.begin(of, sites.identities)
    while state.total is None:
        replies = {name: sites.answer(name, ask, given_[name]) for name, ask in server.asks(state).items()}
        if state.exchange == "mask":
            packed = replies["s01"][1]
            replies["s01"] = ({}, packed[:-1])  # of another length
            replies["s02"] = ({}, replies["s02"][1].copy())
            replies["s02"][1][-1] |= 0b1111_0000  # 5 · 20 bits end in the middle of this byte
        state = server.receive(state, replies)
    assert set(state.left_out) == {"s01", "s02"}
    assert state.left_out["s01"] == "mask: not 5 numbers of 20 bits"
    assert np.array_equal(state.total, total(of, given_, ["s00", "s03", "s04", "s05"]))


@pytest.mark.parametrize(
    ("exchange", "values"),
    [
        ("advertise", {}),
        ("advertise", {"encryption": "AA==", "masking": "AA==", "signature": "AA=="}),
        ("advertise", {"encryption": 3}),
        ("share", {"sealed": {}, "commitment": ""}),
        ("share", {"sealed": [], "commitment": ""}),
        ("check", {"signature": "AA=="}),
        ("check", {"signature": "not base64!"}),
        ("unmask", {"seeds": {}, "keys": {}}),
        ("unmask", {"seeds": {}, "keys": {}, "more": float("nan")}),
    ],
)
def test_a_reply_of_another_form_leaves_its_site_out(exchange, values):
    of = terms(4)
    sites = Sites(of.sites)
    state, _ = run(of, sites, vectors(of), until=exchange)
    replies = {name: sites.answer(name, ask, vectors(of)[name]) for name, ask in server.asks(state).items()}
    state = server.receive(state, replies | {"s03": (values, None)})
    assert list(state.left_out) == ["s03"]
    assert state.left_out["s03"].startswith(exchange)


def test_a_site_that_deals_or_gives_wrong_shares_is_noticed():
    of = terms(4, threshold=3)
    for exchange, silent in (("share", ()), ("unmask", ("s03",))):
        sites = Sites(of.sites)
        state, _ = run(of, sites, vectors(of), silent={"mask": silent}, until=exchange)
        replies = {name: sites.answer(name, ask, vectors(of)[name]) for name, ask in server.asks(state).items()}
        values = replies["s00"][0]
        if exchange == "share":
            values["commitment"] = replies["s01"][0]["commitment"]  # as if its shares were of another secret
        else:
            values["keys"]["s03"] = values["seeds"]["s01"]
        state = server.receive(state, replies) if exchange == "share" else state
        with pytest.raises(PrivacyRefused) as refused:
            while state.total is None:
                if state.exchange != exchange:
                    asks = server.asks(state)
                    replies = {name: sites.answer(name, ask, vectors(of)[name]) for name, ask in asks.items()}
                state = server.receive(state, replies)
        assert refused.value.code == "wrong_share"


def unmasked(of, sites, given_, lie, silent=()):
    """The server after ``unmask``; lie changes the values of its replies, {site: values}, or of those of ``share``."""
    state, _ = run(of, sites, given_, silent={"mask": silent}, until="unmask")
    replies = {name: sites.answer(name, ask, given_[name]) for name, ask in server.asks(state).items()}
    lie({name: values for name, (values, _) in replies.items()})
    return server.receive(state, replies)


def other(share: str) -> str:
    """A share of another number (all but one in 2^256)."""
    return base64.b64encode(bytes(1) + hashlib.sha256(share.encode()).digest()).decode()


@pytest.mark.parametrize("silent", [(), ("s05",)], ids=["none silent", "one silent"])
@pytest.mark.parametrize("liars", [("s00",), ("s03",), ("s00", "s02")], ids=lambda liars: "+".join(liars))
def test_sites_that_give_wrong_shares_are_named_and_the_sum_is_right(liars, silent):
    of = terms(7, threshold=4)
    sites, given_ = Sites(of.sites), vectors(of)

    def lie(values):
        for liar in liars:
            for kind in ("seeds", "keys"):
                values[liar][kind] = {name: other(share) for name, share in values[liar][kind].items()}

    state = unmasked(of, sites, given_, lie, silent)
    survivors = [name for name in of.sites if name not in silent]
    assert state.survivors == tuple(survivors)  # what the liars sent before is in the sum
    np.testing.assert_array_equal(state.total, total(of, given_, survivors))
    assert list(state.liars) == list(liars)
    assert all(said.startswith("unmask: gave wrong shares of s00, s01") for said in state.liars.values())


def test_of_a_single_wrong_share_both_who_gave_it_and_who_dealt_it_are_named():
    of = terms(4, threshold=3)
    sites, given_ = Sites(of.sites), vectors(of)
    state = unmasked(of, sites, given_, lambda v: v["s00"]["seeds"].update(s02=other(v["s00"]["seeds"]["s02"])))
    np.testing.assert_array_equal(state.total, total(of, given_, of.sites))
    assert state.liars == {
        "s00": "unmask: gave a wrong share of s02, or was dealt it",
        "s02": "unmask: dealt a wrong share to s00, or s00 changed it",
    }


def test_a_dealer_of_wrong_shares_is_named_where_two_sites_cannot_use_theirs(monkeypatch):
    of = terms(6, threshold=4)
    sites, given_, right = Sites(of.sites), vectors(of), site.share

    def share(memory, *rest, **own):
        """s03 deals zeros to s00 and s01."""
        with monkeypatch.context() as patched:
            if memory.site == "s03":
                split = shares.split
                patched.setattr(shares, "split", lambda *given: [bytes(33), bytes(33), *split(*given)[2:]])
            return right(memory, *rest, **own)

    monkeypatch.setattr(site, "share", share)
    state = unmasked(of, sites, given_, lambda values: None)
    np.testing.assert_array_equal(state.total, total(of, given_, of.sites))
    assert state.liars == {"s03": "unmask: dealt wrong shares to s00, s01"}


@pytest.mark.parametrize(("threshold", "words"), [(4, "none was to spare"), (3, "no set of enough sites agrees")])
def test_more_liars_than_shares_to_spare_end_the_round(threshold, words):
    of = terms(4, threshold=threshold)
    sites, given_ = Sites(of.sites), vectors(of)

    def lie(values):
        for liar in ("s01", "s02")[: 5 - threshold]:
            values[liar]["seeds"] = {name: other(share) for name, share in values[liar]["seeds"].items()}

    with pytest.raises(PrivacyRefused, match=words) as refused:
        unmasked(of, sites, given_, lie)
    assert refused.value.code == "wrong_share"


@pytest.mark.parametrize("count", range(2, 101))
def test_the_thresholds_keep_their_inequalities(count):
    of = terms(count)
    assert 2 * of.threshold > count + of.colluders
    assert 2 * of.threshold <= count + of.colluders + 1  # and it is the largest number
    assert of.colluders + 1 >= count / 3
    assert of.curious_colluders == of.threshold - 1
    assert terms(count, threshold=2 * count // 3 + 1).colluders >= count // 3  # the paper's threshold


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sites": ("a",)}, "two or more"),
        ({"sites": ("b", "a", "c")}, "sorted"),
        ({"sites": ("a", "a", "b")}, "each once"),
        ({"sites": ("", "a", "b")}, "not empty"),
        ({"sites": ("a", "b", "c", "d"), "threshold": 2}, "more than half"),
        ({"threshold": 4}, "not more than all"),
        ({"bits": 1}, "bits = 1"),
        ({"length": 0}, "length = 0"),
        ({"length": 2**31 + 1}, "between 1 and"),
        ({"round": -1}, "round = -1"),
        ({"attempt": -1}, "attempt = -1"),
    ],
)
def test_terms_that_protect_nobody_are_no_terms(changed, message):
    given_ = {"run": "r", "round": 0, "attempt": 0, "sites": ("a", "b", "c"), "threshold": 2, "bits": 32, "length": 1}
    with pytest.raises(UsageError, match=message):
        Terms(**{**given_, **changed})


OTHERS = [
    {"run": "q"},
    {"round": 2},
    {"attempt": 1},
    {"bits": 33},
    {"length": 6},
    {"threshold": 4},
    {"sites": ("s00", "s01", "s02", "s04")},
    {"sites": ("s00", "s01", "s02s03")},
]


@pytest.mark.parametrize("changed", OTHERS, ids=str)
def test_every_derived_key_is_of_its_terms(changed):
    """Domain separation: the same key pairs give other masks, seals and signed messages in any other round."""
    fields = {"run": "r", "round": 1, "attempt": 0, "sites": names(4), "threshold": 3, "bits": 32, "length": 5}
    here, there = Terms(**fields).digest(), Terms(**{**fields, **changed}).digest()
    private, public = keys.new_private(), keys.public_of(keys.new_private())
    secret = keys.new_secret()

    def derived(digest: bytes) -> list[bytes]:
        return [
            protocol.pair_seed(private, public, terms=digest, one="s00", other="s01"),
            protocol.pair_seed(private, public, terms=digest, one="s00", other="s02"),
            keys.agree(private, public, purpose="seal", terms=digest, pair=("s00", "s01")),
            keys.agree(private, public, purpose="seal", terms=digest, pair=("s01", "s00")),
            protocol.self_mask_seed(secret, terms=digest, site="s00"),
            protocol.self_mask_seed(secret, terms=digest, site="s01"),
            protocol.commitment(secret, terms=digest, site="s00"),
            protocol.survivors_message(digest, {}, ["s00"], ["s01"]),
        ]

    assert len({*derived(here), *derived(there)}) == 16


def test_the_two_ends_of_a_pair_derive_the_same():
    one, other, digest = keys.new_private(), keys.new_private(), terms(3).digest()
    here = protocol.pair_seed(one, keys.public_of(other), terms=digest, one="b", other="a")
    assert here == protocol.pair_seed(other, keys.public_of(one), terms=digest, one="a", other="b")


def test_a_server_must_know_the_identity_of_every_site():
    with pytest.raises(UsageError, match="s02"):
        server.begin(terms(3), Sites(names(2)).identities)


def test_messages_and_memories_show_no_secret_when_printed():
    of, sites = terms(3), Sites(names(3))
    run(of, sites, vectors(of), until="mask")
    memory = sites.memory("s00")
    assert memory is not None
    hidden = (memory.masking, memory.encryption, memory.secret, memory.held["s00"].key, memory.held["s00"].seed)
    assert all(value and repr(value)[2:-1] not in repr(memory) for value in hidden)


def test_private_keys_are_forgotten_with_the_masked_vector_and_shares_with_the_unmasking():
    of, sites = terms(3), Sites(names(3))
    run(of, sites, vectors(of), until="check")
    memory = sites.memory("s00")
    assert memory is not None
    assert (memory.encryption, memory.masking, memory.secret) == (b"", b"", b"")
    sites = Sites(names(3))
    run(of, sites, vectors(of))
    memory = sites.memory("s00")
    assert memory is not None
    assert (memory.held, memory.survivors, memory.advertised) == ({}, (), {})


def test_a_policy_refuses_terms_that_do_not_stand_up_to_its_colluders():
    of = terms(7)  # t = 5, so up to 2
    identities = Sites(of.sites).identities
    Trust(identities=identities, colluders=2).check(of, "s00")
    for colluders, terms_ in ((3, of), (1, terms(7, threshold=4)), (1, terms(2))):
        with pytest.raises(PrivacyRefused) as refused:
            Trust(identities=identities, colluders=colluders).check(terms_, "s00")
        assert refused.value.code == "secure_terms"


@pytest.mark.parametrize(
    ("identities", "message"),
    [
        ({"a": "00" * 31}, "64 hexadecimal digits"),
        ({"a": "G" * 64}, "64 hexadecimal digits"),
        ({"a": "00" * 32, "b": "00" * 32}, "two sites have one key"),
    ],
)
def test_identities_that_are_no_keys_are_refused_in_a_policy_and_among_the_public_constants(identities, message):
    with pytest.raises(UsageError, match=message):
        SitePolicy(identities=identities)
    given_ = dict.fromkeys(identities, 1)
    with pytest.raises(UsageError, match=message):
        Public(populations=given_, rounds=1, holders={}, rates=given_, weights=given_, identities=identities)


def test_identities_are_of_all_sites_of_the_federation_or_none():
    given_ = {"a": 1, "b": 1}
    with pytest.raises(UsageError, match="same sites"):
        Public(populations=given_, rounds=1, holders={}, rates=given_, weights=given_, identities={"a": "00" * 32})


def test_a_policy_file_names_identities_and_colluders():
    policy = from_mapping({"identities": {"north": "0a" * 32}, "colluders": 1})
    assert (policy.identities, policy.colluders) == ({"north": "0a" * 32}, 1)
    with pytest.raises(UsageError, match="colluders = -1"):
        from_mapping({"colluders": -1})
