"""A ring is the window that it stands for, in memory of its own, whatever is asked of it."""

import pytest
import torch

from titans.nn import ContextAttention, Rows, Segment, SlidingAttention
from titans.nn.attention_ring import AttentionRing
from titans.nn.context_attention import SegmentRing

HIDDEN, HEADS, THETA, BATCH = 16, 2, 100.0, 3
EXACT = {"rtol": 0, "atol": 1e-12}


def sliding(window, with_prefix):
    layer = SlidingAttention(HIDDEN, HEADS, THETA, window).double().eval()
    persistent = torch.randn(3, HIDDEN, dtype=torch.float64) if with_prefix else None
    return layer, layer.initial_state(BATCH, persistent)


def tokens(length):
    return torch.randn(BATCH, length, HIDDEN, dtype=torch.float64)


def places(ring):
    return [part.data_ptr() for part in (ring.keys, ring.rotated, ring.values)]


def assert_same_window(actual, expected):
    assert actual.counts == expected.counts
    for row, count in enumerate(expected.row_counts):
        for mine, other in ((actual.keys, expected.keys), (actual.values, expected.values)):
            width = mine.shape[2]
            assert width == other.shape[2]
            mine, other = mine[row, :, width - count :], other[row, :, width - count :]
            torch.testing.assert_close(mine, other, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 5, 8])
@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize("read", [0, 1, 4, 7, 20])
def test_steps_around_the_ring_are_the_whole(window, with_prefix, read):
    """From an empty window, one that fills and a full one, several times around, where they lie."""
    layer, initial = sliding(window, with_prefix)
    x = tokens(read + 4 * window + 3)
    whole, after = layer(x, initial)
    state = layer(x[:, :read], initial)[1] if read else initial
    ring = AttentionRing.of(state, window, THETA)
    where = places(ring.ring)
    for at in range(read, x.shape[1]):
        output, ring = layer(x[:, at : at + 1], ring)
        torch.testing.assert_close(output[:, 0], whole[:, at], **EXACT)
        assert places(ring.ring) == where
    assert_same_window(ring.unrolled(), after)
    assert AttentionRing.of(ring.unrolled(), window, THETA).counts == window - 1, "full: no mask"


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[0, 3, 9], [2, 2, 1], [4, 7, 12]])
def test_rows_at_different_places(lengths):
    """One has seen nothing, one fills its window, one is full: no row waits for another."""
    window = 6
    layer, initial = sliding(window, True)
    x = tokens(30)
    whole, _ = layer(x, initial)
    first = torch.cat([x[row, :length] for row, length in enumerate(lengths)])[None]
    _, state = layer(first, initial, Rows(lengths, x.device))
    ring = AttentionRing.of(state, window, THETA)
    for step in range(17):
        at = [length + step for length in lengths]
        token = torch.stack([x[row, place] for row, place in enumerate(at)])[:, None]
        if step == 2:  # two of the rows, in another order, and as a state
            chosen = ring.select(torch.tensor([2, 0]))
            output, _ = layer(token[[2, 0]], chosen)
            torch.testing.assert_close(output[0, 0], whole[2, at[2]], **EXACT)
            torch.testing.assert_close(output[1, 0], whole[0, at[0]], **EXACT)
        output, ring = layer(token, ring)
        _, state = layer(token, state)
        for row, place in enumerate(at):
            torch.testing.assert_close(output[row, 0], whole[row, place], **EXACT)
        assert_same_window(ring.unrolled(), state)
    assert ring.unrolled().counts == window - 1


@torch.no_grad()
def test_what_is_no_step_in_place_gets_the_state():
    """Several tokens, packed rows, gradients, another dtype: as from the state; the ring stays as it is."""
    layer, initial = sliding(4, True)
    x = tokens(12)
    _, state = layer(x[:, :7], initial)
    ring = AttentionRing.of(state, 4, THETA)
    before = [part.clone() for part in (ring.ring.keys, ring.ring.rotated, ring.ring.values)]
    for piece, rows in [
        (x[:, 7:9], None),
        (x[:, 7:9].flatten(0, 1)[None], Rows([2, 2, 2], x.device)),
    ]:
        actual, expected = layer(piece, ring, rows), layer(piece, state, rows)
        torch.testing.assert_close(actual[0], expected[0], **EXACT)
        assert_same_window(actual[1], expected[1])
    with torch.enable_grad():
        output, after = layer(x[:, 7:8], ring)
        assert output.requires_grad
        assert not isinstance(after, AttentionRing)
    output, after = layer.float()(x[:, 7:8].float(), ring)
    assert not isinstance(after, AttentionRing)
    for part, old in zip((ring.ring.keys, ring.ring.rotated, ring.ring.values), before, strict=True):
        assert torch.equal(part, old)


@torch.no_grad()
@pytest.mark.parametrize("read", [2, 9])
def test_a_step_that_is_lost_can_be_taken_again(read):
    """Sessions rely on it: a forward that fails in a later block has written here, and nothing is lost."""
    layer, initial = sliding(5, True)
    x = tokens(read + 2)
    whole, _ = layer(x, initial)
    _, state = layer(x[:, :read], initial)
    ring = AttentionRing.of(state, 5, THETA)
    layer(tokens(1), ring)  # lost
    assert_same_window(ring.unrolled(), state)
    output, ring = layer(x[:, read : read + 1], ring)
    torch.testing.assert_close(output[:, 0], whole[:, read], **EXACT)
    output, _ = layer(x[:, read + 1 :], ring)
    torch.testing.assert_close(output[:, 0], whole[:, read + 1], **EXACT)


@torch.no_grad()
def test_bfloat16_is_as_good_as_without_a_ring():
    """Against float64: at most twice the error of the path that turns all keys at every step."""
    layer, _ = sliding(32, True)
    x = tokens(120).bfloat16().double()
    weights = {name: value.bfloat16().double() for name, value in layer.state_dict().items()}
    layer.load_state_dict(weights)
    persistent = torch.randn(3, HIDDEN).bfloat16()
    exact, _ = layer(x, layer.initial_state(BATCH, persistent.double()))
    layer = layer.bfloat16()
    state = layer.initial_state(BATCH, persistent)
    ring = AttentionRing.of(state, 32, THETA)
    errors = torch.zeros(2)
    for at in range(x.shape[1]):
        token = x[:, at : at + 1].bfloat16()
        by_ring, ring = layer(token, ring)
        plain, state = layer(token, state)
        errors += torch.stack([(y[:, 0] - exact[:, at]).norm() for y in (by_ring, plain)]).float()
    assert errors[0] <= 2 * errors[1]


@torch.no_grad()
def test_angles_of_a_long_decoding_are_exact():
    """The ring's numbers grow without end; ten million tokens on, distances are what they were."""
    layer, initial = sliding(4, True)
    x = tokens(9)
    rings = [AttentionRing.of(initial, 4, THETA) for _ in "ab"]
    rings[1].ring.position.add_(40_000_000)
    for at in range(9):
        (near, rings[0]), (far, rings[1]) = (layer(x[:, at : at + 1], ring) for ring in rings)
        torch.testing.assert_close(far, near, rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("offsets", [(0, 0, 0), (3, 3, 3), (0, 2, 4)])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_a_segment_as_a_ring(offsets, with_prefix):
    """MAC's segments of 5 tokens: rows that end theirs at different steps, several times around."""
    size = 5
    layer = ContextAttention(HIDDEN, HEADS, THETA).double().eval()
    prefix = layer.prefix(torch.randn(3, HIDDEN, dtype=torch.float64)) if with_prefix else None
    segment = layer.initial_segment(BATCH)
    if any(offsets):
        some = torch.randn(1, sum(offsets), 4, HEADS, HIDDEN // HEADS, dtype=torch.float64)
        segment = segment.append(some, Rows(offsets, some.device)).close(size)
    ring = SegmentRing.of(segment, prefix, size, THETA)
    where = places(ring.ring)
    rows = Rows([1] * BATCH, torch.device("cpu"))
    for step in range(3 * size + 2):
        x, h = tokens(1), tokens(1)
        entries = torch.cat([layer.entries(x), layer.entries(h)], dim=2)
        output, ring = layer.step(layer.queries(x), entries, ring)
        segment = segment.append(entries.transpose(0, 1), rows)
        expected = layer.attend(layer.queries(x).transpose(0, 1), segment, prefix, rows)
        torch.testing.assert_close(output, expected.transpose(0, 1), **EXACT)
        assert places(ring.ring) == where
        ring, segment = ring.close(size), segment.close(size)
        assert ring.offsets.tolist() == list(segment.offsets_of(BATCH)), step
        for actual, kept in [
            (ring.unrolled(), segment),
            (ring.select(torch.tensor([1, 1])), segment.select(torch.tensor([1, 1]))),
        ]:
            assert_same_segment(actual, kept)


def assert_same_segment(actual: Segment, expected: Segment) -> None:
    batch = expected.entries.shape[0]
    assert actual.offsets_of(batch) == expected.offsets_of(batch)
    for row, offset in enumerate(expected.offsets_of(batch)):
        assert torch.equal(actual.entries[row, :offset], expected.entries[row, :offset])
