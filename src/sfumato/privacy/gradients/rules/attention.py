"""nn.MultiheadAttention, with every option that keeps the rows first."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.gradients.rules.copies import Copies, terms_of_copies
from sfumato.privacy.gradients.rules.linear import Linear, beside, linear_terms
from sfumato.privacy.gradients.rules.registry import Call, Labelled, Record, Rule, labelled_with, rule, trainable
from sfumato.privacy.gradients.terms import Outer, PerRow, Sums, Term, Units

_PACKED, _PARTS, _OUT, _BIASES = 0, (1, 2, 3), 4, 5  # labels of what is recorded


@rule(nn.MultiheadAttention)
class MultiheadAttentionRule(Rule):
    """What ``F.multi_head_attention_forward`` computes, with rows first, from recorded linear layers.

    The projection out is read, not called, by the module; so it is treated here, with the module's own parameters.
    """

    parameters = (
        "in_proj_weight",
        "in_proj_bias",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "bias_k",
        "bias_v",
        "out_proj.weight",
        "out_proj.bias",
    )
    nests = True
    piecewise = True

    def treats(self, module: nn.Module) -> list[nn.Parameter]:
        return trainable(module)

    def covers(self, module: nn.Module) -> list[nn.Module]:
        return list(module.children())

    def over_rows(
        self, change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        named = {**dict(zip(names, args, strict=False)), **kwargs}  # seven or more by position: none of torch's does
        if len(args) > len(names):
            named |= dict(zip(("average_attn_weights", "is_causal"), args[len(names) :], strict=False))
        for name in ("query", "key", "value", "key_padding_mask"):
            if isinstance(named.get(name), Tensor):
                named[name] = change(named[name])
        return (), named

    def forward(
        self,
        module: Any,
        record: Record,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not query.dim() == key.dim() == value.dim() == 3:
            raise UnsupportedLayer(
                f"MultiheadAttention · got a query of shape {tuple(query.shape)}; needs rows, positions and features",
                next="Keep the batch's rows as the leading dimension.",
            )
        if is_causal and attn_mask is None:
            raise UsageError("attn_mask = None · is needed where is_causal is set", next="Give the causal mask too.")
        rows, length, width = query.shape
        heads = module.num_heads
        key_padding_mask = F._canonical_mask(
            mask=key_padding_mask,
            mask_name="key_padding_mask",
            other_type=F._none_or_dtype(attn_mask),
            other_name="attn_mask",
            target_type=query.dtype,
        )
        hint = is_causal and key_padding_mask is None and not need_weights  # then torch trusts the hint, not the mask
        mask = None if hint else _mask(attn_mask, query.dtype, rows, heads)
        q, k, v = self._project(module, record, query, key, value)
        if module.bias_k is not None:
            copies = [
                p.expand(rows, 1, width) if not p.requires_grad else Copies.apply(Labelled(record, _BIASES), i, rows, p)
                for i, p in enumerate((module.bias_k, module.bias_v))
            ]
            k, v = (torch.cat([x, copy.reshape(rows, 1, width)], 1) for x, copy in zip((k, v), copies, strict=True))
            mask = None if mask is None else F.pad(mask, (0, 1))
            key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, 1))
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (R, H, L, D)
        if module.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            mask = None if mask is None else F.pad(mask, (0, 1))
            key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, 1))
        if key_padding_mask is not None:
            padding = key_padding_mask.view(rows, 1, 1, k.shape[2])
            mask = padding if mask is None else mask + padding
        dropout = module.dropout if module.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / q.shape[3])) @ k.transpose(2, 3)
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            found = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hint)
        found = found.transpose(1, 2).reshape(rows, length, width)
        out: Any = Linear.apply(Labelled(record, _OUT), found, module.out_proj.weight, module.out_proj.bias)
        return out, weights

    def _project(self, module: Any, record: Record, query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
        bias = module.in_proj_bias
        if module._qkv_same_embed_dim and query is key and key is value:
            packed: Any = Linear.apply(Labelled(record, _PACKED), query, module.in_proj_weight, bias)
            return packed.chunk(3, -1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = zip(_PARTS, (query, key, value), _weights(module), biases, strict=True)
        return tuple(Linear.apply(Labelled(record, label), x, w, b) for label, x, w, b in inputs)

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        terms = terms_of_copies([module.bias_k, module.bias_v], labelled_with(_BIASES, calls))
        out = labelled_with(_OUT, calls)
        if out:
            terms += linear_terms(module.out_proj.weight, module.out_proj.bias, out)
        packed = labelled_with(_PACKED, calls)
        parts = [labelled_with(label, calls) for label in _PARTS]
        if not any(parts):
            return terms + (linear_terms(module.in_proj_weight, module.in_proj_bias, packed) if packed else [])
        for call in packed:  # the same layer also saw one tensor as query, key and value
            for part, g in zip(parts, call[-1].chunk(3, -1), strict=True):
                part.append((*call[:-1], g))
        weights = _weights(module)
        if module._qkv_same_embed_dim:
            if module.in_proj_weight.requires_grad:
                terms.append(Blocks(module.in_proj_weight, weights, parts))
        else:
            for weight, part in zip(weights, parts, strict=True):
                if weight.requires_grad and part:
                    terms.append(Outer(weight, None, beside([x for x, _ in part]), beside([g for _, g in part])))
        bias = module.in_proj_bias
        if bias is not None and bias.requires_grad:
            rows, width = next(part[0][-1].shape[0] for part in parts if part), module.embed_dim
            sums = [
                beside([call[-1] for call in part]).sum(1) if part else bias.new_zeros(rows, width) for part in parts
            ]
            terms.append(PerRow(bias, torch.cat(sums, 1)))
        return terms


def _weights(module: Any) -> tuple[Any, ...]:
    if module._qkv_same_embed_dim:
        return module.in_proj_weight.chunk(3)
    return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight


def _mask(mask: Tensor | None, kind: torch.dtype, rows: int, heads: int) -> Tensor | None:
    """Added to the scores (R, H, L, S); torch's masks are (L, S) for all rows, or (R H, L, S)."""
    mask = F._canonical_mask(
        mask=mask, mask_name="attn_mask", other_type=None, other_name="", target_type=kind, check_other=False
    )
    return mask.view(rows, heads, *mask.shape[1:]) if mask is not None and mask.dim() == 3 else mask


class Blocks(Term):
    """A weight (3 E, D) whose blocks of rows belong to layers of their own, with inputs of their own."""

    def __init__(self, weight: nn.Parameter, blocks: tuple[Any, ...], parts: list[list[Call]]) -> None:
        self.parameters = (weight,)
        self._terms = [
            Outer(block, None, beside([x for x, _ in part]), beside([g for _, g in part])) if part else None
            for block, part in zip(blocks, parts, strict=True)
        ]
        self._blocks = blocks
        self._found = [term for term in self._terms if term is not None]
        self.num_rows = self._found[0].num_rows

    def squared_norms(self, units: Units) -> Tensor:
        return torch.stack([term.squared(units) for term in self._found]).sum(0)

    def sums(self, factors: Tensor, units: Units) -> Sums:
        return self._joined([None if term is None else term.sums(factors, units) for term in self._terms])

    def gradient_of(self, unit: int, units: Units) -> Sums:
        return self._joined([None if term is None else term.gradient_of(unit, units) for term in self._terms])

    def forget(self, bad: Tensor, units: Units) -> None:
        for term in self._found:
            term.forget(bad, units)

    def _joined(self, parts: list[Sums | None]) -> Sums:
        like = next(part[block] for part, block in zip(parts, self._blocks, strict=True) if part is not None)
        found = [
            like.new_zeros(block.shape) if part is None else part[block]
            for part, block in zip(parts, self._blocks, strict=True)
        ]
        return {self.parameters[0]: torch.cat(found)}
