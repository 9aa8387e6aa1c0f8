"""The recipe of prompts: what a user of it gets, what is refused, and that nothing but the shared prompt leaves a site."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tests.federation.prompting import write_clip

from sfumato import federating, machines, prompt_quality, prompting, stages, workflow
from sfumato.errors import UsageError
from sfumato.federation import keeping, site_memory
from sfumato.privacy import ledger
from sfumato.training.folder import RunFolder

SMALL = [
    "data.units=460",
    "data.public_units=160",
    "model.objective.encoders={kind: small, steps: 15, batch: 32, width: 8, features: 8}",
    "model.objective.tokens=4",
    "model.objective.method={kind: dpfpl, rank: 2}",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=3.0",
    "training.expected_batch_size=60",
    "federation.local_steps=2",
    "evaluation.samples=60",
]
NAMES = ["A", "B", "C"]


@pytest.fixture(scope="module")
def own_home(tmp_path_factory):
    """The account and the encoders of all these runs."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("XDG_DATA_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def finished(own_home, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return Path(workflow.federate("prompts", assignments=SMALL, out=out, rounds=3)["run"])


def figures(run):
    return json.loads((run / "reports" / "quality.json").read_text())["figures"]


def test_every_site_is_measured_on_its_own_classes_and_its_neighbours(finished):
    found = {(figure["direction"], figure["name"].rpartition(", ")[2]): figure for figure in figures(finished)}
    assert set(found) == {(d, n) for d in ("local classes", "neighbour classes") for n in [*NAMES, "mean of the sites"]}
    for (direction, _), figure in found.items():
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert figure["covered_by"] == "post-processing" and figure["samples"] == 60
        beside = {"prompt written by hand", "before training", "shared prompt alone", "commonest class"}
        assert set(figure["baseline"]) == beside
        of = [found[direction, name]["value"] for name in NAMES]
        assert found[direction, "mean of the sites"]["value"] == pytest.approx(sum(of) / 3)
    # C tells four classes apart, A and B three: the commonest of each, by counting
    assert found["local classes", "C"]["baseline"]["commonest class"] < 0.6


def test_only_the_shared_prompt_travels_and_each_site_keeps_its_own(finished):
    report = json.loads((finished / "reports" / "federation.json").read_text())
    numbers = 4 * 8  # tokens x width
    assert report["bytes_up"] == report["bytes_down"] == 3 * 3 * numbers * 4  # rounds, sites, bytes of a float
    assert set(keeping.read_part(finished / "server" / "server.safetensors").tensors) == {"state/p_G"}
    from safetensors.torch import load_file

    assert set(load_file(finished / "model" / "prompt.safetensors")) == {"p_G"}
    own = [
        load_file(folder / "prompt.safetensors") for folder in prompt_quality.site_folders(RunFolder(finished)).values()
    ]
    kept = [keeping.read_part(finished / "sites" / f"site-{n}" / "ledger.kept").tensors["home/p_L"] for n in (1, 2, 3)]
    for prompt, at_home in zip(own, kept, strict=True):
        assert set(prompt) == {"p_G", "p_L"} and prompt["p_L"].equal(at_home) and prompt["p_G"].equal(own[0]["p_G"])
    assert not kept[0].equal(kept[1]) and not kept[1].equal(kept[2])


def test_every_round_is_told_with_both_accuracies_and_what_was_spent(finished):
    report = json.loads((finished / "reports" / "federation.json").read_text())
    spent = [round_["epsilon"] for round_ in report["rounds"]]
    assert spent == sorted(spent) and spent[0] > 0
    for round_ in report["rounds"]:
        assert {"public_loss", "accuracy_local", "accuracy_neighbour"} == set(round_["quality"])
    page = (finished / "reports" / "report.html").read_text()
    for words in (
        "Accuracy, own classes",
        "Are pictures told apart by what their own site asks?",
        "Prompt written by hand",
        "accuracy on the sites&#x27; own classes",
        "What is really written of it",
        "a prompt of 4 vectors and nothing else",
    ):
        assert words in page, words


def test_the_ledgers_hold_one_joint_event_a_step_and_verify(finished):
    for number in (1, 2, 3):
        path = finished / "sites" / f"site-{number}" / "ledger.db"
        assert ledger.show(path)["steps"] == 6 and ledger.show(path)["valid"]
        (event, *rest) = ledger.events_of_jsonl(ledger.export_jsonl(path))
        assert event.noise_multiplier == pytest.approx(3.0) and not rest
    plan = json.loads((finished / "plan.json").read_text())
    assert [part["name"] for part in plan["parts"]] == ["p_G", "u", "v"]
    assert {part["max_grad_norm"] for part in plan["parts"]} == {0.2}


def test_evaluate_measures_the_same_again(finished):
    before = figures(finished)
    workflow.evaluate(finished)
    assert figures(finished) == before


def test_what_prompts_are_not_is_said(finished, own_home, tmp_path):
    with pytest.raises(UsageError, match="generates nothing"):
        workflow.train("prompts", assignments=SMALL, out=tmp_path)
    with pytest.raises(UsageError, match="tells pictures apart, and generates nothing"):
        workflow.generate(finished, texts=["a nodule"], out=tmp_path)
    with pytest.raises(UsageError, match="generates nothing"):
        workflow.audit(finished)
    assert "prompts" in [reason["code"] for reason in workflow.release(finished)["reasons"]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "setting",
    [
        "training.optimizer=adamw", "training.schedule=cosine", "training.warmup_steps=3", "training.weight_decay=0.1",
        "training.ema_decay=0.9", "federation.proximal=0.1", "federation.home=[p_G]", "federation.selection={kind: by_charged_loss}",
        "federation.holds={A: [p_G]}", "federation.mechanism={kind: update_level}", "privacy.bands=2", "privacy.clipping=automatic",
        "privacy.largest_batch=9", "privacy.max_grad_norm=auto", "evaluation.usefulness=[cnn]", "evaluation.directions=[text→image]",
        "evaluation.retrieval=true", "data.channels=3", "model.image={kind: pixels}",
        "model.objective.classes={A: {columns: [kind], names: {nodule: a, cavity: b}}}",
        "model.objective.method={kind: dpfpl, rank: 9}", "model.objective.encoders={kind: clip, path: nowhere}",
        "privacy.parts=[{name: p_G, modules: [p_G], max_grad_norm: 0.2}]", "model.objective.classes={}",
    ],
)  # fmt: skip
def test_a_setting_that_prompts_do_not_have_is_refused_and_not_passed_over(setting, own_home, tmp_path):
    name = setting.partition("=")[0].rpartition(".")[2]
    with pytest.raises(UsageError) as refused:
        workflow.federate("prompts", assignments=[*SMALL, setting], out=tmp_path, rounds=1)
    said = str(refused.value)
    assert name in said or "rank" in said or "model.text, image, audio" in said
    assert not list(tmp_path.glob("*/*/sites/*/ledger.db"))


def test_a_plan_needs_no_encoders_and_no_records(own_home, monkeypatch):
    def untouched(*arguments):
        raise AssertionError("was touched")

    monkeypatch.setattr(prompting, "ready", untouched)
    said = workflow.plan("prompts", assignments=["model.objective.tokens=6"])
    assert said["epsilon"] == pytest.approx(2.0, rel=1e-3) and said["parameters"] == 2 * 6 * 32
    assert [part["name"] for part in said["parts"]] == ["p_G", "u", "v"]
    assert all(part["noise_multiplier"] == pytest.approx(3**0.5 * said["noise_multiplier"]) for part in said["parts"])
    once = workflow.plan("prompts", assignments=["model.objective.releases=once"])
    assert once["parts"] == [] and once["max_grad_norm"] == 0.2


def test_an_interrupted_federation_goes_on_with_what_is_at_home(own_home, tmp_path):
    def stop(line):
        if line.startswith("round 1/"):
            os.kill(os.getpid(), signal.SIGINT)

    begun = {"assignments": SMALL, "out": tmp_path, "rounds": 3}
    first = workflow.federate("prompts", **begun, progress=stop)
    run = Path(first["run"])
    assert first["stopped"] == "interrupted" and not (run / "model").exists()
    kept = keeping.read_part(run / "sites" / "site-1" / "ledger.kept")
    assert kept.values["answered"] == [1, 0]
    after = workflow.federate("prompts", **begun, resume=True)
    assert after["run"] == str(run) and [site["rounds"] for site in after["sites"]] == [3, 3, 3]
    assert [ledger.show(run / "sites" / f"site-{n}" / "ledger.db")["steps"] for n in (1, 2, 3)] == [6, 6, 6]
    assert (
        not keeping.read_part(run / "sites" / "site-1" / "ledger.kept")
        .tensors["home/p_L"]
        .equal(kept.tensors["home/p_L"])
    )
    assert len(figures(run)) == 8


def test_a_clip_checkpoint_from_disk_in_the_place_of_the_small_pair(own_home, tmp_path):
    folder = write_clip(tmp_path / "clip")
    from sfumato.federation.prompts.encoders import fingerprint

    clip = [*SMALL, "model.objective.method={kind: promptfl}"]
    named = f"model.objective.encoders={{kind: clip, path: {folder}, sha256: {fingerprint(folder)}}}"
    assert workflow.plan("prompts", assignments=[*clip, named])["parameters"] == 4 * 16
    run = Path(workflow.federate("prompts", assignments=[*clip, named], out=tmp_path / "runs", rounds=1)["run"])
    assert figures(run)[0]["extractor"].startswith("CLIP clip, sha256 ")
    assert "sha256 of its files: " + fingerprint(folder) in (run / "reports" / "privacy.json").read_text()
    other = named.replace(fingerprint(folder), 64 * "a")
    with pytest.raises(UsageError, match="not that of the recipe"):
        workflow.federate("prompts", assignments=[*clip, other], out=tmp_path / "runs", rounds=1)


def test_sites_of_several_machines_must_stand_on_the_same_encoders(tmp_path):
    recipe = workflow.federated("prompts", [*SMALL, "data.source=folder", f"data.path={tmp_path}"])
    with pytest.raises(UsageError, match="train encoders of its own"):
        prompting.refuse_elsewhere(recipe)
    prompting.refuse_elsewhere(workflow.federated("prompts", SMALL))  # the same generated public records everywhere


def test_a_server_without_the_sites_own_parts_measures_the_shared_prompt(own_home, tmp_path):
    """As `federate server` runs it: records, ledgers and p_L are on other machines."""
    recipe = workflow.federated("prompts", SMALL, rounds=2)
    prepared = stages.load(recipe)
    prompting.ready(recipe, prepared)
    there = [
        replace(site, ledger=tmp_path / "elsewhere" / site.name / "ledger.db")
        for site in federating.members_here(recipe, prepared, None, None)
    ]
    answering = federating.here(there, federating.work_for(recipe, there), RunFolder(tmp_path))
    members = machines._members_elsewhere(recipe, {site.name: site.plan.population for site in there})
    answer = federating.run(
        recipe,
        out=tmp_path,
        progress=stages.quiet,
        members=members,
        prepared=prepared,
        engine=lambda members, work, folder: answering,
    )
    run = Path(answer["run"])
    assert not (run / "sites").exists() and all(site_memory.kept_at_home(site) for site in there)
    for figure in figures(run):
        assert figure["value"] == pytest.approx(figure["baseline"]["shared prompt alone"])
    notes = json.loads((run / "reports" / "quality.json").read_text())["notes"]
    assert sum("measured is the shared prompt alone" in note for note in notes) == 3
    report = json.loads((run / "reports" / "federation.json").read_text())
    assert all("accuracy_local" in round_["quality"] for round_ in report["rounds"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deployment", "flower"])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's own
def test_the_same_recipe_over_flower(engine, own_home, tmp_path):
    pytest.importorskip("flwr", reason="flwr is not installed: pip install 'sfumato[federation]'")
    answer = workflow.federate("prompts", assignments=SMALL, out=tmp_path, rounds=2, engine=engine)
    run = Path(answer["run"])
    assert [(site["rounds"], site["refused"]) for site in answer["sites"]] == [(2, 0)] * 3
    assert len(figures(run)) == 8 and answer["bytes_up"] == 2 * 3 * 4 * 8 * 4
    for folder in prompt_quality.site_folders(RunFolder(run)).values():
        assert (folder / "prompt.safetensors").is_file()
