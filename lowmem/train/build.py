"""What a run is made of: model, optimizer and text, on a machine that has what they need."""

import os
from pathlib import Path

import torch

from lowmem.config.defaults import rows_of
from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config, WeightFormat, settled
from lowmem.data.batches import Batches, TrainingOrder
from lowmem.data.documents import DocumentBatches
from lowmem.data.shards import Corpus, TokenStream
from lowmem.errors import ConfigError, DataError, HardwareError, short
from lowmem.kernels.attention import choose_backend
from lowmem.kernels.compiled import compiles
from lowmem.kernels.scaled_matmul import multiplies_fp8
from lowmem.model.huggingface import folder_weights
from lowmem.model.llama import Llama, compute_dtype
from lowmem.optim.assign import build_optimizer
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.hardware import available_memory
from lowmem.planner.plan import Plan
from lowmem.train.evaluate import validation_of
from lowmem.units import format_bytes


def build(config: Config) -> tuple[Llama, Optimizer]:
    """The model, uninitialised, and its optimizer. Raises as `require_hardware`."""
    require_hardware(config)
    model, optimizer = declared(config, config.train.device)
    optimizer.attach(model)
    if config.train.device == "cuda":
        _repeat_exactly(model)
    return model, optimizer


def declared(config: Config, device: str) -> tuple[Llama, Optimizer]:
    """The model and the optimizer with all its state, on any device; "meta" allocates nothing."""
    weights: WeightFormat = settled(config.train.weights)
    model = Llama(
        resolve_model(config.model, Path.cwd()),
        dtype=compute_dtype(weights, config.train.device),
        device=device,
        int8=weights == "int8",
        int8_ends=config.train.ends == "int8",
        recompute=settled(config.train.recompute),
        keep_logits=config.train.logits == "keep",
        attention="cpu" if device == "meta" else config.train.attention,  # nothing runs there
        boundaries="host" if config.train.boundaries == "host" else "keep",
        blocks="host" if config.train.blocks == "host" else "device",
        compiled=config.train.compile,
        matmul=config.train.matmul,
    )
    optimizer = build_optimizer(
        config.optimizer,
        model.weights(),
        model.roles(),
        mode=settled(config.train.update),
        seed=config.train.seed,
        head_dim=model.config.head_dim,
        # Runs that were planned before there was a choice have fp32.
        sums="fp32" if config.train.sums == "auto" else settled(config.train.sums),
    )
    return model, optimizer


def declared_bytes(config: Config) -> int:
    """Bytes of the weights and states that a checkpoint will hold, from their declarations."""
    model, optimizer = declared(config, "meta")
    tensors = [*folder_weights(model), *optimizer.state_tensors()]
    return sum(tensor.nbytes for _, tensor in tensors)


def text_of(config: Config, corpus: Corpus) -> tuple[TrainingOrder, TokenStream]:
    """What a run reads: (the order of training, the validation part). DataError: too little."""
    if corpus.train is None:
        raise DataError(
            f"{corpus.folder} has no training part",
            "every file is named as validation",
            "add files without `validation` in their names, or use lowmem eval",
        )
    seq_len = settled(config.data.seq_len)
    rows = rows_of(config.train.batch, seq_len)
    if config.data.protocol == "galore":
        # A subspace comes from the first micro-batch there: not from the longest documents alone.
        by_length = config.train.update != "fused+subspace"
        documents = DocumentBatches(
            corpus.train, seq_len=seq_len, rows_per_update=rows, by_length=by_length
        )
        return documents, validation_of(corpus)
    seed = config.train.seed
    packed = Batches(corpus.train, seq_len=seq_len, rows_per_update=rows, seed=seed)
    return packed, validation_of(corpus)


def require_hardware(config: Config) -> None:
    """HardwareError unless this machine has the device and the packages that a run asks for.

    ConfigError where a launcher started several processes for it.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE={short(processes)}: a run is one process on one device",
            "torchrun and its like would start the same run several times",
            "run it without a launcher; CUDA_VISIBLE_DEVICES=1 chooses the second card",
        )
    device = config.train.device
    if device == "cuda" and not torch.cuda.is_available():
        raise HardwareError(
            'train.device = "cuda", but there is no CUDA device',
            "a checkpoint continues exactly only on the kind of device it was made on",
            "run it where the card is",
        )
    model = resolve_model(config.model, Path.cwd())
    dtype = compute_dtype(settled(config.train.weights), device)
    backend = choose_backend(config.train.attention, torch.device(device), dtype, model.head_dim)
    if backend == "flash" and torch.cuda.get_device_capability() < (8, 0):
        raise HardwareError(
            f"{torch.cuda.get_device_name()} has no bf16 attention",
            "bf16 needs compute capability 8.0 (Ampere) or newer",
            "--weights fp32",
        )
    if config.train.matmul == "fp8" and device == "cuda" and not multiplies_fp8():
        raise HardwareError(
            f'train.matmul = "fp8", but {torch.cuda.get_device_name()} has no products in fp8',
            "they need compute capability 8.9 (Ada) or newer",
            "--matmul int8 or --matmul exact",
        )
    if config.train.compile and not compiles(torch.device(device)):
        raise HardwareError(
            f"train.compile = true on {device}, where torch.compile has no compiler",
            "it takes a C++ compiler on a CPU (c++, g++, clang++ or $CXX) and Triton on a card",
            "install one, or train.compile = false, which runs the same without it",
        )


def require_host_memory(plan: Plan) -> None:
    """HardwareError unless this machine has the host memory that the plan takes."""
    free, needs = available_memory(), plan.memory.host
    if needs > free:
        raise HardwareError(
            f"the plan takes {format_bytes(needs)} of host memory, {format_bytes(free)} are free",
            "; ".join(what for what, where in plan.choice.away() if where == "host"),
            "--sums int8, --place device, --blocks device, --boundaries keep, a smaller --batch, "
            "or a machine with more memory",
        )


def _repeat_exactly(model: Llama) -> None:
    """Choose CUDA kernels that give the same bits every time: exact resume needs them.

    The float32 attention of PyTorch has no such backward; it warns, and a resumed float32 run on a
    card is close but not equal.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of library users; see cli/main.py
    torch.use_deterministic_algorithms(True, warn_only=model.backend == "efficient")
    # We never read what we have not written, and filling it would cost a kernel each time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
