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
    prompt: Literal["box", "point", "mask"] = "box"
    """What of the truth is shown: its tight box, the pixel farthest from its border, or the mask itself."""
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
        if self.kind == "2d":
            if self.prompt == "mask":
                raise UserError("prompt mask: in an image the mask is the answer: take box or point")
            if self.initial:
                raise UserError("initial belongs to volumes and videos: an image has no other slices")
        elif self.prompt == "mask" and set(self.initial) - {TRUTH}:
            raise UserError(f"prompt mask shows the truth itself: initial is then [{TRUTH}] alone")
        if len(set(self.initial)) < len(self.initial):
            raise UserError("initial names one twice")

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

    def __post_init__(self) -> None:
        if not self.models or not self.sets:
            raise UserError("models and sets name at least one each")
        if self.at_once < 1 or self.pictures < 0:
            raise UserError(f"at_once is 1 or more, pictures 0 or more: not {self.at_once} and {self.pictures}")
        taken = [name for name in (COPY, OWN, TRUTH, DIRECT, "") if name in self.models]
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
