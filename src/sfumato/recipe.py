"""A whole run as one frozen value, and the only place that reads it from a file.

A recipe is YAML with the sections below; a key that is not known is refused by its path.
"""

import difflib
import reprlib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from sfumato.auditing.settings import AuditSettings
from sfumato.data.settings import DataSettings
from sfumato.errors import SfumatoError, UsageError
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.federation.settings import FederationSettings
from sfumato.models.settings import ModelSettings
from sfumato.privacy.settings import PrivacySettings
from sfumato.release.settings import ReleaseSettings
from sfumato.training.public_start import PublicStart
from sfumato.training.settings import PerformanceSettings, TrainingSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a run does. ``name`` becomes the run's folder."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # also for everything nested

    name: str
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    public_start: PublicStart | None = None
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    release: ReleaseSettings = field(default_factory=ReleaseSettings)
    performance: PerformanceSettings = field(default_factory=PerformanceSettings)

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise UsageError(
                f"name = {self.name!r} · letters, digits, '-', '_' and '.' only, not starting with a dot",
                next="Choose a name that can be a folder.",
            )
        if (self.privacy.warm_start is None) != (self.model.warm_start is None):
            given, missing = ("privacy", "model") if self.model.warm_start is None else ("model", "privacy")
            raise UsageError(
                f"{given}.warm_start · says half of it: {missing}.warm_start is missing",
                next="privacy.warm_start says what share is spent, model.warm_start on what. Give both, or none.",
            )
        self._check_class_moments()
        if self.public_start is not None:
            self._check_public_start(self.public_start)

    def _check_class_moments(self) -> None:
        of, released = self.model.class_moments, self.privacy.mean_embedding
        if self.model.sound_moments is not None and (released is None or released.first or released.max_norm != 1):
            raise UsageError(
                f"model.sound_moments · is one sum of features of length 1, not mechanism {self.privacy.mechanism} with {released}",
                next="Set privacy.mechanism: mean_embedding, and leave out its settings.",
            )
        if of is None:
            if released is not None and released.first:
                raise UsageError(
                    f"privacy.mean_embedding.first = {released.first} · is for cells of classes",
                    next="Set it to 0, or give model.class_moments with directions.",
                )
            return
        if released is None:
            raise UsageError(
                f"model.class_moments · is released by a mean embedding, not by {self.privacy.mechanism}",
                next="Set privacy.mechanism: mean_embedding, or leave it out.",
            )
        if bool(of.directions) != bool(released.first) or released.max_norm != 1:
            raise UsageError(
                f"directions = {of.directions}, first = {released.first}, max_norm = {released.max_norm} · cells are told by a first "
                "sum, and features have length 1",
                next="Set privacy.mean_embedding: {first: 0.15} with directions, {} without.",
            )

    def _check_public_start(self, start: PublicStart) -> None:
        start.check_beside(self.data)
        if self.model.warm_start is not None:
            raise UsageError(
                "public_start, model.warm_start · a run begins at one of them",
                next="Leave one out; a warm start is charged, a public start costs no privacy.",
            )
        if self.privacy.mechanism not in ("dp_sgd", "none"):
            raise UsageError(
                f"public_start, privacy.mechanism = {self.privacy.mechanism} · what is released once is not trained in steps that "
                "could begin at public weights",
                next="Set privacy.mechanism: dp_sgd, or leave public_start out.",
            )


def from_mapping(values: Any) -> Recipe:
    """Builds a recipe from plain values (as YAML gives them). Raises UsageError naming the path of what is wrong."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(values, dict):
        raise UsageError(
            f"recipe = {type(values).__name__} · must be a mapping of sections",
            next="Start from `sfumato init`.",
        )
    _refuse_unknown(values)
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise _as_usage_error(error) from None


def load(path: Path | str) -> Recipe:
    """Reads a recipe file. Raises UsageError for a missing file, bad YAML, an unknown key or a bad value."""
    return from_mapping(read_mapping(path))


def read_mapping(path: Path | str) -> dict[str, Any]:
    """The plain values of a recipe file, before they are checked."""
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that cannot be one
        raise UsageError(
            f"recipe = {path} · a readable YAML file ({error})", next="Check the path, or use a named recipe."
        ) from None
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"recipe = {path} · must be YAML ({error})", next="Correct the line that is named.") from None
    if not isinstance(values, dict):
        raise UsageError(f"recipe = {path} · must be a mapping of sections", next="Start from `sfumato init`.")
    return values


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Applies ``privacy.epsilon=4`` forms to plain values; the value is read as YAML."""
    import copy

    import yaml

    values = copy.deepcopy(values)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UsageError(f"--set {assignment} · must be path=value", next="For example --set privacy.epsilon=4.")
        target = values
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise UsageError(f"--set {assignment} · {key} is a value, not a section", next="Check the path.")
        try:
            target[keys[-1]] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"--set {assignment} · the value must be YAML ({error})", next="Quote it.") from None
    return values


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Plain values, every default included: what resolved.yaml holds."""
    from pydantic import TypeAdapter

    return TypeAdapter(Recipe).dump_python(recipe, mode="json")


def to_yaml(recipe: Recipe) -> str:
    import yaml

    return yaml.safe_dump(to_mapping(recipe), sort_keys=False, allow_unicode=True)


def _refuse_unknown(values: dict[str, Any]) -> None:
    """Unknown sections and section keys, with the nearest known name."""
    sections = {f.name: f for f in fields(Recipe)}
    for key, value in values.items():
        _known(str(key), "", list(sections))
        factory = sections[str(key)].default_factory
        if isinstance(value, dict) and isinstance(factory, type) and is_dataclass(factory):
            for inner in value:
                _known(str(inner), f"{key}.", [f.name for f in fields(factory)])


def _known(key: str, prefix: str, allowed: list[str]) -> None:
    if key not in allowed:
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f"Did you mean {prefix}{near[0]}?" if near else f"Known: {', '.join(allowed)}."
        raise UsageError(f"{prefix}{key} · is not a key of the recipe", next=hint, code="unknown_key")


def _as_usage_error(error: Any) -> UsageError:
    """The first problem of a pydantic error, with its path; checks of our own keep their words and next step."""
    problems = error.errors(include_url=False)
    first = problems[0]
    path = ".".join(str(part) for part in first["loc"])
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, SfumatoError):
        return UsageError(f"{path}: {cause.message}" if path else cause.message, next=cause.next)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return UsageError(
            f"{path} · is not a key of the recipe{more}", next="Remove or correct it.", code="unknown_key"
        )
    given, context = _shortly(first.get("input")), first.get("ctx") or {}
    match first["type"]:
        case "union_tag_invalid":
            kind = context["discriminator"].strip("'")
            return UsageError(
                f"{path}.{kind} = {_shortly(context['tag'])} · must be one of {context['expected_tags']}{more}",
                next="Take one of these.",
            )
        case "union_tag_not_found":
            kind = context["discriminator"].strip("'")
            return UsageError(f"{path} = {given} · must say its {kind}{more}", next=f"Set {path}: {{{kind}: ...}}.")
        case "dataclass_type":
            return UsageError(
                f"{path} = {given} · must be a mapping{more}", next=f"Set what is in it, such as {path}.KEY=VALUE."
            )
        case "model_attributes_type" if isinstance(first["input"], str):
            return UsageError(
                f"{path} = {given} · must be a mapping with a kind{more}",
                next=f"Set {path}: {{kind: {first['input'][:40]}}}.",
            )
    return UsageError(f"{path} = {given} · {first['msg']}{more}", next="Correct the recipe.")


def _shortly(value: Any) -> str:
    """Bounded work and length, whatever it is: YAML can name one list a billion times, or hold a number of any size."""
    words = reprlib.Repr()
    words.maxlevel = 2
    try:
        return words.repr(value)[:80]
    except ValueError:  # an integer too long to be written in decimals
        return type(value).__name__
