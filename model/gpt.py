"""The transformer: GPT-2, and by config its modern descendants.

    tokens -> embedding (+ positions) -> blocks -> norm -> head -> logits or loss
    block:  x + attention(norm(x)), then x + mlp(norm(x))          (pre-norm; Radford et al. 2019, section 2.3)

B batch, S sequence, E width, V vocabulary. Parameters are only touched inside the forward of the module that owns
them, and no forward waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.errors import UserError
from configs.schema import Fp8, ModelConfig, Position
from model.attention import Context, SelfAttention, resolve_attention
from model.checks import check
from model.dimensions import resolve_dimensions
from model.init import Embedding, Linear, initialise
from model.layers import MLP, alibi_slopes, rotary_tables, token_positions
from model.loss import Head
from model.residual_norm import ResidualNorm, norms_run_fused
from model.sequence import SequenceGroup, own_part
from model.weight_gradient import bind_sums

__all__ = ["GPT", "Block", "build_model", "check"]


class Block(nn.Module):
    """One layer: (B, S, E) to (B, S, E)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = resolve_dimensions(config)
        self.attention_norm = ResidualNorm(config, sizes.width)
        self.attention = SelfAttention(config, sizes)
        self.mlp_norm = ResidualNorm(config, sizes.width)
        self.mlp = MLP(config, sizes)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x, normed = self.attention_norm(x)
        x, normed = self.mlp_norm(x, self.dropout(self.attention(normed, context)))
        out: Tensor = x + self.dropout(self.mlp(normed))
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Without a compiled `forward` (`GPT.compile_blocks`), which is bound to this block: in a copy it would compute
        with this one's weights."""
        return {name: value for name, value in vars(self).items() if name != "forward"}


class GPT(nn.Module):
    """The model of a `ModelConfig`, with initial weights from the global random generator."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes = resolve_dimensions(config)
        self.recompute = False
        self.sequence: SequenceGroup | None = None
        std = config.init_std
        self.embedding = Embedding(sizes.padded_vocab_size, sizes.width, std=std, num_used=sizes.vocab_size)
        learned = config.position is Position.learned
        self.position = Embedding(sizes.sequence_length, sizes.width, std=std) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(sizes.num_layers))
        self.norm = ResidualNorm(config, sizes.width)
        self.head = Head(config, sizes, tied=self.embedding.weight if config.tied_embeddings else None)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits, or with targets the sums of the losses.

        tokens (B, S) int64 below `vocab_size`; targets (B, S) int64, -100 where not counted; cu_seqlens (n+1,)
        int32: the first token of each document in the flattened B·S tokens, and B·S at the end, where every
        sample starts a new document. With it attention stays inside documents and positions count from their
        start; max_seqlen is an upper bound of their lengths (None: S).

        Returns logits (B, S, V) fp32, with `last_only` those of the last token (B, 1, V); or with targets fp32
        (2,): the cross-entropy in nats summed over the counted tokens, and the sum of the z-loss times its weight.

        In sequence parallel (`set_sequence_group`) every rank of the group gets the same whole samples; each works on
        S/P of their tokens and returns its own tokens' sums. Without targets each computes all logits by itself.
        """
        group = self.sequence if targets is not None else None
        context = self.context(tokens, cu_seqlens, max_seqlen, group)
        x = self.embedding(own_part(tokens, group))  # (B, S or S/P, E)
        if self.position is not None:
            x = x + self.position(own_part(token_positions(tokens, cu_seqlens), group, dim=-1))
        x = self.dropout(x)
        for block in self.blocks:
            x = self.run_block(block, x, context)
        _, normed = self.norm(x[:, -1:] if last_only else x)
        out: Tensor = self.head(normed, targets if targets is None else own_part(targets, group))
        return out

    def context(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        group: SequenceGroup | None = None,
    ) -> Context:
        """What all blocks share: the attention implementation, positions, documents."""
        config, length = self.config, tokens.shape[1]
        if config.position is Position.learned and length > self.sizes.sequence_length:
            raise ValueError(
                f"{length} tokens are more than the {self.sizes.sequence_length} learned positions; "
                "raise model.sequence_length or use model.position=rope"
            )
        rotary, alibi = None, None
        if config.position is Position.rope:
            positions = own_part(token_positions(tokens, cu_seqlens), group, dim=-1)
            rotary = rotary_tables(positions, self.sizes.head_dim, config.rope_theta)
        if config.position is Position.alibi:
            alibi = own_part(alibi_slopes(self.sizes.num_heads, tokens.device), group, dim=0)
        longest = 0 if cu_seqlens is None else max_seqlen or length
        attention = resolve_attention(config, tokens.device, self.compute_dtype(tokens.device))
        return Context(attention, rotary, alibi, cu_seqlens, longest, group)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of queries and keys: autocast's where it is on, else the weights'."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.embedding.weight.dtype

    def run_block(self, block: nn.Module, x: Tensor, context: Context) -> Tensor:
        """One block, keeping only its input for the backward pass if `set_recompute(True)`."""
        if self.recompute and torch.is_grad_enabled():
            keep_rng = self.config.dropout > 0
            out: Tensor = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=keep_rng)
        else:
            out = block(x, context)
        return out

    def materialise(
        self,
        device: torch.device | str,
        each: Callable[[nn.Module], None] | None = None,
        dtype: torch.dtype | None = None,
        *,
        draw: bool = True,
    ) -> GPT:
        """Give a model that was built on the meta device memory on `device`, and the initial weights that building it
        there would have drawn, rounded to `dtype` (None: in the dtype it was built in).

        Without `draw` the memory is left as it comes, norms and biases included: the caller fills all of it.
        `each` is called with every module as soon as it has its own weights, before the next one's are drawn: so that
        they can be moved away, and the whole model never is in one place.
        """
        for module in self.modules():
            if module is self.head and self.config.tied_embeddings:
                self.head.weight = self.embedding.weight
            else:
                for parameter in module.parameters(recurse=False):  # still on the meta device: this computes nothing
                    parameter.data = parameter.data.to(dtype or parameter.dtype)
                module.to_empty(device=device, recurse=False)
            if draw:
                initialise(module)
            if each is not None:
                each(module)
        return self

    def set_recompute(self, recompute: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.recompute = recompute

    def set_fp8(self, recipe: Fp8) -> None:
        """Multiply in fp8 in the blocks' linear layers. Embeddings and head stay: their rows and logits differ in size
        the most."""
        for module in self.blocks.modules():
            if isinstance(module, Linear):
                module.fp8 = recipe

    def set_sequence_group(self, group: SequenceGroup | None) -> None:
        """Share the tokens of each sample with the ranks of a group when computing losses."""
        self.sequence = group

    def bind_sums(self, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Have gradients added to `sums`, tensors of the parameters' shapes (see `model.weight_gradient`), among them
        those of all biases.

        The biases of the layers that write into the residual stream are summed by the norms that follow, where these
        run as our kernel, and no dropout stands between.
        """
        bind_sums(self, sums)
        config, total = self.config, next(iter(sums.values()))
        fused = norms_run_fused(config.fused_norms, total.device, self.sizes.width)
        if not (config.bias and fused and config.dropout == 0):
            return
        shift: Tensor | None = torch.zeros(self.sizes.width, device=total.device)
        for block in self.blocks:
            # The first block has the embeddings before it, which have no bias: its sum is nobody's, and there so that
            # all blocks are one compiled graph.
            block.attention_norm.shift_sum = shift
            block.mlp_norm.shift_sum, block.attention.proj.bias_sum = block.attention.proj.bias_sum, None
            shift, block.mlp.down.bias_sum = block.mlp.down.bias_sum, None
        self.norm.shift_sum = shift

    def block_matrices(self) -> list[list[nn.Parameter]]:
        """Of each block, the weights of its linear layers, in the same order."""
        return [[m.weight for m in block.modules() if isinstance(m, Linear)] for block in self.blocks]

    def compile_blocks(self) -> None:
        """Compile each block by itself: equal blocks share one compilation, and the names of parameters stay.

        Only `forward` is compiled, not the call around it, which runs the hooks by which ZeRO-3 gathers and frees the
        block's parameters: Dynamo would guard on what they change, and compile anew at each block and step.
        """
        for block in self.blocks:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]

    def decay_groups(self) -> list[tuple[str, list[nn.Parameter]]]:
        """`decay`: the matrices of linear layers, embeddings and head; `no_decay`: norms and biases.

        Told apart by the module that owns a parameter and not by its shape, which ZeRO-3 takes away. A shared
        matrix is listed once.
        """
        decay = [m.weight for m in self.modules() if isinstance(m, Linear | Embedding | Head)]
        decay = list(dict.fromkeys(decay))
        chosen = set(decay)
        return [("decay", decay), ("no_decay", [p for p in self.parameters() if p not in chosen])]


def build_model(config: ModelConfig) -> GPT:
    """The model of a config whose `vocab_size` is set; under `torch.device("meta")` to be materialised later.

    Raises `UserError` with all that is wrong with the config.
    """
    problems = check(config)
    if config.vocab_size is None:
        problems.append("model.vocab_size is not set; take it from the prepared data, or set the number of tokens")
    if problems:
        raise UserError("\n".join(problems))
    return GPT(config)
