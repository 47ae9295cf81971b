// 1. The curve, and 2. the chord: one noise point of the exact flow, moved by hand.
"use strict";

const flow = makeFlow();
const show = (id, text) => { document.getElementById(id).textContent = text; };
const two = value => (Math.abs(value) < 0.005 ? 0 : value).toFixed(2).replace("-", "\u2212");
const point = (x, y) => `(${two(x)},\u00a0${two(y)})`;

const FINE = flow.timeGrid(64);
let noisePoint = Float64Array.of(-1.7, 1.4);                        // in the plane as it is seen, z / (alpha + sigma)

/** The latent at t = 1 for a point as it is seen. */
function latent(seen) {
  const [alpha, sigma] = flow.schedule(1);
  return seen.map(value => value * (alpha + sigma));
}

// ---- 1. the curve --------------------------------------------------------------------------------------------

function drawCurve() {
  const svg = document.getElementById("curve"), layer = clearPlane(svg, flow), z = latent(noisePoint);
  const around = flow.noise(60, flow.uniforms(3)), paths = flow.ddim(flow.exact, around, FINE);
  for (let n = 0; n < 60; n++) shape(layer, "path", {class: "line faint", d: polyline(seenPath(flow, paths, FINE, n))});
  const fine = flow.ddim(flow.exact, z, FINE), path = seenPath(flow, fine, FINE), end = fine.at(-1);
  trace(layer, "teacher", path);
  const missed = [];
  for (const steps of [4, 2, 1]) {
    const times = flow.timeGrid(steps), visited = flow.ddim(flow.exact, z, times), own = seenPath(flow, visited, times);
    trace(layer, `ddim steps-${steps}`, own);
    own.slice(1, -1).forEach(([x, y]) => shape(layer, "circle", {cx: toX(x), cy: toY(y), r: 2.5, class: `dot steps-${steps}`}));
    dot(layer, own.at(-1), `steps-${steps}`, `${steps} step${steps > 1 ? "s" : ""}`);
    missed.push([steps, flow.distance(visited.at(-1), end)]);
  }
  dot(layer, path.at(-1), "teacher", "64 steps");
  dot(layer, path[0], "noise", "noise");
  writeLabels(layer);
  for (const [steps, far] of missed) show(`missed-${steps}`, two(far));
  show("curve-says", `Noise at ${point(...noisePoint)} ends at ${point(...end)}. ` + missed.map(([steps, far]) =>
    `${steps} step${steps > 1 ? "s" : ""}: ${two(far)} away`).join("; ") + ".");
}

// ---- 2. the chord --------------------------------------------------------------------------------------------

/** The window's end must lie below its start: the slider that is not being moved gives way. */
function window64(movedIs) {
  const [start, end, inside] = ["window-start", "window-end", "window-inside"].map(id => document.getElementById(id));
  if (+start.value <= +end.value) {
    if (movedIs === "window-start") end.value = +start.value - 1;
    else start.value = +end.value + 1;
  }
  const t = +end.value + (+start.value - +end.value) * inside.value / 100;
  return [start.value / 64, end.value / 64, Math.max(t / 64, 1 / 1000)];
}

/** The list of formulas: [name, what it is, in words]. */
function formulas(lines) {
  document.getElementById("live").replaceChildren(...lines.map(([name, value, text]) => {
    const line = document.createElement("div"), [term, said, note] = ["dt", "dd", "small"].map(kind => document.createElement(kind));
    [term.textContent, said.textContent, note.textContent] = [name, `= ${value}`, text ?? ""];
    if (text) said.append(" ", note);
    line.append(term, said);
    return line;
  }));
}

function drawChord(movedIs) {
  const [start, end, t] = window64(movedIs);
  const svg = document.getElementById("chord"), layer = clearPlane(svg, flow);
  const fine = flow.ddim(flow.exact, latent(noisePoint), FINE), path = seenPath(flow, fine, FINE);
  const [from, to] = [64 - Math.round(start * 64), 64 - Math.round(end * 64)];
  const [zs, ze] = [fine[from], fine[to]];
  const [cx, cy] = [0, 1].map(i => flow.chord(zs[i], ze[i], start, end));
  const x = [cx.x, cy.x], eps = [cx.eps, cy.eps];
  const [alpha, sigma] = flow.schedule(t), z = Float64Array.from([0, 1], i => alpha * x[i] + sigma * eps[i]);
  const asked = Float64Array.of(t), says = flow.pair(z, flow.exact(z, asked), asked);

  shape(layer, "path", {class: "line faint", d: polyline([x, eps])});
  trace(layer, "teacher", path);
  trace(layer, "window", path.slice(from, to + 1));
  trace(layer, "chord", [path[from], path[to]]);
  dot(layer, x, "chord", "x*");
  dot(layer, eps, "chord", "eps*");
  dot(layer, path[from], "window", "start");
  dot(layer, path[to], "window", "end");
  const here = flow.seen(z, t);
  trace(layer, "asked", [[here[0], here[1]], [says.x[0], says.x[1]]]);
  dot(layer, [says.x[0], says.x[1]], "asked", "x_hat");
  dot(layer, [here[0], here[1]], "asked", "z");
  writeLabels(layer);

  const [[aS, sS], [aE, sE]] = [flow.schedule(start), flow.schedule(end)], d = aS * sE - aE * sS;
  const u = [eps[0] - x[0], eps[1] - x[1]], uHat = [0, 1].map(i => says.eps[i] - says.x[i]);
  const norm = Math.hypot(...u), normHat = Math.hypot(...uHat);
  const loss = ((uHat[0] - u[0]) ** 2 + (uHat[1] - u[1]) ** 2) / 2, magnitude = (normHat - norm) ** 2 / 2;
  for (const [id, value] of [["window-start", start], ["window-end", end], ["window-inside", t]]) {
    show(`${id}-is`, value.toFixed(3));
    document.getElementById(id).setAttribute("aria-valuetext", `t = ${value.toFixed(3)}`);
  }
  formulas([
    ["z_start", `${two(aS)} x* + ${two(sS)} eps* = ${point(...zs)}`],
    ["z_end", `${two(aE)} x* + ${two(sE)} eps* = ${point(...ze)}`],
    ["d", `${two(aS)} \u00b7 ${two(sE)} \u2212 ${two(aE)} \u00b7 ${two(sS)} = ${two(d)}`],
    ["x*", `(${two(sE)} z_start \u2212 ${two(sS)} z_end) / d = ${point(...x)}`],
    ["eps*", `(${two(aS)} z_end \u2212 ${two(aE)} z_start) / d = ${point(...eps)}`],
    ["z", `${two(alpha)} x* + ${two(sigma)} eps* = ${point(...z)}`, "on the chord, where the model is asked"],
    ["x_hat", point(...says.x), "the teacher's answer at z"],
    ["u_hat", `eps_hat \u2212 x_hat = ${point(...uHat)}`, "its direction, from x_hat to eps_hat"],
    ["u", `eps* \u2212 x* = ${point(...u)}`, "the chord's direction, which the student is trained to give"],
    ["loss", `${loss.toFixed(3)} = ${magnitude.toFixed(3)} magnitude + ${(loss - magnitude).toFixed(3)} direction`],
  ]);
  show("chord-says", `Window from t = ${start.toFixed(2)} to ${end.toFixed(2)}. Chord: x* = ${point(...x)}, eps* = ${point(...eps)}. ` +
    `At t = ${t.toFixed(2)} the teacher says x = ${point(...says.x)}.`);
}

// ---- by hand ---------------------------------------------------------------------------------------------------

function movePoint(x, y) {
  const inside = value => Math.min(Math.max(value, -2.1), 2.1);
  noisePoint = Float64Array.of(inside(x), inside(y));
  drawCurve();
  drawChord();
}

for (const id of ["curve", "chord"]) movable(document.getElementById(id), () => noisePoint, movePoint);
for (const id of ["window-start", "window-end", "window-inside"]) {
  document.getElementById(id).addEventListener("input", () => drawChord(id));
}
document.querySelectorAll("[data-window]").forEach(button => button.addEventListener("click", () => {
  const [start, end] = button.dataset.window.split(" ");
  document.getElementById("window-start").value = start;
  document.getElementById("window-end").value = end;
  drawChord();
}));
movePoint(...noisePoint);
