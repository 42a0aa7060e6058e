"""What Muon adds to the update of the blocks of a ViT-B under FSDP over 8, from the program that is
compiled for eight forced CPU devices. Nothing is computed.

    python -m tests.bench.muon

- GFLOP: matrix products of a step, over the number of devices.
- MiB: bytes that a device receives, by kind of collective.
- left to the partitioner: the same products on matrices as they are sharded, without dealing whole
  ones out to the devices.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import optax

from m3i_jax import parallel, schema
from m3i_jax.models import backbones, presets
from m3i_jax.profiling import flops, hlo
from m3i_jax.reporting import text_table
from m3i_jax.training import muon

DEVICES = 8
HEADERS = ("update", "GFLOP", "MiB received", "kinds")


def blocks() -> Any:
    """The parameters of the blocks, as shapes."""
    preset = presets.preset("vit_b16")
    model = schema.Model(encoder=schema.Encoder(**preset["encoder"]), scan=True)
    init = backbones.get_backbone(model).init
    tree = jax.eval_shape(
        lambda key: init(model, key, mask_token=False, grid=14), jax.random.key(0)
    )
    return {"encoder": {"blocks": tree["blocks"]}}


def measure(tx: optax.GradientTransformation) -> tuple[float, dict[str, hlo.Traffic]]:
    """(FLOPs, collectives by kind) of the update of the blocks."""
    mesh = parallel.make_mesh((1, DEVICES, 1), jax.devices()[:DEVICES])
    grads = blocks()
    state = jax.eval_shape(tx.init, grads)
    layout = parallel.tree_shardings(mesh, grads), parallel.tree_shardings(mesh, state)
    update = jax.jit(lambda g, s: tx.update(g, s), in_shardings=layout, out_shardings=layout)
    with jax.set_mesh(mesh):
        counted = flops.count_flops(update, grads, state).total
        program = hlo.parse_hlo(update.lower(grads, state).compile().as_text())
    return counted, hlo.collective_traffic(program)


def without_dealing(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return function(x)


def main() -> None:
    tx = muon.muon_or_adam(momentum=0.95, rms=0.2, b1=0.9, b2=0.95, eps=1e-8)
    rows = []
    for name, rule in (("adamw", optax.scale_by_adam()), ("muon", tx), ("partitioner", tx)):
        if name == "partitioner":
            muon._dealt = without_dealing
        counted, found = measure(rule)
        kinds = ", ".join(f"{kind} {each.count}" for kind, each in sorted(found.items()))
        received = sum(each.received for each in found.values())
        rows.append((name, f"{counted / DEVICES / 1e9:.0f}", f"{received / 2**20:.0f}", kinds))
    print(text_table.text_table(rows, HEADERS))


if __name__ == "__main__":
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    main()
