"""Sfumato: multimodal generators under differential privacy. The public names, nothing else.

    import sfumato

    engine = sfumato.DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.1)

Each name is imported when it is first asked for, so that ``import sfumato`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "DifferentialPrivacyEngine": "sfumato.privacy.engine",
    "NotPrivateEngine": "sfumato.privacy.engine",
    "make_engine": "sfumato.privacy.engine",
    "AdaptiveClip": "sfumato.privacy.adaptive",
    "DpAdamBC": "sfumato.training.dp_adam",
    "Part": "sfumato.privacy.gradients.groups",
    "DpSgd": "sfumato.privacy.plan",
    "PrivacySettings": "sfumato.privacy.settings",
    "PrivateTrainer": "sfumato.training.trainer",
    "NotPrivate": "sfumato.privacy.plan",
    "Ledger": "sfumato.privacy.ledger",
    "Recipe": "sfumato.recipe",
    "Record": "sfumato.records",
    "Batch": "sfumato.records",
    "UnitTable": "sfumato.records",
    "SfumatoError": "sfumato.errors",
    "PrivacyRefused": "sfumato.errors",
    "UnsupportedLayer": "sfumato.errors",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from sfumato.errors import PrivacyRefused as PrivacyRefused
    from sfumato.errors import SfumatoError as SfumatoError
    from sfumato.errors import UnsupportedLayer as UnsupportedLayer
    from sfumato.privacy.adaptive import AdaptiveClip as AdaptiveClip
    from sfumato.privacy.engine import DifferentialPrivacyEngine as DifferentialPrivacyEngine
    from sfumato.privacy.engine import NotPrivateEngine as NotPrivateEngine
    from sfumato.privacy.engine import make_engine as make_engine
    from sfumato.privacy.gradients.groups import Part as Part
    from sfumato.privacy.ledger import Ledger as Ledger
    from sfumato.privacy.plan import DpSgd as DpSgd
    from sfumato.privacy.plan import NotPrivate as NotPrivate
    from sfumato.privacy.settings import PrivacySettings as PrivacySettings
    from sfumato.recipe import Recipe as Recipe
    from sfumato.records import Batch as Batch
    from sfumato.records import Record as Record
    from sfumato.records import UnitTable as UnitTable
    from sfumato.training.dp_adam import DpAdamBC as DpAdamBC
    from sfumato.training.trainer import PrivateTrainer as PrivateTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
