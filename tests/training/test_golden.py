"""The metrics of one step of every shipped configuration, at toy size, through its real source and
pipeline.

If this fails and you meant to change what a step computes, the message has the new values: put them
here and say in the commit why they moved. If you did not mean to, something moved that should not
have."""

import pathlib
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from m3i_jax import config as configuration
from m3i_jax import parallel
from m3i_jax.modes import setup as jobs
from m3i_jax.training.trainer import Trainer
from tests import toy

ROOT = pathlib.Path(__file__).parent.parent.parent
SMALL = {
    "data.image_size": "32",
    "train.batch_size": "8",
    "train.steps": "4",
    "optim.warmup_steps": "1",
    "data.caption_length": "8",
    "model.encoder.patch_size": "8",
    "model.encoder.width": "32",
    "model.encoder.depth": "2",
    "model.encoder.heads": "2",
    "model.decoder.width": "32",
    "model.decoder.depth": "2",
    "model.decoder.heads": "2",
    "model.pool.width": "24",
    "model.pool.heads": "2",
    "model.text.width": "32",
    "model.text.depth": "1",
    "model.text.heads": "2",
    "model.text.embed": "16",
    "data.vocabulary_size": "300",
    "data.resizer": "pillow",
    "model.dtype": "float32",
    "parallel.mesh": "(1,1,1)",
}
CAPTIONERS = {
    "data.mixture": "shapes:60,scenes:60",
    "train.batch_size": "16",
    "data.caption_length": "32",
    "data.vocabulary_size": "600",
    "model.captioner.width": "24",
    "model.captioner.heads": "2",
}
GOLDEN: dict[str, dict[str, float]] = {
    "quickstart": {
        "balance/lambda": 3.0,
        "balance/sp_norm": 0.117146,
        "balance/ssp_norm": 0.0174135,
        "collapse/spread": 0.896524,
        "collapse/target_std": 2.05125,
        "grad_norm": 320.903,
        "info/category": -1.19344,
        "info/inter": -21.8556,
        "info/intra": -22.0374,
        "info/text": -2.18033,
        "loss": 10.8863,
        "loss/category": 2.08239,
        "loss/inter": 2.4119,
        "loss/intra": 2.3414,
        "loss/sp": 2.83656,
        "loss/ssp": 2.37665,
        "loss/text": 3.59073,
        "skipped/not_finite": 0.0,
        "skipped/steps": 0.0,
    },
    "folder": {
        "balance/lambda": 1.0,
        "balance/sp_norm": 0.206027,
        "balance/ssp_norm": 0.0267963,
        "collapse/spread": 0.700125,
        "collapse/target_std": 1.26161,
        "grad_norm": 18.8737,
        "info/category": -0.284366,
        "info/inter": -29.366,
        "info/intra": -27.2158,
        "info/text": -1.52864,
        "loss": 4.40854,
        "loss/category": 0.845446,
        "loss/inter": 2.54132,
        "loss/intra": 2.2913,
        "loss/sp": 1.99223,
        "loss/ssp": 2.41631,
        "loss/text": 3.13901,
        "skipped/not_finite": 0.0,
        "skipped/steps": 0.0,
    },
    "tars": {
        "balance/lambda": 1.0,
        "balance/sp_norm": 0.430038,
        "balance/ssp_norm": 0.0255664,
        "collapse/spread": 0.707038,
        "collapse/target_std": 1.28822,
        "grad_norm": 34.2865,
        "info/inter": -30.2549,
        "info/intra": -27.7212,
        "info/text": -1.92191,
        "loss": 5.90424,
        "loss/inter": 2.61995,
        "loss/intra": 2.3653,
        "loss/sp": 3.41161,
        "loss/ssp": 2.49263,
        "loss/text": 3.41161,
        "skipped/not_finite": 0.0,
        "skipped/steps": 0.0,
    },
    "forms": {
        "balance/lambda": 1.0,
        "balance/sp_norm": 0.0,
        "balance/ssp_norm": 0.0014804,
        "grad_norm": 0.584826,
        "info/pixel": -44.6009,
        "loss": 1.3028,
        "loss/pixel": 1.3028,
        "loss/ssp": 1.3028,
        "skipped/not_finite": 0.0,
        "skipped/steps": 0.0,
    },
    "intern_image": {
        "balance/lambda": 2.0,
        "balance/sp_norm": 0.48190793,
        "balance/ssp_norm": 0.047609881,
        "collapse/spread": 0.80145079,
        "collapse/target_std": 0.90278685,
        "grad_norm": 105.09377,
        "info/category": -1.7549324,
        "info/inter": -29.152168,
        "info/intra": -26.870806,
        "info/text": -2.2121904,
        "loss": 7.917676,
        "loss/category": 2.4545598,
        "loss/inter": 2.6071138,
        "loss/intra": 2.4797831,
        "loss/sp": 2.6871138,
        "loss/ssp": 2.5434484,
        "loss/text": 2.919668,
        "skipped/not_finite": 0.0,
        "skipped/steps": 0.0,
    },
    # logits start at 0: a token costs the logarithm of the vocabulary
    "captioners": {
        "balance/lambda": 1.0,
        "balance/sp_norm": 0.114634,
        "balance/ssp_norm": 0.0,
        "bits/box/image": 68.2933,
        "bits/box/token": 9.22882,
        "bits/caption/image": 95.9797,
        "bits/caption/token": 9.22882,
        "bits/caption_locca/image": 95.9797,
        "bits/caption_locca/parallel_token": 9.22882,
        "bits/caption_locca/token": 9.22882,
        "bits/region/image": 77.5221,
        "bits/region/token": 9.22882,
        "grad_norm": 41.4581,
        "info/box": -36.3672,
        "info/caption": -48.1113,
        "info/caption_locca": -48.1113,
        "info/region": -38.8505,
        "info/text": -4.07854,
        "loss": 6.14347,
        "loss/box": 6.39693,
        "loss/caption": 6.39693,
        "loss/caption_locca": 6.39693,
        "loss/region": 6.39693,
        "loss/sp": 6.14347,
        "loss/text": 5.12961,
        "skipped/not_finite": 0.0,
        "skipped/steps": 0.0,
    },
}


def images() -> list[tuple[str, Image.Image]]:
    """Ten images of two categories without randomness of any library."""
    y, x = np.mgrid[:60, :80]
    waves = [np.sin(x / (3 + k) + k) * np.cos(y / (4 + k)) for k in range(10)]
    return [
        (f"{'ab'[k % 2]}", Image.fromarray(np.uint8(np.stack([w, w**2, -w], -1) * 120 + 128)))
        for k, w in enumerate(waves)
    ]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("golden")
    for k, (kind, image) in enumerate(images()):
        (root / "folder" / kind).mkdir(parents=True, exist_ok=True)
        image.save(root / "folder" / kind / f"{k}.png")
        (root / "folder" / kind / f"{k}.txt").write_text(f"picture {k} of kind {kind}")
    (root / "tars").mkdir()
    with tarfile.open(root / "tars" / "0.tar", "w") as tar:
        for k, file in enumerate(sorted((root / "folder").rglob("*.png"))):
            tar.add(file, f"{k:03d}.png")
            tar.add(file.with_suffix(".txt"), f"{k:03d}.txt")
    return {
        "quickstart": "configs/quickstart.py:size=60",
        "folder": f"configs/folder.py:path={root}/folder",
        "tars": f"configs/tars.py:path={root}/tars/*.tar",
        "forms": "configs/forms.py:form=sim_pixel,size=tiny",
        "intern_image": "configs/quickstart.py:size=60,model=internimage_pico",
        "captioners": "configs/forms.py:form=coca+locca,size=tiny",
    }


@pytest.mark.parametrize(
    "name",
    # the terms of a folder are those of the quickstart, its pipeline that of the tars
    [
        "quickstart",
        pytest.param("folder", marks=pytest.mark.slow),
        "tars",
        "forms",
        pytest.param("intern_image", marks=pytest.mark.slow),
        pytest.param("captioners", marks=pytest.mark.slow),
    ],
)
def test_one_step(
    name: str, places: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(parallel.mesh.jax, "devices", lambda: [jax.local_devices()[0]])
    made = configuration.load_config(places[name])
    small = SMALL | (
        {"data.size": "60"}
        if name == "forms"
        else toy.INTERN_IMAGE
        if name == "intern_image"
        else CAPTIONERS
        if name == "captioners"
        else {}
    )
    configuration.apply_overrides(made, [f"{key}={value}" for key, value in small.items()])
    job = jobs.open_setup(configuration.resolve(made), str(tmp_path))
    trainer = Trainer(job.config, job.mesh, job.tokenizer.vocabulary if job.tokenizer else 0)
    batches = job.batches(0)
    _, metrics = trainer.step(trainer.init(), parallel.to_global(job.mesh, next(batches)))
    batches.close()
    got = {key: float(value) for key, value in sorted(metrics.items()) if value.ndim == 0}
    assert got == pytest.approx(GOLDEN.get(name, {}), rel=1e-4, abs=1e-6), f"{name}: {got!r}"
