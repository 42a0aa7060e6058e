"""Files of named arrays: safetensors and npz, and PyTorch files if PyTorch is installed. Pickles
are never executed: npz is read without objects, `.pt` and `.pth` by
`torch.load(weights_only=True)`.

A safetensors file has eight bytes with the length of a JSON header (little-endian), the header
{name: {dtype, shape, data_offsets}}, and the arrays one after the other. It is read and written by
numpy; arrays are read from disk on demand."""

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
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_FLOATS = {np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
# limits in bytes; parsed JSON takes ten times as much memory
# an index of a hundred thousand arrays has 10 MB
_MAX_INDEX = 1 << 24
_MAX_JSON = 1 << 22  # a configuration with the names of 21,000 classes has 1.5 MB
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
# index of a Hugging Face directory with several weight files
_INDEX = "model.safetensors.index.json"
PREPROCESSING = "preprocessing.json"  # written next to exported weights
ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".tar")


class TensorFile(Mapping[str, np.ndarray]):
    """Named arrays that are read on demand.

    Attributes:
      shapes: {name: shape} of all arrays.

    >>> arrays = TensorFile({"a": (2,)}, lambda name: np.zeros(2))
    >>> list(arrays), arrays["a"].tolist()
    (['a'], [0.0, 0.0])
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
    ) -> None:
        self.shapes, self._read = dict(shapes), read

    def __getitem__(self, name: str) -> np.ndarray:
        """Read an array. Raises UserError if it cannot be read."""
        if name not in self.shapes:
            raise KeyError(name)
        try:
            return self._read(name)
        except UserError:
            raise
        except Exception as error:  # a broken file can raise anything; the message needs the name
            raise UserError(
                f"{name}: cannot be read ({_reason(error)}); is the file complete?"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Returns the arrays of a file, or of a Hugging Face directory with `model.safetensors` (in one
    file or several) or `pytorch_model.bin`.

    Raises:
      UserError: no such file, an unknown kind, a damaged file, or a PyTorch file without PyTorch.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _directory(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give weights as {', '.join(ENDINGS[:4])}, a directory with"
            " them, or a run's workdir"
        )
    openers = {
        ".safetensors": _safetensors,
        ".npz": _npz,
        ".pth": _torch,
        ".pt": _torch,
        ".bin": _torch,
        ".tar": _torch,
    }
    if path.suffix not in openers:
        raise UserError(
            f"{path}: unknown kind of file; give weights in a file that ends in"
            f" {', '.join(ENDINGS[:4])}"
        )
    try:
        return openers[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # a broken file can raise anything; the message needs the path
        raise UserError(
            f"{path}: cannot be read as {path.suffix} ({_reason(error)}); is it complete?"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def read_json(path: pathlib.Path, longest: int = _MAX_JSON) -> dict[str, Any]:
    """Returns the JSON object in a file next to weights, of at most `longest` bytes.

    Raises:
      UserError: the file cannot be read, is too long, or contains something else.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(longest + 1)
        if len(raw) > longest:
            raise ValueError(f"more than {longest >> 20} MiB")
        content = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON ({_reason(error)}); repair or remove it"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: contains {type(content).__name__} instead of a JSON object; repair or remove"
            " it"
        )
    return content


def _directory(path: pathlib.Path) -> TensorFile:
    if (path / _INDEX).is_file():
        return _sharded(path, path / _INDEX)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return read_tensors(path / name)
    try:
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".npz"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give another directory"
        ) from error
    if len(files) == 1:
        return read_tensors(files[0])
    raise UserError(
        f"{path}: has neither checkpoints/ of a run nor model.safetensors; give the file of"
        " weights, or the workdir of a run"
    )


def _sharded(path: pathlib.Path, index: pathlib.Path) -> TensorFile:
    """The arrays of a directory with several weight files."""
    file_of = read_json(index, _MAX_INDEX).get("weight_map")
    if (
        not isinstance(file_of, dict)
        or not file_of
        or not all(isinstance(file, str) for file in file_of.values())
    ):
        raise UserError(f"{index}: has no valid weight_map {{array: file}}; restore it")
    if outside := [file for file in file_of.values() if pathlib.PurePath(file).name != file]:
        raise UserError(
            f"{index}: names {outside[0]!r}, which is not in the same directory; do not trust this"
            " directory"
        )
    files = {file: read_tensors(path / file) for file in sorted(set(file_of.values()))}
    if missing := [name for name, file in file_of.items() if name not in files[file].shapes]:
        raise UserError(
            f"{index}: {missing[0]} is not in {file_of[missing[0]]!r} ({len(missing)} of"
            f" {len(file_of)} arrays); restore the directory"
        )
    return TensorFile(
        {name: files[file].shapes[name] for name, file in file_of.items()},
        lambda name: files[file_of[name]][name],
    )


def weights(name: str, array: Any) -> np.ndarray:
    """Returns an array checked as weights: floating point of at least 16 bits, all values finite.
    Its type is kept.

    Args:
      name: name of the array, for messages.
      array: an array of any library that numpy can read.

    Raises:
      UserError: integers, quantised ones too, NaN or Inf, or values beyond float32.

    >>> weights("a", np.ones(2, np.float16)).dtype
    dtype('float16')
    >>> weights("c", np.ones(2, np.int8))
    Traceback (most recent call last):
    m3i_jax.errors.UserError: c has type int8: quantised weights cannot be used; give the file ...
    """
    value = np.asarray(array)
    if value.dtype not in _FLOATS:
        raise UserError(
            f"{name} has type {value.dtype}: quantised weights cannot be used; give the file in"
            " float32, float16 or bfloat16"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32
        wrong = value.size - int(np.isfinite(value.astype(np.float32, copy=False)).sum())
    if wrong:
        raise UserError(
            f"{name}: {wrong:,} of {value.size:,} values are not finite (NaN or Inf); the weights"
            " are damaged, use another file"
        )
    return value


def _safetensors(path: pathlib.Path) -> TensorFile:
    with open(path, "rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (length,) = struct.unpack("<Q", view[:8])
    if length > min(_MAX_HEADER, len(view) - 8):
        raise ValueError(f"a header of {length} bytes in a file of {len(view)}")
    header = {
        name: entry
        for name, entry in json.loads(bytes(view[8 : 8 + length])).items()
        if name != "__metadata__"
    }
    data = view[8 + length :]

    def read(name: str) -> np.ndarray:
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
            raise ValueError(f"{name} has the offsets {start} to {end} in {len(data)} bytes")
    return TensorFile({name: tuple(entry["shape"]) for name, entry in header.items()}, read)


def _npz(path: pathlib.Path) -> TensorFile:
    shapes = {}
    with zipfile.ZipFile(path) as archive:  # reads the headers only
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
                raise ValueError(f"{member} contains Python objects, which are never unpickled")
            shapes[member.removesuffix(".npy")] = shape
    opened = np.load(path, allow_pickle=False)
    return TensorFile(shapes, lambda name: opened[name])


def import_torch(why: str) -> Any:
    """Returns the module torch, needed for `why`. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(f"{why} needs PyTorch: pip install 'm3i-jax[torch]'") from None


def _torch(path: pathlib.Path) -> TensorFile:
    library = import_torch(f"{path}: a PyTorch file")
    try:
        table = library.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        if (
            type(error).__name__ != "UnpicklingError"
        ):  # defined in pickle, which is not imported here
            raise
        # PyTorch's message recommends an unsafe way to load it
        raise UserError(
            f"{path}: is damaged, or contains Python objects other than arrays, which are never"
            " loaded; save the weights alone where it was made:"
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
        raise ValueError("it contains no arrays")

    def read(name: str) -> np.ndarray:
        value = table[name].detach()  # a Parameter has no numpy array
        return value.float().numpy() if value.dtype == library.bfloat16 else value.numpy()

    return TensorFile({name: tuple(value.shape) for name, value in table.items()}, read)


def write_safetensors(
    path: str | os.PathLike[str],
    table: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write named arrays atomically. Transformers requires {"format": "pt"} as metadata.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     write_safetensors(f"{path}/a.safetensors", {"x": np.arange(3, dtype=np.int32)})
    ...     read_tensors(f"{path}/a.safetensors")["x"].tolist()
    [0, 1, 2]
    """
    arrays = {
        name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in table.items()
    }
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # wide types first, so that every array is aligned
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    offset = 0
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise ValueError(f"{name} has type {array.dtype}, which safetensors does not support")
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_replace(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(arrays[name].tobytes())


def write_npz(path: str | os.PathLike[str], table: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as npz, atomically."""
    with atomic_replace(path) as file:
        np.savez(file, **table)  # type: ignore[arg-type]


class atomic_replace:  # noqa: N801  used as a function
    """A binary file that replaces `path` when it is complete: `with atomic_replace(path) as file`.
    After an exception no file is left."""

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
