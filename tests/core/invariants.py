"""Invariants of an adapter on a model of any type, and the table of results: recipes/docs/ARCHITECTURES.md.

Run     python -m tests.core.invariants --write
"""

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

from braces_cli.core.adapter.files import AdapterConfig, find_adapter
from braces_cli.core.adapter.layer import RelevanceModule
from braces_cli.core.adapter.model import Adapter, attach, attach_stored
from braces_cli.core.adapter.reference import reference
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import FFN, Experts, MixtureFFN, find_ffns, layer_stack
from braces_cli.core.models.load import Base
from tests.conftest import open_gates
from tests.core import comparison
from tests.core.architectures import MAPPING, NEURONS, VARIANTS, VOCABULARY, WIDTH, model_type, tiny
from tests.core.comparison import relative, run
from tests.export.columns import export_columns

TABLE = Path(__file__).resolve().parents[2] / "recipes" / "docs" / "ARCHITECTURES.md"
TOKENS = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))

EXACT, NONE, UNSUPPORTED, UNBUILT = "exact", "not applicable", "unsupported", "cannot be built here"

# Types that are not exact: status, reason, and words of the error. All others must be exact.
_KEYS = "set of layer types producing a cache|shared_kv_states cannot be None"
_LOOKED_FOR = r"has no feed-forward layer, .*\n.*d -> d_ff -> d in each layer; .*Mamba\w*Mixer"
_SHARED = "transformers builds no assistant: all its layers share the target's keys, which Gemma 4's config refuses"
EXPECTED: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), (NONE, "no FFN: state-space layers only", _LOOKED_FOR)),
    "dbrx": (UNSUPPORTED, "its experts are stacked in two dimensions", "has no feed-forward layer"),
    "inkling_text": (UNSUPPORTED, "its shared experts are stacked and weighed inside", "is called with 2 tensors"),
    "jetmoe": (UNSUPPORTED, "its experts' two ends are modules called with sorted tokens", "that is not understood"),
    "hrm_text": (UNSUPPORTED, "its layers are in two lists", "its layers are in two lists"),
    "reformer": (UNSUPPORTED, "its layers run where autograd does not record them", "where autograd"),
    "xlnet": (UNSUPPORTED, "it runs tokens before rows", "runs tokens before rows"),
    "gemma3n": (UNBUILT, "its vision tower needs timm; its text decoder is gemma3n_text", "requires the timm library"),
    "gemma4_assistant": (UNBUILT, _SHARED, _KEYS),
    "gemma4_unified_assistant": (UNBUILT, _SHARED, _KEYS),
}
# Types that are not tested: their layers run several times for one token.
UNTESTED = ("dory", "inkling2_loop_text")
# Types with float32 noise near or above 1e-5: their error may be twice that of the reference, see `compare`.
NOISY = dict.fromkeys(
    ("axk1", "bailing_hybrid", "cpmant", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "rembert"),
    "float32 noise of the model itself reaches 1e-5; exact in float64",
)
# Types whose base generates other text without its cache, or fails: the adapter is compared with the reference instead,
# with the cache or without it (first value).
CACHES = {
    "deepseek_v32": (False, "its indexer chooses other tokens with a cache"),
    "blt": (False, "transformers fails to generate with its cache"),
    "axk2": (False, "transformers' cache changes the bare base's text, too"),
    "dots3_note": (False, "transformers' cache changes the bare base's text, too"),
    "dots3_note_text": (False, "transformers' cache changes the bare base's text, too"),
    "glm_moe_dsa": (False, "transformers' cache changes the bare base's text, too"),
    "cpmant": (False, "transformers' cache changes the bare base's text, too"),
    "musicgen": (True, "transformers generates other codes without its cache from the bare base, too"),
    "prophetnet": (False, "transformers fails to generate with its cache"),
    "xlm": (False, "transformers' cache changes the bare base's text, too"),
    "rwkv": (False, "transformers' cache changes the bare base's text, too"),
}
# Types that cannot run in float64.
SINGLE = {"inkling2_text": "float32 only: its router computes in it"}
# Types with experts that compute in float32 in a float64 model, too: they run once more for relevance to the output.
ROUNDED = {"beam": "its experts compute in float32"}
# Ends of the names of parameters that `together` joins.
GATES = ("gate", "diagonal")
# Widths of FFNs that are neither d_ff nor 4 d.
WIDTHS = {
    "aria_text": (2 * NEURONS,),  # two shared experts as one
    "dots3_note": (1536,),  # width of an expert, which `shrink` does not change
    "dots3_note_text": (1536,),
    "gemma3n_text": (44, 60),
    "granitemoehybrid": (20,),  # without experts its "shared" network is the FFN
    "lfm2": (256,),
    "moshi": (NEURONS // 2,),
    "recurrent_gemma": (NEURONS // 2,),
    "xlstm": (384,),
}
# Widths of one expert, and of several shared ones as one.
EXPERT_WIDTHS = {20, 40}
NOTES = {
    "blt": "of its four transformers the adapter is on the global one",
    "rwkv": "more than `rescale_every` layers: the base halves value matrices in eval mode, which weakens the adapter",
    "xmod": "the FFN before the language adapters, not these",
}


@dataclass(frozen=True)
class Outcome:
    """Result of one type: one row of the table."""

    name: str
    status: str
    form: str = ""
    value: str = ""
    merge: str = ""
    slots: str = ""
    code: str = ""
    edit: str = ""
    lora: str = ""
    reason: str = ""

    def row(self) -> str:
        kind = MAPPING[model_type(self.name)]
        cells = [self.name, kind, self.status, self.form, self.value, self.merge, self.slots, self.code]
        cells += [self.edit, self.lora, self.reason]
        return "| " + " | ".join(cells) + " |"


def passed(model: Any, adapter: Adapter, slow: bool) -> dict[str, torch.Tensor]:
    """Logits and gradients of the fast path or the reference."""
    logits, gradients = run(model, adapter, slow, tokens=TOKENS)
    return {"logits": logits} | gradients


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of two passes."""
    return max(relative(a[name], b[name]) for name in b)


def together(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of gates and diagonals as one vector, because a single one can be near 0."""
    gates = [value.double() for name, value in result.items() if name.endswith(GATES)]
    return {name: value for name, value in result.items() if not name.endswith(GATES)} | {"gates": torch.cat(gates)}


def logits_of(model: Any) -> torch.Tensor:
    """Logits of the fixed tokens, without gradients."""
    return comparison.logits_of(model, TOKENS)


def continued(model: Any, use_cache: bool) -> torch.Tensor:
    """Logits of six tokens, each chosen greedily: (batch, 6, vocabulary)."""
    config = GenerationConfig(
        max_new_tokens=6, do_sample=False, num_beams=1, num_return_sequences=1, use_cache=use_cache, eos_token_id=None,
        pad_token_id=1, bos_token_id=0, decoder_start_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        return torch.stack(model.generate(TOKENS, generation_config=config).logits, 1)


def cache_changes(model: Any) -> str | None:
    """Difference between greedy continuations with and without a cache, in words, or None."""
    try:
        found = relative(continued(model, True), continued(model, False))
    except (ValueError, AttributeError, RuntimeError) as error:
        return str(error)
    return None if found < 1e-4 else f"logits differ by {found:.1e}"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype, which some models use for constants."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def carry(model: Any, ffns: Sequence[FFN | MixtureFFN], relevance_to: str = "input") -> Adapter:
    """Attach an adapter of rank 4 to some FFNs, with open gates."""
    generator = torch.Generator().manual_seed(0)
    modules = [RelevanceModule(4, ffn.hidden_size, generator=generator, relevance_to=relevance_to) for ffn in ffns]
    adapter = Adapter(model, list(zip(ffns, modules, strict=True)))
    open_gates(adapter)
    return adapter


def compare(name: str, relevance_to: str) -> None:
    """Compare values and gradients with the reference in float32 and float64; raises AssertionError."""
    model = tiny(name)
    adapter = carry(model, find_ffns(model), relevance_to)
    fast, slow = passed(model, adapter, False), passed(model, adapter, True)
    if name in SINGLE:
        found = worst(together(fast), together(slow))
        assert found < 1e-5, f"float32 differs from the reference by {found:.1e}"
        return
    model.double()
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.double()
    with default_dtype(torch.float64):
        wide, truth = passed(model, adapter, False), passed(model, adapter, True)
    found = worst(wide, truth)
    limit = 1e-7 if name in ROUNDED and relevance_to == "output" else 1e-10
    assert found < limit, f"float64 differs from the reference by {found:.1e}"
    fast, slow, truth = (together(result) for result in (fast, slow, truth))
    found = worst(fast, slow)
    if name in NOISY:
        mine, plain = worst(fast, truth), worst(slow, truth)
        assert mine <= 2 * plain + 1e-5, f"float32 errs by {mine:.1e}, the reference itself by {plain:.1e}"
    else:
        assert found < 1e-5, f"float32 differs from the reference by {found:.1e}"


def live(name: str, model: Any, folder: Path) -> None:
    """Attach, generate, save, detach, load; raises AssertionError."""
    base = logits_of(model)
    assert base.isfinite().all()
    bare = cache_changes(model)
    assert bare is None or name in CACHES, f"with and without cache, the bare base: {bare}"
    adapter = attach(model, 4)
    open_gates(adapter)
    assert relative(logits_of(model), base) > 1e-3, "the adapter does nothing"
    if name in CACHES:
        use_cache, _ = CACHES[name]
        with reference(adapter):
            slow = continued(model, use_cache)
        assert relative(continued(model, use_cache), slow) < 1e-4, "generated text differs from that of the reference"
    else:
        changed = cache_changes(model)
        assert changed is None, f"with and without cache: {changed}"
    config = AdapterConfig(name, 4, adapter.layers, Base(model, None, name).sizes)
    adapter.save(folder, config, "# test\n")
    saved = logits_of(model)
    assert adapter.detach() is model
    assert torch.equal(logits_of(model), base), "detaching does not restore the base"
    loaded = attach_stored(Base(model, None, name), find_adapter(str(folder)))
    assert torch.equal(logits_of(model), saved), "a loaded adapter differs from the saved one"
    loaded.detach()
    assert torch.equal(logits_of(model), base)


def form(model: Any, ffns: Sequence[FFN | MixtureFFN]) -> tuple[str, str]:
    """Form of the FFNs in words, and names of their value projections inside a layer."""
    stack = layer_stack(model)[1]
    kinds, values = [], []
    for ffn in ffns:
        layer = stack[ffn.layer]
        stacked = [part for part in ffn.parts if isinstance(part, Experts)]
        dense = [part for part in ffn.parts if not isinstance(part, Experts)]
        words = [f"{len(part.value_matrix())} experts in one weight" for part in stacked]
        if len(ffn.parts) == 1 and dense:
            words = [_form(dense[0]) + (", loose in the layer" if dense[0].host is layer else "")]
        elif dense:
            words.append(f"{len(dense)} separate")
        kinds.append(" and ".join(words))
        for part in ffn.parts:
            owner = part.module if isinstance(part, Experts) else part.value
            suffix = f".{part.name}" if isinstance(part, Experts) else ""
            values.append(next(name for name, module in layer.named_modules() if module is owner) + suffix)
    described = "; ".join(dict.fromkeys(kinds))
    if len(ffns) != len(stack):
        described += f"; {len(ffns)} of {len(stack)} layers"
    # Experts in a list differ by their index.
    values = [re.sub(r"\.\d+\.", ".N.", value) for value in values]
    return described, ", ".join(f"`{value}`" for value in dict.fromkeys(values))


def _form(ffn: FFN) -> str:
    fused = max(key.weight.numel() for key in ffn.keys) == 2 * ffn.hidden_size * ffn.value_vectors
    return "gate and up fused" if fused else "gated" if len(ffn.keys) > 1 else "plain"


def is_the_ffn(name: str, ffns: Sequence[FFN | MixtureFFN]) -> None:
    """Check the widths of the FFNs against the config, which discovery does not read; raises AssertionError.

    Attention's output projection, for example, has another width.
    """
    widths = {NEURONS, 4 * WIDTH, *WIDTHS.get(model_type(name), ())}
    for ffn in ffns:
        mixed = len(ffn.parts) > 1 or isinstance(ffn.parts[0], Experts)
        for part in ffn.parts:
            d, d_ff = part.value_matrix().shape[-2:]
            known = widths | EXPERT_WIDTHS if mixed else widths
            assert d_ff in known, f"width {d_ff}, the config says {known}"
            assert d == (128 if name == "xlstm" else WIDTH)


def prove(name: str, folder: Path) -> Outcome:
    """Check a type against its expected result; raises AssertionError."""
    if name in EXPECTED:
        status, reason, words = EXPECTED[name]
        if status == UNBUILT:
            with pytest.raises((ImportError, ValueError), match=words):
                tiny(name)(TOKENS)
            return Outcome(name, status, reason=reason)
        model = tiny(name)
        with pytest.raises(ModelError, match=words):
            find_ffns(model)
        return Outcome(name, status, reason=reason)
    for relevance_to in ("input", "output"):
        compare(name, relevance_to)
    model = tiny(name)
    is_the_ffn(name, find_ffns(model))
    live(name, model, folder)
    caches = {name: reason for name, (_, reason) in CACHES.items()}
    notes = [table[name] for table in (NOTES, SINGLE, ROUNDED, NOISY, caches) if name in table]
    tolerance = 1e-4 if name in NOISY else 1e-5
    columns = export_columns(model, lambda to: carry(model, find_ffns(model), to), logits_of, folder, tolerance)
    return Outcome(name, EXACT, *form(model, find_ffns(model)), *columns, "; ".join(notes))


def counts(outcomes: Sequence[Outcome]) -> str:
    """Number of types of each status, in one line."""
    numbers = Counter(outcome.status for outcome in outcomes)
    return ", ".join(f"{numbers[status]} {status}" for status in (EXACT, NONE, UNSUPPORTED, UNBUILT) if numbers[status])


def table(outcomes: Sequence[Outcome]) -> str:
    """The text of recipes/docs/ARCHITECTURES.md."""
    version = ".".join(transformers.__version__.split(".")[:2])
    lines = [
        "# Architectures",
        "",
        f"Support for the {len(MAPPING)} types of causal language models of transformers {version}:",
        f"{counts([outcome for outcome in outcomes if outcome.name in MAPPING])}. Variants follow their type.",
        f"Not tested, because their layers run in a loop: {', '.join(UNTESTED)}.",
        "",
        "*Exact*: on a tiny model of the type, values and gradients of the adapter equal the formula within 1e-5",
        "(float32) and 1e-10 (float64), with relevance to the input and to the output. Texts with and without KV cache",
        "are equal, and saving, loading and detaching are bit-exact. Routed and shared experts use the projections and",
        "the gate of their layer.",
        "",
        "*Merge*: `braces merge` writes a plain checkpoint, exact within 1e-5. *a*: the gated FFN can have biases.",
        "*b*: the model is written as a Llama. *c*: the FFN has no gate and can be wider. Otherwise the column has the",
        "reason of the refusal. The models have the default config of their type; with another config, for example",
        "without sliding windows, a model may be mergeable.",
        "",
        "*Slots*: a base with empty neurons has the logits of the base, and with LoRA files (`braces export slots`,",
        "`lora`) those of adapter and attribute at strength 2. *Code*: a checkpoint with a modelling file",
        "(`braces export code`) has these logits, too; *by hooks* if the FFN is not a module that the file can",
        "subclass. Both within 1e-5.",
        "",
        "*Edit* and *LoRA* are for relevance to the output. *Edit*: `braces merge` writes a checkpoint of the base's",
        "shape with edited value vectors, and the attribute in a bias. *LoRA*: a LoRA on the value projections of the",
        "base (`braces export lora --combine`), loaded by peft, has the logits of adapter and attribute. Both within",
        "1e-5.",
        "",
        "Generated by `python -m tests.core.invariants --write`; do not edit. A test compares the rows.",
        "",
        "| Type | Class | Status | FFN | Value projection | Merge | Slots | Code | Edit | LoRA | Reason, notes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(outcome.row() for outcome in sorted(outcomes, key=lambda outcome: outcome.name)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check every type, print failures, and write the table if there are none."""
    outcomes, failed = [], []
    for name in [name for name in (*MAPPING, *VARIANTS) if name not in UNTESTED]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes.append(prove(name, Path(folder)))
            except (Exception, pytest.fail.Exception) as error:
                failed.append(name)
                print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)
    print(f"{counts(outcomes)}, {len(failed)} failed")
    if "--write" in sys.argv and not failed:
        TABLE.write_text(table(outcomes), encoding="utf-8")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
