"""Trained checkpoints that come with the package: a name stands for a folder of `titans/checkpoints`."""

from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "checkpoints"


def shipped_names() -> list[str]:
    """Their names, sorted."""
    if not SHIPPED.is_dir():
        return []
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / "config.json").is_file())


def resolved(path: str | Path) -> Path:
    """`path` itself where there is such a folder or no shipped checkpoint of that name, else its folder."""
    if not Path(path).is_dir() and str(path) in shipped_names():
        return SHIPPED / str(path)
    return Path(path)
