"""The edges: extreme gates, low precision, odd strides, uninitialised memory, what autograd may ask for."""

from dataclasses import replace

import pytest
import torch

from titans.ops import MemorySpec, MemoryState
from titans.testing import assert_agreement, evaluate, random_inputs, relative_error
from titans.testing.comparison import named_results

IMPLS = ["reference", "chunked"]
LINEAR = MemorySpec(dim=16, depth=1)
MLP = MemorySpec(dim=16, depth=2, expansion=2)

both = pytest.mark.parametrize("impl", IMPLS)
specs = pytest.mark.parametrize("spec", [LINEAR, MLP], ids=["linear", "mlp"])

LOGS = [-torch.inf, 0.0, -1e-6, -80.0]


def with_extreme_gates(inputs, values, seed=0):
    """Gates whose logs are drawn from `values`, a third of the steps exactly zero."""
    rng = torch.Generator().manual_seed(seed)
    choices = torch.tensor(values)

    def change(name, tensor):
        if name.startswith("log_"):
            return choices[torch.randint(len(values), tensor.shape, generator=rng)].to(tensor.dtype)
        if name == "theta":
            return tensor * (torch.rand(tensor.shape, generator=rng) > 1 / 3)
        return tensor

    return inputs.map(change)


def check_zero_at_infinite_logs(inputs, results):
    found = 0
    for name, gate in inputs.tensors().items():
        if name.startswith("log_"):
            gradient = results[f"grad {name}"][gate == -torch.inf]
            assert not gradient.any(), f"{name}: {gradient.abs().max()} instead of 0"
            found += gradient.numel()
    assert found


@both
@specs
@pytest.mark.parametrize(
    ("decay", "momentum"), [("head", "head"), ("channel", "layer"), ("layer", "head"), ("head", None)]
)
def test_mixed_extreme_gates(impl, spec, decay, momentum):
    """Not one NaN, zero gradient exactly where a gate is zero, and the same as the token loop."""
    inputs = random_inputs(spec, tokens=21, chunk_size=8, decay=decay, momentum=momentum)
    inputs = with_extreme_gates(inputs, LOGS)
    results = evaluate(inputs, impl)
    assert_agreement(results, evaluate(inputs, "reference"))
    check_zero_at_infinite_logs(inputs, results)


@both
@specs
@pytest.mark.parametrize("log_momentum", [-torch.inf, -1e-6, -80.0])
@pytest.mark.parametrize("log_decay", LOGS)
def test_constant_extreme_gates(impl, spec, log_decay, log_momentum):
    """The same extreme at every token: sums of infinite logs, and differences of them, inside a chunk."""
    inputs = random_inputs(spec, tokens=13, chunk_size=8)
    inputs = replace(
        inputs,
        log_decay=torch.full_like(inputs.theta, log_decay),
        log_momentum=torch.full_like(inputs.theta, log_momentum),
    )
    results = evaluate(inputs, impl)
    assert_agreement(results, evaluate(inputs, "reference"))
    if -torch.inf in (log_decay, log_momentum):
        check_zero_at_infinite_logs(inputs, results)


@both
@pytest.mark.parametrize("depth", [1, 2])
def test_extreme_gates_in_float32(impl, depth):
    """exp(-80) squared is below the smallest float32: underflow must end in zeros, not in 0 / 0.

    Without norm: where everything is forgotten, layer norm divides by almost nothing and multiplies any
    rounding a thousandfold.
    """
    spec = MemorySpec(dim=16, depth=depth, norm=False)
    inputs = with_extreme_gates(random_inputs(spec, tokens=40), LOGS)
    exact = evaluate(inputs, "reference")
    single = evaluate(inputs.cast(torch.float32), impl)
    assert_agreement(single, exact, rtol=1e-4)
    check_zero_at_infinite_logs(inputs, single)


@pytest.mark.parametrize("momentum", [None, "head"])
@specs
def test_float32_stays_inside_its_error_budget(spec, momentum):
    """Error against float64 at most twice that of the token loop in float32, plus one rounding."""
    inputs = random_inputs(spec, tokens=65, momentum=momentum)
    exact = evaluate(inputs, "reference")
    loop, chunked = (evaluate(inputs.cast(torch.float32), impl) for impl in IMPLS)
    eps = torch.finfo(torch.float32).eps
    over = {
        name: (relative_error(chunked[name], exact[name]), relative_error(loop[name], exact[name]))
        for name in exact
        if exact[name].is_floating_point()
    }
    over = {name: pair for name, pair in over.items() if not pair[0] <= 2 * pair[1] + eps}
    assert not over, f"relative RMS error of (chunked, loop): {over}"


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(impl, dtype):
    """q, k, v and gates are read in their dtype, everything else happens in float32, the state included."""
    inputs = random_inputs(MLP, tokens=21, chunk_size=8).cast(dtype)
    actual, wide = evaluate(inputs, impl), evaluate(inputs.map(lambda _, t: t.float()), impl)
    assert actual["output"].dtype == dtype
    assert torch.equal(actual["output"], wide["output"].to(dtype))
    for name, tensor in actual.items():
        if name.startswith("final") and name != "final position":
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, wide[name]), name
    for name, tensor in inputs.tensors().items():
        assert actual[f"grad {name}"].dtype == tensor.dtype, name
        # The output's cotangent is rounded to the input's dtype, so gradients agree to that rounding.
        error = relative_error(actual[f"grad {name}"], wide[f"grad {name}"])
        assert error < 4 * torch.finfo(dtype).eps, (name, error)


@both
def test_gates_may_be_wider_than_the_tokens(impl):
    """Layers keep gates in float32 beside bfloat16 tokens: they are not rounded to bfloat16 on the way."""
    inputs = random_inputs(MLP, tokens=9, chunk_size=4, dtype=torch.float32)
    mixed = inputs.map(lambda name, t: t.bfloat16() if name in {"q", "k", "v"} else t)
    expected = mixed.map(lambda _, t: t.float()).run(impl)
    assert torch.equal(mixed.run(impl).output, expected.output.bfloat16())


@both
def test_autocast_does_not_reach_inside(impl):
    inputs = random_inputs(MLP, tokens=9, chunk_size=4, dtype=torch.float32)
    expected = evaluate(inputs, impl)
    leaf = inputs.k.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = replace(inputs, k=leaf).run(impl)
    assert torch.equal(result.output, expected["output"])
    assert result.output.dtype == torch.float32
    for name, tensor in named_results(result).items():
        assert torch.equal(tensor, expected[name]), name


def transposed(tensor):
    """The same numbers with the first two axes swapped in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def sliced(tensor):
    """The same numbers as every second entry along the last axis of a larger, NaN-filled tensor."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@both
@pytest.mark.parametrize("layout", [transposed, sliced])
@pytest.mark.parametrize("decay", ["head", "layer", "channel"])
def test_strides_do_not_matter(impl, layout, decay):
    inputs = random_inputs(MLP, tokens=13, chunk_size=4, decay=decay, theta="layer")
    assert not layout(inputs.q).is_contiguous()
    assert_agreement(evaluate(inputs.map(lambda _, t: layout(t)), impl), evaluate(inputs, impl), 1e-12)


@both
def test_strides_of_packed_documents_do_not_matter(impl):
    inputs = random_inputs(MLP, documents=[4, 0, 7, 1], chunk_size=4)
    assert_agreement(evaluate(inputs.map(lambda _, t: sliced(t)), impl), evaluate(inputs, impl), 1e-12)


@both
def test_expanded_arguments(impl):
    """One gate for all heads, one key for all rows, a state of one row in every row: stride zero."""
    inputs = random_inputs(MLP, batch=3, tokens=9, chunk_size=4, position=[2, 2, 2])

    def expand(name, tensor):
        if name == "k" or name.startswith("state."):
            return tensor[:1].expand_as(tensor)
        return tensor[:, :, :1].expand_as(tensor) if name in {"theta", "log_decay"} else tensor

    expanded = inputs.map(expand)
    assert expanded.k.stride(0) == 0
    assert_agreement(
        evaluate(expanded, impl), evaluate(expanded.map(lambda _, t: t.contiguous()), impl), 1e-12
    )


@both
def test_expanded_cotangents(impl):
    """`output.sum()` sends back one number with all strides zero."""
    inputs = random_inputs(MLP, tokens=9, chunk_size=4)
    gradients = []
    for shape_as_is in (True, False):
        q = inputs.q.detach().requires_grad_()
        output = replace(inputs, q=q).run(impl).output
        if shape_as_is:
            output.sum().backward()
        else:
            output.backward(torch.ones_like(output))
        gradients.append(q.grad)
    assert torch.equal(*gradients)


@both
def test_arguments_are_not_changed(impl):
    inputs = random_inputs(MLP, tokens=9, chunk_size=4, documents=None)
    before = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
    position = inputs.state.position.clone()
    evaluate(inputs, impl)
    for name, tensor in inputs.tensors().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(inputs.state.position, position)


@both
def test_the_same_bits_twice(impl):
    inputs = random_inputs(MLP, tokens=21, chunk_size=8, dtype=torch.float32)
    first, second = evaluate(inputs, impl), evaluate(inputs, impl)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@both
@pytest.mark.parametrize("documents", [None, [5, 0, 9, 1]], ids=["dense", "packed"])
def test_uninitialised_memory_is_never_read(impl, documents):
    """With deterministic algorithms PyTorch fills `torch.empty` with NaN; the result must not change."""
    inputs = random_inputs(MLP, tokens=11, chunk_size=4, documents=documents)
    expected = evaluate(inputs, impl)
    torch.use_deterministic_algorithms(True)
    try:
        actual = evaluate(inputs, impl)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_agreement(actual, expected, 1e-12)


@both
@pytest.mark.parametrize("position", [[0, 0], [1, 3]], ids=["aligned", "inside"])
def test_any_one_argument_may_need_a_gradient(impl, position):
    """Gradients do not depend on which others are asked for."""
    inputs = random_inputs(MLP, tokens=6, chunk_size=4, position=position, decay="channel", theta="layer")
    expected = evaluate(inputs, impl)
    for name in inputs.tensors():
        alone = evaluate(inputs, impl, wanted={name})
        assert_agreement(
            {f"grad {name}": alone[f"grad {name}"]}, {f"grad {name}": expected[f"grad {name}"]}, 1e-12
        )


@both
def test_without_gradients_nothing_is_recorded(impl):
    """A stream without `no_grad` must not grow: no argument asks, so no result has a history."""
    inputs = random_inputs(MLP, tokens=6, chunk_size=4)
    for name, tensor in named_results(inputs.run(impl)).items():
        assert not tensor.requires_grad, name


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(impl, mode):
    inputs = random_inputs(MLP, tokens=6, chunk_size=4)
    expected = evaluate(inputs, impl)
    inputs.q.requires_grad_()
    with mode():
        results = named_results(inputs.run(impl))
    for name, tensor in results.items():
        assert not tensor.requires_grad, name
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-13)


@both
def test_a_stream_carries_a_detached_state(impl):
    """Truncated backpropagation: nothing reaches beyond `detach`, and values stay."""
    inputs = random_inputs(MLP, tokens=8, chunk_size=4)
    v = inputs.v.detach().requires_grad_()
    inputs = replace(inputs, v=v)
    first = inputs.tokens(0, 5).run(impl)
    second = inputs.tokens(5, 8, first.state.detach()).run(impl)
    (gradient,) = torch.autograd.grad(second.output.sum(), v)
    assert not gradient[:, :5].any()
    assert gradient[:, 5:].any()
    whole = inputs.run(impl)
    torch.testing.assert_close(second.output, whole.output[:, 5:])


@both
def test_a_learned_memory_in_low_precision_starts_in_float32(impl):
    weights = tuple(torch.randn(2, i, o, dtype=torch.bfloat16) for i, o in MLP.layer_shapes)
    inputs = random_inputs(MLP, tokens=3).cast(torch.bfloat16)
    result = replace(inputs, state=MemoryState.initial(weights, batch=2)).run(impl)
    assert all(weight.dtype == torch.float32 for weight in result.state.weights)
