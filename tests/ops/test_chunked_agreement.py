"""The second rung of the ladder: chunked against the token loop, outputs, final state and every gradient.

Float64 and 1e-9 relative. Every case starts in the middle of a stream (momentum, an anchor of its own,
a random position in each row), because a wrong carry hides behind zeros.
"""

import itertools

import pytest
import torch

from titans.ops import MemorySpec
from titans.testing import assert_agreement, evaluate, random_inputs

LINEAR = MemorySpec(dim=16, depth=1)
MLP = MemorySpec(dim=16, depth=2, expansion=2)


def check(spec, **options):
    inputs = random_inputs(spec, **options)
    assert_agreement(evaluate(inputs, "chunked"), evaluate(inputs, "reference"))


@pytest.mark.parametrize("expansion", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_depths_and_expansions(depth, expansion):
    """Each layer of the memory has its own adjoint; an error in the middle one needs depth 3 to show."""
    check(MemorySpec(dim=16, depth=depth, expansion=expansion), tokens=21, chunk_size=8)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_residual_and_norm_switches(depth, norm, residual):
    check(MemorySpec(dim=8, depth=depth, residual=residual, norm=norm), tokens=21, chunk_size=8)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations(activation):
    """Second derivatives of the activation enter the gradient of the gradient."""
    check(MemorySpec(dim=8, depth=3, expansion=2, activation=activation), tokens=21, chunk_size=8)


GATES = list(itertools.product(["head", "layer"], ["head", "layer", "channel"], [None, "head", "layer"]))


@pytest.mark.parametrize(("theta", "decay", "momentum"), GATES)
def test_every_gate_has_its_own_shape(theta, decay, momentum):
    """One gate per head, per memory layer or per output channel, each independently of the others."""
    check(
        MemorySpec(dim=8, depth=2, expansion=2),
        tokens=21,
        chunk_size=8,
        theta=theta,
        decay=decay,
        momentum=momentum,
    )


@pytest.mark.parametrize("momentum", [None, "layer"])
def test_channel_decay_of_the_linear_memory(momentum):
    check(LINEAR, tokens=21, chunk_size=8, decay="channel", momentum=momentum)


@pytest.mark.parametrize("norm_affine", [False, True])
def test_norm_without_gain_and_bias(norm_affine):
    check(MLP, tokens=21, chunk_size=8, norm_affine=norm_affine)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 65])
@pytest.mark.parametrize("spec", [LINEAR, MLP], ids=["linear", "mlp"])
def test_lengths_and_chunk_sizes(spec, tokens, chunk_size):
    check(spec, tokens=tokens, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [4, 16])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("offset", ["C-1", "C", "C+1", "2C-1", "2C"])
@pytest.mark.parametrize("spec", [LINEAR, MLP], ids=["linear", "mlp"])
def test_lengths_around_chunk_boundaries(spec, offset, position, chunk_size):
    tokens = {"C": chunk_size, "2C": 2 * chunk_size}[offset[: offset.index("C") + 1]]
    tokens += int(offset[offset.index("C") + 1 :] or 0)
    check(spec, tokens=tokens, chunk_size=chunk_size, position=[position, position])


@pytest.mark.parametrize("tokens", [1, 3, 4, 12])
def test_rows_at_every_position_of_a_chunk(tokens):
    """Rows whose chunks end at different tokens, among them rows whose piece ends inside its first chunk."""
    positions = list(range(4))
    check(MLP, batch=4, tokens=tokens, chunk_size=4, position=positions)
    check(LINEAR, batch=4, tokens=tokens, chunk_size=4, position=positions)


@pytest.mark.parametrize("dim", [1, 5, 32, 64])
def test_head_widths(dim):
    norm = dim > 1  # layer norm of one number is zero, and so is everything after it
    check(MemorySpec(dim=dim, depth=2, expansion=1, norm=norm), tokens=20, heads=1)
    check(MemorySpec(dim=dim, depth=1), tokens=20, heads=1)


@pytest.mark.parametrize(
    "documents",
    [
        [7],
        [1, 1, 1],
        [5, 0, 1, 13, 0],
        [0, 0, 9],
        [4, 8, 3, 1],
        [33, 2],
        [3, 70, 0, 37, 91, 32],
    ],
    ids=str,
)
@pytest.mark.parametrize("spec", [LINEAR, MLP], ids=["linear", "mlp"])
def test_packed_documents(spec, documents):
    """Empty and one-token documents among others, each row at its own position in its chunk."""
    check(spec, documents=documents, chunk_size=4)


@pytest.mark.parametrize("decay", ["layer", "channel"])
@pytest.mark.parametrize("momentum", [None, "layer"])
def test_packed_documents_with_every_gate_shape(decay, momentum):
    """Tuples and a missing gate take their own way through packing."""
    check(MLP, documents=[5, 0, 1, 9], chunk_size=4, theta="layer", decay=decay, momentum=momentum)


def test_packed_documents_at_position_zero():
    check(MLP, documents=[5, 0, 8, 1], chunk_size=4, position=[0, 0, 0, 0])


def test_a_thousand_tokens():
    """63 chunks: errors that grow with length, and checkpoints further apart than one chunk."""
    calm = {"batch": 1, "heads": 1, "tokens": 1000, "forget": 0.002}
    check(MemorySpec(dim=16, depth=2, expansion=1), **calm)
    check(LINEAR, **calm, position=[5])


def test_auto_is_chunked_on_the_cpu():
    inputs = random_inputs(MLP, tokens=9)
    assert torch.equal(inputs.run("auto").output, inputs.run("chunked").output)
