"""``citation.bib``: what to cite for exported weights, in BibTeX."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from trainer.export.companions.facts import Facts


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        key: Its key, the same in every export.
        kind: ``article``, ``misc`` and so on.
        fields: As text; escaped when written.
    """

    key: str
    kind: str
    fields: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = "".join(f"  {name} = {{{_escaped(value, name)}}},\n" for name, value in self.fields.items() if value)
        return f"@{self.kind}{{{self.key},\n{lines}}}\n"


def _paper(key: str, author: str, title: str, year: int, where: str) -> Entry:
    """A paper by its arXiv number, or by its journal and DOI as ``Journal|DOI``."""
    journal, _, doi = where.partition("|")
    kind = "article" if doi else "misc"
    place = {"journal": journal, "doi": doi} if doi else {"eprint": journal, "archivePrefix": "arXiv"}
    return Entry(key, kind, {"author": author, "title": title, "year": str(year), **place})


_SAM = _paper("sam", "Kirillov, Alexander and others", "Segment Anything", 2023, "2304.02643")
_MEDSAM = _paper(
    "medsam",
    "Ma, Jun and He, Yuting and Li, Feifei and Han, Lin and You, Chenyu and Wang, Bo",
    "Segment anything in medical images",
    2024,
    "Nature Communications|10.1038/s41467-024-44824-z",
)
MODELS: Mapping[str, tuple[Entry, ...]] = {
    "MedSAM": (_MEDSAM, _SAM),
    "LiteMedSAM": (_MEDSAM, _SAM),
    "SAM2": (
        _paper("sam2", "Ravi, Nikhila and others", "SAM 2: Segment Anything in Images and Videos", 2024, "2408.00714"),
    ),
    "SAM3": (
        _paper("sam3", "Carion, Nicolas and others", "SAM 3: Segment Anything with Concepts", 2025, "2511.16719"),
    ),
}
"""Papers of a model, by its class."""
TUNINGS: Mapping[str, Entry] = {
    "LoRATuning": _paper(
        "lora", "Hu, Edward J. and others", "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"
    ),
    "SAMedTuning": _paper(
        "samed",
        "Zhang, Kaidong and Liu, Dong",
        "Customized Segment Anything Model for Medical Image Segmentation",
        2023,
        "2304.13785",
    ),
    "FacTTuning": _paper(
        "fact",
        "Jie, Shibo and Deng, Zhi-Hong",
        "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer",
        2023,
        "2212.03145",
    ),
    "SSFTuning": _paper(
        "ssf",
        "Lian, Dongze and others",
        "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
        2022,
        "2210.08823",
    ),
    "AdaptFormerTuning": _paper(
        "adaptformer",
        "Chen, Shoufa and others",
        "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
        2022,
        "2205.13535",
    ),
    "HoulsbyTuning": _paper(
        "houlsby", "Houlsby, Neil and others", "Parameter-Efficient Transfer Learning for NLP", 2019, "1902.00751"
    ),
    "LeSAMTuning": _paper(
        "lesam",
        "Gu, Yunbo and others",
        "LeSAM: Adapt Segment Anything Model for Medical Lesion Segmentation",
        2024,
        "IEEE Journal of Biomedical and Health Informatics|10.1109/JBHI.2024.3406871",
    ),
    "MedicalSAMAdapterTuning": _paper(
        "medicalsamadapter",
        "Wu, Junde and others",
        "Medical SAM Adapter: Adapting Segment Anything Model for Medical Image Segmentation",
        2023,
        "2304.12620",
    ),
    "VisualPromptTuning": _paper("vpt", "Jia, Menglin and others", "Visual Prompt Tuning", 2022, "2203.12119"),
}
"""Paper of a tuning method, by its class; full tuning and frozen parts have none of their own."""
_OPTIONS: Mapping[tuple[str, str], Entry] = {
    ("LoRATuning", "dora"): _paper(
        "dora", "Liu, Shih-Yang and others", "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, "2402.09353"
    ),
    ("LoRATuning", "rslora"): _paper(
        "rslora",
        "Kalajdzievski, Damjan",
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        2023,
        "2312.03732",
    ),
    ("LoRATuning", "quantize"): _paper(
        "qlora", "Dettmers, Tim and others", "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, "2305.14314"
    ),
    ("SelectiveTuning", "biases"): _paper(
        "bitfit",
        "Ben Zaken, Elad and Ravfogel, Shauli and Goldberg, Yoav",
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        2021,
        "2106.10199",
    ),
}
"""Papers of a tuning's options, where they are set."""


def entries(facts: Facts) -> list[Entry]:
    """What to cite: this project, the base model, the way of tuning, the data."""
    return [_project(facts), *_model(facts), *_tuning(facts), *_datasets(facts)]


def bibliography(facts: Facts) -> str:
    """The entries as a file."""
    return "\n".join(str(entry) for entry in entries(facts))


def _project(facts: Facts) -> Entry:
    record = facts.run.record
    version = (record.get("versions") or {}).get("sam-trainer")
    commit = record.get("git_commit")
    notes = [f"version {version}" if version else "", f"commit {commit}" if commit else ""]
    title = "sam-trainer: fine-tuning of segmentation foundation models for medicine"
    return Entry("sam-trainer", "misc", {"title": title, "note": ", ".join(filter(None, notes)) or "software"})


def _model(facts: Facts) -> tuple[Entry, ...]:
    return MODELS.get(facts.node("model")[0], ())


def _tuning(facts: Facts) -> Iterator[Entry]:
    name, arguments = facts.node("tuning")
    if name in TUNINGS:
        yield TUNINGS[name]
    for (tuning, option), entry in _OPTIONS.items():
        if tuning == name and arguments.get(option):
            yield entry


def _datasets(facts: Facts) -> Iterator[Entry]:
    for dataset in facts.datasets:
        said = dataset.said("cite")
        licence = dataset.said("licence")
        notes = [said, f"Licence: {licence}" if licence else ""]
        fields = {
            "title": dataset.said("title") or dataset.name,
            "howpublished": dataset.said("homepage"),
            "note": ". ".join(part.rstrip(".") for part in notes if part) or "citation not recorded",
        }
        yield Entry(f"dataset-{_plain(dataset.name)}", "misc", fields)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")


_ESCAPES = {
    **{sign: f"\\{sign}" for sign in "&%$#_"},
    "{": "\\textbraceleft{}",
    "}": "\\textbraceright{}",
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
}


def _escaped(value: str, name: str) -> str:
    """Text as BibTeX takes it: one line, no sign that TeX would read; addresses keep theirs, but for braces."""
    line = " ".join(unicodedata.normalize("NFC", value).split())
    if name in ("doi", "eprint", "url"):
        return re.sub(r"[{}\\]", "", line)
    return "".join(_ESCAPES.get(sign, sign) for sign in line)
