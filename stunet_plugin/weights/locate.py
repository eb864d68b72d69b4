"""Where a checkpoint comes from: a local file, or a file on the Hugging Face hub
(``hf://owner/repository/path``)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CHECKPOINT

HUB_PREFIX = "hf://"
PLANS_SUFFIX = ".pkl"
"""What nnU-Net v1 adds to a checkpoint's name for the file with its plans."""

_HUB_ADDRESS = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?/(?P<file>[^@]+)"
)


CHECKPOINTS = (CHECKPOINT, "checkpoint_best.pth", "checkpoint_latest.pth")
"""What nnU-Net v2 writes into a fold, the most wanted first."""


_WEB_ADDRESS = "https://huggingface.co/{}/resolve/{}/{}"
_WEB = re.compile(
    r"https?://huggingface\.co/([\w.-]+/[\w.-]+)/(?:resolve|blob)/([\w.-]+)/([^?#]+).*"
)


class Hub(Protocol):
    """The part of ``huggingface_hub`` that is used; tests pass a local stand-in."""

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        """Return the local path of a file, from the cache or downloaded (resumed where it broke
        off)."""
        ...


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine.

    Attributes:
        given: as the user named it.
        checkpoint: its file.
        plans_pickle: the ``.pkl`` of nnU-Net v1 beside it, None where there is none.
    """

    given: str
    checkpoint: Path
    plans_pickle: Path | None


def find_source(given: str, hub: Hub | None = None) -> Source:
    """Find the file, downloading it where it is on the hub.

    Args:
        given: a path, or ``hf://owner/repository[@revision]/path/in/repository``.
        hub: an object with ``hf_hub_download``; None is the package ``huggingface_hub``.

    Raises:
        PluginError: no such file, no such address, no hub client, or a failed download.
    """
    if given.startswith(HUB_PREFIX):
        return _from_hub(given, hub)
    if given.startswith(("http://", "https://")):
        web = _WEB.fullmatch(given)
        revision = f"@{web[2]}" if web and web[2] != "main" else ""
        advice = (
            f"stunet import {HUB_PREFIX}{web[1]}{revision}/{web[3]}"
            if web
            else "download the file, and stunet import its path"
        )
        raise PluginError(f"{given} is an address of the web. Run: {advice}")
    path = Path(given).expanduser()
    beside = path.with_name(path.name + PLANS_SUFFIX) if path.name else path
    return Source(given, path, beside if beside.is_file() and beside != path else None)


def _from_hub(given: str, hub: Hub | None) -> Source:
    match = _HUB_ADDRESS.fullmatch(given)
    if not match or ".." in match["file"].split("/"):
        raise PluginError(
            f"{given!r} names no file. Expected hf://owner/repository/file, as in"
            " hf://ziyanhuang/STU-Net/base_ep4k.model."
        )
    client: Any = hub or _hub_client()
    where = {"repo_id": match["repository"], "revision": match["revision"]}
    try:
        checkpoint = Path(client.hf_hub_download(filename=match["file"], **where))
    except Exception as error:  # the client has dozens of its own, and those of the network
        address = _WEB_ADDRESS.format(
            match["repository"], match["revision"] or "main", match["file"]
        )
        raise PluginError(
            f"{given} could not be downloaded ({type(error).__name__}: {_first_line(error)}). Check"
            " the spelling and the network, then run the same command again: what is there already"
            f" is not downloaded twice. Or download {address} by hand and give its path."
        ) from error
    try:
        pickled: Path | None = Path(
            client.hf_hub_download(filename=match["file"] + PLANS_SUFFIX, **where)
        )
    except Exception as error:  # the file is optional, whatever the reason
        name = f"{Path(match['file']).name}{PLANS_SUFFIX}"
        print(f"No {name} beside it on the hub ({type(error).__name__}).")
        pickled = None
    return Source(given, checkpoint, pickled)


def _hub_client() -> Hub:
    # Without a network the client would try for minutes.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise PluginError(
            "hf:// addresses need the package huggingface_hub. Run: pip install huggingface_hub (or"
            " download the file yourself and give its path)."
        ) from error
    client: Hub = huggingface_hub
    return client


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def find_model(given: str) -> Source:
    """Return the checkpoint file, or that of the first fold in a model folder.

    Raises:
        PluginError: no such file, or a folder without a checkpoint.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return find_source(given)
    for name in CHECKPOINTS:
        # The folder itself may be a fold.
        for found in (path / name, *sorted(path.glob(f"fold_*/{name}"))):
            if found.is_file():
                return Source(given, found, None)
    raise PluginError(
        f"{path} is no model folder: it has no fold_X/{CHECKPOINT}. Name the folder"
        " TRAINER__PLANS__CONFIGURATION in nnUNet_results, or a checkpoint file."
    )
