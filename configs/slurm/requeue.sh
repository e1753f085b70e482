# shellcheck shell=bash
# Sourced by the training scripts. Slurm warns the batch shell before the time is up (--signal=B:USR1@300): the run is
# then stopped by a file STOP, which saves a checkpoint, and the job goes back into the queue. The engine continues from
# `latest` by itself. Submit from the repository's root.

PATH="$PWD/.venv/bin:$PATH"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node

mapfile -t run < <(python - "$@" <<'PYTHON'
import sys
from mtllm_engine.config import load

try:
    config = load(sys.argv[1], sys.argv[2:])
except ValueError as error:
    sys.exit(str(error))
print(config.run.dir, config.optim.steps, sep="\n")
PYTHON
)
run_dir=${run[0]:?cannot be read from the config} steps=${run[1]}

stop() {
    warned=yes
    mkdir -p "$run_dir"
    touch "$run_dir/STOP"
}

finished() {
    local latest="$run_dir/checkpoints/latest" # a link, or a file with a name on a share without links
    [[ $(readlink "$latest" || cat "$latest") == step-$(printf %08d "$steps") ]]
}

# until_warned COMMAND ...: runs a training command; puts the job back into the queue when it was stopped before its end.
until_warned() {
    rm -f "$run_dir/STOP" # of a job that ended before it could read it
    warned=""
    trap stop USR1
    "$@" &
    local training=$! status=0
    wait "$training" || status=$?
    while kill -0 "$training" 2>/dev/null; do # a signal ended the wait, not the training
        status=0
        wait "$training" || status=$?
    done
    if [[ $warned && $status == 0 ]] && ! finished; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
