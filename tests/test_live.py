"""docs/live.html: the embedded models outside torch. The files of export.py onnx against torch; tokenizer, noise and DDIM in JavaScript
against transformers, torch and sampler.py (node); the page's pictures against sampler.py's, pixel for pixel (headless Chromium)."""
import functools
import http.server
import json
import shutil
import subprocess
import threading
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_page import CHROMIUM, NODE, Browser, browser, events, needs_node  # noqa: F401  (a fixture)

import export
import models
import sampler
import teacher
from data import imaging
from models import load, saved
from runtime.cli import UserError

LIVE = ROOT / "docs" / "live"
MODELS = {"teacher": "tiny", "student": str(load.ASSETS / "student-2")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder with teacher and student as the Makefile writes them."""
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[onnx]'")
    folder = tmp_path_factory.mktemp("onnx")
    for name, model in MODELS.items():
        export.export_onnx(export.OnnxConfig(model, str(folder / name)))
    return folder


def javascript(code, given):
    """Runs code, the body of an async function with `given` and the page's modules at hand.  Returns: what it returns."""
    script = "".join(f"import * as {name} from {json.dumps((LIVE / f'{name}.mjs').as_uri())};" for name in ("tokenizer", "noise", "sampler"))
    script += f"""import {{readFileSync}} from "fs"; const given = JSON.parse(readFileSync(0, "utf8"));
        const found = await (async () => {{{code}}})();
        console.log(JSON.stringify(found, (key, value) => ArrayBuffer.isView(value) ? [...value] : value));"""
    done = subprocess.run([NODE, "--input-type=module", "-e", script], input=json.dumps(given), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# ---- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_torchs_at_any_batch(exported, name):
    """To 1e-4 of its largest number; one picture, three, and 33 that a sampler would ask at once."""
    import onnxruntime
    pipeline, model, _ = saved.open_model(MODELS[name])

    def run(part, **inputs):
        session = onnxruntime.InferenceSession(str(exported / name / f"{part}.onnx"), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])

    def close(found, expected):
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4 * expected.abs().max()
    for count in (1, 3, 33):
        prompts = (["red heart on blue", "", "fox " * 30] * 11)[:count]
        z, t = sampler.noise(range(count), (16, 8, 8)), torch.linspace(1, 0.01, count, dtype=torch.float64)
        cond = models.encode_text(pipeline, prompts)
        tokens = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            timestep = model.schedule.timestep(t)
            close(run("text_encoder", input_ids=tokens), cond["encoder_hidden_states"])
            close(run("unet", z=z, timestep=timestep, **cond), model.network(z, timestep, **cond))
        close(run("decoder", z=z), models.decode(pipeline, z))


def test_the_folder_says_how_it_is_sampled_and_whose_it_is(exported):
    about = json.loads((exported / "student" / "model.json").read_text())
    assert (about["windows"], about["path"], about["prediction"], about["latents"]) == (2, "vp", "epsilon", [16, 8, 8])
    assert about["tokens"] == dict(length=32, start="<|startoftext|>", end="<|endoftext|>", pad="<|endoftext|>", unknown="<|endoftext|>")
    schedule, _ = models.schedule(saved.open_model("tiny")[0])
    assert about["alpha"] == schedule.alpha.tolist() and about["commit"]
    assert json.loads((exported / "teacher" / "model.json").read_text())["windows"] == 1
    for name in MODELS:
        assert "Microsoft" in (exported / name / "README.md").read_text() and "heart" in (exported / name / "vocabulary.json").read_text()
        assert {file.name for file in exported.joinpath(name).iterdir()} == {
            "unet.onnx", "text_encoder.onnx", "decoder.onnx", "model.json", "tokenizer", "README.md", "vocabulary.json"}


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, monkeypatch, small_models):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[onnx]'")
    (tmp_path / "here").mkdir()
    for arguments, message in ((("", "x"), "MODEL: name a student's folder or a teacher"), (("tiny", ""), "OUT: name a folder"),
                               (("tiny", tmp_path / "here"), "OUT .*here: exists already"),
                               ((small_models["sdxl"], tmp_path / "x"), "Stable Diffusion 1.x and 2.x alone"),
                               (("pixel", tmp_path / "x"), "other tools have no such file"),
                               (("nowhere", tmp_path / "x"), "--model nowhere: no diffusers pipeline there")):
        with pytest.raises(UserError, match=message):
            export.export_onnx(export.OnnxConfig(*map(str, arguments)))
    with monkeypatch.context() as patched:
        patched.setattr(export, "ONNX_LIMIT", 1000)
        with pytest.raises(UserError, match="unet.onnx: .* GB of weights, and one ONNX file holds 2"):
            export.export_onnx(export.OnnxConfig(str(small_models["sd15"]), str(tmp_path / "x")))
    assert [file.name for file in tmp_path.iterdir()] == ["here"]


def test_a_file_that_is_not_torchs_does_not_count(tmp_path):
    """A network that draws random numbers has no one output."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[onnx]'")
    network = torch.nn.Linear(3, 3)
    assert export.write_onnx(tmp_path / "a.onnx", network, lambda z: network(z), {"z": torch.zeros(1, 3)}, onnxruntime) < 1e-6
    with pytest.raises(UserError, match="b.onnx: .* from torch's output, more than 0.0001"):
        export.write_onnx(tmp_path / "b.onnx", network, lambda z: network(z) + torch.randn_like(z), {"z": torch.zeros(1, 3)}, onnxruntime)


# ---- the page's modules ------------------------------------------------------------------------------------------------


@needs_node
def test_tokens_are_transformers():
    pipeline, *_ = saved.open_model("tiny")
    folder = load.ASSETS / "tiny-sd" / "tokenizer"
    draw, letters = np.random.default_rng(0), list("abcdefghijklmnopqrstuvwxyz   '''-.,!?0123456789") + ["é", "ß", "İ", "語", "🦊", "\t", "e\u0301", "²", "_"]
    texts = ["", " ", "red heart on blue", "Red  HEART\non blue!", "it's the fox's, isn't it? they'll, we've, I'd, I'm", "fox," * 20, "don''t --- '' ...", "2026 12.5",
             "<|endoftext|>fox<|startoftext|> <|ENDOFTEXT|>", "na\u00efve caf\u00e9 \u00a0 \u3000 x", *("".join(draw.choice(letters, draw.integers(1, 60))) for _ in range(300))]
    expected = pipeline.tokenizer(texts, padding="max_length", truncation=True).input_ids
    lengths = [len(ids) for ids in pipeline.tokenizer(texts).input_ids]
    tokens = dict(length=32, start="<|startoftext|>", end="<|endoftext|>", pad="<|endoftext|>", unknown="<|endoftext|>")
    found = javascript("const tokenize = tokenizer.makeTokenizer(given.vocabulary, given.merges, given.tokens); return given.texts.map(tokenize);",
                       dict(vocabulary=json.loads((folder / "vocab.json").read_text()), merges=(folder / "merges.txt").read_text(), tokens=tokens, texts=texts))
    for text, each, ids, length in zip(texts, found, expected, lengths):
        assert each == dict(ids=ids, cut=max(0, length - 32)), text


@needs_node
def test_noise_of_a_seed_is_torchs():
    seeds = [0, 1, 12345, 2 ** 32 - 1]
    found = javascript("return given.map(seed => noise.randn(seed, 1024));", seeds)
    expected = sampler.noise(seeds, (16, 8, 8)).flatten(1)
    assert torch.allclose(torch.tensor(found), expected, rtol=0, atol=2e-6)
    assert javascript("try { noise.randn(0, 15); } catch (error) { return error.message; }", 0) == "15 numbers of noise: must be a multiple of 16"


@needs_node
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_and_guidance_are_the_samplers(prediction):
    schedule, _ = models.schedule(saved.open_model("tiny")[0])

    def network(z, timestep, text):
        return 0.7 * z + 0.2 * torch.sin(3 * z + timestep[:, None] / 300) + text
    model = teacher.Model(network, schedule, prediction)
    z = sampler.noise([5], (64,))
    found = javascript("""const about = {...given, windows: 2, path: "vp"}, z = Float32Array.from(given.z);
        const text = value => async (z, timestep) => z.map(each => 0.7 * each + 0.2 * Math.sin(3 * each + timestep / 300) + value);
        const all = [];
        for (const [steps, w] of [[2, 1], [6, 1], [4, 2.5]])
          all.push(await sampler.ddim(sampler.guided(text(0.1), text(-0.2), w), about, z, steps));
        const refused = async (about, steps) => { try { await sampler.ddim(text(0), about, z, steps); } catch (error) { return error.message; } };
        return {all, refused: [await refused(about, 3), await refused({...about, path: "linear"}, 4)]};""",
                       dict(z=z[0].tolist(), alpha=schedule.alpha.tolist(), prediction=prediction))
    for (steps, w), each in zip(((2, 1), (6, 1), (4, 2.5)), found["all"]):
        expected = sampler.ddim(model, z, sampler.time_grid(steps), dict(text=torch.full((1, 1), 0.1)), w, dict(text=torch.full((1, 1), -0.2)))
        assert torch.allclose(torch.tensor(each), expected[0], rtol=1e-4, atol=1e-4), (steps, w)
    assert found["refused"] == ["3 steps: must be a multiple of 2 windows", "4 steps: a student of path linear takes 2"]


# ---- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(exported, tmp_path_factory):
    """The page on a server of python's http.server, as `make page` starts it.  Returns: its address."""
    docs = tmp_path_factory.mktemp("docs")
    for name in ("live.html", "live", "page"):
        (shutil.copytree if (ROOT / "docs" / name).is_dir() else shutil.copy)(ROOT / "docs" / name, docs / name)
    shutil.rmtree(docs / "live" / "models", ignore_errors=True)
    shutil.copytree(exported, docs / "live" / "models")
    if not (docs / "live" / "runtime").is_dir():
        done = shutil.which("npm") and subprocess.run(["make", f"LIVE={docs / 'live'}", docs / "live" / "runtime"], cwd=ROOT, capture_output=True, text=True)
        if not done or done.returncode:
            pytest.skip(f"onnxruntime-web cannot be had: {done.stderr[-300:] if done else 'npm is not installed'}")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=docs))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def settle(browser):  # noqa: F811
    browser.wait_for("['drawn', 'failed'].includes(document.body?.dataset.state)", 120)
    assert browser.evaluate("document.body.dataset.state") == "drawn", browser.evaluate("document.getElementById('says').textContent")


def ask(browser, **values):  # noqa: F811
    browser.evaluate("document.body.dataset.state = ''; for (const [id, value] of Object.entries(" + json.dumps(values) + "))"
                     "document.getElementById(id).value = value; document.querySelector('#asked button').click()")
    settle(browser)


def shown(browser):  # noqa: F811
    """uint8 (rows, pictures, H, W, 3)"""
    return np.array(browser.evaluate("""[...document.querySelectorAll('#rows .pictures')].map(row => [...row.children].map(canvas =>
        [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]))"""), np.uint8).reshape(3, 4, 64, 64, 4)[..., :3]


def test_the_page_draws_what_sampler_py_draws(browser, served):  # noqa: F811
    browser.events.clear()
    browser("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    browser("Page.navigate", url=f"{served}/live.html")
    settle(browser)
    assert not events(browser, "Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Network.loadingFailed")
    urls = [each["request"]["url"] for each in events(browser, "Network.requestWillBeSent")]
    for file, kind in (("runtime/ort-wasm-simd-threaded.wasm", "application/wasm"), ("worker.mjs", "javascript")):
        assert kind in urllib.request.urlopen(f"{served}/live/{file}").headers["Content-Type"]
    assert all(url.startswith((served, "data:", "blob:")) for url in urls), urls

    def expected(rows, prompt, seed, guidance):
        for model, steps in rows:
            pipeline, model, info = saved.open_model(MODELS[model])
            z = sampler.generate(pipeline, model, [prompt] * 4, range(seed, seed + 4), sampler.time_grid(steps, info.get("windows", 1)), guidance)
            yield np.stack([np.asarray(each) for each in imaging.to_pil(models.decode(pipeline, z))])
    says, long = "document.getElementById('says').textContent", "purple dragon " + "fox " * 40
    for prompt, seed, guidance, steps in (("red heart on blue", 0, 1, 2), (long, 7, 2, 4)):
        if seed:
            assert browser.evaluate(says) == "Drawn."
            ask(browser, prompt=prompt, seed=seed, guidance=guidance, steps=steps)
        pictures = list(expected((("teacher", 32), ("teacher", steps), ("student", steps)), prompt, seed, guidance))
        assert np.abs(shown(browser).astype(int) - np.stack(pictures)).max() <= 2
        assert all(row.std() > 20 for row in pictures)
    times = browser.evaluate("[...document.querySelectorAll('#rows .time')].map(each => each.textContent)")
    assert [time.split(" s, ")[1] for time in times] == ["64 evaluations each", "8 evaluations each", "8 evaluations each"]
    cut = len(saved.open_model("tiny")[0].tokenizer(long.strip()).input_ids) - 32
    assert browser.evaluate(says) == f"This model has never seen: dragon. The last {cut} tokens do not fit and are not seen."
    browser("Emulation.setDeviceMetricsOverride", width=390, height=900, deviceScaleFactor=1, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_without_its_server_it_says_what_to_do(tmp_path):
    fresh = Browser(tmp_path)                                              # one that has been at a server does not open files
    try:
        fresh("Page.navigate", url=(ROOT / "docs" / "live.html").as_uri())
        fresh.wait_for("document.readyState === 'complete' && location.protocol === 'file:'", 20)
        assert "run make page" in " ".join(fresh.evaluate("document.getElementById('says').textContent").split())
    finally:
        fresh.close()


def test_the_first_page_needs_none_of_it_and_no_runtime_is_committed():
    index = (ROOT / "docs" / "index.html").read_text()
    assert not [part for part in ("live/", "onnx", ".mjs") if f'src="{part}' in index or f'href="{part}' in index]
    tracked = subprocess.run(["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True).stdout
    assert not [name for name in tracked.split() if name.endswith((".wasm", ".onnx")) or "/runtime/" in name]
