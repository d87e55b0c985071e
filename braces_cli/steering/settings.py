"""Settings of `braces steer`. No torch here."""

import sys
from dataclasses import dataclass
from pathlib import Path

from braces_cli.core import options
from braces_cli.core.attributes.options import AttributeSettings, SteeredTokens, strengths
from braces_cli.core.attributes.words import check_name
from braces_cli.core.config import ATTRIBUTES, GENERATION, OUTPUT, SCORING, flag_of, option, same_option
from braces_cli.core.errors import ConfigError, near_misses

# Baselines of a sweep (`evaluation.baselines`).
BASELINE_METHODS = ("prompting", "difference", "pca")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(options.ScoringSettings):
    """Options of a sweep over strengths and of its scores.

    Attributes:
        sweep: Measure the first attribute at each strength of this range, such as -4:4:1.
        plot: PNG file for a plot of the sweep.
        scorer: Scorer of a sweep: vader, toxicity, fit:ROWS, judge:MODEL (a language model that rates texts), or a
            classifier's folder or hub id.
        score_label: Label of the scorer for the attribute. Default: the name of the attribute.
        baselines: Baselines to measure as well: prompting, difference, pca; separated by commas.
        max_kl: Largest KL divergence in nats per token from the unsteered model for the suggested strength.
        answers: Rows with `prompt`, `positive` and `negative`: report how often `positive` is preferred at each
            strength.
        detect: Labelled rows: report the AUROC of the attribute's direction as a detector of the attribute.
    """

    sweep: str | None = option(None, panel=SCORING, metavar="FROM:TO:STEP", outcome=False)
    plot: Path | None = option(None, panel=SCORING, outcome=False)
    scorer: str | None = option(None, metavar="SCORER", panel=SCORING, outcome=False)
    score_label: str | None = option(None, panel=SCORING, outcome=False)
    baselines: str | None = option(None, panel=SCORING, metavar="METHODS", outcome=False)
    max_kl: float | None = option(None, above=0, panel=SCORING, outcome=False)
    answers: str | None = option(None, panel=SCORING, metavar="ROWS", outcome=False)
    detect: str | None = option(None, panel=SCORING, metavar="ROWS", outcome=False)

    @property
    def baseline_names(self) -> list[str]:
        """Methods of `--baselines`.

        Raises:
            ConfigError: an unknown method.
        """
        names = [name.strip() for name in (self.baselines or "").split(",") if name.strip()]
        for name in names:
            if name not in BASELINE_METHODS:
                hint = near_misses(name, BASELINE_METHODS) or f"There are {', '.join(BASELINE_METHODS)}."
                raise ConfigError(f"no method `{name}`", where="--baselines", hint=hint)
        return list(dict.fromkeys(names))


# Options without effect unless there is a --sweep.
_SWEEP_ONLY = (
    "plot", "scorer", "score_label", "reference_model", "exclude_list_words", "baselines", "max_kl", "answers",
    "detect",
)  # fmt: skip
# Mode -> options without effect in it.
_REFUSED = {
    "sweep": ("show_unsteered", "resume", "interactive"),
    "interactive": ("prompt", "prompts", "output", "resume", "overwrite"),
}


@dataclass(frozen=True, kw_only=True)
class SteerSettings(
    options.AdapterSettings,
    AttributeSettings,
    options.GenerationSettings,
    options.SteeredLayers,
    SteeredTokens,
    SweepOptions,
    options.OverwriteSettings,
    options.SeedSettings,
    options.OutputSettings,
):
    """Settings of `braces steer`; options that no text depends on have `outcome=False`.

    Attributes:
        prompt: Prompt. Repeatable. Default: standard input.
        prompts: File with prompts: one per line, or rows (.jsonl, .json, .csv, .tsv, .parquet) with `prompt` and
            optionally `attributes: {name: s}`; - is standard input.
        erase: Name of an attribute to erase: the FFN outputs of the steered layers lose their component along it.
            Repeatable. With --sweep and without --attribute, --sweep has the shares to erase, such as 0,1.
        batch_size: Texts per forward pass. In half precision the output can vary with the batch size.
        show_unsteered: Also generate without steering.
        interactive: Read prompts and commands (/s 2, /attribute NAME, /help) from standard input.
        output: JSON Lines file for the texts, also for those of a sweep.
        resume: Continue --output after its last complete batch.
        format: Format of stdout; json: JSON Lines, the default if stdout is not a terminal; text: only prompts with
            their continuations.
    """

    first_options = ("prompt", "attribute", "s", "adapter", "model")

    prompt: tuple[str, ...] = option((), outcome=False)
    prompts: Path | None = option(None, panel=GENERATION, metavar="FILE", outcome=False)
    erase: tuple[str, ...] = option((), metavar="NAME", panel=ATTRIBUTES)
    top_k: int | None = same_option(options.Sampling, "top_k")
    stop: tuple[str, ...] = same_option(options.Sampling, "stop")
    batch_size: int = option(8, min=1, panel=GENERATION, outcome=False)
    show_unsteered: bool = option(False, panel=OUTPUT)
    interactive: bool = option(False, panel=OUTPUT, outcome=False)
    output: Path | None = option(None, panel=OUTPUT, outcome=False)
    resume: bool = option(False, panel=OUTPUT, outcome=False)
    # The default depends on stdout: JSON Lines unless it is a terminal.
    format: str | None = option(  # type: ignore[assignment]
        None, panel=OUTPUT, choices=("table", "json", "text"), display=True
    )

    @property
    def json(self) -> bool:
        """True if stdout carries JSON."""
        return self.format == "json" or (self.format is None and not sys.stdout.isatty())

    @property
    def strengths(self) -> dict[str, float]:
        """Name -> strength of each attribute; in a sweep, of the attributes that are not swept."""
        names = self.attribute
        if self.sweep is not None:
            strengths(names, ())  # refuses duplicate names, the swept attribute included
            names = names[1:]
            if len(self.s) not in (0, len(names)):
                hint = "The first attribute is swept; give one --s for each of the others, or no --s."
                raise ConfigError(f"{len(self.s)} strengths for {len(names)} other attributes", where="--s", hint=hint)
        return dict(zip(names, strengths(names, self.s), strict=True))

    @property
    def sampling(self) -> options.Sampling:
        """Sampling options."""
        return options.Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed, self.stop)

    def check(self) -> None:
        """Refuse combinations of options in which one has no effect."""
        super().check()
        for mode, refused in _REFUSED.items():
            for name in refused if getattr(self, mode) else ():
                if getattr(self, name):
                    where, hint = flag_of(type(self), name), "Leave one of them out."
                    raise ConfigError(f"does not go with --{mode}", where=where, hint=hint)
        _ = self.baseline_names
        for name in self.erase:
            check_name(name)
        if self.interactive and self.num_samples > 1:
            hint = "/seed draws another text."
            raise ConfigError("does not go with --interactive", where="--num-samples", hint=hint)
        if self.sweep is None:
            for name in _SWEEP_ONLY:
                if getattr(self, name):
                    hint = "Give --sweep FROM:TO:STEP with it."
                    raise ConfigError("this belongs to --sweep", where=flag_of(type(self), name), hint=hint)
        elif not self.attribute and not self.erase:
            hint = "Such as --attribute positive --sweep -4:4:1."
            raise ConfigError("nothing to sweep", where="--attribute", hint=hint)
        if (self.resume or self.overwrite) and not (self.output or self.sweep):
            raise ConfigError("no output file", where="--output", hint="Give --output FILE.")
        if self.format == "text" and (self.show_unsteered or self.output or self.sweep):
            hint = "Leave out --show-unsteered, --output and --sweep, or choose another format."
            raise ConfigError("text is the format of texts on stdout", where="--format text", hint=hint)
