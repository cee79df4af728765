"Self-supervised pretraining as fastai callbacks"
__version__ = "0.14.0"
