"""--mode=curate: what is left out and why; its list is one that data.keep reads."""

import dataclasses
import functools
import io
import json
import pathlib
import sys
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import curation, engines, near_duplicates, perceptual_hash, splits
from m3i_jax.data.sources import base
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import UnreadableError, UserError
from m3i_jax.modes import curate as mode

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def photo(seed: int, height: int = 96, width: int = 128) -> Image.Image:
    """Smooth random colours, unlike those of any other seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def save(folder: pathlib.Path, name: str, image: Image.Image, **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("curate")
    train = root / "train"
    for i in range(12):
        save(train, f"{i:02d}.png", photo(i))
    save(train, "crop of 01.jpg", photo(1).crop((10, 5, 118, 90)), quality=80)
    save(train, "large 02.jpg", photo(2).resize((256, 192)), quality=60)
    (train / "equal to 03.png").write_bytes((train / "03.png").read_bytes())
    save(train, "of the test <set>.jpg", photo(100).crop((0, 0, 110, 90)))
    save(train, "long.png", photo(50, 20, 200))
    save(train, "tiny.png", photo(51, 17, 17))
    (train / "broken.jpg").write_bytes(b"<html>")
    (train / "00.txt").write_text("two words")
    for i in (100, 101):
        save(root / "test", f"{i}.png", photo(i))
    return root


def config(data: pathlib.Path, **rules: Any) -> schema.Config:
    source = schema.Data(source="folder", path=str(data / "train"), split=".", workers=1)
    return schema.Config(data=source, curate=schema.Curate(**rules))


def left_out(directory: pathlib.Path) -> dict[str, tuple[str, str]]:
    rows = parquet.read_table(directory / "left_out.parquet").to_pylist()
    return {row["key"]: (row["reason"], row["copy_of"]) for row in rows}


def test_a_source_is_curated(data: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    rules = {"min_side": 18, "max_aspect": 3.0, "against": (f"folder:{data / 'test'}",)}
    assert mode.run(config(data, **rules), workdir=str(tmp_path)) == 0
    assert left_out(tmp_path) == {
        "crop of 01.jpg": ("copy or crop", "01.png"),
        "02.png": ("copy or crop", "large 02.jpg"),
        "equal to 03.png": ("equal file", "03.png"),
        "of the test <set>.jpg": ("in an evaluation set", "100.png"),
        "long.png": ("aspect ratio", ""),
        "tiny.png": ("below min_side", ""),
        "broken.jpg": ("undecodable", ""),
    }
    assert "12 of 19 are kept: train on them with" in capsys.readouterr().out
    report = json.loads((tmp_path / "curate.json").read_text())
    assert report["kept"] == 12 and report["left_out"]["copy or crop"] == 2
    page = (tmp_path / "curate.html").read_text()
    assert "of the test &lt;set&gt;.jpg" in page and "<set>" not in page
    assert page.count("<figure>") == 3 + 2 * 4 and "http:" not in page
    keep = (str(tmp_path / "keep.parquet"),)
    kept = splits.open_source(schema.Data(source="folder", path=str(data / "train"), keep=keep))
    assert len(kept) == 12 and base.source_key(kept, 11) == "large 02.jpg"


def test_the_original_of_a_copy_may_be_left_out_itself() -> None:
    """Record 1 is a copy of 0, which is in an evaluation set, and 2 one of 3, which is kept."""
    copy, tested = (curation.REASONS.index(r) for r in ("copy or crop", "in an evaluation set"))
    done = curation.Decisions(
        np.array([tested, copy, copy, -1], np.int8),
        np.array([7, 0, 3, -1]),
        np.array([0, -1, -1, -1], np.int16),
        np.zeros(4, np.float32),
    )
    source = types.SimpleNamespace(name="x (test)")
    assert [mode._stays(done, row, source) for row in (0, 1, 2)] == [
        "of x (test)",
        "itself left out: in an evaluation set",
        "kept",
    ]


def test_descriptions_are_read_again(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    assert mode.run(config(data, duplicates="none"), workdir=str(tmp_path)) == 0
    assert set(left_out(tmp_path)) == {"broken.jpg"}
    monkeypatch.setattr(curation.RecordDescriber, "_describe", None)
    rules: dict[str, Any] = {"duplicates": "exact", "min_words": 2}
    assert mode.run(config(data, **rules), workdir=str(tmp_path)) == 0
    found = left_out(tmp_path)
    assert "00.png" not in found and found["01.png"] == ("caption length", "")


def test_features_find_what_looks_alike(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    keys = [f"{i:02d}.png" for i in range(12)]
    table = np.eye(12, 5, dtype=np.float32)
    table[7] = table[4] * 3 + 0.1
    path = str(tmp_path / "x.npz")
    np.savez(path, keys=np.array(keys), features=table, about=np.array("{}"))
    rules = {"duplicates": "exact", "features": path}
    assert mode.run(config(data, **rules), workdir=str(tmp_path)) == 0
    assert left_out(tmp_path)["07.png"] == ("like features", "04.png")
    assert set(left_out(tmp_path)) == {"07.png", "broken.jpg", "equal to 03.png"}
    with pytest.raises(UserError, match="curate.features='/no': there is no such file"):
        mode.run(config(data, features="/no"), workdir=str(tmp_path))


@pytest.mark.parametrize("duplicates", ["none", "exact", "near"])
def test_copies_and_crops_of_evaluation_images_are_searched_in_any_case(
    data: pathlib.Path, tmp_path: pathlib.Path, duplicates: str
) -> None:
    rules: dict[str, Any] = {"duplicates": duplicates, "against": (f"folder:{data / 'test'}",)}
    assert mode.run(config(data, **rules), workdir=str(tmp_path)) == 0
    found = left_out(tmp_path)
    assert found.pop("of the test <set>.jpg") == ("in an evaluation set", "100.png")
    assert "crop of 01.jpg" not in found


def test_what_is_missing_is_named_before_the_images_are_read(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(curation.RecordDescriber, "__call__", None)
    monkeypatch.setattr(curation, "EXACT_FEATURES", 3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    keys, table = np.array([f"{i:02d}.png" for i in range(4)]), np.eye(4, dtype=np.float32)
    files: dict[str, dict[str, np.ndarray]] = {
        "keys.npz": {"features": table},
        "features.npz": {"keys": keys},
        "shape.npz": {"keys": keys, "features": table[:3]},
        "good.npz": {"keys": keys, "features": table},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / name, **arrays)
    for rules, words in (
        ({"features": "/no"}, "curate.features='/no': there is no such file"),
        ({"features": str(tmp_path / "keys.npz")}, "^curate.features=.*has no array 'keys'"),
        ({"features": str(tmp_path / "features.npz")}, "has no array 'features'"),
        ({"features": str(tmp_path / "shape.npz")}, r"keys have shape \(4,\), and .*\(3, 4\)"),
        (
            {"features": str(tmp_path / "good.npz")},
            "compared by the package faiss, which is not installed",
        ),
        ({"against": ("nowhere",)}, "^curate.against: 'nowhere' is not KIND:PATH"),
        ({"against": ("folder:/no such",)}, "/no such"),
    ):
        with pytest.raises(UserError, match=words):
            mode.run(config(data, **rules), workdir=str(tmp_path / "run"))


def test_scores_filter_and_are_columns(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    table = {"key": [f"{i:02d}.png" for i in range(12)], "similarity": [0.1 * i for i in range(12)]}
    table["pixels"] = list(range(12))
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "scores.parquet")
    rules: dict[str, Any] = {"duplicates": "none", "scores": str(tmp_path / "scores.parquet")}
    rules |= {"least": ("similarity=0.25",), "min_entropy": 2.0, "min_sharpness": 0.2}
    save(tmp_path / "train", "gray.png", Image.new("RGB", (99, 99), (9, 9, 9)))
    for path in (data / "train").glob("0*.png"):
        (tmp_path / "train" / path.name).write_bytes(path.read_bytes())
    assert mode.run(config(tmp_path, **rules), workdir=str(tmp_path / "run")) == 0
    assert left_out(tmp_path / "run") == {
        "gray.png": ("below min_sharpness", ""),
        **{f"{i:02d}.png": ("below a score of least", "") for i in range(3)},
    }
    kept = parquet.read_table(tmp_path / "run" / "keep.parquet").to_pylist()
    assert kept[0]["similarity"] == pytest.approx(0.3) and kept[0]["entropy"] > 5
    assert set(kept[0]) == {"key", "sharpness", "entropy", "similarity"}
    report = json.loads((tmp_path / "run" / "curate.json").read_text())
    assert report["scores"]["similarity"]["kept"][0] == pytest.approx(0.3)
    page = (tmp_path / "run" / "curate.html").read_text()
    assert "<h2>Scores</h2>" in page and page.count("similarity") >= 2
    for wrong, message in (
        ({"least": ("similarity",)}, "is not COLUMN=NUMBER"),
        ({"least": ("aesthetic=5",)}, "has no column 'aesthetic' of numbers"),
        ({"scores": ""}, "curate.scores no file with that column"),
        ({"scores": "/no"}, "curate.scores='/no': there is no such file"),
    ):
        with pytest.raises(UserError, match=message):
            mode.run(config(tmp_path, **{**rules, **wrong}), workdir=str(tmp_path / "run"))


def test_look_alikes_are_told_apart_in_detail(tmp_path: pathlib.Path) -> None:
    card = photo(7, 140, 100)
    other = card.copy()
    other.paste((255, 255, 255), (40, 60, 56, 78))
    save(tmp_path / "train", "card.png", card)
    save(tmp_path / "train", "other.png", other)
    save(tmp_path / "train", "small.jpg", card.crop((3, 3, 97, 137)).resize((60, 84)), quality=50)
    assert mode.run(config(tmp_path), workdir=str(tmp_path / "run")) == 0
    assert left_out(tmp_path / "run") == {"small.jpg": ("copy or crop", "card.png")}
    assert mode.run(config(tmp_path, detail=0.0), workdir=str(tmp_path / "run")) == 0
    assert set(left_out(tmp_path / "run")) == {"other.png", "small.jpg"}


def test_columns_of_scores_replace_nothing_that_was_measured(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    def run(name: str, **rules: Any) -> dict[str, tuple[str, str]]:
        path = str(tmp_path / "scores.parquet")
        values = [1.0, float("nan")] * 6
        table = {"key": [f"{i:02d}.png" for i in range(12)], name: values, "path": values}
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        workdir = tmp_path / "run"
        rules = {"duplicates": "none", "scores": path, **rules}
        assert mode.run(config(data, **rules), workdir=str(workdir)) == 0
        return left_out(workdir)

    for name in ("width", "height"):
        found = run(name, min_side=18, max_aspect=3.0)
        assert set(found) == {"tiny.png", "long.png", "broken.jpg"}
    (kept,) = (row for row in kept_rows(tmp_path / "run") if row["key"] == "00.png")
    assert kept["height"] == kept["path"] == 1.0
    # by curate.least the column is what is asked for
    assert run("width", least=("width=1",))["01.png"][0] == "below a score of least"
    monkeypatch.setattr(curation.RecordDescriber, "__call__", None)  # before the images are read
    for name in ("difference", "reason", "copy_of", "sharpness", "entropy"):
        with pytest.raises(UserError, match=f"its column '{name}' has the name of one that"):
            run(name)


def kept_rows(directory: pathlib.Path) -> list[dict[str, Any]]:
    return parquet.read_table(directory / "keep.parquet").to_pylist()


def test_records_of_an_outage_are_read_again(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    """And their keys are not needed, as those in an array_record whose shard is missing."""
    plain = config(data, duplicates="none")
    replacing = dataclasses.replace(plain, data=dataclasses.replace(plain.data, missing="replace"))
    read, key = FolderSource.__getitem__, FolderSource.key

    def away(self: FolderSource, index: int) -> Any:
        if index == 3:
            raise UnreadableError("the disk is away")
        return read(self, index)

    def unknown(self: FolderSource, index: int) -> str:
        if index == 3:
            raise UnreadableError("the disk is away")
        return key(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "__getitem__", away)
        patch.setattr(FolderSource, "key", unknown)
        patch.setattr(base, "source_key_hashes", lambda source: np.zeros(0))
        assert mode.run(replacing, workdir=str(tmp_path)) == 0
    assert left_out(tmp_path) == {"3": ("unreadable", ""), "broken.jpg": ("undecodable", "")}
    assert mode.run(replacing, workdir=str(tmp_path)) == 0
    assert set(left_out(tmp_path)) == {"broken.jpg"}


def test_copies_are_compared_over_the_background_of_the_run(tmp_path: pathlib.Path) -> None:
    """A transparent image and its copy over black: over white they have nothing in common."""
    image = photo(3).convert("RGBA")
    image.paste((0, 0, 0, 0), (20, 20, 110, 80))
    flat = Image.new("RGB", image.size, (0, 0, 0))
    flat.paste(image, mask=image)
    save(tmp_path / "train", "alpha.png", image)
    save(tmp_path / "train", "flat.png", flat)
    plain = config(tmp_path)
    for background, copies in ((0, {"flat.png": ("copy or crop", "alpha.png")}), (255, {})):
        over = dataclasses.replace(plain.data, background=background)
        chosen = dataclasses.replace(plain, data=over)
        assert mode.run(chosen, workdir=str(tmp_path / str(background))) == 0
        assert left_out(tmp_path / str(background)) == copies


def alike() -> np.ndarray:
    """1,500 features, of which the last 500 are near the first 500."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 16))
    x[1000:] = x[:500] + rng.normal(size=(500, 16)) * 0.1
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_approximate_neighbours_are_pairs_of_the_exact_ones() -> None:
    pytest.importorskip("faiss")
    x = alike()
    exact = near_duplicates.similar_features(x, range(1500), 0.96)
    found = near_duplicates.approximate_features(x, 0.96)
    pairs = [{tuple(pair) for pair in p[:, :2].astype(int).tolist()} for p in (exact, found)]
    assert len(pairs[0]) > 300 and pairs[1] <= pairs[0] and len(pairs[1]) > 0.95 * len(pairs[0])


class ExactIndex:
    """The search of faiss by all pairs, under its interface."""

    def __init__(self, *_: Any) -> None: ...

    def train(self, x: np.ndarray) -> None: ...

    def add(self, x: np.ndarray) -> None:
        self.x = x

    def range_search(self, asked: np.ndarray, least: float) -> tuple[np.ndarray, ...]:
        cosines = asked @ self.x.T
        row, other = np.nonzero(cosines > least)
        limits = np.searchsorted(row, np.arange(len(asked) + 1)).astype(np.uint64)
        return limits, cosines[row, other], other


def test_pairs_of_faiss_are_those_of_rows_and_earlier_ones(monkeypatch: Any) -> None:
    fake = types.SimpleNamespace(
        IndexFlatIP=ExactIndex, IndexIVFFlat=ExactIndex, METRIC_INNER_PRODUCT=0
    )
    monkeypatch.setitem(sys.modules, "faiss", fake)
    monkeypatch.setattr(near_duplicates, "_QUERIES", 400)
    x = alike()
    exact = near_duplicates.similar_features(x, range(1500), 0.96)
    found = near_duplicates.approximate_features(x, 0.96)
    exact, found = (pairs[np.lexsort(pairs.T[:2])] for pairs in (exact, found))
    assert len(exact) > 300
    np.testing.assert_allclose(found, exact, atol=1e-6)


def test_hashes_survive_compression_and_tell_images_apart() -> None:
    def compressed(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.resize((100, 90)).save(buffer, "JPEG", quality=40)
        return Image.open(buffer)

    one = [perceptual_hash.make_thumbnail(photo(i)) for i in range(40)]
    two = [perceptual_hash.make_thumbnail(compressed(photo(i))) for i in range(40)]
    a, b = (np.concatenate([perceptual_hash.region_hashes(t, 1) for t in x]) for x in (one, two))
    bits = np.bitwise_count(a[:, None] ^ b[None])
    assert np.diag(bits).max() <= 4 and (bits + 64 * np.eye(40, dtype=int)).min() >= 12
    # the search by bands finds all that differ in at most 7 bits, compared with all pairs
    finder = near_duplicates.NearFinder(b, np.stack(two), np.stack(one), False, 7, 0.1, crops=False)
    pairs = finder(range(40))
    assert pairs[:, 0].tolist() == pairs[:, 1].tolist() == list(range(40))


def test_bands_find_every_hash_within_eleven_bits() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 500).astype(np.uint64)
    flips = np.stack([rng.permutation(64)[:11] for _ in range(500)]).astype(np.uint64)
    asked = hashes ^ (np.uint64(1) << flips).sum(1, dtype=np.uint64)
    finder = near_duplicates.NearFinder(hashes, np.zeros(0), np.zeros(0), False, 11, 0.1)
    region, image, bits = finder._candidates(asked)
    assert bits.max() == 11 and set(zip(region, image, strict=True)) >= {(i, i) for i in range(500)}


def test_processes_share_large_arrays(tmp_path: pathlib.Path) -> None:
    """They map the file to which a process writes them once."""
    some = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3)).astype(np.uint8)
    thumbnails = np.concatenate([some, some])
    hashes = np.concatenate([perceptual_hash.region_hashes(each, 1) for each in thumbnails])
    finder = near_duplicates.NearFinder(hashes, thumbnails, thumbnails, True, 12, 0.5)
    sent = engines._write_arrays(finder, str(tmp_path))
    assert finder.queries is thumbnails and sent.function.thumbnails is None
    assert len(list(tmp_path.iterdir())) == 2  # one of thumbnails and queries, one of tables
    mapped = engines._map_arrays(sent)
    for array in (mapped.queries, mapped.thumbnails):
        assert not (array.flags.writeable or array.flags.owndata)
        np.testing.assert_array_equal(array, thumbnails)
    assert mapped(range(9))[:, :2].tolist() == finder(range(9))[:, :2].tolist()
    assert {(i, i + 200) for i in range(9)} <= set(map(tuple, mapped(range(9))[:, :2].tolist()))


def test_engines(monkeypatch: Any) -> None:
    # more items than the two processes have in flight
    assert list(engines.map_items("local", abs, range(-20, 0), workers=2)) == [*range(20, 0, -1)]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine=ray needs the package ray: pip install"):
        list(engines.map_items("ray", abs, [1], workers=1))
    ray = types.SimpleNamespace(
        is_initialized=lambda: True,
        put=lambda x: x,
        get=lambda made: made(),
        remote=lambda f: types.SimpleNamespace(remote=lambda *given: functools.partial(f, *given)),
        cluster_resources=lambda: {"CPU": 1.0},
    )
    monkeypatch.setitem(sys.modules, "ray", ray)  # nine items, of which four are in flight
    assert list(engines.map_items("ray", abs, range(-9, 0), workers=1)) == [*range(9, 0, -1)]
    with pytest.raises(UserError, match="--engine=spark: is not one of local, ray"):
        mode.run(schema.Config(), workdir="/tmp", engine="spark")


@pytest.mark.slow
def test_ray_decides_the_same(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for engine in engines.ENGINES:
            assert mode.run(config(data), workdir=str(tmp_path / engine), engine=engine) == 0
    finally:
        ray.shutdown()
    assert left_out(tmp_path / "local") == left_out(tmp_path / "ray")
