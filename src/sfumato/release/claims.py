"""What a recipe, a plan and a claim each say of the mechanism, brought into one form to be compared."""

from typing import Any

from sfumato.release import ledgers
from sfumato.release.refusing import failed, number

OF_STEPS = {"clipping": "flat", "bands": 1, "largest_batch": None, "noise": "gaussian"}  # what dp_sgd may have


CLAIMS = {  # what a recipe's mechanism may be called in its claim
    "dp_sgd": ("dp_sgd",),
    "latents": ("latent_release", "composition"),
    "mean_embedding": ("mean_embedding", "composition"),
    "codebook": ("composition",),
}


def training_of(mechanism: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The steps of a claim: all of it, or what comes after the release and the estimate of C that the recipe asked for."""
    wanted = ["mean_embedding"] if asked.get("warm_start") is not None else []
    wanted += ["estimate"] if asked.get("max_grad_norm") == "auto" else []
    if not wanted:
        return mechanism
    stages = mechanism.get("stages")
    if mechanism.get("name") == "composition" and isinstance(stages, list) and all(isinstance(s, dict) for s in stages):
        *first, last = stages
        estimated = last.get("max_grad_norm") == "estimated"
        if [stage.get("name") for stage in first] == wanted and estimated == (asked.get("max_grad_norm") == "auto"):
            return last
    what = {"mean_embedding": "warm_start", "estimate": "max_grad_norm: auto"}
    raise failed(
        f"{', '.join(what[name] for name in wanted)}: the recipe asks for it, the claim's steps do not come after it"
    )


def check_estimates(found: Any, plan: Any) -> None:
    """What is said to be estimated was estimated: by a stage of the plan, with its noise; and where C is, it is said."""
    from sfumato.privacy.plan import DpSgd, Estimate

    noise = {stage.name: stage.noise_std for stage in ledgers.stages(plan) if isinstance(stage, Estimate)}
    keys = {"of", "name", "value", "std", "low", "high", "confidence", "covered_by"}
    if not isinstance(found, list) or not all(isinstance(one, dict) and set(one) == keys for one in found):
        raise failed(f"estimates: each must have {', '.join(sorted(keys))}")
    for one in found:
        if not all(number(one[key]) for key in ("value", "std", "low", "high", "confidence")):
            raise failed("estimates: value, std, low, high and confidence must be numbers")
        if one["covered_by"] != "charged" or one["of"] not in noise or one["std"] != noise[one["of"]]:
            raise failed(f"estimates: {str(one['of'])[:60]!r} is not an estimate of the plan, with its noise")
    waiting = [
        stage for stage in ledgers.stages(plan) if isinstance(stage, DpSgd) and stage.max_grad_norm == "estimated"
    ]
    if waiting and len(found) != 1:
        raise failed(f"estimates: {len(found)} are said, the plan estimates one max_grad_norm")


def parts(values: dict[str, Any]) -> Any:
    """What a recipe and a claim both say of every part; in a recipe the shares may be left to the plan."""
    parts = values.get("parts", [])
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return parts
    return [[part.get(key) for key in ("name", "modules", "max_grad_norm")] for part in parts]
