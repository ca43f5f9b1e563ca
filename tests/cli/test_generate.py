"""`titans generate`: the cached continuation is the model's, and mistakes take one line."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.trained import trained
from titans.cli.main import main
from titans.inference import generate
from titans.inference.checkpoint import load_checkpoint
from titans.inference.generate import Sampling, generate_ids, generate_text
from titans.inference.stream import Stream
from titans.training.checkpoints import checkpoints_in


@pytest.fixture
def folder(tmp_path):
    return trained(tmp_path)


def read(model, ids, piece=None):
    stream = Stream(model, piece=piece)
    stream.read(ids)
    return stream


def test_greedy_text_is_that_of_full_forward_passes(folder):
    """Over segment and chunk boundaries, with the prompt fed in pieces."""
    model, _, _ = load_checkpoint(folder / "run")
    ids = torch.arange(65, 78)
    made = list(generate_ids(read(model, ids, piece=5), Sampling(greedy=True, max_new_tokens=20)))
    for token in made:
        with torch.no_grad():
            assert int(model(ids[None]).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([token])])


def test_greedy_equals_transformers_generate(folder):
    model, _, _ = load_checkpoint(folder / "run")
    prompt = torch.arange(65, 78)
    ours = list(generate_ids(read(model, prompt), Sampling(greedy=True, max_new_tokens=12)))
    theirs = model.generate(prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert ours == theirs[0, len(prompt) :].tolist()


def test_the_same_seed_gives_the_same_text_and_another_another(folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        command = ["generate", str(folder / "run"), "--prompt", "line", "--seed", seed]
        assert main([*command, "--max-new-tokens", "40", "--top-k", "50", "--top-p", "0.95"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("line")


def test_filters_and_the_temperature_take_effect(folder):
    """With k = 1, a tiny p or a tiny temperature, sampling is greedy."""
    model, _, _ = load_checkpoint(folder / "run")
    prompt = torch.arange(65, 78)

    def sample(**settings):
        return list(generate_ids(read(model, prompt), Sampling(max_new_tokens=12, seed=3, **settings)))

    greedy = sample(greedy=True)
    assert sample(top_k=1) == sample(top_p=1e-9) == sample(temperature=1e-6) == greedy
    assert sample(temperature=2.0) != greedy


def test_characters_of_several_bytes_stream_whole(folder, monkeypatch):
    """A half character printed at once would stand as two replacement signs on the terminal."""
    model, tokenizer, _ = load_checkpoint(folder / "run")
    text = "aé€😀b"
    monkeypatch.setattr(generate, "generate_ids", lambda *_: iter(text.encode()))
    assert list(generate_text(model, tokenizer, "x", Sampling())) == ["a", "é", "€", "😀", "b"]


def test_bytes_that_are_no_text_do_not_hold_back_what_follows(folder, monkeypatch):
    model, tokenizer, _ = load_checkpoint(folder / "run")
    monkeypatch.setattr(generate, "generate_ids", lambda *_: iter(b"\xff\xff\xff\xff\xffab\xe2"))
    pieces = list(generate_text(model, tokenizer, "x", Sampling()))
    assert "".join(pieces).endswith("ab\ufffd")
    assert "ab" not in pieces[0]


def test_a_prompt_from_a_file(folder, capsys):
    command = ["generate", str(folder / "run"), "--max-new-tokens", "3", "--greedy"]
    assert main([*command, "--prompt-file", str(folder / "text.txt")]) == 0
    assert "quick brown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one of --prompt and --prompt-file"),
        (["--prompt", "a", "--prompt-file", "b"], "expected one of --prompt and --prompt-file"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt-file", "absent.txt"], "absent.txt: No such file"),
        (["--prompt-file", "empty.txt"], "the prompt is empty"),
        (["--prompt-file", "binary.txt"], "not UTF-8 text: byte 0xe9 at offset 3"),
        (["--prompt", "a", "--temperature", "0"], "temperature: expected a number above 0"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p"),
        (["--prompt", "a", "--top-k", "-1"], "top_k"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "a", "--max-new-token", "0"], "did you mean --max-new-tokens?"),
    ],
)
def test_mistakes_take_one_line(options, message, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert main(["generate", "run", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def spoil(folder, what):
    """Damage the last checkpoint of ``folder / "run"``; the text that the error must contain."""
    last = checkpoints_in(folder / "run")[-1]
    weights = last / "model.safetensors"
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        return "model.safetensors: damaged or cut short"
    if what == "empty":
        weights.write_bytes(b"")
        return "model.safetensors: damaged or cut short"
    if what == "no weights":
        weights.unlink()
        return "no *.safetensors file"
    if what == "no config":
        (last / "config.json").unlink()
        return "config.json is missing"
    if what == "config":
        (last / "config.json").write_text("{")
        return "config.json: expected a JSON object"
    if what == "chunk":
        config = json.loads((last / "config.json").read_text())
        (last / "config.json").write_text(json.dumps({**config, "chunk_size": 3}))
        return "3"
    if what == "tokenizer":
        for file in last.glob("tokenizer*"):
            file.unlink()
        return "holds no tokenizer"
    tensors = load_file(weights)
    if what == "nan":
        tensors["model.norm.weight"][0] = math.nan
        message = "the parameter model.norm.weight holds values that are not finite"
    elif what == "missing":
        del tensors["model.norm.weight"]
        message = "missing keys in the weights: model.norm.weight"
    else:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()
        message = "model.embed_tokens.weight"
    save_file(tensors, weights, metadata={"format": "pt"})
    return message


@pytest.mark.parametrize(
    "what",
    [
        "cut",
        "empty",
        "no weights",
        "no config",
        "config",
        "chunk",
        "tokenizer",
        "nan",
        "missing",
        "vocabulary",
    ],
)
def test_damaged_checkpoints_take_one_line(what, folder, capsys):
    message = spoil(folder, what)
    assert main(["generate", str(folder / "run"), "--prompt", "a"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("titans: error: ")
    assert message in error
    assert "Traceback" not in error


def test_a_folder_that_is_no_checkpoint(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "absent"), "--prompt", "a"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "config.json is missing, and there is no checkpoint" in capsys.readouterr().err
