"""Answers while a model trains: what is asked, where they go, metrics of evaluations - and not a bit of training."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.datasets.images.decode import ImageSettings
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.errors import MissingFileError, UserError
from paddlemix.evaluation.metrics import exact_match, rouge_l
from paddlemix.generation.chat import ChatSession
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.trainer.answers.answering import Answerer, AnswerScores
from paddlemix.trainer.answers.prompts import Prompt, first_prompts, own_prompts, prompt_of_record
from paddlemix.trainer.evaluator import EvaluationShare
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.resuming.checkpoint_folders import list_checkpoints
from paddlemix.trainer.run_data import read_samples
from tests.tiny_world import LORA, World, changed, reports, weights

WITH_ANSWERS = {
    "evaluation_strategy": "steps",
    "eval_steps": 2,
    "eval_with_do_generation": True,
    "sample_steps": 2,
    "max_new_tokens": 6,
}


def samples_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def answerer(loaded: Any, max_new_tokens: int = 6) -> Answerer:
    import contextlib

    return Answerer(loaded.model, max_new_tokens, contextlib.nullcontext)


def share(**values: int) -> EvaluationShare:
    return EvaluationShare(**{"rank": 0, "world_size": 1, "batch_size": 2, "max_batches": -1, **values})


@pytest.fixture(scope="module")
def loaded(world: World) -> Any:
    return load_pretrained(world.model)


@pytest.fixture
def evaluation(world: World, loaded: Any, tmp_path: Path) -> SampleDataset:
    return read_samples(world.config(tmp_path), "eval", loaded.processor, True)


# ---- what is asked ----


def test_the_first_records_of_the_evaluation_set_are_asked(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **WITH_ANSWERS))
    found = samples_of(tmp_path)
    assert [item["step"] for item in found] == [2, 2, 4, 4]
    assert [item["question"] for item in found[:2]] == ["Where is the small cat?", "How many?"]
    assert found[0]["expected"] == "On the mat, 0.25, 0.33."
    assert found[0]["image"] == str(world.data / "images" / "0.png")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    in_metrics = [{"step": line["step"], **item} for line in lines for item in line.get("samples", [])]
    assert in_metrics == found


def test_own_questions_are_asked_and_the_last_step_too(world: World, tmp_path: Path) -> None:
    prompts = [{"image": "images/1.png", "question": "What?"}, {"question": "Hello?"}]
    run_recipe(world.config(tmp_path, sample_steps=3, sample_prompts=prompts, max_new_tokens=4))
    found = samples_of(tmp_path)
    assert [(item["step"], item["question"]) for item in found] == [
        (step, question) for step in (3, 4) for question in ("What?", "Hello?")
    ]
    assert found[1]["image"] is None and found[1]["expected"] is None
    after = load_pretrained(tmp_path)
    session = ChatSession(after, settings=GenerationSettings(max_new_tokens=4))
    assert found[-1]["answer"] == "".join(session.ask("Hello?")).strip()


def test_only_a_path_is_looked_for_below_the_image_root(world: World, loaded: Any) -> None:
    picture = base64.b64encode((world.data / "images" / "1.png").read_bytes()).decode()
    prompts = [{"image": image, "question": "What?"} for image in ("1.png", f"data:image/png;base64,{picture}")]
    below, inside = own_prompts(prompts, loaded.processor, str(world.data / "images"), ImageSettings())
    assert below.image == str(world.data / "images" / "1.png")
    assert inside.image is not None and inside.image.startswith("data:image/png;base64,")
    np.testing.assert_array_equal(below.encoded.pixel_values, inside.encoded.pixel_values)


def test_without_an_evaluation_set_the_training_set_is_asked(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, sample_steps=4, max_new_tokens=2))
    assert [item["question"] for item in samples_of(tmp_path)] == [
        "What is the colour of the big bus?",
        "Where is the small cat?",
    ]


def test_captions_are_asked_for_by_the_picture_alone(world: World, tmp_path: Path) -> None:
    values = {"dataset": {"train": [{"data_files": str(world.data / "captions.json")}]}, "chat_template": "plain"}
    run_recipe(world.config(tmp_path, sample_steps=4, max_new_tokens=2, **values))
    assert [item["question"] for item in samples_of(tmp_path)] == ["", ""]


def test_a_wrong_question_stops_before_anything_is_written(world: World, tmp_path: Path) -> None:
    prompts = [{"question": "a"}, {"image": "none.png", "question": "b"}]
    with pytest.raises(MissingFileError, match=r"sample_prompts\[1\]: .*none.png"):
        run_recipe(world.config(tmp_path / "out", sample_steps=1, sample_prompts=prompts))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_prompts": [], "sample_steps": 1}, "empty list"),
        ({"sample_prompts": ["What?"], "sample_steps": 1}, "item 0 is .What.*; expected an object"),
        ({"sample_prompts": [{"question": " "}], "sample_steps": 1}, "expected an object"),
        ({"sample_prompts": [{"question": "a", "images": "b"}], "sample_steps": 1}, "expected an object"),
        ({"sample_prompts": [{"question": "a"}]}, "sample_prompts needs sample_steps"),
        ({"eval_with_do_generation": True}, "eval_with_do_generation needs evaluations"),
        ({"sample_steps": 1, "sharding": "stage3"}, "no process has the whole model"),
        ({"cache_vision_features": True, "sharding": "stage3"}, 'with sharding "stage3"; set sharding to stage2'),
    ],
)
def test_keys_that_do_not_fit(world: World, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        world.config(tmp_path, **values)


def test_a_record_that_is_left_out_is_not_asked(world: World, loaded: Any, tmp_path: Path) -> None:
    records = json.loads((world.data / "eval.json").read_text(encoding="utf-8"))
    records[0]["image"] = "none.png"
    cut = tmp_path / "cut.png"
    cut.write_bytes(world.picture.read_bytes()[:200])  # its header is whole
    records[1]["image"] = str(cut)
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    values = {"on_bad_sample": "skip", "max_bad_fraction": 1.0}
    config = world.config(tmp_path / "out", dataset={"eval": [{"data_files": str(path)}]}, do_train=False, **values)
    data = read_samples(config, "eval", loaded.processor, True)
    assert prompt_of_record(data, 0) is None and prompt_of_record(data, 1) is None
    assert len(first_prompts(data, 9)) == 3
    exact, overlap, count = AnswerScores(answerer(loaded), data).sums(share())
    assert count == 3 and 0 <= exact <= overlap + 3


# ---- answers ----


def test_an_answer_is_that_of_a_chat_alone_or_in_a_batch(loaded: Any, evaluation: SampleDataset) -> None:
    from paddlemix.datasets.images.decode import load_image

    questions = first_prompts(evaluation, 4)
    together = answerer(loaded).answer(questions)
    for question, answer in zip(questions, together, strict=True):
        assert answerer(loaded).answer([question]) == [answer]
        session = ChatSession(loaded, settings=GenerationSettings(max_new_tokens=6))
        pictures = [] if question.image is None else [load_image(question.image)]
        assert "".join(session.ask(question.text, pictures)).strip() == answer


def random_state() -> tuple[Any, ...]:
    device = [state.current_seed() for state in paddle.get_rng_state()]
    return random.getstate(), np.random.random(3).tolist(), device, paddle.randn([3]).tolist()


def test_answering_draws_no_number_and_leaves_the_mode(loaded: Any, evaluation: SampleDataset) -> None:
    questions, found = first_prompts(evaluation, 2), []
    for ask in (False, True):
        random.seed(1), np.random.seed(1), paddle.seed(1)
        loaded.model.train()
        if ask:
            answerer(loaded).answer(questions)
            assert all(layer.training for layer in loaded.model.sublayers(include_self=True))
        found.append(random_state())
    loaded.model.eval()
    assert found[0] == found[1]
    answerer(loaded).answer(questions)
    assert not loaded.model.training


def test_a_failure_leaves_training_mode(loaded: Any, evaluation: SampleDataset) -> None:
    loaded.model.train()
    [question] = first_prompts(evaluation, 1)
    long = np.zeros(600, dtype=np.int64)
    from dataclasses import replace

    broken: Prompt = replace(question, encoded=replace(question.encoded, input_ids=long, labels=long))
    with pytest.raises(UserError, match="the conversation has 600 tokens"):
        answerer(loaded).answer([broken])
    assert loaded.model.training
    loaded.model.eval()


# ---- training goes on as if nothing had been asked ----


@pytest.mark.parametrize("values", [{}, LORA], ids=["full", "lora"])
def test_questions_change_no_bit_of_training(world: World, tmp_path: Path, values: dict[str, Any]) -> None:
    run_recipe(world.config(tmp_path / "silent", gradient_accumulation_steps=2, **values))
    run_recipe(world.config(tmp_path / "asked", gradient_accumulation_steps=2, **values, **WITH_ANSWERS))
    assert not changed(weights(tmp_path / "silent"), weights(tmp_path / "asked"))
    for key in ("loss", "grad_norm", "image_token_share", "padding_share"):
        assert reports(tmp_path / "silent", key) == reports(tmp_path / "asked", key)


def test_a_resumed_run_asks_and_answers_the_same(world: World, tmp_path: Path) -> None:
    values = {**WITH_ANSWERS, **LORA, "sample_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    run_recipe(world.config(tmp_path / "whole", **values))
    run_recipe(world.config(tmp_path / "parts", **{**values, "save_steps": 2, "max_steps": 3}))
    run_recipe(world.config(tmp_path / "parts", **values, resume_from_checkpoint=str(tmp_path / "parts/checkpoint-2")))
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert samples_of(tmp_path / "whole") == samples_of(tmp_path / "parts")
    for key in ("loss", "grad_norm", "eval_loss", "eval_exact_match", "eval_rouge_l"):
        assert reports(tmp_path / "whole", key) == reports(tmp_path / "parts", key)


# ---- metrics ----


def test_metrics_are_means_over_the_evaluation_set(world: World, tmp_path: Path) -> None:
    values = {**WITH_ANSWERS, "max_new_tokens": 12, "learning_rate": 0.01, "max_steps": 12, "eval_steps": 12}
    run_recipe(world.config(tmp_path, **{**values, "sample_steps": None}))
    loaded = load_pretrained(tmp_path)
    data = read_samples(world.config(tmp_path / "none"), "eval", loaded.processor, True)  # type: ignore[arg-type]
    questions = first_prompts(data, 5)
    answers = [answerer(loaded, 12).answer([question])[0] for question in questions]
    pairs = [(answer, question.reference or "") for answer, question in zip(answers, questions, strict=True)]
    assert reports(tmp_path, "eval_rouge_l")[12] == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    assert reports(tmp_path, "eval_exact_match")[12] == pytest.approx(np.mean([exact_match(*pair) for pair in pairs]))
    assert any(rouge_l(*pair) > 0 for pair in pairs)


def test_shares_of_processes_add_up_and_batches_are_limited(loaded: Any, evaluation: SampleDataset) -> None:
    scores = AnswerScores(answerer(loaded), evaluation)
    whole = scores.sums(share())
    parts = [scores.sums(share(rank=rank, world_size=2)) for rank in range(2)]
    assert whole == pytest.approx([sum(values) for values in zip(*parts, strict=True)])
    assert whole[2] == 5
    assert scores.sums(share(max_batches=1))[2] == 2
    assert scores.sums(share(max_batches=1, rank=1, world_size=2)) == (0, 0, 0)


def test_an_evaluation_alone_reports_them(world: World, tmp_path: Path) -> None:
    values = {"do_train": False, "do_eval": True, "eval_with_do_generation": True, "max_new_tokens": 3}
    results = run_recipe(world.config(tmp_path, **values))
    assert {"eval_loss", "eval_exact_match", "eval_rouge_l"} <= results.keys()


@pytest.mark.parametrize("name", ["exact_match", "eval_rouge_l"])
def test_the_best_by_answers(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Both grow with quality; the last and the best checkpoint stay."""
    scores = [1.0, 4.0, 2.0]
    monkeypatch.setattr(AnswerScores, "sums", lambda self, share, between: (scores[0], scores.pop(0), 5))
    values = {"load_best_model_at_end": True, "save_total_limit": 1, "max_steps": 6, "save_steps": 2}
    config = world.config(tmp_path, metric_for_best_model=name, save_strategy="steps", **values, **WITH_ANSWERS)
    run_recipe(config)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert not changed(weights(tmp_path / "checkpoint-4"), weights(tmp_path))


def test_the_best_by_answers_needs_answers(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only measured with eval_with_do_generation true"):
        run_recipe(world.config(tmp_path / "out", metric_for_best_model="rouge_l", do_eval=True))
    assert not (tmp_path / "out").exists()
