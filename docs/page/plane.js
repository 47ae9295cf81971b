// Drawing: a plane with lines and points, curves over updates, and a point that is moved by pointer or arrow keys. SVG,
// so that colors come from style.css, dark and light.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** An element of SVG inside parent. */
function shape(parent, kind, attributes, text) {
  const element = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

const RANGE = 2.2;                                                  // the plane shows [-RANGE, RANGE] in both directions
const toX = x => 200 + x / RANGE * 200, toY = y => 200 - y / RANGE * 200;

/** [[x, y], ...] as the d of a path. */
const polyline = points => points.map(([x, y], i) => `${i ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`).join("");

/** Clears a plane and draws where the data are: four blobs, at one and two standard deviations. */
function clearPlane(svg, flow) {
  svg.querySelectorAll(".drawn").forEach(each => each.remove());
  const layer = shape(svg, "g", {class: "drawn"});
  svg.prepend(layer);
Object.assign(layer, {dots: [], texts: [], traced: []});           // what labels keep clear of
  for (const [x, y] of flow.BLOBS) {
    for (const times of [2, 1]) shape(layer, "circle", {cx: toX(x), cy: toY(y), r: times * flow.SPREAD / RANGE * 200, class: "blob"});
  }
  return layer;
}

/** A line through points, which labels keep clear of. */
function trace(layer, kind, points) {
  shape(layer, "path", {class: `line ${kind}`, d: polyline(points)});
  points.slice(1).forEach(([x, y], i) => {
    const [fromX, fromY] = [toX(points[i][0]), toY(points[i][1])], [byX, byY] = [toX(x) - fromX, toY(y) - fromY];
    const pieces = Math.ceil(Math.hypot(byX, byY) / 5);
    for (let k = 1; k <= pieces; k++) layer.traced.push([fromX + byX * k / pieces, fromY + byY * k / pieces]);
  });
}

/** A point; its text is written by writeLabels, once everything is drawn. */
function dot(layer, [x, y], kind, text) {
  shape(layer, "circle", {cx: toX(x), cy: toY(y), r: 5, class: `dot ${kind}`});
  layer.dots.push([toX(x), toY(y)]);
  if (text) layer.texts.push({x: toX(x), y: toY(y), kind, text});
}

/** Writes every text beside its point: of eight directions and three distances, where it crosses least: no other text, no
 *  point, as little of the lines as can be. */
function writeLabels(layer) {
  const around = [[1, -1], [1, 1], [-1, -1], [-1, 1], [1, 0], [-1, 0], [0, -1], [0, 1]], written = [];
  for (const {x, y, kind, text} of layer.texts) {
    const element = shape(layer, "text", {class: `label ${kind}`}, text), width = element.getComputedTextLength(), height = 14;
    let best = {cost: Infinity};
    [9, 22, 36].forEach((far, f) => around.forEach(([right, down], i) => {
      const gap = right && down ? far * 0.7 : far;
      const left = right > 0 ? x + gap : right < 0 ? x - gap - width : x - width / 2;
      const top = down > 0 ? y + gap : down < 0 ? y - gap - height : y - height / 2;
      if (left < 3 || top < 3 || left + width > 397 || top + height > 397) return;
      const holds = ([px, py], margin) => px > left - margin && px < left + width + margin && py > top - margin && py < top + height + margin;
      const cost = f * 3 + i / 10 + 0.5 * layer.traced.filter(each => holds(each, 1)).length
        + 20 * layer.dots.filter(each => holds(each, 5)).length
        + 40 * written.filter(each => left < each.left + each.width + 4 && each.left < left + width + 4 && Math.abs(top - each.top) < height).length;
      if (cost < best.cost) best = {cost, left, top, width};
    }));
    element.setAttribute("x", best.left);
    element.setAttribute("y", best.top + 11);
    written.push(best);
  }
}

/** Point n of every time of a trajectory, where chords look straight. visited, times: as flow.ddim takes and returns. */
function seenPath(flow, visited, times, n = 0) {
  return times.map((t, i) => {
    const z = flow.seen(visited[i].subarray(2 * n, 2 * n + 2), t);
    return [z[0], z[1]];
  });
}

/** Makes the plane a place where one point is moved. moved(x, y) is called with where it is wanted. */
function movable(svg, place, moved) {
  const at = event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    moved((point.x - 200) / 200 * RANGE, (200 - point.y) / 200 * RANGE);
  };
  svg.addEventListener("pointerdown", event => {
    svg.setPointerCapture(event.pointerId);
    svg.focus();
    at(event);
    event.preventDefault();
  });
  svg.addEventListener("pointermove", event => { if (svg.hasPointerCapture(event.pointerId)) at(event); });
  svg.addEventListener("keydown", event => {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]}[event.key];
    if (!step) return;
    const [x, y] = place(), size = event.shiftKey ? 0.5 : 0.1;
    moved(x + size * step[0], y + size * step[1]);
    event.preventDefault();
  });
}

/** Lines over updates, in a box 560 x 200. lines: [{points: [[update, value], ...], kind}]; marks: [{update, text}];
 *  log: the vertical axis is one of powers of ten. */
function drawCurves(svg, lines, marks, last) {
  svg.querySelectorAll(".drawn").forEach(each => each.remove());
  const layer = shape(svg, "g", {class: "drawn"});
  const values = lines.flatMap(line => line.points.map(point => point[1])).filter(value => value > 0);
  const low = Math.floor(Math.log10(Math.min(0.1, ...values))), high = Math.ceil(Math.log10(Math.max(1, ...values)));
  const across = update => 44 + update / Math.max(1, last) * 506, up = value =>
    178 - (Math.max(Math.log10(value), low) - low) / (high - low) * 162;
  for (let power = low; power <= high; power++) {
    shape(layer, "line", {x1: 44, x2: 550, y1: up(10 ** power), y2: up(10 ** power), class: "rule"});
    shape(layer, "text", {x: 38, y: up(10 ** power) + 4, class: "axis end"}, String(10 ** power));
  }
  marks.forEach(({update, text}) => {
    shape(layer, "line", {x1: across(update), x2: across(update), y1: 16, y2: 178, class: "rule strong"});
    shape(layer, "text", {x: across(update) + 4, y: 12, class: "axis"}, text);
  });
  shape(layer, "text", {x: 550, y: 195, class: "axis end"}, `${last} updates`);
  shape(layer, "text", {x: 44, y: 195, class: "axis"}, "0");
  for (const {points, kind} of lines) {
    shape(layer, "path", {class: `line ${kind}`, d: points.filter(point => point[1] > 0).map(([update, value], i) =>
      `${i ? "L" : "M"}${across(update).toFixed(1)} ${up(value).toFixed(1)}`).join("")});
  }
}
