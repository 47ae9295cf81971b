// A flow in the plane that is known exactly, and the method on it: tools/flow2d.py, teacher.py and
// reflow.py in JavaScript. tests/test_page.py holds the two sides together.
//
// Points are Float64Arrays [x0, y0, x1, y1, ...] of N points, times Float64Arrays of N numbers in (0, 1].
// A model is its velocity: (z, t) -> v, v_prediction, points like z.
//
// Everything is inside one function because a page opened from a file may start a worker only from text, and
// a function is its own text.
"use strict";

function makeFlow() {
  // ---- the noise schedule: Stable Diffusion's, alpha linear between timesteps ----------------------------
  const TIMESTEPS = 1000;
  const ALPHA = new Float64Array(TIMESTEPS + 1);
  ALPHA[0] = 1;
  const [low, high] = [Math.sqrt(0.00085), Math.sqrt(0.012)];
  for (let i = 0, kept = 1; i < TIMESTEPS; i++) {
    const beta = Math.fround(low + (high - low) * i / (TIMESTEPS - 1)) ** 2;
    kept *= Math.fround(1 - Math.fround(beta));                     // diffusers keeps its tables in float32
    ALPHA[i + 1] = Math.sqrt(Math.fround(kept));
  }

  /** [alpha, sigma] of z_t = alpha x + sigma eps, for t in [0, 1]. */
  function schedule(t) {
    const place = t * TIMESTEPS;
    const below = Math.min(Math.max(Math.floor(place), 0), TIMESTEPS - 1);
    const alpha = ALPHA[below] + (ALPHA[below + 1] - ALPHA[below]) * (place - below);
    return [alpha, Math.sqrt(Math.max(0, 1 - alpha * alpha))];
  }

  // ---- the teacher: noise to four blobs, in closed form --------------------------------------------------
  const BLOBS = [[1.5, 0], [0, 1.5], [-1.5, 0], [0, -1.5]];
  const SPREAD = 0.25;                                              // standard deviation of the data around each

  /** The optimal v-prediction. */
  function exact(z, t) {
    const v = new Float64Array(z.length), near = [0, 0, 0, 0];
    for (let n = 0; n < t.length; n++) {
      const [alpha, sigma] = schedule(t[n]);
      const variance = alpha * alpha * SPREAD * SPREAD + sigma * sigma;
      const px = z[2 * n], py = z[2 * n + 1];
      let highest = -Infinity;
      for (let k = 0; k < 4; k++) {
        near[k] = -((px - alpha * BLOBS[k][0]) ** 2 + (py - alpha * BLOBS[k][1]) ** 2) / (2 * variance);
        highest = Math.max(highest, near[k]);
      }
      let total = 0, cx = 0, cy = 0;                                // the mean of the blobs, by how likely each is
      for (let k = 0; k < 4; k++) {
        const weight = Math.exp(near[k] - highest);
        total += weight;
        cx += weight * BLOBS[k][0];
        cy += weight * BLOBS[k][1];
      }
      cx /= total;
      cy /= total;
      const gain = alpha * SPREAD * SPREAD / variance;
      v[2 * n] = (alpha * px - (cx + gain * (px - alpha * cx))) / sigma;
      v[2 * n + 1] = (alpha * py - (cy + gain * (py - alpha * cy))) / sigma;
    }
    return v;
  }

  /** What a velocity says of z at t: its pair {x, eps}, points like z. As alpha^2 + sigma^2 = 1, the 2x2
   *  system z = alpha x + sigma eps, v = alpha eps - sigma x is a rotation. */
  function pair(z, v, t) {
    const x = new Float64Array(z.length), eps = new Float64Array(z.length);
    for (let n = 0; n < t.length; n++) {
      const [alpha, sigma] = schedule(t[n]);
      for (let i = 2 * n; i < 2 * n + 2; i++) {
        x[i] = alpha * z[i] - sigma * v[i];
        eps[i] = sigma * z[i] + alpha * v[i];
      }
    }
    return {x, eps};
  }

  // ---- DDIM: keep the pair, change t ---------------------------------------------------------------------

  /** steps + 1 times from one to the other, even. */
  function timeGrid(steps, from = 1, to = 0) {
    return Array.from({length: steps + 1}, (_, i) => from + (to - from) * i / steps);
  }

  /** From z at times[0] to times.at(-1).  Returns: the points at every time, times.length of them. */
  function ddim(model, z, times) {
    const visited = [z];
    for (let i = 0; i + 1 < times.length; i++) {
      const t = new Float64Array(z.length / 2).fill(times[i]);
      const {x, eps} = pair(z, model(z, t), t);
      const [alpha, sigma] = schedule(times[i + 1]);
      z = x.map((value, j) => alpha * value + sigma * eps[j]);
      visited.push(z);
    }
    return visited;
  }

  /** Where chords are straight lines to the eye: z / (alpha + sigma) = (1 - tau) x + tau eps. */
  function seen(z, t) {
    const [alpha, sigma] = schedule(t);
    return z.map(value => value / (alpha + sigma));
  }

  // ---- windows and their chord ---------------------------------------------------------------------------

  /** The window (end, start] that holds t.  Returns: [start, end]. */
  function windowOf(t, windows) {
    const k = Math.min(Math.max(Math.ceil(t * windows - 1e-5), 1), windows);
    return [k / windows, (k - 1) / windows];
  }

  /** The one pair that explains both ends of a window: two equations in two unknowns. Numbers, per coordinate. */
  function chord(zStart, zEnd, start, end) {
    const [alphaS, sigmaS] = schedule(start), [alphaE, sigmaE] = schedule(end);
    const d = alphaS * sigmaE - alphaE * sigmaS;
    return {x: (sigmaE * zStart - sigmaS * zEnd) / d, eps: (alphaS * zEnd - alphaE * zStart) / d};
  }

  /** Where training asks: u uniform in [0, 1) -> t. */
  const TIME_LAWS = {
    uniform: u => 1 - u,
    starts: (u, windows) => {
      const t = 1 - (2 * u) % 1;
      return u < 0.5 ? windowOf(t, windows)[0] : t;                 // half of them where the sampler asks
    },
  };

  // ---- chance, seeded ------------------------------------------------------------------------------------

  /** Uniform numbers in [0, 1): mulberry32. */
  function uniforms(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6D2B79F5) >>> 0;
      let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /** N points of standard normal noise. */
  function noise(count, random) {
    const z = new Float64Array(2 * count);
    for (let i = 0; i < z.length; i += 2) {                         // Box and Muller
      const radius = Math.sqrt(-2 * Math.log(1 - random())), angle = 2 * Math.PI * random();
      z[i] = radius * Math.cos(angle);
      z[i + 1] = radius * Math.sin(angle);
    }
    return z;
  }

  /** The teacher's trajectories of 32 steps, at the boundaries of 8 windows: nine points each. */
  function trajectories(z) {
    return ddim(exact, z, timeGrid(32)).filter((_, i) => i % 4 === 0);
  }

  /** Mean distance of corresponding points. */
  function distance(a, b) {
    let sum = 0;
    for (let i = 0; i < a.length; i += 2) sum += Math.hypot(a[i] - b[i], a[i + 1] - b[i + 1]);
    return sum / (a.length / 2);
  }

  return {schedule, exact, pair, timeGrid, ddim, seen, windowOf, chord, TIME_LAWS, uniforms, noise, trajectories, distance,
          BLOBS, SPREAD};
}

if (typeof module !== "undefined") module.exports = {makeFlow};
