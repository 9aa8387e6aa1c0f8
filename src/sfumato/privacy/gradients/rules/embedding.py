"""nn.Embedding."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from sfumato.privacy.gradients.rules.linear import beside
from sfumato.privacy.gradients.rules.registry import Call, Record, Rule, no_view, once, one_input, rule
from sfumato.privacy.gradients.terms import Lookup, Term


class Embedding(Function):
    @staticmethod
    def forward(ctx: Any, record: Record, words: Tensor, weight: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(words)
        ctx.record, ctx.padding = record, padding
        return no_view(F.embedding(words, weight))

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        (words,) = ctx.saved_tensors
        if ctx.padding >= 0:
            g = g.masked_fill((words == ctx.padding).unsqueeze(-1), 0)
        ctx.record(words, g)
        return None, None, None, None


def problem_of_embedding(module: Any) -> str | None:
    if module.max_norm is not None:
        return "max_norm changes the weights of the words that occur in the batch, without noise: leave it out"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq counts words over the whole batch, so units influence each other: leave it out"
    return None


@rule(nn.Embedding)
class EmbeddingRule(Rule):
    parameters = ("weight",)
    nests = True
    any_shape = True

    def problem(self, module: Any) -> str | None:
        return problem_of_embedding(module)

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (words,) = one_input(module, args, kwargs, least=1)
        padding = -1 if module.padding_idx is None else module.padding_idx
        return Embedding.apply(record, words, module.weight, padding)  # type: ignore[return-value]

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        # the length is said, not -1: of an empty batch it could be any
        words = torch.cat([words.reshape(words.shape[0], math.prod(words.shape[1:])) for words, _ in calls], 1)
        return [Lookup(module.weight, words.long(), beside([g for _, g in calls]))]
