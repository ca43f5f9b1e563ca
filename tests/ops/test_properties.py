"""What holds for every input: cuts, rows, documents, heads, the limits of the gates. Both implementations."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans.ops import MemorySpec, MemoryState, read_memory
from titans.testing import MemoryInputs, assert_agreement, evaluate, random_inputs
from titans.testing.comparison import named_results, random_cotangents

IMPLS = ["reference", "chunked"]
LINEAR = MemorySpec(dim=4, depth=1)
MLP = MemorySpec(dim=4, depth=2, expansion=2)

both = pytest.mark.parametrize("impl", IMPLS)


@st.composite
def streams(draw):
    """A call and a partition of its tokens, cuts inside chunks included."""
    tokens = draw(st.integers(1, 14), label="tokens")
    cuts = draw(st.sets(st.integers(1, max(tokens - 1, 1)), max_size=5), label="cuts")
    inputs = random_inputs(
        draw(st.sampled_from([LINEAR, MLP]), label="spec"),
        batch=draw(st.integers(1, 2), label="batch"),
        tokens=tokens,
        heads=draw(st.integers(1, 2), label="heads"),
        chunk_size=draw(st.sampled_from([1, 3, 4, 16]), label="chunk_size"),
        theta=draw(st.sampled_from(["head", "layer"]), label="theta"),
        decay=draw(st.sampled_from(["head", "layer", "channel"]), label="decay"),
        momentum=draw(st.sampled_from([None, "head", "layer"]), label="momentum"),
        seed=draw(st.integers(0, 1000), label="seed"),
    )
    return inputs, sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})


def evaluate_in_pieces(inputs: MemoryInputs, cuts: list[int], impl: str) -> dict[str, torch.Tensor]:
    """`evaluate`, but the sequence is fed piece by piece and gradients run back through the carried state."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors().items()}
    inputs = inputs.map(lambda name, _: leaves[name])
    outputs, state = [], inputs.state
    for start, stop in itertools.pairwise(cuts):
        result = inputs.tokens(start, stop, state).run(impl)
        outputs.append(result.output)
        state = result.state
    results = named_results(result._replace(output=torch.cat(outputs, dim=1)))
    cotangents = random_cotangents(results, seed=0)
    gradients = torch.autograd.grad(
        [results[name] for name in cotangents],
        list(leaves.values()),
        list(cotangents.values()),
        allow_unused=True,
    )
    return {name: tensor.detach() for name, tensor in results.items()} | {
        f"grad {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


@both
@given(stream=streams())
def test_any_partition_of_the_sequence_gives_the_same(impl, stream):
    """Outputs, final state and gradients do not know where the sequence was cut."""
    inputs, cuts = stream
    assert_agreement(evaluate_in_pieces(inputs, cuts, impl), evaluate(inputs, impl))


@both
def test_one_token_at_a_time(impl):
    """Decoding, over three chunks."""
    inputs = random_inputs(MLP, tokens=11, chunk_size=4)
    assert_agreement(evaluate_in_pieces(inputs, list(range(12)), impl), evaluate(inputs, impl))


@both
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    channelwise=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_packed_documents_are_documents_alone(impl, lengths, channelwise, seed):
    inputs = random_inputs(
        MLP, documents=lengths, chunk_size=3, decay="channel" if channelwise else "head", seed=seed
    )
    packed = inputs.run(impl)
    start = 0
    for row, length in enumerate(lengths):
        state = inputs.state.select(torch.tensor([row]))
        if length:
            alone = replace(inputs.tokens(start, start + length, state), cu_seqlens=None).run(impl)
            torch.testing.assert_close(packed.output[:, start : start + length], alone.output)
            state = alone.state
        start += length
        mine = packed.state.select(torch.tensor([row]))
        for name in ("weights", "momentum", "anchor", "position"):
            torch.testing.assert_close(getattr(mine, name), getattr(state, name))


@both
def test_no_information_crosses_documents(impl):
    """Everything of the second document is replaced: the others keep their values and their gradients."""
    inputs = random_inputs(MLP, documents=[5, 6, 0, 3], chunk_size=4)
    other = random_inputs(MLP, documents=[5, 6, 0, 3], chunk_size=4, seed=1).tensors()

    def swap(name, tensor):
        if name.startswith("norm_"):
            return tensor
        changed = tensor.clone()
        chosen = (1,) if name.startswith("state.") else (slice(None), slice(5, 11))
        changed[chosen] = other[name][chosen]
        return changed

    before, after = evaluate(inputs, impl), evaluate(inputs.map(swap), impl)
    assert not torch.allclose(before["output"][:, 5:11], after["output"][:, 5:11])
    for name in before:
        if name == "output" or name.split()[-1].split("[")[0] in {"q", "k", "v", "theta", "log_decay"}:
            kept = torch.tensor([0, 1, 2, 3, 4, 11, 12, 13])
            assert_agreement(
                {name: after[name].index_select(1, kept)}, {name: before[name].index_select(1, kept)}, 1e-12
            )
        elif "norm_" not in name:
            rows = torch.tensor([0, 2, 3])
            if before[name].shape[0] == 4:
                assert_agreement({name: after[name][rows]}, {name: before[name][rows]}, 1e-12)


@both
@pytest.mark.parametrize("spec", [LINEAR, MLP], ids=["linear", "mlp"])
def test_no_token_sees_the_future(impl, spec):
    """Replacing every token from t on changes nothing before t, inside a chunk or at its edge."""
    inputs, other = (
        random_inputs(spec, tokens=13, chunk_size=4),
        random_inputs(spec, tokens=13, chunk_size=4, seed=1),
    )
    before = inputs.run(impl).output
    later = other.tensors()
    for t in range(1, 13):
        changed = inputs.map(
            lambda name, tensor, t=t: (
                torch.cat([tensor[:, :t], later[name][:, t:]], dim=1)
                if not name.startswith(("state.", "norm_"))
                else tensor
            )
        )
        after = changed.run(impl).output
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-13)
        assert not torch.allclose(after[:, t:], before[:, t:])


@both
@pytest.mark.parametrize("decay", ["layer", "channel"])
def test_rows_do_not_know_each_other(impl, decay):
    """A row alone, twice, or in another order: the same values and gradients."""
    inputs = random_inputs(MLP, batch=3, tokens=9, chunk_size=4, position=[0, 3, 1], decay=decay)
    together = evaluate(inputs, impl)
    for rows in ([1], [2, 0, 1], [0, 0]):
        chosen = torch.tensor(rows)
        # Equal cotangents row by row, so that gradients can be compared, too.
        leaves = {
            name: tensor.detach().requires_grad_() for name, tensor in inputs.rows(rows).tensors().items()
        }
        results = named_results(inputs.rows(rows).map(lambda name, _, leaves=leaves: leaves[name]).run(impl))
        cotangents = random_cotangents({name: together[name] for name in results}, seed=0)
        gradients = torch.autograd.grad(
            [results[name] for name in cotangents],
            list(leaves.values()),
            [cotangent[chosen] for cotangent in cotangents.values()],
        )
        actual = results | {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
        expected = {name: tensor[chosen] for name, tensor in together.items() if "norm_" not in name}
        assert_agreement(actual, expected)


@both
def test_heads_do_not_know_each_other(impl):
    inputs = random_inputs(MLP, heads=3, tokens=9, chunk_size=4, theta="layer", momentum="layer")
    order = torch.tensor([2, 0, 1])
    axis = {"state": 1, "norm_weight": 0, "norm_bias": 0}

    def permute(name, tensor):
        return tensor.index_select(axis.get(name.split(".")[0], 2), order)

    before, after = inputs.run(impl), inputs.map(permute).run(impl)
    torch.testing.assert_close(after.output, before.output[:, :, order])
    for name in ("weights", "momentum", "anchor"):
        for mine, theirs in zip(getattr(after.state, name), getattr(before.state, name), strict=True):
            torch.testing.assert_close(mine, theirs[:, order])


@both
@given(seed=st.integers(0, 1000), chunk_size=st.sampled_from([1, 4, 16]))
def test_with_step_zero_the_memory_only_decays(impl, seed, chunk_size):
    inputs = random_inputs(MLP, tokens=7, chunk_size=chunk_size, momentum=None, seed=seed)
    inputs = replace(inputs, theta=torch.zeros_like(inputs.theta))
    result = inputs.run(impl)
    kept = inputs.log_decay.cumsum(1).exp()
    for weight, start in zip(result.state.weights, inputs.state.weights, strict=True):
        torch.testing.assert_close(weight, kept[:, -1, :, None, None] * start)
    for t in range(7):
        weights = tuple(kept[:, t, :, None, None] * start for start in inputs.state.weights)
        read = read_memory(inputs.q[:, t : t + 1], weights, MLP, inputs.norm_weight, inputs.norm_bias)
        torch.testing.assert_close(result.output[:, t : t + 1], read)


@both
def test_forgetting_everything_forgets_everything(impl):
    """log_decay = log_momentum = -inf at a chunk's first token: nothing before it matters after it."""
    spec, cut = MLP, 8
    inputs = random_inputs(spec, tokens=14, chunk_size=4, position=[0, 0], theta="layer", decay="head")
    other = random_inputs(spec, tokens=14, chunk_size=4, position=[0, 0], theta="layer", seed=1).tensors()
    # The chunk's anchor is the memory just before the token, so the token before it forgets, too.
    for gate in (inputs.log_decay, inputs.log_momentum):
        gate[:, cut - 1] = gate[:, cut] = -torch.inf
    inputs.theta[:, cut - 1] = 0

    def swap(name, tensor):
        if name.startswith("norm_"):
            return tensor
        if name.startswith("state."):
            return other[name]
        return torch.cat([other[name][:, : cut - 1], tensor[:, cut - 1 :]], dim=1)

    before, after = inputs.run(impl), inputs.map(swap).run(impl)
    torch.testing.assert_close(after.output[:, cut:], before.output[:, cut:], rtol=0, atol=1e-13)
    assert not torch.allclose(after.output[:, : cut - 1], before.output[:, : cut - 1])
    assert_agreement(
        {name: t for name, t in named_results(after).items() if name != "output"},
        {name: t for name, t in named_results(before).items() if name != "output"},
        1e-12,
    )


@both
@pytest.mark.parametrize("spec", [LINEAR, MLP], ids=["linear", "mlp"])
def test_no_momentum_is_eta_zero_with_the_state_untouched(impl, spec):
    without = random_inputs(spec, tokens=9, chunk_size=4, momentum=None)
    zero = replace(without, log_momentum=torch.full_like(without.theta, -torch.inf))
    actual, expected = evaluate(without, impl), evaluate(zero, impl)
    for layer in range(spec.depth):
        name = f"momentum[{layer}]"
        assert torch.equal(actual[f"final {name}"], without.state.momentum[layer])
        # It passes through, and so does its gradient: the cotangent itself.
        cotangents = random_cotangents(
            {n: t for n, t in actual.items() if "grad" not in n and n != "final position"}, seed=0
        )
        assert torch.equal(actual[f"grad state.{name}"], cotangents[f"final {name}"])
    # What eta = 0 does to the momentum is another matter: leave its cotangent out.
    kept = [name for name in actual if "grad" not in name and "momentum" not in name]
    assert_agreement({n: actual[n] for n in kept}, {n: expected[n] for n in kept})
    for name, tensor in without.tensors().items():
        if "momentum" in name:
            continue
        gradients = []
        for inputs in (without, zero):
            leaf = tensor.detach().requires_grad_()
            result = inputs.map(lambda n, t, name=name, leaf=leaf: leaf if n == name else t).run(impl)
            loss = result.output.square().sum() + result.state.weights[0].sum()
            gradients.append(torch.autograd.grad(loss, leaf, allow_unused=True)[0])
        if gradients[0] is None or gradients[1] is None:  # the anchor in a row that starts a chunk
            assert all(gradient is None or not gradient.any() for gradient in gradients), name
        else:
            assert_agreement({name: gradients[0]}, {name: gradients[1]})


@both
def test_the_anchor_is_ignored_where_a_chunk_starts(impl):
    """Rows at position 0 do not read it and send it no gradient; the others do both."""
    inputs = random_inputs(MLP, tokens=3, chunk_size=4, position=[0, 2])
    before = evaluate(inputs, impl)
    assert not before["grad state.anchor[0]"][0].any()
    assert before["grad state.anchor[0]"][1].any()
    changed = inputs.map(lambda name, t: t + 1 if name.startswith("state.anchor") else t).run(impl)
    torch.testing.assert_close(changed.output[0], before["output"][0])
    assert not torch.allclose(changed.output[1], before["output"][1])


@both
@pytest.mark.parametrize("tokens", [2, 3, 4, 7])
def test_the_position_counts_tokens_and_the_anchor_follows(impl, tokens):
    inputs = random_inputs(MLP, tokens=tokens, chunk_size=4, position=[0, 1])
    state = inputs.run(impl).state
    assert state.position.tolist() == [tokens % 4, (tokens + 1) % 4]
    assert state.position.dtype == torch.int32
    for row, position in enumerate(state.position.tolist()):
        for anchor, weight in zip(state.anchor, state.weights, strict=True):
            assert torch.equal(anchor[row], weight[row]) == (position == 0)


@both
def test_gradients_of_all_rows_add_up_in_the_initial_weights(impl):
    """`MemoryState.initial` shares one learned memory; so does a one-row state expanded to the batch."""
    inputs = random_inputs(MLP, batch=3, tokens=6, chunk_size=4)
    learned = tuple(weight[0].clone().requires_grad_() for weight in inputs.state.weights)
    separate = tuple(weight.detach().expand(3, *weight.shape).clone().requires_grad_() for weight in learned)
    zeros = tuple(torch.zeros_like(weight) for weight in separate)
    states = {
        "initial": (MemoryState.initial(learned, batch=3), learned),
        "expanded": (MemoryState.initial(learned, batch=1).expand(3), learned),
        "separate": (MemoryState(separate, zeros, separate, torch.zeros(3, dtype=torch.int32)), separate),
    }
    gradients = {}
    for name, (state, leaves) in states.items():
        result = replace(inputs, state=state).run(impl)
        loss = result.output.square().sum() + sum(weight.sin().sum() for weight in result.state.weights)
        gradients[name] = torch.autograd.grad(loss, leaves)
    for layer in range(MLP.depth):
        expected = gradients["separate"][layer].sum(0)
        torch.testing.assert_close(gradients["initial"][layer], expected)
        torch.testing.assert_close(gradients["expanded"][layer], expected)
