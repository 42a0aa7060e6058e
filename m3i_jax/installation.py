"""Checks which packages are installed: the losses and encoders alone (`pip install m3i-jax`), or
the program as well (`pip install 'm3i-jax[train]'`)."""

import importlib
import importlib.util
import sys
from typing import NoReturn

# {module that the program imports: package of the extra `train`}
PROGRAM = {
    "absl": "absl-py",
    "clu": "clu",
    "ftfy": "ftfy",
    "grain": "grain",
    "ml_collections": "ml_collections",
    "ml_dtypes": "ml_dtypes",
    "orbax": "orbax-checkpoint",
    "PIL": "Pillow",
    "tensorstore": "tensorstore",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
    "xxhash": "xxhash",
}


def missing_packages() -> list[str]:
    """Returns the packages of the extra `train` that are not installed.

    >>> missing_packages()
    []
    """
    return [
        package for module, package in PROGRAM.items() if importlib.util.find_spec(module) is None
    ]


def require_program(user: str) -> None:
    """Raise ImportError, which names the extra, unless the packages of the program are installed.

    Args:
      user: what needs them, the subject of the message.

    >>> require_program("m3i_jax.load")
    """
    if missing := missing_packages():
        raise ImportError(
            f"{user} needs {', '.join(missing)}, which the losses and encoders do without:"
            " pip install 'm3i-jax[train]'",
            name=missing[0],
        )


def exit_without_program() -> None:
    """End the process with one line and exit code 2 unless the program is installed and jax accepts
    its environment variables, which it reads when it is imported."""
    try:
        require_program("the command line")
        importlib.import_module("jax")
    except ImportError as error:
        _refuse(str(error))
    except ValueError as error:
        _refuse(f"jax refuses its environment ({error}); correct or unset the variable JAX_...")


def _refuse(reason: str) -> NoReturn:
    print(f"m3i_jax: {reason}", file=sys.stderr)
    sys.exit(2)
