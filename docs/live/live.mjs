// The page on which prompts are typed: reads what is asked, has worker.mjs draw it, and shows it row by row.

const PICTURES = 4, TEACHER_STEPS = 32;
const element = id => document.getElementById(id);
const say = text => { element("says").textContent = text; };

// ---- the worker: one request at a time ---------------------------------------------------------------------------------

const worker = new Worker(new URL("worker.mjs", import.meta.url), {type: "module"});
const waiting = new Map();
let requests = 0;

/** A promise of the worker's answer; onStep(step) is called after each step of it. */
function request(wanted, onStep) {
  return new Promise((resolve, reject) => {
    waiting.set(++requests, {resolve, reject, onStep});
    worker.postMessage({...wanted, id: requests});
  });
}

worker.addEventListener("message", ({data}) => {
  const {resolve, reject, onStep} = waiting.get(data.id);
  if (data.step) return onStep(data.step);
  waiting.delete(data.id);
  data.error ? reject(new Error(data.error)) : resolve(data);
});
worker.addEventListener("error", event => {
  event.preventDefault();
  for (const {reject} of waiting.values()) reject(new Error(event.message || "the runtime is missing"));
});

// ---- rows --------------------------------------------------------------------------------------------------------------

const stepsText = count => `${count} step${count > 1 ? "s" : ""}`;

/** One row of pictures. folder: of the model; steps: asked -> its steps.  Returns: {wanted, begin, show}. */
function makeRow(folder, title, steps) {
  const section = document.createElement("section"), head = document.createElement("h2"), time = document.createElement("span");
  const name = document.createElement("span"), pictures = document.createElement("div");
  section.style.cssText = "border: 0; margin: 0; padding: 0";
  time.className = "time";
  pictures.className = "pictures";
  const canvases = Array.from({length: PICTURES}, () => Object.assign(document.createElement("canvas"), {width: 1, height: 1}));
  for (const canvas of canvases) canvas.setAttribute("role", "img");
  head.append(name, time);
  pictures.append(...canvases);
  section.append(head, pictures);
  element("rows").append(section);
  let shown = "";
  return {
    /** What to ask the worker for, or null where it is shown already. */
    wanted(asked) {
      const wanted = {folder, prompt: asked.prompt, seeds: canvases.map((_, i) => asked.seed + i), steps: steps(asked),
        guidance: asked.guidance};
      name.textContent = `${title}, ${stepsText(wanted.steps)}`;
      if (JSON.stringify(wanted) === shown) return null;
      section.classList.add("stale");
      return wanted;
    },
    show(wanted, {pictures, side, seconds, evaluations}) {
      pictures.forEach((pixels, i) => {
        const height = pixels.length / 4 / side;
        Object.assign(canvases[i], {width: side, height});
        canvases[i].getContext("2d").putImageData(new ImageData(pixels, side, height), 0, 0);
        canvases[i].setAttribute("aria-label", `${wanted.prompt}, seed ${wanted.seeds[i]}: ${name.textContent}`);
      });
      time.textContent = `${seconds.toFixed(2)} s, ${evaluations} evaluations each`;
      section.classList.remove("stale");
      shown = JSON.stringify(wanted);
    },
  };
}

// ---- what is asked -----------------------------------------------------------------------------------------------------

/** The form's values, or null while one of them is none. */
function asked() {
  const value = name => element(name).valueAsNumber;
  if (!element("asked").checkValidity()) return null;
  return {prompt: element("prompt").value.trim(), steps: value("steps"), guidance: value("guidance"), seed: value("seed")};
}

function label() {
  element("steps-is").textContent = element("steps").value;
  element("guidance-is").textContent = element("guidance").value;
}

let running = false, again = false;

/** Draw what is not shown yet; what is asked meanwhile is drawn next. */
async function draw(rows, words) {
  label();
  again = true;
  if (running) return;
  running = true;
  document.body.dataset.state = "drawing";
  while (again) {
    again = false;
    const now = asked();
    if (!now) { say("The seed must be a whole number from 0."); break; }
    const jobs = rows.map(row => [row, row.wanted(now)]).filter(([, wanted]) => wanted);
    const unknown = now.prompt.toLowerCase().split(/\s+/).filter(word => word && !words.has(word));
    let cut = 0;
    for (const [row, wanted] of jobs.sort((a, b) => a[1].steps - b[1].steps)) {
      const found = await request(wanted, step => say(`Drawing: step ${step} of ${wanted.steps}.`));
      row.show(wanted, found);
      cut = found.cut;
      if (again) break;
    }
    if (jobs.length) say([unknown.length ? `This model has never seen: ${unknown.join(", ")}.` : "", cut ? `The last ${cut} tokens do not fit and are not seen.` : ""]
      .join(" ").trim() || "Drawn.");
  }
  running = false;
  document.body.dataset.state = "drawn";
}

async function start() {
  const words = new Set(await (await fetch(new URL("models/student/vocabulary.json", import.meta.url))).json());
  say("Loading the models.");
  const {about} = await request({open: "student"});
  await request({open: "teacher"});
  element("words").textContent = [...words].join(" ");
  element("knows").hidden = false;
  Object.assign(element("steps"), {min: about.windows, step: about.windows, value: about.windows});
  const student = `student of ${about.windows} window${about.windows > 1 ? "s" : ""}`;
  const rows = [makeRow("teacher", "teacher", () => TEACHER_STEPS), makeRow("teacher", "teacher by plain DDIM", each => each.steps),
    makeRow("student", student, each => each.steps)];
  const failed = error => { running = false; say(`It failed: ${error.message}`); document.body.dataset.state = "failed"; };
  const go = () => draw(rows, words).catch(failed);
  element("asked").addEventListener("submit", event => { event.preventDefault(); go(); });
  for (const name of ["steps", "guidance", "seed", "prompt"]) element(name).addEventListener("change", go);
  for (const name of ["steps", "guidance"]) element(name).addEventListener("input", label);
  go();
}

const how = element("says").textContent;
label();
start().catch(error => { say(`${how} (${error.message})`); document.body.dataset.state = "failed"; });
