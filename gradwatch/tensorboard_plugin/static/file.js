// The entry of the page as a file of its own: all data lie in it.
import { Page } from "./page.js";

const data = JSON.parse(document.getElementById("data").textContent);

/** Return a matrix with only the columns of some batches; there are no others to ask for. */
function cut(buffer, low, high) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const kept = head.ranges.map((_, column) => column).filter((c) => head.ranges[c][1] >= low && head.ranges[c][0] <= high);
  const columns = head.ranges.length;
  const text = new TextEncoder().encode(JSON.stringify({ ...head, ranges: kept.map((c) => head.ranges[c]) }));
  const out = new Uint8Array(4 + text.length + 2 * head.names.length * kept.length);
  new DataView(out.buffer).setUint32(0, text.length, true);
  out.set(text, 4);
  const cells = new Uint8Array(buffer, 4 + length);
  let at = 4 + text.length;
  for (let row = 0; row < 2 * head.names.length; row += 1) {
    for (const column of kept) {
      out[at] = cells[row * columns + column];
      at += 1;
    }
  }
  return out.buffer;
}

const whole = Uint8Array.from(atob(data.matrix), (letter) => letter.charCodeAt(0)).buffer;

const inside = {
  async runs() {
    return [data.title];
  },
  async findings() {
    return data.findings;
  },
  async matrix(run, columns, low, high) {
    return low === null ? whole : cut(whole, low, high);
  },
};

const fragment = {
  read: () => new URLSearchParams(window.location.hash.slice(1)),
  write: (parameters) => window.history.replaceState(null, "", `#${parameters}`),
};

const darkness = window.matchMedia("(prefers-color-scheme: dark)");
const page = new Page(document.body, inside, fragment, () => darkness.matches);
darkness.addEventListener("change", () => page.redraw());
page.load();
