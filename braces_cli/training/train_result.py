"""What a training run came to: what the command prints and `run.json` keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainResult:
    """What a run gave: the keys of `braces train --format json`.

    Times in seconds, memory in bytes, None where not measured. `rows_truncated` were cut to the maximum length and
    `rows_dropped` had no token to score; of a stream, all that were read. `side_path_share`: in the end, in each
    layer, the median norm of what the adapter adds over that of the FFN's output. `padding_share`: the part of the
    computed tokens that was padding; `packed`: several examples a row.
    """

    output_dir: str
    method: str
    trainable_parameters: int
    condition_parameters: int
    total_parameters: int
    trainable_percent: float
    steps: int
    epochs: float | None
    train_loss: float
    base_eval_loss: float | None
    base_eval_perplexity: float | None
    base_eval_perplexity_without_eos: float | None
    eval_loss: float | None
    eval_perplexity: float | None
    eval_perplexity_without_eos: float | None
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory: int
    rows: int
    rows_truncated: int
    rows_dropped: int
    side_path_share: list[float] | None
    packed: bool
    padding_share: float
    resumed_from: str | None = None
