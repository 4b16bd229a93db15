#!/usr/bin/env bash
# Everything a machine with a GPU should run, in order of worth. Each step ends within LIMIT seconds, says in one
# line how it went and leaves what it printed in $OUT; one that fails does not stop the others.
#
#   bash bench/gpu_suite.sh --dry-run                      # the plan
#   PEER_SCRIPT=path/train_gpt.py bash bench/gpu_suite.sh  # all of it
#   STEPS="step kernels" bash bench/gpu_suite.sh           # some of it
#
# carry/fa4.tar.xz (`python bench/fa4.py --carry carry`): FlashAttention 4, unpacked to /opt and used.
# OUT: folder of the results. DATA_PATH and TOKENIZER_PATH: real shards; without them synthetic ones are made.
# DEVICE=cpu: a rehearsal with small sizes. The run ends with exit code 3: it scores a sample only.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu_suite}
LIMIT=${LIMIT:-480}
DEVICE=${DEVICE:-auto}
STEPS=${STEPS:-machine tests step peer kernels ttt variants each_kernel run memory peer_again}
DRY=${1:-}
DATA=${DATA_PATH:-$OUT/work/data}
SMALL=""
if [ "$DEVICE" = cpu ]; then
    SMALL="VOCAB_SIZE=512 TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=4096 NUM_LAYERS=4 MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=2
        NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 PARALLEL_START_LAYER=3 EVAL_SEQ_LEN=256 VAL_BATCH_TOKENS=8192
        TTT_EVAL_SEQ_LEN=256 TTT_LORA_RANK=4 GPTQ_CALIBRATION_BATCHES=1 FLOAT16_MAX_ELEMENTS=1024 CPU_THREADS=1"
    SMALL=${SMALL//$'\n'/ }
fi
SETTINGS="DATA_PATH=$DATA TOKENIZER_PATH=${TOKENIZER_PATH:-$DATA/tokenizer.model} DEVICE=$DEVICE $SMALL"
[ -z "${DATA_PATH:-}" ] && SETTINGS="$SETTINGS ALLOW_UNVERIFIED_DATA=1"  # synthetic shards have no manifest
$PYTHON -c 'import brotli' 2>/dev/null || SETTINGS="$SETTINGS COMPRESSOR=lzma"  # the record's, where it is installed
SHORT="MAX_WALLCLOCK_SECONDS=0 ENABLE_LOOPING_AT=0.5 TRAIN_LOG_EVERY=5 WARMUP_STEPS=3"

step() {  # NAME COMMAND...: run it, unless it is not among STEPS
    local name=$1 status start=$SECONDS
    shift
    case " $STEPS " in *" $name "*) ;; *) return ;; esac
    if [ "$DRY" = --dry-run ]; then
        echo "$name (at most $LIMIT s): $*" | tr -s ' \n' ' '
        echo
        return
    fi
    timeout -k 10 "$LIMIT" bash -c "$*" >"$OUT/$name.txt" 2>&1
    status=$?
    echo "$name: exit $status after $((SECONDS - start)) s, $OUT/$name.txt" | tee -a "$OUT/summary.txt"
}

if [ "$DRY" != --dry-run ]; then
    mkdir -p "$OUT/work"
    if [ -e carry/fa4.tar.xz ]; then
        [ -e /opt/fa4 ] || $PYTHON -m tarfile -e carry/fa4.tar.xz /opt  # there may be no xz
        PYTHONPATH=$($PYTHON bench/fa4.py --path /opt/fa4)${PYTHONPATH:+:$PYTHONPATH}
        export PYTHONPATH
    fi
    if [ -z "${DATA_PATH:-}" ] && [ ! -e "$DATA/tokenizer.model" ]; then
        SIZES="--tokens 20000000"
        [ "$DEVICE" = cpu ] && SIZES="--tokens 200000 --val-tokens 9000 --vocab 512"
        $PYTHON bench/synthetic.py --out "$DATA" $SIZES || exit 1
    fi
fi

step machine "nvidia-smi; nvidia-smi topo -m; $PYTHON -m pip list 2>/dev/null | grep -iE '^(torch|triton|flash|numpy|nvidia-cu)'; lscpu | head -20"
step tests "$PYTHON -m pytest -q --durations 10 tests/systems/test_kernels.py tests/core/test_attention.py tests/core/test_compile.py"
step step "$PYTHON bench/train_step.py --device $DEVICE --json"
peer() {  # NAME: both scripts once; the second round comes last
    if [ -n "${PEER_SCRIPT:-}" ] || [ "$DRY" = --dry-run ]; then
        step "$1" "env $SETTINGS $PYTHON bench/peer.py --script ${PEER_SCRIPT:-\$PEER_SCRIPT} --steps ${PEER_STEPS:-30}" \
            "--rounds 1 --limit $((LIMIT / 2 - 10)) --out $OUT/work/$1"
    fi
}
peer peer
step kernels "$PYTHON bench/kernels.py --device $DEVICE --json"
step ttt "$PYTHON bench/ttt.py --parts compiled --json"
step variants "for variant in TRITON_KERNELS=0 ATTENTION_BACKEND=torch_varlen ATTENTION_BACKEND=fa4 ATTENTION_BACKEND=flex COMPILE_BACKEND=off TRITON_KERNELS=1; do
        echo \"== \$variant\"; env \$variant $PYTHON bench/train_step.py --device $DEVICE; done"
step each_kernel "for left in mlp,qkv_norm_rope,xsa_gate loss,qkv_norm_rope,xsa_gate loss,mlp,xsa_gate loss,mlp,qkv_norm_rope; do
        echo \"== \$left\"; env TRITON_KERNELS=\$left $PYTHON bench/train_step.py --device $DEVICE; done"
step run "env $SETTINGS $SHORT ITERATIONS=40 VAL_DOC_FRACTION=0.02 PHASED_TTT_PREFIX_DOCS=8 ARTIFACT_DIR=$OUT/work/run $PYTHON train_gpt.py"
step memory "env $SETTINGS $SHORT ITERATIONS=10 PREQUANT_ONLY=1 ARTIFACT_DIR=$OUT/work/memory \
        PYTORCH_CUDA_ALLOC_CONF=per_process_memory_fraction:\${FRACTION:-0.3} $PYTHON train_gpt.py"
peer peer_again
