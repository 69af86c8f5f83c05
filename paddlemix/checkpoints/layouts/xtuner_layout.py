"""XTuner's own directories: a projector, and beside it the parts that were trained or the adapters of them.

    projector/               config.json (model_type "projector") and its weights; what makes a directory XTuner's
    llm_adapter/             PEFT adapter of the language model; a whole one is in the directory itself
    visual_encoder_adapter/  PEFT adapter of the tower; a whole one is in visual_encoder/
    xtuner_config.py         the run's configuration; it names the parts that are elsewhere, and is read but never run

Knows places and settings, no model.
Source: InternLM/xtuner 0.1.23 xtuner/model/llava.py (to_xtuner_llava), modules/projector, tools/model_converters.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.layouts.config_keys import TEMPLATE_KEY, XTUNER_PROJECTOR_KEYS
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE, PEFT_ADAPTER_FILE
from paddlemix.config.foreign.templates import XTUNER_TEMPLATES, Named
from paddlemix.declared import integer, take
from paddlemix.errors import MissingFileError, UserError
from paddlemix.log import logger

PROJECTOR, TOWER, RUN_FILE = "projector", "visual_encoder", "xtuner_config.py"
LANGUAGE_ADAPTER, TOWER_ADAPTER = "llm_adapter", "visual_encoder_adapter"
LANGUAGE_MODEL_KEY, TOWER_KEY = "llm_name_or_path", "visual_encoder_name_or_path"  # in the run's file
MODEL_TYPE = "projector"
SELECT_LAYER = -2  # Source: LLaVAModel's default; none of its configurations says otherwise
_warned: set[Path] = set()  # directories whose warning was logged in this process


@dataclass(frozen=True, kw_only=True)
class XTunerParts:
    """Where the parts of a directory are.

    Args:
        directory: the whole.
        language_model: directory or name; `directory` itself where it is inside.
        tower: the same of the vision tower.
        adapters: the adapter directories, `LANGUAGE_ADAPTER` and `TOWER_ADAPTER`, as far as they exist.
        mm_projector_type: e.g. "mlp2x_gelu".
        mm_vision_select_layer: of the tower.
        chat_template: a name or a template of ours; None if no file declares it.
    """

    directory: Path
    language_model: str
    tower: str
    adapters: dict[str, Path]
    mm_projector_type: str
    mm_vision_select_layer: int
    chat_template: Any

    @property
    def projector(self) -> Path:
        """The projector's directory."""
        return self.directory / PROJECTOR

    def processor(self) -> dict[str, Any]:
        """Processor values that hold for every model of XTuner's, whose chat pads images to squares."""
        values = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "mm_vision_select_feature": "patch"}
        return values if self.chat_template is None else {**values, "chat_template": self.chat_template}


def is_xtuner(directory: Path) -> bool:
    """Whether a directory is XTuner's, by what its projector's `config.json` says."""
    path = directory / PROJECTOR / CONFIG_FILE
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def has_adapters(directory: Path) -> bool:
    """Whether an XTuner directory holds adapters, so that the model is not whole without them."""
    return is_xtuner(directory) and bool(_adapters(directory))


def _adapters(directory: Path) -> dict[str, Path]:
    places = {name: directory / name for name in (LANGUAGE_ADAPTER, TOWER_ADAPTER)}
    return {name: path for name, path in places.items() if (path / PEFT_ADAPTER_FILE).is_file()}


def read_xtuner(directory: Path) -> XTunerParts:
    """Finds the parts of an XTuner directory.

    Raises:
        MissingFileError: nothing says where the language model or the tower is.
        UserError: the projector is of a kind that we do not have, or a file cannot be understood.
    """
    adapters, run = _adapters(directory), _read_run_file(directory / RUN_FILE)
    bases = {
        name: read_json(path / PEFT_ADAPTER_FILE).get("base_model_name_or_path") for name, path in adapters.items()
    }
    # | part           | inside                | else named by, the first that does         |
    # |----------------|-----------------------|--------------------------------------------|
    # | language model | config.json           | its adapter, the run's file                |
    # | tower          | visual_encoder/       | its adapter, the run's file                |
    language_model = str(directory) if (directory / CONFIG_FILE).is_file() else None
    tower = str(directory / TOWER) if (directory / TOWER / CONFIG_FILE).is_file() else None
    language_model = language_model or bases.get(LANGUAGE_ADAPTER) or run.get(LANGUAGE_MODEL_KEY)
    tower = tower or bases.get(TOWER_ADAPTER) or run.get(TOWER_KEY)
    found = {
        "language model": (language_model, LANGUAGE_ADAPTER, LANGUAGE_MODEL_KEY),
        "vision tower": (tower, TOWER_ADAPTER, TOWER_KEY),
    }
    for part, (place, adapter, key) in found.items():
        if not place:
            raise MissingFileError(
                f"{directory} does not say where its {part} is: it is not inside, {adapter}/{PEFT_ADAPTER_FILE} has no "
                f"base_model_name_or_path, and no {RUN_FILE} names it; copy that file from the run, or write one with "
                f"the line {key} = 'FOLDER OR NAME'"
            )
    return XTunerParts(
        directory=directory,
        language_model=str(language_model),
        tower=str(tower),
        adapters=adapters,
        mm_projector_type=_projector_type(directory / PROJECTOR / CONFIG_FILE),
        mm_vision_select_layer=int(run.get("visual_select_layer", SELECT_LAYER)),
        chat_template=_declared_template(directory, run.get("prompt_template")),
    )


def conversion_hint(path: Path) -> str:
    """What to do with a checkpoint of XTuner's training: a file or folder iter_N.pth, or a folder of these.

    Returns:
        A sentence to end an error with; "" for anything else.
    """
    name = path.name
    if not (name.startswith("iter_") and name.endswith(".pth")):
        found = sorted(path.glob("iter_*.pth"), key=lambda item: item.stat().st_mtime) if path.is_dir() else []
        if not found:
            return ""
        path = found[-1]
    command = f"xtuner convert pth_to_hf CONFIG {path} OUT"
    return f"; '{path}' is a checkpoint of XTuner's training: convert it first ({command})"


def _projector_type(path: Path) -> str:
    """Our name of a projector; a missing key has ProjectorConfig's default."""
    return f"mlp{take(read_json(path), XTUNER_PROJECTOR_KEYS, str(path)).get('depth', 2)}x_gelu"


def _declared_template(directory: Path, run_template: str | None) -> Any:
    """The template that a directory's files declare: our own key's, else that of the run; None without either."""
    own = [directory / PROJECTOR / CONFIG_FILE, directory / CONFIG_FILE]
    found = next((value for path in own if path.is_file() and (value := read_json(path).get(TEMPLATE_KEY))), None)
    if found is not None:
        return found
    if run_template is None and directory not in _warned:
        _warned.add(directory)
        logger.warning(
            "%s does not declare the conversation template it was trained with, so the language model's is used; copy "
            "the run's %s into it, or set chat_template (--conv-mode)",
            directory,
            RUN_FILE,
        )
    return _template(run_template, directory)


def log_template(template: Any) -> None:
    """Logs the template that XTuner's chat must be started with, since its files have no place for one."""
    theirs = [name for name, named in XTUNER_TEMPLATES.items() if named.exact and named.ours == template]
    if theirs:
        logger.info("XTuner asks for the template: xtuner chat ... --prompt-template %s", theirs[0])
    elif template is not None:
        logger.warning(
            "XTuner has no template that renders the same text as '%s': answers in XTuner's chat will differ. "
            "paddlemix reads the template back from a key of its own",
            template if isinstance(template, str) else "its own",
        )


def _template(name: str | None, directory: Path) -> str | None:
    if name is None:
        return None
    named = XTUNER_TEMPLATES.get(name, Named(None))  # one of our templates of that name would be another program's
    if named.ours is not None and named.exact:
        return named.ours
    logger.warning(
        "%s was trained with XTuner's template '%s', which is not known here%s; set chat_template to one that renders "
        "the same text",
        directory,
        name,
        "" if named.ours is None else f" (the nearest is {named.ours})",
    )
    return None


def _read_run_file(path: Path) -> dict[str, Any]:
    """The literal values in a run's file: names of parts, the tower's layer, the template; nothing is executed.

    Raises:
        UserError: it is not Python, or the tower's layer is not a number there.
    """
    if not path.is_file():
        return {}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the last two of deep nesting
        raise UserError(f"{path} cannot be read: {error or 'nested too deeply'}") from error
    return dict(_settings(tree, path))


def _settings(tree: ast.Module, path: Path) -> Iterator[tuple[str, Any]]:
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name, value = node.targets[0].id, node.value
        if name in (LANGUAGE_MODEL_KEY, TOWER_KEY) and isinstance(value, ast.Constant):
            yield name, value.value
        elif name == "prompt_template" and isinstance(value, ast.Attribute):  # PROMPT_TEMPLATE.vicuna
            yield name, value.attr
        elif name == "model" and isinstance(value, ast.Call):
            for keyword in value.keywords:
                if keyword.arg == "visual_select_layer":
                    yield keyword.arg, _layer(keyword.value, path)


def _layer(value: ast.expr, path: Path) -> int:
    """The tower's layer, which decides what a model sees and is therefore never guessed.

    Raises:
        UserError: it is not written as a number.
    """
    try:
        return int(integer(-1000, 1000).read(ast.literal_eval(value)))
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path}: visual_select_layer is {ast.unparse(value)}; write the whole number there, e.g. {SELECT_LAYER}"
        ) from error
