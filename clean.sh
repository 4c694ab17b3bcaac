#!/usr/bin/env bash
# Removes what runs produce, and nothing else: the tracked data and files of your own stay.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
shopt -s nullglob

if command -v flock >/dev/null; then
    exec 9>>.lock
    if ! flock --nonblock 9; then
        echo "clean.sh: a run works here: $(cat .lock)" >&2
        exit 2
    fi
fi
# What killed runs have left half written.
find checkpoints datasets eval reports -name '*.mimu-partial' -type f -delete 2>/dev/null || true
rm -f checkpoints/{classifier,retrained,gcn,published}_seed_[0-9]*.pt datasets/Graphs/seed_[0-9]*.pt eval/masks/seed_[0-9]*_digit_*.pt
rm -f "eval/Metrics and Plots/metrics"/seed_[0-9]*_digit_*.json
rm -rf "eval/Metrics and Plots/plots"/seed_[0-9]*_digit_*
for folder in reports reports/{,variants/*/}top_k_[0-9]* reports/variants/*; do
    for format in png pdf svg; do
        rm -f "$folder"/{{loss,score}_{forget,retain}_set,probability_on_forget_class,summary}."$format"
        rm -f "$folder"/{audits,frontier,mask_efficacy,masks,trade_off,variants}."$format"
    done
    rm -f "$folder"/{summary.md,variants.md,run.json,run.log,benchmark.json}
done
# What torchvision and earlier versions unpack from the tracked .gz files.
for packed in datasets/MNIST/raw/*.gz; do rm -f "${packed%.gz}"; done

for folder in "eval/Metrics and Plots"/{metrics,plots} "eval/Metrics and Plots" eval/masks eval \
    reports/{,variants/*/}top_k_[0-9]* reports/variants/* reports/variants reports checkpoints datasets/Graphs; do
    if [ ! -L "$folder" ]; then rmdir "$folder" 2>/dev/null || true; fi
done
rm -f .lock
