"""Conversations: prompts, commands and errors, line by line."""

import pytest

from braces_cli.core.errors import BracesError
from braces_cli.core.options import Sampling
from braces_cli.steering.interactive import Conversation
from tests.steering.conftest import STEERED


def test_a_conversation_from_a_pipe(steer):
    """Each text comes with the unsteered one."""
    lines = ["the film is", "/s -5", "", "/attribute angry", "", "/seed", "", "/s x", "/nope", "//slash", "/quit", "no"]
    outcome = steer("--interactive", *STEERED, stdin="\n".join(lines) + "\n", given=False)
    assert outcome.code == 0, outcome.err
    rows = outcome.lines
    assert [row["attributes"] for row in rows] == [
        {"positive": 20.0}, {"positive": -5.0}, {"angry": -5.0}, {"angry": -5.0}, {"angry": -5.0},
    ]  # fmt: skip
    assert [row["prompt"] for row in rows] == ["the film is"] * 4 + ["/slash"]
    assert [row["seed"] for row in rows] == [0, 0, 0, 1, 1]
    assert rows[0]["unsteered"] == rows[1]["unsteered"] == rows[2]["unsteered"] != rows[3]["unsteered"]
    assert len({row["text"] for row in rows[:3]}) > 1
    # The text of the plain command at the same seed.
    (plain,) = steer("--prompt", "the film is", *STEERED, given=False).lines
    assert plain["text"] == rows[0]["text"]
    for note in (
        "/help shows the commands",
        "positive -5, seed 0",
        "/s: this needs a number",
        "/nope: no such command",
    ):
        assert note in outcome.err


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (["/attribute positive angry", "/s 2 -1"], "positive +2, angry -1"),
        (["/attribute positive angry", "/s angry -3"], "positive +1, angry -3"),
        (["/s 2"], "Name an attribute first"),
        (["/attribute"], "Attributes: angry"),
        (["/attribute purple"], "unknown attribute `purple`"),
        (["/layers 1", "/temperature 0"], "no attribute, seed 0, temperature 0, layers 1"),
        (["/layers 9"], "Error: "),
        (["/temperature -1"], "at least 0"),
        (["/top_p"], "Such as /top-p 0.9"),
        (["/help"], "/attribute NAME"),
        ([""], "/attribute NAME"),
    ],
)
def test_commands_answer_with_the_settings_or_an_error(session, lines, shown):
    """An error changes no setting."""
    talk = Conversation(session, {}, Sampling(4))
    for line in lines:
        before = talk.shown()
        try:
            answer = talk.handle(line)
        except BracesError as error:
            answer = f"Error: {error}"
            assert talk.shown() == before
    assert shown in answer
    assert talk.handle("/quit") is None
