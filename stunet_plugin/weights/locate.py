"""Sources of weights: a file, a model folder, or on the Hugging Face hub
(``hf://owner/repository/path``); what is known of the published ones."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import urllib.error
import urllib.request
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from stunet_plugin.errors import PluginError, few
from stunet_plugin.nnunet.names import CHECKPOINT, UNFINISHED_CHECKPOINTS

HUB_PREFIX = "hf://"
HUB = "https://huggingface.co"
PLANS_SUFFIX = ".pkl"
"""What nnU-Net v1 adds to a checkpoint's name for the file with its plans."""
CHECKPOINTS = (CHECKPOINT, *UNFINISHED_CHECKPOINTS)
"""What nnU-Net v2 writes into a fold, the most wanted first."""
SHARED = "model.safetensors"
"""Weights of a fold in a model that `stunet share` wrote."""
FACTS = "published_stunet.json"

_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/([^@]+)")
_HUB_MODEL = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/?")
_WEB = re.compile(
    r"https?://(?:huggingface|hf)\.co/([\w.-]+/[\w.-]+)/(?:resolve|blob)/([\w.-]+)/([^?#]+)"
)


class Source(NamedTuple):
    """A checkpoint on this machine, and the ``.pkl`` of nnU-Net v1 beside it if there is one."""

    checkpoint: Path
    plans_pickle: Path | None = None


def find_source(given: str) -> Source:
    """Find the file, downloading it where it is on the hub."""
    if given.startswith(HUB_PREFIX):
        return _download_shared(given) if _HUB_MODEL.fullmatch(given) else _download(given)
    if given.startswith(("http://", "https://")):
        advice = "download the file, and stunet import its path"
        if web := _WEB.match(given):
            revision = "" if web[2] == "main" else f"@{web[2]}"
            advice = f"stunet import {HUB_PREFIX}{web[1]}{revision}/{web[3]}"
        raise PluginError(f"{given} is an address of the web. Run: {advice}")
    path = Path(given).expanduser()
    beside = path.parent / f"{path.name}{PLANS_SUFFIX}"
    return Source(path, beside if beside.is_file() else None)


def find_model(given: str) -> Source:
    """Return the checkpoint file, or that of the first fold in a model folder."""
    path = Path(given).expanduser()
    if not path.is_dir():
        return find_source(given)
    for name in (*CHECKPOINTS, SHARED):
        # The folder itself may be a fold.
        for found in (path / name, *sorted(path.glob(f"fold_*/{name}"))):
            if found.is_file():
                return Source(found)
    raise PluginError(
        f"{path} is no model folder: it has no fold_X/{CHECKPOINT}. Name the folder"
        " TRAINER__PLANS__CONFIGURATION in nnUNet_results, or a checkpoint file."
    )


def published_facts() -> dict[str, Any]:
    """Return plan and labels of the published STU-Net weights."""
    return dict(
        json.loads(files("stunet_plugin").joinpath("data", FACTS).read_text(encoding="utf-8"))
    )


def web_address(given: str) -> str:
    """Return where a browser finds the file of an ``hf://`` address."""
    if model := _HUB_MODEL.fullmatch(given):
        return f"{HUB}/{model[1]}/tree/{model[2] or 'main'}"
    repository, revision, file = _parts(given)
    return f"{HUB}/{repository}/resolve/{revision or 'main'}/{file}"


def shared_folds(checkpoint: Path) -> dict[str, Path]:
    """Return the weights of all folds of a shared model by the fold, given those of one; empty if
    it is none."""
    if checkpoint.name != SHARED:
        return {}
    found = sorted(checkpoint.parent.parent.glob(f"fold_*/{SHARED}"))
    return {path.parent.name.removeprefix("fold_"): path for path in found}


def _parts(given: str) -> tuple[str, str | None, str]:
    """Return repository, revision and file of an ``hf://`` address."""
    match = _HUB.fullmatch(given)
    if not match or ".." in match[3].split("/"):
        raise PluginError(
            f"{given!r} names no file. Expected hf://owner/repository/file, as in"
            " hf://ziyanhuang/STU-Net/base_ep4k.model, or hf://owner/repository of a shared model."
        )
    return match[1], match[2], match[3]


def hub_client() -> Any:
    """Return the module huggingface_hub; raise PluginError where it is not installed."""
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise PluginError(
            "hf:// addresses need huggingface_hub. Run: pip install huggingface_hub"
        ) from error


def _download_shared(given: str) -> Source:
    """Download all folds of a model that `stunet share` uploaded; return the first."""
    match = _HUB_MODEL.fullmatch(given)
    assert match is not None
    client, revision = hub_client(), match[2]
    try:
        listed = client.list_repo_files(match[1], revision=revision)
    except Exception as error:  # as in _download
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        told = f"{given} cannot be listed ({reason})"
        raise PluginError(f"{told}. Check spelling, access and network.") from error
    folds = sorted(x for x in listed if re.fullmatch(rf"fold_(\d+|all)/{re.escape(SHARED)}", x))
    if not folds:
        raise PluginError(
            f"{given} is no shared model: it has no fold_X/{SHARED}. Name a file:"
            f" {given.rstrip('/')}/FILE. It holds {few(sorted(listed))}."
        )
    at = f"@{revision}" if revision else ""
    first, *_ = [_download(f"{HUB_PREFIX}{match[1]}{at}/{fold}") for fold in folds]
    return first


def _download(given: str) -> Source:
    repository, revision, file = _parts(given)
    client = hub_client()
    # Without a network the client would try for half a minute before it looks into its cache.
    options = {} if is_reachable(HUB) else {"local_files_only": True}

    def get(name: str) -> Path:
        return Path(client.hf_hub_download(repository, name, revision=revision, **options))

    try:
        checkpoint = get(file)
    except Exception as error:  # the client has dozens of its own, and those of the network
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        reason = "the hub does not answer" if options else reason
        raise PluginError(
            f"{given} could not be downloaded ({reason}). Check spelling and network and run the"
            f" command again, which resumes; or give the path of {web_address(given)}, downloaded"
            " by hand."
        ) from error
    if checkpoint.name == SHARED:
        return Source(checkpoint)
    name = f"{Path(file).name}{PLANS_SUFFIX}"
    try:
        return Source(checkpoint, get(file + PLANS_SUFFIX))
    except Exception as error:  # the file is optional, whatever the reason
        reason = type(error).__name__
    with contextlib.suppress(Exception):
        # As in FeTA21_base_ep1k.model.pkl beside base_ep1k.model, which was renamed.
        listed = [] if options else client.list_repo_files(repository, revision=revision)
        (near,) = (other for other in listed if other.endswith(f"_{name}"))
        print(f"Plan:         {near}, the only file beside it on the hub that ends in {name}")
        return Source(checkpoint, get(near))
    print(f"No {name} beside it on the hub ({reason}).")
    return Source(checkpoint)


def is_reachable(address: str) -> bool:
    """Return whether a server answers within five seconds, whatever it says."""
    try:
        with urllib.request.urlopen(os.environ.get("HF_ENDPOINT", address), timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
