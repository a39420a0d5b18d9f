"""Models: CLIPs with one interface for all architectures, and frozen latent diffusion models."""
