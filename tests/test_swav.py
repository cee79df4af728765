"SwAV: the loss, the whole training step against the written-out definition, and what a fit leaves behind"
import math
from copy import deepcopy
from functools import partial

import pytest, torch
from fastai.callback.core import Callback
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from fasttransform import Pipeline
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

import reference
from self_supervised.data import tensor_dls
from self_supervised.multicrop import multicrop
from self_supervised.vision.swav import SWAV, create_swav_model, swav_loss


def corner(i, size): # a view that is easy to make again: a part of the image
    return Pipeline([partial(_cut, i, size)], split_idx=0)
def _cut(i, size, x): return x[..., i:i+size, i//2:i//2+size]

def bn_free(n_protos=7, dim=5, n_in=1):
    enc = nn.Sequential(nn.Conv2d(n_in,6,3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return create_swav_model(enc, hidden_size=8, projection_size=dim, n_protos=n_protos, bn=False)

def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)

def images(n=22, size=12, seed=0): return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))

views_2   = [corner(0,8), corner(2,8)]
views_2_6 = [corner(0,8), corner(3,8)] + [corner(i,5) for i in range(6)]
mixed     = [corner(0,5), corner(1,8), corner(2,5), corner(4,8)] # sizes alternate


@pytest.mark.parametrize('V,ids', [(2,[0,1]), (8,[0,1]), (5,[3,0,4]), (3,[1])])
def test_loss_equals_reference(V, ids):
    s,q = torch.randn(V,3,6, dtype=torch.float64),torch.randn(len(ids),3,6, dtype=torch.float64).softmax(2)
    assert swav_loss(s, q, ids, .2).item() == pytest.approx(reference.swapped_loss(s.numpy(), q.numpy(), ids, .2), rel=1e-10)

def test_views_of_equal_width_or_height():
    "Views go through the encoder by height and width together, and come back in order"
    enc = bn_free().encoder
    views = [torch.rand(3,1,h,w) for h,w in ((8,8), (5,8), (8,5), (8,8), (5,8))]
    torch.testing.assert_close(multicrop(enc, views), torch.cat([enc(v) for v in views]))

@pytest.mark.parametrize('V,ids', [(2,[0,1]), (8,[0,1]), (5,[3,0,4]), (3,[1]), (3,[-1]), (3,(0,0))])
def test_loss_has_the_gradient_of_pairs(V, ids):
    "Codes of any sum, and the gradient of a loop over pairs of views"
    s,q = torch.randn(V,3,6, dtype=torch.float64, requires_grad=True),torch.rand(len(ids),3,6, dtype=torch.float64)
    pairs = [-(q[i]*(s[v]/.2).log_softmax(1)).sum(1).mean() for i,a in enumerate(ids) for v in range(V) if v!=a%V]
    want = sum(pairs)/len(ids)/(V-1)
    got  = swav_loss(s, q, ids, .2)
    torch.testing.assert_close((got, *torch.autograd.grad(3*got, s)), (want, *torch.autograd.grad(3*want, s)), rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_loss_of_half_scores_is_float32(dtype, autocast):
    "A gradient too small for half precision survives when the loss is scaled"
    s,q = (.5*torch.randn(4,256,512)).to(dtype).requires_grad_(),torch.randn(2,256,512).softmax(2)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): loss = swav_loss(s, q)
    full = s.detach().float().requires_grad_()
    want = swav_loss(full, q)
    scale = 2.**16
    (scale*loss).backward(); (scale*want).backward()
    assert loss.dtype==torch.float32 and s.grad.dtype==dtype
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(s.grad.float(), full.grad, rtol=1e-2, atol=1e-3*full.grad.abs().max().item())

def test_no_gradient_through_codes():
    s,q = torch.randn(2,3,4, requires_grad=True),torch.rand(2,3,4, requires_grad=True)
    swav_loss(s, q).backward()
    assert q.grad is None and s.grad is not None


class CheckStep(Callback):
    "Do each training step again, slowly: one view after the other, codes and loss written out in loops"
    order = 20
    def __init__(self, ids, K, start, temp, eps): self.ids,self.length,self.start,self.temp,self.eps = ids,K,start,temp,eps
    def before_fit(self): self.q,self.n_checked,self.n_with_queue,self.seen = reference.Queue(len(self.ids), self.length or 0),0,0,[]

    def before_batch(self):
        if not self.training: return
        m,views = deepcopy(self.learn.model),self.xb[0]
        m.zero_grad()
        zs = [m.projector(m.encoder(v)) for v in views]
        zs = [torch.stack([r/(r*r).sum().sqrt() for r in z]) for z in zs]
        C = m.prototypes.weight
        assert (C.detach().square().sum(1).sqrt()-1).abs().max() < 1e-5
        scores = [z@C.T for z in zs]
        z,s,protos = (torch.stack(o).detach().numpy() if isinstance(o, list) else o.detach().numpy() for o in (zs, scores, C))
        use = bool(self.length) and self.q.full() and self.train_iter/(self.n_epoch*len(self.dls.train)) >= self.start-1e-9
        codes = torch.from_numpy(reference.codes(z, s, self.ids, protos, self.q, use, self.eps))
        self.loss_value = reference.swapped_loss(s, codes.numpy(), self.ids, self.temp)
        loss = 0.
        for q,a in zip(codes, self.ids):
            for v in range(len(views)):
                if v!=a: loss = loss - (q*(scores[v]/self.temp-torch.logsumexp(scores[v]/self.temp, 1, keepdim=True))).sum()/len(q)/(len(views)-1)/len(self.ids)
        assert loss.item() == pytest.approx(self.loss_value, rel=1e-9)
        loss.backward()
        self.grads = {n:p.grad for n,p in m.named_parameters()}
        self.q.push(z[self.ids])
        self.n_with_queue += use; self.seen.append(len(views[0]))

    def after_backward(self):
        assert self.learn.loss.item() == pytest.approx(self.loss_value, rel=1e-9)
        for n,p in self.learn.model.named_parameters(): torch.testing.assert_close(p.grad, self.grads[n], rtol=1e-7, atol=1e-10, msg=n)
        feats = self.learn.model.queue.feats
        for rows,f in zip(self.q.rows, feats): torch.testing.assert_close(f, torch.tensor(rows, dtype=f.dtype).reshape(-1, f.shape[1]), rtol=1e-9, atol=1e-12)
        self.n_checked += 1

@pytest.mark.parametrize('augs,ids', [(views_2,[0,1]), (views_2_6,[0,1]), (views_2_6,[6,7]), (views_2_6,[1,4,0]), (mixed,[1,3]), (mixed,[2])],
                         ids='2 2+6 2+6-last 2+6-three mixed-large mixed-one'.split())
@pytest.mark.parametrize('K,start', [(None,.25), (11,0.), (11,.5), (3,0.)], ids='no-queue queue queue-later queue-shorter-than-batch'.split())
def test_step_equals_definition(augs, ids, K, start):
    "Codes, loss, gradients and queue over two epochs with a short last batch"
    x = images().double()
    dls = tensor_dls(x, x[:5], bs=6)
    dls.train.drop_last = False
    check = CheckStep(ids, K, start, temp=.2, eps=.06)
    learn = Learner(dls, bn_free().double(), opt_func=SGD, lr=.5,
                    cbs=[SWAV(augs, ids, K=K, queue_start_pct=start, temp=.2, eps=.06, freeze_prototypes_niters=2), check])
    learn.remove_cb(Recorder) # it cannot average float64 losses
    protos = learn.model.prototypes.weight.detach().clone()
    quiet(learn, 2)
    assert check.n_checked==8 and check.seen==[6,6,6,4]*2
    assert check.n_with_queue == (0 if K is None else {(11,0.):6, (11,.5):4, (3,0.):7}[K,start])
    assert not torch.equal(learn.model.prototypes.weight, protos)

def test_prototypes_are_fixed_first():
    class Look(Callback):
        order = 20
        def before_fit(self): self.protos = []
        def after_step(self): self.protos.append(self.learn.model.prototypes.weight.detach().clone())
    for n,first_moved in ((3,3), (0,0), (None,1)): # None: 1% of 8 steps, so the first one
        learn = Learner(tensor_dls(images(), bs=5), bn_free(), lr=.1, cbs=[SWAV(views_2, [0,1], K=None, freeze_prototypes_niters=n), (look:=Look())])
        start = learn.model.prototypes.weight.detach().clone()
        quiet(learn, 2, wd=.1)
        assert [torch.equal(start, o) for o in look.protos] == [i<first_moved for i in range(8)]
        assert all((o.norm(dim=1)-1).abs().max()<1e-5 for o in look.protos)

def test_prototypes_of_any_length_are_normalised_before_use():
    learn = Learner(tensor_dls(images(), images(6), bs=5), bn_free(), cbs=SWAV(views_2, [0,1], K=None))
    with torch.no_grad(): learn.model.prototypes.weight.mul_(3)
    with learn.no_bar(): learn.validate()
    torch.testing.assert_close(learn.model.prototypes.weight.norm(dim=1), torch.ones(7))

def test_hard_codes():
    class Look(Callback):
        def after_pred(self):
            z,s = (o.unflatten(0, (2,-1)) for o in self.pred)
            self.codes = self.learn.swav.codes(z, s)
    learn = Learner(tensor_dls(images(), bs=5), bn_free(), cbs=[SWAV(views_2, [0,1], K=None, hard_codes=True), (look:=Look())])
    quiet(learn, 1)
    assert ((look.codes==0)|(look.codes==1)).all() and (look.codes.sum(2)==1).all()

@pytest.mark.parametrize('K', [20, 500])
def test_constant_encoder_loses_ln_K(K):
    "What says nothing has loss ln K, and training cannot change that"
    class Constant(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1,8))
        def forward(self, x): return self.w.expand(len(x), -1)
    model = create_swav_model(Constant(), 16, 8, n_protos=K, bn=False, n_features=8)
    learn = Learner(tensor_dls(images(64), bs=32), model, cbs=SWAV(views_2, [0,1], K=None))
    quiet(learn, 100, lr=.01, wd=0.)
    assert learn.recorder.losses[-1].item() == pytest.approx(math.log(K), rel=.01)
    with torch.no_grad(): model.prototypes.weight.copy_(model.prototypes.weight[:1].expand_as(model.prototypes.weight)) # equal prototypes: exactly
    _,s = model([images(4)]*2)
    q = torch.full((2,4,K), 1/K)
    assert swav_loss(s.unflatten(0, (2,4)), q).item() == pytest.approx(math.log(K), rel=1e-5)

@pytest.mark.slow
def test_recovers_known_clusters():
    "Six clusters of noisy patterns: nearest prototypes find them"
    g = torch.Generator().manual_seed(0)
    protos,y = torch.rand(6,1,8,8, generator=g),torch.arange(600)%6
    x = (protos[y]+.1*torch.randn(600,1,8,8, generator=g)).clamp(0,1)
    noisy = lambda: Pipeline([lambda x: x+.1*torch.randn_like(x)], split_idx=0)
    model = create_swav_model(nn.Sequential(nn.Flatten(), nn.Linear(64,32)), 32, 16, n_protos=6, n_features=32)
    learn = Learner(tensor_dls(x, bs=60), model, lr=3e-3, cbs=SWAV([noisy(), noisy()], [0,1], K=None))
    quiet(learn, 30)
    with torch.no_grad(): found = model.eval()([x])[1].argmax(1)
    assert normalized_mutual_info_score(y, found) > .9
