"""Deformable attention, alone and in two layers of an encoder, forward and all gradients in
float32, over the same in Transformers' PyTorch.

    python -m tests.bench.deformable_peer                   # all
    python -m tests.bench.deformable_peer one_thread        # processor time of one thread each

Names end with the side of the images in pixels; levels have the strides 8 to 64, eight heads of 32
channels, four points. Both sides use the same weights and inputs; the losses must agree.
"""

import pathlib
import types
from typing import Any

import numpy as np

from tests.bench import race

NEEDS = ("torch", "transformers")
AGREE = 1e-4
HEADS, CHANNELS, POINTS, LAYERS, IMAGES = 8, 32, 4, 2, 2
NAMES = ["sampling_128", "sampling_256", "encoder_128", "encoder_256"]


def shapes_of(name: str) -> tuple[tuple[int, int], ...]:
    """(height, width) of the levels."""
    side = int(name.rsplit("_", 1)[1])
    return tuple((-(-side // stride), -(-side // stride)) for stride in (8, 16, 32, 64))


def inputs(name: str) -> dict[str, np.ndarray]:
    """Values, places near the tokens, weights; fixed seed."""
    shapes, rng = shapes_of(name), np.random.default_rng(0)
    tokens = sum(h * w for h, w in shapes)
    made = {"x": rng.normal(size=(IMAGES, tokens, HEADS * CHANNELS))}
    made["position"] = rng.normal(size=made["x"].shape)
    centres = np.concatenate(
        [
            np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1)
            for h, w in shapes
        ],
        None,
    ).reshape(tokens, 2)
    sampled = (IMAGES, tokens, HEADS, len(shapes), POINTS)
    moves = 2 * rng.normal(size=(*sampled, 2)) / np.array(shapes)[:, None, ::-1]
    made["locations"] = centres[:, None, None, None] + moves
    made["weights"] = rng.dirichlet(np.ones(sampled[3] * POINTS), sampled[:3]).reshape(sampled)
    made["centres"] = centres
    return {key: array.astype(np.float32) for key, array in made.items()}


def ours(folder: pathlib.Path, name: str) -> Any:
    """The JAX step as a function that runs it and returns the loss. Writes the weights first."""
    import jax
    import jax.numpy as jnp

    from m3i_jax.models.dense import deformable_layers
    from m3i_jax.models.dense.deformable_attention import deformable_attention

    shapes, given = shapes_of(name), {k: jnp.asarray(v) for k, v in inputs(name).items()}
    width = HEADS * CHANNELS
    params = deformable_layers.init_deformable_encoder(
        jax.random.key(0), width, HEADS, len(shapes), POINTS, 4 * width, LAYERS
    )
    np.savez(
        folder / "weights.npz",
        **{
            "/".join(str(key.key) for key in path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        },
    )
    read: Any
    if name.startswith("sampling"):
        read = given["x"].reshape(IMAGES, -1, HEADS, CHANNELS), given["locations"], given["weights"]
        call = lambda value, *more: jnp.square(deformable_attention(value, shapes, *more)).mean()
    else:
        read = params, given["x"]

        def call(params: Any, x: Any) -> Any:
            y = deformable_layers.deformable_encoder(params, x, given["position"], shapes, HEADS)
            return (y * given["position"]).mean()

    which = tuple(range(len(read)))
    run = jax.jit(jax.value_and_grad(call, which)).lower(*read).compile()
    return lambda: float(jax.block_until_ready(run(*read))[0])


def theirs(folder: pathlib.Path, name: str) -> Any:
    """The PyTorch step, from the weights of the JAX side."""
    import torch
    from transformers.models.deformable_detr import modeling_deformable_detr as peer

    torch.set_num_threads(race.THREADS)
    shapes, given = list(shapes_of(name)), {k: torch.tensor(v) for k, v in inputs(name).items()}
    if name.startswith("sampling"):
        attention = peer.MultiScaleDeformableAttention()
        read = [given["x"].view(IMAGES, -1, HEADS, CHANNELS), given["locations"], given["weights"]]
        for array in read:
            array.requires_grad_()
        call = lambda: attention(read[0], None, shapes, None, *read[1:], 64).square().mean()
    else:
        width = HEADS * CHANNELS
        settings = types.SimpleNamespace(
            d_model=width, encoder_attention_heads=HEADS, encoder_n_points=POINTS, dropout=0.0,
            encoder_ffn_dim=4 * width, num_feature_levels=len(shapes), activation_dropout=0.0,
            activation_function="relu", disable_custom_kernels=True,
        )  # fmt: skip
        layers = [peer.DeformableDetrEncoderLayer(settings).eval() for _ in range(LAYERS)]
        weights = np.load(folder / "weights.npz")
        for i, layer in enumerate(layers):
            own = layer.self_attn
            for path, module in (
                ("attention/offsets", own.sampling_offsets),
                ("attention/weights", own.attention_weights),
                ("attention/value", own.value_proj),
                ("attention/output", own.output_proj),
                ("norm1", layer.self_attn_layer_norm),
                ("fc1", layer.mlp.fc1),
                ("fc2", layer.mlp.fc2),
                ("norm2", layer.final_layer_norm),
            ):
                first = "scale" if path.startswith("norm") else "kernel"
                module.weight.data = torch.tensor(weights[f"{path}/{first}"][i].T.copy())
                module.bias.data = torch.tensor(weights[f"{path}/bias"][i])
        x = given["x"].requires_grad_()
        read = [x, *(p for layer in layers for p in layer.parameters())]
        reference = given["centres"][None, :, None].expand(IMAGES, -1, len(shapes), -1)
        sizes = torch.tensor(shapes)

        def call() -> Any:
            y = x
            for layer in layers:
                y = layer(
                    y,
                    None,
                    spatial_position_embeddings=given["position"],
                    reference_points=reference,
                    spatial_shapes=sizes,
                    spatial_shapes_list=shapes,
                )
            return (y * given["position"]).mean()

    def step() -> float:
        loss = call()
        torch.autograd.grad(loss, read)
        return loss.item()

    return step


if __name__ == "__main__":
    race.main("tests.bench.deformable_peer", NAMES, AGREE)
