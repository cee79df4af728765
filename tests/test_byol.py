"BYOL against a loop of its own, in float64"
import copy, math

import pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from torch import nn

from methods import Record, corners, monitored, small_encoder
from self_supervised.augmentations import get_asymmetric_aug_pipelines
from self_supervised.data import tensor_dls
from self_supervised.vision.byol import BYOL, BYOLModel, byol_loss, create_byol_model, get_byol_aug_pipelines

def loops(p, t, ids):
    "The definition, pair by pair and image by image"
    terms = [2-2*sum(a*b for a,b in zip(p[v,i], t[k,i]))/(p[v,i].norm()*t[k,i].norm()) for k,a in enumerate(ids) for v in range(len(p)) if v!=a for i in range(p.shape[1])]
    return torch.stack(terms).mean()

@pytest.mark.parametrize('V,ids', [(2,(0,1)), (2,(1,)), (6,(0,1)), (5,(3,0,2))])
def test_loss(V, ids):
    torch.manual_seed(0)
    p,t = torch.randn(V,3,4, dtype=torch.float64, requires_grad=True),torch.randn(len(ids),3,4, dtype=torch.float64, requires_grad=True)
    a,b = byol_loss(p, t, ids),loops(p, t.detach(), ids)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o, p)[0] for o in (a,b)), rtol=0, atol=1e-12)
    assert t.grad is None and byol_loss(p.bfloat16(), t.bfloat16(), ids).dtype==torch.float32


@pytest.mark.parametrize('sizes', [(8,8), (8,8,5,5,5,5)])
@pytest.mark.parametrize('accumulate', [False, True])
def test_ten_steps(sizes, accumulate):
    "Loss, every gradient, student and teacher, with a last batch that is short, and when two batches make a step"
    torch.manual_seed(0)
    x,bs,lr,m = torch.rand(22,1,12,12, dtype=torch.float64),4,.2,.9
    model = create_byol_model(small_encoder(), 8, 5).double()
    plain = copy.deepcopy(model)
    dls = tensor_dls(x, bs=bs, drop_last=False, shuffle=False, device='cpu')
    learn = Learner(dls, model, opt_func=SGD, cbs=[BYOL(corners(*sizes), m=m), Record(), *([GradientAccumulation(2*bs)] if accumulate else [])])
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.fit(2, lr=lr, wd=0.)

    plain.train()
    own,n,done = [p for p in plain.parameters() if p.requires_grad],0,0
    for i,batch in enumerate([*x.split(bs), *x.split(bs)]):
        views = [o(batch) for o in corners(*sizes)]
        large,rest = torch.cat(views[:2]),torch.cat(views[2:]) if len(views)>2 else None # a batch norm sees all views of a size together
        feats = torch.cat([plain.encoder(o) for o in (large,rest) if o is not None])
        preds = plain.predictor(plain.projector(feats)).view(len(views),-1,5)
        with torch.no_grad(): targets = plain.teacher.projector(plain.teacher.encoder(large)).view(2,-1,5)
        loss = loops(preds, targets, (0,1))
        (loss*(len(batch)/(2*bs) if accumulate else 1)).backward()
        n += len(batch)
        stepped = not accumulate or n>=2*bs
        got_loss,got_grads,state = learn.record.steps[i]
        assert got_loss==pytest.approx(float(loss.detach()), abs=1e-10)
        if stepped:
            for k,p in plain.named_parameters():
                if p.requires_grad: torch.testing.assert_close(got_grads[k], p.grad, rtol=0, atol=1e-10, msg=f'{k} in batch {i}')
            now = m+(1-m)*(1-math.cos(math.pi*done/learn.byol.n_steps))/2
            with torch.no_grad():
                for p in own: p -= lr*p.grad; p.grad = None
                for part in ('encoder','projector'):
                    for t,s in zip(getattr(plain.teacher, part).parameters(), getattr(plain, part).parameters()): t.copy_(now*t+(1-now)*s)
                    for t,s in zip(getattr(plain.teacher, part).buffers(), getattr(plain, part).buffers()): t.copy_(s)
            n,done = 0,done+1
        for k,v in plain.state_dict().items():
            if k!='teacher.updates': torch.testing.assert_close(state[k].double(), v.double(), rtol=0, atol=1e-10, msg=f'{k} after batch {i}')
    assert done==int(learn.model.teacher.updates)==(5 if accumulate else 12)

def test_views_of_two_kinds():
    a,b = get_byol_aug_pipelines(16)
    kinds = lambda p: {type(o).__name__: o for o in p.fs}
    a,b = kinds(a),kinds(b)
    assert a['RandomGaussianBlur'].p==1 and b['RandomGaussianBlur'].p==.1 and 'RandomSolarize' not in a and b['RandomSolarize'].p==.2
    assert all((o['RandomJitter'].s, o['RandomJitter'].saturation, o['RandomJitter'].p, o['RandomGray'].p, o['RandomCropResize'].scale)==(.5,.5,.8,.2,(.08,1.)) for o in (a,b))
    with pytest.raises(ValueError, match='one probability a view'): get_asymmetric_aug_pipelines(16, blur_ps=(1,.5,.1))

def run(broken):
    "A fit, whole or without what keeps it alive"
    views = get_byol_aug_pipelines(20, resize_scale=(.4,1), jitter=False, bw=False, blur=False, solarize=False, stats=None)
    if not broken: return monitored(lambda enc: create_byol_model(enc, 128, 32), BYOL(views, m=.98))
    return monitored(lambda enc: BYOLModel(enc, create_byol_model(enc, 128, 32, bn=False).projector, nn.Identity()), BYOL(views, m=0., m_end=0.))

def test_collapse_is_seen():
    "Without predictor, and with the student for its teacher, all becomes one; as it should be, it does not"
    broken,whole = run(True),run(False)
    assert 'looks like a collapse' in broken.warning and 'agreement with the teacher' in broken.warning and not whole.warning
    assert broken.history['std'][-1]<.1<whole.history['std'][-1] and broken.history['agreement'][-1]>.999>whole.history['agreement'][-1]
