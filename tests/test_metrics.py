"""Distances against closed forms, direct sums and torchmetrics; feature networks against transformers and Pillow; trajectories
against the exact flow of a Gaussian."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, Gaussian
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPModel

import reflow
import sampler
import teacher
from data import scenes
from evaluation import metrics
from models import load
from runtime.cli import UserError
from tools import build

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def gaussian_set(n, mean, std, seed):
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, len(mean), generator=generator, dtype=torch.float64)


# ---- Frechet distance ----------------------------------------------------------------------------------------------


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    m1, m2, s1, s2 = (torch.rand(16, generator=generator, dtype=torch.float64) for _ in range(4))
    found = metrics.frechet_distance((m1, torch.diag(s1 ** 2)), (m2, torch.diag(s2 ** 2)))
    assert found == pytest.approx(((m1 - m2) ** 2).sum().item() + ((s1 - s2) ** 2).sum().item(), abs=1e-10)


def test_frechet_distance_of_a_set_and_its_scaled_copy_is_the_closed_form():
    a = gaussian_set(300, torch.arange(6.0), 1.0, 0) @ gaussian_set(6, torch.zeros(6), 1.0, 1)       # a full covariance
    mean, covariance = metrics.moments(a)
    exact = (2 * mean).square().sum() + (3 - 1) ** 2 * covariance.trace()           # means differ by 2 m, roots by 2 C^(1/2)
    assert metrics.frechet_distance(metrics.moments(a), metrics.moments(3 * a)) == pytest.approx(exact.item(), rel=1e-10)


def test_frechet_distance_is_symmetric_invariant_to_rotation_and_0_for_a_set_with_itself():
    a, b = gaussian_set(500, torch.zeros(6), torch.linspace(1, 2, 6), 0), gaussian_set(500, torch.ones(6), torch.linspace(2, 1, 6), 1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    distance = metrics.frechet_distance(metrics.moments(a), metrics.moments(b))
    assert metrics.frechet_distance(metrics.moments(b), metrics.moments(a)) == pytest.approx(distance, abs=1e-8)
    assert metrics.frechet_distance(metrics.moments(a @ rotation), metrics.moments(b @ rotation)) == pytest.approx(distance, abs=1e-8)
    assert abs(metrics.frechet_distance(metrics.moments(a), metrics.moments(a))) < 1e-8


def test_frechet_distance_agrees_with_torchmetrics():
    class Features(torch.nn.Module):
        num_features = 12

        def forward(self, features):
            return features
    mixing = gaussian_set(12, torch.zeros(12), 1.0, 2)
    a, b = gaussian_set(100, torch.zeros(12), 1.0, 0), gaussian_set(80, torch.full((12,), 0.3), 1.5, 1) @ mixing
    reference = FrechetInceptionDistance(Features())
    reference.update(a, real=True), reference.update(b, real=False)
    assert metrics.frechet_distance(metrics.moments(a), metrics.moments(b)) == pytest.approx(reference.compute().item(), rel=1e-9)


def test_moments_of_float32_features_are_taken_in_float64():
    features = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    mean, covariance = metrics.moments(features)
    exact = np.cov(features.double().numpy().T)
    assert mean.dtype == covariance.dtype == torch.float64
    assert np.allclose(covariance, exact, rtol=1e-12) and np.allclose(mean, features.double().numpy().mean(0), rtol=1e-15)


def test_least_images_are_the_first_whose_covariance_has_full_rank_without_any_group():
    for dim in (2, 6, 8, 64):
        features = gaussian_set(metrics.least_images(dim), torch.zeros(dim), 1.0, 0)
        for rows, full in ((features, True), (features[1:], False)):
            ranks = [torch.linalg.matrix_rank(cov).item() for _, cov in metrics.moments_without(rows, min(metrics.GROUPS, len(rows)))]
            assert (min(ranks) == dim) == full, (dim, ranks)
            if not full:
                with pytest.raises(ValueError, match=f"need {metrics.least_images(dim)} of each"):
                    metrics.frechet_groups(rows, features)


def test_the_root_of_a_covariance_is_symmetric():
    covariance = metrics.moments(gaussian_set(50, torch.zeros(5), 2.0, 0))[1]
    root = metrics.covariance_root(covariance)
    assert torch.allclose(root @ root, covariance, atol=1e-12) and torch.allclose(root, root.T, atol=1e-12)


def test_moments_without_a_group_are_those_of_the_other_rows():
    features = 1000 + gaussian_set(53, torch.zeros(5), 2.0, 0)       # far from 0, and no multiple of the groups
    for g, (mean, covariance) in enumerate(metrics.moments_without(features, 7)):
        expected = metrics.moments(features[[i for i in range(53) if i % 7 != g]])
        assert torch.allclose(mean, expected[0], rtol=1e-12) and torch.allclose(covariance, expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shift, exact", [(0.0, 0.0), (0.25, 32 * 2 * 0.25 ** 2)])
def test_a_corrected_distance_has_no_bias_and_its_interval_holds_the_truth_and_itself(shift, exact):
    """60 pairs of sets of 256 and 1,024 rows of 32 features: the plain distance is far too high in all of them."""
    plain, corrected, holds, itself = [], [], 0, 0
    for trial in range(60):
        a = gaussian_set(256, torch.full((32,), shift), 1 + shift, 2 * trial)
        b = gaussian_set(1024, torch.zeros(32), 1.0, 2 * trial + 1)
        plain.append(metrics.frechet_distance(metrics.moments(a), metrics.moments(b)))
        mean, half = metrics.mean_interval(metrics.frechet_groups(a, b))
        corrected.append(mean)
        holds, itself = holds + (abs(mean - exact) < half), itself + (mean - half < mean < mean + half)
    assert sum(plain) / 60 - exact > 1 and min(plain) > exact
    assert abs(sum(corrected) / 60 - exact) < 0.1
    assert itself == 60 and holds >= 54                              # at 0 the interval is too wide: a difference of equals is of 2nd order


def test_a_corrected_distance_pairs_the_rows_of_both_sets():
    rows = gaussian_set(400, torch.zeros(4), 1.0, 0)
    assert metrics.frechet_groups(rows, rows) == pytest.approx([0] * metrics.GROUPS, abs=1e-9)


# ---- kernel distances ----------------------------------------------------------------------------------------------


def polynomial_mmd(a, b):
    """The unbiased squared MMD with the kernel (x.y / D + 1)^3, pair by pair."""
    def kernel(x, y):
        return (torch.dot(x, y).item() / len(x) + 1) ** 3
    within = [sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1)) for s in (a, b)]
    return sum(within) - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kid_of_sets_within_one_subset_is_the_direct_sum():
    a, b = gaussian_set(15, torch.zeros(4), 1.0, 0), gaussian_set(15, torch.ones(4), 2.0, 1)
    mean, deviation = metrics.kernel_distance(a, b)
    assert mean == pytest.approx(polynomial_mmd(a, b), rel=1e-10) and deviation < 1e-10
    assert metrics.kernel_distance(b, a)[0] == pytest.approx(mean, rel=1e-10)


def test_kid_of_a_set_with_itself_is_its_exact_negative_value():
    """Pairs of an image with itself count across the two sets but not within one: 2 (mean off the diagonal - mean on it) / N."""
    a = gaussian_set(40, torch.zeros(5), 1.0, 0)
    kernel = (a @ a.T / 5 + 1) ** 3
    on, off = kernel.diag().mean(), (kernel.sum() - kernel.trace()) / (40 * 39)
    assert metrics.kernel_distance(a, a)[0] == pytest.approx(2 * (off - on).item() / 40, rel=1e-9)


def test_kid_of_two_points_is_the_closed_form():
    x, y = gaussian_set(2, torch.zeros(6), 1.0, 0)
    expected = sum(s * (torch.dot(p, q).item() / 6 + 1) ** 3 for s, p, q in ((1, x, x), (1, y, y), (-2, x, y)))
    assert metrics.kernel_distance(x.repeat(10, 1), y.repeat(7, 1))[0] == pytest.approx(expected, rel=1e-10)


def test_kid_of_equal_distributions_is_0_on_average_and_takes_both_signs():
    sets = [gaussian_set(30, torch.zeros(4), 1.0, seed) for seed in range(120)]
    values = torch.tensor([metrics.kernel_distance(a, b)[0] for a, b in zip(sets[::2], sets[1::2])])
    assert values.min() < 0 < values.max() and values.mean().abs() < 3 * values.std() / 60 ** 0.5


def test_kid_draws_its_subsets_from_the_seed_and_leaves_the_random_state_alone():
    a, b = gaussian_set(110, torch.zeros(2), 1.0, 0), gaussian_set(102, torch.ones(2), 1.0, 1)
    state = torch.get_rng_state()
    first, again, other = (metrics.kernel_distance(a, b, seed, subset_size=100) for seed in (0, 0, 1))
    assert first == again != other and first[1] > 0 and abs(first[0] - other[0]) < first[1]
    assert torch.equal(state, torch.get_rng_state())


def test_kid_needs_two_images_of_each():
    with pytest.raises(ValueError, match="1 and 5 images"):
        metrics.kernel_distance(torch.zeros(1, 3), torch.zeros(5, 3))


def gaussian_mmd(a, b, sigma=10.0):
    """1000 x the biased squared MMD of the normalized rows, pair by pair."""
    a, b = ([x / x.norm() for x in s] for s in (a, b))

    def mean(s, t):
        return sum(math.exp(-(x - y).square().sum().item() / (2 * sigma ** 2)) for x in s for y in t) / (len(s) * len(t))
    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


def test_cmmd_is_the_direct_sum_in_blocks_of_any_size():
    a, b = gaussian_set(13, torch.zeros(6), 1.0, 0), gaussian_set(9, torch.ones(6), 1.0, 1)
    expected = gaussian_mmd(a, b)
    for block in (1, 4, 13, 2048):
        assert metrics.cmmd(a, b, block=block) == pytest.approx(expected, abs=1e-9)
    assert metrics.cmmd(a, b, sigma=0.5) == pytest.approx(gaussian_mmd(a, b, 0.5), abs=1e-9) and expected > 0.1


def test_cmmd_of_two_points_is_the_closed_form_and_of_a_set_with_itself_0():
    x, y = torch.eye(3)[:2] * 7                                      # at a distance of sqrt(2) once normalized
    assert metrics.cmmd(x.repeat(5, 1), y.repeat(3, 1)) == pytest.approx(2000 * (1 - math.exp(-0.01)), abs=1e-10)
    near = torch.tensor([[1, 0, 0], [math.cos(1e-5), math.sin(1e-5), 0]], dtype=torch.float64)    # no digit is lost to 1 - 1
    assert metrics.cmmd(near[:1], near[1:]) == pytest.approx(2000 * (1e-10 / 200), rel=1e-5)
    a = gaussian_set(50, torch.zeros(6), 1.0, 0)
    assert metrics.cmmd(a, a) == 0 and metrics.cmmd(a, a, block=7) == 0


def test_cmmd_is_symmetric_blind_to_length_and_rotation_and_never_negative():
    a, b = gaussian_set(40, torch.zeros(6), 1.0, 0), gaussian_set(30, torch.full((6,), 0.1), 1.0, 1)
    rotation = torch.linalg.qr(gaussian_set(6, torch.zeros(6), 1.0, 2)).Q
    lengths = torch.rand(40, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    value = metrics.cmmd(a, b)
    assert value > 0 and metrics.cmmd(b, a) == pytest.approx(value, abs=1e-9)
    assert metrics.cmmd(lengths * a, b) == pytest.approx(value, abs=1e-9)
    assert metrics.cmmd(a @ rotation, b @ rotation) == pytest.approx(value, abs=1e-9)


def test_clip_score_is_100_for_parallel_features_and_blind_to_length():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert metrics.clip_score(x, 3 * x) == pytest.approx(100, abs=1e-3)
    assert metrics.clip_score(x, -x) == pytest.approx(-100, abs=1e-3)
    assert metrics.clip_score(torch.eye(2), torch.eye(2)[[0, 0]]) == pytest.approx(50)              # the mean of 1 and 0


# ---- feature networks ----------------------------------------------------------------------------------------------

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(scope="module")
def clip_folders(tmp_path_factory):
    """(plain, full): one random CLIPModel of 32 pixels without and with a preprocessor_config.json."""
    torch.manual_seed(0)
    tokenizer = build.make_tokenizer()
    config = build.make_clip(tokenizer).config
    config.vision_config.image_size = 32
    model = CLIPModel(config)
    folders = [tmp_path_factory.mktemp("clip") / name for name in ("plain", "full")]
    for folder in folders:
        model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    (folders[1] / "preprocessor_config.json").write_text(json.dumps(dict(
        feature_extractor_type="CLIPFeatureExtractor", do_resize=True, size=32, resample=3, do_center_crop=True, crop_size=32,
        do_normalize=True, image_mean=MEAN, image_std=STD)))                                      # as the first CLIP models have it
    return folders


def pictures(n, height, width, seed=0):
    """Smooth random images in [-1, 1]: resizing changes them little."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def test_clip_without_a_preprocessor_takes_its_own_size_as_it_is(clip_folders):
    clip, model = metrics.Clip(clip_folders[0]), CLIPModel.from_pretrained(clip_folders[0])
    images = pictures(5, 32, 32)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
    found = clip.images(images)
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(clip.images(images, batch=2), expected, atol=1e-5)
    assert found.shape == (5, clip.dim) == (5, 64) and found.dtype == torch.float32 and not found.requires_grad and clip.name == "plain"
    with pytest.raises(UserError, match=r"images of \(40, 48\) pixels: this CLIP takes 32 x 32"):
        clip.images(pictures(1, 40, 48))


@pytest.mark.parametrize("size", [(40, 48), (64, 48), (32, 32), (20, 20)], ids=str)
def test_clip_images_are_resized_cropped_and_normalized_as_the_folder_says(clip_folders, size):
    clip, model = metrics.Clip(clip_folders[1]), CLIPModel.from_pretrained(clip_folders[1])
    images, rows = pictures(3, *size), []
    for image in ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy():
        short, height, width = min(size), *size
        height, width = int(32 * height / short), int(32 * width / short)
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        top, left = (height - 32) // 2, (width - 32) // 2
        rows.append((resized[top:top + 32, left:left + 32] / 255 - MEAN) / STD)
    pixel_values = torch.tensor(np.stack(rows), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixel_values).pooler_output)
    assert torch.allclose(clip.images(images, batch=2), expected, atol=1e-4) and clip.name == "full"


def test_clip_texts_keep_their_order_repeated_cut_or_empty(clip_folders):
    clip, model = metrics.Clip(clip_folders[0]), CLIPModel.from_pretrained(clip_folders[0])
    texts = ["fox on green", "", "red heart on blue", "fox on green", "fox " * 40]
    expected = []
    for text in texts:
        tokens = clip.tokenizer(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            expected.append(model.text_projection(model.text_model(input_ids=tokens).pooler_output))
    assert torch.allclose(clip.texts(texts), torch.cat(expected), atol=1e-5)
    assert torch.allclose(clip.texts(texts, batch=1), torch.cat(expected), atol=1e-5)


def test_the_embedded_clip_knows_its_pictures():
    clip = metrics.Clip(load.ASSETS / "tiny-clip")
    plans = scenes.plan(64, torch.Generator().manual_seed(0))
    images, captions = scenes.render(plans), scenes.describe(plans)[0]
    score = metrics.clip_score(clip.images(images), clip.texts(captions))
    assert clip.name == "tiny-clip" and score > 40 > metrics.clip_score(clip.images(images), clip.texts(captions[1:] + captions[:1]))


def test_a_clip_that_cannot_be_loaded_is_one_line_with_a_remedy(clip_folders, tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "nowhere", "nowhere"):
        with pytest.raises(UserError, match="no CLIPModel folder there"):
            metrics.Clip(folder)
    (tmp_path / "config.json").write_text((clip_folders[0] / "config.json").read_text())
    with pytest.raises(UserError, match=f"--clip {tmp_path}: cannot be loaded .*; re-download the folder"):
        metrics.Clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="re-download the folder"):
        metrics.Clip(tmp_path)
    weights = load_file(clip_folders[0] / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "visual_projection" not in name}, tmp_path / "model.safetensors",
              {"format": "pt"})
    build.make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a whole CLIPModel: .* lack visual_projection.weight"):
        metrics.Clip(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--clip nobody/no-such-clip: cannot be loaded .*; check the spelling and the network"):
        metrics.Clip("nobody/no-such-clip")


class StandIn(torch.nn.Module):
    """CountingModel as NVIDIA's Inception is: 8 features, or their softmax."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mixing", torch.arange(24.0).view(3, 8) / 24)

    def forward(self, images, return_features: bool = False):
        assert images.dtype == torch.uint8
        features = images.float().mean([2, 3]) @ self.mixing
        return features if return_features else features.softmax(1)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "stand-in.pt"
    torch.jit.script(StandIn()).save(file)
    return file


@pytest.fixture
def published(stand_in, tmp_path, monkeypatch):
    """The stand-in as the file that is published, at an address, with an empty torch.hub folder.  Returns: the file at the address."""
    source = tmp_path / "published.pt"
    source.write_bytes(stand_in.read_bytes())
    monkeypatch.setattr(metrics, "INCEPTION", source.as_uri())
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", metrics.hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return source


def test_inception_sees_rounded_uint8_pixels_and_learns_its_width_from_the_network(stand_in):
    inception = metrics.Inception(stand_in)
    levels = torch.tensor([-1, 1, 0.5, -2, 2, 0.0], dtype=torch.float32)
    found = inception.images(levels.view(-1, 1, 1, 1).expand(-1, 3, 7, 9), batch=4)
    expected = torch.tensor([0, 255, 191, 0, 255, 128.0])[:, None] * StandIn().mixing.sum(0)
    assert inception.dim == 8 and found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-5)


def test_images_that_are_not_finite_are_refused_not_drawn_black(stand_in):
    images = torch.zeros(3, 3, 8, 8)
    images[1, 0, 2, 2], images[2, 1, 0, 0] = float("nan"), float("inf")
    with pytest.raises(UserError, match="2 of 3 images are not finite"):
        metrics.Inception(stand_in).images(images)
    with pytest.raises(UserError, match="1 of 1 images are not finite"):                     # a CLIP that takes tensors as they are too
        metrics.Clip(ROOT / "assets" / "tiny-clip").images(torch.full((1, 3, 64, 64), float("nan")))


def test_inception_is_named_by_what_it_is(stand_in, monkeypatch):
    digest = metrics.hashlib.sha256(stand_in.read_bytes()).hexdigest()
    assert metrics.Inception(str(stand_in)).name == f"stand-in, not the published Inception (SHA-256 {digest[:16]})"
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", digest)
    assert metrics.Inception(str(stand_in)).name == "Inception 2015-12-05"


def test_inception_is_downloaded_once_and_checked(published):
    assert metrics.Inception().name == "Inception 2015-12-05"
    published.unlink()
    assert metrics.Inception().dim == 8


def test_an_inception_other_than_the_published_one_is_refused(published, tmp_path):
    cached = tmp_path / "hub" / "checkpoints" / "inception-2015-12-05.pt"
    whole = published.read_bytes()
    published.write_bytes(whole + b"!")
    with pytest.raises(UserError, match="cannot be downloaded .*--inception PATH"):
        metrics.Inception()
    assert not list(cached.parent.iterdir())
    cached.write_bytes(whole[:100])
    with pytest.raises(UserError, match=f"{cached}: not the file of .*; delete it"):
        metrics.Inception()


def test_no_network_is_one_line_with_the_address_and_the_option(published):
    published.unlink()
    with pytest.raises(UserError, match=f"{metrics.INCEPTION}: cannot be downloaded to .*; download it elsewhere .* --inception PATH"):
        metrics.Inception()


def test_an_inception_file_that_cannot_be_used_is_one_line_with_the_address(tmp_path):
    with pytest.raises(UserError, match="--inception nowhere.pt: cannot be read .*nvlabs-fi-cdn"):
        metrics.Inception("nowhere.pt")
    (tmp_path / "torn.pt").write_bytes(b"torn")
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "other.pt")
    for name in ("torn.pt", "other.pt"):
        with pytest.raises(UserError, match=f"{name}: not a TorchScript network .*nvlabs-fi-cdn"):
            metrics.Inception(tmp_path / name)


# ---- trajectories --------------------------------------------------------------------------------------------------


def noise(seed=0, shape=(6, 2)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Constant:
    """Always answers (x, eps), under any schedule: its trajectories from alpha x + sigma eps are chords."""

    def __init__(self, schedule, x, eps, path=None, windows=1):
        self.x, self.eps, self.model = x, eps, teacher.Model(None, schedule, path=path, windows=windows)
        self.coefficients = self.model.coefficients

    def __call__(self, z, t, cond, guidance=1.0, uncond=None):
        return self.x, self.eps

    def at(self, t):
        a, b = self.coefficients(torch.tensor([t], dtype=torch.float64), self.x.ndim)
        return a * self.x + b * self.eps


@pytest.mark.parametrize("path", list(reflow.PATHS.values()))
@pytest.mark.parametrize("windows", [1, 4])
def test_a_constant_answer_is_straight_on_the_chord_and_right_in_one_step(schedule, path, windows):
    model = Constant(schedule, noise(0, (3, 2, 4, 4)), noise(1, (3, 2, 4, 4)), path, windows)
    assert max(metrics.straightness(model, model.at(1), {}, windows)) < 1e-20
    every = torch.stack([model.at(t) for t in reflow.boundaries(4)], 1)                            # (3, 5, 2, 4, 4)
    assert max(metrics.chord_error(model, every, {}, windows)) < 1e-10
    ends = [sampler.ddim(model, model.at(1), sampler.time_grid(steps, windows), {}) for steps in (windows, 3 * windows)]
    assert (ends[0] - ends[1]).square().mean().sqrt() < 1e-12


def test_data_at_a_point_is_straight(schedule):
    model = teacher.Model(Gaussian(schedule, "v_prediction", std=0.0), schedule, "v_prediction")
    assert max(metrics.straightness(model, noise(), {}, 2)) < 1e-9


def test_straightness_is_the_definition_in_coordinates_where_the_chord_is_a_line(gaussian):
    """y = z / (alpha + sigma) against s = sigma / (alpha + sigma): E |(y_end - y_start)/(s_end - s_start) - dy/ds|^2."""
    _, model = gaussian
    times, z, path = sampler.time_grid(12, 3), noise(), []
    end = sampler.ddim(model, z, times, {}, callback=lambda state: path.append(state["z"]))
    alpha, sigma = model.schedule(times)
    y, s = torch.stack([*path, end]) / (alpha + sigma)[:, None, None], sigma / (alpha + sigma)
    for k, found in enumerate(metrics.straightness(model, z, {}, 3, steps=4)):
        part = slice(4 * k, 4 * k + 5)
        slope = (y[part][-1] - y[part][0]) / (s[part][-1] - s[part][0])
        speed = (y[part][1:] - y[part][:-1]) / (s[part][1:] - s[part][:-1])[:, None, None]
        assert found == pytest.approx((speed - slope).square().mean().item(), rel=1e-9) and found > 1e-5


def exact_velocity(network, z, t):
    """u = eps - x of the exact answer at z on the Gaussian's flow."""
    alpha, sigma = (v.item() for v in network.schedule(torch.tensor(t, dtype=torch.float64)))
    spread = math.sqrt((alpha * network.std) ** 2 + sigma ** 2)
    unit = (z - alpha * network.mean) / spread                                                    # constant along the flow
    return unit * (sigma - alpha * network.std ** 2) / spread - network.mean


def exact_chord(network, z, t, t_end):
    """u* between z at t and the flow's exact end at t_end."""
    (a, s), (a_end, s_end) = ([v.item() for v in network.schedule(torch.tensor(v, dtype=torch.float64))] for v in (t, t_end))
    x, eps = torch.linalg.solve(torch.tensor([[a, s], [a_end, s_end]], dtype=torch.float64),
                                torch.stack([z, network.flow(z, t, t_end)]).flatten(1)).view(2, *z.shape)
    return eps - x


def test_straightness_of_the_gaussian_flow_is_its_integral(gaussian):
    """Against the exact flow, integrated over each window; DDIM's own error is of first order in the step."""
    network, model = gaussian
    z, windows, points = noise(), 2, 100
    exact, edges = [], reflow.boundaries(windows)
    for start, end in zip(edges, edges[1:]):
        at_start = network.flow(z, 1.0, start)
        chord = exact_chord(network, at_start, start, end)
        times = [start + (end - start) * (i + 0.5) / points for i in range(points)]
        values = [(exact_velocity(network, network.flow(z, 1.0, t), t) - chord).square().mean().item() for t in times]
        exact.append(sum(values) / points)
    found = metrics.straightness(model, z, {}, windows, steps=500)
    assert found == pytest.approx(exact, rel=0.03)


def test_straightness_falls_with_more_windows_and_is_a_mean_over_samples(gaussian):
    _, model = gaussian
    one, four = (metrics.straightness(model, noise(), {}, windows, steps=10) for windows in (1, 4))
    assert len(one) == 1 and len(four) == 4 and 0 < sum(four) / 4 < one[0] / 2
    assert metrics.straightness(model, noise().repeat(2, 3), {}, 4, steps=10) == pytest.approx(four, rel=1e-6)


def test_straightness_of_one_step_says_nothing_and_is_refused(gaussian):
    with pytest.raises(ValueError, match="steps = 1"):
        metrics.straightness(gaussian[1], noise(), {}, 2, steps=1)


def test_chord_error_of_the_gaussian_flow_is_the_closed_form(gaussian):
    network, model = gaussian
    z, edges = noise(), reflow.boundaries(8)
    path = torch.stack([network.flow(z, 1.0, t) for t in edges], 1)                               # (6, 9, 2)
    for windows in (8, 4, 2, 1):
        coarse = reflow.boundaries(windows)
        expected = []
        for start, end in zip(coarse, coarse[1:]):
            at_start = network.flow(z, 1.0, start)
            error = exact_velocity(network, at_start, start) - exact_chord(network, at_start, start, end)
            expected.append(error.square().mean().sqrt().item())
        assert metrics.chord_error(model, path, {}, windows) == pytest.approx(expected, rel=1e-4)


def test_chord_error_is_0_for_the_chord_and_the_offset_of_a_wrong_one(gaussian):
    network, model = gaussian
    z = noise()
    path = torch.stack([network.flow(z, 1.0, t) for t in reflow.boundaries(2)], 1)

    class Chord:
        """Answers with the chord of the window that starts at t, its noise off by `offset`."""
        coefficients, offset = staticmethod(model.coefficients), 0.0

        def __call__(self, z, t, cond, guidance=1.0, uncond=None):
            k = round(2 * (1 - t[0].item()))
            start, end = (self.coefficients(torch.full((1,), 1 - j / 2, dtype=torch.float64), 2) for j in (k, k + 1))
            x, eps = reflow.chord(path[:, k], path[:, k + 1], start, end)
            return x, eps + self.offset
    student = Chord()
    assert max(metrics.chord_error(student, path, {}, 2)) < 1e-12
    student.offset = -0.25
    assert metrics.chord_error(student, path, {}, 2) == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("windows", [0, 3, 16])
def test_chord_error_refuses_windows_that_the_path_does_not_have(gaussian, windows):
    with pytest.raises(ValueError, match=f"windows = {windows}: must divide the 8 windows"):
        metrics.chord_error(gaussian[1], torch.zeros(2, 9, 4), {}, windows)


def test_guidance_reaches_the_model(schedule):
    network = Gaussian(schedule, "epsilon")

    def shifted(z, timestep, shift):
        return network(z, timestep) + shift
    def combined(z, timestep):
        return network(z, timestep) + 0.1 + 3 * (0.3 - 0.1)
    model, guided = (teacher.Model(ask, schedule, "epsilon") for ask in (shifted, combined))
    cond, uncond = ({"shift": torch.full((6, 1), value, dtype=torch.float64)} for value in (0.3, 0.1))
    path = torch.stack([network.flow(noise(), 1.0, t) for t in reflow.boundaries(2)], 1)
    for measure, z in ((metrics.straightness, noise()), (metrics.chord_error, path)):
        assert measure(model, z, cond, 2, guidance=3.0, uncond=uncond) == pytest.approx(measure(guided, z, {}, 2), rel=1e-5)
        assert measure(model, z, cond, 2) != pytest.approx(measure(guided, z, {}, 2), rel=1e-2)


def test_trajectories_measured_in_float32_agree_with_float64(gaussian):
    network, model = gaussian
    path = torch.stack([network.flow(noise(), 1.0, t) for t in reflow.boundaries(8)], 1)
    assert metrics.straightness(model, noise().float(), {}, 8) == pytest.approx(metrics.straightness(model, noise(), {}, 8), rel=1e-3)
    assert metrics.chord_error(model, path.float(), {}, 8) == pytest.approx(metrics.chord_error(model, path, {}, 8), rel=1e-3)


def test_the_file_shows_itself(capsys):
    metrics.demo()
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()] == ["Frechet", "kernel", "CMMD:"]
