"""InternImage-T, forward and all gradients in float32, over PyTorch with DCNv3 as a `grid_sample`
(tests/bench/intern_image_torch.py).

    python -m tests.bench.intern_image_peer                    # 2 and 8 images of 224 pixels
    python -m tests.bench.intern_image_peer 8 --runs 9
    python -m tests.bench.intern_image_peer --torch PYTHON     # torch from another environment

Both use the same weights, with offsets as large as in a trained network, and the same images. The
losses and the gradients of all weights must agree before anything is timed (tests/bench/race.py).
"""

import pathlib
import sys
from typing import Any

import numpy as np

from tests.bench import race
from tests.bench.figures import Figure

NEEDS = ("torch",)
TARGET = 0.7
AGREE = 1e-4  # relative, of the loss
# Median and largest difference of the gradients. For a sample on the border of two cells, rounding
# decides which slope it has, and earlier layers then differ; PyTorch's float32 gradients differ
# from its float64 gradients by as much.
TYPICAL, WORST = 1e-3, 1e-2
SIDE = {"toy": 64}


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, and the weights of the last map in the loss; fixed seed."""
    batch, side = int(name) if name.isdigit() else 1, SIDE.get(name, 224)
    images = np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32)
    return images, np.random.default_rng(1).normal(
        size=(batch, side // 32, side // 32, 512)
    ).astype(np.float32)


def ours(folder: pathlib.Path, name: str) -> Any:
    """The JAX step as a function that runs it and returns the loss. Writes weights and gradients
    under their published names first."""
    import jax
    import jax.numpy as jnp

    from m3i_jax.interop import intern_image_weights as interop
    from m3i_jax.models import intern_image

    model, noise = intern_image.PRESETS["internimage_t"], np.random.default_rng(2)
    random_params = jax.tree.map(np.asarray, intern_image.init(model, jax.random.key(0)))
    # which the published network lacks
    state = interop.store_intern_image(
        {"encoder": {part: tree for part, tree in random_params.items() if part != "fusion"}}
    )
    state |= {
        key: noise.normal(0, 0.1, value.shape).astype(np.float32)
        for key, value in state.items()
        if ".offset." in key
    }
    params = jax.tree.map(jnp.asarray, interop.load_intern_image(state)["encoder"])
    images, weight = (jnp.asarray(a) for a in inputs(name))

    def loss(params: Any, images: jax.Array, weight: jax.Array) -> jax.Array:
        return (weight * intern_image.feature_maps(model, params, images)[3]).sum()

    run = jax.jit(jax.value_and_grad(loss)).lower(params, images, weight).compile()
    _, grads = run(params, images, weight)
    np.savez(folder / "weights.npz", **state)
    np.savez(
        folder / "gradients.npz",
        **interop.store_intern_image({"encoder": jax.tree.map(np.asarray, grads)}),
    )

    def step() -> float:
        return float(jax.block_until_ready(run(params, images, weight))[0])

    return step


def theirs(folder: pathlib.Path, name: str) -> Any:
    """The PyTorch step, from the files of the JAX side.

    Raises:
      RuntimeError: the gradients differ.
    """
    import torch

    from tests.bench import intern_image_torch
    from tests.interop.published import Net

    torch.set_num_threads(race.THREADS)
    net = intern_image_torch.InternImage(Net(64, (4, 4, 18, 4), (4, 8, 16, 32), "pre"))
    net.load_state_dict(
        {key: torch.from_numpy(value) for key, value in np.load(folder / "weights.npz").items()}
    )
    images, weight = (torch.from_numpy(a) for a in inputs(name))

    def step() -> float:
        net.zero_grad()
        value = (weight * net(images.permute(0, 3, 1, 2))[3]).sum()
        value.backward()
        return value.item()

    step()
    expected = dict(np.load(folder / "gradients.npz"))
    gradients = {key: parameter.grad.numpy() for key, parameter in net.named_parameters()}
    off = {
        key: float(np.linalg.norm(gradients[key] - expected[key]) / np.linalg.norm(expected[key]))
        for key in gradients
    }
    if not (np.median(list(off.values())) <= TYPICAL and max(off.values()) <= WORST):
        worst = max(off, key=off.__getitem__)
        raise RuntimeError(f"the gradients of {worst} differ by {off[worst]:.1e}")
    return step


def figures(quick: bool) -> list[Figure]:
    import jax

    out = []
    for name in ("toy",) if quick else ("2", "8"):
        result = race.race(
            "tests.bench.intern_image_peer", name, 5 if quick else 7, sys.executable, AGREE
        )
        (a, b), (c, d) = result["wall"], result["processor"]
        label = (
            f"InternImage-T forward and gradients over PyTorch, CPU, {name} image(s), jax"
            f" {jax.__version__}"
        )
        out.append(
            Figure(label, a / b, None if quick else TARGET, note=f"processor time {c / d:.2f}")
        )
    return out


if __name__ == "__main__":
    race.main("tests.bench.intern_image_peer", ["2", "8"], AGREE)
