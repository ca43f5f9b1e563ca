"""Every variant's block is one graph for torch.compile: a break costs a launch-bound model its speed."""

import copy

import pytest
import torch
import torch._dynamo.utils

from titans.models import VARIANTS, TitansConfig, TitansForCausalLM
from titans.models.modeling import TitansBlock
from titans.nn.memory import MemoryCore

# The compiler looks at .grad of what a block is given.
LOOKS_AT_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.mark.parametrize("switches", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_is_one_graph(variant, switches):
    config = TitansConfig.named(
        "tiny",
        variant=variant,
        vocab_size=259,
        memory_read_before_write=switches,
        memory_forget_per_channel=switches,
    )
    block = TitansBlock(config, 0)
    hidden = torch.randn(2, 48, config.hidden_size)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    expected, _ = block(hidden)
    torch.testing.assert_close(compiled(hidden)[0], expected)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_block_with_kernels_is_one_graph(depth):
    """Which kernels cover a call must be decided without anything that torch.compile cannot trace."""
    config = TitansConfig.named(
        "tiny",
        variant="lmm",
        vocab_size=259,
        hidden_size=32,
        num_attention_heads=2,
        memory_head_dim=16,
        memory_depth=depth,
        memory_expansion=1,
    )
    block = TitansBlock(config, 0)
    for module in block.modules():
        if isinstance(module, MemoryCore):
            module.impl = "triton"
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled(torch.randn(1, 20, 32))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@LOOKS_AT_GRAD
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_blocks_are_the_blocks(variant):
    """Forward and gradients; a copy made afterwards has weights of its own."""
    config = TitansConfig.named("tiny", variant=variant, vocab_size=259, hidden_size=32, segment_size=32)
    model = TitansForCausalLM(config)
    ids = torch.randint(256, (2, 96))
    expected = model(ids, labels=ids).loss
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    torch._dynamo.reset()
    model.compile_blocks(backend="eager")
    copied = copy.deepcopy(model)
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    copied(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())


@LOOKS_AT_GRAD
def test_segments_of_mac_are_compiled_once():
    """Unrolled, a block takes the compiler as long as it has segments: minutes."""
    config = TitansConfig.named("tiny", variant="mac", vocab_size=259, num_hidden_layers=2, segment_size=16)
    graphs = []
    for tokens in (64, 160):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = TitansForCausalLM(config)
        model.compile_blocks(backend="eager")
        model(torch.randint(256, (1, tokens)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 4
