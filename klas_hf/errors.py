"""Errors that are no user's mistake."""


class TrainingDiverged(RuntimeError):
    """The loss or a gradient became NaN or infinite; the last checkpoint is kept.

    Example:
        >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 1), calibration=batches)
        >>> _ = model.lm_head.weight.data.fill_(float("nan"))
        >>> train_stitches(model, examples, TrainingConfig(trainable="stitch", max_steps=1))
        Traceback (most recent call last):
        klas_hf.errors.TrainingDiverged: got a loss of nan ...
    """
