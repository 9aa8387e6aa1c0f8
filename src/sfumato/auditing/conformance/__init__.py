"""Is a private trainer what it claims to be? Any trainer, through a small adapter; docs/conformance.md shows how.

from sfumato.auditing.conformance import Claim, Run, Trainer
"""

from sfumato.auditing.conformance.adapter import Claim, Run, Trainer

__all__ = ["Claim", "Run", "Trainer"]
