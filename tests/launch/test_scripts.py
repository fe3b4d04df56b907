"""What the engines get: job scripts that bash reads, and runs; manifests that are YAML of the right form."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from data_shards.errors import UserError
from trainer.cluster import Cluster
from trainer.launch import kubernetes, local, slurm

BASH_READS_ONLY = ["bash", "-n"]
ODD = 'a run\'s «ß» 100% "x" \\ $HOME'


def directives(script: str) -> dict[str, str]:
    found = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in found)}


def test_a_job_asks_for_its_nodes(make_job):
    cluster = Cluster(
        "slurm",
        gpu="H100-80GB",
        hours=36.5,
        cpus_per_task=12,
        memory_gb=480,
        partition="gpu",
        account="us",
        gres="gpu:h100",
        options={"exclusive": True, "constraint": "a&b", "nice": 5, "overcommit": False},
    )
    job = make_job(cluster, nodes=2, processes=4, on_gpus=True)
    script = slurm.script(job)
    assert directives(script) == {
        "job-name": "it",
        "output": f"{job.folder}/log.txt",
        "open-mode": "append",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gres": "gpu:h100:4",
        "cpus-per-task": "12",
        "mem": "491520M",
        "time": "1-12:30:00",
        "partition": "gpu",
        "account": "us",
        "requeue": "",
        "signal": "USR1@120",
        "exclusive": "",
        "constraint": '"a&b"',
        "nice": "5",
    }
    assert "\nexport NCCL_DEBUG=WARN  # " in script
    assert "srun --kill-on-bad-exit=1 --wait=300 --cpus-per-task=12 " in script
    last_directive = script.rindex("#SBATCH")
    assert "\nexport" not in script[:last_directive], "sbatch reads none after the first command"


def test_a_cluster_of_cpus_asks_for_no_gpu(make_job):
    script = slurm.script(make_job(Cluster("slurm", requeue=False), processes=2))
    assert not {"gres", "time", "mem", "cpus-per-task"} & directives(script).keys()
    assert "no-requeue" in directives(script) and "NCCL" not in script and "scontrol" not in script


@pytest.mark.parametrize("seconds", [59, 3600, 86_399, 86_400 * 7 + 61])
def test_a_time_limit_is_read_as_slurm_reads_it(seconds):
    days, rest = slurm._time(seconds / 3600).split("-")
    hours, minutes, left = map(int, rest.split(":"))
    assert ((int(days) * 24 + hours) * 60 + minutes) * 60 + left == seconds


def run_script(job, engines, tmp_path, task: int | None = None) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "job.sh"
    path.write_text(slurm.script(job))
    assert subprocess.run([*BASH_READS_ONLY, path], check=False).returncode == 0
    environment = {**os.environ, "SLURM_JOB_ID": "77", **({} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)})}
    return subprocess.run(["bash", path], env=environment, capture_output=True, text=True, check=False)


def test_every_word_arrives_as_it_was_and_nothing_is_run_by_the_shell(make_job, engines, tmp_path):
    job = make_job(Cluster("slurm", environment={"WORDS": "a b'$(touch hacked)"}, python="/opt/py thon"), ODD)
    engines.answers("srun")
    assert run_script(job, engines, tmp_path).returncode == 0
    options = ["--kill-on-bad-exit=1", "--wait=300"]
    assert engines.calls("srun") == [[*options, "/opt/py thon", "-m", "trainer.cli", *job.tasks[0].arguments]]
    assert not list(tmp_path.rglob("hacked"))
    (output,) = (line for line in slurm.script(job).splitlines() if "--output" in line)
    folder = str(job.folder).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    assert output == f'#SBATCH --output="{folder}/log.txt"'


def test_setup_is_shell_and_comes_before_the_ranks(make_job, engines, tmp_path):
    job = make_job(Cluster("slurm", setup=["export MADE=$((6 * 7))", 'echo "made $MADE"']))
    engines.answers("srun", out="ran\n")
    assert run_script(job, engines, tmp_path).stdout == "made 42\nran\n"


@pytest.mark.parametrize(
    ("code", "state", "saved", "again"),
    [
        (143, "RUNNING", True, True),
        (138, "RUNNING", True, True),
        (143, "COMPLETING", True, False),  # cancelled, or requeued by others
        (143, "RUNNING", False, False),  # it would never end
        (2, "RUNNING", True, False),
        (1, "RUNNING", True, False),
        (0, "RUNNING", True, False),
    ],
)
def test_what_is_queued_again(make_job, engines, tmp_path, code, state, saved, again):
    job = make_job(Cluster("slurm"), ODD, nodes=2)
    checkpoint = job.tasks[0].root / "checkpoints" / "step-00000001.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("old")
    os.utime(checkpoint, (1, 1))
    os.utime(checkpoint.parent, (1, 1))
    engines.answers("srun", code=code)
    engines.answers("squeue", out=f"{state}\n")
    engines.answers("scontrol")
    if saved:  # since the job started: from now on
        os.utime(checkpoint, (4e9, 4e9))
    done = run_script(job, engines, tmp_path)
    assert done.returncode == code
    assert engines.calls("scontrol") == ([["requeue", "77"]] if again else [])
    assert ("give it more hours" in done.stdout) == (code == 143 and state == "RUNNING" and not saved)


def test_a_signal_to_the_shell_waits_for_its_ranks(make_job, engines, tmp_path):
    job = make_job(Cluster("slurm"))
    engines.answers("squeue", out="COMPLETING\n")
    engines.answers("scontrol")
    rank = engines.folder / "srun"
    rank.write_text('#!/bin/bash\nkill -TERM "$PPID"\nsleep 0.3\necho saved\nexit 143\n')
    rank.chmod(0o755)
    done = run_script(job, engines, tmp_path)
    assert (done.returncode, done.stdout) == (143, "saved\n")
    assert engines.calls("scontrol") == []


def test_an_array_has_a_task_for_each(make_job, engines, tmp_path):
    job = make_job(Cluster("slurm"), "a", "b", "c")
    assert directives(slurm.script(job))["array"] == "1-3"
    assert directives(slurm.script(job))["output"].endswith("/a/jobs/001/log-%a.txt")
    engines.answers("srun")
    for number, task in enumerate(job.tasks, 1):
        run_script(job, engines, tmp_path, number)
        assert engines.calls("srun")[-1][-len(task.arguments) :] == list(task.arguments)


def test_a_job_that_follows_another(make_job):
    script = slurm.script(make_job(Cluster("slurm"), keep=False), after="12")
    assert directives(script)["dependency"] == "afterok:12"
    assert directives(script)["kill-on-invalid-dep"] == "yes", "it would wait for ever"
    assert directives(script)["signal"] == "TERM@120"


def test_torchrun_starts_several_and_python_one(make_job, tmp_path):
    one, two = make_job(Cluster("local"), "one"), make_job(Cluster("local"), "two", processes=2)
    assert local.command(one, one.tasks[0])[1:4] == ["-m", "trainer.cli", "fit"]
    words = local.command(two, two.tasks[0])
    assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert words[6:] == ["-m", "trainer.cli", *two.tasks[0].arguments]


def test_setup_here_is_shell_too(make_job):
    job = make_job(Cluster("local", setup=["export MADE=$((6 * 7))"], python="printenv"))
    said = subprocess.run(
        [*local.command(job, job.tasks[0])[:3], "bash", "printenv", "MADE"], capture_output=True, text=True
    )
    assert said.stdout == "42\n"


def test_what_the_shell_has_set_stays_and_the_cluster_file_goes_before_it(make_job, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    job = make_job(Cluster("local", environment={"NCCL_DEBUG": "TRACE"}), on_gpus=True)
    found = local.environment(job)
    assert (found["OMP_NUM_THREADS"], found["NCCL_DEBUG"], found["PYTHONUNBUFFERED"]) == ("3", "TRACE", "1")


KUBERNETES = Cluster(
    "kubernetes",
    gpu="H100-80GB",
    hours=2,
    image="us/trainer:1",
    namespace="team",
    volumes={"/workspace": "claim"},
    cpus_per_task=12,
    memory_gb=256,
    shared_memory_gb=32,
    secrets=["wandb"],
    environment={"N": 1},
    setup=["ulimit -l unlimited"],
)


def test_a_pytorchjob_has_a_pod_for_each_node(make_job):
    job = make_job(KUBERNETES, nodes=3, processes=4, on_gpus=True)
    recipes, whole = yaml.safe_load_all(kubernetes.manifest(job))
    assert (recipes["kind"], recipes["data"]) == ("ConfigMap", job.tasks[0].files)
    assert (whole["apiVersion"], whole["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert whole["metadata"] == recipes["metadata"] == {"name": "it", "namespace": "team"}
    spec = whole["spec"]
    assert spec["runPolicy"] == {"backoffLimit": 10, "cleanPodPolicy": "Running", "activeDeadlineSeconds": 7200}
    assert [(kind, one["replicas"]) for kind, one in spec["pytorchReplicaSpecs"].items()] == [
        ("Master", 1),
        ("Worker", 2),
    ]
    pod = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["name"], container["image"]) == ("pytorch", "us/trainer:1"), "the operator looks for that name"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4, "cpu": 48, "memory": "262144Mi"}
    assert {"name": "N", "value": "1"} in container["env"], "values are text"
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shared-memory": "/dev/shm", "recipes": kubernetes.RECIPES, "volume-1": "/workspace"}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes["shared-memory"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "32768Mi"}}
    assert volumes["volume-1"] == {"persistentVolumeClaim": {"claimName": "claim"}}
    assert volumes.keys() == mounts.keys()


def test_a_pod_runs_torchrun_in_the_place_of_its_shell(make_job, tmp_path):
    job = make_job(KUBERNETES, nodes=3, processes=4, on_gpus=True)
    script = kubernetes._script(job)
    assert subprocess.run([*BASH_READS_ONLY, "-c", script], check=False).returncode == 0
    setup, command = script.splitlines()[1:]
    assert setup == "ulimit -l unlimited" and command.startswith("exec ")
    environment = {"RANK": "2", "MASTER_ADDR": "it-master-0", "MASTER_PORT": "23456", "PATH": os.environ["PATH"]}
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command.removeprefix('exec ')}"],
        env=environment,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert said[:6] == ["python", "-m", "torch.distributed.run", "--nnodes=3", "--nproc-per-node=4", "--node-rank=2"]
    assert said[6:10] == ["--master-addr=it-master-0", "--master-port=23456", "-m", "trainer.cli"]
    assert said[10:] == list(job.tasks[0].arguments)


def test_a_single_pod_is_a_machine_by_itself(make_job):
    (_, whole) = yaml.safe_load_all(kubernetes.manifest(make_job(KUBERNETES, processes=2)))
    replicas = whole["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master"]
    assert "--standalone" in shlex.split(replicas["Master"]["template"]["spec"]["containers"][0]["command"][2])


@pytest.mark.parametrize("root", ["runs/a", "/workspace/runs"])
def test_a_run_on_a_volume_is_taken(root):
    kubernetes.check_run_folder(root, Cluster("kubernetes", image="x", volumes={"/workspace": "claim"}))


@pytest.mark.parametrize("root", ["/tmp/run", "/workspaces"])
def test_a_run_whose_checkpoints_would_be_gone_is_refused(root):
    with pytest.raises(UserError, match="gone with the pod"):
        kubernetes.check_run_folder(root, Cluster("kubernetes", image="x", volumes={"/workspace": "claim"}))


def test_what_the_pattern_of_a_log_names(make_job):
    assert slurm.log_pattern(make_job(Cluster("slurm"))) == "log.txt"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
