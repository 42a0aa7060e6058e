"""The registry behind every `register_...`: values by name, of this package and of other projects.

A registry may lengthen the list of choices of a setting, so that a name that is registered is one
that the setting accepts, and it may import a value of this package when it is first looked up. It
raises what its owner says, and knows no other part of the package.
"""

import contextlib
import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_PACKAGE = f"{__package__}."


def not_one_of(value: str, names: Iterable[object], hint: str = "") -> str:
    """Returns the end of a message about a name that does not exist: the known names, and the
    closest of them, else the hint.

    >>> not_one_of("'adamv'", ["adamw", "lars"]), not_one_of("'x'", ["adamw"], "use adamw")
    ("'adamv' is not one of adamw, lars; did you mean adamw?", "'x' is not one of adamw; use adamw")
    """
    known = list(map(str, names))
    near = difflib.get_close_matches(value.strip("'\""), known, 1)
    hint = f"did you mean {near[0]}?" if near else hint
    return f"{value} is not one of {', '.join(known)}" + (f"; {hint}" if hint else "")


class Registry(Generic[T]):
    """Values of one kind by name. `registry[name]` looks one up, and iteration gives the names.

    Args:
      kind: what a value is, for messages.
      choices: the names, a list that registering lengthens, such as the choices of a setting. What
        it holds at first are names of this package, which others cannot have.
      reserved: names that nothing can have.
      home: name -> the module that registers it, imported when a name of `choices` is first looked
        up; None: all is imported already.
      made_in: value -> the module that its code is in, for files of this package that register
        their names when they are imported, perhaps after others; None: this package is first.
      replace: a name from outside gets another value by registering it again, so that a cell of a
        notebook can run twice; else it keeps the first.
      protect: whether names of this package are refused to others.
      valid: whether a text can be a name.
      unknown: (name, known names) -> the error for a name that does not exist.

    >>> colours = Registry[int]("colour", reserved=("mixed",))
    >>> colours.register("red", 0xFF0000) == colours["red"], list(colours), "blue" in colours
    (True, ['red'], False)
    >>> colours.register("red", 0)
    Traceback (most recent call last):
    ValueError: colour 'red' exists already: a colour cannot be named 'red', choose another name
    >>> colours["rad"]
    Traceback (most recent call last):
    ValueError: 'rad' is not one of red; did you mean red?
    """

    def __init__(
        self,
        kind: str,
        *,
        choices: list[str] | None = None,
        reserved: Iterable[str] = (),
        home: Callable[[str], str] | None = None,
        made_in: Callable[[T], str] | None = None,
        replace: bool = False,
        protect: bool = True,
        valid: Callable[[str], bool] = str.isidentifier,
        unknown: Callable[[str, list[str]], Exception] | None = None,
    ) -> None:
        self.kind = kind
        self._names: list[str] = [] if choices is None else choices
        self._values: dict[str, T] = {}
        self._reserved = frozenset(reserved)
        self._home, self._made_in = home, made_in
        self._replace, self._valid = replace, valid
        self._unknown = unknown or (lambda name, names: ValueError(not_one_of(repr(name), names)))
        self._first = frozenset(self._names)
        self._built_in = set(self._names) if protect else set()

    def register(self, name: str, value: T) -> T:
        """Returns the value that the name has from now on. Registering an equal value again changes
        nothing, so that a module may be imported twice.

        Raises:
          ValueError: the text is no name, or the name is taken.
        """
        self.check(name, value)
        if name in self._values and not self._replace:
            return self._values[name]
        if self._is_ours(value):
            self._built_in.add(name)
        if name not in self._names:
            self._names.append(name)
        self._values[name] = value
        return value

    def _is_ours(self, value: T) -> bool:
        return self._made_in is not None and self._made_in(value).startswith(_PACKAGE)

    def check(self, name: str, value: T) -> None:
        """Raises the ValueError that `register` would raise."""
        known = self._values.get(name)
        refusal = f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind} cannot be named {name!r}"
        if not self._valid(name):
            raise ValueError(
                f"{self.kind} {name!r}: {refusal}; it needs a name of letters, digits and"
                " underscores"
            )
        first = self._made_in is None and (known is None or known == value)
        if name in self._reserved or (
            name in self._built_in and not first and not self._is_ours(value)
        ):
            raise ValueError(
                f"{self.kind} {name!r} exists already: {refusal}, this name is built in; choose"
                " another name"
            )
        if known is not None and known != value and not self._replace:
            raise ValueError(f"{self.kind} {name!r} exists already: {refusal}, choose another name")

    def __getitem__(self, name: str) -> T:
        """The value of a name. Raises the error of `unknown` if it is not registered."""
        if name not in self:
            raise self._unknown(name, list(self))
        if name not in self._values and self._home is not None:
            importlib.import_module(self._home(name))
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names and name not in self._reserved

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name not in self._reserved)

    def values(self) -> list[T]:
        """Returns all values in the order of their names."""
        return [self[name] for name in self]

    def as_dict(self) -> dict[str, T]:
        """Returns all values by name."""
        return {name: self[name] for name in self}

    @contextlib.contextmanager
    def temporary(self) -> Iterator[None]:
        """Forgets at the end of a block what was registered in it from outside, for tests.

        >>> shapes = Registry[int]("shape")
        >>> with shapes.temporary():
        ...     _ = shapes.register("square", 4)
        >>> list(shapes)
        []
        """
        names, values = list(self._names), dict(self._values)
        try:
            yield
        finally:
            ours = {n: v for n, v in self._values.items() if n in self._built_in | self._first}
            self._values = ours | values
            self._names[:] = [*names, *(name for name in ours if name not in names)]
