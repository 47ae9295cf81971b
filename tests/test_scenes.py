"""data/scenes.py: what a scene shows is what its caption says, in any batch, and held-out pairs are never drawn for training."""
import pytest
import torch

from data import scenes


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
    assert not scenes.is_held_out(plans(400, only=False)).any() and scenes.is_held_out(plans(100, only=True)).all()
    both = scenes.is_held_out(plans(2000)).double().mean().item()
    assert 0.1 < both < 0.4


def test_scenes_of_one_object_alone_are_drawn():
    plans = scenes.plan(64, torch.Generator().manual_seed(2))
    alone = plans[plans[:, 0] == 1]
    assert torch.equal(scenes.render(alone), scenes.render(plans)[plans[:, 0] == 1])
