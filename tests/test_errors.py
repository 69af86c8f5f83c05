"""A user's errors are built-in errors too, print their one message and cross process borders."""

from __future__ import annotations

import pickle

import pytest

from paddlemix.errors import MissingFileError, UserError, did_you_mean


def test_classes() -> None:
    assert issubclass(UserError, ValueError)
    assert issubclass(MissingFileError, UserError)
    assert issubclass(MissingFileError, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="^'a.json' does not exist$"):
        raise MissingFileError("'a.json' does not exist")


@pytest.mark.parametrize("kind", [UserError, MissingFileError])
def test_message(kind: type[UserError]) -> None:
    message = "record 1: 'größe' is not one of a, b"
    assert str(kind(message)) == message
    again = pickle.loads(pickle.dumps(kind(message)))
    assert (type(again), str(again)) == (kind, message)
    assert str(kind()) == ""


def test_suggestion() -> None:
    assert did_you_mean("lerning_rate", ["seed", "learning_rate"]) == "; did you mean 'learning_rate'?"
    assert did_you_mean("x", ["seed", "learning_rate"]) == ""
    assert did_you_mean("seed", []) == ""
    assert did_you_mean("sed", (name for name in ("seed", "size"))) == "; did you mean 'seed'?"
