"""The Hugging Face hub: single files, the text of C4, and errors that help without a network."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowmem.errors import DataError, HardwareError

C4_MISSING = "C4 cannot be read from the Hugging Face hub"
C4_FIX = (
    "with a local copy of allenai/c4 (its en/ folder): lowmem data prepare COPY --out FOLDER, "
    "then --data FOLDER; without one: --data sample"
)


def is_offline() -> bool:
    """Whether LOWMEM_OFFLINE or HF_HUB_OFFLINE forbids the network."""
    no = ("", "0", "false", "no")
    names = ("LOWMEM_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").lower() not in no for name in names)


def hub_file(repository: str, file: str, what: str, fix: str) -> Path:
    """One file of a model on the hub, from the local hub cache if it is there.

    what, fix: first and last part of the DataError that tells that it cannot be had.
    """
    import huggingface_hub  # comes with `tokenizers`; slow to import

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=True))
    except Exception:  # not cached (or no valid name, which the download below reports)
        require_network(what, fix)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # the hub raises its own, httpx', requests' and the system's errors
        raise DataError(what, f"{file} from the hub: {_first_line(error)}", fix) from error


def require_network(what: str, fix: str) -> None:
    """Raise DataError(what, the reason, fix) at once where the hub's own retries take minutes."""
    if is_offline():
        raise DataError(what, "LOWMEM_OFFLINE or HF_HUB_OFFLINE is set: the hub is not asked", fix)
    proxies = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    if any(os.environ.get(name) for name in proxies):
        return  # names are then resolved elsewhere
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((address.hostname or "", address.port or 443), 5.0).close()
    except OSError as error:
        why = f"no connection to {address.hostname}: {error.strerror or error}"
        raise DataError(what, why, fix) from error


class C4Stream:
    """The documents of one split of `allenai/c4` (config en), in the hub's order.

    texts: an iterator over them. position(): where it stands, as plain JSON.
    """

    def __init__(self, split: str, position: dict[str, Any] | None) -> None:
        """split: "train" or "validation". position: of an earlier stream; None: the beginning."""
        try:
            import datasets
        except ImportError as error:
            fix = "pip install 'lowmem[hub]'"
            raise HardwareError("--data c4 needs the package `datasets`", "", fix) from error
        require_network(C4_MISSING, C4_FIX)
        self.name = f"allenai/c4 en {split}"
        try:
            self._rows = datasets.load_dataset("allenai/c4", "en", split=split, streaming=True)
            if position is not None:
                self._rows.load_state_dict(position)
        except Exception as error:  # as in hub_file
            raise _broken(error) from error
        self.texts = self._read()

    def position(self) -> dict[str, Any]:
        """What `__init__` takes to continue after the last document that was taken."""
        return self._rows.state_dict()

    def _read(self) -> Iterator[Any]:
        rows = iter(self._rows)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # as in hub_file
                raise _broken(error) from error
            if row is None:
                return
            yield row["text"]


def _broken(error: Exception) -> DataError:
    why = f"{_first_line(error)}; finished parts are kept, the same command continues"
    return DataError(C4_MISSING, why, C4_FIX)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
