"""The README.md of a shipped checkpoint, its figures taken from the rows of benchmarks/recall.py."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

Row = dict[str, Any]

_CARD = """---
license: apache-2.0
language: en
library_name: titans-ltm
tags: [titans, long-context, memory]
---
# {name}

A model of {parameters:,} parameters ({variant}), trained to find needles: facts hidden in a long text and
asked for at its end. It is small and can do nothing else; what it writes besides answers is no language.
Weights: Apache-2.0.

```python
import titans

model, tokenizer, folder = titans.from_pretrained("{name}")
```

After `import titans`, transformers' `AutoModelForCausalLM` and `AutoTokenizer` load this folder, too. The
file holds bfloat16 (gates and initial memory float32); the model is loaded in float32.

## Data

Sentences of public-domain books of Project Gutenberg, of English Wikipedia (CC BY-SA 3.0) and of docstrings
of NumPy, NetworkX, SymPy, Matplotlib, PyTorch and Transformers (`tools/docstrings.py`; under their own free
licences) with needles of RULER's form (arXiv:2404.06654), generated while training: {tasks},
rows of {lengths} tokens. The tokenizer is a byte-level BPE of {vocabulary:,} ids of the same texts
and of bAbI's train stories (`titans haystack --babi`). Tests are made of other books.

## Training

{before}Seed {seed}, {steps:,} steps, {tokens:,} tokens, {seconds:,.0f} s on {device}. Recipe `{model}`:

```json
{recipe}
```

## Tests

Samples answered of those asked, to the last character and by the likeliest tokens alone, needles at all
depths together. Lengths are those of the test; in this model's own tokens a text is longer ({ratio}).

{table}

By depth of the needle, all tasks together:

{depths}

From `{command}`, commit {commit}, {date}, {machine}.
"""


def card(
    name: str,
    model: str,
    seed: int,
    vocabulary: int,
    record: Row,
    rows: list[Row],
    before: tuple[Row, Row] | None = None,
) -> str:
    """vocabulary: ids of the tokenizer. record: the JSON file. rows: those of this model and seed, one of
    training among them. before: the JSON file and the training row of the leg that it began from."""
    training = next(row for row in rows if row["kind"] == "training")
    tests = [row for row in rows if row["kind"] == "test" and "error" not in row]
    recipe = json.loads(json.dumps(training["recipe"]))
    data = recipe["data"]
    data.pop("haystack", None)  # a path on the machine of the training
    longest = max(tests, key=lambda row: row["length"], default=None)
    ratio = f"{longest['model_tokens']:,} for {longest['length']:,}" if longest else "not measured"
    machine = record["machine"]
    return _CARD.format(
        name=name,
        model=model,
        before="" if before is None else _before(*before),
        seed=seed,
        parameters=training["parameters"],
        variant=recipe["model"]["variant"],
        tasks=", ".join(data["tasks"]),
        lengths=", ".join(f"{length:,}" for length in data["lengths"]),
        vocabulary=vocabulary,
        steps=training["steps"],
        tokens=training["tokens"],
        seconds=training["seconds"],
        device=_device(machine),
        recipe=json.dumps(recipe, indent=1),
        ratio=ratio,
        table=_table(tests, "task", lambda row: row["task"]),
        depths=_table(tests, "depth", lambda row: f"{row['depth_from']:.0%} to {row['depth_to']:.0%}"),
        command=record["command"],
        commit=record["commit"],
        date=record["date"],
        machine=f"{_device(machine)}, {machine['system']}",
    )


def _table(tests: list[Row], title: str, of: Any) -> str:
    """A row for each value of ``of``, a column for each length, cells "right of asked"."""
    cells: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in tests:
        cell = cells[of(row)][row["length"]]
        cell[0] += row["correct"]
        cell[1] += row["samples"]
    lengths = sorted({row["length"] for row in tests})
    lines = [
        f"| {title} | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for value, found in cells.items():
        shown = (f"{found[length][0]}/{found[length][1]}" if length in found else "-" for length in lengths)
        lines.append(f"| {value} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _before(record: Row, training: Row) -> str:
    return (
        f"First leg: recipe `{training['model']}`, seed {training['seed']}, {training['steps']:,} steps, "
        f"{training['tokens']:,} tokens, {training['seconds']:,.0f} s on {_device(record['machine'])}, "
        f"commit {record['commit']}; it ended: {training['message']}. Second leg, from its weights:\n\n"
    )


def _device(machine: Row) -> str:
    gpu = machine.get("gpu")
    return str(gpu["name"] if gpu else machine["cpu"])
