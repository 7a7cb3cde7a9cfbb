# Every result and figure of a profile, redone only where something it depends on has changed.
# Started by `dfrot-lab batch` (make figures); shared artefacts are outputs, so nothing is made twice.
from pathlib import Path

from dfrot_lab import profiles

PROFILE = config.get("profile", "demo")
SETTINGS = profiles.load(PROFILE)
COMMON = SETTINGS["common"]
HOME = f"results/{Path(PROFILE).stem}"

# the notebooks, with the studies they use and the memory they take with the demo model
NOTEBOOKS = {
    "01_rotation_invariance": (["invariance"], 5000),
    "02_ro_vs_rh_error": (["token_errors"], 3000),
    "03_massive_tokens_fp16": (["massive_tokens_fp16", "perplexities"], 3000),
    "04_dfrot": (["refined_rotation", "perplexities"], 3000),
    "05_tables": (["paper_tables", "perplexities"], 4000),
    "06_reviewers_questions": (["questions", "invariance"], 4500),
    "07_int4_kernels": (["int4_kernels", "int4_model", "int4_speed"], 4500),
    "08_why_it_works": (["why_it_works", "landscape", "perplexities"], 3000),
    "09_objectives": (["objectives", "perplexities"], 5500),
    "10_zero_shot": (["zero_shot"], 5000),
}
# what was asked for: the first four (make figures) unless named
ASKED = config["notebooks"].split() if config.get("notebooks") else list(NOTEBOOKS)[:4]
# what a rule's numbers depend on; plots and the command line are not among it
KERNELS = ["checks", "hadamard", "reference"]
CORE = ["activations", "architectures", "artefacts", "assets", "cayley", "corpora", "dfrot", "evaluation", "files", "gptq", "hessians", "kv_cache", "linears"]
CORE += ["lab", "massive", "models", "objectives", "paper", "polar", "prefix", "presets", "weighting"]
CORE += ["geodesics", "quantized_model", "quantizers", "results", "rotations", "theory", "wikipedia"]
CODE = [f"kernels/dfrot_kernels/{m}.py" for m in KERNELS] + [f"dfrot_lab/{m}.py" for m in CORE]
DRAWING = ["dfrot_lab/data/paper.json", "dfrot_lab/data/captions.yml", "dfrot_lab/data/style.mplstyle", "dfrot_lab/tables.py"]
DRAWING += [str(p) for p in sorted(Path("dfrot_lab/plots").glob("*.py"))]

ZERO_SHOT = ["dfrot_lab/zero_shot.py", "dfrot_lab/text_tasks.py", "dfrot_lab/accuracy_tables.py"]
ZERO_SHOT += [str(p) for p in sorted(Path("dfrot_lab/data/tasks").glob("*.yaml"))]

# a corpus or a model that is a local file
SOURCES = [COMMON[name] for name in ("corpus", "model") if Path(str(COMMON[name])).is_file()]


rule all:
    input:
        expand(f"{HOME}/{{notebook}}/result.json", notebook=ASKED),


rule assets:
    input:
        str(profiles.path(PROFILE)),
        "dfrot_lab/assets.py",
    output:
        f"{HOME}/artefacts/assets.json",
    shell:
        "dfrot-lab assets --profile {PROFILE:q} --out {output:q}"


rule activations:
    input:
        f"{HOME}/artefacts/assets.json",
        str(profiles.path(PROFILE)),
        CODE,
        SOURCES,
    output:
        f"{HOME}/artefacts/activations.safetensors",
    threads: COMMON["threads"]
    resources:
        mem_mb=2500,
    shell:
        "dfrot-lab collect --profile {PROFILE:q}"


rule rotations:  # one job: each takes seconds here, and on a GPU less than starting Python
    input:
        f"{HOME}/artefacts/activations.safetensors",
    output:
        f"{HOME}/artefacts/rotations.json",  # the list; the files stay when the job is cut short
    threads: COMMON["threads"]
    resources:
        mem_mb=1500,
    priority: 10
    shell:
        "dfrot-lab optimize --profile {PROFILE:q} --all --out {output:q}"


rule notebook:
    input:
        f"{HOME}/artefacts/activations.safetensors",
        lambda w: rules.rotations.output if w.notebook in ("04_dfrot", "05_tables", "06_reviewers_questions", "08_why_it_works", "09_objectives", "10_zero_shot") else [],
        lambda w: [f"dfrot_lab/studies/{m}.py" for m in NOTEBOOKS[w.notebook][0]],
        SOURCES,
        str(profiles.path(PROFILE)),
        CODE,
        DRAWING,
        lambda w: ZERO_SHOT if w.notebook == "10_zero_shot" else [],
        notebook="notebooks/{notebook}.ipynb",
    output:
        f"{HOME}/{{notebook}}/result.json",
        directory(f"{HOME}/{{notebook}}/figures"),
    log:
        f"{HOME}/{{notebook}}/notebook.ipynb",  # a log: Snakemake keeps it when the notebook fails
    wildcard_constraints:
        notebook="|".join(NOTEBOOKS),
    threads: COMMON["threads"]
    resources:
        mem_mb=lambda w: NOTEBOOKS[w.notebook][1],
    shell:
        "dfrot-lab run {wildcards.notebook} --profile {PROFILE:q} --folder {HOME:q} --out {log:q}"
