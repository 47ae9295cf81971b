"""Every network family behind the same few names. The rest of the project calls these, and never
looks inside a pipeline.

A family is a module with: NETWORK and CLASS (the component that is distilled and its class in
diffusers), TEXT_ENCODERS, LORA_LAYERS, and the functions check, forward, encode_text, encode,
decode, native_size, has_null, prompts, blocks, with_scheduler, stock_call, stock_notes,
meta_condition. docs/extending.md says what each must do.
"""
from models import pixel, stable_diffusion
from models.configs import read_schedule
from runtime.cli import UserError
from teacher import Model

FAMILIES = (stable_diffusion, pixel)


def family(pipeline):
    """The module of a pipeline's family.  Raises UserError if we know none for its network."""
    for module in FAMILIES:
        if isinstance(getattr(pipeline, module.NETWORK, None), module.CLASS):
            return module
    known = ", ".join(f"{module.NETWORK} of class {module.CLASS.__name__}" for module in FAMILIES)
    found = ", ".join(f"{name} {type(part).__name__}" for name, part in pipeline.components.items()
                      if part is not None)
    raise UserError(f"{type(pipeline).__name__} is of no family that we know ({known}); it has {found}")


def family_of(network):
    """The module of a network's family."""
    return next(module for module in FAMILIES if isinstance(network, module.CLASS))


def network(pipeline):
    """The network that is distilled."""
    return getattr(pipeline, family(pipeline).NETWORK)


def as_model(pipeline, network=None, path=None, windows=1):
    """The pipeline's schedule and prediction type around `network` (default: its own), under the
    contract of teacher.py: cond is what encode_text returns, z may have another dtype than the
    network."""
    module = family(pipeline)
    network = getattr(pipeline, module.NETWORK) if network is None else network
    return Model(module.forward(network), *read_schedule(pipeline.scheduler), path, windows)


def other_tools(pipeline, function):
    """What a family knows about files of other tools: kohya_layers(network), layer -> its name in a
    LoRA, or single_file(pipeline), (name -> tensor, metadata).
    Raises UserError where the family has no such file."""
    module = family(pipeline)
    if not hasattr(module, function):
        raise UserError(f"{type(pipeline).__name__}: other tools have no such file for it; use the folder, "
                        "which diffusers reads")
    return getattr(module, function)


# ---- text, pictures ----------------------------------------------------------------------------------------


def encode_text(pipeline, prompts, batch=64, null="auto", size=None, device="cpu"):
    """What the network is conditioned on. prompts: list of N strings, or None for the null
    embedding, what an unconditional call sees. null: "empty" encodes "", "zeros" gives zeros,
    "auto" does what the model was made for.
    size: (H, W) in pixels, for networks that are told; default: the model's own.
    Returns: dict of tensors (N, ...) on device, {} for an unconditional model.
    Warns of text beyond the encoder's length.
    Raises UserError on what the model cannot be conditioned on, and on an embedding that is not
    finite."""
    return family(pipeline).encode_text(pipeline, prompts, batch, null, size, device)


def decode(pipeline, z, batch=64):
    """Latents to pictures. z: (B, C, h, w), scaled as the network sees it.  Returns: float32 (B, 3,
    H, W) in [-1, 1], CPU.
    Raises UserError on a picture that is not finite."""
    return family(pipeline).decode(pipeline, z, batch)


def encode(pipeline, images, batch=64):
    """Pictures to latents, the autoencoder's mean. images: (B, 3, H, W) in [-1, 1].
    Returns: float32 (B, C, h, w), on the model's device.  Raises UserError on a latent that is not
    finite."""
    return family(pipeline).encode(pipeline, images, batch)


def native_size(pipeline):
    """(H, W) in pixels the network was made for.  Raises UserError if its config does not say."""
    return family(pipeline).native_size(pipeline)


def latent_shape(pipeline, size=None):
    """(C, h, w) of the latents. size: of the picture in pixels, (H, W) or one int for both;
    default: what the network was made for.  Raises UserError unless the network's levels divide
    it."""
    module = family(pipeline)
    channels, factor, multiple = module.latent_geometry(pipeline)
    height, width = native_size(pipeline) if size is None else (size, size) if isinstance(size, int) else size
    for side in (height, width) if size is not None else ():
        if side < 1 or side % multiple:
            low = side // multiple * multiple
            near = f"{low} or {low + multiple}" if low > 0 else f"{multiple}"
            raise UserError(f"--size {side}: must be a multiple of {multiple} for this model, for instance "
                            f"{near}")
    return channels, height // factor, width // factor


def prompts(pipeline):
    """What may stand for a prompt: "text", "class", or "" for an unconditional model."""
    return family(pipeline).prompts(pipeline)


def has_null(pipeline):
    """True if the model can be evaluated without a prompt, which guidance and dropped captions
    need."""
    return family(pipeline).has_null(pipeline)


def check_null(pipeline, guidance, text_dropout=0.0):
    """Raises UserError if a model without null embedding is to be guided, or to be trained with
    dropped captions."""
    if has_null(pipeline):
        return
    unconditional = not prompts(pipeline)
    if guidance != 1:
        raise UserError(f"guidance {guidance:g}: this model "
                        f"{'is unconditional' if unconditional else 'has no null class'}; use guidance 1")
    if text_dropout > 0 and not unconditional:
        raise UserError(f"--text-dropout {text_dropout:g}: this model has no null class for the dropped "
                        "captions; use --text-dropout 0")


# ---- the frozen networks beside it -------------------------------------------------------------------------


def text_encoders(pipeline):
    """Those that the pipeline has, and that have not been dropped."""
    return [part for part in (getattr(pipeline, name, None) for name in family(pipeline).TEXT_ENCODERS)
            if part is not None]


def autoencoder(pipeline):
    """[the autoencoder], or [] where there is none."""
    return [part for part in [getattr(pipeline, "vae", None)] if part is not None]


def parameters(pipeline):
    """How many numbers all of its networks hold."""
    networks = network(pipeline), *autoencoder(pipeline), *text_encoders(pipeline)
    return sum(p.numel() for each in networks for p in each.parameters())


def drop_encoders(pipeline, decoding):
    """They leave memory once everything that they would be given is cached. decoding: pictures will
    still be drawn."""
    for name in (*family(pipeline).TEXT_ENCODERS, *["vae"] * (not decoding)):
        if hasattr(pipeline, name):
            setattr(pipeline, name, None)


def fingerprint(*modules):
    """A few digits that change with the weights: a cache made by other networks is refused."""
    return format(sum(p.double().abs().sum().item() for module in modules for p in module.parameters()),
                  ".10g")
