"""A reader beside a denoiser: of a picture, what a text would say of it. It answers from picture to text, and takes, of several
pictures drawn for a text, one that it reads as the text.

What can be said is a public list of questions, each with its answers, every answer with the terms that say it; "not said" is one
answer more. The reader is one linear layer over fixed features of a picture (``codecs.scattering``) as the picture's codec gives it
back, so that private and generated pictures are seen alike. A record's reading loss is the sum over questions of the cross
entropy of its text's answers: a record without a picture or a text has none. It is trained in the same private steps as the
denoiser; with ``privacy.parts`` it is clipped by itself.

Text -> picture: of n pictures drawn for a text, one is drawn with probabilities proportional to p(the text's answers | picture). That
is one draw of p(picture | text) p(answers | picture), as n grows (sampling importance resampling: Rubin 1988).
Picture -> text: a text of the public bank, drawn with probability proportional to p(its answers | picture), shared among the bank's
texts that say the same.

Shapes: R records, Q questions, A answers of all questions together, F features, N texts of the bank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.class_moments import NOTHING, classes_of
from sfumato.models.codecs import scattering
from sfumato.models.codecs.image import PictureCodec
from sfumato.models.settings import Reader
from sfumato.records import Record

FEATURES, ANSWERS = "image_features", "answers"  # of an encoded record, beside its modalities


class PictureReader(nn.Module):
    """Logits of all answers, (R, A), from features (R, F)."""

    def __init__(self, settings: Reader, codec: PictureCodec) -> None:
        super().__init__()
        self.settings, self.codec = settings, codec
        self.sizes = [len(question.answers) + 1 for question in settings.questions]  # the last answer: not said
        self.layer = nn.Linear(scattering.width(codec.picture_shape), sum(self.sizes))
        nn.init.zeros_(self.layer.weight)  # convex: nothing is gained by a random start, and noise is lost
        nn.init.zeros_(self.layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features.to(self.layer.weight.dtype))

    # -- what records are to it --

    def features(self, latents: Tensor) -> Tensor:
        """Encoded pictures (R, D) -> (R, F) float16: of length 1, and there are many."""
        pictures = self.codec.coder.pictures(latents.reshape(-1, *self.codec.shape))
        return scattering.features(pictures.clamp(-1, 1)).half()

    def answers(self, texts: Sequence[str | None]) -> Tensor:
        """(R, Q) int64: of every question the answer's number; the last one where the text does not say."""
        said = [classes_of(texts, question.answers) for question in self.settings.questions]
        return torch.stack(
            [torch.where(answer == NOTHING, size - 1, answer) for answer, size in zip(said, self.sizes, strict=True)],
            dim=1,
        )

    def blank(self, rows: int) -> tuple[Tensor, Tensor]:
        """Features and answers of records that have neither picture nor text."""
        return (
            torch.zeros(rows, self.layer.in_features, dtype=torch.float16),
            torch.zeros(rows, len(self.sizes), dtype=torch.int64),
        )

    # -- what it says --

    def losses(self, features: Tensor, answers: Tensor) -> Tensor:
        """(R,)."""
        per_question = self.log_probabilities(features)
        found = [-told.gather(1, answers[:, q, None])[:, 0] for q, told in enumerate(per_question)]
        return torch.stack(found, 1).sum(1)

    def log_probabilities(self, features: Tensor) -> list[Tensor]:
        """Of each question (R, its answers)."""
        return [part.log_softmax(1) for part in self(features).split(self.sizes, dim=1)]

    def agreement(self, features: Tensor, answers: Tensor) -> Tensor:
        """(R,): log p(answers | picture) of the questions that are answered, each given that it is."""
        total = torch.zeros(len(features))
        for question, told in enumerate(self.log_probabilities(features)):
            asked = answers[:, question]
            said = asked < self.sizes[question] - 1
            of_said = told[:, :-1].log_softmax(1)
            total = total + torch.where(
                said, of_said.gather(1, asked.clamp(max=of_said.shape[1] - 1)[:, None])[:, 0], 0
            )
        return total

    def chosen(self, latents: Tensor, answers: Tensor, generator: torch.Generator) -> Tensor:
        """One of every record's candidates. Args: latents (R, n, D), answers (R, Q). Returns: (R, D)."""
        rows, count, _ = latents.shape
        likely = self.agreement(self.features(latents.flatten(0, 1)), answers.repeat_interleave(count, 0))
        weights = likely.reshape(rows, count).softmax(1)
        return latents[torch.arange(rows), torch.multinomial(weights, 1, generator=generator)[:, 0]]

    def texts(self, features: Tensor, bank: "Bank", temperature: float, generator: torch.Generator) -> Tensor:
        """Pictures' features -> (R,) int64: numbers of texts of the bank. A temperature of 0 takes a likeliest one."""
        found = self.answers(bank.texts())  # (N, Q)
        patterns, which, alike = found.unique(dim=0, return_inverse=True, return_counts=True)
        likely = torch.zeros(len(features), len(patterns))
        for question, told in enumerate(self.log_probabilities(features)):
            likely = likely + told[:, patterns[:, question]]
        if temperature == 0:
            picked = likely.argmax(1)
        else:
            picked = torch.multinomial((likely / temperature).softmax(1), 1, generator=generator)[:, 0]
        order = which.argsort(stable=True)  # texts by pattern
        first = alike.cumsum(0) - alike
        place = (torch.rand(len(features), generator=generator, dtype=torch.float64) * alike[picked]).long()
        return order[first[picked] + place.minimum(alike[picked] - 1)]


class Bank(nn.Module):
    """Public texts that a reader answers with, as bytes: constants, saved with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bytes", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("lengths", torch.zeros(0, dtype=torch.int64))

    def take(self, records: Sequence[Record]) -> None:
        texts = sorted({record.text for record in records if record.text})  # in no order of the records
        raw = [text.encode("utf-8") for text in texts]
        self.bytes = torch.tensor(list(b"".join(raw)), dtype=torch.uint8)
        self.lengths = torch.tensor([len(one) for one in raw], dtype=torch.int64)

    def texts(self) -> list[str]:
        raw, ends = bytes(self.get_buffer("bytes").tolist()), self.get_buffer("lengths").cumsum(0).tolist()
        return [raw[start:end].decode("utf-8") for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """A bank may be as long as its file says."""
        for name in self._buffers:
            if prefix + name in state_dict:
                self._buffers[name] = torch.empty_like(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *rest)
