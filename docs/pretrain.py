"""Trains one masking GCN on the classifiers of all variants and seeds of a config, with the settings of the first.

`uv run docs/pretrain.py configs/pretrain.yaml`; the GCN takes the place of the tracked one for the layers that the
first variant masks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from mimu.configs import Config, load_variants
from mimu.main import Files, Stages, prepare, trainings_of
from mimu.masking.rankings import pretrained_for
from mimu.runs.files import locked, save
from mimu.runs.work import Work
from mimu.trainer import GCNTrainer

ROOT = Path(__file__).resolve().parents[1]


def pretrain(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    prepare(configs, one_process="docs/pretrain.py")
    config = next(iter(configs.values()))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with locked(root):
        work = Work(root)
        stages, graphs = Stages(work, Files(root)), []
        for training in trainings_of(configs):
            data = stages.data(training.config)
            graphs.append(stages.graphs(training, stages.classifier(training, data), data))
        with work.stage(f"masking GCN, {len(graphs)} classifiers"):
            gcn = GCNTrainer(config.gcn, graphs, config.sweep.top_k[0], config.seed).train()
        path = root / pretrained_for(config.masked_shapes).relative_to(ROOT)
        about = {"config": asdict(config), "seed": config.seed, "top_k": config.sweep.top_k[0]}
        save(path, about | {"state_dict": gcn.state_dict()})
        work.log(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_args()
    pretrain(load_variants(given.config, given.overrides))
