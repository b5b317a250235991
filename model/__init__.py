"""The transformer: architecture, loss, FLOPs, sampling, conversion of weights."""

from model.attention import resolve_attention
from model.gpt import GPT, build_model

__all__ = ["GPT", "build_model", "resolve_attention"]
