"""Token by token: one transformer over the tokens of all modalities, which conditions any of them on any others.

During training the modalities of a record come in an order that is drawn for it (of its own chance), so that each is learnt
given any of the others, and given nothing. Saved as ``transformers`` saves a causal language model.

Shapes: R records, M modalities, L tokens of one, T positions, V tokens to choose from.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import OutsideError, UsageError
from sfumato.models.backbones import transformer
from sfumato.models.generative import ROWS_AT_ONCE, Direction, Generative, plain, write_json
from sfumato.models.sequences import SPECIAL, Sequences
from sfumato.models.settings import Autoregressive, ModelSettings, Sampling, Transformer
from sfumato.models.shapes import Shapes
from sfumato.records import Batch, Modality, Record

_TEXT_TOKENIZER = "text_tokenizer.json"  # beside the weights: the one that was loaded, as it was


class AutoregressiveModel(Generative):
    """Its folder is that of a ``transformers`` causal language model: ``AutoModelForCausalLM`` loads it."""

    family = "autoregressive"

    def __init__(self, settings: ModelSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        if not isinstance(settings.objective, Autoregressive) or not isinstance(settings.backbone, Transformer):
            raise UsageError(
                f"model.backbone.kind = {settings.backbone.kind} · one token after the other is said by a transformer",
                next="Set model.backbone.kind: transformer.",
            )
        others = [f"model.{name}" for name, codec in self.codecs.items() if codec.kind != "tokens"]
        if others or not self.codecs:
            raise UsageError(
                f"{', '.join(others) or 'modalities = none'} · this family says tokens, of one modality at least",
                next="Set model.text.kind to bytes, words or tokenizer, model.image.kind: patch_tokens, or none.",
            )
        self.objective = settings.objective
        self.sequences = Sequences(self.codecs)
        self.weights: dict[Modality, float] = {
            "text": self.objective.text_weight,
            "image": self.objective.image_weight,
            "audio": self.objective.audio_weight,
        }
        self.transformer: Any = transformer.build(settings.backbone, self.sequences)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Every modality given the others, pictures first; then several at once."""
        names = self.sequences.names
        ranked: list[Modality] = [name for name in ("image", "text", "audio") if name in names]
        found = []
        for count in range(1, len(names) + 1):
            for chosen in combinations(ranked, count):
                wanted: tuple[Modality, ...] = tuple(name for name in names if name in chosen)
                found.append(Direction(tuple(name for name in names if name not in wanted), wanted))
        return tuple(found)

    # -- the objective --

    def record_losses(self, batch: Batch, generator: torch.Generator | None = None, draws: int | None = None) -> Tensor:
        """(R,): the mean over a record's own tokens of -log p, nats, each token by its modality's weight.

        In training one order of the modalities is drawn for each record. With a generator and ``draws`` nothing is drawn: the
        mean over the first ``draws`` orders of all.
        """
        rows, count = batch.num_rows, len(self.sequences.names)
        if generator is None or draws is None:
            order = torch.rand(rows, count).argsort(1)
            present = dict(batch.present)
            if self.objective.condition_dropout > 0:
                present = self._dropped(present, order, torch.rand(rows) < self.objective.condition_dropout)
            return self._record_losses(batch.tensors, present, order)
        orders = list(permutations(range(count)))[:draws]
        each = [self._record_losses(batch.tensors, batch.present, torch.tensor(o).expand(rows, -1)) for o in orders]
        return torch.stack(each).mean(0)

    def _dropped(self, present: Mapping[str, Tensor], order: Tensor, drop: Tensor) -> dict[str, Tensor]:
        """``present``, but of the records ``drop`` only the first of what they have, in their order."""
        there = torch.stack([present[name] for name in self.sequences.names], 1)
        rank = torch.argsort(order, 1).masked_fill(~there, len(self.sequences.names))
        chosen = there & (rank == rank.min(1, keepdim=True).values)
        kept = torch.where(drop[:, None], chosen, there)
        return {name: kept[:, m] for m, name in enumerate(self.sequences.names)}

    def _record_losses(self, tensors: Mapping[str, Tensor], present: Mapping[str, Tensor], order: Tensor) -> Tensor:
        """Args: order (R, M)."""
        ids, weight = self.sequences.interleave(tensors, present, order, self.weights)
        nll = self._surprise(ids)
        weight = weight[:, 1:].to(nll.dtype)
        total = weight.sum(1)
        return (nll * weight).sum(1) / torch.where(total > 0, total, torch.ones_like(total))

    def _surprise(self, ids: Tensor) -> Tensor:
        """(R, T) -> (R, T - 1): -log p of each token but the first, given those before it. No padding stands before a token
        that counts but that of its own record's fields, so no mask is needed."""
        if len(ids):
            logits = self.transformer(input_ids=ids[:, :-1], use_cache=False).logits
        else:
            logits = transformer.of_nobody(self.transformer, ids[:, :-1])
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return nll.view(len(ids), ids.shape[1] - 1)

    @torch.no_grad()
    def bits_per_byte(self, records: Sequence[Record]) -> float:
        """How many bits the model needs for a byte of these records' texts (UTF-8), told nothing else; the end of a text is
        paid for too. A text longer than the codec takes counts as far as that.

        NaN without texts. Raises UsageError for a model without texts.
        """
        codec = self.codecs.get("text")
        if codec is None:
            raise UsageError("model.text = none · this model says nothing of texts", next="Ask a model of texts.")
        bits, size = 0.0, 0
        training = self.training
        self.eval()
        for start in range(0, len(records), ROWS_AT_ONCE // 4):
            tokens, present = codec.encode(records[start : start + ROWS_AT_ONCE // 4])
            tokens = tokens[present]
            field = self.sequences.field("text", tokens)
            nll = self._surprise(self.sequences.prefix({"text": tokens}, ("text",)))[:, 1:]  # after <text>
            bits += float((nll * (field[:, 1:] != self.sequences.special["<pad>"])).sum()) / math.log(2)
            size += sum(len(text.encode("utf-8", errors="replace")) for text in codec.decode(tokens))
        self.train(training)
        return bits / size if size else math.nan

    # -- samples --

    def draw(
        self,
        encoded: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        wanted: tuple[Modality, ...],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> dict[Modality, Tensor]:
        """Records that were told the same modalities are drawn together."""
        there = torch.stack([present[name] for name in self.sequences.names], 1)
        drawn: dict[Modality, Tensor] = {name: self.codecs[name].blank(len(there)) for name in wanted}
        for pattern in there.unique(dim=0):
            rows = (there == pattern).all(1).nonzero()[:, 0]
            told: list[Modality] = [
                name for name, is_told in zip(self.sequences.names, pattern.tolist(), strict=True) if is_told
            ]
            made = self._draw(
                {name: tensor[rows] for name, tensor in encoded.items()}, told, wanted, sampling, generator
            )
            for name in wanted:
                drawn[name][rows] = made[name]
        return drawn

    def _draw(
        self,
        encoded: Mapping[str, Tensor],
        told: Sequence[Modality],
        wanted: tuple[Modality, ...],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> dict[Modality, Tensor]:
        told_all = _Stream(self.transformer, self.sequences.prefix(encoded, told))
        streams = [told_all]
        if told and sampling.guidance > 0:
            streams.append(_Stream(self.transformer, self.sequences.prefix(encoded, ())))
        drawn: dict[Modality, Tensor] = {}
        for name in wanted:
            drawn[name] = self._draw_field(streams, name, sampling, generator)
        return drawn

    def _draw_field(
        self, streams: list["_Stream"], name: Modality, sampling: Sampling, generator: torch.Generator
    ) -> Tensor:
        """(R, L) tokens of the codec; every stream has read the field afterwards."""
        codec, first, rows = self.codecs[name], self.sequences.first[name], streams[0].rows
        tokens = codec.blank(rows)
        done = torch.zeros(rows, dtype=torch.bool)
        logits = [stream.read(torch.full((rows, 1), self.sequences.start(name))) for stream in streams]
        for place, (low, high) in enumerate(codec.ranges):
            allowed = [part[:, first + low : first + high].log_softmax(1) for part in logits]
            guided = allowed[0]
            if len(allowed) > 1:
                guided = guided + sampling.guidance * (allowed[0] - allowed[1])
            chosen = low + choose(guided, sampling, generator)
            tokens[:, place] = torch.where(done, codec.vocabulary, chosen)
            if codec.end is not None:
                done = done | (chosen == codec.end)
            if done.all():
                rest = tokens[:, place:]
                for stream in streams:
                    stream.read(self.sequences.field(name, rest)[:, 1:])
                break
            following = self.sequences.field(name, tokens[:, place : place + 1])[:, 1:]
            logits = [stream.read(following) for stream in streams]
        return tokens

    # -- on disk: a causal language model of transformers --

    def parts(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def file_of(self, part: str) -> str:
        return "model.safetensors"

    def write(self, folder: Path) -> None:
        if folder.is_file():
            raise OutsideError(f"model = {folder} · is a file", next="Give a folder.")
        from safetensors.torch import save_file

        # as save_pretrained does, without its progress bar
        self.transformer.config.save_pretrained(folder)
        self.transformer.generation_config.save_pretrained(folder)
        save_file(plain(self.transformer), folder / "model.safetensors", metadata={"format": "pt"})
        text = self.codecs.get("text")
        if text is None:
            return
        names = [name for modality in self.sequences.names[1:] for name in self.sequences.token_names(modality)]
        (folder / "tokenizer.json").write_text(text.exported([*names, *SPECIAL]), encoding="utf-8")
        special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad")}
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False},
        )
        if text.settings.kind == "tokenizer":
            (folder / _TEXT_TOKENIZER).write_bytes(text.content)

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        text = self.codecs.get("text")
        if text is not None and text.settings.kind == "tokenizer":
            described["settings"]["text"] |= {"path": _TEXT_TOKENIZER, "sha256": text.sha256}
        return described


class _Stream:
    """What the transformer has read of R sequences of the same length, with its cache."""

    def __init__(self, model: Any, prefix: Tensor) -> None:
        from transformers import DynamicCache

        self.model, self.cache, self.rows = model, DynamicCache(config=model.config), len(prefix)
        self.read(prefix)

    def read(self, ids: Tensor) -> Tensor:
        """(R, n) more tokens -> (R, V) logits of what comes next."""
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(R, n) -> (R,): a token of each row, by temperature, among the likeliest ``top_k`` that hold ``top_p`` of the probability.

    Source: nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751, eq. 2; guidance was mixed in before: Sanchez et al.
    2024, arXiv:2306.17806, eq. 7.
    """
    if sampling.temperature == 0:
        return logits.argmax(1)
    chances = (logits / sampling.temperature).softmax(1)
    ordered, which = chances.sort(dim=1, descending=True, stable=True)
    beyond = (ordered.cumsum(1) - ordered) >= sampling.top_p  # the likeliest one always stays
    if sampling.top_k:
        beyond[:, sampling.top_k :] = True
    ordered = ordered.masked_fill(beyond, 0.0)
    return which.gather(1, torch.multinomial(ordered, 1, generator=generator))[:, 0]
