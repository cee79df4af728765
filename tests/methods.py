"A small Learner for every registered method: which arguments a method takes is read from its signatures"
import inspect, warnings
from contextlib import contextmanager
from functools import partial

import pytest, torch
from fastai.callback.core import Callback
from fastai.layers import ConvLayer
from fastai.learner import Learner
from fastcore.foundation import L
from fasttransform import Pipeline
from torch import nn

import self_supervised.all # noqa: F401 (registers the methods)
from self_supervised.methods import ssl_methods
from self_supervised.data import fashion_mnist, tensor_dls
from self_supervised.diagnostics import CollapseMonitor

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

def worst_difference(many, one):
    "Of pairs of {name: tensor}, the largest difference, relative to the largest number of each tensor; what is less than a millionth of the largest of all is rounding"
    worst = 0.
    for a,b in zip(many, one, strict=True):
        assert {k:v.shape for k,v in a.items()}=={k:v.shape for k,v in b.items()}
        tops  = {k:v.abs().max() for k,v in b.items() if v.numel()}
        least = 1e-6*max(tops.values())
        worst = max(worst, *(((a[k]-b[k]).abs().max()/max(top, least)).item() for k,top in tops.items()))
    return worst

def small_encoder(bn=True):
    "1 channel → 24 features, without a ReLU, at whose corner a gradient has two values"
    return nn.Sequential(nn.Conv2d(1,6,3), *([nn.BatchNorm2d(6)] if bn else []), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())

class Record(Callback):
    "Of each batch the loss, what `also` takes from the Learner, the gradients of the step that it ended, and the state of the model"
    order = 90
    def __init__(self, also=lambda learn: ()): self.also = also
    def before_fit(self): self.steps,self.grads = [],None
    def before_step(self): self.grads = {k:p.grad.clone() for k,p in self.learn.model.named_parameters() if p.grad is not None} # after the last batch of a step
    def after_batch(self):
        if not self.training: return
        self.steps.append((float(self.learn.loss.detach()), *self.also(self.learn), self.grads, {k:v.clone() for k,v in self.learn.model.state_dict().items()}))
        self.grads = None

def monitored(create, cb, epochs=4, lr=3e-3, warmup=10):
    "What the monitor has seen of a fit on 1,024 images of Fashion-MNIST; `create` makes the model of an encoder with 64 features"
    torch.manual_seed(0)
    (x,_),_ = fashion_mnist()
    enc = nn.Sequential(ConvLayer(1,16,stride=2), ConvLayer(16,32,stride=2), ConvLayer(32,64,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learn = Learner(tensor_dls(x[:1024], bs=64, device='cpu', seed=0), create(enc), cbs=[cb, CollapseMonitor(every=4, warmup=warmup)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(learn, epochs, lr)
    return learn.collapse_monitor
