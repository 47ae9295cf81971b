# make demo: from a fresh machine to pictures and a table.   make test: from a fresh machine to green.
# Needs python3 (3.11 or newer, with venv) and make. Everything is installed into .venv, from the pins in requirements.lock.
PYTHON = python3
VENV = .venv
REQUIREMENTS = requirements.lock
RUN = $(VENV)/bin/python
# one for each core that is to work
PROCESSES = 2
SPREAD = OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc_per_node=$(PROCESSES)

all: demo

$(VENV)/ready: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: %s is older than 3.11; name a newer one: make PYTHON=python3.12" % sys.executable)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

# the teacher's pictures; progressive reflow 8 -> 4 -> 2 -> 1, with pictures after each stage; then students and teacher measured
demo: $(VENV)/ready
	mkdir -p runs/demo
	$(RUN) sampler.py --model tiny --compare --out runs/demo/first.png --prompt "fox on green" "penguin on orange" \
	    "panda left of pizza on blue" "ghost on black and purple"
	$(SPREAD) train.py --model tiny --trajectories 1536 --updates 400 --batch 64 --grid-steps 100 \
	    --validation-prompts assets/scenes/prompts.txt --out runs/demo
	$(SPREAD) -- eval.py runs/demo --n 1024 --ddim-steps 1 2 4

# a page on which prompts are typed, on this machine alone: the embedded models as ONNX, and their runtime from npm
LIVE = docs/live
PORT = 8000
page: $(LIVE)/runtime $(LIVE)/models/teacher $(LIVE)/models/student
	@echo "open http://localhost:$(PORT)/live.html (Ctrl-C ends it)"
	@$(RUN) -m http.server $(PORT) --bind 127.0.0.1 --directory docs

$(LIVE)/runtime:
	rm -rf $@.part
	mkdir -p $@.part
	cd $@.part && npm pack --silent onnxruntime-web@1.30.0 && tar xzf *.tgz --strip-components 2 package/dist/ort.wasm.min.mjs \
	    package/dist/ort-wasm-simd-threaded.mjs package/dist/ort-wasm-simd-threaded.wasm && rm *.tgz
	mv $@.part $@

$(LIVE)/models/teacher: assets/tiny-sd/unet/diffusion_pytorch_model.safetensors $(VENV)/ready
	rm -rf $@
	$(RUN) export.py onnx tiny $@

$(LIVE)/models/student: assets/student-2/unet/diffusion_pytorch_model.safetensors $(VENV)/ready
	rm -rf $@
	$(RUN) export.py onnx assets/student-2 $@

# every study in full, and the pages made of them: resumable; each says how long it took before
study: $(VENV)/ready
	$(RUN) -m studies all
	$(RUN) -m studies.results

test: $(VENV)/ready
	$(RUN) -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/ready
	$(RUN) -m pytest -m slow

# the suite on the oldest versions that pyproject.toml allows
test-lowest:
	$(MAKE) test VENV=.venv-lowest REQUIREMENTS=requirements-lowest.txt

lint: $(VENV)/ready
	$(RUN) -m ruff check .

# rebuild the embedded models from the pictures: hours, resumable
tiny: $(VENV)/ready
	$(SPREAD) -m tools.build
	$(SPREAD) -m tools.sd3
	$(SPREAD) -m tools.cards
	$(SPREAD) -m tools.pixel

clean:
	rm -rf $(VENV) .venv-lowest runs $(LIVE)/runtime $(LIVE)/models .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.PHONY: all demo page study test test-slow test-lowest lint tiny clean
