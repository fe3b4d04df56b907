"""Exports: one file per consumer, and the gate that every export passes."""

from __future__ import annotations

from trainer.export.base import Exporter
from trainer.export.litemedsam import LiteMedSAMExporter
from trainer.export.medsam import MedSAMExporter
from trainer.export.monai import MONAIExporter
from trainer.export.onnx import OnnxExporter
from trainer.export.peft import PEFTExporter
from trainer.export.sam2 import SAM2Exporter
from trainer.export.sam3 import SAM3Exporter
from trainer.export.torch_export import TorchExportExporter
from trainer.export.transformers import TransformersExporter

EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter
    for exporter in (
        LiteMedSAMExporter(),
        MedSAMExporter(),
        SAM2Exporter(),
        SAM3Exporter(),
        MONAIExporter(),
        OnnxExporter(),
        TorchExportExporter(),
        PEFTExporter(),
        TransformersExporter(),
    )
}
"""What ``trainer export --to`` takes, by name."""

ALIASES = {"medsam": "segment-anything"}
"""Other names of them."""

__all__ = ["ALIASES", "EXPORTERS", "Exporter"]
