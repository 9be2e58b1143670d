"""A supernet of two tiny Llamas, as it is served."""

from saved_models import ascii_tokenizer
from tiny_models import tiny_model, token_ids

from klas_hf import StitchedSupernet, StitchedSupernetForCausalLM

PATHS = ["0[:2] 1[2:]", "0[:2] 1[4:]", "1[:2] 1[4:]"]


def supernet_of() -> StitchedSupernetForCausalLM:
    """Whose anchors read up to 60 and 100 tokens, and never end by themselves."""
    words = len(ascii_tokenizer())
    small = tiny_model(seed=1, vocab_size=words, max_position_embeddings=60)
    large = tiny_model(seed=2, large=True, vocab_size=words, max_position_embeddings=100)
    for anchor in (small, large):
        anchor.generation_config.eos_token_id = None
    return StitchedSupernet.from_anchors([small, large], PATHS, calibration=[token_ids(16, 12, seed=3)]).double()
