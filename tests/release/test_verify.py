"""A bundle is accepted as it was signed, and in no other form. Random tries have fixed seeds; nothing is timed."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.release.conftest import PLAN

from sfumato.errors import UsageError, VerificationFailed
from sfumato.privacy.settings import PartSettings
from sfumato.release import bundle, canonical, card, keys, manifest, verify

TRIES = 600


def failed(result: dict[str, Any]) -> dict[str, str]:
    """Detail by name of the checks that failed; a bundle is valid exactly when there is none."""
    wrong = {check["name"]: check["detail"] for check in result["checks"] if not check["ok"]}
    assert result["valid"] is (not wrong)
    return wrong


def names(bundle: Path) -> list[str]:
    return sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())


def resign(bundle: Path, signer: Path) -> None:
    """Makes manifest and signature fit whatever the folder holds now: what a dishonest signer would do."""
    files = {
        name: manifest.FileEntry(
            (bundle / name).stat().st_size, hashlib.sha256((bundle / name).read_bytes()).hexdigest()
        )
        for name in names(bundle)
        if name not in (manifest.MANIFEST, manifest.SIGNATURE)
    }
    data = manifest.encode(files)
    (bundle / manifest.MANIFEST).write_bytes(data)
    (bundle / manifest.SIGNATURE).write_bytes(manifest.sign(data, keys.own(signer)))


def change(bundle: Path, name: str, edit: Callable[[Any], None]) -> None:
    value = json.loads((bundle / name).read_text())
    edit(value)
    (bundle / name).write_bytes(canonical.encode_readable(value))


def rewrite_card(bundle: Path) -> None:
    reports = {name: json.loads((bundle / name).read_text()) for name in manifest.REPORTS}
    (bundle / "README.md").write_text(card.render(reports))


# ---- what is accepted ----


def test_a_bundle_is_accepted_with_the_key_file_and_epsilon_is_recomputed(released: Path, public_key: Path) -> None:
    result = verify.verify(released, key_file=public_key)
    assert failed(result) == {}
    assert result["epsilon"] == pytest.approx(7.99915, abs=1e-4)
    assert result["delta"] == 3.2e-6
    assert [check["name"] for check in result["checks"]] == [
        "layout",
        "signature",
        "files",
        "reports",
        "release marker",
        "taint",
        "what leaves",
        "plan",
        "ledger",
        "epsilon",
        "recipe",
        "card",
    ]
    verify.require_valid(result)


def test_a_bundle_is_accepted_from_a_trust_list_and_from_the_signers_own_machine(
    released: Path, signer: Path, public_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trusted").mkdir()
    shutil.copy(public_key, tmp_path / "trusted" / "clinic.pem")
    assert failed(verify.verify(released, trusted_dir=tmp_path / "trusted")) == {}
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    shutil.copytree(signer, tmp_path / "config" / "sfumato")
    assert failed(verify.verify(released)) == {}


def test_a_bundle_from_before_clipping_was_stated_is_accepted(released: Path, signer: Path, public_key: Path) -> None:
    change(released, "privacy.json", lambda v: v["mechanism"].pop("clipping"))
    change(released, "provenance.json", lambda v: [v["recipe"]["privacy"].pop(key) for key in ("clipping", "parts")])
    rewrite_card(released)
    resign(released, signer)
    assert failed(verify.verify(released, key_file=public_key)) == {}


def test_a_bundle_of_a_model_with_parts_says_what_each_was_given(
    make_run: Callable[..., Path], tmp_path: Path, signer: Path, public_key: Path
) -> None:
    parts = tuple(
        PartSettings(name=name, modules=(name,), max_grad_norm=bound, share=share)
        for name, bound, share in (("text", 0.3, 0.2), ("unet", 0.4, 0.8))
    )
    run = make_run(tmp_path / "clinic" / "v1", plan=replace(PLAN, parts=parts, max_grad_norm=0.5))
    bundle.write(run, run / "bundle", keys.own(signer))
    result = verify.verify(run / "bundle", key_file=public_key)
    assert failed(result) == {}
    assert result["epsilon"] == pytest.approx(7.99915, abs=1e-4)  # of the joint event
    claim = json.loads((run / "bundle" / "privacy.json").read_text())
    assert [part["share"] for part in claim["mechanism"]["parts"]] == [0.2, 0.8]
    assert any("text (text): gradients of at most 0.3" in sentence for sentence in claim["boundary"])
    change(run / "bundle", "privacy.json", lambda v: v["mechanism"]["parts"][0].update(share=0.1))
    resign(run / "bundle", signer)
    assert "parts" in failed(verify.verify(run / "bundle", key_file=public_key))["ledger"]


def test_an_unknown_signer_is_exit_code_4(released: Path, tmp_path: Path) -> None:
    keys.own(tmp_path / "other")
    result = verify.verify(released, key_file=tmp_path / "other" / "signing-key.pub.pem")
    assert "not a key that you trust" in failed(result)["signature"]
    with pytest.raises(VerificationFailed) as error:
        verify.require_valid(result)
    assert (error.value.exit_code, error.value.code) == (4, "unknown_signer")
    assert "--key" in error.value.next


def test_a_key_file_replaces_the_trust_list(
    released: Path, signer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    shutil.copytree(signer, tmp_path / "config" / "sfumato")
    keys.own(tmp_path / "other")
    assert not verify.verify(released, key_file=tmp_path / "other" / "signing-key.pub.pem")["valid"]


def test_verification_imports_no_torch(released: Path, public_key: Path) -> None:
    program = (
        "import sys; from sfumato.release import verify; r = verify.verify(sys.argv[1], key_file=sys.argv[2]);"
        "assert r['valid'], r; heavy = {'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, released, public_key],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(verify.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr


def test_a_stranger_verifies_the_signature_and_the_hashes_without_sfumato(
    released: Path, public_key: Path, tmp_path: Path
) -> None:
    """The commands of docs/bundle.md."""
    if shutil.which("openssl") is None or shutil.which("sha256sum") is None:
        pytest.skip("openssl or sha256sum is not installed")
    signature = json.loads((released / "signature.json").read_text())["signature"]
    (tmp_path / "signature.bin").write_bytes(bytes.fromhex(signature))
    arguments = [
        "openssl",
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        public_key,
        "-rawin",
        "-in",
        released / "manifest.json",
    ]
    done = subprocess.run(
        [*arguments, "-sigfile", tmp_path / "signature.bin"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    listed = json.loads((released / "manifest.json").read_text())["files"]
    sums = "".join(f"{entry['sha256']}  {name}\n" for name, entry in listed.items())
    done = subprocess.run(
        ["sha256sum", "--check", "--strict"], input=sums, capture_output=True, text=True, cwd=released, check=False
    )
    assert done.returncode == 0, done.stdout


# ---- every byte counts ----


def test_any_single_change_of_any_file_is_refused(released: Path, public_key: Path) -> None:
    """Random bytes of random files, changed, inserted, removed, appended, cut off; every file is met many times."""
    key = keys.read_public(public_key)
    trusted = {key.id: key}
    rng = random.Random(20240611)
    files = names(released)
    met: dict[str, int] = dict.fromkeys(files, 0)
    for _ in range(TRIES):
        name = rng.choice(files)
        original = (released / name).read_bytes()
        place = rng.randrange(len(original))
        other = bytes([rng.choice([b for b in range(256) if b != original[place]])])
        changed = rng.choice(
            [
                original[:place] + other + original[place + 1 :],
                original[:place] + bytes([original[place] ^ (1 << rng.randrange(8))]) + original[place + 1 :],
                original[:place] + other + original[place:],
                original[:place] + original[place + 1 :],
                original + other,
                original + b"\n",
                original[:place],
            ]
        )
        assert changed != original
        (released / name).write_bytes(changed)
        result = verify.verify_with(released, trusted)
        (released / name).write_bytes(original)
        assert failed(result), f"accepted with {name} changed at byte {place}"
        assert result["epsilon"] is None
        met[name] += 1
    assert min(met.values()) >= 20
    assert verify.verify_with(released, trusted)["valid"]


@pytest.mark.parametrize("name", ["signature.json", "manifest.json"])
def test_every_bit_of_signature_and_manifest_counts(name: str, released: Path, public_key: Path) -> None:
    key = keys.read_public(public_key)
    original = (released / name).read_bytes()
    for place in range(len(original)):
        data = bytearray(original)
        data[place] ^= 1 << (place % 8)
        (released / name).write_bytes(bytes(data))
        assert failed(verify.verify_with(released, {key.id: key})), f"bit {place % 8} of byte {place}"
    for end in range(0, len(original), 7):
        (released / name).write_bytes(original[:end])
        assert failed(verify.verify_with(released, {key.id: key})), f"cut at {end}"


def test_another_encoding_of_the_same_manifest_or_signature_is_refused(
    released: Path, signer: Path, public_key: Path
) -> None:
    """The same values in other bytes, and even signed as those bytes: there is one encoding only."""
    value = json.loads((released / "manifest.json").read_text())
    signature = json.loads((released / "signature.json").read_text())
    canonical_manifest = (released / "manifest.json").read_bytes()
    reversed_keys = dict(reversed(value.items()))
    for data in (
        json.dumps(value).encode(),
        json.dumps(value, indent=1, sort_keys=True).encode() + b"\n",
        canonical_manifest.rstrip(b"\n"),
        canonical_manifest + b"\n",
        b" " + canonical_manifest,
        b"\xef\xbb\xbf" + canonical_manifest,
        json.dumps(reversed_keys, separators=(",", ":")).encode() + b"\n",
        canonical_manifest.replace(b'"version":1', b'"version":1.0'),
        canonical_manifest.replace(b'"version":1', b'"version":1,"version":1'),
        canonical_manifest.replace(b"README.md", b"\\u0052EADME.md"),
        canonical_manifest.decode().encode("utf-16"),
    ):
        (released / "manifest.json").write_bytes(data)
        (released / "signature.json").write_bytes(manifest.sign(data, keys.own(signer)))
        assert failed(verify.verify(released, key_file=public_key)), data[:60]
    (released / "manifest.json").write_bytes(canonical_manifest)
    for other in (
        {**signature, "signature": signature["signature"].upper()},
        {**signature, "key_id": signature["key_id"].upper()},
        {**signature, "signature": signature["signature"] + "00"},
        {**signature, "extra": 1},
        {**signature, "algorithm": "none"},
        {**signature, "signature": [signature["signature"]]},
    ):
        (released / "signature.json").write_bytes(canonical.encode(other))
        assert failed(verify.verify(released, key_file=public_key)), other
    (released / "signature.json").write_bytes(json.dumps(signature).encode())
    assert "canonical" in failed(verify.verify(released, key_file=public_key))["signature"]


# ---- the folder ----


def test_extra_missing_linked_and_odd_files_are_refused(released: Path, public_key: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}")

    def refused() -> str:
        wrong = failed(verify.verify(released, key_file=public_key))
        assert wrong
        return next(iter(wrong.values()))

    for name in (
        "extra.txt",
        ".hidden",
        "model/extra.json",
        "model/run.py",
        "model/unet/weights.bin",
        "sub/README.md",
        "Readme.md",
    ):
        path = released / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        assert refused()
        path.unlink()
        if name.startswith("sub"):
            path.parent.rmdir()
    (released / "empty").mkdir()
    assert "empty folder" in refused()
    (released / "empty").rmdir()
    for name in names(released):
        path = released / name
        data = path.read_bytes()
        path.unlink()
        assert refused()
        (tmp_path / "copy").write_bytes(data)
        path.symlink_to(tmp_path / "copy")
        assert "plain file" in refused()
        path.unlink()
        os.mkfifo(path)
        assert "plain file" in refused()
        path.unlink()
        path.write_bytes(data)
    (released / "model").rename(tmp_path / "model")
    (released / "model").symlink_to(tmp_path / "model")
    assert "plain file" in refused()
    (released / "model").unlink()
    (tmp_path / "model").rename(released / "model")
    assert failed(verify.verify(released, key_file=public_key)) == {}


def test_a_manifest_cannot_point_out_of_its_folder(
    released: Path, signer: Path, public_key: Path, tmp_path: Path
) -> None:
    """Even a trusted signer cannot make us read elsewhere."""
    (tmp_path / "secret.json").write_text("{}")
    listed = json.loads((released / "manifest.json").read_text())
    entry = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    for name in (
        "../secret.json",
        "model/../../secret.json",
        str(tmp_path / "secret.json"),
        "model//x.json",
        "model/./x.json",
        "model/x.json/",
        "model\\..\\..\\secret.json",
        "C:/x.json",
        "model/con.json",
        "model/x\u0000.json",
        "model/х.json",
        "README.md ",
        "readme.md",
        "",
    ):
        data = canonical.encode({**listed, "files": {**listed["files"], name: entry}})
        (released / "manifest.json").write_bytes(data)
        (released / "signature.json").write_bytes(manifest.sign(data, keys.own(signer)))
        assert failed(verify.verify(released, key_file=public_key)), name


def test_names_that_differ_by_case_only_are_refused(released: Path, signer: Path, public_key: Path) -> None:
    (released / "model" / "Model_index.json").write_text("{}")
    resign(released, signer)
    assert "case" in failed(verify.verify(released, key_file=public_key))["layout"]


def test_a_wrong_path_is_wrong_use_and_not_a_verdict(tmp_path: Path, public_key: Path) -> None:
    with pytest.raises(UsageError):
        verify.verify(tmp_path / "nothing", key_file=public_key)
    assert "not there" in failed(verify.verify(tmp_path, key_file=public_key))["layout"]


# ---- what a dishonest signer could claim ----


@pytest.mark.parametrize(
    ("name", "edit", "check", "says"),
    [
        ("privacy.json", lambda v: v.update(epsilon=7.0), "epsilon", "the events give 7.999"),
        ("privacy.json", lambda v: v.update(epsilon=v["epsilon"] - 2e-6), "epsilon", "the events give"),
        ("privacy.json", lambda v: v.update(delta=1e-5), "ledger", "delta"),
        ("privacy.json", lambda v: v.update(population=60_000), "ledger", "population"),
        ("privacy.json", lambda v: v.update(unit="record"), "plan", "unit"),
        ("privacy.json", lambda v: v.update(epsilon=None), "reports", "epsilon"),
        ("privacy.json", lambda v: v.update(epsilon=1e300), "reports", "void"),
        ("privacy.json", lambda v: v.update(extra=1), "reports", "unknown"),
        ("privacy.json", lambda v: v.update(definition="none"), "release marker", "no guarantee"),
        (
            "privacy.json",
            lambda v: v.update(not_for_release="test noise"),
            "release marker",
            "NOT FOR RELEASE: test noise",
        ),
        ("privacy.json", lambda v: v.pop("not_for_release"), "release marker", "NOT FOR RELEASE"),
        ("privacy.json", lambda v: v["mechanism"].update(noise_multiplier=2.0), "ledger", "noise_multiplier"),
        ("privacy.json", lambda v: v["mechanism"].update(max_grad_norm=0.1), "ledger", "max_grad_norm"),
        ("privacy.json", lambda v: v["mechanism"].update(steps_spent=799), "ledger", "steps_spent"),
        ("privacy.json", lambda v: v["accountants"].update(rdp=8.1), "epsilon", "rdp"),
        ("privacy.json", lambda v: v["curve"][2].__setitem__(1, 1.0), "epsilon", "curve"),
        ("privacy.json", lambda v: v["taint"]["tensors"].clear(), "taint", "not in the taint list"),
        (
            "privacy.json",
            lambda v: v["taint"]["tensors"]["model/unet/diffusion_pytorch_model.safetensors"].pop("down.bias"),
            "taint",
            "down.bias is not covered",
        ),
        (
            "privacy.json",
            lambda v: v["taint"]["tensors"]["model/unet/diffusion_pytorch_model.safetensors"].update(
                {"down.bias": "private"}
            ),
            "taint",
            "'private'",
        ),
        ("privacy.json", lambda v: v["taint"]["files"].pop("model/unet/config.json"), "taint", "not declared"),
        ("quality.json", lambda v: v["figures"][0].update(covered_by="internal"), "what leaves", "internal"),
        ("quality.json", lambda v: v["figures"][0].pop("covered_by"), "what leaves", "None"),
        (
            "quality.json",
            lambda v: v["figures"][0]["baseline"].update({"non-private twin": 0.9}),
            "what leaves",
            "baseline",
        ),
        ("quality.json", lambda v: v.update(notes=["the twin reaches .9"]), "what leaves", "notes"),
        ("quality.json", lambda v: v["figures"][0].update(value=0.99), "card", "quality.json"),
        ("quality.json", lambda v: v["figures"].pop(), "card", "quality.json"),
        ("audit.json", lambda v: v.update(verdict="CONSISTENT"), "what leaves", "verdict"),
        ("audit.json", lambda v: v["tested"][0].update(auc=0.51), "what leaves", "no outcomes"),
        ("audit.json", lambda v: v["tested"][0].update(blind_baseline=0.5), "what leaves", "not its value"),
        ("cost.json", lambda v: v.update(units_per_second=7071.07), "what leaves", "units_per_second"),
        ("cost.json", lambda v: v.update(steps=801), "ledger", "801 steps were trained"),
        ("provenance.json", lambda v: v["data_card"].update(records=74_913), "what leaves", "records"),
        ("provenance.json", lambda v: v["data_card"].update(languages={"en": 512}), "what leaves", "languages"),
        ("provenance.json", lambda v: v["recipe"]["privacy"].update(epsilon=4.0), "plan", "the recipe allowed 4.0"),
        ("provenance.json", lambda v: v["recipe"]["privacy"].update(mechanism="none"), "plan", "no private mechanism"),
        (
            "provenance.json",
            lambda v: v["recipe"]["privacy"].update(clipping="adaptive"),
            "plan",
            "clipping: the recipe",
        ),
        (
            "provenance.json",
            lambda v: v["recipe"]["privacy"].update(parts=[{"name": "a"}]),
            "plan",
            "parts: the recipe",
        ),
        ("privacy.json", lambda v: v["mechanism"].update(clipping="per_layer"), "ledger", "clipping"),
        ("privacy.json", lambda v: v["mechanism"].update(parts=[{}]), "ledger", "parts"),
        ("privacy.json", lambda v: v["mechanism"].update(parts=7), "ledger", "parts"),
    ],
)
def test_a_false_claim_is_refused_even_when_it_is_signed(
    name: str, edit: Callable[[Any], None], check: str, says: str, released: Path, signer: Path, public_key: Path
) -> None:
    change(released, name, edit)
    if check != "card":  # so that what is found is not merely that the card differs
        with contextlib.suppress(KeyError, AttributeError, TypeError):  # some claims cannot even be printed
            rewrite_card(released)
    resign(released, signer)
    wrong = failed(verify.verify(released, key_file=public_key))
    assert says in wrong[check], wrong


def test_a_larger_claim_than_what_was_spent_is_still_true(released: Path, signer: Path, public_key: Path) -> None:
    def raise_claim(value: Any) -> None:
        value.update(epsilon=8.0)
        value["accountants"].update(pld=8.0)

    change(released, "privacy.json", raise_claim)
    rewrite_card(released)
    resign(released, signer)
    assert failed(verify.verify(released, key_file=public_key)) == {}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("epsilon: 7.99", "epsilon: 3.99", "privacy block"),
        ("ε = 8 at", "ε = 2 at", "claim"),
        ("## Data\n", "## Data\n\nMeasured ε ≤ 1.5.\n", "1.5"),
        ("| 0.81 |", "| 0.91 |", "table"),
        ("## Data\n", "NOT FOR RELEASE\n", "NOT FOR RELEASE"),
    ],
)
def test_a_card_that_says_something_else_is_refused(
    old: str, new: str, says: str, released: Path, signer: Path, public_key: Path
) -> None:
    text = (released / "README.md").read_text()
    assert old in text
    (released / "README.md").write_text(text.replace(old, new, 1))
    resign(released, signer)
    assert says in failed(verify.verify(released, key_file=public_key))["card"]


def test_fewer_events_than_were_spent_are_refused(released: Path, signer: Path, public_key: Path) -> None:
    text = (released / "ledger.jsonl").read_text()
    for changed in (
        text.replace('"count":800', '"count":80'),
        text.replace('"noise_multiplier":1.4268', '"noise_multiplier":14.0'),
        "",
        "{}\n",
    ):
        assert changed != text
        (released / "ledger.jsonl").write_text(changed)
        resign(released, signer)
        assert "ledger" in failed(verify.verify(released, key_file=public_key))


def test_the_head_of_the_ledger_is_signed_by_the_signer_and_older_bundles_without_it_are_accepted(
    released: Path, signer: Path, public_key: Path
) -> None:
    first, rest = (released / "ledger.jsonl").read_text().split("\n", 1)
    header = json.loads(first)
    assert header["signature"]["key_id"] == verify.verify(released, key_file=public_key)["signer"]
    stranger = keys.signer(keys.SigningKey.generate())(b"another ledger")
    for signature, says in (
        (None, ""),
        ({**header["signature"], "signature": "00" * 64}, "not one of this ledger by this key"),
        (stranger, "is not a key that you trust"),
        ("x", "must be the header"),
    ):
        changed = {name: value for name, value in header.items() if name != "signature"}
        changed |= {} if signature is None else {"signature": signature}
        text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        (released / "ledger.jsonl").write_text(text + "\n" + rest)
        resign(released, signer)
        result = verify.verify(released, key_file=public_key)
        if signature is None:
            assert result["valid"]
        else:
            assert says in failed(result)["ledger"]


# ---- whatever bytes come: a verdict, never a traceback ----

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(data=st.binary(max_size=400) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_manifest_and_any_signature_get_a_verdict(data: bytes, released: Path, public_key: Path) -> None:
    key = keys.read_public(public_key)
    for name in (manifest.MANIFEST, manifest.SIGNATURE):
        original = (released / name).read_bytes()
        (released / name).write_bytes(data)
        assert failed(verify.verify_with(released, {key.id: key}))
        (released / name).write_bytes(original)


@fuzz
@given(
    value=json_values,
    place=st.sampled_from(
        ["", "files", "files/README.md", "files/README.md/bytes", "files/README.md/sha256", "version"]
    ),
)
def test_any_signed_manifest_gets_a_verdict(
    value: Any, place: str, released: Path, signer: Path, public_key: Path
) -> None:
    original, signature = ((released / name).read_bytes() for name in (manifest.MANIFEST, manifest.SIGNATURE))
    whole = {"whole": json.loads(original)}
    target: Any = whole
    for part in ["whole", *place.split("/")][:-1] if place else []:
        target = target[part]
    target[place.split("/")[-1] if place else "whole"] = value
    try:
        data = canonical.encode(whole["whole"])
    except ValueError:  # NaN: no JSON at all
        data = json.dumps(whole["whole"]).encode()
    (released / manifest.MANIFEST).write_bytes(data)
    (released / manifest.SIGNATURE).write_bytes(manifest.sign(data, keys.own(signer)))
    result = verify.verify(released, key_file=public_key)
    (released / manifest.MANIFEST).write_bytes(original)
    (released / manifest.SIGNATURE).write_bytes(signature)
    assert bool(failed(result)) is (data != original)


@fuzz
@given(value=json_values, name=st.sampled_from(manifest.REPORTS), where=st.integers(0, 10_000))
def test_any_signed_report_gets_a_verdict(
    value: Any, name: str, where: int, released: Path, signer: Path, public_key: Path
) -> None:
    """One value anywhere in a report is replaced by another, by somebody whom we trust."""
    saved = {file: (released / file).read_bytes() for file in (name, manifest.MANIFEST, manifest.SIGNATURE)}
    report = json.loads(saved[name])
    places: list[tuple[Any, Any]] = []
    todo: list[Any] = [report]
    while todo:
        item = todo.pop()
        for key in item if isinstance(item, dict) else range(len(item)):
            places.append((item, key))
            if isinstance(item[key], (dict, list)):
                todo.append(item[key])
    container, key = places[where % len(places)]
    container[key] = value
    (released / name).write_text(json.dumps(report))
    resign(released, signer)
    result = verify.verify(released, key_file=public_key)
    for file, data in saved.items():
        (released / file).write_bytes(data)
    assert set(result) == {"valid", "checks", "epsilon", "delta", "signer"}
    failed(result)


@fuzz
@given(
    data=st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()),
    name=st.sampled_from([*manifest.REQUIRED, "model/text.safetensors"]),
)
def test_any_signed_file_gets_a_verdict(data: bytes, name: str, released: Path, signer: Path, public_key: Path) -> None:
    saved = {file: (released / file).read_bytes() for file in (name, manifest.MANIFEST, manifest.SIGNATURE)}
    (released / name).write_bytes(data)
    resign(released, signer)
    result = verify.verify(released, key_file=public_key)
    for file, original in saved.items():
        (released / file).write_bytes(original)
    assert failed(result)
