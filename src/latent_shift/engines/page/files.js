// A clip as a file: gif by gifenc, mp4 by the browser's own encoder in a container by mediabunny.

const SCALE = 2; // players shrink small videos, and encoders blur single pixels of colour

export async function clipFile(clip, format) {
  return format === "gif" ? gifFile(clip) : mp4File(clip);
}

async function gifFile(clip) {
  const { GIFEncoder, quantize, applyPalette } = await import("./vendor/gifenc.esm.js");
  const encoder = GIFEncoder();
  const all = new Uint8Array(clip.images.length * clip.images[0].data.length);
  clip.images.forEach((image, index) => all.set(image.data, index * image.data.length));
  const palette = quantize(all, 256); // one palette for all frames, or colours flicker
  let shown = 0; // gif counts hundredths of a second: 12 fps is 8 and 9 in turn
  clip.images.forEach((image, index) => {
    const until = Math.round(((index + 1) * 100) / clip.fps);
    encoder.writeFrame(applyPalette(image.data, palette), clip.width, clip.height, { palette: index ? undefined : palette, delay: (until - shown) * 10 });
    shown = until;
  });
  encoder.finish();
  return new Blob([encoder.bytes()], { type: "image/gif" });
}

async function mp4File(clip) {
  if (!("VideoEncoder" in window)) throw new Error("mp4: this browser has no WebCodecs; take the gif");
  const { Output, Mp4OutputFormat, BufferTarget, CanvasSource, QUALITY_VERY_HIGH, getFirstEncodableVideoCodec } = await import("./vendor/mediabunny.min.mjs");
  const canvas = new OffscreenCanvas(SCALE * clip.width, SCALE * clip.height);
  const codec = await getFirstEncodableVideoCodec(["avc", "vp9", "av1"], { width: canvas.width, height: canvas.height });
  if (!codec) throw new Error("mp4: this browser encodes no video; take the gif");
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  const output = new Output({ format: new Mp4OutputFormat({ fastStart: "in-memory" }), target: new BufferTarget() });
  const source = new CanvasSource(canvas, { codec, bitrate: QUALITY_VERY_HIGH });
  output.addVideoTrack(source, { frameRate: clip.fps });
  await output.start();
  for (const [index, image] of clip.images.entries()) {
    context.drawImage(await createImageBitmap(image), 0, 0, canvas.width, canvas.height);
    await source.add(index / clip.fps, 1 / clip.fps);
  }
  await output.finalize();
  return new Blob([output.target.buffer], { type: "video/mp4" });
}
