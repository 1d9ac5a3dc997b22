"""A row that is a conversation: earlier messages, the question, and perhaps the answer."""

import json
from typing import Any

from bayestune.errors import Refusal

_ROLES = ("system", "user", "assistant")
Turns = tuple[tuple[str, str], ...]


def read_conversation(cell: Any, place: str) -> tuple[Turns, str, str | None]:
    """The messages of a cell: those before the question, the question, and its answer.

    The question is the user's last message; an assistant's message behind it is the answer.

    Args:
        cell: messages such as {"role": "user", "content": "…"}, as a list or in JSON.
        place: where the row stands, for messages.

    Returns:
        The turns before the question, the question, and the answer, None without one.

    Raises:
        Refusal: if it is no list of messages, or the last one is not the user's or the assistant's.

    >>> read_conversation([{"role": "user", "content": "red?"}], "own.jsonl:1")
    ((), 'red?', None)
    """
    turns = [_turn(message, place) for message in _listed(cell, place)]
    answer = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        roles = [role for role, _ in turns]
        raise Refusal(
            f"row {place}: got messages by {roles}, expected the user's last, perhaps with the "
            "assistant's answer behind it; end with the message that is to be answered"
        )
    return tuple(turns[:-1]), turns[-1][1], answer


def _listed(cell: Any, place: str) -> list[Any]:
    """A cell's messages as a list; refuses any other cell."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError as error:
            got = f"got messages {cell!r}, expected a JSON list ({error})"
            raise Refusal(f"row {place}: {got}; write them as JSON") from None
    if not isinstance(cell, list):
        raise Refusal(f"row {place}: got messages {cell!r}, expected a list; write one")
    return cell


def _turn(message: Any, place: str) -> tuple[str, str]:
    """A message's role and text; refuses any other message."""
    role = message.get("role") if isinstance(message, dict) else None
    text = message.get("content") if isinstance(message, dict) else None
    if role not in _ROLES or not isinstance(text, str):
        raise Refusal(
            f'row {place}: got the message {message!r}, expected {{"role": …, "content": a text}} '
            f"with a role among {list(_ROLES)}; reword or drop it"
        )
    return role, text
