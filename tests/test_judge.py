"""The judge of pictures: right answers are right, each wrong fact is counted where a caption names it, and nowhere else."""
import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from safetensors.torch import save_file

from data import scenes
from evaluation import judge
from models import load
from runtime.cli import UserError


def told(answers, **changes):
    """Logits of a judge that answers so."""
    return {name: F.one_hot(changes.get(name, value).clamp(min=0), judge.QUESTIONS[name]).float() for name, value in answers.items()}


@pytest.fixture(scope="module")
def plans():
    return scenes.plan(400, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def captions(plans):
    return scenes.describe(plans)[0]


def test_right_answers_follow_every_caption(plans, captions):
    found = judge.follows(told(judge.answers(plans)), plans)
    for name, (named, right) in found.items():
        assert right[named].all(), name
    on = torch.tensor([" on " in f" {caption}" for caption in captions])
    related = torch.tensor([any(f" {word} " in caption for word in scenes.RELATIONS) for caption in captions])
    assert torch.equal(found["color"][0], on) and torch.equal(found["relation"][0], related)
    assert torch.equal(found["all"][0], torch.tensor([bool(caption) for caption in captions]))


def test_a_scene_of_two_is_told_in_one_way():
    """"a left of b" and "b right of a" are one picture."""
    plans = scenes.plan(2, torch.Generator().manual_seed(1))
    one, other = plans.clone(), plans.clone()
    for plan, (a, b, relation) in ((one, (3, 7, "left of")), (other, (7, 3, "right of"))):
        plan[:, 0], plan[:, 1], plan[:, 2], plan[:, 3] = 2, a, b, list(scenes.RELATIONS).index(relation)
    assert all(torch.equal(judge.answers(one)[name], judge.answers(other)[name]) for name in judge.QUESTIONS)
    assert judge.answers(one)["first"].tolist() == [3, 3]


@pytest.mark.parametrize("question, counted", [("top", {"color"}), ("bottom", {"color"}), ("axis", {"relation"}), ("count", {"object", "relation"}),
                                               ("only", {"object"}), ("first", {"object", "relation"})])
def test_a_wrong_answer_counts_where_the_caption_names_it(plans, question, counted):
    plans = plans[plans[:, 0] == {"only": 1, "first": 2}[question]] if question in ("only", "first") else plans
    right = judge.answers(plans)
    wrong = (right[question] + 1) % judge.QUESTIONS[question]
    if question in ("only", "first"):                      # of another group, so that vague captions are wrong as well
        animal, food = scenes.GROUPS.index("animal"), scenes.GROUPS.index("food")
        wrong = torch.tensor([food if scenes.GROUPS[int(a)] == "animal" else animal for a in right[question]])
        wrong = torch.where(wrong == right["second"], wrong + 1, wrong)
    found = judge.follows(told(right, **{question: wrong}), plans)
    for name in ("object", "color", "relation"):
        named, correct = found[name]
        assert not correct[named].any() if name in counted else correct[named].all(), name
    named, correct = found["all"]
    assert torch.equal(correct, torch.stack([found[name][1] | ~found[name][0] for name in ("object", "color", "relation")]).all(0))


def test_a_class_is_followed_by_any_object_of_its_group_and_what_is_never_named_is_left_out(small, tmp_path):
    """The levels decide what a plan's number means: 0 of GROUP_LEVELS names a group, of LEVELS an object and its background."""
    plans = scenes.plan(300, torch.Generator().manual_seed(2), levels=scenes.GROUP_LEVELS)
    right, groups = judge.answers(plans), {group: scenes.GROUPS.index(group) for group in scenes.GROUPS}
    first = torch.tensor([groups[scenes.GROUPS[int(a)]] for a in right["only"]])          # of the same group
    named, correct = judge.follows(told(right, only=first, top=right["top"] * 0), plans, scenes.GROUP_LEVELS)["all"]
    captions = scenes.describe(plans, scenes.GROUP_LEVELS)[0]
    assert named.tolist() == [bool(caption) for caption in captions] and correct[named].all()
    named, correct = judge.follows(told(right, only=(first + 100) % len(scenes.NAMES)), plans, scenes.GROUP_LEVELS)["object"]
    assert correct[named].double().mean() < 0.5
    save_file(small.state_dict(), tmp_path / "judge.safetensors")
    found = judge.Features(tmp_path)
    features = found.images(scenes.render(plans[:8]))
    assert set(found.accuracy(features, plans[:8], scenes.GROUP_LEVELS)) == {"object", "all"}


def test_two_objects_in_each_others_place_are_the_right_objects_in_the_wrong_relation(plans):
    right = judge.answers(plans)
    two = plans[:, 0] == 2
    found = judge.follows(told(right, first=right["second"], second=right["first"]), plans)
    assert found["object"][1][found["object"][0]].all()
    differ = two & found["relation"][0] & (right["first"] != right["second"])
    exact = torch.tensor([scenes.GROUPS[int(a)] != scenes.GROUPS[int(b)] for a, b in zip(right["first"], right["second"])])
    assert differ.any() and not found["relation"][1][differ & exact].any()


def test_distance_is_none_from_itself_and_grows_with_the_change():
    torch.manual_seed(0)
    network, images = judge.Judge().eval(), scenes.render(scenes.plan(8, torch.Generator().manual_seed(2)))
    little, much = (images + size * torch.randn(images.shape, generator=torch.Generator().manual_seed(3)) for size in (0.05, 0.5))
    with torch.no_grad():
        assert judge.distance(network, images, images).max() == 0
        assert (judge.distance(network, images, little) < judge.distance(network, images, much)).all()
        assert network.features(images).shape == (8, 192)


def test_augmentation_is_the_generators_and_moves_every_picture():
    images = scenes.render(scenes.plan(4, torch.Generator().manual_seed(2)))
    a, b = (judge.augment(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and ((a - images).flatten(1).abs().mean(1) > 0.01).all()


@pytest.mark.parametrize("updates, share", [(12, 0.9), slow(120, 0.55)])
def test_it_learns(updates, share):
    torch.manual_seed(0)
    network, plans = judge.Judge(), scenes.plan(32, torch.Generator().manual_seed(6))
    images, optimizer = scenes.render(plans), torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(updates):
        losses.append(judge.loss(network, images, plans))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < share * losses[0]


# ---- a judge that lies in a folder -----------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    torch.manual_seed(0)
    network = judge.Judge((8, 16, 24))
    save_file({name: value.half() for name, value in network.state_dict().items()}, tmp_path / "judge.safetensors")
    return network


def test_features_are_the_networks_and_accuracy_is_what_follows_says(small, tmp_path, plans):
    found, images = judge.Features(tmp_path), scenes.render(plans[:70])
    features = found.images(images)
    assert found.dim == 24 and features.shape == (70, 24)
    with torch.no_grad():
        small.load_state_dict({name: value.half().float() for name, value in small.state_dict().items()})
        assert torch.allclose(features, small.features(images), atol=1e-5)
        right = judge.follows(small(images), plans[:70])
        assert found.distance(images, images.flip(0)).tolist() == pytest.approx(judge.distance(small, images, images.flip(0)).tolist(), abs=1e-5)
    shares = found.accuracy(features, plans[:70])
    assert shares == {name: right[name][1][right[name][0]].double().mean().item() for name in ("object", "color", "relation", "all")}


def test_a_folder_without_a_whole_judge_is_refused_by_name(small, tmp_path):
    with pytest.raises(UserError, match="--judge .*nowhere: judge.safetensors cannot be loaded"):
        judge.Features(tmp_path / "nowhere")
    weights = {name: value for name, value in small.state_dict().items() if name != "head.bias"}
    save_file(weights, tmp_path / "judge.safetensors")
    with pytest.raises(UserError, match="head.bias"):
        judge.Features(tmp_path)
    (tmp_path / "judge.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="restore the folder"):
        judge.Features(tmp_path)


def test_the_committed_judge_has_learned_every_question():
    found, plans = judge.Features(load.ASSETS / "judge"), scenes.plan(512, torch.Generator().manual_seed(77))
    features, right = found.images(scenes.render(plans)), judge.answers(plans)
    guess = judge.split(found.model.head(features))
    for name, values in guess.items():
        asked = right[name] >= 0
        assert (values.argmax(1) == right[name])[asked].double().mean() > 0.8, name
    assert found.accuracy(features, plans)["all"] > 0.85
