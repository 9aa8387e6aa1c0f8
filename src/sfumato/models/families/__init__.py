"""One file a family: what is lost, and how records are drawn (``generative`` says what they share)."""

from sfumato.errors import UsageError
from sfumato.models.generative import Generative
from sfumato.models.settings import (
    Adapter,
    Adversarial,
    Alignment,
    Autoregressive,
    Diffusion,
    Flow,
    ModelSettings,
    Prompts,
    Variational,
)
from sfumato.models.shapes import Shapes

NO_GENERATOR = "no_generator"  # of the error for what has no samples


def build(settings: ModelSettings, shapes: Shapes) -> Generative:
    """The one match from an objective's settings to its family."""
    match settings.objective:
        case Diffusion():
            from sfumato.models.families.diffusion import DiffusionModel

            return DiffusionModel(settings, shapes)
        case Flow():
            from sfumato.models.families.flow import FlowModel

            return FlowModel(settings, shapes)
        case Variational():
            from sfumato.models.families.variational import VariationalModel

            return VariationalModel(settings, shapes)
        case Adversarial():
            from sfumato.models.families.adversarial import AdversarialModel

            return AdversarialModel(settings, shapes)
        case Alignment():
            from sfumato.models.families.alignment import AlignmentModel

            return AlignmentModel(settings, shapes)
        case Autoregressive():
            from sfumato.models.families.autoregressive import AutoregressiveModel

            return AutoregressiveModel(settings, shapes)
        case Adapter():
            from sfumato.models.families.adapter import AdapterModel

            return AdapterModel(settings, shapes)
        case Prompts():
            raise UsageError(
                "model.objective.kind = prompts · tells pictures apart, and generates nothing",
                next="Train it by `sfumato federate`, and see how well it tells them apart by `sfumato evaluate`.",
                code=NO_GENERATOR,
            )
