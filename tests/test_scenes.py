"""data/scenes.py: what a scene shows is what its caption says, in any batch, and held-out pairs are never drawn for training."""
import pytest
import torch

from data import drawn, scenes


def plans(n, seed=0, **options):
    return scenes.plan(n, torch.Generator().manual_seed(seed), **options)


def test_the_sheet_holds_every_object_once():
    sheet = scenes.load_sheet()
    assert len(scenes.NAMES) == len(set(scenes.NAMES)) == len(scenes.GROUPS) == len(sheet) >= 300
    assert sheet.min() >= 0 and sheet.max() <= 1
    covered = sheet[:, 3].mean((1, 2))
    assert covered.min() > 0.05 and covered.max() < 0.99                     # none is empty, none is a full square
    assert len({tuple(sprite.flatten()[::97].tolist()) for sprite in sheet}) == len(sheet)


def test_a_scene_is_the_same_in_any_batch_and_its_numbers_decide_it():
    many = plans(12)
    images = scenes.render(many)
    assert images.shape == (12, 3, 64, 64) and images.abs().max() <= 1 and images.isfinite().all()
    assert torch.allclose(scenes.render(many[5:6]), images[5:6], atol=1e-6)
    assert torch.equal(scenes.render(many), images) and torch.equal(plans(12), many)
    assert not torch.equal(plans(12, seed=1), many)
    assert scenes.render(many[:2], 32).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("relation, axis, sign", [("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1), ("below", 0, 1)])
def test_the_first_object_lies_where_the_relation_says(relation, axis, sign):
    """A red heart beside a blue one on white: the centers of red and of blue."""
    many = plans(8)
    red, blue, white = scenes.NAMES.index("red heart"), scenes.NAMES.index("blue heart"), list(scenes.COLORS).index("white")
    for column, value in enumerate((2, red, blue, list(scenes.RELATIONS).index(relation), white, white, 0)):
        many[:, column] = value
    assert scenes.describe(many)[0] == [f"red heart {relation} blue heart on white"] * 8
    images = scenes.render(many)
    place = torch.linspace(-1, 1, 64)
    centers = []
    for weight in ((images[:, 0] - images[:, 2]).clamp_min(0), (images[:, 2] - images[:, 0]).clamp_min(0)):
        along = weight.square().sum(2 if axis == 0 else 1)
        centers.append((along * place).sum(1) / along.sum(1))
    assert (sign * (centers[0] - centers[1]) > 0.4).all()


def test_captions_name_what_is_drawn_and_only_known_words():
    many, known = plans(600), set(scenes.vocabulary())
    captions, facts = scenes.describe(many)
    assert all(word in known for caption in captions for word in caption.split())
    for caption, fact in zip(captions, facts):
        assert " on " not in f" {caption}" or caption.endswith(f"on {fact['background']}")
        assert fact["count"] == 2 or not any(relation in caption for relation in scenes.RELATIONS)
    share = sum(fact["count"] == 2 for fact in facts) / 600
    assert share == pytest.approx(scenes.TWO, abs=0.07)
    empty = captions.count("") / 600
    assert empty == pytest.approx(0.1, abs=0.05)
    assert max(len(caption.split()) for caption in captions) <= 14


def test_held_out_pairs_are_a_tenth_and_never_drawn_for_training():
    with_color, pairs = scenes.held_out_pairs()
    assert with_color.double().mean().item() == pytest.approx(0.1, abs=0.02) and pairs.double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(pairs, pairs.T)
    assert not scenes.is_held_out(plans(400, held_out=False)).any() and scenes.is_held_out(plans(100, held_out=True)).all()
    both = scenes.is_held_out(plans(2000)).double().mean().item()
    assert 0.1 < both < 0.4


def test_scenes_of_one_object_alone_are_drawn():
    plans = scenes.plan(64, torch.Generator().manual_seed(2))
    alone = plans[plans[:, 0] == 1]
    assert torch.equal(scenes.render(alone), scenes.render(plans)[plans[:, 0] == 1])


# ---- as data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", drawn.SOURCES)
def test_every_caption_has_one_number_and_every_number_its_caption(name):
    data = drawn.Drawn(name, 3)
    numbers, plans = data.caption_indices(range(300)), data.plans(range(300))
    captions = data.source.describe(plans, data.levels)[0]
    assert [data.captions[i] for i in numbers] == captions
    assert len(set(numbers)) == len(set(captions)) > 5
    assert data.captions[0] == "" and 0 in numbers and max(numbers) < len(data.captions)
    assert data.caption_indices(range(40, 50)) == numbers[40:50]
    assert repr(data.captions) == repr(drawn.Drawn(name, 4).captions)


def test_captions_beyond_the_last_are_refused():
    captions = scenes.Captions(scenes.LEVELS)
    for number in (-1, len(captions)):
        with pytest.raises(IndexError):
            captions[number]
    assert captions[len(captions) - 1]


def test_pictures_by_group_show_one_object_and_name_its_group():
    data = drawn.Drawn("scenes-by-group", 0)
    plans = data.plans(range(200))
    assert (plans[:, 0] == 1).all() and set(data.source.describe(plans, data.levels)[0]) <= {"", *scenes.GROUPS}


def test_objects_move_by_whole_places_and_look_alike_wherever_they_lie():
    many = plans(60)
    many[:, 4:6], many[:, scenes.FACTS:scenes.FACTS + 2] = 3, 0.5            # one background, of no shade
    alone = many[many[:, 0] == 1]
    alone[:, 1] = alone[0, 1]
    images, places = scenes.render(alone), scenes.places_of(alone)[0]
    cut = [image[:, 16 * y:16 * y + 40, 16 * x:16 * x + 40] for image, (x, y) in zip(images, places.tolist())]
    assert len({tuple(place) for place in places.tolist()}) == 4
    upper = [piece for piece, (_, y) in zip(cut, places.tolist()) if y == 0]
    assert all(torch.equal(piece, upper[0]) for piece in upper)              # the background changes downward alone
    first, second = scenes.places_of(many[many[:, 0] == 2])
    assert (first - second).abs().max(1).values.eq(2).all() and first.min() >= 0 and first.max() <= 2


def test_shrunk_scenes_are_antialiased():
    """Each pixel of half the size lies near the mean of its four, more so than without antialiasing, and keeps the picture's mean."""
    plans = scenes.plan(64, torch.Generator().manual_seed(0))
    large, shrunk = scenes.render(plans), scenes.render(plans, 32)
    means = torch.nn.functional.avg_pool2d(large, 2)
    aliased = torch.nn.functional.interpolate(large, size=32, mode="bicubic").clamp(-1, 1)
    assert (shrunk - means).square().mean() < 0.7 * (aliased - means).square().mean()
    assert (shrunk.mean((1, 2, 3)) - large.mean((1, 2, 3))).abs().max() < 0.01
