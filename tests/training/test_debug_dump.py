"""The description of a dump, which --mode=replay reads back."""

import json
import types

import numpy as np

from m3i_jax.training import debug_dump
from tests import toy


def test_a_dump_keeps_a_metric_with_the_name_of_a_secret(tmp_path, monkeypatch) -> None:
    """--mode=replay reads its value back. A text of the dump is redacted all the same."""
    saved = types.SimpleNamespace(save=lambda *_: None, wait=lambda _: None, close=lambda: None)
    monkeypatch.setattr(debug_dump, "Checkpoints", lambda *_: saved)
    monkeypatch.setattr(debug_dump.version, "__version__", "https://me:word-1@host/x")
    trainer = types.SimpleNamespace(
        config=toy.settings(), vocabulary=9, task=types.SimpleNamespace(category_counts=(2,))
    )
    state, values = debug_dump.State(step=7, params={}, opt={}), {"bits/caption/token": 9.219244}
    dump = debug_dump.write_dump(tmp_path, trainer, state, {"image": np.zeros(2)}, 7, values)
    about = json.loads((dump / "step.json").read_text())
    assert about["metrics"] == {"bits/caption/token": "9.219244"}
    assert debug_dump.same_outcome(about["metrics"], values)
    assert about["m3i_jax"] == "https://***@host/x"
