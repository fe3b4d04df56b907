"""`trainer fit|validate|test|predict`: LightningCLI with recipes that are checked, and runs that record themselves."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from data_shards.errors import UserError
from trainer.callbacks import (
    CalibrationRecord,
    EvaluationRecord,
    GracefulStop,
    Heartbeat,
    Memory,
    PredictionRecord,
    ProgressLines,
    RandomState,
    RankTimes,
    RunBar,
    RunCheckpoint,
    RunRecord,
    SampleTrace,
    StepGuard,
    Throughput,
    ValidationPanels,
    ValidationRecord,
)
from trainer.callbacks.breakdown import ending, say
from trainer.callbacks.ema import EMA, EvaluateAverage, check_average
from trainer.callbacks.watch import RankWatch
from trainer.cluster import cluster_of
from trainer.loggers import TensorBoard, WandB, refuse_unguarded
from trainer.modules.optimization import check_clipping
from trainer.recipe import check_class, check_content, check_recipe, explain, names_something_in, refuse_empty
from trainer.restore import Weights, average_of, check_fit, find_checkpoint, outline_checkpoint, read_checkpoint
from trainer.resuming import CheckpointFiles, refuse_another_recipe, refuse_to_overwrite, warn_of_other_code
from trainer.run import Run

EVERY_RUN = (
    *(RandomState, Throughput, Memory, RankTimes, SampleTrace, StepGuard, GracefulStop, Heartbeat),
    *(ValidationRecord, ValidationPanels, EvaluationRecord, CalibrationRecord, PredictionRecord),
)
"""Callbacks of every run; a recipe that names one itself sets it up its own way."""

_ANY_KEY = """\
Any key of the recipe can be given here too, with its dotted name; what a class takes is shown by
  trainer fit --model.help trainer.modules.MedSAMModule      (SAM3: trainer.modules.SAM3Module)
  trainer fit --data.help data_shards.datamodule.TripletDataModule
"""
DESCRIPTIONS = {
    "fit": f"""\
Train from a recipe. The run goes to its trainer.default_root_dir: resolved recipe, versions, metrics, checkpoints.
  trainer fit -c recipes/quickstart.yaml
  trainer fit -c recipes/quickstart.yaml --ckpt_path last      go on where a stopped run was
  trainer fit -c recipes/quickstart.yaml -c recipes/overlays/lora.yaml --trainer.default_root_dir runs/lora
{_ANY_KEY}""",
    "validate": f"""\
Score the validation split.
  trainer validate -c RECIPE --ckpt_path last
{_ANY_KEY}""",
    "test": f"""\
Score every target of the test split at native resolution, into evaluation/untouched or, with a checkpoint,
evaluation/tuned of the run.
  trainer test -c RECIPE                       the pretrained weights, untouched
  trainer test -c RECIPE --ckpt_path last      the trained ones; also best, or a path
  trainer test -c RECIPE --ckpt_path last --weights raw      not their average, where the recipe keeps one (EMA)
{_ANY_KEY}""",
    "predict": f"""\
Write the masks of the test split, as COCO run lengths at native resolution, to predictions/rank-R.jsonl of the run.
  trainer predict -c RECIPE --ckpt_path last
{_ANY_KEY}""",
}


class RecipeHelp(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help with descriptions as they are written."""


class RecipeParser(LightningArgumentParser):
    """A parser whose complaints are one line, and that takes no abbreviations: a typo is never accepted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False, "formatter_class": RecipeHelp})

    recipes: ClassVar[list[str]] = []
    """The recipes on this command line."""
    keys: ClassVar[set[str]] = set()
    """Every key that a recipe may have outside of classes' own arguments."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Turn a parser's complaint into a `UserError`, with the file and the nearest key."""
        own = {action.dest for action in self._actions} - {"help"}
        # The parser of a mapping inside of a class, such as `sampling`, knows that mapping's keys alone.
        whole = {"trainer", "subcommand"} & {key.split(".")[0] for key in own}
        keys = self.keys if whole or not own else own
        raise UserError(explain(message, keys, self.recipes)) from ex


class RecipeCLI(LightningCLI):
    """LightningCLI over recipes."""

    def __init__(self, arguments: list[str]) -> None:
        RecipeParser.recipes, self.opening = check_arguments(arguments)
        super().__init__(
            args=arguments,
            parser_class=RecipeParser,
            parser_kwargs={"prog": "trainer", **{name: {"description": text} for name, text in DESCRIPTIONS.items()}},
            save_config_callback=RunRecord,
            save_config_kwargs={"opening_comment": self.opening},
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpoints are a part of every run; the cluster is written down with it."""
        described = "The machine that the run is for: checked, recorded, and without effect on it; see trainer launch."
        parser.add_argument("--cluster", type=dict[str, Any] | None, default=None, help=described)
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args` and nothing else, so without the warning that `sys.argv` is left unused."""
        self.config = parser.parse_args(args)
        refuse_empty(RecipeParser.recipes, self.config[self.config["subcommand"]].__contains__, RecipeParser.keys)

    def before_instantiate_classes(self) -> None:
        """Refuse at once what Lightning would stumble over in the middle of a training.

        Raises:
            UserError: There is such a value.
        """
        cluster = self._get(self.config, "cluster")
        if cluster is not None:  # with what the command line has changed of it
            cluster_of(cluster, f"recipe {' + '.join(RecipeParser.recipes)}")
        check_clipping(self._get(self.config, "trainer.gradient_clip_val"))
        refuse_unguarded(self._get(self.config, "trainer.logger"))
        interval = self._get(self.config, "trainer.val_check_interval")
        if isinstance(interval, int | float) and not interval > 0:
            raise UserError(
                f"trainer.val_check_interval {interval}: batches of micro_batch_size from one validation to the next, "
                "or a share of an epoch: above 0"
            )
        batches = self._get(self.config, "trainer.limit_train_batches")
        if self.subcommand == "fit" and isinstance(batches, int | float) and not batches > 0:
            raise UserError(
                f"trainer.limit_train_batches {batches:g}: nothing would be learnt; batches of micro_batch_size, or a "
                "share of an epoch: above 0"
            )

    def _parse_ckpt_path(self) -> None:
        """Checkpoints are read, and refused, by `_checkpoint`."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults(weights_only=True)  # nothing pickled is trusted
        if subcommand == "predict":
            parser.set_defaults(return_predictions=False)  # they go to disk, not into memory
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = "Checkpoint to go on from or to score: last (the newest that is whole), best, or a path."
        if subcommand != "fit":
            help_text = "Weights of a checkpoint that has an average of them (trainer.callbacks.EMA): that by default."
            parser.add_argument("--weights", type=Weights | None, default=None, help=help_text)
        RecipeParser.keys |= {action.dest for action in parser._actions}
        return parser

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give every run its metrics as CSV, beside whatever logger the recipe names, all inside the run's folder."""
        config: Namespace = self._get(self.config_init, "trainer")
        self._run = run = Run(config.default_root_dir or ".")
        run.create()
        named = config.logger if isinstance(config.logger, list) else [config.logger]
        loggers: list[Logger] = [logger for logger in named if isinstance(logger, Logger)]
        for logger in loggers:
            if isinstance(logger, TensorBoard | WandB):
                logger.place(run)
        if config.logger is not False:
            loggers.insert(0, CSVLogger(run.root, name="logs", flush_logs_every_n_steps=1))
        return super().instantiate_trainer(logger=loggers, default_root_dir=str(run.root), **kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add what every run records, unless the recipe sets it up itself, and a bar or lines of progress."""
        wanted = config.get("enable_progress_bar") is not False
        config["enable_progress_bar"] = wanted and sys.stdout.isatty()
        named = [*(config.get("callbacks") or []), *callbacks]
        if sum(isinstance(callback, RunCheckpoint) for callback in named) > 1:
            raise UserError("trainer.callbacks: every run has a RunCheckpoint already: set it up by the key checkpoint")
        for kind in (*EVERY_RUN, EMA):
            if sum(isinstance(callback, kind) for callback in named) > 1:
                raise UserError(f"trainer.callbacks: {kind.__name__} is there twice: set it up once")
        for kind in () if config.get("fast_dev_run") else EVERY_RUN:  # a rehearsal leaves nothing
            if not any(isinstance(callback, kind) for callback in named):
                callbacks.append(kind())
        if wanted and not any(isinstance(callback, ProgressBar) for callback in named):
            callbacks.append(RunBar() if config["enable_progress_bar"] else ProgressLines())
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, CheckpointFiles(check=False)]  # `_checkpoint` has
        return super()._instantiate_trainer(config, callbacks)

    def instantiate_classes(self) -> None:
        """Make the recipe's objects; what their arguments do wrong is the recipe's mistake.

        Raises:
            UserError: An argument is refused.
        """
        try:
            super().instantiate_classes()
        except UserError:
            self._prune()
            raise
        except (ValueError, TypeError, MisconfigurationException) as error:
            self._prune()
            raise UserError(f"recipe {' + '.join(RecipeParser.recipes)}: {explain(str(error), set(), [])}") from error

    def _prune(self) -> None:
        if hasattr(self, "_run"):
            self._run.prune()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        named = arguments.get("ckpt_path")
        if named is not None:
            arguments["ckpt_path"] = self._checkpoint(str(named), subcommand)
        elif subcommand == "fit":
            refuse_to_overwrite(Run(self.trainer.default_root_dir))
        return arguments

    def _checkpoint(self, name: str, subcommand: str) -> str | None:
        """The checkpoint to load, checked before anything starts; None to start at step 0."""
        run, fitting = Run(self.trainer.default_root_dir), subcommand == "fit"
        path = find_checkpoint(name, run)
        if path is None:
            if not fitting:  # scoring untouched weights instead would pass for a result
                run.last_checkpoint()
            say(f"no checkpoint in {run.checkpoints} yet: starting at step 0")
            return None
        content = outline_checkpoint(path) if fitting else read_checkpoint(path)
        if fitting:  # says it better than tensors that do not fit
            recipe = self._parser(subcommand).dump(self.config[subcommand], skip_none=False, format="yaml")
            refuse_another_recipe(Run(path.parent.parent), recipe, content)
        check_fit(self.model, content["state_dict"], path)
        if fitting:
            if "loops" not in content:
                raise UserError(f"checkpoint {path}: it holds weights alone, without the place in the training")
            check_average(content, self.trainer.callbacks, path)
            warn_of_other_code(content)
            say(f"going on from {path}, step {content.get('global_step')}")
        elif average := average_of(content, self._get(self.config_init, "weights"), path):
            self.trainer.callbacks.append(EvaluateAverage(average))
        return str(path)

    def _run_subcommand(self, subcommand: str) -> None:
        started = time.perf_counter()
        with RankWatch(self.trainer) as ranks:
            try:
                super()._run_subcommand(subcommand)
                self._record(subcommand, time.perf_counter() - started)
            except BaseException as error:
                if isinstance(error, UserError | MisconfigurationException):
                    self._prune()
                told = ending(error, self.trainer, ranks, fitting=subcommand == "fit")
                if told is error:
                    raise
                raise told from error

    def _record(self, subcommand: str, seconds: float) -> None:
        """Note how long a command took, and say where its results are."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:
            return
        checkpoint = self._get(self.config, "ckpt_path")
        stage = f"evaluate-{'tuned' if checkpoint else 'untouched'}" if subcommand == "test" else subcommand
        run = Run(self.trainer.default_root_dir)
        run.add_stage(stage, seconds, anew=not (subcommand == "fit" and checkpoint))
        left = {"fit": f"run: {run.root}", "predict": f"masks: {run.root / 'predictions'}"}
        left["test"] = f"scores: {run.evaluation('')}"
        if subcommand in left:
            say(left[subcommand])


def run_lightning(arguments: list[str]) -> int:
    """Run one of Lightning's commands on a checked recipe."""
    torch.set_float32_matmul_precision("high")  # TF32 for what bf16 autocast leaves in fp32
    RecipeCLI(arguments)
    return 0


def check_arguments(arguments: list[str]) -> tuple[list[str], str]:
    """Check every recipe and class on a command line.

    Returns:
        The recipes, and the first one's opening comment.
    """
    openings: dict[str, str] = {}
    classes: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not equals and position + 1 < len(arguments):
            value = arguments[position + 1]
        if name.startswith("-c") and name != "-c":  # -cFILE
            name, value = "-c", argument[2:].removeprefix("=")
        if name in ("-c", "--config"):
            openings[value] = check_recipe(value)
            continue
        if name.startswith("--") and value.lstrip()[:1] in ("{", "["):
            _check_inline(value, name)
        if name.startswith("--") and not value.startswith("-"):
            check_content(value.strip(), "--", name.removeprefix("--"))
        if name.startswith("--") and names_something_in(value) and value.rpartition(".")[2][0].isupper():
            check_class(value, {}, name)
            classes[name.removeprefix("--").removesuffix(".class_path")] = value
        elif name.startswith("--"):
            _check_override(name, list(openings), classes)
    _check_complete(list(openings), arguments)
    return list(openings), next(iter(openings.values()), "")


def _check_inline(value: str, name: str) -> None:
    """Check the classes in YAML that was given on the command line; what is no YAML is the parser's to refuse."""
    try:
        content = yaml.safe_load(value)
    except yaml.YAMLError:
        return
    check_content(content, f"{name}: ")


def _check_complete(recipes: list[str], arguments: list[str]) -> None:
    """Refuse overlays that lie on nothing.

    Raises:
        UserError: They change the arguments of a model or of data that nobody names.
    """
    contents = {recipe: yaml.safe_load(Path(recipe).read_text()) for recipe in recipes}
    given = {argument.partition("=")[0] for argument in arguments}
    for key in ("model", "data"):
        nodes = {recipe: content[key] for recipe, content in contents.items() if content.get(key) is not None}
        named = any(not isinstance(node, dict) or "class_path" in node for node in nodes.values())
        if nodes and not named and not given & {f"--{key}", f"--{key}.class_path"}:
            recipe = next(iter(nodes))
            raise UserError(
                f"recipe {recipe}: {key} has no class_path: an overlay lies on a recipe, which comes first: "
                f"-c RECIPE -c {recipe}"
            )


def _check_override(name: str, recipes: list[str], classes: dict[str, str]) -> None:
    """Check that the class at ``--KEY.init_args.ARGUMENT`` has that argument; the command line's go before recipes'."""
    key, found, argument = name.removeprefix("--").rpartition(".init_args.")
    if key in classes:
        check_class(classes[key], {argument.split(".")[0]: None}, name)
        return
    for recipe in reversed(recipes if found else []):
        node = yaml.safe_load(Path(recipe).read_text())
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and "class_path" in node:
            check_class(node["class_path"], {argument.split(".")[0]: None}, name)
            return


def _checkpoint_folder(root: str | None) -> str:
    return str(Run(root or ".").checkpoints)
