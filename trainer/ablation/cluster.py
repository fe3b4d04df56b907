"""An ablation as jobs of SLURM: an array that trains, and one that scores, task by task after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_shards.errors import UserError, counted
from trainer.ablation.cells import Cell
from trainer.ablation.running import stages
from trainer.ablation.spec import Loaded
from trainer.cluster import Cluster, read_cluster
from trainer.launch import slurm
from trainer.launch.checks import Checked, check_training, freeze
from trainer.launch.job import Job, Task, job_name, next_folder
from trainer.launch.submit import launch


def jobs(cells: Sequence[Cell], loaded: Loaded, where: str) -> list[list[Job]]:
    """The jobs of what is left of some cells, whose recipes are written.

    Args:
        cells: The cells.
        loaded: The spec, which names the jobs.
        where: The cluster file; it is a part of the cells' recipes already.

    Returns:
        Rows of jobs, each job after the one before it in its row: none where nothing is left.

    Raises:
        UserError: The cluster has no arrays, or a cell does not fit it.
    """
    _slurm(where)
    left = {cell.key: [stage for stage, _ in stages(cell)] for cell in cells}
    train = [cell for cell in cells if "fit" in left[cell.key]]
    score = [cell for cell in cells if left[cell.key] == ["test"]]
    out = Path(cells[0].path).absolute().parents[1]
    folder = next_folder(out / "jobs")
    name, rows = job_name(loaded.name), []
    if train:
        checked = [check_training(["-c", str(cell.path)], where, True) for cell in train]
        fit = _job(f"{name}-fit", [freeze(one) for one in checked], checked[0], where, keep=True)
        after = [_scoring(cell, one, folder) for cell, one in zip(train, checked, strict=True)]
        rows.append([fit, replace(_job(f"{name}-test", after, checked[0], where, keep=False), each=True)])
    if score:
        checked = [check_training(["-c", str(cell.path)], where, False) for cell in score]
        own = folder.with_name(f"{int(folder.name) + 1:03d}") if train else folder
        tasks = [_scoring(cell, one, own) for cell, one in zip(score, checked, strict=True)]
        rows.append([_job(f"{name}-test", tasks, checked[0], where, keep=False)])
    return rows


def submit(cells: Sequence[Cell], loaded: Loaded, where: str) -> int:
    """Submit what is left of some cells, and say how to see the results.

    Raises:
        UserError: There is no SLURM here, or it refuses.
    """
    _slurm(where)
    slurm.check_sbatch()
    rows = jobs(cells, loaded, where)
    for row in rows:
        launch(row)
    if not rows:
        print("nothing is left to do")
    print(f"when jobs have ended: trainer ablate {loaded.path} --report, with the same options")
    return 0


def show(cells: Sequence[Cell], loaded: Loaded, where: str) -> None:
    """Say what would be submitted.

    Raises:
        UserError: The cluster has no arrays.
    """
    _slurm(where)
    train = sum("fit" in [stage for stage, _ in stages(cell)] for cell in cells)
    score = sum(bool(stages(cell)) for cell in cells)
    would = f"an array of {counted(train, 'task')} would train, and {counted(score, 'task')} score"
    print(f"{loaded.name} on {where}: {would}")


def _slurm(where: str) -> Cluster:
    """The cluster.

    Raises:
        UserError: It has no arrays.
    """
    cluster = read_cluster(where)[0]
    if cluster.kind == "local":
        raise UserError(f"{where}: kind local is this machine: leave --cluster out, and the cells run here")
    if cluster.kind != "slurm":
        raise UserError(f"{where}: kind {cluster.kind} has no arrays: launch each recipe of OUT/recipes by itself")
    return cluster


def _job(name: str, tasks: Sequence[Task], checked: Checked, where: str, *, keep: bool) -> Job:
    on_gpus = checked.cluster.gpu is not None
    return Job(
        *(name, checked.cluster, where, checked.nodes, checked.processes, tuple(tasks)),
        *(Path.cwd(), on_gpus, keep),
    )


def _scoring(cell: Cell, checked: Checked, folder: Path) -> Task:
    """The task that scores a cell."""
    words = dict(stages(cell))["test"]
    devices = () if checked.devices else ("--trainer.devices", str(checked.processes))
    return Task("trainer.cli", (*words, *devices), None, folder, {})
