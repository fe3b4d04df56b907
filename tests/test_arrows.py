"""The one-way arrows: who may import whom. A new module belongs to a layer, or this test says so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# A module may import from its own layer and from those below it; the first is at the top.
TRAINER_LAYERS = (
    ("trainer.cli",),
    ("trainer.ablation",),
    ("trainer.launch",),
    ("trainer.profile",),
    ("trainer.plan",),
    (
        "trainer.lightning_cli",
        "trainer.export.cli",
        "trainer.report.cli",
        "trainer.segment.cli",
        "trainer.evaluation.cli",
    ),
    ("trainer.evaluation", "trainer.demo"),
    ("trainer.resuming",),
    ("trainer.export", "trainer.segment"),
    ("trainer.callbacks",),
    ("trainer.loggers",),
    ("trainer.plan.recompute",),
    ("trainer.restore", "trainer.flops", "trainer.plan.memory", "trainer.plan.activations"),
    ("trainer.modules",),
    ("trainer.tuning", "trainer.volumes", "trainer.distributed"),
    ("trainer.checkpoints",),
    ("trainer.models",),
    ("trainer.prompts",),
    ("trainer.losses", "trainer.metrics", "trainer.ranks", "trainer.report", "trainer.rehearsal"),
    ("trainer.recipe",),
    ("trainer.presence", "trainer.cluster"),
    ("trainer.scores",),
    ("trainer.run", "trainer.quiet", "trainer.version", "trainer.hardware", "trainer.waits"),
    ("trainer",),
)
DATA_LAYERS = (
    ("data_shards.cli",),
    ("data_shards.summary", "data_shards.lint", "data_shards.reindex", "data_shards.stats"),
    ("data_shards.build", "data_shards.verify", "data_shards.inspect", "data_shards.datamodule"),
    ("data_shards.stats_plots", "data_shards.counts"),
    ("data_shards.merge",),
    ("data_shards.join",),
    ("data_shards.blocks",),
    ("data_shards.plan", "data_shards.corpus", "data_shards.loader"),
    ("data_shards.manifest",),
    ("data_shards.views", "data_shards.ahead"),
    ("data_shards.batch", "data_shards.sampler", "data_shards.dataset", "data_shards.convert"),
    ("data_shards.scan", "data_shards.order"),
    ("data_shards.drawings", "data_shards.index", "data_shards.foreign", "data_shards.sources"),
    ("data_shards.layout",),
    ("data_shards.pictures", "data_shards.patterns"),
    ("data_shards.index_file", "data_shards.stores"),
    ("data_shards.spec", "data_shards.tars"),
    ("data_shards.splits", "data_shards.preprocessing"),
    ("data_shards.readers",),
    ("data_shards.triplet", "data_shards.writer", "data_shards.stage", "data_shards.workers"),
    ("data_shards.codecs", "data_shards.runs", "data_shards.schema", "data_shards.strict", "data_shards.vocabulary"),
    ("data_shards.progress", "data_shards.seed", "data_shards.display"),
    ("data_shards.errors",),
    ("data_shards",),
)
FORBIDDEN = {  # what would pull weight or a circle into places that are light on purpose
    "trainer.models": ("lightning", "trainer.modules", "trainer.callbacks"),
    "trainer.losses": ("lightning", "trainer.models"),
    "trainer.tuning": ("lightning", "trainer.modules"),
    "trainer.report": ("torch", "lightning"),
    "trainer.run": ("torch", "lightning"),
    "trainer.scores": ("torch", "lightning"),
    "trainer.presence": ("torch", "lightning"),
    # trainer compare: tables from files alone, at once
    "trainer.evaluation.columns": ("torch", "lightning"),
    "trainer.evaluation.comparing": ("torch", "lightning"),
    "trainer.evaluation.paired": ("torch", "lightning"),
    "trainer.evaluation.paper_table": ("torch", "lightning"),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for root in ("trainer", "data_shards") for path in (REPOSITORY / root).rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {str(node.module)}
    return found


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer(name: str, layers: tuple[tuple[str, ...], ...]) -> tuple[int, str]:
    """Layer and package of a module: that of the longest prefix named in the layers."""
    fits = [(len(prefix), -depth, prefix) for depth, row in enumerate(layers) for prefix in row if below(name, prefix)]
    _, depth, prefix = max(fits)
    assert "." not in name or "." in prefix, f"{name} belongs to no layer: add it to this test"
    return -depth, prefix


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_point_down(name):
    layers = TRAINER_LAYERS if below(name, "trainer") else DATA_LAYERS
    own, package = layer(name, layers)
    for other in imports(MODULES[name]):
        if below(name, "data_shards"):
            assert not below(other, "trainer"), f"{name} imports {other}: data_shards knows nothing of trainer"
        if other not in MODULES or below(other, "data_shards") != below(name, "data_shards"):
            continue
        theirs, their_package = layer(other, layers)
        assert theirs > own or their_package == package, f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_light_places_stay_light(package):
    for name, path in MODULES.items():
        if below(name, package) and not name.endswith(".cli"):
            wrong = [o for o in imports(path) for bad in FORBIDDEN[package] if below(o, bad)]
            assert not wrong, f"{name} imports {wrong}"


def test_no_circles():
    graph = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                # a package's __init__ gathers its own modules: they may name siblings, not the package
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_files_stay_readable():
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 400}
    assert not long, f"over 400 lines: {long}"
