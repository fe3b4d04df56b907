"""Cluster files: read strictly, with one clear line for a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_shards.errors import UserError
from trainer.cluster import Cluster, cluster_of, places, read_cluster

CLUSTERS = Path(__file__).parents[2] / "recipes/clusters"


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_those_of_the_recipes(path):
    cluster, nodes, processes = read_cluster(path)
    trainer = yaml.safe_load(path.read_text())["trainer"]
    assert nodes == trainer.get("num_nodes", 1)
    assert processes == trainer["devices"] or (cluster.kind == "local" and processes >= 1)
    assert (cluster.gpu is None) == (cluster.kind == "local")
    assert "strategy" not in trainer, "it would replace that of an overlay before it"
    assert "un by us" in path.read_text(), "it says what was run of it"


def test_there_is_one_of_each_kind():
    assert {read_cluster(path)[0].kind for path in CLUSTERS.glob("*.yaml")} == {"local", "slurm", "kubernetes"}


def write(folder: Path, cluster: object, trainer: object = None) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer or {"num_nodes": 2, "devices": 4}, "cluster": cluster}))
    return path


MISTAKES = {
    "key": ({"kind": "slurm", "partitoin": "gpu"}, "unknown key 'partitoin'; did you mean 'partition'?"),
    "kind": ({"kind": "slrum"}, "cluster.kind: expected one of local, slurm, kubernetes, got 'slrum'"),
    "no kind": ({"hours": 3}, "the key 'kind' is missing"),
    "GPU": ({"kind": "slurm", "gpu": "H100-80"}, "cluster.gpu: .*H100-80.*did you mean 'H100-80GB'"),
    "hours": ({"kind": "slurm", "hours": 0}, "hours 0: above 0, or null"),
    "hours in words": ({"kind": "slurm", "hours": "a day"}, "cluster.hours: expected a number, got 'a day'"),
    "shorter than its signal": ({"kind": "slurm", "hours": 0.01}, "signal_seconds 120: less than"),
    "another kind's": ({"kind": "slurm", "image": "x"}, "image is for kind kubernetes, and this is kind slurm"),
    "another kind's list": ({"kind": "local", "options": {"nice": 3}}, "options is for kind slurm"),
    "no image": ({"kind": "kubernetes"}, "the key 'image' is missing"),
    "variable": ({"kind": "slurm", "environment": {"A-B": "c"}}, "'A-B' is no name of an environment variable"),
    "a key of an account": ({"kind": "slurm", "environment": {"WANDB_API_KEY": "x"}}, "WANDB_API_KEY looks like a key"),
    "option": ({"kind": "slurm", "options": {"--nice": 3}}, "'--nice' is no long option"),
    "a line more": ({"kind": "slurm", "partition": "gpu\n#SBATCH --uid=0"}, "partition: text on one line"),
    "a line of setup more": ({"kind": "slurm", "setup": ["a\nb"]}, "setup: a list of lines"),
    "a value with a line": ({"kind": "slurm", "environment": {"A": "b\nc"}}, "environment.A: text on one line"),
    "no mapping": ("slurm", "cluster: expected a mapping"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_file(tmp_path, name):
    content, said = MISTAKES[name]
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=said) as error:
        read_cluster(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no such cluster file"):
        read_cluster(tmp_path / "none.yaml")
    (tmp_path / "overlay.yaml").write_text("trainer: {devices: 2}\n")
    with pytest.raises(UserError, match=r"no cluster file: it has no key 'cluster'; examples lie in recipes/clusters"):
        read_cluster(tmp_path / "overlay.yaml")


@pytest.mark.parametrize(
    ("kind", "trainer", "said"),
    [
        ("slurm", {"num_nodes": 1, "devices": "auto"}, "devices auto: a number"),
        ("slurm", {"num_nodes": 0, "devices": 2}, "num_nodes 0: a number"),
        ("slurm", {"num_nodes": 1, "devices": [0, 1]}, "a number"),
        ("local", {"num_nodes": 2, "devices": 1}, "kind local is this machine alone"),
    ],
)
def test_places_are_numbers(tmp_path, kind, trainer, said):
    with pytest.raises(UserError, match=said):
        read_cluster(write(tmp_path, {"kind": kind}, trainer))


def test_numbers_are_taken_from_what_yaml_makes_of_them():
    assert places(Cluster("slurm"), 3, "4", "x") == (3, 4)
    assert places(Cluster("local"), 1, [0, 2], "x") == (1, 2)
    cluster = cluster_of({"kind": "slurm", "hours": 1, "environment": {"NCCL_IB_TIMEOUT": 22}}, "x")
    assert (cluster.hours, cluster.environment) == (1.0, {"NCCL_IB_TIMEOUT": 22})
