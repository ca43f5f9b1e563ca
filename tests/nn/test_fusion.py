"""`impl="triton"` in the layer: the kernels around the memory against plain PyTorch, and who takes them."""

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from titans.models import TitansConfig, TitansForCausalLM
from titans.nn import MemoryCore, NeuralMemory, NeuralMemorySpec, Rows, fusion
from titans.ops import MemorySpec
from titans.testing import relative_error

pytest.importorskip("triton")

# fp32, whose rounding the memory's LN over 16 channels amplifies (tests/ops/test_kernels.py).
ALLOWED = 1e-4
LINEAR = MemorySpec(dim=16, depth=1)
MLP = MemorySpec(dim=16, depth=2, expansion=1)


def build(memory=LINEAR, impl="auto", **fields):
    """A layer with randomised weights, the same at every call."""
    layer = NeuralMemory(NeuralMemorySpec(hidden_size=32, memory=memory, **fields), impl)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def state_tensors(state):
    memory = state.memory
    return [state.query_tail, state.key_tail, state.value_tail, *memory.weights, *memory.momentum]


def assert_close(found, expected):
    for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert actual.shape == wanted.shape
        assert actual.dtype == wanted.dtype
        assert wanted.any(), "nothing to compare"
        assert relative_error(actual, wanted) < ALLOWED, f"tensor {index}"


def with_gradients(layer, impl, x, rows=None):
    """Output, state and the gradients of x and of every parameter, with a cotangent on each of the former."""
    layer.impl = impl
    x = x.detach().requires_grad_()
    output, state = layer(x, None, rows)
    results = [output, *state_tensors(state)]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(result.shape, generator=generator) for result in results]
    grads = torch.autograd.grad(results, [x, *layer.parameters()], cotangents)
    return [*results, *grads]


def calls(monkeypatch):
    """Counts what reaches the kernels: agreement alone would not show that they ran."""
    counts = {"conv_silu": 0, "norm_gate": 0}
    from titans.ops.kernels import layer

    def counted(name, function):
        def run(*arguments):
            counts[name] += 1
            return function(*arguments)

        return run

    for name in counts:
        monkeypatch.setattr(layer, name, counted(name, getattr(layer, name)))
    return counts


@pytest.mark.parametrize("memory", [LINEAR, MLP], ids=["linear", "mlp"])
def test_outputs_states_and_gradients_agree(memory, monkeypatch):
    counts = calls(monkeypatch)
    layer, x = build(memory), torch.randn(2, 21, 32)
    assert_close(with_gradients(layer, "triton", x), with_gradients(layer, "chunked", x))
    assert counts == {"conv_silu": 3, "norm_gate": 1}


def test_packed_rows_agree():
    """Empty rows, rows shorter than the convolution, and one that crosses a chunk."""
    layer, x = build(), torch.randn(1, 27, 32)
    rows = Rows([2, 0, 20, 1, 4], x.device)
    assert_close(with_gradients(layer, "triton", x, rows), with_gradients(layer, "chunked", x, rows))


@torch.no_grad()
@pytest.mark.parametrize("ends", [(1, 2, 5), (3, 16), (4, 17), (15, 18), (19,)], ids=str)
def test_cuts_anywhere_change_nothing(ends):
    """A stream in pieces through the kernels (one token: those for decoding), against the whole without."""
    x = torch.randn(2, 20, 32)
    expected, end = build(impl="chunked")(x)
    layer, state, pieces = build(impl="triton"), None, []
    for start, stop in pairwise([0, *ends, 20]):
        piece, state = layer(x[:, start:stop], state)
        pieces.append(piece)
    assert_close([torch.cat(pieces, dim=1), *state_tensors(state)], [expected, *state_tensors(end)])


@torch.no_grad()
def test_a_packed_stream_goes_on_where_a_dense_one_stopped():
    x = torch.randn(2, 20, 32)
    expected, end = build(impl="chunked")(x)
    layer = build(impl="triton")
    head, state = layer(x[:, :2])
    stream = torch.cat([x[0, 2:19], x[1, 2:3]])[None]
    middle, state = layer(stream, state, Rows([17, 1], x.device))
    tail, state = layer(torch.cat([x[0, 19:], x[1, 3:]])[None], state, Rows([1, 17], x.device))
    first = torch.cat([head[0], middle[0, :17], tail[0, :1]])
    second = torch.cat([head[1], middle[0, 17:], tail[0, 1:]])
    assert_close([first, second, *state_tensors(state)], [*expected, *state_tensors(end)])


CONFIG = {
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "memory_head_dim": 16,
    "memory_depth": 1,
    "chunk_size": 16,
    "segment_size": 16,
    "window_size": 8,
    "num_persistent_tokens": 3,
}
# Calls of conv_silu and norm_gate. MAC recalls with one convolution and writes with three in each of two
# segments; the others write the persistent tokens first, whose outputs nobody uses.
RUNS = {"lmm": (6, 1), "mac": (7, 0), "mag": (6, 0), "mal": (6, 1)}


@pytest.mark.parametrize("variant", RUNS)
def test_models_of_every_variant_agree(variant, monkeypatch):
    """Loss and gradients, with `impl` set on the modules as the docstring of MemoryCore says."""
    model = TitansForCausalLM(TitansConfig(variant=variant, **CONFIG))
    ids = torch.randint(3, 23, (2, 20))
    found = {}
    for impl in ("chunked", "triton"):
        counts = calls(monkeypatch)
        for module in model.modules():
            if isinstance(module, MemoryCore):
                module.impl = impl
        output = model(ids, labels=ids)
        used = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(output.loss, list(used.values()), allow_unused=True)
        assert tuple(counts.values()) == (RUNS[variant] if impl == "triton" else (0, 0))
        found[impl] = [output.logits, *(grad for grad in grads if grad is not None)]
    assert len(found["triton"]) > 10
    assert_close(found["triton"], found["chunked"])


def test_a_fused_layer_is_one_graph():
    layer, x = build(impl="triton"), torch.randn(2, 20, 32)
    expected, _ = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, Rows([3, 0, 6], torch.device("cpu"))], ids=["dense", "packed"])
def test_autocast_leaves_the_streams_in_its_dtype(rows):
    """A convolution that answers in the dtype of its fp32 weight makes q fp32, and "auto" on a GPU then never
    takes the memory's kernels in training."""
    layer = build()
    with torch.autocast("cpu", torch.bfloat16):
        state = layer.initial_state(1 if rows is None else 3)
        streams, state = layer.project_write(torch.randn(1, 9, 32), state, rows)
    assert [stream.dtype for stream in streams] == [torch.bfloat16] * 3
    assert state.query_tail.dtype == torch.bfloat16


def test_auto_takes_them_on_a_card(monkeypatch):
    """CUDA streams that the kernels cover, and no others."""
    counts = calls(monkeypatch)
    build()(torch.randn(1, 3, 32))
    with FakeTensorMode():
        wide = torch.empty(1, 3, 32, device="cuda")
        half = wide.bfloat16()
    assert fusion.runs_fused("auto", half, 4)
    assert not fusion.runs_fused("auto", half, 3)
    assert not fusion.runs_fused("auto", wide.double(), 4)
    assert not fusion.runs_fused("chunked", half, 4)
    build()(torch.randn(1, 3, 32))  # on the CPU, where only the interpreter could run them
    assert counts == {"conv_silu": 0, "norm_gate": 0}


@pytest.mark.parametrize(
    ("fields", "dtype", "message"),
    [
        ({"conv_size": 9}, torch.float32, r"impl='triton' needs a convolution over 2 to 8 tokens, got 9"),
        ({}, torch.float64, r"impl='triton' needs projections in bfloat16, .* got torch.float64"),
    ],
    ids=["width", "dtype"],
)
def test_triton_raises_where_it_cannot(fields, dtype, message):
    layer = build(impl="triton", **fields).to(dtype)
    x = torch.randn(1, 5, 32, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        layer(x)
    layer.impl = "auto"
    layer(x)


def test_an_unknown_impl_is_named():
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'cuda'"):
        build(impl="cuda")(torch.randn(1, 5, 32))


def test_state_dicts_do_not_know_of_it():
    """Names of checkpoints: what computes them is no part of them."""
    names = {f"{x}_{kind}.weight" for x in "qkv" for kind in ("proj", "conv")}
    names |= {"gates.weight", "gates.bias", "initial.weight_0", "norm.weight", "gate_proj.weight"}
    assert set(build(impl="triton").state_dict()) == {*names, "o_proj.weight"}


def test_rows_work_out_their_tail_order_once():
    rows = Rows([2, 0, 3], torch.device("cpu"))
    order = rows.after_tails(1)
    assert rows.after_tails(1) is order
    assert order.stream.tolist() == [0, 3, 4, 1, 2, 5, 6, 7]
    assert order.tokens.tolist() == [0, 1, 4, 5, 6]  # one less than in the stream
    assert order.ends.tolist() == [2, 3, 7]
    assert rows.after_tails(3) is not order
