"""One file a family: what is lost, and how records are drawn (``generative`` says what they share)."""

from sfumato.models.generative import Generative
from sfumato.models.settings import Autoregressive, Diffusion, ModelSettings
from sfumato.models.shapes import Shapes


def build(settings: ModelSettings, shapes: Shapes) -> Generative:
    """The one match from an objective's settings to its family."""
    match settings.objective:
        case Diffusion():
            from sfumato.models.families.diffusion import DiffusionModel

            return DiffusionModel(settings, shapes)
        case Autoregressive():
            from sfumato.models.families.autoregressive import AutoregressiveModel

            return AutoregressiveModel(settings, shapes)
