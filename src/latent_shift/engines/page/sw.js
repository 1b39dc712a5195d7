// Keeps the page's small files, so that it works offline (worker.js keeps the large ones), and adds the two headers that let
// WebAssembly use threads. The export fills in these two.
const VERSION = "";
const FILES = [];

const scope = new URL(".", self.location);
const prefix = `latent-shift ${scope.pathname} `;
const cacheName = prefix + VERSION;
const addresses = new Set(["", ...FILES].map((name) => new URL(name, scope).href));

self.oninstall = (event) => {
  self.skipWaiting();
  event.waitUntil(Promise.all([...addresses].map((address) => answer(new Request(address)))));
};
self.onactivate = (event) => event.waitUntil(forgetOthers().then(() => self.clients.claim()));
self.onfetch = (event) => {
  const { origin, pathname } = new URL(event.request.url);
  if (event.request.method === "GET" && addresses.has(origin + pathname)) event.respondWith(answer(event.request));
};

async function forgetOthers() {
  for (const name of await caches.keys()) if (name.startsWith(prefix) && name !== cacheName) await caches.delete(name);
}

// From the network, because the next export has other files, and from the cache if there is none.
async function answer(request) {
  let response;
  try {
    response = await fetch(request, { cache: "no-cache" });
  } catch (error) {
    const kept = await (await caches.open(cacheName)).match(request, { ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
  if (!response.ok || response.redirected) return response;
  // The whole body: a stream would end with this worker, when the next version takes its place.
  const { status, statusText } = response;
  const body = await response.arrayBuffer();
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  const answered = new Response(body, { status, statusText, headers });
  await keep(request, answered.clone()).catch(() => undefined); // a full disk, or a cache that the next version has deleted
  return answered;
}

async function keep(request, response) {
  const cache = await caches.open(cacheName);
  await cache.put(request, response);
}
