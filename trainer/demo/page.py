"""The page: what lies where, and which of `Handlers` answers to what. Needs Gradio."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from data_shards.preprocessing import WINDOWS
from trainer.demo import canvas as parts
from trainer.demo.drawing import canvas_value, objects_value
from trainer.demo.handlers import Handlers, Update
from trainer.demo.limits import size
from trainer.demo.saving import FORMS, forms_of

DEFAULT, WHOLE = "As the model was started", "Whole range"
CLICK = """file => { if (file && file.url) { const link = document.createElement("a"); link.href = file.url;
  link.download = file.orig_name || ""; document.body.append(link); link.click(); link.remove(); } return []; }"""


class Page:
    """Builds the page.

    Args:
        handlers: What answers.
        title: The model, in a few words.
        intensity: The rule of the command line, which the default window stands for.
    """

    def __init__(self, handlers: Handlers, title: str, intensity: str | None = None) -> None:
        self.handlers, self.title, self.intensity = handlers, title, intensity
        words = handlers.answering.words
        self.tools = () if words else ("box", "plus", "minus")
        self.blocks = gr.Blocks(
            title="sam-trainer demo", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
        )
        with self.blocks:
            self._head()
            with gr.Row(elem_id="page"):
                with gr.Column(elem_id="left", scale=0, min_width=320):
                    self._open_part()
                with gr.Column(elem_id="middle", scale=1, min_width=320):
                    self._canvas_part()
                with gr.Column(elem_id="right", scale=0, min_width=320):
                    self._object_part(words)
                    self._follow_part(words)
                    self._save_part()
            self.shown = [self.canvas, self.objects, self.status, self.slider]
            self._connect(words)

    def _head(self) -> None:
        gr.HTML(
            f'<header id="head"><h1>Try the model</h1><p>{html.escape(self.title)}</p>'
            '<p class="warn"><strong>For research only, not for diagnosis.</strong> Images stay on the machine '
            "that runs this page, and are deleted when you leave.</p></header>"
        )

    def _open_part(self) -> None:
        gr.HTML("<h2>1 · Open</h2>")
        most = size(self.handlers.desk.limits.bytes)
        self.files = gr.File(label="Image, volume or video", file_count="multiple", height=150, elem_id="files")
        gr.HTML(
            f'<p class="small">PNG, JPEG, TIFF · NIfTI, NRRD, MetaImage, npz · a DICOM series as files or zip · a '
            f"video, as a film or its frames. At most {most}.</p>"
        )
        self.examples = [(name, path, gr.Button(name, size="sm")) for name, path in examples()]

    def _canvas_part(self) -> None:
        self.canvas = gr.HTML(
            canvas_value(None, self.tools), html_template=parts.TEMPLATE, css_template=parts.STYLE,
            js_on_load=parts.SCRIPT, elem_id="canvas", apply_default_css=False,
        )  # fmt: skip
        self.status = gr.HTML(status(Update(None, "")), elem_id="status")
        self.slider = gr.Slider(0, 1, 0, step=1, label="Slice", visible=False, elem_id="slice")
        choices = [DEFAULT, *(_window_label(name) for name in WINDOWS), WHOLE]
        with gr.Row(visible=False, elem_id="windows") as self.windows:
            self.window = gr.Dropdown(choices, value=DEFAULT, label="Window", elem_id="window", scale=2, min_width=240)
            self.level = gr.Number(label="or level", value=40, min_width=90)
            self.width = gr.Number(label="and width", value=400, minimum=0.001, min_width=90)

    def _object_part(self, words: bool) -> None:
        gr.HTML("<h2>2 · Say what to find</h2>" if words else "<h2>2 · Show objects</h2>")
        if words:
            self.term = gr.Textbox(label="Term", placeholder="liver", max_lines=1, elem_id="term")
            self.instances = gr.Checkbox(label="Each instance is an object of its own", value=False)
            self.find = gr.Button("Find on this slice", variant="primary", elem_id="find")
        self.objects = gr.HTML(
            objects_value(None), html_template=parts.LIST_TEMPLATE, css_template=parts.LIST_STYLE,
            js_on_load=parts.LIST_SCRIPT, elem_id="objects", apply_default_css=False,
        )  # fmt: skip
        if not words:
            if not self.handlers.answering.memory:
                gr.HTML(f'<p class="small">{_BOXES}</p>')
            self.add = gr.Button("Add an object", size="sm", elem_id="add")
            with gr.Accordion("Box by numbers", open=False):
                with gr.Row():
                    self.box = [gr.Number(label=name, value=0, precision=0, min_width=60) for name in _CORNERS]
                self.by_numbers = gr.Button("Ask with this box", size="sm", elem_id="by-numbers")

    def _follow_part(self, words: bool) -> None:
        with gr.Column(visible=False, elem_id="follow-part") as self.follow_part:
            memory = self.handlers.answering.memory
            gr.HTML(f"<h2>3 · {'Find in all slices' if words else 'Follow'}</h2>")
            gr.HTML(f'<p class="small">{_HOW["words" if words else "memory" if memory else "chain"]}</p>')
            with gr.Row():
                self.first = gr.Number(label="from slice", value=0, precision=0, min_width=90, elem_id="first")
                self.last = gr.Number(label="to slice", value=0, precision=0, min_width=90, elem_id="last")
            with gr.Row():
                label = "Find" if words else "Follow"
                self.follow = gr.Button(label, variant="primary", elem_id="follow", min_width=120)
                self.stop = gr.Button("Stop", variant="stop", min_width=80, elem_id="stop")

    def _save_part(self) -> None:
        with gr.Column(visible=False, elem_id="save-part") as self.save_part:
            gr.HTML("<h2>Download</h2>")
            self.saves = {form: gr.Button(name, size="sm", elem_id=f"save-{form}") for form, name in FORMS.items()}
            self.file = gr.DownloadButton("Download", visible="hidden", elem_id="file")

    def _connect(self, words: bool) -> None:
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        model: dict[str, Any] = {**quick, "concurrency_id": "model", "concurrency_limit": 8}
        opening: dict[str, Any] = {**quick, "show_progress": "full", "show_progress_on": self.status}
        opened = [
            *self.shown,
            self.windows,
            self.follow_part,
            self.save_part,
            self.first,
            self.last,
            *self.saves.values(),
        ]
        self.files.upload(self._open, self.files, [*opened, self.files], **opening)
        for _, path, button in self.examples:
            button.click(self._example(path), None, opened, **opening)
        self.canvas.submit(self._drawn, None, self.shown, trigger_mode="multiple", **model)
        self.canvas.select(self._stepped, None, self.shown, trigger_mode="always_last", **quick)
        self.canvas.undo(self._undo, None, self.shown, **quick)
        self.canvas.clear(self._clear, None, self.shown, **quick)
        self.slider.input(self._turned, self.slider, self.shown[:3], trigger_mode="always_last", **quick)
        self.window.input(self._windowed, self.window, self.shown, **quick)
        for number in (self.level, self.width):
            number.submit(self._levelled, [self.level, self.width], self.shown, **quick)
        self.objects.select(self._activated, None, self.shown, **quick)
        self.objects.input(self._renamed, None, self.shown, **quick)
        self.objects.delete(self._removed, None, self.shown, **quick)
        span = [self.first, self.last]
        if words:
            asked = [self.term, self.instances]
            self.find.click(self._find, asked, self.shown, **model)
            self.term.submit(self._find, asked, self.shown, **model)
            self.follow.click(self._find_all, [self.term, *span], self.shown, **model)
        else:
            self.add.click(self._add, None, self.shown, **quick)
            self.by_numbers.click(self._boxed, self.box, self.shown, **model)
            self.follow.click(self._follow, span, self.shown, **model)
        self.stop.click(self._stop, None, None, queue=False, **quick)
        for form, button in self.saves.items():
            saved = button.click(self._saved(form), None, [self.file, self.status], **quick)
            saved.then(None, self.file, None, js=CLICK, api_visibility="private")
        self.blocks.unload(self._left)

    # what Gradio calls; it knows what to give by the annotations

    def _open(self, files: list[str] | None, request: gr.Request) -> list[Any]:
        return [*self._opened(self.handlers.open(_who(request), files or [])), None]

    def _example(self, path: Path) -> Any:
        def open_it(request: gr.Request) -> list[Any]:
            return self._opened(self.handlers.example(_who(request), path))

        return open_it

    def _drawn(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.draw(_who(request), _told(event)))

    def _boxed(self, x0: float, y0: float, x1: float, y1: float, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.draw(_who(request), {"box": [x0, y0, x1, y1]}))

    def _stepped(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.step(_who(request), int(_told(event).get("step", 1))))

    def _turned(self, number: float, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.turn(_who(request), number))[:3]

    def _undo(self, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.undo(_who(request)))

    def _clear(self, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.clear(_who(request)))

    def _add(self, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.add(_who(request)))

    def _windowed(self, label: str, request: gr.Request) -> list[Any]:
        rules = {
            DEFAULT: self.intensity,
            WHOLE: "minmax",
            **{_window_label(name): f"window:{name}" for name in WINDOWS},
        }
        return self._shown(self.handlers.window(_who(request), rules.get(label, self.intensity)))

    def _levelled(self, level: float | None, width: float | None, request: gr.Request) -> list[Any]:
        level, width = level or 0, max(float(width or 1), 1e-3)
        return self._shown(self.handlers.window(_who(request), f"window:{level - width / 2},{level + width / 2}"))

    def _activated(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.activate(_who(request), _told(event).get("place", 0)))

    def _renamed(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        told = _told(event)
        return self._shown(self.handlers.rename(_who(request), told.get("place", 0), told.get("name", "")))

    def _removed(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.remove(_who(request), _told(event).get("place", 0)))

    def _find(self, term: str, instances: bool, request: gr.Request) -> list[Any]:
        return self._shown(self.handlers.find(_who(request), term, instances))

    def _follow(self, first: float | None, last: float | None, request: gr.Request) -> Iterator[list[Any]]:
        for update in self.handlers.follow(_who(request), first, last):
            yield self._shown(update)

    def _find_all(self, term: str, first: float | None, last: float | None, request: gr.Request) -> Iterator[list[Any]]:
        for update in self.handlers.find_all(_who(request), term, first, last):
            yield self._shown(update)

    def _stop(self, request: gr.Request) -> None:
        self.handlers.stop(_who(request))

    def _saved(self, form: str) -> Any:
        def save_it(request: gr.Request) -> list[Any]:
            update = self.handlers.save(_who(request), form)
            return [None if update.file is None else str(update.file), status(update)]

        return save_it

    def _left(self, request: gr.Request) -> None:
        self.handlers.stop(_who(request))
        self.handlers.desk.leave(_who(request))

    def _shown(self, update: Update) -> list[Any]:
        """Values of `shown`."""
        case = update.case
        if not update.whole or case is None:
            return [gr.skip(), gr.skip(), status(update), gr.skip()]
        with case.lock:
            if case.closed:
                return [canvas_value(None, self.tools), objects_value(None), status(update), gr.Slider(visible=False)]
            several = len(case.scan) > 1
            slider = gr.Slider(
                minimum=0, maximum=max(1, len(case.scan) - 1), value=case.slice, visible=several,
                label="Frame" if case.scan.flat else "Slice",
            )  # fmt: skip
            return [canvas_value(case, self.tools), objects_value(case), status(update), slider]

    def _opened(self, update: Update) -> list[Any]:
        """Values of `shown`, and of what fits one image and not another."""
        case, forms = update.case, forms_of(update.case)
        several = case is not None and len(case.scan) > 1
        last = len(case.scan) - 1 if case is not None else 0
        return [
            *self._shown(update),
            gr.Row(visible=case is not None and case.hounsfield),
            gr.Column(visible=several),
            gr.Column(visible=case is not None),
            gr.skip() if update.error else 0,
            gr.skip() if update.error else last,
            *(gr.Button(visible=form in forms) for form in self.saves),
        ]


_CORNERS = ("x0", "y0", "x1", "y1")
_BOXES = "MedSAM and LiteMedSAM learnt from boxes: points are for models that learnt from them too."
_HOW = {
    "memory": "The model follows each object by its memory, from the slice on which you showed it to both ends.",
    "chain": "The mask of a slice makes the box for the next. This model has no memory and finds something in nearly "
    "every box: say where the object begins and ends.",
    "words": "The term above is asked for on each slice.",
}


def examples() -> list[tuple[str, Path]]:
    """Images that came with packages: the MR template of nilearn, where it is installed."""
    spec = importlib.util.find_spec("nilearn")
    found = []
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(place) / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
        if path.is_file():
            found.append(("Example: MR of a brain", path))
    return found


def status(update: Update) -> str:
    """What there is to say, as HTML; texts are escaped."""
    line = html.escape(update.line)
    if update.share is not None:
        bar = f'<progress max="1" value="{update.share:.3f}"></progress>'
        return f'<div class="status" role="status">{bar}<span>{line}</span></div>'
    if update.error:
        return f'<div class="status error" role="alert"><span><strong>Not done:</strong> {line}</span></div>'
    return f'<div class="status" role="status"><span>{line}</span></div>'


def _window_label(name: str) -> str:
    level, width = WINDOWS[name]
    return f"CT {name.replace('_', ' ')} ({level:g} / {width:g})"


def _who(request: gr.Request) -> str:
    return str(request.session_hash)


def _told(event: gr.EventData) -> dict[str, Any]:
    data = event._data
    return data if isinstance(data, dict) else {}
