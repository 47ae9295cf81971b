"""The embedded pictures: scenes of one or two 3-D objects on a background of one or two colors,
with captions of several levels.

A scene is one object, or two in a relation (left of, right of, above, below), each with its own
position, size, small rotation, flip and soft shadow. Its caption is drawn among "fox left of pizza
on blue", "fox on blue and pink", "animal above food", "food", "on green", "" and others (LEVELS):
the vaguer the caption, the more modes the picture has, and the more the sampling trajectory bends.

All random choices of a scene are numbers in one row of a plan, so that scene i is the same in any
batch:

    plans = plan(64, torch.Generator().manual_seed(0))
    images, captions = render(plans), describe(plans)[0]

assets/scenes/sprites.webp is all that drawing needs. python -m data.scenes FOLDER builds it anew
from the WebP files of the npm package @lobehub/fluent-emoji-3d (Microsoft's Fluent emoji, MIT);
the names of characters come from the package `emoji`.
"""
import functools
import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SHEET = Path(__file__).parent.parent / "assets" / "scenes" / "sprites.webp"

SIZE = 64          # pixels, side of a scene

CELL = 96          # pixels, side of a sprite in the sheet

COLUMNS = 20       # sprites per row of the sheet

# group -> names of the Unicode characters, in the order of the sheet
OBJECTS = {
    "animal": "dog face, cat face, mouse face, hamster, rabbit face, fox, bear, panda, koala, polar bear, "
              "tiger face, lion, cow face, pig face, frog, monkey face, horse face, unicorn, wolf, raccoon, "
              "rooster, penguin, baby chick, duck, owl, eagle, bird, parrot, flamingo, peacock, swan, "
              "honeybee, butterfly, snail, lady beetle, ant, spider, scorpion, bug, turtle, snake, "
              "crocodile, octopus, lobster, crab, tropical fish, dolphin, whale, shark, seal, elephant, "
              "mammoth, rhinoceros, hippopotamus, giraffe, zebra, camel, llama, gorilla, sloth, otter, "
              "hedgehog, deer, ram, dragon face, sauropod, T-Rex, jellyfish",
    "food": "red apple, green apple, pear, tangerine, lemon, banana, watermelon, grapes, strawberry, "
            "blueberries, cherries, peach, pineapple, coconut, kiwi fruit, tomato, eggplant, avocado, "
            "broccoli, cucumber, bell pepper, hot pepper, ear of corn, carrot, onion, croissant, bagel, "
            "bread, baguette bread, pretzel, cheese wedge, egg, cooking, pancakes, waffle, cut of meat, "
            "poultry leg, hot dog, hamburger, french fries, pizza, sandwich, taco, green salad, steaming "
            "bowl, sushi, rice ball, pie, cupcake, shortcake, birthday cake, lollipop, candy, chocolate bar, "
            "popcorn, doughnut, cookie, honey pot, soft ice cream, hot beverage, teapot, wine glass, "
            "cocktail glass, beer mug, cup with straw, bubble tea, mushroom",
    "plant": "cactus, evergreen tree, deciduous tree, palm tree, seedling, four leaf clover, tulip, cherry "
             "blossom, rose, hibiscus, sunflower, bouquet, maple leaf, potted plant, lotus, Christmas tree",
    "sky": "sun, full moon, crescent moon, star, cloud, cloud with rain, cloud with lightning, rainbow, high "
           "voltage, snowflake, fire, droplet, comet, ringed planet, globe showing Americas, water wave, "
           "snowman without snow, volcano",
    "vehicle": "automobile, taxi, bus, racing car, police car, ambulance, fire engine, delivery truck, "
               "tractor, motor scooter, motorcycle, bicycle, locomotive, bullet train, tram, helicopter, "
               "airplane, rocket, flying saucer, sailboat, speedboat, ship, skateboard, roller skate, "
               "parachute",
    "building": "house, castle, church, factory, hospital, school, tent, Japanese castle, fountain, hut, "
                "circus tent, red paper lantern, moai, Statue of Liberty, Tokyo tower, ferris wheel",
    "clothes": "crown, top hat, woman’s hat, glasses, sunglasses, necktie, t-shirt, jeans, dress, coat, "
               "socks, scarf, gloves, running shoe, high-heeled shoe, backpack, handbag, ring, billed cap, "
               "graduation cap",
    "music": "guitar, violin, trumpet, saxophone, drum, accordion, musical keyboard, microphone, headphone",
    "tool": "hammer, axe, scissors, pencil, paintbrush, artist palette, magnet, compass, umbrella, key, "
            "locked, bell, light bulb, flashlight, candle, microscope, broom, bucket, basket, toothbrush, "
            "ladder, anchor",
    "thing": "soccer ball, basketball, american football, baseball, tennis, pool 8 ball, boxing glove, "
             "trophy, bullseye, kite, game die, puzzle piece, teddy bear, balloon, wrapped gift, gem stone, "
             "camera, television, laptop, mobile phone, telephone, joystick, hourglass done, alarm clock, "
             "watch, closed book, envelope, package, money bag, chair, bathtub, brick, bone, tooth, brain",
    "face": "grinning face, face with tears of joy, winking face, smiling face with heart-eyes, star-struck, "
            "sleeping face, hot face, cold face, cowboy hat face, partying face, smiling face with "
            "sunglasses, nerd face, loudly crying face, enraged face, clown face, ghost, alien, robot, "
            "skull, jack-o-lantern, ogre",
    "heart": "red heart, orange heart, yellow heart, green heart, blue heart, purple heart, black heart, "
             "white heart, pink heart, broken heart",
}

# Unicode's names where the everyday word is shorter
RENAMED = {
    "baby chick": "chick", "honeybee": "bee", "lady beetle": "ladybug", "bug": "caterpillar",
    "tropical fish": "fish",
    "rhinoceros": "rhino", "hippopotamus": "hippo", "sauropod": "dinosaur", "T-Rex": "tyrannosaurus",
    "kiwi fruit": "kiwi",
    "ear of corn": "corn", "baguette bread": "baguette", "cheese wedge": "cheese", "cooking": "fried egg",
    "cut of meat": "steak",
    "poultry leg": "drumstick", "green salad": "salad", "steaming bowl": "noodles", "shortcake": "cake",
    "chocolate bar": "chocolate",
    "honey pot": "honey", "soft ice cream": "ice cream", "hot beverage": "coffee", "wine glass": "wine",
    "cocktail glass": "cocktail",
    "beer mug": "beer", "cup with straw": "soda", "evergreen tree": "pine tree", "deciduous tree": "tree",
    "four leaf clover": "clover", "cherry blossom": "blossom", "full moon": "moon",
    "cloud with rain": "rain cloud",
    "cloud with lightning": "storm cloud", "high voltage": "lightning", "ringed planet": "planet",
    "globe showing Americas": "earth",
    "water wave": "wave", "snowman without snow": "snowman", "automobile": "car", "fire engine": "fire truck",
    "delivery truck": "truck", "motor scooter": "scooter", "locomotive": "steam train",
    "flying saucer": "ufo",
    "Japanese castle": "pagoda", "red paper lantern": "lantern", "Statue of Liberty": "statue",
    "Tokyo tower": "tower",
    "woman’s hat": "sun hat", "t-shirt": "shirt", "running shoe": "sneaker", "high-heeled shoe": "high heel",
    "billed cap": "cap",
    "musical keyboard": "piano", "headphone": "headphones", "artist palette": "palette", "locked": "padlock",
    "american football": "football", "tennis": "tennis racket", "pool 8 ball": "billiard ball",
    "bullseye": "target",
    "game die": "dice", "wrapped gift": "gift", "gem stone": "diamond", "mobile phone": "phone",
    "hourglass done": "hourglass",
    "closed book": "book", "package": "box", "brick": "bricks", "grinning face": "happy face",
    "face with tears of joy": "laughing face",
    "smiling face with heart-eyes": "loving face", "star-struck": "amazed face",
    "smiling face with sunglasses": "cool face",
    "cowboy hat face": "cowboy", "partying face": "party face", "loudly crying face": "crying face",
    "enraged face": "angry face", "clown face": "clown", "jack-o-lantern": "pumpkin",
}

COLORS = {         # name -> RGB
    "pink": (255, 158, 184), "orange": (255, 184, 108), "yellow": (255, 226, 112), "green": (150, 214, 148),
    "blue": (122, 184, 245), "purple": (188, 158, 240), "white": (246, 247, 250), "black": (52, 58, 74),
}

# of the first object: (x, y), y downward
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

# caption level -> probability, for scenes of one and of two objects; "" is the tenth without a caption that
# guidance needs
LEVELS = (
    {"{a} on {background}": 0.40, "{a}": 0.20, "{group_a} on {background}": 0.10, "{group_a}": 0.10,
     "on {background}": 0.10, "": 0.10},
    {"{a} {relation} {b} on {background}": 0.40, "{a} {relation} {b}": 0.20,
     "{group_a} {relation} {group_b}": 0.15, "{a} and {b}": 0.05, "on {background}": 0.10, "": 0.10})

TWO = 0.4          # share of scenes with two objects, and of backgrounds with two colors

ATTRIBUTION = ("Fluent emoji, copyright Microsoft Corporation, MIT License "
               "(https://github.com/microsoft/fluentui-emoji), from the npm package "
               "@lobehub/fluent-emoji-3d, MIT License. Changes: selected, cropped, resized, composited.")


def short_name(name):
    """The word that captions use for a Unicode name."""
    return RENAMED.get(name, name.removesuffix(" face"))


NAMES = [short_name(name) for names in OBJECTS.values() for name in names.split(", ")]

GROUPS = [group for group, names in OBJECTS.items() for _ in names.split(", ")]

# top and bottom color; i = j: one color
BACKGROUNDS = [(i, j) for i in range(len(COLORS)) for j in range(len(COLORS))]


def held_out(*words):
    """True for the tenth of all pairs (object, color) or (object, object) that no training scene
    shows, decided by a hash."""
    return hashlib.sha256("|".join(words).encode()).digest()[0] % 10 == 0


@functools.cache
def held_out_pairs():
    """Returns: bool (N, colors), bool (N, N): the pairs of object and color, and of object and
    object (either order), never trained on."""
    with_color = torch.tensor([[held_out(name, color) for color in COLORS] for name in NAMES])
    pairs = torch.tensor([[held_out(*sorted((a, b))) for b in NAMES] for a in NAMES])
    return with_color, pairs


@functools.cache
def load_sheet():
    """The sprites: float (N, 4, CELL, CELL) in [0, 1], color premultiplied by alpha, in the order
    of NAMES."""
    with Image.open(SHEET) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGBA"))).float() / 255
    rows = pixels.shape[0] // CELL
    rgba = pixels.view(rows, CELL, COLUMNS, CELL,
                       4).permute(0, 2, 4, 1, 3).reshape(-1, 4, CELL, CELL)[:len(NAMES)]
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def vocabulary():
    """Every word a caption can hold, sorted."""
    return sorted({word for text in (*NAMES, *GROUPS, *COLORS, *RELATIONS, "on", "and")
                   for word in text.split()})


# ---- what a scene shows ------------------------------------------------------------------------------------
# columns of a plan: count, a, b, relation, top color, bottom color, level, then 16 uniform numbers
FACTS, UNIFORMS = 7, 16


def plan(n, generator, only=None, levels=LEVELS):
    """All random choices of n scenes.  generator: CPU torch.Generator, the only source of
    randomness.
    only: False draws training pairs alone, True scenes in which at least one pair is held out, None
    both.
    Returns: float (n, FACTS + UNIFORMS)."""
    rows, missing = [], n
    while missing:
        found = _draw(max(2 * missing, 16), generator, levels)
        if only is not None:
            found = found[is_held_out(found) == only]
        rows.append(found[:missing])
        missing -= len(rows[-1])
    return torch.cat(rows)


def _draw(n, generator, levels):
    u = torch.rand(n, 6 + UNIFORMS, generator=generator)
    two, colored = u[:, 0] < TWO, u[:, 1] < TWO
    a, b = (torch.randint(len(NAMES), (n,), generator=generator) for _ in range(2))
    relation = torch.randint(len(RELATIONS), (n,), generator=generator)
    top, bottom = (torch.randint(len(COLORS), (n,), generator=generator) for _ in range(2))
    level = torch.where(two,
                        *(torch.multinomial(torch.tensor(list(table.values())), n, True, generator=generator)
                          for table in levels[::-1]))
    facts = [1 + two, a, b, relation, top, torch.where(colored, bottom, top), level]
    return torch.cat([torch.stack(facts, 1).float(), u[:, 6:]], 1)


def is_held_out(plans):
    """Which scenes show a pair that is never trained on.  Returns: bool (n,)."""
    count, a, b, _, top, bottom, _ = plans[:, :FACTS].long().unbind(1)
    with_color, pairs = held_out_pairs()
    two = count == 2
    return (with_color[a, top] | with_color[a, bottom]
            | two & (with_color[b, top] | with_color[b, bottom] | pairs[a, b]))


def describe(plans, levels=LEVELS):
    """What planned scenes show and how they are captioned, with the levels they were planned with.
    Returns: (captions, facts): n strings, and n dicts {a, b, group_a, group_b, relation,
    background, count}; b is of the second object whether it is drawn or not (count)."""
    colors, relations, facts, captions = list(COLORS), list(RELATIONS), [], []
    for count, a, b, relation, top, bottom, level in plans[:, :FACTS].long().tolist():
        background = colors[top] if top == bottom else f"{colors[top]} and {colors[bottom]}"
        facts.append(dict(a=NAMES[a], b=NAMES[b], group_a=GROUPS[a], group_b=GROUPS[b],
                          relation=relations[relation], background=background, count=count))
        captions.append(list(levels[count - 1])[level].format(**facts[-1]))
    return captions, facts


# ---- drawing -----------------------------------------------------------------------------------------------


def render(plans, size=SIZE):
    """Planned scenes, float (n, 3, size, size) in [-1, 1]: drawn at SIZE, then resized (bicubic,
    antialiased where it shrinks)."""
    count, a, b, relation, top, bottom, _ = plans[:, :FACTS].long().unbind(1)
    u = plans[:, FACTS:]
    two = (count == 2)[:, None]
    # background: from the top color to the bottom one, each a little lighter or darker
    colors = torch.tensor(list(COLORS.values())).float() / 255
    shade = 1 + 0.08 * (2 * u[:, :2] - 1)
    upper, lower = (colors[c] * shade[:, i:i + 1] for i, c in enumerate((top, bottom)))
    height = torch.linspace(0, 1, SIZE)[None, None, :, None]
    blend = torch.sigmoid((height - 0.5) * 8)
    images = (upper[:, :, None, None] * (1 - blend) + lower[:, :, None, None] * blend).repeat(1, 1, 1, SIZE)
    # one object anywhere; two on both sides of a point near the middle, in their relation
    alone = (1 - (size_alone := 0.62 + 0.26 * u[:, 2:3])) * (2 * u[:, 3:5] - 1)
    apart = torch.tensor(list(RELATIONS.values())).float()[relation] * (0.44 + 0.04 * u[:, 5:6])
    apart = apart + (apart == 0) * 0.30 * (2 * u[:, 6:8] - 1)
    sizes = torch.where(two, 0.44 + 0.08 * u[:, 8:9], size_alone), 0.44 + 0.08 * u[:, 9:10]
    centers = torch.where(two, apart, alone), -apart
    # the first object lies over the second
    for i, rows in ((1, two[:, 0].nonzero()[:, 0]), (0, torch.arange(len(plans)))):
        if not len(rows):                                  # no scene of two
            continue
        sprite = _sprite((a, b)[i][rows], centers[i][rows], sizes[i][rows, 0], u[rows, 10 + 2 * i],
                         u[rows, 11 + 2 * i])
        # three pixels below it
        shadow = F.avg_pool2d(F.avg_pool2d(F.pad(sprite[:, 3:], (4, 4, 7, 1)), 5, 1), 5, 1)
        images[rows] = sprite[:, :3] + (1 - sprite[:, 3:]) * images[rows] * (1 - 0.35 * shadow)
    images = (2 * images - 1).clamp(-1, 1)
    return images if size == SIZE else F.interpolate(images, size=size, mode="bicubic",
                                                     antialias=size < SIZE).clamp(-1, 1)


def _sprite(objects, center, side, turn, flip):
    """Sprites placed into empty pictures, (n, 4, SIZE, SIZE). center: (n, 2) in half-widths;
    side: share of the picture's;
    turn, flip: uniform numbers."""
    angle = math.radians(12) * (2 * turn - 1)
    mirrored = 1 - 2 * (flip < 0.5).float()
    # grid_sample wants the map from picture coordinates to sprite coordinates: undo the shift, the rotation,
    # the scale
    cos, sin = torch.cos(angle) / side, torch.sin(angle) / side
    # (n, 2, 2)
    matrix = torch.stack([torch.stack([mirrored * cos, mirrored * sin], 1), torch.stack([-sin, cos], 1)], 1)
    affine = torch.cat([matrix, -matrix @ center[:, :, None]], 2)
    grid = F.affine_grid(affine, (len(objects), 4, 2 * SIZE, 2 * SIZE), align_corners=False)
    # drawn at 2x, averaged
    return F.avg_pool2d(F.grid_sample(load_sheet()[objects], grid, align_corners=False), 2)


# ---- python -m data.scenes FOLDER --------------------------------------------------------------------------


def build_sheet(folder):
    """Put the chosen emoji of a folder of WebP files, named by their code points (1f98a.webp), into
    SHEET."""
    import emoji  # only here
    files = {}
    for file in Path(folder).glob("*.webp"):
        try:
            character = "".join(chr(int(point, 16)) for point in file.stem.split("-"))
        except (ValueError, OverflowError):
            continue
        known = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA.get(character + "\ufe0f")
        if known:
            files[known["en"].strip(":").replace("_", " ")] = file
    names = [name for group in OBJECTS.values() for name in group.split(", ")]
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(names) // COLUMNS) * CELL))
    for i, name in enumerate(names):
        with Image.open(files[name]) as large:
            large = large.convert("RGBA")
            large = large.crop(large.getbbox())
            large.thumbnail((CELL - 2, CELL - 2), Image.Resampling.LANCZOS)
        sheet.paste(large,
                    (i % COLUMNS * CELL + (CELL - large.width) // 2,
                     i // COLUMNS * CELL + (CELL - large.height) // 2))
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(SHEET, quality=95, method=6, alpha_quality=100)
    load_sheet.cache_clear()


if __name__ == "__main__":
    if sys.argv[1:]:
        build_sheet(sys.argv[1])
    plans = plan(96, torch.Generator().manual_seed(0))
    images, captions = render(plans), describe(plans)[0]
    assert images.shape == (96, 3, SIZE, SIZE) and images.abs().max() <= 1
    sheet = ((images.view(8, 12, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2).reshape(8 * SIZE, 12 * SIZE, 3) + 1) *
             127.5)
    Image.fromarray(sheet.round().byte().numpy()).resize((12 * 128, 8 * 128), 0).save("scenes-preview.png")
    print(f"{SHEET}: {len(NAMES)} objects, {SHEET.stat().st_size / 1e6:.2f} MB; scenes-preview.png: "
          f"{captions[:6]}")
