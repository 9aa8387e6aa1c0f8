"""What is trained on public records before the first private step, as values."""

from dataclasses import dataclass, field

from sfumato import checks
from sfumato.data.settings import OWN, DataSettings
from sfumato.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicStart:
    """A training on public records, at whose weights the private steps begin (``pretraining``).

    Attributes:
      data: the public records; all of them are trained on but those of concepts that the quality is measured on. Their pictures and
        sounds must have the sizes of the private ones.
      steps, records_at_once, learning_rate, ema_decay: of that training, by AdamW, of all parameters.
      trained: what the private steps train: names of modules or parameters, "*" for anything; the rest stays as the public records
        made it. (): everything.
    """

    data: DataSettings = field(default_factory=lambda: DataSettings(public_units=0))
    steps: int = 2_000
    records_at_once: int = 256
    learning_rate: float = 1e-3
    ema_decay: float = 0.99
    trained: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.positive(steps=self.steps, records_at_once=self.records_at_once, learning_rate=self.learning_rate)
        checks.probability(ema_decay=self.ema_decay)
        if self.data.public_units:
            raise UsageError(
                f"public_start.data.public_units = {self.data.public_units} · all of these records are public; none is set aside",
                next="Set it to 0.",
            )

    def check_beside(self, private: DataSettings) -> None:
        """Raises UsageError where the public records are the private ones, or have other shapes."""
        public = self.data
        if public.source == private.source and public.source not in OWN:
            raise UsageError(
                f"public_start.data.source = {public.source} · is the set that is to be protected",
                next="Begin with records that are nobody's among these, or leave public_start out.",
            )
        for name in ("image_size", "channels", "audio_seconds", "sample_rate"):
            ours, theirs = getattr(private, name), getattr(public, name)
            if ours != theirs:
                raise UsageError(
                    f"public_start.data.{name} = {theirs} · must be that of data, {ours}: one model sees both",
                    next=f"Set public_start.data.{name}: {ours}.",
                )
