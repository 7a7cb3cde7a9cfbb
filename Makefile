# Two commands do everything: `make figures` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
PROFILE ?= demo
CORES ?= all
HOME_OF = results/$(basename $(notdir $(PROFILE)))
BIN := .venv/bin
# PROFILE only where it was asked for: an experiment has its own
ASKED = $(if $(filter file,$(origin PROFILE)),,--profile $(PROFILE))
# a batch that came through is not called failed for its gallery
ONLY_GALLERY = { echo "The batch succeeded and its results are whole; only the gallery was not built (make gallery)." >&2; exit 1; }

.PHONY: figures batch tables kernels theory objectives zeroshot redraw publish verify gallery test-browser test test-slow lint lock setup clean
.DELETE_ON_ERROR:

figures: .venv/.ready  ## run the notebooks of PROFILE, leave figures and results in results/PROFILE
	$(BIN)/dfrot-lab batch --profile $(PROFILE) --cores $(CORES)
	@$(BIN)/dfrot-lab gallery --profile $(PROFILE) || $(ONLY_GALLERY)

batch: .venv/.ready  ## every notebook of PROFILE, or the points of EXPERIMENT in experiments.yml
	$(BIN)/dfrot-lab batch --cores $(CORES) $(ASKED) $(if $(EXPERIMENT),--experiment $(EXPERIMENT),--all)
	@$(BIN)/dfrot-lab gallery $(ASKED) $(if $(EXPERIMENT),--experiment $(EXPERIMENT)) || $(ONLY_GALLERY)

tables: .venv/.ready  ## notebooks 05 and 06: the tables of the paper, and what its reviewers asked
	$(BIN)/dfrot-lab batch --profile $(PROFILE) --cores $(CORES) --only 05 --only 06

kernels: .venv/.ready  ## notebook 07: int4 kernels, and the model packed in 4 bits
	$(BIN)/dfrot-lab batch --profile $(PROFILE) --cores $(CORES) --only 07

theory: .venv/.ready  ## notebook 08: why it works, closed forms beside the model's tokens
	$(BIN)/dfrot-lab batch --profile $(PROFILE) --cores $(CORES) --only 08

objectives: .venv/.ready  ## notebook 09: what R1 may be refined for, and the preset that won
	$(BIN)/dfrot-lab batch --profile $(PROFILE) --cores $(CORES) --only 09

zeroshot: .venv/.ready  ## notebook 10: zero-shot accuracy through lm-eval
	$(BIN)/dfrot-lab batch --profile $(PROFILE) --cores $(CORES) --only 10

redraw: .venv/.ready  ## draw every figure again from its result, in seconds
	$(BIN)/dfrot-lab redraw $(HOME_OF)

publish: .venv/.ready  ## copy figures, captions and results into figures/ for committing
	$(BIN)/dfrot-lab publish $(HOME_OF)

verify: .venv/.ready  ## hold results/PROFILE against figures/, figure by figure
	$(BIN)/dfrot-lab verify $(PROFILE)

gallery: .venv/.ready  ## a static site of findings, figures and executed notebooks: results/PROFILE/gallery
	$(BIN)/dfrot-lab gallery --profile $(PROFILE)

test: .venv/.ready  ## the tests, offline once the assets are there
	$(BIN)/dfrot-lab assets
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: .venv/.ready  ## what takes minutes a test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

test-browser: .venv/.ready  ## the gallery in a real headless Chromium (Debian: chromium, chromium-driver)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[browser]'
	$(BIN)/python -m pytest -m browser tests/test_gallery_browser.py

lint: .venv/.ready
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

lock: .venv/.ready  ## write requirements.lock from what is installed in .venv
	$(BIN)/dfrot-lab lock

setup: .venv/.ready

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: run make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { echo "this Python cannot make virtual environments: install its venv package (Debian: python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf .venv results .snakemake
