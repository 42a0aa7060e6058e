"""Files of arrays: exact round trips, refusals in one line, no unpickling; compared with the
safetensors library if it is installed."""

import json
import pathlib
import struct
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files

TABLE = {
    "a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.float32(1.5).reshape(()),
    "none": np.zeros((0, 4), np.float16),
    "odd": np.arange(3, dtype=np.uint8), "half": np.arange(5).astype(ml_dtypes.bfloat16),
    "long": np.arange(4, dtype=np.int64),
    "flag": np.array([True, False]), "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
}  # fmt: skip


def check(table) -> None:
    assert sorted(table) == sorted(TABLE) and len(table) == len(TABLE)
    for name, array in TABLE.items():
        assert table.shapes[name] == array.shape
        assert (
            table[name].dtype == array.dtype
            and np.ascontiguousarray(table[name]).tobytes() == np.ascontiguousarray(array).tobytes()
        ), name


def test_safetensors_keep_every_bit(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    tensor_files.write_safetensors(path, TABLE, {"format": "pt"})
    check(tensor_files.read_tensors(path))
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert (
        header["__metadata__"] == {"format": "pt"}
        and header["half"]["dtype"] == "BF16"
        and length % 8 == 0
    )


def test_files_equal_those_of_the_safetensors_library(tmp_path: pathlib.Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    plain = {
        name: np.ascontiguousarray(array).reshape(array.shape)
        for name, array in TABLE.items()
        if name != "half"
    }
    tensor_files.write_safetensors(tmp_path / "ours.safetensors", plain)
    theirs = library.load((tmp_path / "ours.safetensors").read_bytes())
    for name, array in plain.items():
        assert theirs[name].tobytes() == array.tobytes() and theirs[name].shape == array.shape
    library.save_file(plain, tmp_path / "theirs.safetensors")
    got = tensor_files.read_tensors(tmp_path / "theirs.safetensors")
    assert all(got[name].tobytes() == array.tobytes() for name, array in plain.items())


def test_npz_is_read_by_its_headers_and_never_unpickled(tmp_path: pathlib.Path) -> None:
    table = {name: array for name, array in TABLE.items() if name != "half"}
    tensor_files.write_npz(tmp_path / "a.npz", table)
    got = tensor_files.read_tensors(tmp_path / "a.npz")
    assert all(
        got[name].tobytes() == array.tobytes() and got.shapes[name] == array.shape
        for name, array in table.items()
    )
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="never unpickled"):
        tensor_files.read_tensors(tmp_path / "objects.npz")


def test_a_hugging_face_directory_with_one_or_several_files(tmp_path: pathlib.Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    tensor_files.write_safetensors(one / "model.safetensors", TABLE)
    check(tensor_files.read_tensors(one))
    names = sorted(TABLE)
    for n, part in enumerate((names[:3], names[3:])):
        tensor_files.write_safetensors(
            several / f"model-{n}.safetensors", {name: TABLE[name] for name in part}
        )
    where = {name: f"model-{int(name in names[3:])}.safetensors" for name in names}
    (several / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    check(tensor_files.read_tensors(several))
    (several / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../one/model.safetensors"}})
    )
    with pytest.raises(UserError, match="do not trust this directory"):
        tensor_files.read_tensors(several)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.safetensors", b"", "complete"),
        ("a.safetensors", struct.pack("<Q", 1 << 40) + b"{}", "a header of"),
        ("a.safetensors", struct.pack("<Q", 2) + b"{x", "a.safetensors: cannot be read"),
        (
            "a.safetensors",
            struct.pack("<Q", 70)
            + b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'.ljust(70),
            "x has the offsets 0 to 16",
        ),
        ("a.npz", b"PK", "cannot be read as .npz"),
        ("a.txt", b"", "unknown kind of file"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    tmp_path: pathlib.Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        tensor_files.read_tensors(tmp_path / name)
    assert words in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_an_empty_directory_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        tensor_files.read_tensors(tmp_path / "x.npz")
    with pytest.raises(UserError, match="neither checkpoints/ of a run nor model.safetensors"):
        tensor_files.read_tensors(tmp_path)


def test_files_are_written_atomically(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="does not support"):
        tensor_files.write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(3, np.complex64)})
    with pytest.raises(ZeroDivisionError), tensor_files.atomic_replace(tmp_path / "b") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    assert not zipfile.is_zipfile(tmp_path / "b")


class Tensor:
    """A tensor of PyTorch as far as it is read."""

    dtype = "float32"

    def __init__(self, array: np.ndarray, trained: bool = False) -> None:
        self.array, self.shape, self.trained = array, array.shape, trained

    def detach(self) -> "Tensor":
        return Tensor(self.array)

    def numpy(self) -> np.ndarray:
        if self.trained:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        return self.array


def test_parameters_of_pytorch_are_read(tmp_path: pathlib.Path, monkeypatch) -> None:
    """torch.save(dict(model.named_parameters()), FILE)."""
    table = {"a": Tensor(np.arange(3.0), trained=True), "b": Tensor(np.zeros((2, 1)))}
    library = types.SimpleNamespace(load=lambda *_, **__: table, bfloat16="bfloat16")
    monkeypatch.setattr(tensor_files, "import_torch", lambda why: library)
    (tmp_path / "x.pth").write_bytes(b"read by the library")
    found = tensor_files.read_tensors(tmp_path / "x.pth")
    assert found["a"].tolist() == [0, 1, 2] and found["b"].shape == (2, 1)
