"""Headless Chromium: labs and a student's edition in real JupyterLab, pages without a kernel, and slides."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import run_make

from mocolayers.notebook.series import HOME, numbered_notebooks

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; see requirements.txt")

SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# notebook, a slider to drag with the mouse, and one to move with the arrow keys
LABS = [
    ("01_data", "rotation", "blur"),
    ("02_moco", "queue length", "temperature"),
    ("03_intermediate_layer_losses", "views alike", "feature scale"),
    ("04_low_label_finetuning", "labels", "seed of the subset"),
    ("06_feature_similarity", "rows n", "sigma"),
    ("07_output_distributions", "threshold", "flatten the first"),
]
STUDENTS = "02_student"  # the student edition of 02
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


HALF_TEMPERATURE = "max(t for t in np.geomspace(0.005, 1, 400) if torch.softmax(one_query[1:] / t, dim=0).max() >= 0.5)"


@pytest.fixture(scope="module")
def workplace(smoke_series, tmp_path_factory):
    """Copies of the notebooks, set to the smoke runs that the series has left, beside the committed results."""
    place = tmp_path_factory.mktemp("browser")
    (place / "notebooks").mkdir()
    shutil.copytree(HOME / "study", place / "study")
    wanted = {"DATASET": "chest_phantom", "PRESET": "smoke", "RUNS_DIR": str(smoke_series[1] / "runs")}
    _make("student", f"STUDENT={place / 'student'}")
    shutil.copy(place / "student" / "02_moco.ipynb", place / "notebooks" / f"{STUDENTS}.ipynb")
    for name, _, _ in LABS:
        shutil.copy(HOME / "notebooks" / f"{name}.ipynb", place / "notebooks")
    for path in (place / "notebooks").iterdir():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                source = "".join(cell["source"])
                for key, value in wanted.items():
                    source = re.sub(rf"^{key} = .*$", f"{key} = {value!r}", source, flags=re.M)
                cell["source"] = source
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        path.write_text(json.dumps(notebook), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def server(workplace):
    """The address of a JupyterLab with settings of its own."""
    for name, values in SETTINGS.items():
        path = workplace / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", f"--port={port}", "--ip=127.0.0.1"]
    command += ["--ServerApp.token=", "--ServerApp.password=", f"--ServerApp.root_dir={workplace / 'notebooks'}"]
    # Kernels must not inherit the wish of a batch run for still pictures; and Chromium needs a core as well.
    environment = {k: v for k, v in os.environ.items() if k != "MOCOLAYERS_LABS"} | {"OMP_NUM_THREADS": "1"}
    environment |= {
        "JUPYTERLAB_SETTINGS_DIR": str(workplace / "settings"),
        "JUPYTER_CONFIG_DIR": str(workplace / "config"),
    }
    with open(workplace / "jupyter.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: urllib.request.urlopen(f"{address}/api", timeout=5).status == 200, 60, "JupyterLab did not start")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, or a skip that says how to get it.

    It ends with this module: while playwright is open, its event loop runs in the thread of every later test.
    """
    with playwright.sync_playwright() as p:
        found = [shutil.which(name) for name in ("chromium", "google-chrome")] + [p.chromium.executable_path]
        program = next((path for path in found if path and Path(path).exists()), None)
        if program is None:
            pytest.skip("no Chromium: apt-get install chromium, or .venv/bin/playwright install chromium")
        chromium = p.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


def _make(target: str, variable: str) -> None:
    done = run_make(target, variable)
    assert done.returncode == 0, done.stderr


def _wait(true, seconds: float, message: str) -> None:
    """Ask until the answer is yes; errors count as no."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if true():
                return
        except (OSError, playwright.Error):
            pass
        time.sleep(0.2)
    raise AssertionError(message)


@contextmanager
def _running(browser, server: str, name: str, stopped: str = ""):
    """A page with the notebook, all of its cells run, or those before the error that says `stopped`."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(120_000)  # a machine that is busy with other things is slow, not wrong
    page.goto(f"{server}/lab/tree/{name}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    # Run All before the kernel is connected opens a dialog that asks for one.
    page.wait_for_selector("#jp-main-statusbar :text('(ipykernel) | Idle')", timeout=120_000)
    page.click("li.lm-MenuBar-item:has-text('Run')")
    page.click("li.lm-Menu-item:has-text('Run All Cells')")
    prompts = ".jp-CodeCell .jp-InputArea-prompt"  # a folded cell has none
    count = page.locator(prompts).count()

    def finished() -> bool:
        texts = page.locator(prompts).all_inner_texts()
        done = len([t for t in texts if re.search(r"\[\d+\]", t)]) == count
        return _errors(page) != [] or (page.get_by_text(stopped).count() > 0 if stopped else done)

    _wait(finished, 600, f"{name} did not finish in JupyterLab")
    yield page
    page.evaluate(
        "() => fetch('/api/sessions').then(r => r.json()).then(all => Promise.all("
        "all.map(s => fetch('/api/sessions/' + s.id, {method: 'DELETE', headers: "
        "{'X-XSRFToken': (document.cookie.match(/_xsrf=([^;]*)/) || [])[1]}}))))"
    )
    page.close()


def _offline(browser, file: Path):
    """A page of a file that gets nothing from a network."""
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    page.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
    page.goto(file.as_uri())
    return page


def _errors(page) -> list[str]:
    said = page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
    return [text for text in said if "Traceback (most recent call last)" in text]


def _answer(lab) -> tuple[str, str]:
    """The picture and the numbers that a lab shows."""
    return lab.locator("img").first.get_attribute("src"), lab.locator("table").first.inner_text()


def _handle(lab, start: str):
    """The knob of the slider whose label starts like this."""
    labels = lab.locator(".widget-inline-hbox label").all_inner_texts()
    label = next(text for text in labels if text.startswith(start))
    return lab.locator(f".widget-inline-hbox:has(label:text-is('{label}'))").locator(".noUi-handle").first


@pytest.mark.parametrize("name, by_mouse, by_key", LABS, ids=[lab[0][:2] for lab in LABS])
def test_sliders_move_picture_and_numbers(browser, server, name, by_mouse, by_key):
    with _running(browser, server, name) as page:
        assert _errors(page) == []
        lab = page.locator(".mocolayers-lab").first
        lab.scroll_into_view_if_needed()
        before = _answer(lab)
        handle = _handle(lab, by_mouse)
        handle.scroll_into_view_if_needed()
        page.wait_for_timeout(500)  # outputs above that are still being laid out would move it away from the mouse
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + (60 if name != "07_output_distributions" else 35), y, steps=4)
        page.mouse.up()
        _wait(lambda: all(a != b for a, b in zip(before, _answer(lab), strict=True)), 60, "the mouse moved nothing")
        before = _answer(lab)
        handle = _handle(lab, by_key)
        handle.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        _wait(lambda: all(a != b for a, b in zip(before, _answer(lab), strict=True)), 60, "the keys moved nothing")
        assert lab.locator("[role=alert]").count() == 0


def test_a_student_is_stopped_by_an_open_exercise_answers_it_and_is_told_that_it_is_solved(browser, server):
    with _running(browser, server, STUDENTS, "Exercise 1 is still open") as page:
        assert _errors(page) == []
        answer = page.locator(".jp-CodeCell", has_text="half_temperature = ").first
        for text, told in (
            ("0.5", "not yet"),
            ("'warm'", "Expected a number"),
            (HALF_TEMPERATURE, "Exercise 1: solved"),
        ):
            answer.locator(".cm-content").click()
            page.keyboard.press("Control+A")
            page.keyboard.insert_text(f"half_temperature = {text}")
            page.keyboard.press("Shift+Enter")
            page.keyboard.press("Shift+Enter")  # the cell below checks the answer
            _wait(lambda told=told: page.get_by_text(told).count() > 0, 60, f"{text} is not answered with {told!r}")


# Sizes that the theme of the slides gives, as measured: it comes from a network. Heights then differ by 40 at most.
THEME = """
.reveal .slides { width: 960px } .reveal .slides section section { padding: 20px 0; line-height: 1.2 }
.reveal h1 { font-size: 75px !important; line-height: 90px !important; margin: 45px 0 20px !important }
.reveal h2 { font-size: 42px !important; line-height: 51px !important; margin: 25px 0 20px !important }
.reveal p { line-height: 26px !important; margin-top: 20px } .reveal img { margin: 20px 0 }
.reveal td, .reveal th { padding: 4px 10px !important; line-height: 24px }
"""
HEIGHTS = "slides => slides.map(slide => slide.scrollHeight)"


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    """The folder of `make slides`."""
    place = tmp_path_factory.mktemp("slides")
    _make("slides", f"SLIDES={place}")
    return place


@pytest.mark.parametrize("name", [path.stem for path in numbered_notebooks()])
def test_the_slides_of_a_deck_fit_a_screen_of_960_x_700(browser, decks, name):
    page = _offline(browser, decks / f"{name}.slides.html")
    page.add_style_tag(content=THEME)
    heights = page.locator(".slides section section").evaluate_all(HEIGHTS)
    cells = json.loads((HOME / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    kinds = [cell["metadata"]["slideshow"]["slide_type"] for cell in cells]
    assert len(heights) == sum(kind in ("slide", "subslide") for kind in kinds)
    assert min(heights) > 50 and max(heights) <= 700 + 40, heights
    page.close()


@pytest.mark.parametrize("name", ["02_moco", "03_intermediate_layer_losses"])
def test_a_page_answers_a_slider_without_a_kernel_or_a_network(browser, smoke_series, name):
    page = _offline(browser, smoke_series[1] / f"executed/chest_phantom/smoke/seed0/{name}.html")
    lab, seen = page.locator("div[id^='flipbook-']"), []
    slider, pages = lab.locator("input[type=range]"), int(lab.locator("input").get_attribute("max")) + 1
    for key in ["Home", *["ArrowRight"] * (pages - 1)]:
        slider.press(key)
        assert lab.locator("img").evaluate("picture => picture.complete && picture.naturalWidth > 300")
        seen.append((lab.locator("img").get_attribute("src"), lab.locator("p").inner_text()))
    assert pages > 5 and len({text for _, text in seen}) == pages and len({picture for picture, _ in seen}) > pages / 2
    page.close()
