"""`klas-hf stitch`: a stitched model at its least-squares start, saved with tokenizer or image processor."""

from dataclasses import dataclass, field

from klas_hf.cli.data import DataOptions, load_material
from klas_hf.cli.output import OVERWRITE, check_output, human_count, save_model, say
from klas_hf.cli.parsing import Command, flag, positional, two
from klas_hf.paths import Stitch


@dataclass(frozen=True, kw_only=True)
class StitchOptions(DataOptions):
    """Options of `klas-hf stitch`."""

    source: str = positional("the cheaper anchor: Hub id or folder")
    target: str = positional("the dearer anchor")
    stitch: list[int] = two(
        "run the source's first I blocks, then the target's without its first J", int, ("I", "J"), required=True
    )
    output: str = field(metadata={"metavar": "FOLDER", "help": "where the model goes"})
    split: str = field(default="train", metadata={"help": "images that the stitching layer is fitted on"})
    samples: int | None = field(
        default=256, metadata={"metavar": "N", "help": "fit on at most so many sequences or images"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the stitched model; auto: the target's"})
    overwrite: bool = flag(OVERWRITE)


def run(options: StitchOptions) -> int:
    """Run `klas-hf stitch`; its exit status."""
    from klas_hf.costs import measure_costs
    from klas_hf.models import StitchedModel
    from klas_hf.processes import process_state

    stitch = Stitch(*options.stitch)
    output = check_output(options.output, options.overwrite)
    material = load_material(options, [options.source, options.target], options.split)
    sized = {} if options.image_size is None else {"image_size": options.image_size}
    model = StitchedModel.from_anchors(
        options.source, options.target, stitch, calibration=material.batches, calibration_items=options.samples,
        dtype=options.dtype, device_map={"": process_state().device}, **sized,
    )  # fmt: skip
    save_model(model, material.processor, output)
    cost, fit = measure_costs(model, tokens=options.length), model.config.joint_fits[0]
    say(
        f"stitch {stitch}: {human_count(cost.parameters)} parameters, {human_count(cost.macs)} MACs; the stitching "
        f"layer explains {fit['r2']:.1%} of the target's block {stitch.target_start}. Saved in {output}"
    )
    return 0


COMMAND = Command(
    "Join two anchors by a stitching layer fitted by least squares, and save the model.", StitchOptions, run
)
