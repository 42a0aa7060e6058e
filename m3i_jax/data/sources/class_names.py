"""Looks up readable class names in a file, for classes named by WordNet ids (the folders of
ImageNet) or by numbers.

Distributions of ImageNet contain such a file: `LOC_synset_mapping.txt`, `synset_words.txt` or
`words.txt`, whose lines are an id, a space or tab, and the synonyms of WordNet, of which the first
is the name. Numbered classes are named by the lines in their order, each a name or an id and
synonyms, or by a JSON list or object. Names without ids, and those of JSON, are read as they are:
"bag, black plastic" is one; but for ImageNet's, whose JSON files list the synonyms, too. Without a
file the ids stay."""

import collections
import json
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from m3i_jax.data.sources import base
from m3i_jax.errors import UserError

FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "synsets.txt", "words.txt")
# levels above the image folder that are searched; the file of ILSVRC/Data/CLS-LOC/train is beside
# ILSVRC
ABOVE = 4
LIMIT = 1 << 22  # bytes of a file that are read; WordNet's words.txt has 2.6 MB
_ID = re.compile(r"n\d{8}")
_TENCH = "tench, Tinca tinca"  # by which a list of ImageNet's synonyms is recognised


def are_wordnet_ids(classes: Sequence[str]) -> bool:
    """Returns whether all classes are WordNet ids.

    >>> are_wordnet_ids(("n01440764", "n01443537")), are_wordnet_ids(("n01440764", "tench"))
    (True, False)
    """
    return bool(classes) and all(_ID.fullmatch(name) for name in classes)


def are_numbers(classes: Sequence[str]) -> bool:
    """Returns whether classes have no names but their numbers.

    >>> are_numbers(("0", "1")), are_numbers(("0", "tench")), are_numbers(())
    (True, False, False)
    """
    return bool(classes) and all(name == str(i) for i, name in enumerate(classes))


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
    (names,) = name_spaces(path, [classes])
    return names or ()


def name_spaces(
    path: str, spaces: Sequence[Sequence[str]], *, needed: bool = True
) -> list[tuple[str, ...] | None]:
    """Names the classes of several sources by one file.

    Args:
        path: the file.
        spaces: classes of each source.
        needed: refuse a file that names none of them.

    Returns:
        For each source the names of its classes; None if the file names none of them, as of a
        source without labels.

    Raises:
        UserError: the file cannot be read, or names no class of any source.
    """
    text = _text(os.path.expanduser(path))
    try:
        listed = _json(text) if path.endswith(".json") else {}
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(
            f"data.class_names={path!r} is not a JSON list or object of names: {error}"
        ) from None
    of_imagenet = _TENCH in listed.values()
    known = [(listed, of_imagenet) if listed else _names_in_text(text, space) for space in spaces]
    named = [
        readable_class_names(space, names, synonyms=several) if names.keys() & set(space) else None
        for space, (names, several) in zip(spaces, known, strict=True)
    ]
    if needed and not any(named):
        classes = [name for space in spaces for name in space]
        examples = ", ".join(map(repr, classes[:3])) or "none"
        raise UserError(
            f"data.class_names={path!r} names {len(known[0][0]):,} classes, but none of the"
            f" source's ({examples}): give another file"
        )
    return named


def _names_in_text(text: str, classes: Sequence[str]) -> tuple[dict[str, str], bool]:
    """Parses lines of ids and synonyms, or of names alone in the order of numbered classes; returns
    {class: text}, and whether the texts are synonyms."""
    if are_wordnet_ids(classes) and (known := dict(_lines(text))):
        return known, True
    known = {str(i): line.strip() for i, line in enumerate(text.splitlines()) if line.strip()}
    identified = _lines(text)
    if len(identified) == len(known) and are_wordnet_ids([key for key, _ in identified]):
        return {key: line.split(None, 1)[1] for key, line in known.items()}, True
    return known, False


def readable_class_names(
    classes: Sequence[str], known: Mapping[str, str], *, synonyms: bool = True
) -> tuple[str, ...]:
    """Returns distinct names of classes: of several `synonyms` the first. Where two classes would
    have the same name, all synonyms, and if that is not enough, the id in brackets.

    >>> names = {"n1": "crane, bird", "n2": "crane", "n3": "tench, Tinca tinca"}
    >>> readable_class_names(("n1", "n2", "n3"), names)
    ('crane, bird', 'crane', 'tench')
    >>> readable_class_names(("n1", "n2", "n3"), names, synonyms=False)
    ('crane, bird', 'crane', 'tench, Tinca tinca')
    """
    full = [known.get(name, name).strip() or name for name in classes]
    names = [name.split(",")[0].strip() or name for name in full] if synonyms else full
    for better in (
        full,
        [f"{name} ({identity})" for name, identity in zip(full, classes, strict=True)],
    ):
        count = collections.Counter(names)
        names = [b if count[n] > 1 else n for n, b in zip(names, better, strict=True)]
    return tuple(names)


def join_classes(
    spaces: Sequence[Sequence[str]], ids: Sequence[Sequence[str]], shared: bool
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Joins lists of classes, in the order in which they first appear. Classes with the same
    WordNet id are one class, whatever their names, and so are classes with the same name of lists
    without ids. Such a class is also that with an id, if one id alone has its name.

    Args:
        spaces: names of the classes of each list.
        ids: of the classes of each list; () for a list without, or whose names are its ids.
        shared: join them; else the lists are concatenated.

    Returns:
        (names of all classes, for each list the new label of each of its classes). Where classes
        with different ids have the same name, the id is added in brackets.

    >>> [join_classes([("a", "b"), ("b", "c")], [(), ()], both)[0] for both in (True, False)]
    [('a', 'b', 'c'), ('a', 'b', 'b', 'c')]
    >>> birds, machines = ("n02012849",), ("n03126707",)
    >>> join_classes([("crane",), ("crane",)], [birds, machines], True)[0]
    ('crane (n02012849)', 'crane (n03126707)')
    """
    if not shared:
        starts = np.cumsum([0, *map(len, spaces)])
        return tuple(name for space in spaces for name in space), [
            np.arange(start, start + len(space), dtype=np.int32)
            for start, space in zip(starts.tolist(), spaces, strict=False)
        ]
    known = [
        own if len(own) == len(space) and are_wordnet_ids(own) else ()
        for space, own in zip(spaces, ids, strict=True)
    ]
    ids_of: dict[str, set[str]] = {}
    for space, own in zip(spaces, known, strict=True):
        for name, identity in zip(space, own, strict=False):
            ids_of.setdefault(name, set()).add(identity)
    number: dict[str, int] = {}
    names: list[str] = []
    tables: list[np.ndarray] = []
    for space, own in zip(spaces, known, strict=True):
        table = np.empty(len(space), np.int32)
        for i, name in enumerate(space):
            identity = own[i] if own else name
            if not own and len(found := ids_of.get(name, set())) == 1:
                (identity,) = found
            if identity not in number:
                number[identity] = len(names)
                names.append(name)
            table[i] = number[identity]
        tables.append(table)
    count = collections.Counter(names)
    joined = (
        f"{name} ({identity})" if count[name] > 1 and identity != name else name
        for name, identity in zip(names, number, strict=True)
    )
    return tuple(joined), tables


def _text(path: str) -> str:
    if not os.path.isfile(path):
        raise UserError(
            f"data.class_names={path!r} does not exist: {base.missing_path_error(path)}"
        )
    return base.read_byte_range(path, 0, min(os.path.getsize(path), LIMIT)).decode(
        "utf-8-sig", "replace"
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
