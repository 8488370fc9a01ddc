"""Recipes that go by name: `densebridge build ella_sd15`."""
