"""Scorers of texts, by name, and the diversity of texts. No torch at import.

    vader              sentiment by VADER's lexicon and rules: positive, negative
    toxicity           toxicity by the word list of the package: toxic
    FOLDER, ORG/NAME   a Hugging Face text classifier, on disk or from the hub
    judge:MODEL        a language model that rates texts, folder or hub id

A scorer that fails raises an error; it never returns 0 instead.
"""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

from braces_cli.core.errors import BracesError, ConfigError, ModelError, near_misses
from braces_cli.core.files import path_exists, user_path

BUILT_IN = ("vader", "toxicity")
# Attribute -> (scorer, label) if no scorer is named.
DEFAULTS = {
    "positive": ("vader", "positive"),
    "joyful": ("vader", "positive"),
    "negative": ("vader", "negative"),
    "sad": ("vader", "negative"),
    "toxic": ("toxicity", "toxic"),
}
JUDGE = "judge:"
# VADER's authors call a text positive from this compound score on, and negative from minus this score on.
_THRESHOLD = 0.05
_REPETITION_WIDTH = 4
_BATCH = 32
_JUDGE_BATCH = 8
_ANSWERS = ("0", "1", "2")
# A text with at least this rating has the concept.
_HAS = 1.0
_QUESTIONS = {
    "concept": "How much is this text {label}? 0: not at all, 1: somewhat, 2: clearly.",
    "relevance": "How well does this text go with the prompt before it? 0: not at all, 1: partly, 2: well.",
    "fluency": "How fluent is the language of this text? 0: not fluent, 1: somewhat fluent, 2: fluent.",
}
# The text comes first, because input beyond the context is cut at the beginning and the question must remain.
_TEMPLATE = "{prompt}Text: {text}\n\nQuestion: {question} Answer with the number only.\nAnswer:"
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_PIECE = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*|[^\w\s]")


@dataclass(frozen=True)
class TextScore:
    """Score of one text: `value` grows with the strength of the label, `has` is true if the text has the label."""

    value: float
    has: bool


class Scorer(Protocol):
    """Scores texts for labels.

    Attributes:
        name: as the user wrote it.
        labels: labels of the scorer; empty if it takes any.
    """

    name: str
    labels: tuple[str, ...]

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        """Return a score of each text.

        Raises:
            BracesError: a text that cannot be scored.
        """
        ...


def scorer(name: str, exclude: Collection[str] = ()) -> Scorer:
    """Return the scorer of a name.

    Args:
        name: see the docstring of the module.
        exclude: words without effect on the score, so that steering by a word list is not scored by the same list.

    Raises:
        ConfigError: a scorer that is unknown or cannot exclude words.
        ModelError: a folder or hub id that cannot be loaded.
    """
    if name == "vader":
        return Vader(exclude)
    if name == "toxicity":
        return ToxicWords(exclude)
    is_judge = name.startswith(JUDGE)
    if not is_judge and not path_exists(user_path(name)) and name.count("/") != 1:
        known = f"There are {', '.join(BUILT_IN)}, judge:MODEL, folders and hub ids."
        hint = f"{near_misses(name, BUILT_IN)} {known}".strip()
        raise ConfigError(f"no scorer `{name}`", where="--scorer", hint=hint)
    if exclude:
        hint = "Words can be left out by vader, toxicity and fitted classifiers."
        raise ConfigError(f"{name} reads whole texts", where="--exclude-list-words", hint=hint)
    return Judge(name) if is_judge else HubClassifier(name)


def default_scorer(attribute: str) -> str:
    """Return the name of the default scorer of an attribute.

    Raises:
        ConfigError: no default scorer.
    """
    if attribute not in DEFAULTS:
        hint = f"Name one with --scorer. These attributes have one: {', '.join(DEFAULTS)}."
        raise ConfigError(f"no default scorer for `{attribute}`", where="--scorer", hint=hint)
    return DEFAULTS[attribute][0]


def label_of(attribute: str, scorer: Scorer, requested_label: str | None = None) -> str:
    """Return the scorer's label of an attribute: `requested_label`, else the attribute's name or default label.

    A judge model takes any label.

    Raises:
        ConfigError: the scorer does not have the label.
    """
    if not scorer.labels:
        return requested_label or attribute
    names = {label.lower(): label for label in scorer.labels}
    default = DEFAULTS.get(attribute, ("", attribute))[1]
    for label in [requested_label] if requested_label is not None else [attribute, default]:
        if label.lower() in names:
            return names[label.lower()]
    hint = f"It has {', '.join(scorer.labels)}; name one with --score-label."
    raise ConfigError(f"{scorer.name} has no label `{requested_label or attribute}`", where="--scorer", hint=hint)


def checked(name: str, values: Sequence[float]) -> Sequence[float]:
    """Return the values if all are finite.

    Raises:
        BracesError: a value that is not finite.
    """
    bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        raise BracesError(f"{name} gave {values[bad]} for text {bad}", hint="A text without a score is not scored 0.")
    return values


class ToxicWords:
    """Number of listed words per word of a text, in [0, 1]; a text is toxic if it has one.

    The list has profanity, insults and threats; an entry that ends in `*` matches all words that begin with it. It has
    no names of groups, so it misses attacks in polite words; a classifier can detect them.

    Args:
        exclude: words that do not count; entries that contain one are left out.
    """

    name = "toxicity"
    labels: tuple[str, ...] = ("toxic",)

    def __init__(self, exclude: Collection[str] = ()) -> None:
        self._excluded = split_words(exclude)
        text = (resources.files("braces_cli.assets") / "scoring" / "toxic.txt").read_text(encoding="utf-8")
        entries = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
        entries = [entry for entry in entries if not self._excluded & {word.rstrip("*") for word in entry}]
        self._starts = tuple(entry[0][:-1] for entry in entries if entry[0].endswith("*"))
        self._exact = {entry[0] for entry in entries if len(entry) == 1}
        self._phrases = [entry for entry in entries if len(entry) > 1]

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        scores = []
        for words in map(words_of, texts):
            count = sum(self._listed(word.removesuffix("'s")) for word in words)
            for phrase in self._phrases:
                width = len(phrase)
                count += sum(words[start : start + width] == phrase for start in range(len(words) - width + 1))
            scores.append(TextScore(count / max(len(words), 1), count > 0))
        return scores

    def _listed(self, word: str) -> bool:
        if word in self._excluded:
            return False
        return word in self._exact or (bool(self._starts) and word.startswith(self._starts))


class Vader:
    """VADER's compound score in [-1, 1] for `positive`, and minus that for `negative`.

    Args:
        exclude: words that are removed from the lexicon.
    """

    name = "vader"
    labels: tuple[str, ...] = ("positive", "negative")

    def __init__(self, exclude: Collection[str] = ()) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()
        for word in split_words(exclude):
            self._analyzer.lexicon.pop(word, None)

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        sign = 1.0 if label == "positive" else -1.0
        values = checked(self.name, [sign * self._analyzer.polarity_scores(text)["compound"] for text in texts])
        return [TextScore(value, value >= _THRESHOLD) for value in values]


class HubClassifier:
    """Probabilities of a sequence classifier, by folder or hub id.

    A text has the likeliest label; for `multi_label_classification`, every label with a probability of at least 0.5.

    Raises:
        ModelError: a model that cannot be loaded or has no classification head.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from braces_cli.core.models.hub import NO_ADAPTER, hub_errors
        from braces_cli.core.models.load import with_padding

        with hub_errors(name, "classifier", any_error=True):
            # `--trust-remote-code` is for the base, never for a classifier.
            tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True, trust_remote_code=False, adapter_kwargs=NO_ADAPTER
            )
        if info["missing_keys"]:
            # A base model loads as a classifier with a random head.
            missing = sorted(info["missing_keys"])[0]
            hint = "Give the folder or hub id of a sequence classifier."
            raise ModelError(f"it has no trained head ({missing} is missing)", where=name, hint=hint)
        self.name, self._model, self._tokenizer = name, model.eval(), with_padding(tokenizer)
        if model.config.pad_token_id is None:  # causal classifiers find the last token of a text by it
            model.config.pad_token_id = tokenizer.pad_token_id
        self.labels = tuple(model.config.id2label[index] for index in range(model.config.num_labels))
        self._multi_label = len(self.labels) == 1 or model.config.problem_type == "multi_label_classification"

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        import torch

        from braces_cli.core.models.tokenize import context_length

        column = self.labels.index(label)
        limit = context_length(self._model.config, self._tokenizer)
        scores = []
        for start in range(0, len(texts), _BATCH):
            part = list(texts[start : start + _BATCH])
            batch = self._tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=limit)
            with torch.no_grad():
                logits = self._model(**batch).logits.float()
            probabilities = logits.sigmoid() if self._multi_label else logits.softmax(dim=-1)
            has = probabilities[:, column] >= 0.5 if self._multi_label else probabilities.argmax(dim=1) == column
            values = checked(self.name, probabilities[:, column].tolist())
            scores += [TextScore(value, flag) for value, flag in zip(values, has.tolist(), strict=True)]
        return scores


@dataclass(frozen=True)
class Rating:
    """Ratings of one text, each from 0 to 2."""

    concept: float
    relevance: float
    fluency: float

    @property
    def overall(self) -> float:
        """Harmonic mean of the three; 0 if one of them is 0."""
        parts = (self.concept, self.relevance, self.fluency)
        return 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0

    @property
    def score(self) -> TextScore:
        """The concept rating as a score."""
        return TextScore(self.concept / 2, self.concept >= _HAS)


class Judge:
    """Ratings of texts by a causal language model, as in AxBench; a label is any name of a concept.

    A rating is the expectation 0 P(0) + 1 P(1) + 2 P(2) over the three possible answers, whose probabilities are
    normalised to sum to 1. The model must follow instructions; ratings of a base model mean little.
    """

    labels: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        from braces_cli.core.models.load import load_base
        from braces_cli.core.models.tokenize import context_length
        from braces_cli.core.options import LoadOptions

        self.name = name
        self._base = base = load_base(name.removeprefix(JUDGE), LoadOptions())
        self._window = context_length(base.model.config, base.tokenizer)

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        """Return the concept ratings of texts, without their prompts, as scores."""
        concepts = self._ratings("concept", [("", text) for text in texts], label)
        return [Rating(concept, 0.0, 0.0).score for concept in concepts]

    def rate(self, pairs: Sequence[tuple[str, str]], label: str) -> list[Rating]:
        """Return the ratings of texts after their prompts, from pairs (prompt, text)."""
        parts = [self._ratings(question, pairs, label) for question in _QUESTIONS]
        return [Rating(*values) for values in zip(*parts, strict=True)]

    def _ratings(self, question: str, pairs: Sequence[tuple[str, str]], label: str) -> Sequence[float]:
        """Return one rating of each text."""
        import torch

        from braces_cli.core.models import tokenize
        from braces_cli.core.models.load import input_device

        about = _QUESTIONS[question].format(label=label.replace("_", " "))
        tokenizer = self._base.tokenizer
        encoder, space = (tokenize.encode_answer, "") if tokenize.has_template(tokenizer) else (tokenize.encode, " ")
        examples: list[tokenize.Encoded] = []
        # The token of each answer, after the tokens that the three answers share.
        answers: list[list[int]] = []
        for prompt, text in pairs:
            whole = _TEMPLATE.format(prompt=f"Prompt: {prompt}\n\n" if prompt else "", text=text, question=about)
            encoded = [encoder(tokenizer, whole, f"{space}{answer}").ids for answer in _ANSWERS]
            shared = min(tokenize.common_length(encoded[0], other) for other in encoded[1:])
            ids = encoded[0][:shared][-self._window :]
            examples.append(tokenize.Encoded(ids, ids))
            answers.append([each[shared] for each in encoded])
        model, device = self._base.model, input_device(self._base.model)
        values = [0.0] * len(examples)
        for rows in tokenize.by_length(examples, _JUDGE_BATCH):
            batch = tokenize.pad_right([examples[row] for row in rows], tokenizer.pad_token_id)
            del batch["labels"]
            with torch.no_grad():
                logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).logits
            for place, row in enumerate(rows):
                final = logits[place, len(examples[row].ids) - 1].float()
                probabilities = final[answers[row]].softmax(dim=-1).cpu()
                values[row] = sum(rating * float(p) for rating, p in enumerate(probabilities))
        return checked(self.name, values)


def words_of(text: str) -> list[str]:
    """Return the words in lower case, without punctuation; apostrophes inside a word belong to it."""
    return [word.replace("\u2019", "'") for word in _WORD.findall(text.lower())]


def split_words(phrases: Iterable[str]) -> set[str]:
    """Return all words of several words and phrases."""
    return {word for phrase in phrases for word in words_of(phrase)}


def distinct(groups: Iterable[Sequence[str]], width: int) -> float:
    """Return distinct-n: different n-grams over all n-grams of a group of texts, mean over groups.

    N-grams are of words and punctuation marks, in lower case. A group is the samples of one prompt. Groups without an
    n-gram are left out; NaN if none is left. Longer groups have lower values, so compare only groups of the same size
    and length.
    """
    shares = []
    for texts in groups:
        pieces = [_PIECE.findall(text.lower()) for text in texts]
        grams = [tuple(each[start : start + width]) for each in pieces for start in range(len(each) - width + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else math.nan


def repetition(texts: Iterable[str]) -> float:
    """Return the share of a text's 4-grams that occur earlier in it, mean over texts with a 4-gram; NaN without any."""
    return 1 - distinct(([text] for text in texts), _REPETITION_WIDTH)
