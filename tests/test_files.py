"""Files for other tools: every name is one that they know, and what is read back is what was written, to the bit."""
import dataclasses
import itertools
import json
import re
import shutil

import diffusers
import pytest
import torch
from conftest import slow
from diffusers.loaders import lora_conversion_utils as lora_readers
from diffusers.loaders import single_file_utils as readers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import latents, stock_latents, students, teachers  # noqa: F401  fixtures
from test_life import ROWS
from test_teacher import original_layout
from test_train import small

import export
import models
import teacher
import train
from models import architectures, load
from runtime.cli import UserError

# as published: tensors of the UNet, layers inside its blocks
PUBLISHED = {"sd15": (686, 278), "sd21": (686, 278), "sdxl": (1680, 788)}


@pytest.fixture(scope="module", params=PUBLISHED)
def full(request):
    """(name, pipeline) of a published architecture at its full size, on the meta device."""
    return request.param, architectures.build(request.param, weights=False)


def test_the_single_file_of_a_full_architecture_is_what_diffusers_reads(full):
    name, pipeline = full
    weights, _ = models.other_tools(pipeline, "single_file")(pipeline)
    unet = {key.removeprefix("model.diffusion_model."): value for key, value in weights.items() if key.startswith("model.")}
    assert len(unet) == PUBLISHED[name][0]
    for part, convert in (("unet", readers.convert_ldm_unet_checkpoint), ("vae", readers.convert_ldm_vae_checkpoint)):
        network = getattr(pipeline, part)
        found, expected = convert(dict(weights), dict(network.config)), network.state_dict()
        assert {key: value.squeeze().shape for key, value in found.items()} == {key: value.squeeze().shape for key, value in expected.items()}


def adapted(unet):
    """The layers that a LoRA run adapts."""
    return [name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
            and name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")]


def test_every_layer_has_a_name_that_comfyui_and_kohya_know(full):
    """ComfyUI and Forge build theirs from the original names and from diffusers', kohya from diffusers' for 1.x and 2.x and from the
    original ones for XL; AUTOMATIC1111 needs kohya's. Points become underscores."""
    name, pipeline = full
    layers, rename = adapted(pipeline.unet), models.other_tools(pipeline, "kohya_layers")(pipeline.unet)
    original, _ = models.other_tools(pipeline, "single_file")(pipeline)
    known = {key.removeprefix("model.diffusion_model.").removesuffix(".weight") for key in original if key.startswith("model.")}
    names = {rename(layer) for layer in layers}
    assert len(layers) == len(names) == PUBLISHED[name][1]
    assert names <= known if name == "sdxl" else names == set(layers)
    assert len({each.replace(".", "_") for each in names}) == len(names)


def test_diffusers_reads_the_kohya_names_of_a_full_architecture_back(full):
    name, pipeline = full
    layers, rename = adapted(pipeline.unet), models.other_tools(pipeline, "kohya_layers")(pipeline.unet)
    keys = {f"lora_unet_{rename(layer).replace('.', '_')}.{part}": torch.ones(1) for layer in layers
            for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    keys = lora_readers._maybe_map_sgm_blocks_to_diffusers(keys, pipeline.unet.config) if name == "sdxl" else keys
    found, alphas = lora_readers._convert_non_diffusers_lora_to_diffusers(keys)
    found = {re.sub(r"\.processor|_lora|\.lora", "", key.removeprefix("unet.")).replace("to_out.", "to_out.0.").rsplit(".", 2)[0] for key in found}
    assert found == set(layers) and len(alphas) == len(layers)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_single_file_is_the_layout_that_others_write(small_models, family):
    expected, pipeline = original_layout(small_models[family]), load.load_pipeline(str(small_models[family]))
    weights, metadata = models.other_tools(pipeline, "single_file")(pipeline)
    marks = {"v_pred"} if family == "sd21" else set()
    assert weights.keys() == expected.keys() | marks
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert metadata["modelspec.prediction_type"] == ("v" if family == "sd21" else "epsilon")


@pytest.mark.parametrize("family", ["sd15", slow("sd21"), slow("sdxl")])
def test_a_single_file_is_read_back_to_the_bit_in_every_precision(students, family, tmp_path):  # noqa: F811
    folder = students(family) / "student-2"
    for word, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        file = tmp_path / f"{word}.safetensors"
        export.export_single_file(export.FileConfig(str(folder), str(file), word))
        assert {value.dtype for value in load_file(file).values()} == {dtype}
        back, student = load.load_pipeline(str(file), dtype, model_config=str(folder)), load.load_pipeline(str(folder))
        for part in ("unet", "vae", "text_encoder", *["text_encoder_2"] * (family == "sdxl")):
            found, expected = (dict(getattr(p, part).named_parameters()) for p in (back, student))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name].to(dtype), value.to(dtype)) for name, value in expected.items()), (word, part)
        assert models.as_model(back).prediction == models.as_model(student).prediction
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["info"])["windows"] == 2


@pytest.mark.parametrize("family", [slow("sd15"), "sdxl"])
def test_a_kohya_file_on_the_teacher_is_the_student(students, teachers, family, tmp_path):  # noqa: F811
    folder, file = students(family, lora=3) / "student-2", tmp_path / "lora.safetensors"
    export.export_kohya(export.FileConfig(str(folder), str(file), "fp32"))
    weights = load_file(file)
    assert {name.split(".", 1)[1] for name in weights} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(weights[name] == 3 for name in weights if name.endswith("alpha"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(teachers[family])
    pipeline.scheduler = diffusers.DiffusionPipeline.from_pretrained(folder).scheduler
    before = stock_latents(pipeline, 2, 1.0)
    pipeline.load_lora_weights(file)
    after = stock_latents(pipeline, 2, 1.0)
    assert (after - latents(folder, 2, 1.0)).abs().max() <= 1e-4 < (after - before).abs().max()


def test_a_second_lora_adds_to_the_students(students, teachers, tmp_path):  # noqa: F811
    """In diffusers, with scales: W + B A + 0.5 B' A', where the second is the first with other numbers."""
    folder, pipeline = students("sd15", lora=3) / "student-2", diffusers.DiffusionPipeline.from_pretrained(teachers["sd15"])
    export.export_kohya(export.FileConfig(str(folder), str(tmp_path / "a.safetensors"), "fp32"))
    first = load_file(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    save_file({name: value if "alpha" in name else 0.1 * torch.randn_like(value) for name, value in first.items()}, tmp_path / "b.safetensors")
    both, network = [load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors")], pipeline.unet
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0]), torch.randn(2, 5, network.config.cross_attention_dim)
    merged = load.load_pipeline(str(teachers["sd15"])).unet
    for scale, weights in zip((1.0, 0.5), both):
        for name in (name for name in merged.state_dict() if name.endswith(".weight")):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            if f"{key}.alpha" in weights:
                up, down = weights[f"{key}.lora_up.weight"], weights[f"{key}.lora_down.weight"]
                merged.state_dict()[name].add_(scale * (up.flatten(1) @ down.flatten(1)).view(merged.state_dict()[name].shape))
    for name in ("a", "b"):
        pipeline.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
    pipeline.set_adapters(["a", "b"], [1.0, 0.5])
    with torch.no_grad():
        assert torch.allclose(network(*inputs).sample, merged(*inputs).sample, atol=1e-4)


def test_a_run_leaves_the_files_it_is_asked_for_beside_each_student(teachers, tmp_path):  # noqa: F811
    c = small(teachers["sd15"], tmp_path / "run", windows=[2], updates=2, lora=2, lr=1e-3, export=["diffusers", "kohya", "single-file"],
              export_dtype="fp32")
    folder = train.main(c)
    file = folder.with_name("student-2.safetensors")
    assert load_file(folder.with_name("student-2-lora.safetensors")).keys() > {"lora_unet_mid_block_resnets_0_conv1.alpha"}
    back, student = (load.load_pipeline(str(file), model_config=str(folder)), load.load_pipeline(str(folder)))
    assert all(torch.equal(value, student.unet.state_dict()[name]) for name, value in back.unet.state_dict().items())
    for changes, said in ((dict(lora=0, export=["kohya"]), "--lora RANK"), (dict(export=["ckpt"]), "--export ckpt: not one of"),
                          (dict(export=["single-file"], model="pixel"), "--export single-file: .*other tools")):
        with pytest.raises(UserError, match=said):
            export.check_files(dataclasses.replace(c, **changes), load.load_pipeline(changes.get("model", str(teachers["sd15"]))))


def test_what_no_file_can_hold_is_refused(students, tmp_path):  # noqa: F811
    folder, here = students("sd15") / "student-2", tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="trained in every weight"):
        export.export_kohya(export.FileConfig(str(folder), str(here)))
    with pytest.raises(UserError, match="OUT x.ckpt: name a .safetensors file"):
        export.export_kohya(export.FileConfig(str(folder), "x.ckpt"))
    with pytest.raises(UserError, match="other tools have no such file"):
        models.other_tools(load.load_pipeline("pixel"), "single_file")
    tiny = load.load_pipeline("tiny")
    with pytest.raises(UserError, match="cannot hold its AutoencoderTiny"):
        models.other_tools(tiny, "single_file")(tiny)
    with pytest.raises(UserError, match="not finite in torch.float16; write it in bf16 or fp32"):
        export.write_file(here, {"w": torch.tensor([7e4])}, {}, {}, torch.float16)
    assert not here.exists()
    export.export_single_file(export.FileConfig(str(folder), str(here)))
    with pytest.raises(UserError, match="exists already"):
        export.export_single_file(export.FileConfig(str(folder), str(here)))


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """transformers(name): (folder of a tiny pipeline, the weights of its transformer, the pipeline)."""
    made = {}

    def make(name):
        if name not in made:
            pipeline, folder = ROWS[name].make(), tmp_path_factory.mktemp("transformer") / "whole"
            pipeline.save_pretrained(folder)
            made[name] = folder, {key: value.contiguous() for key, value in pipeline.transformer.state_dict().items()}, pipeline
        return made[name]
    return make


def original_transformer(pipeline):
    return models.other_tools(pipeline, "single_file")(pipeline)[0]


@pytest.mark.parametrize("name, original", [("sd3", True), ("sd35 without t5", True), ("zimage", True),
                                            *((name, False) for name in ("sd3", "zimage", "flux", "flux-schnell", "sana"))])
def test_a_single_file_of_a_transformer_is_the_model_of_its_folder(transformers, tmp_path, name, original):
    """In the original layout where that is readable at this size (diffusers knows FLUX.1's at 3072 channels alone), and in diffusers'."""
    (folder, state, pipeline), file = transformers(name), tmp_path / "x.safetensors"
    beside = {"vae.decoder.x": torch.ones(1), "text_encoders.t5xxl.scaled_fp8": torch.ones(1)}        # as in files of a whole pipeline
    save_file({**original_transformer(pipeline), **beside} if original else state, file)
    dtype = torch.float32 if original else torch.bfloat16
    ours, whole = load.load_pipeline(str(file), dtype, model_config=str(folder)), load.load_pipeline(str(folder), dtype)
    assert type(ours) is type(whole)
    for part in ("transformer", "vae", *models.family(whole).TEXT_ENCODERS):
        found, expected = ({} if getattr(p, part) is None else getattr(p, part).state_dict() for p in (ours, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items()), part
    ours.transformer.save_pretrained(tmp_path / "again")
    assert all(torch.equal(load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")[key], value.to(dtype))
               for key, value in state.items())
    others = dict.fromkeys(models.BESIDE)
    assert next(load.load_pipeline(str(file), model_config=str(folder), empty=["transformer"], **others).transformer.parameters()).is_meta
    assert load.load_pipeline(str(file), model_config=str(folder), transformer=whole.transformer, **others).transformer is whole.transformer


def test_a_single_file_of_a_transformer_is_whole_and_its_configs_or_refused(transformers, tmp_path):
    file = tmp_path / "x.safetensors"

    def refused(said, weights, config=""):
        save_file(weights, file)
        with pytest.raises(UserError, match=said) as caught:
            load.load_pipeline(str(file), model_config=str(config))
        assert "\n" not in str(caught.value)
    (sd3, _, whole), (zimage, _, other), (pixart, third, _) = transformers("sd3"), transformers("zimage"), transformers("pixart")
    original, z_original = original_transformer(whole), original_transformer(other)
    refused("SD3, FLUX.1, Z-Image or SANA needs --model-config FOLDER", original)
    without = {key: value for key, value in original.items() if not key.endswith("mlp.0.bias")}
    refused("not the SD3Transformer2DModel of --model-config .*KeyError", without, sd3)
    refused("not the ZImageTransformer2DModel of .*Missing key.*x_pad_token",
            {key: value for key, value in z_original.items() if not key.endswith("x_pad_token")}, zimage)
    # a network of more blocks, or of dev's guidance, is another one
    refused("not the ZImageTransformer2DModel of .*Unexpected key.*layers.7", {**z_original, "layers.7.w": torch.ones(1)}, zimage)
    refused("not the FluxTransformer2DModel of ", transformers("flux")[1], transformers("flux-schnell")[0])
    refused("not the SD3Transformer2DModel of ", z_original, sd3)
    refused("quantized .*joint_blocks.0.x.scale_weight.*bf16", {**original, "joint_blocks.0.x.scale_weight": torch.ones(1)}, sd3)
    refused("diffusers reads none for the PixArt.*Pipeline of --model-config", third, pixart)


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_a_missing_text_encoder_is_named_in_one_line(transformers, tmp_path, name):
    whole, folder = transformers(name)[0], tmp_path / "m"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match="its text_encoder is missing: no .safetensors file in .*m/text_encoder; download") as caught:
        load.load_pipeline(str(folder))
    assert "\n" not in str(caught.value)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    with pytest.raises(UserError, match="Pipeline lacks its text_encoder; download it again, whole$"):
        load.load_pipeline(str(folder))


# tensors of the transformer's file
TRANSFORMERS = {"sd3": 491, "sd35-medium": 665, "sd35": 923, "flux": 780, "flux-schnell": 776, "zimage": 453}
CONVERT = {"sd3": readers.convert_sd3_transformer_checkpoint_to_diffusers, "flux": readers.convert_flux_transformer_checkpoint_to_diffusers,
           "zimage": readers.convert_z_image_transformer_checkpoint_to_diffusers}


@pytest.mark.parametrize("name", ["sd3", slow("sd35-medium"), slow("sd35"), "flux", slow("flux-schnell"), "zimage"])
def test_the_file_of_a_full_transformer_is_what_diffusers_reads(name):
    """Every row of every matrix in its place, at the published sizes: column 0 holds the row's number."""
    pipeline = architectures.build(name, weights=False)
    shapes, network = {key: value.shape for key, value in pipeline.transformer.state_dict().items()}, pipeline.transformer
    numbers = itertools.count()
    state = {key: next(numbers) + torch.linspace(0, 0.5, shape[0])[:, None] for key, shape in shapes.items()}
    network.state_dict = lambda: dict(state)
    file = original_transformer(pipeline)
    assert len(file) == TRANSFORMERS[name] and all(key.startswith("model.diffusion_model.") for key in file)
    back = CONVERT["sd3" if name.startswith("sd3") else name.split("-")[0]](dict(file))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", [slow("sd3"), "zimage"])
def test_a_students_transformer_in_one_file_is_read_back_to_the_bit(transformers, tmp_path, name):
    """Left by a run and written from its folder, in every precision, with no text encoder read."""
    teacher_folder = transformers(name)[0]
    (tmp_path / "prompts.txt").write_text("a fox\n")
    c = train.Config(model=str(teacher_folder), prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "run"), windows=[2], updates=2, batch=2,
                     trajectories=2, solver_steps=8, size=32, text_dropout=0.0, lr=1e-2, grid_steps=0, export=["single-file"], export_dtype="bf16",
                     device="cpu")
    folder = train.main(c)
    student = load.load_pipeline(str(folder)).transformer.state_dict()
    assert not torch.equal(student["proj_out.weight" if name == "sd3" else "layers.0.attention.to_q.weight"],
                           transformers(name)[1]["proj_out.weight" if name == "sd3" else "layers.0.attention.to_q.weight"])
    opened = export.open_student(export.FileConfig(str(folder), str(tmp_path / "unused.safetensors")), whole=True)[1]
    assert next(opened.text_encoder.parameters()).is_meta and not next(opened.vae.parameters()).is_meta
    files = {"bf16 of the run": folder.with_name("student-2.safetensors")}
    for word in ("fp32", "fp16", "bf16"):
        files[word] = tmp_path / f"{word}.safetensors"
        export.export_single_file(export.FileConfig(str(folder), str(files[word]), word))
    for word, file in files.items():
        dtype = teacher.DTYPES[word.split()[0]]
        back = load.load_pipeline(str(file), dtype, model_config=str(teacher_folder), **dict.fromkeys(models.BESIDE)).transformer.state_dict()
        assert back.keys() == student.keys()
        assert all(torch.equal(value, student[key].to(dtype)) for key, value in back.items()), word
