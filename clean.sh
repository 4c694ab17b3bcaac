#!/usr/bin/env bash
# Removes what runs produce, and nothing else: the tracked data, the pretrained GCN and files of your own stay.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
shopt -s nullglob

rm -f checkpoints/{classifier,gcn}_seed_*.pt datasets/Graphs/seed_*.pt eval/masks/seed_*.pt
rm -f "eval/Metrics and Plots/metrics"/seed_*.json reports/*.png reports/{summary.md,run.json,benchmark.json}
rm -rf "eval/Metrics and Plots/plots"/seed_* reports/top_k_*
# torchvision unpacks these from the tracked .gz files.
for packed in datasets/MNIST/raw/*.gz; do rm -f "${packed%.gz}"; done

for folder in "eval/Metrics and Plots/metrics" "eval/Metrics and Plots/plots" "eval/Metrics and Plots" eval/masks eval \
    reports checkpoints datasets/Graphs; do
    [ -d "$folder" ] && rmdir --ignore-fail-on-non-empty "$folder"
done
exit 0
