// The label and the tools that change it. A label is {width, height, ids}: a Uint8Array of class ids, row by row, which
// is the truth; a canvas only shows it. All arithmetic is in integers, so that a stroke has one exact result.

const UNDO_STEPS = 50;
export const MAX_BRUSH = 64;

/** A label of one class. */
export function blank(width, height, id = 0) {
  return { width, height, ids: new Uint8Array(width * height).fill(id) };
}

/** The rows of a disc that is `size` pixels across: [dy, first dx, last dx + 1] from the pixel it is set on. */
function disc(size) {
  const rows = [];
  const shift = size >> 1;
  for (let row = 0; row < size; row++) {
    let first = 0;
    while ((2 * first - size + 1) ** 2 + (2 * row - size + 1) ** 2 > size * size) first++;
    rows.push([row - shift, first - shift, size - first - shift]);
  }
  return rows;
}

function fillRow(label, y, first, end, id) {
  if (y < 0 || y >= label.height) return;
  const start = y * label.width;
  const limit = (x) => start + Math.min(Math.max(x, 0), label.width);
  label.ids.fill(id, limit(first), limit(end));
}

/** Set a disc on every pixel of the straight line from `a` to `b`, both included. */
export function line(label, a, b, size, id) {
  const rows = disc(size);
  const dx = b.x - a.x;
  const dy = b.y - a.y;
  const steps = Math.max(Math.abs(dx), Math.abs(dy)) || 1;
  const share = (i, length) => Math.floor((2 * i * length + steps) / (2 * steps)); // rounded, halves up
  for (let i = 0; i <= steps; i++) {
    const x = a.x + share(i, dx);
    const y = a.y + share(i, dy);
    for (const [row, first, end] of rows) fillRow(label, y + row, x + first, x + end, id);
  }
}

/** Fill the rectangle with the corners `a` and `b`, both included. */
export function rectangle(label, a, b, id) {
  const [top, bottom] = [Math.min(a.y, b.y), Math.max(a.y, b.y)];
  for (let y = Math.max(top, 0); y <= Math.min(bottom, label.height - 1); y++) {
    fillRow(label, y, Math.min(a.x, b.x), Math.max(a.x, b.x) + 1, id);
  }
}

/** Fill the region of one class around `point`; its pixels touch by their sides. */
export function fill({ width, height, ids }, { x, y }, id) {
  if (x < 0 || y < 0 || x >= width || y >= height) return;
  const old = ids[y * width + x];
  if (old === id) return;
  const waiting = [y * width + x];
  while (waiting.length) {
    const at = waiting.pop();
    if (ids[at] !== old) continue;
    ids[at] = id;
    if (at % width) waiting.push(at - 1);
    if ((at + 1) % width) waiting.push(at + 1);
    if (at >= width) waiting.push(at - width);
    if (at + width < ids.length) waiting.push(at + width);
  }
}

/** The label being painted, with its tool and its history. The pointer and the keyboard call down, move and up. */
export class Editor {
  tool = "brush";
  size = 6;
  id = 0;
  #undo = [];
  #redo = [];
  #stroke = null; // {before, start, last} while the pen is down

  /**
   * @param {() => void} changed called after every change of the label.
   * @param {(id: number) => void} picked called with the class that the picker met.
   */
  constructor(changed, picked) {
    Object.assign(this, { changed, picked, label: null });
  }

  get canUndo() {
    return this.#undo.length > 0;
  }

  get canRedo() {
    return this.#redo.length > 0;
  }

  get isDown() {
    return this.#stroke !== null;
  }

  /** Go on with a copy of another label, as one step that can be undone. */
  load(label) {
    this.cancel();
    if (this.label) this.#remember(this.label);
    this.label = { ...label, ids: label.ids.slice() };
    this.changed();
  }

  down(point) {
    const { width, height, ids } = this.label;
    const inside = point.x >= 0 && point.y >= 0 && point.x < width && point.y < height;
    if (this.tool === "pick") {
      if (inside) this.picked(ids[point.y * width + point.x]);
      return;
    }
    this.#stroke = { before: { width, height, ids: ids.slice() }, start: point, last: point };
    if (this.tool === "fill") {
      fill(this.label, point, this.id);
      this.up();
    } else {
      this.move(point);
    }
  }

  move(point) {
    if (!this.#stroke) return;
    const { before, start, last } = this.#stroke;
    if (this.tool === "brush") {
      line(this.label, last, point, this.size, this.id);
    } else {
      this.label.ids.set(before.ids); // the shape follows the pen until it is lifted
      if (this.tool === "line") line(this.label, start, point, this.size, this.id);
      else rectangle(this.label, start, point, this.id);
    }
    this.#stroke.last = point;
    this.changed();
  }

  up() {
    if (!this.#stroke) return;
    const { before } = this.#stroke;
    this.#stroke = null;
    if (before.ids.some((id, at) => id !== this.label.ids[at])) this.#remember(before);
    this.changed();
  }

  /** Lift the pen and take the stroke back. */
  cancel() {
    if (!this.#stroke) return;
    this.label = this.#stroke.before;
    this.#stroke = null;
    this.changed();
  }

  undo() {
    this.#step(this.#undo, this.#redo);
  }

  redo() {
    this.#step(this.#redo, this.#undo);
  }

  #remember(label) {
    this.#undo.push(label);
    if (this.#undo.length > UNDO_STEPS) this.#undo.shift();
    this.#redo = [];
  }

  #step(from, to) {
    this.cancel();
    if (!from.length) return;
    to.push(this.label);
    this.label = from.pop();
    this.changed();
  }
}
