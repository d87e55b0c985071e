"""Two processes share the documents: equal scores document by document, half the work each."""

import json
import os
from pathlib import Path

import pytest

from tests.training.workers import launch


def share(env: dict[str, str], out: Path, *argv: str) -> None:
    """Evaluate in a process of a launch; write the result."""
    os.environ.update(env)
    out.with_suffix(f".{env['RANK']}").write_text(json.dumps(evaluate(str(out), *argv)))


def evaluate(out: str, model: str, adapter: str, *data: str) -> dict:
    """An evaluation of base and adapter, with the number of requests or texts of each call in this process."""
    from lm_eval.models.huggingface import HFLM

    from braces_cli.evaluation import native_tasks
    from braces_cli.evaluation.run import run_evaluation
    from braces_cli.evaluation.settings import EvalSettings

    done: list[int] = []

    def counting(original, position: int):
        def counted(*args, **kwargs):
            done.append(len(args[position]))
            return original(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("generate_until", "_loglikelihood_tokens"):
            patch.setattr(HFLM, name, counting(getattr(HFLM, name), 1))
        patch.setattr(native_tasks, "text_likelihoods", counting(native_tasks.text_likelihoods, 2))
        tasks = ("popqa,truthfulqa_mc2,perplexity,truthfulqa_mc1",)
        settings = EvalSettings(
            model=model, adapter=(adapter,), device="cpu", tasks=tasks, task_data=data, limit=9, output_dir=Path(out),
            log_samples=True,
        )  # fmt: skip
        result = run_evaluation(settings)
    return {"done": done, "result": result}


@pytest.mark.slow
def test_two_processes_do_half_the_work_each_with_equal_scores(tiny_folder, make_adapter, write_jsonl, tmp_path):
    popqa = [{"question": f"What is {i}?" + " really" * (i % 4), "possible_answers": '["a", "e"]'} for i in range(9)]
    targets = {"choices": ["yes", "no way", "perhaps"], "labels": [1, 0, 1]}
    both = {"mc1_targets": {**targets, "labels": [1, 0, 0]}, "mc2_targets": targets}
    truthful = [{"question": f"Is it {'so ' * i}?", **both} for i in range(9)]
    data = [
        f"popqa={write_jsonl('p.jsonl', popqa)}",
        f"truthfulqa_mc2={write_jsonl('t.jsonl', truthful)}",
        f"perplexity={write_jsonl('x.jsonl', [{'text': f'text {i} ' * (1 + i % 3)} for i in range(7)])}",
        # One document cannot be shared.
        f"truthfulqa_mc1={write_jsonl('one.jsonl', truthful[:1])}",
    ]
    argv = [str(tiny_folder), str(make_adapter(tiny_folder)), *data]
    alone = json.loads(json.dumps(evaluate(str(tmp_path / "one"), *argv)))
    assert launch(share, 2, tmp_path / "two", *argv) == [0, 0]
    first, second = (json.loads((tmp_path / f"two.{rank}").read_text()) for rank in "01")
    # For each of two systems: 9 prompts, 27 choices, 7 texts, and 3 choices that one process does alone.
    assert alone["done"] == 2 * [9, 27, 3, 7]
    assert first["done"] == 2 * [5, 15, 3, 4]
    # The second process has one document less of each task, and repeats requests to stay in step.
    assert [n for n in second["done"] if n] == 2 * [5, 15, 3]
    assert second["result"] is None
    theirs, ours = alone["result"], first["result"]
    for system, other in zip(ours["systems"], theirs["systems"], strict=True):
        for task, metrics in other["results"].items():
            for metric, entry in metrics.items():
                found = system["results"][task][metric]
                assert _known(found) == pytest.approx(_known(entry), rel=1e-5)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one" / "samples").rglob("*.jsonl"))
    assert len(names) == 2 * 4
    for name in names:
        here, there = ((tmp_path / out / name).read_text().splitlines() for out in ("two", "one"))
        assert len(here) == len(there)
        for mine, other in zip(map(json.loads, here), map(json.loads, there), strict=True):
            assert all(mine[key] == other[key] for key in ("doc_id", "prompt", "answer"))
            # Up to rounding in batches of another size.
            assert mine["scores"] == pytest.approx(other["scores"], rel=1e-5)


def _known(entry: dict) -> dict:
    """Return an entry without a null standard error, which `approx` does not compare."""
    return {name: value for name, value in entry.items() if value is not None}
