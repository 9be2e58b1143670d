"""`examine_anchors`: everything that can be known of a pair of anchors before a weight is read.

Configurations, tokenizers or image processors, model cards and the headers of the safetensors files are read; MACs and
parameters are counted on the meta device.
"""

from collections.abc import Iterable

from huggingface_hub import ModelCard
from transformers.utils import cached_file

from klas_hf.anchors.families import decoder_family
from klas_hf.anchors.language import anchor_config
from klas_hf.anchors.vision import is_vision
from klas_hf.cli.examine_images import Configs, Tensors, examine_classifiers, grids_finding, kept_classifier_keys
from klas_hf.cli.examine_text import (
    block_parameters_finding,
    blocks_finding,
    calibration_keys,
    examine_decoders,
    kept_decoder_keys,
)
from klas_hf.cli.findings import Examination, Finding, Reading, attempted, ok, problem, warning
from klas_hf.cli.headers import stored_tensors
from klas_hf.cli.output import human_bytes, human_count, names
from klas_hf.costs import measure_costs, measure_stitch_costs
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.paths import Stitch
from klas_hf.stitch_costs import StitchCosts
from klas_hf.stitching.images import check_grids, common_size

__all__ = ["examine_anchors"]

_DTYPES = {"float32": 4, "bfloat16": 2}


def examine_anchors(
    source: str, target: str, *, stitch: Stitch | tuple[int, int] | None = None, tokens: int = 128
) -> Examination:
    """Look at two anchors before anything is loaded.

    Args:
        source, target: Hub ids or folders; the source is the cheaper one.
        stitch: what it reads and costs is said too; None looks at the anchors only.
        tokens: sequence length that a language model's MACs are counted for.

    Returns:
        Findings. Where the anchors are of different or unknown kinds, these are the only ones.

    Raises:
        OSError: an anchor's config.json cannot be had.
        ValueError: transformers does not know a configuration's type.

    Example:
        >>> for model, name in ((source, "small"), (target, "large")):
        ...     model.save_pretrained(folder / name)
        >>> found = examine_anchors(folder / "small", folder / "large", stitch=(2, 3))
        >>> found.ok, [finding.found for finding in found.of("direction")]
        (True, ['the source is the cheaper one'])
        >>> model = StitchedModel.from_anchors(folder / "small", folder / "large", stitch=(2, 3), calibration=batches)
        >>> found.memory["float32"] == 4 * model.num_parameters()  # bytes
        True
    """
    pair = str(source), str(target)
    chosen = None if stitch is None else Stitch.of(stitch)
    asked = None if chosen is None else (chosen.source_stop, chosen.target_start)
    configs = anchor_config(pair[0]), anchor_config(pair[1])
    findings = _kinds(configs)
    if any(finding.level == "problem" for finding in findings):
        return Examination(*pair, asked, tuple(findings))
    vision = is_vision(configs[0])
    findings += examine_classifiers(pair, configs) if vision else examine_decoders(pair, configs)
    counted, costs = _counted(configs, tokens, chosen)
    findings += counted
    findings += [_licences(pair), *_stored(pair, findings)]
    blocking = {"weights", "blocks", "image size", "stitch", "costs"}
    if chosen is None or costs is None or any(f.level == "problem" and f.subject in blocking for f in findings):
        return Examination(*pair, asked, tuple(findings))
    tensors = stored_tensors(pair[0]), stored_tensors(pair[1])
    readings, besides = _readings(pair, tensors, configs, chosen)
    parameters = costs.of(chosen)[1]
    memory = {name: parameters * width for name, width in _DTYPES.items()}
    findings += [_reading_finding(readings, besides), _memory_finding(memory)]
    return Examination(*pair, asked, tuple(findings), readings, memory)


def _kinds(configs: Configs) -> list[Finding]:
    """Whether both are of one kind, and of one that can be stitched."""
    vision = [is_vision(config) for config in configs]
    if vision[0] != vision[1]:
        kinds = ["an image classifier" if one else "a language model" for one in vision]
        return [problem("kind", f"the source is {kinds[0]}, the target {kinds[1]}", "choose two of one kind")]
    known = vision_kind if vision[0] else decoder_family
    found = []
    for config in configs:
        try:
            known(config)
        except ValueError as error:
            found.append(problem("kind", str(error)))
    return found or [ok("kind", f"two {'image classifiers' if vision[0] else 'language models'}")]


def _counted(configs: Configs, tokens: int, stitch: Stitch | None) -> tuple[list[Finding], StitchCosts | None]:
    """Blocks, costs and direction; and the stitch, if one was asked about."""
    vision = is_vision(configs[0])
    try:
        size = common_size(configs) if vision else None
        costs = measure_stitch_costs(*configs, tokens=tokens, image_size=size)
    except ValueError as error:
        return [problem("costs", str(error))], None
    findings = [grids_finding(configs, costs) if vision else blocks_finding(configs)]
    parameters = [measure_costs(config, tokens=tokens, image_size=size).parameters for config in configs]
    findings.append(ok("costs", _costs(costs, parameters)))
    findings.append(attempted("direction", lambda: _direction(costs)))
    if not vision and findings[-1].level == "ok":
        findings += block_parameters_finding(costs)
    if stitch is not None:
        findings.append(attempted("stitch", lambda: _stitch(configs, costs, stitch)))
    return findings, costs


def _costs(costs: StitchCosts, parameters: list[int]) -> str:
    per = f"a sequence of {costs.tokens} tokens" if costs.tokens else "an image"
    totals = costs.source_total, costs.target_total
    sides = [
        f"{human_count(count)} parameters and {human_count(macs)} MACs"
        for count, macs in zip(parameters, totals, strict=True)
    ]
    between = costs.macs[:, 1:][costs.possible[:, 1:]]
    stitches = f"; stitches {human_count(between.min())} to {human_count(between.max())} MACs" if len(between) else ""
    return f"source {sides[0]}, target {sides[1]} for {per}{stitches}"


def _direction(costs: StitchCosts) -> str:
    costs.check_direction()
    return "the source is the cheaper one"


def _stitch(configs: Configs, costs: StitchCosts, stitch: Stitch) -> str:
    if is_vision(configs[0]):
        check_grids(configs, stitch.path, (costs.image_height, costs.image_width))
    macs, parameters = costs.of(stitch)
    return (
        f"{stitch}: {human_count(parameters)} parameters, {human_count(macs)} MACs ({macs / costs.target_total:.0%} of "
        "the target's)"
    )


def _licences(pair: tuple[str, str]) -> Finding:
    """The licences that the anchors' cards state."""
    from klas_hf.hub.licences import carried_licence, named, stated_licence

    stated = {name: stated_licence(_card(name)) for name in pair}
    labels = [licence.label if licence else "none stated" for licence in stated.values()]
    try:
        carried = carried_licence(stated)
    except ValueError:
        remedy = "read both, and name the one that holds for the stitched model when you publish it"
        return warning("licence", f"source {labels[0]}, target {labels[-1]}", remedy)
    if carried is None:
        return warning("licence", "the anchors' cards state none", "look for it before you publish a stitched model")
    if named(carried):
        remedy = "to publish, name the repository Llama-…; its page has to say “Built with Llama” (the card does)"
        return warning("licence", f"{carried.label} for both", remedy)
    return ok("licence", f"{carried.label} for both")


def _card(anchor: str) -> ModelCard | None:
    path = cached_file(anchor, "README.md", _raise_exceptions_for_missing_entries=False)
    return None if path is None else ModelCard.load(path, ignore_metadata_errors=True)


def _stored(pair: tuple[str, str], before: Iterable[Finding]) -> list[Finding]:
    """Files, sizes and dtypes of both anchors."""
    try:
        sides = [stored_tensors(name) for name in pair]
    except OSError as error:
        return [problem("weights", str(error))]
    shown, dtypes = [], []
    for tensors in sides:
        files = {tensor.file for tensor in tensors.values()}
        floats = sorted({tensor.dtype for tensor in tensors.values() if "F" in tensor.dtype})
        size = human_bytes(sum(tensor.bytes for tensor in tensors.values()))
        shown.append(f"{size} in {len(files)} file{'s' * (len(files) > 1)}")
        dtypes.append("/".join(floats))
    findings = [ok("weights", f"source {shown[0]}, target {shown[1]}, safetensors")]
    if dtypes[0] != dtypes[1]:
        found = f"source {dtypes[0]}, target {dtypes[1]}"
        return [
            *findings,
            warning("dtype", found, "the stitched model takes the target's unless --dtype says otherwise"),
        ]
    return [*findings, ok("dtype", f"{dtypes[0]} in both")]


def _readings(
    pair: tuple[str, str], tensors: tuple[Tensors, Tensors], configs: Configs, stitch: Stitch
) -> tuple[tuple[Reading, ...], int]:
    """What the stitched model reads of each anchor, and the bytes that the least-squares start needs besides."""
    if is_vision(configs[0]):
        kept = kept_classifier_keys(tensors, configs, stitch, common_size(configs))
        besides = sum(tensor.bytes for side in tensors for tensor in side.values())  # both anchors run whole
    else:
        kept = kept_decoder_keys(tensors, configs, stitch)
        besides = sum(tensors[1][key].bytes for key in calibration_keys(tensors[1], configs[1], stitch))
    readings = tuple(_reading(*side) for side in zip(pair, tensors, kept, strict=True))
    return readings, besides


def _reading(anchor: str, tensors: Tensors, kept: set[str]) -> Reading:
    read = [tensors[key] for key in sorted(kept)]
    numbers = [_numbers(tensor.shape) for tensor in read]
    files = tuple(sorted({tensor.file for tensor in read}))
    every = len({tensor.file for tensor in tensors.values()})
    return Reading(anchor, files, every, len(read), sum(tensor.bytes for tensor in read), sum(numbers))


def _numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _reading_finding(readings: tuple[Reading, ...], besides: int) -> Finding:
    sides = [
        f"{human_bytes(one.bytes)} of the {side}, {one.tensors} tensors from {len(one.files)} of {one.all_files} "
        f"files ({names(one.files)})"
        for side, one in zip(("source", "target"), readings, strict=True)
    ]
    return ok("reading", f"{'; '.join(sides)}; the least-squares start reads {human_bytes(besides)} more")


def _memory_finding(memory: dict[str, int]) -> Finding:
    return ok("memory", ", ".join(f"{human_bytes(size)} as {name}" for name, size in memory.items()))
