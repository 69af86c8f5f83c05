"""The questions of benchmarks against those of LLaVA's scripts and of lmms-eval, live.

Run by `make reference`; see `real_scorers.py`.
"""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from paddlemix.evaluation.benchmarks.benchmark import Question, Request
from paddlemix.evaluation.benchmarks.known_benchmarks import BENCHMARKS
from tests.evaluation.benchmarks import tiny_benchmarks as tiny
from tests.reference.llava_package import LLAVA, LMMS, real_file
from tests.reference.real_scorers import lmms_task

pytestmark = pytest.mark.reference


class _Kwargs:
    """The settings of a task's YAML file, its functions left out."""

    def __init__(self) -> None:
        import yaml

        class Loader(yaml.SafeLoader):
            """Reads `!function` as its name."""

        Loader.add_constructor("!function", lambda loader, node: node.value)
        self._load: Callable[[str], Any] = lambda text: yaml.load(text, Loader)

    def __call__(self, file: str) -> dict[str, Any]:
        path = LMMS / "lmms_eval" / "tasks" / file
        found: dict[str, Any] = self._load(path.read_text(encoding="utf-8"))["lmms_eval_specific_kwargs"]["default"]
        return found


@pytest.fixture(scope="module")
def kwargs() -> _Kwargs:
    pytest.importorskip("yaml")
    real_file(LMMS / "lmms_eval" / "__init__.py")
    return _Kwargs()


def questions(root: Path, name: str, protocol: str = "lmms-eval") -> list[Question]:
    benchmark = BENCHMARKS[name]
    tiny.BUILDERS[name](root)
    return list(benchmark.read(Request(folder=root / benchmark.folders[0], protocol=protocol)).questions)


def asked_by(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """What one of LLaVA's scripts asks, without a model: the turns of its user."""
    path = real_file(LLAVA / "llava" / "eval" / f"{script}.py")
    tokenizer, model, templates = MagicMock(), MagicMock(), MagicMock()
    tokenizer.batch_decode.return_value = ["A"]
    model.config.mm_use_im_start_end = False
    templates.__getitem__.return_value.copy.return_value.roles = ("USER", "ASSISTANT")
    stubs: dict[str, dict[str, Any]] = {
        "llava": {},
        "llava.constants": dict.fromkeys(("IMAGE_TOKEN_INDEX", "DEFAULT_IM_START_TOKEN", "DEFAULT_IM_END_TOKEN"))
        | {"DEFAULT_IMAGE_TOKEN": "<image>"},
        "llava.conversation": {"conv_templates": templates, "SeparatorStyle": None},
        "llava.model": {},
        "llava.model.builder": {"load_pretrained_model": lambda *_: (tokenizer, model, None, 0)},
        "llava.utils": {"disable_torch_init": lambda: None},
        "llava.mm_utils": {
            name: MagicMock(return_value="name" if "name" in name else MagicMock())
            for name in (
                "tokenizer_image_token",
                "process_images",
                "load_image_from_base64",
                "get_model_name_from_path",
            )
        },
        "shortuuid": {"uuid": lambda: "x"},
    }
    for name, attributes in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    words = [str(path), *arguments, "--answers-file", str(folder / "a" / "answers.jsonl"), "--single-pred-prompt"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(path), run_name="__main__")
    calls = templates.__getitem__.return_value.copy.return_value.append_message.call_args_list
    return [str(call.args[1]) for call in calls if call.args[0] == "USER"]


@pytest.mark.parametrize("name", ["mmbench_dev_en", "mmbench_dev_cn", "ccbench"])
def test_llava_asks_mmbench(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language = "en" if name.endswith("en") else "cn"
    ours = [f"<image>\n{one.text}" for one in questions(tmp_path, name, "llava")]
    (table,) = tmp_path.rglob("*.tsv")
    arguments = ("--question-file", str(table), "--lang", language)
    assert asked_by("model_vqa_mmbench", tmp_path, monkeypatch, *arguments) == ours


def test_llava_asks_science_qa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [one.text for one in questions(tmp_path, "scienceqa", "llava")]
    folder = tmp_path / "scienceqa"
    images = ("--image-folder", str(folder / "images" / "test"))
    found = asked_by(
        "model_vqa_science", tmp_path, monkeypatch, "--question-file", str(folder / "llava_test_CQM-A.json"), *images
    )
    assert found == ours


def test_short_answers(kwargs: _Kwargs, tmp_path: Path) -> None:
    textvqa, vizwiz, pope = (lmms_task(f"{name}.utils") for name in ("textvqa", "vizwiz_vqa", "pope"))
    settings = kwargs("textvqa/_default_template_textvqa_yaml")
    for one in questions(tmp_path, "textvqa"):
        document = {"question": one.record["question"], "ocr_tokens": ["x"]}
        assert one.text == textvqa.textvqa_doc_to_text(document, settings)
    settings = kwargs("vizwiz_vqa/_default_template_vqa_yaml")
    for one in questions(tmp_path, "vizwiz"):
        document = {"question": one.record["text"].split("\n")[0]}
        assert one.text == vizwiz.vizwiz_vqa_doc_to_text(document, settings)
    settings = kwargs("pope/pope.yaml")
    for one in questions(tmp_path, "pope"):
        assert one.text == pope.pope_doc_to_text({"question": one.record["text"].split("\n")[0]}, settings)


def test_mme(kwargs: _Kwargs, tmp_path: Path) -> None:
    utils, settings = lmms_task("mme.utils"), kwargs("mme/mme.yaml")
    for place, one in enumerate(questions(tmp_path, "mme")):
        # in the release some questions have two spaces there
        space = "  " if "0001" in str(one.question_id) else " "
        words = one.record["text"].split("\n")[0]
        document = {"question": f"{words}{space}Please answer yes or no."}
        assert one.text == utils.mme_doc_to_text(document, settings), place


def test_science_qa_and_seed(kwargs: _Kwargs, tmp_path: Path) -> None:
    science, seed = lmms_task("scienceqa.utils"), lmms_task("seedbench.utils")
    settings = kwargs("scienceqa/scienceqa_img.yaml")
    for number, one in enumerate(questions(tmp_path, "scienceqa")):
        document = {"hint": f"N{number}.", "question": "Which is it?", "choices": one.record["choices"]}
        assert one.text.removeprefix("<image>\n") == science.sqa_doc_to_text(document, settings)
    for number, one in enumerate(questions(tmp_path, "seed")):
        assert one.text == seed.seed_doc_to_text({"question": f"What {number}?", **one.record})


@pytest.mark.parametrize(
    ("name", "module", "function", "file"),
    [
        ("mmbench_dev_en", "en_utils", "mmbench_doc_to_text", "_default_template_mmbench_en_yaml"),
        ("mmbench_dev_cn", "cn_utils", "mmbench_doc_to_text", "_default_template_mmbench_cn_yaml"),
        ("ccbench", "cc_utils", "mmbench_cn_cc_doc_to_text", "mmbench_cc.yaml"),
    ],
)
def test_mmbench(name: str, module: str, function: str, file: str, kwargs: _Kwargs, tmp_path: Path) -> None:
    render, settings = getattr(lmms_task(f"mmbench.{module}"), function), kwargs(f"mmbench/{file}")
    for one in questions(tmp_path, name):
        empty = dict.fromkeys(("hint", "C", "D", "category", "split", "source"), float("nan"))
        document = {**empty, **one.record, "L2-category": "x"}
        assert one.text == render(document, settings)


def test_exams(kwargs: _Kwargs, tmp_path: Path) -> None:
    mmmu, mathvista = lmms_task("mmmu.utils"), lmms_task("mathvista.utils")
    settings = kwargs("mmmu/mmmu_val.yaml")
    for number, one in enumerate(questions(tmp_path, "mmmu")):
        document = {
            "question": f"<image 1> Which {number}?",
            "question_type": one.record["question_type"],
            "options": str(one.record["options"]),
        }
        assert one.text == mmmu.mmmu_doc_to_text(document, settings)
    settings = kwargs("mathvista/mathvista_testmini_format.yaml")
    for one in questions(tmp_path, "mathvista"):
        assert one.text == mathvista.mathvista_doc_to_text(dict(one.record), settings)
    # LLaVA's protocol asks with MathVista's own words, which the file of the benchmark holds
    step = kwargs("mathvista/mathvista_testmini_cot.yaml")
    data = BENCHMARKS["mathvista"].read(Request(folder=tmp_path / "mathvista"))
    for one in data.questions:
        lines = mathvista.mathvista_doc_to_text(dict(one.record), step).split("\n")
        assert one.text.split("\n") == [lines[-1], *lines[:-1]]


def test_open_answers_and_boxes(kwargs: _Kwargs, tmp_path: Path) -> None:
    mm_vet, boxes = lmms_task("mmvet.utils"), lmms_task("refcoco.utils_rec")
    settings = kwargs("mmvet/mmvet.yaml")
    for one in questions(tmp_path, "mmvet"):
        assert one.text == mm_vet.doc_to_text({"question": one.record["question"]}, settings)
    for one in questions(tmp_path, "refcoco"):
        assert one.text == boxes.refcoco_bbox_rec_doc_to_text({"answer": one.record["sents"]})


def test_lengths_of_answers(kwargs: _Kwargs) -> None:
    """`max_new_tokens` of the tasks' files; lmms-eval's driver of LLaVA takes 1,024 where a file has none."""
    files = {
        "vqav2": "vqav2/_default_template_vqav2_yaml", "gqa": "gqa/gqa.yaml",
        "scienceqa": "scienceqa/scienceqa_img.yaml",
        "pope": "pope/pope.yaml", "mme": "mme/mme.yaml", "mmbench_dev_en": "mmbench/_default_template_mmbench_en_yaml",
        "mmbench_dev_cn": "mmbench/_default_template_mmbench_cn_yaml", "ccbench": "mmbench/mmbench_cc.yaml",
        "mmvet": "mmvet/mmvet.yaml", "mmmu": "mmmu/_default_template_yaml",
        "mathvista": "mathvista/mathvista_testmini_format.yaml", "textvqa": "textvqa/_default_template_textvqa_yaml",
        "llava_bench": "llava-in-the-wild/llava-in-the-wild.yaml", "seed": "seedbench/seedbench.yaml",
        "vizwiz": "vizwiz_vqa/_default_template_vqa_yaml",
    }  # fmt: skip
    for name, file in files.items():
        text = (LMMS / "lmms_eval" / "tasks" / file).read_text(encoding="utf-8")
        found = [int(line.split(":")[1]) for line in text.splitlines() if line.strip().startswith("max_new_tokens:")]
        assert BENCHMARKS[name].max_new_tokens["lmms-eval"] == (found[0] if found else 1024), name
