"""A recipe as YAML that explains itself: every key with its value and one comment."""

import json
from typing import Any

from sfumato import recipe as recipes
from sfumato.recipe import Recipe

EXPLAINED = {
    "name": "the run's folder: runs/NAME/v1, v2, ...",
    "data": "Where the records come from, and which of them are declared public.",
    "data.source": "folder, parquet, arrow, messages, webdataset, dicom, or a built-in set: clinic, emoji, mnist, ...",
    "data.path": "the folder or file; relative to where sfumato is started",
    "data.hospitals": "clinic only: 3 sites that differ a little, or 4 that differ much",
    "data.units": "clinic only: how many patients to make up",
    "data.public_units": "set aside by a hash of their name, shown in reports, never trained on: they are NOT protected",
    "data.unit_column": "the column that names the person; null makes every record its own unit",
    "data.site_column": "sfumato federate on one machine: the metadata column that says which site holds a record, such as style",
    "data.text_column": "the column that holds the text; null takes text or caption",
    "data.modalities": "what is read, for example [text, audio]; null takes what the source usually has",
    "data.may_lack": "true lets a record lack some of them, but not all",
    "data.store": "memory; or mapped: prepared once on disk, for data that are larger than the memory",
    "data.dicom_tags": "dicom only: the tags that may become metadata",
    "data.deduplicate": "{} leaves out copies within a unit and copies of public records; null leaves nothing out",
    "data.balance": "{column: kind, keep: {nodule: 0.5}} thins what is too common",
    "data.limit_units": "a number here tries the recipe on few units first",
    "data.image_size": "pixels per side after resizing",
    "data.channels": "1 grey, 3 colour",
    "data.audio_seconds": "where the model has sounds: shorter ones end in silence, longer ones are cut",
    "data.sample_rate": "hertz that sounds are modelled at; others are resampled",
    "data.languages": "clinic only: en, ru, zh",
    "data.seed": "of made-up data and of the split; of nothing private",
    "model": "Codecs (what becomes a tensor), a backbone (what learns), an objective (what it learns).",
    "model.image": "pixels; cosine with kept: 16 (the lowest frequencies); vae with a PUBLIC autoencoder's folder; tokens: patch_tokens",
    "model.audio": "null without sounds; waveform, or kind: mel with bands: 32 (kept: [12, 40]: its outline); tokens: mel_tokens, mu_law",
    "model.text": "hashed_words is trained privately; frozen_sentence is public, outside the guarantee; tokens: bytes, words, tokenizer",
    "model.backbone": "mlp is fast on few cores; unet is the one of diffusers; transformer says tokens",
    "model.objective": "the family: diffusion or flow, to one target; variational, adversarial, alignment; autoregressive: tokens; "
    "prompts, which tell pictures apart: {classes: {'*': {columns: [label], names: {cat: a cat, dog: a dog}}}, method: {kind: dpfpl}, "
    "encoders: {kind: clip, path: ...}}",
    "model.random_features": "of mechanism mean_embedding: what the mean is of",
    "model.warm_start": "with privacy.warm_start: what is released first, {release: {kind: class_moments, ...}}, and trained on",
    "model.sound_moments": "of mechanism mean_embedding: sums over classes of sounds, each where it is loudest, {aspects: [...]}",
    "model.class_moments": "of mechanism mean_embedding: sums over classes, and Gaussians fitted to them, {classes: [...], passes: 20}",
    "model.reader": "of a diffusion or flow: reads pictures, {questions: [...]}; answers in public texts, takes one of several drawn",
    "model.sampling": "how records are drawn afterwards; changes no guarantee",
    "public_start": "null; or a training on PUBLIC records before the private steps: {data: {source: icons, public_units: 0, ...}, "
    "steps: 2000, trained: [denoiser.outward]}; trained: what the private steps train, []: everything",
    "privacy": "The guarantee. These lines say everything that it depends on, together with steps and batch size below.",
    "privacy.mechanism": "dp_sgd; latents, mean_embedding or codebook: released once, then trained on; or none: not private, and marked so",
    "privacy.unit": "what is protected: one record, or all the records of one person",
    "privacy.records_per_unit": "at most this many records of a person are used in a step (their mean gradient counts)",
    "privacy.population": "the public number of units; null counts them and DECLARES THE COUNT PUBLIC",
    "privacy.adjacency": "two data sets differ by one unit more or less (or zero_out, replace_one); latents have only the latter two",
    "privacy.latents": "of mechanism latents: {form: independent or shared, modalities: [{name: image, max_norm: 1.0}, ...], centre: 0.03}",
    "privacy.bands": "more than 1 correlates the noise of so many consecutive steps",
    "privacy.largest_batch": "of a larger sample a random subset of so many units is taken; null takes all",
    "privacy.noise": "gaussian; or discrete, sampled exactly on the integers, slower",
    "privacy.codebook": "of mechanism codebook: {centre: 0.05, max_norm: 1.0}",
    "privacy.mean_embedding": "of mechanism mean_embedding: {max_norm: 1.0}; {first: 0.15}, of the guarantee, for cells of classes",
    "privacy.epsilon": "the budget: below 2 strong and hard to learn with, 5 to 10 usual, above 10 weak",
    "privacy.noise_multiplier": "instead of epsilon (then set epsilon: null)",
    "privacy.delta": "the slack of the guarantee, far below 1/N; auto is 1/(N ln N)",
    "privacy.max_grad_norm": "each unit's gradient is cut to this length; auto estimates one, paid from epsilon",
    "privacy.clip_estimate": "for auto: {share: 0.02, quantile: 0.5}, of epsilon and of the gradients' lengths",
    "privacy.warm_start": "{share: 0.03}: of the guarantee, spent before the first step on what model.warm_start says",
    "privacy.clipping": "flat: one cut; per_layer; automatic: all to one length; adaptive: the length follows the median",
    "privacy.parts": "parts of the model with a cut each: [{name: text, modules: [text_encoder], max_grad_norm: 0.5, share: 0.4}, ...]",
    "privacy.accountant": "how the events are added up",
    "privacy.on_exhausted": "what happens when the budget is spent",
    "privacy.account": "the ledger that all runs on these data share; null is .sfumato/account.db beside them",
    "privacy.account_epsilon": "a limit on all runs of that account together: kept there from now on, never raised",
    "training": "The loop. Steps and batch size belong to the guarantee; the rest only to how well it learns.",
    "training.steps": "each step is one event in the ledger",
    "training.expected_batch_size": "units in a batch, on average; larger hides the noise better",
    "training.optimizer": "adamw, sgd, or dp_adam_bc: Adam with the noise's variance taken off its second moment",
    "training.learning_rate": "",
    "training.schedule": "cosine or constant",
    "training.warmup_steps": "",
    "training.weight_decay": "",
    "training.ema_decay": "the released weights are a running mean; this is its memory",
    "training.seed": "of the first weights and of sample grids; never of sampling or noise",
    "training.log_every": "steps",
    "training.picture_every_seconds": "a grid of samples in the run's folder",
    "training.checkpoint_every_seconds": "",
    "training.tensorboard": "true needs the package tensorboard",
    "federation": "Only for `sfumato federate`.",
    "federation.sites": "",
    "federation.rounds": "",
    "federation.local_steps": "steps of one site in one round",
    "federation.populations": "public number of units of every site, in the order of their names; []: counted, and declared public",
    "federation.mechanism": "what is private: record_level, update_level, fed_lora, central, local_and_global, ldp_fl, distributed",
    "federation.aggregation": "mean; or trimmed_mean, median, krum, after noise that each site has added itself",
    "federation.server": "the server's step: {kind: plain}, momentum, or adam",
    "federation.selection": "who is asked in a round: everyone; uniform, by_size: by a coin each; by_charged_loss",
    "federation.compression": "of what is sent: none, bf16, int8",
    "federation.weights": "of the sites in a mean: population or equal",
    "federation.proximal": "mu of FedProx; 0 is federated averaging",
    "federation.least_sites": "a round with fewer replies is discarded, and stays charged",
    "federation.patience": "rounds without a lower public loss after which no further one is opened; null: all rounds",
    "federation.identities": "by site, its public key for secure aggregation, as `federate site` prints it; {} in one process",
    "federation.home": "parameters (or the beginnings of their names) that each site trains for itself and sends to nobody",
    "federation.holds": "by site, which parameters it trains and exchanges, where not all: {A: [eyes, core]}",
    "evaluation": "What is measured after training, on public records.",
    "evaluation.samples": "pictures made and measured",
    "evaluation.judge_seconds": "training time of the classifier that reads them",
    "evaluation.directions": "such as [text→image]; []: every direction that the model has",
    "evaluation.usefulness": "networks that learn from what was made and are tested on real records: cnn, mlp, logistic_regression",
    "evaluation.retrieval": "true also measures retrieval where facts are known",
    "evaluation.watch": "the loss on public records while it trains, the best weights by it, and a note where it rises",
    "evaluation.watch_seconds": "training time of a reader that also watches known facts; 0: the loss alone",
    "evaluation.twin": "true also trains without privacy, to say what privacy cost: NEVER release the twin",
    "audit": "How hard the attacks try.",
    "audit.members": "units of each side, trained on and not",
    "audit.draws": "losses averaged for one record",
    "audit.confidence": "of the lower bound on epsilon",
    "audit.control_steps": "of the model without noise that the attack must catch; too few, and the audit is INCONCLUSIVE",
    "release": "What the gate asks before a bundle is written.",
    "release.max_epsilon": "above this a bundle is refused",
    "release.require_audit": "",
    "release.require_quality": "",
    "performance": "Speed and memory; nothing here can change the guarantee.",
    "performance.processes": "train in so many processes of this machine, each with a share of every batch",
    "performance.max_physical_batch_size": "units computed at once; smaller needs less memory; null is the whole batch",
    "performance.threads": "null is torch's own choice",
}


def to_commented_yaml(recipe: Recipe, heading: str) -> str:
    """The recipe with all its values; ``recipe.load`` of it gives the same recipe."""
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for section, values in recipes.to_mapping(recipe).items():
        if isinstance(values, dict):
            lines += ["", f"# {EXPLAINED.get(section, '')}".rstrip(), f"{section}:"]
            for key, value in values.items():
                lines += _lines(key, value, EXPLAINED.get(f"{section}.{key}", ""))
        else:
            lines += ["", _with_comment(f"{section}: {_scalar(values)}", EXPLAINED.get(section, ""))]
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any, comment: str) -> list[str]:
    if isinstance(value, dict) and value:
        inner = [f"    {name}: {_scalar(inner)}" for name, inner in value.items()]
        return [_with_comment(f"  {key}:", comment), *inner]
    return [_with_comment(f"  {key}: {_scalar(value)}", comment)]


def _scalar(value: Any) -> str:
    """One value on one line; JSON is YAML, and quotes whatever could be misread."""
    plain = isinstance(value, str) and value.replace("_", "").replace("-", "").isalpha()
    plain = plain and value.isascii() and value.lower() not in _NOT_STRINGS
    return value if plain else json.dumps(value, ensure_ascii=False)


_NOT_STRINGS = ("null", "none", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf")


def _with_comment(line: str, comment: str) -> str:
    return f"{line:<38} # {comment}" if comment else line
