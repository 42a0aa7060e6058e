"""Bytes of two processes, of different lengths and in several pieces."""

import pathlib
import textwrap

from m3i_jax.parallel import gather
from tests.parallel.test_distributed import ends, two

GATHER = """
    import hashlib, sys
    from m3i_jax.parallel import distributed, gather
    me = int(sys.argv[1])
    info = distributed.ProcessInfo(source="test", coordinator=sys.argv[2], processes=2, process=me)
    distributed.initialize(info, limit=60)
    gather.PIECE = 1 << 13
    contents = [[b"", b"x" * 5], [bytes(range(256)) * 100, b"short"], [b"", b""]]
    for both in contents:
        assert gather.gather_bytes("test", both[me]) == both, both
    print("equal")
"""


def test_one_host_gets_its_own() -> None:
    assert gather.gather_bytes("test", b"") == [b""]


def test_two_hosts_get_the_bytes_of_both(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "gather.py"
    script.write_text(textwrap.dedent(GATHER))
    done = ends(two(str(script), "{i}", "127.0.0.1:{port}"))
    assert [(status, out.split()[-1]) for status, out, _ in done] == [(0, "equal")] * 2, done
