"""Row F8: foreign weights that are quantised, not finite, nested or inconsistent are refused on one
line that names the file, by `m3i_jax.load` and `init_from`; and so is a checkpoint of a newer
version."""

import gzip
import json
import pathlib
import re
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.data import tokenizer
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load
from m3i_jax.interop import intern_image_weights, sidecar_configs, tensor_files
from m3i_jax.training import checksums, weight_source
from m3i_jax.training.checkpoint import Checkpoints
from tests import saved, toy
from tests.interop import published
from tests.interop.published_vit import ENCODERS, weights

SIZES = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "grid": 4}
DEEP = '{"a":' * 100_000


def table() -> dict[str, np.ndarray]:
    return weights(ENCODERS["timm"], **SIZES)


def refusal(act, *arguments: object, **settings: object) -> str:
    with pytest.raises(UserError) as error:
        act(*arguments, **settings)
    text = str(error.value)
    assert "\n" not in text and len(text) < 700, text
    return text


BROKEN = {
    "NaN": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 3, np.nan, a),
    "Inf": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 3, np.inf, a),
    "beyond float32": lambda a: np.where(
        np.arange(a.size).reshape(a.shape) == 3, 1e300, a.astype(np.float64)
    ),
    "int8": lambda a: (a * 100).astype(np.int8),
    "uint8": lambda a: (a * 100).astype(np.uint8),
    "int32": lambda a: (a * 100).astype(np.int32),
    "bool": lambda a: a > 0,
    "float8": lambda a: np.asarray(jnp.asarray(a, jnp.float8_e4m3fn)),
}
NAMES = ("blocks.1.mlp.fc2.weight", "pos_embed", "norm.bias")


@pytest.mark.fast
@pytest.mark.row("F8")
@pytest.mark.parametrize("kind", BROKEN)
def test_numbers_that_are_no_weights(kind: str, trials, tmp_path: pathlib.Path) -> None:
    for name in NAMES:
        broken = table()
        broken[name] = BROKEN[kind](broken[name])
        path = tmp_path / "vit.safetensors"
        tensor_files.write_safetensors(path, broken)
        words = (
            "not finite"
            if broken[name].dtype.kind == "f" and broken[name].dtype.itemsize > 1
            else "quantised"
        )
        for act in (load.load, weight_source.open_weights):
            text = refusal(act, str(path))
            assert trials.add(name in text and words in text and str(path) in text), text
    trials.figure = f"{trials.passed} of {trials.trials} refused"


@pytest.mark.fast
@pytest.mark.row("F8")
def test_half_precision_and_what_has_no_place_are_taken(tmp_path: pathlib.Path) -> None:
    """Integers that are no weights, such as counters, and 16-bit numbers are common."""
    made = {name: array.astype(np.float16) for name, array in table().items()} | {
        "fc_norm.num_batches_tracked": np.zeros((), np.int64)
    }
    tensor_files.write_safetensors(tmp_path / "vit.safetensors", made)
    assert (
        load.load(str(tmp_path / "vit.safetensors"), heads=2).params["encoder"]["cls_token"].dtype
        == np.float32
    )


@pytest.mark.fast
@pytest.mark.row("F8")
def test_intern_image_and_a_run_too(tmp_path: pathlib.Path) -> None:
    net = published.weights(published.PICO._replace(fused=0, pooled=5))
    net["levels.1.blocks.0.norm1.0.weight"] = net["levels.1.blocks.0.norm1.0.weight"] * np.nan
    tensor_files.write_npz(tmp_path / "net.npz", net)
    assert "levels.1.blocks.0.norm1.0.weight" in refusal(load.load, str(tmp_path / "net.npz"))
    with pytest.raises(UserError, match="type int8"):
        intern_image_weights.load_intern_image(
            {"patch_embed.conv1.weight": np.zeros((32, 3, 3, 3), np.int8)}
        )
    config = toy.settings()
    params = saved.random(config)
    params["encoder"]["cls_token"] = params["encoder"]["cls_token"].at[0, 0, 3].set(np.nan)
    mended = saved.random
    try:
        saved.random = lambda *_: params  # type: ignore[assignment]
        saved.run(tmp_path / "run", config)
    finally:
        saved.random = mended
    assert "encoder/cls_token has numbers that are not finite" in refusal(
        load.load, str(tmp_path / "run")
    )


@pytest.mark.fast
@pytest.mark.row("F8")
def test_a_checkpoint_of_a_newer_version_and_one_without_digests(tmp_path: pathlib.Path) -> None:
    """`m3i_jax.load` verifies a checkpoint as --mode=eval does."""
    config = toy.settings()
    saved.run(tmp_path, config)
    file = tmp_path / "checkpoints" / "4" / checksums.NAME
    whole = file.read_bytes()
    found = json.loads(whole.splitlines()[0])
    line = json.dumps(found | {"format": found["format"] + 1}, sort_keys=True)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    for content, words in (
        (f"{line}\n{zlib.crc32(line.encode()):08x}\n".encode(), "use a newer version"),
        (None, "is missing"),
    ):
        file.write_bytes(content) if content else file.unlink()
        assert words in refusal(load.load, str(tmp_path))
        assert words in refusal(checkpoints.restore, 4, {}, {})
    checkpoints.close()
    file.write_bytes(whole)
    assert load.load(str(tmp_path)).params


INDICES = {
    "no JSON": "{",
    "no UTF-8": b"\xff\xfe{}",
    "nested": DEEP,
    "long numbers": '{"weight_map": ' + "9" * 5_000 + "}",
    "too long": '{"weight_map": {}' + " " * (1 << 24) + "}",
    "a list": "[]",
    "no map": "{}",
    "a map of nothing": '{"weight_map": {}}',
    "a list as map": '{"weight_map": ["a"]}',
    "numbers as files": '{"weight_map": {"a": 1}}',
    "a file that is not there": '{"weight_map": {"a": "model-2.safetensors"}}',
    "an array that is not there": '{"weight_map": {"a": "model-1.safetensors"}}',
    "a file elsewhere": '{"weight_map": {"a": "../model-1.safetensors"}}',
    "a directory": '{"weight_map": {"a": "."}}',
}


@pytest.mark.fast
@pytest.mark.row("F8")
def test_an_index_that_is_broken(trials, tmp_path: pathlib.Path) -> None:
    tensor_files.write_safetensors(tmp_path / "model-1.safetensors", table())
    for name, content in INDICES.items():
        file = tmp_path / "model.safetensors.index.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        text = refusal(load.load, str(tmp_path))
        assert trials.add(str(tmp_path) in text), (name, text)
    trials.figure = f"{trials.passed} of {trials.trials} refused"


# Of config.json and preprocessor_config.json: what cannot be read is refused, what means nothing is
# as if it were not there.
REFUSED = {
    "no JSON": "{",
    "nested": DEEP,
    "a list": "[1]",
    "a text": '"x"',
    "no UTF-8": b"\xff\xfe",
    "long numbers": '{"a": ' + "9" * 5_000 + "}",
}
IGNORED = [
    {"num_attention_heads": "two", "hidden_act": ["gelu"], "layer_norm_eps": "small"},
    {"num_attention_heads": 0, "layer_norm_eps": -1.0},
    {"num_attention_heads": True},
    {"layer_norm_eps": 1e300},
    {"num_attention_heads": None},
    {"vision_config": [], "model_args": [1], "pretrained_cfg": "x"},
    {"model_args": {"num_heads": {}, "act_layer": {}}},
    {"image_mean": ["a", "b", "c"], "image_std": [0.1, None, {}]},
    {"image_mean": [float("nan")] * 3},
    {"image_mean": "0.5"},
    {"crop_size": {"height": "x"}, "size": []},
    {"crop_size": -3},
    {"crop_size": 1e9},
    {"size": {"shortest_edge": "x"}},
    {"pretrained_cfg": {"input_size": "x", "crop_pct": 0.9}},
    {tensor_files.PREPROCESSING: []},
    {tensor_files.PREPROCESSING: {"crop": "x", "background": [], "image_size": {}}},
]


@pytest.mark.fast
@pytest.mark.row("F8")
@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", tensor_files.PREPROCESSING]
)
def test_a_configuration_that_cannot_be_read(name: str, trials, tmp_path: pathlib.Path) -> None:
    tensor_files.write_safetensors(tmp_path / "model.safetensors", table())
    for what, content in REFUSED.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        text = refusal(load.load, str(tmp_path))
        assert trials.add(name in text), (what, text)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()  # no file of that name
    assert load.load(str(tmp_path), heads=2).params
    trials.figure = f"{trials.passed} of {trials.trials} refused"


@pytest.mark.fast
@pytest.mark.row("F8")
def test_a_configuration_of_wrong_values_is_as_if_it_were_not_there(trials) -> None:
    plain = sidecar_configs.sidecar_settings({})
    for config in IGNORED:
        assert trials.add(sidecar_configs.sidecar_settings(config) == plain), (
            config,
            sidecar_configs.sidecar_settings(config),
        )
    for share in ("x", 0, 7.0):  # a size that is right is read beside it
        config = {"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": share}}
        assert trials.add(sidecar_configs.sidecar_settings(config) == {"image_size": 32}), share


@pytest.mark.fast
@pytest.mark.row("F8")
def test_a_deviation_of_zero_is_refused(tmp_path: pathlib.Path) -> None:
    """It would divide by zero."""
    tensor_files.write_safetensors(tmp_path / "model.safetensors", table())
    (tmp_path / "preprocessor_config.json").write_text('{"image_std": [0, 1, 1]}')
    assert "std" in refusal(load.load, str(tmp_path))


SHAPES = {
    "a flat matrix": ("blocks.0.attn.qkv.weight", lambda a: a.reshape(-1)),
    "a table without a grid": ("pos_embed", lambda a: a[:, :7]),
    "a table of two axes": ("pos_embed", lambda a: a[0]),
    "a convolution of another kind": ("patch_embed.proj.weight", lambda a: a[:, :2]),
    "a bias that is too long": ("blocks.0.mlp.fc1.bias", lambda a: np.concatenate([a, a])),
    "another width": ("norm.weight", lambda a: a[:-1]),
    "a scalar": ("cls_token", lambda a: a[0, 0, 0]),
    "nothing": ("blocks.0.norm1.weight", lambda a: a[:0]),
}


@pytest.mark.fast
@pytest.mark.row("F8")
def test_arrays_that_do_not_fit_each_other(trials, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "vit.safetensors")
    for what, (name, change) in SHAPES.items():
        broken = table()
        broken[name] = change(broken[name])
        if name.startswith("blocks.0."):  # of all layers, which else differ from each other
            other = name.replace("blocks.0.", "blocks.1.")
            broken[other] = change(broken[other])
        tensor_files.write_safetensors(path, broken)
        text = refusal(load.load, path, heads=2)
        assert trials.add(path in text), (what, text)
    trials.figure = f"{trials.passed} of {trials.trials} refused"


@pytest.mark.fast
@pytest.mark.row("F8", "F1")
def test_a_pickle_is_refused_without_the_advice_of_torch(tmp_path: pathlib.Path) -> None:
    """PyTorch's message says how to load it unsafely."""
    torch = pytest.importorskip("torch")
    for name, content in (
        ("hostile.pth", {"model": re.compile("x")}),
        ("args.pt", {"model": {}, "args": pathlib.Path("x")}),
    ):
        torch.save(content, tmp_path / name)
        text = refusal(tensor_files.read_tensors, tmp_path / name)
        assert (
            name in text
            and "safetensors" in text
            and "torch.save(model.state_dict(), FILE)" in text
        )
        assert (
            "weights_only" not in text and "trust" not in text and "allowlist" not in text.lower()
        )
    (tmp_path / "noise.pth").write_bytes(b"cos\nmkdir\n(S'/tmp/never'\ntR.")
    assert (
        "noise.pth" in (text := refusal(tensor_files.read_tensors, tmp_path / "noise.pth"))
        and "weights_only" not in text
    )


MERGES = {
    "a part that is nowhere": ["t h", "the e"],
    "a part that comes later": ["th e", "t h"],
    "a pair twice": ["t h", "t h"],
    "another way to the same": ["t h", "h e", "th e", "t he"],
}


@pytest.mark.fast
@pytest.mark.row("F8")
def test_merges_that_are_inconsistent(
    trials, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what, pairs in MERGES.items():
        path = tmp_path / tokenizer.VOCABULARY
        monkeypatch.setattr(tokenizer, "_MERGES", len(pairs))  # of so short a file
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("#version: 0.2\n" + "\n".join(pairs) + "\n")
        text = refusal(tokenizer.clip_tokenizer, str(path))
        assert trials.add(str(path) in text and "pair" in text and "fetch it with" in text), (
            what,
            text,
        )
    made = tokenizer.train_tokenizer(["the cat", "the dog", "the end"], 300, 8)
    content = json.loads(made.core.to_str())
    for change in (
        {"merges": [["t", "nowhere"]]},
        {"merges": [["t"]]},
        {"vocab": {"a": -1}},
        {"vocab": []},
        {"merges": "x"},
    ):
        (tmp_path / "tokenizer.json").write_text(
            json.dumps(content | {"model": content["model"] | change})
        )
        text = refusal(tokenizer.Tokenizer.load, str(tmp_path / "tokenizer.json"), 8)
        assert trials.add("tokenizer.json" in text), (change, text)
    trials.figure = f"{trials.passed} of {trials.trials} refused"
