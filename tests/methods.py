"A small Learner for every registered method: which arguments a method takes is read from its signatures"
import inspect
from contextlib import contextmanager
from functools import partial

import pytest, torch
from fastai.learner import Learner
from fastcore.foundation import L
from fasttransform import Pipeline
from torch import nn

import self_supervised.all # noqa: F401 (registers the methods)
from self_supervised.methods import ssl_methods
from self_supervised.data import tensor_dls

methods = ssl_methods()
plain   = dict(jitter=False, bw=False, blur=False, stats=None)

def taken(f, **kwargs):
    "Those of `kwargs` that `f` has"
    return {k:v for k,v in kwargs.items() if k in inspect.signature(f).parameters}

def encoder(n_in=1, bn=True):
    return nn.Sequential(nn.Conv2d(n_in,8,3), *([nn.BatchNorm2d(8)] if bn else []), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def model(name, n_in=1, enc=None, **kwargs):
    create = methods[name].create_model
    enc = encoder(n_in) if enc is None else enc
    if 'teacher' in inspect.signature(create).parameters: # a network to learn from, the same in every process
        with torch.random.fork_rng():
            torch.manual_seed(1)
            kwargs.setdefault('teacher', encoder(n_in, bn=False))
    return create(enc, **(taken(create, hidden_size=16, projection_size=8, n_protos=10) | kwargs))

def augs(name, size=12, **kwargs):
    get = methods[name].get_aug_pipelines
    return get(**taken(get, num_crops=(2,2), crop_sizes=(size,size//2), size=size, n=2), **(plain | kwargs))

def callback(name, aug_pipelines=None, **kwargs):
    cls = methods[name].callback
    return cls(augs(name) if aug_pipelines is None else aug_pipelines, **(taken(cls, crop_assgn_ids=[0,1], K=12, queue_start_pct=0.) | kwargs))

def _cut(i, size, x): return x[..., i:i+size, i//2:i//2+size]

def corners(*sizes):
    "View pipelines without chance: view i is a square from row i on"
    return [Pipeline([partial(_cut, i, o)], split_idx=0) for i,o in enumerate(sizes)]

def images(n=40, c=1, size=14): return torch.randint(0, 256, (n,c,size,size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def loaders(name, *xs, bs=8, **kwargs):
    "DataLoaders of images to train on and perhaps to validate on, with labels if the method needs them"
    return tensor_dls(*([(x, torch.arange(len(x))%4) for x in xs] if methods[name].callback.needs_labels else xs), bs=bs, **kwargs)

@contextmanager
def without_labels(name):
    "For what is done here with unlabelled data: a method that needs labels refuses it"
    if not methods[name].callback.needs_labels: yield
    else:
        with pytest.raises(ValueError, match='learns from labels and this data has none: .*label_func'): yield

def learner(name, dls=None, m=None, cb=None, cbs=(), **kwargs):
    dls = loaders(name, images(), images(12)) if dls is None else dls
    return Learner(dls, model(name) if m is None else m, cbs=[callback(name) if cb is None else cb, *L(cbs)], **kwargs)

def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return learn.fit(*args, **kwargs)
