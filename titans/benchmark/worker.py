"""What the fresh process of a benchmark does: build each row's step, time it, watch its memory.

Run as a file by `harness.py`, perhaps under a peer's interpreter: nothing but torch is needed.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Modules whose distributions are named in a row that imported them.
PEERS = {"titans_pytorch": "titans-pytorch", "fla": "fla-core", "triton": "triton"}


def main(order: dict[str, Any]) -> None:
    """Print one marked line per row. Ends early only where the process can no longer be used."""
    import torch

    torch.set_num_threads(order["threads"])
    failed: Exception | None = None
    try:
        script = load_script(order["script"])
    except Exception as error:
        failed = error
    gc.freeze()  # what was imported need not be searched for garbage after every row: 0.1 s
    for workload, settings, repeats, warmup in order["jobs"]:
        torch.manual_seed(order["seed"])
        try:
            if failed is not None:
                raise failed
            outcome = measure(getattr(script, workload), settings, repeats, warmup)
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
        print(f"row {json.dumps(outcome)}", flush=True)
        gc.collect()
        if settings.get("device") == "cuda":
            torch.cuda.synchronize()  # raises where the error has cost this process its GPU
            torch.cuda.empty_cache()


def load_script(path: str) -> ModuleType:
    """The workloads, which may import parts of titans.

    `import titans` brings transformers along, for seconds, and a peer's interpreter may lack it: a package
    without its `__init__` stands in. Workloads that need the models import those.
    """
    sys.path[0] = str(ROOT)  # titans from where this file is, and nothing from this file's own folder
    titans = ModuleType("titans")
    titans.__path__ = [str(ROOT / "titans")]
    sys.modules["titans"] = titans
    return load_file("workloads", Path(path))


def load_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def measure(
    workload: Callable[[dict[str, Any]], Callable[[], object]],
    settings: dict[str, Any],
    repeats: int,
    warmup: int,
) -> dict[str, Any]:
    """Warm-up, then `repeats` steps. A step may have `facts`, a dictionary of what it found out."""
    on_gpu = settings.get("device") == "cuda"
    start = time.perf_counter()
    step = workload(settings)
    for number in range(warmup):
        step()
        if number == 0:
            if on_gpu:
                _wait_for_gpu()
            first_seconds = time.perf_counter() - start
    seconds, peak = (time_on_gpu if on_gpu else time_on_cpu)(step, repeats)
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "versions": versions(),
        "first_seconds": first_seconds if warmup else time.perf_counter() - start,
        "facts": getattr(step, "facts", {}),
    }


def time_on_cpu(step: Callable[[], object], repeats: int) -> tuple[list[float], int]:
    before = _resident("VmRSS")
    _forget_peak()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds, max(_resident("VmHWM") - before, 0)


def time_on_gpu(step: Callable[[], object], repeats: int) -> tuple[list[float], int]:
    """Events around each step, after a buffer as large as the L2 was zeroed: inputs come from memory.

    Nothing waits between steps, so launching is counted only where it takes longer than the kernels. Peak
    memory is that of the timed steps alone: autotuners allocate buffers of their own in the first one.
    """
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cache = torch.empty(properties.L2_cache_size, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    events = []
    for _ in range(repeats):
        cache.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 for start, end in events]
    return seconds, torch.cuda.max_memory_allocated() - before


def _wait_for_gpu() -> None:
    import torch

    torch.cuda.synchronize()


def versions() -> dict[str, str]:
    import torch

    found = {"torch": str(torch.__version__)}
    for module, distribution in PEERS.items():
        if module in sys.modules:
            try:
                found[distribution] = version(distribution)
            except PackageNotFoundError:  # a folder on the path, not an installed distribution
                found[distribution] = str(getattr(sys.modules[module], "__version__", "unknown"))
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM (the high-water mark) of this process."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(rf"{field}:\s*(\d+) kB", status.read_text())):
        return int(found.group(1)) * 1024
    import resource  # no /proc: the high-water mark since the start is all there is

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Set the high-water mark back to what is resident now (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
