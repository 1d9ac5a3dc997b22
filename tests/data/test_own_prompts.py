"""Prompts of the user's own: what a template may hold, what a chat is made of."""

import pytest

from bayestune.data import OwnPrompt, Prompt, Question
from bayestune.data.own_prompts import checked_template
from bayestune.data.prompts import CHOICES, PASSAGE_CHOICES

ROW = Question("r", "is {it} red?", ("yes", "no"), 0)
PASSAGE = Question("p", "red?", ("yes", "no"), 0, context="the sky")
TALK = Question("t", "red?", ("yes", "no"), 0, turns=(("user", "hi"), ("assistant", "hello")))


def written(folder, text, name="own.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_template_puts_rows_and_prints_braces_that_are_written_twice(tmp_path):
    path = written(tmp_path, '\ufeffJSON {{"a": 1}}\n{question}|{context}\n{choices}\nAnswer: \r\n')
    for scoring in ("letter", "text"):
        prompt = OwnPrompt(path).of(CHOICES, [ROW, PASSAGE], scoring)
        assert not prompt.chat
        said = prompt.render(ROW, scoring)
        assert said.replace("\r", "") == 'JSON {"a": 1}\nis {it} red?|\nA) yes\nB) no\nAnswer:'
    assert prompt.answers(ROW, "letter") == ("A", "B")


@pytest.mark.parametrize(
    ("text", "scoring", "said"),
    [
        ("{question} {choice}", "letter", r"unknown field \{choice\}.*did you mean \{choices\}\?"),
        ('{"a": 1} {question}{choices}', "letter", r"unknown field \{\"a\": 1\}.*written twice"),
        ("{question} {choices} {}", "letter", r"unknown field \{\}.*written twice"),
        ("{question.id} {choices}", "letter", r"unknown field \{question.id\}.*\{question\}"),
        ("{question!r} {choices}", "letter", r"unknown field \{question!r\}"),
        ("{question:>9} {choices}", "letter", r"unknown field \{question:>9\}"),
        ("{question {choices}", "letter", r"got braces that do not match .*written twice"),
        ("{question} {choices} }", "letter", r"got braces that do not match .*written twice"),
        ("{choices}", "letter", r"got no \{question\}, expected it where"),
        ("", "text", r"got no \{question\}"),
        ("{question}", "letter", r"got no \{choices\}, expected it under letter.*scoring=\"text\""),
    ],
)
def test_what_is_no_template_is_refused_with_a_remedy(text, scoring, said):
    with pytest.raises(ValueError, match=f"own.txt: .*{said}"):
        checked_template(text, "own.txt", scoring)
    assert checked_template("{question}", "own.txt", "text") == "{question}"


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder: got no file, expected a template"):
        OwnPrompt(tmp_path).of(CHOICES, [ROW], "text")
    with pytest.raises(FileNotFoundError, match="expected a template for --prompt"):
        OwnPrompt(tmp_path / "gone").of(CHOICES, [ROW], "text")
    with pytest.raises(ValueError, match="own.txt: not UTF-8 text"):
        OwnPrompt(written(tmp_path, b"\xff{question}")).of(CHOICES, [ROW], "text")


def test_what_the_prompt_has_no_place_for_is_refused(tmp_path, caplog):
    path = written(tmp_path, "{question}\n{choices}")
    with pytest.raises(ValueError, match=r"1 rows have a context, such as p: got a prompt without"):
        OwnPrompt(path).of(PASSAGE_CHOICES, [ROW, PASSAGE], "letter")
    with pytest.raises(ValueError, match=r"1 rows bring earlier messages, .* t: .*--chat true"):
        OwnPrompt(chat=False).of(CHOICES, [ROW, TALK], "letter")
    for given in (OwnPrompt(path), OwnPrompt(chat=True), OwnPrompt(system="sort")):
        with pytest.raises(ValueError, match="a classification head reads question and context"):
            given.of(CHOICES, [ROW], "head")
    with pytest.raises(ValueError, match="got the system message 'sort' and chat=False"):
        OwnPrompt(chat=False, system="sort")
    context = written(tmp_path, "{question}{context}{choices}", "context.txt")
    OwnPrompt(context).of(CHOICES, [ROW], "letter")
    assert "context.txt: no row has a context, which the prompt shows" in caplog.text


def test_a_system_message_and_rows_of_messages_make_a_chat():
    assert OwnPrompt().of(CHOICES, [ROW], "letter") == CHOICES
    assert OwnPrompt().of(CHOICES, [ROW, TALK], "letter").chat
    prompt = OwnPrompt(system="sort").of(CHOICES, [ROW], "letter")
    put = {"role": "user", "content": CHOICES.render(TALK, "letter")}
    turns = [{"role": role, "content": text} for role, text in TALK.turns]
    assert prompt.messages(TALK, "letter") == [{"role": "system", "content": "sort"}, *turns, put]
    own = Question("o", "red?", ("yes", "no"), 0, turns=(("system", "mine"),))
    assert prompt.messages(own, "letter") == [{"role": "system", "content": "mine"}, put]


def test_what_rows_and_prompts_of_earlier_versions_are_known_by_stays():
    assert ROW.content == ("", "is {it} red?", "yes", "no")
    assert ROW.fingerprint == "2c091ba59e11"
    assert TALK.content[-4:] == ("", "red?", "yes", "no")
    alone = Question("t", "red?", ("yes", "no"), 0)
    assert TALK.fingerprint != alone.fingerprint
    assert Prompt("a", "b") == Prompt("a", "b", chat=False, system="")
