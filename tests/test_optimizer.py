"LARC, LARS and the schedule, against the formulas written out"
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import Optimizer, OptimWrapper, average_grad, momentum_step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from methods import images, quiet
from self_supervised.checkpoint import Checkpoint
from self_supervised.data import tensor_dls
from self_supervised.optimizer import LARC, LARS, warmup_cos

eta,m = 1e-3,.9

def larc(ws, grads, lrs, wd, clip, exempt):
    "apex's LARC over SGD, in float64, one weight vector after the other"
    res = []
    for w,gs,free in zip(ws, grads, exempt):
        w,v = w.astype(float).copy(),np.zeros(w.shape)
        for g,lr in zip(gs, lrs):
            g = g.astype(float)
            if not free:
                rate = eta*np.sqrt((w**2).sum())/(np.sqrt((g**2).sum()) + wd*np.sqrt((w**2).sum()))
                if clip: rate = min(rate/lr, 1)
                g = rate*(g + wd*w)
            v = m*v + g
            w = w - lr*v
        res.append(w)
    return res

def lars(ws, grads, lrs, wd, exempt):
    "You et al. 2017, algorithm 1"
    res = []
    for w,gs,free in zip(ws, grads, exempt):
        w,v = w.astype(float).copy(),np.zeros(w.shape)
        for g,lr in zip(gs, lrs):
            local = 1. if free else eta*np.linalg.norm(w.ravel())/(np.linalg.norm(g.ravel()) + wd*np.linalg.norm(w.ravel()))
            v = m*v + lr*local*(g + (0 if free else wd)*w)
            w = w - v
        res.append(w)
    return res

lrs = [.3, 1., 4.8, 4.8, .5]
rng = np.random.default_rng(0)
ws  = [rng.normal(size=s).astype(np.float32) for s in ((5,3),(4,),(2,2,3))]
gs  = [[rng.normal(size=w.shape).astype(np.float32)*10.**-i for i in range(len(lrs))] for w in ws]

def ours(opt_func, exempt, **kwargs):
    ps  = [nn.Parameter(torch.tensor(w)) for w in ws]
    opt = opt_func(ps, lr=1., **kwargs)
    for p,free in zip(ps, exempt):
        if free: opt.state[p]['do_wd'] = False
    for i,lr in enumerate(lrs):
        for p,g in zip(ps, gs): p.grad = torch.tensor(g[i])
        opt.set_hyper('lr', lr)
        opt.step()
    return [p.detach().numpy() for p in ps]

@pytest.mark.parametrize('wd', [0., 1e-6, .1])
@pytest.mark.parametrize('exempt', [(False,)*3, (False,True,False)])
@pytest.mark.parametrize('clip', [False, True])
def test_larc(wd, exempt, clip):
    for a,b in zip(ours(LARC, exempt, wd=wd, clip=clip), larc(ws, gs, lrs, wd, clip, exempt)): np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('wd', [0., 1e-6, .1])
@pytest.mark.parametrize('exempt', [(False,)*3, (False,True,False)])
def test_lars(wd, exempt):
    for a,b in zip(ours(LARS, exempt, wd=wd), lars(ws, gs, lrs, wd, exempt)): np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)

def scale(p, lr, wd, trust_coeff, eps, clip, do_wd=True, **kwargs):
    "The rate of LARC as a function for fastai's optimizer"
    if not do_wd: return
    w,g  = p.data.norm(),p.grad.norm()
    rate = torch.where((w>0) & (g>0), trust_coeff*w/(g + wd*w + eps), torch.ones_like(w))
    if clip: rate = (rate/lr).clamp_max(1.)
    p.grad.add_(p.data, alpha=wd).mul_(rate)

@pytest.mark.parametrize('clip,wd,foreach', [(False,.1,None), (True,.1,True), (False,0.,True), (True,1e-6,None)])
def test_larc_moves_as_an_optimizer_of_fastai_does(clip, wd, foreach):
    "To the last bit, through two groups with a rate each, exempt, frozen and unused tensors, lengths and gradients of zero, and momenta that change"
    torch.manual_seed(0)
    a = [nn.Parameter(torch.randn(o)) for o in ((5,3), (4,), (2,2,3), (7,), (64,64), (3,))]
    a[-1].data.zero_()
    b = [nn.Parameter(o.detach().clone()) for o in a]
    want = Optimizer([a[:2],a[2:]], [partial(scale, clip=clip), average_grad, momentum_step], lr=1., mom=.9, wd=wd, trust_coeff=eta, eps=1e-8)
    got  = LARC([b[:2],b[2:]], lr=1., wd=wd, clip=clip)
    got.set_hyper('foreach', [foreach]*2) # what it would choose on a GPU
    for ps,opt in ((a,want),(b,got)):
        for i in (1,3): opt.state[ps[i]]['do_wd'] = False
    for t in range(12):
        for opt in (want,got):
            opt.zero_grad()
            opt.set_hyper('lr', slice(lrs[t%5]/10, lrs[t%5])); opt.set_hyper('mom', .9-.05*t)
            if t==7: opt.freeze_to(1)
        for i,(p,q) in enumerate(zip(a, b)):
            if (t+i)%5==0: continue # has no part in this loss
            g = torch.randn(p.shape)*10.**-(t%4)*(t%3>0 or i>0)
            for o in (p,q): o.grad = g.clone()
        for opt in (want,got): opt.step()
        for p,q in zip(a, b): assert torch.equal(p, q)
    for h,k in zip(want.hypers, got.hypers): assert h.items() <= k.items()

def lars_scale(p, lr, wd, trust_coeff, eps, do_wd=True, **kwargs):
    "LARS as functions for fastai's optimizer, which take one tensor after the other"
    w,g = p.data,p.grad.data
    if do_wd:
        nw,ng = w.norm(),g.norm()
        g.add_(w, alpha=wd).mul_(torch.where((nw>0) & (ng>0), trust_coeff*nw/(ng + wd*nw + eps), 1.))
    g.mul_(lr)

def lars_step(p, grad_avg, **kwargs): p.data.sub_(grad_avg)

@pytest.mark.parametrize('wd', [0., 1e-6, .1])
def test_lars_moves_as_an_optimizer_of_fastai_does(wd):
    "To the last bit, with all that can happen to a tensor, in two types; and one goes on from the state of the other"
    torch.manual_seed(0)
    a = [nn.Parameter(torch.randn(o)) for o in ((5,3), (4,), (2,2,3), (7,), (64,64), (3,))] + [nn.Parameter(torch.randn(6, 2, dtype=torch.float64))]
    a[-2].data.zero_()
    def slow(ps): return Optimizer([ps[:2],ps[2:]], [lars_scale, average_grad, lars_step], lr=1., mom=.9, wd=wd, trust_coeff=eta, eps=1e-8)
    def fast(ps): return LARS([ps[:2],ps[2:]], lr=1., wd=wd)
    b = [nn.Parameter(o.detach().clone()) for o in a]
    want,got = slow(a),fast(b)
    for ps,opt in ((a,want),(b,got)):
        for i in (1,3): opt.state[ps[i]]['do_wd'] = False
    for t in range(16):
        if t==8: # files of either load into the other
            want_,got_ = slow(a),fast(b)
            want_.load_state_dict(deepcopy(got.state_dict())), got_.load_state_dict(deepcopy(want.state_dict()))
            want,got = want_,got_
        for opt in (want,got):
            opt.zero_grad()
            opt.set_hyper('lr', slice(lrs[t%5]/10, lrs[t%5])); opt.set_hyper('mom', .9-.04*t)
            if t==7: opt.freeze_to(1)
        assert all(p.grad is None or not p.grad.any() for p in b)
        for i,(p,q) in enumerate(zip(a, b)):
            if (t+i)%5==0: continue # has no part in this loss
            g = torch.randn(p.shape, dtype=p.dtype)*10.**-(t%4)*(t%3>0 or i>0)
            for o in (p,q): o.grad = g.clone()
        for opt in (want,got): opt.step()
        for p,q in zip(a, b): assert torch.equal(p, q) and (p.grad is None or torch.equal(p.grad, q.grad))
    with pytest.raises(NotImplementedError): got.step(lambda: 1.)

class Count(TorchDispatchMode):
    "How many operations make something new"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not func.is_view and func is not torch.ops.aten.detach_.default
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('opt_func', [LARC, partial(LARC, clip=True), LARS])
def test_many_tensors_are_no_more_operations_than_few(opt_func):
    counts = []
    for n in (5,200):
        opt = opt_func([nn.Parameter(torch.randn(4, 3, device='meta')) for _ in range(n)], lr=1.)
        if isinstance(opt, OptimWrapper): opt.set_hyper('foreach', [True])
        for _ in range(2): # momenta are made in the first step
            for p,*_ in opt.all_params(): p.grad = torch.randn(4, 3, device='meta')
            with Count() as c:
                opt.step()
                opt.zero_grad()
        counts.append(c.n)
    assert counts[0]==counts[1]<=25

def test_without_gradient_or_length():
    ps = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    opt = LARC(ps, lr=.5, wd=0.)
    ps[0].grad,ps[1].grad = torch.ones(3),torch.zeros(3)
    opt.step()
    assert ps[0].tolist()==[-.5]*3 and ps[1].tolist()==ps[2].tolist()==[1.]*3
    opt.set_hyper('wd', .1)
    opt.zero_grad()
    opt.opt.state[ps[0]].pop('momentum_buffer')
    opt.step()
    assert ps[1].tolist()==pytest.approx([1-.5*.1]*3) # decay alone

def net(): return nn.Sequential(nn.Flatten(), nn.Linear(196, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

@pytest.mark.parametrize('wd_bn_bias', [False, True])
def test_learner_says_who_is_exempt(wd_bn_bias):
    x = images(16).float()/255
    learn = Learner(tensor_dls(x, bs=8), net(), MSELossFlat(), opt_func=LARC, wd_bn_bias=wd_bn_bias)
    learn.create_opt()
    assert isinstance(learn.opt, OptimWrapper)
    free = [s.get('do_wd') is False for p,_,s,_ in learn.opt.all_params()]
    assert free==([False]*6 if wd_bn_bias else [False,True,True,True,False,True])

# the code of the papers draws the warm-up with np.linspace, whose last value is `base`; here the first value of the cosine is the first `base`
def official(steps, warmup, start, base, final):
    warm = [start + (base-start)*i/warmup for i in range(warmup)]
    return warm + [final + .5*(base-final)*(1 + np.cos(np.pi*t/(steps-warmup))) for t in range(steps-warmup)]

class Half(Exception): pass

@pytest.mark.parametrize('warmup,opt_func', [(0,LARS), (2,LARC)])
def test_schedule_at_every_step_and_after_a_resume(warmup, opt_func, tmp_path):
    args,epochs,batches = (.3,4.8,.0048),5,7
    def learner(cbs=True):
        torch.manual_seed(0)
        return Learner(tensor_dls((images(56).float()/255, torch.zeros(56).long()), bs=8, seed=1), net(), lambda p,*_: p.sin().mean(), opt_func=partial(opt_func, wd=.1),
                       cbs=Checkpoint(tmp_path/'ckpt', minutes=None, steps=5) if cbs else None, path=tmp_path)
    def sched(): return ParamScheduler({'lr':warmup_cos(*args, warmup/epochs)})
    def stop(cb):
        if cb.train_iter==18: raise Half('enough')
    want,learn = official(epochs*batches, warmup*batches, *args),learner()
    with pytest.raises(Half): quiet(learn, epochs, cbs=[sched(), Callback(before_step=stop)])
    np.testing.assert_allclose(learn.opt.hypers[0]['lr'], want[18], rtol=1e-9)
    learn = learner()
    learn.resume(override='callback.before_step')
    seen = []
    quiet(learn, epochs, cbs=[sched(), Callback(before_step=lambda cb: seen.append((cb.train_iter, cb.opt.hypers[0]['lr'])))])
    assert [i for i,_ in seen]==list(range(15, epochs*batches)) # from the checkpoint of step 15
    np.testing.assert_allclose([lr for _,lr in seen], want[15:], rtol=1e-9)
    np.testing.assert_allclose(learn.recorder.lrs, want, rtol=1e-9)
    whole = learner(cbs=False)
    quiet(whole, epochs, cbs=sched())
    for p,q in zip(whole.model.parameters(), learn.model.parameters()): assert p.isfinite().all() and torch.equal(p, q) # momentum and exempt tensors included

@pytest.mark.parametrize('warmup', [-.1, 1., 10])
def test_warmup_is_a_part(warmup):
    with pytest.raises(ValueError, match='part of training'): warmup_cos(.3, 4.8, 0., warmup)

@pytest.mark.parametrize('opt_func,foreach', [(LARC,False), (LARC,True), (partial(LARC, clip=True),True), (LARS,None)])
def test_reads_nothing_back_from_a_gpu(opt_func, foreach):
    "On a GPU that is not there: a value that had to be known would be an error"
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(4, 3, device='cuda'))
        opt = opt_func([p], lr=1.)
        if foreach is not None: opt.set_hyper('foreach', [foreach]) # a tensor that is not there does not count as one of a GPU
        for _ in range(2):
            p.grad = torch.empty_like(p)
            opt.step()
        with pytest.raises(Exception, match='local_scalar'): float(p.detach().norm())
