"""Every variant's block is one graph for torch.compile: a break costs a launch-bound model its speed."""

import pytest
import torch

from titans.models import VARIANTS, TitansConfig
from titans.models.modeling import TitansBlock
from titans.nn.memory import MemoryCore


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
