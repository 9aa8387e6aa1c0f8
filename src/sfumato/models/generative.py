"""What every family of models is: codecs (modality <-> tensors), networks (tensors -> tensors), an objective (losses, samples).

A family is one file of ``families/``: a subclass that says ``parts``, ``directions``, ``record_losses`` and ``draw``. What a
loop, an audit, a site of a federation or a release needs of a model is here, once, and is the same for all.
A loss never sees two examples: that is what makes every family trainable in private.

Shapes: R records, B units, K draws of chance inside one record's loss.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import OutsideError, UsageError
from sfumato.models.codecs import build as build_codecs
from sfumato.models.settings import ModelSettings, Sampling
from sfumato.models.shapes import Shapes
from sfumato.records import MODALITIES, Batch, Modality, Record, UnitTable, generated, prompt

ROWS_AT_ONCE = 512  # records drawn in one pass

Origin = Literal["dp-sgd", "released", "public"]  # of a saved tensor, as a bundle's taint list says it


@dataclass(frozen=True, slots=True)
class Direction:
    """What may be asked of a model: ``wanted`` modalities, told any subset of ``given`` ones."""

    given: tuple[Modality, ...]
    wanted: tuple[Modality, ...]

    def __str__(self) -> str:
        return f"{'+'.join(self.given) or 'nothing'}→{'+'.join(self.wanted)}"


def every_direction(codecs: Mapping[Modality, Any], made: Sequence[Modality]) -> tuple[Direction, ...]:
    """All the others to each subset of what can be ``made`` and decoded: single modalities first, pictures before the rest."""
    first: tuple[Modality, ...] = ("image", "audio", "text")
    names = [name for name in first if name in made and codecs[name].kind != "features"]
    wanted = [kept for size in range(1, len(names) + 1) for kept in combinations(names, size)]
    return tuple(
        Direction(
            tuple(n for n in MODALITIES if n in codecs and n not in kept), tuple(n for n in MODALITIES if n in kept)
        )
        for kept in wanted
    )


class Generative(nn.Module, ABC):
    """Base of the families. ``model.build`` makes one from settings, ``model.load`` from a folder.

    ``state_dict`` holds exactly what training makes; codecs are public constants of the settings and the shapes.
    """

    family: ClassVar[str]  # the ``kind`` of its objective's settings
    needs_public: bool = False  # it cannot train, or not answer, before ``tell_public``
    learns_from_rows: ClassVar[bool] = True  # as the models of releases say of themselves

    def __init__(self, settings: ModelSettings, shapes: Shapes) -> None:
        super().__init__()
        self.settings = settings
        self.shapes = shapes
        self.codecs = build_codecs(settings, shapes)
        self.held: tuple[nn.Parameter, ...] = ()  # frozen by ``train_only``

    # -- what each family says --

    @property
    @abstractmethod
    def directions(self) -> tuple[Direction, ...]:
        """What may be asked of it; the first one is what a run shows and measures first."""

    @abstractmethod
    def record_losses(self, batch: Batch, generator: torch.Generator | None = None, draws: int | None = None) -> Tensor:
        """One loss per record, (R,), each from its own record alone; a record without what is to be modelled has loss 0.

        Args:
          generator: where the loss's own chance comes from; None is torch's global one, as in training.
          draws: how many draws of chance are averaged; None is the settings' number. With a generator and ``draws`` the
            levels of noise are spread evenly, not drawn: what a membership attack looks at.
        """

    @abstractmethod
    def draw(
        self,
        encoded: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        wanted: tuple[Modality, ...],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> dict[Modality, Tensor]:
        """Encoded records of the ``wanted`` modalities, (R, ...) each as its codec decodes it. All chance from ``generator``.

        ``encoded`` and ``present`` hold every codec's modality; those that are wanted, or not told, are absent (present False).
        """

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Its trained networks by the folder that each is saved to."""

    # -- networks and records that no private record reaches --

    def tell_public(self, records: Sequence[Record]) -> None:
        """Public records, given before the training begins (and again before it goes on): for families that ask for them."""

    def after_step(self, step: int) -> None:
        """Called by the loop after each optimizer step, with the number of steps taken: post-processing of what was released.

        For networks that no private record reaches (the generator of an adversarial family): frozen parameters, so that no
        engine trains them. Must not touch private records, nor chance whose state depends on them: torch's global generator
        does, by the size of the batch. The loop calls it inside ``engine.frozen()``.
        """

    def averaged(self) -> dict[str, nn.Parameter]:
        """The parameters whose moving average is sampled and saved; the trained ones."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def origin(self, part: str) -> Origin:
        """Where the tensors of a part come from: "dp-sgd" trained by the private mechanism; "released" computed from what
        that released, and from nothing else private; "public"."""
        return "dp-sgd"

    def boundary(self) -> list[str]:
        """Sentences for the claim: what is inside and outside of the guarantee, where it is not all trained alike."""
        return []

    # -- some of it trained, the rest as it was --

    def train_only(self, names: Sequence[str]) -> None:
        """Freezes every trained parameter that is not named: by its own name, or by that of a module around it; ``*`` stands
        for anything, so "*.bias" is every bias. Frozen parameters keep what they hold, and ``origins`` says "public" of them.

        Raises: UsageError for a name of nothing that is trained.
        """
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        found = {name: [other for other in trained if _is_named(other, name)] for name in names}
        nothing = [name for name, parameters in found.items() if not parameters]
        if nothing or not names:
            raise UsageError(
                f"trained = {', '.join(nothing) or 'nothing'} · names no trained parameter of this {self.family} model; it has "
                f"{_few(trained)}",
                next="Name modules or parameters as model.named_parameters() does; * stands for anything.",
            )
        kept = {name for parameters in found.values() for name in parameters}
        self.held = tuple(parameter for name, parameter in trained.items() if name not in kept)
        for parameter in self.held:
            parameter.requires_grad_(False)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it what ``train_only`` froze is trained too: for a training on public records."""
        for parameter in self.held:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self.held:
                parameter.requires_grad_(False)

    # -- codecs --

    def encode(self, records: Sequence[Record]) -> UnitTable:
        """Records as the tensors that ``losses`` wants, grouped by unit."""
        tensors, present = self._encoded(records)
        return UnitTable(tensors, [record.unit for record in records], present)

    def _encoded(self, records: Sequence[Record]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        both = {str(name): codec.encode(records) for name, codec in self.codecs.items()}
        return {name: pair[0] for name, pair in both.items()}, {name: pair[1] for name, pair in both.items()}

    def blank(self, rows: int) -> dict[str, Tensor]:
        """What ``encode`` holds of records that have nothing."""
        return {str(name): codec.blank(rows) for name, codec in self.codecs.items()}

    def decode(self, name: Modality, drawn: Tensor) -> Sequence[Any]:
        """What ``draw`` made of a modality, as records hold it."""
        return self.codecs[name].decode(drawn)

    # -- the objective --

    def losses(self, batch: Batch) -> Tensor:
        """One loss per unit, (B,): the mean over its records."""
        return batch.per_unit(self.record_losses(batch))

    def row_losses(self, batch: Batch, draws: int, generator: torch.Generator) -> Tensor:
        """One loss per record, (R,), the same at every call with the same generator: what a membership attack looks at."""
        return self.record_losses(batch, generator, draws)

    # -- samples --

    @torch.no_grad()
    def sample(
        self,
        given: Sequence[Record],
        wanted: Sequence[Modality],
        *,
        seed: int,
        sampling: Sampling | None = None,
    ) -> list[Record]:
        """For each record of ``given`` a new one with the ``wanted`` modalities, told what else that record has.

        The same seed gives the same records. Spends nothing: it is post-processing of the weights.
        Raises UsageError where the model cannot be asked for that.
        """
        wanted = tuple(name for name in MODALITIES if name in wanted)
        self._require(given, wanted)
        sampling = sampling or self.settings.sampling
        generator = torch.Generator().manual_seed(seed)
        training = self.training
        self.eval()
        made: list[Record] = []
        for start in range(0, len(given), ROWS_AT_ONCE):
            told = [prompt(**_told(record, wanted)) for record in given[start : start + ROWS_AT_ONCE]]
            encoded, present = self._encoded(told)
            drawn = self.draw(encoded, present, wanted, sampling, generator)
            decoded = {name: self.decode(name, drawn[name]) for name in wanted}
            made += [
                generated(start + row, {name: decoded[name][row] for name in wanted}, self.shapes.sample_rate)
                for row in range(len(told))
            ]
        self.train(training)
        return made

    def generate(self, texts: Sequence[str | None], *, seed: int, sampling: Sampling | None = None) -> np.ndarray:
        """Pictures for texts (None: told nothing), (N, H, W, C) uint8: ``sample`` for those who want pictures only."""
        made = self.sample([prompt(text=text) for text in texts], ("image",), seed=seed, sampling=sampling)
        pictures = [record.image for record in made if record.image is not None]
        return np.stack(pictures) if pictures else np.zeros((0, *self.shapes.of_picture()), np.uint8)

    def _require(self, given: Sequence[Record], wanted: tuple[Modality, ...]) -> None:
        told = {name for record in given for name in MODALITIES if name not in wanted and _has(record, name)}
        fitting = [d for d in self.directions if set(wanted) <= set(d.wanted) and told <= set(d.given)]
        if not wanted or not fitting:
            asked = Direction(tuple(name for name in MODALITIES if name in told), wanted)
            raise UsageError(
                f"direction = {asked} · this {self.family} model knows {', '.join(str(d) for d in self.directions)}",
                next="Ask for one of these, or train a family that has the other.",
            )

    # -- cost --

    def bytes_per_row(self) -> int:
        """About how much memory one record takes on its way through the model: what each layer reads and writes, twice.

        Measured on one blank record, not on data.
        """
        seen = 0

        def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal seen
            seen += sum(t.numel() * t.element_size() for t in (*inputs, output) if isinstance(t, Tensor))

        leaves = [m for m in self.modules() if not list(m.children())]
        hooks = [leaf.register_forward_hook(count) for leaf in leaves]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                blank = self.blank(1)
                there = {name: torch.ones(1, dtype=torch.bool) for name in blank}
                batch = Batch(tensors=blank, present=there, unit=torch.zeros(1, dtype=torch.long), num_units=1)
                self.record_losses(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return 2 * seen

    # -- on disk --

    def save(self, folder: Path | str) -> None:
        """Writes the model as one folder a part, weights in safetensors, beside ``sfumato.json``. [shell]

        Raises OutsideError where the disk does not take it.
        """
        from safetensors import SafetensorError

        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.write(Path(folder))
            write_json(Path(folder) / "sfumato.json", self.describe())
        except (OSError, SafetensorError) as error:  # a full disk is an OSError to some, and not to safetensors
            raise OutsideError(
                f"model = {folder} · could not be written ({error})", next="Free some disk space, then --resume."
            ) from None

    def write(self, folder: Path) -> None:
        """The parts' weights, ``part/model.safetensors`` each; a family with a layout that others load writes that."""
        from safetensors.torch import save_file

        for name, part in self.parts().items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            save_file(plain(part), folder / self.file_of(name))

    def file_of(self, part: str) -> str:
        """Where the weights of a part lie, relative to the model's folder."""
        return f"{part}/model.safetensors"

    def read(self, folder: Path) -> None:
        """Takes the weights that ``write`` wrote. Raises OSError, RuntimeError or SafetensorError where they do not fit."""
        from safetensors.torch import load_file

        for name, part in self.parts().items():
            part.load_state_dict(load_file(folder / self.file_of(name)))

    def describe(self) -> dict[str, Any]:
        """Everything that ``load`` needs besides the weights."""
        from pydantic import TypeAdapter

        settings = TypeAdapter(ModelSettings).dump_python(self.settings, mode="json")
        described = {"format": 2, "shapes": asdict(self.shapes), "settings": settings}
        frozen = self.frozen()
        return {**described, "frozen": frozen} if frozen else described

    def frozen(self) -> dict[str, str]:
        """sha256 of the public weights that its codecs read from elsewhere, by modality: they are not saved with it."""
        return {name: codec.fingerprint() for name, codec in self.codecs.items() if hasattr(codec, "fingerprint")}

    def named_tensors(self) -> Iterator[tuple[str, str]]:
        """(file relative to the model's folder, tensor name) of every tensor that ``save`` writes."""
        yield from self.origins()

    def origins(self) -> dict[tuple[str, str], Origin]:
        """Where each of ``named_tensors`` comes from."""
        held = {id(parameter) for parameter in self.held}
        found: dict[tuple[str, str], Origin] = {}
        for name, part in self.parts().items():
            frozen = {key for key, p in part.named_parameters(remove_duplicate=False) if id(p) in held}
            for key in part.state_dict():
                found[self.file_of(name), key] = "public" if key in frozen else self.origin(name)
        return found


def _is_named(parameter: str, name: str) -> bool:
    return fnmatchcase(parameter, name) or fnmatchcase(parameter, f"{name}.*")


def _few(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _told(record: Record, wanted: tuple[Modality, ...]) -> dict[str, Any]:
    told: dict[str, Any] = {name: getattr(record, name) for name in MODALITIES if name not in wanted}
    return {**told, "sample_rate": record.sample_rate} if told.get("audio") is not None else told


def _has(record: Record, modality: Modality) -> bool:
    return getattr(record, modality) is not None


def plain(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors as safetensors takes them."""
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
