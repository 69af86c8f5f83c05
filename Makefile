# What a developer runs.  `make demo` and `make test` need Python 3.10 to 3.12 and make the environment `.venv` themselves.
#   make demo PYTHON=python3.11      another interpreter
#   make demo EXTRAS=gpu,dev         another build of Paddle (setup.py says what each extra needs)

PYTHON ?= python3
EXTRAS ?= cpu,dev
# Test processes side by side, one thread each: on 2 cores faster than one process with 2 threads.
WORKERS ?= 2

PIP_INSTALL = -m pip install -qq --disable-pip-version-check --no-input
KERNELS = paddlemix/models/kernels/_cpu_kernels_*.so
SOURCES = $(wildcard paddlemix/models/kernels/*.[ch])
RIGHT_PYTHON = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))

.PHONY: help demo test slow soak lint fuzz reference clean distclean

help:
	@echo "make demo       train a tiny LLaVA on this machine and question it, without any download"
	@echo "make test       lint, types and tests"
	@echo "make slow       the tests that take minutes; make soak: make test's five times, as a loaded background job"
	@echo "make lint       ruff and mypy alone"
	@echo "make fuzz       damaged files of every kind for ten minutes; SECONDS=60 SEED=7: others"
	@echo "make reference  compare with torch and transformers (environments of its own, about 2 GB more);"
	@echo "                ISA=avx2: with that instruction set alone, whatever the processor has"
	@echo "make clean      remove caches and build leftovers; make distclean: the environments too"

demo: .venv/.installed
	@.venv/bin/paddlemix demo

test: lint
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(WORKERS) --dist loadfile

slow: .venv/.installed
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -m slow

# As a script's background job, with signals ignored, beside four busy loops: no test may depend on either.
RUNS ?= 5
soak: .venv/.installed
	@trap 'kill $$loops' EXIT; for n in 1 2 3 4; do sh -c 'while :; do :; done' & loops="$$loops $$!"; done; \
	for run in $$(seq $(RUNS)); do \
		(trap '' INT QUIT; OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(WORKERS) --dist loadfile) & wait $$! || exit 1; \
	done

lint: .venv/.installed
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check . || { echo "error: format with .venv/bin/ruff format ." >&2; exit 1; }
	@.venv/bin/mypy

SECONDS ?= 600
SEED ?=

fuzz: .venv/.installed
	@OMP_NUM_THREADS=1 .venv/bin/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# What limits MKL, oneDNN and torch's own operators to an instruction set; tests/reference/conftest.py limits our kernels.
ISA ?=
ISA_avx2 = MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=AVX2 DNNL_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2

# torch's CPU build is much smaller: point pip at it by its own environment variables.
CONVERTED = gqa_for_eval mmvet_for_eval mmbench_for_submission seed_for_submission vizwiz_for_submission vqav2_for_submission
LLAVA_SCRIPTS = $(patsubst %,.venv-reference/llava/scripts/convert_%.py,$(CONVERTED)) \
	.venv-reference/llava/llava/eval/table/rule.json
reference: .venv-reference/.installed .venv-reference457/.installed .venv-reference5/.installed \
		.venv-reference/lmms/.installed $(LLAVA_SCRIPTS)
	@REFERENCE_ISA=$(ISA) $(ISA_$(ISA)) .venv-reference/bin/python -m pytest -m reference

# setup.py says what is needed and compiles the C files, so that a change of either installs again.
.venv/.installed: setup.py $(SOURCES)
	@$(PYTHON) -c '$(RIGHT_PYTHON)' || { echo "error: paddlemix needs Python 3.10 to 3.12: make PYTHON=python3.11" >&2; exit 1; }
	@echo "installing paddlemix[$(EXTRAS)] and its dependencies into .venv (about 2 GB, some minutes) ..."
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP_INSTALL) -e ".[$(EXTRAS)]"
	@touch $@
	@ls $(KERNELS) >/dev/null 2>&1 || echo "note: without a C compiler (gcc) no kernels for CPU were built; CPU runs are slower"
	@echo "installed"

.venv-reference/.installed: setup.py $(SOURCES)
	@$(PYTHON) -c '$(RIGHT_PYTHON)' || { echo "error: paddlemix needs Python 3.10 to 3.12: make PYTHON=python3.11" >&2; exit 1; }
	@echo "installing paddlemix, torch and peft into .venv-reference (about 4 GB, some minutes) ..."
	@test -x .venv-reference/bin/python || $(PYTHON) -m venv .venv-reference
	@.venv-reference/bin/python $(PIP_INSTALL) -e ".[cpu,dev]" "torch==2.13.0" "transformers<5" peft
	@touch $@
	@echo "installed"

# Other versions of transformers over the torch of the environment above: they save folders that ours then reads.
.venv-reference457/.installed: TRANSFORMERS = 4.57.6
.venv-reference5/.installed: TRANSFORMERS = 5.24.0
.venv-reference457/.installed .venv-reference5/.installed: | .venv-reference/.installed
	@echo "installing transformers $(TRANSFORMERS) into $(@D) ..."
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@.venv-reference/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(@D)/reference.pth
	@mv $(@D)/reference.pth "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@$(@D)/bin/python $(PIP_INSTALL) --no-warn-conflicts "transformers==$(TRANSFORMERS)"
	@touch $@
	@echo "installed"

# LLaVA's own evaluation scripts, of its package and of its repository, and lmms-eval's tasks, of which single files are
# loaded: they read the answers of `predict`, and score what our scorers score.
LLAVA_COMMIT = c121f0432da27facab705978f83c4ada465e46fd
LLAVA_ADDRESS = https://raw.githubusercontent.com/haotian-liu/LLaVA/$(LLAVA_COMMIT)

.venv-reference/llava/.installed: | .venv-reference/.installed
	@.venv-reference/bin/python $(PIP_INSTALL) --no-deps --target .venv-reference/llava llava-torch==1.2.2.post1
	@touch $@

.venv-reference/lmms/.installed: | .venv-reference/.installed
	@.venv-reference/bin/python $(PIP_INSTALL) --no-deps --target .venv-reference/lmms lmms-eval==0.7.3
	@touch $@

$(LLAVA_SCRIPTS): .venv-reference/llava/%: | .venv-reference/llava/.installed
	@mkdir -p $(@D)
	@.venv-reference/bin/python -c "import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])" \
		$(LLAVA_ADDRESS)/$* $@ 2>/dev/null || echo "note: $(LLAVA_ADDRESS)/$* cannot be fetched; its test is left out"

# The kernels' libraries stay as long as the environment that they were built for, since nothing would build them again.
clean:
	@rm -rf build dist paddlemix.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find paddlemix tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	@rm -rf .venv .venv-reference .venv-reference457 .venv-reference5
	@rm -f $(KERNELS)
