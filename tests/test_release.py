"""What a release needs: workflows, the container image, pre-commit and the list of changes. Each
checker is first tried on small offenders."""

import ast
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import m3i_jax

ROOT = pathlib.Path(__file__).parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"
DOCKERFILE = ROOT / "launch" / "Dockerfile"
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def parsed(path: pathlib.Path) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load(path.read_text())


def steps_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", ())]


def workflow_problems(workflow: dict[Any, Any]) -> list[str]:
    """Reasons why a workflow is unsafe or incomplete."""
    out = []
    # YAML 1.1 reads the key `on` as True
    if not ({"name", "jobs"} <= set(workflow) and ("on" in workflow or True in workflow)):
        out.append("name, on or jobs is missing")
    if workflow.get("permissions") != {"contents": "read"}:
        out.append("the workflow may do more than read")
    for name, job in workflow.get("jobs", {}).items():
        if "uses" in job:
            continue
        if "timeout-minutes" not in job:
            out.append(f"{name}: no timeout-minutes")
        if "latest" in str(job.get("runs-on", "latest")):
            out.append(f"{name}: runs-on names no version")
        for step in job.get("steps", ()):
            action = step.get("uses", "@v1")
            if not re.search(r"@(v\d+(\.\d+)*|release/v\d+|[0-9a-f]{40})$", action):
                out.append(f"{name}: {action} has no version")
            if action.startswith("actions/checkout@") and (
                step.get("with", {}).get("persist-credentials") is not False
            ):
                out.append(f"{name}: checkout keeps credentials")
            if "secrets." in json.dumps(step) or "password" in step.get("with", {}):
                out.append(f"{name}: a secret is used")
            # text that others write would be run
            if "${{ github.event" in step.get("run", ""):
                out.append(f"{name}: text of an event is part of a script")
    return out


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_workflows_are_sound(name: str) -> None:
    assert not workflow_problems(parsed(WORKFLOWS / name))


STEP: dict[str, Any] = {"uses": "actions/checkout@v7", "with": {"persist-credentials": False}}
JOB: dict[str, Any] = {"runs-on": "ubuntu-24.04", "timeout-minutes": 5, "steps": [STEP]}
SOUND: dict[Any, Any] = {
    "name": "a",
    True: {"push": None},
    "permissions": {"contents": "read"},
    "jobs": {"a": JOB},
}


@pytest.mark.parametrize(
    "offender",
    [
        {k: v for k, v in SOUND.items() if k is not True},
        SOUND | {"permissions": {"contents": "write"}},
        SOUND | {"jobs": {"a": {k: v for k, v in JOB.items() if k != "timeout-minutes"}}},
        SOUND | {"jobs": {"a": JOB | {"runs-on": "ubuntu-latest"}}},
        *(
            SOUND | {"jobs": {"a": JOB | {"steps": [step]}}}
            for step in (
                {"uses": "actions/checkout@v7"},
                {"uses": "actions/setup-python@main"},
                {"run": "echo ${{ github.event.head_commit.message }}"},
                {"run": "twine upload", "env": {"TOKEN": "${{ secrets.PYPI }}"}},
            )
        ),
    ],
)
def test_an_unsound_workflow_is_found(offender: dict[Any, Any]) -> None:
    assert not workflow_problems(SOUND) and workflow_problems(offender)


def test_every_change_is_checked_on_every_python() -> None:
    workflow = parsed(WORKFLOWS / "ci.yml")
    runs = [step["run"] for step in steps_of(workflow) if "run" in step]
    assert "bash .ci/run" in runs and (ROOT / ".ci" / "run").is_file()
    smoke = workflow["jobs"]["smoke"]
    assert smoke["strategy"]["matrix"]["python"] == PYTHONS
    assert any("launch/test.sh --python" in run and "-m smoke" in run for run in runs)
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text())
    assert classifiers == PYTHONS
    assert {"push", "pull_request", "workflow_call"} <= set(workflow[True])


def test_a_release_is_published_without_a_token() -> None:
    workflow = parsed(WORKFLOWS / "release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    jobs = workflow["jobs"]
    assert jobs["check"] == {"uses": "./.github/workflows/ci.yml"}
    order = ["check", "build", "publish", "announce"]
    assert list(jobs) == order
    assert [jobs[name].get("needs") for name in order] == [None, *order[:-1]]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["environment"] == "pypi"
    # the job that may publish runs nothing of the project
    assert all("run" not in step for step in jobs["publish"]["steps"])
    assert [name for name in jobs if "id-token" in jobs[name].get("permissions", {})] == ["publish"]
    for step in steps_of(workflow):
        for script in re.findall(r"python (\S+\.py)|bash (\S+)", step.get("run", "")):
            assert (ROOT / (script[0] or script[1])).is_file()


def release_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("m3i_jax_release", ROOT / ".ci" / "release.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tag_that_disagrees_is_refused() -> None:
    problems = release_script().problems
    citation = "a: b\nversion: 1.2.0\n"
    changes = "# Changelog\n\n## 1.2.0 - 2030-01-02\n\nNew.\n\n## 1.1.0 - 2029-01-01\n\nOld.\n"
    assert not problems("v1.2.0", "1.2.0", citation, changes)
    assert problems("v1.2.1", "1.2.0", citation, changes)
    assert problems("v1.2.0", "1.2.0", "version: 1.1.0\n", changes)
    assert problems("v1.2.0", "1.2.0", citation, changes.replace("2030-01-02", "unreleased"))
    assert problems("v1.2.0", "1.2.0", citation, changes.replace("## 1.2.0", "## 1.3.0"))
    assert problems("v1.2.0", "1.2.0", citation, changes.replace("New.", ""))


def test_notebooks_without_an_address_are_refused() -> None:
    nameless = release_script().nameless
    texts = {"a.ipynb": "git+https://github.com/me/m3i_jax", "b.ipynb": "github.com/OWNER/m3i_jax"}
    (found,) = nameless(texts)
    assert found.startswith("b.ipynb names github.com/OWNER: run python -m tests.notebooks")


def test_this_version_can_be_released_once_it_has_a_date() -> None:
    release = release_script()
    changes = (ROOT / "CHANGELOG.md").read_text()
    state, text = release.section(changes, m3i_jax.__version__)
    assert release.package_version() == m3i_jax.__version__ and text
    dated = changes.replace(
        f"{m3i_jax.__version__} - {state}", f"{m3i_jax.__version__} - 2030-01-02"
    )
    citation = (ROOT / "CITATION.cff").read_text()
    tag = f"v{m3i_jax.__version__}"
    assert not release.problems(tag, m3i_jax.__version__, citation, dated)


def test_the_newest_version_comes_first_and_says_what_breaks() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (\S+)", text, re.MULTILINE)
    assert versions[:2] == [m3i_jax.__version__, "0.1.0"], "unreleased lines belong to a version"
    _, section = release_script().section(text, m3i_jax.__version__)
    titles = re.findall(r"^### (.+)$", section, re.MULTILINE)
    assert titles[0] == "New for you" and "What breaks, and how to move" in titles
    for old, new in re.findall(
        r"^\| `m3i_jax\.(\w+)` \| `m3i_jax\.(\w+)` \|$", section, re.MULTILINE
    ):
        assert m3i_jax._RENAMED[old] == new


def test_pre_commit_has_the_ruff_of_the_tested_set() -> None:
    (repo,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    (pin,) = re.findall(r"^ruff==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert repo["repo"].endswith("/ruff-pre-commit") and repo["rev"] == f"v{pin}"
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]


INSTRUCTIONS = {
    *("ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "CMD", "ENTRYPOINT", "EXPOSE", "LABEL"),
    *("USER", "VOLUME", "HEALTHCHECK", "SHELL", "STOPSIGNAL", "ADD"),
}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, with continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines()]


def dockerfile_problems(text: str) -> list[str]:
    """What a linter of Dockerfiles would say, as far as it matters here."""
    out, known, images = [], {"PATH"}, 0
    found = instructions(text)
    for name, rest in found:
        if name not in INSTRUCTIONS:
            out.append(f"{name}: no such instruction")
        if name not in ("ARG", "FROM") and not images:
            out.append(f"{name} comes before FROM")
        if name != "RUN":
            out += [
                f"{name}: {variable} has no value"
                for variable in re.findall(r"\$\{?(\w+)", rest)
                if variable not in known
            ]
        if name == "ARG":
            known.add(rest.partition("=")[0])
        elif name == "ENV":
            pairs = [pair.partition("=") for pair in shlex.split(rest)]
            out += [f"ENV {key}: has no =" for key, equals, _ in pairs if not equals]
            known |= {key for key, _, _ in pairs}
        elif name == "FROM":
            images += 1
            known = {"PATH"}
            if not re.search(r":[^:/]*[\d}]", rest) or rest.endswith(":latest"):
                out.append(f"FROM {rest}: has no version")
        elif name == "ADD":
            out.append("ADD: use COPY")
        elif name == "WORKDIR" and not rest.startswith("/"):
            out.append(f"WORKDIR {rest}: is relative")
        elif name in ("CMD", "ENTRYPOINT"):
            try:
                assert isinstance(json.loads(rest), list)
            except (ValueError, AssertionError):
                out.append(f"{name}: is no JSON list, so signals do not reach the program")
        elif name == "RUN":
            if "apt-get install" in rest and "--no-install-recommends" not in rest:
                out.append("RUN: apt-get install without --no-install-recommends")
            if "apt-get install" in rest and "/var/lib/apt/lists" not in rest:
                out.append("RUN: the lists of apt stay in the image")
            if re.search(r"\bsudo\b", rest):
                out.append("RUN: sudo")
            if re.search(r"\bcd ", rest):
                out.append("RUN: cd; use WORKDIR")
        if re.search(r"(?i)(token|password|secret)\s*=", rest):
            out.append(f"{name}: a secret in the image")
    out += [
        f"{name}: only the last counts"
        for name in ("CMD", "ENTRYPOINT")
        if [n for n, _ in found].count(name) > 1
    ]
    return out  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "FROM python",
        "FROM python:latest",
        "COPPY . .",
        "ADD https://example.org/a.tar /a",
        "WORKDIR m3i",
        "CMD m3i-jax --help",
        'CMD ["a"]\nCMD ["b"]',
        "RUN apt-get install -y git && rm -rf /var/lib/apt/lists/*",
        "RUN apt-get install -y --no-install-recommends git",
        "RUN sudo true",
        "RUN cd /m3i && make",
        "ENV API_TOKEN=abc",
        "ENV KEY value",
        "COPY ${SOURCE} /m3i",
    ],
)
def test_a_bad_line_of_a_dockerfile_is_found(line: str) -> None:
    good = 'ARG A=3.11\nFROM python:${A}-slim\nCOPY . .\nRUN ["true"]\n'
    assert not dockerfile_problems(good) and dockerfile_problems(good + line + "\n")
    assert dockerfile_problems("COPY . .\n" + good)


def ignored_by_docker() -> list[str]:
    text = (ROOT / "launch" / "Dockerfile.dockerignore").read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_holds_the_project_where_the_launchers_look() -> None:
    text = DOCKERFILE.read_text()
    assert not dockerfile_problems(text)
    found = instructions(text)
    assert ("WORKDIR", "/m3i") in found and ("COPY", ". .") in found
    ((_, run),) = [pair for pair in found if pair[0] == "RUN"]
    shell, flag, script = json.loads(run)
    assert [shell, flag] == ["bash", "-c"] and "prepare /m3i/.venv" in script
    done = subprocess.run(["bash", "-n", "-c", script], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    # what `prepare` and setup.py read is not left out
    for name in ("setup.py", "requirements.txt", "README.md", "m3i_jax", "configs", "launch"):
        assert name not in ignored_by_docker() and (ROOT / name).exists()
    assert {".git", "tests", "**/__pycache__"} <= set(ignored_by_docker())
    container = (ROOT / "launch" / "gke.yaml").read_text()
    assert "launch/Dockerfile" in container and "workingDir: /m3i" in container
    task = parsed(ROOT / "launch" / "sky.yaml")
    for script in (task["setup"], task["run"]):
        assert "if [ -x /m3i/.venv/bin/python ]; then export M3I_VENV=/m3i/.venv; fi" in script
    assert "launch/Dockerfile" in (ROOT / "launch" / "sky.yaml").read_text()


def test_the_image_has_a_python_that_the_package_supports() -> None:
    (version,) = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert version in PYTHONS
    extras = re.findall(r"EXTRA=(\w+)", DOCKERFILE.read_text())
    setup = ast.unparse(ast.parse((ROOT / "setup.py").read_text()))
    assert extras and all(f"'{extra}':" in setup for extra in extras)


def test_the_release_script_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "release.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "release.py check v" in done.stderr
