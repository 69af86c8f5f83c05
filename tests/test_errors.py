"""A user's errors are built-in errors too, print their one message and cross process borders."""

from __future__ import annotations

import pickle

import pytest

from paddlemix.errors import MissingFileError, UserError, cut, did_you_mean, without_secrets


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
    assert did_you_mean("deepspeed", ["seed"]) == did_you_mean("lora_enable", ["lora_alpha"]) == ""
    assert did_you_mean("nf5", ["int8", "nf4"]) == "; did you mean 'nf4'?"
    assert did_you_mean("acuracy", ["loss", "token_accuracy"]) == "; did you mean 'token_accuracy'?"
    assert did_you_mean("seed", []) == ""
    assert did_you_mean("sed", (name for name in ("seed", "size"))) == "; did you mean 'seed'?"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://me:pa@ss@host/a.png", "https://***@host/a.png"),
        ("see http://token@host:80/x and ftp://u:p@h/", "see http://***@host:80/x and ftp://***@h/"),
        ("https://h/a?size=2&token=abc#top", "https://h/a?size=2&token=***#top"),
        (
            "https://h/a?OSSAccessKeyId=a&Expires=9&x-oss-signature=b'",
            "https://h/a?OSSAccessKeyId=***&Expires=9&x-oss-signature=***'",
        ),
        ("https://h/a?X-Amz-Credential=a/b&api_key=c;sig=d", "https://h/a?X-Amz-Credential=***&api_key=***;sig=***"),
        ("https://h/a?keyword=cat&monkey=1&page=2", "https://h/a?keyword=cat&monkey=1&page=2"),
        ("a mail to me@host, x?y=1", "a mail to me@host, x?y=1"),
    ],
)
def test_no_secret_is_repeated(given: str, shown: str) -> None:
    assert without_secrets(given) == shown
    for kind in (UserError, MissingFileError):
        assert str(kind(given)) == shown
        assert str(pickle.loads(pickle.dumps(kind(given)))) == shown


def test_of_a_picture_in_a_message_the_beginning_is_enough() -> None:
    picture = "iVBOR" * 40_000
    for kind in (UserError, MissingFileError):
        assert (
            str(kind(f"no image '{picture}' in images"))
            == f"no image '{picture[:99]}... (200,002 characters) in images"
        )
    names = "\n".join(f"layers.{number}.weight is missing" for number in range(500))
    assert str(UserError(names)) == names
    assert cut("abc", 3) == "abc" and cut("abcd", 3) == "abc... (4 characters)"


def test_what_is_no_text_can_be_shown() -> None:
    """Half a surrogate, as JSON may hold, or a file name's byte that is not UTF-8."""
    message = str(UserError("the key '\ud800' of \udcff.json is unknown"))
    assert message == "the key '\\ud800' of \\udcff.json is unknown"
