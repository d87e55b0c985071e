"""What does `braces` make of bad input? Seeded cases over every kind of input, each run as a call of the command line.

A case breaks one thing of a good input and knows which exit codes are right. Wrong is another exit code, a traceback, a
"fault of braces", no or several `Error:` lines, a control character in any output, 20 seconds of CPU time, a file left
behind or changed by a call that failed, and code of an input that was executed.

Run     python recipes/studies/bad_inputs [--cases 500] [--seed 0] [--kinds rows,yaml] [--out FOLDER]
Replay  python recipes/studies/bad_inputs --replay 0/rows/17       prints the call and what it said; keeps its folder
Other   PYTHONPATH=CHECKOUT python recipes/studies/bad_inputs ...  runs another checkout
Compare python recipes/studies/bad_inputs --compare BEFORE/all.jsonl AFTER/all.jsonl
Needs   Linux; as root, cases without permission run without its capabilities
Shows   a table by kind and command; all.jsonl and wrong.jsonl in --out, the wrong ones with where the error arose
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import sandbox
from good import Good
from kinds import KINDS
from mutate import Context
from sandbox import Case, Outcome

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_SHOWN = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("bad-inputs"))
    parser.add_argument("--work", type=Path, help="folder to work in; a temporary one by default")
    parser.add_argument("--replay", metavar="ID", action="append", default=[])
    parser.add_argument("--compare", nargs=2, type=Path, metavar="ALL.jsonl")
    args = parser.parse_args()
    if args.compare:
        compare(*args.compare)
        return
    work = args.work or Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    work.mkdir(parents=True, exist_ok=True)
    work.chmod(0o755)
    os.environ["HF_HOME"] = str(work / "hub")
    sandbox.warm()
    good = Good(work.resolve() / "good")
    good.make()
    if args.replay:
        for name in args.replay:
            replay(name, good, work)
        return
    kinds = args.kinds.split(",") if args.kinds else list(KINDS)
    names = [f"{args.seed}/{kind}/{args.first + number}" for number in range(args.cases) for kind in kinds]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "all.jsonl").open("w") as rows, (args.out / "wrong.jsonl").open("w") as wrong:
        for row in run_all(names, good, work):
            rows.write(json.dumps({key: row[key] for key in row if key not in ("out", "err")}) + "\n")
            if row["wrong"]:
                wrong.write(json.dumps(row) + "\n")
            rows.flush()
            wrong.flush()
    table([json.loads(line) for line in (args.out / "all.jsonl").open()])
    if not args.work:
        remove(work)


def run_all(names: Sequence[str], good: Good, work: Path) -> Iterator[dict[str, Any]]:
    """The row of each case; of a wrong one also where its error arose."""
    for number, name in enumerate(names, 1):
        case, outcome = one(name, good, work)
        row = {
            "id": name,
            "kind": name.split("/")[1],
            "command": command(case),
            "what": case.what,
            "args": case.args,
            "code": outcome.code,
            "right": sorted(case.codes),
            "wrong": outcome.wrong,
            "seconds": round(outcome.seconds, 2),
            "out": outcome.out[:_SHOWN],
            "err": outcome.err[:_SHOWN],
        }
        if outcome.wrong:
            again = one(name, good, work, debug=True)[1] if outcome.code is not None else outcome
            row["arose"] = arose(again.err)
        yield row
        if number % 100 == 0:
            print(f"{number} of {len(names)}", file=sys.stderr, flush=True)


def one(name: str, good: Good, work: Path, *, debug: bool = False, keep: bool = False) -> tuple[Case, Outcome]:
    """Make and run the case of this name, in a folder that is gone afterwards."""
    folder = work.resolve() / "case"
    remove(folder)
    folder.mkdir()
    case = KINDS[name.split("/")[1]](Context(Random(name), folder, good))
    if debug:
        case = replace(case, args=(*case.args, "--debug"))
    outcome = sandbox.run(case, folder)
    if not keep:
        remove(folder)
    return case, outcome


def remove(folder: Path) -> None:
    """Remove a folder, whatever its permissions and names are."""
    for place, folders, _ in os.walk(os.fsencode(folder)):
        for entry in folders:
            path = os.path.join(place, entry)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(os.fsencode(folder), ignore_errors=True)


def command(case: Case) -> str:
    """The command's name of a call."""
    words = [word for word in case.args[:2] if re.fullmatch(r"[a-z][a-z-]*", word)]
    nested = words[:1] in (["inspect"], ["export"], ["recipe"])
    return " ".join(words[: 2 if nested else 1]) or "-"


def arose(err: str) -> str:
    """Where the error of a call with --debug arose: its type, the last place in braces and the last place of all."""
    head = err.rpartition("Traceback (most recent call last)")[2]
    frames = _FRAME.findall(head)
    ours = [frame for frame in frames if "/braces_cli/" in frame[0]]
    lines = [line for line in head.splitlines() if re.match(r"[\w.]+(?:Error|Exception|Fault|Interrupt|Exit)\b", line)]
    kind = lines[0].partition(":")[0] if lines else "?"
    places = [f"{'/'.join(Path(file).parts[-3:])}:{line} {name}" for file, line, name in (ours[-1:] + frames[-1:])]
    return " | ".join([kind, *dict.fromkeys(places)])


def replay(name: str, good: Good, work: Path) -> None:
    """Run one case, say what it is and what came of it, and leave its folder."""
    case, outcome = one(name, good, work, keep=True)
    print(f"{name}: {case.what}\nfolder {work / 'case'}\nbraces {' '.join(map(repr, case.args))}")
    print(f"--- exit code {outcome.code}, right: {sorted(case.codes)}, {outcome.seconds:.1f} s\n{outcome.wrong}")
    print(f"--- stdout\n{outcome.out[:_SHOWN]!r}\n--- stderr\n{outcome.err[:_SHOWN]}")


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print cases and wrong ones by kind and command, and the wrong ones by reason."""
    cases = Counter((row["kind"], row["command"]) for row in rows)
    wrong = Counter((row["kind"], row["command"]) for row in rows if row["wrong"])
    print(f"{'kind':<12} {'command':<22} {'cases':>6} {'wrong':>6}")
    for key in sorted(cases):
        print(f"{key[0]:<12} {key[1]:<22} {cases[key]:>6} {wrong[key]:>6}")
    print(f"{'all':<35} {len(rows):>6} {sum(wrong.values()):>6}")
    reasons = Counter(reason(each) for row in rows for each in row["wrong"])
    for name, count in reasons.most_common():
        print(f"{count:>6}  {name}")


def reason(text: str) -> str:
    """What was wrong, without the names of the one case."""
    return text.partition(":")[0].partition(",")[0]


def compare(before: Path, after: Path) -> None:
    """Print two runs side by side: cases, wrong ones and exit codes by kind."""
    runs = [[json.loads(line) for line in path.open()] for path in (before, after)]
    kinds = dict.fromkeys(row["kind"] for rows in runs for row in rows)
    codes = [0, 1, 2, 3, 4, None]
    print(
        f"{'kind':<12} {'run':<7} {'cases':>6} {'wrong':>6}  "
        + " ".join(f"{'stop' if c is None else c!s:>5}" for c in codes)
    )
    for kind in [*kinds, None]:
        for label, rows in zip(("before", "after"), runs, strict=True):
            own = [row for row in rows if kind in (None, row["kind"])]
            wrong = sum(bool(row["wrong"]) for row in own)
            counts = Counter(row["code"] for row in own)
            ends = " ".join(f"{counts[code]:>5}" for code in codes)
            print(f"{kind or 'all':<12} {label:<7} {len(own):>6} {wrong:>6}  {ends}")


if __name__ == "__main__":
    main()
