// The student of tools/flow2d.py: the exact teacher plus a network of 18,434 numbers that starts at zero, its
// gradient by hand, Adam, and one update of reflow. Sizes and names as there.
"use strict";

function makeStudents(flow) {
  const PERIODS = [1, 2, 4, 8, 16];                                 // a window is a sawtooth in t

  /** What the network is given for a point: its place, and its time as waves. Twelve numbers. */
  function features(z, t) {
    const given = new Float64Array(12 * t.length);
    for (let n = 0; n < t.length; n++) {
      given[12 * n] = z[2 * n];
      given[12 * n + 1] = z[2 * n + 1];
      PERIODS.forEach((period, k) => {
        const phase = (t[n] - 1 / 1000) * period * Math.PI;         // timestep / 1000
        given[12 * n + 2 + k] = Math.sin(phase);
        given[12 * n + 7 + k] = Math.cos(phase);
      });
    }
    return given;
  }

  /** A linear layer, weight (to, from) as torch keeps it; random as torch begins, or zero. */
  function layer(from, to, random) {
    const bound = 1 / Math.sqrt(from), draw = () => random ? (2 * random() - 1) * bound : 0;
    return {from, to, weight: Float64Array.from({length: to * from}, draw), bias: Float64Array.from({length: to}, draw)};
  }

  function newStudent(random) {
    return [layer(12, 128, random), layer(128, 128, random), layer(128, 2, null)];
  }

  /** The matrix product of a (rows, inner) and b (inner, columns), four rows of b at a time: as fast as plain
   *  JavaScript gets. */
  function product(a, b, rows, inner, columns) {
    const result = new Float64Array(rows * columns);
    for (let r = 0; r < rows; r++) {
      const to = r * columns;
      let k = 0;
      for (; k + 3 < inner; k += 4) {
        const a0 = a[r * inner + k], a1 = a[r * inner + k + 1], a2 = a[r * inner + k + 2], a3 = a[r * inner + k + 3];
        const b0 = k * columns, b1 = b0 + columns, b2 = b1 + columns, b3 = b2 + columns;
        for (let c = 0; c < columns; c++) {
          result[to + c] += a0 * b[b0 + c] + a1 * b[b1 + c] + a2 * b[b2 + c] + a3 * b[b3 + c];
        }
      }
      for (; k < inner; k++) {
        for (let c = 0; c < columns; c++) result[to + c] += a[r * inner + k] * b[k * columns + c];
      }
    }
    return result;
  }

  /** a (rows, columns) as (columns, rows). */
  function transposed(a, rows, columns) {
    const result = new Float64Array(a.length);
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++) result[c * rows + r] = a[r * columns + c];
    }
    return result;
  }

  function linear({from, to, weight, bias}, input) {
    return product(input, transposed(weight, to, from), input.length / from, from, to).map((value, i) => value + bias[i % to]);
  }

  /** Gradients of a linear layer that was given `input`. output: d loss / d output.  Returns: {weight, bias, input}. */
  function linearGradient({from, to, weight}, input, output) {
    const rows = input.length / from;
    return {weight: product(transposed(output, rows, to), input, to, rows, from),
            bias: product(new Float64Array(rows).fill(1), output, 1, rows, to),
            input: product(output, weight, rows, to, from)};
  }

  const sigmoid = value => 1 / (1 + Math.exp(-value));
  const silu = values => values.map(value => value * sigmoid(value));

  function siluGradient(values, output) {
    return output.map((g, i) => {
      const s = sigmoid(values[i]);
      return g * s * (1 + values[i] * (1 - s));
    });
  }

  /** The student's velocity, and what its gradient needs. */
  function forward(layers, z, t) {
    const given = features(z, t), first = linear(layers[0], given), a = silu(first);
    const second = linear(layers[1], a), b = silu(second), correction = linear(layers[2], b);
    return {given, first, a, second, b, v: flow.exact(z, t).map((value, i) => value + correction[i])};
  }

  /** The student as a model of flow.js. */
  const asModel = layers => (z, t) => forward(layers, z, t).v;

  /** reflow.student_loss on the schedule's path, in the space of u = eps - x, and its gradient.
   *  batch: {start, end (points), t, tStart, tEnd}.  Returns: {loss, magnitude, direction (means), gradients}. */
  function lossAndGradients(layers, {start, end, t, tStart, tEnd}, directionWeight) {
    const count = t.length, z = new Float64Array(2 * count), target = new Float64Array(2 * count);
    for (let n = 0; n < count; n++) {
      const [alpha, sigma] = flow.schedule(t[n]);
      for (let i = 2 * n; i < 2 * n + 2; i++) {
        const {x, eps} = flow.chord(start[i], end[i], tStart[n], tEnd[n]);
        z[i] = alpha * x + sigma * eps;
        target[i] = eps - x;
      }
    }
    const seen = forward(layers, z, t), answer = flow.pair(z, seen.v, t), dv = new Float64Array(2 * count);
    let loss = 0, magnitude = 0, direction = 0;
    for (let n = 0; n < count; n++) {
      const [alpha, sigma] = flow.schedule(t[n]), i = 2 * n, j = i + 1;
      const p = [answer.eps[i] - answer.x[i], answer.eps[j] - answer.x[j]], q = [target[i], target[j]];
      const pNorm = Math.max(Math.hypot(...p), 1e-8), qNorm = Math.max(Math.hypot(...q), 1e-8);
      const cosine = (p[0] * q[0] + p[1] * q[1]) / (pNorm * qNorm);
      loss += ((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2) / 2 + directionWeight * (1 - cosine);
      magnitude += (pNorm - qNorm) ** 2 / 2;
      direction += pNorm * qNorm * (1 - cosine);
      for (let k = 0; k < 2; k++) {                                 // d(1 - cos)/dp is orthogonal to p; du/dv = alpha + sigma
        const turn = (cosine * p[k] / pNorm - q[k] / qNorm) / pNorm;
        dv[i + k] = (alpha + sigma) * (p[k] - q[k] + directionWeight * turn) / count;
      }
    }
    const third = linearGradient(layers[2], seen.b, dv);
    const second = linearGradient(layers[1], seen.a, siluGradient(seen.second, third.input));
    const first = linearGradient(layers[0], seen.given, siluGradient(seen.first, second.input));
    return {loss: loss / count, magnitude: magnitude / count, direction: direction / count, gradients: [first, second, third]};
  }

  /** torch.optim.Adam with a rate that falls as a cosine to 0 over `updates`. */
  function adam(layers, updates, rate = 2e-3) {
    const kinds = ["weight", "bias"];
    const moments = layers.map(each => Object.fromEntries(kinds.map(kind =>
      [kind, {mean: new Float64Array(each[kind].length), square: new Float64Array(each[kind].length)}])));
    let done = 0;
    return gradients => {
      const now = rate * (1 + Math.cos(Math.PI * done / updates)) / 2;
      done += 1;
      const meanScale = 1 - 0.9 ** done, squareScale = 1 - 0.999 ** done;
      layers.forEach((each, l) => kinds.forEach(kind => {
        const values = each[kind], g = gradients[l][kind], {mean, square} = moments[l][kind];
        for (let i = 0; i < values.length; i++) {
          mean[i] = 0.9 * mean[i] + 0.1 * g[i];
          square[i] = 0.999 * square[i] + 0.001 * g[i] * g[i];
          values[i] -= now * (mean[i] / meanScale) / (Math.sqrt(square[i] / squareScale) + 1e-8);
        }
      }));
    };
  }

  /** The two ends of the windows that hold t, out of cached trajectories (nine points: row k is at t = 1 - k/8). */
  function batchOf(paths, rows, t, windows) {
    const count = rows.length, tStart = new Float64Array(count), tEnd = new Float64Array(count);
    const start = new Float64Array(2 * count), end = new Float64Array(2 * count);
    for (let n = 0; n < count; n++) {
      [tStart[n], tEnd[n]] = flow.windowOf(t[n], windows);
      for (let i = 0; i < 2; i++) {
        start[2 * n + i] = paths[Math.round((1 - tStart[n]) * 8)][2 * rows[n] + i];
        end[2 * n + i] = paths[Math.round((1 - tEnd[n]) * 8)][2 * rows[n] + i];
      }
    }
    return {start, end, t, tStart, tEnd};
  }

  /** A stage: its own optimizer; each call is one update.  Returns: () -> {loss, magnitude, direction}. */
  function stage(layers, paths, windows, {updates, batch, timeLaw, directionWeight}, random) {
    const step = adam(layers, updates), count = paths[0].length / 2;
    return () => {
      const rows = Array.from({length: batch}, () => Math.floor(random() * count));
      const t = Float64Array.from({length: batch}, () => flow.TIME_LAWS[timeLaw](random(), windows));
      const {gradients, ...values} = lossAndGradients(layers, batchOf(paths, rows, t, windows), directionWeight);
      step(gradients);
      return values;
    };
  }

  return {newStudent, asModel, lossAndGradients, adam, batchOf, stage};
}

if (typeof module !== "undefined") module.exports = {makeStudents};
