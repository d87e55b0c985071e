"""Bad inputs: base models, which are folders with a config, a tokenizer and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mutate import (
    HOSTILE,
    Context,
    break_file,
    break_tensors,
    case,
    change_json,
    edit_tensors,
    pickled,
    put,
    read_safetensors,
)
from sandbox import CANARY, Case

# Values of `config.json` with which no model can be built, by key.
_CONFIG: dict[str, tuple[Any, ...]] = {
    "model_type": ("other", 5, None, [], {}, "bert2", ""),
    "hidden_size": ("32", None, -1, 0, 33, [], {}, 1.5, 10**12),
    "num_hidden_layers": ("2", None, -1, [], {}, 1.5, 10**9, 3),
    "num_attention_heads": (0, "4", None, -4, [], {}, 5, 10**12),
    "num_key_value_heads": ("2", [], {}, -1, 3),
    "intermediate_size": ("52", None, -1, [], {}, 53, 10**12),
    "vocab_size": ("96", None, -1, [], {}, 95, 10**12),
    "hidden_act": ("nope", 5, [], {}, None),
    "dtype": ("int7", [], "float33", {"a": 1}),
    "torch_dtype": ("int7", [], "float33"),
    "quantization_config": ("x", 5, [], {"quant_method": "nope"}, {"quant_method": 5}, {"quant_method": "gptq"},
                            {"load_in_4bit": "x"}),
    "head_dim": ("8", -8, [], 7),
    "rope_parameters": ("x", 5, [], {"rope_type": "nope"}, {"rope_type": 5}, {"rope_theta": "x"}),
}  # fmt: skip
# Values that may be taken or refused, but not fail in another way.
_ODD: dict[str, tuple[Any, ...]] = {
    "architectures": ("x", [5], [], {}, ["Other"], [None]),
    "eos_token_id": ("x", [], {}, -1, 10**9, [None], 1.5),
    "pad_token_id": ("x", [], {}, -5, 10**9),
    "bos_token_id": ("x", {}, -1, 10**9),
    "max_position_embeddings": ("x", None, 0, -1, 1, 10**12, [], 1.5),
    "tie_word_embeddings": ("x", None, 5, []),
    "use_cache": ("x", None, []),
    "rms_norm_eps": ("x", None, -1, [], 1e30),
    "attention_dropout": ("x", 2, -1, None),
    "transformers_version": (5, "x", None, []),
    "torch_dtype": (5, {}, None),
    "id2label": ("x", 5, [], {"a": 1}),
    "num_labels": ("x", -1),
    "output_attentions": (True, "x"),
    "is_encoder_decoder": (True, "x"),
    "attn_implementation": ("nope", 5),
    "_attn_implementation": ("nope", 5),
    "layer_types": (["x", "y"], "x", [5]),
    "name_or_path": (5, []),
    "_name_or_path": (5, []),
    "return_dict": (False,),
    "text_config": ({"a": 1}, "x", 5),
    "base_model_tp_plan": (5, "x"),
}
_TOKENIZER_WAYS = (
    "model.type", "model.vocab", "model.merges", "model", "added_tokens", "version", "pre_tokenizer", "decoder",
    "post_processor", "normalizer", "truncation", "padding",
)  # fmt: skip


def _commands(c: Context, model: Any) -> tuple[list[Any], bool]:
    """A command that loads the model, and whether it reads the weights."""
    cpu = ["--model", model, "--device", "cpu"]
    return c.pick([
        (["steer", *cpu, "--prompt", "the film", "--max-new-tokens", "2"], True),
        (["steer", *cpu, "--prompt", "the film", "--max-new-tokens", "2", "--attribute", "positive"], True),
        (["inspect", "values", *cpu, "--layers", "0", "--index", "0-3"], True),
        (["inspect", "trace", "the film", *cpu, "--format", "json"], True),
        (["attr-build", *cpu, "--attribute", "positive", "--output-dir", "out"], True),
        (["eval", *cpu, "--tasks", "perplexity", "--task-data", f"perplexity={c.good.rows}"], True),
        (["train", *cpu, "--data", c.good.rows, "--max-steps", "1", "--output-dir", "out"], True),
        (["inspect", "--model", model], False),
        (["train", "--model", model, "--data", c.good.rows, "--check"], False),
        (["inspect", "diff", c.good.model, model], True),
        (["merge", "--adapter", c.good.adapter, "--model", model, "--output-dir", "out", "--dry-run"], False),
        (["steer", "--prompt", "the film", "--max-new-tokens", "2", "--attribute", "positive", "--sweep", "0:0:1",
          "--judge-model", model, "--model", c.good.model], True),
    ])  # fmt: skip


def models(c: Context) -> Case:
    """A model folder of which one thing is wrong."""
    folder = c.copy(c.good.model, "model-copy")
    args, weights = _commands(c, c.pick([folder, "model-copy"]))
    planned = "--dry-run" in args
    way = c.pick(["config", "config", "odd", "random", "config file", "tokenizer", "tokenizer", "tokenizer file",
                  "tokenizer config", "tensors", "edited", "code", "pickle", "index", "vocabulary",
                  "generation config"])  # fmt: skip
    make = {
        "config": _config, "odd": _odd, "random": _random, "tokenizer": _tokenizer,
        "tokenizer config": _tokenizer_config, "generation config": _generation, "code": _code, "pickle": _pickle,
        "index": _index, "vocabulary": _vocabulary,
    }  # fmt: skip
    more: dict[str, Any] = {}
    stdin = None
    if way == "config file":
        codes: Any = 4
        what, more = break_file(c, folder / "config.json")
    elif way == "tokenizer file":
        codes = 4 if args[:2] != ["inspect", "--model"] else (0, 4)
        what, more = break_file(c, folder / "tokenizer.json")
    elif way == "tensors":
        codes = 4 if weights else (0, 4)
        what, more = break_tensors(c, folder / "model.safetensors")
    elif way == "edited":
        kind = c.pick(["nan", "inf", "shape", "dtype", "missing", "extra", "zeros", "huge"])
        name = edit_tensors(c, folder / "model.safetensors", kind)
        what, codes = f"{kind} {name.split('.')[-2]}", 4
        if kind in ("extra", "zeros", "huge", "dtype", "nan", "inf") or not weights:
            codes = (0, 4)
        if kind in ("nan", "inf", "huge") and weights:
            codes = (0, 1, 3, 4)  # what one number spoils depends on where it is
    else:
        codes, what = make[way](c, folder)
        if way == "code":
            stdin = b"y\n" * 20
    if planned and codes == 4:
        codes = (0, 4)
    if not weights and way in ("config", "pickle", "index"):
        codes = tuple(sorted({0, *((codes,) if isinstance(codes, int) else codes)}))
    if args[0] == "inspect" and args[1] == "--model" and way.startswith(("tokenizer", "vocabulary")):
        codes = (0, 4)
    return case(args, codes, f"{way}: {what}", stdin=stdin, outputs=("out",), **more)


def _edit(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _config(c: Context, folder: Path) -> tuple[Any, str]:
    value = json.loads((folder / "config.json").read_text())
    key = c.pick(sorted(_CONFIG))
    new = c.pick(_CONFIG[key])
    _edit(folder / "config.json", {**value, key: new})
    # What is larger than memory may be refused as that; transformers reads some words as numbers.
    codes: Any = (1, 4) if isinstance(new, int) and new >= 10**9 else 4
    if key in ("quantization_config", "torch_dtype", "dtype", "head_dim", "rope_parameters", "num_key_value_heads"):
        codes = (0, 2, 4)
    if (key, new) in (("hidden_act", None), ("num_key_value_heads", None)):
        codes = (0, 4)
    return codes, f"{key} = {json.dumps(new)[:30]}"


def _odd(c: Context, folder: Path) -> tuple[Any, str]:
    value = json.loads((folder / "config.json").read_text())
    key = c.pick(sorted(_ODD))
    new = c.pick(_ODD[key])
    _edit(folder / "config.json", {**value, key: new})
    # Rows may be too long for a context of one token.
    return (0, 2, 3, 4), f"{key} = {json.dumps(new)[:30]}"


def _random(c: Context, folder: Path) -> tuple[Any, str]:
    value, what = change_json(c, json.loads((folder / "config.json").read_text()))
    _edit(folder / "config.json", value)
    return (0, 1, 2, 3, 4) if "10000000000" in what else (0, 2, 3, 4), what


def _tokenizer(c: Context, folder: Path) -> tuple[Any, str]:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    if c.rng.random() < 0.4:
        value, what = change_json(c, value, depth=2)
        codes: Any = (0, 3, 4)
    else:
        at = c.pick(_TOKENIZER_WAYS)
        new = c.pick([5, "x", [5], {"type": "nope"}, {"a": []}, [[]], [{"id": "x"}], True])
        value, what = put(value, tuple(at.split(".")), new), f"{at} = {json.dumps(new)}"
        codes = (0, 4) if at in ("version", "truncation", "padding", "added_tokens") else 4
    _edit(path, value)
    return codes, what[:60]


def _tokenizer_config(c: Context, folder: Path) -> tuple[Any, str]:
    path = folder / "tokenizer_config.json"
    value = json.loads(path.read_text())
    key, new = c.pick([
        ("tokenizer_class", "Nope"), ("tokenizer_class", 5), ("tokenizer_class", []), ("model_max_length", "x"),
        ("model_max_length", -1), ("model_max_length", None), ("chat_template", 5), ("chat_template", [5]),
        ("chat_template", "{% for %}"), ("chat_template", {"a": 1}), ("eos_token", 5), ("eos_token", {}),
        ("pad_token", []), ("bos_token", {"content": 5}), ("eos_token", None), ("added_tokens_decoder", "x"),
        ("added_tokens_decoder", {"x": 5}), ("added_tokens_decoder", {"0": {"content": 5}}), ("padding_side", 5),
        ("padding_side", "up"), ("extra_special_tokens", 5), ("extra_special_tokens", ["x", 5]),
        ("clean_up_tokenization_spaces", "x"), ("backend", "nope"), ("auto_map", {"AutoTokenizer": 5}),
        ("unk_token", HOSTILE[0]), ("eos_token", HOSTILE[4]), ("pad_token", "not in the vocabulary"),
        ("add_bos_token", "x"), ("model_input_names", 5), ("truncation_side", None),
    ])  # fmt: skip
    if c.rng.random() < 0.2:
        what, _ = break_file(c, path, ["empty", "not JSON", "deep lists", "not UTF-8", "a symlink loop", "a folder"])
        return (0, 4), f"file {what}"
    _edit(path, {**value, key: new})
    return (0, 3, 4), f"{key} = {json.dumps(new)[:30]}"


def _generation(c: Context, folder: Path) -> tuple[Any, str]:
    path = folder / "generation_config.json"
    if c.rng.random() < 0.4:
        what, _ = break_file(c, path, ["empty", "not JSON", "deep lists", "not UTF-8", "a symlink loop", "a folder"])
        return (0, 4), what
    new = c.pick([5, [], {"max_length": "x"}, {"eos_token_id": "x"}, {"temperature": -1}, {"do_sample": "x"},
                  {"pad_token_id": []}, {"num_beams": 0}, {"unknown": HOSTILE[0]}, {"top_k": "x"}])  # fmt: skip
    _edit(path, new)
    return (0, 4), json.dumps(new)[:40]


def _code(c: Context, folder: Path) -> tuple[Any, str]:
    """Code in the folder that is named as the model's or tokenizer's own; every question is answered with yes."""
    body = f"import os\nos.makedirs({CANARY!r}, exist_ok=True)\n"
    (folder / "modeling_own.py").write_text(f"{body}class Own:\n    pass\nOwnConfig = OwnTokenizer = Own\n")
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    config = json.loads((folder / "config.json").read_text())
    way = c.pick(["known type", "new type", "tokenizer", "both", "hub"])
    if way in ("known type", "new type", "both", "hub"):
        config["auto_map"] = {k: f"owner/name--{v}" for k, v in own.items()} if way == "hub" else own
        config["model_type"] = "llama" if way == "known type" else "own"
    if way in ("tokenizer", "both"):
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer |= {"auto_map": {"AutoTokenizer": ["modeling_own.OwnTokenizer", None]}, "tokenizer_class": "Own"}
        _edit(folder / "tokenizer_config.json", tokenizer)
    _edit(folder / "config.json", config)
    return (0, 4), way


def _pickle(c: Context, folder: Path) -> tuple[Any, str]:
    beside = c.rng.random() < 0.3
    (folder / c.pick(["pytorch_model.bin", "model.bin", "adapter_model.bin"])).write_bytes(pickled())
    if not beside:
        (folder / "model.safetensors").unlink()
    return 0 if beside else 4, "beside the tensors" if beside else "in place of the tensors"


def _index(c: Context, folder: Path) -> tuple[Any, str]:
    """A checkpoint in several files, with a wrong index."""
    weights = folder / "model.safetensors"
    names = [name for name in read_safetensors(weights)[0] if name != "__metadata__"]
    part = "model-00001-of-00001.safetensors"
    weights.rename(folder / part)
    places: Any = dict.fromkeys(names, part)
    way = c.pick(["missing part", "outside", "wrong type", "no map", "fewer", "not JSON"])
    index: Any = {"metadata": {"total_size": 1}, "weight_map": places}
    if way == "missing part":
        places[names[0]] = "model-00002-of-00002.safetensors"
    elif way == "outside":
        places[names[0]] = c.pick(["../../../etc/passwd", "/etc/passwd", "../model/model.safetensors", HOSTILE[0]])
    elif way == "wrong type":
        places[names[0]] = c.pick([5, None, [], {}])
    elif way == "no map":
        index = c.pick([{}, [], 5, {"weight_map": []}, {"weight_map": 5}, {"weight_map": None}])
    elif way == "fewer":
        (folder / part).write_bytes((folder / part).read_bytes()[:-200])
    path = folder / "model.safetensors.index.json"
    _edit(path, index)
    if way == "not JSON":
        path.write_text(c.pick(["", "{", "[" * 20000]))
    return 4, way


def _vocabulary(c: Context, folder: Path) -> tuple[Any, str]:
    """Tokens that a terminal would act on, in a vocabulary that is fine."""
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    words = sorted(value["model"]["vocab"], key=value["model"]["vocab"].get)
    chosen = [text for text in HOSTILE if text not in ("", " ")]
    c.rng.shuffle(chosen)
    kept = {word for pair in value["model"]["merges"] for word in (*pair, "".join(pair))}
    free = [word for word in words[3:] if word not in kept]
    for word, text in zip(free, chosen, strict=False):
        value["model"]["vocab"][text] = value["model"]["vocab"].pop(word)
    _edit(path, value)
    return (0, 3, 4), "hostile tokens"
