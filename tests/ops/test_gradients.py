"""Derivatives as such: gradcheck, the path that the inner gradient must not follow, second derivatives."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from titans.ops import MemorySpec, neural_memory, read_memory
from titans.testing import assert_agreement, random_inputs
from titans.testing.comparison import named_results, random_cotangents

both = pytest.mark.parametrize("impl", ["reference", "chunked"])


@both
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (MemorySpec(dim=2, depth=1), {"tokens": 5, "position": [0, 1]}),
        (MemorySpec(dim=2, depth=1), {"tokens": 3, "position": [1, 0], "decay": "channel", "momentum": None}),
        (MemorySpec(dim=3, depth=2, expansion=1), {"tokens": 3, "position": [1], "batch": 1, "heads": 1}),
        (
            MemorySpec(dim=2, depth=3, expansion=1, norm=False, activation="silu"),
            {"documents": [1, 0, 3], "position": [1, 0, 0], "heads": 1, "theta": "layer"},
        ),
    ],
    ids=["linear", "channelwise", "mlp", "packed"],
)
def test_gradcheck(impl, spec, options):
    inputs = random_inputs(spec, chunk_size=2, **options)
    names = list(inputs.tensors())

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        results = named_results(inputs.map(lambda name, _: given[name]).run(impl))
        return tuple(tensor for tensor in results.values() if tensor.is_floating_point())

    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors().values()]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=False)


@both
@pytest.mark.parametrize("inside", [False, True], ids=["chunk-start", "inside-a-chunk"])
def test_inner_gradient_stops_at_keys_and_values(impl, inside):
    """In MAC k and v are made by reading the same weights that are the anchor.

    The inner gradient is the partial derivative of the loss at fixed k and v. Feeding k and v made from
    the state's own tensors must give what independent copies give, with the chain rule applied outside.
    """
    spec = MemorySpec(dim=4, depth=2, expansion=2)
    inputs = random_inputs(spec, tokens=5, chunk_size=4, position=[1, 2] if inside else [0, 0])
    x = inputs.q
    read_from = "state.anchor" if inside else "state.weights"

    def keys_and_values(tensors):
        weights = tuple(tensors[f"{read_from}[{layer}]"] for layer in range(spec.depth))
        h = read_memory(x, weights, spec, tensors["norm_weight"], tensors["norm_bias"])
        return F.normalize(h, dim=-1), h.tanh()

    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.tensors().items()}
    k, v = keys_and_values(leaves)
    tangled = leaves | {"k": k, "v": v}
    apart = {name: t.detach().clone().requires_grad_() for name, t in tangled.items()}

    results = {}
    gradients = {}
    for label, tensors in (("tangled", tangled), ("apart", apart)):
        found = named_results(inputs.map(lambda name, _, tensors=tensors: tensors[name]).run(impl))
        cotangents = random_cotangents(found, seed=0)
        wanted = leaves if label == "tangled" else apart
        gradients[label] = torch.autograd.grad(
            [found[name] for name in cotangents],
            list(wanted.values()),
            list(cotangents.values()),
            allow_unused=True,
        )
        gradients[label] = dict(zip(wanted, gradients[label], strict=True))
        results[label] = found
    assert_agreement(results["tangled"], results["apart"], 1e-12)

    # Chain rule: what reached the independent k and v goes on through the way they were made.
    k, v = keys_and_values(leaves)
    onward = torch.autograd.grad(
        [k, v], list(leaves.values()), [gradients["apart"]["k"], gradients["apart"]["v"]], allow_unused=True
    )
    for (name, leaf), extra in zip(leaves.items(), onward, strict=True):
        if name in {"k", "v"}:
            continue
        zero = torch.zeros_like(leaf)
        expected = (zero if gradients["apart"][name] is None else gradients["apart"][name]) + (
            zero if extra is None else extra
        )
        actual = gradients["tangled"][name]
        assert_agreement({name: zero if actual is None else actual}, {name: expected})


@both
def test_gradients_flow_through_the_writes(impl):
    """No stop-gradient: a key and a value written in one chunk matter to what is read two chunks later."""
    inputs = random_inputs(MemorySpec(dim=4, depth=2), tokens=12, chunk_size=4, position=[0, 0])
    k, v = (tensor.detach().requires_grad_() for tensor in (inputs.k, inputs.v))
    output = replace(inputs, k=k, v=v).run(impl).output
    for gradient in torch.autograd.grad(output[:, 11].square().sum(), (k, v)):
        assert gradient[:, :12].abs().amax(dim=(0, 2, 3)).min() > 0


def test_second_derivatives_are_refused():
    """The hand-written backward is not differentiable again: an error, never a silently wrong number."""
    inputs = random_inputs(MemorySpec(dim=2, depth=1), batch=1, heads=1, tokens=3, chunk_size=2)
    k = inputs.k.detach().requires_grad_()
    output = replace(inputs, k=k).run("chunked").output
    (gradient,) = torch.autograd.grad(output.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match=r"titans|once_differentiable"):
        torch.autograd.grad(gradient.square().sum(), k)


@both
def test_gradients_of_two_calls_accumulate(impl):
    """The op twice in one graph, the second on the first one's state, shared parameters."""
    inputs = random_inputs(MemorySpec(dim=4, depth=2), tokens=6, chunk_size=4)
    gain = inputs.norm_weight.detach().requires_grad_()

    def loss(inputs):
        first = inputs.run(impl)
        second = replace(inputs, state=first.state).run(impl)
        return second.output.square().sum() + first.output.sum()

    (together,) = torch.autograd.grad(loss(replace(inputs, norm_weight=gain)), gain)
    step = 1e-6
    moved = torch.zeros_like(gain)
    moved[1, 2] = step
    with torch.no_grad():
        up, down = (loss(replace(inputs, norm_weight=gain + sign * moved)) for sign in (1, -1))
    assert together[1, 2].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-6)


@both
def test_the_graph_can_be_used_twice_when_kept(impl):
    inputs = random_inputs(MemorySpec(dim=4, depth=2), tokens=6, chunk_size=4)
    q = inputs.q.detach().requires_grad_()
    output = replace(inputs, q=q).run(impl).output
    first = torch.autograd.grad(output.sum(), q, retain_graph=True)[0]
    second = torch.autograd.grad(output.sum(), q)[0]
    assert torch.equal(first, second)


def test_read_memory_has_gradients():
    inputs = random_inputs(MemorySpec(dim=3, depth=2, expansion=1), batch=1, heads=2, tokens=2)
    arguments = [inputs.q, *inputs.state.weights, inputs.norm_weight, inputs.norm_bias]
    leaves = [tensor.detach().requires_grad_() for tensor in arguments]

    def function(q, w1, w2, gain, bias):
        return read_memory(q, (w1, w2), inputs.spec, gain, bias)

    assert torch.autograd.gradcheck(function, leaves)


@both
def test_equal_tensors_may_be_one_tensor(impl):
    """k is q and theta feeds both gates: gradients of all uses add up."""
    inputs = random_inputs(MemorySpec(dim=4, depth=2), tokens=6, chunk_size=4)

    def loss(q, k):
        return (
            neural_memory(
                q,
                k,
                inputs.v,
                theta=inputs.theta,
                log_decay=inputs.log_decay,
                log_momentum=inputs.log_momentum,
                state=inputs.state,
                spec=inputs.spec,
                chunk_size=4,
                impl=impl,
            )
            .output.square()
            .sum()
        )

    one = inputs.q.detach().requires_grad_()
    two = [inputs.q.detach().clone().requires_grad_() for _ in range(2)]
    (shared,) = torch.autograd.grad(loss(one, one), one)
    torch.testing.assert_close(shared, sum(torch.autograd.grad(loss(*two), two)))


@both
def test_activation_checkpointing(impl):
    """`torch.utils.checkpoint` runs the forward again in the backward: the same gradients, bit for bit."""
    inputs = random_inputs(MemorySpec(dim=4, depth=2), tokens=9, chunk_size=4)
    gradients = []

    def function(leaves):
        return inputs.map(lambda name, _: leaves[name]).run(impl).output

    for wrapped in (False, True):
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors().items()}
        output = checkpoint(function, leaves, use_reentrant=False) if wrapped else function(leaves)
        gradients.append(torch.autograd.grad(output.square().sum(), list(leaves.values()), allow_unused=True))
    for name, plain, again in zip(inputs.tensors(), *gradients, strict=True):
        assert (plain is None and again is None) or torch.equal(plain, again), name


def test_no_copy_of_the_weights_for_every_chunk_is_kept():
    """What waits for the backward: the arguments and sparse states, one in eight chunks."""
    spec, chunks = MemorySpec(dim=8, depth=2, expansion=4), 64
    inputs = random_inputs(spec, batch=1, heads=1, tokens=4 * chunks, chunk_size=4, dtype=torch.float32)
    state_size = 2 * spec.num_parameters  # weights and momentum
    kept = {}

    def remember(tensor):
        kept[tensor.data_ptr()] = max(tensor.numel(), kept.get(tensor.data_ptr(), 0))
        return tensor

    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors().items()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        inputs.map(lambda name, _: leaves[name]).run("chunked")
    arguments = sum(tensor.numel() for tensor in leaves.values())
    assert sum(kept.values()) <= arguments + (chunks / 8 + 2) * state_size
