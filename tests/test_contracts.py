"What every registered method promises; a new method is tested here without a line being added"
import inspect
from contextlib import nullcontext

import numpy as np, pytest, torch
from fastai.callback.core import Callback

import self_supervised.all as ssl
from self_supervised.core import SSLCallback
from self_supervised.data import tensor_dls

from methods import augs, callback, encoder, images, learner, methods, model, quiet, without_labels

pytestmark = pytest.mark.parametrize('name', methods)

def test_registered_names(name):
    m = methods[name]
    assert issubclass(m.callback, SSLCallback) and m.create_model.__name__==f'create_{name}_model' and m.get_aug_pipelines.__name__==f'get_{name}_aug_pipelines'
    assert m.callback.__module__==f'self_supervised.vision.{name}'
    for o in (m.callback, m.model, m.create_model, m.get_aug_pipelines, m.loss): assert getattr(ssl, o.__name__) is o
    assert type(model(name)) is m.model

def test_arguments(name):
    "The same first arguments everywhere, so that methods can be exchanged"
    first = lambda f: list(inspect.signature(f).parameters)[:3]
    assert first(methods[name].create_model)==['encoder','hidden_size','projection_size']
    assert first(methods[name].callback)[0]=='aug_pipelines' and 'print_augs' in inspect.signature(methods[name].callback).parameters

@pytest.mark.parametrize('n_in', [1, 3, 4])
@pytest.mark.parametrize('labelled', [False, True])
def test_trains(name, n_in, labelled):
    "Finite losses, a gradient for every parameter that learns by gradients, and weights that move"
    x,y = images(32, n_in),torch.arange(32)%4
    learn,no_grad = learner(name, tensor_dls(*(((x,y),(x[:8],y[:8])) if labelled else (x,x[:8])), bs=8), model(name, n_in)),set()
    before = {k:v.clone() for k,v in learn.model.named_parameters()}
    class Grads(Callback):
        order = 30
        def after_backward(self):
            no_grad.update(k for k,p in self.learn.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum()>0))
    with nullcontext() if labelled else without_labels(name):
        quiet(learn, 2, cbs=Grads())
        assert np.isfinite(learn.recorder.losses).all()
        quiet_bias = {k for k in no_grad if k.endswith('bias')} # a bias in front of a batch norm or a normalisation may have none
        assert no_grad==quiet_bias, f'no gradient for {no_grad-quiet_bias}'
        still = {k for k,v in learn.model.named_parameters() if torch.equal(v, before[k])}
        frozen   = {k for k,p in learn.model.named_parameters() if not p.requires_grad}
        teachers = {k for k in still&frozen if k.endswith('bias') or not hasattr(getattr(learn.model, 'teacher', None), 'update')} # of one that follows, what follows such a bias; of one that is given, all
        assert still-teachers <= quiet_bias

def test_same_seed_same_run(name):
    def run():
        torch.manual_seed(0); learn = learner(name); learn.dls.train.rng.seed(0); quiet(learn, 1)
        return torch.cat([o.flatten() for o in learn.model.parameters()])
    assert torch.equal(run(), run())

def test_encoder(name):
    "It is a part of the model under its own name, the object that came in, and gives features of images of any size"
    enc = encoder()
    m = model(name, enc=enc)
    assert m.encoder is enc and m.encoder.eval()(torch.rand(4,1,14,14)).shape==(4,8)

def test_show(name):
    cb = callback(name)
    learn,V = learner(name, cb=cb),len(cb.aug_pipelines)
    assert getattr(learn, cb.name) is cb
    assert len(cb.show(n=3))==3*V # before any batch was seen
    quiet(learn, 1)
    axes = cb.show(n=2)
    assert len(axes)==2*V and all(len(o.images)==1 for o in axes)

def test_print_augs(name, capsys, monkeypatch):
    "Every pipeline, and on the first process only"
    callback(name, print_augs=True)
    assert capsys.readouterr().out.count('RandomCropResize')==len(augs(name))
    monkeypatch.setenv('RANK', '1'); callback(name, print_augs=True)
    assert capsys.readouterr().out==''
