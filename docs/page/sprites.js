// Written by `python -m tools.page`: what is where in sprites.webp.
const SPRITES = {
 "model": "tiny",
 "tile": 32,
 "columns": 63,
 "rows": 12,
 "steps": [
  32,
  16,
  8,
  4,
  2,
  1
 ],
 "credit": "All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Changes: selected, rasterized. The weights were trained on these pictures alone and can reproduce them closely; treat them, and pictures made with them, as adaptations under CC BY-SA 4.0: name OpenMoji, and share alike. The code that made them is Apache-2.0.",
 "models": [
  {
   "name": "teacher",
   "windows": 1
  },
  {
   "name": "2-window student",
   "windows": 2
  }
 ],
 "prompts": [
  {
   "prompt": "red heart on blue",
   "seed": 0
  },
  {
   "prompt": "strawberry on pink",
   "seed": 1
  },
  {
   "prompt": "pizza on gray",
   "seed": 2
  },
  {
   "prompt": "penguin on orange",
   "seed": 3
  },
  {
   "prompt": "fox on green",
   "seed": 4
  },
  {
   "prompt": "on purple",
   "seed": 5
  }
 ]
};
