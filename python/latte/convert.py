"""Puts latent attention into a torch model in place of torch.nn.MultiheadAttention."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from latte.nn import LatteAttention, MacchiatoAttention


class ConversionWarning(UserWarning):
    """Something of the model was left as it was, or starts afresh; the text lists what and why."""


def convert(model: nn.Module, attention: str = "latte", *, exclude: Collection[str] = (), **options) -> nn.Module:
    """Replaces every torch.nn.MultiheadAttention of `model` that does self-attention by latent attention, in place.

    Kept: device, dtype, training mode, batch_first, dropout, head count, bias, requires_grad. Copied: the values' and the
    output's projections and, for Macchiato, the queries' and keys', which the window goes on using. With num_kv_heads below the
    head count the keys' and values' heads are averaged in groups. The latents' projections start afresh, so the model needs
    training. A module that occurs at several places is replaced by one module at all of them.

    Left as they are, and named in a ConversionWarning: cross-attention (torch.nn.TransformerDecoderLayer.multihead_attn; another
    model's has to be named in `exclude`, or its first call raises ValueError), kdim or vdim, add_bias_kv, add_zero_attn,
    subclasses of MultiheadAttention, and modules with hooks.

    Args:
        model: any module; itself a MultiheadAttention, the replacement is returned.
        attention: "latte" or "macchiato".
        exclude: names (as in model.named_modules()) of modules to leave as they are.
        **options: for the constructor of LatteAttention or MacchiatoAttention, as num_latents, num_kv_heads, position, forget,
            window, sinks. rope is False here unless given: MultiheadAttention's queries and keys were trained unrotated.

    Returns:
        `model`, or what takes its place.

    Raises:
        ValueError: another `attention`, a name in `exclude` that is no MultiheadAttention of the model, or options out of range;
            the model is unchanged then.
        TypeError: an option that the constructor doesn't know, or that is taken from the module; the model is unchanged then.
    """
    kinds = {"latte": LatteAttention, "macchiato": MacchiatoAttention}
    if attention not in kinds:
        raise ValueError(f"convert: attention must be 'latte' or 'macchiato', got {attention!r}")
    if attention == "macchiato":
        options.setdefault("rope", False)
    found: dict[nn.MultiheadAttention, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            found.setdefault(module, []).append(name)
    unknown = sorted(set(exclude) - {name for names in found.values() for name in names})
    if unknown:
        raise ValueError(f"convert: exclude names no MultiheadAttention of this model: {', '.join(unknown)}")

    cross = set(_cross_attention(model))
    replacements: dict[nn.MultiheadAttention, nn.Module] = {}
    notes = []
    for module, names in found.items():
        if any(name in exclude for name in names):
            continue
        reason = "it does cross-attention" if module in cross else _why_not(module)
        if reason:
            notes.append(f"{names[0] or type(module).__name__} was left: {reason}")
        else:
            replacements[module] = _replacement(module, kinds[attention], options)
    if not found:
        notes.append("the model has no torch.nn.MultiheadAttention")

    # Nothing was changed so far: an error above leaves the model whole.
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child in replacements:
                setattr(module, name, replacements[child])
    # A TransformerEncoder decided when it was built whether to hand its layers nested tensors, which these modules don't take.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(part, tuple(kinds.values())) for part in module.modules()
        ):
            module.use_nested_tensor = False
    if notes:
        warnings.warn("latte.convert: " + "; ".join(notes), ConversionWarning, stacklevel=2)
    return replacements.get(model, model)


def _cross_attention(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.TransformerDecoderLayer):
            yield module.multihead_attn


def _why_not(module: nn.MultiheadAttention) -> str:
    """Why a module can't be replaced, or an empty string."""
    if type(module) is not nn.MultiheadAttention:
        return f"it is a {type(module).__name__}, a subclass with a behaviour of its own"
    if not module._qkv_same_embed_dim:
        return f"it has kdim={module.kdim} and vdim={module.vdim}, which self-attention has not"
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn have no counterpart"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which would be lost"
    return ""


def _replacement(module: nn.MultiheadAttention, kind: type[nn.Module], options: dict) -> nn.Module:
    weight = module.in_proj_weight
    new = kind(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout,
        bias=module.in_proj_bias is not None,
        batch_first=module.batch_first,
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )
    new.train(module.training)
    projections = [new.value_proj] if isinstance(new, LatteAttention) else [new.query_proj, new.key_proj, new.value_proj]
    parts = [weight.chunk(3)[-len(projections) :]]
    if module.in_proj_bias is not None:
        parts.append(module.in_proj_bias.chunk(3)[-len(projections) :])
    for index, projection in enumerate(projections):
        _copy(projection.weight, parts[0][index], weight.requires_grad, module.head_dim)
        if len(parts) == 2:
            _copy(projection.bias, parts[1][index], module.in_proj_bias.requires_grad, module.head_dim)
    _copy(new.out_proj.weight, module.out_proj.weight, module.out_proj.weight.requires_grad, module.head_dim)
    if module.out_proj.bias is not None:
        _copy(new.out_proj.bias, module.out_proj.bias, module.out_proj.bias.requires_grad, module.head_dim)
    return new


@torch.no_grad()
def _copy(target: nn.Parameter, source: Tensor, requires_grad: bool, head_dim: int) -> None:
    """Copies [H · D, …] to [Hkv · D, …], averaging the heads that share a key-value head."""
    if target.shape != source.shape:
        grouped = source.unflatten(0, (target.shape[0] // head_dim, -1, head_dim))
        source = grouped.mean(1).flatten(0, 1)
    target.copy_(source)
    target.requires_grad_(requires_grad)
