"""A fuzzer of the command line and of files.

    python -m tests.faults.fuzz --minutes 60 [--seed S] \
        [--only settings,commands,scripts,steps,of_data,of_a_run,surroundings]
    python -m tests.faults.fuzz --cases 20 --seed 1

Each case is a command in its own directory and its own process, which is forked from one that has
imported everything; one of twenty, and those with other environment variables, start Python anew,
so that the fork hides nothing. A command must exit with 0, 2 or 3; unless 0, print one line on
stderr besides the log and no traceback; refuse within ten seconds of processor time; and change
nothing outside the working directory. With a damaged file of a run, the result must be equal to
that without the damage, or the output must differ. Settings are also checked in this process,
thousands a minute. Exits with 1 and prints the commands if a case fails."""

import argparse
import collections
import contextlib
import gc
import itertools
import os
import pathlib
import re
import shlex
import shutil
import sys
import tempfile
import time
from typing import Any

import hypothesis
import jax
import numpy as np
from hypothesis import HealthCheck, Phase
from PIL import Image

from m3i_jax import config
from m3i_jax.data import tokenizer
from m3i_jax.errors import UserError
from tests import fork_server
from tests.faults import fuzz_cases as cases
from tests.faults import fuzz_damage
from tests.faults.fuzz_command import Done, Room, command
from tests.faults.hostile import tar
from tests.test_main import TINY, environment

PROCESSOR = 10.0  # seconds of a refusal
ANEW = 20  # commands of which one starts Python anew
LOG = re.compile(
    r"^(WARNING|INFO|ERROR|[IWE]\d{4} |\d\d:\d\d:\d\d |warning:|m3i_jax: warning:|.*Warning: |  )"
)


def plain(text: str, room: Room) -> list[str]:
    """The lines of an output without what differs from run to run."""
    text = text.replace(str(room.place), "ROOM")
    return [re.sub(r"[\d.,:]+", "#", line) for line in text.splitlines()]


def result(room: Room, mode: str) -> bytes:
    """The results that a mode wrote to a run."""
    made = {"report": "report.html", "preview": "preview.png", "eval": "eval.json"}.get(mode)
    path = room.place / "run" / made if made else None
    return (
        path.read_bytes().replace(os.fsencode(room.place), b"ROOM")
        if path and path.is_file()
        else b""
    )


class Fuzzer:
    """Templates of data and of a run, made once, and the failed cases."""

    def __init__(self, folder: pathlib.Path, log: Any = print) -> None:
        self.folder, self.log = folder, log
        self.found: dict[str, list[str]] = collections.defaultdict(list)
        self.counts: collections.Counter[str] = collections.Counter()
        self.kind = ""
        self.commands: collections.Counter[str] = collections.Counter()  # by kind
        self._some = itertools.count()
        self._whole: dict[tuple[str, ...], tuple[bytes, list[str]]] = {}
        data = folder / "data"
        some = np.random.default_rng(0)
        for label in range(2):
            (data / "folder" / str(label)).mkdir(parents=True)
            for i in range(6):
                Image.fromarray(some.integers(0, 256, (40, 48, 3), np.uint8)).save(
                    data / "folder" / str(label) / f"{i}.png"
                )
                (data / "folder" / str(label) / f"{i}.txt").write_text(f"a red cat of {label}\n")
        jpeg = (data / "folder" / "0" / "0.png").read_bytes()
        for k in range(2):
            members = [
                (f"{k}{i}.{end}", text)
                for i in range(6)
                for end, text in (("png", jpeg), ("txt", b"a dog"), ("json", b'{"label": 1}'))
            ]
            tar(data / "tars" / f"{k}.tar", members)
        for name in ("names", "vocabulary", "weights", "tensors"):
            (data / name).mkdir()
        (data / "names" / "names.json").write_text('["cat", "dog"]')
        import gzip

        with gzip.open(data / "vocabulary" / "v.gz", "wt") as file:
            characters = list(tokenizer._byte_characters())
            pairs = [f"{a} {b}" for a in characters for b in characters][: tokenizer._MERGES]
            file.write("#version\n" + "\n".join(pairs) + "\n")
        arrays = {
            "cls_token": np.zeros((1, 1, 192), np.float32),
            "pos_embed": np.zeros((1, 197, 192), np.float32),
        }
        np.savez(data / "weights" / "w.npz", **arrays)  # type: ignore[arg-type]
        header = b'{"cls_token":{"dtype":"F32","shape":[1,1,4],"data_offsets":[0,16]}}'
        (data / "tensors" / "w.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + bytes(16)
        )

    def train(self) -> None:
        """Train the run that is damaged later, with the files that the modes write."""
        room = Room(self.folder / "made")
        for name in ("home", "tmp"):
            (room.place / name).mkdir(parents=True)
        start = [f"--config={cases.ROOT}/configs/quickstart.py", "--workdir={W}", *TINY, *cases.RUN]
        done = command([room.filled(text) for text in start], room, limited=False)
        if done.code:
            raise SystemExit(
                f"the run that files are taken from failed: {done.code}\n{done.err[-2000:]}"
            )

    def room(self, case: cases.Case, *, whole: bool = False) -> Room:
        place = pathlib.Path(tempfile.mkdtemp(dir=self.folder, prefix="room-"))
        room = Room(place)
        for name in ("home", "tmp"):
            (place / name).mkdir()
        fuzz_damage.copy_folder(self.folder / "data", place / "data")
        if case.room == "run":
            fuzz_damage.copy_folder(self.folder / "made" / "run", place / "run")
        if case.script:
            (place / "mine.py").write_bytes(case.script)
        if case.damage and not whole:
            there = fuzz_damage.files(pathlib.Path(room.filled(case.target[0])))
            if there:
                path = there[case.target[1] % len(there)]
                with contextlib.suppress(OSError):
                    fuzz_damage.apply(
                        case.damage, path, [other for other in there if other != path]
                    )
                self.changed = str(path.relative_to(place))
        return room

    def whole(self, case: cases.Case) -> tuple[bytes, list[str]]:
        """Files and output of the command without the damage."""
        if case.arguments not in self._whole:
            room = self.room(case, whole=True)
            done = command([room.filled(text) for text in case.arguments], room)
            self._whole[case.arguments] = (
                result(room, mode_of(case)),
                plain(done.out + done.err, room),
            )
            shutil.rmtree(room.place, ignore_errors=True)
        return self._whole[case.arguments]

    def trial(self, case: cases.Case) -> list[str]:
        """Problems of the command of a case."""
        if any("\0" in text for text in case.arguments):
            return []  # no command line can have it
        self.changed = ""
        if case.shown and self.resolved(case) and next(self._some) % 5:
            return []  # refused, as it would be there
        room = self.room(case)
        before = room.outside()
        self.commands[self.kind] += 1
        anew = dict(case.environment)
        if anew or self.commands.total() % ANEW == 0:
            self.counts["anew"] += 1
            done = command(
                [room.filled(text) for text in case.arguments],
                room,
                environment={name: room.filled(text) for name, text in anew.items()},
            )
        else:
            done = command([room.filled(text) for text in case.arguments], room)
        after = room.outside()
        wrong = []
        lines = [line for line in done.err.splitlines() if not LOG.match(line)]
        if done.late:
            begun = ("show", "preview", "data", "", *cases.STEP_MODES)
            if case.damage is None and mode_of(case) in begun:
                self.counts["slow"] += 1  # much was asked for, and it was begun
                return []
            wrong.append(f"did not end in {done.seconds:.0f} s of the processor")
        elif done.code not in (0, 2, 3):
            wrong.append(f"exit {done.code}")
        if "Traceback" in done.err + done.out:
            wrong.append("traceback")
        if done.code in (2, 3) and (len(lines) != 1 or not lines[0].startswith("m3i_jax: ")):
            wrong.append(f"{len(lines)} lines on stderr")
        if done.code in (2, 3) and done.seconds > PROCESSOR + 5 * case.judged:
            wrong.append(f"refused after {done.seconds:.0f} s of processor")
        if moved := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
            wrong.append(f"touched {moved[0].replace(str(room.place), 'ROOM')}")
        if case.judged and not wrong and done.code == 0:
            made, printed = self.whole(case)
            if result(room, mode_of(case)) != made and plain(done.out + done.err, room) == printed:
                wrong.append(f"another result of {mode_of(case)} without a word")
        self.counts[f"exit {done.code}"] += 1
        if wrong:
            self.note(case, wrong, done, room)
        shutil.rmtree(room.place, ignore_errors=True)
        return wrong

    def note(self, case: cases.Case, wrong: list[str], done: Done, room: Room) -> None:
        frames = re.findall(r'File ".*?/(m3i_jax/[^"]+)", line \d+, in (\w+)', done.err)
        last = [line for line in done.err.splitlines() if line.strip()][-2:-1] or [""]
        name = (
            "; ".join(wrong)
            + (f" at {frames[-1][0]}:{frames[-1][1]}" if frames else "")
            + " | "
            + re.sub(r"[\d']+", "#", last[0])[:80]
        )
        if len(self.found[name]) < 2:
            text = shlex.join(case.arguments)[:1500] + (
                f"  [{case.damage} of {self.changed}]" if case.damage else ""
            )
            text += f"  [script {case.script[:300]!r}]" if case.script else ""
            text += f"  [{dict(case.environment)}]" if case.environment else ""
            self.found[name].append(text)
            self.log(
                f"FOUND {name}\n  {text}\n  {done.err.replace(str(room.place), 'ROOM')[-1500:]}",
                flush=True,
            )

    def resolved(self, case: cases.Case) -> bool:
        """Resolve the settings of a case in this process: a configuration, or UserError with one
        line. True if they are refused."""
        if any("\0" in text for text in case.arguments):
            return True
        self.counts["resolved"] += 1
        try:
            made = config.load_config(f"{cases.ROOT}/configs/quickstart.py")
            config.apply_overrides(made, cases.text_of(case.arguments))
            config.resolve(made)
        except UserError as error:
            if "\n" in str(error) and "\n" not in "".join(case.arguments):
                self.found["a refusal of several lines"].append(str(error))
            return True
        except Exception as error:  # noqa: BLE001
            name = f"{type(error).__name__}: {str(error)[:80]}"
            self.found[name].append(shlex.join(case.arguments[-4:])[:500])
            self.log(f"FOUND {name}\n  {self.found[name][-1]}", flush=True)
        return False


def mode_of(case: cases.Case) -> str:
    return next(
        (text.removeprefix("--mode=") for text in case.arguments if text.startswith("--mode=")), ""
    )


def examples(strategy: Any, number: int, seed: int, use: Any) -> None:
    """A number of examples of a strategy, the same for a seed."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @hypothesis.given(strategy)
    def run(case: Any) -> None:
        use(case)

    run()


def imported(compiled: pathlib.Path) -> None:
    """Import everything that a mode imports, once for all children; no device is used, so that a
    child can initialize its own.

    Args:
      compiled: directory of what they compile, which the environment may name, too.
    """
    options = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for option, value in options.items():
        jax.config.update(option, value)
        os.environ[option.upper()] = str(value)
    # one device and the fastest compilation; XLA reads it when a child initializes its device
    os.environ["XLA_FLAGS"] = environment()["XLA_FLAGS"]
    gc.set_threshold(100_000, 10, 10)
    fork_server.import_all()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.fuzz", description="A fuzzer of the command line and of files."
    )
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="how long; 0: as many as --cases says"
    )
    parser.add_argument("--cases", type=int, default=100, help="commands, without --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default=",".join(cases.KINDS), help=f"kinds of cases, of {','.join(cases.KINDS)}"
    )
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> int:
    asked = parse(arguments)
    kinds = asked.only.split(",")
    began, last = time.monotonic(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="m3i_jax_fuzz_") as folder:
        imported(pathlib.Path(folder) / "compiled")
        fuzzer = Fuzzer(pathlib.Path(folder))
        if {"of_a_run", "commands", "steps", "surroundings"} & set(kinds):
            fuzzer.train()
        seed = asked.seed * 100_003
        while True:
            for kind in kinds:
                seed += 1
                known, fuzzer.kind = len(fuzzer.found), kind
                if kind == "settings":
                    examples(cases.settings(), 200, seed, fuzzer.resolved)
                some = max(1, min(10, asked.cases // len(kinds)))
                number = cases.OF_A_ROUND[kind] if asked.minutes else some
                examples(cases.KINDS[kind], number, seed, fuzzer.trial)
                if len(fuzzer.found) > known:
                    last = time.monotonic()
                if asked.minutes:
                    print(
                        f"{(time.monotonic() - began) / 60:.1f} minutes, {kind}:"
                        f" {dict(fuzzer.counts)}",
                        flush=True,
                    )
            if (time.monotonic() - began) / 60 >= asked.minutes:
                break
        minutes, quiet = (time.monotonic() - began) / 60, (time.monotonic() - last) / 60
        print(f"commands: {fuzzer.commands.total()}, {dict(fuzzer.commands)}")
        print(f"{minutes:.1f} minutes, seed {asked.seed}: {dict(fuzzer.counts)}")
        print(
            f"{len(fuzzer.found)} kinds of fault found; nothing new for the last {quiet:.1f}"
            " minutes"
        )
        for name, lines in fuzzer.found.items():
            print(f"- {name}\n    {lines[0]}")
        return 1 if fuzzer.found else 0


if __name__ == "__main__":
    sys.exit(run())
