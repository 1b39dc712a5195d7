// The page: a form, a clip that loops, downloads.
import { clipFile } from "./files.js";

const $ = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const SECONDS_TO_WAIT = 5;
let manifest, settings, clip, seconds;
let animation = 0;
let calls = 0;
const waiting = new Map();

worker.onmessage = ({ data: { type, id, ...fields } }) => {
  if (type === "done") waiting.get(id).resolve(fields);
  else if (type === "failed") waiting.get(id).reject(new Error(fields.message));
  else if (type === "loading") progress(fields.loaded / fields.total, `Loading the model: ${megabytes(fields.loaded)} of ${megabytes(fields.total)} MB`);
  else if (type === "preparing") progress(null, "Preparing the model");
  else if (type === "step") progress(fields.done / (fields.of + 1), fields.done < fields.of ? `Step ${fields.done} of ${fields.of}` : "Decoding");
};
worker.onerror = (event) => problem(event.message || "The browser cannot run the model: it lacks modules in workers.");

const megabytes = (bytes) => (bytes / 1e6).toFixed(0);

function ask(type, fields) {
  const id = ++calls;
  worker.postMessage({ type, id, ...fields });
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject })).finally(() => waiting.delete(id));
}

function progress(part, text) {
  $("bar").hidden = false;
  if (part === null) $("bar").removeAttribute("value");
  else $("bar").value = part;
  $("status").textContent = text;
}

function problem(text) {
  $("problem").textContent = text;
  $("bar").hidden = true;
}

// A service worker keeps the files and isolates the page; it does so from the next load on, so the page is loaded once more.
async function isolate() {
  if (!("serviceWorker" in navigator)) return;
  const ready = navigator.serviceWorker.register("sw.js").then(() => navigator.serviceWorker.ready);
  const late = new Promise((resolve) => setTimeout(resolve, SECONDS_TO_WAIT * 1000));
  // Private windows of some browsers have none: one thread then, and nothing is kept.
  if (!(await Promise.race([ready, late]).catch(() => null))) return;
  if (!window.crossOriginIsolated && !sessionStorage.isolated) {
    sessionStorage.isolated = "tried";
    window.location.reload();
    await new Promise(() => {});
  }
}

async function start() {
  manifest = await (await fetch("web.json", { cache: "no-cache" })).json();
  await isolate();
  $("names").replaceChildren(...manifest.names.map((value) => Object.assign(document.createElement("option"), { value })));
  $("examples").replaceChildren(
    ...manifest.examples.map((text) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      button.onclick = () => {
        $("prompt").value = text;
        $("form").requestSubmit();
      };
      return button;
    }),
  );
  const { searchParams } = new URL(window.location);
  if (searchParams.has("prompt")) $("prompt").value = searchParams.get("prompt");
  if (searchParams.has("seed")) {
    $("seed").value = searchParams.get("seed");
    $("keep").checked = true;
  }
  const adapter = searchParams.get("webgpu") === "off" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  const { engine, note, bytes, seconds: took, settings: loaded } = await ask("load", { manifest, webgpu: Boolean(adapter) });
  settings = loaded;
  $("steps").replaceChildren(
    ...Object.keys(manifest.steps).map((num) => Object.assign(document.createElement("option"), { value: num, textContent: num })),
  );
  $("steps").value = settings.num_inference_steps;
  $("frames").value = settings.num_frames;
  $("guidance-row").hidden = settings.distilled_steps > 0;
  $("guidance").value = settings.guidance_scale;
  $("engine").textContent = `${engine}. ${megabytes(bytes)} MB loaded in ${took.toFixed(1)} s. ${note}`;
  progress(0, "Ready.");
  $("bar").hidden = true;
  $("go").disabled = false;
  document.body.dataset.ready = "true";
}

function request() {
  const whole = (id, least, most) => {
    const value = $(id).value.trim();
    if (!/^-?\d+$/.test(value) || Number(value) < least || Number(value) > most) throw new Error(`${id}: expected a whole number from ${least} to ${most}, got "${value}"`);
    return Number(value);
  };
  const prompt = $("prompt").value.trim();
  if (!prompt) throw new Error("prompt: expected words");
  if (/(^|[^\\])[()[\]]/.test(prompt)) throw new Error("prompt: weights in brackets, such as (red:1.4), need the command or the server");
  if (!$("seed").value.trim() || !$("keep").checked) $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  const guidance = Number($("guidance").value);
  if (!(guidance >= 1 && guidance <= 30)) throw new Error(`guidance: expected a number from 1 to 30, got "${$("guidance").value}"`);
  return {
    prompt: prompt.replace(/\\([()[\]\\])/g, "$1"), seed: whole("seed", 0, 2 ** 32 - 1), frames: whole("frames", 1, 64), guidance,
    steps: manifest.steps[$("steps").value], loop: $("loop").checked,
  };
}

async function generate(event) {
  event.preventDefault();
  if ($("go").disabled) return;
  $("problem").textContent = "";
  try {
    const fields = request();
    document.body.dataset.state = "busy";
    $("go").disabled = true;
    $("cancel").hidden = false;
    progress(0, "Reading the prompt");
    clip = await ask("generate", fields);
    clip.name = `${fields.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-${fields.seed}`;
    seconds = clip.seconds;
    play();
    $("downloads").hidden = false;
    progress(1, `${clip.count} frames in ${seconds.toFixed(1)} s, seed ${fields.seed}`);
    $("bar").hidden = true;
    document.body.dataset.state = "done";
  } catch (error) {
    progress(0, "");
    problem(error.message);
    document.body.dataset.state = "failed";
  }
  $("go").disabled = false;
  $("cancel").hidden = true;
}

function play() {
  const canvas = $("clip");
  canvas.width = clip.width;
  canvas.height = clip.height;
  canvas.hidden = false;
  const size = clip.width * clip.height;
  const images = Array.from({ length: clip.count }, (_, frame) => {
    const image = new ImageData(clip.width, clip.height);
    for (let index = 0; index < size; index++) {
      for (let colour = 0; colour < 3; colour++) image.data[4 * index + colour] = clip.frames[3 * (frame * size + index) + colour];
      image.data[4 * index + 3] = 255;
    }
    return image;
  });
  clip.images = images;
  canvas.frames = () => clip.frames; // for scripts: the pixels of all frames
  cancelAnimationFrame(animation);
  const context = canvas.getContext("2d");
  const begin = performance.now();
  const draw = (now) => {
    context.putImageData(images[Math.floor((Math.max(0, now - begin) / 1000) * clip.fps) % images.length], 0, 0);
    animation = requestAnimationFrame(draw);
  };
  draw(begin);
}

async function download(format) {
  $("problem").textContent = "";
  try {
    const file = await clipFile(clip, format);
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: `${clip.name}.${format}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    problem(error.message);
  }
}

$("form").onsubmit = generate;
$("seed").oninput = () => ($("keep").checked = $("seed").value.trim() !== "");
$("cancel").onclick = () => worker.postMessage({ type: "cancel" });
for (const button of document.querySelectorAll("#downloads button")) button.onclick = () => download(button.dataset.format);
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.isComposing) generate(event);
};
start().catch((error) => problem(error.message));
