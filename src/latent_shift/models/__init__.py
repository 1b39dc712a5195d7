"""Networks: named sizes, autoencoders, text encoders, the paper's baselines."""


def __getattr__(name: str):
    if name == "unet":  # its former place; see former_names.py
        from latent_shift.models.sizes import unet

        return unet
    raise AttributeError(f"module 'latent_shift.models' has no attribute {name!r}")
