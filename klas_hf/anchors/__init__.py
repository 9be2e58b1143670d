"""Anchors: pretrained models, read by blocks. One line of a table per family."""

from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.families import DECODER_FAMILIES, DecoderFamily, decoder_family
from klas_hf.anchors.language import LanguageAnchor, load_anchor

__all__ = [
    "DECODER_FAMILIES",
    "DecoderFamily",
    "LanguageAnchor",
    "TokenBatch",
    "decoder_family",
    "load_anchor",
    "token_batches",
]
