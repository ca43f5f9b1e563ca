"""Resolves requirements.lock anew: ``make lock``.

One file for every platform and Python 3.11 or later, with exact pins and no index or address in it. The
resolver is uv, in an environment of its own that goes away. torch's CUDA packages and Triton are left out:
which of them fit is a property of the torch build (CPU builds have none), and pip takes them from torch's own
metadata. Where torch brought no Triton, `make setup` adds the one of the Makefile, for the kernels' tests.
"""

import re
import subprocess
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
EXTRAS = ("data", "plots", "sentencepiece", "tensorboard")
LEFT_TO_TORCH = re.compile(r"^(nvidia-|cuda-|triton==)")
HEADER = """\
# Everything that running, testing and checking need, by exact version; made by `make lock`, not by hand.
# torch's CUDA packages are not pinned here: pip takes those that the torch build asks for.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        resolved = Path(folder) / "resolved.txt"
        command = [
            python,
            "-m",
            "uv",
            "pip",
            "compile",
            "pyproject.toml",
            "--output-file",
            str(resolved),
        ]
        command += ["--quiet", "--universal", "--python-version", "3.11", "--group", "dev", "--upgrade"]
        # One version for every Python where there is one, so that what is tested on 3.11 is what 3.12 gets.
        command += ["--fork-strategy", "fewest"]
        command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        command += [part for extra in EXTRAS for part in ("--extra", extra)]
        subprocess.run(command, cwd=ROOT, check=True)
        pins = [line for line in resolved.read_text().splitlines() if not LEFT_TO_TORCH.match(line)]
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")
    print(f"{LOCK.name}: {len(pins)} packages")


if __name__ == "__main__":
    main()
