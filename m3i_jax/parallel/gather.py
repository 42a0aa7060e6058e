"""Gathering bytes of any length from all hosts: results of an evaluation, which are too large for
`exchange_values` and have no fixed shape for `allgather_rows`."""

import numpy as np
from jax.experimental import multihost_utils

from m3i_jax.parallel import barriers

PIECE = 1 << 24  # bytes of each host in one collective, so that little device memory is used
_LEAST = 1 << 12


def gather_bytes(name: str, content: bytes) -> list[bytes]:
    """Every host's bytes, on every host, in the order of the hosts. A collective.

    Args:
      name: of the barrier before it; all hosts reach those of one name in the same order.
      content: of this host; may be empty.

    Raises:
      HostMissing: a host did not come.

    >>> gather_bytes("docs", b"one host")
    [b'one host']
    """
    if barriers.host_names() == 1:
        return [content]
    # The collective itself has no time limit, so it starts after a barrier, which has one.
    lengths = [int(text) for text in barriers.exchange_values(name, str(len(content)))]
    size = _LEAST  # a power of two: few shapes are compiled
    while size < min(max(lengths), PIECE):
        size *= 2
    parts: list[list[bytes]] = [[] for _ in lengths]
    barriers.barrier(f"{name} gather")
    for start in range(0, max(lengths), size):
        piece = np.zeros(size, np.uint8)
        own = np.frombuffer(content[start : start + size], np.uint8)
        piece[: len(own)] = own
        for host, row in enumerate(np.asarray(multihost_utils.process_allgather(piece))):
            parts[host].append(row[: max(0, lengths[host] - start)].tobytes())
    return [b"".join(each) for each in parts]
