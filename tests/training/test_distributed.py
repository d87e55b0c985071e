"""Two processes over gloo, with DDP and FSDP2, compared with one process; unsupported launches."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import write_rows
from tests.training.workers import cli, launch

slow = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "recipes" / "launch"


@pytest.fixture
def rows(tmp_path):
    words = ["good", "sad", "old", "happy"] * 4
    lines = ({"prompt": f"the {a} film", "completion": f" the {a}" * (1 + n % 5)} for n, a in enumerate(words))
    return write_rows(tmp_path / "rows.jsonl", lines)


@pytest.fixture
def argv(model_dir, rows):
    """`braces train` for six steps; the last part of the command is its output folder."""
    return [
        "train", "--model", str(model_dir), "--data", str(rows), "--rank", "4", "--max-steps", "6", "--lr", "0.01",
        "--device", "cpu", "--save-total-limit", "0", "--output-dir",
    ]  # fmt: skip


# Eight rows a step in two processes, as with --batch-size 8 in one.
HALVED = ("--batch-size", "2", "--gradient-accumulation", "2")


def same_adapters(one, two, tolerance=1e-4):
    """Compare the adapters of two folders up to rounding."""
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < tolerance, name
    return expected


def result_of(folder):
    return json.loads((folder / "run.json").read_text())["result"]


def test_two_processes_give_the_adapter_of_one(braces, argv, rows, tmp_path):
    """Six steps at the same global batch, with accumulation and gradient checkpointing."""
    options = ("--eval-data", str(rows), "--save-steps", "4", "--logging-steps", "4")
    assert braces(*argv, tmp_path / "one", "--batch-size", 8, *options).code == 0
    words = [*argv, str(tmp_path / "two"), *HALVED, "--gradient-checkpointing", *options]
    assert launch(stopped, 2, words, tmp_path / "log.x", 0) == [0, 0], (tmp_path / "log.0").read_text()
    one, two = result_of(tmp_path / "one"), result_of(tmp_path / "two")
    for key in ("steps", "tokens", "rows", "epochs", "trainable_parameters"):
        assert two[key] == one[key]
    for key in ("train_loss", "base_eval_loss", "eval_loss"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    # Steps 5 and 6 are logged separately and counted once: counted twice, the loss would be a third larger.
    assert one["train_loss"] == pytest.approx(one["base_eval_loss"], rel=0.1)
    same_adapters(tmp_path / "one", tmp_path / "two")
    # The state of two processes is complete: one process alone can resume from it.
    assert len(json.loads((tmp_path / "two" / "checkpoint-6" / "rng.json").read_text())) == 2
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 2
    (tmp_path / "two" / "run.json").unlink()
    alone = braces(*argv, tmp_path / "two", "--batch-size", 8, *options, "--resume", "--format", "json")
    assert alone.code == 0, alone.err
    assert alone.json["resumed_from"].endswith("checkpoint-6")


def test_only_the_first_process_prints(braces, monkeypatch, model_dir, tmp_path):
    """Another process prints one line with its rank, and only if it outlives the first."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    outcome = braces(
        "train", "--model", model_dir, "--data", "none", "--output-dir", tmp_path / "o", "--format", "json"
    )
    assert outcome.code == 3
    assert outcome.out == ""
    assert "process 1: " in outcome.err


def test_unsupported_launches(braces, argv, monkeypatch, tmp_path):
    """Exit 2 with the setting to change."""
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    table = [
        (fsdp, "no FSDP on a CPU"),
        ({**fsdp, "FSDP_VERSION": "1"}, "fsdp_version"),
        ({**fsdp, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        ({**fsdp, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient-checkpointing"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
    ]
    for env, words in table:
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            outcome = braces(*argv, tmp_path / "o")
        assert (outcome.code, words in outcome.err) == (2, True), outcome.err
    assert not (tmp_path / "o").exists()


def stopped(env: dict[str, str], argv: list[str], log: Path, after: int = 0) -> None:
    """Run `braces ARGV` in a process; the last process gets SIGTERM after `after` steps, if not 0."""
    from braces_cli.training.loop import Trainer

    real = Trainer._figures

    def noted(self):
        row = real(self)
        if self.step == after and env["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    Trainer._figures = noted
    cli(argv, log.with_suffix(f".{env['RANK']}"), env)


@slow
def test_two_processes_resume_bit_identical_after_a_signal_to_one(argv, tmp_path):
    """In bfloat16, with accumulation and gradient checkpointing: both stop after the same step."""
    options = ("--dtype", "bfloat16", *HALVED, "--gradient-checkpointing", "--logging-steps", "2")

    def run(name: str, after: int, *more: str) -> list[int]:
        return launch(stopped, 2, [*argv, str(tmp_path / name), *options, *more], tmp_path / "log.x", after)

    assert run("whole", 0) == [0, 0]
    assert run("part", 2) == [143, 143], (tmp_path / "log.0").read_text()
    found = [path.name for path in (tmp_path / "part").glob("checkpoint-*")]
    assert found in (["checkpoint-3"], ["checkpoint-4"])  # the other process knows one step later
    assert run("part", 0, "--resume") == [0, 0]
    whole, part = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "part"))
    assert whole == part


def train_with_attributes(braces, argv, rows, target, *options):
    """Train with attributes in one process and in two, which run `target`; the adapters must be equal.

    Eleven rows in steps of twelve: one of the two processes has a batch without rows, every step has two batches.
    """
    texts = [("positive", "good day good film"), ("negative", "sad town sad end"), ("", "the old town")] * 4
    write_rows(rows, ({"text": text, "mood": mood} for mood, text in texts[:11]))
    more = ("--eval-data", str(rows), "--attribute-field", "mood", "--opposites", "positive:negative")
    more += ("--gate-lr", "0.3", "--contrast", "0", *options)
    folder = rows.parent
    one, two = folder / "one", folder / "two"
    assert braces(*argv, one, "--batch-size", 12, *more).code == 0
    words = [*argv, str(two), "--batch-size", "3", "--gradient-accumulation", "2", *more]
    assert launch(target, 2, words, folder / "log.x") == [0, 0], (folder / "log.0").read_text()
    assert any(name.startswith("condition.") for name in same_adapters(one, two))
    assert result_of(one)["eval_loss"] == pytest.approx(result_of(two)["eval_loss"], rel=1e-5)


@slow
def test_two_processes_with_attributes_give_the_adapter_of_one(braces, argv, rows):
    """Grouped by length; one process has a batch without rows."""
    train_with_attributes(braces, argv, rows, stopped, "--packing", "off")


def test_launch_profiles():
    """Each of recipes/launch loads as a launch configuration and starts with a comment."""
    from accelerate.commands.config.config_args import ClusterConfig

    paths = sorted(PROFILES.glob("*.yaml"))
    assert [path.stem for path in paths] == ["ddp", "fsdp2"]
    for path in paths:
        assert path.read_text().startswith("# ")
        config = ClusterConfig.from_yaml_file(yaml_file=str(path))
        fields = yaml.safe_load(path.read_text())
        assert str(config.distributed_type.value) == fields["distributed_type"]


def through_trainer(env: dict[str, str], argv: list[str], log: Path) -> None:
    """Run `braces ARGV` under FSDP2 as accelerate sets it up on GPUs.

    On a CPU accelerate ignores the request for FSDP, so its device type is patched.
    """
    os.environ.update(
        {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        }
    )  # fmt: skip
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    import braces_cli.training.run as checks
    from braces_cli.training.loop import Trainer

    real, capturing = PartialState.__init__, Trainer._save

    def spread(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_GPU

    def checked(self: Any) -> None:
        layer = self._base.model.layers[0]
        assert type(layer).__name__ == "FSDPLlamaDecoderLayer"
        assert isinstance(layer.mlp.relevance.weight, DTensor)
        capturing(self)

    PartialState.__init__, Trainer._save = spread, checked
    checks.check_launch = lambda device: None
    cli(argv, log.with_suffix(f".{env['RANK']}"), env)


@slow
def test_attributes_under_fsdp2_give_the_adapter_of_one_process(braces, argv, rows):
    train_with_attributes(braces, argv, rows, through_trainer)


@slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_training_under_fsdp2_gives_the_adapter_of_one_process(braces, argv, rows, tmp_path, dtype, tolerance):
    """Trainer with accelerate's wrapping by decoder layer, and resumed; the adapter of a bfloat16 base is float32."""
    options = ("--eval-data", str(rows), "--save-steps", "4", "--dtype", dtype)
    one, two = tmp_path / "one", tmp_path / "two"
    assert braces(*argv, one, "--batch-size", 8, *options).code == 0
    for more in ((), ("--resume",)):
        words = [*argv, str(two), *HALVED, *options, *more]
        assert launch(through_trainer, 2, words, tmp_path / "log.x") == [0, 0], (tmp_path / "log.0").read_text()
        same_adapters(one, two, tolerance)
        for name in ("run.json", "adapter_model.safetensors"):
            (two / name).unlink()
        shutil.rmtree(two / "checkpoint-6")
