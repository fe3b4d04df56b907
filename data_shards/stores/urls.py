"""Which URLs shards are read from, and what each needs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.strict import show


@dataclass(frozen=True)
class Scheme:
    """What the files of one kind of URL need.

    Attributes:
        install: What to install where the driver is missing.
        rights: What to do where access is denied.
    """

    install: str = "fsspec"
    rights: str = "change the rights of the files"


_WEB = Scheme("fsspec[http]", "put user and password of the host into ~/.netrc")
_S3 = Scheme(
    "sam-trainer[s3]",
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; FSSPEC_S3_ANON=true for a public bucket",
)
_GOOGLE = Scheme(
    "sam-trainer[gs]",
    "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`; "
    "FSSPEC_GS_TOKEN=anon for a public bucket",
)
_AZURE = Scheme(
    "sam-trainer[az]",
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
)
_HUB = Scheme("huggingface_hub", "set HF_TOKEN, and accept the data set's terms on its page")

SCHEMES = {
    "s3": _S3, "gs": _GOOGLE, "gcs": _GOOGLE, "az": _AZURE, "abfs": _AZURE, "hf": _HUB, "http": _WEB, "https": _WEB,
    "file": Scheme(), "memory": Scheme(),
}  # fmt: skip


def as_url(folder: str | Path) -> str | None:
    """Return a folder's URL without a slash at its end, or None if it is a folder of this machine.

    Raises:
        UserError: It is a command, as WebDataset takes them, or a URL that is not read.
    """
    text = str(folder)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text)
    if not match or os.path.exists(text):  # noqa: PTH110  # the method raises where a name is too long
        return None
    scheme = match[1].lower()
    if scheme not in SCHEMES or "::" in text:
        raise UserError(
            f"{show(text)}: shards are read from folders and from {', '.join(f'{name}://' for name in SCHEMES)}; "
            "nothing else is fetched and no command is run: copy them to one of these"
        )
    rest = text[match.end() :]
    if not rest.startswith("//") or not rest.strip("/"):
        raise UserError(f"{show(text)}: not a URL of a folder: write {scheme}://… and where the shards lie")
    if scheme in ("http", "https") and re.search("[?#]", rest):
        raise UserError(f"{show(text)}: a folder's URL has no '?' and no '#': leave them out")
    return f"{scheme}:{rest.rstrip('/')}"


def without_password(url: str) -> str:
    """Return a URL as messages may show it."""
    return re.sub(r"://[^/@]*@", "://***@", url) if scheme_of(url) in ("http", "https") else url


def scheme_of(url: str) -> str:
    """Return the name before the colon."""
    return url.partition(":")[0]
