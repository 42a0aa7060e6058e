"""Files of named arrays: safetensors and npz by themselves, PyTorch's where PyTorch is installed.
Nothing here unpickles: npz is read without objects, `.pt` and `.pth` by
`torch.load(weights_only=True)`.

A safetensors file is eight bytes with the length of a JSON header (little-endian), the header,
{name: {dtype, shape, data_offsets}}, and the arrays one after the other. Numpy reads and writes
that; the file stays on disk until an array is asked for."""

import importlib
import json
import math
import mmap
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from m3i_jax.errors import UserError

_TYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_FLOATS = {np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
# bytes: of a hundred thousand arrays it has 10 MB; parsed, JSON takes ten times as much memory
_LONGEST_INDEX = 1 << 24
_LONGEST_JSON = 1 << 22  # of a configuration: one that names 21,000 classes has 1.5 MB
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the format's own library
# of Hugging Face directories whose weights are in several files
_INDEX = "model.safetensors.index.json"
PREPROCESSING = "preprocessing.json"  # beside weights that we exported
ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".tar")


class TensorFile(Mapping[str, np.ndarray]):
    """Named arrays that are read when asked for.

    Attributes:
      shapes: {name: shape} of all of them.

    >>> arrays = TensorFile({"a": (2,)}, lambda name: np.zeros(2))
    >>> list(arrays), arrays["a"].tolist()
    (['a'], [0.0, 0.0])
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
    ) -> None:
        self.shapes, self._read = dict(shapes), read

    def __getitem__(self, name: str) -> np.ndarray:
        """Raises UserError where the array cannot be read any more."""
        if name not in self.shapes:
            raise KeyError(name)
        try:
            return self._read(name)
        except UserError:
            raise
        except (
            Exception
        ) as error:  # a file from elsewhere: whatever is wrong with it, the person needs its name
            raise UserError(
                f"{name}: cannot be read ({_reason(error)}); is the file complete?"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """The arrays of a file, or of a Hugging Face directory with `model.safetensors` (in one file or
    several) or `pytorch_model.bin`.

    Raises: UserError: no such file, a kind that is not known, a file that is damaged; PyTorch's
      without PyTorch.
    """
    place = pathlib.Path(path)
    if place.is_dir():
        return _directory(place)
    if not place.is_file():
        raise UserError(
            f"{path}: there is no such file; give weights as {', '.join(ENDINGS[:4])}, a directory"
            " with them, or a run's workdir"
        )
    openers = {
        ".safetensors": _safetensors,
        ".npz": _npz,
        ".pth": _torch,
        ".pt": _torch,
        ".bin": _torch,
        ".tar": _torch,
    }
    if place.suffix not in openers:
        raise UserError(
            f"{path}: is no file of weights that is known here; give one that ends in"
            f" {', '.join(ENDINGS[:4])}"
        )
    try:
        return openers[place.suffix](place)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # a file from elsewhere: whatever is wrong with it, the person needs its name
        raise UserError(
            f"{path}: cannot be read as {place.suffix} ({_reason(error)}); is it complete?"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def read_json(path: pathlib.Path, longest: int = _LONGEST_JSON) -> dict[str, Any]:
    """The JSON object of a file that stands beside weights.

    Raises:
      UserError: the file cannot be read, is too long, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(longest + 1)
        if len(raw) > longest:
            raise ValueError(f"it has more than {longest >> 20} MiB")
        found = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON ({_reason(error)}); repair or remove it"
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: holds no JSON object but {type(found).__name__}; repair or remove it"
        )
    return found


def _directory(place: pathlib.Path) -> TensorFile:
    if (place / _INDEX).is_file():
        return _several(place, place / _INDEX)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (place / name).is_file():
            return read_tensors(place / name)
    try:
        found = sorted(p for p in place.iterdir() if p.suffix in (".safetensors", ".npz"))
    except OSError as error:
        raise UserError(
            f"{place}: cannot be read ({error.strerror}); give another directory"
        ) from error
    if len(found) == 1:
        return read_tensors(found[0])
    raise UserError(
        f"{place}: has neither checkpoints/ of a run nor model.safetensors; name the file of"
        " weights, or the workdir of a run"
    )


def _several(place: pathlib.Path, index: pathlib.Path) -> TensorFile:
    """The arrays of a directory whose weights are in several files."""
    where = read_json(index, _LONGEST_INDEX).get("weight_map")
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(file, str) for file in where.values())
    ):
        raise UserError(
            f"{index}: has no weight_map that says which file holds which array; restore it"
        )
    if outside := [file for file in where.values() if pathlib.PurePath(file).name != file]:
        raise UserError(
            f"{index}: names {outside[0]!r}, which does not lie beside it; the directory is not to"
            " be trusted"
        )
    files = {file: read_tensors(place / file) for file in sorted(set(where.values()))}
    if lost := [name for name, file in where.items() if name not in files[file].shapes]:
        raise UserError(
            f"{index}: {lost[0]} is not in {where[lost[0]]!r} ({len(lost)} of {len(where)} arrays);"
            " restore the directory"
        )
    return TensorFile(
        {name: files[file].shapes[name] for name, file in where.items()},
        lambda name: files[where[name]][name],
    )


def weights(name: str, array: Any) -> np.ndarray:
    """An array as weights: floating point of at least 16 bits, as it is stored, all of it finite.

    Args:
      name: of the array, for messages.
      array: of any library that numpy can read.

    Raises:
      UserError: quantised or other integers, NaN or Inf, or numbers beyond float32.

    >>> weights("a", np.ones(2, np.float16)).dtype, weights("b", np.ones(2, ml_dtypes.bfloat16)).size
    (dtype('float16'), 2)
    >>> weights("c", np.ones(2, np.int8))
    Traceback (most recent call last):
    m3i_jax.errors.UserError: c has type int8: quantised weights cannot be used; give the file in float32, float16 or bfloat16
    """
    value = np.asarray(array)
    if value.dtype not in _FLOATS:
        raise UserError(
            f"{name} has type {value.dtype}: quantised weights cannot be used; give the file in"
            " float32, float16 or bfloat16"
        )
    with np.errstate(over="ignore"):  # of float64
        wrong = value.size - int(np.isfinite(value.astype(np.float32, copy=False)).sum())
    if wrong:
        raise UserError(
            f"{name}: {wrong:,} of {value.size:,} numbers are not finite (NaN or Inf); these"
            " weights are broken, give others"
        )
    return value


def _safetensors(place: pathlib.Path) -> TensorFile:
    with open(place, "rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (length,) = struct.unpack("<Q", view[:8])
    if length > min(_LONGEST_HEADER, len(view) - 8):
        raise ValueError(f"a header of {length} bytes in a file of {len(view)}")
    header = {
        name: entry
        for name, entry in json.loads(bytes(view[8 : 8 + length])).items()
        if name != "__metadata__"
    }
    data = view[8 + length :]

    def one(name: str) -> np.ndarray:
        entry = header[name]
        kind, shape, (start, end) = (
            np.dtype(_TYPES[entry["dtype"]]),
            tuple(entry["shape"]),
            entry["data_offsets"],
        )
        return np.frombuffer(data[start:end], kind).reshape(shape)

    for name, entry in header.items():
        start, end = entry["data_offsets"]
        size = math.prod(entry["shape"]) * np.dtype(_TYPES[entry["dtype"]]).itemsize
        if not 0 <= start <= end <= len(data) or end - start != size:
            raise ValueError(f"{name} should lie at {start} to {end} of {len(data)} bytes")
    return TensorFile({name: tuple(entry["shape"]) for name, entry in header.items()}, one)


def _npz(place: pathlib.Path) -> TensorFile:
    shapes = {}
    with zipfile.ZipFile(place) as archive:  # headers alone: the arrays stay where they are
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, kind = header(file)
            if kind.hasobject:
                raise ValueError(f"{member} holds Python objects, which are not unpickled")
            shapes[member.removesuffix(".npy")] = shape
    opened = np.load(place, allow_pickle=False)
    return TensorFile(shapes, lambda name: opened[name])


def import_torch(why: str) -> Any:
    """The module torch, for `why`. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(f"{why} needs PyTorch: pip install 'm3i-jax[torch]'") from None


def _torch(place: pathlib.Path) -> TensorFile:
    library = import_torch(f"{place}: a file of PyTorch's")
    try:
        table = library.load(place, weights_only=True, map_location="cpu")
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # its module is none that is imported here
            raise
        # PyTorch's own text tells how to load it unsafely.
        raise UserError(
            f"{place}: is damaged, or holds other Python objects than arrays, and those are never"
            " loaded; where it was made, save the weights alone:"
            " safetensors.torch.save_file(model.state_dict(), FILE), or"
            " torch.save(model.state_dict(), FILE)"
        ) from error
    for key in ("model", "state_dict", "module"):  # the containers that training scripts save
        if isinstance(table, Mapping) and isinstance(table.get(key), Mapping):
            table = table[key]
    table = (
        {str(name): value for name, value in table.items() if hasattr(value, "numpy")}
        if isinstance(table, Mapping)
        else {}
    )
    if not table:
        raise ValueError("no table of arrays in it")

    def one(name: str) -> np.ndarray:
        value = table[name]
        return value.float().numpy() if value.dtype == library.bfloat16 else value.numpy()

    return TensorFile({name: tuple(value.shape) for name, value in table.items()}, one)


def write_safetensors(
    path: str | os.PathLike[str],
    table: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named arrays, whole or not at all. Transformers wants {"format": "pt"} as metadata.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     write_safetensors(f"{place}/a.safetensors", {"x": np.arange(3, dtype=np.int32)})
    ...     read_tensors(f"{place}/a.safetensors")["x"].tolist()
    [0, 1, 2]
    """
    arrays = {
        name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in table.items()
    }
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide types first, so that every array begins at a multiple of its own width.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    at = 0
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise ValueError(f"{name} has type {array.dtype}, which a safetensors file cannot hold")
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_replace(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(arrays[name].tobytes())


def write_npz(path: str | os.PathLike[str], table: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as npz, whole or not at all."""
    with atomic_replace(path) as file:
        np.savez(file, **table)  # type: ignore[arg-type]


class atomic_replace:  # noqa: N801  used as a function
    """A binary file that gets its name when it is whole: `with atomic(path) as file`. An exception
    leaves nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = pathlib.Path(path)

    def __enter__(self) -> Any:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._unfinished = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        self._file = open(self._unfinished, "wb")  # noqa: SIM115  closed in __exit__
        return self._file

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._unfinished, self._path)
        else:
            self._unfinished.unlink()
