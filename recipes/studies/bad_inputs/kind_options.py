"""Bad inputs: values of options, and arguments."""

from __future__ import annotations

import os
from typing import Any

from mutate import Context, case
from sandbox import Case

_BYTES = os.fsdecode(b"\xff\xfe\x80name")


# Values of each option that are certainly wrong, and those that may be taken.
_NUMBERS = ("x", "", " ", "1e3", "0x10", "²", "1_0x", "--", "1.5.2", "None", "9" * 5000)
_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--seed": (("-1", *_NUMBERS), ("0", str(2**31), str(2**63), str(2**64), str(2**200), "+5", "٣")),
    "--max-new-tokens": (("0", "-1", *_NUMBERS), ("1", "٣")),
    "--num-samples": (("0", "-1", *_NUMBERS), ("2",)),
    "--batch-size": (("0", "-1", *_NUMBERS), ("1", str(10**9), str(10**30))),
    "--top-k": (("x", "1.5", "", "²"), ("0", "-1", str(10**9), str(2**70), "1")),
    "--top-p": (("x", "", "nan", "-1", "2", "1.0001", "inf"), ("0", "1", "1e-300", "0.5")),
    "--temperature": (("x", "", "nan", "-1", "inf", "-inf"), ("0", "1e-300", "1e300", "5e-324")),
    "--s": (("x", "", "nan", "inf", "-inf", "1,2"), ("0", "1e300", "-1e30", "1e-320", "-0")),
    "--layers": (("x", "", "5-2", "-1", "0-99", "²", "0--1", "1,,2", "0-²", "9" * 5000, "0.5", "٢-x"),
                 ("0", "0-1", "1-")),
    "--device": (("gpu", "", "cuda:x", "cpu:-1x", "mps:99", "²", "meta", "xla"), ("cpu", "cpu:0", "cpu:7", "cuda:99")),
    "--dtype": (("int8", "", "float", "f32", "FLOAT32x"), ("float32", "bf16")),
    "--quantize": (("int4", "", "8", "none"), ()),
    "--format": (("xml", "", "JSON ", "js"), ("table",)),
    "--sweep": (("x", "", "1:2", "1:2:0", "0:1:-1", "nan:1:1", "0:inf:1", "0:1e9:1e-9", "1:2:3:4", ",", "0:1:nan"),
                ("0:1:1", "1", "1,2", "0:0:1", "1e300,0")),
    "--attribute": (("../x", "a/b", "", "a b", "no such", ".hidden", "x" * 5000), ("positive",)),
    "--prompt": ((), ("", " ", "\n", "a" * 50_000, "\ud800", _BYTES, "🐍", "</s>", "<s>")),
    "--stop": ((), ("", " ", "a" * 5000, _BYTES)),
    "--scorer": (("no such", "fit:", "VADER", "a/b/c"), ("vader",)),
    "--score-label": (("no such",), ("positive", "")),
    "--revision": ((), ("x", "", "../x", "a b")),
    "--device-map": (("x", "auto:1"), ("", "cpu", "auto")),
}  # fmt: skip
_TRAIN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--max-steps": (("0", "-1", *_NUMBERS), ("1",)),
    "--epochs": (("x", "", "nan", "-1", "0", "inf"), ("1e-9", "0.01")),
    "--lr": (("x", "nan", "0", "-1", "inf", ""), ("1e-300", "1e30", "1")),
    "--gate-lr": (("x", "nan", "0", "-1", "inf", ""), ("1e-300", "1e30")),
    "--rank": (("0", "-1", "33", str(10**9), *_NUMBERS), ("1", "32")),
    "--max-length": (("1", "0", "-1", *_NUMBERS), ("2", str(10**12))),
    "--warmup-steps": (("-1", *_NUMBERS), (str(10**12), "0")),
    "--gradient-accumulation": (("0", "-1", *_NUMBERS), ("3",)),
    "--schedule": (("x", "", "Linear"), ("cosine",)),
    "--relevance": (("x", "", "PAPER"), ("paper", "signed")),
    "--method": (("x", "", "LoRA"), ("lora",)),
    "--lora-alpha": (("0", "x", "1"), ()),
    "--packing": (("x", "", "yes"), ("on", "off")),
    "--columns": (("x", "", "a=b", "text", "text=", "=text", "text=a,text=b", "prompt=a"), ("text=text",)),
    "--opposites": (("x", "", "a:", "a:b:c", "a:a", ":"), ()),
    "--contrast": (("x", "nan", "-1", "1", "inf"), ("0",)),
    "--margin": (("x", "nan", "-1", "1"), ()),
    "--attribute-field": (("no such", ""), ("attribute", "label")),
    "--strength-field": (("x",), ()),
    "--save-steps": (("-1", *_NUMBERS), ("0", str(10**12))),
    "--save-total-limit": (("-1", *_NUMBERS), ("0", str(10**30))),
    "--logging-steps": (("0", "-1", *_NUMBERS), (str(10**30),)),
    "--eval-steps": (("-1", *_NUMBERS), (str(10**12),)),
    "--report-to": (("x", "", "wandb2"), ("none",)),
    "--push-to-hub": (("x", "a/b/c", "", "a b/c", "../x/y", "a/b.git"), ()),
    "--layers": _OPTIONS["--layers"],
    "--seed": _OPTIONS["--seed"],
}
_EVAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--limit": (("0", "-1", *_NUMBERS), ("1", str(10**30))),
    "--num-fewshot": (("-1", *_NUMBERS), ("0",)),
    "--batch-size": (("0", "-1", "x", "", "²", "auto:", "9" * 5000), ("auto", "1", str(10**30))),
    "--fail-under": (("x", "", "perplexity", "perplexity:x", "perplexity:x=y", ":=", "a:b=nan", "no:such=1"), ()),
    "--tasks": (("no such", "", ",", "a" * 5000, "²", "*"), ("perplexity", "perplexity,perplexity")),
    "--task-data": (("x", "=", "perplexity=", "=x", "other=x", "perplexity"), ()),
    "--scorer": (("x", "sentiment=", "perplexity=vader", "=vader"), ("sentiment=vader",)),
    "--s": (("x", "nan", "1"), ()),
    "--seed": _OPTIONS["--seed"],
}
_INSPECT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--layers": _OPTIONS["--layers"],
    "--index": (("x", "", "5-2", "-1", "0-99", "²", "9" * 5000), ("0", "0-3", "50-")),
    "--top-k": (("0", "-1", *_NUMBERS), ("1", str(10**9), str(10**30))),
    "--side": (("x", "", "Value"), ("gate", "up")),
}


def options(c: Context) -> Case:
    """A wrong value of an option, or one at the edge of what is right."""
    steer = ["steer", "--model", c.good.model, "--device", "cpu", "--max-new-tokens", "2"]
    train = ["train", "--model", c.good.model, "--device", "cpu", "--data", c.good.rows]
    rows = ["--task-data", f"perplexity={c.good.rows}"]
    base, known = c.pick([
        ([*steer, "--prompt", "the film", "--attribute", "positive"], _OPTIONS),
        ([*steer, "--prompt", "the film", "--attribute", "positive"], _OPTIONS),
        ([*train, "--max-steps", "1", "--output-dir", "out"], _TRAIN),
        ([*train, "--dry-run"], _TRAIN),
        (["eval", "--model", c.good.model, "--device", "cpu", "--tasks", "perplexity", *rows], _EVAL),
        (["inspect", "values", "--model", c.good.model, "--layers", "0", "--index", "0"], _INSPECT),
        ([], {}),
    ])  # fmt: skip
    if not base:
        return _arguments(c)
    flag = c.pick(sorted(known))
    wrong, edge = known[flag]
    value = c.pick([*wrong, *edge])
    args = list(base)
    if flag in args and flag in (
        "--prompt",
        "--max-new-tokens",
        "--max-steps",
        "--tasks",
        "--layers",
        "--index",
        "--device",
    ):
        # Given twice, the last one counts; given to be repeated, both do.
        place = args.index(flag)
        del args[place : place + 2]
    if flag in ("--scorer", "--score-label"):
        args += ["--sweep", "0:1:1"] if args[0] == "steer" else []
    args += c.pick([[flag, value], [f"{flag}={value}"]])
    # A column that no row has is the data's fault; a layer or device that is not there is found with the model.
    codes: Any = (2, 3) if flag in ("--columns", "--attribute-field", "--task-data") else 2
    if flag == "--push-to-hub" and "--dry-run" in args:
        codes = (0, 2)  # nothing will be uploaded
    if value not in wrong:
        codes = (0, 1, 2, 3) if flag in ("--lr", "--gate-lr", "--s", "--attribute-field", "--sweep") else (0, 2, 3)
    elif value in ("", " ") or flag in ("--scorer", "--device-map", "--device"):
        codes = (0, 2, 3, 4)
    return case(args, codes, f"{flag} {value[:24]!r}", outputs=("out",))


def _arguments(c: Context) -> Case:
    """Words that are arguments rather than options, and calls that lack or double something."""
    model = ["--model", str(c.good.model)]
    clamps = ["", "x", "0", "0:1", "0:1=", "0:1=x", "0:1=p", "0:1=p101", "0:1=p-1", "0:1=nan", "0:1=inf", "9:1=1",
              "0:99=1", "-1:0=1", "²:0=1", "0:²=1", "0:1=1:2", "0:1=pnan", "a:b=c", f"0:{'9' * 5000}=1"]  # fmt: skip
    ids = ["id:x", "id:", "id:-1", "id:999999", "id:²", f"id:{'9' * 5000}", "id:1.5"]
    args, codes = c.pick([
        (["inspect", "clamp", c.pick(clamps), *model, "--prompt", "the film"], 2),
        (["inspect", "find", c.pick(ids), *model], (2,)),
        (["inspect", "find", *model], 2),
        (["inspect", "trace", c.pick(["", " "]), *model], (0, 2, 3)),
        (["inspect", "trace", "the film", *model, "--positions", c.pick(["x", "99", "-1", "²", "3-1", ""])], 2),
        (["inspect", "trace", "the film", *model, "--target", c.pick(["id:x", "id:-1", "id:99999", ""])], (0, 2)),
        (["inspect", "diff", str(c.good.model), str(c.good.adapter)], (2, 4)),
        (["inspect", "diff", str(c.good.model)], 2),
        (["recipe", "copy", c.pick(["", "no", "../x", "small-sentiment.yaml.yaml", "SMALL", "a" * 5000])], 2),
        ([c.pick(["", "Train", "trian", "--", "-", "--verson", "-x", "train2", "²"])], 2),
        (["train"], 2), (["merge"], 2), (["eval"], 2), (["attr-build"], 2), (["inspect", "nothing"], 2),
        (["merge", "--adapter", str(c.good.adapter), "--adapter", str(c.good.adapter), "--output-dir", "out"], 2),
        (["merge", "--adapter", str(c.good.adapter), "--output-dir", "out", "--check", "x"], 2),
        (["merge", "--adapter", str(c.good.adapter), "--output-dir", c.pick([".", "", str(c.good.adapter),
          str(c.good.model), f"{c.good.adapter}/x"])], 2),
        (["steer", *model, "--prompt", "a", "--prompts", str(c.good.prompts)], 2),
        (["steer", *model, "--prompt", "a", "--output", "x", "--resume", "--overwrite"], 2),
        (["steer", *model, "--prompt", "a", "--s", "1"], (0, 2)),
        (["train", *model, "--data", str(c.good.rows), "--output-dir", "out", "--resume", "--overwrite"], 2),
        (["attr-build", *model, "--attribute", c.pick(["model", "attributes", "adapter_model", "con", ".", "..", "a/b",
          "x" * 300, "é" * 200, "a\tb"]), "--words", "good", "--output-dir", "out"], (0, 2)),
        (["attr-build", *model, "--attribute", "x", "--words", c.pick(["", ",", " , "]), "--output-dir", "out"],
         (2, 3)),
        (["eval", *model, "--tasks", "perplexity", "--resume"], 2),
        (["--version", "x"], (0, 2)), (["env", "x"], 2),
    ])  # fmt: skip
    return case(args, codes, f"arguments {' '.join(args[:3])[:30]!r}", outputs=("out",))
