"""Several runs of `titans bench stream` as one: models that were measured side by side, each on a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans.benchmark.harness import comparable, result_of
from titans.benchmark.stream_rows import CPU_MODEL, ROWS, Found, Plan, summarise
from titans.errors import UserError
from titans.models import SIZES


def merge(paths: Sequence[Path]) -> tuple[dict[str, Any], Plan]:
    """The record that one run of all would have stored, but for its command, and the plan of that run.

    Of two measurements of one row the later file's is kept, and said so; a failure never replaces one.

    Raises:
        UserError: a file cannot be read, or they come from different commits or machines.
    """
    records = [_read(path) for path in paths]
    for what, of in (
        ("commit", lambda record: record["commit"]),
        ("machine", lambda record: comparable(record["machine"])),
    ):
        for path, record in zip(paths, records, strict=True):
            if of(record) != of(records[0]):
                raise UserError(f"{path}: its {what} is {of(record)}, that of {paths[0]} {of(records[0])}")
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path, record in zip(paths, records, strict=True):
        for row in record["rows"]:
            key = _place(path, row)
            if "error" in row and key in kept:
                continue
            if key in kept and "error" not in kept[key]:
                print(f"measured twice, taken from {path}: {_named(key)}", flush=True)
            kept[key] = row
    if not kept:
        raise UserError(f"{paths[0]}: no rows to merge")
    rows = [kept[key] for key in sorted(kept)]
    found: Found = {_named(key): result_of(kept[key]) for key in sorted(kept)}
    settings = [row["settings"] for row in rows]
    small = () if any(each["config"] in ROWS.values() for each in settings) else tuple(CPU_MODEL.items())
    plan = Plan(
        settings[0]["device"],
        tuple(dict.fromkeys(each["size"] for each in settings)),
        tuple(sorted({each["tokens"] for each in settings})),
        tuple(sorted({each["batch"] for each in settings if "batch" in each})),
        small,
    )
    merged = dict(records[0])
    merged |= {"date": max(record["date"] for record in records), "rows": rows}
    merged["options"] = {
        "rows": list(dict.fromkeys(row for row, *_ in found)),
        "device": plan.device,
        "sizes": plan.sizes,
        "lengths": plan.lengths,
        "batches": plan.batches,
    }
    merged["summary"] = {"table": summarise(found, plan)}
    merged["merged"] = [{"command": record["command"], "date": record["date"]} for record in records]
    return merged, plan


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a file of titans bench stream: {error}") from error
    return record


def _place(path: Path, row: dict[str, Any]) -> tuple[Any, ...]:
    """In the order in which one run measures: size, row, tokens, batch (0: prefill)."""
    settings = row["settings"]
    for number, fields in enumerate(ROWS.values()):
        if settings["config"] in (fields, CPU_MODEL | fields):
            return list(SIZES).index(settings["size"]), number, settings["tokens"], settings.get("batch", 0)
    raise UserError(f"{path}: a row of no model that is measured now: {settings['config']}")


def _named(place: tuple[Any, ...]) -> tuple[str, str, str, int, int]:
    size, number, tokens, batch = place
    return list(ROWS)[number], list(SIZES)[size], "decode" if batch else "prefill", batch, tokens
