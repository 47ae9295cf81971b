// Written by `python -m tools.page`: what is where in sprites.webp.
const SPRITES = {
 "model": "tiny",
 "tile": 64,
 "columns": 63,
 "rows": 24,
 "steps": [
  32,
  16,
  8,
  4,
  2,
  1
 ],
 "credit": "Fluent emoji, copyright Microsoft Corporation, MIT License (https://github.com/microsoft/fluentui-emoji), from the npm package @lobehub/fluent-emoji-3d, MIT License. Changes: selected, cropped, resized, composited. The weights were learned from these pictures alone; they are ours to give under Apache-2.0, with this notice of the pictures' license.",
 "models": [
  {
   "name": "teacher",
   "windows": 1
  },
  {
   "name": "4-window student",
   "windows": 4
  },
  {
   "name": "2-window student",
   "windows": 2
  },
  {
   "name": "1-window student",
   "windows": 1
  }
 ],
 "prompts": [
  {
   "prompt": "fox on green",
   "seed": 0
  },
  {
   "prompt": "penguin on orange",
   "seed": 1
  },
  {
   "prompt": "unicorn on pink",
   "seed": 2
  },
  {
   "prompt": "panda left of pizza on blue",
   "seed": 3
  },
  {
   "prompt": "sun above sunflower on purple",
   "seed": 4
  },
  {
   "prompt": "heart",
   "seed": 5
  }
 ]
};
