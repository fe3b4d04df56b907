"""`trainer fit|validate|test|predict`: LightningCLI with recipes that are checked, and runs that record themselves."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger

from data_shards.errors import UserError, nearest
from trainer import callbacks
from trainer.recipe import check_class, check_recipe, dotted_keys
from trainer.run import Run


class RecipeParser(LightningArgumentParser):
    """A parser whose complaints are one line, and that takes no abbreviations: a typo is never accepted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    recipes: ClassVar[list[str]] = []
    """The recipes on this command line."""
    keys: ClassVar[set[str]] = set()
    """Every key that a recipe may have outside of classes' own arguments."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Turn a parser's complaint into a `UserError`, with the file and the nearest key."""
        raise UserError(explain(message, self.keys, self.recipes)) from ex


class RecipeCLI(LightningCLI):
    """LightningCLI over recipes."""

    def __init__(self, arguments: list[str]) -> None:
        RecipeParser.recipes, self.opening = check_arguments(arguments)
        super().__init__(
            args=arguments,
            parser_class=RecipeParser,
            save_config_callback=callbacks.RunRecord,
            save_config_kwargs={"opening": self.opening},
            seed_everything_default=0,
            trainer_defaults={
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "callbacks": [
                    callbacks.progress(),
                    callbacks.Throughput(),
                    callbacks.SampleTrace(),
                    callbacks.EvaluationRecord(),
                    callbacks.PredictionRecord(),
                ],
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpoints are a part of every run."""
        parser.add_lightning_class_args(callbacks.RunCheckpoint, "checkpoint")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults(weights_only=True)  # nothing pickled is trusted
        RecipeParser.keys |= {action.dest for action in parser._actions}
        return parser

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give every run its metrics as CSV, beside whatever logger the recipe names, all inside the run's folder."""
        config: Namespace = self._get(self.config_init, "trainer")
        run = Run(config.default_root_dir or ".")
        run.create()
        named = config.logger if isinstance(config.logger, list) else [config.logger]
        loggers: list[Logger] = [logger for logger in named if isinstance(logger, Logger)]
        if config.logger is not False:
            loggers.insert(0, CSVLogger(run.root, name="logs", flush_logs_every_n_steps=1))
        return super().instantiate_trainer(logger=loggers, default_root_dir=str(run.root), **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        started = time.perf_counter()
        checkpoint = self._get(self.config, "ckpt_path")
        super()._run_subcommand(subcommand)
        if self.trainer.is_global_zero:
            stage = f"evaluate-{'tuned' if checkpoint else 'untouched'}" if subcommand == "test" else subcommand
            seconds = time.perf_counter() - started
            Run(self.trainer.default_root_dir).add_stage(stage, seconds, anew=not (subcommand == "fit" and checkpoint))


def run_lightning(arguments: list[str]) -> int:
    """Run one of Lightning's commands on a checked recipe."""
    _quieten()
    torch.set_float32_matmul_precision("high")  # TF32 for what bf16 autocast leaves in fp32
    RecipeCLI(arguments)
    return 0


def check_arguments(arguments: list[str]) -> tuple[list[str], str]:
    """Check every recipe and class on a command line.

    Returns:
        The recipes, and the first one's opening comment.
    """
    openings = {}
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not equals and position + 1 < len(arguments):
            value = arguments[position + 1]
        if name in ("-c", "--config"):
            openings[value] = check_recipe(value)
        elif name.startswith("--") and re.fullmatch(r"([A-Za-z_]\w*\.)+[A-Z]\w*", value):
            check_class(value, {}, name)
    return list(openings), next(iter(openings.values()), "")


def explain(message: str, keys: set[str], recipes: list[str]) -> str:
    """Make one line with file and hint out of a parser's message.

    Args:
        message: What the parser says, over several lines.
        keys: Every dotted key that there is.
        recipes: The recipes that were read: the file with the offending key is named.
    """
    text = " ".join(message.split())
    inner = re.search(r"unknown key '.*?'(; (did you mean '[^']*'\?|known: [\w, ]+))?", text)
    if inner:  # an inner parser has explained it, and the outer ones have wrapped that
        return inner.group()
    of_union = re.search(r"Errors: - (.*?)(?: - Expected a <class 'NoneType'>.*)?$", text)
    text = of_union.group(1) if of_union else text
    unknown = re.search(r"(?:Key|[Oo]ption|[Uu]nrecognized arguments:|nested key)\s*['\"]?(?:--)?([\w.]+)", text)
    if unknown and re.search(r"not expected|not accepted|[Uu]nrecognized|does not accept", text):
        key = unknown.group(1)
        parent, _, last = key.rpartition(".")
        siblings = _children(keys, parent)
        if not siblings:  # the mistake is further up
            last, siblings = key.split(".")[0], _children(keys, "")
        return f"{_file_with(key, recipes)}unknown key '{key}'{nearest(last, siblings)}"
    named = re.search(r'Parser key "([\w.]+)"', text)
    plain = text.replace("Parser key ", "key ").replace("<class '", "").replace("'>", "")
    return (_file_with(named.group(1), recipes) if named else "") + plain


def _children(keys: set[str], parent: str) -> set[str]:
    prefix = f"{parent}." if parent else ""
    return {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)} - {"help"}


def _file_with(key: str, recipes: list[str]) -> str:
    """The last recipe that has a dotted key, or one that ends so, as ``recipe FILE: ``."""
    for recipe in reversed(recipes):
        found = dotted_keys(yaml.safe_load(Path(recipe).read_text()))
        if any(name == key or name.endswith(f".{key}") for name in found):
            return f"recipe {recipe}: "
    return ""


def _checkpoint_folder(root: str | None) -> str:
    return str(Run(root or ".").checkpoints)


def _quieten() -> None:
    """Keep notices that a user can do nothing about off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for noise in (
        ".*does not have many workers.*",
        ".*LeafSpec.*deprecated.*",
        ".*module\\(s\\) in eval mode.*",  # frozen batch-norm statistics are meant
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*torch.jit.*deprecated.*",
    ):
        warnings.filterwarnings("ignore", noise)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)

