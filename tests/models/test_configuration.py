"""Sizes that are what their names say, and clear words for those that cannot be built."""

import pytest
import torch

from titans.models import SIZES, VARIANTS, TitansConfig, TitansForCausalLM

# Parameters in millions, 32,000 tied tokens.
NOMINAL = {"170m": 170, "340m": 340, "400m": 400, "760m": 760, "1.3b": 1300}


@pytest.mark.parametrize("size", NOMINAL)
def test_named_sizes_have_as_many_parameters_as_they_say(size):
    """Within 1 % in every variant: comparisons at one size are at equal parameters."""
    for variant in VARIANTS:
        with torch.device("meta"):
            model = TitansForCausalLM(TitansConfig.named(size, variant=variant))
        assert model.num_parameters() == pytest.approx(NOMINAL[size] * 1e6, rel=0.01), variant


def test_tiny_is_a_byte_model_of_one_to_two_million():
    for variant in VARIANTS:
        model = TitansForCausalLM(TitansConfig.named("tiny", variant=variant, vocab_size=259))
        assert 0.8e6 < model.num_parameters() < 2e6


def test_every_size_has_a_nominal_count_or_is_tiny():
    assert set(SIZES) == {"tiny", *NOMINAL}


def test_overrides_win():
    config = TitansConfig.named("tiny", variant="lmm", hidden_size=64, segment_size=32, intermediate_size=100)
    assert (config.variant, config.hidden_size, config.segment_size, config.intermediate_size) == (
        "lmm",
        64,
        32,
        100,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "magg"}, "unknown variant 'magg': did you mean 'mag'"),
        ({"chunk_size": 24}, r"segment_size \(64\) must be a multiple of chunk_size \(24\)"),
        ({"memory_head_dim": 48}, r"hidden_size \(128\) must be a multiple of memory_head_dim \(48\)"),
        (
            {"num_attention_heads": 3},
            r"hidden_size \(128\) must be an even multiple of num_attention_heads \(3\)",
        ),
        ({"num_attention_heads": 128}, "even multiple"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
        ({"hidden_size": 128.0}, "hidden_size must be an integer of at least 1, got 128.0"),
        ({"num_persistent_tokens": -1}, "num_persistent_tokens must be an integer of at least 0, got -1"),
        ({"variant": "mal", "window_size": None}, "window_size must be an integer for variant 'mal'"),
        ({"memory_depth": 9}, "depth must be at most 4, got 9"),
        ({"memory_activation": "relu"}, "activation must be one of .* got 'relu'"),
        ({"memory_forget_gate": "channel"}, "forget must be one of .* got 'channel'"),
        (
            {"memory_forget_gate": "none", "memory_forget_per_channel": True},
            "forget_per_channel must be False with forget='none', got True",
        ),
        ({"memory_step_gate": "soft"}, "step must be one of .* got 'soft'"),
        ({"memory_momentum_init": 1.0}, "momentum_init must lie between 0 and 1, got 1.0"),
        ({"memory_step_init": 0.0}, "step_init must lie between 0 and 1, got 0.0"),
        ({"memory_max_step": 0.0}, "max_step must be positive, got 0.0"),
        ({"memory_gates_from": "x"}, "memory_gates_from must be 'token' or 'attention', got 'x'"),
        ({"memory_gates_from": "attention"}, "memory_gates_from must be 'token' for variant 'mac'"),
        ({"memory_input": "y"}, "memory_input must be 'token' or 'attention', got 'y'"),
        ({"variant": "mag", "memory_input": "token"}, "memory_input must be 'attention' for variant 'mag'"),
        ({"variant": "lmm", "memory_from_layer": 1}, "memory_from_layer must be 0 for variant 'lmm'"),
        ({"memory_from_layer": 4}, r"memory_from_layer \(4\) must be less than num_hidden_layers \(4\)"),
        ({"memory_from_layer": -1}, "memory_from_layer must be an integer of at least 0, got -1"),
        ({"memory_from_layer": 1, "window_size": None}, "window_size must be an integer"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TitansConfig.named("tiny", **fields)


def test_an_unknown_size_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown model size '340M': did you mean '340m'"):
        TitansConfig.named("340M")


def test_the_baseline_may_attend_to_everything():
    assert TitansConfig.named("tiny", variant="attention", window_size=None).window_size is None


def test_the_initial_scale_follows_the_width():
    """0.02 is right at a width of 2,500; a tiny mac hardly learns with it."""
    config = TitansConfig.named("tiny")
    assert config.initializer_range == 128**-0.5
    assert TitansForCausalLM(config).lm_head.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert TitansConfig.named("tiny", initializer_range=0.02).initializer_range == 0.02
