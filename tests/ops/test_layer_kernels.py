"""The kernels around the memory against plain PyTorch: values, gradients, odd sizes, one graph."""

import pytest
import torch
import torch.nn.functional as F

from titans.nn import RMSNorm, ShortConv, l2_normalize
from titans.testing import relative_error

pytest.importorskip("triton")
from titans.ops.kernels.layer import conv_silu, norm_gate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32 differs by the order of sums; fp16 by the rounding of results to 11 bits (2.4e-4 on average).
ALLOWED = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # no bf16 in the interpreter

# B, T, H, D. Blocks hold 64 tokens in the backward and 2048 channels x tokens in the forward.
SIZES = {
    "one token": (2, 1, 2, 16),
    "shorter than the window": (3, 2, 2, 16),
    "no tokens": (2, 0, 2, 16),
    "three blocks, D and H no powers of two": (2, 131, 3, 20),
    "exactly one block": (1, 64, 2, 64),
    "more heads than a block holds": (1, 9, 5, 128),
}


def plain_conv(x, tail, weight, heads, unit):
    conv = ShortConv(x.shape[-1], weight.shape[-1])
    y, _ = torch.func.functional_call(conv, {"weight": weight}, (x, tail))
    y = F.silu(y).unflatten(-1, (heads, -1))
    return l2_normalize(y) if unit else y


def plain_norm_gate(x, gain, gate, eps):
    norm = RMSNorm(x.shape[-1], eps, heads=x.shape[-2])
    return torch.func.functional_call(norm, {"weight": gain}, x).flatten(2) * F.silu(gate)


def draw(*shape, dtype=torch.float32):
    """Half-precision numbers are drawn as such: both sides start from the same."""
    return torch.randn(*shape).to(dtype).to(DEVICE).requires_grad_()


def conv_arguments(size, dtype=torch.float32, width=4):
    B, T, H, D = size
    C = H * D
    return draw(B, T, C, dtype=dtype), draw(B, width - 1, C, dtype=dtype), draw(C, width, dtype=dtype)


def norm_gate_arguments(size, dtype=torch.float32):
    B, T, H, D = size
    return draw(B, T, H, D, dtype=dtype), draw(H, D, dtype=dtype), draw(B, T, H * D, dtype=dtype)


def assert_agree(fused, plain, tensors, *settings):
    """The result and the gradients of every tensor, against the plain code in fp32 on the same numbers."""
    dtype = tensors[0].dtype
    found = _with_gradients(fused, tensors, settings)
    wide = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = _with_gradients(plain, wide, settings)
    for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert actual.shape == wanted.shape
        assert actual.dtype == dtype
        if wanted.numel():
            assert relative_error(actual, wanted) < ALLOWED[dtype], f"tensor {index}"


def _with_gradients(function, tensors, settings):
    result = function(*tensors, *settings)
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    return result, *torch.autograd.grad(result, tensors, cotangent)


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "free"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_convolution_agrees(size, unit):
    """The result and the gradients of x, tail and weight."""
    assert_agree(conv_silu, plain_conv, conv_arguments(size), size[2], unit)


@pytest.mark.parametrize("width", [2, 3, 6, 8])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_wider_and_narrower_convolutions_agree(size, width):
    assert_agree(conv_silu, plain_conv, conv_arguments(size, width=width), size[2], True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_wide_convolution_agrees_in_half_precision(dtype):
    for unit in (True, False):
        assert_agree(conv_silu, plain_conv, conv_arguments((2, 70, 3, 20), dtype, width=6), 3, unit)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_norm_and_gate_agree(size):
    assert_agree(norm_gate, plain_norm_gate, norm_gate_arguments(size), 1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_agrees(dtype):
    size = (2, 70, 3, 20)
    assert_agree(conv_silu, plain_conv, conv_arguments(size, dtype), 3, True)
    assert_agree(conv_silu, plain_conv, conv_arguments(size, dtype), 3, False)
    assert_agree(norm_gate, plain_norm_gate, norm_gate_arguments(size, dtype), 1e-6)


def test_mixed_dtypes_of_autocast():
    """Half-precision streams, fp32 parameters: results and gradients have the dtypes of their tensors."""
    x, tail, _ = conv_arguments((2, 5, 2, 16), torch.float16)
    weight = draw(32, 4)
    y = conv_silu(x, tail.float(), weight, 2, True)
    assert y.dtype == torch.float16
    gain = draw(2, 16)
    out = norm_gate(y, gain, draw(2, 5, 32), 1e-6)
    assert out.dtype == torch.float32
    grads = torch.autograd.grad(out.sum(), [x, tail, weight, gain])
    assert [grad.dtype for grad in grads] == [torch.float16, torch.float16, torch.float32, torch.float32]


def test_strided_inputs_agree():
    """Slices of a joint projection and a transposed output, whose rows are not contiguous."""
    both, tail, weight = draw(2, 9, 2, 64), draw(2, 3, 32), draw(4, 32)
    memory, gain, gate = draw(2, 2, 9, 16), draw(2, 16), draw(2, 9, 64)

    def conv(function, both, tail, weight):
        return function(both[:, :, 1, ::2], tail.expand(2, -1, -1), weight.T, 2, True)

    def out(function, memory, gain, gate):
        return function(memory.transpose(1, 2), gain, gate[..., 32:], 1e-6)

    assert_agree(lambda *a: conv(conv_silu, *a), lambda *a: conv(plain_conv, *a), (both, tail, weight))
    assert_agree(lambda *a: out(norm_gate, *a), lambda *a: out(plain_norm_gate, *a), (memory, gain, gate))


@pytest.mark.parametrize("width", [4, 6])
def test_cuts_change_nothing(width):
    """A stream in pieces, each with what came before it as its tail: the same bits."""
    x, tail, weight = (tensor.detach() for tensor in conv_arguments((2, 12, 2, 16), width=width))
    whole = conv_silu(x, tail, weight, 2, True)
    pieces = []
    for piece in x.split([1, 2, 0, 9], dim=1):
        pieces.append(conv_silu(piece, tail, weight, 2, True))
        tail = torch.cat([tail, piece], dim=1)[:, 1 - width :]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_zeros_have_finite_gradients():
    """Padding and dead SiLUs make zero vectors; 0/0 in a norm would spread NaN."""
    x, tail, weight = (torch.zeros_like(tensor).requires_grad_() for tensor in conv_arguments((1, 5, 2, 16)))
    y = conv_silu(x, tail, weight, 2, True)
    out = norm_gate(y, draw(2, 16), draw(1, 5, 32), 1e-6)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), [x, tail, weight]))


def _layer(x, tail, weight, gain, gate):
    return norm_gate(conv_silu(x, tail, weight, 2, True), gain, gate, 1e-6)


def test_one_graph_under_compile():
    """`fullgraph=True` raises at a graph break; gradients come out of the compiled backward."""
    tensors = (*conv_arguments((2, 5, 2, 16)), draw(2, 16), draw(2, 5, 32))
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager")
    found, expected = _with_gradients(compiled, tensors, ()), _with_gradients(_layer, tensors, ())
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_gradients_are_contiguous_as_their_fakes_say():
    """Inductor trusts the fakes' strides, and stops where they differ."""
    x, tail, weight = conv_arguments((2, 9, 2, 16))
    grads = torch.autograd.grad(conv_silu(x, tail, weight, 2, True).sum(), [x, tail, weight])
    assert all(grad.is_contiguous() for grad in grads)


def test_opcheck():
    """Schema, autograd registration and fakes (shapes, dtypes and strides)."""
    x, tail, weight = conv_arguments((2, 5, 2, 16))
    torch.library.opcheck(torch.ops.titans.conv_silu_forward.default, (x, tail, weight, 2, True))
    arguments = (*norm_gate_arguments((2, 5, 2, 16)), 1e-6)
    torch.library.opcheck(torch.ops.titans.norm_gate_forward.default, arguments)


def test_wrong_shapes_are_named():
    x, tail, weight = conv_arguments((2, 5, 2, 16))
    with pytest.raises(ValueError, match=r"tail must have shape \[2, 3, 32\], got \[2, 2, 32\]"):
        conv_silu(x, tail[:, 1:], weight, 2, True)
    with pytest.raises(ValueError, match=r"weight must have shape \[32, 4\], got \[16, 4\]"):
        conv_silu(x, tail, weight[1::2], 2, True)
    with pytest.raises(ValueError, match="heads must divide the 32 channels of x, got 3"):
        conv_silu(x, tail, weight, 3, True)
    memory, gain, gate = norm_gate_arguments((2, 5, 2, 16))
    with pytest.raises(ValueError, match=r"gate must have shape \[2, 5, 32\], got \[2, 4, 32\]"):
        norm_gate(memory, gain, gate[:, 1:], 1e-6)
    with pytest.raises(ValueError, match="gain must be on cpu like x, got meta"):
        norm_gate(memory, gain.to("meta"), gate, 1e-6)
