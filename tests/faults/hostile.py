"""Small archives and their readers, for the fault tests."""

import io
import pathlib
import tarfile

from m3i_jax.data import decode
from m3i_jax.data.sources import base
from tests import broken

ROOT = pathlib.Path(__file__).parent.parent.parent
JPEG = broken.encode(broken.smooth(40, 48), "JPEG")
# Code by which a program prints its peak memory in KiB. getrusage would include the process that
# started it.
PEAK = """
import pathlib


def peak():
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


"""


def tar(place: pathlib.Path, members: list[tuple[str, bytes]]) -> str:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w", format=tarfile.GNU_FORMAT) as out:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return str(place)


def read_all(source: base.DataSource) -> None:
    """Read every record, as the pipeline does."""
    for i in range(len(source)):
        record = source[i]
        decode.clean_caption(record.caption)
        try:
            decode.decode_image(record.image)
        except decode.BadRecord:
            continue
