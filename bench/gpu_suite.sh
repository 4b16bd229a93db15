#!/usr/bin/env bash
# What a machine with a GPU should run, in order of worth, within TOTAL seconds. A step that fails does not stop
# the others; each says in one line how it went, and every line it prints gets the clock's seconds in front.
#
#   bash bench/gpu_suite.sh --dry-run                      # the plan
#   TOTAL=330 STEPS="machine run" bash bench/gpu_suite.sh  # first: a whole run, which fills the compiler's cache
#   PEER_SCRIPT=path/train_gpt.py bash bench/gpu_suite.sh  # all of it
#
# OUT: folder of the results: logs.tgz, the run's artifact, and cache.*, the compilers' cache in parts of 15 MB. Laid
# into carry/, it is taken by the next machine: compiling took 85 s of a first run on an H200, and adaptation more.
# carry/fa4.tar.xz (`python bench/fa4.py --carry carry`): FlashAttention 4, unpacked to /opt and used. carry/whl:
# wheels of what the machine lacks (brotli, python-minifier). carry/data.tar.xz: a folder `data` of real shards.
# DATA_PATH and TOKENIZER_PATH: real shards elsewhere; without any, synthetic ones are made.
# DEVICE=cpu: a rehearsal with small sizes. The run ends with exit code 3: it scores a sample only.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu_suite}
TOTAL=${TOTAL:-3600}
DEVICE=${DEVICE:-auto}
STEPS=${STEPS:-machine run step tests kernels ttt best peer variants each_kernel memory peer_again}
DRY=${1:-}
WORK=${WORK:-/tmp/gpu_suite}
DATA=${DATA_PATH:-$WORK/data}
SMALL="" FIT=""
if [ "$DEVICE" = cpu ]; then
    SMALL="VOCAB_SIZE=512 TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=4096 NUM_LAYERS=4 MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=2
        NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 PARALLEL_START_LAYER=3 EVAL_SEQ_LEN=256 VAL_BATCH_TOKENS=8192
        TTT_EVAL_SEQ_LEN=256 TTT_LORA_RANK=4 GPTQ_CALIBRATION_BATCHES=1 FLOAT16_MAX_ELEMENTS=1024 CPU_THREADS=1"
    FIT=FIT_BYTES=180000
    SMALL=${SMALL//$'\n'/ }
fi

step() {  # NAME SECONDS COMMAND...: run it in as many seconds at most, unless it is not among STEPS
    local name=$1 limit=$2 left status start=$SECONDS
    shift 2
    case " $STEPS " in *" $name "*) ;; *) return ;; esac
    if [ "$DRY" = --dry-run ]; then
        echo "$name (at most $limit s): $*" | tr -s ' \n' ' '
        echo
        return
    fi
    left=$((TOTAL - SECONDS - 15))  # what collecting may take
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "$name: no time left" | tee -a "$WORK/logs/summary.txt"
        return
    fi
    timeout -k 10 "$limit" bash -c "$*" 2>&1 | while IFS= read -r line; do printf '%s %s\n' $SECONDS "$line"; done >"$WORK/logs/$name.txt"
    status=${PIPESTATUS[0]}
    echo "$name: exit $status after $((SECONDS - start)) s" | tee -a "$WORK/logs/summary.txt"
    tar -czf "$OUT/logs.tgz" -C "$WORK" logs
}

if [ "$DRY" != --dry-run ]; then
    mkdir -p "$OUT" "$WORK/logs"
    export TORCHINDUCTOR_CACHE_DIR=$WORK/cache/inductor TRITON_CACHE_DIR=$WORK/cache/triton
    export PYTHONUNBUFFERED=1 CONSOLE=log PYTHONPATH=${PYTHONPATH:-}
    cat carry/cache.a? 2>/dev/null | tar -xzf - -C "$WORK" 2>/dev/null
    if compgen -G "carry/whl/*.whl" >/dev/null; then
        $PYTHON -m pip install -q --no-index --no-deps --target "$WORK/site" --upgrade carry/whl/*.whl
        PYTHONPATH=$WORK/site:$PYTHONPATH
    fi
    if [ -e carry/fa4.tar.xz ]; then
        [ -e /opt/fa4 ] || $PYTHON -m tarfile -e carry/fa4.tar.xz /opt  # there may be no xz
        PYTHONPATH=$($PYTHON bench/fa4.py --path /opt/fa4):$PYTHONPATH
    fi
    [ -e carry/data.tar.xz ] && [ -z "${DATA_PATH:-}" ] && $PYTHON -m tarfile -e carry/data.tar.xz "$WORK"
    if [ -z "${DATA_PATH:-}" ] && [ ! -e "$DATA/fineweb_val_000000.bin" ]; then
        SIZES="--tokens 20000000"
        [ "$DEVICE" = cpu ] && SIZES="--tokens 200000 --val-tokens 9000 --vocab 512"
        $PYTHON bench/synthetic.py --out "$DATA" $SIZES || exit 1
    fi
fi
MODEL=$(find "$DATA" -name '*.model' 2>/dev/null | head -n 1)
SETTINGS="DATA_PATH=$DATA TOKENIZER_PATH=${TOKENIZER_PATH:-${MODEL:-$DATA/tokenizer.model}} DEVICE=$DEVICE $SMALL"
[ -e "$DATA/manifest.json" ] || SETTINGS="$SETTINGS ALLOW_UNVERIFIED_DATA=1"  # synthetic shards have none
SHORT="MAX_WALLCLOCK_SECONDS=0 ENABLE_LOOPING_AT=0.5 TRAIN_LOG_EVERY=5 WARMUP_STEPS=3 COMPRESSOR=ans"

step machine 20 "nvidia-smi; nvidia-smi topo -m; $PYTHON -m pip list 2>/dev/null | grep -iE '^(torch|triton|flash|numpy|nvidia-cu)'; lscpu | head -20"
step run 600 "env $SETTINGS $SHORT ITERATIONS=40 VAL_DOC_FRACTION=0.05 PHASED_TTT_PREFIX_DOCS=16 ARTIFACT_DIR=$WORK/run $PYTHON train_gpt.py"
step step 300 "$PYTHON bench/train_step.py --device $DEVICE --json --kernels 30"
step tests 300 "$PYTHON -m pytest -q -n 4 --show-capture=no --durations 10 tests/systems/test_kernels.py tests/core/test_attention.py tests/core/test_compile.py"
step kernels 300 "$PYTHON bench/kernels.py --device $DEVICE --json"
step ttt 400 "$PYTHON bench/ttt.py --parts compiled --json"
step best 500 "env $SETTINGS $SHORT $FIT PRESET=best ITERATIONS=20 VAL_DOC_FRACTION=0.03 PHASED_TTT_PREFIX_DOCS=16 ARTIFACT_DIR=$WORK/best $PYTHON train_gpt.py"
peer() {  # NAME: both scripts once; the second round comes last
    if [ -n "${PEER_SCRIPT:-}" ] || [ "$DRY" = --dry-run ]; then
        step "$1" 600 "env $SETTINGS $PYTHON bench/peer.py --script ${PEER_SCRIPT:-\$PEER_SCRIPT} --steps ${PEER_STEPS:-30}" \
            "--rounds 1 --limit 290 --out $WORK/$1"
    fi
}
peer peer
step variants 600 "for variant in TRITON_KERNELS=0 ATTENTION_BACKEND=torch_varlen ATTENTION_BACKEND=fa4 ATTENTION_BACKEND=flex TORCHINDUCTOR_MIX_ORDER_REDUCTION=1 COMPILE_BACKEND=off TRITON_KERNELS=1; do
        echo \"== \$variant\"; env \$variant $PYTHON bench/train_step.py --device $DEVICE; done"
step each_kernel 600 "for left in mlp,qkv_norm_rope,xsa_gate loss,qkv_norm_rope,xsa_gate loss,mlp,xsa_gate loss,mlp,qkv_norm_rope; do
        echo \"== \$left\"; env TRITON_KERNELS=\$left $PYTHON bench/train_step.py --device $DEVICE; done"
step memory 300 "env $SETTINGS $SHORT ITERATIONS=10 PREQUANT_ONLY=1 ARTIFACT_DIR=$WORK/memory \
        PYTORCH_CUDA_ALLOC_CONF=per_process_memory_fraction:\${FRACTION:-0.3} $PYTHON train_gpt.py"
peer peer_again

if [ "$DRY" != --dry-run ]; then
    cp "$WORK/run/final_model.int6.ptz" "$OUT" 2>/dev/null
    # Of Triton's files the programs alone: what they were made from is six times as much.
    [ -d "$WORK/cache" ] && tar -C "$WORK" --exclude='*.tt*ir' --exclude='*.llir' --exclude='*.source' --exclude='*.ptx' -cf - cache \
        | gzip -1 | split -b 15M - "$OUT/cache."
    tar -czf "$OUT/logs.tgz" -C "$WORK" logs
fi
