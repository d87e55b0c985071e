"""Kill every command that writes at random moments, run it again, and compare all its files with those of one call.

Three things happen to each command, in folders of their own, by moments that `--seed` draws:

    kills          SIGKILL, once or several times, until a call comes to the end. Half of the moments are anywhere in
                   the time that a call takes, half are a few milliseconds after something changed in the output.
    two writers    Two calls at once, with different seeds where the command has one: the files must be those of one,
                   and the other must exit with 2 and say who writes there.
    full disk      A limit on the size of files (RLIMIT_FSIZE): exit 1, one error that is not our fault, no hidden file;
                   then a call without the limit.

Every time the files must be those of a call that was left alone in a fresh process: the same names, none hidden, and
the same bytes but for times, speed and memory (VOLATILE); and nothing may be left in the temporary folder. Prints a
table on stderr and one JSON document on stdout; the exit code is 1 where anything differs.

    python recipes/kill_and_resume.py [--rounds 20] [--seed 0] [--commands train,steer] [--model FOLDER] [--short]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _killed_commands import Case, cases
from _killed_process import body, temporary_folder

# Numbers that no two calls share, wherever they stand in JSON; and the hash of a file that holds some.
VOLATILE = {"seconds", "tokens_per_second", "peak_memory", "resumed_from", "run.json"}
# Rounds of two writers and of a full disk, at most.
EXTRAS = 5
# Commands of `--short`, which a test runs.
SHORT = ("train", "steer", "attr-build")
# Processes fork from one that has imported everything, so that a start costs nothing.
_PRELOAD = [
    "braces_cli.cli.train", "braces_cli.training.loop", "braces_cli.training.run", "braces_cli.cli.steer",
    "braces_cli.evaluation.run", "braces_cli.evaluation.statistics", "braces_cli.export.merge",
    "braces_cli.export.slots", "braces_cli.export.lora", "braces_cli.export.code",
    "braces_cli.export.control_vector", "braces_cli.inspection.report", "braces_cli.inspection.maps",
    "scipy.stats", "gguf", "peft.tuners.lora", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "transformers.models.llama.modeling_llama", "pydantic", "_killed_process",
]  # fmt: skip
_DEADLINE = 600.0
# What the second of two writers says.
REFUSED = "another braces command is writing there (process "


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    said: str


class Call:
    """A `braces` process in a process group of its own, in the working folder `place`."""

    def __init__(self, place: Path, words: Sequence[str], limit: int | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(target=body, args=(str(place), list(words), writer, limit))
        self._process.start()
        writer.close()

    def alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float) -> None:
        self._process.join(seconds)

    def stop(self, when: Callable[[], bool]) -> bool:
        """SIGSTOP once `when` is true; False where the process ended before."""
        while not when():
            if not self.alive():
                return False
            time.sleep(0.0005)
        os.kill(self._process.pid or 0, signal.SIGSTOP)
        return True

    def go_on(self) -> None:
        """End what `stop` began."""
        os.kill(self._process.pid or 0, signal.SIGCONT)

    def kill(self) -> bool:
        """SIGKILL to the process and its children; False where it had ended by then, for `end` to say how."""
        self._process.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        if self._process.exitcode != -signal.SIGKILL:
            return False
        self._reader.close()
        return True

    def end(self) -> Ended:
        """Wait for the end; what it said fits into a pipe."""
        self._process.join(_DEADLINE)
        if self._process.exitcode is None:
            self.kill()
            return Ended(-1, f"no end after {_DEADLINE:.0f} s")
        said = os.read(self._reader.fileno(), 1 << 16).decode(errors="replace")
        self._reader.close()
        return Ended(self._process.exitcode, said)


def alone(place: Path, words: Sequence[str]) -> None:
    """A call that is left alone, in a fresh process."""
    place.mkdir(parents=True)
    call = [sys.executable, "-m", "braces_cli", *words]
    done = subprocess.run(call, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}")


def files(place: Path) -> dict[str, bytes]:
    """All files, hidden ones too, by their path in `place`; without what no two calls share."""
    found = (path for path in sorted(place.rglob("*")) if not path.is_dir())
    return {str(path.relative_to(place)): _stable(path) for path in found}


def _stable(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix not in (".json", ".jsonl"):
        return content
    try:
        documents = content.splitlines() if path.suffix == ".jsonl" else [content]
        return b"\n".join(json.dumps(_without(json.loads(each))).encode() for each in documents)
    except ValueError:
        return content


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in VOLATILE}
    return [_without(item) for item in value] if isinstance(value, list) else value


def differences(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """Names of files that are missing, too many, or not the same."""
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def listing(place: Path) -> tuple[tuple[str, int], ...]:
    """Names and sizes, as they change while a command writes."""
    found = []
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(OSError):
                found.append((f"{folder}/{name}", os.lstat(f"{folder}/{name}").st_size))
    return tuple(sorted(found))


def timed(place: Path, words: Sequence[str]) -> tuple[float, int]:
    """Seconds of a call that is left alone, and how often its output changes meanwhile."""
    place.mkdir(parents=True)
    began, call, changes, before = time.perf_counter(), Call(place, words), 0, listing(place)
    while call.alive():
        time.sleep(0.002)
        now = listing(place)
        changes, before = changes + (now != before), now
    ended = call.end()
    if ended.code:
        raise SystemExit(f"{' '.join(words)}: exit code {ended.code}\n{ended.said}")
    return time.perf_counter() - began, changes


def kill(place: Path, words: Sequence[str], moments: random.Random, seconds: float, changes: int) -> Ended | None:
    """Start a call and kill it at a random moment; how it ended where it had by then."""
    call = Call(place, words)
    if changes == 0 or moments.random() < 0.5:
        call.wait(moments.uniform(0.0, seconds))
    else:
        left, before = moments.randint(1, changes), listing(place)
        while left and call.alive():
            now = listing(place)
            left, before = left - (now != before), now
            time.sleep(0.0005)
        call.wait(moments.uniform(0.0, 0.01))
    return None if call.kill() else call.end()


def killed_rounds(folder: Path, case: Case, rounds: int, seed: str, most: int = 3) -> dict[str, Any]:
    """Kill calls up to `most` times each, run them to the end and compare with the files in `folder / "alone"`."""
    wanted = files(folder / "alone")
    seconds, changes = timed(folder / "timed", case.words)
    outcome: dict[str, Any] = {"rounds": rounds, "kills": 0, "identical": 0, "seconds": round(seconds, 2)}
    outcome["different"] = differences(files(folder / "timed"), wanted)
    for number in range(rounds):
        place, moments = folder / f"round-{number}", random.Random(f"{seed} {number}")
        killed, goal, ended = 0, moments.randint(1, most), None
        for _ in range(10 * goal):
            place.mkdir(exist_ok=True)
            ended = kill(place, case.words, moments, seconds, changes)
            killed += ended is None
            if killed == goal or (killed and ended is not None):
                break
            if ended is not None:
                shutil.rmtree(place)  # it ended before it could be killed once
        ended = ended or _finish(place, case.words)
        wrong = [ended.said.strip()] if ended.code else differences(files(place), wanted)
        wrong += [f"in the temporary folder: {path.name}" for path in temporary_folder(place).iterdir()]
        outcome["kills"] += killed
        outcome["identical"] += not wrong
        outcome["different"] += [f"round {number}: {name}" for name in wrong]
        _clean(place, wrong)
    return outcome


def _finish(place: Path, words: Sequence[str]) -> Ended:
    place.mkdir(exist_ok=True)
    return Call(place, words).end()


def _clean(place: Path, wrong: Sequence[str]) -> None:
    if not wrong:
        shutil.rmtree(place)
        shutil.rmtree(temporary_folder(place))


def holds_lock(place: Path) -> bool:
    """Whether a call holds a lock below `place`, and has written its name into it."""
    with suppress(FileNotFoundError):  # released meanwhile
        return any(lock.stat().st_size for lock in place.rglob(".*.lock"))
    return False


def two_writers(folder: Path, case: Case, rounds: int, seed: str) -> dict[str, Any]:
    """Two calls at once: the files are those of one of them, and the other says so.

    In every other round the first is stopped as soon as it holds the lock, until the second has ended; in the others
    the two race, and on a busy machine one may have ended before the other begins.
    """
    words = (case.words, (*case.words, *case.other))
    wanted = [files(folder / "alone")] * 2
    if case.other:
        timed(folder / "other", words[1])
        wanted[1] = files(folder / "other")
    outcome: dict[str, Any] = {"rounds": rounds, "right": 0, "refused": 0, "different": []}
    for number in range(rounds):
        place, moments = folder / f"writers-{number}", random.Random(f"{seed} writers {number}")
        place.mkdir()
        order = moments.sample((0, 1), 2)
        first = Call(place, words[order[0]])
        stopped = number % 2 == 0 and first.stop(lambda place=place: holds_lock(place))
        second = Call(place, words[order[1]])
        ended = [second.end()] if stopped else []
        if stopped:
            first.go_on()
        ended = [first.end(), *(ended or [second.end()])]
        refused = sum(end.code == 2 and REFUSED in end.said for end in ended)
        winners = [which for which, end in zip(order, ended, strict=True) if end.code == 0]
        best = [differences(files(place), wanted[which]) for which in winners]
        wrong = min(best, key=len) if best else ["none of two writers ended well"]
        if any(end.code not in (0, 2) for end in ended) or (stopped and not refused):
            wrong = [*wrong, f"ends of two writers: {ended}"]
        outcome["refused"] += refused
        outcome["right"] += not wrong
        outcome["different"] += [f"writers {number}: {name}" for name in wrong]
        _clean(place, wrong)
    return outcome


def full_disk(folder: Path, case: Case, rounds: int, seed: str) -> dict[str, Any]:
    """A limit on the size of files: a clear error, nothing hidden left, and then the right files."""
    place = folder / "alone"
    wanted = files(place)
    # A second name of a file of the base (`export code`) takes no room.
    found = [path.stat() for path in place.rglob("*") if path.is_file()]
    largest = max(file.st_size for file in found if file.st_nlink == 1)
    outcome: dict[str, Any] = {"rounds": rounds, "right": 0, "failures": 0, "different": []}
    for number in range(rounds):
        place, moments = folder / f"full-{number}", random.Random(f"{seed} full {number}")
        place.mkdir()
        ended = Call(place, case.words, limit=moments.randint(1, largest - 1)).end()
        errors = [line for line in ended.said.splitlines() if line.startswith("Error: ")]
        wrong = [f"left behind: {path.name}" for path in place.rglob(".*")]
        if ended.code != 1 or len(errors) != 1 or "fault of braces" in ended.said or "Traceback" in ended.said:
            wrong.append(f"not the error of a full disk: {ended}")
        after = _finish(place, case.words)
        wrong += [after.said.strip()] if after.code else differences(files(place), wanted)
        wrong += [f"in the temporary folder: {path.name}" for path in temporary_folder(place).iterdir()]
        outcome["failures"] += ended.code == 1
        outcome["right"] += not wrong
        outcome["different"] += [f"full disk {number}: {name}" for name in wrong]
        _clean(place, wrong)
    return outcome


def prepare(folder: Path, model: str | None, slots: bool = True) -> dict[str, Path]:
    """Inputs of all commands: rows, texts, prompts, an adapter, an attribute, and a base with slots."""
    folder.mkdir(parents=True)
    base = ("--model", model) if model else ()
    moods = {"good": "positive", "sad": "negative", "old": "neutral"}
    nouns = ("film", "town", "hotel", "end", "day")
    rows = [{"prompt": f"the {noun} is", "completion": f" {word}"} for noun in nouns for word in moods]
    texts = [{"text": f"the {n} is {word}", "mood": moods[word]} for n in nouns for word in moods]
    for name, listed in (("rows", rows), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    (folder / "prompts.txt").write_text("".join(f"the {noun}\n" for noun in nouns), encoding="utf-8")
    train = ("--data", str(folder / "rows.jsonl"), "--max-steps", "4", "--lr", "0.01", "--output-dir", "adapter")
    calls = [("train", *train), ("attr-build", "--attribute", "sad", "--output-dir", "attributes")]
    if slots:
        calls.append(("export", "slots", "--output-dir", "slots"))
    for words in calls:
        done = _finish(folder, (*words, *base))
        if done.code:
            raise SystemExit(done.said)
    return {path.stem: path.resolve() for path in folder.iterdir()}


def compare(
    folder: Path,
    names: Sequence[str] = (),
    rounds: int = 20,
    seed: int = 0,
    model: str | None = None,
    short: bool = False,
) -> dict[str, dict[str, Any]]:
    """What happened to each command, by name.

    Args:
        names: of the commands; all where none is given.
        short: one round, and the reference from no fresh process.
    """
    rounds, extras = (1, 1) if short else (rounds, min(rounds, EXTRAS))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small take longer on two threads
    slots = not names or "export lora" in names
    known = cases(prepare(folder / "inputs", model, slots), model)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"unknown command {unknown[0]}; known: {', '.join(known)}")
    found = {}
    for name in names or known:
        place, case, key = folder / name.replace(" ", "-"), known[name], f"{seed} {name}"
        (timed if short else alone)(place / "alone", case.words)
        killed = killed_rounds(place, case, rounds, key)
        writers = two_writers(place, case, extras, key)
        full = full_disk(place, case, extras, key)
        found[name] = {"killed": killed, "two_writers": writers, "full_disk": full}
        print(_row(name, found[name]), file=sys.stderr, flush=True)
    return found


def _row(name: str, outcome: dict[str, Any]) -> str:
    killed, writers, full = outcome["killed"], outcome["two_writers"], outcome["full_disk"]
    return (
        f"| {name:21} | {killed['seconds']:5} | {killed['rounds']:6} | {killed['kills']:5} | {killed['identical']:9} "
        f"| {writers['right']:>2} of {writers['rounds']:<5} | {full['right']:>2} of {full['rounds']:<3} |"
    )


def faults(found: dict[str, dict[str, Any]]) -> list[str]:
    """Everything that differed, in words."""
    return [f"{name}: {what}" for name, each in found.items() for part in each.values() for what in part["different"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of kills, for each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commands", default="", help="names, separated by commas; default: all")
    parser.add_argument("--model", help="folder of the base; default: the model that braces brings")
    parser.add_argument("--keep", type=Path, help="new folder for all runs; those that differ stay there")
    parser.add_argument("--short", action="store_true", help=f"one round of {', '.join(SHORT)}")
    args = parser.parse_args()
    names = [name for name in args.commands.split(",") if name] or (SHORT if args.short else ())
    print("| command               | s     | rounds | kills | identical | two writers | full disk |", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="braces-kill-") as work:
        if args.keep is not None:
            args.keep.mkdir(parents=True)
        found = compare(args.keep or Path(work), names, args.rounds, args.seed, args.model, args.short)
    print(json.dumps(found, indent=2))
    sys.exit(1 if faults(found) else 0)


if __name__ == "__main__":
    main()
