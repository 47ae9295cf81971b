"""Numbers that compare: two sets of images by the features a fixed network finds in them, and
trajectories with each other.

A network turns images into rows of features, once; every distance is a function of such rows alone,
in float64:

    clip = Clip("assets/tiny-clip")
    frechet_distance(moments(clip.images(ours)), moments(clip.images(real)))

None of these numbers means anything without the network's name and the number of images beside it.

    python -m evaluation.metrics          # each distance where its value is known
"""
import hashlib
import itertools
import math
import warnings
from pathlib import Path

import torch
from scipy import stats
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import reflow
import sampler
from models import load
from runtime import seeds
from runtime.cli import UserError, extra
from teacher import clock_device

# ---- feature networks: .name, .dim, .images(images) -> (N, dim) --------------------------------------------


def finite(images):
    """images (N, ...) as they are. Raises UserError if one has a NaN, which would be drawn black
    and make every distance NaN."""
    broken = len(images) - images.isfinite().flatten(1).all(1).sum().item()
    if broken:
        raise UserError(f"{broken} of {len(images)} images are not finite: the model that made them has "
                        "diverged; measure an earlier one")
    return images


def pixels(images):
    """What a PNG would hold. images: float (N, 3, H, W) in [-1, 1].  Returns: uint8, the same
    shape."""
    return ((finite(images).float() + 1) * 127.5).round().clamp(0, 255).byte()


class Clip:
    """Features of images and texts in the one space of a CLIPModel. folder: a local folder or a hub
    id. Images become the tower's input as its preprocessor_config.json says (resize, crop, mean,
    deviation); a folder without that file takes images of exactly the tower's size, as they are.
    Raises UserError if no model is there or it cannot be read."""

    def __init__(self, folder, device="cpu"):
        path, self.device = Path(folder), device
        local = path.exists() or str(folder).startswith((".", "/")) or str(folder).count("/") != 1
        if local and not (path / "config.json").is_file():
            raise UserError(f"--clip {folder}: no CLIPModel folder there (config.json is missing)")
        try:
            model = load.load_whole(CLIPModel, folder, dtype=torch.float32, local_files_only=local)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=local)
            # Pillow resizes, as for CLIP's own training; torchvision's result differs a little, and is not
            # needed
            as_they_are = local and not (path / "preprocessor_config.json").is_file()
            self.processor = (None if as_they_are else
                              CLIPImageProcessorPil.from_pretrained(folder, local_files_only=local))
        except Exception as error:  # files break, and hubs refuse, in more ways than can be listed
            remedy = ("re-download the folder" if local else
                      "check the spelling and the network, or download it elsewhere and give the folder")
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--clip {folder}: cannot be loaded ({type(error).__name__}: {reason}); "
                            f"{remedy}") from error
        self.model = model.eval().requires_grad_(False).to(device)
        self.name = path.absolute().name if local else str(folder)
        self.dim = self.model.config.projection_dim

    @torch.no_grad()
    def images(self, images, batch=64):
        """images: float (N, 3, H, W) in [-1, 1].  Returns: float32 (N, dim), CPU, not normalized.
        Raises UserError on a size that a folder without preprocessor_config.json does not take."""
        size = self.model.config.vision_config.image_size
        if self.processor is None and images.shape[-2:] != (size, size):
            raise UserError(f"images of {tuple(images.shape[-2:])} pixels: this CLIP takes {size} x {size}; "
                            "give another --clip")
        rows = []
        for chunk in finite(images).split(batch):
            if self.processor is not None:
                chunk = self.processor(list(pixels(chunk).cpu()), input_data_format="channels_first",
                                       return_tensors="pt")["pixel_values"]
            pooled = self.model.vision_model(pixel_values=chunk.to(self.device, torch.float32)).pooler_output
            rows.append(self.model.visual_projection(pooled).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def texts(self, texts, batch=64):
        """texts: list of N strings; what is beyond the text tower's length is cut.
        Returns: float32 (N, dim), CPU, not normalized."""
        unique = list(dict.fromkeys(texts))
        index, rows = {text: i for i, text in enumerate(unique)}, []
        for start in range(0, len(unique), batch):
            tokens = self.tokenizer(unique[start:start + batch], padding="max_length", truncation=True,
                                    return_tensors="pt",
                                    max_length=self.model.config.text_config.max_position_embeddings).input_ids
            rows.append(
                self.model.text_projection(
                    self.model.text_model(input_ids=tokens.to(self.device)).pooler_output).cpu())
        return torch.cat(rows)[[index[text] for text in texts]]


INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

# of that file, as k-diffusion publishes it for the same address (crowsonkb/k-diffusion,
# k_diffusion/evaluation.py)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class Inception:
    """The Inception network of 2015 behind published FIDs, in NVIDIA's TorchScript form
    (StyleGAN2-ADA; EDM uses the same weights): uint8 pixels in, resized inside, 2,048 features out.
    path: that file; default: downloaded once, into torch.hub's folder, and its SHA-256 checked.
    Any TorchScript network of the same signature will do; .name then says that it is another.
    Raises UserError if it cannot be downloaded, is not that file, or cannot be called."""

    def __init__(self, path="", device="cpu"):
        self.device, file = device, Path(path or
                                         Path(torch.hub.get_dir()) / "checkpoints" /
                                         "inception-2015-12-05.pt")
        if not path and not file.is_file():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                # whole and right, or absent
                torch.hub.download_url_to_file(INCEPTION, str(file), INCEPTION_SHA256)
            except (OSError, RuntimeError) as error:        # RuntimeError: another SHA-256
                raise UserError(f"{INCEPTION}: cannot be downloaded to {file} ({error}); download it "
                                "elsewhere and give it as --inception PATH") from error
        try:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"--inception {file}: cannot be read ({error.strerror}); give the file of "
                            f"{INCEPTION}") from error
        if not path and digest != INCEPTION_SHA256:
            raise UserError(f"{file}: not the file of {INCEPTION} (SHA-256 {digest}); delete it and run the "
                            "same command again")
        self.published = digest == INCEPTION_SHA256
        self.name = ("Inception 2015-12-05" if self.published else
                     f"{file.stem}, not the published Inception (SHA-256 {digest[:16]})")
        try:
            # deprecated, and the only form in which it is published
            self.network = torch.jit.load(file, map_location=device).eval()
            self.dim = self.images(torch.zeros(1, 3, 64, 64)).shape[1]
        except (RuntimeError, torch.jit.Error) as error:
            reason = " ".join(str(error).split())[-200:]
            raise UserError(f"--inception {file}: not a TorchScript network that turns uint8 images into "
                            f"features ({reason}); give the file of {INCEPTION}") from error

    @torch.no_grad()
    def images(self, images, batch=64):
        """images: float (N, 3, H, W) in [-1, 1].  Returns: float32 (N, dim), CPU."""
        return torch.cat([self.network(pixels(chunk).to(self.device), return_features=True).float().cpu()
                          for chunk in images.split(batch)])


# ---- distances between two sets of features ----------------------------------------------------------------


GROUPS = 20  # of images, each left out once, for the correction of a Frechet distance and its interval


def least_images(dim):
    """The fewest images that a Frechet distance is reported from: the covariance of dim of them is
    singular, and so many have to be left when a group is taken out. With few more the plain
    estimate is far too high, so it goes nowhere without its N."""
    return next(n for n in itertools.count(dim + 2) if n - -(-n // GROUPS) > dim)


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), float64."""
    return features.double().mean(0), torch.cov(features.double().T)


def moments_without(features, groups):
    """moments of features (N, D) without every groups-th row, from the first on, then from the
    second on, and so on: from sums, so that all of them cost what one does.  Yields: (mean,
    covariance), `groups` times."""
    center = features.double().mean(0)                      # sums of squares about it lose no digits
    rows = features.double() - center
    total, squares = rows.sum(0), rows.T @ rows
    for part in (rows[g::groups] for g in range(groups)):
        n, left = len(rows) - len(part), total - part.sum(0)
        yield center + left / n, (squares - part.T @ part - torch.outer(left, left) / n) / (n - 1)


def covariance_root(covariance):
    """The symmetric root R of a covariance, R R = covariance. Both (D, D), float64."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two pairs (mean, covariance), as moments
    gives them. 0 for equal Gaussians. The trace of the root is the sum of the roots of the
    eigenvalues of C_b^(1/2) C_a C_b^(1/2). Of N images it is too high on average, by some c / N:
    real images against other real ones are not at 0. See frechet_groups."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = covariance_root(cov_b)
    cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.clamp_min(0).item()                     # rounding can leave -1e-12


def frechet_groups(features, reference, groups=GROUPS):
    """The Frechet distance without its bias, and what is needed for its error: pseudo-values of the
    grouped jackknife (Quenouille 1956, Tukey 1958), G F - (G - 1) F_g, where F is the distance of
    all images and F_g that without every G-th image and every G-th of the reference.
    Both sets shrink alike, so the bias c / N + c' / M of both goes; what remains is of order 1 /
    N^2.
    features, reference: (N, D), (M, D); the same images' rows in both are left out together, so
    sets that share noise are paired.
    Returns: list of min(G, N, M) floats. Their mean is the corrected distance, about 0 for equal
    distributions and then often negative; mean_interval of them its 95% interval over the images of
    both sets; a difference of two such lists, group by group, belongs to the difference of two
    models that share captions, noise and reference. Raises ValueError on fewer than
    least_images."""
    least = least_images(features.shape[1])
    if min(len(features), len(reference)) < least:
        raise ValueError(f"{len(features)} and {len(reference)} images: {features.shape[1]} features need "
                         f"{least} of each")
    groups = min(groups, len(features), len(reference))
    whole = frechet_distance(moments(features), moments(reference))
    left = map(frechet_distance, moments_without(features, groups), moments_without(reference, groups))
    return [groups * whole - (groups - 1) * value for value in left]


def mean_interval(values):
    """Mean and half the width of its 95% interval by Student's t; infinite for one value."""
    values = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return values.mean().item(), math.inf
    return values.mean().item(), stats.t.ppf(0.975,
                                             len(values) - 1) * (values.std() / len(values) ** 0.5).item()


def kernel_distance(a, b, seed=0, subset_size=1000):
    """KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al.
    2018), over 100 random subsets of up to subset_size images each. a, b: features (N, D) and (M,
    D).  Returns: (mean, standard deviation over the subsets). About 0 for equal distributions,
    where it is often negative; not multiplied by 1,000 as some tables are. Raises ValueError on
    fewer than two images."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} images: an unbiased distance needs two of each")
    # late: it costs two seconds
    kid = extra("KID", "torchmetrics.image.kid", "studies")

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # that it keeps what it is given
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance`", UserWarning)
        torch.manual_seed(seed)
        metric = kid.KernelInceptionDistance(torch.nn.Identity(), sync_on_compute=False,
                                             subset_size=min(subset_size, len(a), len(b)))
        metric.update(a.double(), real=True)
        metric.update(b.double(), real=False)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def cmmd(a, b, sigma=10.0, scale=1000.0, block=2048):
    """CMMD (Jayasumana et al. 2024): scale times the squared MMD between two sets of CLIP features
    (N, D) and (M, D), normalized here, with the kernel exp(-|x - y|^2 / (2 sigma^2)).
    Its authors' estimator: the mean over all pairs, each image with itself included.
    Returns: float >= 0, exactly 0 for a set with itself. Comparable with theirs only on their
    features, OpenAI's ViT-L/14 at 336 pixels."""
    a, b = (normalize(features.double(), dim=1) for features in (a, b))

    def mean(x, y):
        """Mean of kernel - 1 over all pairs: the ones cancel, and 1 +- 1e-2 would cost two digits.
        |x - y|^2 = 2 - 2 x.y here."""
        return sum(torch.expm1((p @ q.T - 1) / sigma ** 2).sum() for p in x.split(block)
                   for q in y.split(block)) / (len(x) * len(y))
    return scale * (mean(a, a) + mean(b, b) - 2 * mean(a, b)).item()


def clip_score(image_features, text_features):
    """100 x the mean cosine between each image and its caption. Both (N, D).
    Returns: float, in [-100, 100]."""
    return 100 * torch.cosine_similarity(image_features, text_features).mean().item()


# ---- trajectories ------------------------------------------------------------------------------------------
# A trajectory is compared in the velocity u = eps - x, which is dy/ds for y = z / (alpha + sigma), s = sigma
# / (alpha + sigma): the coordinates in which a chord is a straight line and a DDIM step an Euler step.
# The schedule's own curve counts as straight.


def chord_velocity(model, z_start, z_end, t_start, t_end):
    """u* = eps* - x* of the chord from z_start at t_start to z_end at t_end.
    z: (B, ...); t: numbers.  Returns: float64, where the device has that, else on the host."""
    z_start, z_end = (z.to(clock_device(z.device)) for z in (z_start, z_end))
    start, end = (model.coefficients(torch.tensor([t], dtype=torch.float64, device=z_start.device),
                                     z_start.ndim) for t in (t_start, t_end))
    x, eps = reflow.chord(z_start, z_end, start, end)       # float64 as the coefficients are
    return eps - x


@torch.no_grad()
def straightness(model, z, cond, windows, steps=8, guidance=1.0, uncond=None):
    """E int |(y_end - y_start) / (s_end - s_start) - dy/ds|^2 dt over each window, of the model's
    own trajectories: |u_hat - u*|^2, u* of the chord between the trajectory's ends in the window,
    averaged over elements, samples and time.
    model, cond, guidance, uncond: the contract of teacher.py; z: (B, ...) noise at t = 1;
    steps: of DDIM in each window, equal in t.
    Returns: list of K floats in sampling order, exactly 0 where (x_hat, eps_hat) is constant over
    the window. Raises ValueError if steps < 2: a single step is its own chord."""
    if steps < 2:
        raise ValueError(f"steps = {steps}: one step is straight, two at least show a bend")
    times, values = sampler.time_grid(steps * windows, windows), []
    for first in range(0, steps * windows, steps):
        part, visited = times[first:first + steps + 1], []
        z_end = sampler.ddim(model, z, part, cond, guidance, uncond, visited.append)
        chord = chord_velocity(model, z, z_end, part[0].item(), part[-1].item())
        u_hat = [(state["eps_hat"] - state["x_hat"]).to(chord.device) for state in visited]
        values.append(sum((u - chord).square().mean().item() for u in u_hat) / steps)
        z = z_end
    return values


@torch.no_grad()
def chord_error(model, path, cond, windows, guidance=1.0, uncond=None):
    """How far the model is from the teacher's chord where a sampler of one step per window evaluates it:
    root mean square of u_hat - u* at the start of each window, on the teacher's own point.
    path: (B, M+1, ...), the teacher's trajectory at the boundaries of M windows.
    Only where the model's path meets the schedule do the two speak of the same z: a model of
    PeRFlow's path is measured in its own windows.
    Returns: list of `windows` floats in sampling order. Raises ValueError unless windows divides
    M."""
    count = path.shape[1] - 1
    if count < 1 or windows < 1 or count % windows:
        raise ValueError(f"windows = {windows}: must divide the {count} windows of the path "
                         f"{tuple(path.shape)}")
    edges, points, values = reflow.boundaries(windows), path[:, ::count // windows], []
    clock = clock_device(path.device)
    for k in range(windows):
        z_start, z_end = points[:, k], points[:, k + 1]
        t = torch.full((len(path),), edges[k], dtype=torch.float64, device=clock)
        x_hat, eps_hat = model(z_start, t, cond, guidance, uncond)
        chord = chord_velocity(model, z_start, z_end, edges[k], edges[k + 1])
        values.append(((eps_hat - x_hat).to(clock) - chord).square().mean().sqrt().item())
    return values


# ---- python -m evaluation.metrics --------------------------------------------------------------------------


def demo(n=4000, dim=8):
    """Every distance where its value is known, in seconds."""
    noise = torch.randn(3, n, dim, generator=seeds.generator(0, "demo"), dtype=torch.float64)
    a, again, b = noise[0], noise[1], 2 * noise[2] + 0.5              # N(0, 1) twice, and N(0.5, 4)

    exact = dim * (0.5 ** 2 + (2 - 1) ** 2)                           # |m_a - m_b|^2 + sum of (s_a - s_b)^2
    same, other = (frechet_distance(moments(a), moments(x)) for x in (again, b))
    (zero, near), (mean, half) = (mean_interval(frechet_groups(a, x)) for x in (again, b))
    print(f"Frechet distance: N(0, 1) twice {same:.3f}, N(0, 1) and N(0.5, 4) {other:.2f}; corrected "
          f"{zero:.3f} ± {near:.3f} and {mean:.2f} ± {half:.2f}; exact 0 and {exact:g}")
    assert frechet_distance(moments(a),
                            moments(a)) < 1e-9 and same < 0.05 and abs(zero) < near and abs(
                                mean - exact) < half

    same, other = (kernel_distance(a[:500], x[:500])[0] for x in (again, b))
    print(f"kernel distance (KID): N(0, 1) twice {same:.4f}, N(0, 1) and N(0.5, 4) {other:.2f}; 0 is "
          "expected of the first")
    assert abs(same) < 0.05 < 1 < other

    points = torch.eye(2, dtype=torch.float64)  # two unit vectors at a distance of sqrt(2)
    exact = 1000 * (2 - 2 * math.exp(-2 / (2 * 10 ** 2)))
    found = cmmd(points[:1].repeat(30, 1), points[1:].repeat(20, 1))
    print(f"CMMD: a set with itself {cmmd(b[:500], b[:500]):g}; 30 images at one point and 20 at another "
          f"{found:.6f}, exact {exact:.6f}")
    assert cmmd(b[:500], b[:500]) == 0 and abs(found - exact) < 1e-9


if __name__ == "__main__":
    demo()
