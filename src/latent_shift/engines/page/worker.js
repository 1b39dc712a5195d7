// Loads the model and samples it, away from the page's thread.
import { advance, clipNoise, fitTokens, neighbors } from "./sampling.js";

const THREADS = 4; // more cores hardly help networks this small
const TOLERANCE = 0.02; // of WebGPU's largest output, beside WASM

let ort, settings, tokenizer, sessions, version;
let cancelled = false;

self.onmessage = async ({ data: { type, id, ...message } }) => {
  if (type === "cancel") {
    cancelled = true;
    return;
  }
  try {
    const result = await (type === "load" ? load(message) : generate(message));
    self.postMessage({ type: "done", id, ...result }, result.frames ? [result.frames.buffer] : []);
  } catch (error) {
    self.postMessage({ type: "failed", id, message: error.message ?? String(error) });
  }
};

const report = (type, fields) => self.postMessage({ type, ...fields });

// The address of a file of this version of the page: the service worker keeps it, and another export has others.
const addressOf = (name) => new URL(`${name}?${version}`, self.location);

// The bytes of a packed file of the folder: from the cache, or from the network and then into the cache.
async function read(name, onBytes) {
  const cacheName = `latent-shift ${new URL(".", self.location).pathname} ${version}`; // as in sw.js
  const cache = await self.caches?.open(cacheName).catch(() => null); // there is none without https
  let response = await cache?.match(addressOf(name));
  const isKept = Boolean(response);
  response ??= await fetch(addressOf(name));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  const counted = new TransformStream({
    transform(chunk, controller) {
      onBytes(chunk.length);
      controller.enqueue(chunk);
    },
  });
  const packed = new Uint8Array(await new Response(response.body.pipeThrough(counted)).arrayBuffer());
  let unpacked = packed;
  if (packed[0] === 0x1f && packed[1] === 0x8b) {
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked = new Uint8Array(await new Response(stream).arrayBuffer());
  } else if (!response.headers.has("Content-Encoding")) throw new Error(`${name}: the server gave something else`);
  if (!isKept) await cache?.put(addressOf(name), new Response(packed, { headers: response.headers })).catch(() => undefined); // a full disk
  return unpacked;
}

async function load({ manifest, webgpu }) {
  const start = performance.now();
  const build = manifest.runtime[webgpu ? "webgpu" : "wasm"];
  version = manifest.version;
  const { text_encoder, unet: network, decoder: last } = manifest.graphs;
  const files = [build.binary, text_encoder, network, last, "model/tokenizer.json.gz", "model/exported.json.gz"];
  const total = files.reduce((sum, name) => sum + manifest.files[name], 0);
  let loaded = 0;
  const count = (bytes) => report("loading", { loaded: (loaded += bytes), total });
  const [binary, textEncoder, unet, decoder, tokens, exported] = await Promise.all(files.map((name) => read(name, count)));
  const json = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
  settings = json(exported);
  const { Tokenizer } = await import(addressOf("vendor/tokenizers.min.mjs"));
  tokenizer = new Tokenizer(json(tokens), {});
  ort = await import(addressOf(build.module));
  ort.env.wasm.wasmBinary = binary.buffer;
  ort.env.wasm.wasmPaths = { mjs: addressOf(build.loader).href };
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(THREADS, navigator.hardwareConcurrency) : 1;
  report("preparing", {});
  ort.env.logLevel = "error";
  const open = (bytes, provider) => ort.InferenceSession.create(bytes, { executionProviders: [provider], logSeverityLevel: 3 });
  sessions = { text_encoder: await open(textEncoder, "wasm") };
  const notes = [];
  for (const [name, bytes] of Object.entries({ unet, decoder })) {
    sessions[name] = await open(bytes, "wasm");
    if (webgpu) notes.push(await tryWebGpu(name, () => open(bytes, "webgpu")));
  }
  const note = notes.filter(Boolean).join(" ");
  const threads = ort.env.wasm.numThreads;
  const engines = [notes.includes("") && "WebGPU", (note || !webgpu) && `WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"}`];
  const engine = engines.filter(Boolean).join(" and ");
  return { settings, engine, note, bytes: total, seconds: (performance.now() - start) / 1000 };
}

// Take the graphics card for a graph if one call gives what WASM gives; return why not.
async function tryWebGpu(name, open) {
  let other;
  try {
    other = await open();
    const frames = 2;
    const shape = [frames, settings.channels, settings.height, settings.width];
    const sample = clipNoise(0, frames, shape[1] * shape[2] * shape[3]);
    const inputs = name === "unet" ? unetInputs(sample, shape, 500, await embed("a"), neighbors(frames, settings.edge)) : { latents: new ort.Tensor("float32", sample, shape) };
    const [expected, found] = [await run(name, inputs), await run(name, inputs, other)];
    let largest = 0;
    let difference = 0;
    for (let index = 0; index < expected.length; index++) {
      largest = Math.max(largest, Math.abs(expected[index]));
      const gap = Math.abs(expected[index] - found[index]);
      difference = gap <= difference ? difference : gap; // NaN counts as a difference
    }
    if (!(difference <= TOLERANCE * largest)) throw new Error(`${name} differs from WebAssembly by ${(difference / largest).toPrecision(2)} of its largest value`);
    await sessions[name].release();
    sessions[name] = other;
    return "";
  } catch (error) {
    await other?.release();
    return `WebGPU is not used: ${error.message}.`;
  }
}

async function run(name, inputs, session = sessions[name]) {
  const known = Object.fromEntries(Object.entries(inputs).filter(([input]) => session.inputNames.includes(input)));
  return (await session.run(known)).output.data;
}

// The embedding of a text, a tensor.
async function embed(text) {
  const length = settings.max_tokens;
  const fitted = fitTokens(tokenizer.encode(text).ids, length, settings.pad_token_id);
  const inputs = Object.fromEntries(Object.entries(fitted).map(([name, data]) => [name, new ort.Tensor("int64", data, [1, length])]));
  const states = await run("text_encoder", inputs);
  return new ort.Tensor("float32", states, [1, length, states.length / length]);
}

function unetInputs(sample, shape, timestep, text, { previous, next }) {
  return {
    sample: new ort.Tensor("float32", sample, shape), timestep: new ort.Tensor("int64", BigInt64Array.of(BigInt(timestep)), [1]), text,
    previous: new ort.Tensor("int64", previous, [shape[0]]), next: new ort.Tensor("int64", next, [shape[0]]),
  };
}

// A message that says to stop is read between two tasks.
const otherTasks = () => new Promise((resolve) => setTimeout(resolve));

async function generate({ prompt, steps, seed, loop, frames, guidance }) {
  cancelled = false;
  const start = performance.now();
  const shape = [frames, settings.channels, settings.height, settings.width];
  const texts = [await embed(prompt)];
  if (guidance > 1) texts.unshift(await embed(""));
  const size = shape[1] * shape[2] * shape[3];
  const sample = clipNoise(seed, frames, size, { shared: settings.shared_noise, correlation: settings.noise_correlation, loop });
  const before = new Float32Array(sample.length);
  const around = neighbors(frames, loop ? "wrap" : settings.edge);
  for (const [index, step] of steps.entries()) {
    await otherTasks();
    if (cancelled) throw new Error("Cancelled.");
    const outputs = [];
    for (const text of texts) outputs.push(await run("unet", unetInputs(sample, shape, step.timestep, text, around)));
    const [output, guided] = outputs;
    if (guided) for (let place = 0; place < output.length; place++) output[place] += guidance * (guided[place] - output[place]);
    advance(step, sample, output, before);
    report("step", { done: index + 1, of: steps.length });
  }
  await otherTasks();
  if (cancelled) throw new Error("Cancelled.");
  const pixels = await run("decoder", { latents: new ort.Tensor("float32", sample, shape) });
  return {
    frames: new Uint8Array(pixels), count: frames, height: settings.height * settings.factor, width: settings.width * settings.factor,
    fps: settings.fps, seconds: (performance.now() - start) / 1000,
  };
}
