// The noise of a seed, number for number as torch draws it on a CPU: what sampler.py --seed starts from.

/** The Mersenne twister of a seed.  Returns: a function that gives 32 random bits at a time. */
function mersenne(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let at = 624;
  return () => {
    if (at === 624) {
      for (let i = 0; i < 624; i++) {
        const mixed = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (mixed >>> 1) ^ (mixed & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    let bits = state[at++];
    bits ^= bits >>> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    return (bits ^ (bits >>> 18)) >>> 0;
  };
}

/**
 * Standard normal numbers: torch.randn(count, generator=torch.Generator().manual_seed(seed)), up to rounding.
 * count: a multiple of 16, as torch draws other counts in another order.
 */
export function randn(seed, count) {
  if (count % 16) throw new RangeError(`${count} numbers of noise: must be a multiple of 16`);
  const bits = mersenne(seed), z = new Float32Array(count);
  for (let i = 0; i < count; i++) z[i] = (bits() & 0xffffff) / 2 ** 24;
  for (let start = 0; start < count; start += 16) {
    for (let i = start; i < start + 8; i++) {                       // Box and Muller, eight pairs at a time
      const radius = Math.sqrt(-2 * Math.log(1 - z[i])), angle = 2 * Math.PI * z[i + 8];
      z[i] = radius * Math.cos(angle);
      z[i + 8] = radius * Math.sin(angle);
    }
  }
  return z;
}
