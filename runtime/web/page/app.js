"use strict";

// Colours of targets: the same as in written videos; people with colour blindness can tell them apart, too.
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];
const LEAST_WIDTH = 960; // least width of the canvas, in its own pixels
const LEAST_SIDE = 4; // in frame pixels; a shorter drag is a slip of the finger

const $ = (id) => document.getElementById(id);
const canvas = $("picture");
const context = canvas.getContext("2d");

let socket = null;
let header = null;    // of the picture that is shown
let bitmap = null;    // the picture that is shown
let drawing = null;   // {x0, y0, x1, y1, frame}: a box that is being drawn, in frame pixels
let keyboard = false; // whether the box is drawn with the keyboard
let moving = null;    // id of the target that the next box is for
let ended = false;    // whether this page ended the run: the server will not answer any more
let states = "";      // ids that the list shows, to rebuild it only when targets are added or removed
let since = null;     // {time, news}: where the measurement of the next speeds began
let speeds = [];      // rows of speeds that are shown

// The token is in a cookie now: it need not stay in the address bar.
if (location.search.includes("token=")) history.replaceState(null, "", location.pathname);

function connect() {
  socket = new WebSocket((location.protocol === "https:" ? "wss://" : "ws://") + location.host + "/view");
  socket.binaryType = "arraybuffer";
  socket.onopen = () => { since = null; connection("open", "connected"); };
  socket.onclose = async () => {
    if (ended) {
      connection("ended", "the run has ended; reload this page to look for another");
      for (const control of document.querySelectorAll("button, #download")) control.hidden = true;
      return;
    }
    connection("lost", "connection lost; trying again");
    try {
      const answered = await fetch("/", { method: "HEAD", cache: "no-store" });
      if (answered.status === 403) connection("lost", "the run was restarted: open the address that it printed");
    } catch { /* no server yet */ }
    setTimeout(connect, 1000);
  };
  socket.onmessage = (message) => {
    if (typeof message.data === "string") answer(JSON.parse(message.data));
    else picture(message.data);
  };
}

function connection(state, text) {
  $("connection").dataset.state = state;
  $("connection").textContent = text;
}

function send(command) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(command));
}

function answer(content) {
  $("notice").textContent = content.error || "";
  if (content.error) ended = false;
  if (content.done === "mark") $("changes").textContent = `target ${content.target} marked`;
  if (content.done === "remove") $("changes").textContent = `target ${content.target} removed`;
  if (content.done && header) showPaused(content.paused, header.over);
}

async function picture(data) {
  const length = new DataView(data).getUint32(0);
  const news = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  try {
    // While a box is being drawn, its frame stays on screen, but new pictures keep coming.
    if (!drawing) {
      const fresh = await createImageBitmap(new Blob([new Uint8Array(data, 4 + length)], { type: "image/jpeg" }));
      if (drawing) { fresh.close(); return; }
      if (bitmap) bitmap.close();
      bitmap = fresh;
      header = news;
      // Small pictures are painted larger, so that the browser does not enlarge lines and labels.
      const times = Math.max(1, Math.round(LEAST_WIDTH / bitmap.width));
      if (canvas.width !== times * bitmap.width || canvas.height !== times * bitmap.height) {
        canvas.width = times * bitmap.width;
        canvas.height = times * bitmap.height;
      }
      paint();
    }
    lists(news);
  } finally {
    // Only now may the next picture be sent: a slow page gets fewer pictures, never late ones.
    send({ action: "ack" });
  }
}

function paint() {
  if (!bitmap) return;
  const scale = canvas.width / header.size[0];
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const shown = canvas.getBoundingClientRect();
  const unit = Math.max(1, canvas.width / Math.max(1, shown.width)); // canvas pixels per screen pixel
  context.font = `${Math.round(15 * unit)}px system-ui, sans-serif`;
  for (const target of header.targets) {
    const lost = target.state === "lost";
    const colour = lost ? "#b0b0b0" : COLOURS[target.id % COLOURS.length];
    const [x, y, w, h] = target.box.map((value) => value * scale);
    context.setLineDash(lost ? [6 * unit, 4 * unit] : []);
    context.lineWidth = (lost ? 1.5 : 2.5) * unit;
    context.strokeStyle = colour;
    context.strokeRect(x, y, w, h);
    label(`${target.id}: ${target.score.toFixed(2)}${lost ? " lost" : ""}`, x, y > 20 * unit ? y - 5 * unit : y + h + 16 * unit, colour, unit);
  }
  if (drawing) {
    const [x, y, w, h] = drawn().map((value) => value * scale);
    context.setLineDash([5 * unit, 4 * unit]);
    context.lineWidth = 2 * unit;
    context.strokeStyle = "#ffffff";
    context.strokeRect(x, y, w, h);
    context.setLineDash([]);
  }
}

function label(text, x, y, colour, unit) {
  x = Math.max(0, Math.min(x, canvas.width - context.measureText(text).width));
  context.setLineDash([]);
  context.lineWidth = 3 * unit;
  context.strokeStyle = "#000000";
  context.strokeText(text, x, y);
  context.fillStyle = colour;
  context.fillText(text, x, y);
}

function drawn() {
  const { x0, y0, x1, y1 } = drawing;
  return [Math.min(x0, x1), Math.min(y0, y1), Math.abs(x1 - x0), Math.abs(y1 - y0)];
}

// The frame coordinates of a pointer. The canvas may be shown with bars beside it (object-fit).
function place(event) {
  const shown = canvas.getBoundingClientRect();
  const fit = Math.min(shown.width / canvas.width, shown.height / canvas.height);
  const x = (event.clientX - shown.left - (shown.width - canvas.width * fit) / 2) / fit;
  const y = (event.clientY - shown.top - (shown.height - canvas.height * fit) / 2) / fit;
  const scale = header.size[0] / canvas.width;
  const clamp = (value, most) => Math.min(most, Math.max(0, value));
  return [clamp(x * scale, header.size[0]), clamp(y * scale, header.size[1])];
}

function begin(x0, y0, x1, y1) {
  drawing = { x0, y0, x1, y1, frame: header.frame };
  send({ action: "hold", frame: header.frame });
  paint();
}

function finish() {
  const box = drawn();
  const command = { action: "mark", frame: drawing.frame, box };
  if (moving !== null) command.target = moving;
  if (box[2] >= LEAST_SIDE && box[3] >= LEAST_SIDE) {
    send(command);
    move(null);
  } else if (keyboard || box[2] > 0 || box[3] > 0) {
    $("notice").textContent = "the box is too small: draw a larger one";
  }
  leave();
}

function leave() {
  drawing = null;
  keyboard = false;
  paint();
}

canvas.addEventListener("pointerdown", (event) => {
  // Ignore a second finger or a palm.
  if (!header || !event.isPrimary || (event.pointerType === "mouse" && event.button !== 0)) return;
  canvas.setPointerCapture(event.pointerId);
  keyboard = false;
  const [x, y] = place(event);
  begin(x, y, x, y);
});
// A drag on the picture is ours alone: the browser must not take it for a fling and swallow the next tap.
canvas.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
canvas.addEventListener("pointermove", (event) => {
  if (!drawing || keyboard || !event.isPrimary) return;
  [drawing.x1, drawing.y1] = place(event);
  paint();
});
canvas.addEventListener("pointerup", (event) => { if (drawing && !keyboard && event.isPrimary) finish(); });
canvas.addEventListener("pointercancel", (event) => { if (drawing && !keyboard && event.isPrimary) leave(); });

canvas.addEventListener("keydown", (event) => {
  if (!header) return;
  if (event.key === "Escape" && drawing) { leave(); return; }
  if (event.key === "Enter") {
    event.preventDefault();
    if (drawing) { finish(); return; }
    const [w, h] = header.size;
    keyboard = true;
    begin(0.44 * w, 0.42 * h, 0.56 * w, 0.58 * h);
    return;
  }
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!way || !drawing) return;
  event.preventDefault();
  const pace = event.ctrlKey ? 1 : Math.max(2, header.size[0] / 100);
  [["x0", "x1"], ["y0", "y1"]].forEach(([low, high], i) => {
    const least = event.shiftKey ? drawing[low] + LEAST_SIDE - drawing[high] : -drawing[low];
    const step = Math.min(header.size[i] - drawing[high], Math.max(least, way[i] * pace));
    drawing[high] += step;
    if (!event.shiftKey) drawing[low] += step;
  });
  paint();
});

function move(id) {
  moving = id;
  for (const button of document.querySelectorAll("button[data-move]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.move) === id));
  }
}

function lists(news) {
  $("source").textContent = `${news.source}, ${news.backend}`;
  const now = news.targets.map((target) => target.id).join();
  if (now !== states) rebuild(news.targets);
  states = now;
  $("none").hidden = news.targets.length > 0;
  for (const target of news.targets) {
    const line = document.querySelector(`li[data-id="${target.id}"] .what`);
    const before = line.dataset.state;
    line.textContent = `${target.id}: ${target.state}, score ${target.score.toFixed(2)}`;
    line.dataset.state = target.state;
    if (before && before !== target.state) $("changes").textContent = `target ${target.id} ${target.state}`;
  }
  measure(news);
  const rows = [["frame", news.length ? `${news.frame} of ${news.length - 1}` : news.frame], ...speeds];
  rows.push(["frame age, ms", news.age_ms.toFixed(1)]);
  if (news.live) rows.push(["frames dropped", news.dropped]);
  show(rows);
  for (const id of ["pause", "step"]) $(id).hidden = news.live || news.over;
  showPaused(news.paused, news.over);
}

// Measures speeds over at least one second in which frames arrived.
function measure(news) {
  const time = performance.now() / 1000;
  if (since && time - since.time < 1) return;
  const frames = since ? news.count - since.news.count : 0;
  if (frames > 0 && time - since.time < 5) {
    const stages = Object.entries(news.seconds).map(([name, spent]) =>
      [`${name}, ms`, (1000 * (spent - since.news.seconds[name]) / frames).toFixed(1)]);
    speeds = [["frames per second", (frames / (time - since.time)).toFixed(1)], ...stages];
  }
  since = { time, news };
}

function show(rows) {
  const list = $("speed");
  while (list.children.length > 2 * rows.length) list.lastChild.remove();
  rows.forEach(([name, value], i) => {
    if (!list.children[2 * i]) list.append(document.createElement("dt"), document.createElement("dd"));
    list.children[2 * i].textContent = name;
    list.children[2 * i + 1].textContent = value;
  });
}

function showPaused(paused, over) {
  const now = over ? "no more frames: press End run" : paused ? "paused: mark targets, then resume" : "connected";
  $("pause").textContent = paused ? "Resume" : "Pause";
  $("pause").dataset.paused = paused;
  if (socket.readyState === WebSocket.OPEN) connection("open", now);
}

function rebuild(targets) {
  const list = $("targets");
  list.replaceChildren();
  for (const target of targets) {
    const item = document.createElement("li");
    item.dataset.id = target.id;
    const chip = document.createElement("span");
    chip.className = "chip";
    chip.style.background = COLOURS[target.id % COLOURS.length];
    const what = document.createElement("span");
    what.className = "what";
    item.append(chip, what, button("Move", target.id), button("Remove", target.id));
    list.append(item);
  }
  if (moving !== null && !targets.some((target) => target.id === moving)) move(null);
}

function button(text, id) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", `${text} target ${id}`);
  if (text === "Move") {
    made.dataset.move = id;
    made.setAttribute("aria-pressed", String(moving === id));
    made.onclick = () => { move(moving === id ? null : id); canvas.focus(); };
  } else {
    made.onclick = () => send({ action: "remove", target: id });
  }
  return made;
}

$("pause").onclick = () => send({ action: $("pause").dataset.paused === "true" ? "resume" : "pause" });
$("step").onclick = () => send({ action: "step" });
$("end").onclick = () => { ended = socket.readyState === WebSocket.OPEN; send({ action: "end" }); };

connect();
