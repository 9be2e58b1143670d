"""The delta form of a stitched model: which anchors, at which revisions, and the tensors that training changed.

    anchors at their revisions ─► as stitched ─► tensors of the delta in their place ─► LoRA merged ─► the model

A delta of stitching layers and LoRA has megabytes where the whole model has gigabytes. It is bound to the anchors'
exact bits: what is kept of each has a fingerprint, and others are refused. `from_pretrained` assembles it like any
checkpoint; `merge_delta` writes the whole form.
"""

import copy
import hashlib
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, __version__
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, cached_file

from klas_hf.hub.delta_tensors import (
    fingerprints,
    is_stitch,
    plain_tensors,
    replaced_by_adapter,
    same_bits,
    tied_heads,
)
from klas_hf.models import (
    StitchedForCausalLM,
    StitchedForImageClassification,
    StitchedModel,
    StitchedVisionConfig,
)
from klas_hf.models.checkpoint_files import (
    HUB_OPTIONS,
    check_inside,
    check_whole,
    explained_damage,
)
from klas_hf.models.replacing import finish_replacing, replacing
from klas_hf.paths import Path as AnchorPath
from klas_hf.processes import others_bars
from klas_hf.stitching.assembly import assemble_path
from klas_hf.stitching.loading import RANDOM_STITCH

if TYPE_CHECKING:
    from peft import PeftModel

_TENSORS, _ADAPTER = "delta.safetensors", "adapter"
_WHOLE = ("model.safetensors", "model.safetensors.index.json")
_CLASSES = {kind.__name__: kind for kind in (StitchedForCausalLM, StitchedForImageClassification)}


@dataclass(frozen=True)
class Delta:
    """What config.json says of a delta, beside the anchors' names and revisions.

    Attributes:
        dtype: of the model, such as "bfloat16".
        fingerprints: of each slice's tensors, in that dtype; the last slice's has the head.
        adapter: subfolder of the PEFT adapter, or None.
        transformers: its version, on which the tensors' names depend.
        files: SHA-256 of each safetensors file; None of a delta that was saved without.
    """

    dtype: str
    fingerprints: list[str]
    adapter: str | None
    transformers: str
    files: dict[str, str] | None = None


def save_delta(model: "StitchedModel | PeftModel", folder: str | Path) -> None:
    """Save the stitching layers and every tensor that differs from the anchors', bit for bit, without the anchors.

    Args:
        model: a stitched language model or image classifier whose anchors are on the Hub or in local folders; or a
            PeftModel around one, whose adapter is saved as PEFT does. (LoRA that was merged is no longer small.)
        folder: gets config.json, delta.safetensors, the adapter, and the code that loads them; other files stay.

    Raises:
        TypeError: not such a model.
        ValueError: anchors that were only in memory; a quantised or offloaded model; an adapter that cannot be merged;
            a folder that holds a whole model.
        OSError: an anchor cannot be reached.

    Example:
        >>> for model, name in ((source, "small"), (target, "large")):
        ...     model.save_pretrained(folder / name)
        >>> model = StitchedModel.from_anchors(folder / "small", folder / "large", stitch=(2, 1), calibration=batches)
        >>> save_delta(model, folder / "delta")
        >>> again = StitchedModel.from_pretrained(folder / "delta")
        >>> torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)
        True
    """
    folder = Path(folder)
    _check_folder(folder)
    stitched, adapter = _parts(model)
    config = copy.deepcopy(stitched.config)
    config.architectures = [type(stitched).__name__]
    config.auto_map = vars(config).get("auto_map", {}) | stitched.carried_classes
    reference = _from_anchors(config, stitched.dtype, {})
    used = dict(zip(AnchorPath.parse(config.path).anchors, reference.config.anchor_revisions, strict=True))
    config.anchor_revisions = [used.get(place) for place in range(len(config.anchor_names))]
    config.anchor_names = [name and _lasting(name) for name in config.anchor_names]
    config.dtype = str(stitched.dtype).removeprefix("torch.")
    theirs = reference.state_dict()
    ours = plain_tensors(stitched.state_dict(), set(theirs), adapted=adapter is not None)
    known = replaced_by_adapter(stitched.state_dict()) | tied_heads(stitched, ours)
    changed = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in ours.items()
        if name not in known and (is_stitch(name) or not same_bits(tensor, theirs[name]))
    }
    with replacing(folder) as part:
        save_file(changed, part / _TENSORS, metadata={"format": "pt"})
        if adapter:
            model.save_pretrained(part / _ADAPTER, save_embedding_layers=False)
        files = {str(file.relative_to(part)): _sha256(file) for file in sorted(part.rglob("*.safetensors"))}
        marks = fingerprints(theirs, len(config.slices))
        config.delta = asdict(Delta(config.dtype, marks, adapter, __version__, files))
        custom_object_save(stitched, part, config=config)
        config.save_pretrained(part)
        if stitched.can_generate():
            stitched.generation_config.save_pretrained(part)
    stitched.save_processor(folder)
    if not adapter and (folder / _ADAPTER).is_dir():  # of an older delta
        shutil.rmtree(folder / _ADAPTER)


def load_delta(cls: type[PreTrainedModel], name: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Assemble a model of class `cls` from a delta; `from_pretrained` calls it.

    Args:
        name: folder or Hub id.
        kwargs: as for `from_pretrained`; token, cache_dir and local_files_only serve the anchors too.

    Raises:
        OSError: a file of the delta or an anchor is missing or damaged.
        ValueError: an anchor's tensors are not those that the delta was made over.
    """
    hub = {option: kwargs.pop(option) for option in HUB_OPTIONS if option in kwargs}
    for option in ("use_safetensors", "adapter_kwargs", "trust_remote_code"):  # of files that a delta does not have
        kwargs.pop(option, None)
    finish_replacing(name)
    stored = cls.config_class.from_pretrained(name, **hub)
    delta = Delta(**stored.delta)
    config, kwargs = _asked_config(cls, name, hub, kwargs)
    files = [_TENSORS]
    if delta.adapter:
        check_inside(name, delta.adapter)
        files += [f"{delta.adapter}/{ADAPTER_SAFE_WEIGHTS_NAME}", f"{delta.adapter}/{ADAPTER_CONFIG_NAME}"]
    with explained_damage(name, hub, files[:2]):
        paths = [Path(cached_file(name, file, **hub)) for file in files]
        for file, path in zip(files[:2], paths[:2], strict=False):
            _check_file(file, path, delta)
        tensors, *adapter = (load_file(path) for path in paths[:2])
    reference = _from_anchors(stored, getattr(torch, delta.dtype), hub)
    theirs, tied = reference.state_dict(), reference.all_tied_weights_keys
    _check_fingerprints(stored, delta, fingerprints(theirs, len(stored.slices)))
    brought = {*tensors, *(key.removeprefix("base_model.model.") for one in adapter for key in one)}
    check_whole(name, {key for key in theirs if is_stitch(key) and key not in brought})
    state = theirs | tensors
    for head, embedding in tied.items():  # two tensors, which an adapter may tell apart
        state[head] = tensors.get(head, state[embedding if stored.tie_word_embeddings else head]).clone()
    if delta.adapter:
        # PEFT trains in float32 what it adapts in half precision, unless told otherwise, and rounding differs.
        in_float32 = torch.float32 in {tensor.dtype for tensor in adapter[0].values()}
        state = _merged(stored, state, paths[1].parent, in_float32)
    config.delta = None
    if tied and stored.tie_word_embeddings:
        config.tie_word_embeddings = all(same_bits(state[head], state[embedding]) for head, embedding in tied.items())
    with others_bars():
        loaded = cls.from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
    model = loaded[0] if kwargs.get("output_loading_info") else loaded
    if model.can_generate() and kwargs.get("generation_config") is None:
        model.generation_config = GenerationConfig.from_pretrained(name, **hub)
    model.name_or_path = model.config.name_or_path = str(name)
    return loaded


def merge_delta(delta: str | Path, output: str | Path, **hub: Any) -> None:
    """Write the whole form of a delta, which gives the same outputs and needs no anchors.

    Args:
        delta: folder or Hub id.
        output: folder for the model; other files of the delta (tokenizer, image processor, model card) go along, but
            replace none there.
        hub: revision, token, cache_dir, local_files_only.

    Raises:
        ValueError: not a delta, or `output` is the delta's own folder; else as `from_pretrained`.

    Example:
        >>> for model, name in ((source, "small"), (target, "large")):
        ...     model.save_pretrained(folder / name)
        >>> model = StitchedModel.from_anchors(folder / "small", folder / "large", stitch=(2, 1), calibration=batches)
        >>> save_delta(model, folder / "delta")
        >>> merge_delta(folder / "delta", folder / "whole")
        >>> (folder / "whole" / "model.safetensors").exists(), (folder / "delta" / "model.safetensors").exists()
        (True, False)
    """
    output = Path(output)
    folder = Path(delta) if Path(delta).is_dir() else Path(snapshot_download(str(delta), **hub))
    if not (folder / _TENSORS).is_file():
        raise ValueError(f"got {str(delta)!r}, which has no {_TENSORS}; expected a delta. Make one with save_delta")
    if folder.resolve() == output.resolve():
        raise ValueError(f"got {str(output)!r} for both delta and output; expected another folder for the whole model")
    StitchedModel.from_pretrained(delta, **hub).save_pretrained(output)
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        own = relative.parts[0] == _ADAPTER or relative.name == _TENSORS or relative.parts[0].startswith(".")
        if file.is_file() and not own and not (output / relative).exists():
            (output / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, output / relative)


def _check_folder(folder: Path) -> None:
    whole = [name for name in _WHOLE if (folder / name).exists()]
    if whole:
        raise ValueError(
            f"got {str(folder)!r}, which holds a whole model ({whole[0]}); expected a folder for the delta alone. "
            "Choose another one"
        )


def _parts(model: Any) -> tuple[StitchedModel, str | None]:
    """The stitched model, and the subfolder of its adapter."""
    stitched, adapter = model, None
    if not isinstance(model, PreTrainedModel):
        from peft import PeftModel  # seconds to import

        if isinstance(model, PeftModel):
            stitched, adapter = model.get_base_model(), _checked_adapter(model)
    if type(stitched).__name__ not in _CLASSES or not isinstance(stitched, StitchedModel):
        raise TypeError(
            f"got a {type(stitched).__name__}; expected one of {sorted(_CLASSES)}, or a PeftModel around one"
        )
    if "quantization_config" in vars(stitched.config):
        raise ValueError("got a quantised model; expected one with the anchors' own tensors. Quantise after loading")
    return stitched, adapter


def _checked_adapter(model: "PeftModel") -> str:
    """The subfolder in which PEFT saves the model's adapter."""
    if len(model.peft_config) > 1:
        raise ValueError(
            f"got the adapters {sorted(model.peft_config)}; expected one. Delete the others (model.delete_adapter)"
        )
    (name, config), = model.peft_config.items()  # fmt: skip
    if config.is_prompt_learning:
        raise ValueError(
            f"got an adapter of type {config.peft_type.value}, which cannot be merged into the model; expected "
            "one that can, such as LoRA"
        )
    return _ADAPTER if name == "default" else f"{_ADAPTER}/{name}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(name: str, path: Path, delta: Delta) -> None:
    """Raise OSError where a file is not the one that was saved; one that is no safetensors file is found when read."""
    expected = (delta.files or {}).get(name)
    if expected is not None and (got := _sha256(path)) != expected:
        raise OSError(f"{name} is damaged (its SHA-256 is {got[:12]}…, expected {expected[:12]}…)")


def _check_fingerprints(config: PreTrainedConfig, delta: Delta, found: Sequence[str]) -> None:
    for (place, *_), expected, got in zip(config.slices, delta.fingerprints, found, strict=True):
        if got != expected:
            name, revision = config.anchor_names[place], config.anchor_revisions[place]
            at = f" at revision {revision}" if revision else ""
            raise ValueError(
                f"got another anchor {place}, {name!r}{at}, than the delta was made over: the fingerprint of its kept "
                f"tensors is {got[:12]}…, expected {expected[:12]}… (with transformers {delta.transformers}; here is "
                f"{__version__}). Restore the anchor, or use the whole form (merge_delta, where the delta still loads)"
            )


def _from_anchors(config: PreTrainedConfig, dtype: torch.dtype, hub: dict[str, Any]) -> StitchedModel:
    """The model as the anchors alone give it, its stitching layers random."""
    path = AnchorPath.parse(config.path)
    for place in path.anchors:
        if not config.anchor_names or not config.anchor_names[place]:
            raise ValueError(
                f"got a model whose anchor {place} was only in memory; expected all anchors on the Hub or in local "
                "folders, as a delta refers to them. Save it and pass its folder to from_path, or save the model whole"
            )
    options = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    if config.identity_joints:
        options["joint"] = "identity"
    if isinstance(config, StitchedVisionConfig) and config.image_size:
        options["image_size"] = tuple(config.image_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape(RANDOM_STITCH))
        names, revisions = ([of_all[place] for place in path.anchors] for of_all in (
            config.anchor_names, config.anchor_revisions))  # fmt: skip
        among_used = tuple(replace(one, anchor=path.anchors.index(one.anchor)) for one in path.slices)
        return assemble_path(names, AnchorPath(among_used), dtype=dtype, revisions=revisions, **options)


def _lasting(name: str) -> str:
    """A local folder by its absolute path, a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _asked_config(
    cls: type[PreTrainedModel], name: str | Path, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration with what the caller wants changed, and the options that are not of the configuration."""
    given = kwargs.pop("config", None)
    if isinstance(given, PreTrainedConfig):  # an Auto class made it
        return copy.deepcopy(given), kwargs
    of_model = {o: kwargs.pop(o) for o in ("dtype", "torch_dtype", "quantization_config") if o in kwargs}
    config, rest = cls.config_class.from_pretrained(given or name, return_unused_kwargs=True, **hub, **kwargs)
    return config, rest | of_model


def _merged(config: PreTrainedConfig, state: dict[str, Tensor], adapter: Path, in_float32: bool) -> dict[str, Tensor]:
    """The tensors with an adapter merged into them, as PEFT does."""
    from peft import PeftModel

    plain = copy.deepcopy(config)
    plain.delta, plain.tie_word_embeddings = None, False
    (name,) = config.architectures
    with others_bars():
        model = _CLASSES[name].from_pretrained(None, config=plain, state_dict=state, dtype=config.dtype)
    return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=in_float32).merge_and_unload().state_dict()
