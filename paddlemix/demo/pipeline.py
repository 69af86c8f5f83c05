"""The demo from beginning to end, through the commands that a user types.

data and untrained model -> pretraining on captions -> full fine-tuning on questions about the same scenes
-> LoRA on digits -> table, pictures, result.json -> a chat
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import paddlemix
from paddlemix.demo.digits import DigitFiles, write_digits
from paddlemix.demo.model import write_start_model
from paddlemix.demo.questioning import answer_questions
from paddlemix.demo.results import accuracy, format_table, write_picture, write_result
from paddlemix.demo.scene_data import SceneFiles, write_scenes
from paddlemix.demo.vocabulary import corpus, train_tokenizer
from paddlemix.errors import UserError
from paddlemix.outputs import Output, check_output
from paddlemix.temporary import is_temporary

PACKAGE = Path(paddlemix.__file__).parent
RECIPES = PACKAGE / "config" / "llava" / "tiny"
DEFAULT_FOLDER = Path("runs/demo")
# By it a later demo recognises its own folder.
_MARK = ".paddlemix-demo"  # file in a demo's folder
_FINETUNE = "tools/supervised_finetune.py"
CHAT_QUESTIONS = ("What digit is this?", "Is it even?")


@dataclass(frozen=True)
class DemoFolder:
    """The folders of one demo.

    Args:
        root: "runs/demo" unless the user says otherwise.
    """

    root: Path

    @property
    def data(self) -> Path:
        """Images and JSON lists."""
        return self.root / "data"

    @property
    def start(self) -> Path:
        """The untrained model."""
        return self.root / "start"

    @property
    def pretrained(self) -> Path:
        """The model after pretraining on the scenes' captions."""
        return self.root / "pretrained"

    @property
    def scenes(self) -> Path:
        """The model after full fine-tuning on the scenes."""
        return self.root / "scenes"

    @property
    def digits(self) -> Path:
        """The adapter after LoRA on the digits."""
        return self.root / "digits"


def check_folder(folder: DemoFolder, overwrite: bool = False) -> None:
    """Whether a folder is new, empty or an earlier demo's.

    Raises:
        UserError: it has other content and `overwrite` is not set, or cannot be written.
    """
    check_output(Output("--output", folder.root), ())
    # a temporary file of an interrupted run is not content of the user's
    content = [path for path in folder.root.iterdir() if not is_temporary(path)] if folder.root.is_dir() else []
    if content and not (overwrite or (folder.root / _MARK).is_file()):
        raise UserError(
            f"--output '{folder.root}' has other content, which the demo's would be mixed with; choose "
            "another folder, or give --overwrite"
        )


def prepare(folder: DemoFolder) -> tuple[SceneFiles, DigitFiles]:
    """Writes data, tokenizer and untrained model."""
    folder.root.mkdir(parents=True, exist_ok=True)
    # first of all: an interrupted demo is then recognised as one, and can be run again
    (folder.root / _MARK).touch()
    say("drawing 8,500 scenes and 1,797 handwritten digits")
    scenes, digits = write_scenes(folder.data), write_digits(folder.data)
    # from all lists, held-out ones too: it learns spellings, never which answer belongs to which picture
    train_tokenizer(corpus((*scenes.lists, *digits.lists)), folder.root / "tokenizer")
    write_start_model(folder.root / "tokenizer", folder.start)
    return scenes, digits


def run_demo(folder: DemoFolder) -> dict[str, object]:
    """Runs the whole demo.

    Returns:
        The content of `result.json`.

    Raises:
        UserError: a command of the demo failed; its own message is above.
    """
    started = time.time()
    scenes, digits = prepare(folder)
    train(folder, "examples/llava/pretrain.py", "pretrain.json", folder.start, folder.pretrained)
    train(folder, _FINETUNE, "sft_argument.json", folder.pretrained, folder.scenes)
    scene_verdicts = answer_questions(folder.scenes, scenes.held_out, folder.data)
    say(f"held-out scenes: {accuracy(scene_verdicts):.1%} of {len(scene_verdicts)} questions answered exactly")
    # The same questions before and after, so that the gain is the adapter's.
    before = answer_questions(folder.scenes, digits.held_out, folder.data)
    train(folder, _FINETUNE, "lora_sft_argument.json", folder.scenes, folder.digits)
    after = answer_questions(folder.digits, digits.held_out, folder.data)
    write_picture(folder.root / "digits.png", after, "Held-out digits after LoRA")
    write_picture(folder.root / "scenes.png", scene_verdicts, "Held-out scenes after full fine-tuning")
    result: dict[str, object] = {
        "accuracy_before": accuracy(before),
        "accuracy_after": accuracy(after),
        "scene_accuracy": accuracy(scene_verdicts),
        "held_out_images": len(after),
        "seconds": round(time.time() - started, 1),
    }
    write_result(folder.root / "result.json", result)
    rows = [
        ("held-out scenes, after full fine-tuning", str(len(scene_verdicts)), f"{result['scene_accuracy']:.1%}"),
        ("held-out digits, before LoRA", str(len(before)), f"{result['accuracy_before']:.1%}"),
        ("held-out digits, after LoRA", str(len(after)), f"{result['accuracy_after']:.1%}"),
    ]
    print(format_table(rows, ("", "images", "exact answers")))
    print(f"loss curves: {folder.scenes / 'loss.png'}, {folder.digits / 'loss.png'}")
    print(f"pictures: {folder.root / 'digits.png'}, {folder.root / 'scenes.png'}")
    # last: the numbers are printed and result.json is written, whatever becomes of the chat
    chat(folder, after[0].image_path)
    return result


def train(folder: DemoFolder, command: str, recipe: str, model: Path, output: Path) -> None:
    """Runs a training command with a shipped recipe, on the demo's folder."""
    overrides = [f"model_name_or_path={model}", f"output_dir={output}"]
    # The recipes name the default folder; elsewhere paths are overridden as a user would.
    if folder.root != DEFAULT_FOLDER:
        overrides += [f"image_root={folder.data}", f"dataset={json.dumps(_moved(recipe, folder))}"]
    run_command_line([command, str(RECIPES / recipe), *overrides])


def _moved(recipe: str, folder: DemoFolder) -> dict[str, object]:
    """The recipe's `dataset` with its files in the demo's folder."""
    values = json.loads((RECIPES / recipe).read_text(encoding="utf-8"))["dataset"]
    return {
        split: [{**entry, "data_files": str(folder.data / Path(entry["data_files"]).name)} for entry in entries]
        for split, entries in values.items()
    }


def chat(folder: DemoFolder, image: Path) -> None:
    """Chats for two rounds about an image, as a user would with piped questions."""
    arguments = ["--model-path", str(folder.digits), "--image-file", str(image), "--temperature", "0"]
    run_command_line(["examples/llava/run_predict_multiround.py", *arguments], "\n".join(CHAT_QUESTIONS) + "\n")
    print()


def run_command_line(arguments: Sequence[str], typed: str | None = None) -> None:
    """Prints a command and runs it in its own process.

    Args:
        arguments: the command's file inside the package, then its arguments.
        typed: its standard input; None to inherit ours.

    Raises:
        UserError: its exit status was not 0.
    """
    # what a user would type in a checkout; what runs is the same file with this Python
    shown = shlex.join(["python", f"paddlemix/{arguments[0]}", *map(_short, arguments[1:])])
    say(shown if typed is None else f"printf {shlex.quote(typed)} | {shown}")
    # A process of its own: a command must work from a shell, with nothing loaded before.
    command = [sys.executable, str(PACKAGE / arguments[0]), *arguments[1:]]
    status = subprocess.run(command, input=typed, text=True, check=False).returncode
    if status:
        raise UserError(f"this step of the demo ended with status {status}; see its message above")


def _short(argument: str) -> str:
    """A path inside the package as it reads from the checkout."""
    return argument.replace(str(PACKAGE), "paddlemix")


def say(text: str) -> None:
    """Prints a heading for the next step."""
    print(f"\n== {text}", flush=True)
