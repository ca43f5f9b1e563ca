"""`generate` on the cache: the same tokens and logits as full forward passes without one."""

import pytest
import torch
from transformers import DynamicCache

from titans.data.tokenizer import byte_tokenizer
from titans.models import TitansCache

NEW = 11


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 6, 7, 8, 9, 16, 17, 25])
def test_greedy_decoding_is_the_full_forward(variant, build, tokens, prompt):
    """Prompts end before, at and after the ends of chunks (4), windows (6) and segments (8)."""
    model, ids = build(variant), tokens(2, prompt)
    out = model.generate(
        ids,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert isinstance(out.past_key_values, TitansCache)
    full = model(out.sequences).logits
    expected = full[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected.float(), rtol=0, atol=1e-5)
    assert torch.equal(out.sequences[:, prompt:], expected.argmax(-1))


def left_padded(ids, pad=5):
    """The batch with `pad` columns of padding before its second row, and its mask."""
    padded = torch.cat([ids[:, :pad], ids], dim=1)
    mask = torch.ones_like(padded)
    padded[1, :pad], mask[1, :pad] = 2, 0
    return padded, mask


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
        {"do_sample": False, "prefill_chunk_size": 6},
    ],
    ids=["greedy", "beams", "two-of-two-beams", "prefill-in-chunks"],
)
def test_a_left_padded_row_generates_what_it_would_alone(variant, build, tokens, how):
    """Also beam search: a beam that moves takes its memory, tails, windows and segments with it."""
    model, ids = build(variant), tokens(2, 9)
    padded, mask = left_padded(ids)
    returned = how.get("num_return_sequences", 1)
    batch = model.generate(padded, attention_mask=mask, max_new_tokens=NEW, **how)
    alone = model.generate(ids[1:], max_new_tokens=NEW, **how)
    new = batch[returned:, padded.shape[1] :]
    width = min(new.shape[1], alone.shape[1] - 9)  # the batch may be padded by a longer first row
    assert torch.equal(new[:, :width], alone[:, 9 : 9 + width])
    assert (new[:, width:] == 2).all()
    without = {name: value for name, value in how.items() if name != "prefill_chunk_size"}
    uncached = model.generate(padded, attention_mask=mask, max_new_tokens=NEW, use_cache=False, **without)
    assert torch.equal(batch, uncached)


@torch.no_grad()
def test_sampling_draws_from_the_same_distribution(variant, build, tokens):
    model, (ids, mask) = build(variant), left_padded(tokens(2, 9))
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        draws.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, top_k=0, use_cache=use_cache
            )
        )
    assert torch.equal(*draws)


@torch.no_grad()
def test_generation_goes_on_from_a_cache(variant, build, tokens):
    """A conversation: the second call reads the new tokens alone."""
    model, ids = build(variant), tokens(1, 20)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    cache = model(ids[:, :13], use_cache=True).past_key_values
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))


@torch.no_grad()
def test_two_calls_are_one(variant, build, tokens):
    """The cache that a call hands back, and the whole text so far with its mask: only what is new is read."""
    model, (ids, mask) = build(variant), left_padded(tokens(2, 9))
    options = {"do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
    first = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True, **options
    )
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    second = model.generate(
        first.sequences,
        attention_mask=torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], dim=1),
        past_key_values=first.past_key_values,
        max_new_tokens=NEW - 5,
        **options,
    )
    hook.remove()
    assert torch.equal(second, whole)
    assert set(read) == {1}  # the last token of the first call, which nobody had read, and the new ones


@torch.no_grad()
def test_reordering_moves_rows_and_leaves_the_old_states_alone(variant, build, tokens):
    """States are replaced, never changed in place: a beam that is dropped must not spoil its siblings."""
    model, ids, piece = build(variant), tokens(3, 11), tokens(1, 4, seed=5)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0  # three tokens: its window is not full, and its segment stands elsewhere
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    expected = model(piece.expand(3, -1), past_key_values=copy_of(cache)).logits
    moved = copy_of(cache)
    moved.reorder_cache(torch.tensor([2, 1, 1, 0]))
    logits = model(piece.expand(4, -1), past_key_values=moved).logits
    torch.testing.assert_close(logits, expected[[2, 1, 1, 0]], rtol=0, atol=1e-9)
    again = model(piece.expand(3, -1), past_key_values=copy_of(cache)).logits
    assert torch.equal(again, expected)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([2, 3]))
    torch.testing.assert_close(
        model(piece.expand(2, -1), past_key_values=cache).logits, expected[[1, 1]], rtol=0, atol=1e-9
    )


def copy_of(cache):
    """Another cache object on the very same states."""
    return cache.detach()


@torch.no_grad()
def test_reset_starts_from_the_learned_memory(variant, build, tokens):
    model, ids = build(variant), tokens(1, 9)
    cache = model(ids, use_cache=True).past_key_values
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.parametrize("assistance", ["model", "lookup"])
def test_assisted_decoding_is_refused(variant, build, tokens, assistance):
    """It would need to take tokens back, which a memory cannot."""
    model, ids = build(variant), tokens(1, 9)
    extra = {"assistant_model": model} if assistance == "model" else {"prompt_lookup_num_tokens": 3}
    with pytest.raises(ValueError, match="not supported with stateful models, such as TitansForCausalLM"):
        model.generate(ids, max_new_tokens=4, **extra)


def test_a_cache_cannot_be_cropped():
    with pytest.raises(ValueError, match="a memory that has read a token cannot unread it"):
        TitansCache().crop(1)


@torch.no_grad()
def test_a_cache_that_does_not_fit_is_refused(build, tokens):
    model, ids = build("mac"), tokens(2, 5)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="must hold 2 blocks of 1 rows, got 2 blocks of 2 rows"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"must be a TitansCache .* got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="of variant 'lmm', got one from 'mac'"):
        build("lmm")(ids, past_key_values=cache)


def test_stop_strings(fresh):
    """transformers hands the model the tokenizer that they need, as an argument of its forward."""
    tokenizer = byte_tokenizer()
    model = fresh("lmm", vocab_size=len(tokenizer)).eval()
    prompt = tokenizer("A prompt", return_tensors="pt").input_ids
    plain = model.generate(prompt, max_new_tokens=30, min_new_tokens=30, do_sample=False)[0]
    start = prompt.shape[1]
    letters = [start + i for i, token in enumerate(plain[start:].tolist()) if 48 <= token < 123]
    first = next(place for place in letters if plain[place] not in prompt)
    stopped = model.generate(
        prompt,
        max_new_tokens=30,
        do_sample=False,
        stop_strings=[chr(plain[first])],
        tokenizer=tokenizer,
    )
    assert torch.equal(stopped[0], plain[: first + 1])
