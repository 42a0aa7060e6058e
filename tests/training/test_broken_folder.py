"""A real run on a folder with a fifth of its files broken in 22 ways: it trains, every row is an
undamaged image, and the counts are exact."""

import json
import pathlib

import numpy as np
import pytest

from m3i_jax.data import decode, sampler
from m3i_jax.data.sources import base
from m3i_jax.data.sources.folder import FolderSource
from tests import broken
from tests.test_main import TINY, finish

GOOD, BATCH, STEPS = 88, 32, 10


@pytest.mark.slow
def test_a_run_on_a_folder_that_is_one_fifth_broken(tmp_path: pathlib.Path) -> None:
    reasons = broken.fill(tmp_path / "pictures", good=GOOD)
    assert len(reasons) == 22 == round(0.2 * (GOOD + len(reasons)))
    assert set(reasons.values()) == set(decode.REASONS) - {decode.UNREADABLE}
    changes = [
        "data.holdout=0.0",
        f"train.batch_size={BATCH}",
        f"train.steps={STEPS}",
        "data.max_bad_share=0.3",
        "train.eval_every=0",
        "evaluate.knn=False",
        "model.encoder.patch_size=8",
        "train.save_every=1000",
        "data.size=0",
    ]
    flags = [*TINY, *(f"--config.{change}" for change in changes)]
    place = tmp_path / "run"
    source = f"configs/folder.py:path={tmp_path / 'pictures'},model=vit_tiny"
    code, _, complaint = finish("--config", source, "--workdir", str(place), *flags)
    assert code == 0, complaint

    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert last["step"] == STEPS and np.isfinite(last["loss"])
    counted = {reason: last.get(f"data/skipped/{reason}", 0) for reason in decode.REASONS}
    assert counted == expected(
        base.split_by_hash(FolderSource(str(tmp_path / "pictures")), 0.0, "train"), reasons
    )
    assert 0.1 < sum(counted.values()) / (BATCH * STEPS) < 0.4


def expected(source: base.DataSource, reasons: dict[str, str]) -> dict[str, int]:
    """The rule written out: draw again until the record is good and differs from its partner."""
    counts, used = dict.fromkeys(decode.REASONS, 0), [-1]
    for position in range(BATCH * STEPS):
        for attempt in range(100):
            index = int(sampler.sample_index(0, np.array([position]), len(source), attempt)[0])
            if position % 2 and index == used[-1]:
                continue
            if (reason := reasons.get(base.source_key(source, index))) is None:
                used.append(index)
                break
            counts[reason] += 1
    return counts
