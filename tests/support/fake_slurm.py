"""A Slurm of three small commands: what it starts are real ranks, on this machine's CPU."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.machine import ROOT

SCRIPTS = ROOT / "configs" / "slurm"
JOB = str(os.getpid())  # its rendezvous' port comes from it: other tests that run now have another
TASKS = 2

COMMANDS = {
    "sbatch": r"""#!/usr/bin/env bash
# Runs a batch script; warns its shell once, when METRICS has 3 lines; runs it again when put back.
export SLURM_JOB_ID=$JOB SLURM_JOB_NODELIST=here
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_GPUS_ON_NODE=2
bash "$@" & batch=$!
if [[ ${METRICS:-} ]]; then
    until [[ $(wc -l 2>&1 < "$METRICS") -ge 3 ]]; do
        kill -0 $batch || exit 1
        sleep 0.02
    done
    kill -USR1 $batch
fi
wait $batch || exit
if [[ -e $FAKE/requeued ]]; then bash "$@"; fi
""",
    "srun": r"""#!/usr/bin/env bash
# Starts the tasks of a step.
tasks=$SLURM_NTASKS status=0 pids=()
while [[ $1 == --* ]]; do
    if [[ $1 == --ntasks=* ]]; then tasks=${1#*=}; fi
    shift
done
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
""",
    "scontrol": r"""#!/usr/bin/env bash
if [[ $1 == requeue ]]; then echo "$2" >> "$FAKE/requeued"; else echo 127.0.0.1; fi
""",
}


def install(folder: Path) -> None:
    """Writes the commands to `bin` in a folder."""
    (folder / "bin").mkdir()
    for name, script in COMMANDS.items():
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)


def submit(
    folder: Path, script: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess:
    """`sbatch configs/slurm/SCRIPT ARGUMENTS` from the root, to its end; notes `requeued`."""
    (folder / "requeued").unlink(missing_ok=True)
    paths = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    here = {
        "PATH": os.pathsep.join(paths),
        "FAKE": str(folder),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "JOB": JOB,
    }
    command = ["sbatch", str(SCRIPTS / script), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | here | variables, capture_output=True, text=True
    )
