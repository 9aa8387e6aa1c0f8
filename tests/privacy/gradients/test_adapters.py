"""Adapters of ``peft`` against one unit at a time; and what a user of these packages relies on stays as it was."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracles import one_unit_at_a_time, relative, released, table_of, vector
from tests.privacy.gradients.small_models import (
    COUNTS,
    IDS,
    POSITIONS,
    ROWS,
    TOLERANCE,
    floats,
    gpt2,
    losses,
    of,
    quiet,
    require_equal,
    shaken,
    unet,
    words,
)
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.gradients.adapters import DoraRule, Prompt
from sfumato.privacy.gradients.bookkeeping import Tape
from sfumato.privacy.gradients.rules import RowByRow
from sfumato.randomness import TestRandom
from sfumato.records import Batch

LAYERS = ["c_attn", "c_proj", "c_fc"]


def adapted(config: Callable[[Any], Any], make: Callable[[], nn.Module] = gpt2) -> nn.Module:
    """Config: from the module ``peft``."""
    with quiet():
        import peft

        return peft.get_peft_model(make(), config(peft))  # type: ignore[return-value]


def lora(**options: Any) -> Callable[[Any], Any]:
    """Both factors random: usually B begins as zero, and A has no gradient."""
    defaults = {"r": 8, "lora_alpha": 20, "target_modules": LAYERS, "fan_in_fan_out": True, "init_lora_weights": False}
    return lambda peft: peft.LoraConfig(**{**defaults, "task_type": "CAUSAL_LM", **options})


def of_kind(name: str, **options: Any) -> Callable[[Any], Any]:
    return lambda peft: getattr(peft, name)(task_type="CAUSAL_LM", **options)


PROMPTS = {"num_virtual_tokens": 4, "encoder_hidden_size": 8}
CONV1D = {"target_modules": ["c_attn"], "fan_in_fan_out": True}

ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "lora": lora(),
    "lora, all biases": lora(bias="all"),
    "lora, its own biases": lora(bias="lora_only", lora_dropout=0.0, lora_bias=True),
    "lora on embeddings": lora(target_modules=["wte", "c_attn"]),
    "lora on the head": lora(target_modules=["lm_head", "c_attn"]),
    "lora and new tokens": lora(trainable_token_indices=[4, 5]),
    "lora and a norm of its own": lora(modules_to_save=["ln_f"]),
    "dora": lora(use_dora=True),
    "dora on embeddings": lora(target_modules=["wte", "c_attn"], use_dora=True),
    "ia3": of_kind("IA3Config", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"],
                   fan_in_fan_out=True),
    "prompt": of_kind("PromptTuningConfig", num_virtual_tokens=4),
    "prefix": of_kind("PrefixTuningConfig", num_virtual_tokens=4),
    "prefix through a network": of_kind("PrefixTuningConfig", prefix_projection=True, **PROMPTS),
    "p-tuning": of_kind("PromptEncoderConfig", **PROMPTS),
    "adalora": of_kind("AdaLoraConfig", r=4, total_step=10, **CONV1D),
    "vera": of_kind("VeraConfig", r=4, **CONV1D),
    "norms": of_kind("LNTuningConfig", target_modules=["ln_1", "ln_f"]),
}  # fmt: skip


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """A prompt comes before the tokens: only the logits of these count."""
    ids = batch.tensors["input_ids"]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    each = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return batch.per_unit(each.mean(1))


def text() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_ids": words(POSITIONS)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_released_sum_is_that_of_one_unit_at_a_time(name):
    torch.manual_seed(0)
    model = shaken(adapted(ADAPTERS[name]).double()).train()
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    with quiet():
        require_equal(model, text(), token_losses)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert len(trained) < len(list(model.parameters()))
    assert all(torch.equal(p, frozen[key]) for key, p in model.named_parameters() if key not in trained)


def test_magnitudes_with_dropout_in_training():
    """Then peft computes the base's part again, from the input that was dropped: here nothing is."""
    torch.manual_seed(0)
    model = shaken(adapted(lora(use_dora=True, lora_dropout=0.5)).double()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    require_equal(model, text(), token_losses)


def test_adapters_go_by_their_layers_where_they_are_made_of_layers():
    rules = {
        name: {type(layer.rule) for layer in Tape(adapted(ADAPTERS[name])).layers}
        for name in ("lora", "dora", "prompt", "p-tuning", "ia3")
    }
    assert RowByRow not in rules["lora"] | rules["dora"]
    assert DoraRule in rules["dora"]
    assert rules["prompt"] == rules["p-tuning"] == {Prompt}
    assert rules["ia3"] == {RowByRow}


def test_a_formula_of_dora_that_has_changed_is_refused(monkeypatch):
    """The formula is compared with peft's own on the first call; here peft's is another."""
    with quiet():
        from peft.tuners.lora.dora import DoraLinearLayer
    own = DoraLinearLayer.forward
    monkeypatch.setattr(DoraLinearLayer, "forward", lambda self, x, **kwargs: own(self, x, **kwargs) * 1.01)
    model = adapted(lora(use_dora=True))
    with pytest.raises(UnsupportedLayer, match=r"DoraLinearLayer · computes something else than DoRA's formula"):
        released(model, token_losses, table_of(text(), COUNTS))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_inside_a_unet(options):
    """On its linear layers and convolutions, put there by diffusers itself."""
    with quiet():
        from peft import LoraConfig

        torch.manual_seed(0)
        model: Any = unet().requires_grad_(False)
        model.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False, **options))
        model = shaken(model.double()).eval()
        tensors = {"sample": floats(3, 8, 8), "timestep": torch.arange(ROWS), "encoder_hidden_states": floats(5, 12)}
        require_equal(model, tensors, losses)


def test_what_cannot_be_right_is_refused_when_the_engine_is_made():
    with pytest.raises(UnsupportedLayer, match=r"lstm_head \(LSTM\): has rows in the second dimension"):
        engine(adapted(of_kind("PromptEncoderConfig", encoder_reparameterization_type="LSTM", **PROMPTS)))

    def llama() -> nn.Module:
        return of("LlamaForCausalLM", vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                  intermediate_size=24, num_key_value_heads=1)()  # fmt: skip

    target = {"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]}
    with pytest.raises(UnsupportedLayer, match=r"gate_proj \(ParamWrapper\): changes the weight of its base"):
        engine(adapted(lora(fan_in_fan_out=False, **target), llama))


# ------------------------------------------------------------------------------------------------ a quantised base


class Int8Linear(nn.Module):
    """A frozen layer of eight bits, as QLoRA has below its adapters: buffers, made numbers again in each forward."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("values", (layer.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values.to(x.dtype) * self.scale)  # type: ignore[operator]


class Adapted(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base = Int8Linear(layer)
        self.a = nn.Linear(layer.in_features, 3, bias=False)
        self.b = nn.Linear(3, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def test_adapters_over_a_quantised_base():
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(nn.Linear(6, 7)), nn.Tanh(), Adapted(nn.Linear(7, 4))).double()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return batch.per_unit(model(batch.tensors["x"]).sin().sum((1, 2)))

    before = model[0].base.values.clone()
    require_equal(model, {"x": floats(3, 6)}, loss)
    assert torch.equal(model[0].base.values, before)
    assert before.dtype == torch.int8


def test_adapters_over_int8_weights_of_torchao():
    """In float32, as the quantised kernels are."""
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    base = of("LlamaForCausalLM", vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
              intermediate_size=32, num_key_value_heads=2)()  # fmt: skip
    with quiet():
        torchao.quantize_(base, torchao.Int8WeightOnlyConfig(), lambda module, name: "q_proj" in name or "up" in name)
        model = adapted(lora(target_modules=["q_proj", "up_proj"], fan_in_fan_out=False), lambda: base)
        table = table_of(text(), COUNTS)
        plain = copy.deepcopy(model)
        sums, batch = released(model, token_losses, table, max_grad_norm=0.1)
        parameters = [p for p in plain.parameters() if p.requires_grad]
        expected = torch.zeros_like(sums)
        for unit in range(batch.num_units):
            one = table.batch([unit], records_per_unit=9)
            gradients = torch.autograd.grad(token_losses(plain, one).sum(), parameters)
            gradient = torch.cat([g.flatten() for g in gradients]).double()
            expected += gradient * min(1.0, 0.1 / float(gradient.norm()))
    assert relative(sums, expected) <= 1e-5


# ------------------------------------------------------------------------------------- moved, merged, added afterwards


def engine(model: nn.Module, **options: Any) -> DifferentialPrivacyEngine:
    defaults = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "random": TestRandom(0)}
    return DifferentialPrivacyEngine(model, **{**defaults, **options})


def step(engine: DifferentialPrivacyEngine, optimizer: torch.optim.Optimizer, steps: int = 1) -> Batch:
    """Steps with all units in every batch; gives the last batch."""
    table = table_of(text(), COUNTS)
    for batch in engine.batches(table, expected_batch_size=table.num_units, steps=steps, records_per_unit=9):
        token_losses(engine.model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return batch


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_a_model_moved_after_attaching_is_trained_opacus_820():
    """Moved to another type, as a machine without another device can: the same parameters, other numbers."""
    torch.manual_seed(0)
    model = adapted(lora())
    private = engine(model, noise_multiplier=0.0, max_grad_norm=0.05)
    optimizer = private.attach(torch.optim.SGD(trained(model), lr=1.0))
    model.double()
    plain = copy.deepcopy(model)
    before = vector(model)
    batch = step(private, optimizer)
    moved = (before - vector(model)) * batch.num_units
    assert relative(moved, one_unit_at_a_time(plain, token_losses, batch, 0.05)) <= TOLERANCE


def test_a_move_that_makes_new_parameters_is_an_error_that_names_them_opacus_820():
    """The optimizer would hold the old ones, and the adapter would stay untrained without a word."""
    model = adapted(lora())
    private = engine(model)
    optimizer = private.attach(torch.optim.SGD(trained(model), lr=1.0))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with pytest.raises(UsageError, match=r"optimizer · does not train .*lora_A.default.weight"):
        step(private, optimizer)


def test_an_adapter_that_was_added_later_is_an_error_that_names_it():
    model: Any = adapted(lora())
    private = engine(model)
    optimizer = private.attach(torch.optim.SGD(trained(model), lr=1.0))
    with quiet():
        import peft

        model.add_adapter("other", lora()(peft))
        model.set_adapter("other")
    with pytest.raises(UsageError, match=r"optimizer · does not train .*lora_A.other.weight"):
        step(private, optimizer)


def test_the_base_is_the_same_until_the_adapter_is_merged():
    torch.manual_seed(0)
    model: Any = adapted(lora())
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    private = engine(model)
    step(private, private.attach(torch.optim.AdamW(trained(model), lr=1e-2)), steps=3)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    private.detach()
    ids = text()["input_ids"]
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    assert type(merged) is type(gpt2())
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    weight = merged.transformer.h[0].attn.c_attn.weight
    assert not torch.equal(weight, base["base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"])


def test_an_adapter_merged_while_it_is_trained_takes_no_part_in_the_loss():
    """Neither trained unprotected through the base, nor noised without a word."""
    torch.manual_seed(0)
    model: Any = adapted(lora())
    private = engine(model)
    optimizer = private.attach(torch.optim.SGD(trained(model), lr=1.0))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    before = layer.base_layer.weight.clone()
    layer.merge()
    merged = layer.base_layer.weight.clone()
    with pytest.raises(UsageError, match=r"h.0.attn.c_attn.lora_A.default.weight.* · took no part in the loss"):
        step(private, optimizer)
    assert torch.equal(layer.base_layer.weight, merged)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before)


# -------------------------------------------------------------------- three steps, saved, loaded, and used as before


def in_three_steps(model: nn.Module, loss: Any, tensors: dict[str, Tensor]) -> None:
    """With noise. What is trained changes, all else does not, bit for bit; nothing about the model is new."""
    kind, names = type(model), list(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    private = engine(model)
    optimizer = private.attach(torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert type(model) is kind
    assert list(model.state_dict()) == names
    table = table_of(tensors, COUNTS)
    for batch in private.batches(table, expected_batch_size=table.num_units, steps=3, records_per_unit=9):
        loss(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert type(model) is kind
    assert list(model.state_dict()) == names
    tied = {id(p): p.requires_grad for p in model.parameters()}
    for name, value in model.state_dict(keep_vars=True).items():
        same = torch.equal(value, before[name])
        assert same is not tied.get(id(value), False), name


def generated(model: Any) -> Tensor:
    with quiet(), torch.no_grad():
        return model.eval().generate(input_ids=text()["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)


def test_gpt2_is_trained_saved_loaded_and_generates(tmp_path):
    torch.manual_seed(0)
    model: Any = shaken(gpt2())
    expected = generated(model)
    private = engine(model)
    assert torch.equal(generated(model), expected)  # wrapping changes nothing
    private.detach()
    in_three_steps(model.train(), token_losses, text())
    with quiet():
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(generated(loaded), generated(model))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_gpt2_with_an_adapter_is_trained_saved_loaded_and_generates(tmp_path):
    with quiet():
        import peft
    torch.manual_seed(0)
    base = shaken(gpt2())
    model: Any = adapted(lora(), lambda: copy.deepcopy(base))
    in_three_steps(model.train(), token_losses, text())
    with quiet():
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)  # type: ignore[arg-type]
    assert torch.equal(generated(loaded), generated(model))


def picture_data() -> dict[str, Tensor]:
    torch.manual_seed(1)
    tensors = {"sample": floats(3, 8, 8), "encoder_hidden_states": floats(5, 12)}
    return {"timestep": torch.arange(ROWS) * 9, **{name: value.float() for name, value in tensors.items()}}


def test_a_unet_is_trained_saved_and_loaded(tmp_path):
    with quiet():
        torch.manual_seed(0)
        model: Any = unet()
        in_three_steps(model, losses, picture_data())
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**picture_data()).sample, model.eval()(**picture_data()).sample)


def test_a_unet_with_an_adapter_is_trained_saved_and_loaded(tmp_path):
    with quiet():
        from peft import LoraConfig

        torch.manual_seed(0)
        model: Any = unet().requires_grad_(False)
        model.save_pretrained(tmp_path / "base")
        model.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
        in_three_steps(model, losses, picture_data())
        model.save_lora_adapter(tmp_path / "adapter")
        loaded = type(model).from_pretrained(tmp_path / "base")
        loaded.load_lora_adapter(
            tmp_path / "adapter", prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
        )
        with torch.no_grad():
            expected = model.eval()(**picture_data()).sample
            torch.testing.assert_close(loaded.eval()(**picture_data()).sample, expected)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_gpt2_of_some_size_is_trained_saved_loaded_and_generates(adapter, tmp_path):
    """Wider layers take the other ways to a norm."""
    torch.manual_seed(0)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return of("GPT2LMHeadModel", vocab_size=2000, n_positions=128, n_embd=256, n_layer=4, n_head=4,
                  resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS)()  # fmt: skip

    model: Any = adapted(lora(), make) if adapter else make()
    tensors = {"input_ids": torch.randint(3, 2000, (ROWS, 64))}
    require_equal(copy.deepcopy(model).double(), tensors, token_losses)
    in_three_steps(model, token_losses, tensors)
    with quiet():
        import peft

        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(make(), tmp_path) if adapter else type(model).from_pretrained(tmp_path)  # type: ignore[arg-type]
    assert torch.equal(generated(loaded), generated(model))


def test_the_example_of_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[3] / "docs" / "pretrained.md"
    code, *_ = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with quiet():
        exec(compile(code, str(page), "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 20
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
