"""The loss by position must be that of one forward pass, however the stream is cut."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.training.tiny import tiny_model
from titans.data.tokenizer import byte_tokenizer
from titans.errors import UserError
from titans.evaluation.stream_loss import as_stream, powers_of_two, stream_loss
from titans.models import TitansConfig, TitansForCausalLM


@pytest.fixture(scope="module")
def model() -> TitansForCausalLM:
    torch.manual_seed(0)
    config = TitansConfig.named(
        "tiny",
        variant="mac",
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        memory_head_dim=16,
        memory_expansion=1,
        chunk_size=4,
        segment_size=8,
    )
    return TitansForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (101,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("piece", [1, 7, 16, 1000])
def test_pieces_give_the_loss_of_one_forward_pass(model, tokens, piece):
    """Also that the prediction across a cut, and across a bucket's edge, is counted once."""
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    result = stream_loss(model, tokens, piece=piece, edges=[10, 50])
    assert [(bucket.start, bucket.stop, bucket.tokens) for bucket in result.buckets] == [
        (0, 10, 9),
        (10, 50, 40),
        (50, 101, 51),
    ]
    # losses[i] is that of the token at position i + 1.
    for bucket, expected in zip(result.buckets, [losses[:9], losses[9:49], losses[49:]], strict=True):
        assert bucket.loss == pytest.approx(expected.mean().item(), rel=1e-4)
    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-4)
    assert result.tokens == 101


def test_a_bucket_of_the_first_token_alone_predicts_nothing(model, tokens):
    result = stream_loss(model, tokens[:9], edges=[1])
    assert [(bucket.start, bucket.tokens) for bucket in result.buckets] == [(1, 8)]


def test_it_works_with_a_model_of_another_library(tokens):
    """Any cache that continues will do: the baseline is measured by the same code."""
    other = tiny_model().eval()
    whole = stream_loss(other, tokens, piece=1000)
    assert stream_loss(other, tokens, piece=9).loss == pytest.approx(whole.loss, rel=1e-5)


def test_powers_of_two_lie_below_the_length():
    assert powers_of_two(1000, 256) == [256, 512]
    assert powers_of_two(1024, 256) == [256, 512]
    assert powers_of_two(1025, 256) == [256, 512, 1024]
    assert powers_of_two(100, 256) == []


def test_the_stream_of_several_texts_has_one_start():
    assert as_stream(byte_tokenizer(), ["ab", "c"]).tolist() == [256, 97, 98, 99]


@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        (torch.tensor([5]), {}, "at least 2 tokens, got shape"),
        (torch.zeros(2, 8, dtype=torch.int64), {}, "expected one sequence"),
        (torch.tensor([1, 259]), {}, r"ids from 0 to 258 \(the model's vocabulary\), got 1 to 259"),
        (torch.tensor([1, -1]), {}, "got -1 to 1"),
        (torch.tensor([1, 2]), {"piece": 0}, "piece: expected at least 1"),
        (torch.tensor([1, 2]), {"edges": [4, 2]}, "edges: expected ascending"),
    ],
)
def test_bad_input_is_named(model, bad, options, message):
    with pytest.raises(UserError, match=message):
        stream_loss(model, bad, **options)


def test_weights_that_are_not_finite_are_noticed(tokens):
    broken = tiny_model().eval()
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(UserError, match="loss is not finite"):
        stream_loss(broken, tokens)
