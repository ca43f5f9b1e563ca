"""What every test gets: one thread, a fixed seed, no network, and the real data where there are any."""

import os
from pathlib import Path

# Before torch and transformers are imported, and inherited by the processes that tests start.
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests run side by side (`make test`); also makes sums reproducible
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)
# Without a GPU the kernels run in Triton's interpreter; @triton.jit asks when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline: a first call warms up. In CI the same examples every time, so that red means a change.
settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def rng() -> torch.Generator:
    """A CPU generator of a test's own, for draws that must not depend on the global state."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: TITANS_DATA, or ``shared/data`` beside the checkout; skips without one."""
    named = os.environ.get("TITANS_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data: {folder} is no folder (set TITANS_DATA)")
    return folder
