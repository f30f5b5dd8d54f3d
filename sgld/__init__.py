"""sgld: a server and command line for diffusion models."""

__version__ = "0.1.0"
