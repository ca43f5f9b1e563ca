"""The recall tests on the page of results: needles, BABILong, MQAR's grid and the ablations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

NEEDLES = {"niah_single_1": "PK", "niah_single_2": "N", "niah_single_3": "W"}
BABILONG = {f"babilong_qa{number}": f"qa{number}" for number in range(1, 6)}
# Table 2 of the paper (arXiv v1), 16K tokens: 760M parameters, 30 billion tokens of training.
PAPER = {"PK": 0.984, "N": 0.974, "W": 0.952}

Row = dict[str, Any]
BySeed = dict[int, float]
Table = Callable[[list[str], list[list[str]]], str]


def shares(rows: list[Row], key: Callable[[Row], Hashable]) -> dict[Any, BySeed]:
    """Key of a test -> seed -> share of its samples answered (of the tokens asked for, in MQAR)."""
    counts: dict[Hashable, dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in rows:
        if row.get("kind") == "test" and "error" not in row:
            count = counts[key(row)][row["seed"]]
            count[0] += row.get("correct", row["tokens_correct"])
            count[1] += row["samples"] if "correct" in row else row["tokens_asked"]
    return {
        each: {seed: correct / asked for seed, (correct, asked) in by_seed.items()}
        for each, by_seed in counts.items()
    }


def needles(record: Row, table: Table, title: str) -> str:
    """The section: how the models were trained, and what they answer at which length."""
    about = (
        "RULER's single needles (S-NIAH-PK, -N and -W of the paper) in held-out books, lengths in Llama-2 "
        f"tokens; trained on rows of at most {longest(record)} tokens of other books. {_PERCENT}"
    )
    paper = ", ".join(f"{task} {share:.1%}" for task, share in PAPER.items())
    return "\n".join(
        [
            *_head(title, about, record, table),
            _answers(record["rows"], NEEDLES, table),
            f"\nThe paper's Titans (MAC), 760M parameters, at 16K: {paper}. Its models are trained on text; "
            "these on needles alone.\n",
        ]
    )


def babilong(record: Row, table: Table, title: str = "BABILong") -> str:
    about = (
        "bAbI's test stories in held-out books, lengths in Llama-2 tokens; trained on the train stories in "
        f"rows of at most {longest(record)} tokens of other books. {_PERCENT}"
    )
    return "\n".join(
        [
            *_head(title, about, record, table),
            _answers(record["rows"], BABILONG, table),
            "\nThe paper's fine-tuned MAC: 94 % at 1M, 69 % at 10M.\n",
        ]
    )


def mqar(record: Row, table: Table, title: str = "MQAR") -> str:
    """A line for each model and number of pairs."""
    about = (
        "Pairs of random tokens, after which each key comes once more (Zoology): percent of the "
        f"values that are the likeliest token, by the tokens of a row; trained on at most {longest(record)}, "
        f"every number of pairs in the same run. {_SEEDS}"
    )
    found = shares(record["rows"], lambda row: (row["model"], row["pairs"], row["length"]))
    lengths = sorted({length for _, _, length in found})
    lines = [
        [short_name(model), str(pairs), *(cell(found.get((model, pairs, length))) for length in lengths)]
        for model, pairs in dict.fromkeys((model, pairs) for model, pairs, _ in found)
    ]
    header = ["model", "pairs", *map(short_length, lengths)]
    return "\n".join([*_head(title, about, record, table), table(header, lines), ""])


def ablations(record: Row, table: Table, title: str = "Ablations") -> str:
    """A line for each model and task; in MQAR over all numbers of pairs."""
    from titans.recipes import RECIPES

    tasks = NEEDLES | {"mqar": "MQAR"}
    width = _trained(record)[0]["recipe"]["model"]["hidden_size"]
    about = (
        f"A memory alone (two blocks of width {width}), trained on rows of at most {longest(record)} tokens, "
        f"each time with one change: percent of needles answered, or of MQAR's values right. {_SEEDS}\n"
    )
    found = shares(record["rows"], lambda row: (row["model"], row["task"], row["length"]))
    lengths = sorted({length for _, _, length in found})
    lines = []
    for model in dict.fromkeys(model for model, _, _ in found):
        says = (RECIPES[model].__doc__ or "").rstrip(".") if model in RECIPES else ""
        for task, short in tasks.items():
            cells = [cell(found.get((model, task, length))) for length in lengths]
            if any(cells):
                lines.append([short_name(model), says, short, *cells])
    header = ["model", "what", "task", *map(short_length, lengths)]
    return "\n".join([*_head(title, about, record, table), table(header, lines), ""])


_SEEDS = "With several seeds their mean and, in brackets, the lowest and the highest."
_PERCENT = f"Percent of the samples whose answer is exactly what greedy decoding begins with. {_SEEDS}"


def longest(record: Row) -> str:
    """Tokens of the longest rows of training."""
    trained = _trained(record)
    return f"{max((max(row['recipe']['data']['lengths']) for row in trained), default=0):,}"


def _trained(record: Row) -> list[Row]:
    return [row for row in record["rows"] if row.get("kind") == "training"]


def _head(title: str, about: str, record: Row, table: Table) -> list[str]:
    lines = [
        [
            short_name(row["model"]),
            str(row["seed"]),
            f"{row['parameters'] / 1e6:.2f}",
            row["ending"],
            f"{row['steps']:,}",
            f"{row['tokens'] / 1e6:,.0f}" if "tokens" in row else "",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            f"{row['validation'][-1]['eval_answer_accuracy']:.1%}" if row.get("validation") else "",
            f"{row['max_grad_norm']:.4g}" if row.get("max_grad_norm") is not None else "",
        ]
        for row in _trained(record)
    ]
    header = ["model", "seed", "M parameters", "ending", "steps", "M tokens", "seconds"]
    header += ["answers right in validation", "largest gradient norm"]
    return [f"## {title}\n", about.rstrip() + "\n", table(header, lines), ""]


def _answers(rows: list[Row], tasks: dict[str, str], table: Table) -> str:
    found = shares(rows, lambda row: (row["model"], row["task"], row["length"]))
    lengths = sorted({length for _, _, length in found})
    lines = []
    for model in dict.fromkeys(model for model, _, _ in found):
        for task, short in tasks.items():
            cells = [cell(found.get((model, task, length))) for length in lengths]
            if any(cells):
                lines.append([short_name(model), short, *cells])
    return table(["model", f"task ({_samples(rows)} samples)", *map(short_length, lengths)], lines)


def _samples(rows: list[Row]) -> str:
    """Of a test, by length: "48, from 64K on 16"."""
    by_length = {row["length"]: row["rows"] for row in rows if row.get("kind") == "test" and "rows" in row}
    said: list[str] = []
    before = None
    for length, number in sorted(by_length.items()):
        if number != before:
            said.append(f"from {short_length(length)} on {number}" if said else str(number))
        before = number
    return ", ".join(said)


def cell(by_seed: BySeed | None) -> str:
    """Mean and range in percent."""
    if not by_seed:
        return ""
    low, mean, high = spread(by_seed.values())
    return f"{mean:.0f}" if len(by_seed) == 1 else f"{mean:.0f} ({low:.0f}-{high:.0f})"


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """The lowest, mean and highest in percent."""
    percent = [100 * value for value in values]
    return min(percent), sum(percent) / len(percent), max(percent)


def short_name(model: str) -> str:
    """needle_mag -> mag: the section says what on."""
    for family in ("needle_", "babilong_", "short_mqar_", "mqar_", "short_ablation_", "ablation_"):
        model = model.removeprefix(family)
    return model


def short_length(length: int) -> str:
    """2048 -> 2K, 2097152 -> 2M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)
