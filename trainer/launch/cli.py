"""`trainer launch`: a recipe and a cluster file become a job."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError, nearest
from trainer.cluster import Cluster, read_cluster
from trainer.launch import kubernetes, local, slurm
from trainer.launch.job import Job, Task, job_name, next_folder
from trainer.launch.submit import launch

HELP = """\
usage: trainer launch RECIPE [-c OVERLAY ...] --cluster FILE [--KEY VALUE ...] [--dry-run] [--name NAME] [--no-plan]
       trainer launch --array RECIPE RECIPE ... --cluster FILE [...]
       trainer launch build SPEC.yaml --out DIR --parts N --cluster FILE [--root DIR] [...]

Train a recipe where the cluster file says: on this machine with torchrun, or as a job of SLURM or Kubernetes.
Recipe and cluster are checked first: what is wrong with them is said now, not when a node is free.

  trainer launch recipes/quickstart.yaml --cluster recipes/clusters/local.yaml
  trainer launch recipes/medsam/full.yaml --cluster recipes/clusters/slurm_a100x8.yaml --dry-run
  trainer launch recipes/medsam/full.yaml --cluster recipes/clusters/slurm_a100x8.yaml
  trainer jobs                                     what was launched, and how it is doing
  trainer jobs tail runs/medsam-full -f            its lines
  trainer jobs cancel runs/medsam-full             end it

The job goes on from the run's last checkpoint: the same command again, after a failure or with other nodes, goes on
where the run was. One that reaches its time limit, or makes room for others, saves, is queued again, and goes on.

  RECIPE, -c, --config   recipes: later ones overlay earlier ones
  --cluster FILE         the machine, an overlay with the key `cluster`; it takes its place among them
  --KEY VALUE            any key of the recipe, as `trainer fit` takes it, and of the cluster: --cluster.hours 2
  --array A.yaml B.yaml  one task for each of these recipes, as for the cells of an ablation
  --dry-run              print what would be run or submitted, and do nothing
  --name NAME            the job's name (default: that of the run's folder)
  --no-plan              leave out the look at whether it fits the cluster's GPU
  -h, --help             print this

The copies of the recipes, the job script and its log are in RUN/jobs/001, 002, …: what is edited later changes no job
that waits. Shards are built by an array of `data-shards build --part`, and merged by a job that follows.
A cluster file of your own: copy one of recipes/clusters and change its few lines; trainer/cluster.py explains each key.
Mistakes end with one line and exit code 2.
"""


@dataclass
class Wanted:
    """What the command line asks for beside recipes and keys."""

    dry: bool = False
    plan: bool = True
    name: str | None = None
    array: tuple[str, ...] = ()
    out: str | None = None
    parts: int | None = None
    root: str | None = None


def launch_command(arguments: list[str]) -> int:
    """Run ``trainer launch`` and return its exit code: that of the training where it runs here.

    Raises:
        UserError: A mistake in the arguments, a recipe or the cluster.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    building = arguments[0] == "build"
    wanted, words = _take(arguments[1:] if building else arguments, building)
    jobs = _shards(words, wanted) if building else [_trainings(words, wanted)]
    if wanted.dry:
        _show(jobs)
        return 0
    return launch(jobs)


def _take(arguments: Sequence[str], building: bool) -> tuple[Wanted, list[str]]:
    """Split off this command's own options.

    Raises:
        UserError: A value is missing or wrong.
    """
    wanted, words, rest = Wanted(), [], list(arguments)
    own = ("--name", *(("--out", "--parts", "--root") if building else ()))
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name == "--dry-run":
            wanted.dry = True
        elif name == "--no-plan":
            wanted.plan = False
        elif name == "--array" and not building:
            while rest and not rest[0].startswith("-"):
                wanted.array += (rest.pop(0),)
            if not wanted.array:
                raise UserError("--array needs recipes: trainer launch --array A.yaml B.yaml --cluster FILE")
        elif name in own:
            if not equals and not rest:
                raise UserError(f"{name} needs a value; see trainer launch --help")
            value = value if equals else rest.pop(0)
            if name == "--parts":
                if not value.isdigit() or not 1 <= int(value) <= 10_000:
                    raise UserError(f"--parts {value}: a number from 1 to 10,000")
                wanted.parts = int(value)
            else:
                setattr(wanted, name[2:], value)
        else:
            words.append(name + equals + value)
    return wanted, words


def _cluster_file(cluster: str | None) -> str:
    """The cluster file.

    Raises:
        UserError: There is none.
    """
    if cluster is None:
        known = sorted(str(path) for path in Path("recipes/clusters").glob("*.yaml"))
        raise UserError(f"--cluster FILE is missing: the machine{'; here are ' + ', '.join(known) if known else ''}")
    return cluster


def _trainings(words: list[str], wanted: Wanted) -> Job:
    """The job of a recipe, or of an array of them.

    Raises:
        UserError: There is a mistake in one, or they do not go together.
    """
    named = bool(words) and not words[0].startswith("-")
    if wanted.array and named:
        raise UserError(f"'{words[0]}' beside --array: give every recipe after --array, and overlays with -c")
    if not wanted.array and not named and not {"-c", "--config"} & {word.partition("=")[0] for word in words}:
        raise UserError("launch needs a recipe: trainer launch RECIPE --cluster FILE; see trainer launch --help")
    from trainer.launch.checks import check_training, freeze, recipe_words

    starts = [["-c", recipe] for recipe in wanted.array] or [["-c", words.pop(0)] if named else []]
    lines = [recipe_words([*start, *words]) for start in starts]
    where = _cluster_file(lines[0][1])
    cluster, _, _ = read_cluster(where)
    if not wanted.dry:
        _check_engine(cluster)
    if wanted.array and cluster.kind == "kubernetes":
        raise UserError("--array: kinds local and slurm have arrays; launch each recipe by itself on kubernetes")
    checked = [check_training(line, where, wanted.plan) for line, _ in lines]
    first = checked[0]
    for one, (line, _) in zip(checked, lines, strict=True):
        if (one.nodes, one.processes) != (first.nodes, first.processes):
            raise UserError(
                f"recipe {line[1]}: {one.nodes} × {one.processes} processes, and the array's first has others"
            )
    roots = [str(one.root) for one in checked]
    if twice := next((root for root in roots if roots.count(root) > 1), None):
        raise UserError(
            f"--array: two recipes have trainer.default_root_dir {twice}: each run needs a folder of its own"
        )
    name = job_name(wanted.name or (first.root.name if len(checked) == 1 else f"{first.root.name}-array"))
    if first.cluster.kind == "kubernetes":
        kubernetes.check_run_folder(str(first.root), first.cluster)
        jobs = Path("runs").absolute() / name / "jobs"  # the run itself is in the cluster
        tasks = [freeze(first, jobs, kubernetes.RECIPES, first.root)]
        name = f"{name}-{tasks[0].folder.name}"  # the cluster keeps the names of jobs that ended
    else:
        tasks = [freeze(one) for one in checked]
    on_gpus = first.cluster.gpu is not None or (first.cluster.kind == "local" and _gpus_here())
    return Job(name, first.cluster, where, first.nodes, first.processes, tuple(tasks), Path.cwd(), on_gpus)


def _gpus_here() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_engine(cluster: Cluster) -> None:
    """Refuse at once where the engine is not there."""
    if cluster.kind == "slurm":
        slurm.check_sbatch()
    if cluster.kind == "kubernetes":
        kubernetes.check_kubectl()


def _shards(words: list[str], wanted: Wanted) -> list[Job]:
    """The array that builds the parts of a corpus, and the job that merges them.

    Raises:
        UserError: There is a mistake in the arguments or the spec.
    """
    specs, cluster = [], None
    while words:
        word, equals, value = words.pop(0).partition("=")
        if word == "--cluster":
            cluster = value if equals else words.pop(0) if words else None
        elif word.startswith("-"):
            known = ("--cluster", "--out", "--parts", "--root", "--name", "--dry-run")
            raise UserError(f"launch build: unexpected '{word}'{nearest(word, known)}; see trainer launch --help")
        else:
            specs.append(word)
    if len(specs) != 1 or wanted.out is None or wanted.parts is None:
        raise UserError("launch build needs a spec, --out DIR and --parts N; see trainer launch --help")
    where = _cluster_file(cluster)
    machine, _, _ = read_cluster(where)
    if machine.kind == "kubernetes":
        raise UserError("launch build: kinds local and slurm have arrays, and this cluster is kind kubernetes")
    if not wanted.dry:
        _check_engine(machine)
    from data_shards.build import prepare

    prepare(specs[0], wanted.root)  # says what is wrong with the spec, and with its files
    out = Path(wanted.out).absolute()
    folder = next_folder(out.with_name(f"{out.name}.jobs"))  # a corpus has nothing else in its folder
    options = (*(("--root", wanted.root) if wanted.root else ()), *_workers(machine))
    build = [
        Task(
            "data_shards.cli",
            ("build", specs[0], "--out", str(out), "--part", f"{i}/{wanted.parts}", *options),
            None,
            folder,
            {},
        )
        for i in range(1, wanted.parts + 1)
    ]
    after = Task("data_shards.cli", ("merge", str(out)), None, next_folder_after(folder), {})
    name = job_name(wanted.name or out.name)
    return [
        Job(f"{name}-{what}", machine, where, 1, 1, tuple(tasks), Path.cwd(), on_gpus=False, keep=False)
        for what, tasks in (("build", build), ("merge", [after]))
    ]


def next_folder_after(folder: Path) -> Path:
    """The folder of the job after the next one."""
    return folder.with_name(f"{int(folder.name) + 1:03d}")


def _workers(cluster: Cluster) -> tuple[str, ...]:
    return () if cluster.cpus_per_task is None else ("--workers", str(cluster.cpus_per_task))


def _show(jobs: Sequence[Job]) -> None:
    """Print what would be run or submitted, and nothing else, on standard output."""
    import shlex

    for number, job in enumerate(jobs):
        print(f"# {job.name}: {job.size()} ({job.where}); nothing is written or started", file=sys.stderr)
        if job.cluster.kind == "slurm":
            print(slurm.script(job, after="ID_OF_THE_BUILD" if number else None), end="")
        elif job.cluster.kind == "kubernetes":
            print(kubernetes.manifest(job), end="")
        else:
            for task in job.tasks:
                print(shlex.join(local.command(job, task)))
