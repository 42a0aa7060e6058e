"""Launch scripts again: what a user or a network does to them."""

import pytest

from tests.launch_stage import RUN, Stage, stage  # noqa: F401


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], "--config configs/quickstart.py --workdir runs/quickstart"),
        (["--config.seed=3"], "--config configs/quickstart.py --workdir runs/quickstart"),
        (["--workdir", "a b"], "--config configs/quickstart.py"),
        (["--workdir=a b", "--config=c.py"], ""),
    ],
)
def test_the_quickstart_gives_no_flag_twice(
    stage: Stage,  # noqa: F811
    given: list[str],
    wanted: str,
) -> None:
    stage.python("exit 0")
    stage.stand_in("nvidia-smi", "exit 1")
    status, _, err = stage.run("launch/quickstart.sh", *given, M3I_EXTRA="")
    assert status == 0, err
    program, summary = stage.calls
    assert program == " ".join(filter(None, ("python -m m3i_jax.main", wanted, *given)))
    assert summary == ("python - a b" if "a b" in program else "python - runs/quickstart")


def test_a_moment_without_network_does_not_end_the_wait_for_a_tpu(
    stage: Stage,  # noqa: F811
) -> None:
    stage.stand_in("sleep", "exit 0")
    does = """case "$*" in
*describe*) [[ -e "$HOME/asked" ]] || { touch "$HOME/asked"; exit 1; }; echo ACTIVE ;;
*create*) echo "it exists" >&2; exit 1 ;;
esac"""
    stage.stand_in("gcloud", does)
    slice_ = ["--name", "m3i", "--project", "p", "--zone", "z", "--type", "t", "--runtime", "r"]
    run = ["launch/tpu_vm.sh", "run", *slice_, "--mount", ":", "--workdir", "/w", "--", *RUN]
    status, _, err = stage.run(*run)
    assert status == 0, err
    # a request that is refused each time ends it
    stage.stand_in("gcloud", "exit 1")
    status, _, err = stage.run(*run)
    assert status == 2 and "m3i could not be requested" in err
