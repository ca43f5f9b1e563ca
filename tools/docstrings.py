"""Docstrings of installed packages as JSON lines, a paragraph each: documentation to train on beside books.

python tools/docstrings.py numpy networkx sympy --out runs/recall/docstrings.jsonl
"""

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Options:
    """packages: whose sources are read, none is run. out: the file to make."""

    packages: tyro.conf.Positional[tuple[str, ...]]
    out: Path = Path("runs/recall/docstrings.jsonl")


def paragraphs(package: str) -> Iterator[str]:
    """Of the package's modules, classes and functions, file by file in their order."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"packages: expected installed packages, got {package!r}")
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from filter(None, (ast.get_docstring(node) or "").split("\n\n"))


def main(options: Options) -> None:
    seen: set[str] = set()
    with options.out.open("w", encoding="utf-8") as file:
        for package in options.packages:
            for paragraph in paragraphs(package):
                if paragraph not in seen:
                    seen.add(paragraph)
                    file.write(json.dumps({"text": paragraph}, ensure_ascii=False) + "\n")
    print(f"{options.out}: {len(seen):,} paragraphs, {sum(map(len, seen)) / 1e6:.1f} M characters")


if __name__ == "__main__":
    main(tyro.cli(Options))
