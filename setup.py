"""How `pip install .` builds the package, and why each version is what it is.

PaddleNLP 3.0.0b4 is the last release of its line: it stands still while its dependencies move on, so what it was
measured with is pinned here, each pin with its reason; a pin may go as soon as its reason does.  Paddle itself is an
extra, because a machine needs exactly one of its builds: `[cpu]`, `[gpu]` or `[npu]`.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent

PADDLE = "paddlepaddle==3.3.1"

PINNED_FOR_PADDLENLP = [
    # A pre-release must be named: pip alone stops at 2.8.1, which has neither Mistral nor LoRA merging.
    "paddlenlp==3.0.0b4",
    # 0.3 dropped `aistudio_sdk.hub.download`, which PaddleNLP imports at start.
    "aistudio-sdk==0.2.6",
    # PaddleNLP asks for at most this; there is no build of it for Python 3.13, hence `python_requires`.
    "numpy==1.26.4",
    # The last generation that still loads the generated protobuf code inside PaddleNLP; from 7 on VisualDL cannot
    # record hyper-parameters either, and with it fails every training run with PaddleNLP's default callbacks.
    "protobuf==3.20.3",
    # 26 is built for NumPy 2 only.
    "pyarrow==25.0.1",
    # PaddleNLP limits dill and multiprocess to these; a datasets release that accepts both is named so that pip
    # need not walk back through all of them.
    "datasets==5.0.1",
    "dill==0.3.4",
    "multiprocess==0.70.12.2",
    # What both PaddleNLP and this transformers accept: hub below 1.0, tokenizers 0.21.
    "huggingface_hub==0.36.2",
    "tokenizers==0.21.4",
    "safetensors==0.8.0",
    # 0.2.3 carries a protobuf 7 schema that transformers' `LlamaTokenizer(legacy=False)` cannot load beside 3.20.
    "sentencepiece==0.2.1",
    # The version checked with protobuf 3.20.3: PaddleNLP's Trainer switches its callback on by default.
    "visualdl==2.5.3",
    # Its tokenizer classes only, they need no torch; the version that resolves with the pins above.
    "transformers==4.55.4",
]

REQUIRED = [
    *PINNED_FOR_PADDLENLP,
    "filelock",  # several processes that start at once download a model once
    "matplotlib",  # loss curve and evaluation pictures
    "pillow>=9.1",  # `Image.Resampling` came with 9.1
    "requests",  # images given by URL
    "scikit-learn",  # the demo's handwritten digits come with it
    "tqdm",
]

# What Excel files are written with, and the metrics that are not ours to write.  sacrebleu's tokenizer for Chinese
# needs no further package.
EVAL = ["openpyxl", "pyarrow", "rouge-score>=0.1.2", "sacrebleu>=2.4"]

EXTRAS = {
    "cpu": [PADDLE],
    # The public index ends at paddlepaddle-gpu 2.6; 3.x is only on Paddle's own, one per CUDA version.  Install it
    # first, by Paddle's installation page; then `[gpu]` finds it in place.
    "gpu": ["paddlepaddle-gpu>=3.0,<3.4"],
    # The host side is the CPU build.  The plugin, paddle-custom-npu, is not on the public index either: take the one
    # for the machine's CANN version from Paddle's installation page.
    "npu": [PADDLE],
    "serve": ["fastapi", "uvicorn", "gradio"],
    "eval": EVAL,
    "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-requests", *EVAL],
}


# The kernels for CPU are built for each kind of processor; `paddlemix/models/kernels/cpu_library.py` takes the best
# that a machine has.  They use the OpenMP runtime that paddle brings, so that nothing is linked for `-fopenmp`.
KERNEL_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp"]
KERNEL_KINDS: dict[str, list[str]] = {"plain": []}
if platform.machine() == "x86_64":
    wide = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mavx512cd", "-mfma", "-mprefer-vector-width=512"]
    KERNEL_KINDS |= {"avx2": ["-mavx2", "-mfma"], "avx512": wide}
KERNELS = [
    Extension(
        f"paddlemix.models.kernels._cpu_kernels_{kind}",
        [f"paddlemix/models/kernels/{name}_kernels.c" for name in ("cpu", "attention", "quantized")],
        depends=["paddlemix/models/kernels/kernels.h"],
        extra_compile_args=[*KERNEL_FLAGS, *flags],
        libraries=["m"],
        optional=True,  # without a C compiler paddle's own operators are used; `paddlemix doctor` says so
    )
    for kind, flags in KERNEL_KINDS.items()
]


def read_version() -> str:
    """`__version__` as written in paddlemix/__init__.py, read as text: building must not import the package.

    Raises:
        ValueError: the file has no such line.
    """
    text = (ROOT / "paddlemix" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('paddlemix/__init__.py has no line of the form __version__ = "1.2.3"')
    return match.group(1)


def read_description() -> str:
    """README.md, or "" in a tree that has none."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="paddlemix",
    version=read_version(),
    description="Fine-tune, serve and evaluate LLaVA vision-language models on PaddlePaddle",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["paddlemix*"]),
    package_data={"paddlemix": ["config/llava/**/*.json", "**/*.md", "models/kernels/*.h", "tools/*.sh"]},
    ext_modules=KERNELS,
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["paddlemix = paddlemix.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
