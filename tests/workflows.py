"""Running the bundle's workflows in this process, on volumes of 16³."""

from __future__ import annotations

from typing import Any

from monai.bundle import ConfigWorkflow

from scripts.runtime.workflow import plain_errors

SMALL = {
    "channels": [4, 8],
    "spatial_size": 16,
    "epochs": 2,
    "groups_per_epoch": 2,
    "val_groups": 2,
    "context_size": 2,
    "val_context_size": 2,
    "learning_rate": 1e-3,
    "num_workers": 0,
    "device": "cpu",
}
"""Options of a training that takes a second or two."""


def run_workflow(config: str, **options: Any) -> ConfigWorkflow:
    """Run ``configs/CONFIG.json`` to its end; errors arrive without MONAI's wrapping."""
    kind = "train" if config.startswith("train") else "infer"
    if config == "inference":
        options.setdefault("align", "off")  # where contexts are brought to targets, tests say so
    workflow = ConfigWorkflow(f"configs/{config}.json", workflow_type=kind, **options)
    workflow.initialize()
    with plain_errors():
        workflow.run()
    workflow.finalize()
    return workflow
