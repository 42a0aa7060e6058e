"""Small archives, and what reads them, for the fault tests."""

import io
import pathlib
import tarfile

from m3i_jax.data import records, sources
from tests import broken

ROOT = pathlib.Path(__file__).parent.parent.parent
JPEG = broken.encode(broken.smooth(40, 48), "JPEG")


def tar(place: pathlib.Path, members: list[tuple[str, bytes]]) -> str:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w", format=tarfile.GNU_FORMAT) as out:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return str(place)


def read_all(source: sources.Source) -> None:
    """Every record, as the pipeline looks at it."""
    for i in range(len(source)):
        record = source[i]
        records.clean_caption(record.caption)
        try:
            records.decode(record.image)
        except records.BadRecord:
            continue
