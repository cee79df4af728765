"What every registered method promises; a new method is tested here without a line being added"
import inspect

import numpy as np, pytest, torch
from fastai.learner import Learner
from torch import nn

import self_supervised.all as ssl
from self_supervised.core import SSLCallback, ssl_methods
from self_supervised.data import tensor_dls

methods = ssl_methods()

def encoder(n_in=1): return nn.Sequential(nn.Conv2d(n_in,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def learner(name, n_in=1, labelled=False):
    m,small = methods[name],dict(jitter=False, bw=False, blur=False, stats=None)
    pars = inspect.signature(m.get_aug_pipelines).parameters
    augs = m.get_aug_pipelines(**(dict(num_crops=(2,2), crop_sizes=(12,6)) if 'num_crops' in pars else dict(size=12)), **small)
    x,y = torch.randint(0, 256, (32,n_in,14,14), dtype=torch.uint8),torch.arange(32)%4
    sizes = dict(n_protos=10) if 'n_protos' in inspect.signature(m.create_model).parameters else {}
    cb_pars = inspect.signature(m.callback).parameters
    args = {k:v for k,v in dict(crop_assgn_ids=[0,1], K=16, queue_start_pct=0.).items() if k in cb_pars}
    return Learner(tensor_dls(*(((x,y),(x[:8],y[:8])) if labelled else (x,x[:8])), bs=8), m.create_model(encoder(n_in), hidden_size=16, projection_size=8, **sizes),
                   cbs=m.callback(augs, **args))

def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)

pytestmark = pytest.mark.parametrize('name', methods)

def test_registered_names(name):
    m = methods[name]
    assert issubclass(m.callback, SSLCallback) and m.create_model.__name__==f'create_{name}_model' and m.get_aug_pipelines.__name__==f'get_{name}_aug_pipelines'
    assert m.callback.__module__==f'self_supervised.vision.{name}'
    for o in m: assert getattr(ssl, o.__name__) is o

@pytest.mark.parametrize('n_in', [1, 3, 4])
@pytest.mark.parametrize('labelled', [False, True])
def test_trains(name, n_in, labelled):
    "Finite losses, a gradient for every parameter, and weights that move"
    learn,no_grad = learner(name, n_in, labelled),set()
    before = {k:v.clone() for k,v in learn.model.named_parameters()}
    class Grads(ssl.SSLCallback.__base__):
        order = 30
        def after_backward(self):
            no_grad.update(k for k,p in self.learn.model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum()>0)
    quiet(learn, 2, cbs=Grads())
    assert np.isfinite(learn.recorder.losses).all()
    quiet_bias = {k for k in no_grad if k.endswith('bias')} # a bias in front of a batch norm or a normalisation may have none
    assert no_grad==quiet_bias, f'no gradient for {no_grad-quiet_bias}'
    moved = {k for k,v in learn.model.named_parameters() if not torch.equal(v, before[k])}
    assert set(before)-moved <= quiet_bias

def test_own_things_are_put_back(name):
    learn = learner(name)
    own,model = learn.loss_func,learn.model
    quiet(learn, 1)
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False); learn.validate()
    assert learn.loss_func is own and learn.model is model

def test_same_seed_same_run(name):
    def run():
        torch.manual_seed(0); learn = learner(name); learn.dls.train.rng.seed(0); quiet(learn, 1)
        return torch.cat([o.flatten() for o in learn.model.parameters()])
    assert torch.equal(run(), run())

def test_features_and_show(name):
    learn = learner(name)
    n = len(getattr(learn, learn.cbs[-1].name).aug_pipelines)
    assert len(learn.cbs[-1].show(n=2))==2*n
    assert learn.model.eval()(torch.rand(4,1,14,14)).shape==(4,8) # one batch of images: the encoder's features
