// Noise and sampling steps in plain numbers: what noise.py and exported.py compute, without a network.

// The Mersenne Twister, and Box and Muller's method for 16 numbers at a time: `torch.randn` with a seed, to rounding.
export function standardNormal(seed, size) {
  if (size < 16) throw new Error(`expected 16 numbers or more, got ${size}`);
  const rest = size % 16;
  const uniform = randomUniform(seed, size + (rest ? 16 : 0));
  const noise = new Float32Array(size);
  transform(uniform, 0, noise, 0, size - rest);
  if (rest) transform(uniform, size, noise, size - 16, 16); // the last 16 are drawn anew
  return noise;
}

function transform(uniform, from, noise, to, length) {
  for (let block = 0; block < length; block += 16)
    for (let index = block; index < block + 8; index++) {
      const radius = Math.sqrt(-2 * Math.log1p(-uniform[from + index]));
      const angle = 2 * Math.PI * uniform[from + index + 8];
      noise[to + index] = radius * Math.cos(angle);
      noise[to + index + 8] = radius * Math.sin(angle);
    }
}

function randomUniform(seed, num) {
  const state = new Uint32Array(624);
  state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
  for (let index = 1; index < 624; index++) {
    const before = state[index - 1] ^ (state[index - 1] >>> 30);
    state[index] = Math.imul(1812433253, before) + index;
  }
  const numbers = new Float32Array(num);
  for (let drawn = 0; drawn < num; drawn++) {
    const place = drawn % 624;
    if (!place)
      for (let index = 0; index < 624; index++) {
        const bits = (state[index] & 0x80000000) | (state[(index + 1) % 624] & 0x7fffffff);
        state[index] = state[(index + 397) % 624] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
      }
    let bits = state[place];
    bits ^= bits >>> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    bits ^= bits >>> 18;
    numbers[drawn] = (bits & 0xffffff) * 2 ** -24;
  }
  return numbers;
}

// The initial noise of a clip, F frames of `size` numbers: frames k apart correlate by shared + (1 - shared) correlation^k.
export function clipNoise(seed, frames, size, { shared = 0, correlation = 0, loop = false } = {}) {
  const alike = frames > 1 && (shared > 0 || correlation > 0);
  const drawn = standardNormal(seed, (frames + Number(alike)) * size);
  if (!alike) return drawn;
  const gain = Math.sqrt(1 - correlation ** 2);
  const noise = drawn.subarray(size);
  let scale = Math.sqrt(1 - shared);
  let before = null;
  if (loop) {
    before = new Float64Array(size);
    for (let back = 0; back < frames; back++)
      for (let index = 0; index < size; index++)
        before[index] += (noise[(frames - 1 - back) * size + index] * correlation ** back * gain) / (1 - correlation ** frames);
    scale *= Math.sqrt((1 - correlation ** frames) / (1 + correlation ** frames)); // going round adds to the variance
  }
  const result = new Float32Array(frames * size);
  for (let frame = 0; frame < frames; frame++) {
    const now = new Float64Array(size);
    for (let index = 0; index < size; index++) {
      const own = noise[frame * size + index];
      now[index] = before ? before[index] * correlation + own * gain : own;
      result[frame * size + index] = now[index] * scale + drawn[index] * Math.sqrt(shared);
    }
    before = now;
  }
  return result;
}

// Inputs `previous` and `next` of the U-Net: the frame before and after each; F is a frame of zeros.
export function neighbors(frames, edge) {
  const previous = new BigInt64Array(frames);
  const next = new BigInt64Array(frames);
  for (let frame = 0; frame < frames; frame++) {
    const place = (other) => {
      if (other >= 0 && other < frames) return other;
      if (edge === "wrap") return (other + frames) % frames;
      return edge === "hold" || frames === 1 ? frame : frames;
    };
    previous[frame] = BigInt(place(frame - 1));
    next[frame] = BigInt(place(frame + 1));
  }
  return { previous, next };
}

// A step of the sampler, see engines/steps.py: changes `sample`, and `before` to the clean latents.
export function advance(step, sample, output, before) {
  for (let index = 0; index < sample.length; index++) {
    const clean = step.clean_sample * sample[index] + step.clean_output * output[index];
    sample[index] = step.sample * sample[index] + step.clean * clean + step.clean_before * before[index];
    before[index] = clean;
  }
}

// Token numbers of `length`, shortened before the last token (which ends the text) or padded.
export function fitTokens(ids, length, pad) {
  const kept = ids.length > length ? [...ids.slice(0, length - 1), ids.at(-1)] : ids;
  const fill = (value, rest) => BigInt64Array.from({ length }, (_, index) => BigInt(index < kept.length ? value(index) : rest));
  return { input_ids: fill((index) => kept[index], pad), attention_mask: fill(() => 1, 0) };
}
