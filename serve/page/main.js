// The page: what is on it, and what happens when something on it is used.

import { MAX_BRUSH, Editor, blank } from "./label.js";
import { Painter, colorTable, draw } from "./paint.js";
import { decode, encode } from "./png.js";
import * as server from "./server.js";
import { Correspondence, View } from "./view.js";

const STROKE_DELAY_MS = 150;
const SIZE_FACTORS = [0.5, 1, 1.5, 2, 4];
const MANY_CLASSES = 24;
const FIRST_PAIR = 1; // of the demo: it has most classes, and strong colors
const TOOL_KEYS = { b: "brush", f: "fill", l: "line", r: "rectangle", p: "pick" };

const $ = (id) => document.getElementById(id);
const state = { model: null, exemplar: null, shown: null, planes: null, reply: null };
const latest = new server.Latest(update);
const editor = new Editor(labelChanged, (id) => choose("class", id));
const view = new View($("result-stage"), $("exemplar-stage"), $("preview"), {
  result: $("result-readout"),
  exemplar: $("exemplar-readout"),
});
let painter;

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// translating

const usesClasses = () => state.model.label_kind === "classes";

/** Translate what is on the page now. */
async function update(signal) {
  const { exemplar } = state;
  if (!exemplar || !(usesClasses() ? editor.label : state.planes)) return;
  const start = performance.now();
  $("result-stage").setAttribute("aria-busy", "true");
  const clock = setInterval(() => {
    showStatus("Translating");
    $("clock").textContent = `for ${Math.floor(seconds(start))} s`;
  }, 1000);
  try {
    const reply = await translate(exemplar, $("size").value, signal);
    const { ids: confidence } = await decode(reply.confidence);
    if (signal.aborted) return;
    await view.showResult(reply, new Correspondence(reply, confidence));
    state.reply = reply;
    $("save").disabled = false;
    $("result-empty").hidden = $("alert").hidden = true;
    const parts = Object.entries(reply.timings).map(([stage, time]) => `${stage} ${Math.round(time)} ms`);
    showStatus(`Translated in ${seconds(start)} s at ${new Date().toLocaleTimeString()} (${parts.join(", ")})`);
  } catch (error) {
    if (signal.aborted) return;
    showStatus("Not translated: see the message");
    report(error, () => latest.ask(0));
  } finally {
    clearInterval(clock);
    $("clock").textContent = "";
    $("result-stage").setAttribute("aria-busy", "false");
  }
}

async function translate(exemplar, size, signal, again = true) {
  const { id, image } = await prepare(exemplar, size, signal);
  if (state.shown !== image) {
    await view.showExemplar(image);
    state.shown = image;
    $("exemplar-empty").hidden = true;
  }
  const body = usesClasses() ? await encode(editor.label) : state.planes;
  try {
    return await server.translate(id, size, body, signal);
  } catch (error) {
    if (error.code !== "exemplar_unknown" || !again) throw error;
    exemplar.ready.delete(size); // the service has started anew or needed the room
    return translate(exemplar, size, signal, false);
  }
}

/** An exemplar at a size, as the service holds it: {id, image}. */
async function prepare(exemplar, size, signal) {
  if (!exemplar.ready.has(size)) {
    const label = exemplar.labelFile ? (await server.putLabel(exemplar.labelFile, signal)).id : exemplar.label;
    const { id } = await server.putExemplar(exemplar.picture, label, size, signal);
    exemplar.ready.set(size, { id, image: await server.getExemplarImage(id, signal) });
  }
  return exemplar.ready.get(size);
}

const seconds = (start) => ((performance.now() - start) / 1000).toFixed(2);

// messages

function showStatus(text) {
  $("status").textContent = text;
}

/** Say in words what went wrong; run `again` by itself where the service says when, or once there is a token. */
function report(error, again) {
  if (error.code === "unauthorized") {
    signIn(again);
    return;
  }
  if (!(error instanceof server.ServerError)) console.error(error);
  const wait = error.retryAfter;
  if (wait && again) setTimeout(again, wait * 1000);
  $("alert").firstElementChild.textContent = error.message + (wait && again ? ` Trying again in ${wait} s.` : "");
  $("alert").hidden = false;
}

function signIn(again) {
  $("sign-in").addEventListener("close", () => (server.setToken($("token").value), again()), { once: true });
  if (!$("sign-in").open) $("sign-in").showModal();
}

/** Run an action of the user; what goes wrong is reported under its name. */
const attempt = (name, action) => async (event) => {
  try {
    await action(event);
  } catch (error) {
    error.message = `${name}: ${error.message}`;
    report(error);
  }
};

// label

function labelChanged() {
  painter.draw();
  $("undo").disabled = !editor.canUndo;
  $("redo").disabled = !editor.canRedo;
  latest.ask(STROKE_DELAY_MS);
}

function showClasses({ class_names: names, palette }) {
  const colors = colorTable(palette);
  painter = new Painter(editor, $("label-stage"), { colors, names }, $("label-readout"));
  names.forEach((name, id) => {
    const swatch = make("i", { className: "swatch" });
    swatch.style.backgroundColor = `rgb(${palette[id].join(" ")})`;
    const input = make("input", { type: "radio", name: "class", value: id });
    $("palette").append(make("label", { title: `${id}: ${name}` }, input, swatch, make("span", { textContent: name })));
  });
  $("class-filter").hidden = names.length <= MANY_CLASSES;
  choose("class", Math.min(2, names.length - 1));
  return colors;
}

function addStart(name, label, colors) {
  const thumb = make("canvas", {});
  draw(thumb, label, colors);
  const onclick = () => editor.load(label);
  $("starts").append(make("button", { type: "button", className: "thumb", ariaLabel: name, title: name, onclick }, thumb));
}

function blankLabel() {
  const side = Number($("size").value);
  const { width, height } = side ? { width: side, height: side } : editor.label;
  return blank(width, height);
}

/** Change the layout of a picture and keep its look: its own label, to be edited. */
async function loadExemplarLabel() {
  const { id } = await prepare(state.exemplar, $("size").value);
  editor.load(await decode(await server.getExemplarLabel(id)));
}

async function importLabel(event) {
  const [file] = event.target.files;
  event.target.value = "";
  const { id } = await server.putLabel(file); // the service checks the ids, and answers in the plainest form of PNG
  editor.load(await decode(await server.getLabel(id)));
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// exemplars

function addExemplar(exemplar) {
  const image = make("img", { src: URL.createObjectURL(exemplar.picture), alt: "" });
  const input = make("input", { type: "radio", name: "exemplar", ariaLabel: exemplar.name });
  input.addEventListener("change", () => {
    state.exemplar = exemplar;
    latest.ask(0);
  });
  $("gallery").append(make("label", { className: "thumb", title: exemplar.name }, input, image));
  return input;
}

async function upload() {
  const [[picture], [labelFile]] = [$("picture").files, $("picture-label").files];
  const exemplar = { name: picture.name, picture, labelFile, ready: new Map() };
  $("upload").disabled = true;
  try {
    await prepare(exemplar, $("size").value);
  } finally {
    filesChosen();
  }
  addExemplar(exemplar).click();
  for (const input of [$("picture"), $("picture-label")]) input.value = "";
  filesChosen();
}

function filesChosen() {
  const needed = [$("picture"), ...(state.model.exemplar_needs_label ? [$("picture-label")] : [])];
  for (const input of needed) {
    input.previousElementSibling.textContent = input.files[0]?.name ?? (input.id === "picture" ? "Picture" : "Its label");
  }
  $("upload").disabled = !needed.every((input) => input.files.length);
}

async function loadDemo({ demo, sizes }, colors) {
  const size = String(sizes.default[0]);
  const names = demo.map((pair) => pair.name.replaceAll(/[-_]/g, " "));
  const labels = demo.map(async (pair) => decode(await server.getLabel(pair.label)));
  const images = demo.map((pair) => server.getExemplarImage(pair.exemplar));
  for (const [at, pair] of demo.entries()) {
    const [label, image] = await Promise.all([labels[at], images[at]]);
    addStart(`Label of ${names[at]}`, label, colors);
    const ready = new Map([[size, { id: pair.exemplar, image }]]);
    const input = addExemplar({ name: names[at], picture: image, label: pair.exemplar_label, ready });
    if (at === Math.min(FIRST_PAIR, demo.length - 1)) {
      editor.load(label);
      input.click();
    }
  }
}

// controls

/** Choose one of the radio buttons of a name, as a click does. */
function choose(name, value) {
  document.querySelector(`input[name="${name}"][value="${value}"]`)?.click();
}

function setBrush(size) {
  editor.size = Math.min(Math.max(size, 1), MAX_BRUSH);
  $("brush").value = $("brush-size").value = editor.size;
}

function zoomBy(factor) {
  painter.zoomBy(factor);
  $("zoom").value = `${100 * painter.zoom} %`;
}

function showHeat() {
  const percent = Number($("threshold").value);
  $("threshold-value").value = `${percent} %`;
  view.showHeat($("heat").checked, percent * 2.55);
}

function pressed(event) {
  if (event.target.closest('dialog, select, input[type="search"]')) return;
  const key = event.key.toLowerCase();
  const control = event.ctrlKey || event.metaKey;
  const actions = control
    ? { z: () => (event.shiftKey ? editor.redo() : editor.undo()), y: () => editor.redo() }
    : {
        "[": () => setBrush(editor.size - (editor.size > 8 ? 4 : 1)),
        "]": () => setBrush(editor.size + (editor.size >= 8 ? 4 : 1)),
        "+": () => zoomBy(2),
        "-": () => zoomBy(0.5),
        c: () => $("heat").click(),
        "?": () => $("help").showModal(),
      };
  if (!control && TOOL_KEYS[key]) actions[key] = () => choose("tool", TOOL_KEYS[key]);
  if (!control && /^\d$/.test(key)) actions[key] = () => choose("class", key);
  if (!actions[key] || event.altKey || !(usesClasses() || "c?".includes(key))) return;
  event.preventDefault();
  actions[key]();
}

function listen() {
  $("tools").onchange = (event) => {
    editor.cancel();
    editor.tool = event.target.value;
  };
  $("palette").onchange = (event) => (editor.id = Number(event.target.value));
  $("class-filter").oninput = (event) => {
    for (const label of $("palette").querySelectorAll("label")) {
      label.hidden = !label.title.toLowerCase().includes(event.target.value.toLowerCase());
    }
  };
  $("brush").oninput = () => setBrush(Number($("brush").value));
  $("undo").onclick = () => editor.undo();
  $("redo").onclick = () => editor.redo();
  $("zoom-in").onclick = () => zoomBy(2);
  $("zoom-out").onclick = () => zoomBy(0.5);
  $("blank").onclick = () => editor.load(blankLabel());
  $("own").onclick = attempt("Exemplar's label", loadExemplarLabel);
  $("import").onchange = attempt("Import", importLabel);
  $("export").onclick = async () => save(await encode(editor.label, state.model.palette), "label.png");
  $("save").onclick = () => save(state.reply.image, "result.png");
  $("size").onchange = () => latest.ask(0);
  $("split").oninput = () => view.split(Number($("split").value));
  $("heat").onchange = $("threshold").oninput = showHeat;
  $("picture").onchange = $("picture-label").onchange = filesChosen;
  $("upload").onclick = attempt("Your own exemplar", upload);
  $("planes").onchange = () => {
    [state.planes] = $("planes").files;
    $("planes-name").value = state.planes?.name ?? "";
    latest.ask(0);
  };
  $("help-open").onclick = () => $("help").showModal();
  $("alert").querySelector("button").onclick = () => ($("alert").hidden = true);
  document.addEventListener("keydown", pressed);
}

// start

function showModel(model) {
  state.model = model;
  const { default: [side], min, max, multiple } = model.sizes;
  $("model").textContent = `${model.name}, for ${model.task}, on ${model.stages.query.device}`;
  const sides = SIZE_FACTORS.map((factor) => side * factor).filter((x) => x % multiple === 0 && x >= min && x <= max);
  for (const x of sides) $("size").append(make("option", { value: x, textContent: `${x} × ${x}`, selected: x === side }));
  $("size").append(make("option", { value: "input", textContent: "as the label" }));
  for (const part of document.querySelectorAll(".classes-only")) part.hidden = !usesClasses();
  for (const part of document.querySelectorAll(".planes-only")) part.hidden = usesClasses();
  $("planes-why").textContent =
    `A brush paints classes, and this model has none: its labels are ${model.label_channels} planes of values, as ` +
    "poses are, or edges with their distances. Upload an .npz file that the command flashcocos prepare has written.";
  $("own").hidden = $("picture-label-field").hidden = !model.exemplar_needs_label;
  $("picture-label").accept = usesClasses() ? "image/png" : ".npz";
  $("upload-hint").textContent = !model.exemplar_needs_label
    ? "A PNG, JPEG or WebP picture."
    : `A PNG, JPEG or WebP picture, and its label: ${usesClasses() ? "a gray or palette PNG of class ids" : "an .npz file"}.`;
}

async function start() {
  try {
    const model = await server.getModel();
    if (!state.model) {
      showModel(model);
      listen();
    }
    showStatus(model.demo.length ? "Loading the demo" : "Upload an exemplar to begin");
    if (!usesClasses()) return;
    const colors = showClasses(model);
    if (model.demo.length) await loadDemo(model, colors);
    else editor.load(blankLabel());
  } catch (error) {
    report(error, state.model ? undefined : start);
  }
}

start();
