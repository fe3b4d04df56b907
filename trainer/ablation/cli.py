"""`trainer ablate`: one question, several cells, one budget."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.errors import CommandParser, UserError, counted
from trainer.ablation.spec import Budget, Loaded, load_ablation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.ablation.cells import Cell
    from trainer.ablation.results import Results

DESCRIPTION = """\
Answer a question by an ablation: a base recipe, cells that differ from it in a few keys, seeds, and a budget that all
cells share. Every cell's full recipe is written before anything runs; then each is trained and scored in a process of
its own, one after another.

  trainer ablate recipes/ablations/peft_vs_full.yaml --dry-run        the cells, and what learns in each
  trainer ablate recipes/ablations/peft_vs_full.yaml -c recipes/overlays/own_data.yaml --out runs/peft
  trainer ablate recipes/ablations/lora_rank.yaml --steps 20 --seeds 0     a first look: 20 steps, one seed
  trainer ablate recipes/ablations/lora_rank.yaml --only rank-8 rank-16/0  some cells, or one of their seeds
  trainer ablate recipes/ablations/lora_rank.yaml --cluster recipes/clusters/slurm_a100x8.yaml
                                                          the same as jobs: an array that trains, one that scores
  trainer ablate recipes/ablations/lora_rank.yaml --report            run nothing: the tables of what is there

The same command again goes on: finished cells are skipped, one that was stopped goes on from its last checkpoint, one
that failed is tried again. A cell that fails is noted with its reason, and the others go on.

  OUT/recipes/CELL-seed-S.yaml   a cell's full recipe, which `trainer fit -c` takes
  OUT/cells/CELL/seed-S          its run; seed-S.log beside it has the lines of its commands
  OUT/results.csv, runs.csv      every score and cost, by cell and group, and by cell and seed
  OUT/results.md, .tex, .html    tables with statistics, and a page with the trade-off between score and cost
"""


def ablate_command(arguments: list[str]) -> int:
    """Run ``trainer ablate`` and return its exit code: 1 where a cell failed.

    Raises:
        UserError: A mistake in the arguments, the spec or a recipe, or data that are not there.
    """
    values = _parser().parse_args(arguments)
    loaded = _changed(load_ablation(values.spec), values)
    out = Path(values.out or loaded.spec.out or f"runs/ablations/{loaded.name}")

    from trainer.ablation.cells import choose, expand, schedule_warning, write_recipes

    overlays = [*(values.config or []), *([values.cluster] if values.cluster else [])]
    cells = expand(loaded, out, overlays)
    chosen = choose(cells, values.only or [])
    if warning := schedule_warning(chosen, loaded.spec.budget):
        print(f"warning: {warning}", file=sys.stderr)
    if values.dry_run:
        _show_cells(chosen, loaded, out)
        if values.cluster:
            from trainer.ablation.cluster import show

            show(chosen, loaded, values.cluster)
        return 0
    code = 0
    if not values.report:
        write_recipes(cells)
        if values.cluster:
            from trainer.ablation.cluster import submit

            return submit(chosen, loaded, values.cluster)
        code = _run(chosen, cells, loaded, out)
    return max(code, _report(cells, loaded, out))


def _run(chosen: Sequence[Cell], cells: Sequence[Cell], loaded: Loaded, out: Path) -> int:
    """Run cells; where it is stopped, the tables of what is finished are written all the same."""
    from trainer.ablation.running import run_cells

    try:
        return run_cells(chosen)
    except (KeyboardInterrupt, SystemExit) as error:
        _report(cells, loaded, out)
        error.add_note(f"the same command goes on with what is left; {out} has what is finished")
        raise


def _changed(loaded: Loaded, values: Namespace) -> Loaded:
    """The spec with what the command line changes of it."""
    spec = loaded.spec
    if values.steps is not None:
        if values.steps < 1:
            raise UserError(f"--steps {values.steps}: 1 or more")
        spec = replace(spec, budget=Budget(steps=values.steps))
    if values.seeds:
        spec = replace(spec, seeds=values.seeds)
    return replace(loaded, spec=spec)


def _report(cells: Sequence[Cell], loaded: Loaded, out: Path) -> int:
    """Write the tables and the page of what is there, and print the main one."""
    from trainer.ablation.page import write_page
    from trainer.ablation.results import collect, write_csv
    from trainer.ablation.tables import missing, write_markdown
    from trainer.ablation.tex import write_latex

    results = collect(cells, loaded.reference)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out, results)
        write_markdown(out / "results.md", loaded, results)
        write_latex(out / "results.tex", loaded, results)
        write_page(out / "results.html", loaded, results)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}): choose another --out") from error
    _show_results(results)
    for line in missing(results):
        print(line)
    print(f"results: {out / 'results.html'}")
    return 0


def _show_cells(cells: Sequence[Cell], loaded: Loaded, out: Path) -> None:
    """Print what would be run."""
    from rich.console import Console
    from rich.table import Table

    from trainer.ablation.cells import share
    from trainer.ablation.running import standing
    from trainer.ablation.tables import count

    table = Table(title=f"{loaded.name}: {loaded.spec.budget.describe()} each", title_justify="left")
    for name in ("cell", "seed", "learns", "% of all", "now"):
        table.add_column(name, justify="right" if name in ("seed", "learns", "% of all") else "left")
    for cell in cells:
        seed = str(cell.seed) if cell.tuned else ""
        table.add_row(cell.name, seed, count(cell.learning), share(cell), standing(cell).state)
    Console().print(table)
    print(f"{counted(len(cells), 'cell')}; nothing is written or started. Results would go to {out}")


def _show_results(results: Results) -> None:
    """Print the main columns."""
    from rich.console import Console
    from rich.table import Table

    from trainer.ablation.tables import difference, main_table, spread

    table = Table()
    for name in (
        "cell",
        "learns",
        "DSC, median [Q1, Q3]",
        "NSD, median [Q1, Q3]",
        "mean difference of DSC",
        "p (Holm)",
    ):
        table.add_column(name, justify="left" if name == "cell" else "right")
    for row, line in zip(results.rows, main_table(results).rows, strict=True):
        dsc, nsd = (results.entry(row.name, name) for name in ("dsc", "nsd"))
        table.add_row(row.name, line[1], spread(dsc), spread(nsd), *difference(dsc, results.reference))
    Console().print(table)


def _parser() -> CommandParser:
    parser = CommandParser(prog="trainer ablate", description=DESCRIPTION)
    parser.add_argument("spec", metavar="SPEC.yaml", help="the spec of an ablation; recipes/ablations has some")
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="OVERLAY",
        help="a recipe that lies on every cell, such as one's own data; may be given several times",
    )
    parser.add_argument("--out", metavar="FOLDER", help="where everything goes (default: runs/ablations/NAME)")
    parser.add_argument("--steps", type=int, metavar="N", help="another budget: so many steps for every cell")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S", help="other seeds than the spec's")
    parser.add_argument(
        "--only", nargs="+", metavar="CELL", help="some cells alone: lora, or lora/0 for one seed of it"
    )
    parser.add_argument("--cluster", metavar="FILE", help="submit jobs to this machine in the place of running here")
    parser.add_argument("--dry-run", action="store_true", help="print the cells, and do nothing")
    parser.add_argument("--report", action="store_true", help="run nothing: write the tables of what is there")
    return parser
