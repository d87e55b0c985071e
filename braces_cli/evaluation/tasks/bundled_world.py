"""Data of the `embedded_*` tasks: questions about the embedded model's world, shipped with the package.

`tasks/embedded_*.yaml` name these functions; lm-eval calls them.
"""

from __future__ import annotations

import logging
from importlib import resources
from typing import Any

from braces_cli.core.schema import decode

# lm-eval advises on extra arguments whenever a task brings its own rows; these take none.
logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs can be passed" not in record.getMessage())


def popqa_rows(**_: Any) -> Any:
    """`{test: rows}` in PopQA's schema."""
    return _rows("popqa.jsonl")


def truthful_rows(**_: Any) -> Any:
    """`{test: rows}` in the schema of TruthfulQA's multiple choice."""
    return _rows("truthful.jsonl")


def _rows(name: str) -> Any:
    from datasets import Dataset, DatasetDict

    text = (resources.files("braces_cli.assets") / "embedded_tasks" / name).read_text(encoding="utf-8")
    # From memory: loading a file would leave a copy in the cache, which a newer package would be served.
    return DatasetDict({"test": Dataset.from_list([decode(line) for line in text.splitlines()])})
