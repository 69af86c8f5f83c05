"""The table of benchmarks: names as typed, folders and files, readers, scorers, lengths of answers, how many questions.

Lengths under "llava": 128 tokens where LLaVA's script runs model_vqa_loader, else 1,024; RefCOCO 100 as XTuner's.

Sources: scripts/v1_5/eval/*.sh and llava/eval/model_vqa*.py of haotian-liu/LLaVA (commit c121f04);
xtuner/tools/eval_refcoco.py of InternLM/xtuner; lmms_eval/tasks/*/*.yaml of lmms-eval 0.7.3.  Numbers of questions:
Evaluation pages of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from paddlemix.errors import UserError, did_you_mean
from paddlemix.evaluation.benchmarks import (
    box_files,
    choice_files,
    exam_files,
    open_answer_files,
    vqa_files,
    yes_no_files,
)
from paddlemix.evaluation.benchmarks.benchmark import Benchmark
from paddlemix.evaluation.benchmarks.mmbench_tables import CHINESE, CHINESE_CULTURE, ENGLISH, Wording, read_mmbench
from paddlemix.evaluation.benchmarks.own_data import CUSTOM
from paddlemix.evaluation.scoring.answered import LLAVA, LMMS_EVAL
from paddlemix.evaluation.scoring.gqa import score_gqa
from paddlemix.evaluation.scoring.hallusion_bench import score_hallusion_bench
from paddlemix.evaluation.scoring.mathvista import score_mathvista
from paddlemix.evaluation.scoring.mmbench import score_mmbench
from paddlemix.evaluation.scoring.mme import score_mme
from paddlemix.evaluation.scoring.mmmu import score_mmmu
from paddlemix.evaluation.scoring.pope import score_pope
from paddlemix.evaluation.scoring.refcoco import score_refcoco
from paddlemix.evaluation.scoring.science_qa import score_science_qa
from paddlemix.evaluation.scoring.seed import score_seed
from paddlemix.evaluation.scoring.vqa_answers import score_vqa


def _lengths(llava: int, lmms_eval: int) -> Mapping[str, int]:
    return {LLAVA: llava, LMMS_EVAL: lmms_eval}


def _mmbench(name: str, title: str, files: tuple[str, ...], wording: Wording, numbers: tuple[int, ...]) -> Benchmark:
    folders = {"cn": ("mmbench_cn", "mmbench"), "en": ("mmbench",), "ccbench": ("ccbench", "mmbench_cn", "mmbench")}
    return Benchmark(
        name=name,
        title=title,
        # LLaVA's folders, and one that is named as the benchmark is
        folders=tuple(dict.fromkeys((*folders[name.rpartition("_")[2]], name))),
        question_files=files,
        read=partial(read_mmbench, files=files, wording=wording),
        score=score_mmbench,
        published_questions=numbers,
        max_new_tokens=_lengths(1024, 1024 if wording is ENGLISH else 256),
    )


def _refcoco(name: str, title: str, folders: tuple[str, ...], files: tuple[str, ...], total: int) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        folders=folders,
        question_files=files,
        read=partial(box_files.read_refcoco, files=files),
        score=score_refcoco,
        published_questions=(total,),
        max_new_tokens=_lengths(100, 1024),
    )


_ALL = (
    Benchmark(
        name="vqav2",
        title="VQAv2 test-dev",
        folders=("vqav2",),
        question_files=vqa_files.VQAV2_QUESTIONS,
        read=vqa_files.read_vqav2,
        score=None,
        published_questions=(107_394,),
        max_new_tokens=_lengths(128, 16),
    ),
    Benchmark(
        name="gqa",
        title="GQA testdev_balanced",
        folders=("gqa",),
        question_files=vqa_files.GQA_QUESTIONS,
        read=vqa_files.read_gqa,
        score=score_gqa,
        published_questions=(12_578,),
        max_new_tokens=_lengths(128, 16),
    ),
    Benchmark(
        name="vizwiz",
        title="VizWiz test",
        folders=("vizwiz",),
        question_files=vqa_files.VIZWIZ_QUESTIONS,
        read=vqa_files.read_vizwiz,
        score=None,
        published_questions=(8_000,),
        max_new_tokens=_lengths(128, 1024),
    ),
    Benchmark(
        name="scienceqa",
        title="ScienceQA test",
        folders=("scienceqa",),
        question_files=choice_files.SCIENCE_QUESTIONS,
        read=choice_files.read_science_qa,
        score=score_science_qa,
        published_questions=(4_241,),
        max_new_tokens=_lengths(1024, 16),
        headline="img_accuracy",
    ),
    Benchmark(
        name="textvqa",
        title="TextVQA validation",
        folders=("textvqa",),
        question_files=vqa_files.TEXTVQA_QUESTIONS,
        read=vqa_files.read_textvqa,
        score=score_vqa,
        published_questions=(5_000,),
        max_new_tokens=_lengths(128, 1024),
    ),
    Benchmark(
        name="pope",
        title="POPE on COCO",
        folders=("pope",),
        question_files=yes_no_files.POPE_QUESTIONS,
        read=yes_no_files.read_pope,
        score=score_pope,
        published_questions=(8_910,),
        max_new_tokens=_lengths(128, 128),
        headline="f1",
    ),
    Benchmark(
        name="mme",
        title="MME",
        folders=("MME", "mme"),
        question_files=yes_no_files.MME_QUESTIONS,
        read=yes_no_files.read_mme,
        score=score_mme,
        published_questions=(2_374,),
        max_new_tokens=_lengths(128, 16),
        headline="perception",
    ),
    _mmbench(
        "mmbench_dev_en",
        "MMBench dev",
        ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv", "MMBench_DEV_EN_legacy.tsv"),
        ENGLISH,
        # rows of LLaVA's version, and of the later ones
        (4_377, 4_329),
    ),
    _mmbench(
        "mmbench_dev_cn",
        "MMBench-CN dev",
        ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "MMBench_DEV_CN_legacy.tsv"),
        CHINESE,
        (4_329,),
    ),
    _mmbench(
        "mmbench_test_en",
        "MMBench test",
        (
            "mmbench_test_20230712.tsv",
            "mmbench_test_en_20231003.tsv",
            "MMBench_TEST_EN.tsv",
            "MMBench_TEST_EN_legacy.tsv",
        ),
        ENGLISH,
        (),
    ),
    _mmbench(
        "mmbench_test_cn",
        "MMBench-CN test",
        ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv", "MMBench_TEST_CN_legacy.tsv"),
        CHINESE,
        (),
    ),
    _mmbench("ccbench", "CCBench", ("CCBench.tsv", "CCBench_legacy.tsv"), CHINESE_CULTURE, (2_040,)),
    Benchmark(
        name="seed",
        title="SEED-Bench",
        folders=("seed_bench", "seed"),
        question_files=choice_files.SEED_QUESTIONS,
        read=choice_files.read_seed,
        score=score_seed,
        published_questions=(19_242,),
        max_new_tokens=_lengths(128, 1024),
    ),
    Benchmark(
        name="llava_bench",
        title="LLaVA-Bench-in-the-Wild",
        folders=("llava-bench-in-the-wild", "llava_bench"),
        question_files=open_answer_files.BENCH_QUESTIONS,
        read=open_answer_files.read_llava_bench,
        score=None,
        judged="comparisons",
        published_questions=(60,),
        max_new_tokens=_lengths(1024, 4096),
        headline="relative_score",
    ),
    Benchmark(
        name="qa90",
        title="qa90 (LLaVA's questions about COCO)",
        folders=("coco2014_val_qa_eval", "qa90"),
        question_files=open_answer_files.QA90_QUESTIONS,
        read=open_answer_files.read_qa90,
        score=None,
        judged="comparisons",
        published_questions=(90,),
        headline="relative_score",
    ),
    Benchmark(
        name="mmvet",
        title="MM-Vet",
        folders=("mm-vet", "mmvet"),
        question_files=open_answer_files.MM_VET_QUESTIONS,
        read=open_answer_files.read_mm_vet,
        score=None,
        judged="grades",
        published_questions=(218,),
        headline="total",
    ),
    Benchmark(
        name="mmmu",
        title="MMMU validation",
        folders=("mmmu", "MMMU"),
        question_files=exam_files.MMMU_QUESTIONS,
        read=exam_files.read_mmmu,
        score=score_mmmu,
        published_questions=(900,),
        max_new_tokens=_lengths(1024, 128),
    ),
    Benchmark(
        name="mathvista",
        title="MathVista testmini",
        folders=("mathvista", "MathVista"),
        question_files=exam_files.MATHVISTA_QUESTIONS,
        read=exam_files.read_mathvista,
        score=score_mathvista,
        published_questions=(1_000,),
        max_new_tokens=_lengths(1024, 16_384),
    ),
    Benchmark(
        name="hallusionbench",
        title="HallusionBench image",
        folders=("hallusionbench", "HallusionBench"),
        question_files=yes_no_files.HALLUSION_QUESTIONS,
        read=yes_no_files.read_hallusion_bench,
        score=score_hallusion_bench,
        published_questions=(951,),
        max_new_tokens=_lengths(1024, 128),
        headline="a_acc",
    ),
    _refcoco("refcoco", "RefCOCO", ("refcoco",), box_files.refcoco_files("refcoco", "val", "testA", "testB"), 21_586),
    _refcoco(
        "refcoco_plus",
        "RefCOCO+",
        ("refcoco+", "refcoco_plus"),
        box_files.refcoco_files("refcoco+", "val", "testA", "testB"),
        21_373,
    ),
    _refcoco("refcocog", "RefCOCOg", ("refcocog",), box_files.refcoco_files("refcocog", "val", "test"), 14_498),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def benchmark_names(text: str) -> list[str]:
    """The names in a list with commas, each once.

    Raises:
        UserError: one is not a benchmark.
    """
    known: Sequence[str] = (*BENCHMARKS, CUSTOM)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"benchmark '{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}")
    if not names:
        raise UserError(f"no benchmark is named; they are {', '.join(known)}")
    return list(dict.fromkeys(names))
