"""One checkpoint layout into another: streaming, verified, whole or not at all.

    convert_checkpoint("llava-v1.5-7b-hf", "llava-v1.5-7b", Conversion(to="llava"))

Weights pass through tensor by tensor and no model is built, so that a few tensors' memory is enough.  What each layout
declares is in `declared_files.py`, names of weights are in `weight_names.py`.
"""

from __future__ import annotations

from pathlib import Path

from paddlemix.checkpoints.convert import declared_files
from paddlemix.checkpoints.convert.complete_checkpoint import Checkpoint, read_checkpoint
from paddlemix.checkpoints.convert.tokenizer_files import (
    copy_tokenizer,
    declare_added_tokens,
    remove_added_tokens,
)
from paddlemix.checkpoints.convert.verify import Conversion, Report, write_verified
from paddlemix.checkpoints.files.directories import atomic_directory
from paddlemix.checkpoints.files.tensors import TensorEntry, Tensors, transposed
from paddlemix.checkpoints.files.weight_files import read_json, write_json, write_safetensors
from paddlemix.checkpoints.hub.needs import needed_by_model
from paddlemix.checkpoints.identity.weight_identity import ORIGIN_FILE, source_digests, write_origin
from paddlemix.checkpoints.layouts.added_rows import (
    HF_VOCABULARY_FILE,
    append_added_rows,
    choose_vocabulary,
)
from paddlemix.checkpoints.layouts.end_tokens import GENERATION_FILE
from paddlemix.checkpoints.layouts.families import FAMILIES
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.checkpoints.layouts.image_settings import PREPROCESSOR_FILE
from paddlemix.checkpoints.layouts.joined_weights import join_attention
from paddlemix.checkpoints.layouts.recognise import config_values
from paddlemix.checkpoints.layouts.towers import join_tower, tower_form
from paddlemix.checkpoints.layouts.weight_names import HF_OLD, OURS, XTUNER_PROJECTOR, KeyMap, is_linear_weight
from paddlemix.checkpoints.layouts.xtuner_layout import PROJECTOR, TOWER, log_template
from paddlemix.checkpoints.source import open_source
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.outputs import Output, check_output
from paddlemix.processors.llava import PROCESSOR_FILE
from paddlemix.processors.text.tokenizer import has_tokenizer

TARGETS = ("paddlemix", "llava", "hf", "xtuner")
_TOWER, _PROJECTOR = "vision_tower.", "projector."


def convert_checkpoint(source: str | Path, target: str | Path, conversion: Conversion) -> Report:
    """Converts a model directory.

    Args:
        source: of any layout that is read.
        target: must not exist, or be empty; appears when everything is written and verified.

    Raises:
        MissingFileError, UserError: the source cannot be used, the target's layout cannot represent it, or the target
            cannot be written.
    """
    target = Path(target)
    if conversion.to not in TARGETS:
        raise UserError(f"--to '{conversion.to}' is not one of {', '.join(TARGETS)}")
    check_target(target, source)
    checkpoint = read_checkpoint(Path(source), conversion.dtype)
    if conversion.to in ("llava", "xtuner") and checkpoint.facts.config.vision is None:
        raise UserError(
            f"{source} is just a language model; --to {conversion.to} needs a vision tower: use --to paddlemix, or "
            "--to hf for the form of its own family"
        )
    # nothing is at `target` until every weight was read back and compared
    with atomic_directory(target) as temporary:
        report = _WRITERS[conversion.to](checkpoint, temporary, conversion)
        # what is rounded here, or was rounded earlier, records what it was made from
        if conversion.dtype is not None or (checkpoint.directory / ORIGIN_FILE).is_file():
            write_origin(temporary, source_digests(open_source(source)))
        return report


def check_target(target: Path, source: str | Path) -> None:
    """Checks that a directory may be created.

    Args:
        source: the model or adapter that it is made from.

    Raises:
        UserError: it exists and is not empty, or holds something that the source needs.
    """
    check_output(Output("output", target), needed_by_model(source, "the input"))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"output '{target}' exists and is not empty; choose a new folder or remove it first")


def _write_ours(checkpoint: Checkpoint, directory: Path, conversion: Conversion) -> Report:
    facts = checkpoint.facts
    write_json(directory / CONFIG_FILE, {**config_values(facts.config), **facts.special_ids})
    write_json(directory / PROCESSOR_FILE, facts.processor)
    _write_common(checkpoint, directory)
    return write_verified({directory: to_layout(checkpoint.tensors, OURS)}, "paddlemix", conversion)


def _write_original(checkpoint: Checkpoint, directory: Path, conversion: Conversion) -> Report:
    facts = checkpoint.facts
    assert facts.config.vision is not None
    # The tower is written twice: inside, where it may have been trained, and as the folder that config.json names.
    tower = directory / declared_files.TOWER_DIRECTORY
    tower.mkdir()
    write_json(directory / CONFIG_FILE, declared_files.original_config(facts))
    form = tower_form(facts.config.vision)
    write_json(tower / CONFIG_FILE, declared_files.tower_config(facts.config.vision, facts.dtype))
    write_json(tower / PREPROCESSOR_FILE, declared_files.tower_preprocessor(facts.processor))
    if form.smallest_input:  # inside a checkpoint such a tower reads another size than on its own
        write_json(directory / PREPROCESSOR_FILE, declared_files.tower_preprocessor(facts.processor))
    _write_common(checkpoint, directory)
    tensors = join_tower(checkpoint.tensors, facts.config.vision)
    inside = {name: entry for name, entry in tensors.items() if name.startswith(_TOWER)}
    parts = {directory: to_layout(tensors, form.original), tower: to_layout(inside, form.keymaps[0])}
    return write_verified(parts, "pt", conversion)


def _write_hf(checkpoint: Checkpoint, directory: Path, conversion: Conversion) -> Report:
    facts, tensors = checkpoint.facts, checkpoint.tensors
    if facts.config.vision is None:
        return _write_language(checkpoint, directory, conversion)
    declared_files.check_hf(facts)
    vocabulary = checkpoint.added or choose_vocabulary(checkpoint.directory, tensors, facts.config.text.vocab_size)
    write_json(directory / CONFIG_FILE, declared_files.hf_config(facts, vocabulary))
    for name, values in declared_files.hf_processor_files(facts).items():
        write_json(directory / name, values)
    pad = declared_files.hf_pad_token(facts, vocabulary)
    # settings of generation that the source declares are kept; only the ids are ours to say
    kept = checkpoint.directory / GENERATION_FILE
    settings = read_json(kept) if kept.is_file() else {"_from_model_config": True}
    write_json(directory / GENERATION_FILE, {**settings, **facts.special_ids, "pad_token_id": pad})
    copy_tokenizer(checkpoint.directory, directory)
    # rows without tokens in the tokenizer would never be used: `<image>` is what a prompt contains
    if vocabulary.rows and has_tokenizer(directory):
        declare_added_tokens(directory, vocabulary.image_token)
    if "image_newline" in tensors and not facts.anyres:
        logger.warning("image_newline is left out: without tiles no image uses it, and llava-hf has no place for it")
        tensors = {name: entry for name, entry in tensors.items() if name != "image_newline"}
    return write_verified({directory: to_layout(append_added_rows(tensors, vocabulary), HF_OLD)}, "pt", conversion)


def _write_language(checkpoint: Checkpoint, directory: Path, conversion: Conversion) -> Report:
    """Just a language model, in the form of its family."""
    text, tensors = checkpoint.facts.config.text, checkpoint.tensors
    family = FAMILIES[text.model_type]
    write_json(directory / CONFIG_FILE, declared_files.language_config(checkpoint.facts))
    _write_common(checkpoint, directory)
    # InternLM2 alone stores query, key and value as one matrix
    tensors = join_attention(tensors, text) if family.fused else tensors
    return write_verified({directory: to_layout(tensors, family.keymap)}, "pt", conversion)


def _write_xtuner(checkpoint: Checkpoint, directory: Path, conversion: Conversion) -> Report:
    """The language model in the directory itself, the tower and the projector in folders of their own."""
    facts, tensors = checkpoint.facts, checkpoint.tensors
    declared_files.check_xtuner(facts)
    log_template(facts.processor["chat_template"])
    assert facts.config.vision is not None
    form, family = tower_form(facts.config.vision), FAMILIES[facts.config.text.model_type]
    tower, projector = directory / TOWER, directory / PROJECTOR
    tower.mkdir()
    projector.mkdir()
    write_json(directory / CONFIG_FILE, declared_files.language_config(facts))
    write_json(tower / CONFIG_FILE, declared_files.tower_config(facts.config.vision, facts.dtype))
    write_json(tower / PREPROCESSOR_FILE, declared_files.tower_preprocessor(facts.processor))
    write_json(projector / CONFIG_FILE, declared_files.xtuner_projector_config(facts))
    _write_common(checkpoint, directory)
    tensors = join_attention(tensors, facts.config.text) if family.fused else dict(tensors)
    tensors = join_tower(tensors, facts.config.vision)
    of_tower = {name: entry for name, entry in tensors.items() if name.startswith(_TOWER)}
    of_projector = {name: entry for name, entry in tensors.items() if name.startswith(_PROJECTOR)}
    language = {name: entry for name, entry in tensors.items() if name not in of_tower and name not in of_projector}
    parts = {
        directory: to_layout(language, family.keymap),
        tower: to_layout(of_tower, form.keymaps[0]),
        projector: to_layout(of_projector, XTUNER_PROJECTOR),
    }
    return write_verified(parts, "pt", conversion)


# --to -> who writes it
_WRITERS = {"paddlemix": _write_ours, "llava": _write_original, "hf": _write_hf, "xtuner": _write_xtuner}


def _write_common(checkpoint: Checkpoint, directory: Path) -> None:
    """Tokenizer, generation settings and the rows that llava-hf added, for every layout but llava-hf."""
    copy_tokenizer(checkpoint.directory, directory)
    generation = checkpoint.directory / GENERATION_FILE
    added, ids = checkpoint.added, checkpoint.facts.special_ids
    if generation.is_file():
        write_json(directory / GENERATION_FILE, {**read_json(generation), **ids})
    if added is not None:
        # the rows are not in these weights, so their tokens must not be in the tokenizer; a file keeps them for later
        if added.rows:
            remove_added_tokens(directory, added.base)
        write_safetensors(directory / HF_VOCABULARY_FILE, added.rows, added.metadata())


def to_layout(tensors: Tensors, keymap: KeyMap) -> dict[str, TensorEntry]:
    """Weights under another layout's names and in its orientation, unread.

    Raises:
        UserError: the layout has no place for a weight.
    """
    renamed = {}
    for name, entry in tensors.items():
        try:
            theirs = keymap.to_theirs(name)
        except KeyError as error:
            raise UserError(f"a {keymap.name} checkpoint has no place for the weight '{name}'") from error
        turn = keymap.transposed and is_linear_weight(name, entry.shape)
        renamed[theirs] = transposed(entry) if turn else entry
    return renamed
