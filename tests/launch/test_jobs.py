"""`trainer jobs`: what was launched is found, told, followed and ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.launch import slurm
from trainer.launch.records import Record, write_record


def job(folder: Path, number: str, kind: str = "slurm", **more: object) -> Path:
    """The folder of a job that was launched into a run."""
    place = folder / "jobs" / "001"
    place.mkdir(parents=True)
    log = str(place / "log.txt") if kind == "slurm" else None
    write_record(
        place,
        Record(number, f"name-{number}", kind, "2026-01-02T03:04:05", str(folder), "1 × 2 GPU", **{"log": log, **more}),
    )
    return place


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def test_every_job_is_listed_with_its_state_and_step(runs, engines, trainer_command):
    engines.answers("squeue", out="7|RUNNING|None\n9_1|RUNNING|None\n9_2|PENDING|Resources\n9_3|PENDING|Resources\n")
    engines.answers("sacct", out="8|CANCELLED by 0\n")
    engines.answers(
        "kubectl",
        out=json.dumps(
            {
                "status": {
                    "conditions": [
                        {"type": "Created", "status": "True"},
                        {"type": "Running", "status": "True"},
                        {"type": "Failed", "status": "False"},
                    ]
                }
            }
        ),
    )
    job(runs / "a", "7")
    checkpoints = runs / "a" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step-00000120.ckpt").write_text("")
    (checkpoints / "last.ckpt").symlink_to("step-00000120.ckpt")
    job(runs / "b", "8")
    job(runs / "c", "9", tasks=3)
    job(runs / "d", "d-001", "kubernetes", place="team")
    job(runs / "e", "1", "local", state="ended")
    code, out, err = trainer_command("jobs", "--json")
    assert (code, err) == (0, ""), err
    found = {row["id"]: (row["state"], row["step"]) for row in json.loads(out)}
    assert found == {
        "7": ("running", 120),
        "8": ("cancelled", None),
        "9": ("2 pending (Resources), 1 running", None),
        "d-001": ("running", None),
        "1": ("ended", None),
    }
    assert engines.calls("kubectl")[0][:5] == ["get", "pytorchjob", "d-001", "-n", "team"]
    code, out, _ = trainer_command("jobs", runs / "a")
    assert code == 0 and "name-7" in out and "120" in out and "runs/a" in out and "name-8" not in out


def test_where_slurm_keeps_no_accounts_a_job_out_of_the_queue_has_ended(engines):
    engines.answers("squeue")
    engines.answers("sacct", code=1, err="Slurm accounting storage is disabled\n")
    assert slurm.states(["7"]) == {"7": slurm.GONE}


def test_an_engine_that_does_not_answer_spoils_no_list(runs, engines, trainer_command):
    engines.answers("squeue", code=1, err="Unable to contact slurm controller\n")
    job(runs / "a", "7")
    job(runs / "e", "1", "local", state="ended")
    code, out, _ = trainer_command("jobs", "--json")
    states = {row["id"]: row["state"] for row in json.loads(out)}
    assert code == 0 and states["1"] == "ended" and "Unable to contact slurm controller" in states["7"]


def test_jobs_of_a_corpus_lie_beside_it(tmp_path, engines, trainer_command):
    engines.answers("squeue", out="5_1|RUNNING|None\n")
    (tmp_path / "corpus").mkdir()
    place = tmp_path / "corpus.jobs" / "001"
    place.mkdir(parents=True)
    write_record(place, Record("5", "corpus-build", "slurm", "2026", str(tmp_path / "corpus"), "3 tasks", None, 3))
    code, out, _ = trainer_command("jobs", tmp_path / "corpus", "--json")
    assert code == 0 and [row["id"] for row in json.loads(out)] == ["5"]
    assert len(json.loads(trainer_command("jobs", tmp_path, "--json")[1])) == 1


def test_the_last_lines_are_told_and_followed_to_the_end(runs, engines, trainer_command, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    engines.answers("squeue")  # it is over
    place = job(runs / "a", "7")
    code, _, err = trainer_command("jobs", "tail", "7")
    assert code == 2 and "no lines yet: the job is ended" in err
    (place / "log.txt").write_text("".join(f"line {n}\n" for n in range(50)))
    assert trainer_command("jobs", "tail", runs / "a", "-n", 2)[1] == "line 48\nline 49\n"
    assert trainer_command("jobs", "tail", "name-7", "-n", 1, "-f")[:2] == (0, "line 49\n")
    job(runs / "d", "d-001", "kubernetes", place="team")
    engines.answers("kubectl")
    assert trainer_command("jobs", "tail", "d-001", "-n", 3, "-f")[0] == 0
    chosen = "training.kubeflow.org/job-name=d-001,training.kubeflow.org/replica-type=master"
    assert engines.calls("kubectl") == [["logs", "-n", "team", "-l", chosen, "--tail=3", "-f"]]


def test_jobs_are_ended_by_their_engine(runs, engines, trainer_command):
    engines.answers("squeue", out="7|RUNNING|None\n")
    engines.answers("scancel")
    engines.answers("kubectl", out="{}")
    job(runs / "a", "7")
    job(runs / "d", "d-001", "kubernetes", place="team")
    assert trainer_command("jobs", "cancel", runs / "a")[:2] == (0, "cancelled 7 (name-7)\n")
    assert engines.calls("scancel") == [["7"]]
    assert trainer_command("jobs", "cancel", "d-001")[0] == 0
    assert engines.calls("kubectl")[-1][:3] == ["delete", "pytorchjob/d-001", "configmap/d-001"]
    engines.answers("squeue")
    assert trainer_command("jobs", "cancel", "7")[1] == "7 (name-7) is over: ended\n"
    assert engines.calls("scancel") == [["7"]]


def test_a_job_here_is_told_to_stop_and_no_other_process_ever(runs, trainer_command):
    place = runs / "a" / "jobs" / "001"
    words = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    ours, other = subprocess.Popen([*words, str(place)]), subprocess.Popen(words)
    try:
        job(runs / "a", str(ours.pid), "local", state="running")
        job(runs / "b", str(other.pid), "local", state="running")  # its number is another process's now
        states = {row["id"]: row["state"] for row in json.loads(trainer_command("jobs", "--json")[1])}
        assert states == {str(ours.pid): "running", str(other.pid): "lost: ended without a word"}
        assert trainer_command("jobs", "cancel", runs / "a")[0] == trainer_command("jobs", "cancel", runs / "b")[0] == 0
        assert ours.wait(10) == -signal.SIGTERM
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tail", "99"), "there is no job '99' below runs"),
        (("nowhere",), "nowhere: no such folder"),
        (("tail",), "JOB"),
        (("--jsno",), "did you mean '--json'?"),
        (("cancel", "runs"), "no job was launched there"),
    ],
)
def test_a_mistake_is_one_line(runs, trainer_command, words, said):
    code, _, err = trainer_command("jobs", *words)
    assert code == 2 and said in err and err.count("\n") == 1


def test_a_list_with_nothing_in_it(runs, trainer_command):
    assert trainer_command("jobs")[:2] == (0, "no jobs: `trainer launch RECIPE --cluster FILE` starts one\n")
    runs.rmdir()
    assert "name a run, or a folder of runs" in trainer_command("jobs")[2]
