"""The embedded pictures: scenes of one or two 3-D objects on a background of one or two colors,
with captions of several levels.

A scene is one object, or two in a relation (left of, right of, above, below), each with a soft
shadow. An object has two looks, 48 pixels alone and 32 as one of two, and moves by whole places of 16
pixels, two of the autoencoder's latents, so that its latents are the same wherever it lies: a model
that trains on two cores can remember that much. Its caption is drawn among "fox left of pizza
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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SHEET = Path(__file__).parent.parent / "assets" / "scenes" / "sprites.webp"

SIZE = 64          # pixels, side of a scene

SIDES = 48, 32     # pixels, side of an object alone, and of one of two

PLACE = 16         # pixels by which objects move

CELL = 96          # pixels, side of a sprite in the sheet

COLUMNS = 20       # sprites per row of the sheet

# group -> names of the Unicode characters, in the order of the sheet
OBJECTS = {
    "animal": "dog face, cat face, mouse face, hamster, rabbit face, fox, bear, panda, koala, polar bear, "
              "tiger face, lion, cow face, pig face, frog, monkey face, horse face, unicorn, wolf, "
              "raccoon, rooster, penguin, baby chick, duck, owl, eagle, bird, parrot, flamingo, peacock, "
              "swan, honeybee, butterfly, snail, lady beetle, spider, bug, turtle, snake, crocodile, "
              "octopus, lobster, crab, tropical fish, dolphin, whale, shark, seal, elephant, rhinoceros, "
              "hippopotamus, giraffe, zebra, camel, llama, gorilla, sloth, deer, ram, sauropod, T-Rex, "
              "jellyfish",
    "food": "red apple, green apple, pear, tangerine, lemon, banana, watermelon, grapes, strawberry, "
            "blueberries, cherries, peach, pineapple, coconut, kiwi fruit, tomato, eggplant, avocado, "
            "broccoli, cucumber, bell pepper, hot pepper, ear of corn, carrot, onion, croissant, bagel, "
            "bread, baguette bread, pretzel, cheese wedge, egg, cooking, pancakes, waffle, cut of meat, "
            "poultry leg, hot dog, hamburger, french fries, pizza, sandwich, taco, green salad, "
            "steaming bowl, sushi, rice ball, pie, cupcake, shortcake, birthday cake, lollipop, candy, "
            "chocolate bar, popcorn, doughnut, cookie, honey pot, soft ice cream, hot beverage, teapot, "
            "wine glass, cocktail glass, beer mug, cup with straw, bubble tea, mushroom",
    "plant": "cactus, evergreen tree, deciduous tree, palm tree, seedling, four leaf clover, tulip, "
             "cherry blossom, rose, hibiscus, sunflower, bouquet, maple leaf, potted plant, lotus, "
             "Christmas tree",
    "sky": "sun, full moon, crescent moon, star, cloud, cloud with rain, cloud with lightning, "
           "rainbow, high voltage, snowflake, fire, droplet, ringed planet, globe showing Americas, "
           "snowman without snow, volcano",
    "vehicle": "automobile, taxi, bus, racing car, police car, ambulance, fire engine, delivery truck, "
               "tractor, motor scooter, motorcycle, bicycle, locomotive, bullet train, tram, helicopter, "
               "airplane, rocket, flying saucer, sailboat, speedboat, ship, skateboard, roller skate",
    "building": "house, castle, church, factory, school, tent, Japanese castle, hut, circus tent, red paper "
                "lantern, Tokyo tower",
    "clothes": "crown, top hat, woman’s hat, glasses, sunglasses, necktie, t-shirt, jeans, dress, socks, "
               "scarf, gloves, running shoe, high-heeled shoe, backpack, handbag, ring, billed cap, "
               "graduation cap",
    "music": "guitar, violin, trumpet, saxophone, drum, accordion, musical keyboard, microphone",
    "tool": "axe, scissors, pencil, paintbrush, artist palette, magnet, compass, umbrella, key, locked, "
            "bell, light bulb, candle, bucket, toothbrush, anchor",
    "thing": "soccer ball, basketball, american football, baseball, tennis, pool 8 ball, boxing glove, "
             "trophy, bullseye, kite, game die, puzzle piece, teddy bear, balloon, wrapped gift, gem "
             "stone, camera, television, laptop, mobile phone, telephone, joystick, hourglass done, "
             "alarm clock, watch, closed book, envelope, package, money bag, chair, brick, bone, tooth, "
             "brain",
    "face": "grinning face, face with tears of joy, winking face, smiling face with heart-eyes, "
            "star-struck, sleeping face, hot face, cold face, cowboy hat face, partying face, smiling "
            "face with sunglasses, nerd face, loudly crying face, enraged face, clown face, ghost, "
            "alien, robot, skull, jack-o-lantern",
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
    "Christmas tree": "christmas tree", "cloud with rain": "rain cloud",
    "cloud with lightning": "storm cloud", "high voltage": "lightning", "ringed planet": "planet",
    "globe showing Americas": "earth",
    "snowman without snow": "snowman", "automobile": "car", "fire engine": "fire truck",
    "delivery truck": "truck", "motor scooter": "scooter", "locomotive": "steam train",
    "flying saucer": "ufo",
    "Japanese castle": "pagoda", "red paper lantern": "lantern",
    "Tokyo tower": "tower",
    "woman’s hat": "sun hat", "t-shirt": "shirt", "running shoe": "sneaker", "high-heeled shoe": "high heel",
    "billed cap": "cap",
    "musical keyboard": "piano", "artist palette": "palette", "locked": "padlock",
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

# captions that are class names, of scenes of one object: what conditions a class-conditional model
GROUP_LEVELS = ({"{group_a}": 0.90, "": 0.10},)

TWO = 0.4          # share of scenes with two objects, and of backgrounds with two colors

ATTRIBUTION = ("Fluent emoji, copyright Microsoft Corporation, MIT License "
               "(https://github.com/microsoft/fluentui-emoji), from the npm package "
               "@lobehub/fluent-emoji-3d, MIT License. Changes: selected, cropped, resized, composited.")


def short_name(name):
    """The word that captions use for a Unicode name."""
    return RENAMED.get(name, name.removesuffix(" face"))


NAMES = [short_name(name) for names in OBJECTS.values() for name in names.split(", ")]

GROUPS = [group for group, names in OBJECTS.items() for _ in names.split(", ")]


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
# columns of a plan: count, a, b, relation, top color, bottom color, level, then 6 uniform numbers:
# two shades of the background, the place of one object (x, y), and of two the places across their relation
FACTS, UNIFORMS = 7, 6


def plan(n, generator, held_out=None, levels=LEVELS):
    """All random choices of n scenes.  generator: CPU torch.Generator, the only source of
    randomness.
    held_out: False draws training pairs alone, True scenes in which at least one pair is held out,
    None both; levels: LEVELS or GROUP_LEVELS.
    Returns: float (n, FACTS + UNIFORMS)."""
    rows, missing = [], n
    while missing:
        found = _draw(max(2 * missing, 16), generator, levels)
        if held_out is not None:
            found = found[is_held_out(found) == held_out]
        rows.append(found[:missing])
        missing -= len(rows[-1])
    return torch.cat(rows)


def _draw(n, generator, levels):
    u = torch.rand(n, 6 + UNIFORMS, generator=generator)
    two, colored = u[:, 0] < TWO * (len(levels) == 2), u[:, 1] < TWO
    a, b = (torch.randint(len(NAMES), (n,), generator=generator) for _ in range(2))
    relation = torch.randint(len(RELATIONS), (n,), generator=generator)
    top, bottom = (torch.randint(len(COLORS), (n,), generator=generator) for _ in range(2))
    level = torch.where(two,
                        *(torch.multinomial(torch.tensor(list(table.values())), n, True, generator=generator)
                          for table in (levels[-1], levels[0])))
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
    captions, facts = [], []
    for count, *named, level in plans[:, :FACTS].long().tolist():
        text, about = caption(list(levels[count - 1])[level], *named)
        captions.append(text)
        facts.append(dict(**about, count=count))
    return captions, facts


class Captions(Sequence):
    """Every caption of some levels, by number; 0 is "". There are too many for a list: a number is made
    of the level and of the facts that it names."""

    def __init__(self, levels):
        self.levels = levels
        self.texts = list(dict.fromkeys(["", *(text for table in levels for text in table)]))
        self.sizes = len(self.texts), len(NAMES), len(NAMES), len(RELATIONS), len(COLORS), len(COLORS)

    def __len__(self):
        return math.prod(self.sizes)

    def __repr__(self):                                    # all that decides them
        return repr((self.levels, NAMES, GROUPS, list(RELATIONS), list(COLORS)))

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        found = []
        for size in self.sizes[:0:-1]:
            number, digit = divmod(number, size)
            found.append(digit)
        return caption(self.texts[number], *reversed(found))[0]

    def numbers(self, plans):
        """Of the captions of planned scenes: list of int. Equal captions have one number."""
        found = []
        for count, a, b, relation, top, bottom, level in plans[:, :FACTS].long().tolist():
            text = list(self.levels[count - 1])[level]
            digits = [self.texts.index(text)]
            for name, fact in (("a", a), ("b", b), ("relation", relation), ("background", top),
                               ("background", bottom)):
                if f"{{group_{name}}}" in text:            # its first object stands for a group
                    fact = GROUPS.index(GROUPS[fact])
                digits.append(fact if f"{name}}}" in text else 0)
            number = 0
            for digit, size in zip(digits, self.sizes):
                number = number * size + digit
            found.append(number)
        return found


def caption(text, a, b, relation, top, bottom):
    """A caption of one level, and the facts it may name.  text: a key of LEVELS; others: numbers."""
    colors = list(COLORS)
    background = colors[top] if top == bottom else f"{colors[top]} and {colors[bottom]}"
    facts = dict(a=NAMES[a], b=NAMES[b], group_a=GROUPS[a], group_b=GROUPS[b],
                 relation=list(RELATIONS)[relation], background=background)
    return text.format(**facts), facts


def recaption(plans, generator):
    """The same scenes, each with a caption level drawn anew."""
    plans = plans.clone()
    for count, table in enumerate(LEVELS, 1):
        rows = (plans[:, 0] == count).nonzero()[:, 0]
        if len(rows):
            plans[rows, FACTS - 1] = torch.multinomial(torch.tensor(list(table.values())), len(rows), True,
                                                       generator=generator).float()
    return plans


def plainest(plans):
    """The same scenes, with what no caption tells made plain: an object alone in the upper left
    corner, two in the middle of their sides, colors as in COLORS; "a and b" from left to right."""
    plans = plans.clone()
    plans[:, FACTS:] = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.5, 0.5])
    told = torch.tensor(["{relation}" in level for level in LEVELS[1]])
    plans[:, 3] *= told[plans[:, FACTS - 1].long().clamp(max=len(told) - 1)]
    return plans


# ---- drawing -----------------------------------------------------------------------------------------------


@functools.cache
def looks():
    """The two looks of every object, alone and as one of two: float (N, 4, side, side) each, of
    SIDES, with a margin of one pixel."""
    return [F.pad(F.interpolate(load_sheet(), side - 2, mode="bicubic", antialias=True).clamp(0, 1), (1,) * 4)
            for side in SIDES]


def render(plans, size=SIZE):
    """Planned scenes, float (n, 3, size, size) in [-1, 1]: drawn at SIZE, then resized (bicubic,
    antialiased where it shrinks)."""
    count, a, b, relation, top, bottom, _ = plans[:, :FACTS].long().unbind(1)
    u = plans[:, FACTS:]
    # background: from the top color to the bottom one, each a little lighter or darker
    colors = torch.tensor(list(COLORS.values())).float() / 255
    shade = 1 + 0.08 * (2 * u[:, :2] - 1)
    upper, lower = (colors[c] * shade[:, i:i + 1] for i, c in enumerate((top, bottom)))
    height = torch.linspace(0, 1, SIZE)[None, None, :, None]
    blend = torch.sigmoid((height - 0.5) * 8)
    images = (upper[:, :, None, None] * (1 - blend) + lower[:, :, None, None] * blend).repeat(1, 1, 1, SIZE)
    # the second object, then the first
    for objects, places in zip((b, a), reversed(places_of(plans))):
        sprite = torch.zeros(len(plans), 4, SIZE, SIZE)
        for number, (look, side) in enumerate(zip(looks(), SIDES), 1):
            for x, y in set(map(tuple, places[count == number].tolist())):
                rows = ((count == number) & (places[:, 0] == x) & (places[:, 1] == y)).nonzero()[:, 0]
                if x >= 0:                                     # there is a second object
                    left, up = PLACE * x, PLACE * y
                    sprite[rows, :, up:up + side, left:left + side] = look[objects[rows]]
        # three pixels below it
        shadow = F.avg_pool2d(F.avg_pool2d(F.pad(sprite[:, 3:], (4, 4, 7, 1)), 5, 1), 5, 1)
        images = sprite[:, :3] + (1 - sprite[:, 3:]) * images * (1 - 0.35 * shadow)
    images = (2 * images - 1).clamp(-1, 1)
    return images if size == SIZE else F.interpolate(images, size=size, mode="bicubic",
                                                     antialias=size < SIZE).clamp(-1, 1)


def places_of(plans):
    """Where the first and the second object of each scene lie: int64 (n, 2) each, (x, y) of the
    upper left corner in units of PLACE; -1 where there is no second."""
    two = (plans[:, 0] == 2)[:, None]
    u = plans[:, FACTS:]
    side = torch.tensor(list(RELATIONS.values()))[plans[:, 3].long()]            # of the first: -1, 0 or 1
    alone = (2 * u[:, 2:4]).long()
    first, second = (torch.where(side == 0, (3 * u[:, i:i + 1]).long(), 1 + sign * side)
                     for i, sign in ((4, 1), (5, -1)))
    return torch.where(two, first, alone), torch.where(two, second, -1)


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
