"""Models of others, from disk or a hub, as something to train privately: what is trained, one loss for each record, and saving.   [shell]

    language = pretrained.load("path/to/llama", tuning=Tuning(how="lora"))
    losses = language.losses(language.model, language.collate(records))  # (B,)
    language.save("adapter")  # transformers and peft read it, without us

A model that writes text, one that writes about pictures, and a pipeline of ``diffusers`` that paints from text
(``pretrained_pipeline``). ``training.fine_tuner`` trains them; so does any loop with an engine.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import DataError, OutsideError, UsageError
from sfumato.models.messages import conversation, count_of, pictures, plain, turns
from sfumato.models.row_losses import IGNORED, row_losses
from sfumato.models.tuning import Tuning, quantised, tuned

_PADDED = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "labels": IGNORED}
_LANGUAGE = ("language_model", "text_model")  # what transformers calls the part that writes


class Pretrained:
    """A model that exists already, and how it is trained.

    Attributes: model: what is trained, and what an engine or a ``PrivateTrainer`` is given; tuning.
    """

    model: nn.Module
    tuning: Tuning

    def collate(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The inputs of some records, one row each."""
        raise NotImplementedError

    def losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """(R,): one loss for each row, from that row alone. ``model`` is ``self.model``, perhaps wrapped by who trains it."""
        raise NotImplementedError

    def save(self, folder: Path | str) -> None:
        """Writes what was trained as its own library writes it."""
        raise NotImplementedError

    def freeze_unused(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """Freezes what takes no part in the loss of these (public) records, which would be moved by noise alone.

        Returns: the names.
        """
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        loss = self.losses(self.model, self.collate(records)).sum()
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        unused = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
        for name in unused:
            named[name].requires_grad_(False)
        return unused


def load(name: Path | str, *, tuning: Tuning | None = None, dtype: torch.dtype = torch.float32) -> Pretrained:
    """The model in a local folder, or of this name on the hub.

    Raises: OutsideError where it cannot be had, MissingDependency, UsageError for a kind of model that is none of these.
    """
    from sfumato.models.pretrained_pipeline import TextToImage, read_pipeline

    tuning = tuning if tuning is not None else Tuning()
    if _is_pipeline(name):
        return TextToImage(read_pipeline(name, dtype), tuning)
    import transformers

    config = _read(name, lambda: transformers.AutoConfig.from_pretrained(name))
    kind: Any = transformers.AutoModelForImageTextToText
    if type(config) in kind._model_mapping:
        model = _read(name, lambda: kind.from_pretrained(name, dtype=dtype, **quantised(tuning)))
        return ImageText(model, _read(name, lambda: transformers.AutoProcessor.from_pretrained(name)), tuning)
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise UsageError(
            f"model = {name} · is of type {config.model_type}, which neither writes text nor writes about pictures",
            next="Give it to PrivateTrainer, with a compute_losses of your own.",
        )
    model = _read(
        name, lambda: transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **quantised(tuning))
    )
    return CausalText(model, _read(name, lambda: transformers.AutoTokenizer.from_pretrained(name)), tuning)


class CausalText(Pretrained):
    """A causal language model of ``transformers`` and its tokenizer. ``losses``: the mean over what the assistant says."""

    def __init__(self, model: Any, tokenizer: Any, tuning: Tuning) -> None:
        self.tuning, self.processor = tuning, tokenizer
        self.model = tuned(model, tuning, task="CAUSAL_LM")

    def collate(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return padded([self._encoded(record) for record in records], self._pad_token)

    def losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        return row_losses(model, inputs)[0]

    def save(self, folder: Path | str) -> None:
        saved: Any = self.model
        try:
            saved.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        except OSError as error:
            raise OutsideError(f"folder = {folder} · cannot be written ({error})", next="Free some space.") from None

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def _pad_token(self) -> int:
        held = self._tokenizer.pad_token_id
        return int(held if held is not None else self._tokenizer.eos_token_id or 0)

    def _encoded(self, record: Mapping[str, Any]) -> dict[str, Tensor]:
        messages = conversation(record)
        files = {kind: count_of(messages, kind) for kind in ("image", "audio")}
        if any(files.values()):
            raise DataError(
                f"record · has {files['image']} images and {files['audio']} sounds, which {type(self.model).__name__} does not read",
                next="Take a model that does, or leave the files out.",
            )
        return self._with_labels(plain(messages), lambda text: self._tokens(text))

    def _tokens(self, text: str) -> dict[str, Tensor]:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": torch.tensor(ids, dtype=torch.long)}

    def _with_labels(
        self, messages: list[dict[str, Any]], read: Callable[[str], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Inputs of the whole conversation; labels for what the assistant says, -100 elsewhere."""
        inputs = read(self._text(messages, prompt=False))
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, IGNORED)
        for turn in turns(messages):
            before = read(self._text(messages[:turn], prompt=True))["input_ids"] if turn else ids[:0]
            after = read(self._text(messages[: turn + 1], prompt=False))["input_ids"]
            start, end = _shared(ids, before), _shared(ids, after)
            if start < len(before) - 1 or end < len(after) - 1:  # one token may reach over a mark
                raise UsageError(
                    "chat_template · does not write a conversation as its beginning and more, so that it does not show what the "
                    "assistant says",
                    next="Use a template that only appends.",
                )
            labels[start:end] = ids[start:end]
        return {**inputs, "labels": labels}

    def _text(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        """As the chat template writes it; without one, one content after another and the end of the text."""
        if self.processor.chat_template:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        if any(not isinstance(m["content"], str) for m in messages):
            raise UsageError(
                "chat_template = None · is needed where there are pictures", next="Set processor.chat_template."
            )
        end = self._tokenizer.eos_token or ""
        return "".join(m["content"] + end * (m["role"] == "assistant") for m in messages)


class ImageText(CausalText):
    """A model of ``AutoModelForImageTextToText`` and its processor.

    An adapter goes to the part that writes; what sees stays frozen, which is faster, and right for any number of pictures.
    With all weights trained, every record must have one picture: its layers see pictures, not records, as their rows.
    """

    def __init__(self, model: Any, processor: Any, tuning: Tuning) -> None:
        self.tuning, self.processor = tuning, processor
        self.model = tuned(model, tuning, within=_LANGUAGE, task="CAUSAL_LM")

    def _encoded(self, record: Mapping[str, Any]) -> dict[str, Tensor]:
        messages, images = conversation(record), pictures(record)
        if count_of(messages, "audio"):
            raise DataError("record · has sounds, which this model does not read", next="Leave them out.")
        inputs = self._with_labels(messages, lambda text: self._read_with(text, images))
        marks = torch.tensor(self._image_tokens, dtype=torch.long)
        inputs["labels"][torch.isin(inputs["input_ids"], marks)] = IGNORED  # nobody says a picture
        return inputs

    @property
    def _image_tokens(self) -> list[int]:
        config: Any = self.model.config
        found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
        return sorted({int(token) for token in found if token is not None})

    def _read_with(self, text: str, images: list[Any]) -> dict[str, Tensor]:
        mark = self.processor.image_token
        seen = images[: text.count(mark)]  # of a beginning, the pictures in it
        made = self.processor(text=[text], images=seen or None, return_tensors="pt", add_special_tokens=False)
        return {name: value[0] if name in _PADDED else value for name, value in made.items()}


def _shared(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts begin with in common."""
    count = min(len(one), len(other))
    apart = (one[:count] != other[:count]).nonzero()
    return int(apart[0]) if len(apart) else count


def padded(rows: Sequence[Mapping[str, Tensor]], pad_token: int) -> dict[str, Tensor]:
    """Tokens padded on the right, behind a mask; pictures one after another."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        if name in _PADDED:
            fill = pad_token if name == "input_ids" else _PADDED[name]
            batch[name] = torch.stack([_to_length(value, longest, fill) for value in values])
        else:
            batch[name] = torch.cat(values)
    if "attention_mask" not in batch:
        ones = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
        batch["attention_mask"] = torch.stack([_to_length(mask, longest, 0) for mask in ones])
    return batch


def _to_length(value: Tensor, length: int, fill: int) -> Tensor:
    return nn.functional.pad(value, (0, length - len(value)), value=fill)


def _is_pipeline(name: Path | str) -> bool:
    if Path(name).is_dir():
        return (Path(name) / "model_index.json").is_file()
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return file_exists(str(name), "model_index.json")
    except (OSError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise unreachable(name, error) from None
    except Exception as error:  # the client of the hub lets errors of its transport through, whatever that is
        if type(error).__module__.split(".")[0] not in (
            "httpx",
            "httpx2",
            "httpcore",
            "httpcore2",
            "requests",
            "urllib3",
        ):
            raise
        raise unreachable(name, error) from None


def _read(name: Path | str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (OSError, ValueError) as error:
        raise unreachable(name, error) from None


def unreachable(name: Path | str, error: Exception) -> OutsideError:
    lines = str(error).splitlines() or [type(error).__name__]
    return OutsideError(
        f"model = {name} · cannot be had: not from a folder here, and not from the hub ({lines[0][:160]})",
        next="Give a folder that save_pretrained has written, or connect to the hub (and log in where a model asks for it).",
    )
