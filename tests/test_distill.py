"Distillation against a loop of its own, in float64"
import copy

import pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F

from methods import Record, corners
from self_supervised.data import tensor_dls
from self_supervised.vision.distill import Distill, create_distill_model, distill_loss

def loops(z, t, queue=None, temp=.2, temp_teacher=.01):
    "The definitions, pair by pair and image by image"
    unit,terms = lambda o: o/o.norm(),[]
    for a in t:
        for v in z:
            for i in range(len(v)):
                x,y = unit(v[i]),unit(a[i])
                if queue is None: terms.append(1-(x*y).sum()); continue
                keys = [y, *map(unit, queue)]
                s,p  = torch.stack([(k*x).sum()/temp for k in keys]),torch.stack([(k*y).sum()/temp_teacher for k in keys])
                terms.append(-((p-p.logsumexp(0)).exp()*(s-s.logsumexp(0))).sum())
    return torch.stack(terms).mean()

@pytest.mark.parametrize('V,A', [(1,1), (2,2), (5,2)])
@pytest.mark.parametrize('n', [None, 1, 7])
def test_loss(V, A, n):
    torch.manual_seed(0)
    z,t = torch.randn(V,3,4, dtype=torch.float64, requires_grad=True),torch.randn(A,3,4, dtype=torch.float64, requires_grad=True)
    q = None if n is None else torch.randn(n,4, dtype=torch.float64)
    a,b = distill_loss(z, t, q, .3, .05),loops(z, t.detach(), q, .3, .05)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o, z)[0] for o in (a,b)), rtol=0, atol=1e-12)
    assert t.grad is None and distill_loss(z.bfloat16(), t.bfloat16(), q).dtype==torch.float32 or q is not None

def net(*widths): return nn.Sequential(nn.Conv2d(1,widths[0],3), nn.BatchNorm2d(widths[0]), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4*widths[0],widths[1]))

@pytest.mark.parametrize('K', [None, 10])
@pytest.mark.parametrize('sizes,ids', [((8,), [0]), ((8,8,5,5,5,5), [0,1])])
@pytest.mark.parametrize('accumulate', [False, True])
def test_ten_steps(K, sizes, ids, accumulate):
    "Loss, gradients, weights and queue, with a short last batch, and when two batches make a step; the teacher sees its own size and normalisation, and stays"
    torch.manual_seed(0)
    x,bs,lr = torch.rand(22,1,12,12, dtype=torch.float64),4,.2
    model = create_distill_model(net(6,5), 8, teacher=net(7,9), teacher_size=10).double()
    plain,stats = copy.deepcopy(model),([.4],[.3])
    learn = Learner(tensor_dls(x, bs=bs, drop_last=False, shuffle=False, device='cpu'), model, opt_func=SGD,
                    cbs=[Distill(corners(*sizes), K=K, temp=.3, temp_teacher=.1, crop_assgn_ids=ids, teacher_stats=stats), Record(lambda learn: [learn.model.queue.feats.clone()]), *([GradientAccumulation(2*bs)] if accumulate else [])])
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.fit(2, lr=lr, wd=0.)

    plain.train()
    n,past = 0,[]
    for i,batch in enumerate([*x.split(bs), *x.split(bs)]):
        views = [o(batch) for o in corners(*sizes)]
        groups = [torch.cat([v for v in views if v.shape[-1]==s]) for s in dict.fromkeys(sizes)]
        z = plain.projector(torch.cat([plain.encoder(o) for o in groups])).view(len(views),-1,9)
        with torch.no_grad(): t = torch.stack([plain.teacher.eval()(F.interpolate((views[k]-.4)/.3, (10,10), mode='bilinear', antialias=True)) for k in ids])
        q = None if K is None else torch.cat(past)[:K] if past else t.flatten(0,1)
        loss = loops(z, t, q, .3, .1)
        (loss*(len(batch)/(2*bs) if accumulate else 1)).backward()
        if K: past = [t[0], *past]
        got,feats,got_grads,_ = learn.record.steps[i]
        assert got==pytest.approx(float(loss.detach()), abs=1e-6) # statistics are float32
        if K: torch.testing.assert_close(feats[0], torch.cat(past)[:K], rtol=0, atol=1e-6, check_dtype=False)
        n += len(batch)
        if accumulate and n<2*bs: continue
        n = 0
        with torch.no_grad():
            for k,p in plain.named_parameters():
                if not p.requires_grad: continue
                torch.testing.assert_close(got_grads[k], p.grad, rtol=0, atol=1e-5, msg=f'{k} in batch {i}')
                p -= lr*p.grad; p.grad = None
    if not n:
        for k,v in plain.state_dict().items():
            if not k.startswith('queue'): torch.testing.assert_close(model.state_dict()[k].double(), v.double(), rtol=0, atol=1e-6, msg=k)
    for a,b in zip(model.teacher.state_dict().values(), plain.teacher.state_dict().values(), strict=True): assert torch.equal(a, b)

def test_files_hold_no_teacher(tmp_path):
    torch.manual_seed(0)
    teacher = net(7,9)
    m = create_distill_model(net(6,5), 8, teacher=teacher)
    assert not any('teacher' in k for k in m.state_dict())
    again = create_distill_model(net(6,5), 8, teacher=teacher)
    again.load_state_dict(m.state_dict())
    assert all(torch.equal(a, b) for a,b in zip(m.encoder.parameters(), again.encoder.parameters()))
    with pytest.raises(ValueError, match='trained with another teacher'): create_distill_model(net(6,5), 8, teacher=net(7,9)).load_state_dict(m.state_dict())
    m.train()
    assert m.encoder.training and not any(o.training for o in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())

@pytest.mark.parametrize('kwargs,says', [(dict(K=0), 'K=0 is the length'), (dict(temp=0), 'temp=0'), (dict(temp_teacher=-1), 'temp_teacher=-1'), (dict(crop_assgn_ids=[1]), 'crop_assgn_ids=')])
def test_mistakes(kwargs, says):
    with pytest.raises(ValueError, match=says): Distill(corners(8), **kwargs)
    with pytest.raises(ValueError, match='gives 9 features'): create_distill_model(net(6,5), 8, 12, teacher=net(7,9))
