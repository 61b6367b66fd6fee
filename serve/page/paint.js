// The canvas that shows the label, and what paints on it: pointer, pen, finger and keys.

const MAX_ZOOM = 8;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const LARGE_STEP = 8;

/** Pixel of a canvas under a pointer event; outside of it where the pointer is. */
export function pixelAt(canvas, event) {
  const box = canvas.getBoundingClientRect();
  return {
    x: Math.floor(((event.clientX - box.left) / box.width) * canvas.width),
    y: Math.floor(((event.clientY - box.top) / box.height) * canvas.height),
  };
}

/** Where an arrow key leads from `point`, kept inside; undefined for another key. */
export function step(event, point, step, width, height) {
  const arrow = ARROWS[event.key];
  if (!arrow || event.ctrlKey || event.metaKey || event.altKey) return undefined;
  event.preventDefault();
  const length = event.shiftKey ? step * LARGE_STEP : step;
  const inside = (value, limit) => Math.min(Math.max(value, 0), limit - 1);
  return { x: inside(point.x + arrow[0] * length, width), y: inside(point.y + arrow[1] * length, height) };
}

/** Place an element over a part of a canvas, all in pixels of the canvas. */
export function place(element, canvas, left, top, width, height) {
  const percent = (value, whole) => `${(100 * value) / whole}%`;
  element.style.left = percent(left, canvas.width);
  element.style.top = percent(top, canvas.height);
  element.style.width = percent(width, canvas.width);
  element.style.height = percent(height, canvas.height);
  element.hidden = false;
}

/** Colors by id as whole pixels of a canvas. */
export function colorTable(palette) {
  return new Uint32Array(Uint8Array.from(palette.flatMap((color) => [...color, 255])).buffer);
}

/** Show a label on a canvas of its size. */
export function draw(canvas, { width, height, ids }, colors) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let at = 0; at < ids.length; at++) pixels[at] = colors[ids[at]];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

export class Painter {
  zoom = 1;
  #cursor = { x: 0, y: 0 };
  #frame = 0;

  /**
   * @param {import("./label.js").Editor} editor
   * @param {HTMLElement} stage scrolls over the canvas in it, and has the outline of the brush.
   * @param {{colors: Uint32Array, names: string[]}} classes
   * @param {HTMLOutputElement} readout
   */
  constructor(editor, stage, classes, readout) {
    const canvas = stage.querySelector("canvas");
    Object.assign(this, { editor, stage, classes, readout, canvas, outline: stage.querySelector(".brush") });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", () => {
      editor.up();
      this.#point(this.#cursor);
    });
    canvas.addEventListener("pointercancel", () => editor.cancel());
    for (const type of ["pointerleave", "blur"]) canvas.addEventListener(type, () => this.#leave());
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.#point(this.#cursor));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
  }

  /** Show the label with the next frame. */
  draw() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      draw(this.canvas, this.editor.label, this.classes.colors);
      this.stage.style.aspectRatio = `${this.canvas.width} / ${this.canvas.height}`;
    });
  }

  /** Enlarge by `factor` around the middle of what is seen, or around the cursor of the keys. */
  zoomBy(factor) {
    const { stage, canvas } = this;
    const old = this.zoom;
    this.zoom = Math.min(Math.max(old * factor, 1), MAX_ZOOM);
    const middle = [stage.scrollLeft + stage.clientWidth / 2, stage.scrollTop + stage.clientHeight / 2];
    canvas.parentElement.style.width = `${100 * this.zoom}%`;
    stage.classList.toggle("zoomed", this.zoom > 1);
    stage.scrollLeft = (middle[0] * this.zoom) / old - stage.clientWidth / 2;
    stage.scrollTop = (middle[1] * this.zoom) / old - stage.clientHeight / 2;
  }

  #down(event) {
    if (!event.isPrimary || this.editor.isDown) return this.editor.cancel(); // a second finger: a pinch, no stroke
    if (event.button !== 0) return undefined;
    this.canvas.setPointerCapture(event.pointerId);
    const point = pixelAt(this.canvas, event);
    this.#point(point);
    return this.editor.down(point);
  }

  #move(event) {
    if (!event.isPrimary) return;
    const all = event.getCoalescedEvents?.() ?? [];
    if (event.buttons) for (const part of all.length ? all : [event]) this.editor.move(pixelAt(this.canvas, part));
    this.#point(pixelAt(this.canvas, event));
  }

  #key(event) {
    const { editor, canvas } = this;
    const next = step(event, this.#cursor, 1, canvas.width, canvas.height);
    if (next) editor.move(next);
    else if (event.key === " " && editor.isDown) editor.up();
    else if (event.key === " " || event.key === "Enter") editor.down(this.#cursor);
    else if (event.key === "Escape" && editor.isDown) editor.cancel();
    else return;
    if (event.key === "Enter") editor.up();
    event.preventDefault();
    this.#point(next ?? this.#cursor);
    this.outline.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #wheel(event) {
    if (!event.ctrlKey) return;
    event.preventDefault();
    this.zoomBy(event.deltaY < 0 ? 2 : 0.5);
  }

  #leave() {
    this.outline.hidden = true;
    this.readout.value = "";
  }

  /** Outline what the tool would touch at `point`, and name what lies there. */
  #point(point) {
    const { editor, canvas, readout, classes } = this;
    this.#cursor = point;
    const size = ["brush", "line"].includes(editor.tool) ? editor.size : 1;
    place(this.outline, canvas, point.x - (size >> 1), point.y - (size >> 1), size, size);
    const inside = point.x >= 0 && point.y >= 0 && point.x < canvas.width && point.y < canvas.height;
    const name = inside && classes.names[editor.label.ids[point.y * canvas.width + point.x]];
    readout.value = name ? `x ${point.x}, y ${point.y}: ${name}${editor.isDown ? ", pen down" : ""}` : "";
  }
}
