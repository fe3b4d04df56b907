"""Running a module's real pass on fake tensors: shapes and types, and neither memory nor arithmetic.

Fake tensors live on the CPU, since a backward on a GPU needs one; what CUDA does otherwise is laid over it: its lists
of autocast, and its fused attention.

Shapes: B batch, Q queries, K keys, H heads, C channels a head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import Library
from torch.utils._pytree import tree_map_only

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What Lightning's mixed precisions compute in."""
_WIDENED = (
    *("layer_norm", "native_layer_norm", "group_norm", "rms_norm", "softmax.int", "log_softmax.int", "logsumexp"),
    *("softplus", "sum", "sum.dim_IntList", "cumsum", "cumprod", "exp", "expm1", "log", "log10", "log1p", "log2"),
    *("reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "acos", "asin", "cosh", "sinh"),
    *("tan", "erfinv", "dist", "pdist", "renorm", "cosine_similarity", "linalg_vector_norm"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d"),
    *("_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_trilinear3d"),
)
"""What CUDA's autocast computes in fp32 and the CPU's does not (torch's autocast_mode.h)."""
_pretending = False


def on_cuda() -> bool:
    """Whether tensors on the CPU stand for tensors on a GPU just now: what chooses by device asks this too."""
    return _pretending


def start_autograd() -> None:
    """Start autograd's engine as this machine is, to be called before tensors pretend to be elsewhere.

    Started among fake tensors, it would take their GPUs for real, have threads for them, and refuse to work in
    processes that are forked later.
    """
    torch.ones((), requires_grad=True).backward()


@contextmanager
def rehearsing(module: nn.Module) -> Iterator[None]:
    """Make every tensor that is made a fake one, and the module's own as well, until the context ends.

    Nothing of the module changes, nor of torch's random state.

    Args:
        module: Module on any device, the meta device too.
    """
    start_autograd()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), faked(module, mode), as_on_cuda(), mode:
        warnings.simplefilter("ignore")
        yield


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled-dot-product attention as CUDA chooses it: flash for half precision without a mask, else memory-efficient.

    Args:
        query: (B, H, Q, C); with other dimensions no fused kernel takes it.
        key: (B, H, K, C).
        value: (B, H, K, C).
        attn_mask: Broadcasts to (B, H, Q, K); bool, or a bias.
        dropout_p: Share that drops out.
        is_causal: Whether a query sees those before it alone.
        scale: Factor on the products.
        enable_gqa: Whether keys have fewer heads; no fused kernel is taken then.
    """
    aten = torch.ops.aten
    if query.ndim != 4 or enable_gqa:
        found = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    elif attn_mask is None and query.dtype in AUTOCAST.values() and query.shape[-1] <= 256:
        found = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
    else:
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        learns = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        found = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale
        )
    out: Tensor = found[0]
    return out


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Let tensors on the CPU be autocast by CUDA's lists, and take its fused attention; for fake tensors alone."""
    global _pretending
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    library, before = Library("aten", "IMPL"), _pretending
    try:
        _pretending = True
        library.impl("scaled_dot_product_attention", fused_attention, "AutogradCPU")
        for name in _WIDENED:
            if has(f"aten::{name}", "AutocastCUDA") and not has(f"aten::{name}", "AutocastCPU"):
                library.impl(name, _widened(name), "AutocastCPU")
        yield
    finally:
        _pretending = before
        library._destroy()


def _widened(name: str) -> Callable[..., Any]:
    """An operation that computes in fp32, as autocast makes it."""
    base, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, base), overload or "default")
    arguments = [argument.name for argument in operation._schema.arguments]
    place = arguments.index("dtype") if "dtype" in arguments else None
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def widen(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in AUTOCAST.values() else tensor

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            if place is None:
                return operation(*tree_map_only(Tensor, widen, args), **tree_map_only(Tensor, widen, kwargs))
            if len(args) <= place and args[0].dtype in AUTOCAST.values():  # only the result is in fp32 then
                kwargs = {"dtype": torch.float32, **kwargs}
            return operation(*args, **kwargs)

    return call


@contextmanager
def faked(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Put fake tensors on the CPU in the place of a module's parameters and buffers, which have gradients already."""
    fakes: dict[int, Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    place = {name: module.__dict__[name] for name in ("_device",) if name in module.__dict__}  # Lightning's own note

    def fake(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if not isinstance(tensor, nn.Parameter):
            return made
        learning = nn.Parameter(made, requires_grad=tensor.requires_grad)
        learning.grad = torch.empty_like(made) if tensor.requires_grad else None
        return learning

    try:
        module.__dict__.update(dict.fromkeys(place, torch.device("cpu")))
        with mode:
            for part in module.modules():
                tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
                for table in tables:
                    for name, tensor in table.items():
                        if tensor is not None:
                            swapped.append((table, name, tensor))
                            table[name] = fakes.setdefault(id(tensor), fake(tensor))
        yield
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor
        module.__dict__.update(place)
