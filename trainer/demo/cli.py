"""`trainer demo`: a page on this machine to try a model on one's own images."""

from __future__ import annotations

import argparse
import errno
import getpass
import hmac
import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import CommandParser, UserError

DESCRIPTION = """\
Open a page in the browser, and try a model on a picture, a volume or a video: draw boxes and points (or give words to
SAM3), follow objects through the slices, and download the masks as PNG, NIfTI or DICOM SEG.

  trainer demo runs/liver                          a run: the newest of its checkpoints
  trainer demo runs/liver --ckpt best              or another one
  trainer demo runs/liver/checkpoints/step-000500.ckpt
  trainer demo recipes/quickstart.yaml             a recipe: the weights that it names, untouched
  trainer demo liver.pth                           an export, with the files that lie beside it

The page is for this machine alone: nothing is sent anywhere, and no other computer can open it. --host 0.0.0.0 lets
others in, by the password of --password; put it behind a proxy with TLS then, for passwords and images travel in
the clear. Uploads are bounded, never unpickled, and deleted when their tab is closed. For research, not for diagnosis.
"""
FIRST_PORT = 7860
"""From which on a free port is looked for."""


@dataclass(frozen=True)
class Served:
    """A page that is being served.

    Attributes:
        address: Where.
        app: Gradio's.
    """

    address: str
    app: Any


def demo_command(arguments: list[str]) -> int:
    """Serve the page until it is interrupted; return the exit code.

    Raises:
        UserError: A mistake in the arguments, or the model cannot be loaded.
    """
    values, ended = _parser().parse_args(arguments), threading.Event()
    with serving(values) as served:
        signal.signal(signal.SIGTERM, lambda *_: ended.set())  # visitors' files are deleted then, too
        print(f"Open {served.address} in a browser; Ctrl+C ends it.", flush=True)
        if values.open:
            import webbrowser

            webbrowser.open(served.address)
        with suppress(KeyboardInterrupt):
            ended.wait()
    return 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    return _parser().parse_args(arguments)


@contextmanager
def serving(values: argparse.Namespace) -> Iterator[Served]:
    """Serve the page while this runs; all files of visitors are deleted afterwards.

    Args:
        values: What `parsed` gave.

    Raises:
        UserError: An option is wrong, a port is taken, Gradio is missing, or the model cannot be loaded.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install 'sam-trainer[demo]'")
    from trainer.demo.limits import Limits, parse_size, parse_voxels
    from trainer.volumes.scan_intensity import parse_intensity

    limits = Limits(bytes=parse_size(values.max_upload), voxels=parse_voxels(values.max_voxels))
    parse_intensity(values.intensity)
    if values.visitors < 1:
        raise UserError(f"--visitors {values.visitors}: 1 or more")
    if values.margin < 0:
        raise UserError(f"--margin {values.margin}: 0 pixels or more")
    password = _password(values)
    port = _port(values.host, values.port)
    own = Path(tempfile.mkdtemp(prefix="sam-trainer-demo-gradio-"))
    try:
        with _environment(own):
            yield from _served(values, limits, password, port)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _served(values: argparse.Namespace, limits: Any, password: str | None, port: int) -> Iterator[Served]:
    from trainer.demo.answering import Answering
    from trainer.demo.desk import Desk
    from trainer.demo.handlers import Handlers
    from trainer.demo.model import load_model
    from trainer.segment.loading import device_of

    device = device_of(values.device)
    loaded, title = load_model(values.model, values.ckpt, values.weights, device)
    answering = Answering(loaded, device, values.precision, values.margin, values.modality)
    desk = Desk(limits, values.visitors, values.intensity, values.fill)
    from trainer.demo.page import Page
    from trainer.demo.style import CSS, theme

    page = Page(Handlers(desk, answering), title, values.intensity)
    auth = None if password is None else lambda name, given: hmac.compare_digest(given.encode(), password.encode())
    page.blocks.queue(default_concurrency_limit=8, max_size=64, api_open=False)
    try:
        app, local, _ = page.blocks.launch(
            server_name=values.host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            show_error=False, auth=auth, auth_message="Any name, and the password that you were given.",
            max_file_size=limits.bytes, allowed_paths=[], footer_links=[], ssr_mode=False, mcp_server=False,
            pwa=False, inbrowser=False, enable_monitoring=False, css=CSS, theme=theme(), i18n=None,
        )  # fmt: skip
        yield Served(local, app)
    finally:
        desk.close()
        page.blocks.close(verbose=False)


def _parser() -> CommandParser:
    parser = CommandParser(prog="trainer demo", usage="trainer demo MODEL [OPTIONS]", description=DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint of one, a recipe or an export")
    parser.add_argument("--ckpt", metavar="CKPT", help="of a run: last (default), best or a path")
    parser.add_argument("--weights", choices=("average", "raw"), help="of a checkpoint that has an average: that")
    parser.add_argument("--device", default="auto", help="auto (default: a GPU where there is one), cpu, cuda, cuda:1")
    parser.add_argument(
        "--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="bf16-mixed is faster on a GPU"
    )
    parser.add_argument(
        "--intensity", metavar="RULE", help="what the model is shown at first, as in trainer predict --volume --help"
    )
    parser.add_argument("--fill", type=float, metavar="VALUE", help="take this for NaN and infinity (default: refuse)")
    parser.add_argument(
        "--margin", type=int, default=0, metavar="PX",
        help="models without memory: enlarge the box that a slice's mask makes for the next one (default: 0)",
    )  # fmt: skip
    parser.add_argument("--modality", default="", metavar="CT", help="what images are, where the run's wording says it")
    page = parser.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="who can open it (default: 127.0.0.1, this machine alone)")
    page.add_argument("--port", type=int, metavar="N", help=f"its port (default: the first free from {FIRST_PORT})")
    page.add_argument("--password", metavar="WORD", help="asked of visitors; - reads it from the terminal or a pipe")
    page.add_argument("--max-upload", default="512MB", metavar="SIZE", help="of an upload, unpacked too (512MB)")
    page.add_argument("--max-voxels", default="400M", metavar="N", help="or pixels, of an upload (400M)")
    page.add_argument("--visitors", type=int, default=8, metavar="N", help="whose images are kept in memory (8)")
    page.add_argument("--open", action="store_true", help="open the browser")
    return parser


def _password(values: argparse.Namespace) -> str | None:
    """The password, if there is one.

    Raises:
        UserError: Others could come in without.
    """
    word = values.password
    if word == "-":
        word = getpass.getpass("Password of the page: ") if sys.stdin.isatty() else sys.stdin.readline().strip()
    if word is not None and len(word) < 4:
        raise UserError("--password: give 4 characters or more")
    if not _alone(values.host):
        if word is None:
            raise UserError(
                f"--host {values.host}: others on the network could open the page and use the model: give --password "
                "WORD, or leave --host out"
            )
        print(
            f"trainer: warning: --host {values.host}: others on the network can open the page with the password; "
            "nothing is encrypted on the way: put it behind a proxy with TLS",
            file=sys.stderr,
        )
    return word


def _alone(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(host: str, wanted: int | None) -> int:
    """A free port.

    Raises:
        UserError: The one that is wanted is taken, or the host is not this machine's.
    """
    if wanted is not None and not 0 < wanted < 2**16:
        raise UserError(f"--port {wanted}: a port is in 1 to 65535")
    for port in (wanted,) if wanted is not None else range(FIRST_PORT, FIRST_PORT + 200):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((host, port))
            except socket.gaierror:
                raise UserError(f"--host {host}: there is no such host") from None
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise UserError(f"--host {host}: is no address of this machine: take 127.0.0.1") from None
                continue
            return port
    raise UserError(
        f"--port {wanted}: is taken: give another" if wanted is not None else "no free port was found: give --port"
    )


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Let Gradio keep its files in a folder of ours, and send nothing anywhere; put back what was set."""
    settings = {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
