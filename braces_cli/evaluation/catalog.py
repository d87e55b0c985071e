"""Which tasks there are: names a user may give -> lm-eval tasks and the folders that define them.

lm-eval has some 14,000 tasks, and indexing all of them takes longer than a small evaluation. So only the folders of
the tasks in `--tasks` are indexed; the whole catalogue is read only for names that this does not resolve (tags, and
groups whose members live elsewhere).

Which local file holds the rows of which task: `--task-data NAME=FILE_OR_FOLDER` and `--task-data-dir`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from braces_cli.core.errors import ConfigError, DataError, near_misses
from braces_cli.core.files import check_regular, file_hint, path_exists, user_path
from braces_cli.data.rows import READABLE
from braces_cli.evaluation.native_tasks import ANSWERS, DETECTION, PERPLEXITY, NativeTask
from braces_cli.evaluation.tasks import commonsense
from braces_cli.evaluation.text_tasks import SENTIMENT, TOXICITY

# Tasks that lm-eval cannot run, by name.
NATIVE_TASKS: dict[str, NativeTask] = {
    task.name: task for task in (PERPLEXITY, SENTIMENT, TOXICITY, ANSWERS, DETECTION)
}
BRACES_FOLDER = Path(__file__).parent / "tasks"
LM_EVAL_FOLDER = Path(lm_eval.__file__).parent / "tasks"
# On the embedded model's own world.
EMBEDDED = ("embedded_popqa", "embedded_truthful")
# Our meaning of a name where it is not lm-eval's: its tag `truthfulqa` holds the generation task, too.
GROUPS = {
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"),
    "embedded": EMBEDDED,
    "zero_shot": ("popqa", "triviaqa", "nq_open", "truthfulqa_mc1", "truthfulqa_mc2"),
    "commonsense": commonsense.DATA_SETS,
    "commonsense_gen": commonsense.TASKS,
}
# Groups that get the average over their tasks.
AVERAGED = ("zero_shot", "commonsense", "commonsense_gen")
# Tasks of braces for which no hub set has the rows as they are.
LOCAL_ONLY = commonsense.TASKS
_FOLDERS = {
    **dict.fromkeys(("popqa", *EMBEDDED, *commonsense.TASKS), BRACES_FOLDER),
    **dict.fromkeys(("truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"), LM_EVAL_FOLDER / "truthfulqa"),
    "boolq": LM_EVAL_FOLDER / "super_glue" / "boolq",
    "social_iqa": LM_EVAL_FOLDER / "siqa",
}
_NAMED = re.compile(r"^(?:task|group):[ \t]*['\"]?([^\s'\"#\[{]+)", re.MULTILINE)


@dataclass
class Selection:
    """The tasks of `--tasks`.

    Attributes:
        names: tasks and groups to give to lm-eval, in the order of `--tasks`; tags are replaced by their members.
        leaves: task that runs -> its entry in lm-eval's index (`cfg`, `yaml_path`), members of groups among them.
        groups: name in `--tasks` -> its tasks that run, for what is no task itself.
        folders: where all of these are defined.
        native: names of `NATIVE_TASKS`.
    """

    names: list[str] = field(default_factory=list)
    leaves: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    native: list[str] = field(default_factory=list)

    def known(self) -> list[str]:
        """Every name that task data can be given for."""
        covering = [
            name for name, members in GROUPS.items() if name not in self.groups and set(members) & set(self.leaves)
        ]
        return [*self.groups, *covering, *self.leaves, *self.native]

    @property
    def averaged(self) -> dict[str, list[str]]:
        """Group that gets an average -> its tasks."""
        return {name: self.groups[name] for name in AVERAGED if name in self.groups}

    def members(self, name: str) -> list[str]:
        """The tasks that `name` stands for."""
        if name in GROUPS and name not in self.groups:
            # Its members stand in `--tasks` by their own names.
            return [member for member in GROUPS[name] if member in self.leaves]
        return self.groups.get(name, [name])


def select(values: Sequence[str]) -> Selection:
    """Resolve the values of `--tasks`, each one name or several with commas between them.

    Raises:
        ConfigError: none given, or one that is no task, group or tag.
    """
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    if not names:
        raise ConfigError("no task given", where="--tasks", hint="Such as --tasks truthfulqa,popqa,triviaqa.")
    selection = Selection(groups={name: list(GROUPS[name]) for name in names if name in GROUPS})
    flat = dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,)))
    selection.native = [name for name in flat if name in NATIVE_TASKS]
    requested = [name for name in flat if name not in NATIVE_TASKS]
    if not requested:
        return selection
    index = _index(requested)
    covered: set[str] = set()
    for name in requested:
        kind, below = index[name].kind.name, _below(index, name)
        leaves = [each for each in below if index[each].kind.name != "GROUP"]
        selection.leaves.update({leaf: index[leaf] for leaf in leaves})
        selection.folders += [Path(index[each].yaml_path).parent for each in below]
        if kind in ("GROUP", "TAG"):
            selection.groups[name] = leaves
        selection.names += sorted(index[name].tags) if kind == "TAG" else [name]
        # A task that a group brings along must not be given to lm-eval a second time.
        covered |= set(below) - {name} if kind == "GROUP" else set()
    selection.names = [name for name in dict.fromkeys(selection.names) if name not in covered]
    selection.folders = list(dict.fromkeys(selection.folders))
    return selection


def manager(selection: Selection, overrides: Path, metadata: dict[str, Any]) -> TaskManager:
    """A task manager that knows what was selected; definitions in the folder `overrides` win.

    Args:
        metadata: what tasks that build their own data may want to know (`pretrained`, the base's name).
    """
    return TaskManager(include_path=[*selection.folders, overrides], include_defaults=False, metadata=metadata)


def _index(requested: Sequence[str]) -> dict[str, Any]:
    """Index entries that cover `wanted`, from as few folders as will do."""
    known = {name: _FOLDERS.get(name) or _likely_folder(name) for name in requested}
    index = _read_index(folder for folder in known.values() if folder is not None)
    others = [name for name in requested if not _complete(index, name)]
    if others:
        named, mentioned = _scan(others)
        for name in others:
            if name not in mentioned:
                raise _unknown(name, named)
        folders = [named[name].parent for name in others if name in named]
        index = _read_index([*(folder for folder in known.values() if folder is not None), *folders])
    if not all(_complete(index, name) for name in requested):
        index = TaskManager(include_path=[BRACES_FOLDER]).task_index
    for name in requested:
        if name not in index:
            raise _unknown(name, index)
    return index


def _likely_folder(name: str) -> Path | None:
    """The folder that lm-eval keeps a task in where it is called as the task begins: `mmlu` of `mmlu_anatomy`."""
    words = name.split("_")
    if not name.replace("_", "").replace("-", "").isalnum():
        return None
    starts = ("_".join(words[:count]) for count in range(len(words), 0, -1))
    return next((LM_EVAL_FOLDER / start for start in starts if (LM_EVAL_FOLDER / start).is_dir()), None)


def _read_index(folders: Iterable[Path]) -> dict[str, Any]:
    listed = list(dict.fromkeys(folders))
    return TaskManager(include_path=listed, include_defaults=False).task_index if listed else {}


def _scan(requested: Iterable[str]) -> tuple[dict[str, Path], set[str]]:
    """Names that lm-eval's files give themselves -> file, and which of `wanted` any file mentions at all."""
    named: dict[str, Path] = {}
    mentioned: set[str] = set()
    for file in LM_EVAL_FOLDER.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8", errors="replace")
        named.update(dict.fromkeys(_NAMED.findall(text), file))
        mentioned |= {name for name in requested if name in text}
    return named, mentioned


def _complete(index: dict[str, Any], name: str) -> bool:
    """Whether the index holds the name with all that it stands for; of a tag only the whole catalogue knows that."""
    if name not in index or index[name].kind.name == "TAG":
        return False
    return all(_complete(index, child) for child in _children(index, name))


def _below(index: dict[str, Any], name: str) -> list[str]:
    """The name and everything under it that the index knows; a tag is only the sum of its tasks."""
    if name not in index:
        return []  # a task that its group defines inline
    children = sorted(index[name].tags) if index[name].kind.name == "TAG" else _children(index, name)
    itself = [] if index[name].kind.name == "TAG" else [name]
    return list(dict.fromkeys([*itself, *(each for child in children for each in _below(index, child))]))


def _children(index: dict[str, Any], name: str) -> list[str]:
    entry = index[name]
    if entry.kind.name != "GROUP":
        return []
    listed = entry.cfg.get("task") or []
    names = [each if isinstance(each, str) else each.get("group") or each.get("task") for each in listed]
    # A mapping may define a member on the spot; only what is plainly a reference must be found elsewhere.
    return [
        n for n, each in zip(names, listed, strict=True) if isinstance(n, str) and (isinstance(each, str) or n in index)
    ]


def _unknown(name: str, known: Iterable[str]) -> ConfigError:
    close = near_misses(name, {*known, *_FOLDERS, *GROUPS, *NATIVE_TASKS})
    hint = close or f"`lm-eval ls tasks` lists lm-eval's; braces adds popqa, {', '.join([*GROUPS, *NATIVE_TASKS])}."
    return ConfigError(f"unknown task `{name}`", where="--tasks", hint=hint)


_KINDS = READABLE
# What a file of the documents to be tested may be called, where its task does not say.
_TESTED = ("test", "validation", "dev")


def parse_task_data(values: Sequence[str], known: Iterable[str]) -> dict[str, Path]:
    """`NAME=FILE` of each value.

    Raises:
        ConfigError: no such form, a name given twice, or one that is not among `--tasks`.
    """
    known = list(known)
    files: dict[str, Path] = {}
    for value in values:
        name, sign, file = (part.strip() for part in value.partition("="))
        if not (name and sign and file):
            raise ConfigError(f"`{value}` is not NAME=FILE", where="--task-data", hint="Such as popqa=popqa.jsonl.")
        if name not in known:
            hint = near_misses(name, known) or f"There are: {', '.join(known[:8])}."
            raise ConfigError(f"`{name}` is not among --tasks", where="--task-data", hint=hint)
        if name in files:
            raise ConfigError(f"`{name}` is given twice", where="--task-data", hint="Give one file a task.")
        files[name] = user_path(file)
    return files


def find_files(selection: Selection, values: Sequence[str], folder: Path | None) -> dict[str, Path]:
    """Task -> file of its rows, of the tasks that have one.

    A file for a task itself beats one for its group, and `--task-data` beats what lies in the folder.

    Raises:
        ConfigError: see `parse_task_data`; no such folder.
        DataError: no file, or a folder from which no one file can be chosen.
    """
    places = {} if folder is None else _in_folder(folder, selection.known())
    places.update(parse_task_data(values, selection.known()))
    task_names = {*selection.leaves, *selection.native}
    given = {member: place for name, place in places.items() for member in selection.members(name)}
    given.update({name: place for name, place in places.items() if name in task_names})
    files = {name: _file(name, place, selection.leaves.get(name)) for name, place in given.items()}
    for file in files.values():
        # A pipe, too: it would be read twice, for its rows and for its hash.
        check_regular(file, DataError, "Check --task-data NAME=FILE.")
    return files


def check_needed(selection: Selection, files: dict[str, Path], local_only: Iterable[str]) -> None:
    """Refuse tasks that have no data of their own and were given none.

    Raises:
        ConfigError: names what to give.
    """
    lines = {name: NATIVE_TASKS[name].data for name in selection.native}
    lines.update({name: "rows with `instruction` and `answer`" for name in local_only if name in selection.leaves})
    for name, data in lines.items():
        if name not in files:
            hint = f"Give --task-data {name}=FILE ({data})."
            raise ConfigError(f"{name} has no data of its own", where="--tasks", hint=hint)


def _in_folder(folder: Path, known: Iterable[str]) -> dict[str, Path]:
    """Tasks for which the folder holds a file `NAME.jsonl` (or its like) or a folder `NAME`."""
    folder = user_path(folder)
    if not os.path.isdir(folder):  # pathlib's would raise where a folder above is closed
        raise ConfigError("no such folder", where="--task-data-dir", hint=f"Looked for {folder}.")
    places = {}
    for name in known:
        for place in (folder / name, *(folder / f"{name}{kind}" for kind in _KINDS)):
            if path_exists(place):
                places[name] = place
                break
    return places


def _file(name: str, place: Path, entry: Any) -> Path:
    if not os.path.isdir(place):
        return place
    try:
        there = sorted(path for path in place.iterdir() if path.suffix.lower() in _KINDS)
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=str(place), hint=file_hint(error)) from error
    cfg = entry.cfg if entry is not None else {}
    splits = [cfg.get("test_split") or cfg.get("validation_split"), *_TESTED]
    for split in splits:
        chosen = [path for path in there if path.stem == split]
        if len(chosen) == 1:
            return chosen[0]
    if len(there) == 1:
        return there[0]
    what = f"which file holds the rows of {name}?" if there else f"no file with rows of {name}"
    listed = ", ".join(path.name for path in there[:6]) or "nothing that can be read"
    raise DataError(what, where=str(place), hint=f"Found: {listed}. Give --task-data {name}=FILE.")
