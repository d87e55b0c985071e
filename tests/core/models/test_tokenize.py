"""Start and end tokens, scored tokens, and text that decodes unchanged."""

import pytest
import transformers

from braces_cli.core.models import tokenize
from tests.conftest import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_the_end_token_is_added_in_training_only(tokenizer):
    """One start token; the end token is scored, also as the padding token, and not a part of a prompt."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenize.encode(tokenizer, "").ids == [tokenizer.bos_token_id]
    prompt = tokenize.encode(tokenizer, "the film")
    row = tokenize.encode(tokenizer, "the film", end=True)
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert prompt.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in prompt.ids
    assert row.ids == [*prompt.ids, tokenizer.eos_token_id]
    assert row.labels == row.ids
    assert row.scored == len(row.ids) - 1
    # Text that ends with it gets no second one.
    assert tokenize.encode(tokenizer, "the film</s>", end=True) == row
    assert tokenize.encode(tokenizer, "the", " film</s>", end=True).ids == row.ids


def test_only_the_completion_is_scored(tokenizer):
    """The prompt has the tokens of a prompt for generation."""
    row = tokenize.encode(tokenizer, "the film is", " good", end=True)
    prompt = tokenize.encode(tokenizer, "the film is").ids
    assert row.ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [tokenize.IGNORED] * len(prompt)
    assert tokenizer.decode([i for i in row.labels if i != tokenize.IGNORED]) == " good</s>"


def test_a_token_that_spans_both_belongs_to_the_completion(tokenizer):
    """`the fil` + `m` is encoded as one text."""
    row = tokenize.encode(tokenizer, "the fil", "m", end=False)
    assert row.ids == tokenize.encode(tokenizer, "the film").ids
    assert row.scored >= 1


def test_a_continuation_keeps_its_leading_space(tokenizer):
    """Prompt and continuation together are the text."""
    prompt = tokenize.encode(tokenizer, "the film").ids
    whole = tokenize.encode(tokenizer, "the film is good").ids
    assert tokenize.decode_continuation(tokenizer, prompt, whole[len(prompt) :]) == " is good"


@pytest.mark.parametrize(("name", "expected"), [("RobertaConfig", 512), ("XLMRobertaConfig", 512), ("BertConfig", 514)])
def test_context_length(tokenizer, name, expected):
    """The positions of RoBERTa start after that of its padding token."""
    config = getattr(transformers, name)(max_position_embeddings=514, pad_token_id=1)
    assert tokenize.context_length(config, tokenizer) == expected


def test_real_tokenizers(shared):
    """SentencePiece, which adds a space, and byte-level BPE without a start token."""
    from braces_cli.core.models.load import load_tokenizer

    stories = load_tokenizer(str(shared / "models" / "stories260K"))
    assert tokenize.encode(stories, "Once upon").ids[0] == stories.bos_token_id
    assert stories.decode(tokenize.encode_word(stories, "happy")) == "happy"
    assert tokenize.encode_word(stories, "happy") == stories("happy", add_special_tokens=False)["input_ids"]
    prompt = tokenize.encode(stories, "The film is").ids
    longer = tokenize.encode(stories, "The film is good.").ids
    assert tokenize.decode_continuation(stories, prompt, longer[len(prompt) :]) == " good."
    word = next(i for i in range(stories.vocab_size) if stories.convert_ids_to_tokens(i).startswith("▁th"))
    assert tokenize.token_text(stories, word).startswith(" th")

    from transformers import AutoTokenizer

    gpt2 = AutoTokenizer.from_pretrained(shared / "models" / "gpt2-tokenizer")
    assert tokenize.encode_word(gpt2, "happy") == gpt2(" happy")["input_ids"]
    row = tokenize.encode(gpt2, "Q: two?\nA:", " 2", end=True)
    assert gpt2.decode([i for i in row.labels if i != tokenize.IGNORED]) == " 2<|endoftext|>"
