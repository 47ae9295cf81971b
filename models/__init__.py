"""Every network family behind the same few names. The rest of the project calls these, and never
looks inside a pipeline.

A family is a module with: NETWORK and CLASS (the component that is distilled and its class in
diffusers), TEXT_ENCODERS, LORA_LAYERS, FLOW, and the functions required, complete, check, blocks,
forward, prompts, has_null, embed_guidance, encode_text, encode, decode, native_size,
set_native_size, latent_geometry, as_student, stock_call, stock_notes, meta_condition.
docs/extending.md says what each must do, and which others it may have.
"""
from models import dit, flux, pixart, pixel, sana, sd3, stable_diffusion, text, zimage
from models.configs import is_flow, read_schedule
from runtime.cli import UserError
from teacher import Model, clock_device

FAMILIES = (stable_diffusion, pixel, sd3, flux, zimage, dit, pixart, sana)

# the networks that a pipeline may have, whatever its family
NETWORKS = tuple(dict.fromkeys(name for module in FAMILIES
                               for name in (module.NETWORK, "vae", *module.TEXT_ENCODERS)))
TEXT_ENCODERS = tuple(name for name in NETWORKS if name.startswith("text_encoder"))
NOT_TEXT = tuple(name for name in NETWORKS if name not in TEXT_ENCODERS)
# those that are not distilled: load_pipeline(name, **dict.fromkeys(BESIDE)) reads the others alone
BESIDE = tuple(name for name in NETWORKS if name not in {module.NETWORK for module in FAMILIES})


def family(pipeline):
    """The module of a pipeline's family.  Raises UserError if we know none for its network."""
    for module in FAMILIES:
        if isinstance(getattr(pipeline, module.NETWORK, None), module.CLASS):
            return module
    known = ", ".join(f"{module.NETWORK} of class {module.CLASS.__name__}" for module in FAMILIES)
    found = ", ".join(f"{name} {type(part).__name__}" for name, part in pipeline.components.items()
                      if part is not None)
    raise UserError(f"{type(pipeline).__name__} is of no family that we know ({known}); it has {found}; give "
                    "a model of one of these")


def family_of(network):
    """The module of a network's family."""
    return next(module for module in FAMILIES if isinstance(network, module.CLASS))


def network(pipeline):
    """The network that is distilled."""
    return getattr(pipeline, family(pipeline).NETWORK)


def schedule(pipeline):
    """(schedule, prediction type) of a pipeline, as read_schedule has them; a dynamic shift is that of
    the pipeline's own size.  Raises UserError where its scheduler contradicts its network."""
    module, scheduler = family(pipeline), pipeline.scheduler
    if is_flow(scheduler) != module.FLOW:
        kinds = ["diffusion with betas or in EDM's form", "flow matching"]
        raise UserError(f"its {type(scheduler).__name__} is for {kinds[is_flow(scheduler)]}, its "
                        f"{module.CLASS.__name__} for {kinds[module.FLOW]}; name the scheduler that the "
                        "model was made with in model_index.json")

    def tokens():
        _, height, width = latent_shape(pipeline)
        return height // 2 * (width // 2)                  # 2 x 2 latents each, in all that shift so
    return read_schedule(scheduler, tokens)


def as_model(pipeline, network=None, path=None, windows=1):
    """The pipeline's schedule and prediction type around `network` (default: its own), under the
    contract of teacher.py: cond is what encode_text returns, z may have another dtype than the
    network."""
    module = family(pipeline)
    network = getattr(pipeline, module.NETWORK) if network is None else network
    return Model(module.forward(network), *schedule(pipeline), path, windows)


def other_tools(pipeline, function):
    """What a family knows about files of other tools: kohya_layers(network), layer -> its name in a
    LoRA, or single_file(pipeline), (name -> tensor, metadata): of a UNet's family the whole
    pipeline, of a transformer's the transformer.
    Raises UserError where the family has no such file."""
    module = family(pipeline)
    if not hasattr(module, function):
        raise UserError(f"{type(pipeline).__name__}: other tools have no such file for it; use the folder, "
                        "which diffusers reads")
    return getattr(module, function)


def file_holds_text(pipeline):
    """Whether a single file of this family holds its text encoders."""
    return family(pipeline).NETWORK == "unet"


# ---- text, pictures ----------------------------------------------------------------------------------------


def encode_text(pipeline, prompts, batch=64, null="auto", size=None, device="cpu", part=None):
    """What the network is conditioned on. prompts: list of N strings, or None for the null
    embedding, what an unconditional call sees. null: "empty" encodes "", "zeros" gives zeros,
    "auto" does what the model was made for.
    size: (H, W) in pixels, for networks that are conditioned on it; default: the model's own.
    part: one of encoded_apart, which alone is run, for join_text.
    Returns: dict of tensors (N, ...) on device, {} for an unconditional model.
    Warns of text beyond the encoder's length.
    Raises UserError on what the model cannot be conditioned on, and on an embedding that is not
    finite."""
    module, names = family(pipeline), [part] if part else encoded_apart(pipeline)
    if not names:
        return module.encode_text(pipeline, prompts, batch, null, size, device)

    def chunk(texts):
        found = {name: module.encode_part(pipeline, name, texts) for name in names}
        return found[part] if part else module.join(pipeline, found)
    return text.encode(chunk, prompts, batch, null, device)


def encoded_apart(pipeline):
    """The names of its text encoders where each can encode without the others being in memory, [] where
    encode_text runs all at once."""
    module = family(pipeline)
    return [name for name in module.TEXT_ENCODERS
            if hasattr(module, "encode_part") and getattr(pipeline, name, None) is not None]


def join_text(pipeline, parts):
    """parts: {name: what encode_text gives for this part}, for all of encoded_apart, or {None: what it
    gives without}, or {}.  Returns: what encode_text gives without a part."""
    return family(pipeline).join(pipeline, parts) if any(parts) else parts.get(None, {})


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


def set_native_size(pipeline, size):
    """Make a size (pixels, square) the pipeline's own: of pictures whose size is not named, and of a
    schedule that depends on it.  Raises UserError if it is none of its sizes."""
    latent_shape(pipeline, size)
    family(pipeline).set_native_size(pipeline, size)


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


def embed_guidance(pipeline, guidance, between=None):
    """Tell a network that takes guidance as an input how much; all evaluations of the pipeline are
    then made with it, 1 being the model's own. between: (low, high) that it is drawn from in
    training, whose middle is then taken.  Returns: what is left for classifier-free guidance, 1 where
    guidance is an input."""
    return family(pipeline).embed_guidance(pipeline, sum(between) / 2 if between else guidance)


def check_null(pipeline, guidance, text_dropout=0.0):
    """Raises UserError if a model without null embedding is to be guided, or to be trained with
    dropped captions."""
    if has_null(pipeline):
        return
    kind = prompts(pipeline)
    why = {"": "is unconditional", "class": "has no null class",
           "text": "has its guidance distilled in"}[kind]
    if guidance != 1:
        raise UserError(f"guidance {guidance:g}: this model {why}; use guidance 1")
    if text_dropout > 0 and kind:
        raise UserError(f"--text-dropout {text_dropout:g}: this model {why}, and no use for dropped "
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
    return format(sum(p.to(clock_device(p.device)).double().abs().sum().item()
                      for module in modules for p in module.parameters()), ".10g")
