"""The registered operators: `opcheck`, and one graph under `torch.compile`.

`titans` says nothing about how a caller compiles, so the cheap backend that runs the traced graph is enough.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from titans.ops import MemorySpec, operator
from titans.testing import assert_agreement, random_inputs
from titans.testing.comparison import named_results, random_cotangents

LINEAR = MemorySpec(dim=4, depth=1)
MLP = MemorySpec(dim=4, depth=2, expansion=2)

CALLS = {
    "linear": (LINEAR, {"tokens": 11}),
    "mlp": (MLP, {"tokens": 11, "theta": "layer", "momentum": "layer"}),
    "aligned": (MLP, {"tokens": 8, "position": [0, 0]}),
    "no momentum": (MLP, {"tokens": 11, "momentum": None, "norm_affine": False}),
    "channelwise": (MLP, {"tokens": 11, "decay": "channel"}),
    "packed": (MLP, {"documents": [5, 0, 1, 7]}),
    "many chunks": (MLP, {"tokens": 70, "forget": 0.02}),
}

calls = pytest.mark.parametrize("call", CALLS)


def inputs_of(call):
    spec, options = CALLS[call]
    return random_inputs(spec, chunk_size=4, **options)


@calls
@pytest.mark.parametrize("needs_grad", [True, False], ids=["keeping", "streaming"])
def test_opcheck(call, needs_grad, monkeypatch):
    """Schema, fakes (shapes, dtypes and strides) and functionalisation, on the arguments that really come."""
    caught = {}
    run = operator.call

    def record(name, direction, *arguments):
        # The operators sit below autograd: `opcheck` would ask for a formula if one needed a gradient.
        caught[direction] = tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        return run(name, direction, *arguments)

    monkeypatch.setattr(operator, "call", record)
    inputs = inputs_of(call)
    q = inputs.q.detach().requires_grad_(needs_grad)
    output = replace(inputs, q=q).run("chunked").output
    torch.library.opcheck(torch.ops.titans.chunked_forward.default, caught["forward"])
    assert output.requires_grad == needs_grad
    if needs_grad:
        output.square().sum().backward()
        torch.library.opcheck(torch.ops.titans.chunked_backward.default, caught["backward"])


def compiled_and_eager(inputs, function):
    """Results and gradients of `function(leaves)`, compiled to one graph and eager."""
    torch._dynamo.reset()
    found = []
    for run in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors().items()}
        results = run(leaves)
        cotangents = random_cotangents(results, seed=0)
        gradients = torch.autograd.grad(
            [results[name] for name in cotangents], list(leaves.values()), list(cotangents.values())
        )
        found.append(results | {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)})
    return found


@pytest.mark.parametrize("call", ["mlp", "no momentum", "channelwise", "packed"])
def test_one_graph_and_the_same_numbers(call):
    """fullgraph=True raises at the first graph break; values and gradients equal eager ones."""
    inputs = inputs_of(call)

    def function(leaves):
        doubled = inputs.map(lambda name, _: leaves[name] * 1.0)
        return named_results(doubled.run("chunked"))

    compiled, eager = compiled_and_eager(inputs, function)
    assert_agreement(compiled, eager, 1e-12)


def test_one_tensor_for_two_gates():
    """The compiler refuses an autograd function that gets a tensor twice: gates reach it as views."""
    inputs = inputs_of("mlp")
    gate = random_inputs(MLP, tokens=11, chunk_size=4).log_decay

    def function(leaves):
        tied = replace(inputs, log_decay=leaves["gate"], log_momentum=leaves["gate"])
        return named_results(tied.run("chunked"))

    torch._dynamo.reset()
    found = []
    for run in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        leaf = gate.detach().requires_grad_()
        results = run({"gate": leaf})
        (gradient,) = torch.autograd.grad(results["output"].sum(), [leaf])
        found.append(results | {"grad gate": gradient})
    assert_agreement(*found, 1e-12)


def test_two_calls_in_one_graph():
    """A layer that carries its state from one segment to the next inside the compiled function."""
    inputs = inputs_of("mlp")

    def function(leaves):
        whole = inputs.map(lambda name, _: leaves[name])
        first = whole.tokens(0, 6).run("chunked")
        second = whole.tokens(6, 11, first.state).run("chunked")
        return named_results(second._replace(output=torch.cat([first.output, second.output], dim=1)))

    compiled, eager = compiled_and_eager(inputs, function)
    assert_agreement(compiled, eager, 1e-12)
    assert_agreement(compiled, named_results(inputs.run("chunked")))


def test_one_graph_without_gradients():
    """Under no_grad the forward keeps nothing for a backward: the operator returns fewer tensors."""
    torch._dynamo.reset()
    inputs = inputs_of("many chunks")

    @torch.no_grad()
    def function(q):
        return named_results(replace(inputs, q=q).run("chunked"))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_agreement(compiled(inputs.q), function(inputs.q), 1e-12)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_one_graph_for_every_length(dynamic):
    """Another T may cost one more compilation, not one for each, and keeps no size of the first."""
    torch._dynamo.reset()
    start = random_inputs(MLP, tokens=1, chunk_size=4)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def function(q, k, v, theta, log_decay, log_momentum):
        given = {"q": q, "k": k, "v": v, "theta": theta, "log_decay": log_decay, "log_momentum": log_momentum}
        return start.map(lambda name, tensor: given.get(name, tensor)).run("chunked").output

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    for tokens in (9, 30, 50, 64):
        tensors = random_inputs(MLP, tokens=tokens, chunk_size=4).tensors()
        given = [tensors[name] for name in ("q", "k", "v", "theta", "log_decay", "log_momentum")]
        torch.testing.assert_close(compiled(*given), function(*given), rtol=0, atol=1e-12)
    assert len(graphs) <= 2
