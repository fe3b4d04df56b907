"""The canvas of the page: a slice with its masks, on which boxes and points are drawn.

By mouse, pen or finger through pointer events, or by keys. It tells the page what was drawn, in native pixels, and
shows what the page tells it; see `trainer.demo.drawing.canvas_value`.
"""

from __future__ import annotations

TEMPLATE = """
<div class="pad">
  <div class="bar" role="toolbar" aria-label="Drawing">
    <span class="tools" role="radiogroup" aria-label="What a drag or a click makes">
      <button type="button" data-tool="box" role="radio" title="Drag a box around the object (key B)">Box</button>
      <button type="button" data-tool="plus" role="radio" title="Click on the object (key P)">Point +</button>
      <button type="button" data-tool="minus" role="radio" title="Click beside the object (key N)">Point −</button>
    </span>
    <button type="button" data-do="undo" title="Take back the last step (key U)">Undo</button>
    <button type="button" data-do="clear" title="Remove this object's prompts and mask from this slice">Clear</button>
    <label class="fade">Mask <input type="range" min="0" max="100" value="35" aria-label="Opacity of the masks"></label>
  </div>
  <div class="stage">
    <canvas tabindex="0" role="img" aria-label="The image. Arrow keys move a cursor, Enter sets a corner or a point,
      Escape takes it back, Page Up and Page Down change the slice."></canvas>
    <div class="blank"><p class="large">Open an image to begin</p>
      <p>A picture, a volume (NIfTI, NRRD, DICOM) or the frames of a video.</p></div>
  </div>
  <p class="hint"></p>
</div>
"""

STYLE = """
& { width: 100%; }
.bar { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin-bottom: 8px; }
.tools { display: inline-flex; border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden; }
.tools[hidden] { display: none; }
.tools button { border: 0; border-radius: 0; }
button { font: inherit; font-size: 14px; padding: 7px 12px; border-radius: 8px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary);
  color: var(--body-text-color); min-height: 38px; }
button:hover { background: var(--background-fill-secondary); }
button[aria-checked="true"] { background: var(--demo-accent); color: var(--demo-on-accent); }
button:focus-visible, canvas:focus-visible, input:focus-visible { outline: 3px solid var(--demo-accent);
  outline-offset: 2px; }
canvas:focus-visible { outline-offset: -3px; }
.tools button:focus-visible { outline-offset: -3px; outline-color: var(--body-text-color); }
.fade { margin-left: auto; display: inline-flex; gap: 8px; align-items: center; font-size: 14px; }
.fade input { width: 110px; accent-color: var(--demo-accent); }
.stage { position: relative; background: #101418; border-radius: 10px; display: grid; place-items: center;
  min-height: 240px; overflow: hidden; }
canvas { display: none; max-width: 100%; touch-action: none; cursor: crosshair; }
.ready canvas { display: block; }
.ready .blank { display: none; }
.blank { color: #c9d3dc; text-align: center; padding: 40px 16px; }
.blank p { margin: 4px 0; color: #c9d3dc; } .blank .large { font-size: 20px; color: #fff; }
.hint { font-size: 14px; min-height: 1.5em; margin: 6px 0 0; color: var(--demo-soft); }
"""

SCRIPT = r"""
const pad = element.querySelector(".pad"), canvas = pad.querySelector("canvas"), stage = pad.querySelector(".stage");
const context = canvas.getContext("2d"), fade = pad.querySelector("input"), hint = pad.querySelector(".hint");
const HINTS = {
  box: "Drag a box around the object, or click two corners. Keys: arrows move, Enter sets a corner.",
  plus: "Click on the object. Keys: arrows move, Enter sets the point.",
  minus: "Click beside the object, on what does not belong to it.",
};
let value = {}, images = {}, tool = "box", turn = 0, turned = 0;
let pressed = null, corner = null, here = null, cursor = false;

const picture = source => new Promise(done => {
  if (!source) { done(null); return; }
  const image = new Image();
  image.onload = () => done(image);
  image.onerror = () => done(null);
  image.src = source;
});

async function show() {
  const given = props.value || {}, mine = ++turn;
  const [back, fill, line] = await Promise.all([given.picture, given.fill, given.line].map(picture));
  if (mine !== turn) return;
  if (given.width !== value.width || given.height !== value.height || given.slice !== value.slice) {
    corner = pressed = null;
  }
  value = given;
  images = { back, fill, line };
  if (value.tools && !value.tools.includes(tool)) tool = value.tools[0] || "";
  pad.classList.toggle("ready", !!back);
  pad.dataset.masked = value.masked || 0;
  pad.dataset.slice = value.slice ?? "";
  pad.querySelector(".tools").hidden = !(value.tools || []).length;
  select(tool);
  fit();
}

function fit() {
  if (!images.back || !stage.clientWidth) return;
  const high = Math.max(260, Math.min(window.innerHeight * 0.66, 900));
  const width = Math.min(stage.clientWidth, high * value.ratio), scale = window.devicePixelRatio || 1;
  canvas.style.width = width + "px";
  canvas.style.height = width / value.ratio + "px";
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(width / value.ratio * scale);
  paint();
}

function paint() {
  if (!images.back) return;
  const { width, height } = canvas, scale = window.devicePixelRatio || 1;
  const x = at => at / value.width * width, y = at => at / value.height * height;
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(images.back, 0, 0, width, height);
  if (images.fill) {
    context.globalAlpha = fade.value / 100;
    context.drawImage(images.fill, 0, 0, width, height);
    context.globalAlpha = 1;
    if (fade.value > 0) context.drawImage(images.line, 0, 0, width, height);
  }
  const frame = (box, colour, dashes) => {
    const place = [x(box[0]), y(box[1]), x(box[2] + 1) - x(box[0]), y(box[3] + 1) - y(box[1])];
    context.setLineDash([]);
    context.lineWidth = 3.5 * scale; context.strokeStyle = "rgba(0,0,0,.65)"; context.strokeRect(...place);
    context.setLineDash(dashes.map(one => one * scale));
    context.lineWidth = 1.75 * scale; context.strokeStyle = colour; context.strokeRect(...place);
    context.setLineDash([]);
  };
  const cross = (at, colour, sign) => {
    const place = [x(at[0] + 0.5), y(at[1] + 0.5)], r = 8 * scale;
    context.beginPath(); context.arc(...place, r, 0, 7);
    context.fillStyle = colour; context.fill();
    context.lineWidth = 2 * scale; context.strokeStyle = "#101418"; context.stroke();
    context.beginPath(); context.moveTo(place[0] - r / 2, place[1]); context.lineTo(place[0] + r / 2, place[1]);
    if (sign) { context.moveTo(place[0], place[1] - r / 2); context.lineTo(place[0], place[1] + r / 2); }
    context.stroke();
  };
  for (const one of value.prompts || []) {
    if (one.box) frame(one.box, one.colour, one.active ? [] : [5, 4]);
    for (const point of one.points || []) cross(point, point[2] ? one.colour : "#ffffff", point[2]);
  }
  if (corner && here) frame(boxOf(corner, here), "#ffffff", [6, 4]);
  if (here && (cursor || corner)) {
    context.strokeStyle = "rgba(255,255,255,.9)"; context.lineWidth = scale;
    context.beginPath();
    context.moveTo(x(here[0] + 0.5), 0); context.lineTo(x(here[0] + 0.5), height);
    context.moveTo(0, y(here[1] + 0.5)); context.lineTo(width, y(here[1] + 0.5));
    context.stroke();
  }
}

const boxOf = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
const inside = (at, most) => Math.max(0, Math.min(most - 1, Math.floor(at)));

function placeOf(event) {
  const edge = canvas.getBoundingClientRect();
  return [inside((event.clientX - edge.left) / edge.width * value.width, value.width),
    inside((event.clientY - edge.top) / edge.height * value.height, value.height)];
}

function ask(what) {
  hint.textContent = "Asking the model …";
  trigger("submit", what);
}

function mark(at) {
  if (tool === "plus" || tool === "minus") { ask({ point: [...at, tool === "plus" ? 1 : 0] }); return; }
  if (tool !== "box") return;
  if (!corner) { corner = at; hint.textContent = "Now the opposite corner; Escape takes it back."; return; }
  const box = boxOf(corner, at);
  if (box[2] > box[0] && box[3] > box[1]) {
    corner = null;
    ask({ box });
  }
}

function select(name) {
  tool = name;
  for (const button of pad.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-checked", button.dataset.tool === name);
  }
  const turning = value.slices > 1 ? " Scroll to change the slice." : "";
  hint.textContent = value.picture ? (HINTS[name] || "Say in words what to find, and press Find.") + turning : "";
}

canvas.addEventListener("pointerdown", event => {
  if (event.button || !images.back) return;
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  here = placeOf(event);
  cursor = false;
  pressed = { at: here, x: event.clientX, y: event.clientY, begun: !corner };
  if (tool === "box" && !corner) corner = here;
  paint();
});
canvas.addEventListener("pointermove", event => {
  if (!images.back || (!pressed && !corner)) return;
  here = placeOf(event);
  paint();
});
canvas.addEventListener("pointerup", event => {
  if (!pressed) return;
  const { x, y, begun } = pressed;
  here = placeOf(event);
  pressed = null;
  const far = Math.hypot(event.clientX - x, event.clientY - y) > 5;
  if (tool === "box") {
    if (begun && !far) { hint.textContent = "Now the opposite corner; Escape takes it back."; } else mark(here);
  } else mark(here);
  paint();
});
canvas.addEventListener("pointercancel", () => { pressed = corner = null; paint(); });
canvas.addEventListener("wheel", event => {
  if (!images.back || value.slices < 2 || event.ctrlKey) return;
  event.preventDefault();
  turned += event.deltaY;
  if (Math.abs(turned) >= 60) { trigger("select", { step: turned > 0 ? 1 : -1 }); turned = 0; }
}, { passive: false });
canvas.addEventListener("keydown", event => {
  if (!images.back || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = event.shiftKey ? 10 : 1, key = event.key.toLowerCase();
  const moves = { arrowleft: [-step, 0], arrowright: [step, 0], arrowup: [0, -step], arrowdown: [0, step] };
  const tools = { b: "box", p: "plus", n: "minus" };
  if (moves[key]) {
    here = here || [value.width >> 1, value.height >> 1];
    here = [inside(here[0] + moves[key][0], value.width), inside(here[1] + moves[key][1], value.height)];
    cursor = true;
  } else if (key === "enter" || key === " ") {
    here = here || [value.width >> 1, value.height >> 1];
    cursor = true;
    mark(here);
  } else if (key === "escape") {
    corner = null; cursor = false; select(tool);
  } else if (key === "u") {
    trigger("undo", {});
  } else if (key === "pageup" || key === "pagedown") {
    trigger("select", { step: key === "pagedown" ? 1 : -1 });
  } else if (tools[key] && (value.tools || []).includes(tools[key])) {
    select(tools[key]);
  } else return;
  event.preventDefault();
  paint();
});
canvas.addEventListener("blur", () => { cursor = false; paint(); });
pad.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.tool) { corner = null; select(button.dataset.tool); paint(); } else trigger(button.dataset.do, {});
});
fade.addEventListener("input", paint);
new ResizeObserver(fit).observe(stage);
watch("value", show);
show();
"""

LIST_TEMPLATE = """<div class="list" role="list" aria-label="Objects"></div>"""

LIST_STYLE = """
.list { display: flex; flex-direction: column; gap: 6px; }
.row { display: grid; grid-template-columns: 18px 1fr auto; gap: 4px 8px; align-items: center; padding: 8px;
  border: 1px solid var(--border-color-primary); border-radius: 8px; cursor: pointer; }
.row.active { border-color: var(--demo-accent); box-shadow: inset 0 0 0 1px var(--demo-accent); }
.row i { width: 16px; height: 16px; border-radius: 4px; }
.row input { font: inherit; font-weight: 600; min-width: 0; background: transparent; border: 1px solid transparent;
  border-radius: 6px; padding: 3px 5px; color: var(--body-text-color); }
.row input:hover, .row input:focus { border-color: var(--border-color-primary);
  background: var(--background-fill-primary); }
.row p { grid-column: 2 / 4; margin: 0; padding-left: 6px; font-size: 14px; color: var(--demo-soft);
  font-variant-numeric: tabular-nums; }
.row button { font: inherit; width: 34px; height: 34px; border-radius: 6px; cursor: pointer; background: transparent;
  border: 1px solid transparent; color: var(--demo-soft); }
.row button:hover { border-color: var(--border-color-primary); color: var(--body-text-color); }
.row :focus-visible { outline: 3px solid var(--demo-accent); outline-offset: 1px; }
"""

LIST_SCRIPT = r"""
const list = element.querySelector(".list");
function show() {
  const objects = (props.value || {}).objects || [];
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.place : null;
  list.replaceChildren(...objects.map((one, place) => {
    const row = document.createElement("div"), swatch = document.createElement("i");
    const name = document.createElement("input"), measure = document.createElement("p");
    const away = document.createElement("button");
    row.className = one.active ? "row active" : "row";
    row.setAttribute("role", "listitem");
    if (one.active) row.setAttribute("aria-current", "true");
    swatch.style.background = one.colour;
    name.value = one.name; name.maxLength = 64; name.dataset.place = place;
    name.setAttribute("aria-label", "Name of object " + (place + 1));
    name.addEventListener("change", () => trigger("input", { place, name: name.value }));
    name.addEventListener("keydown", event => { if (event.key === "Enter") name.blur(); });
    name.addEventListener("focus", () => { if (!one.active) trigger("select", { place }); });
    away.type = "button"; away.textContent = "✕"; away.title = "Delete this object";
    away.setAttribute("aria-label", "Delete " + one.name);
    away.addEventListener("click", event => { event.stopPropagation(); trigger("delete", { place }); });
    measure.textContent = one.measure;
    row.addEventListener("click", () => { if (!one.active) trigger("select", { place }); });
    row.append(swatch, name, away, measure);
    return row;
  }));
  if (focused != null) { const again = list.querySelector(`input[data-place="${focused}"]`); if (again) again.focus(); }
}
watch("value", show);
show();
"""
