"""Save, load, cast: what comes back computes the same, and what must not be rounded is not."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from titans.models import TitansConfig, TitansForCausalLM, TitansModel

FULL_PRECISION = ("memory.gates.", "memory.initial.")

# Rounding errors of one kernel, as large as two randomised blocks make them.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float64: 1e-11}


def kept(model):
    """The parameters that stay in fp32."""
    return {name: p for name, p in model.named_parameters() if any(part in name for part in FULL_PRECISION)}


def relative_error(got, expected):
    return (got - expected).double().norm() / expected.double().norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_model_answers_as_the_saved_one(variant, build, tokens, tmp_path, dtype):
    """Nothing is initialised again, nothing is rounded, the Auto classes know where to go.

    Logits may differ in their last bits: loaded weights lie elsewhere in memory, and kernels add in an order
    that depends on the alignment.
    """
    model, ids = build(variant).to(dtype), tokens(2, 20)
    model.save_pretrained(tmp_path)
    for dtype_argument in (dtype, "auto"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype_argument)
        assert type(loaded) is TitansForCausalLM
        assert not loaded.training
        for (name, saved), (_, read) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
            assert saved.dtype == read.dtype, name
            assert torch.equal(saved, read), name
        assert relative_error(loaded(ids).logits, model(ids).logits) < ROUNDING[dtype]
    base = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(base) is TitansModel
    hidden = model.model(ids).last_hidden_state
    assert relative_error(base(ids).last_hidden_state, hidden) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_and_initial_memory_stay_fp32(variant, build, tmp_path, dtype):
    """Bit for bit, whether the model is cast, or saved in fp32 and loaded in half precision."""
    model = build(variant).float()
    expected = {name: p.detach().clone() for name, p in kept(model).items()}
    assert bool(expected) == (variant != "attention")
    model.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for cast in (model.to(dtype), loaded, loaded.half(), loaded.bfloat16()):
        assert cast.lm_head.weight.dtype in (torch.float16, torch.bfloat16)
        for name, parameter in kept(cast).items():
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, expected[name]), name


@torch.no_grad()
def test_double_computes_everything_in_fp64(variant, build, tokens):
    """A gate, a norm or an angle left in fp32 would show as an error of 1e-8."""
    model, ids = build(variant), tokens(1, 20)
    out = model(ids, labels=ids, use_cache=True)
    assert out.loss.dtype == torch.float64
    nudged = model(inputs_embeds=model.model.embed_tokens(ids) * (1 + 1e-12)).logits
    change = (nudged - out.logits).abs().max()
    assert 0 < change < 1e-8


@torch.no_grad()
def test_bf16_is_close_to_fp32(variant, build, tokens):
    """Half precision rounds; it must not overflow or take another path."""
    model, ids = build(variant).float(), tokens(2, 20)
    exact = model(ids).logits
    half = model.bfloat16()(ids).logits
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.15


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_are_stored_once_and_tied_again(build, tmp_path, tie):
    model = build("mac", tie_word_embeddings=tie)
    model.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path)
    for one in (model, loaded):
        assert (one.lm_head.weight is one.model.embed_tokens.weight) == tie


def test_a_model_on_the_meta_device_loads(variant, build, tokens, tmp_path):
    """The way of large models: a skeleton without memory, then the weights, and nothing left to fill in."""
    model, ids = build(variant), tokens(1, 9)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = TitansForCausalLM(AutoConfig.from_pretrained(tmp_path))
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert not list(skeleton.buffers())
    with torch.no_grad():
        assert torch.equal(skeleton.eval()(ids).logits, model(ids).logits)


def test_a_checkpoint_without_a_weight_gets_it_initialised(fresh, tmp_path):
    """Only what is missing is drawn anew; the rest is as it was saved."""
    model = fresh("lmm")
    missing = "model.layers.0.mixer.memory.initial.weight_0"
    state = {name: value for name, value in model.state_dict().items() if name != missing}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = TitansForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {missing}
    for name, parameter in loaded.named_parameters():
        if name != missing:
            assert torch.equal(parameter, model.get_parameter(name)), name
    drawn = loaded.get_parameter(missing)
    assert drawn.isfinite().all()
    assert 0.7 < drawn.std() < 1.4


def test_the_configuration_comes_back(tmp_path):
    switches = {"memory_forget_per_channel": True, "memory_read_before_write": True}
    config = TitansConfig.named(
        "tiny", variant="mag", vocab_size=300, window_size=32, memory_depth=3, **switches
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TitansConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.variant, loaded.window_size, loaded.memory_depth) == ("mag", 32, 3)
    assert loaded.memory_spec == config.memory_spec
    assert loaded.memory_spec.gates.forget_per_channel
    assert loaded.memory_spec.read_before_write
    plain = TitansConfig.named("tiny", variant="mag").memory_spec
    assert not plain.gates.forget_per_channel
    assert not plain.read_before_write
