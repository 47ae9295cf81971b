// 4. Pictures of the embedded model, prepared by `python -m tools.page`: sprites.js says what is where in sprites.webp.
"use strict";

{
  const {tile, columns, rows, steps, models, prompts, model, credit} = SPRITES;
  const bySlider = [...steps].sort((a, b) => b - a);                // 32 ... 1
  const offset = Object.fromEntries(steps.map((count, i) => [count, steps.slice(0, i).reduce((sum, each) => sum + each, 0)]));

  /** One tile: what models[m] believes at step `at` of `count`; at = count is its picture. label: for who does not see it; none
   *  where the text beside it says the same. */
  function picture(item, m, count, at, label, size = 96) {
    const element = document.createElement("div");
    element.className = "tile";
    if (label) {
      element.setAttribute("role", "img");
      element.setAttribute("aria-label", label);
    }
    const column = offset[count] + at - 1, row = item * models.length + m;
    const drawn = size + 2;                                         // a pixel of each edge is cut: neighbors shine through there
    element.style.width = element.style.height = `${size}px`;
    element.style.backgroundPosition = `${-drawn * column - 1}px ${-drawn * row - 1}px`;
    element.style.backgroundSize = `${drawn * columns}px ${drawn * rows}px`;
    return element;
  }

  const stepsText = count => `${count} step${count > 1 ? "s" : ""}`;
  const taken = (windows, count) => Math.max(windows, count);       // a student cannot take fewer steps than it has windows

  /** A picture with two lines below it. */
  function figure(who, steps, content) {
    const element = document.createElement("figure"), text = document.createElement("figcaption");
    text.append(who, document.createElement("br"), steps);
    element.append(content, text);
    return element;
  }

  function drawPictures() {
    const count = bySlider[document.getElementById("steps").value], grid = document.getElementById("grid");
    document.getElementById("steps").setAttribute("aria-valuetext", stepsText(count));
    show("steps-is", stepsText(count));
    grid.replaceChildren(...prompts.map((item, i) => {
      const row = document.createElement("button");
      row.className = "row";
      row.type = "button";
      row.setAttribute("aria-pressed", i === chosen);
      const text = `${item.prompt}, seed ${item.seed}`;
      row.addEventListener("click", () => { chosen = i; drawPictures(); grid.children[i].focus(); });
      row.append(figure("teacher", stepsText(steps[0]), picture(i, 0, steps[0], steps[0])),
        figure("plain DDIM", stepsText(count), picture(i, 0, count, count)),
        ...models.slice(1).map(({name, windows}, m) =>
          figure(name, stepsText(taken(windows, count)), picture(i, m + 1, taken(windows, count), taken(windows, count)))));
      const name = document.createElement("span");
      name.textContent = text;
      row.prepend(name);
      return row;
    }));
    const beliefs = document.getElementById("beliefs");
    beliefs.replaceChildren(...models.flatMap(({name, windows}, m) => {
      const title = document.createElement("h4"), strip = document.createElement("div"), own = taken(windows, count);
      title.textContent = `${m ? name : "the teacher by plain DDIM"}, ${stepsText(own)}`;
      strip.className = "strip";
      for (let at = 1; at <= own; at++) strip.append(picture(chosen, m, own, at, `step ${at} of ${own}`, 64));
      return [title, strip];
    }));
    show("beliefs-of", `${prompts[chosen].prompt}, seed ${prompts[chosen].seed}`);
  }

  let chosen = 0;
  document.getElementById("grid").style.setProperty("--tiles", models.length + 1);
  const slider = document.getElementById("steps");
  slider.max = bySlider.length - 1;
  slider.value = slider.max;                                        // one step, where models differ most
  slider.addEventListener("input", drawPictures);
  for (const each of [96, 64]) if (each % tile) document.getElementById("section-pictures").classList.add("smooth");
  show("model-is", model);
  show("credit", credit);
  drawPictures();
}
