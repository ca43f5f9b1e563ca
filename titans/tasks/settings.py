"""What to train on: tasks of recall, at many lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from titans.errors import UserError
from titans.training.recipe import DataSource, TrainingSettings, at_least

if TYPE_CHECKING:
    from titans.training.data import TrainingData

TOKEN_TASKS = ("mqar", "selective_copy")


@dataclass(frozen=True, kw_only=True)
class TaskSettings(DataSource):
    """Batches of tasks, each batch of one length. A batch is one sequence to ``training.batch_size``."""

    tasks: tuple[str, ...]
    """Needle tasks (niah_single_1, ...) together, BABILong's (babilong_qa1, ...) together, or one of mqar and
    selective_copy."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Tokens of a row; each batch draws one of these."""
    tokens_per_batch: int = 65536
    """Rows times length."""
    curriculum_steps: int = 0
    """Batches over which the lengths drawn from grow from the shortest to all; 0: all from the first on."""
    validation_batches: int = 5
    """Batches to evaluate on, always the same, of all lengths by turns."""
    haystack: Path | None = None
    """Sentences for needle and BABILong tasks (titans haystack makes the file)."""
    babi: Path | None = None
    """bAbI's archive or folder, for BABILong tasks: its train files."""
    keys: int = 8
    """Keys hidden in a row at most, where the task asks for no more. Of BABILong: stories told in a row."""
    questions: int = 8
    """Questions in a row at most; of BABILong: about a story."""
    dense: float = 0.75
    """Share of a row that its needles and questions beyond the first may take, at most."""
    middle: float = 0.5
    """Share of these questions that are asked within the haystack."""
    decoys: float = 0.0
    """Share of a row's haystack that sentences may take, at most, which have something of a fact but are
    none: numbers, or words of BABILong's stories and parts of their facts."""
    mined: Path | None = None
    """Sentences that an earlier leg's model writes (benchmarks/mine.py makes the file): every other decoy."""
    vocab_size: int = 8192
    """Of mqar and selective_copy."""
    pairs: tuple[int, ...] = (32,)
    """Of mqar; tokens to be copied in selective_copy. Each batch draws one of these, of at most one for 4
    tokens, or has so many."""
    noise: bool = True
    """Of mqar: whether what is neither pair nor question are random tokens, keys with other values among
    them; else they are all 0, as in Zoology's figure 2."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tokens_per_batch", "validation_batches", "keys", "questions")
        at_least(self, 0, "curriculum_steps", "dense", "middle", "decoys")
        if not self.pairs or min(self.pairs) < 1:
            raise UserError(f"data.pairs: expected numbers of at least 1, got {self.pairs}")
        if not self.tasks or not self.lengths or list(self.lengths) != sorted(self.lengths):
            raise UserError(
                f"data: expected at least one task and ascending lengths, got {self.tasks} and {self.lengths}"
            )
        if self.mined is not None and not self.decoys:
            raise UserError("data.mined: expected data.decoys above 0, got 0")
        for name in ("dense", "middle", "decoys"):
            if (share := getattr(self, name)) > 1:
                raise UserError(f"data.{name}: expected at most 1, got {share}")

    @property
    def of_tokens(self) -> bool:
        """Whether this is a task of tokens that are no text."""
        return bool(set(self.tasks) & set(TOKEN_TASKS))

    @property
    def of_babi(self) -> bool:
        """Whether BABILong's are among the tasks."""
        return any(name.startswith("babilong_") for name in self.tasks)

    def open(self, training: TrainingSettings) -> TrainingData:
        from titans.tasks.dataset import open_tasks

        return open_tasks(self, training)
