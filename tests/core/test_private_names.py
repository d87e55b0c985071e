"""Private names of dependencies that the package reads: a test fails if one of them disappears.

A change of this list needs a change of the version ranges in pyproject.toml. Names of lm-eval are tested in
tests/evaluation, those of typer in tests/cli.
"""

import re
from pathlib import Path

import torch
from accelerate import cpu_offload
from torch.utils import _python_dispatch

from tests.conftest import tiny_model

PACKAGE = Path(__file__).parents[2] / "braces_cli"
# A private attribute of something that is not `self` or `cls`, or a private module.
PRIVATE = re.compile(r"(?<![\w.])(?!self\b|cls\b|super\b)\w+(?:\.\w+)*\._([a-z]\w*)|getattr\(\S+, \"_([a-z]\w*)\"")
KNOWN = {
    "_attn_implementation", "_keys_to_ignore_on_save",  # transformers: configs, models
    "_hf_hook",  # accelerate: offloaded weights
    "_version", "_modules", "_nn", "_python_dispatch", "_pytree", "_compiled_call_impl",  # torch
    "_functions",  # bitsandbytes, in a comment's words
    "_eager_factors",  # braces
}  # fmt: skip


def test_no_other_private_name_is_read() -> None:
    """Private names can change in any release."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for match in PRIVATE.finditer(path.read_text(encoding="utf-8")):
            names.add("_" + (match[1] or match[2]))
    assert names <= KNOWN
    assert {"_version", "_attn_implementation"} <= names  # the search finds names


def test_the_names_exist() -> None:
    """Where they are read with a default, a missing one would change results only."""
    model = tiny_model("llama")
    cpu_offload(model, torch.device("cpu"))
    assert any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())
    for owner, name in (
        (model, "_keys_to_ignore_on_save"), (model.config, "_attn_implementation"), (torch.zeros(1), "_version"),
        (model, "_modules"), (model, "_compiled_call_impl"), (_python_dispatch, "is_traceable_wrapper_subclass"),
    ):  # fmt: skip
        assert hasattr(owner, name), name
