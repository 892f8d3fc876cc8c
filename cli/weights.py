"""What a path to weights means: a run, one of its checkpoints, or a Hugging Face folder.

runs/a                              its newest checkpoint
runs/a/checkpoints/step-000100      that one
hf-out                              any folder with config.json and safetensors
"""

from pathlib import Path

from lowmem.errors import CheckpointError
from lowmem.train.run import Run


def run_of(path: Path) -> Run | None:
    """The run that `path` is or belongs to, None for any other folder."""
    try:
        return Run.open(path)
    except CheckpointError:
        return None
