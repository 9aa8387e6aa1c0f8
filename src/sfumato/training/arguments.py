"""Which ``transformers.TrainingArguments`` a private training can follow, and why it cannot follow the others.

A value is refused by its name where it would break the guarantee, and where it could only be ignored: nothing is dropped in
silence. Names that a version of ``transformers`` does not have are not asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LOCAL_REPORTS = {"none", "tensorboard", "codecarbon"}  # write on this machine, or send nothing of the training
_POISSON = "Leave it out: every unit joins each step by its own coin, and that is what is accounted."
_HERE = "Leave it out: rows are read in this process, after their step was charged."
_ALONE = "Start torchrun with one process for each device: the engine adds up over them, replicated."


def _off(value: Any) -> bool:
    return value in (None, False, 0, "", "no", "none", [], {}) or getattr(value, "value", value) in ("", "no", "none")


def _is(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: getattr(value, "value", value) in allowed


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    why: str
    next: str
    allowed: Callable[[Any], bool] = _off


_RULES = (
    # who is drawn
    _Rule("train_sampling_strategy", "draws by length or in order, which is not Poisson sampling", _POISSON, _is("random")),
    _Rule("group_by_length", "draws by length, which is not Poisson sampling", _POISSON),
    _Rule("dataloader_drop_last", "drops units: Poisson batches have every size, 0 too, and none is dropped", _POISSON),
    _Rule("data_seed", "would make who is drawn repeatable, and with it the guarantee void", _POISSON, lambda v: v is None),
    _Rule("auto_find_batch_size", "begins again when the memory was too small, which depends on who was drawn",
          "Lower per_device_train_batch_size, and raise gradient_accumulation_steps by as much."),
    _Rule("dataloader_num_workers", "would read rows ahead, in other processes", _HERE),
    _Rule("dataloader_persistent_workers", "needs workers, and there are none", _HERE),
    _Rule("dataloader_prefetch_factor", "would read rows ahead", _HERE),
    _Rule("dataloader_multiprocessing_context", "is about workers, and there are none", _HERE),
    # what one unit's gradient is
    _Rule("neftune_noise_alpha", "scales its noise by the padded length of the batch, so that one unit's gradient depends on "
          "the others", "Leave it out."),
    _Rule("use_liger_kernel", "makes one loss of all tokens of the batch, and no logits to take a unit's loss from",
          "Leave it out."),
    _Rule("fp16", "scales the loss and skips steps whose gradients overflow: whether a step happens would depend on who is in "
          "it", "Use bf16=True, or float32."),
    _Rule("torch_compile", "leaves nothing to record a unit's gradient from", "Leave it out."),
    _Rule("torch_compile_backend", "leaves nothing to record a unit's gradient from", "Leave it out."),
    _Rule("torch_compile_mode", "leaves nothing to record a unit's gradient from", "Leave it out."),
    _Rule("jit_mode_eval", "compiles the model, which leaves nothing to record", "Leave it out."),
    _Rule("debug", "stops where a unit's numbers overflow: whether it stops depends on who is drawn",
          "Leave it out: a gradient that is not finite counts as zero.", lambda v: _off(v)),
    # how the devices work together
    _Rule("deepspeed", "splits and steps by itself, past the clipping", _ALONE),
    _Rule("fsdp", "wraps the model in a way that the trainer does not hand to the engine",
          "Use torch.distributed.fsdp.fully_shard with the engine in a loop of your own (docs/processes.md), or torchrun "
          "without fsdp."),
    _Rule("parallelism_config", "splits the model in a way that the engine does not know", _ALONE),
    _Rule("ddp_find_unused_parameters", "is about a wrapper that is not used here", "Leave it out.", lambda v: v is None),
    _Rule("ddp_bucket_cap_mb", "is about a wrapper that is not used here", "Leave it out.", lambda v: v is None),
    _Rule("ddp_broadcast_buffers", "is about a wrapper that is not used here", "Leave it out.", lambda v: v is None),
    _Rule("ddp_static_graph", "is about a wrapper that is not used here", "Leave it out.", lambda v: v is None),
    # what leaves
    _Rule("push_to_hub", "sends checkpoints during the training, before anyone has looked at them",
          "Leave it out; when the training is over, trainer.save_model('model') and upload that folder: output_dir holds the logs, "
          "with the training loss, and the ledger."),
    _Rule("include_num_input_tokens_seen", "writes how many tokens the drawn units had, uncharged, into every checkpoint",
          "Leave it out."),
    _Rule("include_tokens_per_second", "reports how many tokens the drawn units had, uncharged", "Leave it out."),
)  # fmt: skip

_CHOOSING = (
    _Rule("load_best_model_at_end", "keeps the checkpoint that was best on the evaluation data, uncharged", ""),
    _Rule("save_strategy", "keeps the checkpoint that was best on the evaluation data, uncharged", "", lambda v: not _is("best")(v)),
    _Rule("metric_for_best_model", "marks the checkpoint that was best on the evaluation data, uncharged", ""),
    _Rule("lr_scheduler_type", "follows the evaluation data, uncharged", "",
          lambda v: not _is("reduce_lr_on_plateau", "greedy")(v)),
)  # fmt: skip
PUBLIC_EVALUATION = (
    "Evaluate on public data and say so with evaluation_is_public=True, or leave it out and take the last weights."
)


def refusals(args: Any, *, evaluation_is_public: bool) -> list[dict[str, str]]:
    """Every reason why a private training cannot follow ``args``: dicts with code, message and next."""
    rules = _RULES if evaluation_is_public else (*_RULES, *_CHOOSING)
    found = [
        _refusal(rule.name, getattr(args, rule.name), rule.why, rule.next or PUBLIC_EVALUATION)
        for rule in rules
        if hasattr(args, rule.name) and not rule.allowed(getattr(args, rule.name))
    ]
    sends = sorted(set(args.report_to or []) - LOCAL_REPORTS)
    if sends:
        why = "sends the training loss, which the guarantee does not cover, to somebody else"
        step = "Use report_to='tensorboard' or 'none'; whoever wants it sent adds the callback: callbacks=[...]."
        found.append(_refusal("report_to", ", ".join(sends), why, step))
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise"):
        step = "Use adamw_torch, adafactor or sgd, for example."
        found.append(_refusal("optim", optimizer, "steps inside the backward pass, before gradients are clipped", step))
    if args.n_gpu > 1:
        why = "would copy the model to several devices by torch.nn.DataParallel, which the engine cannot see into"
        found.append(_refusal("n_gpu", args.n_gpu, why, _ALONE + " Or show it one device with CUDA_VISIBLE_DEVICES."))
    return found + _of_accelerate(args)


def _of_accelerate(args: Any) -> list[dict[str, str]]:
    config = getattr(args, "accelerator_config", None)
    why = {
        "split_batches": "cuts batches that are drawn whole",
        "dispatch_batches": "lets one process draw for all",
        "gradient_accumulation_kwargs": "is about adding up gradients, which the engine does",
    }
    return [
        _refusal(f"accelerator_config.{name}", getattr(config, name), reason, "Leave it out.")
        for name, reason in why.items()
        if not _off(getattr(config, name, None))
    ]


def _refusal(name: str, value: Any, why: str, next: str) -> dict[str, str]:
    shown = getattr(value, "value", value)
    return {"code": "training_argument", "message": f"{name} = {shown} · {why}", "next": next}
