"""The page of results says what the result files say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_results_page_is_generated_from_the_results():
    """A figure edited by hand, or a new measurement that the page does not show."""
    command = [sys.executable, "benchmarks/report.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_result_of_the_gpu_has_its_section():
    """A target missed is bold, a peer that failed says why: neither may get lost on the way to the page."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    entry = {"row": "mlp1-c64", "batch": 4, "tokens": 8192, "heads": 16, "dim": 64, "error": None}
    entry |= {"forward_ms": 1.0, "both_ms": 4.5, "ratio": 1.5, "graph_ms": 3.5, "graph_ratio": 2.5}
    entry |= {"peak_gb": 2.0, "peak_ratio": None}
    entry["targets"] = [{"what": "time", "limit": 1.25, "value": 1.5, "met": False}]
    times = ("forward_ms", "both_ms", "ratio", "graph_ms", "graph_ratio")
    failed = dict.fromkeys((*times, "peak_gb", "peak_ratio"))
    failed |= {
        "row": "gated-deltanet",
        "error": "gated_deltanet {'a': 1}: ImportError: no fla",
        "targets": [],
    }
    summary = {"table": [entry, entry | failed], "copy_terabytes_per_second": 4.2}
    page = report.ops_on_a_gpu(json.loads(json.dumps({"options": {"tokens": 32768}, "summary": summary})))
    assert "| mlp1-c64 | B4 T8192, 16 x 64 | 1.00 | 4.50 | 1.50 | 3.50 | 2.50 | 2.00 |  |" in page
    assert "| time 1.50, at most 1.25: **missed** |" in page
    assert "failed: ImportError: no fla" in page
    assert "4.20 TB/s" in page
