// What is chosen, how it changes, and how the parts follow.
const gateNames = ["theta", "alpha", "eta"];

function gateCurves(name) {
  const one = series[name];
  return () => Array.from({ length: one.shape[2] }, (_, layer) => ({
    label: one.shape[2] > 1 ? `W${"₁₂₃₄"[layer]}` : "all layers",
    colour: `line${layer + 1}`,
    value: (token) => one.mean(rowsOf(one, layer))[Math.floor(token / one.bin)],
    trace: columnsOf(one.mean(rowsOf(one, layer)), one.bin),
  }));
}

function surpriseCurve() {
  const values = surpriseNow(), bin = series.surprise.bin;
  return [{
    label: "‖∇ℓ‖", colour: "heat", trace: columnsOf(values, bin),
    value: (token) => values[Math.floor(token / bin)],
  }];
}

// The change is known where chunks begin: [0, boundary, boundary + chunk, ..., total].
function changeCurve() {
  const values = series.change.mean(rowsOf(series.change)), at = data.changeAt;
  const index = (token) => {
    let low = 0, high = at.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (at[middle] <= token) low = middle; else high = middle - 1;
    }
    return low;
  };
  const start = at.length > 2 ? at[1] : 0, bin = at.length > 2 ? (at[2] - at[1]) : total;
  return [{
    label: "‖M − M₀‖ / ‖M₀‖", colour: "line1", value: (token) => values[index(token)],
    trace: columnsOf(values.subarray(at.length > 2 ? 1 : 0), bin, start),
  }];
}

function lossCurves() {
  const width = Math.max(1, Math.round((state.view[1] - state.view[0]) / 60));
  byId("loss-note").textContent = width > 1 ? `nats, mean over ${whole(width)} tokens` : "nats";
  return [["frozenLoss", "without writes", "without"], ["loss", "with memory", "with"]].map(([name, label, tone]) => {
    const values = series[name].mean([0]);
    return {
      label, colour: tone, trace: smoothed(values, 1, width),
      value: (token) => token > 0 ? values[token - 1] : null,
    };
  });
}

// Changes of the state.
function setCursor(token, show = false) {
  state.cursor = Math.max(0, Math.min(total - 1, token));
  const [from, to] = state.view;
  if (state.cursor < from || state.cursor >= to) zoomTo(to - from);
  if (show) reveal(state.cursor);
  redraw();
}

function setHover(token) {
  state.hover = token;
  redraw();
}

function zoomTo(size) {
  const width = Math.max(Math.min(64, total), Math.min(total, Math.round(size)));
  const from = Math.max(0, Math.min(total - width, state.cursor - Math.floor(width / 2)));
  state.view = [from, from + width];
  redraw();
}

function choose(kind, index) {
  const count = kind === "block" ? blocks : heads;
  if (index >= count) return;
  state[kind] = index;
  byId(`${kind}-${index}`).checked = true;
  redraw();
}

// Drawing, once a frame.
let waiting = false;

function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawText();
    for (const chart of charts) chart.draw();
    showReadout();
  });
}

function showReadout() {
  const token = state.hover ?? state.cursor;
  const shown = data.tokens[token];
  const loss = token > 0 ? [series.loss.at(0, token - 1), series.frozenLoss.at(0, token - 1)] : null;
  byId("readout").replaceChildren(
    element("span", {}, `token ${whole(token)} `),
    element("code", {}, shown === "" ? "(a byte of the character before)" : shown.replaceAll("\n", "↵").replaceAll(" ", "␣")),
    element("span", {}, ` surprise ${short(surpriseNow()[Math.floor(token / series.surprise.bin)])}`
      + (loss ? ` · loss ${loss[0].toFixed(2)}, without writes ${loss[1].toFixed(2)} nats` : "")),
  );
  const [low, high] = text.scale;
  byId("scale-low").textContent = `≤ ${short(low)}`;
  byId("scale-high").textContent = `≥ ${short(high)}`;
  byId("view").textContent = `tokens ${whole(state.view[0])} to ${whole(state.view[1] - 1)} of ${whole(total)}`;
}

function nextSurprise(step) {
  const values = surpriseNow(), bin = series.surprise.bin, [least] = quantiles(values, [0.99]);
  for (let token = state.cursor + step; token >= 0 && token < total; token += step) {
    if (values[Math.floor(token / bin)] >= least) return setCursor(token, true);
  }
}

const KEYS = {
  ArrowLeft: () => setCursor(state.cursor - 1, true),
  ArrowRight: () => setCursor(state.cursor + 1, true),
  ArrowUp: () => setCursor(tokenOfLine(text.lineOf[state.cursor] - 1), true),
  ArrowDown: () => setCursor(tokenOfLine(text.lineOf[state.cursor] + 1), true),
  PageUp: () => setCursor(tokenOfLine(text.lineOf[state.cursor] - 20), true),
  PageDown: () => setCursor(tokenOfLine(text.lineOf[state.cursor] + 20), true),
  Home: () => setCursor(0, true),
  End: () => setCursor(total - 1, true),
  "+": () => zoomTo((state.view[1] - state.view[0]) / 2),
  "=": () => zoomTo((state.view[1] - state.view[0]) / 2),
  "-": () => zoomTo((state.view[1] - state.view[0]) * 2),
  n: () => nextSurprise(1),
  p: () => nextSurprise(-1),
  d: () => data.spans && byId(state.measure === "retrieval" ? "measure-prediction" : "measure-retrieval").click(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select, textarea") && event.key.startsWith("Arrow")) return;
  if (event.target.matches("button, summary, a") && !event.target.closest("#text") && event.key === "Enter") return;
  const digit = /^Digit(\d)$/.exec(event.code);
  if (digit) choose(event.shiftKey ? "head" : "block", Number(digit[1]) - 1);
  else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
}

// The parts that are made once.
function radios(kind, count) {
  const group = byId(`${kind}s`);
  for (let index = -1; index < count; index++) {
    const input = element("input", { type: "radio", name: kind, id: `${kind}-${index}` });
    input.checked = index === -1;
    input.addEventListener("change", () => choose(kind, index));
    group.append(input, element("label", { for: input.id }, index < 0 ? "mean" : String(index + 1)));
  }
}

function makeColours() {
  // Steps of one hue scale that text stays legible on: up to a light orange, or from black to a dark one.
  const sheet = byId("style").sheet, dark = isDark();
  colours.clear();
  for (let rule = sheet.cssRules.length - 1; rule >= 0 && /^\.l\d+/.test(sheet.cssRules[rule].selectorText ?? ""); rule--) {
    sheet.deleteRule(rule);
  }
  const steps = [];
  for (let level = 0; level < LEVELS; level++) {
    const share = level / (LEVELS - 1);
    const tone = dark
      ? `oklch(${0.24 + 0.33 * share} ${0.02 + 0.15 * share} ${70 - 38 * share})`
      : `oklch(${0.985 - 0.245 * share} ${0.01 + 0.165 * share} ${95 - 50 * share})`;
    steps.push(tone);
    sheet.insertRule(`.l${level} { background: ${tone}; }`, sheet.cssRules.length);
  }
  byId("scale").style.background = `linear-gradient(90deg, ${steps.join()})`;
}

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function start() {
  radios("block", blocks);
  radios("head", heads);
  if (heads === 1) byId("heads").parentElement.hidden = true;
  if (blocks === 1) byId("blocks").parentElement.hidden = true;
  new Curves("surprise", surpriseCurve, { zero: true });
  for (const name of gateNames) {
    if (series[name]) new Curves(name, gateCurves(name), { zero: name === "alpha", log: name === "theta" && series[name].shape[2] > 1 });
    else byId(name).closest("figure").hidden = true;
  }
  new Curves("change", changeCurve, { zero: true });
  new Curves("loss", lossCurves);
  const [mean, frozen] = data.meanLoss;
  byId("loss-mean").textContent = `whole text: ${mean.toFixed(3)} with, ${frozen.toFixed(3)} without`;
  if (data.spans) {
    new DependenceMap("depend", "depend-bars");
    for (const measure of ["retrieval", "prediction"]) {
      byId(`measure-${measure}`).addEventListener("change", () => { state.measure = measure; redraw(); });
    }
  } else byId("depend").closest("figure").hidden = true;

  makeFragments();
  makeColours();
  layOut();
  byId("lines").addEventListener("click", (event) => {
    if (event.target.token !== undefined && getSelection().isCollapsed) setCursor(event.target.token);
  });
  byId("lines").addEventListener("pointermove", (event) => setHover(event.target.token ?? null));
  byId("lines").addEventListener("pointerleave", () => setHover(null));
  textPane.addEventListener("scroll", redraw, { passive: true });
  document.addEventListener("keydown", onKey);
  byId("zoom-in").addEventListener("click", KEYS["+"]);
  byId("zoom-out").addEventListener("click", KEYS["-"]);
  byId("zoom-all").addEventListener("click", () => zoomTo(total));
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    makeColours();
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { makeColours(); redraw(); });
  let width = textPane.clientWidth;
  new ResizeObserver(() => {
    if (textPane.clientWidth !== width) {
      width = textPane.clientWidth;
      layOut();
    }
    redraw();
  }).observe(document.body);
  // #1234 in the address opens the page at that token; otherwise in the middle, where something can be depended on.
  setCursor(/^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : Math.floor(total / 2));
  reveal(state.cursor, true);
  document.documentElement.dataset.ready = "yes";
}

start();
