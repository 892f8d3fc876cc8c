"""Which published perplexities may stand beside a run: those of its model under its protocol.

The papers pad and truncate, and count padding as tokens; a run that packs its text (lowmem's own
protocol) has another perplexity for the same model, so nothing is put beside it.
"""

import math

from lowmem.analysis.history import History
from lowmem.config.load import flatten
from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config
from lowmem.planner.quality import Evidence, evidence

OWN = "lowmem"  # the protocol of runs that name none
_PUBLISHED_UNDER = {"galore": "c4"}  # protocol of a run -> protocol in configs/quality.toml
_SAME_SIZE = 0.01  # of the logarithm of the number of weights


def protocol_of(config: Config) -> str:
    """How text becomes sequences and loss becomes perplexity."""
    settings = dict(flatten(config.model_dump()))
    told = settings.get("protocol") or settings.get("data.protocol")
    return str(told) if told else OWN


def published_beside(run: History) -> list[Evidence]:
    """Published results for the run's model and protocol, at whatever number of updates.

    Left out is what differs in ways that no row of a table tells: variants, and what the file
    sets aside.
    """
    under = _PUBLISHED_UNDER.get(protocol_of(run.config))
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
    if protocol_of(run.config) not in _PUBLISHED_UNDER:
        return (
            f"nothing published stands beside it: the protocol {protocol_of(run.config)} is not "
            "that of the papers, who truncate and pad each document"
        )
    return "" if published_beside(run) else "nothing is published of a model of this size"
