"""Names of WordNet ids and numbers, from the usual files."""

import dataclasses
import json

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import splits
from m3i_jax.data.sources import base, class_names, keep_list, registry
from m3i_jax.errors import UserError

IDS = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n01443537": "goldfish, Carassius auratus",
}


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("LOC_synset_mapping.txt", "{} {}\n"),
        ("words.txt", "{}\t{}\n"),
        ("synset_words.txt", "{} {}\r\n"),
    ],
)
def test_an_imagenet_folder(fill, file, line):
    text = "".join(line.format(*pair) for pair in IDS.items()) + "nonsense\n\n"
    root = fill(
        {f"ILSVRC/Data/CLS-LOC/train/{name}/{name}_1.JPEG": b"x" for name in IDS}
        | {file: text.encode()}
    )
    source = splits.open_source(
        schema.Data(source="folder", path=str(root / "ILSVRC/Data/CLS-LOC/train"))
    )
    # The order is that of the ids, as everywhere.
    assert source.classes == ("tench", "goldfish", "crane (n02012849)", "crane (n03126707)")
    assert source[0].key.startswith("n01440764/") and source[0].label == 0


def test_held_out_classes_are_matched_by_their_ids(fill):
    """With fewer classes, the held-out part has other readable names: it has one crane, and one
    maillot, whose name there is that of the other maillot."""
    names = IDS | {"n03710637": "maillot", "n03710721": "maillot, tank suit"}
    few = ("n03126707", "n03710721", "n01443537")
    root = fill(
        {f"train/{name}/1.JPEG": b"x" for name in names}
        | {f"val/{name}/1.JPEG": b"x" for name in few}
        | {"words.txt": "".join(f"{a} {b}\n" for a, b in names.items()).encode()}
    )
    train, held = splits.open_splits(schema.Data(source="folder", path=str(root)))
    assert held.classes == train.classes
    of_train = {train[i].key.split("/")[0]: train[i].label for i in range(len(train))}
    of_held = {held[i].key.split("/")[0]: held[i].label for i in range(len(held))}
    assert of_held == {name: of_train[name] for name in few}


def test_a_mixture_joins_classes_by_their_ids(fill):
    """The bird and the machine are both "crane" in a source that has one of them alone; the bird
    has another name beside the machine; a source with ids and no names has the bird as well."""
    lines = "".join(f"{a} {b}\n" for a, b in IDS.items()).encode()
    bird, machine, fish, tench = "n02012849", "n03126707", "n01443537", "n01440764"
    parts = {"a": (bird, fish), "b": (machine, tench), "c": tuple(IDS)}
    root = fill(
        {
            f"{part}/{split}/{name}/1.JPEG": b"x"
            for part, names in parts.items()
            for split, held in (("train", names), ("val", names[1:]))
            for name in (*held, "n00000001")
        }
        | {f"{part}/words.txt": lines for part in ("a", "b")}
    )
    entries = tuple(f"folder:{root / part}@train|val" for part in parts)
    train, held = splits.open_splits(schema.Data(source="mixture", mixture=entries))
    assert train.classes == held.classes
    assert set(train.classes) == {
        *("n00000001", f"crane ({bird})", f"crane ({machine})", "goldfish", "tench"),
    }
    for part in (train, held):
        for i in range(len(part)):
            name = train.classes[part[i].label]
            identity = part[i].key.split("/")[0]
            known = {tench: "tench", fish: "goldfish", "n00000001": "n00000001"}
            assert name == known.get(identity, f"crane ({identity})")


def test_classes_without_ids_are_joined_by_name():
    """A class without an id is that with an id, if one alone has its name, in any order."""
    ids = ("n02012849", "n01443537")
    spaces = [("goldfish", "ant"), ("crane", "goldfish"), ("crane",)]
    names, tables = class_names.join_classes(spaces, [(), ids, ("n03126707",)], True)
    assert names == ("goldfish", "ant", "crane (n02012849)", "crane (n03126707)")
    assert [table.tolist() for table in tables] == [[0, 1], [2, 0], [3]]
    # those of numbers, which a file names, are no WordNet ids
    names, tables = class_names.join_classes([("ant",), ("ant",)], [("0",), ("1",)], True)
    assert names == ("ant",) and [table.tolist() for table in tables] == [[0], [0]]


def test_without_a_file_the_ids_stay(fill):
    root = fill({"n01440764/1.jpg": b"x", "n02012849/1.jpg": b"x"})
    assert splits.open_source(schema.Data(source="folder", path=str(root))).classes == (
        "n01440764",
        "n02012849",
    )
    mixed = fill(
        {"n01440764/1.jpg": b"x", "cat/1.jpg": b"x", "words.txt": b"n01440764 tench"}, "mixed"
    )
    assert splits.open_source(schema.Data(source="folder", path=str(mixed))).classes == (
        "cat",
        "n01440764",
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "ant\nbee\ncat\n"),
        ("names.txt", "\ufeffant\nbee\ncat\n"),
        ("LOC_synset_mapping.txt", "n00000001 ant, pismire\nn00000002 bee\nn00000009\tcat\n"),
        ("names.json", json.dumps(["ant", "bee", "cat"])),
        ("names.json", json.dumps({"0": "ant", "1": "bee", "2": "cat"})),
        ("keras.json", json.dumps({"0": ["n1", "ant"], "1": ["n2", "bee"], "2": ["n3", "cat"]})),
    ],
)
def test_names_of_numbers(tmp_path, make, name, content):
    (tmp_path / "0.tar").write_bytes(
        make.tar_bytes([("1.jpg", b"x"), ("1.cls", b"1"), ("2.jpg", b"x"), ("2.cls", b"2")])
    )
    (tmp_path / name).write_text(content, encoding="utf-8")
    source = splits.open_source(
        schema.Data(source="tars", path=str(tmp_path), class_names=str(tmp_path / name))
    )
    assert source.classes == ("ant", "bee", "cat") and source[0].label == 1


@pytest.mark.parametrize(
    ("name", "content", "cut"),
    [
        ("names.json", json.dumps({"n02769748": "bag, black plastic"}), False),
        ("names.json", json.dumps(["tench", "bag, black plastic"]), False),
        ("names.txt", "tench\nbag, black plastic\n", False),
        ("words.txt", "n01440764\ttench\nn02769748\tbag, black plastic\n", True),
    ],
)
def test_names_are_cut_in_lists_of_synonyms_alone(tmp_path, name, content, cut):
    (tmp_path / name).write_text(content)
    by_id = "n02769748" in content
    named = [("n02769748",)] if by_id else []
    named += [("1",)] if "tench" in content else []
    for classes in named:
        found = class_names.class_names_from_file(str(tmp_path / name), classes)
        assert found == ("bag" if cut else "bag, black plastic",)


@pytest.fixture
def mixed_tars(tmp_path, make) -> tuple[str, str]:
    """Captioned tars, labelled tars, and a file of names."""
    members = {
        "captioned": [("1.jpg", b"x"), ("1.txt", b"a cat")],
        "labelled": [("2.jpg", b"x"), ("2.cls", b"1"), ("3.jpg", b"x"), ("3.cls", b"2")],
    }
    for name, content in members.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(make.tar_bytes(content))
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    return tuple(f"tars:{tmp_path / name}" for name in members)


@pytest.mark.parametrize("order", [1, -1])
def test_names_of_a_mixture_with_a_source_without_labels(mixed_tars, tmp_path, order):
    names = str(tmp_path / "names.txt")
    data = schema.Data(source="mixture", mixture=mixed_tars[::order], class_names=names)
    train, held_out = splits.open_splits(dataclasses.replace(data, holdout=0.0))
    for source in (splits.open_source(data), train):
        assert source.classes == ("ant", "bee", "cat") and source.captions
        labels = {record.key: record.label for record in map(source.__getitem__, range(3))}
        assert labels == {"1": -1, "2": 1, "3": 2}
    assert held_out.classes == train.classes
    # a name of none of the sources is refused, as that of a single one
    (tmp_path / "names.txt").write_text("n01440764 tench\n")
    (tmp_path / "names.json").write_text('{"tench": "Tinca tinca"}')
    other = dataclasses.replace(data, class_names=str(tmp_path / "names.json"))
    for open_data in (splits.open_source, splits.open_splits):
        with pytest.raises(
            UserError, match="names 1 classes, but none of the source's \\('0', '1'"
        ):
            open_data(other)


def test_equal_numbers_of_two_label_sets_are_announced(tmp_path, make, caplog):
    for name, label in (("imagenet", b"2"), ("food", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(
            make.tar_bytes([("1.jpg", b"x"), ("1.cls", label), ("2.jpg", b"x"), ("2.cls", b"0")])
        )
    entries = tuple(f"tars:{tmp_path / name}" for name in ("imagenet", "food"))
    data = schema.Data(source="mixture", mixture=entries)
    for open_data in (splits.open_source, lambda data: splits.open_splits(data)[0]):
        caplog.clear()
        assert "3 classes (2 of them shared by number)" in open_data(data).description()
        (line,) = caplog.messages
        assert f"(3 of tars {str(tmp_path / 'imagenet')!r}" in line
        assert "set data.class_space=separate" in line and "data.class_names=FILE" in line
        # each of the two answers ends the warning
        caplog.clear()
        (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
        named = dataclasses.replace(data, class_names=str(tmp_path / "names.txt"))
        assert "3 classes (2 of them shared by name)" in open_data(named).description()
        apart = open_data(dataclasses.replace(data, class_space="separate"))
        assert len(apart.classes) == 5 and not caplog.messages


def test_names_of_the_labels_of_a_keep_list(mixed_tars, tmp_path):
    pytest.importorskip("pyarrow")
    path = str(tmp_path / "keep.parquet")
    keep_list.write_keep_list(path, ["1"], label=[2])
    data = schema.Data(
        source="tars",
        path=mixed_tars[0].removeprefix("tars:"),
        keep=(path,),
        class_names=str(tmp_path / "names.txt"),
        holdout=0.0,
    )
    for source in (splits.open_source(data), splits.open_splits(data)[0]):
        assert source.classes == ("ant", "bee", "cat") and source[0].label == 2
    with pytest.raises(UserError, match=r"none of the source's \(none\)"):
        splits.open_source(dataclasses.replace(data, keep=()))


def test_a_kept_source_of_maps_keeps_its_names(tmp_path):
    """It has read the file itself, by which its classes would be named twice."""

    class Named:
        name, captions, classes, names_its_classes = "named", False, ("0", "1"), True

        def __len__(self) -> int:
            return 3

    part = base.SubsetSource(Named(), np.arange(2), "part", "part")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    settings = schema.Data(source="maps", path="/m", class_names=str(tmp_path / "names.txt"))
    registry.name_classes(settings, [("maps", part)])
    assert part.classes == ("0", "1")


def test_refusals(tmp_path):
    (tmp_path / "words.txt").write_text("n00000001 x\n")
    (tmp_path / "x.json").write_text("{")
    cases = {
        "wrods.txt": "did you mean .*words.txt",
        "x.json": "is not a JSON list or object",
        "words.txt": "none of the source's",
    }
    for file, why in cases.items():
        with pytest.raises(UserError, match=why):
            class_names.class_names_from_file(str(tmp_path / file), ("n01440764",))
