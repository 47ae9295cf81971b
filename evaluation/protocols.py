"""Protocols are data: what is measured against what; and the options of eval.py that change one."""
import dataclasses
from dataclasses import dataclass, field

import sampler
import teacher
from data import drawn
from models import load
from runtime import cli
from runtime.cli import UserError

VIT_G = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"

# ---- protocols are data ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """What is measured against what. Options of the same names override the fields from n on."""
    split: str                   # where captions and real images come from: a row of drawn.SOURCES, or a
                                 # split of COCO
    rule: str                    # which caption of an image, a row of coco.RULES
    network: str                 # whose features FD (FID) and KD (KID) compare: clip, judge or inception
    images_per_feature: int      # fewer images than this for each feature are refused;
                                 # and in any case as many as features
    fid_size: int | None         # pixels at which the networks see both sets; None = as generated
    n: int                       # images generated per row
    real: int                    # images of the reference
    clip: str                    # CLIPModel of CLIP score and CMMD
    judge: str                   # network that says whether pictures follow their prompts; "" where none can
    teacher: str                 # where no student names one
    guidance: float
    size: int | None             # pixels of a generated image; None = what the model was made for
    batch: int
    paths: int                   # trajectories that straightness, endpoint and chord error are measured on
    note: str                    # where this comes from, and what of the papers' protocols is unknown


COCO_2017 = Protocol(
    split="val2017", rule="first", network="inception", images_per_feature=1, fid_size=None, n=5000,
    real=5000, clip=VIT_G, judge="", teacher="sd15", guidance=1.5, size=512, batch=16, paths=64,
    note="split, caption, resize and crop as in Rectified Diffusion's scripts, which sample phased students "
         "at guidance 1.5 in fp16 and use pytorch_fid, while ProReflow's guidance is unknown but for its "
         "ablation (4), and so are its seeds and dtype")

PROTOCOLS = {
    "tiny": Protocol(split="scenes", rule="", network="judge", images_per_feature=5, fid_size=None, n=2048,
                     real=8192, clip=str(load.ASSETS / "tiny-clip"), judge=str(load.ASSETS / "judge"),
                     teacher="tiny", guidance=1.0, size=None, batch=64, paths=128, note="ours"),
    "pixel": Protocol(split="scenes-by-group", rule="", network="judge", images_per_feature=5, fid_size=64,
                      n=2048, real=8192, clip=str(load.ASSETS / "tiny-clip"),
                      judge=str(load.ASSETS / "judge"), teacher="pixel", guidance=1.0, size=16, batch=64,
                      paths=128, note="ours"),
    "coco2017-5k": COCO_2017,
    "sdxl-coco2017-5k": dataclasses.replace(COCO_2017, teacher="sdxl", size=1024, batch=4, paths=16),
    "coco2014-30k": dataclasses.replace(
        COCO_2017, split="val2014", rule="seeded", fid_size=256, n=30000, real=30000, size=None,
        note="256 pixels as in DMD2's script, while the 30,000 images and captions, the real images being "
             "those of the captions, and the guidance are ours: which ones the papers used is unknown"),
}


@dataclass
class Config:
    run: str = field(default="", metadata=dict(positional=True))  # folder with student-* folders, at any
                                                                  # depth
    protocol: str = "tiny"      # tiny, pixel, coco2014-30k, coco2017-5k or sdxl-coco2017-5k;
                                # its row of PROTOCOLS fills in the rest
    data: str = ""              # folder of COCO as it is distributed: annotations/captions_val2017.json,
                                # val2017/*.jpg, or 2014
    n: int | None = None        # images per row; torchrun takes --n for its own, unless there is a -- before
                                # eval.py
    real: int | None = None     # real images of the reference
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])  # of the students; fewer than its windows are
                                                                 # left out
    ddim_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # of the untrained student
    solver: str = "ddim"        # of the students: SOLVER[:r][/GRID[:kappa]] of sampler.py's, e.g.
                                # dpm2:0.4/sigmoid:20
    solvers: list[str] = field(default_factory=lambda: ["ddim"])  # of the untrained student, one or more of
                                                                  # these
    teacher_steps: int = 32     # of the teacher
    teacher: str = ""           # folder, hub id or preset; default: what the students name
    guidance: float | None = None  # 1 = none; default: what the students have learned, else the protocol's.
                                   # Students that have learned one are called at 1
    guide: str = ""             # a weaker model, e.g. an earlier student: --guidance leads away from it, not
                                # from no text (autoguidance)
    size: int | None = None     # pixels of a generated image, square
    dtype: str = "fp32"         # of the networks: fp32, bf16 or fp16
    seed: int = 1_000_000       # of the first image
    batch: int | None = None    # images generated at a time; at most 64
    paths: int | None = None    # trajectories to measure straightness, endpoint and chord error on
    clip: str = ""              # CLIPModel folder or hub id
    judge: str = ""             # folder of the judge of scenes; only where the protocol has one
    inception: str = ""         # TorchScript file of the Inception network; default: downloaded
    cache: str = "runs/eval"    # features of real and generated images, shared by all runs
    save_images: str = ""       # folder to keep the images in as PNGs, reference and generated, for another's
                                # FID tool
    device: str = ""            # cpu, cuda, mps or xpu; default: cuda if there is one


def resolve(c):
    """A Config with everything filled in that its protocol decides.  Returns: (c, Protocol).
    Raises UserError."""
    protocol = cli.choose("--protocol", c.protocol, PROTOCOLS)
    options = ("n", "real", "clip", "judge", "teacher", "guidance", "size", "batch", "paths")
    c = dataclasses.replace(c,
                            **{name: getattr(protocol, name) for name in options
                               if getattr(c, name) in (None, "")},
                            # a row twice would be two comparisons
                            **{name: list(dict.fromkeys(getattr(c, name)))
                               for name in ("steps", "ddim_steps", "solvers")})
    cli.at_least(c, seed=0, guidance=0, batch=1, paths=1, steps=1, ddim_steps=1, teacher_steps=1, size=1, n=1,
                 real=1)
    teacher.check_guide(c.guide, c.guidance)
    cli.choose("--dtype", c.dtype, teacher.DTYPES)
    for solver in (c.solver, *c.solvers):
        sampler.parse_solver(solver)
    if c.judge and not protocol.judge:
        raise UserError(f"--judge {c.judge}: it knows the embedded scenes alone, --protocol {c.protocol} has "
                        "other pictures; leave it out")
    if protocol.split in drawn.SOURCES and c.data:
        raise UserError(f"--data {c.data}: --protocol {c.protocol} has its own images; leave it out, or give "
                        "another --protocol")
    if protocol.split not in drawn.SOURCES and not c.data:
        raise UserError(f"--protocol {c.protocol}: needs COCO; give --data FOLDER, with "
                        f"annotations/captions_{protocol.split}.json and {protocol.split} in it")
    return c, protocol
