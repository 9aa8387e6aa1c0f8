"""ms-swift trains privately: a plug-in that puts ``sfumato.PrivateTrainer`` under its own trainer.

    swift sft --external_plugins examples/ms_swift_plugin.py --model path/to/model --dataset data.jsonl \\
        --per_device_train_batch_size 8 --gradient_accumulation_steps 32 --max_steps 1000 --max_grad_norm 1.0 \\
        --dataloader_num_workers 0 --report_to none --split_dataset_ratio 0 --fp16 false

The privacy is said here, in two lines: ms-swift has no argument for it. Its template, data sets, tuners, callbacks and
checkpoints stay as they are; who is drawn, each record's loss and the step are ours. Packing and padding-free batches put
several records into one row, and are refused. ``logging.jsonl`` in its folder has the training loss, which is not covered.
"""

import os

from swift.trainers import Seq2SeqTrainer, TrainerFactory

from sfumato import PrivacySettings, PrivateTrainer

PRIVACY = PrivacySettings(epsilon=float(os.environ.get("EPSILON", "8")), max_grad_norm=1.0)
OWN = (
    "compute_loss_func",
    "loss_scale",
    "text_position_ids",
    "channel",
    "logits_to_keep",
)  # of ms-swift, not of the model


class PrivateSeq2SeqTrainer(PrivateTrainer, Seq2SeqTrainer):
    def __init__(self, *arguments, **named):
        template, args = named["template"], named["args"]
        if template.packing or template.padding_free:
            raise ValueError("packing, padding_free: several records would be one row; leave them out")
        args.data_seed = None  # it shuffles the data set before, and must not say who is drawn
        args.metric_for_best_model = None  # no checkpoint is chosen by the evaluation data
        args.dataloader_prefetch_factor, args.dataloader_persistent_workers = None, False
        for module in named["model"].modules():
            if "forward_origin" in vars(
                module
            ):  # ms-swift's own forward for adapters, which only moves devices, hides the layer
                del module.forward
        super().__init__(*arguments, privacy=PRIVACY, **named)

    def get_use_logits_to_keep(self, default_value=True):
        return False  # it leaves out positions that nobody in the *batch* learns

    def compute_losses(self, model, inputs):
        scale = inputs.get("loss_scale")
        if scale is not None:
            raise ValueError("loss_scale: weights of tokens are not in this example; override compute_losses for them")
        return super().compute_losses(model, {name: value for name, value in inputs.items() if name not in OWN})


TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.PrivateSeq2SeqTrainer"
