"""Steps of a release, .github/workflows/release.yml:

python .ci/release.py check v0.2.0    # tag, version, CITATION.cff and CHANGELOG.md agree, and
                                      # notebooks have the address of the project
python .ci/release.py notes v0.2.0    # prints the section of CHANGELOG.md
python .ci/release.py build dist      # wheel and sdist, without network
"""

import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def section(changelog: str, version: str) -> tuple[str, str]:
    """(state, text) of a version's section: what follows the version in its title, such as a date,
    and the lines below."""
    pattern = rf"^## {re.escape(version)} - (.+?)\n(.*?)(?=^## |\Z)"
    found = re.search(pattern, changelog, re.MULTILINE | re.DOTALL)
    return (found[1].strip(), found[2].strip()) if found else ("", "")


def problems(tag: str, version: str, citation: str, changelog: str) -> list[str]:
    """Reasons why the tag cannot be published."""
    state, text = section(changelog, version)
    out = []
    if tag != f"v{version}":
        out.append(f"the tag is {tag}, but m3i_jax/version.py has {version}: tag v{version}")
    if f"\nversion: {version}\n" not in citation:
        out.append(f"CITATION.cff has another version than {version}")
    if not text:
        out.append(f"CHANGELOG.md has no section '## {version} - DATE'")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", state):
        out.append(f"CHANGELOG.md: {version} is '{state}': write the date of the release")
    return out


def nameless(notebooks: dict[str, str]) -> list[str]:
    """Reasons why notebooks, {name: text}, cannot be published: they have no address yet."""
    return [
        f"{name} names github.com/OWNER: run python -m tests.notebooks --owner ACCOUNT"
        for name, text in sorted(notebooks.items())
        if "/OWNER/" in text
    ]


def package_version() -> str:
    text = (ROOT / "m3i_jax" / "version.py").read_text()
    found = re.search(r'__version__ = "([^"]+)"', text)
    assert found
    return found[1]


def build(directory: str) -> list[str]:
    """Build wheel and sdist into a directory."""
    from setuptools import build_meta

    target = str(pathlib.Path(directory).resolve())
    os.chdir(ROOT)
    return [build_meta.build_sdist(target), build_meta.build_wheel(target)]


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("check", "notes", "build"):
        print(__doc__, file=sys.stderr)
        return 2
    step, value = arguments
    if step == "build":
        print(*build(value)[-2:], sep="\n")
        return 0
    changelog = (ROOT / "CHANGELOG.md").read_text()
    if step == "notes":
        print(section(changelog, value.removeprefix("v"))[1])
        return 0
    found = problems(value, package_version(), (ROOT / "CITATION.cff").read_text(), changelog)
    files = (ROOT / "configs" / "notebooks").glob("*.ipynb")
    found += nameless({path.name: path.read_text() for path in files})
    for line in found:
        print(f"release.py: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
