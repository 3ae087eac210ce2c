"""Models under context_parallel: the same loss and gradients as in one process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import groups
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import distributed, masks

LENGTH, VOCABULARY = 300, 37
DOCUMENTS = masks.documents(cu_seqlens=[0, 90, 100, LENGTH])


def transformer(positions: str = "rotary", **fields: Any) -> nn.Module:
    torch.manual_seed(1)
    return fastattn.nn.TransformerModel(
        vocab_size=VOCABULARY,
        embed_dim=32,
        num_heads=4,
        num_layers=2,
        max_length=LENGTH,
        positions=positions,
        **fields,
    )


def hugging_face(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    importlib.import_module("fastattn.integrations.huggingface")  # registers "fastattn"
    torch.manual_seed(1)
    sizes = {
        "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
    }  # fmt: skip
    settings = getattr(transformers, config)(**{**sizes, **options})
    settings._attn_implementation = "fastattn"
    return getattr(transformers, model)(settings)


llama = partial(hugging_face, "LlamaForCausalLM", "LlamaConfig")
windowed = partial(
    hugging_face,
    "Qwen2ForCausalLM",
    "Qwen2Config",
    use_sliding_window=True,
    sliding_window=50,
    max_window_layers=1,
)


gpt2 = partial(
    hugging_face, "GPT2LMHeadModel", "GPT2Config", attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, n_positions=LENGTH
)


def patched() -> nn.Module:
    model = llama()
    fastattn.patch(model)
    return model


def text() -> tuple[Tensor, Tensor]:
    """Tokens (2, N) and the next ones; there is none for the last."""
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    return tokens, torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), 1)


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """The sum over tokens, so that the losses of ranks add up."""
    out = model(tokens, **options)
    logits = out if isinstance(out, Tensor) else out.logits
    return F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum", ignore_index=-100)


def same_as_one_process(
    mesh: DeviceMesh,
    make: Callable[[], nn.Module],
    options: dict[str, Any],
    method: str = "auto",
    mask: Any = None,
) -> None:
    model, (tokens, targets) = make().double(), text()
    whole = {"mask": mask} if mask is not None and isinstance(model, fastattn.nn.TransformerModel) else {}
    expected = loss_of(model, tokens, targets, **options, **whole)
    expected.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    plan = distributed.layout(LENGTH, mesh, causal=True)
    own = {}
    if not isinstance(model, fastattn.nn.TransformerModel):
        own["position_ids"] = distributed.shard(torch.arange(LENGTH)[None], plan, 1)
    with distributed.context_parallel(mesh, plan, method=method, mask=mask):
        tokens, targets = (distributed.shard(t, plan, 1) for t in (tokens, targets))
        loss = loss_of(model, tokens, targets, **options, **own)
        loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, expected.detach())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        dist.all_reduce(p.grad)
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-10)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = transformer()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed(tokens)
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.model.unembed(x)


def checkpointing_within_the_block(mesh: DeviceMesh) -> None:
    model, (tokens, targets) = Checkpointed().double(), text()
    loss_of(model, tokens, targets).backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    plan = distributed.layout(LENGTH, mesh, causal=True)
    tokens, targets = (distributed.shard(t, plan, 1) for t in (tokens, targets))
    with distributed.context_parallel(mesh, plan, method="ring"):
        loss_of(model, tokens, targets).backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        dist.all_reduce(p.grad)
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-10)


def checkpointing_beyond_the_block_is_an_error(mesh: DeviceMesh) -> None:
    model, (tokens, targets) = Checkpointed(), text()
    for method in ("ring", "heads"):
        plan = distributed.layout(LENGTH, mesh, causal=True)
        with distributed.context_parallel(mesh, plan, method=method):
            loss = loss_of(model, *(distributed.shard(t, plan, 1) for t in (tokens, targets)))
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            loss.backward()


def same_training_curve(mesh: DeviceMesh) -> None:
    """Five steps of AdamW give the losses of one process."""
    curves = []
    for spread in (False, True):
        torch.manual_seed(3)
        model = transformer().double()
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        plan = distributed.layout(LENGTH, mesh, causal=True)
        tokens, targets = text()
        for _ in range(5):
            optimizer.zero_grad()
            if spread:
                with distributed.context_parallel(mesh, plan):
                    own = [distributed.shard(t, plan, 1) for t in (tokens, targets)]
                    loss = loss_of(model, *own)
                    loss.backward()
                loss = loss.detach()
                for t in (loss, *(p.grad for p in model.parameters())):
                    dist.all_reduce(t)
            else:
                loss = loss_of(model, tokens, targets)
                loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-8, atol=0)


def compiled(mesh: DeviceMesh) -> None:
    model, (tokens, targets) = transformer().double(), text()
    plan = distributed.layout(LENGTH, mesh, causal=True)
    own = [distributed.shard(t, plan, 1) for t in (tokens, targets)]
    gradients = []
    for network in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        with distributed.context_parallel(mesh, plan):
            loss_of(network, *own).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def refused(mesh: DeviceMesh, call: Callable[[Callable[[Tensor], Tensor]], Any], words: str) -> None:
    plan = distributed.layout(LENGTH, mesh, causal=True)
    with (
        pytest.raises((ValueError, TypeError), match=words),
        distributed.context_parallel(mesh, plan),
    ):
        call(lambda t: distributed.shard(t, plan, 1))


TOKENS, POSITIONS = torch.zeros(1, LENGTH, dtype=torch.int64), torch.arange(LENGTH)[None]


def _padding(shard: Callable[[Tensor], Tensor]) -> None:
    seen = POSITIONS >= 5  # padding on the left of rank 0's tokens only
    llama()(shard(TOKENS), position_ids=shard(POSITIONS), attention_mask=shard(seen))


def _labels(shard: Callable[[Tensor], Tensor]) -> None:
    llama()(shard(TOKENS), position_ids=shard(POSITIONS), labels=shard(TOKENS))


def _eager(shard: Callable[[Tensor], Tensor]) -> None:
    model = llama()
    model.config._attn_implementation = "eager"
    model(shard(TOKENS), position_ids=shard(POSITIONS))


def _of_torch(shard: Callable[[Tensor], Tensor]) -> None:
    n = shard(TOKENS).shape[1]
    assert F.scaled_dot_product_attention(*(torch.zeros(1, 2, n + 1, 8) for _ in range(3))).shape[2] == n + 1
    F.scaled_dot_product_attention(*(torch.zeros(1, 2, n, 8) for _ in range(3)))


def _encoder_of_torch(shard: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()(torch.zeros(1, shard(TOKENS).shape[1], 8))


def _of_torch_by_steps(shard: Callable[[Tensor], Tensor]) -> None:
    x = torch.zeros(1, shard(TOKENS).shape[1], 8)
    nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x)


def _statistics(shard: Callable[[Tensor], Tensor]) -> None:
    q = torch.zeros(1, 2, 75, 8)
    fastattn.lens.attention_statistics(q, q, torch.zeros(1, 2, 75))


def _cross(shard: Callable[[Tensor], Tensor]) -> None:
    fastattn.nn.CrossAttention(8, 2)(torch.zeros(1, 75, 8), torch.zeros(1, 75, 8))


def _weights(shard: Callable[[Tensor], Tensor]) -> None:
    x = torch.zeros(1, shard(TOKENS).shape[1], 8)
    fastattn.nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x, need_weights=True)


REFUSED = {
    "tokens that are not sharded": (lambda shard: transformer()(TOKENS), "x must have the .* tokens that the"),
    "positions that cannot be checked": (
        lambda shard: importlib.import_module("fastattn.integrations.huggingface").fastattn_attention(
            nn.Identity(), *(torch.zeros(1, 4, shard(TOKENS).shape[1], 8) for _ in range(3)), None
        ),
        "Identity does not hand its position_ids to its attention",
    ),
    "positions from 0": (lambda shard: llama()(shard(TOKENS)), "position_ids must be those of this rank's tokens"),
    "a whole cache": (
        lambda shard: fastattn.attention(*(torch.zeros(1, 4, n, 8) for n in (10, 20, 20))),
        "q must have the .* tokens that the layout gives this rank, got 10",
    ),
    "labels that the model shifts": (_labels, "labels are shifted by the model"),
    "PyTorch's attention": (_of_torch, "F.scaled_dot_product_attention would attend to this rank's tokens alone"),
    "PyTorch's encoder": (
        _encoder_of_torch, "torch.nn.MultiheadAttention would attend to this rank's tokens alone",
    ),
    "PyTorch's attention with its weights": (
        _of_torch_by_steps, "torch.nn.MultiheadAttention would attend to this rank's tokens alone",
    ),
    "Hugging Face's eager attention": (_eager, "attn_implementation must be 'fastattn' .* got 'eager'"),
    "statistics": (_statistics, "attention_statistics is not computed under"),
    "a loss that shifts": (
        lambda shard: fastattn.linear_cross_entropy(
            torch.zeros(1, 75, 9), torch.zeros(5, 9), torch.zeros(1, 75, dtype=torch.int64), shift=True
        ),
        "shift=True is not computed under",
    ),
    "cross-attention": (_cross, "cross-attention is not computed under"),
    "attention weights": (_weights, "attention weights is not computed under|weights"),
    "a model longer than its positions": (
        lambda shard: fastattn.nn.TransformerModel(
            vocab_size=9, embed_dim=8, num_heads=2, num_layers=1, max_length=100
        )(shard(TOKENS)),
        "max_length = 100",
    ),
}  # fmt: skip


def padding_is_refused_where_it_is_seen(mesh: DeviceMesh) -> None:
    """Rank 0 refuses; the others wait for it until it is gone, so they are not asked."""
    if mesh.get_local_rank() == 0:
        refused(mesh, _padding, "padding in an attention_mask")


def shift_labels(mesh: DeviceMesh) -> None:
    model, (tokens, targets) = llama().double(), text()
    expected = model(tokens, labels=tokens).loss
    plan = distributed.layout(LENGTH, mesh, causal=True)
    own = [distributed.shard(t, plan, 1) for t in (tokens, targets, torch.arange(LENGTH)[None])]
    with distributed.context_parallel(mesh, plan):
        count = torch.tensor(2 * (LENGTH - 1))
        loss = model(
            own[0], position_ids=own[2], labels=own[0], shift_labels=own[1], num_items_in_batch=count
        ).loss
    loss = loss.detach()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, expected.detach())


OF_HUGGING_FACE = (
    "positions from 0", "positions that cannot be checked", "labels that the model shifts",
    "Hugging Face's eager attention",
)  # fmt: skip
# Hugging Face's library takes seconds to import, so fewer ranks do.
CASES: dict[groups.Group, dict[str, groups.Case]] = {
    2: {
        "Llama": partial(same_as_one_process, make=llama, options={}),
        "Llama, ring": partial(same_as_one_process, make=llama, options={}, method="ring"),
        "shifted labels": shift_labels,
        "the training curve of one process, on two ranks": same_training_curve,
        "padding is refused": padding_is_refused_where_it_is_seen,
        **{
            f"{name}: refused": partial(refused, call=REFUSED[name][0], words=REFUSED[name][1])
            for name in OF_HUGGING_FACE
        },
    },
    "slow": {
        "a compiled model under the block": compiled,
        "Qwen 2 with a window in one layer": partial(same_as_one_process, make=windowed, options={}),
        "patched Llama": partial(same_as_one_process, make=patched, options={}),
        "GPT-2": partial(same_as_one_process, make=gpt2, options={}),
    },
    4: {
        **{
            f"TransformerModel, {positions} positions, {method}": partial(
                same_as_one_process, make=partial(transformer, positions), options={}, method=method
            )
            for positions, method in (("rotary", "ring"), ("learned", "gather"), ("rotary", "heads"))
        },
        "TransformerModel with a window and documents": partial(
            same_as_one_process, make=partial(transformer, window=(40, 0)), options={"mask": DOCUMENTS}
        ),
        "TransformerModel with key lengths": partial(
            same_as_one_process, make=transformer, options={"key_lengths": torch.tensor([200, LENGTH])}
        ),
        "TransformerModel, mask of the block": partial(
            same_as_one_process, make=transformer, options={}, mask=DOCUMENTS
        ),
        "the training curve of one process": same_training_curve,
        "checkpointing within the block": checkpointing_within_the_block,
        "checkpointing beyond the block": checkpointing_beyond_the_block_is_an_error,
        **{
            f"{name} is refused": partial(refused, call=call, words=words)
            for name, (call, words) in REFUSED.items()
            if name not in OF_HUGGING_FACE
        },
    },
}
