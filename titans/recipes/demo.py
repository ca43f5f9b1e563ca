"""The run behind ``titans demo`` and ``make demo``."""

from pathlib import Path

from titans.training.recipe import DataSettings, ModelSettings, Recipe, TrainingSettings


def demo_mac() -> Recipe:
    """Memory as context, 1-2 M parameters, bytes of CPython's documentation: minutes on two CPU cores."""
    return Recipe(
        model=ModelSettings(
            size="tiny",
            variant="mac",
            segment_size=64,
            num_persistent_tokens=8,
        ),
        data=DataSettings(folder=Path("runs/demo/data"), sequence_length=256),
        training=TrainingSettings(
            steps=300,
            batch_size=8,
            learning_rate=3e-3,
            warmup_steps=30,
            eval_every=100,
            eval_sequences=32,
            save_every=100,
        ),
    )
