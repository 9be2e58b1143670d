"""Probes: what each block of an anchor already says about the answer (KLAS Alg. 1)."""

from klas_hf.probes.images import ImageProbeConfig, ImageProbeNet
from klas_hf.probes.language import ProbeConfig, ProbeNet, fit_probes

__all__ = ["ImageProbeConfig", "ImageProbeNet", "ProbeConfig", "ProbeNet", "fit_probes"]
