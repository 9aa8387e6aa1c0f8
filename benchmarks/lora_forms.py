"""DP-FedLoRA's three forms at one true epsilon, beside no privacy and beside training at one place.

    nice .venv/bin/python benchmarks/lora_forms.py --out benchmarks/results/lora_forms

A small Llama is trained here on public definitions of words (WordNet), with a tokenizer of the same, and stays frozen. Three hospitals of
the phantom clinic then train a low-rank adapter of it on their histories, in four rounds. Measured is the perplexity of a token of held-out
histories, the mean over histories of -log p, to the power of e; what a site sends in a round; and processor seconds of the whole
training, one thread. The rate with frozen A, which moves half of the product only, and the lines with bounds of a tenth were set after a
first run; nothing else was searched for.
"""

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from sfumato.data import prepare
from sfumato.data.clinic import Clinic
from sfumato.data.settings import DataSettings
from sfumato.federation import local_training
from sfumato.federation import mechanism_settings as of
from sfumato.federation.mechanisms import build as mechanism_of
from sfumato.federation.mechanisms.fed_lora import noise_of_product, side_of
from sfumato.federation.policy import SitePolicy
from sfumato.federation.settings import FederationSettings
from sfumato.federation.simulate import simulate, split_by_site, work_of
from sfumato.federation.sites import Site
from sfumato.models import model as models
from sfumato.models.settings import Adapter, ModelSettings
from sfumato.models.shapes import Shapes
from sfumato.privacy.plan import NotPrivate
from sfumato.privacy.planning import training_plan
from sfumato.privacy.settings import PrivacySettings
from sfumato.records import Record
from sfumato.training.loop import make_optimizer
from sfumato.training.rounds import LocalTraining
from sfumato.training.settings import PerformanceSettings, TrainingSettings

PATIENTS, HELD_OUT, LONGEST = 3_000, 300, 96
ROUNDS, LOCAL_STEPS, BATCH = 4, 15, 32
EPSILON, DELTA = 8.0, 1e-5
LEARNING_RATE = {"a_and_b": 1e-2, "b": 3e-2}
MAX_A_NORM, MAX_B_NORM, MAX_GRAD_NORM = 0.3, 0.3, 1.0
RANK, ALPHA = 4, 8


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table. ``epsilon`` None: no privacy. ``sites`` 1: all records at one place."""

    name: str
    trained: str = "a_and_b"
    level: str = "record"  # or "site"
    epsilon: float | None = EPSILON
    sites: int = 3
    bounds: float = 1.0  # times MAX_A_NORM and MAX_B_NORM


LINES = (
    Line(name="one place, no privacy", sites=1, epsilon=None),
    Line(name="one place, DP-SGD", sites=1),
    Line(name="three sites, no privacy", epsilon=None),
    Line(name="three sites, no privacy, frozen A", epsilon=None, trained="b"),
    Line(name="(i) DP-FedLoRA: A and B noised", level="site"),
    Line(name="(ii) frozen A: B noised", level="site", trained="b"),
    Line(name="(iii) DP-SGD on A and B", level="record"),
    Line(name="(iii) with frozen A", level="record", trained="b"),
    Line(name="(i), bounds of a tenth", level="site", bounds=0.1),
    Line(name="(ii), bounds of a tenth", level="site", trained="b", bounds=0.1),
    Line(name="(i), larger epsilon", level="site", epsilon=1_000.0),
    Line(name="(ii), larger epsilon", level="site", epsilon=1_000.0, trained="b"),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="without suffix: .md and .json are written")
    arguments.add_argument("--pretraining", type=int, default=500, help="steps on public texts")
    given = arguments.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        base = Path(folder) / "llama"
        pretrain(base, given.pretraining)
        taught = time.process_time() - began
        histories = [replace(record, image=None) for record in Clinic(patients=PATIENTS, seed=0)]
        held_out = [replace(record, image=None) for record in Clinic(patients=HELD_OUT, seed=0, public=True)]
        start = perplexity(built(base, "b"), held_out)
        print(f"base: {start:.2f} after {taught:.0f} s", flush=True)
        found = []
        for number, line in enumerate(LINES):
            found.append(measured(line, base, histories, held_out, Path(folder) / f"run{number}"))
            print(json.dumps(found[-1]), flush=True)
        noise = sizes_of_noise(base)
    values: dict[str, Any] = {
        "command": f"nice .venv/bin/python benchmarks/lora_forms.py --pretraining {given.pretraining} --out benchmarks/results/lora_forms",
        "machine": f"{platform.system()} {platform.machine()}, one thread, torch {torch.__version__}",
        "base_perplexity": start,
        "pretraining_seconds": taught,
        "patients": PATIENTS, "histories": len(histories), "held_out": len(held_out), "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS, "batch": BATCH, "delta": DELTA, "lines": found, "noise": noise,
    }  # fmt: skip
    text = page(values)
    print(text)
    if given.out is not None:
        given.out.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(text, encoding="utf-8")


# ---- the public model ----


def pretrain(folder: Path, steps: int) -> None:
    """A Llama of 0.2 million numbers on definitions of words, and its tokenizer of 600 tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    said = prepare.load(
        DataSettings(source="wordnet", public_units=100, limit_units=8_000), unit="record", private=False
    )
    texts = [str(record.text) for record in said.private]
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<end>"]
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = [torch.tensor([1, *words(text, add_special_tokens=False)["input_ids"][:62], 1]) for text in texts]
    settings = TrainingSettings(learning_rate=3e-3)
    optimizer, chance = make_optimizer(model, settings), torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        rows = [ids[i] for i in torch.randint(len(ids), (32,), generator=chance).tolist()]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        model(input_ids=batch, attention_mask=(labels != -100).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def built(base: Path, trained: Any) -> Any:
    objective = Adapter(
        path=str(base), rank=RANK, alpha=ALPHA, targets=("q_proj", "v_proj"), trained=trained, longest=LONGEST
    )
    return models.build(ModelSettings(image=None, text=None, objective=objective), Shapes(), seed=0)


def perplexity(model: Any, records: Sequence[Record]) -> float:
    table = model.eval().encode(records)
    with torch.no_grad():
        batch = table.batch(range(table.num_units), records_per_unit=table.num_records)
        return math.exp(float(model.row_losses(batch, 1, torch.Generator()).mean()))


# ---- one line ----


def mechanism(line: Line) -> of.Mechanism:
    if line.level == "record":
        return of.RecordLevel()
    a, b = MAX_A_NORM * line.bounds, MAX_B_NORM * line.bounds
    return of.FedLora(epsilon=line.epsilon, delta=DELTA, max_a_norm=a, max_b_norm=b)


def measured(
    line: Line, base: Path, histories: Sequence[Record], held_out: Sequence[Record], folder: Path
) -> dict[str, Any]:
    """Trains as the line says, from the same start."""
    split = split_by_site(histories, line.sites)
    steps, batch = ROUNDS * LOCAL_STEPS, BATCH * (3 if line.sites == 1 else 1)
    settings = FederationSettings(sites=line.sites, rounds=ROUNDS, local_steps=LOCAL_STEPS, mechanism=mechanism(line))
    build = partial(built, base, line.trained)
    encoder = build()
    sites = []
    for name, records in split.items():
        population = len({record.unit for record in records})
        plan: Any = NotPrivate(
            population=population, expected_batch_size=batch, steps=steps, unit="person", records_per_unit=1
        )
        if line.level == "record" and line.epsilon is not None:
            private = PrivacySettings(
                unit="person", records_per_unit=1, epsilon=line.epsilon, delta=DELTA, max_grad_norm=MAX_GRAD_NORM
            )
            plan = training_plan(
                private, steps=steps, expected_batch_size=batch, population=population, records=len(records)
            )
        table = cache(partial(encoder.encode, records))
        policy = SitePolicy(allowed_mechanisms=None, allow_not_private=line.epsilon is None)
        sites.append(Site(name=name, table=table, plan=plan, ledger=folder / name / "ledger.db", policy=policy))
    training = TrainingSettings(learning_rate=LEARNING_RATE[line.trained], warmup_steps=0)
    steps_of_site = LocalTraining(training, PerformanceSettings(threads=1))
    work = work_of(sites, build=build, train_steps=steps_of_site, settings=settings)
    began = time.process_time()
    result = simulate(sites, work, run=folder.name, folder=folder / "server")
    seconds = time.process_time() - began
    model = build()
    local_training.load_trained(model, result.state)
    adapter = sum(4 * tensor.numel() for tensor in result.state.values())
    exchanged = result.bytes_up / (ROUNDS * line.sites)
    return {
        "name": line.name,
        "trained": line.trained,
        "epsilon": result.epsilon,
        "unit": result.unit if line.epsilon is not None else None,
        "trust": result.trust if line.epsilon is not None else None,
        "perplexity": perplexity(model, held_out),
        "bytes_a_round": exchanged if line.sites > 1 else 0,
        "bytes_over_adapter": exchanged / adapter,
        "processor_seconds": seconds,
    }


def sizes_of_noise(base: Path) -> dict[str, float]:
    """Root expected squares, per number of one layer's (alpha / r) BA, of what one round's noise at EPSILON adds where the round's
    update of B was as long as its bound and A is as it began."""
    model = built(base, "a_and_b")
    state = local_training.trained_state(model)
    sites = ("a", "b", "c")
    settings = FederationSettings(sites=3, rounds=ROUNDS, mechanism=mechanism(Line(name="", level="site")))
    from sfumato.federation.rounds import make_public

    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    plan = (
        mechanism_of(settings)
        .promise(make_public(settings, dict.fromkeys(sites, 1_000), dict.fromkeys(sites, shapes)))
        .at_site
    )
    assert plan is not None and plan.max_update_norm is not None
    z = plan.noise_multiplier * plan.max_update_norm
    a = next(tensor for name, tensor in state.items() if side_of(name) == "A")
    b = torch.zeros(next(tensor for name, tensor in state.items() if side_of(name) == "B").shape)
    b += MAX_B_NORM / math.sqrt(b.numel())
    std = {side: z * bound / math.sqrt(len(sites)) for side, bound in (("b", MAX_B_NORM), ("a", MAX_A_NORM))}
    terms = noise_of_product(b, a, std["b"], std["a"])
    numbers = b.shape[0] * a.shape[1]
    scale = ALPHA / RANK
    return {
        "z": z,
        "matrices": len(state),
        "B A": scale * float((b @ a).norm()) / math.sqrt(numbers),
        **{name: scale * math.sqrt(value / numbers) for name, value in terms.items()},
    }


# ---- the page ----


def page(values: dict[str, Any]) -> str:
    lines = [
        "# DP-FedLoRA: three forms at one true epsilon",
        "",
        f"`{values['command']}`, {values['machine']}. {values['histories']} histories of {values['patients']} phantom patients at three "
        f"unlike sites, {values['rounds']} rounds of {values['local_steps']} local steps of {values['batch']} patients (one place: three "
        f"times as many); rank {RANK} on queries and values, learning rate {LEARNING_RATE['a_and_b']:g}, with frozen A "
        f"{LEARNING_RATE['b']:g}; bounds {MAX_A_NORM:g} (A) and {MAX_B_NORM:g} (B); delta {values['delta']:g}. Held out: "
        f"{values['held_out']} histories. The frozen model alone: perplexity {values['base_perplexity']:.2f}.",
        "",
        "| form | epsilon | unit | trusted | perplexity | bytes up, a site and round | of the adapter | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in values["lines"]:
        epsilon = "none" if line["unit"] is None else f"{line['epsilon']:.4g}"
        sent = f"{line['bytes_a_round']:,.0f}" if line["bytes_a_round"] else "-"
        whole = f"{line['bytes_over_adapter']:.2f}" if line["bytes_a_round"] else "-"
        trusted = "-" if line["unit"] is None else "nobody" if line["bytes_a_round"] else "the place"
        lines.append(
            f"| {line['name']} | {epsilon} | {line['unit'] or '-'} | {trusted} | {line['perplexity']:.2f} | {sent} | {whole} "
            f"| {line['processor_seconds']:.1f} |"
        )
    noise = values["noise"]
    lines += [
        "",
        "Equal epsilon is not equal protection: a site's unit is all its patients at once, a person's is one of them.",
        "",
        f"What one round's noise at epsilon {EPSILON:g} adds to (alpha / r) BA of one layer under (i), root mean square of a number, where "
        f"the update of B is as long as its bound (z = {noise['z']:.3g}, {noise['matrices']:.0f} matrices): "
        + ", ".join(f"{name} {noise[name]:.3g}" for name in ("B A", "B N_A", "N_B A", "N_B N_A"))
        + ". With A frozen there is N_B A alone, and z is smaller by sqrt(2).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
