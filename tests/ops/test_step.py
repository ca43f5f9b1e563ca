"""The step kernel against the recurrence: token after token, through the ends of chunks."""

from dataclasses import replace

import pytest
import torch

from titans.ops import MemoryOutput, MemorySpec, MemoryState, resolve_implementation
from titans.testing import assert_agreement, random_inputs, relative_error
from titans.testing.comparison import named_results

pytest.importorskip("triton")
from titans.ops.kernels import step_operator
from titans.ops.kernels.step import memory_step, own_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH = 64 if torch.cuda.is_available() else 16  # the narrowest that is allowed, see support.py
LINEAR = MemorySpec(dim=WIDTH, depth=1)
MLP = MemorySpec(dim=WIDTH, depth=2)  # F = 4 x WIDTH: two slices and more
# One slice and no erf when interpreted: fast.
SMALL = MemorySpec(dim=WIDTH, depth=2, expansion=1, activation="silu")

CASES = {
    "linear": (LINEAR, {}),
    "linear, residual": (replace(LINEAR, residual=True), {}),
    "linear, no momentum": (LINEAR, {"momentum": None}),
    "linear, gates [B, 1, H, 1]": (LINEAR, {"theta": "layer", "decay": "layer", "momentum": "layer"}),
    "mlp": (MLP, {}),
    "gelu_tanh": (replace(MLP, activation="gelu_tanh"), {"decay": "layer"}),
    "silu": (replace(MLP, activation="silu"), {"theta": "layer", "momentum": "layer"}),
    "no norm": (replace(MLP, norm=False), {}),
    "no residual": (replace(MLP, residual=False), {}),
    "norm without gain and bias": (MLP, {"norm_affine": False}),
    "no momentum": (MLP, {"momentum": None}),
    "expansion 1": (SMALL, {"theta": "layer", "decay": "layer", "momentum": "layer"}),
    "expansion 2": (replace(SMALL, expansion=2), {}),
    "linear, D 32": (MemorySpec(dim=32, depth=1), {}),
    "chunk 1": (SMALL, {"chunk_size": 1, "position": [0, 0, 0]}),
}


def one_token(spec=SMALL, **settings):
    """A call of one token in fp32; rows at the start, in the middle and at the end of a chunk."""
    settings = {"batch": 3, "chunk_size": 4, "position": [0, 1, 3]} | settings
    inputs = random_inputs(spec, tokens=1, dtype=torch.float32, **settings)
    return inputs.to(DEVICE)


def step(inputs, **options):
    names = ("theta", "log_decay", "log_momentum", "state", "spec", "norm_weight", "norm_bias", "chunk_size")
    arguments = {name: getattr(inputs, name) for name in names}
    return memory_step(inputs.q, inputs.k, inputs.v, **(arguments | options))


def steps(inputs, **options):
    """The whole sequence, one call a token."""
    state, outputs = inputs.state, []
    for token in range(inputs.q.shape[1]):
        output, state = step(inputs.tokens(token, token + 1, state), **options)
        outputs.append(output)
    return MemoryOutput(torch.cat(outputs, dim=1), state)


def assert_same_bits(actual, expected):
    for (name, got), want in zip(
        named_results(actual).items(), named_results(expected).values(), strict=True
    ):
        assert torch.equal(got, want), name


@pytest.mark.parametrize(("spec", "settings"), CASES.values(), ids=CASES.keys())
def test_consecutive_tokens_agree_with_the_reference(spec, settings):
    """Rows at different positions, six tokens in chunks of four: every row closes one chunk at least."""
    settings = {"batch": 3, "chunk_size": 4, "position": [0, 1, 3]} | settings
    exact = random_inputs(spec, tokens=6, **settings).to(DEVICE)
    expected = named_results(exact.run("reference"))
    assert_agreement(named_results(steps(exact.cast(torch.float32))), expected, rtol=2e-5)


@pytest.mark.parametrize("kept", ["norm_weight", "norm_bias"])
def test_gain_without_bias_and_bias_without_gain(kept):
    inputs = replace(one_token(), **{name: None for name in ("norm_weight", "norm_bias") if name != kept})
    expected = named_results(inputs.cast(torch.float64).run("reference"))
    assert_agreement(named_results(step(inputs)), expected, rtol=2e-5)


@pytest.mark.parametrize("spec", [LINEAR, SMALL], ids=["linear", "mlp"])
def test_gates_of_minus_infinity(spec):
    """Forgetting everything and no momentum at all: zeros, never NaN."""
    inputs = one_token(spec, theta="layer", decay="layer", momentum="layer")
    inputs.log_decay[0, :, 0] = -torch.inf
    inputs.log_momentum[1, :, 1] = -torch.inf
    inputs.log_decay[2] = inputs.log_momentum[2] = -torch.inf
    expected = named_results(inputs.cast(torch.float64).run("reference"))
    assert_agreement(named_results(step(inputs)), expected, rtol=2e-5)


@pytest.mark.parametrize("spec", [LINEAR, SMALL], ids=["linear", "mlp"])
def test_half_precision_tokens(spec):
    """Only the output is rounded: arithmetic and state stay fp32."""
    inputs = one_token(spec).cast(torch.float16)
    expected = inputs.cast(torch.float64).run("reference")
    actual = step(inputs)
    assert actual.output.dtype == torch.float16
    assert relative_error(actual.output, expected.output) < 5e-4
    expected = named_results(expected) | {"output": actual.output}
    assert_agreement(named_results(actual), expected, rtol=2e-5)


@pytest.mark.parametrize("momentum", ["head", None])
@pytest.mark.parametrize("spec", [LINEAR, SMALL], ids=["linear", "mlp"])
def test_in_place_is_the_functional_form_in_the_given_tensors(spec, momentum):
    inputs = one_token(spec, momentum=momentum)
    before = own_memory(inputs.state)
    expected = step(inputs)
    given = MemoryOutput(expected.output, inputs.state)
    assert_same_bits(given, MemoryOutput(expected.output, before))  # the functional form leaves it alone
    storages = {name: tensor.data_ptr() for name, tensor in named_results(given).items()}
    actual = step(inputs, in_place=True)
    assert actual.state is inputs.state
    assert_same_bits(actual, expected)
    written = named_results(MemoryOutput(expected.output, actual.state))
    assert {name: tensor.data_ptr() for name, tensor in written.items()} == storages


@pytest.mark.parametrize("spec", [LINEAR, SMALL], ids=["linear", "mlp"])
def test_without_momentum_the_momentum_is_neither_read_nor_written(spec):
    inputs = one_token(spec, momentum=None)
    for momentum in inputs.state.momentum:
        momentum.fill_(torch.nan)
    output, state = step(inputs)
    assert output.isfinite().all()
    assert all(new is old for new, old in zip(state.momentum, inputs.state.momentum, strict=True))


@pytest.mark.parametrize("spec", [LINEAR, SMALL], ids=["linear", "mlp"])
def test_a_row_does_not_depend_on_the_others(spec):
    """The same bits alone and beside a row of NaN."""
    inputs = one_token(spec)
    poisoned = inputs.map(
        lambda name, tensor: (
            tensor
            if name.startswith("norm_")
            else torch.where(
                torch.arange(3, device=DEVICE).view(3, *[1] * (tensor.dim() - 1)) == 0, torch.nan, tensor
            )
        )
    )
    actual = step(poisoned)
    for row in (1, 2):
        alone = step(inputs.to("cpu").rows([row]).to(DEVICE))
        state = actual.state.select(torch.tensor([row], device=DEVICE))
        assert_same_bits(MemoryOutput(actual.output[row : row + 1], state), alone)


@pytest.mark.parametrize("spec", [LINEAR, SMALL], ids=["linear", "mlp"])
def test_the_anchor_is_ignored_at_the_start_of_a_chunk(spec):
    inputs = one_token(spec, position=[0, 0, 0])
    expected = step(inputs)
    for anchor in inputs.state.anchor:
        anchor.fill_(torch.nan)
    assert_same_bits(step(inputs), expected)


@pytest.mark.parametrize("spec", [LINEAR, SMALL], ids=["linear", "mlp"])
def test_strided_arguments(spec):
    """What a layer cuts out of one projection is not contiguous."""
    inputs = one_token(spec)
    expected = step(inputs)
    strided = inputs.map(lambda _, tensor: torch.stack([tensor, -tensor], dim=-1)[..., 0])
    assert not strided.q.is_contiguous()
    assert_same_bits(step(strided), expected)


def test_two_tokens_are_refused():
    inputs = random_inputs(SMALL, tokens=2, dtype=torch.float32).to(DEVICE)
    with pytest.raises(ValueError, match="q must hold one token"):
        step(inputs)


def test_unsupported_memories_are_refused():
    with pytest.raises(ValueError, match="decay per channel"):
        step(one_token(decay="channel"))
    with pytest.raises(ValueError, match="depth 1 or 2, got 3"):
        step(one_token(MemorySpec(dim=16, depth=3, expansion=1)))
    with pytest.raises(ValueError, match="without norm"):
        step(one_token(MemorySpec(dim=16, depth=1, norm=True)))
    with pytest.raises(ValueError, match=r"head width among .* got 32"):  # as the kernels for many tokens
        step(one_token(MemorySpec(dim=32, depth=2)))
    with pytest.raises(ValueError, match="float64"):
        step(one_token().cast(torch.float64))


@pytest.mark.parametrize("name", ["q", "log_momentum", "norm_bias", "state.anchor[1]"])
def test_what_requires_a_gradient_is_refused_unless_gradients_are_off(name):
    inputs = one_token()
    named = inputs.map(lambda given, tensor: tensor.requires_grad_() if given == name else tensor)
    with pytest.raises(ValueError, match="requires a gradient"):
        step(named)
    with torch.no_grad():
        assert step(named).output.isfinite().all()


def test_in_place_refuses_memory_that_is_not_its_own():
    """Weights, anchor and the parameters of a fresh state are one tensor, seen in every row."""
    inputs = one_token(position=[0, 0, 0])
    parameters = tuple(weight[0] for weight in inputs.state.weights)
    with pytest.raises(ValueError, match=r"state.weights\[0\] must be contiguous"):
        step(replace(inputs, state=MemoryState.initial(parameters, batch=3)), in_place=True)
    shared = replace(inputs, state=replace(inputs.state, anchor=inputs.state.weights))
    with pytest.raises(ValueError, match=r"state.anchor\[0\] shares memory with state.weights\[0\]"):
        step(shared, in_place=True)
    position = torch.zeros(1, dtype=torch.int32, device=DEVICE).expand(3)
    with pytest.raises(ValueError, match=r"state.position must be contiguous"):
        step(replace(inputs, state=replace(inputs.state, position=position)), in_place=True)
    fresh = own_memory(MemoryState.initial(parameters, batch=3))
    step(replace(inputs, state=fresh), in_place=True)
    assert all(torch.equal(new, old[0]) for new, old in zip(parameters, inputs.state.weights, strict=True))


@pytest.fixture
def steps_taken(monkeypatch):
    """The tokens that go through the step kernel, one entry a call."""
    taken = []

    def count(q, *others):
        taken.append(q.shape[1])
        return run(q, *others)

    run = step_operator.step_in_place
    monkeypatch.setattr(step_operator, "step_in_place", count)
    return taken


@torch.no_grad()
@pytest.mark.parametrize("momentum", ["head", None])
@pytest.mark.parametrize("spec", [LINEAR, SMALL], ids=["linear", "mlp"])
def test_the_op_decodes_by_steps_and_goes_on_by_chunks(spec, momentum, steps_taken):
    """Tokens one by one, then many at once, across the ends of chunks: the recurrence, one kind of state."""
    inputs = random_inputs(spec, tokens=26, heads=1, momentum=momentum, position=[13, 0])
    expected = named_results(inputs.run("reference"))
    inputs = inputs.to(DEVICE).cast(torch.float32)
    state, outputs = inputs.state, []
    for start, stop in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 24), (24, 25), (25, 26)):
        output, state = inputs.tokens(start, stop, state).run("triton")
        outputs.append(output)
        for tensor in (*state.weights, *state.momentum, *state.anchor, state.position):
            assert tensor.is_contiguous()
        assert state.position.dtype == torch.int32
    assert steps_taken == [1] * 6
    results = named_results(MemoryOutput(torch.cat(outputs, dim=1), state))
    assert_agreement({name: tensor.cpu() for name, tensor in results.items()}, expected, rtol=1e-4)


def test_the_given_state_stays_as_it_was(steps_taken):
    """A fresh state shares weights, anchor and parameters; the op writes none of them."""
    inputs = one_token(position=[0, 0, 0])
    parameters = tuple(weight[0].clone() for weight in inputs.state.weights)
    replace(inputs, state=MemoryState.initial(parameters, batch=3)).run("triton")
    assert steps_taken == [1]
    assert all(torch.equal(new, old[0]) for new, old in zip(parameters, inputs.state.weights, strict=True))


@pytest.mark.parametrize("name", ["v", "log_decay", "norm_weight", "state.weights[0]"])
def test_what_requires_a_gradient_takes_the_kernels_that_give_it(name, steps_taken):
    inputs = one_token(chunk_size=16, position=[0, 1, 15])
    leaf = inputs.tensors()[name].requires_grad_()
    output, _ = inputs.map(lambda given, tensor: leaf if given == name else tensor).run("triton")
    (gradient,) = torch.autograd.grad(output.square().sum(), [leaf])
    assert gradient.isfinite().all()
    assert not steps_taken
    with torch.no_grad():
        assert torch.allclose(inputs.run("triton").output, output, rtol=1e-4, atol=1e-5)
    assert steps_taken == [1]


@torch.no_grad()
def test_documents_take_the_kernels_that_know_them(steps_taken):
    inputs = random_inputs(LINEAR, documents=(1, 0), dtype=torch.float32).to(DEVICE)
    inputs = replace(inputs, cu_seqlens=inputs.cu_seqlens.to(DEVICE))
    inputs.run("triton")
    assert not steps_taken


@torch.no_grad()
@pytest.mark.parametrize("momentum", ["head", None])
def test_the_operator(momentum, monkeypatch):
    """Schema and fakes of `titans::memory_step`, and one graph with the numbers of the eager call."""
    inputs = one_token(momentum=momentum)
    caught = []
    run = step_operator._step

    def record(*arguments):
        caught.append(arguments)
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step_operator, "_step", record)
        eager = inputs.run("triton")
    torch.library.opcheck(torch.ops.titans.memory_step.default, caught[0])
    compiled = torch.compile(lambda: inputs.run("triton"), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(), eager)


def test_when_auto_takes_the_step():
    """On a CUDA device whatever the chunk and the dtype, as far as the step covers the memory."""
    cuda, half, mlp = torch.device("cuda"), torch.bfloat16, MemorySpec(dim=64, depth=2)

    def resolved(dtype=half, spec=mlp, chunk_size=16, device=cuda, **options):
        return resolve_implementation("auto", device, dtype, spec, chunk_size, **options)

    assert resolved(one_token=True) == resolved(torch.float32, one_token=True) == "triton step"
    assert resolved(chunk_size=8, one_token=True) == "triton step"
    assert resolved() == "triton"
    assert resolved(chunk_size=8) == resolved(torch.float32) == "chunked"
    for refused in (
        {"dtype": torch.float64},
        {"spec": replace(mlp, depth=3)},
        {"spec": replace(mlp, dim=32)},
        {"device": torch.device("cpu")},
        {"channelwise": True},
    ):
        assert resolved(**refused, one_token=True) == "chunked step"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        MemorySpec(dim=32, depth=1),
        MemorySpec(dim=128, depth=1, residual=True),
        MemorySpec(dim=64, depth=2, expansion=1),
        MemorySpec(dim=64, depth=2),
        MemorySpec(dim=128, depth=2),
    ],
    ids=lambda spec: f"depth {spec.depth}, D {spec.dim}, expansion {spec.expansion}",
)
def test_replayed_graph_gives_the_bits_of_eager_steps(spec, dtype):
    """Five replays cross a chunk's end; a graph that baked in the position would not know."""
    inputs = random_inputs(spec, tokens=5, heads=4, chunk_size=4, dtype=dtype).to(DEVICE)
    eager = steps(replace(inputs, state=own_memory(inputs.state)), in_place=True)

    slot = inputs.tokens(0, 1, own_memory(inputs.state)).map(
        lambda name, tensor: tensor if name.startswith(("state.", "norm_")) else tensor.clone()
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(slot, in_place=True)
    outputs = []
    for token in range(5):
        for name, tensor in inputs.tokens(token, token + 1).tensors().items():
            if not name.startswith(("state.", "norm_")):
                slot.tensors()[name].copy_(tensor)
        graph.replay()
        outputs.append(captured.output.clone())
    assert_same_bits(MemoryOutput(torch.cat(outputs, dim=1), slot.state), eager)
