"A step of a method asks nothing of the device that it would have to wait for"
from contextlib import nullcontext
from functools import partial

import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Recorder
from fastai.optimizer import Adam
from fastcore.foundation import L
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from methods import callback, learner, methods, model, quiet
from self_supervised.optimizer import LARC, LARS
from self_supervised.sinkhorn import sinkhorn_knopp
from self_supervised.vision import lejepa
from self_supervised.vision.lejepa import random_directions
from self_supervised.vision.simclr import nt_xent_loss
from self_supervised.vision.supcon import supcon_loss

def _on(o): return isinstance(o, torch.Tensor) and o.device.type=='meta'

class _Asked(TorchFunctionMode):
    "Numbers that Python has and the device has not travel as a copy that waits: lists as indices, and `torch.tensor` on a device"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name   = getattr(func, '__name__', '')
        if name in ('__getitem__','__setitem__') and _on(args[0]):
            assert not any(isinstance(o, (list,L)) for o in (args[1] if isinstance(args[1], tuple) else (args[1],))), 'a list as an index of a tensor of the device'
        if name in ('tensor','as_tensor') and torch.device(kwargs.get('device') or 'cpu').type=='meta' or name=='new_tensor' and _on(args[0]):
            assert _on(args[0] if name!='new_tensor' else args[1]), 'a tensor of numbers of Python, on the device'
        return func(*args, **kwargs)

class NoWaiting(TorchDispatchMode):
    "Tensors of the device `meta` have no values to read; what moves to it, or mixes with it, may not make it wait"
    def __enter__(self):
        self.asked = _Asked()
        self.asked.__enter__()
        return super().__enter__()
    def __exit__(self, *args):
        super().__exit__(*args)
        self.asked.__exit__(*args)
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            here,there = args[0].device,kwargs.get('device', args[0].device)
            assert here==there or there.type=='meta' and kwargs.get('non_blocking'), 'a copy from the device, or to it that waits'
        elif func is not torch.ops.aten.copy_.default or args[1].ndim:
            assert len({o.device.type for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor) and o.ndim})<2, f'{func} mixes devices'
        return func(*args, **kwargs)

class MetaSteps(Callback):
    "In the third batch of a fit, take the model and the batch to a device without values, and go two steps there"
    order = -100
    steps = 0
    def before_batch(self):
        learn = self.learn
        if self.steps or not learn.training or learn.train_iter<2: return
        model,cb = learn.model,next(o for o in learn.cbs if type(o) in {m.callback for m in methods.values()})
        learn.model = model.to('meta')
        learn.opt   = None
        learn.create_opt()
        for k,v in vars(cb).items():
            if isinstance(v, torch.Tensor): setattr(cb, k, v.to('meta'))
        xb,yb = [tuple(o.to('meta') for o in b) for b in (learn.xb,learn.yb)]
        self.steps = 1
        if getattr(cb, '_ids', None): cb._ids.order = cb._ids.order.to('meta')
        with NoWaiting():
            for _ in range(2):
                learn.xb,learn.yb = xb,yb
                learn('before_batch')
                learn._do_one_batch()
                self.steps += 1
        raise CancelFitException

def _without_generator(dim, n, seed, device): return random_directions(dim, n, None, device) # there is none for the device `meta`

settings = [*((nm, {}, opt) for nm in methods for opt in (Adam,LARC,LARS)), ('swav', dict(hard_codes=True), Adam), ('swav', dict(K=None), Adam), ('moco', dict(K=None), Adam), ('dino', dict(centring='sinkhorn'), Adam),
            ('supcon', dict(unsup_class_id=1), Adam), ('supcon', dict(unsup_class_id=1, unsup_method='only'), Adam), ('distill', dict(K=None), Adam), ('lejepa', dict(scale=1.), Adam), ('moco', dict(running_bn=True), Adam)]

@pytest.mark.parametrize('name,kwargs,opt', settings, ids=lambda o: getattr(o, '__name__', str(o)))
def test_a_step_never_waits(name, kwargs, opt, monkeypatch):
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext()) # which knows no device `meta`
    monkeypatch.setattr(lejepa, 'random_directions', _without_generator)
    learn = learner(name, cb=callback(name, **kwargs), cbs=MetaSteps(), opt_func=partial(opt, lr=1e-3))
    learn.remove_cbs([Recorder])
    quiet(learn, 1)
    assert learn.meta_steps.steps==3

def test_waiting_would_be_seen():
    x = torch.zeros(4, device='meta')
    for f in (lambda: x[torch.arange(2)], lambda: torch.arange(2).to('meta'), lambda: x+torch.arange(4), lambda: x[[0,1]], lambda: x[[0,1],], lambda: x[L(0,1)],
              lambda: torch.tensor([0], device='meta'), lambda: torch.as_tensor([0], device='meta'), lambda: x.new_tensor([0]), lambda: x.cpu()):
        with pytest.raises((AssertionError,RuntimeError,NotImplementedError)), NoWaiting(): f()
    for f in (lambda: x.sum().item(), lambda: x[x>0], lambda: x.tolist(), lambda: float(x.sum()), lambda: bool(x.sum())):
        with pytest.raises(Exception), NoWaiting(): f()

# ---- nor are there many small things to do, or large ones to keep

class Count(TorchDispatchMode):
    "Operations that make something new, and the most numbers that one of them has made"
    n = largest = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.n += 1
            self.largest = max([self.largest, *(o.numel() for o in tree_leaves(res) if isinstance(o, torch.Tensor))])
        return res

@pytest.mark.parametrize('loss,at_once', [(nt_xent_loss,60), (supcon_loss,90), (lambda z: sinkhorn_knopp(z.detach()@torch.empty(len(z.T), 4096, device='meta')), 30)], ids=['nt_xent','supcon','sinkhorn'])
def test_blocks_of_a_device(loss, at_once, monkeypatch):
    "512 views in one block, and never a block of more than 2**24 numbers (or the scores)"
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
    for n in (512,8192,32768):
        z = torch.empty(n, 128, device='meta', requires_grad=True)
        with Count() as c:
            if (res := loss(z)).ndim==0: res.backward()
        if n==512: assert c.n<=at_once
        assert c.n<=at_once*n**2/2**18 and c.largest<=max(2**24, res.numel())

class Together(TorchDispatchMode):
    "Types of the tensors that are worked on together, and how many these are"
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'foreach' in str(func): self.seen.append(({o.dtype for o in args[0]}, len(args[0])))
        return func(*args, **(kwargs or {}))

def test_teacher_follows_in_few_operations():
    "Lists of mixed types would be taken tensor by tensor on a GPU"
    m = model('byol', enc=nn.Sequential(*(nn.Sequential(nn.Conv2d(c,4,1), nn.BatchNorm2d(4)) for c in (1,4,4)), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with Together() as t: m.teacher.update(m, .9)
    n = len([*m.teacher.encoder.buffers(), *m.teacher.projector.buffers()])
    assert [len(o) for o,_ in t.seen]==[1]*3 and sorted(k for _,k in t.seen)[0]==n//3 and n>9
    m.train(); m([torch.rand(4,1,6,6)])
    m.teacher.update(m, .9)
    for a,b in zip([*m.teacher.encoder.buffers(), *m.teacher.projector.buffers()], [*m.encoder.buffers(), *m.projector.buffers()]): assert torch.equal(a, b)
