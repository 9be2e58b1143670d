"""Tasks that stitched models are trained for and measured on: their data, prompts and metrics."""

__all__ = ["rouge", "truthfulqa"]
