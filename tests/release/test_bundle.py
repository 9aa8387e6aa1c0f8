"""A bundle appears complete or not at all, and holds nothing that must stay in the run."""

import json
import re
from pathlib import Path

import pytest

from sfumato.errors import OutsideError, PrivacyRefused, UsageError
from sfumato.release import bundle, keys, manifest, verify
from sfumato.release.settings import ReleaseSettings


def test_the_files_are_those_of_the_format_and_the_manifest_is_canonical(released: Path) -> None:
    files = {path.relative_to(released).as_posix() for path in released.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("model/")} == {
        "manifest.json",
        "privacy.json",
        "quality.json",
        "audit.json",
        "cost.json",
        "ledger.jsonl",
        "provenance.json",
        "README.md",
        "signature.json",
    }
    listed = manifest.read((released / "manifest.json").read_bytes())
    assert set(listed) == files - {"manifest.json", "signature.json"}
    assert json.loads((released / "manifest.json").read_text())["version"] == 1


def test_no_internal_figure_is_anywhere_in_a_bundle(run: Path, signer: Path) -> None:
    """Each number below is written once in the run's internal reports, and must be in no file that leaves."""
    for path in ("reports/audit.json", "reports/quality.json", "reports/cost.json", "data_card.json", "metrics.jsonl"):
        assert (run / path).is_file()
    internal = [
        "0.5077",
        "0.0131",
        "0.0017",
        "0.8812345",
        "2.9123",
        "0.9314159",
        "0.2718281",
        "7071.0678",
        "74913",
        "74911",
        "74802",
        "231.71828",
        "/srv/",
    ]
    everything = "".join(path.read_text() for path in run.rglob("*.json")).replace(",", "")
    recipe = (run / "resolved.yaml").read_text()
    assert all(figure in everything or figure in recipe for figure in internal)
    out = bundle.write(run, run / "bundle", keys.own(signer))
    text = "".join(
        path.read_text() for path in out.rglob("*") if path.suffix != ".safetensors" and path.is_file()
    ).replace(",", "")
    assert [figure for figure in internal if figure in text] == []
    assert not re.search(r"CONSISTENT|INCONCLUSIVE|auc", text)
    held = json.loads((out / "quality.json").read_text())["held_back"]
    assert "nearest training record" in held
    assert "agreement: side: non-private twin" in held


def test_the_audit_says_what_was_tested_and_that_one_bit_leaves(released: Path) -> None:
    audit = json.loads((released / "audit.json").read_text())
    assert audit["tested"] == [
        {"attack": "denoising loss", "confidence": 0.95, "members_asked": 1000, "blind_baseline": True}
    ]
    assert audit["positive_control"] is True
    assert "not covered by the guarantee" in audit["why"]


def test_the_gate_refuses_before_anything_is_written(run: Path, signer: Path) -> None:
    with pytest.raises(PrivacyRefused) as error:
        bundle.write(run, run / "bundle", keys.own(signer), settings=ReleaseSettings(max_epsilon=1.0))
    assert error.value.exit_code == 3
    assert [reason["code"] for reason in error.value.refusals] == ["epsilon_above_policy"]
    assert not (run / "bundle").exists()
    assert not list(run.glob(".bundle*"))


def test_a_bundle_that_we_would_not_accept_does_not_leave(run: Path, signer: Path) -> None:
    """The recipe allowed epsilon 4; the gate does not look at that, the verification does."""
    text = (run / "resolved.yaml").read_text()
    assert "epsilon: 8.0" in text
    (run / "resolved.yaml").write_text(text.replace("epsilon: 8.0", "epsilon: 4.0"))
    with pytest.raises(PrivacyRefused, match="own verification"):
        bundle.write(run, run / "bundle", keys.own(signer))
    assert [path.name for path in run.iterdir() if "bundle" in path.name] == []


def test_a_second_release_replaces_a_bundle_and_nothing_else(
    run: Path, signer: Path, public_key: Path, tmp_path: Path
) -> None:
    out = bundle.write(run, tmp_path / "out", keys.own(signer))
    (out / "extra.txt").write_text("left behind")
    assert bundle.write(run, out, keys.own(signer)) == out
    assert verify.verify(out, key_file=public_key)["valid"]
    assert [path.name for path in tmp_path.glob(".out*")] == []
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="something else than a bundle"):
        bundle.write(run, tmp_path / "thesis", keys.own(signer))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_full_disk_leaves_nothing_behind(
    run: Path, signer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> manifest.FileEntry:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "_copy", full)
    with pytest.raises(OutsideError, match="No space left") as error:
        bundle.write(run, tmp_path / "out", keys.own(signer))
    assert error.value.exit_code == 5
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_run_without_quality_and_audit_can_be_released_where_the_policy_says_so(
    run: Path, signer: Path, public_key: Path
) -> None:
    for name in ("quality", "audit"):
        (run / "reports" / f"{name}.json").unlink()
    out = bundle.write(
        run, run / "bundle", keys.own(signer), settings=ReleaseSettings(require_audit=False, require_quality=False)
    )
    assert verify.verify(out, key_file=public_key)["valid"]
    assert "No attack was run" in (out / "README.md").read_text()


def test_weights_are_the_runs_weights(run: Path, signer: Path) -> None:
    out = bundle.write(run, run / "bundle", keys.own(signer))
    for path in (run / "model").rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(run)).read_bytes() == path.read_bytes()
