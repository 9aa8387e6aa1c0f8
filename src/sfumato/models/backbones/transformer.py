"""A small decoder-only transformer of ``transformers``, begun with what is publicly known of its tokens.

Under noise everything that need not be learnt from private records should not be: which tokens are alike, which belong to
one modality, and where in a field a position lies, is in the first weights.

Shapes: D width, V tokens, T positions.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.sequences import Sequences
from sfumato.models.settings import Transformer

_MARGIN = 8.0  # of a logit: by how much a token of another modality begins less likely, before the layers blur it
_SHARP = 6.0  # of a score: what a head that reads one modality has for its tokens, before the layers blur it


def build(settings: Transformer, sequences: Sequences) -> Any:
    """A ``GPT2LMHeadModel`` without dropout and with a head of its own. Its chance is torch's."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    special = sequences.special
    bos, eos, pad = (special[name] for name in ("<bos>", "<eos>", "<pad>"))
    model = GPT2LMHeadModel(
        GPT2Config(
            architectures=["GPT2LMHeadModel"],
            vocab_size=sequences.vocabulary,
            n_positions=sequences.length,
            n_embd=settings.width,
            n_layer=settings.depth,
            n_head=settings.heads,
            n_inner=settings.inner,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=settings.width**-0.5,
            tie_word_embeddings=False,
            use_cache=True,
            bos_token_id=bos,
            eos_token_id=eos,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True, max_length=sequences.length, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad
    )
    _begin(model, sequences)
    return model


def of_nobody(model: Any, ids: Tensor) -> Tensor:
    """(0, T) -> (0, T, V): an empty batch through every layer, so that it has a graph like any other. Attention, which
    ``transformers`` cannot compute for no rows, is left out: nothing is to be attended to."""
    body = model.transformer
    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
    for block in body.h:
        queries = block.attn.c_attn(block.ln_1(x))[..., : x.shape[-1]]
        x = x + block.attn.c_proj(queries)
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(body.ln_f(x))


@torch.no_grad()
def _begin(model: Any, sequences: Sequences) -> None:
    """The first weights of embeddings and head.

    A token is its modality's vector plus one of its coordinates, a position one of the places that it can be and of the next,
    all by random projections. The head's rows begin as their modality's vector: of what has been read, it says more of its kind.
    """
    width = model.config.n_embd
    words, positions, head = model.transformer.wte.weight, model.transformer.wpe.weight, model.lm_head.weight
    nn.init.normal_(words, std=0.5)
    nn.init.normal_(head, std=0.02)
    nn.init.zeros_(positions)
    meanings = torch.zeros(len(positions))  # how many places a position can be, or be before
    # of a position that reads a token of the modality, x consists of: modality, token, place, next place
    modality_std, part_std = 0.5, 0.5
    length = math.sqrt(modality_std**2 + 3 * part_std**2)
    for name in sequences.names:
        codec = sequences.codecs[name]
        mine = slice(sequences.first[name], sequences.first[name] + codec.vocabulary)
        vector = torch.randn(width) * modality_std
        coordinates = codec.coordinates()
        if coordinates is not None:
            words[mine] = _projected(coordinates, width) * part_std
            head[mine] += _projected(coordinates, width) * 0.05
        words[mine] += vector
        words[sequences.start(name)] += vector
        head[mine] += vector * (_MARGIN * length / (width * modality_std**2))
        _read_evenly(model, sequences.names.index(name), vector, sequences.places(name))
        places = codec.places()
        places = _waves(sequences.places(name)) if places is None else places
        here, following = (_projected(places, width) * part_std for _ in range(2))
        for start in sequences.starts_of(name):
            positions[start + 1 : start + 1 + len(places)] += here
            positions[start : start + len(places)] += following
            meanings[start + 1 : start + 1 + len(places)] += 1
            meanings[start : start + len(places)] += 1
    positions /= (meanings / 2).clamp(min=1).sqrt()[:, None]


@torch.no_grad()
def _read_evenly(model: Any, head: int, vector: Tensor, places: int) -> None:
    """In every layer one head begins by reading all tokens of one modality alike: a bag of words, or of patches.

    Its scores are sharp in the modality's vector and in nothing else; what it reads comes out at about unit scale.
    """
    config = model.config
    if head >= config.n_head:
        return
    width, of_head = config.n_embd, config.n_embd // config.n_head
    mine = slice(head * of_head, (head + 1) * of_head)
    for block in model.transformer.h:
        queries, keys, values = block.attn.c_attn.weight.split(width, dim=1)
        queries[:, mine] = 0.0
        block.attn.c_attn.bias[:width][mine][0] = math.sqrt(of_head)
        keys[:, mine][:, 0] = _SHARP * vector / vector.square().sum()
        # not the modality's own vector, which all of them have
        values[:, mine] -= torch.outer(vector, vector @ values[:, mine]) / vector.square().sum()
        block.attn.c_proj.weight[mine] *= math.sqrt(places) / 2


def _projected(features: Tensor, width: int) -> Tensor:
    """(N, F) -> (N, D) by one random matrix, so that an entry's standard deviation is about 1."""
    scale = features.square().sum(1).mean().sqrt()
    return features @ torch.randn(features.shape[1], width) / scale


def _waves(places: int) -> Tensor:
    """(L, 16): places that are near are alike (Vaswani et al. 2017, section 3.5)."""
    phase = torch.arange(places)[:, None] * 2.0 ** -torch.arange(8)[None, :] * (math.pi / 2)
    return torch.cat([phase.sin(), phase.cos()], 1)
