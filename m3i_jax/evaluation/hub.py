"""Weights on the Hugging Face Hub: `hf://OWNER/NAME[@REVISION]` as a directory of this machine. The
files go to the cache of huggingface_hub, which is read without a network if they are there."""

import importlib
import re

from m3i_jax.errors import UserError

PREFIX = "hf://"
# weights, settings, preprocessing and the description; never code
PATTERNS = ("*.safetensors", "*.json", "*.npz", "README.md")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def fetch_weights(location: str, key: str = "load") -> str:
    """The directory with the files of a repository.

    Args:
      location: hf://OWNER/NAME, or with @REVISION: a branch, a tag or a commit.
      key: the flag or function that gave it, for messages.

    Raises:
      UserError: it is no name of a repository, huggingface_hub is not installed, or the repository
        cannot be read.

    >>> fetch_weights("hf://first")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: load: 'hf://first' names no repository; write hf://OWNER/NAME or ...
    """
    name, at, revision = location.removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(name) or (at and not revision):
        raise UserError(
            f"{key}: {location!r} names no repository; write hf://OWNER/NAME or"
            " hf://OWNER/NAME@REVISION"
        )
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            f"{key}: {location}: needs the package huggingface_hub; pip install 'm3i-jax[hub]'"
        ) from error
    try:
        return str(
            hub.snapshot_download(name, revision=revision or None, allow_patterns=list(PATTERNS))
        )
    except Exception as error:  # of the network, the server, the cache or the name
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {location}: cannot be read ({type(error).__name__}: {reason}); check name,"
            " revision and network, and log in by `hf auth login` if it is private"
        ) from error
