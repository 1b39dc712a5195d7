"""The command `latent-shift`: parse, call one function, print."""
