"""A small model from nothing to a long stream, in minutes on two CPU cores."""

from pathlib import Path

from titans.training.recipe import DataSettings, ModelSettings, Recipe, TrainingSettings


def demo_mac() -> Recipe:
    """Memory as context, 1.4 M parameters, bytes of CPython's documentation: minutes on two CPU cores."""
    return Recipe(
        # Wide and shallow: on a CPU the memories cost three times what all matrices cost, and two blocks of
        # 6 heads x (32 -> 64 -> 32) take half the time of four blocks of 4 heads x (32 -> 128 -> 32).
        model=ModelSettings(
            size="tiny",
            variant="mac",
            hidden_size=192,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=512,
            memory_head_dim=32,
            memory_expansion=2,
        ),
        data=DataSettings(folder=Path("runs/data/python-docs"), sequence_length=256),
        # Many small steps: with 100,000 tokens in all, 200 steps of 512 reach a loss that 100 steps of 1,024
        # do not (2.21 and 2.54 nats per byte).
        training=TrainingSettings(
            steps=400,
            batch_size=2,
            learning_rate=2e-3,  # at 3e-3 the gradient's norm reached 1,000 now and then; here 19
            warmup_steps=30,
            eval_every=100,
            eval_sequences=32,
            save_every=100,
        ),
    )
