"""The page: one HTML file with everything in it, from `template/` and the figures."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import string
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from titans.inspection.ablate import Dependence
from titans.inspection.record import Record
from titans.inspection.tokens import visible

SCRIPTS = ("data.js", "text.js", "charts.js", "page.js")
# Values of one kind that a page may hold before neighbouring tokens share their mean: it stays below 50 MB.
# 24 blocks x 16 heads x 50,000 tokens are 19 million surprises.
SURPRISE_BUDGET = 20_000_000
GATE_BUDGET = 6_000_000
DEPENDENCE_BUDGET = 6_000_000

Array = npt.NDArray[np.floating]


@dataclass(frozen=True)
class About:
    """What was inspected, in words: shown on the page and above the figures.

    source: what was read; summary: the model's and the text's sizes on one line; left_out: what was not read,
    or ""; command: what makes this page again.
    """

    source: str
    model: str
    summary: str
    left_out: str
    command: str
    version: str
    chunk: int

    @property
    def title(self) -> str:
        return f"The memory at work: {self.source}"


def render(about: About, texts: list[str], record: Record, dependence: Dependence | None) -> str:
    """The page. `texts` are the tokens' (`token_texts`); what they hold is shown, never executed.

    They reach the page as JSON without a `<` and are put into it as text nodes; the page's own policy allows
    no script but the one whose hash it names, and no request at all.
    """
    style = template("page.css")
    script = '"use strict";\n(() => {\n' + "\n".join(map(template, SCRIPTS)) + "})();\n"
    data = _data(texts, record, dependence)
    words = {name: html.escape(visible(str(value))) for name, value in vars(about).items()}
    return string.Template(template("page.html")).substitute(
        words,
        title=html.escape(visible(about.title)),
        policy=f"default-src 'none'; style-src '{content_hash(style)}'; script-src '{content_hash(script)}'",
        style=style,
        data=to_script(data),
        script=script,
        surprise_bin=_bin_note(data["surprise"]["bin"]),
        gate_bin=_bin_note(data["theta"]["bin"]),
        dependence_bin="" if dependence is None else _bin_note(data["prediction"]["bin"]),
    )


def to_script(value: Any) -> str:
    """JSON that may stand inside a `<script>` element: ASCII, and neither `</script` nor `<!--` in it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def quantise(values: Array, *, bits: int = 8, log: bool = False, bin: int = 1) -> dict[str, Any]:
    """Values `[..., T]` as codes of 8 or 16 bits, each row between its own smallest and largest value.

    log: code 0 is zero, the others are spaced by equal factors over at most six decades.
    bin: so many neighbours share their mean.
    """
    if bin > 1:
        starts = np.arange(0, values.shape[-1], bin)
        sizes = np.diff([*starts, values.shape[-1]])
        values = np.add.reduceat(values, starts, axis=-1, dtype=np.float64) / sizes
    rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
    top = 2**bits - 1
    high = rows.max(-1, keepdims=True)
    if log:
        positive = np.where(rows > 0, rows, np.inf).min(-1, keepdims=True)
        low = np.maximum(np.where(np.isfinite(positive), positive, 1), high * 1e-6)
        high = np.maximum(high, low)
        decades = np.maximum(np.log(high / low), 1e-9)
        codes = 1 + np.log(np.maximum(rows, low) / low) / decades * (top - 1)
        codes = np.where(rows < low * 0.999, 0, codes)
    else:
        low = rows.min(-1, keepdims=True)
        codes = (rows - low) / np.where(high > low, high - low, 1) * top
    packed = np.rint(codes).astype("<u1" if bits == 8 else "<u2")
    return {
        "shape": list(values.shape),
        "bits": bits,
        "log": log,
        "bin": bin,
        "low": _short(low),
        "high": _short(high),
        "codes": base64.b64encode(packed.tobytes()).decode("ascii"),
    }


def _data(texts: list[str], record: Record, dependence: Dependence | None) -> dict[str, Any]:
    gates = {"theta": record.theta, "alpha": record.alpha, "eta": record.eta}
    known = {name: gate for name, gate in gates.items() if gate is not None}
    bin = _bin(sum(gate.size for gate in known.values()), GATE_BUDGET)
    data: dict[str, Any] = {
        "tokens": [visible(text) for text in texts],
        "surprise": quantise(record.surprise, log=True, bin=_bin(record.surprise.size, SURPRISE_BUDGET)),
        **{name: quantise(gate, bin=bin) for name, gate in known.items()},
        "change": quantise(record.change / record.initial_norm[..., None], bits=16),
        "changeAt": record.change_at.tolist(),
        "loss": quantise(record.loss[None], bits=16),
        "frozenLoss": quantise(record.frozen_loss[None], bits=16),
        "meanLoss": [float(record.loss.mean()), float(record.frozen_loss.mean())],
    }
    if dependence is not None:
        bin = _bin(dependence.retrieval.size + dependence.prediction.size, DEPENDENCE_BUDGET)
        data["spans"] = [list(span) for span in dependence.spans]
        data["retrieval"] = quantise(dependence.retrieval, log=True, bin=bin)
        data["prediction"] = quantise(dependence.prediction, log=True, bin=bin)
        data["gain"] = _short(dependence.gain)
    return data


def _bin(values: int, budget: int) -> int:
    return -(-values // budget)


def _bin_note(bin: int) -> str:
    return "" if bin == 1 else f"To keep the page small, {bin} neighbouring tokens share their mean."


def _short(values: Array) -> list[float]:
    return [float(f"{value:.6g}") for value in values.ravel().tolist()]


def template(name: str) -> str:
    """A file of `template/`."""
    return files("titans.inspection").joinpath("template", name).read_text(encoding="utf-8")


def content_hash(text: str) -> str:
    """As a page's policy names the styles and scripts that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
