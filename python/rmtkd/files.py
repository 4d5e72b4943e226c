"""save and load: a compressed model as a folder of safetensors and JSON, written whole or not at all."""

# eigentrack.files has the same habits (write aside and rename, bounded headers, reasons in refusals) for single files.
# The two share no code: what they have in common is ten lines, and a third top-level package to hold them would be more
# to understand than it saves. rmtkernels cannot hold them, for operators do not know safetensors.

import copy
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd.config import Config
from rmtkd.decoding import decode
from rmtkd.errors import FileFormatError, ModelError
from rmtkd.modules import Projected, ProjectedConv2d, ProjectedEmbedding, ProjectedLinear
from rmtkd.plans import Plan
from rmtkernels.errors import RmtkernelsError

FORMAT, VERSION = "rmtkd.model", 1
DESCRIPTION, PLAN, RESULT, WEIGHTS = "rmtkd.json", "plan.json", "result.json", "weights.safetensors"
MAX_DESCRIPTION = 1 << 24  # bytes; ten thousand projected layers take a tenth
_OPTIONS = ("padding_idx", "stride", "padding", "dilation")  # of ProjectedLayer, as their kinds take them
_KINDS: dict[str, type[Projected]] = {
    kind.__name__: kind for kind in (ProjectedLinear, ProjectedEmbedding, ProjectedConv2d)
}


@dataclass(frozen=True)
class ProjectedLayer:
    """What a projected layer is beside its tensors. Fields that its kind does not have are None."""

    name: str
    kind: str
    rank: int
    fixed: str | None
    padding_idx: int | None
    stride: tuple[int, int] | None
    padding: str | tuple[int, int] | None
    dilation: tuple[int, int] | None


@dataclass(frozen=True)
class Description:
    """What rmtkd.json says.

    Attributes:
        form: "pretrained": a model of transformers that its own `from_pretrained` reads. "module": WEIGHTS, and the
            layers that are projected; with transformers' config.json if the rest of the model can be made from that.
        library: "transformers", or "" for a class that `load` cannot find by its name.
        model: the class's name.
        projected: the layers.
        config: the settings that it was made with.
    """

    form: str
    library: str
    model: str
    projected: tuple[ProjectedLayer, ...]
    config: Config | None


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    config: Config | None = None,
    tokenizer: Any = None,
) -> Path:
    """Writes a model to a folder, beside it first, and renames: nobody ever finds half of one.

    A narrowed model (width mode) is a stock model, and what is written is what its `save_pretrained` writes: anyone's
    `AutoModel.from_pretrained` reads it. A model with projected layers is written as its tensors and a description.

    Args:
        model: any. Parameters that share memory are written once.
        folder: to make. One that is there must be empty, or hold what `save` wrote, which is replaced whole.
        plan: written beside, as plan.json, for people.
        config: kept in the description; default: the plan's.
        tokenizer: of transformers, written into the folder too.

    Returns:
        The folder.

    Raises:
        FileExistsError: if the folder holds something else.
        OSError: if it cannot be written.
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    aside.mkdir()
    try:
        description = _write(model, aside, config or (None if plan is None else plan.config))
        if plan is not None:
            (aside / PLAN).write_text(plan.to_json(), encoding="utf-8")
        found = {"format": FORMAT, "format_version": VERSION} | asdict(description)
        (aside / DESCRIPTION).write_text(json.dumps(found, indent=2), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        _to_disk(aside)
        _take_place(aside, folder)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def sweep(folder: Path) -> None:
    """Removes what calls of `save` that were killed have left beside a folder. Nobody may be saving to it."""
    for kind in ("partial", "old"):
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 8}.{kind}"):
            shutil.rmtree(left)


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place first, and renames."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def refuse_foreign(folder: Path) -> None:
    """Raises FileExistsError if `save` would have to replace what it did not write."""
    if folder.exists() and not (folder / DESCRIPTION).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there, and nothing that rmtkd wrote: give another folder")


def load(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, in eval mode, on the CPU. No pickle is read and no code of the folder is run.

    Args:
        folder: as given to `save`.
        model: an instance of what was compressed, or of any model of that architecture, for classes that are not part
            of transformers; it is copied, not changed, and its weights do not matter.

    Raises:
        FileFormatError: if the folder is not one of rmtkd's, of a newer version, damaged, or does not fit the model.
        ModelError: if `model` is needed.
        OSError: if the folder cannot be read.
    """
    folder = Path(folder)
    description = _description(folder)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        if description.form == "pretrained":
            loaded = _load_pretrained(folder, description, model)
        else:
            loaded = _load_module(folder, description, model)
    return loaded.eval()


def _write(model: Any, folder: Path, config: Config | None) -> Description:
    projected = tuple(
        _describe(name, module) for name, module in model.named_modules() if isinstance(module, Projected)
    )
    library, name = _class_of(model), type(model).__name__
    if hasattr(model, "save_pretrained") and not projected:
        with quiet_transformers():
            model.save_pretrained(folder)
        return Description("pretrained", library, name, (), config)
    from safetensors.torch import save_file

    save_file(_unshared(model), folder / WEIGHTS, {"format": FORMAT})
    if library:
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
    return Description("module", library, name, projected, config)


def _class_of(model: nn.Module) -> str:
    """ "transformers" if that has the model's class under its name."""
    if type(model).__module__.partition(".")[0] != "transformers":
        return ""
    import transformers

    return "transformers" if getattr(transformers, type(model).__name__, None) is type(model) else ""


def _describe(name: str, module: Any) -> ProjectedLayer:
    options: dict[str, Any] = {field: getattr(module, field, None) for field in _OPTIONS}
    return ProjectedLayer(name, type(module).__name__, module.rank, module.fixed, **options)


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state, each tensor once and in memory of its own."""
    seen, found = set(), {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        found[name] = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    return found


def _to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(aside: Path, folder: Path) -> None:
    """Renames to `folder`. If there is one, it is out of the way for the moment between two renames, and comes back if
    the second fails. Of a symbolic link, it is the folder that it leads to."""
    folder = folder.resolve()
    if not folder.exists():
        aside.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    folder.rename(old)
    try:
        aside.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _description(folder: Path) -> Description:
    path = folder / DESCRIPTION
    if folder.is_dir() and not path.is_file():
        raise FileFormatError(f"{folder} is no model that rmtkd saved: it has no {DESCRIPTION}")
    if path.stat().st_size > MAX_DESCRIPTION:
        raise FileFormatError(f"{path} is longer than {MAX_DESCRIPTION} bytes: it is none of rmtkd's")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged ({error}): copy it again") from error
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise FileFormatError(f"{path} is no {FORMAT} file")
    version = found.pop("format_version", None)
    if version != VERSION:
        advice = "update it" if isinstance(version, int) and version > VERSION else "save the model anew"
        raise FileFormatError(f"{path} has format version {version!r:.20}, this rmtkd reads {VERSION}: {advice}")
    description = decode(Description, found, str(path))
    if description.form not in ("pretrained", "module"):
        raise FileFormatError(f"{path} has {description.form!r:.40} for form: save the model anew")
    return description


def _load_pretrained(folder: Path, description: Description, model: nn.Module | None) -> nn.Module:
    if model is not None and type(model).__name__ != description.model:
        raise FileFormatError(f"{folder} holds a {description.model:.80}, not a {type(model).__name__}")
    kind: Any = _class_named(folder, description) if model is None else type(model)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)  # is not written to config.json
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with quiet_transformers():
            loaded, told = kind.from_pretrained(
                folder, dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
    except Exception as error:  # transformers and safetensors raise what they like on damaged files
        raise FileFormatError(f"{folder} is damaged, or not what it says ({error!s:.300}): copy it again") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := told.get(fault):
            some = ", ".join(map(str, list(names)[:3]))
            raise FileFormatError(f"{folder} does not hold a {description.model}: {fault.replace('_', ' ')} {some}")
    module: nn.Module = loaded
    return module


def _class_named(folder: Path, description: Description) -> type:
    if description.library != "transformers":
        raise ModelError(
            f"{folder} holds a {description.model:.80}, which is not a class of transformers: give load() an instance, "
            "model=..."
        )
    import transformers

    kind = getattr(transformers, description.model, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise FileFormatError(f"{folder}: this transformers has no model {description.model!r:.80}; update it")
    return kind


def _load_module(folder: Path, description: Description, model: nn.Module | None) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    base = _from_config(folder, description) if model is None else copy.deepcopy(model).cpu()
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{folder / WEIGHTS} is missing or damaged ({error}): copy it again") from error
    for layer in description.projected:
        projected = _projected(base, layer, tensors, folder)
        if layer.name:
            base.set_submodule(layer.name, projected)
        else:
            base = projected
    _fill(base, tensors, folder)
    return base


def _from_config(folder: Path, description: Description) -> nn.Module:
    kind: Any = _class_named(folder, description)
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        base: Any = kind(config)
        if base.can_generate() and (folder / "generation_config.json").is_file():
            base.generation_config = type(base.generation_config).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises what it likes on damaged files
        raise FileFormatError(f"the config in {folder} is missing or damaged ({error!s:.300})") from error
    module: nn.Module = base
    return module


def _projected(base: nn.Module, layer: ProjectedLayer, tensors: dict[str, Tensor], folder: Path) -> Any:
    """The layer with the file's tensors, if there is a dense one of that shape in its place."""
    kind: Any = _KINDS.get(layer.kind)
    if kind is None:
        raise FileFormatError(f"{folder}: {layer.name} is a {layer.kind!r:.40}, and there is no such layer")
    try:
        dense: Any = base.get_submodule(layer.name)
        wanted: tuple[int, ...] = tuple(dense.weight.shape)
    except AttributeError as error:
        raise FileFormatError(f"{folder} projects {layer.name!r:.80}, which the model has no layer for") from error
    options = {field: getattr(layer, field) for field in _OPTIONS if getattr(layer, field) is not None}
    prefix = f"{layer.name}." if layer.name else ""
    parts = [tensors.get(prefix + factor) for factor in kind.factors]
    bias = tensors.get(f"{prefix}bias")
    try:
        projected: Any = kind(*parts, *(() if bias is None else (bias,)), fixed=layer.fixed, **options)
    except (RmtkernelsError, AttributeError, TypeError) as error:
        raise FileFormatError(f"{folder}: {layer.name} is damaged ({error})") from error
    found = tuple(projected.weight.shape)
    if type(dense).__name__ == "Conv1D":
        found = found[::-1]
    if projected.rank != layer.rank or found != wanted:
        raise FileFormatError(
            f"{folder}: {layer.name} has rank {projected.rank} and shape {found}, where the description says rank "
            f"{layer.rank} and the model has {wanted}"
        )
    return projected


def _fill(base: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Gives the model the file's tensors, in the file's dtypes; what is tied to one of them gets it too."""
    state = base.state_dict()
    if unknown := sorted(set(tensors) - set(state)):
        raise FileFormatError(f"{folder} has tensors that the model does not: {', '.join(unknown[:3])}")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(state[name].shape)} in the model"
            raise FileFormatError(f"{folder}: {name} is {shapes}")
    places = {state[name].data_ptr() for name in tensors}
    if missing := [name for name in state if name not in tensors and state[name].data_ptr() not in places]:
        raise FileFormatError(f"{folder} lacks tensors of the model: {', '.join(missing[:3])}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            target = getattr(base.get_submodule(owner), leaf)
            target.data = target.data.to(tensor.dtype)
            target.copy_(tensor)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bar for what takes a moment, and no report of what is missing: our errors tell what matters."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
