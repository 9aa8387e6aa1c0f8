"""Plans as plain JSON values: what a run's folder, its ledger and its bundle hold."""

import json
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from sfumato.errors import SfumatoError, UsageError
from sfumato.privacy.plan import KINDS, STAGES, Composition, PrivacyPlan

_OPTIONAL = {"clipping": "flat", "parts": (), "bands": 1, "largest_batch": None, "noise": "gaussian"}  # of DpSgd
_CHANGED = "It was written by another version, or changed."


def plan_to_dict(plan: PrivacyPlan) -> dict[str, Any]:
    """Plain JSON values; ``kind`` says which plan it is. Of DpSgd what says nothing is left out, so that a plan without it
    is written, and hashed, as it always was."""
    kind = next(name for name, of in KINDS.items() if type(plan) is of)
    if isinstance(plan, Composition):
        values = {**asdict(plan), "stages": [plan_to_dict(stage) for stage in plan.stages]}
    else:
        values = json.loads(json.dumps(asdict(plan)))  # tuples as lists
    if kind == "dp_sgd":
        nothing = json.loads(json.dumps(_OPTIONAL))
        values = {name: value for name, value in values.items() if name not in nothing or value != nothing[name]}
    return {"kind": kind, **values}


def plan_from_dict(values: Any) -> PrivacyPlan:
    """Reads what ``plan_to_dict`` wrote. Raises UsageError for an unknown kind, key or value."""
    plan = _read(values, KINDS, "plan")
    if plan_to_dict(plan) != values:
        raise UsageError("plan · is not in the one form that we write", next=_CHANGED)
    return plan


def _read(values: Any, kinds: dict[str, type[Any]], where: str) -> Any:
    if not isinstance(values, dict):
        raise UsageError(
            f"{where} = {type(values).__name__} · must be a mapping", next="It was written by something else."
        )
    rest = {key: value for key, value in values.items() if key != "kind"}
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UsageError(
            f"{where}.kind = {str(kind)[:40]!r} · must be one of {', '.join(kinds)}",
            next="It was written by something else.",
        )
    if kinds[kind] is Composition:
        stages = rest.pop("stages", None)
        if not isinstance(stages, list):
            raise UsageError(f"{where}.stages · must be a list", next=_CHANGED)
        rest["stages"] = tuple(_read(stage, STAGES, f"{where}.stages") for stage in stages)
        try:
            return Composition(**rest)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, SfumatoError):
                raise
            raise UsageError(f"{where} · {error}", next=_CHANGED) from None
    return _validated(kinds[kind], rest, where)


@lru_cache(maxsize=16)
def _adapter(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _validated(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    """Strict: no number from text, no whole number from a fraction or a truth value."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        cause = (problem.get("ctx") or {}).get("error")
        if isinstance(cause, SfumatoError):
            raise cause from None
        path = ".".join([where, *map(str, problem["loc"])])
        raise UsageError(f"{path} = {str(problem.get('input'))[:60]} · {problem['msg']}", next=_CHANGED) from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # what JSON cannot say
        if isinstance(error, SfumatoError):
            raise
        raise UsageError(f"{where} · {str(error)[:200]}", next=_CHANGED) from None
