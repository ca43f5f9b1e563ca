"""Loss, gradients and the inputs that training gives."""

import pytest
import torch
import torch.nn.functional as F

from titans.models import VARIANTS, TitansConfig, TitansForCausalLM


def test_labels_are_shifted_inside_and_ignored_at_minus_100(build, tokens):
    model, ids = build("mac"), tokens(2, 12)
    labels = ids.clone()
    labels[0, 5:8] = -100
    out = model(ids, labels=labels)
    nats = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        2, -1
    )
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(out.loss, nats[counted].mean())
    divided = model(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(divided, nats[counted].sum() / 40)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(variant, build, tokens, reentrant):
    model, ids = build(variant).train(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for got, expected in zip(gradients(), plain, strict=True):
        assert torch.equal(got, expected)
    assert model(ids, use_cache=True).past_key_values is None, "a cache would be filled twice"


def test_training_makes_no_cache_unless_asked(build, tokens):
    model, ids = build("lmm"), tokens(1, 5)
    assert model(ids).past_key_values is not None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None


def test_logits_to_keep(build, tokens):
    model, ids = build("mag"), tokens(2, 9)
    logits = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    index = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=index).logits, logits[:, index])


def test_hidden_states_of_a_padded_batch_have_its_shape(build, tokens):
    model, ids = build("mac"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert [tuple(each.shape) for each in hidden] == [(2, 9, 16)] * 3


def test_embeddings_can_stand_for_tokens(variant, build, tokens):
    model, ids = build(variant), tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_few_steps_learn_a_repeated_text(variant, autocast):
    """Loss falls from ln 32 to under half in 40 steps of 2 rows, and no gradient is ever infinite or NaN."""
    torch.manual_seed(0)
    config = TitansConfig.named(
        "tiny",
        variant=variant,
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = TitansForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    text = torch.randint(0, 32, (1, 48)).repeat(2, 2)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(text, labels=text).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        assert norm > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(3.47, abs=0.8)
    assert losses[-1] < losses[0] / 2, losses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token, got T = 0"),
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"attention_mask": torch.ones(2, 9)}, r"must have shape \[B, T\] = \[1, 9\]"),
        ({"attention_mask": torch.ones(1, 8)}, r"must have shape \[B, T\] = \[1, 9\]"),
        ({"attention_mask": torch.ones(1, 1, 9, 9)}, r"got \[1, 1, 9, 9\]"),
        ({"attention_mask": torch.zeros(1, 9)}, "at least one 1"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}, "rise from 0 to the number of tokens, 9"),
        ({"cu_seqlens": torch.tensor([0, 7, 5, 9], dtype=torch.int32)}, "smallest step -2"),
        ({"labels": torch.zeros(1, 8, dtype=torch.long)}, r"labels must have shape \[1, 9\], got \[1, 8\]"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(build, tokens, arguments, message):
    if arguments and "input_ids" not in arguments:
        arguments = {"input_ids": tokens(1, 9), **arguments}
    with pytest.raises(ValueError, match=message):
        build("mac")(**arguments)


def test_packed_documents_need_one_row_and_no_mask(build, tokens):
    model, ids, bounds = build("mac"), tokens(2, 9), torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"packed input_ids \[1, total\], got 2 rows"):
        model(ids, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="either attention_mask or cu_seqlens"):
        model(ids[:1], cu_seqlens=bounds, attention_mask=torch.ones(1, 9))


def test_arguments_that_would_be_ignored_are_refused(build, tokens):
    """Documents packed by position_ids, as other models take them, would leak into one another unseen."""
    model, ids = build("mac"), tokens(1, 9)
    with pytest.raises(TypeError, match="Packed documents need cu_seqlens"):
        model(ids, position_ids=torch.arange(9)[None])
    with pytest.raises(TypeError, match="no argument named attention_masks"):
        model(ids, attention_masks=torch.ones(1, 9))
