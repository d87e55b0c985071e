"""Two processes over gloo, as torchrun starts them, give what one gives; launches that cannot work are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.training.workers import cli, launch, train_with_attributes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "recipes" / "launch"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = ["good", "sad", "old", "happy"]
    path.write_text("".join(json.dumps({"text": f"the {a} film and the {b} end"}) + "\n" for a in words for b in words))
    return path


def test_two_processes_give_the_adapter_of_one(braces, model_dir, rows, tmp_path):
    """torchrun, 12 steps at the same global batch, with accumulation and checkpointing; one result is printed."""
    common = [
        "train", "--model", model_dir, "--data", rows, "--eval-data", rows, "--rank", 4, "--max-steps", 12,
        "--lr", 0.01, "--device", "cpu", "--save-steps", 5, "--format", "json",
    ]  # fmt: skip
    one = braces(*common, "--batch-size", 8, "--output-dir", tmp_path / "one")
    assert one.code == 0, one.err
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "braces_cli", *common),
        *(
            "--batch-size",
            2,
            "--gradient-accumulation",
            2,
            "--gradient-checkpointing",
            "--output-dir",
            tmp_path / "two",
        ),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    for key in ("steps", "tokens", "rows", "epochs", "trainable_parameters"):
        assert two[key] == one.json[key]
    for key in ("train_loss", "base_eval_loss", "eval_loss"):
        assert two[key] == pytest.approx(one.json[key], rel=1e-5)
    # Steps 11 and 12 are a log of their own, and count once: twice would be a sixth more.
    assert one.json["train_loss"] == pytest.approx(one.json["base_eval_loss"], rel=0.1)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).abs().max() < 1e-4 for name in first)
    # The two processes' state is whole: one alone goes on from it, and from its end.
    assert len(json.loads((tmp_path / "two" / "checkpoint-12" / "rng.json").read_text())) == 2
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 2
    (tmp_path / "two" / "run.json").unlink()
    alone = braces(*common, "--batch-size", 8, "--output-dir", tmp_path / "two", "--resume")
    assert alone.code == 0, alone.err
    assert alone.json["resumed_from"].endswith("checkpoint-12")


def test_only_the_first_process_prints(braces, monkeypatch, model_dir, tmp_path):
    """Others keep a fault to themselves unless they outlive the first; then one line with their number."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    outcome = braces(
        "train", "--model", model_dir, "--data", "none", "--output-dir", tmp_path / "o", "--format", "json"
    )
    assert outcome.code == 3
    assert outcome.out == ""
    assert "process 1: " in outcome.err


def test_fsdp_that_cannot_work_is_refused_with_the_key_to_change(braces, monkeypatch, model_dir, rows, tmp_path):
    """Exit 2 where it would stay without effect or end in a fault of accelerate's; parallelism of other kinds, too."""
    args = ("train", "--model", model_dir, "--data", rows, "--output-dir", tmp_path / "o", "--device", "cpu")
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
            outcome = braces(*args)
        assert (outcome.code, words in outcome.err) == (2, True), outcome.err
    assert not (tmp_path / "o").exists()


def stopped(env: dict[str, str], argv: list[str], log: Path, after: int) -> None:
    """Body of a process: `braces ARGV`; the last process gets SIGTERM after so many steps, if any."""
    from braces_cli.training.loop import Trainer

    real = Trainer._figures

    def noted(self):
        row = real(self)
        if self.step == after and env["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    Trainer._figures = noted
    cli(argv, log.with_suffix(f".{env['RANK']}"), env)


def test_two_processes_of_which_one_is_told_to_stop_go_on_bit_for_bit(model_dir, rows, tmp_path):
    """In bfloat16, with accumulation and checkpointing: both end after the same step, and resume together."""
    argv = [
        "train", "--model", model_dir, "--data", rows, "--rank", 4, "--max-steps", 12, "--batch-size", 2, "--lr", 0.01,
        "--device", "cpu", "--dtype", "bfloat16", "--gradient-accumulation", 2, "--gradient-checkpointing",
        "--logging-steps", 2, "--output-dir",
    ]  # fmt: skip

    def run(name: str, after: int, *more: str) -> list[int]:
        words = [str(word) for word in (*argv, tmp_path / name, *more)]
        return launch(stopped, 2, words, tmp_path / "log.x", after)

    assert run("whole", 0) == [0, 0]
    assert run("part", 4) == [143, 143], (tmp_path / "log.0").read_text()
    found = [path.name for path in (tmp_path / "part").glob("checkpoint-*")]
    assert found in (["checkpoint-5"], ["checkpoint-6"])  # known to all a step later
    assert run("part", 0, "--resume") == [0, 0]
    whole, part = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "part"))
    assert whole == part


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_two_processes_with_attributes_give_the_adapter_of_one(braces, model_dir, tmp_path, packing):
    """Packed and in groups; what is read before the forward pass gets its gradients, and a batch may have no row."""
    train_with_attributes(braces, model_dir, tmp_path, ["--packing", packing], stopped, 0)


def test_profiles_are_what_accelerate_reads():
    """Each of recipes/launch loads as a launch configuration and opens with a comment."""
    from accelerate.commands.config.config_args import ClusterConfig

    paths = sorted(PROFILES.glob("*.yaml"))
    assert [path.stem for path in paths] == ["ddp", "fsdp2"]
    for path in paths:
        assert path.read_text().startswith("# ")
        config = ClusterConfig.from_yaml_file(yaml_file=str(path))
        fields = yaml.safe_load(path.read_text())
        assert str(config.distributed_type.value) == fields["distributed_type"]
