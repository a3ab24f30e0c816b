// What the map shows, without a page: decoding, rows, and colours. Run by node in the tests.

export const ABSENT = 255;

/** Decode what the server sends: a header, then a byte per cell for the status and one for the norm. */
export function decode(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const size = head.names.length * head.ranges.length;
  return {
    ...head,
    columns: head.ranges.length,
    status: new Uint8Array(buffer, 4 + length, size),
    norm: new Uint8Array(buffer, 4 + length + size, size),
  };
}

/** Return the path of the module that a parameter belongs to. */
export function moduleOf(name) {
  const dot = name.lastIndexOf(".");
  return dot < 0 ? "" : name.slice(0, dot);
}

/**
 * Return the rows to draw: parameters, or modules that can be opened.
 *
 * @param {object} matrix What `decode` returned.
 * @param {object} view `filter` (a RegExp or null), `statuses` (a Set of codes, empty for all), `open` (a
 *   Set of module paths), `problems` (whether the worst come first), `group` (whether to fold modules).
 */
export function rowsOf(matrix, view) {
  const worst = worstStatus(matrix);
  const shown = [];
  matrix.names.forEach((name, index) => {
    if (view.filter && !view.filter.test(name)) return;
    if (view.statuses.size && !view.statuses.has(worst[index])) return;
    shown.push(index);
  });
  const rows = view.group ? folded(matrix, shown, view.open) : shown.map((i) => parameter(matrix, i, 0));
  if (!view.problems) return rows;
  return sorted(rows, worst);
}

function parameter(matrix, index, depth) {
  return { label: matrix.names[index], members: [index], module: null, depth };
}

function folded(matrix, shown, open) {
  const modules = new Map();
  for (const index of shown) {
    const path = moduleOf(matrix.names[index]);
    if (!modules.has(path)) modules.set(path, []);
    modules.get(path).push(index);
  }
  const rows = [];
  for (const [path, members] of modules) {
    const label = `${path || "(the model itself)"} · ${members.length}`;
    rows.push({ label, members, module: path, depth: 0 });
    if (open.has(path)) for (const index of members) rows.push(parameter(matrix, index, 1));
  }
  return rows;
}

function sorted(rows, worst) {
  const blocks = [];
  for (const row of rows) {
    if (row.depth && blocks.length) blocks[blocks.length - 1].rows.push(row);
    else blocks.push({ rows: [row], worst: badness(row.members, worst) });
  }
  blocks.sort((a, b) => b.worst - a.worst);
  return blocks.flatMap((block) => block.rows);
}

function badness(members, worst) {
  return Math.max(...members.map((index) => worst[index]));
}

/** Return each parameter's worst status over all columns, 0 where it was never there. */
export function worstStatus(matrix) {
  return matrix.names.map((_, index) => {
    let worst = 0;
    for (let column = 0; column < matrix.columns; column += 1) {
      const status = matrix.status[index * matrix.columns + column];
      if (status !== ABSENT && status > worst) worst = status;
    }
    return worst;
  });
}

/** Return the status and norm of a cell of a row: the worst and the largest of its members. */
export function cell(matrix, row, column) {
  let status = -1;
  let norm = 0;
  for (const index of row.members) {
    const at = index * matrix.columns + column;
    const found = matrix.status[at];
    if (found !== ABSENT && found > status) status = found;
    if (matrix.norm[at] > norm) norm = matrix.norm[at];
  }
  return { status: status < 0 ? ABSENT : status, norm };
}

/** Return the log10 of a norm that was kept as a byte; null for none. */
export function logOf(byte, scale) {
  if (byte === 0) return null;
  if (byte === 1) return -Infinity;
  if (byte === 255) return Infinity;
  return ((byte - 2) / 252) * (scale[1] - scale[0]) + scale[0];
}

/** Say a norm in words. */
export function normText(byte, scale) {
  const log = logOf(byte, scale);
  if (log === null) return "norm not measured";
  if (log === -Infinity) return "norm 0, or below 1e-12";
  if (log === Infinity) return "norm not finite, or above 1e8";
  return `norm ≈ ${(10 ** log).toExponential(1)}`;
}

// Of Okabe and Ito's colours, which those who see few colours tell apart: by status code.
const FLAT = { 1: [150, 150, 150], 2: [200, 200, 200], 3: [230, 159, 0], 4: [213, 94, 0], 5: [150, 40, 160] };
const FLAT_DARK = { ...FLAT, 1: [95, 95, 95], 2: [65, 65, 65], 5: [214, 120, 220] };
const RAMP = [[226, 238, 250], [8, 64, 129]];
const RAMP_DARK = [[18, 42, 74], [150, 205, 255]];

/** Return red, green and blue of a cell: statuses are flat, and what is well is a ramp over the log norm. */
export function colourOf(status, norm, band, scale, dark) {
  if (status === ABSENT) return dark ? [32, 32, 32] : [255, 255, 255];
  if (status !== 0) return (dark ? FLAT_DARK : FLAT)[status];
  const log = logOf(norm, scale);
  const [low, high] = dark ? RAMP_DARK : RAMP;
  if (log === null) return low;
  const t = Math.min(Math.max((log - band[0]) / (band[1] - band[0] || 1), 0), 1);
  return low.map((from, i) => Math.round(from + (high[i] - from) * t));
}

/** Return the lowest and highest finite log norm of what is well, for the ramp. */
export function bandOf(matrix) {
  let low = Infinity;
  let high = -Infinity;
  for (let at = 0; at < matrix.norm.length; at += 1) {
    if (matrix.norm[at] < 2 || matrix.norm[at] > 254) continue;
    low = Math.min(low, matrix.norm[at]);
    high = Math.max(high, matrix.norm[at]);
  }
  return low > high ? matrix.scale : [logOf(low, matrix.scale), logOf(high, matrix.scale)];
}

/** Return the last column whose batches begin at or before a batch. */
export function columnAt(ranges, batch) {
  let found = 0;
  ranges.forEach(([first], index) => {
    if (first <= batch) found = index;
  });
  return found;
}
