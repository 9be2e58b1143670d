"""klas_hf: stitched models of the Hugging Face ecosystem (KLAS, ICLR 2026)."""

from klas_hf.models import StitchedConfig, StitchedForCausalLM, StitchedModel
