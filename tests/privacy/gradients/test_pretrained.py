"""Models of ``transformers`` and ``diffusers``, small and with random weights, against one unit at a time in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.oracles import one_unit_at_a_time, relative, released, table_of
from tests.privacy.gradients.comparing import difference
from tests.privacy.gradients.small_models import (
    CONDITIONED,
    COUNTS,
    IDS,
    POSITIONS,
    ROWS,
    SMALL,
    UNET,
    diffuser,
    floats,
    gpt2,
    losses,
    of,
    quiet,
    require_equal,
    shaken,
    token_losses,
    unet,
    words,
)
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.gradients.bookkeeping import Tape
from sfumato.privacy.gradients.pretrained import (
    Aliases,
    BareParameters,
    Conv1DRule,
    EmbeddingSubclassRule,
    RowwiseMethod,
)
from sfumato.privacy.gradients.root_mean_square import RootMeanSquareRule
from sfumato.privacy.gradients.rules import RowByRow, rule_for, sum_of
from sfumato.privacy.gradients.terms import PerRow, Units
from sfumato.randomness import TestRandom
from sfumato.records import Batch

DECODER = {"vocab_size": 31, "num_key_value_heads": 1, "max_position_embeddings": 32, **SMALL}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQUENCES = {
    "vocab_size": 31,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "dropout": 0.0,
}
PICTURES = {"image_size": 8, "patch_size": 4, **SMALL}


def with_frozen(make: Callable[[], nn.Module], *names: str) -> Callable[[], nn.Module]:
    def frozen() -> nn.Module:
        model = make()
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        return model

    return frozen


def clip() -> nn.Module:
    with quiet():
        from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={"vocab_size": 31, "max_position_embeddings": 16, "projection_dim": 8, "eos_token_id": 2, **SMALL},
        vision_config=PICTURES,
        projection_dim=8,
    )
    return CLIPModel(config)


def pair_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Of every text and its own picture."""
    output = model(**batch.tensors)
    return batch.per_unit(-3 * (output.text_embeds * output.image_embeds).sum(1))


def text(positions: int = POSITIONS) -> dict[str, Tensor]:
    return {"input_ids": words(positions)}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], Any]] = {
    "gpt2": (gpt2, text, token_losses),
    "llama": (of("LlamaForCausalLM", **DECODER), text, token_losses),
    "gemma": (of("GemmaForCausalLM", head_dim=8, **DECODER), text, token_losses),
    "mixtral": (
        of("MixtralForCausalLM", num_local_experts=3, experts_implementation="eager", **DECODER), text, token_losses,
    ),
    "opt": (
        of("OPTForCausalLM", vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
           max_position_embeddings=16, word_embed_proj_dim=16, dropout=0.0, use_cache=False), text, token_losses,
    ),
    "t5": (
        of("T5ForConditionalGeneration", vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
           dropout_rate=0.0, decoder_start_token_id=0),
        lambda: {**text(), "decoder_input_ids": words(POSITIONS)}, losses,
    ),
    "bart": (
        of("BartForConditionalGeneration", max_position_embeddings=16, **SEQUENCES),
        lambda: {**text(), "decoder_input_ids": words(4)}, losses,
    ),
    "whisper": (
        of("WhisperForConditionalGeneration", num_mel_bins=4, max_source_positions=8, max_target_positions=16,
           decoder_start_token_id=1, **IDS, **SEQUENCES),
        lambda: {"input_features": floats(4, 16), "decoder_input_ids": words(POSITIONS)}, losses,
    ),
    "bert": (
        of("BertForMaskedLM", vocab_size=31, max_position_embeddings=16, **NO_DROPOUT, **SMALL), text, losses,
    ),
    "roberta": (
        of("RobertaForMaskedLM", vocab_size=31, max_position_embeddings=16, **NO_DROPOUT, **SMALL), text, losses,
    ),
    "vit": (
        of("ViTForImageClassification", num_labels=3, **PICTURES), lambda: {"pixel_values": floats(3, 8, 8)}, losses,
    ),
    "dinov2": (
        of("Dinov2ForImageClassification", num_labels=3, use_mask_token=False, **PICTURES),
        lambda: {"pixel_values": floats(3, 8, 8)}, losses,
    ),
    "clip": (with_frozen(clip, "logit_scale"), lambda: {**text(), "pixel_values": floats(3, 8, 8)}, pair_losses),
    "mamba": (
        of("MambaForCausalLM", vocab_size=31, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False),
        text, token_losses,
    ),
}  # fmt: skip


def case(name: str, table: dict[str, Any] = CASES) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """In float64; no parameter is left at 0 or 1, where much would be right by chance."""
    torch.manual_seed(0)
    make, data, loss = table[name]
    model = shaken(make().double())
    return model.train(), data(), loss


@pytest.mark.parametrize("name", CASES)
def test_the_released_sum_is_that_of_one_unit_at_a_time(name):
    require_equal(*case(name))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit", "clip", "mixtral"])
def test_a_model_computes_the_same_with_the_engine(name):
    model, tensors, loss = case(name)
    batch = table_of(tensors, COUNTS).batch(range(len(COUNTS)), records_per_unit=9)
    expected = loss(model, batch)
    tape = Tape(model)
    tape.give_units(Units(None, ROWS))
    torch.testing.assert_close(loss(model, batch), expected, rtol=1e-6, atol=1e-7)
    tape.detach()
    assert all("forward" not in vars(module) for module in model.modules())


def rules_of(model: nn.Module) -> dict[str, str]:
    return {type(layer.module).__name__: type(layer.rule).__name__ for layer in Tape(model).layers}


def test_the_fast_rules_are_found():
    """If they were not, all of the above would be right, and slow."""
    found: dict[str, str] = {}
    for name in ("gpt2", "llama", "gemma", "t5", "vit", "clip", "bert"):
        found |= rules_of(case(name)[0])
    assert RowByRow.__name__ not in found.values()
    expected = {
        "Conv1D": Conv1DRule, "LlamaRMSNorm": RootMeanSquareRule, "GemmaRMSNorm": RootMeanSquareRule,
        "T5LayerNorm": RootMeanSquareRule, "T5Attention": RowwiseMethod, "ViTEmbeddings": BareParameters,
        "CLIPVisionEmbeddings": BareParameters, "GemmaTextScaledWordEmbedding": EmbeddingSubclassRule,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == {name: rule.__name__ for name, rule in expected.items()}
    assert isinstance(rule_for(case("bert")[0].cls.predictions), Aliases)


# -------------------------------------------------------------------------------------------- norms of many names


def norms() -> dict[str, nn.Module]:
    with quiet():
        from diffusers.models.normalization import RMSNorm as OfDiffusers
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    hugging = (LlamaRMSNorm, Qwen2RMSNorm, MistralRMSNorm, GemmaRMSNorm, Olmo2RMSNorm, T5LayerNorm)
    return {kind.__name__: kind(12) for kind in hugging} | {"of diffusers": OfDiffusers(12, eps=1e-5)}


class Kept:
    """What a rule's backward pass records."""

    rows = None

    def __init__(self, calls: list[tuple[Tensor, ...]]) -> None:
        self.calls = calls

    def __call__(self, *tensors: Tensor) -> None:
        self.calls.append(tensors)


@pytest.mark.parametrize("between", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_root_mean_square_norm_has_the_gradients_of_its_own_code(kind, between):
    """Output, gradient of the input, and of the weight row by row, for a weight and inputs of any size."""
    tolerance = 3e-2 if kind == torch.bfloat16 else 2e-6
    for name, norm in norms().items():
        torch.manual_seed(0)
        shaken(norm.to(kind))
        rule = rule_for(norm)
        assert isinstance(rule, RootMeanSquareRule), name
        sizes = torch.tensor([1e-3, 1, 30, 5]).view(4, *[1] * len(between), 1).to(kind)
        x, g = (torch.randn(4, *between, 12).to(kind) for _ in range(2))
        x = x * sizes
        recorded: list[tuple[Tensor, ...]] = []
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [rule.forward(norm, Kept(recorded), inputs[0]), norm(inputs[1])]
        assert outputs[0].dtype == outputs[1].dtype
        assert relative(outputs[0].detach().double(), outputs[1].detach().double()) <= tolerance, name
        for y in outputs:
            y.backward(g.to(y.dtype))
        assert relative(inputs[0].grad.double(), inputs[1].grad.double()) <= tolerance, name  # type: ignore[union-attr]
        ((rows,),) = recorded
        for row in range(4):
            norm.zero_grad()
            y = norm(x[row : row + 1])
            y.backward(g[row : row + 1].to(y.dtype))
            assert relative(rows[row].double(), norm.weight.grad.double()) <= tolerance, name


class CalledTwice(nn.Module):
    """One norm for the positions of a row, and for their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = norms()["LlamaRMSNorm"], nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x).mean(1) + self.norm(x.mean(1)))


def test_a_norm_that_is_called_with_and_without_positions():
    model = shaken(CalledTwice().double())
    assert difference(model, [torch.randn(5, 3, 12)], [1, 2, 2]) <= 1e-6


def test_gradients_that_are_not_one_for_each_row_are_never_added_up():
    """A record of another shape would be broadcast over all rows: what one unit says would be everybody's."""
    weight = nn.Parameter(torch.zeros(4))
    for wrong in (torch.zeros(()), torch.zeros(3), torch.zeros(3, 5)):
        with pytest.raises(RuntimeError, match="one for each row"):
            PerRow(weight, wrong)
    with pytest.raises(RuntimeError, match="cannot be added"):
        sum_of([torch.zeros(3, 4), torch.zeros(4)])


class OneOfMany(nn.Module):
    """Bears the name, and computes something else."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon = 1e-6

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class ScaledBeforeRMSNorm(OneOfMany):
    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x * self.weight)


class GroupedRMSNorm(OneOfMany):
    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.unflatten(-1, (3, 4))).flatten(-2) * self.weight


class GatedRMSNorm(OneOfMany):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self._norm(x) * self.weight * (1 if gate is None else gate.sigmoid())


class OutsideRMSNorm(OneOfMany):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class CentredRMSNorm(OneOfMany):
    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x - x.mean(-1, keepdim=True)) * self.weight


class TwiceRMSNorm(OneOfMany):
    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * (self.weight + 2)


@pytest.mark.parametrize(
    "kind", [ScaledBeforeRMSNorm, GroupedRMSNorm, GatedRMSNorm, OutsideRMSNorm, CentredRMSNorm, TwiceRMSNorm]
)
def test_a_name_alone_does_not_make_a_root_mean_square_norm(kind):
    """They go row by row, and are right."""
    torch.manual_seed(0)
    norm = kind()
    assert rule_for(norm) is None
    model = nn.Sequential(nn.Linear(4, 12), norm).double()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return batch.per_unit(model(batch.tensors["x"]).sin().sum((1, 2)))

    require_equal(model, {"x": floats(3, 4)}, loss)


# -------------------------------------------------------------------------------------- what others fail on, by thread


def test_broadcast_position_ids_opacus_841():
    """The positions of GPT-2 are (1, T), for all rows: its default."""
    model, tensors, loss = case("gpt2")
    require_equal(model, tensors, loss, max_physical_batch_size=2)


@pytest.mark.parametrize("positions", ["expanded", "of each row", "shared"])
def test_position_ids_that_are_given(positions):
    model, tensors, _ = case("gpt2")
    given = {
        "expanded": torch.arange(POSITIONS).expand(ROWS, -1),  # not contiguous: one row seen R times
        "of each row": torch.stack([(torch.arange(POSITIONS) + row) % 9 for row in range(ROWS)]),
        "shared": torch.arange(POSITIONS).unsqueeze(0),
    }[positions]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        mine = given if positions != "of each row" else batch.tensors["positions"]
        y = model(input_ids=batch.tensors["input_ids"], position_ids=mine[: batch.num_rows]).logits
        return batch.per_unit(y.sin().sum((1, 2)))

    require_equal(model, {**tensors, "positions": given.expand(ROWS, -1).clone()}, loss)


def test_tied_word_embeddings_opacus_732():
    """Looked up and multiplied with: one parameter, one gradient, one clip. Every other engine is wrong or refuses."""
    model, tensors, loss = case("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    require_equal(model, tensors, loss)
    untied = of("GPT2LMHeadModel", vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, **IDS)().double()  # fmt: skip
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    require_equal(untied, tensors, loss)


def test_checkpointed_activations_of_transformers():
    model, tensors, loss = case("gpt2")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    require_equal(model, tensors, loss)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit"])
def test_under_autocast_a_model_has_the_gradients_of_half_precision(name):
    """bfloat16 has 8 bits: close to the exact sum, and within the bound all the same."""
    model, tensors, loss = case(name)
    model = model.float()
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}

    def rounded(model: nn.Module, batch: Batch) -> Tensor:
        single = next(model.parameters()).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=single):
            return loss(model, batch)

    plain = copy.deepcopy(model)
    sums, batch = released(model, rounded, table_of(tensors, COUNTS), max_grad_norm=1e-2)
    assert relative(sums, one_unit_at_a_time(plain, rounded, batch, 1e-2)) <= 0.1
    assert float(sums.norm()) <= len(COUNTS) * 1e-2 * (1 + 1e-4)  # the parameters themselves are rounded to float32


def test_frozen_parts_of_a_model():
    model, tensors, loss = case("gpt2")
    model.requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    require_equal(model, tensors, loss)


# ------------------------------------------------------------------------------------------- what is refused, by name


def engine(model: nn.Module) -> DifferentialPrivacyEngine:
    return DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))


def test_a_contrastive_loss_is_refused():
    with pytest.raises(UnsupportedLayer, match=r"CLIPModel.*logit_scale belongs to a loss that compares every pair"):
        engine(clip())
    model, tensors, _ = case("clip")
    batch = table_of(tensors, COUNTS).batch(range(len(COUNTS)), records_per_unit=9)

    def contrastive(batch: Batch) -> Tensor:
        logits = model(**batch.tensors).logits_per_text
        return batch.per_unit(nn.functional.cross_entropy(logits, torch.arange(batch.num_rows), reduction="none"))

    with pytest.raises(UnsupportedLayer, match=r"one unit's gradient changes with another unit's data"):
        engine(model).check_independence(contrastive, batch)


def test_resized_positions_are_refused_by_name():
    model, _, _ = case("vit")
    table = table_of({"pixel_values": floats(3, 12, 12)}, COUNTS)
    with pytest.raises(UnsupportedLayer, match=r"ViTEmbeddings · uses its parameter in __getitem__"):
        released(model, lambda m, b: losses(m, b, interpolate_pos_encoding=True), table)
    model, _, _ = case("vit")
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    require_equal(model, {"pixel_values": floats(3, 12, 12)}, lambda m, b: losses(m, b, interpolate_pos_encoding=True))


def test_a_cache_that_rows_would_share_is_refused_by_name():
    model, tensors, loss = case("opt")
    model.config.use_cache = True
    with pytest.raises(UnsupportedLayer, match=r"OPTDecoderLayer · goes row by row, but got a DynamicCache.*use_cache"):
        released(model, loss, table_of(tensors, COUNTS))


def test_an_unused_token_is_named():
    model, tensors, loss = case("vit")
    embeddings = model.vit.embeddings
    embeddings.mask_token = nn.Parameter(torch.zeros(1, 1, 16).double())
    with pytest.raises(UsageError, match=r"vit.embeddings.mask_token · took no part in the loss"):
        released(model, loss, table_of(tensors, COUNTS))


# -------------------------------------------------------------------------------------------------------- diffusers

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2, "in_channels": 2}
TIMES = {"timestep": torch.arange(ROWS) * 7}


def reconstruction(model: Any, batch: Batch) -> Tensor:
    latent = model.encode(batch.tensors["x"]).latent_dist
    y = model.decode(latent.mean + latent.std * batch.tensors["eps"]).sample
    return batch.per_unit((y - batch.tensors["x"]).square().flatten(1).mean(1) + latent.kl())


def pixart_losses(model: nn.Module, batch: Batch) -> Tensor:
    return losses(model, batch, added_cond_kwargs={"resolution": None, "aspect_ratio": None})


DIFFUSERS: dict[str, Any] = {
    "unet": (
        diffuser("UNet2DModel", **UNET, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                 up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        lambda: {"sample": floats(3, 8, 8), **TIMES}, losses,
    ),
    "unet with conditions": (
        unet, lambda: {"sample": floats(3, 8, 8), **TIMES, "encoder_hidden_states": floats(5, 12)}, losses,
    ),
    "unet with classes, one time for all rows": (
        diffuser("UNet2DConditionModel", **CONDITIONED, num_class_embeds=5, resnet_time_scale_shift="scale_shift"),
        lambda: {"sample": floats(3, 8, 8), "encoder_hidden_states": floats(5, 12),
                 "class_labels": torch.arange(ROWS) % 5},
        lambda model, batch: losses(model, batch, timestep=3),
    ),
    "autoencoder": (
        diffuser("AutoencoderKL", in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4,
                 down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                 latent_channels=2, sample_size=8),
        lambda: {"x": floats(3, 8, 8), "eps": floats(2, 4, 4)}, reconstruction,
    ),
    "dit": (
        diffuser("DiTTransformer2DModel", **HEADS, out_channels=2, norm_num_groups=4, sample_size=4,
                 num_embeds_ada_norm=50),
        lambda: {"hidden_states": floats(2, 4, 4), **TIMES, "class_labels": torch.arange(ROWS) % 5}, losses,
    ),
    "pixart": (
        diffuser("PixArtTransformer2DModel", **HEADS, out_channels=4, cross_attention_dim=16, sample_size=4,
                 caption_channels=12, use_additional_conditions=False, interpolation_scale=1),
        lambda: {"hidden_states": floats(2, 4, 4), **TIMES, "encoder_hidden_states": floats(5, 12)}, pixart_losses,
    ),
    "stable diffusion 3": (
        diffuser("SD3Transformer2DModel", **HEADS, out_channels=2, sample_size=4, joint_attention_dim=12,
                 caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=4, qk_norm="rms_norm"),
        lambda: {"hidden_states": floats(2, 4, 4), **TIMES, "encoder_hidden_states": floats(5, 12),
                 "pooled_projections": floats(10)}, losses,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_released_sum_of_a_diffusion_model(name):
    """All trainable parameters; one clip over them all."""
    with quiet():
        model, tensors, loss = case(name, DIFFUSERS)
        require_equal(model.eval(), tensors, loss)


def test_no_parameter_of_the_time_embedding_is_left_out():
    """fastDP trains a UNet2DConditionModel without four of them, and says nothing."""
    with quiet():
        model, tensors, loss = case("unet with conditions", DIFFUSERS)
    before = copy.deepcopy(model.state_dict())
    released(model, loss, table_of(tensors, COUNTS))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in model.named_parameters()}
    assert sum("time_embedding" in name for name in moved) == 4
