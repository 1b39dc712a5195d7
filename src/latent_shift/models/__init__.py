"""Networks: named sizes, autoencoders, text encoders, the paper's baselines."""
