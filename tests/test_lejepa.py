"LeJEPA against loops of its own, in float64, and its statistic against numerical integration"
import copy, math
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.callback.training import GradientAccumulation
from fastai.layers import ConvLayer
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from scipy.integrate import quad
from torch import nn

import test_dist
from methods import Record, corners, images, learner, monitored, quiet, small_encoder
from processes import on_ranks
from self_supervised.basics import block_rows
from self_supervised.data import fashion_mnist, tensor_dls
from self_supervised.recipes import get_recipe
from self_supervised.vision import lejepa
from self_supervised.vision.lejepa import LeJEPA, create_lejepa_model, get_lejepa_aug_pipelines, lejepa_loss, random_directions, sigreg

def statistic(z, a, knots=17):
    "The definition: direction by direction, knot by knot on both sides of 0, image by image"
    res = []
    for j in range(a.shape[1]):
        x,h,total = [sum(p*q for p,q in zip(row, a[:,j])) for row in z],3/(knots-1),0.
        for k in range(1-knots, knots):
            t = k*h
            g = math.exp(-t*t/2)
            re,im = sum(torch.cos(t*o) for o in x)/len(x),sum(torch.sin(t*o) for o in x)/len(x)
            total = total + (h/2 if abs(k)==knots-1 else h)*((re-g)**2+im**2)*g
        res.append(len(x)*total)
    return sum(res)/len(res)

def loops(z, lamb, a, ids=(0,1), knots=17, scale=0.):
    "The loss, number by number"
    V,B,D = z.shape
    mu   = [[sum(z[i,b,d] for i in ids)/len(ids) for d in range(D)] for b in range(B)]
    inv  = sum((z[v,b,d]-mu[b][d])**2 for v in range(V) for b in range(B) for d in range(D))/(V*B*D)
    loss = (1-lamb)*inv + lamb*sum(statistic(o, a, knots) for o in z)/V
    if not scale: return loss
    means = [[sum(z[v,b,d] for b in range(B))/B for d in range(D)] for v in range(V)]
    stds  = [(sum((z[v,b,d]-means[v][d])**2 for b in range(B))/B)**.5 for v in range(V) for d in range(D)]
    return loss + scale*sum((1-o)**2 for o in stds)/len(stds)

def normal(*shape, seed=0, grad=True): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)
def dirs(D, M, seed=0): return random_directions(D, M, seed).double()
def same(got, want, z, atol=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    torch.testing.assert_close(*(torch.autograd.grad(o, z)[0] for o in (got, want)), rtol=0, atol=atol)


# The statistic

@pytest.mark.parametrize('N,D,M,knots', [(7,3,4,17), (1,2,3,17), (6,1,1,5), (5,4,3,2)])
def test_sigreg(N, D, M, knots):
    z,a = normal(N, D),dirs(D, M)
    same(sigreg(z, a, knots), statistic(z, a, knots), z)

@pytest.mark.parametrize('shape', [(5,3), (2,5,3)])
def test_gradcheck(shape): assert torch.autograd.gradcheck(lambda z: 3*sigreg(z, dirs(3, 4)), normal(*shape))

@pytest.mark.parametrize('cloud', [lambda z: z, lambda z: 0*z, lambda z: 2*z+1, lambda z: z.sign()], ids=['normal','one point','wide','two points'])
def test_numerical_integration(cloud):
    "scipy's adaptive integral over [-3,3]; 17 knots are near it, more are nearer"
    z,a = cloud(normal(30, 3, grad=False)),dirs(3, 3)
    def integrand(t, x):
        g = math.exp(-t*t/2)
        return abs(np.exp(1j*t*x).mean()-g)**2*g
    want = np.mean([30*quad(integrand, -3, 3, args=(x,), epsabs=1e-12)[0] for x in (z@a).T.numpy()])
    off  = [abs(sigreg(z, a, k).item()-want) for k in (17,65,1025)]
    assert off[0]<.01*want and off[1]<.1*off[0]+1e-6 and off[2]<1e-5*want+1e-6

def test_what_is_normal_and_what_is_not():
    "∫(1−e^{−t²})e^{−t²/2} is what normal samples have on average; other clouds are far, in proportion to their number, and so is what is normal but along one direction"
    floor = quad(lambda t: (1-math.exp(-t*t))*math.exp(-t*t/2), -3, 3)[0]
    small = np.mean([sigreg(normal(64, 8, seed=i, grad=False), dirs(8, 32, i)).item() for i in range(300)])
    assert small==pytest.approx(floor, rel=.05)
    z = normal(1024, 8, grad=False)
    flat = z.clone(); flat[:,0] = 0
    heaps = .3*z; heaps[:,0] += torch.where(torch.arange(1024)%2==0, 1., -1.)
    for o,least in [(0*z,300), (2*z,100), (.5*z,30), (z+1,30), (heaps,30), (flat,2*floor)]:
        few,many = sigreg(o[:256], dirs(8, 256)),sigreg(o, dirs(8, 256))
        assert many>least and (many/few>2.5 or o is flat)
    one_point = 1024*quad(lambda t: (1-math.exp(-t*t/2))**2*math.exp(-t*t/2), -3, 3)[0]
    assert sigreg(0*z, dirs(8, 4)).item()==pytest.approx(one_point, rel=.01)

def test_types_and_blocks(monkeypatch):
    "float32 or wider outside autocast, any number of blocks, and never more than some numbers of an image and direction at once"
    z,a = normal(40, 6),dirs(6, 50)
    whole = torch.autograd.grad(sigreg(z, a), z)[0]
    assert sigreg(z.bfloat16(), a).dtype==torch.float32
    with torch.autocast('cpu', torch.bfloat16): torch.testing.assert_close(sigreg(z.float(), a.float()), sigreg(z, a).float(), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(lejepa, 'block_rows', lambda t, n: 7)
    torch.testing.assert_close(torch.autograd.grad(sigreg(z, a), z)[0], whole, rtol=0, atol=1e-12)
    assert not sigreg(z.detach(), a).requires_grad
    for bad in (dict(z=z, directions=a.T), dict(z=z[0], directions=a)):
        with pytest.raises(ValueError, match='they must be'): sigreg(**bad)
    with pytest.raises(ValueError, match='knots=1'): sigreg(z, a, 1)

def test_memory():
    "Largest tensor of a pass, forward and backward: complex numbers of one block"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for o in out if isinstance(out, (tuple,list)) else [out]:
                if isinstance(o, torch.Tensor): self.n = max(self.n, o.untyped_storage().nbytes())
            return out
    z = torch.randn(4096, 4, requires_grad=True)
    with Largest() as seen: sigreg(z, random_directions(4, 2048)).backward()
    assert 4096*block_rows(z, 4096)==2**20 and seen.n<=8*2**20 # of 8 bytes; all images, directions and knots would be 570 MB


# The loss

@pytest.mark.parametrize('V,ids', [(2,(0,1)), (2,(1,)), (6,(0,1)), (4,(0,1,2,3)), (5,(3,0,2))])
@pytest.mark.parametrize('scale', [0., .7])
def test_loss(V, ids, scale):
    z,a = normal(V, 3, 4),dirs(4, 3)
    same(lejepa_loss(z, .1, a, ids, 9, scale), loops(z, .1, a, ids, 9, scale), z)
    assert lejepa_loss(z.bfloat16(), .1, a, ids).dtype==torch.float32

def test_wrong_values():
    z = normal(2, 3, 4)
    for kwargs,msg in [(dict(lamb=1.5), 'lamb=1.5'), (dict(lamb=-.1), 'lamb=-0.1'), (dict(scale=-1.), 'scale=-1.0'), (dict(ids=(0,2)), r'ids=\[0, 2\]')]:
        with pytest.raises(ValueError, match=msg): lejepa_loss(z, **kwargs)
    with pytest.raises(ValueError, match='two views or more'): lejepa_loss(z[:1])
    for kwargs,msg in [(dict(lamb=2), 'lamb=2'), (dict(scale=-1), 'scale=-1'), (dict(n_directions=0), 'n_directions=0'), (dict(knots=1), 'knots=1'), (dict(crop_assgn_ids=(0,5)), 'crop_assgn_ids')]:
        with pytest.raises(ValueError, match=msg): LeJEPA(corners(8,8), **kwargs)
    with pytest.raises(ValueError, match='bs=1'): quiet(learner('lejepa', tensor_dls(images(), bs=1), create_lejepa_model(small_encoder(False), 8, 4, bn=False)), 1)

def test_all_the_same():
    "No NaN where all projections are one point, to the bit"
    z = torch.ones(2,8,4, requires_grad=True)
    loss = lejepa_loss(z, scale=1.)
    assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()

@pytest.mark.parametrize('sizes,ids', [((8,8),(0,1)), ((8,8,5,5,5,5),(0,1)), ((8,8,8),(0,1,2))])
@pytest.mark.parametrize('accumulate', [False, True])
def test_ten_steps(sizes, ids, accumulate):
    "Loss, every gradient and the weights, with a last batch that is short, and when two batches make a step, which then have the same directions"
    torch.manual_seed(0)
    x,bs,lr,scale = torch.rand(22,1,12,12, dtype=torch.float64),4,.2,.3
    model = create_lejepa_model(small_encoder(), 8, 3).double()
    plain = copy.deepcopy(model)
    dls = tensor_dls(x, bs=bs, drop_last=False, shuffle=False, device='cpu')
    learn = Learner(dls, model, opt_func=SGD, cbs=[LeJEPA(corners(*sizes), .1, n_directions=3, knots=7, scale=scale, crop_assgn_ids=ids), Record(), *([GradientAccumulation(2*bs)] if accumulate else [])])
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.fit(2, lr=lr, wd=0.)

    plain.train()
    n = done = in_epoch = 0
    for i,batch in enumerate([*x.split(bs), *x.split(bs)]):
        views = [o(batch) for o in corners(*sizes)]
        feats = torch.cat([plain.encoder(torch.cat([o for o in views if o.shape[-1]==s])) for s in dict.fromkeys(sizes)]) # a batch norm sees all views of a size together
        loss  = loops(plain.projector(feats).view(len(views),-1,3), .1, dirs(3, 3, done-in_epoch+1), ids, 7, scale)
        (loss*(len(batch)/(2*bs) if accumulate else 1)).backward()
        n += len(batch)
        got_loss,got_grads,state = learn.record.steps[i]
        assert got_loss==pytest.approx(float(loss.detach()), abs=1e-10)
        if not accumulate or n>=2*bs:
            for k,p in plain.named_parameters(): torch.testing.assert_close(got_grads[k], p.grad, rtol=0, atol=1e-10, msg=f'{k} in batch {i}')
            with torch.no_grad():
                for p in plain.parameters(): p -= lr*p.grad; p.grad = None
            n,done = 0,done+1
        for k,v in plain.state_dict().items(): torch.testing.assert_close(state[k].double(), v.double(), rtol=0, atol=1e-10, msg=f'{k} after batch {i}')
    assert done==(5 if accumulate else 12)


# Directions

def test_directions(monkeypatch):
    "Of a step of the optimizer in training, the same always in validation; nobody else's random numbers are touched"
    seen,draw = [],lejepa.random_directions
    def _draw(dim, n=256, seed=None, device='cpu'):
        seen.append(seed)
        return draw(dim, n, seed, device)
    monkeypatch.setattr(lejepa, 'random_directions', _draw)
    quiet(learner('lejepa'), 2) # 5 batches of training and 2 of validation an epoch
    assert seen==[1,2,3,4,5,0,0,6,7,8,9,10,0,0]
    learn,seen[:] = learner('lejepa'),[]
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    seen.clear(); quiet(learn, 1)
    assert seen[:5]==[1,2,3,4,5]
    seen.clear(); quiet(learn, 1, cbs=GradientAccumulation(16))
    assert seen[:5]==[1,1,2,2,3]
    rng = torch.get_rng_state()
    a,b,c = draw(6, 9, 1),draw(6, 9, 1),draw(6, 9, 2)
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(rng, torch.get_rng_state())
    torch.testing.assert_close(draw(6, 9).norm(dim=0), torch.ones(9))


# N processes

def share(z, n, r): return z.split({2:[4,2], 3:[1,3,2]}[n], 1)[r]

def functions(folder):
    from self_supervised.dist import rank, world_size
    z = share(normal(3, 6, 4, grad=False), world_size(), rank()).clone().requires_grad_()
    loss = lejepa_loss(z, .1, dirs(4, 5), scale=.3)
    loss.backward()
    with pytest.raises(ValueError, match='the same directions'): lejepa_loss(z)
    return dict(loss=loss.detach(), grad=z.grad/world_size(), alone=sigreg(z[0], dirs(4, 5)).detach())

def fits(folder, size=test_dist.bs, order=None):
    res = {}
    for scale in (0., .5):
        torch.manual_seed(7)
        dls = tensor_dls(test_dist.pictures(), test_dist.pictures()[:7], bs=size, drop_last=False, shuffle=False)
        if order: dls.train.get_idxs = lambda: order
        learn = Learner(dls, test_dist.no_bn_model('lejepa').double(), opt_func=SGD, path=folder, cbs=[LeJEPA(corners(8,8,5,5), .1, n_directions=20, scale=scale), test_dist.Record()])
        learn.remove_cbs([Recorder, ProgressCallback])
        with learn.distrib_ctx(): learn.fit(2, lr=.1, wd=0.)
        res[scale] = test_dist.result(learn)
    return res

def both(folder): return functions(folder),fits(folder)

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_ranks_equal_one_process(n, tmp_path):
    "Loss and gradient of batches of different sizes; and every loss, gradient and weight of fits, with the last batch uneven"
    z = normal(3, 6, 4)
    loss = lejepa_loss(z, .1, dirs(4, 5), scale=.3)
    grad,one = torch.autograd.grad(loss, z)[0],fits(tmp_path, test_dist.bs*n, test_dist.joined(n))
    for r,(f,many) in enumerate(on_ranks(both, tmp_path, n)):
        torch.testing.assert_close(f['loss'], loss.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(f['alone'], sigreg(z[0], dirs(4, 5)).detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(f['grad'], share(grad, n, r), rtol=0, atol=1e-12)
        for k in one: assert test_dist.assert_same_steps(many[k], one[k]) < 1e-9


# Recipe

def test_official_recipe():
    r = get_recipe('lejepa_imagenette')
    cb = r.create_callback()
    kinds = {type(o).__name__: o for o in cb.aug_pipelines[0].fs}
    assert len(cb.aug_pipelines)==4 and cb.crop_assgn_ids==[0,1,2,3] and (cb.lamb, cb.n_directions, cb.knots, cb.scale)==(.02,256,17,0.)
    assert (kinds['RandomCropResize'].scale, kinds['RandomCropResize'].size, kinds['RandomJitter'].s, kinds['RandomJitter'].saturation, kinds['RandomSolarize'].p)==((.08,1.), (128,128), 1., 1., .2)
    m = r.create_model(nn.Sequential(nn.Conv2d(3,384,1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    kinds = [type(o).__name__ for o in m.projector]
    assert kinds==['Linear','BatchNorm1d','ReLU']*2+['Linear'] and [tuple(o.weight.shape) for o in m.projector if isinstance(o, nn.Linear)]==[(2048,384),(2048,2048),(16,2048)]

def test_views():
    pipes = get_lejepa_aug_pipelines()
    of = lambda nm: [next(o for o in p.fs if type(o).__name__==nm) for p in pipes]
    assert [o.size for o in of('RandomCropResize')]==[(224,224)]*2+[(98,98)]*6 and [o.scale for o in of('RandomCropResize')]==[(.3,1.)]*2+[(.05,.3)]*6
    assert {(o.s, o.saturation, o.p) for o in of('RandomJitter')}=={(.5,.5,.8)} and {o.p for o in of('RandomSolarize')}=={.2} and {o.p for o in of('RandomGaussianBlur')}=={.5}


# Health

views = partial(get_lejepa_aug_pipelines, (2,), (20,), (.4,), (1.,), jitter=False, bw=False, blur=False, solarize=False, stats=None)

def spreads(scale):
    "The spread of the projections, step by step, of a fit that starts with all of them at one point but for a hundred-thousandth"
    class Spread(Callback):
        def before_fit(self): self.seen = []
        def after_pred(self): self.seen.append(self.pred.detach().chunk(2)[0].std(0, correction=0).mean().item())
    torch.manual_seed(0)
    (x,_),_ = fashion_mnist()
    enc   = nn.Sequential(ConvLayer(1,16,stride=2), ConvLayer(16,32,stride=2), ConvLayer(32,64,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = create_lejepa_model(enc, 128, 16)
    with torch.no_grad(): model.projector[-1].weight *= 1e-5
    learn = Learner(tensor_dls(x[:1024], bs=64, device='cpu', seed=0), model, opt_func=SGD, cbs=[LeJEPA(views(), scale=scale), Spread()])
    quiet(learn, 4, 2e-2)
    return learn.spread.seen

def test_leaves_a_collapsed_start():
    "With the scale term it does in 64 steps of SGD, the plain statistic does not"
    plain,scaled = spreads(0.),spreads(1.)
    assert plain[0]==scaled[0]<1e-4 and max(plain)<1e-3 and scaled[-1]>.7

def test_gradient_at_a_collapse():
    "That of SIGReg goes to zero with the spread; that of the scale term stays"
    def force(spread, scale):
        z = (spread*normal(1, 64, 8, grad=False)).expand(2,-1,-1).clone().requires_grad_()
        return torch.autograd.grad(lejepa_loss(z, .05, dirs(8, 64), scale=scale), z)[0].norm().item()
    for s in (1e-2, 1e-3, 1e-4): assert force(s/10, 0.)==pytest.approx(force(s, 0.)/10, rel=.01) and force(s/10, 1.)==pytest.approx(force(s, 1.), rel=.1)

def run(**kwargs): return monitored(lambda enc: create_lejepa_model(enc, 128, 32), LeJEPA(views(), **kwargs), epochs=6, lr=1e-2)

def test_collapse_is_seen():
    "Without SIGReg all becomes one; as it should be, it does not"
    broken,whole,scaled = run(lamb=0.),run(),run(scale=1.)
    assert 'looks like a collapse' in broken.warning and not whole.warning and not scaled.warning
    assert 'LeJEPA(scale=1.0), now 0.0' in broken.warning and 'LeJEPA(lamb=0.05), now 0.0' in broken.warning
    assert broken.history['std'][-1]<.45 and whole.history['std'][-1]>.9 and whole.history['rank'][-1]>broken.history['rank'][-1]
