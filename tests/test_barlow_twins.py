"Barlow Twins against a loop of its own, in float64"
import copy
from functools import lru_cache

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from methods import Record, corners, images, learner, monitored, quiet, small_encoder
from processes import on_ranks
from self_supervised.data import tensor_dls
from self_supervised.dist import rank, world_size
from self_supervised.recipes import get_recipe
from self_supervised.vision.barlow_twins import BarlowTwins, barlow_twins_loss, create_barlow_twins_model, get_barlow_twins_aug_pipelines

def loops(z, lmb, ids=(0,1)):
    "The definition, pair by pair, feature by feature and image by image"
    V,B,D = z.shape
    def standardised(x):
        m = sum(x)/B
        return (x-m)/(sum((o-m)**2 for o in x)/B+1e-5).sqrt()
    s,terms = [standardised(o) for o in z],[]
    for a in ids:
        for v in range(V):
            if v==a: continue
            C = {(i,j): sum(s[a][b,i]*s[v][b,j] for b in range(B))/B for i in range(D) for j in range(D)}
            terms.append(sum((1-c)**2 if i==j else lmb*c**2 for (i,j),c in C.items()))
    return sum(terms)/len(terms)

def official(x, y, lmb):
    "Two views as in the official code: batch norm without scale and shift, and one matrix"
    c = F.batch_norm(x, None, None, training=True).T@F.batch_norm(y, None, None, training=True)/len(x)
    off = ~torch.eye(len(c), dtype=torch.bool)
    return (c.diagonal()-1).square().sum() + lmb*c[off].square().sum()

def same(a, b, z, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    torch.testing.assert_close(*(torch.autograd.grad(o, z, retain_graph=True)[0] for o in (a,b)), rtol=tol, atol=tol)

@pytest.mark.parametrize('V,ids', [(2,(0,1)), (2,(1,)), (6,(0,1)), (5,(3,0,2))])
@pytest.mark.parametrize('B', [2, 7])
def test_loss(V, ids, B):
    torch.manual_seed(0)
    z = 3+2*torch.randn(V,B,4, dtype=torch.float64, requires_grad=True)
    same(barlow_twins_loss(z, .3, ids), loops(z, .3, ids), z)
    assert torch.autograd.gradcheck(lambda o: barlow_twins_loss(o, .3, ids), z)
    if V==2: same(barlow_twins_loss(z, .0051), official(*z, .0051), z)
    with torch.no_grad(): torch.testing.assert_close(barlow_twins_loss(z, .3, ids), loops(z, .3, ids))

def test_types():
    "float32 or wider, whatever comes in and whatever autocast would like; the gradient has the type of what came in"
    z,scaled = torch.randn(2,64,8, requires_grad=True),(2*torch.randn(3,9,5, dtype=torch.float64)).requires_grad_()
    want = barlow_twins_loss(z)
    with torch.autocast('cpu', torch.bfloat16): got = barlow_twins_loss(z)
    assert torch.equal(got, want) and got.dtype==torch.float32
    assert barlow_twins_loss(z.bfloat16()).dtype==torch.float32
    half = z.detach().bfloat16().requires_grad_()
    barlow_twins_loss(half).backward()
    assert half.grad.dtype==torch.bfloat16 and half.grad.abs().sum()>0
    same(7*barlow_twins_loss(scaled, .1), 7*loops(scaled, .1), scaled) # a gradient that comes from above

def test_nothing_varies():
    "One image, or images that are all the same: finite, and D"
    for z in (torch.randn(3,1,5, requires_grad=True), torch.ones(3,4,5, requires_grad=True)):
        loss = barlow_twins_loss(z)
        loss.backward()
        assert loss.item()==pytest.approx(5) and z.grad.isfinite().all()

class Sizes(TorchDispatchMode):
    "Numbers in each matrix that is made"
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.seen += [o.numel() for o in (out if isinstance(out, (tuple,list)) else [out]) if isinstance(o, torch.Tensor)]
        return out

@pytest.mark.parametrize('B,D', [(2,60), (64,3)])
def test_memory(B, D):
    "No tensor is larger than the projections or one matrix of correlations, and autograd keeps nothing of the second kind"
    V,kept = 6,{}
    z = torch.randn(V,B,D, requires_grad=True)
    def keep(t): kept[t.untyped_storage()._cdata] = t; return t # and holds it, lest another takes its place
    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = barlow_twins_loss(z)
        loss.backward()
    assert max(sizes.seen)==max(V*B*D, D*D)
    assert max(o.numel() for o in kept.values())<=V*B*D and sum(o.numel() for o in kept.values())<8*V*B*D

def test_wrong_arguments():
    z = torch.randn(2,4,3)
    for bad,msg in ((dict(lmb=-1), 'lmb=-1 must not be negative'), (dict(ids=(0,2)), r'ids=\[0, 2\]'), (dict(ids=(0,0)), 'different'), (dict(ids=()), r'ids=\[\]')):
        with pytest.raises(ValueError, match=msg): barlow_twins_loss(z, **bad)
    with pytest.raises(ValueError, match='two views or more'): barlow_twins_loss(z.flatten(0,1))
    for bad in (dict(lmb=-.1), dict(scale_loss=0.), dict(crop_assgn_ids=(0,2))):
        with pytest.raises(ValueError, match=next(iter(bad))): BarlowTwins(corners(8,8), **bad)
    with pytest.raises(ValueError, match='bs=1.*use 32 or more'):
        quiet(learner('barlow_twins', tensor_dls(images(8), bs=1), create_barlow_twins_model(small_encoder(False), 8, 4, bn=False), BarlowTwins(corners(8,8))), 1)


def small_model(bn=True): return create_barlow_twins_model(small_encoder(bn), 8, 5, bn=bn)

@pytest.mark.parametrize('sizes,ids', [((8,8),(0,1)), ((8,8,5,5,5,5),(0,1)), ((8,8,8),(2,))], ids='2 2+4 one'.split())
@pytest.mark.parametrize('accumulate', [False, True])
def test_ten_steps(sizes, ids, accumulate):
    "Loss, every gradient and weight, with a last batch that is short, and when two batches make a step"
    torch.manual_seed(0)
    x,bs,lr = torch.rand(22,1,12,12, dtype=torch.float64),4,.02
    model = small_model().double()
    plain = copy.deepcopy(model)
    dls = tensor_dls(x, bs=bs, drop_last=False, shuffle=False, device='cpu')
    cb  = BarlowTwins(corners(*sizes), lmb=.2, crop_assgn_ids=ids, scale_loss=.5)
    learn = Learner(dls, model, opt_func=SGD, cbs=[cb, Record(), *([GradientAccumulation(2*bs)] if accumulate else [])])
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.fit(2, lr=lr, wd=0.)

    plain.train()
    n = done = 0
    for i,batch in enumerate([*x.split(bs), *x.split(bs)]):
        views = [o(batch) for o in corners(*sizes)]
        sized = [torch.cat([o for o in views if o.shape[-1]==s]) for s in dict.fromkeys(sizes)] # a batch norm sees all views of a size together
        loss  = .5*loops(plain.projector(torch.cat([plain.encoder(o) for o in sized])).view(len(views),-1,5), .2, ids)
        (loss*(len(batch)/(2*bs) if accumulate else 1)).backward()
        n += len(batch)
        got_loss,got_grads,state = learn.record.steps[i]
        assert got_loss==pytest.approx(float(loss.detach()), abs=1e-9)
        if not accumulate or n>=2*bs:
            for nm,p in plain.named_parameters(): torch.testing.assert_close(got_grads[nm], p.grad, rtol=0, atol=1e-9, msg=f'{nm} in batch {i}')
            with torch.no_grad():
                for p in plain.parameters(): p -= lr*p.grad; p.grad = None
            n,done = 0,done+1
        for nm,v in plain.state_dict().items(): torch.testing.assert_close(state[nm].double(), v.double(), rtol=0, atol=1e-9, msg=f'{nm} after batch {i}')
    assert done==(5 if accumulate else 12)

def test_model():
    "The paper's layers, and the older package's sizes"
    kinds = lambda o: [type(l).__name__ for l in o]
    m = create_barlow_twins_model(small_encoder())
    assert kinds(m.projector)==['Linear','BatchNorm1d','ReLU']*2+['Linear']
    assert [tuple(o.weight.shape) for o in m.projector if isinstance(o, nn.Linear)]==[(256,24),(256,256),(128,256)]
    assert kinds(create_barlow_twins_model(small_encoder(), bn=False, nlayers=2).projector)==['Linear','ReLU','Linear']
    assert m.projector[-1].bias is None # it would have no gradient but rounding errors, by which Adam would go

def test_views_of_two_kinds():
    a,b = ({type(o).__name__: o for o in p.fs} for p in get_barlow_twins_aug_pipelines(16))
    assert a['RandomGaussianBlur'].p==1 and b['RandomGaussianBlur'].p==.1 and 'RandomSolarize' not in a and b['RandomSolarize'].p==.2
    assert all((o['RandomJitter'].s, o['RandomJitter'].saturation, o['RandomJitter'].p, o['RandomGray'].p, o['RandomCropResize'].scale)==(.5,.5,.8,.2,(.08,1.)) for o in (a,b))

@pytest.mark.parametrize('name,epochs', [('barlow_twins_300ep',300), ('barlow_twins_1000ep',1000)])
def test_official_recipes(name, epochs):
    r = get_recipe(name)
    cb = r.create_callback()
    assert (r.epochs, r.bs, r.opt, r.lr, r.lr_final, r.wd, cb.lmb)==(epochs, 2048, 'larc', .2*2048/256, .0002*2048/256, 1e-6, .0051)
    assert r.lr*cb.scale_loss==pytest.approx(.0048*2048/256) # the learning rate of biases and norms
    with torch.device('meta'): m = r.create_model(nn.Sequential(nn.Conv2d(3,2048,1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert [tuple(o.weight.shape) for o in m.projector if isinstance(o, nn.Linear)]==[(8192,2048),(8192,8192),(8192,8192)]


# N processes

dealt = {2:[4,3], 3:[1,4,2]} # images of each: uneven batches
def projections(): return 1+torch.randn(4,7,5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

def shares(folder):
    z,res = projections().split(dealt[world_size()], 1)[rank()],[]
    for ids in ((0,1), (2,)):
        mine = z.clone().requires_grad_()
        loss = barlow_twins_loss(mine, .3, ids)
        loss.backward()
        res.append((loss.detach(), mine.grad))
    return res

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_ranks_equal_one_process(n, tmp_path):
    "The loss of the joined batch everywhere, and its gradient after DDP's average"
    res = on_ranks(shares, tmp_path, n)
    for i,ids in enumerate(((0,1), (2,))):
        z = projections().requires_grad_()
        loss = loops(z, .3, ids)
        loss.backward()
        for o in res: torch.testing.assert_close(o[i][0], loss.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([o[i][1] for o in res], 1)/n, z.grad, rtol=1e-10, atol=1e-12)


# Health

class OneByOne(BarlowTwins):
    "Broken: two views agree, image by image, and nothing is asked of the features over the batch"
    def lf(self, pred): return 1-F.cosine_similarity(*pred.unflatten(0, (2,-1)), dim=1).mean()

@lru_cache
def run(cls=BarlowTwins, **kwargs):
    views = get_barlow_twins_aug_pipelines(20, resize_scale=(.4,1), jitter=False, bw=False, blur=False, solarize=False, stats=None)
    return monitored(lambda enc: create_barlow_twins_model(enc, 128, 64, bn=False), cls(views, **kwargs))

def test_collapse_is_seen():
    "If nothing is asked of the features, all images become the same; as it should be, they do not"
    broken,whole = run(OneByOne),run()
    assert 'looks like a collapse' in broken.warning and broken.history['std'][-1]<.1 and 'create_barlow_twins_model(bn=True), now False' in broken.warning
    assert not whole.warning and whole.history['std'][-1]>.5 and whole.history['loss-chance'][-1]<-40

def test_features_repeat_without_lambda():
    "It is no collapse, and nobody warns: but the projections fill fewer directions"
    without,whole = run(lmb=0.),run()
    assert not without.warning and without.history['rank'][-1]<.75*whole.history['rank'][-1]

def test_chance():
    "The loss of a model that gives the same of all, whatever the loss is multiplied by"
    class Same(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(3))
        def forward(self, x): return self.w.expand(len(x), 3)
    learn,seen = learner('barlow_twins', m=create_barlow_twins_model(Same(), 8, 6, bn=False, n_features=3), cb=BarlowTwins(corners(8,8), scale_loss=.1)),[]
    class Look(Callback):
        def after_loss(self): seen.append((self.learn.loss.item(), self.learn.barlow_twins.chance))
    quiet(learn, 1, cbs=Look())
    assert seen and all(o==pytest.approx((.6,.6), abs=1e-5) for o in seen)
