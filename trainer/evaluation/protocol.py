"""An evaluation protocol: which models answer which cases, and how they are asked.

The dataclasses are the schema of the YAML: every key is a field, documented beside it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data_shards.errors import UserError, nearest
from data_shards.schema import from_mapping, load_yaml
from trainer.recipe import check_content, check_recipe
from trainer.run import opening

Kind = Literal["2d", "3d", "video"]
KINDS: tuple[Kind, ...] = ("2d", "3d", "video")
COPY = "copy"
"""What the tables call the baseline: the first mask, repeated in every slice."""
OWN, TRUTH, DIRECT = "model", "truth", "prompt"
"""What `initial` may name besides models."""
TEXT = "text"
"""The prompt of a model that is asked in words, and what stands in its rows for who made the first mask."""
GROUPINGS = {
    "modality": "modality",
    "dataset": "data set",
    "term": "term",
    "set": "set",
    "plane": "plane",
    "spacing": "spacing",
    "size": "size of the target",
}
"""What subgroup tables can be of, and what they call it."""
MOST_NOISE = 100.0
"""Percent of a box's sides: with more, a box may lie anywhere."""


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from: one of a run, a recipe, or a class."""

    run: str | None = None
    """Folder of a run: its trained model."""
    checkpoint: str | None = None
    """Checkpoint of the run: last, best or a path; the newest by default."""
    weights: Literal["average", "raw"] | None = None
    """Which weights, where the checkpoint has an average of them (EMA): that by default."""
    recipe: str | None = None
    """A recipe: its model with the weights that it names, untouched."""
    class_path: str | None = None
    """A model's full dotted path, as in recipes."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """The class's arguments."""

    def __post_init__(self) -> None:
        given = [name for name in ("run", "recipe", "class_path") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"give one of run, recipe and class_path, not {' and '.join(given) or 'none'}")
        if self.run is None and (self.checkpoint or self.weights):
            raise UserError("checkpoint and weights belong to a run")


@dataclass(frozen=True)
class SetSpec:
    """A folder of shards, and how its cases are asked."""

    folder: str
    """Split that `data-shards build` made, such as ``data/mine/test``."""
    kind: Kind
    """``2d``: each target of each image. ``3d``: each term of each volume, shown on the middle one of its slices and
    followed to both ends. ``video``: each term of each sequence, shown on its first frame and followed from there."""
    name: str = ""
    """What the tables call it; the folder by default."""
    prompt: Literal["box", "point", "mask", "text"] = "box"
    """What of the truth is shown: its tight box, the pixel farthest from its border, or the mask itself. ``text`` names
    the term alone, which SAM3 understands: its instances are united, slice by slice."""
    objects: Literal["target", "term"] = "target"
    """2d: whether each target of an image is asked for, or all of a term together: each of its targets is shown, and
    the answers are united. So SAM3, which takes words alone, can be asked beside models that take boxes; in volumes and
    videos, and with ``prompt: text``, it is so in any case."""
    margin: int = 0
    """Native pixels by which a box is enlarged on every side."""
    initial: list[str] = field(default_factory=list)
    """3d and video: whose mask of the shown slice a model goes on from. ``model`` answers the prompt itself, ``truth``
    is given, and the name of another model lets that one answer; ``prompt`` hands the prompt on, with no mask between.
    ``[model]`` by default."""
    extent: Literal["object", "volume"] = "object"
    """3d and video: whether top and bottom are known, as in the study, or every slice is asked for."""
    tolerance: float = 2.0
    """Largest distance that surface Dice forgives."""
    unit: Literal["mm", "px"] = "mm"
    """Of the tolerance; where a spacing is not known it is px in any case, and the tables say so."""
    lesions: bool = False
    """2d and 3d: whether connected pieces are counted: true ones, how many were found, and false ones."""
    noise: list[float] = field(default_factory=list)
    """The same objects are asked for again with prompts that are off, for a curve: each side of a box, or the point, is
    moved at random by up to so many percent of the box's sides (SAM2's training draws up to 10)."""
    negatives: int = 0
    """2d: most terms that a model which takes words is asked for in each image though they are absent: looked for by
    the annotators, and not there."""
    terms: list[str] | None = None
    """Terms to ask for; all by default."""
    limit: int | None = None
    """Most images, volumes or videos of the set, evenly chosen; all by default."""

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.margin < 0 or (self.limit is not None and self.limit < 1):
            raise UserError(
                f"tolerance and margin are 0 or more, limit is 1 or more: not {self.tolerance:g}, {self.margin} and "
                f"{self.limit}"
            )
        if self.terms == []:
            raise UserError("terms is empty: name some, or leave it out for all")
        self._check_asking()
        if self.kind == "2d":
            if self.prompt == "mask":
                raise UserError("prompt mask: in an image the mask is the answer: take box or point")
            if self.initial:
                raise UserError("initial belongs to volumes and videos: an image has no other slices")
        elif self.prompt == "mask" and set(self.initial) - {TRUTH}:
            raise UserError(f"prompt mask shows the truth itself: initial is then [{TRUTH}] alone")
        if len(set(self.initial)) < len(self.initial):
            raise UserError("initial names one twice")

    def _check_asking(self) -> None:
        """Refuse what does not go together with the prompt or the kind."""
        if self.prompt == TEXT and (self.margin or self.noise or self.initial):
            key = "margin" if self.margin else "noise" if self.noise else "initial"
            raise UserError(f"{key} belongs to boxes, points and masks: prompt text shows none")
        if self.objects == "term" and self.kind != "2d":
            raise UserError("objects belongs to images: in volumes and videos all of a term is asked for in any case")
        if self.lesions and self.kind == "video":
            raise UserError("lesions are counted in images and volumes, not in videos: leave it out")
        if self.negatives < 0 or (self.negatives and (self.kind != "2d" or not self.by_term)):
            raise UserError(
                "negatives are absent terms of images: 0 or more, with kind 2d and prompt text or objects term"
            )
        wrong = [level for level in self.noise if not 0 <= level <= MOST_NOISE]
        if wrong:
            raise UserError(f"noise is 0 to {MOST_NOISE:g} percent of a box's sides, not {wrong[0]:g}")
        if self.noise and (self.prompt == "mask" or self.initial == [TRUTH]):
            raise UserError("noise moves boxes and points: what starts from the true mask is shown neither")

    @property
    def by_term(self) -> bool:
        """Whether all of a term in an image or volume is one object."""
        return self.kind != "2d" or self.objects == "term" or self.prompt == TEXT

    @property
    def levels(self) -> tuple[float, ...]:
        """Of noise, in order, without 0."""
        return tuple(sorted({float(level) for level in self.noise} - {0.0}))

    @property
    def title(self) -> str:
        """What the tables call it."""
        return self.name or self.folder

    @property
    def initials(self) -> list[str]:
        """Whose first masks are gone on from; one without a name in images."""
        if self.kind == "2d":
            return [""]
        return self.initial or [TRUTH if self.prompt == "mask" else OWN]


@dataclass(frozen=True)
class Protocol:
    """Which models answer which cases."""

    models: list[str]
    """Names; in the file each has below it a run, a recipe or a class (see `ModelSpec`). The others are compared with
    the first."""
    sets: list[SetSpec]
    """The cases."""
    out: str | None = None
    """Folder of the results; ``--out`` goes before it."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Of the computation; bf16-mixed is for GPUs."""
    at_once: int = 16
    """Objects that are decoded together."""
    pictures: int = 4
    """Cases of each set that the report shows."""
    by: list[str] | None = None
    """What subgroup tables are of: modality, dataset, term, set, plane, spacing or size. By default size, and what the
    cases differ in."""

    def __post_init__(self) -> None:
        if not self.models or not self.sets:
            raise UserError("models and sets name at least one each")
        if self.at_once < 1 or self.pictures < 0:
            raise UserError(f"at_once is 1 or more, pictures 0 or more: not {self.at_once} and {self.pictures}")
        for name in self.by or ():
            if name not in GROUPINGS:
                raise UserError(f"by: there is no '{name}'{nearest(name, GROUPINGS)}; known: {', '.join(GROUPINGS)}")
        taken = [name for name in (COPY, OWN, TRUTH, DIRECT, TEXT, "") if name in self.models]
        if taken:
            raise UserError(f"models: '{taken[0]}' means something else here: choose another name")
        seen: set[tuple[str, str]] = set()
        for number, one in enumerate(self.sets):
            for name in one.initial:
                if name not in (OWN, TRUTH, DIRECT) and name not in self.models:
                    known = [OWN, TRUTH, DIRECT, *self.models]
                    raise UserError(f"sets[{number}].initial: there is no model '{name}'{nearest(name, known)}")
            if (one.title, one.kind) in seen:
                raise UserError(f"sets[{number}]: '{one.title}' is there twice as {one.kind}: give it a name")
            seen.add((one.title, one.kind))


@dataclass(frozen=True)
class Loaded:
    """A protocol that was read.

    Attributes:
        path: The file.
        protocol: What it says.
        models: Where its models come from, by name, in the order of the file.
        question: Its opening question.
        caveat: The caveat in its opening comment.
        text: All that is in the file.
    """

    path: Path
    protocol: Protocol
    models: dict[str, ModelSpec]
    question: str
    caveat: str
    text: str

    def grouped(self, by: list[str] | None) -> Loaded:
        """The same with other subgroups; those of the protocol where none are given.

        Raises:
            UserError: There is no such grouping.
        """
        if by is None:
            return self
        try:
            return replace(self, protocol=replace(self.protocol, by=by))
        except UserError as error:
            raise UserError(f"--{error}") from None


def load_protocol(path: str | Path) -> Loaded:
    """Read a protocol; no model and no shard is opened.

    Raises:
        UserError: The file is missing, a key is unknown or has a wrong value, or a class is unknown or not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such protocol; recipes/evaluation has some")
    content = load_yaml(path)
    if "model" in content and "models" not in content:
        raise UserError(f"{path}: this is a recipe of a training, no evaluation protocol: see recipes/evaluation")
    nodes = content.get("models")
    if not isinstance(nodes, dict) or not all(isinstance(name, str) for name in nodes):
        raise UserError(f"{path}: models: expected names, each with a run, a recipe or a class_path below it")
    protocol = from_mapping(Protocol, {**content, "models": list(nodes)}, str(path))
    models = {name: _model(node, path, f"models.{name}") for name, node in nodes.items()}
    text = path.read_text(encoding="utf-8")
    return Loaded(path, protocol, models, *opening(text), text)


def _model(node: Any, path: Path, key: str) -> ModelSpec:
    """One model's keys, checked; nothing that they name is made."""
    if not isinstance(node, dict):
        raise UserError(f"{path}: {key}: expected a run, a recipe or a class_path, not {node!r}")
    arguments = node.get("init_args") or {}
    spec = from_mapping(ModelSpec, {name: value for name, value in node.items() if name != "init_args"}, str(path), key)
    if spec.class_path is not None:
        check_content({"class_path": spec.class_path, "init_args": arguments}, f"{path}: ", key)
    elif arguments:
        raise UserError(f"{path}: {key}: init_args belong to a class_path")
    if spec.recipe is not None:
        check_recipe(spec.recipe)
    return replace(spec, init_args=arguments)


def fingerprint(*parts: Any) -> str:
    """Twelve letters that stand for what a result depends on.

    Args:
        parts: Dataclasses, or what JSON takes.
    """
    plain = [part if isinstance(part, str | dict) else asdict(part) for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
