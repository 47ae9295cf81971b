// 3. Train it: a student learns in a worker, and its paths are drawn as it learns.
"use strict";

/** Runs in the worker, with flow and students made there. Messages: {stages: [windows, ...], updates (of each), batch,
 *  timeLaw, directionWeight, seed}. Answers: what look() returns, at the start of each
 *  stage and then every 0.4 seconds, with the mean loss since and its two parts; at last {finished: true}. */
function trainInWorker(flow, students) {
  const SHOWN = 48, FINE = flow.timeGrid(32);
  onmessage = ({data: asked}) => {
    const random = flow.uniforms(asked.seed);
    const paths = flow.trajectories(flow.noise(8192, random)), test = flow.trajectories(flow.noise(512, random));
    const plain = Object.fromEntries([8, 4, 2, 1].map(windows =>
      [windows, flow.distance(flow.ddim(flow.exact, test[0], flow.timeGrid(windows)).at(-1), test[8])]));
    const layers = students.newStudent(random), model = students.asModel(layers);
    /** What the page draws: some of the student's paths, 32 steps of them, where its own few steps land, and where the
     *  teacher's 32 do. */
    const look = (windows, done) => {
      const ends = flow.ddim(model, test[0], flow.timeGrid(windows)).at(-1);
      const paths = flow.ddim(model, test[0].slice(0, 2 * SHOWN), FINE);
      return {windows, done, distance: flow.distance(ends, test[8]), plain: plain[windows], paths,
              ends: ends.slice(0, 2 * SHOWN), targets: test[8].slice(0, 2 * SHOWN)};
    };
    let done = 0, last = Date.now(), since = 0, sums = [0, 0, 0];
    for (const windows of asked.stages) {
      postMessage({...look(windows, done), parts: null});
      const update = students.stage(layers, paths, windows, asked, random);
      for (let i = 1; i <= asked.updates; i++) {
        const {loss, magnitude, direction} = update();
        [loss, magnitude, direction].forEach((value, k) => { sums[k] += value; });
        done += 1;
        since += 1;
        const ended = i === asked.updates;
        if (ended || Date.now() - last > 400) {
          postMessage({...look(windows, done), parts: sums.map(value => value / since), ended});
          [last, since, sums] = [Date.now(), 0, [0, 0, 0]];
        }
      }
    }
    postMessage({finished: true});
  };
}

// A page that is opened from a file may not load a worker from a file: the worker gets the functions' own text.
const workerText = `"use strict";
  ${makeFlow}
  ${makeStudents}
  ${trainInWorker}
  const flow = makeFlow();
  trainInWorker(flow, makeStudents(flow));`;

const LOG_BUDGET = "800 512";                                       // of the table's numbers

const run = {worker: null, asked: null, losses: [], distances: [], plain: [], marks: []};

function asked() {
  const value = id => document.getElementById(id).value;
  const [updates, batch] = value("budget").split(" ").map(Number);
  return {stages: value("stages").split(" ").map(Number), updates, batch, timeLaw: value("time-law"),
          directionWeight: +value("direction-weight"), seed: 0};
}

function stop(text) {
  run.worker?.terminate();
  run.worker = null;
  document.getElementById("train").textContent = "Train";
  show("train-says", text);
}

/** paths: in 32 steps, as flow.ddim returns them; ends: where the few steps land, targets: where they should, in pairs of
 *  numbers. */
function drawPaths(paths, ends, targets) {
  const svg = document.getElementById("student"), layer = clearPlane(svg, flow), times = flow.timeGrid(32);
  for (let n = 0; n < paths[0].length / 2; n++) {
    const path = seenPath(flow, paths, times, n);
    shape(layer, "path", {class: "line student", d: polyline(path)});
    shape(layer, "path", {class: "line miss", d: polyline([ends, targets].map(each => [each[2 * n], each[2 * n + 1]]))});
    shape(layer, "circle", {cx: toX(path[0][0]), cy: toY(path[0][1]), r: 2, class: "dot noise"});
    shape(layer, "circle", {cx: toX(ends[2 * n]), cy: toY(ends[2 * n + 1]), r: 3, class: "dot data"});
  }
}

const plural = windows => `${windows} window${windows > 1 ? "s" : ""}`;

function hear({data}) {
  if (data.finished) {
    const {windows, distance, plain} = run.last;
    stop(`Done: ${plural(windows)}, ${windows} step${windows > 1 ? "s" : ""}: ${distance.toFixed(3)} from the teacher; ` +
         `the teacher itself ${plain.toFixed(3)}.`);
    document.getElementById("training").dataset.state = "finished";
    return;
  }
  run.last = data;
  drawPaths(data.paths, data.ends, data.targets);
  if (!run.marks.length || run.marks.at(-1).windows !== data.windows) {
    run.marks.push({update: data.done, windows: data.windows, text: plural(data.windows)});
  }
  run.plain.push([data.done, data.plain]);
  run.distances.push([data.done, data.distance]);
  if (data.parts) run.losses.push([data.done, data.parts[0]]);
  const total = run.asked.updates * run.asked.stages.length;
  drawCurves(document.getElementById("curves"), [
    {points: run.losses, kind: "loss"}, {points: run.plain, kind: "plain"}, {points: run.distances, kind: "distance"}], run.marks, total);
  show("distance-is", data.distance.toFixed(3));
  show("plain-is", data.plain.toFixed(3));
  if (data.parts) {
    show("loss-is", data.parts[0].toFixed(4));
    show("magnitude-is", data.parts[1].toFixed(4));
    show("angle-is", data.parts[2].toFixed(4));
  }
  show("student-title", `Student, ${plural(data.windows)}, after ${data.done} of ${total} updates: its paths in 32 steps, where its ` +
    `${data.windows > 1 ? `${data.windows} steps land` : "one step lands"} (dots), and how far that is from the teacher's end`);
  if (data.ended) {
    const cell = document.getElementById(`here-${run.asked.timeLaw}-${data.windows}`);
    const likeLog = run.asked.stages[0] === 8 && run.asked.directionWeight === 0 && `${run.asked.updates} ${run.asked.batch}` === LOG_BUDGET;
    if (cell && likeLog) cell.textContent = data.distance.toFixed(3);
    show("train-says", `${plural(data.windows)}: ${data.distance.toFixed(3)} from the teacher in ${data.windows} ` +
      `step${data.windows > 1 ? "s" : ""}; the teacher itself ${data.plain.toFixed(3)}.`);
  }
}

function train() {
  stop("Solving 8,192 trajectories of the teacher, then training.");
  Object.assign(run, {asked: asked(), losses: [], distances: [], plain: [], marks: []});
  run.worker = new Worker(URL.createObjectURL(new Blob([workerText], {type: "text/javascript"})));
  run.worker.onmessage = hear;
  run.worker.onerror = event => stop(`The worker stopped: ${event.message}`);
  run.worker.postMessage(run.asked);
  document.getElementById("training").dataset.state = "training";
  document.getElementById("train").textContent = "Stop";
}

document.getElementById("train").addEventListener("click", () => {
  if (run.worker) stop("Stopped.");
  else train();
});
document.querySelectorAll("[data-law]").forEach(button => button.addEventListener("click", () => {
  document.getElementById("stages").value = "8 4 2 1";
  document.getElementById("time-law").value = button.dataset.law;
  document.getElementById("direction-weight").value = "0";
  document.getElementById("budget").value = LOG_BUDGET;
  show("weight-is", "0");
  train();
}));
show("weight-is", "0");
document.getElementById("direction-weight").addEventListener("input", event => show("weight-is", event.target.value));

// before any training: the student is the teacher
{
  const z = flow.noise(48, flow.uniforms(1));
  const paths = flow.ddim(flow.exact, z, flow.timeGrid(32));
  drawPaths(paths, paths[32], paths[32]);
  drawCurves(document.getElementById("curves"), [], [], 0);
  shape(document.querySelector("#curves .drawn"), "text", {x: 300, y: 100, class: "axis middle"}, "drawn while it trains");
}
