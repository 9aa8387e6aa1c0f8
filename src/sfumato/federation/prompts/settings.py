"""What sites learn of a prompt, and how; the methods themselves stand in ``models.prompt_settings``."""

from dataclasses import dataclass, field
from typing import Literal

from sfumato import checks
from sfumato.models.prompt_settings import DpFpl as DpFpl
from sfumato.models.prompt_settings import FedOTP as FedOTP
from sfumato.models.prompt_settings import FedPGP as FedPGP
from sfumato.models.prompt_settings import Method as Method
from sfumato.models.prompt_settings import PromptFL as PromptFL
from sfumato.models.prompt_settings import check_rank
from sfumato.privacy.settings import PartSettings

HOME = ("p_L", "u", "v")  # parameters of these names stay at their site: ``FederationSettings.home``


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSettings:
    """Attributes:
    tokens: M, context vectors of the prompt.
    learning_rate: of p_G; local_learning_rate: of p_L, or u and v.
    releases: each: every block's gradient is clipped and noised by itself, the paper's form. once: the gradient of the prompt is, and
      the blocks' gradients are computed from what came out.
    initial_std: of every number of a prompt before the first step, from a public seed.
    """

    method: Method = field(default_factory=DpFpl)
    tokens: int = 16
    learning_rate: float = 0.1
    local_learning_rate: float = 0.1
    releases: Literal["each", "once"] = "each"
    initial_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        checks.positive(tokens=self.tokens, learning_rate=self.learning_rate, initial_std=self.initial_std)
        checks.positive(local_learning_rate=self.local_learning_rate)
        checks.one_of(("each", "once"), releases=self.releases)
        check_rank(self.method, self.tokens)

    def parts(self, max_grad_norm: float) -> tuple[PartSettings, ...]:
        """For a ``DpSgd`` plan: each block clipped to the same bound, with the same noise. None where there is one block."""
        names = self.method.blocks if self.releases == "each" else ()
        if len(names) < 2:
            return ()
        return tuple(PartSettings(name=name, modules=(name,), max_grad_norm=max_grad_norm) for name in names)
