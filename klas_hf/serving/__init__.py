"""A language supernet behind the OpenAI protocol, by the server of transformers: each request on the path it pays for."""

from klas_hf.serving.app import build_app, run_app
from klas_hf.serving.paths import ServedSupernet

__all__ = ["ServedSupernet", "build_app", "run_app"]
