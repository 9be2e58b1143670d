"""Arrays in, arrays out: divergences, least squares, similarities, estimates. Nothing here knows transformers."""
