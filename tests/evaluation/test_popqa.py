"""The two PopQA rules on cases written out by hand."""

from __future__ import annotations

import json

import pytest

from braces_cli.evaluation.popqa import process_results, target

CASES = [
    # output, answers, acc, acc_word
    (" Paris", ["Paris"], 1, 1),
    (" paris, of course", ["Paris"], 1, 1),
    (" PARIS", ["Paris"], 0, 1),  # the authors do not try upper case
    (" Paris", ["paris"], 1, 1),  # capitalised
    (" New York City", ["new york"], 0, 1),  # capitalised is `New york`
    (" Iranian", ["Iran"], 1, 0),
    (" screenwriting", ["writing"], 1, 0),
    (" he is a writer.", ["writer"], 1, 1),
    (" (writer)", ["writer"], 1, 1),
    (" Yahoo! and more", ["Yahoo!"], 1, 1),
    (" it is .hack//sign", [".hack"], 1, 1),
    (" ASP.NET", [".NET"], 1, 0),
    (" the U.S.", ["U.S."], 1, 1),
    (" U.S.A", ["U.S."], 1, 0),
    (" São Paulo", ["são paulo"], 0, 1),  # capitalised is `São paulo`
    (" Sa\u0303o", ["São"], 0, 1),  # composed in another way
    (" Cafe\u0301", ["Cafe"], 1, 0),  # the mark belongs to the last letter
    (" STRASSE", ["Straße"], 0, 1),
    (" ÅÄÖ", ["åäö"], 0, 1),
    (" हिन्दी", ["हिन"], 1, 0),  # the answer ends inside a syllable
    (" 1984", ["19"], 1, 0),
    (" a rat, art", ["art"], 1, 1),  # stands in `rat, art` only at the end
    (" London", ["Paris", "London"], 1, 1),
    (" London", ["Paris", ""], 0, 0),  # an empty alias is in everything
    ("", ["Paris"], 0, 0),
    (" a+b", ["a+b"], 1, 1),  # no regular expression
    (" C major", [" C "], 1, 1),
]


@pytest.mark.parametrize(("output", "answers", "acc", "acc_word"), CASES)
def test_an_output_scores_as_counted_by_hand(output, answers, acc, acc_word):
    doc = {"possible_answers": json.dumps(answers)}
    assert process_results(doc, [output]) == {"acc": acc, "acc_word": acc_word}


def test_a_plain_list_of_answers_is_taken_too():
    assert target({"possible_answers": ["one", "two"]}) == "one"


def test_anything_else_is_refused():
    with pytest.raises(ValueError, match="no JSON list"):
        target({"possible_answers": '{"a": 1}'})
