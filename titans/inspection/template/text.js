// The text, coloured: only the lines in sight exist, so 50,000 tokens scroll like 500.
const LEVELS = 32;
const LINE = 24;
const textPane = byId("text"), canvasForWidths = document.createElement("canvas").getContext("2d");
const text = { fragments: [], tokens: null, firsts: null, lines: [], lineOf: null, shown: new Map(), scale: [1, 2] };

// Tokens -> fragments without line ends: a token may hold several lines, or be a byte of the character before.
function makeFragments() {
  const fragments = [], tokens = [], ends = [], firsts = new Uint32Array(total);
  data.tokens.forEach((token, index) => {
    firsts[index] = fragments.length;
    const parts = token.replaceAll("\t", "→   ").split("\n");
    parts.forEach((part, place) => {
      const last = place === parts.length - 1;
      const pieces = [...part + (last ? "" : "↵")];
      for (let at = 0; at < pieces.length; at += 32) {
        fragments.push(pieces.slice(at, at + 32).join(""));
        tokens.push(index);
        ends.push(!last && at + 32 >= pieces.length);
      }
    });
  });
  Object.assign(text, { fragments, tokens: Uint32Array.from(tokens), ends, firsts });
}

// Greedy lines: break before a word where there is one, and anywhere in what is longer than a line.
function layOut() {
  const sheet = getComputedStyle(textPane);
  canvasForWidths.font = `${sheet.fontSize} ${sheet.fontFamily}`;
  const widths = new Map();
  const widthOf = (fragment) => {
    if (!widths.has(fragment)) widths.set(fragment, canvasForWidths.measureText(fragment).width);
    return widths.get(fragment);
  };
  const room = textPane.clientWidth - 92;
  const { fragments, ends } = text, lines = [0];
  let width = 0, word = 0, start = 0;
  for (let i = 0; i < fragments.length; i++) {
    if (i > start && (/^\s/.test(fragments[i]) || /[\s\u2010-\u2014\u3000-\u9fff]$/.test(fragments[i - 1]))) word = i;
    width += widthOf(fragments[i]);
    if (width > room && i > start) {
      start = word > start ? word : i;
      lines.push(start);
      width = 0;
      for (let j = start; j <= i; j++) width += widthOf(fragments[j]);
    }
    if (ends[i]) {
      start = word = i + 1;
      lines.push(start);
      width = 0;
    }
  }
  if (lines.at(-1) >= fragments.length && lines.length > 1) lines.pop();
  text.lines = lines;
  text.lineOf = new Uint32Array(total);
  for (let token = 0, line = 0; token < total; token++) {
    while (line + 1 < lines.length && lines[line + 1] <= text.firsts[token]) line++;
    text.lineOf[token] = line;
  }
  byId("lines").style.height = `${lines.length * LINE + 16}px`;
  dropLines();
}

function dropLines() {
  text.shown.forEach((line) => line.remove());
  text.shown.clear();
}

function levelOf(value) {
  const [low, high] = text.scale;
  return Math.max(0, Math.min(LEVELS - 1, Math.round(Math.log(value / low) / Math.log(high / low) * (LEVELS - 1))));
}

function makeLine(index) {
  const line = element("div", { class: "line" });
  line.style.top = `${index * LINE + 8}px`;
  const first = text.lines[index], last = text.lines[index + 1] ?? text.fragments.length;
  line.append(element("span", { class: "number" }, whole(text.tokens[first])));
  line.append(element("span", { class: "mark" }));
  for (let i = first; i < last; i++) {
    const span = element("span", {}, text.fragments[i]);
    span.token = text.tokens[i];
    line.append(span);
  }
  line.first = text.tokens[first];
  return line;
}

function colourLine(line, values) {
  const spans = line.children;
  for (let i = 2; i < spans.length; i++) {
    const token = spans[i].token;
    const value = values[Math.floor(token / series.surprise.bin)];
    spans[i].className = `t l${levelOf(value)}` + (token === state.cursor ? " cursor" : "");
  }
  const mark = spans[1];
  mark.style.setProperty("--share", data.spans ? text.marks[spanOf(line.first)] : 0);
}

function spanOf(token) {
  let low = 0;
  while (low + 1 < data.spans.length && data.spans[low + 1][0] <= token) low++;
  return low;
}

function drawText() {
  const first = Math.max(0, Math.floor(textPane.scrollTop / LINE) - 8);
  const last = Math.min(text.lines.length, first + Math.ceil(textPane.clientHeight / LINE) + 16);
  for (const [index, line] of text.shown) {
    if (index < first || index >= last) {
      line.remove();
      text.shown.delete(index);
    }
  }
  const values = surpriseNow();
  if (text.scaled !== values) {
    const [low, high] = quantiles(values, [0.02, 0.99]), least = low > 0 ? low : Math.max(high * 1e-3, 1e-9);
    Object.assign(text, { scaled: values, scale: [least, high > least ? high : least * 2] });
  }
  if (data.spans) {
    const strengths = data.spans.map((_, span) => dependenceAt(span, state.cursor));
    const most = Math.max(...strengths, 1e-9);
    text.marks = strengths.map((strength) => (strength / most).toFixed(2));
  }
  for (let index = first; index < last; index++) {
    if (!text.shown.has(index)) {
      const line = makeLine(index);
      text.shown.set(index, line);
      byId("lines").append(line);
    }
    colourLine(text.shown.get(index), values);
  }
}

function visibleTokens() {
  const first = Math.max(0, Math.floor((textPane.scrollTop - 8) / LINE));
  const last = Math.min(text.lines.length, first + Math.ceil(textPane.clientHeight / LINE));
  const end = last < text.lines.length ? text.tokens[text.lines[last]] : total;
  return [text.tokens[text.lines[Math.min(first, text.lines.length - 1)]], end];
}

function reveal(token, middle = false) {
  const top = text.lineOf[token] * LINE, height = textPane.clientHeight;
  if (middle || top < textPane.scrollTop + LINE || top > textPane.scrollTop + height - 3 * LINE) {
    textPane.scrollTop = top - height / 2;
  }
}

function tokenOfLine(line) {
  return text.tokens[text.lines[Math.max(0, Math.min(text.lines.length - 1, line))]];
}
