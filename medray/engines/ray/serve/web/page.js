// The page of the server: an image in, its answer and what was found to look at. It asks this server alone.
import { fullness, layout, MARKS, readNifti } from "./nifti.js";

const COLOURS = ["#ef4444", "#22c55e", "#3b82f6", "#eab308", "#a855f7", "#06b6d4", "#f97316", "#ec4899"];
const $ = (id) => document.getElementById(id);
let shown = null;  // { scan, mask, range, image, served, link }
let turn = 0;  // an answer that comes after the next image was dropped is not shown

class Refused extends Error {}

async function ask(path, body, accept) {
  const key = $("key").value.trim();
  const headers = { Accept: accept, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  if (body) headers["Content-Type"] = "application/octet-stream";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body });
  } catch {
    throw new Refused("The server can't be reached.");
  }
  if (answer.ok) return answer;
  const text = await answer.json().then((one) => one.error?.message ?? one.error, () => answer.statusText);
  throw new Refused(`${answer.status}: ${text}`);
}

function say(text, bad = false) {
  $("state").textContent = text;
  $("state").className = bad ? "bad" : "";
}

let served = [];
async function loadModels() {
  const found = await (await ask("v1/models", null, "application/json")).json();
  served = found.models;
  const names = [...new Set(served.map((one) => one.name))];
  $("model").replaceChildren(...names.map((name) => new Option(name, name, name === found.default, name === found.default)));
  say("");
}

const chosen = () => served.find((one) => one.name === $("model").value) ?? served[0];
const query = (more = {}) => `?${new URLSearchParams({ model: $("model").value, ...more })}`;

async function answerTo(image) {
  const mine = ++turn;
  $("found").hidden = true;
  say(`${image.name}: asking…`);
  try {
    if (!served.length) await loadModels();
    const model = chosen();
    const found = await (await ask(`v1/predict${query()}`, image, "application/json")).json();
    if (mine !== turn) return;
    tell(found);
    if (shown?.link) URL.revokeObjectURL(shown.link);
    shown = { image, picture: null };
    draw();
    $("explain").hidden = !found.probabilities;
    $("found").hidden = false;
    const view = await look(image, model, found);
    if (mine !== turn) return;
    shown = { image, ...view };
    draw(true);
    say(image.name);
  } catch (error) {
    if (mine === turn) say(error instanceof Refused ? error.message : `The page met an error: ${error.message}`, true);
  }
}

/** What there is to look at: a volume with its mask, slice by slice, or a picture. */
async function look(image, model, found) {
  const scan = await readNifti(image).catch(() => null);
  if (!found.probabilities) {
    if (scan) {
      const file = await (await ask(`v1/predict${query()}`, image, "application/nifti")).blob();
      const mask = await readNifti(file);
      if (mask) scan.affine = mask.affine;  // the same grid, as the server read it
      return { scan, mask, counts: mask && fullness(mask), range: rangeOf(scan), link: URL.createObjectURL(file) };
    }
    return { picture: await (await ask(`v1/predict${query()}`, image, "image/png")).blob() };
  }
  if (scan) return { scan, mask: null, range: rangeOf(scan) };
  return { picture: /^image\/(png|jpeg|webp)$/.test(image.type) ? image : null };
}

/** The central 98 % of some ten thousand voxels. */
function rangeOf({ shape, at }) {
  const values = [];
  const step = shape.map((n) => Math.max(1, Math.floor(n / 22)));
  for (let i = 0; i < shape[0]; i += step[0])
    for (let j = 0; j < shape[1]; j += step[1])
      for (let k = 0; k < shape[2]; k += step[2]) values.push(at(i, j, k));
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  const low = sorted[Math.floor(0.01 * sorted.length)] ?? 0, high = sorted[Math.floor(0.99 * sorted.length)] ?? 1;
  return [low, high > low ? high : low + 1];
}

function tell(found) {
  const rows = found.probabilities
    ? Object.entries(found.probabilities).map(([name, p]) => [name, `${(100 * p).toFixed(1)} %`, found.classes.includes(name)])
    : Object.entries(found.voxels).map(([name, n]) => [name, found.volumes_ml ? `${found.volumes_ml[name].toFixed(3)} ml` : `${n} pixels`, n > 0]);
  if (found.uncertainty !== null) rows.push(["uncertainty", found.uncertainty.toFixed(3), false]);
  $("answer").replaceChildren(...rows.map(([name, text, strong], index) => {
    const row = document.createElement("tr");
    const [left, right] = [row.insertCell(), row.insertCell()];
    if (found.voxels && name in found.voxels) {
      const chip = document.createElement("span");
      chip.className = "chip";
      chip.style.background = COLOURS[index % COLOURS.length];
      left.append(chip);
    }
    left.append(name);
    right.textContent = text;
    row.style.fontWeight = strong ? "600" : "400";
    return row;
  }));
  $("flags").replaceChildren(...found.flags.map((flag) => Object.assign(document.createElement("li"), { textContent: flag.message })));
  $("use").textContent = found.intended_use;
  const { name, version, bundle } = found.model;
  $("about").textContent = `${name} ${version} (${bundle}), ${found.engine} ${found.precision}` + (found.fallback_reason ? `: ${found.fallback_reason}` : "");
}

/** Slices of a volume onto the canvas, or the picture; with `fresh`, at the slice where most is found. */
function draw(fresh = false) {
  const { scan, mask, picture } = shown;
  $("canvas").hidden = $("controls").hidden = !scan;
  $("picture").hidden = !picture;
  $("save").hidden = !shown.link;
  if (shown.link) $("save").href = shown.link;
  if (picture) {
    URL.revokeObjectURL($("picture").src);
    $("picture").src = URL.createObjectURL(picture);
  }
  for (const mark of document.querySelectorAll(".mark")) mark.hidden = !scan;
  if (!scan) return;
  const plane = layout(scan, Number($("plane").value));
  [...document.querySelectorAll(".mark")].forEach((mark, n) => { mark.textContent = MARKS[Number($("plane").value)][n]; });
  $("slice").max = plane.depth - 1;
  if (fresh) $("slice").value = mask ? fullest(plane.along(shown.counts)) : Math.floor(plane.depth / 2);
  const z = Number($("slice").value);
  $("at").textContent = `${z + 1} of ${plane.depth}`;
  const canvas = $("canvas");
  Object.assign(canvas, { width: plane.width, height: plane.height });
  Object.assign(canvas.style, { aspectRatio: plane.aspect, width: `min(100%, calc(70vh * ${plane.aspect}))` });
  const pixels = new ImageData(plane.width, plane.height);
  const [low, high] = shown.range;
  const half = (high - low) / 2 / (Number($("window").value) / 50), middle = low + (high - low) * (1 - Number($("level").value) / 100);
  const share = Number($("opacity").value) / 100;
  const colours = COLOURS.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));
  for (let y = 0, to = 0; y < plane.height; y++)
    for (let x = 0; x < plane.width; x++, to += 4) {
      const voxel = plane.voxel(x, y, z);
      const grey = Math.max(0, Math.min(255, (255 * (scan.at(...voxel) - middle + half)) / (2 * half)));
      const label = mask ? Math.round(mask.at(...voxel)) : 0;
      const colour = label > 0 ? colours[(label - 1) % colours.length] : null;
      for (let n = 0; n < 3; n++) pixels.data[to + n] = colour ? (1 - share) * grey + share * colour[n] : grey;
      pixels.data[to + 3] = 255;
    }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function fullest(counts) {
  const most = Math.max(...counts);
  return most ? counts.indexOf(most) : Math.floor(counts.length / 2);
}

async function explain() {
  const mine = turn;
  $("explain").disabled = true;
  try {
    const answer = await ask(`v1/explain${query()}`, shown.image, "image/png");
    const picture = await answer.blob();
    if (mine !== turn) return;
    shown = { ...shown, scan: null, mask: null, picture };
    draw();
    say(`Where the network looked for "${decodeURIComponent(answer.headers.get("Medray-Target"))}" (${answer.headers.get("Medray-Method")})`);
  } catch (error) {
    say(error.message, true);
  } finally {
    $("explain").disabled = false;
  }
}

for (const id of ["slice", "opacity", "level", "window"]) $(id).addEventListener("input", () => shown?.scan && draw());
$("plane").addEventListener("input", () => shown?.scan && draw(true));
$("explain").addEventListener("click", explain);
$("file").addEventListener("change", () => $("file").files[0] && answerTo($("file").files[0]));
$("model").addEventListener("change", () => shown && answerTo(shown.image));
$("key").addEventListener("change", () => loadModels().catch((error) => say(error.message, true)));
const drop = $("drop");
for (const kind of ["dragover", "dragenter"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) answerTo(event.dataTransfer.files[0]);
});
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
loadModels().catch((error) => say(error.message, !error.message.startsWith("401")));
