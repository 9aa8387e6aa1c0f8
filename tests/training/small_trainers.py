"""Small models, rows and a collator for the tests of ``PrivateTrainer``."""

import numpy as np
import torch
import transformers

from sfumato.privacy.plan import DpSgd
from sfumato.randomness import TestRandom
from sfumato.training.trainer import PrivateTrainer

WORDS, UNITS = 31, 40


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def texts(count=UNITS, seed=0, persons=None):
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        ids = generator.integers(1, WORDS, int(generator.integers(3, 9))).tolist()
        rows.append(
            {"input_ids": ids, "labels": list(ids), **({} if persons is None else {"person": f"p{i % persons}"})}
        )
    return rows


def padded(rows, side="right", label_of_padding=-100):
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(values, value):
        more = [value] * (longest - len(values))
        return values + more if side == "right" else more + values

    return {
        "input_ids": torch.tensor([fill(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([fill(row["labels"], label_of_padding) for row in rows]),
    }


class Told(TestRandom):
    """A test source whose coins are given: who joins each step."""

    def __init__(self, seed, draws):
        super().__init__(seed)
        self._draws = iter(draws)

    def uniform(self, count):
        coins = np.ones(count) - 2.0**-53
        coins[list(next(self._draws))] = 0.0
        return coins


def arguments(folder, **changes):
    values = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.1, "logging_steps": 1, "save_strategy": "no",
        "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0.0,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **{**values, **changes})


def plan(**changes):
    values = {"population": UNITS, "expected_batch_size": 4.0, "steps": 4, "noise_multiplier": 1.0, "delta": 1e-3}
    return DpSgd(**{**values, **changes})


def trainer(folder, *, model=None, rows=None, args=None, kind=PrivateTrainer, privacy=None, **named):
    made = kind(
        model=llama() if model is None else model,
        args=args if args is not None else arguments(folder),
        train_dataset=texts() if rows is None else rows,
        data_collator=named.pop("data_collator", padded),
        privacy=plan() if privacy is None else privacy,
        random=named.pop("random", TestRandom(0)),
        **named,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def vector(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters() if p.requires_grad])
