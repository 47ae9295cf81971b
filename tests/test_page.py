"""docs/index.html: its mathematics is reflow.py's and tools/flow2d.py's, number for number (node), and it works in a browser: no error, no
request to anywhere, it trains (headless Chromium). Machines without node or Chromium skip those tests; the rest need Python alone."""
import base64
import contextlib
import dataclasses
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import models
import reflow
import sampler
import teacher
from data import imaging
from models import saved
from runtime.cli import UserError
from tools import animation, flow2d, page

PAGE = ROOT / "docs" / "page"
NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def javascript(code, given):
    """Runs code with flow.js, student.js and `given` at hand.  Returns: what it returns."""
    script = f"""const flow = require({json.dumps(str(PAGE / "flow.js"))}).makeFlow();
        const students = require({json.dumps(str(PAGE / "student.js"))}).makeStudents(flow);
        const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
        console.log(JSON.stringify((() => {{{code}}})(), (key, value) => ArrayBuffer.isView(value) ? [...value] : value));"""
    done = subprocess.run([NODE, "-e", script], input=json.dumps(given), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed: apt-get install nodejs")


@pytest.fixture
def doubles(monkeypatch):
    """Everything of torch in float64, so that what differs is the mathematics and not the rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(flow2d, "BLOBS", flow2d.BLOBS.double())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@needs_node
def test_schedule_teacher_windows_chord_and_paths_are_the_projects(doubles):
    torch.manual_seed(0)
    z, t = torch.randn(64, 2), torch.rand(64).clamp_min(0.02)
    u = torch.rand(64)
    exact = teacher.Model(flow2d.exact, flow2d.SCHEDULE, "v_prediction")
    found = javascript("""const z = Float64Array.from(given.z), t = Float64Array.from(given.t), v = flow.exact(z, t);
        return {schedule: given.t.map(flow.schedule), v, pair: flow.pair(z, v, t), paths: flow.trajectories(z),
                one: flow.ddim(flow.exact, z, flow.timeGrid(5)),
                windows: [1, 2, 3, 8].map(k => given.t.map(each => flow.windowOf(each, k))),
                laws: ["uniform", "starts"].map(law => given.u.map(each => flow.TIME_LAWS[law](each, 4))),
                chord: given.z.map((each, i) => flow.chord(each, given.z[127 - i], 0.75, 0.25)),
                seen: flow.seen(z, 0.4)};""", dict(z=z.flatten().tolist(), t=t.tolist(), u=u.tolist()))

    def close(ours, theirs):
        assert torch.allclose(torch.tensor(ours, dtype=torch.float64).flatten(), theirs.double().flatten(), atol=1e-6)
    close(found["schedule"], torch.stack(flow2d.SCHEDULE(t), 1))
    close(found["v"], flow2d.exact(z, 1000 * t - 1))
    for name, part in zip(("x", "eps"), exact(z, t, {})):
        close(found["pair"][name], part)
    visited = []
    end = sampler.ddim(exact, z, sampler.time_grid(32), {}, callback=lambda state: visited.append(state["z"]))
    close(found["paths"], torch.stack([*visited[::4], end]))
    close(found["one"][-1], sampler.ddim(exact, z, sampler.time_grid(5), {}))
    for k, windows in zip((1, 2, 3, 8), found["windows"]):
        close(windows, torch.stack(reflow.window_of(t, k), 1))
    for law, times in zip(("uniform", "starts"), found["laws"]):
        close(times, reflow.draw_times(reflow.Recipe(time_law=law), u, 4, flow2d.SCHEDULE))
    ends = [flow2d.SCHEDULE(torch.tensor(edge)) for edge in (0.75, 0.25)]
    x, eps = reflow.chord(z.flatten(), z.flatten().flip(0), *ends)
    close([[each["x"], each["eps"]] for each in found["chord"]], torch.stack([x, eps], 1))
    close(found["seen"], z / sum(flow2d.SCHEDULE(torch.tensor(0.4))))


@needs_node
@pytest.mark.parametrize("windows, time_law, direction_weight", [(8, "starts", 0.0), (2, "uniform", 0.3)])
def test_twenty_updates_are_torchs(doubles, monkeypatch, windows, time_law, direction_weight):
    """tools/flow2d.py's own training loop and the page's, from the same weights, with the same draws: every loss and every weight."""
    torch.manual_seed(0)
    network, updates, count = flow2d.Student(), 20, 64
    for parameter in network.net[4].parameters():                          # not zero: every gradient counts from the first update on
        torch.nn.init.normal_(parameter, std=0.1)
    paths = flow2d.solve(teacher.Model(flow2d.exact, flow2d.SCHEDULE, "v_prediction"), count)
    layers = [dict(zip(("to", "from", "weight", "bias"), (*each.weight.shape, each.weight.flatten().tolist(), each.bias.tolist())))
              for each in (network.net[i] for i in (0, 2, 4))]
    draws, values, draw_times, student_loss = [], [], reflow.draw_times, reflow.student_loss
    recipe = reflow.Recipe(time_law=time_law, direction_weight=direction_weight)
    randint = torch.randint

    def drawn(*arguments, **options):                                      # what the loop draws is written down for the other side
        draws.append(randint(*arguments, **options))
        return draws[-1]

    def timed(*arguments):
        draws.append(draw_times(*arguments))
        return draws[-1]

    def valued(*arguments):
        found, parts = student_loss(*arguments)
        values.append([found.mean().item(), parts["magnitude"].mean().item(), parts["direction"].mean().item()])
        return found, parts
    monkeypatch.setattr(torch, "randint", drawn)
    monkeypatch.setattr(reflow, "draw_times", timed)
    monkeypatch.setattr(reflow, "student_loss", valued)
    flow2d.straighten(network, windows, paths, recipe, updates)

    found = javascript("""
        const layers = given.layers.map(each => ({...each, weight: Float64Array.from(each.weight), bias: Float64Array.from(each.bias)}));
        const step = students.adam(layers, given.updates);
        const values = [];
        for (let i = 0; i < given.updates; i++) {
          const batch = students.batchOf(given.paths, given.rows[i], Float64Array.from(given.times[i]), given.windows);
          const {loss, magnitude, direction, gradients} = students.lossAndGradients(layers, batch, given.directionWeight);
          values.push([loss, magnitude, direction]);
          step(gradients);
        }
        return {values, layers};""", dict(
        layers=layers, updates=updates, windows=windows, directionWeight=direction_weight, rows=[each.tolist() for each in draws[::2]],
        times=[each.tolist() for each in draws[1::2]], paths=paths.transpose(0, 1).flatten(1).tolist()))
    assert len(values) == updates and values[-1][0] != values[0][0]
    assert torch.allclose(torch.tensor(found["values"]), torch.tensor(values), atol=1e-5)
    for each, i in zip(found["layers"], (0, 2, 4)):
        for name in ("weight", "bias"):
            ours, theirs = torch.tensor(each[name]), getattr(network.net[i], name).detach().flatten()
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-5), (i, name, (ours - theirs).abs().max())


# ---- in a browser ------------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium with one page, spoken to over two pipes in its DevTools protocol: nothing to install beside it."""

    def __init__(self, folder):
        (theirs_in, self.out), (self.into, theirs_out) = os.pipe(), os.pipe()
        high = [os.dup(each) for each in (theirs_in, theirs_out)]

        def numbers():                                                     # where --remote-debugging-pipe reads and writes
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
             "--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=numbers, pass_fds=(3, 4, *high), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for each in (theirs_in, theirs_out, *high):
            os.close(each)
        self.events, self.rest, self.number, self.session = [], b"", 0, None
        page = next(each for each in self("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        self.number += 1
        message = dict(id=self.number, method=method, params=parameters, **({"sessionId": self.session} if self.session else {}))
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                read = os.read(self.into, 1 << 20)
                assert read, "the browser has ended"
                self.rest += read
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, code):
        found = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, code, seconds):
        end = time.monotonic() + seconds
        while not self.evaluate(code):
            assert time.monotonic() < end, f"{code}: not within {seconds} s"
            time.sleep(0.1)

    def open(self, width, scheme="light", file=ROOT / "docs" / "index.html"):
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self("Page.navigate", url=file.as_uri())
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'", 20)

    def screenshot(self, file, whole=True):
        data = self("Page.captureScreenshot", captureBeyondViewport=whole, **({"clip": dict(
            x=0, y=0, scale=1, width=self.evaluate("innerWidth"), height=self.evaluate("document.documentElement.scrollHeight"))}
            if whole else {}))
        file.write_bytes(base64.b64decode(data["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@contextlib.contextmanager
def served(folder):
    """A folder over http.  Yields: its address."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def events(browser, *methods):
    return [each["params"] for each in browser.events if each["method"] in methods]


def test_it_opens_from_a_file_trains_and_asks_nobody(browser):
    """One window, 100 updates of 128: nearer than 0.85 to the teacher's ends (untrained 1.4), in a minute on a busy machine."""
    browser.open(1280)
    browser.evaluate("for (const [id, value] of [['stages', '1'], ['budget', '100 128']]) document.getElementById(id).value = value;"
                     "document.getElementById('train').click()")
    browser.wait_for("document.getElementById('training').dataset.state === 'finished'", 60)
    trained, untrained = (float(browser.evaluate(f"document.getElementById('{name}-is').textContent")) for name in ("distance", "plain"))
    assert trained < 0.85 and untrained == pytest.approx(1.4, abs=0.05)
    assert "after 100 of 100 updates" in browser.evaluate("document.getElementById('student-title').textContent")
    assert browser.evaluate("document.querySelectorAll('#student .line.student').length") == 48
    assert not events(browser, "Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Network.loadingFailed")
    asked = [each["request"]["url"] for each in events(browser, "Network.requestWillBeSent")]
    assert len(asked) > 8 and all(re.match(f"{(ROOT / 'docs').as_uri()}/|blob:|data:", url) for url in asked), asked


def test_point_and_window_are_moved_by_keys_and_by_pointer(browser):
    browser.open(1280)

    def says(name):
        return browser.evaluate(f"document.getElementById('{name}-says').textContent")
    assert "Noise at (\N{MINUS SIGN}1.70,\N{NO-BREAK SPACE}1.40) ends at" in says("curve")
    browser.evaluate("document.getElementById('curve').focus({preventScroll: true})")
    for kind in ("keyDown", "keyUp"):
        browser("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    assert "Noise at (\N{MINUS SIGN}1.60,\N{NO-BREAK SPACE}1.40) ends at" in says("curve")
    x, y = browser.evaluate("(() => {document.getElementById('curve').scrollIntoView({behavior: 'instant'});"
                            "const box = document.getElementById('curve').getBoundingClientRect();"
                            "return [box.x + box.width / 2, box.y + box.height / 2]})()")
    for kind in ("mousePressed", "mouseReleased"):
        browser("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert re.match(r"Noise at \(.?0\.0\d,\s.?0\.0\d\) ends", says("curve"))
    for name, value, window in (("end", 20, "0.63 to 0.31"), ("start", 10, "0.16 to 0.14"), ("end", 32, "0.52 to 0.50")):
        browser.evaluate(f"(slider => {{slider.value = {value}; slider.dispatchEvent(new Event('input'))}})"
                         f"(document.getElementById('window-{name}'))")
        assert f"from t = {window}" in says("chord")                           # the other end gives way
    browser.evaluate("document.querySelector('[data-window=\"64 0\"]').click()")
    assert "from t = 1.00 to 0.00" in says("chord")


def test_the_buttons_of_the_table_run_as_the_log_did_and_only_that_fills_it(browser):
    """The log's budget takes minutes: what the worker would say at the end of a stage is said in its place."""
    browser.open(1280)
    said = ("hear({data: {windows: 4, done: 1, ended: true, distance: 0.123, plain: 0.3, parts: null, "
            "paths: flow.ddim(flow.exact, flow.noise(48, flow.uniforms(1)), flow.timeGrid(32)), ends: flow.noise(48, flow.uniforms(1)), targets: flow.noise(48, flow.uniforms(2))}})")
    for law in ("uniform", "starts"):
        browser.evaluate("document.getElementById('direction-weight').value = '1'; document.getElementById('budget').value = '100 128';"
                         "document.getElementById('direction-weight').dispatchEvent(new Event('input'));"
                         f"document.querySelector('[data-law={law}]').click()")
        asked = browser.evaluate("run.asked")
        assert asked == dict(stages=[8, 4, 2, 1], updates=800, batch=512, timeLaw=law, directionWeight=0, seed=0)
        assert browser.evaluate("document.getElementById('weight-is').textContent") == "0"
        browser.evaluate(said)
        assert browser.evaluate(f"document.getElementById('here-{law}-4').textContent") == "0.123"
        browser.evaluate("stop('')")
    browser.evaluate("document.getElementById('budget').value = '100 128'; train();" + said.replace("0.123", "0.456") + ";stop('')")
    assert browser.evaluate("document.getElementById('here-starts-4').textContent") == "0.123"


def test_it_works_as_a_project_page(browser, tmp_path):
    """Served from a folder of a site: every file and every link is there."""
    (tmp_path / "reflow").symlink_to(ROOT / "docs")
    with served(tmp_path) as address:
        browser.events.clear()
        browser("Page.navigate", url=f"{address}/reflow/index.html")
        browser.wait_for("document.readyState === 'complete' && location.protocol === 'http:'", 20)
        assert not events(browser, "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        links = browser.evaluate("[...document.querySelectorAll('a[href], script[src], link[href]')].map(each => each.href || each.src)"
                                 ".filter(each => !each.startsWith('data:')).map(each => each.split('#')[0])")
        for link in set(links):
            assert link.startswith(f"{address}/reflow/") and urllib.request.urlopen(link).status == 200, link


@pytest.mark.parametrize("width, scheme", [(390, "dark"), (768, "light"), (900, "dark"), (1600, "light")])
def test_it_fits_every_width_and_everything_that_can_be_set_has_a_name(browser, width, scheme):
    browser.open(width, scheme)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    unnamed = browser.evaluate("""[...document.querySelectorAll("input, select, button, svg, [tabindex]")].filter(each => !(each.labels?.length
        || each.getAttribute("aria-label") || each.getAttribute("aria-labelledby") || each.textContent.trim())).map(each => each.id)""")
    assert unnamed == []
    # nothing scrolls sideways in a box of its own; words above what is set stand on one line where there is room for one
    assert browser.evaluate("[...document.querySelectorAll('#live, .scroll')].filter(each => each.scrollWidth > each.clientWidth)"
                            ".map(each => [each.outerHTML.slice(0, 80), each.scrollWidth, each.clientWidth])") == []
    heights = browser.evaluate("[...document.querySelectorAll('.controls.wide label')].map(each => each.getBoundingClientRect().bottom)")
    assert width < 1000 or max(heights) - min(heights) < 1
    # what is moved by hand and what moves it are on one screen
    for figure, hand in (("curve", "missed-1"), ("chord", "window-inside")):
        assert browser.evaluate(f"document.getElementById('{hand}').getBoundingClientRect().bottom - "
                                f"document.getElementById('{figure}').getBoundingClientRect().top") < 900
    # words against what is behind them: WCAG's 4.5
    worst = browser.evaluate("""(() => {
        const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = each => { for (; each; each = each.parentElement) { const color = getComputedStyle(each).backgroundColor;
            if (!/, 0\\)$/.test(color)) return color; } return "rgb(255, 255, 255)"; };
        return Math.min(...[...document.querySelectorAll("p, a, th, td, figcaption, label, button, output, dt, dd, pre, h1")].map(each => {
            const [a, b] = [light(getComputedStyle(each).color), light(behind(each))].sort((p, q) => q - p);
            return (a + 0.05) / (b + 0.05); }));
        })()""")
    assert worst >= 4.5


def test_no_label_stands_on_a_point_or_on_another_label(browser):
    browser.open(1280)
    crossed = browser.evaluate("""(() => {
        const found = [], meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
        const box = (each, by) => { const {left, right, top, bottom} = each.getBoundingClientRect();
            return {left: left + by, right: right - by, top: top + by, bottom: bottom - by}; };
        for (const [x, y] of [[-1.7, 1.4], [-1.3, 1], [-2, -1.2], [0.9, 1.2], [1.9, 0.2], [0.2, -1.9], [1.6, -1.5], [-0.8, -1.6]]) {
            movePoint(x, y);
            for (const id of ["curve", "chord"]) {
                const labels = [...document.querySelectorAll(`#${id} .label`)], boxes = labels.map(each => box(each, 2));
                const dots = [...document.querySelectorAll(`#${id} .dot[r="5"]`)].map(each => box(each, 3));
                boxes.forEach((one, i) => {
                    if (dots.some(dot => meet(one, dot))) found.push([id, x, y, labels[i].textContent, "on a point"]);
                    boxes.slice(0, i).forEach((two, j) => {
                        if (meet(one, two)) found.push([id, x, y, labels[i].textContent, labels[j].textContent]); });
                });
            }
        }
        return found;
    })()""")
    assert crossed == [], crossed


# ---- the files -----------------------------------------------------------------------------------------------------------

INDEX = (ROOT / "docs" / "index.html").read_text()


def test_the_page_is_small_whole_and_names_no_other_place():
    files = [ROOT / "docs" / "index.html", *PAGE.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 4_000_000
    named = set(re.findall(r'(?:src|href)="page/([^"]+)"', INDEX)) | {"sprites.webp"}
    assert named == {file.name for file in PAGE.iterdir()}
    for file in files:
        if file.name not in ("sprites.webp", "sprites.js"):                # whose credit names its sources, as text
            addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", file.read_text()))
            assert addresses <= {"http://www.w3.org/2000/svg"}, (file.name, addresses)


def test_every_quoted_line_is_one_of_its_function():
    rows = re.findall(r"<tr><td>[^\n]*?</td><td>(\w+\.py), (\w+)</td><td><code>(.*?)</code></td></tr>", INDEX)
    assert len(rows) == INDEX.count("<code>", INDEX.index('id="lines"')) >= 11
    for file, name, line in rows:
        body = re.search(rf"^(?:def|class) {name}\b.*?(?=^\S|\Z)", (ROOT / file).read_text(), re.M | re.S).group()
        assert line.replace("&lt;", "<") in body, (file, name, line)


def test_the_table_is_the_logs():
    log = (ROOT / "docs" / "log.md").read_text()
    plain = re.search(r"plain DDIM ([\d., ]+)\)", log).group(1).split(", ")
    rows = re.findall(r"^\| ([8421]) \| ([\d.]+) \| ([\d.]+) \|$", log, re.M)
    for untrained, (windows, uniform, starts) in zip(plain, rows):
        cells = re.search(rf'<th scope="row">{windows}</th>(<td.*?)</tr>', INDEX).group(1)
        assert re.findall(r"\d\.\d{3}", cells) == [untrained, uniform, starts]
    assert len(rows) == len(plain) == 4


def test_the_pictures_are_the_models(tmp_path):
    """Prompt 0 again, by one and two steps of the teacher and two of the student: the committed sheet, up to what WebP loses."""
    table = sprites(PAGE)
    sheet = Image.open(PAGE / "sprites.webp").convert("RGB")
    tile, names = table["tile"], [table["model"], *(f"assets/student-{each['windows']}" for each in table["models"][1:])]
    assert sheet.size == (table["columns"] * tile, table["rows"] * tile)
    assert table["rows"] == len(names) * len(table["prompts"]) and table["columns"] == sum(table["steps"]) == sum(page.STEPS)
    first = table["prompts"][0]
    for row, name in enumerate(names):
        folder = ROOT / name if row else name
        if row and not folder.is_dir():
            continue                                                       # made with a student of somebody's runs
        pipeline, model, info = saved.open_model(str(folder))
        windows = info.get("windows", 1)
        seen = []
        sampler.generate(pipeline, model, [first["prompt"]], [first["seed"]], sampler.time_grid(2, windows),
                         callback=lambda state: seen.append(state["x_hat"]))
        for at, picture in enumerate(imaging.to_pil(models.decode(pipeline, torch.cat(seen)))):
            left = (sum(page.STEPS[:page.STEPS.index(2)]) + at) * tile
            shown = sheet.crop((left, row * tile, left + tile, (row + 1) * tile))
            assert np.abs(np.asarray(shown, float) - np.asarray(picture, float)).mean() < 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A copy of the page with pictures made of the committed student and two more, which are its copies under other names."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("live", "*.md"))
    for windows in (1, 4):
        student = shutil.copytree(ROOT / "assets" / "student-2", folder / f"student-{windows}")
        about = json.loads((student / "reflow.json").read_text())
        (student / "reflow.json").write_text(json.dumps({**about, "windows": windows}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "STEPS", (4, 2, 1))
        page.main(page.Config(students=[str(folder / "student-1"), str(folder / "student-4"), str(ROOT / "assets" / "student-2")],
                              prompts=["fox"], seed=3, out=str(folder / "docs" / "page")))
    return folder


def sprites(folder):
    return json.loads(re.search(r"const SPRITES = (.*);", (folder / "sprites.js").read_text(), re.S).group(1))


def test_pictures_are_made_of_any_number_of_students(made, tmp_path, small_models):
    table = sprites(made / "docs" / "page")
    assert table["prompts"] == [dict(prompt="fox", seed=3)] and "license" in table["credit"].lower()
    assert table["models"] == [dict(name="teacher", windows=1), *(dict(name=f"{n}-window student", windows=n) for n in (4, 2, 1))]
    sheet, tile = np.asarray(Image.open(made / "docs" / "page" / "sprites.webp").convert("RGB"), float), table["tile"]
    assert sheet.shape == (4 * tile, 7 * tile, 3)
    rows, (four, two, one) = sheet.reshape(4, tile, -1, 3), ((0, 4 * tile), (4 * tile, 6 * tile), (6 * tile, 7 * tile))
    black = [[bool(row[:, start:end].max() < 40) for start, end in (four, two, one)] for row in rows]
    assert black == [[False] * 3, [False, True, True], [False, False, True], [False] * 3]      # no picture in fewer steps than windows
    about = json.loads((made / "student-1" / "reflow.json").read_text())

    def another(name, **changed):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reflow.json").write_text(json.dumps({**about, **changed}))
        return str(tmp_path / name)
    both = [str(made / "student-1"), another("reflow", method="reflow")]
    assert [each[2] for each in page.read_students("tiny", both)] == [f"1-window {about['method']}", "1-window reflow"]
    for options, message in ((dict(out=str(tmp_path / "none")), "--out .*none: no such folder"),
                             (dict(students=["elsewhere"]), "--students elsewhere: no student there"),
                             (dict(students=[another("foreign", teacher="sd15")]), "--students .*foreign: a student of sd15, not of --model tiny"),
                             (dict(students=[another("three", windows=3)]), "three: 3 windows divide none of the page's steps"),
                             (dict(students=[both[0], another("twin")]), "would call both '1-window default'"),
                             (dict(model=str(small_models["sd15"])), "Data and license"),
                             (dict(model="pixel"), "--students: none given, and pixel has none")):
        with pytest.raises(UserError, match=message):
            page.main(page.Config(**{"out": str(tmp_path), **options}))


def test_a_sheet_that_is_too_large_leaves_the_old_one(made, monkeypatch):
    before = (made / "docs" / "page" / "sprites.webp").read_bytes()
    monkeypatch.setattr(page, "STEPS", (2,))
    monkeypatch.setattr(page, "LIMIT", 100)
    with pytest.raises(UserError, match="bytes, more than 100; give fewer --prompts or less --quality"):
        page.main(page.Config(students=["assets/student-2"], prompts=["fox"], out=str(made / "docs" / "page")))
    assert (made / "docs" / "page" / "sprites.webp").read_bytes() == before


def test_students_stand_side_by_side_at_every_number_of_steps(browser, made):
    for width in (1280, 390):
        browser.open(width, file=made / "docs" / "index.html")
        for place, count in enumerate((4, 2, 1)):
            browser.evaluate(f"(slider => {{slider.value = {place}; slider.dispatchEvent(new Event('input'))}})"
                             "(document.getElementById('steps'))")
            words = browser.evaluate("[...document.querySelectorAll('#grid .row figcaption')].map(each => each.innerText.replace('\\n', ': '))")
            steps = f"{count} step{'s' * (count > 1)}"
            assert words == ["teacher: 4 steps", f"plain DDIM: {steps}",
                             *(f"{n}-window student: {max(n, count)} step{'s' * (max(n, count) > 1)}" for n in (4, 2, 1))]
            assert browser.evaluate("[...document.querySelectorAll('#grid figcaption')].filter(each => each.scrollWidth > each.clientWidth).length") == 0
            strips = browser.evaluate("[...document.querySelectorAll('#beliefs .strip')].map(each => each.children.length)")
            assert strips == [count, *(max(n, count) for n in (4, 2, 1))]
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def rows_of(frame):
    """The two rows of pictures in a frame of the animation, as numbers: (2, SIDE, ...)."""
    pixels = np.asarray(frame.convert("RGB"), float)
    tops = [animation.HEIGHT - row * (animation.SIDE + 8) for row in (2, 1)]
    return np.stack([pixels[top:top + animation.SIDE, 130:] for top in tops])


def test_the_animation_shows_both_students_as_they_train(tmp_path, monkeypatch):
    """The pictures are the ones that sampling draws from the same noise: the teacher's in 32 steps, the student's in one."""
    monkeypatch.setattr(animation, "SHARES", (0.0, 1.0))
    monkeypatch.setattr(animation, "BATCH", 4)
    monkeypatch.setattr(animation, "EFFORT", 0)
    monkeypatch.setitem(reflow.RECIPES, "default", dataclasses.replace(reflow.RECIPES["default"], stages=(2, 1), shares=(1, 1)))
    prompts, seen, trained = ["fox on green", "food"], [], animation.train_pictures
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    monkeypatch.setattr(animation, "train_pictures", lambda *given: seen.append(trained(*given)) or seen[0])
    file = tmp_path / "flow.webp"
    animation.main(animation.Config(updates=1, trajectories=64, paths=5, picture_updates=2, picture_trajectories=4,
                                    prompts=str(tmp_path / "prompts.txt"), out=str(file)))
    pipeline, model, _ = saved.open_model("tiny")
    (sharp, pictures), = seen
    for found, steps in ((sharp, 32), (pictures[2][0], 1)):
        z = sampler.generate(pipeline, model, prompts, [0, 1], sampler.time_grid(steps))
        assert torch.allclose(found, models.decode(pipeline, z), atol=1e-4)
    assert list(pictures) == [2, 1]
    for before, after in pictures.values():                                # an update changes them
        assert not torch.equal(before, after)
    frames = Image.open(file)
    assert frames.n_frames == 1 + 2 * 2 and frames.size == (animation.WIDTH, animation.HEIGHT)
    for options, message in ((dict(out=str(tmp_path / "flow.gif")), "--out .*flow.gif"),
                             (dict(picture_updates=1), "--picture-updates 1")):
        with pytest.raises(UserError, match=message):
            animation.main(animation.Config(**options))


def test_the_committed_animation_is_whole_and_its_pictures_become_the_teachers():
    file = ROOT / "results" / "reflow-2d.webp"
    frames = Image.open(file)
    assert frames.n_frames == 1 + 4 * len(animation.SHARES) and file.stat().st_size <= animation.LIMIT
    distances = []
    for number in (0, frames.n_frames - 1):
        frames.seek(number)
        sharp, one_step = rows_of(frames)
        distances.append(np.abs(sharp - one_step).mean())
    assert distances[1] < 0.8 * distances[0]
