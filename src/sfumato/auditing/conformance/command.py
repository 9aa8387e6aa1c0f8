"""What ``sfumato audit trainer`` does: load, audit, write the report.   [shell]"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfumato.auditing.conformance import adapter, page, suite


def audit_trainer(
    target: str,
    *,
    out: Path | None = None,
    seed: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Args: target: MODULE:FUNCTION or FILE.py:FUNCTION. out: a folder for conformance.md and conformance.json.

    Raises: UsageError where the adapter cannot be loaded, or its trainer cannot take one step.
    """
    trainer = adapter.load(target)
    result = suite.audit(trainer, name=trainer.name or target, seed=seed, progress=progress)
    told = _plain(result.as_dict())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "conformance.md").write_text(page.markdown(result), encoding="utf-8")
        (out / "conformance.json").write_text(json.dumps(told, indent=1, allow_nan=False), encoding="utf-8")
        told["report"] = str(out / "conformance.md")
    return told


def _plain(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
