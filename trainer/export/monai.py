"""A MONAI bundle: a folder that ``python -m monai.bundle run`` runs on images with boxes, without sam-trainer.

Shapes: Q boxes, C channels, S input side, h w side of the masks.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.export import monai_bundle
from trainer.export.base import DTYPES, BoxConsumer, Exporter, InputConsumer
from trainer.export.graphs import Graph, GraphExporter, Runner, Stored, quiet, traced
from trainer.models import SAM3, SegmentationModel

NETWORK = "models/model.pt2"
"""Where the network is in the bundle."""
CONFIG, METADATA = "configs/inference.json", "configs/metadata.json"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
"""What MONAI checks metadata by."""
OLDEST = "1.5.1"
"""Of MONAI: the oldest that is supported."""
COMMAND = f"python -m monai.bundle run --config_file {CONFIG} --bundle_root . --dataset_dir FOLDER"
_SCRIPTS = "scripts"
_CODE = f"{_SCRIPTS}.box_prompts"
_NOTES = (
    f"In the bundle's folder: {COMMAND}; the folder's boxes.json lists its images and their boxes, see docs/README.md.",
    "The network is a graph of torch.export and not a state dictionary: it answers one image at a time, with boxes. "
    "It was traced on a CPU, and is moved where the configuration's device says.",
)


class MONAIExporter(GraphExporter):
    """A bundle that is asked with boxes; the consumer is MONAI's own parser, which builds it from its configuration."""

    name = "monai"
    package = "monai"
    requirement = f"monai[fire,nibabel,pillow]>={OLDEST}"
    ending = ".pt2"

    def accepts(self, model: SegmentationModel) -> bool:
        """Whether it is a model that takes boxes.

        Raises:
            UserError: It is asked with texts.
        """
        if isinstance(model, SAM3):
            raise UserError("a SAM3 cannot be exported to 'monai', which is asked with boxes: --to torch-export")
        return super().accepts(model)

    def for_model(self, model: SegmentationModel) -> Exporter:
        """The export at the model's own side."""
        found = super().for_model(model)
        found.asks, found.notes = "boxes", _NOTES
        return found

    def write(self, model: SegmentationModel, path: Path) -> None:
        """Fill the bundle's folder: ``configs``, ``docs``, ``models`` and ``scripts``."""
        for folder in ("configs", "docs", "models"):
            (path / folder).mkdir()
        boxed = _Boxed(self.family.graphs(model))
        dtype = DTYPES[self.dtype]
        side = model.preprocessing.image_size
        boxes = torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.9, 0.5], [0.2, 0.2, 0.8, 0.9]]) * side
        graph = Graph(
            stem="model",
            module=boxed if dtype is torch.float32 else Stored(boxed, dtype),
            inputs={"image": torch.rand(1, model.preprocessing.channels, side, side), "box": boxes},
            outputs=("pred",),
            axes={"box": {0: "boxes"}},
        )
        self.save(graph, path / NETWORK)
        _write_json(path / CONFIG, _inference(model))
        _write_json(path / METADATA, _metadata(model))
        (path / "docs" / "README.md").write_text(_readme(model), encoding="utf-8")
        source = Path(monai_bundle.__file__).parent
        shutil.copytree(source, path / _SCRIPTS, ignore=shutil.ignore_patterns("__pycache__"))

    def load(self, path: Path) -> BoxConsumer:
        """Let MONAI build network and inferer, and everything else that the configuration describes."""
        with quiet(), _parsed(path) as parser:
            parser.read_meta(str(path / METADATA))
            network, inferer = (parser.get_parsed_content(name) for name in ("network_def", "inferer"))
            for name in ("preprocessing", "postprocessing"):
                parser.get_parsed_content(name)

        def logits(image: Tensor, boxes: Tensor) -> Tensor:
            found: Tensor = inferer(image, network, boxes)
            return found

        return logits

    def read_input(self, path: Path) -> InputConsumer:
        """The bundle's own transforms, from a file on."""
        with quiet(), _parsed(path) as parser:
            transforms = parser.get_parsed_content("preprocessing")

        def read(image: Tensor) -> Tensor:
            with tempfile.TemporaryDirectory() as folder:
                file = _saved(image, Path(folder))
                item = transforms({"image": str(file), "box": np.zeros((1, 4), np.float32)})
            found: Tensor = item["image"].as_tensor()[None]
            return found

        return read

    def save(self, graph: Graph, path: Path) -> None:
        """Write one graph with torch.export."""
        program = traced(graph)
        with quiet():
            torch.export.save(program, path)

    def open(self, path: Path) -> Runner:
        """Open one graph, as the bundle does."""
        from trainer.export.monai_bundle.box_prompts import load_network

        network = load_network(str(path))
        return lambda image, box: {"pred": network(image, box)}


class _Boxed(nn.Module):
    """A family's encoder and mask decoder as one graph: image (1, C, S, S) and boxes (Q, 4) → logits (Q, h, w).

    Args:
        graphs: Both.
    """

    def __init__(self, graphs: list[Graph]) -> None:
        super().__init__()
        encoder, decoder = graphs
        self.image_encoder, self.mask_decoder = encoder.module, decoder.module
        self._asked = tuple(decoder.inputs)[len(encoder.outputs) :]
        self._mask_side = decoder.inputs["mask_input"].shape[-1]
        # no eval() here: both are in the mode that their family wants, TinyViT's attention not in that of evaluation

    def forward(self, image: Tensor, box: Tensor) -> Tensor:
        count = box.shape[0]
        asked = {
            "image_index": torch.zeros(count, dtype=torch.int64, device=box.device),
            "point_coords": box.reshape(count, 2, 2),
            "point_labels": torch.tensor([[2, 3]], device=box.device).expand(count, 2),
            "mask_input": box.new_zeros(count, 1, self._mask_side, self._mask_side),
            "has_mask_input": box.new_zeros(count),
        }
        found = self.mask_decoder(*self.image_encoder(image), *(asked[name] for name in self._asked))
        logits: Tensor = found[0][:, 0]
        return logits


def _inference(model: SegmentationModel) -> dict[str, Any]:
    """The configuration, see MONAI's documentation of its bundles."""
    own = model.preprocessing
    mean, std = own.fixed_statistics or (None, None)
    fit = {
        "image_size": own.image_size,
        "resize": own.resize,
        "scaling": own.scaling,
        "interpolation": own.interpolation,
        "channels": own.channels,
        "mean": mean and list(mean),
        "std": std and list(std),
    }
    back = {"image_size": own.image_size, "resize": own.resize}
    load = {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True, "dtype": None}
    save = {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "output_postfix": "seg",
        "output_ext": "@output_ext",
        "output_dtype": "$numpy.uint16",
        "resample": False,
        "separate_folder": False,
    }
    data = {"_target_": f"{_CODE}.read_list", "data_list": "@data_list", "dataset_dir": "@dataset_dir"}
    return {
        "imports": ["$import numpy", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "data_list": "$@dataset_dir + '/boxes.json'",
        "output_dir": "$@bundle_root + '/eval'",
        "output_ext": ".nii.gz",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": f"{_CODE}.load_network",
            "path": f"$@bundle_root + '/{NETWORK}'",
            "device": "@device",
        },
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                load,
                {"_target_": f"{_CODE}.FitInputd", "keys": "image", "box_key": "box", **fit},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": data, "transform": "@preprocessing"},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": f"{_CODE}.ToNatived", "keys": "pred", "image_key": "image", **back},
                save,
            ],
        },
        "evaluator": {
            "_target_": f"{_CODE}.BoxEvaluator",
            "dataset": "@dataset",
            "network": "@network_def",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "device": "@device",
        },
        "run": ["$@evaluator.run()"],
    }


def _metadata(model: SegmentationModel) -> dict[str, Any]:
    """What MONAI's schema wants to know of a bundle."""
    side, mask, kind = model.preprocessing.image_size, model.mask_side, type(model).__name__
    image = {
        "type": "image",
        "format": "magnitude",
        "num_channels": model.preprocessing.channels,
        "spatial_shape": [side, side],
        "dtype": "float32",
        "value_range": _value_range(model),
        "is_patch_data": False,
        "channel_def": {str(place): name for place, name in enumerate(("red", "green", "blue"))},
    }
    box = {
        "type": "tuples",
        "format": "bbox",
        "num_channels": 4,
        "spatial_shape": ["n"],
        "dtype": "float32",
        "value_range": [0, side],
        "is_patch_data": False,
        "channel_def": {str(place): name for place, name in enumerate(("x0", "y0", "x1", "y1"))},
    }
    pred = {
        "type": "image",
        "format": "segmentation",
        "num_channels": 1,
        "spatial_shape": [mask, mask],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {"0": "logit of being inside what the box shows; above 0 is inside"},
    }
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported from the run that trained it"},
        "monai_version": _version("monai", OLDEST),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {name: _version(name, "") for name in ("nibabel", "pillow")},
        "name": f"{kind}, asked with boxes",
        "task": "Segmentation of what a box shows in a medical image",
        "description": f"A fine-tuned {kind} of {side} px: for each box in an image, the mask of what it shows.",
        "authors": "Those who trained the run that this was exported from",
        "copyright": "Of the weights and of the data they learnt from; the README in this folder says what is known",
        "intended_use": "Research. It is no medical device and not for diagnosis or treatment.",
        "image_classes": "one channel, which is repeated, or three; scaled as docs/README.md says",
        "label_classes": "0 is background, every other number is that of the box, from 1",
        "pred_classes": "one channel of logits a box",
        "network_data_format": {"inputs": {"image": image, "box": box}, "outputs": {"pred": pred}},
    }


def _value_range(model: SegmentationModel) -> list[float]:
    """Smallest and largest value of the input; empty where an image may have any."""
    statistics = model.preprocessing.fixed_statistics
    if statistics is None:
        return [0.0, 1.0] if model.preprocessing.scaling == "minmax" else []
    pairs = list(zip(*statistics, strict=True))
    return [min(-mean / std for mean, std in pairs), max((1 - mean) / std for mean, std in pairs)]


def _readme(model: SegmentationModel) -> str:
    """``docs/README.md``: how the bundle is run, and what it does to an image."""
    own = model.preprocessing
    sides = "the longer side becomes {0} px, and the rest is padded with zeros to the right and at the bottom"
    if own.resize == "squash":
        sides = "both sides become {0} px"
    statistics = own.fixed_statistics
    eight = "8-bit images are divided by 255, others take their own smallest and largest value as 0 and 1"
    scaled = {
        "minmax": "The smallest and largest value of the resized image become 0 and 1.",
        "zscore": "The resized image's own mean and deviation become 0 and 1.",
    }.get(own.scaling, f"{eight}; then mean and deviation by channel are {statistics}.")
    return f"""# {type(model).__name__}, asked with boxes

A MONAI bundle: for each box in an image, the mask of what it shows. It needs `pip install {MONAIExporter.requirement}`
and nothing of the tool that trained it.

In this bundle's folder:

```
{COMMAND}
```

`FOLDER` holds images (PNG, JPEG, or NIfTI of one slice) and `boxes.json`:

```
[{{"image": "a.png", "box": [[12, 30, 88, 95], [100, 40, 130, 77]]}}]
```

A box is (x0, y0, x1, y1) in the image's pixels, x to the right and y down; in NIfTI x and y are the first and second
axis. `eval/a_seg.nii.gz` then holds 0 for background and the number of a box, from 1, for what it shows; where masks
lie over each other, the surer one counts. Elsewhere, and in other formats: `--data_list FILE --output_dir FOLDER
--output_ext .png`.

Images must be as those that the run learnt from: the same window or normalisation of intensities, rows and columns in
the same directions. `preprocessing.json` in this bundle's folder says what is known of it.

What `scripts/box_prompts.py` does to an image: {sides.format(own.image_size)} ({own.interpolation}, antialiased).
{scaled} MONAI's own resizing filters otherwise, so it is not used. The network ({NETWORK}) was saved by torch.export of
PyTorch {torch.__version__.partition("+")[0]}; take that or a newer one.
"""


@contextmanager
def _parsed(path: Path) -> Iterator[Any]:
    """MONAI's parser with a bundle's configuration, while the bundle's own scripts can be imported."""
    from monai.bundle import ConfigParser

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == _SCRIPTS}
    sys.path.insert(0, str(path))
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing but what was exported is in the folder
    try:
        parser = ConfigParser()
        parser.read_config(str(path / CONFIG))
        parser.update({"bundle_root": str(path), "device": "cpu"})
        yield parser
    finally:
        sys.path.remove(str(path))
        sys.dont_write_bytecode = written
        for name in [name for name in sys.modules if name.partition(".")[0] == _SCRIPTS]:
            del sys.modules[name]
        sys.modules.update(before)


def _saved(image: Tensor, folder: Path) -> Path:
    """An image (C, H, W) as a file that MONAI reads: PNG where it has 8 bits, else NIfTI."""
    array = image.numpy()
    if image.dtype == torch.uint8:
        Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(folder / "image.png")
        return folder / "image.png"
    import nibabel

    plain = array.transpose(2, 1, 0)  # MONAI takes a third axis for slices, and one slice for an image
    nibabel.save(nibabel.Nifti1Image(plain, np.eye(4)), folder / "image.nii")
    return folder / "image.nii"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _version(package: str, otherwise: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return otherwise
