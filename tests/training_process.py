"""One of several training processes, started by torchrun from ``test_multi_process.py``.

Runs the second stage through its configuration and notes, as JSON, what every step looked like from this rank:
``python -m torch.distributed.run ... tests/training_process.py REPORT_DIR OPTIONS_AS_JSON``. The rank that the
environment variable ``STOPPED_RANK`` names gets SIGTERM in the third step.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.engines.utils import IterationEvents


def main() -> None:
    """Train, and write the report."""
    report_dir, options = sys.argv[1], json.loads(sys.argv[2])
    workflow = ConfigWorkflow(
        ["configs/train_stage2.json", "configs/multi_gpu_train.json"], workflow_type="train", **options
    )
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    evaluator = workflow.parser.get_parsed_content("validate#evaluator")
    report = {"weights_differ": 0, "steps": 0, "cases": [], "losses": [], "metrics": []}

    def compare_weights(engine):
        mine = torch.cat([p.detach().flatten() for p in engine.network.parameters()])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        report["steps"] += 1
        report["weights_differ"] += any(not torch.equal(mine, other) for other in everyone)

    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, compare_weights)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: (
            report["cases"].append(engine.state.batch["cases"][0]),
            report["losses"].append(engine.state.output[0]["loss"].item()),
        ),
    )
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda engine: report["metrics"].append({**engine.state.metrics, **evaluator.state.metrics}),
    )
    if os.environ.get("STOPPED_RANK") == os.environ["RANK"]:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda engine: signal.raise_signal(signal.SIGTERM))
    workflow.run()
    Path(report_dir, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(report))
    workflow.finalize()


if __name__ == "__main__":
    main()
