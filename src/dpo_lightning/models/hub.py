"""Loading by name from a local folder or the Hugging Face hub, with errors of one line.

Without a network the hub's client retries for most of a minute. So the hub is probed once; if it does not answer, the
client is switched to offline mode, in which cached files still load and everything else fails at once.
"""

import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dpo_lightning.errors import UserError
from dpo_lightning.internals.datasets import go_offline, hub_endpoint
from dpo_lightning.visible import one_line

PACKAGE = Path(__file__).parents[1]
PROBE_SECONDS = 5.0
T = TypeVar("T")


def from_hub_or_folder(kind: str, name: str, load: Callable[..., T], **kwargs: Any) -> T:
    """Calls `load(name, **kwargs)` and turns any failure into a UserError.

    Args:
        kind: what is loaded ("model", "tokenizer", "dataset"), for messages.
        name: a local folder, or else a hub id.

    Raises:
        UserError: no such folder, a folder that cannot be loaded, an unknown hub id, or no way to reach the hub.
    """
    folder = local_path(name)
    if folder.is_dir():
        try:
            return load(str(folder), **kwargs)
        except Exception as error:  # the loaders raise anything from OSError to KeyError on a damaged folder
            raise UserError(f"{kind} folder '{name}' cannot be loaded: {first_line(error)}") from error
    if looks_local(name):
        raise UserError(f"{kind} '{name}' is a local path, but there is no such folder")
    reachable = switch_offline_if_unreachable()
    try:
        return load(name, **kwargs)
    except Exception as error:
        if reachable:
            raise UserError(f"{kind} '{name}' cannot be loaded from the hub: {first_line(error)}") from error
        raise UserError(
            f"{kind} '{name}' is not a local folder and not in the local cache, and the Hugging Face hub cannot be "
            f"reached; either run `dpo-lightning download` on a connected machine and add "
            f"`--config local` here, or give the path of a local {kind} folder instead of the name"
        ) from error


def local_path(name: str) -> Path:
    """A name as a path, with `~` expanded; what is not there but ships with the package is looked up in the package.

    Raises:
        UserError: the system cannot look it up.
    """
    path = Path(name)
    try:
        path = path.expanduser()
    except RuntimeError:  # `~name` of an unknown user
        pass
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        shipped = PACKAGE.parent / name  # the demo's files, from any working directory: "dpo_lightning/demo/model"
        return shipped if path.parts[:2] == (PACKAGE.name, "demo") and shipped.exists() else path
    except (OSError, ValueError) as error:  # too long, NUL, no permission, a loop of links
        raise UserError(f"'{one_line(name[:200])}' cannot be looked up: {reason_of(error)}") from error
    return path


def reason_of(error: BaseException) -> str:
    """Why something failed: the system's message for an OSError, else the first line of the error's text."""
    return getattr(error, "strerror", None) or first_line(error)


def short_name(name: str) -> str:
    """A hub id without its owner; of a folder or file the last name, with the folder's where that says too little."""
    path = Path(name)
    if looks_local(name) and path.name in ("model", "huggingface"):
        return "/".join(path.parts[-2:])
    return path.name or name


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: hub ids are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


@functools.cache
def switch_offline_if_unreachable() -> bool:
    """Probes the hub once per process, goes offline if it does not answer, and returns whether it does."""
    endpoint = hub_endpoint()
    if endpoint is None or not _answers(endpoint):
        go_offline()
        return False
    return True


def _answers(endpoint: str) -> bool:
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy knows
    url = urlsplit(endpoint)
    try:
        with socket.create_connection(
            (url.hostname, url.port or (443 if url.scheme == "https" else 80)), PROBE_SECONDS
        ):
            return True
    except OSError:
        return False


def first_line(error: BaseException) -> str:
    """The first line of an error's text, and the second if the first ends in a colon; its class if it has no text."""
    first, *more = str(error).strip().split("\n")
    first = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
    return first or type(error).__name__
