"""Reading before the write, `y_t = M_{t-1}(q_t)`, against a loop that reads and then writes every token."""

from itertools import pairwise

import pytest
import torch

from titans.nn import MemoryCore, NeuralMemorySpec, Rows
from titans.nn.gates import Gates
from titans.ops import MemorySpec, MemoryState, neural_memory, read_memory

TOLERANCE = {"rtol": 0, "atol": 1e-9}
PACKED = (0, 5, 1, 0, 6, 0)  # tokens of each row; empty ones first, last and between


def build(depth=2, early=True):
    memory = MemorySpec(dim=8, depth=depth, expansion=2)
    spec = NeuralMemorySpec(hidden_size=16, memory=memory, chunk_size=4, read_before_write=early)
    layer = MemoryCore(spec).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def tokens(rows, length):
    return torch.randn(rows, length, 16, dtype=torch.float64)


def loop(layer, q, k, v, gates, memory):
    """One token after another: first the read, then the write."""
    affine = (layer.initial.norm_weight, layer.initial.norm_bias)
    reads = []
    for t in range(q.shape[1]):
        one = slice(t, t + 1)
        reads.append(read_memory(q[:, one], memory.weights, layer.spec.memory, *affine))
        memory = neural_memory(
            q[:, one],
            k[:, one],
            v[:, one],
            theta=gates.theta[:, one],
            log_decay=gates.log_decay[:, one],
            log_momentum=gates.log_momentum[:, one],
            state=memory,
            spec=layer.spec.memory,
            norm_weight=affine[0],
            norm_bias=affine[1],
            chunk_size=layer.spec.chunk_size,
            impl="reference",
        ).state
    return torch.cat(reads, dim=1) if reads else q, memory


def by_rows(layer, q, k, v, gates, memory, lengths):
    """The loop over every row of a packed stream on its own."""
    reads, memories = [], []
    for row, (start, stop) in enumerate(pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist())):
        own = [tensor[:, start:stop] for tensor in (q, k, v, *gates)]
        read, after = loop(layer, *own[:3], Gates(*own[3:]), memory.select(torch.tensor([row])))
        reads.append(read)
        memories.append(after)
    return torch.cat(reads, dim=1), MemoryState.concatenate(memories)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("before", [0, 1, 6], ids=["fresh", "after 1", "after 6"])
@pytest.mark.parametrize("lengths", [None, PACKED, (1,) * 6], ids=["dense", "packed", "steps"])
def test_reads_states_and_gradients_are_those_of_a_loop(lengths, before, depth):
    """Also of a state that has read before; the last token's early read must leave no gradient behind."""
    layer = build(depth)
    rows = None if lengths is None else Rows(lengths, torch.device("cpu"))
    count = 3 if lengths is None else len(lengths)
    past = tokens(count, before)
    x = (tokens(count, 11) if lengths is None else tokens(1, rows.total)).requires_grad_()

    def run(write):
        state = layer.initial_state(count)
        if before:
            _, state = layer.retrieve(past, state)
        (q, k, v), state = layer.project_write(x, state, rows)
        output, memory = write(q, k, v, layer.gates(x), state)
        generator = torch.Generator().manual_seed(0)
        loss = sum(
            (torch.randn(part.shape, generator=generator, dtype=part.dtype) * part).sum()
            for part in (output, *memory.weights)
        )
        return output, memory, torch.autograd.grad(loss, [x, *layer.parameters()])

    def early(q, k, v, gates, state):
        output, after = layer.write(q, k, v, gates, state, rows)
        return output, after.memory

    def plain(q, k, v, gates, state):
        if lengths is None:
            return loop(layer, q, k, v, gates, state.memory)
        return by_rows(layer, q, k, v, gates, state.memory, lengths)

    (output, memory, grads), (expected, after, expected_grads) = run(early), run(plain)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    for name in ("weights", "momentum", "anchor"):
        for got, other in zip(getattr(memory, name), getattr(after, name), strict=True):
            torch.testing.assert_close(got, other, **TOLERANCE)
    assert torch.equal(memory.position, after.position)
    for got, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-8, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1] * 13, [1, 3, 4, 5], [4, 4, 5], [12, 1]])
def test_pieces_are_one_call(lengths):
    layer, x = build(), tokens(2, 13)
    expected, after = layer.retrieve(x)
    state, outputs = None, []
    for piece in x.split(lengths, dim=1):
        output, state = layer.retrieve(piece, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **TOLERANCE)
    for got, other in zip(state.memory.weights, after.memory.weights, strict=True):
        torch.testing.assert_close(got, other, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("t", [0, 3, 4, 9])
def test_a_token_never_reads_its_own_write(early, t):
    """Another key and value change the reads after the token; its own only where it reads after the write."""
    layer, x = build(early=early), tokens(2, 11)
    (q, k, v), state = layer.project_write(x, layer.initial_state(2))
    gates = layer.gates(x)
    before, _ = layer.write(q, k, v, gates, state)
    k, v = k.clone(), v.clone()
    k[:, t], v[:, t] = k[:, t].flip(-1), v[:, t] + 1
    after, _ = layer.write(q, k, v, gates, state)
    change = (after - before).abs().amax((0, 2, 3))
    assert torch.equal(change > 1e-9, torch.arange(11) >= (t + 1 if early else t))


@torch.no_grad()
@pytest.mark.parametrize("early", [True, False])
def test_the_first_token_of_a_stream_recalls_the_initial_memory(early):
    layer, x = build(early=early), tokens(1, 1)
    (q, _, _), state = layer.project_write(x, layer.initial_state(1))
    read, _ = layer.retrieve(x)
    assert torch.equal(read, layer.read(q, state.memory.weights)) == early
