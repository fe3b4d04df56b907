"""`trainer launch`: what is checked before anything is queued, what is written, and a training that really runs."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from trainer.launch.records import last_step

REPOSITORY = Path(__file__).parents[2]
CPUS = {"kind": "slurm", "hours": 1}


def cluster_file(folder: Path, cluster: dict[str, object] | None = None, **trainer: object) -> Path:
    path = folder / "cluster.yaml"
    places = {"num_nodes": 1, "devices": 2, **trainer}
    path.write_text(yaml.safe_dump({"trainer": places, "cluster": CPUS if cluster is None else cluster}))
    return path


def record_of(run: Path, number: str = "001") -> dict[str, object]:
    return json.loads((run / "jobs" / number / "job.json").read_text())


def test_a_job_is_submitted_with_its_recipes_as_they_were(tiny_recipe, tmp_path, engines, trainer_command):
    engines.answers("sbatch", out="4711;cluster\n")
    cluster = cluster_file(tmp_path)
    code, out, err = trainer_command("launch", tiny_recipe, "--cluster", cluster, "--trainer.max_steps", 3)
    assert (code, err) == (0, ""), err
    folder = tmp_path / "run" / "jobs" / "001"
    assert engines.calls("sbatch") == [["--parsable", str(folder / "job.sh")]]
    assert "as 4711: 1 node × 2 processes, at most 1 h at a time" in out and str(folder / "log.txt") in out
    assert (folder / "1-tiny.yaml").read_text() == tiny_recipe.read_text()
    assert (folder / "2-cluster.yaml").read_text() == cluster.read_text()
    words = f"fit -c {folder}/1-tiny.yaml -c {folder}/2-cluster.yaml --trainer.max_steps 3 --ckpt_path last)"
    assert words in (folder / "job.sh").read_text()
    found = record_of(tmp_path / "run")
    assert (found["id"], found["kind"], found["root"]) == ("4711", "slurm", str(tmp_path / "run"))
    tiny_recipe.write_text("nothing: good\n")
    assert trainer_command("fit", "-c", folder / "1-tiny.yaml", "--print_config")[0] == 0, "the copy is the recipe"


def test_what_sbatch_refuses_leaves_nothing(tiny_recipe, tmp_path, engines, trainer_command):
    engines.answers("sbatch", code=1, err="sbatch: error: invalid partition specified: gpu\n")
    code, _, err = trainer_command("launch", tiny_recipe, "--cluster", cluster_file(tmp_path))
    assert (code, err) == (
        2,
        "trainer: error: sbatch refused the job: sbatch: error: invalid partition specified: gpu\n",
    )
    assert not list(tmp_path.rglob("job.*"))


MISTAKES = {
    "no cluster": ([], "--cluster FILE is missing"),
    "no devices": (["--trainer.devices", "0"], "trainer.devices 0: a number of 1 or more"),
    "batch": (["--data.init_args.micro_batch_size", "4"], "1 × 2 processes: "),
    "key": (["--trainer.max_step", "3"], "unknown key 'trainer.max_step'"),
    "cluster's key": (["--cluster.hors", "3"], "cluster: unknown key 'hors'; did you mean 'hours'?"),
    "checkpoint": (["--ckpt_path", "best"], "a job always goes on from the run's last checkpoint; leave it out"),
    "GPU": (["--trainer.accelerator", "gpu"], "cluster.gpu null, which is CPUs"),
    "name": (["--name", "interactive"], "takes a job of that name for a shell"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_is_queued(tiny_recipe, tmp_path, engines, trainer_command, name):
    engines.answers("sbatch", out="1\n")
    words, said = MISTAKES[name]
    cluster = ["--cluster", cluster_file(tmp_path)] if name != "no cluster" else []
    code, out, err = trainer_command("launch", tiny_recipe, *cluster, *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert engines.calls("sbatch") == [] and not (tmp_path / "run").exists()


def test_without_an_engine_it_says_where_to_go(tiny_recipe, tmp_path, trainer_command, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = trainer_command("launch", tiny_recipe, "--cluster", cluster_file(tmp_path))
    assert code == 2 and "sbatch is not here: run this on a login node" in err and "--dry-run" in err
    cluster = cluster_file(tmp_path, {"kind": "kubernetes", "image": "x"})
    code, _, err = trainer_command("launch", tiny_recipe, "--cluster", cluster)
    assert code == 2 and "kubectl is not here" in err


def test_an_array_of_recipes_has_a_run_for_each(tiny_recipe, tmp_path, engines, trainer_command):
    engines.answers("sbatch", out="8\n")
    content = yaml.safe_load(tiny_recipe.read_text())
    content["trainer"]["default_root_dir"] = str(tmp_path / "other")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(content))
    cluster = cluster_file(tmp_path)
    code, _, err = trainer_command("launch", "--array", tiny_recipe, other, "--cluster", cluster)
    assert (code, err) == (0, ""), err
    script = (tmp_path / "run/jobs/001/job.sh").read_text()
    assert "#SBATCH --array=1-2\n" in script
    assert f"2) root={tmp_path}/other; command=(" in script
    for run, number in (("run", 1), ("other", 2)):
        found = record_of(tmp_path / run)
        assert (found["id"], found["root"]) == (f"8_{number}", str(tmp_path / run))
        assert found["log"] == f"{tmp_path}/run/jobs/001/log-{number}.txt"
    code, _, err = trainer_command("launch", "--array", tiny_recipe, tiny_recipe, "--cluster", cluster)
    assert code == 2 and "each run needs a folder of its own" in err


def test_a_dry_run_writes_nothing(tiny_recipe, tmp_path, trainer_command):
    code, out, _ = trainer_command("launch", tiny_recipe, "--cluster", cluster_file(tmp_path), "--dry-run")
    assert code == 0 and out.startswith("#!/bin/bash\n") and not (tmp_path / "run").exists()
    assert subprocess.run(["bash", "-n"], input=out, text=True, check=False).returncode == 0


def test_a_pytorchjob_is_applied(tiny_recipe, tmp_path, engines, trainer_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engines.answers("kubectl")
    cluster = {"kind": "kubernetes", "image": "us/trainer:1", "volumes": {str(tmp_path): "claim"}}
    code, _, err = trainer_command("launch", tiny_recipe, "--cluster", cluster_file(tmp_path, cluster), "--name", "A b")
    assert (code, err) == (0, ""), err
    assert engines.calls("kubectl") == [["apply", "-f", "-"]]
    recipes, job = yaml.safe_load_all(engines.texts("kubectl")[0])
    assert recipes["data"]["1-tiny.yaml"] == tiny_recipe.read_text()
    assert job["metadata"]["name"] == "a-b-001"
    command = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["command"][2]
    assert "fit -c /etc/sam-trainer/recipes/1-tiny.yaml" in command and "--ckpt_path last" in command
    assert json.loads((tmp_path / "runs/a-b/jobs/001/job.json").read_text())["id"] == "a-b-001"


def spec_of(shards: Path) -> Path:
    return shards.parent / "tiny.yaml"


def test_shards_are_built_by_an_array_and_merged_after_it(tiny_shards, tmp_path, engines, trainer_command):
    engines.answers("sbatch", out="31\n")
    out = tmp_path / "corpus"
    words = ("launch", "build", spec_of(tiny_shards), "--root", tiny_shards.parent, "--out", out, "--parts", 3)
    code, _, err = trainer_command(*words, "--cluster", cluster_file(tmp_path))
    assert (code, err) == (0, ""), err
    build, merge = ((tmp_path / "corpus.jobs" / name / "job.sh").read_text() for name in ("001", "002"))
    assert "#SBATCH --array=1-3\n" in build and f"--out {out} --part 3/3" in build
    assert "#SBATCH --nodes=1\n" in build and "#SBATCH --ntasks-per-node=1\n" in build and "gres" not in build
    assert "#SBATCH --dependency=afterok:31\n" in merge and f"-m data_shards.cli merge {out})" in merge
    assert not out.exists(), "a build takes no folder that has something else in it"


def test_shards_are_built_here_too(tiny_shards, tmp_path, trainer_command):
    out = tmp_path / "corpus"
    words = ("launch", "build", spec_of(tiny_shards), "--root", tiny_shards.parent, "--out", out, "--parts", 2)
    code, _, err = trainer_command(*words, "--cluster", cluster_file(tmp_path, {"kind": "local"}))
    assert code == 0, err
    same = {path.relative_to(tiny_shards): path.read_bytes() for path in tiny_shards.rglob("*.tar")}
    assert same and same == {path.relative_to(out): path.read_bytes() for path in out.rglob("*.tar")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("SPEC", "--parts", "2"), "needs a spec, --out DIR and --parts N"),
        (("SPEC", "--out", "x", "--parts", "none"), "--parts none: a number"),
        (("SPEC", "--out", "x", "--prats", "2", "--parts", "2"), "unexpected '--prats'; did you mean '--parts'?"),
        (("nothing.yaml", "--out", "x", "--parts", "2"), "nothing.yaml: no such spec file"),
    ],
)
def test_a_mistake_in_a_build_is_told(tiny_shards, tmp_path, engines, trainer_command, words, said):
    engines.answers("sbatch", out="1\n")
    words = [str(spec_of(tiny_shards)) if word == "SPEC" else word for word in words]
    code, _, err = trainer_command("launch", "build", *words, "--cluster", cluster_file(tmp_path))
    assert code == 2 and said in err and engines.calls("sbatch") == []


def test_a_training_here_on_two_ranks_goes_on_when_it_is_launched_again(tiny_recipe, tmp_path, trainer_command):
    cluster = cluster_file(tmp_path, {"kind": "local"}, devices=1)
    launch = ("launch", tiny_recipe, "--cluster", cluster, "--trainer.devices", 2, "--trainer.max_steps")
    assert trainer_command(*launch, 2)[0] == 0
    run = tmp_path / "run"
    assert (last_step(str(run)), record_of(run)["state"]) == (2, "ended")
    with (run / "ranks.csv").open() as file:
        assert [(row["step"], row["rank"]) for row in csv.DictReader(file)] == [(s, r) for s in "12" for r in "01"]
    recorded = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recorded["cluster"], str(recorded["trainer"]["devices"])) == ({"kind": "local"}, "2")
    # with another cluster file, and another number of ranks, it is the same training
    other = {"kind": "local", "hours": 3}
    assert trainer_command("launch", tiny_recipe, "--cluster", cluster_file(tmp_path, other, devices=1))[0] == 0
    assert (last_step(str(run)), record_of(run, "002")["state"]) == (4, "ended")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["cluster"] == other


def test_a_training_here_that_is_told_to_stop_saves_on_all_ranks(tiny_recipe, tmp_path, trainer_process):
    cluster = cluster_file(tmp_path, {"kind": "local"}, devices=2)
    process = trainer_process("launch", tiny_recipe, "--cluster", cluster, "--trainer.max_steps", 5000)
    run = tmp_path / "run"
    try:
        while process.poll() is None and last_step(str(run)) is None:
            time.sleep(0.2)
        assert record_of(run)["state"] == "running"
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(60) == 143, rest
    finally:
        process.kill()
    assert record_of(run)["state"] == "stopped, saved"
    assert 1 <= last_step(str(run)) < 5000
    with (run / "ranks.csv").open() as file:
        assert last_step(str(run)) == max(int(row["step"]) for row in csv.DictReader(file)), "the step it stopped after"


def test_another_recipe_in_the_place_of_a_run_is_refused_before_it_is_queued(
    tiny_run, tiny_shards, tmp_path, engines, trainer_command
):
    engines.answers("sbatch", out="1\n")
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, symlinks=True)
    recipe = yaml.safe_load((tiny_run.parent / "tiny.yaml").read_text())
    recipe["trainer"]["default_root_dir"] = str(run)
    recipe["model"]["init_args"]["lr"] = 5e-4
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code, _, err = trainer_command("launch", path, "--cluster", cluster_file(tmp_path))
    assert code == 2 and "cannot go on with another model.init_args.lr" in err and engines.calls("sbatch") == []


def test_help_names_every_option(trainer_command):
    code, out, _ = trainer_command("launch", "--help")
    assert code == 0
    for word in ("--cluster", "--dry-run", "--name", "--no-plan", "--array", "--parts", "--out", "trainer jobs tail"):
        assert word in out
