"""Prompts for the model that is being trained: the first question of data sets' records, or the user's own questions.

They are encoded as a chat would encode them.  The model is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.datasets.images.decode import load_image
from paddlemix.datasets.images.sources import ImageSettings, is_data_uri, is_url
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.errors import UserError
from paddlemix.generation.ending import Ending, ending_of
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.sample import Example, Message

_SHOWN_PATH = 200  # characters; a data URI holds a whole image


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question, encoded, and what is needed to judge its answer.

    Args:
        encoded: ready for its answer.
        processor: which encoded it.
        ending: what ends the answer.
        text: the words of the question.
        image: path of its first image; None where it has none.
        reference: the right answer; None where it is not known.
    """

    encoded: Example
    processor: LlavaProcessor
    ending: Ending
    text: str
    image: str | None = None
    reference: str | None = None


def prompt_of_record(data: SampleDataset, index: int) -> Prompt | None:
    """The first question of a sample, with its first answer as reference.

    Returns:
        None where the data set leaves the sample out.

    Raises:
        UserError: the sample cannot be used; names it.
    """
    # The data set reports samples it cannot use by this length, without an error.
    if data.measure(index) == (0, 0):
        return None
    sample = data.sample(index)
    # Later rounds would need the model's own earlier answers to be a fair question.
    first = next(number for number, message in enumerate(sample.messages) if message.role == "assistant")
    messages, answer = sample.messages[:first], sample.messages[first].text.strip()
    # Only the pictures of the first question are opened.
    used = [number for message in messages for number in message.image_indices]
    paths = sample.images[: max(used) + 1] if used else ()
    processor = data.processor_of(index)
    try:
        images = [load_image(path, data.settings.images) for path in paths]
        encoded = processor.encode_prompt(messages, images)
    except UserError as error:
        if data.settings.on_bad_sample == "skip":
            return None
        raise type(error)(f"{sample.source}: {error}") from error
    return Prompt(
        encoded=encoded,
        processor=processor,
        ending=ending_of(processor),
        text=messages[-1].text.strip(),
        image=_shown(paths[used[0]]) if used else None,
        reference=answer,
    )


def first_prompts(data: SampleDataset, count: int) -> list[Prompt]:
    """Those of the first samples that are not left out, at most `count`."""
    found: list[Prompt] = []
    for index in range(len(data)):
        if len(found) == count:
            break
        prompt = prompt_of_record(data, index)
        found += [] if prompt is None else [prompt]
    return found


def own_prompts(
    prompts: Sequence[Mapping[str, Any]], processor: LlavaProcessor, image_root: str | None, images: ImageSettings
) -> list[Prompt]:
    """The questions of the key `sample_prompts`.

    Args:
        prompts: objects with `question` and, where it is about one, `image`: a path, absolute or below `image_root`, or
            an http(s) URL.

    Raises:
        UserError: an image cannot be used, or the template cannot write the question; names the item.
    """
    return [
        _own_prompt(f"sample_prompts[{number}]", prompt, processor, image_root, images)
        for number, prompt in enumerate(prompts)
    ]


def _own_prompt(
    name: str, prompt: Mapping[str, Any], processor: LlavaProcessor, image_root: str | None, settings: ImageSettings
) -> Prompt:
    text, image = prompt["question"], prompt.get("image")
    path = None if image is None else _below(image, image_root)
    content: tuple[str | int, ...] = (text,) if path is None else (0, text)
    try:
        pictures = [] if path is None else [load_image(path, settings)]
        encoded = processor.encode_prompt([Message(role="user", content=content)], pictures)
    except UserError as error:
        raise type(error)(f"{name}: {error}") from error
    # Shortened, because a data URI holds a whole picture.
    shown = None if path is None else _shown(path)
    return Prompt(encoded=encoded, processor=processor, ending=ending_of(processor), text=text, image=shown)


def _below(image: str, image_root: str | None) -> str:
    # Neither an address nor a data URI starts from a folder.
    if is_url(image) or is_data_uri(image) or image_root is None:
        return image
    return str(Path(image_root) / image)  # an absolute path stays as it is


def _shown(path: str) -> str:
    return path if len(path) <= _SHOWN_PATH else f"{path[:40]}..."
