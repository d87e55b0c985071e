"""Kill every command that writes at random moments, run it again, and compare its files with an undisturbed call's.

Each command passes three tests, in separate folders, at moments drawn from `--seed`:

    kills          SIGKILL, one to three times, then a call that runs to its end. Half of the moments are anywhere in
                   the duration of a call, half are a few milliseconds after a change in the output.
    two writers    Two calls at once, with different seeds where the command has a seed: the files must be those of one
                   call, and the other call must exit with 2 and name the process that writes.
    full disk      A limit on the size of files (RLIMIT_FSIZE): exit code 1, one error, no hidden file; then a call
                   without the limit.

After each test the files must equal those of an undisturbed call in a fresh process: the same names, none hidden, and
the same bytes except times, speed and memory (VOLATILE). The temporary folder must be empty. Prints a table on stderr
and one JSON document on stdout; the exit code is 1 if anything differs.

    python recipes/kill_and_resume.py [--rounds 20] [--seed 0] [--commands train,steer] [--model FOLDER] [--short]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pkgutil
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import braces_cli

# JSON values that differ between any two calls, at any depth.
VOLATILE = {"seconds", "tokens_per_second", "peak_memory", "resumed_from", "run.json"}
# Maximal number of rounds of two writers and of a full disk.
EXTRAS = 5
SHORT = ("train", "steer", "attr-build")
# Processes fork from a process that has imported these modules, so that starting a call takes no time.
_LIBRARIES = (
    "scipy.stats", "gguf", "peft.tuners.lora", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "transformers.models.llama.modeling_llama", "pydantic",
)  # fmt: skip
_DEADLINE = 600.0
# Message of the second of two writers.
REFUSED = "another braces command is writing there (process "


@dataclass(frozen=True)
class Case:
    """A command: its words, with outputs relative to the working folder, and more words of a second writer."""

    words: tuple[str, ...]
    other: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Exit code and stderr of a process."""

    code: int
    stderr: str


def cases(inputs: dict[str, Path], model: str | None) -> dict[str, Case]:
    """Return the commands by name, without those whose packages are missing."""
    base = ("--model", model) if model else ()
    rows, texts, adapter = (str(inputs[name]) for name in ("rows", "texts", "adapter"))
    attribute = ("--attribute", "sad", "--attributes", str(inputs["attributes"]))
    seed, fresh = ("--seed", "1"), ("--overwrite", "--quiet")
    train = (
        "train", *base, "--max-steps", "12", "--batch-size", "2", "--gradient-accumulation", "2", "--lr", "0.01",
        "--logging-steps", "2", "--save-steps", "2", "--eval-data", texts, "--output-dir", "out", "--resume", "--quiet",
    )  # fmt: skip
    moods = ("--attribute-field", "mood", "--opposites", "positive:negative")
    evaluate = (
        "eval", *base, "--adapter", adapter, "--tasks", "embedded_popqa,perplexity", "--limit", "6", "--task-data",
        f"perplexity={texts}", "--log-samples", "--output-dir", "out", "--resume", "--quiet",
    )  # fmt: skip
    steer = (
        "steer", *base, "--prompts", str(inputs["prompts"]), "--num-samples", "4", "--batch-size", "2",
        "--max-new-tokens", "12", *attribute, "--s", "2", "--output", "out.jsonl", "--resume", "--quiet",
    )  # fmt: skip
    lora = ("--base", str(inputs["adapter"].with_name("slots")), "--adapter", adapter, "--gguf", "out/adapter.gguf")
    found = {
        "train": Case((*train, "--data", rows), seed),
        "train texts": Case((*train, "--data", texts), seed),
        "train streamed": Case((*train, "--data", texts, "--streaming"), seed),
        "train attributes": Case((*train, "--data", texts, *moods), seed),
        "train lora": Case((*train, "--data", texts, "--method", "lora"), seed),
        "eval": Case(evaluate, seed),
        "steer": Case(steer, seed),
        "attr-build": Case(("attr-build", *base, "--attribute", "joyful", "--output-dir", "out", "--overwrite")),
        "merge": Case(("merge", "--adapter", adapter, "--output-dir", "out", *fresh)),
        "export slots": Case(("export", "slots", *base, "--output-dir", "out", *fresh)),
        "export lora": Case(("export", "lora", *lora, "--output-dir", "out", *fresh)),
        "export code": Case(("export", "code", "--adapter", adapter, "--output-dir", "out", *fresh)),
        "export control-vector": Case(
            ("export", "control-vector", *base, *attribute, "--layers", "1-", "--output", "out.gguf", *fresh)
        ),
        "inspect report": Case(("inspect", "report", "--adapter", adapter, "--output", "out.html", *fresh)),
        "inspect values": Case(("inspect", "values", *base, "--output", "out.parquet", *fresh)),
    }
    packages = {"train lora": ["peft"], "export lora": ["peft", "gguf"], "export control-vector": ["gguf"]}
    missing = {name: [each for each in needed if find_spec(each) is None] for name, needed in packages.items()}
    for name in (name for name, each in missing.items() if each):
        print(f"{name} is left out: {' and '.join(missing[name])} not installed", file=sys.stderr)
        del found[name]
    return found


def prepare(folder: Path, model: str | None, slots: bool = True) -> dict[str, Path]:
    """Write the inputs of all commands: rows, texts, prompts, an adapter, an attribute, and a base with slots."""
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
        done = finish(folder, (*words, *base))
        if done.code:
            raise SystemExit(done.stderr)
    return {path.stem: path.resolve() for path in folder.iterdir()}


class Call:
    """A `braces` process in its process group, started in the working folder `place`."""

    def __init__(self, place: Path, words: Sequence[str], limit: int | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        modules = [each.name for each in pkgutil.walk_packages(braces_cli.__path__, "braces_cli.")]
        preload = [name for name in modules if not name.endswith("__main__")]
        context.set_forkserver_preload([*preload, *_LIBRARIES, "kill_and_resume"])
        self._reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(target=run_braces, args=(str(place), list(words), writer, limit))
        self._process.start()
        writer.close()

    def alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float) -> None:
        self._process.join(seconds)

    def stop(self, when: Callable[[], bool]) -> bool:
        """Send SIGSTOP once `when` is true. Return False if the process ended before."""
        while not when():
            if not self.alive():
                return False
            time.sleep(0.0005)
        os.kill(self._process.pid or 0, signal.SIGSTOP)
        return True

    def resume(self) -> None:
        """Continue a stopped process."""
        os.kill(self._process.pid or 0, signal.SIGCONT)

    def kill(self) -> bool:
        """Kill the process and its children. Return False if the process had already ended."""
        self._process.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        if self._process.exitcode != -signal.SIGKILL:
            return False
        self._reader.close()
        return True

    def end(self) -> Ended:
        """Wait for the end. The stderr of a command fits into the pipe."""
        self._process.join(_DEADLINE)
        if self._process.exitcode is None:
            self.kill()
            return Ended(-1, f"no end after {_DEADLINE:.0f} s")
        stderr = os.read(self._reader.fileno(), 1 << 16).decode(errors="replace")
        self._reader.close()
        return Ended(self._process.exitcode, stderr)


def run_braces(place: str, words: list[str], writer: Any, limit: int | None) -> None:
    """Run `braces WORDS` in this process, with a limit on the bytes of a file and a separate temporary folder."""
    from braces_cli.cli.main import main

    os.setsid()
    os.chdir(place)
    temporary_folder(Path(place)).mkdir(exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary_folder(Path(place)))
    os.dup2(writer.fileno(), 2)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", closefd=False)  # noqa: SIM115  until the process ends
    sys.argv = ["braces", *words]
    subprocess.run = _forked  # type: ignore[assignment]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main(words)


def _forked(call: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Fork the process that verifies an export (`python -I PROGRAM ...`) in the place of `subprocess.run`.

    A fresh process takes ten times as long to import transformers as the rest of a merge.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # includes the lock of the output
        sys.argv = [str(word) for word in call[2:]]
        for name in [name for name in sys.modules if name.partition(".")[0] == "braces_cli"]:
            del sys.modules[name]  # the program blocks the import of the package
        code = 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as stream:
        stderr = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess(call, code, "", stderr)


def temporary_folder(place: Path) -> Path:
    """Return the TMPDIR of a process in the working folder `place`."""
    return place.with_name(f"{place.name}.tmp")


def finish(place: Path, words: Sequence[str]) -> Ended:
    """Run a call to its end."""
    place.mkdir(exist_ok=True)
    return Call(place, words).end()


def undisturbed(place: Path, words: Sequence[str]) -> None:
    """Run a call in a fresh process."""
    place.mkdir(parents=True)
    call = [sys.executable, "-m", "braces_cli", *words]
    done = subprocess.run(call, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}")


def timed(place: Path, words: Sequence[str]) -> tuple[float, int]:
    """Run a call to its end. Return its seconds and the number of changes in its output."""
    place.mkdir(parents=True)
    began, call, changes, before = time.perf_counter(), Call(place, words), 0, listing(place)
    while call.alive():
        time.sleep(0.002)
        now = listing(place)
        changes, before = changes + (now != before), now
    ended = call.end()
    if ended.code:
        raise SystemExit(f"{' '.join(words)}: exit code {ended.code}\n{ended.stderr}")
    return time.perf_counter() - began, changes


def files(place: Path) -> dict[str, bytes]:
    """Return the content of all files, hidden ones included, by path, without VOLATILE values."""
    return {str(path.relative_to(place)): _stable(path) for path in sorted(place.rglob("*")) if not path.is_dir()}


def _stable(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix not in (".json", ".jsonl"):
        return content
    try:
        documents = content.splitlines() if path.suffix == ".jsonl" else [content]
        return b"\n".join(json.dumps(_without_volatile(json.loads(each))).encode() for each in documents)
    except ValueError:
        return content


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in VOLATILE}
    return [_without_volatile(item) for item in value] if isinstance(value, list) else value


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Return the names of files that are missing, unexpected or different."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def listing(place: Path) -> tuple[tuple[str, int], ...]:
    """Return names and sizes of all files below a folder that may change meanwhile."""
    found = []
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(OSError):
                found.append((f"{folder}/{name}", os.lstat(f"{folder}/{name}").st_size))
    return tuple(sorted(found))


def kill_once(place: Path, words: Sequence[str], moments: random.Random, duration: tuple[float, int]) -> Ended | None:
    """Start a call and kill it at a random moment. Return None, or how the call ended before that moment."""
    seconds, changes = duration
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


def _wrong(place: Path, ended: Ended, expected: dict[str, bytes]) -> list[str]:
    """Return the differences after the last call in `place`."""
    wrong = [ended.stderr.strip()] if ended.code else differences(files(place), expected)
    wrong += [f"in the temporary folder: {path.name}" for path in temporary_folder(place).iterdir()]
    return wrong


def _clean(place: Path, wrong: Sequence[str]) -> None:
    if not wrong:
        shutil.rmtree(place)
        shutil.rmtree(temporary_folder(place))


def killed_rounds(
    folder: Path, case: Case, rounds: int, seed: str, duration: tuple[float, int], most: int
) -> dict[str, Any]:
    """Kill calls up to `most` times per round, run the last one to its end, and compare with `folder / "alone"`."""
    expected = files(folder / "alone")
    outcome: dict[str, Any] = {"rounds": rounds, "kills": 0, "identical": 0, "seconds": round(duration[0], 2)}
    outcome["different"] = differences(files(folder / "timed"), expected) if (folder / "timed").exists() else []
    for number in range(rounds):
        place, moments = folder / f"round-{number}", random.Random(f"{seed} {number}")
        killed, goal, ended = 0, moments.randint(1, most), None
        for _ in range(10 * goal):
            place.mkdir(exist_ok=True)
            ended = kill_once(place, case.words, moments, duration)
            killed += ended is None
            if killed == goal or (killed and ended is not None):
                break
            if ended is not None:
                shutil.rmtree(place)  # the call ended before its first kill
        wrong = _wrong(place, ended or finish(place, case.words), expected)
        outcome["kills"] += killed
        outcome["identical"] += not wrong
        outcome["different"] += [f"round {number}: {name}" for name in wrong]
        _clean(place, wrong)
    return outcome


def holds_lock(place: Path) -> bool:
    """Return True if a call holds a lock below `place` and has written its process into the lock file."""
    with suppress(FileNotFoundError):  # released meanwhile
        return any(lock.stat().st_size for lock in place.rglob(".*.lock"))
    return False


def two_writers(folder: Path, case: Case, rounds: int, seed: str) -> dict[str, Any]:
    """Start two calls at once: the files must be those of one call, and the other call must be refused.

    In every other round the first call is stopped once it holds the lock, until the second call has ended. In the other
    rounds both calls race, and on a busy machine one may end before the other starts.
    """
    words = (case.words, (*case.words, *case.other))
    expected = [files(folder / "alone")] * 2
    if case.other:
        timed(folder / "other", words[1])
        expected[1] = files(folder / "other")
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
            first.resume()
        ended = [first.end(), *(ended or [second.end()])]
        refused = sum(end.code == 2 and REFUSED in end.stderr for end in ended)
        winners = [which for which, end in zip(order, ended, strict=True) if end.code == 0]
        compared = [differences(files(place), expected[which]) for which in winners]
        wrong = min(compared, key=len) if compared else ["both writers failed"]
        if any(end.code not in (0, 2) for end in ended) or (stopped and not refused):
            wrong = [*wrong, f"ends of two writers: {ended}"]
        outcome["refused"] += refused
        outcome["right"] += not wrong
        outcome["different"] += [f"writers {number}: {name}" for name in wrong]
        _clean(place, wrong)
    return outcome


def full_disk(folder: Path, case: Case, rounds: int, seed: str) -> dict[str, Any]:
    """Limit the size of files: one clear error, no hidden file, and the right files from a second call."""
    expected = files(folder / "alone")
    # A hard link to a file of the base (`export code`) writes no bytes.
    found = [path.stat() for path in (folder / "alone").rglob("*") if path.is_file()]
    largest = max(file.st_size for file in found if file.st_nlink == 1)
    outcome: dict[str, Any] = {"rounds": rounds, "right": 0, "failures": 0, "different": []}
    for number in range(rounds):
        place, moments = folder / f"full-{number}", random.Random(f"{seed} full {number}")
        place.mkdir()
        ended = Call(place, case.words, limit=moments.randint(1, largest - 1)).end()
        errors = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
        wrong = [f"hidden file: {path.name}" for path in place.rglob(".*")]
        if ended.code != 1 or len(errors) != 1 or "fault of braces" in ended.stderr or "Traceback" in ended.stderr:
            wrong.append(f"not the error of a full disk: {ended}")
        wrong += _wrong(place, finish(place, case.words), expected)
        outcome["failures"] += ended.code == 1
        outcome["right"] += not wrong
        outcome["different"] += [f"full disk {number}: {name}" for name in wrong]
        _clean(place, wrong)
    return outcome


def compare(
    folder: Path,
    names: Sequence[str] = (),
    rounds: int = 20,
    seed: int = 0,
    model: str | None = None,
    short: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return the outcome of each command by name; `short` runs one round and no fresh process."""
    rounds, extras = (1, 1) if short else (rounds, min(rounds, EXTRAS))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices are slower with two threads
    known = cases(prepare(folder / "inputs", model, not names or "export lora" in names), model)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"unknown command {unknown[0]}; known: {', '.join(known)}")
    found = {}
    for name in names or known:
        place, case, key = folder / name.replace(" ", "-"), known[name], f"{seed} {name}"
        if short:
            duration = timed(place / "alone", case.words)
        else:
            undisturbed(place / "alone", case.words)
            duration = timed(place / "timed", case.words)
        killed = killed_rounds(place, case, rounds, key, duration, most=1 if short else 3)
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
    """Return all differences as text."""
    return [f"{name}: {what}" for name, each in found.items() for part in each.values() for what in part["different"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of kills per command")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--commands", default="", help="names, separated by commas; default: all")
    parser.add_argument("--model", help="folder of the base; default: the embedded model")
    parser.add_argument("--keep", type=Path, help="new folder for all runs; runs that differ are kept")
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
