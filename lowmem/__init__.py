"""lowmem: pretrain LLaMA-style models when the GPU is smaller than the model."""

__version__ = "0.1.0"
