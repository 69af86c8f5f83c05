"""Every shipped family learns an answer through adapters and says it in a chat, on each device."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import paddlemix.config
from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.layouts import families as checkpoint_families
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.generation.ending import ending_of
from paddlemix.models.language_presets import LANGUAGE_MODELS
from tests.conftest import ROOT
from tests.families.families import ANSWER, FAMILIES, FamilyCase, FamilyFiles, build_family
from tests.npu.server import DeviceServer
from tests.npu_double import build as npu_double

RECIPES = Path(paddlemix.config.__file__).parent / "llava"
by_name = pytest.mark.parametrize("family", FAMILIES, ids=[case.name for case in FAMILIES], indirect=True)


@pytest.fixture(scope="module", params=["cpu", "npu"])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceServer]:
    plugin = npu_double.built_or_skipped() if device == "npu" else None
    server = DeviceServer(tmp_path_factory.mktemp("server"), plugin)
    yield server
    server.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FamilyFiles]:
    return {}


@pytest.fixture
def family(
    request: pytest.FixtureRequest, built: dict[str, FamilyFiles], tmp_path_factory: pytest.TempPathFactory
) -> FamilyFiles:
    case: FamilyCase = request.param
    if case.name not in built:
        built[case.name] = build_family(case, tmp_path_factory.mktemp(case.name))
    return built[case.name]


@by_name
def test_a_family_fine_tunes_and_chats(family: FamilyFiles, device: str, server: DeviceServer, tmp_path: Path) -> None:
    case = family.case
    declared = read_json(family.language_model / "config.json")
    assert declared["model_type"] == case.text.get("model_type", "llama") and "paddlemix_format" not in declared
    (tune, recipe, _), (chat, arguments, typed) = family.commands(tmp_path, device)
    tuned = server.run(tune, *recipe)
    assert tuned.status == 0, tuned.err
    adapter = tmp_path / "adapter"
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 1 and losses[-1] < 0.1, losses
    assert read_json(adapter / "processor_config.json")["chat_template"] == case.template
    told = server.run(chat, *arguments, stdin=typed)
    assert told.status == 0, told.err
    first = told.out.splitlines()[0].removeprefix("USER: ASSISTANT: ")
    assert first.rstrip() == ANSWER, told.out  # nothing behind it: the family's own token ended it
    assert told.out.count("ASSISTANT: ") == 2 and told.out.endswith("exit...\n"), told.out


@by_name
def test_what_ends_an_answer(family: FamilyFiles) -> None:
    processor = load_pretrained(family.root / "llava_ours").processor
    assert processor is not None
    ending = ending_of(processor)
    ids = {processor.tokenizer.special_id(token) for token in family.case.stops}
    assert None not in ids and ending.ids == ids


def test_no_family_is_without_a_row() -> None:
    """Whoever adds a family to the checkpoints or to the recipes adds it here too, and gives its sizes."""
    tested = {str(case.text.get("model_type", "llama")) for case in FAMILIES}
    assert tested == set(checkpoint_families.FAMILIES)
    assert tested == {text.model_type for text in LANGUAGE_MODELS.values()}
    folders = {path.name for path in RECIPES.iterdir() if path.is_dir()} - {"tiny", "v1_5", "v1_6"}
    assert folders == {case.name for case in FAMILIES} - {"vicuna", "internvit"} | {"internvl"}


def test_the_guide_names_what_there_is() -> None:
    """Every file and every name in its own quotes is where the guide says."""
    page = (ROOT / "docs" / "add_a_family.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:paddlemix|tests)/[\w/]+\.py)`", page):
        assert (ROOT / name).is_file(), name
    for name, place in re.findall(r"(?:entry|row) of `(\w+)` \| `([\w/]+\.py)`", page):
        assert re.search(rf"^{name}\b", (ROOT / place).read_text(encoding="utf-8"), re.MULTILINE), (name, place)
    written = page.split("```python\n")[1].split("```")[0].replace("   ", "").replace("\n", "")
    source = (ROOT / "paddlemix" / "checkpoints" / "layouts" / "families.py").read_text(encoding="utf-8")
    assert re.sub(r"\s", "", written) in re.sub(r"\s", "", source)
