"""Checkpoints and recipes that try to run code: none of it runs, and one line says what is refused."""

from __future__ import annotations

import copy
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from cases import ONE, SHARDED, Case, told
from corpus import write_recipe
from damage import NEWEST, half_done
from harness import Ended, Lane

from trainer.checkpoints.mark import Entry, Mark, digest

LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def refused(lane: Lane, ended: Ended) -> str:
    """The one line of what was refused; nothing has run."""
    assert not marker(lane).exists(), f"its code ran: {ended.lines}"
    return f"stopped: {told(ended.stopped_by(), lane)}"


def marker(lane: Lane) -> Path:
    return lane.home / "marker"


def marked(path: Path, step: int = 8) -> None:
    """Give a hostile checkpoint a mark that fits."""
    if path.is_dir():
        files = {file.name: file for file in path.iterdir() if file.name != "complete.json"}
        place = path / "complete.json"
    else:
        files, place = {path.name: path}, path.with_name(path.name + ".json")
    entries = {name: Entry(file.stat().st_size, digest(file)) for name, file in files.items()}
    Mark(step, entries).write(place)


def pickled(lane: Lane, path: Path, how: str) -> None:
    """Write a hostile file."""
    evil = Evil(marker(lane))
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": {}, "evil": evil}))
    elif how == "torch":
        torch.save({"state_dict": {"a": torch.zeros(1)}, "loops": evil, "global_step": 8}, path)
    elif how == "old torch":
        torch.save({"state_dict": {}, "evil": evil}, path, _use_new_zipfile_serialization=False)
    else:
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


def checkpoints(rng: random.Random) -> Iterator[Case]:
    """Files and folders with pickles in every place that is read, with marks that fit; given, newest, exported."""
    kind = "hostile checkpoint"
    for how in ("pickle", "torch", "old torch", "torchscript"):
        for place in ("given", "newest", "last.ckpt", "best"):
            yield Case(
                kind, f"a file ({how}), {place}", hostile_file(how, place), quick=(how, place) == ("torch", "newest")
            )
    for name in (".metadata", "state.pt", "shard-00000.safetensors", "meta.pt", "evil.pt"):
        for fits in (True, False):
            yield Case(
                kind,
                f"a folder with a pickle as {name}, its mark {'fits' if fits else 'does not'}",
                hostile_folder(name, fits),
            )
    for command in ("consolidate", "test", "export"):
        yield Case(kind, f"a file (torch) for `{command}`", for_command(command))


def hostile_file(how: str, place: str) -> Callable[[Lane], str]:
    def strike(lane: Lane) -> str:
        half_done(lane, ONE)
        folder = lane.root / "checkpoints"
        if place == "given":
            path = lane.home / "evil.ckpt"
        elif place == "best":
            path = max(folder.glob("best-*.ckpt"))
        else:
            path = folder / (NEWEST if place == "newest" else "step-000010.ckpt")
        path.unlink(missing_ok=True)
        pickled(lane, path, how)
        marked(path)
        if place == "last.ckpt":
            (folder / place).unlink()
            (folder / place).symlink_to(path.name)
        given = {"given": path, "best": "best"}.get(place, "last")
        return refused(lane, lane.run(ONE, None, "--ckpt_path", given))

    return strike


def hostile_folder(name: str, fits: bool) -> Callable[[Lane], str]:
    def strike(lane: Lane) -> str:
        half_done(lane, SHARDED)
        folder = lane.root / "checkpoints" / NEWEST
        pickled(lane, folder / name, "torch" if name.endswith(".pt") else "pickle")
        if fits:
            marked(folder)
        ended = lane.run(SHARDED)
        assert not marker(lane).exists(), ended.lines
        ended.check_quiet()
        said = [line for line in ended.lines if NEWEST in line and "going on" not in line]
        if name.startswith(".") and not fits and set(ended.codes) == {0}:
            return "not looked at, as any hidden file; went on"
        assert said, ended.lines
        how = "" if set(ended.codes) == {0} else "stopped: "
        return (
            how
            + told(said[0].removeprefix("trainer: error: "), lane)
            + ("; went on from the one before" if set(ended.codes) == {0} else "")
        )

    return strike


def for_command(command: str) -> Callable[[Lane], str]:
    def strike(lane: Lane) -> str:
        half_done(lane, ONE)
        path = lane.root / "checkpoints" / NEWEST
        pickled(lane, path, "torch")
        marked(path)
        recipe = write_recipe(lane.home / "recipe.yaml", ONE.recipe(lane.shards, lane.root))
        arguments: dict[str, tuple[object, ...]] = {
            "consolidate": ("consolidate", path, "--out", lane.home / "out.ckpt"),
            "test": ("test", "-c", recipe, "--ckpt_path", path, "--data.init_args.test", lane.shards / "val"),
            "export": (
                "export",
                lane.root,
                "--to",
                "medsam",
                "--out",
                lane.home / "out.pth",
                "--images",
                lane.shards / "val",
            ),
        }
        return refused(lane, lane.command(*arguments[command]))

    return strike


def recipes(rng: random.Random) -> Iterator[Case]:
    """Classes, functions, tags and files that would run something, in recipes and on the command line."""
    for number, (where, content) in enumerate(in_recipes().items()):
        yield Case("hostile recipe", where, from_recipe(content), quick=number in (0, 4))
    for number, arguments in enumerate(on_the_command_line()):
        yield Case("hostile command line", " ".join(arguments), from_command_line(arguments), quick=number == 0)


def in_recipes() -> dict[str, Any]:
    """By its description, what is put into a recipe: values by dotted key, or text. TOUCH is a command."""
    callback = "trainer.callbacks"
    shell = {"class_path": "os.system", "init_args": {"command": "TOUCH"}}
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": "TOUCH", "shell": True}}
    found: dict[str, Any] = {
        "os.system as a callback": {callback: [shell]},
        "subprocess.Popen as the model": {"model": popen},
        "subprocess.Popen as the model's model": {"model.init_args.model": popen},
        "subprocess.Popen as the data": {"data": popen},
        "builtins.eval as a callback": {callback: [{"class_path": "builtins.eval", "init_args": {"source": "CODE"}}]},
        "torch.hub.load as the model": {
            "model.init_args.model": {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "evil"}}
        },
        "torch.package.PackageImporter": {
            callback: [{"class_path": "torch.package.PackageImporter", "init_args": {"file_or_buffer": "evil.pt"}}]
        },
        "a module of its own as a callback": {callback: [{"class_path": "evil.Bad"}]},
        "a module of its own as the model": {"model": {"class_path": "evil.Module"}},
        "a module of its own as the strategy": {"trainer.strategy": {"class_path": "evil.Bad"}},
        "a module of its own, as text": {"trainer.logger": "evil.Bad"},
        "a module of its own, deep in a list": {
            "model.init_args.prompts": {
                "class_path": "trainer.prompts.MixedPrompts",
                "init_args": {"prompters": [{"class_path": "evil.Bad"}]},
            }
        },
        "a module through one of ours": {callback: [{"class_path": "trainer.callbacks.watch.subprocess.Popen"}]},
        "a recipe in another file": {"trainer": "evil.yaml"},
        "callbacks in another file": {callback: "evil.yaml"},
        "shards from a command": {"data.init_args.train": "pipe:TOUCH"},
        "weights that are a pickle": {"model.init_args.model.init_args.weights": "evil.pt"},
    }
    for value in (
        "os.system",
        "torch.os.system",
        "builtins.eval",
        "torch.hub.load",
        "subprocess.run",
        "lambda *_: CODE",
        "__import__('os').system('TOUCH')",
    ):
        found[f"a function's name: {value}"] = {
            callback: [{"class_path": LAMBDA, "init_args": {"on_fit_start": value}}]
        }
    hook = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": "torch.os.system"}}
    found["a function's name for the ranks' strategy"] = {"trainer.strategy": hook}
    for tag in (
        "!!python/object/apply:os.system [TOUCH]",
        "!!python/object/new:os.system [TOUCH]",
        "!!python/name:os.system",
        "!!python/module:evil",
        "!!python/object:evil.Bad {}",
        "!<tag:yaml.org,2002:python/object/apply:subprocess.check_output> [TOUCH]",
    ):
        found[f"YAML: seed_everything: {tag}"] = f"seed_everything: {tag}\n"
    return found


def on_the_command_line() -> list[tuple[str, ...]]:
    """What is given after a sound recipe, in a folder with a module ``evil`` and recipes that name it."""
    return [
        ("-c", "evil.yaml"),
        ("-cevil.yaml",),
        ("-c=evil.yaml",),
        ("--config=evil.yaml",),
        ("--trainer", "part.yaml"),
        ("--trainer=part.yaml",),
        ("--model", "model.yaml"),
        ("--model=model.yaml",),
        ("--data", "model.yaml"),
        ("--model", "evil.Module"),
        ("--model=evil.Module",),
        ("--model.help", "evil.Module"),
        ("--model.class_path=evil.Module",),
        ("--trainer.callbacks+=evil.Bad",),
        ("--trainer.callbacks+", "evil.Bad"),
        ("--trainer.callbacks=[{class_path: evil.Bad}]",),
        ("--trainer.callbacks", '[{"class_path": "os.system", "init_args": {"command": "TOUCH"}}]'),
        ("--trainer.callbacks+={class_path: " + LAMBDA + ", init_args: {on_fit_start: torch.os.system}}",),
        ("--trainer.strategy.class_path", "evil.Bad"),
        ("--trainer.logger=!!python/object/apply:os.system [TOUCH]",),
        ("--trainer={callbacks: [{class_path: evil.Bad}]}",),
        ("--data.init_args.train=pipe:TOUCH",),
        ("--ckpt_path", "evil.pt"),
    ]


def hostile_folder_of(lane: Lane) -> Path:
    """A folder in which a module makes the marker when it is imported, with recipes that name it."""
    folder = lane.home / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    marker(lane).unlink(missing_ok=True)
    lane.anew()
    (folder / "evil.py").write_text(
        f"open({str(marker(lane))!r}, 'w').close()\nfrom lightning.pytorch import Callback, LightningModule\n"
        "class Bad(Callback): ...\nclass Module(LightningModule): ...\n"
    )
    part = {"callbacks": [{"class_path": "evil.Bad"}]}
    content = ONE.recipe(lane.shards, lane.root)
    content["trainer"].update(part)
    write_recipe(folder / "evil.yaml", content)
    (folder / "part.yaml").write_text(yaml.safe_dump(part))
    (folder / "model.yaml").write_text(yaml.safe_dump({"class_path": "evil.Module"}))
    pickled(lane, folder / "evil.pt", "torch")
    return folder


def with_commands(value: Any, lane: Lane) -> Any:
    """Put what would make the marker into a value."""
    if isinstance(value, dict):
        return {key: with_commands(part, lane) for key, part in value.items()}
    if isinstance(value, list):
        return [with_commands(part, lane) for part in value]
    if not isinstance(value, str):
        return value
    touch = f"touch {marker(lane)}"
    return value.replace("TOUCH", touch).replace("CODE", f"__import__('os').system('{touch}')")


def from_recipe(content: dict[str, Any] | str) -> Callable[[Lane], str]:
    def strike(lane: Lane) -> str:
        folder = hostile_folder_of(lane)
        whole = copy.deepcopy(ONE.recipe(lane.shards, lane.root))
        if isinstance(content, str):
            del whole["seed_everything"]
            (folder / "recipe.yaml").write_text(yaml.safe_dump(whole) + with_commands(content, lane))
        else:
            for key, value in content.items():
                *parents, last = key.split(".")
                node: Any = whole
                for name in parents:
                    node = node[name]
                node[last] = with_commands(value, lane)
            write_recipe(folder / "recipe.yaml", whole)
        return refused(lane, lane.command("fit", "-c", "recipe.yaml", folder=folder))

    return strike


def from_command_line(arguments: tuple[str, ...]) -> Callable[[Lane], str]:
    def strike(lane: Lane) -> str:
        folder = hostile_folder_of(lane)
        recipe = write_recipe(folder / "sound.yaml", ONE.recipe(lane.shards, lane.root))
        given = [with_commands(argument, lane) for argument in arguments]
        return refused(lane, lane.command("fit", "-c", recipe, *given, folder=folder))

    return strike
