// The page: findings first, then the map. It asks a source for data, so that it works without a server too.
import { bandOf, cell, colourOf, columnAt, decode, logOf, normText, rowsOf } from "./map.js";

const ROW = 14;
const LABEL = 260;
const AXIS = 18;
const MANY = 300;
const WORDS = ["ok", "frozen", "unseen", "zero", "missing", "nonfinite"];

/** Make an element; text is text, whatever a parameter is called. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export class Page {
  /**
   * @param {HTMLElement} home Where to build the page.
   * @param {object} source `runs()`, `findings(run)` and `matrix(run, columns, low, high)`, all async.
   * @param {object} address `read()` and `write(URLSearchParams)`: where the view is kept.
   * @param {function} isDark Whether to draw on dark.
   */
  constructor(home, source, address, isDark) {
    Object.assign(this, { home, source, address, isDark });
    const kept = address.read();
    const list = (name) => (kept.get(name) || "").split(",").filter(Boolean);
    this.view = {
      run: kept.get("run"),
      text: kept.get("filter") || "",
      statuses: new Set(list("statuses").map((word) => WORDS.indexOf(word)).filter((code) => code >= 0)),
      open: new Set(list("open").map(decodeURIComponent)),
      problems: kept.get("problems") === "1",
      low: kept.has("low") ? Number(kept.get("low")) : null,
      high: kept.has("high") ? Number(kept.get("high")) : null,
      row: kept.get("row"),
    };
    this.cursor = { row: 0, column: 0 };
    this.rows = [];
    this.build();
  }

  build() {
    this.select = make("select", { "aria-label": "run", onchange: () => this.choose(this.select.value) });
    this.verdict = make("h1", { id: "verdict" });
    this.counts = make("div", { class: "bar", id: "counts" });
    this.findings = make("section", { id: "findings", "aria-label": "findings" });
    this.filter = make("input", {
      type: "search", placeholder: "filter names by regex", "aria-label": "filter names by regular expression",
      value: this.view.text, oninput: () => this.refilter(),
    });
    this.order = make("button", { "aria-pressed": String(this.view.problems), onclick: () => this.reorder() }, "problems first");
    this.unzoom = make("button", { onclick: () => this.zoom(null, null) }, "all steps");
    this.boxes = make("span", { class: "bar" });
    this.canvas = make("canvas", {
      tabindex: "0", role: "application", "aria-label": "map of parameters and steps",
      onkeydown: (event) => this.key(event),
    });
    this.spacer = make("div");
    this.scroller = make("div", { class: "map", onscroll: () => this.draw() }, this.canvas, this.spacer);
    this.tip = make("div", { class: "tip", role: "status", hidden: "" });
    this.chart = make("div", { class: "chart", id: "chart", hidden: "" });
    this.mapping = make(
      "section", { "aria-label": "map" },
      make("h2", {}, "Every parameter at every logged step"),
      make("div", { class: "bar" }, this.filter, this.order, this.boxes, this.unzoom),
      make("p", { class: "soft" }, "Drag to zoom in time, click a module to open it, a parameter for its norm. Keys: arrows, Enter, + and −, Escape."),
      this.scroller, this.chart,
    );
    this.home.append(make("div", { class: "bar" }, make("label", {}, "run ", this.select)), this.verdict, this.counts, this.findings, this.mapping, this.tip);
    WORDS.forEach((word, code) => this.boxes.append(this.box(word, code)));
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => this.leave());
    this.canvas.addEventListener("mousedown", (event) => { this.drag = this.place(event); });
    this.canvas.addEventListener("mouseup", (event) => this.release(event));
    new ResizeObserver(() => this.resized()).observe(this.home);
  }

  box(word, code) {
    return make("button", {
      "aria-pressed": String(this.view.statuses.has(code)), "data-status": word,
      onclick: (event) => {
        const on = !this.view.statuses.delete(code);
        if (on) this.view.statuses.add(code);
        event.currentTarget.setAttribute("aria-pressed", String(on));
        this.arrange();
      },
    }, this.mark(code), word);
  }

  mark(code) {
    const mark = make("span", { class: "mark", "aria-hidden": "true" });
    mark.style.background = `rgb(${colourOf(code, 200, [-4, 2], [-12, 8], this.isDark())})`;
    return mark;
  }

  // Data

  async load() {
    try {
      const runs = await this.source.runs();
      this.select.replaceChildren(...runs.map((run) => make("option", { value: run }, run)));
      if (!runs.length) {
        this.say("No data of GradWatch yet", "It is written by runs with GradWatch and a TensorBoard logger.");
        return;
      }
      if (!runs.includes(this.view.run)) this.view.run = runs[0];
      this.select.value = this.view.run;
      this.told = await this.source.findings(this.view.run);
      this.tell();
      await this.fetch();
    } catch (error) {
      this.say("The run cannot be shown", String(error.message || error));
    }
    window.gradwatchReady = (window.gradwatchReady || 0) + 1;
  }

  say(title, text) {
    this.verdict.textContent = title;
    this.findings.replaceChildren(make("p", { class: "soft" }, text));
    this.mapping.hidden = true;
    window.gradwatchReady = (window.gradwatchReady || 0) + 1;
  }

  async fetch() {
    const columns = Math.max(Math.min(this.width() - LABEL, 2000), 50);
    this.fetched = columns;
    this.matrix = decode(await this.source.matrix(this.view.run, Math.floor(columns), this.view.low, this.view.high));
    this.band = bandOf(this.matrix);
    this.mapping.hidden = !this.matrix.columns;
    this.arrange();
  }

  async choose(run) {
    Object.assign(this.view, { run, low: null, high: null, row: null });
    await this.load();
  }

  async zoom(low, high) {
    Object.assign(this.view, { low, high });
    await this.fetch();
  }

  // Findings

  tell() {
    const { parameters, batches, counts, alerts } = this.told;
    const findings = this.told.findings.filter((found) => found.healed_at === null);
    const healed = this.told.findings.filter((found) => found.healed_at !== null);
    const by = {};
    for (const found of findings) by[found.status] = (by[found.status] || 0) + 1;
    const kinds = Object.entries(by).map(([status, count]) => `${count} ${status}`).join(", ");
    this.verdict.textContent = findings.length
      ? `${findings.length} ${findings.length === 1 ? "finding" : "findings"}: ${kinds}`
      : `No problem found in ${parameters} parameters`;
    this.verdict.className = findings.length ? "" : "good";
    const when = batches ? `batches ${batches[0]} to ${batches[1]}` : "no step was logged yet";
    this.counts.replaceChildren(
      ...WORDS.map((word, code) => (counts[word] ? make("span", {}, this.mark(code), `${counts[word]} ${word}`) : null)).filter(Boolean),
      make("span", { class: "soft" }, `${parameters} parameters, ${when}`),
    );
    this.findings.replaceChildren(
      ...findings.map((found) => this.finding(found)),
      ...(healed.length ? [make("details", { id: "healed" }, make("summary", {}, `${healed.length} healed`), ...healed.map((found) => this.finding(found)))] : []),
      ...(alerts.length ? [this.alerts(alerts)] : []),
    );
  }

  finding(found) {
    const code = WORDS.indexOf(found.status);
    const element = make(
      "article", { class: "finding", "data-cause": found.cause },
      make("h3", {}, this.mark(code), `${found.cause}: ${found.fact}`),
      make("pre", {}, found.text),
      make("div", { class: "bar" },
        make("button", { onclick: () => this.show(found.parameters) }, "show in the map"),
        found.place ? make("button", { onclick: () => navigator.clipboard?.writeText(found.place) }, `copy ${found.place}`) : null,
        make("span", { class: "soft" }, found.healed_at === null ? `since step ${found.step}` : `steps ${found.step} to ${found.healed_at - 1}`)),
    );
    element.style.borderLeftColor = `rgb(${colourOf(code, 200, [-4, 2], [-12, 8], this.isDark())})`;
    return element;
  }

  alerts(alerts) {
    const line = (alert) => `step ${alert.step}: rule ${alert.rule} (${alert.action}), ${alert.parameters.slice(0, 3).join(", ")}${alert.parameters.length > 3 ? ` and ${alert.parameters.length - 3} more` : ""}`;
    return make("details", { id: "alerts" }, make("summary", {}, `${alerts.length} ${alerts.length === 1 ? "alert" : "alerts"}`),
      make("ul", {}, ...alerts.map((alert) => make("li", {}, line(alert)))));
  }

  show(parameters) {
    const names = parameters.map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.filter.value = names.length > 40 ? "" : `^(${names.join("|")})$`;
    this.refilter();
    this.mapping.scrollIntoView({ behavior: "smooth" });
  }

  // Rows

  refilter() {
    this.view.text = this.filter.value;
    this.arrange();
  }

  reorder() {
    this.view.problems = !this.view.problems;
    this.order.setAttribute("aria-pressed", String(this.view.problems));
    this.arrange();
  }

  arrange() {
    if (!this.matrix) return;
    let filter = null;
    try {
      filter = this.view.text ? new RegExp(this.view.text, "i") : null;
      this.filter.setAttribute("aria-invalid", "false");
    } catch {
      this.filter.setAttribute("aria-invalid", "true");
    }
    this.rows = rowsOf(this.matrix, { ...this.view, filter, group: this.matrix.names.length > MANY });
    this.cursor.row = Math.min(this.cursor.row, Math.max(this.rows.length - 1, 0));
    this.unzoom.hidden = this.view.low === null;
    this.scroller.style.height = `${Math.min(this.rows.length * ROW + AXIS + 4, 560)}px`;
    this.canvas.setAttribute("aria-label", `map of ${this.rows.length} rows and ${this.matrix.columns} columns. ${this.verdict.textContent}`);
    this.remember();
    this.draw();
    if (this.view.row) this.plot(this.view.row);
  }

  remember() {
    const { run, text, statuses, open, problems, low, high, row } = this.view;
    const kept = new URLSearchParams({ run });
    if (text) kept.set("filter", text);
    if (statuses.size) kept.set("statuses", [...statuses].map((code) => WORDS[code]).join(","));
    if (open.size) kept.set("open", [...open].map(encodeURIComponent).join(","));
    if (problems) kept.set("problems", "1");
    if (low !== null) { kept.set("low", low); kept.set("high", high); }
    if (row) kept.set("row", row);
    this.address.write(kept);
  }

  // Drawing

  width() {
    return Math.max(this.home.clientWidth - 48, 320);
  }

  resized() {
    if (!this.matrix) return;
    if (Math.abs(this.width() - LABEL - this.fetched) > 60) this.fetch();
    else this.draw();
  }

  redraw() {
    document.body.classList.toggle("dark", this.isDark());
    if (this.told) this.tell();
    this.boxes.replaceChildren(...WORDS.map((word, code) => this.box(word, code)));
    this.draw();
  }

  draw() {
    document.body.classList.toggle("dark", this.isDark());
    if (!this.matrix || !this.matrix.columns) return;
    const width = this.width();
    const height = this.scroller.clientHeight;
    const ratio = window.devicePixelRatio || 1;
    this.spacer.style.height = `${Math.max(this.rows.length * ROW + AXIS - height, 0)}px`;
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(document.body);
    pen.fillStyle = style.backgroundColor;
    pen.fillRect(0, 0, width, height);
    this.first = Math.floor(this.scroller.scrollTop / ROW);
    const last = Math.min(this.first + Math.ceil((height - AXIS) / ROW) + 1, this.rows.length);
    this.cells(pen, last, width, ratio);
    this.labels(pen, last, style.color);
    this.axis(pen, width, style.color);
    if (document.activeElement === this.canvas) this.focusRing(pen, width);
  }

  cells(pen, last, width, ratio) {
    const columns = this.matrix.columns;
    const dark = this.isDark();
    const image = new ImageData(columns, Math.max(last - this.first, 1));
    for (let r = this.first; r < last; r += 1) {
      for (let c = 0; c < columns; c += 1) {
        const { status, norm } = cell(this.matrix, this.rows[r], c);
        const at = ((r - this.first) * columns + c) * 4;
        image.data.set(colourOf(status, norm, this.band, this.matrix.scale, dark), at);
        image.data[at + 3] = 255;
      }
    }
    const small = new OffscreenCanvas(image.width, image.height);
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, LABEL, AXIS, width - LABEL, (last - this.first) * ROW);
    if (ratio) pen.lineWidth = 1;
    pen.fillStyle = getComputedStyle(document.body).backgroundColor;
    for (let r = this.first; r <= last; r += 1) pen.fillRect(LABEL, AXIS + (r - this.first) * ROW, width - LABEL, 1);
  }

  labels(pen, last, ink) {
    pen.font = "11px ui-monospace, monospace";
    pen.textBaseline = "middle";
    pen.fillStyle = ink;
    for (let r = this.first; r < last; r += 1) {
      const row = this.rows[r];
      const sign = row.module === null ? "" : this.view.open.has(row.module) ? "▾ " : "▸ ";
      let text = `${"  ".repeat(row.depth)}${sign}${row.label}`;
      while (text.length > 8 && pen.measureText(text).width > LABEL - 10) text = `…${text.slice(2)}`;
      pen.fillText(text, 2, AXIS + (r - this.first) * ROW + ROW / 2 + 1);
    }
  }

  axis(pen, width, ink) {
    const { ranges, columns } = this.matrix;
    pen.fillStyle = ink;
    pen.font = "11px system-ui, sans-serif";
    const every = Math.max(Math.ceil(columns / ((width - LABEL) / 90)), 1);
    for (let c = 0; c < columns; c += every) pen.fillText(String(ranges[c][0]), this.x(c), AXIS / 2);
    pen.fillText("batch", 2, AXIS / 2);
    for (const alert of this.told.alerts) {
      if (alert.step < ranges[0][0] || alert.step > ranges[columns - 1][1]) continue;
      pen.fillText("▼", this.x(columnAt(ranges, alert.step)) - 4, AXIS - 5);
    }
  }

  focusRing(pen, width) {
    pen.strokeStyle = "#0b57d0";
    pen.lineWidth = 2;
    const wide = Math.max((width - LABEL) / this.matrix.columns, 4);
    pen.strokeRect(this.x(this.cursor.column), AXIS + (this.cursor.row - this.first) * ROW, wide, ROW);
  }

  x(column) {
    return LABEL + (column / this.matrix.columns) * (this.width() - LABEL);
  }

  // Pointer and keys

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top - AXIS) / ROW) + this.first;
    const share = (event.clientX - box.left - LABEL) / (this.width() - LABEL);
    const column = Math.min(Math.floor(share * this.matrix.columns), this.matrix.columns - 1);
    return { row, column, x: event.clientX, y: event.clientY };
  }

  hover(event) {
    const { row, column } = this.place(event);
    if (column < 0 || !this.rows[row] || row < 0) return this.leave();
    this.tip.textContent = this.words(row, column);
    this.tip.hidden = false;
    this.tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - this.tip.offsetWidth - 8)}px`;
    this.tip.style.top = `${event.clientY + 16}px`;
    return undefined;
  }

  words(row, column) {
    const { status, norm } = cell(this.matrix, this.rows[row], column);
    const [first, last] = this.matrix.ranges[column];
    const when = first === last ? `batch ${first}` : `batches ${first} to ${last}`;
    return `${this.rows[row].label}\n${when}: ${WORDS[status] || "not in the model"}\n${normText(norm, this.matrix.scale)}`;
  }

  leave() {
    this.tip.hidden = true;
  }

  release(event) {
    const from = this.drag;
    const to = this.place(event);
    this.drag = null;
    if (!from) return;
    if (Math.abs(to.x - from.x) > 6 && from.column >= 0) {
      const [a, b] = [from.column, Math.max(to.column, 0)].sort((p, q) => p - q);
      this.zoom(this.matrix.ranges[a][0], this.matrix.ranges[b][1]);
    } else if (this.rows[to.row]) this.open(to.row);
  }

  open(index) {
    const row = this.rows[index];
    if (row.module === null) {
      this.view.row = row.label;
      this.plot(row.label);
      this.remember();
      return;
    }
    if (!this.view.open.delete(row.module)) this.view.open.add(row.module);
    this.arrange();
  }

  key(event) {
    const { cursor, rows, matrix } = this;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-20, 0], PageDown: [20, 0] };
    if (moves[event.key]) {
      cursor.row = Math.min(Math.max(cursor.row + moves[event.key][0], 0), rows.length - 1);
      cursor.column = Math.min(Math.max(cursor.column + moves[event.key][1], 0), matrix.columns - 1);
      const top = cursor.row * ROW;
      if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
      if (top + ROW + AXIS > this.scroller.scrollTop + this.scroller.clientHeight) this.scroller.scrollTop = top + ROW + AXIS - this.scroller.clientHeight;
      this.draw();
      const box = this.canvas.getBoundingClientRect();
      this.tip.textContent = this.words(cursor.row, cursor.column);
      this.tip.hidden = false;
      this.tip.style.left = `${box.left + this.x(cursor.column)}px`;
      this.tip.style.top = `${box.top + AXIS + (cursor.row - this.first + 1) * ROW + 4}px`;
    } else if (event.key === "Enter" || event.key === " ") this.open(cursor.row);
    else if (event.key === "+" || event.key === "-") {
      const half = Math.ceil(matrix.columns / (event.key === "+" ? 4 : 1));
      const low = Math.max(cursor.column - half, 0);
      const high = Math.min(cursor.column + half, matrix.columns - 1);
      if (event.key === "+") this.zoom(matrix.ranges[low][0], matrix.ranges[high][1]);
      else this.zoom(null, null);
    } else if (event.key === "Escape") { this.leave(); this.chart.hidden = true; this.view.row = null; this.zoom(null, null); } else return;
    event.preventDefault();
  }

  // One parameter's norm over time

  plot(name) {
    const index = this.matrix.names.indexOf(name);
    if (index < 0) { this.chart.hidden = true; return; }
    const { columns, ranges, scale } = this.matrix;
    const logs = Array.from({ length: columns }, (_, c) => logOf(this.matrix.norm[index * columns + c], scale));
    const finite = logs.filter((log) => log !== null && Number.isFinite(log));
    const low = Math.floor(Math.min(...finite, 0));
    const high = Math.ceil(Math.max(...finite, low + 1));
    const point = (log, c) => `${((c + 0.5) / columns) * 1000},${150 - ((log - low) / (high - low)) * 140}`;
    const parts = [];
    logs.forEach((log, c) => {
      if (log === null || !Number.isFinite(log)) parts.push(null);
      else if (parts.length && parts.at(-1)) parts.at(-1).push(point(log, c));
      else parts.push([point(log, c)]);
    });
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 1000 160");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `log10 of the grad norm of ${name}, from ${low} to ${high}`);
    for (const points of parts.filter(Boolean)) {
      const line = document.createElementNS("http://www.w3.org/2000/svg", points.length > 1 ? "polyline" : "circle");
      if (points.length > 1) line.setAttribute("points", points.join(" "));
      else { const [x, y] = points[0].split(","); line.setAttribute("cx", x); line.setAttribute("cy", y); line.setAttribute("r", "2"); }
      line.setAttribute("fill", points.length > 1 ? "none" : "currentColor");
      line.setAttribute("stroke", "currentColor");
      line.setAttribute("vector-effect", "non-scaling-stroke");
      svg.append(line);
    }
    this.chart.replaceChildren(
      make("strong", {}, name), make("span", { class: "soft" }, `  log10 of the grad norm, ${low} to ${high}; batches ${ranges[0][0]} to ${ranges[columns - 1][1]}`),
      svg);
    this.chart.hidden = false;
  }
}
