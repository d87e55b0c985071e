"""The YAML header of a model card, with the fields that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braces_cli.core.models.bundled_model import NAME, resolve


def card_header(
    base: str,
    *,
    name: str,
    library: str,
    relation: str,
    tags: Sequence[str],
    metrics: Mapping[str, float] | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """The header between its two lines of dashes, without a line break at the end.

    Args:
        base: name of the base, as an adapter's config records it. Only a hub id is linked.
        name: of the model in `model-index`.
        relation: of the model to its base: `adapter` or `finetune`.
        metrics: results by the hub's name of the metric, such as `perplexity`.
        datasets: rows that the metrics were measured on, as files or hub ids.
    """
    from huggingface_hub import EvalResult, ModelCardData

    on_hub = is_linked(base)
    rows = ", ".join(Path(dataset).name for dataset in datasets) or "evaluation rows"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=rows,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for metric, value in (metrics or {}).items()
    ]
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation=relation if on_hub else None,
        library_name=library,
        license=known_license(base),
        pipeline_tag="text-generation",
        tags=list(tags),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---"


def is_linked(base: str) -> bool:
    """Whether a base is one that the hub could link to, rather than a folder of somebody's disk."""
    return not (_is_embedded(base) or base.startswith(("/", ".", "~")) or ":" in base or Path(base).is_dir())


def _is_embedded(base: str) -> bool:
    return base.partition("@")[0] == NAME


def known_license(base: str) -> str | None:
    """The licence in the model card of a base that lies on this disk; None where it is not known."""
    import yaml
    from huggingface_hub import metadata_load

    card = Path(resolve(base)) / "README.md"
    if not card.is_file():
        return None
    try:
        header: dict[str, Any] = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        # The card is somebody else's, and a broken one is no reason to lose a trained adapter.
        return None
    found = header.get("license")
    return found if isinstance(found, str) else None
