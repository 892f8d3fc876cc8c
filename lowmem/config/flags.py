"""Which configuration key a flag sets; `LOWMEM_RANK` is `--rank` in the environment."""

FLAGS = {
    "--recipe": "recipe",
    "--model": "model",
    "--gpu": "gpu",
    "--others": "others",
    "--data": "data.source",
    "--protocol": "data.protocol",
    "--tokenizer": "data.tokenizer",
    "--seq-len": "data.seq_len",
    "--skip-bad": "data.skip_bad",
    "--method": "optimizer.method",
    "--rank": "optimizer.rank",
    "--lr": "optimizer.lr",
    "--weight-decay": "optimizer.weight_decay",
    "--scale": "optimizer.options.scale",
    "--gap": "optimizer.options.gap",
    "--states": "optimizer.states",
    "--schedule": "schedule.kind",
    "--warmup": "schedule.warmup",
    "--updates": "train.updates",
    "--tokens": "train.tokens",
    "--hours": "train.hours",
    "--batch": "train.batch",
    "--micro-batch": "train.micro_batch",
    "--update": "train.update",
    "--sums": "train.sums",
    "--boundaries": "train.boundaries",
    "--place": "optimizer.place",
    "--blocks": "train.blocks",
    "--recompute": "train.recompute",
    "--logits": "train.logits",
    "--attention": "train.attention",
    "--compile": "train.compile",
    "--clip": "train.clip",
    "--weights": "train.weights",
    "--ends": "train.ends",
    "--seed": "train.seed",
    "--device": "train.device",
    "--eval-every": "evaluate.every",
    "--eval-tokens": "evaluate.tokens",
    "--save-every": "checkpoint.every",
    "--keep": "checkpoint.keep",
    "--name": "run.name",
    "--out": "run.out",
}

ENVIRONMENT = {"LOWMEM_" + flag[2:].replace("-", "_").upper(): key for flag, key in FLAGS.items()}
"""Environment variable -> key."""

OTHER_VARIABLES = {
    "LOWMEM_HOME": "cache and calibration, default ~/.cache/lowmem",
    "LOWMEM_CONFIG": "a configuration file, read before those of --config",
    "LOWMEM_OFFLINE": "1 = never ask the network",
    "LOWMEM_LOG": "debug = tracebacks",
    "LOWMEM_KERNELS": "reference = plain PyTorch in place of every kernel",
}
"""Variables that are no setting of a run, and what they mean."""
