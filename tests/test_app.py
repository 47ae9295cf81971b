"""app.py: what it draws is sampler.py's, and its page works in headless Chromium. Without gradio or Chromium that test is skipped."""
import importlib.util
import re
import shlex
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from conftest import ROOT, torchrun
from PIL import Image
from test_page import CHROMIUM, Browser, events

import app
import sampler
from models import load, saved
from runtime import cli
from runtime.cli import UserError

STUDENT = str(load.ASSETS / "student-2")


@pytest.fixture(scope="module")
def student():
    return saved.open_model(STUDENT)


@pytest.mark.parametrize("steps, solver, guidance, seed, count", [(2, "ddim", 1.0, 0, 2), (3, "dpm2", 2.0, 5, 8), (12, "ddim", 1.0, 1, 12)])
def test_the_picture_is_the_one_that_its_command_draws(student, tmp_path, monkeypatch, steps, solver, guidance, seed, count):
    given = ("red heart on blue", steps, solver, guidance, seed)
    picture, strip, took = app.draw(STUDENT, student, *given)
    program, *words = shlex.split(app.command(STUDENT, *given))
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "a.png")])
    assert program == "python" and words[0] == "sampler.py"
    sampler.run()
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(tmp_path / "a.png")))
    assert re.fullmatch(rf"{steps} steps, {count} network evaluations: \d+\.\d\d s", took)
    tiles = [np.asarray(strip)[-132:-4, left:left + 128] for left in range(0, app.SHOWN * 132, 132)]
    assert [tile.min() < 255 for tile in tiles] == [i < steps for i in range(app.SHOWN)]     # as many beliefs as steps, SHOWN at most


def test_the_command_of_a_prompt_that_looks_like_an_option_is_read_back(monkeypatch):
    _, script, *words = shlex.split(app.command(STUDENT, "-x on blue", 2, "ddim", 1.0, 0))
    assert cli.parse(sampler.Config, "", words).prompt == ["-x on blue"]


def test_what_a_user_can_act_on_is_shown_and_nothing_else():
    shown = []
    with app.warnings_to(shown.append):
        warnings.warn("unknown word", stacklevel=1)
        warnings.warn("unclosed event loop", ResourceWarning, stacklevel=1)
    assert shown == ["unknown word"]


def test_steps_that_cannot_cross_the_windows_are_one_line(student):
    with pytest.raises(UserError, match="student-2: 1 steps cannot cross 2 windows"):
        app.draw(STUDENT, student, "fox", 1, "ddim", 1.0, 0)
    with pytest.raises(UserError, match="no prompt: say what to draw"):                     # as sampler.py, whose line stands below
        app.draw(STUDENT, student, " ", 2, "ddim", 1.0, 0)


def test_without_gradio_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"app.py: needs gradio, which is not installed; .*pip install '.\[app\]'"):
        app.main(app.Config())


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install '.[app]'")
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_the_page_draws_fits_and_asks_nobody(tmp_path):
    port = torchrun(1)[-1].partition("=")[2]
    process = subprocess.Popen([sys.executable, str(ROOT / "app.py"), "--port", port], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    browser = Browser(tmp_path)
    try:
        for width in (1280, 390):
            browser("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
            end = time.monotonic() + 120
            while "errorText" in browser("Page.navigate", url=f"http://127.0.0.1:{port}/"):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.5)
            browser.wait_for("document.querySelectorAll('img[src*=file]').length >= 4", 120)     # drawn as it opens
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
            text = browser.evaluate("document.body.innerText")
            assert "2 steps, 2 network evaluations" in text and "32 steps, 32 network evaluations" in text
        asked = [each["request"]["url"] for each in events(browser, "Network.requestWillBeSent")]
        assert len(asked) > 8 and all(re.match(rf"http://127.0.0.1:{port}/|blob:|data:", url) for url in asked), asked
        assert not events(browser, "Runtime.exceptionThrown")
    finally:
        browser.close()
        process.kill()
        process.wait()
