"""Every error that a user can meet, and the exit code that the command line gives it.

    SfumatoError              1   our mistake, when nothing more precise is known
    ├── UsageError            2   wrong use: a recipe, an argument, a value (also a ValueError)
    ├── DataError             2   input that cannot be read or that is not what it says (also a ValueError)
    ├── PrivacyRefused        3   a plan, a budget, a policy or a gate says no
    │   ├── BudgetExhausted   3   the next event would pass the plan's limit
    │   ├── LedgerError       3   the ledger is busy, torn, older than a checkpoint, or not ours
    │   └── UnsupportedLayer  3   a layer that cannot be trained privately, named
    ├── VerificationFailed    4   a bundle or a ledger is not what its signature says
    └── OutsideError          5   something outside is missing: package, client, network, disk
        └── MissingDependency 5   (also an ImportError)

A message has the form *name = value · what was expected*; ``next`` says what to do.
"""


class SfumatoError(Exception):
    """Base of all our errors. ``str(error)`` is the message, a middle dot, and the next step."""

    exit_code = 1
    code = "internal"

    def __init__(self, message: str, *, next: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.next = next
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message} · {self.next}" if self.next else self.message

    def as_dict(self) -> dict[str, str]:
        """The object that ``--json`` prints under the key ``error``."""
        return {"code": self.code, "message": self.message, "next": self.next}


class UsageError(SfumatoError, ValueError):
    exit_code = 2
    code = "usage"


class DataError(SfumatoError, ValueError):
    exit_code = 2
    code = "data"


class PrivacyRefused(SfumatoError):
    """``refusals`` holds every reason, not only the first: dicts with code, message, next."""

    exit_code = 3
    code = "refused"

    def __init__(
        self,
        message: str,
        *,
        next: str = "",
        code: str | None = None,
        refusals: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(message, next=next, code=code)
        self.refusals = refusals if refusals is not None else [self.as_dict()]


class BudgetExhausted(PrivacyRefused):
    code = "budget_exhausted"


class LedgerError(PrivacyRefused):
    code = "ledger"


class UnsupportedLayer(PrivacyRefused):
    code = "unsupported_layer"


class VerificationFailed(SfumatoError):
    exit_code = 4
    code = "verification_failed"


class OutsideError(SfumatoError):
    exit_code = 5
    code = "outside"


class MissingDependency(OutsideError, ImportError):
    code = "missing_dependency"
