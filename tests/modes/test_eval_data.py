"""`--mode=eval --data SOURCE --untrained`: which source is meant, where its results go, what the
table and the report show."""

import json
import pathlib
import re
import types

import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import schema
from m3i_jax.data.sources import shapes
from m3i_jax.data.sources.mixture import MixtureEntry
from m3i_jax.errors import UserError
from m3i_jax.evaluation import detection_results
from m3i_jax.modes import eval as evaluate
from m3i_jax.modes import eval_data, eval_header, report
from m3i_jax.modes import setup as jobs
from m3i_jax.modes.eval_results import Results, result_dir
from m3i_jax.training import weight_source
from tests import broken, dense_toy, scene_files, toy
from tests.modes.test_eval import EVERY, SMALL, enable, run, write_run, written

__all__ = ["run", "written"]


def write_folder(directory: pathlib.Path, *, classes: int = 2, images: int = 24) -> pathlib.Path:
    """A folder whose classes are told apart by brightness."""
    for i in range(images):
        place = directory / f"class {i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = (broken.smooth(40, 40 + i) // classes + 255 // classes * (i % classes)).astype(
            np.uint8
        )
        (place / f"{i}.png").write_bytes(broken.encode(pixels, "PNG"))
    return directory


def test_weights_that_were_written_anew_are_evaluated_anew(tmp_path: pathlib.Path) -> None:
    """A file, or a checkpoint of the same step, in the place of the one that was evaluated."""
    images = shapes.ShapesSource(4)
    setup = types.SimpleNamespace(
        config=schema.Config(), train=images, held_out=images, identity="shapes"
    )
    (tmp_path / "step").mkdir()
    for place, file in ((name, tmp_path / name) for name in ("vit.npz", "step/arrays")):
        checkpoint = str(tmp_path / place.split("/")[0])
        headers = []
        for content in (b"first", b"first", b"second"):
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)
            (tmp_path / "step" / "eval.json").write_text(str(len(headers)))  # of no weights
            headers.append(eval_header.described(setup, checkpoint, 7))
        assert headers[0] == headers[1] != headers[2]
        assert {**headers[2], "of": ""} == {**headers[0], "of": ""}


def test_a_folder_by_one_flag(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The results of the run stay; those of the folder go to a file named after it, with chance and
    the untrained encoder, and the report shows both."""
    folder = write_folder(tmp_path / "sketch")
    own = ["--mode=eval", "--workdir", str(run), *enable("knn")]
    assert command.main(own) == 0
    before = (run / "eval.json").read_bytes()
    saved = json.loads(before)
    sizes = [part["pictures"] for part in saved["data"].values()]
    assert saved["evaluated"] == {"index": 32, "queries": sizes[1]} and sizes[0] > 32
    assert saved["settings"]["train_limit"] == 32 and saved["settings"]["k"] == 3
    assert f"index 32 of {sizes[0]} of shapes" in capsys.readouterr().out
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    other = [*own, "--data", str(folder), "--untrained"]
    capsys.readouterr()
    assert command.main(other) == 0
    out = capsys.readouterr().out
    assert (run / "eval.json").read_bytes() == before
    saved = json.loads((run / "eval-sketch" / "eval.json").read_text())
    assert saved["chance"]["eval/knn/top1"] == 0.5 and saved["classes"] == 2
    counts = [part["pictures"] for part in saved["data"].values()]
    assert sum(counts) == 24 and min(counts) > 0
    # the checkpoint of this fixture has the initial weights of the run
    assert saved["untrained"]["knn"] == saved["results"]["knn"] != {}
    (header,) = [line for line in out.splitlines() if line.startswith("what")]
    assert header.split() == ["what", "value", "untrained", "chance"]
    assert f"index {counts[0]} of folder" in out and "2 categories" in out
    page = (run / "report.html").read_text()
    assert "sketch, untrained" in page and "sketch, chance" in page and "data of the run" in page
    assert f"index: 32 of {sizes[0]} images of shapes" in page
    assert command.main(other) == 0
    assert "knn:" not in capsys.readouterr().out  # neither is measured again
    (run / "metrics.jsonl").unlink()


def test_other_data_of_the_same_name_go_to_another_directory(tmp_path: pathlib.Path) -> None:
    about = {"data": {"queries": "a"}, "checkpoint": "run/checkpoints/2", "step": 2}
    place = lambda about, name="sketch", of_run=True: result_dir(
        tmp_path, about, began=True, name=name, of_run=of_run
    )
    first = place(about)
    assert first == tmp_path / "eval-sketch"
    Results(about, 2, {"knn": {"eval/knn/top1": 0.5}}).write(first / "eval.json")
    assert place(about | {"checkpoint": "run/checkpoints/4", "step": 4}) == first  # a later step
    others = [
        place(about | {"data": {"queries": "b"}}),
        place(about | {"checkpoint": "elsewhere/checkpoints/2"}, of_run=False),
    ]
    assert len({first, *others}) == 3
    assert all(other.name.startswith("eval-sketch-") for other in others)
    assert place(about, name="").name not in {first.name, "eval-"}


def test_which_source_a_text_names(tmp_path: pathlib.Path) -> None:
    find, entries = eval_data.find_source, ("folder:/data/photo=3", "tars:/x/cc/*.tar=7")
    assert find("photo", entries) == MixtureEntry("folder", "/data/photo")
    assert find("cc", entries) == find("tars:/x/cc/*.tar", entries)
    assert find("folder:/data/photo@a|b").held_out == "b"
    assert find("shapes") == MixtureEntry("shapes", "")
    (tmp_path / "a.tar").touch()
    assert find(str(tmp_path)).kind == "tars"
    (tmp_path / "x-00000.array_record").touch()
    assert find(str(tmp_path)).kind == "array_record"
    (tmp_path / "state.json").touch()
    assert find(str(tmp_path)).kind == "hugging_face"
    assert find(str(tmp_path), task="detect").kind == "coco"
    for text, entries, words in (
        ("nowhere", ("folder:/data/photo",), r"names no data; .*mixture \(photo\)"),
        ("photo", ("folder:/a/photo", "folder:/b/photo"), r"2 entries .*folder:/a/photo"),
        ("folder:", (), "names no data"),
        ("folder:/a=-1", (), "^--data: .*must be positive"),
    ):
        with pytest.raises(UserError, match=words):
            find(text, entries)


def test_shards_beside_folders_of_images_are_ambiguous(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path, images=2)
    assert eval_data.find_source(str(tmp_path)).kind == "folder"
    for name, kind in (("archive.tar", "tars"), ("x.array_record", "array_record")):
        (tmp_path / name).touch()
        words = f"holds {name} and a folder of images, class 0/: give {kind}:.* or folder:"
        with pytest.raises(UserError, match=words) as caught:
            eval_data.find_source(str(tmp_path))
        for given in str(caught.value).partition(": give ")[2].split(" or "):
            assert eval_data.find_source(given).path == str(tmp_path)
    shards = tmp_path / "shards"
    (shards / "index").mkdir(parents=True)
    (shards / "0.tar").touch()
    assert eval_data.find_source(str(shards)).kind == "tars"


def test_data_without_objects_evaluate_a_run_that_read_boxes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only batches of training hold texts of objects. The refusal comes after the data."""
    forms = ("cappa", "locca")
    read_boxes = {"objective__forms": ",".join(forms), "data__regions": True}
    config = toy.settings(**SMALL | read_boxes)
    with pytest.raises(UserError, match="data.regions=True, but shapes .*annotates no objects"):
        jobs.open_setup(config, str(tmp_path / "train"), trains=[forms])
    saved = tmp_path / "run" / "checkpoints"
    saved.mkdir(parents=True)
    monkeypatch.setattr(evaluate, "find_checkpoint", lambda *a, **k: (saved, 1))
    off = {f"evaluate__{name}": False for name in EVERY}
    config = toy.settings(**SMALL | read_boxes | off)
    with pytest.raises(UserError, match="no enabled evaluator"):
        evaluate.run(config, workdir=str(tmp_path / "eval"))


def test_the_settings_of_the_source_are_replaced() -> None:
    """Those of the images stay, so that they are cut and normalised as the encoder knows them."""
    config = configuration.default_config()
    config.data.update(
        {"source": "mixture", "mixture": ("folder:/a=3",), "class_names": "names.txt", "holdout": 0}
    )
    config.data.image_size = 64
    eval_data.use_data(config, "tfds:food101@train|validation")
    data = config.data
    assert (data.source, data.path, data.split, data.holdout_split) == (
        "tfds", "food101", "train", "validation",
    )  # fmt: skip
    assert data.mixture == () and not data.class_names and data.image_size == 64
    assert data.holdout == 0.1
    eval_data.use_data(config, "coco:/c@train.json|val.json")
    assert (data.annotations, data.holdout_annotations) == ("train.json", "val.json")
    assert not data.split and not data.holdout_split
    with pytest.raises(UserError, match="config.data.path: --data=shapes names the source"):
        eval_data.use_data(config, "shapes", ["data.path=/b"])


def test_all_images_of_other_data_are_held_out_for_a_dense_task(tmp_path: pathlib.Path) -> None:
    """Also those without objects; of the data of the run, the share that it did not train on."""
    scene_files.write_scenes(str(tmp_path), images=9, held_out=3, side=32)
    text = configuration.config_to_text(
        dense_toy.dense_settings("detect", data__classes=-1, data__holdout=0.4)
    )
    names = [f"{tmp_path}/annotations/instances_{part}.json" for part in ("train", "val")]

    def opened(data: str, trained: str, share: float = 0.4) -> jobs.Setup:
        config = configuration.config_from_text(text, "")
        config.data.holdout = share
        config.data.update({"source": "coco", "path": str(tmp_path), "annotations": trained})
        eval_data.use_data(config, data)
        settings = configuration.resolve(config)
        return jobs.open_setup(
            settings, str(tmp_path / "run"), draws_batches=False, hold_out_all=True
        )

    setup = opened(f"coco:{tmp_path}@{names[0]}", trained=names[1])
    keys = [setup.held_out.key(i) for i in range(len(setup.held_out))]
    assert keys == [f"scene_{i:06d}.jpg" for i in range(9)]
    assert len(opened(f"coco:{tmp_path}@{names[0]}|{names[1]}", trained=names[1]).held_out) == 3
    assert 0 < len(opened(f"coco:{tmp_path}@{names[0]}", trained=names[0]).held_out) < 9
    assert not len(opened(f"coco:{tmp_path}@{names[0]}", trained=names[0], share=1e-6).held_out)


def test_data_of_the_run_are_known_by_their_files(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another path, a relative one or one of the directory above; of data that share no file,
    all images are held out."""
    monkeypatch.chdir(tmp_path)
    for folder in ("own/images/train/a", "own/images/val", "other"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("own/notes.json", "other/o.json"):
        (tmp_path / file).touch()
    own, notes = tmp_path / "own", str(tmp_path / "own" / "notes.json")

    def share(task: str, source: str, data: str, *given: str, **settings: str) -> float:
        config = configuration.default_config()
        config.task = task
        config.data.update({"source": source, "holdout": 0.2, **settings})
        eval_data.use_data(config, data, given)
        return config.data.holdout

    (tmp_path / "own" / "second").symlink_to(own / "images")
    for annotations, path in ((notes, own / "images"), ("notes.json", own), ("", own)):
        run = {"path": str(path), "annotations": annotations}
        for data in (
            str(own),
            f"coco:{own}/images@../notes.json",
            f"coco:{own}/second@{notes}",
            f"coco:{own}/images@own/notes.json",
        ):
            assert share("detect", "coco", data, **run) == 0.2, (run, data)
        assert share("detect", "coco", f"coco:{own}/images@{tmp_path}/other/o.json", **run) == 0
    run = {"path": str(own), "split": ""}
    for data, trained in (
        (str(own), True),
        (f"maps:{own}@train/a", True),
        (f"maps:{tmp_path}/other@{own}", True),
        (f"maps:{own}/../own@train", True),
        (f"maps:{own}@val", False),
        (str(tmp_path / "other"), False),
    ):
        assert share("segment", "maps", data, "data.holdout=0.3", **run) == 0.2 * trained, data


def test_data_of_which_a_run_held_nothing_out_are_refused(tmp_path: pathlib.Path) -> None:
    for name in ("own/train/a", "own/val/a", "flat"):
        write_folder(tmp_path / name, images=2)
    own, flat = tmp_path / "own", str(tmp_path / "flat")
    (own / "t.json").touch()

    def use(task: str, source: str, path: object, data: str, *given: str, **more: object) -> None:
        config = configuration.default_config()
        config.task = task
        config.data.update({"source": source, "path": str(path), "holdout": 0.2, **more})
        eval_data.use_data(config, data, given)

    notes = {"annotations": "t.json", "holdout_annotations": "v.json"}
    for arguments, more, words in (
        (("pretrain", "folder", flat, flat), {"holdout": 0.0}, r"\(data.holdout=0\)"),
        (("pretrain", "shapes", "", "shapes:50"), {"holdout": 0.0}, r"\(data.holdout=0\)"),
        (("pretrain", "folder", own, f"folder:{own}@train"), {}, r"\(it held out 'val'\)"),
        (("detect", "coco", own, f"coco:{own}@t.json"), notes, r"\(it held out 'v.json'\)"),
    ):
        with pytest.raises(UserError, match=f"the run trained on all of these images {words}"):
            use(*arguments, **more)
        use(*arguments, "data.holdout=0.1", **more)  # asked for
    use("pretrain", "folder", flat, flat)
    use("pretrain", "folder", own, str(own), holdout=0.0)
    use("pretrain", "folder", own, f"folder:{own}@val", holdout=0.0)
    use("pretrain", "folder", flat, "shapes", holdout=0.0)


def test_classes_of_other_data_are_matched_by_name(tmp_path: pathlib.Path) -> None:
    """A file that lists a part of the categories in another order, and maps without names."""
    scene_files.write_scenes(str(tmp_path), images=6, held_out=1, side=32)
    notes = tmp_path / "annotations" / "instances_train.json"
    own = json.loads(notes.read_text())["categories"]
    learnt = ("zebra", *sorted((each["name"] for each in own), reverse=True))
    (tmp_path / "classes.json").write_text(json.dumps({"classes": learnt}))
    lines: list[str] = []

    def opened(task: str, run: pathlib.Path, **settings: object) -> jobs.Setup:
        values = {f"data__{name}": value for name, value in settings.items()}
        config = dense_toy.dense_settings(task, data__classes=len(learnt), **values)
        setup = jobs.open_setup(config, str(tmp_path / "run"), draws_batches=False)
        return evaluate._with_learnt_classes(setup, str(run), lines.append)

    objects = {"source": "coco", "path": str(tmp_path), "annotations": str(notes)}
    setup = opened("detect", tmp_path, **objects, holdout=0.5)
    assert setup.classes == setup.held_out.classes == learnt and len(lines) == 1
    source = setup.held_out.source
    for i in range(len(source)):
        found, stated = setup.held_out[i].objects.classes, source[i].objects.classes
        assert [learnt[k] for k in found] == [source.classes[k] for k in stated]
    assert detection_results.category_table(setup.held_out, learnt).ids[0] == 91
    (tmp_path / "classes.txt").unlink()
    other = tmp_path / "other"
    other.mkdir()
    maps = {"source": "maps", "path": str(tmp_path), "split": "train", "holdout_split": "val"}
    numbers = [*map(str, range(1, 17))]
    for names, refused in (
        (numbers, ""),
        (["sky", "1"], "14 classes, of which 13, such as '2', are not"),
        ([*numbers, "3"], "'3' names several classes"),
    ):
        (other / "classes.json").write_text(json.dumps({"classes": names}))
        if refused:
            with pytest.raises(UserError, match=refused):
                opened("segment", other, **maps)
        else:
            assert len(opened("segment", other, **maps).held_out.map_classes) == 16


def test_classes_of_an_export_are_those_of_its_description(tmp_path: pathlib.Path) -> None:
    text = configuration.config_to_text(dense_toy.dense_settings("segment"))
    (tmp_path / "config.txt").write_text(text)
    (tmp_path / "model.json").write_text(json.dumps({"classes": ["sea", "sky"]}))
    assert weight_source.class_names(str(tmp_path / "no such file")) is None
    # known before any array is read: this file has none
    (tmp_path / "model.npz").write_bytes(b"no arrays")
    assert weight_source.class_names(str(tmp_path)) == ("sea", "sky")


def test_the_category_head_is_measured_on_the_categories_that_it_learnt(
    run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert weight_source.class_names(str(run)) == shapes.CLASSES
    images, back = shapes.ShapesSource(8), shapes.CLASSES[::-1]
    ids = tuple(f"n{k:08}" for k in range(8))
    assert not evaluate._may_be_renamed(ids, ids[::-1])  # ids of both sides are names
    setup = jobs.Setup(
        config=toy.settings(**SMALL | {"data__classes": 8}),
        mesh=None,
        train=images,
        held_out=images,
        classes=shapes.CLASSES,
        tokenizer=None,
        workdir=tmp_path,
    )
    for learnt, classes, line in (
        (shapes.CLASSES, shapes.CLASSES, ""),
        (back, back, "8 categories of these data are numbered as those of the run, by name"),
        ((*back[:7], "x"), shapes.CLASSES, "no direct evaluation: the run has not learnt 1 "),
        (tuple("01234567"), shapes.CLASSES, "direct evaluation assumes that category k"),
        (ids, shapes.CLASSES, "direct evaluation assumes that category k"),
    ):
        lines: list[str] = []
        changed = evaluate._with_other_classes(setup, lines.append, learnt=learnt)
        assert changed.classes == classes and "".join(lines).startswith(line)
        assert changed.config.evaluate.direct == ("no direct" not in line)
        for part in (changed.train, changed.held_out):
            names = [classes[part[i].label] for i in range(8)]
            assert names == [shapes.CLASSES[images[i].label] for i in range(8)]


def test_refusals_are_one_line(run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--mode=eval", "--workdir", str(run), "--data", "no such data"], "names no data"),
        (["--mode=report", "--workdir", str(run), "--data", "shapes"], "does not belong to"),
        (["--mode=report", "--workdir", str(run), "--untrained"], "does not belong to"),
    ):
        assert command.main(arguments) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_a_run_that_ignored_labels_measures_those_of_other_data(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, place = write_folder(tmp_path / "labelled"), tmp_path / "run"
    write_run(place, ("mim",), objective__forms="mim", data__classes=0)
    arguments = ["--mode=eval", "--workdir", str(place), *enable("knn"), "--data", str(folder)]
    code = command.main(arguments)
    out = capsys.readouterr()
    assert code == 0, out.err
    assert "eval/knn/top1" in out.out and "0.5000" in out.out


def test_the_report_leaves_out_damaged_results(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for name, content in (("good", {"results": {"knn": {"eval/knn/top1": 0.25}}}), ("bad", [])):
        (tmp_path / f"eval-{name}").mkdir()
        (tmp_path / f"eval-{name}" / "eval.json").write_text(json.dumps(content))
    config = configuration.resolve(configuration.default_config())
    Results({}, 0, {"knn": {"eval/knn/top1": 0.75}}).write(tmp_path / "eval-good" / "gone.json")
    digests = tmp_path / "eval-gone" / "digests"
    digests.parent.mkdir()
    (tmp_path / "eval-good" / "digests").rename(digests)
    (digests / "gone.json").rename(digests / "eval.json")
    page = report.write_report(config, tmp_path).read_text()
    assert "eval-gone/eval.json is missing" in caplog.text and "eval-bad" in caplog.text
    assert "0.2500" in page and ">good<" in page and ">bad<" not in page


def test_retrieval_of_images_without_captions_is_refused(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images without captions are known before any is read; empty captions only afterwards."""
    folder = write_folder(tmp_path / "bare", images=8)
    arguments = ["--mode=eval", "--workdir", str(run), *enable("retrieval"), "--data", str(folder)]
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert "no retrieval evaluation: the held-out images have no captions" in out
    assert "no enabled evaluator can run" in err and err.count("\n") == 1
    for image in list(folder.rglob("*.png")):
        image.with_suffix(".txt").write_text("\n")
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert re.search(r"^retrieval: [\d.]+ s, nothing measured$", out, re.MULTILINE)
    assert "retrieval measured nothing: no held-out image has" in err and err.count("\n") == 1
