"""The precision of a base model's weights in training."""

from longqlora.config.settings import Method, Precision

BASE_PRECISION: dict[Method, Precision] = {"qlora": "nf4", "lora": "auto", "full": "float32"}
"""Precision of the base's weights, by method. Trained weights are float32, under autocast."""
