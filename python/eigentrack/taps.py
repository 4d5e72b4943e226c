"""Which modules are watched: the transformer's blocks, found by structure, or modules named by the user."""

import gc
import inspect
from collections.abc import Sequence

import torch
from torch import nn

from eigentrack.errors import TapError, UnsupportedModelError
from rmtkernels.ops.sliding_window import ACTIVATION_DTYPES

# What transformers' blocks call their feed-forward part, dense or a mixture of experts.
_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")


def without_adapter(model: nn.Module) -> nn.Module:
    """The model inside a wrapper of PEFT, adapters and all, or the model itself.

    It runs every pass of the wrapper's, and generate() calls it alone: hooks on the wrapper would see nothing.
    """
    get_base_model = getattr(model, "get_base_model", None)
    base = get_base_model() if callable(get_base_model) else None
    return base if isinstance(base, nn.Module) else model


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the largest outermost `nn.ModuleList`, by parameters.

    In models of several towers, of the one that transformers calls the decoder: the language model.

    Raises:
        TapError: if there is none.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    blocks = _largest_list(decoder) if isinstance(decoder, nn.Module) else []
    blocks = blocks or _largest_list(model)
    if not blocks:
        raise TapError(f"no list of blocks in {type(model).__name__}; name the modules to watch with modules=[...]")
    return blocks


def find_mlp(block: nn.Module) -> nn.Module:
    """The feed-forward part of a transformer's block, by its usual names.

    Raises:
        TapError: if it has none of them.
    """
    for name in _MLP_NAMES:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            return module
    raise TapError(
        f"{type(block).__name__} has no feed-forward part under the names {', '.join(_MLP_NAMES)}; it has "
        f"{', '.join(name for name, _ in block.named_children()) or 'no children'}: name modules with modules=[...]"
    )


def _largest_list(model: nn.Module) -> list[nn.Module]:
    lists = {
        name: blocks for name, blocks in model.named_modules() if isinstance(blocks, nn.ModuleList) and len(blocks)
    }
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    sizes = {name: sum(parameter.numel() for parameter in lists[name].parameters()) for name in outer}
    return list(lists[max(outer, key=lambda name: sizes[name])]) if outer else []


def select_layers(layers: str | Sequence[int], depth: int) -> list[int]:
    """Indices of the blocks to watch. "every:k" takes every k-th counted from the last, so the last is among them.

    Raises:
        TapError: on an unknown word, an index out of range or a repeated one.
    """
    if layers == "all":
        return list(range(depth))
    if isinstance(layers, str):
        step = layers.removeprefix("every:")
        if step == layers or not step.isdecimal() or int(step) < 1:
            raise TapError(f'layers must be "all", "every:k" with k >= 1, or a list of indices, got {layers!r}')
        return sorted(range(depth - 1, -1, -int(step)))
    if isinstance(layers, int) or not all(type(index) is int for index in layers):
        raise TapError(f'layers must be "all", "every:k" or a list of indices, got {layers!r}')
    chosen = [index + depth if index < 0 else index for index in layers]
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= index < depth for index in chosen):
        raise TapError(f"layers must be distinct indices of the model's {depth} blocks, got {list(layers)}")
    return sorted(chosen)


def hidden_state(output: object) -> torch.Tensor:
    """The (B, T, D) hidden state in a module's output: the output itself or its first element.

    Raises:
        TapError: if it is not there.
    """
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
        raise TapError(
            f"a watched module must return a (B, T, D) tensor, or a tuple that starts with one, got {type(hidden)}"
        )
    return hidden


def check_rows(names: Sequence[str], rows: Sequence[torch.Tensor]) -> None:
    """Raises TapError unless all hidden states have one shape and one dtype that windows can hold."""
    kinds = {(row.shape, row.dtype) for row in rows}
    if len(kinds) > 1 or rows[0].dtype not in ACTIVATION_DTYPES:
        found = (
            f"{name} {str(row.dtype).removeprefix('torch.')} {tuple(row.shape)}"
            for name, row in zip(names, rows, strict=True)
        )
        raise TapError(
            "watched modules must all return one width in one dtype of float32, bfloat16 and float16; got "
            f"{', '.join(found)}: watch modules that agree, with a monitor each for the others, or convert the model"
        )


def module_names(model: nn.Module, modules: Sequence[nn.Module]) -> list[str]:
    """Qualified names of modules of `model`.

    Raises:
        TapError: if there are none, one is not the model's, or one comes twice.
    """
    names = {module: name for name, module in model.named_modules()}
    if not modules or len(set(modules)) < len(modules) or not all(module in names for module in modules):
        raise TapError("modules must be distinct modules of the model, at least one")
    return [names[module] for module in modules]


def refuse_unsupported(model: nn.Module, needs_cache: bool) -> None:
    """Raises UnsupportedModelError for models on which hooks would silently do nothing, and for encoder-decoders."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; EigenTrack watches decoder-only models"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise UnsupportedModelError(
            "the model is compiled already: give EigenTrack the plain model, enter it, and call the compiled one inside"
        )
    if torch._dynamo.config.skip_nnmodule_hook_guards and _is_compiled(model):
        raise UnsupportedModelError(
            "the model is compiled already, and a compiled model never calls hooks attached later: enter EigenTrack "
            "before the model is compiled, or set torch._dynamo.config.skip_nnmodule_hook_guards = False before it is, "
            "or leave torch.compile out"
        )
    parameters = inspect.signature(model.forward).parameters
    # A model that names its tokens names its cache too; a wrapper names neither, and passes on what it is given.
    anything = "input_ids" not in parameters and any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )
    if needs_cache and not anything and "past_key_values" not in parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no past_key_values, so its answer cannot be told from its prompt: "
            'use start="prompt"'
        )


def _is_compiled(model: nn.Module) -> bool:
    """Whether there is a compiled form of the model or of a part of it, in it or around it."""
    if getattr(model, "_compiled_call", None):  # generate()'s own
        return True
    if any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    ):
        return True
    # `compiled = torch.compile(model)` leaves no mark on the model. Looking who holds it takes a tenth of a second, so
    # only if something has been compiled and run.
    return bool(torch._dynamo.utils.counters["stats"]) and any(
        isinstance(holder, dict) and holder.get("_orig_mod") is model for holder in gc.get_referrers(model)
    )


def end_tokens_of(model: nn.Module) -> list[int]:
    """End and padding tokens of the model's generation config: what generate() feeds once a sequence is over."""
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    tokens: set[int] = set()
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        tokens.update(value if isinstance(value, (list, tuple)) else () if value is None else (value,))
    return sorted(tokens)
