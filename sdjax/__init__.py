"""Stable Diffusion in JAX/Flax: drawing and fine-tuning."""
