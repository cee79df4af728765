"VICReg against a loop of its own and the official formula, in float64"
import copy
from functools import lru_cache

import pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F

from methods import Record, corners, images, learner, monitored, quiet, small_encoder
from processes import on_ranks
from self_supervised.data import tensor_dls
from self_supervised.dist import rank, world_size
from self_supervised.recipes import get_recipe
from self_supervised.vision.vicreg import VICReg, create_vicreg_model, get_vicreg_aug_pipelines, vicreg_loss

from test_barlow_twins import Sizes, same

def loops(z, sim=25., std=25., cov=1., ids=(0,1)):
    "The definition, pair by pair, view by view, feature by feature"
    V,B,D = z.shape
    near = [sum((z[a,b,i]-z[v,b,i])**2 for b in range(B) for i in range(D))/(B*D) for a in ids for v in range(V) if v!=a]
    hinges,squares = [],[]
    for x in z:
        m = sum(x)/B
        C = {(i,j): sum((x[b,i]-m[i])*(x[b,j]-m[j]) for b in range(B))/(B-1) for i in range(D) for j in range(D)}
        hinges.append(sum(F.relu(1-(C[i,i]+1e-4).sqrt()) for i in range(D))/D)
        squares.append(sum(c**2 for (i,j),c in C.items() if i!=j)/D)
    return sim*sum(near)/len(near) + std*sum(hinges)/V + cov*2*sum(squares)/V

def official(x, y, sim, std, cov):
    "Two views, as the official code has it"
    repr_loss = F.mse_loss(x, y)
    x,y = x-x.mean(0),y-y.mean(0)
    std_loss = sum(F.relu(1-torch.sqrt(o.var(0)+.0001)).mean()/2 for o in (x,y))
    covs     = [o.T@o/(len(o)-1) for o in (x,y)]
    cov_loss = sum((o.square().sum()-o.diagonal().square().sum())/len(o) for o in covs)
    return sim*repr_loss + std*std_loss + cov*cov_loss

@pytest.mark.parametrize('V,ids', [(2,(0,1)), (2,(1,)), (6,(0,1)), (5,(3,0,2))])
@pytest.mark.parametrize('weights', [(25.,25.,1.), (1.,0.,0.), (0.,1.,0.), (0.,0.,1.)])
def test_loss(V, ids, weights):
    torch.manual_seed(0)
    z = 3+torch.randn(V,7,4, dtype=torch.float64)*torch.tensor([.2,.5,1.,3.]) # some features vary by less than 1, some by more
    z.requires_grad_()
    same(vicreg_loss(z, *weights, ids), loops(z, *weights, ids), z)
    assert torch.autograd.gradcheck(lambda o: vicreg_loss(o, *weights, ids), z)
    if V==2: same(vicreg_loss(z, *weights), official(*z, *weights), z)
    with torch.no_grad(): torch.testing.assert_close(vicreg_loss(z, *weights, ids), loops(z, *weights, ids))

def test_types():
    "float32 or wider, whatever comes in and whatever autocast would like; the gradient has the type of what came in"
    z = torch.randn(2,64,8, requires_grad=True)
    want = vicreg_loss(z)
    with torch.autocast('cpu', torch.bfloat16): got = vicreg_loss(z)
    assert torch.equal(got, want) and got.dtype==torch.float32
    assert vicreg_loss(z.bfloat16()).dtype==torch.float32
    half = z.detach().bfloat16().requires_grad_()
    vicreg_loss(half).backward()
    assert half.grad.dtype==torch.bfloat16 and half.grad.abs().sum()>0
    wide = torch.randn(3,9,5, dtype=torch.float64, requires_grad=True)
    same(7*vicreg_loss(wide), 7*loops(wide), wide) # a gradient that comes from above

def test_nothing_varies():
    "One image, or images that are all the same: finite, and 0.99 times the weight of the variance"
    for z in (torch.randn(1,1,5).expand(3,1,5).requires_grad_(), torch.ones(3,4,5, requires_grad=True)):
        loss = vicreg_loss(z)
        loss.backward()
        assert loss.item()==pytest.approx(25*.99, rel=1e-5) and z.grad.isfinite().all()

@pytest.mark.parametrize('B,D', [(2,60), (64,3)])
def test_memory(B, D):
    "No tensor is larger than the projections or one matrix of covariances, and autograd keeps nothing of the second kind"
    V,kept = 6,{}
    z = torch.randn(V,B,D, requires_grad=True)
    def keep(t): kept[t.untyped_storage()._cdata] = t; return t # and holds it, lest another takes its place
    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = vicreg_loss(z)
        loss.backward()
    assert max(sizes.seen)==max(V*B*D, D*D)
    assert max(o.numel() for o in kept.values())<=V*B*D and sum(o.numel() for o in kept.values())<8*V*B*D

def test_wrong_arguments():
    z = torch.randn(2,4,3)
    for bad,msg in ((dict(std=-1), 'std=-1.*must not be negative'), (dict(ids=(0,2)), r'ids=\[0, 2\]'), (dict(ids=(0,0)), 'different'), (dict(ids=()), r'ids=\[\]')):
        with pytest.raises(ValueError, match=msg): vicreg_loss(z, **bad)
    with pytest.raises(ValueError, match='two views or more'): vicreg_loss(z.flatten(0,1))
    for bad in (dict(sim=-.1), dict(std=-.1), dict(cov=-.1), dict(crop_assgn_ids=(0,2))):
        with pytest.raises(ValueError, match=next(iter(bad))): VICReg(corners(8,8), **bad)
    with pytest.raises(ValueError, match='bs=1.*use 32 or more'):
        quiet(learner('vicreg', tensor_dls(images(8), bs=1), create_vicreg_model(small_encoder(False), 8, 4, bn=False), VICReg(corners(8,8))), 1)


def small_model(bn=True): return create_vicreg_model(small_encoder(bn), 8, 5, bn=bn)

@pytest.mark.parametrize('sizes,ids', [((8,8),(0,1)), ((8,8,5,5,5,5),(0,1)), ((8,8,8),(2,))], ids='2 2+4 one'.split())
@pytest.mark.parametrize('accumulate', [False, True])
def test_ten_steps(sizes, ids, accumulate):
    "Loss, every gradient and weight, with a last batch that is short, and when two batches make a step"
    torch.manual_seed(0)
    x,bs,lr = torch.rand(22,1,12,12, dtype=torch.float64),4,.02
    model = small_model().double()
    plain = copy.deepcopy(model)
    dls = tensor_dls(x, bs=bs, drop_last=False, shuffle=False, device='cpu')
    learn = Learner(dls, model, opt_func=SGD, cbs=[VICReg(corners(*sizes), 2., 3., .5, crop_assgn_ids=ids), Record(), *([GradientAccumulation(2*bs)] if accumulate else [])])
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.fit(2, lr=lr, wd=0.)

    plain.train()
    n = done = 0
    for i,batch in enumerate([*x.split(bs), *x.split(bs)]):
        views = [o(batch) for o in corners(*sizes)]
        sized = [torch.cat([o for o in views if o.shape[-1]==s]) for s in dict.fromkeys(sizes)] # a batch norm sees all views of a size together
        loss  = loops(plain.projector(torch.cat([plain.encoder(o) for o in sized])).view(len(views),-1,5), 2., 3., .5, ids)
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

def test_views_of_two_kinds():
    a,b = ({type(o).__name__: o for o in p.fs} for p in get_vicreg_aug_pipelines(16))
    assert a['RandomGaussianBlur'].p==1 and b['RandomGaussianBlur'].p==.1 and 'RandomSolarize' not in a and b['RandomSolarize'].p==.2
    assert all((o['RandomJitter'].s, o['RandomJitter'].saturation, o['RandomJitter'].p, o['RandomGray'].p, o['RandomCropResize'].scale)==(.5,.5,.8,.2,(.08,1.)) for o in (a,b))

@pytest.mark.parametrize('name,epochs,base', [('vicreg_100ep',100,.3), ('vicreg_1000ep',1000,.2)])
def test_official_recipes(name, epochs, base):
    r = get_recipe(name)
    cb = r.create_callback()
    assert (r.epochs, r.bs, r.opt, r.wd, cb.sim, cb.std, cb.cov)==(epochs, 2048, 'larc', 1e-6, 25, 25, 1)
    assert (r.lr, r.lr_final)==pytest.approx((base*2048/256, base*2048/256000))
    with torch.device('meta'): m = r.create_model(nn.Sequential(nn.Conv2d(3,2048,1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert [type(o).__name__ for o in m.projector]==['Linear','BatchNorm1d','ReLU']*2+['Linear'] and m.projector[-1].bias is None
    assert [tuple(o.weight.shape) for o in m.projector if isinstance(o, nn.Linear)]==[(8192,2048),(8192,8192),(8192,8192)]

@pytest.mark.parametrize('bs,base', [(2048,.3), (1024,.3), (512,.4), (256,.5)])
def test_learning_rate_of_small_batches(bs, base):
    "That of the paper's study; the small recipes' Adam has its own"
    r = get_recipe('vicreg_100ep', bs=bs)
    for _,settings in VICReg.suggest(r, 10000): r = r.new(**settings)
    assert (r.lr, r.lr_final)==pytest.approx((base*bs/256, base*bs/256000))
    assert VICReg.suggest(get_recipe('vicreg_small'), 10000)==[]


# N processes

dealt = {2:[4,3], 3:[1,4,2]} # images of each: uneven batches
def projections(): return 1+.7*torch.randn(4,7,5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

def shares(folder):
    z,res = projections().split(dealt[world_size()], 1)[rank()],[]
    for ids in ((0,1), (2,)):
        mine = z.clone().requires_grad_()
        loss = vicreg_loss(mine, 3., 2., 1., ids)
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
        loss = loops(z, 3., 2., 1., ids)
        loss.backward()
        for o in res: torch.testing.assert_close(o[i][0], loss.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([o[i][1] for o in res], 1)/n, z.grad, rtol=1e-10, atol=1e-12)


# Health

@lru_cache
def run(**kwargs):
    views = get_vicreg_aug_pipelines(20, resize_scale=(.4,1), jitter=False, bw=False, blur=False, solarize=False, stats=None)
    return monitored(lambda enc: create_vicreg_model(enc, 128, 64, bn=False), VICReg(views, **kwargs), epochs=6, lr=1e-2)

def test_collapse_is_seen():
    "Without the variance all images become the same, without the covariance all features; as it should be, neither"
    same_images,same_features,whole = run(std=0.),run(cov=0.),run()
    for o in (same_images,same_features,whole): print({k:(v[0],v[-1]) for k,v in o.history.items()}, o.warning)
    assert 'looks like a collapse' in same_images.warning and 'VICReg(std=25.0), now 0.0' in same_images.warning
    assert same_features.history['rank'][-1]<.75*whole.history['rank'][-1]
    assert not whole.warning and whole.history['std'][-1]>.5 and whole.history['loss-chance'][-1]<-2
