"""DFRot Lab: why rotations make 4-bit language models work, as code one can read.

The walk: model → activations → rotation → quantized model → metrics → figure, one noun a module.
Importing the package is cheap: torch is loaded by the modules that compute, not by those that plot.
"""

__version__ = "0.1.0"
