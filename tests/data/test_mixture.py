"""Mixtures have exact shares and a closed-form order, join classes by name, and replace a bad
record from the same source."""

import collections
import dataclasses
import fractions

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import annotated_batches, pipeline, rendered_maps, sampler
from m3i_jax.data.sources import base, mixture
from m3i_jax.data.sources.scenes import ScenesSource
from m3i_jax.errors import UserError
from m3i_jax.evaluation.detection_results import image_truth

F = fractions.Fraction


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("tars:/a/*.tar=427", ("tars", "/a/*.tar", "", "", F(427))),
        (" folder:/b ", ("folder", "/b", "", "", None)),
        ("folder:/b@train|val=0.25", ("folder", "/b", "train", "val", F(1, 4))),
        ("folder:/date=7/x", ("folder", "/date=7/x", "", "", None)),
        ("folder:/date=7/x=size", ("folder", "/date=7/x", "", "", None)),
        ("tars:gs://a@b/c-*.tar=1/3", ("tars", "gs://a@b/c-*.tar=1/3", "", "", None)),
        (
            "tfds:imagenet2012:5.1.0@train+validation=3e-1",
            ("tfds", "imagenet2012:5.1.0", "train+validation", "", F(3, 10)),
        ),
        ("tfds:imagenet2012@|validation", ("tfds", "imagenet2012", "", "validation", None)),
    ],
)
def test_entries(text, entry):
    assert mixture.parse_entry(text) == mixture.MixtureEntry(*entry)


def test_splits_with_a_slash(tmp_path):
    """@ is part of a path unless what is before it, or the split, shows that it is none."""
    folder = tmp_path / "me@home"
    (folder / "coco").mkdir(parents=True)

    def parts(text: str) -> tuple[str, str, str]:
        entry = mixture.parse_entry(text)
        return entry.path, entry.split, entry.held_out

    train, held = "annotations/lvis_v1_train.json", "annotations/lvis_v1_val.json"
    assert parts(f"coco:/data/coco@{train}|{held}") == ("/data/coco", train, held)
    assert parts(f"coco:/data/coco@{train}") == ("/data/coco", train, "")
    assert parts("tars:/d@train/*.tar|val/*.tar=3") == ("/d", "train/*.tar", "val/*.tar")
    assert parts("tars:gs://b/d@train/*.tar|val/*.tar") == ("gs://b/d", "train/*.tar", "val/*.tar")
    assert parts("tars:gs://me@b/d/*.tar") == ("gs://me@b/d/*.tar", "", "")
    assert parts(f"tars:{folder}@train/*.tar") == (str(folder), "train/*.tar", "")
    assert parts(f"coco:{folder}/coco@{train}") == (f"{folder}/coco", train, "")
    assert parts(f"coco:{folder}/coco") == (f"{folder}/coco", "", "")  # it exists
    assert parts(f"folder:{folder}/new/x") == (f"{folder}/new/x", "", "")
    assert parts(f"folder:{folder}@/other/train") == (str(folder), "/other/train", "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("/a/*.tar", "the kind must be one of shapes, folder"),
        ("tar:/a", "the kind must be one of"),
        ("folder:=3", "the path is missing"),
        ("folder:", "the path is missing"),
        ("folder:/a=many", "the weight 'many' must be a positive number, or 'size'"),
        ("folder:/a=0", "the weight '0' must be positive"),
        ("folder:/a=-1", "must be positive"),
        ("folder:/a=", "the weight '' must be"),
    ],
)
def test_entries_that_are_refused(text, why):
    with pytest.raises(UserError, match=f"^data.mixture: .*{why}"):
        mixture.parse_entry(text)


def test_weights_become_whole_numbers():
    assert mixture.integer_shares([F("0.9661"), F("0.0339")], [1, 1]) == (9661, 339)
    assert mixture.integer_shares([F(427), F(15)], [1, 1]) == (427, 15)
    assert mixture.integer_shares([None, None, None], [600, 400, 0]) == (3, 2, 0)
    with pytest.raises(UserError, match="some sources have a weight and some have none"):
        mixture.integer_shares([F(1), None], [1, 1])
    with pytest.raises(UserError, match="too many digits"):
        mixture.integer_shares([F("0.1234567890123"), F("0.3333333333337")], [1, 1])


def test_one_source_has_the_order_it_has_alone():
    positions = np.arange(3000)
    for attempt in (0, 3):
        source, record = sampler.sample_mixture_index(5, positions, [700], [1], attempt)
        assert (source == 0).all() and (
            record == sampler.sample_index(5, positions, 700, attempt)
        ).all()


def test_shares_are_exact_and_every_record_is_read():
    sizes, shares = [30, 7, 100], [4, 1, 2]
    source, record = sampler.sample_mixture_index(1, np.arange(7 * 300), sizes, shares)
    assert (np.sort(source.reshape(-1, 7), 1) == [0, 0, 0, 0, 1, 2, 2]).all()
    assert len({tuple(cycle) for cycle in source.reshape(-1, 7).tolist()}) > 50
    for s, (size, turns) in enumerate(zip(sizes, (1200, 300, 600), strict=True)):
        counts = np.bincount(record[source == s], minlength=size)
        assert counts.sum() == turns and set(counts.tolist()) <= {turns // size, -(-turns // size)}


def test_by_size_a_pass_reads_each_record_once():
    sizes = [300, 100, 50]
    both = mixture.Mixture([Plain(n, "a") for n in sizes], [None] * 3)
    first = both.locate(0, np.arange(450))
    assert sorted(first.tolist()) == list(range(450)) and both.epochs(450) == [1.0, 1.0, 1.0]
    assert not (first == both.locate(0, np.arange(450, 900))).all()


def test_any_part_of_the_order_is_the_order():
    arguments = ([300, 70], [9, 2])
    full = sampler.sample_mixture_index(3, np.arange(5000), *arguments)
    for start in (0, 1, 10, 11, 4000):
        rest = sampler.sample_mixture_index(3, np.arange(start, 5000), *arguments)
        assert all((a == b[start:]).all() for a, b in zip(rest, full, strict=True))
    # the paper's mixture at a far position, without replay
    source, record = sampler.sample_mixture_index(
        0, 10**12 + np.arange(442 * 4), [427_000_000, 15_000_000], [427, 15]
    )
    assert (source == 1).sum() == 60 and record.max() < 427_000_000


class Plain:
    """A source whose keys name it, and which counts its reads."""

    captions = False

    def __init__(self, count: int, *classes: str, name: str = "plain") -> None:
        self.count, self.classes, self.name = count, classes, name
        self.reads = collections.Counter[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> base.Record:
        assert 0 <= index < self.count
        self.reads[index] += 1
        label = index % (len(self.classes) + 1) - 1
        return base.Record(
            f"{self.name}-{index}", np.full((20, 20, 3), index % 256, np.uint8), label
        )

    def key(self, index: int) -> str:
        return f"{self.name}-{index}"

    def fingerprint(self) -> str:
        return base.stable_digest(self.name, self.count)

    def description(self) -> str:
        return f"{self.count} of {self.name}"


def test_records_of_a_mixture():
    a, b = Plain(5, "cat", "dog", name="a"), Plain(3, "dog", "eel", name="b")
    both = mixture.Mixture([a, b], [F(1), F(3)])
    assert (
        isinstance(both, base.DataSource)
        and len(both) == 8
        and both.classes == ("cat", "dog", "eel")
    )
    records_read = base.read_items(both, [7, 0, 5, 1, 6, 7, 2])
    assert [(r.key, r.label) for r in records_read] == [
        ("b-2", 2),
        ("a-0", -1),
        ("b-0", -1),
        ("a-1", 0),
        ("b-1", 1),
        ("b-2", 2),
        ("a-2", 1),
    ]
    assert [both[i].key for i in range(8)] == [both.key(i) for i in range(8)]
    assert base.source_key_hashes(both).tolist() == [base.key_hash(both.key(i)) for i in range(8)]
    separate = mixture.Mixture([a, b], [None, None], shared=False)
    assert separate.classes == ("cat", "dog", "dog", "eel") and [
        separate[i].label for i in (1, 2, 6, 7)
    ] == [0, 1, 2, 3]
    for wrong in (8, -1):
        with pytest.raises(IndexError):
            both[wrong]
    assert (
        both.description()
        == "8 images in a mixture of 2 sources, 3 classes (1 of them shared by name): 25.00% of the"
        " samples (0.4 epochs in one pass) from 5 of a; 75.00% of the samples (2 epochs in one"
        " pass) from 3 of b"
    )
    assert (
        base.source_identity(both)[1]
        == f"3 of every 4 samples from b, 3 images, fingerprint {b.fingerprint()}"
    )


def test_the_fingerprint_covers_all_options():
    def fingerprint(weights: list, *names: str, **more: bool) -> str:
        return mixture.Mixture(
            [Plain(9, "x", name=name) for name in names], weights, **more
        ).fingerprint()

    fingerprints = [
        fingerprint([F(1), F(1)], "a", "b"),
        fingerprint([F(1), F(2)], "a", "b"),
        fingerprint([F(1), F(1)], "b", "a"),
        fingerprint([F(1), F(1)], "a", "c"),
        fingerprint([F(1), F(1)], "a", "b", shared=False),
    ]
    assert len(set(fingerprints)) == 5 and fingerprint(
        [F("0.5"), F("0.5")], "a", "b"
    ) == fingerprints[0] == fingerprint([None, None], "a", "b")


def test_a_part_of_a_mixture_keeps_the_shares():
    full = mixture.Mixture([Plain(400, name="a"), Plain(100, name="b")], [F(1), F(1)])
    train, held = (base.split_by_hash(full, 0.1, part) for part in ("train", "held_out"))
    assert len(train) + len(held) == 500 and 20 < len(held) < 80 and train.shares == (1, 1)
    assert {train.key(i) for i in range(len(train))} | {held.key(i) for i in range(len(held))} == {
        full.key(i) for i in range(500)
    }
    empty = mixture.Mixture([Plain(4), Plain(0, name="void")], [F(1), F(1)])
    with pytest.raises(UserError, match="void has no images to give its share of"):
        empty.locate(0, np.arange(4))


def test_a_stream_of_a_mixture(make):
    """Batches follow the order; a bad record is replaced from its own source; hosts, restarts and
    threads change nothing."""
    good, bad = Plain(90, "x", name="good"), make.ColorImages(40, bad=20)
    source = mixture.Mixture([good, bad], [F(3), F(1)])
    config = make.settings(batch=16)
    full = make.joined(make.stream(config, source, None, 8))
    from_bad = sampler.sample_mixture_index(0, np.arange(128), [90, 40], [3, 1])[0] == 1
    shown = full["views"][:, 0, 0, 0, 0]
    assert from_bad.sum() == 32 and (shown[from_bad] >= 20).all() and (shown[from_bad] < 40).all()
    shares = [make.stream(config, source, None, 2, host=host, hosts=8) for host in range(8)]
    again = make.joined([make.joined([share[k] for share in shares]) for k in range(2)])
    assert all((again[name] == full[name][:32]).all() for name in full)
    rest = make.joined(make.stream(make.settings(batch=4, threads=2), source, None, 4, start=52))
    assert all((rest[name] == full[name][52:68]).all() for name in full)


def test_nothing_is_replayed(make):
    """The first batch at position a billion reads the records of that batch."""
    a, b = Plain(1000, name="a"), Plain(300, name="b")
    (batch,) = make.stream(
        make.settings(batch=16), mixture.Mixture([a, b], [F(3), F(1)]), None, 1, start=10**9
    )
    assert len(batch["label"]) == 16 and a.reads.total() + b.reads.total() == 16


def test_identity_shows_the_difference():
    config = schema.Config()
    one, other = (
        pipeline.stream_identity(
            config, mixture.Mixture([Plain(9, name="a"), Plain(n, name="b")], [F(1)] * 2)
        )
        for n in (5, 6)
    )
    lines = [(x, y) for x, y in zip(one.splitlines(), other.splitlines(), strict=True) if x != y]
    assert len(lines) == 1 and lines[0][0].startswith(
        "source 2 = 1 of every 2 samples from b, 5 images, "
    )


def scenes(*weights, shared=True):
    """Scenes of two seeds, some of them without an object."""
    sources = [ScenesSource(60, side=48, seed=seed) for seed in range(2)]
    return mixture.Mixture(sources, weights, shared=shared)


@pytest.mark.parametrize("shared", [True, False])
def test_objects_of_a_mixture_have_its_classes(shared):
    mixed = scenes(None, None, shared=shared)
    table = mixed.object_table()
    for record in (0, 59, 60, 119):
        objects, rows = mixed[record].objects, table.records == record
        assert table.classes[rows].tolist() == objects.classes.tolist()
        assert table.crowd[rows].tolist() == objects.crowd.tolist()
    assert (np.diff(table.records) >= 0).all() and table.classes.max() < len(mixed.classes)
    assert table.classes.max() > 7 or shared


def test_images_of_a_mixture_have_no_id_that_two_files_could_have():
    """Evaluation takes the record's number then, and refuses an image that it meets twice."""

    class Numbered(ScenesSource):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            objects = dataclasses.replace(record.objects, image=1 + index)
            return dataclasses.replace(record, objects=objects)

    mixed = mixture.Mixture([Numbered(3, side=48, seed=seed) for seed in range(2)], [None, None])
    one = [mixed[record].objects for record in range(6)]
    many = [record.objects for record in mixed.__getitems__(range(6))]
    for objects in (one, many):
        truths = [image_truth(o, record=n, size=o.size) for n, o in enumerate(objects)]
        assert [truth.image for truth in truths] == [0, 1, 2, 3, 4, 5]


def test_images_without_an_object_are_left_out_source_by_source():
    """The weights and the closed form of the stream stay."""
    mixed = scenes(F(3), F(1))
    kept = annotated_batches.drop_without_objects(mixed)
    counts = [source.object_table().objects_per_record(60) for source in mixed.sources]
    assert kept.sizes == [int((count > 0).sum()) for count in counts] and kept.shares == (3, 1)
    assert len(kept) < len(mixed) and "that show no object" in kept.description()
    assert kept.object_table().objects_per_record(len(kept)).all()
    first = kept.locate(0, np.arange(400)) < kept.sizes[0]
    assert first.sum() == 300


def test_a_mixture_without_objects_has_no_table_of_them():
    plain = type("Plain", (), {"name": "plain", "captions": False, "classes": ("a",)})()
    plain.__class__.__len__ = lambda self: 4
    mixed = mixture.Mixture([ScenesSource(8, side=48), plain], [None, None])
    assert mixed.object_table() is None


def test_rendered_maps_of_a_mixture_keep_its_shares():
    mixed = scenes(F(3), F(1))
    maps = rendered_maps.with_maps(mixed)
    assert maps.map_classes == ("background", *mixed.classes)
    assert maps[0].map.max() <= len(mixed.classes)
    positions = np.arange(40)
    assert maps.locate(0, positions).tolist() == mixed.locate(0, positions).tolist()
