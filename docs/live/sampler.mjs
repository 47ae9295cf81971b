// DDIM on a network that somebody else evaluates: teacher.py's contract and sampler.py's loop. about: a model.json.

/** What a network predicts -> [p, q] with output = p x + q eps. */
const PREDICTIONS = {
  epsilon: () => [0, 1],
  sample: () => [1, 0],
  v_prediction: (alpha, sigma) => [-sigma, alpha],
};

/** [alpha, sigma] of z_t = alpha x + sigma eps, for t in [0, 1]; alpha is linear between timesteps. */
export function schedule(about, t) {
  const place = t * (about.alpha.length - 1), below = Math.min(Math.floor(place), about.alpha.length - 2);
  const alpha = about.alpha[below] + (about.alpha[below + 1] - about.alpha[below]) * (place - below);
  return [alpha, Math.sqrt(Math.max(0, 1 - alpha * alpha))];
}

/**
 * From noise to a latent: at each step keep the pair (x, eps) that the network predicts, and change t.
 * network: async (z, timestep) -> output, Float32Arrays of one length; z: Float32Array; steps: a multiple of the model's
 * windows; onStep: called with the number of each step that is done.
 */
export async function ddim(network, about, z, steps, onStep = () => {}) {
  if (steps % about.windows) throw new RangeError(`${steps} steps: must be a multiple of ${about.windows} windows`);
  if (about.path !== "vp" && steps !== about.windows)               // in between it leaves the schedule's curve
    throw new RangeError(`${steps} steps: a student of path ${about.path} takes ${about.windows}`);
  for (let i = 0; i < steps; i++) {
    const t = 1 - i / steps, [alpha, sigma] = schedule(about, t), [a, b] = schedule(about, 1 - (i + 1) / steps);
    const output = await network(z, t * (about.alpha.length - 1) - 1);
    const [p, q] = PREDICTIONS[about.prediction](alpha, sigma), determinant = alpha * q - sigma * p;
    z = z.map((value, j) => {
      const x = (q * value - sigma * output[j]) / determinant, eps = (alpha * output[j] - p * value) / determinant;
      return a * x + b * eps;
    });
    onStep(i + 1);
  }
  return z;
}

/** Away from the answer without text: w = 1 evaluates only the text's, others both. Each: async (z, timestep) -> output. */
export function guided(network, unconditional, w) {
  if (w === 1) return network;
  return async (z, timestep) => {
    const without = await unconditional(z, timestep), output = await network(z, timestep);
    return output.map((value, i) => without[i] + w * (value - without[i]));
  };
}
