"""Looks up readable class names in a file, for classes named by WordNet ids (the folders of
ImageNet) or by numbers.

Distributions of ImageNet contain such a file: `LOC_synset_mapping.txt`, `synset_words.txt` or
`words.txt`, whose lines are an id, a space or tab, and the names. Numbered classes are named by a
plain list, one name per line, or by a JSON list or object. Without a file the ids stay."""

import collections
import json
import os
import re
from collections.abc import Mapping, Sequence

from m3i_jax.data.sources import base
from m3i_jax.errors import UserError

FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "synsets.txt", "words.txt")
# levels above the image folder that are searched; the file of ILSVRC/Data/CLS-LOC/train is beside
# ILSVRC
ABOVE = 4
LIMIT = 1 << 22  # bytes of a file that are read; WordNet's words.txt has 2.6 MB
_ID = re.compile(r"n\d{8}")


def are_wordnet_ids(classes: Sequence[str]) -> bool:
    """Returns whether all classes are WordNet ids.

    >>> are_wordnet_ids(("n01440764", "n01443537")), are_wordnet_ids(("n01440764", "tench"))
    (True, False)
    """
    return bool(classes) and all(_ID.fullmatch(name) for name in classes)


def names_near_folder(folder: str, classes: Sequence[str]) -> tuple[str, ...]:
    """Names WordNet ids by an ImageNet file in the folder or above it; without such a file, returns
    the ids.

    >>> names_near_folder("/", ("n01440764", "n01443537"))
    ('n01440764', 'n01443537')
    """
    directory = os.path.abspath(folder)
    for _ in range(ABOVE + 1):
        for name in FILES:
            if os.path.isfile(path := os.path.join(directory, name)):
                known = {key: text for key, text in _lines(_text(path)) if _ID.fullmatch(key)}
                if known.keys() & set(classes):
                    return readable_class_names(classes, known)
        directory = os.path.dirname(directory)
    return tuple(classes)


def class_names_from_file(path: str, classes: Sequence[str]) -> tuple[str, ...]:
    """Names classes, which are WordNet ids or numbers, by a file.

    Raises:
        UserError: the file cannot be read, or names none of the classes.
    """
    text = _text(os.path.expanduser(path))
    try:
        known = _json(text) if path.endswith(".json") else {}
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(
            f"data.class_names={path!r} is not a JSON list or object of names: {error}"
        ) from None
    if not known and are_wordnet_ids(classes):
        known = dict(_lines(text))
    if not known:
        known = {str(i): line.strip() for i, line in enumerate(text.splitlines()) if line.strip()}
    if not known.keys() & set(classes):
        examples = ", ".join(map(repr, classes[:3])) or "none"
        raise UserError(
            f"data.class_names={path!r} names {len(known):,} classes, but none of the source's"
            f" ({examples}): give another file"
        )
    return readable_class_names(classes, known)


def readable_class_names(classes: Sequence[str], known: Mapping[str, str]) -> tuple[str, ...]:
    """Returns distinct names of classes: the first of several synonyms. Where two classes would
    have the same name, all synonyms, and if that is not enough, the id in brackets.

    >>> names = {"n1": "crane, bird", "n2": "crane", "n3": "tench, Tinca tinca"}
    >>> readable_class_names(("n1", "n2", "n3"), names)
    ('crane, bird', 'crane', 'tench')
    """
    full = [known.get(name, name).strip() or name for name in classes]
    names = [name.split(",")[0].strip() or name for name in full]
    for better in (
        full,
        [f"{name} ({identity})" for name, identity in zip(full, classes, strict=True)],
    ):
        count = collections.Counter(names)
        names = [b if count[n] > 1 else n for n, b in zip(names, better, strict=True)]
    return tuple(names)


def _text(path: str) -> str:
    if not os.path.isfile(path):
        raise UserError(
            f"data.class_names={path!r} does not exist: {base.missing_path_error(path)}"
        )
    return base.read_byte_range(path, 0, min(os.path.getsize(path), LIMIT)).decode(
        "utf-8", "replace"
    )


def _lines(text: str) -> list[tuple[str, str]]:
    pairs = (line.strip().split(None, 1) for line in text.splitlines())
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def _json(text: str) -> dict[str, str]:
    """Parses a list of names, an object of names, or Keras' {"0": ["n01440764", "tench"]}."""
    value = json.loads(text)
    if isinstance(value, list):
        return {str(i): str(name) for i, name in enumerate(value)}
    names: dict[str, str] = {}
    for key, name in value.items():
        if isinstance(name, list) and len(name) == 2:
            names[str(name[0])] = names[str(key)] = str(name[1])
        else:
            names[str(key)] = str(name)
    return names
