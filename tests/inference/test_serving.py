"""`transformers serve` over HTTP with the script of docs/serving.md and a stock client."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.trained import trained
from titans.cli.main import main
from titans.inference.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent.parent
WAIT = 120  # seconds until the server has loaded the model; 15 on a quiet machine


def script() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if "main()" in block]
    return found


@pytest.mark.slow
def test_a_stock_client_gets_what_titans_generate_says(tmp_path, capsys):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}")
    openai = pytest.importorskip("openai", reason="the client is openai's")
    checkpoint = trained(tmp_path) / "run" / "checkpoint-4"
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    capsys.readouterr()
    options = ["--prompt", "line 1: the", "--max-new-tokens", "8", "--greedy"]
    assert main(["generate", str(checkpoint), *options]) == 0
    expected = capsys.readouterr().out.strip("\n").removeprefix("line 1: the")

    # A chat template's text gets no begin token, other than that of a completion.
    model, tokenizer, _ = load_checkpoint(checkpoint, device="cpu")
    ids = tokenizer("line 1: the", add_special_tokens=False, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    chat_expected = tokenizer.decode(answer, skip_special_tokens=True)

    (tmp_path / "serve_titans.py").write_text(script())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["serve", str(checkpoint), "--device", "cpu", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, str(tmp_path / "serve_titans.py"), *words],
            stdout=log,
            stderr=log,
            env=environment,
        ) as server,
    ):
        try:
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
            wait_for(port, server, tmp_path / "log")
            ask = {"model": str(checkpoint), "max_tokens": 8, "temperature": 0}
            whole = client.completions.create(prompt="line 1: the", **ask)
            assert whole.choices[0].text.strip("\n") == expected
            assert whole.usage.prompt_tokens == 12  # bytes, and the begin token
            message = [{"role": "user", "content": "line 1: the"}]
            chat = client.chat.completions.create(messages=message, **ask)
            assert chat.choices[0].message.content == chat_expected
            # A model of four steps says bytes that are no text, and a stream holds them back: count tokens.
            chunks = list(client.chat.completions.create(messages=message, stream=True, **ask))
            assert chunks[0].choices[0].delta.role == "assistant"
            assert (chunks[-1].usage.completion_tokens, chunks[-1].choices[0].finish_reason) == (8, "length")
        finally:
            server.send_signal(signal.SIGTERM)


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(WAIT):
        assert server.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(1)
    raise AssertionError(f"no server after {WAIT} s: {log.read_text()}")
