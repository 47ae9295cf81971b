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
 "models": [
  {
   "name": "teacher",
   "windows": 1
  },
  {
   "name": "student",
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
