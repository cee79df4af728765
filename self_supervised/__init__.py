"Self-supervised pretraining as fastai callbacks"
__version__ = "0.13.0"
