"""Private names of dependencies that the package reads: a test fails if one of them disappears.

A change of this list needs a change of the version ranges in pyproject.toml. Names of lm-eval are tested in
tests/evaluation, those of typer in tests/cli.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from accelerate import cpu_offload
from torch import nn

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


def test_transformers_configs_have_it() -> None:
    """Implementation of attention."""
    model = tiny_model("llama")
    assert model.config._attn_implementation in ("sdpa", "eager")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert hasattr(model, "_keys_to_ignore_on_save")


def test_accelerate_hooks_have_them() -> None:
    """Flag of weights that are stored on the CPU or on disk."""
    model = tiny_model("llama")
    cpu_offload(model, torch.device("cpu"))
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    assert any(getattr(hook, "offload", False) for hook in hooks)


def test_torch_has_them() -> None:
    """Version counters, children, compiled forwards, and the classes of tensors that wrap others."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    tensor = torch.zeros(1)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1
    assert list(nn.Sequential(nn.Identity())._modules) == ["0"]
    assert callable(torch._C._nn.gelu)
    module = nn.Identity()
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None
    assert not is_traceable_wrapper_subclass(tensor)
