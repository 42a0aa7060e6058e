"""Random keys on the device, each a function of (seed, purpose, stream position), so that neither
sharding nor microbatches nor a restart changes a draw. `rng` has the random numbers of the host."""

import jax

# Purposes: no two uses of randomness share one. The numbers are part of every run: never change
# them.
PHOTOMETRIC = 0x70686F74
DISTORT = 0x64697374  # colour of the images of dense tasks
BLEND = 0x626C6E64  # mixup and CutMix
ERASE = 0x65726173
DROP_PATH = 0x64726F70
PARALLEL = 0x70617261  # captions that are predicted at once
ENTROPY = 0x656E7472  # estimators of entropy terms
SAMPLING = 0x73616D70  # of detection: anchors, proposals, noised objects
DROPOUT = 0x64726F63  # of segmentation


def purpose_key(seed: int, purpose: int) -> jax.Array:
    """Returns the part of a key that all samples share.

    >>> bool(purpose_key(0, BLEND) == purpose_key(0, ERASE))
    False
    """
    return jax.random.fold_in(jax.random.key(seed), purpose)


def position_key(base: jax.Array, words_2: jax.Array) -> jax.Array:
    """Returns the key of a sample.

    Args:
      base: of its purpose.
      words_2: uint32 [2], high and low word of its position in the stream.
    """
    return jax.random.fold_in(jax.random.fold_in(base, words_2[0]), words_2[1])
