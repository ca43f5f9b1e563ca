// The figures: decoded where they are needed, from codes of 8 or 16 bits.
const data = JSON.parse(document.getElementById("data").textContent);

class Series {
  // Rows of values; `shape` ends with their length. Entry i of a row stands for tokens i * bin and on.
  constructor(packed) {
    const raw = atob(packed.codes);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    this.codes = packed.bits === 16 ? new Uint16Array(bytes.buffer) : bytes;
    Object.assign(this, { shape: packed.shape, bin: packed.bin, low: packed.low, high: packed.high });
    this.log = packed.log;
    this.top = 2 ** packed.bits - 1;
    this.length = packed.shape.at(-1);
    this.kept = new Map();
  }

  value(row, code) {
    const low = this.low[row], high = this.high[row];
    if (!this.log) return low + (high - low) * code / this.top;
    return code === 0 ? 0 : low * Math.exp(Math.log(high / low) * (code - 1) / (this.top - 1));
  }

  at(row, token) {
    const index = Math.min(Math.floor(token / this.bin), this.length - 1);
    return this.value(row, this.codes[row * this.length + index]);
  }

  // The mean of some rows, as numbers. The last few are kept: moving the cursor changes none of them.
  mean(rows) {
    const key = rows.join();
    if (!this.kept.has(key)) {
      const out = new Float32Array(this.length);
      for (const row of rows) {
        const table = Float32Array.from({ length: this.top + 1 }, (_, code) => this.value(row, code));
        const start = row * this.length;
        for (let i = 0; i < out.length; i++) out[i] += table[this.codes[start + i]] / rows.length;
      }
      if (this.kept.size > 12) this.kept.delete(this.kept.keys().next().value);
      this.kept.set(key, out);
    }
    return this.kept.get(key);
  }
}

const series = {};
for (const name of ["surprise", "theta", "alpha", "eta", "change", "loss", "frozenLoss", "retrieval", "prediction"]) {
  if (data[name]) series[name] = new Series(data[name]);
}
const total = data.tokens.length;
const [blocks, heads] = data.surprise.shape;

// What is chosen. block, head: -1 is the mean; view: the tokens [from, to) that the charts show.
const state = { block: -1, head: -1, cursor: 0, hover: null, view: [0, total], measure: "retrieval" };

function chosen(count, index) {
  return index < 0 ? [...Array(count).keys()] : [index];
}

// Rows of a series [blocks, heads, ...layers, tokens] for what is chosen, of one memory layer.
function rowsOf(one, layer = 0) {
  const layers = one.shape.length > 3 ? one.shape[2] : 1;
  return chosen(blocks, state.block).flatMap((block) =>
    chosen(heads, state.head).map((head) => (block * heads + head) * layers + layer));
}

function surpriseNow() {
  return series.surprise.mean(rowsOf(series.surprise));
}

// How token `token` depends on span `span`, and the same for all tokens.
function dependenceRows(span) {
  if (state.measure === "prediction") return [span];
  return chosen(blocks, state.block).map((block) => span * blocks + block);
}

function dependenceAt(span, token) {
  const rows = dependenceRows(span), one = series[state.measure];
  return rows.reduce((sum, row) => sum + one.at(row, token), 0) / rows.length;
}

function quantiles(values, shares) {
  const sample = Float32Array.from({ length: Math.min(values.length, 20000) },
    (_, i) => values[Math.floor(i * values.length / Math.min(values.length, 20000))]).sort();
  return shares.map((share) => sample[Math.min(sample.length - 1, Math.floor(share * sample.length))]);
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) {
    const [digits, power] = value.toExponential(1).split("e");
    return `${digits.replace(".0", "")}·10${[...power.replace("+", "")].map((sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]).join("")}`;
  }
  return String(Number(value.toPrecision(3)));
}

const whole = (value) => Math.round(value).toLocaleString("en-US");
const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}
