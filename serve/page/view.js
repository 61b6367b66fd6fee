// The result and the exemplar: what lies over the pictures, and which place of one came from which of the other.

import { pixelAt, place, step } from "./paint.js";

// dark blue over green to yellow, as matplotlib's viridis: low to high confidence
const HEAT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const HEAT_ALPHA = 190;
const LIT = [255, 212, 59, 235]; // the color of the ring in page.css
const DIMMED = [0, 0, 0, 110];

/** Which place of the exemplar each place of a result came from. */
export class Correspondence {
  #view;
  #targets = new Map();

  /**
   * @param {{map: {width: number, height: number, stride: number}, exemplar_size: number[], matches: Uint8Array}} reply
   * @param {Uint8Array} confidence of each place, 0 to 255.
   */
  constructor({ map, exemplar_size: [height, width], matches }, confidence) {
    Object.assign(this, { ...map, confidence, exemplar: { width, height } });
    this.#view = new DataView(matches.buffer);
    for (let place = 0; place < map.width * map.height; place++) {
      const cell = this.#cell(this.source(place));
      if (!this.#targets.has(cell)) this.#targets.set(cell, []);
      this.#targets.get(cell).push(place);
    }
  }

  /** The place that covers a pixel of the result. */
  place({ x, y }) {
    return Math.floor(y / this.stride) * this.width + Math.floor(x / this.stride);
  }

  /** The middle, in pixels of the exemplar, of what `place` came from. */
  source(place) {
    return { x: this.#view.getUint16(4 * place, true), y: this.#view.getUint16(4 * place + 2, true) };
  }

  /** All places of the result that came from around a pixel of the exemplar. */
  targets(pixel) {
    return this.#targets.get(this.#cell(pixel)) ?? [];
  }

  #cell({ x, y }) {
    return Math.floor(y / this.stride) * this.exemplar.width + Math.floor(x / this.stride);
  }
}

export class View {
  heat = false;
  threshold = 0;
  #correspondence = null;
  #pointed = null; // {where: "result" or "exemplar", pixel}

  /**
   * @param {HTMLElement} result stage with the canvases .image, .warped and .overlay.
   * @param {HTMLElement} exemplar stage with one canvas.
   * @param {HTMLCanvasElement} preview a small copy of the result, for narrow screens.
   * @param {{result: HTMLOutputElement, exemplar: HTMLOutputElement}} readouts
   */
  constructor(result, exemplar, preview, readouts) {
    const find = (name) => result.querySelector(name);
    Object.assign(this, { result, preview, readouts, image: find(".image"), warped: find(".warped"), overlay: find(".overlay") });
    Object.assign(this, { place: find(".place"), divider: find(".divider"), stage: exemplar });
    Object.assign(this, { picture: exemplar.querySelector("canvas"), ring: exemplar.querySelector(".ring") });
    this.#listen("result", this.image);
    this.#listen("exemplar", this.picture);
  }

  /** Show a translation; pictures are decoded here, for the eye alone. */
  async showResult(reply, correspondence) {
    const [image, warped] = await Promise.all([createImageBitmap(reply.image), createImageBitmap(reply.warped)]);
    paint(this.image, image);
    paint(this.warped, warped);
    paint(this.preview, image);
    Object.assign(this.overlay, { width: correspondence.width, height: correspondence.height });
    this.result.style.aspectRatio = `${image.width} / ${image.height}`;
    this.#correspondence = correspondence;
    this.#update();
  }

  /** Show an exemplar; what the result shown came from is then unknown until the next result. */
  async showExemplar(blob) {
    const picture = await createImageBitmap(blob);
    paint(this.picture, picture);
    this.stage.style.aspectRatio = `${picture.width} / ${picture.height}`;
    this.#correspondence = null;
    this.#update();
  }

  /** Show the warped exemplar left of `percent`, the result right of it. */
  split(percent) {
    this.warped.style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
    this.divider.style.left = `${percent}%`;
    this.divider.hidden = percent <= 0 || percent >= 100;
  }

  /** Show or hide the confidence, of places that have at least `threshold` of 255. */
  showHeat(heat, threshold) {
    Object.assign(this, { heat, threshold });
    this.#update();
  }

  #listen(where, canvas) {
    const point = (pixel) => {
      this.#pointed = pixel && { where, pixel };
      this.#update();
    };
    const inside = ({ x, y }) => ({
      x: Math.min(Math.max(x, 0), canvas.width - 1),
      y: Math.min(Math.max(y, 0), canvas.height - 1),
    });
    for (const type of ["pointermove", "pointerdown"]) {
      canvas.addEventListener(type, (event) => point(inside(pixelAt(canvas, event))));
    }
    for (const type of ["pointerleave", "blur"]) canvas.addEventListener(type, () => point(null));
    canvas.addEventListener("keydown", (event) => {
      const from = this.#pointed?.where === where ? this.#pointed.pixel : { x: canvas.width >> 1, y: canvas.height >> 1 };
      const next = step(event, from, this.#correspondence?.stride ?? 1, canvas.width, canvas.height);
      if (next) point(next);
    });
  }

  /** Bring rings, overlay and words up to what is pointed at. */
  #update() {
    this.ring.hidden = this.place.hidden = true;
    this.readouts.result.value = this.readouts.exemplar.value = "";
    let lit = [];
    if (this.#correspondence && this.#pointed) {
      const { where, pixel } = this.#pointed;
      if (where === "result") this.#showSource(pixel);
      else lit = this.#showTargets(pixel);
    }
    this.#drawOverlay(lit);
  }

  #showSource(pixel) {
    const { stride, width, confidence } = this.#correspondence;
    const at = this.#correspondence.place(pixel);
    const { x, y } = this.#correspondence.source(at);
    place(this.place, this.image, (at % width) * stride, Math.floor(at / width) * stride, stride, stride);
    place(this.ring, this.picture, x - stride / 2, y - stride / 2, stride, stride);
    const percent = Math.round(confidence[at] / 2.55);
    this.readouts.result.value = `x ${pixel.x}, y ${pixel.y} came from x ${x}, y ${y}; confidence ${percent} %`;
  }

  #showTargets(pixel) {
    const { stride } = this.#correspondence;
    const corner = (value) => Math.floor(value / stride) * stride;
    const places = this.#correspondence.targets(pixel);
    place(this.ring, this.picture, corner(pixel.x), corner(pixel.y), stride, stride);
    const count = places.length > 1 ? `${places.length} places` : `${places.length || "no"} place`;
    this.readouts.exemplar.value = `x ${pixel.x}, y ${pixel.y}: ${count} of the result came from here`;
    return places;
  }

  #drawOverlay(lit) {
    const { width, height } = this.overlay;
    const context = this.overlay.getContext("2d");
    const image = new ImageData(width, height);
    const set = (at, color) => image.data.set(color, 4 * at);
    if (this.#correspondence && this.heat) {
      this.#correspondence.confidence.forEach((value, at) => value >= this.threshold && set(at, heatColor(value)));
    }
    if (lit.length) for (let at = 0; at < width * height; at++) set(at, DIMMED);
    for (const at of lit) set(at, LIT);
    context.putImageData(image, 0, 0);
  }
}

function heatColor(value) {
  const at = (value / 255) * (HEAT.length - 1);
  const low = Math.min(Math.floor(at), HEAT.length - 2);
  const mixed = HEAT[low].map((from, channel) => from + (HEAT[low + 1][channel] - from) * (at - low));
  return [...mixed, HEAT_ALPHA];
}

function paint(canvas, bitmap) {
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
}
