"""The house rules that a machine can check. Each test names the rule it keeps; CONTRIBUTING.md says why."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "titans"

# A part may import the parts of lower layers, and its neighbours as long as that makes no cycle.
LAYERS = [
    ("errors", "files"),
    ("ops",),
    ("nn", "testing"),
    ("models",),
    ("data", "training", "evaluation", "tasks", "inference", "recipes", "benchmark", "inspection"),
    ("cli",),
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def files_of_the_project() -> list[Path]:
    """Tracked files and those about to be: what git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip(f"needs a git checkout: {listing.stderr.strip()}")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Full names that ``path`` imports anywhere, in functions too; ``from a import b`` gives ``a.b``."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str | None:
    """The part of the package that ``module`` belongs to; None outside it and for ``titans`` itself."""
    names = module.split(".")
    return names[1] if names[0] == "titans" and len(names) > 1 and names[1] in RANK else None


def dependencies_between_parts() -> dict[str, dict[str, Path]]:
    """part -> the parts that it imports, each with one file that does."""
    found: dict[str, dict[str, Path]] = {part: {} for part in RANK}
    for path in PACKAGE.rglob("*.py"):
        part = part_of(module_name(path))
        for module in imported_modules(path) if part else ():
            if (other := part_of(module)) and other != part:
                found[part][other] = path
    return found


def test_every_part_of_the_package_has_its_layer():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert parts - {"__init__", "__main__"} <= set(RANK), "add the new part to LAYERS"


def test_imports_go_downwards():
    for part, others in dependencies_between_parts().items():
        for other, path in others.items():
            assert RANK[other] <= RANK[part], f"{path.relative_to(ROOT)}: {part} must not import {other}"


def test_no_two_parts_import_each_other_in_a_circle():
    graph = {part: set(others) for part, others in dependencies_between_parts().items()}
    while leaves := {part for part, others in graph.items() if not others}:
        graph = {part: others - leaves for part, others in graph.items() if part not in leaves}
    assert not graph, f"circular imports among {graph}"


def test_ops_and_layers_need_torch_alone():
    """Someone must be able to lift titans.ops and titans.nn into another code base."""
    allowed = {"torch", "triton", "titans", "numpy", *sys.stdlib_module_names}
    for part in ("ops", "nn"):
        for path in (PACKAGE / part).rglob("*.py"):
            foreign = {module.partition(".")[0] for module in imported_modules(path)} - allowed
            assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_ops_import_without_triton():
    """On a machine without a GPU the package must import: None in sys.modules is Python's "not installed"."""
    program = "import sys; sys.modules['triton'] = None; import titans.ops; print(titans.ops.__name__)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "titans.ops", run.stderr


def test_files_stay_short():
    """Under 600 lines each, kernels too."""
    for path in files_of_the_project():
        if path.suffix == ".py":
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines < 600, f"{path.relative_to(ROOT)} has {lines} lines"


def test_nothing_of_one_machine_is_committed():
    """Paths of the machine where something was made, and addresses of package indexes (pip knows its own).

    The patterns are written so that this file does not match itself.
    """
    hosts = [
        r"pypi\.or[g]",
        r"pythonhosted\.or[g]",
        r"download\.pytorch\.or[g]",
        r"anaconda\.or[g]",
        r"npmjs\.or[g]",
    ]
    paths = [r"/wor[k]/", r"/hom[e]/\w+/", r"/User[s]/\w+/", r"/roo[t]/"]
    pattern = re.compile("|".join(hosts + paths).encode())
    for path in files_of_the_project():
        if match := pattern.search(path.read_bytes()):
            raise AssertionError(f"{path.relative_to(ROOT)} contains {match.group().decode()!r}")


def locked_versions() -> dict[str, list[Requirement]]:
    """Name -> its lines in the lock file (several when Pythons or platforms differ)."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked: dict[str, list[Requirement]] = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        locked.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return locked


def test_the_lock_holds_exact_versions_and_no_addresses():
    for name, requirements in locked_versions().items():
        for requirement in requirements:
            assert requirement.url is None, f"{name} is locked to an address"
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), (
                f"{name} is not locked to one version"
            )


def test_the_lock_satisfies_the_project():
    """A dependency added to pyproject.toml without `make lock` would pass here and fail in a fresh clone."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = described["project"]["optional-dependencies"]
    wanted = [*described["project"]["dependencies"], *described["dependency-groups"]["dev"]]
    wanted += [need for extra in ("data", "plots", "sentencepiece", "tensorboard") for need in extras[extra]]
    locked = locked_versions()
    for need in map(Requirement, wanted):
        versions = locked.get(canonicalize_name(need.name))
        assert versions, f"{need.name} is not in requirements.lock: run `make lock`"
        for version in versions:
            pinned = str(version.specifier).removeprefix("==")
            assert need.specifier.contains(pinned), (
                f"requirements.lock has {version}, pyproject.toml wants {need}"
            )


def test_the_installed_package_is_this_one():
    """The console script and the version that an installed user sees come from this checkout's files."""
    try:
        installed = importlib.metadata.distribution("titans-ltm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("titans-ltm is not installed in this environment (`make setup` does)")
    scripts = {entry.name: entry.value for entry in installed.entry_points}
    assert scripts == {"titans": "titans.cli.main:main"}
    version = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert version is not None
    assert installed.version == version.group(1)
