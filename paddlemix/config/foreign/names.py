"""Other programs' names, and what to write here instead: keys, values of our keys, templates, recipes.

A name that is in no table gets no answer; nothing is guessed from its spelling.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePath

from paddlemix.config.foreign import script_keys
from paddlemix.config.foreign import toolchain_keys as toolchains
from paddlemix.config.foreign.answers import Answer, choose, explain, keys_written, knows_value, of_programs
from paddlemix.config.foreign.templates import FOREIGN_RECIPES, FOREIGN_TEMPLATES, Named

# Program -> name -> answer; if several programs have a name, they are listed in this order.
FOREIGN_KEYS: Mapping[str, Mapping[str, Answer]] = {
    "LLaVA": script_keys.LLAVA,
    "LLaVA-NeXT": script_keys.LLAVA_NEXT,
    "transformers": script_keys.TRANSFORMERS,
    "ms-swift": toolchains.SWIFT,
    "LLaMA-Factory": toolchains.LLAMA_FACTORY,
    "XTuner": toolchains.XTUNER,
    "InternVL": script_keys.INTERNVL,
    "PEFT": toolchains.PEFT,
}
_SCRIPTS = {".py": "XTuner's configurations are Python", ".sh": "LLaVA's and InternVL's recipes are shell scripts"}
_YAML = "YAML, which LLaMA-Factory and ms-swift use, is not read"


def foreign_key(name: str, value: object, on_command_line: bool = False) -> str:
    """What to write for a key that is not ours.

    Args:
        name: as given.
        value: given for it.
        on_command_line: see `explain`.

    Returns:
        'lora_enable is LLaVA's; write "lora": true'; "" for a name that no program of the tables has.
    """
    # programs that have the name           answer
    #   none                                  "", and the caller looks for a similar key of ours
    #   some of which know the value          theirs alone
    #   several, all with the same answer     one sentence with all owners
    #   several, with different answers       a sentence each: LLaVA's freeze_backbone is the language model,
    #                                         InternVL's the tower
    found = _programs_of(name)
    if not found:
        return ""
    # Where two programs share a name, a value that only one of them knows decides.
    sure = {program: answer for program, answer in found.items() if knows_value(answer, value)}
    found = sure or found
    by_answer: dict[str, list[str]] = {}
    for program, answer in found.items():
        by_answer.setdefault(explain(answer, value, on_command_line), []).append(program)
    # Programs that agree are named together, otherwise each case is listed.
    if len(by_answer) == 1:
        ((words, programs),) = by_answer.items()
        return f"{name} is {of_programs(programs)}; {words}"
    cases = [f"as {of_programs(programs)} {words}" for words, programs in by_answer.items()]
    return f"{name} is not a key here: {'; '.join(cases)}"


def keys_meant(name: str) -> set[str]:
    """Our keys that the answer to a foreign one names."""
    return {key for answer in _programs_of(name).values() for key in keys_written(answer)}


def foreign_value(key: str, value: object, on_command_line: bool = False) -> str:
    """What to write for a value of one of our keys that is another program's.

    Returns:
        'transformers\': write "optim": "adamw"'; "" for a value that the table does not know.
    """
    program, answer = script_keys.VALUES.get(key, ("", None))
    # nothing to say of an unset value, nor of one that the table's patterns do not match: it may be ours.
    # An answer without patterns holds for every value.
    if answer is None or value in ([], "", None) or (answer.values and choose(answer, value) is None):
        return ""
    return f"{of_programs([program])}: {explain(answer, value, on_command_line)}"


def foreign_entry_key(name: str, value: object) -> str:
    """As `foreign_key`, of an entry of `dataset`."""
    if name not in script_keys.ENTRY_KEYS:
        return ""
    program, answer = script_keys.ENTRY_KEYS[name]
    return f"{name} is {of_programs([program])}; {explain(answer, value)}"


def foreign_template(name: str) -> str:
    """Which template of ours corresponds to a name of other programs.

    Returns:
        "XTuner's is xtuner_vicuna; LLaMA-Factory's is vicuna_v1"; "" for a name that no program of the tables has.
    """
    # an entry       what the message says
    #   ours is None   the text is not among ours
    #   exact          the same text, by our name
    #   otherwise      that it differs, and the nearest: a silent replacement would train on another text
    said = []
    for program, named in _templates_called(name).items():
        owner = of_programs([program])
        if named.ours is None:
            said.append(f"{owner} is not among them; write a chat_template.json of that text")
        elif named.exact:
            said.append(f"{owner} is {named.ours}")
        else:
            said.append(f"{owner} differs from all of them; the nearest is {named.ours}")
    return "; ".join(said)


def other_templates(name: str, ours: str) -> str:
    """The other programs' templates of a name that is one of ours too, where their text differs.

    Args:
        name: as given.
        ours: the canonical name of our template.

    Returns:
        "InternVL's here; XTuner's is xtuner_internlm2_chat"; "" if no other program has a different one of this name.
    """
    others = [
        f"{of_programs([program])} is {named.ours or 'not known here'}"
        for program, named in _templates_called(name).items()
        if named.ours != ours
    ]
    # whose template ours is: the program with an exact entry for it, LLaVA where none has one
    owners = (program for program, names in FOREIGN_TEMPLATES.items() if Named(ours) in names.values())
    return "; ".join([f"{of_programs([next(owners, 'LLaVA')])} here", *others]) if others else ""


def foreign_file(path: str | os.PathLike[str], before: str = "") -> str:
    """What to use instead of another program's recipe or configuration file, after `before`; "" if it is none."""
    file = PurePath(path)
    # By name, not by content: the file may not exist here.
    for program, recipes in FOREIGN_RECIPES.items():
        # by the name without its ending (finetune_lora.sh), or by all of it
        if file.stem in recipes or file.name in recipes:
            ours, beside = recipes.get(file.stem) or recipes[file.name]
            return f"{before}{of_programs([program])} {file.stem} is paddlemix/config/llava/{ours} {beside}".rstrip()
    kind = _SCRIPTS.get(file.suffix) or (_YAML if file.suffix in (".yaml", ".yml") else "")
    return f"{before}{kind}; write a JSON file of the keys, docs/coming_from.md has the names" if kind else ""


def _templates_called(name: str) -> dict[str, Named]:
    return {program: names[name] for program, names in FOREIGN_TEMPLATES.items() if name in names}


def _programs_of(name: str) -> dict[str, Answer]:
    return {program: answers[name] for program, answers in FOREIGN_KEYS.items() if name in answers}
