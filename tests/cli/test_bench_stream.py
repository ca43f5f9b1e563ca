"""`titans bench stream`: the command at tiny sizes, what its workloads do, what the summary makes of them."""

import json

import pytest
import torch

from titans.benchmark import stream
from titans.benchmark.harness import Measurement, RowFailed
from titans.benchmark.stream_rows import CPU_MODEL, LENGTHS, LONGEST, ROWS, Plan, summarise, table
from titans.cli.main import main
from titans.inference.stream import Stream

SMALL = {"num_hidden_layers": 1, "vocab_size": 64}


def settings(row: str, tokens: int, **fields):
    config = SMALL | ROWS[row]
    return {"device": "cpu", "dtype": "float32", "size": "tiny", "config": config, "tokens": tokens} | fields


def test_the_command_stores_what_it_prints(tmp_path, capsys):
    words = ["--rows", "lmm", "attention", "--device", "cpu"]
    words += ["--sizes", "tiny", "--lengths", "64", "--batches", "2"]
    assert main(["bench", "stream", *words, "--commit", "abc", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "stream_cpu.json").read_text())
    assert record["command"] == "titans bench stream " + " ".join(words)
    assert record["machine"]["threads"] == 2
    entries = record["summary"]["table"]
    assert [(e["row"], e["what"], e["batch"]) for e in entries] == [
        ("lmm", "prefill", 0),
        ("lmm", "decode", 2),
        ("attention", "prefill", 0),
        ("attention", "decode", 2),
    ]
    assert all(entry["error"] is None and entry["seconds"] > 0 for entry in entries)
    assert entries[1]["state"] == "read 64 tokens"
    printed = capsys.readouterr().out
    assert "decode, 2 streams, tokens/s" in printed


def test_runs_side_by_side_become_the_file_of_one(tmp_path, capsys):
    """As on several GPUs: a part for each model, one of them measured again, one that failed."""
    parts = [tmp_path / name for name in ("attention", "lmm", "again")]
    common = ["--device", "cpu", "--sizes", "tiny", "--lengths", "64", "--batches", "2"]
    for row, part in zip(("attention", "lmm", "lmm"), parts, strict=True):
        assert (
            main(["bench", "stream", "--rows", row, *common, "--commit", "abc", "--output", str(part)]) == 0
        )
    file = parts[2] / "stream_cpu.json"
    record = json.loads(file.read_text())
    failed = {name: record["rows"][1][name] for name in ("workload", "settings", "repeats", "warmup")}
    record["rows"][1] = failed | {"error": "OutOfMemoryError: 9 TB"}
    file.write_text(json.dumps(record))
    capsys.readouterr()

    words = ["bench", "stream", "--device", "cpu", "--merge", *map(str, parts), "--output", str(tmp_path)]
    assert main(words) == 0
    merged = json.loads((tmp_path / "stream_cpu.json").read_text())
    assert merged["command"] == "titans bench stream --rows lmm attention " + " ".join(common)
    table_of = [(e["row"], e["what"], e["batch"], e["error"]) for e in merged["summary"]["table"]]
    assert table_of == [
        ("lmm", "prefill", 0, None),
        ("lmm", "decode", 2, None),
        ("attention", "prefill", 0, None),
        ("attention", "decode", 2, None),
    ]
    assert merged["rows"][0] == record["rows"][0], "the later of two measurements"
    printed = capsys.readouterr().out
    assert "measured twice" in printed
    assert "decode, 2 streams, tokens/s" in printed

    for changed, message in (
        ({"commit": "abd"}, "its commit is abd"),
        ({"machine": {"cpu": "b"}}, "its machine"),
    ):
        file.write_text(json.dumps(record | changed))
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert main([*words, "--batches", "3"]) == 2
    assert "--batches says how to measure; --merge measures nothing" in capsys.readouterr().err
    assert main([*words[:5], str(tmp_path / "none")]) == 2
    assert "expected a file of titans bench stream" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "lm"], "unknown row 'lm'"),
        (["--sizes", "17m"], "unknown model size '17m'"),
        (["--lengths", "0"], "--lengths (0,): expected numbers of 1 or more"),
        (["--tokens", "5"], "--tokens: an option of titans bench ops, not of titans bench stream"),
    ],
)
def test_mistakes_are_told_before_anything_runs(words, message, capsys):
    assert main(["bench", "stream", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_the_way_out_is_named(capsys):
    assert main(["bench", "stream"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_decoding_starts_from_what_the_prefill_row_has_read(monkeypatch):
    stream.prefill(settings("lmm", 40))()
    monkeypatch.setattr(stream, "Stream", lambda *_: pytest.fail("read again"))
    decode = stream.decode(settings("lmm", 40, batch=3))
    decode()
    assert (decode.cache.seen, decode.cache.batch_size) == (41, 3)
    monkeypatch.undo()
    assert stream.decode(settings("lmm", 24, batch=1)).cache.seen == 24  # nobody had read these


def test_a_state_does_not_grow_and_a_kv_cache_does():
    states, caches = [], []
    for tokens in (2100, 2200):
        row = stream.prefill(settings("mag", tokens))
        row()
        states.append(row.facts["state_bytes"])
        caches.append(stream.attention_decode(settings("attention", tokens, batch=2)).facts["state_bytes"])
    assert states[0] == states[1]
    assert caches[1] - caches[0] == 100 * 2 * 128 * 4  # keys and values of one layer, for one stream


def test_the_baseline_decodes_what_the_model_would():
    """Fast, but still full attention: with the model's own keys in the cache its logits come out."""
    job = settings("attention", 12, batch=1)
    baseline = stream.attention_decode(job)
    ids = torch.randint(64, (1, 12))
    with torch.inference_mode():
        cache = baseline.model(ids, use_cache=True).past_key_values
        attention = baseline.model.model.layers[0].mixer.attention
        state = cache.states[0]
        baseline.keys[0][:, :, :-1] = attention.rotary(12, state.keys).rotate(state.keys)
        baseline.values[0][:, :, :-1] = state.values
        expected = Stream(baseline.model, cache).step(int(baseline.ids))
        torch.testing.assert_close(baseline.logits()[0, -1], expected, rtol=1e-4, atol=1e-5)


def test_every_position_of_the_issue_is_measured():
    plan = Plan("cuda", ("170m", "340m"), LENGTHS, (1, 64))
    read = {job.settings["tokens"] for job in plan.jobs("lmm") if job.workload == "prefill"}
    assert read >= {10_240, 102_400, 2**20, 2**21, LONGEST}
    jobs = plan.jobs("attention")
    assert {job.settings["tokens"] for job in jobs if job.workload == "attention_decode"} == set(LENGTHS)
    assert max(job.settings["tokens"] for job in jobs if job.workload == "attention_prefill") == 2**20


def found(times: dict) -> dict:
    return {
        key: Measurement([seconds], 10**9, {}, 0, {"state_bytes": 10**6}) for key, seconds in times.items()
    }


def test_targets():
    plan = Plan("cuda", ("170m",), LENGTHS, (64,))
    entries = summarise(
        found(
            {
                ("lmm", "170m", "prefill", 0, 2**21): 25.0,
                ("lmm", "170m", "decode", 64, 1024): 0.010,
                ("lmm", "170m", "decode", 64, 16_384): 0.012,
                ("attention", "170m", "decode", 64, 16_384): 0.016,
            }
        )
        | {("attention", "170m", "decode", 64, 2**21): RowFailed("d {'a': 1}: OutOfMemoryError: 9 TB")},
        plan,
    )
    values = [{t["what"]: (round(t["value"], 2), t["met"]) for t in entry["targets"]} for entry in entries]
    assert values == [
        {"seconds": (25.0, False)},
        {"flat": (1.0, True)},
        {"flat": (1.2, False), "over attention's": (0.75, True)},
        {},
        {},
    ]
    header, lines = table(entries)
    assert header[2:-1] == ["1,024", "16,384", "2,097,152"]
    assert lines[0][-1] == "seconds at 2,097,152 25, asked 20"
    assert "failed: OutOfMemoryError" in lines[-2]
    cpu = Plan("cpu", ("tiny",), (10_240,), (1,), tuple(CPU_MODEL.items()))
    (entry,) = summarise(found({("mag", "tiny", "prefill", 0, 10_240): 1.0}), cpu)
    assert entry["targets"][0]["met"] is False  # 10,240 tokens/s of 12,000
