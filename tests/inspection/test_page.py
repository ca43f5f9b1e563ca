"""The page: what it holds is what was measured, and hostile text is text."""

import base64
import hashlib
import html.parser
import json
import re
from itertools import pairwise

import numpy as np
import pytest

from tests.inspection.chromium import PROGRAM, chromium
from titans.data.tokenizer import TextEncoder, byte_tokenizer
from titans.inspection.ablate import Dependence
from titans.inspection.page import About, quantise, render, to_script
from titans.inspection.record import Record
from titans.inspection.tokens import token_texts, visible

HOSTILE = (
    "</script><script>document.title='pwned'</script><!-- <img src=x onerror=alert(1)> & &lt;b&gt;\n"
    "\x00\x07\x1b[31mred\x7f\x85\u202egnp.exe\u2066\u200b\ufeff \u2028 ]]> ${1} `x` \\u003c\r\ttab "
    "日本 é 🙂\n"
)


def made_up(
    tokens: int, blocks: int = 2, heads: int = 3, spans: int = 4, seed: int = 0
) -> tuple[Record, Dependence]:
    draw = np.random.default_rng(seed)
    at = np.array([0, *range(5, tokens, 16), tokens])
    bounds = [int(bound) for bound in np.linspace(0, tokens, spans + 1)]
    gates = [draw.random((blocks, heads, 2, tokens)).astype(np.float16) * scale for scale in (0.1, 1e-3, 1)]
    record = Record(
        surprise=draw.lognormal(size=(blocks, heads, tokens)).astype(np.float32),
        theta=gates[0],
        alpha=gates[1],
        eta=gates[2],
        change=draw.random((blocks, heads, len(at))).cumsum(-1),
        change_at=at,
        initial_norm=np.full((blocks, heads), 7.0),
        loss=draw.random(tokens - 1) * 3,
        frozen_loss=draw.random(tokens - 1) * 4,
    )
    retrieval = draw.random((spans + 1, blocks, tokens)).astype(np.float16)
    prediction = draw.random((spans + 1, tokens))
    for span, first in enumerate(bounds[:-1]):
        retrieval[span, :, :first] = prediction[span, :first] = 0
    limits = tuple(pairwise(bounds))
    return record, Dependence(limits, retrieval, prediction, draw.random(spans))


def about(**changes) -> About:
    fields = {
        "source": "text.txt",
        "model": "runs/mag",
        "summary": "mag, 1.3 M parameters",
        "left_out": "",
        "command": "titans inspect text.txt --model runs/mag",
        "version": "1.0",
        "chunk": 16,
    }
    return About(**{**fields, **changes})


def page_of(text: str, **changes) -> tuple[str, list[str]]:
    tokenizer = byte_tokenizer()
    texts = token_texts(tokenizer, TextEncoder(tokenizer)([text])[0].tolist())
    return render(about(**changes), texts, *made_up(len(texts))), texts


def data_in(page: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )


def decoded(packed: dict) -> np.ndarray:
    """The values of `quantise`, as data.js reads them."""
    kind = "<u1" if packed["bits"] == 8 else "<u2"
    codes = np.frombuffer(base64.b64decode(packed["codes"]), kind).astype(float)
    codes = codes.reshape(-1, packed["shape"][-1])
    low, high = (np.array(packed[name])[:, None] for name in ("low", "high"))
    top = 2 ** packed["bits"] - 1
    if packed["log"]:
        values = np.where(codes == 0, 0, low * (high / low) ** ((codes - 1) / (top - 1)))
    else:
        values = low + (high - low) * codes / top
    return values.reshape(packed["shape"])


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, as a browser's parser would open them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_codes_keep_the_values(bits, log):
    """Half a step: of the range, or, for logarithms, of the ratio of largest to smallest value."""
    draw = np.random.default_rng(0)
    values = draw.lognormal(sigma=2, size=(3, 2, 500)) * np.array([1e-6, 1, 1e3])[:, None, None]
    values[1, 0, :100] = 0
    found = decoded(quantise(values, bits=bits, log=log))
    spread = values.max(-1, keepdims=True) - values.min(-1, keepdims=True)
    if log:
        positive = values > 0
        ratio = np.log(values.max(-1) / np.where(positive, values, np.inf).min(-1))[..., None]
        step = np.exp(np.minimum(ratio, np.log(1e6)) / (2**bits - 2) / 2)
        small = values < values.max(-1, keepdims=True) * 1e-6
        close = np.abs(np.log(np.where(small, 1, found / np.where(small, 1, values))))
        assert (close <= np.log(step) * 1.001 + 1e-5).all()
        assert (found[~positive] == 0).all()
    else:
        assert (
            np.abs(found - values)
            <= spread / (2**bits - 1) / 2 * 1.001 + 1e-5 * values.max(-1, keepdims=True)
        ).all()


@pytest.mark.parametrize("values", [np.zeros((2, 7)), np.full((1, 3), 4.5), np.array([[2.0]])])
@pytest.mark.parametrize("log", [False, True])
def test_constant_values_are_no_special_case(values, log):
    np.testing.assert_allclose(decoded(quantise(values, log=log)), values)


def test_neighbours_share_their_mean():
    values = np.arange(10.0)[None] ** 2
    packed = quantise(values, bits=16, bin=4)
    assert packed["shape"] == [1, 3]
    expected = [values[0, :4].mean(), values[0, 4:8].mean(), values[0, 8:].mean()]
    np.testing.assert_allclose(decoded(packed)[0], expected, rtol=1e-4)


def test_the_page_holds_the_figures():
    record, dependence = made_up(300)
    data = data_in(render(about(), ["x"] * 300, record, dependence))
    np.testing.assert_allclose(decoded(data["surprise"]), record.surprise, rtol=0.05)
    np.testing.assert_allclose(decoded(data["theta"]), record.theta, atol=5e-4)
    np.testing.assert_allclose(decoded(data["change"]), record.change / 7, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(decoded(data["loss"])[0], record.loss, atol=1e-3)
    np.testing.assert_allclose(decoded(data["prediction"]), dependence.prediction, rtol=0.05, atol=1e-5)
    assert data["spans"] == [list(span) for span in dependence.spans]


def test_a_page_of_50_000_tokens_and_24_blocks_stays_below_50_megabytes():
    tokens, blocks, heads = 50_000, 24, 16
    zeros = np.zeros((blocks, heads, tokens), np.float32)
    gate = np.zeros((blocks, heads, 2, tokens), np.float16)
    at = np.array([0, *range(16, tokens, 16), tokens])
    record = Record(
        zeros, gate, gate, gate, np.zeros((blocks, heads, len(at)), np.float32), at, np.ones((blocks, heads)),
        zeros[0, 0, 1:], zeros[0, 0, 1:],
    )  # fmt: skip
    spans = tuple((first, first + 3125) for first in range(0, tokens, 3125))
    dependence = Dependence(
        spans, np.zeros((17, blocks, tokens), np.float16), np.zeros((17, tokens)), np.zeros(16)
    )
    page = render(about(), ["word "] * tokens, record, dependence)
    assert len(page) < 50e6
    assert "neighbouring tokens share their mean" in page


def test_hostile_text_is_text():
    """Nothing in the text, its name, the model's or the command opens an element or becomes an attribute."""
    page, texts = page_of(HOSTILE, source=HOSTILE, model=HOSTILE, command=HOSTILE, summary=HOSTILE)
    plain, _ = page_of("x" * len(texts))
    assert "".join(texts) == HOSTILE
    hostile, ordinary = Elements(), Elements()
    hostile.feed(page)
    ordinary.feed(plain)
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in ordinary.found]
    assert "".join(data_in(page)["tokens"]) == visible(HOSTILE)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2028\u2066-\u2069\ufeff]", page)


def test_the_policy_allows_this_script_alone_and_no_request():
    page, _ = page_of("text")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', page)[1])
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://", page)


@pytest.mark.parametrize("value", ["</script>", "<!--", "<script", "\u2028", "é"])
def test_json_may_stand_in_a_script(value):
    text = to_script({"x": value})
    assert text.isascii()
    assert "<" not in text
    assert json.loads(text) == {"x": value}


@pytest.mark.skipif(not PROGRAM, reason="needs Chromium (chromium, chromium-browser or google-chrome)")
@pytest.mark.parametrize("dark", [False, True])
def test_in_chromium(tmp_path, dark):
    """Drawn without an error or a request; keys and clicks do what they should; hostile text is inert."""
    text = HOSTILE + "The quick brown fox jumps over the lazy dog. " * 40
    # Tokens that are markup as a whole, too: bytes one by one could never open an element.
    texts = ["<img src=x onerror=alert(1)>", "<b>bold</b>", *page_of(text)[1]]
    page = render(about(source=HOSTILE), texts, *made_up(len(texts)))
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    with chromium(tmp_path / "profile") as browser:
        browser.open(file, "#0", dark=dark)
        assert browser.evaluate("document.title").startswith("The memory at work: </script><script>")
        assert (
            browser.evaluate("document.images.length + document.scripts.length") == 2
        )  # the data, the script
        shown = browser.evaluate(
            "[...document.querySelectorAll('.t')].map(span => span.textContent).join('')"
        )
        assert shown.startswith(
            "<img src=x onerror=alert(1)><b>bold</b></script><script>document.title='pwned'</script>"
        )
        readout = "document.getElementById('readout').textContent"
        assert "token 0 " in browser.evaluate(readout)
        browser.press("ArrowRight")
        assert "token 1 " in browser.evaluate(readout)
        browser.press("End")
        assert f"token {len(texts) - 1:,} " in browser.evaluate(readout)
        assert browser.evaluate("document.querySelector('.t.cursor') !== null")  # scrolled into sight
        browser.press("2", "Digit2")
        browser.press("3", "Digit3", shift=True)
        assert browser.evaluate("document.getElementById('block-1').checked")
        assert browser.evaluate("document.getElementById('head-2').checked")
        browser.press("9", "Digit9")  # there is no ninth block
        assert browser.evaluate("document.getElementById('block-1').checked")
        browser.press("+")
        assert "tokens 0 to" not in browser.evaluate("document.getElementById('view').textContent")
        browser.press("Tab")
        assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        browser.press("d")
        assert browser.evaluate("document.getElementById('measure-prediction').checked")
        browser.click(*browser.place("loss"))
        assert f"token {len(texts) - 1:,} " not in browser.evaluate(readout)
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
        named = "e => e.getAttribute('aria-label') || e.textContent || e.labels?.length"
        assert browser.evaluate(f"[...document.querySelectorAll('canvas, button, input')].every({named})")
        assert browser.problems == []
        assert [address for address in browser.requests if not address.startswith("file:")] == []
