"""`Lab`: controls above, one answer below. What all labs share; nothing here knows about learning."""

import base64
import html
import json
import os
import time
import traceback
import zlib
from collections.abc import Callable

import ipywidgets as widgets
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure

from mocolayers.notebook.figures import new_figure, rendered

FOLLOW_SECONDS = 0.2  # a quicker answer follows a slider that is still moving
IN_VIEW = 7  # six sliders and a menu
# Variables by which a notebook server tells its kernels that a person sits in front of them; batch runs have none.
FRONT_ENDS = ("JPY_SESSION_NAME", "VSCODE_CWD", "COLAB_RELEASE_TAG")
WIDGET_TYPE = "application/vnd.jupyter.widget-view+json"
LEAF = """
(() => {
  const box = document.getElementById("OWN"), pages = PAGES, slider = document.createElement("input");
  const [picture, caption, words] = box.children;
  Object.assign(slider, {type: "range", min: 0, max: pages.length - 1, value: 0, style: "width:min(100%, 480px)"});
  slider.oninput = () => {
    const page = pages[slider.value];
    Object.assign(picture, {src: page.src, alt: page.alt});
    caption.textContent = page.text;
    words.textContent = page.words;
  };
  slider.setAttribute("aria-label", "step through prepared answers");
  box.prepend(slider);
  slider.oninput();
})();
"""
Answer = tuple[Figure, str, dict[str, str]]  # a figure, the same in words, and named numbers as text


class Lab:
    """Controls above the answer to them: the first `IN_VIEW` in view, the others under "more".

    A slider is answered while it moves if an answer takes less than `FOLLOW_SECONDS`, else when it is let go. While
    Python is busy, ipywidgets keeps the newest value of each control. An error is shown in place of the answer.

    Args:
        controls: name and control of ipywidgets.
        answer: called with the values of the controls under these names; it should take less than 0.3 s.
        question: one line above the controls.
        idle: called likewise; names the controls that change nothing now, which are greyed.
        frames: changed controls of the answers that a page without a kernel can step through, after the first one.
    """

    def __init__(self, controls: dict, answer: Callable, question="", idle=lambda **_: set(), frames=()) -> None:
        self.controls, self.answer, self.idle, self.frames = controls, answer, idle, frames
        self.view = widgets.HTML()
        every = list(controls.values())
        parts = [widgets.HTML(f"<b>{html.escape(question)}</b>"), _grid(every[:IN_VIEW])]
        if every[IN_VIEW:]:
            more = [_grid(every[IN_VIEW:])]
            parts.append(widgets.Accordion(more, titles=["more controls"], selected_index=None))
        self.box = widgets.VBox([*parts, self.view, widgets.HTML("<small>No reaction? Run this cell.</small>")])
        self.box.add_class("mocolayers-lab")
        for control in every:
            control.layout.width, control.style.description_width = "auto", "150px"
            control.observe(lambda _: self.update(), names="value")
        self._settle(FOLLOW_SECONDS)

    def values(self) -> dict:
        """The values of the controls."""
        return {name: control.value for name, control in self.controls.items()}

    def update(self) -> None:
        """Compute the answer to the controls, and show it."""
        started = time.perf_counter()
        try:
            self.view.value = as_html(*self.answer(**self.values()))
        except Exception as error:
            self.view.value = error_html(error)
        self._settle(time.perf_counter() - started)

    def show(self) -> None:
        """Display the lab; where no one can move a slider (papermill, a page on the web), its figure and numbers."""
        figure, alt, numbers = self.answer(**self.values())
        bundle = {"image/png": encoded_png(figure), "text/plain": alt}
        if someone_is_there():
            self.update()  # the first answer was slower than those that follow
            bundle[WIDGET_TYPE] = self.box._repr_mimebundle_()[WIDGET_TYPE]
        elif self.frames:
            pages = {self._caption(dict(list(self.values().items())[:IN_VIEW])): (figure, alt, numbers)}
            pages |= {self._caption(changes): self.answer(**self.values() | changes) for changes in self.frames}
            bundle["text/html"] = flipbook(pages)
        display(bundle, raw=True, metadata={"image/png": {"alt": alt}})
        if not someone_is_there() and not self.frames:
            print("\n".join(f"{name}: {value}" for name, value in numbers.items()))

    def _caption(self, values: dict) -> str:
        """Values of controls in words, as the controls show them."""
        return ", ".join(_told(self.controls[name], value) for name, value in values.items())

    def _settle(self, seconds: float) -> None:
        """Grey what does nothing, and follow a moving slider if the last answer was quick."""
        idle = self.idle(**self.values())
        for name, control in self.controls.items():
            control.disabled = name in idle
            if control.has_trait("continuous_update"):
                control.continuous_update = seconds < FOLLOW_SECONDS


def _told(control: widgets.Widget, value: object) -> str:
    labels = {choice[1]: choice[0] for choice in getattr(control, "options", ()) if isinstance(choice, tuple)}
    return f"{control.description}: {labels.get(value, f'{value:g}' if isinstance(value, float) else value)}"


def _grid(controls: list[widgets.Widget]) -> widgets.GridBox:
    """Controls side by side, as many as the page is wide."""
    columns = widgets.Layout(grid_template_columns="repeat(auto-fit, minmax(380px, 1fr))", grid_gap="0 24px")
    return widgets.GridBox(controls, layout=columns)


def someone_is_there() -> bool:
    """Whether a notebook is open in front of this kernel; $MOCOLAYERS_LABS=live or static overrides the guess."""
    wanted = os.environ.get("MOCOLAYERS_LABS", "")
    return wanted != "static" and (wanted == "live" or any(name in os.environ for name in FRONT_ENDS))


def quick_figure(columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """A line of axes that draws in half the time: no text is measured for its margins, and ticks are few."""
    figure, axes = new_figure(1, columns, size, layout="none", **options)
    inch = 1 / size[0], 1 / size[1]
    figure.subplots_adjust(0.75 * inch[0], 0.55 * inch[1], 1 - 0.18 * inch[0], 1 - 0.5 * inch[1], 0.28)
    for axis in axes[0]:
        axis.locator_params(nbins=4)
        axis.grid(False)
    return figure, axes[0]


def encoded_png(figure: Figure) -> str:
    """A figure as base64 text of a PNG."""
    return base64.b64encode(rendered(figure, quick=True)).decode()


def as_html(figure: Figure, alt: str, numbers: dict[str, str]) -> str:
    """An answer as a picture with alternative text, and a table of numbers beside it, or below if there is no room."""
    cells = [(html.escape(name), html.escape(value)) for name, value in numbers.items()]
    rows = "".join(f"<tr style='text-align:left'><td>{name}</td><td><b>{value}</b></td></tr>" for name, value in cells)
    picture = f"data:image/png;base64,{encoded_png(figure)}"
    image = f"<img alt='{html.escape(alt, quote=True)}' src='{picture}' style='max-width:100%'>"
    table = f"<table style='flex:1 1 240px'>{rows}</table>"
    return f"<div style='display:flex;flex-wrap:wrap;align-items:center;gap:0 16px'>{image}{table}</div>"


def flipbook(answers: dict[str, Answer]) -> str:
    """Answers, by text, as a picture and its numbers with a slider that needs no kernel.

    Where a page may not run scripts, the first answer is left.
    """
    pages = []
    for text, (figure, alt, numbers) in answers.items():
        picture = f"data:image/png;base64,{base64.b64encode(rendered(figure)).decode()}"
        words = "\n".join(f"{name}: {value}" for name, value in numbers.items())
        pages.append({"text": text, "src": picture, "alt": alt, "words": words})
    first = pages[0]
    own = f"flipbook-{zlib.crc32(first['src'].encode()):08x}"
    picture = f"<img alt='{html.escape(first['alt'], quote=True)}' src='{first['src']}' style='max-width:100%'>"
    script = LEAF.replace("OWN", own).replace("PAGES", json.dumps(pages).replace("<", "\\u003c"))
    words = f"<p>{html.escape(first['text'])}</p><pre>{html.escape(first['words'])}</pre>"
    return f"<div id='{own}'>{picture}{words}</div><script>{script}</script>"


def error_html(error: Exception) -> str:
    """An error, with the line it came from, where the answer would have been."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}, line {place.lineno})"
    return f"<div role='alert' style='color:#a00'>{html.escape(text)}<br>Move a control to try again.</div>"
