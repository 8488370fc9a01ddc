"""The trainer: teaches a small connector to let a frozen language model drive a frozen diffusion model."""
