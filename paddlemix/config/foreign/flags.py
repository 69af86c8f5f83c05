"""Flags of other programs' commands, and what to write for them in ours; `answers.py` says how a line is read.

Only flags that the command here does not have.  A flag is held under its name with underscores.

Sources: haotian-liu/LLaVA c121f04 llava/serve/cli.py, llava/eval/, scripts/merge_lora_weights.py; InternLM/xtuner
0.1.23 xtuner/tools/; ms-swift 2.6.1 and 4.6.0 arguments of infer and export; LLaMA-Factory 0.9.5 chat and export;
PaddleMIX 6afaf05d paddlemix/examples/llava/run_predict_multiround.py and tools/merge_lora_params.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from paddlemix.config.foreign.answers import Answer, each, explain_flag, knows_value, of_programs, says
from paddlemix.config.foreign.templates import LLAMA_FACTORY_TEMPLATES, SWIFT_TEMPLATES, XTUNER_TEMPLATES, Named

# Shared by several programs below; `$` is the value given.
_MODEL = Answer(write="--model-path $")
_ADAPTER = Answer(write="--model-path $", says="an adapter's folder names its base")
_NOTHING = says("paddlemix has no equivalent; leave it out")
_LOADED_FROM_FOLDER = says("leave it out; the folder says what it is")
# Every program stores its template differently; here it is part of the checkpoint.
_STORED = "left out, the template stored with the checkpoint is taken"


def _template(names: Mapping[str, Named], write: str = "") -> Answer:
    values = {name: f"--conv-mode {named.ours}" for name, named in names.items() if named.ours}
    return Answer(values=values, write=write, says=_STORED)


# 16 and 32 bits are the default here, so nothing is written for them.
_BITS = Answer(values={"4": "--load-4bit", "8": "--load-8bit", "16": "", "32": ""})
# torch's names with or without "torch." before them, and the short ones of LLaMA-Factory and ms-swift
_DTYPE = Answer(
    values={
        "bf16": "--dtype bfloat16",
        "fp16": "--dtype float16",
        "fp32": "--dtype float32",
        "*bfloat16": "--dtype bfloat16",
        "*float16": "--dtype float16",
        "*float32": "--dtype float32",
        "auto": "",
    }
)
# Commands that have no flag for it, but another command.
_MERGE = says("`paddlemix merge-lora` folds an adapter into its model; here an adapter is read as it is")
_PREDICT = says("`paddlemix predict --input QUESTIONS --output ANSWERS` answers a file of questions")
_STREAM = Answer(values={"true": "", "false": "--no-stream", "": ""})

# What chat and predict share: the model, its template, its precision.
_XTUNER_MODEL = {
    "llava": Answer(write="--model-path $", says="it names the language model and the tower"),
    "adapter": _ADAPTER,
    "visual_encoder": _LOADED_FROM_FOLDER,
    "visual_select_layer": _LOADED_FROM_FOLDER,
    "prompt_template": _template(XTUNER_TEMPLATES, "--conv-mode xtuner_$"),
    "torch_dtype": _DTYPE,
    "bits": _BITS,
    "stop_words": Answer(write="--stop $"),
    **each("bot_name offload_folder", _NOTHING),
}
# ms-swift: InferArguments; 2.6.1 has ckpt_dir, model_id_or_path, sft_type, 4.6.0 adapters, model, tuner_type.
_SWIFT_MODEL = {
    **each("model model_id_or_path", _MODEL),
    **each("ckpt_dir adapters", _ADAPTER),
    **each("model_type template_type sft_type tuner_type load_args_from_ckpt_dir load_args", _LOADED_FROM_FOLDER),
    "template": _template(SWIFT_TEMPLATES),
    "torch_dtype": _DTYPE,
    **each("quant_bits quantization_bit", _BITS),
    **each("merge_lora merge_lora_and_save", _MERGE),
    **each("infer_backend quant_method attn_impl use_flash_attn", _NOTHING),
    "stop_words": Answer(write="--stop $"),
    **each("tensor_parallel_size vllm_tensor_parallel_size tp lmdeploy_tp", Answer(write="--tensor-parallel $")),
    "do_sample": Answer(values={"false": "--temperature 0", "*": ""}, says="a temperature above 0 samples"),
}
# LLaMA-Factory: ModelArguments, DataArguments and FinetuningArguments, as in training.
_FACTORY_MODEL = {
    "model_name_or_path": _MODEL,
    "adapter_name_or_path": _ADAPTER,
    "template": _template(LLAMA_FACTORY_TEMPLATES, "--conv-mode $"),
    "finetuning_type": _LOADED_FROM_FOLDER,
    "infer_backend": _NOTHING,
    "infer_dtype": _DTYPE,
    "quantization_bit": _BITS,
    "trust_remote_code": _NOTHING,
}

_DATA_ROOT = says("--data-root is the folder with the benchmarks' folders, as playground/data/eval")

# Command -> program -> flag -> answer.
FOREIGN_FLAGS: Mapping[str, Mapping[str, Mapping[str, Answer]]] = {
    # LLaVA: llava/serve/cli.py and the one-question llava/eval/run_llava.py, which has query and sep
    "chat": {
        "LLaVA": {
            "query": says("type the question at `USER: `, or pipe it into the command"),
            "sep": says("give --image-file once for each image"),
        },
        "XTuner": {
            **_XTUNER_MODEL,
            "image": Answer(write="--image-file $"),
            "no_streamer": Answer(write="--no-stream"),
            "system_template": Answer(write="--system TEXT"),
            **each("with_plugins lagent", _NOTHING),
        },
        "ms-swift": {
            **_SWIFT_MODEL,
            "stream": _STREAM,
            **each("load_dataset_config load_data_args val_dataset dataset eval_human result_path", _PREDICT),
        },
        "LLaMA-Factory": {**_FACTORY_MODEL, "default_system": Answer(write="--system $")},
    },
    # LLaVA: llava/eval/model_vqa*.py, one parser in each file; what only one of them has is here too
    "predict": {
        "LLaVA": {
            "question_file": Answer(write="--input $"),
            "answers_file": Answer(write="--output $"),
            "image_folder": Answer(write="--image-root $"),
            "answer_prompter": says("leave it out; LLaVA never reads it"),
            "all_rounds": says("give a question file that holds every round of options"),
            "lang": says("--single-pred-prompt asks in English; write another sentence into the questions"),
        },
        "XTuner": {
            **_XTUNER_MODEL,
            "data_path": Answer(write="--input $"),
            "work_dir": Answer(write="--output FILE"),
            "launcher": says("start it with `paddlemix launch`"),
        },
        "ms-swift": {
            **_SWIFT_MODEL,
            **each("val_dataset dataset custom_val_dataset_path", Answer(write="--input $")),
            **each("result_path result_dir", Answer(write="--output $")),
            "max_batch_size": Answer(write="--batch-size $"),
            **each("load_dataset_config load_data_args", says("name the questions with --input")),
            "eval_human": says("`paddlemix chat` asks a person"),
            "stream": _NOTHING,
        },
        "LLaMA-Factory": {
            **_FACTORY_MODEL,
            **each("eval_dataset", Answer(write="--input $")),
            "media_dir": Answer(write="--image-root $"),
            "output_dir": Answer(write="--output FILE"),
            "per_device_eval_batch_size": Answer(write="--batch-size $"),
        },
        "PaddleMIX": {"image_file": says("`paddlemix chat` talks about one image; --input names a file of questions")},
    },
    # XTuner: mmbench and eval_refcoco; ms-swift: EvalArguments of `swift eval`
    "evaluate": {
        "LLaVA": {
            **each("question_file annotation_file annotation_dir base_dir image_folder", _DATA_ROOT),
            **each("answers_file result_file result_dir", says("--output is the folder of predictions and scores")),
            "lang": says("--benchmark mmbench_dev_cn asks in Chinese"),
        },
        "XTuner": {
            **{name: answer for name, answer in _XTUNER_MODEL.items() if name != "stop_words"},
            "data_path": _DATA_ROOT,
            "work_dir": Answer(write="--output $"),
            "launcher": says("start it with `paddlemix launch`"),
        },
        "ms-swift": {
            **each("eval_dataset", Answer(write="--benchmark $")),
            "eval_limit": Answer(write="--limit $"),
            "eval_output_dir": Answer(write="--output $"),
            "eval_backend": says("leave it out; every benchmark has its official scorer"),
        },
    },
    # LLaVA: scripts/merge_lora_weights.py, whose model_path is the adapter and model_base the model
    "merge-lora": {
        "LLaVA": {
            "model_path": Answer(write="--lora_path $"),
            "model_base": Answer(write="--model_name_or_path $"),
            "save_model_path": Answer(write="--merge_model_path $"),
        },
        "XTuner": {
            "is_clip": says("leave it out; adapters of tower and language model are merged together"),
            **each("max_shard_size safe_serialization offload_folder", _NOTHING),
        },
        "ms-swift": {
            **each("ckpt_dir adapters", Answer(write="--lora_path $")),
            **each("model model_id_or_path", Answer(write="--model_name_or_path $")),
            "output_dir": Answer(write="--merge_model_path $"),
            **each("merge_lora model_type template safe_serialization", says("leave it out")),
            "torch_dtype": _DTYPE,
        },
        "LLaMA-Factory": {
            "adapter_name_or_path": Answer(write="--lora_path $"),
            "export_dir": Answer(write="--merge_model_path $"),
            "export_device": Answer(write="--device $"),
            **each("export_size export_legacy_format template finetuning_type trust_remote_code", _NOTHING),
        },
    },
    # XTuner: convert pth_to_hf; ms-swift and LLaMA-Factory: export, which merges as well
    "convert": {
        "XTuner": {
            "save_format": Answer(values={"xtuner": "--to xtuner", "official": "--to llava", "huggingface": "--to hf"}),
            **each("fp32 max_shard_size", says("--dtype and --shard-size say how weights are written")),
        },
        "ms-swift": {
            "to_hf": Answer(write="--to hf"),
            **each("ckpt_dir adapters model", Answer(write="--input $")),
            "output_dir": Answer(write="--output $"),
        },
        "LLaMA-Factory": {
            "model_name_or_path": Answer(write="--input $"),
            "export_dir": Answer(write="--output $"),
        },
    },
}
# Flags that stand alone: what follows is not a value of theirs.  Those that take several words; all others take one.
SWITCHES = frozenset(
    ["no_streamer", "lagent", "is_clip", "safe_serialization", "answer_prompter", "all_rounds", "fp32"]
)
WORD_LISTS = frozenset(["adapters", "stop_words", "val_dataset", "dataset", "with_plugins"])
# Command -> what to say of a word that no flag is before.
FOREIGN_WORDS = {
    "chat": "as XTuner's language model: --model-path names the folder that --llava names there",
    "predict": "as XTuner's language model: --model-path names the folder that --llava names there",
    "merge-lora": "as XTuner's LLM ADAPTER FOLDER: write --model_name_or_path LLM --lora_path ADAPTER "
    "--merge_model_path FOLDER",
    "convert": "as XTuner's CONFIG PTH FOLDER: a .pth is first converted with `xtuner convert pth_to_hf`; then write "
    "--input FOLDER --output OUT --to LAYOUT",
}


# Command of another program -> whose it is, and what is run here.
FOREIGN_COMMANDS = {
    "train": ("XTuner's and LLaMA-Factory's", "finetune, or pretrain for captions"),
    "sft": ("ms-swift's", "finetune"),
    "pt": ("ms-swift's", "finetune, or pretrain for captions"),
    "infer": ("ms-swift's", "chat, or predict for a file of questions"),
    "app": ("ms-swift's", "chat"),
    "merge": ("XTuner's", "merge-lora"),
    "export": ("ms-swift's and LLaMA-Factory's", "merge-lora, or convert for another layout"),
    "check-custom-dataset": ("XTuner's", "check-data"),
    "log-dataset": ("XTuner's", "show-data"),
    "mmbench": ("XTuner's", "evaluate --benchmark mmbench_dev_en, ..."),
    "eval_refcoco": ("XTuner's", "evaluate --benchmark refcoco, ..."),
    "eval": ("ms-swift's and LLaMA-Factory's", "evaluate"),
    "list-cfg": ("XTuner's", "finetune with a file below paddlemix/config/llava"),
    "copy-cfg": ("XTuner's", "finetune with a file below paddlemix/config/llava, and key=value after it"),
    "env": ("LLaMA-Factory's", "doctor"),
}


def foreign_command(name: str) -> str:
    """What to run for another program's command; "" for a name that none of them has."""
    program, ours = FOREIGN_COMMANDS.get(name, ("", ""))
    return f"; {program} {name} is {ours} here" if program else ""


def foreign_flag(command: str, name: str, value: str | None) -> str:
    """What to write for a flag that a command here does not have.

    Args:
        command: "chat", "predict", ...
        name: of the flag, with underscores, without dashes.
        value: given for it; None where there is none.

    Returns:
        "LLaVA's; write --input questions.jsonl"; "" for a flag that no program of the table has.
    """
    programs = {program: flags[name] for program, flags in FOREIGN_FLAGS.get(command, {}).items() if name in flags}
    if not programs:
        return ""
    # Several programs can have a flag.  Those that know this very value answer alone; one whose answer fits any value
    # is asked only if none does.  Equal answers are said once, with all their owners.
    sure = {program: answer for program, answer in programs.items() if knows_value(answer, value or "")}
    programs = sure or programs
    by_words: dict[str, list[str]] = {}
    for program, answer in programs.items():
        by_words.setdefault(explain_flag(answer, value), []).append(program)
    return "; ".join(f"{of_programs(owners)}; {words}" for words, owners in by_words.items())
