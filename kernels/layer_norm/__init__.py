"""Layer normalization over channels, alone or with the GELU after it."""

from .op import layer_norm, layer_norm_backward, normalize

__all__ = ["layer_norm", "layer_norm_backward", "normalize"]
