"""Repositories of the Hugging Face hub: which commit a name means, and where its files are.

    hf://deepseek-ai/DeepSeek-V4-Flash-0731          the newest commit of the branch main
    hf://deepseek-ai/DeepSeek-V4-Flash-0731@v1.0     that of a branch or tag, or a commit itself

A name means one commit as long as the process lives: all reads see the same files. Where the hub's
cache on this machine (HF_HUB_CACHE) has all files of that commit, they are read there and nothing
is requested. Elsewhere `huggingface_hub` requests ranges of bytes, and repeats requests that fail
in passing. `v4jax.files` makes paths of this.

Functions import `huggingface_hub`, an extra, and raise ImportError without it.
"""

import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from v4jax.errors import CheckpointError

SCHEME = "hf://"
INDEX_NAME = "model.safetensors.index.json"
_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?((?:/.*)?)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RETRIED = (429, 500, 502, 503, 504)
_WAIT_SECONDS = (1.0, 2.0, 4.0)  # between requests for a commit; other requests are the library's
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def is_repository(name: str) -> bool:
    """Whether a name may be that of a repository, written without the scheme: `org/name`."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@[^/]+)?", name)) and not name.endswith(".py")


def pin(url: str) -> str:
    """Returns the address of a repository, or of a file in it, with its commit: hf://org/name@….

    Raises:
      CheckpointError: there is no such repository or revision, or the hub refuses or cannot be
        reached; the message says what to do.
      ImportError: huggingface_hub is not installed.
    """
    repository, revision, below = split(url)
    return f"{SCHEME}{repository}@{_find_commit(repository, revision or 'main')}{below}"


def split(url: str) -> tuple[str, str | None, str]:
    """Returns repository, revision and the path in it of hf://org/name[@revision][/path].

    Raises:
      CheckpointError: it is no such address.
    """
    found = _NAME.fullmatch(url.rstrip("/"))
    if found is None:
        raise CheckpointError(
            f"{url} names no repository of the hub; write hf://org/name or hf://org/name@revision"
        )
    return found[1], found[2], found[3]


@functools.cache
def _find_commit(repository: str, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    if (snapshot := _cached(repository, revision)) is not None:
        return os.path.basename(snapshot)
    import huggingface_hub

    url, waits = f"{SCHEME}{repository}@{revision}", iter(_WAIT_SECONDS)
    while True:
        try:
            hub = huggingface_hub.HfApi(endpoint=find_endpoint())
            return hub.model_info(repository, revision=revision, timeout=10).sha
        except Exception as error:  # the library has no common type
            wait = next(waits, None) if _may_pass(error) else None
            if wait is None:
                raise CheckpointError(f"{url} cannot be read: {explain(error, url)}") from error
            time.sleep(wait)


@functools.cache
def find_snapshot(repository: str, commit: str) -> str | None:
    """Returns the folder of a commit in the hub's cache; None unless it has all of the weights."""
    return _cached(repository, commit)


def _cached(repository: str, revision: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = os.path.dirname(config)
    try:
        with open(os.path.join(folder, INDEX_NAME), encoding="utf-8") as file:
            needed = set(json.load(file)["weight_map"].values())
    except FileNotFoundError:  # one file, or several whose index is not there yet
        needed = {name for name in os.listdir(folder) if name.endswith(".safetensors")}
        needed = needed if needed and not any("-of-" in name for name in needed) else {INDEX_NAME}
    except (ValueError, KeyError, AttributeError, TypeError):
        return folder  # whoever reads it says what is broken
    whole = all(os.path.exists(os.path.join(folder, str(name))) for name in needed)
    return folder if whole else None


@functools.cache
def open_system() -> Any:
    """Returns huggingface_hub's file system, one for all threads: its listings stay known."""
    import huggingface_hub

    return huggingface_hub.HfFileSystem(endpoint=find_endpoint(), skip_instance_cache=True)


def find_endpoint() -> str:
    """Returns the address of the hub, or of a mirror that HF_ENDPOINT names."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what the library raises into an OSError of one line; a file that is not there stays."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not hasattr(error.__cause__, "response"):
            raise
        if type(error) is OSError:
            raise
        raise OSError(explain(error, url)) from error


def explain(error: Exception, url: str) -> str:
    """Returns why a request failed, and what to do about it."""
    from huggingface_hub import errors

    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the file system's own words leave the reason out
    repository, revision, _ = split(url)
    endpoint = find_endpoint()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, and the hub's cache on this machine lacks some or all of its "
            f"files; `hf download {repository}` while online fetches them"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated; accept its terms at {endpoint}/{repository} and {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision}; see {endpoint}/{repository}/commits/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint} has no such repository, or a private one; check the name, or {_LOGIN}"
    if status == 401:
        return f"{endpoint} refuses the token; {_LOGIN}"
    if status == 403:
        return f"the token may not read it; give it that permission at {endpoint}/settings/tokens"
    if status is not None:
        return f"{endpoint} answers {status}; try again later"
    line = (str(error).splitlines() or [""])[0]
    return (
        f"{endpoint} cannot be reached ({type(error).__name__}: {line}); check the network, or "
        f"`hf download {repository}` where there is one"
    )


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in _RETRIED or (status is None and not isinstance(error, ValueError))
