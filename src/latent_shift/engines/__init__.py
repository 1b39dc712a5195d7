"""Engines beside PyTorch: a model exported to ONNX, and what runs it without torch and diffusers."""
