// Curves over the stream on one shared axis, and the map of what depends on what.
const LEFT = 46, RIGHT = 10, TOP = 6, BOTTOM = 20;
const charts = [];

// Colours come from the style sheet, where light and dark are told apart; `makeColours` empties the map.
const colours = new Map();

function colour(name) {
  if (!colours.has(name)) {
    const probe = byId("probe");
    probe.style.color = `var(--${name})`;
    colours.set(name, getComputedStyle(probe).color);
  }
  return colours.get(name);
}

function niceTicks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) * power;
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return ticks;
}

class Canvas {
  // A canvas as large as its place on the page, in device pixels, with the pointer and the view's axis.
  // `paint` draws what depends on the choices; it is kept, and scrolling and the cursor only draw marks on it.
  constructor(id) {
    this.canvas = byId(id);
    this.base = document.createElement("canvas");
    this.canvas.addEventListener("pointermove", (event) => setHover(this.tokenAt(event)));
    this.canvas.addEventListener("pointerleave", () => setHover(null));
    this.canvas.addEventListener("click", (event) => setCursor(this.tokenAt(event), true));
    charts.push(this);
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    [this.width, this.height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    this.inner = this.width - LEFT - RIGHT;
    const key = [this.width, this.height, ratio, ...state.view, state.block, state.head, state.measure, isDark()].join();
    if (this.key !== key) {
      this.key = key;
      for (const canvas of [this.base, this.canvas]) {
        canvas.width = this.width * ratio;
        canvas.height = this.height * ratio;
        canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
      }
      const pen = this.base.getContext("2d");
      pen.font = "11px " + getComputedStyle(document.body).fontFamily;
      this.paint(pen);
    }
    const pen = this.canvas.getContext("2d");
    pen.clearRect(0, 0, this.width, this.height);
    pen.drawImage(this.base, 0, 0, this.width, this.height);
    this.marks(pen);
    this.showValues();
  }

  x(token) {
    const [from, to] = state.view;
    return LEFT + (token - from) / (to - from) * this.inner;
  }

  tokenAt(event) {
    const [from, to] = state.view;
    const x = event.clientX - this.canvas.getBoundingClientRect().left - LEFT;
    return Math.max(from, Math.min(to - 1, Math.floor(from + x / this.inner * (to - from))));
  }

  axis(pen, bottom) {
    pen.fillStyle = colour("faint");
    for (const tick of niceTicks(...state.view, Math.max(2, this.inner / 90))) {
      const x = this.x(tick);
      if (x < LEFT + 1) continue;
      pen.fillRect(Math.round(x), bottom, 1, 3);
      pen.textAlign = x > this.width - RIGHT - 20 ? "right" : "center";
      pen.fillText(whole(tick), x, bottom + 16);
    }
    pen.textAlign = "right";
    pen.fillText("token", LEFT - 6, bottom + 16);
  }

  // The lines in sight in the text, the cursor and what the pointer is on.
  marks(pen) {
    const [first, last] = visibleTokens(), top = this.top ?? TOP, bottom = this.height - BOTTOM;
    const from = Math.max(LEFT, this.x(first)), to = Math.min(this.width - RIGHT, this.x(last));
    pen.fillStyle = colour("sight");
    if (to > from) pen.fillRect(from, top, Math.max(2, to - from), bottom - top);
    for (const [token, name] of [[state.hover, "faint"], [state.cursor, "accent"]]) {
      if (token === null || token < state.view[0] || token >= state.view[1]) continue;
      pen.fillStyle = colour(name);
      pen.fillRect(Math.round(this.x(token + 0.5)) - 0.5, top, name === "accent" ? 1.5 : 1, bottom - top);
    }
  }
}

class Curves extends Canvas {
  // lines(): [{ label, colour, value(token), trace(from, to, columns) -> {low, mean, high} per column }]
  constructor(id, lines, { zero = false, log = false } = {}) {
    super(id);
    Object.assign(this, { lines, zero, log });
    this.legend = byId(`${id}-legend`);
  }

  paint(pen) {
    const bottom = this.height - BOTTOM, columns = Math.max(2, Math.floor(this.inner));
    const lines = this.current = this.lines();
    const traces = lines.map((line) => line.trace(...state.view, columns));
    if (this.log) {  // layers whose values differ by decades, as the steps of W₁ and W₂ do
      for (const trace of traces) {
        for (const name of ["low", "mean", "high"]) trace[name] = trace[name].map((value) => Math.log10(Math.max(value, 1e-9)));
      }
    }
    let low = Infinity, high = -Infinity;
    for (const trace of traces) {
      for (const value of trace.low) low = Math.min(low, value);
      for (const value of trace.high) high = Math.max(high, value);
    }
    if (this.zero) low = Math.min(0, low);
    if (!(high > low)) [low, high] = [low - Math.abs(low) * 0.1 - 1e-9, high + Math.abs(high) * 0.1 + 1e-9];
    const y = (value) => bottom - (value - low) / (high - low) * (bottom - TOP);
    pen.textAlign = "right";
    let ticks = niceTicks(low, high, this.height > 90 ? 4 : 3);
    if (this.log && high - low > 1) ticks = ticks.filter(Number.isInteger);
    for (const tick of ticks) {
      pen.fillStyle = colour("grid");
      pen.fillRect(LEFT, Math.round(y(tick)), this.inner, 1);
      pen.fillStyle = colour("faint");
      pen.fillText(short(this.log ? 10 ** tick : tick), LEFT - 6, y(tick) + 4);
    }
    this.axis(pen, bottom);
    traces.forEach((trace, index) => {
      const x = (i) => LEFT + (i + 0.5) / trace.mean.length * this.inner;
      pen.fillStyle = pen.strokeStyle = colour(lines[index].colour);
      if (trace.band) {
        pen.globalAlpha = 0.22;
        pen.beginPath();
        trace.high.forEach((value, i) => pen.lineTo(x(i), y(value)));
        for (let i = trace.low.length - 1; i >= 0; i--) pen.lineTo(x(i), y(trace.low[i]));
        pen.fill();
        pen.globalAlpha = 1;
      }
      pen.lineWidth = 1.5;
      pen.lineJoin = "round";
      pen.beginPath();
      trace.mean.forEach((value, i) => pen.lineTo(x(i), y(value)));
      pen.stroke();
    });
  }

  showValues() {
    const token = state.hover ?? state.cursor;
    this.legend.replaceChildren(...this.current.map((line) => {
      const item = element("span", { class: "key" }, `${line.label} `);
      item.style.setProperty("--key", `var(--${line.colour})`);
      const value = line.value(token);
      item.append(element("b", {}, value === null ? "" : short(value)));
      return item;
    }));
  }
}

// Values [..] of which entry i stands for tokens start + i * bin and on: mean and range per column.
function columnsOf(values, bin, start = 0) {
  return (from, to, columns) => {
    const count = Math.min(columns, Math.max(2, Math.ceil((to - from) / bin)));
    const low = new Float32Array(count), mean = new Float32Array(count), high = new Float32Array(count);
    for (let i = 0; i < count; i++) {
      const first = Math.max(0, Math.min(values.length - 1, Math.floor((from + (to - from) * i / count - start) / bin)));
      const last = Math.max(first + 1, Math.min(values.length, Math.floor((from + (to - from) * (i + 1) / count - start) / bin)));
      let sum = 0;
      low[i] = Infinity;
      high[i] = -Infinity;
      for (let j = first; j < last; j++) {
        low[i] = Math.min(low[i], values[j]);
        high[i] = Math.max(high[i], values[j]);
        sum += values[j];
      }
      mean[i] = sum / (last - first);
    }
    return { low, mean, high, band: (to - from) / bin > count };
  };
}

// The mean over `width` tokens around each column's middle, from running sums: noise hides the difference.
function smoothed(values, start, width) {
  const sums = new Float64Array(values.length + 1);
  for (let i = 0; i < values.length; i++) sums[i + 1] = sums[i] + values[i];
  return (from, to, columns) => {
    const count = Math.min(columns, to - from), mean = new Float32Array(count);
    for (let i = 0; i < count; i++) {
      const middle = from + (to - from) * (i + 0.5) / count - start;
      const first = Math.max(0, Math.min(values.length - 1, Math.floor(middle - width / 2)));
      const last = Math.max(first + 1, Math.min(values.length, Math.ceil(middle + width / 2)));
      mean[i] = (sums[last] - sums[first]) / (last - first);
    }
    return { low: mean, mean, high: mean, band: false };
  };
}

class DependenceMap extends Canvas {
  // One row per span and one for the control, one column per place of the view; the darker, the more the
  // place depends on it.
  constructor(id, list) {
    super(id);
    this.top = 0;
    this.list = byId(list);
    this.rows = [...data.spans, [0, total]];
    this.control = data.spans.length;
    this.row = Math.max(7, Math.min(17, Math.floor(285 / this.rows.length)));
    this.canvas.style.height = `${this.row * this.rows.length + BOTTOM}px`;
    this.list.style.setProperty("--row", `${this.row}px`);
    this.bars = this.rows.map(([first, last], span) => {
      const bar = element("button", { type: "button", class: span === this.control ? "bar control" : "bar" });
      bar.append(element("span", { class: "length" }), element("b"));
      bar.addEventListener("click", () => reveal(first, true));
      bar.title = span === this.control ? "control: nothing left out, a change of one part in a million"
        : `tokens ${whole(first)} to ${whole(last - 1)}: show in the text`;
      return bar;
    });
    this.list.replaceChildren(...this.bars);
  }

  paint(pen) {
    const one = series[state.measure], [from, to] = state.view;
    const bottom = this.row * this.rows.length, columns = Math.max(1, Math.floor(this.inner / 2));
    const traces = this.rows.map((_, span) => columnsOf(one.mean(dependenceRows(span)), one.bin)(from, to, columns));
    const most = Math.max(1e-12, ...traces.map((trace) => quantiles(trace.mean, [0.98])[0]));
    traces.forEach((trace, span) => {
      pen.fillStyle = colour(span === this.control ? "without" : "depend");
      const edge = (i) => Math.round(LEFT + i / trace.mean.length * this.inner);
      trace.mean.forEach((value, i) => {
        pen.globalAlpha = Math.min(1, Math.sqrt(value / most));
        pen.fillRect(edge(i), span * this.row, edge(i + 1) - edge(i), this.row - 1);
      });
    });
    pen.globalAlpha = 1;
    this.axis(pen, bottom);
    pen.textAlign = "right";
    pen.fillStyle = colour("faint");
    const every = Math.ceil(12 / this.row);
    this.rows.forEach(([first], span) => {
      const control = span === this.control, label = control ? "control" : whole(first);
      if (control || (span % every === 0 && span + every <= this.control)) {
        pen.fillText(label, LEFT - 6, (span + 0.5) * this.row + 4);
      }
    });
    byId("depend-scale").textContent = `blank: 0; full colour: ${short(most)} and more, in between by square root. Rows: the spans' first tokens.`;
  }

  showValues() {
    const token = state.hover ?? state.cursor;
    const values = this.rows.map((_, span) => dependenceAt(span, token));
    const most = Math.max(...values, 1e-12);
    this.bars.forEach((bar, span) => {
      const [first] = this.rows[span], shown = first > token ? "later" : short(values[span]);
      bar.style.setProperty("--share", values[span] / most);
      bar.lastChild.textContent = first > token ? "" : shown;
      bar.setAttribute("aria-label", `${bar.title}: ${shown}`);
    });
  }
}
