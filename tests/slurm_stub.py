#!/usr/bin/env python3
"""A SLURM of one machine, as far as Snakemake's executor speaks to it: called as sbatch, srun, squeue, ….

Jobs run at once, in the background; each is a JSON file in the folder $SLURM_STUB, with its options,
state and exit status. As with the real commands, an option that is not known is an error. With
$SLURM_STUB_REFUSE set sbatch refuses every job, after it has written the file; with $SLURM_STUB_HOLD
no job begins: all are pending.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("SLURM_STUB", ""))
ACTIVE = ("PENDING", "RUNNING")
# what SLURM tells a job of its options
TOLD = {"cpus_per_task": "SLURM_CPUS_PER_TASK", "gpus": "SLURM_GPUS", "ntasks": "SLURM_NTASKS"}


def parser(name: str, *flags: str, **kinds) -> argparse.ArgumentParser:
    """Options with a value (`--name`), of which `kinds` (by destination) says what it must be."""
    made = argparse.ArgumentParser(name, allow_abbrev=False)
    for flag in flags:
        names = flag.split("/")
        kind = kinds.get(names[-1].lstrip("-").replace("-", "_"), str)
        made.add_argument(*names, type=kind)
    return made


def write(job: dict) -> None:
    """Whole or not at all: another process may read it."""
    path = HOME / f"{job['id']}.json"
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(job, indent=1))
    os.replace(partial, path)


def jobs() -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted(HOME.glob("[0-9]*.json"))]


def sbatch(arguments: list[str]) -> int:
    kinds = {
        "mem": int,
        "time": int,
        "ntasks": int,
        "cpus_per_task": int,
        "gpus": int,
        "nodes": int,
    }
    made = parser(
        "sbatch", "--job-name", "--output", "--export", "--comment", "-A/--account", "-p/--partition",
        "-t/--time", "--mem", "--ntasks", "--cpus-per-task", "--gpus", "--nodes", "-D/--chdir", "--wrap",
        **kinds,
    )  # fmt: skip
    made.add_argument("--parsable", action="store_true")
    options = vars(made.parse_args(arguments))
    if options["export"] != "ALL" or not options["parsable"] or not options["wrap"]:
        made.error("this SLURM takes --parsable, --export=ALL and --wrap alone")
    number = 1 + max((j["id"] for j in jobs()), default=0)
    while True:  # another sbatch may be taking the same one
        with contextlib.suppress(FileExistsError):
            (HOME / f"{number}.taken").touch(exist_ok=False)
            break
        number += 1
    job = {"id": number, "state": "PENDING", "options": options, "exit": None, "group": None}
    if "SLURM_STUB_REFUSE" in os.environ:
        write(job | {"state": "FAILED"})
        print("sbatch: error: Batch job submission failed: Invalid qos", file=sys.stderr)
        return 1
    write(job)
    if "SLURM_STUB_HOLD" not in os.environ:
        subprocess.Popen(
            [sys.executable, __file__, "daemon", str(number)], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    print(number)
    return 0


def daemon(arguments: list[str]) -> int:
    """Run a job to its end or its time limit."""
    job = json.loads((HOME / f"{arguments[0]}.json").read_text())
    options = job["options"]
    told = {v: str(options[k]) for k, v in TOLD.items() if options[k] is not None}
    log = Path(options["output"].replace("%j", str(job["id"])))
    with log.open("w") as output:
        child = subprocess.Popen(
            ["/bin/sh", "-c", options["wrap"]], cwd=options["chdir"], stdout=output, stderr=output,
            stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"SLURM_JOB_ID": str(job["id"])} | told,
        )  # fmt: skip
        write(job | {"state": "RUNNING", "group": child.pid})
        limit = options["time"]
        try:
            status = child.wait(timeout=limit and 60 * limit)
            state = "COMPLETED" if status == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            status, state = child.wait(), "TIMEOUT"
    now = json.loads((HOME / f"{job['id']}.json").read_text())
    if now["state"] != "CANCELLED":
        write(now | {"state": state, "exit": status})
    return 0


def srun(arguments: list[str]) -> int:
    made = parser("srun", "-n", "--cpu-bind", "--cpus-per-task", "--gpus", "--nodes")
    made.add_argument("command", nargs=argparse.REMAINDER)
    found = made.parse_args(arguments)
    if "SLURM_JOB_ID" not in os.environ:
        made.error("outside a job")
    os.execvp(found.command[0], found.command)


def squeue(arguments: list[str]) -> int:
    made = parser("squeue", "--format", "--states", "--name")
    for flag in ("--noheader", "--me"):
        made.add_argument(flag, action="store_true")
    found = made.parse_args(arguments)
    if found.format not in ("%i|%T", "%i|%T|%j"):
        made.error(f"format {found.format}")
    for job in jobs():
        name = job["options"]["job_name"]
        if found.name in (None, name) and (found.states or job["state"] in ACTIVE):
            print(f"{job['id']}|{job['state']}" + (f"|{name}" if "%j" in found.format else ""))
    return 0


def sacct(arguments: list[str]) -> int:
    made = parser("sacct", "--clusters", "--format", "--starttime", "--endtime", "--name")
    for names in (("-j", "--jobs"), ("-u", "--user"), ("-o",)):
        made.add_argument(*names)
    for flag in ("-X", "--parsable2", "--noheader", "-n"):
        made.add_argument(flag, action="store_true")
    found = made.parse_args(arguments)
    if found.format == "JobIdRaw,State":
        for job in jobs():
            if job["options"]["job_name"] == found.name:
                print(f"{job['id']}|{job['state']}")
    elif found.format == "Reason":
        print("None" if found.jobs.endswith(".0") else "")
    return 0


def scancel(arguments: list[str]) -> int:
    made = argparse.ArgumentParser("scancel", allow_abbrev=False)
    made.add_argument("--state", choices=["PENDING"])
    made.add_argument("jobs", nargs="+", type=int)
    found = made.parse_args(arguments)
    for number in found.jobs:
        job = json.loads((HOME / f"{number}.json").read_text())
        if found.state:
            if job["state"] == found.state:
                write(job | {"state": "CANCELLED"})
            continue
        while job["state"] == "PENDING":  # until it has a process
            time.sleep(0.05)
            job = json.loads((HOME / f"{number}.json").read_text())
        if job["state"] in ACTIVE:
            write(job | {"state": "CANCELLED"})
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job["group"], signal.SIGTERM)
    return 0


def sinfo(arguments: list[str]) -> int:
    if arguments != ["-o", "%P"]:
        parser("sinfo").error(" ".join(arguments))
    print("PARTITION\nshort\nmain*")
    return 0


def scontrol(arguments: list[str]) -> int:
    if arguments != ["show", "config"]:
        parser("scontrol").error(" ".join(arguments))
    print("MaxArraySize            = 1001\nMinJobAge               = 300 sec")
    return 0


COMMANDS = {"sbatch": sbatch, "srun": srun, "squeue": squeue, "sacct": sacct, "scancel": scancel}
COMMANDS |= {"sinfo": sinfo, "scontrol": scontrol}


def install(folder: Path) -> None:
    """The commands in `folder`, for the PATH."""
    folder.mkdir()
    for name in COMMANDS:
        file = folder / name
        file.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' '{Path(__file__).resolve()}' {name} \"$@\"\n"
        )
        file.chmod(0o755)


if __name__ == "__main__":
    sys.exit((COMMANDS | {"daemon": daemon})[sys.argv[1]](sys.argv[2:]))
