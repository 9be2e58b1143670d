"""To the Hugging Face Hub: models, probes and scores with a card written for them."""

from klas_hf.hub.cards import model_card
from klas_hf.hub.publishing import publish

__all__ = ["model_card", "publish"]
