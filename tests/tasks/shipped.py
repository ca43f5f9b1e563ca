"""Checkpoints with the tokenizer of the tiny haystack and weights that know nothing."""

import json
from pathlib import Path
from typing import Any

from tests.inference.tiny import randomised
from tests.tasks.tiny import tiny_haystack
from titans.data.tokenizer import save_tokenizer
from titans.models import TitansForCausalLM


def tiny_model(variant: str, seed: int = 0) -> TitansForCausalLM:
    """For the tiny haystack's ids, in float32."""
    sizes = {"vocab_size": 384, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    return randomised(variant, seed, **sizes, num_persistent_tokens=0, memory_step_gate="hard").float()


def tiny_checkpoint(folder: Path, variant: str = "mag", seed: int = 0) -> Path:
    tiny_model(variant, seed).save_pretrained(folder)
    save_tokenizer(tiny_haystack().tokenizer, folder)
    return folder


def benchmark_record(model: str = "needle_mag", seed: int = 0) -> dict[str, Any]:
    """As benchmarks/recall.py writes it: two lengths, two depths of each, and rows of another model."""
    training = {
        "kind": "training",
        "recipe": {
            "model": {"variant": "mag"},
            "data": {"tasks": ["niah_single_1"], "lengths": [256, 512], "haystack": "where/it/was.npz"},
        },
        "parameters": 12345,
        "steps": 100,
        "tokens": 6789,
        "seconds": 12.0,
    }
    tests = [
        {
            "kind": "test",
            "task": "niah_single_1",
            "length": length,
            "depth_from": depth / 2,
            "depth_to": (depth + 1) / 2,
            "samples": 8,
            "correct": 7 - depth,
            "model_tokens": 2 * length,
        }
        for length in (1024, 2048)
        for depth in (0, 1)
    ]
    rows = [{"model": model, "seed": seed} | row for row in (training, *tests)]
    other = [{"model": "needle_other", "seed": seed} | row | {"correct": 0} for row in tests]
    record = {
        "command": "python benchmarks/recall.py --seeds 0",
        "commit": "0123456789ab",
        "date": "2025-11-25T00:00:00+00:00",
        "machine": {"cpu": "a CPU", "system": "Linux 6.1", "gpu": {"name": "a card"}},
        "rows": [*other, *rows, {"kind": "failed", "run": "needle_other, seed 9", "error": "x"}],
    }
    return json.loads(json.dumps(record))
