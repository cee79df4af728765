"SimCLR: the loss and its gradient against the written-out definition, its memory, and a whole training step"
import math
from copy import deepcopy

import pytest, torch
from fastai.callback.core import Callback
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from self_supervised.basics import block_rows
from self_supervised.data import tensor_dls
from self_supervised.vision import simclr
from self_supervised.vision.simclr import DistributedSimCLR, SimCLR, create_simclr_model, get_simclr_aug_pipelines, nt_xent_loss
from self_supervised.vision.swav import get_swav_aug_pipelines

from methods import corners, images, learner, plain, quiet

def rand(n, d=6, seed=0): return 3*torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def slow_nt_xent(z, V, temp):
    "The definition with autograd's own gradient, one pair at a time"
    n,B = len(z),len(z)//V
    z = z/z.square().sum(1, keepdim=True).sqrt()
    terms = []
    for i in range(n):
        negatives = [(z[i]*z[j]).sum()/temp for j in range(n) if j%B!=i%B]
        for p in range(n):
            if p!=i and p%B==i%B:
                s = (z[i]*z[p]).sum()/temp
                terms.append(torch.stack([s, *negatives]).exp().sum().log()-s)
    return torch.stack(terms).mean()

def plain_nt_xent(z, temp):
    "Two views as one matrix: cross-entropy over the other 2B-1 views"
    z,n = F.normalize(z, dim=1),len(z)
    s = (z@z.T/temp).masked_fill(torch.eye(n, dtype=torch.bool), -math.inf)
    return F.cross_entropy(s, (torch.arange(n)+n//2)%n)

def loss_and_grad(f, z, *args, **kwargs):
    z = z.clone().requires_grad_()
    loss = f(z, *args, **kwargs); loss.backward()
    return loss.detach(),z.grad


@pytest.mark.parametrize('rows', [1, 5, 1000]) # of similarities at a time
@pytest.mark.parametrize('V,B', [(2,2), (2,7), (3,4), (8,3)])
def test_loss_equals_reference(V, B, rows, monkeypatch):
    monkeypatch.setattr(simclr, 'block_rows', lambda *_: rows)
    z = rand(V*B)
    loss,grad = loss_and_grad(nt_xent_loss, z, .3, n_views=V)
    assert loss.item() == pytest.approx(reference.nt_xent(z.numpy(), V, .3), rel=1e-10)
    torch.testing.assert_close((loss, grad), loss_and_grad(slow_nt_xent, z, V, .3), rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize('temp', [.05, .5])
def test_two_views_are_the_plain_form(temp):
    z = rand(600, 32)
    torch.testing.assert_close(loss_and_grad(nt_xent_loss, z, temp), loss_and_grad(plain_nt_xent, z, temp), rtol=1e-9, atol=1e-12)
    half = z.float()
    torch.testing.assert_close(loss_and_grad(nt_xent_loss, half, temp), loss_and_grad(plain_nt_xent, half, temp), rtol=1e-4, atol=1e-7)

def test_gradient_of_a_multiple():
    "As under a gradient scaler"
    z = rand(8)
    _,g = loss_and_grad(nt_xent_loss, z)
    _,g8 = loss_and_grad(lambda z: 8*nt_xent_loss(z), z)
    torch.testing.assert_close(g8, 8*g)

def test_known_values():
    assert nt_xent_loss(torch.ones(64,8)).item() == pytest.approx(math.log(63), rel=1e-6)                   # a constant encoder, and any temperature
    assert nt_xent_loss(torch.ones(3*8,8), n_views=3).item() == pytest.approx(math.log(1+3*7), rel=1e-6)    # one positive and the views of 7 other images
    z = torch.eye(4).repeat(2,1)                                                                           # perfect views of orthogonal images
    assert nt_xent_loss(z, .5).item() == pytest.approx(math.log(1+6*math.exp(-2)), rel=1e-5)

@pytest.mark.parametrize('temp', [1e-3, .07, 100.])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_finite(temp, dtype):
    for z in (torch.randn(8,4), torch.ones(8,4), torch.zeros(8,4), 1e3*torch.randn(8,4), torch.eye(4).repeat(2,1)):
        loss,grad = loss_and_grad(nt_xent_loss, z.to(dtype), temp)
        assert loss.dtype==torch.float32 and loss.isfinite() and grad.isfinite().all()

def test_no_other_image():
    "Nothing to tell apart: no loss and no gradient, as in a last batch of one"
    loss,grad = loss_and_grad(nt_xent_loss, rand(2))
    assert loss==0 and (grad==0).all()

def test_under_autocast():
    z = rand(8).float()
    with torch.autocast('cpu', torch.bfloat16): a = nt_xent_loss(z)
    assert torch.equal(a, nt_xent_loss(z))

def test_without_gradient():
    z = rand(8)
    with torch.no_grad(): a = nt_xent_loss(z)
    assert a==nt_xent_loss(z.requires_grad_()) and not a.requires_grad

def test_never_holds_all_similarities():
    "No tensor of the whole pass, forward and backward, is larger than a block; the plain form's are 16 times that"
    class Largest(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for o in out if isinstance(out, (tuple,list)) else [out]:
                if isinstance(o, torch.Tensor): self.n = max(self.n, o.numel())
            return out
    z = torch.randn(4096, 8)
    with Largest() as largest: loss_and_grad(nt_xent_loss, z)
    assert largest.n <= block_rows(z, 1)
    with Largest() as largest: loss_and_grad(plain_nt_xent, z, .07)
    assert largest.n==4096**2==16*block_rows(z, 1)

@pytest.mark.parametrize('z,kwargs,msg', [(torch.randn(5,4), {}, r'\(5, 4\).*n_views=2'), (torch.randn(6,4), dict(n_views=4), 'n_views=4'), (torch.randn(6,4), dict(n_views=1), 'n_views=1'),
                                          (torch.randn(2,3,4), {}, r'\(2, 3, 4\)'), (torch.randn(4,4), dict(temp=0), 'temp=0 must be positive')])
def test_wrong_arguments(z, kwargs, msg):
    with pytest.raises(ValueError, match=msg): nt_xent_loss(z, **kwargs)


class CheckStep(Callback):
    "Do each training step again, slowly: one view after the other, and the loss pair by pair"
    order = 20
    def __init__(self, temp): self.temp = temp
    def before_batch(self):
        if not self.training: return
        m,views = deepcopy(self.learn.model),self.xb[0]
        m.zero_grad()
        self.expected = slow_nt_xent(torch.cat([m.projector(m.encoder(v)) for v in views]), len(views), self.temp)
        self.expected.backward()
        self.grads = {n:p.grad for n,p in m.named_parameters()}
    def after_backward(self):
        torch.testing.assert_close(self.learn.loss, self.expected, rtol=1e-9, atol=0)
        for n,p in self.learn.model.named_parameters(): torch.testing.assert_close(p.grad, self.grads[n], rtol=1e-7, atol=1e-10)
        self.n_checked = getattr(self, 'n_checked', 0)+1


@pytest.mark.parametrize('cls', [SimCLR, DistributedSimCLR])
@pytest.mark.parametrize('sizes', [(8,8), (8,8,5,5,5,5), (5,8,5)])
def test_training_step(sizes, cls):
    "Loss and every gradient over two epochs with a short last batch"
    enc = nn.Sequential(nn.Conv2d(1,6,3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    x = torch.rand(11,1,12,12, dtype=torch.float64)
    check = CheckStep(.2)
    learn = Learner(tensor_dls(x, x[:4], bs=4, drop_last=False), create_simclr_model(enc, 8, 5).double(), opt_func=SGD, cbs=[cls(corners(*sizes), temp=.2), check])
    learn.remove_cb(Recorder) # cannot average losses in float64
    with learn.no_bar(): learn.fit(2, lr=.1)
    assert check.n_checked==6

def test_default_views():
    "Two of a kind, with the crops of the paper unless others are asked for"
    a,b = get_simclr_aug_pipelines(28, **plain)
    assert a.fs[0].scale==b.fs[0].scale==(.08,1.) and a.fs[0].size==(28,28)
    assert get_simclr_aug_pipelines((20,30), resize_scale=(.5,1.))[1].fs[0].scale==(.5,1.)

def test_projector():
    enc = nn.Sequential(nn.Conv2d(1,8,3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    kinds = lambda **kw: [type(o).__name__ for o in create_simclr_model(enc, **kw).projector]
    assert kinds()==['Linear','ReLU','Linear']
    assert kinds(bn=True, nlayers=3)==['Linear','BatchNorm1d','ReLU']*2+['Linear']
    m = create_simclr_model(enc)
    assert m.projector[0].weight.shape==(256,8) and m.projector[-1].weight.shape==(128,256)

def test_learns_to_tell_images_apart():
    "From chance to well below it, on smooth pictures that differ"
    x = F.interpolate(images(64, size=3).float(), 14, mode='bilinear').byte()
    cb = SimCLR(get_simclr_aug_pipelines(12, resize_scale=(.7,1), flip_p=0, **plain), temp=.2)
    learn = learner('simclr', tensor_dls(x, bs=32), create_simclr_model(nn.Sequential(nn.Flatten(), nn.Linear(144,32)), 32, 16, n_features=32), cb)
    quiet(learn, 15, 1e-2)
    assert float(learn.recorder.losses[-1]) < .7*math.log(63)

def test_multi_crop_in_a_learner():
    learn = learner('simclr', cb=SimCLR(get_swav_aug_pipelines((2,3), (12,6), **plain)))
    quiet(learn, 1)
    assert torch.isfinite(torch.tensor(float(learn.recorder.losses[-1]))) and len(learn.sim_clr.show(n=2))==2*5
