"""This project's engine, with every way to clip, on batches of a hand-written loop and on batches that it draws."""

import math
from functools import lru_cache

import numpy as np
import torch
from tests.auditing.adapters import loop
from tests.auditing.adapters.together import together

from sfumato.auditing.conformance import Run, Trainer
from sfumato.models import model as models
from sfumato.models.settings import ModelSettings
from sfumato.privacy.adaptive import AdaptiveClip
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.gradients.groups import Part
from sfumato.privacy.processes import Processes
from sfumato.privacy.sampling import poisson_units
from sfumato.randomness import TestRandom
from sfumato.records import Record, UnitTable

C, SIGMA, EXPECTED, RATE = 0.7, 1.0, 4.0, 0.002
COUNTED = AdaptiveClip(count_noise=3.0)
PART_BOUNDS = (0.3, 2.0)
KINDS = ("flat", "per_layer", "automatic", "adaptive", "parts")


def random_of(generator):
    """A test source, so that a pass can be repeated; what is released draws from SecretRandom."""
    return TestRandom(int(torch.randint(2**62, (1,), generator=generator)))


def engine_of(model, kind, noise_multiplier, random, **more):
    options = {"max_grad_norm": C, "clipping": COUNTED if kind == "adaptive" else kind}
    if kind == "parts":
        first = next(
            name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
        )
        bounds = {"first": ((first,), PART_BOUNDS[0]), "rest": (("",), PART_BOUNDS[1])}
        options = {"parts": {n: Part(modules=m, max_grad_norm=c) for n, (m, c) in bounds.items()}}
    return DifferentialPrivacyEngine(model, noise_multiplier=noise_multiplier, random=random, **options, **more)


def step_of(kind):
    def step(model, inputs, noise_multiplier, generator):
        by_hand = {"expected_batch_size": EXPECTED, "sampling_rate": RATE, "loss_reduction": "sum"}
        engine = engine_of(model, kind, noise_multiplier, random_of(generator), **by_hand)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
        model(inputs).sum().backward()
        optimizer.step()
        bound = engine.max_grad_norm
        engine.detach()
        if kind == "adaptive":  # the noisy count, as the next bound shows it
            return [EXPECTED * (COUNTED.quantile - 0.5 - math.log(bound / C) / COUNTED.learning_rate)]

    return step


def train_of(kind):
    def train(model, batches, noise_multiplier, generator):
        by_hand = {"expected_batch_size": EXPECTED, "sampling_rate": RATE, "loss_reduction": "sum"}
        engine = engine_of(model, kind, noise_multiplier, random_of(generator), **by_hand)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
        for inputs in batches:
            model(inputs).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        events = engine.state_dict()["events"]
        engine.detach()
        return Run(charged=sum(e["count"] for e in events), noise_multiplier=max(e["noise_multiplier"] for e in events))

    return train


def resume_of(kind):
    def resume(model, batches, stop_after, noise_multiplier, generator):
        """Batches that the engine draws, of units without a gradient; killed, and resumed from a checkpoint a step older."""
        width = sum(p.numel() for p in model.parameters())
        dtype = next(model.parameters()).dtype
        table = UnitTable(
            {"x": torch.zeros(200, width, dtype=dtype), "index": torch.arange(200)}, [f"{i:03d}" for i in range(200)]
        )
        released, drawn, charged = [], [], 0
        state = None
        for steps in (stop_after, len(batches) - stop_after + 1):
            engine = engine_of(model, kind, noise_multiplier, random_of(generator))
            if state is not None:
                engine.load_state_dict(state)
            optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
            for i, batch in enumerate(engine.batches(table, expected_batch_size=20, steps=steps)):
                before = [p.detach().clone() for p in model.parameters()]
                model(batch.tensors["x"]).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                moved = [(b - p.detach()).double().flatten() for b, p in zip(before, model.parameters(), strict=True)]
                released.append(torch.cat(moved))
                drawn.append(batch.tensors["index"].numpy())
                charged += 1
                if i == steps - 2:
                    state = engine.state_dict()
            engine.detach()
        return Run(charged=charged, noise_multiplier=noise_multiplier, released=released, drawn=drawn)

    return resume


def sample(population, sampling_rate, steps, generator):
    random = random_of(generator)
    return [poisson_units(population, sampling_rate, random) for _ in range(steps)]


def step_of_persons(model, inputs, owner, noise_multiplier, generator):
    table = UnitTable({"x": inputs}, [f"{person:03d}" for person in owner.tolist()])
    engine = engine_of(model, "flat", noise_multiplier, random_of(generator))
    size = table.num_units
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=size / EXPECTED))
    for batch in engine.batches(table, expected_batch_size=size, steps=1, records_per_unit=100):
        batch.per_unit(model(batch.tensors["x"])).mean().backward()
        optimizer.step()
    engine.detach()


def step_together(model, inputs, noise_multiplier, generator, processes):
    """One step by so many processes of torch.distributed, each with every so-many-th of the units and its own chance."""
    seeds = torch.randint(2**62, (processes,), generator=generator).tolist()
    shares = [inputs[rank::processes] for rank in range(processes)]
    first, *others = together(processes, one_of_several, model, shares, noise_multiplier, seeds)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), first, strict=True):
            parameter.copy_(value)


def one_of_several(group, rank, size, model, shares, noise_multiplier, seeds):
    by_hand = {"expected_batch_size": EXPECTED, "sampling_rate": RATE, "loss_reduction": "sum"}
    random = TestRandom(seeds[rank])
    engine = engine_of(model, "flat", noise_multiplier, random, processes=Processes(group), **by_hand)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    model(shares[rank]).sum().backward()
    optimizer.step()
    engine.detach()
    return [p.detach() for p in model.parameters()]


@lru_cache(maxsize=1)
def _pipeline():
    return models.build(ModelSettings(), picture_shape=(8, 8, 1))


def prepare(inputs):
    """What happens to records before a training: a model's codecs make tensors of them, grouped by unit. A row of numbers
    becomes a picture of them, and a text of words for them."""
    pixels = (128 + 40 * inputs.double()).clamp(0, 255).to(torch.uint8)
    records = [
        Record(
            id=f"{i:03d}",
            unit=f"{i:03d}",
            image=np.resize(row.numpy(), (8, 8, 1)),
            text=" ".join(f"word{v}" for v in row.tolist()),
        )
        for i, row in enumerate(pixels)
    ]
    table = _pipeline().encode(records)
    batch = table.batch(range(len(records)), records_per_unit=1)
    return torch.cat([batch.tensors[name].double().flatten(1) for name in ("image", "text")], dim=1)


def claim(kind, **changes):
    bound = math.hypot(*PART_BOUNDS) if kind == "parts" else C
    clipping = "other" if kind == "parts" else kind
    said = {"max_grad_norm": bound, "clipping": clipping, "hardened_noise": True}
    return loop.claim(**{**said, **changes})


def trainer(kind="flat", dtype="float64", **changes) -> Trainer:
    return Trainer(
        **{
            "claim": claim(kind, dtype=dtype),
            "step": step_of(kind),
            "name": f"sfumato, clipping {kind}",
            "sample": sample,
            "train": train_of(kind),
            "resume": resume_of(kind),
            "step_together": step_together if kind == "flat" else None,
            "prepare": prepare,
            "accountant": loop.accountant,
            "model": loop.Network,
            "units": loop.units,
            **changes,
        }
    )


def of_persons() -> Trainer:
    return trainer(claim=claim("flat", unit="person"), step_of_persons=step_of_persons, name="sfumato, persons")
