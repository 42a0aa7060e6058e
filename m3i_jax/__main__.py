"""`python -m m3i_jax` and the console command `m3i-jax`: the same as `python -m m3i_jax.main`."""

import sys

from m3i_jax import installation, interrupts


def run_command() -> int:
    """Run the command of this process and return its exit code."""
    interrupts.install_handler()  # before the other imports
    installation.exit_without_program()
    from m3i_jax.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run_command())
