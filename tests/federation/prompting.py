"""Encoders of a few numbers, and the obvious way to take a prompt's gradient: one record after another."""

from typing import Any

import numpy as np
import torch
from torch import nn

from sfumato.federation.policy import SitePolicy
from sfumato.federation.prompts.encoders import Texts
from sfumato.federation.prompts.methods import PromptModel
from sfumato.federation.prompts.settings import DpFpl, FedOTP, FedPGP, PromptFL, PromptSettings
from sfumato.federation.prompts.training import PromptSteps
from sfumato.federation.sites import Site
from sfumato.privacy.plan import DpSgd, NotPrivate
from sfumato.privacy.sampling import poisson_units
from sfumato.randomness import TestRandom
from sfumato.records import UnitTable

START, END = "<|startoftext|>", "<|endoftext|>"  # of a CLIP tokenizer
METHODS = [PromptFL(), FedOTP(), FedPGP(rank=2), DpFpl(rank=2), DpFpl(rank=2, residual="dropped")]
CLASSES = ("cat", "dog", "bird")


class Toy(nn.Module):
    """A class's feature: its context through a curved map of its own. float64."""

    width, features, scale = 5, 4, 6.0

    def __init__(self, patches: int = 3) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(3)
        self.words = nn.Parameter(torch.randn(26, self.width, generator=chance).double())
        self.out = nn.Parameter(torch.randn(self.width, self.features, generator=chance).double())

    def texts(self, names, tokens):
        return Texts(torch.tensor([[ord(name[0]) - 97] for name in names]), torch.zeros(len(names), dtype=torch.int64))

    def read(self, texts, context):
        word = self.words[texts.ids[:, 0]]
        told = torch.tanh(context + word[:, None]).sum(1) if context.shape[1] else torch.tanh(word)
        return nn.functional.normalize((word * 0.3 + told) @ self.out, dim=-1)

    def hand_written(self, names):
        return self.read(self.texts(names, 0), torch.zeros(len(names), 0, self.width))


def write_clip(folder):
    """A CLIP with random weights that reads letters, written by the library itself."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["."]
    vocab = {word: n for n, word in enumerate([*letters, *(f"{x}</w>" for x in letters), START, END])}
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    common = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": vocab[START], "eos_token_id": vocab[END], "pad_token_id": vocab[END]}
    text = {"vocab_size": len(vocab), "hidden_size": 16, "max_position_embeddings": 64, **common, **ends}
    vision = {"hidden_size": 20, "image_size": 16, "patch_size": 8, **common}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def model_of(method, *, seed=0, classes=CLASSES, **settings):
    settings = {"tokens": 3, "initial_std": 0.5, "seed": seed, **settings}
    return PromptModel(Toy(), classes, PromptSettings(method=method, **settings)).double()


def records(count, *, seed=0, classes=3, patches=3):
    """(R, 1 + V, E) features of length 1 and their labels."""
    chance = torch.Generator().manual_seed(seed)
    pictures = torch.randn(count, 1 + patches, Toy.features, generator=chance).double()
    return nn.functional.normalize(pictures, dim=-1), torch.arange(count) % classes


def table_of(count, units=None, **named):
    pictures, labels = records(count, **named)
    return UnitTable({"image": pictures, "label": labels}, units or [f"r{i:04d}" for i in range(count)])


def plan_of(units, *, noise=0.0, clip=0.5, settings=None, rate=1.0, steps=4, **named):
    """A DP-SGD plan; with ``settings``, in their parts."""
    parts = settings.parts(clip) if settings is not None else ()
    bound = float(np.sqrt(len(parts))) * clip if parts else clip
    return DpSgd(
        population=units, expected_batch_size=rate * units, steps=steps, noise_multiplier=noise, max_grad_norm=bound, parts=parts,
        delta=1e-3, **named,
    )  # fmt: skip


def free_plan(units, *, steps=4, rate=1.0):
    return NotPrivate(population=units, expected_batch_size=rate * units, steps=steps)


def one_by_one(model, pictures, labels, cut):
    """By block, the gradients of each record alone: u, v, p_G and p_L are leaves of one graph, as the paper writes the prompt."""
    found = []
    for x, y in zip(pictures, labels, strict=True):
        leaves = {"p_G": model.p_G.detach().clone().requires_grad_()}
        method = model.settings.method
        if isinstance(method, FedOTP):
            leaves["p_L"] = model.p_L.detach().clone().requires_grad_()
            prompts = torch.stack([leaves["p_G"], leaves["p_L"]])
        elif isinstance(method, PromptFL):
            prompts = leaves["p_G"][None]
        else:
            u, v = (model.u, model.v) if isinstance(method, FedPGP) else (cut.u, cut.v)
            leaves |= {"u": u.detach().clone().requires_grad_(), "v": v.detach().clone().requires_grad_()}
            whole = model.prompts(cut).detach()[0] - model.p_G.detach()
            rest = whole - (u @ v).detach()  # for DP-FPL the residual: a constant
            prompts = (leaves["p_G"] + leaves["u"] @ leaves["v"] + rest)[None]
        told = torch.stack([model.encoders.read(model.texts, p.expand(len(model.classes), -1, -1)) for p in prompts])
        loss = model.losses(x[None], y[None], told)[0]
        found.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
    return found


# -- the same rounds by every engine --

UNITS = 20


def building(method) -> Any:
    return lambda: model_of(method)


def sites_of(method, names, folder, *, noise=0.0, clip=1e3, steps=6):
    """A site of 20 records for each name, all of them in every step."""
    settings = model_of(method).settings
    return [
        Site(
            name=name,
            table=table_of(UNITS, seed=number, units=[f"{name}{i:02d}" for i in range(UNITS)]),
            plan=plan_of(UNITS, noise=noise, clip=clip, settings=settings, steps=steps),
            ledger=folder / name / "ledger.db",
            policy=SitePolicy(allow_not_private=True),
        )
        for number, name in enumerate(names)
    ]


def steps_of_their_own(model, table, plan, ledger, *, steps, first_step):
    """Chance that depends on the step alone: sites in one process and in many draw alike."""
    PromptSteps(TestRandom(first_step))(model, table, plan, ledger, steps=steps, first_step=first_step)


def rounds_by_hand(sites, method, *, rounds, steps):
    """(p_G, {site: what stays there}) by the paper's formulas, one record after another; equal weights, no clip, no noise."""
    first = model_of(method)
    shared = first.p_G.detach().clone()
    own = {s.name: {n: p.detach().clone() for n, p in first.trained().items() if n != "p_G"} for s in sites}
    for number in range(rounds):
        after = []
        for site in sites:
            chance, model = TestRandom(number * steps), model_of(method)
            model.load_state_dict({"p_G": shared, **own[site.name]}, strict=False)
            for _ in range(steps):
                cut = model.cut(chance)
                poisson_units(UNITS, 1.0, chance)  # all of them; what was drawn is drawn here too
                each = one_by_one(model, site.table.tensors["image"], site.table.tensors["label"], cut)
                mean = {name: torch.stack([grads[name] for grads in each]).mean(0) for name in each[0]}
                with torch.no_grad():
                    model.p_G -= 0.1 * mean["p_G"]
                    if cut is None:
                        for name in own[site.name]:
                            getattr(model, name).sub_(0.1 * mean[name])
                    else:
                        du, dv = mean["u"], mean["v"]
                        model.p_L -= 0.1 * (du @ cut.v + cut.u @ dv - cut.u @ cut.u.T @ du @ cut.v)
            after.append(model.p_G.detach().clone())
            own[site.name] = {n: getattr(model, n).detach().clone() for n in own[site.name]}
        shared = torch.stack(after).mean(0)
    return shared, own
