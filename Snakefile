# Every result and figure of a profile, redone only where something it depends on has changed: the values
# that a rule reads (its params), its files, and the code that it uses (by its imports).
# Started by `dfrot-lab batch` (make figures); shared artefacts are outputs, so nothing is made twice.
# `dfrot-lab batch --experiment` runs the points of a grid: same rules, a folder and a profile for each.
import json
import re
from functools import cache
from pathlib import Path

from dfrot_lab import experiments, imports, notebooks, profiles

PROFILE = config.get("profile", "demo")
SETTINGS = profiles.load(PROFILE)
COMMON = SETTINGS["common"]
HOME = str(Path(str(config.get("folder") or f"results/{Path(PROFILE).stem}")))

# the notebooks, with the memory (MiB) and time (minutes, three times what two cores take) with the demo
# model; `resources:` of a profile says what they take with another
NOTEBOOKS = {
    "01_rotation_invariance": (5000, 10),
    "02_ro_vs_rh_error": (3000, 10),
    "03_massive_tokens_fp16": (3000, 30),
    "04_dfrot": (3000, 45),
    "05_tables": (4000, 240),
    "06_reviewers_questions": (5500, 90),
    "07_int4_kernels": (4500, 20),
    "08_why_it_works": (3000, 10),
    "09_objectives": (7500, 270),
    "10_zero_shot": (5000, 360),
}
REFINED = ("04_dfrot", "05_tables", "06_reviewers_questions", "08_why_it_works", "09_objectives", "10_zero_shot")
GRID = experiments.find(config["experiment"], PROFILE, Path.cwd(), Path(HOME)) if config.get("experiment") else None
# every set of values that a job may run with; each job reserves what the largest takes
NAMED = [COMMON, *(COMMON | p.values for p in GRID.points)] if GRID else [COMMON]
GPU = {"gpu": int(any(str(v["device"]).startswith("cuda") for v in NAMED))}
THREADS = max(v["threads"] for v in NAMED)
# folders with results, and with artefacts: each with the profile that holds its values
if GRID:
    TAG = f"-{GRID.name}"
    RESULTS = {str(p.folder): (str(p.profile), p.share) for p in GRID.points}
    SHARES = {str(s.folder): str(s.profile) for s in GRID.shares}
    COLLECTED = {home: PROFILE if home == HOME else file for home, file in SHARES.items()}
else:
    TAG = ""
    RESULTS = {HOME: (PROFILE, None)}
    COLLECTED = SHARES = {HOME: PROFILE}
# what was asked for: the experiment's, else the first four (make figures) unless named
ASKED = config["notebooks"].split() if config.get("notebooks") else GRID.notebooks if GRID else list(NOTEBOOKS)[:4]


def home_of(folder):
    """The folder with the artefacts for the results in `folder`."""
    share = RESULTS[folder][1]
    return str(share.folder) if share else folder


def one_of(names):
    return "|".join(map(re.escape, names))


def needs(memory, minutes):
    """mem_mb, runtime and gpu of a job: those of the demo model, unless the profile has its own."""
    return {"mem_mb": memory, "runtime": minutes} | GPU | SETTINGS["resources"]


def windows(notebook, given):
    """Calibration windows of the shared Hessians that `notebook` uses with a point's `given`; 0 for none."""
    own = SETTINGS["notebooks"].get(notebook, {}) | given
    method = {"05_tables": own.get("gptq"), "09_objectives": "gptq-shared", "10_zero_shot": own.get("method")}
    shared = method.get(notebook, "none") in (None, "gptq-shared")
    return own.get("weight_windows", COMMON.get("weight_windows", 32)) if shared else 0


# what each folder's results were asked for with, besides the profile; and by folder with artefacts, the
# sizes of the Hessians that its notebooks use: one is made before them, several are used in turn
VALUES = {str(p.folder): p.values for p in GRID.points} if GRID else {HOME: {}}
HESSIANS = {home: set() for home in SHARES}
for folder, given in VALUES.items():
    HESSIANS[home_of(folder)] |= {windows(n, given) for n in NOTEBOOKS} - {0}


def in_turn(folder, notebook):
    return windows(notebook, VALUES[folder]) > 0 and len(HESSIANS[home_of(folder)]) > 1


def artefacts(folder, notebook):
    """The shared artefacts that are made before `notebook` runs in `folder`."""
    home = f"{home_of(folder)}/artefacts"
    shared = windows(notebook, VALUES[folder]) and not in_turn(folder, notebook)
    return [
        f"{home}/activations.safetensors",
        *([f"{home}/rotations{TAG}.json"] if notebook in REFINED else []),
        *([f"{home}/hessians/hessians.json"] if shared else []),
    ]


wildcard_constraints:
    home=one_of(SHARES),
    folder=one_of(RESULTS),
    notebook=one_of(NOTEBOOKS),


# fetching is for the machine with the network, once
localrules:
    all,
    assets,

# --- what a rule depends on ---------------------------------------------------------------------------

ROOT = Path.cwd()
# what is for readers alone: exercises, and what checks them
EXERCISES = ["dfrot_lab.answers", "dfrot_lab.exercises", "dfrot_lab.lessons"]
KERNELS = ["dfrot_kernels.error"]  # loaded by name, so that no import tells of it; on a GPU R1 rests on it
CODE = {
    "activations": imports.closure(ROOT, ["dfrot_lab.activations", "dfrot_lab.corpora"]),
    "rotations": imports.closure(ROOT, ["dfrot_lab.dfrot", *KERNELS]),
    "hessians": imports.closure(ROOT, ["dfrot_lab.activations", "dfrot_lab.corpora", "dfrot_lab.hessians"]),
}
# artefacts.py says when and with what, refinements.py how
CODE = {rule: [*files, "dfrot_lab/artefacts.py", "dfrot_lab/refinements.py"] for rule, files in CODE.items()}
BY_NAME = {"07_int4_kernels": ["dfrot_kernels.triton_ops"]}
DATA = [f"dfrot_lab/data/{name}" for name in ("paper.json", "captions.yml", "style.mplstyle")]
TASKS = [str(p) for p in sorted(Path("dfrot_lab/data/tasks").glob("*.yaml"))]
# what activations and Hessians are made of; `about` of dfrot_lab/artefacts.py, and the sample
SAMPLE = ("model", "corpus", "seqlen", "dtype", "device", "threads", "calibration_seed")


@cache
def code_of(notebook):
    names = imports.of_notebook(ROOT, Path(f"notebooks/{notebook}.ipynb"))
    tasks = TASKS if "dfrot_lab.studies.zero_shot" in names else []
    return imports.closure(ROOT, [*names, *KERNELS, *BY_NAME.get(notebook, [])], EXERCISES) + DATA + tasks


@cache
def settings(profile):
    return profiles.load(profile)


@cache
def parameters_of(notebook):
    return set(notebooks.parameters(Path(f"notebooks/{notebook}.ipynb")))


def common(profile, *names):
    """Those of the profile's common values, whichever file has them."""
    return {n: v for n, v in settings(profile)["common"].items() if n in names}


@cache
def values(profile, notebook):
    """What the profile, with those below it, sets for `notebook`."""
    own = settings(profile)["notebooks"].get(notebook, {})
    return common(profile, *parameters_of(notebook)) | own


def keyed(values):
    """As a param: the job runs again when it is another."""
    return json.dumps(values, sort_keys=True)


def on_disk(values):
    """The files behind texts and models that are on this disk, a model's folder among them."""
    named = [values.get(n, []) for n in ("model", "corpus", "corpora", "second")]
    paths = [Path(str(v)).expanduser() for one in named for v in (one if isinstance(one, list) else [one])]
    folders = [p for p in paths if (p / "config.json").is_file()]
    found = {f for p in folders for f in p.iterdir() if f.is_file()} | {p for p in paths if p.is_file()}
    return sorted(map(str, found))


# as the last of a command: what it says is kept in the job's log, and seen meanwhile
TEE = " 2>&1 | tee {log:q} >&2"


rule all:
    input:
        expand("{folder}/{notebook}/result.json", folder=RESULTS, notebook=ASKED),
        # one that was damaged is gone, and is made again, results or not
        [f for folder in RESULTS for n in ASKED for f in artefacts(folder, n)] if int(config.get("damaged", 0)) else [],


rule assets:
    input:
        "dfrot_lab/assets.py",
    output:
        "{home}/artefacts/assets.json",
    params:
        profile=lambda w: COLLECTED[w.home],
        values=lambda w: keyed(common(COLLECTED[w.home], "model", "corpus")),
    log:
        "{home}/logs/assets.log",
    shell:
        "dfrot-lab assets --profile {params.profile:q} --out {output:q}" + TEE


rule activations:
    input:
        "{home}/artefacts/assets.json",
        CODE["activations"],
        lambda w: on_disk(common(COLLECTED[w.home], "model", "corpus")),
    output:
        "{home}/artefacts/activations.safetensors",
    params:
        profile=lambda w: COLLECTED[w.home],
        values=lambda w: keyed(common(COLLECTED[w.home], *SAMPLE, "calibration")),
    log:
        "{home}/logs/activations.log",
    threads: THREADS
    resources:
        **needs(2500, 15),
    shell:
        "dfrot-lab collect --profile {params.profile:q} --folder {wildcards.home:q}" + TEE


rule rotations:  # one job: each takes seconds here, and on a GPU less than starting Python
    input:
        "{home}/artefacts/activations.safetensors",
        CODE["rotations"],
    output:
        f"{{home}}/artefacts/rotations{TAG}.json",  # the list; the files stay when the job is cut short
    params:
        profile=lambda w: SHARES[w.home],
        values=lambda w: keyed(
            common(SHARES[w.home], "seeds", "gamma", "iterations", "rows", "solver", "device", "threads")
        ),
        which=lambda w: keyed(settings(SHARES[w.home])["rotations"]),
    log:
        f"{{home}}/logs/rotations{TAG}.log",
    threads: THREADS
    resources:
        **needs(1500, 30),
    priority: 10
    shell:
        "dfrot-lab optimize --profile {params.profile:q} --folder {wildcards.home:q} --all "
        "--out {output:q}" + TEE


rule hessians:
    input:
        "{home}/artefacts/assets.json",
        CODE["hessians"],
        lambda w: on_disk(common(COLLECTED[w.home], "model", "corpus")),
    output:
        "{home}/artefacts/hessians/hessians.json",  # written last, when all layers are there
    params:
        profile=lambda w: COLLECTED[w.home],
        values=lambda w: keyed(common(COLLECTED[w.home], *SAMPLE)),
        windows=lambda w: max(HESSIANS[w.home], default=0),
    log:
        "{home}/logs/hessians.log",
    threads: THREADS
    resources:
        **needs(3000, 60),
    shell:
        "dfrot-lab collect --hessians {params.windows} --profile {params.profile:q} "
        "--folder {wildcards.home:q}" + TEE


rule notebook:
    input:
        lambda w: artefacts(w.folder, w.notebook),
        lambda w: code_of(w.notebook),
        lambda w: on_disk(values(RESULTS[w.folder][0], w.notebook)),
        notebook="notebooks/{notebook}.ipynb",
    output:
        "{folder}/{notebook}/result.json",
        directory("{folder}/{notebook}/figures"),
    params:
        profile=lambda w: RESULTS[w.folder][0],
        values=lambda w: keyed(values(RESULTS[w.folder][0], w.notebook)),
    log:
        "{folder}/{notebook}/notebook.ipynb",  # a log: Snakemake keeps it when the notebook fails
    threads: THREADS
    resources:
        mem_mb=lambda w: needs(NOTEBOOKS[w.notebook][0], 0)["mem_mb"],
        runtime=lambda w: needs(0, NOTEBOOKS[w.notebook][1])["runtime"],
        gpu=needs(0, 0)["gpu"],
        hessians=lambda w: int(in_turn(w.folder, w.notebook)),
    shell:
        "dfrot-lab run {wildcards.notebook} --profile {params.profile:q} --folder {wildcards.folder:q} --out {log:q}"
