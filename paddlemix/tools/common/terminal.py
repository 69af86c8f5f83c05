"""A chat in a terminal: questions line by line, commands that begin with a slash, answers as they are made.

Knows no argument of a command line and loads no model; a `ChatSession` does the talking.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paddlemix.errors import UserError, cut, did_you_mean
from paddlemix.out_of_memory import out_of_memory_explained
from paddlemix.outputs import Needed, Output, check_output
from paddlemix.paths import is_address, user_path, user_place

if TYPE_CHECKING:
    from paddlemix.generation.chat import ChatSession
    from paddlemix.generation.history import Picture

HELP = """\
/image PATH_OR_URL  show another image with the next question; <image> in the question marks its place
/back [N]           forget the last round, or the last N, with their images
/reset              start over with the images of the command line
/save FILE          write the conversation as a JSON record for training
/help               show this help
//...               ask a question that begins with a slash
Ctrl-C stops an answer; an empty line ends the chat."""

# int() of a long line of digits would take seconds.
_MOST_DIGITS = 6  # of a number of rounds


@dataclass(frozen=True, kw_only=True)
class TerminalOptions:
    """Options of a chat.

    Args:
        stream: show an answer while it is made.
        debug: print prompt and answer of each round as a line of JSON.
        interactive: somebody is typing: a faulty line is reported and the chat continues.  With piped questions the
            chat ends.
        less_memory: what to do if memory runs out.
        needed: returns what a saved conversation may not overwrite.
    """

    stream: bool = True
    debug: bool = False
    interactive: bool = False
    less_memory: Sequence[str] = ()
    needed: Callable[[], Iterable[Needed]] = tuple


class Terminal:
    """A chat session in the terminal.

    Args:
        session: without a round.
        images: to show with the first question: the path or http(s) address of each, and the picture.
    """

    def __init__(
        self, session: ChatSession, images: Sequence[tuple[str, Picture]], options: TerminalOptions | None = None
    ) -> None:
        self._session, self._options = session, options or TerminalOptions()
        self._first = list(images)
        self._waiting = list(images)  # shown with the next question
        self._names = {picture.number: name for name, picture in images}
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._show,
            "/back": self._back,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda rest: print(HELP),
        }

    def run(self) -> None:
        """Reads lines until an empty one or the end of the input.

        Raises:
            UserError: a line cannot be used and nobody is there to type another.
        """
        for line in _lines():
            try:
                self._take(line)
            except UserError as error:
                # Piped questions: the ones after a faulty line would be asked in the wrong context.
                if not self._options.interactive or self._session.is_over:
                    raise
                print(f"error: {error}", file=sys.stderr)
        print("exit...")

    def _take(self, line: str) -> None:
        if line.startswith("//"):
            return self._ask(line[1:])
        if not line.startswith("/"):
            return self._ask(line)
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            hint = did_you_mean(name, self._commands)
            raise UserError(
                f"'{name}' is not one of {', '.join(self._commands)}{hint}; write // to begin a question with a slash"
            )
        return self._commands[name](rest.strip())

    def _ask(self, question: str) -> None:
        session, pictures = self._session, [picture for _, picture in self._waiting]
        # To find out whether the round was kept after Ctrl-C.
        before = session.rounds[-1:]
        pieces = session.ask(question, pictures) if self._options.stream else iter(_later(session, question, pictures))
        print("ASSISTANT: ", end="", flush=True)
        try:
            with out_of_memory_explained("answering", ["/back or /reset", *self._options.less_memory]):
                for piece in pieces:
                    print(piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            # Lets the session forget or keep the round cleanly.
            pieces.close()  # type: ignore[attr-defined]
            print(" [stopped]", flush=True)
        except UserError:
            print(flush=True)  # the line that was begun
            raise
        if session.rounds[-1:] == before:
            return  # stopped before the answer began: the images are still waiting
        self._waiting = []
        if self._options.debug:
            answer = session.rounds[-1].answer
            print(json.dumps({"prompt": session.prompt(), "outputs": answer}, ensure_ascii=False))

    def _show(self, name: str) -> None:
        from paddlemix.datasets.images.decode import load_image
        from paddlemix.generation.history import Picture

        if not name:
            raise UserError("/image needs a path or an http(s) address")
        name = user_place(name, "/image")
        image = load_image(name)
        if self._session.model.config.vision is None:
            raise UserError("the model has no vision tower, so it cannot see images")
        picture = Picture(image, image.size)
        self._names[picture.number] = name
        self._waiting.append((name, picture))
        print(f"{image.width} x {image.height} pixels, shown with the next question")

    def _back(self, rest: str) -> None:
        if rest and not (rest.isdecimal() and len(rest) <= _MOST_DIGITS):
            raise UserError(f"/back expects a number of rounds, not '{cut(rest, 40)}'")
        self._session.back(int(rest or 1))
        # All rounds are gone: the images of the command line are shown again.
        if not self._session.rounds:
            self._waiting = [*self._first, *(image for image in self._waiting if image not in self._first)]
        print(f"{len(self._session.rounds)} rounds left")

    def _reset(self, rest: str) -> None:
        self._session.reset()
        self._waiting = list(self._first)
        print("a new conversation")

    def _save(self, name: str) -> None:
        from paddlemix.cache import replacing
        from paddlemix.datasets.forms.llava_record import llava_record
        from paddlemix.sample import Sample

        if not name or not self._session.rounds:
            raise UserError("/save needs a file name" if not name else "there is nothing to save yet")
        path = user_path(name, "/save").absolute()
        # A conversation may be saved again to the file it was saved to.
        if path.exists() and path not in self._saved:
            raise UserError(f"{path} exists and is not overwritten; choose another name")
        check_output(Output("/save", path, "file"), self._options.needed())
        pictures = [picture for item in self._session.rounds for picture in item.pictures]
        # Absolute, since the record is read from elsewhere.
        images = tuple(_kept_name(self._names[picture.number]) for picture in pictures)
        sample = Sample(messages=tuple(self._session.messages), images=images, source=str(path))
        record = llava_record(sample, "0")
        with replacing(path) as temporary:
            temporary.write_text(json.dumps([record], ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        self._saved.add(path)
        print(f"{len(self._session.rounds)} rounds in {path}")


def _later(session: ChatSession, question: str, pictures: Sequence[Picture]) -> Iterator[str]:
    """The whole answer as one piece."""
    yield session.answer(question, pictures)


def _kept_name(name: str) -> str:
    """A name that is still valid when it is read from another folder."""
    return name if is_address(name) else os.path.abspath(name)


def _lines() -> Iterator[str]:
    """The lines typed, up to an empty one or the end.

    Raises:
        UserError: it is not UTF-8 text.
    """
    while True:
        try:
            line = input("USER: ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"the question is not UTF-8 text (byte {error.start}); type or pipe UTF-8") from error
        if not line:
            return
        yield line
