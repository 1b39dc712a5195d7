// The page of `latent-shift serve`. The server owns all state: a reload reads the videos and listens again.
"use strict";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["num_frames", "num_inference_steps", "guidance_scale", "fps", "width", "height"];

const OTHERS = ["scheduler", "free_init", "chunk", "halo", "shared_noise", "noise_correlation"];
const FIELDS = ["prompt", "model", "seed", "negative_prompt", "loop", "strength", "then", ...NUMBERS, ...OTHERS];
const ROLES = { image: "First frame", last_image: "Last frame", video: "Video", mask: "Mask: white is new" };
const DEFAULT_EXAMPLES = ["a red heart", "rocket", "waving hand", "face with tears of joy"];
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const page = 24;

let models = [];
let videos = new Map(); // id -> video object of the API, newest first by created order
let order = []; // ids, newest first
let hasOlder = false;
let shown = null; // id of the clip on the stage
const live = new Map(); // id -> {progress, preview}
let inputs = []; // {role, file, url}
let locked = false;
let touchedStrength = false;
let others = {}; // settings of a clip that have no field here: scheduler, chunk, ...

// --- the API

async function api(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    setServer("bad", "no answer");
    throw Object.assign(new Error("The server does not answer."), { isLost: true });
  }
  if (answer.ok) return answer.json();
  const body = await answer.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `The server answered ${answer.status}.`);
  error.param = body?.error?.param;
  throw error;
}

function listen() {
  const stream = new EventSource("v1/events");
  stream.onopen = () => refresh();
  stream.onerror = () => {
    setServer("bad", "not connected, trying again");
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  };
  for (const name of ["queued", "in_progress", "completed", "failed"])
    stream.addEventListener(name, (event) => update(JSON.parse(event.data)));
  stream.addEventListener("progress", (event) => {
    const data = JSON.parse(event.data);
    live.set(data.id, { ...live.get(data.id), progress: data });
    renderProgress(data.id);
  });
  stream.addEventListener("preview", (event) => {
    const { id, image } = JSON.parse(event.data);
    const strip = new Image();
    strip.onload = () => {
      live.set(id, { ...live.get(id), preview: strip });
      if (id === shown) render();
    };
    strip.src = image;
  });
  stream.addEventListener("deleted", (event) => forget(JSON.parse(event.data).id));
}

// The newest page of the server's list is the truth for its span of time; older cards stay.
async function refresh() {
  try {
    const list = await api(`v1/videos?limit=${page}`);
    const ids = new Set(list.data.map(({ id }) => id));
    const since = list.has_more ? list.data.at(-1).created_at : 0;
    const before = Date.now() / 1000 - 5;
    for (const id of order)
      if (!ids.has(id) && videos.get(id).created_at >= since && videos.get(id).created_at < before) forget(id);
    list.data.forEach(keep);
    const listed = list.data.map(({ id }) => id).values(); // in the order of arrival, which a time in seconds does not tell
    order = order.map((id) => (ids.has(id) ? listed.next().value : id));
    if (order.length <= page) hasOlder = list.has_more;
    const runs = (id) => ["queued", "in_progress"].includes(videos.get(id).status);
    if (!shown) shown = order.find(runs) ?? null;
    render();
    renderCards();
    readiness();
  } catch (error) {
    setServer("bad", error.message);
  }
}

let readinessTimer = 0;

async function readiness() {
  clearTimeout(readinessTimer);
  const { data } = await api("v1/workers").catch(() => ({ data: [] }));
  const count = (...names) => data.filter((worker) => names.includes(worker.status)).length;
  if (count("idle", "busy")) setServer("ready", "ready");
  else if (count("starting")) {
    setServer("wait", "loading the model");
    readinessTimer = setTimeout(readiness, 700);
  } else if (data.length) setServer("bad", data.find((worker) => worker.error)?.error ?? "no worker runs");
  $("workers").textContent = data.length > 1 ? `${data.length} workers, ${count("busy")} busy` : "";
}

function setServer(state, text) {
  $("server").dataset.state = state;
  if ($("server-text").textContent !== text) $("server-text").textContent = text;
}

// --- the form

function settings() {
  const values = { ...others, prompt: $("prompt").value.trim() };
  if (models.length > 1) values.model = $("model").value;
  for (const name of ["seed", "negative_prompt", ...NUMBERS])
    if ($(name).value.trim() !== "" && !$(name).closest("label")?.hidden) values[name] = $(name).value.trim();
  if ($("loop").checked) values.loop = true;
  const moves = inputs.some(({ role }) => role === "video" || role === "image");
  if (moves && touchedStrength) values.strength = $("strength").value;
  const then = {};
  for (const row of $("then").children) {
    const [frame, text] = [...row.querySelectorAll("input")].map((input) => input.value.trim());
    if (frame && text) then[frame] = text;
  }
  if (Object.keys(then).length) values.then = then;
  return values;
}

function fill(values) {
  $("prompt").value = values.prompt ?? "";
  for (const name of ["seed", "negative_prompt", ...NUMBERS]) $(name).value = values[name] ?? "";
  if (values.model && models.some(({ id }) => id === values.model)) $("model").value = values.model;
  $("loop").checked = values.loop === true || values.loop === "true";
  others = Object.fromEntries(Object.entries(values).filter(([name]) => OTHERS.includes(name)));
  renderOthers();
  touchedStrength = values.strength !== undefined;
  if (touchedStrength) $("strength").value = values.strength;
  showStrength();
  $("then").replaceChildren();
  for (const [frame, text] of Object.entries(values.then ?? {})) addThen(frame, text);
  if (values.then || values.negative_prompt || NUMBERS.some((name) => values[name])) $("more").open = true;
  setLock($("seed").value !== "");
  showModel();
}

async function submit(values, files) {
  const form = new FormData();
  for (const [name, value] of Object.entries(values))
    form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  for (const { role, file } of files) form.append(role, file, "file");
  // The key lets a request whose answer was lost be sent again: the same key is the same video.
  const key = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const send = () => api("v1/videos", { method: "POST", body: form, headers: { "Idempotency-Key": key } });
  const video = await send().catch((error) => (error.isLost ? send() : Promise.reject(error)));
  update(video);
  return video;
}

let isSubmitting = false;

async function generate(seeds = [null]) {
  if (isSubmitting) return;
  hideSuggestions();
  showError(null);
  const values = settings();
  if (!values.prompt) {
    showError("Type what should move, such as a red heart.", "prompt");
    return;
  }
  isSubmitting = $("generate").disabled = $("vary").disabled = true;
  try {
    for (const [index, seed] of seeds.entries()) {
      const video = await submit(seed === null ? values : { ...values, seed }, inputs);
      if (index === 0) show(video.id, { fillForm: false });
    }
    if (!locked) $("seed").value = "";
    history.replaceState(null, "", "#" + toHash(values));
  } catch (error) {
    showError(error.message, error.param);
  } finally {
    isSubmitting = $("generate").disabled = $("vary").disabled = false;
  }
}

function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}

function setLock(on) {
  locked = on;
  $("lock").setAttribute("aria-pressed", String(on));
}

function showError(message, param) {
  $("form-error").hidden = !message;
  $("form-error").textContent = message ?? "";
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  const field = message && param && document.querySelector(`#form [name="${CSS.escape(param)}"]`);
  if (field) field.parentElement.after($("form-error"));
  else $("form").append($("form-error"));
  if (field) {
    if (field.closest("details")) $("more").open = true;
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
}

function renderOthers() {
  $("others").replaceChildren(
    ...Object.entries(others).map(([name, value]) => {
      const chip = Object.assign(document.createElement("button"), { type: "button", textContent: `${name} ${value} ×` });
      chip.setAttribute("aria-label", `remove ${name} ${value}`);
      chip.onclick = () => {
        delete others[name];
        renderOthers();
      };
      return chip;
    }),
  );
}

function addThen(frame = "", text = "") {
  const row = document.createElement("li");
  const number = Object.assign(document.createElement("input"), { type: "number", min: 1, value: frame, placeholder: "frame" });
  number.setAttribute("aria-label", "from frame");
  const words = Object.assign(document.createElement("input"), { value: text, maxLength: 2000, placeholder: "prompt" });
  words.setAttribute("aria-label", "prompt from that frame on");
  const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
  remove.onclick = () => row.remove();
  row.append(number, words, remove);
  $("then").append(row);
  return number;
}

function showModel() {
  const model = models.find(({ id }) => id === $("model").value) ?? models[0];
  if (!model) return;
  for (const name of NUMBERS) $(name).placeholder = model[name] ?? "";
  for (const name of ["width", "height"]) $(name).step = $(name).min = model.multiple;
  // Guidance is part of a distilled model, and its few steps leave few strengths.
  $("strength").step = $("strength").min = model.distilled_steps ? 1 / model.distilled_steps : 0.05;
  showStrength();
  for (const name of ["guidance_scale", "negative_prompt"]) $(name).closest("label").hidden = model.distilled_steps > 0;
  const examples = model.examples?.length ? model.examples : DEFAULT_EXAMPLES;
  $("examples").replaceChildren(
    ...examples.map((text) => {
      const chip = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      chip.onclick = () => {
        $("prompt").value = text;
        $("prompt").focus();
      };
      return chip;
    }),
  );
}

// --- the link: settings in the hash

function toHash(values) {
  const pairs = Object.entries(values).map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : value]);
  return new URLSearchParams(pairs).toString();
}

function fromHash() {
  const pairs = [...new URLSearchParams(location.hash.slice(1))].filter(([name]) => FIELDS.includes(name));
  const values = Object.fromEntries(pairs);
  try {
    if (values.then) values.then = Object(JSON.parse(values.then));
  } catch {
    delete values.then;
  }
  return values;
}

async function share() {
  const values = settings();
  const video = videos.get(shown);
  if (!values.seed && video && video.prompt === values.prompt) values.seed = video.seed;
  const link = location.href.split("#")[0] + "#" + toHash(values);
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    say("Link copied.");
    $("share").textContent = "Copied";
  } catch {
    $("share").textContent = "Link is in the address bar";
  }
  setTimeout(() => ($("share").textContent = "Copy link"), 2000);
}

// --- suggestions: names that the model knows, for the last words of the prompt

let suggestTimer = 0;
let suggestTurn = 0;
let active = -1;

function suggest() {
  clearTimeout(suggestTimer);
  const turn = ++suggestTurn;
  suggestTimer = setTimeout(async () => {
    const before = $("prompt").value.slice(0, $("prompt").selectionStart);
    const words = before.split(/[\s,.;:!?()]+/);
    const model = models.find(({ id }) => id === $("model").value) ?? models[0];
    if (!model) return hideSuggestions();
    for (let length = Math.min(3, words.length); length > 0; length--) {
      const query = words.slice(-length).join(" ");
      if (query.trim().length < 2) continue;
      const answer = await api(`v1/models/${model.id}/names?limit=6&query=${encodeURIComponent(query)}`).catch(() => null);
      if (turn !== suggestTurn || document.activeElement !== $("prompt")) return;
      const names = (answer?.data ?? []).filter((name) => name.toLowerCase() !== query.toLowerCase());
      if (names.length) return showSuggestions(names, before.length - query.length, before.length);
    }
    hideSuggestions();
  }, 120);
}

function showSuggestions(names, start, end) {
  active = -1;
  const options = names.map((name, index) => {
    const option = Object.assign(document.createElement("li"), { id: `suggestion-${index}`, textContent: name });
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", "false");
    option.onpointerdown = (event) => {
      event.preventDefault();
      accept(name, start, end);
    };
    option.accept = () => accept(name, start, end);
    return option;
  });
  $("suggestions").replaceChildren(...options);
  $("suggestions").hidden = false;
  $("prompt").setAttribute("aria-expanded", "true");
}

function hideSuggestions() {
  clearTimeout(suggestTimer);
  suggestTurn++;
  $("suggestions").hidden = true;
  $("prompt").setAttribute("aria-expanded", "false");
  $("prompt").removeAttribute("aria-activedescendant");
  active = -1;
}

function accept(name, start, end) {
  const box = $("prompt");
  box.setRangeText(name, start, end, "end");
  hideSuggestions();
  box.focus();
}

function moveSuggestion(by) {
  const options = [...$("suggestions").children];
  active = (active + by + options.length + (active < 0 && by < 0 ? 1 : 0)) % options.length;
  options.forEach((option, index) => option.setAttribute("aria-selected", String(index === active)));
  options[active].scrollIntoView({ block: "nearest" });
  $("prompt").setAttribute("aria-activedescendant", options[active].id);
}

function promptKey(event) {
  const isOpen = !$("suggestions").hidden;
  if (isOpen && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    moveSuggestion(event.key === "ArrowDown" ? 1 : -1);
  } else if (isOpen && event.key === "Escape") {
    hideSuggestions();
  } else if (isOpen && active >= 0 && (event.key === "Enter" || event.key === "Tab")) {
    $("suggestions").children[active].accept();
  } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    if (!event.repeat) generate();
  } else return;
  event.preventDefault();
}

// --- pictures and videos

function addFile(file, role) {
  const isVideo = file.type.startsWith("video/") || file.type === "image/gif";
  const taken = new Set(inputs.map((input) => input.role));
  role ??= isVideo ? "video" : taken.has("video") ? "mask" : taken.has("image") ? "last_image" : "image";
  setInputs([...inputs.filter((input) => input.role !== role), { role, file, url: URL.createObjectURL(file) }]);
}

// Until it is moved, the slider shows what the server takes when strength is left out.
function showStrength() {
  const roles = inputs.map(({ role }) => role);
  if (!touchedStrength) $("strength").value = roles.includes("video") && !roles.includes("mask") ? 0.6 : 1;
  $("strength-value").value = $("strength").value;
}

function setInputs(list) {
  for (const input of inputs) if (!list.includes(input)) URL.revokeObjectURL(input.url);
  inputs = list;
  renderInputs();
}

function renderInputs() {
  $("input-list").replaceChildren(
    ...inputs.map((input) => {
      const item = document.createElement("li");
      const isFilm = input.file.type.startsWith("video/");
      const view = Object.assign(document.createElement(isFilm ? "video" : "img"), { src: input.url, muted: true });
      if (!isFilm) view.alt = "";
      const role = document.createElement("select");
      role.setAttribute("aria-label", "use as");
      for (const [name, text] of Object.entries(ROLES)) role.append(new Option(text, name, false, name === input.role));
      role.onchange = () => {
        const other = inputs.find((each) => each !== input && each.role === role.value);
        if (other) other.role = input.role;
        input.role = role.value;
        renderInputs();
      };
      const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
      remove.onclick = () => setInputs(inputs.filter((each) => each !== input));
      item.append(view, role, remove);
      return item;
    }),
  );
  $("strength-row").hidden = !inputs.some(({ role }) => role === "video" || role === "image");
  if (!inputs.length) touchedStrength = false;
  showStrength();
}

// --- videos

// How late in a job's life a video object is: answers and events overtake each other.
function age(video) {
  if (video.status === "completed" || video.status === "failed") return Infinity;
  return 2 * video.attempts - (video.status === "in_progress" ? 1 : 0);
}

function keep(video) {
  const before = videos.get(video.id);
  if (!before || age(video) >= age(before)) videos.set(video.id, video);
  if (!before) {
    const place = order.findIndex((id) => videos.get(id).created_at <= video.created_at);
    if (place < 0) order.push(video.id);
    else order.splice(place, 0, video.id);
  }
  return videos.get(video.id) === video;
}

function update(video) {
  const before = videos.get(video.id);
  if (!keep(video)) return;
  if (video.status === "completed" || video.status === "failed") {
    live.delete(video.id);
    if (before && before.status !== video.status) {
      const words = video.status === "completed" ? "Done" : video.error?.code === "cancelled" ? "Cancelled" : "Failed";
      say(`${words}: ${video.prompt}`);
    }
  } else if (before?.status !== video.status && video.id === shown) {
    say(video.status === "queued" ? `Number ${video.queue_position} in the queue` : "Generating");
  }
  if (!shown) shown = video.id;
  if (video.id === shown) render();
  renderCards();
  if (!before || before.status !== video.status) readiness();
}

function forget(id) {
  videos.delete(id);
  live.delete(id);
  order = order.filter((each) => each !== id);
  if (shown === id) shown = null;
  render();
  renderCards();
}

function show(id, { fillForm = true } = {}) {
  shown = id;
  const video = videos.get(id);
  if (fillForm && video) {
    fill(chosenSettings(video));
    bringInputs(video);
    history.replaceState(null, "", "#" + toHash(settings()));
  }
  render();
  renderCards();
  $("stage").scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
}

// The settings of a clip, without the numbers that the model would take anyway.
function chosenSettings(video) {
  const model = models.find(({ id }) => id === video.model) ?? {};
  const entries = Object.entries({ ...video.settings, model: video.model });
  return Object.fromEntries(
    entries.filter(([name, value]) => ![...NUMBERS, ...OTHERS].includes(name) || value !== model[name]),
  );
}

async function fetchInput(video, name) {
  const answer = await fetch(`v1/videos/${video.id}/input/${name}`);
  if (!answer.ok) throw new Error(`The ${name} of this clip is gone.`);
  return answer.blob();
}

async function bringInputs(video) {
  setInputs([]);
  for (const name of video.inputs) {
    const content = await fetchInput(video, name).catch(() => null);
    if (!content || shown !== video.id) return;
    addFile(new File([content], name, { type: content.type }), name);
  }
}

async function again(video, num) {
  $("more-seeds").disabled = true;
  try {
    const files = await Promise.all(video.inputs.map(async (role) => ({ role, file: await fetchInput(video, role) })));
    for (let index = 0; index < num; index++) await submit({ ...video.settings, model: video.model, seed: randomSeed() }, files);
  } catch (error) {
    showError(error.message);
  } finally {
    $("more-seeds").disabled = false;
  }
}

let doomed = null; // id of the clip whose deletion was asked for once: a second click within three seconds deletes it
let screenKey = "";
let played = false;

function render() {
  const video = videos.get(shown);
  const state = !video ? "empty" : video.status;
  const isStill = video?.num_frames === 1;
  const hasPreview = state === "in_progress" && live.get(shown)?.preview;
  $("stage").dataset.state = state;
  $("empty").hidden = Boolean(hasPreview) || state === "completed";
  $("empty").lastElementChild.textContent =
    { empty: "Your clip will play here.", queued: "Waiting", in_progress: "Starting", failed: "Nothing to show" }[state] ?? "";
  $("preview").hidden = !hasPreview;
  $("video").hidden = state !== "completed" || isStill;
  $("still").hidden = state !== "completed" || !isStill;
  $("progress").hidden = state !== "queued" && state !== "in_progress";
  $("details").hidden = state !== "completed" && state !== "failed";
  $("clip-error").hidden = state !== "failed";
  document.title = "Latent-Shift";
  const key = `${shown} ${state}`;
  if (key !== screenKey) {
    screenKey = key;
    if (state === "completed" && !isStill) {
      $("video").src = `v1/videos/${video.id}/content`;
      $("video").setAttribute("aria-label", video.prompt);
      played = !calm.matches;
      if (played) $("video").play().catch(() => undefined);
    } else {
      $("video").removeAttribute("src");
      $("video").load();
    }
    if (state === "completed" && isStill) {
      $("still").src = `v1/videos/${video.id}/content`;
      $("still").alt = video.prompt;
    }
  }
  $("play").hidden = state !== "completed" || isStill || !$("video").paused || played;
  if (!video) return;
  $("clip-title").textContent = video.prompt;
  const length = isStill ? "1 frame" : `${video.num_frames} frames at ${video.fps} fps`;
  const facts = [length, video.size, `seed ${video.seed}`];
  $("clip-facts").textContent = facts.join(" · ");
  $("clip-error").textContent = video.error?.code === "cancelled" ? "Cancelled." : (video.error?.message ?? "");
  document.querySelector(".downloads").hidden = state !== "completed";
  for (const link of document.querySelectorAll(".downloads a")) {
    link.href = `v1/videos/${video.id}/content?format=${link.dataset.format}&download=true`;
    link.hidden = isStill && link.dataset.format !== "png";
    link.download = "";
  }
  $("remove").textContent = doomed === shown ? "Delete for good?" : "Delete";
  renderProgress(video.id);
}

function renderProgress(id) {
  const video = videos.get(id);
  const progress = live.get(id)?.progress;
  const card = document.querySelector(`#cards [data-id="${id}"] .fill`);
  if (card && progress) card.style.width = `${progress.progress}%`;
  if (id !== shown || !video) return;
  const bar = $("bar");
  if (video.status === "queued") {
    bar.removeAttribute("aria-valuenow");
    bar.firstElementChild.style.width = "";
    $("progress-text").textContent = video.queue_position === 1 ? "Next in the queue" : `Number ${video.queue_position} in the queue`;
  } else if (video.status === "in_progress") {
    const percent = progress?.progress ?? 0;
    bar.setAttribute("aria-valuenow", String(percent));
    bar.firstElementChild.style.width = `${percent}%`;
    const left = progress?.eta_ms ? `, about ${Math.max(1, Math.round(progress.eta_ms / 1000))} s left` : "";
    const step = !progress ? "Starting" : progress.stage === "decoding" ? "Decoding" : `Step ${progress.step} of ${progress.of}`;
    $("progress-text").textContent = step + left;
    document.title = `${percent}% · Latent-Shift`;
  }
}

// The preview: the frames of the strip in turn.
function drawPreview(time) {
  const strip = live.get(shown)?.preview;
  const video = videos.get(shown);
  if (strip && video && !$("preview").hidden) {
    const width = strip.naturalWidth / video.num_frames;
    const index = calm.matches ? 0 : Math.floor((time / 1000) * video.fps) % video.num_frames;
    const canvas = $("preview");
    canvas.height = Math.round((canvas.width * strip.naturalHeight) / width);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(strip, index * width, 0, width, strip.naturalHeight, 0, 0, canvas.width, canvas.height);
  }
  requestAnimationFrame(drawPreview);
}

function togglePlay() {
  const video = $("video");
  if (video.hidden) return;
  played = true;
  if (video.paused) video.play().catch(() => undefined);
  else video.pause();
  $("play").hidden = true;
}

// --- the gallery

function renderCards() {
  const wanted = $("filter").value.trim().toLowerCase();
  const ids = order.filter((id) => videos.get(id)?.prompt.toLowerCase().includes(wanted));
  const cards = new Map([...$("cards").children].map((card) => [card.dataset.id, card]));
  const list = ids.map((id) => {
    const video = videos.get(id);
    const card = cards.get(id) ?? document.createElement("li");
    const key = `${video.status} ${video.queue_position}`;
    if (card.dataset.key !== key) fillCard(card, video, key);
    card.firstElementChild.setAttribute("aria-current", String(id === shown));
    return card;
  });
  for (const [id, card] of cards) if (!ids.includes(id)) card.remove();
  list.forEach((card, index) => {
    if ($("cards").children[index] !== card) $("cards").insertBefore(card, $("cards").children[index] ?? null);
  });
  $("no-cards").hidden = ids.length > 0;
  $("no-cards").textContent = order.length ? "No matches." : "Clips are kept here, even after a restart.";
  $("older").hidden = !hasOlder;
}

function fillCard(card, video, key) {
  card.dataset.id = video.id;
  card.dataset.key = key;
  const button = Object.assign(document.createElement("button"), { type: "button" });
  const thumb = Object.assign(document.createElement("span"), { className: "thumb" });
  if (video.status === "completed") {
    const still = Object.assign(new Image(), { src: `v1/videos/${video.id}/content?variant=thumbnail`, alt: "", loading: "lazy" });
    thumb.append(still);
    const play = () => {
      if (calm.matches || video.num_frames === 1 || thumb.querySelector("video")) return;
      const film = Object.assign(document.createElement("video"), { src: `v1/videos/${video.id}/content`, muted: true, loop: true, playsInline: true });
      thumb.append(film);
      film.play().catch(() => undefined);
    };
    const stop = () => thumb.querySelector("video")?.remove();
    button.onpointerenter = button.onfocus = play;
    button.onpointerleave = button.onblur = stop;
  } else {
    const states = { queued: `queued: ${video.queue_position}`, in_progress: "generating", failed: video.error?.code === "cancelled" ? "cancelled" : "failed" };
    thumb.append(states[video.status]);
    thumb.append(Object.assign(document.createElement("span"), { className: "fill" }));
  }
  const words = Object.assign(document.createElement("span"), { className: "words", textContent: video.prompt });
  button.append(thumb, words);
  button.onclick = () => show(video.id);
  const hadFocus = card.contains(document.activeElement);
  card.replaceChildren(button);
  if (hadFocus) button.focus({ preventScroll: true });
}

function cardKey(event) {
  const buttons = [...$("cards").querySelectorAll("button")];
  const index = buttons.indexOf(document.activeElement);
  if (index < 0) return;
  const columns = buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  buttons[Math.min(buttons.length - 1, Math.max(0, index + by))].focus();
}

async function older() {
  const last = order.at(-1);
  const list = await api(`v1/videos?limit=${page}&after=${last}`).catch(() => null);
  if (!list) return;
  for (const video of list.data) {
    if (!videos.has(video.id)) order.push(video.id);
    videos.set(video.id, video);
  }
  hasOlder = list.has_more;
  renderCards();
}

function say(text) {
  $("announce").textContent = text;
}

// --- start

function connect() {
  $("form").onsubmit = (event) => {
    event.preventDefault();
    generate();
  };
  $("vary").onclick = () => generate([randomSeed(), randomSeed(), randomSeed(), randomSeed()]);
  $("share").onclick = share;
  $("dice").onclick = () => ($("seed").value = randomSeed());
  $("lock").onclick = () => {
    setLock(!locked);
    if (locked && !$("seed").value) $("seed").value = videos.get(shown)?.seed ?? randomSeed();
  };
  $("prompt").oninput = suggest;
  $("prompt").onkeydown = promptKey;
  $("prompt").onblur = hideSuggestions;
  $("strength").oninput = () => {
    touchedStrength = true;
    showStrength();
  };
  $("model").onchange = showModel;
  $("add-then").onclick = () => addThen().focus();
  $("pick").onclick = () => $("file").click();
  $("file").onchange = () => {
    for (const file of $("file").files) addFile(file);
    $("file").value = "";
  };
  addEventListener("paste", (event) => {
    for (const file of event.clipboardData?.files ?? []) addFile(file);
  });
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("inputs").classList.add("over");
  });
  addEventListener("dragleave", (event) => event.relatedTarget ?? $("inputs").classList.remove("over"));
  addEventListener("drop", (event) => {
    $("inputs").classList.remove("over");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    for (const file of event.dataTransfer.files) if (/^(image|video)\//.test(file.type)) addFile(file);
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.repeat && (event.ctrlKey || event.metaKey) && document.activeElement !== $("prompt")) generate();
  });
  $("screen").onclick = togglePlay;
  $("screen").onkeydown = (event) => {
    if (event.key === " " || event.key === "k") {
      event.preventDefault();
      togglePlay();
    }
  };
  $("play").onclick = (event) => {
    event.stopPropagation();
    togglePlay();
  };
  $("cancel").onclick = async () => {
    await api(`v1/videos/${shown}/cancel`, { method: "POST" }).then(update, (error) => showError(error.message));
  };
  $("remove").onclick = async () => {
    const id = shown;
    if (doomed !== id) {
      doomed = id;
      render();
      setTimeout(() => {
        doomed = null;
        render();
      }, 3000);
      return;
    }
    await api(`v1/videos/${id}`, { method: "DELETE" }).then(() => forget(id), (error) => showError(error.message));
    $("gallery-title").focus();
  };
  $("more-seeds").onclick = () => again(videos.get(shown), 4);
  $("filter").oninput = renderCards;
  $("cards").onkeydown = cardKey;
  $("older").onclick = older;
  addEventListener("hashchange", () => {
    const values = fromHash();
    if (values.prompt !== undefined) fill(values);
  });
}

async function start() {
  connect();
  requestAnimationFrame(drawPreview);
  try {
    models = (await api("v1/models")).data;
  } catch (error) {
    setServer("bad", error.message);
  }
  $("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  $("model-row").hidden = models.length < 2;
  showModel();
  if (location.hash.length > 1) fill(fromHash());
  listen();
}

start();
