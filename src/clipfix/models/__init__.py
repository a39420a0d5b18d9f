"""What can be asked: CLIPs behind a few verbs, and generators as "latents in, predicted noise out"."""
