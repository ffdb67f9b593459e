"""Self-supervised pretraining of Vision Transformers: MAE and DINO around one shared encoder."""

__version__ = "0.1.0"
