#!/usr/bin/env bash
# Train every network of the paper's Table 2 on one data set, and make a page of the results.
#
#   ./reproduce.sh monuseg                                 both networks, three skips, seeds 0 1 2
#   ./reproduce.sh monuseg --skips conv fusion --seeds 0   some of them
#   ./reproduce.sh monuseg --models unet --width 16        other flags go to train.py
#   ./reproduce.sh monuseg --jobs 2                        2 at a time (default: one per GPU, or 1)
#
# Start it again after an interruption: what is finished is skipped, the rest resumed, and a run
# that fails does not stop the others. The output of each run is added to
# runs/DATA-MODEL-SKIP-SEED.log, whatever its other flags, and runs/DATA.md becomes a page of all
# runs in runs/DATA-*, both below the folder in which the script is called. With several jobs, each
# takes one CPU thread, or OMP_NUM_THREADS.

set -uo pipefail
here=$(dirname "$0")
python=${PYTHON:-$(command -v python || command -v python3)}
case ${1:---help} in -*) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;; esac
data=$1 models='unet swin_unet' skips='standard conv fusion' seeds='0 1 2' flags=() list=''
there=$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | paste -sd , -)
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$there}"
jobs=$((${#gpus[@]} > 1 ? ${#gpus[@]} : 1))
shift
for word; do
  case $word:$list in
    -h:* | --help:*) exec bash "$0" --help ;;
    --model:* | --skip:* | --seed:* | --data:* | --out:*)
      echo "reproduce.sh: $word is set for each run: give --models, --skips or --seeds" >&2
      exit 2 ;;
    --models:* | --skips:* | --seeds:* | --jobs:*) list=${word#--}; declare "$list=" ;;
    --*) list=''; flags+=("$word") ;;
    *:) flags+=("$word") ;;
    *) declare "$list=${!list} $word" ;;
  esac
done
[[ $jobs =~ ^\ *[1-9][0-9]*$ && ${models// } && ${skips// } && ${seeds// } ]] || {
  echo "reproduce.sh: give --jobs a number above 0, and each other list at least one value" >&2
  exit 2
}

runs=()
for seed in $seeds; do for model in $models; do for skip in $skips; do
  runs+=("--model $model --skip $skip --seed $seed")
done; done; done

worker() {  # NUMBER: train runs NUMBER, NUMBER + jobs, ..., one after the other
  local i log
  [ ${#gpus[@]} -lt 2 ] || export CUDA_VISIBLE_DEVICES=${gpus[$1 % ${#gpus[@]}]}
  [ "$jobs" -lt 2 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  for ((i = $1; i < ${#runs[@]}; i += jobs)); do
    log=runs/$data$(sed 's/ *--[a-z]* /-/g' <<<" ${runs[i]}").log
    echo "$data ${runs[i]}: see $log"
    # shellcheck disable=SC2086
    "$python" "$here/train.py" --data "$data" ${runs[i]} --resume ${flags[@]+"${flags[@]}"} \
      >>"$log" 2>&1 || echo "$data ${runs[i]}: $(tail -n 1 "$log")" >>"$failed"
  done
}

mkdir -p runs && failed=$(mktemp) || exit
set -m  # each worker is a process group of its own, which ends as a whole when this script does
trap 'for group in $(jobs -pr); do kill -- -"$group"; done; rm -f "$failed"' EXIT
for ((number = 0; number < jobs; number++)); do worker "$number" & done
wait
"$python" "$here/report.py" runs/"$data"-*/scores.json --page "runs/$data.md"
reported=$?
sed 's/^/failed: /' "$failed" >&2
[ ! -s "$failed" ] && exit "$reported"
