"""What may leave a machine: text without its paths, names of host and user, and secrets.

What is chosen to be said passes here once more, because values of settings hold paths.
"""

import os
import re
import socket
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"(hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_)[A-Za-z0-9_-]{8,}|[0-9a-f]{40}")
_PATH = re.compile(r"(?:[A-Za-z]:)?[\w.~@+-]*(?:[/\\][\w.@+ -]+)+")


def without_private(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """`value` with names of this host and its user, tokens and the folders of paths taken out."""
    if isinstance(value, dict):
        return {key: without_private(item, environ) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_private(item, environ) for item in value]
    return _cleaned(value, environ) if isinstance(value, str) else value


def _cleaned(text: str, environ: Mapping[str, str]) -> str:
    text = _SECRET.sub("[secret]", text)
    text = _PATH.sub(lambda found: ".../" + re.split(r"[/\\]", found[0])[-1], text)
    private = {socket.gethostname(): "[host]"}
    private |= {
        environ[name]: "[user]" for name in ("USER", "LOGNAME", "USERNAME") if name in environ
    }
    for word, instead in private.items():
        if len(word) > 2:
            text = re.sub(rf"\b{re.escape(word)}\b", instead, text)
    return text
