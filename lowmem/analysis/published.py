"""Which published perplexities may stand beside a run: those of its model under its protocol.

The papers pad and truncate, and count padding as tokens; a run that packs its text (lowmem's own
protocol) has another perplexity for the same model, so nothing is put beside it.
"""

import math

from lowmem.analysis.history import History
from lowmem.config.presets import resolve_model
from lowmem.planner.quality import Evidence, evidence

_PUBLISHED_UNDER = {"galore": "c4"}  # protocol of a run -> protocol in configs/quality.toml
_SAME_SIZE = 0.01  # of the logarithm of the number of weights


def published_beside(run: History) -> list[Evidence]:
    """Published results for the run's model and protocol, at whatever number of updates.

    Left out is what differs in ways that no row of a table tells: variants, and what the file
    sets aside.
    """
    under = _PUBLISHED_UNDER.get(run.config.data.protocol)
    model = resolve_model(run.config.model, run.folder)
    return [
        row
        for row in evidence()
        if row.protocol == under
        and row.variant is None
        and row.aside is None
        and abs(math.log(model.parameters / row.parameters)) < _SAME_SIZE
    ]


def why_none(run: History) -> str:
    """Why nothing published stands beside the run; empty where something does."""
    if run.config.data.protocol not in _PUBLISHED_UNDER:
        return (
            f"nothing published stands beside it: the protocol {run.config.data.protocol} is not "
            "that of the papers, who truncate and pad each document"
        )
    return "" if published_beside(run) else "nothing is published of a model of this size"
