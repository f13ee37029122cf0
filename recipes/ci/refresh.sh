#!/usr/bin/env bash
# A monthly refresh, unattended: prepare this month's data, distil, score against the student in use, gate, export.
#
#   DATASET=ptbxl SOURCE=/data/ptbxl TEACHER=owner/teacher STUDENT=owner/student MIN_AUC=0.85 recipes/ci/refresh.sh
#
# Exit code 0: the new student is in use (REFRESH/current points to it). 3: a gate is not met; the report says which
# and why, and the old student stays in use. 2: bad input. Anything else: a stage broke. Run it again after a crash:
# stages that are finished are not repeated.
set -euo pipefail

: "${DATASET:?name of the dataset (evlecg prepare --list)}"
: "${TEACHER:?teacher: path, hub id or builtin:NAME}"
: "${STUDENT:?student: path, hub id or builtin:NAME}"
: "${MIN_AUC:?least macro AUROC of a student in use}"
SOURCE="${SOURCE:-}"                   # the download as published; empty for synthetic
MAX_DROP="${MAX_DROP:-0.01}"           # of macro AUROC against the student in use, on the same records
MONTH="${MONTH:-$(date +%Y-%m)}"
REFRESH="${REFRESH:-refresh}"          # holds a folder a month, and `current`
read -r -a EVLECG <<<"${EVLECG:-evlecg}"
read -r -a PREPARE_ARGS <<<"${PREPARE_ARGS:-}"  # more options of each stage, separated by spaces
read -r -a DISTILL_ARGS <<<"${DISTILL_ARGS:-}"
read -r -a GATE_ARGS <<<"${GATE_ARGS:-}"        # for example: --min-label-auc AFIB=0.9

here="$REFRESH/$MONTH"
mkdir -p "$here"

"${EVLECG[@]}" prepare --dataset "$DATASET" ${SOURCE:+--source "$SOURCE"} --out "$here/data" \
  ${PREPARE_ARGS[@]+"${PREPARE_ARGS[@]}"}

if [ ! -e "$here/run/run.json" ]; then  # run.json is written last
  resume=()
  [ -d "$here/run" ] && resume=(--resume)
  "${EVLECG[@]}" distill --teacher "$TEACHER" --student "$STUDENT" --data "$here/data" --out "$here/run" \
    ${resume[@]+"${resume[@]}"} ${DISTILL_ARGS[@]+"${DISTILL_ARGS[@]}"} \
    --set finish.eval_split=none --set finish.export=false
fi

gates=(--min-auc "$MIN_AUC")
if [ -e "$REFRESH/current/student" ] && [ "$(readlink "$REFRESH/current")" != "$MONTH" ]; then
  # the student in use, on this month's records: what it scored on last month's says nothing of these
  "${EVLECG[@]}" eval --dataset "$here/data" --model "$REFRESH/current/student" --out "$here/report-in-use" --overwrite
  gates+=(--max-drop-vs "$here/report-in-use" --max-drop "$MAX_DROP")
fi
"${EVLECG[@]}" eval --dataset "$here/data" --model "$here/run" --out "$here/report" --overwrite --cost \
  "${gates[@]}" ${GATE_ARGS[@]+"${GATE_ARGS[@]}"} --junit "$here/gates.xml"  # exit code 3 ends the job here

"${EVLECG[@]}" export "$here/run" --out "$here/student" --overwrite
ln -sfn "$MONTH" "$REFRESH/.current.new"
mv -Tf "$REFRESH/.current.new" "$REFRESH/current"  # one rename: a reader sees the old student or the new one
