"""Metric code against closed forms, then the whole protocol on a random model."""
import json

import pytest
import torch

import eval as evaluation
import sprites
import tiny
import train


def gaussian(n, mean, std, seed):
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, len(mean), generator=generator, dtype=torch.float64)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    m1, m2, s1, s2 = (torch.rand(16, generator=generator, dtype=torch.float64) for _ in range(4))
    found = evaluation.frechet_distance((m1, torch.diag(s1 ** 2)), (m2, torch.diag(s2 ** 2)))
    assert found == pytest.approx(((m1 - m2) ** 2).sum().item() + ((s1 - s2) ** 2).sum().item(), abs=1e-10)


def test_frechet_distance_is_symmetric_invariant_to_rotation_and_0_for_a_set_with_itself():
    a, b = gaussian(500, torch.zeros(6), torch.linspace(1, 2, 6), 0), gaussian(500, torch.ones(6), torch.linspace(2, 1, 6), 1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    distance = evaluation.frechet_distance(evaluation.moments(a), evaluation.moments(b))
    assert evaluation.frechet_distance(evaluation.moments(b), evaluation.moments(a)) == pytest.approx(distance, abs=1e-8)
    assert evaluation.frechet_distance(evaluation.moments(a @ rotation), evaluation.moments(b @ rotation)) == pytest.approx(distance, abs=1e-8)
    assert abs(evaluation.frechet_distance(evaluation.moments(a), evaluation.moments(a))) < 1e-8


def test_the_interval_covers_the_true_distance():
    mean, std = torch.full((4,), 0.5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    reference = (torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))       # true distance: 4 x 0.25 = 1
    hits = sum(low < 1 < high for low, high in (evaluation.frechet_interval(gaussian(400, mean, std, seed), reference) for seed in range(20)))
    assert hits >= 16


def test_clip_score_is_100_for_parallel_features_and_blind_to_length():
    x = torch.randn(5, 8)
    assert evaluation.clip_score(x, 3 * x) == pytest.approx(100, abs=1e-3)
    assert evaluation.clip_score(x, -x) == pytest.approx(-100, abs=1e-3)


def test_a_run_is_measured_end_to_end_and_a_second_call_reuses_the_rows(random_sd, tmp_path):
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    tiny.make_clip(tokenizer).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    run = tmp_path / "run"
    common = dict(model=str(random_sd), data="sprites", batch=2, trajectories=2, solver_steps=8, cache=str(run / "cache"))
    train.main(train.Config(**common, out=str(run), name="proreflow", windows=[2, 1], steps=2))
    train.main(train.Config(**common, out=str(run / "reflow"), recipe="reflow", steps=1))
    c = evaluation.Config(run=str(run), n=640, real=640, steps=[1, 2], ddim_steps=[1], teacher_steps=2, clip=str(tmp_path / "clip"))
    result = evaluation.main(c)
    assert result == json.loads((run / "results.json").read_text())
    assert [(row["method"], row["windows"], row["steps"]) for row in result["rows"]] == [
        ("teacher", None, 2), ("ddim", None, 1), ("proreflow", 2, 2), ("proreflow", 1, 1), ("proreflow", 1, 2),
        ("reflow", 1, 1), ("reflow", 1, 2)]
    for row in result["rows"]:
        assert row["fd_interval"][0] <= row["fd"] <= row["fd_interval"][1] + 0.5 and row["seconds_per_image"] > 0
    assert abs(result["rows"][0]["fd_teacher"]) < 1e-6 and result["rows"][1]["fd_teacher"] >= 0
    assert (run / "grid.png").stat().st_size > 1000 and "| teacher | - | 2 |" in (run / "results.md").read_text()
    assert evaluation.main(c)["rows"] == result["rows"]


def test_evaluation_pictures_are_fresh_and_hold_the_held_out_pairs():
    images, captions = evaluation.real_images(2000, "reference")
    again, other = evaluation.real_images(2000, "reference"), evaluation.real_images(2000, "prompts")
    assert torch.equal(images, again[0]) and captions == again[1] != other[1]
    assert set(captions) & {f"{name} on {colour}" for name in sprites.load_sheet()[0] for colour in sprites.BACKGROUNDS
                            if sprites.is_held_out(name, colour)}


def test_sprites_hold_out_a_tenth_and_training_never_draws_it():
    share = len(sprites.pairs(True)) / len(sprites.pairs(None))
    assert 0.07 < share < 0.13 and len(sprites.pairs(True)) + len(sprites.pairs(False)) == len(sprites.pairs(None))
    _, _, facts = sprites.draw(500, torch.Generator().manual_seed(0), held_out=False)
    assert not any(sprites.is_held_out(fact["object"], fact["background"]) for fact in facts)
    images, captions, _ = sprites.draw(8, torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 32, 32) and images.abs().max() <= 1 and images.std() > 0.1
    assert {word for caption in captions for word in caption.split()} <= set(sprites.vocabulary())
