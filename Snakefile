# Every result and figure of a profile, redone only where something it depends on has changed.
# Started by `dfrot-lab batch` (make figures); shared artefacts are outputs, so nothing is made twice.
# `dfrot-lab batch --experiment` runs the points of a grid: same rules, a folder and a profile for each.
import re
from pathlib import Path

from dfrot_lab import experiments, profiles

PROFILE = config.get("profile", "demo")
SETTINGS = profiles.load(PROFILE)
COMMON = SETTINGS["common"]
HOME = str(Path(str(config.get("folder") or f"results/{Path(PROFILE).stem}")))

# the notebooks, with the studies they use, and the memory (MiB) and time (minutes, three times what two
# cores take) with the demo model; `resources:` of a profile says what they take with another
NOTEBOOKS = {
    "01_rotation_invariance": (["invariance"], 5000, 10),
    "02_ro_vs_rh_error": (["token_errors"], 3000, 10),
    "03_massive_tokens_fp16": (["massive_tokens_fp16", "perplexities"], 3000, 30),
    "04_dfrot": (["refined_rotation", "perplexities"], 3000, 45),
    "05_tables": (["paper_tables", "perplexities"], 4000, 240),
    "06_reviewers_questions": (["questions", "invariance"], 4500, 60),
    "07_int4_kernels": (["int4_kernels", "int4_model", "int4_speed"], 4500, 20),
    "08_why_it_works": (["why_it_works", "landscape", "perplexities"], 3000, 10),
    "09_objectives": (["objectives", "perplexities"], 5500, 240),
    "10_zero_shot": (["zero_shot", "zero_shot_claims"], 5000, 360),
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


def windows(notebook, values):
    """Calibration windows of the shared Hessians that `notebook` uses with a point's `values`; 0 for none."""
    own = SETTINGS["notebooks"].get(notebook, {}) | values
    method = {"05_tables": own.get("gptq"), "09_objectives": "gptq-shared", "10_zero_shot": own.get("method")}
    shared = method.get(notebook, "none") in (None, "gptq-shared")
    return own.get("weight_windows", COMMON.get("weight_windows", 32)) if shared else 0


# what each folder's results were asked for with, besides the profile; and by folder with artefacts, the
# sizes of the Hessians that its notebooks use: one is made before them, several are used in turn
VALUES = {str(p.folder): p.values for p in GRID.points} if GRID else {HOME: {}}
HESSIANS = {home: set() for home in SHARES}
for folder, values in VALUES.items():
    HESSIANS[home_of(folder)] |= {windows(n, values) for n in NOTEBOOKS} - {0}


def in_turn(folder, notebook):
    return windows(notebook, VALUES[folder]) > 0 and len(HESSIANS[home_of(folder)]) > 1


wildcard_constraints:
    home=one_of(SHARES),
    folder=one_of(RESULTS),
    notebook=one_of(NOTEBOOKS),


# fetching is for the machine with the network, once
localrules:
    all,
    assets,

# what a rule's numbers depend on; plots and the command line are not among it
KERNELS = ["checks", "hadamard", "reference"]
CORE = ["activations", "architectures", "artefacts", "assets", "cayley", "corpora", "dfrot", "evaluation", "files", "gptq", "hessians", "kv_cache", "linears"]
CORE += ["lab", "massive", "models", "objectives", "paper", "polar", "prefix", "presets", "weighting"]
CORE += ["geodesics", "heads", "quantized_model", "quantizers", "results", "rotations", "theory", "wikipedia"]
CODE = [f"kernels/dfrot_kernels/{m}.py" for m in KERNELS] + [f"dfrot_lab/{m}.py" for m in CORE]
DRAWING = ["dfrot_lab/data/paper.json", "dfrot_lab/data/captions.yml", "dfrot_lab/data/style.mplstyle", "dfrot_lab/tables.py"]
DRAWING += [str(p) for p in sorted(Path("dfrot_lab/plots").glob("*.py"))]

ZERO_SHOT = ["dfrot_lab/zero_shot.py", "dfrot_lab/text_tasks.py", "dfrot_lab/accuracy_tables.py"]
ZERO_SHOT += [str(p) for p in sorted(Path("dfrot_lab/data/tasks").glob("*.yaml"))]

# a corpus or a model that is a local file
SOURCES = sorted({v[n] for v in NAMED for n in ("corpus", "model") if Path(str(v.get(n, ""))).is_file()})


rule all:
    input:
        expand("{folder}/{notebook}/result.json", folder=RESULTS, notebook=ASKED),


rule assets:
    input:
        lambda w: str(profiles.path(COLLECTED[w.home])),
        "dfrot_lab/assets.py",
    output:
        "{home}/artefacts/assets.json",
    params:
        profile=lambda w: COLLECTED[w.home],
    shell:
        "dfrot-lab assets --profile {params.profile:q} --out {output:q}"


rule activations:
    input:
        "{home}/artefacts/assets.json",
        lambda w: str(profiles.path(COLLECTED[w.home])),
        CODE,
        SOURCES,
    output:
        "{home}/artefacts/activations.safetensors",
    params:
        profile=lambda w: COLLECTED[w.home],
    threads: THREADS
    resources:
        **needs(2500, 15),
    shell:
        "dfrot-lab collect --profile {params.profile:q} --folder {wildcards.home:q}"


rule rotations:  # one job: each takes seconds here, and on a GPU less than starting Python
    input:
        "{home}/artefacts/activations.safetensors",
        lambda w: str(profiles.path(SHARES[w.home])),
    output:
        f"{{home}}/artefacts/rotations{TAG}.json",  # the list; the files stay when the job is cut short
    params:
        profile=lambda w: SHARES[w.home],
    threads: THREADS
    resources:
        **needs(1500, 30),
    priority: 10
    shell:
        "dfrot-lab optimize --profile {params.profile:q} --folder {wildcards.home:q} --all --out {output:q}"


rule hessians:
    input:
        "{home}/artefacts/activations.safetensors",
    output:
        "{home}/artefacts/hessians/hessians.json",  # written last, when all layers are there
    params:
        profile=lambda w: COLLECTED[w.home],
        windows=lambda w: max(HESSIANS[w.home], default=0),
    threads: THREADS
    resources:
        **needs(3000, 60),
    shell:
        "dfrot-lab collect --hessians {params.windows} --profile {params.profile:q} --folder {wildcards.home:q}"


rule notebook:
    input:
        lambda w: f"{home_of(w.folder)}/artefacts/activations.safetensors",
        lambda w: f"{home_of(w.folder)}/artefacts/rotations{TAG}.json" if w.notebook in REFINED else [],
        lambda w: f"{home_of(w.folder)}/artefacts/hessians/hessians.json"
        if windows(w.notebook, VALUES[w.folder]) and not in_turn(w.folder, w.notebook) else [],
        lambda w: [f"dfrot_lab/studies/{m}.py" for m in NOTEBOOKS[w.notebook][0]],
        SOURCES,
        lambda w: str(profiles.path(RESULTS[w.folder][0])),
        CODE,
        DRAWING,
        lambda w: ZERO_SHOT if w.notebook == "10_zero_shot" else [],
        notebook="notebooks/{notebook}.ipynb",
    output:
        "{folder}/{notebook}/result.json",
        directory("{folder}/{notebook}/figures"),
    params:
        profile=lambda w: RESULTS[w.folder][0],
    log:
        "{folder}/{notebook}/notebook.ipynb",  # a log: Snakemake keeps it when the notebook fails
    threads: THREADS
    resources:
        mem_mb=lambda w: needs(NOTEBOOKS[w.notebook][1], 0)["mem_mb"],
        runtime=lambda w: needs(0, NOTEBOOKS[w.notebook][2])["runtime"],
        gpu=needs(0, 0)["gpu"],
        hessians=lambda w: int(in_turn(w.folder, w.notebook)),
    shell:
        "dfrot-lab run {wildcards.notebook} --profile {params.profile:q} --folder {wildcards.folder:q} --out {log:q}"
