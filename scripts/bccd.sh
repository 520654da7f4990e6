#!/usr/bin/env bash
# The first run of docs/results/experiments.md: YOLOv8s teaches YOLOv8n on blood cells, against the student alone and
# Ultralytics' own distillation, all with the same budget and seed. Takes about two hours on two CPU cores.
#
#   scripts/bccd.sh DATA WEIGHTS [arm ...]
#
#   DATA      folder of the data set (python scripts/get_data.py bccd DATA)
#   WEIGHTS   folder with yolov8s.pt and yolov8n.pt
#   arm       any of: teacher baseline distill_model ultralytics objectness (default: all)
#
# The environment can set SEED=1 STUDENTS="scratch coco" OUT=runs/bccd JOBS=2 EPOCHS=30 IMGSZ=320 AMP=bf16.
# A finished run is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/_environment.sh
[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
data=$1 weights=$(realpath "$2")
shift 2
arms=("$@")
[ ${#arms[@]} -gt 0 ] || arms=(teacher baseline distill_model ultralytics objectness)
seed=${SEED:-0} students=${STUDENTS:-scratch coco} jobs=${JOBS:-2}
out=$(realpath -m "${OUT:-runs/bccd}")
teacher=$out/teacher/weights/best.pt
mkdir -p "$out"
# Ultralytics writes label caches beside the labels, so the set is copied
[ -e "$out/data/data.yaml" ] || { cp -r "$(realpath "$data")" "$out/data" && chmod -R u+w "$out/data"; }

common=(data="$out/data/data.yaml" epochs="${EPOCHS:-30}" imgsz="${IMGSZ:-320}" batch=16 nbs=16 seed="$seed" amp="${AMP:-bf16}" cache=ram
    plots=False exist_ok=True project="$out")

run() { # name, command...
    local name=$1
    shift
    if [ -e "$out/$name/done" ]; then
        echo "$name: finished before"
        return
    fi
    echo "$name: $*"
    # one thread each, since $jobs run side by side
    OMP_NUM_THREADS=1 "$python" "$@" name="$name" "${common[@]}" >"$out/$name.log" 2>&1 || { echo "$name failed, see $out/$name.log"; return 1; }
    touch "$out/$name/done"
}

limit() { while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done; }

for arm in "${arms[@]}"; do
    [ "$arm" = teacher ] && run teacher -m yolo_kd train kd=none student="$weights/yolov8s.pt"
done
for student in $students; do
    start=$([ "$student" = scratch ] && echo yolov8n.yaml || echo "$weights/yolov8n.pt")
    for arm in "${arms[@]}"; do
        name=${student}_$arm
        [ "$seed" = 0 ] || name=${name}_seed$seed
        limit
        case $arm in
            teacher) ;;
            baseline) run "$name" -m yolo_kd train kd=none student="$start" & ;;
            distill_model) run "$name" scripts/train_upstream.py model="$start" distill_model="$teacher" & ;;
            *) run "$name" -m yolo_kd train kd="$arm" teacher="$teacher" student="$start" & ;;
        esac
    done
done
wait
"$python" scripts/evaluate.py --data "$out/data/data.yaml" --imgsz "${IMGSZ:-320}" --out "$out/results.json" "$out"/*/weights/best.pt
