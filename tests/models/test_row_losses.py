"""Each row's loss is what ``transformers`` says of a batch of that row alone."""

import pytest
import torch
import transformers
from tests.privacy.gradients.small_models import quiet

from sfumato.errors import UsageError
from sfumato.models.row_losses import row_losses, token_means

R, T, WORDS = 3, 6, 31
BERT = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
      "decoder_start_token_id": 0}  # fmt: skip
LLAMA = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip


def words():
    torch.manual_seed(1)
    mask = torch.arange(T) < torch.tensor([[6], [4], [2]])
    return {"input_ids": torch.randint(3, WORDS, (R, T)) * mask, "attention_mask": mask.long()}


def of_words():
    inputs = words()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def bert(kind, **more):
    return getattr(transformers, kind)(transformers.BertConfig(**BERT, **more))


CASES = {
    "causal": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), of_words),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0,
            )
        ),
        of_words,
    ),
    "sequences": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), of_words),
    "masked": (lambda: bert("BertForMaskedLM"), of_words),
    "tokens": (
        lambda: bert("BertForTokenClassification", num_labels=4), lambda: {**words(), "labels": torch.randint(0, 4, (R, T))}
    ),
    "classes": (
        lambda: bert("BertForSequenceClassification", num_labels=4), lambda: {**words(), "labels": torch.tensor([0, 3, 1])}
    ),
    "regression": (
        lambda: bert("BertForSequenceClassification", num_labels=1), lambda: {**words(), "labels": torch.tensor([0.5, 3.0, -1.0])}
    ),
    "several labels": (
        lambda: bert("BertForSequenceClassification", num_labels=4), lambda: {**words(), "labels": torch.rand(R, 4).round()}
    ),
    "answers": (
        lambda: bert("BertForQuestionAnswering"),
        lambda: {**words(), "start_positions": torch.tensor([0, 1, 1]), "end_positions": torch.tensor([2, 3, 9])},
    ),
}  # fmt: skip


SMOOTHED = ("causal", "masked", "tokens", "sequences", "classes")


@pytest.mark.parametrize(("case", "smoothing"), [*((case, 0.0) for case in CASES), *((case, 0.2) for case in SMOOTHED)])
def test_each_row_is_as_if_alone(case, smoothing):
    make, inputs_of = CASES[case]
    torch.manual_seed(0)
    with quiet():
        model = make().eval()
    inputs = inputs_of()
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=smoothing)
    losses, outputs = row_losses(model, inputs, label_smoothing=smoothing)
    assert losses.shape == (R,) and outputs is not None
    for i in range(R):
        alone = {name: value[i : i + 1] for name, value in inputs.items()}
        output = model(**alone)
        loss = smoother(output, alone["labels"], shift_labels=case == "causal") if smoothing else output.loss
        if torch.isnan(loss):  # nothing to predict, or a place beyond the text: ours is 0 then
            assert losses[i] == 0 or case == "answers"
            continue
        torch.testing.assert_close(losses[i], loss, rtol=1e-5, atol=1e-5)


def test_a_row_without_labels_has_no_loss():
    logits = torch.randn(2, T, WORDS)
    labels = torch.full((2, T), -100)
    labels[0, 2] = 5
    losses = token_means(logits, labels)
    assert losses[1] == 0 and losses[0] == torch.nn.functional.cross_entropy(logits[0, 2:3], labels[0, 2:3])


def test_what_has_no_loss_of_a_row_is_refused():
    with quiet():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    with pytest.raises(UsageError, match="must hold labels"):
        row_losses(model, words())
    with pytest.raises(UsageError, match="must be that of the logits"):
        row_losses(model, {**words(), "labels": torch.zeros(R, T + 1, dtype=torch.long)})
    model.config.output_router_logits = True
    with pytest.raises(UsageError, match="output_router_logits"):
        row_losses(model, of_words())
    with quiet():
        other = bert("BertForMultipleChoice")
    with pytest.raises(UsageError, match="BertForMultipleChoice"):
        row_losses(other, {**words(), "labels": torch.zeros(R, dtype=torch.long)})
