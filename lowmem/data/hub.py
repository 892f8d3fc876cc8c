"""The Hugging Face hub: single files, the text of C4, and errors that help without a network."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowmem.data.shuffle import files_shuffled
from lowmem.errors import DataError, HardwareError

C4 = "allenai/c4"
C4_SHARDS = {"train": 1024, "validation": 8}
PATIENCE = (1.0, 5.0, 30.0, 120.0)  # seconds before each attempt to open a broken stream again

_SURE_EVERY = 1000  # documents between two positions from which a broken stream is read again

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


def c4_files(split: str, *, shuffled: bool) -> list[str]:
    """The files of a split of C4, in their order or in that of the papers' stream."""
    count = C4_SHARDS[split]
    names = [f"en/c4-{split}.{number:05d}-of-{count:05d}.json.gz" for number in range(count)]
    return files_shuffled(names) if shuffled else names


class C4Stream:
    """The documents of one split of `allenai/c4` (config en), in the order of its files.

    texts: an iterator over them; when the network breaks it is opened again where it broke, a few
    times (PATIENCE). position(): where it stands, as plain JSON.
    """

    def __init__(
        self,
        split: str,
        position: dict[str, Any] | None,
        *,
        shuffled: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """split: "train" or "validation". position: of an earlier stream; None: the beginning.

        shuffled: files in the order of the papers' stream.
        """
        try:
            import datasets
        except ImportError as error:
            fix = "pip install 'lowmem[hub]'"
            raise HardwareError("c4 needs the package `datasets`", "", fix) from error
        require_network(C4_MISSING, C4_FIX)
        self.name = f"allenai/c4 en {split}"
        self._split, self._files = split, c4_files(split, shuffled=shuffled)
        self._load, self._sleep = datasets.load_dataset, sleep
        try:
            self._rows = self._opened(position)
        except Exception as error:  # as in hub_file
            raise _broken(error) from error
        self.texts = self._read()

    def position(self) -> dict[str, Any]:
        """What `__init__` takes to continue after the last document that was taken."""
        return self._rows.state_dict()

    def _opened(self, position: dict[str, Any] | None) -> Any:
        files = {self._split: self._files}
        rows = self._load(C4, data_files=files, split=self._split, streaming=True)
        if position is not None:
            rows.load_state_dict(position)
        return rows

    def _read(self) -> Iterator[Any]:
        # What a broken stream says of its position need not be that of the last document taken.
        sure, since = self.position(), 0
        rows, attempts = iter(self._rows), iter(PATIENCE)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # as in hub_file
                rows = self._again(error, attempts, sure, since)
                continue
            if row is None:
                return
            since += 1
            attempts = iter(PATIENCE)
            if since == _SURE_EVERY:
                sure, since = self.position(), 0
            yield row["text"]

    def _again(
        self, error: Exception, attempts: Iterator[float], position: dict[str, Any], taken: int
    ) -> Iterator[Any]:
        """The rows after the `taken` that follow on `position`, when the stream has broken.

        DataError when it has been tried often enough.
        """
        for seconds in attempts:
            self._sleep(seconds)
            try:
                self._rows = self._opened(position)
                rows = iter(self._rows)
                for _ in range(taken):
                    next(rows)
                return rows
            except Exception as later:  # as in hub_file
                error = later
        raise _broken(error) from error


def _broken(error: Exception) -> DataError:
    why = f"{_first_line(error)}; finished parts are kept, the same command continues"
    return DataError(C4_MISSING, why, C4_FIX)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
