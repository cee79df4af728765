"The modules with the loss inside: the callbacks' numbers to the bit, the ways to call them, and several processes"
from copy import deepcopy
from functools import partial

import pytest, torch
import torch.distributed as tdist
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Learner, Recorder
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import reference
from self_supervised import encoders, modules
from self_supervised.data import tensor_dls
from self_supervised.dist import rank
from self_supervised.modules import SSLOutput, SimCLRModule, SwAV, SwAVModule
from self_supervised.vision import simclr, swav
from self_supervised.vision.swav import normalize_prototypes

from methods import encoder, images, quiet
from processes import on_ranks
from test_dist import corners

dims,K = (16,8),10
def module(nm, enc=None, **kwargs):
    cls = {'swav':partial(SwAVModule, n_prototypes=K), 'simclr':SimCLRModule}[nm]
    return cls(encoder() if enc is None else enc, dims, **kwargs)

def views(n=3, sizes=(12,12,6,6), c=1, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(n, c, s, s, dtype=dtype, generator=g) for s in sizes]

def call(m, vs, n_global=2): return m(global_views=vs[:n_global], local_views=vs[n_global:])


# The same as the callbacks

class Keep(Callback):
    "Views, weights before the step and loss of every batch"
    order = 60
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append([self.xb[0], deepcopy(self.learn.model.state_dict())])
    def after_loss(self): self.seen[-1].append(self.learn.loss_grad.detach())

class Autocast(Callback):
    "What MixedPrecision does on a GPU"
    order = MixedPrecision.order
    def before_batch(self): self.ac = torch.autocast('cpu', torch.bfloat16); self.ac.__enter__()
    def after_loss(self): self.ac.__exit__(None, None, None)

def fit(nm, autocast=False, dtype=torch.float32):
    "A fit of 5 batches with the callback, on multi-crop"
    x = images().to(dtype)/255
    if nm=='swav': m,cb = swav.create_swav_model(encoder(), *dims, n_protos=K),swav.SWAV(corners(12,12,6,6), [0,1], K=None, freeze_prototypes_niters=0)
    else:          m,cb = simclr.create_simclr_model(encoder(), *dims),simclr.SimCLR(corners(12,12,6,6), temp=.5)
    m = m.to(dtype)
    learn = Learner(tensor_dls(x, bs=8), m, opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=.1, cbs=[cb, Keep()])
    if dtype==torch.float64: learn.remove_cb(Recorder) # which cannot average losses in float64
    quiet(learn, 1, cbs=Autocast() if autocast else None)
    return learn

@pytest.mark.parametrize('nm', ['swav','simclr'])
@pytest.mark.parametrize('autocast,dtype', [(False,torch.float32), (True,torch.float32), (False,torch.float64)])
def test_losses_of_the_callback_to_the_bit(nm, autocast, dtype):
    learn = fit(nm, autocast, dtype)
    assert len(learn.keep.seen)==5
    for vs,weights,loss in learn.keep.seen:
        m = module(nm).to(dtype)
        m.load_state_dict(weights)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast): o = call(m, vs)
        assert torch.equal(o.loss, loss) and o.loss.dtype==(torch.float64 if dtype==torch.float64 else torch.float32)

@pytest.mark.parametrize('nm', ['swav','simclr'])
def test_weights_after_some_steps_to_the_bit(nm):
    learn = fit(nm)
    m = module(nm)
    m.load_state_dict(learn.keep.seen[0][1])
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    for vs,_,_ in learn.keep.seen:
        opt.zero_grad(); call(m, vs).loss.backward(); opt.step()
    if nm=='swav': normalize_prototypes(m) # the callback does it after a step, the module before the next
    for k,v in learn.model.state_dict().items(): assert torch.equal(m.state_dict()[k], v), k

@pytest.mark.parametrize('n', [1,2,3])
def test_swav_equals_loops(n):
    "Loss from loops in numpy: codes of the global views, local ones only predict"
    m,vs = module('swav').double(),views(5, dtype=torch.float64)
    o = call(m.eval(), vs, n)
    f = torch.cat([m.backbone(v) for v in vs])
    z = m.projector(f); z = z/z.norm(dim=1, keepdim=True)
    s = (z@m.prototypes.weight.T).unflatten(0, (4,5)).detach().numpy()
    q = [reference.sinkhorn(s[i], .05, 3) for i in range(n)]
    assert o.loss.item() == pytest.approx(reference.swapped_loss(s, q, range(n), .1), rel=1e-9)
    torch.testing.assert_close(o.embedding, f[:5*n].detach()); torch.testing.assert_close(o.projection, z)

def test_arguments_reach_the_loss():
    vs = views(5)
    a = module('swav').eval()
    b = SwAVModule(a.backbone, dims, K, temperature=.3, sinkhorn_iterations=1, epsilon=.2).eval()
    b.load_state_dict(a.state_dict())
    z,s = b.score(torch.cat([b.backbone(v) for v in vs]))
    s = s.detach().double().unflatten(0, (4,5)).numpy()
    want = reference.swapped_loss(s, [reference.sinkhorn(s[i], .2, 1) for i in (0,1)], [0,1], .3)
    assert call(b, vs).loss.item()==pytest.approx(want, rel=1e-5) and call(a, vs).loss.item()!=pytest.approx(want, rel=1e-2)
    c = module('simclr').eval(); d = SimCLRModule(c.backbone, dims, temperature=.05).eval(); d.projector = c.projector
    assert call(c, vs).loss!=call(d, vs).loss


# What comes back

@pytest.mark.parametrize('nm', ['swav','simclr'])
def test_output(nm):
    m,vs = module(nm),views(3)
    o = call(m, vs)
    assert o.loss is o['loss'] is o[0] and o.embedding is o['embedding'] is o[1] and o.projection is o['projection'] is o[2]
    assert o.embedding.shape==(6,8) and not o.embedding.requires_grad and o.projection.shape==(12,8) and m.embed_dim==8
    torch.testing.assert_close(o.projection.norm(dim=1), torch.ones(12))
    assert m.backbone is m.encoder and isinstance(o, SSLOutput) and isinstance(o, tuple)
    o.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    with pytest.raises(AttributeError): o['nothing']

@pytest.mark.parametrize('nm', ['swav','simclr'])
def test_ways_to_call(nm):
    m,vs = module(nm).eval(),views(3)
    two = m(*vs[:2])
    assert torch.equal(two.loss, m(global_views=vs[:2]).loss) and torch.equal(two.loss, m(view1=vs[0], view2=vs[1], local_views=[]).loss)
    assert torch.equal(m(*vs[:2], local_views=vs[2:]).loss, call(m, vs).loss)
    one = m(vs[0])
    for o in (one, m(view1=vs[0]), m(images=vs[0])):
        assert o.loss==0 and o.projection is None and torch.equal(o.embedding, m.backbone(vs[0])) and o.embedding.requires_grad
    assert call(m, vs, 1).embedding.shape==(3,8) # one global view is enough if there are local ones
    assert m(global_views=vs[0], local_views=vs[1]).loss==m(global_views=vs[:1], local_views=vs[1:2]).loss

@pytest.mark.parametrize('nm', ['swav','simclr'])
def test_short_batches_and_views_of_any_size(nm):
    m = module(nm, encoder(3))
    for n,sizes in ((2,(12,12)), (7,(12,9,5)), (3,(8,7,6,5,12))): assert call(m, views(n, sizes, c=3)).loss.isfinite()

wrong = [(lambda m,v: m(), 'takes one of'), (lambda m,v: m(view2=v[0]), 'takes one of'), (lambda m,v: m(v[0], images=v[0]), 'takes one of'),
         (lambda m,v: m(local_views=v), 'takes one of'), (lambda m,v: m(global_views=v[:1]), '1 global_views and 0 local_views'),
         (lambda m,v: m(global_views=[], local_views=v), '0 global_views and 4 local_views'),
         (lambda m,v: m(v[0], v[1][:2]), r'\[3, 2\] images: every view must show the same images'),
         (lambda m,v: m(v), 'lists of views go to global_views'), (lambda m,v: m(images=v[0].byte()), 'torch.uint8'),
         (lambda m,v: m(v[0][0], v[1][0]), r'one is torch.float32 of shape \(1, 12, 12\)')]
@pytest.mark.parametrize('nm', ['swav','simclr'])
@pytest.mark.parametrize('f,msg', wrong)
def test_wrong_calls(nm, f, msg):
    with pytest.raises(ValueError, match=msg): f(module(nm), views())

def test_wrong_arguments():
    for kw,msg in ((dict(temperature=0), 'temperature=0'), (dict(epsilon=-1), 'epsilon=-1'), (dict(sinkhorn_iterations=0), 'sinkhorn_iterations=0')):
        with pytest.raises(ValueError, match=msg): SwAVModule(encoder(), dims, K, **kw)
    with pytest.raises(ValueError, match='temperature=0'): SimCLRModule(encoder(), dims, temperature=0)
    for cls in (SwAVModule, SimCLRModule):
        with pytest.raises(ValueError, match=r'projector_dims=\(8,\) must be two numbers or more'): cls(encoder(), (8,))
        with pytest.raises(ValueError, match='already built'): cls(encoder(), dims, low_resolution=True)
        with pytest.raises(ValueError, match='not a name timm knows'): cls('no_such_net', dims)


# Encoders

def test_other_names():
    assert SwAV is SwAVModule and modules.SimCLR is SimCLRModule
    assert 'SimCLR' not in modules.__all__ # where both are imported, the name is the callback's

@pytest.mark.parametrize('nm', ['swav','simclr'])
@pytest.mark.parametrize('widths', [(16,8), (16,16,8), (16,12,8), [20,16,12,8]])
def test_projectors_of_any_depth(nm, widths):
    cls = {'swav':partial(SwAVModule, n_prototypes=K), 'simclr':SimCLRModule}[nm]
    m = cls(encoder(), projector_dims=widths)
    assert [o.out_features for o in m.projector if isinstance(o, nn.Linear)]==list(widths)
    out = call(m, views())
    out.loss.backward()
    assert out.projection.shape==(12,8) and all(p.grad is not None for p in m.projector.parameters())

def test_encoders_by_name():
    r = SwAVModule('resnet10t', dims, K, n_in=1)
    assert hasattr(r.backbone, 'forward_features') and r.embed_dim==512 and call(r, views(2, (32,32,24))).loss.isfinite()
    assert SimCLRModule('resnet10t', dims, dynamic_img_size=False).embed_dim==512
    assert SwAVModule('resnet10t', dims, K, low_resolution=True).backbone.conv1[0].stride==(1,1)
    assert hasattr(SimCLRModule('resnet18', dims).backbone, 'layer4') # a name that timm and fastai know is timm's
    assert isinstance(SimCLRModule('xresnet18', dims).backbone, nn.Sequential) # one that only fastai knows

@pytest.mark.parametrize('cls', [SwAVModule, SimCLRModule])
def test_released_weights_go_to_who_knows_them(cls, monkeypatch):
    asked = []
    def load(enc, weights): asked.append((type(enc).__name__, weights)); return enc
    monkeypatch.setattr(encoders, '_loaders', [load])
    for o in ('resnet18', encoder()): cls(o, dims, pretrained='swav_800ep')
    assert asked==[('Sequential','swav_800ep')]*2

def test_vision_transformer_takes_any_size():
    m = SwAVModule('vit_tiny_patch16_224', dims, K)
    assert call(m, views(2, (64,64,32), c=3)).loss.isfinite()
    fixed = SwAVModule('vit_tiny_patch16_224', dims, K, dynamic_img_size=False)
    with pytest.raises(AssertionError, match='64'): fixed(*views(2, (64,64), c=3))


# Prototypes

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('dim', [2, 128, 1024])
def test_normalising_twice_changes_no_bit(dtype, dim):
    m = nn.Module(); m.prototypes = nn.Linear(dim, 500, bias=False).to(dtype)
    normalize_prototypes(m); once = m.prototypes.weight.clone()
    torch.testing.assert_close(once.double().norm(dim=1), torch.ones(500).double(), rtol=0, atol=5*torch.finfo(dtype).eps)
    normalize_prototypes(m)
    assert torch.equal(m.prototypes.weight, once)
    with torch.no_grad(): m.prototypes.weight[3] *= 1.5
    normalize_prototypes(m)
    assert torch.equal(m.prototypes.weight[:3], once[:3]) and torch.equal(m.prototypes.weight[4:], once[4:])
    torch.testing.assert_close(m.prototypes.weight[3], once[3])

def test_prototypes_have_unit_length_before_every_pass():
    m,vs = module('swav').eval(),views()
    want = call(m, vs).loss
    with torch.no_grad(): m.prototypes.weight *= 3.
    assert call(m, vs).loss.item()==pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(m.prototypes.weight.norm(dim=1), torch.ones(K))

def test_two_passes_before_one_backward():
    m = module('swav')
    (call(m, views()).loss + call(m, views(seed=1)).loss).backward()
    assert m.prototypes.weight.grad.isfinite().all()


# Several processes

def plain(n_in=1): return nn.Sequential(nn.Conv2d(n_in,8,3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def double_module(nm):
    torch.manual_seed(3)
    m = module(nm, plain()).double()
    if nm=='swav': m.projector[1] = nn.Identity() # its batch norm would see a part of the batch
    return m

def both(folder):
    "Two steps under DDP, with 4 images on one process and 2 on the other"
    return {nm: steps(DDP(double_module(nm)), lambda v: v.split([4,2])[rank()]) for nm in ('swav','simclr')}

def steps(m, mine):
    opt,losses = torch.optim.SGD(m.parameters(), lr=.5),[]
    for i in range(2):
        opt.zero_grad()
        o = call(m, [mine(v) for v in views(6, dtype=torch.float64, seed=i)])
        o.loss.backward(); opt.step()
        losses.append(o.loss.detach())
    return losses,[p.detach() for p in m.parameters()]

@pytest.mark.slow
@pytest.mark.skipif(not tdist.is_available(), reason='this torch has no distributed')
def test_two_processes_equal_one(tmp_path):
    ranks = on_ranks(both, tmp_path, 2)
    for nm in ('swav','simclr'):
        one = steps(double_module(nm), lambda v: v)
        for o in ranks: torch.testing.assert_close(o[nm], one, rtol=1e-9, atol=1e-12)
