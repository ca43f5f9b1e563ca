"""Every variant's block is one graph for torch.compile: a break costs a launch-bound model its speed."""

import pytest
import torch

from titans.models import VARIANTS, TitansConfig
from titans.models.modeling import TitansBlock


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_is_one_graph(variant):
    config = TitansConfig.named("tiny", variant=variant, vocab_size=259)
    block = TitansBlock(config)
    hidden = torch.randn(2, 48, config.hidden_size)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    expected, _ = block(hidden)
    torch.testing.assert_close(compiled(hidden)[0], expected)
