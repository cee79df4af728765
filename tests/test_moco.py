"MoCo, with a queue and without, against a loop of its own, in float64"
import copy, math

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from torch import nn

from methods import Record, corners, monitored, small_encoder
from self_supervised.data import tensor_dls
from self_supervised.recipes import get_recipe
from self_supervised.vision.moco import MOCO, create_moco_model, get_moco_aug_pipelines, moco_loss

from processes import on_ranks

def unit(x): return x/x.norm(dim=-1, keepdim=True)

def loops(q, k, temp, queue=None, ids=(0,1)):
    "The definition, pair by pair and image by image"
    q,k,terms = unit(q),unit(k),[]
    for i,a in enumerate(ids):
        for v in range(len(q)):
            for b in range(q.shape[1]):
                if v==a: continue
                others = [o for j,o in enumerate(k[i]) if j!=b] if queue is None else list(queue)
                scores = torch.stack([(q[v,b]*o).sum() for o in [k[i,b], *others]])/temp
                terms.append(-(scores[0].exp()/scores.exp().sum()).log())
    return torch.stack(terms).mean()*(2*temp if queue is None else 1)

@pytest.mark.parametrize('queue', [False, True])
@pytest.mark.parametrize('V,ids', [(2,(0,1)), (2,(1,)), (6,(0,1)), (5,(3,0,2)), (1,(None,))])
def test_loss(V, ids, queue):
    torch.manual_seed(0)
    q,k = torch.randn(V,3,4, dtype=torch.float64, requires_grad=True),torch.randn(len(ids),3,4, dtype=torch.float64, requires_grad=True)
    past = unit(torch.randn(7,4, dtype=torch.float64)) if queue else None
    a,b = moco_loss(q, k, .2, past, ids),loops(q, k.detach(), .2, past, ids)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o, q)[0] for o in (a,b)), rtol=0, atol=1e-12)
    assert not torch.autograd.grad(moco_loss(q, k, .2, past, ids), k, allow_unused=True)[0]

@pytest.mark.parametrize('queue', [False, True])
def test_loss_of_half_projections_is_float32(queue):
    "Also under autocast, and with scores that overflow in half precision"
    torch.manual_seed(0)
    q,k,past = (300*torch.randn(2,8,16)).half(),(300*torch.randn(2,8,16)).half(),unit(torch.randn(20,16)) if queue else None
    with torch.autocast('cpu', torch.bfloat16): loss = moco_loss(q, k, .01, past)
    assert loss.dtype==torch.float32
    torch.testing.assert_close(loss, loops(q.double(), k.double(), .01, past).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('accumulate', [False, True])
@pytest.mark.parametrize('K,sizes,ids,running', [(11,(8,8),(0,1),False), (11,(8,8),(1,),True), (30,(8,8,5,5,5,5),(0,1),False), (3,(8,8),(0,1),True), (None,(8,8),(0,1),False), (None,(8,8,5,5,5,5),(0,1),False)],
                         ids='queue one-direction queue-2+4 queue-shorter-than-batch batch batch-2+4'.split())
def test_ten_steps(K, sizes, ids, running, accumulate):
    "Loss, keys, every gradient, student, teacher and queue, with a last batch that is short, and when two batches make a step"
    torch.manual_seed(0)
    x,bs,lr,m,temp,D = torch.rand(22,1,12,12, dtype=torch.float64),4,.2,.9,.3,5
    model = create_moco_model(small_encoder(), 8, D, bn=True, predictor=not K, last_bn=not K).double()
    plain = copy.deepcopy(model)
    dls = tensor_dls(x, x[:7], bs=bs, drop_last=False, device='cpu')
    dls.train.shuffle = False
    learn = Learner(dls, model, opt_func=SGD, cbs=[MOCO(corners(*sizes), K, m=m, temp=temp, crop_assgn_ids=ids, running_bn=running), Record(lambda learn: [learn.moco.target]), *([GradientAccumulation(2*bs)] if accumulate else [])])
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.fit(2, lr=lr, wd=0.)

    plain.train()
    plain.teacher.train(not running)
    queue = [] if K else None # newest first
    asks  = [v for v in range(len(sizes)) if list(ids)!=[v]]
    own,n,done = [p for p in plain.parameters() if p.requires_grad],0,0
    for i,batch in enumerate([*x.split(bs), *x.split(bs)]):
        views = [o(batch) for o in corners(*sizes)]
        large,rest = torch.cat([views[v] for v in asks if v<2]),torch.cat(views[2:]) if len(views)>2 else None # a batch norm sees all views of a size together
        q = plain.predictor(plain.projector(torch.cat([plain.encoder(o) for o in (large,rest) if o is not None]))).view(len(asks),-1,D)
        with torch.no_grad(): k = plain.teacher.projector(plain.teacher.encoder(torch.cat([views[a] for a in ids]))).view(len(ids),-1,D)
        loss = loops(q, k, temp, queue or None, [asks.index(a) if a in asks else None for a in ids])
        if queue==[]: loss = loss/(2*temp) # the first batch has its own other keys
        (loss*(len(batch)/(2*bs) if accumulate else 1)).backward()
        if K: queue = ([key for b in range(len(batch)) for key in unit(k[:,b])] + queue)[:K]
        n += len(batch)
        got_loss,got_keys,got_grads,state = learn.record.steps[i]
        assert got_loss==pytest.approx(float(loss.detach()), abs=1e-10)
        torch.testing.assert_close(got_keys, k, rtol=0, atol=1e-10)
        if not accumulate or n>=2*bs:
            for nm,p in plain.named_parameters():
                if p.requires_grad: torch.testing.assert_close(got_grads[nm], p.grad, rtol=0, atol=1e-10, msg=f'{nm} in batch {i}')
            now = m if K else m+(1-m)*(1-math.cos(math.pi*done/learn.moco.n_steps))/2
            with torch.no_grad():
                for p in own: p -= lr*p.grad; p.grad = None
                for part in ('encoder','projector'):
                    for t,s in zip(getattr(plain.teacher, part).parameters(), getattr(plain, part).parameters()): t.copy_(now*t+(1-now)*s)
                    for t,s in zip(getattr(plain.teacher, part).buffers(), getattr(plain, part).buffers()): t.copy_(now*t+(1-now)*s if running and t.is_floating_point() else s)
            n,done = 0,done+1
        if K: plain.queue.feats = torch.stack(queue)[None]
        for nm,v in plain.state_dict().items():
            if nm!='teacher.updates': torch.testing.assert_close(state[nm].double(), v.double(), rtol=0, atol=1e-10, msg=f'{nm} after batch {i}')
    assert done==int(learn.model.teacher.updates)==(5 if accumulate else 12) and (K is None)==(not learn.model.queue.feats.numel())

def test_queue_of_another_length():
    "The newest stay; none without a queue; and validation leaves it alone"
    x = torch.rand(22,1,12,12)
    learn = Learner(tensor_dls(x, x[:7], bs=4), create_moco_model(small_encoder(), 8, 5), cbs=MOCO(corners(8,8), 12))
    cb = learn.moco
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=0.)
    first = learn.model.queue.feats
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert torch.equal(learn.model.queue.feats, first) and first.shape==(1,12,5)
    for K in (20,7):
        cb.K = K
        with learn.no_bar(), learn.no_logging(): learn.validate()
        assert torch.equal(learn.model.queue.feats, first[:,:K]) and cb.n_negs==min(K, 12)
    cb.K = None
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=0.)
    assert not learn.model.queue.feats.numel() and cb.queue is None

@pytest.mark.parametrize('running', [False, True])
def test_running_bn_tells_nothing_of_the_batch(running):
    "While it trains a key is the same in any company, and by default it is not; the student's batch norm works as ever"
    class Company(Callback):
        order = 90
        def before_fit(self): self.differ = []
        def after_pred(self):
            if not self.training: return
            t,views = copy.deepcopy(self.learn.model.teacher),self.learn.moco.views
            assert self.learn.model.encoder[1].training
            self.differ.append((t(views)[:2]-t([o[:2] for o in views])[:2]).abs().max().item())
    learn = Learner(tensor_dls(torch.rand(8,1,12,12), bs=4, device='cpu'), create_moco_model(small_encoder(), 8, 5), cbs=[MOCO(corners(8,8), 12, running_bn=running), (c := Company())])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, lr=0.)
    assert len(c.differ)==4 and all(o<1e-5 if running else o>1e-3 for o in c.differ)

def test_wrong_arguments():
    augs = corners(8,8)
    for kwargs,what in ((dict(K=0), 'length of the queue'), (dict(K=2.5), 'length of the queue'), (dict(K=4, temp=0.), 'temp=0.0'), (dict(K=4, m=1.5), 'm=1.5'), (dict(K=4, crop_assgn_ids=[2]), 'crop_assgn_ids')):
        with pytest.raises(ValueError, match=what): MOCO(augs, **kwargs)
    x = torch.rand(8,1,12,12)
    with pytest.raises(ValueError, match='negatives of version 3'): Learner(tensor_dls(x, bs=1), create_moco_model(small_encoder(False), 8, 5), cbs=MOCO(augs, None)).fit(1)
    with pytest.warns(UserWarning, match='older keys of every query'), (learn := Learner(tensor_dls(x, bs=4), create_moco_model(small_encoder(), 8, 5), cbs=MOCO(augs, 17))).no_bar(), learn.no_logging(): learn.fit(1)

def test_views():
    kinds = lambda p: {type(o).__name__: o for o in p.fs}
    for p in map(kinds, get_moco_aug_pipelines(16)):
        assert p['RandomGaussianBlur'].p==.5 and 'RandomSolarize' not in p and (p['RandomJitter'].s, p['RandomJitter'].saturation, p['RandomCropResize'].scale)==(.5,1.,(.2,1.))
    a,b = (kinds(p) for p in get_recipe('moco_v3_r50_100ep').create_callback().aug_pipelines)
    assert a['RandomGaussianBlur'].p==1 and b['RandomGaussianBlur'].p==.1 and 'RandomSolarize' not in a and b['RandomSolarize'].p==.2 and a['RandomJitter'].saturation==.5


# N processes

n_images,bs = 22,3
def pictures(): return torch.rand(n_images,1,12,12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
def joined(n):
    "The numbers of the images in the order in which one process, with batches of N·bs, meets the joined batches of N"
    ids = torch.arange(n_images)
    ids = torch.cat([ids, ids[:-n_images%n]]).chunk(n)
    return torch.cat([o for batches in zip(*(o.split(bs) for o in ids)) for o in batches]).tolist()

cases = dict(batch=dict(K=None), batch_one_direction=dict(K=None, crop_assgn_ids=[1]), queue=dict(K=17), one_direction=dict(K=10, crop_assgn_ids=[1]))

def fit(case, size, folder, order=None):
    torch.manual_seed(7)
    dls = tensor_dls(pictures(), pictures()[:5], bs=size, drop_last=False)
    dls.train.shuffle = False
    if order: dls.train.get_idxs = lambda: order
    cb = MOCO(corners(*((8,8,5) if case=='queue' else (8,8))), m=.9, temp=.2, **cases[case])
    learn = Learner(dls, create_moco_model(small_encoder(False), 8, 5, predictor=True).double(), opt_func=SGD, path=folder, cbs=[cb, (r := Steps())])
    learn.remove_cbs([Recorder, ProgressCallback])
    with learn.distrib_ctx(): learn.fit(2, lr=.1, wd=0.)
    return r.steps,{k:v.clone() for k,v in learn.model.state_dict().items()}

class Steps(Callback):
    order = 90
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append(dict(loss=self.learn.loss.detach(), **{k.removeprefix('module.'):p.grad.clone() for k,p in self.learn.model.named_parameters() if p.grad is not None}))

def fits(folder): return {o: fit(o, bs, folder) for o in cases}

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_ranks_equal_one_process(n, tmp_path):
    "Every loss, gradient, weight, and the queue"
    many = on_ranks(fits, tmp_path, n)
    for o in cases:
        one = fit(o, bs*n, tmp_path, joined(n))
        for res in many: torch.testing.assert_close(res[o], one, rtol=1e-9, atol=1e-9)


# Health

class Alike(MOCO):
    "Broken: no negatives"
    def lf(self, pred): return 1-nn.functional.cosine_similarity(pred.unflatten(0, (2,-1)), self.target.flip(0), dim=2).mean()

def run(cls, **kwargs):
    views = get_moco_aug_pipelines(20, resize_scale=(.4,1), jitter=False, bw=False, blur=False, stats=None)
    cb = cls(views, **(dict(K=256, m=.98, temp=.2) | kwargs))
    return monitored(lambda enc: create_moco_model(enc, 128, 32, predictor=not cb.K), cb)

def test_collapse_is_seen():
    "Without negatives all becomes one; with those of the queue, or of the batch, it does not"
    broken,*whole = run(Alike, m=0.),run(MOCO),run(MOCO, K=None, m_end=1.)
    assert 'looks like a collapse' in broken.warning and broken.history['std'][-1]<.1
    for o in whole: assert not o.warning and .1<o.history['std'][-1] and o.history['loss-chance'][-1]<-.1
