#!/usr/bin/env bash
# Removes what runs write, and nothing else. Files of your own, the tracked data, and what is behind links stay.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"

if command -v flock >/dev/null; then
    exec 9>>.lock
    if ! flock --nonblock 9; then
        echo "clean.sh: a run works here: $(cat .lock)" >&2
        exit 2
    fi
fi

# find enters no symbolic link, and -type f matches none.
search() { find checkpoints datasets eval reports "$@" 2>/dev/null || true; }
experiments='eval/Metrics and Plots'

search -type f -name '*.mimu-partial' -delete # half written by runs that were killed
search -maxdepth 1 -type f \( -path 'checkpoints/classifier_seed_[0-9]*.pt' -o -path 'checkpoints/gcn_seed_[0-9]*.pt' \
    -o -path 'checkpoints/retrained_seed_[0-9]*.pt' -o -path reports/run.json -o -path reports/run.log -o -path reports/benchmark.json \) -delete
search -maxdepth 2 -type f \( -path 'datasets/Graphs/seed_[0-9]*.pt' -o -path 'eval/masks/seed_[0-9]*_digit_*.pt' \) -delete
search -maxdepth 3 -type f -path "$experiments/metrics/seed_[0-9]*_digit_*.json" -delete

search -maxdepth 1 -type f \( -path reports/loss_forget_set.png -o -path reports/loss_retain_set.png \
    -o -path reports/score_forget_set.png -o -path reports/score_retain_set.png -o -path reports/probability_on_forget_class.png \
    -o -path reports/summary.png -o -path reports/audits.png -o -path reports/trade_off.png -o -path reports/variants.png \
    -o -path reports/summary.md -o -path reports/variants.md \) -delete
search -mindepth 3 -type f \( -path 'reports/variants/*/summary.md' -o -path 'reports/variants/*/audits.png' \
    -o -path "$experiments/plots/seed_*/unlearning.png" -o -path "$experiments/plots/seed_*/performance_degradation.png" \
    -o -path "$experiments/plots/seed_*/class_probabilities.png" -o -path "$experiments/plots/seed_*/weights.png" \) -delete

# What torchvision and earlier versions unpack from the tracked .gz files.
search -type f -path 'datasets/MNIST/raw/*.gz' -print0 | while IFS= read -r -d '' packed; do rm -f -- "${packed%.gz}"; done

search -depth -type d -empty \( -path checkpoints -o -path datasets/Graphs -o -path eval -o -path eval/masks \
    -o -path "$experiments" -o -path "$experiments/metrics" -o -path "$experiments/plots" -o -path "$experiments/plots/seed_*" \
    -o -path reports -o -path reports/variants -o -path 'reports/variants/*' \) -delete
rm -f .lock
