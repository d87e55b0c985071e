"""Two processes share the prompts and write the bytes that one process writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.workers import cli, free_port, launch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"


def in_process(env: dict[str, str], argv: list[str], log: Path) -> None:
    """Run `braces ARGV` in a process and log the batch sizes."""
    from braces_cli.steering import texts

    real, counted = texts.generate, []

    def counting(model, tokenizer, requests, *args):
        counted.append(len(requests))
        log.with_suffix(f".count{env['RANK']}").write_text(json.dumps(counted))
        return real(model, tokenizer, requests, *args)

    texts.generate = counting
    cli(argv, log.with_suffix(f".out{env['RANK']}"), env)


def shared(tmp_path, *argv) -> list[str]:
    """Return the output of two processes."""
    log = tmp_path / "log.x"
    codes = launch(in_process, 2, [str(word) for word in argv], log)
    out = [log.with_suffix(f".out{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], out
    return out


def steer(model_dir, *more):
    return ["steer", "--model", model_dir, "--device", "cpu", "--max-new-tokens", 6, "--quiet", *more]


def test_two_processes_print_and_write_the_texts_of_one(braces, model_dir, prompts, tmp_path):
    """Only one process has a batch in the last round; in bfloat16, where texts depend on their batch; and resumed."""
    texts = ["--prompts", prompts, "--num-samples", 3, "--batch-size", 3, "--dtype", "bfloat16"]
    texts += ["--attribute", "positive", "--s", 2, "--show-unsteered"]
    one = braces(*steer(model_dir, *texts))
    assert one.code == 0, one.err
    printed = shared(tmp_path, *steer(model_dir, *texts))
    assert printed == [one.out, ""]
    counts = [json.loads((tmp_path / f"log.count{rank}").read_text()) for rank in range(2)]
    # Steered and unsteered texts.
    assert counts == [[3] * 6, [3] * 4]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(one.out.splitlines(keepends=True)[:7]))
    result = shared(tmp_path, *steer(model_dir, *texts, "--output", file, "--resume"))
    assert file.read_text() == one.out
    assert (json.loads(result[0])["resumed_from"], result[1]) == (6, "")


def test_two_machines_under_slurm_write_the_texts_of_one(braces, model_dir, prompts, tmp_path):
    """The launcher of recipes/launch, with Slurm's commands replaced."""
    texts = steer(model_dir, "--prompts", prompts, "--batch-size", 3)
    one = braces(*texts)
    assert one.code == 0, one.err
    argv = [str(word) for word in texts]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PROCESSES": "1"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{tmp_path}:{os.environ['PATH']}"}
    # Slurm starts the command on each machine; both are this one.
    on_each = 'for node in 0 1; do "$@" > out$node & done; wait; cat out0 out1'
    for name, body in (("scontrol", "echo localhost"), ("srun", on_each)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "PORT": str(free_port())}
    launcher = ["bash", LAUNCH / "slurm.sbatch", *argv]
    done = subprocess.run(launcher, capture_output=True, text=True, env=env | job, cwd=tmp_path)
    assert done.stdout == one.out, done.stderr


def test_two_processes_sweep_as_one(braces, model_dir, prompts, tmp_path):
    """The document is equal except for rounding of the perplexity; the plot is written once."""
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "a good happy day,positive\nthe sad end,negative\n" * 8)
    sweep = ["--prompts", prompts, "--attribute", "positive", "--sweep", "-2:2:2", "--batch-size", 2]
    sweep += ["--scorer", f"fit:{rows}"]
    one = braces(*steer(model_dir, *sweep, "--plot", tmp_path / "1.png", "--format", "json"))
    assert one.code == 0, one.err
    out = shared(tmp_path, *steer(model_dir, *sweep, "--plot", tmp_path / "2.png", "--format", "json"))
    assert out[1] == ""
    expected, found = one.json, json.loads(out[0])
    for here, there in zip(found.pop("points"), expected.pop("points"), strict=True):
        for name in ("perplexity", "perplexity_interval", "kl", "kl_first"):
            assert here.pop(name) == pytest.approx(there.pop(name), rel=1e-5)
        assert here == there
    assert (found["prompts"], found["label"]) == (expected["prompts"], expected["label"])
    assert (tmp_path / "2.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [((), "cannot share one pipe"), (("--prompts", "-"), "cannot share one pipe"), (("--interactive",), "one process")],
)
def test_pipes_and_conversations_need_a_single_process(braces, monkeypatch, model_dir, args, message):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    outcome = braces(*steer(model_dir, *args), stdin="the film\n")
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err


def test_the_launcher_without_a_scheduler_passes_machines_and_arguments_to_torchrun(tmp_path):
    """A stand-in for torchrun prints its arguments."""
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NODE": "1", "FIRST": "host", "PROCESSES": "2"}
    argv = ["steer", "--prompt", "two words"]
    done = subprocess.run(["bash", LAUNCH / "torchrun.sh", *argv], capture_output=True, text=True, env=env)
    expected = "--nnodes 2 --node-rank 1 --master-addr host --master-port 29500 --nproc-per-node 2 -m braces_cli"
    assert done.stdout.splitlines() == [*expected.split(), *argv], done.stderr
