"""Catalog of tasks: names in `--tasks` -> lm-eval tasks with the folders that define them, and tasks of braces.

lm-eval has about 14,000 tasks, and indexing all of them takes longer than a small evaluation. So only the folders of
the requested tasks are indexed; the whole index is read only for names that this does not resolve (tags, and groups
with members in other folders).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from braces_cli.core.errors import ConfigError, near_misses
from braces_cli.evaluation import text_tasks
from braces_cli.evaluation.native_tasks import ANSWERS, DETECTION, PERPLEXITY, NativeTask
from braces_cli.evaluation.task_functions import COMMONSENSE, COMMONSENSE_TASKS

# Tasks that lm-eval does not run, by name.
NATIVE_TASKS: dict[str, NativeTask] = {
    task.name: task for task in (PERPLEXITY, *text_tasks.TASKS.values(), ANSWERS, DETECTION)
}
BRACES_FOLDER = Path(__file__).parent / "tasks"
LM_EVAL_FOLDER = Path(lm_eval.__file__).parent / "tasks"
# About the world of the embedded model.
EMBEDDED = ("embedded_popqa", "embedded_truthful")
# These names take precedence over lm-eval's; its tag `truthfulqa` also has the generation task.
GROUPS = {
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"),
    "embedded": EMBEDDED,
    "zero_shot": ("popqa", "triviaqa", "nq_open", "truthfulqa_mc1", "truthfulqa_mc2"),
    "commonsense": COMMONSENSE,
    "commonsense_gen": COMMONSENSE_TASKS,
}
# Groups with an average over their tasks.
AVERAGED = ("zero_shot", "commonsense", "commonsense_gen")
_FOLDERS = {
    **dict.fromkeys(("popqa", *EMBEDDED, *COMMONSENSE_TASKS), BRACES_FOLDER),
    **dict.fromkeys(("truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"), LM_EVAL_FOLDER / "truthfulqa"),
    **{
        name: LM_EVAL_FOLDER / name for name in ("triviaqa", "nq_open", "piqa", "hellaswag", "winogrande", "openbookqa")
    },
    **dict.fromkeys(("arc_easy", "arc_challenge"), LM_EVAL_FOLDER / "arc"),
    "boolq": LM_EVAL_FOLDER / "super_glue" / "boolq",
    "social_iqa": LM_EVAL_FOLDER / "siqa",
}
_NAMED = re.compile(r"^['\"]?(?:task|group)['\"]?:[ \t]*['\"]?([^\s'\"#\[{]+)", re.MULTILINE)


@dataclass
class Selection:
    """The tasks of `--tasks`.

    Attributes:
        names: tasks and groups for lm-eval, in the order of `--tasks`; tags are replaced by their members.
        leaves: each lm-eval task that runs, members of groups included -> its index entry (`cfg`, `yaml_path`).
        groups: group in `--tasks` -> its tasks.
        folders: folders with the definitions.
        native: names of `NATIVE_TASKS`.
    """

    names: list[str] = field(default_factory=list)
    leaves: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    native: list[str] = field(default_factory=list)

    def known(self) -> list[str]:
        """Return every name that `--task-data` accepts."""
        covering = [name for name, members in GROUPS.items() if set(members) & self.leaves.keys()]
        return list(dict.fromkeys([*self.groups, *covering, *self.leaves, *self.native]))

    @property
    def averaged(self) -> dict[str, list[str]]:
        """Group with an average -> its tasks."""
        return {name: self.groups[name] for name in AVERAGED if name in self.groups}

    def members(self, name: str) -> list[str]:
        """Return the tasks of a group that are requested, by the group's name or by their own."""
        members = self.groups.get(name) or GROUPS.get(name, (name,))
        return [member for member in members if member in self.leaves or member in self.native]


def select(values: Sequence[str]) -> Selection:
    """Resolve the values of `--tasks`, each one name or several separated by commas."""
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
        # A task of a group must not be given to lm-eval a second time.
        covered |= set(below) - {name} if kind == "GROUP" else set()
    selection.names = [name for name in dict.fromkeys(selection.names) if name not in covered]
    selection.folders = list(dict.fromkeys(selection.folders))
    return selection


def _index(requested: Sequence[str]) -> dict[str, Any]:
    """Return index entries of the requested names from as few folders as possible."""
    places = dict(_FOLDERS)
    others = [name for name in requested if name not in places]
    if others:
        mentioned: set[str] = set()
        for file in LM_EVAL_FOLDER.rglob("*.yaml"):
            text = file.read_text(encoding="utf-8", errors="replace")
            places.update(dict.fromkeys(_NAMED.findall(text), file.parent))
            mentioned |= {name for name in others if name in text}
        for name in others:
            if name not in mentioned:
                raise _unknown(name, places)
    folders = {places[name] for name in requested if name in places}
    index = TaskManager(include_path=sorted(folders), include_defaults=False).task_index
    if not all(_complete(index, name) for name in requested):
        index = TaskManager(include_path=[BRACES_FOLDER]).task_index
    for name in requested:
        if name not in index:
            raise _unknown(name, index)
    return index


def _complete(index: dict[str, Any], name: str) -> bool:
    """Return whether the index has the name and all its members; False for tags, which need the whole index."""
    if name not in index or index[name].kind.name == "TAG":
        return False
    return all(_complete(index, child) for child in _children(index, name))


def _below(index: dict[str, Any], name: str) -> list[str]:
    """Return the name and all members in the index; of a tag, only the members."""
    below = [each for child in _children(index, name) if child in index for each in _below(index, child)]
    return list(dict.fromkeys(below if index[name].kind.name == "TAG" else [name, *below]))


def _children(index: dict[str, Any], name: str) -> list[str]:
    if index[name].kind.name != "GROUP":
        return sorted(index[name].tags) if index[name].kind.name == "TAG" else []
    children = []
    for each in index[name].cfg.get("task") or ():
        child = each if isinstance(each, str) else each.get("group") or each.get("task")
        # A mapping can define a member inline; only a plain reference must be in the index.
        if isinstance(each, str) or child in index:
            children.append(child)
    return children


def _unknown(name: str, known: Iterable[str]) -> ConfigError:
    close = near_misses(name, {*known, *_FOLDERS, *GROUPS, *NATIVE_TASKS})
    hint = close or f"`lm-eval ls tasks` lists lm-eval's; braces adds popqa, {', '.join([*GROUPS, *NATIVE_TASKS])}."
    return ConfigError(f"unknown task `{name}`", where="--tasks", hint=hint)
