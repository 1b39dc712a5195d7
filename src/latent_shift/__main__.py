"""`python -m latent_shift` is the command `latent-shift`."""

from latent_shift.cli.main import main

main()
