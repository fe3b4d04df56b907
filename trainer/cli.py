"""The command `trainer`."""

from __future__ import annotations

import sys

from data_shards import __version__
from data_shards.errors import UserError, nearest, run_command
from trainer.quiet import quieten
from trainer.segment.cli import on_volume, volume_command

HELP = """\
usage: trainer COMMAND ...

Fine-tune segmentation foundation models for medicine.

  plan         say what a recipe trains       trainer plan recipes/medsam/full.yaml
  profile      say where a step's time goes   trainer profile recipes/quickstart.yaml
  fit          train from a recipe            trainer fit -c recipes/quickstart.yaml
  validate     score the validation split     trainer validate -c RECIPE --ckpt_path last
  test         score the test split           trainer test -c RECIPE [--ckpt_path last]
  predict      write masks                    trainer predict -c RECIPE --ckpt_path last
               of a whole volume              trainer predict --volume IMAGE --run RUN --box x0,y0,x1,y1 --out FILE
               of a folder of images          trainer predict --folder IMAGES --run RUN --prompts CSV --out FOLDER
  evaluate     compare models on cases        trainer evaluate RUN --data data/mine/test --out FOLDER
               as a protocol says             trainer evaluate recipes/evaluation/tiny.yaml
               score one on a volume          trainer evaluate --volume IMAGE --truth LABELS --run RUN --out FOLDER
  compare      the papers' tables of scores   trainer compare SAM=RUN/evaluation/untouched tuned=RUN
  ablate       answer a question by cells     trainer ablate recipes/ablations/peft_vs_full.yaml
  export       write weights for other tools  trainer export RUN --to litemedsam --out FILE
  consolidate  make one file of a checkpoint  trainer consolidate RUN [--out FILE]
  report       write the run's report.html    trainer report RUN…
  demo         try a model in the browser     trainer demo RUN
  launch       train on a cluster, or here    trainer launch RECIPE --cluster recipes/clusters/local.yaml
  jobs         list, follow and cancel these  trainer jobs [RUN] · trainer jobs tail RUN -f · trainer jobs cancel RUN

A recipe is one YAML file; later -c files overlay earlier ones, and any key can be given on the command line:
  trainer fit -c recipes/quickstart.yaml -c recipes/overlays/wandb.yaml --trainer.max_steps 50
A run that was stopped goes on where it was:
  trainer fit -c recipes/quickstart.yaml --ckpt_path last

`trainer COMMAND --help` says more; of volumes `trainer predict --volume --help`,
`trainer predict --folder --help` and `trainer evaluate --volume --help`.
Mistakes in the input end with one line and exit code 2.
"""

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = (
    *("plan", "profile", *LIGHTNING_COMMANDS, "evaluate", "compare", "ablate"),
    *("export", "consolidate", "report", "demo", "launch", "jobs"),
)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _main(arguments), "trainer")


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"sam-trainer {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    quieten()  # before libraries are imported: some speak then
    # imports are here so that help and mistakes answer at once
    if command in ("predict", "evaluate") and on_volume(command, rest):
        return volume_command(command, rest)
    if command == "evaluate":
        from trainer.evaluation.cli import evaluate_command

        return evaluate_command(rest)
    if command == "compare":
        from trainer.evaluation.compare_cli import compare_command

        return compare_command(rest)
    if command == "ablate":
        from trainer.ablation.cli import ablate_command

        return ablate_command(rest)
    if command in LIGHTNING_COMMANDS:
        from trainer.lightning_cli import run_lightning

        return run_lightning(arguments)
    if command == "plan":
        from trainer.plan.cli import plan_command

        return plan_command(rest)
    if command == "profile":
        from trainer.profile.cli import profile_command

        return profile_command(rest)
    if command == "export":
        from trainer.export.cli import export_command

        return export_command(rest)
    if command == "consolidate":
        from trainer.checkpoints.cli import consolidate_command

        return consolidate_command(rest)
    if command == "report":
        from trainer.report.cli import report_command

        return report_command(rest)
    if command == "demo":
        from trainer.demo.cli import demo_command

        return demo_command(rest)
    if command == "launch":
        from trainer.launch.cli import launch_command

        return launch_command(rest)
    if command == "jobs":
        from trainer.launch.jobs import jobs_command

        return jobs_command(rest)
    raise UserError(f"there is no command '{command}'{nearest(command, COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main())
