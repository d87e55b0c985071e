"""The JSON document of an evaluation, and the settings that identify a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.listing import attribute_hashes
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.loading import tokenizer_hashes
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import DataError
from braces_cli.core.utils.file_hashes import file_hash
from braces_cli.core.utils.versions import versions
from braces_cli.evaluation.adapter_switching import EvalAdapter
from braces_cli.evaluation.comparison import LEVEL, System, compare
from braces_cli.evaluation.lm_eval_runner import HarnessSettings
from braces_cli.evaluation.settings import TEXT_TASKS, EvalSettings
from braces_cli.evaluation.strength_slopes import strength_slopes
from braces_cli.evaluation.task_catalog import Selection

logger = logging.getLogger("braces")


def identity(
    base: str,
    adapters: Sequence[EvalAdapter],
    options: LoadOptions,
    settings: EvalSettings,
    selection: Selection,
    files: dict[str, Path],
) -> dict[str, Any]:
    """All that scores depend on but for rounding; device and batch size may change when a run is resumed."""
    return {
        "model": base,
        "adapters": [[each.name, each.sha256] for each in adapters],
        "load": {name: value for name, value in options.resolved().items() if name not in ("device", "device_map")},
        "base": not settings.no_base,
        "tasks": [*selection.names, *selection.native],
        "groups": sorted(selection.groups),
        "task_data": {name: file_hash(file, DataError) for name, file in files.items()},
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "chat_template": settings.apply_chat_template,
        "seeds": settings.seeds,
        **_steering(adapters, settings),
        **_generation(settings, selection),
    }


def _steering(adapters: Sequence[EvalAdapter], settings: EvalSettings) -> dict[str, Any]:
    """Attributes and strengths, with a hash of each file that one may come from; nothing where there is none."""
    if not settings.attribute:
        return {}
    folders = [settings.attributes, *(each.folder for each in adapters if each.stored is not None)]
    hashes = attribute_hashes(settings.attribute, folders)
    return {"steering": settings.points, "attribute_files": hashes}


def _generation(settings: EvalSettings, selection: Selection) -> dict[str, Any]:
    """How texts were generated, where a task generates any."""
    return {"generation": settings.generation_record()} if set(selection.native) & set(TEXT_TASKS) else {}


def document(
    session: Session,
    systems: Sequence[System],
    settings: EvalSettings,
    files: dict[str, Path],
    harness: HarnessSettings,
    options: LoadOptions,
    selection: Selection,
) -> dict[str, Any]:
    """`{systems, comparisons, settings}`, and `slopes` where systems are steered."""
    first = systems[0].scores
    fixed = [task for task, shots in first.shots.items() if settings.num_fewshot not in (None, shots)]
    if fixed:
        logger.warning("--num-fewshot has no effect on %s, which fix their own number", ", ".join(fixed))
    sizes = sorted({size for system in systems for size in system.scores.batch_sizes})
    base = session.base
    better: dict[str, dict[str, bool]] = {}
    for (task, metric), more in first.better.items():
        better.setdefault(task, {})[metric] = more
    return {
        "systems": [
            {
                "name": each.name,
                "model": base.name,
                "adapter": each.adapter,
                "method": each.method,
                "sha256": each.sha256,
                "attributes": each.strengths,
                "results": each.scores.results,
            }
            for each in systems
        ],
        "comparisons": compare(systems, settings.seeds["numpy"]),
        **({"slopes": strength_slopes(systems)} if settings.attribute else {}),
        "settings": {
            "tasks": list(first.results),
            "task_data": {name: str(file) for name, file in files.items()},
            "task_data_sha256": {name: file_hash(file, DataError) for name, file in files.items()},
            "task_versions": first.versions,
            "higher_is_better": better,
            "batch_size": sizes[0] if len(sizes) == 1 else sizes,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "device": str(base.model.device),
            "quantize": options.quantize,
            "num_fewshot": settings.num_fewshot,
            "num_fewshot_used": first.shots,
            "limit": settings.limit,
            "seeds": settings.seeds,
            "revision": base.revision,
            "fingerprint": base.fingerprint(session.ffns)["sha256"],
            "tokenizer": tokenizer_hashes(base.tokenizer),
            "apply_chat_template": harness.chat_template,
            **(settings.steering_record() if settings.attribute else {}),
            **_generation(settings, selection),
            "significance_level": LEVEL,
            "versions": versions(),
        },
    }
