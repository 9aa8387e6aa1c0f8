"""The public sizes of what a model models: of pictures and of sounds. Texts have none; their codec says its own."""

from dataclasses import dataclass

from sfumato.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Attributes:
    picture: (H, W, C); None where there are no pictures.
    samples: of a sound; None where there are no sounds. Shorter ones are padded with silence, longer ones cut, by its codec.
    sample_rate: hertz; None where there are no sounds.
    """

    picture: tuple[int, int, int] | None = None
    samples: int | None = None
    sample_rate: int | None = None

    def of_picture(self) -> tuple[int, int, int]:
        if self.picture is None:
            raise UsageError("picture = none · this model has no pictures", next="Set data.image_size and model.image.")
        return self.picture

    def of_sound(self) -> tuple[int, int]:
        """(samples, sample rate)."""
        if self.samples is None or self.sample_rate is None:
            raise UsageError(
                "sound = none · this model has no sounds",
                next="Set data.audio_seconds, data.sample_rate and model.audio.",
            )
        return self.samples, self.sample_rate
